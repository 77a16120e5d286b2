"""Where what a forward reads is kept: the dicts and lists behind a module, each with a copy of what it held.

Attributes of all modules inside, what those hold (a config, a list, a dict), hooks, the modules themselves; class
attributes and module-level names where the `forward` itself names them.
"""

from __future__ import annotations

import dis
import random
from collections import deque
from collections.abc import Iterable, Iterator
from functools import lru_cache
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_DEPTH = 4
_CALLS = 3
"""How deep objects are looked into, and functions that name functions."""
MOST = 4096
"""Objects that are looked into, and entries of a container that are."""
_CONTAINERS = (dict, list, set, deque)
GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
_LIBRARIES = (
    *("torch.", "torchmetrics.", "lightning.", "lightning_accel.", "numpy", "builtins", "typing"),
    "collections",
)
_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType)
EVERYWHERE = (
    ("hooks of all modules", nn.modules.module._global_forward_hooks),
    ("hooks of all modules", nn.modules.module._global_forward_pre_hooks),
)
OURS = ("_compiled_call_impl", "_trainer", "_fabric", "_accel_own")
_OF_THE_FIT = {
    *(
        "_trainer",
        "_fabric",
        "_current_fx_name",
        "_metric_attributes",
        "_param_requires_grad_state",
    ),
    *("_fabric_optimizers", "_compiler_ctx", "_parameters", "_buffers", "_modules"),
}
IDLE = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_non_persistent_buffers_set",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""Parts of a module that its forward does not read."""


def differing(live: Any, copied: Any) -> list[Any]:
    """Return the keys whose values differ, of containers without keys nothing but that they do."""
    if not hasattr(live, "items"):
        return [] if equal(live, copied) else [""]
    now = dict(live.items())
    return [
        key
        for key in dict.fromkeys([*copied, *now])
        if key not in now
        or key not in copied
        or not (now[key] is copied[key] or equal(now[key], copied[key]))
    ]


def equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except (RuntimeError, ValueError, TypeError):  # a tensor or an array was replaced
        return False


def behind(live: Any) -> Iterable[Any]:
    """Return the values in what was yielded by `held`."""
    return list(dict(live.items()).values() if hasattr(live, "items") else live)


def put_back(live: Any, copied: Any) -> None:
    """Let what was yielded by `held` hold again what it held when it was copied."""
    if isinstance(live, list):
        live[:] = copied
    elif isinstance(live, (set, deque)):
        live.clear()
        live.update(copied) if isinstance(live, set) else live.extend(copied)
    elif isinstance(live, dict):
        _put_entries(live, copied)
    else:
        live.put_back(copied)


def _put_entries(live: dict[Any, Any], copied: dict[Any, Any]) -> None:
    # Never empty, not for a moment: this may be the attributes of a module.
    for key in [key for key in live if key not in copied]:
        del live[key]
    live.update(copied)
    if list(live) != list(copied):  # hooks run in their order
        for key in copied:
            live[key] = live.pop(key)


class _Named:
    """The module-level names that the forward of a class reads, and the attributes of that class.

    Of its other methods, and of functions that these name, only data: a list of what was seen, a count.
    """

    def __init__(self, kind: type) -> None:
        self.kind = kind
        forward = getattr(kind, "forward", None)
        self.places = [(g, n) for g, n in _names(forward) if n in g]
        functions = [f for f in vars(kind).values() if isinstance(f, FunctionType)]
        known = {(id(g), n) for g, n in self.places}
        for _ in range(_CALLS):
            found = [(g, n) for f in functions for g, n in _names(f) if n in g]
            found = list({(id(g), n): (g, n) for g, n in found if (id(g), n) not in known}.values())
            known |= {(id(g), n) for g, n in found}
            self.places += [(g, n) for g, n in found if _is_data(g[n])]
            named = [g[n] for g, n in [*found, *self.places]]
            functions = [f for f in named if isinstance(f, FunctionType) and _is_users(f)]

        # By file and name: a class attribute and several files may each have one of the same name.
        self.globals = {f"{g.get('__name__')}.{n}": (g, n) for g, n in self.places}

    def items(self) -> Any:
        found = [(key, g[n]) for key, (g, n) in self.globals.items() if n in g]
        return [*found, *vars(self.kind).items()]

    def copy(self) -> dict[str, Any]:
        return dict(self.items())

    def put_back(self, copied: dict[str, Any]) -> None:
        for key in differing(self, copied):
            if key in self.globals:
                names, name = self.globals[key]
                names[name] = copied[key]
            elif key in copied:
                setattr(self.kind, key, copied[key])
            else:
                delattr(self.kind, key)

    def __eq__(self, other: object) -> bool:
        return self.copy() == other

    __hash__ = None  # type: ignore[assignment]


def _names(function: Any) -> list[tuple[dict[str, Any], str]]:
    """Return where the module-level names are that a function reads or writes."""
    code = getattr(function, "__code__", None)
    return [(function.__globals__, n) for n in _globals_of(code)] if code is not None else []


@lru_cache(maxsize=4096)
def _globals_of(code: CodeType) -> tuple[str, ...]:
    """Return the names of a function that are not attributes of something."""
    found = [i.argval for i in dis.get_instructions(code) if i.opname.endswith("_GLOBAL")]
    return tuple(dict.fromkeys(found))


def _is_users(value: Any) -> bool:
    return not str(value.__module__).startswith(_LIBRARIES)


def _is_data(value: Any) -> bool:
    return not (isinstance(value, (type, ModuleType, nn.Module)) or callable(value))


class _Slots:
    """The attributes of an object that has slots for them."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def items(self) -> Any:
        return [(n, getattr(self.value, n)) for n in _slots(self.value) if hasattr(self.value, n)]

    def copy(self) -> dict[str, Any]:
        return dict(self.items())

    def put_back(self, copied: dict[str, Any]) -> None:
        for key in differing(self, copied):
            if key in copied:
                object.__setattr__(self.value, key, copied[key])
            else:
                object.__delattr__(self.value, key)

    def __eq__(self, other: object) -> bool:
        return self.copy() == other

    __hash__ = None  # type: ignore[assignment]


class _Public:
    """The attributes of a LightningModule without those that a Trainer sets from hook to hook."""

    def __init__(self, held: dict[str, Any]) -> None:
        self.held = held

    def items(self) -> Any:
        return [(k, v) for k, v in self.held.items() if k not in _OF_THE_FIT]

    def copy(self) -> dict[str, Any]:
        return dict(self.items())

    def put_back(self, copied: dict[str, Any]) -> None:
        for key in differing(self, copied):
            if key in copied:
                self.held[key] = copied[key]
            else:
                del self.held[key]

    def __eq__(self, other: object) -> bool:
        return self.copy() == other

    __hash__ = None  # type: ignore[assignment]


def held(module: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, what can change, and a copy of it one level deep: attributes, containers, hooks."""
    kinds = dict.fromkeys(kind for one in module.modules() for kind in type(one).__mro__)
    users = [(k.__name__, k) for k in kinds if not k.__module__.startswith(_LIBRARIES)]
    yield from held_by([*module.named_modules(), *users, *EVERYWHERE])


def held_by(level: list[tuple[str, Any]]) -> Iterator[tuple[str, Any, Any]]:
    """Yield the same of any objects, given with their names."""
    seen: set[int] = set()
    for _ in range(_DEPTH):
        following: list[tuple[str, Any]] = []
        for name, value in level:
            if id(value) in seen or len(seen) > MOST:
                continue
            seen.add(id(value))
            if isinstance(value, tuple):  # it holds what it held, but that may change
                following += [
                    (f"{name}.{i}".strip("."), v) for i, v in enumerate(value) if leads_on(v)
                ]
                continue
            for where, live in _changeable(name, value):
                yield where, live, live.copy()
                inside = live.items() if hasattr(live, "items") else enumerate(live)
                following += [
                    (f"{where}.{key}".strip("."), v)
                    for key, v in inside
                    if leads_on(v) and key not in IDLE and key not in OURS
                ]
        level = following


def _changeable(name: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, _CONTAINERS):
        return [(name, value)]
    if isinstance(value, type):
        return [(name, _Named(value))]
    found: list[tuple[str, Any]] = [(name, _Slots(value))] if _slots(value) else []
    own = getattr(value, "__dict__", None)
    if isinstance(own, dict):
        is_fit = "_trainer" in own and "_hparams_name" in own
        found.append((name, _Public(own) if is_fit else own))
    return found


def leads_on(value: Any) -> bool:
    """Tell whether something behind a value can change that a forward reads."""
    if isinstance(value, (str, float, int, type(None), Tensor)):
        return False
    if isinstance(value, _CONTAINERS):
        return len(value) <= MOST
    if isinstance(value, tuple):
        return len(value) <= MOST and any(map(leads_on, value))
    if isinstance(value, type):
        return not value.__module__.startswith(_LIBRARIES)
    if isinstance(value, (*GENERATORS, *_FUNCTIONS, ModuleType)):
        return False
    if isinstance(value, nn.Module):
        return True
    if callable(value) and type(value).__module__.startswith((*_LIBRARIES, "functools")):
        return False
    own = hasattr(value, "__dict__") or bool(_slots(value))
    return own and type(value).__name__ != "Trainer"


def _slots(value: Any) -> list[str]:
    if type(value).__module__.startswith(_LIBRARIES):
        return []
    found = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
    names = [n for slots in found for n in ([slots] if isinstance(slots, str) else slots)]
    return [n for n in names if n not in ("__dict__", "__weakref__")]
