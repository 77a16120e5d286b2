"""`lightning-accel tune`: what makes a training step faster on this machine, without training.

What to tune is named in one of two ways:

    lightning-accel tune mymodels.lit:build --output tuned.yaml --output tuned.svg
    lightning-accel tune --config conf/config.yaml --allow models. --allow data. model=gpt --output tuned.yaml

The first calls `build()` of the module `mymodels.lit`, found from the present folder, which returns a
LightningModule and its data: a DataLoader or a LightningDataModule. The second takes module, data and Trainer
from a Hydra configuration, with the overrides that one would give to the training script. Both run the code
that they name. The preset is used by `python train.py +accel=./tuned.yaml`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_accel.cli.plan import composed, found_in_code
from lightning_accel.errors import AccelError, explain
from lightning_accel.tuning.numerics import TIERS
from lightning_accel.tuning.settings import TECHNIQUES

if TYPE_CHECKING:  # `lightning-accel env` must tell of a broken Lightning, and so import none
    from lightning.pytorch import LightningModule

    from lightning_accel.tuning import TuneReport


def add(commands: Any) -> None:
    """Add the command to an argparse sub-parser collection."""
    parser = commands.add_parser(
        "tune",
        help="find out what makes a training step faster here",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("module", nargs="?", help="MODULE:FUNCTION, or an override with --config")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, with --config")
    parser.add_argument("--config", type=Path, help="a Hydra configuration file")
    parser.add_argument(
        "--allow", action="append", default=[], help="where --config may build from: models."
    )
    parser.add_argument("--numerics", choices=TIERS, default="amp", help="what may change; amp")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of searching; 60")
    parser.add_argument("--steps", type=int, help="batches that will be trained")
    parser.add_argument(
        "--technique", action="append", choices=TECHNIQUES, help="try only this; may be repeated"
    )
    parser.add_argument(
        "--batch-size", action="append", type=int, default=[], help="measure this size as well"
    )
    parser.add_argument("--accelerator", help="where to train, with MODULE:FUNCTION; auto")
    parser.add_argument(
        "--no-cache", action="store_true", help="search even if the answer is known"
    )
    parser.add_argument(
        "--output", action="append", default=[], metavar="FILE", help=".yaml .json .svg .md .txt"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report and write the files; 2 when it cannot be made."""
    try:
        report = _report(args)
    except (AccelError, ValueError, TypeError, ImportError, OSError) as error:
        print(f"lightning-accel tune: {error}", file=sys.stderr)
        return 2
    print(report.to_json() if args.json else report.to_text())
    return 0


def _report(args: argparse.Namespace) -> TuneReport:
    from lightning_accel.tuning import AutoTune, tune

    arguments: dict[str, Any] = {
        "numerics": args.numerics,
        "budget_s": args.budget,
        "techniques": args.technique,
        "batch_sizes": args.batch_size,
        "cache": not args.no_cache,
    }
    files = AutoTune(**arguments, report=args.output).files  # checked before anything runs
    if args.config is not None:
        report = _from_config(args, arguments)
    else:
        module, data = _named(args)
        where = {} if args.accelerator is None else {"accelerator": args.accelerator}
        report = tune(module, data, steps=args.steps, **arguments, **where)
    for file in files:
        report.save(file)
    return report


def _named(args: argparse.Namespace) -> tuple[LightningModule, Any]:
    if not args.module or args.overrides:
        raise ValueError(
            explain(
                "say which module",
                " ".join([args.module or "", *args.overrides]).strip() or "nothing",
                "pass MODULE:FUNCTION, or --config FILE and overrides",
            )
        )
    from lightning.pytorch import LightningModule

    made = found_in_code(args.module)()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], LightningModule)):
        raise TypeError(
            explain(
                f"`{args.module}` gives a LightningModule and its data",
                type(made).__name__,
                "return (module, data), with data a DataLoader or a LightningDataModule",
            )
        )
    return made


def _from_config(args: argparse.Namespace, arguments: dict[str, Any]) -> TuneReport:
    from lightning_accel.recipe import build
    from lightning_accel.tuning import AutoTune
    from lightning_accel.tuning.outside import tune_in

    words = [word for word in (args.module, *args.overrides) if word is not None]
    made = build(composed(args.config, words), allow=tuple(args.allow))
    if made.data is None:
        raise ValueError(
            explain("the configuration has no data", str(args.config), "choose a `data`")
        )
    tuning = AutoTune(**arguments, budget_share=float("inf"))
    tuning.steps = args.steps
    return tune_in(made.trainer, made.model, made.data, tuning)
