"""``python -m mmdiff``: the same as the ``mmdiff`` command."""

from __future__ import annotations

from mmdiff.cli import main

if __name__ == "__main__":
    main()
