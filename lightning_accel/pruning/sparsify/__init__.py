"""Sparsity training: penalties that make units small, so that cutting them later costs little."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_accel.pruning.sparsify.callback import SparsityTraining

__all__ = ["SparsityTraining"]


def __getattr__(name: str) -> Any:
    if name == "SparsityTraining":
        from lightning_accel.pruning.sparsify.callback import SparsityTraining

        return SparsityTraining
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
