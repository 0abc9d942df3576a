"""Text encoders of four makers, tiny and random, from folders in the layout of each."""

from __future__ import annotations

import json

import pytest
import torch

from mmdiff import rng
from mmdiff.errors import CheckpointError
from mmdiff.io.text_encoders import FOLDER, copy_text_encoder, load_text_encoder
from mmdiff.models import llada, scorer, vq
from mmdiff.text import Tokenizer
from tests.helpers import tiny

TEXTS = ["a red circle", "", "the blue square is small"]


def house(folder, kind):
    tokenizer = Tokenizer.train(tiny.TEXTS, 320)
    if kind == "scorer":
        config = scorer.Config(vocab_size=tokenizer.vocab_size, image_size=16, widths=(8, 8), width=12)
        model = scorer.Scorer(config, generator=rng.generator(0))
    elif kind == "llada":
        model = llada.LLaDA(tiny.language(tokenizer), generator=rng.generator(0))
    else:
        model = tiny.unified_checkpoint().model
    model.save_pretrained(folder, tokenizer=tokenizer)
    return folder


def fast_tokenizer(folder, kind):
    """A word tokenizer in the layout of transformers."""
    from tokenizers import Tokenizer as Core
    from tokenizers import models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *sorted({w for text in tiny.TEXTS for w in text.split()})]
    core = Core(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    return len(words)


def foreign(folder, kind):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    words = fast_tokenizer(folder, kind)
    size = {"vocab_size": words, "eos_token_id": 1, "pad_token_id": 0}
    if kind == "clip":
        config = CLIPTextConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            projection_dim=12,
            max_position_embeddings=10,
            **size,
        )
        model = CLIPTextModelWithProjection(config)
    else:
        model = T5EncoderModel(T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, **size))
    model.save_pretrained(folder)
    return folder, model.eval()


@pytest.mark.parametrize(("kind", "channels"), [("scorer", 12), ("llada", 32), ("unified", 32)])
def test_ours_read_texts_each_for_itself(tmp_path, kind, channels):
    encoder = load_text_encoder(house(tmp_path / kind, kind))
    context, pooled = encoder(TEXTS)
    assert (encoder.channels, encoder.pooled_channels) == (channels, channels)
    assert context.shape == (3, 32, channels)
    assert pooled.shape == (3, channels)
    assert torch.isfinite(context).all()
    assert torch.isfinite(pooled).all()
    alone = encoder(TEXTS[2:])
    torch.testing.assert_close(alone[0][0], context[2])
    torch.testing.assert_close(alone[1][0], pooled[2])
    assert not torch.allclose(pooled[0], pooled[2], atol=1e-3)
    # Behind the text there is nothing.
    assert not context[0, -1].any()
    assert not context.requires_grad


def test_clip_gives_its_last_but_one_layer_and_the_projected_vector(tmp_path):
    folder, model = foreign(tmp_path, "clip")
    encoder = load_text_encoder(folder)
    context, pooled = encoder(TEXTS)
    assert context.shape == (3, 10, 16)
    assert pooled.shape == (3, 12)
    ids = encoder._tokenizer(TEXTS, padding="max_length", max_length=10, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    torch.testing.assert_close(context, out.hidden_states[-2])
    torch.testing.assert_close(pooled, out.text_embeds)
    assert (encoder.channels, encoder.pooled_channels) == (16, 12)


def test_t5_gives_its_states_and_their_mean_over_the_text(tmp_path):
    folder, model = foreign(tmp_path, "t5")
    encoder = load_text_encoder(folder)
    context, pooled = encoder(TEXTS)
    assert context.shape == (3, 256, 16)
    read = encoder._tokenizer(TEXTS[:1], return_tensors="pt")
    with torch.no_grad():
        want = model(**{k: v for k, v in read.items() if k != "token_type_ids"}).last_hidden_state
    torch.testing.assert_close(context[:1, : want.shape[1]], want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pooled[:1], want.mean(1), atol=1e-5, rtol=1e-4)


def test_open_clip_gives_its_tokens_and_the_projected_vector(tmp_path):
    import open_clip
    from safetensors.torch import save_file

    shape = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    mean = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": shape, "preprocess_cfg": mean}))
    model = open_clip.model.CLIP(12, shape["vision_cfg"], shape["text_cfg"], output_dict=False).eval()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    encoder = load_text_encoder(tmp_path)
    context, pooled = encoder(TEXTS)
    assert context.shape == (3, 77, 16)
    assert (encoder.channels, encoder.pooled_channels) == (16, 12)
    with torch.no_grad():
        want = model.encode_text(open_clip.get_tokenizer("ViT-B-32")(TEXTS))
    torch.testing.assert_close(pooled, want, atol=1e-5, rtol=1e-4)


def test_an_encoder_is_copied_without_what_it_does_not_need(tmp_path):
    source = house(tmp_path / "source", "scorer")
    (source / "notes.py").write_text("print('never')")
    copy_text_encoder(source, tmp_path / "model")
    kept = {p.name for p in (tmp_path / "model" / FOLDER).iterdir()}
    assert kept == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    one, two = load_text_encoder(source), load_text_encoder(tmp_path / "model" / FOLDER)
    assert torch.equal(one(TEXTS)[0], two(TEXTS)[0])


def test_what_is_no_text_encoder_is_refused(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="no known text encoder: model_type is 'bert'; known are our scorer"):
        load_text_encoder(tmp_path / "other")
    vq.VQ(vq.Config(image_size=16, widths=(8,), blocks=0, levels=(5, 4)), generator=rng.generator(0)).save_pretrained(
        tmp_path / "codes"
    )
    with pytest.raises(CheckpointError, match="a VQ reads no texts"):
        load_text_encoder(tmp_path / "codes")
    folder, _ = foreign(tmp_path / "pickled", "clip")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read as CLIPTextModelWithProjection"):
        load_text_encoder(folder)
