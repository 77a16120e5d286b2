"""What a tuner may choose, as plain data, and the callbacks and plugins that each choice stands for.

A choice is worth what a user can make of it without the tuner: every value here is one node of a
configuration, the same that one would write by hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import Any

from lightning_accel.arguments import instance
from lightning_accel.errors import explain
from lightning_accel.loading.plan import LoadingPlan

PLAIN = "plain"
"""The value of everything that stays as the user has it."""

TECHNIQUES = (
    "precision",
    "memory_format",
    "matmul",
    "optimizer",
    "attention",
    "compilation",
    "float8",
    "loading",
)
"""In the order in which they are tried; float8 pays only in compiled code, so after that."""

Node = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """One value per technique; `plain` is what the Trainer does by itself.

    >>> Settings(precision="bf16", optimizer="fused").label
    'bf16 + fused optimizer'
    """

    memory_budget: str = PLAIN
    precision: str = PLAIN
    matmul: str = PLAIN
    float8: str = PLAIN
    memory_format: str = PLAIN
    optimizer: str = PLAIN
    attention: str = PLAIN
    compilation: str = PLAIN
    loading: LoadingPlan | str = PLAIN

    def __post_init__(self) -> None:
        for name, value in self.chosen():
            if name == "loading":
                instance(
                    name, value, LoadingPlan, "a LoadingPlan", "pass LoadingPlan(in_memory=True)"
                )
                continue
            if not isinstance(value, str):
                raise TypeError(explain(f"`{name}` is a name", repr(value), "pass a string"))
            if name == "memory_budget":
                _check_budget(value)
            elif value not in _NODES[name]:
                known = ", ".join(repr(v) for v in (PLAIN, *_NODES[name]))
                raise ValueError(explain(f"unknown `{name}`", repr(value), f"pass one of {known}"))

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Settings:
        """Read `to_dict`'s form.

        >>> Settings.from_dict({"precision": "bf16"}).to_dict()
        {'precision': 'bf16'}
        """
        known = {field.name for field in fields(cls)}
        plain = dict(plain)
        if isinstance(plain.get("loading"), Mapping):
            plain["loading"] = LoadingPlan.from_dict(plain["loading"])
        odd = [n for n, v in plain.items() if n not in known or not isinstance(v, _KINDS)]
        if odd:
            raise ValueError(
                explain("these are no settings", ", ".join(map(str, odd)), f"use {sorted(known)}")
            )
        return cls(**plain)

    def to_dict(self) -> dict[str, Any]:
        """Return what is not plain."""
        return {n: v.to_dict() if isinstance(v, LoadingPlan) else v for n, v in self.chosen()}

    def chosen(self) -> Iterator[tuple[str, Any]]:
        """Yield technique and value of what is not plain, in the order of application."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value != PLAIN:
                yield field.name, value

    def having(self, technique: str, value: LoadingPlan | str) -> Settings:
        """Return these settings with another value for one technique."""
        changed: dict[str, Any] = {technique: value}
        return replace(self, **changed)

    @property
    def label(self) -> str:
        """The settings in words."""
        return " + ".join(words(name, value) for name, value in self.chosen()) or PLAIN

    @property
    def format(self) -> str | None:
        """The format of autocast that the precision asks for, `None` for the Trainer's own."""
        return None if self.precision == PLAIN else self.precision

    def callbacks(self) -> dict[str, Node]:
        """Return the nodes of all callbacks by name."""
        return {
            name: node(name, value) for name, value in self.chosen() if name not in ("precision",)
        }

    def plugins(self) -> dict[str, Node]:
        """Return the nodes of all plugins by name."""
        return {n: node(n, value) for n, value in self.chosen() if n == "precision"}


def words(technique: str, value: Any) -> str:
    """Say a value so that it can stand alone.

    >>> words("compilation", "blocks"), words("matmul", "medium")
    ('compiled blocks', 'matmul medium')
    """
    if isinstance(value, LoadingPlan):
        return f"data {value.label}"
    said = {
        "precision": value,
        "float8": f"float8 {value}",
        "memory_format": value.replace("_", " "),
        "optimizer": f"{value} optimizer",
        "attention": f"{value} attention",
        "compilation": f"compiled {value}",
        "memory_budget": f"memory budget {value}",
        "matmul": f"matmul {value}",
    }
    return said.get(technique, value)


def node(technique: str, value: Any) -> Node:
    """Return the configuration node of one value: `_target_` and its arguments.

    >>> node("optimizer", "fused")
    {'_target_': 'lightning_accel.loop.FusedOptimizer', 'implementation': 'fused'}
    """
    if technique == "memory_budget":
        return {"_target_": "lightning_accel.memory.ActivationBudget", "budget": float(value)}
    if technique == "loading":
        return {"_target_": "lightning_accel.loading.FastLoading", **value.arguments()}
    target, arguments = _NODES[technique][value]
    return {"_target_": f"lightning_accel.{target}", **arguments}


def make(described: Node) -> Any:
    """Build the object that a node of ours describes."""
    arguments = dict(described)
    home, _, name = arguments.pop("_target_").rpartition(".")
    return getattr(import_module(home), name)(**arguments)


def _check_budget(value: str) -> None:
    try:
        fits = 0.0 <= float(value) <= 1.0
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(explain("`memory_budget` lies from 0 to 1", repr(value), "pass '0.5'"))


_KINDS = (str, LoadingPlan)
_NODES: dict[str, dict[str, tuple[str, Node]]] = {
    "precision": {
        "bf16": ("precision.AutocastPrecision", {"format": "bf16"}),
        "fp16": ("precision.AutocastPrecision", {"format": "fp16"}),
    },
    "matmul": {
        "high": ("precision.MatmulPrecision", {"precision": "high"}),
        "medium": ("precision.MatmulPrecision", {"precision": "medium"}),
    },
    "float8": {"tensorwise": ("precision.Float8Linear", {"recipe": "tensorwise"})},
    "memory_format": {"channels_last": ("precision.MemoryFormat", {})},
    "optimizer": {
        "fused": ("loop.FusedOptimizer", {"implementation": "fused"}),
        "foreach": ("loop.FusedOptimizer", {"implementation": "foreach"}),
    },
    "attention": {
        name: ("attention.AttentionBackend", {"backend": name})
        for name in ("flash", "efficient", "cudnn", "math")
    },
    "compilation": {
        "blocks": ("compilation.BlockCompile", {}),
        "whole": ("compilation.BlockCompile", {"blocks": False}),
        "with CUDA graphs": (
            "compilation.BlockCompile",
            {"blocks": False, "mode": "reduce-overhead"},
        ),
        "with autotuning": (
            "compilation.BlockCompile",
            {"blocks": False, "mode": "max-autotune-no-cudagraphs"},
        ),
    },
}
"""What each value stands for: the class below `lightning_accel`, and its arguments."""
