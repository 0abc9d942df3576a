"""Configurations of the tasks; what they do is in ``tasks``."""

from __future__ import annotations

from typing import Annotated, Literal

from mmdiff.config import Field, config

from .transforms import AugmentConfig, Fit

__all__ = [
    "CaptionConfig",
    "ChatConfig",
    "ClassToImageConfig",
    "EditConfig",
    "ImageConfig",
    "LatentConfig",
    "PairConfig",
    "PromptedConfig",
    "TaskConfig",
    "TextConfig",
    "TextToImageConfig",
    "VqaConfig",
]

_Weight = Annotated[int, Field(ge=1)]
_Length = Annotated[int, Field(ge=8)]


@config
class ImageConfig:
    """Pixels only: for image tokenizers."""

    type: Literal["image"] = "image"
    """Tag."""
    weight: _Weight = 1
    """Share of the source's turns, as an integer."""
    fit: Fit = "square"
    """How a rectangle becomes a square."""
    augment: AugmentConfig | None = None
    """Random changes of the image."""


@config
class PairConfig:
    """Pixels and the ids of a caption, nothing to predict: for contrastive training."""

    type: Literal["pair"] = "pair"
    """Tag."""
    weight: _Weight = 1
    """Share of the source's turns, as an integer."""
    fit: Fit = "square"
    """How a rectangle becomes a square."""
    augment: AugmentConfig | None = None
    """Random changes of the image."""
    fields: tuple[str, ...] = ("caption", "captions")
    """JSON fields a text may come from; the first is the main one."""
    main: float = Field(default=0.5, ge=0, le=1)
    """Probability of the main field."""
    max_length: _Length = 64
    """Ids that are kept of a caption."""


@config
class CaptionConfig:
    """Image and request, caption as the answer."""

    type: Literal["caption"] = "caption"
    """Tag."""
    weight: _Weight = 1
    """Share of the source's turns, as an integer."""
    prompt: str = "Describe this image."
    """What the user says."""
    template: Literal["chat", "plain"] = "chat"
    """chat: request and answer; plain: the image, the caption and a newline, as in LLaDA-V's first stage."""
    fit: Fit = "square"
    """How a rectangle becomes a square."""
    crops: Literal["model", "square"] = "model"
    """model: as the model's tiling cuts images; square: one square without tiles, as in LLaDA-V's first stage."""
    augment: AugmentConfig | None = None
    """Random changes of the image."""
    fields: tuple[str, ...] = ("caption", "captions")
    """JSON fields a text may come from; the first is the main one."""
    main: float = Field(default=0.5, ge=0, le=1)
    """Probability of the main field."""
    answer_multiple: _Weight = 8
    """The answer with its end is filled up to a multiple of this many ids."""
    pad_weight: float = Field(default=0.05, ge=0)
    """Weight of the filling in the loss; 1 as published."""
    rainbow: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Rainbow Padding (arXiv 2510.03680): the filling is one end of text, then these ids in turn (seven or more unused
    ones); empty: end of text throughout."""
    max_length: _Length = 4096
    """Longer sequences are skipped and counted."""


@config
class VqaConfig:
    """Image and question, short answer."""

    type: Literal["vqa"] = "vqa"
    """Tag."""
    weight: _Weight = 1
    """Share of the source's turns, as an integer."""
    balance: Literal["none", "answer"] = "none"
    """How a sample's question is drawn: uniformly, or first its kind of answer uniformly, then one of that kind."""
    kinds: tuple[str, ...] = ()
    """Only questions of these kinds; empty for all."""
    turns: _Weight = 1
    """Most questions about one image; between 1 and so many are asked in one conversation, all answers are learnt."""
    fit: Fit = "square"
    """How a rectangle becomes a square."""
    crops: Literal["model", "square"] = "model"
    """model: as the model's tiling cuts images; square: one square without tiles, as in LLaDA-V's first stage."""
    augment: AugmentConfig | None = None
    """Random changes of the image."""
    answer_multiple: _Weight = 8
    """The answer with its end is filled up to a multiple of this many ids."""
    pad_weight: float = Field(default=0.05, ge=0)
    """Weight of the filling in the loss; 1 as published."""
    rainbow: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Rainbow Padding (arXiv 2510.03680): the filling is one end of text, then these ids in turn (seven or more unused
    ones); empty: end of text throughout."""
    max_length: _Length = 4096
    """Longer sequences are skipped and counted."""


@config
class ChatConfig:
    """A conversation of a LLaVA-style JSON, with or without an image; every answer is learnt."""

    type: Literal["chat"] = "chat"
    """Tag."""
    weight: _Weight = 1
    """Share of the source's turns, as an integer."""
    system: str | None = None
    """System message; null: the model's own, if it has one."""
    labels: Literal["answers", "published"] = "answers"
    """answers: every answer with its end of turn; published: as LLaDA-V's training code, also the headers of answers
    and every special token of the template, texts taken with their surrounding whitespace."""
    fit: Fit = "square"
    """How a rectangle becomes a square."""
    crops: Literal["model", "square"] = "model"
    """model: as the model's tiling cuts images; square: one square without tiles, as in LLaDA-V's first stage."""
    augment: AugmentConfig | None = None
    """Random changes of the image."""
    answer_multiple: _Weight = 8
    """The last answer with its end is filled up to a multiple of this many ids."""
    pad_weight: float = Field(default=0.05, ge=0)
    """Weight of the filling in the loss; 1 as published."""
    rainbow: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Rainbow Padding (arXiv 2510.03680): the filling is one end of text, then these ids in turn (seven or more unused
    ones); empty: end of text throughout."""
    max_length: _Length = 4096
    """Longer sequences are skipped and counted."""


@config
class TextToImageConfig:
    """Caption, image codes as the answer; needs the member ``codes.npy`` (``mmdiff data cache``)."""

    type: Literal["text_to_image"] = "text_to_image"
    """Tag."""
    weight: _Weight = 1
    """Share of the source's turns, as an integer."""
    fields: tuple[str, ...] = ("caption", "captions")
    """JSON fields a text may come from; the first is the main one."""
    main: float = Field(default=0.5, ge=0, le=1)
    """Probability of the main field."""
    drop_text: float = Field(default=0.1, ge=0, le=1)
    """Share of prompts that are left empty, for models that learn an empty prompt (MMaDA); others have the objective's
    drop_prompt."""
    max_length: _Length = 4096
    """Longer sequences are skipped and counted."""


@config
class ClassToImageConfig:
    """Name of a class, image codes as the answer; needs the member ``codes.npy`` (``mmdiff data cache``)."""

    type: Literal["class_to_image"] = "class_to_image"
    """Tag."""
    weight: _Weight = 1
    """Share of the source's turns, as an integer."""
    field: str = "concept"
    """JSON field with the name of the class; the caption stands in where it is missing."""
    classes: tuple[str, ...] = ()
    """Names by number, for samples whose class is the number in a ``.cls`` member."""
    drop_text: float = Field(default=0.1, ge=0, le=1)
    """Share of prompts that are left empty, for models that learn an empty prompt (MMaDA); others have the objective's
    drop_prompt."""
    max_length: _Length = 4096
    """Longer sequences are skipped and counted."""


@config
class EditConfig:
    """Picture and instruction, codes of the changed picture as the answer; needs ``codes.npy`` (``mmdiff data cache``).

    The sample's first image, whose codes are cached, is what comes out; its others (``image2`` and on) are what it can
    be made from, of which one is drawn each time. A model that reads pictures as codes needs theirs too (``mmdiff data
    cache --others``); it sees them as they are cached, without ``fit`` and ``augment``.
    """

    type: Literal["edit"] = "edit"
    """Tag."""
    weight: _Weight = 1
    """Share of the source's turns, as an integer."""
    field: str = "instruction"
    """JSON field with the instruction, or with a list of which one is drawn."""
    fit: Fit = "square"
    """How a rectangle becomes a square."""
    augment: AugmentConfig | None = None
    """Random changes of the picture that is shown."""
    drop_text: float = Field(default=0.1, ge=0, le=1)
    """Share of instructions that are left out, for models that read pictures as codes (Lumina-DiMOO); others have the
    objective's drop_prompt."""
    max_length: _Length = 4096
    """Longer sequences are skipped and counted."""


@config
class TextConfig:
    """Plain text, every id of it to be learnt: for language models."""

    type: Literal["text"] = "text"
    """Tag."""
    weight: _Weight = 1
    """Share of the source's turns, as an integer."""
    fields: tuple[str, ...] = ("text", "caption")
    """JSON fields the text may come from, the first that exists; else the ``.txt`` member."""
    max_length: _Length = 256
    """Ids of an example; of a longer text a window is drawn."""


@config
class LatentConfig:
    """Class number and the encoded image, for class-conditional image models; needs ``mmdiff data cache``."""

    type: Literal["latent"] = "latent"
    """Tag."""
    weight: _Weight = 1
    """Share of the source's turns, as an integer."""
    field: str = "concept"
    """JSON field with the name of the class, for samples without a number in a ``.cls`` member."""
    classes: tuple[str, ...] = ()
    """Names by number, for ``field``."""
    flip: bool = True
    """Take the mirrored image half of the time, where the cache holds it."""


@config
class PromptedConfig:
    """Text and the image itself, for networks that draw from the features of a text encoder."""

    type: Literal["prompted"] = "prompted"
    """Tag."""
    weight: _Weight = 1
    """Share of the source's turns, as an integer."""
    image: Literal["latents", "pixels"] = "latents"
    """latents: as ``mmdiff data cache`` encoded it; pixels: the picture, for networks without an autoencoder."""
    fit: Fit = "square"
    """How a rectangle becomes a square (``pixels``)."""
    augment: AugmentConfig | None = None
    """Random changes of the image (``pixels``)."""
    flip: bool = False
    """Take the mirrored image half of the time, where the cache holds it (``latents``)."""
    fields: tuple[str, ...] = ("caption", "captions")
    """JSON fields a text may come from; the first is the main one."""
    main: float = Field(default=0.5, ge=0, le=1)
    """Probability of the main field."""


TaskConfig = Annotated[
    ImageConfig
    | PairConfig
    | CaptionConfig
    | VqaConfig
    | ChatConfig
    | TextToImageConfig
    | ClassToImageConfig
    | EditConfig
    | TextConfig
    | LatentConfig
    | PromptedConfig,
    Field(discriminator="type"),
]
"""Any of the tasks."""
