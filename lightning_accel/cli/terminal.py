"""What a command says while it works, to whom, and with which exit code it ends."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from lightning_accel.progress import in_ci, rank, silence
from lightning_accel.progress import progress as shown

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


def is_quiet(args: argparse.Namespace) -> bool:
    """Tell whether nobody looks on: one JSON object is asked for, in CI, in a pipe, or not the first process.

    >>> is_quiet(argparse.Namespace(json=True))
    True
    """
    return bool(getattr(args, "json", False)) or in_ci() or rank() > 0 or not sys.stderr.isatty()


@contextmanager
def progress(
    args: argparse.Namespace, what: str, budget_s: float | None = None
) -> Iterator[Callable[[str], None]]:
    """Show on the error output what is being done and for how long, and give what tells the next step.

    >>> with progress(argparse.Namespace(json=True), "bench") as say:
    ...     say("compiling")
    """
    if is_quiet(args):
        with silence():
            yield lambda _: None
        return
    about = "" if budget_s is None else f" (about {budget_s:.0f} s)"
    with shown(f"{what}{about}", after_s=0.0, line=False) as step:
        yield step


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
