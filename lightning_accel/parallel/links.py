"""What the processes of a group can rely on: how fast they talk, how fast each computes, how far their clocks are apart.

A collective is done when the last process is, so its time is the largest over all of them. Bandwidth is that of the bus:
bytes that must cross the slowest link, by the formulas of NCCL's tests, so that it does not depend on the number of
processes: all_reduce 2 (n - 1) / n, all_gather (n - 1) / n of all that is gathered, broadcast 1.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from lightning_accel.measure.race import synchronise

SIZES = (8, 64 * 2**10, 2**20, 16 * 2**20)
"""Bytes that each process gives; the first is for the latency."""
OPERATIONS = ("all_reduce", "all_gather", "broadcast")
SLOW = 1.25
"""How many times the median's time a process may take for the same product."""
_WARM, _FEW, _MANY = 2, 5, 20
_LARGE = 2**20
_PINGS = 15
_WIDTH = {"cpu": 512}


class Collective(NamedTuple):
    """One collective at one size; `seconds` is the median of what the last process took."""

    name: str
    size_bytes: int
    seconds: float
    bus_bytes_per_s: float


class Rank(NamedTuple):
    """One process.

    Attributes:
        rank: Its number.
        host: Its machine.
        product_s: How long the same product of matrices took, while all computed it.
        clock_s: How far its clock is ahead of rank 0's.
        clock_error_s: By how much that may be wrong: half of the way there and back.
    """

    rank: int
    host: str
    product_s: float
    clock_s: float
    clock_error_s: float


class Links(NamedTuple):
    """What was measured in a group."""

    backend: str
    device: str
    collectives: tuple[Collective, ...]
    ranks: tuple[Rank, ...]

    @property
    def slow(self) -> tuple[Rank, ...]:
        """The processes that take clearly longer than most."""
        usual = statistics.median_low(one.product_s for one in self.ranks)
        return tuple(one for one in self.ranks if one.product_s > SLOW * usual)

    def apart(self, most_s: float) -> tuple[Rank, ...]:
        """The processes whose clocks are off by more than that, surely."""
        return tuple(one for one in self.ranks if abs(one.clock_s) - one.clock_error_s > most_s)


def bus_bytes(name: str, size_bytes: int, count: int) -> float:
    """Return the bytes that cross the slowest link.

    >>> bus_bytes("all_reduce", 100, 4), bus_bytes("all_gather", 100, 4), bus_bytes("broadcast", 100, 4)
    (150.0, 300.0, 100.0)
    """
    shares = {"all_reduce": 2 * (count - 1) / count, "all_gather": count - 1.0, "broadcast": 1.0}
    return shares[name] * size_bytes


def offset(sent: float, there: float, back: float) -> tuple[float, float]:
    """Return how far a clock there is ahead, and the possible error, from one message there and back.

    >>> offset(10.0, 15.5, 11.0)
    (5.0, 0.5)
    """
    return there - (sent + back) / 2, (back - sent) / 2


def links(device: torch.device, say: Callable[[str], None] = lambda _: None) -> Links:
    """Measure the default group; all processes call it, and all get the answer."""
    say("clocks")
    clocks = _clocks(device)
    say("products of matrices")
    product = _product_s(device)
    found = []
    for name in OPERATIONS:
        for size in SIZES:
            say(f"{name} of {size:,} bytes")
            found.append(_collective(name, size, device))
    own = (dist.get_rank(), socket.gethostname(), product)
    everyone: list[tuple[int, str, float]] = [own] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    ranks = tuple(Rank(*one, *clock) for one, clock in zip(everyone, clocks, strict=True))
    return Links(dist.get_backend(), str(device), tuple(found), ranks)


def _collective(name: str, size: int, device: torch.device) -> Collective:
    count = dist.get_world_size()
    given = torch.zeros(size // 4, device=device)
    taken = [torch.zeros_like(given) for _ in range(count)] if name == "all_gather" else []
    call: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(given),
        "all_gather": lambda: dist.all_gather(taken, given),
        "broadcast": lambda: dist.broadcast(given, 0),
    }
    times = _times(call[name], device, _FEW if size > _LARGE else _MANY, together=True)
    slowest = torch.tensor(times, dtype=torch.float32, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    seconds = statistics.median(slowest.tolist())
    return Collective(name, size, seconds, bus_bytes(name, size, count) / seconds)


def _product_s(device: torch.device) -> float:
    width = _WIDTH.get(device.type, 4096)
    one = torch.randn(width, width, device=device)
    dist.barrier()
    return statistics.median(_times(lambda: one @ one, device, _MANY, together=False))


def _times(
    call: Callable[[], object], device: torch.device, repeats: int, *, together: bool
) -> list[float]:
    found = []
    for _ in range(_WARM + repeats):
        if together:
            dist.barrier()
        synchronise(device)
        start = time.perf_counter()
        call()
        synchronise(device)
        found.append(time.perf_counter() - start)
    return found[_WARM:]


def _clocks(device: torch.device) -> list[tuple[float, float]]:
    """Return how far each clock is ahead of rank 0's, by the quickest of some messages there and back."""
    rank, count = dist.get_rank(), dist.get_world_size()
    word = torch.zeros((), dtype=torch.int64, device=device)
    found: list[tuple[float, float]] = [(0.0, 0.0)]
    for other in range(1, count):
        tries = []
        for _ in range(_PINGS):
            if rank == 0:
                sent = time.time()
                dist.send(word.fill_(0), other)
                dist.recv(word, other)
                tries.append(offset(sent, int(word) / 1e9, time.time()))
            elif rank == other:
                dist.recv(word, 0)
                synchronise(device)
                dist.send(word.fill_(time.time_ns()), 0)
        if rank == 0:
            found.append(min(tries, key=lambda one: one[1]))
    told: list[object] = [found]
    dist.broadcast_object_list(told, 0)
    return told[0]  # type: ignore[return-value]
