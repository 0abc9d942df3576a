"""Options of published image-token models and our configurations, in both directions.

These models are published as a weight file and a command line; a config.json beside it holds the command line's
options under their published names.

Source: published code of eMIGM, MAR, MaskGIT-pytorch, Halton-MaskGIT, taming-transformers and LlamaGen; diffusers'
configuration of DC-AE.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdiff import config as configs
from mmdiff.errors import CheckpointError
from mmdiff.models import amused, emigm, magvit, maskgit, vae, vqgan

__all__ = [
    "is_amused",
    "is_dc_ae",
    "is_emigm",
    "is_kl",
    "is_llamagen",
    "is_magvit",
    "is_maskgit_v1",
    "is_maskgit_v2",
    "is_taming",
    "read_amused",
    "read_dc_ae",
    "read_emigm",
    "read_kl",
    "read_magvit",
    "read_maskgit_v1",
    "read_maskgit_v2",
    "read_vqgan",
    "write_amused",
    "write_dc_ae",
    "write_emigm",
    "write_kl",
    "write_llamagen",
    "write_magvit",
    "write_maskgit_v1",
    "write_maskgit_v2",
    "write_taming",
]

Tree = Mapping[str, Any]

_STRIDE = 16
"""Pixels per latent cell where a file does not say; only the quotient with the image's side matters."""


def is_emigm(tree: Tree) -> bool:
    """Whether these are the options of an eMIGM or MAR network."""
    return "encoder_embed_dim" in tree and "diffloss_w" in tree


def read_emigm(tree: Tree, special: Mapping[str, int]) -> emigm.Config:
    """Configuration from the command line's options.

    Args:
        tree: Options; those of MAR lack ``use_unsup_cfg`` and ``use_mae``, which means false and true.
        special: Not used: there is no text.

    Raises:
        CheckpointError: An option is missing.
        ConfigError: A value is of the wrong type or range.
    """

    def part(name: str) -> dict[str, Any]:
        fields = {"width": "embed_dim", "depth": "depth", "heads": "num_heads"}
        return {ours: _need(tree, f"{name}_{theirs}") for ours, theirs in fields.items()}

    values = {
        "grid": _need(tree, "img_size") // tree.get("vae_stride", _STRIDE),
        "channels": _need(tree, "vae_embed_dim"),
        "patch": tree.get("patch_size", 1),
        "classes": _need(tree, "class_num"),
        "encoder": part("encoder"),
        "decoder": part("decoder"),
        "buffer": _need(tree, "buffer_size"),
        "head_width": _need(tree, "diffloss_w"),
        "head_depth": _need(tree, "diffloss_d"),
        "tied_null": tree.get("use_unsup_cfg", False),
        "drop_masked": tree.get("use_mae", True),
        "dropout": tree.get("attn_dropout", 0.1),
        "proj_dropout": tree.get("proj_dropout", 0.1),
    }
    return configs.parse(emigm.Config, values, "config.json")


def write_emigm(config: emigm.Config) -> dict[str, Any]:
    """Options of a network, under their published names."""
    e, d = config.encoder, config.decoder
    return {
        "img_size": config.grid * _STRIDE,
        "vae_stride": _STRIDE,
        "vae_embed_dim": config.channels,
        "patch_size": config.patch,
        "class_num": config.classes,
        "encoder_embed_dim": e.width,
        "encoder_depth": e.depth,
        "encoder_num_heads": e.heads,
        "decoder_embed_dim": d.width,
        "decoder_depth": d.depth,
        "decoder_num_heads": d.heads,
        "buffer_size": config.buffer,
        "diffloss_d": config.head_depth,
        "diffloss_w": config.head_width,
        "use_unsup_cfg": config.tied_null,
        "use_mae": config.drop_masked,
        "attn_dropout": config.dropout,
        "proj_dropout": config.proj_dropout,
    }


def is_maskgit_v1(tree: Tree) -> bool:
    """Whether these are the options of a first-generation MaskGIT."""
    return "codebook_size" in tree and "hidden_dim" in tree and "register" not in tree


def is_maskgit_v2(tree: Tree) -> bool:
    """Whether these are the options of a Halton-MaskGIT."""
    return "codebook_size" in tree and "hidden_dim" in tree and "register" in tree


_MASKGIT_FIELDS = {
    "grid": "input_size",
    "codebook": "codebook_size",
    "classes": "nclass",
    "width": "hidden_dim",
    "depth": "depth",
    "heads": "heads",
    "ffn_width": "mlp_dim",
}


def read_maskgit_v1(tree: Tree, special: Mapping[str, int]) -> maskgit.Config:
    """Configuration from the constructor's options; arguments and errors as in `read_emigm`."""
    values = {ours: _need(tree, theirs) for ours, theirs in _MASKGIT_FIELDS.items()}
    return configs.parse(maskgit.Config, {"variant": "bert", **values, **_dropout(tree)}, "config.json")


def read_maskgit_v2(tree: Tree, special: Mapping[str, int]) -> maskgit.Config:
    """Configuration from the constructor's options; arguments and errors as in `read_emigm`.

    Raises:
        CheckpointError: ``proj`` above 1, which does not run in the published code either.
    """
    if tree.get("proj", 1) != 1:
        raise CheckpointError(f"config.json has proj = {tree['proj']!r}; only 1 is supported")
    values = {ours: _need(tree, theirs) for ours, theirs in _MASKGIT_FIELDS.items()}
    values |= {"variant": "halton", "registers": _need(tree, "register"), **_dropout(tree)}
    return configs.parse(maskgit.Config, values, "config.json")


def write_maskgit_v1(config: maskgit.Config) -> dict[str, Any]:
    """Options of a network of either generation, under their published names.

    Raises:
        CheckpointError: Its readout has a factor.
    """
    if config.readout_scale != 1:
        raise CheckpointError(
            f"readout_scale {config.readout_scale} has no field in the published layout, and no weight to fold it into "
            "(the readout is the embedding); save in mmdiff's own layout"
        )
    values = {theirs: getattr(config, ours) for ours, theirs in _MASKGIT_FIELDS.items()}
    return {**values, "dropout": config.dropout}


def write_maskgit_v2(config: maskgit.Config) -> dict[str, Any]:
    """Options of a Halton-MaskGIT, under their published names; errors as in `write_maskgit_v1`."""
    return {**write_maskgit_v1(config), "register": config.registers, "proj": 1}


def is_kl(tree: Tree) -> bool:
    """Whether these are the options of a KL autoencoder."""
    return "ch_mult" in tree and "embed_dim" in tree and "n_embed" not in tree


def read_kl(tree: Tree, special: Mapping[str, int]) -> vae.Config:
    """Configuration from the constructor's options; arguments and errors as in `read_emigm`.

    Attention sits where the nominal resolution, counted from an input of 256, is 16.
    """
    values = {
        **_convolutional(tree),
        "channels": _need(tree, "embed_dim"),
        "scale": tree.get("scale_to_model", vae.Config().scale),
    }
    return configs.parse(vae.Config, values, "config.json")


def write_kl(config: vae.Config) -> dict[str, Any]:
    """Options of a KL autoencoder, under their published names."""
    tree = {"embed_dim": config.channels, "scale_to_model": config.scale}
    return {**_convolutional_tree(config), **tree}


def is_taming(tree: Tree) -> bool:
    """Whether these are the options of taming-transformers' VQGAN."""
    return "ch_mult" in tree and "n_embed" in tree and "embed_dim" in tree


def is_llamagen(tree: Tree) -> bool:
    """Whether these are the options of LlamaGen's tokenizer, which has no ``embed_dim`` but a fixed 8."""
    return "ch_mult" in tree and "n_embed" in tree and "embed_dim" not in tree


def read_vqgan(tree: Tree, special: Mapping[str, int]) -> vqgan.Config:
    """Configuration of either VQGAN from its options; arguments and errors as in `read_emigm`."""
    levels = len(_need(tree, "ch_mult"))
    values = {
        **_convolutional(tree),
        "features": _need(tree, "z_channels"),
        "codebook": _need(tree, "n_embed"),
        "code_channels": tree.get("embed_dim", tree.get("codebook_embed_dim", 8)),
        "normalised": is_llamagen(tree),
    }
    if is_llamagen(tree):
        values["attention_levels"] = [levels - 1]
    return configs.parse(vqgan.Config, values, "config.json")


def write_taming(config: vqgan.Config) -> dict[str, Any]:
    """Options of taming-transformers' VQGAN."""
    tree = {"z_channels": config.features, "n_embed": config.codebook, "embed_dim": config.code_channels}
    return {**_convolutional_tree(config), **tree}


def write_llamagen(config: vqgan.Config) -> dict[str, Any]:
    """Options of LlamaGen's tokenizer."""
    tree = {"z_channels": config.features, "n_embed": config.codebook, "codebook_embed_dim": config.code_channels}
    return {**_convolutional_tree(config), **tree}


def is_magvit(tree: Tree) -> bool:
    """Whether this is the configuration of Show-o's MAGVIT-v2."""
    return tree.get("_class_name") == "MAGVITv2"


def read_magvit(tree: Tree, special: Mapping[str, int]) -> magvit.Config:
    """Configuration of MAGVIT-v2; the published file names no sizes, which means the defaults."""
    fields = {"width": "ch", "multipliers": "ch_mult", "blocks": "num_res_blocks"}
    values: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        if side in tree:
            values[side] = {ours: _need(tree[side], theirs) for ours, theirs in fields.items()}
            values["bits"] = _need(tree[side], "z_channels")
    if "encoder" in tree:
        factor = 2 ** (len(values["encoder"]["multipliers"]) - 1)
        values["image_size"] = tree.get("resolution", factor * max(1, _NOMINAL // factor))
    return configs.parse(magvit.Config, values, "config.json")


def write_magvit(config: magvit.Config) -> dict[str, Any]:
    """Configuration of MAGVIT-v2 under published names."""

    def side(part: magvit.Side) -> dict[str, Any]:
        sizes = {"ch": part.width, "ch_mult": list(part.multipliers), "num_res_blocks": list(part.blocks)}
        return {**sizes, "z_channels": config.bits}

    sides = {"encoder": side(config.encoder), "decoder": side(config.decoder)}
    return {"_class_name": "MAGVITv2", **sides, "resolution": config.image_size}


_AMUSED_FIELDS = {
    "widths": "block_out_channels",
    "layers": "layers_per_block",
    "channels": "latent_channels",
    "codebook": "num_vq_embeddings",
    "groups": "norm_num_groups",
}


def is_amused(tree: Tree) -> bool:
    """Whether this is diffusers' configuration of aMUSEd's tokenizer."""
    return tree.get("_class_name") == "VQModel"


def read_amused(tree: Tree, special: Mapping[str, int]) -> amused.Config:
    """Configuration from diffusers' config.json; arguments and errors as in `read_emigm`.

    Raises:
        CheckpointError: Another kind of ``VQModel``.
    """
    for name, wanted in (("mid_block_add_attention", False), ("lookup_from_codebook", True), ("act_fn", "silu")):
        if tree.get(name, wanted) != wanted:
            raise CheckpointError(f"config.json has {name} = {tree[name]!r}; only {wanted!r} is supported")
    return configs.parse(
        amused.Config, {ours: _need(tree, theirs) for ours, theirs in _AMUSED_FIELDS.items()}, "config.json"
    )


def write_amused(config: amused.Config) -> dict[str, Any]:
    """Diffusers' config.json."""
    values, levels = configs.to_dict(config), len(config.widths)
    return {
        "_class_name": "VQModel",
        "in_channels": 3,
        "out_channels": 3,
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "mid_block_add_attention": False,
        "lookup_from_codebook": True,
        **{theirs: values[ours] for ours, theirs in _AMUSED_FIELDS.items()},
    }


_DC_FIELDS = {
    "channels": "latent_channels",
    "head_dim": "attention_head_dim",
    "widths": "encoder_block_out_channels",
    "encoder_layers": "encoder_layers_per_block",
    "decoder_layers": "decoder_layers_per_block",
    "block_types": "encoder_block_types",
    "decoder_norms": "decoder_norm_types",
    "decoder_activations": "decoder_act_fns",
    "multiscales": "encoder_qkv_multiscales",
    "upsample": "upsample_block_type",
    "downsample": "downsample_block_type",
    "scale": "scaling_factor",
}


def is_dc_ae(tree: Tree) -> bool:
    """Whether this is diffusers' configuration of a DC-AE."""
    return tree.get("_class_name") == "AutoencoderDC"


def read_dc_ae(tree: Tree, special: Mapping[str, int]) -> vae.DCConfig:
    """Configuration from diffusers' config.json; arguments and errors as in `read_emigm`.

    Raises:
        CheckpointError: Encoder and decoder differ in what our configuration has one field for.
    """
    for name in ("block_out_channels", "block_types", "qkv_multiscales"):
        if tree.get(f"decoder_{name}") not in (None, tree.get(f"encoder_{name}")):
            raise CheckpointError(f"config.json: encoder_{name} and decoder_{name} differ, which is not supported")
    values = {ours: _need(tree, theirs) for ours, theirs in _DC_FIELDS.items()}
    levels = len(values["widths"])
    for ours in ("block_types", "decoder_norms", "decoder_activations"):
        if isinstance(values[ours], str):
            values[ours] = [values[ours]] * levels
    return configs.parse(vae.DCConfig, values, "config.json")


def write_dc_ae(config: vae.DCConfig) -> dict[str, Any]:
    """Diffusers' config.json."""
    values = configs.to_dict(config)
    tree = {theirs: values[ours] for ours, theirs in _DC_FIELDS.items()}
    same = {f"decoder_{n}": tree[f"encoder_{n}"] for n in ("block_out_channels", "block_types", "qkv_multiscales")}
    return {"_class_name": "AutoencoderDC", "in_channels": 3, **tree, **same}


def _convolutional(tree: Tree) -> dict[str, Any]:
    multipliers = list(_need(tree, "ch_mult"))
    factor = 2 ** (len(multipliers) - 1)
    size = tree.get("resolution", _NOMINAL)
    return {
        "image_size": size if size % factor == 0 else factor,
        "width": _need(tree, "ch"),
        "multipliers": multipliers,
        "blocks": tree.get("num_res_blocks", 2),
        "attention_levels": [i for i in range(len(multipliers)) if _NOMINAL >> i == _ATTENDED],
    }


def _convolutional_tree(config: vae.Config | vqgan.Config) -> dict[str, Any]:
    return {
        "ch": config.width,
        "ch_mult": list(config.multipliers),
        "num_res_blocks": config.blocks,
        "resolution": config.image_size,
    }


_NOMINAL, _ATTENDED = 256, 16
"""Input size from which resolutions are counted, and the one that has attention."""


def _dropout(tree: Tree) -> dict[str, Any]:
    return {"dropout": tree["dropout"]} if "dropout" in tree else {}


def _need(tree: Tree, key: str) -> Any:
    if tree.get(key) is None:
        raise CheckpointError(f"config.json lacks {key}")
    return tree[key]
