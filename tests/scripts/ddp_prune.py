"""Two processes prune in mid-training, and resume: `ddp_prune.py FOLDER IMPORTANCE`, one JSON line per rank."""

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
from lightning_accel.pruning import TorchPruner

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


class Averages(Callback):
    """Moving averages of a part, by name and as a copy, and whether each prune cut them as their network."""

    def __init__(self) -> None:
        self.right: list[bool] = []

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.named = {n: p.detach().clone() for n, p in pl_module.net.named_parameters()}
        self.part = copy.deepcopy(pl_module.net).requires_grad_(False)

    def tensors(self) -> list[Tensor]:
        return [*self.named.values(), *(p.data for p in self.part.parameters())]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        for held, p in zip(self.tensors(), [*pl_module.net.parameters()] * 2, strict=True):
            held.lerp_(p.detach(), 0.5)

    def on_model_edit_start(self, trainer: Trainer, pl_module: Any) -> None:
        live = dict(pl_module.net.named_parameters())
        copies = dict(self.part.named_parameters())
        both = [(n, t, copies[n].data, live[n].detach()) for n, t in self.named.items()]
        self.before = [(n, *(t.numpy().copy() for t in pair)) for n, *pair in both]

    def on_model_edit_end(self, trainer: Trainer, pl_module: Any, receipt: Any) -> None:
        kept = {move.name: move.kept for move in receipt.moved}
        live = dict(pl_module.net.named_parameters())
        for (name, *before), one, other in zip(
            self.before, self.named.values(), self.part.parameters(), strict=True
        ):
            was, in_copy, weight = map(torch.from_numpy, before)
            if f"net.{name}" in kept:
                take = kept[f"net.{name}"].take
                was, in_copy, weight = take(was), take(in_copy), take(weight)
            added = (
                live[name].detach() - weight
            )  # what was compensated, and is in copies of the module
            self.right.append(
                torch.equal(one, was) and torch.allclose(other, in_copy + added, 0, 1e-6)
            )

    def state_dict(self) -> dict[str, Any]:
        return {"kept": [t.clone() for t in self.tensors()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for held, stored in zip(self.tensors(), state["kept"], strict=True):
            held.copy_(stored)


class Digests(Callback):
    """Weights, averages and optimizer state of this rank after each epoch, and after a prune the buffers too.

    (Between two forwards of DDP, batch-norm buffers of ranks other than 0 are their own.)
    """

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.averages = Averages()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = trainer.optimizers[0].state
        values = [v for p in pl_module.parameters() for v in state[p].values()]
        self._note([*pl_module.parameters(), *values])

    def on_model_edit_end(self, trainer: Trainer, pl_module: LightningModule, _: Any) -> None:
        self._note(list(pl_module.state_dict().values()))

    def _note(self, tensors: list[Tensor]) -> None:
        tensors = [*tensors, *self.averages.tensors()]
        digest = hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors))
        self.seen.append(digest.hexdigest())


def pruning(importance: str) -> StructuredPruning:
    if importance != "torch_pruning":
        return StructuredPruning(ratio=0.5, when=[1, 2], importance=importance)
    options = {"iterative_steps": 2, "reg": 1e-2}
    return StructuredPruning(pruner=TorchPruner("GrowingRegPruner", options=options), when=[1, 2])


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
            pruning(importance),
            digests.averages,
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
        json.dumps(
            {
                "whole": whole.seen,
                "resumed": resumed.seen,
                "from_cut": from_cut.seen,
                "averages": whole.averages.right,
            }
        )
    )
