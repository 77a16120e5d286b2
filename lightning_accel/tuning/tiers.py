"""How much the numbers of a training may change to make it faster: three words, explained in `numerics.py`."""

from __future__ import annotations

TIERS = ("exact", "amp", "low")
