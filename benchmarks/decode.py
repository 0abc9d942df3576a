"""Tokens per second of the engine's presets and caches beside the published algorithm, on one random network.

Run: ``python benchmarks/decode.py [--threads 2] [--dtype float32] [--device cpu] [--passes 8] [--repeats 3]``; with
``--clock cpu --threads 1`` it counts processor time, for a machine that has other work to do.

The baseline is a plain transcription of LLaDA's published sampler (`published`): in every pass the whole canvas goes
through the network, all logits are computed, and confidences are taken in float64. It calls the same network as the
engine, and ``tests/benchmarks/test_decode.py`` holds it against the golden data. The network has about 100M parameters
without embeddings and the real vocabulary of 126,464; its weights are random, so the number of tokens that a threshold
decides says nothing about a trained model (the head is sharpened so that thresholds cut somewhere).

All rows but the last two stand for one pass per token. Of each block ``--passes`` passes are timed, ``--repeats`` times
over, and extrapolated: the first pass of a block counts once, the median of the others for the rest (of the rows
without a cache, in which all passes cost the same, only the first block is timed). ``fast`` and ``turbo`` run from end
to end. The limit of a run is the sum over its passes of max(FLOPs / peak, bytes / bandwidth), with peak and bandwidth
measured on the spot.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmdiff import rng
from mmdiff.models.llada import Config, LLaDA
from mmdiff.nn.store import Store
from mmdiff.sampling import Canvas, Dual, Fixed, Linear, Pass, Prefix, TextBackbone, steps
from mmdiff.sampling.presets import text_parts

SHARPNESS = 9.0
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@torch.no_grad()
def published(
    model: LLaDA,
    prompt: Tensor,
    *,
    gen_length: int,
    block_length: int,
    steps: int,
    cfg_scale: float = 0.0,
    valid: Tensor | None = None,
    never: tuple[int, ...] = (),
    last: tuple[int, ...] = (),
    scores: torch.dtype = torch.float64,
) -> Iterator[Tensor]:
    """LLaDA's published sampler at temperature 0, written down as plainly as it can be; yields every canvas.

    Args:
        model: Called on whole canvases.
        prompt: Int64 [B, P].
        gen_length: Masks behind the prompt.
        block_length: Divides gen_length.
        steps: Passes; the number of blocks divides it.
        cfg_scale: Guidance - 1.
        valid: Bool [B, P], False = padding on the left.
        never: Ids whose logits are -inf (``logits_eos_inf``).
        last: Ids whose confidence is 0 (``confidence_eos_eot_inf``).
        scores: Precision of the confidence.
    """
    mask_id, rows = model.config.mask_id, len(prompt)
    x = torch.cat((prompt, prompt.new_full((rows, gen_length), mask_id)), 1)
    seen = None if valid is None else torch.cat((valid, valid.new_ones(rows, gen_length)), 1)
    known = x != mask_id
    blocks = gen_length // block_length
    for block in range(blocks):
        end = prompt.shape[1] + (block + 1) * block_length
        masks = (x[:, end - block_length : end] == mask_id).sum(1, keepdim=True)
        share, rest = masks // (steps // blocks), masks % (steps // blocks)
        for step in range(steps // blocks):
            masked = x == mask_id
            logits = model(x, valid=seen)
            if cfg_scale:
                blank = model(x.masked_fill(known, mask_id), valid=seen)
                logits = blank + (cfg_scale + 1) * (logits - blank)
            logits[..., list(never)] = -torch.inf
            choice = logits.argmax(-1)
            logits[..., list(last)] = -torch.inf
            confidence = F.softmax(logits.to(scores), -1).gather(-1, choice[..., None])[..., 0]
            confidence[:, end:] = -torch.inf
            confidence = confidence.masked_fill(~masked, -torch.inf)
            for row, count in enumerate((share + (step < rest))[:, 0].tolist()):
                best = confidence[row].topk(count).indices
                x[row, best] = choice[row, best]
            yield x


@dataclass(frozen=True)
class Machine:
    """Largest rates seen here: FLOP/s of a large product, bytes/s of reading a large tensor."""

    peak: float
    bandwidth: float

    @classmethod
    def measure(cls, dtype: torch.dtype, device: torch.device, clock: str) -> Machine:
        """Best of several tries."""
        n = 2048 if device.type == "cpu" else 8192
        a = torch.ones(n, n, dtype=dtype, device=device)
        x = torch.ones(2**28 if device.type == "cpu" else 2**30, dtype=torch.uint8, device=device).view(torch.float32)
        flops = max(2 * n**3 / seconds(lambda: a @ a, device, clock) for _ in range(5))
        return cls(flops, max(x.numel() * 4 / seconds(x.sum, device, clock) for _ in range(5)))

    def limit(self, config: Config, dtype: torch.dtype, passes: list[Pass]) -> float:
        """Seconds that these passes take at least."""
        d, layers, size = config.width, config.depth, dtype.itemsize
        kv = d // config.heads * config.kv_heads
        body, head = layers * (2 * d * d + 2 * d * kv + 3 * d * config.ffn_width), d * config.vocab_size
        total = 0.0
        for p in passes:
            flops = 2 * p.rows * p.computed * (body + 2 * p.slots * d * layers) + 2 * p.rows * p.read * head
            moved = size * (body + head) + 2 * size * p.rows * (p.slots + p.computed) * kv * layers
            total += max(flops / self.peak, (moved + 4 * p.rows * p.read * config.vocab_size) / self.bandwidth)
        return total


def seconds(work: Callable[[], Any], device: torch.device, clock: str) -> float:
    """Time of some work, waited for."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = CLOCKS[clock]()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return CLOCKS[clock]() - start


@dataclass(frozen=True)
class Measured:
    """One line of the table."""

    name: str
    tokens: int
    seconds: float
    passes: list[Pass]
    how: str


@dataclass
class Bench:
    """What is measured, on what."""

    model: LLaDA
    machine: Machine
    device: torch.device
    dtype: torch.dtype
    prompt_length: int
    gen_length: int
    block_length: int
    passes: int
    repeats: int
    clock: str

    def prompt(self, rows: int = 1) -> Tensor:
        """Random ids that are no special ones."""
        draw = rng.uniform(rng.generator(0, "prompt"), (rows, self.prompt_length))
        return (draw * 126_000).long().to(self.device)

    def baseline(self, name: str, scores: torch.dtype) -> Measured:
        """The transcription: one pass per token."""
        slots = self.prompt_length + self.gen_length

        def run() -> Iterator[Any]:
            sizes = {"gen_length": self.gen_length, "block_length": self.block_length, "steps": self.gen_length}
            return published(self.model, self.prompt(), scores=scores, **sizes)

        times = [
            seconds(lambda r=run: [*islice(r(), self.passes)], self.device, self.clock) for _ in range(self.repeats)
        ]
        taken = statistics.median(times) / self.passes * self.gen_length
        return Measured(name, self.gen_length, taken, [Pass(1, slots, slots, slots)] * self.gen_length, self._how())

    def engine(self, name: str, parts: dict[str, Any]) -> Measured:
        """The engine: one pass per token."""
        blocks = self.gen_length // self.block_length if parts["cache"] else 1
        steps_ = self.passes * self.gen_length // self.block_length
        runs = [self._timed({**parts, "schedule": Linear(steps_)}, blocks * self.passes) for _ in range(self.repeats)]
        taken, passes = 0.0, []
        for k in range(self.gen_length // self.block_length):
            at = slice(k % blocks * self.passes, (k % blocks + 1) * self.passes)
            first, *others = zip(*(times[at] for times, _ in runs), strict=True)
            taken += statistics.median(first) + (self.block_length - 1) * statistics.median(sum(others, ()))
            costs = runs[0][1][at]
            reads = range(self.block_length, 0, -1)
            passes += [replace(costs[0] if n == self.block_length else costs[1], read=n) for n in reads]
        return Measured(name, self.gen_length, taken, passes, self._how())

    def whole(self, name: str, parts: dict[str, Any]) -> Measured:
        """The engine from end to end."""
        runs = [self._timed(parts, None) for _ in range(self.repeats)]
        taken = statistics.median(sum(times) for times, _ in runs)
        return Measured(name, self.gen_length, taken, runs[0][1], f"whole run x {self.repeats}")

    def windows(self, block: int, rows: int) -> float:
        """Tokens per second of dual-cached one-block passes alone (the refreshing passes are left out)."""
        bench = replace(self, prompt_length=128, gen_length=block)
        parts = {"blocks": Fixed(block), "schedule": Linear(), "cache": Dual()}
        times, _ = bench._timed(parts, min(block, 1 + self.passes), rows)
        return rows / statistics.median(times[1:])

    def _timed(self, parts: dict[str, Any], count: int | None, rows: int = 1) -> tuple[list[float], list[Pass]]:
        """Seconds and cost of the first ``count`` passes (None = all)."""
        costs: list[Pass] = []
        watched = Watched(self.model, costs)
        run = steps(watched, self.prompt(rows).tolist(), length=self.gen_length, **parts)
        times: list[float] = []
        while count is None or len(times) < count:
            before = len(costs)
            taken = seconds(lambda: next(run, None), self.device, self.clock)
            if len(costs) == before:
                break
            times.append(taken)
        return times, costs

    def _how(self) -> str:
        return f"{self.passes} passes per block x {self.repeats}, extrapolated"


class Watched(TextBackbone):
    """Notes the cost of every pass."""

    def __init__(self, model: LLaDA, costs: list[Pass]) -> None:
        super().__init__(model)
        self._costs = costs

    def forward(
        self, canvas: Canvas, index: Tensor, store: Store | None = None, compute: Tensor | None = None
    ) -> Tensor:
        """As the text backbone's."""
        rows, slots = canvas.tokens.shape
        self._costs.append(Pass(rows, slots if compute is None else compute.shape[1], slots, index.shape[1]))
        return super().forward(canvas, index, store, compute)


def network(dtype: torch.dtype, device: torch.device) -> LLaDA:
    """About 100M parameters without embeddings, the real vocabulary, a head that is sure now and then."""
    config = Config(width=768, depth=12, heads=12, kv_heads=12, ffn_width=2560)
    model = LLaDA(config, generator=rng.generator(0, "init")).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(SHARPNESS)
    return model.to(dtype=dtype, device=device)


def table(bench: Bench, scores: torch.dtype) -> Iterator[str]:
    """Lines, as they are measured."""
    words = {"gen_length": bench.gen_length, "block_length": bench.block_length, "end_ids": (126081, 126348)}
    parts = {p: {**text_parts(preset=p, **words).arguments(), "exit": None} for p in ("exact", "fast", "turbo")}
    rows: list[Callable[[], Measured]] = [
        lambda: bench.baseline("published", scores),
        lambda: bench.engine("exact", parts["exact"]),
        lambda: bench.engine("exact + prefix cache", {**parts["exact"], "cache": Prefix()}),
        lambda: bench.engine("exact + dual cache", {**parts["exact"], "cache": Dual()}),
        lambda: bench.whole("fast", parts["fast"]),
        lambda: bench.whole("turbo", parts["turbo"]),
    ]
    yield (
        f"{'':26} {'tokens/s':>9} {'ratio':>7} {'passes':>7} {'slots':>8} {'tok/pass':>9} {'seconds':>8} "
        f"{'limit':>7} {'of limit':>8}  how"
    )
    first = 0.0
    for row in rows:
        m = row()
        speed, count = m.tokens / m.seconds, len(m.passes)
        first = first or speed
        limit = bench.machine.limit(bench.model.config, bench.dtype, m.passes)
        slots = sum(p.rows * p.computed for p in m.passes)
        yield (
            f"{m.name:26} {speed:9.2f} {speed / first:6.1f}x {count:7} {slots:8} {m.tokens / count:9.2f} "
            f"{m.seconds:8.1f} {limit:7.1f} {limit / m.seconds:8.0%}  {m.how}"
        )


def batches(bench: Bench) -> Iterator[str]:
    """What a batch of 8 gains where a pass is a small block."""
    yield "one-block passes of a dual cache behind a prompt of 128, tokens/s at batch 1 and 8:"
    for block in (4, bench.block_length):
        one, eight = (statistics.median(bench.windows(block, n) for _ in range(bench.repeats)) for n in (1, 8))
        config, slots = bench.model.config, 128 + block
        ideal = [bench.machine.limit(config, bench.dtype, [Pass(n, block, slots, block - 1)]) for n in (1, 8)]
        yield f"  block {block:3}: {one:8.2f} {eight:8.2f} {eight / one:6.1f}x (limit {8 * ideal[0] / ideal[1]:.1f}x)"


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--answer", type=int, default=128)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--passes", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scores", default="float64", help="precision of the baseline's confidence")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    args = parser.parse_args(argv)
    if args.clock == "cpu" and (args.threads != 1 or args.device != "cpu"):
        parser.error("--clock cpu needs --threads 1 and --device cpu: the time of several threads is no duration")
    torch.set_num_threads(args.threads)
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    machine = Machine.measure(dtype, device, args.clock)
    model = network(dtype, device)
    say(
        f"{args.device}, {args.threads} threads, {args.dtype}, {args.clock} time: {machine.peak / 1e9:.0f} GFLOP/s, "
        f"{machine.bandwidth / 1e9:.1f} GB/s; batch 1, prompt {args.prompt}, answer {args.answer}, block {args.block}"
    )
    bench = Bench(
        model, machine, device, dtype, args.prompt, args.answer, args.block, args.passes, args.repeats, args.clock
    )
    for line in table(bench, getattr(torch, args.scores)):
        say(line)
    say("")
    for line in batches(bench):
        say(line)


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
