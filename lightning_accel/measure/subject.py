"""From a model and its example calls to callables that can be timed, on both sides alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_accel.measure.flops import MacsCount, count_run, eval_mode
from lightning_accel.measure.report import MeasuredModel, Report, measure_pair
from lightning_accel.progress import progress
from lightning_accel.surgery import Structure
from lightning_accel.surgery.bypass import is_under
from lightning_accel.surgery.call import Call, batch_size, first, parameters_of, run, tensors

Context = Callable[[], AbstractContextManager[Any]]


class Runnable(NamedTuple):
    """A model to time, an uncompiled one of the same shape to count, its calls and its contexts."""

    model: nn.Module
    eager: nn.Module
    calls: Sequence[Call]
    forward_context: Context = nullcontext
    step_context: Context = nullcontext


@progress("measuring the network beside what it was")  # one line for all of it
def measure_subjects(
    dense: Runnable,
    final: Runnable,
    *,
    device: torch.device | str = "cpu",
    budget_s: float = 10.0,
    report: Report,
) -> Report:
    """Fill `report` by running both sides: forward in eval mode, then steps in their training mode.

    What fails on a side (a batch of one, a backward) is left out with a note that says why.

    >>> net = nn.Linear(4, 2)
    >>> side = Runnable(net, net, [Call("", (torch.ones(8, 4),), {})])
    >>> sorted(measure_subjects(side, side, budget_s=0.1, report=Report()).final.latency_ms)
    ['1', '8']
    """
    sides = dense, final
    macs = [_counted(side, report) for side in sides]
    counted = [MeasuredModel(s.model, {}, macs=found) for s, found in zip(sides, macs, strict=True)]
    measure_pair(counted[0], counted[1], report=report)
    _tell_idle(final, report)
    whole = batch_size(dense.calls)
    # The training batch first: compiled code is made for the first size it meets.
    sizes = [] if whole is None else sorted({1, whole}, reverse=True)
    share_s = budget_s / (len(sizes) + 1)
    with eval_mode(dense.model), eval_mode(final.model):
        for size in sizes:
            calls = [{size: forward(side, size)} for side in sides]
            if _both_run(f"latency at batch {size}", calls, size, report):
                pair = [MeasuredModel(s.model, call) for s, call in zip(sides, calls, strict=True)]
                measure_pair(pair[0], pair[1], device=device, budget_s=share_s, report=report)
    for times in (report.dense.latency_ms, report.final.latency_ms, report.ratios.latency):
        ascending = sorted(times.items(), key=lambda item: int(item[0]))
        times.clear()
        times.update(ascending)
    steps = [{0: training_step(side)} for side in sides]
    if _both_run("training steps/s", steps, 0, report):
        pair = [
            MeasuredModel(s.model, {}, step=step[0]) for s, step in zip(sides, steps, strict=True)
        ]
        measure_pair(pair[0], pair[1], device=device, budget_s=share_s, report=report)
    return report


def _tell_idle(side: Runnable, report: Report) -> None:
    """Say which share of the parameters is in networks that are counted and not run: teachers, averages."""
    whole = sum(p.numel() for p in side.eager.parameters())
    idle = whole - sum(p.numel() for p in parameters_of(side.eager, side.calls).values())
    if idle:
        report.note(
            f"parameters are those of the whole module, {idle:,} of them in networks that the calls measured "
            "here do not run, such as a teacher or an average"
        )


def count(side: Runnable) -> MacsCount:
    """Count the multiply-accumulates of one sample."""
    with side.forward_context():
        found = count_run(lambda: run(side.eager, side.calls), side.eager)
    return found._replace(macs=round(found.macs / (batch_size(side.calls) or 1)))


def forward(side: Runnable, size: int) -> Callable[[], list[Any]]:
    """Return a forward on the first `size` samples, which returns outputs; training flags are the caller's business."""
    calls = side.calls if size == batch_size(side.calls) else first(side.calls, size)

    lazy = any(t.device.type == "xla" for c in calls for t in tensors((c.args, c.kwargs)))
    without = torch.no_grad if lazy else torch.inference_mode  # XLA's views have no inference mode

    def call() -> list[Any]:
        with without(), side.forward_context():
            return run(side.model, calls)

    return call


def training_step(side: Runnable) -> Callable[[], Any]:
    """Return a forward and a backward on the whole batch, which returns gradients and leaves all others alone."""
    params = [p for p in side.model.parameters() if p.requires_grad]

    def call() -> Any:
        with torch.enable_grad(), side.step_context():
            outputs = tree_leaves(run(side.model, side.calls))
            losses = [
                t.float().mean() for t in outputs if isinstance(t, Tensor) and t.requires_grad
            ]
            loss = torch.stack(losses).sum()
        return torch.autograd.grad(
            loss, params, allow_unused=True
        )  # `backward` would write to `.grad`

    return call


def num_samples(batch: Any) -> int | None:
    """Return the size of dimension 0 of the first tensor of a batch, or of the first list of texts.

    >>> num_samples({"image": [torch.ones(8, 3)], "label": torch.ones(8)})
    8
    """
    # On every step: the usual kinds first, and no abstract class, whose check takes a microsecond.
    if isinstance(batch, Tensor):
        shape = batch.shape
        return shape[0] if shape else None
    if isinstance(batch, dict):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        if batch and isinstance(batch[0], str):
            return len(batch)
        for item in batch:
            size = num_samples(item)
            if size is not None:
                return size
        return None
    leaves = tree_leaves(batch)
    return None if leaves == [batch] else num_samples(leaves)


def restore(model: nn.Module, structure: Structure) -> None:
    """Give `model` an earlier structure, with small random values wherever that made room.

    >>> net = nn.Linear(4, 2)
    >>> restore(net, Structure.of(nn.Linear(4, 8)))
    >>> net(torch.ones(4)).shape, bool(net.weight.any())
    (torch.Size([8]), True)
    """
    resized = {change.name for change in structure.apply(model).changes}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        anew = name in resized or is_under(name, resized)  # of a block that was put back
        if anew and tensor.is_floating_point():
            _fill(name, tensor)


@torch.no_grad()
def _fill(name: str, tensor: Tensor) -> None:
    """Fill so that activations keep their size: neither denormals nor infinities slow a kernel."""
    if tensor.dim() >= 2:
        tensor.normal_(std=max(1, tensor[0].numel()) ** -0.5)
    elif name.rsplit(".", 1)[-1] in ("bias", "running_mean"):
        tensor.zero_()
    else:
        tensor.fill_(1.0)  # scales and variances


def localise_norms(model: nn.Module) -> bool:
    """Make every `SyncBatchNorm` local in place, so that one rank can run alone; say if any was.

    >>> localise_norms(nn.Sequential(nn.SyncBatchNorm(2))), localise_norms(nn.BatchNorm1d(2))
    (True, False)
    """
    found = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    for module in found:
        module.__class__ = _LocalBatchNorm  # type: ignore[assignment]
    return bool(found)


class _LocalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over any number of dimensions, of this process alone."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept what `SyncBatchNorm` accepts."""


def _counted(side: Runnable, report: Report) -> MacsCount | None:
    try:
        return count(side)
    except Exception as error:
        report.note(f"MACs are left out: {_reason(error)}")
        return None


def _both_run(
    what: str, calls: Sequence[dict[int, Callable[[], Any]]], key: int, report: Report
) -> bool:
    try:
        for side in calls:
            side[key]()
    except Exception as error:
        report.note(f"{what} is left out: {_reason(error)}")
        return False
    return True


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
