"""The recipes of fine-tuning, from a published folder to answers, at tiny size."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import mmdiff
from data_pipelines.loader import open_loader
from data_pipelines.pack import write_shards
from data_pipelines.reader import IMAGE_SUFFIXES, iter_samples
from mmdiff.cli import app
from mmdiff.commands import train
from mmdiff.commands.export import export_checkpoint
from mmdiff.config import recipes
from mmdiff.errors import ConfigError
from mmdiff.io.convert import convert
from mmdiff.models.registry import load_model
from mmdiff.pipelines import Pipeline
from mmdiff.text import Tokenizer
from tests.helpers import tiny

RECIPES = sorted(name for name in recipes() if name.startswith("llada"))
ANSWERS = ["a red circle", "the blue square is small", "yes", "no"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """LLaDA-V in its published layout, with a tokenizer."""
    top = tmp_path_factory.mktemp("base")
    Pipeline(tiny.llada_v_checkpoint()).save_pretrained(top / "ours")
    convert(str(top / "ours"), top / "published", to="llada-v")
    return top / "published"


@pytest.fixture(scope="module")
def text_base(tmp_path_factory) -> Path:
    """LLaDA in its published layout, with a tokenizer."""
    top = tmp_path_factory.mktemp("text")
    whole = tiny.llada_v_checkpoint()
    whole.model.language.save_pretrained(top / "ours", tokenizer=whole.tokenizer)
    convert(str(top / "ours"), top / "published", to="olmo")
    return top / "published"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Conversations of two turns, every third without an image; the pictures have different shapes."""
    folder, samples = tmp_path_factory.mktemp("shards"), []
    for i in range(12):
        answer = ANSWERS[i % len(ANSWERS)]
        turns = [("human", "how many dogs are there?"), ("gpt", answer), ("human", "a cat?"), ("gpt", "no")]
        if i % 3:
            turns[0] = ("human", f"{turns[0][1]}\n<image>")
        talk = [{"from": who, "value": text} for who, text in turns]
        members = {"json": json.dumps({"conversations": talk, "caption": answer}).encode()}
        png = io.BytesIO()
        tiny.picture(i, 12 + 4 * i, 24).save(png, "PNG")
        samples.append((f"{i:03d}", members | {"png": png.getvalue()}))
    write_shards(samples, folder, "talk")
    return folder


def overrides(recipe: str, start: Path, shards: Path, out: Path, **more: object) -> list[str]:
    words = {
        "init_from": str(start),
        "model": None,
        "init_parts": {},
        "tokenizer": None,
        "data.sources.0.shards": [str(shards)],
        "data.batch_size": 4,
        "train.samples": 8,
        "train.accumulate": 2,
        "train.optim.lr": 0.01,
        "train.schedule.warmup_samples": 0,
        "train.checkpoint_every_samples": 4,
        "device": "cpu",
        "out": str(out),
        **({"train.lora.rank": 2} if "lora" in recipe else {}),
        **({"quantize": None} if "qlora" in recipe else {}),
        **more,
    }
    return [f"{key}={json.dumps(value)}" for key, value in words.items()]


def changed(before: Path, after: torch.nn.Module) -> set[str]:
    """Top-level parts of which some tensor is another one than before."""
    old = load_model(before).state_dict()
    return {n.split(".")[0] for n, t in after.state_dict().items() if not torch.equal(t, old[n].to(t.dtype))}


def test_the_recipes_that_are_promised_are_there():
    names = {"pretrain_connector", "finetune_full", "finetune_lora", "qlora"}
    assert {f"llada_v/{name}.yaml" for name in names} <= set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_what_it_says_and_the_result_answers(recipe, base, text_base, shards, tmp_path):
    start = base if recipe.startswith("llada_v") else text_base
    if start is text_base:  # a model that sees nothing gets the conversations without images
        talks = [(s.key, {"json": s.members["json"]}) for s, _ in iter_samples(shards)]
        texts = [(key, members) for key, members in talks if b"<image>" not in members["json"]]
        shards = write_shards(texts, tmp_path / "texts", "talk")[0].parent
    result = train.run(recipe, overrides(recipe, start, shards, tmp_path / "run"), progress=False)
    assert result.fit.samples == 8
    assert not result.fit.skipped
    assert all(value > 0 for value in result.fit.losses.values())
    adapted = "lora" in recipe
    loaded = mmdiff.load(start, "cpu", adapter=result.model_dir) if adapted else mmdiff.load(result.model_dir, "cpu")
    parts = changed(start, loaded.model)
    wanted = {
        "llada_v/pretrain_connector.yaml": {"connector"},
        "llada_v/finetune_full.yaml": {"connector", "language", "newline", "vision"},
        "llada_v/finetune_lora.yaml": {"connector", "language", "newline"},
        "llada_v/qlora.yaml": {"language"},
    }
    assert parts == wanted.get(recipe, {"embed_tokens", "layers", "lm_head", "norm"})
    if start is base:
        assert isinstance(loaded.vision.ask(tiny.picture(1), "a cat?", gen_length=4), str)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_dry_runs_and_writes_nothing(recipe, base, text_base, shards, tmp_path):
    start = base if recipe.startswith("llada_v") else text_base
    before = sorted(tmp_path.iterdir())
    more = {"objective": {"type": "masked"}, "data.sources.0.tasks": [{"type": "text", "fields": ["caption"]}]}
    words = overrides(recipe, start, shards, tmp_path / "run", **(more if start is text_base else {}))
    estimate = train.run(recipe, words, dry_run=True).estimate
    assert estimate.rows == 2
    assert estimate.losses["loss"] > 0
    assert (estimate.trainable < estimate.parameters) == (start is base)
    assert sorted(tmp_path.iterdir()) == before


def test_an_adapter_answers_in_the_commands_and_merges_with_one(base, shards, tmp_path):
    recipe = "llada_v/finetune_lora.yaml"
    adapter = train.run(recipe, overrides(recipe, base, shards, tmp_path / "run"), progress=False).model_dir
    assert sorted(p.name for p in adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    tiny.picture(2).save(tmp_path / "a.png")
    run = CliRunner().invoke
    words = ["--device", "cpu", "--gen-length", "4"]
    asked = run(app, ["ask", str(base), str(tmp_path / "a.png"), "a cat?", "--adapter", str(adapter), *words])
    captioned = run(app, ["caption", str(base), str(tmp_path / "a.png"), "--adapter", str(adapter), *words])
    assert (asked.exit_code, captioned.exit_code) == (0, 0), asked.output + captioned.output
    merged = run(app, ["convert", str(base), str(tmp_path / "merged"), "--adapter", str(adapter)])
    assert merged.exit_code == 0, merged.output
    again = run(app, ["ask", str(tmp_path / "merged"), str(tmp_path / "a.png"), "a cat?", *words])
    assert again.stdout == asked.stdout
    refused = run(app, ["convert", str(base), str(tmp_path / "merged"), "--adapter", str(adapter)])
    assert refused.exit_code == 2


def test_an_adapters_checkpoints_hold_the_adapter_alone_and_resume_to_the_bit(base, shards, tmp_path):
    recipe = "llada_v/finetune_lora.yaml"
    whole = train.run(recipe, overrides(recipe, base, shards, tmp_path / "whole"), progress=False)

    class Stop:
        every_samples = (4,)

        def __call__(self, model, samples_seen):
            os.kill(os.getpid(), 15)

    stopped = train.run(recipe, overrides(recipe, base, shards, tmp_path / "cut"), probes=[Stop()], progress=False)
    assert stopped.fit.stopped
    resumed = train.run(stopped.run_dir / "config.yaml", resume=True, progress=False)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (resumed.model_dir / name).read_bytes() == (whole.model_dir / name).read_bytes()
    newest = max((whole.run_dir / "checkpoints").iterdir())
    alone = export_checkpoint(newest, tmp_path / "alone")
    for path in whole.model_dir.iterdir():
        assert (alone / path.name).read_bytes() == path.read_bytes()
    sizes = [p.stat().st_size for p in stopped.run_dir.rglob("model.safetensors")]
    assert max(sizes) < (base / "model.safetensors").stat().st_size


def test_a_quantised_base_needs_an_adapter(base, shards, tmp_path):
    recipe = "llada_v/finetune_full.yaml"
    with pytest.raises(ConfigError, match=r"nf4 weights cannot be trained themselves; set train\.lora"):
        train.run(recipe, overrides(recipe, base, shards, tmp_path, quantize="nf4"))


@pytest.mark.filterwarnings("ignore")
def test_qlora_trains_beside_a_base_in_four_bits(base, shards, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the extra `quant` is not among the test dependencies")
    recipe = "llada_v/qlora.yaml"
    words = overrides(recipe, base, shards, tmp_path / "run", quantize="nf4", dtype="float32")
    result = train.run(recipe, words, progress=False)
    loaded = mmdiff.load(base, "cpu", quantize="nf4", adapter=result.model_dir)
    assert isinstance(loaded.vision.ask(tiny.picture(1), "a cat?", gen_length=4), str)


def examples(base: Path, shards: Path, **task: object) -> list:
    """The examples of the shards under a chat task, with the tokenizer and layout of ``base``."""
    from data_pipelines.loader import DataConfig
    from mmdiff import config as configs

    tree = {"sources": [{"shards": [str(shards)], "tasks": [{"type": "chat", **task}]}], "batch_size": 1}
    options = configs.load(DataConfig, tree)
    layout = load_model(base).layout()
    loader = open_loader(options, Tokenizer.from_pretrained(base), layout, seed=0)
    return [loader.batch_at(i) for i in range(12)]


def test_published_labels_are_those_of_the_tokenizers_reference(base, shards):
    tokenizer = Tokenizer.from_pretrained(base)
    frame = {tokenizer.bos_id, tokenizer.eot_id, tokenizer.start_header_id, tokenizer.end_header_id}
    for batch in examples(base, shards, labels="published"):
        ids, labels = batch.ids[0], batch.labels[0]
        assert all(bool((labels[ids == i] == i).all()) for i in frame)
        assert int((labels == tokenizer.start_header_id).sum()) == 5  # system, two questions, two answers
    plain = examples(base, shards)[0]
    assert not set(plain.labels[0].tolist()) & (frame - {tokenizer.eot_id})


def test_rainbow_padding_is_one_end_of_text_and_then_the_cycle(base, shards):
    tokenizer, cycle = Tokenizer.from_pretrained(base), [31, 32, 33]
    ids = examples(base, shards, rainbow=cycle, answer_multiple=16, pad_weight=1.0)[0].ids[0].tolist()
    behind = ids[len(ids) - ids[::-1].index(tokenizer.eot_id) :]
    assert behind[0] == tokenizer.eos_id
    assert behind[1:] == [cycle[i % 3] for i in range(len(behind) - 1)]
    assert len(behind) > 4


def test_real_pictures_are_learnt_by_heart_and_told_by_the_command(tmp_path):
    """Four emoji with their captions, a new network, the full recipe; then ``mmdiff ask``."""
    samples = [s for s, _ in iter_samples("embedded:emoji/train") if s is not None][40:800:200]
    captions = [s.info()["caption"] for s in samples]
    rows = []
    for sample, text in zip(samples, captions, strict=True):
        talk = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": text}]
        picture = {suffix: data for suffix, data in sample.members.items() if suffix in IMAGE_SUFFIXES}
        rows.append((sample.key, picture | {"json": json.dumps({"conversations": talk}).encode()}))
        (tmp_path / f"{len(rows)}.png").write_bytes(sample.image())
    write_shards(rows, tmp_path / "shards", "emoji")
    tokenizer = Tokenizer.train([*captions, "what is it?"], 400)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    ids = {name: getattr(tokenizer, name) for name in ("mask_id", "bos_id", "eos_id", "eot_id")}
    shape = {"vocab_size": tokenizer.vocab_size, "width": 64, "depth": 2, "heads": 4, "kv_heads": 4, "ffn_width": 128}
    tower = {"image_size": 16, "patch_size": 8, "width": 32, "depth": 1, "heads": 2, "ffn_width": 64}
    model = {"type": "llada_v", "language": {**shape, **ids}, "vision": tower, "tiling": None, "system": ""}
    changes = {
        "init_from": None,
        "model": model,
        "tokenizer": str(tmp_path / "tokenizer"),
        "data.sources.0.shards": [str(tmp_path / "shards")],
        "data.sources.0.tasks": [{"type": "chat", "answer_multiple": 16, "pad_weight": 1.0}],
        "data.batch_size": 4,
        "train.samples": 1200,
        "train.accumulate": 1,
        "train.gradient_checkpointing": False,
        "train.autocast": None,
        "train.optim.lr": 0.005,
        "train.optim.factors": {},
        "train.schedule.warmup_samples": 40,
        "device": "cpu",
        "out": str(tmp_path / "run"),
    }
    words = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    result = train.run("llada_v/finetune_full.yaml", words, progress=False)
    for number, text in enumerate(captions, 1):
        asked = ["ask", str(result.model_dir), str(tmp_path / f"{number}.png"), "what is it?"]
        told = CliRunner().invoke(app, [*asked, "--gen-length", "16", "--device", "cpu"])
        assert told.stdout.strip() == text, told.output


def test_pictures_of_a_sample_take_the_slots_of_their_tiling(base, shards):
    layout = load_model(base).layout()
    seen = set()
    for batch in examples(base, shards):
        slots = int((batch.ids == -200).sum())
        crops = [c for row in batch.images for c in row]
        assert slots == sum(c.view.tokens(2) for c in crops)
        assert batch.pixels is None
        seen |= {len(c.pixels) for c in crops}
        assert all(c.pixels.shape[2:] == (layout.image_size, layout.image_size) for c in crops)
    assert len(seen) > 1
    one = examples(base, shards, crops="square")
    assert {len(b.pixels) for b in one if b.pixels is not None} == {1}
    assert not any(b.images for b in one)
