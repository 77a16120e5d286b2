"""The bytes that are alive at each moment of a run, and what they are, on fake tensors or real ones.

torch's own trackers hold what a checkpointed block computes anew until the end of backward, and so tell too much; they
also take minutes for large networks. This counts storages: each counts from the operation that made it until it is gone,
and as much as it has, for FSDP2 makes its gathered weights small and large again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_STEP = 1.01
"""What is alive is noted again when it is this much more."""


class LiveBytes(TorchDispatchMode):
    """Counts within; `peak` and `parts` are of the fullest moment since `restart`.

    Args:
        held: Names tensors that are there before, or come into being meanwhile, by what they are.
        limit: Raise `TooLarge` where more is alive.
    """

    def __init__(
        self, held: Callable[[], Mapping[str, Iterable[Tensor]]], limit: int | None = None
    ) -> None:
        super().__init__()
        self._held, self._limit = held, limit
        self._sizes: dict[int, int] = {}
        self._gathered: set[int] = set()
        self.live = 0
        self.restart()

    def restart(self) -> None:
        """Forget the fullest moment."""
        self.peak, self.parts = 0, dict[str, int]()

    def __enter__(self) -> Any:
        for tensors in self._held().values():
            for tensor in tensors:
                self._add(_local(tensor))
        self._resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = self._resizing(self._resize)  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # of its parts this is told
        out = func(*args, **(kwargs or {}))
        gathers = func.namespace in ("fsdp", "c10d")
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                key = self._add(tensor)
                if gathers:
                    self._gathered.add(key)
        if self.live > self.peak:
            self._note()
        return out

    def _add(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = size = storage.nbytes()
            self.live += size
            weakref.finalize(storage, self._free, key).atexit = False
        return key

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)
        self._gathered.discard(key)

    def _resizing(self, resize: Any) -> Any:
        def run(storage: Any, size: int) -> Any:
            key = storage._cdata
            if key in self._sizes:
                self.live += size - self._sizes[key]
                self._sizes[key] = size
                self._gathered.add(key)
            return resize(storage, size)

        return run

    def _note(self) -> None:
        if self.live > self.peak * _STEP or not self.parts:
            named = {
                _local(tensor).untyped_storage()._cdata: name
                for name, tensors in self._held().items()
                for tensor in tensors
            }
            self.parts = {}
            for key, size in self._sizes.items():
                name = named.get(key, "gathered" if key in self._gathered else "activations")
                if size:
                    self.parts[name] = self.parts.get(name, 0) + size
        self.peak = max(self.peak, self.live)
        if self._limit is not None and self.peak > self._limit:
            raise TooLarge


class TooLarge(Exception):
    """More is alive than was allowed."""


def _local(tensor: Tensor) -> Tensor:
    return (
        tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    )  # `to_local` makes a view
