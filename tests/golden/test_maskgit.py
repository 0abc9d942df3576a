"""Discrete masked image models, their tokenizers and samplers against the published codes: fixture ``maskgit``.

Every output tensor has a rule in `RULES`; one without a rule fails.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from mmdiff import rng
from mmdiff.io.layouts import LAYOUTS
from mmdiff.models import vqgan
from mmdiff.models.maskgit import MaskGIT
from mmdiff.models.registry import build
from mmdiff.models.vqgan import VQGAN
from mmdiff.sampling import Cfg, RandomTopK, decode, layout
from mmdiff.sampling.maskgit import (
    ClassCodeBackbone,
    ConfidentRedraw,
    Cumulative,
    HaltonCounts,
    MaskRatio,
    PublishedDraw,
    RampedCfg,
    Redraw,
    Rounded,
    Tempered,
    class_canvas,
    halton_multipliers,
)
from mmdiff.sampling.orders import Ordered, halton_order, halton_ranks
from mmdiff.training.masked_codes import MaskedCodes
from tests.helpers import recipe

NAME = "maskgit"
ATOL = 1e-4
PUBLISHED = {
    "taming": vqgan.Config(),
    "llamagen": vqgan.Config(codebook=16384, code_channels=8, normalised=True),
}
"""Sizes of the published tokenizers."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    root = Path(metafunc.config.getoption("--fixtures")) / NAME
    if "output" in metafunc.fixturenames:
        metafunc.parametrize("output", sorted(load_file(root / "outputs.safetensors")))
    if "kind" in metafunc.fixturenames:
        metafunc.parametrize("kind", list(json.loads((root / "config.json").read_text())["published_vq_state_dict"]))


class Golden:
    """The fixture; networks are loaded from checkpoints in the published layouts."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((root / "config.json").read_text())
        self.inputs = load_file(root / "inputs.safetensors")
        self.outputs = load_file(root / "outputs.safetensors")
        self.weights = load_file(root / "weights.safetensors")
        self.folder = folder
        self.loaded: dict[str, Any] = {}
        self.runs: dict[str, dict[str, Tensor]] = {}

    def net(self, version: str) -> MaskGIT:
        if version not in self.loaded:
            state = {k.removeprefix(f"{version}/"): v for k, v in self.weights.items() if k.startswith(f"{version}/")}
            tree = {k: v for k, v in self.config[version].items() if k not in ("batch", "drop", "samples")}
            path = self._write(version, {"model_state_dict": state, "iter": 1}, tree)
            self.loaded[version] = MaskGIT.from_pretrained(path, dtype=torch.float32)
        return self.loaded[version]

    def vq(self, kind: str) -> VQGAN:
        if kind not in self.loaded:
            tree = {k: v for k, v in self.config["vq"][kind].items() if k != "size"}
            layout = LAYOUTS[kind]
            config = layout.read(tree, {})
            ours = build(config, device="meta").state_dict()
            shapes = {str(layout.key_map(config).backward(k)): tuple(v.shape) for k, v in ours.items()}
            state = recipe.tensors(shapes)
            extra = {"taming": {"loss.logvar": torch.zeros(())}, "llamagen": {"quantize.codebook_used": torch.zeros(9)}}
            root = {"taming": "state_dict", "llamagen": "model"}[kind]
            self.loaded[kind] = VQGAN.from_pretrained(self._write(kind, {root: {**state, **extra[kind]}}, tree))
        return self.loaded[kind]

    def _write(self, name: str, content: dict[str, Any], tree: dict[str, Any]) -> Path:
        folder = self.folder / name
        folder.mkdir()
        torch.save(content, folder / "weights.pth")
        (folder / "config.json").write_text(json.dumps(tree))
        return folder / "weights.pth"


@pytest.fixture(scope="module")
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden(Path(request.config.getoption("--fixtures")) / NAME, tmp_path_factory.mktemp(NAME))


def labels_of(golden: Golden, v: str) -> Tensor:
    return golden.inputs[f"{v}/labels"].masked_fill(golden.inputs[f"{v}/drop_label"].bool(), golden.config[v]["nclass"])


def objective(v: str) -> MaskedCodes:
    """The published training of each generation."""
    return MaskedCodes(positions="all", label_smoothing=0.1 if v == "v1" else 0.0)


def masked(golden: Golden, v: str) -> Tensor:
    code = golden.inputs[f"{v}/code"]
    u = golden.inputs[f"{v}/mask_u"].flatten(1)
    return objective(v).mask(golden.inputs[f"{v}/mask_r"], u).view_as(code)


def logits(golden: Golden, v: str) -> Tensor:
    codes = golden.inputs[f"{v}/code"].masked_fill(masked(golden, v), golden.config[v]["codebook_size"])
    return golden.net(v)(codes, labels_of(golden, v))


def train_loss(golden: Golden, v: str) -> Tensor:
    code = golden.inputs[f"{v}/code"].flatten(1)
    return objective(v).loss(golden.net(v), code, labels_of(golden, v), masked(golden, v).flatten(1))


class Gathered(rng.Tape):
    """Draws recorded for all slots, given out for those that a pass asks about."""

    def __init__(self, draws: Iterator[Tensor]) -> None:
        self.draws = draws
        self.index = torch.empty(0)

    def play(self, shape: Any) -> Tensor:
        draw = next(self.draws)
        picked = draw.gather(
            1, self.index.view(*self.index.shape, *[1] * (draw.ndim - 2)).expand(shape[0], shape[1], *draw.shape[2:])
        )
        return picked[..., : shape[-1]] if draw.ndim > 2 else picked


class Watched:
    """A backbone that tells the tape which slots are read."""

    def __init__(self, backbone: Any, tape: Gathered) -> None:
        self.backbone, self.tape = backbone, tape
        self.mask_id, self.null_id, self.offset = backbone.mask_id, backbone.null_id, backbone.offset

    def forward(self, canvas: Any, index: Tensor) -> Tensor:
        # With guidance the canvas holds both branches; draws are made for one.
        self.tape.index = index[: self.rows] - canvas.start
        return self.backbone.forward(canvas, index)

    rows = 0


class Chooser:
    """A sampler that notes what it chose, for all slots."""

    draws_mask = True
    dtype = torch.float32

    def __init__(self, sampler: Any, tape: Gathered, slots: int) -> None:
        self.sampler, self.tape, self.slots = sampler, tape, slots
        self.draws_mask = getattr(sampler, "draws_mask", False)
        self.seen: list[Tensor] = []

    def choose(self, values: Tensor, draw: Any) -> Tensor:
        classes = self.sampler.choose(values, draw)
        full = torch.full((len(classes), self.slots), -1).scatter(1, self.tape.index, classes)
        self.seen.append(full)
        return classes


def decoded(backbone: Any, canvas: Any, draws: list[Tensor], sampler: Any, **parts: Any) -> dict[str, Tensor]:
    """Run with recorded draws; what was drawn, and what was masked after each pass."""
    slots = canvas.tokens.shape[1] - canvas.start
    tape = Gathered(iter(draws))
    watched = Watched(backbone, tape)
    watched.rows = len(canvas)
    chooser, open_ = Chooser(sampler, tape, slots), []
    done = decode(
        watched,
        canvas=canvas,
        sampler=chooser,
        generators=tape,
        callback=lambda step: open_.append(step.canvas.undecided[:, canvas.start :].clone()),
        **parts,
    )
    return {"pred": torch.stack(chooser.seen), "open": torch.stack(open_), "tokens": done.tokens}


def sample(golden: Golden, v: str, q: str) -> dict[str, Tensor]:
    """A published sampling trace."""
    key = f"{v}/sample{q}"
    if key in golden.runs:
        return golden.runs[key]
    spec, net = golden.config[v]["samples"][int(q)], golden.net(v)
    labels, size = golden.inputs[f"{v}/labels"], golden.config[v]["input_size"]
    backbone = ClassCodeBackbone(net)
    b, n = len(labels), size**2
    canvas = class_canvas(backbone, labels, torch.zeros(b, n, dtype=torch.long), torch.ones(b, n, dtype=torch.bool))
    tokens = golden.inputs[f"{key}/token_gumbel"]
    halton = spec.get("sampler") == "halton"
    draws = list(tokens)
    if not halton:
        draws = [d for pair in zip(tokens, golden.inputs[f"{key}/conf_gumbel"], strict=True) for d in pair]
    top_k = spec.get("top_k", -1)
    sampler = PublishedDraw(None if top_k in (-1, None) else top_k)
    parts = halton_parts(golden, key, spec, size) if halton else confidence_parts(v, spec, n, backbone.mask_id)
    out = decoded(backbone, canvas, draws, sampler, **parts)
    open_ = out["open"]
    if len(open_) < len(tokens):  # published traces have a row for every step
        raise AssertionError("the run ended early")
    shape = (len(open_), b, size, size)
    code = out["tokens"].clamp(0, backbone.mask_id - 1).view(b, size, size)
    mask = (~open_ if halton else open_).view(shape)
    golden.runs[key] = {"pred": out["pred"].view(shape), "mask": mask, "code": code}
    return golden.runs[key]


def confidence_parts(v: str, spec: dict[str, Any], tokens: int, mask_id: int) -> dict[str, Any]:
    steps = spec["step"]
    guidance = None if spec["w"] == 0 else RampedCfg(1 + float(spec["w"]))
    assert spec["randomize"] == "linear"
    noise = RandomTopK(float(spec["r_temp"]), anneal="before")
    multipliers = (float(spec["sm_temp"]),) * steps
    if v == "v1":
        schedule: Any = Rounded(steps, spec["sched_mode"])
        return {"schedule": schedule, "selector": Tempered(noise, multipliers), "guidance": guidance}
    schedule = Cumulative(steps, spec["sched_mode"], published=True)
    selector = Tempered(ConfidentRedraw(noise, schedule, tokens), multipliers)
    return {"schedule": schedule, "selector": selector, "guidance": guidance, "editor": Redraw(mask_id)}


def halton_parts(golden: Golden, key: str, spec: dict[str, Any], size: int) -> dict[str, Any]:
    steps = spec["step"]
    roll = golden.inputs.get(f"{key}/roll")
    rolls = [0] if roll is None or not spec["randomize"] else roll.tolist()
    multipliers = halton_multipliers(
        steps, float(spec["sm_temp_min"]), float(spec["sm_temp"]), float(spec["temp_pow"]), spec["temp_warmup"]
    )
    return {
        "schedule": HaltonCounts(steps),
        "selector": Tempered(Ordered(halton_ranks(size, rolls, start=1)), multipliers),
        "editor": Redraw(),
        "guidance": None if spec["w"] == 0 else Cfg(1 + float(spec["w"])),
    }


class Toy:
    """The network of the JAX loop's trace: tables instead of layers; the mask is the last row."""

    offset = 0

    def __init__(self, golden: Golden) -> None:
        self.base, self.pos = golden.inputs["google/base"], golden.inputs["google/pos"]
        self.mask_id = self.null_id = self.base.shape[1]

    def forward(self, canvas: Any, index: Tensor) -> Tensor:
        row = self.base[canvas.tokens.clamp_max(len(self.base) - 1)]
        values = row * 0.5 + row.mean(1, keepdim=True) + self.pos
        return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1])).clone()


def all_slots(start: Tensor) -> Tensor:
    return torch.arange(start.shape[1]).expand(len(start), -1)


def canvas_of(tokens: Tensor, masked: Tensor, toy: Toy) -> Tensor:
    return tokens.masked_fill(masked, toy.mask_id)


def google(golden: Golden, name: str) -> Tensor:
    if name in golden.runs.get("google", {}):
        return golden.runs["google"][name]
    spec = golden.config["google"]
    start = golden.outputs["google/input"]
    toy, steps = Toy(golden), spec["num_iter"]
    rows = [[None if t < 0 else t for t in row] for row in start.tolist()]
    canvas = layout([[]] * len(rows), rows, mask_id=toy.mask_id)
    tokens, noise = golden.inputs["google/token_gumbel"], golden.inputs["google/choice_gumbel"]
    draws = [d for pair in zip(tokens, noise, strict=True) for d in pair]
    out = decoded(
        toy,
        canvas,
        draws,
        PublishedDraw(),
        schedule=MaskRatio(steps),
        selector=RandomTopK(float(spec["choice_temperature"])),
    )
    before = torch.cat((canvas.undecided[None], out["open"][:-1]))
    decided = out["tokens"]
    known = torch.where(before, out["pred"], decided)
    # The published loop masks one token again after the last draw, the least confident one, and looks at it no more.
    final = toy.forward(SimpleNamespace(tokens=canvas_of(known[-1], before[-1], toy)), all_slots(start))
    score = final.log_softmax(-1).gather(-1, known[-1][..., None])[..., 0].masked_fill(~before[-1], math.inf)
    masking = out["open"].clone()
    masking[-1] = score == score.amin(1, keepdim=True)
    unknown = canvas.undecided.sum(1).tolist()
    lens = torch.tensor([MaskRatio(steps).keep(n, steps) for n in unknown], dtype=torch.float32).T[..., None]
    golden.runs["google"] = {
        "sequences": known.transpose(0, 1),
        "masking": masking,
        "mask_len": lens,
        "logits_first": toy.forward(canvas, all_slots(start)),
        "input": torch.where(canvas.undecided, -1, canvas.tokens),
    }
    return golden.runs["google"][name]


def google_schedule(golden: Golden, method: str, total: str) -> Tensor:
    return MaskRatio(1, method).share(torch.linspace(0.05, 1, 20), int(total))


def smoothing(golden: Golden) -> Tensor:
    """Targets, read off the gradient of our loss at uniform logits."""
    labels, classes = torch.tensor([1, 3]), golden.outputs["google/label_smoothing"].shape[1]
    with torch.enable_grad():
        given = torch.zeros(len(labels), classes, requires_grad=True)
        F.cross_entropy(given, labels, label_smoothing=0.1, reduction="sum").backward()
    assert given.grad is not None
    return 1 / classes - given.grad


def tokens_of(golden: Golden, v: str) -> int:
    return golden.config[v]["input_size"] ** 2


def order_cells(size: str) -> Tensor:
    order = halton_order(int(size))
    return torch.stack((order // int(size), order % int(size)), dim=1)


def vq(golden: Golden, kind: str, name: str) -> Tensor:
    net = golden.vq(kind)
    if name == "decoded":
        return net.decode(golden.inputs[f"vq/{kind}/code"])
    image = golden.inputs[f"vq/{kind}/image"]
    if name == "pre_quant":
        return net.features(image)
    codes = net.encode(image)
    return codes if name == "indices" else net.vectors(codes)


RULES: dict[str, tuple[str, Callable[..., Tensor]]] = {
    r"(v\d)/mask": ("exact", masked),
    r"(v\d)/masked_code": (
        "exact",
        lambda g, v: g.inputs[f"{v}/code"].masked_fill(masked(g, v), g.config[v]["codebook_size"]),
    ),
    r"(v\d)/logits": ("tolerance", logits),
    r"(v\d)/train_loss": ("loss", train_loss),
    r"v1/schedule/(\w+)\.(\d+)": (
        "exact",
        lambda g, mode, n: torch.tensor(Rounded(int(n), mode).raw(tokens_of(g, "v1"), int(n))),
    ),
    r"v1/schedule(\d+)/(\w+)/(\d+)": (
        "exact",
        lambda g, size, mode, n: torch.tensor(Rounded(int(n), mode).raw(int(size) ** 2, int(n))),
    ),
    r"v2/schedule/(\w+)\.(\d+)": (
        "exact",
        lambda g, mode, n: torch.tensor(Cumulative(int(n), mode).curve(tokens_of(g, "v2"), int(n))),
    ),
    r"v2/halton_count/(\d+)": (
        "exact",
        lambda g, n: torch.tensor(HaltonCounts(int(n)).curve(tokens_of(g, "v2"), int(n))),
    ),
    r"v2/halton_order/(\d+)": ("exact", lambda g, size: order_cells(size)),
    r"(v\d)/sample(\d+)/(mask|code)": ("exact", lambda g, v, q, name: sample(g, v, q)[name]),
    r"(v\d)/sample(\d+)/(pred)": ("drawn", lambda g, v, q, name: sample(g, v, q)[name]),
    r"google/(input|sequences|masking|mask_len)": ("exact", google),
    r"google/(logits_first)": ("tolerance", google),
    r"google/schedule/([\w.]+)/(\d+)": ("close", google_schedule),
    r"google/label_smoothing": ("close", smoothing),
    r"vq/(\w+)/(indices)": ("exact", vq),
    r"vq/(\w+)/(pre_quant|quant|decoded)": ("tolerance", vq),
}


@torch.no_grad()
def test_output_follows_its_rule(output, golden):
    matches = [(rule, re.fullmatch(pattern, output)) for pattern, rule in RULES.items()]
    (kind, ours_of), found = next(((r, m) for r, m in matches if m), ((None, None), None))
    assert found is not None, f"{output} has no rule"
    ours, expected = ours_of(golden, *found.groups()), golden.outputs[output]
    assert ours.shape == expected.shape
    if kind == "exact":
        assert torch.equal(ours.to(expected.dtype), expected)
    elif kind == "drawn":
        # Published code draws everywhere; draws for slots that cannot change have no effect, and ours are not made.
        made = ours >= 0
        assert torch.equal(ours[made].to(expected.dtype), expected[made])
        assert made.flatten(1).any(1).all()
    else:
        atol = {"tolerance": ATOL, "loss": 1e-5, "close": 1e-6}[str(kind)]
        torch.testing.assert_close(ours.to(expected.dtype), expected, atol=atol, rtol=0)


def test_published_tokenizers_have_our_keys(kind, golden):
    table = golden.config["published_vq_state_dict"][kind]
    config, layout = PUBLISHED[kind], LAYOUTS[kind]
    keys = layout.key_map(config)
    ours = {keys.backward(k): list(v.shape) for k, v in build(config, device="meta").state_dict().items()}
    unused = re.compile("|".join(layout.unused(config)))
    assert ours == {k: s for k, s in dict(table).items() if not unused.fullmatch(k)}
    assert layout.read(layout.write(config), {}) == config


def test_every_input_is_used(golden):
    v = r"v\d/(code|labels|drop_label|mask_r|mask_u|sample\d+/(token_gumbel|conf_gumbel|roll))"
    pattern = rf"{v}|google/(base|pos|token_gumbel|choice_gumbel)|vq/(taming|llamagen)/(image|code)"
    assert not [n for n in golden.inputs if not re.fullmatch(pattern, n)]
    assert math.prod(golden.config["vq"]["taming"]["size"])
    assert SimpleNamespace(**golden.config["google"]).num_iter
