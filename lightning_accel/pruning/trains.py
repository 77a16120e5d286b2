"""A smaller network has to run as the dense one does: forward and backward in training, and in the user's steps.

What it computes there is no proof of anything, with noise that hangs on widths; that it runs is one of shapes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_accel.errors import BrokenModel
from lightning_accel.surgery import Cut, twin
from lightning_accel.surgery.call import Call, cast, reals, run, same_random_state

REMEDY = "exclude the module with `select=Select(exclude=...)`"


class Step(Protocol):
    """Something that is done with a network, on a copy of it after a cut; raises what fails."""

    @property
    def name(self) -> str: ...

    @property
    def trains(self) -> bool: ...

    def __call__(self, model: Any, cut: Cut) -> None: ...


class Training:
    """Tries cuts of one network in training.

    Args:
        model: The network; only copies of it are run.
        calls: Example calls, small ones.
        steps: What else is done with the network.
        whole: The calls with all samples, by which a network may know what it kept from earlier ones.

    Attributes:
        why_not: Why the network does not train on a call as it is, if no step shows that it does.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: Sequence[Call],
        steps: Sequence[Step] = (),
        whole: Sequence[Call] = (),
    ) -> None:
        self.model = model
        self._states = [
            f"{name}.{key}".lstrip(".")
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, Tensor)
        ]
        self._whole = in_dtype_of(whole, model) if self._states else ()
        self.why_not = ""
        self._trained = in_dtype_of(calls, model)
        self._steps = list(steps)
        self._broken: list[Step] = []

    def check(self, cut: Cut) -> None:
        """Raise `BrokenModel` unless forward and backward run in train mode, where they did before."""
        try:
            _backward(self._small(cut), self._trained)
        except BrokenModel:
            whys = [_why_untrained(twin(self.model), [call]) for call in self._trained]
            if not any(whys):
                raise
            self.why_not = next(filter(None, whys))
            pairs = zip(self._trained, whys, strict=True)
            self._trained = tuple(call for call, why in pairs if not why)
            _backward(self._small(cut), self._trained)
        self._check_states(cut)
        for step in self._broken:
            try:
                step(self.model, cut)
            except Exception as error:  # whatever a user's step may raise
                cause = error.__cause__ or error
                raise BrokenModel(
                    f"`{step.name}` fails with the smaller network",
                    f"{type(cause).__name__}: {cause}",
                    REMEDY,
                ) from error

    def _check_states(self, cut: Cut) -> None:
        """Raise `BrokenModel` where tensors that modules keep from call to call do not fit any more."""
        if not self._whole:
            return
        try:
            _evaluate(self._small(cut), self._whole)
        except Exception as error:  # whatever a forward may raise
            if _fails(twin(self.model), self._whole):
                return
            raise BrokenModel(
                "the smaller network fails on the whole example, where modules keep tensors from call to call",
                f"{', '.join(self._states[:4])}: {type(error).__name__}: {error}",
                "reset these before the prune",
            ) from error

    def holds_in_steps(self, cut: Cut) -> bool:
        """Whether all steps still run; if not, those that failed count in `check` from now on.

        A step that fails on the network as it is shows nothing, and is left out.
        """
        for step in list(self._steps):
            try:
                step(self.model, cut)
                if step.trains:
                    self.why_not = ""
            except Exception:  # whatever a user's step may raise
                self._steps.remove(step)
                try:
                    step(self.model, Cut())
                except Exception:
                    continue
                self._broken.append(step)
                return False
        return True

    def _small(self, cut: Cut) -> nn.Module:
        small = twin(self.model)
        cut.apply(small)
        return small


def _evaluate(model: nn.Module, calls: Sequence[Call]) -> None:
    model.eval()
    with torch.no_grad(), same_random_state(model):
        run(model, calls)


def _fails(model: nn.Module, calls: Sequence[Call]) -> bool:
    try:
        _evaluate(model, calls)
    except Exception:  # whatever a forward may raise
        return True
    return False


@contextmanager
def located(model: nn.Module) -> Iterator[None]:
    """Let an error say in which module it happened."""
    stack: list[str] = []

    def leave(*_: Any) -> None:
        stack.pop()

    handles = []
    for name, module in model.named_modules():
        push = partial(_push, stack, name)
        handles.append(module.register_forward_pre_hook(push, prepend=True))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    except Exception as error:
        raise BrokenModel(
            f"the cut network fails in `{stack[-1] if stack else ''}`",
            f"{type(error).__name__}: {error}",
            REMEDY,
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _push(stack: list[str], name: str, *_: Any) -> None:
    stack.append(name)


def _why_untrained(model: nn.Module, calls: Sequence[Call]) -> str:
    """Return why the network does not train on these calls as it is; empty if it does."""
    try:
        _backward(model, calls)
    except BrokenModel as error:
        return str(error.__cause__ or error)
    return ""


def _backward(model: nn.Module, calls: Sequence[Call]) -> None:
    model.train()
    with torch.enable_grad(), same_random_state(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with located(model):
            outputs = [t for t in reals(run(model, calls)) if t.requires_grad]
        total = sum(t.float().mean() for t in outputs)
        if isinstance(total, Tensor):
            try:
                total.backward()
            except RuntimeError as error:
                raise BrokenModel("the cut network has no backward", str(error), REMEDY) from error


def in_dtype_of(calls: Sequence[Call], model: nn.Module) -> tuple[Call, ...]:
    """Convert floating point arguments to the dtype of the model's parameters."""
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    return cast(calls, dtypes[0]) if dtypes else tuple(calls)
