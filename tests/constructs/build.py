"""How a net is built: parts and a forward, an example, and what must come out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """A forward, and the modules, parameters, buffers and plain attributes that it uses."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.body = forward
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(self, *args, **kwargs)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


class Construct(NamedTuple):
    """A net, its example of a batch size, and what must come out.

    `shapes` are those of named tensors after half of all channels went. `keeps` names layers that stay,
    with a part of the reason. `plain`: statistics across channels are left out of the comparison, because
    a cut changes them by design. `scaled` tensors are multiplied by a number, so that attention stays as sharp
    as it was.
    """

    build: Callable[[], nn.Module]
    example: Callable[[int], Any]
    shapes: Mapping[str, tuple[int, ...]]
    keeps: Mapping[str, str]
    plain: bool
    trains: bool
    scaled: Mapping[str, Any]
    arguments: Mapping[str, Any]


CONSTRUCTS: dict[str, Construct] = {}
BROKEN = {
    "einsum_of_raw_parameters": "heads and their width, as two dimensions of one weight, both stay",
}


def construct(
    example: Callable[[int], Any],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    keeps: Mapping[str, str] | None = None,
    plain: bool = False,
    trains: bool = True,
    scaled: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        assert build.__name__ not in CONSTRUCTS, build.__name__
        CONSTRUCTS[build.__name__] = Construct(
            build, example, shapes, keeps or {}, plain, trains, scaled or {}, arguments
        )
        return build

    return register


def vectors(n: int) -> Tensor:
    return torch.randn(n, 6)


def sequences(n: int) -> Tensor:
    return torch.randn(n, 5, 6)


def time_first(n: int) -> Tensor:
    return torch.randn(5, n, 6)


def signals(n: int) -> Tensor:
    return torch.randn(n, 3, 12)


def images(n: int) -> Tensor:
    return torch.randn(n, 3, 8, 8)


def volumes(n: int) -> Tensor:
    return torch.randn(n, 3, 4, 4, 4)


def tokens(n: int) -> Tensor:
    return torch.randint(0, 12, (n, 5))


# --- statistics across channels, which a cut changes by design -----------------------------------

_PLAIN = {"norms": False}


@contextmanager
def plain_norms(plain: bool = True) -> Iterator[None]:
    """Replace norms across channels by their affine part."""

    def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        x = x if weight is None else x * weight
        return x if bias is None else x + bias

    def layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, *_: Any) -> Tensor:
        return affine(x, weight, bias)

    def rms_norm(x: Tensor, shape: Any, weight: Any = None, *_: Any) -> Tensor:
        return affine(x, weight, None)

    def group_norm(x: Tensor, groups: int, weight: Any, bias: Any, *_: Any) -> Tensor:
        per_channel = [-1] + [1] * (x.dim() - 2)
        return affine(x, *(t if t is None else t.view(per_channel) for t in (weight, bias)))

    with pytest.MonkeyPatch.context() as patch:
        if plain:
            patch.setattr(F, "layer_norm", layer_norm)
            patch.setattr(F, "rms_norm", rms_norm)
            patch.setattr(F, "group_norm", group_norm)
            patch.setitem(_PLAIN, "norms", True)
        yield


def standardized(x: Tensor, dim: int) -> Tensor:
    """Normalize as a user writes it: subtract the mean, divide by the deviation."""
    if _PLAIN["norms"]:
        return x
    centred = x - x.mean(dim, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dim, keepdim=True) + 1e-5)
