"""Memory and time of one fine-tuning step: logits at masked answer positions in chunks, against all logits at once.

Both sides run the same network on the same noise, each in a process of its own, because the peak of a process cannot
be taken back. The plain side is what published trainers do: logits of every position, cast to float32, cross-entropy
over all of them with the masked ones selected afterwards. Printed are the peak of resident memory above the state just
before the step, the time of a step (median), and the ratios.

    python benchmarks/sft_memory.py
    python benchmarks/sft_memory.py --width 256 --depth 2 --length 2048 --answer 256 --vocab 126464
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from mmdiff.diffusion.masking import mask_probability
from mmdiff.diffusion.objectives import chunked_cross_entropy
from mmdiff.models.llada import Config, LLaDA


def build(options: argparse.Namespace) -> LLaDA:
    """A small network with the vocabulary of the real one."""
    shape = Config(
        vocab_size=options.vocab,
        width=options.width,
        depth=options.depth,
        heads=options.width // 32,
        kv_heads=options.width // 32,
        ffn_width=3 * options.width,
        mask_id=options.vocab - 1,
        bos_id=1,
        eos_id=2,
        eot_id=3,
    )
    model = LLaDA(shape, generator=torch.Generator().manual_seed(0)).to(getattr(torch, options.dtype))
    model.lm_head.requires_grad_(not options.frozen_head)
    return model


def plain(model: LLaDA, ids: torch.Tensor, labels: torch.Tensor, masked: torch.Tensor, p: float) -> torch.Tensor:
    """Logits of every position."""
    logits = model(ids).float()
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(masked)
    return losses[masked].sum() / p


def chunked(model: LLaDA, ids: torch.Tensor, labels: torch.Tensor, masked: torch.Tensor, p: float) -> torch.Tensor:
    """Logits of masked positions."""
    hidden = model.hidden(ids)
    return chunked_cross_entropy(hidden[masked], labels[masked], model.head).sum() / p


def none(model: LLaDA, ids: torch.Tensor, labels: torch.Tensor, masked: torch.Tensor, p: float) -> torch.Tensor:
    """No head at all: what a step takes besides the loss."""
    return model.hidden(ids)[masked].float().sum() / p + 0 * model.lm_head.weight[0].float().sum()


SIDES = {"plain": plain, "chunked": chunked, "none": none}


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One side, in this process."""
    torch.set_num_threads(options.threads)
    model, draw = build(options), torch.Generator().manual_seed(1)
    labels = torch.randint(4, options.vocab - 1, (1, options.length), generator=draw)
    answer = torch.arange(options.length) >= options.length - options.answer
    p = float(mask_probability(torch.tensor([options.t])))
    masked = ((torch.rand(1, options.length, generator=draw) < p) & answer).view(1, -1)
    ids = labels.masked_fill(masked, model.config.mask_id)
    for parameter in model.parameters():  # gradients exist in every real step but the first
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    before, seconds, loss = status("VmRSS"), [], torch.zeros(())
    for _ in range(options.repeats):
        start = time.perf_counter()
        loss = SIDES[options.side](model, ids, labels, masked, p)
        loss.backward()
        seconds.append(time.perf_counter() - start)
    return {
        "extra_mib": (status("VmHWM") - before) / 2**20,
        "seconds": statistics.median(seconds[1:] or seconds),
        "loss": float(loss.detach()),
        "masked": int(masked.sum()),
    }


def status(field: str) -> int:
    """Bytes that the kernel tells of this process; what getrusage tells as its peak may be its parent's."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    """Run every side in its own process and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--answer", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=126464)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--t", type=float, default=0.5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--frozen-head", action="store_true")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side", choices=SIDES, help="run one side in this process and print JSON")
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options)))
        return
    found = {}
    for side in SIDES:
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--side", side], stdout=subprocess.PIPE)
        done.check_returncode()
        found[side] = json.loads(done.stdout)
        print(f"{side:<8} {json.dumps(found[side])}", flush=True)
    base = found["none"]["extra_mib"]
    plain_mib, ours = found["plain"]["extra_mib"] - base, found["chunked"]["extra_mib"] - base
    print(f"memory of the loss: plain {plain_mib:,.0f} MiB, chunked {ours:,.0f} MiB, ratio {ours / plain_mib:.3f}")
    print(f"memory of the step: ratio {found['chunked']['extra_mib'] / found['plain']['extra_mib']:.3f}")
    print(f"time of the step:   ratio {found['chunked']['seconds'] / found['plain']['seconds']:.3f}")
    print(f"loss differs by     {abs(found['chunked']['loss'] / found['plain']['loss'] - 1):.1e} of itself")


if __name__ == "__main__":
    main()
