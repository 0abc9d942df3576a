"""Guided image codes with and without the max-logit cache on a real network: fixture ``mlcache``.

Every entry of the fixture has a rule in `RULES`; one without a rule fails.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmdiff import rng
from mmdiff.models.lumina import Lumina
from mmdiff.sampling import Canvas, Cfg, CodeBackbone, Cosine, Greedy, Gumbel, MaxLogit, RandomTopK, decode, layout
from mmdiff.text.lumina import Scripts
from tests.helpers.golden import root_of, rule, tree_of

NAME = "mlcache"

RULES = {
    r"\w+\.(codes|masked|refresh|cond_query|uncond_query)": "exact",
    r"\w+\.cond_compute\.\d+": "exact",
}
INPUTS = r"\w+\.(token|rank)_uniform\.\d+"
LAYOUT = {"text", "uncond", "grid", "newline_id", "special", "codebook", "text_vocab"}
OPTIONS = {
    "timesteps", "temperature", "cfg_scale", "use_cache", "cache_ratio", "refresh_interval", "warmup_ratio", "seed",
    "codebook_size", "text_vocab_size", "query_tokens",
}  # fmt: skip


class Spy(CodeBackbone):
    """Remembers how many codes were masked, and which slots were computed."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.masked: list[int] = []
        self.computed: list[Tensor | None] = []
        self.valid = torch.empty(0)

    def forward(self, canvas: Canvas, index: Tensor, store: Any = None, compute: Tensor | None = None) -> Tensor:
        self.masked.append(int((canvas.tokens[0] == self.mask_id).sum()))
        self.computed.append(compute)
        self.valid = canvas.valid
        return super().forward(canvas, index, store, compute)


class Golden:
    def __init__(self, config: Any, folder: Path) -> None:
        root = root_of(config, NAME)
        self.tree = tree_of(config, NAME)
        self.inputs = load_file(root / "inputs.safetensors")
        self.outputs = load_file(root / "outputs.safetensors")
        self.model = Lumina.from_pretrained(self._publish(folder, root / "weights.safetensors"))
        self.runs: dict[str, dict[str, Tensor]] = {}

    def _publish(self, folder: Path, weights: Path) -> Path:
        shape = self.tree["layout"]
        boa, boi, eoi, eoa = shape["special"]
        ids = {"newline": shape["newline_id"], "boa": boa, "boi": boi, "eoi": eoi, "eoa": eoa, "uncondition": boa}
        more = {"code_offset": shape["text_vocab"], "codebook_size": shape["codebook"], "image_grid": shape["grid"]}
        tree = {**self.tree["model"], **more, "special_ids": ids, "model_type": "lumina_dimoo"}
        (folder / "config.json").write_text(json.dumps(tree))
        shutil.copy(weights, folder / "model.safetensors")
        return folder

    def run(self, case: str) -> dict[str, Tensor]:
        if case not in self.runs:
            self.runs[case] = self._run(case, self.tree["cases"][case])
        return self.runs[case]

    def canvas(self) -> Canvas:
        shape, special = self.tree["layout"], self.model.config.special
        front, side = [special.boa, special.boi], shape["grid"]
        mask = self.model.config.language.mask_id
        body = Scripts(special).picture([mask] * side**2, side, side)[1:]
        slots: list[int | None] = [None if i == mask else i for i in [*body, special.eoa]]
        assert len(shape["text"]) + len(front) == self.tree["code_start"]
        return layout([[*shape["text"], *front]], [slots], mask_id=mask, nulls=[[*shape["uncond"], *front]])

    def _run(self, case: str, options: dict[str, Any]) -> dict[str, Tensor]:
        assert not set(options) - OPTIONS, "an option without a meaning here"
        steps, heat, scale = options["timesteps"], float(options["temperature"]), 1 + float(options["cfg_scale"])
        cache, spy = None, Spy(self.model)
        if options["use_cache"] and scale != 1:
            cache = MaxLogit(
                steps, float(options["cache_ratio"]), options["refresh_interval"], float(options["warmup_ratio"])
            )
        done = decode(
            spy,
            canvas=self.canvas(),
            schedule=Cosine(steps),
            selector=RandomTopK(heat, "constant"),
            sampler=Gumbel(heat, torch.float32) if heat else Greedy(),
            guidance=None if scale == 1 else Cfg(scale),
            cache=cache,
            generators=[rng.Tape(self.draws(case, steps, heat))],
        )
        side = self.tree["layout"]["grid"]
        cells = (torch.arange(side)[:, None] * (side + 1) + torch.arange(side)).flatten()
        chosen = [self.chosen(spy, c) for c in spy.computed]
        out = {
            "codes": done.tokens[:, cells],
            "masked": torch.tensor(spy.masked),
            "refresh": torch.tensor([c is None for c in spy.computed]),
            "cond_query": torch.tensor([int(c[0].sum()) for c in chosen]),
            "uncond_query": torch.tensor([int(c[1].sum()) for c in chosen if len(c) > 1], dtype=torch.long),
        }
        return out | {f"cond_compute.{i}": c[0][None] for i, c in enumerate(chosen) if spy.computed[i] is not None}

    def chosen(self, spy: Spy, computed: Tensor | None) -> list[Tensor]:
        """Per branch, bool over its real slots."""
        rows = []
        for branch, valid in enumerate(spy.valid):
            every = torch.ones_like(valid)
            rows.append(
                (every if computed is None else torch.zeros_like(every).scatter(0, computed[branch], True))[valid]
            )
        return rows

    def draws(self, case: str, steps: int, heat: float) -> list[Tensor]:
        """What sampler and selector ask for in turn."""
        out = []
        for i in range(steps):
            if heat and f"{case}.token_uniform.{i}" in self.inputs:
                out.append(self.inputs[f"{case}.token_uniform.{i}"][0])
            if f"{case}.rank_uniform.{i}" in self.inputs:
                out.append(-torch.log(-torch.log(self.inputs[f"{case}.rank_uniform.{i}"][0] + 1e-20) + 1e-20))
        return out


@pytest.fixture(scope="module")
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden(request.config, tmp_path_factory.mktemp(NAME))


def test_output_follows_its_rule(output, golden):
    assert rule(RULES, output) == "exact"
    case, _, name = output.partition(".")
    mine, expected = golden.run(case)[name], golden.outputs[output]
    assert mine.shape == expected.shape
    assert torch.equal(mine.to(expected.dtype), expected)


def test_every_input_and_option_is_used(golden):
    assert not [n for n in golden.inputs if not re.fullmatch(INPUTS, n)]
    assert set(golden.tree) == {"model", "layout", "cases", "code_start"}
    assert set(golden.tree["layout"]) == LAYOUT


def test_the_measured_number_of_computed_slots_is_ours(case, golden):
    options = golden.tree["cases"][case]
    assert int(golden.run(case)["cond_query"].sum()) == options["query_tokens"]
    shape = golden.tree["layout"]
    assert (options["codebook_size"], options["text_vocab_size"]) == (shape["codebook"], shape["text_vocab"])
