"""What the layers to solve see on the batches: their output in the dense network, and their input in the cut one.

Names of tensors end in their dimensions: B samples of a call, G groups of a layer, N positions (samples x places),
I inputs x kernel, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.pruning.least_squares import Piece
from lightning_accel.pruning.lockstep import Lockstep, OutOfStep
from lightning_accel.pruning.unfold import by_block, only_input, patches, pieces, samples
from lightning_accel.surgery.call import Call, run
from lightning_accel.surgery.preserve import preserve_rng

_ENOUGH, _AT_LEAST = 32, 4096
"""Samples for each input of a layer, and of a layer: of more, as many are drawn."""


class AnotherWay(Exception):
    """A layer is called in another way after the cut."""


Pairs = list[tuple[Tensor, Tensor]]
"""A layer's output in the dense network and its input in the pruned one, for the calls of one batch."""


class LayerInputs:
    """What layers see on the batches: in one forward of all as long as they come to the layers in step."""

    def __init__(
        self,
        dense: nn.Module,
        cut: nn.Module,
        batches: Sequence[Sequence[Call]],
        once: Sequence[str],
    ) -> None:
        self._dense, self._cut, self._batches, self._once = dense, cut, batches, once
        self._runs = [
            Lockstep(dense, batches, once, after=True),
            Lockstep(cut, batches, once, after=False),
        ]

    def __enter__(self) -> LayerInputs:
        return self

    def __exit__(self, *_: object) -> None:
        while self._runs:
            self._runs.pop().__exit__()

    def pairs(self, name: str) -> Callable[[], Iterable[Pairs]]:
        """Return what gives them, for each batch."""
        if self._runs and name in self._once:
            try:
                wanted, given = (runs.at(name) for runs in self._runs)
            except OutOfStep:
                self.__exit__()
            else:
                seen = [([y], [only_input(*x)]) for y, x in zip(wanted, given, strict=True)]
                return lambda: [_paired(*both) for both in seen]
        return partial(self._anew, name)

    def _anew(self, name: str) -> Iterator[Pairs]:
        wanted: list[Any] = []
        given: list[Any] = []
        notes = (
            (self._dense, lambda _, __, ___, output: wanted.append(output)),
            (self._cut, lambda _, args, kwargs, __: given.append(only_input(args, kwargs))),
        )
        for calls in self._batches:
            wanted.clear()
            given.clear()
            for network, note in notes:
                with after([network.get_submodule(name)], note), preserve_rng():
                    run(network, calls)
            yield _paired(wanted, given)


def _paired(wanted: Sequence[Any], given: Sequence[Any]) -> Pairs:
    are_tensors = all(isinstance(value, Tensor) for value in (*wanted, *given))
    if len(wanted) != len(given) or not are_tensors:
        raise AnotherWay
    return list(zip(wanted, given, strict=True))


def unfolded(
    layer: nn.Module, batches: Iterable[Pairs], kept: Tensor | None, count: int
) -> Iterator[Piece]:
    """Yield X and Y, some samples at a time; where there are many, at random places.

    Args:
        layer: A linear layer or a convolution.
        batches: What it sees on each batch.
        kept: Numbers of its outputs that are left; `None` if all are.
        count: Number of batches.

    Raises:
        AnotherWay: It is called in another way after the cut.
    """
    chance = torch.Generator().manual_seed(0)
    share = 0.0
    for index, pairs in enumerate(batches):
        for y, x in pairs:
            given_B, wanted_B = samples(layer, x), samples(layer, y)
            if len(given_B) != len(wanted_B):
                raise AnotherWay
            if kept is not None:
                wanted_B = wanted_B[:, kept.to(wanted_B.device)]
            step = pieces(layer, given_B)
            seen, tried = held_out(len(given_B), index, count)
            for is_held_out, some in ((False, seen), (True, tried)):
                for start in range(some.start, some.stop, step):
                    piece = slice(start, min(start + step, some.stop))
                    x_GNI = patches(layer, given_B[piece])
                    y_GNO = by_block(layer, wanted_B[piece])
                    if not share:
                        positions = x_GNI.shape[1] / (piece.stop - piece.start) * len(given_B)
                        enough = max(_AT_LEAST, _ENOUGH * x_GNI.shape[2])
                        share = enough / (positions * len(pairs) * count)
                    if share < 1:
                        places = torch.randperm(x_GNI.shape[1], generator=chance)
                        places = places[: math.ceil(share * len(places))].to(x_GNI.device)
                        x_GNI, y_GNO = x_GNI[:, places], y_GNO[:, places]
                    yield Piece(x_GNI, y_GNO, is_held_out)


def held_out(samples: int, index: int, count: int) -> tuple[range, range]:
    """Return which samples of a batch are solved on, and which tried on: whole batches where there are several."""
    if count > 1:
        edge = 0 if index % 5 == min(count, 5) - 1 else samples
    else:
        edge = samples - samples // 4
    return range(edge), range(edge, samples)


@contextmanager
def after(modules: Iterable[nn.Module], note: Callable[..., None]) -> Iterator[None]:
    """Let a function hear each forward of some modules: module, args, kwargs, output."""
    handles = [m.register_forward_hook(note, with_kwargs=True) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
