"""`lightning-accel tune`: what makes a training step faster on this machine, without training.

What to tune is named as for every command; a training needs a LightningModule and its data:

    lightning-accel tune mymodels.lit:build --output tuned.yaml --output tuned.svg
    lightning-accel tune --config conf/config.yaml --allow models. --allow data. model=gpt --output tuned.yaml

`build()` returns a LightningModule and its data (DataLoaders or a LightningDataModule), or a LightningModule that
has its own `train_dataloader`. Both run the code that they name. The preset is used by
`python train.py +accel=./tuned.yaml`.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from lightning_accel.cli.subject import add_subject, subject_of, users_own, wrote
from lightning_accel.cli.terminal import FINE, answer, complain, progress
from lightning_accel.errors import AccelError, explain
from lightning_accel.tuning.tiers import TIERS

if TYPE_CHECKING:  # `lightning-accel env` must tell of a broken Lightning, and so import none
    from lightning_accel.tuning import TuneReport


def add(commands: Any) -> None:
    """Add the command to an argparse sub-parser collection."""
    parser = commands.add_parser(
        "tune",
        help="find out what makes a training step faster here",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_subject(parser)
    parser.add_argument("--numerics", choices=TIERS, default="amp", help="what may change; amp")
    parser.add_argument("--budget-s", type=float, default=60.0, help="seconds of searching; 60")
    parser.add_argument("--steps", type=int, help="batches that will be trained")
    parser.add_argument(
        "--technique", action="append", help="try only this, such as precision; may be repeated"
    )
    parser.add_argument(
        "--batch-size", action="append", type=int, default=[], help="measure this size as well"
    )
    parser.add_argument("--accelerator", help="where to train, with MODULE:FUNCTION; auto")
    parser.add_argument(
        "--no-cache", action="store_true", help="search even if the answer is known"
    )
    parser.add_argument(
        "--output",
        action="append",
        default=[],
        metavar="FILE",
        help=".yaml .json .svg .png .pdf .md .txt",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report and write the files; 2 when it cannot be made."""
    try:
        report = _report(args)
    except (AccelError, ValueError, TypeError, ImportError, OSError) as error:
        return complain(args, error)
    answer(args, report.to_json() if args.json else report.to_text())
    return FINE


def _report(args: argparse.Namespace) -> TuneReport:
    from lightning_accel.tuning import AutoTune

    arguments: dict[str, Any] = {
        "numerics": args.numerics,
        "budget_s": args.budget_s,
        "techniques": args.technique,
        "batch_sizes": args.batch_size,
        "cache": not args.no_cache,
    }
    files = AutoTune(**arguments, report=args.output).files  # checked before anything runs
    report = _tuned(args, arguments)
    for file in files:
        wrote(report.save(file), args)
    return report


def _tuned(args: argparse.Namespace, arguments: dict[str, Any]) -> TuneReport:
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from lightning_accel.cli.in_fit import require_training, without_banner
    from lightning_accel.tuning import AutoTune, tune
    from lightning_accel.tuning.api import tune_in

    def run() -> TuneReport:
        if subject.trainer is None:
            where = {} if args.accelerator is None else {"accelerator": args.accelerator}
            return tune(module, subject.data, steps=args.steps, **arguments, **where)
        tuning = AutoTune(**arguments, budget_share=float("inf"))
        tuning.steps = args.steps
        return tune_in(subject.trainer, module, subject.data, tuning)

    with progress(args, "tune", args.budget_s) as say, without_banner():
        subject = subject_of(args)
        require_training(subject, args.subject, "only a training can be tuned")
        module: Any = subject.model
        say("measuring copies side by side")
        try:
            report: TuneReport = users_own("this training fails", run)
        except ValueError as error:
            if not isinstance(error.__cause__, MisconfigurationException):
                raise
            raise ValueError(
                explain(
                    "Lightning refuses this training",
                    str(error.__cause__),
                    "pass another --accelerator, or correct the module and its data",
                )
            ) from error
        return report
