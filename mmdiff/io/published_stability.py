"""Stability's single files of Stable Diffusion 3, and diffusers' naming of DiT: the same networks, other names.

Single files stack queries, keys and values, keep (shift, scale) where diffusers keeps (scale, shift), and hold the
autoencoder and the text encoders beside the network. They come without a config.json. diffusers' DiT repeats the
embedders of time and class in every block and leaves the table of positions out.

Its sinusoid of time divides by 127 where the original divides by 128, so the same weights give other pictures there;
ours is the original's.

Source: Stability's reference code of SD3.5; diffusers' DiTTransformer2DModel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mmdiff.errors import CheckpointError
from mmdiff.io import regroup
from mmdiff.io.fields import Tree, build, need, refuse
from mmdiff.io.keymap import KeyMap
from mmdiff.io.published_diffusion import plain_scales, unscaled_readout
from mmdiff.io.tensors import TensorInfo, Tensors
from mmdiff.models import dit, mmdit
from mmdiff.nn.posemb import sincos_2d

__all__ = [
    "DIFFUSERS_DIT",
    "STABILITY",
    "guess_stability",
    "is_diffusers_dit",
    "is_stability",
    "read_diffusers_dit",
    "read_stability",
    "regroup_diffusers_dit",
    "regroup_stability",
    "shared_copies",
    "ungroup_diffusers_dit",
    "ungroup_stability",
    "write_diffusers_dit",
    "write_stability",
]

_PREFIX = "model.diffusion_model."
_QKV = ("attn.q", "attn.k", "attn.v")
_STREAM = {
    "adaLN_modulation.1": "modulation",
    "attn.q": "attn.q",
    "attn.k": "attn.k",
    "attn.v": "attn.v",
    "attn.proj": "attn.out",
    "attn.ln_q": "attn.q_norm",
    "attn.ln_k": "attn.k_norm",
    "attn2.q": "attn2.q",
    "attn2.k": "attn2.k",
    "attn2.v": "attn2.v",
    "attn2.proj": "attn2.out",
    "attn2.ln_q": "attn2.q_norm",
    "attn2.ln_k": "attn2.k_norm",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}

STABILITY = KeyMap(
    (f"{_PREFIX}x_embedder.proj.{{rest}}", "patch.{rest}"),
    (f"{_PREFIX}pos_embed", "pos_embed"),
    (f"{_PREFIX}t_embedder.mlp.{{rest}}", "time.mlp.{rest}"),
    (f"{_PREFIX}y_embedder.mlp.{{rest}}", "pooled.mlp.{rest}"),
    (f"{_PREFIX}context_embedder.{{rest}}", "context.{rest}"),
    *(
        (f"{_PREFIX}joint_blocks.{{i}}.{theirs}.{a}.{{rest}}", f"blocks.{{i}}.{ours}.{b}.{{rest}}")
        for theirs, ours in (("x_block", "image"), ("context_block", "text"))
        for a, b in _STREAM.items()
    ),
    (f"{_PREFIX}final_layer.adaLN_modulation.1.{{rest}}", "modulation.{rest}"),
    (f"{_PREFIX}final_layer.linear.{{rest}}", "readout.{rest}"),
)

_SHARED = "transformer_blocks.0.norm1.emb."

DIFFUSERS_DIT = KeyMap(
    ("pos_embed.proj.{rest}", "x_embedder.proj.{rest}"),
    ("pos_embed", "pos_embed"),
    (f"{_SHARED}timestep_embedder.linear_1.{{rest}}", "t_embedder.mlp.0.{rest}"),
    (f"{_SHARED}timestep_embedder.linear_2.{{rest}}", "t_embedder.mlp.2.{rest}"),
    (f"{_SHARED}class_embedder.embedding_table.{{rest}}", "y_embedder.embedding_table.{rest}"),
    ("transformer_blocks.{i}.attn1.qkv.{rest}", "blocks.{i}.attn.qkv.{rest}"),
    ("transformer_blocks.{i}.attn1.to_out.0.{rest}", "blocks.{i}.attn.proj.{rest}"),
    ("transformer_blocks.{i}.ff.net.0.proj.{rest}", "blocks.{i}.mlp.fc1.{rest}"),
    ("transformer_blocks.{i}.ff.net.2.{rest}", "blocks.{i}.mlp.fc2.{rest}"),
    ("transformer_blocks.{i}.norm1.linear.{rest}", "blocks.{i}.adaLN_modulation.1.{rest}"),
    ("proj_out_1.{rest}", "final_layer.adaLN_modulation.1.{rest}"),
    ("proj_out_2.{rest}", "final_layer.linear.{rest}"),
)


def guess_stability(info: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Options of a single file, from names and shapes; a file without norms of queries has heads of 64 channels."""
    prefix = _PREFIX if f"{_PREFIX}x_embedder.proj.weight" in info else ""

    def shape(name: str) -> tuple[int, ...]:
        return info[prefix + name].shape

    width, channels, patch, _ = shape("x_embedder.proj.weight")
    blocks = {int(m[1]) for m in map(re.compile(rf"{re.escape(prefix)}joint_blocks\.(\d+)\.").match, info) if m}
    norm = f"{prefix}joint_blocks.0.x_block.attn.ln_q.weight"
    head = info[norm].shape[0] if norm in info else 64
    return {
        "_class_name": "MMDiTX",
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shape("final_layer.linear.weight")[0] // patch**2,
        "num_layers": len(blocks),
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "joint_attention_dim": shape("context_embedder.weight")[1],
        "pooled_projection_dim": shape("y_embedder.mlp.0.weight")[1],
        "pos_embed_max_size": round(shape("pos_embed")[1] ** 0.5),
        "dual_attention_layers": [
            i for i in sorted(blocks) if f"{prefix}joint_blocks.{i}.x_block.attn2.qkv.weight" in info
        ],
        "qk_norm": "rms_norm" if norm in info else None,
    }


def is_stability(tree: Tree) -> bool:
    """Whether these are the options of a single file."""
    return tree.get("_class_name") == "MMDiTX"


def read_stability(tree: Tree, special: Mapping[str, int]) -> mmdit.Config:
    """Configuration of a single file.

    Args:
        tree: What `guess_stability` or a config.json says.
        special: Ids of a tokenizer; there is none.

    Raises:
        CheckpointError: A field is missing.
        ConfigError: A value is of the wrong type or range.
    """
    heads = need(tree, "num_attention_heads")
    return build(
        mmdit.Config,
        # Positions are those of 64 patches per side in every published network.
        image_size=64 * need(tree, "patch_size"),
        patch_size=need(tree, "patch_size"),
        channels=need(tree, "in_channels"),
        out_channels=need(tree, "out_channels"),
        width=heads * need(tree, "attention_head_dim"),
        depth=need(tree, "num_layers"),
        heads=heads,
        context_channels=need(tree, "joint_attention_dim"),
        pooled_channels=need(tree, "pooled_projection_dim"),
        max_grid=need(tree, "pos_embed_max_size"),
        dual_layers=list(tree.get("dual_attention_layers") or ()),
        qk_norm=tree.get("qk_norm") is not None,
    )


def write_stability(config: mmdit.Config) -> dict[str, Any]:
    """Options of a single file.

    Raises:
        CheckpointError: The network has a scale, or positions, that the layout has no field for.
    """
    plain_scales(config)
    unscaled_readout(config)
    if config.image_size != 64 * config.patch_size:
        raise CheckpointError(
            f"image_size {config.image_size}: single files have the positions of 64 patches per side, which is "
            f"{64 * config.patch_size} here; convert to sd3 instead"
        )
    return {
        "_class_name": "MMDiTX",
        "patch_size": config.patch_size,
        "in_channels": config.channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "joint_attention_dim": config.context_channels,
        "pooled_projection_dim": config.pooled_channels,
        "pos_embed_max_size": config.max_grid,
        "dual_attention_layers": list(config.dual_layers),
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }


def regroup_stability(tensors: Tensors, config: mmdit.Config) -> Tensors:
    """A single file's tensors, with the prefix, queries, keys and values apart, and scales before shifts."""
    if f"{_PREFIX}x_embedder.proj.weight" not in tensors.info:
        tensors = tensors.renamed({name: f"{_PREFIX}{name}" for name in tensors.info})
    for attention in ("attn", "attn2"):
        parts = [part.replace("attn", attention, 1) for part in _QKV]
        tensors = regroup.split(tensors, f"{attention}.qkv", parts)
    return regroup.swapped(tensors, _two_vectors(config))


def ungroup_stability(tensors: Tensors, config: mmdit.Config) -> Tensors:
    """The inverse of `regroup_stability`."""
    for attention in ("attn", "attn2"):
        parts = [part.replace("attn", attention, 1) for part in _QKV]
        tensors = regroup.stacked(tensors, f"{attention}.qkv", parts)
    return regroup.swapped(tensors, _two_vectors(config))


def _two_vectors(config: mmdit.Config) -> list[str]:
    """Modulations of two vectors: the last layer's, and that of the last block's text."""
    owners = ("final_layer", f"joint_blocks.{config.depth - 1}.context_block")
    return [f"{_PREFIX}{o}.adaLN_modulation.1.{kind}" for o in owners for kind in ("weight", "bias")]


def is_diffusers_dit(tree: Tree) -> bool:
    """Whether a config.json is that of diffusers' DiT."""
    return tree.get("_class_name") == "DiTTransformer2DModel"


def read_diffusers_dit(tree: Tree, special: Mapping[str, int]) -> dit.Config:
    """Configuration of diffusers' DiT; arguments and errors as in `read_stability`."""
    refuse(tree, {"norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate", "attention_bias": True})
    heads = need(tree, "num_attention_heads")
    width, channels = heads * need(tree, "attention_head_dim"), need(tree, "in_channels")
    out = tree.get("out_channels") or channels
    if out not in (channels, 2 * channels):
        raise CheckpointError(f"config.json has out_channels = {out}; expected {channels}, or twice as many")
    return build(
        dit.Config,
        image_size=need(tree, "sample_size"),
        patch_size=need(tree, "patch_size"),
        channels=channels,
        width=width,
        depth=need(tree, "num_layers"),
        heads=heads,
        ffn_width=4 * width,
        classes=need(tree, "num_embeds_ada_norm"),
        learned_variance=out == 2 * channels,
    )


def write_diffusers_dit(config: dit.Config) -> dict[str, Any]:
    """Fields of diffusers' DiT.

    Raises:
        CheckpointError: The network has a scale or a feed-forward size that the layout has no field for.
    """
    plain_scales(config)
    unscaled_readout(config)
    if config.ffn_width != 4 * config.width:
        raise CheckpointError(f"ffn_width {config.ffn_width}: diffusers' DiT has 4 times the width, {4 * config.width}")
    return {
        "_class_name": "DiTTransformer2DModel",
        "sample_size": config.image_size,
        "patch_size": config.patch_size,
        "in_channels": config.channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "num_embeds_ada_norm": config.classes,
        "norm_type": "ada_norm_zero",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "dropout": 0.0,
        "upcast_attention": False,
    }


_TO = ("attn1.to_q", "attn1.to_k", "attn1.to_v")


def regroup_diffusers_dit(tensors: Tensors, config: dit.Config) -> Tensors:
    """The tensors of diffusers' DiT, stacked, and with the table of positions."""
    width, grid = config.width, config.grid

    def table() -> Tensor:
        return sincos_2d(width, grid, grid)[None]

    whole = regroup.stacked(tensors, "attn1.qkv", _TO)
    return regroup.added(whole, {"pos_embed": table}, {"pos_embed": (1, grid**2, width)})


def ungroup_diffusers_dit(tensors: Tensors, config: dit.Config) -> Tensors:
    """The inverse of `regroup_diffusers_dit`."""
    return regroup.split(regroup.without(tensors, ["pos_embed"]), "attn1.qkv", _TO)


def shared_copies(config: dit.Config) -> dict[str, str]:
    """Embedders of the blocks after the first -> the tensor they repeat."""
    parts = {
        "timestep_embedder.linear_1.weight": "t_embedder.mlp.0.weight",
        "timestep_embedder.linear_1.bias": "t_embedder.mlp.0.bias",
        "timestep_embedder.linear_2.weight": "t_embedder.mlp.2.weight",
        "timestep_embedder.linear_2.bias": "t_embedder.mlp.2.bias",
        "class_embedder.embedding_table.weight": "y_embedder.embedding_table.weight",
    }
    return {
        f"transformer_blocks.{i}.norm1.emb.{theirs}": ours
        for i in range(1, config.depth)
        for theirs, ours in parts.items()
    }
