"""Scripts in processes of their own that need not import torch and Lightning first: seconds less for each.

A server without threads imports them once, and every script is a fork of it, as `__main__` and in its folder.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import runpy
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

_SERVER = multiprocessing.get_context("forkserver")
# What is installed: the server does not see the path of the tests, and is silent about what it cannot import.
_SERVER.set_forkserver_preload(["hydra", "lightning.pytorch", "lightning_accel", "torch._dynamo"])
_PATIENCE = 900.0  # seconds


def run_script(
    script: Path,
    *arguments: str,
    cwd: Path,
    path: tuple[Path, ...] = (),
    environ: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """Run a script as `python script arguments` does, with one thread, and return its status and all that it printed.

    Args:
        script: The file.
        arguments: What follows it.
        cwd: The folder it runs in.
        path: What PYTHONPATH holds.
        environ: Variables beside the present ones.
    """
    return _run(script, arguments, cwd, path, [environ or {}])


def run_ranks(
    script: Path,
    *arguments: str,
    cwd: Path,
    path: tuple[Path, ...] = (),
    environ: Mapping[str, str] | None = None,
    count: int = 2,
    together: bool = True,
) -> tuple[int, str]:
    """Run it in processes that find each other as those of `torchrun` do; the end of one by an error ends all if `together`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(count),
        "NODE_RANK": "0",
    }
    ranks = [(environ or {}) | common | {"LOCAL_RANK": str(rank)} for rank in range(count)]
    return _run(script, arguments, cwd, path, ranks, together)


def results_of(script: str, folder: Path, *arguments: str, count: int = 2, **environ: str) -> Any:
    """Run a script of `tests/scripts` in processes, and return what each wrote into the folder (`results.py`)."""
    tests = Path(__file__).parent
    environ = {"GLOO_SOCKET_IFNAME": "lo", **environ}
    status, printed = run_ranks(
        tests / "scripts" / script,
        str(folder),
        *arguments,
        cwd=folder,
        path=(tests,),
        environ=environ,
        count=count,
    )
    assert status == 0, printed[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def _run(
    script: Path,
    arguments: tuple[str, ...],
    cwd: Path,
    path: tuple[Path, ...],
    environs: list[Mapping[str, str]],
    together: bool = True,
) -> tuple[int, str]:
    """Return the first status that is not 0, and what all printed."""
    common = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    names = [cwd.parent / f"{cwd.name}-printed-{number}.txt" for number in range(len(environs))]
    processes = [
        _SERVER.Process(
            target=_as_main,
            args=(str(script), arguments, str(cwd), [*map(str, path)], common | own, printed),
        )
        for own, printed in zip(environs, names, strict=True)
    ]
    for process in processes:
        process.start()
    status, deadline = 0, time.monotonic() + _PATIENCE
    while (status == 0 or not together) and (alive := [p for p in processes if p.exitcode is None]):
        if not wait([p.sentinel for p in alive], deadline - time.monotonic()):
            status, together = -1, True
        status = status or next((p.exitcode for p in processes if p.exitcode), 0)
    for process in processes:
        if process.exitcode is None:
            process.kill()
        process.join()
    return status, "".join(printed.read_text() for printed in names)


def _as_main(
    script: str,
    arguments: tuple[str, ...],
    cwd: str,
    path: list[str],
    environ: Mapping[str, str],
    printed: Path,
) -> None:
    with printed.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    torch.set_num_threads(1)  # the server read the variables before
    rank_zero_only.rank = int(environ.get("LOCAL_RANK", 0))
    sys.argv = [script, *arguments]
    sys.path[:0] = [str(Path(script).parent), *path]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(ValueError):
                stream.flush()
