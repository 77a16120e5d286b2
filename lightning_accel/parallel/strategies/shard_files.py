"""What a strategy of shards reads and writes: one file of whole tensors, or a folder of shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.optim import Optimizer
from typing_extensions import override

from lightning_accel.parallel import folders, sharding
from lightning_accel.parallel.meta import on_meta
from lightning_accel.parallel.weights_in_parts import WeightsInParts


class ShardFiles(WeightsInParts, ModelParallelStrategy):
    """Loads before anything is sharded, as on one device; a folder is read by shards, as soon as there are some."""

    _folder: Path | None
    _late: tuple[Mapping[str, Any], bool] | None

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return False  # as on one device: shapes and weights are there before anything is sharded

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        path = Path(self.broadcast(checkpoint_path))
        self._folder = path if folders.is_folder(path) else None
        if self._folder is not None:
            return folders.values(path)
        return Strategy.load_checkpoint(self, path, weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        root = self.lightning_module
        assert root is not None
        if self._folder is not None:  # it is read by shards, as soon as there are some
            return
        if on_meta(root):
            self._late = checkpoint, strict
        elif sharding.is_sharded(root):  # in mid-run
            options = StateDictOptions(full_state_dict=True, strict=strict)
            set_model_state_dict(root, dict(checkpoint["state_dict"]), options=options)
        else:
            root.load_state_dict(checkpoint["state_dict"], strict=strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if self._folder is not None and self.lightning_module is not None:
            folders.load_optimizers(self.lightning_module, self.optimizers, self._folder)
            return
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            sharding.load_optimizer(optimizer, state)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self._around is not None:
            self._around.refresh()
        root = self.lightning_module
        if self._save_distributed_checkpoint or root is None:
            return super().lightning_module_state_dict()
        return dict(root.state_dict())

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return plain.state_dict()

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        if self._save_distributed_checkpoint and storage_options is None:
            path = Path(self.broadcast(filepath))
            folders.save(checkpoint, path, is_first=self.is_global_zero, barrier=self.barrier)
            return
        if not self._save_distributed_checkpoint:  # averages of callbacks are among it
            checkpoint = sharding.whole(checkpoint, keep=self.is_global_zero)
        super().save_checkpoint(checkpoint, filepath, storage_options)
