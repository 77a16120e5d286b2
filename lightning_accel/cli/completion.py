"""`lightning-accel completion`: words and options on the tab key, as a script for the shell.

    lightning-accel completion bash > ~/.local/share/bash-completion/completions/lightning-accel
    lightning-accel completion zsh > ~/.zfunc/_lightning-accel

The script is made once and asks nobody afterwards, so that the tab key answers at once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from lightning_accel.cli.terminal import FINE, answer, complain
from lightning_accel.errors import explain

SHELLS = ("bash", "zsh", "tcsh")


def adder(whole: Callable[[], argparse.ArgumentParser]) -> Callable[[Any], None]:
    """Return what adds the command, which completes the parser of all commands.

    Args:
        whole: Makes that parser.
    """

    def add(commands: Any) -> None:
        parser = commands.add_parser(
            "completion",
            help="print a script that completes these words in your shell",
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.add_argument("shell", choices=SHELLS)
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        parser.set_defaults(run=lambda args: run(args, whole()))

    return add


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Print the script; 2 where the package that writes it is missing."""
    try:
        script = written(parser, args.shell)
    except ImportError as error:
        return complain(args, error)
    answer(args, json.dumps({"shell": args.shell, "script": script}) if args.json else script)
    return FINE


def written(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script that completes a parser's words.

    Raises:
        ImportError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError:
        raise ImportError(
            explain(
                "completion is written by shtab",
                "no such package here",
                "pip install 'lightning-accel[completion]'",
            )
        ) from None
    return str(shtab.complete(parser, shell=shell))
