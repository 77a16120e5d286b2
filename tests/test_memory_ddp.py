"""Two processes over gloo: checkpointing and budgets leave the weights as they were, and ranks agree.

As a script, this file is what the two processes run.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import BlockCompile
from lightning_accel.memory import ActivationBudget, ActivationCheckpointing

pytestmark = [pytest.mark.ddp, pytest.mark.slow]


def test_two_processes_train_what_they_train_without(tmp_path: Path) -> None:
    status, printed = forks.run_ranks(Path(__file__), str(tmp_path), cwd=tmp_path)
    assert status == 0, printed[-3000:]
    zero, one = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert zero == one
    weights = zero["weights"]
    assert weights["full"] == weights["selective"] == weights["plain"]
    assert weights["auto"] == weights["half"] == weights["compiled"]
    assert zero["auto"]["budget"] < 1.0  # the rank with less room decides
    assert zero["half"]["kept"] < 0.75 * zero["half"]["plain"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.norm(self.up(x))).sin().cos())


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*[Block() for _ in range(2)], nn.Linear(8, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


def run(*callbacks: Callback) -> list[float]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Module()
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    torch.manual_seed(3)
    trainer.fit(model, DataLoader(TensorDataset(x, torch.arange(64) % 4), 16))
    return [float(p.detach().double().sum()) for p in model.parameters()]


def compiled() -> BlockCompile:
    return BlockCompile(select="net.*", backend="aot_eager_decomp_partition")


def main(folder: str) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ.get("LOCAL_RANK", 0))
    half = ActivationBudget(0.5)
    auto = ActivationBudget("auto", limit_bytes=7_000 if rank else 10**9)
    weights = {
        "plain": run(),
        "full": run(ActivationCheckpointing()),
        "selective": run(ActivationCheckpointing(policy="selective")),
        "compiled": run(compiled()),
        "half": run(half, compiled()),
        "auto": run(auto, compiled()),
    }
    assert half.savings is not None and auto.savings is not None
    found = {
        "weights": weights,
        "half": {"kept": half.savings.kept_bytes, "plain": half.savings.plain_bytes},
        "auto": {"budget": auto.savings.budget, "plain": auto.savings.plain_bytes},
    }
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
