"""`torch.compile` of repeated blocks, in place, with proof that it took effect."""

from typing import TYPE_CHECKING, Any

from lightning_accel.compilation.blocks import compile_blocks, find_blocks
from lightning_accel.compilation.explain import Capture, captures, table

if TYPE_CHECKING:
    from lightning_accel.compilation.callback import BlockCompile

__all__ = ["BlockCompile", "Capture", "captures", "compile_blocks", "find_blocks", "table"]


def __getattr__(name: str) -> Any:
    if name == "BlockCompile":
        from lightning_accel.compilation.callback import BlockCompile

        return BlockCompile
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
