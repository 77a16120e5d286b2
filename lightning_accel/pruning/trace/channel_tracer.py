"""What is known of every tensor of a forward pass: the atoms of its dimensions.

Two modes watch the pass. Below, on aten operations, `rule` says how the dimensions of the results come
from those of the arguments; a rule exists per operation, not per layer, so that modules written by
anybody are followed alike, and what has no rule is fixed. Above, on torch functions, the numbers that a
forward passes as sizes are read (`numbers`).

A dimension that is split in two, such as channels into heads and their width, can lose whole heads, or the
same places of every head. `live` says which, per split; the first pass finds out which splits make the
batch of a matrix product (attention), so that the second can remove heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_accel.pruning.trace.sizes import Equation
from lightning_accel.pruning.trace.union_find import Ids, UnionFind
from lightning_accel.surgery.structure import named_tensors

Site = tuple[int, int]
"""One split of a dimension: the number of the operation, and which of its dimensions."""


class Axis(NamedTuple):
    """The atoms of one dimension, and the splits that it is a factor of: (site, which factor)."""

    atoms: Ids
    factors: frozenset[tuple[Site, int]] = frozenset()


class Info(NamedTuple):
    """What is known of a tensor; `source` names the parameter or buffer that it is a view of."""

    axes: tuple[Axis, ...]
    source: str = ""


class Product(NamedTuple):
    """One matrix product or convolution: as many multiply-accumulates as these dimensions multiply to."""

    module: str
    axes: tuple[Ids, ...]
    times: int


class ChannelTracer(TorchDispatchMode):
    """The atoms of a model and what joins them.

    Args:
        model: The network that is watched.
        live: Which factor stays prunable at the splits named.
        follow: Applies the rule of an operation: (flow, function, args, kwargs, result).

    Attributes:
        own: The model's parameters and buffers by name.
        made, read: Dimensions of parameters that make channels, and that read them.
        batched: Splits of which a factor is the batch of a matrix product, and which factor.
        headed: Atoms that are such factors.
        splits: The factors of each split that are not the same throughout.
        equations: What the numbers in the forward count.
        products: The arithmetic.
        queries: Per product of two activations, the last dimension of the left one, and whether the
            scores are divided by the root of its size.
        aligned: Dimensions of which a kernel takes only multiples of a number.
        normed: Weights that are divided by their norm: direction, magnitude, the dimension kept.
        operation: The operation now followed.
        ran: The modules that have run.
        touched: The parameters and buffers that an operation has read, by the first of their names.
        adjustable: Whether the sizes passed to the function now running can follow a cut.
        others: Whether they count a dimension that stays, that of pixels or samples, say.
        groups: The groups of the grouped operation just run, where whole groups can go.
    """

    def __init__(
        self, model: nn.Module, live: Mapping[Site, int], follow: Callable[..., None]
    ) -> None:
        super().__init__()
        self._follow = follow
        self.model = model
        self.live = live
        self.atoms = UnionFind()
        # By identity, for tensors compare place by place; and weak, so that activations can go.
        self.infos: Any = WeakTensorKeyDictionary()
        self.own: dict[str, Info] = {}
        self.read: list[Ids] = []
        self.made: list[Ids] = []
        self.headed: list[Ids] = []
        self.batched: dict[Site, int] = {}
        self.splits: dict[Site, tuple[int, ...]] = {}
        self.equations: list[Equation] = []
        self.products: list[Product] = []
        self.unknown: set[str] = set()
        self.queries: list[tuple[Ids, bool]] = []
        self.aligned: list[tuple[Ids, int]] = []
        self.normed: list[tuple[str, str, int]] = []
        self.stack: list[str] = []
        self.operation = ""
        self.ran: set[str] = set()
        self.touched: set[str] = set()
        self.adjustable: Sequence[bool] | None = None
        self.others: Sequence[bool] = ()
        self.groups_adjustable = True
        self.groups: Ids | None = None
        self.step = 0
        for name, tensor in named_tensors(model):
            # Tied parameters are one tensor under two names, and so one set of atoms.
            known = self.infos.get(tensor)
            if known is None:
                axes = tuple(Axis(self.atoms.fresh(n)) for n in tensor.shape)
                known = self.infos[tensor] = Info(axes, name)
            self.own[name] = known

    # -- what rules use -----------------------------------------------------------------------------

    @property
    def place(self) -> str:
        return self.stack[-1] if self.stack else ""

    @property
    def here(self) -> str:
        """The module now running, as messages name it."""
        return f"`{self.place or type(self.model).__name__}`"

    def info(self, tensor: Tensor) -> Info:
        known = self.infos.get(tensor)
        if known is not None and known.source:
            self.touched.add(known.source)
        # No operation made it and the model does not hold it: a constant that no cut can reach.
        if known is None or len(known.axes) != tensor.dim():
            reason = f"it meets a constant in the forward of {self.here}"
            known = Info(tuple(Axis(self.atoms.fresh(n, reason)) for n in tensor.shape))
            self.infos[tensor] = known
        return known

    def still(self, size: int, reason: str) -> Axis:
        return Axis(self.atoms.fresh(size, reason))

    def fix(self, axis: Axis, reason: str) -> None:
        if len(axis.atoms):
            self.atoms.fix(axis.atoms, f"{reason} in {self.here}")

    def taken_groups(self) -> Ids | None:
        """Return `groups` and forget them."""
        groups, self.groups = self.groups, None
        return groups

    def multiply(self, *axes: Axis, times: int = 1) -> None:
        self.products.append(Product(self.place, tuple(a.atoms for a in axes), times))

    # -- the trace ----------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # Counted alike in every pass, as the forward is the same: so a site names one split in all of them.
        self.step += 1
        self._follow(self, func, args, kwargs, result)
        return result
