"""``mmdiff demo``: the main job end to end on real data, from nothing, on this machine."""

from __future__ import annotations

from mmdiff.commands.demo.command import demo

__all__ = ["demo"]
