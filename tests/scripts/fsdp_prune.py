"""Two processes prune before they shard, train, and resume: `fsdp_prune.py FOLDER fsdp|tp`, a JSON per rank."""

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
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel.pruning import Macs, prune_before_sharding
from lightning_accel.surgery.call import Call

warnings.simplefilter("ignore")
torch.set_num_threads(1)


class Rows(LightningModule):
    def __init__(self, kind: str, ckpt_path: str | None = None) -> None:
        super().__init__()
        # Another seed per rank, as a careless user has it: rank 0 must decide for all.
        torch.manual_seed(int(os.environ.get("LOCAL_RANK", 0)) if kind == "fsdp" else 0)
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        self.kind, self.ckpt_path = kind, ckpt_path
        self.receipts: list[bool] = []

    def configure_model(self) -> None:
        receipt = prune_before_sharding(
            self,
            example=Call("net", (torch.randn(4, 8),), {}),
            ckpt_path=self.ckpt_path,
            **({"target": Macs(0.5)} if self.kind == "fsdp" else {"ratio": 0.5, "round_to": 2}),
        )
        self.receipts.append(bool(receipt))
        if not receipt:
            return
        if self.kind == "fsdp":
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])
        else:
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def fit(folder: Path, kind: str, ckpt_path: str | None = None) -> dict[str, Any]:
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(32, 8), torch.arange(32) % 4), 4)
    sizes = (2, 1) if kind == "fsdp" else (1, 2)
    trainer = Trainer(
        accelerator="cpu", devices=2, max_epochs=3, logger=False, enable_progress_bar=False,
        enable_model_summary=False,
        strategy=ModelParallelStrategy(*sizes, process_group_backend="gloo"),
        callbacks=[ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}")],
    )  # fmt: skip
    model = Rows(kind, ckpt_path)
    trainer.fit(model, data, ckpt_path=ckpt_path)
    weights = {name: p.full_tensor().tolist() for name, p in model.net.named_parameters()}
    local = model.net[0].weight.to_local().shape[0]
    return {"weights": weights, "receipts": model.receipts, "local": local}


if __name__ == "__main__":
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    whole = fit(folder / "a", kind)
    resumed = fit(folder / "b", kind, str(folder / "a" / "epoch=0.ckpt"))
    rank = torch.distributed.get_rank()
    (folder / f"rank{rank}.json").write_text(json.dumps({"whole": whole, "resumed": resumed}))
    torch.distributed.barrier()  # no rank may close a connection that the other still reads
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(
        0
    )  # gloo's threads abort an orderly exit now and then ("terminate called without ...")
