"""The sparse training of torch-pruning's pruners, on gradients that live elsewhere.

Such a pruner adds to gradients through the modules that it has traced. These are those of a twin here, into which
the model's own parameters are put: so it reads the weights of the fit and adds to the gradients of the fit, while
tracing, eval mode and hooks stay the twin's. Numbers that it makes of nothing (0 / 0, where a layer has one channel
or all have one score) are not added.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.errors import Unsupported
from lightning_accel.pruning.foreign import Pruner, make_pruner, release
from lightning_accel.surgery import twin
from lightning_accel.surgery.call import Call


class Regularizer:
    """What a pruner adds to the gradients of `model`.

    Args:
        pruner: The user's function.
        model: The network that is trained; it stays as it is.
        calls: Example calls.

    Attributes:
        acts: Whether the pruner has a regularizer at all.
        steps: How often it was added.
    """

    def __init__(self, pruner: Pruner, model: nn.Module, calls: Sequence[Call]) -> None:
        self._model = model
        self._twin = twin(model, calls)
        self._pruner = make_pruner(pruner, self._twin, calls)
        self.acts = _regularizes(self._pruner)
        self.steps = 0
        if self.acts:
            _require_model_only(self._pruner)
            self._try()
            self._share()
            self._pruner.update_regularizer()

    @torch.no_grad()
    def add(self, held: Iterable[Tensor], *, scale: float = 1.0) -> list[str]:
        """Add to the gradients of the parameters in `held`; return those of which part was no number.

        Args:
            held: The parameters that are about to be stepped; others keep their gradients.
            scale: What their gradients are multiplied with at present.
        """
        self._put()
        named = list(self._model.named_parameters())
        mine, odd = {id(p) for p in held}, []
        others = [(p, p.grad) for _, p in named if id(p) not in mine]
        for parameter, _ in others:
            parameter.grad = None
        stepped = [(n, p.grad) for n, p in named if id(p) in mine and p.grad is not None]
        if scale != 1.0:
            for _, gradient in stepped:
                gradient.div_(scale)
        before = [gradient.clone() for _, gradient in stepped]
        try:
            self._pruner.regularize(self._twin)
        finally:
            for parameter, hidden in others:
                parameter.grad = hidden
        for (name, gradient), old in zip(stepped, before, strict=True):
            finite = gradient.isfinite()
            if self.steps == 0 and bool((~finite & old.isfinite()).any()):
                odd.append(name)
            gradient.copy_(torch.where(finite, gradient, old))
            if scale != 1.0:
                gradient.mul_(scale)
        self.steps += 1
        return odd

    def grow(self) -> None:
        """Raise the strengths of a pruner whose regularization grows, after an epoch."""
        if hasattr(self._pruner, "update_reg"):
            with torch.no_grad():
                self._put()
                self._pruner.update_reg()

    def end(self) -> None:
        """Let go of the copy."""
        release(self._pruner, self._twin)

    def state(self) -> list[Tensor]:
        """Return the strengths by now, group by group; none but for one that grows."""
        strengths = getattr(self._pruner, "group_reg", None)
        return [] if strengths is None else [s.detach().clone() for s in strengths.values()]

    def load(self, state: Sequence[Tensor]) -> None:
        """Take up what `state` gave."""
        strengths = getattr(self._pruner, "group_reg", {})
        if [tuple(s.shape) for s in state] == [tuple(s.shape) for s in strengths.values()]:
            for group, strength in zip(strengths, state, strict=True):
                strengths[group] = strength.clone()

    def _try(self) -> None:
        """Regularize the copy once, so that what fails does so before the fit begins."""
        parameters = list(self._twin.parameters())
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        try:
            self._pruner.update_regularizer()
            with torch.no_grad():
                self._pruner.regularize(self._twin)
        except Exception as error:  # whatever torch-pruning, or a pruner of the user's, may raise
            raise Unsupported(
                "the pruner's sparse training fails on this network",
                f"{type(self._pruner).__name__}.regularize: {type(error).__name__}: {error}",
                "bring a pruner without one, such as `BasePruner`, or leave the layers in question out",
            ) from error
        finally:
            for parameter in parameters:
                parameter.grad = None

    def _share(self) -> None:
        """Put the model's parameters into what was traced, and let go of the trace."""
        names = {id(p): name for name, p in self._twin.named_parameters()}
        theirs = {id(p): p for p in self._twin.parameters()}
        self._put()
        mine = dict(self._model.named_parameters())
        graph = self._pruner.DG
        for node in graph.module2node.values():
            node.grad_fn = None  # which holds all activations of the example
            if id(node.module) in theirs:
                node.module = mine[names[id(node.module)]]
        graph.module2node = {node.module: node for node in graph.module2node.values()}
        graph._param_to_name = {
            mine.get(name, parameter): name for parameter, name in graph._param_to_name.items()
        }

    def _put(self) -> None:
        modules = dict(self._model.named_modules())
        for name, copied in self._twin.named_modules():
            if name in modules:
                copied._parameters.update(modules[name]._parameters)
                copied._buffers.update(modules[name]._buffers)


def _regularizes(made: Any) -> bool:
    """Whether a pruner has a regularizer of its own: the one of its base does nothing, and takes a loss."""
    from torch_pruning.pruner.algorithms.base_pruner import BasePruner

    theirs = getattr(type(made), "regularize", None)
    return theirs is not None and theirs is not BasePruner.regularize


def _require_model_only(made: Any) -> None:
    try:
        inspect.signature(made.regularize).bind(None)
    except TypeError as error:
        raise Unsupported(
            "the regularizer takes more than the model",
            f"{type(made).__name__}.regularize: {error}",
            "let `regularize(model)` do, from weights and gradients; or add the loss in `training_step`",
        ) from None
