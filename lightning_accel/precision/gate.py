"""Learning-rate schedulers wait for optimizer steps that a gradient scaler skipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_accel.surgery.optimizers import within


class Gate:
    """Holds a scheduler back while every step of its optimizer since its last one was skipped.

    A scheduler that runs on after a skipped step reaches its later values too early (Lightning #5558, open
    since 2021). Whether a step happened is learnt from the optimizer's own hook: with ordinary optimizers
    the scaler has decided on the host already and the hook ran or did not; fused ones decide on the
    device, so their answer stays a tensor there until a scheduler is due. No step waits for the device.
    """

    def __init__(self, module: Any, optimizers: list[Optimizer], schedulers: list[Any]) -> None:
        self._module = module
        self._schedulers = schedulers
        self._step = module.lr_scheduler_step
        self._was_set = "lr_scheduler_step" in vars(module)
        self._attempts = [0] * len(schedulers)
        self._taken: list[int | Tensor] = [0] * len(schedulers)
        self._last: int | Tensor = 1
        # A wrapper that is no optimizer of torch has no hook, but what works inside of it does.
        found = [o for o in within(optimizers) if isinstance(o, Optimizer)]
        self._hooks = [o.register_step_post_hook(self._took) for o in found]
        module.lr_scheduler_step = self._scheduler_step

    def __deepcopy__(self, memo: dict[int, Any]) -> Gate:
        return self  # a copy of the module must not copy the training that hangs on this

    @property
    def skipped(self) -> bool:
        return not float(self._last)

    @contextmanager
    def attempt(self, optimizer: Any) -> Iterator[None]:
        """Count one optimizer step, and whether it took place."""
        self._last = 0
        yield
        for index, scheduler in enumerate(self._schedulers):
            steered = getattr(scheduler, "optimizer", None)
            if any(steered is one for one in within(optimizer)):
                self._attempts[index] += 1
                self._taken[index] = self._taken[index] + self._last

    def state(self) -> list[list[float]]:
        return [[a, float(t)] for a, t in zip(self._attempts, self._taken, strict=True)]

    def load(self, state: list[list[float]]) -> None:
        for index, (attempts, taken) in enumerate(state[: len(self._schedulers)]):
            self._attempts[index], self._taken[index] = int(attempts), int(taken)

    def open(self) -> None:
        """Give the module its own method back."""
        for handle in self._hooks:
            handle.remove()
        if self._was_set:
            self._module.lr_scheduler_step = self._step
        else:
            vars(self._module).pop("lr_scheduler_step", None)

    def _took(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # set by the scaler for fused optimizers
        self._last = 1 if found_inf is None else (found_inf == 0).float()

    def _scheduler_step(self, scheduler: Any, metric: Any) -> None:
        index = next((i for i, s in enumerate(self._schedulers) if s is scheduler), None)
        if index is not None:
            held = self._attempts[index] > 0 and not float(self._taken[index])
            self._attempts[index], self._taken[index] = 0, 0
            if held:
                return
        self._step(scheduler, metric)
