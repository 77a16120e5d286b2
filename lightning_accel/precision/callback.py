"""When to change the memory format: before training, and again after whatever reshaped the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_accel.bridge.model_edit import ModelEdit
from lightning_accel.precision.layout import channels_last, convert_inputs
from lightning_accel.surgery import Receipt, Select, Stage


class MemoryFormat(ModelEdit):
    """Keep two-dimensional convolutions and their input batches channels last, in every stage.

    Faster for most convolutional networks, above all under autocast; measure grouped ones. The inputs of
    the networks are converted as they come in, so neither data nor LightningModule change.

    Args:
        select: Which convolutions: a `Select`, a name pattern or several; all by default.

    Raises:
        NoEffect: At setup, when there is no such convolution.

    >>> MemoryFormat(select="backbone").select.include
    ('backbone',)
    """

    stage: ClassVar[Stage] = Stage.MEMORY

    def __init__(self, select: Select | str | Iterable[str] | dict[str, Any] | None = None) -> None:
        self.select = Select.of(select)
        self.receipt = Receipt()
        self._handles: list[RemovableHandle] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.receipt = Receipt()
        if any(True for _ in pl_module.parameters()):
            self._edit(pl_module)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._edit(pl_module)  # a restored shape may have come with new storage, and DDP wraps next

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._edit(pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._edit(pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._edit(pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._edit(pl_module)

    def on_model_edit_end(
        self, trainer: Trainer, pl_module: LightningModule, receipt: Receipt
    ) -> None:
        """Put weights that another edit reshaped back into the format."""
        self._edit(pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._release()

    def _edit(self, pl_module: LightningModule) -> None:
        self.receipt = self.receipt + channels_last(pl_module, select=self.select)
        if not self._handles:
            self._handles = convert_inputs(pl_module, select=self.select)

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
