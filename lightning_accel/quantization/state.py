"""A quantized network as plain data, for checkpoints: which layers, their grids, ranges and scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.errors import StructureMismatch
from lightning_accel.quantization import grid as grids
from lightning_accel.quantization.fast_paths import leave_fast_paths
from lightning_accel.quantization.layers import (
    KINDS,
    Mode,
    QuantizedLayer,
    become,
    layers_of,
)
from lightning_accel.quantization.sums import leave_output, outputs_rounded, round_output

State = dict[str, Any]
_OUTPUT = ":output"
"""After the name of a module whose output is rounded, and not only what comes in."""
_MODES = ("plain", "training", "quantized")


def state_of(layer: QuantizedLayer) -> State:
    """Return what a layer has beside its weights, as plain data and tensors on the CPU."""
    scale, range_ = layer.accel_scale, layer.accel_range.cpu().tolist()
    return {
        **layer.accel_grid._asdict(),
        "mode": layer.accel_mode,
        "range": range_ if range_[0] <= range_[1] else None,
        "scale": None if scale is None else scale.detach().cpu().clone(),
    }


def become_like(layer: nn.Module, state: Mapping[str, Any]) -> QuantizedLayer:
    """Make a layer, plain or quantized, what a state says, in place."""
    grid = grids.check(state["weights"], state["activations"], state["group"])
    mode: Mode = state["mode"]
    if isinstance(layer, QuantizedLayer):
        layer.accel_grid, layer.accel_mode = grid, mode
    else:
        layer = become(layer, grid, mode)
    device = layer.accel_range.device
    if state["range"] is not None:
        layer.set_range(torch.tensor(state["range"], dtype=torch.float32, device=device))
    if state["scale"] is not None:
        layer.set_scale(state["scale"])
    elif grid.bits < 8:
        layer.fit_scale()
    else:
        layer.accel_scale = None
    return layer


def quantization_of(model: nn.Module) -> dict[str, State]:
    """Return the state of each layer that computes quantized, by name; empty where none does.

    >>> quantization_of(nn.Linear(2, 2))
    {}
    """
    layers = layers_of(model).items()
    found = {name: state_of(layer) for name, layer in layers if layer.accel_mode != "plain"}
    outputs = outputs_rounded(model).items()
    return found | {f"{name}{_OUTPUT}": {"range": hook.range} for name, hook in outputs}


def quantized_as(model: nn.Module, stored: Any) -> None:
    """Make layers of a network what `quantization_of` said of another one, and let all others compute as ever.

    Raises:
        StructureMismatch: The data are damaged, or of another network.
    """
    layers = _checked(model, stored)
    for module in model.modules():
        leave_output(module)
    for name, layer in layers.items():
        if name.endswith(_OUTPUT):
            round_output(layer, torch.tensor(stored[name]["range"]))
        else:
            become_like(layer, stored[name]).accel_told = True
    for name, other in layers_of(model).items():
        if name not in layers:
            other.accel_mode = "plain"
    leave_fast_paths(model)


def _checked(model: nn.Module, stored: Any) -> dict[str, nn.Module]:
    """Return the layers that are meant; nothing is changed before all of them fit."""
    layers = dict(model.named_modules())
    wrong = [
        str(name)
        for name, state in (stored.items() if isinstance(stored, dict) else [("all", None)])
        if not (_output_fits if str(name).endswith(_OUTPUT) else _fits)(
            layers.get(str(name).removesuffix(_OUTPUT)), state
        )
    ]
    if wrong:
        raise StructureMismatch(
            "the quantization that a checkpoint tells does not fit this network",
            ", ".join(wrong[:6]),
            "load it into the class that it was saved from",
        )
    return {name: layers[name.removesuffix(_OUTPUT)] for name in stored}


def _output_fits(module: nn.Module | None, state: Any) -> bool:
    return module is not None and isinstance(state, dict) and _is_range(state.get("range"))


def _is_range(range_: Any) -> bool:
    return isinstance(range_, list) and len(range_) == 2 and all(type(v) is float for v in range_)


def _fits(layer: nn.Module | None, state: Any) -> bool:
    if not isinstance(layer, (QuantizedLayer, *KINDS)) or not isinstance(state, dict):
        return False
    try:
        grid = grids.check(state["weights"], state["activations"], state["group"])
    except (KeyError, TypeError, ValueError):
        return False
    if not isinstance(layer, QuantizedLayer) and type(layer) not in KINDS:
        return False
    range_, scale = state.get("range"), state.get("scale")
    is_range = range_ is None or _is_range(range_)
    if grid.group is not None and (
        not isinstance(layer, nn.Linear) or layer.in_features % grid.group
    ):
        return False
    return is_range and state.get("mode") in _MODES and (scale is None or isinstance(scale, Tensor))
