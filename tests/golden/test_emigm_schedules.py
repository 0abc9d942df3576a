"""Schedules, guidance, training masks and learning rate of eMIGM: fixture ``emigm_schedules``.

Every output tensor has a rule in `RULES`; one without a rule fails.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmdiff import rng
from mmdiff.diffusion.guidance import GuidanceSchedule
from mmdiff.diffusion.mask_schedules import GAMMAS, reveal_probabilities, sampling_times, shared_mask
from mmdiff.sampling import Cosine, LatentBackbone, SharedReveal, decode, latent_canvas
from mmdiff.training.optim import ScheduleConfig, factor

NAME = "emigm_schedules"
PER_EPOCH = 10**9
"""Samples an epoch is taken to have, so that fractional epochs are whole samples to ten digits."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    root = Path(metafunc.config.getoption("--fixtures")) / NAME
    if "output" in metafunc.fixturenames:
        metafunc.parametrize("output", sorted(load_file(root / "outputs.safetensors")))


class Golden:
    """The fixture."""

    def __init__(self, root: Path) -> None:
        self.config: dict[str, Any] = json.loads((root / "config.json").read_text())
        self.inputs = load_file(root / "inputs.safetensors")
        self.outputs = load_file(root / "outputs.safetensors")
        self.runs: dict[int, dict[str, Tensor]] = {}

    def entry(self, table: str, index: str) -> dict[str, Any]:
        return next(e for e in self.config[table] if e["index"] == int(index))


@pytest.fixture(scope="module")
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(Path(request.config.getoption("--fixtures")) / NAME)


class NoNetwork:
    """Stands in for a network whose tokens nobody looks at."""

    def __init__(self, tokens: int) -> None:
        self.config = SimpleNamespace(classes=1, tokens=tokens)
        self.head = SimpleNamespace(channels=1)

    def condition(self, latents: Tensor, mask: Tensor, labels: Tensor, *, index: Tensor, counts: Any) -> Tensor:
        assert counts == (int((~mask).sum(1).min()), int((~mask).sum(1).max()))
        return torch.zeros(*index.shape, 1)


class Recorder:
    """Draws zeros and notes the guidance it was given."""

    def __init__(self) -> None:
        self.scales: list[float] = []

    def tokens(self, head: Any, conditions: Any, noise: Callable[[], Tensor]) -> Tensor:
        self.scales.append(1.0 if conditions.scale is None else float(conditions.scale[0]))
        return torch.zeros(len(conditions.given), 1)


def guidance_of(spec: dict[str, Any]) -> GuidanceSchedule:
    """JSON writes a whole number without a point."""
    interval = float(spec["cfg_t_min"]), float(spec["cfg_t_max"])
    return GuidanceSchedule(float(spec["cfg"]), spec["cfg_schedule"], interval)


def run(golden: Golden, index: str) -> dict[str, Tensor]:
    """A trace, decoded with the recorded draws."""
    spec = golden.entry("traces", index)
    draws: list[Tensor] = []
    u, forced = golden.inputs[f"trace/{index}/u"], golden.inputs[f"trace/{index}/forced"]
    for row, one in zip(u, forced.tolist(), strict=True):
        draws += [row] if one < 0 else [row, torch.tensor([one])]
    recorder = Recorder()
    guidance = guidance_of(spec)
    done = decode(
        LatentBackbone(NoNetwork(spec["seq_len"])),
        canvas=latent_canvas(torch.zeros(1, dtype=torch.long), torch.zeros(1, spec["seq_len"], 1)),
        selector=SharedReveal(spec["mask_strategy"], spec["num_iter"]),
        sampler=recorder,
        guidance=guidance,
        generators=rng.Tape(draws),
    )
    npred = done.trace.committed[:, 0]
    times = sampling_times(spec["num_iter"])[1:].tolist()
    on = torch.tensor([guidance.active(t) for t in times[: len(npred)]])
    assert done.trace.nfe == spec["executed_steps"]
    assert done.trace.row_passes == spec["transformer_forwards"]
    return {
        "npred": npred,
        "left": spec["seq_len"] - npred.cumsum(0),
        "cfg_on": on,
        "cfg_iter": torch.tensor(recorder.scales, dtype=torch.float64),
    }


def trace(golden: Golden, index: str, name: str) -> Tensor:
    if int(index) not in golden.runs:
        golden.runs[int(index)] = run(golden, index)
    return golden.runs[int(index)][name]


def published_guidance(golden: Golden, resolution: str, size: str, steps: str) -> Tensor:
    found = [e for e in golden.config["published"] if (e["resolution"], e["size"]) == (int(resolution), size)]
    spec = next(e for e in found if e["num_iter"] == int(steps))
    guidance = guidance_of(spec)
    on = torch.tensor([guidance.active(t) for t in sampling_times(int(steps))[1:].tolist()])
    assert int(on.sum()) == spec["cfg_steps"]
    assert int(on.sum()) + int(steps) == spec["transformer_forwards"]
    return on


def training_mask(golden: Golden, index: str) -> tuple[Tensor, Tensor]:
    spec = golden.entry("masking", index)
    t, u, perm = (golden.inputs[f"masking/{index}/{n}"] for n in ("t", "u", "perm"))
    assert len(t) == spec["draws"]
    tape = [x for i in range(len(t)) for x in (t[i : i + 1], u[i])]
    t_min = float(spec["clamp_t_min"])
    return shared_mask(spec["mask_strategy"], *perm.shape, rng.Tape([*tape, perm]), t_min=t_min)


def learning_rate(golden: Golden, index: str) -> Tensor:
    spec = golden.entry("lr", index)
    schedule = ScheduleConfig(
        kind=spec["lr_schedule"],
        warmup_samples=round(spec["warmup_epochs"] * PER_EPOCH),
        final=spec["min_lr"] / spec["lr"],
    )
    epochs = golden.inputs["lr/epoch"].double().tolist()
    total = spec["epochs"] * PER_EPOCH
    return torch.tensor(
        [spec["lr"] * factor(schedule, round(e * PER_EPOCH), total) for e in epochs], dtype=torch.float64
    )


def mar(golden: Golden, steps: str, name: str) -> Tensor:
    """Ours leaves out steps that reveal nothing, of which the published loop has some if there are too few tokens."""
    spec, expected = golden.config["mar"], golden.outputs[f"mar/npred/{steps}"]
    counts = torch.zeros_like(expected)
    made = Cosine(int(steps), precision="float64").counts(spec["seq_len"], int(steps))
    counts[expected > 0] = torch.tensor(made)
    if name == "npred":
        return counts
    return GuidanceSchedule(float(spec["cfg"]), spec["cfg_schedule"], reserve=1).at(counts.cumsum(0), spec["seq_len"])


def expected_masked(golden: Golden, name: str, steps: str) -> Tensor:
    return golden.config["seq_len"] * (1 - reveal_probabilities(name, int(steps)).double()).cumprod(0)


Rule = tuple[str, Callable[..., Tensor]]
RULES: dict[str, Rule] = {
    r"gamma/(.+)": ("tolerance", lambda g, s: GAMMAS[s].share(g.inputs["t_grid"])),
    r"weight/(.+)": ("relative", lambda g, s: GAMMAS[s].weight(g.inputs["p_grid"])),
    r"timesteps/(\d+)": ("tolerance", lambda g, n: sampling_times(int(n))),
    r"p_transfer/(.+)/(\d+)": ("tolerance", lambda g, s, n: reveal_probabilities(s, int(n))),
    r"expected_masked/(.+)/(\d+)": ("mean", expected_masked),
    r"trace/(\d+)/(npred|left|cfg_on)": ("exact", trace),
    r"trace/(\d+)/(cfg_iter)": ("tolerance", trace),
    r"published/(\d+)/(\w+)/(\d+)/cfg_on": ("exact", published_guidance),
    r"masking/(\d+)/mask": ("exact", lambda g, i: training_mask(g, i)[0].float()),
    r"masking/(\d+)/p_mask": ("tolerance", lambda g, i: training_mask(g, i)[1]),
    r"lr/(\d+)": ("tolerance", learning_rate),
    r"mar/(npred)/(\d+)": ("exact", lambda g, name, n: mar(g, n, name)),
    r"mar/(cfg_iter)/(\d+)": ("tolerance", lambda g, name, n: mar(g, n, name)),
}


def test_output_follows_its_rule(output, golden):
    matches = [(rule, re.fullmatch(pattern, output)) for pattern, rule in RULES.items()]
    (kind, ours_of), found = next(((r, m) for r, m in matches if m), ((None, None), None))
    assert found is not None, f"{output} has no rule"
    ours, expected = ours_of(golden, *found.groups()), golden.outputs[output]
    assert ours.shape == expected.shape
    if kind == "exact":
        assert torch.equal(ours, expected)
    elif kind == "relative":
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
    elif kind == "mean":
        # A product of up to hundreds of float32 factors, times the number of tokens.
        torch.testing.assert_close(ours, expected, atol=1e-6 * golden.config["seq_len"], rtol=0)
    else:
        torch.testing.assert_close(ours.to(expected.dtype), expected, atol=1e-6, rtol=0)


def test_every_input_is_used(golden):
    known = [
        r"t_grid|p_grid|lr/epoch",
        *(rf"trace/{e['index']}/(u|forced)" for e in golden.config["traces"]),
        *(rf"masking/{e['index']}/(t|u|perm)" for e in golden.config["masking"]),
    ]
    assert not [n for n in golden.inputs if not any(re.fullmatch(k, n) for k in known)]


def test_every_entry_of_the_configuration_is_one_this_test_knows(golden):
    assert set(golden.config["schedules"]) <= set(GAMMAS)
    assert golden.config["eps_mask"] == 1e-3
    assert golden.config["eps_time"] == 1e-5
    known = {
        "schedules",
        "seq_len",
        "step_counts",
        "eps_mask",
        "eps_time",
        "traces",
        "published",
        "masking",
        "lr",
        "mar",
    }
    assert not set(golden.config) - known
