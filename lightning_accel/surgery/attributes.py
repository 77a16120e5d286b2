"""The whole numbers that a module keeps for its forward: attributes, and what layers of einops know.

`nn.Conv2d` has `groups`, attention `num_heads`, a norm a tuple of them; `Rearrange("b n (h d) -> b h n d", h=4)`
has a 4 in a dictionary, which is `axes_lengths.h` here. Who cuts a network reads and writes all of them by
such names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

Size = int | tuple[int, ...]

_OF_EINOPS = ("pattern", "axes_lengths", "_axes_lengths", "_multirecipe")
_AXES = "axes_lengths."


def sizes_of(module: nn.Module) -> Iterator[tuple[str, Size]]:
    """Yield name and value of each.

    >>> dict(sizes_of(nn.LayerNorm(3)))
    {'normalized_shape': (3,)}
    """
    for key, value in vars(module).items():
        if is_size(value):
            yield key, as_size(value)
    for axis, length in axes_of(module).items():
        if type(length) is int:
            yield _AXES + axis, length


def get_size(module: nn.Module, key: str) -> Any:
    """Return what a module has under a name that `sizes_of` gave; `None` if it has nothing there."""
    if key.startswith(_AXES):
        return axes_of(module).get(key.removeprefix(_AXES))
    return getattr(module, key, None)


def set_size(module: nn.Module, key: str, size: Size) -> None:
    """Set an integer attribute, in the container type that the module uses."""
    if key.startswith(_AXES):
        return set_axes(module, {**axes_of(module), key.removeprefix(_AXES): size})
    as_list = isinstance(getattr(module, key), list)
    return setattr(module, key, list(size) if as_list and isinstance(size, tuple) else size)


def axes_of(module: nn.Module) -> dict[str, Any]:
    """Return the lengths that a layer of einops was given, by axis; nothing for other modules."""
    own = vars(module)
    return own["axes_lengths"] if all(key in own for key in _OF_EINOPS) else {}


def set_axes(module: nn.Module, lengths: dict[str, Any]) -> None:
    """Give a layer of einops other lengths: one copy of them is for its forward, the other for copies of it."""
    module.axes_lengths = lengths  # type: ignore[assignment]
    module._axes_lengths = tuple(lengths.items())  # type: ignore[assignment]


def axis_key(axis: str) -> str:
    """Return the name under which `sizes_of` gives an axis."""
    return _AXES + axis


def is_size(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return bool(value) and all(type(v) is int for v in value)
    return type(value) is int


def as_size(value: Any) -> Size:
    return value if isinstance(value, int) else tuple(value)
