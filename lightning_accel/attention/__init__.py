"""Which kernel computes scaled dot product attention."""

from typing import TYPE_CHECKING

from lightning_accel.attention.backend import BACKENDS, attention_backend, uses_attention
from lightning_accel.lazy import lazily

if TYPE_CHECKING:
    from lightning_accel.attention.callbacks.attention_backend import AttentionBackend

__all__ = ["BACKENDS", "AttentionBackend", "attention_backend", "uses_attention"]


__getattr__ = lazily(
    __name__,
    {
        "AttentionBackend": "callbacks.attention_backend",
    },
)
