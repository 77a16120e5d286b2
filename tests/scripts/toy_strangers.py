"""Reports of users of such devices: `toy_strangers.py LIBRARY OUT.json [NAME...]`, judged by strangers/test_devices_users.py.

The device has no float64, as Apple's.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ["TOY_NO_FLOAT64"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from results import write_results
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from toy import device

from lightning_accel import (
    Distillation,
    LeanLoop,
    QuantizationAwareTraining,
    StructuredPruning,
    Teacher,
    WeightMasks,
)
from lightning_accel.devices.torch_accelerator import register

device.start(Path(sys.argv[1]))
register()


class Module(LightningModule):
    """The user's, with a schedule, a metric with a state, and what it logs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny.MLP()
        self.accuracy = MulticlassAccuracy(4)
        self.where: set[str] = set()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.where.add(str(batch[0].device))
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log_dict({"loss": loss, "half": 0.5 * batch_idx})
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.accuracy(self.net(batch[0]), batch[1])
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def data() -> DataLoader[Any]:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, torch.arange(16) % 4), 4)


def techniques() -> list[Callback]:
    torch.manual_seed(7)
    return [
        StructuredPruning(0.5, when=1),
        WeightMasks(0.1, when=1),
        Distillation(Teacher(tiny.MLP(32), precision="32-true"), student="net"),
        QuantizationAwareTraining(when=1),
        LeanLoop(),
    ]


def fit(folder: str, accelerator: str = "accel", ckpt: str | None = None, **given: Any) -> Any:
    torch.manual_seed(0)
    module = Module()
    saver = ModelCheckpoint(Path(folder), save_top_k=-1, filename="{epoch}")
    callbacks = [*techniques(), saver, *given.pop("callbacks", [])]
    trainer = Trainer(
        **{
            **tiny.silent(Path.cwd()),
            "enable_checkpointing": True,
            "max_epochs": 3,
            "accelerator": accelerator,
            "devices": 1,
            "callbacks": callbacks,
            **given,
        }
    )
    trainer.fit(module, data(), data(), ckpt_path=ckpt)
    return module, trainer


def weights(module: LightningModule) -> list[float]:
    return torch.cat([p.detach().cpu().flatten() for p in module.parameters()]).tolist()


def named() -> dict[str, Any]:
    """The device by its own name, as everybody writes it first."""
    module, _ = fit("named", "toy")
    return {"where": sorted(module.where), "same": weights(module) == weights(fit("again")[0])}


def logs() -> dict[str, Any]:
    """Rates, a metric with a state and plain floats, where all of them would be float64 somewhere."""
    rows = {}
    for accelerator in ("cpu", "accel"):
        logger = CSVLogger(Path.cwd(), accelerator)
        fit(
            f"logs {accelerator}",
            accelerator,
            logger=logger,
            log_every_n_steps=1,
            callbacks=[LearningRateMonitor("step")],
        )
        rows[accelerator] = Path(logger.log_dir, "metrics.csv").read_text()
    return rows


def resumed() -> dict[str, Any]:
    """Stopped after its first or second epoch there, and continued: there, on the other one, and on the CPU."""
    whole, _ = fit("whole")
    found = {"whole": weights(whole)}
    for epoch in (0, 1):
        path = f"whole/epoch={epoch}.ckpt"
        found[f"{epoch} there"] = weights(fit("r", ckpt=path)[0])
        found[f"{epoch} second"] = weights(fit("r", ckpt=path, devices=[1])[0])
        found[f"{epoch} cpu"] = weights(fit("r", "cpu", ckpt=path)[0])
    return found


def files() -> dict[str, Any]:
    """A file of all techniques, for `load_elsewhere` of the test: no device but the CPU may be asked for."""
    module, trainer = fit("files")
    trainer.save_checkpoint("weights.ckpt", weights_only=True)
    return {"weights": weights(module), "folder": str(Path.cwd())}


REPORTS = {
    "sleap_nn_573": named,
    "lightning_20250": logs,
    "pytorch_optimizer_266": resumed,
    "xla_2858": files,
}

if __name__ == "__main__":
    write_results(REPORTS, sys.argv[3:], Path(sys.argv[2]))
