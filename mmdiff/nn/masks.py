"""Which key a query may attend, as a rule over integer metadata and as the tensors that attention takes.

A *rule* is a ``mask_mod`` of PyTorch's flex attention: a function of (batch, head, query, key) index tensors that
broadcast. `dense` writes it out as booleans for scaled-dot-product attention (`LLaDA.hidden` takes it as ``attend``),
`sparse` as the block mask of flex attention. Each mask is therefore written once.

Padding needs no rule of its own: it is one more document. Never pass zeros and ones as a floating-point bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmdiff.errors import ConfigError

__all__ = [
    "Mode",
    "Rule",
    "block_diffusion",
    "dense",
    "document_mask",
    "documents",
    "ranges",
    "sparse",
    "splits",
]

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query, key) -> True where the query may see the key."""

Mode = Literal["full", "causal", "noise"]
"""How a split attends inside itself, and whether later splits see it."""


def document_mask(segments: Int[Tensor, "B L"]) -> Bool[Tensor, "B L L"]:
    """Slots of the same segment see each other, and nothing else.

    Args:
        segments: Int64 [B, L], number of the document each slot belongs to; padding has a number of its own, so that
            every slot sees at least itself.

    >>> document_mask(torch.tensor([[0, 0, 1]]))[0].int().tolist()
    [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    """
    return dense(documents(segments), *segments.shape, device=segments.device)


def documents(segments: Int[Tensor, "B L"]) -> Rule:
    """The rule of `document_mask`."""
    return lambda b, h, q, k: segments[b, q] == segments[b, k]


def splits(
    lengths: Sequence[int], modes: Sequence[str], documents: Sequence[int] | None = None, *, device: Any = None
) -> Rule:
    """Text, encoder features and latents in one packed sequence.

    Earlier splits of the same document are seen, except those of noise, which only their own slots see. Inside a split
    of mode full or noise every slot sees every other; in a causal one the earlier slots.

    Args:
        lengths: Slots of each split, in order.
        modes: `Mode` of each split.
        documents: Slots of each document, each a whole number of splits; default: one document.
        device: Where the metadata lives.

    Raises:
        ConfigError: Lengths and modes that do not match, an unknown mode, or a document that cuts a split.

    Source: LLaDA-o (arXiv 2603.01068), published split masks.
    """
    total = sum(lengths)
    if len(lengths) != len(modes) or set(modes) - set(get_args(Mode)):
        raise ConfigError(f"{len(lengths)} splits with modes {list(modes)}; each needs one of {get_args(Mode)}")
    ends = [0, *accumulate(documents if documents is not None else [total])]
    if not set(ends) <= {0, *accumulate(lengths)} or ends[-1] != total:
        raise ConfigError(f"documents end at {ends[1:]}, splits at {list(accumulate(lengths))}; every end must be both")
    sizes = torch.tensor(lengths, device=device)
    split = torch.arange(len(lengths), device=device).repeat_interleave(sizes)
    document = ranges(ends, device=device)
    causal, noise = (torch.tensor([m == mode for m in modes], device=device)[split] for mode in ("causal", "noise"))
    return lambda b, h, q, k: (
        (document[q] == document[k])
        & torch.where(split[q] == split[k], ~causal[q] | (k <= q), (split[k] < split[q]) & ~noise[k])
    )


def ranges(ends: Sequence[int], *, device: Any = None) -> Int[Tensor, "L"]:
    """Number of the range that each slot lies in, ranges being given by their bounds.

    >>> ranges([0, 2, 5]).tolist()
    [0, 0, 1, 1, 1]
    """
    sizes = torch.tensor(ends, device=device).diff()
    return torch.arange(len(ends) - 1, device=device).repeat_interleave(sizes)


def block_diffusion(length: int, block: int, *, context: Literal["block", "causal"] = "block") -> Rule:
    """Block diffusion over [noised | clean]: two copies of a sequence of ``length``, one after the other.

    A noised slot sees its own noised block and the clean blocks before it; a clean slot sees the clean slots of its
    own and earlier blocks, or with ``context="causal"`` those up to itself; never a noised one.

    Args:
        length: n, slots of one copy.
        block: Slots of a block; the last may be shorter.
        context: How clean slots see each other.

    Raises:
        ConfigError: A block below 1.

    Source: BD3-LM (arXiv 2503.09573), section 3; causal context from NBDiff.
    """
    if block < 1:
        raise ConfigError(f"blocks of {block} slots; at least 1")
    past: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "block": lambda q, k: (k - length) // block <= (q - length) // block,
        "causal": lambda q, k: k <= q,
    }
    return lambda b, h, q, k: torch.where(
        q >= length,
        (k >= length) & past[context](q, k),
        torch.where(k >= length, (k - length) // block < q // block, k // block == q // block),
    )


def dense(rule: Rule, batch: int, length: int, *, device: Any = None) -> Bool[Tensor, "B L L"]:
    """The rule as booleans, True = may be seen; first the query, then the key.

    Args:
        rule: What may be seen.
        batch: B; 1 if the rule is the same for all rows.
        length: L.
        device: Where the rule's metadata lives.
    """
    at = torch.arange(length, device=device)
    rows = torch.arange(batch, device=device)[:, None, None]
    seen = rule(rows, rows.new_zeros(()), at[:, None], at)
    return seen.expand(batch, length, length).contiguous()


def sparse(rule: Rule, batch: int | None, length: int, *, device: Any = "cpu") -> Any:
    """The rule as a ``BlockMask`` for ``torch.nn.attention.flex_attention``, which skips blocks nobody may see.

    Args:
        rule: What may be seen.
        batch: B; None if the rule is the same for all rows.
        length: L.
        device: Where the rule's metadata lives.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(rule, batch, None, length, length, device=device)
