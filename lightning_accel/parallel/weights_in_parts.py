"""What others ask of a strategy that holds parts of weights: parts of a whole tensor, and the whole of parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_accel.parallel import sharding


class WeightsInParts:
    """For who keeps something beside weights: masks by their names, sums over them."""

    lightning_module: Any
    _around: Any

    @property
    def layout(self) -> object:
        """Another object after each sharding, for who keeps parts."""
        return self._around

    def in_parts(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return of whole tensors, by names of weights, what this process holds of them; no message is sent."""
        return sharding.parts_like(tensors, self.lightning_module)

    def whole_tensor(self, name: str, value: Tensor) -> Tensor:
        """Return what all processes hold together of a weight, or of what is laid out as it; all take part."""
        full: Tensor = sharding.whole(value, host=False)
        return full
