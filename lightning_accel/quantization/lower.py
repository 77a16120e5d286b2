"""A quantized network as the integers that it stands for, for exporters and their kernels.

In floating point a quantized layer computes what integer kernels would; here it says so, in the operators that torch's own
exporters and compilers know (`quantized_decomposed`): integers are stored, what comes in is made integers and read back, and
a compiler fuses both into an integer product. Ranges and scales are those of the layer, so that what runs is what was
trained; nothing is calibrated again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.quantization import grid as grids
from lightning_accel.quantization.layers import (
    KINDS,
    QuantizedEmbedding,
    QuantizedLayer,
    layers_of,
    unbecome,
)
from lightning_accel.quantization.sums import outputs_rounded
from lightning_accel.surgery import twin
from lightning_accel.surgery.call import ModuleT

LARGEST = 127
"""The integers of weights as the operators are told: 8 bits, of which fewer may be used."""


class IntegerLayer(QuantizedLayer):
    """A quantized layer whose weights are stored as integers, and whose scales are numbers."""

    input_scale: float | None
    input_zero: int

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight, for those who ask for its type or size, or compute with it themselves."""
        kept = self._buffers.get("kept")
        return self.quantized_parts()[0] if kept is None else kept

    def stored(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return integers, scales and zeros of each part."""
        held = self._buffers
        names = [name for name in held if name.startswith("integers")]
        return [
            (
                held[name],
                held[name.replace("integers", "scale")],
                held[name.replace("integers", "zeros")],
            )  # type: ignore[misc]
            for name in names
        ]

    def quantized_parts(self) -> list[Tensor]:
        """Return the weights, read back from integers."""
        return [self._read(*part) for part in self.stored()]

    def _read(self, integers: Tensor, scale: Tensor, zeros: Tensor) -> Tensor:
        if self.accel_grid.group is not None:
            grouped = integers.unflatten(1, (-1, self.accel_grid.group)).float()
            return (grouped * scale[..., None]).flatten(1)
        if _is_miscompiled(self):
            shape = [-1 if dim == self.channels_axis else 1 for dim in range(integers.dim())]
            return integers.float() * scale.view(shape)
        return torch.ops.quantized_decomposed.dequantize_per_channel.default(
            integers, scale, zeros, self.channels_axis, -LARGEST, LARGEST, torch.int8
        )

    def quantized_input(self, values: Tensor) -> Tensor:
        """Return what comes in, made integers and read back."""
        # A cast that changes nothing would be a second reader in the graph, and keep compilers from fusing both.
        values = values if values.dtype is torch.float32 else values.float()
        if self.accel_grid.activations == "dynamic":
            return _read_on_its_own_range(values)
        if self.input_scale is None:
            return values
        how = (self.input_scale, self.input_zero, 0, grids.TOP, torch.uint8)
        whole = torch.ops.quantized_decomposed.quantize_per_tensor.default(values, *how)
        return torch.ops.quantized_decomposed.dequantize_per_tensor.default(whole, *how)


def _read_on_its_own_range(values: Tensor) -> Tensor:
    ops, how = torch.ops.quantized_decomposed, (0, grids.TOP, torch.uint8)
    smallest = torch.finfo(torch.float32).tiny
    scale, zero = ops.choose_qparams.tensor(values, 0, grids.TOP, smallest, torch.uint8)
    whole = ops.quantize_per_tensor.tensor(values, scale, zero, *how)
    return ops.dequantize_per_tensor.tensor(whole, scale, zero, *how)


def _is_miscompiled(layer: Any) -> bool:
    """Whether torch's compiler makes a wrong integer product of a layer, which then stays one of floating point.

    Inductor of torch 2.13 takes transposed convolutions for plain ones, and gives the output of a convolution of one channel
    another layout than those who read it expect, where the batch is open.
    """
    return layer.channels_axis == 1 or getattr(layer, "in_channels", 2) == 1


class IntegerEmbedding(IntegerLayer, QuantizedEmbedding):  # type: ignore[override]
    """Of an embedding only the rows that are asked for are read back."""

    def forward(self, input: Tensor) -> Tensor:
        """Look rows up as `nn.Embedding` does."""
        ((integers, scale, _),) = self.stored()
        return integers[input].float() * scale[input][..., None]


_INTEGERS: dict[type[nn.Module], type[nn.Module]] = {
    kind: type(f"Integer{kind.__name__.removeprefix('Quantized')}", (IntegerLayer, kind), {})
    for kind in KINDS.values()
}
_INTEGERS[QuantizedEmbedding] = IntegerEmbedding


def lowered(model: ModuleT, *, keep: bool = False) -> ModuleT:
    """Return a copy in eval mode and in float32 whose quantized layers store integers; others stay.

    Layers in the modes "plain" and "watching" compute in floating point, and so they do in the copy.

    Args:
        model: The network.
        keep: Keep weights in floating point beside integers, for networks that compute with them outside of their layers.

    >>> net = nn.Sequential(nn.Linear(4, 4))
    >>> lowered(net)
    Sequential(
      (0): Linear(in_features=4, out_features=4, bias=True)
    )
    """
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  (makes the operators known)

    copy = twin(model).float().eval()
    for layer in layers_of(copy).values():
        if layer.accel_mode in ("plain", "watching"):
            unbecome(layer)
        else:
            _lower(layer, keep)
    for hook in outputs_rounded(copy).values():
        hook.is_lowered = True
    return copy


@torch.no_grad()
def _lower(layer: Any, keep: bool) -> None:
    axis, grid = layer.channels_axis, layer.accel_grid
    parts = [*zip(layer.parts(), layer.part_scales(), strict=True)]
    step, zero = grids.parameters_of(layer.accel_range)
    reads = grid.has_range and bool(layer.accel_range[0] <= layer.accel_range[1])
    layer.input_scale, layer.input_zero = (float(step) if reads else None), int(zero)
    owners = [(layer, name) for name in layer._parameters if name.endswith("weight")]
    owners += [(m, "weight") for m in layer.children() if "weight" in m._parameters]
    for owner, name in owners:
        del owner._parameters[name]
    for name in ("accel_range", "accel_seen", "accel_scale"):
        del layer._buffers[name]
    layer._non_persistent_buffers_set.clear()
    for number, (weight, scale) in enumerate(parts):
        suffix = f"_{number}" if number else ""
        layer.register_buffer(f"integers{suffix}", grids.integers(weight, scale, axis, grid))
        layer.register_buffer(f"scale{suffix}", scale.clone())
        zeros = torch.zeros_like(scale.flatten(), dtype=torch.int64)
        layer.register_buffer(f"zeros{suffix}", zeros)
    layer.register_buffer("kept", parts[0][0].detach() if keep else None)
    layer.__class__ = _INTEGERS[type(layer)]
