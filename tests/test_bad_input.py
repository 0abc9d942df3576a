"""What bad input gets: every row of docs/bad_input.md, through the public interface and the commands."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import mmdiff
from mmdiff.cli import app
from mmdiff.errors import CheckpointError, ConfigError, SampleError, UnsafeFileError
from mmdiff.pipelines import TextGenerator, VisionLanguage
from mmdiff.pipelines.prompts import Prompter, about
from mmdiff.text import SPECIAL_TOKENS
from tests.helpers import tiny


@pytest.fixture(scope="module")
def vlm():
    return VisionLanguage(tiny.llada_v_checkpoint())


@pytest.fixture(scope="module")
def folder(vlm, tmp_path_factory):
    made = tmp_path_factory.mktemp("model")
    vlm.save_pretrained(made)
    return made


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def red(mode: str = "RGB", size: tuple[int, int] = (20, 10)) -> Image.Image:
    return Image.new("RGB", size, (255, 0, 0)).convert(mode)


def huge() -> bytes:
    """A PNG whose header says 100 megapixels."""
    data = bytearray(saved(Image.new("1", (8, 8)), "PNG"))
    data[16:24] = (10_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


def deep() -> Image.Image:
    return Image.fromarray(np.full((10, 20), 65535, np.uint16))


def turned() -> tuple[bytes, Image.Image]:
    """A picture that is stored lying and says so, and the same upright."""
    upright = red().copy()
    upright.paste((0, 0, 255), (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(upright.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif), upright


def animated() -> bytes:
    return saved(red(), "GIF", save_all=True, append_images=[Image.new("RGB", (20, 10), (0, 255, 0))], duration=10)


def clear() -> Image.Image:
    image = red("RGBA")
    image.putalpha(0)
    return image


@pytest.mark.parametrize(
    ("image", "same_as"),
    [
        (clear(), Image.new("RGB", (20, 10), (255, 255, 255))),
        (saved(red("CMYK"), "JPEG"), Image.open(io.BytesIO(saved(red("CMYK"), "JPEG"))).convert("RGB")),
        (deep(), Image.new("RGB", (20, 10), (255, 255, 255))),
        (turned()[0], turned()[1]),
        (animated(), red()),
    ],
    ids=["alpha", "CMYK", "16 bit", "EXIF rotation", "animation"],
)
def test_an_unusual_picture_is_read_as_documented(vlm, image, same_as):
    score = vlm.loglikelihood([image, same_as, tiny.picture(1)], "no", "yes", samples=4)
    assert score[0] == score[1] != score[2]


@pytest.mark.parametrize(
    ("image", "error", "words"),
    [
        (b"hello", SampleError, "cannot be decoded.*allowed formats"),
        (saved(red(), "PNG")[:50], SampleError, "cannot be decoded"),
        (huge(), SampleError, r"100,000,000 pixels.*shrink it or raise the limit"),
        (np.zeros((0, 5, 3), np.uint8), SampleError, "no pixels"),
        (Image.new("RGB", (0, 5)), SampleError, "no pixels"),
        (np.zeros((4, 4, 3), np.float32), ConfigError, "uint8"),
        (7, ConfigError, "type int"),
        ("no such file.png", ConfigError, "no such file.png: the image cannot be read"),
        ("http://example.org/a.png", ConfigError, "https only"),
    ],
    ids=["text", "cut off", "100 MP", "zero area", "zero area PIL", "floats", "number", "missing", "http"],
)
def test_a_picture_that_is_none_is_refused_with_a_sentence(vlm, image, error, words):
    for call in (lambda: vlm.caption(image), lambda: vlm.ask([tiny.picture(0), image], "no")):
        with pytest.raises(error, match=words):
            call()


@pytest.mark.parametrize("question", ["", "  \n\t"])
def test_an_empty_question_is_refused(vlm, question):
    calls = [
        lambda: vlm.ask(tiny.picture(0), question),
        lambda: vlm.ask([tiny.picture(0)] * 2, ["no", question]),
        lambda: vlm.chat([{"role": "user", "content": question}]),
        lambda: vlm.loglikelihood(tiny.picture(0), question, "yes"),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match="empty text; ask something"):
            call()


@pytest.mark.parametrize("text", ["[MASK]", "<|mdm_mask|>", *SPECIAL_TOKENS, "<image>", "<|start_header_id|>system"])
def test_special_spellings_from_a_user_are_text(vlm, text):
    tokenizer = vlm.checkpoint.tokenizer
    plain, marked = (Prompter(vlm.checkpoint).conversation(about(tiny.picture(0), f"no{t}?")) for t in ("", text))
    special = [i for i in plain.ids if i in tokenizer.special_ids or i < 0]
    assert [i for i in marked.ids if i in tokenizer.special_ids or i < 0] == special
    assert text in tokenizer.decode(marked.ids)
    assert tokenizer.mask_id not in marked.ids
    assert isinstance(TextGenerator(vlm.checkpoint).generate(text, gen_length=2), str)
    if text != "[MASK]":
        with pytest.raises(ConfigError, match="holds no"):
            vlm.infill(tiny.picture(0), text)


def test_a_length_that_is_no_multiple_has_a_shorter_last_block_and_reference_mode_refuses_it(vlm):
    words = {"gen_length": 10, "block_length": 4, "preset": "exact"}
    assert isinstance(vlm.ask(tiny.picture(0), "no", **words), str)
    assert vlm.trace.nfe == 10
    vlm.ask(tiny.picture(0), "no", **words, num_inference_steps=7)
    assert vlm.trace.nfe == 7
    with pytest.raises(ConfigError, match="block_length 4 must divide gen_length 10"):
        vlm.ask(tiny.picture(0), "no", compat="reference", gen_length=10, block_length=4)
    with pytest.raises(ConfigError, match="7 must be a multiple of the 2 blocks"):
        vlm.ask(tiny.picture(0), "no", compat="reference", gen_length=8, block_length=4, steps=7)
    with pytest.raises(ConfigError, match="block_length 12 must be between 1 and gen_length 8"):
        vlm.ask(tiny.picture(0), "no", gen_length=8, block_length=12)


def sharded(folder: Path, out: Path) -> Path:
    """The checkpoint in two shards with an index."""
    from mmdiff.io.checkpoint import read_tensors, write_manifest, write_sharded

    tensors = dict(read_tensors(folder))
    out.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (out / name).write_bytes((folder / name).read_bytes())
    write_sharded(out, tensors, max_shard_bytes=sum(t.nbytes for t in tensors.values()) / 2)
    write_manifest(out)
    return out


def test_a_folder_without_one_of_its_shards_is_refused_by_name(folder, tmp_path):
    broken = sharded(folder, tmp_path / "two")
    shard = sorted(broken.glob("model-*.safetensors"))[0]
    assert mmdiff.load(broken).capabilities
    shard.unlink()
    for manifest in (True, False):
        if not manifest:
            (broken / "manifest.json").unlink()
        with pytest.raises(CheckpointError, match=shard.name):
            mmdiff.load(broken)


def test_a_pickle_is_refused_and_nothing_of_it_is_run(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsafeFileError, match="pickle"):
        mmdiff.load(tmp_path)


PUBLISHED = {"model_type": "llava_llada", "mm_vision_tower": "siglip", "vocab_size": 64, "mask_token_id": 1}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_grid_pinpoints": 7}, "pinpoints"),
        ({"image_grid_pinpoints": [[10**9, 10**9]]}, "area at most"),
        ({"image_grid_pinpoints": [[21, 20]]}, "no multiple of the 20 pixels"),
        ({"image_grid_pinpoints": "(1x1),...,(999999x999999)"}, "is not like"),
        ({"image_grid_pinpoints": "__import__('os')"}, "is not like"),
        ({"image_aspect_ratio": "anyres_max_0"}, "not known"),
        ({"mm_patch_merge_type": "maxpool2x2"}, "not known"),
        ({"mm_newline_position": "everywhere"}, "video_newlines"),
        ({"tokenizer_model_max_length": -1}, "max_tokens"),
        ({"num_hidden_layers": 10**9}, "promises 1,000,000,00"),
        ({"hidden_size": 2**40}, "."),
        ({"vision_config": [1]}, "."),
        ({"mm_projector_type": "resampler"}, "only 'mlp2x_gelu'"),
    ],
)
def test_a_hostile_config_is_one_sentence_and_no_work(tmp_path, change, words):
    from tests.helpers import published

    (tmp_path / "config.json").write_text(json.dumps(published.LLADA_V | {"image_aspect_ratio": "anyres"} | change))
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        mmdiff.load(tmp_path)
    assert re.search(words, str(error.value)), error.value


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["ask", "MODEL", "PICTURE", ""], 2, "empty text"),
        (["ask", "MODEL", "README", "no"], 3, "README.md: the image cannot be decoded"),
        (["caption", "MODEL", "PICTURE", "nowhere.png"], 2, "nowhere.png"),
        (["ask", "MODEL", "PICTURE", "no", "--gen-length", "400"], 2, "300 positions"),
        (["ask", "PICTURE", "PICTURE", "no"], 4, "config.json"),
    ],
)
def test_the_commands_say_it_in_one_sentence_with_an_exit_code(folder, tmp_path, arguments, code, words):
    tiny.picture(0).save(tmp_path / "a.png")
    names = {"MODEL": str(folder), "PICTURE": str(tmp_path / "a.png"), "README": str(folder / "README.md")}
    done = CliRunner().invoke(app, [names.get(a, a) for a in arguments])
    assert done.exit_code == code, done.output
    assert words in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
