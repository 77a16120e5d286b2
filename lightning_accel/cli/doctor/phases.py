"""Where the time of a step goes: forward, backward, optimizer, each without what happens within it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch

from lightning_accel.measure.race import synchronise
from lightning_accel.tuning.replica import Replica

NAMES = ("forward", "backward", "optimizer")


class Phases:
    """Sums up the seconds of named stretches; of one within another the outer one does not count.

    Args:
        device: Which is waited for at each border.
        clock: Gives seconds.

    >>> ticks = iter(range(9))
    >>> phases = Phases(torch.device("cpu"), lambda: next(ticks))
    >>> with phases.within("forward"):
    ...     with phases.within("backward"):
    ...         pass
    >>> phases.take()
    {'forward': 2.0, 'backward': 1.0}
    """

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self._device, self._clock = device, clock
        self._open: list[str] = []
        self._mark = 0.0
        self._seconds: dict[str, float] = {}

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Count what runs within to a name."""
        self._pass()
        self._open.append(name)
        try:
            yield
        finally:
            self._pass()
            self._open.pop()

    def take(self) -> dict[str, float]:
        """Return the seconds by name, and begin anew."""
        found, self._seconds = self._seconds, {}
        return found

    def _pass(self) -> None:
        synchronise(self._device)
        now = self._clock()
        if self._open:
            name = self._open[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._mark
        self._mark = now


@contextmanager
def watched(replica: Replica, phases: Phases) -> Iterator[None]:
    """Let the phases of a copy's steps be told apart within."""

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with phases.within(name):
                return function(*args, **kwargs)

        return run

    with ExitStack() as undo:
        own = vars(replica.module)
        before = own.get("training_step")
        own["training_step"] = timed("forward", replica.module.training_step)
        undo.callback(_restore, own, "training_step", before)
        backward = torch.Tensor.backward
        undo.callback(setattr, torch.Tensor, "backward", backward)
        torch.Tensor.backward = timed("backward", backward)  # type: ignore[method-assign]
        for optimizer in replica.optimizers:
            undo.callback(_restore, vars(optimizer), "step", vars(optimizer).get("step"))
            vars(optimizer)["step"] = timed("optimizer", optimizer.step)
        yield


def _restore(holder: dict[str, Any], name: str, before: Any) -> None:
    if before is None:
        holder.pop(name, None)
    else:
        holder[name] = before
