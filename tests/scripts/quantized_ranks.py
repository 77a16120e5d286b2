"""Two processes train quantized layers beside one that gets their batches whole: `quantized_ranks.py FOLDER`."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from results import write_results
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_accel as la
from lightning_accel.quantization import quantization_of

warnings.simplefilter("ignore")
torch.set_num_threads(1)
RANK = int(os.environ.get("LOCAL_RANK", "0"))
FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
_X = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(1))


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch), batch.abs().argmax(1) // 2)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(world: int, *callbacks: Any, strategy: Any = "ddp", to: str = "") -> dict[str, Any]:
    """Train; with `to`, deploy at the end, and answer from the files too."""
    deploys = la.Deploy(FOLDER / to, formats=["export"], budget_s=0.02)
    torch.manual_seed(0)
    module = Module()
    mine = _X if world == 1 else _X.unflatten(1, (2, 4))[:, RANK]
    trainer = Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy if world > 1 else "auto",
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[*callbacks, *([deploys] if to else [])],
    )
    trainer.fit(module, DataLoader([*mine], batch_size=None))
    state = quantization_of(module)
    return {
        "ranges": {name: layer["range"] for name, layer in state.items()},
        "scales": [
            layer["scale"].tolist() for layer in state.values() if layer["scale"] is not None
        ],
        "weights": [p.detach().tolist() for p in module.parameters()],
        "deployed": deploys.bundle and deploys.bundle.predict(_X[0]).tolist(),
        "answers": module.net(_X[0]).tolist() if world == 1 else None,
    }


def trained() -> dict[str, Any]:
    """Ranges are those of all processes' batches."""
    both = fit(2, la.QuantizationAwareTraining(when=1, momentum=0.3), to="ddp")
    return {"alone": fit(1, la.QuantizationAwareTraining(when=1, momentum=0.3)), "ranks": both}


def learned() -> dict[str, Any]:
    """Scales move by the mean of all processes' gradients."""

    def learns() -> Any:
        return la.QuantizationAwareTraining("int2", scales="learned", when=1, momentum=0.3)

    return {"alone": fit(1, learns()), "ranks": fit(2, learns(), to="learned")}


def after() -> dict[str, Any]:
    """All processes end with the quantization of the first."""
    return {"ranks": fit(2, la.PostTrainingQuantization("int4", None))}


def sharded() -> dict[str, Any]:
    """Layers see whole weights, in a fit that prunes too."""

    def both() -> list[Any]:
        return [
            la.QuantizationAwareTraining(when=1, momentum=0.3),
            la.StructuredPruning(ratio=0.5, when=2, compensate=False),
        ]

    ranks = fit(2, *both(), strategy="accel_fsdp", to="fsdp")
    return {"alone": fit(1, *both()), "ranks": ranks}


def failed() -> dict[str, Any]:
    """What cannot be quantized is told by all processes, and none waits for another."""
    try:
        fit(2, la.PostTrainingQuantization("int4", None, group=5))
    except la.errors.NoEffect as error:
        return {"told": str(error)[:40]}
    return {}


if __name__ == "__main__":
    functions = {
        "trained": trained,
        "learned": learned,
        "after": after,
        "sharded": sharded,
        "failed": failed,
    }
    write_results(functions, [], FOLDER / f"{RANK}.json")
