"""The models that a run leaves: at its end, and of any checkpoint on its way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdiff.commands.run_parts import classes_of, image_tokenizer_of, model_of, quantized, tokenizer_of
from mmdiff.errors import ConfigError

if TYPE_CHECKING:
    from mmdiff.commands.recipe import RunConfig
    from mmdiff.training.parallel.group import Group

__all__ = ["export", "export_checkpoint", "export_result", "is_run_checkpoint"]

_CONFIG = "config.yaml"


def is_run_checkpoint(path: Path) -> bool:
    """Whether ``path`` is ``RUN/checkpoints/step_...``, which holds a state of training and no model to load."""
    return (path / "state.json").is_file() and (path.resolve().parent.parent / _CONFIG).is_file()


def export_checkpoint(path: Path, target: Path) -> Path:
    """Write the model, or adapter, that a run had at one of its checkpoints: the averaged weights if it kept them.

    Args:
        path: ``RUN/checkpoints/step_...``; ``RUN/config.yaml`` says what the network is, with paths relative to the
            folder in which the run was started.
        target: New or empty folder.

    Raises:
        CheckpointError: The checkpoint is damaged, or something that the recipe names is not there.
        ConfigError: The target is in use.
    """
    from mmdiff.commands.train import load_config

    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target}: not an empty folder; give a new one")
    run_dir = path.resolve().parent.parent
    spec = load_config(run_dir / _CONFIG)
    return export(spec, _averaged(spec, path), target)


def export_result(spec: RunConfig, model: Any, run_dir: Path, group: Group) -> Path:
    """Write what a finished run has trained: ``RUN/model``, or ``RUN/adapter``; on the first process only.

    Args:
        spec: The recipe.
        model: The network that was trained; its weights are replaced by the averaged ones of the newest checkpoint.
        run_dir: Folder of the run.
        group: All processes of the run.
    """
    from mmdiff.training import state

    if group.world > 1 and spec.train.parallel.type == "fsdp":
        model = _averaged(spec, run_dir)  # the trained one is spread over the processes
    else:
        state.load_average(run_dir, model)
    name = "model" if spec.train.lora is None else "adapter"
    return Path(group.first(lambda: str(export(spec, model, run_dir / name))))


def export(spec: RunConfig, model: Any, target: Path) -> Path:
    """Write a model with the tokenizers that the recipe names, or only its adapter if that is what was trained."""
    from mmdiff.io.adapter import write_adapter

    if spec.train.lora is not None:
        return write_adapter(model, target, base=spec.init_from)
    model.to("cpu").save_pretrained(
        target,
        tokenizer=tokenizer_of(spec),
        image_tokenizer=image_tokenizer_of(spec),
        classes=classes_of(spec),
        text_encoder=spec.text_encoder,
        generation=_generation(spec),
    )
    return target


def _averaged(spec: RunConfig, path: Path) -> Any:
    """A new network with the averaged weights of a checkpoint."""
    from mmdiff.training import finetune, state

    model = quantized(spec, model_of(spec), "cpu")
    if spec.train.lora is not None:
        finetune.attach(model, spec.train.lora, spec.train.seed)
    state.load_average(path, model)
    return model


def _generation(spec: RunConfig) -> dict[str, Any] | None:
    """Defaults of generation; that there are some for edits says that the network has learnt to follow instructions."""
    given = spec.generation
    edits = any(task.type == "edit" for source in spec.data.sources for task in source.tasks)
    return {"edit": (given or {}).get("image", {}), **(given or {})} if edits else given
