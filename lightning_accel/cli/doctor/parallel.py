"""`lightning-accel doctor --parallel`: how fast processes talk, which of them is slow, and whose clock is wrong.

It starts `--devices` processes on this machine; below `torchrun`, `srun` or whatever else has set RANK and WORLD_SIZE, it
measures the processes that are there, on all machines.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_accel.arguments import whole
from lightning_accel.cli.subject import give
from lightning_accel.cli.terminal import FINDING, FINE, complain, progress
from lightning_accel.errors import AccelError, explain
from lightning_accel.measure.table import Table, finite
from lightning_accel.parallel.backends import backend_of
from lightning_accel.parallel.links import SLOW, Links, Rank, links

CLOCK_S = 1.0
"""Clocks that are further apart make logs of machines misleading, and let tokens and locks expire."""
_ENDINGS = (".json", ".md", ".txt")
_PATIENCE_S = 60.0


def run_parallel(args: argparse.Namespace) -> int:
    """Print what was measured; 1 when a process is slow or a clock wrong, 2 when it cannot be measured."""
    try:
        found = _measured(args)
    except (AccelError, ValueError, TypeError, OSError, RuntimeError) as error:
        return complain(args, error)
    if found is None:
        return FINE  # the first process answers for all
    tables = [_talk(found), _processes(found)]
    said = {
        ".json": json.dumps(finite(to_dict(found)), indent=2),
        ".txt": "\n\n".join([*(table.to_text() for table in tables), _verdict(found)]),
        ".md": "\n\n".join([*(table.to_markdown() for table in tables), _verdict(found)]),
    }
    give(args, said)
    return FINDING if found.slow or found.apart(CLOCK_S) else FINE


def to_dict(found: Links) -> dict[str, Any]:
    """Return all of it as plain values."""
    return {
        "backend": found.backend,
        "device": found.device,
        "collectives": [one._asdict() for one in found.collectives],
        "ranks": [one._asdict() for one in found.ranks],
        "slow": [one.rank for one in found.slow],
        "clocks_apart": [one.rank for one in found.apart(CLOCK_S)],
    }


def _measured(args: argparse.Namespace) -> Links | None:
    _check(args)
    kind = torch.accelerator.current_accelerator() if args.accelerator != "cpu" else None
    kind = kind if kind is not None else torch.device("cpu")
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _measure(int(os.environ["RANK"]), kind, args)
    count = args.devices or max(2, torch.accelerator.device_count() if kind.type != "cpu" else 2)
    if kind.type != "cpu" and count > torch.accelerator.device_count():
        there = f"{count} of {torch.accelerator.device_count()}"
        raise ValueError(explain("there are not so many devices", there, "pass --devices that are"))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    started = multiprocessing.get_context("spawn")
    others = [
        started.Process(target=_other, args=(rank, common, kind.type), daemon=True)
        for rank in range(1, count)
    ]
    for other in others:
        other.start()
    os.environ.update(common)
    try:
        return _measure(0, kind, args)
    finally:
        for other in others:
            other.join(_PATIENCE_S)


def _check(args: argparse.Namespace) -> None:
    for name in args.output:
        if Path(name).suffix not in _ENDINGS:
            raise ValueError(explain("unknown form", name, f"end the name in {' '.join(_ENDINGS)}"))
    if args.subject or args.config:
        what = "with `--parallel` processes are measured, and no training"
        raise ValueError(explain(what, args.subject or str(args.config), "leave one of them out"))
    whole("--devices", args.devices, least=2, none=True)
    if args.accelerator not in (None, "auto", "cpu", "gpu", "cuda"):
        do = "pass cpu, or leave it out"
        raise ValueError(explain("unknown --accelerator", args.accelerator, do))


def _other(rank: int, environ: dict[str, str], kind: str) -> None:
    os.environ.update(environ)
    quiet = argparse.Namespace(command="doctor", json=True)
    _measure(rank, torch.device(kind), quiet)


def _measure(rank: int, kind: torch.device, args: argparse.Namespace) -> Links | None:
    """Measure as one process of the group."""
    device = kind
    if kind.type != "cpu":
        index = int(os.environ.get("LOCAL_RANK", rank)) % torch.accelerator.device_count()
        device = torch.device(kind.type, index)
        torch.accelerator.set_device_index(index)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["WORLD_SIZE"])))
    with progress(args, "doctor --parallel") as say:
        say("waiting for the other processes")
        dist.init_process_group(
            backend_of(device), rank=rank, world_size=int(os.environ["WORLD_SIZE"])
        )
        try:
            found = links(device, say)
        finally:
            dist.destroy_process_group()
    return found if rank == 0 else None


def _talk(found: Links) -> Table:
    rows: list[list[Any]] = [
        [one.name, one.size_bytes, 1e6 * one.seconds, one.bus_bytes_per_s / 1e9]
        for one in found.collectives
    ]
    title = f"{len(found.ranks)} processes over {found.backend} on {found.device}"
    notes = ["the time of the last process, median; GB/s as the slowest link carries them"]
    return Table(["", "bytes", "us", "GB/s"], rows, title, notes)


def _processes(found: Links) -> Table:
    rows: list[list[Any]] = [
        [one.rank, one.host, 1e3 * one.product_s, 1e3 * one.clock_s, 1e3 * one.clock_error_s]
        for one in found.ranks
    ]
    columns = ["rank", "host", "product ms", "clock ahead ms", "+- ms"]
    return Table(columns, rows, "The same product of matrices on all at once, and clocks")


def _verdict(found: Links) -> str:
    said = [
        explain(
            "slow processes hold up all others in each step",
            _named(found.slow, lambda one: f"{1e3 * one.product_s:.3g} ms"),
            f"look for other work, heat or a lower power limit there ({SLOW:g}x the median is slow)",
        )
    ] * bool(found.slow)
    if apart := found.apart(CLOCK_S):
        text = _named(apart, lambda one: f"{one.clock_s:+.3g} s")
        said.append(explain("clocks are apart", text, "let them be set by NTP (`timedatectl`)"))
    return "\n".join(said) or "These processes are fine: none is slow, and their clocks agree."


def _named(some: tuple[Rank, ...], value: Any) -> str:
    return ", ".join(f"rank {one.rank} on {one.host}: {value(one)}" for one in some)
