"""Continuous image tokens among text: eMIGM's parts in a unified model, through the one engine."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mmdiff
from mmdiff import rng
from mmdiff.batch import IGNORE, Batch, Example, collate
from mmdiff.errors import CheckpointError, ConfigError
from mmdiff.models import emigm, unified, vae
from mmdiff.pipelines import Checkpoint
from mmdiff.pipelines.drawing import Job
from mmdiff.pipelines.painters import painter_of
from mmdiff.training.latent_tokens import latent_losses, slot_values
from mmdiff.training.microbatch import split
from mmdiff.training.objective import Masked
from mmdiff.training.token_diffusion import TokenDiffusion, process
from tests.helpers.tiny import picture, unified_checkpoint

SIDE, GRID, CHANNELS, PATCH = 16, 8, 2, 2
LATENTS = unified.LatentTokensConfig(grid=GRID, channels=CHANNELS, patch=PATCH, head_width=24, head_depth=1)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    codes = unified_checkpoint()
    shape = dataclasses.replace(codes.model.config, codes=None, latents=LATENTS)
    model = unified.Unified(shape, generator=rng.generator(0))
    with torch.no_grad():  # at the start the head says nothing, whatever it is told
        torch.nn.init.normal_(model.head.final_layer.linear.weight, std=0.3, generator=rng.generator(1))
        torch.nn.init.normal_(model.head.res_blocks[0].adaLN_modulation[1].weight, std=0.3, generator=rng.generator(2))
    config = vae.Config(image_size=SIDE, width=32, multipliers=(1, 1), blocks=1, channels=CHANNELS, attention_levels=())
    images = vae.KLVAE(config, generator=rng.generator(3))
    return Checkpoint(model.eval(), codes.tokenizer, images.eval(), codes.classes)


def draw(shape: tuple[int, ...], name: str) -> Tensor:
    return rng.normal(rng.generator(0, name), shape)


def example(checkpoint: Checkpoint, text: str, seed: int | None) -> Example:
    """A prompt and an image, or text alone to be learnt."""
    layout, told = checkpoint.layout, checkpoint.tokenizer.chat([{"role": "user", "content": text}])
    ids = torch.tensor(told.ids + [layout.code_offset] * (layout.codes if seed is not None else 0))
    learnt = ids >= layout.code_offset if seed is not None else torch.ones_like(ids, dtype=torch.bool)
    return Example(
        key=text,
        task="text" if seed is None else "text_to_image",
        ids=ids,
        labels=torch.where(learnt, ids, IGNORE),
        weights=learnt.float(),
        droppable=torch.zeros_like(learnt),
        latents=None if seed is None else draw((CHANNELS, GRID, GRID), f"latents {seed}"),
    )


@pytest.fixture
def batch(checkpoint: Checkpoint) -> Batch:
    return collate([example(checkpoint, t, s) for t, s in (("a cat", 0), ("yes", None), ("the blue square", 1))])


def test_head_embedding_and_tokens_are_emigms(checkpoint):
    """The same weights and inputs give the same numbers."""
    model = checkpoint.model
    width = model.config.language.width
    part = emigm.TransformerConfig(width=width, depth=1, heads=2)
    theirs = emigm.EMIGM(
        emigm.Config(
            grid=GRID,
            channels=CHANNELS,
            patch=PATCH,
            classes=2,
            encoder=part,
            decoder=part,
            head_width=24,
            head_depth=1,
        ),
        generator=rng.generator(7),
    )
    mine = model.latents
    theirs.head.load_state_dict(mine.head.state_dict())
    theirs.z_proj.load_state_dict(mine.project.state_dict())
    theirs.z_proj_ln.load_state_dict(mine.norm.state_dict())
    latents = draw((3, CHANNELS, GRID, GRID), "latents")
    tokens = theirs.patchify(latents)
    assert torch.equal(mine.patchify(latents), tokens)
    assert torch.equal(mine.unpatchify(tokens), latents)
    flat, number = tokens.flatten(0, 1), torch.arange(LATENTS.side**2).repeat(3)
    known = torch.ones(len(flat), dtype=torch.bool)
    entered = mine.embed(flat, known, number) - mine.position(number)
    torch.testing.assert_close(entered, theirs.z_proj_ln(theirs.z_proj(flat)))
    t, z = torch.arange(len(flat)) * 5.0, draw((len(flat), width), "z")
    assert torch.equal(mine.head(flat, t, z), theirs.head(flat, t, z))


class Told:
    """The unified model as `TokenDiffusion` sees a network: conditions of the rows of a batch that hold images."""

    def __init__(self, model: Any, batch: Batch, hidden: Tensor) -> None:
        self.head, layout = model.head, model.layout()
        drawn = batch.ids >= layout.code_offset
        rows = drawn.any(1)
        states = hidden[rows][drawn[rows]].unflatten(0, (int(rows.sum()), -1))
        self.z = model.latents.condition(states, torch.arange(layout.codes).expand(len(states), -1))

    def condition(self, tokens: Tensor, mask: Tensor, labels: Tensor, *, index: Tensor, counts: Any) -> Tensor:
        return self.z.gather(1, index[..., None].expand(-1, -1, self.z.shape[2]))


def test_the_loss_is_emigms_on_the_same_draws(checkpoint, batch):
    model, copies, n = checkpoint.model, 3, checkpoint.layout.codes
    drawn = batch.ids >= checkpoint.layout.code_offset
    hidden = draw((*batch.ids.shape, model.config.language.width), "hidden")
    masked = drawn & (rng.uniform(rng.generator(0, "mask"), batch.ids.shape) < 0.6)
    mine = latent_losses(model, batch, masked, hidden, rng.generator(5), copies)
    # The same numbers, in the order in which eMIGM's objective asks for them.
    source, rows = rng.generator(5), drawn.any(1)
    u = rng.uniform(source, (len(batch), copies, n))[rows].transpose(0, 1).flatten()
    noise = rng.normal(source, (len(batch), copies, n, LATENTS.token_channels))[rows].transpose(0, 1).flatten(0, 2)
    mask = masked[rows][drawn[rows]].unflatten(0, (int(rows.sum()), -1))
    tokens = model.latents.patchify(batch.latents[rows])
    objective = TokenDiffusion(copies=copies)
    theirs = objective.loss(
        Told(model, batch, hidden),
        tokens,
        torch.zeros(len(tokens), dtype=torch.long),
        mask,
        torch.ones(mask.shape),
        lambda places: ((u[places] * len(process())).long(), noise[places]),
    )
    assert len(mine) == int(masked.sum())
    torch.testing.assert_close(mine.mean(), theirs)


def test_every_value_lies_at_its_own_slot_and_parts_of_a_batch_keep_theirs(checkpoint, batch):
    model, drawn = checkpoint.model, batch.ids >= checkpoint.layout.code_offset
    values = slot_values(model, batch)
    assert values is not None
    assert not bool(values[~drawn].any())
    for row in (0, 2):
        assert torch.equal(values[row, drawn[row]], model.latents.patchify(batch.latents[row : row + 1])[0])
    parts = [slot_values(model, part) for part in split(batch, 3)]
    assert parts[1] is None
    assert torch.equal(parts[2][0], values[2])
    with pytest.raises(ConfigError, match="no latents"):
        slot_values(model, dataclasses.replace(batch, latents=None))


def test_training_lowers_the_loss_of_text_and_of_images(checkpoint, batch):
    model = unified.Unified(checkpoint.model.config, generator=rng.generator(0))
    optimizer, seen = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(16):  # always with the same draws: otherwise times differ more than steps help
        losses = Masked(drop_prompt=0.0)(model, batch, rng.generator(0))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        seen.append({task: float(total) / rows for task, (total, rows) in losses.terms.items()})
    assert set(seen[0]) == {"text", "text_to_image"}
    for task in seen[0]:
        assert seen[-1][task] < 0.8 * seen[0][task], task
    missing = [name for name, p in model.named_parameters() if name.startswith("latents") and p.grad is None]
    assert not missing


def test_the_engine_reads_what_training_reads(checkpoint, batch):
    model, painter, layout = checkpoint.model, painter_of(checkpoint), checkpoint.layout
    length = int(batch.valid[0].sum())
    open_ = torch.zeros(1, layout.codes, dtype=torch.bool)
    open_[0, ::3] = True
    known = model.latents.patchify(batch.latents[:1])
    canvas = painter.canvas(Job(subjects=["a cat"], known=known, open=open_, sources=None))
    ids = batch.ids[:1, :length].clone()
    ids[0, canvas.start :][open_[0]] = layout.code_mask_id
    assert torch.equal(canvas.tokens, ids)
    values = slot_values(model, batch)[:1, :length]
    hidden = model.hidden(embeds=model.embed_slots(ids, values=values), valid=batch.valid[:1, :length])
    index = canvas.undecided.nonzero()[:, 1][None]
    theirs = model.latents.condition(
        hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2])), index - canvas.start
    )
    with torch.no_grad():
        torch.testing.assert_close(painter.backbone.forward(canvas, index), theirs)


def test_it_draws_alike_alone_and_in_a_batch_and_redraws_only_what_is_marked(checkpoint, tmp_path):
    mmdiff.ImageGenerator(checkpoint).save_pretrained(tmp_path)
    model = mmdiff.load(tmp_path, device="cpu")
    assert {"caption", "text_image", "class_image"} <= model.capabilities
    gen, texts = model.images, ["a cat", "the blue square is small", "no"]
    together = gen(prompts=texts, seeds=[3, 4, 5], num_inference_steps=3, output_type="pt").images
    alone = gen(prompts=texts[1], seeds=4, num_inference_steps=3, output_type="pt").images
    assert together.shape == (3, 3, SIDE, SIDE)
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=0)
    assert float((together[0] - together[2]).abs().max()) > 1e-3
    image, mask = picture(3, SIDE, SIDE), np.zeros((SIDE, SIDE), bool)
    mask[4:8, 8:16] = True
    before, after = np.asarray(image), np.asarray(gen.edit(image, mask, "a cat", seed=1, num_inference_steps=2))
    assert (before[~mask] == after[~mask]).all()
    assert (before[mask] != after[mask]).any()
    assert isinstance(model.vision.caption(image, gen_length=8), str)
    for order in ("halton", "mar"):
        assert gen(prompts="a cat", seeds=0, num_inference_steps=2, order=order, output_type="np").images.any()


def test_an_autoencoder_of_another_shape_is_refused(checkpoint):
    other = unified_checkpoint().image_tokenizer
    with pytest.raises(CheckpointError, match="give the one the network was trained with"):
        mmdiff.ImageGenerator(dataclasses.replace(checkpoint, image_tokenizer=other))


def test_a_model_draws_codes_or_latents(checkpoint):
    shape = checkpoint.model.config
    for changed in ({"latents": None}, {"codes": unified_checkpoint().model.config.codes}):
        with pytest.raises(ConfigError, match="not both"):
            dataclasses.replace(shape, **changed)
    assert shape.with_width(2 * shape.language.width).latents.head_width == 48
    with pytest.raises(ConfigError, match="multiple"):
        dataclasses.replace(LATENTS, patch=3)
    ids = torch.full((1, checkpoint.layout.codes), checkpoint.layout.code_offset)
    with pytest.raises(ConfigError, match="no values"):
        checkpoint.model.embed_slots(ids)


def test_places_on_the_grid_count_tokens(checkpoint):
    shape = dataclasses.replace(checkpoint.model.config, latents=dataclasses.replace(LATENTS, rotary="grid"))
    with torch.device("meta"):
        model = unified.Unified(shape)
    ids = torch.tensor([[5, *[checkpoint.layout.code_offset] * checkpoint.layout.codes]])
    places = model.places(ids)[0]
    assert places[0].tolist() == [0, 0]
    assert places[1 + LATENTS.side + 2].tolist() == [2, 3]
