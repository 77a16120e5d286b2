"""A group of processes that `torchrun` started anew, under a name that no try before it has used.

`torchrun` keeps one store for all tries of a run, and torch 2.13 puts the addresses of processes into it under the same
keys each time ("a new TCPStore for every retry so no need to add prefix", `torch/distributed/rendezvous.py`): those of a
second try read the addresses of dead ones, and hang or fail. The number of the restart would tell the tries apart on
one machine, but agents of several count each for itself (pytorch #108158). So the processes agree on a name: each writes
a token of its own life, and rank 0 answers to that token only.
"""

from __future__ import annotations

import atexit
import os
import secrets
import signal
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from lightning_accel.errors import AccelError, explain
from lightning_accel.parallel.watch.attendance import attendance
from lightning_accel.parallel.watch.processes import ranks

_PAUSE_S = 0.02
_NAMED: list[str] = []


def shares_store(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `torchrun` gives the processes of all its tries one store.

    >>> shares_store({"TORCHELASTIC_USE_AGENT_STORE": "True"}), shares_store({})
    (True, False)
    """
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


def warning_of_restarts(environ: Mapping[str, str] = os.environ) -> str:
    """Return what to say where restarts are asked for that will fail; "" where they will not.

    >>> warning_of_restarts({"TORCHELASTIC_MAX_RESTARTS": "3"})
    ''
    """
    most = environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if most == "0" or not shares_store(environ) or _NAMED:
        return ""
    return explain(
        "processes that `torchrun` starts anew would look for the dead ones, and hang",
        f"--max-restarts={most} with a strategy that is not of this package",
        "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for `torchrun`, or use `accel_ddp`",
    )


def begin_group(strategy: Any) -> None:
    """Begin the default group under a name of its own, where `torchrun` shares one store; gather if it is there.

    Args:
        strategy: Of Lightning, which is about to begin the group, and leaves one that is there.

    Raises:
        AccelError: Some processes did not come within the timeout, or did not leave a run that failed here.
    """
    if dist.is_initialized():
        attendance().gather()
    if dist.is_initialized() or not shares_store():
        return
    device: torch.device = strategy.root_device
    strategy.accelerator.setup_device(device)
    strategy.set_world_ranks()
    backend, rank, count = (
        strategy._get_process_group_backend(),
        strategy.global_rank,
        strategy.world_size,
    )
    patience = strategy._timeout or dist.distributed_c10d.default_pg_timeout
    store = next(dist.rendezvous("env://", rank, count, timeout=patience))[0]
    place = dist.PrefixStore("lightning_accel/start", store)
    name = agree(place, rank, count, patience.total_seconds())
    _NAMED[:] = [name]
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"lightning_accel/{name}", store),
        rank=rank,
        world_size=count,
        timeout=strategy._timeout,
        device_id=None if device.type == "cpu" else device,
    )
    if backend == dist.Backend.NCCL:  # it warns of a group that is there at the end
        atexit.register(_destroy)


def agree(store: Any, rank: int, count: int, patience_s: float) -> str:
    """Return a name that all processes of this try have, and none of another.

    >>> agree(dist.HashStore(), 0, 1, 1.0) != agree(dist.HashStore(), 0, 1, 1.0)
    True
    """
    mine = secrets.token_hex(8)
    if rank:
        store.set(f"here/{rank}", mine)
        name = str(store.get(f"name/{rank}/{mine}").decode())
        store.set(f"heard/{name}/{rank}", "")
        return name
    missing, deadline = set(range(1, count)), time.monotonic() + patience_s
    while missing:
        for other in missing:
            if store.check([f"here/{other}"]):  # perhaps of a try before this one
                token = store.get(f"here/{other}").decode()
                store.set(f"name/{other}/{token}", mine)
        missing = {other for other in missing if not store.check([f"heard/{mine}/{other}"])}
        if missing and time.monotonic() > deadline:
            raise _absent(missing, count, patience_s)
        time.sleep(_PAUSE_S if missing else 0)
    return mine


def _absent(missing: set[int], count: int, seconds: float) -> AccelError:
    return AccelError(
        f"not all of {count} processes came within {seconds:.0f} s",
        f"no sign of {ranks(missing)}",
        "look at what they print, and whether they reach this machine",
    )


def _destroy() -> None:
    """Destroy the group at the end of the program, which Ctrl-C must not break off."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if dist.is_initialized():
        dist.destroy_process_group()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
