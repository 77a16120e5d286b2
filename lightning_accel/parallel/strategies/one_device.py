"""One device for a module whose layers may be on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from typing_extensions import override

from lightning_accel.parallel.meta import materialize
from lightning_accel.parallel.strategies.meta_start import (
    SeesMeta,
    left_on_meta,
    names_in,
    require_fillable,
)


class OneDevice(SeesMeta, SingleDeviceStrategy):
    """Lightning's own, where layers made on the meta device are filled as strategies that shard fill them."""

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        self._fill(names_in(checkpoint, strict, self.lightning_module))
        super().load_model_state_dict(checkpoint, strict)

    @override
    def setup(self, trainer: Trainer) -> None:
        self._fill(set())
        super().setup(trainer)

    @override
    def teardown(self) -> None:
        with left_on_meta(self):
            super().teardown()

    def _fill(self, given: set[str]) -> None:
        root = self.lightning_module
        assert root is not None
        materialize(root, fills=require_fillable(root, self._meta, given))
