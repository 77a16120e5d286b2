"""Which kernel computes scaled dot product attention."""

from typing import TYPE_CHECKING, Any

from lightning_accel.attention.backend import BACKENDS, attention_backend, uses_attention

if TYPE_CHECKING:
    from lightning_accel.attention.callback import AttentionBackend

__all__ = ["BACKENDS", "AttentionBackend", "attention_backend", "uses_attention"]


def __getattr__(name: str) -> Any:
    if name == "AttentionBackend":
        from lightning_accel.attention.callback import AttentionBackend

        return AttentionBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
