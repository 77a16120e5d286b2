"""What a command says while it works, to whom, and with which exit code it ends."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

FINE: Final = 0
"""All is well, and what was asked for was done."""
FINDING: Final = 1
"""It was done, and found what has to be looked at: a misfit, a finding, nothing that fits."""
WRONG: Final = 2
"""It could not be done: wrong words, or code of the user's that fails."""
INTERRUPTED: Final = 130
"""Ctrl-C, as shells say it."""

EXIT_CODES = (
    "exit codes: 0 fine, 1 something was found that wants attention, 2 it could not be done"
)

_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
_PER_SECOND = 2
"""Redraws; more would take time from what is measured meanwhile."""


def rank() -> int:
    """Return the number of this process among those that were started together.

    >>> rank()
    0
    """
    for name in _RANKS:
        if os.environ.get(name, "").strip().isdigit():
            return int(os.environ[name])
    return 0


def is_quiet(args: argparse.Namespace) -> bool:
    """Tell whether nobody looks on: one JSON object is asked for, in CI, in a pipe, or not the first process.

    >>> is_quiet(argparse.Namespace(json=True))
    True
    """
    in_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
    return bool(getattr(args, "json", False)) or in_ci or rank() > 0 or not sys.stderr.isatty()


@contextmanager
def progress(
    args: argparse.Namespace, what: str, budget_s: float | None = None
) -> Iterator[Callable[[str], None]]:
    """Show on the error output what is being done and for how long, and give what tells the next step.

    >>> with progress(argparse.Namespace(json=True), "bench") as say:
    ...     say("compiling")
    """
    if is_quiet(args):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    about = "" if budget_s is None else f" of about {budget_s:.0f} s"
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    shown = Progress(
        *columns,
        TextColumn(about),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        refresh_per_second=_PER_SECOND,
    )
    with shown:
        task = shown.add_task(what)
        yield lambda step: shown.update(task, description=f"{what}: {step}")


def complain(args: argparse.Namespace, error: BaseException) -> int:
    """Say an error on the error output, and return the exit code for it."""
    print(f"lightning-accel {args.command}: {error}", file=sys.stderr)
    return WRONG


def answer(args: argparse.Namespace, text: str) -> None:
    """Print what was asked for where the answer is read; `main` keeps all else out of one JSON object.

    >>> answer(argparse.Namespace(), "fine")
    fine
    """
    print(text, file=getattr(args, "answers", None) or sys.stdout)
