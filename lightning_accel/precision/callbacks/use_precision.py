"""`UsePrecision`: a precision plugin as a callback."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.precision.precision import Precision
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_accel.arguments import instance
from lightning_accel.bridge.restore import register
from lightning_accel.bridge.technique import Situation, Skipped, Technique
from lightning_accel.errors import AccelError
from lightning_accel.precision.autocast import takes_effect
from lightning_accel.precision.plugins.on_xla import of_device


def _autocast(value: str) -> dict[str, str]:
    return {"_target_": "lightning_accel.precision.AutocastPrecision", "precision": value}


class UsePrecision(Technique):
    """Hand a precision plugin to the Trainer when it starts: a callback merges where `plugins` do not.

    For configurations: `Trainer(plugins=...)` takes a list, which no preset can add to, and which an app
    may fill itself. In Python, pass the plugin to the Trainer.

    Args:
        plugin: Such as `AutocastPrecision("auto")`.

    Raises:
        TypeError: It is no precision plugin.

    >>> from lightning_accel.precision import AutocastPrecision
    >>> UsePrecision(AutocastPrecision("bf16-mixed")).plugin
    AutocastPrecision('bf16-mixed')
    """

    name = "precision"
    tunable: ClassVar = {
        value: {"plugin": _autocast(value)} for value in ("bf16-mixed", "16-mixed")
    }

    def __init__(self, plugin: Precision) -> None:
        self.plugin = instance(
            "plugin", plugin, Precision, "a precision plugin", "pass AutocastPrecision('auto')"
        )

    @override
    @classmethod
    def candidates(cls, situation: Situation) -> Iterator[str | Skipped]:
        for value, dtype in (("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)):
            reason = _why_not(situation, value, dtype)
            yield Skipped(value, reason) if reason else value

    @override
    @classmethod
    def describe(cls, value: str) -> str:
        return value

    @override
    def join(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute in the plugin from now on, and in what was before when the technique leaves."""
        strategy = trainer.strategy
        before, strategy.precision_plugin = strategy.precision_plugin, self.plugin
        self.held(trainer).callback(setattr, strategy, "precision_plugin", before)
        self.held(trainer).callback(self.plugin.teardown)
        self.plugin.convert_module(pl_module)
        strategy.setup_precision_plugin()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the plugin in the place of plain float32, before the module is converted."""
        super().setup(trainer, pl_module, stage)
        register(pl_module)  # a pruned checkpoint loads here too
        strategy = trainer.strategy
        if strategy.precision_plugin is self.plugin:
            return
        own = of_device(self.plugin, strategy)
        if own is not self.plugin and repr(own) == repr(
            strategy.precision_plugin
        ):  # of an earlier fit of this Trainer
            return
        if trainer.precision not in ("32-true", None):
            raise AccelError(
                "a Trainer computes in one precision",
                f"its own {trainer.precision!r} beside {self.plugin!r}",
                "leave out one of them: `precision=` and `plugins=` of the Trainer, or "
                "`callbacks.precision`",
            )
        if own is not self.plugin:
            rank_zero_info(f"Computing by {own!r}, which is what XLA has for {self.plugin!r}.")
        strategy.precision_plugin = own


def _why_not(situation: Situation, value: str, dtype: torch.dtype) -> str:
    """Say why autocast to a format is not worth trying, or nothing."""
    plugin, device = situation.trainer.precision_plugin, situation.device
    plain = type(plugin) is Precision
    lightnings = type(plugin) is MixedPrecision and getattr(plugin, "scaler", None) is None
    if not plain and not (lightnings and value == "bf16-mixed"):
        return f"the Trainer already has {type(plugin).__name__}"
    if situation.numerics == "exact" and plain:
        return "shorter than fp32, which numerics='exact' does not allow"
    if value == "16-mixed" and device.type == "cpu":
        return "4 to 100 times slower than fp32 on CPUs"
    if value == "16-mixed" and takes_effect(device, torch.bfloat16):
        return "bf16 has the range of fp32 and needs no scaler"
    if value == "16-mixed" and not situation.module.automatic_optimization:
        return "manual optimization would have to scale its losses by itself"
    return (
        "" if takes_effect(device, dtype) else f"autocast to {value} has no effect on {device.type}"
    )
