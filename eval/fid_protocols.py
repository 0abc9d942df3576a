"""What each published tool computes under the name FID: its resize, its further numbers and how it draws.

A number belongs to a protocol. Ours, ``full``, takes KID from all pairs; the others follow the tools they are named
after. Means and covariances are float64 everywhere, also where a tool keeps its mean in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from .inception_score import splits_in_order, splits_shuffled
from .kid import Kid, kid, kid_subsets
from .rows import Rows

__all__ = ["MEASURES", "PROTOCOLS", "FidProtocol"]

MEASURES = ("fid", "kid", "isc", "sfid", "pr", "dc", "cmmd")
"""Fréchet distance, kernel distance, Inception Score, spatial FID, precision/recall, density/coverage, CMMD."""


@dataclass(frozen=True, kw_only=True)
class FidProtocol:
    """How one tool measures.

    Attributes:
        name: As on the command line.
        network: Its network, with its resize.
        measures: What it reports unless told otherwise; some of `MEASURES`.
        kid: Kernel distance of two sets of features.
        splits: Number of images -> split of each, for the Inception Score.
        neighbour: k of precision and recall.
        strict: Whether a point on a ball's surface is outside.
        dense_neighbour: k of density and coverage.
        quoted_images: Number of generated images that published values stand for.
        note: What a reader must know.
    """

    name: str
    network: str
    measures: tuple[str, ...]
    kid: Callable[[Rows, Rows], Kid] = kid
    splits: Callable[[int], np.ndarray] = splits_shuffled
    neighbour: int = 3
    strict: bool = False
    dense_neighbour: int = 5
    quoted_images: int | None = None
    note: str = ""

    def network_for(self, features: str) -> str:
        """The network to open when the user said ``features``: Inception gets this protocol's resize."""
        family, colon, path = features.partition(":")
        return f"{self.network}{colon}{path}" if family == "inception" else features


def _clean_kid(a: Rows, b: Rows) -> Kid:
    # clean-fid draws from numpy's global generator, so a published value stands for no particular seed.
    size = min(1000, len(a), len(b))
    return kid_subsets(a, b, subset_size=size, seed=0, second_first=True)


_CLEAN = partial(FidProtocol, measures=("fid", "kid"), kid=_clean_kid, quoted_images=50_000)

PROTOCOLS = {
    p.name: p
    for p in (
        FidProtocol(name="full", network="inception", measures=("fid", "kid")),
        FidProtocol(
            name="torch-fidelity",
            network="inception",
            measures=("fid", "kid", "isc", "pr"),
            kid=kid_subsets,
            quoted_images=50_000,
            note="precision and recall on Inception features, as in the version MAR and eMIGM use, names the right way",
        ),
        FidProtocol(name="pytorch-fid", network="inception-pytorch", measures=("fid",), quoted_images=50_000),
        FidProtocol(
            name="adm",
            network="inception",
            measures=("fid", "sfid", "isc", "pr"),
            splits=splits_in_order,
            quoted_images=50_000,
            note="Inception Score in blocks of 5,000 in the order of the files: files sorted by class make it collapse",
        ),
        _CLEAN(name="clean", network="inception-clean"),
        _CLEAN(name="clean-legacy-pytorch", network="inception-clean-legacy-pytorch"),
        _CLEAN(name="clean-legacy-tensorflow", network="inception"),
    )
}
"""Name -> protocol."""
