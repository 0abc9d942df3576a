from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmdiff.batch import IGNORE, IMAGE, Batch
from mmdiff.models import llada, llada_v, vision
from mmdiff.models.registry import build
from mmdiff.training.finetune import LoraConfig
from mmdiff.training.loop import TrainConfig
from mmdiff.training.memory import estimate
from mmdiff.training.objective import Masked

LANGUAGE = llada.Config(
    vocab_size=8000, width=256, depth=4, heads=4, kv_heads=4, ffn_width=768, mask_id=60, bos_id=1, eos_id=61, eot_id=62
)
TOWER = vision.Config(image_size=28, patch_size=14, width=32, depth=2, heads=2, ffn_width=64)
SMALL = llada_v.Config(language=LANGUAGE, vision=TOWER)
MIB = 2**20


def one(config: llada_v.Config, length: int, answer: int) -> Batch:
    features, size = config.vision.tokens, config.vision.image_size
    ids = torch.randint(70, 8000, (1, features + length), generator=torch.Generator().manual_seed(0))
    ids[0, 3 : 3 + features] = IMAGE
    labels = torch.full_like(ids, IGNORE)
    labels[0, -answer:] = ids[0, -answer:]
    return Batch(
        keys=("a",),
        tasks=("chat",),
        ids=ids,
        labels=labels,
        weights=(labels != IGNORE).float(),
        droppable=torch.zeros_like(ids, dtype=torch.bool),
        valid=torch.ones_like(ids, dtype=torch.bool),
        pixels=torch.zeros(1, 3, size, size),
    )


def measured(checkpointing: bool) -> int:
    """Bytes a process needs for a step beyond its weights, by its own account of its highest resident memory."""
    code = Path(__file__).read_text("utf-8") + f"\nprint(json.dumps(peak_of_a_step({checkpointing})))\n"
    # Freed blocks go back to the system at once, so that resident memory is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def peak_of_a_step(checkpointing: bool) -> int:
    torch.set_num_threads(1)
    tiny = llada_v.Config(language=LANGUAGE.with_width(64).with_depth(1), vision=TOWER)
    config = TrainConfig(samples=1, gradient_checkpointing=checkpointing)
    # The first step of a process loads libraries.
    estimate(build(tiny, generator=torch.Generator().manual_seed(0)), Masked(), one(tiny, 16, 8), config)
    model = build(SMALL, generator=torch.Generator().manual_seed(0))
    before = status("VmRSS")
    estimate(model, Masked(masking="independent"), one(SMALL, 1500, 200), config)
    return status("VmHWM") - before


def status(field: str) -> int:
    """Bytes that the kernel tells of this process; what getrusage tells as its peak may be its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_of_shapes_is_near_what_a_process_really_takes(checkpointing):
    config = TrainConfig(samples=1, gradient_checkpointing=checkpointing)
    planned = estimate(build(SMALL, device="meta"), Masked(masking="independent"), one(SMALL, 1500, 200), config)
    step = planned.gradients + planned.activations + planned.logits
    assert 0.6 * step < measured(checkpointing) < 1.5 * step


def test_shapes_alone_tell_what_the_real_pass_tells():
    config = TrainConfig(samples=1)
    real = estimate(build(SMALL, generator=torch.Generator().manual_seed(0)), Masked(), one(SMALL, 200, 50), config)
    planned = estimate(build(SMALL, device="meta"), Masked(), one(SMALL, 200, 50), config)
    for part in ("parameters", "trainable", "weights", "gradients", "optimizer", "logits", "total"):
        assert getattr(planned, part) == pytest.approx(getattr(real, part), rel=0.1)
    assert real.losses
    assert not planned.losses


def test_checkpointing_keeps_a_fraction_of_the_activations_and_an_adapter_a_fraction_of_the_rest():
    def of(**options) -> object:
        config = TrainConfig(samples=1, **options)
        return estimate(build(SMALL, device="meta"), Masked(), one(SMALL, 1000, 200), config)

    full, twice, lora = of(), of(gradient_checkpointing=True), of(lora=LoraConfig(rank=4))
    assert twice.activations < 0.5 * full.activations
    assert twice.gradients == full.gradients
    assert lora.optimizer < 0.05 * full.optimizer
    assert lora.parameters - lora.trainable == full.parameters


def test_the_published_8b_model_is_estimated_without_being_allocated():
    config = llada_v.Config()
    model = build(config, device="meta").to(torch.bfloat16)
    batch = one(config, 2048, 256)
    found = estimate(model, Masked(masking="independent"), batch, TrainConfig(samples=1, gradient_checkpointing=True))
    assert found.parameters == 8_434_837_024
    assert found.weights == 2 * found.parameters
    assert found.optimizer == 2 * found.gradients == 4 * found.trainable
    # A block's input per layer, and one block in full.
    slots, inputs = batch.ids.numel(), 32 * 4096 * 2
    assert slots * inputs < found.activations < 4 * slots * inputs
    assert found.logits < 600 * MIB
