"""``python -m eval.mmmu``."""

from __future__ import annotations

import sys

from .command import main

sys.exit(main())
