"""The loop: LLaDA's published sampler token for token, independence of rows, order of decisions, guidance, exits."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdiff import rng
from mmdiff.errors import ConfigError
from mmdiff.sampling import (
    Cfg,
    Constraint,
    Cosine,
    Eos,
    Factor,
    Fixed,
    Greedy,
    Gumbel,
    Linear,
    Multinomial,
    Quota,
    Random,
    RandomTopK,
    Shift,
    Threshold,
    TopConfidence,
    decode,
    layout,
    steps,
)

MASK = 20


def published(net, prompts, gen_length, block_length, steps, cfg_scale=0.0, eos_inf=None, late=()):
    """A plain transcription of the published sampler, batched by left padding."""
    width = max(map(len, prompts))
    x = torch.tensor([[23] * (width - len(p)) + p + [MASK] * gen_length for p in prompts])
    valid = torch.tensor([[False] * (width - len(p)) + [True] * (len(p) + gen_length) for p in prompts])
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    known = x != MASK
    history = []
    for block in range(gen_length // block_length):
        begin, end = width + block * block_length, width + (block + 1) * block_length
        n = (x[:, begin:end] == MASK).sum(1)
        passes = steps // (gen_length // block_length)
        for s in range(passes):
            masked = x == MASK
            logits = net.logits(x, valid, positions)
            if cfg_scale:
                blank = torch.where(known, torch.tensor(MASK), x)
                u = net.logits(blank, valid, positions)
                logits = u + (cfg_scale + 1) * (logits - u)
            if eos_inf is not None:
                logits[..., eos_inf] = -torch.inf
            choice = logits.clone()
            choice[..., MASK] = -torch.inf  # the one deviation: the mask class is never chosen
            x0 = choice.argmax(-1)
            for token in late:
                logits[..., token] = -torch.inf
            confidence = logits.double().softmax(-1).gather(-1, x0[..., None])[..., 0]
            confidence[:, end:] = -torch.inf
            confidence = confidence.masked_fill(~masked, -torch.inf)
            for row in range(len(x)):
                k = int(n[row]) // passes + (s < int(n[row]) % passes)
                best = confidence[row].topk(k).indices
                x[row, best] = x0[row, best]
            history.append(x[:, width:].clone())
    return x[:, width:], history


prompt_lists = st.lists(st.lists(st.integers(0, 19), min_size=1, max_size=5), min_size=1, max_size=4)


@settings(max_examples=30, deadline=None)
@given(
    prompts=prompt_lists,
    shape=st.sampled_from([(8, 8, 8), (8, 4, 4), (12, 4, 12), (10, 5, 6), (6, 6, 1), (7, 7, 3)]),
    cfg=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 9),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_everything_off_is_the_published_sampler_token_for_token(toy, prompts, shape, cfg, seed, dtype):
    net = toy(seed)
    length, block, count = shape
    expected, history = published(net, prompts, length, block, count, cfg)
    seen = []
    done = decode(
        net,
        prompts,
        length=length,
        blocks=Fixed(block),
        schedule=Linear(count),
        sampler=Greedy(dtype),
        guidance=Cfg(1 + cfg),
        callback=lambda step: seen.append(step.canvas.tokens[:, step.canvas.start :].clone()),
    )
    assert torch.equal(done.tokens, expected)
    assert all(torch.equal(a, b) for a, b in zip(seen, history, strict=True))
    assert done.trace.nfe == count


def test_excluded_and_postponed_ids_act_as_published(toy):
    for seed in range(4):
        expected, _ = published(toy(seed), [[1, 2, 3]], 6, 6, 6, eos_inf=5, late=(7, 8))
        constraint = Constraint(forbid=(5,), postpone=(7, 8))
        selector = TopConfidence(published_ties=True)
        done = decode(
            toy(seed),
            [[1, 2, 3]],
            length=6,
            schedule=Linear(6),
            selector=selector,
            sampler=Greedy(torch.float64),
            constraint=constraint,
        )
        assert torch.equal(done.tokens, expected)


PARTS = {
    "greedy quota": lambda: {"selector": Quota(5), "blocks": Fixed(4)},
    "threshold": lambda: {"selector": Threshold(0.3), "blocks": Fixed(3), "sampler": Multinomial(1.3, top_p=0.9)},
    "factor": lambda: {"selector": Factor(1.0), "blocks": Fixed(5), "exit": Eos((4, 5, 6, 7, 8))},
    "random order": lambda: {"selector": Random(), "schedule": Shift(6), "sampler": Gumbel(0.7)},
    "image": lambda: {
        "selector": RandomTopK(1.0, "compound"),
        "schedule": Cosine(4),
        "sampler": Multinomial(top_k=9),
        "guidance": Cfg(2.5),
    },
}


@pytest.mark.parametrize("name", PARTS)
def test_a_row_does_not_depend_on_its_batch_its_order_or_padding(toy, name):
    net, prompts = toy(3), [[1, 2, 3, 4, 5], [6], [7, 8], [9, 9, 9]]

    def run(rows):
        generators = [rng.generator(r, "test") for r in rows]
        done = decode(net, [prompts[r] for r in rows], length=11, generators=generators, **PARTS[name]())
        orders = done.trace.order[:, done.canvas.start :].tolist()
        return dict(zip(rows, zip(done.tokens.tolist(), orders, done.trace.row_nfe, strict=True), strict=True))

    alone = {r: run([r])[r] for r in range(4)}
    assert run([0, 1, 2, 3]) == alone
    assert run([3, 1, 0, 2]) == alone
    assert run([2, 3]) == {r: alone[r] for r in (2, 3)}


def test_rows_with_different_numbers_of_gaps_do_not_wait_for_each_other(toy):
    net = toy(1)
    rows = [[None, 3, None], [None] * 6, [5, 6, 7]]
    canvas = layout([[1, 2]] * 3, rows, mask_id=MASK)
    done = decode(net, canvas=canvas, selector=Threshold(2.0))
    assert done.trace.row_nfe == (2, 6, 0)
    assert done.trace.row_passes == 8
    single = decode(net, canvas=canvas.select(torch.tensor([0])), selector=Threshold(2.0))
    assert torch.equal(single.tokens[0], done.tokens[0])
    assert canvas.undecided.sum() == 8, "the caller's canvas was changed"


def test_the_trace_tells_when_every_slot_was_decided(toy):
    net = toy(0)
    done = decode(net, [[1, 2], [3]], length=9, blocks=Fixed(4), selector=Threshold(0.25))
    order = done.trace.order[:, done.canvas.start :]
    assert not done.canvas.undecided.any()
    assert (order >= 0).all()
    for row in range(2):
        assert sorted(set(order[row].tolist())) == list(range(done.trace.row_nfe[row])), "a pass decided nothing"
        counts = [(order[row] == k).sum().item() for k in range(done.trace.nfe)]
        assert counts == done.trace.committed[:, row].tolist()
        blocks = [order[row, i : i + 4] for i in (0, 4, 8)]
        assert all(a.max() < b.min() for a, b in pairwise(blocks))
    assert net.calls == done.trace.nfe


def test_frozen_slots_are_never_written_and_the_mask_class_is_never_chosen(toy):
    net = toy(2)
    net.head[MASK] += 5 * net.head.mean(0) + 3  # the mask class wins nearly everywhere
    row = [None, 11, None, None, 12, None]
    canvas = layout([[1]], [row], mask_id=MASK)
    for parts in (Quota(2), Threshold(0.5), Threshold(0.0)):
        done = decode(net, canvas=canvas, selector=parts)
        tokens = done.tokens[0].tolist()
        assert [tokens[1], tokens[4]] == [11, 12]
        assert MASK not in tokens


def test_a_slot_takes_only_ids_of_its_class_range(toy):
    canvas = layout([[1]], [[None] * 8], mask_id=MASK)
    canvas.low = torch.tensor([[0] * 5 + [15] * 4])
    canvas.high = torch.tensor([[10] * 5 + [18] * 4])
    done = decode(toy(5), canvas=canvas, sampler=Multinomial(5.0), selector=Quota(3), generators=[rng.generator(0)])
    tokens = done.tokens[0]
    assert (tokens[:4] < 10).all()
    assert ((tokens[4:] >= 15) & (tokens[4:] < 18)).all()


def test_guidance_of_one_is_no_guidance_and_makes_one_branch(toy):
    net, prompts = toy(4), [[1, 2, 3]]
    plain = decode(net, prompts, length=6, selector=Quota(3))
    one = decode(net, prompts, length=6, selector=Quota(3), guidance=Cfg(1.0))
    two = decode(net, prompts, length=6, selector=Quota(3), guidance=Cfg(1.0 + 1e-9))
    assert torch.equal(plain.tokens, one.tokens)
    assert (one.trace.row_passes, two.trace.row_passes) == (3, 6)


def test_guidance_replaces_droppable_slots_only(toy):
    net, seen = toy(4), []
    canvas = layout([[1, 2, 3]], [[None] * 4], mask_id=MASK, droppable=[[False, True, False]])

    def watched(ids, **options):
        seen.append(ids.clone())
        return net(ids, **options)

    watched.config = net.config
    decode(watched, canvas=canvas, selector=Quota(1), guidance=Cfg(2.0))
    assert seen[0][:, :3].tolist() == [[1, 2, 3], [1, MASK, 3]]


def test_everything_right_of_the_end_becomes_the_end_once_its_block_is_finished(toy):
    found = 0
    for seed in range(12):
        net = toy(seed)
        plain = decode(net, [[1, 2]], length=12, blocks=Fixed(3)).tokens[0].tolist()
        ends = [i for i, t in enumerate(plain) if t in (6, 7)]
        done = decode(net, [[1, 2]], length=12, blocks=Fixed(3), exit=Eos((6, 7)))
        if not ends:
            assert done.tokens[0].tolist() == plain
            continue
        found += 1
        finished = (ends[0] // 3 + 1) * 3
        assert done.tokens[0].tolist() == plain[:finished] + [6] * (12 - finished)
        assert done.trace.row_nfe == (finished,)
    assert found >= 3, "no seed produced an end: the test says nothing"


def test_a_threshold_above_one_equals_one_slot_per_pass_and_zero_equals_one_pass_per_block(toy):
    net, prompts = toy(6), [[1, 2, 3], [4]]
    slow = decode(net, prompts, length=8, blocks=Fixed(4), selector=Threshold(1.1))
    each = decode(net, prompts, length=8, blocks=Fixed(4))
    assert torch.equal(slow.tokens, each.tokens)
    assert slow.trace.nfe == each.trace.nfe == 8
    assert decode(net, prompts, length=8, blocks=Fixed(4), selector=Threshold(0.0)).trace.nfe == 2


def test_steps_yields_the_same_run_pass_by_pass(toy):
    net = toy(7)
    run = steps(net, [[1]], length=5, selector=Quota(5))
    numbers = []
    while True:
        try:
            step = next(run)
        except StopIteration as end:
            done = end.value
            break
        numbers.append(step.number)
        assert step.total == 5
    assert numbers == [0, 1, 2, 3, 4]
    assert torch.equal(done.tokens, decode(net, [[1]], length=5, selector=Quota(5)).tokens)


@pytest.mark.parametrize(
    ("parts", "word"),
    [
        ({}, "length"),
        ({"length": 0}, "length"),
        ({"length": 4, "selector": TopConfidence()}, "schedule"),
        ({"length": 4, "selector": Threshold(), "schedule": Linear(2)}, "schedule"),
        ({"length": 4, "selector": Quota(2), "schedule": Linear(2)}, "Quota"),
        ({"length": 4, "selector": Quota(1), "blocks": Fixed(2)}, "steps"),
        ({"length": 4, "sampler": Multinomial()}, "generators"),
        ({"length": 4, "generators": [rng.generator(0)] * 3}, "3 generators"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(toy, parts, word):
    with pytest.raises(ConfigError, match=word):
        decode(toy(0), [[1], [2]], **parts)


def test_a_selector_that_decides_nothing_is_stopped(toy):
    class Idle:
        counts = False

        def select(self, proposal, candidates, turn):
            return candidates & False

    with pytest.raises(RuntimeError, match="Idle decided nothing"):
        decode(toy(0), [[1]], length=3, selector=Idle())
