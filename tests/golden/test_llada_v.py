"""LLaDA-V against the published code, from pixels to decoded tokens: fixture ``llada_v``.

Every tensor of the fixture has a rule in `RULES` (and every entry of a case in `ENTRIES`); one without a rule fails.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer as Core
from torch import Tensor

import mmdiff
from mmdiff.batch import IGNORE, IMAGE, expand
from mmdiff.diffusion import masking, objectives
from mmdiff.images import Crops, Flat, Frames, cut, film
from mmdiff.models.llada_v import LLaDAV
from mmdiff.pipelines.answers import place_images
from mmdiff.sampling import Canvas, DllmCache, Factor, Linear, Prefix, Stop, TextBackbone, layout, steps
from mmdiff.sampling.presets import text_parts
from mmdiff.text import PLACEHOLDER, VISION_SYSTEM, Content, Tokenizer, from_llava, image_first

NAME = "llada_v"
EXACT = 0.0
STATES, LOGITS, LOSS, GRADIENT, GREY_LEVEL = 1e-4, 2e-4, 1e-4, 1e-4, 1 / 127.5

RULES = {
    r"\w+\.(vision_features|projected|inputs_embeds)": STATES,
    r"\w+\.inputs_embeds\.newline_\w+": STATES,
    r"\w+\.logits_(first|last)": LOGITS,
    r"sft\.\w+\.(input_ids|labels)": EXACT,
    r"plain\.(input_ids|labels)": EXACT,
    r"template\.\w+\.input_ids": EXACT,
    r"loss_\w+\.(expanded_labels|masked|conversation_ids)": EXACT,
    r"loss_\w+\.loss": LOSS,
    r"loss_\w+\.grad\..+": GRADIENT,
    r"[gfc]_\w+\.(output|trace)": EXACT,
}
"""Output -> tolerance; that of gradients is relative to the largest entry."""


def read(root: Path, name: str) -> Any:
    return json.loads((root / name).read_text())


def conversations(config: dict[str, Any]) -> list[str]:
    return [name for name in config["prompts"] if "." not in name]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    root = Path(metafunc.config.getoption("--fixtures")) / NAME
    config = read(root, "config.json")
    inputs = load_file(root / "inputs.safetensors")
    outputs = sorted(load_file(root / "outputs.safetensors"))
    cases = {
        "output": outputs,
        "decoded": [n for n, case in config["cases"].items() if "gen_length" in case],
        "conversation": conversations(config),
        "pictured": [n.removesuffix(".pixel_values") for n in inputs if n.endswith(".pixel_values")],
        "counted": [n for n, case in config["cases"].items() if "sequence_length" in case],
    }
    for name, values in cases.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values)


@pytest.fixture(scope="module")
def root(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.getoption("--fixtures")) / NAME


@pytest.fixture(scope="module")
def config(root: Path) -> dict[str, Any]:
    return read(root, "config.json")


@pytest.fixture(scope="module")
def inputs(root: Path) -> dict[str, Tensor]:
    return load_file(root / "inputs.safetensors")


@pytest.fixture(scope="module")
def outputs(root: Path) -> dict[str, Tensor]:
    return load_file(root / "outputs.safetensors")


@pytest.fixture(scope="module")
def folder(root: Path, config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as it is published."""
    made = tmp_path_factory.mktemp(NAME)
    (made / "config.json").write_text(json.dumps(config["lm_config"] | {"vision_config": config["vision_config"]}))
    shutil.copy(root / "weights.safetensors", made / "model.safetensors")
    shutil.copy(root / config["tokenizer"]["file"], made / "tokenizer.json")
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> LLaDAV:
    return LLaDAV.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(folder)


def pictures(case: str, inputs: dict[str, Tensor]) -> list[Image.Image]:
    """The pictures of a case, or the frames of its video."""
    for name in (f"{case}.image", f"{case}.frames"):
        if name in inputs:
            stack = inputs[name] if inputs[name].ndim == 4 else inputs[name][None]
            return [Image.fromarray(np.asarray(p)) for p in stack]
    shared = case.partition("_")[0]
    names = sorted(
        (n for n in inputs if re.fullmatch(rf"{shared}\.image\d+", n)), key=lambda n: int(n[len(shared) + 6 :])
    )
    return [Image.fromarray(inputs[n].numpy()) for n in names]


def crops_of(case: str, model: LLaDAV, inputs: dict[str, Tensor], newline: str | None = None) -> list[Crops]:
    """Our crops of a case, with the reference's pixels in them; several pictures as its evaluation or training does."""
    size, tiling = model.config.vision.image_size, model.config.tiling
    shown = pictures(case, inputs)
    if f"{case}.frames" in inputs:
        made = [film(shown, size, tiling)]
        made = made if newline is None else [Crops(made[0].pixels, Frames(len(shown), newline))]
    else:
        made = cut(shown, size, tiling, compat="reference" if case.endswith("_eval") else None)
    name = f"{case}.pixel_values" if f"{case}.pixel_values" in inputs else f"{case.partition('_')[0]}.pixel_values"
    theirs = inputs[name].split([len(c.pixels) for c in made])
    return [Crops(pixels, c.view) for pixels, c in zip(theirs, made, strict=True)]


def test_pixels_are_those_of_the_reference_to_one_grey_level(pictured, model, inputs):
    size, tiling = model.config.vision.image_size, model.config.tiling
    shown = pictures(pictured, inputs)
    ours = [film(shown, size, tiling)] if f"{pictured}.frames" in inputs else cut(shown, size, tiling)
    theirs = inputs[f"{pictured}.pixel_values"]
    torch.testing.assert_close(torch.cat([c.pixels for c in ours]), theirs, atol=GREY_LEVEL, rtol=0)


def test_a_case_has_the_published_numbers_of_crops_and_tokens(counted, config, model, inputs):
    case = config["cases"][counted]
    crops = crops_of(counted, model, inputs)
    counts = [c.view.tokens(model.config.vision.grid) for c in crops]
    embeds, valid = model.embed(inputs[f"{counted}.input_ids"], crops)
    sizes = [list(p.size) for p in pictures(counted, inputs)]
    found = {
        "image_sizes": sizes[: len(case["image_sizes"])],
        "modalities": case["modalities"],
        "num_crops": sum(len(c.pixels) for c in crops),
        "num_image_tokens": sum(counts),
        "sequence_length": embeds.shape[1],
    }
    assert valid.all()
    assert found == case


def spelled(ids: list[int], tokenizer: Tokenizer) -> str:
    """A text that has these ids; one the vocabulary lacks stands for an id that no character has."""
    pieces = [tokenizer.decode([i]) for i in ids]
    return "".join(p if tokenizer.encode(p) == [i] else "\uffff" for i, p in zip(ids, pieces, strict=True))


def text_of(name: str, model: LLaDAV, tokenizer: Tokenizer, config: Any, expected: Tensor) -> Tensor:
    """Ids and labels of a training sample, or the ids of a prompt."""
    case, _, what = name.rpartition(".")
    kind, _, conversation = case.partition(".")
    if kind == "plain":
        caption = spelled([i for i in expected.tolist() if i not in (IMAGE, IGNORE)], tokenizer).removesuffix("\n")
        made = tokenizer.plain(caption)
    elif kind == "sft":
        turns = from_llava(config["prompts"][conversation])
        made = tokenizer.dialogue(turns, 1, system=model.config.system, compat="reference")
    else:
        made = tokenizer.chat(asked(conversation, config), 1, system=model.config.system, compat="reference")
    return torch.tensor(made.ids if what == "input_ids" else made.labels).reshape(expected.shape)


def asked(conversation: str, config: dict[str, Any]) -> list[dict[str, Any]]:
    """A conversation without its last answer, its placeholders where they are."""
    roles = {"human": "user", "gpt": "assistant"}
    turns = config["prompts"][conversation]
    turns = turns[:-1] if turns[-1]["from"] == "gpt" else turns
    return [{"role": roles[t["from"]], "content": Content.parse(t["value"])} for t in turns]


def losses(case: str, model: LLaDAV, config: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything that is known of a loss case."""
    unknown = set(config["cases"][case]) - {"conversation_mask", "image_sizes", "modalities", "uses_pixels"}
    assert not unknown, f"options without a meaning here: {unknown}"
    crops = [c for picture in config["cases"][case]["uses_pixels"] for c in crops_of(picture, model, inputs)]
    ids, labels, t, u = (inputs[f"{case}.{n}"] for n in ("input_ids", "labels", "t", "u"))
    slots = [c.view.tokens(model.config.vision.grid) for c in crops]
    expanded = expanded_labels(ids, labels, slots, u.shape[1])
    p = masking.mask_probability(t)
    masked = masking.independent_mask(p, u, expanded != IGNORE)
    found = {"expanded_labels": expanded, "masked": masked}
    attend = None
    if config["cases"][case]["conversation_mask"]:
        special = config["ids"]
        turns = masking.dialogue_turns(expanded, special["start_header"], special["assistant_first"])
        found["conversation_ids"], attend = turns, masking.dialogue_causal(turns)
    model.zero_grad()
    embeds, _ = model.embed(ids, crops)
    blank = model.language.embed_tokens(torch.tensor(model.config.language.mask_id))
    hidden = model.hidden(embeds=torch.where(masked[..., None], blank, embeds), attend=attend)
    entropy = objectives.chunked_cross_entropy(hidden[masked], expanded[masked], model.text_head)
    weights = objectives.token_weights(masked, p, (expanded != IGNORE).float())[masked]
    loss = (entropy * weights).sum() / len(ids)
    loss.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    return found | {"loss": loss.detach()} | {f"grad.{k}": v for k, v in gradients.items()}


def expanded_labels(ids: Tensor, labels: Tensor, slots: list[int], length: int) -> Tensor:
    """Labels with a place for every image token, padded to the length of the batch."""
    rows, left = [], list(slots)
    for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
        images = row.count(IMAGE)
        mine, left = left[: max(images, 1)][:images], left[max(images, 1) :]
        rows.append(expand(row, label, mine)[1])
    return torch.tensor([(r + [IGNORE] * length)[:length] for r in rows])


OUR_GRADIENTS = {
    r"image_newline": "newline",
    r"mm_projector\.(\d+\.\w+)": r"connector.\1",
    r"layers\.(\d+)\.([qkvo]_proj)": r"language.layers.\1.self_attn.\2.weight",
    r"layers\.(\d+)\.((?:gate|up|down)_proj)": r"language.layers.\1.mlp.\2.weight",
}


ANSWER_OPTIONS = {"steps", "gen_length", "block_length", "cfg_scale", "threshold", "prefix_refresh_interval"}
ANSWER_FACTS = {"image", "forwards", "forward_lengths", "min_confidence_gap", "hook", "prompt_length"}
ANSWER_TEXTS = {"stopping_criteria", "generation_suffix"}


def cache_of(case: dict[str, Any]) -> Any:
    """The cache policy that a case's hook stands for."""
    if not case.get("hook"):
        return None
    if case["hook"] == "fast_dllm":
        return Prefix(refresh=case["prefix_refresh_interval"])
    name, *options = case["hook"].split()
    assert name == "dllm_cache"
    words = {"prompt_interval_steps": "prompt_interval", "gen_interval_steps": "answer_interval"}
    given = {words.get(k, k): float(v) if "." in v else int(v) for k, v in (o.split("=") for o in options)}
    return DllmCache(first_layer=False, all_values=False, **given)


def answer(case: dict[str, Any], name: str, model: LLaDAV, tokenizer: Tokenizer, config: Any, inputs: Any) -> Any:
    """Decode a case; returns the canvas before every pass, and what the engine returns."""
    unknown = set(case) - ANSWER_OPTIONS - ANSWER_FACTS - ANSWER_TEXTS
    assert not unknown, f"options without a meaning here: {unknown}"
    crops = crops_of(case["image"], model, inputs) if case["image"] else []
    slots = [c.view.tokens(model.config.vision.grid) for c in crops]
    ids = inputs[f"{name}.input_ids"][0].tolist()
    return decode_case(case, expand(ids, ids, slots)[0], crops, model, tokenizer, config)


def decode_case(case: Any, ids: list[int], crops: list[Crops], model: LLaDAV, tokenizer: Tokenizer, config: Any) -> Any:
    """As `answer`, from a prompt in which every image token has its slot."""
    suffix = tokenizer.encode(case.get("generation_suffix", ""))
    row = [None] * case["gen_length"] + suffix
    mask_id = model.config.language.mask_id
    canvas = place_images(layout([ids], [row], mask_id=mask_id), model, crops)
    words = {k: case[k] for k in ("gen_length", "block_length", "steps", "cfg_scale") if k in case}
    parts = text_parts(
        compat="reference",
        end_ids=(tokenizer.eos_id,),
        forbid=tuple(config["ids"]["suppressed"]),
        **words,
    ).arguments()
    parts["schedule"] = Linear(case["steps"], published=True, idle=False)
    if case.get("threshold") is not None:
        parts |= {"schedule": None, "selector": Factor(float(case["threshold"]), published="llada_v")}
    if "stopping_criteria" in case:
        ends = tuple(tuple(published_ids(text, tokenizer)) for text in case["stopping_criteria"])
        parts["exit"] = Stop(ends, tokenizer.eos_id, published=True)
    before = [row_of(canvas)]
    run = steps(TextBackbone(model), canvas=canvas, **parts | {"cache": cache_of(case)})
    while True:
        try:
            before.append(row_of(next(run).canvas))
        except StopIteration as end:
            return torch.tensor(before[:-1], dtype=torch.int32), end.value


def row_of(canvas: Canvas) -> list[int]:
    return canvas.tokens[0, canvas.start :].tolist()


def published_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a text in which spellings of special tokens are meant."""
    special = {tokenizer.decode([i], keep_special=True): i for i in tokenizer.special_ids}
    pieces = re.split("(" + "|".join(map(re.escape, special)) + ")", text)
    return [i for p in pieces if p for i in ([special[p]] if p in special else tokenizer.encode(p))]


def test_a_decoded_case_has_the_published_output_trace_and_passes(decoded, model, tokenizer, config, inputs, outputs):
    case = config["cases"][decoded]
    trace, done = answer(case, decoded, model, tokenizer, config, inputs)
    end = done.canvas.start + case["gen_length"] if done.canvas.end is None else int(done.canvas.end[0])
    suffix = tokenizer.encode(case.get("generation_suffix", ""))
    kept = done.canvas.tokens[0, done.canvas.start : min(end, done.canvas.start + case["gen_length"])].tolist()
    assert [kept + suffix] == outputs[f"{decoded}.output"].tolist()
    if f"{decoded}.trace" in outputs:
        assert torch.equal(trace, outputs[f"{decoded}.trace"])
    assert done.trace.nfe == case["forwards"]
    assert [p.computed for p in done.trace.passes] == case["forward_lengths"]
    assert done.canvas.start == case["prompt_length"]


def computed(name: str, model: LLaDAV, tokenizer: Tokenizer, config: Any, inputs: Any, expected: Tensor) -> Tensor:
    """What we compute for an output of the fixture."""
    case, _, what = name.partition(".")
    if case in ("sft", "template", "plain"):
        return text_of(name, model, tokenizer, config, expected)
    if case.startswith("loss_"):
        for theirs, ours in OUR_GRADIENTS.items():
            what = re.sub(rf"grad\.{theirs}", rf"grad.{ours}", what)
        return losses(case, model, config, inputs)[what]
    with torch.no_grad():
        crops = crops_of(case, model, inputs, what.partition(".newline_")[2] or None)
        if what == "vision_features":
            return model.vision(torch.cat([c.pixels for c in crops]))
        if what == "projected":
            return model.features(torch.cat([c.pixels for c in crops]))
        embeds, valid = model.embed(inputs[f"{case}.input_ids"], crops)
        if what.startswith("inputs_embeds"):
            return embeds
        logits = model(embeds=embeds, valid=valid)
        return logits[:, : expected.shape[1]] if what == "logits_first" else logits[:, -expected.shape[1] :]


def test_output_follows_its_rule(output, model, tokenizer, config, inputs, outputs):
    rules = [tolerance for pattern, tolerance in RULES.items() if re.fullmatch(pattern, output)]
    assert rules, f"{output} has no rule"
    if re.match(r"[gfc]_", output):
        return  # decoded case by case, below
    expected, tolerance = outputs[output], rules[0]
    if ".grad." in output:
        tolerance *= float(expected.abs().max())
    ours = computed(output, model, tokenizer, config, inputs, expected)
    assert ours.dtype == expected.dtype
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=0)


def test_text_without_the_quirk_is_the_published_prompt(conversation, config, folder, model, tokenizer):
    published = config["prompts"][f"{conversation}.inference_prompt"]
    core = Core.from_file(str(folder / "tokenizer.json"))
    chunks = [core.encode(c, add_special_tokens=False).ids for c in published.split(PLACEHOLDER)]
    joined = [i for chunk in chunks for i in [IMAGE, *chunk]][1:]
    messages = asked(conversation, config)
    assert tokenizer.chat(messages, 1, system=model.config.system).ids == joined
    lossy = tokenizer.chat(messages, 1, system=model.config.system, compat="reference").ids
    assert lossy == [i for n, chunk in enumerate(chunks) for i in [IMAGE, *chunk[n > 0 :]]][1:]
    assert model.config.system == VISION_SYSTEM


def test_a_placeholder_goes_to_the_front_as_published(conversation, config):
    turns = config["prompts"][conversation]
    moved = [t | {"value": image_first(t["value"])} for t in turns]
    assert moved == config["prompts"].get(f"{conversation}.after_preprocess_multimodal", turns)


def test_labels_without_the_quirk_are_the_answers(conversation, config, model, tokenizer):
    messages = from_llava(config["prompts"][conversation])
    reference = tokenizer.dialogue(messages, 1, system=model.config.system, compat="reference")
    ours = tokenizer.dialogue(messages, 1, system=model.config.system)
    assert ours.ids == reference.ids
    answers = [m["content"].texts[0] for m in messages if m["role"] == "assistant"]
    learnt = [[i for i in ours.labels[a:b] if i != IGNORE] for a, b in ours.spans]
    assert learnt == [[*tokenizer.encode(text), tokenizer.eot_id] for text in answers]
    assert sum(i != IGNORE for i in ours.labels) == sum(map(len, learnt))
    assert all(a in (IGNORE, b) for a, b in zip(ours.labels, reference.labels, strict=True))


def test_pictures_side_by_side_have_a_newline_each_unless_the_quirk_is_asked_for(model, inputs):
    size, tiling, side = model.config.vision.image_size, model.config.tiling, model.config.vision.grid
    shown = [Image.fromarray(inputs[n].numpy()) for n in sorted(inputs) if re.fullmatch(r"\w+\.image\d+", n)]
    for compat, view in (("reference", Flat()), (None, Flat(newline=tiling.newlines))):
        assert [c.view for c in cut(shown, size, tiling, compat=compat)] == [view] * len(shown)
    assert Flat(newline=True).tokens(side) == side**2 + 1


def test_the_public_pipeline_decodes_as_the_published_loop(conversation, config, folder, model, tokenizer, inputs):
    """A conversation about every picture through `mmdiff.load`, against the parts put together by hand."""
    vlm = mmdiff.load(folder, device="cpu").vision
    names = [n.removesuffix(".image") for n in inputs if n.endswith(".image")]
    messages = asked(conversation, config)[-1:]
    question = "".join(messages[0]["content"].texts).strip()
    for name in names:
        (shown,) = pictures(name, inputs)
        answer = vlm.ask(shown, question, compat="reference", gen_length=8, block_length=4, steps=4)
        (crops,) = cut([shown], model.config.vision.image_size, model.config.tiling)
        slots = crops.view.tokens(model.config.vision.grid)
        about = [{"role": "user", "content": Content(("", f"\n{question}"))}]
        ids = tokenizer.chat(about, slots, system=model.config.system, compat="reference").ids
        case = {"gen_length": 8, "block_length": 4, "steps": 4, "stopping_criteria": ["<|eot_id|>"]}
        _, done = decode_case(case, ids, [crops], model, tokenizer, config)
        row = done.tokens[0].tolist()
        end = next((i for i, t in enumerate(row) if t in (tokenizer.eos_id, tokenizer.eot_id)), len(row))
        assert answer == tokenizer.decode(row[:end]).strip()


def test_every_key_of_the_weights_is_consumed_and_the_tower_lacks_its_last_layer(root, config, model):
    assert len(load_file(root / "weights.safetensors")) == len(model.state_dict())
    assert model.config.vision.depth == config["vision_config"]["num_hidden_layers"] - 1


def test_every_input_is_used(inputs, config):
    words = r"image|image\d+|frames|pixel_values|input_ids|labels|t|u"
    cases = {n.partition("_")[0] for n in config["cases"]} | set(config["cases"])
    unknown = [n for n in inputs if not re.fullmatch(rf"(\w+)\.({words})", n) or n.partition(".")[0] not in cases]
    assert not unknown
