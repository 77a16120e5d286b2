"""What a user passes, checked where it comes in."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from lightning_accel.errors import explain

_ADDRESS = re.compile(r"\s*([a-zA-Z][\w+.-]+:/|\w+::|//)")
"""A scheme and what follows it; one letter is a drive, and `a::b` is how fsspec chains schemes."""


def number(value: Any, name: str) -> float:
    """Return a finite number, or raise `ValueError`.

    >>> number(0.5, "weight")
    0.5
    """
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not plain or not math.isfinite(value):
        raise ValueError(explain(f"`{name}` is a finite number", repr(value), "pass one like 0.9"))
    return value


def whole(value: Any, name: str, least: int) -> int:
    """Return a whole number of at least `least`, or raise `ValueError`.

    >>> whole(3, "views", 1)
    3
    """
    if type(value) is not int or value < least:
        what = f"`{name}` must be at least {least}, a whole number"
        raise ValueError(explain(what, repr(value), f"pass {max(least, 4)}, say"))
    return value


def index_of(value: Any, name: str) -> int:
    """Return the index of a dimension other than the batch's, or raise `ValueError`.

    >>> index_of(-1, "class_dim")
    -1
    """
    if type(value) is not int or value == 0:
        what = f"`{name}` is a dimension other than 0, the batch"
        raise ValueError(explain(what, repr(value), "pass 1 or -1, say"))
    return value


def flag(value: Any, name: str) -> bool:
    """Return true or false, or raise `TypeError`.

    >>> flag(True, "compile")
    True
    """
    if not isinstance(value, bool):
        raise TypeError(explain(f"`{name}` is true or false", repr(value), "pass a bool"))
    return value


def name_of(value: Any, name: str) -> str | None:
    """Return a name or `None`, or raise `TypeError`.

    >>> name_of("net", "student")
    'net'
    """
    if value is not None and not isinstance(value, str):
        raise TypeError(explain(f"`{name}` is a name", repr(value), "pass text, or leave it out"))
    return value


def path_of(value: Any, name: str) -> Path:
    """Return a path on this machine, or raise `TypeError`; an address raises `ValueError`, and nothing is fetched.

    >>> path_of("last.ckpt", "checkpoint").name
    'last.ckpt'
    """
    if not isinstance(value, (str, Path)):
        raise TypeError(explain(f"`{name}` is a path", repr(value), "pass text or a Path"))
    if _ADDRESS.match(str(value)):
        raise ValueError(
            explain(
                f"`{name}` is a path on this machine, and nothing is fetched from elsewhere",
                str(value).partition("?")[0],
                "download it from where you trust it, look at it, and pass the path of the file",
            )
        )
    return Path(value)
