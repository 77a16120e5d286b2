"""`lightning-accel bench`: any network under every technique that applies to it here, beside itself as it is.

    lightning-accel bench mymodels.nets:resnet --example 32,3,224,224
    lightning-accel bench mymodels.nets:bert --example 8,128:int64:30522 --only inference --output bench.md

`build()` returns a network; a network and an example of its arguments; or a LightningModule with `example_input_array`.
Inference and a training step (the mean of the outputs as loss, AdamW) are measured on copies in turns, with the 95 % interval of
each gain, and how far outputs or gradients are from plain ones. Slower is told as slower, and what does not apply with its
reason. Nothing is changed. It runs the code that it names.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_accel.arguments import positive
from lightning_accel.cli.subject import (
    add_example,
    add_subject,
    checkpoint_subject,
    give,
    users_own,
)
from lightning_accel.cli.terminal import FINE, complain, progress
from lightning_accel.errors import AccelError, explain
from lightning_accel.measure.table import Table, finite

if TYPE_CHECKING:
    import torch

    from lightning_accel.cli.race_ways import Raced
    from lightning_accel.surgery.call import Call

_ENDINGS = (".json", ".md", ".txt")


def add(commands: Any) -> None:
    """Add the command to an argparse sub-parser collection."""
    parser = commands.add_parser(
        "bench",
        help="measure any network here under every technique that applies to it",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_subject(parser)
    add_example(parser)
    parser.add_argument("--only", choices=("inference", "training"), help="measure one of the two")
    parser.add_argument("--device", help="where to measure; the accelerator or the CPU")
    parser.add_argument(
        "--budget-s", type=float, default=60.0, help="about how long to measure; 60"
    )
    parser.add_argument(
        "--output", action="append", default=[], metavar="FILE", help=".json .md .txt"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the tables; 2 when the network cannot be measured."""
    try:
        raced, device = _raced(args)
    except (AccelError, ValueError, TypeError, ImportError, OSError) as error:
        return complain(args, error)
    shown = list(tables(raced))
    said = {
        ".json": json.dumps(finite(to_dict(raced, device)), indent=2),
        ".txt": "\n\n".join(table.to_text(120) for table in shown),
        ".md": "\n\n".join(table.to_markdown() for table in shown),
    }
    give(args, said)
    return FINE


def _raced(args: argparse.Namespace) -> tuple[Raced, torch.device]:
    positive("--budget-s", args.budget_s, unit="seconds")
    for name in args.output:
        if Path(name).suffix not in _ENDINGS:
            raise ValueError(explain("unknown form", name, f"end the name in {' '.join(_ENDINGS)}"))
    import torch

    from lightning_accel.cli.plan import check_device
    from lightning_accel.cli.race_ways import race_ways
    from lightning_accel.cli.ways import INFERENCE, TRAINING
    from lightning_accel.hardware import describe

    check_device(args.device or "cpu")
    device = torch.device(args.device or describe().kind)

    modes = (args.only,) if args.only else (INFERENCE, TRAINING)
    with progress(args, "bench", args.budget_s) as say:
        say("building")
        network, calls = _subject(args, device)
        what = "the network fails on the example"
        found = users_own(
            what, lambda: race_ways(network, calls, modes=modes, budget_s=args.budget_s, say=say)
        )
    return found, device


def _subject(args: argparse.Namespace, device: torch.device) -> tuple[torch.nn.Module, list[Call]]:
    import torch

    from lightning_accel.cli.plan import tensor
    from lightning_accel.surgery.call import Call, as_call

    subject = checkpoint_subject(args)
    example = tuple(tensor(text) for text in args.example) if args.example else subject.example
    if example is None:
        example = getattr(subject.model, "example_input_array", None)
    if example is None:
        raise ValueError(
            explain(
                "the network needs an example of its arguments",
                f"`{args.subject}` gave only the network",
                "pass --example 32,3,224,224, or return (network, example); of a training "
                "`lightning-accel doctor` and `tune` tell more",
            )
        )
    call = as_call(example)
    args_there, kwargs_there = torch.utils._pytree.tree_map(
        lambda v: v.to(device) if isinstance(v, torch.Tensor) else v, (call.args, call.kwargs)
    )
    return subject.model.to(device), [Call("", args_there, kwargs_there)]


def tables(raced: Raced) -> list[Table]:
    """Return a table for each mode, gains first; below it what was not measured, and why."""
    found = []
    for mode in dict.fromkeys(row.mode for row in raced.rows):
        rows = [row for row in raced.rows if row.mode == mode and row.ms is not None]
        rows.sort(key=lambda row: -(row.gain.ratio if row.gain else 1.0))
        cells: list[list[Any]] = [
            [
                *(row.way, row.ms, None if row.gain is None else str(row.gain), row.difference),
                *(row.first_s, row.verdict.partition(":")[0] or None),
            ]
            for row in rows
        ]
        notes = [f"plain against plain: {raced.still[mode]}; a gain lies beyond that"]
        notes += [note for note in raced.notes if note.startswith(mode)]
        notes += [
            f"{row.way}: {row.verdict}"
            for row in raced.rows
            if row.mode == mode and row.ms is None and row.verdict
        ]
        title, off = "Inference", "off by"
        if mode != "inference":
            title, off = "Training step: the mean of the outputs, AdamW", "gradients off by"
        columns = ["", "ms", "gain", off, "first call s", ""]
        found.append(Table(columns, cells, title, notes))
    left_out = [note for note in raced.notes if ": left out: " in note]
    return [*found, *([Table([""], [[note] for note in left_out])] if left_out else [])]


def to_dict(raced: Raced, device: torch.device) -> dict[str, Any]:
    """Return all of it as plain values."""
    import torch

    from lightning_accel.hardware import describe

    about = describe(device).to_dict()
    return {
        "device": {"kind": about["kind"], "name": about["name"]},
        "torch": str(torch.__version__),
        "rows": [{**row._asdict(), "gain": row.gain and list(row.gain)} for row in raced.rows],
        "plain_against_plain": {mode: list(ratio) for mode, ratio in raced.still.items()},
        "notes": raced.notes,
    }
