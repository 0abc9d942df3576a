"""Flow samplers on a problem with a known answer: data N(0, s^2), whose flow from noise n ends at s n."""

from __future__ import annotations

import pytest
import torch

from mmdiff import rng
from mmdiff.diffusion import flow
from mmdiff.errors import ConfigError
from mmdiff.sampling.flow import SOLVERS, guided, integrate

S = 0.3
NOISE = rng.normal(rng.generator(0, "noise"), (64, 1, 2, 2))


def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    s = sigma.view(-1, 1, 1, 1)
    return x * (s - (1 - s) * S**2) / ((1 - s) ** 2 * S**2 + s**2)


def exact(sigma: float) -> torch.Tensor:
    return NOISE * ((1 - sigma) ** 2 * S**2 + sigma**2) ** 0.5


def error(solver: str, steps: int, start: float = 1.0, end: float = 0.0) -> float:
    sigmas = torch.linspace(start, end, steps + 1)
    return float((integrate(velocity, exact(start), sigmas, solver=solver) - exact(end)).abs().max())


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("multistep", 2)])
def test_solvers_have_their_order(solver, order):
    # Away from the ends, where the logarithm of the noise ratio, in which the multistep solver steps, is infinite.
    ratio = error(solver, 20, 0.8, 0.2) / error(solver, 40, 0.8, 0.2)
    assert ratio > 0.8 * 2**order


def test_higher_order_is_closer_for_the_same_number_of_calls():
    assert error("heun", 20) < error("euler", 40) / 2
    assert error("multistep", 40) < error("euler", 40) / 2


def test_one_step_is_the_same_for_all():
    sigmas = torch.tensor([1.0, 0.0])
    first, *rest = (integrate(velocity, NOISE, sigmas, solver=name) for name in SOLVERS)
    assert all(torch.allclose(first, other, atol=1e-6) for other in rest)


def test_steps_are_told_and_guidance_of_one_calls_the_network_once():
    calls, seen = [], []

    def conditional(x: torch.Tensor, sigma: torch.Tensor, condition: bool) -> torch.Tensor:
        calls.append(condition)
        return velocity(x, sigma) * (1 if condition else 2)

    plain = integrate(guided(conditional, 1.0), NOISE, flow.schedule(3), on_step=lambda i, x: seen.append((i, x)))
    assert calls == [True] * 3
    assert [i for i, _ in seen] == [0, 1, 2]
    assert torch.equal(seen[-1][1], plain)
    strong = integrate(guided(conditional, 3.0), NOISE, flow.schedule(3))
    assert calls[3:] == [True, False] * 3
    assert not torch.allclose(strong, plain)


def test_what_cannot_be_integrated_is_refused():
    with pytest.raises(ConfigError, match="one of euler, heun, multistep"):
        integrate(velocity, NOISE, torch.tensor([1.0, 0.0]), solver="rk4")
    with pytest.raises(ConfigError, match="must decrease"):
        integrate(velocity, NOISE, torch.tensor([0.0, 1.0]))


def test_a_larger_image_gets_the_noise_of_the_smaller_one():
    assert flow.resolution_shift(1024, 1024) == 1
    assert flow.resolution_shift(4096, 1024) == 2
    assert flow.dynamic_shift(256) == pytest.approx(1.6487, abs=1e-4)
    assert flow.dynamic_shift(4096) == pytest.approx(3.1582, abs=1e-4)
    assert torch.equal(flow.shifted(torch.tensor([0.0, 1.0]), 5.0), torch.tensor([0.0, 1.0]))


def test_dropped_conditions_are_replaced_row_by_row():
    condition, empty = torch.ones(3, 2, 4), torch.zeros(2, 4)
    out = flow.drop(condition, torch.tensor([0.05, 0.5, 0.09]), 0.1, empty)
    assert out.sum((1, 2)).tolist() == [0, 8, 0]
