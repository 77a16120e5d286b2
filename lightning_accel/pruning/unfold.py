"""Linear layers and convolutions as one matrix product: pre-activation = patches @ matrix^T.

`patches` unfolds a layer's input, `matrix` its weight; for a convolution in groups there is one product
per group. Stride, padding of every mode, dilation and transposed convolutions are in it, and GPT-2's
`Conv1D`, a linear layer with its weight the other way round. Everything is in float64.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_accel.exact import exact
from lightning_accel.pruning.groups import Member

PIECE = 2**24
"""Numbers of an unfolded input that are held at a time (128 MB)."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def why_unreadable(module: nn.Module, member: Member) -> str:
    """Return why this member is no input of a layer that can be written as a matrix; empty if it is."""
    leaf = member.tensor.rpartition(".")[2]
    grouped = isinstance(module, _TRANSPOSED) and module.groups > 1
    if leaf != "weight" or grouped or not (is_conv1d(module) or isinstance(module, _KNOWN)):
        kind = type(module).__name__ + (" in groups" if grouped else "")
        return f"a {kind} that reads through `{leaf}` is no linear layer or convolution"
    if "weight" not in module._parameters:
        return "its weight is computed from others"
    if member.dim != input_dim(module):
        return f"dimension {member.dim} of its weight is not what it reads"
    if module._parameters["weight"].is_complex():  # type: ignore[union-attr]
        return "its weights are complex, and its error is solved in real numbers"
    return ""


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is GPT-2's layer: linear, with a weight of shape (inputs, outputs)."""
    weight = module._parameters.get("weight")
    named = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    return named and weight is not None and weight.dim() == 2


def input_dim(module: nn.Module) -> int:
    """Return the dimension of the weight that counts inputs; 0 and 1 are inputs and outputs."""
    return 0 if isinstance(module, _TRANSPOSED) or is_conv1d(module) else 1


def output_dim(module: nn.Module) -> int:
    """Return the dimension of the weight that counts outputs."""
    return 1 - input_dim(module)


def kernel(module: nn.Module) -> int:
    """Return the number of places in a layer's kernel; 1 if it is linear."""
    return math.prod(getattr(module, "kernel_size", (1,)))


def only_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the one tensor that a layer was called with; `None` if there is more, or none."""
    given = [value for value in (*args, *kwargs.values()) if value is not None]
    return given[0] if len(given) == 1 and isinstance(given[0], Tensor) else None


def samples(module: nn.Module, x: Tensor) -> Tensor:
    """Bring an input or output of a layer to (samples, channels, *space), in float64."""
    x = exact(x)
    if not isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)):
        return x.reshape(-1, x.shape[-1])
    return x if x.dim() == len(module.kernel_size) + 2 else x[None]


def pieces(module: nn.Module, x: Tensor) -> int:
    """Return how many samples can be unfolded at a time."""
    return max(1, PIECE // max(1, patches(module, x[:1]).numel()))


def patches(module: nn.Module, x: Tensor) -> Tensor:
    """Unfold `samples` to (groups, positions, inputs of a group x kernel).

    >>> import torch
    >>> layer = nn.Conv1d(2, 3, 2, bias=False).double()
    >>> x = torch.randn(1, 2, 5, dtype=torch.float64)
    >>> torch.allclose(patches(layer, x) @ matrix(layer, layer.weight).mT, by_block(layer, layer(x)))
    True
    """
    if not isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)):
        return x[None]
    size, stride, dilation = module.kernel_size, module.stride, module.dilation
    reach = [d * (k - 1) for d, k in zip(dilation, size, strict=True)]
    if isinstance(module, _TRANSPOSED):
        x, stride = _spread(module, x, reach), (1,) * len(size)
    else:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, _flat(_sides(module, reach)), mode=mode)
    for dim, (r, s, d) in enumerate(zip(reach, stride, dilation, strict=True)):
        x = x.unfold(2 + dim, r + 1, s)[..., ::d]
    x = x.unflatten(1, (module.groups, -1))  # (samples, groups, inputs, *space, *kernel)
    space = range(3, 3 + len(size))
    x = x.permute(1, 0, *space, 2, *range(3 + len(size), x.dim()))
    return x.flatten(2 + len(size)).flatten(1, 1 + len(size))


def matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """Return a layer's weight as (groups, outputs of a group, inputs of a group x kernel), float64."""
    weight = exact(weight)
    if input_dim(module) == 0:
        weight = weight.transpose(0, 1).flip(tuple(range(2, weight.dim())))
    return weight.flatten(1).unflatten(0, (blocks(module), -1))


def like_weight(module: nn.Module, rows: Tensor) -> Tensor:
    """Undo `matrix`: bring (groups, outputs, inputs x kernel) to the shape of the layer's weight."""
    weight = rows.flatten(0, 1).unflatten(1, (-1, *getattr(module, "kernel_size", ())))
    if input_dim(module) == 0:
        weight = weight.transpose(0, 1).flip(tuple(range(2, weight.dim())))
    return weight


def by_block(module: nn.Module, y: Tensor) -> Tensor:
    """Bring `samples` of an output to (groups, positions, outputs of a group), as `patches` does."""
    y = y.unflatten(1, (blocks(module), -1))
    return y.movedim(2, -1).movedim(1, 0).flatten(1, -2)


def blocks(module: nn.Module) -> int:
    """Return the number of groups of a convolution; 1 if it is linear."""
    return int(getattr(module, "groups", 1))


def _sides(module: Any, reach: list[int]) -> list[tuple[int, int]]:
    if module.padding == "same":
        return [(r // 2, r - r // 2) for r in reach]
    return [(0, 0) if module.padding == "valid" else (int(p), int(p)) for p in _widths(module)]


def _widths(module: Any) -> tuple[int, ...]:
    return module.kernel_size if isinstance(module.padding, str) else module.padding


def _spread(module: Any, x: Tensor, reach: list[int]) -> Tensor:
    """Space a transposed convolution's input by its stride: then it is a plain convolution."""
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], module.stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    spread[(slice(None), slice(None), *(slice(None, None, s) for s in module.stride))] = x
    cropped = zip(reach, module.padding, module.output_padding, strict=True)
    return F.pad(spread, _flat([(r - p, r - p + o) for r, p, o in cropped]))


def _flat(sides: list[tuple[int, int]]) -> list[int]:
    return [n for pair in reversed(sides) for n in pair]


_KNOWN = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)
