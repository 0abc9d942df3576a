"""Coordinate check: do the activations of a network keep their size when it is widened and trained for a few steps?

Everything is a callable: `coord_check` steps what it is given at several widths and fits log mean |x| of every module's
output against log width. Under muP the slopes stay near 0 at every step; a wrong rate rule shows as slopes that grow
with the steps, a wrong initialisation at the first.

Source: Tensor Programs V (arXiv 2203.03466), appendix D.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import NormalDist, fmean
from typing import Any

from torch import Tensor, nn

from mmdiff.errors import ConfigError

__all__ = ["LIMIT", "CoordReport", "Curve", "Trial", "coord_check"]

LIMIT = 0.2
"""Largest slope that counts as none, at widths 64 to 512."""


@dataclass(frozen=True)
class Trial:
    """A network ready to be stepped.

    Attributes:
        model: The network.
        step: One training step on a fixed batch: forward, loss, backward, optimizer.
        factors: Module -> factor that a parametrisation put into its output on purpose; sizes are divided by it.
    """

    model: nn.Module
    step: Callable[[], Any]
    factors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Size of one module's output against width, at one step.

    Attributes:
        module: Its name; ``output`` for the whole network.
        t: Step, from 1; at 1 nothing has been trained.
        sizes: Per width, per seed, mean |x|.
        slope: Of log size against log width; None where a size is 0; infinite where one is not finite.
        error: Half-width of its 95 % interval over widths and seeds; None with fewer than 3 points.
    """

    module: str
    t: int
    sizes: tuple[tuple[float, ...], ...]
    slope: float | None
    error: float | None


@dataclass(frozen=True, kw_only=True)
class CoordReport:
    """What a check found.

    Attributes:
        widths: Tried widths.
        curves: One per module and step.
    """

    widths: tuple[int, ...]
    curves: tuple[Curve, ...]

    @property
    def worst(self) -> Curve:
        """The curve of largest absolute slope."""
        return max((c for c in self.curves if c.slope is not None), key=lambda c: abs(c.slope or 0.0))

    @property
    def max_slope(self) -> float:
        """Its absolute slope."""
        return abs(self.worst.slope or 0.0)

    def steepest(self, t: int) -> Curve:
        """The curve of largest slope, sign included, at a step."""
        return max((c for c in self.curves if c.t == t and c.slope is not None), key=lambda c: c.slope or 0.0)

    def verdict(self, limit: float = LIMIT) -> str:
        """One sentence: whether sizes depend on the width, and how sure that is."""
        worst = self.worst
        slope, error = abs(worst.slope or 0.0), worst.error
        told = f"largest |slope| {slope:.3f}" + ("" if error is None else f" +- {error:.3f}")
        where = f"{told} ({worst.module}, t = {worst.t}), limit {limit:g}"
        if error is not None and abs(slope - limit) < error:
            return f"{'within' if slope <= limit else 'beyond'} the limit, but not surely: {where}; more seeds decide"
        return f"sizes do not depend on the width: {where}" if slope <= limit else f"sizes depend on the width: {where}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def coord_check(
    make: Callable[[int, int], Trial], widths: Sequence[int], *, steps: int = 4, seeds: int = 3
) -> CoordReport:
    """Step a network at several widths and measure every module's output.

    Args:
        make: (width, seed) -> `Trial`; the batch must not depend on the width.
        widths: At least two.
        steps: Training steps.
        seeds: Repetitions with other initial weights.

    Raises:
        ConfigError: Fewer than two different widths, or the networks have other modules at other widths.
    """
    if len(set(widths)) < 2:
        raise ConfigError(f"widths {list(widths)}: a slope needs at least two different ones")
    runs = {(w, s): _measure(make(w, s), steps) for w in widths for s in range(seeds)}
    names = list(next(iter(runs.values())))
    if any(list(run) != names for run in runs.values()):
        raise ConfigError("the network has other modules at another width; scale its width alone")
    curves = []
    for name, t in names:
        sizes = tuple(tuple(runs[w, s][name, t] for s in range(seeds)) for w in widths)
        slope, error = _fit(widths, sizes)
        curves.append(Curve(module=name, t=t, sizes=sizes, slope=slope, error=error))
    return CoordReport(widths=tuple(widths), curves=tuple(curves))


def _measure(trial: Trial, steps: int) -> dict[tuple[str, int], float]:
    found: dict[tuple[str, int], float] = {}
    for t in range(1, steps + 1):
        seen: dict[str, list[float]] = {}
        with _recording(trial.model, seen):
            trial.step()
        found |= {(name, t): fmean(values) / trial.factors.get(name, 1.0) for name, values in seen.items()}
    return found


@contextmanager
def _recording(model: nn.Module, seen: dict[str, list[float]]) -> Any:
    """Within the block every module's output is noted."""

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            tensor = next(iter(output)) if isinstance(output, tuple) else output
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                seen.setdefault(name, []).append(float(tensor.detach().float().abs().mean()))

        return hook

    handles = [m.register_forward_hook(note(name or "output")) for name, m in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _fit(widths: Sequence[int], sizes: Sequence[Sequence[float]]) -> tuple[float | None, float | None]:
    """Least-squares slope through all seeds of all widths, and the half-width of its interval."""
    points = [(math.log(w), size) for w, row in zip(widths, sizes, strict=True) for size in row]
    if any(not math.isfinite(size) for _, size in points):
        return math.inf, None
    if any(size <= 0 for _, size in points):
        return None, None
    xs, ys = [x for x, _ in points], [math.log(size) for _, size in points]
    mx, my = fmean(xs), fmean(ys)
    spread = sum((x - mx) ** 2 for x in xs)
    slope = sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / spread
    free = len(xs) - 2
    if free < 1:
        return slope, None
    rest = sum((y - my - slope * (x - mx)) ** 2 for x, y in zip(xs, ys, strict=True))
    return slope, _student(free) * math.sqrt(rest / free / spread)


def _student(free: int) -> float:
    """The 97.5 % point of Student's t, by its expansion around the normal one (error below 3 % from 3 up)."""
    z = NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
