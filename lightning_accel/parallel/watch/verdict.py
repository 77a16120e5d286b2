"""Whether a process that says nothing is dead, stopped, or only busy: a judgement from plain values."""

from __future__ import annotations

from typing import NamedTuple

from lightning_accel.parallel.watch.processes import Member, Sight

TRACED = "t"
"""Held by a debugger."""
_BUSY = 0.02
"""The share of its time that a process computes which is not hung, on a busy machine too."""


class Lost(NamedTuple):
    """A process without which the others cannot go on.

    Attributes:
        member: Which.
        how: What is known of its end.
        where: Where it was when it was heard last.
        silent_s: For how long it had said nothing.
        is_over: Whether it is gone or stopped; one that left with an error may be followed by the others.
    """

    member: Member
    how: str
    where: str = ""
    silent_s: float = 0.0
    is_over: bool = True

    def __str__(self) -> str:
        since = f" {self.silent_s:.0f} s ago" if self.silent_s >= 1 else ""
        last = f"; last seen{since} {self.where}" if self.where else ""
        return f"{self.member} {self.how}{last}"


class Silence:
    """How long somebody has said nothing, and what was seen of it meanwhile.

    Time counts in steps of the observer's own rounds: one that was itself stopped, or a machine that was suspended, has
    seen nothing of the others, and must look again before it judges.

    Args:
        most_s: The most that counts between two looks.

    >>> silence = Silence(most_s=2.0)
    >>> silence.grow(1.5, None)
    >>> silence.grow(600.0, None)  # the observer slept
    >>> silence.seconds
    3.5
    """

    def __init__(self, most_s: float) -> None:
        self.seconds = 0.0
        self.sight: Sight | None = None
        self._most_s = most_s
        self._cpu_s: float | None = None

    def hear(self) -> None:
        """Begin anew."""
        self.seconds, self.sight, self._cpu_s = 0.0, None, None

    def grow(self, seconds: float, sight: Sight | None) -> None:
        """Let time pass, at the end of which that was seen."""
        self.seconds += min(seconds, self._most_s)
        self.sight = sight
        if sight is not None and self._cpu_s is None:
            self._cpu_s = sight.cpu_s

    @property
    def computes(self) -> bool:
        """Whether it took some of the processor time that it could: some code of C keeps Python waiting."""
        if self.sight is None or self._cpu_s is None:
            return False
        return self.sight.cpu_s - self._cpu_s > _BUSY * self.seconds


def judge(silence: Silence, timeout_s: float) -> str:
    """Return what became of somebody who says nothing; "" while it may come back.

    >>> silence = Silence(most_s=10.0)
    >>> silence.grow(9.0, Sight("T", 1.0))
    >>> judge(silence, timeout_s=60.0), judge(silence, timeout_s=5.0)
    ('', 'is stopped (SIGSTOP)')
    """
    sight = silence.sight
    if sight is not None and sight.is_gone:
        return "is gone: it was killed, or crashed"
    if silence.seconds < timeout_s:
        return ""
    if sight is not None and sight.state == "T":
        return "is stopped (SIGSTOP)"
    if sight is not None and (sight.state == TRACED or silence.computes):
        return ""
    return "does not answer: its machine is off or cut off, or the process hangs as a whole"
