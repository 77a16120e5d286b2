"""`lightning-accel checkpoint`: a checkpoint in shards as one file, and back, for a run to go on from.

All goes along: weights, states of optimizers, loops, schedulers and callbacks. Where nothing of the user's is named no
code of the user's runs.

    lightning-accel checkpoint convert logs/epoch=3.ckpt whole.ckpt
    lightning-accel checkpoint convert whole.ckpt shards.ckpt --module mymodels.lit:LitNet
    lightning-accel checkpoint convert whole.ckpt shards.ckpt --module mymodels.lit:LitNet --json

A folder becomes a file, a file a folder. A file numbers what its optimizers keep, and a folder names it: from a file
`--module` names a LightningModule class, or a function that makes one, whose `configure_optimizers` tells the names.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_accel.cli.subject import found_in_code, users_own
from lightning_accel.cli.terminal import FINE, answer, complain, progress
from lightning_accel.errors import AccelError, explain

if TYPE_CHECKING:
    from lightning_accel.parallel.conversion import Converted


def add(commands: Any) -> None:
    """Add the command to an argparse sub-parser collection."""
    parser = commands.add_parser(
        "checkpoint",
        help="turn a checkpoint in shards into one file, and back",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "what", choices=["convert"], help="a folder into a file, a file into a folder"
    )
    parser.add_argument("source", type=Path, help="a checkpoint: a file, or a folder of shards")
    parser.add_argument("to", type=Path, help="where the other kind goes")
    parser.add_argument(
        "--module", metavar="MODULE:CLASS", help="of a file: who made its optimizers"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert, and say what was written; 2 when nothing was."""
    from lightning_accel.parallel.conversion import convert

    try:
        with progress(args, "checkpoint") as say:
            names = None if args.module is None else _names(args.module, args.source)
            say("reading and writing")
            done = convert(args.source, args.to, names=names, overwrite=args.overwrite)
    except (AccelError, ValueError, TypeError, OSError) as error:
        return complain(args, error)
    answer(
        args, json.dumps({**done._asdict(), "path": str(done.path)}) if args.json else _said(done)
    )
    return FINE


def _said(done: Converted) -> str:
    counted = f"{done.num_weights} tensors of the module, {done.num_optimizers} optimizers"
    return f"Wrote {done.path}, a {done.kind}: {counted}, {done.num_bytes:,} bytes"


def _names(subject: str, source: Path) -> list[list[str]]:
    """Return the parameters of each optimizer that a module makes, by name; pruned as the file is."""
    from lightning.pytorch import LightningModule
    from lightning.pytorch.core.optimizer import _configure_optimizers

    from lightning_accel.bridge.restore import load_from_checkpoint

    found: Any = found_in_code(subject)
    if isinstance(found, type) and source.is_file():
        module: Any = load_from_checkpoint(found, source)  # with its hyper-parameters
    else:
        module = users_own(f"`{subject}` fails when it is called", found)
    if not isinstance(module, LightningModule):
        do = "name a LightningModule, or a function that makes one"
        raise TypeError(explain(f"`{subject}` makes no LightningModule", type(module).__name__, do))
    configure: Any = module.configure_optimizers
    what = f"`configure_optimizers` of `{subject}` fails outside of a fit"
    optimizers = users_own(what, lambda: _configure_optimizers(configure())[0])
    names = {id(p): name for name, p in module.named_parameters()}
    return [
        [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        for optimizer in optimizers
    ]
