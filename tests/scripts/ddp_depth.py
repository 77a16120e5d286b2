"""Two processes take whole blocks out in mid-training, and resume: `ddp_depth.py FOLDER`, one JSON line per rank."""

from __future__ import annotations

import copy
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
from lightning_accel.pruning import Params
from lightning_accel.surgery.bypass import Bypass

warnings.simplefilter("ignore")
torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.BatchNorm1d(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), *[Block() for _ in range(4)], nn.Linear(8, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Digests(Callback):
    """Weights, optimizer state and a moving copy of the network after each epoch and each prune."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.target = copy.deepcopy(pl_module.net).requires_grad_(False)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        pairs = zip(self.target.parameters(), pl_module.net.parameters(), strict=True)
        for slow, parameter in pairs:
            slow.data.lerp_(parameter.detach(), 0.5)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = trainer.optimizers[0].state
        values = [v for p in pl_module.parameters() for v in state[p].values()]
        tensors = [*pl_module.parameters(), *values, *self.target.parameters()]
        digest = hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors))
        self.seen.append(digest.hexdigest())

    def state_dict(self) -> dict[str, Any]:
        return {"target": self.target.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.target.load_state_dict(state["target"])


def fit(folder: Path, ckpt: str | None = None) -> tuple[list[str], list[int]]:
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(32, 8), torch.arange(32) % 4), 4)
    digests = Digests()
    trainer = Trainer(
        accelerator="cpu", devices=2, max_epochs=4, logger=False, enable_progress_bar=False,
        enable_model_summary=False, strategy=DDPStrategy(process_group_backend="gloo"),
        callbacks=[
            StructuredPruning(target=Params(0.4), depth=True, when=[1, 2], compensate=False),
            digests,
            ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}"),
        ],
    )  # fmt: skip
    model = Net()
    trainer.fit(model, data, ckpt_path=ckpt)
    return digests.seen, [n for n, one in enumerate(model.net) if isinstance(one, Bypass)]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    whole, gone = fit(folder / "a")
    resumed, _ = fit(folder / "b", str(folder / "a" / "epoch=1.ckpt"))
    rank = torch.distributed.get_rank()
    found = {"whole": whole, "resumed": resumed, "gone": gone}
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
