"""What all pipelines share: the parts of a checkpoint, what it can do, loading and saving."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import nn

from mmdiff.batch import Layout
from mmdiff.errors import CheckpointError, ConfigError
from mmdiff.text import Tokenizer

if TYPE_CHECKING:
    from mmdiff.pipelines.image import ImageGenerator
    from mmdiff.pipelines.text import TextGenerator
    from mmdiff.pipelines.vision import VisionLanguage
    from mmdiff.sampling import Trace

__all__ = ["Checkpoint", "Pipeline", "dtype_of", "load", "read_tokenizer"]

P = TypeVar("P", bound="Pipeline")

_GENERATION_FILE = "generation_config.json"
_CLASS_FAMILIES = ("emigm", "maskgit")
"""Families that draw classes by number."""
_EDIT_FAMILIES = ("lumina",)
"""Published families that follow instructions about a picture; others say so in their files."""
_FLOW_FAMILIES = {"dit": "class_image", "mmdit": "text_image"}
"""Families that draw by rectified flow, and what."""

_WHY_NOT = {
    "caption": "it has no vision tower, and no image tokenizer to read pictures with (give image_tokenizer=)",
    "ask": "it has no vision tower, and no image tokenizer to read pictures with (give image_tokenizer=)",
    "text_image": "it has no image codes, or no image tokenizer (in the folder, or given as image_tokenizer=), or of a "
    "network that reads features of prompts no text encoder (likewise, text_encoder=)",
    "class_image": "it does not draw, or lacks an image tokenizer or autoencoder (in the folder, or given as "
    "--image-tokenizer or image_tokenizer=) or classes.json",
    "generate_text": "it has no text head or no tokenizer.json",
}


@dataclass
class Checkpoint:
    """A network with what belongs to it.

    Attributes:
        model: The network, in eval mode.
        tokenizer: For text; None if the folder has none.
        image_tokenizer: Codes to pixels and back; None if it does not draw.
        classes: Names by class number.
        defaults: Generation words the checkpoint was made for, under ``text``, ``image`` and, of a network that has
            learnt to change a picture by an instruction, ``edit``.
        text_encoder: Prompts to features, for a network that reads those; None if it has none.
    """

    model: nn.Module
    tokenizer: Tokenizer | None = None
    image_tokenizer: Any = None
    classes: tuple[str, ...] = ()
    defaults: dict[str, dict[str, Any]] = field(default_factory=dict)
    text_encoder: Any = None

    @property
    def layout(self) -> Layout:
        """What the network expects of a sequence."""
        of = getattr(self.model, "layout", Layout)
        return of()

    @property
    def device(self) -> torch.device:
        """Where the network is; of one that is spread over several, where its inputs go."""
        main: torch.device | None = getattr(self.model, "main_device", None)
        return main if main is not None else next(self.model.parameters()).device

    @property
    def capabilities(self) -> frozenset[str]:
        """What it can do."""
        can: set[str] = set()
        if self.tokenizer is not None and hasattr(self.model, "hidden"):
            can |= {"generate_text", "infill"}
            template = self.tokenizer.has_template
            can |= {"chat"} if template else set()
            reads = self.layout.features or (self.layout.reads_codes and self.image_tokenizer is not None)
            if reads and template:
                can |= {"caption", "ask"}
            if self.layout.codes and template and self.image_tokenizer is not None:
                can |= {"text_image", "class_image"} if self.classes else {"text_image"}
                can |= {"edit"} if "edit" in self.defaults or self._family in _EDIT_FAMILIES else set()
        if self._family in _CLASS_FAMILIES and self.image_tokenizer:
            can.add("class_image")
        return frozenset(can | self._flow())

    @property
    def _family(self) -> str:
        return getattr(getattr(self.model, "config", None), "type", "")

    def _flow(self) -> set[str]:
        """What a flow-matching network can do: it draws latents with an autoencoder, or pixels."""
        config: Any = getattr(self.model, "config", None)
        kind = _FLOW_FAMILIES.get(self._family)
        if kind is None or config.out_channels != config.channels:
            return set()  # with a learned variance it is no flow
        told = kind == "class_image" or self.text_encoder is not None
        return {kind} if told and (self.image_tokenizer is not None or config.channels == 3) else set()


class Pipeline:
    """A loaded checkpoint. Use it through a typed view: ``text``, ``vision``, ``images``.

    Args:
        checkpoint: The parts.

    Attributes:
        trace: What the last call cost; None before the first.

    Raises:
        CheckpointError: The checkpoint lacks what this view needs.
    """

    needs: ClassVar[str | None] = None

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.trace: Trace | None = None
        if self.needs is not None:
            self.require(self.needs)

    @classmethod
    def from_pretrained(
        cls: type[P],
        path_or_id: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        quantize: str | None = None,
        adapter: str | Path | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        image_tokenizer: str | Path | None = None,
        text_encoder: str | Path | None = None,
    ) -> P:
        """Load a checkpoint; arguments and errors as in `mmdiff.load`."""
        parts = {"image_tokenizer": image_tokenizer, "text_encoder": text_encoder}
        return cls(load(path_or_id, device, dtype, quantize, adapter, device_map, **parts).checkpoint)

    @property
    def capabilities(self) -> frozenset[str]:
        """What the checkpoint can do: caption, ask, chat, infill, generate_text, class_image, text_image."""
        return self.checkpoint.capabilities

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.checkpoint.model

    @property
    def text(self) -> TextGenerator:
        """The same checkpoint, generating text."""
        from mmdiff.pipelines.text import TextGenerator

        return TextGenerator(self.checkpoint)

    @property
    def vision(self) -> VisionLanguage:
        """The same checkpoint, answering about images."""
        from mmdiff.pipelines.vision import VisionLanguage

        return VisionLanguage(self.checkpoint)

    @property
    def images(self) -> ImageGenerator:
        """The same checkpoint, drawing."""
        from mmdiff.pipelines.image import ImageGenerator

        return ImageGenerator(self.checkpoint)

    def require(self, capability: str) -> None:
        """Refuse if the checkpoint cannot do something.

        Raises:
            CheckpointError: It cannot; the message says what it can.
        """
        if capability not in self.capabilities:
            why = _WHY_NOT.get(capability, "")
            can = ", ".join(sorted(self.capabilities)) or "nothing"
            raise CheckpointError(f"this checkpoint cannot do {capability!r}: {why}; it can do: {can}")

    def save_pretrained(self, folder: str | Path, *, license: str | None = None) -> None:  # noqa: A002
        """Write all parts in the house's layout, with a model card.

        Args:
            folder: Made if it does not exist.
            license: Identifier for the model card, such as ``apache-2.0``.

        Raises:
            CheckpointError: A file could not be written.
        """
        from mmdiff.models.registry import save_folder

        parts = self.checkpoint
        save_folder(
            parts.model,
            folder,
            tokenizer=parts.tokenizer,
            image_tokenizer=parts.image_tokenizer,
            text_encoder=None if parts.text_encoder is None else parts.text_encoder.folder,
            classes=parts.classes or None,
            generation=parts.defaults or None,
            license=license,
        )

    def push_to_hub(self, repo_id: str, *, private: bool = True, license: str | None = None) -> str:  # noqa: A002
        """Save to a temporary folder and upload it.

        Args:
            repo_id: ``owner/name`` on the hub; made if it does not exist.
            private: Whether a new repository is private.
            license: Identifier for the model card.

        Returns:
            The address of the upload.

        Raises:
            CheckpointError: The hub refused or could not be reached.
        """
        import tempfile

        from mmdiff.io.hub import push

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, license=license)
            return push(folder, repo_id, private=private)


def load(
    path_or_id: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    quantize: str | None = None,
    adapter: str | Path | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    *,
    image_tokenizer: str | Path | None = None,
    text_encoder: str | Path | None = None,
) -> Pipeline:
    """Load a checkpoint.

    Args:
        path_or_id: Folder in our layout or a published one, a weight file beside its config.json, a hub id, or
            ``"tiny"``: the small model that ships with the package, unless there is such a path.
        device: Where it goes; default a GPU if there is one, else the CPU.
        dtype: Precision of the weights, such as ``torch.bfloat16`` or ``"bfloat16"``; default as stored.
        quantize: ``"nf4"`` (4 bits, bitsandbytes) or ``"int8"`` (torchao) for the backbone's blocks.
        adapter: Folder or hub id of a LoRA adapter in peft's layout; merged, or kept beside quantised weights.
        device_map: ``"auto"`` or ``"balanced"`` spreads the network over all accelerators, memory and disk; or a
            mapping from names of modules to devices. Instead of ``device``.
        image_tokenizer: Image tokenizer or autoencoder of a checkpoint whose folder does not hold one.
        text_encoder: What reads prompts for a network that draws from features, likewise.

    Raises:
        CheckpointError: Missing, damaged, of an unknown family, or an adapter that does not fit.
        ConfigError: Words that contradict each other.
        MissingExtraError: A library is not installed; the message says how to.
    """
    from mmdiff.io.hub import is_embedded
    from mmdiff.io.text_encoders import load_text_encoder
    from mmdiff.io.variants import load_variant
    from mmdiff.models.registry import load_model, resolve

    path = resolve(path_or_id)
    folder = path if path.is_dir() else path.parent
    # The embedded model is stored in bfloat16 to be small, and computes in float32.
    stored = torch.float32 if is_embedded(path) else None
    precision = dtype_of(dtype) or stored
    if device is None and device_map is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_variant(
        path, device=device, dtype=precision, quantize=quantize, adapter=adapter, device_map=device_map
    )
    tokens, place = _beside(folder, "image_tokenizer", image_tokenizer), getattr(model, "main_device", device)
    texts = _beside(folder, "text_encoder", text_encoder)
    checkpoint = Checkpoint(
        model=model.eval(),
        tokenizer=read_tokenizer(folder, model.config),
        image_tokenizer=None if tokens is None else _convolutions(load_model(tokens, device=place, dtype=stored)),
        text_encoder=None if texts is None else load_text_encoder(texts, place or "cpu"),
        classes=tuple(_read_json(folder / "classes.json", list)),
        defaults=_defaults(_read_json(folder / _GENERATION_FILE, dict)),
    )
    return Pipeline(checkpoint)


def _beside(folder: Path, name: str, given: str | Path | None) -> str | Path | None:
    own = folder / name
    return given if given is not None or not own.is_dir() else own


def read_tokenizer(folder: Path, config: Any) -> Tokenizer | None:
    """The tokenizer in a checkpoint's folder; None if there is none.

    Args:
        folder: The folder.
        config: The network's configuration, which knows the special ids of a tokenizer that spells them differently.

    Raises:
        CheckpointError: It is damaged, or of another family.
    """
    if not (folder / "tokenizer.json").is_file():
        return None
    language = getattr(config, "language", config)
    names = ("mask_id", "bos_id", "eos_id", "eot_id")
    known = {n: getattr(language, n) for n in names} if hasattr(language, "mask_id") else None
    return Tokenizer.from_pretrained(folder, known=known)


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype by its name.

    Raises:
        ConfigError: An unknown name.
    """
    if not isinstance(dtype, str):
        return dtype
    found = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"dtype {dtype!r}; known: float32, bfloat16, float16")
    return found


def _read_json(path: Path, kind: type) -> Any:
    """The content of a small JSON file, or an empty ``kind`` if there is no such file."""
    if not path.is_file():
        return kind()
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    if not isinstance(value, kind):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, expected {kind.__name__}")
    return value


def _convolutions(model: Any) -> Any:
    """A network of convolutions, ready to be used; channels last in memory, a fifth faster on a CPU."""
    return model.eval().to(memory_format=torch.channels_last)


def _defaults(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The house's part of a generation_config.json; published files hold other keys there, which are not ours."""
    return {k: dict(tree[k]) for k in ("text", "image", "edit") if isinstance(tree.get(k), dict)}
