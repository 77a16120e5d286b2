"""Fits on a device that Lightning does not know: `toy_fits.py LIBRARY OUT.json [NAME...]`, judged by test_devices.py."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry, CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from results import write_results
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toy import device

from lightning_accel import (
    AccelReport,
    ActivationCheckpointing,
    AutocastPrecision,
    Bf16Precision,
    BlockCompile,
    Distillation,
    FastLoading,
    FusedOptimizer,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    SparsityTraining,
    StructuredPruning,
    Teacher,
    UsePrecision,
    WeightMasks,
)
from lightning_accel.devices.torch_accelerator import TorchAccelerator
from lightning_accel.errors import Unsupported
from lightning_accel.pruning import subject
from lightning_accel.pruning.verify import Verifier
from lightning_accel.surgery.call import same_random_state
from lightning_accel.surgery.preserve import preserve_rng
from lightning_accel.surgery.rng import seed_rng

device.start(Path(sys.argv[1]))
ACCEL = {"accelerator": "accel", "devices": 1}


class Module(LightningModule):
    """The user's, untouched; it notes where it computes, and in which format."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny.MLP()
        self.seen: set[str] = set()

    def loss(self, batch: Any) -> Tensor:
        out = self.net(batch[0])
        self.seen.add(f"{batch[0].device} {out.device} {str(out.dtype)[6:]}")
        return F.cross_entropy(out.float(), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def data(batch_size: int = 4) -> DataLoader[Any]:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, torch.arange(16) % 4), batch_size)


PROVED: list[str] = []
"""In which formats cuts were proved."""


class Notes(Verifier):
    """Proves as always."""

    def _take(self, dtype: torch.dtype) -> bool:
        PROVED.append(str(dtype))
        return super()._take(dtype)


subject.Verifier = Notes  # type: ignore[misc]


def weights(module: LightningModule) -> list[float]:
    return torch.cat([p.detach().cpu().flatten() for p in module.parameters()]).tolist()


def fit(**given: Any) -> dict[str, Any]:
    """Return where it was, all weights in order, and what was warned."""
    torch.manual_seed(0)
    module = Module()
    PROVED.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer = Trainer(**{**tiny.silent(Path.cwd()), "accelerator": "auto", **given})
            trainer.fit(module, data(), data())
        except Exception as error:
            return {"raised": f"{type(error).__name__}: {error}"}
    return {
        "seen": sorted(module.seen),
        "root": str(trainer.strategy.root_device),
        "plugin": repr(trainer.precision_plugin),
        "proved": [*PROVED],
        "weights": weights(module),
        "warned": [
            str(w.message)
            for w in caught
            if "this was put right" in str(w.message) or "not used" in str(w.message)
        ],
    }


class Foreign(CPUAccelerator):
    """One of somebody else, registered as Lightning says."""

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device("toy", index) for index in range(devices)]

    def setup_device(self, device: torch.device) -> None:
        assert device.type == "toy"


def foreign() -> dict[str, Any]:
    AcceleratorRegistry.register("foreign", Foreign, override=True)
    return fit(accelerator="foreign", devices=1, precision="bf16-mixed")


def checkpoint() -> dict[str, Any]:
    """Save there, and load on the CPU."""
    torch.manual_seed(0)
    trainer = Trainer(**{**tiny.silent(Path.cwd()), **ACCEL})
    module = Module()
    trainer.fit(module, data())
    trainer.save_checkpoint("toy.ckpt")
    held = torch.load("toy.ckpt", weights_only=True)["state_dict"]
    there = Module()
    there.load_state_dict(held)
    alike = [
        torch.equal(a, b.cpu())
        for a, b in zip(there.parameters(), module.parameters(), strict=True)
    ]
    return {"alike": all(alike), "on": sorted({t.device.type for t in held.values()})}


def not_seen() -> dict[str, Any]:
    """A Trainer that was built without us: its accelerator refuses instead of training elsewhere."""
    trainer = Trainer(**{**tiny.silent(Path.cwd()), **ACCEL})
    trainer.accelerator.settled = False
    trainer.strategy._root_device = torch.device("cpu")
    try:
        trainer.fit(Module(), data())
    except Unsupported as error:
        return {"raised": str(error)}
    return {"raised": ""}


def draws() -> dict[str, Any]:
    """What is tried on copies leaves the device's random states, too, as they were."""
    there, net = torch.get_device_module("toy"), nn.Linear(1, 1).to("toy:1")
    found: dict[str, Any] = {}
    with preserve_rng():
        seed_rng(7)
        found["seeded"] = torch.cat(there.get_rng_state_all()).tolist()
        with same_random_state(net, 3):
            found["of one"] = torch.cat(there.get_rng_state_all()).tolist()
        found["after"] = torch.cat(there.get_rng_state_all()).tolist()
    return found | {"kept": torch.cat(there.get_rng_state_all()).tolist()}


def devices() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for given in (1, 2, "2", -1, "-1", "0,1", "1,", [1], [0, 1], (1,)):
        found[repr(given)] = TorchAccelerator.parse_devices(given)
    for given in (3, 0, -2, "3,", "", "all", None, True, 1.0, [], [0, 0], [2], ["0"], [True]):
        try:
            found[repr(given)] = TorchAccelerator.parse_devices(given)
        except (TypeError, ValueError) as error:
            found[repr(given)] = f"{type(error).__name__}: {error}"
    return found


def taught(losses: Any = "kd") -> Distillation:
    torch.manual_seed(7)
    return Distillation(Teacher(tiny.MLP(32)), losses, student="net")


TECHNIQUES = {
    "masks": lambda: WeightMasks(0.5),
    "prune": lambda: StructuredPruning(0.5, when=1),
    "distill": taught,
    "loading": FastLoading,
    "report": AccelReport,
    "quantize": PostTrainingQuantization,
    "auto": lambda: UsePrecision(AutocastPrecision("bf16-mixed")),
    "reconstruct": lambda: StructuredPruning(
        0.5, when=1, importance="reconstruction", compensate=True
    ),
    "sparsity": lambda: SparsityTraining("group_lasso", strength=1e-3),
    "features": lambda: taught({"rkd": {"layers": "body", "weight": 0.1}}),
    "train quantized": lambda: QuantizationAwareTraining(when=1),
    "optimizer": lambda: FusedOptimizer("for-loop"),
    "recompute": lambda: ActivationCheckpointing(select="net"),
}
FITS = {
    "cpu": lambda: fit(accelerator="cpu"),
    "cpu bf16": lambda: fit(accelerator="cpu", precision="bf16-mixed"),
    "fp32": lambda: fit(**ACCEL),
    "second": lambda: fit(accelerator="accel", devices=[1]),
    "bf16": lambda: fit(**ACCEL, precision="bf16-mixed"),
    "fp16": lambda: fit(**ACCEL, precision="16-mixed"),
    "bf16-true": lambda: fit(**ACCEL, precision="bf16-true"),
    "instance": lambda: fit(accelerator=CPUAccelerator(), precision="bf16-mixed"),
    "foreign": foreign,
    "by itself": lambda: fit(strategy=SingleDeviceStrategy(torch.device("toy", 1)), **ACCEL),
    "ddp": lambda: fit(accelerator="accel", devices=2),
    "no wires": lambda: fit(**ACCEL, strategy="accel_ddp"),
    "compile": lambda: fit(**ACCEL, callbacks=[BlockCompile()]),
    "masters": lambda: fit(**ACCEL, plugins=[Bf16Precision("master")]),
    "checkpoint": checkpoint,
    "not seen": not_seen,
    "draws": draws,
    "devices": devices,
    **{
        f"{name} on {device}": lambda make=make, device=device: fit(
            accelerator=device, callbacks=[make()]
        )
        for name, make in TECHNIQUES.items()
        for device in ("cpu", "accel")
    },
}

if __name__ == "__main__":
    write_results(FITS, sys.argv[3:], Path(sys.argv[2]))
