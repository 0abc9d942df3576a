"""The Hugging Face hub: fetching checkpoints by id, uploading them.

Nothing is downloaded unless an id was given, and only weights, JSON and the model card: no code, no pickles.
HF_HUB_OFFLINE, HF_HOME and HF_TOKEN mean what they mean everywhere.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import mmdiff
from mmdiff.errors import CheckpointError

__all__ = ["EMBEDDED", "FILES", "is_embedded", "push", "resolve"]

logger = logging.getLogger(__name__)

FILES = ["*.safetensors", "*.json", "README.md", "LICENSE*"]
"""What is fetched and uploaded."""

EMBEDDED = Path(mmdiff.__file__).parent / "embedded" / "tiny"
"""The small model that ships with the package; its bytes are checked against its manifest when it is loaded."""

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(path_or_id: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """Where a checkpoint lies on this machine; a hub id is downloaded first.

    Args:
        path_or_id: An existing path, which always wins, ``"tiny"``, or ``owner/name`` on the hub.
        revision: Branch, tag or commit on the hub.
        weights: False fetches what says how the network looks, and the tokenizer, only.

    Raises:
        CheckpointError: No such path and no such id, or the hub cannot be reached.
    """
    path = Path(path_or_id)
    if path.exists():
        return path
    text = str(path_or_id)
    if text == EMBEDDED.name:
        if not EMBEDDED.is_dir():
            raise CheckpointError(f"tiny: the model that ships with the package is missing at {EMBEDDED}; reinstall it")
        return EMBEDDED
    if isinstance(path_or_id, Path) or not _ID.fullmatch(text):
        raise CheckpointError(f"{text}: no such file or folder, and not an id on the hub (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(text, revision=revision, allow_patterns=FILES if weights else ["*.json"]))
    except Exception as error:
        raise CheckpointError(_complaint(text, revision, error)) from error
    logger.info("%s is at %s", text, found)
    return found


def is_embedded(path: Path) -> bool:
    """Whether a path is that of the model that ships with the package."""
    return path == EMBEDDED


def push(folder: str | Path, repo_id: str, *, private: bool = True) -> str:
    """Upload a folder that `mmdiff.io.folder.save_folder` wrote.

    Args:
        folder: The folder; it holds a model card.
        repo_id: ``owner/name``; made if it does not exist.
        private: Whether a new repository is private.

    Returns:
        The address of the upload.

    Raises:
        CheckpointError: The folder has no model card, or the hub refused or could not be reached.
    """
    folder = Path(folder)
    if not (folder / "README.md").is_file():
        raise CheckpointError(f"{folder}: has no model card (README.md); write it with save_pretrained")
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=FILES))
    except Exception as error:
        raise CheckpointError(_complaint(repo_id, None, error)) from error


def _complaint(repo_id: str, revision: str | None, error: Exception) -> str:
    where = f"{repo_id} at {revision}" if revision else repo_id
    # The library's messages may hold addresses with signatures; its class names say enough.
    reason = type(error).__name__
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        advice = "HF_HUB_OFFLINE is set and there is no copy in the cache; unset it, or give the path of a folder"
    else:
        advice = "check the id, the network and the access token, or give the path of a folder"
    return f"{where}: no such path, and the hub did not give it ({reason}); {advice}"
