"""What makes this module train faster on this machine: measured, verified, charged, and explained."""

from typing import TYPE_CHECKING

from lightning_accel.lazy import lazily

if TYPE_CHECKING:
    from lightning_accel.tuning.api import tune
    from lightning_accel.tuning.callbacks.auto_tune import AutoTune
    from lightning_accel.tuning.report import TuneReport
    from lightning_accel.tuning.settings import Settings

_HOMES = {
    "AutoTune": "callbacks.auto_tune",
    "Settings": "settings",
    "TuneReport": "report",
    "tune": "api",
}

__all__ = ["AutoTune", "Settings", "TuneReport", "tune"]


__getattr__ = lazily(__name__, _HOMES)
