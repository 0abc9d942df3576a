"""A run's folder: who owns it, atomic checkpoints in it, and finding the newest one that is whole.

``checkpoints/step_0000012800/`` holds ``model``, ``ema`` and ``optimizer`` as safetensors, ``state.json`` for the rest
and ``manifest.json`` with the SHA-256 of each. A folder is written under another name, with its manifest last, and then
renamed; it is deleted with its manifest first. So a folder of that name with a manifest is a whole checkpoint, and a
process may be killed between any two system calls. What the state means is the loop's business.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mmdiff import config as configs
from mmdiff.errors import CheckpointError, ConfigError
from mmdiff.io import atomic
from mmdiff.io import checkpoint as files
from mmdiff.io.adapter import adapted
from mmdiff.io.faults import fault
from mmdiff.training import optim
from mmdiff.training.parallel.sharding import local, spread_like

__all__ = ["FREE_KEYS", "Checkpoints", "Snapshot", "check", "claim", "copy_into", "load_average", "model_tensors"]

logger = logging.getLogger(__name__)

_FREE = (
    "device",
    "out",
    *(p + k for p in ("", "train.") for k in ("log_every_samples", "checkpoint_every_samples", "keep")),
    *("data." + k for k in ("workers", "start_method", "prefetch", "cache_decoded", "cache_mib", "allow_changed")),
    *("data." + k for k in ("max_skip_fraction", "damaged")),
    *(p + k for p in ("", "train.") for k in ("checkpoint_async", "checkpoint_failed", "report", "project")),
    *(p + k for p in ("", "train.") for k in ("step_timeout_s", "first_step_timeout_s", "compile")),
)
FREE_KEYS = frozenset(_FREE)
"""Dotted keys of a run's configuration that may differ on resume: they do not touch the numbers. Nor do those below
``train.parallel``, nor where shards lie: what they hold is part of the loader's state."""

_SHARDS = re.compile(r"data\.sources\.\d+\.shards(\.\d+)?")

_NAME = re.compile(r"step_\d{10,}")
_DRAFT = re.compile(r"step_\d{10,}\.tmp-\d+")


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All that a run needs to go on.

    Attributes:
        samples: Samples seen, which names the folder.
        tensors: File stem (``model``, ``ema``, ``optimizer``) -> name -> tensor.
        state: Plain JSON data.
    """

    samples: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors and the state on disk, headers not counted."""
        tensors = sum(t.numel() * t.element_size() for group in self.tensors.values() for t in group.values())
        return tensors + len(json.dumps(self.state))


class Checkpoints:
    """The checkpoints of one run.

    Args:
        run_dir: Folder of the run.
        keep: How many to keep, the newest ones.
    """

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.folder = run_dir / "checkpoints"
        self.keep = keep

    def clean(self) -> None:
        """Remove what killed processes left: drafts, and folders whose deletion had begun."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            half_deleted = _NAME.fullmatch(path.name) and not (path / atomic.MANIFEST).exists()
            if _DRAFT.fullmatch(path.name) or half_deleted:
                shutil.rmtree(path)

    def latest(self) -> Path | None:
        """The newest checkpoint whose every byte agrees with its manifest; None if there are none at all.

        Raises:
            CheckpointError: There are checkpoints but none is whole.
        """
        complaints = []
        for path in self._steps():
            try:
                atomic.verify_manifest(path)
                return path
            except CheckpointError as error:
                complaints.append(str(error))
                logger.warning("%s; trying the checkpoint before it", error)
        if complaints:
            shown = "\n".join(complaints)
            raise CheckpointError(f"{self.folder}: no checkpoint is whole; remove the folder to start over\n{shown}")
        return None

    def save(self, snapshot: Snapshot) -> Path:
        """Write a checkpoint, check it, and delete those beyond `keep`.

        Raises:
            CheckpointError: It could not be written; the checkpoints before it are as they were.
        """
        target = self.path(snapshot.samples)
        draft = target.with_name(f"{target.name}.tmp-{os.getpid()}")
        try:
            _write(draft, snapshot)
            self._publish(draft, target)
            atomic.verify_manifest(target)
            self._prune(target)
        except (OSError, SafetensorError, CheckpointError) as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise CheckpointError(self._complaint(target, snapshot, error)) from error
        return target

    def path(self, samples: int) -> Path:
        """Where the checkpoint of so many samples is, or would be."""
        return self.folder / f"step_{samples:010d}"

    def set_aside_newer(self, path: Path) -> None:
        """Rename checkpoints newer than one that `latest` found, which are damaged, to ``*.damaged``."""
        for newer in self._steps():
            if newer > path:
                aside = newer.with_name(f"{newer.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                newer.rename(aside)

    def load(self, path: Path) -> Snapshot:
        """Read a checkpoint that `latest` found."""
        state = atomic.load_json(path / "state.json")
        tensors = {p.stem: dict(files.read_tensors(p)) for p in sorted(path.glob("*.safetensors"))}
        return Snapshot(samples=state["samples"], tensors=tensors, state=state)

    def _steps(self) -> list[Path]:
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        # By number, not by name: names of more than ten digits would sort before shorter ones.
        return sorted((p for p in found if _NAME.fullmatch(p.name)), key=_step, reverse=True)

    def _publish(self, draft: Path, target: Path) -> None:
        if target.exists():
            _delete(target)
        fault("rename")
        os.rename(draft, target)
        fault("fsync")
        atomic.fsync_folder(self.folder)

    def _prune(self, newest: Path) -> None:
        for path in [p for p in self._steps() if _step(p) <= _step(newest)][self.keep :]:
            try:
                _delete(path)
            except OSError as error:
                logger.warning("%s could not be deleted (%s)", path, error.strerror)

    def _complaint(self, target: Path, snapshot: Snapshot, error: Exception) -> str:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        code = getattr(cause, "errno", None)
        reason = os.strerror(code) if code else str(cause)
        try:
            free = f", {shutil.disk_usage(self.folder.parent).free:,} are free"
        except OSError:
            free = ""
        room = code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        advice = "make room" if room else "see that the folder is there and can be written"
        kept = [p.name for p in self._steps() if p != target]
        former = f"{kept[0]} is intact" if kept else "there is no earlier one"
        return (
            f"{target}: the checkpoint could not be written ({reason}); it needs {snapshot.nbytes:,} bytes{free}; "
            f"{former}; {advice}, then go on with --resume"
        )


def claim(run_dir: Path, run_config: Any, *, resume: bool) -> None:
    """Make the folder of a run and write its ``config.yaml``, after `check`.

    Raises:
        ConfigError: As `check`, or the folder cannot be made.
        CheckpointError: ``config.yaml`` cannot be written.
    """
    check(run_dir, run_config, resume=resume)
    try:
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        for draft in run_dir.glob(".*.tmp-*"):
            draft.unlink()
    except OSError as error:
        raise ConfigError(f"{run_dir}: cannot be the folder of a run ({error.strerror}); choose another out") from None
    path, text = run_dir / "config.yaml", configs.dump(run_config)
    if not path.is_file() or path.read_text("utf-8") != text:
        atomic.save_text(path, text)


def check(run_dir: Path, run_config: Any, *, resume: bool) -> None:
    """See whether a run may begin or go on in a folder; writes nothing.

    Args:
        run_dir: May be missing or empty; with ``resume`` it may also hold a run of the same configuration.
        run_config: A configuration object.
        resume: Go on with what is there. A run that never began counts as one.

    Raises:
        ConfigError: The folder cannot be used, is not empty, is no run, or its configuration differs in a key that is
            not one of `FREE_KEYS` (with ``data.allow_changed`` no key of ``data`` counts).
    """
    try:
        names = sorted(p.name for p in run_dir.iterdir()) if run_dir.exists() or run_dir.is_symlink() else []
    except OSError as error:
        raise ConfigError(f"{run_dir}: cannot be the folder of a run ({error.strerror}); choose another out") from None
    path = run_dir / "config.yaml"
    if path.is_file() and resume:
        _refuse_changes(path, _completed(path, run_config), configs.to_dict(run_config))
        return
    # What a run leaves that was killed before it had written its configuration.
    present = [n for n in names if n != "checkpoints" and ".tmp-" not in n]
    if "checkpoints" in names and any((run_dir / "checkpoints").iterdir()):
        present.append("checkpoints")
    if present and not resume:
        raise ConfigError(
            f"{run_dir}: not empty ({', '.join(present[:4])}); add --resume to go on, or choose another out"
        )
    if present:
        raise ConfigError(f"{run_dir}: holds {', '.join(present[:4])} but no config.yaml, so it is no run to resume")


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, the module's own tensors; a tied one once, under its first name.

    Of a network with an adapter these are the trainable parameters only: what is frozen lies where it came from.
    """
    if adapted(model):
        return dict(optim.trainable(model))
    seen: set[int] = set()
    out: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and id(value) not in seen:
            seen.add(id(value))
            out[name] = value
    return out


@torch.no_grad()
def copy_into(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    """Copy tensors by name.

    Raises:
        CheckpointError: A name, a shape or a dtype differs; all of them are listed.
    """
    complaints = [f"missing {n}" for n in own.keys() - saved.keys()] + [
        f"unexpected {n}" for n in saved.keys() - own.keys()
    ]
    for name in own.keys() & saved.keys():
        a, b = saved[name], own[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            complaints.append(f"{name} is {a.dtype} {tuple(a.shape)}, expected {b.dtype} {tuple(b.shape)}")
    if complaints:
        raise CheckpointError(f"{what} does not fit the model: {'; '.join(sorted(complaints))}")
    for name, tensor in own.items():
        local(tensor).copy_(local(spread_like(saved[name], tensor)))


def load_average(source: Path, model: nn.Module) -> Path:
    """Set ``model`` to a checkpoint's averaged weights (its plain ones if the run kept no average).

    Args:
        source: Folder of a run, whose newest whole checkpoint is taken, or of one checkpoint.
        model: The network of the run.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: There is none, none is whole, or it does not fit.
    """
    path: Path | None = source
    if (source / "state.json").is_file():
        atomic.verify_manifest(source)
    else:
        path = Checkpoints(source, keep=2).latest()
    if path is None:
        raise CheckpointError(f"{source}: holds no checkpoint yet")
    saved = dict(files.read_tensors(path / "model.safetensors"))
    if (path / "ema.safetensors").exists():
        average = files.read_tensors(path / "ema.safetensors")
        saved |= {name: average[name].to(saved[name].dtype) for name in average}
    copy_into(model_tensors(model), saved, str(path))
    return path


def _completed(path: Path, run_config: Any) -> Mapping[str, Any]:
    """The configuration of a run, with the defaults of keys that came after the version that wrote it."""
    tree = configs.read_yaml(path)
    try:
        return configs.to_dict(configs.parse(type(run_config), tree, str(path)))
    except ConfigError:
        return tree


def _refuse_changes(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    a, b = _flat(old), _flat(new)
    keys = [k for k in sorted(a.keys() | b.keys()) if a.get(k, ...) != b.get(k, ...) and not _is_free(k)]
    if b.get("data.allow_changed"):
        keys = [k for k in keys if not k.startswith("data.")]
    if keys:
        listed = "; ".join(f"{k}: {_show(a, k)} -> {_show(b, k)}" for k in keys)
        raise ConfigError(
            f"{path}: the run was begun with another configuration ({listed}); undo it or choose another out"
        )


def _is_free(key: str) -> bool:
    return key in FREE_KEYS or bool(_SHARDS.fullmatch(key)) or key.removeprefix("train.").startswith("parallel.")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, (Mapping, list)) or not tree:
        return {prefix: tree}
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    return {k: v for key, value in items for k, v in _flat(value, f"{prefix}.{key}" if prefix else str(key)).items()}


def _show(flat: Mapping[str, Any], key: str) -> str:
    return json.dumps(flat[key]) if key in flat else "absent"


def _write(draft: Path, snapshot: Snapshot) -> None:
    fault("open")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    for stem, tensors in snapshot.tensors.items():
        files.write_tensors(draft / f"{stem}.safetensors", tensors)
    atomic.save_json(draft / "state.json", {**snapshot.state, "samples": snapshot.samples})
    fault("fsync")
    atomic.write_manifest(draft)
    fault("fsync")
    atomic.fsync_folder(draft)


def _delete(path: Path) -> None:
    """The manifest first: a folder without one is no checkpoint any more, whatever is left in it."""
    fault("delete")
    (path / atomic.MANIFEST).unlink(missing_ok=True)
    atomic.fsync_folder(path)
    fault("delete")
    shutil.rmtree(path)
    fault("delete")


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))
