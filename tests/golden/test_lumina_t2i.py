"""Lumina-DiMOO's parallel decoding with row breaks and its choice of cached slots: fixture ``lumina_t2i``.

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
from mmdiff.images import crop_sizes
from mmdiff.nn.store import LogitStore
from mmdiff.sampling import Canvas, Cfg, Cosine, Greedy, Gumbel, MaxLogit, RandomTopK, decode, layout
from mmdiff.text.lumina import Scripts, SpecialIds
from tests.helpers.golden import root_of, rule, tree_of

NAME = "lumina_t2i"

RULES = {
    r"\w+\.(inputs_per_step|result)": "exact",
    r"\w+\.(refresh|cond_recompute|uncond_recompute)": "exact",
    r"crop_sizes\.\d+_\d+": "exact",
}
INPUTS = r"cond_ids\w*|uncond_text_ids|toy\.[UPW]|\w+\.u\.\d+"
TREE = {
    "text_vocab", "codebook_size", "grid", "mask_id", "newline_id", "boa", "boi", "eoi", "eoa", "code_start", "cases",
    "published",
}  # fmt: skip
OPTIONS = {
    "cfg_scale", "temperature", "timesteps", "use_cache", "ids", "draws", "cache_ratio", "refresh_interval",
    "warmup_ratio",
}  # fmt: skip


class Toy:
    """The toy network of the fixture's README, which sees the real slots of a row only and remembers its calls."""

    layers = 1

    def __init__(self, golden: Golden) -> None:
        self.u, self.p, self.w = (golden.inputs[f"toy.{n}"] for n in "UPW")
        self.mask_id = self.null_id = golden.tree["mask_id"]
        self.codes = golden.tree["codebook_size"]
        self.offset = len(self.u) - self.codes
        self.seen: list[Tensor] = []
        self.computed: list[Tensor | None] = []
        self.valid = torch.empty(0)

    def forward(self, canvas: Canvas, index: Tensor, store: Any = None, compute: Tensor | None = None) -> Tensor:
        self.seen.append(canvas.tokens.clone())
        self.computed.append(compute)
        self.valid = canvas.valid
        logits = torch.zeros(*canvas.tokens.shape, self.codes)
        for row, (tokens, valid) in enumerate(zip(canvas.tokens, canvas.valid, strict=True)):
            x = tokens[valid]
            whole = self.u[x] + self.p[: len(x)] + self.w[x].mean(0)
            logits[row, valid] = whole[:, self.offset :]
        if isinstance(store, LogitStore):
            # It computes everything whatever it is asked for, as the published run's network did.
            store.remember(None, logits.clone())
        return logits.gather(1, index[..., None].expand(-1, -1, self.codes))


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
        """Prompt, then the answer with its row breaks; the unconditional text is shorter and has places of its own."""
        tree, row = self.tree, ids[0].tolist()
        start = tree["code_start"]
        rest: list[int | None] = [None if i == tree["mask_id"] else i for i in row[start:]]
        front = row[row.index(tree["boa"]) : start]
        null = [*self.inputs["uncond_text_ids"][0].tolist(), *front]
        return layout([row[:start]], [rest], mask_id=tree["mask_id"], nulls=[null])

    def draws(self, case: str, options: dict[str, Any]) -> list[Tensor]:
        """What the sampler and the selector ask for in turn: uniform numbers, then Gumbel numbers."""
        out = []
        for i in range(options["draws"]):
            u = self.inputs[f"{case}.u.{i}"][0]
            out.append(u if u.ndim == 2 else -torch.log(-torch.log(u + 1e-20) + 1e-20))
        return out

    def _run(self, case: str, options: dict[str, Any]) -> dict[str, Tensor]:
        assert not set(options) - OPTIONS, "an option without a meaning here"
        canvas, toy, steps = self.canvas(self.inputs[options["ids"]]), Toy(self), options["timesteps"]
        heat, scale = float(options["temperature"]), 1 + float(options["cfg_scale"])
        cache = None
        if options["use_cache"] and scale != 1:  # published code caches only when it is guided
            cache = MaxLogit(
                steps, float(options["cache_ratio"]), options["refresh_interval"], float(options["warmup_ratio"])
            )
        done = decode(
            toy,
            canvas=canvas,
            schedule=Cosine(steps),
            selector=RandomTopK(heat, "constant"),
            sampler=Gumbel(heat, torch.float32) if heat else Greedy(),
            guidance=None if scale == 1 else Cfg(scale),
            cache=cache,
            generators=[rng.Tape(self.draws(case, options))],
        )
        cells = self.cells()
        out = {
            "inputs_per_step": torch.stack([seen[0][canvas.valid[0]] for seen in toy.seen]),
            "result": done.canvas.tokens[:, canvas.start + cells],
        }
        if cache is not None:
            out["refresh"] = torch.tensor([c is None for c in toy.computed])
            names = ("cond_recompute", "uncond_recompute")[: len(toy.valid)]
            for branch, name in enumerate(names):
                out[name] = self.recomputed(toy, branch)
        return out

    def recomputed(self, toy: Toy, branch: int) -> Tensor:
        """Bool [pass, length] over the real slots of a branch."""
        rows = []
        for computed in toy.computed:
            every = torch.ones(toy.valid.shape[1], dtype=torch.bool)
            chosen = every if computed is None else torch.zeros_like(every).scatter(0, computed[branch], True)
            rows.append(chosen[toy.valid[branch]])
        return torch.stack(rows)

    def cells(self) -> Tensor:
        """Places of the codes behind begin-image: rows of the grid, each closed by a newline."""
        height, width = self.tree["grid"]
        return torch.arange(height * (width + 1)).view(height, width + 1)[:, :width].flatten()


@pytest.fixture(scope="module")
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.config)


def ours(output: str, golden: Golden) -> Tensor:
    case, _, name = output.partition(".")
    if case == "crop_sizes":
        patches, side = map(int, name.split("_"))
        return torch.tensor(crop_sizes(patches, side))
    return golden.run(case)[name]


def test_output_follows_its_rule(output, golden):
    assert rule(RULES, output) == "exact"
    mine, expected = ours(output, golden), golden.outputs[output]
    assert mine.dtype == expected.dtype
    assert mine.shape == expected.shape
    assert torch.equal(mine, expected)


def test_every_input_and_option_is_used(golden):
    assert not [n for n in golden.inputs if not re.fullmatch(INPUTS, n)]
    assert set(golden.tree) == TREE
    for case, options in golden.tree["cases"].items():
        assert options["draws"] == len([n for n in golden.inputs if n.startswith(f"{case}.u.")])


def test_sequences_lie_as_ours_do(case, golden):
    """The answer of every sequence: begin, rows with their breaks, end."""
    tree, ids = golden.tree, golden.inputs[golden.tree["cases"][case]["ids"]][0].tolist()
    special = SpecialIds(
        newline=tree["newline_id"], boi=tree["boi"], eoi=tree["eoi"], boa=tree["boa"], eoa=tree["eoa"],
        uncondition=tree["boa"],
    )  # fmt: skip
    height, width = tree["grid"]
    codes = [ids[tree["code_start"] + i] for i in golden.cells().tolist()]
    scripts = Scripts(special)
    begin = ids.index(tree["boa"])
    assert ids[begin:] == [special.boa, *scripts.picture(codes, height, width), special.eoa]
    assert begin + 2 == tree["code_start"]
    assert len(golden.inputs["toy.U"]) - tree["codebook_size"] == tree["text_vocab"]


def test_published_ids_are_the_defaults(golden):
    published, s = golden.tree["published"], SpecialIds()
    assert (s.newline, s.boi, s.eoi, s.uncondition, s.boa, s.eoa) == tuple(
        published[n] for n in ("newline", "boi", "eoi", "uncondition", "answer_start", "answer_end")
    )
    from mmdiff.models.lumina import Config

    c = Config()
    assert (c.language.mask_id, c.code_offset, c.codebook) == tuple(
        published[n] for n in ("mask", "image_offset", "codebook_size")
    )
