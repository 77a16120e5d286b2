"""Scripts in processes of their own that need not import torch and Lightning first: seconds less for each.

A server without threads imports them once, and every script is a fork of it, as `__main__` and in its folder.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import sys
import traceback
from pathlib import Path

import torch

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["forks", "hydra", "lightning_accel", "torch._dynamo"])


def run_script(
    script: Path, *arguments: str, cwd: Path, path: tuple[Path, ...] = ()
) -> tuple[int, str]:
    """Run a script as `python script arguments` does, with one thread, and return its status and all that it printed.

    Args:
        script: The file.
        arguments: What follows it.
        cwd: The folder it runs in.
        path: What PYTHONPATH holds.
    """
    printed = cwd.parent / f"{cwd.name}-printed.txt"
    environ = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    process = _SERVER.Process(
        target=_as_main,
        args=(str(script), arguments, str(cwd), [*map(str, path)], environ, printed),
    )
    process.start()
    process.join(900)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode or 0, printed.read_text()


def _as_main(
    script: str,
    arguments: tuple[str, ...],
    cwd: str,
    path: list[str],
    environ: dict[str, str],
    printed: Path,
) -> None:
    with printed.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    torch.set_num_threads(1)  # the server read the variable before
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
