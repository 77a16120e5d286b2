"""One forward pass that follows each channel through every operation."""

from lightning_accel.pruning.trace import (
    elementwise,
    norms,
    parts,
    products,
    reduce,
    reshape,
    spatial,
)
from lightning_accel.pruning.trace.atoms import Ids
from lightning_accel.pruning.trace.flow import Flow
from lightning_accel.pruning.trace.forms import Forms
from lightning_accel.pruning.trace.passes import traced

RULE_BOOKS = (elementwise, norms, parts, products, reduce, reshape, spatial)
"""The modules whose rules are in the table because they are imported here."""

__all__ = ["RULE_BOOKS", "Flow", "Forms", "Ids", "traced"]
