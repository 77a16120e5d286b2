"""What a command is about: a network, named in the same ways for every command.

    lightning-accel COMMAND mymodels.nets:build
    lightning-accel COMMAND --config conf/config.yaml --allow models. --allow data. model=vit

The first calls `build()` of the module `mymodels.nets`, found from the present folder. It returns a network; or a
network and an example of its arguments (a tensor, a tuple of arguments, a dict of keywords); or a LightningModule
and its data (DataLoaders or a LightningDataModule). The second takes network, data and Trainer from a Hydra
configuration, with the overrides that one would give to the training script. Both run the code that they name.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_accel.cli.terminal import answer
from lightning_accel.errors import AccelError, explain

if TYPE_CHECKING:  # imports nothing of torch: `--help` is to answer at once
    from lightning.pytorch import Trainer
    from torch import nn


_IN_PYTHON = "allow it in Python if you trust it: build(cfg, allow=('package.',))"
_BY_ALLOW = "if you trust it, say `--allow {}.`, with what its name begins with"
_ALONE = {"devices": 1, "num_nodes": 1, "strategy": "auto"}


class NamedModel(NamedTuple):
    """A network with what is known beside it."""

    model: nn.Module
    example: Any = None
    data: Any = None
    trainer: Trainer | None = None


def add_subject(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a subject."""
    parser.add_argument("subject", nargs="?", help="MODULE:FUNCTION, or an override with --config")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, with --config")
    parser.add_argument("--config", type=Path, help="a Hydra configuration file")
    parser.add_argument(
        "--allow", action="append", default=[], help="where --config may build from: models."
    )


def add_example(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say what a subject is called with, and where its weights are."""
    parser.add_argument(
        "--example",
        action="append",
        metavar="SHAPE[:DTYPE[:BELOW]]",
        help="an argument of forward, such as 32,3,224,224 or 8,128:int64:1000; may be repeated",
    )
    parser.add_argument("--checkpoint", type=Path, help="weights of a LightningModule class")


def subject_of(args: argparse.Namespace, *, alone: bool = False) -> NamedModel:
    """Build what the arguments name.

    Args:
        args: Of `add_subject`.
        alone: Whether a Trainer of a configuration is given one device, whatever it asks for.

    Raises:
        ValueError: They name nothing, or nothing that can be found.
        TypeError: What they name makes no network.
    """
    if args.config is not None:
        words = [word for word in (args.subject, *args.overrides) if word is not None]
        return _from_config(args.config, words, args.allow, alone)
    if not args.subject or args.overrides:
        raise ValueError(
            explain(
                "say which network",
                " ".join([args.subject or "", *args.overrides]).strip() or "nothing",
                "pass MODULE:FUNCTION, or --config FILE and overrides",
            )
        )
    make = found_in_code(args.subject)
    return _of_made(args.subject, users_own(f"`{args.subject}` fails when it is called", make))


def checkpoint_subject(args: argparse.Namespace) -> NamedModel:
    """Build what the arguments name, with the weights of `--checkpoint` if it is given.

    Raises:
        ValueError: As `subject_of`; or a checkpoint is given for what is no class of a LightningModule.
    """
    if args.checkpoint is None:
        return subject_of(args)
    from lightning_accel.bridge.restore import load_from_checkpoint

    found: Any = found_in_code(args.subject) if args.subject and args.config is None else None
    if not isinstance(found, type) or args.overrides:
        raise ValueError(
            explain(
                "--checkpoint is of a LightningModule class",
                "--config" if args.config is not None else repr(args.subject),
                "say mymodels.lit:LitNet --checkpoint last.ckpt",
            )
        )
    return NamedModel(load_from_checkpoint(found, args.checkpoint))


def found_in_code(name: str) -> Callable[..., Any]:
    """Return what MODULE:FUNCTION names, found from the present folder."""
    module, _, attribute = name.partition(":")
    if "" not in sys.path and "." not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does
    found = None
    if module and attribute:
        what = f"`{module}` cannot be imported"
        found = getattr(users_own(what, lambda: importlib.import_module(module)), attribute, None)
    if not callable(found):
        raise ValueError(
            explain(
                "the network is named by MODULE:FUNCTION",
                repr(name),
                "say mymodels.nets:resnet, a function or class that needs no arguments",
            )
        )
    return found


def users_own(what: str, run: Callable[[], Any]) -> Any:
    """Run code of the user; what goes wrong in it is told in one line, with its place.

    Raises:
        ValueError: The code raised something.
        AccelError: This package did.
    """
    try:
        return run()
    except AccelError:
        raise
    except Exception as error:
        if isinstance(error, (ValueError, TypeError)) and " Do: " in str(error):
            raise  # one of this package's, which says it all
        said = (str(error).strip().splitlines() or [""])[0]
        frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is this function
        ours = [f for f in frames if "importlib" not in f.filename and f.filename != __file__]
        place = f" ({ours[-1].filename}, line {ours[-1].lineno})" if ours else ""
        raise ValueError(
            explain(
                what,
                f"{type(error).__name__}: {said}{place}",
                "make it run in Python first, without arguments and from this folder",
            )
        ) from error


def brings_data(model: nn.Module, data: Any) -> bool:
    """Whether this is a LightningModule that can be trained: with data beside it, or of its own."""
    from lightning.pytorch import LightningModule
    from lightning.pytorch.utilities.model_helpers import is_overridden

    if not isinstance(model, LightningModule):
        return False
    return data is not None or is_overridden("train_dataloader", model)


def train_loader(named: NamedModel) -> Any:
    """Return what the subject would be trained on."""
    data: Any = named.data if named.data is not None else named.model
    if hasattr(data, "train_dataloader"):
        data.prepare_data()
        data.setup("fit")
        data = data.train_dataloader()
    return data


def give(args: argparse.Namespace, said: Mapping[str, str]) -> None:
    """Print an answer, and write it to the files that were asked for, by their endings."""
    answer(args, said[".json"] if args.json else said[".txt"])
    for name in args.output:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(said[path.suffix] + "\n", encoding="utf-8")
        wrote(path, args)


def wrote(path: Path, args: argparse.Namespace) -> None:
    """Say where a file is; not on the standard output if that is to be one JSON object."""
    print(f"Wrote {path}", file=sys.stderr if args.json else sys.stdout)


def is_data(value: Any) -> bool:
    """Whether this is what a Trainer takes as training data, and no example of arguments.

    >>> from torch.utils.data import DataLoader
    >>> is_data(DataLoader([1])), is_data({"a": DataLoader([1])}), is_data({"input_ids": [[1, 2]]})
    (True, True, False)
    """
    from torch.utils.data import DataLoader

    if isinstance(value, DataLoader) or hasattr(value, "train_dataloader"):
        return True
    if isinstance(value, Mapping):
        return bool(value) and all(is_data(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return bool(value) and all(is_data(item) for item in value)
    # Another iterable; neither a text, nor an array, nor what moves to a device, as a batch does.
    batch = isinstance(value, str) or hasattr(value, "__array__") or hasattr(value, "to")
    return hasattr(value, "__iter__") and not batch


def _of_made(name: str, made: Any) -> NamedModel:
    from torch import nn

    model, beside = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise TypeError(
            explain(
                f"`{name}` makes no network",
                _said(made),
                "return a network, (network, example), or (LightningModule, data)",
            )
        )
    trains = hasattr(model, "training_step")
    return (
        NamedModel(model, data=beside) if trains and is_data(beside) else NamedModel(model, beside)
    )


def _said(made: Any) -> str:
    if isinstance(made, tuple):
        return f"({', '.join(type(part).__name__ for part in made)})"
    return type(made).__name__


def _from_config(path: Path, overrides: list[str], allow: list[str], alone: bool) -> NamedModel:
    from lightning_accel.recipe import build
    from lightning_accel.redact import unsaid

    config, secrets = composed(path, overrides)
    wanted = {key: v for key, v in config.items() if key not in ("callbacks", "logger")}
    trainer = wanted.get("trainer")
    if alone and isinstance(trainer, dict):
        wanted["trainer"] = {**trainer, **{k: v for k, v in _ALONE.items() if k in trainer}}
    with unsaid(secrets):
        try:
            what = "this configuration cannot be built"
            made = users_own(what, lambda: build(wanted, allow=tuple(allow)))
        except ValueError as error:
            named = re.search(r"_target_: (\w+)", str(error))
            allowed = _BY_ALLOW.format(named[1] if named else "models")
            raise ValueError(str(error).replace(_IN_PYTHON, allowed)) from error
    if made.data is None:
        raise ValueError(explain("the configuration has no data", str(path), "choose a `data`"))
    return NamedModel(made.model, data=made.data, trainer=made.trainer)


def composed(path: Path | None, overrides: Sequence[str]) -> tuple[dict[str, Any], set[str]]:
    """Compose a configuration as a script would; without a file, of what the overrides bring alone.

    Also returned is what must not be said of it.

    Raises:
        ValueError: There is no such file, or Hydra or OmegaConf refuse.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if path is not None and not path.is_file():
        raise ValueError(explain("there is no such configuration", str(path), "pass a yaml file"))
    try:
        return _composed(path, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if str(error) == "None" and error.__cause__ else error
        raise ValueError(
            explain(
                "this configuration cannot be composed",
                " ".join(str(cause).partition("Config search path")[0].split()),
                "correct the file or the overrides; `lightning-accel list` shows all presets",
            )
        ) from error


def _composed(path: Path | None, overrides: Sequence[str]) -> tuple[dict[str, Any], set[str]]:
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf, open_dict

    from lightning_accel.provenance import withheld

    folder = Path.cwd() if path is None else path.resolve().parent
    with initialize_config_dir(version_base="1.3", config_dir=str(folder)):
        name = None if path is None else path.stem
        config = compose(name, list(overrides), return_hydra_config=True)
    known = HydraConfig.instance()
    before = known.cfg
    with open_dict(config):
        config.hydra.runtime.output_dir = config.hydra.runtime.cwd = str(Path.cwd())
        known.set_config(config)
        try:
            own = OmegaConf.masked_copy(config, [str(k) for k in config if k != "hydra"])
            plain = OmegaConf.to_container(own, resolve=True)
            secrets = withheld(own).secrets
        finally:
            known.cfg = before
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if key != "hydra"}, secrets
