"""Caches: laws that hold on any network, batches of ragged rows, what the trace tells."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdiff import rng
from mmdiff.errors import ConfigError
from mmdiff.models.llada import Config, LLaDA
from mmdiff.nn.store import Store
from mmdiff.sampling import (
    Cfg,
    DllmCache,
    Dual,
    Eos,
    Factor,
    Fixed,
    Linear,
    Prefix,
    Quota,
    TextBackbone,
    Threshold,
    Whole,
    decode,
    layout,
)

MASK = 30
CONFIG = Config(
    vocab_size=32, width=24, depth=3, heads=4, kv_heads=2, ffn_width=40, mask_id=MASK, bos_id=0, eos_id=1, eot_id=2
)
EXACT = [Prefix(refresh=1), Dual(refresh=1), DllmCache(1, 1, 0.5)]
APPROXIMATE = [Prefix(), Dual(), Dual(refresh=2), DllmCache(3, 2, 0.5), DllmCache(2, 4, 0.0, False, False)]


def network(seed: int) -> LLaDA:
    net = LLaDA(CONFIG, generator=rng.generator(seed, "init")).eval()
    with torch.no_grad():
        # Sharper than at initialisation, so that thresholds cut somewhere.
        net.embed_tokens.weight.mul_(4)
        net.lm_head.weight.mul_(6)
    return net


prompts = st.lists(st.lists(st.integers(3, 29), min_size=1, max_size=6), min_size=1, max_size=3)
rules = st.sampled_from(
    [{"selector": Threshold(0.3)}, {"selector": Factor(1.0)}, {"schedule": Linear(6)}, {"schedule": Linear()}]
)


@settings(max_examples=25, deadline=None)
@given(
    prompts=prompts, rule=rules, cache=st.sampled_from(EXACT), scale=st.sampled_from([1.0, 1.7]), seed=st.integers(0, 3)
)
def test_a_cache_that_refreshes_everything_is_no_cache(prompts, rule, cache, scale, seed):
    net, parts = network(seed), {"length": 8, "blocks": Fixed(4), "guidance": Cfg(scale), **rule}
    if isinstance(cache, DllmCache):
        cache = dataclasses.replace(cache, watch=1)
    plain, cached = decode(net, prompts, **parts), decode(net, prompts, cache=cache, **parts)
    assert torch.equal(plain.tokens, cached.tokens)
    assert torch.equal(plain.trace.order >= 0, cached.trace.order >= 0)
    assert plain.trace.row_nfe == cached.trace.row_nfe
    assert all(float(d.largest) < 1e-4 and not d.flips for d in cached.trace.drift.values())


@settings(max_examples=10, deadline=None)
@given(
    cache=st.sampled_from(APPROXIMATE), rule=rules, scale=st.sampled_from([1.0, 1.7]), order=st.permutations(range(4))
)
def test_a_row_does_not_depend_on_its_batch_its_order_or_padding(cache, rule, scale, order):
    net, rows = network(1), [[3, 4, 5, 6, 7], [8], [9, 10], [11, 12, 13]]

    def run(which):
        done = decode(
            net, [rows[r] for r in which], length=10, blocks=Fixed(4), cache=cache, guidance=Cfg(scale), **rule
        )
        return dict(zip(which, zip(done.tokens.tolist(), done.trace.row_nfe, strict=True), strict=True))

    alone = {r: run([r])[r] for r in range(4)}
    assert run(list(order)) == alone
    assert run(list(order)[:3]) == {r: alone[r] for r in order[:3]}


def turns(order: torch.Tensor) -> list[int]:
    """A row's own numbering of its passes."""
    return order.unique(return_inverse=True)[1].tolist()


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_different_lengths_leave_the_batch_and_the_others_keep_their_memory(seed):
    net = network(seed)
    generated = [[None] * 5, [None] * 12, [None, 5, None, None, 7, None]]
    texts = [[3], [4, 5], [6, 7, 8]]
    canvas = layout(texts, generated, mask_id=MASK)
    for cache in [*APPROXIMATE, DllmCache(20, 20, 0.3)]:
        together = decode(net, canvas=canvas, blocks=Fixed(3), cache=cache)
        for row, slots in enumerate(generated):
            alone = decode(
                net,
                canvas=layout(texts[row : row + 1], [slots], mask_id=MASK),
                blocks=Fixed(3),
                cache=cache,
            )
            assert together.tokens[row, : len(slots)].tolist() == alone.tokens[0].tolist()
            assert turns(together.trace.order[row, 3 : 3 + len(slots)]) == turns(
                alone.trace.order[0, len(texts[row]) :]
            )
        assert together.trace.row_nfe == (5, 12, 4)


@pytest.mark.parametrize("cache", APPROXIMATE[:4])
def test_drift_is_measured_on_a_network_with_full_attention(cache):
    done = decode(network(3), [[3, 4, 5]], length=8, blocks=Fixed(4), cache=dataclasses.replace(cache, watch=1))
    drift = [float(done.trace.drift[k].largest) for k in range(done.trace.nfe)]
    assert drift[0] < 1e-5
    assert max(drift) > 1e-2
    every = decode(network(3), [[3, 4, 5]], length=8, blocks=Fixed(4), cache=dataclasses.replace(cache, watch=3))
    assert sorted(every.trace.drift) == [0, 3, 6]
    assert torch.equal(every.tokens, done.tokens), "watching changed the result"


def test_the_trace_tells_what_each_pass_computed():
    net, parts = network(0), {"length": 8, "blocks": Fixed(4)}
    widths = {None: [11] * 8, Prefix(): [11, 8, 8, 8, 11, 4, 4, 4], Dual(): [11, 4, 4, 4] * 2}
    for cache, expected in widths.items():
        trace = decode(net, [[3, 4, 5]], cache=cache, **parts).trace
        assert [p.computed for p in trace.passes] == expected
        assert [p.read for p in trace.passes] == [4, 3, 2, 1] * 2, "the head ran where nothing can change"
        assert {p.slots for p in trace.passes} == {11}
        assert (trace.query_slots, trace.head_slots) == (sum(expected), 20)


def test_dual_on_the_whole_canvas_keeps_only_the_prompt():
    done = decode(network(0), [[3, 4, 5]], length=6, blocks=Whole(), schedule=Linear(3), cache=Dual())
    assert [p.computed for p in done.trace.passes] == [9, 6, 6]


def test_an_early_end_and_a_cache_go_together():
    net, parts = network(4), {"length": 12, "blocks": Fixed(4), "exit": Eos(tuple(range(2, 30)))}
    done = decode(net, [[16, 17], [18]], cache=Dual(), **parts)
    assert not done.canvas.undecided.any()
    assert min(done.trace.row_nfe) < 12, "no end was found: the test says nothing"
    for row, prompt in enumerate([[16, 17], [18]]):
        alone = decode(net, [prompt], cache=Dual(), **parts)
        assert torch.equal(alone.tokens[0], done.tokens[row])


def test_a_store_counts_the_passes_since_a_slot_was_computed():
    net, store = network(0), Store(3, 1, 5)
    ids = torch.arange(3, 8)[None]
    with torch.no_grad():
        net(ids, store=store, index=torch.tensor([[0, 1, 2]]))
        net(ids, store=store, index=torch.tensor([[2, 4]]))
    assert store.age.tolist() == [[1, 1, 0, -1, 0]]
    with torch.no_grad():
        net(ids, store=store)
    assert store.age.tolist() == [[0] * 5]


def test_a_network_without_memory_and_values_out_of_range_are_refused(toy):
    with pytest.raises(ConfigError, match="without a cache"):
        decode(toy(0), [[1]], length=2, cache=Dual())
    for bad in (
        lambda: Dual(refresh=0),
        lambda: Prefix(refresh=-1),
        lambda: DllmCache(0),
        lambda: DllmCache(5, 5, 1.5),
    ):
        with pytest.raises(ConfigError):
            bad()


def test_a_cached_run_knows_its_passes_beforehand_if_its_rows_go_in_step():
    net, totals = network(0), []
    decode(net, [[3], [4, 5]], length=4, selector=Quota(2), cache=Dual(), callback=lambda s: totals.append(s.total))
    assert totals == [2, 2]
    canvas = layout([[3], [4]], [[None] * 4, [None, 5, 5, 5]], mask_id=MASK)
    decode(net, canvas=canvas, cache=Dual(), callback=lambda s: totals.append(s.total))
    assert totals[2:] == [None] * 4


def test_two_generators_of_logits_share_no_memory():
    net = network(0)
    first, second = (decode(TextBackbone(net), [[3, 4]], length=4, cache=Prefix()) for _ in range(2))
    assert torch.equal(first.tokens, second.tokens)
