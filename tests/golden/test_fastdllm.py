"""Decoding with quotas, thresholds, factors and key/value caches against Fast-dLLM: fixture ``fastdllm``.

The published loops let all rows of a batch wait for the slowest in every block; ours do not. A row's passes within a
block are the same, so the published numbers follow from ours, row by row.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmdiff.models.llada import LLaDA
from mmdiff.sampling import Dual, Factor, Fixed, Linear, Prefix, TextBackbone, Threshold, decode
from tests.helpers.golden import Spy, publish, root_of, rule, tree_of

NAME = "fastdllm"
RULES = {
    r"initial_logits": "tolerance",
    r".*\.(tokens|order|query_len)": "exact",
    r".*\.drift_max": "tolerance",
    r".*\.(first|last)_cached_logits": "tolerance",
}
CASE = {"cache", "steps", "threshold", "factor", "factor_rule", "block_length", "batch", "nfe", "query_tokens"}
RUN = {"prompt_length", "gen_length", "block_length", "batch"}
CACHES = {"none": lambda: None, "prefix": lambda: Prefix(watch=1), "dual": lambda: Dual(watch=1)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", list(tree_of(metafunc.config, NAME)["cases"]))


@pytest.fixture(scope="module")
def golden(request, tmp_path_factory):
    root, tree = root_of(request.config, NAME), tree_of(request.config, NAME)
    folder = publish(tmp_path_factory.mktemp(NAME), tree["model"], root / "weights.safetensors")
    inputs, outputs = load_file(root / "inputs.safetensors"), load_file(root / "outputs.safetensors")
    return tree, LLaDA.from_pretrained(folder).eval(), inputs["prompt"], outputs


def parts(case: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    block = case.get("block_length", run["block_length"])
    out: dict[str, Any] = {"blocks": Fixed(block), "length": run["gen_length"], "cache": CACHES[case["cache"]]()}
    if case.get("threshold") is not None:
        return {**out, "selector": Threshold(case["threshold"])}
    if case.get("factor") is not None:
        return {
            **out,
            "selector": Factor(case["factor"], published=None if case.get("factor_rule") == "strict" else "fast_dllm"),
        }
    return {**out, "schedule": Linear(case["steps"])}


def by_block(done, size: int) -> list[list[int]]:
    """Per block, the numbers of the row's passes in it."""
    order = done.trace.order[0, done.canvas.start :]
    return [sorted(set(chunk.tolist())) for chunk in order.split(size)]


def test_case_gives_the_published_tokens_order_and_cost(golden, case):
    tree, model, prompt, outputs = golden
    options, run = tree["cases"][case], tree["run"]
    assert not set(options) - CASE, "an option without a meaning here"
    rows = options.get("batch", run["batch"])
    block = options.get("block_length", run["block_length"])
    alone = [decode(model, prompt[r : r + 1], **parts(options, run)) for r in range(rows)]
    together = decode(model, prompt[:rows], **parts(options, run))
    assert torch.equal(together.canvas.tokens, outputs[f"{case}.tokens"])
    assert torch.equal(torch.cat([d.canvas.tokens for d in alone]), outputs[f"{case}.tokens"])

    passes = [by_block(d, block) for d in alone]
    slowest = [max(len(p[k]) for p in passes) for k in range(len(passes[0]))]
    order, drift, first = torch.full_like(outputs[f"{case}.order"], -1), [0.0] * sum(slowest), 0
    for k, count in enumerate(slowest):
        for r, done in enumerate(alone):
            ours = done.trace.order[0, done.canvas.start :][k * block : (k + 1) * block]
            for j, number in enumerate(passes[r][k]):
                order[r, k * block : (k + 1) * block][ours == number] = first + j
                if number in done.trace.drift:
                    drift[first + j] = max(drift[first + j], float(done.trace.drift[number].largest))
        first += count
    assert torch.equal(order, outputs[f"{case}.order"])
    assert sum(slowest) == options["nfe"]

    length = prompt.shape[1] + run["gen_length"]
    rest = {
        "none": lambda k: length,
        "prefix": lambda k: length - prompt.shape[1] - k * block,
        "dual": lambda k: min(block, run["gen_length"] - k * block),
    }[options["cache"]]
    lengths = [length if j == 0 else rest(k) for k, count in enumerate(slowest) for j in range(count)]
    assert lengths == outputs[f"{case}.query_len"].tolist()
    for r, done in enumerate(alone):
        mine = [length if j == 0 else rest(k) for k, numbers in enumerate(passes[r]) for j in range(len(numbers))]
        assert [p.computed for p in done.trace.passes] == mine
        assert done.trace.nfe == done.trace.row_nfe[0] == len(mine)
    assert sum(lengths) == options["query_tokens"]

    expected = outputs.get(f"{case}.drift_max")
    assert expected is None or options["cache"] != "none"
    if expected is not None:
        torch.testing.assert_close(torch.tensor(drift), expected, atol=2e-3, rtol=1e-3)
        starts = [sum(slowest[:k]) for k in range(len(slowest))]
        assert max(drift[s] for s in starts) < 1e-5


def test_case_computes_the_published_logits(golden, case):
    tree, model, prompt, outputs = golden
    wanted = {n: outputs[n] for n in (f"{case}.first_cached_logits", f"{case}.last_cached_logits") if n in outputs}
    if not wanted:
        return
    options, run = tree["cases"][case], tree["run"]
    spy = Spy(model)
    decode(spy, prompt[: options["batch"]].tolist(), **parts(options, run))
    cached = [x for x in spy.logits if x.shape[1] < prompt.shape[1] + run["gen_length"]]
    for name, expected in wanted.items():
        ours = cached[0 if "first" in name else -1]
        torch.testing.assert_close(ours, expected, atol=2e-4, rtol=1e-4)


def test_first_logits_are_the_published_ones(golden):
    tree, model, prompt, outputs = golden
    masks = torch.full((len(prompt), tree["run"]["gen_length"]), tree["model"]["mask_token_id"])
    with torch.inference_mode():
        logits = model(torch.cat((prompt, masks), 1))
    torch.testing.assert_close(logits, outputs["initial_logits"], atol=2e-4, rtol=0)


def test_every_output_has_a_rule_and_a_case(golden):
    tree, model, _, outputs = golden
    assert not set(tree) - {"model", "run", "cases"}
    assert not set(tree["run"]) - RUN
    assert {rule(RULES, name) for name in outputs}
    assert {n.partition(".")[0] for n in outputs} - {"initial_logits"} == set(tree["cases"])
    assert isinstance(TextBackbone(model).layers, int)
