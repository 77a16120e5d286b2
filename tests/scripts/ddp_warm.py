"""Train compiled with WarmStart, and write what each rank loaded and compiled: `ddp_warm.py FOLDER DEVICES [ERROR]`.

The caller gives each run a fresh TORCHINDUCTOR_CACHE_DIR, so that only the packed file can be warm.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel.compilation import BlockCompile, WarmStart

warnings.simplefilter("ignore")
torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.fc(self.norm(x)))


class Rows(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(Block(), Block(), nn.Linear(16, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Fail(Callback):
    """Die in mid-epoch, as a preempted job does."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 2:
            raise RuntimeError("preempted")


def main(folder: Path, devices: int, fail: bool) -> None:
    torch.manual_seed(0)
    user, warm, edit = Rows(), WarmStart(folder / "compiled.zip"), BlockCompile()
    x = torch.randn(32, 16)
    own = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[warm, edit, *([Fail()] if fail else [])],
    )
    try:
        trainer.fit(user, DataLoader(TensorDataset(x, x.argmax(1) % 4), 4))
    except RuntimeError as error:
        if "preempted" not in str(error):
            raise
    result = {
        **warm.totals,
        "graphs": edit.totals["graphs"],
        "restored": warm.restored.num_files,
        "reason": warm.restored.reason,
        "undone": os.environ["TORCHINDUCTOR_CACHE_DIR"] == own,
        "elsewhere": len(list(Path(own).rglob("*.so"))),
        "built": len(list(Path(warm._directory or own).rglob("*.so"))),
        "weights": float(sum(p.detach().double().sum() for p in user.parameters())),
    }
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), "ERROR" in sys.argv[3:])
