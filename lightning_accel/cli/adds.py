"""What presets add to a configuration: it composed with them, less it composed without."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from lightning_accel.cli.subject import composed
from lightning_accel.errors import AccelError
from lightning_accel.redact import redacted
from lightning_accel.targets import is_ours

_ACCEL = re.compile(r"[+~]*accel(?:[./@][^=]*)?(?:=|$)")
_LATE = re.compile(r"[+~]*(?:callbacks|trainer\.plugins)[.=]")


class Node(NamedTuple):
    """A callback of a configuration in few words."""

    name: str
    kind: str
    acts: str
    does: str
    settings: str


class Added(NamedTuple):
    """What is there because of a preset.

    Attributes:
        trainer: Arguments of the Trainer.
        callbacks: Nodes by name, in the order in which they act.
        accel: What the presets say of themselves.
        without: The overrides that are not of a preset.
        refused: What a callback says of settings that it cannot have, by name.
    """

    trainer: dict[str, Any]
    callbacks: dict[str, dict[str, Any]]
    accel: Any
    without: list[str]
    refused: dict[str, str] = {}

    def rows(self) -> list[Node]:
        """Return the callbacks in few words."""
        return [_node(name, node) for name, node in self.callbacks.items()]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "accel": self.accel,
            "trainer": self.trainer,
            "callbacks": self.callbacks,
            "order": [row._asdict() for row in self.rows()],
            "refused": self.refused,
        }


def is_of_accel(override: str) -> bool:
    """Tell whether an override chooses a preset or a variant of a technique.

    >>> [is_of_accel(word) for word in ("+accel=amp", "+accel/pruning=taylor", "accelerator=cpu")]
    [True, True, False]
    """
    return _ACCEL.match(override) is not None


def added(config: Path | None, overrides: Sequence[str]) -> Added:
    """Compose with and without the presets, and return the difference.

    Raises:
        ValueError: Hydra refuses, or no such preset is known.
    """
    whole, secrets = composed(config, overrides)
    without = [word for word in overrides if not is_of_accel(word)]
    if config is None:
        base: dict[str, Any] = {}
    else:
        try:
            base, _ = composed(config, without)
        except ValueError:  # an override of what only the preset brings
            without = [word for word in without if not _LATE.match(word)]
            base, _ = composed(config, without)
    chosen = any(map(is_of_accel, overrides))
    nodes = {
        name: node
        for name, node in (whole.get("callbacks") or {}).items()
        if isinstance(node, dict)
        and is_ours(node.get("_target_"))
        and (not chosen or node != (base.get("callbacks") or {}).get(name))
    }
    before = base.get("trainer") or {}
    trainer = {
        key: value
        for key, value in (whole.get("trainer") or {}).items()
        if chosen and value != before.get(key)
    }
    said = redacted({"trainer": trainer, "callbacks": nodes}, known=secrets)
    refused = _refused(nodes, secrets)
    callbacks = _in_order(said["callbacks"])
    return Added(said["trainer"], callbacks, whole.get("accel"), without, refused)


def _refused(nodes: Mapping[str, dict[str, Any]], secrets: set[str]) -> dict[str, str]:
    """Build each node of ours, and return what it refuses; what a later word has to fill in is left out."""
    from hydra.errors import HydraException

    from lightning_accel.allowed import walk
    from lightning_accel.recipe import build_callbacks
    from lightning_accel.redact import unsaid

    found = {}
    for name, node in nodes.items():
        targets = [
            str(inner.get("_target_")) for _, inner in walk(node, name) if "_target_" in inner
        ]
        is_open = "???" in str(node) or node.get("teacher", "") is None
        if is_open or not all(map(is_ours, targets)):
            continue
        try:
            with unsaid(secrets):
                build_callbacks({name: node})
        except (HydraException, AccelError, ValueError, TypeError, ImportError, OSError) as error:
            found[name] = str(error.__cause__ or error)
    return found


def class_of(node: dict[str, Any]) -> type:
    """Return the class of a node of ours."""
    home, _, name = node["_target_"].rpartition(".")
    found: type = getattr(import_module(home), name)
    return found


def _in_order(nodes: dict[str, Any]) -> dict[str, Any]:
    def place(item: tuple[str, Any]) -> int:
        stage = getattr(class_of(item[1]), "stage", None)
        return -1 if stage is None else int(stage)

    return dict(sorted(nodes.items(), key=place))


_NEEDS = {
    "process": "at setup",
    "weights": "at setup",
    "optimizers": "when a fit begins",
}
_ACTS = {
    "UsePrecision": "at setup",
    "AutoTune": "when a fit begins",
    "FastLoading": "when a fit begins",
    "WarmStart": "when a fit begins",
    "ActivationBudget": "when a fit begins",
    "Distillation": "in each step",
    "StepMeter": "in each step",
    "AccelReport": "before a fit and after it",
    "Deploy": "after a fit",
    "Objective": "after a fit",
}
"""When those act that choose their time themselves."""


def moment_of(when: Any) -> str:
    """Say a `when`: a share of the fit, an epoch, or several of either.

    >>> moment_of(0.4), moment_of(3), moment_of([2, 4])
    ('at 40% of the fit', 'before epoch 3', 'before epoch 2, before epoch 4')
    """
    if isinstance(when, (list, tuple)):
        return ", ".join(map(moment_of, when))
    if isinstance(when, (int, float)):
        return f"at {when:.0%} of the fit" if 0 < when < 1 else f"before epoch {when:g}"
    return f"when={when}"


def _node(name: str, node: dict[str, Any]) -> Node:
    kind = class_of(node)
    stage = getattr(kind, "stage", None)
    acts = _ACTS.get(kind.__name__) or _NEEDS.get(getattr(kind, "needs", ""), "during a fit")
    if node.get("when") is not None:
        acts = moment_of(node["when"])
    acts += f", changes {_CHANGES[stage.name]}" if stage is not None else ""
    does = (kind.__doc__ or "").strip().partition("\n\n")[0]
    given = [f"{k}={_value(v)}" for k, v in node.items() if k != "_target_" and v is not None]
    return Node(name, kind.__name__, acts, " ".join(does.split()), ", ".join(given))


_CHANGES = {
    "SHAPE": "shapes",
    "KIND": "kinds of layers",
    "MEMORY": "memory",
    "COMPILE": "how it runs",
}


def _value(value: Any) -> str:
    if isinstance(value, dict) and "_target_" in value:
        inner = ", ".join(f"{k}={_value(v)}" for k, v in value.items() if k != "_target_")
        return f"{str(value['_target_']).rpartition('.')[2]}({inner})"
    return str(value)
