"""Networks compiled with their weights baked in, for prediction only."""

from typing import TYPE_CHECKING, Any

from lightning_accel.compilation.frozen.freeze import Frozen, frozen

if TYPE_CHECKING:
    from lightning_accel.compilation.frozen.callback import FrozenPredict

__all__ = ["Frozen", "FrozenPredict", "frozen"]


def __getattr__(name: str) -> Any:
    if name == "FrozenPredict":
        from lightning_accel.compilation.frozen.callback import FrozenPredict

        return FrozenPredict
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
