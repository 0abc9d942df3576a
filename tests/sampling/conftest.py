"""A toy network with LLaDA's signature: every row depends on its own valid slots only, and on all of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor


class Toy:
    """Embedding, mean over the valid slots, one hidden layer, head."""

    def __init__(self, seed: int, vocab: int = 24, mask_id: int = 20, width: int = 16) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.config = SimpleNamespace(mask_id=mask_id)
        self.vocab, self.calls = vocab, 0
        self.table, self.head = (torch.randn(vocab, width, generator=draw) for _ in range(2))
        self.place = torch.randn(256, width, generator=draw)
        self.mix = torch.randn(width, width, generator=draw) * 0.7

    def __call__(self, ids: Tensor, *, valid: Tensor, positions: Tensor, head_index: Tensor) -> Tensor:
        self.calls += 1
        x = self.table[ids] + self.place[positions]
        mean = (x * valid[..., None]).sum(1, keepdim=True) / valid.sum(1)[:, None, None]
        h = torch.tanh(x @ self.mix + 3 * torch.tanh(mean @ self.mix))
        return (h @ self.head.T).gather(1, head_index[..., None].expand(-1, -1, self.vocab))

    def logits(self, ids: Tensor, valid: Tensor, positions: Tensor) -> Tensor:
        everything = torch.arange(ids.shape[1]).expand_as(ids)
        return self(ids, valid=valid, positions=positions, head_index=everything)


@pytest.fixture(scope="session")
def toy():
    return Toy
