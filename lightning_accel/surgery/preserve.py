"""What a trial must leave as it was: random states, and what objects around the data remember.

Lightning's `isolate_rng` does not put anything back when its body raises; these do.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Iterator, MutableMapping, MutableSequence, MutableSet
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_accel.surgery.rng import random_state, seed_of_cuda, set_random_state

_DEPTH = 6
_MOST = 2000
_SMALL = 100_000
"""Entries of a container that are cheap to keep a copy of."""
_FEW = 4096
"""The same for numbers of an array."""
_RUNS = {"Trainer", "Strategy", "Callback", "Logger"}
"""Lightning's classes whose objects run a fit: who reads the data may know them, but they are no part of it."""
_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
_PLAIN = (Tensor, np.ndarray, str, bytes, int, float, complex, type, ModuleType, nn.Module)


class CannotPreserve(TypeError):
    """Something would be used up that cannot be put back."""


@contextmanager
def preserve_rng(*holders: Any) -> Iterator[None]:
    """Put all random states back: the global ones, and generators that `holders` keep as attributes.

    >>> before = torch.get_rng_state()
    >>> with preserve_rng():
    ...     _ = torch.rand(3)
    >>> torch.equal(before, torch.get_rng_state())
    True
    """
    world, keep_seed = random_state(), seed_of_cuda()
    own = [(generator, generator_state(generator)) for generator in generators(*holders)]
    try:
        yield
    finally:
        set_random_state(world)
        keep_seed()
        for generator, state in own:
            set_generator_state(generator, state)


@contextmanager
def preserve_state(*holders: Any) -> Iterator[None]:
    """Put random states back, and the attributes of `holders`: counters, caches, lists, small arrays.

    Modules and large arrays are left out; iterators among the attributes are replaced by copies meanwhile.

    Raises:
        CannotPreserve: An iterator among the attributes cannot be copied, so using it would use it up.
    """
    with preserve_rng(*holders):
        kept: list[tuple[Any, dict[str, Any]]] = []
        contents: list[tuple[Any, Any]] = []
        try:
            for value in reachable(*holders):
                if runs(value):
                    continue
                own = getattr(value, "__dict__", None)
                if isinstance(own, dict) and not isinstance(value, (type, FunctionType)):
                    kept.append((own, dict(own)))
                    own.update({k: _copy_of(k, v) for k, v in own.items() if is_iterator(v)})
                saved = _content(value)
                if saved is not None:
                    contents.append((value, saved))
            yield
        finally:
            for value, saved in contents:
                _restore(value, saved)
            for own, before in kept:
                if own.keys() != before.keys() or any(own[k] is not before[k] for k in before):
                    own.clear()
                    own.update(before)


def reachable(*holders: Any) -> Iterator[Any]:
    """Yield the objects that are found in the attributes and entries of some, a few levels deep.

    What is inside of that which runs the fit is left out: the iterators that the fit reads, above all.
    """
    seen: set[int] = set()
    level = list(holders)
    for _ in range(_DEPTH):
        following: list[Any] = []
        for value in level[:_MOST]:
            if value is None or id(value) in seen:
                continue
            seen.add(id(value))
            yield value
            following += _inside(value)
        level = following


def generators(*holders: Any) -> list[Any]:
    """Return the random generators that are found in the attributes of some objects.

    >>> len(generators({"mine": torch.Generator()}))
    1
    """
    return [value for value in reachable(*holders) if isinstance(value, _GENERATORS)]


def runs(value: Any) -> bool:
    """Tell whether an object runs a fit, as a Trainer, or what stands for one, does."""
    lineage = getattr(value.__class__, "__mro__", ())
    return any(b.__name__ in _RUNS and "lightning" in b.__module__.split(".")[0] for b in lineage)


def is_iterator(value: Any) -> bool:
    """Tell whether a value is used up by reading it."""
    return hasattr(type(value), "__next__")


def generator_state(generator: Any) -> Any:
    """Return the state of a generator of torch, numpy or Python."""
    if isinstance(generator, (torch.Generator, np.random.RandomState)):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate()


def set_generator_state(generator: Any, state: Any) -> None:
    """Put back what `generator_state` returned."""
    if isinstance(generator, (torch.Generator, np.random.RandomState)):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.setstate(state)


def _copy_of(name: str, iterator: Any) -> Any:
    try:
        return copy.deepcopy(iterator)
    except Exception as error:  # whatever the objects of a user do when they are copied
        raise CannotPreserve(f"`{name}`, {type(iterator).__name__}: {error}") from error


def _inside(value: Any) -> list[Any]:
    if isinstance(value, (*_PLAIN, *_GENERATORS)) or runs(value):
        return []
    if isinstance(value, dict):
        return list(value.values())[:_MOST]
    if isinstance(value, (list, tuple, deque)):
        return list(value)[:_MOST]
    found = list(getattr(value, "__dict__", {}).values())
    if isinstance(value, (FunctionType, BuiltinFunctionType)) or callable(value):
        found += [getattr(value, "__self__", None), getattr(value, "func", None)]
        found += [c.cell_contents for c in getattr(value, "__closure__", None) or () if _filled(c)]
    return found


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that its function has not bound yet
        return False


def _content(value: Any) -> Any:
    """Return a copy of what stands in a small container, array or shared number."""
    if isinstance(value, (Tensor, np.ndarray)):
        size = value.numel() if isinstance(value, Tensor) else value.size
        return copy.deepcopy(value) if size <= _FEW and _is_own(value) else None
    if isinstance(value, (MutableSequence, MutableMapping, MutableSet)) and not hasattr(
        value, "fileno"
    ):
        return copy.copy(value) if len(value) <= _SMALL else None
    if hasattr(value, "get_lock") and hasattr(value, "value"):  # shared between processes
        return value.value
    return None


def _is_own(value: Any) -> bool:
    return not (isinstance(value, np.memmap) or (isinstance(value, Tensor) and value.requires_grad))


@torch.no_grad()
def _restore(value: Any, saved: Any) -> None:
    if isinstance(value, Tensor):
        if not torch.equal(value, saved):
            value.copy_(saved)
    elif isinstance(value, np.ndarray):
        if value.flags.writeable:
            value[...] = saved
    elif isinstance(value, (MutableMapping, MutableSet)):
        if not _same_entries(value, saved):
            value.clear()
            value.update(saved) if isinstance(value, MutableMapping) else value.__ior__(saved)
    elif isinstance(value, deque):
        value.clear()
        value.extend(saved)
    elif isinstance(value, MutableSequence):
        if not _same_entries(value, saved):
            value[:] = saved
    elif value.value != saved:
        value.value = saved


def _same_entries(value: Any, saved: Any) -> bool:
    if len(value) != len(saved):
        return False
    one = list(value.items()) if isinstance(value, MutableMapping) else list(value)
    other = list(saved.items()) if isinstance(saved, MutableMapping) else list(saved)
    pairs = zip(one, other, strict=True)
    if isinstance(value, MutableMapping):
        return all(a[0] is b[0] and a[1] is b[1] for a, b in pairs)
    return all(a is b for a, b in pairs)
