"""Dropout with cheap draws: the share, the mean, the gradient, and attention around it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmdiff.nn.dropout import Dropout, attention, dropped


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_share_that_is_dropped_and_the_mean_are_those_asked_for(rate):
    torch.manual_seed(0)
    x = torch.ones(1001, 499)
    out = dropped(x, rate)
    assert len(out.unique()) == 2
    # Four numbers share the bits of one word; each of them has the share.
    shares = torch.stack([(out.flatten()[i::4] == 0).float().mean() for i in range(4)])
    assert (shares - rate).abs().max() < 0.005
    assert abs(float(out.mean()) - 1) < 0.02
    kept = out[out > 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)), rtol=1e-3, atol=0)


def test_neighbours_are_dropped_independently():
    torch.manual_seed(0)
    gone = (dropped(torch.ones(400_000), 0.25) == 0).float().view(-1, 4)
    assert (torch.corrcoef(gone.T) - torch.eye(4)).abs().max() < 0.01


def test_the_gradient_passes_where_the_number_did():
    torch.manual_seed(0)
    x = torch.randn(37, 13, requires_grad=True)
    out = dropped(x, 0.3)
    out.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x.detach(), out.detach())


def test_nothing_is_dropped_in_evaluation_or_at_a_rate_of_nothing():
    x = torch.randn(5, 3)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(dropped(x, 0.0), x)
    assert dropped(torch.empty(0, 3), 0.5).shape == (0, 3)
    assert dropped(x.bfloat16(), 0.5).dtype == torch.bfloat16


def test_a_seed_fixes_the_draws():
    def draw() -> torch.Tensor:
        torch.manual_seed(3)
        return dropped(torch.ones(100), 0.5)

    assert torch.equal(draw(), draw())


@pytest.mark.parametrize("masked", [False, True])
def test_attention_without_loss_is_pytorch_s(masked):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 8) for n in (5, 7, 7))
    attend = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])[:, None, None] if masked else None
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=attend)
    torch.testing.assert_close(attention(query, key, value, attend), expected)
    # A share that rounds to none takes the other way round.
    torch.testing.assert_close(attention(query, key, value, attend, rate=1e-9), expected)
    mean = torch.stack([attention(query, key, value, attend, rate=0.2) for _ in range(3000)]).mean(0)
    torch.testing.assert_close(mean, expected, atol=0.05, rtol=0)
