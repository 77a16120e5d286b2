"""The words after `lightning-accel`. A command is a module with `add(commands)` and one line here."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout

from lightning_accel import __version__
from lightning_accel.cli import (
    bench,
    board,
    checkpoint,
    completion,
    doctor,
    env,
    export,
    listing,
    plan,
    report,
    show,
    tune,
)
from lightning_accel.cli.terminal import EXIT_CODES, FINE, INTERRUPTED, complain
from lightning_accel.errors import AccelError
from lightning_accel.progress import rank

_COMMANDS = (
    env,
    listing,
    show,
    doctor,
    bench,
    tune,
    plan,
    export,
    report,
    board,
    checkpoint,
)

_ABOUT = """Make the training you already have with Lightning faster and its model smaller, and measure it.

Where to begin:
    lightning-accel doctor mymodels.lit:build     what slows this training, with numbers, in a minute
    lightning-accel tune mymodels.lit:build       what makes its step faster here
    lightning-accel bench mymodels.nets:build --example 32,3,224,224     the same of any network
    lightning-accel list                          presets for `python train.py +accel=NAME`
    lightning-accel show +accel=amp_prune         what a preset adds, and does"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code of the process."""
    parser = _parser()
    args = parser.parse_args(argv)
    if "run" not in args:
        parser.print_help()
        return FINE
    if rank() > 0 and not (args.command == "doctor" and args.parallel):
        return FINE  # the first process answers for all
    try:
        code = _run(args)
        sys.stdout.flush()
        return code
    except SystemExit as ended:
        if isinstance(ended.__context__, KeyboardInterrupt):  # what Lightning makes of Ctrl-C
            return _interrupted(args)
        what = "the code that was named ended the process"
        do = "keep `sys.exit` below `if __name__ == '__main__'`"
        return complain(args, AccelError(what, f"exit code {ended.code}", do))
    except KeyboardInterrupt:
        return _interrupted(args)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINE


def _interrupted(args: argparse.Namespace) -> int:
    print(f"lightning-accel {args.command}: interrupted", file=sys.stderr)
    return INTERRUPTED


def _run(args: argparse.Namespace) -> int:
    """Run a command; what the user's code prints goes beside one JSON object, and an error that nobody expected is told.

    With the variable LIGHTNING_ACCEL_TRACEBACK set such an error is raised.
    """
    args.answers = sys.stdout
    aside = redirect_stdout(sys.stderr) if getattr(args, "json", False) else nullcontext()
    try:
        with aside:
            code: int = args.run(args)
            return code
    except (BrokenPipeError, KeyboardInterrupt):
        raise
    except Exception as error:
        if os.environ.get("LIGHTNING_ACCEL_TRACEBACK"):
            raise
        said = " ".join(str(error).split())[:400]
        do = "set LIGHTNING_ACCEL_TRACEBACK=1 to see where"
        what = "this ended in an error that nobody expected"
        return complain(args, AccelError(what, f"{type(error).__name__}: {said}", do))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-accel",
        description=_ABOUT,
        epilog=f"{EXIT_CODES}. Each command has --help with examples, and --json.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="command", dest="command")
    for command in _COMMANDS:
        command.add(commands)
    completion.adder(_parser)(commands)
    for name in commands.choices:
        commands.choices[name].epilog = commands.choices[name].epilog or EXIT_CODES
    return parser
