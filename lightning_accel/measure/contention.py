"""Whether other work took the processor while something was measured.

A barrier of two threads waits for the one that lost its core, so on a busy machine a network may seem seven
times slower than it is, and a technique that helps may seem to harm. Two signs are read: what all other
processes used of the cores (`/proc/stat`, steal of a hypervisor included), and, where that cannot be read or
only some of the cores are ours, whether this process really had its threads running.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

import torch

from lightning_accel.hardware import num_usable_cores

_TOLERATED = 0.15
"""Cores that other work may take, beyond those that are spare, without a doubt about the numbers."""
_LEAST_BUSY = 0.85


class Load(NamedTuple):
    """Who used the processor: cores on average of this process and of all others (`None`: unknown)."""

    wall_s: float
    own_cores: float
    others_cores: float | None
    threads: int
    cores: int

    @property
    def busy(self) -> float:
        """The share of the wall time during which this process had its threads running, 0..1."""
        return min(1.0, self.own_cores / self.threads)

    @property
    def left(self) -> float:
        """The share of its threads' time that other work left to this process, 0..1; 1 where that is unknown.

        >>> Load(1.0, 0.4, 1.5, threads=2, cores=2).left, Load(1.0, 0.4, 0.0, threads=2, cores=2).left
        (0.25, 1.0)
        """
        if self.others_cores is None:
            return 1.0
        spare = max(0, self.cores - self.threads)
        return min(1.0, max(0.0, 1 - (self.others_cores - spare) / self.threads))

    @property
    def contended(self) -> bool:
        """Whether the numbers deserve doubt.

        >>> Load(1.0, 1.9, 0.1, threads=2, cores=2).contended
        False
        >>> Load(1.0, 1.1, 0.9, threads=2, cores=2).contended
        True
        >>> Load(1.0, 1.0, 0.9, threads=1, cores=2).contended
        False
        """
        if self.others_cores is None:
            return self.busy < _LEAST_BUSY
        spare = max(0, self.cores - self.threads)
        return self.others_cores > spare + _TOLERATED

    def __str__(self) -> str:
        others = "unknown" if self.others_cores is None else f"{self.others_cores:.1f}"
        return f"{self.own_cores:.1f} of {self.cores} cores ours, {others} of other work"


class LoadWatcher:
    """Reads the clocks at its start; `load()` tells who used the processor since.

    >>> load = LoadWatcher().load()
    >>> load.threads >= 1 and load.cores >= 1
    True
    """

    def __init__(self) -> None:
        self._cores = num_usable_cores()
        self._all_are_ours = self._cores == os.cpu_count()
        self._start = self._read()

    def load(self) -> Load:
        """Return the load since the start."""
        wall, own, everyone = (b - a for a, b in zip(self._start, self._read(), strict=True))
        wall = max(wall, 1e-9)
        known = self._all_are_ours and everyone > 0
        others = max(0.0, everyone - own) / wall if known else None
        return Load(wall, own / wall, others, torch.get_num_threads(), self._cores)

    def _read(self) -> tuple[float, float, float]:
        return time.perf_counter(), time.process_time(), _busy_seconds()


def _busy_seconds() -> float:
    """Return the seconds that all cores together have worked since the machine started; 0 if unknown."""
    try:
        words = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        user, nice, system, _, _, irq, softirq, steal = (int(word) for word in words[1:9])
    except (OSError, ValueError):
        return 0.0
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
