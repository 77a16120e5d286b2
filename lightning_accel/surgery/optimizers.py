"""Which optimizers really step: those inside others, those a module holds, those seen at work.

SAM, Lookahead and many wrappers hold another optimizer that does the work, under a name of their own; the
state and the groups of the two may be one object or two. What a technique does to "the optimizer" it must do
to all of them. `within` finds them by looking; `Steps` by seeing them step, wherever they are hidden, since
torch calls its global hooks around the step of every optimizer of the process.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from lightning_accel.surgery.owners import attributes, contents

_DEPTH = 8  # wrappers of wrappers, each in a list of a dict
_PLAIN = (str, bytes, int, float, complex, type(None), type, types.ModuleType, Tensor, nn.Module)
_OWN = ("param_groups", "state", "defaults", "_strategy", "_trainer", "_fabric")
"""What an object says of itself, or leads out of it."""


def within(*roots: Any) -> list[Any]:
    """Return each optimizer once: the roots' own first, then what they hold, at any depth.

    A root is an optimizer, a wrapper with or without `torch.optim.Optimizer` as its base, a container of
    such, a function with them in its closure, or a module that keeps optimizers as attributes. What
    Lightning puts around an optimizer is no optimizer of its own.

    >>> import torch
    >>> from torch.optim import SGD
    >>> class Wrapper:
    ...     def __init__(self, inner):
    ...         self.engines = {"fast": [inner]}
    >>> sgd = SGD([nn.Parameter(torch.ones(1))])
    >>> within(Wrapper(sgd)) == [sgd]
    True
    """
    found: list[Any] = []
    seen: dict[int, Any] = {}  # keeps what it names alive, so that no id comes twice
    level: list[Any] = list(roots)
    for depth in range(_DEPTH):
        following: list[Any] = []
        for one in level:
            if id(one) in seen or (isinstance(one, _PLAIN) and not _holds(one, depth)):
                continue
            seen[id(one)] = one
            inner = bare(one)
            if inner is not one:
                following.append(inner)
                continue
            if is_optimizer(one):
                found.append(one)
            following += _parts(one)
        level = following
    return found


def is_optimizer(one: Any) -> bool:
    """Tell whether it has groups of parameters, a state of each, and a step."""
    if isinstance(one, type):
        return False
    held = vars(one) if hasattr(one, "__dict__") else {}
    if isinstance(one, Optimizer):
        return "param_groups" in held or hasattr(type(one), "param_groups")
    return callable(getattr(one, "step", None)) and "param_groups" in held and "state" in held


def parameters_of(optimizer: Any) -> Iterator[nn.Parameter]:
    """Yield what an optimizer holds."""
    for group in optimizer.param_groups:
        yield from group["params"]


class Steps:
    """Calls `after(optimizer)` whenever one steps that holds any of the parameters, and remembers which.

    Args:
        parameters: Returns the parameters of interest, as they are now.
        after: What to do after such a step.

    >>> from torch.optim import SGD
    >>> layer = nn.Linear(1, 1)
    >>> steps = Steps(layer.parameters)
    >>> sgd = SGD(layer.parameters())
    >>> sgd.step()
    >>> steps.seen() == [sgd]
    True
    >>> steps.stop()
    """

    def __init__(
        self,
        parameters: Callable[[], Iterable[nn.Parameter]],
        after: Callable[[Any], object] | None = None,
    ) -> None:
        self._parameters = parameters
        self._after = after
        self._seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._handle: RemovableHandle = register_optimizer_step_post_hook(self._stepped)

    def __deepcopy__(self, memo: dict[int, Any]) -> Steps:
        return self  # a copy of who holds this watches nothing of its own

    def seen(self) -> list[Any]:
        """Return those that stepped and still exist."""
        return list(self._seen)

    def stop(self) -> None:
        self._handle.remove()

    def _stepped(self, optimizer: Optimizer, *_: Any) -> None:
        if optimizer not in self._seen:
            mine = {id(p) for p in self._parameters()}
            if not any(id(p) in mine for p in parameters_of(optimizer)):
                return
            if bare(optimizer) is optimizer:
                self._seen.add(optimizer)
        if self._after is not None:
            self._after(optimizer)


def bare(one: Any) -> Any:
    """Return what is inside of Lightning's wrapper, which shares everything with it."""
    if any(base.__name__ == "LightningOptimizer" for base in type(one).__mro__):
        return one._optimizer
    return one


def _holds(one: Any, depth: int) -> bool:
    return isinstance(one, nn.Module) and depth == 0


def _parts(one: Any) -> list[Any]:
    """Return what may hold an optimizer; of a module only what looks like one."""
    if isinstance(one, nn.Module):
        values = [v for m in one.modules() for k, v in vars(m).items() if k not in _OWN]
        return [v for v in values if _worth(v)]
    if isinstance(one, Mapping):
        return list(one.values())
    if isinstance(one, (list, tuple, set, frozenset)):
        return list(one)
    if isinstance(one, types.MethodType):
        return [one.__self__] if _worth(one.__self__) else []
    if isinstance(one, functools.partial):
        return [one.func, *one.args, *one.keywords.values()]
    if isinstance(one, types.FunctionType):
        return [v for cell in one.__closure__ or () for v in contents(cell) if _in_closure(v)]
    if isinstance(one, weakref.ReferenceType):
        return []
    # Hooks belong to others, us included.
    held = {k: v for k, v in attributes(one).items() if k not in _OWN}
    return [v for k, v in held.items() if not k.endswith("_hooks") and _leads_on(v)]


def _worth(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_worth(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return any(_worth(v) for v in value)
    if isinstance(value, (*_PLAIN, types.FunctionType, types.MethodType)):
        return False
    return callable(getattr(type(value), "step", None)) or is_optimizer(value)


def _leads_on(value: Any) -> bool:
    names = {base.__name__ for base in type(value).__mro__}
    return not names & {"Trainer", "Callback", "Strategy", "DataLoader"}


def _in_closure(held: Any) -> bool:
    containers = (Mapping, list, tuple, functools.partial, types.FunctionType)
    return isinstance(held, containers) or _worth(held)
