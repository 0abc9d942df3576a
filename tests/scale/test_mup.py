"""Plans: what they give, what they leave alone at the base, what they refuse, and that wrappers do not disturb them."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from mmdiff import rng
from mmdiff.errors import ConfigError
from mmdiff.models import dit, llada, llada_v, masked_mmdit, maskgit, mmdit, unified, vision
from mmdiff.models.registry import build
from mmdiff.scale import mup
from mmdiff.scale.family import size_of, with_size
from mmdiff.scale.initialisers import FAN_IN

TEXT = llada.Config(
    vocab_size=40,
    width=16,
    depth=2,
    heads=2,
    kv_heads=2,
    ffn_width=24,
    **dict.fromkeys(("mask_id", "bos_id", "eos_id", "eot_id"), 0),
)
TOWER = vision.Config(image_size=16, patch_size=8, width=8, depth=1, heads=1, ffn_width=16)
DIT = dit.Config(image_size=4, width=16, depth=2, heads=2, ffn_width=64, classes=3)
CODES = maskgit.Config(grid=2, codebook=5, classes=3, width=64, depth=2, heads=4, ffn_width=384, dropout=0.0)
CONFIGS = {
    "llada": TEXT,
    "llada_v": llada_v.Config(language=TEXT, vision=TOWER),
    "unified": unified.Config(language=TEXT, vision=TOWER, codes=unified.CodesConfig(codebook=9, grid=2)),
    "dit": DIT,
    "maskgit": CODES,
    "maskgit_halton": dataclasses.replace(CODES, variant="halton"),
    "mmdit": mmdit.Config(
        image_size=8,
        channels=3,
        out_channels=3,
        width=16,
        depth=2,
        heads=2,
        context_channels=6,
        pooled_channels=5,
        max_grid=4,
        qk_norm=True,
        dual_layers=(0,),
    ),
    "masked_mmdit": masked_mmdit.Config(
        width=16,
        heads=2,
        depth=1,
        single_depth=1,
        context_channels=6,
        pooled_channels=5,
        axes=(2, 2, 4),
        vocab_size=10,
        codebook=8,
        text_vocab_size=7,
    ),
}


def wide(config, times: int = 4):
    return with_size(config, width=times * size_of(config, "width"))


def named(plan: mup.Plan, role: str) -> set[str]:
    return {row.name for row in plan.rows if row.role == role}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_has_a_plan_and_at_the_base_it_changes_nothing(name):
    base = CONFIGS[name]
    plan = mup.plan(base, base)
    assert {row.name for row in plan.rows} == {n for n, _ in build(base, device="meta").named_parameters()}
    assert named(plan, "output") or named(plan, "tied")
    for row in plan.rows:
        for optimizer in ("adamw", "sgd"):
            assert (row.init, row.forward, row.factors(optimizer).lr, row.factors(optimizer).decay) == (1, 1, 1, 1)
    plain = build(base, generator=rng.generator(0, "init"))
    ours = mup.fresh(plan, base, base, rng.generator(0, "init"), zero_readout=False)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_wider_networks_keep_the_spread_of_their_base_by_role(name):
    base = CONFIGS[name]
    plan = mup.plan(wide(base), base)
    small = build(base, generator=rng.generator(0, "init")).state_dict()
    model = mup.fresh(plan, wide(base), base, rng.generator(0, "init"))
    for n, parameter in ((n, p.detach()) for n, p in model.named_parameters()):
        row = plan.row(n)
        factor = {"hidden": 0.5}.get(row.role, 1.0)
        if row.role == "output" or row.front:
            assert not parameter.any()
        elif parameter.numel() > 1 and float(small[n].std()) > 0:
            assert float(parameter.std()) == pytest.approx(factor * float(small[n].std()), rel=1e-4), n
    rates = {row.role: row.factors("adamw").lr for row in plan.rows if row.role != "output"}
    assert rates.pop("hidden") == 0.25
    assert set(rates.values()) == {1.0}


def test_networks_with_a_field_for_it_get_a_multiplier_and_others_fold_it():
    plan = mup.plan(wide(DIT), DIT, output_mult=2.0)
    assert plan.scales == {"readout_scale": 0.5, "residual_scale": 1.0}
    readout = plan.row("final_layer.linear.weight")
    assert (readout.init, readout.factors("adamw").lr, readout.forward) == (1, 1, 0.5)
    folded = mup.plan(wide(TEXT), TEXT, output_mult=2.0)
    assert folded.scales == {}
    readout = folded.row("lm_head.weight")
    assert (readout.init, readout.factors("adamw").lr, readout.factors("adamw").decay) == (0.5, 0.5, 2)
    assert readout.factors("sgd").lr == 4 * 0.5**2


def test_folding_and_multiplying_train_the_same_network():
    """Two steps of each optimizer: the multiplier of the forward pass against its factor in the weight and its rate."""
    target = wide(DIT)
    for optimizer, made in (("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)):
        losses = []
        for multiplier in (True, False):
            plan = mup.plan(target, DIT, multiplier=multiplier)
            model = build(mup.with_scales(target, plan), generator=rng.generator(0, "init"))
            with torch.no_grad():
                model.final_layer.linear.weight.copy_(0.1 * rng.normal(rng.generator(1, "readout"), (32, 64)))
                if not multiplier:
                    model.final_layer.linear.weight.mul_(plan.row("final_layer.linear.weight").fold)
            epsilon = {"eps": 1e-12} if optimizer == "adamw" else {}
            steps = made(plan.groups(model, lr=1e-2, weight_decay=0.1, optimizer=optimizer), lr=1e-2, **epsilon)
            losses.append(train(model, steps))
        torch.testing.assert_close(losses[0], losses[1], atol=0, rtol=1e-4)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> torch.Tensor:
    g = rng.generator(0, "batch")
    x, target = rng.normal(g, (4, 4, 4, 4)), rng.normal(g, (4, 8, 4, 4))
    t, labels = 1000 * rng.uniform(g, (4,)), torch.tensor([0, 1, 2, 3])
    out = []
    for _ in range(steps):
        loss = (model(x, t, labels) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out.append(loss.detach())
    return torch.stack(out)


def test_groups_are_few_ordinary_and_know_their_factor():
    plan = mup.plan(wide(DIT), DIT)
    model = build(mup.with_scales(wide(DIT), plan), generator=rng.generator(0, "init"))
    groups = plan.groups(model, lr=0.1, weight_decay=0.2, eps=1e-8, no_decay=("vector", "*embedding_table*"))
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())
    hidden = next(g for g in groups if g["factor"] == 0.25)
    assert (hidden["lr"], hidden["weight_decay"], hidden["eps"]) == (0.025, 0.8, 0.25e-8)
    assert hidden["name"] == "hidden lr x0.25"
    free = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    assert free == {
        id(p) for n, p in model.named_parameters() if p.requires_grad and (p.ndim == 1 or "embedding_table" in n)
    } - {id(model.final_layer.linear.bias)}
    coupled = plan.groups(model, lr=0.1, weight_decay=0.2, decay="coupled")
    assert {g["weight_decay"] for g in coupled} == {0.2}
    torch.optim.AdamW(groups)


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    plan = mup.plan(wide(DIT), DIT)
    model = build(wide(DIT), generator=rng.generator(0, "init"))
    muon = plan.groups(model, lr=0.02, optimizer="muon")
    rest = plan.groups(model, lr=1e-3, roles=("input", "output", "tied", "vector", "scalar"))
    assert all(p.ndim == 2 for g in muon for p in g["params"])
    assert {g["factor"] for g in muon} == {1.0}
    every = [id(p) for g in muon + rest for p in g["params"]]
    assert sorted(every) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    with pytest.raises(ConfigError, match="is no hidden matrix; Muon is defined for those alone"):
        plan.groups(model, lr=0.02, optimizer="muon", roles=("input",))


def test_depth_shrinks_branches_in_the_forward_pass_or_in_their_last_weight():
    deep = wide(DIT).with_depth(8)
    plan = mup.plan(deep, DIT, rule="depth")
    assert plan.scales == {"readout_scale": 0.25, "residual_scale": 0.25}
    assert plan.row("blocks.7.attn.qkv.weight").factors("adamw").lr == 0.25
    assert plan.row("blocks.7.attn.qkv.weight").factors("adamw").eps == 1 / 16
    assert plan.row("y_embedder.embedding_table.weight").factors("adamw").eps == 1 / 4
    half = mup.plan(deep, DIT, rule="depth", alpha=0.5)
    assert half.scales["residual_scale"] == 0.5
    assert half.row("blocks.0.mlp.fc1.weight").factors("adamw").lr == pytest.approx(0.25 * 0.5)
    assert half.row("t_embedder.mlp.2.weight").factors("adamw").lr == 0.25
    text = mup.plan(wide(TEXT).with_depth(8), TEXT, rule="depth")
    out, gate = (text.row(f"layers.3.{n}.weight") for n in ("self_attn.o_proj", "mlp.gate_proj"))
    assert (out.init, gate.init) == (0.5 * 0.25, 0.5)
    assert (out.factors("adamw").lr, gate.factors("adamw").lr) == (0.25 * 0.25, 0.25)


def test_standard_rule_scales_nothing():
    plan = mup.plan(wide(DIT), DIT, rule="sp")
    assert plan.scales == {"readout_scale": 1.0, "residual_scale": 1.0}
    assert {(r.init, r.forward, r.factors("adamw").lr, r.factors("sgd").lr) for r in plan.rows} == {(1, 1, 1, 1)}
    own = build(wide(DIT), generator=rng.generator(3, "init"))
    ours = mup.fresh(plan, wide(DIT), DIT, rng.generator(3, "init"), zero_readout=False)
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), ours.parameters(), strict=True))


def test_a_plan_is_plain_data():
    plan = mup.plan(wide(DIT), DIT)
    assert mup.Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    text = str(plan)
    assert "rule mup; forward scales: readout_scale 0.25, residual_scale 1" in text
    row = next(line for line in text.splitlines() if line.startswith("blocks.0.attn.qkv.weight"))
    assert row.split() == ["blocks.0.attn.qkv.weight", "hidden", "192x64", "4", "0.5", "0.25", "4", "1"]


def test_wrappers_copies_and_averages_do_not_disturb_a_plan():
    plan = mup.plan(wide(DIT), DIT)
    model = build(mup.with_scales(wide(DIT), plan), generator=rng.generator(0, "init"))
    counts = [len(g["params"]) for g in plan.groups(model, lr=1.0)]
    for wrapped in (torch.compile(model, backend="eager"), copy.deepcopy(model), nn.Sequential(model)):
        if isinstance(wrapped, nn.Sequential):
            wrapped = nn.ModuleDict({"module": model})
        assert [len(g["params"]) for g in plan.groups(wrapped, lr=1.0)] == counts


def test_folding_a_state_and_unfolding_it_gives_it_back():
    state = {"a.weight": torch.tensor([2.0, 4.0]), "a.bias": torch.tensor([1.0])}
    folded = mup.fold(state, {"a.weight": 0.25})
    assert folded["a.weight"].tolist() == [0.5, 1.0]
    assert folded["a.bias"] is state["a.bias"]
    assert torch.equal(mup.unfold(folded, {"a.weight": 0.25})["a.weight"], state["a.weight"])


class Foreign(nn.Module):
    """A network of somebody else's."""

    def __init__(self, width: int, *, keys: int | None = None, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.k_proj = nn.Linear(width, keys or width)
        self.table = nn.Parameter(torch.zeros(6, width))
        self.head = nn.Linear(width, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def foreign(width: int, rules: dict[str, str], **options) -> mup.Plan:
    return mup.plan(Foreign(width, **options), Foreign(8, **options), probe=Foreign(12, **options), roles=rules)


def test_a_role_that_shapes_do_not_tell_is_asked_for_and_never_guessed():
    with pytest.raises(ConfigError, match=r"table of a Foreign \(fixed, grows\): its role cannot be inferred"):
        foreign(32, {"head.weight": "output"})
    with pytest.raises(ConfigError, match=r"head\.weight of a Linear .*: a readout, or a projection"):
        foreign(32, {"table": "vector"})
    with pytest.raises(ConfigError, match=r"k_proj\.weight of a Linear \(fixed, grows\).*key/value heads"):
        foreign(32, {"table": "vector", "head.weight": "output"}, keys=4)
    with pytest.raises(ConfigError, match="'table' is 'bias'; one of input, hidden"):
        foreign(32, {"table": "bias"})
    plan = foreign(32, {"table": "vector", "*.weight": "hidden", "embed.weight": "input", "head.weight": "output"})
    assert [r.role for r in plan.rows] == ["vector", "input", "hidden", "vector", "output"]


def test_a_tied_readout_needs_the_forward_pass():
    rules = {"table": "vector"}
    with pytest.raises(ConfigError, match="cannot be folded into a weight that is also an embedding: untie them, name"):
        foreign(32, rules, tied=True)
    nets = (Foreign(w, tied=True) for w in (32, 8, 12))
    target, base, probe = nets
    plan = mup.plan(target, base, probe=probe, roles=rules, multiplier=True)
    row = plan.row("head.weight")
    assert (row.name, row.role, row.forward, row.init, row.factors("adamw").lr) == ("embed.weight", "tied", 0.25, 1, 1)


def test_the_norm_in_front_of_a_tied_readout_can_carry_its_factor():
    """Three steps of a tied text model: the factor in the norm's gain against one in the forward pass."""
    base = dataclasses.replace(TEXT, tied=True)
    target = wide(base)
    plan = mup.plan(target, base)
    row = plan.row("norm.weight")
    assert not mup.fresh(plan, target, base, rng.generator(0, "init")).norm.weight.any()
    assert (row.role, row.fold, row.factors("adamw").lr) == ("vector", 0.25, 0.25)
    assert plan.row("embed_tokens.weight").fold == 1
    losses = []
    for carried in (True, False):
        used = plan if carried else mup.plan(target, base, multiplier=True)
        model = mup.fresh(plan, target, base, rng.generator(0, "init"), zero_readout=False)
        assert set(model.norm.weight.tolist()) == {0.25}
        if not carried:
            model.norm.weight.data.fill_(1)
            scale = used.scales["readout_scale"]
            model.norm.register_forward_hook(lambda _, __, out, scale=scale: out * scale)
        optimizer = torch.optim.AdamW(used.groups(model, lr=1e-2), lr=1e-2, eps=1e-12, weight_decay=0.0)
        ids = torch.arange(24).view(2, 12)
        for _ in range(3):
            loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten().flip(0))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    torch.testing.assert_close(torch.stack(losses[:3]), torch.stack(losses[3:]), atol=0, rtol=1e-4)


@pytest.mark.parametrize("variant", ["bert", "halton"])
def test_a_tied_readout_of_the_house_is_multiplied_in_the_forward_pass(variant):
    base = dataclasses.replace(CODES, variant=variant)
    plan = mup.plan(wide(base), base, output_mult=2.0)
    assert plan.scales == {"readout_scale": 0.5}
    row = plan.row("net.tok_emb.weight")
    assert (row.role, row.init, row.factors("adamw").lr, row.forward) == ("tied", 1, 1, 0.5)
    model = mup.fresh(plan, wide(base), base, rng.generator(0, "init"))
    ids, labels = torch.tensor([[0, 4, 5, 2]]), torch.tensor([3])
    assert model.config.readout_scale == 0.5
    assert not model(ids, labels).any()
    front = plan.row("net.last_layer.4.weight" if variant == "bert" else "net.last_norm.norm_final.weight")
    assert (front.front, front.fold) == (True, 1)


@pytest.mark.parametrize("variant", ["bert", "halton"])
def test_the_factor_of_a_tied_readout_leaves_its_bias_alone(variant):
    config = dataclasses.replace(CODES, variant=variant)
    model, scaled = (
        build(dataclasses.replace(config, readout_scale=f), generator=rng.generator(0, "init")).eval() for f in (1, 0.5)
    )
    with torch.no_grad():
        for net in (model.net, scaled.net):
            (net.bias if variant == "bert" else net.head["bias"]).fill_(3)
    ids, labels = torch.tensor([[0, 4, 5, 2]]), torch.tensor([3])
    torch.testing.assert_close(scaled(ids, labels) - 3, (model(ids, labels) - 3) / 2)


def test_a_hidden_size_that_is_rounded_is_scaled_by_its_own_ratio_and_said():
    base = dataclasses.replace(CODES, variant="halton", ffn_width=256)
    with pytest.warns(UserWarning, match=r"from 256 to 768 \(x3\) where the width goes from 64 to 256 \(x4\)"):
        plan = mup.plan(wide(base), base)
    up, down = (plan.row(f"net.transformer.layers.0.ff.{name}.weight").factors("adamw").lr for name in ("w1", "w2"))
    assert (up, down) == (1 / 4, 1 / 3)
    small = dataclasses.replace(base, width=16, heads=2, ffn_width=32)
    with pytest.warns(UserWarning, match=r"from 256 to 256 \(x1\) where the width goes from 16 to 32 \(x2\)"):
        plan = mup.plan(wide(small, 2), small)
    row = plan.row("net.transformer.layers.0.ff.w2.weight")
    assert (row.role, row.factors("adamw").lr) == ("hidden", 1)
    assert mup.plan(small, small).row(row.name).role == "hidden"


def test_a_foreign_module_needs_a_probe():
    with pytest.raises(ConfigError, match="the probe is the base with every width different"):
        mup.plan(Foreign(32), Foreign(8))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (dataclasses.replace(wide(DIT), classes=4), r"classes is 4, expected 3 \(the base has 3\)"),
        (dataclasses.replace(wide(DIT), ffn_width=100), r"ffn_width is 100, expected 256"),
        (dataclasses.replace(wide(TEXT), rope_theta=1.0), r"rope_theta is 1\.0, expected 500000\.0"),
        (dataclasses.replace(wide(DIT), patch_size=4), "patch_size is 4, expected 2"),
    ],
)
def test_a_target_that_is_no_scaling_of_its_base_is_refused_by_field(target, message):
    with pytest.raises(ConfigError, match=f"the target is not a scaling of its base: {message}"):
        mup.plan(target, DIT if isinstance(target, dit.Config) else TEXT)


def test_other_families_and_wrong_networks_are_refused():
    with pytest.raises(ConfigError, match="the target is a llada, its base a dit"):
        mup.plan(TEXT, DIT)
    plan = mup.plan(wide(DIT), DIT)
    with pytest.raises(ConfigError, match="the plan was made for"):
        plan.groups(build(DIT, device="meta"), lr=1.0)
    with pytest.raises(ConfigError, match="the plan has no parameter embed_tokens"):
        plan.groups(build(TEXT, device="meta"), lr=1.0)
    with pytest.raises(ConfigError, match="give a recipe with a generator, or a base"):
        plan.init_(build(DIT), recipe=FAN_IN)


def test_a_fixed_tower_may_stay_and_fixed_key_heads_are_refused():
    base = CONFIGS["llada_v"]
    plan = mup.plan(dataclasses.replace(base, language=wide(TEXT)), base)
    assert plan.row("language.layers.0.self_attn.q_proj.weight").factors("adamw").lr == 0.25
    assert plan.row("connector.2.weight").role == "hidden"
    grouped = dataclasses.replace(TEXT, kv_heads=1)
    with pytest.raises(ConfigError, match=r"kv_heads is 1, expected 4 \(the base has 1\)"):
        mup.plan(dataclasses.replace(wide(grouped), kv_heads=1), grouped)


def test_a_grown_head_dimension_gets_its_scale_or_a_warning():
    target = dataclasses.replace(wide(DIT), heads=2)
    assert mup.plan(target, DIT).scales["attention_scale"] == pytest.approx(math.sqrt(8) / 32)
    with pytest.warns(UserWarning, match=r"head_dim grows from 8 to 32: .* needs? the scale 0\.08839.*heads to 8"):
        mup.plan(dataclasses.replace(wide(TEXT), heads=2, kv_heads=2), TEXT)
    with pytest.warns(UserWarning, match=r"this network uses 0\.5"):
        mup.plan(dataclasses.replace(target, attention_scale=0.5), DIT)
    right = dataclasses.replace(target, attention_scale=math.sqrt(8) / 32)
    assert "attention_scale" not in mup.plan(right, DIT).scales
