"""Where what a forward reads is kept: the dicts and lists behind a module, each with a copy of what it held.

Attributes of all modules inside, what those hold (a config, a list, a dict), hooks, the modules themselves; class
attributes and module-level names where the `forward` itself names them, and what functions read that are held anywhere.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from inspect import getattr_static
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_accel.surgery.named import LIBRARIES, Named, View, code_of

_DEPTH = 4
"""How deep objects are looked into."""
MOST = 4096
"""Objects that are looked into, and entries of a container that are."""
_CONTAINERS = (dict, list, set, deque)
GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType)
EVERYWHERE = (
    ("hooks of all modules", nn.modules.module._global_forward_hooks),
    ("hooks of all modules", nn.modules.module._global_forward_pre_hooks),
)
OURS = ("_compiled_call_impl", "_trainer", "_fabric", "_accel_own", "husk")
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


class _Slots(View):
    """The attributes of an object that has slots for them."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def items(self) -> Any:
        return [(n, getattr(self.value, n)) for n in _slots(self.value) if hasattr(self.value, n)]

    def put(self, key: str, value: Any) -> None:
        object.__setattr__(self.value, key, value)

    def drop(self, key: str) -> None:
        object.__delattr__(self.value, key)


class _Public(View):
    """The attributes of a LightningModule without those that a Trainer sets from hook to hook."""

    def __init__(self, held: dict[str, Any]) -> None:
        self.held = held

    def items(self) -> Any:
        return [(k, v) for k, v in self.held.items() if k not in _OF_THE_FIT]

    def put(self, key: str, value: Any) -> None:
        self.held[key] = value

    def drop(self, key: str) -> None:
        del self.held[key]


def held(module: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, what can change, and a copy of it one level deep: attributes, containers, hooks."""
    kinds = dict.fromkeys(kind for one in module.modules() for kind in type(one).__mro__)
    users = [(k.__name__, k) for k in kinds if not k.__module__.startswith(LIBRARIES)]
    forwards = [(f"{n}.forward", vars(k)["forward"]) for n, k in users if _closes_over(k)]
    yield from held_by([*module.named_modules(), *users, *forwards, *EVERYWHERE])


def held_by(level: list[tuple[str, Any]]) -> Iterator[tuple[str, Any, Any]]:
    """Yield the same of any objects, given with their names."""
    seen: set[int] = set()
    for _ in range(_DEPTH):
        following: list[tuple[str, Any]] = []
        for name, value in level:
            if id(value) in seen or len(seen) > MOST:
                continue
            seen.add(id(value))
            if isinstance(value, (tuple, partial)):  # it holds what it held, but that may change
                parts = (
                    value if isinstance(value, tuple) else (value.func, value.args, value.keywords)
                )
                following += [
                    (f"{name}.{i}".strip("."), v) for i, v in enumerate(parts) if leads_on(v)
                ]
                continue
            if _is_called(value):
                following.append((f"{name}.__call__", type(value).__call__))
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
        return [(name, Named(value))]
    if isinstance(value, _FUNCTIONS):
        code = code_of(value)
        return [] if code is None else [(name, code)]
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
        return not value.__module__.startswith(LIBRARIES)
    if isinstance(value, _FUNCTIONS):
        return code_of(value) is not None
    if isinstance(value, partial):
        return any(map(leads_on, (value.func, value.args, value.keywords)))
    if isinstance(value, (*GENERATORS, ModuleType, logging.Logger)):
        return False
    if isinstance(value, nn.Module):
        return True
    if callable(value) and type(value).__module__.startswith((*LIBRARIES, "functools")):
        return False
    own = hasattr(value, "__dict__") or bool(_slots(value))
    return own and type(value).__name__ != "Trainer"


def _is_called(value: Any) -> bool:
    """Tell whether a value is an object of the user's that is called like a function."""
    if isinstance(value, (nn.Module, type, *_FUNCTIONS, *_CONTAINERS)):
        return False
    return isinstance(getattr_static(type(value), "__call__", None), FunctionType)


def _closes_over(kind: type) -> bool:
    """Tell whether the `forward` of a class reads more than names of its module."""
    forward: Any = vars(kind).get("forward")
    if not isinstance(forward, FunctionType):
        return False
    free = [name for name in forward.__code__.co_freevars if name != "__class__"]
    return bool(free or forward.__defaults__ or forward.__kwdefaults__)


def _slots(value: Any) -> list[str]:
    if type(value).__module__.startswith(LIBRARIES):
        return []
    found = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
    names = [n for slots in found for n in ([slots] if isinstance(slots, str) else slots)]
    return [n for n in names if n not in ("__dict__", "__weakref__")]
