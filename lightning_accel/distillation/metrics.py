"""What a distillation gave, step by step: agreement, each loss, shares of the gradient, hits of the cache.

Values stay on the device until somebody logs them, so that no step waits.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_accel.distillation.cache import TeacherCache

PREFIX = "distillation"


class DistillationMetrics:
    """The values of the present step and of the present epoch.

    >>> import torch
    >>> journal = DistillationMetrics()
    >>> journal.note({"kd": torch.tensor(2.0)})
    >>> journal.note({"kd": torch.tensor(4.0)})
    >>> journal.latest(None), journal.close_epoch(None)
    ({'distillation/kd': 4.0}, {'distillation/kd': 3.0})
    """

    def __init__(self) -> None:
        self.shares: dict[str, float] = {}
        """The last measured share of each term in the gradient."""
        self._latest: dict[str, Tensor] = {}
        self._epoch: dict[str, list[Tensor]] = {}

    def note(self, values: Mapping[str, Tensor]) -> None:
        """Keep the values of a step."""
        self._latest = {name: value.detach() for name, value in values.items()}
        for name, value in self._latest.items():
            self._epoch.setdefault(name, []).append(value)

    def latest(self, cache: TeacherCache | None) -> dict[str, float]:
        """Return the values noted since the last look, for loggers; this waits for the device."""
        values = {f"{PREFIX}/{name}": float(value) for name, value in self._latest.items()}
        if values:
            values |= {f"{PREFIX}/share/{name}": share for name, share in self.shares.items()}
            if cache is not None and cache.enabled:
                values[f"{PREFIX}/hit_rate"] = float(cache.hit_rate)
        self._latest = {}
        return values

    def close_epoch(self, cache: TeacherCache | None) -> dict[str, float]:
        """Return the means over the noted steps of the epoch, and begin another."""
        means = {
            f"{PREFIX}/{name}": float(sum(values) / len(values))
            for name, values in self._epoch.items()
        }
        if cache is not None and cache.enabled:
            means[f"{PREFIX}/hit_rate"] = float(cache.hit_rate)
        self._epoch = {}
        return means
