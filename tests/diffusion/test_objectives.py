from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmdiff import rng
from mmdiff.diffusion.objectives import chunked_cross_entropy, cross_entropy
from mmdiff.errors import ConfigError

ROWS, WIDTH, CLASSES = 37, 24, 211


class Largest(TorchDispatchMode):
    """Remembers the most elements any tensor had that an operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return out


def drawn(*shape: int, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=rng.generator(0, name)).to(dtype)


def data(dtype: torch.dtype = torch.float32):
    head = torch.nn.Linear(WIDTH, CLASSES)
    with torch.no_grad():
        head.weight.copy_(drawn(CLASSES, WIDTH, name="w"))
        head.bias.copy_(drawn(CLASSES, name="b"))
    labels = torch.randint(0, CLASSES, (ROWS,), generator=rng.generator(0, "y"))
    return drawn(ROWS, WIDTH, name="h", dtype=dtype).requires_grad_(), labels, head.to(dtype)


@pytest.mark.parametrize("chunk", [None, 1, 8, ROWS, 100])
@pytest.mark.parametrize("frozen", [False, True])
def test_loss_and_gradients_equal_the_plain_ones_with_a_trained_and_a_frozen_head(
    chunk: int | None, frozen: bool
) -> None:
    hidden, labels, head = data()
    head.requires_grad_(not frozen)
    wanted = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    weights = drawn(ROWS, name="weights").abs()
    plain = F.cross_entropy(head(hidden), labels, reduction="none")
    ours = chunked_cross_entropy(hidden, labels, head, chunk=chunk)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    expected = torch.autograd.grad((plain * weights).sum(), wanted)
    got = torch.autograd.grad((ours * weights).sum(), wanted)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_no_tensor_is_larger_than_the_logits_of_one_chunk(frozen: bool) -> None:
    hidden, labels, head = data()
    head.requires_grad_(not frozen)
    with Largest() as seen:
        chunked_cross_entropy(hidden, labels, head, chunk=4).sum().backward()
    assert seen.numel <= max(4 * CLASSES, head.weight.numel()) < ROWS * CLASSES
    assert hidden.grad is not None


def test_statistics_are_those_of_float32_for_logits_in_half_precision() -> None:
    hidden, labels, head = data(torch.bfloat16)
    logits = head(hidden).detach()
    exact = F.cross_entropy(logits.double(), labels, reduction="none")
    ours = chunked_cross_entropy(hidden, labels, head, chunk=8)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=1e-6)


def test_gradient_keeps_the_dtype_of_the_logits_and_spares_a_head_that_needs_its_output() -> None:
    logits = drawn(5, CLASSES, name="l", dtype=torch.bfloat16).requires_grad_()
    labels = torch.arange(5)
    capped = 3 * torch.tanh(logits / 3)  # the backward pass of tanh reads its own result
    cross_entropy(capped, labels).sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16
    exact = logits.detach().double().requires_grad_()
    F.cross_entropy(3 * torch.tanh(exact / 3), labels, reduction="sum").backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=0.01, rtol=0.02)


def test_no_rows_give_no_losses_and_a_gradient_of_zero() -> None:
    hidden, labels, head = data()
    ours = chunked_cross_entropy(hidden[:0], labels[:0], head)
    ours.sum().backward()
    assert ours.shape == (0,)
    assert float(hidden.grad.abs().sum()) == 0


def test_chunk_of_nothing_is_refused() -> None:
    hidden, labels, head = data()
    with pytest.raises(ConfigError, match="chunk is 0 positions"):
        chunked_cross_entropy(hidden, labels, head, chunk=0)
