"""Two processes prune in mid-training, and resume: `ddp_prune.py FOLDER IMPORTANCE`, one JSON line per rank."""

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
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
            nn.ReLU(), nn.Flatten(), nn.Linear(128, 4),
        )  # fmt: skip

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Digests(Callback):
    """Weights and optimizer state of this rank after each epoch, and after a prune the buffers too.

    (Between two forwards of DDP, batch-norm buffers of ranks other than 0 are their own.)
    """

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = trainer.optimizers[0].state
        values = [v for p in pl_module.parameters() for v in state[p].values()]
        self._note([*pl_module.parameters(), *values])

    def on_model_edit_end(self, trainer: Trainer, pl_module: LightningModule, _: Any) -> None:
        self._note(list(pl_module.state_dict().values()))

    def _note(self, tensors: list[Tensor]) -> None:
        digest = hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors))
        self.seen.append(digest.hexdigest())


def fit(folder: Path, importance: str, find_unused: bool, ckpt: str | None = None) -> Digests:
    torch.manual_seed(0)
    x = torch.randn(32, 3, 8, 8)
    data = DataLoader(TensorDataset(x, torch.arange(32) % 4), 4)
    digests = Digests()
    trainer = Trainer(
        accelerator="cpu", devices=2, max_epochs=4, logger=False, enable_progress_bar=False,
        enable_model_summary=False,
        strategy=DDPStrategy(process_group_backend="gloo", find_unused_parameters=find_unused),
        callbacks=[
            StructuredPruning(ratio=0.5, when=[1, 2], importance=importance),
            digests,
            ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}"),
        ],
    )  # fmt: skip
    model = Images()
    trainer.fit(model, data, ckpt_path=ckpt)
    assert model.net[0].out_channels == 4
    assert isinstance(trainer.strategy.model, LightningModule) or trainer.strategy.model is None
    return digests


if __name__ == "__main__":
    folder, importance, find_unused = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "unused"
    whole = fit(folder / "a", importance, find_unused)
    resumed = fit(folder / "b", importance, find_unused, str(folder / "a" / "epoch=1.ckpt"))
    from_cut = fit(folder / "c", importance, find_unused, str(folder / "a" / "epoch=2-cut.ckpt"))
    rank = torch.distributed.get_rank()
    (folder / f"rank{rank}.json").write_text(
        json.dumps({"whole": whole.seen, "resumed": resumed.seen, "from_cut": from_cut.seen})
    )
