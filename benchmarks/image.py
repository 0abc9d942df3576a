"""Sampling, decoding and training of eMIGM beside a plain transcription of the published loop, same random weights.

Run: ``python -m benchmarks.image [SIZE [BATCH [STEPS]]]`` (default xsmall-256, 2 images, 16 steps). Both sides run in
one process, in turn; times are processor seconds, so that other work on the machine does not count. Ratios are
theirs / ours. The transcription is `benchmarks/published_emigm.py`.

Where the time goes, xsmall-256 on one core of a Xeon with AVX-512: nine tenths of a sampling run are matrix
products and attention, which both sides need. Projecting known tokens only, the last decoder block for revealed
ones only, and embeddings made once leave 475 of 500 GFLOP per image; the solver's schedule and the bookkeeping of
masks, which are most of the published code's calls, take about 3 % of its time on a CPU. A large matrix product
runs at 200 GFLOP/s there: even if all of ours did, with the rest as it is, the ratio would be about 1.5. In
training 164 of 187 GFLOP per image are left (the head on masked tokens only, timesteps and conditions embedded
once); the rest of the gain is cheaper draws for dropout, a fused AdamW and an average in one pass.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.published_emigm import PublishedSampler, training_step
from mmdiff import rng
from mmdiff.config import parse
from mmdiff.diffusion.gaussian import Process
from mmdiff.diffusion.guidance import GuidanceSchedule
from mmdiff.models.emigm import SIZES
from mmdiff.models.registry import build
from mmdiff.models.vae import Config as VaeConfig
from mmdiff.sampling import DpmSolver, Independent, LatentBackbone, Random, decode, latent_canvas
from mmdiff.training.optim import EMA, OptimConfig
from mmdiff.training.optim import build as build_optimizer
from mmdiff.training.recompute import compiling
from mmdiff.training.token_diffusion import TokenDiffusion

ROUNDS, HEAD_STEPS, GUIDANCE, INTERVAL = 2, 8, 4.0, (0.1, 0.3)


def seconds(*works: Callable[[], Any]) -> list[float]:
    """Processor seconds of the fastest round of each, taken in turn."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(ROUNDS):
        for work, taken in zip(works, times, strict=True):
            start = time.process_time()
            work()
            taken.append(time.process_time() - start)
    return [min(taken) for taken in times]


def arithmetic(work: Callable[[], Any]) -> float:
    """Floating-point operations of its matrix products; those inside attention come on top, the same on both sides."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def peak(side: int = 1024) -> float:
    """Operations per processor second of a large matrix product."""
    a, b = torch.randn(side, side), torch.randn(side, side)
    return 2 * side**3 / min(seconds(*5 * [lambda: a @ b]))


def decoding(size: int, batch: int) -> tuple[float, float]:
    """Processor seconds of latents to pixels: as our pipelines hold the autoencoder, and as it is built."""
    vae: Any = build(parse(VaeConfig, {"image_size": size}, "benchmark"), generator=rng.generator(0, "vae")).eval()
    latents = torch.randn(batch, vae.config.channels, vae.config.grid, vae.config.grid, generator=rng.generator(0))
    with torch.inference_mode():
        (theirs,) = seconds(lambda: vae.decode(latents))
        vae.to(memory_format=torch.channels_last)
        (ours,) = seconds(lambda: vae.decode(latents))
    return ours, theirs


def report(name: str, ours: float, theirs: float, images: int) -> None:
    """One line."""
    print(
        f"{name:<24} ours {ours / images:8.3f} s/image   theirs {theirs / images:8.3f} s/image   x{theirs / ours:.2f}"
    )


def compare(name: str, ours: Callable[[], Any], theirs: Callable[[], Any], images: int) -> tuple[float, float]:
    """Processor seconds of both, with what they were spent on."""
    mine, other = seconds(ours, theirs)
    report(name, mine, other, images)
    counted, expected = arithmetic(ours), arithmetic(theirs)
    print(
        f"{'  matrix products':<24} ours {counted / images / 1e9:6.1f} GFLOP/image   theirs "
        f"{expected / images / 1e9:6.1f} GFLOP/image   x{expected / counted:.2f}; {counted / mine / 1e9:.0f} and "
        f"{expected / other / 1e9:.0f} GFLOP/s"
    )
    return mine, other


def sampling(model: Any, batch: int, steps: int) -> None:
    """The network and its head alone, then with the autoencoder (KL-16) that makes pixels of the latents."""
    labels, draw = torch.arange(batch), rng.generator(0, "benchmark")
    draws = {
        "uniform": lambda n: torch.rand(n, generator=draw),
        "permutation": lambda n: torch.randperm(n, generator=draw),
        "integer": lambda n: torch.randint(n, (), generator=draw),
        "normal": lambda *shape: torch.randn(shape, generator=draw),
    }
    published = PublishedSampler(model, Process.cosine().betas)
    c = model.config

    def ours() -> None:
        decode(
            LatentBackbone(model),
            canvas=latent_canvas(labels, torch.zeros(batch, c.tokens, c.token_channels)),
            schedule=Independent("exp", steps),
            selector=Random(),
            sampler=DpmSolver(HEAD_STEPS),
            guidance=GuidanceSchedule(GUIDANCE, interval=INTERVAL),
            generators=[rng.generator(i) for i in range(batch)],
        )

    def theirs() -> None:
        published.sample(labels, steps, HEAD_STEPS, GUIDANCE, *INTERVAL, draws)

    mine, other = compare("sampling", ours, theirs, batch)
    if c.token_channels == 16:
        mine_decoding, other_decoding = decoding(16 * c.grid, batch)
        report("sampling and decoding", mine + mine_decoding, other + other_decoding, batch)


def training(model: Any, batch: int) -> None:
    """Forward, backward, AdamW and the average of the weights, at the mean share of masked tokens."""
    c, draw = model.config, rng.generator(1, "benchmark")
    model.train()
    tokens = torch.randn(batch, c.tokens, c.token_channels, generator=draw)
    labels = torch.arange(batch)
    mask = rng.permutation(draw, batch, c.tokens) < round(0.855 * c.tokens)
    objective, process = TokenDiffusion(), Process.cosine()
    mine = build_optimizer(model, OptimConfig(no_decay=("diffloss",)))
    average = EMA(model, 10_000, 1000.0)
    theirs_optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.02)
    theirs_average = [p.detach().clone() for p in model.parameters()]

    def draws(places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        t = torch.randint(0, len(process), (len(places),), generator=draw)
        return t, torch.randn(len(places), c.token_channels, generator=draw)

    def step(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()

    def ours() -> None:
        step(objective.loss(model, tokens, labels, mask, torch.ones_like(mask, dtype=torch.float32), draws), mine)
        average.update(1000, batch)

    def theirs() -> None:
        step(training_step(model, process, tokens, labels, mask, objective.copies), theirs_optimizer)
        with torch.no_grad():
            for kept, p in zip(theirs_average, model.parameters(), strict=True):
                kept.mul_(0.9999).add_(p, alpha=1 - 0.9999)

    compare("training step", ours, theirs, batch)
    with compiling(model):
        ours()
        report("  ours compiled", *seconds(ours, theirs), batch)


def main(size: str = "xsmall-256", batch: str = "2", steps: str = "16") -> None:
    """Print both ratios."""
    torch.set_num_threads(1)
    print(f"{size}, {batch} images, {steps} steps, head {HEAD_STEPS}, float32, 1 thread, torch {torch.__version__}")
    print(f"a large matrix product: {peak() / 1e9:.0f} GFLOP/s")
    model = build(SIZES[size], generator=rng.generator(0, "init")).eval()
    sampling(model, int(batch), int(steps))
    training(model, int(batch))


if __name__ == "__main__":
    main(*sys.argv[1:])
