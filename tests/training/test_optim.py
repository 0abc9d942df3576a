from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mmdiff import rng
from mmdiff.errors import CheckpointError, ConfigError
from mmdiff.training import optim
from mmdiff.training.optim import EMA, OptimConfig, ScheduleConfig, factor


def net() -> nn.Module:
    model = nn.ModuleDict(
        {"tower": nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), "head": nn.Linear(4, 2), "unused": nn.Linear(2, 2)}
    )
    generator = rng.generator(0, "init")
    for p in model.parameters():
        nn.init.normal_(p, generator=generator)
    return model


def backward(model: nn.Module, number: int) -> None:
    x = torch.randn(5, 3, generator=rng.generator(number, "x"))
    model["head"](model["tower"](x)).square().sum().backward()


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_the_factor_rises_linearly_and_ends_at_final(kind):
    schedule = ScheduleConfig(kind=kind, warmup_samples=40, final=0.25)
    assert factor(schedule, 10, 240) == pytest.approx(0.25)
    assert factor(schedule, 40, 240) == pytest.approx(1.0)
    assert factor(schedule, 140, 240) == pytest.approx({"cosine": 0.625, "linear": 0.625, "constant": 1.0}[kind])
    assert factor(schedule, 240, 240) == pytest.approx(1.0 if kind == "constant" else 0.25)
    assert factor(schedule, 500, 240) == factor(schedule, 240, 240)


def test_cosine_is_a_quarter_turn_at_a_third():
    value = factor(ScheduleConfig(), 100, 300)
    assert value == pytest.approx((1 + math.cos(math.pi / 3)) / 2)


def test_decay_is_for_matrices_only_and_factors_scale_the_rate():
    model = net()
    optimizer = optim.build(model, OptimConfig(lr=0.1, weight_decay=0.5, factors={"tower": 0.5, "tower.1.*": 0.25}))
    optim.set_lr(optimizer, 0.2)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    by_name = {name: found[id(p)] for name, p in model.named_parameters()}
    assert by_name["tower.0.weight"] == (0.1, 0.5)
    assert by_name["tower.0.bias"] == (0.1, 0.0)
    assert by_name["tower.1.weight"] == (0.05, 0.0)
    assert by_name["head.weight"] == (0.2, 0.5)


def test_factor_zero_freezes():
    model = net()
    optimizer = optim.build(model, OptimConfig(factors={"tower": 0.0}))
    before = model["tower"][0].weight.clone()
    backward(model, 0)
    optimizer.step()
    assert model["tower"][0].weight.grad is None
    assert torch.equal(model["tower"][0].weight, before)
    assert not any(name.startswith("tower") for name in optim.trainable(model))


def test_a_pattern_that_fits_nothing_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"'towre' fits no parameter; did you mean tower"):
        optim.build(net(), OptimConfig(factors={"towre": 0.1}))


def test_freezing_everything_is_refused():
    with pytest.raises(ConfigError, match="every parameter is frozen"):
        optim.build(net(), OptimConfig(factors={"*": 0.0}))


def test_state_by_name_continues_as_if_never_saved():
    models = net(), net()
    optimizers = [optim.build(m, OptimConfig(lr=0.1)) for m in models]
    for step in range(6):
        for i, model in enumerate(models):
            if step == 3 and i == 1:
                saved = {k: v.clone() for k, v in optim.to_tensors(optimizers[1], model).items()}
                optimizers[1] = optim.build(model, OptimConfig(lr=0.1))
                optim.from_tensors(optimizers[1], model, saved)
            optimizers[i].zero_grad()
            backward(model, step)
            optimizers[i].step()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert "exp_avg/head.weight" in saved
    assert not any("unused" in name for name in saved)


def test_state_of_another_model_is_refused():
    model = net()
    optimizer = optim.build(model, OptimConfig())
    with pytest.raises(CheckpointError, match="exp_avg/nobody"):
        optim.from_tensors(optimizer, model, {"exp_avg/nobody": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"exp_avg/head.weight \(7,\)"):
        optim.from_tensors(optimizer, model, {"exp_avg/head.weight": torch.zeros(7)})


def test_a_weight_counts_half_after_the_halflife():
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    ema = EMA(model, halflife=100, ramp=1e9)
    nn.init.zeros_(model.weight)
    for samples in range(10, 101, 10):
        ema.update(samples, 10)
    assert float(ema.average["weight"]) == pytest.approx(0.5, rel=1e-5)


def test_the_average_forgets_its_start_by_a_power_law_while_the_halflife_ramps_up():
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    ema = EMA(model, halflife=10**9, ramp=0.1)
    nn.init.zeros_(model.weight)
    for samples in range(1, 1001):
        ema.update(samples, 1)
        if samples == 100:
            early = float(ema.average["weight"])
    # With halflife r n the weight of the past is n^(-ln 2 / r): ten times the samples, 10^-6.93 of it.
    assert float(ema.average["weight"]) / early == pytest.approx(10 ** (-math.log(2) / 0.1), rel=0.2)


def test_the_average_is_float32_and_exact_under_a_swap():
    model = nn.Linear(2, 2).to(torch.bfloat16)
    ema = EMA(model, halflife=4, ramp=10.0)
    with torch.no_grad():
        model.weight.add_(1)
    ema.update(4, 4)
    own, average = model.weight.detach().clone(), ema.average["weight"].clone()
    assert average.dtype == torch.float32
    with ema.swapped():
        assert torch.equal(model.weight, average.to(torch.bfloat16))
        model.weight.data.fill_(9)
    assert torch.equal(model.weight, own)
    assert torch.equal(ema.average["weight"], average)


def test_a_swap_ends_when_the_block_raises():
    model = nn.Linear(2, 2)
    ema = EMA(model, halflife=4, ramp=1.0)
    with torch.no_grad():
        model.weight.add_(1)
    own = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="probe"), ema.swapped():
        raise RuntimeError("probe")
    assert torch.equal(model.weight, own)
