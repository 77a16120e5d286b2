"""What a user passes to a distillation, checked where it comes in."""

from __future__ import annotations

from typing import Any

from lightning_accel.arguments import whole
from lightning_accel.errors import explain


def index_of(name: str, value: Any) -> int | None:
    """Return the index of a dimension other than the batch's, or `None`.

    >>> index_of("class_dim", -1)
    -1
    """
    if whole(name, value, least=None, none=True) == 0:
        what = f"`{name}` is a dimension other than 0, the batch"
        raise ValueError(explain(what, repr(value), "pass 1 or -1, say"))
    return value
