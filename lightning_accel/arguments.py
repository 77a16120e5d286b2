"""What a user passes, checked where it comes in.

Each function takes the name of an argument and its value, and returns the value or raises an error in three parts:
`TypeError` for what is of another kind, `ValueError` for what lies outside. `True` is no number here, and a scalar of
NumPy's is one. `none=True` lets `None` through.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any

from lightning_accel.errors import explain

_ADDRESS = re.compile(r"\s*([a-zA-Z][\w+.-]+:/|\w+::|//)")
"""A scheme and what follows it; one letter is a drive, and `a::b` is how fsspec chains schemes."""


def one_of(name: str, value: Any, known: Collection[str], *, none: bool = False) -> Any:
    """Return one of some words.

    >>> one_of("policy", "full", ("full", "selective"))
    'full'
    """
    if value is None and none:
        return value
    listed = ", ".join(map(repr, known)) + (" or None" if none else "")
    if not isinstance(value, str):
        raise TypeError(explain(f"`{name}` is a name", repr(value), f"pass one of {listed}"))
    if value not in known:
        raise ValueError(explain(f"unknown `{name}`", repr(value), f"pass one of {listed}"))
    return value


def flag(name: str, value: Any, *, none: bool = False) -> Any:
    """Return true or false.

    >>> flag("compile", True)
    True
    """
    if not isinstance(value, bool) and not (none and value is None):
        raise TypeError(explain(f"`{name}` is true or false", repr(value), "pass a bool"))
    return value


def flags(**given: Any) -> None:
    """Raise unless all of these are true or false.

    >>> flags(hooks=True, log=False)
    """
    for name, value in given.items():
        flag(name, value)


def whole(
    name: str,
    value: Any,
    *,
    least: int | None = 1,
    most: int | None = None,
    none: bool = False,
    do: str = "",
) -> Any:
    """Return a whole number within bounds, which are allowed.

    Args:
        name: Of the argument.
        value: What was passed.
        least: The smallest that is allowed, or `None`.
        most: The largest that is allowed, or `None`.
        none: Whether `None` is allowed.
        do: What to do instead; by default an example is given.

    >>> whole("views", 3), whole("limit", None, none=True)
    (3, None)
    """
    if value is None and none:
        return value
    what = f"`{name}` is a whole number{_range(least, most)}{_or_none(none)}"
    do = do or f"pass one, such as {_example(least, most)}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(explain(what, repr(value), do))
    if (least is not None and value < least) or (most is not None and value > most):
        raise ValueError(explain(what, repr(value), do))
    return value


def number(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    none: bool = False,
    unit: str = "",
    do: str = "",
) -> Any:
    """Return a number within bounds, never NaN.

    Args:
        name: Of the argument.
        value: What was passed.
        least: The smallest that is allowed.
        most: The largest that is allowed.
        above: What it must be larger than.
        below: What it must be smaller than. Infinity is refused unless `below` and `most` are infinite.
        none: Whether `None` is allowed.
        unit: What it counts, such as "seconds".
        do: What to do instead; by default an example is given.

    >>> number("weight", 0.5), number("budget_s", 3, above=0, unit="seconds")
    (0.5, 3)
    """
    if value is None and none:
        return value
    bounds = [
        *([f"{least:g} or more"] if least > -math.inf else []),
        *([f"above {above:g}"] if above > -math.inf else []),
        *([f"{most:g} at most"] if most < math.inf else []),
        *([f"below {below:g}"] if below < math.inf else []),
    ]
    kind = f"a number{' of ' + unit if unit else ''}"
    what = f"`{name}` is {', '.join([kind, *bounds])}{_or_none(none)}"
    do = do or f"pass one, such as {_inside(max(least, above), min(most, below)):g}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(explain(what, repr(value), do))
    size = float(value)
    if not (least <= size <= most and (size > above or above == -math.inf)):
        raise ValueError(explain(what, repr(value), do))
    if not (size < below or below == math.inf):
        raise ValueError(explain(what, repr(value), do))
    return value


def finite(name: str, value: Any, **bounds: Any) -> Any:
    """Return a finite number; bounds are those of `number`.

    >>> finite("weight", -0.5)
    -0.5
    """
    found = number(name, value, **bounds)
    if found is not None and not math.isfinite(found):
        do = bounds.get("do") or "pass one, such as 1"
        raise ValueError(explain(f"`{name}` is a finite number", repr(value), do))
    return found


def positive(name: str, value: Any, *, unit: str = "", none: bool = False, do: str = "") -> Any:
    """Return a number above zero; infinity is one.

    >>> positive("budget_s", 60, unit="seconds")
    60
    """
    return number(name, value, above=0.0, unit=unit, none=none, do=do)


def share(name: str, value: Any, *, none: bool = False, do: str = "") -> Any:
    """Return a number from 0 to 1, the ends allowed.

    >>> share("budget", 0.5)
    0.5
    """
    return number(name, value, least=0.0, most=1.0, none=none, do=do)


def open_share(name: str, value: Any, *, none: bool = False, do: str = "") -> Any:
    """Return a number between 0 and 1, the ends not allowed.

    >>> open_share("ratio", 0.5)
    0.5
    """
    return number(name, value, above=0.0, below=1.0, none=none, do=do)


def text(name: str, value: Any, *, none: bool = False, do: str = "") -> Any:
    """Return a text that is not empty.

    >>> text("student", "net")
    'net'
    """
    if value is None and none:
        return value
    what, do = f"`{name}` is a text{_or_none(none)}", do or "pass one"
    if not isinstance(value, str):
        raise TypeError(explain(what, repr(value), do))
    if not value.strip():
        raise ValueError(explain(what, "an empty one", do))
    return value


def path(name: str, value: Any, *, none: bool = False, do: str = "") -> Any:
    """Return a path on this machine as `Path`; an address raises, and nothing is fetched.

    >>> path("checkpoint", "last.ckpt").name
    'last.ckpt'
    """
    if value is None and none:
        return value
    if not isinstance(value, (str, PathLike)) or not str(value):
        what = f"`{name}` is a path{_or_none(none)}"
        raise TypeError(explain(what, repr(value), do or "pass text or a Path"))
    if _ADDRESS.match(str(value)):
        raise ValueError(
            explain(
                f"`{name}` is a path on this machine, and nothing is fetched from elsewhere",
                str(value).partition("?")[0],
                "download it from where you trust it, look at it, and pass the path of the file",
            )
        )
    return Path(value)


def instance(name: str, value: Any, kinds: Any, what: str, do: str, *, none: bool = False) -> Any:
    """Return a value of one of some classes.

    Args:
        name: Of the argument.
        value: What was passed.
        kinds: A class, or a tuple of some.
        what: What it is, such as "a precision plugin".
        do: What to pass instead.
        none: Whether `None` is allowed.

    >>> instance("sizes", [1, 2], (list, tuple), "a list of sizes", "pass [64, 128]")
    [1, 2]
    """
    if not isinstance(value, kinds) and not (none and value is None):
        raise TypeError(explain(f"`{name}` is {what}{_or_none(none)}", repr(value)[:200], do))
    return value


def numbers_by_name(name: str, value: Any) -> dict[str, float]:
    """Return metrics by name; tensors of one element are numbers too.

    >>> numbers_by_name("dense_metrics", {"val/acc": 0.5})
    {'val/acc': 0.5}
    """
    try:
        return {str(key): float(item) for key, item in value.items()}
    except (AttributeError, TypeError, ValueError):
        do = "pass {'val/acc': 0.98}, say"
        raise TypeError(explain(f"`{name}` are numbers by name", repr(value), do)) from None


def _or_none(none: bool) -> str:
    return ", or None" if none else ""


def _range(least: int | None, most: int | None) -> str:
    if least is not None and most is not None:
        return f" from {least} to {most}"
    return (
        f" from {least} on" if least is not None else f" up to {most}" if most is not None else ""
    )


def _example(least: int | None, most: int | None) -> int:
    wanted = 4
    if least is not None:
        wanted = max(wanted, least)
    return wanted if most is None else min(wanted, most)


def _inside(low: float, high: float) -> float:
    if low > -math.inf and high < math.inf:
        return (low + high) / 2
    return low + 1 if low > -math.inf else high - 1 if high < math.inf else 1.0
