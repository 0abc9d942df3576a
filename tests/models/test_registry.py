from __future__ import annotations

import json
import logging

import pytest
import torch
from torch import nn

from mmdiff import config as configs
from mmdiff import rng
from mmdiff.config import config, parse
from mmdiff.errors import CheckpointError, ConfigError
from mmdiff.io import folder as folders
from mmdiff.models import (
    amused,
    dit,
    emigm,
    llada,
    llada_v,
    lumina,
    magvit,
    masked_mmdit,
    maskgit,
    mmada,
    mmdit,
    scorer,
    unified,
    vae,
    vision,
    vq,
    vqgan,
)
from mmdiff.models.llada import LLaDA
from mmdiff.models.llada_v import LLaDAV
from mmdiff.models.registry import FAMILIES, ModelConfig, build, identify, load_model, save_folder
from mmdiff.models.unified import Unified
from mmdiff.text import Tokenizer
from tests.helpers import published

LANGUAGE = {
    "vocab_size": 300,
    "width": 16,
    "depth": 2,
    "heads": 2,
    "kv_heads": 1,
    "ffn_width": 24,
    "mask_id": 3,
    "bos_id": 0,
    "eos_id": 1,
    "eot_id": 2,
}
VISION = {"image_size": 16, "patch_size": 8, "width": 12, "depth": 1, "heads": 2, "ffn_width": 20}
TREES = {
    "llada": {"type": "llada", **LANGUAGE},
    "llada_v": {"type": "llada_v", "language": LANGUAGE, "vision": VISION},
    "unified": {"type": "unified", "language": LANGUAGE, "vision": VISION, "codes": {"codebook": 9, "grid": 2}},
    "vq": {"type": "vq", "image_size": 16, "widths": [8, 16], "levels": [3, 4]},
    "emigm": {
        "type": "emigm",
        "grid": 4,
        "channels": 3,
        "classes": 5,
        "encoder": {"width": 12, "depth": 1, "heads": 2},
        "decoder": {"width": 12, "depth": 1, "heads": 3},
        "buffer": 2,
        "head_width": 8,
        "head_depth": 1,
    },
    "maskgit": {"type": "maskgit", "grid": 2, "codebook": 9, "classes": 3, "width": 12, "depth": 1, "heads": 2},
    "kl_vae": {
        "type": "kl_vae",
        "image_size": 16,
        "width": 32,
        "multipliers": [1, 1],
        "blocks": 1,
        "channels": 2,
        "attention_levels": [1],
    },
    "dc_ae": {
        "type": "dc_ae",
        "image_size": 8,
        "channels": 2,
        "head_dim": 4,
        "widths": [8, 8],
        "encoder_layers": [1, 1],
        "decoder_layers": [1, 1],
        "block_types": ["ResBlock", "EfficientViTBlock"],
        "decoder_norms": ["rms_norm", "rms_norm"],
        "decoder_activations": ["silu", "silu"],
        "multiscales": [[], []],
    },
    "mmada": {
        **{"type": "mmada", "language": {**LANGUAGE, "vocab_size": 60}, "code_offset": 40, "codebook": 16, "grid": 2},
        **{"text_length": 6},
    },
    "lumina": {
        **{"type": "lumina", "language": {**LANGUAGE, "vocab_size": 60}, "code_offset": 40, "codebook": 16, "grid": 2},
    },
    "amused_vq": {
        **{"type": "amused_vq", "image_size": 8, "widths": [32, 32], "layers": 1, "channels": 4, "codebook": 16},
    },
    "vqgan": {
        "type": "vqgan",
        "image_size": 16,
        "width": 32,
        "multipliers": [1, 1],
        "blocks": 1,
        "features": 4,
        "codebook": 7,
        "code_channels": 3,
        "attention_levels": [],
    },
    "magvit": {
        **{"type": "magvit", "image_size": 8, "bits": 3},
        **{side: {"width": 32, "multipliers": [1, 1], "blocks": [1, 1]} for side in ("encoder", "decoder")},
    },
    "siglip": {"type": "siglip", **VISION},
    "scorer": {"type": "scorer", "vocab_size": 20, "image_size": 16, "widths": [8, 16], "width": 8},
    "dit": {"type": "dit", "image_size": 4, "width": 16, "depth": 2, "heads": 2, "ffn_width": 32, "classes": 3},
    "mmdit": {
        **{"type": "mmdit", "image_size": 8, "channels": 3, "out_channels": 3, "width": 16, "depth": 2, "heads": 2},
        **{"context_channels": 6, "pooled_channels": 5, "max_grid": 4, "dual_layers": [0], "qk_norm": True},
    },
    "masked_mmdit": {
        **{"type": "masked_mmdit", "width": 16, "heads": 2, "depth": 1, "single_depth": 1, "context_channels": 6},
        **{"pooled_channels": 5, "axes": [2, 2, 4], "vocab_size": 10, "codebook": 8, "text_vocab_size": 7},
        **{"adapter": True},
    },
}
CONFIGS = {name: parse(FAMILIES[name].config, tree, name) for name, tree in TREES.items()}


def made(name: str, seed: int = 0) -> nn.Module:
    return build(CONFIGS[name], generator=rng.generator(seed, "init"))


def assert_same(left: nn.Module, right: nn.Module) -> None:
    a, b = left.state_dict(), right.state_dict()
    assert list(a) == list(b)
    assert all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("full", "parameters"),
    [
        (llada.Config(), 8_015_581_184),
        (llada_v.Config(), 8_434_837_024),
        (mmada.Config(), 8_082_690_048),
        (lumina.Config(), 8_081_805_312),
        (vision.Config(), 397_747_744),
        (llada.Config(depth=22, width=2048, kv_heads=4, ffn_width=5634), 1_487_243_264),
        (emigm.SIZES["xsmall-256"], 69_018_848),
        (emigm.SIZES["small-256"], 96_640_544),
        (emigm.SIZES["base-256"], 207_924_000),
        (emigm.SIZES["large-256"], 478_325_280),
        (emigm.SIZES["huge-256"], 942_401_824),
        (emigm.SIZES["xsmall-512"], 104_506_624),
        (emigm.SIZES["small-512"], 132_145_728),
        (emigm.SIZES["base-512"], 244_150_592),
        (emigm.SIZES["large-512"], 478_403_136),
        (maskgit.SIZES["bert-256"], 174_160_874),
        (maskgit.SIZES["halton-large-384"], 479_984_641),
        (vae.Config(), 66_456_019),
        (vae.DCConfig(), 323_356_460),
        (vqgan.Config(), 72_141_699),
        (vqgan.Config(codebook=16384, code_channels=8, normalised=True), 71_883_403),
        (magvit.Config(), 95_387_004),
    ],
)
def test_full_size_networks_have_the_published_parameter_counts(full, parameters):
    module = build(full, device="meta")
    assert sum(p.numel() for p in module.parameters()) == parameters
    assert all(p.is_meta for p in module.parameters())


def test_the_parts_of_llada_v_have_the_published_parameter_counts():
    module = build(llada_v.Config(), device="meta")
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in module.named_children()}
    assert parts == {"vision": 397_747_744, "connector": 21_504_000, "language": 8_015_581_184}
    assert module.newline.numel() == 4_096


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_survives_saving_and_loading_bit_by_bit(name, tmp_path):
    module = made(name)
    module.save_pretrained(tmp_path)
    found = load_model(tmp_path)
    assert type(found) is FAMILIES[name].module
    assert found.config == CONFIGS[name]
    assert not found.training
    assert not any(t.is_meta for t in [*found.parameters(), *found.buffers()])
    assert_same(module, found)
    assert identify(tmp_path).layout == "mmdiff"
    half = FAMILIES[name].module.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_constants_that_are_not_saved_are_there_after_loading(tmp_path):
    module = made("vq").eval()
    module.save_pretrained(tmp_path)
    pixels = rng.uniform(rng.generator(0, "pixels"), (2, 3, 16, 16)) * 2 - 1
    assert torch.equal(load_model(tmp_path).encode(pixels), module.encode(pixels))


def test_building_and_loading_leave_the_global_generator_alone(tmp_path):
    before = torch.get_rng_state()
    for name in FAMILIES:
        made(name).save_pretrained(tmp_path / name)
        load_model(tmp_path / name)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_a_function_of_the_generator(name):
    assert_same(made(name, 1), made(name, 1))
    a, b = made(name, 1).state_dict(), made(name, 2).state_dict()
    assert any(not torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_configuration_names_any_family_by_its_type(name):
    @config
    class Run:
        """A run."""

        model: ModelConfig
        """The network."""

    assert parse(Run, {"model": TREES[name]}, "x").model == CONFIGS[name]
    with pytest.raises(ConfigError, match="model"):
        parse(Run, {"model": {"type": "transformer"}}, "x")


def test_everything_beside_the_weights_comes_along(tmp_path):
    tokenizer = Tokenizer.train(["a picture of a cat"], 300)
    module = made("unified")
    save_folder(
        module,
        tmp_path / "one",
        tokenizer=tokenizer,
        image_tokenizer=made("vq"),
        classes=["cat", "dog"],
        generation={"text": {"steps": 3}},
        license="apache-2.0",
        max_shard_bytes=20_000,
    )
    assert (tmp_path / "one" / "model.safetensors.index.json").is_file()
    assert_same(load_model(tmp_path / "one"), module)
    assert_same(load_model(tmp_path / "one" / "image_tokenizer"), made("vq"))
    assert Tokenizer.from_pretrained(tmp_path / "one").mask_id == tokenizer.mask_id
    assert json.loads((tmp_path / "one" / "classes.json").read_text()) == ["cat", "dog"]
    card = (tmp_path / "one" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: mmdiff\nlicense: apache-2.0\n")
    assert f"{sum(p.numel() for p in module.parameters()):,} parameters" in card
    # A path does as well as a network, and saving again over it leaves one whole checkpoint.
    again = {"image_tokenizer": tmp_path / "one" / "image_tokenizer", "generation": {"text": {"steps": 4}}}
    module.save_pretrained(tmp_path / "one", **again)
    assert json.loads((tmp_path / "one" / "generation_config.json").read_text()) == again["generation"]
    assert not list((tmp_path / "one").glob("*.index.json"))
    assert_same(load_model(tmp_path / "one"), module)
    assert "license: apache-2.0" in (tmp_path / "one" / "README.md").read_text()


def test_a_class_takes_its_own_family_and_those_that_extend_it(tmp_path):
    made("unified").save_pretrained(tmp_path)
    assert type(LLaDAV.from_pretrained(tmp_path)) is Unified
    with pytest.raises(CheckpointError, match=r"holds a Unified, not a LLaDA; load it with Unified\.from_pretrained"):
        LLaDA.from_pretrained(tmp_path)


def test_a_published_pytorch_file_loads_beside_its_config(tmp_path):
    tensors = published.weights("olmo", published.OLMO)
    (tmp_path / "config.json").write_text(json.dumps(published.OLMO))
    torch.save(tensors, tmp_path / "weights.pth")
    module = LLaDA.from_pretrained(tmp_path / "weights.pth")
    assert torch.equal(module.lm_head.weight, tensors["model.transformer.ff_out.weight"])
    with pytest.raises(CheckpointError, match=r"weights\.pth"):
        LLaDA.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([], "expected a table"),
        ({"model_type": "bert"}, "model_type 'bert'"),
        ({"model_type": "later", "mmdiff_version": "9.0", "config": {}}, r"'later', written by mmdiff 9\.0"),
        ({"model_type": "vq", "mmdiff_version": "0", "config": {"widht": 3}}, "did you mean 'width"),
        ({"model_type": "vq", "mmdiff_version": "0", "config": {"image_size": "64"}}, "image_size"),
        ({"model_type": "llada", "mmdiff_version": "0", "config": {"depth": 10**9}}, "promises 1,000,000,000 layers"),
    ],
)
def test_a_config_that_cannot_be_right_is_refused_before_anything_is_built(tmp_path, tree, message):
    made("vq").save_pretrained(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_sizes_that_the_file_does_not_have_allocate_nothing(tmp_path):
    made("vq").save_pretrained(tmp_path)
    (tmp_path / "manifest.json").unlink()
    path = tmp_path / "config.json"
    tree = json.loads(path.read_text())
    for width, message in ((8_000_000, "of another shape"), (800_000_000, "no machine holds")):
        tree["config"]["widths"] = [8, width]
        path.write_text(json.dumps(tree))
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path)


def test_a_folder_of_a_run_leads_to_its_model(tmp_path):
    made("vq").save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"did you mean .*model\?"):
        load_model(tmp_path)


def test_a_module_of_no_family_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="known families"):
        save_folder(nn.Linear(2, 2), tmp_path)
    with pytest.raises(ConfigError, match="known families"):
        build(VISION)


def test_an_interrupted_save_is_not_taken_for_a_whole_checkpoint(tmp_path, monkeypatch):
    made("vq", 0).save_pretrained(tmp_path)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folders, "write_sharded", stop)
    with pytest.raises(KeyboardInterrupt):
        made("vq", 1).save_pretrained(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_loading_says_nothing_when_there_is_nothing_to_say(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        made("vq").save_pretrained(tmp_path)
        load_model(tmp_path)
    assert not caplog.records


def test_every_family_is_in_the_table_and_in_the_union():
    assert [FAMILIES[n].config for n in FAMILIES] == [
        *(m.Config for m in (llada, llada_v, unified, mmada, lumina, vq, emigm, maskgit, vae)),
        vae.DCConfig,
        *(m.Config for m in (vqgan, magvit, amused, vision, scorer, dit, mmdit, masked_mmdit)),
    ]
    assert all(configs.to_dict(c)["type"] == name for name, c in CONFIGS.items())
