"""Public reports about checkpoints, early stopping and resumed fits, put on a fit whose network is pruned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import StructuredPruning, load_from_checkpoint
from lightning_accel.errors import Unsupported

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]

CUT = 2
"""The epoch before which half of the channels go."""


class Classifier(LightningModule):
    """A user's module; its validation loss is what the test says, epoch by epoch."""

    def __init__(self, losses: tuple[float, ...] = (0.3, 0.2, 0.9, 0.8, 0.7, 0.85)) -> None:
        super().__init__()
        self.net = self.build()
        self.losses = losses
        self.trained: list[tuple[int, int]] = []

    def build(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.trained.append((self.current_epoch, batch_idx))
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.losses[self.current_epoch])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


class Interrupt(Callback):
    """What a scheduler, a person or a full disk does in the middle of an epoch."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.current_epoch, batch_idx) == (CUT, 1):
            raise OSError("gone")


Fit = Callable[..., Trainer]


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Fit:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 3, 8, 8, generator=generator)

    def run(module: LightningModule, *callbacks: Callback, ckpt: Any = None, **kw: Any) -> Trainer:
        data = DataLoader(TensorDataset(x, torch.arange(16) % 4), 4)
        given = {"max_epochs": 6, "enable_checkpointing": True, **kw}
        given["callbacks"] = [StructuredPruning(ratio=0.5, when=CUT), *callbacks]
        trainer = Trainer(**{**trainer_kwargs, **given})
        trainer.fit(module, data, data, ckpt_path=ckpt)
        return trainer

    return run


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(n == m and torch.equal(a, b) for (n, a), (m, b) in pairs)


def test_both_keepers_of_one_metric_agree_after_a_resume(fit: Fit, tmp_path: Path) -> None:
    """Lightning#18727: `EarlyStopping` and `ModelCheckpoint` watch one metric and differ after a resume."""

    def callbacks() -> tuple[ModelCheckpoint, EarlyStopping]:
        keep = ModelCheckpoint(tmp_path / "best", "{epoch}", monitor="val_loss", save_last=True)
        return keep, EarlyStopping("val_loss", patience=9)

    whole = callbacks()
    fit(Classifier(), *whole)
    for path in (tmp_path / "best").iterdir():
        path.unlink()
    with pytest.raises(OSError, match="gone"):
        fit(Classifier(), *callbacks(), Interrupt())
    resumed = callbacks()
    fit(Classifier(), *resumed, ckpt=tmp_path / "best" / "last.ckpt")
    for keep, stop in (whole, resumed):
        assert float(keep.best_model_score) == float(stop.best_score) == pytest.approx(0.7)
        assert Path(keep.best_model_path).name == "epoch=4.ckpt"
        assert stop.wait_count == 1


def test_an_interrupted_epoch_is_not_skipped(fit: Fit, tmp_path: Path) -> None:
    """Lightning#5325: interrupted within an epoch, `last.ckpt` resumes at the next one."""
    keep = ModelCheckpoint(tmp_path, save_last=True)
    torch.manual_seed(0)
    whole = Classifier()
    fit(whole)
    torch.manual_seed(0)
    with pytest.raises(OSError, match="gone"):
        fit(Classifier(), keep, Interrupt())
    resumed = Classifier()
    fit(resumed, ModelCheckpoint(tmp_path, save_last=True), ckpt="last")
    assert resumed.trained == [(epoch, i) for epoch in range(CUT, 6) for i in range(4)]
    assert same(resumed, whole)


def test_a_finished_fit_that_is_run_again_stays_as_it_is(fit: Fit, tmp_path: Path) -> None:
    """Lightning#4184: resumed from the end, a fit writes another checkpoint, of an epoch that never was."""
    first = Classifier()
    fit(first, ModelCheckpoint(tmp_path, "{epoch}", save_last=True))
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = Classifier()
    fit(again, ModelCheckpoint(tmp_path, "{epoch}", save_last=True), ckpt=tmp_path / "last.ckpt")
    assert not again.trained and same(again, first)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("weights", [True, False])
def test_the_file_of_a_pruned_network_loads_in_a_fresh_one(
    fit: Fit, tmp_path: Path, weights: bool
) -> None:
    """jacobgil/pytorch-pruning#26, VainF/Torch-Pruning#436: size mismatches when a pruned file is loaded."""
    module = Classifier()
    fit(module).save_checkpoint(tmp_path / "end.ckpt", weights_only=weights)
    with pytest.raises(RuntimeError, match="size mismatch"):
        Classifier.load_from_checkpoint(tmp_path / "end.ckpt")
    loaded = load_from_checkpoint(Classifier, tmp_path / "end.ckpt")
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(loaded.net.eval()(x), module.net.eval()(x))
    assert loaded.net[0].out_channels == 4  # type: ignore[index]


def test_every_file_in_a_folder_of_two_sizes_loads(fit: Fit, tmp_path: Path) -> None:
    """ucl-bug/helmnet#21: one training leaves files of two sizes, and only some of them load."""
    fit(Classifier(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1))
    sizes = {}
    for path in tmp_path.iterdir():
        sizes[path.stem] = load_from_checkpoint(Classifier, path).net[0].out_channels  # type: ignore[index]
    dense = {f"epoch={epoch}": 8 for epoch in range(CUT)}
    assert sizes == dense | {f"epoch={epoch}": 4 for epoch in range(CUT, 6)} | {"epoch=2-cut": 4}


class Lazily(Classifier):
    def build(self) -> nn.Module:
        return nn.Sequential(
            nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)
        )


class Seen(Lazily):
    def build(self) -> nn.Module:
        net = super().build()
        net(torch.zeros(2, 3, 8, 8))
        return net


def test_a_file_of_a_lazy_network_says_what_it_needs(fit: Fit, tmp_path: Path) -> None:
    """Lightning#12173: `load_from_checkpoint` of a module with lazy layers finds shapes that do not match."""
    module = Lazily()
    fit(module).save_checkpoint(tmp_path / "end.ckpt")
    with pytest.raises(
        Unsupported, match=r"loading a pruned network.*lazy layers.*run the network"
    ):
        load_from_checkpoint(Lazily, tmp_path / "end.ckpt")
    loaded = load_from_checkpoint(Seen, tmp_path / "end.ckpt")
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(loaded.net.eval()(x), module.net.eval()(x))
