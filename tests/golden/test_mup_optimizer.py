"""Optimizer steps under muP against the published package: fixture ``mup_optimizer``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmdiff.scale import mup
from mmdiff.scale.rows import Role
from tests.helpers.bag import bag

NAME = "mup_optimizer"
ATOL = 2e-6

OPTIMIZERS = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam, "SGD": torch.optim.SGD}
HYPER = {"betas", "eps", "momentum", "dampening", "nesterov", "amsgrad"}
KNOWN = HYPER | {"opt", "lr", "weight_decay", "decoupled_wd", "groups", "warmup", "groups_lr_wd"}

Case = dict[str, Any]


def config_of(root: Path) -> Case:
    return json.loads((root / NAME / "config.json").read_text())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", list(config_of(metafunc.config.getoption("--fixtures"))["variants"]))


@pytest.fixture(scope="module")
def config(request: pytest.FixtureRequest) -> Case:
    return config_of(request.config.getoption("--fixtures"))


@pytest.fixture(scope="module")
def inputs(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    return load_file(Path(request.config.getoption("--fixtures")) / NAME / "inputs.safetensors")


@pytest.fixture(scope="module")
def outputs(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    return load_file(Path(request.config.getoption("--fixtures")) / NAME / "outputs.safetensors")


def nets(config: Case) -> tuple[nn.Module, mup.Plan]:
    """The network of the fixture, and its plan."""
    rows = config["params"]
    tables = [r["name"] for r in rows if "embed" in r["name"]]
    target = {r["name"]: r["shape"] for r in rows}
    base = {r["name"]: [b or n for b, n in zip(r["base_shape"], r["shape"], strict=True)] for r in rows}
    probe = {r["name"]: [2 * b if b else n for b, n in zip(r["base_shape"], r["shape"], strict=True)] for r in rows}
    built = [bag(shapes, embeddings=tables) for shapes in (target, base, probe)]
    roles = {r["name"]: role for r in rows if r["name"] not in tables and (role := said(r))}
    return built[0], mup.plan(built[0], built[1], probe=built[2], roles=roles, multiplier=True)


def said(row: Case) -> Role | None:
    """What shapes do not tell: that a layer is a readout, and what a bare table or matrix is."""
    growing = [axis for axis, size in enumerate(row["base_shape"]) if size is not None]
    if row["name"].rpartition(".")[2] == "weight":
        return "output" if len(row["shape"]) > 1 and growing == [1] else None
    bare: dict[int, Role] = {0: "scalar", 1: "vector", 2: "hidden"}
    return bare[len(growing)]


def groups(config: Case, case: Case, model: nn.Module, plan: mup.Plan) -> list[dict[str, Any]]:
    given = {
        "optimizer": case["opt"].lower(),
        "decay": "coupled" if case.get("decoupled_wd") else "independent",
    }
    if not case.get("groups"):
        return plan.groups(model, lr=case["lr"], weight_decay=case["weight_decay"], **given)
    free = config["no_decay"]
    rest = [r["name"] for r in config["params"] if r["name"] not in free]
    decayed = plan.groups(model, lr=case["lr"], weight_decay=case["weight_decay"], names=rest, **given)
    return decayed + plan.groups(model, lr=2 * case["lr"], names=free, **given)


def test_steps_follow_the_published_ones(variant, config, inputs, outputs):
    case = config["variants"][variant]
    assert set(case) <= KNOWN
    model, plan = nets(config)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(inputs[f"param.{name}"])
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in case.items() if k in HYPER}
    optimizer = OPTIMIZERS[case["opt"]](groups(config, case, model, plan), lr=case["lr"], **options)
    warmup = case.get("warmup", 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / warmup))
    check_groups(case, optimizer, parameters)
    for step in range(config["steps"]):
        for name, parameter in parameters.items():
            parameter.grad = inputs[f"grad{step}.{name}"].clone()
        optimizer.step()
        schedule.step()
        for name, parameter in parameters.items():
            expected = outputs[f"{variant}.step{step + 1}.{name}"]
            torch.testing.assert_close(
                parameter.detach(), expected, atol=ATOL, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )


def check_groups(case: Case, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> None:
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert set(case["groups_lr_wd"]) == set(parameters)
    for name, expected in case["groups_lr_wd"].items():
        group = found[id(parameters[name])]
        assert [group["lr"], group["weight_decay"]] == pytest.approx(expected, rel=1e-6, abs=1e-12), name


def test_every_tensor_belongs_to_a_parameter_and_a_step(config, inputs, outputs):
    names, steps = [r["name"] for r in config["params"]], config["steps"]
    assert set(inputs) == {f"param.{n}" for n in names} | {f"grad{s}.{n}" for n in names for s in range(steps)}
    assert set(outputs) == {f"{v}.step{s + 1}.{n}" for v in config["variants"] for n in names for s in range(steps)}
