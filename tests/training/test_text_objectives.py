"""Variants of the text objective: reductions, schedules, blocks and certainty."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmdiff import rng
from mmdiff.batch import IGNORE, Batch, Example, collate
from mmdiff.diffusion import masking
from mmdiff.errors import ConfigError
from mmdiff.models.llada import Config, LLaDA
from mmdiff.training.objective import BlockDiffusion, CertaintyForcing, Masked

CONFIG = Config(
    vocab_size=37, width=32, depth=2, heads=4, kv_heads=4, ffn_width=48, max_length=64, mask_id=3, bos_id=0, eos_id=1,
    eot_id=2,
)  # fmt: skip
MODEL = LLaDA(CONFIG, generator=rng.generator(0, "init"))


def example(answer: list[int], task: str = "text") -> Example:
    ids = torch.tensor([0, 5, 6, *answer])
    labels = torch.tensor([IGNORE] * 3 + answer)
    plain = torch.zeros(len(ids), dtype=torch.bool)
    return Example(key="a", task=task, ids=ids, labels=labels, weights=(labels != IGNORE).float(), droppable=plain)


def batch() -> Batch:
    return collate([example([9, 10, 2, 1, 1, 7]), example([11, 2], "short"), example([8, 12, 13, 14])])


def generator() -> torch.Generator:
    return rng.generator(1, "objective")


def noised(b: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Masks, shares and full cross-entropies of `Masked(masking='independent', stratified=False)`."""
    g = generator()
    t, _ = rng.uniform(g, (len(b), 2)).unbind(1)
    u, p = rng.uniform(g, tuple(b.ids.shape)), masking.mask_probability(t)
    masked = masking.independent_mask(p, u, b.labels != IGNORE)
    logits = MODEL(b.ids.masked_fill(masked, 3), valid=b.valid)
    entropy = F.cross_entropy(logits.flatten(0, 1), b.labels.flatten(), ignore_index=IGNORE, reduction="none")
    return masked, p, entropy.view(b.ids.shape)


@pytest.mark.parametrize("reduction", ["answer", "token", "square"])
def test_reductions_weigh_answers_as_they_say(reduction):
    b = batch()
    masked, p, entropy = noised(b)
    lengths = (b.labels != IGNORE).sum(1)
    summed = (entropy * masked / p[:, None]).sum(1)
    weight = lengths**-0.5 / p
    expected = {
        "answer": (summed / lengths).mean(),
        "token": summed.sum() / lengths.sum(),
        "square": (summed * lengths**-0.5).sum() / (masked * weight[:, None]).sum(),
    }[reduction]
    spec = Masked(masking="independent", stratified=False, reduction=reduction)
    torch.testing.assert_close(spec(MODEL, b, generator()).total, expected)


def test_a_schedule_changes_the_masks_but_the_weight_follows():
    """Averaged over many times, the loss of a network that does not look is the same under every schedule."""

    class Blind(torch.nn.Module):
        config = CONFIG
        embed_slots, layout = MODEL.embed_slots, MODEL.layout

        def hidden(self, *, embeds: torch.Tensor, **options: object) -> torch.Tensor:
            return torch.zeros_like(embeds)

        def text_head(self, hidden: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*hidden.shape[:-1], CONFIG.vocab_size)

    b = collate([example([9, 10, 11, 12])] * 512)
    values = {
        name: float(Masked(masking="independent", schedule=name)(Blind(), b, generator()).total)
        for name in ("linear", "cosine", "square", "square-root", "log")
    }
    expected = torch.log(torch.tensor(float(CONFIG.vocab_size)))
    for value in values.values():
        assert value == pytest.approx(float(expected), rel=0.15)


def test_without_the_mask_in_the_softmax_it_gets_no_probability():
    b = batch()
    kept, left_out = (
        Masked(masking="independent", exclude_mask=flag)(MODEL, b, generator()).total for flag in (False, True)
    )
    assert left_out.item() < kept.item()
    MODEL.zero_grad()
    left_out.backward()
    assert MODEL.lm_head.weight.grad is not None
    assert not bool(MODEL.lm_head.weight.grad[3].any())
    MODEL.zero_grad()


def test_one_block_is_masked_diffusion_of_the_whole_row():
    b, g = collate([example([9, 10, 2, 1, 1, 7])] * 2), generator()
    spec = BlockDiffusion(block_length=64)
    t = masking.spread_times(rng.uniform(g, (2, 1))) * 0.999 + 0.001
    masked = (rng.uniform(g, tuple(b.ids.shape)) <= 0.999 * t) & (b.labels != IGNORE)
    logits = MODEL(b.ids.masked_fill(masked, 3))
    entropy = F.cross_entropy(logits.flatten(0, 1), b.ids.flatten(), reduction="none").view(b.ids.shape)
    expected = (entropy * masked / t).sum() / (b.labels != IGNORE).sum()
    torch.testing.assert_close(spec(MODEL, b, generator()).total, expected)


@pytest.mark.parametrize("context", ["block", "causal"])
def test_a_block_does_not_see_the_blocks_after_it(context):
    spec, b = BlockDiffusion(block_length=4, context=context), collate([example([9, 10, 2, 7, 8])])
    masked = torch.zeros_like(b.ids, dtype=torch.bool)
    masked[0, 3] = True
    other = collate([example([9, 10, 20, 21, 22])])
    mine, theirs = (spec._hidden(MODEL, x, masked)[:, 3] for x in (b, other))
    # Slot 3 closes the first block; slots 5 to 7 lie behind it.
    torch.testing.assert_close(mine, theirs)


def test_padding_changes_nothing():
    spec = BlockDiffusion(block_length=2, interval=(0.3, 0.9))
    short, long = example([11, 2]), example([9, 10, 2, 1, 1, 7])
    masked = torch.zeros(2, 9, dtype=torch.bool)
    masked[:, 3] = True
    alone = spec._hidden(MODEL, collate([short]), masked[:1, :5])
    padded = spec._hidden(MODEL, collate([short, long]), masked)
    torch.testing.assert_close(alone[0], padded[0, :5])
    assert bool(spec(MODEL, batch(), generator()).total.isfinite())


def test_blocks_are_for_text_with_answers():
    with pytest.raises(ConfigError, match="no answer"):
        BlockDiffusion()(MODEL, collate([example([])]), generator())
    with pytest.raises(ConfigError, match="interval"):
        BlockDiffusion(interval=(0.8, 0.3))


def test_certainty_adds_the_entropy_of_right_predictions():
    b = collate([example([9, 10, 2, 1, 1, 7])] * 3)
    plain, forced = (CertaintyForcing(block_length=2, weight=w)(MODEL, b, generator()) for w in (0.0, 2.0))
    assert forced.total.item() >= plain.total.item()
    assert set(forced.terms) == {"text"}
    forced.total.backward()
    assert MODEL.lm_head.weight.grad is not None
    MODEL.zero_grad()


def test_certainty_needs_an_answer():
    with pytest.raises(ConfigError, match="no answer"):
        CertaintyForcing()(MODEL, collate([example([])]), generator())
