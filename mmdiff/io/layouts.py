"""Published layouts, as data: which keys mean what, and what the fields of their config.json mean.

Fields of a config.json that make other programs run code (`HOSTILE`) are looked at by nobody here.

Source: the checkpoints' state dicts (LLaDA-8B, LLaDA-1.5, LLaDA-V, iLLaDA, SigLIP 2; eMIGM, MAR, MaskGIT-pytorch,
Halton-MaskGIT, taming-transformers, LlamaGen, Show-o's MAGVIT-v2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mmdiff.io import (
    published,
    published_diffusion,
    published_images,
    published_stability,
    published_unified,
    published_vision,
)
from mmdiff.io.keymap import KeyMap
from mmdiff.io.tensors import Tensors
from mmdiff.models import emigm, llada, vision, vqgan

__all__ = ["HOSTILE", "LAYOUTS", "Published", "detect", "hostile_fields"]

HOSTILE = ("auto_map", "trust_remote_code", "_attn_implementation_internal", "custom_pipelines", "_target_")
"""Keys of a config.json that make other programs load code; we never act on them."""

Tree = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A layout in which others publish a family.

    Attributes:
        family: Name in `mmdiff.models.registry.FAMILIES`.
        keys: Published key <-> key of the module; a function of the configuration where names depend on it.
        detect: Whether a config.json is of this layout.
        read: (config.json, id of each special spelling in the tokenizer) -> our configuration.
        write: Our configuration -> the fields of a config.json.
        unused: Regular expressions of published keys that hold nothing of their own.
        copies: Published keys that repeat another tensor -> key of the module.
        regroup: Published tensors -> the same as ``keys`` names them, where a layout stacks what others keep apart.
        ungroup: Its inverse.
    """

    family: str
    keys: KeyMap | Callable[[Any], KeyMap]
    detect: Callable[[Tree], bool]
    read: Callable[[Tree, Mapping[str, int]], Any]
    write: Callable[[Any], dict[str, Any]]
    unused: Callable[[Any], tuple[str, ...]]
    copies: Callable[[Any], dict[str, str]] = lambda config: {}
    regroup: Callable[[Tensors, Any], Tensors] = lambda tensors, config: tensors
    ungroup: Callable[[Tensors, Any], Tensors] = lambda tensors, config: tensors

    def key_map(self, config: Any) -> KeyMap:
        """Published key <-> key of the module of that configuration."""
        return self.keys if isinstance(self.keys, KeyMap) else self.keys(config)


def detect(tree: Tree) -> str | None:
    """Name of the layout of a config.json; None if it is of none."""
    return next((name for name, layout in LAYOUTS.items() if layout.detect(tree)), None)


def hostile_fields(tree: Any) -> set[str]:
    """Names among `HOSTILE` that occur anywhere in a config.json."""
    found, stack = set(), [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, Mapping):
            found |= {key for key in node if key in HOSTILE}
            stack.extend(node.values())
        elif isinstance(node, list):
            stack.extend(node)
    return found


_OLMO = KeyMap(
    ("model.transformer.wte.weight", "embed_tokens.weight"),
    ("model.transformer.blocks.{i}.attn_norm.weight", "layers.{i}.input_layernorm.weight"),
    ("model.transformer.blocks.{i}.q_proj.weight", "layers.{i}.self_attn.q_proj.weight"),
    ("model.transformer.blocks.{i}.k_proj.weight", "layers.{i}.self_attn.k_proj.weight"),
    ("model.transformer.blocks.{i}.v_proj.weight", "layers.{i}.self_attn.v_proj.weight"),
    ("model.transformer.blocks.{i}.attn_out.weight", "layers.{i}.self_attn.o_proj.weight"),
    ("model.transformer.blocks.{i}.ff_norm.weight", "layers.{i}.post_attention_layernorm.weight"),
    ("model.transformer.blocks.{i}.ff_proj.weight", "layers.{i}.mlp.gate_proj.weight"),
    ("model.transformer.blocks.{i}.up_proj.weight", "layers.{i}.mlp.up_proj.weight"),
    ("model.transformer.blocks.{i}.ff_out.weight", "layers.{i}.mlp.down_proj.weight"),
    ("model.transformer.ln_f.weight", "norm.weight"),
    ("model.transformer.ff_out.weight", "lm_head.weight"),
)

_LLAMA = KeyMap(
    ("model.embed_tokens.weight", "embed_tokens.weight"),
    ("model.layers.{i}.{rest}", "layers.{i}.{rest}"),
    ("model.norm.weight", "norm.weight"),
    ("lm_head.weight", "lm_head.weight"),
)

_LLADA_V = KeyMap(
    *((theirs, f"language.{ours}") for theirs, ours in _LLAMA.rules),
    ("model.vision_tower.vision_tower.vision_model.{rest}", "vision.{rest}"),
    ("model.mm_projector.{i}.{rest}", "connector.{i}.{rest}"),
    ("model.image_newline", "newline"),
)

_IN_VOCABULARY = KeyMap(*((theirs, f"language.{ours}") for theirs, ours in _OLMO.rules))
"""Networks whose image codes are rows of LLaDA's own tables."""

_SIGLIP = KeyMap(("vision_model.{rest}", "{rest}"))

_ROTARY = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
"""Frequencies that old versions of transformers stored beside the weights."""


def _unused_olmo(config: llada.Config) -> tuple[str, ...]:
    return (r"model\.transformer\.ff_out\.weight",) if config.tied else ()


def _unused_llama(config: llada.Config) -> tuple[str, ...]:
    return (_ROTARY, r"lm_head\.weight") if config.tied else (_ROTARY,)


_SAME = KeyMap(("{rest}", "{rest}"))
"""Modules that keep the published names."""


def _emigm_keys(config: emigm.Config) -> KeyMap:
    """With one vector for both roles, the value under ``mask_token`` is the one published code evaluates with."""
    return KeyMap(("mask_token", "fake_latent"), *_SAME.rules) if config.tied_null else _SAME


_MAGVIT = KeyMap(
    ("encoder.quant_conv.{rest}", "quant_conv.{rest}"),
    ("decoder.post_quant_conv.{rest}", "post_quant_conv.{rest}"),
    *_SAME.rules,
)

_INNER = KeyMap(("{rest}", "net.{rest}"))
"""Modules that hold the published network as a part."""


def _llamagen_keys(config: vqgan.Config) -> KeyMap:
    """LlamaGen counts the decoder's levels from the lowest resolution up, taming-transformers from the highest down."""
    rules: list[tuple[str, str]] = []
    last = len(config.multipliers) - 1
    for side, ours in (("encoder", "down"), ("decoder", "up")):
        rules += [(f"{side}.mid.{i}.{{rest}}", f"{side}.mid.{name}.{{rest}}") for i, name in enumerate(_MIDDLE)]
        for level in range(last + 1):
            mine = level if side == "encoder" else last - level
            theirs = f"{side}.conv_blocks.{level}"
            rules += [(f"{theirs}.res.{{rest}}", f"{side}.{ours}.{mine}.block.{{rest}}")]
            rules += [(f"{theirs}.{{rest}}", f"{side}.{ours}.{mine}.{{rest}}")]
    return KeyMap(*rules, *_SAME.rules)


_MIDDLE = ("block_1", "attn_1", "block_2")

_LOSSES = (r"loss\..*",)
"""Discriminator and perceptual network of a training checkpoint."""


def _unused_siglip(config: vision.Config) -> tuple[str, ...]:
    last = rf"vision_model\.encoder\.layers\.{config.depth}\..*"
    return (last, r"vision_model\.head\..*", r"text_model\..*", "logit_scale", "logit_bias")


LAYOUTS: dict[str, Published] = {
    "llada-v": Published(
        family="llada_v",
        keys=_LLADA_V,
        detect=published.is_llada_v,
        read=published_vision.read_llada_v,
        write=published_vision.write_llada_v,
        unused=lambda config: _unused_llama(config.language),
    ),
    "lumina": Published(
        family="lumina",
        keys=_IN_VOCABULARY,
        detect=published_unified.is_lumina,
        read=published_unified.read_lumina,
        write=published_unified.write_lumina,
        unused=lambda config: _unused_olmo(config.language),
    ),
    "olmo": Published(
        family="llada",
        keys=_OLMO,
        detect=lambda tree: published.is_llada(tree) and "d_model" in tree,
        read=published.read_olmo,
        write=published.write_olmo,
        unused=_unused_olmo,
    ),
    "mmada": Published(
        family="mmada",
        keys=_IN_VOCABULARY,
        detect=published_unified.is_mmada,
        read=published_unified.read_mmada,
        write=published_unified.write_mmada,
        unused=lambda config: _unused_olmo(config.language),
    ),
    "llama": Published(
        family="llada",
        keys=_LLAMA,
        detect=lambda tree: published.is_llada(tree) and "hidden_size" in tree,
        read=published.read_llama,
        write=published.write_llama,
        unused=_unused_llama,
    ),
    "emigm": Published(
        family="emigm",
        keys=_emigm_keys,
        detect=published_images.is_emigm,
        read=published_images.read_emigm,
        write=published_images.write_emigm,
        unused=lambda config: ("fake_latent",) if config.tied_null else (),
        copies=lambda config: {"fake_latent": "fake_latent"} if config.tied_null else {},
    ),
    "maskgit-v1": Published(
        family="maskgit",
        keys=_INNER,
        detect=published_images.is_maskgit_v1,
        read=published_images.read_maskgit_v1,
        write=published_images.write_maskgit_v1,
        unused=lambda config: (),
    ),
    "maskgit-v2": Published(
        family="maskgit",
        keys=_INNER,
        detect=published_images.is_maskgit_v2,
        read=published_images.read_maskgit_v2,
        write=published_images.write_maskgit_v2,
        unused=lambda config: (r"head\.weight",),
        copies=lambda config: {"head.weight": "net.tok_emb.weight"},
    ),
    "kl16": Published(
        family="kl_vae",
        keys=_SAME,
        detect=published_images.is_kl,
        read=published_images.read_kl,
        write=published_images.write_kl,
        # LDM's file has attention in the decoder's levels, which MAR's code leaves out.
        unused=lambda config: (*_LOSSES, r"decoder\.up\.\d+\.attn\..*"),
    ),
    "dc-ae": Published(
        family="dc_ae",
        keys=_INNER,
        detect=published_images.is_dc_ae,
        read=published_images.read_dc_ae,
        write=published_images.write_dc_ae,
        unused=lambda config: (),
    ),
    "taming": Published(
        family="vqgan",
        keys=_SAME,
        detect=published_images.is_taming,
        read=published_images.read_vqgan,
        write=published_images.write_taming,
        unused=lambda config: _LOSSES,
    ),
    "llamagen": Published(
        family="vqgan",
        keys=_llamagen_keys,
        detect=published_images.is_llamagen,
        read=published_images.read_vqgan,
        write=published_images.write_llamagen,
        unused=lambda config: (r"quantize\.codebook_used",),
    ),
    "magvit-v2": Published(
        family="magvit",
        keys=_MAGVIT,
        detect=published_images.is_magvit,
        read=published_images.read_magvit,
        write=published_images.write_magvit,
        unused=lambda config: (),
    ),
    "amused-vq": Published(
        family="amused_vq",
        keys=_INNER,
        detect=published_images.is_amused,
        read=published_images.read_amused,
        write=published_images.write_amused,
        unused=lambda config: (),
    ),
    "siglip": Published(
        family="siglip",
        keys=_SIGLIP,
        detect=published_vision.is_siglip,
        read=published_vision.read_siglip,
        write=published_vision.write_siglip,
        unused=_unused_siglip,
    ),
    "dit": Published(
        family="dit",
        keys=published_diffusion.DIT,
        detect=published_diffusion.is_dit,
        read=published_diffusion.read_dit,
        write=published_diffusion.write_dit,
        unused=lambda config: (),
    ),
    "sd3": Published(
        family="mmdit",
        keys=published_diffusion.MMDIT,
        detect=published_diffusion.is_mmdit,
        read=published_diffusion.read_mmdit,
        write=published_diffusion.write_mmdit,
        unused=lambda config: (),
    ),
    "dit-diffusers": Published(
        family="dit",
        keys=published_stability.DIFFUSERS_DIT,
        detect=published_stability.is_diffusers_dit,
        read=published_stability.read_diffusers_dit,
        write=published_stability.write_diffusers_dit,
        unused=lambda config: (r"transformer_blocks\.[1-9]\d*\.norm1\.emb\..*",),
        copies=published_stability.shared_copies,
        regroup=published_stability.regroup_diffusers_dit,
        ungroup=published_stability.ungroup_diffusers_dit,
    ),
    "sd3-single": Published(
        family="mmdit",
        keys=published_stability.STABILITY,
        detect=published_stability.is_stability,
        read=published_stability.read_stability,
        write=published_stability.write_stability,
        # Autoencoder and text encoders of a whole pipeline in one file.
        unused=lambda config: (r"(model\.diffusion_model\.)?(first_stage_model|text_encoders|cond_stage_model)\..*",),
        regroup=published_stability.regroup_stability,
        ungroup=published_stability.ungroup_stability,
    ),
    "meissonic": Published(
        family="masked_mmdit",
        keys=published_diffusion.MASKED_MMDIT,
        detect=published_diffusion.is_masked_mmdit,
        read=published_diffusion.read_masked_mmdit,
        write=published_diffusion.write_masked_mmdit,
        unused=lambda config: (),
    ),
}
"""Layout -> what it is; the first of a family is written when none is asked for."""
