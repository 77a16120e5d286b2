"""What one run compiled is not compiled again by the next: the compile cache in a file of its own."""

from typing import TYPE_CHECKING, Any

from lightning_accel.compilation.warm.cache import cache_at, pack, unpack

if TYPE_CHECKING:
    from lightning_accel.compilation.warm.callback import WarmStart

__all__ = ["WarmStart", "cache_at", "pack", "unpack"]


def __getattr__(name: str) -> Any:
    if name == "WarmStart":
        from lightning_accel.compilation.warm.callback import WarmStart

        return WarmStart
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
