"""Which layer of the student learns from which layer of the teacher: a short notation for pairs.

    {"layer2": "layer4"}          a mapping from the student's names to the teacher's
    "layer2: layer4, norm"        the same as text; a bare name is the name on both sides
    ["layer1", "layer2: layer4"]  a list of any of these
    ("layer2", "layer4")          one pair; a tuple has exactly two sides
    Select(types=("Block",))      the same choice on both sides, or one `Select` for each: a tuple

A side is a name as in `named_modules()`, a glob, or a `Select`. A glob is matched between the dots, so
that all it finds lies at one depth: `"blocks.*"` is the direct children of `blocks` and nothing below
them, `"*.conv1"` the `conv1` of each child. A `Select` stands for the outermost modules that it chooses.
Both come in the order of the model and never include the model itself. `"name@input"` is the first
input of a layer instead of its output. Layers of compiled modules go by their names without `_orig_mod`.

Two sides of equal length are paired one by one. Of a longer teacher evenly spaced layers are taken, the
last one always (student i of n learns from teacher ceil((i + 1) m / n) - 1 of m), as DistilBERT-like
students of half the depth do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from lightning_accel.distillation.forward_recorder import INPUT
from lightning_accel.errors import NoEffect, explain
from lightning_accel.surgery import Select

Side = str | Select


class Pair(NamedTuple):
    """A layer of the student and the layer of the teacher that it learns from, by name."""

    student: str
    teacher: str


def pairs(notation: Any, student: nn.Module, teacher: nn.Module) -> list[Pair]:
    """Find the pairs of layers that `notation` means between two networks, each once and in its order.

    Args:
        notation: A mapping, a text, a list, a tuple of two sides or a `Select`; see this file's head.
        student: The network that learns.
        teacher: The network that it learns from.

    Raises:
        TypeError: The notation is none of these.
        ValueError: It is empty or malformed, or a student's side has more layers than its teacher's.
        NoEffect: A side matches no layer.

    >>> half, whole = (nn.Sequential(*(nn.ReLU() for _ in range(depth))) for depth in (2, 4))
    >>> [tuple(pair) for pair in pairs("*", half, whole)]
    [('0', '1'), ('1', '3')]
    """
    found: dict[Pair, None] = {}
    for left, right in _sides(notation):
        ours = _names(left, student, "student")
        theirs = _names(right, teacher, "teacher")
        if len(ours) > len(theirs):
            raise ValueError(
                explain(
                    f"`{_text(left)}` has more layers in the student than `{_text(right)}` in the teacher",
                    f"{len(ours)} ({_listed(ours)}) and {len(theirs)} ({_listed(theirs)})",
                    "name fewer layers of the student, or each pair",
                )
            )
        found |= dict.fromkeys(map(Pair, ours, _spread(theirs, len(ours))))
    if not found:
        raise ValueError(
            explain("no pairs of layers are named", repr(notation), "pass 'layer2: layer4'")
        )
    return list(found)


def _sides(notation: Any) -> Iterator[tuple[Side, Side]]:
    """Yield what stands on the student's and on the teacher's side of each entry."""
    if isinstance(notation, Select):
        yield notation, notation
    elif isinstance(notation, str):
        for part in filter(str.strip, notation.split(",")):
            names = part.split(":")
            if len(names) > 2:
                raise ValueError(
                    explain("a pair has two sides", repr(part.strip()), "write 'layer2: layer4'")
                )
            yield _side(names[0]), _side(names[-1])
    elif isinstance(notation, Mapping):
        yield from ((_side(left), _side(right)) for left, right in notation.items())
    elif isinstance(notation, tuple) and len(notation) == 2:
        yield _side(notation[0]), _side(notation[1])
    elif isinstance(notation, Sequence) and not isinstance(notation, (tuple, bytes)):
        for entry in notation:
            if isinstance(entry, Sequence) and not isinstance(entry, (str, tuple)):
                raise _misread(entry)
            yield from _sides(entry)
    else:
        raise _misread(notation)


def _side(value: Any) -> Side:
    if isinstance(value, Select):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # yaml reads the name of a layer in a Sequential as a number
    if not isinstance(value, str):
        raise _misread(value)
    name = ".".join(part for part in value.strip().split(".") if part != "_orig_mod")
    if not name.removesuffix(INPUT):
        raise ValueError(
            explain("a side of a pair needs a name", repr(value), "name a layer of the network")
        )
    return name


def _misread(value: Any) -> TypeError:
    return TypeError(
        explain(
            "pairs of layers are a mapping, a text, a list of these, a tuple of two sides or a `Select`",
            f"{value!r} ({type(value).__name__})",
            "pass {'layer2': 'layer4'} or 'layer2: layer4'",
        )
    )


def _names(side: Side, model: nn.Module, role: str) -> list[str]:
    """Return the layers of `model` that one side stands for, in its order."""
    if isinstance(side, Select):
        chosen = [name for name, module in _layers(model).items() if side.matches(name, module)]
        inside = set(chosen)
        names = [name for name in chosen if not any(p in inside for p in _parents(name))]
    elif any(sign in side for sign in "*?["):
        pattern, mark, _ = side.partition(INPUT)
        names = [name + mark for name in _layers(model) if _fits(name, pattern)]
    else:
        known = side.removesuffix(INPUT) in _layers(model, aliases=True)
        names = [side] if known else []
    if not names:
        raise _nothing(side, model, role)
    return names


def _layers(model: nn.Module, *, aliases: bool = False) -> dict[str, nn.Module]:
    """Return all layers by name, a compiled one as the module that was compiled."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=not aliases):
        found[".".join(part for part in name.split(".") if part != "_orig_mod")] = module
    found.pop("")
    return found


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _fits(name: str, pattern: str) -> bool:
    parts, globs = name.split("."), pattern.split(".")
    return len(parts) == len(globs) and all(map(fnmatchcase, parts, globs))


def _spread(names: list[str], count: int) -> list[str]:
    """Return `count` of the names, evenly spaced, the last one among them."""
    return [names[-(-(i + 1) * len(names) // count) - 1] for i in range(count)]


def _nothing(side: Side, model: nn.Module, role: str) -> NoEffect:
    names = list(_layers(model, aliases=True))
    near: list[str] = []
    if isinstance(side, str):
        wanted = side.removesuffix(INPUT)
        near = [name for name in names if name.endswith("." + wanted)]
        near += [n for n in get_close_matches(wanted, names, 6, 0.5) if n not in near]
    shown = near or sorted(names, key=lambda name: name.count("."))
    return NoEffect(
        f"`{_text(side)}` is no layer of the {role}",
        f"{type(model).__name__} with {'close to it ' if near else ''}{_listed(shown) or 'no layers'}",
        "name layers as in `named_modules()`; 'blocks.*' is the direct children of 'blocks'",
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _text(side: Side) -> str:
    return side if isinstance(side, str) else str(side)
