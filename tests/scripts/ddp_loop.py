"""Two processes, one of which gets a SIGTERM: `ddp_loop.py FOLDER WHO WHEN EVERY`, a JSON file per rank.

WHO is the rank that is signalled (-1: none), WHEN the batch after which, EVERY the argument of `LeanLoop`
(0: without it).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel.loop import LeanLoop

warnings.simplefilter("ignore")
torch.set_num_threads(1)


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("synced", loss, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", nn.functional.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Witness(Callback):
    """Signals its own process, and counts the collectives that Python starts."""

    def __init__(self, who: int, when: int) -> None:
        self.who, self.when, self.counts, self.steps = who, when, {}, []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        for name in ("broadcast", "all_reduce"):
            self._count(name)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.steps.append(trainer.global_step)
        if trainer.global_rank == self.who and trainer.global_step == self.when:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.bar = dict(trainer.progress_bar_metrics)

    def _count(self, name: str) -> None:
        own = getattr(distributed, name)
        self.counts[name] = 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.counts[name] += 1
            return own(*args, **kwargs)

        setattr(distributed, name, counted)


if __name__ == "__main__":
    folder, (who, when, every) = Path(sys.argv[1]), map(int, sys.argv[2:])
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(240, 8), torch.arange(240) % 4), 2)
    witness = Witness(who, when)
    trainer = Trainer(
        accelerator="cpu", devices=2, max_epochs=2, logger=CSVLogger(folder, "log", "0"),
        enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=10, strategy=DDPStrategy(process_group_backend="gloo"),
        callbacks=[
            *([LeanLoop(sigterm_every_n_steps=every)] if every else []), witness,
            OnExceptionCheckpoint(folder, "last"),
        ],
    )  # fmt: skip
    model, left = Net(), False
    try:
        trainer.fit(model, data, DataLoader(data.dataset, 20))
    except SIGTERMException:
        left = True
    found = {
        "left": left, "steps": witness.steps, "counts": witness.counts,
        "weights": model.net.weight.tolist(), "bar": getattr(witness, "bar", None),
        "received": trainer.received_sigterm,
    }  # fmt: skip
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(found))
