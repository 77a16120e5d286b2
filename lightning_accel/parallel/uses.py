"""Which weights one step reads, inside which modules, and which modules follow one another: seen in the step itself.

Sharding gathers the weights of a unit when the unit is called, and lets go of them when it returns. So a module can be
a unit only where nobody reads its weights outside of its own call, and where every process calls it as often as every
other one. Neither is written anywhere: a step that is run once shows it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_ABOUT = {
    "size",
    "dim",
    "numel",
    "stride",
    "is_floating_point",
    "is_complex",
    "requires_grad_",
    "__set__",
}
"""Methods that read no element."""
_IN_PLACE = {"__setitem__", *(f"__i{n}__" for n in ("add", "sub", "mul", "truediv", "pow"))}
_READING = {"data", "T", "mT", "H", "mH", "real", "imag"}
"""Attributes that read elements; all others, such as `shape`, do not."""


@dataclass
class Uses:
    """What steps did with the weights of a module; plain data, that processes can send to each other.

    Attributes:
        outside: By module, one of its weights that was read while the module itself was not running.
        calls: By module with weights, the numbers of calls that were seen, one entry per step.
        follows: Pairs of modules of which the second got what the first had computed.
        reads: By weight, the numbers of operations that read it, one entry per step.
        buffers: Names of the buffers that were written.
        written: Names of the weights that were written.
        differentiates: Whether the step takes gradients itself (`torch.autograd.grad`).
    """

    outside: dict[str, str] = field(default_factory=dict)
    calls: dict[str, list[int]] = field(default_factory=dict)
    follows: set[tuple[str, str]] = field(default_factory=set)
    reads: dict[str, list[int]] = field(default_factory=dict)
    buffers: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    differentiates: bool = False

    def join(self, other: Uses) -> None:
        """Take in what other steps, or other processes, saw."""
        self.outside = {**other.outside, **self.outside}
        for mine, theirs in ((self.calls, other.calls), (self.reads, other.reads)):
            for name, counts in theirs.items():
                mine[name] = mine.get(name, []) + counts
        self.follows |= other.follows
        self.buffers |= other.buffers
        self.written |= other.written
        self.differentiates |= other.differentiates

    def is_steady(self, name: str) -> bool:
        """Whether a module was called, and in every step as often."""
        counts = self.calls.get(name, [0])
        return counts[0] > 0 and len(set(counts)) == 1

    def unsteady(self) -> list[str]:
        """Return the weights that some step did not read: in training, some process may have no gradient of them."""
        return [name for name, counts in self.reads.items() if not all(counts)]


def uses_of(model: nn.Module, step: Callable[[], Any]) -> Uses:
    """Run a step of a model, and return what it did with the weights.

    Args:
        model: With whole weights; best a copy, since the step is really run.
        step: Calls the model, with or without gradients.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> found = uses_of(net, lambda: net(torch.ones(1, 2)).sum() + net[1].weight.sum())
    >>> found.outside, found.is_steady("0"), ("0", "1") in found.follows
    ({'1': '1.weight'}, True, True)
    """
    seen = _Seen(model)
    before = {n: _checksum(t) for n, t in _tensors(model)}
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # a compiled block would be captured with the mode in it
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(seen.hooked(model))
        stack.enter_context(seen)
        stack.enter_context(_noting_gradients(seen.found))
        step()
    found = seen.found
    found.calls = {name: [seen.counts[name]] for name in seen.names}
    found.reads = {name: [seen.reads[name]] for name in seen.weights.values()}
    parameters = set(seen.weights.values())
    for name, tensor in _tensors(model):
        if before.get(name) != _checksum(tensor):
            (found.written if name in parameters else found.buffers).add(name)
    return found


@contextmanager
def _noting_gradients(found: Uses) -> Iterator[None]:
    """Notice gradients that the step takes by itself: gradient penalties, attacks, inner loops."""
    own = torch.autograd.grad

    def grad(*args: Any, **kwargs: Any) -> Any:
        found.differentiates = True
        return own(*args, **kwargs)

    torch.autograd.grad = grad
    try:
        yield
    finally:
        torch.autograd.grad = own


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _checksum(tensor: Tensor) -> tuple[int, int]:
    """Return two sums over all bits: batch norm and `weight.data` are written without a new version."""
    if tensor.is_meta:  # without numbers: how often it was written in place
        return tensor._version, 0
    flat = tensor.detach().reshape(-1).contiguous()
    words = flat.view(torch.uint8).to(torch.int64)
    places = torch.arange(1, len(words) + 1, device=words.device) % 65_521
    return int(words.sum()), int((words * places).sum())


class _Seen(TorchFunctionMode):
    """Looks for weights among the arguments of every operation, and for who computed them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found, self.stack = Uses(), list[str]()
        self.counts, self.reads = Counter[str](), Counter[str]()
        self.weights = {id(p): name for name, p in model.named_parameters()}
        self.storages = {p.untyped_storage().data_ptr(): id(p) for p in model.parameters()}
        self.owners: dict[int, list[str]] = {}
        self.names: list[str] = []
        for name, module in model.named_modules():
            own = [id(p) for p in module.parameters()] if name else []
            self.names += [name] if own else []
            for key in own:
                self.owners.setdefault(key, []).append(name)
        self._made: dict[int, tuple[Tensor, frozenset[str]]] = {}

    @contextmanager
    def hooked(self, model: nn.Module) -> Iterator[None]:
        """Notice calls of the modules that have weights."""
        handles = []
        for name in self.names:
            module = model.get_submodule(name)
            handles += [
                module.register_forward_pre_hook(self._enter(name), with_kwargs=True, prepend=True),
                module.register_forward_hook(self._leave(name), always_call=True),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._made.clear()

    def _enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.counts[name] += 1
            self.stack.append(name)
            self.found.follows |= {(maker, name) for maker in self._makers((args, kwargs))}

        return hook

    def _leave(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if name in self.stack:
                while self.stack.pop() != name:  # calls inside that raised
                    pass
            self._note(output, frozenset({name}))

        return hook

    def _weight_at(self, value: Any) -> int | None:
        """Return the weight whose elements a tensor shares: itself, its `data`, or a view of it."""
        if not isinstance(value, Tensor) or value.is_sparse or not value.numel():
            return None
        return self.storages.get(value.untyped_storage().data_ptr())

    def _makers(self, values: Any) -> frozenset[str]:
        found = [self._made.get(id(t)) for t in tree_leaves(values) if isinstance(t, Tensor)]
        return frozenset().union(*(names for known in found if known for names in (known[1],)))

    def _note(self, values: Any, makers: frozenset[str]) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and makers:
                known = self._made.get(id(tensor), (tensor, frozenset[str]()))[1]
                self._made[id(tensor)] = (tensor, known | makers)  # held, so that no id comes twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        if _reads(func):
            for value in tree_leaves(given):
                if (name := self.weights.get(id(value))) is None:
                    continue
                self.reads[name] += 1
                for owner in self.owners.get(id(value), ()):
                    if owner not in self.stack:
                        self.found.outside.setdefault(owner, name)
        into = tree_leaves((args[:1] if _writes(func) else (), given[1].get("out")))
        places = {self._weight_at(value) for value in into}
        self.found.written |= {self.weights[at] for at in places if at is not None}
        result = func(*args, **(kwargs or {}))
        makers = self._makers(given)
        if makers and not isinstance(result, (bool, int, float, torch.Size, torch.dtype)):
            self._note(result, makers)
        return result


def _reads(func: Any) -> bool:
    """Whether a function reads elements of its arguments, and not only what they are."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") in _READING
    return name not in _ABOUT


def _writes(func: Any) -> bool:
    """Whether a function may write elements of its first argument."""
    name = getattr(func, "__name__", "")
    if name == "__set__":
        return getattr(getattr(func, "__self__", None), "__name__", "") == "data"
    ends = name.endswith("_") and not name.endswith("__") and name not in _ABOUT
    return ends or name in _IN_PLACE
