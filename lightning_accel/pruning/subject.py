"""The copy of a network on which a cut is planned, and the calls that it is planned on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_accel.errors import AccelError
from lightning_accel.pruning.trains import in_dtype_of
from lightning_accel.pruning.verify import runs
from lightning_accel.surgery import twin
from lightning_accel.surgery.call import Call, batch_size, first, tensors

_SAMPLES = 2  # enough for batch norm in train mode


def require_samples(calls: Sequence[Call]) -> None:
    """Raise `AccelError` where no forward of the calls could be followed."""
    if any(t.is_nested for c in calls for t in tensors((c.args, c.kwargs))):
        raise AccelError(
            "channels cannot be followed through nested tensors",
            "one among the arguments of the network",
            "pass an `example` that is padded",
        )
    if batch_size(calls) == 0:
        raise AccelError(
            "an example without samples proves nothing", "a batch of 0", "pass one sample or more"
        )


def acting_copy(model: nn.Module, calls: Sequence[Call]) -> nn.Module:
    """Return a copy with the hooks that take part in the forward."""
    try:
        return twin(model, in_dtype_of(calls, model))
    except Exception as error:  # whatever a forward, or copying a user's objects, may raise
        twin(model)  # which says so where it is copying that fails
        raise AccelError(
            "the network cannot be traced: its forward fails on the example",
            f"{type(error).__name__}: {error}",
            "pass an `example` that the network accepts",
        ) from error


def small_calls(model: nn.Module, calls: Sequence[Call]) -> tuple[Call, ...]:
    """Return the first samples, or all where dimension 0 is no batch (nodes of a graph, say)."""
    whole = in_dtype_of(calls, model)
    if (batch_size(whole) or 0) <= _SAMPLES:
        return whole
    small = first(whole, _SAMPLES)
    return small if runs(model, small) else whole
