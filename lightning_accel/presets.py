"""What a preset may say: settings of the groups `accel`, `callbacks` and `trainer`, and nothing that runs code.

A preset is a file that people pass on: `+accel=./tuned.yaml`. Hydra would let it set anything, so that a key
`hydra.callbacks` in it runs code before the app's first line, `hydra.run.dir` moves all that the app writes,
and `${oc.env:TOKEN}` puts a token into names of files and logs. Hence a list of what is meant, and all else is
refused before anything is merged or resolved. Plain Python, no import of torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import Any

from lightning_accel.errors import explain
from lightning_accel.places import leads_elsewhere
from lightning_accel.redact import names_secret
from lightning_accel.targets import is_ours

GROUPS = ("accel", "callbacks", "trainer")
_TRAINER = {
    "accelerator", "strategy", "devices", "num_nodes", "precision", "fast_dev_run", "max_epochs",
    "min_epochs", "max_steps", "min_steps", "max_time", "limit_train_batches", "limit_val_batches",
    "limit_test_batches", "limit_predict_batches", "overfit_batches", "val_check_interval",
    "check_val_every_n_epoch", "num_sanity_val_steps", "log_every_n_steps", "enable_checkpointing",
    "enable_progress_bar", "enable_model_summary", "accumulate_grad_batches", "gradient_clip_val",
    "gradient_clip_algorithm", "deterministic", "benchmark", "inference_mode",
    "use_distributed_sampler", "detect_anomaly", "barebones", "plugins", "sync_batchnorm",
    "reload_dataloaders_every_n_epochs",
}  # fmt: skip
"""What of the Trainer decides how it computes; not what it writes, and where."""
_WHOLE: dict[str, tuple[Any, ...]] = {
    "fast_dev_run": (False,),
    "overfit_batches": (0, 0.0),
    "barebones": (False,),
    "enable_checkpointing": (True,),
    **{f"limit_{name}_batches": (None, 1.0) for name in ("train", "val", "test", "predict")},
}
"""What would leave a part of the training, or nothing to keep: such a fit looks very fast, and never is what was meant."""
_INPUTS = ("teacher", "source", "checkpoint")
"""Keys of files that are read, and only as weights; they may lie anywhere."""
_KEY = r"[A-Za-z_]\w*(?:\.\w+)*"
_READS = re.compile(
    rf"\$\{{(?:(?P<key>\.*{_KEY})|oc\.select:(?P<select>{_KEY})(?:, *-?\w*(?:\.\d+)?)?"
    r"|hydra:runtime\.(?:output_dir|cwd))\}(?=/|$)"
)
"""What may stand at the beginning of a text, as all of it or as a folder."""
_PACKAGE = re.compile(rf"(?:(?:{'|'.join(GROUPS)})(?:\.\w+)*)?")
_DEFAULT = re.compile(r"(?:(?:override|optional) )*(/accel/)?[\w./\\:-]+")
_MOST_NODES = 10_000


def check_preset(tree: Any, package: str, defaults: Any = ()) -> None:
    """Refuse a preset that says more than a preset may.

    Args:
        tree: What it says, unresolved.
        package: Where it lands: "" is the top, "callbacks.pruning" that node.
        defaults: Its list of defaults.

    Raises:
        ValueError: It does.

    >>> check_preset({"trainer": {"max_epochs": 3}}, "")
    >>> check_preset({"hydra": {"run": {"dir": "/"}}}, "")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: a preset sets accel, callbacks and trainer only. Found: `hydra`. Do: ...
    """
    _check_defaults(defaults)
    if _PACKAGE.fullmatch(package) is None:
        raise _foreign(package)
    for part in reversed([part for part in package.split(".") if part]):
        tree = {part: tree}
    for key in tree:
        if key not in GROUPS:
            raise _foreign(key)
        if not isinstance(tree[key], dict):
            raise _refusal(
                f"`{key}` of a preset is a mapping", repr(tree[key])[:80], "name settings"
            )
    _check_trainer(tree.get("trainer"))
    for where, key, value in _entries(tree):
        if key == "_target_":
            _check_target(where, value)
        elif re.fullmatch(r"_\w+_", key) and key != "_convert_":
            raise _refusal(f"`{where}` changes how a class is called", f"`{key}`", "name arguments")
        elif isinstance(value, str):
            _check_text(where, key, value)
        elif not isinstance(value, (dict, list, int, float, NoneType)):
            kind = type(value).__name__  # of a tag such as `!!binary`, or a path that is no text
            raise _refusal(f"`{where}` is no plain value", kind, "write text, a number or a list")


def speaks_of_us(tree: Any, defaults: Any) -> bool:
    """Tell whether a file of an app's own group `accel` is a preset of this package's kind.

    >>> speaks_of_us({"model": {"width": 3}}, []), speaks_of_us({"accel": {"mine": True}}, [])
    (False, True)
    """
    if not isinstance(tree, dict):
        return False
    ours = any(key == "_target_" and _is_of_us(value) for _, key, value in _entries(tree))
    return ours or bool({"accel", "callbacks", "hydra"} & set(tree)) or bool(defaults)


def settle(merged: Any, presets: Any, app: Any) -> list[str]:
    """Let presets and an app's own configuration stand beside each other where both name one callback.

    What Hydra merges last wins, key by key, so that of two classes under one name a third thing would come, and the
    app's settings of a callback would be lost to the defaults of a preset. Here a preset's callback that meets
    another class takes a name of its own, and of the same class the app's values stay. Settings of `trainer` are
    replaced, for that is what a preset is chosen for.

    Args:
        merged: All of it, as Hydra merges; changed in place.
        presets: The presets alone.
        app: All the rest alone.

    Returns:
        What is to be told, a line for each.
    """
    from omegaconf import DictConfig, open_dict

    told = []
    nodes: list[Any] = [node_of(config, "callbacks") for config in (merged, presets, app)]
    if all(isinstance(node, DictConfig) for node in nodes):
        both, mine, theirs = nodes
        with open_dict(both):
            for name in map(str, mine):
                told += _settled(both, name, node_of(mine, name), node_of(theirs, name))
    asked, had, now = (_plain(node_of(config, "trainer")) for config in (presets, app, merged))
    changed = [
        f"trainer.{key}={now[key]!r}" + (f" (not {had[key]!r})" if key in had else "")
        for key in asked
        if asked[key] == now.get(key) != had.get(key)
        and not (key == "strategy" and had.get(key, "auto") == "auto")  # nobody had chosen one
    ]
    return [*told, *([f"A preset sets {', '.join(changed)}."] if changed else [])]


def _settled(both: Any, name: str, brought: Any, own: Any) -> list[str]:
    """Settle one name, which a preset brings and an app may have."""
    from omegaconf import DictConfig

    if not all(isinstance(n, DictConfig) and not n._is_none() for n in (brought, own)):
        return []
    classes = [_plain(node).get("_target_") for node in (own, brought)]
    if None not in classes and _class(classes[0]) != _class(classes[1]):
        other = f"accel_{name}"
        while other in both:
            other = f"accel_{other}"
        both[name], both[other] = own, brought
        return [
            f"`callbacks.{name}` is this app's {classes[0]}; the {classes[1]} of the preset is "
            f"`callbacks.{other}`."
        ]
    before, both[name] = _plain(node_of(both, name)), _beneath(brought, own)
    lost = _differences(before, _plain(node_of(both, name)), f"callbacks.{name}")
    if not lost:
        return []
    values = ", ".join(f"{key}={now!r} (not {then!r})" for key, then, now in lost)
    return [
        f"`callbacks.{name}` is in this app's configuration and in a preset. The app's values stay: "
        f"{values}; the command line sets others."
    ]


def node_of(mapping: Any, name: str) -> Any:
    """Return what a mapping of OmegaConf holds under a name, unresolved, or `None`."""
    from omegaconf import DictConfig

    found = isinstance(mapping, DictConfig) and not mapping._is_none()
    return mapping._get_node(name, validate_access=False) if found else None


def count(tree: Any) -> int:
    """Return how many values there are when every alias of yaml is written out.

    Raises:
        ValueError: More than any preset has; an alias within itself has no end.

    >>> shared = [0] * 9
    >>> count({"a": shared, "b": shared})
    21
    """
    sizes: dict[int, int | None] = {}

    def size(node: Any) -> int:
        if not isinstance(node, (dict, list)):
            return 1
        known = sizes.get(id(node), 0)
        if known is None:
            raise _refusal(
                "a preset refers to itself", "an alias inside its anchor", "write it out"
            )
        if not known:
            sizes[id(node)] = None
            inner = node.values() if isinstance(node, dict) else node
            sizes[id(node)] = known = 1 + sum(size(item) for item in inner)
        return known

    found = size(tree)
    if found > _MOST_NODES:
        raise _refusal(
            "a preset is a page of settings", f"{found} values, aliases written out", "say less"
        )
    return found


def _check_defaults(defaults: Any) -> None:
    if not isinstance(defaults, Sequence) or isinstance(defaults, str):
        raise _refusal("`defaults` of a preset is a list", repr(defaults)[:80], "list presets")
    for item in defaults:
        pairs = item.items() if isinstance(item, Mapping) else [(item, None)]
        for key, value in pairs:
            names = [key, *(value if isinstance(value, list) else [value])]
            inside = isinstance(key, str) and _DEFAULT.fullmatch(key) and _stays(key)
            plain = all(n is None or (isinstance(n, str) and "$" not in n) for n in names)
            if not inside or not plain or any(isinstance(n, str) and "@" in n for n in names):
                raise _refusal(
                    "`defaults` of a preset name presets only",
                    f"`{key}`" if value is None else f"`{key}: {value}`",
                    "name a preset, a file of one, or `/accel/TECHNIQUE: VARIANT`",
                )


def _stays(key: str) -> bool:
    name = key.rpartition(" ")[2]
    return ".." not in name.split("/") if name.startswith("/accel/") else not name.startswith("/")


def _check_trainer(node: Any) -> None:
    for key in node if isinstance(node, dict) else ():
        if key not in _TRAINER:
            raise _refusal(
                "a preset leaves alone what the Trainer writes, and what it is",
                f"`trainer.{key}`",
                "say it on the command line, or in the app's own configuration",
            )
        whole, value = _WHOLE.get(key), node[key]
        if whole is not None and (type(value), value) not in [(type(v), v) for v in whole]:
            raise _refusal(
                "a preset makes a training faster, and does not leave out a part of it or what it keeps",
                f"`trainer.{key}: {value}`",
                f"say trainer.{key}={value} on the command line, or in the app's own configuration",
            )


def _check_target(where: str, value: Any) -> None:
    if not is_ours(value) or not where.startswith(("callbacks.", "trainer.plugins.")):
        raise _refusal(
            f"`{where}: {value}` is not allowed to run",
            "something that is no public class of lightning_accel, or is in the wrong place",
            "put other classes into the app's own configuration, if you trust them",
        )


def _check_text(where: str, key: str, value: str) -> None:
    if key == "sampler" and value == "dwave":
        raise _refusal(
            "a preset sends nothing to a service that knows the user's token",
            f"`{where}: {value}`",
            f"say {where}=dwave on the command line",
        )
    read = _READS.match(value)
    rest = value[read.end() :].lstrip("/") if read else value
    asked = (read["key"] or read["select"] or "") if read else ""
    if "$" in rest or names_secret(asked) or asked.startswith("hydra"):
        raise _refusal(
            "a preset reads settings, no variables of the environment and no secrets",
            f"`{where}: {value}`",
            "write the value itself, or `${key}` of another setting",
        )
    if "://" in value or (key not in _INPUTS and leads_elsewhere(rest)):
        raise _refusal(
            "a preset names no place outside of the run's folder",
            f"`{where}: {value}`",
            "say it on the command line, or name a place below the present folder",
        )


def _plain(node: Any) -> dict[str, Any]:
    from omegaconf import DictConfig, OmegaConf

    if not isinstance(node, DictConfig) or node._is_none() or node._is_interpolation():
        return {}
    found: Any = OmegaConf.to_container(node, resolve=False)
    return found


def _beneath(brought: Any, own: Any) -> Any:
    """Merge a preset's node beneath one of the app's; of two classes deeper inside, the app's is taken as a whole.

    Merging would leave it the other's arguments (hydra#1896).
    """
    from omegaconf import DictConfig, OmegaConf

    merged: Any = OmegaConf.merge(brought, own)
    for name in map(str, own):
        inner = [node_of(node, name) for node in (brought, own)]
        if not all(isinstance(node, DictConfig) and not node._is_none() for node in inner):
            continue
        classes = [_plain(node).get("_target_") for node in inner]
        other = None not in classes and _class(classes[0]) != _class(classes[1])
        merged[name] = inner[1] if other else _beneath(*inner)
    return merged


def _class(target: Any) -> str:
    """Return the name of a class; one of ours has several homes."""
    return str(target).rpartition(".")[2] if is_ours(target) else str(target)


def _differences(before: Any, now: Any, where: str) -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        pairs = {key: (before.get(key), now.get(key)) for key in {**before, **now}}
        return [
            found
            for key, (a, b) in pairs.items()
            if key != "_target_"
            for found in _differences(a, b, f"{where}.{key}")
        ]
    hidden = names_secret(where.rpartition(".")[2])
    shown = ("***", "***") if hidden else (before, now)
    return [] if before == now else [(where, *shown)]


def _is_of_us(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("lightning_accel.")


def _entries(tree: Any, where: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield each value with the key that it belongs to, that of its list for an item."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            inner = f"{where}.{key}".lstrip(".")
            yield inner, str(key), value
            yield from _entries(value, inner)
    elif isinstance(tree, list):
        key = re.sub(r"(?:\[\d+\])+$", "", where).rpartition(".")[2]
        for index, value in enumerate(tree):
            yield f"{where}[{index}]", key, value
            yield from _entries(value, f"{where}[{index}]")


def _foreign(key: Any) -> ValueError:
    return _refusal(
        "a preset sets accel, callbacks and trainer only",
        f"`{key}`",
        "put it into the app's own configuration, or say it on the command line",
    )


def _refusal(what: str, found: str, do: str) -> ValueError:
    return ValueError(explain(what, found, do))
