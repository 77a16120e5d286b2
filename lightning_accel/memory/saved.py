"""The bytes that autograd keeps from a forward for its backward, counted and not timed.

Every tensor that is saved for a backward passes a hook (`torch.autograd.graph.saved_tensors_hooks`), in
eager code and in compiled code alike. Each storage counts once, however many views of it are saved;
parameters and buffers do not count, because they are there anyway. So the number is the same on each
run and on each machine, and it is what activation checkpointing and the memory budget change. It is not
the peak: gradients and what is recomputed in backward come on top.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightning_accel.surgery.call import tensors

_counting: list[SavedTensors] = []
"""Who wants to know of tensors that are kept by other means than autograd's own."""


class SavedTensors:
    """Collect what is saved for backward while this context is active.

    What is collected stays alive for as long as this object: a freed storage's place could be taken by
    another, which would then not count.

    >>> weight = torch.ones(3, 3, requires_grad=True)
    >>> with SavedTensors() as saved:
    ...     loss = (torch.ones(2, 3) @ weight).exp().sum()
    >>> saved.count(ignore=[weight])  # the input and the result of exp
    48
    """

    def __init__(self) -> None:
        self._storages: dict[int, tuple[Any, int]] = {}
        self._hooks: Any = None

    def __enter__(self) -> Self:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        _counting.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _counting.remove(self)
        self._hooks.__exit__(*error)

    def add(self, tensor: Tensor) -> None:
        """Count a tensor that is kept for backward."""
        for key, holder, size in _storages(tensor):
            self._storages.setdefault(key, (holder, size))

    def count(self, ignore: Iterable[Tensor] = ()) -> int:
        """Return the bytes collected so far, without the storages of `ignore`."""
        known = {key for tensor in ignore for key, _, _ in _storages(tensor)}
        return sum(size for key, (_, size) in self._storages.items() if key not in known)

    def _pack(self, tensor: Tensor) -> Tensor:
        self.add(tensor)
        return tensor.detach()  # a result that its own node holds would never be freed


def saved_bytes(fn: Callable[[], Any], *, model: nn.Module | None = None) -> int:
    """Run a forward once and return the bytes that are kept for its backward.

    Args:
        fn: Returns what backward starts from: the loss, or outputs of any structure. It may be compiled;
            compile first, or let this call do it.
        model: Its parameters and buffers do not count. Parameters that learn are found without it.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> saved_bytes(lambda: net(torch.ones(16, 4)).sum())  # 16 x 4 inputs, 16 x 8 hidden, in fp32
    768
    """
    with torch.enable_grad(), SavedTensors() as saved:
        out = fn()
    return saved.count([*_leaves(tensors(out)), *standing(model)])


def standing(model: nn.Module | None) -> list[Tensor]:
    """Return the tensors that exist with or without a step."""
    return [] if model is None else [*model.parameters(), *model.buffers()]


def note_kept(kept: Any) -> None:
    """Let running counts know of tensors that are kept for backward without autograd's hooks."""
    for saved in _counting:
        for tensor in tensors(kept):
            if type(tensor) in (Tensor, nn.Parameter):  # and no fake one of a compiler
                saved.add(tensor)


def _unpack(tensor: Tensor) -> Tensor:
    return tensor


def _storages(tensor: Tensor) -> Iterable[tuple[int, Any, int]]:
    """Yield identity, holder and bytes of what a tensor of any class is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            if isinstance(inner := getattr(tensor, name), Tensor):  # a mesh of devices is none
                yield from _storages(inner)
    elif tensor.layout is torch.strided:
        storage = tensor.untyped_storage()
        yield storage._cdata, storage, storage.nbytes()
    else:
        yield id(tensor), tensor, tensor.values().nbytes


def _leaves(outputs: list[Tensor]) -> list[Tensor]:
    """Return the tensors whose gradients the graph of these outputs accumulates."""
    nodes = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen = set(nodes)
    leaves = []
    while nodes:
        node: Any = nodes.pop()
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return leaves
