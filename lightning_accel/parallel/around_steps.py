"""What stands around the steps, backward passes and optimizer steps of a sharded module, from one sharding to the next."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import wraps
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from lightning_accel.parallel.manual import Manual
from lightning_accel.parallel.sharding import average_gradients, refuse_hooks
from lightning_accel.parallel.uneven import Uneven
from lightning_accel.parallel.write_back import WriteBack

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class AroundSteps:
    """Stands around the work of a sharded module until `leave`.

    Args:
        root: The user's module, sharded and not gathered.
        units: Names of the modules that are gathered by themselves.
        whole: Weights that every process holds whole.
        written: Weights that steps write.
        unsteady: Weights of which some process may have no gradient.
        group: The processes.
        fits: Whether this run trains.
    """

    def __init__(
        self,
        root: LightningModule,
        units: Sequence[str],
        *,
        whole: Sequence[str],
        written: Sequence[str],
        unsteady: Sequence[str],
        group: Any,
        fits: bool,
    ) -> None:
        self._root, self._group = root, group
        self._whole = [root.get_parameter(name) for name in whole]
        self._write_back = WriteBack(root, units, written)
        by_hand = fits and not root.automatic_optimization
        self._manual = Manual(root, units, self._write_back) if by_hand else None
        self._uneven = Uneven(root, unsteady, group) if fits and unsteady else None
        self._steps: dict[str, _Step] = {}
        for name in _STEPS:
            there = _within(vars(root).get(name))
            if there is not None or (is_overridden(name, root) and name not in vars(root)):
                self._steps[name] = self._stand(name, there or _Step(root, name))

    def _stand(self, name: str, step: _Step) -> _Step:
        """Let a step run with all that shards need, below what others put around it since."""
        root, above = self._root, vars(self._root).pop(name, step)
        # Ours is within: what the step wrote is kept before FSDP2 lets go of the copies.
        vars(root)[name] = self._keeping_writes(step.plain)
        register_fsdp_forward_method(root, name)
        step.run = vars(root)[name]
        if name != "training_step":
            step.run = self._letting_go(step.run)
        vars(root)[name] = above
        return step

    def _keeping_writes(self, step: Any) -> Any:
        @wraps(step)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._write_back.begin()
            result = step(*args, **kwargs)
            self._write_back.commit()
            return result

        return run

    def _letting_go(self, step: Any) -> Any:
        """Leave shards after a step of evaluation, as backward does: averages swap weights before its loop ends."""

        @wraps(step)
        def run(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            self._write_back.let_go()
            return result

        return run

    @property
    def toggles(self) -> bool:
        """Whether toggles of manual optimization are looked after."""
        return self._manual is not None and self._manual.stands

    def begin(self) -> None:
        """Look after toggles too, from the start of training.

        Raises:
            Unsupported: A weight has a hook on its gradient, which no shard would call.
        """
        refuse_hooks(dict(self._root.named_parameters()))
        if self._manual is not None:
            self._manual.begin()

    def before_backward(self, loss: Tensor) -> Tensor:
        """Return the loss to go back from."""
        self._write_back.commit()  # what hooks wrote between step and backward
        if self._uneven is not None:
            loss = self._uneven.before_backward(loss)
        return loss if self._manual is None else self._manual.before_backward(loss)

    def after_backward(self, *, sends: bool) -> None:
        """Do for whole weights, and for those that some processes did not use, what shards do by themselves.

        Args:
            sends: Whether gradients were summed over processes in this backward.
        """
        average_gradients(self._whole, self._group)
        if self._uneven is not None and sends:
            self._uneven.after_backward()

    def refresh(self) -> None:
        """Begin a step, or a loop of steps, from the shards as they are."""
        self._write_back.refresh()

    def before_step(self, *, closes: bool) -> None:
        """Get ready for an optimizer step; `closes` where it runs backward itself."""
        self._write_back.commit()
        if self._manual is not None:
            self._manual.before_step(closes=closes)

    def after_step(self) -> None:
        """Let go of copies from before the step; in manual optimization gather what it has changed."""
        self._write_back.let_go()
        if self._manual is not None:
            self._manual.after_step()

    def leave(self) -> None:
        """Keep what was written, and give the module its own methods back."""
        self._write_back.let_go()
        for name, step in self._steps.items():
            step.run = step.plain
            if vars(self._root).get(name) is step:
                del vars(self._root)[name]
        self._steps.clear()
        if self._manual is not None:
            self._manual.end()


class _Step:
    """A step of the module in the place of its method; it stays, plain, where others stand around it at the end."""

    def __init__(self, root: LightningModule, name: str) -> None:
        self.plain = self.run = self.__wrapped__ = getattr(
            root, name
        )  # Lightning reads its signature
        self._root, self._name = root, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.plain, memo)  # the method of the copy

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._root, self._name)


def _within(step: Any) -> _Step | None:
    """Return ours below what others put around it."""
    while step is not None and not isinstance(step, _Step):
        step = getattr(step, "__wrapped__", None)
    return step
