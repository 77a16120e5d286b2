"""What code reads besides its arguments: module-level names, the attributes of its class, closures and defaults."""

from __future__ import annotations

import dis
from abc import ABC, abstractmethod
from contextlib import suppress
from functools import lru_cache
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

from lightning_accel.surgery.origin import is_installed

_DEFAULTS = ("__defaults__", "__kwdefaults__")
_CALLS = 3
"""How deep functions are looked into that name functions."""
LIBRARIES = (
    *("torch.", "torchmetrics.", "lightning.", "lightning_accel.", "numpy", "builtins", "typing"),
    "collections",
)


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


class View(ABC):
    """Values by name, wherever they are kept: compared with a copy of what they were, and put back."""

    @abstractmethod
    def items(self) -> Any: ...

    @abstractmethod
    def put(self, key: str, value: Any) -> None: ...

    @abstractmethod
    def drop(self, key: str) -> None: ...

    def copy(self) -> dict[str, Any]:
        return dict(self.items())

    def put_back(self, copied: dict[str, Any]) -> None:
        for key in differing(self, copied):
            if key in copied:
                self.put(key, copied[key])
            else:
                self.drop(key)

    def __eq__(self, other: object) -> bool:
        return self.copy() == other

    __hash__ = None  # type: ignore[assignment]


class Named(View):
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

    def put(self, key: str, value: Any) -> None:
        if key in self.globals:
            names, name = self.globals[key]
            names[name] = value
        else:
            setattr(self.kind, key, value)

    def drop(self, key: str) -> None:
        if key in self.globals:
            names, name = self.globals[key]
            del names[name]
        else:
            delattr(self.kind, key)


class FunctionReads(View):
    """What a function of the user's reads that is held somewhere, and is not the `forward` of a class.

    Args:
        function: The function.
        owner: The object whose attributes it reads as `self`, for a bound method.
    """

    def __init__(self, function: FunctionType, owner: Any = None) -> None:
        self.function = function
        code = function.__code__
        known = getattr(owner, "__dict__", {}) if not isinstance(owner, type) else {}
        own = [(known, n) for n in _attributes_of(code) if n in known]
        places = [(g, n) for g, n in _names(function) if n in g and not _is_fixed(g[n])]
        self.globals = {f"{g.get('__name__')}.{n}": (g, n) for g, n in places}
        self.globals |= {f"{type(owner).__name__}.{n}": (d, n) for d, n in own}
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        self.cells = {n: cell for n, cell in cells if n != "__class__"}

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.globals or self.cells or any(self._defaults()))

    def _defaults(self) -> tuple[Any, Any]:
        return self.function.__defaults__, self.function.__kwdefaults__

    def items(self) -> Any:
        found = [(key, g[n]) for key, (g, n) in self.globals.items() if n in g]
        for name, cell in self.cells.items():
            with suppress(ValueError):  # its function has not bound it yet
                found.append((name, cell.cell_contents))
        return [*found, *zip(_DEFAULTS, self._defaults(), strict=True)]

    def put(self, key: str, value: Any) -> None:
        if key in self.globals:
            names, name = self.globals[key]
            names[name] = value
        elif key in self.cells:
            self.cells[key].cell_contents = value
        else:
            setattr(self.function, key, value)

    def drop(self, key: str) -> None:
        if key in self.globals:
            names, name = self.globals[key]
            del names[name]
        else:
            del self.cells[key].cell_contents


def code_of(value: Any) -> FunctionReads | None:
    """Return what a function or a bound method of the user's reads; `None` for all else, and for one that reads nothing."""
    function = _users(value)
    return (
        None
        if function is None
        else FunctionReads(function, getattr(value, "__self__", None)) or None
    )


def _users(value: Any) -> FunctionType | None:
    """Return the function of the user's that a value is, below decorators of torch's and of ours."""
    value = getattr(value, "__func__", value)
    for _ in range(_CALLS):
        if not isinstance(value, FunctionType):
            return None
        # Not its `__module__`, which `functools.wraps` takes from what is wrapped.
        ours = str(value.__globals__.get("__name__")).startswith(LIBRARIES)
        if not ours and not is_installed(value):
            return value
        value = getattr(value, "__wrapped__", None)
    return None


def _names(function: Any) -> list[tuple[dict[str, Any], str]]:
    """Return where the names are that a function reads of its module, and of modules of the user's."""
    function = _users(function) or function
    code = getattr(function, "__code__", None)
    if code is None:
        return []
    found = [(function.__globals__, n) for n in _globals_of(code)]
    for names, name in list(found):
        module = names.get(name)
        if isinstance(module, ModuleType) and not is_installed(module):
            held = vars(module)
            found += [(held, n) for n in _attributes_of(code) if n in held]
    return found


@lru_cache(maxsize=4096)
def _globals_of(code: CodeType) -> tuple[str, ...]:
    """Return the names of a function that are not attributes of something; of functions within it as well."""
    found = [i.argval for i in dis.get_instructions(code) if i.opname.endswith("_GLOBAL")]
    inner = [n for part in code.co_consts if isinstance(part, CodeType) for n in _globals_of(part)]
    return tuple(dict.fromkeys([*found, *inner]))


@lru_cache(maxsize=4096)
def _attributes_of(code: CodeType) -> tuple[str, ...]:
    """Return all names of a function, among them those of attributes; of functions within it as well."""
    inner = [
        p for part in code.co_consts if isinstance(part, CodeType) for p in _attributes_of(part)
    ]
    return tuple(dict.fromkeys([*code.co_names, *inner]))


def _is_users(value: Any) -> bool:
    return not str(value.__module__).startswith(LIBRARIES)


def _is_fixed(value: Any) -> bool:
    """Tell whether nobody changes what is behind a name: a module, a function in C, an installed class."""
    if isinstance(value, type):
        return is_installed(value)
    return isinstance(value, (ModuleType, BuiltinFunctionType))


def _is_data(value: Any) -> bool:
    return not (isinstance(value, (type, ModuleType, nn.Module)) or callable(value))
