"""Tensors kept beside a model, one or several per parameter: slow weights, moving averages, anchors.

People keep them as a dict by name, by parameter or by its id, or as a list in the order of the parameters; each
entry may be a tensor, a pair, a dict or an object of their own, at any depth, in closures too. Each belongs to a
parameter whose shape it has; when that is cut, it is cut alike. Tensor objects stay the same, so that whoever
else holds one follows along. Where names fit several places (`weight` of two equal layers), that one is meant
whose values are nearest, and none where no values tell.

A record of weights cannot be told from an anchor, and is cut along; a list of dicts is a history and stays.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_accel.exact import exact
from lightning_accel.surgery.owners import IN_ORDER, children, holds_nothing
from lightning_accel.surgery.receipt import Kept

_DEPTH = 6
_NEAR = 0.5  # of a weight's norm: a moving average at most as far away is one of it
_WRAPPERS = ("module.", "model.", "pl_module.", "_orig_mod.")

Row = list[tuple[str, Tensor]]  # tensors of one entry, with where they are in it


class Shadow(NamedTuple):
    """A tensor that belongs to a parameter or buffer, where it is kept, and whose else it could be."""

    where: str
    tensor: Tensor
    name: str
    rivals: tuple[str, ...] = ()


def add_to_average(tensor: Tensor, weight: Tensor, change: Tensor) -> None:
    """Change what is kept beside a weight as the weight was changed, in place, if it lies near what that was before.

    So do averages and slow weights of it, and Fisher information, sums of gradients and moments do not.

    >>> average, squares = torch.tensor([1.0, 1.9]), torch.tensor([0.0, 0.1])
    >>> for kept in (average, squares):
    ...     add_to_average(kept, torch.tensor([1.5, 2.0]), torch.tensor([0.5, 0.0]))
    >>> average, squares
    (tensor([1.5000, 1.9000]), tensor([0.0000, 0.1000]))
    """
    if tensor.shape != weight.shape or not tensor.is_floating_point():
        return
    after = exact(weight)
    before = after - exact(change).to(after.device)
    if (tensor.detach().to(before) - before).norm() <= _NEAR * before.norm():
        tensor.data += change.to(tensor)


class Shadows:
    """Everything of that kind in what some objects hold.

    Args:
        model: Whose parameters are meant.
        holders: Names and attributes of who may hold such tensors.
        orders: Further orders of parameters, such as those of an optimizer's groups.

    >>> net = nn.Linear(2, 3)
    >>> ema = {"ema": [(name, p.detach().clone()) for name, p in net.named_parameters()]}
    >>> [shadow.name for shadow in Shadows(net, {"callback": ema})]
    ['weight', 'bias']
    """

    def __init__(
        self,
        model: nn.Module,
        holders: Mapping[str, Mapping[str, Any]],
        orders: Iterable[Sequence[nn.Parameter]] = (),
    ) -> None:
        self._tensors: dict[str, Tensor] = dict(model.named_parameters())
        self._tensors |= dict(model.named_buffers())
        self._names = {id(t): name for name, t in self._tensors.items()}
        self._orders = [[self._names.get(id(p), "") for p in order] for order in orders]
        for module in model.modules():
            every = list(module.parameters())
            for order in (every, [p for p in every if p.requires_grad]):
                names = [self._names.get(id(p), "") for p in order]
                if names and names not in self._orders:
                    self._orders.append(names)
        self._found: dict[int, Shadow] = {}
        self._seen: dict[int, Any] = {}  # keeps what it names alive, so that no id comes twice
        self._rows: list[dict[str, Row]] = []
        self._every: list[tuple[str, int, tuple[int, ...]]] = []
        self.flat: list[str] = []
        self._queue: deque[tuple[Any, str, int]] = (
            deque()
        )  # what is nearest to its holder goes first
        for where, held in holders.items():
            self._look_at([(key, f".{key}", value) for key, value in held.items()], where, 0)
        while self._queue:
            self._look(*self._queue.popleft())
        named = set(self._found)
        for rows in self._rows:
            self._by_order(rows, named)
        self._seen.clear()

    def __iter__(self) -> Iterator[Shadow]:
        yield from self._found.values()

    @torch.no_grad()
    def follow(self, kept: Mapping[str, Kept], *, but: Container[int] = ()) -> list[Shadow]:
        """Cut each as its parameter was cut, but for tensors of these identities, and return those.

        What a compensated cut adds to weights is not added: an anchor is no average, and comes back without it.
        """
        mine = [shadow for shadow in self._found.values() if id(shadow.tensor) not in but]
        cut = [shadow for shadow in mine if shadow.name in kept]
        for shadow in cut:
            shadow.tensor.data = kept[shadow.name].take(shadow.tensor)
        return cut

    def unclear(self, parts: Mapping[str, Sequence[Tensor | None]]) -> list[Shadow]:
        """Return those that could belong to several parameters of which other parts are meant."""
        return [
            shadow
            for shadow in self._found.values()
            if any(not _same(parts.get(shadow.name), parts.get(r)) for r in shadow.rivals)
        ]

    def of_shape(self, shapes: Iterable[tuple[int, ...]]) -> list[str]:
        """Return where tensors of these shapes are that belong to nobody."""
        wanted = set(shapes)
        own = self._found.keys() | self._names.keys()
        return [w for w, one, shape in self._every if one not in own and shape in wanted]

    def state_dict(self) -> dict[str, Tensor]:
        return {shadow.where: shadow.tensor for shadow in self._found.values()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for shadow in self._found.values():
            stored = state.get(shadow.where)
            if stored is not None:
                shadow.tensor.data = stored.to(shadow.tensor.device, copy=True)

    def _look(self, value: Any, where: str, depth: int) -> None:
        if isinstance(value, Tensor) or type(value).__module__ == "numpy":
            self._every.append((where, id(value), tuple(getattr(value, "shape", ()))))
        elif depth <= _DEPTH and id(value) not in self._seen:
            self._seen[id(value)] = value
            held = children(value)
            if isinstance(value, Mapping):
                self._by_key({key: (at, one) for key, at, one in held}, where)
            self._by_label(held, where)
            numbered = isinstance(value, Mapping) and all(type(key) is int for key in value)
            if isinstance(value, IN_ORDER) or numbered:
                self._note_rows([(at, one) for _, at, one in held], where)
            history = isinstance(value, (list, deque)) and all(
                isinstance(v, Mapping) for v in value
            )
            if history:
                self._every += [(at, id(t), tuple(t.shape)) for at, t in _row(value, where)]
            else:
                self._look_at(held, where, depth)

    def _look_at(self, held: Sequence[tuple[Any, str, Any]], where: str, depth: int) -> None:
        self._beside([(at, one) for _, at, one in held], where)
        for _, at, one in held:
            if isinstance(one, Tensor) and at.startswith("."):
                self._note_flat(one, where + at)
            if not holds_nothing(one):
                self._queue.append((one, where + at, depth + 1))

    def _by_key(self, held: Mapping[Any, tuple[str, Any]], where: str) -> None:
        """Find whose the entries are by name, also of a module and then of its parameter, or by who is the key."""
        direct = {k: _row(one, where + at) for k, (at, one) in held.items() if isinstance(k, str)}
        nested = {
            f"{k}.{key}": _row(inner, where + at + below)
            for k, (at, one) in held.items()
            if isinstance(k, str) and isinstance(one, Mapping)
            for key, below, inner in children(one)
            if isinstance(key, str)
        }
        for rows in (direct, nested):
            self._add_rows(rows, self._named(rows))
        owners = {k: self._names.get(k if isinstance(k, int) else id(k)) for k in held}
        for key, name in owners.items():
            if name is not None:
                one = held[key][1]
                self._add_row(_row(one, f"{where}[{name!r}]"), name)

    def _by_label(self, held: Sequence[tuple[Any, str, Any]], where: str) -> None:
        """Find whose the entries are by a name or a parameter within each."""
        named: dict[str, Row] = {}
        for _, at, one in held:
            if isinstance(one, (Tensor, Mapping)):
                continue
            for _, _, label in children(one):
                if isinstance(label, str):
                    named.setdefault(label, []).extend(_row(one, where + at))
        self._add_rows(named, self._named(named))

    def _beside(self, held: Sequence[tuple[str, Any]], where: str) -> None:
        """Find tensors that are kept together with one parameter whose shape they have."""
        owners = {self._names[id(one)] for _, one in held if id(one) in self._names}
        if len(owners) == 1:
            row = [(where + at, one) for at, one in held if isinstance(one, Tensor)]
            self._add_row(row, owners.pop())

    def _note_rows(self, held: Sequence[tuple[str, Any]], where: str) -> None:
        """Keep what may be in the order of parameters until all orders are known."""
        names = [self._names.get(id(one), "") for _, one in held]
        if names and all(names) and names not in self._orders:
            self._orders.append(names)
        self._rows.append({str(n): _row(one, where + at) for n, (at, one) in enumerate(held)})

    def _by_order(self, rows: Mapping[str, Row], named: set[int]) -> None:
        """Find whose the rows are by their order, where no name says so; two orders may be rivals."""
        fitting = [
            dict(zip(rows, order, strict=True))
            for order in self._orders
            if len(order) == len(rows) and all(map(self._is_row_of, rows.values(), order))
        ]
        for key, (name, *rivals) in self._nearest(fitting, rows).items():
            for where, tensor in rows[key]:
                known = self._found.get(id(tensor))
                if id(tensor) not in named and known is not None and known.name != name:
                    one = {"0": [(where, tensor)]}
                    found = self._nearest([{"0": known.name}, {"0": name}], one)["0"]
                    self._found[id(tensor)] = known._replace(name=found[0], rivals=found[1:])
            self._add_row(rows[key], name, tuple(rivals))

    def _is_row_of(self, row: Row, name: str) -> bool:
        tensors = [t for _, t in row if t.numel() > 1] or [t for _, t in row]
        known = self._tensors.get(name)
        if known is None or not tensors or any(t.shape != known.shape for t in tensors):
            return False
        return all(
            self._names.get(id(t), name) == name for t in tensors
        )  # another's is no row of it

    def _named(self, rows: Mapping[str, Row]) -> dict[str, tuple[str, ...]]:
        """Return the name of each, if there is a place in the model where they all fit, and rivals behind it."""
        shapes = {key: {tuple(t.shape) for _, t in row} for key, row in rows.items() if row}
        places = {n[: -len(k)] for k in list(shapes)[:8] for n in self._tensors if n.endswith(k)}
        every = []
        for place in sorted(p for p in places if not p or p.endswith(".")):
            fits = {k: place + k for k in shapes if place + k in self._tensors}
            every.append(
                {k: n for k, n in fits.items() if tuple(self._tensors[n].shape) in shapes[k]}
            )
        most = max(map(len, every), default=0)
        fitting = [fits for fits in every if fits and len(fits) == most]
        for prefix in _WRAPPERS:
            if not fitting and shapes and all(k.startswith(prefix) for k in shapes):
                short = {k.removeprefix(prefix): rows[k] for k in shapes}
                return {prefix + k: names for k, names in self._named(short).items()}
        return self._nearest(fitting, rows)

    @torch.no_grad()
    def _nearest(
        self, fitting: Sequence[Mapping[str, str]], rows: Mapping[str, Row]
    ) -> dict[str, tuple[str, ...]]:
        """Return of several ways to name the same tensors that with the nearest values, and its rivals."""

        def distance(fits: Mapping[str, str]) -> float:
            total = 0.0
            for key, name in fits.items():
                own = self._tensors[name]
                near = [t for _, t in rows[key] if t.shape == own.shape and t.is_floating_point()]
                total += sum(float(exact(t.to(own.device) - own).norm()) for t in near)
            return total

        if len(fitting) < 2:
            return {key: (name,) for fits in fitting for key, name in fits.items()}
        ranked = sorted(((distance(fits), n) for n, fits in enumerate(fitting)))
        close = [n for d, n in ranked[1:] if not ranked[0][0] < 0.5 * d]
        best = fitting[ranked[0][1]]
        return {
            key: (name, *(fitting[n][key] for n in close if key in fitting[n]))
            for key, name in best.items()
        }

    def _add_rows(self, rows: Mapping[str, Row], names: Mapping[str, tuple[str, ...]]) -> None:
        for key, (name, *rivals) in names.items():
            self._add_row(rows[key], name, tuple(rivals))

    def _add_row(self, row: Row, name: str, rivals: tuple[str, ...] = ()) -> None:
        for where, tensor in row:
            if tensor.shape == self._tensors[name].shape:
                self._add(where, tensor, name, rivals)

    def _add(self, where: str, tensor: Tensor, name: str, rivals: tuple[str, ...]) -> None:
        own = id(tensor) in self._names or tensor.grad_fn is not None
        own = own or not (tensor.is_floating_point() or tensor.is_complex())
        shared = tensor.dim() and self._tensors[name].data_ptr() == tensor.data_ptr()
        if not own and not shared:
            self._found.setdefault(id(tensor), Shadow(where, tensor, name, rivals))

    def _note_flat(self, value: Tensor, where: str) -> None:
        if value.dim() != 1 or id(value) in self._names:
            return
        for order in self._orders:
            known = [self._tensors[name] for name in order if name in self._tensors]
            if len(known) > 1 and sum(p.numel() for p in known) == value.numel():
                self.flat.append(where)
                return


def _row(one: Any, where: str, depth: int = 0) -> Row:
    if isinstance(one, Tensor):
        return [(where, one)]
    held = children(one) if depth < 3 else []
    return [found for _, at, inner in held for found in _row(inner, where + at, depth + 1)]


def _same(one: Sequence[Tensor | None] | None, other: Sequence[Tensor | None] | None) -> bool:
    if one is None or other is None:
        return one is other
    pairs = zip(one, other, strict=True) if len(one) == len(other) else [(None, torch.ones(()))]
    return all(
        a is b or (a is not None and b is not None and a.shape == b.shape and bool((a == b).all()))
        for a, b in pairs
    )
