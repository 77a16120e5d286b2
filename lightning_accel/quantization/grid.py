"""The numbers that a quantized layer can hold, and how others are rounded to them.

Weights lie on a symmetric grid per output channel, or per group of neighbouring inputs of it; what comes in lies on
an affine grid of unsigned integers per tensor, which holds zero exactly, since padding and ReLU make zeros. These are
the grids of the integer kernels of oneDNN, ONNX Runtime and QNNPACK (Jacob et al. 2018, arXiv:1712.05877; Krishnamoorthi
2018, arXiv:1806.08342). A weight per output channel times a factor per output channel is on such a grid again, so a batch
norm behind a layer may be folded into it after it was quantized, and nothing has to simulate that.

In training, values are rounded in the forward and gradients pass as if they were not, where values lie within the range
(straight-through estimator, Bengio et al. 2013, arXiv:1308.3432).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_accel.arguments import one_of, whole
from lightning_accel.errors import explain

WEIGHTS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
ACTIVATIONS = {"int8": 8, "dynamic": 8}
"""Of what comes in: on a range found before, or on that of each call."""
TOP = 255
"""The largest integer of what comes in: eight bits without a sign."""
_SHRINKS = tuple(1.0 - 0.02 * step for step in range(36))
_SMALLEST = torch.finfo(torch.float32).tiny


class Grid(NamedTuple):
    """On which numbers a layer computes.

    Attributes:
        weights: A word of `WEIGHTS`.
        activations: "int8", on ranges found before; "dynamic", on that of each call; or `None`: what comes in stays.
        group: Inputs of one output that share a scale; `None` is all of them.
    """

    weights: str = "int8"
    activations: str | None = "int8"
    group: int | None = None

    @property
    def bits(self) -> int:
        """Of a weight.

        >>> Grid("int4").bits, Grid("int4").top
        (4, 7)
        """
        return WEIGHTS[self.weights]

    @property
    def has_range(self) -> bool:
        """Whether what comes in lies on a range that has to be known.

        >>> Grid().has_range, Grid(activations="dynamic").has_range
        (True, False)
        """
        return self.activations == "int8"

    @property
    def top(self) -> int:
        """The largest integer of a weight; the smallest is the same below zero."""
        return 2 ** (self.bits - 1) - 1

    def __str__(self) -> str:
        """Say it.

        >>> print(Grid("int4", None, 32))
        int4 weights in groups of 32
        """
        weights = f"{self.weights} weights"
        weights += f" in groups of {self.group}" if self.group else " per output channel"
        inputs = {"int8": ", int8 inputs", "dynamic": ", int8 inputs on the range of each call"}
        return weights + inputs.get(self.activations or "", "")


def check(weights: Any, activations: Any, group: Any) -> Grid:
    """Return the grid that arguments mean.

    Raises:
        ValueError: A word is unknown, or groups are asked for beside integers coming in, which no kernel has.
        TypeError: One is of another type.
    """
    one_of("weights", weights, tuple(WEIGHTS))
    one_of("activations", activations, tuple(ACTIVATIONS), none=True)
    whole("group", group, least=2, none=True)
    if group is not None and activations is not None:
        raise ValueError(
            explain(
                "groups of inputs with scales of their own go with weights alone",
                f"group={group} and activations={activations!r}",
                "pass activations=None, or leave out `group`",
            )
        )
    return Grid(weights, activations, group)


def scales(weight: Tensor, axis: int, grid: Grid) -> Tensor:
    """Return the scale of each output channel, or of each group in it, so that the largest weight is on the grid.

    Args:
        weight: Any shape.
        axis: The dimension of the output channels.
        grid: With a `group`, that of a linear layer, whose inputs it divides.

    Returns:
        Float32, shape (channels,), or (channels, groups).

    >>> scales(torch.tensor([[127.0, -254.0], [0.0, 12.7]]), 0, Grid())
    tensor([2.0000, 0.1000])
    """
    found = weight.detach().float().abs()
    if grid.group is not None:
        found = found.unflatten(1, (-1, grid.group)).amax(-1)
    else:
        found = found.amax([dim for dim in range(weight.dim()) if dim != axis])
    return (found / grid.top).clamp_min(_SMALLEST)


def best_scales(weight: Tensor, axis: int, grid: Grid) -> Tensor:
    """Return the scales whose squared rounding and clipping errors together are least, in the shape of `scales`.

    With eight bits the largest weight is hardly ever worth clipping; with two it decides everything.

    >>> w = torch.tensor([[1.0, -1.0, 1.0, 2.0]])
    >>> float(best_scales(w, 0, Grid("int2", None))) < float(scales(w, 0, Grid("int2", None)))
    True
    """
    whole = best = scales(weight, axis, grid)
    weight = weight.detach().float()
    least = torch.full_like(whole, float("inf"))
    for shrink in _SHRINKS:
        error = (rounded(weight, whole * shrink, axis, grid) - weight).square()
        if grid.group is not None:
            error = error.unflatten(1, (-1, grid.group)).sum(-1)
        else:
            error = error.sum([dim for dim in range(weight.dim()) if dim != axis])
        best = torch.where(error < least, whole * shrink, best)
        least = torch.minimum(error, least)
    return best


def rounded(weight: Tensor, scale: Tensor, axis: int, grid: Grid) -> Tensor:
    """Return the weights as the grid holds them, in their own type; gradients pass, to scales that learn too.

    Args:
        weight: Any shape.
        scale: What `scales` returns for it.
        axis: The dimension of the output channels.
        grid: The grid.

    >>> rounded(torch.tensor([[1.0, 0.3]]), torch.tensor([0.5]), 0, Grid())
    tensor([[1.0000, 0.5000]])
    """
    values = weight.float()
    if grid.group is not None:
        values = values.reshape(-1, grid.group)
    flat, dim = scale.reshape(-1), 0 if grid.group is not None else axis
    if flat.requires_grad and torch.is_grad_enabled():
        return _learnable(values, flat, dim, grid.top).view(weight.shape).to(weight.dtype)
    zeros = torch.zeros_like(flat, dtype=torch.int32)
    made = torch.fake_quantize_per_channel_affine(values, flat, zeros, dim, -grid.top, grid.top)
    return made.view(weight.shape).to(weight.dtype)


def _learnable(values: Tensor, scale: Tensor, dim: int, top: int) -> Tensor:
    """Return values on a grid whose scales have gradients; torch's own operator takes what rounds to the end for inside."""
    scale = scale.view([-1 if at == dim else 1 for at in range(values.dim())])
    clipped = (values * (1.0 / scale)).clamp(-top, top)
    return (clipped + (clipped.round() - clipped).detach()) * scale


def integers(weight: Tensor, scale: Tensor, axis: int, grid: Grid) -> Tensor:
    """Return the integers that weights are stored as, int8, of the same shape.

    >>> integers(torch.tensor([[1.0, 0.3]]), torch.tensor([0.5]), 0, Grid())
    tensor([[2, 1]], dtype=torch.int8)
    """
    values = weight.detach().float()
    if grid.group is not None:
        values = values.reshape(-1, grid.group) * (1.0 / scale.reshape(-1, 1))
    else:
        shape = [-1 if dim == axis else 1 for dim in range(weight.dim())]
        values = values * (1.0 / scale.view(shape))
    return values.round().clamp(-grid.top, grid.top).to(torch.int8).view(weight.shape)


def parameters_of(range_: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of what comes in, from its smallest and largest value.

    Args:
        range_: Float32, shape (2,); zero is taken in.

    >>> parameters_of(torch.tensor([-1.0, 254.0]))
    (tensor([1.]), tensor([1], dtype=torch.int32))
    """
    low, high = range_[:1].clamp_max(0.0), range_[1:].clamp_min(0.0)
    scale = ((high - low) / TOP).clamp_min(_SMALLEST)
    return scale, (-low / scale).round().clamp(0, TOP).to(torch.int32)


def rounded_input(values: Tensor, range_: Tensor) -> Tensor:
    """Return what comes in as the grid of its range holds it, in its own type; gradients pass within the range.

    >>> rounded_input(torch.tensor([0.4, 300.0, -2.0]), torch.tensor([0.0, 255.0]))
    tensor([  0., 255.,   0.])
    """
    scale, zero = parameters_of(range_)
    made = torch.fake_quantize_per_tensor_affine(values.float(), scale, zero, 0, TOP)
    return made.to(values.dtype)
