"""What strategies have in common whose modules may begin on the meta device."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_accel.parallel.meta import is_empty, on_meta, refuse_loose
from lightning_accel.parallel.meta_writes import MetaWrites


class SeesMeta(Strategy):
    """Notes what `configure_model` writes on the meta device, and would be lost."""

    @cached_property
    def _meta(self) -> MetaWrites:
        return MetaWrites()

    @contextmanager
    @override
    def model_sharded_context(self) -> Iterator[None]:
        with super().model_sharded_context(), self._meta.taken(self.lightning_module):
            yield


def require_fillable(root: LightningModule, notes: MetaWrites, given: Collection[str]) -> bool:
    """See that `reset_parameters`, or a checkpoint, fills all that is on the meta device; warn where nobody can.

    Args:
        root: Whose layers may be there.
        notes: What was written there.
        given: Names of what a checkpoint fills.

    Returns:
        Whether `reset_parameters` gives weights their numbers; else the checkpoint has all of them.

    Raises:
        Unsupported: Something would have other numbers than its author gave it.
    """
    refuse_loose(root)
    if warning := notes.require(root, given=given):
        rank_zero_warn(warning)
    return any(is_empty(t) and n not in given for n, t in root.state_dict().items())


def names_in(checkpoint: Mapping[str, Any], strict: bool, root: LightningModule) -> set[str]:
    """Return the names of what a checkpoint will fill; one that is loaded strictly has all, by whatever names."""
    return set(root.state_dict() if strict else checkpoint["state_dict"])


@contextmanager
def left_on_meta(strategy: Any) -> Iterator[None]:
    """Let a strategy end that has no numbers to move to the host, so that its first error is the one that is seen."""
    root = strategy._lightning_module
    if root is not None and on_meta(root):
        strategy._lightning_module = None
    try:
        yield
    finally:
        strategy._lightning_module = root
