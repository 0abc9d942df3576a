"""What a recipe names, built: network, tokenizers, objective; and whether they fit each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdiff.errors import ConfigError

if TYPE_CHECKING:
    from mmdiff.batch import Layout
    from mmdiff.commands.recipe import RunConfig
    from mmdiff.models.image_tokenizer import ImageTokenizer
    from mmdiff.text import Tokenizer

__all__ = [
    "Made",
    "build",
    "checked_layout",
    "classes_of",
    "device_of",
    "image_tokenizer_of",
    "loader_of",
    "model_of",
    "objective_of",
    "quantized",
    "scales_of",
    "tokenizer_of",
]


@dataclass(frozen=True)
class Made:
    """What a recipe names, built: see `build`.

    Attributes:
        model: The network.
        objective: What is learnt.
        loader: Batches without end.
    """

    model: Any
    objective: Any
    loader: Any


def build(spec: RunConfig, device: str, on_skip: Any = None, rank: int = 0, world: int = 1) -> Made:
    """Everything that a recipe names, checked against each other.

    Args:
        spec: The recipe.
        device: Where it will be trained; the network itself is not moved yet.
        on_skip: Called with every sample that is skipped.
        rank: Number of this process among ``world``.
        world: Processes that share each global batch.

    Raises:
        MmdiffError: Something is not there, or does not fit the rest.
    """
    classes_of(spec)  # needed at the end only: a wrong file is told before hours are spent
    tokenizer, image_tokenizer = tokenizer_of(spec), image_tokenizer_of(spec)
    objective = objective_of(spec, device)
    model = quantized(spec, model_of(spec), device)
    layout = checked_layout(spec, model, tokenizer, image_tokenizer)
    return Made(model, objective, loader_of(spec, tokenizer, layout, on_skip, rank, world))


def device_of(spec: RunConfig) -> str:
    """Where this process trains: under a launcher, the GPU of its number on this machine."""
    from mmdiff.commands.workers import local_device

    return (local_device() if spec.device in (None, "cuda") else spec.device) or spec.device or _best_device()


def _best_device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def tokenizer_of(spec: RunConfig, *, weights: bool = True) -> Tokenizer | None:
    """The text tokenizer that the recipe names, or the one beside the weights it begins from; None without texts."""
    from mmdiff.io.hub import resolve
    from mmdiff.text import Tokenizer

    if spec.tokenizer is None and spec.init_from is not None:
        folder = resolve(spec.init_from, weights=weights)
        return Tokenizer.from_pretrained(folder) if (folder / "tokenizer.json").is_file() else None
    return Tokenizer.from_pretrained(resolve(spec.tokenizer, weights=False)) if spec.tokenizer else None


def image_tokenizer_of(spec: RunConfig) -> Any:
    """The image tokenizer or autoencoder that the recipe names; None if it names none."""
    from mmdiff.models.registry import load_model

    if spec.image_tokenizer is None:
        return None
    model = load_model(spec.image_tokenizer)
    if not hasattr(model, "encode"):
        raise ConfigError(f"{spec.image_tokenizer}: a {type(model).__name__} is no image tokenizer")
    return model


def classes_of(spec: RunConfig) -> list[str] | None:
    """Names of the classes, read from the file that the recipe names."""
    from mmdiff.io.atomic import load_json

    if spec.classes is None:
        return None
    names = load_json(spec.classes)
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise ConfigError(f"{spec.classes}: expected a JSON list of class names")
    return names


def model_of(spec: RunConfig) -> Any:
    """The network at the beginning of the run: new weights, or those that the recipe names."""
    import torch

    from mmdiff import rng
    from mmdiff.models import registry

    if spec.init_from is not None:
        model: Any = registry.load_model(spec.init_from)
    elif spec.mup is not None:
        from mmdiff.scale import mup

        model = mup.fresh(_plan(spec), spec.model, _base(spec), rng.generator(spec.train.seed, "init"))
    else:
        model = registry.build(spec.model, generator=rng.generator(spec.train.seed, "init"))
    if spec.dtype is not None:
        model = model.to(getattr(torch, spec.dtype))
    for name, source in spec.init_parts.items():
        _init_part(model, name, source, registry.load_model(source))
    return model


def quantized(spec: RunConfig, model: Any, device: str) -> Any:
    """The network with its frozen layers in 4 or 8 bits, if the recipe says so."""
    from mmdiff.io.quantize import quantize_

    return model if spec.quantize is None else quantize_(model, spec.quantize, device)


def _init_part(model: Any, name: str, source: str, other: Any) -> None:
    """Copy a part of another network, or all of it, into the part ``name`` of ``model``."""
    parts = dict(model.named_children())
    if name not in parts:
        raise ConfigError(f"init_parts: {type(model).__name__} has no part {name!r}; it has {', '.join(parts)}")
    given = dict(other.named_children()).get(name, other)
    try:
        parts[name].load_state_dict(given.state_dict())
    except RuntimeError as error:
        raise ConfigError(f"init_parts: {source} does not fit part {name!r}: {error}") from None


def _base(spec: RunConfig) -> Any:
    """The configuration at which the recipe's values were tuned."""
    from mmdiff.scale.family import with_size

    return with_size(spec.model, width=spec.mup.base_width, depth=spec.mup.base_depth) if spec.mup else spec.model


def _plan(spec: RunConfig) -> Any:
    from mmdiff.scale import mup

    return mup.plan(spec.model, _base(spec), rule=spec.mup.rule if spec.mup else "sp")


def scales_of(spec: RunConfig) -> dict[str, tuple[float, float]] | None:
    """Factors of every parameter's rate and decay; None without muP."""
    if spec.mup is None:
        return None
    factors = {row.name: row.factors("adamw", spec.mup.decay) for row in _plan(spec).rows}
    return {name: (f.lr, f.decay) for name, f in factors.items()}


def objective_of(spec: RunConfig, device: str) -> Any:
    """The objective, with the text encoder if there is one, after a look at whether it fits the network."""
    from mmdiff.training.objective import build

    objective: Any = build(spec.objective)
    if spec.text_encoder is None:
        return objective
    if not hasattr(objective, "reading"):
        raise ConfigError(f"text_encoder: objective {objective.type} reads no texts beside the network; leave it out")
    from mmdiff.io.text_encoders import load_text_encoder

    encoder = load_text_encoder(spec.text_encoder, device)
    _check_features(spec, encoder)
    return objective.reading(encoder)


def _check_features(spec: RunConfig, encoder: Any) -> None:
    if spec.model is None:
        return  # the network's own files say it; loading one with another encoder fails at its first layer
    for ours, have in (("context_channels", encoder.channels), ("pooled_channels", encoder.pooled_channels)):
        want = getattr(spec.model, ours, None)
        if want != have:
            raise ConfigError(f"text_encoder {spec.text_encoder} gives {have}, but the model's {ours} is {want}")


def checked_layout(spec: RunConfig, model: Any, tokenizer: Tokenizer | None, image_tokenizer: Any) -> Layout:
    """What the model expects of a sequence, after a look at whether the tokenizers fit it."""
    layout = _layout(model)
    _check_text(spec, model, tokenizer, layout)
    _check_images(spec, image_tokenizer, layout)
    return layout


def _layout(model: Any) -> Layout:
    from mmdiff.batch import Layout

    return model.layout() if hasattr(model, "layout") else Layout(image_size=model.config.image_size)


def _check_text(spec: RunConfig, model: Any, tokenizer: Tokenizer | None, layout: Layout) -> None:
    """Find a tokenizer that does not fit before hours are spent on it."""
    if tokenizer is None:
        return
    if tokenizer.vocab_size > layout.vocab_size > 0:
        raise ConfigError(
            f"tokenizer {spec.tokenizer} has {tokenizer.vocab_size:,} ids, the model room for {layout.vocab_size:,}; "
            "raise the model's vocab_size or train a smaller tokenizer"
        )
    language = getattr(model.config, "language", model.config)
    for name in ("mask_id", "eos_id", "bos_id", "eot_id"):
        want, have = getattr(language, name, None), getattr(tokenizer, name)
        if want is not None and want != have:
            raise ConfigError(
                f"the model's {name} is {want}, but {have} in tokenizer {spec.tokenizer}; set it to {have}"
            )


def _check_images(spec: RunConfig, image_tokenizer: Any, layout: Layout) -> None:
    """Find an image tokenizer that does not fit."""
    if image_tokenizer is None:
        return
    _check_cache(spec)
    if layout.latents:
        c = image_tokenizer.config
        have = getattr(c, "channels", None), getattr(c, "grid", None)
        if have != layout.latents[:2]:
            makes = f"{have[0]} channels of {have[1]} x {have[1]}" if have[0] else f"none: it is a {c.type}"
            raise ConfigError(
                f"image_tokenizer {spec.image_tokenizer} has other latents than the model ({makes}), which draws "
                f"{layout.latents[0]} channels of {layout.latents[1]} x {layout.latents[2]}"
            )
        return
    if not hasattr(image_tokenizer, "codebook"):
        raise ConfigError(f"{spec.image_tokenizer}: a {type(image_tokenizer).__name__} makes no codes")
    _check_codes(spec, image_tokenizer, layout)


def _check_codes(spec: RunConfig, image_tokenizer: ImageTokenizer, layout: Layout) -> None:
    """Find a tokenizer of other codes, or of another grid where its own is the only one there is."""
    from mmdiff.models.image_tokenizer import FeatureTokenizer

    # Networks that read pictures as codes bring their own grid, and such tokenizers take pictures of any size.
    free = layout.reads_codes and isinstance(image_tokenizer, FeatureTokenizer)
    have = (layout.codes if free else image_tokenizer.grid**2, image_tokenizer.codebook)
    if have != (layout.codes, layout.codebook):
        raise ConfigError(
            f"image tokenizer {spec.image_tokenizer} makes {have[0]} tokens of {have[1]:,} codes, the model draws "
            f"{layout.codes} of {layout.codebook:,}; set the model's codes.grid and codes.codebook"
        )


def _check_cache(spec: RunConfig) -> None:
    """Refuse shards whose codes or latents another encoder made."""
    from data_pipelines.cache import CACHE_FILE
    from mmdiff.commands.data import identity_of
    from mmdiff.io.atomic import load_json

    mine = identity_of(Path(str(spec.image_tokenizer)))
    for source in spec.data.sources:
        for url in source.shards:
            folder = Path(url) if Path(url).is_dir() else Path(url).parent
            note = load_json(folder / CACHE_FILE) if (folder / CACHE_FILE).is_file() else {}
            if note.get("encoder") not in (None, mine):
                raise ConfigError(
                    f"{folder}: was encoded by {note['encoder']}, but image_tokenizer {spec.image_tokenizer} is "
                    f"{mine}; run mmdiff data cache again with this one, or name the other"
                )


def loader_of(
    spec: RunConfig, tokenizer: Tokenizer | None, layout: Layout, on_skip: Any, rank: int = 0, world: int = 1
) -> Any:
    """Batches of the recipe's samples, without end."""
    from data_pipelines.loader import open_loader

    return open_loader(spec.data, tokenizer, layout, seed=spec.train.seed, on_skip=on_skip, rank=rank, world=world)
