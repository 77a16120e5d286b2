"""What candidates are tried on: inputs like those of the example, and those at the edges.

Numbers come from the example itself, drawn anew, so that a network that takes a logarithm or looks rows up gets what it
can take; and from normal numbers of the same mean and spread. At the edges are zeros, numbers a thousand times too
large, whole numbers at both ends of their range, one sample, the most samples, and tensors that are not contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_accel.export.network import Axes

_LARGE = 1e3
_SEED = 20_261_130
LEAST = 64
"""Inputs that each candidate is tried on, at least."""


class Sample(NamedTuple):
    """One input.

    Attributes:
        kind: For people.
        tensors: The input.
        usual: Whether it is like the example, and no edge.
    """

    kind: str
    tensors: list[Tensor]
    usual: bool = True


def samples(
    example: Sequence[Tensor], axes: Axes, sizes: Sequence[dict[str, int]]
) -> Iterator[Sample]:
    """Yield inputs, those of the example first; always the same ones.

    Args:
        example: Tensors of a call.
        axes: Which sizes of them vary.
        sizes: Values of the named sizes to try; the first are those of the example.

    >>> found = list(samples([torch.ones(4, 3)], [{0: "batch"}], [{"batch": 4}, {"batch": 1}]))
    >>> len(found) >= 64, {sample.tensors[0].shape[0] for sample in found} == {1, 4}
    (True, True)
    """
    generator = torch.Generator().manual_seed(_SEED)
    sizes = sizes or [{}]
    yield Sample("the example", [t.clone() for t in example])
    count = 1
    for wanted in sizes:
        base = [
            resized(t, named, wanted, generator) for t, named in zip(example, axes, strict=True)
        ]
        for sample in _edges(base, generator):
            count += 1
            yield sample._replace(kind=f"{sample.kind}{_said(wanted)}")
    small = sizes[1:] or sizes  # most inputs are small, so that large networks are not waited for
    for index in range(max(0, LEAST - count)):
        wanted = small[index % len(small)]
        base = [
            resized(t, named, wanted, generator) for t, named in zip(example, axes, strict=True)
        ]
        if index % 2:
            yield Sample(f"drawn anew{_said(wanted)}", base)
        else:
            yield Sample(
                f"normal numbers{_said(wanted)}", [_normal(t, generator) for t in base], usual=False
            )


def resized(
    tensor: Tensor, named: dict[int, str], sizes: dict[str, int], generator: torch.Generator
) -> Tensor:
    """Return a tensor of other sizes, its numbers drawn from those of `tensor`."""
    shape = list(tensor.shape)
    for dim, name in named.items():
        shape[dim] = sizes.get(name, shape[dim])
    flat = tensor.reshape(-1)
    if not flat.numel():
        return tensor.new_zeros(shape)
    picks = torch.randint(
        flat.numel(), (max(1, tensor.new_empty(shape).numel()),), generator=generator
    )
    return flat[picks].reshape(shape)


def _edges(base: list[Tensor], generator: torch.Generator) -> Iterator[Sample]:
    yield Sample("drawn anew", base)
    yield Sample("not contiguous", [_strided(t) for t in base])
    yield Sample("transposed in memory", [_transposed(t) for t in base])
    yield Sample("expanded", [t[:1].expand(t.shape) if t.dim() else t for t in base])
    if any(t.is_floating_point() for t in base):
        for kind, change in _FLOATS.items():
            changed = [change(t) if t.is_floating_point() and _is_finite(t) else t for t in base]
            yield Sample(kind, changed, usual=False)
    if any(_is_index(t) for t in base):
        yield Sample(
            "the smallest",
            [t.amin().expand(t.shape).clone() if _is_index(t) else t for t in base],
            usual=False,
        )
        yield Sample(
            "the largest",
            [t.amax().expand(t.shape).clone() if _is_index(t) else t for t in base],
            usual=False,
        )


_FLOATS = {
    "zeros": torch.zeros_like,
    "ones": torch.ones_like,
    "large": lambda t: t * _LARGE,
    "large and negative": lambda t: t.abs() * -_LARGE,
    "small": lambda t: t / _LARGE,
}


def _normal(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point() or not _is_finite(tensor):
        return tensor
    spread = tensor.std() if tensor.numel() > 1 else tensor.new_tensor(1.0)
    drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
    return drawn * spread + tensor.mean()


def _strided(tensor: Tensor) -> Tensor:
    """Return the same numbers as every other element of a larger tensor."""
    if not tensor.dim():
        return tensor
    wide = torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)
    return wide[..., 0]


def _transposed(tensor: Tensor) -> Tensor:
    """Return the same numbers with the first dimension lying innermost."""
    if tensor.dim() < 2:
        return tensor
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0)


def _is_index(tensor: Tensor) -> bool:
    """Tell whether these are whole numbers, and more than a mask."""
    if (
        tensor.is_floating_point()
        or tensor.is_complex()
        or tensor.dtype == torch.bool
        or not tensor.numel()
    ):
        return False
    return int(tensor.amax()) - int(tensor.amin()) > 1


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _said(sizes: dict[str, int]) -> str:
    return "".join(f", {name} {size}" for name, size in sizes.items())
