"""Numbers with units: time, memory, arithmetic, and the report that puts them side by side."""

from typing import TYPE_CHECKING

from lightning_accel.lazy import lazily

if TYPE_CHECKING:
    from lightning_accel.measure.flops import MacsCount, count_macs
    from lightning_accel.measure.memory import ModelSize, PeakMemory, model_size, peak_memory
    from lightning_accel.measure.report import MeasuredModel, Report, measure_pair
    from lightning_accel.measure.table import Table
    from lightning_accel.measure.timing import Comparison, LatencyStats, Pace, compare, time_call

__all__ = [
    "Comparison",
    "LatencyStats",
    "MacsCount",
    "MeasuredModel",
    "ModelSize",
    "Pace",
    "PeakMemory",
    "Report",
    "Table",
    "compare",
    "count_macs",
    "measure_pair",
    "model_size",
    "peak_memory",
    "time_call",
]

__getattr__ = lazily(
    __name__,
    {
        "MacsCount": "flops",
        "count_macs": "flops",
        "ModelSize": "memory",
        "PeakMemory": "memory",
        "model_size": "memory",
        "peak_memory": "memory",
        "MeasuredModel": "report",
        "Report": "report",
        "measure_pair": "report",
        "Table": "table",
        "Comparison": "timing",
        "LatencyStats": "timing",
        "Pace": "timing",
        "compare": "timing",
        "time_call": "timing",
    },
)
