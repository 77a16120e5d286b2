"""The order in which edits of one model are safe."""

from __future__ import annotations

from enum import IntEnum


class Stage(IntEnum):
    """What an edit changes. A lower stage comes first; sharding comes after all, in strategies.

    >>> Stage.SHAPE < Stage.KIND < Stage.MEMORY < Stage.COMPILE
    True
    """

    SHAPE = 10
    """Sizes of tensors: pruning."""
    KIND = 20
    """Classes of modules or dtypes of tensors: quantization, float8."""
    MEMORY = 30
    """Layout or lifetime: memory format, activation checkpointing."""
    COMPILE = 40
    """How it runs: `torch.compile`."""
