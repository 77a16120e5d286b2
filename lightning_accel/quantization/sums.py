"""Residual sums of integers: both summands lie on grids of eight bits as well.

Integer kernels add maps of integers and write integers; a map in floating point is four times the memory and a pass of its
own (a ResNet is 1.4x faster without), and ONNX Runtime has no integer convolution at all whose output stays one. So the
modules whose outputs are added round them: on the grid of a layer that reads the same output, where one does, and else
on that of a range observed as for layers. A hook does it, which copies keep; without layers on grids there is none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_accel.arguments import instance, one_of, whole
from lightning_accel.errors import NoEffect
from lightning_accel.quantization import grid as grids
from lightning_accel.quantization.budget import least_db, outputs_of, sqnr_db
from lightning_accel.quantization.calibration import (
    OBSERVERS,
    Observer,
    calls_from,
    in_mode,
    observe_outputs,
)
from lightning_accel.quantization.flow import Flow, Key, flow
from lightning_accel.quantization.layers import QuantizedLayer, layers_of
from lightning_accel.surgery import Change, Receipt, twin
from lightning_accel.surgery.acting import nothing_heard
from lightning_accel.surgery.call import Call
from lightning_accel.surgery.preserve import preserve_rng

_MOST_DB = 3.0
"""What sums of integers may cost of the outputs."""


class RoundedOutput:
    """A forward hook that rounds what a module gives to integers of eight bits.

    Args:
        range_: Smallest and largest value, shape (2,).

    >>> layer = nn.ReLU()
    >>> _ = layer.register_forward_hook(RoundedOutput(torch.tensor([0.0, 255.0])))
    >>> layer(torch.tensor([1.4, 300.0]))
    tensor([  1., 255.])
    """

    is_part_of_network = True

    def __init__(self, range_: Tensor) -> None:
        scale, zero = grids.parameters_of(range_.detach().float().cpu())
        self.range = [float(value) for value in range_]
        self.how = (float(scale), int(zero), 0, grids.TOP)
        self.is_lowered = self.is_away = False

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return what the module gave, rounded."""
        if self.is_away or not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        values = output if output.dtype is torch.float32 else output.float()
        if self.is_lowered:
            ops = torch.ops.quantized_decomposed
            whole = ops.quantize_per_tensor.default(values, *self.how, torch.uint8)
            return ops.dequantize_per_tensor.default(whole, *self.how, torch.uint8)
        return torch.fake_quantize_per_tensor_affine(values, *self.how).to(output.dtype)

    def leave_kind(self) -> Callable[[Any], None]:
        """Give outputs as they are, until what this returns is called."""
        self.is_away = True
        return lambda _: setattr(self, "is_away", False)


def outputs_rounded(model: nn.Module) -> dict[str, RoundedOutput]:
    """Return the hooks of modules that round what they give, by name.

    >>> outputs_rounded(nn.Linear(2, 2))
    {}
    """
    return {
        name: hook
        for name, module in model.named_modules()
        for hook in module._forward_hooks.values()
        if isinstance(hook, RoundedOutput)
    }


def round_output(module: nn.Module, range_: Tensor) -> None:
    """Let a module round what it gives, in place of how it did so before."""
    leave_output(module)
    module.register_forward_hook(RoundedOutput(range_))


def leave_output(module: nn.Module) -> None:
    """Let a module give what it computes."""
    for key in [k for k, h in module._forward_hooks.items() if isinstance(h, RoundedOutput)]:
        del module._forward_hooks[key]


def capture_anew() -> None:
    """Forget compiled code, which neither calls hooks that come later nor leaves out those that have gone."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


def quantize_sums(
    model: nn.Module, *, calibration: Any, observer: str = "mse", batches: int = 32
) -> Receipt:
    """Let sums of outputs of quantized layers be sums of integers as well, in place; `unquantize` undoes it.

    `quantize(sums=True)` does it along with the layers; this is for a network that was trained quantized. Weights and
    ranges of layers stay, and so do names in checkpoints, which carry it.

    Args:
        model: The quantized network, whose layers have ranges; its train flags and random states stay.
        calibration: A few batches of the training data, as `quantize` takes them.
        observer: The range of what no layer reads: "minmax", "percentile" or "mse".
        batches: Of `calibration`, how many are read.

    Raises:
        NoEffect: No layer is quantized, or no sum could be one of integers.
        ValueError: An argument is out of range.
        TypeError: An argument is of another type.

    >>> from lightning_accel import quantize
    >>> net = nn.Sequential(nn.Linear(4, 4))
    >>> _ = quantize(net, calibration=[torch.randn(8, 4)])
    >>> quantize_sums(net, calibration=[torch.randn(8, 4)])
    Traceback (most recent call last):
    lightning_accel.errors.NoEffect: no sum ...
    """
    one_of("observer", observer, OBSERVERS)
    whole("batches", batches)
    instance("model", model, nn.Module, "a module", "pass a LightningModule or any other nn.Module")
    calls = calls_from(model, calibration, batches)
    with preserve_rng(), nothing_heard(model):
        copy = twin(model, hooked=True).eval()
        layers = {n: m for n, m in layers_of(copy).items() if m.accel_known}
        before = outputs_of(copy, calls)
        found = round_sums(copy, layers, calls, cast(Observer, observer)) if layers else {}
        lost = sqnr_db(before, outputs_of(copy, calls))
    if not found:
        known = len(outputs_rounded(model))
        raise NoEffect(
            "no sum can be one of integers",
            f"{known} outputs are rounded for sums already"
            if known
            else f"{len(layers)} quantized layers with ranges, and no sum of what they give or read",
            "leave it out; sums in floating point between norms gain nothing by it",
        )
    carry_over_outputs(copy, model)
    changes = [Change(p.name, "output rounded", after="int8 outputs") for p in found.values()]
    return Receipt(tuple(changes), (), (), (f"outputs on the calibration: {lost:.1f} dB",))


def carry_over_outputs(copy: nn.Module, model: nn.Module) -> None:
    """Let modules of the model round what those of the copy do."""
    for name, hook in outputs_rounded(copy).items():
        round_output(model.get_submodule(name), torch.tensor(hook.range))
    if outputs_rounded(model):
        capture_anew()


class Place(NamedTuple):
    """A module whose output is to be rounded.

    Attributes:
        name: Of the module.
        reader: A layer that reads the same output; "" where none does.
        needs: The layers without which it is in vain.
    """

    name: str
    reader: str
    needs: frozenset[str]


@torch.no_grad()
def round_sums(
    model: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    batches: Sequence[Sequence[Call]],
    observer: Observer,
) -> dict[str, Place]:
    """Let modules round what is added, in place; return which.

    A stream of sums that norms read, whose small channels they make large, loses much by it: sums that would cost more than
    three decibels of the outputs together stay in floating point.

    Args:
        model: In eval mode.
        layers: Its layers, with known ranges.
        batches: To observe those outputs on that no layer reads.
        observer: How their ranges are found.
    """
    found = {place.name: place for place in places(model, layers, batches[0])}
    if not found:
        return {}
    alone = [place.name for place in found.values() if not place.reader]
    ranges = observe_outputs(model, alone, batches, observer)
    ranges |= {p.name: layers[p.reader].accel_range for p in found.values() if p.reader}
    kept = _affordable(
        model, layers, batches, [p for p in found.values() if p.name in ranges], ranges
    )
    for place in kept:
        round_output(model.get_submodule(place.name), ranges[place.name])
    return {place.name: place for place in kept}


def _affordable(
    model: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    batches: Sequence[Sequence[Call]],
    found: Sequence[Place],
    ranges: Mapping[str, Tensor],
) -> list[Place]:
    """Return as many places as the outputs can bear, the cheapest sums first."""
    with in_mode(layers, "plain"):
        whole = outputs_of(model, batches)

    def left_db(places: Sequence[Place]) -> float:
        for place in places:
            round_output(model.get_submodule(place.name), ranges[place.name])
        try:
            with in_mode(layers, "quantized"):
                return least_db(whole, outputs_of(model, batches))
        finally:
            for place in places:
                leave_output(model.get_submodule(place.name))

    floor = left_db([]) - _MOST_DB
    if left_db(found) >= floor:
        return [*found]
    sums: dict[frozenset[str], list[Place]] = {}
    for place in found:
        sums.setdefault(place.needs, []).append(place)
    cheapest = sorted(sums.values(), key=left_db, reverse=True)
    fewest, most = 0, len(cheapest) - 1  # so many of them can be borne; all of them cannot
    while fewest < most:
        count = (fewest + most + 1) // 2
        if left_db([place for one in cheapest[:count] for place in one]) >= floor:
            fewest = count
        else:
            most = count - 1
    return [place for one in cheapest[:fewest] for place in one]


def places(
    model: nn.Module, layers: Mapping[str, QuantizedLayer], calls: Sequence[Call]
) -> list[Place]:
    """Return the modules whose outputs are summands beside those of layers, and these.

    A sum counts whose other summand comes from a layer too, or is read by one: the rest of a network that adds in floating
    point, as transformers do between norms, gains nothing.
    """
    with in_mode(layers, "plain"):
        seen = flow(model, layers, calls)
    found: dict[str, Place] = {}
    for pair in seen.sums:
        for place in _places(seen, pair):
            found.setdefault(place.name, place)
    return [*found.values()]


def _places(seen: Flow, pair: tuple[Key, Key]) -> list[Place]:
    """Return whose outputs to round so that integers can be added, both or none."""
    of_layers = {key for key in pair if key in seen.origins}
    others = {*pair} - of_layers
    if not of_layers or not all(key in seen.readers for key in others):
        return []
    names = [seen.giver(key) for key in (*of_layers, *others)]
    needs = {seen.origins[key] for key in of_layers} | {seen.readers[key][0] for key in others}
    places = [
        Place(name, _reader(seen, key), frozenset(needs))
        for name, key in zip(names, (*of_layers, *others), strict=True)
    ]
    return places if all(names) else []


def _reader(seen: Flow, key: Key) -> str:
    """Return a layer whose range is that of a tensor: one that reads nothing else."""
    return next((name for name in seen.readers.get(key, ()) if seen.calls[name] == 1), "")
