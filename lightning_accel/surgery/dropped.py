"""Entries of containers that go with the parameters they belong to, and their way back.

Slow weights, averages and anchors of a block that is gone would be one entry too many: in a list that is read beside
`module.parameters()` each later one would meet another's parameter. So entries that hold nothing but parameters that
are gone, references to these, and tensors kept for them, are taken out of lists and dicts, at any depth. A list of
dicts is a history, and stays whole.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_accel.errors import Unsupported
from lightning_accel.surgery.bypass import is_under, removed_blocks
from lightning_accel.surgery.owners import children

_DEPTH = 6
_LOGS = "_accel_dropped"


class DroppedEntry(NamedTuple):
    """What is taken out of a container, from where, and the parameter that it belongs to."""

    owner: str
    where: str
    container: Any
    place: int
    key: Any
    value: Any


def entries_of(
    holders: Mapping[str, Mapping[str, Any]], lost: Mapping[int, str]
) -> list[DroppedEntry]:
    """Return the entries that belong to what is gone; take out nothing.

    Args:
        holders: Names and attributes of who may hold such entries.
        lost: By identity of parameters and of the tensors kept for them the names of the parameters.

    Raises:
        Unsupported: A tuple holds some beside others, and cannot be changed.

    >>> net = nn.Linear(2, 3)
    >>> slow = [net.weight.detach().clone(), net.bias.detach().clone()]
    >>> found = entries_of({"ema": {"slow": slow}}, {id(slow[1]): "bias"})
    >>> take_out(found)
    >>> len(slow), found[0].where
    (1, 'ema.slow[1]')
    """
    found: list[DroppedEntry] = []
    seen: dict[int, Any] = {}

    def look(value: Any, where: str, depth: int) -> None:
        if depth > _DEPTH or id(value) in seen or isinstance(value, Tensor):
            return
        seen[id(value)] = value
        mapping = isinstance(value, Mapping)
        history = isinstance(value, (list, deque)) and all(isinstance(v, Mapping) for v in value)
        held = [] if history and len(value) else children(value)
        for place, (key, at, one) in enumerate(held):
            owner = _owner(one, lost) or (_owner_by_key(key, lost) if mapping else "")
            if not owner:
                look(one, where + at, depth + 1)
            elif isinstance(value, (list, deque, MutableMapping)):
                found.append(DroppedEntry(owner, where + at, value, place, key, one))
            elif isinstance(value, (tuple, nn.ParameterList)):
                raise Unsupported(
                    "a tuple cannot follow when a whole block goes",
                    f"`{where}{at}` belongs to a parameter of the block",
                    "keep a list, or a dict by the names of parameters",
                )

    for where, held in holders.items():
        for key, value in held.items():
            look(value, f"{where}.{key}", 0)
    return found


def take_out(entries: Sequence[DroppedEntry]) -> None:
    """Take entries out of their containers; those of one container came in order."""
    for entry in reversed(entries):
        if isinstance(entry.container, MutableMapping):
            del entry.container[entry.key]
        else:
            del entry.container[entry.place]


def put_in(entries: Sequence[DroppedEntry], but: Sequence[DroppedEntry] = ()) -> None:
    """Put entries back where they were, in the order of before; `but` are those that stay out."""
    for entry in entries:
        missing = sum(e.container is entry.container and e.place < entry.place for e in but)
        place = entry.place - missing
        if isinstance(entry.container, MutableMapping):
            items = list(entry.container.items())
            items.insert(place, (entry.key, entry.value))
            entry.container.clear()
            entry.container.update(items)
        else:
            entry.container.insert(place, entry.value)


class Dropped:
    """What was taken out for the blocks of a module so far, edit by edit."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._logs: list[list[DroppedEntry]] = vars(module).setdefault(_LOGS, _Logs())

    def add(self, entries: Sequence[DroppedEntry]) -> None:
        """Take out those that are still where they were: an optimizer's own lists follow by themselves."""
        there = [entry for entry in entries if _is_there(entry)]
        take_out(there)
        if there:
            self._logs.append(there)

    def put_in(self) -> None:
        """Put back what belongs to blocks that are in their places again."""
        away = removed_blocks(self._module)
        for number in reversed(range(len(self._logs))):
            log = self._logs[number]
            stays = [entry for entry in log if is_under(entry.owner, away)]
            put_in([entry for entry in log if not is_under(entry.owner, away)], stays)
            self._logs[number] = stays


class _Logs(list[Any]):
    """Entries, which no copy and no pickle of the module takes along: they lead to whoever held them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Logs:
        return _Logs()

    def __reduce__(self) -> Any:
        return _Logs, ()


def _is_there(entry: DroppedEntry) -> bool:
    held, place = entry.container, entry.place
    if isinstance(held, MutableMapping):
        return held.get(entry.key) is entry.value
    return place < len(held) and held[place] is entry.value


def _owner(value: Any, lost: Mapping[int, str]) -> str:
    """Return whose a value is that is made of nothing but what is gone; empty for others."""
    if isinstance(value, weakref.ReferenceType):
        value = value()
    held = list(_tensors(value, 0))
    return lost[id(held[0])] if held and all(id(t) in lost for t in held) else ""


def _owner_by_key(key: Any, lost: Mapping[int, str]) -> str:
    if isinstance(key, weakref.ReferenceType):
        key = key()
    return lost.get(key if type(key) is int else id(key), "")


def _tensors(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth < 3:
        for _, _, one in children(value):
            yield from _tensors(one, depth + 1)
