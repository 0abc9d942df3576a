"""Every family at work on one small fixed batch: inputs, forward pass and loss, for coordinate checks and counting.

The batches are random: a coordinate check asks how activations move, not what is learnt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdiff import rng
from mmdiff.batch import IGNORE
from mmdiff.errors import ConfigError
from mmdiff.models import registry
from mmdiff.scale import mup
from mmdiff.scale.coordinates import Trial
from mmdiff.scale.family import with_size
from mmdiff.scale.initialisers import FAN_IN, Constant, Normal, Recipe
from mmdiff.scale.rows import Rule

__all__ = ["PROBLEMS", "Problem", "Variant", "problem_of", "trials"]

Batch = dict[str, Tensor]

Variant = Literal["mup", "sp", "plain"]
"""``plain``: muP's initialisation and forward pass, but one rate for all."""


@dataclass(frozen=True)
class Problem:
    """A family at work.

    Attributes:
        inputs: (configuration, batch size, generator) -> a batch.
        run: (network, batch) -> its output.
        loss: (output, batch) -> a scalar.
        recipe: How muP initialises it; None: as the network itself does, with the base's scales.
    """

    inputs: Callable[[Any, int, torch.Generator], Batch]
    run: Callable[[Any, Batch], Tensor]
    loss: Callable[[Tensor, Batch], Tensor]
    recipe: Recipe | None = None


TEXT_TOKENS = 16
"""Length of the texts, in ids or in features."""


def problem_of(config: Any) -> Problem:
    """The problem of a configuration's family.

    Raises:
        ConfigError: The family has none.
    """
    if config.type not in PROBLEMS:
        raise ConfigError(f"family {config.type!r} has no small problem yet; known: {', '.join(PROBLEMS)}")
    return PROBLEMS[config.type]


def trials(
    base: Any,
    variant: Variant,
    *,
    lr: float = 1e-2,
    batch: int = 8,
    rule: Rule = "mup",
) -> Callable[[int, int], Trial]:
    """Networks of a family at any width, for `mmdiff.scale.coordinates.coord_check`.

    Args:
        base: Configuration at the width at which values are tuned.
        variant: See `Variant`.
        lr: AdamW's rate.
        batch: Rows of the fixed batch.
        rule: The parametrisation of ``mup`` and ``plain``.
    """
    problem = problem_of(base)

    def make(width: int, seed: int) -> Trial:
        target = with_size(base, width=width)
        the_plan = mup.plan(target, base, rule="sp" if variant == "sp" else rule)
        draws = rng.generator(seed, "init")
        if problem.recipe is not None and variant != "sp":
            model: nn.Module = registry.build(mup.with_scales(target, the_plan), generator=draws)
            the_plan.init_(model, draws, recipe=problem.recipe, zero_readout=True)
        else:
            model = mup.fresh(the_plan, target, base, draws, zero_readout=variant != "sp")
        given = problem.inputs(target, batch, rng.generator(seed, "batch"))
        groups = model.parameters() if variant == "plain" else the_plan.groups(model, lr=lr)
        optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)

        def step() -> None:
            loss = problem.loss(problem.run(model, given), given)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return Trial(model.train(), step, _carried(model, the_plan))

    return make


def _carried(model: nn.Module, plan: mup.Plan) -> dict[str, float]:
    """Modules whose output holds the factor of a tied readout: the norm that carries it, and sequences it ends."""
    out: dict[str, float] = {}
    for row in plan.rows:
        name = row.name.rpartition(".")[0] if row.front and row.fold != 1 else ""
        while name:
            out[name] = row.fold
            parent, _, last = name.rpartition(".")
            owner = model.get_submodule(parent)
            name = parent if isinstance(owner, nn.Sequential) and last == str(len(owner) - 1) else ""
    return out


def _ids(high: int, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randint(high, shape, generator=g)


def _mse(output: Tensor, batch: Batch) -> Tensor:
    return F.mse_loss(output, batch["target"])


def _cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Classes on the last axis; targets that are not learnt are `IGNORE`."""
    return F.cross_entropy(logits.flatten(0, -2), batch["target"].flatten())


def _text(config: Any, b: int, g: torch.Generator) -> Batch:
    ids = _ids(config.vocab_size, (b, TEXT_TOKENS), g)
    masked = rng.uniform(g, ids.shape) < 0.5
    return {"ids": ids.masked_fill(masked, config.mask_id), "target": ids.masked_fill(~masked, IGNORE)}


def _seen_text(config: Any, b: int, g: torch.Generator) -> Batch:
    size = config.vision.image_size
    return {**_text(config.language, b, g), "pixels": rng.normal(g, (b, 3, size, size))}


def _run_seen_text(model: Any, batch: Batch) -> Tensor:
    """Connected features in front of the text; logits of the text."""
    text = model.language.embed_tokens(batch["ids"])
    features = model.features(batch["pixels"]).to(text.dtype)
    logits = model(embeds=torch.cat((features, text), dim=1))
    return logits[:, features.shape[1] :]


def _codes(config: Any, b: int, g: torch.Generator) -> Batch:
    codes = _ids(config.codebook, (b, config.tokens), g)
    masked = rng.uniform(g, codes.shape) < 0.5
    labels = _ids(config.classes, (b,), g)
    return {"codes": codes.masked_fill(masked, config.codebook), "labels": labels, "target": codes}


def _tokens(config: Any, b: int, g: torch.Generator) -> Batch:
    """Half of the tokens known, the same number in every row, and a noisy form of each for the head."""
    shape = (b, config.tokens, config.token_channels)
    return {
        "latents": rng.normal(g, shape),
        "mask": rng.permutation(g, b, config.tokens) < config.tokens // 2,
        "labels": _ids(config.classes, (b,), g),
        "noisy": rng.normal(g, shape),
        "t": 1000 * rng.uniform(g, (b * config.tokens,)),
        "target": rng.normal(g, (b * config.tokens, 2 * config.token_channels)),
    }


def _run_tokens(model: Any, batch: Batch) -> Tensor:
    """The condition of every token, and the head's prediction from it."""
    known = int(batch["mask"].shape[1] - batch["mask"].shape[1] // 2)
    z = model.condition(batch["latents"], batch["mask"], batch["labels"], counts=(known, known))
    return model.head(batch["noisy"].flatten(0, 1), batch["t"], z.flatten(0, 1))


def _classes(config: Any, b: int, g: torch.Generator) -> Batch:
    shape = (b, config.channels, config.image_size, config.image_size)
    target = (b, config.out_channels, *shape[2:])
    t = 1000 * rng.uniform(g, (b,))
    labels = _ids(config.classes, (b,), g)
    return {"x": rng.normal(g, shape), "t": t, "labels": labels, "target": rng.normal(g, target)}


def _prompts(config: Any, b: int, g: torch.Generator) -> Batch:
    side = min(config.image_size, config.max_grid * config.patch_size)
    return {
        "x": rng.normal(g, (b, config.channels, side, side)),
        "t": 1000 * rng.uniform(g, (b,)),
        "context": rng.normal(g, (b, TEXT_TOKENS, config.context_channels)),
        "pooled": rng.normal(g, (b, config.pooled_channels)),
        "target": rng.normal(g, (b, config.out_channels, side, side)),
    }


def _masked_prompts(config: Any, b: int, g: torch.Generator) -> Batch:
    codes = _ids(config.codebook, (b, 8, 8), g)
    masked = rng.uniform(g, codes.shape) < 0.5
    return {
        "codes": codes.masked_fill(masked, config.mask_id),
        "t": rng.uniform(g, (b,)),
        "context": rng.normal(g, (b, TEXT_TOKENS, config.context_channels)),
        "pooled": rng.normal(g, (b, config.pooled_channels)),
        "micro": 100 * rng.uniform(g, (b, 5)),
        "target": codes.masked_fill(~masked, IGNORE),
    }


def _run_codes(model: Any, batch: Batch) -> Tensor:
    given = (batch[name] for name in ("codes", "t", "context", "pooled", "micro"))
    return model(*given).movedim(1, -1)


_FLAT: Recipe = {"input": Normal(0.1), "hidden": Normal(0.1), "output": Constant(), "*.bias": Constant()}
"""N(0, 0.1^2) at the base: the setting in which muP's package is checked on language models."""

PROBLEMS: dict[str, Problem] = {
    "llada": Problem(_text, lambda model, batch: model(batch["ids"]), _cross_entropy, _FLAT),
    "llada_v": Problem(_seen_text, _run_seen_text, _cross_entropy),
    "maskgit": Problem(
        _codes,
        lambda model, batch: model(batch["codes"], batch["labels"]),
        _cross_entropy,
        {**FAN_IN, "tied": Normal(0.5)},
    ),
    "emigm": Problem(_tokens, _run_tokens, _mse),
    # Zero modulation hides the blocks from a check of four steps, so these are initialised as muP's paper does.
    "dit": Problem(_classes, lambda model, batch: model(batch["x"], batch["t"], batch["labels"]), _mse, FAN_IN),
    "mmdit": Problem(
        _prompts, lambda model, batch: model(batch["x"], batch["t"], batch["context"], batch["pooled"]), _mse, FAN_IN
    ),
    "masked_mmdit": Problem(_masked_prompts, _run_codes, _cross_entropy, {**FAN_IN, "embed.table.weight": Normal(1.0)}),
}
"""Family -> its problem."""
