"""Roles, factors and initial scales against the published package: fixture ``mup_multipliers``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmdiff import rng
from mmdiff.io.layouts import LAYOUTS
from mmdiff.models import dit, llada, mmdit
from mmdiff.models.registry import build
from mmdiff.scale import mup
from mmdiff.scale.initialisers import FAN_IN, Constant, Initialiser, Kaiming, Normal, Xavier, chosen
from mmdiff.scale.rows import Row
from tests.helpers.bag import bag

NAME = "mup_multipliers"
REL = 1e-6

Table = dict[str, Any]

KEYS = {
    *("shape", "base_shape", "ninf", "width_mult", "fan_in_mult", "fan_out_mult", "forward_mult"),
    *("adam_lr", "adam_wd", "sgd_lr", "sgd_wd", "trainable", "init"),
}


@dataclass
class Made:
    """A network of the fixture under its plan, and the published name of every parameter of ours."""

    plan: mup.Plan
    model: nn.Module
    published: Callable[[str], str]
    recipe: dict[str, Initialiser]


def read(root: Path, name: str) -> Any:
    return json.loads((root / NAME / name).read_text())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    root = Path(metafunc.config.getoption("--fixtures"))
    if "case" in metafunc.fixturenames:
        tables = read(root, "multipliers.json")
        metafunc.parametrize("case", [(family, size) for family, t in tables.items() for size in t["tables"]])
    if "rule" in metafunc.fixturenames:
        metafunc.parametrize("rule", range(len(read(root, "init_rules.json"))))


@pytest.fixture(scope="module")
def root(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.getoption("--fixtures"))


def shapes_of(table: Table) -> dict[str, list[int]]:
    return {name: row["shape"] for name, row in table["params"].items()}


def base_of(table: Table) -> Table:
    """The base that a target's rows were made for; it need not be one of the targets."""
    rows = table["params"].items()
    return {"params": {name: {**row, "shape": at_base(row)} for name, row in rows}}


def at_base(row: Table) -> list[int]:
    return [n if b is None else b for b, n in zip(row["base_shape"], row["shape"], strict=True)]


def heads_of(family: Table, size: str) -> int:
    """Sizes are heads, or widths at a head dimension that the unit names."""
    named = re.search(r"head dim\w* (\d+)", family["unit"])
    return int(size) // int(named[1]) if family["unit"].startswith("width") and named else int(size)


def blocks(shapes: dict[str, Any]) -> int:
    return 1 + max(int(m[1]) for n in shapes if (m := re.search(r"(?:blocks|layers)\.(\d+)\.", n)))


def make_dit(family: Table, size: str) -> Made:
    def config(table: Table, heads: int) -> dit.Config:
        s = shapes_of(table)
        width, channels, patch, _ = s["x_embedder.proj.weight"]
        return dit.Config(
            image_size=math.isqrt(s["pos_embed"][1]) * patch,
            patch_size=patch,
            channels=channels,
            width=width,
            depth=blocks(s),
            heads=heads,
            ffn_width=s["blocks.0.mlp.fc1.weight"][0],
            classes=s["y_embedder.embedding_table.weight"][0] - 1,
            learned_variance=s["final_layer.linear.weight"][0] == 2 * channels * patch**2,
        )

    return make_house(family, size, config, lambda name: name, dict(FAN_IN))


def make_mmdit(family: Table, size: str) -> Made:
    def config(table: Table, heads: int) -> mmdit.Config:
        s = shapes_of(table)
        width, channels, patch, _ = s["pos_embed.proj.weight"]
        return mmdit.Config(
            image_size=4 * patch,
            max_grid=4,
            patch_size=patch,
            channels=channels,
            out_channels=s["proj_out.weight"][0] // patch**2,
            width=width,
            depth=blocks(s),
            heads=heads,
            context_channels=s["context_embedder.weight"][1],
            pooled_channels=s["time_text_embed.text_embedder.linear_1.weight"][1],
            qk_norm=any(n.endswith("attn.norm_q.weight") for n in s),
            dual_layers=tuple(i for i in range(blocks(s)) if f"transformer_blocks.{i}.attn2.to_q.weight" in s),
        )

    sigma = Normal(family["sigma"])
    recipe = {"input": sigma, "hidden": sigma, "output": Constant(), "*.bias": Constant()}
    if family.get("q_zero"):
        recipe |= {"*.q.weight": Constant()}
    return make_house(family, size, config, lambda n: str(LAYOUTS["sd3"].keys.backward(n)), recipe)


def make_llama(family: Table, size: str) -> Made:
    def config(table: Table, heads: int) -> llada.Config:
        s = shapes_of(table)
        vocab, width = s["model.embed_tokens.weight"]
        keys = s["model.layers.0.self_attn.k_proj.weight"][0]
        return llada.Config(
            vocab_size=vocab,
            width=width,
            depth=blocks(s),
            heads=heads,
            kv_heads=keys * heads // width,
            ffn_width=s["model.layers.0.mlp.gate_proj.weight"][0],
            tied="lm_head.weight" not in s,
            **dict.fromkeys(("mask_id", "bos_id", "eos_id", "eot_id"), 0),
        )

    sigma = Normal(family["sigma"])
    recipe: dict[str, Initialiser] = {"input": sigma, "hidden": sigma, "output": sigma, "tied": sigma}
    if family.get("q_zero"):
        recipe |= {"*.q_proj.weight": Constant()}
    return make_house(family, size, config, lambda n: str(LAYOUTS["llama"].keys.backward(n)), recipe)


def make_house(
    family: Table,
    size: str,
    config: Callable[[Table, int], Any],
    published: Callable[[str], str],
    recipe: dict[str, Initialiser],
) -> Made:
    table = family["tables"][size]
    base = config(base_of(table), heads_of(family, str(family["base"])))
    target = config(table, heads_of(family, size))
    plan = mup.plan(target, base, multiplier=True, output_mult=family.get("output_mult", 1.0))
    return Made(plan, build(target, generator=rng.generator(0, "init")), published, recipe)


def make_pixart(family: Table, size: str) -> Made:
    small = Normal(0.02)
    recipe: dict[str, Initialiser] = {"input": Xavier(), "hidden": Xavier(), "*.bias": Constant(), "output": Constant()}
    recipe |= dict.fromkeys(("t_embedder.*.weight", "t_block.*.weight", "y_embedder.*.weight"), small)
    recipe |= {"*scale_shift_table": small, "*cross_attn.proj.weight": Constant()}
    roles = {"*scale_shift_table": "vector", "final_layer.linear.weight": "output"}
    return make_foreign(family, size, recipe, roles=roles)


def make_tied(family: Table, size: str) -> Made:
    recipe: dict[str, Initialiser] = {
        "tied": Normal(0.5),
        "fc.weight": Normal(0.1),
        "out.weight": Kaiming(gain=3**-0.5, uniform=True),
        "*.bias": Constant(),
        "norm.weight": Constant(1.0),
        "temperature": Constant(1.0),
    }
    return make_foreign(family, size, recipe, tie=True)


def make_foreign(
    family: Table, size: str, recipe: dict[str, Initialiser], *, roles: Any = None, tie: bool = False
) -> Made:
    """A foreign network, out of declared shapes; the probe doubles what grows."""
    target = family["tables"][size]
    base = base_of(target)

    def net(shapes: dict[str, list[int]]) -> nn.Module:
        tables = ["embed.weight"] if tie else []
        module = bag(shapes, embeddings=tables)
        if tie:
            (readout,) = target["readouts"]
            module.add_module(readout, nn.Linear(1, 1, bias=False))
            getattr(module, readout).weight = module.embed.weight
        return module

    grown = {
        name: [2 * b if b is not None else n for b, n in zip(row["base_shape"], row["shape"], strict=True)]
        for name, row in base["params"].items()
    }
    model = net(shapes_of(target))
    times = family.get("output_mult", 1.0)
    plan = mup.plan(model, net(shapes_of(base)), probe=net(grown), roles=roles, multiplier=True, output_mult=times)
    return Made(plan, model, lambda name: name, recipe)


MAKERS = {
    "dit_mup": make_dit,
    "mmdit_sd3": make_mmdit,
    "llama": make_llama,
    "pixart_mup": make_pixart,
    "tied": make_tied,
}


def test_every_parameter_has_the_published_row(case, root):
    name, size = case
    family = read(root, "multipliers.json")[name]
    assert name in MAKERS, f"family {name} has no rule"
    table = family["tables"][size]
    made = MAKERS[name](family, size)
    assert {made.published(row.name) for row in made.plan.rows} == set(table["params"])
    with torch.no_grad():
        made.plan.init_(made.model, rng.generator(0, "init"), recipe=made.recipe)
    for row in made.plan.rows:
        expected = table["params"][made.published(row.name)]
        assert set(expected) <= KEYS, f"{row.name}: an entry has no rule"
        check_factors(row, expected)
        check_init(row, expected["init"], made)


def check_factors(row: Row, expected: Table) -> None:
    assert list(row.shape) == expected["shape"], row.name
    assert list(row.base) == expected["base_shape"], row.name
    assert len(row.growing) == expected["ninf"], row.name
    assert row.trainable == expected["trainable"], row.name
    adam, sgd = row.factors("adamw"), row.factors("sgd")
    found = {
        "width_mult": row.width_ratio,
        "fan_in_mult": row.fan_in_ratio,
        "fan_out_mult": row.fan_out_ratio,
        "adam_lr": adam.lr,
        "adam_wd": adam.decay,
        "sgd_lr": sgd.lr,
        "sgd_wd": sgd.decay,
        "forward_mult": row.forward,
    }
    numbers = {k: v for k, v in expected.items() if k in found}
    assert {k: found[k] for k in numbers} == pytest.approx(numbers, rel=REL), row.name


def check_init(row: Row, expected: Table, made: Made) -> None:
    values = dict(made.model.named_parameters())[row.name]
    if expected["kind"] == "sincos":
        assert not row.trainable
        return
    if expected["kind"] in ("zeros", "constant"):
        assert bool((values == expected.get("value", 0.0)).all()), row.name
        return
    assert expected["kind"] in ("normal", "uniform"), f"{row.name}: {expected['kind']} has no rule"
    initialiser = chosen(made.recipe, row)
    assert initialiser is not None, row.name
    assert initialiser.uniform == (expected["kind"] == "uniform"), row.name
    assert initialiser.std(row) == pytest.approx(expected["std"], rel=REL), row.name
    if values.numel() > 1000:
        assert float(values.detach().std()) == pytest.approx(expected["std"], rel=0.1), row.name


def test_readouts_have_the_published_factor(case, root):
    name, size = case
    family = read(root, "multipliers.json")[name]
    made = MAKERS[name](family, size)
    found = {row.forward for row in made.plan.rows if row.role in ("output", "tied")}
    assert list(found) == pytest.approx(list(set(family["tables"][size]["readouts"].values())), rel=REL)
    if "readout_scale" in made.plan.scales:
        assert made.plan.scales["readout_scale"] == pytest.approx(found.pop(), rel=REL)


def test_cases_are_those_of_the_configuration(root):
    config, tables = read(root, "config.json"), read(root, "multipliers.json")
    assert set(config) == {"optimizer", "families"}
    assert config["optimizer"] == {"lr": 1.0, "weight_decay": 1.0}
    assert {f: [str(w) for w in c["widths"]] for f, c in config["families"].items()} == {
        f: list(t["tables"]) for f, t in tables.items()
    }


def initialisers(sigma: float) -> dict[str, Initialiser]:
    return {
        "normal": Normal(sigma),
        "uniform": Normal(sigma / math.sqrt(3), uniform=True),
        "trunc_normal": Normal(sigma),
        "xavier_normal": Xavier(uniform=False),
        "xavier_uniform": Xavier(),
        "kaiming_normal_fan_in_a1": Kaiming(),
        "kaiming_normal_fan_out_a1": Kaiming("out"),
        "kaiming_uniform_fan_in_asqrt5": Kaiming(gain=3**-0.5, uniform=True),
    }


def probe_plan(entries: list[Table], index: int) -> mup.Plan:
    """The plan of the probe network of one width; biases are as wide as their weights."""
    entry = entries[index]
    other = next((e for e in entries if e["width"] != entry["width"]), None)
    assert other is not None, "two widths are needed to see what grows"

    def shapes(times: float) -> dict[str, list[int]]:
        weights = {
            name: [
                round(n * times / entry["width_mult"]) if n != m else n
                for n, m in zip(row["shape"], other["normal"][name]["shape"], strict=True)
            ]
            for name, row in entry["normal"].items()
        }
        return weights | {"hid.bias": [weights["hid.weight"][0]], "out.bias": [weights["out.weight"][0]]}

    nets = (bag(shapes(times), embeddings=["emb.weight"]) for times in (entry["width_mult"], 1, 2))
    target, small, probe = nets
    return mup.plan(target, small, probe=probe, roles={"out.weight": "output"}, multiplier=True)


def base_shape(row: Row) -> tuple[int, ...]:
    return tuple(n if b is None else b for b, n in zip(row.base, row.shape, strict=True))


def default_std(size: tuple[int, ...]) -> float:
    """PyTorch's own for a linear layer; a bias is drawn as its weight is."""
    return (3 * math.prod(size[1:])) ** -0.5


def test_initialisers_know_widths(rule, root):
    entries = read(root, "init_rules.json")
    entry = entries[rule]
    plan = probe_plan(entries, rule)
    # A weight that grows in one dimension has the base's deviation at every width.
    known = initialisers(entry["normal"]["inp.weight"]["std"])
    others = {"width", "width_mult", "default_init_then_set_base_shapes", "inp.bias_rescale", "hid.weight_rescale"}
    assert set(entry) == set(known) | others, "an initialiser has no rule"
    for kind, initialiser in known.items():
        for name, expected in entry[kind].items():
            found = initialiser.std(plan.row(name))
            if "std" in expected:
                assert found == pytest.approx(expected["std"], rel=REL), (kind, name)
            else:
                assert found == pytest.approx(expected["sample_std"], rel=0.08), (kind, name)


def test_default_weights_are_rescaled_to_the_base(rule, root):
    """Rescaling a fresh network to its base gives what the published package does to PyTorch's default weights."""
    entries = read(root, "init_rules.json")
    entry, plan = entries[rule], probe_plan(entries, rule)
    assert entry["width_mult"] == pytest.approx(plan.row("hid.weight").fan_in_ratio)
    for name, expected in entry["default_init_then_set_base_shapes"].items():
        weight = plan.row(name.replace(".bias", ".weight"))
        now, then = (default_std(size) for size in (weight.shape, base_shape(weight)))
        assert now == pytest.approx(expected["torch_default_std"], rel=1e-5), name
        assert then * plan.row(name).init / now == pytest.approx(expected["rescale"], rel=1e-5), name
    hidden = Kaiming(gain=3**-0.5, uniform=True).std(plan.row("hid.weight"))
    then = default_std(base_shape(plan.row("hid.weight")))
    assert then * plan.row("hid.weight").init / hidden == pytest.approx(entry["hid.weight_rescale"], rel=REL)
    assert plan.row("inp.weight").init == entry["inp.bias_rescale"] == 1
