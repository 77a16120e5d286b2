"""`lightning-accel report`: runs as one HTML page, that opens anywhere and asks nothing of any network.

A run is a folder with the `report.json` that `AccelReport` wrote; a folder of runs, such as a sweep, stands for all of them:

    lightning-accel report outputs/2026-11-30_12-00-00
    lightning-accel report plain pruned quantized --output compared.html
    lightning-accel report multirun/2026-11-30_12-00-00 --x latency --y val/acc

Several runs stand side by side, with the Pareto front of two of their numbers. `--pictures` writes every chart as a
file of its own too. Exit codes: 0; 1 when a file among several could not be read, which the page says; 2 when there is
no such run or no such number, or nothing could be read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_accel.cli.terminal import FINDING, FINE, answer, complain
from lightning_accel.errors import AccelError, explain
from lightning_accel.measure.table import finite

if TYPE_CHECKING:
    from lightning_accel.pages.runs import Run


def add(commands: Any) -> None:
    """Add the command to an argparse sub-parser collection."""
    parser = commands.add_parser(
        "report",
        help="write runs as one HTML page: what was done, before and after",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run, or a folder of runs"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.html", help="where the page goes")
    parser.add_argument("--title", default="", help="heading of the page")
    add_axes(parser)
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="write each chart as a file too"
    )
    parser.add_argument(
        "--form", choices=("svg", "png", "pdf"), default="svg", help="of the pictures; svg"
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as one JSON object")
    parser.set_defaults(run=run)


def add_axes(parser: argparse.ArgumentParser) -> None:
    """Add what runs are compared by."""
    parser.add_argument("--x", metavar="NAME", help="compare by this, such as latency or macs")
    parser.add_argument("--y", metavar="NAME", help="and by this, such as val/acc")
    parser.add_argument(
        "--lower", action="append", default=[], metavar="NAME", help="less of it is better"
    )
    parser.add_argument(
        "--higher", action="append", default=[], metavar="NAME", help="more of it is better"
    )


def axes_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return what runs are compared by."""
    return {"x": args.x, "y": args.y, "lower": args.lower, "higher": args.higher}


def run(args: argparse.Namespace) -> int:
    """Write the page, and say where it is; 2 when it cannot be made."""
    from lightning_accel.pages.page import render
    from lightning_accel.pages.runs import gather
    from lightning_accel.places import replace

    try:
        found = gather(args.runs)
        broken = [run for run in found if run.is_unreadable]
        if len(broken) == len(found):
            raise ValueError(_unreadable(found))
        target = _target(args, len(found))
        text = render(found, title=args.title, **axes_of(args))
        pictures = _draw(args, found)
        replace(target, text)
    except (AccelError, ValueError, OSError) as error:
        return complain(args, error)
    code = FINDING if broken else FINE
    if args.json:
        numbers = [{"name": r.name, "path": str(r.folder), **finite(r.numbers())} for r in found]
        answer(
            args, json.dumps({"page": str(target), "pictures": pictures, "runs": numbers}, indent=2)
        )
        _tell_problems(found)
        return code
    _tell_problems(found)
    beside = f" and {len(pictures)} pictures in {args.pictures}" if pictures else ""
    print(f"Wrote {target}{beside}")
    return code


def _tell_problems(found: Sequence[Run]) -> None:
    for each in found:
        for problem in each.problems:
            print(f"{each.name}: {problem}", file=sys.stderr)


def _unreadable(found: Sequence[Run]) -> str:
    said = [f"{run.file}: {', '.join(run.problems) or 'it is empty'}" for run in found]
    do = "name the report.json that an AccelReport wrote, or the folder that it lies in"
    return explain("nothing of a run could be read, and no page was written", "; ".join(said), do)


def _target(args: argparse.Namespace, num_runs: int) -> Path:
    """Return where the page goes: into the only folder that was named, or else here."""
    from lightning_accel.pages.page import is_free
    from lightning_accel.places import free

    if args.output is not None:
        if args.output.suffix not in (".html", ".htm"):
            found = str(args.output)
            raise ValueError(explain("a page is HTML", found, "end the name in .html"))
        if not is_free(args.output):
            raise ValueError(
                explain(
                    "there is another file, which is left alone",
                    str(args.output),
                    "name another, or take it away",
                )
            )
        return Path(args.output)
    (first, *others) = args.runs
    folder = first if first.is_dir() else first.parent
    name = "report.html" if num_runs == 1 else "reports.html"
    return free(Path(name) if others else folder / name, is_free)


def _draw(args: argparse.Namespace, found: Any) -> list[str]:
    from lightning_accel.pages.page import drawings
    from lightning_accel.pages.plots import check_ending, save

    if args.pictures is None:
        return []
    check_ending(Path(f"x.{args.form}"))
    named = drawings(found, **axes_of(args))
    return [str(save(drawn, args.pictures / f"{n}.{args.form}")) for n, drawn in named.items()]
