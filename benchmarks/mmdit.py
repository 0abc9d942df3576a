"""A training step of MMDiT beside diffusers' SD3Transformer2DModel: same weights, same inputs, one run.

    python benchmarks/mmdit.py                      # small enough for two CPU cores
    python benchmarks/mmdit.py --device cuda --compile --depth 24 --heads 24 --head-dim 64 --side 64

Each round times a forward and a backward pass of both networks, in turns, so that a busy machine slows both; printed
are medians and the ratio of diffusers' time to ours (above 1: ours is faster), and the largest difference of outputs
and gradients.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmdiff.io.layouts import LAYOUTS
from mmdiff.models.mmdit import Config, MMDiT


def networks(o: argparse.Namespace) -> tuple[MMDiT, nn.Module]:
    """Ours with random weights, and diffusers' with the same."""
    from diffusers import SD3Transformer2DModel

    width = o.heads * o.head_dim
    ours = MMDiT(
        Config(
            image_size=o.side,
            width=width,
            depth=o.depth,
            heads=o.heads,
            context_channels=o.text_channels,
            pooled_channels=o.text_channels,
            max_grid=o.side,
            qk_norm=True,
        ),
        generator=torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        for i, p in enumerate(ours.parameters()):
            if not p.any():
                p.normal_(0, 0.02, generator=torch.Generator().manual_seed(i))
    theirs = SD3Transformer2DModel(
        sample_size=o.side,
        num_layers=o.depth,
        attention_head_dim=o.head_dim,
        num_attention_heads=o.heads,
        joint_attention_dim=o.text_channels,
        caption_projection_dim=width,
        pooled_projection_dim=o.text_channels,
        pos_embed_max_size=o.side,
        qk_norm="rms_norm",
    )
    names = LAYOUTS["sd3"].keys
    theirs.load_state_dict({names.backward(k): v for k, v in ours.state_dict().items()})
    return ours.train().to(o.device), theirs.train().to(o.device)


def inputs(o: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, times, text features and pooled text."""
    g = torch.Generator().manual_seed(1)
    b, j = o.batch, o.text_channels
    shapes = ((b, 16, o.side, o.side), (b,), (b, o.words, j), (b, j))
    x, t, context, pooled = (torch.randn(shape, generator=g).to(o.device) for shape in shapes)
    return x, 500 + 100 * t, context, pooled


def timed(step: Callable[[], Tensor], device: str) -> float:
    """Seconds of one step."""
    started = time.perf_counter()
    step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Time both and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"depth": 4, "heads": 6, "head-dim": 64, "side": 32, "words": 77, "batch": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--text-channels", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    o = parser.parse_args()
    ours, theirs = networks(o)
    given = inputs(o)

    def run_theirs(net: Callable[..., tuple[Tensor, ...]]) -> Tensor:
        x, t, context, pooled = given
        return net(x, context, pooled, t, return_dict=False)[0]

    first = torch.compile(ours) if o.compile else ours
    second = torch.compile(theirs) if o.compile else theirs

    def step(output: Tensor, net: nn.Module) -> Tensor:
        net.zero_grad(set_to_none=True)
        output.square().mean().backward()
        return output

    a, b = step(first(*given), ours), step(run_theirs(second), theirs)
    gradient = dict(theirs.named_parameters())
    names = LAYOUTS["sd3"].keys
    apart = max(float((p.grad - gradient[names.backward(n)].grad).abs().max()) for n, p in ours.named_parameters())
    print(f"largest difference: outputs {float((a - b).abs().max()):.1e}, gradients {apart:.1e}")
    times: list[tuple[float, float]] = []
    for _ in range(o.rounds):
        one = timed(lambda: step(first(*given), ours), o.device)
        times.append((one, timed(lambda: step(run_theirs(second), theirs), o.device)))
    mine, other = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(b / a for a, b in times)
    print(f"mmdiff {mine * 1e3:.1f} ms, diffusers {other * 1e3:.1f} ms per step; ratio {ratio:.2f}x")


if __name__ == "__main__":
    main()
