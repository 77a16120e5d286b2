"""Forwards of several batches that wait for each other at layers, so that each is made only once.

Where layers are changed one after another, in the order in which they run, the input of each hangs on those before
it: made anew for each layer, the forwards cost as much as there are layers. Here all batches come to a layer, stop,
and go on when it is changed. Each has a copy of the network, with the same parameters, and a thread; one runs at a
time. Forwards may keep what they like on their modules, between their layers or from call to call.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from lightning_accel.surgery.acting import copied
from lightning_accel.surgery.call import Call, run
from lightning_accel.surgery.preserve import preserve_rng
from lightning_accel.surgery.rng import random_state, set_random_state


class OutOfStep(Exception):
    """A forward came to another layer than the one that all wait at, ended, or failed."""


class _Left(BaseException):
    """Ends a forward that nobody needs any more; not an `Exception`, which the user's forward may catch."""


class Lockstep:
    """The calls of several batches, each on a copy of a network that shares its parameters.

    Args:
        network: It is not changed; what is done to its parameters between two layers, the copies see.
        batches: The calls of each.
        stops: Names of layers to stop at.
        after: Stop behind a layer, and hand out its output; else before it, and hand out what it got.

    >>> net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    >>> calls = [[Call("", (torch.ones(1, 1),), {})], [Call("", (torch.zeros(1, 1),), {})]]
    >>> with Lockstep(net, calls, ["0", "1"], after=True) as runs:
    ...     outputs = runs.at("0"), runs.at("1")
    >>> torch.equal(outputs[1][0], net(torch.ones(1, 1)))
    True
    """

    def __init__(
        self,
        network: nn.Module,
        batches: Sequence[Sequence[Call]],
        stops: Collection[str],
        *,
        after: bool,
    ) -> None:
        self._runs = [_Run(network, calls, stops, after=after) for calls in batches]

    def at(self, name: str) -> list[Any]:
        """Let all run to a layer, and return for each batch its output, or its `(args, kwargs)`.

        Raises:
            OutOfStep: One does not come there next.
        """
        return [forward.to(name) for forward in self._runs]

    def __enter__(self) -> Lockstep:
        return self

    def __exit__(self, *_: object) -> None:
        for forward in self._runs:
            forward.leave()


class _Run:
    """One forward; it and who asks for it run by turns."""

    def __init__(
        self, network: nn.Module, calls: Sequence[Call], stops: Collection[str], *, after: bool
    ) -> None:
        self._network = copied(network, {id(p): p for p in network.parameters()})
        self._calls = calls
        self._place: tuple[str, Any] | None = None
        self._why = "it ended"
        self._is_left = self._is_over = False
        self._chance = random_state()
        self._may_run, self._has_stopped = threading.Semaphore(0), threading.Semaphore(0)
        for name in stops:
            layer = self._network.get_submodule(name)
            if after:
                layer.register_forward_hook(self._behind(name))
            else:
                # The last of all, so that it sees what the layer gets.
                layer.register_forward_pre_hook(self._before(name), with_kwargs=True)
        self._devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._forward,), daemon=True)
        self._thread.start()

    def to(self, name: str) -> Any:
        self._turn()
        if self._place is None or self._place[0] != name:
            raise OutOfStep(self._why if self._place is None else f"it is at `{self._place[0]}`")
        return self._place[1]

    def leave(self) -> None:
        self._is_left = True
        while not self._is_over:
            self._turn()
        self._thread.join()

    def _turn(self) -> None:
        if not self._is_over:
            with preserve_rng():
                set_random_state(self._chance)
                self._may_run.release()
                self._has_stopped.acquire()
                self._chance = random_state()

    def _forward(self) -> None:
        self._may_run.acquire()
        try:
            for device in self._devices:
                torch.cuda.set_device(device)
            if not self._is_left:
                with torch.no_grad():
                    run(self._network, self._calls)
        except _Left:
            pass
        except (
            Exception
        ) as error:  # whatever a forward may raise; who asks makes it anew, and sees it
            self._why = f"{type(error).__name__}: {error}"
        finally:
            self._place, self._is_over = None, True
            self._has_stopped.release()

    def _stop(self, name: str, value: Any) -> None:
        self._place = name, value
        self._has_stopped.release()
        self._may_run.acquire()
        self._place = None
        if self._is_left:
            raise _Left

    def _behind(self, name: str) -> Callable[..., None]:
        return lambda _, __, output: self._stop(name, output)

    def _before(self, name: str) -> Callable[..., None]:
        return lambda _, args, kwargs: self._stop(name, (args, kwargs))
