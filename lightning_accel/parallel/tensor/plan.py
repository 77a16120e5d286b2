"""Which widths of a network can be split over processes, and which layers then sum."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from lightning_accel.errors import AccelError, NoEffect
from lightning_accel.parallel.tensor.narrow import Narrowing, narrowing, without_linked
from lightning_accel.pruning.graph import Graph, Group
from lightning_accel.surgery import Cut, Select, twin
from lightning_accel.surgery.call import Call, first
from lightning_accel.surgery.receipt import summary

_ROWS = 2
_INSTEAD = "use `accel_fsdp`, which shards any module, or fewer processes per network"
_PER_UNIT = (
    nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.PReLU, nn.Linear,
    nn.modules.conv._ConvNd, nn.Embedding,
)  # fmt: skip
"""Layers whose values per channel act on that channel alone; of others only a trial tells."""


class SplitGroup(NamedTuple):
    """Units that are split, and the layers that make and read them.

    `readers` sum their outputs over processes; `makers` sum the gradients of their inputs.
    """

    name: str
    kind: str
    units: int
    makers: tuple[str, ...]
    readers: tuple[str, ...]

    @property
    def signature(self) -> str:
        """The name without numbers: what repeated blocks have in common."""
        return re.sub(r"\d+", "#", " ".join((self.name, self.kind, *self.makers, *self.readers)))


@dataclass(frozen=True, eq=False)
class TensorPlan:
    """What each process keeps of a network, plain data that can be sent.

    Args:
        groups: What is split.
        cuts: What each process keeps.
        whole: Why other groups stay whole on every process, by name.
        shares: Parameters of each process, by those of the network.
        narrowed: Modules whose inputs say within that they are narrower.
    """

    groups: tuple[SplitGroup, ...]
    cuts: tuple[Cut, ...]
    whole: Mapping[str, str]
    shares: tuple[float, ...]
    narrowed: tuple[Narrowing, ...] = ()

    @property
    def size(self) -> int:
        """The number of processes."""
        return len(self.cuts)

    @property
    def layers(self) -> set[str]:
        """The names of the layers that make or read what is split."""
        return {name for group in self.groups for name in (*group.makers, *group.readers)}

    def __repr__(self) -> str:
        """Write what is split and what is not, in at most ten lines."""
        share = max(self.shares)
        lines = [
            f"  {g.name}: {g.units} {g.kind}, summed after {', '.join(g.readers)}"
            for g in self.groups
        ]
        lines += [f"  whole: {name}: {why}" for name, why in self.whole.items()]
        return summary(
            f"TensorPlan({self.size} processes, {share:.0%} of the parameters each)", lines
        )


def plan_tensor(
    model: nn.Module,
    calls: Sequence[Call],
    size: int,
    *,
    without: Mapping[str, str] | None = None,
) -> TensorPlan:
    """Plan how to split a network over processes.

    Nothing is proved here: a reduction over the units that are split is found by `proof.prove` only.

    Args:
        model: The network; it is not changed.
        calls: Example calls of it or of networks inside.
        size: Number of processes.
        without: Why groups with some `SplitGroup.signature` must stay whole.

    Raises:
        NoEffect: No group can be split over so many.
        AccelError: The calls fail.
    """
    graph = _traced(model, calls)
    choice = _Choice(graph, size, without or {})
    cuts = choice.cuts()
    if not choice.chosen:
        listed = "; ".join(f"`{n}`: {why}" for n, why in [*choice.whole.items()][:4])
        raise NoEffect(
            f"no layer can be split over {size} processes",
            listed or f"no width of {type(model).__name__} is made and read by layers",
            _INSTEAD,
        )
    total = sum(p.numel() for p in model.parameters())
    named = dict(graph.model.named_parameters())
    kept = [sum(_left(cut, n, p) for n, p in named.items()) for cut in cuts]
    groups = tuple(choice.described(group) for group in choice.chosen)
    shares = tuple(k / total for k in kept)
    return TensorPlan(groups, cuts, choice.whole, shares, tuple(choice.narrowed.values()))


def _traced(model: nn.Module, calls: Sequence[Call]) -> Graph:
    try:
        try:
            return Graph(twin(model, calls), first(calls, _ROWS), select=Select())
        except NoEffect:
            raise
        except AccelError:  # a network that wants all rows, or none cut apart
            return Graph(twin(model, calls), calls, select=Select())
    except NoEffect as error:
        found = str(error).partition("Found: ")[2].partition(" Do: ")[0]
        raise NoEffect("no layer can be split", found, _INSTEAD) from None


def _left(cut: Cut, name: str, parameter: nn.Parameter) -> int:
    if name not in cut.kept:
        return parameter.numel()
    return cut.kept[name].take(torch.empty(parameter.shape, device="meta")).numel()


class _Choice:
    """Chooses groups that go together, the largest first."""

    def __init__(self, graph: Graph, size: int, without: Mapping[str, str]) -> None:
        self._graph, self._size = graph, size
        self._modules = dict(graph.model.named_modules())
        self._parameters = dict(graph.model.named_parameters())
        self.whole = {change.name: change.what for change in graph.skipped}
        self.chosen: list[Group] = []
        self.narrowed: dict[str, Narrowing] = {}
        self._linked: dict[str, Group] = {}
        """Groups that stay whole while others, linked to them, are split."""
        possible = []
        for group in graph.groups:
            why = self._why_not(group) or without.get(self.described(group).signature, "")
            if why:
                self.whole[group.name] = why
            else:
                possible.append(group)
        self._choose(sorted(possible, key=lambda g: (self._is_doubtful(g), -self._numel(g))))
        self._keep_links()

    def described(self, group: Group) -> SplitGroup:
        """Return a group by names alone."""
        makers, readers = self._layers(group, "out"), self._layers(group, "in")
        return SplitGroup(group.name, group.kind, group.units, tuple(makers), tuple(readers))

    def cuts(self) -> tuple[Cut, ...]:
        """Return what each process keeps; groups whose sizes cannot follow are given up."""
        try:
            return tuple(self._cut(self.chosen, rank) for rank in range(self._size))
        except ValueError:
            sound: list[Group] = []
            for group in self.chosen:
                try:
                    self._cut([*sound, group], 0)
                    sound.append(group)
                except ValueError as error:
                    self.whole[group.name] = str(error)
            self.chosen = sound
            self._keep_links()
        return tuple(self._cut(self.chosen, rank) for rank in range(self._size))

    def _cut(self, groups: Collection[Group], rank: int) -> Cut:
        gone = {group.name: self._gone(group, rank) for group in groups}
        linked = [g for g in self._linked.values() if any(g.link == c.link for c in groups)]
        cut = self._graph.cut(gone | {g.name: self._gone(g, 0) for g in linked})
        if linked:
            free = {g.name: gone[g.name] for g in groups if g.name not in self.narrowed}
            around = [one.module for one in self.narrowed.values()]
            cut = without_linked(self._graph, cut, self._graph.cut(free), linked, around)
        if cut.scaled or cut.renormed:
            raise ValueError("its weights hang on the norms of whole rows")
        return cut

    def _gone(self, group: Group, rank: int) -> list[int]:
        mine = set(_share(group, self._size, rank))
        return [unit for unit in range(group.units) if unit not in mine]

    def _layers(self, group: Group, role: str) -> list[str]:
        owners = dict.fromkeys(m.tensor.rpartition(".")[0] for m in group.members if m.role == role)
        return sorted(name for name in owners if name not in self._passing(group))

    def _passing(self, group: Group) -> set[str]:
        """Return the depthwise convolutions of a group: their inputs are split as their outputs are."""
        convolutions = {
            name
            for name in {m.tensor.rpartition(".")[0] for m in group.members}
            if getattr(self._modules.get(name), "groups", 1) != 1
        }
        if not convolutions:
            return set()
        with suppress(ValueError):
            sizes = self._graph.cut({group.name: [*range(group.multiple)]}).attributes
            return {name for name in convolutions if "groups" in sizes.get(name, {})}
        return set()

    def _numel(self, group: Group) -> int:
        names = {m.tensor for m in group.members}
        return sum(self._parameters[n].numel() for n in names if n in self._parameters)

    def _is_doubtful(self, group: Group) -> bool:
        """Whether layers act on these units that may act on all of them together."""
        owners = {m.tensor.rpartition(".")[0] for m in group.members}
        return not all(
            isinstance(self._modules.get(o), _PER_UNIT) or _is_linear(self._modules.get(o))
            for o in owners
        )

    def _why_not(self, group: Group) -> str:
        makers, readers = self._layers(group, "out"), self._layers(group, "in")
        if not readers:
            return "no layer reads it"
        if not makers:
            return "no layer makes it"
        if both := sorted({*makers} & {*readers}):
            return f"`{both[0]}` both makes and reads it"
        if group.kind == "width":
            return "attention multiplies the whole width of a head"
        if any(".parametrizations." in f".{name}." for name in (*makers, *readers)):
            return "a weight of it is computed"
        chunks = group.units // group.multiple
        if chunks < self._size:
            kernel = f" in multiples of {group.multiple}" if group.multiple > 1 else ""
            return f"{group.units} {group.kind}{kernel} do not go to {self._size} processes"
        return ""

    def _choose(self, possible: Sequence[Group]) -> None:
        made, read = set[str](), set[str]()
        for group in possible:
            makers, readers = set(self._layers(group, "out")), set(self._layers(group, "in"))
            if (
                makers & read
                or readers & made
                or any(self._overlap(group, one) for one in self.chosen)
            ):
                self.whole[group.name] = "its layers are split along their other dimension"
                continue
            self.chosen.append(group)
            made |= makers
            read |= readers

    def _overlap(self, group: Group, other: Group) -> bool:
        """Whether two groups would cut one tensor along two dimensions."""
        dims = {m.tensor: m.dim for m in other.members}
        return any(dims.get(m.tensor, m.dim) != m.dim for m in group.members)

    def _keep_links(self) -> None:
        """Groups that must keep the same number of positions are split together, told another width, or left."""
        for link in sorted({g.link for g in self.chosen if g.link is not None}):
            mine = [g for g in self.chosen if g.link == link]
            linked = [g for g in self._graph.groups if g.link == link and g not in mine]
            if not linked and len({g.units * g.per_unit for g in mine}) == 1:
                continue
            told = {g.name: narrowing(self._graph, g, linked, self._size) for g in mine}
            if linked and all(told.values()):
                self.narrowed |= {n: one for n, one in told.items() if one is not None}
                self._linked |= {g.name: g for g in linked}
                continue
            for group in mine:
                self.chosen.remove(group)
                self.whole[group.name] = f"it must stay as wide as `{(linked or mine)[0].name}`"


def _share(group: Group, size: int, rank: int) -> range:
    """Return the units of one process: neighbours, as evenly as `multiple` allows."""
    chunks, m = group.units // group.multiple, group.multiple
    low, high = (rank_ * chunks // size for rank_ in (rank, rank + 1))
    return range(low * m, group.units if rank == size - 1 else high * m)


def _is_linear(module: nn.Module | None) -> bool:
    """Whether this is the `Conv1D` of GPT-2, a linear layer with its weight the other way round."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
