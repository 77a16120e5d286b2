"""Configuration to Trainer: everything checked before anything is built, edits in the right order.

A configuration names classes to build (`_target_`), and so is a program. Only classes on a list may run:
Lightning's own parts, this package, `torch.nn` and `torch.optim`. A name counts by what it really is, so
`lightning.pytorch.callbacks.model_checkpoint.os.system` is `os.system`. The whole tree is checked before
the first object is made, and a name outside the list is not even imported. Who wants more says so in
Python, never in yaml: `build(cfg, allow=("my_models.",))`.

Hydra sets a plain string when a group is not on its search path (`+accel=amp_prune` gives
`cfg.accel == "amp_prune"` and nothing else); that is an error here.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from torch.utils._pytree import tree_leaves

from lightning_accel.allowed import ALLOWED, check_nodes, check_places, run_roots, typed_words, walk
from lightning_accel.arguments import instance
from lightning_accel.bridge.objective import Objective
from lightning_accel.bridge.technique import place_of
from lightning_accel.devices.choose import accelerator_of, precision_on_xla
from lightning_accel.entry import VARIABLE
from lightning_accel.errors import AccelError, explain
from lightning_accel.job import begin_logging, refuse_nan, seed_of
from lightning_accel.places import written_whole
from lightning_accel.provenance import withheld
from lightning_accel.redact import below_secrets, redacted, unsaid
from lightning_accel.surgery.preserve import preserve_rng
from lightning_accel.targets import OURS
from lightning_accel.unread import check_arguments, check_keys, check_teacher


class Run(NamedTuple):
    """What a configuration describes. `config` is plain, resolved and without secrets."""

    trainer: Trainer
    model: LightningModule
    data: LightningDataModule | None
    ckpt_path: str | None
    config: dict[str, Any]

    def objective(self) -> float | list[float] | None:
        """Return what the `Objective` among the callbacks asks for, after the fit; without one `None`.

        Raises:
            AccelError: Nothing logged it, or it is NaN and the sweeper cannot take that.
        """
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        asked = next((c for c in callbacks if isinstance(c, Objective)), None)
        found = asked.value(self.trainer) if asked is not None else None
        refuse_nan(found)
        return found


def build(cfg: Any, *, allow: Sequence[str] = (), outputs: Sequence[str | Path] = ()) -> Run:
    """Build Trainer, model and data from a Hydra configuration or from plain dicts.

    Keys: `trainer`, `model`, and optionally `data`, `callbacks`, `logger` (each a dict of nodes by name)
    and `ckpt_path`. `trainer.plugins` may be a dict of nodes too, so that presets merge. Callbacks with a
    `stage` come after the others, in the order of their stages.

    Args:
        cfg: The configuration; interpolations are resolved here.
        allow: More places to build from: `"models."` covers the classes and functions that are defined
            below `models`, an entry without the dot that one object, `"https://..."` a logger's server.
        outputs: More folders that files may be written to, beside the present one and Hydra's of this run.

    Raises:
        ValueError: A group was not found, nothing reads a key, a node has no `_target_`, a target is not allowed,
            or an argument names a place or a server that is not the user's.
        Unsupported: The accelerator cannot work on this machine.

    >>> logging = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    >>> run = build(
    ...     {
    ...         "trainer": {"_target_": "lightning.pytorch.Trainer", "max_epochs": 3, **logging},
    ...         "model": {"_target_": "lightning.pytorch.demos.boring_classes.BoringModel"},
    ...     },
    ...     allow=("lightning.pytorch.demos.",),
    ... )
    >>> run.trainer.max_epochs, type(run.model).__name__
    (3, 'BoringModel')
    """
    with preserve_rng():
        found = withheld(cfg)
    with unsaid(found.secrets):
        tree = _plain(cfg)
        config = redacted(found.of(tree), known=found.secrets)
        check_keys(tree, _unresolved(cfg))
        return _built(tree, config, found.secrets, allow, outputs)


def _built(
    tree: dict[str, Any],
    config: dict[str, Any],
    secrets: set[str],
    allow: Sequence[str],
    outputs: Sequence[str | Path],
) -> Run:
    _refuse_remote(tree)
    for key in ("trainer", "model", *(["data"] if tree.get("data") else [])):
        _check_node(tree.get(key), key)
    if os.environ.get(VARIABLE):
        what = f"{VARIABLE} is for scripts without a configuration, and does nothing here"
        rank_zero_warn(explain(what, repr(os.environ[VARIABLE]), "say `+accel=...`"))
    places = (allow,) if isinstance(allow, str) else tuple(allow)
    check_nodes(tree, places, outputs)
    _refuse_partials(tree)
    check_arguments(tree)
    _check_teachers(tree)
    with _whitelist(places):
        trainer = _trainer(tree)
        _require(trainer, Trainer, "trainer", tree["trainer"]["_target_"])
        model = _make(tree["model"])
        _require(model, LightningModule, "model", tree["model"]["_target_"])
        data = _make(tree["data"]) if tree.get("data") else None
    for logger in trainer.loggers:
        # Lightning itself logs the hyper-parameters of model and data when a fit starts.
        logger.log_hyperparams = partial(_log_redacted, logger.log_hyperparams, secrets)  # type: ignore[method-assign]
        begin_logging(logger, config)
    return Run(trainer, model, data, tree.get("ckpt_path"), config)


def _log_redacted(log: Any, secrets: set[str], params: Any, *args: Any, **kwargs: Any) -> Any:
    plain = vars(params) if isinstance(params, Namespace) else params
    return log(
        redacted(plain, known=secrets) if isinstance(plain, dict) else plain, *args, **kwargs
    )


def build_callbacks(
    nodes: Mapping[str, Any], *, allow: Sequence[str] = (), outputs: Sequence[str | Path] = ()
) -> list[Callback]:
    """Build callbacks from nodes by name, checked as `build` checks, in the order of their stages.

    >>> build_callbacks({"report": {"_target_": "lightning_accel.StepMeter"}})  # doctest: +ELLIPSIS
    [<lightning_accel.measure.callbacks.step_meter.StepMeter object at ...>]
    """
    tree = {"callbacks": dict(nodes)}
    with unsaid(below_secrets(tree)), _whitelist(tuple(allow)):
        check_nodes(tree, tuple(allow), outputs)
        _refuse_partials(tree)
        check_arguments(tree)
        _check_teachers(tree)
        return _in_order(_all(tree["callbacks"], "callbacks", Callback))


def prepare_teacher(
    cfg: Any, *, allow: Sequence[str] = (), outputs: Sequence[str | Path] = ()
) -> Path | None:
    """Train the teacher that a configuration describes, once; later runs find its checkpoint.

    `cfg.teacher` holds `model`, and optionally `trainer` (arguments of its Trainer, on one device), `data`
    (what differs from `cfg.data`), `seed` and `folder`. The file is named after all of that, and
    `cfg.teacher.ckpt_path` is set to it, for callbacks to interpolate; where that is set already,
    nothing is done. A training that was killed leaves no file. Random states stay as they were.

    Args:
        cfg: The configuration, before `build` gets it.
        allow: As for `build`.
        outputs: As for `build`; `cfg.teacher.folder` lies in one of them.

    Returns:
        The checkpoint; `None` when no callback names it.

    Raises:
        ValueError: As `build` does.
        AccelError: Several processes started at once, and none has trained it yet.

    >>> prepare_teacher({"callbacks": {}}) is None
    True
    """
    with preserve_rng():
        found = withheld(cfg)
    with unsaid(found.secrets):
        return _prepared(cfg, allow, outputs)


def _prepared(cfg: Any, allow: Sequence[str], outputs: Sequence[str | Path]) -> Path | None:
    tree = _plain(cfg)
    teacher = tree.get("teacher")
    if not isinstance(teacher, dict):
        return None
    check_teacher(teacher, _unresolved(cfg))
    if teacher.get("ckpt_path") is not None:
        return Path(teacher["ckpt_path"])
    _check_node(teacher.get("model"), "teacher.model")
    recipe = {
        "model": teacher["model"],
        "data": {**(tree.get("data") or {}), **(teacher.get("data") or {})},
        "trainer": teacher.get("trainer") or {},
        "seed": seed_of(teacher.get("seed", 0), "teacher.seed"),
    }
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()
    kind = teacher["model"]["_target_"].rpartition(".")[2].lower()
    folder = teacher.get("folder", "outputs/teachers")
    check_places({"folder": folder}, "teacher", run_roots(outputs), typed_words())
    path = Path(folder).absolute() / f"{kind}-{digest[:16]}.ckpt"
    cfg["teacher"]["ckpt_path"] = str(path)
    if str(path) not in tree_leaves(_plain(cfg).get("callbacks")):
        cfg["teacher"]["ckpt_path"] = None
        return None
    if not path.exists():
        _train_teacher(recipe, path, tree["trainer"].get("accelerator", "auto"), allow)
    return path


def _train_teacher(
    recipe: dict[str, Any], path: Path, accelerator: str, allow: Sequence[str]
) -> None:
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1
    if several or rank_zero_only.rank:  # type: ignore[attr-defined]
        raise AccelError(
            "the teacher is not trained yet, and several processes would train it",
            f"no {path}",
            "run the same command on one device first, and stop it when the student begins",
        )
    rank_zero_info(f"Training the teacher first, once: {path}")
    trainer = {
        "_target_": "lightning.pytorch.Trainer",
        "accelerator": accelerator,
        "devices": 1,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        **recipe["trainer"],
    }
    with preserve_rng():
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(recipe["seed"])
        run = build({**recipe, "trainer": trainer}, allow=allow)
        run.trainer.fit(run.model, run.data)
        with written_whole(path) as part:
            run.trainer.save_checkpoint(part, weights_only=True)
    found = [f"{k} {float(v):.4g}" for k, v in run.trainer.callback_metrics.items() if "val" in k]
    rank_zero_info(f"The teacher is ready: {', '.join(found)}")


def _unresolved(cfg: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(cfg, resolve=False) if OmegaConf.is_config(cfg) else cfg


def _plain(cfg: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    node = cfg if OmegaConf.is_config(cfg) else OmegaConf.create(dict(cfg))
    tree: Any = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    for _, inner in walk(tree):
        inner.pop("_convert_", None)  # all that we build gets plain containers
    return tree


def _refuse_remote(tree: Mapping[str, Any]) -> None:
    url = str(tree.get("ckpt_path") or "")
    if "://" in url:
        raise ValueError(
            explain(
                "a checkpoint from a URL is loaded as a program", url, "download and pass a file"
            )
        )


def _check_node(node: Any, where: str) -> None:
    if not isinstance(node, dict) or "_target_" not in node:
        raise ValueError(
            explain(
                f"`{where}` does not say what to build",
                f"no `_target_` in {redacted(node)!r}",
                f"choose a group that sets it, or drop the overrides of `{where}`",
            )
        )


def _refuse_partials(tree: Mapping[str, Any]) -> None:
    named = {key: tree[key] for key in ("trainer", "model", "data") if tree.get(key)}
    for group in ("callbacks", "logger"):
        named |= {f"{group}.{k}": node for k, node in _by_name(tree.get(group), group).items()}
    for where, node in named.items():
        if node.get("_partial_"):
            raise ValueError(
                explain(
                    f"`{where}` would not be built, only prepared to be",
                    f"`_partial_: {node['_partial_']}`, which gives a function in its place",
                    "leave `_partial_` out; it is for arguments that take a function, such as `optimizer`",
                )
            )


def _check_teachers(tree: Mapping[str, Any]) -> None:
    for where, node in walk(tree.get("callbacks"), "callbacks"):
        distils = str(node.get("_target_", "")).endswith(".Distillation")
        if distils and node.get("teacher", "") is None:
            raise ValueError(
                explain(
                    f"`{where}` has no teacher",
                    "`teacher: null`, and no `teacher.ckpt_path` in this configuration",
                    f"say {where}.teacher=path.ckpt, the checkpoint of a trained network; or call "
                    "`prepare_teacher(cfg)` first, with a group `teacher` that describes one",
                )
            )


def _trainer(tree: Mapping[str, Any]) -> Trainer:
    node = dict(tree["trainer"])
    if "callbacks" in node:
        raise ValueError(
            explain(
                "`trainer.callbacks` is a list, which presets cannot add to", "", "use `callbacks`"
            )
        )
    if "accelerator" in node:
        node["accelerator"] = accelerator_of(node["accelerator"])
    loggers = _all(tree.get("logger"), "logger", Logger)
    arguments: dict[str, Any] = {
        "callbacks": _in_order(_all(tree.get("callbacks"), "callbacks", Callback))
    }
    if isinstance(node.get("plugins"), dict):
        arguments["plugins"] = _all(node.pop("plugins"), "trainer.plugins")
    if (precision := precision_on_xla(node)) is not None:
        del node["precision"]
        made = [_make(plugin) for plugin in node.pop("plugins", None) or ()]
        arguments["plugins"] = [*arguments.get("plugins", made), precision]
    if loggers or "logger" not in node:
        arguments["logger"] = loggers or False
    return _make(node, partial=True)(**arguments)


def _all(nodes: Any, where: str, kind: type = object) -> list[Any]:
    given = _by_name(nodes, where)
    found = {name: _make(node) for name, node in given.items()}
    for name, thing in found.items():
        _require(thing, kind, f"{where}.{name}", given[name]["_target_"])
    return list(found.values())


def _require(thing: Any, kind: type, where: str, target: str) -> None:
    if not isinstance(thing, kind):
        raise ValueError(
            explain(
                f"`{where}` gave no {kind.__name__}",
                f"a {type(thing).__name__} from `{target}`",
                f"name a class or a function that makes one of `{kind.__module__}`",
            )
        )


def _by_name(nodes: Any, where: str) -> dict[str, Any]:
    """Return the nodes of a group that are to be built, checked: a dict, whose names lead to nodes."""
    instance(where, nodes, dict, "a dict of nodes by name", "name each node", none=True)
    if nodes and "_target_" in nodes:
        raise ValueError(
            explain(
                f"`{where}` is a dict of nodes by name",
                f"one node, {nodes['_target_']}, without a name",
                f"write it one level deeper: `{where}: {{mine: {{_target_: ...}}}}`",
            )
        )
    given = {name: node for name, node in (nodes or {}).items() if node is not None}
    for name, node in given.items():
        _check_node(node, f"{where}.{name}")
    return given


def _in_order(callbacks: list[Callback]) -> list[Callback]:
    return sorted(callbacks, key=lambda callback: place_of(callback) or -1)


def _make(node: dict[str, Any], *, partial: bool = False) -> Any:
    from hydra.utils import instantiate

    return instantiate({**node, **({"_partial_": True} if partial else {})}, _convert_="all")


def _whitelist(places: tuple[str, ...]) -> AbstractContextManager[Any]:
    """Tell Hydra 1.4 what has been allowed; 1.3 has no such list."""
    try:
        from hydra.utils import execution_whitelist  # type: ignore[attr-defined]
    except ImportError:
        return nullcontext()
    given = [f"{p}*" if p.endswith(".") else p for p in ALLOWED + places]
    return execution_whitelist([*given, *OURS])
