"""Losses of mixed batches: only masked positions count, and they count as published."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmdiff import rng
from mmdiff.batch import IGNORE, Batch, Example, collate
from mmdiff.diffusion.objectives import chunked_cross_entropy
from mmdiff.errors import ConfigError
from mmdiff.models import llada, unified, vision
from mmdiff.training.objective import Masked

LANGUAGE = llada.Config(
    vocab_size=37,
    width=32,
    depth=1,
    heads=4,
    kv_heads=4,
    ffn_width=48,
    max_length=64,
    mask_id=3,
    bos_id=0,
    eos_id=1,
    eot_id=2,
)
VISION = vision.Config(image_size=16, patch_size=8, width=24, depth=1, heads=2, ffn_width=32)
MODEL = unified.Unified(
    unified.Config(language=LANGUAGE, vision=VISION, codes=unified.CodesConfig(codebook=10, grid=2)),
    generator=rng.generator(0, "init"),
)


def text(answer: list[int], weights: list[float] | None = None) -> Example:
    ids = torch.tensor([0, 5, 6, *answer])
    labels = torch.tensor([IGNORE] * 3 + answer)
    weight = torch.tensor([0.0] * 3 + (weights or [1.0] * len(answer)))
    return Example(
        key="a", task="vqa", ids=ids, labels=labels, weights=weight, droppable=torch.zeros(len(ids), dtype=torch.bool)
    )


def image(codes: list[int]) -> Example:
    ids = torch.tensor([0, 7, 8, *(37 + c for c in codes)])
    labels = torch.where(ids >= 37, ids, IGNORE)
    droppable = torch.tensor([False, True, True] + [False] * 4)
    return Example(
        key="b", task="text_to_image", ids=ids, labels=labels, weights=(ids >= 37).float(), droppable=droppable
    )


def batch() -> Batch:
    return collate([text([9, 10, 2, 1, 1, 1]), image([1, 2, 3, 4]), text([11, 2]), image([5, 6, 7, 8])])


def by_hand(spec: Masked, b: Batch, seed: int) -> torch.Tensor:
    """The published losses written row by row with full logits, on the same draws."""
    g = rng.generator(seed, "objective")
    t, drop = rng.uniform(g, (4, 2)).unbind(1)
    u = rng.uniform(g, (4, b.ids.shape[1]))
    ids, text_loss, n_text, code_loss = b.ids.clone(), torch.zeros(()), 0, []
    for i in range(4):
        labels = b.labels[i]
        p = (1 - 1e-3) * t[i] + 1e-3
        if "vqa" in b.tasks[i]:
            masked = (u[i] < p) & (labels != IGNORE)
            ids[i, masked] = 3
        else:
            places = (labels != IGNORE).nonzero().flatten()
            count = max(1, int(torch.ceil(torch.cos(torch.pi / 2 * t[i]) * 4)))
            ids[i, places[u[i, places].argsort()[:count]]] = 47
            if drop[i] < spec.drop_prompt:
                ids[i, b.droppable[i]] = 3
    hidden = MODEL.hidden(embeds=MODEL.embed_slots(ids), valid=b.valid)
    for i in range(4):
        if "vqa" in b.tasks[i]:
            p, where = (1 - 1e-3) * t[i] + 1e-3, (ids[i] == 3) & (b.labels[i] != IGNORE)
            loss = F.cross_entropy(MODEL.text_head(hidden[i]), b.labels[i].clamp_min(0), reduction="none")
            text_loss = text_loss + (loss * b.weights[i] / p)[where].sum() / b.weights[i].sum()
            n_text += 1
        else:
            where = ids[i] == 47
            code_loss.append(
                F.cross_entropy(MODEL.code_head(hidden[i, where]), b.labels[i, where] - 37, reduction="none")
            )
    return text_loss / n_text + torch.cat(code_loss).mean()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_loss_and_gradient_equal_the_plain_computation(seed: int) -> None:
    spec = Masked(stratified=False, drop_prompt=0.5, masking="independent")
    expected = by_hand(spec, batch(), seed)
    wanted = torch.autograd.grad(expected, [p for p in MODEL.parameters() if p.requires_grad], allow_unused=True)
    losses = spec(MODEL, batch(), rng.generator(seed, "objective"))
    torch.testing.assert_close(losses.total, expected, atol=1e-5, rtol=1e-5)
    got = torch.autograd.grad(losses.total, [p for p in MODEL.parameters() if p.requires_grad], allow_unused=True)
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_terms_name_every_task_and_count_its_rows() -> None:
    losses = Masked()(MODEL, batch(), rng.generator(0, "objective"))
    assert {task: count for task, (_, count) in losses.terms.items()} == {"vqa": 2, "text_to_image": 2}


def test_a_weight_of_zero_takes_a_slot_out_of_loss_and_normaliser() -> None:
    spec = Masked(stratified=False)
    padded = collate([text([9, 10, 2, 1], [1.0, 1.0, 1.0, 0.0])])
    masked = torch.zeros_like(padded.valid)
    masked[0, 3:] = True
    from mmdiff.diffusion.objectives import token_weights

    weights = token_weights(masked, torch.tensor([0.5]), padded.weights)
    torch.testing.assert_close(weights[0, 3:], torch.tensor([2 / 3, 2 / 3, 2 / 3, 0.0]))
    assert torch.isfinite(spec(MODEL, padded, rng.generator(0, "objective")).total)


def test_chunks_do_not_change_the_loss_or_its_gradient() -> None:
    head = torch.nn.Linear(8, 50)
    hidden = torch.randn(33, 8, generator=rng.generator(0, "h")).requires_grad_()
    labels = torch.randint(0, 50, (33,), generator=rng.generator(0, "y"))
    whole = chunked_cross_entropy(hidden, labels, head)
    parts = chunked_cross_entropy(hidden, labels, head, chunk=5)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(
        torch.autograd.grad(parts.sum(), hidden)[0], torch.autograd.grad(whole.sum(), hidden)[0], atol=1e-6, rtol=1e-5
    )


def test_complementary_copies_learn_every_answer_token_once_and_without_weights() -> None:
    rows = collate([text([9, 10, 2, 1], [1.0] * 4), text([11, 12, 2], [1.0] * 3)])
    spec, generator = Masked(complementary=True, masking="independent"), rng.generator(0, "objective")
    losses = spec(MODEL, rows, generator)
    g = rng.generator(0, "objective")
    t, _ = rng.uniform(g, (2, 2))
    u = rng.uniform(g, rows.ids.shape)
    t = ((t[0] + torch.arange(2) / 2) % 1)[rng.permutation(g, 1, 2)[0]]
    labelled = rows.labels != IGNORE
    first = (u < ((1 - 1e-3) * t + 1e-3)[:, None]) & labelled
    entropies = []
    for masked in (first, labelled & ~first):
        ids = rows.ids.masked_fill(masked, 3)
        hidden = MODEL.hidden(embeds=MODEL.embed_slots(ids), valid=rows.valid)
        entropies.append(F.cross_entropy(MODEL.text_head(hidden[masked]), rows.labels[masked], reduction="none"))
    both = torch.cat(entropies)
    assert len(both) == int(labelled.sum())
    torch.testing.assert_close(losses.total, both.mean(), atol=1e-5, rtol=1e-5)


def test_complementary_masking_is_refused_for_image_codes() -> None:
    with pytest.raises(ConfigError, match="for answers in text"):
        Masked(complementary=True)(MODEL, batch(), rng.generator(0, "objective"))


def test_times_of_a_whole_step_cover_the_unit_interval_evenly() -> None:
    times = Masked().together(MODEL, batch(), 8, rng.generator(0, "together"))["t"]
    assert sorted((times * 8).long().tolist()) == list(range(8))
    assert Masked(stratified=False).together(MODEL, batch(), 8, rng.generator(0, "together")) == {}
