"""Distil in one process or in two: `ddp_distill.py FOLDER CASE DEVICES`, the student's weights as JSON per rank."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from lightning_accel import Distillation, StructuredPruning
from lightning_accel.distillation import Schedule, Teacher

warnings.simplefilter("ignore")
torch.set_num_threads(1)

BATCH, STEPS = 8, 4
MAPS = ("fitnet", "attention_transfer", "rkd", "similarity_preserving", "crd")


def vector(student: Tensor, teacher: Tensor) -> Tensor:
    """Stand for a user's own loss."""
    return (student - teacher).square().mean()


CASES: dict[str, Any] = {
    **{
        name: {name: {"weight": 1.0}}
        for name in ("kd", "logit_standardized_kd", "dkd", "dist", "jsd")
    },
    **{name: {name: {"layers": "hidden", "weight": 1.0}} for name in MAPS},
    "own": {"own": {"loss": vector, "weight": 1.0}},
    "late": {
        "fitnet": {"layers": "hidden", "weight": Schedule(0.0, 1.0, over=1, unit="step", delay=2)}
    },
}
for extra in ("accumulate", "manual", "clip", "masked", "cache", "ema", "prune", "self"):
    CASES[extra] = {"kd": 1.0, **CASES["fitnet"], **CASES["crd"]}
CASES["ema"] = {"kd": 1.0}
CASES["masked"] = {name: CASES[name][name] for name in ("jsd", "kd", "dist", "dkd")}


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(6, width), nn.Tanh())
        self.middle, self.head = nn.Linear(width, width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.hidden(x))))


class Rows(LightningModule):
    """The user's loss is a mean over rows of equal number, so that gradients average to one process's."""

    def __init__(self, case: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.case = Net(8), case
        self.automatic_optimization = case != "manual"

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), torch.zeros(4))
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2, weight_decay=0.1, eps=1e-3)


class Halves(Sampler[list[int]]):
    """Give each rank its half of every batch, in order."""

    def __init__(self, rank: int, devices: int) -> None:
        self.rank, self.devices = rank, devices

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Any:
        size = BATCH // self.devices
        for step in range(STEPS):
            start = step * BATCH + self.rank * size
            yield list(range(start, start + size))


def batches(case: str, rank: int, devices: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    tokens = (5,) if case in ("masked", "attention_transfer") else ()
    shape = (BATCH * STEPS, *tokens, 6)
    x = torch.randn(shape, generator=generator)
    y = torch.randint(0, 4, shape[:-1], generator=generator)
    if case == "masked":
        y[torch.rand(y.shape, generator=generator) < 0.4] = -100
        y[: BATCH // 2] = -100  # one process of the first step has nothing that counts
    return DataLoader(TensorDataset(x, y), batch_sampler=Halves(rank, devices))


def callbacks(folder: Path, case: str) -> list[Any]:
    torch.manual_seed(1)
    source = {"ema": "ema", "self": "self"}.get(case, Net(12))
    if isinstance(source, Net):
        source.head.weight.data *= 10  # speaks clearly
    settings = {"cache": folder / "cache"} if case == "cache" else {}
    settings |= {"ema_decay": 0.5} if case == "ema" else {}
    teacher = Teacher(source, precision="32-true")
    distillation = Distillation(teacher, CASES[case], task_weight=0.5, **settings)
    # Solved on the batches of one rank, weights would differ from those solved on all.
    pruning = StructuredPruning(ratio=0.5, when=1, compensate=False)
    prune = [pruning] if case in ("prune", "self") else []
    return [*prune, distillation]


def fit(folder: Path, case: str, devices: int, ckpt: str | None = None) -> dict[str, Any]:
    strategy = DDPStrategy(process_group_backend="gloo") if devices > 1 else "auto"
    saved = ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}")
    used = callbacks(folder, case)
    trainer = Trainer(
        accelerator="cpu", devices=devices, max_epochs=2, logger=False, enable_progress_bar=False,
        enable_model_summary=False, strategy=strategy, callbacks=[*used, saved],
        use_distributed_sampler=False, default_root_dir=folder,
        accumulate_grad_batches=2 if case == "accumulate" else 1,
        gradient_clip_val=0.05 if case == "clip" else None,
    )  # fmt: skip
    model = Rows(case)
    rank = trainer.global_rank
    trainer.fit(model, batches(case, rank, devices), ckpt_path=ckpt)
    heads = used[-1].engine.heads
    return {
        "weights": {name: p.tolist() for name, p in model.state_dict().items()},
        "heads": {name: p.tolist() for name, p in heads.state_dict().items()},
        "logged": {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name != "distillation/hit_rate"  # a resumed fit finds what the first one kept
        },
    }


if __name__ == "__main__":
    folder, devices = Path(sys.argv[1]), int(sys.argv[3])
    results = {}
    for case in sys.argv[2].split(","):
        results[case] = fit(folder / case / str(devices), case, devices)
        if devices > 1:
            last = str(folder / case / str(devices) / "epoch=0.ckpt")
            results[f"{case} resumed"] = fit(folder / case / "resumed", case, devices, last)
    rank = torch.distributed.get_rank() if devices > 1 else 0
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
