"""Counts of parameters and multiply-accumulates: measured on the meta device for any family, and in closed form.

A forward pass is run on tensors without memory under PyTorch's counter, so the count is what is computed, not what a
formula hopes. The closed forms are the usual ones of papers; tests hold both to each other. A FLOP count is twice the
multiply-accumulates; a training step is about three forward passes.

Source: the forms follow from the layers; DiT's agree with the table of its paper (arXiv 2212.09748).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmdiff import rng
from mmdiff.models import dit, mmdit
from mmdiff.models.registry import build
from mmdiff.scale.trials import problem_of

__all__ = ["Count", "count", "dit_macs", "dit_parameters", "macs_of", "mmdit_macs", "mmdit_parameters"]

Count = dict[str, Any]


def count(config: Any) -> Count:
    """What one example costs.

    Args:
        config: A configuration of a family with a small problem (`mmdiff.scale.trials.PROBLEMS`).

    Returns:
        ``parameters`` (trained ones), ``macs`` and ``flops`` of a forward pass of one example, ``training_flops`` of a
        step (three times that), and ``example``, the shapes of its inputs.

    Raises:
        ConfigError: The family has no small problem.
    """
    problem = problem_of(config)
    inputs = problem.inputs(config, 1, rng.generator(0, "count"))
    model = build(config, device="meta")
    given = {name: tensor.to("meta") for name, tensor in inputs.items()}
    macs = macs_of(model, lambda: problem.run(model, given))
    return {
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "macs": macs,
        "flops": 2 * macs,
        "training_flops": 6 * macs,
        "example": {name: list(tensor.shape) for name, tensor in inputs.items() if name != "target"},
    }


@torch.no_grad()
def macs_of(model: nn.Module, run: Callable[[], Any]) -> int:
    """Multiply-accumulates of matrix products, convolutions and attention in ``run``."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


def dit_parameters(c: dit.Config) -> int:
    """Trained parameters of a DiT: every linear layer with its bias, and the label table."""
    d, f, patch = c.width, c.ffn_width, c.patch_size**2
    block = 4 * d * d + 2 * d * f + 6 * d * d + (4 * d + f + d + 6 * d)
    conditions = 256 * d + d + d * d + d + (c.classes + 1) * d
    ends = (patch * c.channels + 1) * d + 2 * d * d + 2 * d + patch * c.out_channels * (d + 1)
    return c.depth * block + conditions + ends


def dit_macs(c: dit.Config) -> int:
    """Multiply-accumulates of a DiT for one image."""
    d, f, t, patch = c.width, c.ffn_width, c.grid**2, c.patch_size**2
    block = (4 * d * d + 2 * d * f) * t + 2 * t * t * d + 6 * d * d
    return c.depth * block + t * d * patch * (c.channels + c.out_channels) + 2 * d * d + 256 * d + d * d


def mmdit_parameters(c: mmdit.Config) -> int:
    """Trained parameters of an MMDiT; the position table is none."""
    d, patch, norm = c.width, c.patch_size**2, 4 * (c.width // c.heads) * c.qk_norm
    full, last = 36 * d * d + 30 * d, 23 * d * d + 20 * d
    dual = len(c.dual_layers) * (7 * d * d + 7 * d + norm // 2)
    embedders = (256 * d + d + d * d + d) + (c.pooled_channels * d + d + d * d + d) + (c.context_channels + 1) * d
    ends = (patch * c.channels + 1) * d + 2 * d * d + 2 * d + patch * c.out_channels * (d + 1)
    return (c.depth - 1) * full + last + c.depth * norm + dual + embedders + ends


def mmdit_macs(c: mmdit.Config, images: int, words: int) -> int:
    """Multiply-accumulates of an MMDiT for one example.

    Args:
        c: Shape.
        images: N, image tokens.
        words: M, text tokens.
    """
    d, both, patch = c.width, images + words, c.patch_size**2
    attention = 2 * both * both * d
    full = 12 * d * d * both + attention + 12 * d * d
    # The last block's text has queries, keys and values, a modulation of two vectors, and no way back.
    last = 12 * d * d * images + 3 * d * d * words + attention + 8 * d * d
    dual = len(c.dual_layers) * (4 * d * d * images + 2 * images * images * d + 3 * d * d)
    embedders = 256 * d + d * d + c.pooled_channels * d + d * d + words * c.context_channels * d
    ends = images * d * patch * (c.channels + c.out_channels) + 2 * d * d
    return (c.depth - 1) * full + last + dual + embedders + ends
