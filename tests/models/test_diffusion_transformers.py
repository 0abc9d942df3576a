"""DiT, MMDiT and masked MMDiT: sizes of the published networks, what they refuse, and what their options do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmdiff import rng
from mmdiff.config import parse
from mmdiff.errors import CheckpointError, ConfigError
from mmdiff.io.published_diffusion import write_dit, write_mmdit
from mmdiff.models import dit, masked_mmdit, mmdit
from mmdiff.models.dit import DiT
from mmdiff.models.masked_mmdit import MaskedMMDiT
from mmdiff.models.mmdit import MMDiT
from mmdiff.models.registry import build
from mmdiff.sampling.masked_grid import paint

DIT = dit.Config(image_size=4, width=16, depth=2, heads=2, ffn_width=64, classes=3)
MMDIT = mmdit.Config(
    image_size=8,
    channels=3,
    out_channels=3,
    width=16,
    depth=2,
    heads=2,
    context_channels=6,
    pooled_channels=5,
    max_grid=4,
)
MASKED = masked_mmdit.Config(
    width=16,
    heads=2,
    depth=1,
    single_depth=1,
    context_channels=6,
    pooled_channels=5,
    axes=(2, 2, 4),
    vocab_size=10,
    codebook=8,
    resample=True,
)


def trained(config: object) -> nn.Module:
    """A network whose zero-initialised parts have values, so that everything shows in the output."""
    model = build(config, generator=rng.generator(0, "init"))
    for i, p in enumerate(model.parameters()):
        if p.requires_grad and not bool(p.any()):
            p.data = rng.normal(rng.generator(i, "fill"), p.shape) * 0.1
    return model.eval()


def mmdit_inputs(rows: int = 2, side: int = 8) -> tuple[torch.Tensor, ...]:
    g = rng.generator(1, "inputs")
    shapes = ((rows, 3, side, side), (rows,), (rows, 4, 6), (rows, 5))
    return tuple(rng.normal(g, shape) for shape in shapes)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (dit.Config(width=384, depth=12, heads=6, ffn_width=1536), 32_865_056),
        (dit.Config(width=768, depth=12, heads=12, ffn_width=3072), 130_315_808),
        (dit.Config(width=1024, depth=24, heads=16, ffn_width=4096), 457_840_672),
        (dit.Config(), 674_834_720),
        (dit.Config().with_width(288), 42_550_880),
        (mmdit.Config(), 2_028_328_000),
        (mmdit.Config(max_grid=384, qk_norm=True, dual_layers=tuple(range(13))), 2_243_171_520),
        (mmdit.Config(width=2432, depth=38, heads=38, qk_norm=True), 8_056_627_520),
    ],
)
def test_full_size_networks_have_the_published_parameter_counts(config, parameters):
    module = build(config, device="meta")
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == parameters


@pytest.mark.parametrize(
    ("kind", "tree", "message"),
    [
        (dit.Config, {"width": 18, "heads": 4}, "multiple of heads 4"),
        (dit.Config, {"image_size": 9}, "multiple of patch_size 2"),
        (mmdit.Config, {"depth": 2, "dual_layers": [2]}, "beyond the last, 1"),
        (mmdit.Config, {"width": 1538}, "multiple of heads"),
        (mmdit.Config, {"image_size": 9}, "multiple of patch_size 2"),
        (masked_mmdit.Config, {"axes": [16, 56, 54]}, "sum to head_dim 128"),
        (masked_mmdit.Config, {"codebook": 8256}, "it has the mask too"),
        (masked_mmdit.Config, {"width": 1025}, "multiple of heads"),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_refused(kind, tree, message):
    with pytest.raises(ConfigError, match=message):
        parse(kind, {"type": kind.type, **tree}, "here")


def test_width_and_depth_change_what_they_say():
    wide = MMDIT.with_width(32).with_depth(3)
    assert (wide.width, wide.heads, wide.depth) == (32, 4, 3)
    assert DIT.with_width(32).ffn_width == 128
    assert mmdit.Config(dual_layers=(0, 5)).with_depth(3).dual_layers == (0,)
    assert MASKED.with_width(32).heads == 4
    assert masked_mmdit.Config().with_depth(7).single_depth == 14


@torch.inference_mode()
def test_a_dit_refuses_latents_of_another_size():
    with pytest.raises(ConfigError, match=r"latents are \(4, 6, 6\), the network takes \(4, 4, 4\)"):
        DiT(DIT)(torch.zeros(1, 4, 6, 6), torch.zeros(1), torch.zeros(1, dtype=torch.long))


@torch.inference_mode()
def test_an_mmdit_refuses_latents_that_its_table_or_its_patches_do_not_fit():
    model = MMDiT(MMDIT)
    _, *rest = mmdit_inputs(1)
    with pytest.raises(ConfigError, match="do not divide into patches of 2"):
        model(torch.zeros(1, 3, 7, 8), *rest)
    with pytest.raises(ConfigError, match="6 x 4 patches are beyond the position table of 4"):
        model(torch.zeros(1, 3, 12, 8), *rest)


@torch.inference_mode()
def test_rows_of_a_batch_do_not_see_each_other():
    model = trained(MMDIT)
    inputs = mmdit_inputs(3)
    together = model(*inputs)
    alone = torch.cat([model(*(x[i : i + 1] for x in inputs)) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("config", [DIT, MMDIT])
def test_forward_scales_do_what_they_say(config):
    plain = trained(config)
    scaled = build(config.__class__(**{**vars(config), "readout_scale": 0.5}))
    scaled.load_state_dict(plain.state_dict())
    still = build(config.__class__(**{**vars(config), "residual_scale": 1e-9}))
    still.load_state_dict(plain.state_dict())
    x, t, *_ = mmdit_inputs(2, 8 if config is MMDIT else 4)
    given = (x, t, *mmdit_inputs(2)[2:]) if config is MMDIT else (torch.cat((x, x[:, :1]), 1), t, torch.tensor([0, 3]))
    readout = plain.readout if config is MMDIT else plain.final_layer.linear
    whole, half = plain(*given), scaled(*given)
    assert not torch.allclose(whole, half)
    readout.weight.mul_(0.5)
    torch.testing.assert_close(plain(*given), half)

    assert not torch.allclose(still(*given), half)


@torch.inference_mode()
def test_both_kinds_of_masked_network_run_and_say_what_they_cannot():
    model = trained(MASKED)
    g = rng.generator(0, "inputs")
    context, pooled, micro = rng.normal(g, (2, 3, 6)), rng.normal(g, (2, 5)), rng.normal(g, (2, 5))
    codes = torch.full((2, 4, 4), MASKED.mask_id)
    assert model(codes, torch.ones(2), context, pooled, micro).shape == (2, 8, 4, 4)
    with pytest.raises(ConfigError, match="text_vocab_size is null"):
        model.both(codes, torch.ones(2), context, pooled, micro)
    speaking = MaskedMMDiT(masked_mmdit.Config(**{**vars(MASKED), "text_vocab_size": 7, "adapter": True}))
    image, text = speaking.both(codes, torch.ones(2), context, pooled, micro)
    assert (image.shape, text.shape) == ((2, 8, 4, 4), (2, 3, 7))


def test_painting_fills_the_grid_and_each_row_depends_on_its_own_draws_alone():
    model = trained(MASKED)
    g = rng.generator(0, "inputs")
    conditions = rng.normal(g, (2, 3, 6)), rng.normal(g, (2, 5)), rng.normal(g, (2, 5))
    start = torch.full((2, 4, 4), MASKED.mask_id)
    start[:, 0, 0] = 3

    def run(rows: slice) -> torch.Tensor:
        def logits(codes: torch.Tensor, share: float) -> torch.Tensor:
            return model(codes, torch.full((len(codes),), share), *(c[rows] for c in conditions))

        draws = [rng.generator(i, "paint") for i in range(2)][rows]
        return paint(logits, start[rows], MASKED.mask_id, draws, steps=5)

    both = run(slice(0, 2))
    assert bool((both < MASKED.codebook).all())
    assert bool((both[:, 0, 0] == 3).all())
    assert torch.equal(torch.cat((run(slice(0, 1)), run(slice(1, 2)))), both)


def test_layouts_without_a_field_for_a_scale_say_so():
    with pytest.raises(CheckpointError, match="residual_scale and attention_scale"):
        write_dit(dit.Config(residual_scale=0.5))
    with pytest.raises(CheckpointError, match=r"fold it into the weight with mmdiff\.scale\.mup\.fold"):
        write_mmdit(mmdit.Config(readout_scale=0.5))
