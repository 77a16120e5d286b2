"""`lightning-accel show`: what presets and overrides add to a training, in the order in which it acts, and to this model.

    lightning-accel show +accel=amp_prune
    lightning-accel show +accel=[amp,prune] callbacks.pruning.ratio=0.3 mymodels.lit:build
    lightning-accel show --config conf/config.yaml --allow models. --allow data. model=vit +accel=amp_compile_prune

Without a model the composed settings are shown. With `MODULE:FUNCTION`, or with `--config` and `--allow`, a fit of a copy is
begun and ended before its first batch, so that each technique says what it would do to this very model: layers, parameters
before and after, or why it would refuse. Nothing is trained. Both run the code that they name.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from lightning_accel.cli.adds import Added, added, is_of_accel
from lightning_accel.cli.subject import NamedModel, add_example, subject_of
from lightning_accel.cli.terminal import FINDING, FINE, answer, complain, progress
from lightning_accel.errors import AccelError, explain
from lightning_accel.measure.table import Table, finite

if TYPE_CHECKING:  # `lightning-accel env` must tell of a broken Lightning, and so import none
    from lightning_accel.cli.effects import Effect


def add(commands: Any) -> None:
    """Add the command to an argparse sub-parser collection."""
    parser = commands.add_parser(
        "show",
        help="show what a preset adds, in order, and what it would do to your model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "words", nargs="*", help="Hydra overrides such as +accel=amp, and perhaps MODULE:FUNCTION"
    )
    parser.add_argument("--config", type=Path, help="a Hydra configuration file")
    parser.add_argument(
        "--allow", action="append", default=[], help="where --config may build from: models."
    )
    add_example(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print it; 1 when a technique refuses or would do nothing, 2 when it cannot be composed."""
    try:
        name, overrides = _sorted(args)
        found = added(args.config, overrides)
        effects = None if found.refused else _effects(args, name, found)
    except (AccelError, ValueError, TypeError, ImportError, OSError) as error:
        return complain(args, error)
    if args.json:
        plain = found.to_dict()
        plain["effects"] = None if effects is None else [effect._asdict() for effect in effects]
        answer(args, json.dumps(finite(plain), indent=2, default=str))
    else:
        print(text(found, effects))
    is_refused = found.refused or any(not effect.acts for effect in effects or ())
    return FINDING if is_refused else FINE


def _sorted(args: argparse.Namespace) -> tuple[str | None, list[str]]:
    """Tell the name of a model from overrides, which have a `=` or begin with `~`."""
    names = [w for w in args.words if "=" not in w and not w.startswith("~")]
    overrides = [word for word in args.words if word not in names]
    if len(names) > 1 or (names and (":" not in names[0] or args.config is not None)):
        what = "a word is neither an override nor one model"
        do = "say +accel=NAME (see `lightning-accel list`), and MODULE:FUNCTION or --config for a model"
        raise ValueError(explain(what, " ".join(names), do))
    if args.config is None and not any(map(is_of_accel, overrides)):
        raise ValueError(
            explain(
                "say which preset to show",
                " ".join(overrides) or "nothing",
                "say +accel=amp_prune; `lightning-accel list` shows all",
            )
        )
    return (names[0] if names else None), overrides


def _effects(args: argparse.Namespace, name: str | None, found: Added) -> list[Effect] | None:
    """Return what would be done to the model, `None` where there is none."""
    if name is None and not (args.config and args.allow):
        return None
    from lightning_accel.cli.effects import effects_on, strategy_effect

    def build() -> NamedModel:
        if name is None:
            asked = argparse.Namespace(
                subject=None, overrides=found.without, config=args.config, allow=args.allow
            )
            return subject_of(asked, alone=True)
        made = subject_of(argparse.Namespace(subject=name, overrides=[], config=None, allow=[]))
        if not args.example:
            return made
        from lightning_accel.cli.plan import tensor

        return made._replace(example=tuple(tensor(text) for text in args.example), data=None)

    with progress(args, "show") as say:
        say("beginning a fit of a copy")
        effects = effects_on(build, found.callbacks, name or str(args.config))
    if "strategy" in found.trainer:
        effects.append(strategy_effect(found.trainer["strategy"]))
    return effects


def text(found: Added, effects: list[Effect] | None) -> str:
    """Say it for a terminal."""
    blocks = []
    if found.trainer:
        rows: list[list[Any]] = [[f"trainer.{k}", _short(v)] for k, v in found.trainer.items()]
        blocks.append(Table(["setting", "value"], rows, "Arguments of the Trainer").to_text(120))
    if found.callbacks:
        lines = ["Callbacks, in the order in which they act"]
        for number, row in enumerate(found.rows(), 1):
            lines.append(f"{number}. callbacks.{row.name}: {row.kind}, {row.acts}")
            lines += wrap(row.does, 110, initial_indent="   ", subsequent_indent="   ")
            lines += wrap(row.settings, 110, initial_indent="   ", subsequent_indent="     ")
        blocks.append("\n".join(lines))
    if not blocks:
        blocks.append("Nothing of lightning_accel is in this configuration.")
    if found.refused:
        refused = (f"- callbacks.{name}: {why}" for name, why in found.refused.items())
        blocks.append("\n".join(["Settings that are refused", *refused]))
    elif effects is None:
        blocks.append("What it does to a model is said with MODULE:FUNCTION, or --config and --allow.")  # fmt: skip
    elif effects:
        lines = ["On this model, tried on a copy that was not trained"]
        for effect in effects:
            lines.append(f"- {effect.technique}: {effect.said}")
            lines += [f"    {line}" for line in effect.details]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _short(value: Any) -> str:
    shown = json.dumps(value, default=str)
    return shown if len(shown) < 80 else f"{shown[:77]}..."
