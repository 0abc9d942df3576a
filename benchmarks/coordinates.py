"""Coordinate checks of every family: the figures and numbers of docs/scaling.md.

    python benchmarks/coordinates.py --out docs/assets          # all families, 3 seeds
    python benchmarks/coordinates.py --families dit --seeds 1

Widths 64 to 512 at 16 channels per head, 4 steps of AdamW at rate 1e-2 on one fixed batch of 8, in three forms: muP,
the standard parametrisation, and muP's initialisation with one rate for all.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from mmdiff.commands.mup import coordinates
from mmdiff.commands.mup_page import draw_check
from mmdiff.config import parse
from mmdiff.models.registry import FAMILIES

WIDTHS = [64, 128, 256, 512]

LANGUAGE = {
    "vocab_size": 64,
    "width": 64,
    "depth": 2,
    "heads": 4,
    "kv_heads": 4,
    "ffn_width": 176,
    "max_length": 64,
    **{"mask_id": 3, "bos_id": 0, "eos_id": 1, "eot_id": 2},
}
CODES = {"type": "maskgit", "grid": 4, "codebook": 16, "classes": 10, "dropout": 0.0}
PART = {"width": 64, "depth": 2, "heads": 4}
TREES: dict[str, dict[str, Any]] = {
    "llada_v": {
        "language": LANGUAGE,
        "vision": {"image_size": 16, "patch_size": 8, "width": 32, "depth": 1, "heads": 2, "ffn_width": 64},
    },
    "emigm": {
        **{"grid": 4, "channels": 4, "classes": 10, "encoder": PART, "decoder": PART, "buffer": 4},
        **{"head_width": 128, "head_depth": 2, "dropout": 0.0, "proj_dropout": 0.0},
    },
    "maskgit": {**CODES, **PART, "ffn_width": 256},
    # Two thirds of this are a multiple of 256 at every width, so that rounding leaves it a scaling of the width alone.
    "maskgit_halton": {**CODES, **PART, "variant": "halton", "ffn_width": 384},
    "dit": {
        **{"image_size": 8, "width": 64, "depth": 3, "heads": 4, "ffn_width": 256, "classes": 10},
        "learned_variance": False,
    },
    "mmdit": {
        **{**PART, "image_size": 8, "channels": 4, "out_channels": 4, "context_channels": 24, "pooled_channels": 20},
        **{"max_grid": 8, "qk_norm": True},
    },
    "masked_mmdit": {
        **{"width": 64, "heads": 4, "depth": 1, "single_depth": 1, "context_channels": 24, "pooled_channels": 20},
        **{"axes": [4, 6, 6], "vocab_size": 20, "codebook": 16, "resample": False},
    },
}


def base_of(name: str) -> Any:
    """A family's configuration at the smallest width."""
    tree = {"type": name, **TREES[name]}
    return parse(FAMILIES[tree["type"]].config, tree, name)


def main() -> None:
    """Check, draw, and print a table of largest slopes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(TREES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="folder for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'family':<14}{'muP, all t':>12}{'standard, t=4':>16}{'one rate, t=4':>16}")
    for name in options.families.split(","):
        reports = coordinates(base_of(name), WIDTHS, seeds=options.seeds)
        ours, standard, plain = reports.values()
        last = [f"{r.steepest(4).slope:>16.2f}" for r in (standard, plain)]
        print(f"{name:<14}{ours.max_slope:>12.3f}{last[0]}{last[1]}   {ours.verdict()}", flush=True)
        if options.out is not None:
            draw_check(options.out / f"coordinates_{name}.svg", reports, name)


if __name__ == "__main__":
    main()
