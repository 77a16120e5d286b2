"""`lightning-accel export`: a network as files that run without its code, proved and measured on this machine.

What to export is named as for every command, and its example may come from the command line:

    lightning-accel export mymodels.nets:resnet --example 32,3,224,224 --to bundle
    lightning-accel export mymodels.lit:LitNet --checkpoint last.ckpt --example 32,3,224,224 --to bundle
    lightning-accel export mymodels.nets:bert --example 8,128:int64:30522 --to bundle --formats onnx
    lightning-accel export mymodels.lit:build --to bundle --quantize int8

`build()` returns a network; or a network and an example of its arguments (a tensor, a tuple of arguments, a dict of
keywords); or a LightningModule and its data, of which the first batch is the example. All run the code that they name.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_accel.cli.subject import (
    NamedModel,
    add_example,
    add_subject,
    brings_data,
    checkpoint_subject,
    train_loader,
)
from lightning_accel.cli.terminal import FINE, answer, complain, progress
from lightning_accel.errors import AccelError, explain


def add(commands: Any) -> None:
    """Add the command to an argparse sub-parser collection."""
    parser = commands.add_parser(
        "export",
        help="write a network as files that run without its code, proved and measured here",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_subject(parser)
    add_example(parser)
    parser.add_argument("--to", required=True, help="a folder that is not there yet")
    parser.add_argument(
        "--formats", nargs="+", default=["auto"], help="of export, aoti and onnx; auto: all"
    )
    parser.add_argument("--batch", type=int, help="the largest batch that will be passed; any")
    parser.add_argument("--static", action="store_true", help="only the sizes of the example")
    parser.add_argument("--min-speedup", type=float, default=1.0, help="of the best format; 1")
    parser.add_argument("--budget-s", type=float, default=3.0, help="seconds of measuring; 3")
    parser.add_argument(
        "--quantize",
        metavar="WORD",
        help="int8, int4 and less; calibrated on the data of the subject",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a bundle that is there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the candidates; 2 when nothing was written."""
    from lightning_accel.export import deploy

    try:
        with progress(args, "export") as say, _told():
            named = _named(args)
            say("building, proving and measuring each format")
            bundle = deploy(
                named.model,
                named.example,
                to=args.to,
                formats=args.formats,
                batch=args.batch,
                dynamic=not args.static,
                min_speedup=args.min_speedup,
                budget_s=args.budget_s,
                quantize=args.quantize,
                calibration=None if args.quantize is None else _batches(named),
                overwrite=args.overwrite,
            )
    except (AccelError, ValueError, TypeError, ImportError, OSError) as error:
        return complain(args, error)
    if args.json:
        answer(args, json.dumps({"path": str(bundle.path), **bundle.manifest}, indent=2))
    else:
        print(bundle.table)
    print(f"Wrote {bundle.path}", file=sys.stderr if args.json else sys.stdout)
    return FINE


def _batches(named: NamedModel) -> Any:
    """Return batches to calibrate on.

    Raises:
        ValueError: The subject has no data.
    """
    if not brings_data(named.model, named.data):
        raise ValueError(
            explain(
                "--quantize calibrates on training data",
                "a network without data",
                "return (LightningModule, data)",
            )
        )
    return train_loader(named)


@contextmanager
def _told() -> Iterator[None]:
    """Say warnings in a line each, without the line of code that they come from."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(message, file=sys.stderr)
        yield


def _named(args: argparse.Namespace) -> NamedModel:
    from lightning_accel.cli.plan import tensor
    from lightning_accel.quantization.calibration import calls_from

    named = checkpoint_subject(args)
    if args.example:
        return named._replace(example=tuple(tensor(text) for text in args.example))
    example = named.example
    if example is None:
        example = getattr(named.model, "example_input_array", None)
    if example is None and brings_data(named.model, named.data):
        example = calls_from(named.model, train_loader(named), 1)[0][0]
    if example is None:
        raise ValueError(
            explain(
                "the network needs an example of its arguments",
                f"`{args.subject}` gave only the network",
                "pass --example 32,3,224,224, return (network, example), or set `example_input_array`",
            )
        )
    return named._replace(example=example)
