"""Shards in, examples out: the data room of mmdiff.

``index`` and ``pack`` know the file format, ``source`` finds shards, ``reader`` fetches bytes and checks them, ``plan``
says which sample stands at which position, ``tasks`` turn a sample into an `Example`, ``loader`` makes batches.
Nothing here knows a network, a training loop or a sampler.
"""

from __future__ import annotations

__all__ = ["MMDIFF_PACKAGE"]

MMDIFF_PACKAGE = "mmdiff"
"""Marker by which the command line tells this package from a user's own folder of the same name."""
