"""One forward pass that follows each channel through every operation."""

from lightning_accel.pruning.trace import (
    elementwise,
    indexing,
    norms,
    products,
    reduce,
    reshape,
    spatial,
)
from lightning_accel.pruning.trace.channel_tracer import ChannelTracer
from lightning_accel.pruning.trace.passes import traced
from lightning_accel.pruning.trace.union_find import Ids
from lightning_accel.pruning.trace.width_constraints import WidthConstraints

RULE_BOOKS = (elementwise, norms, indexing, products, reduce, reshape, spatial)
"""The modules whose rules are in the table because they are imported here."""

__all__ = ["RULE_BOOKS", "ChannelTracer", "Ids", "WidthConstraints", "traced"]
