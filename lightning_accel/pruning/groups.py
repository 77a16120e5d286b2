"""The groups of channels that can only go together, from the atoms that one pass has joined.

The idea of dependency groups is DepGraph's (Fang et al. 2023, arXiv:2301.12900). Here a unit is a part of
free atoms; units that touch the same dimensions of the same tensors form a group. So fused projections,
heads, splits with several readers, ties and a user's own norms need no handler of their own.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_accel.pruning.trace import ChannelTracer, Ids, WidthConstraints
from lightning_accel.pruning.trace.sizes import Attribute, Length, leaves
from lightning_accel.surgery import Change, Select, Structure
from lightning_accel.surgery.attributes import get_size
from lightning_accel.surgery.structure import named_tensors


class Member(NamedTuple):
    """One dimension of one tensor in a group.

    `role` is "out" where a layer makes the channels, "in" where one reads them, and "own" for one value
    per channel (bias, norm, statistics, position table). `positions` has shape (units, places): which
    places along the dimension belong to each unit.
    """

    tensor: str
    dim: int
    role: str
    positions: Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """Units that can be removed one by one, each with all that hangs on it.

    `name` is the layer that makes them first; `layers` all whose outputs shrink; `kind` "channels",
    "heads" or "width" (the same places of every head). Groups with the same `link` must keep the same
    number of positions, of which each unit has `per_unit`. `dense` counts the units before earlier cuts.
    The kernels that read it need a `multiple` of units.
    """

    name: str
    kind: str
    units: int
    members: tuple[Member, ...]
    layers: tuple[str, ...]
    dense: int
    link: int | None = None
    per_unit: int = 1
    multiple: int = 1


class Groups:
    """Finds the groups.

    Args:
        model: The network that was traced.
        tracer: What the trace showed.
        select: Every layer whose outputs shrink must be among these.
        frozen: Names of parameters that must not be touched.
        dense: Shapes before an earlier cut, of which shares are meant.

    Attributes:
        found: The groups.
        skipped: Layers that stay as they are, with the reason.
        root: The representative of each atom.
        roots: The representatives of each group's units.
        equations: Those in which something can change.
        attributes: The present values of the attributes in them.
    """

    def __init__(
        self,
        model: nn.Module,
        tracer: ChannelTracer,
        *,
        select: Select,
        frozen: frozenset[str],
        dense: Structure,
    ) -> None:
        self.skipped: list[Change] = []
        self.roots: dict[str, Ids] = {}
        self._model = model
        self._flow = tracer
        self._dense = dense
        self._shrinking: set[str] = set()
        self._paired = {
            f"{name}.layers.{n}.self_attn".lstrip(".")
            for name, module in model.named_modules()
            if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor
            for n in range(len(module.layers))
        }
        self._index()
        self.found = self._find(set(select.require(model)), frozen)

    def _index(self) -> None:
        """Number the free parts, and tell them apart by the dimensions of tensors that they touch."""
        tracer = self._flow
        everything = np.arange(tracer.atoms.count)
        self.root = tracer.atoms.find(everything)
        self._fixed = tracer.atoms.is_fixed(everything)
        attributes = {
            leaf: int(_attribute(self._model, leaf))
            for e in tracer.equations
            for leaf in leaves(e.expression)
            if isinstance(leaf, Attribute)
        }
        self.attributes = attributes
        self._is_made, self._is_read = np.zeros((2, tracer.atoms.count), dtype=bool)
        for marks, marked in ((tracer.made, self._is_made), (tracer.read, self._is_read)):
            for atoms in marks:
                marked[atoms] = True
        moving = [e for e in tracer.equations if self._moves(e)]
        shared = {a for e in moving for a in leaves(e.expression) if isinstance(a, Attribute)}
        self.equations = moving + [
            e
            for e in tracer.equations
            if not self._moves(e)
            and any(isinstance(a, Attribute) and a in shared for a in leaves(e.expression))
        ]

    def _moves(self, equation: Any) -> bool:
        """Whether anything in an equation can change."""
        parts = [equation.atoms]
        parts += [x.atoms for x in leaves(equation.expression) if isinstance(x, Length)]
        if all(self._fixed[self.root[part]].all() for part in parts):
            return False
        only = equation.expression
        return not (
            isinstance(only, Length)
            and np.array_equal(self.root[only.atoms], self.root[equation.atoms])
        )

    def _find(self, chosen: set[str], frozen: frozenset[str]) -> list[Group]:
        tracer = self._flow
        rng = np.random.default_rng(0)
        places = [
            (name, dim, axis.atoms)
            for name, info in self._first_names()
            for dim, axis in enumerate(info.axes)
        ]
        code = np.zeros(tracer.atoms.count, dtype=np.uint64)
        for _, _, atoms in places:
            mark = rng.integers(1, 2**63, dtype=np.uint64)
            np.add.at(code, self.root[atoms], mark)
        groups: dict[int, list[tuple[str, int, Ids]]] = {}
        for name, dim, atoms in places:
            roots = self.root[atoms]
            for key in np.unique(code[roots[~self._fixed[roots]]]):
                groups.setdefault(int(key), []).append((name, dim, atoms))
        heads = {int(r) for a in tracer.headed for r in self.root[a]}
        found = [
            group
            for key, touched in groups.items()
            if (group := self._group(key, code, touched, heads))
        ]
        good = []
        for group in found:
            reason = self._refusal(group, chosen, frozen)
            if not reason:
                good.append(group)
            elif reason != _UNSELECTED:
                self.skipped.append(Change(group.name, reason))
        good = self._linked(good)
        self._name_the_rest(good)
        return good

    def _first_names(self) -> list[tuple[str, Any]]:
        return list(
            {id(info): (name, info) for name, info in reversed(self._flow.own.items())}.values()
        )[::-1]

    def _group(
        self, key: int, code: Any, touched: list[tuple[str, int, Ids]], heads: set[int]
    ) -> Group | None:
        order: dict[int, int] = {}
        members = []
        for name, dim, atoms in touched:
            roots = self.root[atoms]
            mine = np.flatnonzero((code[roots] == np.uint64(key)) & ~self._fixed[roots])
            for root in roots[mine]:
                order.setdefault(int(root), len(order))
            units = np.array([order[int(root)] for root in roots[mine]])
            places = mine[np.argsort(units, kind="stable")].reshape(len(order), -1)
            role = self._role(name, dim, atoms)
            members.append(Member(name, dim, role, torch.from_numpy(places)))
        layers = self._layers(members)
        if len(order) < 2 and not layers:
            return None
        name = layers[0] if layers else members[0].tensor.rpartition(".")[0]
        while name in self.roots:
            name += "'"
        self.roots[name] = np.array(list(order))
        kind = "heads" if heads & set(order) else "channels"
        dense = self._dense_units(members, len(order))
        multiple = self._multiple(kind, members, set(order))
        return Group(name, kind, len(order), tuple(members), layers, dense, multiple=multiple)

    def _multiple(self, kind: str, members: Sequence[Member], roots: set[int]) -> int:
        if kind == "heads" and any(m.tensor.rpartition(".")[0] in self._paired for m in members):
            return 2
        needed = [1]
        for atoms, size in self._flow.aligned:
            counts = Counter(self.root[atoms].tolist())
            each = max(counts.get(root, 0) for root in roots)
            if each:
                needed.append(size // math.gcd(size, each))
        return math.lcm(*needed)

    def _dense_units(self, members: Sequence[Member], units: int) -> int:
        tensors = dict(named_tensors(self._model))
        for member in members:
            before = self._dense.tensors.get(member.tensor)
            now = tensors[member.tensor].shape[member.dim]
            if before and member.positions.numel() == now:
                return max(units, round(units * before[member.dim] / now))
        return units

    def _role(self, name: str, dim: int, atoms: Ids) -> str:
        path, _, leaf = name.rpartition(".")
        owner = self._model.get_submodule(path)
        if leaf == "weight" and isinstance(owner, (nn.modules.conv._ConvNd, nn.Linear)):
            if isinstance(owner, nn.modules.conv._ConvTransposeNd):
                whole = dim == 0 and owner.groups > 1 and self._stays(name, 1)
                return "out" if dim == 1 or whole else "in"
            return "out" if dim == 0 else "in"
        if self._is_made[atoms].all():
            return "out"
        return "in" if self._is_read[atoms].all() else "own"

    def _stays(self, name: str, dim: int) -> bool:
        return bool(self._fixed[self.root[self._flow.own[name].axes[dim].atoms]].all())

    def _layers(self, members: Sequence[Member]) -> tuple[str, ...]:
        found: dict[str, None] = {}
        for member in members:
            path = member.tensor.rpartition(".")[0]
            owner = self._model.get_submodule(path)
            if member.role == "out" and not isinstance(owner, nn.Embedding):
                if ".parametrizations." in f".{path}.":
                    path = path.partition(".parametrizations.")[0]
                found[path] = None
        return tuple(found)

    def _refusal(self, group: Group, chosen: set[str], frozen: frozenset[str]) -> str:
        if group.units < 2:
            return "its channels can only go all together"
        if group.layers and not any(layer in chosen for layer in group.layers):
            return _UNSELECTED
        for layer in group.layers:
            if layer not in chosen:
                return f"it hangs together with `{layer}`, which is not selected"
        for member in group.members:
            if member.tensor in frozen:
                return f"`{member.tensor}` is frozen"
        makers = [m for m in group.members if m.role == "out"]
        if not makers:
            return _UNSELECTED  # no layer makes it: a table that only others look at
        axes = [self._flow.own[m.tensor].axes[m.dim].atoms for m in makers]
        if not any(self._is_made[atoms].any() for atoms in axes):
            return self._why_idle(makers[0].tensor) or "nothing that can be followed reads it"
        return ""

    def _linked(self, groups: list[Group]) -> list[Group]:
        """Link groups whose widths the forward takes for the same; drop what cannot follow."""
        while True:
            forms = WidthConstraints(
                self.equations, self.root, {g.name: self.roots[g.name] for g in groups}
            )
            links, wrong = forms.links()
            if not wrong:
                break
            for name, reason in wrong.items():
                self.skipped.append(Change(name, reason))
            groups = [g for g in groups if g.name not in wrong]
        return [
            dataclasses.replace(g, link=links[g.name][0], per_unit=links[g.name][1])
            if g.name in links
            else g
            for g in groups
        ]

    def _name_the_rest(self, groups: Sequence[Group]) -> None:
        """Say why each layer that no group shrinks stays as it is."""
        named = {layer for group in groups for layer in group.layers}
        named |= {change.name for change in self.skipped}
        self._shrinking = {member.tensor for group in groups for member in group.members}
        for name, module in self._model.named_modules():
            if name in named or isinstance(module, nn.Embedding):
                continue
            for leaf, parameter in module._parameters.items():
                if parameter is not None and parameter.dim() >= 2:
                    reason = self._why_not(f"{name}.{leaf}".lstrip("."))
                    if reason:
                        self.skipped.append(Change(name or leaf, reason))
                    break

    def _why_not(self, name: str) -> str:
        """Return what keeps the outputs of a weight as they are; nothing if it only was not selected."""
        axes = [axis.atoms for axis in self._flow.own[name].axes]
        outs = [atoms for dim, atoms in enumerate(axes) if self._role(name, dim, atoms) == "out"]
        if not any(self._is_made[atoms].any() or self._is_read[atoms].any() for atoms in axes):
            return self._why_idle(name)
        return next((why for atoms in outs if (why := self._flow.atoms.reason(atoms))), "")

    def _why_idle(self, name: str) -> str:
        """Return why a weight neither makes nor reads channels; nothing if it shrinks with others."""
        tracer = self._flow
        if tracer.own[name].source not in tracer.touched:  # a method other than forward may read it
            ran = name.rpartition(".")[0] in tracer.ran
            return "nothing that can be followed reads it" if ran else "it never ran on the example"
        axes = [axis.atoms for axis in tracer.own[name].axes]
        if name in self._shrinking:
            return ""
        reasons = (tracer.atoms.reason(atoms) for atoms in axes)
        return next(
            filter(None, reasons), "nothing that can be followed makes or reads its channels"
        )


_UNSELECTED = "it is not selected"


def _attribute(model: nn.Module, leaf: Attribute) -> int:
    value = get_size(model.get_submodule(leaf.module), leaf.key)
    return int(value if leaf.place < 0 else value[leaf.place])
