"""`UsePrecision`: a precision plugin as a callback."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision.precision import Precision
from typing_extensions import override

from lightning_accel.arguments import instance
from lightning_accel.bridge.restore import register
from lightning_accel.errors import AccelError


class UsePrecision(Callback):
    """Hand a precision plugin to the Trainer when it starts: a callback merges where `plugins` do not.

    For configurations: `Trainer(plugins=...)` takes a list, which no preset can add to, and which an app
    may fill itself. In Python, pass the plugin to the Trainer.

    Args:
        plugin: Such as `AutocastPrecision("auto")`.

    Raises:
        TypeError: It is no precision plugin.

    >>> from lightning_accel.precision import AutocastPrecision
    >>> UsePrecision(AutocastPrecision("bf16")).plugin
    AutocastPrecision('bf16')
    """

    def __init__(self, plugin: Precision) -> None:
        self.plugin = instance(
            "plugin", plugin, Precision, "a precision plugin", "pass AutocastPrecision('auto')"
        )

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the plugin in the place of plain float32, before the module is converted."""
        register(pl_module)  # a pruned checkpoint loads here too
        strategy = trainer.strategy
        if strategy.precision_plugin is self.plugin:
            return
        if trainer.precision not in ("32-true", None):
            raise AccelError(
                "a Trainer computes in one precision",
                f"its own {trainer.precision!r} beside {self.plugin!r}",
                "leave out one of them: `precision=` and `plugins=` of the Trainer, or "
                "`callbacks.precision`",
            )
        strategy.precision_plugin = self.plugin
