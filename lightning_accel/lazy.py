"""Names of a package that are imported when they are first asked for, since their modules import Lightning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a `__getattr__` for a package.

    Args:
        package: Its `__name__`.
        homes: By name the module that has it, relative to the package.

    >>> lazily("lightning_accel", {"explain": "errors"})("explain")("it broke")
    'it broke.'
    """

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return __getattr__
