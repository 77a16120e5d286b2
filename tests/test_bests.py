"""After a cut the best checkpoint, patience and plateaus are those of the network that there is."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from tiny import Fit
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_accel import StructuredPruning

pytestmark = [
    pytest.mark.slow,
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


BETTER_BEFORE = (0.90, 0.95, 0.50, 0.60)


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Fit:
    return tiny.fits(trainer_kwargs, loader, epochs=4)


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


class Crash(RuntimeError):
    """What ends a fit before its time."""


class Noted(Told):
    """Notes its hooks, and fails in the second batch of an epoch if asked."""

    def __init__(self, scores: Sequence[float], fails: int | None = None) -> None:
        super().__init__(scores)
        self.fails, self.calls = fails, []

    def on_train_epoch_start(self) -> None:
        self.calls.append(f"epoch {self.current_epoch}")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        self.calls.append(f"batch {batch_idx}: {float(loss.detach())}")
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (self.current_epoch, batch_idx) == (self.fails, 1):
            raise Crash

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.calls.append(f"validation {batch_idx}")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_fit_that_fails_in_its_first_pruned_epoch_leaves_a_pruned_file(
    fit: Fit, tmp_path: Path, name: str
) -> None:
    given = {"monitor": "val_acc", "mode": "max", **SETTINGS[name]}
    keep = ModelCheckpoint(tmp_path / "ckpt", **given)
    model = Noted(BETTER_BEFORE, fails=2)
    with pytest.raises(Crash):
        fit(model, keep, pruning())
    if name in (
        "rare",
        "none",
    ):  # nothing was saved before the cut, nothing stands for the pruned network
        assert not list((tmp_path / "ckpt").glob("*"))
        return
    assert all(width(path) == PRUNED for path in keep.best_k_models)
    if keep.save_top_k:
        assert width(keep.best_model_path) == PRUNED
    if keep.save_last:
        assert width(tmp_path / "ckpt" / "last.ckpt") == PRUNED
    assert sum(p.stem.endswith("-cut") for p in (tmp_path / "ckpt").iterdir()) <= 1


def stream() -> DataLoader[Any]:
    class Stream(IterableDataset[Any]):
        def __init__(self) -> None:
            self.items = (item for _ in range(9) for item in list(loader().dataset))  # type: ignore[call-overload]

        def __iter__(self) -> Any:
            return islice(self.items, 16)

    return DataLoader(Stream(), 4)


LOOPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 3},
    "validated every second": {"check_val_every_n_epoch": 2},
    "validated within": {"val_check_interval": 2},
    "validated across epochs": {"val_check_interval": 3, "check_val_every_n_epoch": None},
    "limited": {"limit_train_batches": 3},
    "steps": {"max_steps": 14, "max_epochs": -1},
    "read once": {"data": stream},
}


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("loop", LOOPS)
def test_a_fit_that_resumes_from_the_cut_goes_on_as_if_it_had_not_failed(
    fit: Fit, tmp_path: Path, loop: str
) -> None:
    def run(fails: int | None, ckpt: Any = None, folder: str = "kept") -> tuple[Noted, list[Any]]:
        rows: list[Any] = []

        class Rows(DummyLogger):
            def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
                rows.append((step, metrics))

        keep = ModelCheckpoint(tmp_path / folder, save_last=True, save_on_train_epoch_end=True)
        torch.manual_seed(0)
        model = Noted(BETTER_BEFORE, fails)
        given = {"logger": Rows(), "log_every_n_steps": 1, **LOOPS[loop]}
        try:
            fit(model, keep, pruning(), ckpt=ckpt, **given)
        except Crash:
            assert fails is not None
        return model, rows

    whole, every = run(None, folder="whole")
    run(fails=2)
    resumed, rows = run(None, ckpt=tmp_path / "kept" / "last.ckpt", folder="resumed")
    assert resumed.calls[0] == "epoch 2"
    assert resumed.calls == whole.calls[-len(resumed.calls) :]
    assert rows == every[-len(rows) :]
    again, _ = run(None, ckpt=tmp_path / "resumed" / "last.ckpt", folder="again")
    assert not again.calls  # the counters of a resumed fit are right in turn
    for one, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_file_of_the_cut_gives_way_to_a_better_one(fit: Fit, tmp_path: Path) -> None:
    one, three, best = (
        ModelCheckpoint(tmp_path / "one", monitor="val_acc", mode="max", filename="{epoch}"),
        ModelCheckpoint(tmp_path / "three", monitor="val_acc", save_top_k=3),
        ModelCheckpoint(tmp_path / "best", filename="best"),
    )
    with pytest.raises(Crash):
        fit(Noted(BETTER_BEFORE, fails=2), one, three, best, pruning())
    names = [sorted(p.name for p in (tmp_path / n).iterdir()) for n in ("one", "three", "best")]
    assert names == [
        ["epoch=1.ckpt", "epoch=2-cut.ckpt"],
        ["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt", "epoch=2-step=8-cut.ckpt"],
        ["best-cut.ckpt"],
    ]
    assert float(three.best_model_score) == float("inf")
    ends = [
        ModelCheckpoint(tmp_path / "a", monitor="val_acc", mode="max", filename="{epoch}"),
        ModelCheckpoint(tmp_path / "b", save_top_k=-1, filename="{epoch}"),
    ]
    fit(Noted(BETTER_BEFORE), *ends, pruning(when=[1, 2]))
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "epoch=0.ckpt", "epoch=1.ckpt", "epoch=3.ckpt",
    ]  # fmt: skip
    assert len(list((tmp_path / "b").iterdir())) == 4 + 2


def test_a_fit_without_a_dense_file_keeps_none_of_the_cut(fit: Fit, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="val_acc", mode="max", save_top_k=-1)
    with pytest.raises(Crash), pytest.warns(UserWarning, match="untrained"):
        fit(Noted(BETTER_BEFORE, fails=0), keep, pruning(when=0))
    assert not list(tmp_path.glob("*.ckpt"))
