"""What XLA has for a precision plugin that was asked for: its strategies take no other than their own."""

from __future__ import annotations

from lightning.pytorch.plugins import XLAPrecision
from lightning.pytorch.plugins.precision.precision import Precision
from lightning.pytorch.strategies import Strategy

from lightning_accel.bridge.strategies import is_of
from lightning_accel.errors import Unsupported
from lightning_accel.precision.plugins.autocast_precision import AutocastPrecision
from lightning_accel.precision.plugins.xla_precision import XlaPrecision


def of_device(plugin: Precision, strategy: Strategy) -> Precision:
    """Return the plugin, or on XLA the one that computes in the same format.

    Raises:
        Unsupported: XLA has none for it.

    >>> from lightning.pytorch.strategies import SingleDeviceStrategy
    >>> of_device(AutocastPrecision("bf16-mixed"), SingleDeviceStrategy())
    AutocastPrecision('bf16-mixed')
    """
    if not is_of(strategy, "XLA") or isinstance(plugin, XLAPrecision):
        return plugin
    asked = plugin.requested if isinstance(plugin, AutocastPrecision) else ""
    if asked in ("auto", "bf16-mixed"):
        return XlaPrecision("bf16-mixed")
    if asked == "32-true":
        return XLAPrecision("32-true")
    raise Unsupported(
        "XLA computes in float32 and bfloat16, by autocast or with the whole module in bfloat16",
        repr(plugin),
        "use XlaPrecision('bf16-mixed') or XlaPrecision('bf16-true'), in a configuration `+accel/precision=bf16`",
    )
