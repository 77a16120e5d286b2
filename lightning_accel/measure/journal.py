"""What was done in a fit and when, in words: read off the receipts of those who did it.

Every technique keeps a `Receipt` of what it changed. Looked at now and then, what is new in it was done since the
look before; nobody has to report. Plain data throughout, for `report.json` and for checkpoints.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_accel.surgery.receipt import Change, Receipt

_MOST_LINES = 400
"""Of one entry; a network of thousands of layers is not read line by line."""
_LONGEST = 2000
_OURS = "lightning_accel."


class Journal:
    """An ordered list of what was done, which grows by looking at receipts.

    >>> journal = Journal()
    >>> journal.look("Pruning", Receipt((Change("fc", "pruned", "8", "4"),)), epoch=2, step=40)
    >>> journal.look("Pruning", Receipt((Change("fc", "pruned", "8", "4"),)), epoch=3, step=60)
    >>> [(entry["epoch"], entry["technique"], entry["did"]) for entry in journal.entries]
    [(2, 'Pruning', ['fc: pruned, 8 -> 4'])]
    """

    def __init__(self, entries: Sequence[Mapping[str, Any]] = ()) -> None:
        self.entries: list[dict[str, Any]] = [dict(entry) for entry in entries]
        self._seen: dict[str, Receipt] = {}
        self._resumed = {str(entry.get("key", "")) for entry in self.entries}

    def look(
        self,
        technique: str,
        receipt: Receipt,
        *,
        epoch: int,
        step: int,
        settings: Callable[[], Mapping[str, Any]] = dict,
        key: str = "",
    ) -> None:
        """Note what is new since the last look.

        Args:
            technique: Its name for people.
            receipt: What it has done so far.
            epoch: Epochs that are done.
            step: Optimizer steps that are done.
            settings: Tells how it was set; asked for once.
            key: Tells two techniques of one name apart.
        """
        key = key or technique
        before = self._seen.get(key)
        if receipt is before:
            return
        self._seen[key] = receipt
        new = receipt if before is None else _beyond(before, receipt)
        is_first = before is None and key not in self._resumed
        if not is_first and not (new or new.skipped or new.notes):
            return
        entry = {"key": key, "technique": technique, "epoch": epoch, "step": step}
        entry |= {"settings": dict(settings())} if is_first else {}
        entry |= in_words(new)
        if before is None and any(_same(entry, other) for other in self.entries):
            return  # a fit that goes on enters anew what it had entered
        self.entries.append(entry)


def in_words(receipt: Receipt) -> dict[str, Any]:
    """Return a receipt as lines: what was done, what was left alone with the reason, and notes.

    >>> in_words(Receipt(skipped=(Change("head", "it makes the output"),)))["left_alone"]
    ['head: it makes the output']
    """
    return {
        "num_changes": len(receipt.changes),
        "did": _shortened([line(change) for change in receipt.changes]),
        "left_alone": _shortened([line(change) for change in receipt.skipped]),
        "notes": _shortened([str(note) for note in receipt.notes]),
    }


def line(change: Change) -> str:
    """Write one change.

    >>> line(Change("fc", "pruned", "8", "4")), line(Change("lr", "fused"))
    ('fc: pruned, 8 -> 4', 'lr: fused')
    """
    way = " -> ".join(part for part in (change.before, change.after) if part)
    return f"{change.name}: {change.what}" + (f", {way}" if way else "")


def settings_of(made: Any) -> dict[str, Any]:
    """Return the arguments that an object was made with, where they are plain values kept under their names.

    What is as it is by default is left out.

    >>> class Prune:
    ...     def __init__(self, ratio, *, when=1, scope="local", teacher=None):
    ...         self.ratio, self.when, self.scope, self.teacher = ratio, 3, scope, print
    >>> settings_of(Prune(0.5))
    {'ratio': 0.5, 'when': 3}
    """
    try:
        names = inspect.signature(type(made)).parameters
    except (TypeError, ValueError):
        return {}
    kept = _attributes(made)
    for inner in list(kept.values()):  # some keep what they were asked for in one checked object
        if _is_ours(inner):
            kept = {**_attributes(inner), **kept}
    kept = {name: kept[name] if name in kept else _computed(made, name) for name in names}
    found = {name: kept[name] for name, p in names.items() if _is_said(kept[name], p.default)}
    plain = {name: _plain(value) for name, value in found.items()}
    return {name: value for name, value in plain.items() if value is not None}


def _attributes(made: Any) -> dict[str, Any]:
    if hasattr(made, "_asdict"):
        return dict(made._asdict())
    return dict(vars(made)) if hasattr(made, "__dict__") else {}


def _computed(made: Any, name: str) -> Any:
    """Return what a property of ours says, named as an argument; those of the user's may do anything."""
    told = inspect.getattr_static(type(made), name, None)
    is_ours = isinstance(told, property) and (told.fget.__module__ or "").startswith(_OURS)
    return getattr(made, name) if is_ours else None


def _is_said(value: Any, default: Any) -> bool:
    """Tell whether a value is worth saying: it is there, and no default."""
    if value is None:
        return False
    if _is_ours(value):
        try:
            return bool(default is not None or value != type(value)())
        except TypeError:  # it cannot be made of nothing, and so is no default
            return True
    return _plain(value) != _plain(default)


def _is_ours(value: Any) -> bool:
    return type(value).__module__.startswith(_OURS)


def _plain(value: Any) -> Any:
    """Return a value as JSON takes it, an object by its own words where these are short, or `None`."""
    if isinstance(value, (tuple, list)):
        items = [_plain(item) for item in value] if len(value) <= 20 else [None]
        return None if None in items else items
    if isinstance(value, str):
        return value if len(value) < 200 else None
    if isinstance(value, (bool, int, float)):
        return value
    words = repr(value) if _is_ours(value) else ""
    return words if 0 < len(words) < 120 and " at 0x" not in words and "\n" not in words else None


def _beyond(before: Receipt, after: Receipt) -> Receipt:
    """Return what came to a receipt; all of it where it was begun anew."""
    parts: Callable[[str], Any] = lambda name: (getattr(before, name), getattr(after, name))  # noqa: E731
    names = ("changes", "skipped", "notes")
    if any(new[: len(old)] != old for old, new in map(parts, names)):
        return after
    grown = {name: parts(name)[1][len(parts(name)[0]) :] for name in names}
    return Receipt(**grown)


def _same(entry: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(entry.get(k) == other.get(k) for k in ("key", "did", "left_alone", "notes"))


def _shortened(lines: list[str]) -> list[str]:
    flat = [text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..." for text in lines]
    if len(flat) <= _MOST_LINES:
        return flat
    return [*flat[:_MOST_LINES], f"and {len(flat) - _MOST_LINES} more"]
