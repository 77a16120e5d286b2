"""The order in which residual blocks go, by the error that they leave for what they save.

Blocks stand in for each other, so after each one that goes the others are measured anew, as far as they could be the
next (the greedy order of ShortGPT, Men et al. 2024, arXiv:2403.03853, but by the change of the network's outputs
without all that are gone together, in place of the similarity of one block's input and output).
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_accel.measure.flops import eval_mode
from lightning_accel.pruning.blocks import Block
from lightning_accel.pruning.leftover import Leftover
from lightning_accel.pruning.target import Latency, Target, at_batch_of
from lightning_accel.surgery import twin
from lightning_accel.surgery.bypass import replace, stand_in
from lightning_accel.surgery.call import Call, run

_RUNS, _SECONDS = 5, 0.5  # of a profile, at least and at most


class BlockOrder:
    """The order in which blocks go: next is what leaves least error per what is saved with all that are gone.

    Args:
        network: The network with all of its blocks.
        blocks: Those that can go.
        leftover: Measures the error.
        target: What they are to save; without one, all save the same.
        calls: Example calls.
        until: When to stop measuring anew, by the monotonic clock.
    """

    def __init__(
        self,
        network: nn.Module,
        blocks: Sequence[Block],
        leftover: Leftover,
        target: Target | None,
        calls: Sequence[Call],
        until: float,
    ) -> None:
        self.blocks = list(blocks)
        self.leftover = leftover
        self._until = until
        self._work = twin(network)
        self._pairs = {
            b.name: (block := self._work.get_submodule(b.name), stand_in(block, b.handing))
            for b in blocks
        }
        self._saved = self._savings(target, calls)
        self._steps: list[Block] = []
        self._rest = self._ranked()

    def saved(self, some: Sequence[Block]) -> float:
        """Return about what share of the target's unit some blocks are."""
        names = {b.name for b in some}
        outer = (n for n in names if not any(n.startswith(f"{other}.") for other in names))
        return sum(self._saved[name] for name in outer)

    def first(self, count: int) -> list[Block]:
        """Return the blocks that go first; as many as there are."""
        while len(self._steps) < count:
            step = next(self._rest, None)
            if step is None:
                break
            self._steps.append(step)
        return self._steps[:count]

    def error(self, some: Sequence[Block]) -> float:
        """Return the error that is left without some blocks."""
        with self._without([b.name for b in some]):
            return self.leftover.of(self._work)

    def _ranked(self) -> Iterator[Block]:
        taken: list[Block] = []
        heap = [(self._score([b]), n, 0) for n, b in enumerate(self.blocks)]
        heapq.heapify(heap)
        while heap:
            _, number, known = heapq.heappop(heap)
            block = self.blocks[number]
            if any(block.name.startswith(f"{b.name}.") for b in taken):
                continue  # it went with a larger one
            if known < len(taken) and time.monotonic() < self._until:
                heapq.heappush(heap, (self._score([*taken, block]), number, len(taken)))
                continue
            taken.append(block)
            yield block

    def _score(self, some: Sequence[Block]) -> float:
        return self.error(some) / max(self.saved(some), 1e-9)

    def _savings(self, target: Target | None, calls: Sequence[Call]) -> dict[str, float]:
        if target is None:
            return {b.name: 1 / len(self.blocks) for b in self.blocks}
        if isinstance(target, Latency):
            return _shares_of_time(self._work, list(self._pairs), at_batch_of(target, calls))
        found = {}
        whole = twin(self._work)
        for block in self.blocks:
            with self._without([block.name]):
                found[block.name] = 1 - target.compared(whole, self._work, calls)
        return found

    @contextmanager
    def _without(self, names: Sequence[str]) -> Iterator[None]:
        outer = [n for n in names if not any(n.startswith(f"{o}.") for o in names)]
        try:
            for name in outer:
                replace(self._work, *self._pairs[name])
            yield
        finally:
            for name in outer:
                block, bypassed = self._pairs[name]
                replace(self._work, bypassed, block)


def _shares_of_time(
    network: nn.Module, names: Sequence[str], calls: Sequence[Call]
) -> dict[str, float]:
    """Return which share of the time of a forward each block takes, by the median of some runs."""
    device = next(network.parameters()).device
    spent = {name: [0.0] for name in ["", *names]}
    begun: list[float] = []

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def begin(*_: Any) -> None:
        begun.append(now())

    def end(name: str, *_: Any) -> None:
        spent[name][-1] += now() - begun.pop()

    handles = []
    for name in names:
        module = network.get_submodule(name)
        handles.append(module.register_forward_pre_hook(begin, prepend=True))
        handles.append(module.register_forward_hook(partial(end, name)))
    start, runs = time.perf_counter(), 0
    try:
        with torch.inference_mode(), eval_mode(network):
            run(network, calls)  # warm up
            for values in spent.values():
                values.clear()
            while runs < _RUNS or time.perf_counter() - start < _SECONDS:
                for values in spent.values():
                    values.append(0.0)
                first = now()
                run(network, calls)
                spent[""][-1] = now() - first
                runs += 1
    finally:
        for handle in handles:
            handle.remove()
    shares = {
        name: [a / max(b, 1e-12) for a, b in zip(spent[name], spent[""], strict=True)]
        for name in names
    }
    return {name: float(torch.tensor(values).median()) for name, values in shares.items()}
