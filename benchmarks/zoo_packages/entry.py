"""What a network of the zoo is made of, and the noise, tokens and times that it takes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

CLASSES = 10
VOCABULARY = 96
BATCH = 2


class Entry(NamedTuple):
    """What a network is made of: path of the class, arguments, and a function that makes its input."""

    path: str
    options: Mapping[str, Any]
    example: Callable[[], Any]

    def build(self) -> tuple[nn.Module, Any]:
        """Make the network and two samples."""
        module, _, name = self.path.rpartition(".")
        return getattr(importlib.import_module(module), name)(**_made(self.options)), self.example()


def _made(value: Any) -> Any:
    """Make what is inside of a network first: an encoder, or layers that a wrapper takes."""
    if isinstance(value, Entry):
        return value.build()[0]
    return {k: _made(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def noise(*sizes: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(BATCH, *sizes)


def ids(length: int = 9) -> Tensor:
    return torch.randint(5, VOCABULARY, (BATCH, length))


def times_and(*names: str, **sizes: tuple[int, ...]) -> Callable[[], dict[str, Tensor]]:
    """Return a function that makes noise of these sizes, and a time for each of the names."""

    def make() -> dict[str, Tensor]:
        noise = {name: torch.randn(BATCH, *size) for name, size in sizes.items()}
        return {**noise, **{name: torch.tensor([3, 7]) for name in names}}

    return make
