"""The base class of every network: loading and saving by name.

The one place, with `mmdiff.models.registry`, where a network reaches for files. ``LLaDA.from_pretrained`` is what
people look for, so the methods are here; what they do is in `mmdiff.io.folder`, imported when they are called, and a
network file itself knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from mmdiff.errors import ConfigError

if TYPE_CHECKING:
    from mmdiff.text import Tokenizer

__all__ = ["PretrainedModule", "check_range"]

M = TypeVar("M", bound="PretrainedModule")


class PretrainedModule(nn.Module):
    """A network with ``from_pretrained`` and ``save_pretrained``.

    Attributes:
        Config: Its configuration class; set below each class, because a name inside would hide the module's.
    """

    Config: ClassVar[Any]

    @classmethod
    def from_pretrained(
        cls: type[M],
        path_or_id: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> M:
        """Load a checkpoint.

        Args:
            path_or_id: Folder in our layout or a published one, a weight file beside its config.json, or a hub id.
            device: Where the weights go; default the CPU.
            dtype: Dtype of floating weights; default as stored.
            revision: Branch, tag or commit on the hub.

        Returns:
            The network, in evaluation mode.

        Raises:
            UnsafeFileError: A file asks to run code.
            CheckpointError: Missing, damaged, of another family, or not fitting its configuration.
        """
        from mmdiff.io.folder import load_model

        return load_model(path_or_id, device=device, dtype=dtype, revision=revision, expected=cls)  # type: ignore[return-value]

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        tokenizer: Tokenizer | None = None,
        image_tokenizer: nn.Module | str | Path | None = None,
        text_encoder: str | Path | None = None,
        classes: Sequence[str] | None = None,
        generation: Mapping[str, Any] | None = None,
        license: str | None = None,  # noqa: A002 - the word of model cards
    ) -> None:
        """Write a checkpoint in our layout, with a model card.

        Args:
            folder: Made if it does not exist; files of the same names are replaced, others stay.
            tokenizer: Of its text.
            image_tokenizer: Of the images it draws; the network or where it lies.
            text_encoder: Where the encoder of its prompts lies, if it reads their features; copied.
            classes: Names of its classes, in order.
            generation: Defaults of generation, ``text``, ``image`` and ``edit``, plain data.
            license: Identifier for the model card, such as ``apache-2.0``.

        Raises:
            CheckpointError: A file could not be written.
        """
        from mmdiff.io.folder import save_folder

        save_folder(
            self,
            folder,
            tokenizer=tokenizer,
            image_tokenizer=image_tokenizer,
            text_encoder=text_encoder,
            classes=classes,
            generation=generation,
            license=license,
        )

    def push_to_hub(self, repo_id: str, *, private: bool = True, **parts: Any) -> str:
        """Save to a temporary folder and upload it.

        Args:
            repo_id: ``owner/name`` on the hub; made if it does not exist.
            private: Whether a new repository is private.
            **parts: As in `save_pretrained`.

        Returns:
            The address of the upload.

        Raises:
            CheckpointError: The hub refused or could not be reached.
        """
        import tempfile

        from mmdiff.io.hub import push

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **parts)
            return push(folder, repo_id, private=private)


def check_range(what: str, values: Tensor, high: int) -> None:
    """Refuse whole numbers outside 0 .. ``high``.

    Only those on a CPU are looked at: a look at an accelerator would wait for it.

    Raises:
        ConfigError: One lies outside.
    """
    if values.device.type != "cpu" or torch.compiler.is_compiling() or not values.numel():
        return
    low, top = (int(v) for v in values.aminmax())
    if low < 0 or top > high:
        raise ConfigError(f"{what} from {low} to {top}; this network takes 0 to {high}")
