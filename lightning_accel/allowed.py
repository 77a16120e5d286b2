"""What a configuration may have built, and with which arguments.

Classes count by what they really are: Lightning's own parts, `torch.nn`, `torch.optim`, and of this package those
that are settings of a training (`targets.py`). All else is named in Python, never in yaml. And a class that may be
built may still be told to write over a file of the user's, or to send the user's key to somebody: places lie below
the run's folder, and servers are those that the user knows.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from configparser import ConfigParser
from configparser import Error as ConfigParserError
from functools import reduce
from pathlib import Path
from types import FunctionType
from typing import Any

from lightning_accel.errors import explain
from lightning_accel.places import leads_elsewhere
from lightning_accel.redact import names_secret
from lightning_accel.targets import is_ours

ALLOWED = (
    "lightning.pytorch.Trainer",
    "lightning.pytorch.trainer.trainer.Trainer",
    "lightning.pytorch.callbacks.",
    "lightning.pytorch.loggers.",
    "lightning.pytorch.plugins.",
    "lightning.pytorch.profilers.",
    "lightning.pytorch.strategies.",
    "torch.nn.",
    "torch.optim.",
)
"""Where classes may come from, beside ours; an entry that ends in a dot covers all below it."""

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_READ = ("teacher", "source", "checkpoint", "ckpt_path")
"""Arguments that name a file to read, and only as weights: it may lie anywhere."""
_JOINED = ("name", "version", "filename", "sub_dir", "prefix", "id", "run_id")
_FOLDERS = ("save_dir", "dir", "dirpath", "root_dir")
_PLACES = ("path", "to", "cache", "folder", "report", "default_root_dir", "log_dir", *_FOLDERS)
_SERVERS = ("base_url", "host", "api_host", "server", "endpoint", "url", "uri", "tracking_uri")
_WANDB_SETTINGS = (
    *("console", "disable_git", "init_timeout", "login_timeout", "max_end_of_run_history_metrics"),
    *("mode", "quiet", "silent", "symlink", "x_disable_meta", "x_disable_stats", "x_label"),
    *("x_primary", "x_stats_sampling_interval", "x_update_finish_state"),
)
_OUTPUT_KEY = re.compile(r"(?!.*data).*(?:out|log|save|run|root|scratch|dirpath|cache)")
_LOOPBACK = re.compile(r"(?:https?://)?(?:localhost|127\.0\.0\.1|\[::1\])(?::\d+)?(?:/[\w./-]*)?")


def check_nodes(tree: Any, allow: tuple[str, ...], outputs: Sequence[str | Path] = ()) -> None:
    """Check every node of a configuration before the first object is made.

    Args:
        tree: Plain containers, resolved.
        allow: More classes, places that end in a dot, and servers (`https://...`).
        outputs: More folders that may be written to.

    Raises:
        ValueError: A target is not allowed, a place lies elsewhere, or a server is not known.
    """
    _check_targets(tree, allow)
    roots = run_roots(outputs)
    typed = typed_words()
    for where, node in walk(tree):
        target = node.get("_target_", "")
        if _covered(target, allow) or not (is_ours(target) or target.startswith("lightning.")):
            continue  # code of the user's own, or a layer
        if "_args_" in node or (is_ours(target) and "_partial_" in node):
            raise ValueError(
                explain(
                    f"`{where}` is called in a way that is not allowed",
                    "`_args_`" if "_args_" in node else "`_partial_`",
                    "give each argument by its name",
                )
            )
        check_places(node, where, roots, (*typed, *map(str, outputs)))
        _check_servers(node, where, (*allow, *typed, *os.environ.values()))
        if target.endswith(".WandbLogger"):
            refuse_foreign_wandb()


def check_places(
    node: Mapping[str, Any], where: str, roots: Sequence[Path], typed: Sequence[str] = ()
) -> None:
    """Refuse arguments of a node that name a place outside of `roots`.

    Raises:
        ValueError: One does.
    """
    base = next((str(node[key]) for key in _FOLDERS if node.get(key)), "")
    for key, value in _texts(node):
        if key in (*_READ, *_SERVERS) or value in typed:
            continue
        joined, remote = key in _JOINED, "://" in value
        odd = leads_elsewhere(value) or remote
        if not (odd or joined or key in _PLACES):
            continue
        path = Path(base if joined else "", value.removeprefix("file:"))
        elsewhere = (
            not _below(path, roots) or (joined and odd) or (remote and not _known(value, typed))
        )
        if elsewhere or value.startswith("~") or "$" in value:
            raise ValueError(
                explain(
                    "a configuration may write below the run's folder only",
                    f"`{where}.{key}: {value}`",
                    "name a place below the present folder, say it on the command line, or allow it "
                    "in Python if you trust it: build(cfg, outputs=['/scratch/runs'])",
                )
            )


def walk(tree: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each mapping with its name, outer ones first."""
    if isinstance(tree, dict):
        yield where, tree
        for key, value in tree.items():
            yield from walk(value, f"{where}.{key}".lstrip("."))
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            yield from walk(value, f"{where}[{index}]")


def _texts(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the texts among a node's own arguments, in lists and plain mappings too."""
    if isinstance(node, dict):
        for name, value in node.items():
            if not (isinstance(value, dict) and "_target_" in value) and name != "_target_":
                yield from _texts(value, str(name))
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _texts(value, key)
    elif isinstance(node, (str, Path, bytes)):
        yield key, os.fsdecode(node)


def _check_targets(tree: Any, allow: tuple[str, ...]) -> None:
    targets = [(where, node["_target_"]) for where, node in walk(tree) if "_target_" in node]
    for where, target in targets:  # names first: nothing outside the list is imported
        named = isinstance(target, str) and _DOTTED.fullmatch(target) is not None
        if not named or not (_covered(target, allow) or _is_public(target)):
            raise _refusal(where, target, "a name outside the list")
    for where, target in targets:
        if target not in allow and not _is_what_it_says(target, allow):
            raise _refusal(where, target, "something that is not a class from there")


def _is_public(name: str) -> bool:
    private = any(part.startswith("_") for part in name.split("."))
    return is_ours(name) or (_covered(name, ALLOWED) and not private)


def _is_what_it_says(target: str, allow: tuple[str, ...]) -> bool:
    from hydra.utils import get_object

    try:
        found = get_object(target)
    except Exception as error:  # Hydra wraps whatever an import raises
        raise ValueError(
            explain(f"`{target}` cannot be imported", str(error), "fix the name")
        ) from error
    home, name = getattr(found, "__module__", None), getattr(found, "__qualname__", "")
    if not isinstance(found, (type, FunctionType)) or home not in sys.modules:
        return False
    try:
        real = reduce(getattr, name.split("."), sys.modules[home]) is found
    except AttributeError:
        return False
    full = f"{home}.{name}"
    by_default = isinstance(found, type) and (is_ours(full) or _covered(full, ALLOWED))
    return real and (by_default or _covered(full, allow))


def _covered(name: str, places: tuple[str, ...]) -> bool:
    return any(name.startswith(p) if p.endswith(".") else name == p for p in places)


def _refusal(where: str, target: Any, found: str) -> ValueError:
    return ValueError(
        explain(
            f"`{where}._target_: {target}` is not allowed to run",
            found,
            "allow it in Python if you trust it: build(cfg, allow=('package.',))",
        )
    )


def _check_servers(node: Mapping[str, Any], where: str, known: Sequence[str]) -> None:
    """Refuse a server that a logger would send the user's key to, and a key that is not the user's."""
    logs = ".loggers." in node["_target_"]
    settings = node.get("settings") if logs else None
    odd = [k for k in settings if k not in _WANDB_SETTINGS] if isinstance(settings, dict) else []
    for key, value in _texts(node):
        secret = logs and names_secret(key)
        if (key in _SERVERS or "proxy" in key or secret) and value not in known:
            odd += [] if _LOOPBACK.fullmatch(value) and not secret else [key]
    if odd:
        raise ValueError(
            explain(
                "a configuration does not choose where a logger sends your data and your key",
                f"`{odd[0]}` in `{where}`",
                "set it in the environment (WANDB_BASE_URL, say) or the logger's own settings file, or "
                "allow a server in Python: build(cfg, allow=('https://wandb.my.org',))",
            )
        )


def refuse_foreign_wandb() -> None:
    """Refuse a file `wandb/settings` of the present folder that names another server than the user's own settings.

    W&B reads it before anything else, and sends the user's key there; a project that was cloned may hold one.

    Raises:
        ValueError: There is one.
    """
    own = {os.environ.get("WANDB_BASE_URL")}
    for folder in (os.environ.get("WANDB_CONFIG_DIR"), "~/.config/wandb"):
        own.add(_settings(Path(folder or "", "settings").expanduser()).get("base_url"))
    root = Path(os.environ.get("WANDB_DIR") or ".")
    for path in (root / "wandb" / "settings", root / ".wandb" / "settings"):
        odd = [
            key
            for key, value in _settings(path).items()
            if (key == "base_url" and value not in own) or "proxy" in key or names_secret(key)
        ]
        if odd:
            raise ValueError(
                explain(
                    "a settings file of W&B in the present folder chooses where your key is sent",
                    f"`{odd[0]}` in {path}",
                    "remove the file, or say the same in your own settings: export WANDB_BASE_URL=...",
                )
            )


def _settings(path: Path) -> dict[str, str]:
    parser = ConfigParser(interpolation=None)
    try:
        parser.read(path)
        return dict(parser["default"])
    except (OSError, UnicodeDecodeError, ConfigParserError, KeyError):
        return {}


def run_roots(outputs: Sequence[str | Path]) -> tuple[Path, ...]:
    """Return the folders that outputs may lie in: the present one, Hydra's of this run, `outputs`, and typed ones."""
    hydra = _hydra()
    ran = [] if hydra is None else [hydra.runtime.cwd, hydra.runtime.output_dir]
    given = [outputs] if isinstance(outputs, (str, Path)) else outputs
    typed = [v for k, v in _overrides() if v.startswith("/") and _OUTPUT_KEY.match(k)]
    return tuple(Path(root).resolve() for root in (Path.cwd(), *ran, *given, *typed) if root)


def typed_words() -> tuple[str, ...]:
    """Return the values that were typed on the command line: they are the user's own."""
    return tuple(value for _, value in _overrides())


def typed_keys() -> tuple[str, ...]:
    """Return the keys that were typed on the command line, without their signs."""
    return tuple(key.lstrip("+") for key, _ in _overrides())


def _overrides() -> Iterator[tuple[str, str]]:
    hydra = _hydra()
    for word in [] if hydra is None else hydra.overrides.task:
        key, found, value = word.partition("=")
        if found:
            yield key, value.strip("'\"")


def _hydra() -> Any:
    if "hydra" not in sys.modules:
        return None
    from hydra.core.hydra_config import HydraConfig
    from omegaconf.errors import OmegaConfBaseException

    try:
        return HydraConfig.get() if HydraConfig.initialized() else None
    except OmegaConfBaseException:
        return None


def _known(url: str, places: Sequence[str]) -> bool:
    return any(url == place or url.startswith(place.rstrip("/") + "/") for place in places if place)


def _below(path: Path, roots: Sequence[Path]) -> bool:
    try:
        real = path.resolve()
    except (OSError, ValueError, RuntimeError):  # a NUL, a name too long, a circle of links
        return False
    return any(real.is_relative_to(root) for root in roots)
