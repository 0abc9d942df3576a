from __future__ import annotations

import dataclasses

import pytest

from mmdiff.errors import CheckpointError, ConfigError
from mmdiff.images import Tiling
from mmdiff.io.layouts import LAYOUTS, detect
from mmdiff.models import maskgit
from tests.helpers import published


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_told_by_its_own_config(layout):
    assert detect(published.CONFIGS[layout]) == layout


@pytest.mark.parametrize(
    "tree", [{}, {"model_type": "llama", "hidden_size": 4}, {"model_type": "llada"}, {"architectures": 3}]
)
def test_a_stranger_is_of_no_layout(tree):
    assert detect(tree) is None


@pytest.mark.parametrize(
    ("layout", "change"),
    [
        ("olmo", {"alibi": True}),
        ("olmo", {"rope": False}),
        ("olmo", {"include_qkv_bias": True}),
        ("olmo", {"attention_layer_norm": True}),
        ("olmo", {"layer_norm_type": "default"}),
        ("olmo", {"block_group_size": 2}),
        ("olmo", {"activation_type": "gelu"}),
        ("olmo", {"scale_logits": True}),
        ("olmo", {"input_emb_norm": True}),
        ("llama", {"rope_scaling": {"factor": 2}}),
        ("llama", {"attention_bias": True}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"head_dim": 8}),
        ("llada-v", {"mm_projector_type": "linear"}),
        ("llada-v", {"mm_hidden_size": 13}),
    ],
)
def test_a_switch_that_our_network_lacks_is_refused_by_name(layout, change):
    with pytest.raises(CheckpointError, match=next(iter(change))):
        LAYOUTS[layout].read(published.CONFIGS[layout] | change, {})


@pytest.mark.parametrize(
    ("layout", "key"),
    [
        ("olmo", "d_model"),
        ("olmo", "rope_theta"),
        ("olmo", "weight_tying"),
        ("llama", "intermediate_size"),
        ("llama", "rope_theta"),
        ("llada-v", "rms_norm_eps"),
    ],
)
def test_a_field_that_decides_the_numbers_is_asked_for_and_not_guessed(layout, key):
    tree = {k: v for k, v in published.CONFIGS[layout].items() if k != key}
    with pytest.raises(CheckpointError, match=f"lacks {key}"):
        LAYOUTS[layout].read(tree, {})


def test_values_of_the_wrong_kind_are_refused_by_name():
    with pytest.raises(ConfigError, match="width"):
        LAYOUTS["olmo"].read(published.OLMO | {"d_model": "24", "mlp_hidden_size": 40}, {})
    with pytest.raises(ConfigError, match="heads"):
        LAYOUTS["olmo"].read(published.OLMO | {"n_heads": 5}, {})


def test_fields_that_may_be_absent_or_null_mean_what_the_published_code_means():
    read = LAYOUTS["olmo"].read
    assert read(published.OLMO | {"mlp_hidden_size": None}, {}).ffn_width == 4 * 24
    assert read(published.OLMO | {"n_kv_heads": None}, {}).kv_heads == 4
    assert read(published.OLMO | {"n_kv_heads": None, "multi_query_attention": True}, {}).kv_heads == 1
    assert read(published.OLMO | {"embedding_size": None, "vocab_size": 70}, {}).vocab_size == 70
    assert read(published.OLMO | {"vocab_size": 62}, {}).vocab_size == 64
    new = {k: v for k, v in published.LLAMA.items() if k not in ("rope_theta", "rope_scaling")}
    rope = {"rope_parameters": {"rope_theta": 123.0, "rope_type": "default"}}
    assert LAYOUTS["llama"].read(new | rope, {}).rope_theta == 123.0


def test_token_ids_come_from_the_config_or_the_tokenizer_and_never_from_outside_the_vocabulary():
    special = {"<|startoftext|>": 58, "<|eot_id|>": 59, "<|mdm_mask|>": 57}
    config = LAYOUTS["llada-v"].read(published.LLADA_V, special).language
    assert (config.mask_id, config.bos_id, config.eos_id, config.eot_id) == (60, 58, 61, 59)
    unnamed = {k: v for k, v in published.LLADA_V.items() if k != "mask_token_id"}
    assert LAYOUTS["llada-v"].read(unnamed, special).language.mask_id == 57
    with pytest.raises(CheckpointError, match="lacks mask_token_id"):
        LAYOUTS["llada-v"].read(unnamed, {})
    without = LAYOUTS["llada-v"].read(published.LLADA_V, {}).language
    assert without.bos_id == without.eot_id == 61


def test_illada_is_read_with_its_own_mask():
    tree = {k: v for k, v in published.LLAMA.items() if k != "mask_token_id"}
    tree |= {"architectures": ["ILLaDAForCausalLM"], "model_type": "illada", "bos_token_id": 0, "eos_token_id": 2}
    config = LAYOUTS[str(detect(tree))].read(tree | {"tie_word_embeddings": True}, {})
    assert (config.mask_id, config.bos_id, config.eos_id, config.tied) == (5, 0, 2, True)


def test_an_unknown_tower_says_how_to_describe_it():
    tree = {k: v for k, v in published.LLADA_V.items() if k != "vision_config"}
    with pytest.raises(CheckpointError, match=r"'somewhere/siglip-tiny' is not known.*vision_config"):
        LAYOUTS["llada-v"].read(tree, {})


TILED = published.LLADA_V | {"image_aspect_ratio": "anyres_max_4", "mm_patch_merge_type": "spatial_unpad"}


@pytest.mark.parametrize(
    ("fields", "tiling"),
    [
        ({}, Tiling()),
        ({"image_aspect_ratio": "anyres_max_9"}, Tiling(limit=9)),
        ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "flat"}, Tiling(limit=None, newlines=False)),
        ({"image_aspect_ratio": "pad"}, Tiling(crops="pad", limit=None)),
        ({"image_aspect_ratio": None, "mm_patch_merge_type": None}, Tiling(crops="square", limit=None, newlines=False)),
        ({"image_grid_pinpoints": "(1x1), ..., (6x6)"}, Tiling()),
        ({"image_grid_pinpoints": "(1x1),...,(1x2)"}, Tiling(pinpoints=((20, 20), (20, 40)))),
        ({"image_grid_pinpoints": [[40, 20]], "mm_newline_position": "frame"}, None),
    ],
)
def test_the_tiling_is_read_in_every_published_spelling_and_written_back(fields, tiling):
    layout = LAYOUTS["llada-v"]
    config = layout.read(TILED | fields, {})
    assert config.tiling == (tiling or Tiling(pinpoints=((40, 20),), video_newlines="frame"))
    assert layout.read(layout.write(config), {}).tiling == config.tiling


def test_the_longest_training_sequence_is_read_unless_it_stands_for_none():
    read = LAYOUTS["llada-v"].read
    assert read(TILED | {"tokenizer_model_max_length": 8192}, {}).max_tokens == 8192
    assert read(TILED | {"tokenizer_model_max_length": int(1e30)}, {}).max_tokens is None
    assert read(TILED, {}).max_tokens is None


def test_a_tower_that_normalises_its_features_has_no_published_layout():
    config = LAYOUTS["siglip"].read(published.SIGLIP, {})
    with pytest.raises(CheckpointError, match="post_norm"):
        LAYOUTS["siglip"].write(dataclasses.replace(config, post_norm=True))


def test_what_transformers_leaves_out_of_a_siglip_has_its_default():
    config = LAYOUTS["siglip"].read({"model_type": "siglip", "vision_config": {"patch_size": 14}}, {})
    assert (config.width, config.depth, config.heads, config.image_size, config.patch_size) == (768, 11, 12, 224, 14)
    with pytest.raises(CheckpointError, match="hidden_act"):
        LAYOUTS["siglip"].read({"model_type": "siglip", "vision_config": {"hidden_act": "relu"}}, {})


@pytest.mark.parametrize("layout", ["maskgit-v1", "maskgit-v2"])
def test_a_tied_readout_with_a_factor_has_no_published_layout(layout):
    with pytest.raises(CheckpointError, match=r"readout_scale 0\.25 has no field in the published layout"):
        LAYOUTS[layout].write(maskgit.Config(readout_scale=0.25))
