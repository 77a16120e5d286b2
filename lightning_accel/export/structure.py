"""How values are nested, as plain JSON: tensors are numbered, everything else is named.

A graph takes and gives a flat row of tensors; a model takes and gives tuples, dicts and classes of its own. What lies
between is kept as a tree that a manifest can hold. Reading one makes no object of a class that the file names: it makes
those that were handed over in Python, or look-alikes with the same fields.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_accel.errors import Unsupported, explain

Node = dict[str, Any]

_named_tuple: Any = namedtuple  # whose fields are known to a type checker only as literals
_ATOMS = (bool, int, float, str, type(None))
_DEEPEST = 50


def encode(value: Any, leaves: list[Tensor]) -> Node:
    """Return the tree of a value, and append its tensors to `leaves` in the order of the tree.

    Raises:
        Unsupported: It holds something that is neither tensor, number, text, container nor dataclass.

    >>> encode({"a": (torch.ones(1), None)}, [])
    {'dict': [['a', {'tuple': [{'tensor': 0}, {'value': None}]}]]}
    """
    if isinstance(value, Tensor):
        leaves.append(value)
        return {"tensor": len(leaves) - 1}
    if type(value) in _ATOMS:
        return {"value": value}
    if is_named(value):
        held = dict(zip(_fields_of(type(value)), value, strict=True))
        return {"named": _encoded(held, leaves), "class": class_name(type(value))}
    if is_dataclass(value) and not isinstance(value, type):
        held = {f.name: getattr(value, f.name) for f in fields(value)}
        present = {name: item for name, item in held.items() if item is not None}
        return {"object": _encoded(present, leaves), "class": class_name(type(value))}
    if isinstance(value, Mapping) and all(isinstance(key, (str, int)) for key in value):
        return {"dict": _encoded(value, leaves)}
    if isinstance(value, (tuple, list)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [encode(item, leaves) for item in value]}
    raise Unsupported(
        "a network is exported with tensors, numbers, texts, containers and dataclasses around it",
        f"an object of the class {type(value).__name__}",
        "pass `pre=` or `post=` with a module that takes or gives plain ones",
    )


def decode(node: Node, leaves: Sequence[Any], classes: Mapping[str, type] | None = None) -> Any:
    """Return the value that a tree stands for.

    Args:
        node: The tree.
        leaves: What stands where it has tensors.
        classes: Of named tuples and dataclasses, by `class_name`; others become look-alikes.

    >>> decode({"dict": [["a", {"tuple": [{"tensor": 0}, {"value": None}]}]]}, ["leaf"])
    {'a': ('leaf', None)}
    """
    if "tensor" in node:
        return leaves[node["tensor"]]
    if "value" in node:
        return node["value"]
    if "dict" in node:
        return {key: decode(item, leaves, classes) for key, item in node["dict"]}
    for kind, make in (("tuple", tuple), ("list", list)):
        if kind in node:
            return make(decode(item, leaves, classes) for item in node[kind])
    kind = "named" if "named" in node else "object"
    held = {key: decode(item, leaves, classes) for key, item in node[kind]}
    known: Any = (classes or {}).get(node["class"])
    if kind == "object":
        return SimpleNamespace(**held) if known is None else known(**held)
    if known is None:
        last = node["class"].rsplit(".", 1)[-1]
        known = _named_tuple(last if last.isidentifier() else "Answer", list(held), rename=True)
    # What torch returns is made of one sequence, and a named tuple of its fields.
    return known(tuple(held.values())) if hasattr(known, "n_fields") else known(*held.values())


def classes_in(value: Any) -> dict[str, type]:
    """Return the named tuples and dataclasses that a value is made of, by `class_name`."""
    found: dict[str, type] = {}
    if is_named(value) or (is_dataclass(value) and not isinstance(value, type)):
        found[class_name(type(value))] = type(value)
    if is_dataclass(value) and not isinstance(value, type):
        items: list[Any] = [getattr(value, f.name) for f in fields(value)]
    elif isinstance(value, Mapping):
        items = list(value.values())
    else:
        items = list(value) if isinstance(value, (tuple, list)) else []
    for item in items:
        found |= classes_in(item)
    return found


def class_name(cls: type) -> str:
    """Return how a class is called in a manifest.

    >>> class_name(SimpleNamespace)
    'types.SimpleNamespace'
    """
    return f"{cls.__module__}.{cls.__qualname__}"


def is_named(value: Any) -> bool:
    """Tell whether a value is a named tuple, or what `torch.sort` and its kind return."""
    return isinstance(value, tuple) and bool(_fields_of(type(value)))


def names(node: Node, prefix: str = "") -> Iterator[str]:
    """Yield a name for each tensor of a tree, made of the keys that lead to it.

    >>> list(names({"dict": [["x", {"tensor": 0}], ["more", {"list": [{"tensor": 1}]}]]}))
    ['x', 'more.0']
    """
    if "tensor" in node:
        yield prefix or "0"
    for key, item in _children(node):
        yield from names(item, f"{prefix}.{key}" if prefix else str(key))


def matched(node: Node, value: Any, place: str = "") -> Iterator[Any]:
    """Yield what stands where the tree has tensors, in order.

    Raises:
        TypeError: The value is nested in another way.
        ValueError: A number or text is another one than the graph was made with.
    """
    if "tensor" in node:
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(np.array(value))
        if not isinstance(value, Tensor):
            _refuse(place, "a tensor or an array", value)
        yield value
    elif "value" in node:
        if type(value) is not type(node["value"]) or value != node["value"]:
            what = f"`{place}` is part of the graph, and cannot be another one now"
            do = f"pass {node['value']!r}, or deploy the network anew with the other value"
            raise ValueError(explain(what, repr(value)[:80], do))
    elif "tuple" in node or "list" in node:
        kind = "tuple" if "tuple" in node else "list"
        items = node[kind]
        if not isinstance(value, (tuple, list)) or len(value) != len(items):
            _refuse(place, f"a {kind} of {len(items)}", value)
        for index, item in enumerate(items):
            yield from matched(item, value[index], f"{place}.{index}")
    else:
        yield from _matched_fields(node, value, place)


def check(node: Any, num_leaves: int, depth: int = 0) -> None:
    """Raise unless this is a tree whose tensors are among `num_leaves`.

    Raises:
        ValueError: It is none.
    """
    if depth > _DEEPEST or not isinstance(node, dict):
        raise ValueError("no tree of a value")
    if "tensor" in node:
        index = node["tensor"]
        if type(index) is not int or not 0 <= index < num_leaves:
            raise ValueError("a tensor that is not there")
        return
    if "value" in node:
        if type(node["value"]) not in _ATOMS:
            raise ValueError("a value that is no number and no text")
        return
    if not {"dict", "tuple", "list", "named", "object"} & set(node):
        raise ValueError("an unknown kind of value")
    if ("named" in node or "object" in node) and not isinstance(node.get("class"), str):
        raise ValueError("a class without a name")
    for key, item in _children(node):
        if not isinstance(key, (str, int)):
            raise ValueError("a key that is no text")
        check(item, num_leaves, depth + 1)


def _fields_of(cls: Any) -> tuple[str, ...]:
    found: tuple[str, ...] = getattr(cls, "_fields", ())
    return found or (cls.__match_args__ if hasattr(cls, "n_sequence_fields") else ())


def _encoded(held: Mapping[Any, Any], leaves: list[Tensor]) -> list[list[Any]]:
    return [[key, encode(item, leaves)] for key, item in held.items()]


def _children(node: Node) -> Iterator[tuple[Any, Node]]:
    for kind in ("tuple", "list"):
        if kind in node:
            yield from enumerate(node[kind])
    for kind in ("dict", "named", "object"):
        yield from node.get(kind, ())


def _matched_fields(node: Node, value: Any, place: str) -> Iterator[Any]:
    held = dict(_children(node))
    if isinstance(value, Mapping):
        found = set(value)
    else:
        found = {k for k in held if isinstance(k, str) and getattr(value, k, None) is not None}
    if found != set(held):
        wanted = ", ".join(map(repr, held))
        _refuse(place, f"something with {wanted}", f"with {', '.join(sorted(map(str, found)))}")
    for key, item in held.items():
        inner = value[key] if isinstance(value, Mapping) else getattr(value, key)
        yield from matched(item, inner, f"{place}.{key}")


def _refuse(place: str, what: str, found: Any) -> None:
    shown = found if isinstance(found, str) else type(found).__name__
    do = "nest the arguments as in the example"
    raise TypeError(explain(f"`{place}` is {what}", shown[:120], do))
