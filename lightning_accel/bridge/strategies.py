"""How a strategy holds the parameters: asked here, and nowhere else.

Classes say little: Lightning's DeepSpeed and XLA strategies are children of `DDPStrategy`, and those of other packages
cannot be imported to be compared with. So the names in their lineage count first.
"""

from __future__ import annotations

from typing import Literal

from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

Holding = Literal["whole", "replicated", "sharded", "traced"]

_SHARDED = ("FSDP", "DeepSpeed", "ModelParallel")


def is_of(strategy: Strategy, *names: str) -> bool:
    """Whether a strategy, or one that it is a child of, has one of these in its name."""
    return any(name in base.__name__ for base in type(strategy).__mro__ for name in names)


def holding(strategy: Strategy) -> Holding:
    """Return whether each process holds parameters that are whole, copies of whole ones, parts, or graphs of them.

    Of what is not known it says "sharded": nothing that needs whole parameters is then done.

    >>> from lightning.pytorch.strategies import FSDPStrategy
    >>> [holding(kind()) for kind in (SingleDeviceStrategy, DDPStrategy, FSDPStrategy)]
    ['whole', 'replicated', 'sharded']
    """
    if is_of(strategy, *_SHARDED):
        return "sharded"
    if is_of(strategy, "XLA"):
        return "traced"
    if isinstance(strategy, SingleDeviceStrategy):
        return "whole"
    return "replicated" if isinstance(strategy, DDPStrategy) else "sharded"
