"""What one run compiled is not compiled again by the next: the compile cache in a file of its own."""

from lightning_accel.compilation.warm.cache import cache_at, pack, unpack

__all__ = ["cache_at", "pack", "unpack"]
