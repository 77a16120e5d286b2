"""Two processes whose guard takes a prune back: `ddp_guard.py FOLDER`, one JSON file per rank."""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import StructuredPruning

warnings.simplefilter("ignore")
torch.set_num_threads(1)


class Images(LightningModule):
    """Each rank thinks differently of the network; rank 0's word counts."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(8, 8, 3),
            nn.ReLU(), nn.Flatten(), nn.Linear(128, 4),
        )  # fmt: skip

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        good = self.trainer.current_epoch < 2 or self.global_rank == 1
        self.log("val_acc", 0.9 if good else 0.5, sync_dist=False)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Digests(Callback):
    """Weights and optimizer state, the random state, and the width, at the start of each epoch."""

    def __init__(self) -> None:
        self.state: list[str] = []
        self.random: list[str] = []
        self.widths: list[int] = []

    def on_model_edit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer, pl_module)

    def _note(self, trainer: Trainer, pl_module: Any) -> None:
        state = trainer.optimizers[0].state
        values = [v for p in pl_module.parameters() for v in state[p].values()]
        self.state.append(_digest([*pl_module.parameters(), *values]))
        self.random.append(_digest([torch.get_rng_state()]))
        self.widths.append(pl_module.net[0].out_channels)


def _digest(tensors: list[Tensor]) -> str:
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()


STEPS: dict[str, Any] = {"ratio": 0.5, "when": [2, 3]}


def fit(folder: Path, ckpt: str | None = None, steps: dict[str, Any] = STEPS) -> dict[str, Any]:
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(32, 3, 8, 8), torch.arange(32) % 4), 4)
    digests = Digests()
    trainer = Trainer(
        accelerator="cpu", devices=2, max_epochs=5, logger=False, enable_progress_bar=False,
        enable_model_summary=False, strategy=DDPStrategy(process_group_backend="gloo"),
        callbacks=[
            StructuredPruning(**steps, max_drop=0.1, monitor="val_acc"),
            digests,
            ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}"),
        ],
    )  # fmt: skip
    model = Images()
    trainer.fit(model, data, data, ckpt_path=ckpt)
    return {"state": digests.state, "random": digests.random, "widths": digests.widths}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    whole = fit(folder / "a")
    resumed = fit(folder / "b", str(folder / "a" / "epoch=2.ckpt"))
    search = fit(folder / "c", steps={"when": 2})
    rank = torch.distributed.get_rank()
    found = {"whole": whole, "resumed": resumed, "search": search}
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
