"""What removing some units of a network cuts, and what is left then of its arithmetic."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_accel.errors import NoEffect
from lightning_accel.exact import exact
from lightning_accel.pruning.groups import Group, Groups, Member
from lightning_accel.pruning.scaling import factor, query_rows
from lightning_accel.pruning.trace import ChannelTracer, Ids, traced
from lightning_accel.pruning.trace.sizes import solve
from lightning_accel.surgery import Change, Cut, Kept, Select, Structure
from lightning_accel.surgery.attributes import get_size
from lightning_accel.surgery.call import Call, parameters_of
from lightning_accel.surgery.structure import named_tensors

__all__ = ["Graph", "Group", "Member", "RemovedUnits"]

RemovedUnits = Mapping[str, Sequence[int]]
"""Units that are removed, ascending, by name of their group."""

_AS_IT_IS = Structure()


class Graph:
    """The prunable groups of one network.

    Args:
        model: A twin; it is put into eval mode.
        calls: Example calls, small ones.
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
        select: Select,
        frozen: frozenset[str] = frozenset(),
        dense: Structure = _AS_IT_IS,
        attention: str = "heads",
    ) -> None:
        self.trains = {name for name, module in model.named_modules() if module.training}
        self.model = model.eval()
        self.calls = tuple(calls)
        self._flow = traced(self.model, calls, attention=attention)
        self._found = Groups(self.model, self._flow, select=select, frozen=frozen, dense=dense)
        self.groups: list[Group] = self._found.found
        self.skipped: list[Change] = self._found.skipped
        if not self.groups:
            reasons = "; ".join(f"{c.name}: {c.what}" for c in self.skipped[:4])
            apart = len({call.name for call in calls}) > 1
            raise NoEffect(
                "no layer can be pruned",
                reasons or f"no convolution or linear layer in {type(model).__name__}",
                "pass the `example` of a `forward` that calls these networks: one by one, each gives an output"
                if apart
                else "widen `select`, or unfreeze the layers to prune",
            )
        self.dense_macs = self.macs({})
        self._queries = self._find_queries()

    # -- what a removal does ------------------------------------------------------------------------

    def cut(self, gone: RemovedUnits) -> Cut:
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
        require_stored(self.model, kept)
        before = Structure(
            {name: tuple(tensors[name].shape) for name in kept},
            {name: dict.fromkeys(sizes, 0) for name, sizes in attributes.items()},
        )
        scaled = self._scaled(gone, left, kept)
        renormed = dict(self._renormed(kept))
        return Cut(kept, before.now(self.model), attributes, scaled=scaled, renormed=renormed)

    def units(self, places: Mapping[str, Mapping[int, Tensor]]) -> dict[str, list[int]] | None:
        """Return the units that take exactly these places of these tensors; `None` if none do.

        Args:
            places: By name of a tensor and dimension, which places go. Tensors that are not named may
                lose some as well: buffers, say, and whatever another pruner cannot see.
        """
        marked: set[int] = set()
        for name, dims in places.items():
            for dim, gone in dims.items():
                if name not in self._flow.own:
                    return None
                atoms = self._flow.own[name].axes[dim].atoms
                marked.update(self._found.root[atoms[gone.numpy()]].tolist())
        found = {
            group.name: np.flatnonzero(np.isin(self._found.roots[group.name], list(marked)))
            for group in self.groups
        }
        units = {name: list(map(int, gone)) for name, gone in found.items() if len(gone)}
        if sum(map(len, units.values())) != len(marked):
            return None
        left = self._left(units)
        for name, dims in places.items():
            for dim, axis in enumerate(self._flow.own[name].axes):
                kept = left.positions(axis.atoms)
                lost = set(range(len(axis.atoms))) - set(
                    range(len(axis.atoms)) if kept is None else kept.tolist()
                )
                if lost != set(dims.get(dim, torch.empty(0)).tolist()):
                    return None
        return units

    def rescale(self, names: Collection[str]) -> bool:
        """Scale the queries of these groups where they were not, or the other way round; whether any."""
        found = [q for name, queries in self._queries.items() if name in names for q in queries]
        for query in found:
            query.scaled = not query.scaled
        return bool(found)

    def macs(self, gone: RemovedUnits) -> float:
        """Return the multiply-accumulates of the calls with these units gone."""
        left = self._left(gone)
        return float(
            sum(p.times * math.prod(left.count(a) for a in p.axes) for p in self._flow.products)
        )

    def params(self, gone: RemovedUnits) -> int:
        """Return the number of parameters of the networks that are called with these units gone."""
        left, total, called = self._left(gone), 0, parameters_of(self.model, self.calls)
        for name, parameter in self.model.named_parameters():
            if called.pop(id(parameter), None) is not None:
                total += math.prod(left.count(x.atoms) for x in self._flow.own[name].axes)
        return total

    def idle_readers(self, cut: Cut) -> dict[str, str]:
        """Return layers that never ran and read as many numbers as a layer gave that the cut shrank."""
        shrunk = {
            cut.before.tensors[m.tensor][m.dim]: group.name
            for group in self.groups
            for m in group.members
            if m.role == "out"
            and m.tensor in cut.kept
            and cut.kept[m.tensor].dims[m.dim] is not None
        }
        found = {}
        for name, module in self._called_modules():
            weight = module._parameters.get("weight")
            if weight is None or name in self._flow.ran:
                continue
            if self._flow.own[f"{name}.weight".lstrip(".")].source not in self._flow.touched:
                transposed = getattr(module, "transposed", False)
                groups = 1 if transposed else getattr(module, "groups", 1)
                reads = weight.shape[1 if weight.dim() > 1 and not transposed else 0] * groups
                if reads in shrunk:
                    found[name] = shrunk[reads]
        return found

    def _called_modules(self) -> Iterator[tuple[str, nn.Module]]:
        for called in dict.fromkeys(call.name for call in self.calls):
            yield from self.model.get_submodule(called).named_modules(prefix=called)

    @property
    def channels(self) -> int:
        """The number of channels that layers make, of those that cannot go as well."""
        made = [self._found.root[atoms] for atoms in self._flow.made]
        return len(np.unique(np.concatenate(made))) if made else 0

    def _find_queries(self) -> dict[str, list[_Query]]:
        """Find the groups that are the width of heads, and the rows that make their queries."""
        owner = {int(r): name for name in self._names() for r in self._found.roots[name]}
        sites: dict[str, list[int]] = {}
        for site, (atoms, _) in enumerate(self._flow.queries):
            for name in {owner.get(int(r), "") for r in np.unique(self._found.root[atoms])} - {""}:
                sites.setdefault(name, []).append(site)
        if not sites:
            return {}
        found = query_rows(self.model, self.calls, sites, self.groups, len(self._flow.queries))
        queries: dict[str, list[_Query]] = {}
        for name, tensors in found.items():
            atoms, scaled = self._flow.queries[sites[name][0]]
            queries[name] = [
                _Query(tensor, rows, atoms, scaled) for tensor, rows in tensors.items()
            ]
        return queries

    def _names(self) -> list[str]:
        return [group.name for group in self.groups]

    def _scaled(
        self, gone: RemovedUnits, left: _Left, kept: Mapping[str, Kept]
    ) -> dict[str, Tensor]:
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

    def _renormed(self, kept: Mapping[str, Kept]) -> Iterator[tuple[str, Tensor]]:
        """Yield by what magnitudes shrink with the norms of their directions, so that weights stay."""
        tensors = dict(named_tensors(self.model))
        for direction, magnitude, dim in dict.fromkeys(self._flow.normed):
            if direction in kept:
                whole = exact(tensors[direction])
                part = whole.clone()
                for other, positions in enumerate(kept[direction].dims):
                    if positions is not None and other != dim:
                        gone = torch.ones(whole.shape[other], dtype=torch.bool)
                        gone[positions] = False
                        part.index_fill_(other, gone.nonzero()[:, 0].to(whole.device), 0.0)
                norms = [t.movedim(dim, 0).flatten(1).norm(dim=1) for t in (part, whole)]
                shares = norms[0] / norms[1].clamp_min(1e-300)
                yield magnitude, shares.view(tensors[magnitude].shape)

    def _left(self, gone: RemovedUnits) -> _Left:
        removed = np.zeros(self._flow.atoms.count, dtype=bool)
        for name, units in gone.items():
            removed[self._found.roots[name][list(units)]] = True
        return _Left(self._flow, removed[self._found.root])

    def _attributes(self, left: _Left) -> dict[str, dict[str, Any]]:
        changed: dict[str, dict[str, Any]] = {}
        modules = dict(self.model.named_modules())
        solved = solve(self._found.equations, self._found.attributes, left.count)
        for (name, key, place), size in solved.items():
            sizes = changed.setdefault(name, {})
            if place < 0:
                sizes[key] = size
            else:
                old = list(sizes.get(key, get_size(modules[name], key)))
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

        def own(leaf: str) -> str:
            return f"{name}.{leaf}".lstrip(".")

        def size(leaf: str, dim: int) -> int:
            return left.count(
                self._flow.own[own(weight if leaf == "weight" else leaf)].axes[dim].atoms
            )

        held = {*module._parameters, *module._buffers}
        weight = next((leaf for leaf in _WEIGHTS if own(leaf) in self._flow.own), "")
        if not weight:
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


@dataclass
class _Query:
    """Rows of a tensor that make queries, whose width is that of `atoms`."""

    tensor: str
    rows: Tensor
    atoms: Ids
    scaled: bool


class _Left:
    """What is left of each dimension after a removal."""

    def __init__(self, tracer: ChannelTracer, removed: Any) -> None:
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


_WEIGHTS = (
    "weight",
    *(
        "weight_orig",
        "weight_v",
    ),  # of torch.nn.utils, whose spectral norm has a vector of that name
    *("parametrizations.weight.original1", "parametrizations.weight.original"),
)
"""Where the weight of a layer may be, or what it is made of in the same shape."""


def require_stored(model: nn.Module, kept: Mapping[str, Kept]) -> None:
    """Raise `ValueError` if something is cut that no checkpoint could give back."""
    tensors, persistent = dict(named_tensors(model)), set(model.state_dict(keep_vars=True))
    for name in kept:
        if name not in persistent and not _is_constant(tensors[name], kept[name]):
            raise ValueError(f"`{name}` is a buffer that checkpoints do not hold")


def _is_constant(buffer: Tensor, kept: Kept) -> bool:
    """Whether all places of the cut dimensions are the same, so that any of them can stand for all."""
    cut = [dim for dim, positions in enumerate(kept.dims) if positions is not None]
    return all(bool((buffer == buffer.narrow(dim, 0, 1)).all()) for dim in cut)
