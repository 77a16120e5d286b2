"""From a budget to the channels that must go: arithmetic, parameters, time on this device, memory.

Channels are the wrong interface for a budget: half of them leave anything from a fifth to two thirds of
the arithmetic, and a third less arithmetic may take as long as before. So the share of channels is found
by bisection on what the budget is about: counted exactly for `Macs` and `Params`, counted on a copy for
`Memory`, measured in short blocks beside the dense network for `Latency`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_accel.arguments import finite, open_share, whole
from lightning_accel.errors import NoEffect
from lightning_accel.measure.flops import count_macs, eval_mode
from lightning_accel.measure.memory import model_size, peak_memory
from lightning_accel.measure.timing import Comparison, compare
from lightning_accel.progress import progress
from lightning_accel.pruning.graph import RemovedUnits
from lightning_accel.pruning.search import MOST, Pick, bisect, closest, measured
from lightning_accel.surgery import Cut, twin
from lightning_accel.surgery.call import Call, batch_size, parameters_of, run

_REPEATS = 3


class Prunable(Protocol):
    """What a target needs of `graph.Graph`."""

    model: nn.Module
    calls: tuple[Call, ...]
    groups: list[Any]

    def cut(self, gone: RemovedUnits) -> Cut: ...
    def macs(self, gone: RemovedUnits) -> float: ...
    def params(self, gone: RemovedUnits) -> int: ...


@dataclass(frozen=True)
class Target(ABC):
    """A share to keep, above 0 and below 1, of something that the network needs before it is pruned."""

    share: float

    unit: ClassVar[str]
    is_measured: ClassVar[bool] = False
    """Whether two equal questions may get two answers."""

    def __post_init__(self) -> None:
        open_share(f"{type(self).__name__}.share", self.share)

    @abstractmethod
    def compared(self, before: nn.Module, after: nn.Module, calls: Sequence[Call]) -> float:
        """Return what `after` needs as a share of what `before` needs for the same calls."""

    def of(self, calls: Sequence[Call]) -> Self:
        """Take from the user's own example what was left open."""
        return self

    def of_rest(self, share: float) -> Self:
        """Return this target for another share.

        Raises:
            NoEffect: There is nothing left to remove.
        """
        if share >= 1:
            raise NoEffect("what was removed already is more than is due", f"{share:.0%} may stay")
        return dataclasses.replace(self, share=share)

    def kept(self, graph: Prunable, gone: RemovedUnits) -> float:
        """Return the share of the present network's need that is left without `gone`."""
        after = twin(graph.model)
        graph.cut(gone).apply(after)
        return self.compared(graph.model, after, graph.calls)

    def reach(self, graph: Prunable, pick: Pick) -> RemovedUnits:
        """Return what has to go so that just no more than the share is left.

        Raises:
            NoEffect: Even almost all channels of these groups leave more.
        """
        self._require(self.kept(graph, pick(MOST)))
        return bisect(pick, partial(self.kept, graph), self.share).enough

    def _require(self, least: float) -> None:
        if least > self.share:
            raise NoEffect(
                f"the network cannot be pruned to {self.share:.0%} of its {self.unit}",
                f"{least:.0%} remain when one channel per prunable layer is left",
                "raise the share of the target, or widen `select`",
            )

    def describe(self, achieved: float, device: torch.device | str = "cpu") -> str:
        """Write what was reached and what was asked for, with its unit and, if it matters, the device.

        >>> Macs(0.5).describe(0.4912)
        '49.1 % of the multiply-accumulates (asked: 50 %)'
        >>> Latency(0.5, batch_size=32).describe(0.49)
        '49.0 % of the milliseconds of a forward at batch 32 on cpu (asked: 50 %)'
        """
        what = self.unit
        batch_size = getattr(self, "batch_size", None)
        if batch_size:
            what += f" at batch {batch_size} on {device}"
        return f"{100 * achieved:.1f} % of the {what} (asked: {100 * self.share:.3g} %)"


@dataclass(frozen=True)
class Macs(Target):
    """Keep this share of the multiply-accumulates.

    >>> Macs(0.5).share
    0.5
    """

    unit: ClassVar[str] = "multiply-accumulates"

    def compared(self, before: nn.Module, after: nn.Module, calls: Sequence[Call]) -> float:
        return macs_of(after, calls) / macs_of(before, calls)

    def kept(self, graph: Prunable, gone: RemovedUnits) -> float:
        return graph.macs(gone) / graph.macs({})

    def reach(self, graph: Prunable, pick: Pick) -> RemovedUnits:
        self._require(self.kept(graph, pick(MOST)))
        return closest(graph.groups, pick, partial(self.kept, graph), self.share)


@dataclass(frozen=True)
class Params(Target):
    """Keep this share of the parameters of the networks that are called, and so not of averages or teachers."""

    unit: ClassVar[str] = "parameters"

    def compared(self, before: nn.Module, after: nn.Module, calls: Sequence[Call]) -> float:
        counts = [
            sum(p.numel() for p in parameters_of(model, calls).values())
            for model in (after, before)
        ]
        return counts[0] / counts[1]

    def kept(self, graph: Prunable, gone: RemovedUnits) -> float:
        return graph.params(gone) / graph.params({})

    def reach(self, graph: Prunable, pick: Pick) -> RemovedUnits:
        self._require(self.kept(graph, pick(MOST)))
        return closest(graph.groups, pick, partial(self.kept, graph), self.share)


@dataclass(frozen=True)
class Memory(Target):
    """Keep this share of the bytes that a forward needs: weights, buffers and its peak beyond them.

    Args:
        share: Share to keep.
        batch_size: Samples of the forward; `None` takes as many as the example has.
    """

    batch_size: int | None = None

    unit: ClassVar[str] = "bytes at the peak of a forward"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("Memory.batch_size", self.batch_size, none=True)

    def of(self, calls: Sequence[Call]) -> Self:
        return dataclasses.replace(self, batch_size=self.batch_size or batch_size(calls))

    def compared(self, before: nn.Module, after: nn.Module, calls: Sequence[Call]) -> float:
        calls = _repeated(calls, self.batch_size)
        need = [_bytes(model, calls) for model in (before, after)]
        return need[1] / need[0]


@dataclass(frozen=True)
class Latency(Target):
    """Keep this share of the time of a forward on the device where the network is, measured there.

    In eval mode, uncompiled, in the number format of the weights. Both networks run in one process, in
    short blocks of random order, so that what disturbs one disturbs the other.

    Args:
        share: Share to keep.
        batch_size: Samples of the forward; `None` takes as many as the example has.
        tolerance: How far the measured share may lie above the one asked for, as a share of it.
        budget_s: Seconds of one measurement; up to three times that on a busy machine. A search takes
            about six measurements.
    """

    batch_size: int | None = None
    tolerance: float = 0.05
    budget_s: float = 1.0

    unit: ClassVar[str] = "milliseconds of a forward"
    is_measured: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        open_share("Latency.tolerance", self.tolerance)
        whole("Latency.batch_size", self.batch_size, none=True)
        finite("Latency.budget_s", self.budget_s, above=0.0, unit="seconds")

    def of(self, calls: Sequence[Call]) -> Self:
        return dataclasses.replace(self, batch_size=self.batch_size or batch_size(calls))

    def compared(self, before: nn.Module, after: nn.Module, calls: Sequence[Call]) -> float:
        return 1.0 / self.measured(before, after, calls).ratio

    @progress("measuring latency")
    def measured(self, before: nn.Module, after: nn.Module, calls: Sequence[Call]) -> Comparison:
        """Return both times, from the least disturbed of up to three measurements."""
        calls = _repeated(calls, self.batch_size)
        best: Comparison | None = None
        with eval_mode(before), eval_mode(after):
            for _ in range(_REPEATS):
                found = compare(
                    _forward(before, calls),
                    _forward(after, calls),
                    device=next(before.parameters()).device,
                    budget_s=self.budget_s,
                )
                if best is None or _doubt(found) < _doubt(best):
                    best = found
                if found.high <= found.low * (1 + self.tolerance) and not found.contended:
                    break  # else something else was running
        assert best is not None
        return best

    def reach(self, graph: Prunable, pick: Pick) -> RemovedUnits:
        left = partial(self.kept, graph)
        least = pick(MOST)
        self._require(left(least))
        # The first guess: where the arithmetic meets the share.
        start = bisect(pick, partial(Macs(self.share).kept, graph), self.share).ratio
        slack = self.tolerance / 2
        return measured(graph.groups, pick, left, self.share, start=start, slack=slack)


def macs_of(model: nn.Module, calls: Sequence[Call]) -> int:
    """Return the multiply-accumulates of the calls."""
    return sum(count_macs(model.get_submodule(c.name), c.args, c.kwargs).macs for c in calls)


def _doubt(found: Comparison) -> float:
    return found.high / found.low / max(found.busy, 0.01)


def at_batch_of(target: Target, calls: Sequence[Call]) -> tuple[Call, ...]:
    """Give the calls as many samples as a target is about."""
    return _repeated(calls, getattr(target, "batch_size", None))


def _repeated(calls: Sequence[Call], size: int | None) -> tuple[Call, ...]:
    """Give the calls a batch of `size` samples by repeating the ones that they have."""
    batch = batch_size(calls)
    if size is None or not batch or batch == size:
        return tuple(calls)

    def repeat(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or value.shape[0] != batch:
            return value
        return value[torch.arange(size, device=value.device) % batch]

    return tuple(Call(c.name, *tree_map(repeat, (c.args, c.kwargs))) for c in calls)


def _forward(model: nn.Module, calls: Sequence[Call]) -> Callable[[], None]:
    def call() -> None:
        with torch.inference_mode():
            run(model, calls)

    return call


def _bytes(model: nn.Module, calls: Sequence[Call]) -> int:
    size, device = model_size(model), next(model.parameters()).device
    with eval_mode(model):
        peak = peak_memory(_forward(model, calls), device=device).peak_bytes
    return size.param_bytes + size.buffer_bytes + peak
