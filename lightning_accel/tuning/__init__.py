"""What makes this module train faster on this machine: measured, verified, charged, and explained."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_accel.tuning.callback import AutoTune
    from lightning_accel.tuning.outside import tune
    from lightning_accel.tuning.report import TuneReport
    from lightning_accel.tuning.settings import Settings

_HOMES = {
    "AutoTune": "callback",
    "Settings": "settings",
    "TuneReport": "report",
    "tune": "outside",
}

__all__ = ["AutoTune", "Settings", "TuneReport", "tune"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
