"""Who the student is, seen in the user's own first step: which network is called from outside of any other.

Nothing is run for it. The call of each trainable module is intercepted where `torch.compile` puts its own code
into a module's call, before any hook and any compiled code; so taps that are put on a network as its call begins
already see that call. Within the call everything is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric

from lightning_accel.surgery.compiled import runs_compiled

_CALL = "_compiled_call_impl"
_NONE = object()


class OutermostCalls:
    """Stands around each outermost call of some modules, as a context.

    Args:
        modules: By name.
        around: Gets the name of a module that is called, and returns the context of that call.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        around: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._modules, self._around = dict(modules), around
        self._own: dict[str, Any] = {}

    def __enter__(self) -> OutermostCalls:
        for name, module in self._modules.items():  # compiled anew between two calls, perhaps
            self._own[name] = vars(module).get(_CALL, _NONE)
            vars(module)[_CALL] = self._instead(name, module)
        return self

    def __exit__(self, *_: object) -> None:
        for name, module in self._modules.items():
            own = self._own.pop(name, _NONE)
            vars(module).pop(_CALL, None)
            if own is not _NONE:
                vars(module)[_CALL] = own

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Let everything be as it was meanwhile."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def _instead(self, name: str, module: nn.Module) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.aside(), self._around(name):
                return module(*args, **kwargs)

        return call


class StudentWatcher(OutermostCalls):
    """Tells of each outermost call of a trainable module inside a model, before it begins.

    Calls under `no_grad` teach nothing and are passed over.

    Args:
        model: What is watched, as a context.
        begins: Gets the name of the module; "" is the model itself.

    >>> net, seen = nn.Sequential(nn.Sequential(nn.Linear(1, 1)), nn.ReLU()), []
    >>> with StudentWatcher(net, seen.append):
    ...     out = net[1](net[0](torch.ones(1)))
    >>> seen
    ['0']
    """

    def __init__(self, model: nn.Module, begins: Callable[[str], None]) -> None:
        def around(name: str) -> AbstractContextManager[None]:
            if torch.is_grad_enabled():
                begins(name)
            return nullcontext()

        trainable = {
            name: module
            for name, module in model.named_modules()
            if not isinstance(module, Metric) and any(p.requires_grad for p in module.parameters())
        }
        super().__init__(trainable, around)


def around_compiled(
    model: nn.Module, aside: Callable[[], AbstractContextManager[None]]
) -> OutermostCalls:
    """Return what stands around the calls of a model's compiled modules while criteria are listened to.

    A network runs as ever, with nobody listening, as its code would be compiled anew without a listener. A criterion,
    which has nothing to train, runs its own code this once.

    Args:
        model: The user's.
        aside: Makes the context in which nobody listens.
    """
    compiled = {name: module for name, module in model.named_modules() if runs_compiled(module)}
    networks = {n for n, m in compiled.items() if any(p.requires_grad for p in m.parameters())}

    def around(name: str) -> AbstractContextManager[None]:
        return aside() if name in networks else torch.compiler.set_stance("force_eager")

    return OutermostCalls(compiled, around)
