"""Which positions are decided, on fixed logits, against the published rules: fixture ``decode_selectors``.

The published functions see the mask class as any other; the engine hides it from the choice. So the proposals here are
built as the published code builds them, by the plain argmax.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmdiff import rng
from mmdiff.sampling import (
    T2T,
    Credit,
    EntropyBound,
    EntropyThreshold,
    Factor,
    Hierarchy,
    Linear,
    LocalLeap,
    Proposal,
    Remask,
    Threshold,
    ThresholdOrQuota,
    TopConfidence,
)
from mmdiff.sampling.samplers import Draw
from mmdiff.sampling.selectors import Turn, certainty_density
from tests.helpers.golden import root_of, rule, tree_of

NAME = "decode_selectors"
SLACK = 1e-5  # dInfer's
RULES = {
    r"confidence|margin|entropy": "tolerance 1e-9",
    r"argmax|credit\.(history|plain_history)|hierarchy_remask\.tokens|refine\..*\.tokens": "exact",
    r"(quota|threshold|threshold_nomask|factor|factor_strict|entropy_threshold|entropy_bound|localleap)\..*": "exact",
    r"hierarchy|hierarchy_open|refine\..*\.(commit|edit)": "exact",
    r"credit\.fused_top|certainty_density\..*": "tolerance 1e-4",
}
KEYS = {
    "rows",
    "length",
    "vocab",
    "mask_id",
    "quotas",
    "thresholds",
    "factors",
    "entropy_thresholds",
    "sigmas",
    "credit",
    "credit_iterations",
    "hierarchy",
    "localleap",
    "entropy_bound",
    "refine",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "output" in metafunc.fixturenames:
        found = load_file(root_of(metafunc.config, NAME) / "outputs.safetensors")
        metafunc.parametrize("output", sorted(found))


class Case:
    """The fixture, and the situation it describes."""

    def __init__(self, config: Any) -> None:
        root, self.tree = root_of(config, NAME), tree_of(config, NAME)
        self.inputs = load_file(root / "inputs.safetensors")
        self.outputs = load_file(root / "outputs.safetensors")
        self.tokens, self.mask = self.inputs["tokens"], self.tree["mask_id"]
        self.masked = self.tokens == self.mask

    def proposal(self, logits: Tensor) -> Proposal:
        choice = logits.argmax(-1)
        index = torch.arange(logits.shape[1]).expand(choice.shape)
        return Proposal(choice, choice, logits, index)

    def turn(self, quota: Tensor | None = None, step: int = 0, tokens: Tensor | None = None) -> Turn:
        rows, length = self.tokens.shape
        draw = Draw([rng.generator(r) for r in range(rows)], [length] * rows, length, torch.device("cpu"))
        undecided = (self.tokens if tokens is None else tokens) == self.mask
        return Turn(list(range(rows)), quota, [step] * rows, [step + 1] * rows, draw, undecided)

    def select(self, selector: Any, quota: int | None = None, nomask: bool = False, double: bool = True) -> Tensor:
        logits = self.inputs["logits"].double() if double else self.inputs["logits"]
        proposal = self.proposal(logits)
        candidates = self.masked & (proposal.tokens != self.mask) if nomask else self.masked
        wanted = None if quota is None else torch.full((len(logits),), quota)
        return selector.select(proposal, candidates, self.turn(wanted))


@pytest.fixture(scope="module")
def golden(request) -> Case:
    return Case(request.config)


def statistics(golden: Case, name: str) -> Tensor:
    proposal = golden.proposal(golden.inputs["logits"].double())
    return proposal.tokens if name == "argmax" else getattr(proposal, name)


def credit(golden: Case, name: str) -> Tensor:
    options, tokens, out = dict(golden.tree["credit"]), golden.tokens.clone(), []
    threshold = Threshold(options.pop("threshold"), slack=SLACK)
    selector = Credit(threshold, **options).start(*tokens.shape)
    for i in range(golden.tree["credit_iterations"]):
        logits, masked = golden.inputs[f"credit.logits.{i}"].clone(), tokens == golden.mask
        turn = golden.turn(step=i, tokens=tokens)
        proposal = golden.proposal(logits)
        if name != "credit.plain_history":
            selector.transform(logits, proposal.index, masked, turn)
            proposal = golden.proposal(logits)
        if name == "credit.fused_top":
            out.append(logits.amax(-1))
        candidates = masked & (proposal.tokens != golden.mask)
        tokens = torch.where(selector.select(proposal, candidates, turn), proposal.tokens, tokens)
        if name != "credit.fused_top":
            out.append(tokens)
    return torch.stack(out)


def remasked(golden: Case) -> Tensor:
    options = golden.tree["hierarchy"]
    editor = Remask(options["remask_threshold"], options["low_threshold"], options["threshold"])
    proposal = golden.proposal(golden.inputs["logits"])
    edit = editor.edit(proposal, golden.tokens, golden.masked, ~golden.masked, golden.masked, golden.tokens.shape[1])
    return torch.where(edit.write, proposal.tokens, golden.tokens.masked_fill(edit.reopen, golden.mask))


def refined(golden: Case, name: str, steps: int, what: str) -> Tensor:
    tree = golden.tree["refine"]
    options, length = tree[name], golden.tokens.shape[1]
    quota = Linear(steps, published=True).counts(length, steps)[tree["quota_index"]]
    proposal, tokens = golden.proposal(golden.inputs["logits"].double()), golden.tokens
    commit = ThresholdOrQuota(options["threshold"]).select(
        proposal, golden.masked, golden.turn(torch.full((len(tokens),), quota))
    )
    edit = torch.zeros_like(commit)
    if options["editing_threshold"] is not None:
        free = (torch.arange(length) >= tree["prompt_positions"]).expand_as(commit)
        editor = T2T(options["editing_threshold"])
        edit = editor.edit(proposal, tokens, golden.masked, ~golden.masked & free, commit, length).write & ~commit
    return {"commit": commit, "edit": edit, "tokens": torch.where(commit | edit, proposal.tokens, tokens)}[what]


def ours(golden: Case, name: str) -> Tensor:
    kind, _, rest = name.partition(".")
    options = golden.tree["hierarchy"]
    if kind in ("confidence", "margin", "entropy", "argmax"):
        return statistics(golden, name)
    if kind == "credit":
        return credit(golden, name)
    if kind == "refine":
        case, steps, what = rest.split(".")
        return refined(golden, case, int(steps), what)
    if name == "hierarchy_remask.tokens":
        return remasked(golden)
    if kind == "certainty_density":
        return certainty_density(~golden.masked, float(rest))
    if kind == "quota":
        return golden.select(TopConfidence(), int(rest))
    if kind == "threshold_nomask":
        return golden.select(Threshold(float(rest), slack=SLACK), nomask=True, double=False)
    if kind == "localleap":
        leap = golden.tree["localleap"][rest]
        return golden.select(LocalLeap(leap["threshold"], leap["radius"], leap["relaxed"]))
    selectors = {
        "threshold": lambda: Threshold(float(rest)),
        "factor": lambda: Factor(float(rest), published="fast_dllm"),
        "factor_strict": lambda: Factor(float(rest)),
        "entropy_threshold": lambda: EntropyThreshold(float(rest)),
        "entropy_bound": lambda: EntropyBound(float(rest)),
        "hierarchy": lambda: Hierarchy(options["threshold"], options["low_threshold"]),
        "hierarchy_open": lambda: Hierarchy(None, None),
    }
    return golden.select(selectors[kind]())


def test_output_is_the_published_one(golden, output):
    kind, expected, found = rule(RULES, output), golden.outputs[output], ours(golden, output)
    if kind == "exact":
        assert torch.equal(found, expected)
    else:
        atol = float(kind.split()[1])
        torch.testing.assert_close(found, expected, atol=atol, rtol=0, check_dtype=False)


@pytest.mark.parametrize("name", ["confidence", "margin", "entropy"])
def test_statistics_of_float32_logits_agree_with_float64(golden, name):
    proposal = golden.proposal(golden.inputs["logits"])
    torch.testing.assert_close(getattr(proposal, name).double(), golden.outputs[name], atol=2e-6, rtol=1e-5)


def test_every_option_and_input_is_used(golden):
    tree = golden.tree
    assert set(tree) == KEYS
    assert (tree["rows"], tree["length"]) == tuple(golden.tokens.shape)
    assert golden.inputs["logits"].shape[-1] == tree["vocab"]
    expected = {"logits", "tokens"} | {f"credit.logits.{i}" for i in range(tree["credit_iterations"])}
    assert set(golden.inputs) == expected
