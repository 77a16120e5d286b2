"""The words of `lightning-accel doctor`, and how its answer is told."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from lightning_accel.arguments import positive
from lightning_accel.cli.doctor.facts import Facts, Finding
from lightning_accel.cli.subject import add_subject, give, subject_of
from lightning_accel.cli.terminal import FINDING, FINE, complain, progress
from lightning_accel.errors import AccelError, explain
from lightning_accel.measure.table import Table, finite

if TYPE_CHECKING:  # `lightning-accel env` must tell of a broken Lightning, and so import none
    from lightning_accel.cli.doctor.looking import Look

_ENDINGS = (".json", ".md", ".txt")


def add(commands: Any) -> None:
    """Add the command to an argparse sub-parser collection."""
    from lightning_accel.cli import doctor

    parser = commands.add_parser(
        "doctor",
        help="look at a training for a minute, and say what slows it and what to do first",
        description=doctor.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_subject(parser)
    parser.add_argument("--budget-s", type=float, default=60.0, help="about how long to look; 60")
    parser.add_argument("--accelerator", help="where to train, with MODULE:FUNCTION; auto")
    parser.add_argument(
        "--output", action="append", default=[], metavar="FILE", help=".json .md .txt"
    )
    parser.add_argument(
        "--parallel", action="store_true", help="measure links, speed and clocks of processes"
    )
    parser.add_argument("--devices", type=int, metavar="N", help="with --parallel: processes; 2")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what was found; 1 when something costs time, 2 when the training cannot be looked at."""
    if args.parallel:
        from lightning_accel.cli.doctor.parallel import run_parallel

        return run_parallel(args)
    try:
        facts = _facts(args)
    except (AccelError, ValueError, TypeError, ImportError, OSError) as error:
        return complain(args, error)
    from lightning_accel.cli.doctor.findings import findings

    found = findings(facts)
    said = {
        ".json": json.dumps(finite(to_dict(facts, found)), indent=2),
        ".txt": to_text(facts, found),
        ".md": to_markdown(facts, found),
    }
    give(args, said)
    return FINDING if any(finding.costs for finding in found) else FINE


def _facts(args: argparse.Namespace) -> Facts:
    positive("--budget-s", args.budget_s, unit="seconds")
    for name in args.output:
        if Path(name).suffix not in _ENDINGS:
            raise ValueError(explain("unknown form", name, f"end the name in {' '.join(_ENDINGS)}"))
    from lightning_accel.cli.doctor.looking import Look
    from lightning_accel.cli.in_fit import in_fit, require_training

    with progress(args, "doctor", args.budget_s) as say:
        say("building")
        subject = subject_of(args, alone=True)
        require_training(subject, args.subject, "only a training can be looked at")
        look: Look = Look(args.budget_s, say)
        in_fit(subject, look, accelerator=args.accelerator or "auto")
    assert look.facts is not None
    return look.facts


def to_dict(facts: Facts, found: Sequence[Finding]) -> dict[str, Any]:
    """Return all of it as plain values."""
    return {
        "findings": [finding._asdict() for finding in found if finding.costs],
        "also_seen": [finding._asdict() for finding in found if not finding.costs],
        "facts": facts.to_dict(),
    }


def parts(facts: Facts) -> Table:
    """Return where the time from batch to batch goes."""
    times = facts.times
    rows: list[list[Any]] = [
        [name, 1000 * getattr(times, name), f"{getattr(times, name) / times.total:.0%}"]
        for name in ("data", "move", "forward", "backward", "optimizer", "rest")
    ]
    rows.append(["from batch to batch", 1000 * times.total, "100%"])
    notes = [_about(facts), *facts.notes]
    notes += [
        f"tried beside it: {n}: {lane.verdict}" for n, lane in facts.lanes.items() if lane.verdict
    ]
    return Table(["", "ms", "share"], rows, f"A step on {facts.device}", notes)


def _about(facts: Facts) -> str:
    from lightning_accel.cli.doctor.findings import fits

    memory, loader = facts.memory, facts.loader
    said = [f"{facts.times.steps} steps", f"batch {facts.batch_size}", f"precision {facts.precision}",
            f"{facts.threads} threads on {facts.cores} cores", f"{loader.kind}(num_workers={loader.num_workers})"]  # fmt: skip
    if memory is not None and memory.largest is not None:
        said.append(f"memory for {fits(facts)}")
    return ", ".join(said)


def to_text(facts: Facts, found: Sequence[Finding], width: int = 100) -> str:
    """Say it for a terminal."""
    blocks = [parts(facts).to_text(width)]
    if not any(finding.costs for finding in found):
        blocks.append("This training is fine: nothing was found that costs time here.")
    groups = {
        "What to do first": [f for f in found if f.costs],
        "Would change the training, and so is yours to decide": [f for f in found if f.is_choice],
        "Also seen, costs nothing measurable here": [
            f for f in found if not f.costs and not f.is_choice
        ],
    }
    blocks += [_listed(title, some, width) for title, some in groups.items() if some]
    blocks.append("What makes a step faster beyond that is searched by `lightning-accel tune`.")
    return "\n\n".join(blocks)


def _listed(title: str, some: Sequence[Finding], width: int) -> str:
    lines = [title]
    for number, finding in enumerate(some, 1):
        saves = f" (saves up to {finding.saves:.0%} of the time)" if finding.saves > 0 else ""
        lines.append(f"{number}. {finding.what}{saves}")
        for label, text in (("found", finding.found), ("by", finding.how), ("do", finding.do)):
            lead = f"   {label + ':':<7}"
            lines += wrap(text, width, initial_indent=lead, subsequent_indent=" " * len(lead))
    return "\n".join(lines)


def to_markdown(facts: Facts, found: Sequence[Finding]) -> str:
    """Say it for a page."""
    rows = [[f"{f.saves:.0%}" if f.saves > 0 else "-", f.what, f.found, f.how, f.do] for f in found]
    columns = ["saves up to", "what", "found", "by", "do"]
    return f"{parts(facts).to_markdown()}\n\n{Table(columns, rows, 'Findings').to_markdown()}"
