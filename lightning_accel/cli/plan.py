"""`lightning-accel plan`: which layers repay a cut, and what it costs, before anything is changed.

What to look at is named as for every command, and its example may come from the command line:

    lightning-accel plan mymodels.nets:build
    lightning-accel plan mymodels.nets:resnet --example 32,3,224,224
    lightning-accel plan mymodels.lit:LitNet --checkpoint last.ckpt --example 32,3,224,224
    lightning-accel plan --config conf/config.yaml --allow models. --allow data. model=vit
    lightning-accel plan mymodels.nets:build --example 8,2048:int64:32000 --devices 8 --memory 80GiB

With `--devices` it tells instead which strategy fits and what each device holds; nothing is allocated then.
`build()` returns a network; or a network and an example of its arguments (a tensor, a tuple of arguments, a dict
of keywords); or a LightningModule and its data (DataLoaders or a LightningDataModule). With data, the loss is
measured and not only the output. All run the code that they name.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_accel.cli.devices import add_devices, run_devices, run_parallel
from lightning_accel.cli.subject import (
    NamedModel,
    add_example,
    add_subject,
    brings_data,
    checkpoint_subject,
    users_own,
    wrote,
)
from lightning_accel.cli.terminal import FINE, answer, complain, progress
from lightning_accel.errors import AccelError, explain
from lightning_accel.measure.table import finite

if TYPE_CHECKING:  # imports nothing of torch: `--help` is to answer at once
    import torch
    from lightning.pytorch import Trainer
    from torch import nn

    from lightning_accel.pages.drawing import Drawing
    from lightning_accel.pruning.sensitivity import Row
    from lightning_accel.surgery.call import Call


class PlannedModel(NamedTuple):
    """A network with the calls to try it on, and its loss if there is one."""

    model: nn.Module
    calls: Sequence[Call]
    loss: Callable[[nn.Module], float] | None = None


def add(commands: Any) -> None:
    """Add the command to an argparse sub-parser collection."""
    parser = commands.add_parser(
        "plan",
        help="show what each layer would give if it were pruned, or with --devices which strategy fits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_subject(parser)
    add_example(parser)
    parser.add_argument("--share", type=float, default=0.5, help="of each layer's units; 0.5")
    parser.add_argument("--importance", default="magnitude")
    parser.add_argument("--select", action="append", help="pattern of layers to look at")
    parser.add_argument("--device", default="cpu", help="where to measure the time; cpu")
    parser.add_argument("--budget-s", type=float, default=20.0, help="seconds of measuring; 20")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw a bar chart: .svg .png .pdf"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_devices(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan; 2 when it cannot be made."""
    from lightning_accel.pages.plots import check_ending, save
    from lightning_accel.pruning.sensitivity import as_table

    try:
        if args.parallel is not None:
            return run_parallel(args)
        if args.devices is not None:
            return run_devices(args)
        if args.picture:
            check_ending(args.picture)
        check_device(args.device)
        named, rows = _rows(args)
        measured = "output" if named.loss is None else "loss"
        if args.picture:
            save(picture(rows, share=args.share, measured=measured), args.picture)
    except (AccelError, ValueError, TypeError, ImportError, OSError) as error:
        return complain(args, error)
    table = as_table(rows, share=args.share, device=args.device, measured=measured)
    if args.json:
        plain = {
            "share": args.share,
            "device": args.device,
            "change_of": measured,
            "groups": [finite(row._asdict()) for row in rows],
        }
        answer(args, json.dumps(plain, indent=2))
    else:
        print(table.to_text())
    if args.picture:
        wrote(args.picture, args)
    return FINE


def _rows(args: argparse.Namespace) -> tuple[PlannedModel, list[Row]]:
    from lightning_accel.cli.in_fit import without_banner
    from lightning_accel.pruning.sensitivity import sensitivity
    from lightning_accel.surgery import Select

    with progress(args, "plan", args.budget_s) as say, without_banner():
        say("building")
        named = _named(args)
        say("cutting one layer at a time, on copies")
        rows = sensitivity(
            named.model,
            named.calls,
            share=args.share,
            importance=args.importance,
            select=Select.of(args.select),
            loss=named.loss,
            budget_s=args.budget_s,
        )
    return named, rows


def check_device(name: str) -> None:
    """Raise where there is no such device.

    Raises:
        ValueError: There is none.
    """
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # which of them depends on how torch was built
        found = f"{name}: {(str(error).splitlines() or [''])[0]}"
        raise ValueError(
            explain("there is no such device here", found, "see `lightning-accel env`")
        ) from error


def picture(rows: Sequence[Row], *, share: float, measured: str) -> Drawing:
    """Draw the rows: what each saves of the arithmetic and of the time, and what it changes."""
    from lightning_accel.pages.charts import bars

    panels = {
        "MACs saved, %": [100 * row.macs_saved for row in rows],
        "time saved, %": [100 * row.time_saved for row in rows],
        f"change of the {measured}": [row.change for row in rows],
    }
    title = f"{share:.0%} of each layer's units removed, one layer at a time"
    return bars([row.name for row in rows], panels, title=title)


def _named(args: argparse.Namespace) -> PlannedModel:
    import torch

    from lightning_accel.surgery.call import Call, as_call

    subject = checkpoint_subject(args)
    if args.example:
        subject = subject._replace(example=tuple(tensor(text) for text in args.example), data=None)
    example = subject.example
    if example is None and subject.data is None:
        example = getattr(subject.model, "example_input_array", None)
    if example is not None:
        device = torch.device(args.device)
        call = as_call(example)
        moved = torch.utils._pytree.tree_map(
            lambda v: v.to(device) if isinstance(v, torch.Tensor) else v, (call.args, call.kwargs)
        )
        return PlannedModel(subject.model.to(device), (Call("", *moved),))
    if not brings_data(subject.model, subject.data):
        raise ValueError(
            explain(
                "the network needs an example of its arguments",
                f"`{args.subject}` gave only the network",
                "pass --example 32,3,224,224, or return (network, example) or (LightningModule, data)",
            )
        )
    return _with_data(subject, args.device)


def _with_data(subject: NamedModel, device: str) -> PlannedModel:
    """Take the calls of a training step on one batch, and its loss."""
    from lightning.pytorch.utilities import CombinedLoader

    from lightning_accel.bridge.example import calls_of, run_step
    from lightning_accel.bridge.inert import inert_copy

    module: Any = subject.model
    trainer = subject.trainer or quiet_trainer()
    trainer.strategy.connect(module)
    module.trainer = trainer
    is_module = hasattr(subject.data, "train_dataloader")
    where = {"datamodule" if is_module else "train_dataloaders": subject.data}
    trainer._data_connector.attach_data(module, **where)  # its batch hooks
    for part in (subject.data, module) if is_module else (module,):
        part.prepare_data()
        part.setup("fit")
    loader = CombinedLoader(trainer.fit_loop._data_source.dataloader(), "max_size_cycle")
    batch = next(iter(loader), (None,))[0]
    if batch is None:
        raise AccelError(
            "there is no training batch to look at",
            type(subject.data or module).__name__,
            "pass data with batches, or --example 32,3,224,224",
        )
    # A step by hand asks for its optimizers.
    made = users_own("`configure_optimizers` fails", partial(_optimizers, trainer, module))
    trainer.strategy.optimizers = made
    model = module.to(device)
    calls = next(calls_of(trainer, model, [batch]))

    def loss(network: Any) -> float:
        with inert_copy(trainer, network) as copy:
            output = run_step(trainer, copy, batch, 0)
        return float((output["loss"] if isinstance(output, dict) else output).detach())

    # A step that optimizes by itself need not give its loss.
    return PlannedModel(model, calls, loss if module.automatic_optimization else None)


def _optimizers(trainer: Trainer, module: Any) -> list[Any]:
    from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers

    return _init_optimizers_and_lr_schedulers(module)[0]


def quiet_trainer() -> Trainer:
    """Return a Trainer that writes and shows nothing."""
    from lightning.pytorch import Trainer

    return Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def tensor(text: str) -> torch.Tensor:
    """Read SHAPE[:DTYPE[:BELOW]] as a tensor of random numbers.

    >>> import torch
    >>> tensor("2,3").shape, tensor("4,5:int64:10").max() < 10
    (torch.Size([2, 3]), tensor(True))
    """
    import torch

    sizes, _, rest = text.partition(":")
    name, _, below = rest.partition(":")
    dtype = getattr(torch, name or "float32", None)
    try:
        shape = [int(size) for size in sizes.split(",")]
        high = int(below) if below else 2
    except ValueError:
        shape, high = [], 0
    if not shape or min(shape) < 1 or high < 1 or not isinstance(dtype, torch.dtype):
        raise ValueError(
            explain(
                "an example is a shape, and perhaps a type",
                repr(text),
                "say 32,3,224,224 or 8,128:int64:1000",
            )
        )
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, high, shape, generator=generator).to(dtype)
