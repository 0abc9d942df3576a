"""Parallel decoding of image tokens as MMaDA and Show-o do it: fixture ``mmada_t2i``.

Every entry of the fixture has a rule in `RULES`; one without a rule fails.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmdiff import rng
from mmdiff.sampling import Canvas, Cfg, Multinomial, decode
from mmdiff.sampling.guidance import without_condition
from mmdiff.sampling.maskgit import MaskRatio
from mmdiff.sampling.selectors import RandomTopK, TopConfidence
from tests.helpers.golden import root_of, rule, tree_of

NAME = "mmada_t2i"

RULES = {
    r"schedule\.[\w.]+": "close",
    r"\w+\.(inputs_per_step|result|attention)": "exact",
}
INPUTS = r"(uncond_)?attention_mask|uncond_input_ids|input_ids\w*|\w+\.u_(gumbel|sample)|schedule\.t|toy\.[UPW]"
TREE = {
    "text_vocab", "codebook_size", "image_tokens", "prefix_length", "uncond_prefix_length", "mask_id", "batch",
    "length", "cases",
}  # fmt: skip
OPTIONS = {"guidance_scale", "timesteps", "temperature", "schedule", "ids"}
METHODS = {"linear": "uniform"}
"""Published name of a schedule -> ours, where they differ."""
TOLERANCE = 2e-4


class Toy:
    """The toy network of the fixture's README as a backbone; it remembers what it was given."""

    def __init__(self, golden: Golden) -> None:
        self.u, self.p, self.w = (golden.inputs[f"toy.{n}"] for n in "UPW")
        self.mask_id = self.null_id = golden.tree["mask_id"]
        self.offset = golden.tree["text_vocab"]
        self.codes = golden.tree["codebook_size"]
        self.seen: list[Tensor] = []

    def forward(self, canvas: Canvas, index: Tensor) -> Tensor:
        x = canvas.tokens
        self.seen.append(x.clone())
        logits = self.u[x] + self.p[: x.shape[1]] + self.w[x].mean(1, keepdim=True)
        codes = logits[..., self.offset : self.offset + self.codes]
        return codes.gather(1, index[..., None].expand(-1, -1, self.codes))


class Golden:
    def __init__(self, config: Any) -> None:
        root = root_of(config, NAME)
        self.tree = tree_of(config, NAME)
        self.inputs = load_file(root / "inputs.safetensors")
        self.outputs = load_file(root / "outputs.safetensors")
        self.runs: dict[str, dict[str, Tensor]] = {}

    def run(self, case: str) -> dict[str, Tensor]:
        if case not in self.runs:
            self.runs[case] = self._run(case, self.tree["cases"][case])
        return self.runs[case]

    def canvas(self, ids: Tensor) -> Canvas:
        """A row per sequence, padding in front as published; the unconditional prompts have the same place."""
        tree, valid = self.tree, self.inputs["attention_mask"].bool()
        start, open_ = tree["prefix_length"] + 1, ids == tree["mask_id"]
        # The published loop keeps the current image part; where it cuts the other prompt short, the first one's tokens
        # follow, and the padding is the other prompt's all the same.
        short = (torch.arange(ids.shape[1]) < tree["uncond_prefix_length"]).expand_as(ids)
        prefix = (torch.arange(ids.shape[1]) < tree["prefix_length"]).expand_as(ids)
        return Canvas(
            tokens=ids.clone(),
            undecided=open_,
            frozen=~open_,
            valid=valid,
            positions=(valid.long().cumsum(1) - 1).clamp_min(0),
            start=start,
            order=torch.full(ids.shape, -1, dtype=torch.int32),
            droppable=prefix,
            null=torch.where(short, self.inputs["uncond_input_ids"], ids),
            null_valid=self.inputs["uncond_attention_mask"].bool(),
        )

    def _run(self, case: str, options: dict[str, Any]) -> dict[str, Tensor]:
        assert set(options) == OPTIONS
        canvas, toy, steps = self.canvas(self.inputs[options["ids"]]), Toy(self), options["timesteps"]
        noise = float(options["temperature"])
        scale = 1 + float(options["guidance_scale"])
        schedule = METHODS.get(options["schedule"], options["schedule"])
        states: list[Tensor] = []
        done = decode(
            toy,
            canvas=canvas,
            schedule=MaskRatio(steps, schedule, tokens=self.tree["image_tokens"]),
            selector=RandomTopK(noise, "compound", passes=steps) if noise else TopConfidence(),
            sampler=Multinomial(1.0),
            guidance=None if scale == 1 else Cfg(scale),
            generators=self.tapes(case, noise),
            callback=lambda step: states.append(step.canvas.tokens.clone()),
        )
        views = [canvas] if scale == 1 else [canvas, without_condition(canvas, toy.null_id)]
        valid = torch.cat([v.valid for v in views])
        first, n = canvas.start, self.tree["image_tokens"]
        return {
            "inputs_per_step": self.published_passes(case, torch.stack([canvas.tokens, *states[:-1]])),
            "result": done.canvas.tokens[:, first : first + n] - toy.offset,
            "attention": valid[:, :, None] & valid[:, None, :],
        }

    def tapes(self, case: str, noise: float) -> list[rng.Tape]:
        """Per row and pass the draws of its open places, in order; a pass that would decide nothing is left out."""
        start, n = self.tree["prefix_length"] + 1, self.tree["image_tokens"]
        image = self.outputs[f"{case}.inputs_per_step"][:, :, start : start + n]
        tapes = []
        for row in range(image.shape[1]):
            draws: list[Tensor] = []
            for step in self.passes(image[:, row]):
                where = image[step, row] == self.tree["mask_id"]
                draws.append(self.inputs[f"{case}.u_sample"][step, row][where])
                u = self.inputs[f"{case}.u_gumbel"][step, row][where]
                draws += [-torch.log((-torch.log(u.clamp_min(1e-20))).clamp_min(1e-20))] if noise else []
            tapes.append(rng.Tape(draws))
        return tapes

    def passes(self, images: Tensor) -> list[int]:
        """Passes of a row that change it: once a single place is open, published code waits for the last."""
        last = len(images) - 1
        return [s for s in range(last) if not torch.equal(images[s], images[s + 1])] + [last]

    def published_passes(self, case: str, states: Tensor) -> Tensor:
        """Our states [pass, B, T], each repeated for the published passes that change nothing."""
        start, n = self.tree["prefix_length"] + 1, self.tree["image_tokens"]
        expected = self.outputs[f"{case}.inputs_per_step"]
        rows = []
        for row in range(expected.shape[1]):
            kept, at, out = self.passes(expected[:, row, start : start + n]), 0, []
            for step in range(len(expected)):
                out.append(states[min(at, len(states) - 1), row])
                at += step in kept
            rows.append(torch.stack(out))
        return torch.stack(rows, 1)


@pytest.fixture(scope="module")
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.config)


def ours(output: str, golden: Golden) -> Tensor:
    case, _, name = output.partition(".")
    if case == "schedule":
        t = golden.inputs["schedule.t"]
        return MaskRatio(1, METHODS.get(name, name)).share(t, golden.tree["image_tokens"])
    return golden.run(case)[name]


def test_output_follows_its_rule(output, golden):
    kind, mine, expected = rule(RULES, output), ours(output, golden), golden.outputs[output]
    assert mine.dtype == expected.dtype
    assert mine.shape == expected.shape
    if kind == "exact":
        assert torch.equal(mine, expected)
    else:
        torch.testing.assert_close(mine, expected, atol=TOLERANCE, rtol=0)


def test_every_input_and_option_is_used(golden):
    assert not [n for n in golden.inputs if not re.fullmatch(INPUTS, n)]
    assert set(golden.tree) == TREE
    ids = {c["ids"] for c in golden.tree["cases"].values()}
    assert {n for n in golden.inputs if n.startswith("input_ids")} == ids
    shape = (golden.tree["batch"], golden.tree["length"])
    assert golden.inputs["input_ids"].shape == golden.inputs["uncond_input_ids"].shape == shape


def test_the_unconditional_branch_reads_its_own_prompt(case, golden):
    """What the published loop does: the empty prompt, then the image as it stands."""
    options = golden.tree["cases"][case]
    if options["guidance_scale"] == 0:
        return
    canvas = golden.canvas(golden.inputs[options["ids"]])
    view, prefix = without_condition(canvas, golden.tree["mask_id"]), golden.tree["uncond_prefix_length"]
    assert torch.equal(view.tokens[:, :prefix], golden.inputs["uncond_input_ids"][:, :prefix])
    assert torch.equal(view.tokens[:, prefix:], canvas.tokens[:, prefix:])
