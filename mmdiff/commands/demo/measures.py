"""Numbers of the demo that are not a metric of their own: promises, skin tones in captions, a bound for a KID ratio."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmdiff.rng import generator

__all__ = ["gate", "kid_share", "macro_over_kinds", "tone_of"]

_TONE = re.compile(r"\b(medium-light|medium-dark|medium|light|dark) skin\b")


def gate(
    name: str,
    value: float,
    bound: float,
    threshold: float,
    *,
    note: str,
    baselines: Sequence[tuple[str, float]] = (),
    smaller_is_better: bool = False,
) -> dict[str, Any]:
    """A promise as plain data: kept if the 95 % bound is on the right side of the threshold."""
    passed = bound <= threshold if smaller_is_better else bound >= threshold
    return {
        "name": name,
        "value": value,
        "bound": bound,
        "threshold": threshold,
        "passed": passed,
        "smaller_is_better": smaller_is_better,
        "note": note,
        "baselines": [list(b) for b in baselines],
    }


def macro_over_kinds(kinds: Sequence[str], answers: Sequence[str]) -> Any:
    """Mean over kinds of the mean over true answers: a statistic for `eval.bootstrap.bootstrap`.

    All yes/no questions are one kind, for some of them are few.

    Args:
        kinds: Kind of each question.
        answers: True answer of each question.
    """
    merged = ["yes or no" if k.startswith("is_") else k for k in kinds]
    cells = sorted(set(zip(merged, answers, strict=True)))
    places = {cell: i for i, cell in enumerate(cells)}
    member = torch.zeros(len(merged), len(cells), dtype=torch.float64)
    for row, cell in enumerate(zip(merged, answers, strict=True)):
        member[row, places[cell]] = 1
    names = sorted(set(merged))
    kind_of = torch.tensor([[float(kind == name) for name in names] for kind, _ in cells], dtype=torch.float64)

    def statistic(values: Tensor, weights: Tensor) -> Tensor:
        count = weights @ member
        seen = (count > 0).double()
        per_cell = (weights * values) @ member / count.clamp_min(1e-300)
        cells_seen = seen @ kind_of
        per_kind = (per_cell * seen) @ kind_of / cells_seen.clamp_min(1)
        return per_kind.sum(1) / (cells_seen > 0).sum(1)

    return statistic


def tone_of(caption: str) -> str | None:
    """The skin tone that a caption names, if it names exactly one."""
    found = set(_TONE.findall(caption.lower()))
    return found.pop() if len(found) == 1 else None


def kid_share(
    judged: Float[Tensor, "N F"],
    before: Float[Tensor, "M F"],
    real: Float[Tensor, "R F"],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """KID of the judged pictures as a share of an earlier model's, and its upper 95 % bootstrap bound.

    Args:
        judged: Features of the trained model's pictures.
        before: Features of the untrained model's pictures.
        real: Features of real pictures.
        draws: Resamples; all three sets are drawn anew in each.
        seed: Seed of the local generator.
    """
    sets = {"judged": judged.double(), "before": before.double(), "real": real.double()}
    kernels = {
        (a, b): _kernel(sets[a], sets[b])
        for a, b in (
            ("judged", "judged"),
            ("before", "before"),
            ("real", "real"),
            ("judged", "real"),
            ("before", "real"),
        )
    }
    draw = generator(seed, "kid-share")

    def share(weights: dict[str, Tensor]) -> float:
        kid = {n: _kid(kernels, weights, n) for n in ("judged", "before")}
        return kid["judged"] / kid["before"]

    whole = share({name: torch.ones(len(x), dtype=torch.float64) for name, x in sets.items()})
    resampled = []
    for _ in range(draws):
        counts = {
            n: torch.randint(len(x), (len(x),), generator=draw).bincount(minlength=len(x)) for n, x in sets.items()
        }
        resampled.append(share({n: c.double() for n, c in counts.items()}))
    return whole, float(torch.tensor(resampled).quantile(0.95))


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _kid(kernels: dict[tuple[str, str], Tensor], weights: dict[str, Tensor], name: str) -> float:
    """Unbiased KID with integer weights; copies of one picture are not paired with each other."""
    within = sum(_off_diagonal(kernels[n, n], weights[n]) for n in (name, "real"))
    w, r = weights[name], weights["real"]
    across = w @ kernels[name, "real"] @ r / (w.sum() * r.sum())
    return float(within - 2 * across)


def _off_diagonal(kernel: Tensor, w: Tensor) -> Tensor:
    total = w @ kernel @ w - (w * w) @ kernel.diagonal()
    return total / (w.sum() ** 2 - (w * w).sum())
