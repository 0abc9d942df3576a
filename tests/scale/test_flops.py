"""Counts: closed forms, PyTorch's counter, and the published numbers, against each other."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmdiff import rng
from mmdiff.errors import ConfigError
from mmdiff.models import dit, mmdit, vq
from mmdiff.models.registry import build
from mmdiff.scale import flops
from mmdiff.scale.trials import PROBLEMS, TEXT_TOKENS
from tests.scale.test_mup import CONFIGS

TINY = CONFIGS["mmdit"]


@pytest.mark.parametrize("name", [n for n, config in CONFIGS.items() if config.type in PROBLEMS])
def test_counts_without_memory_are_those_of_a_real_pass(name):
    config = CONFIGS[name]
    counted = flops.count(config)
    problem, model = PROBLEMS[config.type], build(config)
    inputs = problem.inputs(config, 1, rng.generator(0, "count"))
    # PyTorch's counter has no entry for the fused attention of CPUs, so attention is two products here.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        problem.run(model, inputs)
    assert counted["flops"] == counter.get_total_flops()
    assert counted["training_flops"] == 3 * counted["flops"]
    assert counted["parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert "target" not in counted["example"]


@pytest.mark.parametrize(
    ("config", "gigamacs"),
    [
        (dit.Config(width=384, depth=12, heads=6, ffn_width=1536), 6.06),
        (dit.Config(width=768, depth=12, heads=12, ffn_width=3072), 23.01),
        (dit.Config(width=1024, depth=24, heads=16, ffn_width=4096), 80.70),
        (dit.Config(), 118.62),
        (dit.Config(image_size=64), 524.5),
        (CONFIGS["dit"], None),
    ],
)
def test_closed_forms_of_dit_are_the_counts_and_the_published_numbers(config, gigamacs):
    counted = flops.count(config)
    assert flops.dit_macs(config) == counted["macs"]
    assert flops.dit_parameters(config) == counted["parameters"]
    if gigamacs is not None:
        assert counted["macs"] / 1e9 == pytest.approx(gigamacs, abs=0.006 if gigamacs < 200 else 0.06)


@pytest.mark.parametrize("config", [TINY, mmdit.Config(), mmdit.Config(qk_norm=True, dual_layers=(0, 1))])
def test_closed_forms_of_mmdit_are_the_counts(config):
    counted = flops.count(config)
    images = (min(config.image_size // config.patch_size, config.max_grid)) ** 2
    assert flops.mmdit_macs(config, images, TEXT_TOKENS) == counted["macs"]
    assert flops.mmdit_parameters(config) == counted["parameters"]


def test_a_family_without_a_small_problem_is_named():
    with pytest.raises(ConfigError, match="family 'vq' has no small problem yet; known: llada"):
        flops.count(vq.Config())
