from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from mmdiff.errors import CheckpointError, ConfigError
from mmdiff.io.checkpoint import match, read_tensors, verify_manifest
from mmdiff.io.convert import convert
from mmdiff.io.layouts import LAYOUTS
from mmdiff.io.tensors import TensorInfo
from mmdiff.models import llada, llada_v, vision
from mmdiff.models.registry import build, load_model
from tests.helpers import published

FULL_OLMO = published.OLMO | {
    "d_model": 4096,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "vocab_size": 126464,
}
FULL_V = {k: v for k, v in published.LLADA_V.items() if k not in ("vision_config", "mask_token_id")} | {
    "eos_token_id": 126081,
    "hidden_size": 4096,
    "image_aspect_ratio": "anyres_max_4",
    "image_grid_pinpoints": "(1x1),...,(6x6)",
    "intermediate_size": 12288,
    "mm_patch_merge_type": "spatial_unpad",
    "max_position_embeddings": 16384,
    "mm_hidden_size": 1152,
    "mm_vision_tower": "google/siglip2-so400m-patch14-384",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "vocab_size": 126464,
}


FULL_ILLADA = {k: v for k, v in published.LLAMA.items() if k != "mask_token_id"} | {
    "architectures": ["ILLaDAForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "layer_norm_eps": None,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "illada",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pad_token_id": 1,
    "resid_pdrop": 0.0,
    "tie_word_embeddings": True,
    "vocab_size": 155136,
}
ILLADA = llada.Config(
    vocab_size=155136,
    kv_heads=8,
    ffn_width=14336,
    max_length=8192,
    tied=True,
    rope_full_precision=False,
    mask_id=5,
    bos_id=0,
    eos_id=2,
    eot_id=2,
)


def same_bytes(left, right) -> bool:
    return (
        set(left) == set(right)
        and all(left[k].dtype == right[k].dtype for k in left)
        and all(torch.equal(left[k], right[k]) for k in left)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_r25_converting_there_and_back_gives_the_same_keys_dtypes_bytes_and_fields(tmp_path, layout):
    tree = published.CONFIGS[layout] | {"unknown_field": [1, {"deep": None}]}
    tensors = published.publish(tmp_path / "src", layout, tree)
    there = convert(tmp_path / "src", tmp_path / "ours")
    loaded = load_model(tmp_path / "ours")
    assert (there.source, there.target, there.tensors) == (layout, "mmdiff", len(loaded.state_dict()))
    assert loaded.config.type == LAYOUTS[layout].family
    back = convert(tmp_path / "ours", tmp_path / "back", max_shard_bytes=there.nbytes // 3)
    assert (back.source, back.target) == ("mmdiff", layout)
    assert len(back.files) > 2
    assert same_bytes(dict(read_tensors(tmp_path / "back")), tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == tree
    for name in ("ours", "back"):
        verify_manifest(tmp_path / name)


@pytest.mark.parametrize(
    ("layout", "tree", "config", "count"),
    [
        ("olmo", FULL_OLMO, llada.Config(), 8_015_581_184),
        ("llama", FULL_ILLADA, ILLADA, 7_615_025_152),
        ("llada-v", FULL_V, llada_v.Config(), 8_015_581_184 + 397_747_744 + 21_504_000 + 4_096),
    ],
)
def test_r25_every_published_key_of_the_8b_models_is_consumed_exactly_once(tmp_path, layout, tree, config, count):
    assert LAYOUTS[layout].read(tree, {}) == config
    shapes = published.shapes(layout, tree)
    info = {k: TensorInfo(shape=s, dtype=torch.bfloat16, file=tmp_path) for k, s in shapes.items()}
    module = build(config, device="meta")
    pairs = match(module, info, LAYOUTS[layout].keys.forward, LAYOUTS[layout].unused(config), "8B")
    assert list(pairs) == list(shapes)
    assert sorted(pairs.values()) == sorted(module.state_dict())
    assert sum(i.nbytes for i in info.values()) == 2 * count == 2 * sum(p.numel() for p in module.parameters())
    assert layout != "olmo" or len(info) == 291


def test_the_tower_of_a_whole_siglip_is_read_and_every_other_key_is_on_the_list_of_unused_ones(tmp_path):
    tree = {"model_type": "siglip", "text_config": {}, "vision_config": published.SO400M}
    config = LAYOUTS["siglip"].read(tree, {})
    assert config == vision.Config()
    kept = published.tower_shapes("vision_model", published.SO400M)
    last = {k.replace(".25.", ".26."): s for k, s in kept.items() if ".25." in k}
    others = {"vision_model.head.probe": (1, 1, 1152), "text_model.head.bias": (1152,), "logit_scale": (1,)}
    info = {k: TensorInfo(shape=s, dtype=torch.float32, file=tmp_path) for k, s in (kept | last | others).items()}
    module = build(config, device="meta")
    pairs = match(module, info, LAYOUTS["siglip"].keys.forward, LAYOUTS["siglip"].unused(config), "so400m")
    assert list(pairs) == list(kept)
    assert sorted(pairs.values()) == sorted(module.state_dict())
    assert sum(p.numel() for p in module.parameters()) == 397_747_744
    with pytest.raises(CheckpointError, match="1 unexpected: stranger"):
        match(
            module,
            info | {"stranger": info["logit_scale"]},
            LAYOUTS["siglip"].keys.forward,
            LAYOUTS["siglip"].unused(config),
            "so400m",
        )


def test_r25_extra_missing_and_wrong_shaped_published_keys_are_listed(tmp_path):
    tensors = published.publish(tmp_path, "olmo")
    tensors["model.transformer.blocks.2.q_proj.weight"] = tensors.pop("model.transformer.blocks.1.q_proj.weight")
    tensors["model.transformer.ln_f.weight"] = torch.zeros(25)
    tensors["stranger"] = torch.zeros(1)
    save_file(tensors, tmp_path / "model.safetensors")
    for use in (load_model, lambda p: convert(p, tmp_path / "out")):
        with pytest.raises(CheckpointError) as error:
            use(tmp_path)
        text = str(error.value)
        assert "1 missing: layers.1.self_attn.q_proj.weight" in text
        assert "2 unexpected: model.transformer.blocks.2.q_proj.weight, stranger" in text
        assert "model.transformer.ln_f.weight is [25], the configuration asks for [24]" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("layout", "key"), [("olmo", "weight_tying"), ("llama", "tie_word_embeddings")])
def test_a_tied_head_may_be_stored_or_not(tmp_path, layout, key):
    tensors = published.publish(tmp_path / "tied", layout, published.CONFIGS[layout] | {key: True})
    head = {"olmo": "model.transformer.ff_out.weight", "llama": "lm_head.weight"}[layout]
    assert head not in tensors
    shutil.copytree(tmp_path / "tied", tmp_path / "both")
    save_file(tensors | {head: torch.zeros(64, 24)}, tmp_path / "both" / "model.safetensors")
    ids = torch.tensor([[1, 2, 60]])
    alone, both = load_model(tmp_path / "tied", dtype=torch.float32), load_model(tmp_path / "both", dtype=torch.float32)
    assert torch.equal(alone(ids), both(ids))


def test_one_layout_becomes_the_other_and_computes_the_same(tmp_path):
    published.publish(tmp_path / "olmo", "olmo")
    convert(tmp_path / "olmo", tmp_path / "llama", to="llama")
    assert set(read_tensors(tmp_path / "llama")) == set(published.llama_shapes(published.LLAMA))
    ids = torch.arange(12).view(2, 6)
    one, other = (load_model(tmp_path / name, dtype=torch.float32)(ids) for name in ("olmo", "llama"))
    assert torch.equal(one, other)


def test_a_network_that_changed_shape_gets_a_new_config_when_it_goes_back(tmp_path):
    published.publish(tmp_path / "src", "olmo")
    convert(tmp_path / "src", tmp_path / "ours")
    path = tmp_path / "ours" / "config.json"
    tree = json.loads(path.read_text())
    tree["config"]["max_length"] = 99
    path.write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        convert(tmp_path / "ours", tmp_path / "back")
    (tmp_path / "ours" / "manifest.json").unlink()
    convert(tmp_path / "ours", tmp_path / "back")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back["max_sequence_length"] == 99
    assert {k: back[k] for k in published.OLMO if k != "max_sequence_length"} == {
        k: v for k, v in published.OLMO.items() if k != "max_sequence_length"
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_config_written_from_nothing_reads_back_to_the_same_network(layout):
    special = {"<|startoftext|>": 7, "<|eot_id|>": 9}
    config = LAYOUTS[layout].read(published.CONFIGS[layout], special)
    written = LAYOUTS[layout].write(config)
    assert LAYOUTS[layout].read(written, special) == config
    assert LAYOUTS[layout].detect(written)


def test_neighbours_come_along_and_the_licence_is_kept(tmp_path):
    published.publish(tmp_path / "src", "olmo")
    (tmp_path / "src" / "generation_config.json").write_text('{"eos_token_id": 61}')
    (tmp_path / "src" / "README.md").write_text("---\nlicense: mit\n---\nhello")
    (tmp_path / "src" / "modeling_llada.py").write_text("raise SystemExit")
    convert(tmp_path / "src", tmp_path / "ours")
    assert (tmp_path / "ours" / "generation_config.json").read_text() == '{"eos_token_id": 61}'
    assert "license: mit" in (tmp_path / "ours" / "README.md").read_text()
    assert not list((tmp_path / "ours").glob("*.py"))


def test_a_pytorch_file_becomes_safetensors_with_the_same_bytes(tmp_path):
    tensors = published.weights("llama", published.LLAMA)
    torch.save({"model_ema": tensors, "epoch": 3}, tmp_path / "x.pth")
    done = convert(tmp_path / "x.pth", tmp_path / "new" / "x.safetensors", root="model_ema")
    assert (done.source, done.target, done.tensors) == ("pickle", "safetensors", len(tensors))
    assert same_bytes(dict(read_tensors(tmp_path / "new" / "x.safetensors")), tensors)
    with pytest.raises(ConfigError, match="exists already"):
        convert(tmp_path / "x.pth", tmp_path / "new" / "x.safetensors", root="model_ema")
    (tmp_path / "config.json").write_text(json.dumps(published.LLAMA))
    convert(tmp_path / "x.pth", tmp_path / "folder", root="model_ema")
    assert load_model(tmp_path / "folder").config.width == 24


def test_what_cannot_be_is_a_sentence(tmp_path):
    published.publish(tmp_path / "src", "olmo")
    with pytest.raises(ConfigError, match=r"layout 'llada-v' is none of a llada; known: mmdiff, olmo, llama"):
        convert(tmp_path / "src", tmp_path / "x", to="llada-v")
    with pytest.raises(ConfigError, match="is in the layout 'olmo' already"):
        convert(tmp_path / "src", tmp_path / "x", to="olmo")
    with pytest.raises(ConfigError, match="not an empty folder"):
        convert(tmp_path / "src", tmp_path / "src")
    assert not (tmp_path / "x").exists()
