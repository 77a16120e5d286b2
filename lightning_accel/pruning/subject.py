"""The network that a cut is planned on, copied once, and its calls in every form that a plan needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lightning_accel.arguments import instance
from lightning_accel.errors import AccelError
from lightning_accel.pruning.trains import Step, Training, in_dtype_of
from lightning_accel.pruning.verify import Verifier, runs
from lightning_accel.surgery import twin
from lightning_accel.surgery.acting import nothing_heard
from lightning_accel.surgery.call import Call, batch_size, first, tensors

_SAMPLES = 2  # enough for batch norm in train mode


@dataclass(frozen=True)
class Subject:
    """What one plan is made on and proved on; made once, and handed down.

    Attributes:
        users: The user's own network, which no plan changes.
        network: A copy with the hooks that take part in the forward; only copies of it are cut.
        calls: Example calls, as they came.
        whole: The same in the number format of the weights.
        small: Their first samples, or all where dimension 0 is no batch (nodes of a graph, say).
        verifier: Proves cuts of the network; holds it and the small calls in float64.
        training: Tries cuts of the network in training, and in what else has to run with it.
    """

    users: nn.Module
    network: nn.Module
    calls: Sequence[Call]
    whole: tuple[Call, ...]
    small: tuple[Call, ...]
    verifier: Verifier
    training: Training

    @classmethod
    def of(cls, model: nn.Module, calls: Sequence[Call], steps: Sequence[Step] = ()) -> Subject:
        """Copy a network, and look at which of its calls will do.

        Args:
            model: Any network; it stays as it is.
            calls: Example calls.
            steps: What else has to run with the smaller network.

        Raises:
            TypeError: It is no network.
            AccelError: It fails on the calls, or nothing can be proved on them.
        """
        instance("model", model, nn.Module, "a network", "pass a torch.nn.Module")
        _require_samples(calls)
        with nothing_heard(model):
            whole = in_dtype_of(calls, model)
            network = _acting_copy(model, whole)
            small = _small(network, whole)
            verifier, training = Verifier(network, small), Training(network, small, steps, whole)
        return cls(model, network, calls, whole, small, verifier, training)


def _require_samples(calls: Sequence[Call]) -> None:
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


def _acting_copy(model: nn.Module, whole: Sequence[Call]) -> nn.Module:
    """Return a copy with the hooks that take part in the forward."""
    try:
        return twin(model, whole)
    except Exception as error:  # whatever a forward, or copying a user's objects, may raise
        twin(model)  # which says so where it is copying that fails
        raise AccelError(
            "the network cannot be traced: its forward fails on the example",
            f"{type(error).__name__}: {error}",
            "pass an `example` that the network accepts",
        ) from error


def _small(model: nn.Module, whole: tuple[Call, ...]) -> tuple[Call, ...]:
    if (batch_size(whole) or 0) <= _SAMPLES:
        return whole
    small = first(whole, _SAMPLES)
    return small if runs(model, small) else whole
