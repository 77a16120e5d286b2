"""`torch.compile` of repeated blocks, in place, with proof that it took effect, warm starts, and freezing."""

from typing import TYPE_CHECKING, Any

from lightning_accel.compilation.blocks import compile_blocks, find_blocks
from lightning_accel.compilation.explain import Capture, captures, table
from lightning_accel.compilation.frozen.freeze import frozen
from lightning_accel.compilation.warm.cache import pack, unpack

if TYPE_CHECKING:
    from lightning_accel.compilation.callback import BlockCompile
    from lightning_accel.compilation.frozen.callback import FrozenPredict
    from lightning_accel.compilation.warm.callback import WarmStart

__all__ = [
    "BlockCompile",
    "Capture",
    "FrozenPredict",
    "WarmStart",
    "captures",
    "compile_blocks",
    "find_blocks",
    "frozen",
    "pack",
    "table",
    "unpack",
]


def __getattr__(name: str) -> Any:
    if name == "BlockCompile":
        from lightning_accel.compilation.callback import BlockCompile

        return BlockCompile
    if name == "FrozenPredict":
        from lightning_accel.compilation.frozen.callback import FrozenPredict

        return FrozenPredict
    if name == "WarmStart":
        from lightning_accel.compilation.warm.callback import WarmStart

        return WarmStart
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
