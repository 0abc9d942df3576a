"""The backbone: padding, subsets of slots, masks, initialisation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdiff import rng
from mmdiff.errors import ConfigError
from mmdiff.models.llada import Config, LLaDA
from mmdiff.nn.store import Store

TINY = Config(
    vocab_size=37,
    width=32,
    depth=2,
    heads=4,
    kv_heads=2,
    ffn_width=48,
    max_length=64,
    mask_id=3,
    bos_id=0,
    eos_id=1,
    eot_id=2,
)


@pytest.fixture(scope="module")
def model() -> LLaDA:
    return LLaDA(TINY, generator=rng.generator(0, "init")).eval()


def ids(batch: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(0, 37, (batch, length), generator=rng.generator(1, "ids"))


@torch.no_grad()
def test_embeddings_give_the_same_logits_as_ids(model: LLaDA) -> None:
    x = ids()
    torch.testing.assert_close(model(embeds=model.embed_tokens(x)), model(x))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_real_positions(model: LLaDA, side: str) -> None:
    x, pad = ids(1), torch.full((1, 5), 9)
    padded = torch.cat((pad, x) if side == "left" else (x, pad), dim=1)
    real = torch.cat(
        (torch.zeros(1, 5), torch.ones(1, 11)) if side == "left" else (torch.ones(1, 11), torch.zeros(1, 5)), 1
    )
    out = model(padded, valid=real.bool())
    torch.testing.assert_close(out[real.bool()], model(x)[0], atol=1e-5, rtol=1e-5)
    assert (model(padded)[real.bool()] - model(x)[0]).abs().max() > 1e-3, "without the mask padding must be visible"


@torch.no_grad()
@settings(max_examples=20, deadline=None)
@given(st.sets(st.integers(0, 10), min_size=1, max_size=11))
def test_recomputing_any_subset_against_a_full_store_gives_the_full_logits(chosen: set[int]) -> None:
    model = LLaDA(TINY, generator=rng.generator(0, "init")).eval()
    x = ids()
    store = Store(TINY.depth, 2, 11)
    full = model(x, store=store)
    torch.testing.assert_close(full, model(x), atol=1e-5, rtol=1e-5)
    index = torch.tensor(sorted(chosen)).expand(2, -1)
    part = model(x, store=store, index=index)
    torch.testing.assert_close(part, full.gather(1, index[..., None].expand(-1, -1, 37)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_head_index_returns_the_named_slots_with_and_without_a_store(model: LLaDA) -> None:
    x, want = ids(), torch.tensor([[7, 2], [0, 10]])
    full = model(x).gather(1, want[..., None].expand(-1, -1, 37))
    torch.testing.assert_close(model(x, head_index=want), full, atol=1e-6, rtol=1e-5)
    store, index = Store(TINY.depth, 2, 11), torch.tensor([[7, 2, 5], [10, 3, 0]])
    model(x, store=store)
    torch.testing.assert_close(model(x, store=store, index=index, head_index=want), full, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_slots_that_were_never_written_are_not_attended(model: LLaDA) -> None:
    x, first = ids(), torch.arange(6).expand(2, -1)
    store = Store(TINY.depth, 2, 11)
    torch.testing.assert_close(model(x, store=store, index=first), model(x[:, :6]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_block_causal_mask_hides_later_blocks(model: LLaDA) -> None:
    x = ids()
    block = torch.arange(11) // 4
    attend = block[None, :, None] >= block[None, None, :]
    torch.testing.assert_close(model(x, attend=attend)[:, :4], model(x[:, :4]), atol=1e-5, rtol=1e-5)


def test_attention_is_bidirectional_and_logits_are_not_shifted(model: LLaDA) -> None:
    embeds = model.embed_tokens(ids()).detach().requires_grad_()
    model(embeds=embeds)[:, 0].sum().backward()
    assert embeds.grad is not None
    assert (embeds.grad.abs().sum(-1) > 0).all()


def test_initial_weights_follow_the_published_rule() -> None:
    config = Config(
        width=256, heads=4, kv_heads=4, ffn_width=512, depth=3, vocab_size=512, mask_id=3, bos_id=0, eos_id=1, eot_id=2
    )
    model = LLaDA(config, generator=rng.generator(0, "init"))
    truncated = 0.9866  # standard deviation of a unit normal cut at 3
    for i, block in enumerate(model.layers):
        assert block.self_attn.q_proj.weight.std().item() == pytest.approx(truncated / 16, rel=0.02)
        expected = truncated * 512**-0.5 / (2 * (i + 1)) ** 0.5
        assert block.mlp.down_proj.weight.std().item() == pytest.approx(expected, rel=0.02)


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second, other = (LLaDA(TINY, generator=rng.generator(s, "init")).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 30}, "multiple of heads"),
        ({"kv_heads": 3}, "kv_heads"),
        ({"mask_id": 37}, "outside the vocabulary"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, int], words: str) -> None:
    import dataclasses

    with pytest.raises((ConfigError, ValueError), match=words):
        dataclasses.replace(TINY, **change)


def test_ids_and_embeds_together_and_index_alone_are_refused(model: LLaDA) -> None:
    with pytest.raises(ConfigError, match="exactly one"):
        model(ids(), embeds=torch.zeros(2, 11, 32))
    with pytest.raises(ConfigError, match="store"):
        model(ids(), index=torch.zeros(2, 1, dtype=torch.long))


def test_width_and_depth_scale_the_shape() -> None:
    wide = Config().with_width(1024).with_depth(4)
    assert (wide.width, wide.heads, wide.ffn_width, wide.depth) == (1024, 8, 3072, 4)
