"""Text encoders beside a network: texts in, features and one vector per text out.

Ours (the scorer, and every network of LLaDA's family), those of transformers (CLIP's text tower, T5's encoder) and of
open_clip, from a folder in the layout of each. Weights are read from safetensors files alone.

A text's features depend on nothing but the text: every encoder fills up to a length of its own.

Source: SD3 (arXiv 2403.03206), section 4, for what is taken of CLIP: the last but one layer, and the projected vector.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmdiff.errors import CheckpointError
from mmdiff.io.atomic import load_json
from mmdiff.io.folder import load_model
from mmdiff.io.hub import resolve
from mmdiff.text import Tokenizer

__all__ = ["FOLDER", "TextEncoder", "copy_text_encoder", "load_text_encoder"]

FOLDER = "text_encoder"
"""Name of its folder beside a network."""

_LENGTH = 32
"""Ids that our own encoders read of a text."""

_T5_LENGTH = 256
"""Ids that SD3 reads with T5."""

_KINDS = ("*.json", "*.safetensors", "*.txt", "*.model")
"""Files of an encoder; none of them runs code."""


class TextEncoder(Protocol):
    """Texts into conditions.

    Attributes:
        folder: Where it lies.
        channels: J, size of a feature.
        pooled_channels: P, size of the vector of a whole text.
    """

    folder: Path
    channels: int
    pooled_channels: int

    def __call__(self, texts: Sequence[str]) -> tuple[Float[Tensor, "B M J"], Float[Tensor, "B P"]]:
        """Features (of a length that is always the same) and vectors, on the encoder's device."""
        ...


def load_text_encoder(path_or_id: str | Path, device: torch.device | str = "cpu") -> TextEncoder:
    """A frozen text encoder.

    Args:
        path_or_id: Folder in our layout, in that of transformers or of open_clip, or a hub id.
        device: Where it computes.

    Raises:
        CheckpointError: It holds none of the known encoders, or its weights are in a pickle.
    """
    folder = resolve(path_or_id)
    if (folder / "open_clip_config.json").is_file():
        return _OpenClip(folder, device)
    file = folder / "config.json"
    tree = load_json(file) if file.is_file() else {}
    kind = tree.get("model_type") if isinstance(tree, dict) else None
    if isinstance(tree, dict) and "mmdiff_version" in tree:
        return _House(folder, device)
    if kind in ("clip", "clip_text_model"):
        return _Clip(folder, device)
    if kind == "t5":
        return _T5(folder, device)
    raise CheckpointError(
        f"{folder}: is no known text encoder: model_type is {kind!r}; known are our scorer and language models, clip, "
        "clip_text_model and t5 of transformers, and folders of open_clip (open_clip_config.json)"
    )


def copy_text_encoder(source: str | Path, folder: str | Path) -> None:
    """Copy an encoder's files into ``folder`` / `FOLDER`, so that a checkpoint is whole.

    Raises:
        CheckpointError: A file could not be written.
    """
    start, target = resolve(source), Path(folder) / FOLDER
    try:
        target.mkdir(parents=True, exist_ok=True)
        for path in {p for kind in _KINDS for p in start.glob(kind)}:
            if path.name != "manifest.json":  # of the whole folder, of which this is a part
                shutil.copyfile(path, target / path.name)
    except OSError as error:
        raise CheckpointError(f"{error.filename or target}: cannot be written ({error.strerror})") from error


class _House:
    """The scorer's words and vector, or the last states of a language model and their mean."""

    def __init__(self, folder: Path, device: torch.device | str) -> None:
        model: Any = load_model(folder, device=device)
        self.model = model
        self._scores = hasattr(self.model, "embed_text")
        if not self._scores and not hasattr(self.model, "embed_slots"):
            raise CheckpointError(f"{folder}: a {type(self.model).__name__} reads no texts")
        self._tokenizer, self._device, self.folder = Tokenizer.from_pretrained(folder), device, folder
        config: Any = model.config
        self.channels: int = config.width if self._scores else getattr(config, "language", config).width
        self.pooled_channels = self.channels

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        rows = [self._tokenizer.encode(text)[:_LENGTH] for text in texts]
        ids = torch.zeros(len(rows), _LENGTH, dtype=torch.long)
        valid = torch.zeros(len(rows), _LENGTH, dtype=torch.bool)
        for i, row in enumerate(rows):
            # An empty text still has its end: attention over nothing has no value.
            row = row or [self._tokenizer.eos_id]
            ids[i, : len(row)], valid[i, : len(row)] = torch.tensor(row), True
        ids, valid = ids.to(self._device), valid.to(self._device)
        if self._scores:
            return self.model.words(ids) * valid[..., None], self.model.embed_text(ids, valid)
        states = self.model.hidden(embeds=self.model.embed_slots(ids), valid=valid) * valid[..., None]
        return states, states.sum(1) / valid.sum(1, keepdim=True)


class _Clip:
    """CLIP's text tower: the last but one layer, and the projected vector."""

    def __init__(self, folder: Path, device: torch.device | str) -> None:
        from transformers import AutoTokenizer, CLIPTextModelWithProjection

        self.model = _loaded(CLIPTextModelWithProjection, folder, device)
        self._tokenizer, self._device, self.folder = AutoTokenizer.from_pretrained(folder), device, folder
        config: Any = self.model.config
        self.length: int = config.max_position_embeddings
        self.channels, self.pooled_channels = int(config.hidden_size), int(config.projection_dim)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids = _filled(self._tokenizer, texts, self.length)["input_ids"].to(self._device)
        out = self.model(ids, output_hidden_states=True)
        return out.hidden_states[-2], out.text_embeds


class _T5:
    """T5's encoder: its last states, and their mean over the text."""

    def __init__(self, folder: Path, device: torch.device | str) -> None:
        from transformers import AutoTokenizer, T5EncoderModel

        self.model = _loaded(T5EncoderModel, folder, device)
        self._tokenizer, self._device, self.folder = AutoTokenizer.from_pretrained(folder), device, folder
        config: Any = self.model.config
        self.channels = self.pooled_channels = int(config.d_model)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        read = _filled(self._tokenizer, texts, _T5_LENGTH)
        ids, real = read["input_ids"].to(self._device), read["attention_mask"].to(self._device)
        states = self.model(ids, attention_mask=real).last_hidden_state
        return states, (states * real[..., None]).sum(1) / real.sum(1, keepdim=True)


class _OpenClip:
    """A text tower of open_clip: its tokens before the projection, and the projected vector."""

    def __init__(self, folder: Path, device: torch.device | str) -> None:
        import open_clip

        if not list(folder.glob("*.safetensors")):
            raise CheckpointError(f"{folder}: holds no safetensors; pickles of open_clip are not opened")
        name = f"local-dir:{folder.resolve()}"
        model, _ = open_clip.create_model_from_pretrained(name, device=device, force_custom_text=True)
        self.model: Any = model.eval().requires_grad_(False)
        self.model.text.output_tokens = True
        self._tokenizer, self._device, self.folder = open_clip.get_tokenizer(name), device, folder
        text = self.model.text
        self.channels, self.pooled_channels = int(text.width), int(text.output_dim)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        pooled, tokens = self.model.text(self._tokenizer(list(texts)).to(self._device))
        return tokens, pooled


def _loaded(kind: Any, folder: Path, device: torch.device | str) -> nn.Module:
    try:
        model = kind.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: cannot be read as {kind.__name__} ({error})") from error
    return model.to(device).eval().requires_grad_(False)


def _filled(tokenizer: Any, texts: Sequence[str], length: int) -> Any:
    return tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
