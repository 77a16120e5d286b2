"""Which way to train fits into the memory of a device, the simplest first, and how that is told.

Copies (`ddp`) send least and refuse least; then come copies that recompute activations, shards (`fsdp`), and layers that
are split. FSDP leaves activations as they are, so where they are what does not fit, checkpointing comes before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lightning_accel.errors import AccelError, explain
from lightning_accel.parallel.accelerators import GIB
from lightning_accel.parallel.planning import Estimate, Option, Workload, estimate

ROOM = 0.9
"""The share of memory that is planned with: drivers, workspaces and fragments have the rest."""
NODE = 8
"""Devices with fast links between them."""


class Tried(NamedTuple):
    """A way to train that was looked at, what it needs, and why it does not do."""

    option: Option
    estimate: Estimate | None
    why: str

    @property
    def fits(self) -> bool:
        """Whether a device has room for it."""
        return self.estimate is not None and not self.why


def options(devices: int) -> Iterator[Option]:
    """Yield ways to train, the preferred ones first.

    >>> [option.name for option in options(2)][:3]
    ['ddp', 'ddp + checkpointing', 'fsdp']
    """
    if devices == 1:
        yield from (Option("single"), Option("single", checkpointing=True))
        return
    yield from (Option("ddp", devices), Option("ddp", devices, checkpointing=True))
    yield from (Option("fsdp", devices), Option("fsdp", devices, checkpointing=True))
    for tensor in (2, 4, NODE):
        if tensor < devices and not devices % tensor:
            yield Option("fsdp_tensor", devices, tensor, checkpointing=True)
    if devices <= NODE:
        yield Option("tensor", devices, devices)


def tried(work: Workload, option: Option, memory: int, *, every: bool = False) -> Tried:
    """Look at one way to train.

    Args:
        work: What is trained.
        option: How.
        memory: Bytes of a device.
        every: Run one that does not fit to its end too, for its peak.
    """
    limit = int(memory * ROOM)
    try:
        found = estimate(work, option, limit=None if every else limit)
    except AccelError as error:
        return Tried(option, None, str(error))
    why = f"{found.why} are too large" if found.why else ""
    if found.peak is not None and found.peak > limit:
        why = f"too large, mostly {max(found.parts, key=lambda name: found.parts[name])}"
    return Tried(option, found, why)


def needs(one: Tried) -> str:
    """Return what a way to train needs of each device, for people."""
    found = one.estimate
    if found is None:
        return f"{one.option.name} cannot be planned ({one.why})"
    if found.peak is None:
        return (
            f"{one.option.name} needs more ({found.why}: {amount(found.states)} are no activations)"
        )
    parts = sorted(found.parts.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name} {amount(size)}" for name, size in parts[:3])
    return f"{one.option.name} needs {amount(found.peak)} ({listed})"


def reason(every: Sequence[Tried], chosen: Tried, memory: int) -> str:
    """Return in one sentence why this way was chosen."""
    before = [one for one in every[: every.index(chosen)] if not one.option.checkpointing]
    told = "; ".join(map(needs, [*before, chosen]))
    return f"{told}; {amount(memory)} are there, of which {ROOM:.0%} are planned with"


def amount(count: int) -> str:
    """Return a number of bytes for people.

    >>> amount(80 * 2**30), amount(3 * 2**20), amount(700)
    ('80.0 GiB', '3.0 MiB', '0.7 KiB')
    """
    names = ("KiB", 2**10), ("MiB", 2**20), ("GiB", GIB)
    unit, size = next((one for one in reversed(names) if count >= one[1]), names[0])
    return f"{count / size:.1f} {unit}"


def size(text: str) -> int:
    """Read a number of bytes.

    Raises:
        ValueError: It is none.

    >>> size("80GiB") == 80 * 2**30, size("1.5 GB")
    (True, 1500000000)
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not match:
        raise ValueError(explain("memory is a size", repr(text), "say 80GiB or 24GB"))
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))
