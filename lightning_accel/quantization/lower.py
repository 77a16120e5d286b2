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
from lightning_accel.surgery import twin
from lightning_accel.surgery.call import ModuleT

LARGEST = 127
"""The integers of weights as the operators are told: 8 bits, of which fewer may be used."""


class IntegerLayer(QuantizedLayer):
    """A quantized layer whose weights are stored as integers, and whose scales are numbers."""

    integers: Tensor
    zeros: Tensor
    input_scale: float | None
    input_zero: int

    def quantized_weight(self) -> Tensor:
        """Return the weights, read back from integers."""
        scale = self.weight_scale()
        if self.accel_grid.group is not None:
            grouped = self.integers.unflatten(1, (-1, self.accel_grid.group)).float()
            return (grouped * scale[..., None]).flatten(1)
        return torch.ops.quantized_decomposed.dequantize_per_channel.default(
            self.integers, scale, self.zeros, self.channels_axis, -LARGEST, LARGEST, torch.int8
        )

    def quantized_input(self, values: Tensor) -> Tensor:
        """Return what comes in, made integers and read back."""
        if self.input_scale is None:
            return values.float()
        how = (self.input_scale, self.input_zero, 0, grids.TOP, torch.uint8)
        whole = torch.ops.quantized_decomposed.quantize_per_tensor.default(values.float(), *how)
        return torch.ops.quantized_decomposed.dequantize_per_tensor.default(whole, *how)


class IntegerEmbedding(IntegerLayer, QuantizedEmbedding):
    """Of an embedding only the rows that are asked for are read back."""

    def forward(self, input: Tensor) -> Tensor:
        """Look rows up as `nn.Embedding` does."""
        return self.integers[input].float() * self.weight_scale()[input][..., None]


_INTEGERS: dict[type[nn.Module], type[nn.Module]] = {
    kind: type(f"Integer{kind.__name__.removeprefix('Quantized')}", (IntegerLayer, kind), {})
    for kind in KINDS.values()
}
_INTEGERS[QuantizedEmbedding] = IntegerEmbedding


def lowered(model: ModuleT) -> ModuleT:
    """Return a copy in eval mode and in float32 whose quantized layers store integers; others stay.

    Layers in the modes "plain" and "watching" compute in floating point, and so they do in the copy.

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
            _lower(layer)
    return copy


@torch.no_grad()
def _lower(layer: Any) -> None:
    scale = layer.weight_scale().detach().clone()
    whole = grids.integers(layer.weight, scale, layer.channels_axis, layer.accel_grid)
    step, zero = grids.parameters_of(layer.accel_range)
    reads = layer.accel_known and layer.accel_grid.activations is not None
    layer.input_scale, layer.input_zero = (float(step) if reads else None), int(zero)
    del layer._parameters["weight"]
    for name in ("accel_range", "accel_seen", "accel_scale"):
        del layer._buffers[name]
    layer._non_persistent_buffers_set.clear()
    layer.register_buffer("integers", whole)
    layer.register_buffer("accel_scale", scale)
    layer.register_buffer("zeros", torch.zeros_like(scale.flatten(), dtype=torch.int64))
    layer.__class__ = _INTEGERS[type(layer)]
