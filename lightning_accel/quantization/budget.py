"""What quantization costs, layer by layer, and which layers to leave in floating point so that a metric holds.

Layers are ranked by what each costs alone, as the signal-to-noise ratio of the network's outputs on the calibration
batches with this layer quantized and no other. The worst are put back until the user's metric is within its bounds; how many
is found by halving.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_accel.errors import AccelError, explain
from lightning_accel.quantization.calibration import in_mode
from lightning_accel.quantization.layers import QuantizedLayer, unbecome
from lightning_accel.surgery import Change
from lightning_accel.surgery.call import Call, reals, run

Metric = Callable[[nn.Module], float]
_CONSTANT = 1e4
_FEW = 4
"""Batches on which outputs are compared."""


@torch.no_grad()
def outputs_of(
    model: nn.Module, batches: Sequence[Sequence[Call]], most: int | None = _FEW
) -> list[Tensor]:
    """Return the real outputs of the first few batches, or of all."""
    return [value.float() for calls in batches[:most] for value in reals(run(model, calls))]


def sqnr_db(whole: Sequence[Tensor], made: Sequence[Tensor]) -> float:
    """Return the signal-to-quantization-noise ratio of outputs, in decibels; infinite where they are equal.

    Large constants that a network writes over its outputs, as masks do, are no signal, and left out.

    >>> sqnr_db([torch.tensor([10.0, -1e9])], [torch.tensor([11.0, -1e9])])
    20.0
    """
    signal = noise = 0.0
    for one, other in zip(whole, made, strict=True):
        before, after = one.double(), other.double()
        told = (before != after) | (before.abs() < _CONSTANT)
        signal += float(before[told].square().sum())
        noise += float((before - after)[told].square().sum())
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal and math.isfinite(noise) else -math.inf


def least_db(whole: Sequence[Tensor], made: Sequence[Tensor]) -> float:
    """Return the ratio of the output that is worst off.

    >>> one, two = torch.tensor([1000.0]), torch.tensor([1.0])
    >>> least_db([one, two], [one, 1.1 * two]) < 21 < sqnr_db([one, two], [one, 1.1 * two])
    True
    """
    pairs = zip(whole, made, strict=True)
    return min((sqnr_db([one], [other]) for one, other in pairs), default=math.inf)


def measured(metric: Metric, model: nn.Module) -> float:
    """Return the user's metric of a network, in eval mode and without gradients.

    Raises:
        ValueError: It is no finite number.
        TypeError: It is no number.
    """
    with torch.no_grad():
        value = float(metric(model.eval()))
    if not math.isfinite(value):
        raise ValueError(
            explain("`metric` gives a finite number", repr(value), "return one, higher is better")
        )
    return value


def sensitivity(
    model: nn.Module, layers: Mapping[str, QuantizedLayer], batches: Sequence[Sequence[Call]]
) -> dict[str, float]:
    """Return the ratio of `sqnr_db` that is left with each layer quantized alone, the most costly first."""
    with in_mode(layers, "plain"):
        whole = outputs_of(model, batches)
        found = {}
        for name, layer in layers.items():
            with in_mode({name: layer}, "quantized"):
                found[name] = sqnr_db(whole, outputs_of(model, batches))
    return dict(sorted(found.items(), key=lambda item: item[1]))


@torch.no_grad()
def put_back(layer: nn.Module, weights: Sequence[Tensor]) -> None:
    """Give a layer the values that its parameters had."""
    for parameter, value in zip(layer.parameters(recurse=False), weights, strict=True):
        parameter.copy_(value)


def values_of(layer: nn.Module) -> list[Tensor]:
    """Return copies of a layer's own parameters."""
    return [parameter.detach().clone() for parameter in layer.parameters(recurse=False)]


@contextmanager
def _unrounded(
    layers: Mapping[str, QuantizedLayer], weights: Mapping[str, Sequence[Tensor]]
) -> Iterator[None]:
    rounded = {name: values_of(layer) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            put_back(layer, weights[name])
        with in_mode(layers, "plain"):
            yield
    finally:
        for name, layer in layers.items():
            put_back(layer, rounded[name])


def within(
    model: nn.Module,
    layers: dict[str, QuantizedLayer],
    metric: Metric,
    before: float,
    max_drop: float | None,
    batches: Sequence[Sequence[Call]],
    weights: Mapping[str, Sequence[Tensor]],
) -> tuple[list[Change], str]:
    """Make plain layers of those that cost too much, in place and in `layers`; return which, and what was measured.

    What stays in floating point has its weights of before they were rounded, `weights`, also while it is measured.

    Raises:
        AccelError: The metric falls by more with a single layer quantized.
    """
    after = measured(metric, model)
    if max_drop is None or before - after <= max_drop:
        return [], f"metric {before:.6g} -> {after:.6g}"
    costs = sensitivity(model, layers, batches)
    worst = [*costs]
    fewest, most = (
        1,
        len(worst),
    )  # so many are left: the second is enough, one less than the first is not
    reached = {most: before}
    while fewest < most:
        count = (fewest + most) // 2
        with _unrounded({name: layers[name] for name in worst[:count]}, weights):
            reached[count] = measured(metric, model)
        if before - reached[count] <= max_drop:
            most = count
        else:
            fewest = count + 1
    if most == len(worst):
        raise AccelError(
            f"the metric falls by more than max_drop={max_drop:g}, whichever layers stay in floating point",
            f"{before:.6g} before, {after:.6g} with all {len(worst)} layers quantized",
            "allow more, or quantize finer: more bits, `observer`, `rounding`",
        )
    for name in worst[:most]:
        put_back(layers[name], weights[name])
        unbecome(layers.pop(name))
    left = [
        Change(name, f"it costs most: {costs[name]:.1f} dB are left with it alone quantized")
        for name in worst[:most]
    ]
    return left, f"metric {before:.6g} -> {reached[most]:.6g}, all layers quantized: {after:.6g}"
