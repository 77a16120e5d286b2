"""Where code comes from, and what it names: the user's own counts by its text, an installed package by its version."""

from __future__ import annotations

import functools
import importlib.metadata
import sys
import sysconfig
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from torch import nn

_NO_CODE = ("__init__", "__new__", "__init_subclass__", "__repr__", "__str__", "__del__")
_PYTHON = tuple(f"{Path(sysconfig.get_path(p)).resolve()}/" for p in ("stdlib", "platstdlib"))
_PACKAGES = {"site-packages", "dist-packages"}


def names_in(code: CodeType) -> set[str]:
    """Return all names and texts in a piece of code: a text may be the name that `getattr` reads."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= names_in(constant)
        elif isinstance(constant, str):
            names.add(constant)
    return names


def is_operator(name: str) -> bool:
    """Tell whether code runs a method of this name without naming it.

    >>> is_operator("__mul__"), is_operator("__init__"), is_operator("scale")
    (True, False, False)
    """
    return name.startswith("__") and name.endswith("__") and name not in _NO_CODE


def function_of(member: Any) -> Any:
    """Return the function behind an entry of a class."""
    if isinstance(member, (staticmethod, classmethod)):
        return member.__func__
    if isinstance(member, property):
        return member.fget
    return member.func if isinstance(member, functools.cached_property) else member


def is_installed(value: Any) -> bool:
    """Tell whether something comes from an installed package or from Python, and not from the user."""
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    code = getattr(getattr(value, "__func__", value), "__code__", None)
    if code is not None:
        return _below_installed(code.co_filename)
    return not isinstance(name, str) or _module_is_installed(name)


@functools.lru_cache(maxsize=4096)
def _module_is_installed(name: str) -> bool:
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if file is None:  # built in; or what was typed in
        return name != "__main__" and module is not None
    if not Path(file).is_absolute() and "." in name:
        return _module_is_installed(name.partition(".")[0])  # `torch.ops` gives no place
    return _below_installed(file)


@functools.lru_cache(maxsize=4096)
def _below_installed(file: str) -> bool:
    path = Path(file)
    if file.startswith("<frozen") or _PACKAGES & set(path.parts):
        return True
    return path.is_absolute() and str(path.resolve()).startswith(_PYTHON)


@functools.lru_cache(maxsize=1024)
def version_of(module: str) -> str:
    """Return the version of the package that a module is of; "" of the user's own."""
    if not isinstance(module, str) or not _module_is_installed(module):
        return ""
    top = module.partition(".")[0]
    try:
        return importlib.metadata.version(top)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(top), "__version__", ""))


def is_own(kind: type) -> bool:
    """Tell whether all code that can read an object's attributes is the user's, beside bare modules."""
    bare = (object, nn.Module)
    return all(
        k in bare or not is_installed(k) or k.__module__.partition(".")[0] == "lightning"
        for k in kind.__mro__
    )


def is_a(value: Any, package: str) -> bool:
    """Tell whether a class of a package is among those of an object."""
    return any(k.__module__.startswith(package) for k in type(value).__mro__)


def name_of(value: Any) -> str:
    """Return the full name of a function or a class."""
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    return f"{getattr(value, '__module__', '')}.{name or type(value).__name__}"
