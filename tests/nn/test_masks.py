"""Attention masks as rules: what they let through, and that both ways of writing them out attend alike."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from mmdiff import rng
from mmdiff.errors import ConfigError
from mmdiff.nn import masks

SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 2], [5, 5, 3, 3, 3, 3]])

RULES = {
    "documents": (masks.documents(SEGMENTS), 2, 6),
    "splits": (masks.splits([2, 3, 1], ["causal", "noise", "full"]), 1, 6),
    "block diffusion": (masks.block_diffusion(3, 2), 1, 6),
}


def test_documents_are_isolated():
    seen = masks.document_mask(SEGMENTS)
    assert seen.dtype == torch.bool
    assert seen[0].int().tolist()[:4] == [[1, 1, 1, 0, 0, 0]] * 3 + [[0, 0, 0, 1, 1, 0]]
    assert bool((seen == seen.transpose(1, 2)).all())


@pytest.mark.parametrize("name", RULES)
def test_every_slot_sees_itself_so_that_no_softmax_is_empty(name):
    rule, batch, length = RULES[name]
    assert bool(masks.dense(rule, batch, length).diagonal(dim1=1, dim2=2).all())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", RULES)
def test_block_sparse_and_dense_masks_attend_alike(name):
    rule, batch, length = RULES[name]
    query, key, value = rng.normal(rng.generator(0), (3, 2, 2, length, 16))
    dense = masks.dense(rule, batch, length)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=dense[:, None])
    sparse = masks.sparse(rule, None if batch == 1 else batch, length)
    torch.testing.assert_close(flex_attention(query, key, value, block_mask=sparse), expected)


def test_a_noise_split_is_seen_by_itself_alone():
    seen = masks.dense(masks.splits([2, 3, 1], ["causal", "noise", "full"]), 1, 6)[0]
    assert not bool(seen[5, 2:5].any())
    assert bool(seen[2:5, :5].all())
    assert bool(seen[5, :2].all())


def test_splits_of_other_documents_are_not_seen():
    alone = masks.dense(masks.splits([2, 1], ["full", "causal"]), 1, 3)[0]
    packed = masks.dense(masks.splits([2, 1, 2, 1], ["full", "causal"] * 2, [3, 3]), 1, 6)[0]
    torch.testing.assert_close(packed, torch.block_diag(alone.int(), alone.int()).bool())


def test_blocks_of_one_with_causal_context_are_an_autoregressive_model():
    seen = masks.dense(masks.block_diffusion(4, 1, context="causal"), 1, 8)[0]
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    torch.testing.assert_close(seen[4:, 4:], causal)
    torch.testing.assert_close(seen[:4, 4:] | torch.eye(4, dtype=torch.bool), causal)
    assert not bool(seen[4:, :4].any())


def test_one_block_is_the_whole_sequence():
    seen = masks.dense(masks.block_diffusion(4, 9), 1, 8)[0]
    assert bool(seen[:4, :4].all())
    assert not bool(seen[:4, 4:].any())


@pytest.mark.parametrize(
    ("lengths", "modes", "documents"),
    [([2], ["full", "full"], None), ([2], ["wide"], None), ([2, 2], ["full"] * 2, [3, 1])],
)
def test_splits_that_do_not_fit_are_refused(lengths, modes, documents):
    with pytest.raises(ConfigError, match="splits"):
        masks.splits(lengths, modes, documents)


def test_blocks_need_a_slot():
    with pytest.raises(ConfigError, match="at least 1"):
        masks.block_diffusion(4, 0)
