from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import mmdiff
from mmdiff.errors import ConfigError, MissingExtraError
from mmdiff.io.adapter import write_adapter
from mmdiff.io.quantize import quantize_, quantized_nbytes
from mmdiff.io.variants import load_variant
from mmdiff.models.llada import Config, LLaDA
from mmdiff.models.registry import build
from mmdiff.training.finetune import LoraConfig, attach

SHAPE = Config(
    vocab_size=64, width=64, depth=3, heads=4, kv_heads=4, ffn_width=64, mask_id=60, bos_id=1, eos_id=61, eot_id=62
)
IDS = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path) -> Path:
    LLaDA(SHAPE, generator=torch.Generator().manual_seed(0)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(folder, tmp_path) -> Path:
    model = attach(load_variant(folder), LoraConfig(rank=4), seed=0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B" in name:
                p.fill_(0.02)
    return write_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_missing_library_is_named_with_the_command_that_installs_it(folder, scheme, monkeypatch):
    for module in ("bitsandbytes", "bitsandbytes.nn", "torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mmdiff\[quant\]'"):
        mmdiff.load(folder, device="cpu", quantize=scheme)


def test_words_that_contradict_each_other_or_are_unknown_are_refused(folder):
    with pytest.raises(ConfigError, match="quantize 'int3'; known: nf4, int8"):
        mmdiff.load(folder, device="cpu", quantize="int3")
    with pytest.raises(ConfigError, match="leave out device and quantize"):
        mmdiff.load(folder, device="cpu", device_map="auto")
    with pytest.raises(ConfigError, match="device_map 'spread'; known: auto, balanced"):
        mmdiff.load(folder, device_map="spread")
    with pytest.raises(ConfigError, match="device_map: "):
        mmdiff.load(folder, device_map={"norm": "cpu"})
    with pytest.raises(ConfigError, match="runs on cpu and cuda"):
        quantize_(load_variant(folder), "nf4", "mps")


def test_quantised_weights_are_counted_without_being_made():
    model = build(SHAPE, device="meta").to(torch.bfloat16)
    linear = sum(m.weight.numel() for m in model.layers.modules() if isinstance(m, torch.nn.Linear))
    rest = sum(p.numel() for p in model.parameters()) - linear
    assert quantized_nbytes(model, "int8") == 2 * rest + linear
    assert 0.5 * linear < quantized_nbytes(model, "nf4") - 2 * rest < 0.53 * linear


@pytest.mark.parametrize(("scheme", "library"), [("nf4", "bitsandbytes"), ("int8", "torchao")])
@pytest.mark.filterwarnings("ignore")
def test_quantised_network_is_near_the_plain_one_and_takes_an_adapter_beside_it(folder, adapter, scheme, library):
    pytest.importorskip(library, reason="the extra `quant` is not among the test dependencies")
    plain, quantised = load_variant(folder), load_variant(folder, quantize=scheme, device="cpu")
    error = quantised(IDS) - plain(IDS)
    assert 0 < float(error.norm() / plain(IDS).norm()) < 0.5  # random weights: the worst case for any rounding
    both = load_variant(folder, quantize=scheme, adapter=adapter, device="cpu")
    change = load_variant(folder, adapter=adapter)(IDS) - plain(IDS)
    assert float(change.abs().max()) > 0.1
    beside = both(IDS) - quantised(IDS)
    assert float(torch.nn.functional.cosine_similarity(beside.flatten(), change.flatten(), dim=0)) > 0.8
    with pytest.raises(ConfigError, match="weights cannot be saved"):
        both.save_pretrained(folder.parent / "saved")


def test_an_adapter_is_merged_into_plain_weights_and_the_result_can_be_saved(folder, adapter, tmp_path):
    merged = mmdiff.load(folder, device="cpu", adapter=adapter).model
    names = set(load_variant(folder).state_dict())
    assert set(merged.state_dict()) == names
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(LLaDA.from_pretrained(tmp_path / "merged")(IDS), merged(IDS))


@pytest.mark.parametrize(
    "device_map",
    [
        "auto",
        "balanced",
        {"": "cpu"},
        {
            "embed_tokens": "cpu",
            "layers.0": "cpu",
            "layers.1": "disk",
            "layers.2": "disk",
            "norm": "cpu",
            "lm_head": "disk",
        },
    ],
)
def test_a_network_spread_over_places_gives_the_same_results(folder, device_map):
    pipeline = mmdiff.load(folder, device_map=device_map)
    torch.testing.assert_close(pipeline.model(IDS), load_variant(folder)(IDS))
    assert pipeline.checkpoint.device == torch.device("cpu")
    if isinstance(device_map, dict) and len(device_map) > 1:
        assert all(p.is_meta for p in pipeline.model.layers[1].parameters())
        assert not any(p.is_meta for p in pipeline.model.layers[0].parameters())
