"""Which processes are within a run, as their group's store knows it: collectives of two runs must not meet.

A process whose run failed may begin another while the others still wait in the old one. Then it waits until they have left
that, and they end, since nobody will answer them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch.distributed as dist

from lightning_accel.errors import AccelError
from lightning_accel.parallel.watch.processes import ranks

_PAUSE_S = 0.05
_PATIENCE_S = 60.0
_of_group: WeakKeyDictionary[Any, Attendance] = WeakKeyDictionary()


class Presence(NamedTuple):
    """What a process wrote last, and which event of the group that was."""

    word: str
    event: int


class Attendance:
    """A list in the store, in which each process writes that it begins a run, and how it left it.

    Events are counted by the store, so that all agree on which came first.

    Args:
        store: Of the group, under a prefix of its own.
        rank: Of this process.
        count: Processes of the group.

    >>> store = dist.HashStore()
    >>> one, other = Attendance(store, 0, 2), Attendance(store, 1, 2)
    >>> one.enter(), other.enter()
    (None, None)
    >>> one.leave(failed=True)
    >>> one.gather(patience_s=0.0)
    Traceback (most recent call last):
    lightning_accel.errors.AccelError: processes are in two runs at once. Found: rank 1 did not leave the one that failed here...
    """

    def __init__(self, store: Any, rank: int, count: int) -> None:
        self._store, self._rank = store, rank
        self._others = [other for other in range(count) if other != rank]

    def enter(self) -> None:
        """Write that this process is within a run; see `gather`."""
        self.gather()
        self._write("in")

    def gather(self, patience_s: float | None = None) -> None:
        """After a run that failed, wait until the others have left it.

        Raises:
            AccelError: Some of them do not.
        """
        word, event = self._presence(self._rank)
        if word not in ("failed", "returns"):
            return
        if word == "failed":
            self._write("returns")
        late = self._left_behind(event, _PATIENCE_S if patience_s is None else patience_s)
        if late:
            raise AccelError(
                "processes are in two runs at once",
                f"{ranks(late)} did not leave the one that failed here",
                "let all of them leave a run before another begins, or start them anew",
            )
        self._write("out")

    def leave(self, *, failed: bool) -> None:
        """Write that it left its run."""
        with suppress(RuntimeError):  # the store is gone with its process
            self._write("failed" if failed else "out")

    def tell_of_the_next(self, has_begun: Callable[[], bool]) -> None:
        """Write, from a thread, that another run has begun: not every strategy asks before its first collective."""

        def watch() -> None:
            with suppress(RuntimeError):
                while self._presence(self._rank).word == "failed":
                    if has_begun():
                        self._write("returns")
                    time.sleep(_PAUSE_S)

        threading.Thread(target=watch, name="lightning-accel-attendance", daemon=True).start()

    def has_returned(self, rank: int) -> bool:
        """Whether a process that left a run has begun another; a store that is gone knows of nothing."""
        with suppress(RuntimeError):
            return self._presence(rank).word in ("in", "returns")
        return False

    def absent(self) -> list[int]:
        """Return the others that are within no run."""
        return [rank for rank in self._others if not self.has_returned(rank)]

    def _left_behind(self, failed: int, seconds: float) -> list[int]:
        deadline = time.monotonic() + seconds
        while left := [rank for rank in self._others if self._is_in_since_before(rank, failed)]:
            if time.monotonic() >= deadline:
                break
            time.sleep(_PAUSE_S)
        return left

    def _is_in_since_before(self, rank: int, event: int) -> bool:
        seen = self._presence(rank)
        return seen.word == "in" and seen.event < event

    def _presence(self, rank: int) -> Presence:
        if not self._store.check([str(rank)]):
            return Presence("out", 0)
        word, event = self._store.get(str(rank)).decode().split()
        return Presence(word, int(event))

    def _write(self, word: str) -> None:
        event = self._store.add("events", 1)
        self._store.set(str(self._rank), f"{word} {event}")


def part_of_store(name: str) -> Any:
    """Return a part of the default group's store, on a connection of its own."""
    store: Any = dist.distributed_c10d._get_default_store()
    return dist.PrefixStore(f"lightning_accel/{name}", store.clone())


def attendance() -> Attendance:
    """Return the list of the default group; a process has one connection for it."""
    group: Any = dist.group.WORLD
    known = _of_group.get(group)
    if known is None:
        part = part_of_store("attendance")
        known = _of_group[group] = Attendance(part, dist.get_rank(), dist.get_world_size())
    return known
