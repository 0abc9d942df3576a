"""Packed rows and token budgets: the same hidden states, losses and batches, with less padding."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.loader import DataConfig, Loader, open_loader
from data_pipelines.pack import write_shards
from data_pipelines.packing import TokenBudget, first_fit, pack
from mmdiff import rng
from mmdiff.batch import Batch, Layout
from mmdiff.config import parse
from mmdiff.errors import ConfigError
from mmdiff.models import llada, llada_v, vision
from mmdiff.nn.masks import document_mask
from mmdiff.text import Tokenizer
from mmdiff.training.microbatch import split
from mmdiff.training.objective import Masked

from .conftest import png

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)
TASKS = [{"type": "text", "fields": ["caption"]}, {"type": "vqa"}, {"type": "chat"}]


@given(LENGTHS, st.integers(1, 60))
def test_every_sample_is_in_one_row_and_no_row_is_too_long(lengths: list[int], capacity: int) -> None:
    rows = first_fit(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for row in rows:
        assert len(row) == 1 or sum(lengths[i] for i in row) <= capacity
    if max(lengths) <= capacity:
        # First-fit decreasing: no two rows could be one.
        sizes = sorted(sum(lengths[i] for i in row) for row in rows)
        assert len(sizes) < 2 or sizes[0] + sizes[1] > capacity


def test_rows_of_no_capacity_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        first_fit([1], 0)


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Samples of very different lengths, a few of them with two pictures."""
    rows = []
    for i in range(48):
        words = " ".join(["thing"] * (1 + i * 7 % 23))
        turns = [{"from": "human", "value": "<image>" * (i % 3) + "what?"}, {"from": "gpt", "value": words}]
        info = {"caption": words, "qa": [["what?", words, "x"]], "conversations": turns}
        rows.append((f"{i:03d}", {"png": png(i), "image2.png": png(i + 50), "json": json.dumps(info).encode()}))
    write_shards(rows, tmp_path / "s", "s", 13)
    return str(tmp_path / "s")


def data(shards: str, **fields: Any) -> DataConfig:
    source = {"shards": [shards], "tasks": TASKS}
    return parse(DataConfig, {"sources": [source], "batch_size": 12, "max_skip_fraction": 1, **fields}, "test")


def model_of(kind: str, tokenizer: Tokenizer) -> Any:
    language = llada.Config(
        vocab_size=tokenizer.vocab_size,
        width=32,
        depth=2,
        heads=2,
        kv_heads=1,
        ffn_width=48,
        max_length=512,
        mask_id=tokenizer.mask_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        eot_id=tokenizer.eot_id,
    )
    if kind == "llada":
        return llada.LLaDA(language, generator=rng.generator(0))
    tower = vision.Config(image_size=16, patch_size=8, width=16, depth=1, heads=2, ffn_width=32)
    config = llada_v.Config(
        language=language, vision=tower, tiling=None if kind == "squares" else llada_v.Tiling(limit=4)
    )
    return llada_v.LLaDAV(config, generator=rng.generator(0))


def first_batch(shards: str, tokenizer: Tokenizer, model: Any, kind: str) -> Batch:
    options = data(shards)
    if kind == "llada":
        options = dataclasses.replace(
            options, sources=(dataclasses.replace(options.sources[0], tasks=options.sources[0].tasks[:1]),)
        )
    return open_loader(options, tokenizer, model.layout(), seed=0).batch_at(0)


def images(batch: Batch) -> Any:
    return [image for row in batch.images for image in row] if batch.images else batch.pixels


@pytest.mark.parametrize("kind", ["llada", "squares", "tiles"])
@pytest.mark.parametrize("capacity", [1, 60, 400])
def test_packed_rows_have_the_hidden_states_and_logits_of_their_samples(
    shards: str, tokenizer: Tokenizer, kind: str, capacity: int
) -> None:
    model = model_of(kind, tokenizer)
    batch = first_batch(shards, tokenizer, model, kind)
    packing = pack(batch, capacity).packing
    assert packing is not None
    embeds = model.embed_slots(batch.ids, images(batch))
    plain = model.hidden(embeds=embeds, valid=batch.valid)
    rows = packing.layout(batch.ids.shape[1])
    hidden = model.hidden(embeds=rows.gather(embeds), attend=document_mask(rows.segments), positions=rows.positions)
    back = rows.scatter(hidden, *batch.ids.shape)
    assert torch.equal(back[~batch.valid], torch.zeros_like(back[~batch.valid]))
    torch.testing.assert_close(back[batch.valid], plain[batch.valid], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        model.text_head(back)[batch.valid], model.text_head(plain)[batch.valid], rtol=1e-5, atol=1e-5
    )
    assert rows.place.shape[0] == (len(batch) if capacity == 1 else len(packing.rows))
    if capacity == 400:
        assert len(packing.rows) < len(batch)
        assert packing.share > float(batch.valid.float().mean())


@pytest.mark.parametrize("kind", ["llada", "squares", "tiles"])
@pytest.mark.parametrize("complementary", [False, True])
def test_losses_and_gradients_are_those_of_the_samples_by_themselves(
    shards: str, tokenizer: Tokenizer, kind: str, complementary: bool
) -> None:
    model = model_of(kind, tokenizer)
    batch = first_batch(shards, tokenizer, model, kind)
    found = []
    for either in (batch, pack(batch, 300)):
        losses = Masked(complementary=complementary)(model, either, rng.generator(0, "noise"))
        model.zero_grad()
        losses.total.backward()
        found.append((losses, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (plain, slopes), (packed, packed_slopes) = found
    torch.testing.assert_close(packed.total, plain.total, rtol=1e-5, atol=1e-5)
    assert packed.terms.keys() == plain.terms.keys()
    for name, (total, count) in plain.terms.items():
        torch.testing.assert_close(packed.terms[name][0], total, rtol=1e-5, atol=1e-5)
        assert packed.terms[name][1] == count
    torch.testing.assert_close(packed_slopes, slopes, rtol=1e-4, atol=1e-5)


def test_parts_of_a_packed_batch_are_packed_parts(shards: str, tokenizer: Tokenizer) -> None:
    model = model_of("squares", tokenizer)
    batch = pack(first_batch(shards, tokenizer, model, "squares"), 200)
    parts = split(batch, 3)
    assert [len(p.packing.lengths) for p in parts if p.packing is not None] == [len(p) for p in parts]
    for part in parts:
        assert part.packing is not None
        assert list(part.packing.lengths) == part.valid.sum(1).tolist()
        assert sorted(i for row in part.packing.rows for i in row) == list(range(len(part)))


def take(loader: Loader, count: int) -> list[Batch]:
    batches = iter(loader)
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("pack_length", [None, 200])
def test_a_budget_takes_as_many_samples_as_fit(
    shards: str, tokenizer: Tokenizer, layout: Layout, pack_length: int | None
) -> None:
    options = data(shards, batch_size=40, max_tokens=700, multiple=2, pack_length=pack_length)
    batches = take(open_loader(options, tokenizer, layout, seed=0), 12)
    lengths = [b.valid.sum(1).tolist() for b in batches]

    def cost(row: list[int]) -> int:
        return sum(row) if pack_length else len(row) * max(row)

    assert all(len(row) % 2 == 0 and cost(row) <= 700 for row in lengths)
    for row, after in itertools.pairwise(lengths):
        assert cost(row + after[:2]) > 700  # two more would not have fitted
    assert len({len(row) for row in lengths}) > 1
    everything = [k for b in take(open_loader(data(shards), tokenizer, layout, seed=0), 30) for k in b.keys]
    keys = [k for b in batches for k in b.keys]
    assert keys == everything[: len(keys)]
    assert (batches[0].packing is not None) == (pack_length is not None)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("pack_length", [None, 200])
def test_budgeted_batches_are_the_same_for_any_ranks_and_workers_and_resume_exactly(
    shards: str, tokenizer: Tokenizer, layout: Layout, pack_length: int | None
) -> None:
    options = data(shards, batch_size=40, max_tokens=700, multiple=2, pack_length=pack_length, start_method="fork")
    whole = [b.keys for b in take(open_loader(options, tokenizer, layout, seed=3), 8)]
    for world, workers in itertools.product((1, 2), (0, 1, 3)):
        worked = dataclasses.replace(options, workers=workers)
        ranks = [take(open_loader(worked, tokenizer, layout, seed=3, rank=r, world=world), 8) for r in range(world)]
        assert [tuple(k for b in parts for k in b.keys) for parts in zip(*ranks, strict=True)] == whole
    state = open_loader(options, tokenizer, layout, seed=3).state_dict()
    resumed: list[tuple[str, ...]] = []
    for workers, count in ((0, 2), (3, 3), (1, 3)):
        loader = open_loader(dataclasses.replace(options, workers=workers), tokenizer, layout, seed=3)
        loader.load_state_dict(json.loads(json.dumps(state)))
        resumed += [b.keys for b in take(loader, count)]
        state = loader.state_dict()
    assert resumed == whole
    assert state["position"] == sum(map(len, whole))


def test_a_budgeted_batch_begins_anywhere_without_what_came_before(
    shards: str, tokenizer: Tokenizer, layout: Layout
) -> None:
    options = data(shards, batch_size=40, max_tokens=700, multiple=2)
    read = {}
    for position in (0, 10**6, 10**9):
        loader = open_loader(options, tokenizer, layout, seed=0)
        loader.load_state_dict({"position": position, "plan_hash": loader.plan.hash})
        loader.batch_at(position)
        assert loader._ruler is not None
        read[position] = len(loader._ruler._known)
    assert max(read.values()) <= 41


def test_undecodable_pictures_do_not_move_the_bounds_of_batches(
    tmp_path: Path, tokenizer: Tokenizer, layout: Layout
) -> None:
    def rows(bad: set[int]) -> Any:
        for i in range(60):
            info = {"caption": " ".join(["thing"] * (1 + i * 7 % 23))}
            yield f"{i:03d}", {"png": b"junk" if i in bad else png(i), "json": json.dumps(info).encode()}

    found = {}
    for name, bad in (("good", set[int]()), ("bad", set(range(0, 60, 7)))):
        write_shards(rows(bad), tmp_path / name, "s", 60)
        source = {"shards": [str(tmp_path / name)], "tasks": [{"type": "caption"}]}
        options = {"sources": [source], "batch_size": 40, "max_tokens": 700, "multiple": 2, "max_skip_fraction": 1}
        loaders = [
            open_loader(parse(DataConfig, options, "x"), tokenizer, layout, seed=0, rank=r, world=w)
            for r, w in ((0, 1), (0, 2), (1, 2))
        ]
        batches = [take(loader, 8) for loader in loaders]
        assert all(a.keys == b.keys + c.keys for a, b, c in zip(*batches, strict=True))
        found[name] = (loaders[0].position, [b.valid.sum(1) for b in batches[0]], loaders[0].skipped)
    # The plans differ, as the shards do; what must hold is that no replacement is longer than what was measured.
    assert found["good"][2] == {}
    assert found["bad"][2]["undecodable_image"] > 5
    assert all(int(row.max()) * len(row) <= 700 for _, rows_, _ in found.values() for row in rows_)


def test_a_measured_length_is_the_length_of_the_example(shards: str, tokenizer: Tokenizer) -> None:
    for kind in ("squares", "tiles"):
        model = model_of(kind, tokenizer)
        loader = open_loader(
            data(shards, max_tokens=10**6, batch_size=48, multiple=48), tokenizer, model.layout(), seed=0
        )
        assert loader._ruler is not None
        lengths = loader._ruler.lengths(0)
        assert lengths == loader.batch_at(0).valid.sum(1).tolist()
        assert len(set(lengths)) > 5


def test_sample_of_a_batch_are_at_least_its_multiple() -> None:
    budget = TokenBudget(tokens=10, multiple=4, most=9, packed=True)
    assert [budget.whole(n) for n in (0, 3, 4, 7, 8, 9)] == [4, 4, 4, 4, 8, 8]
    assert budget.fits(9, 10, 9)
    assert not budget.fits(10, 10, 1)
    assert not budget.fits(2, 11, 9)


def test_budgets_that_cannot_work_are_refused(shards: str, tokenizer: Tokenizer, layout: Layout) -> None:
    opened: Callable[..., Loader] = lambda **f: open_loader(data(shards, **f), tokenizer, layout, seed=0)  # noqa: E731
    with pytest.raises(ConfigError, match=r"data\.multiple is 13"):
        opened(max_tokens=100, multiple=13)
    with pytest.raises(ConfigError, match=r"data\.fill"):
        opened(max_tokens=100, fill=True)
    with pytest.raises(ConfigError, match=r"data\.fill"):
        opened(pack_length=100, fill=True)
    with pytest.raises(ConfigError, match=r"data\.multiple is 3, rank 0 of 2"):
        open_loader(data(shards, max_tokens=100, multiple=3), tokenizer, layout, seed=0, world=2)
