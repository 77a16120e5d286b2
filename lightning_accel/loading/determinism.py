"""Whether reading data changes nothing: no random number drawn, and the same item at every read."""

from __future__ import annotations

import hashlib
import pickle
from collections import deque
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from lightning_accel.surgery.preserve import generator_state, generators
from lightning_accel.surgery.rng import random_state

_DEPTH = 5
_MAX_ITEMS = 2000


class Draws:
    """Tells whether random numbers were drawn since it was made.

    >>> draws = Draws()
    >>> _ = torch.rand(1)
    >>> draws.happened()
    True
    """

    def __init__(self, *holders: Any) -> None:
        self._own = generators(*holders)
        self._before = self._now()

    def happened(self) -> bool:
        """Compare all random states with those at the beginning."""
        return self._now() != self._before

    def _now(self) -> list[Any]:
        world = random_state()
        tensors = [world["torch"], *world["cuda"]]
        own = [generator_state(generator) for generator in self._own]
        return [
            world["python"],
            world["numpy"],
            *(t.numpy().tobytes() for t in tensors),
            *(s.cpu().numpy().tobytes() if isinstance(s, Tensor) else repr(s) for s in own),
        ]


def fingerprint(holder: Any) -> bytes | None:
    """Return a digest of all that an object keeps in its attributes, or `None` where it cannot be walked.

    What lies outside of them is not in it: files, globals, memory that processes share.

    >>> kept = {"labels": [1, 2], "x": torch.zeros(2)}
    >>> before = fingerprint(kept)
    >>> kept["x"].data[1] = 3
    >>> before == fingerprint(kept)
    False
    """
    digest = _Digest()
    try:
        _Walk(digest, protocol=5).dump(holder)
    except Exception:  # whatever the objects of a user do when they are looked at
        return None
    return digest.sum.digest()


class _Digest:
    """A file that only remembers the digest of what was written to it."""

    def __init__(self) -> None:
        self.sum = hashlib.blake2b()

    def write(self, data: Any) -> int:
        self.sum.update(data)
        return len(data)


class _Walk(pickle.Pickler):
    """Walks through attributes without running what their classes do to be pickled."""

    def reducer_override(self, value: Any) -> Any:
        if value is str:  # what stands for all that has no form of its own
            return NotImplemented
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        if isinstance(value, Tensor):
            plain = value.detach()
            strided = plain.layout == torch.strided and not plain.is_quantized
            bits = _bits(plain) if strided else _bits(plain.to_dense())
            return str, (name,), (tuple(value.shape), str(value.dtype), bits)
        if isinstance(value, np.ndarray):
            bits = value.tolist() if value.dtype.hasobject else value.tobytes()
            return str, (name,), (value.shape, str(value.dtype), bits)
        if isinstance(value, (type, FunctionType, BuiltinFunctionType, ModuleType)):
            cells = getattr(value, "__closure__", None) or ()
            held = [c.cell_contents for c in cells if not isinstance(c.cell_contents, type)]
            return str, (f"{name} {id(value)}",), held
        slots = [s for c in type(value).__mro__ for s in _slots(c)]
        held = [vars(value) if hasattr(value, "__dict__") else None]
        held += [getattr(value, s, None) for s in slots]
        for kind in (dict, list, tuple, set, frozenset, deque):
            if isinstance(value, kind):
                held.append(list(value.items()) if isinstance(value, dict) else list(value))
        if len(held) == 1 and not held[0] and not slots:
            try:
                return value.__reduce_ex__(5)  # a number, a date, an array of another library
            except Exception:  # a lock, a file, shared memory: nothing that could be compared
                return str, (f"{name} {id(value)}",)
        return str, (name,), held


def _slots(kind: type) -> list[str]:
    found = kind.__dict__.get("__slots__", ())
    found = (found,) if isinstance(found, str) else found
    return [name for name in found if name not in ("__dict__", "__weakref__")]


def same(one: Any, other: Any) -> bool:
    """Tell whether two batches are equal bit for bit: structure, types, shapes, strides, values.

    >>> same({"x": torch.ones(2)}, {"x": torch.ones(2)}), same([torch.ones(2)], [torch.ones(2).int()])
    (True, False)
    """
    left, spec = tree_flatten(one)
    right, other_spec = tree_flatten(other)
    return spec == other_spec and all(map(_same_leaf, left, right))


def _same_leaf(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if not isinstance(one, Tensor):
        if isinstance(one, np.ndarray):
            return bool(
                one.dtype == other.dtype
                and one.shape == other.shape
                and one.tobytes() == other.tobytes()
            )
        try:
            return bool(one == other)
        except Exception:  # a class of its own that holds tensors: not known to be equal
            return False
    if one.dtype != other.dtype or one.shape != other.shape or one.layout != other.layout:
        return False
    if one.layout != torch.strided:
        return _same_leaf(one.to_dense(), other.to_dense())
    strides = zip(one.shape, one.stride(), other.stride(), strict=True)
    if any(size > 1 and a != b for size, a, b in strides):
        return False
    return _bits(one) == _bits(other)


def _bits(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()
