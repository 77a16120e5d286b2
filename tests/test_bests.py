"""After a cut the best checkpoint, patience and plateaus are those of the network that there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import StructuredPruning

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]

DENSE, PRUNED = 8, 4
"""Channels of the first layer."""


class Told(LightningModule):
    """A user's module whose validation accuracy is what the test says, epoch by epoch."""

    def __init__(self, scores: Sequence[float], plateau: bool = False) -> None:
        super().__init__()
        self.net = tiny.ConvNet()
        self.scores, self.plateau = list(scores), plateau

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", self.scores[min(self.trainer.current_epoch, len(self.scores) - 1)])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("width", float(self.net.stem[0].out_channels))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 1e-2)
        if not self.plateau:
            return optimizer
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", 0.5, patience=1)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "monitor": "val_acc"},
        }


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 3, 8, 8, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(16) % 4), 4)


Fit = Callable[..., Trainer]
BETTER_BEFORE = (0.90, 0.95, 0.50, 0.60)


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Fit:
    def run(model: LightningModule, *callbacks: Callback, ckpt: Any = None, **kw: Any) -> Trainer:
        saves = any(isinstance(c, ModelCheckpoint) for c in callbacks)
        given = {"max_epochs": 4, "enable_checkpointing": saves, **kw}
        trainer = Trainer(**{**trainer_kwargs, **given, "callbacks": list(callbacks)})
        trainer.fit(model, loader(), loader(), ckpt_path=ckpt)
        return trainer

    return run


def pruning(**kw: Any) -> StructuredPruning:
    return StructuredPruning(ratio=0.5, **{"when": 2, **kw})


def width(path: Any) -> int:
    return len(torch.load(path, weights_only=True)["state_dict"]["net.stem.0.weight"])


SETTINGS: dict[str, dict[str, Any]] = {
    "one": {},
    "three": {"save_top_k": 3},
    "all": {"save_top_k": -1},
    "none": {"save_top_k": 0, "save_last": True},
    "last": {"save_last": True},
    "link": {"save_last": "link"},
    "rare": {"every_n_epochs": 3},
    "rare link": {"every_n_epochs": 2, "save_last": "link"},
    "never again": {"every_n_epochs": 2, "save_last": True, "save_on_train_epoch_end": False},
    "steps": {"every_n_train_steps": 3, "save_last": True},
    "every step": {"every_n_train_steps": 1, "save_top_k": 2},
    "time": {"train_time_interval": timedelta(0), "save_last": True},
    "after validation": {"save_on_train_epoch_end": False},
    "one name": {"filename": "best"},
    "overwritten": {"filename": "best", "enable_version_counter": False, "save_last": True},
    "weights": {"save_weights_only": True},
    "unmonitored": {"monitor": None, "mode": "min"},
    "unmonitored rare": {"monitor": None, "mode": "min", "every_n_epochs": 2, "save_last": "link"},
    "in the name": {"filename": "{epoch}-{val_acc:.3f}", "save_last": True},
}


@pytest.mark.parametrize("epochs", [3, 4])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_best_and_the_last_checkpoint_are_of_the_present_network(
    fit: Fit, tmp_path: Path, name: str, epochs: int
) -> None:
    given = {"monitor": "val_acc", "mode": "max", **SETTINGS[name]}
    keep = ModelCheckpoint(tmp_path / "ckpt", **given)
    model = Told(BETTER_BEFORE)
    trainer = fit(model, keep, pruning(), max_epochs=epochs)
    assert model.net.stem[0].out_channels == PRUNED
    assert all(width(path) == PRUNED for path in keep.best_k_models)
    if keep.save_top_k:
        assert width(keep.best_model_path) == PRUNED
        (found,) = trainer.test(model, loader(), ckpt_path="best", verbose=False)
        assert found["width"] == PRUNED
    if keep.save_last:
        assert width(keep.last_model_path) == width(tmp_path / "ckpt" / "last.ckpt") == PRUNED


def test_the_best_is_that_of_the_pruned_epochs_and_the_dense_one_stays(
    fit: Fit, tmp_path: Path
) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="val_acc", mode="max", filename="{epoch}")
    cut = pruning()
    fit(Told((0.9, 0.95, 0.6, 0.5)), cut, keep)
    assert float(keep.best_model_score) == pytest.approx(0.6)
    assert Path(keep.best_model_path).name == "epoch=2.ckpt"
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == ["epoch=1.ckpt", "epoch=2.ckpt"]
    (dense,) = cut.history[0]["bests"]
    assert dense == {
        "monitor": "val_acc", "score": pytest.approx(0.95), "path": str(tmp_path / "epoch=1.ckpt")
    }  # fmt: skip
    assert width(dense["path"]) == DENSE


def test_a_score_from_before_the_cut_is_not_that_of_the_pruned_network(
    fit: Fit, tmp_path: Path
) -> None:
    keep = ModelCheckpoint(
        tmp_path, monitor="val_acc", mode="max", every_n_train_steps=1, save_top_k=2
    )
    stop = EarlyStopping("val_acc", mode="max", patience=9)
    scores = (0.9, 0.95, 0.5, 0.6, 0.7, 0.8)
    model = Told(scores)
    fit(model, keep, stop, pruning(when=3), max_epochs=6, check_val_every_n_epoch=2)
    assert float(keep.best_model_score) == pytest.approx(0.8)
    assert float(stop.best_score) == pytest.approx(0.8)


class Quiet(EarlyStopping):
    """A user's own, with a hook of its own."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)


@pytest.mark.parametrize("kind", [EarlyStopping, Quiet])
@pytest.mark.parametrize("first", [True, False])
def test_patience_starts_anew_at_a_cut(fit: Fit, kind: type[EarlyStopping], first: bool) -> None:
    stop, cut = kind("val_acc", mode="max", patience=2), pruning()
    callbacks = [stop, cut] if first else [cut, stop]
    trainer = fit(Told((0.95, 0.9, 0.5, 0.6, 0.7, 0.7)), *callbacks, max_epochs=6)
    assert trainer.current_epoch == 6
    assert float(stop.best_score) == pytest.approx(0.7)
    stop = kind("val_acc", mode="max", patience=2)
    trainer = fit(Told((0.95, 0.9, 0.5, 0.4, 0.3, 0.7)), stop, pruning(), max_epochs=6)
    assert trainer.current_epoch == 5  # two epochs of the pruned network without a better one


def test_a_plateau_starts_anew_at_a_cut(fit: Fit) -> None:
    scores = (0.95, 0.9, 0.5, 0.6, 0.7, 0.8)
    trainer = fit(Told(scores, plateau=True), pruning(), max_epochs=6)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-2
    trainer = fit(Told(scores, plateau=True), max_epochs=6)
    assert trainer.optimizers[0].param_groups[0]["lr"] < 1e-2  # as without a cut


def test_a_resumed_fit_keeps_the_scores_that_started_anew(fit: Fit, tmp_path: Path) -> None:
    scores = (0.9, 0.95, 0.6, 0.5, 0.55)

    def callbacks() -> list[Any]:
        keep = ModelCheckpoint(tmp_path / "best", monitor="val_acc", mode="max", filename="{epoch}")
        every = ModelCheckpoint(tmp_path / "all", save_top_k=-1, filename="{epoch}")
        return [keep, EarlyStopping("val_acc", mode="max", patience=9), pruning(), every]

    whole = callbacks()
    fit(Told(scores), *whole, max_epochs=5)
    resumed = callbacks()
    fit(Told(scores), *resumed, ckpt=tmp_path / "all" / "epoch=3.ckpt", max_epochs=5)
    for one in (whole, resumed):
        assert Path(one[0].best_model_path).name == "epoch=2.ckpt"
        assert float(one[0].best_model_score) == float(one[1].best_score) == pytest.approx(0.6)
        assert one[1].wait_count == 2
    assert whole[2].history == resumed[2].history


@pytest.mark.parametrize("link", [True, "link"])
@pytest.mark.parametrize("epochs", [4, 6])  # the verdict falls at the end, or in mid-training
def test_a_prune_that_is_taken_back_takes_its_scores_back(
    fit: Fit, tmp_path: Path, epochs: int, link: Any
) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="f1", mode="max", filename="{epoch}", save_last=link)
    stop = EarlyStopping("val_acc", mode="max", patience=9)

    class Scored(Told):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.log("f1", (0.5, 0.6, 0.8, 0.8, 0.55, 0.55)[self.current_epoch])

    guarded = pruning(when=[2, 4][: epochs // 3], max_drop=0.01, monitor="val_acc", patience=2)
    model = Scored((0.9, 0.95, 0.5, 0.5, 0.94, 0.93))
    with pytest.warns(UserWarning, match="taken back"):
        trainer = fit(model, guarded, keep, stop, max_epochs=epochs)
    assert model.net.stem[0].out_channels == DENSE
    assert Path(keep.best_model_path).name == "epoch=1.ckpt"
    assert float(keep.best_model_score) == pytest.approx(0.6)
    assert float(stop.best_score) == pytest.approx(0.95)
    (found,) = trainer.test(model, loader(), ckpt_path="best", verbose=False)
    assert found["width"] == DENSE == width(keep.last_model_path)


def test_several_checkpoints_each_start_anew(fit: Fit, tmp_path: Path) -> None:
    kept = [
        ModelCheckpoint(tmp_path / "a", monitor="val_acc", mode="max"),
        ModelCheckpoint(tmp_path / "b", monitor="val_acc", mode="min"),
        ModelCheckpoint(tmp_path / "c"),
    ]
    fit(Told(BETTER_BEFORE), *kept, pruning())
    assert [width(keep.best_model_path) for keep in kept] == [PRUNED] * 3


def test_a_fit_without_a_cut_keeps_the_scores_of_plain_lightning(fit: Fit, tmp_path: Path) -> None:
    def run(name: str, *callbacks: Callback) -> Any:
        keep = ModelCheckpoint(
            tmp_path / name, monitor="val_acc", mode="max", save_last=True, save_top_k=2
        )
        stop = EarlyStopping("val_acc", mode="max", patience=9)
        fit(Told(BETTER_BEFORE), keep, stop, *callbacks, max_steps=10)
        files = sorted(p.name for p in (tmp_path / name).iterdir())
        return files, [float(v) for v in keep.best_k_models.values()], stop.state_dict()

    with pytest.warns(UserWarning, match="ended before"):
        ours = run("ours", pruning(when=3))
    assert ours == run("plain")


def test_another_structure_at_a_load_is_told(fit: Fit, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    model = Told(BETTER_BEFORE)
    trainer = fit(model, pruning(), keep)
    trainer.test(model, loader(), ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False)
    with pytest.warns(UserWarning, match="another structure"):
        trainer.test(model, loader(), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
