"""What the forward of a network reads besides its arguments, and whether that is still as it was.

A copy, a captured graph or a recomputation is right only while everything that the forward reads is as it
was, and only if nothing that the forward writes is lost: weights and buffers (also where they are written
through `.data`, which no version counter tells), attributes of any module inside, what those hold (a config, a
list, a dict), training flags, hooks, the modules themselves, and random states.

`Footprint` notes all of it and tells in tens of microseconds whether it still holds; `observe` runs a call and
tells what it wrote and which random states it moved. Class attributes and module-level names are noted where the
`forward` names them, and so are the names, closures and defaults of functions that it names or that are held by
modules, a few calls deep. What is found by a text, in a file or in the environment is not, so whoever relies on a
footprint also compares results now and then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_accel.surgery.held import MOST, behind, held
from lightning_accel.surgery.named import differing, equal
from lightning_accel.surgery.preserve import generator_state, generators
from lightning_accel.surgery.rng import random_state

_SAMPLES = 16
"""Numbers of each tensor that show whether it was written behind its version counter."""
_SMALL = 64
"""So small a tensor is looked at as a whole."""
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Observation(NamedTuple):
    """What a call did besides returning something.

    Attributes:
        result: What it returned.
        wrote: Where it wrote: names of attributes and buffers.
        drew: Whose random state it moved: "torch", "python", "numpy", or "a generator of its own".
    """

    result: Any
    wrote: tuple[str, ...]
    drew: tuple[str, ...]


class Footprint:
    """All that the forward of a module can read, noted at one moment.

    Args:
        module: The network.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
    >>> footprint = Footprint(net)
    >>> footprint.holds()
    True
    >>> net[1].p = 0.2
    >>> footprint.holds(), footprint.changed()
    (False, ('1.p',))
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._held = list(held(module))
        self._live = [live for _, live, _ in self._held]
        self._copies = [copied for _, _, copied in self._held]
        tensors = sorted(_tensors(self._live), key=Tensor.is_inference)
        # `int()` is 0, for what lies nowhere in particular.
        addressed = [(t.data_ptr if t.layout == torch.strided else int, t) for t in tensors]
        self._tensors = tensors
        self._counted = [(address, t) for address, t in addressed if not t.is_inference()]
        self._uncounted = [address for address, t in addressed if t.is_inference()]
        self._arrays = [(name, a, a.copy()) for name, a in _arrays(self._held)]
        self._stamps = self._stamp()
        near, *kinds = _views(self._tensors)
        self._near = [(tensor, view.view(_WORDS[view.itemsize]).numpy()) for tensor, view in near]
        self._owners = [[tensor for tensor, _ in kind] for kind in kinds]
        self._views = [[view for _, view in kind] for kind in kinds]
        self._content, self._bytes = self._read(), self._read_near()

    def holds(self, *, content: bool = True) -> bool:
        """Tell whether everything is as it was.

        Args:
            content: Whether to look at some numbers of each tensor as well, and so to see what is written
                through `.data`. On a GPU this waits for the device.
        """
        # Loops in C, in which what is the same object costs nothing.
        if not equal(self._live, self._copies) or self._stamps != self._stamp():
            return False
        return not self._changed_arrays() and (not content or self._same_content())

    def changed(self) -> tuple[str, ...]:
        """Name what is no longer as it was."""
        found = [
            f"{name}.{key}".strip(".")
            for name, live, copied in self._held
            for key in differing(live, copied)
        ]
        found += self._changed_arrays()
        now, written = self._stamp(), self._written()
        found += [
            name
            for index, name in enumerate(self._names())
            if self._stamps[index] != now[index] or id(self._tensors[index]) in written
        ]
        return tuple(dict.fromkeys(found))

    def _names(self) -> list[str]:
        known = {
            id(t): n for n, t in (*self.module.named_parameters(), *self.module.named_buffers())
        }
        return [known.get(id(tensor), "a tensor among the attributes") for tensor in self._tensors]

    def _changed_arrays(self) -> list[str]:
        return [name for name, now, before in self._arrays if not np.array_equal(now, before)]

    def _stamp(self) -> list[tuple[int, int]]:
        found = [(address(), t._version) for address, t in self._counted]
        return found + [(address(), -1) for address in self._uncounted]

    def _read(self) -> list[Tensor]:
        with torch.no_grad():
            return [torch.cat(views) for views in self._views]

    def _read_near(self) -> list[bytes]:
        """Return the samples of what lies on the CPU, for which torch would take longer than to copy them."""
        return [words.tobytes() for _, words in self._near]

    def _same_content(self) -> bool:
        return self._bytes == self._read_near() and all(
            map(_same_bits, self._content, self._read())
        )

    def _written(self) -> set[int]:
        """Return which tensors differ where they are looked at."""
        pairs = zip(self._near, self._bytes, self._read_near(), strict=True)
        found = {id(tensor) for (tensor, _), before, now in pairs if now != before}
        for owners, views, before in zip(self._owners, self._views, self._content, strict=True):
            parts = before.split([view.numel() for view in views])
            for tensor, view, part in zip(owners, views, parts, strict=True):
                if not _same_bits(view.contiguous(), part):
                    found.add(id(tensor))
        return found


def observe(module: nn.Module, call: Callable[[], Any]) -> Observation:
    """Run a call of a module and tell what it did besides returning something.

    >>> net = nn.BatchNorm1d(2)
    >>> found = observe(net, lambda: net(torch.ones(3, 2)))
    >>> found.wrote, found.drew
    (('running_mean', 'running_var', 'num_batches_tracked'), ())
    """
    own = generators(*(vars(m) for m in module.modules()))
    footprint, before = Footprint(module), _randomness(own)
    result = call()
    drew = tuple(k for k, v in _randomness(own).items() if not _same(before[k], v))
    return Observation(result, footprint.changed(), drew)


def _randomness(own: list[Any]) -> dict[str, Any]:
    return {**random_state(), "a generator of its own": [generator_state(g) for g in own]}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _tensors(live: list[Any]) -> Iterator[Tensor]:
    """Yield each plain tensor once."""
    seen: set[int] = set()
    for one in live:
        for value in behind(one):
            if isinstance(value, Tensor) and type(value) in _PLAIN and id(value) not in seen:
                seen.add(id(value))
                yield value


def _arrays(held: list[tuple[str, Any, Any]]) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield small arrays by name."""
    for name, _, copied in held:
        for key, value in copied.items() if isinstance(copied, dict) else enumerate(copied):
            if isinstance(value, np.ndarray) and value.size <= MOST and value.dtype != object:
                yield f"{name}.{key}".strip("."), value


def _views(tensors: list[Tensor]) -> list[list[tuple[Tensor, Tensor]]]:
    """Return each tensor with a view of some of its numbers: those on the CPU, and the others by kind."""
    found: dict[Any, list[tuple[Tensor, Tensor]]] = {"near": []}
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.is_quantized:
            continue
        if not tensor.numel() or not _is_dense(tensor):
            continue
        count = tensor.numel() if tensor.numel() <= _SMALL else _SAMPLES
        step = tensor.numel() // count
        view = tensor.detach().as_strided((count,), (step,), tensor.storage_offset())
        near = tensor.device.type == "cpu" and tensor.itemsize in _WORDS
        kind = "near" if near else (tensor.dtype, tensor.device)
        found.setdefault(kind, []).append((tensor, view))
    return list(found.values())


def _same_bits(one: Tensor, other: Tensor) -> bool:
    # As bytes, where NaN equals itself and -0.0 differs from 0.0.
    return torch.equal(one.detach().view(torch.uint8), other.view(torch.uint8))


def _is_dense(tensor: Tensor) -> bool:
    """Tell whether a tensor fills its part of the storage without gaps, in one of the usual orders."""
    by_channel = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.is_contiguous() or by_channel or (tensor.dim() == 2 and tensor.T.is_contiguous())
