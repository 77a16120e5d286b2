"""Distil into a sharded student: `fsdp_distill.py FOLDER`, or into a plain one with `--alone`; a JSON per rank."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import Distillation
from lightning_accel.distillation import Teacher
from lightning_accel.errors import AccelError

warnings.simplefilter("ignore")
torch.set_num_threads(1)

WIDE = {"kd": 1.0, "hint": {"loss": "fitnet", "layers": "0", "weight": 1.0}}
EQUAL = {
    "kd": 1.0,
    "hint": {"loss": "fitnet", "layers": "0", "weight": 1.0},
    "similarity_preserving": {"layers": "0", "weight": 1.0},
}


def net(width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 4))


class Rows(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = net(16, 0)

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), torch.zeros(len(batch[0]), 4))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def batches(rank: int, size: int) -> DataLoader[Any]:
    """Give each rank its part of every eight rows, in order."""
    data = TensorDataset(torch.randn(32, 8, generator=torch.Generator().manual_seed(1)))
    starts = range(rank * size, 32, 8)
    return DataLoader(data, batch_sampler=[list(range(i, i + size)) for i in starts])


def fit(folder: Path, losses: Any, width: int, alone: bool, ckpt: str | None = None) -> Any:
    trainer = Trainer(
        accelerator="cpu", devices=1 if alone else 2, max_epochs=3, logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        use_distributed_sampler=False,
        strategy="auto" if alone else ModelParallelStrategy(2, 1, process_group_backend="gloo"),
        callbacks=[
            Distillation(Teacher(net(width, 5), precision="32-true"), losses, task_weight=0.5),
            ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}"),
        ],
    )  # fmt: skip
    model = Rows()
    trainer.fit(
        model, batches(0 if alone else trainer.global_rank, 8 if alone else 4), ckpt_path=ckpt
    )
    weights = {}
    for name, p in model.net.named_parameters():
        weights[name] = (p if alone else p.full_tensor()).tolist()  # type: ignore[operator]
    local = model.net[0].weight.shape[0] if alone else model.net[0].weight.to_local().shape[0]  # type: ignore[operator]
    return {"weights": weights, "local": local}


if __name__ == "__main__":
    folder, alone = Path(sys.argv[1]), "--alone" in sys.argv
    results = {"equal": fit(folder / "a", EQUAL, 16, alone)}
    if alone:
        (folder / "alone.json").write_text(json.dumps(results))
        sys.exit()
    results["resumed"] = fit(folder / "b", EQUAL, 16, alone, str(folder / "a" / "epoch=0.ckpt"))
    try:
        results["wide"] = fit(folder / "c", WIDE, 24, alone)
    except AccelError as error:
        results["wide"] = str(error)
    rank = torch.distributed.get_rank()
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    torch.distributed.barrier()  # no rank may close a connection that the other still reads
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads abort an orderly exit now and then
