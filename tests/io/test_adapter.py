from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdiff.errors import CheckpointError
from mmdiff.io import adapter as adapters
from mmdiff.models.llada import Config, LLaDA
from mmdiff.training.finetune import LoraConfig, attach

SHAPE = Config(
    vocab_size=64, width=32, depth=2, heads=4, kv_heads=2, ffn_width=48, mask_id=60, bos_id=1, eos_id=61, eot_id=62
)
IDS = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def fresh() -> LLaDA:
    return LLaDA(SHAPE, generator=torch.Generator().manual_seed(0)).eval()


def moved(spec: LoraConfig) -> LLaDA:
    """A network whose adapter, and whatever else is trained, has left its initial values."""
    model = attach(fresh(), spec, seed=3).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    return model


@pytest.fixture(params=[LoraConfig(rank=4), LoraConfig(rank=3, rank_stabilised=True, layers=("*q_proj", "*down_proj"))])
def written(request, tmp_path) -> tuple[LLaDA, Path]:
    model = moved(request.param)
    return model, adapters.write_adapter(model, tmp_path / "adapter", base="some/base")


def test_attaching_changes_no_output_and_freezes_the_weights():
    model = attach(fresh(), LoraConfig(rank=4), seed=3).eval()
    torch.testing.assert_close(model(IDS), fresh()(IDS))
    assert all((".lora_" in n) == p.requires_grad for n, p in model.named_parameters())
    assert {p.dtype for n, p in model.named_parameters() if ".lora_" in n} == {torch.float32}


def test_attaching_leaves_pytorchs_own_generator_alone_and_draws_by_seed():
    models = [fresh() for _ in range(3)]
    before = torch.get_rng_state()
    a, b, c = (attach(m, LoraConfig(rank=4), seed=s).state_dict() for m, s in zip(models, (0, 0, 1), strict=True))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


def test_merged_and_injected_give_the_outputs_of_training(written):
    model, folder = written
    adapter = adapters.read_adapter(folder)
    wanted = model(IDS)
    torch.testing.assert_close(adapters.merge(fresh(), adapter)(IDS), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(adapters.inject(fresh(), adapter)(IDS), wanted, atol=1e-5, rtol=1e-5)


def test_peft_itself_loads_what_was_written(written):
    model, folder = written
    theirs = peft.PeftModel.from_pretrained(fresh(), str(folder)).eval()
    torch.testing.assert_close(theirs(IDS), model(IDS), atol=1e-5, rtol=1e-5)
    assert theirs.peft_config["default"].base_model_name_or_path == "some/base"


def test_what_peft_wrote_is_taken(tmp_path):
    theirs = peft.get_peft_model(fresh(), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if ".lora_B" in name:
                p.fill_(0.05)
    theirs.save_pretrained(str(tmp_path))
    ours = adapters.merge(fresh(), adapters.read_adapter(tmp_path))
    torch.testing.assert_close(ours(IDS), theirs.eval()(IDS), atol=1e-4, rtol=1e-4)


def test_names_of_the_published_layout_find_their_layers(written, tmp_path):
    model, folder = written
    places = {"self_attn.": "", "mlp.gate_proj": "ff_proj", "mlp.up_proj": "up_proj", "mlp.down_proj": "ff_out"}
    renamed = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        name = key.replace("model.layers.", "model.transformer.blocks.").replace("self_attn.o_proj", "attn_out")
        for ours, published in places.items():
            name = name.replace(ours, published)
        renamed[name] = tensor
    other = tmp_path / "published"
    other.mkdir()
    save_file(renamed, other / "adapter_model.safetensors")
    (other / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    ours = adapters.merge(fresh(), adapters.read_adapter(other))
    torch.testing.assert_close(ours(IDS), model(IDS), atol=1e-4, rtol=1e-4)


def test_parameters_trained_whole_travel_with_the_adapter(tmp_path):
    model = moved(LoraConfig(rank=2, also=("norm", "lm_head")))
    folder = adapters.write_adapter(model, tmp_path)
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == ["lm_head", "norm"]
    merged = adapters.merge(fresh(), adapters.read_adapter(folder))
    torch.testing.assert_close(merged.norm.weight, model.norm.weight)
    torch.testing.assert_close(merged(IDS), model(IDS), atol=1e-4, rtol=1e-4)


def damage(folder: Path, how: str) -> None:
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    tensors, tree = load_file(weights), json.loads(config.read_text())
    first = sorted(tensors)[0]
    if how == "missing":
        weights.unlink()
    elif how == "half":
        save_file({k: v for k, v in tensors.items() if k != first}, weights)
    elif how == "shape":
        save_file(tensors | {first: tensors[first][:, :5].contiguous()}, weights)
    elif how == "stranger":
        renamed = {k.replace("layers.0", "layers.7"): v for k, v in tensors.items()}
        save_file(renamed, weights)
    else:
        config.write_text(json.dumps(tree | {"dora": {"use_dora": True}, "kind": {"peft_type": "IA3"}}[how]))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "lacks adapter_model.safetensors"),
        ("half", "only one of lora_A and lora_B for layers.0"),
        ("shape", "does not fit a LLaDA: layers.0"),
        ("stranger", "no linear layer layers.7"),
        ("dora", "use_dora = True is not taken"),
        ("kind", "peft_type is 'IA3'; only 'LORA'"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_refused_in_words(written, how, message):
    _, folder = written
    damage(folder, how)
    with pytest.raises(CheckpointError, match=message):
        adapters.merge(fresh(), adapters.read_adapter(folder))


def test_a_network_without_an_adapter_has_none_to_write(tmp_path):
    with pytest.raises(CheckpointError, match="carries no adapter"):
        adapters.write_adapter(fresh(), tmp_path)
