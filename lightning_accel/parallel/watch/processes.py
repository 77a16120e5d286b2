"""What can be seen of a process of this machine from outside: whether it runs, is stopped, or is gone."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

_GONE = ("Z", "X", "x")


class Member(NamedTuple):
    """One process of a group.

    Attributes:
        rank: Its number.
        host: The name of its machine, for people.
        pid: Its process id there.
        began: When it began, in ticks of its machine: a process id is given anew, this is not.
        machine: What its machine and its view of process ids are known by.
    """

    rank: int
    host: str
    pid: int
    began: int = 0
    machine: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


class Sight(NamedTuple):
    """A process as its machine tells of it: a letter as in `/proc`, and the processor time it took."""

    state: str
    cpu_s: float

    @property
    def is_gone(self) -> bool:
        """Whether it has ended."""
        return self.state in _GONE


def myself(rank: int) -> Member:
    """Return this process.

    >>> myself(3).pid == os.getpid()
    True
    """
    pid = os.getpid()
    found = _stat(pid)
    return Member(rank, socket.gethostname(), pid, found[1] if found else 0, _machine())


def member_of(plain: Mapping[str, Any]) -> Member:
    """Return what another process says of itself, as what it should be.

    Raises:
        ValueError: It says something else.
    """
    try:
        numbers = [int(plain[name]) for name in ("rank", "pid", "began")]
        host, machine = str(plain["host"])[:200], str(plain["machine"])[:200]
    except (KeyError, TypeError) as error:
        raise ValueError(f"no description of a process: {error}") from None
    return Member(numbers[0], host, numbers[1], numbers[2], machine)


def look(member: Member) -> Sight | None:
    """Return what is seen of a process; `None` of one on another machine, or where there is no `/proc`.

    >>> sight = look(myself(0))
    >>> sight is None or not sight.is_gone
    True
    """
    if not member.began or member.machine != _machine():
        return None
    found = _stat(member.pid)
    if found is None or found[1] != member.began:
        return Sight("X", 0.0)
    return found[0]


def _stat(pid: int) -> tuple[Sight, int] | None:
    """Return the sight of a process, and when it began."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    ticks = int(fields[11]) + int(fields[12])
    return Sight(fields[0], ticks / os.sysconf("SC_CLK_TCK")), int(fields[19])


@cache
def _machine() -> str:
    """Return what tells machines and views of process ids apart; "" where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def ranks(numbers: Iterable[int]) -> str:
    """Return some ranks as words.

    >>> ranks({2, 1}), ranks(range(9))
    ('rank 1, 2', 'rank 0, 1, 2, 3, 4, 5, 6, 7, ...')
    """
    first = sorted(numbers)
    return "rank " + ", ".join([*map(str, first[:8]), *["..."] * (len(first) > 8)])
