"""The groups of channels that can only go together, and what removing some of them cuts.

The idea of dependency groups is DepGraph's (Fang et al. 2023, arXiv:2301.12900); here they come from
atoms that are followed through one forward pass (`flow`), so that fused projections, heads, splits with
several readers, ties and a user's own norms need no handler of their own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_accel.errors import AccelError, NoEffect
from lightning_accel.pruning.atoms import Ids
from lightning_accel.pruning.flow import Flow, Site
from lightning_accel.pruning.forms import Forms
from lightning_accel.pruning.scaling import factor, query_rows
from lightning_accel.pruning.sizes import Attribute, Length, leaves, solve
from lightning_accel.surgery import Change, Cut, Kept, Select, Structure
from lightning_accel.surgery.call import Call, same_random_state
from lightning_accel.surgery.structure import named_tensors

LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, nn.MultiheadAttention)
"""Layers whose outputs can be pruned; modules that hold a weight of another kind count too."""

Gone = Mapping[str, Sequence[int]]
_AS_IT_IS = Structure()


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
    """

    name: str
    kind: str
    units: int
    members: tuple[Member, ...]
    layers: tuple[str, ...]
    dense: int
    link: int | None = None
    per_unit: int = 1


class Graph:
    """The prunable groups of one network.

    Args:
        model: A twin; it is put into eval mode.
        calls: Example calls, small ones.
        trace: A second twin for the trace, which is used up.
        select: Every layer whose outputs shrink must be among these.
        frozen: Names of parameters that must not be touched.
        dense: Shapes before an earlier cut, of which shares are meant.
        attention: Remove whole "heads", or the same places of each ("width").

    Raises:
        AccelError: The calls fail.
        NoEffect: There is no group at all.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: Sequence[Call],
        *,
        copy: Callable[[nn.Module], nn.Module],
        select: Select,
        frozen: frozenset[str] = frozenset(),
        dense: Structure = _AS_IT_IS,
        attention: str = "heads",
    ) -> None:
        self.model = model.eval()
        self.calls = tuple(calls)
        self.dense = dense
        self.skipped: list[Change] = []
        self._flow = _traced(model, calls, copy, attention)
        self._index()
        self._links: dict[str, tuple[int, int]] = {}
        self.groups = self._find(select, frozen)
        if not self.groups:
            reasons = "; ".join(f"{c.name}: {c.what}" for c in self.skipped[:4])
            raise NoEffect(
                "no layer can be pruned",
                reasons or f"no convolution or linear layer in {type(model).__name__}",
                "widen `select`, or unfreeze the layers to prune",
            )
        self.dense_macs = self.macs({})
        self._queries = self._find_queries()

    # -- what a removal does ------------------------------------------------------------------------

    def cut(self, gone: Gone) -> Cut:
        """Return the cut that removes these units.

        Raises:
            ValueError: The numbers that the forward reads cannot follow, or a tie would come apart.
        """
        left = self._left(gone)
        attributes = self._attributes(left)
        dims = {
            name: tuple(left.positions(axis.atoms) for axis in info.axes)
            for name, info in self._flow.own.items()
        }
        kept = {name: Kept(d) for name, d in dims.items() if any(x is not None for x in d)}
        tensors = dict(named_tensors(self.model))
        persistent = set(self.model.state_dict(keep_vars=True))
        for name in kept:
            if name not in persistent and not _is_constant(tensors[name], kept[name]):
                raise ValueError(f"`{name}` is a buffer that checkpoints do not hold")
        before = Structure(
            {name: tuple(tensors[name].shape) for name in kept},
            {name: dict.fromkeys(sizes, 0) for name, sizes in attributes.items()},
        )
        scaled = self._scaled(gone, left, kept)
        return Cut(kept, before.now(self.model), attributes, scaled=scaled)

    def rescale(self, names: Collection[str]) -> bool:
        """Scale the queries of these groups where they were not, or the other way round; whether any."""
        found = [q for name, queries in self._queries.items() if name in names for q in queries]
        for query in found:
            query.scaled = not query.scaled
        return bool(found)

    def macs(self, gone: Gone) -> float:
        """Return the multiply-accumulates of the calls with these units gone."""
        left = self._left(gone)
        return float(
            sum(p.times * math.prod(left.count(a) for a in p.axes) for p in self._flow.products)
        )

    def params(self, gone: Gone) -> int:
        """Return the number of parameters with these units gone."""
        left, total, seen = self._left(gone), 0, set()
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                total += math.prod(left.count(x.atoms) for x in self._flow.own[name].axes)
        return total

    def _find_queries(self) -> dict[str, list[_Query]]:
        """Find the groups that are the width of heads, and the rows that make their queries."""
        owner = {int(r): name for name in self._names() for r in self._roots[name]}
        sites: dict[str, list[int]] = {}
        for site, (atoms, _) in enumerate(self._flow.queries):
            for name in {owner.get(int(r), "") for r in np.unique(self._root[atoms])} - {""}:
                sites.setdefault(name, []).append(site)
        if not sites:
            return {}
        queries: dict[str, list[_Query]] = {}
        for name, tensors in query_rows(self.model, self.calls, sites, self.groups).items():
            atoms, scaled = self._flow.queries[sites[name][0]]
            queries[name] = [
                _Query(tensor, rows, atoms, scaled) for tensor, rows in tensors.items()
            ]
        return queries

    def _names(self) -> list[str]:
        return [group.name for group in self.groups]

    def _scaled(self, gone: Gone, left: _Left, kept: Mapping[str, Kept]) -> dict[str, Tensor]:
        found = {}
        for name in gone:
            for query in self._queries.get(name, ()):
                old, new = len(query.atoms), left.count(query.atoms)
                if query.scaled and query.tensor in kept and old != new:
                    dims = kept[query.tensor].dims
                    (dim,) = {
                        m.dim
                        for group in self.groups
                        if group.name == name
                        for m in group.members
                        if m.tensor == query.tensor and m.role != "in"
                    }
                    found[query.tensor] = factor(query.rows, dims[dim], dim, len(dims), old, new)
        return found

    def _left(self, gone: Gone) -> _Left:
        removed = np.zeros(self._flow.atoms.count, dtype=bool)
        for name, units in gone.items():
            removed[self._roots[name][list(units)]] = True
        return _Left(self._flow, removed[self._root])

    def _attributes(self, left: _Left) -> dict[str, dict[str, Any]]:
        changed: dict[str, dict[str, Any]] = {}
        modules = dict(self.model.named_modules())
        solved = solve(self._equations, self._dense_attributes, left.count)
        for (name, key, place), size in solved.items():
            sizes = changed.setdefault(name, {})
            if place < 0:
                sizes[key] = size
            else:
                old = list(sizes.get(key, getattr(modules[name], key)))
                old[place] = size
                sizes[key] = tuple(old)
        for name, module in modules.items():
            groups = changed.get(name, {}).get("groups", getattr(module, "groups", 1))
            for key, size in self._declared(module, name, left, groups):
                if getattr(module, key, size) != size:
                    changed.setdefault(name, {})[key] = size
        return changed

    def _declared(
        self, module: nn.Module, name: str, left: _Left, groups: int
    ) -> Iterator[tuple[str, int]]:
        """Yield the sizes that torch's layers declare and their forward does not read."""

        def size(leaf: str, dim: int) -> int:
            return left.count(self._flow.own[f"{name}.{leaf}".lstrip(".")].axes[dim].atoms)

        held = {*module._parameters, *module._buffers}
        if f"{name}.weight".lstrip(".") not in self._flow.own:
            if getattr(module, "running_mean", None) is not None:
                yield "num_features", size("running_mean", 0)
            return
        if isinstance(module, nn.Linear):
            yield "in_features", size("weight", 1)
            yield "out_features", size("weight", 0)
        elif isinstance(module, nn.modules.conv._ConvNd):
            rows, columns = size("weight", 0), size("weight", 1) * groups
            yield "in_channels", rows if module.transposed else columns
            yield "out_channels", columns if module.transposed else rows
        elif isinstance(module, nn.modules.batchnorm._NormBase) and "weight" in held:
            yield "num_features", size("weight", 0)
        elif isinstance(module, nn.GroupNorm):
            yield "num_channels", size("weight", 0)
        elif isinstance(module, nn.Embedding):
            yield "embedding_dim", size("weight", 1)
        elif isinstance(module, nn.PReLU):
            yield "num_parameters", size("weight", 0)

    # -- groups -------------------------------------------------------------------------------------

    def _index(self) -> None:
        """Number the free parts, and tell them apart by the dimensions of tensors that they touch."""
        flow = self._flow
        everything = np.arange(flow.atoms.count)
        self._root = flow.atoms.find(everything)
        self._fixed = flow.atoms.is_fixed(everything)
        attributes = {
            leaf: int(_attribute(self.model, leaf))
            for e in flow.equations
            for leaf in leaves(e.expression)
            if isinstance(leaf, Attribute)
        }
        self._dense_attributes = attributes
        self._is_made, self._is_read = np.zeros((2, flow.atoms.count), dtype=bool)
        for marks, marked in ((flow.made, self._is_made), (flow.read, self._is_read)):
            for atoms in marks:
                marked[atoms] = True
        self._equations = [e for e in flow.equations if self._moves(e)]

    def _moves(self, equation: Any) -> bool:
        """Whether anything in an equation can change."""
        parts = [equation.atoms]
        parts += [x.atoms for x in leaves(equation.expression) if isinstance(x, Length)]
        if all(self._fixed[self._root[part]].all() for part in parts):
            return False
        only = equation.expression
        return not (
            isinstance(only, Length)
            and np.array_equal(self._root[only.atoms], self._root[equation.atoms])
        )

    def _find(self, select: Select, frozen: frozenset[str]) -> list[Group]:
        flow = self._flow
        chosen = set(select.require(self.model))
        rng = np.random.default_rng(0)
        places = [
            (name, dim, axis.atoms)
            for name, info in self._first_names()
            for dim, axis in enumerate(info.axes)
        ]
        code = np.zeros(flow.atoms.count, dtype=np.uint64)
        for _, _, atoms in places:
            mark = rng.integers(1, 2**63, dtype=np.uint64)
            np.add.at(code, self._root[atoms], mark)
        groups: dict[int, list[tuple[str, int, Ids]]] = {}
        for name, dim, atoms in places:
            roots = self._root[atoms]
            for key in np.unique(code[roots[~self._fixed[roots]]]):
                groups.setdefault(int(key), []).append((name, dim, atoms))
        heads = {int(r) for a in flow.headed for r in self._root[a]}
        self._roots: dict[str, Ids] = {}
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
        seen: set[int] = set()
        return [
            (name, info)
            for name, info in self._flow.own.items()
            if not (id(info) in seen or seen.add(id(info)))
        ]

    def _group(
        self, key: int, code: Any, touched: list[tuple[str, int, Ids]], heads: set[int]
    ) -> Group | None:
        order: dict[int, int] = {}
        members = []
        for name, dim, atoms in touched:
            roots = self._root[atoms]
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
        while name in self._roots:
            name += "'"
        self._roots[name] = np.array(list(order))
        kind = "heads" if heads & set(order) else "channels"
        dense = self._dense_units(members, len(order))
        return Group(name, kind, len(order), tuple(members), layers, dense)

    def _dense_units(self, members: Sequence[Member], units: int) -> int:
        tensors = dict(named_tensors(self.model))
        for member in members:
            before = self.dense.tensors.get(member.tensor)
            now = tensors[member.tensor].shape[member.dim]
            if before and member.positions.numel() == now:
                return max(units, round(units * before[member.dim] / now))
        return units

    def _role(self, name: str, dim: int, atoms: Ids) -> str:
        path, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(path)
        if leaf == "weight" and isinstance(owner, (nn.modules.conv._ConvNd, nn.Linear)):
            out = 1 if getattr(owner, "transposed", False) and owner.groups == 1 else 0
            return "out" if dim == out else "in"
        if self._is_made[atoms].all():
            return "out"
        return "in" if self._is_read[atoms].all() else "own"

    def _layers(self, members: Sequence[Member]) -> tuple[str, ...]:
        found = {}
        for member in members:
            path = member.tensor.rpartition(".")[0]
            owner = self.model.get_submodule(path)
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
            return "no layer makes it"
        axes = [self._flow.own[m.tensor].axes[m.dim].atoms for m in makers]
        if not any(self._is_made[atoms].any() for atoms in axes):
            return "it never ran on the example"
        return ""

    def _linked(self, groups: list[Group]) -> list[Group]:
        """Link groups whose widths the forward takes for the same; drop what cannot follow."""
        while True:
            forms = Forms(
                self._equations, self._root, {g.name: self._roots[g.name] for g in groups}
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
        for name, module in self.model.named_modules():
            weight = self._flow.own.get(f"{name}.weight".lstrip("."))
            if name in named or not isinstance(module, LAYERS) or weight is None:
                continue
            out = 1 if getattr(module, "transposed", False) and module.groups == 1 else 0
            atoms = weight.axes[out].atoms
            reason = self._flow.atoms.reason(atoms)
            ran = self._is_made[atoms].any() or self._is_read[weight.axes[1 - out].atoms].any()
            if not ran:
                reason = "it never ran on the example"
            if reason:
                self.skipped.append(Change(name, reason))


@dataclass
class _Query:
    """Rows of a tensor that make queries, whose width is that of `atoms`."""

    tensor: str
    rows: Tensor
    atoms: Ids
    scaled: bool


class _Left:
    """What is left of each dimension after a removal."""

    def __init__(self, flow: Flow, removed: Any) -> None:
        self._removed = removed
        self._counts: dict[int, tuple[Ids, int]] = {}

    def count(self, atoms: Ids) -> int:
        known = self._counts.get(id(atoms))
        if known is None:
            known = (atoms, len(atoms) - int(self._removed[atoms].sum()))
            self._counts[id(atoms)] = known
        return known[1]

    def positions(self, atoms: Ids) -> Tensor | None:
        removed = self._removed[atoms]
        return torch.from_numpy(np.flatnonzero(~removed)) if removed.any() else None


_UNSELECTED = "it is not selected"


def _traced(
    model: nn.Module,
    calls: Sequence[Call],
    copy: Callable[[nn.Module], nn.Module],
    attention: str,
) -> Flow:
    live: dict[Site, int] = {}
    for _ in range(3):
        flow = Flow(copy(model).eval(), live)
        with same_random_state(model):
            _traced_once(flow, calls)
            with suppress(AccelError):  # it may not train on so few samples
                flow.model.train()
                _traced_once(flow, calls, counted=False)
        found = {s: f for s, f in flow.batched.items() if s in flow.splits}
        if attention == "width":
            found = {s: max(set(flow.splits[s]) - {f}, default=f) for s, f in found.items()}
        if found.items() <= live.items():
            return flow
        live = {**live, **found}
    return flow


def _traced_once(flow: Flow, calls: Sequence[Call], counted: bool = True) -> None:
    try:
        flow.passes(calls, counted=counted)
    except Exception as error:
        place = flow.place or type(flow.model).__name__
        raise AccelError(
            "the network cannot be traced: its forward fails on the example",
            f"{type(error).__name__} in `{place}`: {error}",
            "pass an `example` that the network accepts",
        ) from error


def _is_constant(buffer: Tensor, kept: Kept) -> bool:
    """Whether all places of the cut dimensions are the same, so that any of them can stand for all."""
    cut = [dim for dim, positions in enumerate(kept.dims) if positions is not None]
    return all(bool((buffer == buffer.narrow(dim, 0, 1)).all()) for dim in cut)


def _attribute(model: nn.Module, leaf: Attribute) -> int:
    value = getattr(model.get_submodule(leaf.module), leaf.key)
    return int(value if leaf.place < 0 else value[leaf.place])
