"""Published config.json files of vision towers and vision-language models and our configurations, in both directions.

Source: LLaDA-V's config.json and loader; SigLIP 2's config.json.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mmdiff import config as configs
from mmdiff.errors import CheckpointError
from mmdiff.images import Tiling
from mmdiff.io.fields import Tree, build, need, refuse
from mmdiff.io.published import read_llama, write_llama
from mmdiff.models import llada_v, vision

__all__ = ["is_siglip", "read_llada_v", "read_siglip", "write_llada_v", "write_siglip"]

_TOWERS = ("siglip2-so400m-patch14-384", "siglip-so400m-patch14-384")
"""Towers of the default size of `mmdiff.models.vision.Config`, by the last part of their name."""


def read_llada_v(tree: Tree, special: Mapping[str, int]) -> llada_v.Config:
    """Configuration of a LLaDA-V; arguments and errors as in `read_olmo`."""
    refuse(
        tree,
        {
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_feature": "patch",
            "mm_spatial_pool_mode": "bilinear",
            "mm_use_im_start_end": False,
            "add_faster_video": False,
            "add_time_instruction": False,
        },
    )
    tower = _tower(tree)
    if tree.get("mm_hidden_size", tower.width) != tower.width:
        raise CheckpointError(f"mm_hidden_size {tree['mm_hidden_size']} is not the tower's width {tower.width}")
    return build(
        llada_v.Config,
        language=configs.to_dict(read_llama(tree, special)),
        vision=configs.to_dict(tower),
        tiling=configs.to_dict(_tiling(tree, tower.image_size)),
        max_tokens=_max_tokens(tree.get("tokenizer_model_max_length")),
    )


_ASPECTS = r"anyres(?:_max_(?P<limit>[1-9]\d*))?|pad|square"
_GRID = r"\((\d+)x(\d+)\),\.\.\.,\((\d+)x(\d+)\)"


def _tiling(tree: Tree, size: int) -> Tiling:
    """How pictures are cut; what training did not write down is LLaVA's default, one square per picture."""
    aspect, merge = tree.get("image_aspect_ratio") or "square", tree.get("mm_patch_merge_type") or "flat"
    found = re.fullmatch(_ASPECTS, str(aspect))
    if found is None:
        raise CheckpointError(f"image_aspect_ratio {aspect!r} is not known; known: anyres_max_N, anyres, pad, square")
    if merge not in ("flat", "spatial_unpad"):
        raise CheckpointError(f"mm_patch_merge_type {merge!r} is not known; known: spatial_unpad, flat")
    return build(
        Tiling,
        crops="anyres" if aspect.startswith("anyres") else aspect,
        pinpoints=_pinpoints(tree.get("image_grid_pinpoints"), size),
        limit=int(found["limit"]) if found["limit"] else None,
        newlines=merge == "spatial_unpad",
        video_newlines=tree.get("mm_newline_position") or "grid",
    )


def _pinpoints(given: Any, size: int) -> Any:
    """The list of pinpoints; None if it is the one of all products of 1 to 6 tiles."""
    if isinstance(given, str):
        grid = re.fullmatch(_GRID, re.sub(r"\s", "", given))
        if grid is None or max(map(int, grid.groups())) > _MOST_TILES:
            raise CheckpointError(f"image_grid_pinpoints {given[:60]!r} is not like '(1x1),...,(6x6)'")
        a, b, c, d = map(int, grid.groups())
        given = [[size * i, size * j] for i in range(a, c + 1) for j in range(b, d + 1)]
    return None if given == [list(p) for p in Tiling().canvases(size)] else given


_MOST_TILES = 64


def _max_tokens(given: Any) -> Any:
    """None for the enormous number that transformers writes where there is no limit."""
    return None if isinstance(given, int) and given >= 2**31 else given


def _tower(tree: Tree) -> vision.Config:
    """The tower: of ``vision_config`` if there is one, else the one that ``mm_vision_tower`` names."""
    own = tree.get("vision_config")
    if isinstance(own, Mapping):
        return read_siglip(own, {})
    name = str(need(tree, "mm_vision_tower"))
    if name.rstrip("/").rsplit("/", 1)[-1] not in _TOWERS:
        raise CheckpointError(
            f"the tower {name!r} is not known (known: {', '.join(_TOWERS)}); add its transformers configuration to "
            "config.json under vision_config"
        )
    return vision.Config()


def write_llada_v(config: llada_v.Config) -> dict[str, Any]:
    """Fields of a LLaDA-V config.json; a tower of another size than the published one goes to ``vision_config``."""
    tower, size = config.vision, config.vision.image_size
    return {
        **write_llama(config.language),
        "architectures": ["LlavaLLaDAModelLM"],
        "model_type": "llava_llada",
        **_write_tiling(config.tiling, size),
        "mm_hidden_size": tower.width,
        "mm_projector_type": "mlp2x_gelu",
        "mm_spatial_pool_mode": "bilinear",
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"google/{_TOWERS[0]}" if tower == vision.Config() else "siglip",
        "tokenizer_model_max_length": config.max_tokens,
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
        **({} if tower == vision.Config() else {"vision_config": write_siglip(tower)}),
    }


def _write_tiling(tiling: Tiling | None, size: int) -> dict[str, Any]:
    tiling = tiling or Tiling(crops="square", newlines=False)
    limit = "" if tiling.limit is None else f"_max_{tiling.limit}"
    return {
        "image_aspect_ratio": f"anyres{limit}" if tiling.crops == "anyres" else tiling.crops,
        "image_grid_pinpoints": [list(p) for p in tiling.canvases(size)],
        "mm_newline_position": tiling.video_newlines,
        "mm_patch_merge_type": "spatial_unpad" if tiling.newlines else "flat",
    }


def read_siglip(tree: Tree, special: Mapping[str, int]) -> vision.Config:
    """Configuration of the tower of a SigLIP, without its last layer, as LLaDA-V uses it; errors as in `read_olmo`."""
    own = tree.get("vision_config", tree)
    if not isinstance(own, Mapping):
        raise CheckpointError(f"vision_config holds {type(own).__name__}, expected a table")
    refuse(own, {"hidden_act": "gelu_pytorch_tanh", "num_channels": 3})
    said = {**_SIGLIP_DEFAULTS, **own}
    sizes = {ours: need(said, theirs) for ours, theirs in _SIGLIP.items()}
    layers = need(said, "num_hidden_layers")
    return build(vision.Config, **sizes, depth=layers - 1 if isinstance(layers, int) else layers)


def is_siglip(tree: Tree) -> bool:
    """Whether a config.json is that of a SigLIP, or of its vision tower alone."""
    return tree.get("model_type") in ("siglip", "siglip_vision_model")


_SIGLIP_DEFAULTS = {
    "hidden_size": 768,
    "image_size": 224,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-6,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "patch_size": 16,
}
"""What transformers leaves out of a config.json."""

_SIGLIP = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "ffn_width": "intermediate_size",
    "norm_eps": "layer_norm_eps",
}


def write_siglip(config: vision.Config) -> dict[str, Any]:
    """Fields of a SigLIP vision config.json; it counts the layer that is not there, as the published one does.

    Raises:
        CheckpointError: The tower normalises its features, which the published layout cannot say.
    """
    if config.post_norm:
        raise CheckpointError("a vision tower with post_norm has no published layout; keep it in ours")
    return {
        "model_type": "siglip_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
        "num_channels": 3,
        "num_hidden_layers": config.depth + 1,
        **{theirs: getattr(config, ours) for ours, theirs in _SIGLIP.items()},
    }
