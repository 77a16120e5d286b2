"""`torch.compile` of repeated blocks, in place, with proof that it took effect, warm starts, and freezing."""

from typing import TYPE_CHECKING

from lightning_accel.compilation.blocks import compile_blocks, find_blocks
from lightning_accel.compilation.explain import Capture, captures, table
from lightning_accel.compilation.frozen.freeze import frozen
from lightning_accel.compilation.warm.cache import pack, unpack
from lightning_accel.lazy import lazily

if TYPE_CHECKING:
    from lightning_accel.compilation.callbacks.block_compile import BlockCompile
    from lightning_accel.compilation.callbacks.frozen_predict import FrozenPredict
    from lightning_accel.compilation.callbacks.warm_start import WarmStart

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


__getattr__ = lazily(
    __name__,
    {
        "BlockCompile": "callbacks.block_compile",
        "FrozenPredict": "callbacks.frozen_predict",
        "WarmStart": "callbacks.warm_start",
    },
)
