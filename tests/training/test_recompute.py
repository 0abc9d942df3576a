from __future__ import annotations

import torch

from mmdiff.models.llada import Config, LLaDA
from mmdiff.training.recompute import blocks, recomputing

SHAPE = Config(
    vocab_size=64, width=32, depth=3, heads=4, kv_heads=4, ffn_width=48, mask_id=60, bos_id=1, eos_id=61, eot_id=62
)
IDS = torch.arange(18).view(2, 9)


def gradients(model: LLaDA) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(IDS).square().mean().backward()
    return [p.grad for p in model.parameters()]


def test_gradients_are_the_same_and_names_stay():
    model = LLaDA(SHAPE, generator=torch.Generator().manual_seed(0))
    names, wanted = list(model.state_dict()), gradients(model)
    with recomputing(model):
        assert list(model.state_dict()) == names
        got = gradients(model)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert not any("forward" in vars(block) for block in blocks(model))


def test_blocks_are_computed_twice_with_gradients_and_once_without():
    model = LLaDA(SHAPE, generator=torch.Generator().manual_seed(0))
    calls = []
    model.layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1))
    with recomputing(model):
        gradients(model)
        assert len(calls) == 2
        with torch.no_grad():
            model(IDS)
        assert len(calls) == 3
    with recomputing(model, on=False):
        gradients(model)
    assert len(calls) == 4
