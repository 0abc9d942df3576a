"""Sampling of eMIGM and MAR with injected draws against the published code: fixture ``emigm_sampling``.

Every output tensor has a rule in `RULES`; one without a rule fails.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.published_emigm import PublishedSampler
from mmdiff import rng
from mmdiff.diffusion.gaussian import Process
from mmdiff.diffusion.guidance import RAMPS, GuidanceSchedule
from mmdiff.diffusion.mask_schedules import GAMMAS
from mmdiff.diffusion.solver import NoiseLevels, orders, outer_times, plan
from mmdiff.models.emigm import EMIGM
from mmdiff.sampling import Cosine, Ddpm, DpmSolver, LatentBackbone, SharedReveal, decode, latent_canvas
from mmdiff.sampling.heads import Conditions
from mmdiff.sampling.orders import permuted

NAME = "emigm_sampling"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    root = Path(metafunc.config.getoption("--fixtures")) / NAME
    if "output" in metafunc.fixturenames:
        metafunc.parametrize("output", sorted(load_file(root / "outputs.safetensors")))


class Golden:
    """The fixture, with the network loaded from a published folder."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((root / "config.json").read_text())
        self.inputs = load_file(root / "inputs.safetensors")
        self.outputs = load_file(root / "outputs.safetensors")
        weights = load_file(root / "weights.safetensors")
        self.model = self._load(weights, self.config["model"], folder / "emigm")
        separate = {**weights, "mask_token": weights["mask_token"].reshape(1, 1, -1)}
        self.mar = self._load(separate, {**self.config["model"], "use_unsup_cfg": False}, folder / "mar")
        self.runs: dict[str, dict[str, Tensor]] = {}

    def _load(self, weights: dict[str, Tensor], options: dict[str, Any], folder: Path) -> EMIGM:
        folder.mkdir()
        save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(options))
        return EMIGM.from_pretrained(folder, dtype=torch.float32)

    def revealing(self, prefix: str) -> list[int]:
        """Steps that reveal something; ours leaves out those that do not, of which MAR has some if tokens are few."""
        noise = (re.fullmatch(rf"{prefix}/step(\d+)/noise", k) for k in self.inputs)
        return sorted(int(m[1]) for m in noise if m and len(self.inputs[m[0]]))


@pytest.fixture(scope="module")
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden(Path(request.config.getoption("--fixtures")) / NAME, tmp_path_factory.mktemp(NAME))


def solver_of(spec: dict[str, Any]) -> DpmSolver | Ddpm:
    steps = int(spec["num_sampling_steps"])
    return DpmSolver(steps) if spec.get("sampling_algo") == "dpm-solver" else Ddpm(steps, float(spec["temperature"]))


def interval_of(spec: dict[str, Any]) -> tuple[float, float]:
    return float(spec["cfg_t_min"]), float(spec["cfg_t_max"])


def head_draws(golden: Golden, at: str) -> list[Tensor]:
    """The head's draws in a step: the start, then the noise of every evaluation but the last, which has no effect.

    The published loop notes that nothing is left when it has drawn for one more step, in which the head does not run.
    """
    if f"{at}/noise" not in golden.inputs:
        return []
    return [golden.inputs[f"{at}/noise"], *golden.inputs.get(f"{at}/step_noise", torch.zeros(1))[:-1]]


def image_draws(golden: Golden, name: str) -> list[Tensor]:
    out: list[Tensor] = []
    for k, u in enumerate(golden.inputs[f"image/{name}/u"]):
        at = f"image/{name}/step{k}"
        perms = sorted((int(key.rpartition("perm")[2]), key) for key in golden.inputs if key.startswith(f"{at}/perm"))
        out += [u, *(golden.inputs[key][None] for _, key in perms)]
        forced = golden.inputs[f"{at}/forced"]
        out += [one[None] for one in forced] if bool((forced >= 0).any()) else []
        out += head_draws(golden, at)
    return out


class Watch:
    """A solver that notes the conditions it is given."""

    def __init__(self, solver: DpmSolver | Ddpm) -> None:
        self.solver, self.seen = solver, []

    def tokens(self, head: Any, conditions: Conditions, noise: Callable[[], Tensor]) -> Tensor:
        self.seen.append(conditions)
        return self.solver.tokens(head, conditions, noise)


def run(golden: Golden, name: str) -> dict[str, Tensor]:
    """An image run or the MAR run, decoded with the recorded draws."""
    if name in golden.runs:
        return golden.runs[name]
    image = name != "mar"
    spec = next(i for i in golden.config["images"] if i["name"] == name) if image else golden.config["mar"]
    prefix = f"image/{name}" if image else name
    model = golden.model if image else golden.mar
    labels = golden.inputs[f"{prefix}/labels"]
    interval = interval_of(spec) if image else (0.0, 1.0)
    guidance = GuidanceSchedule(float(spec["cfg"]), spec["cfg_schedule"], interval, reserve=0 if image else 1)
    steps = spec["num_iter"]
    if image:
        parts: dict[str, Any] = {"selector": SharedReveal(golden.config["model"]["mask_strategy"], steps)}
        draws = image_draws(golden, name)
    else:
        given = golden.inputs["mar/orders"]
        parts = {
            "schedule": Cosine(steps, precision="float64"),
            "selector": permuted(rng.Tape([given]), *given.shape, start=1),
        }
        draws = [d for k in golden.revealing(prefix) for d in head_draws(golden, f"{prefix}/step{k}")]
    watch, states, masks = Watch(solver_of(spec)), [], []
    canvas = latent_canvas(labels, torch.zeros(len(labels), model.config.tokens, model.config.token_channels))
    before = [canvas.copy()]

    def note(step: Any) -> None:
        states.append(before[-1].values[:, 1:])
        masks.append(before[-1].undecided[:, 1:] & ~step.canvas.undecided[:, 1:])
        before.append(step.canvas.copy())

    done = decode(
        LatentBackbone(model),
        canvas=canvas,
        sampler=watch,
        guidance=guidance,
        generators=rng.Tape(draws),
        callback=note,
        **parts,
    )
    assert done.values is not None
    out = {"latent": model.unpatchify(done.values)}
    on = [c.null is not None for c in watch.seen]
    out["cfg_on"] = torch.tensor(on)
    out["cfg_iter"] = torch.tensor([1.0 if c.scale is None else float(c.scale[0]) for c in watch.seen])
    kept = golden.revealing(prefix)
    for i, (k, c) in enumerate(zip(kept, watch.seen, strict=True)):
        out |= {f"step{k}/z": c.given if c.null is None else torch.cat((c.given, c.null))}
        out |= {f"step{k}/tokens_in": states[i], f"step{k}/mask_to_pred": masks[i]}
    if not image and len(kept) < steps:
        out |= {f"step{k}/mask_to_pred": torch.zeros_like(masks[0]) for k in range(steps) if k not in kept}
        known = torch.stack([out[f"step{k}/mask_to_pred"][0].sum() for k in range(steps)]).cumsum(0)
        out["cfg_iter"] = guidance.at(known, model.config.tokens)
    golden.runs[name] = out
    return out


def table(golden: Golden, name: str) -> Tensor:
    levels = NoiseLevels(Process.cosine().betas)
    values = {"betas": Process.cosine().betas, "log_alpha": levels.log_alpha, "t": levels.t}
    return values[name] if name in values else torch.tensor(len(levels.t))


def solver_table(golden: Golden, steps: str, name: str) -> Tensor:
    betas = Process.cosine().betas
    if name == "orders":
        return torch.tensor(orders(int(steps)))
    if name == "times_outer":
        return outer_times(NoiseLevels(betas), int(steps))
    return torch.tensor(
        [getattr(e, {"times_eval": "time", "labels_eval": "label"}[name]) for e in plan(betas, int(steps))]
    )


def respaced(golden: Golden, steps: str, name: str) -> Tensor:
    process = Process.cosine().respaced(int(steps))
    return process.steps if name == "timestep_map" else getattr(process, name)


@torch.no_grad()
def head_only(golden: Golden, solver: DpmSolver | Ddpm, scale: float, draws: list[Tensor]) -> Tensor:
    given, null = golden.inputs["head/z_cond"], golden.inputs["head/z_uncond"]
    weight = torch.full((len(given), 1), scale)
    conditions = Conditions(given) if scale == 1 else Conditions(given, null, weight)
    tape = iter([golden.inputs["head/noise"], *draws])
    return solver.tokens(golden.model.head, conditions, lambda: next(tape))


def head_dpm(golden: Golden, steps: str, kind: str) -> Tensor:
    scale = 1.0 if kind == "nocfg" else float(golden.config["dpm"]["cfg_scale"])
    return head_only(golden, DpmSolver(int(steps)), scale, [])


def head_ddpm(golden: Golden, steps: str) -> Tensor:
    spec = next(d for d in golden.config["ddpm"] if str(d["timestep_respacing"]) == steps)
    noise = list(golden.inputs[f"head/ddpm/{steps}/step_noise"])
    return head_only(golden, Ddpm(int(steps), float(spec["temperature"])), float(spec["cfg"]), noise)


RULES: dict[str, tuple[str, Callable[..., Tensor]]] = {
    r"table/(betas)": ("float64", table),
    r"table/(log_alpha|t)": ("times", table),
    r"table/(total_N)": ("exact", table),
    r"dpm/(\d+)/(orders)": ("exact", solver_table),
    r"dpm/(\d+)/(times_outer|times_eval)": ("times", solver_table),
    r"dpm/(\d+)/(labels_eval)": ("labels", solver_table),
    r"ddpm/(\d+)/(timestep_map)": ("exact", respaced),
    r"ddpm/(\d+)/(\w+)": ("float64", respaced),
    r"head/dpm/(\d+)/(cfg[\d.]+|nocfg)": ("sampled", head_dpm),
    r"head/ddpm/(\d+)": ("sampled", head_ddpm),
    r"image/([^/]+)/(cfg_on)": ("exact", lambda g, name, key: run(g, name)[key]),
    r"image/([^/]+)/(cfg_iter)": ("scale", lambda g, name, key: run(g, name)[key]),
    r"image/([^/]+)/(latent|step\d+/(?:tokens_in|z))": ("sampled", lambda g, name, key: run(g, name)[key]),
    r"mar/(step\d+/mask_to_pred|cfg_on)": ("exact", lambda g, key: run(g, "mar")[key]),
    r"mar/(cfg_iter)": ("scale", lambda g, key: run(g, "mar")[key]),
    r"mar/(latent|step\d+/(?:tokens_in|z))": ("sampled", lambda g, key: run(g, "mar")[key]),
}


def test_output_follows_its_rule(output, golden):
    matches = [(rule, re.fullmatch(pattern, output)) for pattern, rule in RULES.items()]
    (kind, ours_of), found = next(((r, m) for r, m in matches if m), ((None, None), None))
    assert found is not None, f"{output} has no rule"
    ours, expected = ours_of(golden, *found.groups()), golden.outputs[output]
    assert ours.shape == expected.shape
    if kind == "exact":
        assert torch.equal(ours.to(expected.dtype), expected)
    elif kind == "float64":
        torch.testing.assert_close(ours, expected, atol=1e-300, rtol=1e-10)
    elif kind == "sampled":
        assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()
    else:
        atol = {"times": 2e-6, "labels": 2e-3, "scale": 1e-6}[str(kind)]
        torch.testing.assert_close(ours.to(expected.dtype), expected, atol=atol, rtol=0)


def test_revealed_tokens_are_the_published_ones(golden):
    keys = [k for k in golden.inputs if re.fullmatch(r"image/[^/]+/step\d+/mask_to_pred", k)]
    assert keys
    for key in keys:
        _, name, rest = key.split("/", 2)
        expected = golden.inputs[key].bool()
        assert torch.equal(run(golden, name).get(rest, torch.zeros_like(expected)), expected), key


def test_every_input_is_used(golden):
    known = [r"head/(z_cond|z_uncond|noise)"]
    known += [rf"head/ddpm/{d['timestep_respacing']}/step_noise" for d in golden.config["ddpm"]]
    step = r"step\d+/(mask_to_pred|perm\d+|forced|noise|step_noise)"
    known += [rf"image/{re.escape(i['name'])}/(labels|u|{step})" for i in golden.config["images"]]
    known += [r"mar/(labels|orders|step\d+/(noise|step_noise))"]
    assert not [n for n in golden.inputs if not any(re.fullmatch(k, n) for k in known)]


@torch.no_grad()
def test_the_benchmark_s_transcription_of_the_published_loop_is_exact(golden):
    specs = [i for i in golden.config["images"] if i["sampling_algo"] == "dpm-solver"]
    share = GAMMAS[golden.config["model"]["mask_strategy"]].share
    for spec in specs if golden.model.config.drop_masked else []:
        tape = iter(image_draws(golden, spec["name"]))
        draws = {
            "uniform": lambda n, tape=tape: next(tape),
            "permutation": lambda n, tape=tape: next(tape)[0],
            "integer": lambda n, tape=tape: next(tape)[0],
            "normal": lambda *shape, tape=tape: next(tape),
        }
        ramp = RAMPS[spec["cfg_schedule"]]
        tokens = PublishedSampler(golden.model, Process.cosine().betas, share, ramp).sample(
            golden.inputs[f"image/{spec['name']}/labels"],
            spec["num_iter"],
            int(spec["num_sampling_steps"]),
            float(spec["cfg"]),
            *interval_of(spec),
            draws,
        )
        expected = golden.outputs[f"image/{spec['name']}/latent"]
        assert (golden.model.unpatchify(tokens) - expected).abs().max() <= 1e-4 * expected.abs().max()
