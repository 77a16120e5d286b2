"""The words after `lightning-accel`. A command is a module with `add(commands)` and one line here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lightning_accel import __version__
from lightning_accel.cli import board, env, export, plan, report, tune

_COMMANDS = (env, plan, export, tune, report, board)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code of the process."""
    parser = _parser()
    args = parser.parse_args(argv)
    if "run" not in args:
        parser.print_help()
        return 0
    code: int = args.run(args)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-accel",
        description="Make the training you already have with Lightning faster, and measure it.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="command")
    for command in _COMMANDS:
        command.add(commands)
    return parser
