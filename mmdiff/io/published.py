"""Published config.json files of text backbones and our configurations, in both directions.

Source: the checkpoints' config.json (LLaDA-8B, LLaDA-1.5, iLLaDA) and the public modelling code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdiff.errors import CheckpointError
from mmdiff.io.fields import Tree, build, need, refuse
from mmdiff.models import llada

__all__ = [
    "is_llada",
    "is_llada_v",
    "read_llama",
    "read_olmo",
    "write_llama",
    "write_olmo",
]

_MASK, _BOS, _EOS, _EOT = 126336, 126080, 126081, 126348
"""Ids of the LLaDA-8B tokenizer."""
_ILLADA_MASK = 5
"""iLLaDA's; its configuration does not name it."""


def read_olmo(tree: Tree, special: Mapping[str, int]) -> llada.Config:
    """Configuration of a LLaDA in the OLMo layout.

    Args:
        tree: The config.json.
        special: Id of each special spelling in the tokenizer beside it.

    Raises:
        CheckpointError: A field is missing, or asks for a network that ours is not.
        ConfigError: A value is of the wrong type or range.
    """
    refuse(
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
    heads = need(tree, "n_heads")
    width = need(tree, "d_model")
    vocab = tree.get("embedding_size") or need(tree, "vocab_size")
    return build(
        llada.Config,
        vocab_size=vocab,
        width=width,
        depth=need(tree, "n_layers"),
        heads=heads,
        kv_heads=tree.get("n_kv_heads") or (1 if tree.get("multi_query_attention") else heads),
        ffn_width=tree.get("mlp_hidden_size") or need(tree, "mlp_ratio") * width,
        max_length=need(tree, "max_sequence_length"),
        rope_theta=float(need(tree, "rope_theta")),
        rope_full_precision=tree.get("rope_full_precision", True),
        norm_eps=tree.get("rms_norm_eps", 1e-5),
        tied=need(tree, "weight_tying"),
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
    refuse(tree, {"rope_scaling": None, "attention_bias": False, "mlp_bias": False, "hidden_act": "silu"})
    heads = need(tree, "num_attention_heads")
    width = need(tree, "hidden_size")
    if tree.get("head_dim") not in (None, width // heads):
        raise CheckpointError(f"head_dim {tree['head_dim']} is not hidden_size {width} / heads {heads}: not supported")
    rope = tree.get("rope_parameters")
    rope = rope if isinstance(rope, Mapping) else tree
    refuse(rope, {"rope_type": "default"})
    vocab = need(tree, "vocab_size")
    return build(
        llada.Config,
        vocab_size=vocab,
        width=width,
        depth=need(tree, "num_hidden_layers"),
        heads=heads,
        kv_heads=tree.get("num_key_value_heads") or heads,
        ffn_width=need(tree, "intermediate_size"),
        max_length=need(tree, "max_position_embeddings"),
        rope_theta=float(need(rope, "rope_theta")),
        rope_full_precision=False,
        norm_eps=need(tree, "rms_norm_eps"),
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


def _ids(tree: Tree, special: Mapping[str, int], vocab: Any) -> dict[str, int]:
    """Token ids. Published files disagree on which of them they name, so each has its order of sources."""
    eos = _pick(vocab, tree.get("eos_token_id"), special.get("<|endoftext|>"), _EOS)
    # LLaDA-V's config.json names 128000, outside its vocabulary; so the tokenizer goes first.
    bos = _pick(vocab, special.get("<|startoftext|>"), tree.get("bos_token_id"), _BOS, eos)
    own, turn = (_ILLADA_MASK, eos) if _is_illada(tree) else (_MASK, _EOT)
    eot = _pick(vocab, special.get("<|eot_id|>"), turn, eos)
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
    if is_llada_v(tree) or tree.get("model_type") == "lumina_dimoo":
        return False
    return tree.get("model_type") in ("llada", "illada") or "LLaDAModelLM" in _architectures(tree) or _is_illada(tree)


def is_llada_v(tree: Tree) -> bool:
    """Whether a config.json is that of a LLaDA-V."""
    return tree.get("model_type") == "llava_llada" or "LlavaLLaDA" in _architectures(tree)
