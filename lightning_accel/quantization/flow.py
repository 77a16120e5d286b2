"""Where tensors go in one forward: which modules gave and read them, what passes them on, and what else reads them.

It is found by the identity of tensors while the network runs, so it holds for this call; whoever builds on it proves
afterwards that the network computes as before.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_accel.quantization.layers import QuantizedEmbedding, QuantizedLayer
from lightning_accel.surgery.call import Call, run

Key = tuple[int, int]
"""Which tensor, and how often it was changed in place."""
_ADDS = ("add", "__add__", "__radd__", "add_", "__iadd__")
_NORMS = ("batch_norm",)
"""Functions between a layer and a sum that the layer takes in when it is deployed."""
_HOMOGENEOUS = (
    *(
        "relu",
        "relu_",
        "leaky_relu",
        "leaky_relu_",
        "dropout",
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
    ),
    *("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
)
"""Functions that give a channel times a positive factor where they get it."""


def flow(model: nn.Module, layers: Mapping[str, QuantizedLayer], calls: Sequence[Call]) -> Flow:
    """Return where tensors go in a call; layers must compute plainly, and the model be in eval mode."""
    seen = Flow(layers)
    with torch.no_grad(), _watching(model, layers, seen), seen:
        run(model, calls)
    seen.let_go()
    return seen


class Flow(TorchFunctionMode):
    """Who gave which tensor, who read it, and what was added: by what tensors held."""

    def __init__(self, layers: Mapping[str, QuantizedLayer]) -> None:
        super().__init__()
        self.layers = layers
        self.kept: list[Tensor] = []
        self.givers: dict[Key, list[str]] = {}  # the innermost module first
        self.readers: dict[Key, list[str]] = {}
        self.origins: dict[Key, str] = {}  # the layer that a tensor comes from, past norms
        self.passed: dict[Key, list[Key]] = {}  # what homogeneous functions make of it
        self.others: set[Key] = set()  # what is read by anything else
        self.outlived: set[int] = (
            set()
        )  # tensors that someone holds after the forward: an attribute, a list
        self.calls: dict[str, int] = {}
        self.sums: list[tuple[Key, Key]] = []
        self.inside = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        kwargs = kwargs or {}
        held = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        held += [
            a
            for given in args
            if isinstance(given, (list, tuple))
            for a in given
            if isinstance(a, Tensor)
        ]
        if self.inside or name == "__get__":
            return func(*args, **kwargs)
        keys = [self.key(value) for value in held]
        if name in _ADDS and len(held) == 2 and held[0].shape == held[1].shape:
            self.sums.append((keys[0], keys[1]))
        made = func(*args, **kwargs)
        if not isinstance(made, Tensor) or not held:
            if isinstance(made, (tuple, list)) and any(isinstance(m, Tensor) for m in made):
                self.others.update(keys)
            return made  # sizes and the like are no values
        if name in _NORMS and keys[0] in self.origins:
            self.origins[self.key(made)] = self.origins[keys[0]]
        if name in _HOMOGENEOUS:
            if self.key(made) != keys[0]:  # in eval mode dropout gives its input itself
                self.passed.setdefault(keys[0], []).append(self.key(made))
            keys = keys[1:]
        self.others.update(keys)
        return made

    def key(self, value: Tensor) -> Key:
        """Return the identity of what a tensor holds now; it is kept alive so that no other one gets it."""
        self.kept.append(value)
        return id(value), value._version

    def given(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        """Note what a module gave."""
        self.calls[name] = self.calls.get(name, 0) + 1
        if isinstance(output, Tensor) and output.is_floating_point():
            self.givers.setdefault(self.key(output), []).append(name)
            if name in self.layers and not isinstance(module, QuantizedEmbedding):
                self.origins[self.key(output)] = name
        self.inside -= name in self.layers

    def read(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note what a layer reads."""
        self.inside += 1
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if given:
            self.readers.setdefault(self.key(given[0]), []).append(name)
        self.others.update(self.key(value) for value in given[1:])

    def let_go(self) -> None:
        """Hold tensors no longer, and see which of them others hold, who may read them."""
        held = [weakref.ref(value) for value in self.kept]
        self.kept = []
        if any(ref() is not None for ref in held):
            gc.collect()  # of cycles that nobody reads
        self.outlived = {id(value) for ref in held if (value := ref()) is not None}

    def giver(self, key: Key) -> str:
        """Return the innermost module that gave a tensor and no other one, or nothing."""
        return next((name for name in self.givers.get(key, []) if self.calls[name] == 1), "")

    def readers_alone(self, key: Key) -> list[str]:
        """Return the layers that read what a tensor is passed on as; none where anything else reads it."""
        if key in self.others:
            return []
        found = list(self.readers.get(key, []))
        for after in self.passed.get(key, []):
            further = self.readers_alone(after)
            if not further:
                return []
            found += further
        return found

    def is_kept(self, key: Key) -> bool:
        """Whether a tensor, or what it is passed on as, is still held by someone after the forward."""
        return key[0] in self.outlived or any(map(self.is_kept, self.passed.get(key, [])))


@contextmanager
def _watching(model: nn.Module, layers: Mapping[str, QuantizedLayer], seen: Flow) -> Iterator[None]:
    handles = [
        module.register_forward_hook(partial(seen.given, name))
        for name, module in model.named_modules()
        if name
    ]
    handles += [
        layer.register_forward_pre_hook(partial(seen.read, name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
