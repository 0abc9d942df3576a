"""Single files of Stable Diffusion 3 and diffusers' DiT: key names written down here, not taken from mmdiff."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdiff import rng
from mmdiff.errors import CheckpointError
from mmdiff.io import regroup
from mmdiff.io.convert import convert
from mmdiff.io.published_stability import write_diffusers_dit, write_stability
from mmdiff.io.tensors import open_files
from mmdiff.models import dit, mmdit
from mmdiff.models.registry import build, load_model

MMDIT = mmdit.Config(
    image_size=128,
    channels=3,
    out_channels=3,
    width=32,
    depth=3,
    heads=4,
    context_channels=6,
    pooled_channels=5,
    max_grid=6,
    dual_layers=(0, 1),
    qk_norm=True,
)
DIT = dit.Config(image_size=6, width=24, depth=3, heads=3, ffn_width=96, classes=5)
STREAM = {
    "modulation": "adaLN_modulation.1",
    "attn.out": "attn.proj",
    "attn.q_norm": "attn.ln_q",
    "attn.k_norm": "attn.ln_k",
    "attn2.out": "attn2.proj",
    "attn2.q_norm": "attn2.ln_q",
    "attn2.k_norm": "attn2.ln_k",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
ENDS = {
    "patch": "x_embedder.proj",
    "time.mlp.0": "t_embedder.mlp.0",
    "time.mlp.2": "t_embedder.mlp.2",
    "pooled.mlp.0": "y_embedder.mlp.0",
    "pooled.mlp.2": "y_embedder.mlp.2",
    "context": "context_embedder",
    "modulation": "final_layer.adaLN_modulation.1",
    "readout": "final_layer.linear",
}


def trained(config):
    model = build(config, generator=rng.generator(0))
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter += 0.1 * rng.normal(rng.generator(1), parameter.shape)
    return model.eval()


def as_stability(config, state):
    """The single file of a network of ours."""
    out = {"pos_embed": state["pos_embed"]}
    for name, tensor in state.items():
        found = re.fullmatch(r"blocks\.(\d+)\.(image|text)\.(.+)\.(weight|bias)", name)
        if found:
            i, stream, part, kind = found.groups()
            prefix = f"joint_blocks.{i}.{'x_block' if stream == 'image' else 'context_block'}"
            if part in STREAM:
                out[f"{prefix}.{STREAM[part]}.{kind}"] = tensor
            elif part.endswith(".q"):
                parts = [state[name.replace(f"{part}.", f"{part[:-1]}{x}.")] for x in "qkv"]
                out[f"{prefix}.{part[:-2]}.qkv.{kind}"] = torch.cat(parts)
        elif name != "pos_embed":
            part, _, kind = name.rpartition(".")
            out[f"{ENDS[part]}.{kind}"] = tensor
    for owner in ("final_layer", f"joint_blocks.{config.depth - 1}.context_block"):
        for kind in ("weight", "bias"):
            scale, shift = out[f"{owner}.adaLN_modulation.1.{kind}"].chunk(2)
            out[f"{owner}.adaLN_modulation.1.{kind}"] = torch.cat((shift, scale))
    return out


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file_is_loaded_by_its_keys_alone(tmp_path, prefix):
    model = trained(MMDIT)
    tensors = {f"{prefix}{k}": v.contiguous() for k, v in as_stability(MMDIT, model.state_dict()).items()}
    if prefix:
        tensors["first_stage_model.decoder.conv_in.weight"] = torch.zeros(3)
        tensors["text_encoders.clip_l.x"] = torch.zeros(3)
    save_file(tensors, tmp_path / "sd3.safetensors")
    loaded = load_model(tmp_path / "sd3.safetensors")
    assert loaded.config == MMDIT
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_network_of_ours_becomes_a_single_file_and_comes_back(tmp_path):
    model = trained(MMDIT)
    model.save_pretrained(tmp_path / "ours")
    done = convert(tmp_path / "ours", tmp_path / "theirs", to="sd3-single")
    assert (done.source, done.target) == ("mmdiff", "sd3-single")
    found = load_file(tmp_path / "theirs" / "model.safetensors")
    want = {f"model.diffusion_model.{k}": v for k, v in as_stability(MMDIT, model.state_dict()).items()}
    assert found.keys() == want.keys()
    assert all(torch.equal(found[k], want[k]) for k in want)
    convert(tmp_path / "theirs", tmp_path / "again")
    again = load_model(tmp_path / "again")
    assert again.config == MMDIT
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())
    convert(tmp_path / "again", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["_class_name"] == "MMDiTX"


@torch.inference_mode()
def test_the_dit_of_diffusers_is_loaded_and_computes_the_same(tmp_path):
    """But for its sinusoid of time and the epsilon of one norm, which are set to the original's."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    theirs = DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=6,
        patch_size=2,
        num_embeds_ada_norm=5,
    ).eval()
    for parameter in theirs.parameters():
        parameter += 0.1 * torch.randn(parameter.shape)
    shared = theirs.transformer_blocks[0].norm1.emb
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(shared.state_dict())
    theirs.save_pretrained(tmp_path / "theirs")
    ours = dit.DiT.from_pretrained(tmp_path / "theirs")
    assert ours.config == DIT
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm1.norm.eps = block.norm3.eps = 1e-6
    x, t, labels = rng.normal(rng.generator(0), (2, 4, 6, 6)), torch.tensor([3.0, 700.0]), torch.tensor([1, 4])
    want = theirs(x, timestep=t, class_labels=labels).sample
    torch.testing.assert_close(ours(x, t, labels), want, atol=2e-5, rtol=1e-4)
    convert(tmp_path / "theirs", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    files = [tmp_path / "theirs" / "diffusion_pytorch_model.safetensors", tmp_path / "back" / "model.safetensors"]
    before, after = map(load_file, files)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_dit_of_ours_gets_the_names_of_diffusers(tmp_path):
    from diffusers import DiTTransformer2DModel

    model = trained(DIT)
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to="dit-diffusers")
    theirs = DiTTransformer2DModel.from_config(json.loads((tmp_path / "theirs" / "config.json").read_text()))
    theirs.load_state_dict(load_file(tmp_path / "theirs" / "model.safetensors"))
    again = dit.DiT.from_pretrained(tmp_path / "theirs")
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())


def test_what_a_layout_has_no_place_for_is_said():
    import dataclasses

    with pytest.raises(CheckpointError, match="positions of 64 patches per side, which is 128 here; convert to sd3"):
        write_stability(dataclasses.replace(MMDIT, image_size=8))
    with pytest.raises(CheckpointError, match="diffusers' DiT has 4 times the width, 96"):
        write_diffusers_dit(dataclasses.replace(DIT, ffn_width=48))
    with pytest.raises(CheckpointError, match="fold it into the weight"):
        write_diffusers_dit(dataclasses.replace(DIT, readout_scale=0.5))


def test_regrouping_reads_nothing_before_it_is_asked(tmp_path):
    tensors = {
        "a.qkv.weight": torch.arange(12.0).view(6, 2),
        "b.weight": torch.zeros(2),
        "c.qkvx.weight": torch.ones(3),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    opened = open_files([tmp_path / "x.safetensors"])
    cut = regroup.split(opened, "qkv", ("q", "k", "v"))
    assert {n: i.shape for n, i in cut.info.items()} == {
        **{f"a.{p}.weight": (2, 2) for p in "qkv"},
        "b.weight": (2,),
        "c.qkvx.weight": (3,),
    }
    assert torch.equal(cut["a.k.weight"], tensors["a.qkv.weight"][2:4])
    whole = regroup.stacked(cut, "qkv", ("q", "k", "v"))
    assert whole.info.keys() == tensors.keys()
    assert all(torch.equal(whole[k], v) for k, v in tensors.items())
    flipped = regroup.swapped(opened, ["b.weight", "a.qkv.weight"])
    assert torch.equal(flipped["a.qkv.weight"], tensors["a.qkv.weight"].roll(3, 0))
    with pytest.raises(CheckpointError, match="has 6 rows, which 4 parts do not share"):
        regroup.split(opened, "qkv", ("a", "b", "c", "d"))
    with pytest.raises(CheckpointError, match=r"a\.q\.weight is there, but not a\.k\.weight"):
        regroup.stacked(regroup.without(cut, ["a.k.weight"]), "qkv", ("q", "k", "v"))
