"""The configuration of ``mmdiff train``. Loaded late: it knows every model, objective and task, so it is heavy."""

from __future__ import annotations

from typing import Literal

from data_pipelines.loader import DataConfig
from mmdiff.config import Field, config
from mmdiff.errors import ConfigError
from mmdiff.models.registry import ModelConfig
from mmdiff.training.loop import TrainConfig
from mmdiff.training.objective import ObjectiveConfig

__all__ = ["RunConfig"]


@config
class RunConfig:
    """A training run. Paths are relative to the folder in which the command is started."""

    model: ModelConfig | None = None
    """A network with new weights; give this or ``init_from``."""
    init_from: str | None = None
    """A network with weights: folder in our or the published layout, or hub id."""
    init_parts: dict[str, str] = Field(default_factory=dict)
    """Weights of parts of the network from other checkpoints: ``{vision: FOLDER}`` takes the part of that name there,
    or the whole network if it has no such part."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the weights, trained and frozen; null keeps that of ``init_from``, and float32 for new weights."""
    quantize: Literal["nf4", "int8"] | None = None
    """Hold the backbone's frozen linear layers in 4 or 8 bits; needs ``train.lora`` and the extra ``quant``."""
    tokenizer: str | None = None
    """Folder or hub id with tokenizer.json, needed by every task with text; default: the one in ``init_from``."""
    image_tokenizer: str | None = None
    """Model folder of the image tokenizer that made the codes; copied into the result, so that it can draw."""
    classes: str | None = None
    """JSON list of class names; copied into the result."""
    generation: dict[str, dict[str, float | int | str]] | None = None
    """Defaults of generation that are written beside the weights: ``text`` and ``image``, each with its words."""
    data: DataConfig
    """Shards and tasks."""
    objective: ObjectiveConfig
    """What is learnt."""
    train: TrainConfig
    """How long and how."""
    device: str | None = None
    """Where to train, such as cpu or cuda; default: the accelerator, if there is one."""
    out: str
    """Folder of the run."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.init_from is None):
            raise ConfigError("give model (new weights) or init_from (weights to start from), and not both")
        if self.quantize is not None and self.train.lora is None:
            raise ConfigError(f"quantize: {self.quantize} weights cannot be trained themselves; set train.lora too")
