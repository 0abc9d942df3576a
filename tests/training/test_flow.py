"""Rectified flow: what is drawn, what the network is told, and what the loss is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmdiff import rng
from mmdiff.batch import Example, collate
from mmdiff.config import parse
from mmdiff.diffusion import flow
from mmdiff.errors import ConfigError
from mmdiff.training.flow import Flow

SHAPE = (2, 4, 4)


def batch(rows: int, *, texts: bool = False, shape=SHAPE):
    empty = torch.zeros(0)
    draws = rng.generator(0, "images")
    return collate(
        [
            Example(
                key=str(i),
                task="prompted",
                ids=empty.long(),
                labels=empty.long(),
                weights=empty,
                droppable=empty.bool(),
                latents=rng.normal(draws, shape),
                cls=None if texts else i,
                text=f"text {i}" if texts else None,
            )
            for i in range(rows)
        ]
    )


class Net(nn.Module):
    """Remembers what it was given and predicts a constant."""

    class config:  # noqa: N801
        classes = 100
        patch_size = 2

    def __init__(self, value: float = 0.0, channels: int = 2) -> None:
        super().__init__()
        self.value, self.channels = value, channels

    def forward(self, x, t, *conditions):
        self.x, self.t, self.conditions = x, t, conditions
        return torch.full((len(x), self.channels, *x.shape[2:]), self.value)


def test_the_loss_is_that_of_the_velocity_at_the_noise_the_network_sees():
    given, net = batch(6), Net(0.3)
    losses = Flow()(net, given, rng.generator(1))
    sigma = (net.t / flow.TRAIN_STEPS)[:, None, None, None]
    noise = (net.x - (1 - sigma) * given.latents) / sigma
    want = (0.3 - (noise - given.latents)).square().mean()
    torch.testing.assert_close(losses.total, want)
    total, count = losses.terms["image"]
    assert count == 6
    torch.testing.assert_close(total / count, losses.total)


@pytest.mark.parametrize(
    ("spec", "mean"), [({}, 0.5), ({"time": "uniform"}, 0.5), ({"time": "mode"}, 0.5), ({"mean": 1.0}, 0.696)]
)
def test_times_follow_their_distribution(spec, mean):
    sigma = parse(Flow, spec, "objective").sigmas(20_000, rng.generator(0), torch.zeros(1, *SHAPE), 2)
    assert float(sigma.min()) >= 0
    assert float(sigma.max()) <= 1
    assert float(sigma.mean()) == pytest.approx(mean, abs=0.01)


def test_larger_images_are_noised_more():
    def at(**spec):
        return parse(Flow, spec, "objective").sigmas(100, rng.generator(0), torch.zeros(1, 2, 8, 8), 2)

    plain = at()
    torch.testing.assert_close(at(shift=3.0), flow.shifted(plain, 3.0))
    # 16 tokens where 4 are the base: the root of the ratio.
    torch.testing.assert_close(at(base_tokens=4), flow.shifted(plain, 2.0))
    torch.testing.assert_close(at(base_tokens=4, shift=1.5), flow.shifted(plain, 3.0))
    torch.testing.assert_close(at(base_tokens=16), plain)


@pytest.mark.parametrize("weight", ["none", "cosmap", "sigma_sqrt"])
def test_rows_are_weighted_by_their_noise(weight):
    given, net = batch(6), Net()
    total = Flow(weight=weight)(net, given, rng.generator(1)).total
    sigma = net.t / flow.TRAIN_STEPS
    each = flow.per_sample_loss(torch.zeros_like(given.latents), flow.velocity(given.latents, _noise(net, given)))
    weights = {
        "none": torch.ones(6),
        "cosmap": flow.cosmap_weight(sigma),
        "sigma_sqrt": sigma**-2,
    }
    torch.testing.assert_close(total, (each * weights[weight]).mean(), rtol=1e-4, atol=1e-4)


def _noise(net, given):
    sigma = (net.t / flow.TRAIN_STEPS)[:, None, None, None]
    return (net.x - (1 - sigma) * given.latents) / sigma


def test_some_classes_are_dropped():
    net = Net()
    Flow(drop=0.5)(net, batch(64), rng.generator(0))
    labels = net.conditions[0]
    gone = labels == 100
    assert 16 < int(gone.sum()) < 48
    assert torch.equal(labels[~gone], torch.arange(64)[~gone])


def test_some_texts_are_dropped_to_the_empty_one():
    seen: list[str] = []

    def encode(texts):
        seen.extend(texts)
        return torch.ones(len(texts), 3, 5), torch.ones(len(texts), 7)

    net = Net()
    Flow(drop=0.5).reading(encode)(net, batch(64, texts=True), rng.generator(0))
    assert 16 < seen.count("") < 48
    assert all(text in ("", f"text {i}") for i, text in enumerate(seen))
    assert [tuple(c.shape) for c in net.conditions] == [(64, 3, 5), (64, 7)]


def test_what_cannot_be_learnt_is_said():
    with pytest.raises(ConfigError, match="the batch holds no classes; for texts name a text_encoder"):
        Flow()(Net(), batch(2, texts=True), rng.generator(0))
    with pytest.raises(ConfigError, match="a text_encoder needs texts; use the task prompted"):
        Flow().reading(lambda texts: (torch.ones(1), torch.ones(1)))(Net(), batch(2), rng.generator(0))
    with pytest.raises(ConfigError, match=r"predicts \(4, 4, 4\) of \(2, 4, 4\); set learned_variance to false"):
        Flow()(Net(channels=4), batch(2), rng.generator(0))
    codes = batch(2)
    with pytest.raises(ConfigError, match="needs the task prompted or latent"):
        Flow()(Net(), type(codes)(**{**vars(codes), "latents": None}), rng.generator(0))


def test_a_small_network_learns_to_tell_classes_apart():
    """Two classes, two constant images: with the class the loss falls below what it is without."""

    class Table(nn.Module):
        class config:  # noqa: N801
            classes, patch_size = 2, 1

        def __init__(self):
            super().__init__()
            self.image = nn.Embedding(3, 1)

        def forward(self, x, t, labels):
            sigma = (t / flow.TRAIN_STEPS).clamp_min(0.05)[:, None, None, None]
            return (x - self.image(labels)[:, :, None, None]) / sigma

    net, draws = Table(), rng.generator(0)
    data = batch(32, shape=(1, 2, 2))
    classes = torch.arange(32) % 2
    data = type(data)(
        **{**vars(data), "classes": classes, "latents": (2.0 * classes - 1)[:, None, None, None].expand(-1, 1, 2, 2)}
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        Flow(drop=0.2)(net, data, draws).total.backward()
        optimizer.step()
    found = net.image.weight.detach().flatten()
    assert found[0] == pytest.approx(-1, abs=0.1)
    assert found[1] == pytest.approx(1, abs=0.1)
    assert found[2] == pytest.approx(0, abs=0.5)
