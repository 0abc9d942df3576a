"""Plans for other people's modules, in the form without multipliers, and under FSDP2."""

from __future__ import annotations

import socket

import pytest
import torch
from torch import distributed, nn

from mmdiff import rng
from mmdiff.models import dit
from mmdiff.models.registry import build
from mmdiff.scale import mup
from mmdiff.scale.coordinates import Trial, coord_check
from mmdiff.scale.initialisers import FAN_IN

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def diffusers_net(heads: int) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=heads,
        joint_attention_dim=12,
        caption_projection_dim=8 * heads,
        pooled_projection_dim=10,
        out_channels=4,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def timm_net(heads: int) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=16, patch_size=8, embed_dim=8 * heads, depth=2, num_heads=heads, num_classes=7)


def plan_of(make, heads: int, readout: str) -> tuple[nn.Module, mup.Plan]:
    with torch.random.fork_rng():
        target, base, probe = make(heads), make(4), make(6)
    return target, mup.plan(target, base, probe=probe, roles={readout: "output"})


@pytest.mark.parametrize(
    ("make", "readout", "vector", "hidden"),
    [
        (diffusers_net, "proj_out.weight", "proj_out.bias", "transformer_blocks.0.norm1.linear.weight"),
        (timm_net, "head.weight", "pos_embed", "blocks.1.attn.qkv.weight"),
    ],
)
def test_one_line_is_enough_for_a_foreign_network(make, readout, vector, hidden):
    target, plan = plan_of(make, 16, readout)
    assert plan.scales == {}
    assert (plan.row(readout).init, plan.row(readout).factors("adamw").lr) == (0.25, 0.25)
    assert plan.row(vector).role in ("vector", "scalar")
    assert (plan.row(hidden).role, plan.row(hidden).init) == ("hidden", 0.5)
    groups = plan.groups(target, lr=1.0, weight_decay=0.1)
    assert sum(len(g["params"]) for g in groups) == len(list(target.parameters()))


def test_a_foreign_network_keeps_its_activations_under_the_form_without_multipliers():
    def trial(rule: str):
        def make(width: int, seed: int) -> Trial:
            with torch.random.fork_rng():
                target, base, probe = (diffusers_net(h) for h in (width // 8, 4, 6))
            plan = mup.plan(target, base, probe=probe, rule=rule, roles={"proj_out.weight": "output"})
            plan.init_(target, rng.generator(seed, "init"), recipe=FAN_IN)
            g = rng.generator(seed, "batch")
            x, goal = rng.normal(g, (2, 8, 4, 8, 8))
            text, pooled, t = rng.normal(g, (8, 5, 12)), rng.normal(g, (8, 10)), 1000 * rng.uniform(g, (8,))
            optimizer = torch.optim.AdamW(plan.groups(target, lr=1e-2), lr=1e-2, weight_decay=0.0)

            def step() -> None:
                out = target(x, text, pooled, t, return_dict=False)[0]
                optimizer.zero_grad()
                (out - goal).square().mean().backward()
                optimizer.step()

            return Trial(target, step)

        return make

    widths = (32, 64, 128, 256)
    assert coord_check(trial("mup"), widths, seeds=2).max_slope <= 0.2
    assert coord_check(trial("sp"), widths, seeds=1).steepest(4).slope >= 0.8


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.filterwarnings("ignore")
def test_groups_of_a_sharded_network_train_it_as_the_whole_one():
    from torch.distributed.fsdp import fully_shard

    base = dit.Config(image_size=4, width=16, depth=1, heads=2, ffn_width=64, classes=3)
    plan = mup.plan(base.with_width(32), base)
    config = mup.with_scales(base.with_width(32), plan)
    x, t, labels = rng.normal(rng.generator(0, "x"), (2, 4, 4, 4)), torch.tensor([1.0, 500.0]), torch.tensor([0, 3])

    def trained(model: nn.Module) -> dict[str, torch.Tensor]:
        optimizer = torch.optim.AdamW(plan.groups(model, lr=1e-2, weight_decay=0.1), lr=1e-2, foreach=False)
        for _ in range(2):
            optimizer.zero_grad()
            (model(x, t, labels) - 1).square().mean().backward()
            optimizer.step()
        return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.state_dict().items()}

    whole = trained(build(config, generator=rng.generator(0, "init")))
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        model = build(config, generator=rng.generator(0, "init"))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        sharded = trained(fully_shard(model, mesh=mesh))
    finally:
        distributed.destroy_process_group()
    assert all(torch.allclose(sharded[k], whole[k], atol=1e-6) for k in whole)
