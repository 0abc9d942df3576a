"""Published config.json files of unified models over one vocabulary, and our configurations, in both directions.

Where image codes begin is known per family: it is the length of the tokenizer, which neither the number of rows nor
config.json tells. A file of other sizes says it in fields of its own (``code_offset``, ``reserved_token_mapping``).

Source: the checkpoints' config.json and published code of MMaDA (arXiv 2505.15809) and Lumina-DiMOO (arXiv 2510.06308).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mmdiff import config as configs
from mmdiff.errors import CheckpointError
from mmdiff.io import published
from mmdiff.io.fields import Tree, build
from mmdiff.models import lumina, mmada
from mmdiff.text.lumina import SpecialIds as LuminaIds
from mmdiff.text.mmada import SpecialIds

__all__ = ["is_lumina", "is_mmada", "read_lumina", "read_mmada", "write_lumina", "write_mmada"]

_SPELLINGS = {
    "bos": "<|startoftext|>",
    "eos": "<|endoftext|>",
    "end_header": "<|end_header_id|>",
    "soi": "<|soi|>",
    "eoi": "<|eoi|>",
    "t2i": "<|t2i|>",
    "mmu": "<|mmu|>",
    "ipad": "[iPAD]",
    "r2i": "<|r2i|>",
}
"""Our names of special ids and how published code spells them; the tokenizer spells most as reserved tokens."""


def is_mmada(tree: Tree) -> bool:
    """Whether a config.json is that of an MMaDA."""
    named = tree.get("architectures")
    return tree.get("model_type") == "mmada" or (isinstance(named, list) and "MMadaModelLM" in named)


def read_mmada(tree: Tree, special: Mapping[str, int]) -> mmada.Config:
    """Configuration of an MMaDA.

    Args:
        tree: The config.json.
        special: Id of each special spelling in the tokenizer beside it.

    Raises:
        CheckpointError: A field is missing, or asks for a network that ours is not.
        ConfigError: A value is of the wrong type or range.
    """
    default = mmada.Config()
    rows = tree.get("new_vocab_size") or tree.get("embedding_size")
    tokens = tree.get("num_vq_tokens", default.grid**2)
    if not isinstance(tokens, int) or tokens < 1 or math.isqrt(tokens) ** 2 != tokens:
        raise CheckpointError(f"config.json has num_vq_tokens = {tokens!r}; images are square here")
    mapping = tree.get("reserved_token_mapping")
    reserved = dict(mapping) if isinstance(mapping, Mapping) else {}
    ids = {n: reserved.get(s, special.get(s)) for n, s in _SPELLINGS.items()}
    return build(
        mmada.Config,
        language=configs.to_dict(published.read_olmo({**tree, "embedding_size": rows}, special)),
        code_offset=tree.get("code_offset", default.code_offset),
        codebook=tree.get("codebook_size", default.codebook),
        grid=math.isqrt(tokens),
        text_length=tree.get("max_text_length", default.text_length),
        special={n: i for n, i in ids.items() if i is not None},
    )


def write_mmada(config: mmada.Config) -> dict[str, Any]:
    """Fields of a config.json of an MMaDA; those that published files lack only where they differ from theirs."""
    default, vocab = mmada.Config(), config.language.vocab_size
    extra: dict[str, Any] = {}
    if config.code_offset != default.code_offset:
        extra["code_offset"] = config.code_offset
    if config.text_length != default.text_length:
        extra["max_text_length"] = config.text_length
    if config.special != SpecialIds():
        extra["reserved_token_mapping"] = {s: getattr(config.special, n) for n, s in _SPELLINGS.items()}
    return {
        **published.write_olmo(config.language),
        "architectures": ["MMadaModelLM"],
        "model_type": "mmada",
        "llm_vocab_size": vocab - config.codebook,
        "codebook_size": config.codebook,
        "num_vq_tokens": config.grid**2,
        "num_new_special_tokens": 0,
        "new_vocab_size": vocab,
        **extra,
    }


def is_lumina(tree: Tree) -> bool:
    """Whether a config.json is that of a Lumina-DiMOO, whose published one says it is a LLaDA of so many rows.

    A fine-tuned LLaDA with exactly these rows cannot be told from it.
    """
    if tree.get("model_type") == "lumina_dimoo":
        return True
    rows = tree.get("embedding_size") or tree.get("vocab_size")
    return tree.get("model_type") == "llada" and rows == lumina.Config().language.vocab_size


def read_lumina(tree: Tree, special: Mapping[str, int]) -> lumina.Config:
    """Configuration of a Lumina-DiMOO; arguments and errors as in `read_mmada`."""
    default = lumina.Config()
    ids = tree.get("special_ids")
    return build(
        lumina.Config,
        language=configs.to_dict(published.read_olmo(tree, special)),
        code_offset=tree.get("code_offset", default.code_offset),
        codebook=tree.get("codebook_size", default.codebook),
        grid=tree.get("image_grid", default.grid),
        special=dict(ids) if isinstance(ids, Mapping) else {},
    )


def write_lumina(config: lumina.Config) -> dict[str, Any]:
    """Fields of a config.json of a Lumina-DiMOO; those that the published one lacks only where they differ from it."""
    default = lumina.Config()
    extra: dict[str, Any] = {}
    for ours, theirs in (("code_offset", "code_offset"), ("codebook", "codebook_size"), ("grid", "image_grid")):
        if getattr(config, ours) != getattr(default, ours):
            extra[theirs] = getattr(config, ours)
    if config.special != LuminaIds():
        extra["special_ids"] = configs.to_dict(config.special)
    tree = published.write_olmo(config.language)
    if config.language.vocab_size != default.language.vocab_size:
        extra["model_type"] = "lumina_dimoo"
    return {**tree, **extra}
