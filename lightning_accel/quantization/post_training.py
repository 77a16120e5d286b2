"""A trained network quantized, with a few batches and no training: planned on a copy, and then done.

All that can fail is tried on the copy: which layers are called, what comes into them, how their weights are rounded, and
what the user's own metric says. The network itself is changed by a last step that only copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_accel.arguments import flag, instance, number, one_of, whole
from lightning_accel.errors import NoEffect, explain
from lightning_accel.progress import progress
from lightning_accel.quantization import choose
from lightning_accel.quantization import grid as grids
from lightning_accel.quantization.budget import (
    Metric,
    measured,
    outputs_of,
    sqnr_db,
    values_of,
    within,
)
from lightning_accel.quantization.calibration import OBSERVERS, calls_from, observe
from lightning_accel.quantization.equalize import EQUALIZE, equalize
from lightning_accel.quantization.fast_paths import back_to_fast_paths, leave_fast_paths
from lightning_accel.quantization.grid import Grid
from lightning_accel.quantization.layers import (
    QuantizedLayer,
    become,
    is_idle,
    layers_of,
    unbecome,
)
from lightning_accel.quantization.rounding import ROUNDINGS, refine
from lightning_accel.quantization.shared import share_alike
from lightning_accel.quantization.state import become_like, state_of
from lightning_accel.quantization.sums import (
    capture_anew,
    carry_over_outputs,
    leave_output,
    outputs_rounded,
    round_sums,
)
from lightning_accel.surgery import Change, Receipt, twin
from lightning_accel.surgery.acting import nothing_heard
from lightning_accel.surgery.call import Call
from lightning_accel.surgery.preserve import preserve_rng


class Plan(NamedTuple):
    """How to quantize: what `quantize` takes."""

    grid: Grid
    select: Any
    observer: Any
    rounding: Any
    correct_bias: bool
    sums: bool
    equalize: Any
    metric: Metric | None
    max_drop: float | None

    @property
    def reads(self) -> bool:
        """Whether anything is found by calibration."""
        finds = self.grid.has_range or self.rounding != "nearest" or self.equalize is not None
        return finds or self.correct_bias or self.metric is not None


def plan_of(
    *,
    weights: str,
    activations: str | None,
    group: int | None,
    select: Any,
    observer: str,
    rounding: str,
    correct_bias: bool,
    sums: bool = False,
    equalize: str | None = None,
    metric: Metric | None = None,
    max_drop: float | None = None,
) -> Plan:
    """Check arguments.

    Raises:
        ValueError: One is out of range, `max_drop` has nothing to measure, or `sums` no integers to add.
        TypeError: One is of another type.
    """
    one_of("observer", observer, OBSERVERS)
    one_of("rounding", rounding, ROUNDINGS)
    flag("correct_bias", correct_bias)
    number("max_drop", max_drop, least=0.0, none=True)
    do = "pass one that gets a network and returns a number"
    instance("metric", metric, Callable, "a function", do, none=True)
    if max_drop is not None and metric is None:
        raise ValueError(
            explain(
                "`max_drop` is how much a metric may fall",
                f"max_drop={max_drop} without a metric",
                "pass `metric`, a function that gives a number for a network",
            )
        )
    grid = grids.check(weights, activations, group)
    if flag("sums", sums) and not grid.has_range:
        do = "pass activations='int8', or leave out `sums`"
        raise ValueError(
            explain("`sums` of integers need integers", f"activations={activations!r}", do)
        )
    one_of("equalize", equalize, EQUALIZE, none=True)
    return Plan(grid, select, observer, rounding, correct_bias, sums, equalize, metric, max_drop)


def quantize(
    model: nn.Module,
    *,
    calibration: Any,
    weights: str = "int8",
    activations: str | None = "int8",
    group: int | None = None,
    select: Any = None,
    observer: str = "mse",
    rounding: str = "least_squares",
    correct_bias: bool = True,
    sums: bool = False,
    equalize: str | None = None,
    metric: Metric | None = None,
    max_drop: float | None = None,
    batches: int = 32,
) -> Receipt:
    """Let layers of a trained network compute on integers' grids, in place; `deploy` makes real integers of it.

    The network stays the same modules with the same names, and gives what the integer kernels will give; it is neither
    smaller nor faster before it is deployed. `unquantize` makes plain layers of them again.

    Args:
        model: The network; its train flags and random states stay.
        calibration: A few batches of the training data, as a DataLoader gives them: the first items of each that
            `forward` takes; a dict of its keywords; or a tensor. `None` where nothing is found by them: without "int8"
            activations, with rounding="nearest", correct_bias=False and no metric.
        weights: "int8", "int4", "int3" or "int2".
        activations: "int8" for what comes into layers, on ranges found here; "dynamic", on that of each call, for linear
            layers: an answer depends on what else is in its batch then; or `None` for weights alone.
        group: Inputs of a linear layer that share a scale, for weights alone; `None` is one per output.
        select: Which layers: a `Select`, a name pattern or several; all by default.
        observer: The range of what comes in: "minmax", "percentile" (99.99 %), or "mse", of least error.
        rounding: "nearest"; "least_squares": so that outputs change little (GPTQ, and descent after it); or "adaround": up
            or down as learned for that, which takes some thirty times as long. The latter two change the weights.
        correct_bias: Take the shift of the mean output off the bias.
        sums: Round what is added to outputs of layers as well, so that kernels add integers; at most at a cost of 3 dB.
        equalize: Make channels alike first: "cross_layer", the weights on both sides of a layer's output, or "smoothquant",
            what comes from norms and the weights that read it. Both change weights, not what the network computes.
        metric: Gives a number for a network, higher is better.
        max_drop: By how much the metric may fall; layers that cost most stay in floating point until it does not.
        batches: Of `calibration`, how many are read.

    Raises:
        NoEffect: No layer is left to quantize.
        AccelError: The metric falls by more whatever is left in floating point.
        ValueError: An argument is out of range, or calibration has no batch or values that are not finite.
        TypeError: An argument is of another type.

    Returns:
        A receipt: what became of each layer, what was left and why, and what was lost.

    >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> receipt = quantize(net, calibration=[torch.randn(64, 8)])
    >>> receipt.changes[0].after, type(net[0]).__name__
    ('int8 weights per output channel, int8 inputs', 'QuantizedLinear')
    """
    plan = plan_of(
        weights=weights,
        activations=activations,
        group=group,
        select=select,
        observer=observer,
        rounding=rounding,
        correct_bias=correct_bias,
        sums=sums,
        equalize=equalize,
        metric=metric,
        max_drop=max_drop,
    )
    whole("batches", batches)
    _require_module(model)
    if calibration is None and not plan.reads:
        return quantize_by(model, plan, [])
    return quantize_by(model, plan, calls_from(model, calibration, batches))


@progress("quantizing")
def quantize_by(model: nn.Module, plan: Plan, batches: Sequence[Sequence[Call]]) -> Receipt:
    """Quantize a network by a plan, with calls of its modules to calibrate on."""
    receipt = choose.require(model, plan.select, plan.grid)
    with preserve_rng(), nothing_heard(model):
        copy = twin(model, hooked=True).eval()
        share_alike(copy, model)
        before = outputs_of(copy, batches)
        made, left, notes = _planned(copy, plan, batches, [c.name for c in receipt.changes])
        lost = sqnr_db(before, outputs_of(copy, batches))
    skipped = (*receipt.skipped, *left)
    if not made:
        raise choose.no_effect(model, skipped)
    _carry_over(copy, model, made)
    changes = tuple(change for change in receipt.changes if change.name in made)
    told = [f"outputs on the calibration: {lost:.1f} dB"] if batches else []
    return Receipt(changes, (), skipped, (*told, *notes))


def unquantize(model: nn.Module) -> int:
    """Make all quantized layers plain ones again, in place, and return how many; weights stay as they are.

    >>> unquantize(nn.Linear(2, 2))
    0
    """
    _require_module(model)
    layers = layers_of(model)
    for layer in layers.values():
        unbecome(layer)
    if outputs_rounded(model):
        capture_anew()
    for module in model.modules():
        leave_output(module)
    back_to_fast_paths(model)
    return len(layers)


def _require_module(model: Any) -> None:
    do = "pass a LightningModule or any other nn.Module"
    instance("model", model, nn.Module, "a module", do)


def _planned(
    copy: nn.Module, plan: Plan, batches: Sequence[Sequence[Call]], names: list[str]
) -> tuple[list[str], list[Change], list[str]]:
    """Quantize a copy; return which layers are, which are left and why, and what else to tell."""
    before = None if plan.metric is None else measured(plan.metric, copy)
    layers = {name: become(copy.get_submodule(name), plan.grid, "plain") for name in names}
    leave_fast_paths(copy)
    told = [] if plan.equalize is None else _equalized(copy, layers, batches, plan)
    weights = {name: values_of(layer) for name, layer in layers.items()}
    ranges = observe(copy, layers, batches, plan.observer)
    for name, range_ in ranges.items():
        if plan.grid.has_range:
            layers[name].set_range(range_)
    for layer in layers.values():
        layer.fit_scale()
    idle = [n for n, layer in layers.items() if batches and (n not in ranges or is_idle(layer))]
    for name in idle:
        unbecome(layers.pop(name))
    stays = refine(copy, layers, batches, rounding=plan.rounding, correct_bias=plan.correct_bias)
    for layer in layers.values():
        layer.accel_mode = "quantized"
    added = round_sums(copy, layers, batches, plan.observer) if plan.sums else {}
    left = [Change(name, "nothing comes into it on the calibration batches") for name in idle]
    notes = told + stays
    notes += [f"`{n}` saw one single value in all of the calibration" for n in _constant(layers)]
    if plan.metric is not None and before is not None:
        found, measures = within(copy, layers, plan.metric, before, plan.max_drop, batches, weights)
        left += found
        notes.append(measures)
    if plan.sums:
        for name in [name for name, place in added.items() if not place.needs <= {*layers}]:
            leave_output(copy.get_submodule(name))
        notes.append(f"sums of integers: {len(outputs_rounded(copy))}")
    return [*layers], left, notes


def _equalized(
    copy: nn.Module, layers: Mapping[str, QuantizedLayer], batches: Any, plan: Plan
) -> list[str]:
    """Equalize channels of a copy; return what to tell.

    Raises:
        NoEffect: There is nothing to equalize.
    """
    made, left = equalize(copy, layers, batches, plan.equalize)
    if not made:
        raise NoEffect(
            f"equalize={plan.equalize!r} has nothing to act on",
            "; ".join(left[:4])
            or "no norm (or layer, for cross_layer) whose outputs reach layers alone, past ReLU and the like",
            "leave `equalize` out",
        )
    return [f"{len(made)} outputs equalized ({plan.equalize})", *left]


def _constant(layers: Mapping[str, QuantizedLayer]) -> list[str]:
    return [
        name
        for name, layer in layers.items()
        if layer.accel_known and layer.accel_range[0] == layer.accel_range[1]
    ]


def _carry_over(copy: nn.Module, model: nn.Module, names: Sequence[str]) -> None:
    """Make the layers of the model what those of the copy are."""
    for name in names:
        done, layer = copy.get_submodule(name), model.get_submodule(name)
        assert isinstance(done, QuantizedLayer)
        become_like(layer, state_of(done))
        with torch.no_grad():
            for key, parameter in layer.named_parameters(recurse=False):
                parameter.copy_(done.get_parameter(key))
    with torch.no_grad():  # of norms and of what stays plain, where channels were equalized
        for name, given in copy.named_parameters():
            old = model.get_parameter(name)
            if not torch.equal(old, given.to(old.device)):
                old.copy_(given)
    carry_over_outputs(copy, model)
    leave_fast_paths(model)
