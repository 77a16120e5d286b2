"""`lightning-accel board`: all runs of a folder as a live page on this machine, those that still train too.

The page is at an address of this machine alone and renews itself; a fit tells of itself where it has `AccelReport`:

    lightning-accel board outputs
    lightning-accel board multirun --port 8000 --y val/acc

Nothing is written, nothing else of the folder is shown, and other machines are not answered. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lightning_accel.cli.report import add_axes, axes_of
from lightning_accel.errors import AccelError, explain


def add(commands: Any) -> None:
    """Add the command to an argparse sub-parser collection."""
    parser = commands.add_parser(
        "board",
        help="show the runs of a folder as a live page on this machine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the runs are")
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free one; 8765")
    add_axes(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C; 2 when that cannot be."""
    from lightning_accel.pages.live import Board

    try:
        board = Board(args.folder, port=_port(args.port), **axes_of(args))
    except (AccelError, ValueError, OSError) as error:
        print(f"lightning-accel board: {error}", file=sys.stderr)
        return 2
    print(f"{args.folder} is at {board.address} until Ctrl-C", flush=True)
    try:
        board.serve_forever()
    except KeyboardInterrupt:
        pass  # that is how it ends
    finally:
        board.server_close()
    return 0


def _port(port: int) -> int:
    if not 0 <= port <= 65535:
        found = "pass one, such as 8765"
        raise ValueError(explain("`--port` is a number from 0 to 65535", str(port), found))
    return port
