"""Bytes: what a model holds and what a call needs at its peak.

On CUDA the allocator knows. On CPU nobody does, so the bytes are counted: the storages of all tensors
that operations of the call return, from their creation until the last reference is gone, those that
autograd keeps for the backward included. Not counted are what existed before the call, scratch space
inside a kernel, and tensors inside compiled code. The count is exact arithmetic on shapes: the same
on each run and on each machine, which makes it fit for a test.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class ModelSize(NamedTuple):
    """Number of parameters, and the bytes of parameters and of buffers; tied ones count once."""

    params: int
    param_bytes: int
    buffer_bytes: int


class PeakMemory(NamedTuple):
    """Most bytes that a call held at once beyond what was there before, and how that is known."""

    peak_bytes: int
    source: str  # "allocator" or "counted"


def model_size(model: nn.Module) -> ModelSize:
    """Count parameters and bytes.

    >>> model_size(nn.Linear(3, 2))
    ModelSize(params=8, param_bytes=32, buffer_bytes=0)
    """
    params = list(model.parameters())
    return ModelSize(
        sum(p.numel() for p in params),
        sum(p.numel() * p.element_size() for p in params),
        sum(b.numel() * b.element_size() for b in model.buffers()),
    )


def peak_memory(fn: Callable[[], Any], *, device: torch.device | str = "cpu") -> PeakMemory:
    """Run `fn` once and return the peak of the bytes it held.

    >>> peak_memory(lambda: torch.ones(100).add(1).add(1))  # three of 400 bytes, two at a time
    PeakMemory(peak_bytes=800, source='counted')
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        return PeakMemory(torch.cuda.max_memory_allocated(device) - before, "allocator")
    with _Bytes() as counted:
        fn()
    return PeakMemory(counted.peak, "counted")


class _Bytes(TorchDispatchMode):
    """Counts live bytes of the storages that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for tensor in _plain_tensors((args, kwargs)):
            self._add(tensor, counted=False)
        out = func(*args, **(kwargs or {}))
        for tensor in _plain_tensors(out):
            self._add(tensor, counted=True)
        return out

    def _add(self, tensor: Tensor, *, counted: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes() if counted else 0
        self.live += self._known[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)


def _plain_tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.layout == torch.strided]
