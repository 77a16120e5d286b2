"""A block computed a second time, in backward: from what it was in forward, and as if there had been no second time.

`Recomputation` brings back the `Moment` of the forward for the second one. `RecomputedBlock` is what is known of a block from
its calls so far: some are compared, whether the second time gave what the first one did.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_accel.errors import Unsupported, explain
from lightning_accel.seldom import is_due
from lightning_accel.surgery.moment import Moment, Moments

_ALIKE = 1e-3
"""How much what is measured of a result may differ in its recomputation, as a share of the norm."""
_SAMPLES = 64
_DO = "leave the block out by `select=Select(exclude=...)`"


class RecomputedBlock:
    """What is known of a block that recomputes.

    Args:
        block: The module.
        check_every_n_calls: At how many calls a result is compared with its recomputation, besides the first, second,
            fourth, eighth ..., and the first after a change of its structure; None for never.

    Attributes:
        reason: Why it keeps its activations after all, or "".
        num_checked: Recomputations that were compared.
    """

    def __init__(self, block: nn.Module, check_every_n_calls: int | None) -> None:
        self.block = weakref.ref(block)
        self.check_every_n_calls = check_every_n_calls
        self.reason = ""
        self.num_checked = 0
        self._moments = Moments(block)
        self._count = 0
        self._structure = 0
        self._fills_late = False

    def begin(self, *arguments: Any) -> Moment:
        """Note what is before a call."""
        self._count += 1
        moment = self._moments.take(*arguments, whole=self._count == 1)
        changed = self.check_every_n_calls is not None and self._moments.count != self._structure
        self.is_due = changed or is_due(self._count, self.check_every_n_calls)
        self._structure = self._moments.count
        return moment

    @property
    def stops_early(self) -> bool:
        """Whether a recomputation may end as soon as all is there that was saved."""
        return not (self.is_due or self._count == 1 or self._fills_late)

    def end(self, moment: Moment, out: Any) -> None:
        """Look at what a call wrote and what its graph saved.

        Raises:
            Unsupported: It wrote what is too large to be copied each time, and had not done so before.
        """
        if self.is_due or self._count == 1:
            self._fills_late = "RreluWithNoiseBackward0" in _graph(out)
        if self._count == 1:
            moment.note_written()
            return
        written = moment.written()
        block = self.block()
        if written and block is not None:
            names = {id(t): n for n, t in (*block.named_parameters(), *block.named_buffers())}
            raise Unsupported(
                f"a checkpointed {type(block).__name__} begins to change large tensors of its own in forward, and so "
                "would recompute something else than it computed",
                ", ".join(names.get(id(t), "a tensor among its attributes") for t in written[:4]),
                _DO,
            )

    def compared(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Let a call refuse a result that is not that of its first time."""
        first: list[list[list[float]]] = []

        def again(*values: Any) -> Any:
            out = call(*values)
            found = [_measure(t) for t in tree_leaves(out) if isinstance(t, Tensor)]
            if not first:
                first.append(found)
                return out
            self.num_checked += 1
            if len(found) != len(first[0]) or any(map(_differ, found, first[0])):
                self._differs()
            return out

        return again

    def _differs(self) -> None:
        block = self.block()
        kind = type(block).__name__
        what = f"a checkpointed {kind} recomputes something else than it computed"
        found = "another result for the same arguments, attributes and random states"
        if self.num_checked == 1:
            raise Unsupported(what, found, f"{_DO}, or do not count calls in its forward")
        self.reason = f"{found} at call {self._count}"
        warnings.warn(
            explain(
                f"{what}; it keeps its activations from now on",
                f"{self.reason}, after {self.num_checked - 1} comparisons that agreed: gradients since the last of "
                "these may be wrong",
                _DO,
            ),
            stacklevel=2,
        )


class Recomputation:
    """Stands around a recomputation: what is kept, statistics and random states stay as they are.

    Args:
        inner: Another context to enter, or None.
        moment: Of the forward.
    """

    def __init__(self, inner: Any, moment: Moment) -> None:
        self.inner = inner
        self.moment = moment
        self.held: list[tuple[nn.Module, str, Any]] = []

    def __enter__(self) -> None:
        if self.moment.stepped():
            raise Unsupported(
                "weights were modified by an inplace operation between a forward and its backward",
                "a checkpointed block, which would recompute with the new ones",
                "step optimizers after all backwards that need the old weights, as without checkpointing",
            )
        self.now = self.moment.bring_back()
        for norm in self.moment.norms:
            # Statistics are passed all the same, for as many tensors have to be saved as before.
            if norm.track_running_stats:
                self._set(norm, "momentum", 0.0)
                self._set(norm, "num_batches_tracked", None)
        if self.inner is not None:
            self.inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self.inner is not None:
            self.inner.__exit__(*error)
        while self.held:
            module, name, value = self.held.pop()
            setattr(module, name, value)
        self.now.come_back()

    def _set(self, module: nn.Module, name: str, value: Any) -> None:
        self.held.append((module, name, getattr(module, name)))
        setattr(module, name, value)


@torch.no_grad()
def _measure(tensor: Tensor) -> list[float]:
    """Return norm, sum and some numbers, for which no copy is kept."""
    if type(tensor) is not Tensor or tensor.is_meta or tensor.layout != torch.strided:
        return [0.0]  # sharded or without numbers
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    kind = torch.float64 if values.dtype == torch.float64 else torch.float32
    if values.dtype not in (torch.float16, torch.bfloat16):
        values = values.to(kind)
    norm = torch.linalg.vector_norm(values, dtype=kind)
    some = values.flatten()[:: max(values.numel() // _SAMPLES, 1)].to(kind)
    found: list[float] = torch.cat([norm[None], values.sum(dtype=kind)[None], some]).tolist()
    return found


def _differ(one: list[float], other: list[float]) -> bool:
    # Without torch: a selective recomputation counts its operations.
    if len(one) != len(other):
        return True
    limit = _ALIKE * max([n for n in (one[0], other[0]) if math.isfinite(n)], default=0.0)
    return any(
        abs(a - b) > limit if math.isfinite(a - b) else repr(a) != repr(b)
        for a, b in zip(one, other, strict=True)
    )


def _graph(out: Any) -> set[str]:
    """Return the kinds of nodes in the graph of some results."""
    nodes = [t.grad_fn for t in tree_leaves(out) if isinstance(t, Tensor) and t.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        for following, _ in nodes.pop().next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return {type(node).__name__ for node in seen}
