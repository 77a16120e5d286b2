"""What a tuner may choose, as plain data, and the callbacks that each choice stands for.

A choice is worth what a user can make of it without the tuner: every value here is one node of a
configuration, the same that one would write by hand, under the same key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from lightning_accel.arguments import instance
from lightning_accel.attention.callbacks.attention_backend import AttentionBackend
from lightning_accel.bridge.technique import Technique
from lightning_accel.compilation.callbacks.block_compile import BlockCompile
from lightning_accel.errors import explain
from lightning_accel.loading.plan import LoadingPlan
from lightning_accel.loop.callbacks.fused_optimizer import FusedOptimizer
from lightning_accel.memory.callbacks.activation_budget import ActivationBudget
from lightning_accel.precision.callbacks.float8_linear import Float8Linear
from lightning_accel.precision.callbacks.matmul_precision import MatmulPrecision
from lightning_accel.precision.callbacks.memory_format import MemoryFormat
from lightning_accel.precision.callbacks.use_precision import UsePrecision

BASELINE = "plain"
"""The value of everything that stays as the user has it."""

TRIED: tuple[type[Technique], ...] = (
    UsePrecision,
    MemoryFormat,
    MatmulPrecision,
    FusedOptimizer,
    AttentionBackend,
    BlockCompile,
    Float8Linear,
)
"""In the order in which they are tried; float8 pays only in compiled code, so after that."""

TECHNIQUES = (*(technique.name for technique in TRIED), "loading")

_APPLIED: dict[str, type[Technique] | None] = {
    technique.name: technique
    for technique in (
        ActivationBudget,
        UsePrecision,
        MatmulPrecision,
        Float8Linear,
        MemoryFormat,
        FusedOptimizer,
        AttentionBackend,
        BlockCompile,
    )
} | {"loading": None}
"""In the order in which they are applied; the data is no part of a step, and so has a way of its own."""

Node = dict[str, Any]


@dataclass(frozen=True, init=False)
class Settings:
    """One value per technique; what is not named, or `plain`, is what the Trainer does by itself.

    >>> Settings(precision="bf16-mixed", fused_optimizer="fused").label
    'bf16-mixed + fused optimizer'
    """

    values: tuple[tuple[str, Any], ...]

    def __init__(self, **values: LoadingPlan | str) -> None:
        for name, value in values.items():
            if name not in _APPLIED:
                raise ValueError(
                    explain("unknown technique", repr(name), f"use {sorted(_APPLIED)}")
                )
            if value == BASELINE:
                continue
            if _APPLIED[name] is None:
                do = "pass LoadingPlan(in_memory=True)"
                instance(name, value, LoadingPlan, "a LoadingPlan", do)
            else:
                instance(name, value, str, "a name", "pass a string")
                node(name, value)
        chosen = [(n, values[n]) for n in _APPLIED if values.get(n, BASELINE) != BASELINE]
        object.__setattr__(self, "values", tuple(chosen))

    def __getitem__(self, technique: str) -> Any:
        return dict(self.values).get(technique, BASELINE)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Settings:
        """Read `to_dict`'s form.

        >>> Settings.from_dict({"precision": "bf16-mixed"}).to_dict()
        {'precision': 'bf16-mixed'}
        """
        plain = dict(plain)
        if isinstance(plain.get("loading"), Mapping):
            plain["loading"] = LoadingPlan.from_dict(plain["loading"])
        kinds = (str, LoadingPlan)
        odd = [n for n, v in plain.items() if n not in _APPLIED or not isinstance(v, kinds)]
        if odd:
            raise ValueError(
                explain(
                    "these are no settings", ", ".join(map(str, odd)), f"use {sorted(_APPLIED)}"
                )
            )
        return cls(**plain)

    def to_dict(self) -> dict[str, Any]:
        """Return what is not plain."""
        return {n: v.to_dict() if isinstance(v, LoadingPlan) else v for n, v in self.values}

    def chosen(self) -> Iterator[tuple[str, Any]]:
        """Yield technique and value of what is not plain, in the order of application."""
        yield from self.values

    def having(self, technique: str, value: LoadingPlan | str) -> Settings:
        """Return these settings with another value for one technique."""
        return Settings(**{**dict(self.values), technique: value})

    @property
    def label(self) -> str:
        """The settings in words."""
        return " + ".join(label_of(name, value) for name, value in self.chosen()) or BASELINE

    @property
    def format(self) -> str | None:
        """The format of autocast that the precision asks for, `None` for the Trainer's own."""
        return dict(self.values).get("precision")

    def nodes(self) -> dict[str, Node]:
        """Return the nodes of all callbacks by name, as they stand in a configuration."""
        return {name: node(name, value) for name, value in self.chosen()}

    def techniques(self) -> list[Technique]:
        """Return new techniques with these settings, but for the data."""
        return [make(node(n, v)) for n, v in self.chosen() if _APPLIED[n] is not None]


def label_of(technique: str, value: Any) -> str:
    """Say a value so that it can stand alone.

    >>> label_of("compilation", "blocks"), label_of("matmul_precision", "medium")
    ('compiled blocks', 'matmul medium')
    """
    kind = _APPLIED[technique]
    return f"data {value.label}" if kind is None else kind.describe(value)


def node(technique: str, value: Any) -> Node:
    """Return the configuration node of one value: `_target_` and its arguments.

    >>> node("fused_optimizer", "fused")
    {'_target_': 'lightning_accel.loop.FusedOptimizer', 'implementation': 'fused'}

    Raises:
        ValueError: There is no such value.
    """
    kind = _APPLIED[technique]
    if kind is None:
        return {"_target_": "lightning_accel.loading.FastLoading", **value.arguments()}
    home = kind.__module__.partition(".callbacks.")[0]
    return {"_target_": f"{home}.{kind.__name__}", **kind.arguments(value)}


def make(described: Node) -> Any:
    """Build the object that a node of ours describes, with those within."""
    arguments = {
        name: make(value) if isinstance(value, dict) and "_target_" in value else value
        for name, value in described.items()
    }
    home, _, name = arguments.pop("_target_").rpartition(".")
    return getattr(import_module(home), name)(**arguments)
