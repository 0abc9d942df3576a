"""Families of networks by name: which configuration, which module.

Loading and saving by name are here too, because this is where people look; they are done in `mmdiff.io.folder`, which
is imported when they are called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from mmdiff.config import Field
from mmdiff.errors import ConfigError
from mmdiff.models import (
    amused,
    dit,
    emigm,
    llada,
    llada_v,
    lumina,
    magvit,
    masked_mmdit,
    maskgit,
    mmada,
    mmdit,
    scorer,
    unified,
    vae,
    vision,
    vq,
    vqgan,
)
from mmdiff.models.base import PretrainedModule

__all__ = [
    "FAMILIES",
    "Family",
    "Identity",
    "ModelConfig",
    "build",
    "family_of",
    "identify",
    "load_model",
    "resolve",
    "save_folder",
]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of network.

    Attributes:
        config: Its configuration class; the field ``type`` holds the family's name.
        module: Its module class, built as ``module(config, generator=...)``.
        summary: What it is, for model cards.
    """

    config: Any
    module: Any
    summary: str


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a checkpoint says it is.

    Attributes:
        path: Its folder, or the weight file.
        family: Name in `FAMILIES`.
        layout: ``"mmdiff"`` for ours, else a name in `mmdiff.io.layouts.LAYOUTS`.
        config: The network's configuration.
        tree: The content of config.json, or what the shapes of the tensors say in its place.
        root: Where in a PyTorch file the tensors are; None = they are all there is.
    """

    path: Path
    family: str
    layout: str
    config: Any
    tree: Mapping[str, Any]
    root: str | None = None


FAMILIES: dict[str, Family] = {
    "llada": Family(
        config=llada.Config, module=llada.LLaDA, summary="masked-diffusion language model (LLaDA, arXiv 2502.09992)"
    ),
    "llada_v": Family(
        config=llada_v.Config,
        module=llada_v.LLaDAV,
        summary="masked-diffusion vision-language model (LLaDA-V, arXiv 2505.16933)",
    ),
    "unified": Family(
        config=unified.Config,
        module=unified.Unified,
        summary="masked-diffusion model that reads images, answers in text, and draws",
    ),
    "mmada": Family(
        config=mmada.Config,
        module=mmada.MMaDA,
        summary="masked-diffusion model over text and image codes in one vocabulary (MMaDA, arXiv 2505.15809)",
    ),
    "lumina": Family(
        config=lumina.Config,
        module=lumina.Lumina,
        summary="masked-diffusion model over text and image codes in one vocabulary (Lumina-DiMOO, arXiv 2510.06308)",
    ),
    "vq": Family(
        config=vq.Config,
        module=vq.VQ,
        summary="discrete image tokenizer (finite scalar quantisation, arXiv 2309.15505)",
    ),
    "emigm": Family(
        config=emigm.Config,
        module=emigm.EMIGM,
        summary="masked image generator over continuous tokens (eMIGM, arXiv 2503.07197; MAR, arXiv 2406.11838)",
    ),
    "maskgit": Family(
        config=maskgit.Config,
        module=maskgit.MaskGIT,
        summary="masked image generator over discrete codes (MaskGIT, arXiv 2202.04200)",
    ),
    "kl_vae": Family(
        config=vae.Config, module=vae.KLVAE, summary="continuous image autoencoder (KL-regularised, arXiv 2112.10752)"
    ),
    "dc_ae": Family(
        config=vae.DCConfig, module=vae.DCAE, summary="deep-compression image autoencoder (DC-AE, arXiv 2410.10733)"
    ),
    "vqgan": Family(
        config=vqgan.Config, module=vqgan.VQGAN, summary="discrete image tokenizer (VQGAN, arXiv 2012.09841)"
    ),
    "magvit": Family(
        config=magvit.Config, module=magvit.MAGVIT, summary="discrete image tokenizer (MAGVIT-v2, arXiv 2310.05737)"
    ),
    "amused_vq": Family(
        config=amused.Config, module=amused.AmusedVQ, summary="discrete image tokenizer (aMUSEd, arXiv 2401.01808)"
    ),
    "siglip": Family(
        config=vision.Config, module=vision.SiglipTower, summary="vision tower (SigLIP 2, arXiv 2502.14786)"
    ),
    "scorer": Family(
        config=scorer.Config, module=scorer.Scorer, summary="image-text scorer: a small judge for generated images"
    ),
    "dit": Family(
        config=dit.Config, module=dit.DiT, summary="class-conditional diffusion transformer (DiT, arXiv 2212.09748)"
    ),
    "mmdit": Family(
        config=mmdit.Config,
        module=mmdit.MMDiT,
        summary="text-to-image flow-matching transformer (MMDiT of Stable Diffusion 3, arXiv 2403.03206)",
    ),
    "masked_mmdit": Family(
        config=masked_mmdit.Config,
        module=masked_mmdit.MaskedMMDiT,
        summary="MMDiT over masked image tokens (Meissonic, arXiv 2410.08261; Muddit, arXiv 2505.23606)",
    ),
}
"""Name -> family. A new family is a new row."""

ModelConfig = Annotated[
    llada.Config
    | llada_v.Config
    | unified.Config
    | mmada.Config
    | lumina.Config
    | vq.Config
    | emigm.Config
    | maskgit.Config
    | vae.Config
    | vae.DCConfig
    | vqgan.Config
    | magvit.Config
    | amused.Config
    | vision.Config
    | scorer.Config
    | dit.Config
    | mmdit.Config
    | masked_mmdit.Config,
    Field(discriminator="type"),
]
"""Any network in a training configuration, told apart by ``type``."""


def family_of(config: Any) -> Family:
    """The family of a configuration.

    Raises:
        ConfigError: It is of none.
    """
    family = FAMILIES.get(getattr(config, "type", ""))
    if family is None or not isinstance(config, family.config):
        raise ConfigError(f"{type(config).__name__} is no network configuration; known families: {', '.join(FAMILIES)}")
    return family


def build(
    config: Any, *, device: torch.device | str | None = None, generator: torch.Generator | None = None
) -> PretrainedModule:
    """A network with fresh weights.

    Args:
        config: A configuration of one of `FAMILIES`.
        device: Where it goes; default the CPU. ``"meta"`` allocates nothing.
        generator: CPU generator that draws the weights; None leaves them as PyTorch allocates them.

    Raises:
        ConfigError: The configuration is of no family.
    """
    module = family_of(config).module
    if device is not None and torch.device(device).type == "meta":
        with torch.device("meta"):
            return module(config)
    # PyTorch's layers draw from the global generator before ours replaces their weights; it is put back.
    with torch.random.fork_rng(devices=[]):
        built = module(config, generator=generator)
    return built if device is None else built.to(device)


def identify(path_or_id: str | Path) -> Identity:
    """What a checkpoint is; arguments and errors as in `mmdiff.io.folder.identify`."""
    from mmdiff.io.folder import identify as find

    return find(resolve(path_or_id))


def resolve(path_or_id: str | Path, revision: str | None = None) -> Path:
    """Where a checkpoint lies; arguments and errors as in `mmdiff.io.hub.resolve`."""
    from mmdiff.io.hub import resolve as find

    return find(path_or_id, revision)


def load_model(
    path_or_id: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> PretrainedModule:
    """Load a network of any family; arguments and errors as in `mmdiff.io.folder.load_model`."""
    from mmdiff.io.folder import load_model as load

    return load(path_or_id, device=device, dtype=dtype, revision=revision)


def save_folder(module: nn.Module, folder: str | Path, **parts: Any) -> None:
    """Write a checkpoint in our layout; arguments and errors as in `mmdiff.io.folder.save_folder`."""
    from mmdiff.io.folder import save_folder as save

    save(module, folder, **parts)
