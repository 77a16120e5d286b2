"""Who holds given objects, wherever: asked of the garbage collector, since no attribute leads there.

An optimizer in a closure, or one held by an object with slots, is out of reach of any search from above; but
Python knows all who refer to an object. From one that was seen to step the way leads up through containers
and closures to the first instance or function, and on from there while it is one that steps itself
(Lookahead around SAM around SGD). Each hop looks at all objects of the process, some 50 ms: for a prune, not
for a step.
"""

from __future__ import annotations

import functools
import gc
import types
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

_HOPS = 24  # a dict, a list and a cell may lie between two objects
_CONTAINERS = (dict, list, tuple, set, types.CellType)
_NOBODY = (
    Tensor,
    nn.Module,
    type,
    types.ModuleType,
    types.BuiltinFunctionType,
    types.GeneratorType,
)
_ELSEWHERE = ("lightning.", "pytorch_lightning.", "lightning_fabric.", "lightning_accel.", "torch.")
"""Whose objects hold optimizers by design, and keep nothing beside them."""
_LOOKED_AT = {"Trainer", "Callback", "Strategy", "DataLoader"}
"""Bases of what is searched by its attributes."""
_MOST = 10_000  # entries of one container: more is data
IN_ORDER = (list, tuple, deque, nn.ParameterList)
_SEQUENCES = (*IN_ORDER, set, frozenset)
_PLAIN = (str, bytes, int, float, complex, type(None), type, types.ModuleType, nn.Module, Optimizer)
ATOMS = frozenset({str, bytes, bool, int, float, complex, type(None)})
"""Kinds of most attributes; they hold nothing."""
_APART = {"Trainer", "Strategy", "DataLoader", "Dataset", "LightningDataModule", "Logger"}
"""Bases of what leads away, to data or to the whole fit."""
_OF_OTHERS = {
    *("_parameters", "_buffers", "_modules", "_trainer", "_fabric", "trainer", "_strategy"),
    *("state", "param_groups", "_dtype"),  # state follows by `follow`
    "_accel_dropped",
}


def owners(held: Iterable[Any]) -> list[Any]:
    """Return the instances and functions that hold any of these, and what steps around them.

    >>> import torch
    >>> def make():
    ...     weight = nn.Parameter(torch.ones(1))
    ...     slow = [weight.detach().clone()]
    ...     return weight, lambda: slow[0].lerp_(weight, 0.5)
    >>> weight, sync = make()
    >>> list(attributes(owners([weight])[0]))
    ['slow', 'weight']
    """
    found: list[Any] = []
    level: list[Any] = list(held)
    seen = {id(one): one for one in level}
    if not level:
        return found
    frozen = gc.get_freeze_count()  # as before workers fork: out of sight of `get_referrers`
    if frozen:
        gc.unfreeze()
    for _ in range(_HOPS):
        referrers = gc.get_referrers(*level)
        ours = {id(level), id(found), id(seen), id(held)}
        fresh = [r for r in referrers if id(r) not in seen and id(r) not in ours and _may_own(r)]
        del referrers
        seen |= {id(one): one for one in fresh}
        found += [one for one in fresh if not isinstance(one, _CONTAINERS)]
        level = [
            one
            for one in fresh
            if isinstance(one, (*_CONTAINERS, types.FunctionType))
            or callable(getattr(one, "step", None))
        ]
        del fresh  # or it is found to hold what it holds
        if not level:
            break
    if frozen:
        gc.freeze()
    return found


def attributes(one: Any) -> dict[str, Any]:
    """Return by name what an object has, what a function closes over, or what a partial was given."""
    if isinstance(one, types.MethodType):
        return attributes(one.__func__)
    if isinstance(one, functools.partial):
        return {f"{n}": v for n, v in enumerate(one.args)} | {"func": one.func} | one.keywords
    if isinstance(one, types.FunctionType):
        cells = zip(one.__code__.co_freevars, one.__closure__ or (), strict=True)
        return {name: content for name, cell in cells for content in contents(cell)}
    held = dict(vars(one)) if hasattr(one, "__dict__") else {}
    slots = [s for base in type(one).__mro__ for s in getattr(base, "__slots__", ())]
    return held | {s: getattr(one, s) for s in slots if isinstance(s, str) and hasattr(one, s)}


def children(value: Any) -> list[tuple[Any, str, Any]]:
    """Return what a container, an object or a closure holds: its key, where that is, and what it is.

    >>> children({"a": 1}), children((2,))
    ([('a', "['a']", 1)], [(0, '[0]', 2)])
    """
    if type(value) in ATOMS:
        return []
    if isinstance(value, nn.ParameterDict):
        value = dict(value.items())
    if isinstance(value, (Mapping, *_SEQUENCES)):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        return [(k, f"[{_label(k)}]", v) for k, v in islice(pairs, _MOST)]
    lineage = {base.__name__ for base in type(value).__mro__}
    plain = isinstance(value, (Tensor, *_PLAIN)) or bool(lineage & _APART)
    if plain or f"{type(value).__module__}.".startswith(
        (*_ELSEWHERE, "numpy.", "pandas.", "wandb.")
    ):
        return []
    return [(k, f".{k}", v) for k, v in kept_by(value).items()]


def holds_nothing(value: Any) -> bool:
    """Whether this is a number, a text, or an empty or short row of such: so are most attributes of modules.

    >>> holds_nothing((3, 3)), holds_nothing({}), holds_nothing([object()])
    (True, True, False)
    """
    kind = type(value)
    if kind in ATOMS:
        return True
    if kind in (tuple, list, set):
        return len(value) < 8 and all(type(one) in ATOMS for one in value)
    return kind in (dict, OrderedDict) and not value


def kept_by(one: Any) -> dict[str, Any]:
    """Return by name what an object keeps that is not the work of Lightning, of modules or of optimizers."""
    return {k: v for k, v in attributes(one).items() if k not in _OF_OTHERS}


def _label(key: Any) -> str:
    return repr(key) if isinstance(key, (str, int)) else type(key).__name__


def contents(cell: types.CellType) -> list[Any]:
    """Return what a cell of a closure holds, if anything yet."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


def _may_own(one: Any) -> bool:
    if isinstance(one, dict):
        return "__builtins__" not in one and "__loader__" not in one  # the names of a whole file
    if isinstance(one, (*_CONTAINERS, types.FunctionType)):
        return True
    if isinstance(one, (*_NOBODY, types.FrameType)):
        return False
    lineage = {base.__name__ for base in type(one).__mro__}
    return not (lineage & _LOOKED_AT or f"{type(one).__module__}.".startswith(_ELSEWHERE))
