"""Beginners' mistakes: each ends in what was wrong, what was found and what to do, before anything is trained."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_accel as la
from lightning_accel.pruning import prune

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.1)


class WithoutOptimizer(Net):
    def configure_optimizers(self) -> Any:
        return None


def trainer(*callbacks: Any, **given: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    given = {"max_epochs": 2, "accelerator": "cpu", "enable_model_summary": False, **given}
    return Trainer(callbacks=list(callbacks), **quiet, **given)


def fit(*callbacks: Callback, model: Any = None, **given: Any) -> None:
    model = Net() if model is None else model
    before = copy.deepcopy(model.state_dict())
    data = DataLoader(TensorDataset(torch.randn(8, 4), torch.zeros(8)), 4)
    try:
        trainer(*callbacks, **given).fit(model, data)
    finally:
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


PRUNE = {"ratio": 0.5, "when": 1}
MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "a percentage": (lambda: la.StructuredPruning(ratio=50, when=1), "`ratio` is a number"),
    "a word for a number": (lambda: la.StructuredPruning(ratio="half", when=1), "'half'"),  # type: ignore[arg-type]
    "an epoch that is never reached": (
        lambda: fit(la.StructuredPruning(ratio=0.5, when=10)),
        "prune at epoch 1 at the latest",
    ),
    "counted from one": (
        lambda: fit(la.StructuredPruning(ratio=0.5, when=2)),
        "epoch 2, counted from 0",
    ),
    "a plugin among callbacks": (
        lambda: fit(la.AutocastPrecision("bf16-mixed")),  # type: ignore[arg-type]
        "a precision plugin is no callback",
    ),
    "an old name of a precision": (lambda: la.AutocastPrecision("fp16"), "'16-mixed'"),
    "two precisions": (
        lambda: fit(la.UsePrecision(la.AutocastPrecision("bf16-mixed")), precision="bf16-mixed"),
        "computes in one precision",
    ),
    "the same callback twice": (
        lambda: fit(la.StructuredPruning(**PRUNE), la.StructuredPruning(**PRUNE)),
        "prune the same layers",
    ),
    "a teacher that is not there": (
        lambda: fit(la.Distillation("nothing.ckpt")),
        "no such checkpoint of the teacher",
    ),
    "a layer that is not there": (
        lambda: fit(la.StructuredPruning(**PRUNE, select="encoder.*")),
        "the modules net, net.0",
    ),
    "a format of memory by another name": (lambda: fit(la.MemoryFormat("nhwc")), "nhwc"),
    "a function for a class": (
        lambda: la.load_from_checkpoint(Net, Path("nowhere.ckpt")),
        "no such checkpoint",
    ),
    "an object for a class": (
        lambda: la.load_from_checkpoint(Net(), "nowhere.ckpt"),  # type: ignore[type-var]
        "Do: pass the class",
    ),
    "no example": (lambda: prune(Net().net, ratio=0.5), "what the network takes"),
    "no goal": (lambda: prune(Net().net, example=torch.ones(1, 4)), "`ratio` or `target`"),
    "seven bits": (
        lambda: la.quantize(Net(), calibration=[torch.ones(2, 4)], weights="int7"),  # type: ignore[arg-type]
        "'int8', 'int4'",
    ),
    "quantized after the end": (
        lambda: fit(la.QuantizationAwareTraining(when=5)),
        "quantize from epoch 1 at the latest",
    ),
    "labels in an example": (
        lambda: la.deploy(Net(), (torch.ones(4, 4), torch.zeros(4)), to="never"),
        "the model has to run on the example",
    ),
    "no example at all": (lambda: la.deploy(Net(), None, to="never"), "`example` holds tensors"),
    "an unknown format": (
        lambda: la.deploy(Net(), torch.ones(4, 4), to="never", formats="tflite"),
        "'onnx'",
    ),
    "an unknown technique": (lambda: la.AutoTune(techniques="warp"), "pass some of 'precision'"),
    "float8 without a GPU": (lambda: fit(la.Float8Linear()), "float8 needs a GPU"),
    "all of the memory": (lambda: la.ActivationBudget(50), "`budget` is a number"),
    "no optimizer": (
        lambda: fit(la.StructuredPruning(**PRUNE), model=WithoutOptimizer()),
        "`configure_optimizers` gave none",
    ),
    "a number for a teacher": (
        lambda: la.Distillation(teacher=3),  # type: ignore[arg-type]
        "teacher",
    ),
    "a loss by another name": (lambda: la.Distillation("ema", "kldiv"), "kldiv"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_a_mistake_says_what_was_found_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make, said = MISTAKES[mistake]
    with pytest.raises(Exception, match=re.escape(said)) as caught:
        make()
    assert re.search(r"Found: .+ Do: .+\.$", str(caught.value), re.DOTALL), str(caught.value)
    assert not list(tmp_path.iterdir())
