"""Where the numbers in a forward come from, so that they can follow a cut.

A forward reads its sizes from tensors (`x.shape[1]`), from attributes (`self.num_heads`) and from its
own code (`64`). During the trace the first two are integers that remember their origin through
arithmetic. So each size that meets a reshape, a split or a norm gives an equation: this expression
counts those atoms. After a cut the equations say which attributes change, and to what; a number that
is written in the code can not follow, so what it counts stays.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from lightning_accel.pruning.trace.union_find import Ids
from lightning_accel.surgery.attributes import axes_of, axis_key, set_axes


class Attribute(NamedTuple):
    """An integer attribute of a module, or one place of a tuple of them."""

    module: str
    key: str
    place: int = -1


class Length(NamedTuple):
    """The number of atoms along a dimension, less those cut."""

    atoms: Ids


class Sum(NamedTuple):
    """`verb` of two expressions or numbers."""

    verb: Callable[[int, int], int]
    left: Any
    right: Any


class Origin(int):
    """An integer that remembers the expression it comes from."""

    of: Any
    compared: Callable[[Any, Any], None]

    def __new__(cls, value: int, of: Any, compared: Callable[[Any, Any], None]) -> Origin:
        self = super().__new__(cls, value)
        self.of, self.compared = of, compared
        return self

    # `assert x.shape[1] == self.width` says that two numbers are one: worth an equation, like a reshape.
    def __eq__(self, other: object) -> bool:
        equal = int(self) == other
        if equal and isinstance(other, Origin):
            self.compared(self.of, other.of)
        return equal

    def __ne__(self, other: object) -> bool:
        return not self == other

    # A class with its own `__eq__` loses its hash, and sizes are keys of caches.
    def __hash__(self) -> int:
        return int.__hash__(self)

    def __neg__(self) -> Origin:
        return Origin(-int(self), Sum(operator.mul, self.of, -1), self.compared)

    # A copy or a pickle outlives the trace that the origin belongs to.
    def __reduce__(self) -> Any:
        return int, (int(self),)

    def __deepcopy__(self, memo: Any) -> int:
        return int(self)


def _remembering(name: str) -> Any:
    verb = getattr(operator, name)

    def forth(self: Origin, other: Any) -> Any:
        plain = getattr(int, f"__{name}__")(self, other)
        # A float or a tensor: what comes out is no size any more, or torch computes it.
        if plain is NotImplemented or type(other) not in (int, Origin):
            return plain
        return Origin(plain, Sum(verb, self.of, getattr(other, "of", other)), self.compared)

    def back(self: Origin, other: Any) -> Any:
        plain = getattr(int, f"__r{name}__")(self, other)
        if plain is NotImplemented or type(other) is not int:
            return plain
        return Origin(plain, Sum(verb, other, self.of), self.compared)

    return forth, back


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    for _prefix, _method in zip(("", "r"), _remembering(_name), strict=True):
        setattr(Origin, f"__{_prefix}{_name}__", _method)


# They measure space. That a kernel of 3 equals 3 channels is chance, and must tie nothing.
_GEOMETRY = {"stride", "padding", "dilation", "kernel_size", "output_padding", "padding_idx"}


def remember_attributes(model: nn.Module, compared: Callable[[Any, Any], None]) -> None:
    """Replace the integer attributes of every module, in place, by ones that remember their name."""
    for name, module in model.named_modules():
        for key, value in list(vars(module).items()):
            if key in _GEOMETRY or key.startswith("_reversed"):
                continue
            if type(value) is int:
                module.__dict__[key] = Origin(value, Attribute(name, key), compared)
            elif type(value) in (tuple, list) and value and all(type(v) is int for v in value):
                module.__dict__[key] = type(value)(
                    Origin(v, Attribute(name, key, place), compared)
                    for place, v in enumerate(value)
                )
        axes = {
            # The lengths of an einops layer are in a dict of its own.
            axis: Origin(length, Attribute(name, axis_key(axis)), compared)
            for axis, length in axes_of(module).items()
            if type(length) is int
        }
        if axes:
            set_axes(module, {**axes_of(module), **axes})


def leaves(expression: Any) -> Iterator[Any]:
    """Yield the attributes and lengths of an expression."""
    if isinstance(expression, Sum):
        yield from leaves(expression.left)
        yield from leaves(expression.right)
    elif not isinstance(expression, int):
        yield expression


def value(
    expression: Any, attributes: Mapping[Attribute, int], length: Callable[[Ids], int]
) -> int:
    """Evaluate an expression after a cut; raise `ZeroDivisionError` where it has no value."""
    if isinstance(expression, Sum):
        left = value(expression.left, attributes, length)
        return expression.verb(left, value(expression.right, attributes, length))
    if isinstance(expression, Attribute):
        return attributes[expression]
    return length(expression.atoms) if isinstance(expression, Length) else int(expression)


class Equation(NamedTuple):
    """`expression` counts the kept ones of `atoms`, in the forward of `place`."""

    expression: Any
    atoms: Ids
    place: str


def solve(
    equations: list[Equation], dense: Mapping[Attribute, int], length: Callable[[Ids], int]
) -> dict[Attribute, int]:
    """Return the attributes that change, so that every equation holds after a cut.

    Raises:
        ValueError: No value of one attribute at a time makes them all hold.
    """
    now = dict(dense)
    # One attribute may stand in several equations, and each that is solved can upset another: a few rounds.
    for _ in range(3):
        wrong = [e for e in equations if _value(e, now, length) != length(e.atoms)]
        if not wrong:
            return {attribute: size for attribute, size in now.items() if size != dense[attribute]}
        # First those of one attribute, which leave no choice.
        for equation in sorted(wrong, key=lambda e: len(list(leaves(e.expression)))):
            if _value(equation, now, length) != length(equation.atoms):
                _solve_one(equation, now, dense, length)
    equation = wrong[0]
    raise ValueError(
        f"the forward of `{equation.place}` reads a size of {_value(equation, now, length)} where"
        f" {length(equation.atoms)} would be left, and no attribute of it makes them agree"
    )


def _solve_one(
    equation: Equation,
    now: dict[Attribute, int],
    dense: Mapping[Attribute, int],
    length: Callable[[Ids], int],
) -> None:
    wanted = length(equation.atoms)
    found = (leaf for leaf in leaves(equation.expression) if isinstance(leaf, Attribute))
    for attribute in dict.fromkeys(found):
        # Tried rather than solved: `//` and `%` have no inverse. No cut makes a size larger.
        for size in range(1, dense[attribute] + 1):
            if _value(equation, {**now, attribute: size}, length) == wanted:
                now[attribute] = size
                return


def _value(
    equation: Equation, attributes: Mapping[Attribute, int], length: Callable[[Ids], int]
) -> int | None:
    try:
        return value(equation.expression, attributes, length)
    except ZeroDivisionError:
        return None
