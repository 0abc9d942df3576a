"""What is taken back, what ends a row, and the habits of the published loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdiff.errors import ConfigError
from mmdiff.sampling import (
    T2T,
    Constraint,
    Credit,
    Eos,
    Fixed,
    Hierarchy,
    Linear,
    LocalLeap,
    Quota,
    Remask,
    Stop,
    Threshold,
    ThresholdOrQuota,
    decode,
    layout,
)
from mmdiff.sampling.editors import Edit

MASK = 20
EDITORS = [T2T(0.2), T2T(0.05, patience=3), Remask(0.3, 0.1, 0.5)]


@settings(max_examples=30, deadline=None)
@given(
    editor=st.sampled_from(EDITORS),
    selector=st.sampled_from([Threshold(0.2), Hierarchy(0.5, 0.1), Quota(9)]),
    prompts=st.lists(st.lists(st.integers(0, 19), min_size=1, max_size=4), min_size=1, max_size=3),
    seed=st.integers(0, 9),
)
def test_an_editor_ends_decides_everything_and_leaves_what_is_fixed(toy, editor, selector, prompts, seed):
    rows = [[None, 3, None, None, None, 7, None, None, None] for _ in prompts]
    canvas = layout(prompts, rows, mask_id=MASK)
    done = decode(toy(seed), canvas=canvas, blocks=Fixed(5), selector=selector, editor=editor)
    assert not (done.tokens == MASK).any()
    assert (done.tokens[:, 1] == 3).all()
    assert (done.tokens[:, 5] == 7).all()
    assert torch.equal(done.canvas.tokens[:, : canvas.start], canvas.tokens[:, : canvas.start])
    for row, prompt in enumerate(prompts):
        single = layout([prompt], rows[:1], mask_id=MASK)
        alone = decode(toy(seed), canvas=single, blocks=Fixed(5), selector=selector, editor=editor)
        assert torch.equal(alone.tokens[0], done.tokens[row])
        assert alone.trace.row_nfe[0] == done.trace.row_nfe[row]


def test_overwriting_above_one_changes_nothing_and_below_changes_something(toy):
    changed = 0
    for seed in range(6):
        plain = decode(toy(seed), [[1, 2]], length=8, selector=Threshold(0.2))
        never = decode(toy(seed), [[1, 2]], length=8, selector=Threshold(0.2), editor=T2T(1.0))
        assert torch.equal(plain.tokens, never.tokens)
        assert never.trace.nfe == plain.trace.nfe + 1, "the last pass sees that nothing changes"
        edited = decode(toy(seed), [[1, 2]], length=8, selector=Threshold(0.2), editor=T2T(0.1))
        assert edited.trace.nfe <= plain.trace.nfe + 17
        changed += not torch.equal(plain.tokens, edited.tokens)
    assert changed, "no seed was edited: the test says nothing"


def test_a_block_that_is_mended_without_end_is_left_when_patience_runs_out(toy):
    class Restless:
        patience = 3

        def edit(self, proposal, tokens, candidates, decided, commit, slots):
            return Edit(commit | decided, torch.zeros_like(commit))

    done = decode(toy(0), [[1]], length=6, blocks=Fixed(3), selector=Threshold(0.0), editor=Restless())
    assert done.trace.nfe == 2 * (1 + 4)


def test_credit_of_weight_zero_is_no_credit_and_credit_speeds_a_steady_choice_up(toy):
    sooner = 0
    for seed in range(6):
        parts = {"length": 10, "blocks": Fixed(5)}
        plain = decode(toy(seed), [[1], [2, 3]], selector=Threshold(0.6), **parts)
        none = decode(toy(seed), [[1], [2, 3]], selector=Credit(Threshold(0.6), alpha=0.0), **parts)
        assert torch.equal(plain.tokens, none.tokens)
        some = decode(toy(seed), [[1], [2, 3]], selector=Credit(Threshold(0.6), alpha=2.0), **parts)
        for row, prompt in enumerate([[1], [2, 3]]):
            alone = decode(toy(seed), [prompt], selector=Credit(Threshold(0.6), alpha=2.0), **parts)
            assert torch.equal(alone.tokens[0], some.tokens[row])
        sooner += sum(some.trace.row_nfe) < sum(plain.trace.row_nfe)
    assert sooner >= 4


def test_relaxing_nothing_is_the_plain_threshold(toy):
    for seed in range(4):
        plain = decode(toy(seed), [[1, 2]], length=9, selector=Threshold(0.3))
        leap = decode(toy(seed), [[1, 2]], length=9, selector=LocalLeap(0.3, radius=2, relaxed=0.3))
        assert torch.equal(plain.trace.order, leap.trace.order)
        quota = decode(toy(seed), [[1, 2]], length=9, selector=ThresholdOrQuota(0.3), schedule=Linear(9))
        assert torch.equal(plain.trace.order, quota.trace.order)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 20), length=st.integers(1, 12))
def test_an_open_hierarchy_takes_at_most_as_many_passes_as_the_longest_run(toy, seed, length):
    done = decode(toy(seed), [[1]], length=length, selector=Hierarchy(None, None))
    assert done.trace.nfe <= length


STOPS = ((4,), (5, 6), (7,))


def test_only_slots_before_a_stop_sequence_are_decided(toy):
    found = 0
    for seed in range(12):
        net, stop = toy(seed), Stop(tuple((i,) for i in range(4, 10)), filler=23)
        done = decode(net, [[1, 2], [3]], length=10, blocks=Fixed(5), exit=stop)
        for row, prompt in enumerate([[1, 2], [3]]):
            alone = decode(net, [prompt], length=10, blocks=Fixed(5), exit=stop)
            assert torch.equal(alone.tokens[0], done.tokens[row])
            end = int(done.canvas.end[row]) - done.canvas.start
            tokens = done.tokens[row].tolist()
            assert not any(4 <= t < 10 for t in tokens[:end])
            assert tokens[end:] == [23] * (10 - end)
            found += end < 10
    assert found >= 6, "too few ends were found: the test says nothing"


def test_the_published_search_prefers_the_first_sequence_and_ours_the_first_place():
    tokens = [[9, 7, 9, 5, 6, 9]]

    def end_of(published, sequences):
        canvas = layout([[1]], [[None] * 6], mask_id=MASK)
        canvas.tokens[:, 1:], canvas.undecided[:] = torch.tensor(tokens), False
        Stop(sequences, filler=23, published=published).fill(canvas, torch.tensor([True]), 0)
        return int(canvas.end) - 1, canvas.tokens[0, 1:].tolist()

    assert end_of(False, STOPS) == (1, [9, 23, 23, 23, 23, 23])
    assert end_of(True, STOPS) == (3, [9, 7, 9, 23, 23, 23])
    assert end_of(True, ((7,), (5, 6)))[0] == 1
    assert end_of(False, ((1,), (9, 9), (3, 3, 3, 3, 3, 3, 3, 3)))[0] == 6, "the prompt is no part of the answer"
    with pytest.raises(ConfigError):
        Stop((), filler=1)


def greedy_mask(toy):
    """A network whose most probable class is often the mask."""
    net = toy(2)
    net.head[MASK] += 2 * net.head.mean(0) + 1.5
    return net


def test_the_published_loop_may_leave_masks_and_ours_never_does(toy):
    net, left = greedy_mask(toy), 0
    for prompt in ([1, 2], [3], [4, 5, 6], [9]):
        published = decode(net, [prompt], length=8, blocks=Fixed(4), schedule=Linear(8, published=True))
        left += int((published.tokens == MASK).sum())
        assert published.trace.nfe == 8
        assert not (decode(net, [prompt], length=8, blocks=Fixed(4)).tokens == MASK).any()
    assert left, "the mask class was never chosen: the test says nothing"


def test_mask_ids_inside_the_prompt_take_slots_of_the_published_loop(toy):
    prompt = [1, MASK, 2, MASK]
    published = decode(toy(3), [prompt], length=4, schedule=Linear(4, published=True))
    assert int((published.canvas.tokens == MASK).sum()) == 2, "as many masks as the prompt held are left somewhere"
    ours = decode(toy(3), [prompt], length=4)
    assert ours.canvas.tokens[0, :4].tolist() == prompt
    assert not (ours.tokens == MASK).any()


def test_idle_passes_are_the_published_loops_own(toy):
    kinds = [Linear(12, published=True), Linear(12, published=True, idle=False), Linear(12)]
    runs = [decode(toy(1), [[1, 2]], length=6, blocks=Fixed(3), schedule=s) for s in kinds]
    assert [r.trace.nfe for r in runs] == [12, 6, 6]
    assert all(torch.equal(r.tokens, runs[0].tokens) for r in runs)


def test_an_end_and_an_editor_go_together(toy):
    for seed in range(6):
        done = decode(
            toy(seed),
            [[1], [2, 3]],
            length=9,
            blocks=Fixed(3),
            selector=Threshold(0.2),
            editor=T2T(0.1),
            exit=Eos((4, 5, 6, 7, 8, 9)),
            constraint=Constraint(forbid=(0,)),
        )
        assert not done.canvas.undecided.any()
        assert not (done.tokens == MASK).any()
