"""What a report tells of a fit: compared with what a callback of the user's saw, and with the module itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lightning_accel import AccelReport, LeanLoop, StructuredPruning
from lightning_accel.measure.callbacks import fit_log
from lightning_accel.measure.journal import settings_of
from lightning_accel.measure.report import Report, Side
from lightning_accel.measure.widths import widths
from lightning_accel.pages import page, read_run, render
from lightning_accel.surgery import Receipt
from lightning_accel.surgery.receipt import Change
from lightning_accel.tuning.report import Trial, TuneReport, WaterfallStep


class Module(LightningModule):
    """Logs the number of its epoch, and some more in its last hook of an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny.MLP()
        self.fails_in = -1

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.current_epoch == self.fails_in:
            raise ArithmeticError("a secret")
        loss = self.net(batch).square().mean()
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/ten", 10.0 * self.current_epoch)

    def on_train_epoch_end(self) -> None:
        self.log("late", float(self.current_epoch) if self.current_epoch != 1 else float("nan"))

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.randn(16, 8), 8)

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.randn(8, 8), 8)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Witness(Callback):
    """Reads what was logged as late as a callback can, as `ModelCheckpoint` does."""

    def __init__(self, folder: Path) -> None:
        self.losses: list[float] = []
        self.told: list[dict[str, Any]] = []
        self.folder = folder

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
        for path in self.folder.rglob("*.progress.json"):
            self.told.append(json.loads(path.read_text()))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write progress with each batch."""
    monkeypatch.setattr("lightning_accel.measure.progress._EVERY_S", 0.0)
    monkeypatch.setattr("lightning_accel.measure.progress._SHARE", 1e9)


def fit(kwargs: dict[str, Any], module: LightningModule, *callbacks: Callback, **more: Any) -> Any:
    given = {"callbacks": list(callbacks), "enable_checkpointing": False, "max_epochs": 4, **more}
    ckpt = given.pop("ckpt", None)
    trainer = Trainer(**{**kwargs, **given})
    trainer.fit(module, ckpt_path=ckpt)
    return trainer


@pytest.mark.slow
def test_a_report_tells_what_was_done_when_and_what_was_logged(
    trainer_kwargs: dict[str, Any], tmp_path: Path, quick: None
) -> None:
    path, witness, module = tmp_path / "r" / "report.json", Witness(tmp_path), Module()
    before = {name: m.out_features for name, m in module.named_modules() if hasattr(m, "weight")}
    prune = StructuredPruning(ratio=0.5, when=2)
    fit(trainer_kwargs, module, prune, AccelReport(path, budget_s=0.01), witness)
    found = json.loads(path.read_text())
    history = found["history"]
    assert history["train/loss"] == [[i + 1, loss] for i, loss in enumerate(witness.losses)]
    assert history["val/ten"] == [[e + 1, 10.0 * e] for e in range(4)]
    assert history["late"] == [[1, 0.0], [2, None], [3, 2.0], [4, 3.0]]
    acted = [e for e in found["timeline"] if e.get("num_changes")]
    assert [(e["technique"], e["epoch"], e["step"]) for e in acted] == [("StructuredPruning", 2, 4)]
    assert acted[0]["num_changes"] == len(prune.receipt.changes)
    settings = found["timeline"][0]["settings"]
    assert (settings["ratio"], settings["when"]) == (0.5, [2]) and "importance" not in settings
    after = {name: m.out_features for name, m in module.named_modules() if hasattr(m, "weight")}
    rows = {row["layer"]: row for row in found["widths"]}
    assert {name: row["before"] for name, row in rows.items()} == before
    assert {name: row["after"] for name, row in rows.items()} == after != before
    assert sum(row["params_before"] for row in rows.values()) == found["dense"]["params"]
    assert sum(row["params_after"] for row in rows.values()) == found["final"]["params"]
    assert found["memory"]["dense_bytes"] == 4 * found["dense"]["params"]
    spread = found["spread"]["latency_8"]["final"]
    assert spread["p10_ms"] <= spread["median_ms"] <= spread["p90_ms"]
    text = path.with_suffix(".html").read_text()
    assert text == render([read_run(path)]) and "StructuredPruning" in text
    assert [t["epoch"] for t in witness.told] == [0, 1, 2], "written with the first batch of each"
    assert witness.told[1]["state"] == "running" and witness.told[1]["max_epochs"] == 4
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_fit_that_goes_on_knows_what_was_before(
    trainer_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    saved = ModelCheckpoint(tmp_path / "saved", save_last=True)
    prune = lambda: StructuredPruning(ratio=0.5, when=1)  # noqa: E731
    report = AccelReport(tmp_path / "report.json", budget_s=0.01)
    more: dict[str, Any] = {"max_epochs": 2, "enable_checkpointing": True}
    fit(trainer_kwargs, Module(), prune(), report, saved, **more)
    first = json.loads((tmp_path / "report.json").read_text())
    again = AccelReport(tmp_path / "again.json", budget_s=0.01)
    fit(trainer_kwargs, Module(), prune(), again, ckpt=tmp_path / "saved" / "last.ckpt")
    found = json.loads((tmp_path / "again.json").read_text())
    for name, points in first["history"].items():
        assert found["history"][name][:2] == points and len(found["history"][name]) == 4
    assert found["timeline"] == first["timeline"], "nothing is told twice"
    assert found["fit"]["seconds"] > first["fit"]["seconds"]


@pytest.mark.parametrize(
    ("error", "state"), [(ArithmeticError, "failed"), (KeyboardInterrupt, "interrupted")]
)
def test_a_fit_that_is_ended_says_so_and_no_more(
    trainer_kwargs: dict[str, Any], tmp_path: Path, error: type[BaseException], state: str
) -> None:
    class Ends(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 2:
                raise error("a secret")

    with pytest.raises((error, SystemExit)):
        fit(trainer_kwargs, Module(), Ends(), AccelReport(tmp_path / "report.json"))
    text = (tmp_path / "report.progress.json").read_text()
    found = json.loads(text)
    assert (found["state"], found["error"], found["epoch"]) == (state, error.__name__, 2)
    assert "a secret" not in text
    assert f"{state} ({error.__name__}): epoch 2 of 4" in render([read_run(tmp_path)])


def test_a_fit_goes_on_where_nothing_can_be_written(
    trainer_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("a file")
    report = AccelReport(tmp_path / "taken" / "report.json", budget_s=0.01)
    with pytest.warns(UserWarning) as said:
        trainer = fit(trainer_kwargs, Module(), report)
    words = [str(each.message) for each in said]
    assert sum("progress of this fit cannot be written" in word for word in words) == 1
    assert sum("the report could not be saved" in word for word in words) == 1
    assert trainer.global_step == 8 and report.report is not None


def test_a_page_that_fails_is_told_and_the_report_is_there(
    trainer_kwargs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> str:
        raise OSError("no room")

    monkeypatch.setattr(page, "render", fails)
    with pytest.warns(UserWarning, match="the page of the report could not be written.*no room"):
        fit(trainer_kwargs, Module(), AccelReport(tmp_path / "report.json", budget_s=0.01))
    assert (tmp_path / "report.json").exists() and not (tmp_path / "report.html").exists()


class Touchy(LeanLoop):
    """A technique of the user's, with what raises when looked at."""

    def __init__(self, odd: Any) -> None:
        super().__init__()
        self.reprs = odd

    @property
    def odd(self) -> Any:
        raise AssertionError("nobody has to look at this")

    @property
    def receipt(self) -> Any:  # type: ignore[override]
        raise ArithmeticError("nor at this")

    @receipt.setter
    def receipt(self, value: Any) -> None:
        pass


def test_nothing_of_a_log_ends_a_fit(trainer_kwargs: dict[str, Any], tmp_path: Path) -> None:
    log, trainer = fit_log.FitLog(), Trainer(**trainer_kwargs, callbacks=[Touchy(3)])
    with pytest.warns(UserWarning, match="something of this fit is missing.*nor at this") as said:  # noqa: PT031
        log.look(trainer)
        log.look(trainer)
    assert len(said) == 1 and settings_of(Touchy(3)) == {}


def test_a_logger_that_does_not_know_its_folder_ends_no_fit(
    trainer_kwargs: dict[str, Any],
) -> None:
    def unknown() -> Path:
        raise RuntimeError("no folder yet")

    log = fit_log.FitLog()
    with pytest.warns(UserWarning, match="something of this fit is missing.*no folder yet"):
        log.start(Trainer(**{**trainer_kwargs, "fast_dev_run": False}), unknown)
    assert log.progress is None and not log.is_due()


def test_only_the_first_process_writes(
    trainer_kwargs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for zero, dev, written in ((True, False, True), (False, False, False), (True, True, False)):
        trainer = Trainer(**{**trainer_kwargs, "fast_dev_run": dev})
        monkeypatch.setattr(type(trainer), "is_global_zero", property(lambda _, z=zero: z))
        log = fit_log.FitLog()
        log.start(trainer, lambda: tmp_path / "report.json")
        assert (log.progress is not None) == written


def test_a_stop_within_an_epoch_keeps_the_point_of_the_epoch_before(
    trainer_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    report = AccelReport(tmp_path / "report.json", budget_s=0.01)
    fit(trainer_kwargs, Module(), report, max_epochs=-1, max_steps=3, limit_val_batches=0)
    epochs = [
        epoch for epoch, _ in json.loads((tmp_path / "report.json").read_text())["history"]["late"]
    ]
    assert epochs == [1, 2], "the second was begun"


@pytest.mark.parametrize(
    ("module", "width"),
    [
        (nn.Linear(3, 5), 5),
        (nn.Conv2d(3, 6, 3, groups=3), 6),
        (nn.ConvTranspose2d(4, 10, 3, groups=2), 10),
        (nn.Embedding(7, 3), 3),
        (nn.LSTM(3, 5), 5),
        (nn.MultiheadAttention(8, 2), 24),
    ],
)
def test_a_width_is_what_the_layer_gives(module: nn.Module, width: int) -> None:
    before = {name: tuple(p.shape) for name, p in module.named_parameters()}
    row = widths(before, module)[0]
    assert (row["before"], row["after"]) == (width, width)
    own = sum(p.numel() for name, p in module.named_parameters() if "." not in name)
    assert row["params_before"] == row["params_after"] == own


def test_a_block_that_is_gone_is_told_as_gone() -> None:
    rows = widths({"a.weight": (4, 2), "b.weight": (2, 4)}, nn.ModuleDict({"b": nn.Linear(4, 2)}))
    assert [(row["layer"], row["after"]) for row in rows] == [("b", 2), ("a", 0)]


def test_a_notebook_shows_tables_of_what_is_escaped() -> None:
    evil = "<script>alert(1)</script>"
    receipt = Receipt(
        (Change(evil, "pruned", "8", "4"),), skipped=(Change("head", evil),), notes=(evil,)
    )
    report = Report(Side(metrics={evil: 0.5}), extra={"notes": [evil]})
    tune = TuneReport(
        bars=[WaterfallStep(evil, 2.0)], trials=[Trial("a", evil, "taken")], notes=[evil]
    )
    for shown in (receipt, report, tune, TuneReport(notes=[evil])):
        text = shown._repr_html_()
        assert "<script" not in text and "&lt;script&gt;" in text and text.startswith("<table>")
        assert text.count("<tr>") == text.count("</tr>")


def test_fits_of_one_process_without_a_logger_keep_a_report_each(tmp_path: Path) -> None:
    def fit(*given: Any) -> str:
        report = AccelReport(*given, budget_s=0.01)
        made = Trainer(
            **{**tiny.silent(tmp_path), "max_epochs": 1, "limit_train_batches": 1},
            callbacks=[report],
        )
        made.fit(BoringModel())
        assert report._saved_at is not None
        return report._saved_at.relative_to(tmp_path).as_posix()

    assert [fit(), fit(), fit()] == [
        f"lightning_logs/{n}report.json" for n in ("", "fit_2/", "fit_3/")
    ]
    assert len(list(tmp_path.rglob("report.html"))) == 3
    own = tmp_path / "own.json"
    assert [fit(own), fit(own)] == ["own.json"] * 2  # who names a file is taken by the word
