"""What a compiled block does when it would have to be compiled again.

A graph holds for the sizes it was captured with. Every other size costs another graph: seconds to minutes
in the middle of a training, and after eight of them dynamo gives up and runs the code eagerly. Two rules
keep that away. Where the last batch of an epoch is ragged, the batch dimension is marked dynamic, so that
one graph serves both sizes; elsewhere it stays static, which gives the faster code. And after a warm-up a
block is *settled*: it uses the graphs it has, and runs eagerly where none fits.

A settled block calls `torch._dynamo.run`, which looks graphs up and captures none. It is the stance
`eager_on_recompile`, for one function instead of the whole process. That a call ran eagerly shows by
`torch.compiler.is_compiling()`, which is true in a graph and false in the Python it was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_accel.progress import progress

_EXACT = {
    # Else a float that changes and is an operator's parameter keeps its second value: PyTorch #194976, #197889.
    "specialize_float": True,
    # Else hooks that modules inside get later are never called: PyTorch #117758.
    "skip_nnmodule_hook_guards": False,
}
_MARKS = ("_dynamo_weak_dynamic_indices", "_has_dynamo_dim_marking")


class CompiledCode:
    """One function that dynamo compiles: its graphs, and whether more of them may come.

    Args:
        name: Of the code object; dynamo keeps graphs, limits and sizes seen by code object.
        missed: Called with module and arguments where a settled call found no graph that fits.
        kwargs: For `torch.compile`.
    """

    def __init__(self, name: str, missed: Callable[..., None], **kwargs: Any) -> None:
        def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                missed(module, args, kwargs)
            return module._call_impl(*args, **kwargs)

        code = run.__code__.replace(co_name=name)
        self.name = name
        self.function = FunctionType(code, run.__globals__, name, closure=run.__closure__)
        self.compiled: Callable[..., Any] = torch.compile(self.function, **kwargs)
        self.cached: Callable[..., Any] = torch._dynamo.run(self.compiled)
        self.sizes: frozenset[int] = frozenset()
        self.settled = False
        self.paused = False
        self.calls = 0
        self.misses = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.calls += 1
        if self.strict:
            return self.cached(module, *args, **kwargs)
        marked = mark((*args, *kwargs.values()), self.sizes) if self.sizes else []
        is_first = self.calls == 1  # which captures and compiles
        try:
            with (
                torch._dynamo.config.patch(_EXACT),
                progress(f"compiling {self.name}") if is_first else nullcontext(),
            ):
                return self.compiled(module, *args, **kwargs)
        finally:
            unmark(marked)

    @property
    def strict(self) -> bool:
        """Whether a call that no graph fits runs eagerly."""
        return self.settled and not self.paused

    def settle(self) -> None:
        """End the warm-up, if there was a call; grant another one if most calls since found no graph."""
        lasting = self.settled and 2 * self.misses > self.calls
        self.settled = self.calls > 0 and not lasting
        self.calls = self.misses = 0

    def why(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Return why no graph fits this call, or `None` where one does."""
        from torch._dynamo.guards import get_guard_fail_reason

        scope = {"module": module, "args": args, "kwargs": kwargs, "missed": None}
        reasons = []
        for entry in torch._dynamo.eval_frame._debug_get_cache_entry_list(self.function.__code__):
            manager = entry.guard_manager
            if manager.check_verbose(scope).result:
                return None
            number, backend = entry.compile_id, entry.backend
            reason = get_guard_fail_reason(
                manager, self.function.__code__, scope, number, backend, skip_logging=True
            )
            reasons.append(str(reason).partition(": ")[2].strip().partition("\n")[0])
        return reasons[-1] if reasons else "no graph was captured in the warm-up"


def mark(values: Iterable[Any], sizes: frozenset[int]) -> list[Tensor]:
    """Mark dynamic the first dimension of each tensor that is as long as a batch; return those marked.

    Only the first two dimensions can be the batch. A mark is a wish: where code needs a number, the
    dimension stays static.

    >>> x = torch.zeros(4, 8)
    >>> [t is x for t in mark([x, "y", torch.zeros(3)], frozenset({4, 2}))]
    [True]
    >>> unmark([x])
    """
    marked = []
    for tensor in torch.utils._pytree.tree_leaves(list(values)):
        if not isinstance(tensor, Tensor) or hasattr(tensor, _MARKS[0]):
            continue  # what the user marked keeps the user's marks
        axis = next((i for i, size in enumerate(tensor.shape[:2]) if size in sizes), None)
        if axis is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, axis)
            marked.append(tensor)
    return marked


def unmark(tensors: Iterable[Tensor]) -> None:
    """Take the marks off again; graphs captured with them do not ask for them.

    >>> x = torch.zeros(4, 8)
    >>> unmark(mark([x], frozenset({4})))
    >>> vars(x)
    {}
    """
    for tensor in tensors:
        for name in _MARKS:
            vars(tensor).pop(name, None)


def batch_sizes(loaders: Any, num_batches: Sequence[float] = ()) -> frozenset[int]:
    """Return the sizes of batches that loaders will give, where known; more than one is ragged.

    A batch of one sample is left out: dynamo gives it a graph of its own in any case.

    Args:
        loaders: A loader, or loaders in lists and dicts as Lightning takes them.
        num_batches: How many batches of each are used, where that is limited.

    >>> batch_sizes(DataLoader(range(10), batch_size=4)) == {4, 2}
    True
    >>> batch_sizes(DataLoader(range(10), batch_size=4), [2]) == {4}
    True
    """
    leaves = torch.utils._pytree.tree_leaves(loaders)
    limits = [*num_batches, *[float("inf")] * len(leaves)]
    sizes: set[int] = set()
    for loader, limit in zip(leaves, limits, strict=False):
        sampler = getattr(loader, "batch_sampler", None)
        size = getattr(sampler, "batch_size", None)
        inner: Any = getattr(sampler, "sampler", None)
        if not isinstance(loader, DataLoader) or not isinstance(size, int):
            continue
        if not hasattr(type(inner), "__len__"):
            continue
        whole, rest = divmod(len(inner), size)
        if whole:
            sizes.add(size)
        if rest and not getattr(sampler, "drop_last", True) and limit > whole:
            sizes.add(rest)
    return frozenset(size for size in sizes if size > 1)
