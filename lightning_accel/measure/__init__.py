"""Numbers with units: time, memory, arithmetic, and the report that puts them side by side."""

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
