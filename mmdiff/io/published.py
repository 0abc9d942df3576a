"""Published config.json files and our configurations, in both directions.

A field that would change the network and that our network has no switch for is refused by name; a needed one that is
absent is asked for, not guessed.

Source: the checkpoints' config.json (LLaDA-8B, LLaDA-1.5, LLaDA-V, iLLaDA) and the public modelling code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdiff import config as configs
from mmdiff.errors import CheckpointError
from mmdiff.models import llada, llada_v, vision

__all__ = [
    "is_llada",
    "is_llada_v",
    "read_llada_v",
    "read_llama",
    "read_olmo",
    "write_llada_v",
    "write_llama",
    "write_olmo",
]

Tree = Mapping[str, Any]

_MASK, _BOS, _EOS, _EOT = 126336, 126080, 126081, 126348
"""Ids of the LLaDA-8B tokenizer."""


def read_olmo(tree: Tree, special: Mapping[str, int]) -> llada.Config:
    """Configuration of a LLaDA in the OLMo layout.

    Args:
        tree: The config.json.
        special: Id of each special spelling in the tokenizer beside it.

    Raises:
        CheckpointError: A field is missing, or asks for a network that ours is not.
        ConfigError: A value is of the wrong type or range.
    """
    _refuse(
        tree,
        {
            "alibi": False,
            "rope": True,
            "include_bias": False,
            "include_qkv_bias": False,
            "bias_for_layer_norm": False,
            "layer_norm_type": "rms",
            "layer_norm_with_affine": True,
            "attention_layer_norm": False,
            "block_type": "llama",
            "block_group_size": 1,
            "activation_type": "silu",
            "scale_logits": False,
            "input_emb_norm": False,
        },
    )
    heads = _need(tree, "n_heads")
    width = _need(tree, "d_model")
    vocab = tree.get("embedding_size") or _need(tree, "vocab_size")
    return _config(
        llada.Config,
        vocab_size=vocab,
        width=width,
        depth=_need(tree, "n_layers"),
        heads=heads,
        kv_heads=tree.get("n_kv_heads") or (1 if tree.get("multi_query_attention") else heads),
        ffn_width=tree.get("mlp_hidden_size") or _need(tree, "mlp_ratio") * width,
        max_length=_need(tree, "max_sequence_length"),
        rope_theta=float(_need(tree, "rope_theta")),
        rope_full_precision=tree.get("rope_full_precision", True),
        norm_eps=tree.get("rms_norm_eps", 1e-5),
        tied=_need(tree, "weight_tying"),
        **_ids(tree, special, vocab),
    )


def write_olmo(config: llada.Config) -> dict[str, Any]:
    """Fields of a config.json in the OLMo layout."""
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": config.width,
        "embedding_dropout": 0.0,
        "embedding_size": config.vocab_size,
        "eos_token_id": config.eos_id,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": config.mask_id,
        "max_sequence_length": config.max_length,
        "mlp_hidden_size": config.ffn_width,
        "mlp_ratio": 4,
        "multi_query_attention": None,
        "n_heads": config.heads,
        "n_kv_heads": config.kv_heads,
        "n_layers": config.depth,
        "pad_token_id": config.eos_id,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": config.norm_eps,
        "rope": True,
        "rope_full_precision": config.rope_full_precision,
        "rope_theta": config.rope_theta,
        "scale_logits": False,
        "use_cache": False,
        "vocab_size": config.vocab_size,
        "weight_tying": config.tied,
    }


def read_llama(tree: Tree, special: Mapping[str, int]) -> llada.Config:
    """Configuration of a LLaDA in the LLaMA layout; arguments and errors as in `read_olmo`."""
    _refuse(tree, {"rope_scaling": None, "attention_bias": False, "mlp_bias": False, "hidden_act": "silu"})
    heads = _need(tree, "num_attention_heads")
    width = _need(tree, "hidden_size")
    if tree.get("head_dim") not in (None, width // heads):
        raise CheckpointError(f"head_dim {tree['head_dim']} is not hidden_size {width} / heads {heads}: not supported")
    rope = tree.get("rope_parameters")
    rope = rope if isinstance(rope, Mapping) else tree
    _refuse(rope, {"rope_type": "default"})
    vocab = _need(tree, "vocab_size")
    return _config(
        llada.Config,
        vocab_size=vocab,
        width=width,
        depth=_need(tree, "num_hidden_layers"),
        heads=heads,
        kv_heads=tree.get("num_key_value_heads") or heads,
        ffn_width=_need(tree, "intermediate_size"),
        max_length=_need(tree, "max_position_embeddings"),
        rope_theta=float(_need(rope, "rope_theta")),
        rope_full_precision=False,
        norm_eps=_need(tree, "rms_norm_eps"),
        tied=tree.get("tie_word_embeddings", False),
        **_ids(tree, special, vocab),
    )


def write_llama(config: llada.Config) -> dict[str, Any]:
    """Fields of a config.json in the LLaMA layout."""
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "hidden_act": "silu",
        "hidden_size": config.width,
        "initializer_range": 0.02,
        "intermediate_size": config.ffn_width,
        "mask_token_id": config.mask_id,
        "max_position_embeddings": config.max_length,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.depth,
        "num_key_value_heads": config.kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "use_cache": False,
        "vocab_size": config.vocab_size,
    }


_TOWERS = ("siglip2-so400m-patch14-384", "siglip-so400m-patch14-384")
"""Towers of the default size of `mmdiff.models.vision.Config`, by the last part of their name."""


def read_llada_v(tree: Tree, special: Mapping[str, int]) -> llada_v.Config:
    """Configuration of a LLaDA-V; arguments and errors as in `read_olmo`."""
    _refuse(tree, {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch"})
    tower = _tower(tree)
    if tree.get("mm_hidden_size", tower.width) != tower.width:
        raise CheckpointError(f"mm_hidden_size {tree['mm_hidden_size']} is not the tower's width {tower.width}")
    return _config(llada_v.Config, language=configs.to_dict(read_llama(tree, special)), vision=configs.to_dict(tower))


def _tower(tree: Tree) -> vision.Config:
    """The tower: of ``vision_config`` if there is one, else the one that ``mm_vision_tower`` names."""
    own = tree.get("vision_config")
    if isinstance(own, Mapping):
        _refuse(own, {"hidden_act": "gelu_pytorch_tanh", "num_channels": 3})
        return _config(
            vision.Config,
            image_size=_need(own, "image_size"),
            patch_size=_need(own, "patch_size"),
            width=_need(own, "hidden_size"),
            depth=_need(own, "num_hidden_layers") - 1,
            heads=_need(own, "num_attention_heads"),
            ffn_width=_need(own, "intermediate_size"),
            norm_eps=own.get("layer_norm_eps", 1e-6),
        )
    name = str(_need(tree, "mm_vision_tower"))
    if name.rstrip("/").rsplit("/", 1)[-1] not in _TOWERS:
        raise CheckpointError(
            f"the tower {name!r} is not known (known: {', '.join(_TOWERS)}); add its transformers configuration to "
            "config.json under vision_config"
        )
    return vision.Config()


def write_llada_v(config: llada_v.Config) -> dict[str, Any]:
    """Fields of a LLaDA-V config.json; a tower of another size than the published one goes to ``vision_config``."""
    tower, size = config.vision, config.vision.image_size
    own = {
        "model_type": "siglip_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": tower.width,
        "image_size": size,
        "intermediate_size": tower.ffn_width,
        "layer_norm_eps": tower.norm_eps,
        "num_attention_heads": tower.heads,
        "num_channels": 3,
        "num_hidden_layers": tower.depth + 1,
        "patch_size": tower.patch_size,
    }
    return {
        **write_llama(config.language),
        "architectures": ["LlavaLLaDAModelLM"],
        "model_type": "llava_llada",
        "image_aspect_ratio": "anyres_max_4",
        "image_grid_pinpoints": [[size * i, size * j] for i in range(1, 7) for j in range(1, 7)],
        "mm_hidden_size": tower.width,
        "mm_newline_position": "grid",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_spatial_pool_mode": "bilinear",
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"google/{_TOWERS[0]}" if tower == vision.Config() else "siglip",
        "tokenizer_model_max_length": config.language.max_length,
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
        **({} if tower == vision.Config() else {"vision_config": own}),
    }


def _config(cls: Any, **values: Any) -> Any:
    return configs.parse(cls, values, "config.json")


def _need(tree: Tree, key: str) -> Any:
    if tree.get(key) is None:
        raise CheckpointError(f"config.json lacks {key}")
    return tree[key]


def _refuse(tree: Tree, supported: Mapping[str, Any]) -> None:
    """Refuse switches that our network does not have; null counts as absent."""
    for key, value in supported.items():
        if tree.get(key) not in (None, value):
            raise CheckpointError(f"config.json has {key} = {tree[key]!r}; only {value!r} is supported")


def _ids(tree: Tree, special: Mapping[str, int], vocab: Any) -> dict[str, int]:
    """Token ids. Published files disagree on which of them they name, so each has its order of sources."""
    eos = _pick(vocab, tree.get("eos_token_id"), special.get("<|endoftext|>"), _EOS)
    # LLaDA-V's config.json names 128000, outside its vocabulary; so the tokenizer goes first.
    bos = _pick(vocab, special.get("<|startoftext|>"), tree.get("bos_token_id"), _BOS, eos)
    eot = _pick(vocab, special.get("<|eot_id|>"), _EOT, eos)
    own = 5 if _is_illada(tree) else _MASK
    mask = _pick(vocab, tree.get("mask_token_id"), special.get("<|mdm_mask|>"), special.get("<[MASK]>"), own)
    if mask is None or eos is None:
        missing = "mask_token_id" if mask is None else "eos_token_id"
        raise CheckpointError(f"config.json lacks {missing}, and no tokenizer.json beside it tells; add it")
    return {
        "mask_id": mask,
        "bos_id": eos if bos is None else bos,
        "eos_id": eos,
        "eot_id": eos if eot is None else eot,
    }


def _pick(vocab: Any, *candidates: Any) -> int | None:
    """The first candidate that is an id of the vocabulary; of a list, its first entry counts."""
    for candidate in candidates:
        found = candidate[0] if isinstance(candidate, list) and candidate else candidate
        if isinstance(found, int) and isinstance(vocab, int) and 0 <= found < vocab:
            return found
    return None


def _architectures(tree: Tree) -> str:
    named = tree.get("architectures")
    return " ".join(map(str, named)) if isinstance(named, list) else ""


def _is_illada(tree: Tree) -> bool:
    return tree.get("model_type") == "illada" or "ILLaDA" in _architectures(tree)


def is_llada(tree: Tree) -> bool:
    """Whether a config.json is that of a text backbone."""
    if is_llada_v(tree):
        return False
    return tree.get("model_type") in ("llada", "illada") or "LLaDAModelLM" in _architectures(tree) or _is_illada(tree)


def is_llada_v(tree: Tree) -> bool:
    """Whether a config.json is that of a LLaDA-V."""
    return tree.get("model_type") == "llava_llada" or "LlavaLLaDA" in _architectures(tree)
