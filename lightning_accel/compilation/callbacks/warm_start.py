"""`WarmStart`: a run unpacks the compile cache of an earlier one, and packs its own."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_accel.bridge.technique import Context, Technique
from lightning_accel.compilation.warm.cache import (
    UNSEALED,
    Unpacked,
    cache_at,
    check_path,
    contents,
    file_name,
    pack,
    unpack,
)
from lightning_accel.errors import AccelError, explain
from lightning_accel.seal import refuse_others

_COUNTERS = ("fxgraph_cache_hit", "fxgraph_cache_miss", "fxgraph_cache_bypass")


class WarmStart(Technique):
    """Start with what an earlier run compiled: its compile cache travels in a file beside the checkpoint.

    The run keeps its compile cache in a new directory of its own, filled from the file where that fits this
    machine and these versions, and writes the file again when a checkpoint is saved, an epoch or the run
    ends, or an error ends it, if there is something new. The processes of a node share the directory:
    of the first run they trace and lower each on its own, and wait for each other only where a C++
    kernel is built once for all; from the second run on all of them load. The file holds code, and so
    is taken only if it is sealed with your own key (`seal.py`), which is made at the first time.

    Args:
        path: The file; by default `compiled-<key>.zip` in the folder given to `ModelCheckpoint`, or else
            in `default_root_dir`.

    >>> WarmStart("compiled.zip").path.name
    'compiled.zip'
    """

    needs = "process"
    is_global = True

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = check_path(path)
        self.restored = Unpacked(0, "not tried yet")
        self._directory: Path | None = None
        self._file = Path()
        self._known: set[str] = set()
        self._counted: dict[str, int] = {}

    @property
    def totals(self) -> dict[str, int]:
        """How many graphs of this process were loaded from the cache, and how many compiled."""
        found, missed, passed = (_count(name) - self._counted.get(name, 0) for name in _COUNTERS)
        return {"loaded": found, "compiled": missed + passed}

    @override
    @contextmanager
    def effect(self, context: Context) -> Iterator[None]:
        directory = self._create(context.trainer)
        self._counted = {name: _count(name) for name in _COUNTERS}
        with cache_at(directory):
            try:
                yield
            finally:
                self._pack(context.trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pack(trainer)

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._pack(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._tell()

    def _create(self, trainer: Trainer) -> Path:
        """Agree on one directory for the processes of each node, and fill it once."""
        if self._directory is None:
            name = (
                tempfile.mkdtemp(prefix="lightning_accel_compiled_")
                if trainer.is_global_zero
                else ""
            )
            self._directory = Path(trainer.strategy.broadcast(name))
            self._file = (self.path or _beside(trainer)).absolute()
            if trainer.local_rank == 0:
                self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                refuse_others(self._directory, alone=True)  # on other nodes it may have been there
                atexit.register(shutil.rmtree, self._directory, ignore_errors=True)
                self.restored = unpack(self._file, self._directory)
                if UNSEALED in self.restored.reason:
                    rank_zero_warn(self.restored.reason)
            self.restored = trainer.strategy.broadcast(self.restored)
            self._known = set(contents(self._directory)) if self._directory.is_dir() else set()
        trainer.strategy.barrier("warm start")
        return self._directory

    def _pack(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or self._directory is None:
            return
        found = set(contents(self._directory))
        if found <= self._known:
            return
        self._known = found
        try:
            pack(self._file, self._directory)
        except (AccelError, OSError) as error:
            rank_zero_warn(
                explain(
                    "the compile cache was not packed, so the next run starts cold",
                    str(error),
                    "give WarmStart a `path` that can be written",
                )
            )

    def _tell(self) -> None:
        loaded, compiled = self.totals.values()
        if not loaded + compiled:
            rank_zero_warn(
                explain(
                    "WarmStart had no effect",
                    "inductor compiled nothing and loaded nothing in this run",
                    "add BlockCompile() to `callbacks`, or take WarmStart out",
                )
            )
        why = f" ({self.restored.reason})" if self.restored.reason else ""
        rank_zero_info(f"WarmStart: {loaded} graphs loaded, {compiled} compiled{why}")


def _beside(trainer: Trainer) -> Path:
    """Return the file beside the checkpoints."""
    savers = (c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint))
    folders = [c.dirpath for c in savers if c.dirpath is not None]
    return Path(folders[0] if folders else trainer.default_root_dir, file_name())


def _count(name: str) -> int:
    return torch._dynamo.utils.counters["inductor"][name]
