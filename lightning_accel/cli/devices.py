"""`lightning-accel plan --devices`: which strategy fits, what each device holds, before anything is allocated.

    lightning-accel plan mymodels.llama:build --example 1,4096:int64:32000 --devices 256 --hardware h100
    lightning-accel plan mymodels.lit:build --devices 8 --memory 24GiB --precision bf16-mixed --all

`build()` is called on fake tensors: a network of any size is planned in seconds. Of a LightningModule with data its own step and
optimizer are planned; of a network alone a loss that is the mean of its outputs, and AdamW.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_accel.cli.terminal import answer
from lightning_accel.errors import explain
from lightning_accel.measure.table import Table
from lightning_accel.parallel.accelerators import ACCELERATORS, GIB, USED, Accelerator, seconds

if TYPE_CHECKING:
    from lightning_accel.parallel.planning import Estimate, Option, Workload

MIXED = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}
TRUE = {"bf16-true": "bfloat16", "16-true": "float16", "64-true": "float64"}
"""Formats of computation by Lightning's words, as torch names them: under autocast, and of the weights too."""

_PARTS = ("weights", "gradients", "optimizer", "activations", "gathered")


def add_devices(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of planning for devices."""
    group = parser.add_argument_group("devices", "plan a strategy, in place of a prune")
    group.add_argument("--devices", type=int, metavar="N", help="how many there are")
    group.add_argument(
        "--parallel", type=int, metavar="N", help="show how layers are split over N processes"
    )
    group.add_argument("--memory", type=size, metavar="80GiB", help="of each")
    group.add_argument("--hardware", choices=sorted(ACCELERATORS), help="memory and speeds of each")
    group.add_argument(
        "--precision",
        default="32-true",
        choices=("32-true", *MIXED, *TRUE),
        help="as in the Trainer",
    )
    group.add_argument(
        "--all", action="store_true", help="look at all strategies, not at the first that fits only"
    )


def size(text: str) -> int:
    """Read a number of bytes from the command line.

    >>> size("80GiB") == 80 * 2**30, size("1.5 GB")
    (True, 1500000000)
    """
    from lightning_accel.parallel.choice import size as read

    try:
        return read(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run_parallel(args: argparse.Namespace) -> int:
    """Print how the layers of a network are split over processes; a fit proves it before it trains.

    Raises:
        ValueError: Too few processes.
        NoEffect: No layer can be split.
    """
    if args.parallel < 2:
        raise ValueError(
            explain("layers are split over processes", str(args.parallel), "pass 2 or more")
        )
    from lightning_accel.cli.workload import workload
    from lightning_accel.parallel.planning import planned_split

    plan = planned_split(workload(args), args.parallel)
    if args.json:
        groups = [group._asdict() for group in plan.groups]
        answer(
            args,
            json.dumps({"groups": groups, "whole": plan.whole, "shares": plan.shares}, indent=2),
        )
        return 0
    cells: list[list[Any]] = [[g.name, g.units, g.kind, ", ".join(g.readers)] for g in plan.groups]
    title = f"{args.parallel} processes, {max(plan.shares):.0%} of the parameters each"
    notes = [f"whole: {name}: {why}" for name, why in plan.whole.items()]
    print(Table(["split", "units", "of", "summed after"], cells, title, notes).to_text(120))
    return 0


class Row(NamedTuple):
    """A strategy, what it needs, and about how long a step takes."""

    option: Option
    estimate: Estimate | None
    seconds: float | None
    why: str


def run_devices(args: argparse.Namespace) -> int:
    """Print which strategies fit; 1 when none does.

    Raises:
        ValueError: Something is missing, or out of range.
    """
    if args.devices < 1:
        raise ValueError(explain("devices are counted", str(args.devices), "pass 1 or more"))
    hardware = ACCELERATORS.get(args.hardware or "")
    memory = args.memory or (hardware.memory if hardware else None)
    if memory is None:
        raise ValueError(
            explain(
                "a plan needs the memory of a device",
                "nothing",
                "pass --memory 80GiB, or --hardware h100",
            )
        )
    from lightning_accel.cli.workload import workload
    from lightning_accel.parallel.choice import options

    work = workload(args)
    rows, chosen = [], None
    for option in options(args.devices):
        row = _row(work, option, memory, hardware, every=args.all)
        rows.append(row)
        if chosen is None and row.estimate is not None and not row.why:
            chosen = row
            if not args.all:
                break
    _print(rows, chosen, memory, args)
    return 0 if chosen is not None else 1


def _row(
    work: Workload, option: Option, memory: int, hardware: Accelerator | None, *, every: bool
) -> Row:
    from lightning_accel.parallel.choice import NODE, tried

    one = tried(work, option, memory, every=every)
    found = one.estimate
    if found is None:
        return Row(option, None, None, one.why)
    takes = None
    if hardware is not None and found.peak is not None:
        takes = seconds(
            hardware, operations=found.flops, beside=found.sent.get("beside", 0), between=found.sent.get("between", 0),
            is_near=option.devices <= NODE,
        )  # fmt: skip
    return Row(option, found, takes, one.why)


def _print(rows: list[Row], chosen: Row | None, memory: int, args: argparse.Namespace) -> None:
    if args.json:
        found = [
            {
                **row.option._asdict(), "seconds": row.seconds, "why_not": row.why,
                **({k: v for k, v in row.estimate._asdict().items() if k != "option"} if row.estimate else {}),
            }
            for row in rows
        ]  # fmt: skip
        answer(
            args,
            json.dumps(
                {"memory": memory, "chosen": chosen and chosen.option.name, "options": found},
                indent=2,
            ),
        )
        return
    columns = ["strategy", "peak", *_PARTS, "sent", *(["seconds"] if args.hardware else [])]
    sizes = [row.estimate.states for row in rows if row.estimate]
    name, unit = ("GiB", GIB) if max(sizes, default=0) > GIB else ("MiB", 2**20)
    cells = [_cells(row, columns, unit) for row in rows]
    notes = [f"{_name(row.option)}: {row.why}" for row in rows if row.why]
    notes.append(
        f"{name} of one device; a tenth is left for drivers, workspaces and fragments, which are not planned."
    )
    if args.hardware:
        notes.append(
            f"Seconds assume {USED:.0%} of the arithmetic of {args.hardware} and its links."
        )
    title = f"{args.devices} devices of {memory / GIB:.0f} GiB: {_answer(chosen)}"
    print(Table(columns, cells, title, notes).to_text(120))


def _name(option: Option) -> str:
    return option.name + (f" x{option.tensor}" if option.tensor > 1 else "")


def _answer(chosen: Row | None) -> str:
    """Return what to pass to the Trainer."""
    if chosen is None:
        return "nothing fits"
    option = chosen.option
    answer = "one device"
    if option.strategy != "single":
        answer = f'strategy="accel_{option.strategy}"'
    if option.strategy == "fsdp_tensor" and option.tensor != 2:
        answer = f"TensorParallelStrategy(tensor_parallel_size={option.tensor})"
    return answer + (" with ActivationCheckpointing()" if option.checkpointing else "")


def _cells(row: Row, columns: list[str], unit: int) -> list[Any]:
    found = row.estimate
    known: dict[str, Any] = {"strategy": _name(row.option)}
    if found is not None and found.peak is not None:
        values = {"peak": found.peak, **found.parts, "sent": sum(found.sent.values())}
        known |= {name: round(value / unit, 2) for name, value in values.items()}
        known["seconds"] = row.seconds and round(row.seconds, 3)
    elif found is not None:
        known["peak"] = "too much"
    return [known.get(column) for column in columns]
