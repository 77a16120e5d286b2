"""A block computed a second time, in backward: from what it was in forward, and as if there had been no second time.

`Before` is what a block and the world were before its forward, `Recomputation` brings that back for the second
one, and `compared` refuses a block whose second result is another one.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_leaves

from lightning_accel.errors import Unsupported
from lightning_accel.surgery.preserve import generator_state, generators, set_generator_state

_ALIKE = 2e-3
"""How much the norm and the sum of a result may differ from those of its recomputation, as a share of the norm."""
_OF_EVERY_MODULE = {*vars(nn.Module()), "forward"}
_generators: weakref.WeakKeyDictionary[nn.Module, list[Any]] = weakref.WeakKeyDictionary()


class Before:
    """What a block keeps as attributes, and the random states that torch's `checkpoint` does not see to.

    Args:
        block: A module that is about to run.
    """

    def __init__(self, block: nn.Module) -> None:
        if block not in _generators:
            _generators[block] = generators(*(vars(inner) for inner in block.modules()))
        self.kept = _Kept(block)
        self._own = _generators[block]
        self._random = _random_states(self._own)

    def bring_back(self, block: nn.Module) -> Before:
        """Let the block and the world be as they were then, and return what they are now."""
        now = Before(block)
        self.kept.bring_back()
        if _have_drawn(self._random, now._random):  # if by nobody, then not by the forward either
            _set_random_states(self._own, self._random)
        return now


class Recomputation:
    """Stands around a recomputation: what is kept, running statistics and random states stay as they are.

    Args:
        module: The block.
        inner: Another context to enter, or None.
        before: Of its forward.
    """

    def __init__(self, module: nn.Module, inner: Any, before: Before) -> None:
        self.module = module
        self.inner = inner
        self.before = before
        self.held: list[tuple[nn.Module, str, Any]] = []

    def __enter__(self) -> None:
        self.now = self.before.bring_back(self.module)
        for module in self.module.modules():
            # Statistics are passed all the same, for as many tensors have to be saved as before.
            if isinstance(module, (_BatchNorm, _InstanceNorm)) and module.track_running_stats:
                self._set(module, "momentum", 0.0)
                self._set(module, "num_batches_tracked", None)
        if self.inner is not None:
            self.inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        while self.held:
            module, name, value = self.held.pop()
            setattr(module, name, value)
        if self.inner is not None:
            self.inner.__exit__(*error)
        self.now.bring_back(self.module)

    def _set(self, module: nn.Module, name: str, value: Any) -> None:
        self.held.append((module, name, getattr(module, name)))
        setattr(module, name, value)


def compared(kind: type[nn.Module], call: Callable[..., Any]) -> Callable[..., Any]:
    """Let a call refuse a result that is not that of its first time."""
    first: list[list[tuple[float, float]]] = []

    def again(*values: Any) -> Any:
        out = call(*values)
        found = [_measure(t) for t in tree_leaves(out) if isinstance(t, Tensor)]
        if not first:
            first.append(found)
        elif len(found) != len(first[0]) or any(map(_differ, found, first[0])):
            raise Unsupported(
                f"a checkpointed {kind.__name__} recomputes something else than it computed",
                "another result for the same arguments and random states",
                "leave the block out by `select=Select(exclude=...)`, or do not count calls in its forward",
            )
        return out

    return again


@torch.no_grad()
def _measure(tensor: Tensor) -> tuple[float, float]:
    """Return norm and sum, for which no copy is kept."""
    if type(tensor) is not Tensor or tensor.is_meta:  # sharded or without numbers
        return 0.0, 0.0
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    kind = torch.float64 if values.dtype == torch.float64 else torch.float32
    if values.dtype not in (torch.float16, torch.bfloat16):
        values = values.to(kind)
    norm = torch.linalg.vector_norm(values, dtype=kind)
    return float(norm), float(values.sum(dtype=kind))


def _differ(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return any(abs(a - b) > _ALIKE * max(one[0], other[0]) for a, b in zip(one, other, strict=True))


class _Kept:
    """What the modules of a block keep as attributes at one moment, lists and dicts with their contents."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._attributes = [
            (module, {k: v for k, v in vars(module).items() if k not in _OF_EVERY_MODULE})
            for module in block.modules()
        ]
        self._contents = [
            (held, held.copy())
            for _, attributes in self._attributes
            for held in attributes.values()
            if type(held) in (list, dict, set)
        ]

    def bring_back(self) -> _Kept:
        """Let the block be as it was then, and return what it is now."""
        now = _Kept(self._block)
        for module, attributes in self._attributes:
            own = vars(module)
            for name in [n for n in own if n not in attributes and n not in _OF_EVERY_MODULE]:
                del own[name]
            own.update(attributes)
        for held, content in self._contents:
            held.clear()
            held.extend(content) if isinstance(held, list) else held.update(content)
        return now


def _random_states(own: list[Any]) -> list[Any]:
    """Return the random states that torch's `checkpoint` does not see to."""
    return [random.getstate(), np.random.get_state(), *map(generator_state, own)]


def _set_random_states(own: list[Any], states: list[Any]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    for generator, state in zip(own, states[2:], strict=True):
        set_generator_state(generator, state)


def _have_drawn(before: list[Any], now: list[Any]) -> bool:
    (_, keys, *others), (_, keys_now, *others_now) = before[1], now[1]
    same = before[0] == now[0] and others == others_now and np.array_equal(keys, keys_now)
    return len(now) > 2 or not same  # a generator of its own is there to be drawn from
