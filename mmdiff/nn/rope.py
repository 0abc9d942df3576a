"""Rotary position embedding, half-split form: tables, rotation, and the base for longer sequences.

Source: RoFormer (arXiv 2104.09864); the half-split pairing (j, j + K/2) is that of LLaMA and of the published LLaDA
checkpoints.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["rotate", "stretched", "tables"]


def tables(
    positions: Int[Tensor, "B L *A"], head_dim: int, theta: float
) -> tuple[Float[Tensor, "B L 1 K"], Float[Tensor, "B L 1 K"]]:
    """Cosine and sine tables in float32.

    Args:
        positions: Int64 [B, L] (B may be 1), any non-negative numbers; or [B, L, A], places along A axes that take the
            frequencies in turn, so that equal places along all of them are what a single number is.
        head_dim: K, even.
        theta: Base of the frequencies theta^(-2j/K).

    Returns:
        (cos, sin), each float32 [B, L, 1, K]; the two halves of the last axis are equal.
    """
    half = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    axes = positions[..., None] if positions.ndim == 2 else positions
    turn = torch.arange(len(half), device=positions.device) % axes.shape[2]
    angles = axes.float()[:, :, None, turn] * theta**-half
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(
    x: Float[Tensor, "B L H K"], cos: Float[Tensor, "#B L 1 K"], sin: Float[Tensor, "#B L 1 K"]
) -> Float[Tensor, "B L H K"]:
    """Rotate heads by the tables; computed in the tables' dtype, returned in the dtype of ``x``.

    With float32 tables this is the published LLaDA files' ``rope_full_precision``; with tables cast to the dtype of
    ``x`` it is what the LLaMA-layout files do. In float32 both are the same.
    """
    y = x.to(cos.dtype)
    a, b = y.chunk(2, dim=-1)
    return torch.addcmul(y * cos, torch.cat((-b, a), dim=-1), sin).to(x.dtype)


def stretched(head_dim: int, theta: float, trained: int, wanted: int) -> tuple[int, float, float]:
    """The base that spreads positions over longer sequences, for attention that looks both ways.

    A query sees offsets of both signs, so a model trained on sequences of length T has seen offsets over a range of
    2 T: pass twice the lengths.

    Args:
        head_dim: K.
        theta: Base the model was trained with.
        trained: Range of offsets it was trained on.
        wanted: Range of offsets it is to be used on.

    Returns:
        (critical dimension, scale, new base = scale * theta).

    Source: UltraLLaDA (arXiv 2510.10481), diffusion-aware NTK rule.
    """
    critical = 2 * math.ceil(head_dim / 2 * math.log(trained / (2 * math.pi), theta))
    scale = (wanted / (2 * math.pi)) ** (head_dim / critical) / theta
    return critical, scale, theta * scale
