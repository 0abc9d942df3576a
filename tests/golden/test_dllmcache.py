"""Layer outputs that are reused and partly refreshed against dLLM-Cache's published hook: fixture ``dllmcache``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmdiff.models.llada import LLaDA
from mmdiff.sampling import DllmCache
from mmdiff.sampling import decode as decode_tokens
from mmdiff.sampling.presets import text_parts
from tests.helpers.golden import Spy, publish, root_of, rule, tree_of

NAME = "dllmcache"
RULES = {
    r".*\.tokens": "exact",
    r".*\.drift_max": "tolerance",
    r".*\.logits_\d+": "tolerance",
    r".*\.updated\.\d+\.layer\d+": "exact as a set",
}
CASE = {"steps", "gen_length", "block_length", "cache", "prompt_interval", "gen_interval", "transfer_ratio"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", list(tree_of(metafunc.config, NAME)["cases"]))


@pytest.fixture(scope="module")
def golden(request, tmp_path_factory):
    root, tree = root_of(request.config, NAME), tree_of(request.config, NAME)
    folder = publish(tmp_path_factory.mktemp(NAME), tree["model"], root / "weights.safetensors")
    inputs, outputs = load_file(root / "inputs.safetensors"), load_file(root / "outputs.safetensors")
    return tree, LLaDA.from_pretrained(folder).eval(), inputs["prompt"], outputs


def decode(golden, case: str) -> tuple[Any, Spy, DllmCache | None]:
    tree, model, prompt, _ = golden
    options = tree["cases"][case]
    assert not set(options) - CASE, "an option without a meaning here"
    cache = None
    if options.get("cache", True):
        cache = DllmCache(options["prompt_interval"], options["gen_interval"], options["transfer_ratio"])
    words = {k: options[k] for k in ("gen_length", "block_length", "steps")}
    parts = text_parts(compat="reference", end_ids=(tree["model"]["eos_token_id"],), **words)
    spy = Spy(model)
    arguments = {**parts.arguments(), "cache": cache}
    return decode_tokens(spy, prompt.tolist(), length=options["gen_length"], **arguments), spy, cache


def test_case_gives_the_published_tokens_logits_and_drift(golden, case):
    outputs, start = golden[3], golden[2].shape[1]
    done, spy, cache = decode(golden, case)
    mine = {n.removeprefix(f"{case}."): x for n, x in outputs.items() if n.startswith(f"{case}.")}
    assert torch.equal(done.canvas.tokens, mine.pop("tokens"))
    for name, expected in mine.items():
        assert cache is not None
        kind, _, rest = name.replace("_", ".").partition(".")
        if kind == "drift":
            ours = torch.tensor(spy.drift)
            torch.testing.assert_close(ours, expected, atol=2e-3, rtol=1e-2)
            passes = range(len(ours))
            whole = [s % cache.prompt_interval == 0 and s % cache.answer_interval == 0 for s in passes]
            assert ours[torch.tensor(whole)].max() <= 1e-4
        elif kind == "logits":
            torch.testing.assert_close(spy.logits[int(rest)], expected, atol=1e-3, rtol=0)
        else:
            number, layer = (int(part) for part in rest.replace("layer", "").split("."))
            updated = spy.updated[number][layer] - start
            assert torch.equal(updated.sort(1).values, expected.sort(1).values)


def test_refreshing_everything_in_every_pass_is_the_plain_sampler(golden, case):
    tree = golden[0]
    done, spy, cache = decode(golden, case)
    if cache is not None and cache.prompt_interval == cache.answer_interval == 1:
        assert max(spy.drift) == 0
        options = {k: v for k, v in tree["cases"][case].items() if k in ("gen_length", "block_length", "steps")}
        plain, _, _ = decode(({**tree, "cases": {case: {**options, "cache": False}}}, *golden[1:]), case)
        assert torch.equal(done.canvas.tokens, plain.canvas.tokens)


def test_every_output_has_a_rule_and_a_case(golden):
    tree, outputs = golden[0], golden[3]
    assert not set(tree) - {"model", "cases", "kept_passes"}
    assert {rule(RULES, name) for name in outputs}
    assert {n.partition(".")[0] for n in outputs} == set(tree["cases"])
