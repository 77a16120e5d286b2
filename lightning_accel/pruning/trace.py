"""Run a network once under autograd and let torch-pruning read the graph; say where it fails."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_accel.errors import AccelError
from lightning_accel.surgery.call import Call, run, same_random_state, tensors

ROOTS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear)
"""Layers whose outputs can be pruned."""


def trace(
    model: nn.Module, calls: Sequence[Call], names: dict[nn.Module, str]
) -> tuple[Any, set[nn.Module]]:
    """Build torch-pruning's graph; return it with the layers that make the network's outputs."""
    from torch_pruning import DependencyGraph

    produced: dict[Any, nn.Module] = {}
    outputs: set[nn.Module] = set()

    def forward(traced: nn.Module, _: Any) -> list[Tensor]:
        with _located(traced, names), _GradientWatch() as watch, _recorded(traced, produced):
            usable = [t for t in tensors(run(traced, calls)) if t.grad_fn is not None]
        if not usable:
            raise AccelError(
                "the network cannot be traced: its outputs do not depend on its parameters",
                f"the gradient ends at `{watch.lost_at or 'torch.no_grad'}`",
                "return differentiable outputs, or choose the part before it by `example` and model",
            )
        outputs.update(m for t in usable if (m := produced.get(t.grad_fn)) is not None)
        return usable

    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    dependencies = DependencyGraph()
    with warnings.catch_warnings(), torch.enable_grad(), same_random_state(model):
        warnings.simplefilter("ignore")
        dependencies.build_dependency(model, None, forward_fn=forward, verbose=False)
    return dependencies, outputs


@contextmanager
def _recorded(model: nn.Module, produced: dict[Any, nn.Module]) -> Iterator[None]:
    def note(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            produced[output.grad_fn] = module

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, ROOTS)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _located(model: nn.Module, names: dict[nn.Module, str]) -> Iterator[None]:
    """Name the module in which a forward fails."""
    with where(model, names) as stack:
        try:
            yield
        except AccelError:
            raise
        except Exception as error:
            place = stack[-1] if stack else ""
            raise AccelError(
                "the network cannot be traced: its forward fails on the example",
                f"{type(error).__name__} in `{place or type(model).__name__}`: {error}",
                "pass an `example` that the network accepts",
            ) from error


@contextmanager
def where(model: nn.Module, names: dict[nn.Module, str]) -> Iterator[list[str]]:
    """Give the list of modules now running, innermost last; after an error, where it happened."""
    stack: list[str] = []

    def leave(*_: Any) -> None:
        stack.pop()

    handles = []
    for module, name in names.items():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        handles.append(module.register_forward_hook(leave))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


class _GradientWatch(TorchFunctionMode):
    """Remembers the last operation that took tensors with gradient and gave none."""

    lost_at = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        takes = not name.startswith("__") and _any_gradient((args, kwargs))
        if takes and tensors(result) and not _any_gradient(result):
            self.lost_at = name
        return result


def _any_gradient(values: Any) -> bool:
    return any(t.requires_grad for t in tensors(values))
