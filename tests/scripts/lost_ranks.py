"""Fits in which a process is lost: `lost_ranks.py FOLDER HOW RANK STRATEGY`, or `... FOLDER restart` for a try that `torchrun` starts anew.

HOW is a signal's name, `error`, `long` or `caught`; it comes in the tenth step, `error` and `long` in the first validation, and what should
be said of it is written to `expected`. After an error that is `caught` the process begins another fit, which the others do not.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import RankWatch
from lightning_accel.errors import AccelError
from lightning_accel.parallel import restarts
from lightning_accel.parallel.watch import attendance

FOLDER = Path(sys.argv[1])
TIMEOUT_S = 1.5


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]).pow(2).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.net(batch[0]).pow(2).mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


class Ends(Callback):
    """Ends or stops a process."""

    def __init__(self, how: str, rank: int) -> None:
        self.how, self.rank, self.waited = how, rank, False

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step != 9 or trainer.global_rank != self.rank:
            return
        (FOLDER / "expected").write_text(
            f"rank {self.rank} (process {os.getpid()} on {socket.gethostname()})"
        )
        if self.how == "caught":
            raise ValueError("of the user's own")
        if self.how.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, self.how))

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_rank == self.rank and self.how == "error":
            raise ValueError("of the user's own")
        if trainer.global_rank == self.rank and self.how == "long" and not self.waited:
            self.waited = threading.Event().wait(2 * TIMEOUT_S) or True


class Names(Callback):
    """Notes the name that the group of a try has."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (name,) = restarts._NAMED
        place = f"name {os.environ['TORCHELASTIC_RESTART_COUNT']} {trainer.global_rank}"
        (FOLDER / place).write_text(name)


def fit(strategy: str, *callbacks: Callback) -> None:
    """Fit from the last checkpoint, if there is one, and write what became of the weights."""
    torch.manual_seed(0)
    module = Net().double()
    rows = torch.randn(64, 8, dtype=torch.float64)
    saver = ModelCheckpoint(FOLDER, every_n_train_steps=4, save_last=True)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=3, logger=False,
        num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks, saver],
    )  # fmt: skip
    data = DataLoader(TensorDataset(rows), 4)
    trainer.fit(module, data, data if sys.argv[2] in ("error", "long") else None, ckpt_path="last")
    if trainer.is_global_zero:
        total = sum(float(p.detach().sum()) for p in module.parameters())
        (FOLDER / "sum").write_text(repr(total))


def one_try() -> None:
    """Fit in a process that `torchrun` started; the first time one is killed."""
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    fit("accel_ddp", Names(), *([Ends("SIGKILL", 1)] if first else []))


if __name__ == "__main__":
    if sys.argv[2] == "restart":
        config = LaunchConfig(
            1, 1, 2, max_restarts=1, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
            start_method="fork", monitor_interval=0.1,
        )  # fmt: skip
        elastic_launch(config, one_try)()
    elif sys.argv[2] == "caught":
        attendance._PATIENCE_S = 2.0
        try:
            fit(sys.argv[4], Ends("caught", int(sys.argv[3])))
        except ValueError:
            try:
                fit(sys.argv[4])
            except AccelError as error:
                (FOLDER / "second").write_text(str(error))
                raise
    elif sys.argv[2] == "nothing":
        fit(sys.argv[4])
    else:
        fit(sys.argv[4], Ends(sys.argv[2], int(sys.argv[3])), RankWatch(TIMEOUT_S))
