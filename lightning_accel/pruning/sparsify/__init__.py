"""Sparsity training: penalties that make units small, so that cutting them later costs little."""

from typing import TYPE_CHECKING

from lightning_accel.lazy import lazily

if TYPE_CHECKING:
    from lightning_accel.pruning.sparsify.callback import SparsityTraining

__all__ = ["SparsityTraining"]


__getattr__ = lazily(__name__, {"SparsityTraining": "callback"})
