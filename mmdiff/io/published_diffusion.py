"""Published DiT, MMDiT and masked MMDiT: their configurations and key names, in both directions.

Original DiT files carry no config.json; its fields are the arguments of the published constructor, and a muP
checkpoint adds ``base_hidden_size`` and ``output_mult``. The two others are diffusers' configurations.

Source: published code of DiT and of muP for diffusion transformers; diffusers' SD3Transformer2DModel; Meissonic and
Muddit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdiff.errors import CheckpointError
from mmdiff.io.fields import Tree, build, need, refuse
from mmdiff.io.keymap import KeyMap
from mmdiff.models import dit, masked_mmdit, mmdit

__all__ = [
    "DIT",
    "MASKED_MMDIT",
    "MMDIT",
    "is_dit",
    "is_masked_mmdit",
    "is_mmdit",
    "plain_scales",
    "read_dit",
    "read_masked_mmdit",
    "read_mmdit",
    "unscaled_readout",
    "write_dit",
    "write_masked_mmdit",
    "write_mmdit",
]

DIT = KeyMap(("{rest}", "{rest}"))
"""The module has the published names."""

_EMBEDDERS = (
    ("time_text_embed.timestep_embedder.linear_1.{rest}", "time.mlp.0.{rest}"),
    ("time_text_embed.timestep_embedder.linear_2.{rest}", "time.mlp.2.{rest}"),
    ("time_text_embed.text_embedder.linear_1.{rest}", "pooled.mlp.0.{rest}"),
    ("time_text_embed.text_embedder.linear_2.{rest}", "pooled.mlp.2.{rest}"),
    ("context_embedder.{rest}", "context.{rest}"),
)
_BLOCK = {
    "norm1.linear": "image.modulation",
    "norm1_context.linear": "text.modulation",
    "attn.to_q": "image.attn.q",
    "attn.to_k": "image.attn.k",
    "attn.to_v": "image.attn.v",
    "attn.to_out.0": "image.attn.out",
    "attn.norm_q": "image.attn.q_norm",
    "attn.norm_k": "image.attn.k_norm",
    "attn.add_q_proj": "text.attn.q",
    "attn.add_k_proj": "text.attn.k",
    "attn.add_v_proj": "text.attn.v",
    "attn.to_add_out": "text.attn.out",
    "attn.norm_added_q": "text.attn.q_norm",
    "attn.norm_added_k": "text.attn.k_norm",
    "attn2.to_q": "image.attn2.q",
    "attn2.to_k": "image.attn2.k",
    "attn2.to_v": "image.attn2.v",
    "attn2.to_out.0": "image.attn2.out",
    "attn2.norm_q": "image.attn2.q_norm",
    "attn2.norm_k": "image.attn2.k_norm",
    "ff.net.0.proj": "image.mlp.fc1",
    "ff.net.2": "image.mlp.fc2",
    "ff_context.net.0.proj": "text.mlp.fc1",
    "ff_context.net.2": "text.mlp.fc2",
}
_SINGLE = {
    "norm.linear": "modulation",
    "attn.to_q": "attn.q",
    "attn.to_k": "attn.k",
    "attn.to_v": "attn.v",
    "attn.norm_q": "attn.q_norm",
    "attn.norm_k": "attn.k_norm",
    "proj_mlp": "fc1",
    "proj_out": "out",
}


def _blocks(names: Mapping[str, str], theirs: str, ours: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"{theirs}.{{i}}.{a}.{{rest}}", f"{ours}.{{i}}.{b}.{{rest}}") for a, b in names.items())


MMDIT = KeyMap(
    ("pos_embed.proj.{rest}", "patch.{rest}"),
    ("pos_embed.pos_embed", "pos_embed"),
    *_EMBEDDERS,
    *_blocks(_BLOCK, "transformer_blocks", "blocks"),
    ("norm_out.linear.{rest}", "modulation.{rest}"),
    ("proj_out.{rest}", "readout.{rest}"),
)

MASKED_MMDIT = KeyMap(
    ("embed.embeddings.{rest}", "embed.table.{rest}"),
    ("embed.layer_norm.{rest}", "embed.norm.{rest}"),
    ("embed.conv.{rest}", "embed.conv.{rest}"),
    ("down_block.downsample.norm.{rest}", "embed.down_norm.{rest}"),
    ("down_block.downsample.conv.{rest}", "embed.down.{rest}"),
    ("project_to_hidden_norm.{rest}", "embed.in_norm.{rest}"),
    ("project_to_hidden.{rest}", "embed.linear.{rest}"),
    ("cond_embed.linear_1.{rest}", "micro.0.{rest}"),
    ("cond_embed.linear_2.{rest}", "micro.1.{rest}"),
    ("adapter.1.{rest}", "adapter.{rest}"),
    *_EMBEDDERS,
    ("encoder_proj_layer_norm.{rest}", "context_norm.{rest}"),
    *_blocks(_BLOCK, "transformer_blocks", "blocks"),
    *_blocks(_SINGLE, "single_transformer_blocks", "singles"),
    ("project_from_hidden_norm.{rest}", "codes.norm.{rest}"),
    ("project_from_hidden.{rest}", "codes.linear.{rest}"),
    ("up_block.upsample.norm.{rest}", "codes.up_norm.{rest}"),
    ("up_block.upsample.conv.{rest}", "codes.up.{rest}"),
    ("mlm_layer.conv1.{rest}", "codes.conv.{rest}"),
    ("mlm_layer.layer_norm.{rest}", "codes.out_norm.{rest}"),
    ("mlm_layer.conv2.{rest}", "codes.out.{rest}"),
    ("text_decoder.1.{rest}", "text_readout.{rest}"),
)


def is_dit(tree: Tree) -> bool:
    """Whether a config.json holds the arguments of the original DiT."""
    return {"input_size", "hidden_size", "num_heads", "num_classes"} <= set(tree)


def read_dit(tree: Tree, special: Mapping[str, int]) -> dit.Config:
    """Configuration of an original DiT, in standard parametrisation or in muP.

    Args:
        tree: The config.json.
        special: Ids of a tokenizer; there is none.

    Raises:
        CheckpointError: A field is missing, or asks for a network that ours is not.
        ConfigError: A value is of the wrong type or range.
    """
    if not tree.get("class_dropout_prob", 0.1):
        raise CheckpointError("config.json has class_dropout_prob = 0; a DiT without a row for no class is not known")
    width = need(tree, "hidden_size")
    base = tree.get("base_hidden_size")
    return build(
        dit.Config,
        image_size=need(tree, "input_size"),
        patch_size=need(tree, "patch_size"),
        channels=tree.get("in_channels", 4),
        width=width,
        depth=need(tree, "depth"),
        heads=need(tree, "num_heads"),
        ffn_width=int(width * tree.get("mlp_ratio", 4.0)),
        classes=need(tree, "num_classes"),
        learned_variance=tree.get("learn_sigma", True),
        readout_scale=1.0 if base is None else tree.get("output_mult", 1.0) * base / width,
    )


def write_dit(config: dit.Config) -> dict[str, Any]:
    """Arguments of the original DiT.

    Raises:
        CheckpointError: The network has a scale that published files have no field for.
    """
    plain_scales(config)
    mup = {"base_hidden_size": config.width, "output_mult": config.readout_scale}
    return {
        "input_size": config.image_size,
        "patch_size": config.patch_size,
        "in_channels": config.channels,
        "hidden_size": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": config.ffn_width / config.width,
        "class_dropout_prob": 0.1,
        "num_classes": config.classes,
        "learn_sigma": config.learned_variance,
        **(mup if config.readout_scale != 1 else {}),
    }


def is_mmdit(tree: Tree) -> bool:
    """Whether a config.json is that of diffusers' SD3 network."""
    return tree.get("_class_name") == "SD3Transformer2DModel"


def read_mmdit(tree: Tree, special: Mapping[str, int]) -> mmdit.Config:
    """Configuration of diffusers' SD3 network; arguments and errors as in `read_dit`."""
    heads = need(tree, "num_attention_heads")
    width = heads * need(tree, "attention_head_dim")
    refuse(tree, {"caption_projection_dim": width})
    if tree.get("qk_norm") not in (None, "rms_norm"):
        raise CheckpointError(f"config.json has qk_norm = {tree['qk_norm']!r}; only null and 'rms_norm' are supported")
    channels = need(tree, "in_channels")
    return build(
        mmdit.Config,
        image_size=need(tree, "sample_size"),
        patch_size=need(tree, "patch_size"),
        channels=channels,
        out_channels=tree.get("out_channels") or channels,
        width=width,
        depth=need(tree, "num_layers"),
        heads=heads,
        context_channels=need(tree, "joint_attention_dim"),
        pooled_channels=need(tree, "pooled_projection_dim"),
        max_grid=need(tree, "pos_embed_max_size"),
        dual_layers=list(tree.get("dual_attention_layers") or ()),
        qk_norm=tree.get("qk_norm") is not None,
    )


def write_mmdit(config: mmdit.Config) -> dict[str, Any]:
    """Fields of diffusers' SD3 network; errors as in `write_dit`."""
    plain_scales(config)
    unscaled_readout(config)
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": config.image_size,
        "patch_size": config.patch_size,
        "in_channels": config.channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "joint_attention_dim": config.context_channels,
        "caption_projection_dim": config.width,
        "pooled_projection_dim": config.pooled_channels,
        "pos_embed_max_size": config.max_grid,
        "dual_attention_layers": list(config.dual_layers),
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }


def is_masked_mmdit(tree: Tree) -> bool:
    """Whether a config.json is that of Meissonic's or Muddit's network."""
    return {"num_single_layers", "codebook_size", "axes_dims_rope"} <= set(tree)


def read_masked_mmdit(tree: Tree, special: Mapping[str, int]) -> masked_mmdit.Config:
    """Configuration of a masked MMDiT; arguments and errors as in `read_dit`."""
    refuse(tree, {"patch_size": 1, "guidance_embeds": False})
    resample = bool(tree.get("downsample", False))
    refuse(tree, {"upsample": resample})
    heads = need(tree, "num_attention_heads")
    return build(
        masked_mmdit.Config,
        width=heads * need(tree, "attention_head_dim"),
        heads=heads,
        depth=need(tree, "num_layers"),
        single_depth=need(tree, "num_single_layers"),
        context_channels=need(tree, "joint_attention_dim"),
        pooled_channels=need(tree, "pooled_projection_dim"),
        axes=list(need(tree, "axes_dims_rope")),
        vocab_size=need(tree, "vocab_size"),
        codebook=need(tree, "codebook_size"),
        text_vocab_size=tree.get("tokenizer_vocab_size"),
        resample=resample,
        adapter=bool(tree.get("adapter", False)),
    )


def write_masked_mmdit(config: masked_mmdit.Config) -> dict[str, Any]:
    """Fields of a masked MMDiT; errors as in `write_dit`."""
    plain_scales(config)
    unscaled_readout(config)
    text = {} if config.text_vocab_size is None else {"tokenizer_vocab_size": config.text_vocab_size}
    return {
        "_class_name": "Transformer2DModel" if config.text_vocab_size is None else "SymmetricTransformer2DModel",
        "patch_size": 1,
        "num_layers": config.depth,
        "num_single_layers": config.single_depth,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "joint_attention_dim": config.context_channels,
        "pooled_projection_dim": config.pooled_channels,
        "axes_dims_rope": list(config.axes),
        "vocab_size": config.vocab_size,
        "codebook_size": config.codebook,
        "downsample": config.resample,
        "upsample": config.resample,
        "adapter": config.adapter,
        **text,
    }


def plain_scales(config: Any) -> None:
    """Refuse scales of branches and attention.

    Raises:
        CheckpointError: The network has one.
    """
    if config.residual_scale != 1 or config.attention_scale is not None:
        raise CheckpointError("published layouts have no field for residual_scale and attention_scale")


def unscaled_readout(config: Any) -> None:
    """Refuse a factor of the readout.

    Raises:
        CheckpointError: The network has one.
    """
    if config.readout_scale != 1:
        raise CheckpointError(
            f"readout_scale {config.readout_scale} has no field in the published layout; fold it into the weight with "
            "mmdiff.scale.mup.fold first"
        )
