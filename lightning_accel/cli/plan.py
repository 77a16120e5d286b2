"""`lightning-accel plan`: which layers repay a cut, and what it costs, before anything is changed.

What to look at is named in one of three ways:

    lightning-accel plan mymodels.nets:resnet --example 32,3,224,224
    lightning-accel plan mymodels.lit:LitNet --checkpoint last.ckpt --example 32,3,224,224
    lightning-accel plan --config conf/config.yaml --allow models. --allow data. model=vit

The first calls `resnet()` of the module `mymodels.nets`, found from the present folder; it returns the
network, or the network and an example (a tensor, a tuple of arguments, a dict of keywords). The second
loads a LightningModule. The third takes network and data from a Hydra configuration, with the overrides
that one would give to the training script, and so measures the loss and not only the output. All run the
code that they name.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_accel.errors import AccelError, explain
from lightning_accel.measure.bars import bars_svg
from lightning_accel.measure.table import finite
from lightning_accel.pruning.sensitivity import Row, as_table, sensitivity
from lightning_accel.surgery import Select
from lightning_accel.surgery.call import Call, as_call


class Named(NamedTuple):
    """A network with the calls to try it on, and its loss if there is one."""

    model: nn.Module
    calls: Sequence[Call]
    loss: Callable[[nn.Module], float] | None = None


def add(commands: Any) -> None:
    """Add the command to an argparse sub-parser collection."""
    parser = commands.add_parser(
        "plan",
        help="show what each layer would give and cost if it were pruned",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", help="MODULE:FUNCTION, or an override with --config")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, with --config")
    parser.add_argument(
        "--example",
        action="append",
        metavar="SHAPE[:DTYPE[:BELOW]]",
        help="an argument of forward, such as 32,3,224,224 or 8,128:int64:1000; may be repeated",
    )
    parser.add_argument("--checkpoint", type=Path, help="weights of a LightningModule class")
    parser.add_argument("--config", type=Path, help="a Hydra configuration file")
    parser.add_argument(
        "--allow", action="append", default=[], help="where --config may build from: models."
    )
    parser.add_argument("--share", type=float, default=0.5, help="of each layer's units; 0.5")
    parser.add_argument("--importance", default="magnitude")
    parser.add_argument("--select", action="append", help="pattern of layers to look at")
    parser.add_argument("--device", default="cpu", help="where to measure the time; cpu")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of measuring; 20")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw a bar chart")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan; 2 when it cannot be made."""
    try:
        named = _named(args)
        rows = sensitivity(
            named.model,
            named.calls,
            share=args.share,
            importance=args.importance,
            select=Select.of(args.select),
            loss=named.loss,
            budget_s=args.budget,
        )
    except (AccelError, ValueError, TypeError, ImportError, OSError) as error:
        print(f"lightning-accel plan: {error}", file=sys.stderr)
        return 2
    measured = "output" if named.loss is None else "loss"
    table = as_table(rows, share=args.share, device=args.device, measured=measured)
    if args.picture:
        args.picture.write_text(picture(rows, share=args.share, measured=measured))
    if args.json:
        plain = {
            "share": args.share,
            "device": args.device,
            "change_of": measured,
            "groups": [finite(row._asdict()) for row in rows],
        }
        print(json.dumps(plain, indent=2))
    else:
        print(table.to_text())
    return 0


def picture(rows: Sequence[Row], *, share: float, measured: str) -> str:
    """Draw the rows as SVG: what each saves of the arithmetic and of the time, and what it changes."""
    panels = {
        "MACs saved, %": [100 * row.macs_saved for row in rows],
        "time saved, %": [100 * row.time_saved for row in rows],
        f"change of the {measured}": [row.change for row in rows],
    }
    title = f"{share:.0%} of each layer's units removed, one layer at a time"
    return bars_svg([row.name for row in rows], panels, title=title)


def _named(args: argparse.Namespace) -> Named:
    if args.config is not None:
        words = [word for word in (args.model, *args.overrides) if word is not None]
        return _from_config(args.config, words, args.allow, args.device)
    if not args.model or args.overrides:
        raise ValueError(
            explain(
                "say which network",
                " ".join([args.model or "", *args.overrides]).strip() or "nothing",
                "pass MODULE:FUNCTION, or --config FILE and overrides",
            )
        )
    made, example = _from_code(args.model, args.checkpoint)
    if args.example:
        example = tuple(tensor(text) for text in args.example)
    if example is None:
        example = getattr(made, "example_input_array", None)
    if example is None:
        raise ValueError(
            explain(
                "the network needs an example of its arguments",
                f"`{args.model}` returned only the network",
                "pass --example 32,3,224,224, or return (network, example)",
            )
        )
    device = torch.device(args.device)
    call = as_call(example)
    moved = torch.utils._pytree.tree_map(
        lambda v: v.to(device) if isinstance(v, torch.Tensor) else v, (call.args, call.kwargs)
    )
    return Named(made.to(device), (Call("", *moved),))


def tensor(text: str) -> torch.Tensor:
    """Read SHAPE[:DTYPE[:BELOW]] as a tensor of random numbers.

    >>> tensor("2,3").shape, tensor("4,5:int64:10").max() < 10
    (torch.Size([2, 3]), tensor(True))
    """
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


def found_in_code(name: str) -> Callable[..., Any]:
    """Return what MODULE:FUNCTION names, found from the present folder."""
    module, _, attribute = name.partition(":")
    if "" not in sys.path and "." not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does
    found = getattr(importlib.import_module(module), attribute, None) if attribute else None
    if not callable(found):
        raise ValueError(
            explain(
                "the network is named by MODULE:FUNCTION",
                repr(name),
                "say mymodels.nets:resnet, a function or class that needs no arguments",
            )
        )
    return found


def _from_code(name: str, checkpoint: Path | None) -> tuple[nn.Module, Any]:
    found: Any = found_in_code(name)
    if checkpoint is not None:
        from lightning_accel.bridge.restore import load_from_checkpoint

        return load_from_checkpoint(found, checkpoint), None
    made = found()
    made, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(made, nn.Module):
        raise TypeError(explain(f"`{name}` makes no network", type(made).__name__))
    return made, example


def _from_config(path: Path, overrides: list[str], allow: list[str], device: str) -> Named:
    from lightning_accel.bridge.example import calls_of, run_step
    from lightning_accel.bridge.inert import inert_copy
    from lightning_accel.recipe import build

    config = composed(path, overrides)
    made = build(config, allow=tuple(allow))
    if made.data is None:
        raise ValueError(explain("the configuration has no data", str(path), "choose a `data`"))
    made.data.prepare_data()
    made.data.setup("fit")
    made.trainer.strategy.connect(made.model)
    made.trainer._data_connector.attach_data(made.model, datamodule=made.data)  # its batch hooks
    batch = next(iter(made.data.train_dataloader()))
    model = made.model.to(device)
    calls = next(calls_of(made.trainer, model, [batch]))

    def loss(network: Any) -> float:
        with inert_copy(made.trainer, network) as copy:
            output = run_step(made.trainer, copy, batch, 0)
        return float((output["loss"] if isinstance(output, dict) else output).detach())

    return Named(model, calls, loss)


def composed(path: Path, overrides: list[str]) -> Any:
    """Compose a configuration as a script would, but without callbacks and loggers: nothing is trained."""
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf, open_dict

    if not path.is_file():
        raise ValueError(explain("there is no such configuration", str(path), "pass a yaml file"))
    with initialize_config_dir(version_base="1.3", config_dir=str(path.resolve().parent)):
        config = compose(path.stem, overrides, return_hydra_config=True)
    known = HydraConfig.instance()
    before = known.cfg
    with open_dict(config):
        config.hydra.runtime.output_dir = config.hydra.runtime.cwd = str(Path.cwd())
        known.set_config(config)
        try:
            plain = OmegaConf.to_container(
                OmegaConf.masked_copy(config, [str(k) for k in config if k != "hydra"]),
                resolve=True,
            )
        finally:
            known.cfg = before
    assert isinstance(plain, dict)
    return {key: v for key, v in plain.items() if key not in ("hydra", "callbacks", "logger")}
