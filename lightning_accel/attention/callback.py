"""When the attention kernel is chosen: for the time that the Trainer runs."""

from __future__ import annotations

from contextlib import ExitStack

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_accel.attention.backend import attention_backend, check


class AttentionBackend(Callback):
    """Compute `scaled_dot_product_attention` with one kernel where it can; with the others elsewhere.

    The choice holds for the whole process while the Trainer runs, and is undone afterwards. Networks that
    never call `scaled_dot_product_attention` are not affected. `AutoTune` measures whether it pays.

    Args:
        backend: "flash", "efficient", "cudnn" or "math".

    Raises:
        ValueError: The name is unknown.

    >>> AttentionBackend("flash").backend
    'flash'
    """

    def __init__(self, backend: str) -> None:
        self.backend = check(backend)
        self._held = ExitStack()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._held.close()
        self._held.enter_context(attention_backend(self.backend))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._held.close()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._held.close()
