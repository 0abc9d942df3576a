"""eMIGM's network, its head and one training step against the published code: fixture ``emigm_model``.

Every output tensor has a rule in `RULES` or `STEP`; one without a rule fails.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmdiff.diffusion.gaussian import Process
from mmdiff.io.convert import convert
from mmdiff.models.emigm import EMIGM, Known
from mmdiff.nn.posemb import sinusoid
from mmdiff.training.objective import TokenDiffusion
from mmdiff.training.optim import decays

NAME = "emigm_model"
TIED = "published"
"""The case whose weights the tensors under ``tie/`` belong to."""

INPUTS = {
    "latents", "labels", "mask", "p_mask", "drop_u", "diff_t", "diff_noise",
    "head_x", "head_c", "head_t_int", "head_t_frac",
}  # fmt: skip


def read(root: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    config = json.loads((root / "config.json").read_text())
    return config, *(load_file(root / f"{n}.safetensors") for n in ("inputs", "outputs", "weights"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config, _, outputs, _ = read(Path(metafunc.config.getoption("--fixtures")) / NAME)
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", list(config["cases"]))
    if "output" in metafunc.fixturenames:
        step = re.compile(r"[^/]+/(grad|step|ema)/.*")
        metafunc.parametrize("output", sorted(n for n in outputs if not step.fullmatch(n)))


@pytest.fixture(scope="module")
def golden(request: pytest.FixtureRequest) -> tuple[Any, ...]:
    return read(Path(request.config.getoption("--fixtures")) / NAME)


@pytest.fixture(scope="module")
def publish(golden, tmp_path_factory) -> Callable[..., Path]:
    """(case, replaced tensors) -> a training checkpoint as the authors' code writes it, beside its options."""
    config, _, _, weights = golden

    def write(case: str, **replaced: Tensor) -> Path:
        folder = tmp_path_factory.mktemp(case)
        (folder / "config.json").write_text(json.dumps(config["cases"][case]))
        state = {k.removeprefix(f"{case}/"): v for k, v in weights.items() if k.startswith(f"{case}/")} | replaced
        raw = {k: torch.zeros_like(v) for k, v in state.items()}
        tree = {"model": raw, "model_ema": state, "epoch": 3, "args": argparse.Namespace(**config["cases"][case])}
        torch.save(tree, folder / "checkpoint.pth")
        return folder / "checkpoint.pth"

    return write


@pytest.fixture(scope="module")
def model(publish) -> Callable[[str], EMIGM]:
    made: dict[str, EMIGM] = {}

    def load(case: str) -> EMIGM:
        if case not in made:
            made[case] = EMIGM.from_pretrained(publish(case), dtype=torch.float32)
        return made[case]

    return load


def labels_of(model: EMIGM, labels: Tensor, *, drop: bool) -> Tensor:
    return torch.full_like(labels, model.config.classes) if drop else labels


def encoded(model: EMIGM, given: dict[str, Tensor], *, drop: bool) -> Tensor:
    mask = given["mask"].bool()
    return model.encode(
        model.patchify(given["latents"]), mask, labels_of(model, given["labels"], drop=drop), Known.of(mask)
    )


def conditions(model: EMIGM, given: dict[str, Tensor], *, drop: bool, mask: Tensor | None = None) -> Tensor:
    mask = given["mask"].bool() if mask is None else mask
    return model.condition(given["latents"], mask, labels_of(model, given["labels"], drop=drop))


def head(model: EMIGM, given: dict[str, Tensor], time: str) -> Tensor:
    return model.head(given["head_x"], given[time].float(), given["head_c"])


def guided(model: EMIGM, given: dict[str, Tensor], scale: float) -> Tensor:
    """The published call: both halves see the first half of the noisy tokens."""
    half = len(given["head_x"]) // 2
    x = given["head_x"][:half].repeat(2, 1)
    out = model.head(x, given["head_t_int"].float(), given["head_c"])
    noise, rest = out.chunk(2, dim=1)
    conditional, unconditional = noise.chunk(2)
    return torch.cat(((unconditional + scale * (conditional - unconditional)).repeat(2, 1), rest), dim=1)


def losses(model: EMIGM, given: dict[str, Tensor], case: dict[str, Any]) -> dict[str, Tensor]:
    tokens = model.patchify(given["latents"]).flatten(0, 1)
    z = conditions(model, given, drop=False).flatten(0, 1)
    copies = case["diffusion_batch_mul"]
    clean, z = tokens.repeat(copies, 1), z.repeat(copies, 1)
    process = Process.cosine()
    noisy = process.noised(clean, given["diff_t"], given["diff_noise"])
    output = model.head(noisy, given["diff_t"].float(), z)
    mse, vb = process.token_losses(output, clean, noisy, given["diff_t"], given["diff_noise"])
    return {"x_t": noisy, "eval_mse": mse, "eval_vb": vb, "eval_loss": mse + vb}


CLOSE = partial(torch.testing.assert_close, atol=2e-5, rtol=2e-5)
RULES: dict[str, Callable[[EMIGM, dict[str, Tensor], dict[str, Any]], Tensor]] = {
    "tokens": lambda m, g, c: m.patchify(g["latents"]),
    "enc_cond": lambda m, g, c: encoded(m, g, drop=False),
    "enc_uncond": lambda m, g, c: encoded(m, g, drop=True),
    "z_cond": lambda m, g, c: conditions(m, g, drop=False),
    "z_uncond": lambda m, g, c: conditions(m, g, drop=True),
    "z_allmasked": lambda m, g, c: conditions(m, g, drop=False, mask=torch.ones_like(g["mask"], dtype=torch.bool)),
    "time_sinusoid_int": lambda m, g, c: sinusoid(g["head_t_int"].float()),
    "time_sinusoid_frac": lambda m, g, c: sinusoid(g["head_t_frac"]),
    "head_out_int": lambda m, g, c: head(m, g, "head_t_int"),
    "head_out_frac": lambda m, g, c: head(m, g, "head_t_frac"),
    "head_cfg": lambda m, g, c: guided(m, g, c["head_cfg_scale"]),
    "head_dpm": lambda m, g, c: head(m, g, "head_t_frac").chunk(2, dim=1)[0],
    **{n: lambda m, g, c, n=n: losses(m, g, c)[n] for n in ("x_t", "eval_mse", "eval_vb", "eval_loss")},
}
STEP = ("train_loss", "grad_norm")


@torch.no_grad()
def test_output_follows_its_rule(output, golden, model, publish):
    config, inputs, outputs, _ = golden
    case, _, name = output.partition("/")
    if case == "tie":
        assert name in ("z_cond", "z_uncond"), f"{output} has no rule"
        other = EMIGM.from_pretrained(publish(TIED, mask_token=inputs["tie/mask_token"]), dtype=torch.float32)
        given = given_of(inputs, TIED)
        CLOSE(conditions(other, given, drop=name == "z_uncond"), outputs[output])
        return
    if name in STEP:
        return  # checked with the training step
    assert name in RULES, f"{output} has no rule"
    given = given_of(inputs, case)
    ours, expected = RULES[name](model(case), given, config["cases"][case]), outputs[output]
    if name in ("eval_vb", "eval_loss"):
        assert ours.shape == expected.shape
        # Values at the noisiest steps are in the thousands, where float32 has no 5e-5.
        tolerance = torch.where(given["diff_t"] == 0, 1e-3, 5e-5) + 2e-6 * expected.abs()
        assert ((ours - expected).abs() <= tolerance).all()
    elif name.startswith("time_sinusoid"):
        # One unit in the last place of exp(), in which libraries differ, times the timestep.
        t = given["head_t_int" if name.endswith("int") else "head_t_frac"].float()
        assert ((ours - expected).abs() <= 2e-5 + 2e-5 * expected.abs() + t[:, None] * 2**-23).all()
    else:
        CLOSE(ours, expected)


def given_of(inputs: dict[str, Tensor], case: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{case}/"): v for k, v in inputs.items() if k.startswith(f"{case}/")}


def test_every_input_is_used(golden):
    config, inputs, _, _ = golden
    known = {f"{case}/{name}" for case in config["cases"] for name in INPUTS} | {"tie/mask_token"}
    assert not set(inputs) - known


def test_every_case_has_outputs(case, golden):
    assert [n for n in golden[2] if n.startswith(f"{case}/")]


def test_one_training_step(case, golden, publish):
    """Forward with injected draws, backward, clipping, AdamW and the average, as the published trainer does it."""
    config, inputs, outputs, _ = golden
    options, given, spec = config["cases"][case], given_of(inputs, case), config["optimizer"]
    model = EMIGM.from_pretrained(publish(case), dtype=torch.float32).train()
    objective = TokenDiffusion(
        weighted=options["use_weighted_loss"],
        schedule=options["mask_strategy"],
        copies=options["diffusion_batch_mul"],
        drop_label=options["label_drop_prob"],
        t_min=options["clamp_t_min"],
    )
    labels = objective.dropped(given["labels"], given["drop_u"], model.config.classes)
    loss = objective.loss(
        model,
        model.patchify(given["latents"]),
        labels,
        given["mask"].bool(),
        given["p_mask"],
        draws=lambda keep: (given["diff_t"][keep], given["diff_noise"][keep]),
    )
    torch.testing.assert_close(loss.detach(), outputs[f"{case}/train_loss"], atol=5e-5, rtol=1e-6)
    loss.backward()
    parameters = dict(model.named_parameters())
    seen = {f"{case}/train_loss", f"{case}/grad_norm"}
    stored = {k: [n for n in parameters if f"{case}/{k}/{n}" in outputs] for k in ("grad", "step", "ema")}
    assert all(stored.values())
    for name in stored["grad"]:
        parameter, expected = parameters[name], outputs[f"{case}/grad/{name}"]
        assert parameter.grad is not None
        assert (parameter.grad - expected).abs().max() <= 1e-3 * expected.abs().max() + 1e-12, name
    average = {n: p.detach().clone() for n, p in parameters.items()}
    groups = [
        {"params": [p for n, p in parameters.items() if decays(n, p, ("diffloss",))]},
        {"params": [p for n, p in parameters.items() if not decays(n, p, ("diffloss",))], "weight_decay": 0.0},
    ]
    if options["weight_decay_group"] is not None:
        assert [n for n, p in parameters.items() if decays(n, p, ("diffloss",))] == options["weight_decay_group"]
    if options["trainable_parameters_in_order"] is not None:
        assert set(parameters) == set(options["trainable_parameters_in_order"])
    optimizer = torch.optim.AdamW(
        groups, lr=spec["lr"], betas=tuple(spec["betas"]), eps=spec["eps"], weight_decay=spec["weight_decay"]
    )
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), spec["clip_grad_norm"])
    torch.testing.assert_close(norm, outputs[f"{case}/grad_norm"], atol=0, rtol=2e-4)
    optimizer.step()
    for name, parameter in parameters.items():
        average[name].lerp_(parameter.detach(), 1 - spec["ema_rate"])
        for kind, ours in (("step", parameter.detach()), ("ema", average[name])):
            if name not in stored[kind]:
                continue
            off = (ours - outputs[f"{case}/{kind}/{name}"]).abs()
            assert off.max() <= 2 * spec["lr"], (kind, name)
            assert (off > 2e-5).float().mean() <= 1e-3 or (off > 2e-5).sum() <= 1, (kind, name)
    seen |= {f"{case}/{kind}/{name}" for kind, names in stored.items() for name in names}
    left = {n for n in outputs if n.startswith(f"{case}/") and n.partition("/")[2] not in RULES} - seen
    assert not left


def test_rows_of_different_counts_agree_with_the_rows_alone(case, golden, model):
    _, inputs, _, _ = golden
    given, net = given_of(inputs, case), model(case)
    tokens = net.patchify(given["latents"])
    n = tokens.shape[1]
    counts = torch.linspace(0, n, len(tokens)).round().long()
    mask = torch.rand(len(tokens), n, generator=torch.Generator().manual_seed(0)).argsort(1) < counts[:, None]
    with torch.inference_mode():
        together = net.condition(tokens, mask, given["labels"])
        asked = mask.byte().argsort(dim=1, descending=True, stable=True)[:, : (n + 1) // 2]
        part = net.condition(tokens, mask, given["labels"], index=asked)
        for row in range(len(tokens)):
            alone = net.condition(tokens[row][None], mask[row][None], given["labels"][row][None])
            CLOSE(together[row], alone[0])
            CLOSE(part[row], alone[0][asked[row]])


def test_other_files_of_the_same_network_load_the_same(case, golden, model, publish, tmp_path):
    """Our layout, the published one written back, and a bare state dict."""
    path = publish(case)
    convert(path.parent / "checkpoint.pth", tmp_path / "state.safetensors", root="model_ema")
    (tmp_path / "published").mkdir()
    save_file(load_file(tmp_path / "state.safetensors"), tmp_path / "published" / "model.safetensors")
    (tmp_path / "published" / "config.json").write_text((path.parent / "config.json").read_text())
    convert(tmp_path / "published", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    first, back = (load_file(tmp_path / n / "model.safetensors") for n in ("published", "back"))
    assert first.keys() == back.keys()
    assert all(torch.equal(first[k], back[k]) for k in first)
    for folder in ("published", "ours", "back"):
        other = EMIGM.from_pretrained(tmp_path / folder, dtype=torch.float32).state_dict()
        assert all(torch.equal(v, other[k]) for k, v in model(case).state_dict().items())
