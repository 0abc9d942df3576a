"""The configuration of ``mmdiff train``. Loaded late: it knows every model, objective and task, so it is heavy."""

from __future__ import annotations

from typing import Literal

from data_pipelines.loader import DataConfig
from mmdiff.config import Field, config
from mmdiff.errors import ConfigError
from mmdiff.models.registry import ModelConfig
from mmdiff.training.loop import TrainConfig
from mmdiff.training.objective import ObjectiveConfig

__all__ = ["MupConfig", "NetworkConfig", "RunConfig"]


@config
class NetworkConfig:
    """A network alone."""

    model: ModelConfig
    """The network."""


@config
class MupConfig:
    """How a network is parametrised, relative to a smaller one."""

    base_width: int = Field(gt=0)
    """Width at which ``train.optim`` was tuned; at this width nothing changes but that readouts start at zero."""
    base_depth: int | None = Field(None, gt=0)
    """The same for the number of blocks, with the rule ``depth``; null: that of the model."""
    rule: Literal["sp", "mup", "depth"] = "mup"
    """sp: as if there were no base; mup: by width; depth: by width and depth (CompleteP)."""
    decay: Literal["independent", "coupled"] = "independent"
    """Whether rate times decay stays as at the base, or the decay alone."""


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
    text_encoder: str | None = None
    """Folder or hub id of what reads prompts for a network that draws from features: ours, CLIP or T5 of transformers,
    or open_clip; copied into the result."""
    classes: str | None = None
    """JSON list of class names; copied into the result."""
    generation: dict[str, dict[str, float | int | str | list[float]]] | None = None
    """Defaults of generation that are written beside the weights: ``text``, ``image`` and ``edit``, each with its
    words. With a task ``edit`` the last is that of images unless it is given."""
    mup: MupConfig | None = None
    """Carry values over that were tuned at a smaller width; null: train the network as it is."""
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
        if self.mup is not None and self.model is None:
            raise ConfigError("mup needs model: it says how new weights are drawn")
