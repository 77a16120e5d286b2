"""`Objective`: a typo costs one epoch at most, and what is there is what Lightning says."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import AccelReport, Objective, StepMeter, StructuredPruning
from lightning_accel.bridge import objective as objective_module
from lightning_accel.errors import AccelError
from lightning_accel.measure.report import Ratios, Report, Side

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
Fit = Callable[..., Trainer]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `Objective` says in passing."""
    lines: list[str] = []
    monkeypatch.setattr(objective_module, "rank_zero_info", lines.append)
    return lines


class Module(LightningModule):
    """Logs in training, in validation, and at the end of an epoch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
        self.epochs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self(batch[0]).square().mean()
        self.log("train/loss", loss, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.epochs += 1
        self.log("train/epochs", float(self.epochs))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self(batch[0]).square().mean())
        if not self.trainer.sanity_checking:
            self.log("val/best", 0.5)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", self(batch[0]).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def data() -> DataLoader[Any]:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x), 4)


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Fit:
    def run(model: LightningModule, *callbacks: Callback, **kwargs: Any) -> Trainer:
        ckpt, val = kwargs.pop("ckpt", None), kwargs.pop("val", True)
        given = {"max_epochs": 4, "num_sanity_val_steps": 2, "callbacks": list(callbacks)}
        trainer = Trainer(**{**trainer_kwargs, **given, **kwargs})
        trainer.fit(model, data(), data() if val else None, ckpt_path=ckpt)
        return trainer

    return run


@pytest.mark.parametrize("name", ["train/loss", "train/loss_step", "train/epochs", "val/loss"])
def test_the_value_is_that_of_lightning(fit: Fit, name: str) -> None:
    objective = Objective(name)
    trainer = fit(Module(), objective)
    assert objective.value(trainer) == float(trainer.callback_metrics[name])


def test_a_metric_that_the_sanity_check_does_not_log_is_waited_for(
    fit: Fit, said: list[str]
) -> None:
    objective = Objective("val/best")
    trainer = fit(Module(), objective)
    assert "logged val/loss and no `val/best`" in "".join(said)
    assert objective.value(trainer) == 0.5
    assert trainer.current_epoch == 4


def test_a_typo_ends_the_fit_after_one_epoch_and_names_the_nearest(
    fit: Fit, said: list[str]
) -> None:
    model, text = Module(), r"`val/los` is logged by nothing.*train/loss.*val/loss"
    with pytest.raises(AccelError, match=text) as caught:
        fit(model, Objective("val/los"))
    assert "the fit ends if the first epoch does not log it either" in "".join(said)
    assert "say `objective=val/loss`" in str(caught.value)
    assert model.epochs == 1


@pytest.mark.parametrize(
    ("given", "epochs"),
    [
        ({"check_val_every_n_epoch": 2}, 2),
        ({"val": False}, 1),
        ({"limit_val_batches": 0}, 1),
        ({"val_check_interval": 0.5}, 1),
        ({"num_sanity_val_steps": 0}, 1),
        ({"max_epochs": 1}, 1),
        ({"max_steps": 2}, 1),
        ({"fast_dev_run": True}, 1),
        ({"check_val_every_n_epoch": 9}, 4),  # a validation that never comes
    ],
    ids=str,
)
def test_it_is_refused_as_soon_as_it_is_certain(
    fit: Fit, given: dict[str, Any], epochs: int
) -> None:
    model = Module()
    with pytest.raises(AccelError, match="`loss` is logged by nothing"):
        fit(model, Objective("loss"), **given)
    assert model.epochs == epochs


def test_a_metric_of_rare_validations_is_waited_for(fit: Fit) -> None:
    objective = Objective("val/best")
    trainer = fit(
        Module(), objective, check_val_every_n_epoch=3, max_epochs=3, num_sanity_val_steps=0
    )
    assert objective.value(trainer) == 0.5


def test_a_checkpoint_is_saved_before_a_fit_is_refused(fit: Fit, tmp_path: Any) -> None:
    saving = ModelCheckpoint(tmp_path, monitor="val/loss")
    with pytest.raises(AccelError):
        fit(Module(), saving, Objective("nothing"), enable_checkpointing=True)
    assert list(tmp_path.glob("*.ckpt"))


def test_a_resumed_fit_is_judged_by_its_own_epochs(fit: Fit, tmp_path: Any) -> None:
    fit(Module(), max_epochs=2).save_checkpoint(tmp_path / "two.ckpt")
    model, objective = Module(), Objective("val/best")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
        trainer = fit(model, objective, ckpt=tmp_path / "two.ckpt", max_epochs=4)
    assert objective.value(trainer) == 0.5
    assert model.epochs == 2


def test_a_fit_without_epochs_says_so_instead_of_a_key_error(fit: Fit) -> None:
    objective = Objective("val/loss")
    trainer = fit(Module(), objective, max_epochs=0)
    with pytest.raises(AccelError, match="Found: no logged metric"):
        objective.value(trainer)


def test_several_are_a_list_and_none_is_none(fit: Fit) -> None:
    several, nothing = Objective(["val/loss", "train/epochs"]), Objective(None)
    trainer = fit(Module(), several, nothing)
    assert several.value(trainer) == [float(trainer.callback_metrics["val/loss"]), 4.0]
    assert nothing.value(trainer) is None


@pytest.mark.parametrize("wrong", ["", " ", [], ["val/loss", None], 3, [""], {"a": 1}])
def test_what_is_no_name_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="`metric` is a name"):
        Objective(wrong)


# --- numbers of the report --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:StructuredPruning cuts before the first step")
def test_a_speed_up_can_be_optimised(fit: Fit) -> None:
    objective = Objective(["report/ratio_macs", "val/loss"])
    report = AccelReport(budget_s=0.05)
    trainer = fit(Module(), objective, StructuredPruning(ratio=0.5, when=1), report)
    macs, loss = objective.value(trainer)  # type: ignore[misc]
    assert macs == (8 * 16 + 16) / (8 * 8 + 8) == 2.0
    assert loss == float(trainer.callback_metrics["val/loss"])
    assert report.report is not None
    assert {k: float(v) for k, v in trainer.callback_metrics.items() if "report/" in k} == (
        report.report.flat()
    )


def test_numbers_of_the_report_are_in_no_metric_of_its_own(fit: Fit) -> None:
    report = AccelReport(budget_s=0.05)
    trainer = fit(Module(), StepMeter(1), report)
    assert report.report is not None
    logged = {"train/loss", "train/loss_step", "train/loss_epoch", "train/epochs"}
    assert set(report.report.final.metrics) == logged | {"val/loss", "val/best"}
    assert float(trainer.callback_metrics["measure/steps_per_s"]) > 0
    trainer.fit_loop.max_epochs = 5
    trainer.fit(trainer.lightning_module, data(), data())
    assert set(report.report.final.metrics) == logged | {"val/loss", "val/best"}


def test_the_fit_with_numbers_of_a_report_is_that_without(fit: Fit, tmp_path: Any) -> None:
    def fitted(*callbacks: Callback) -> tuple[Any, ...]:
        folder = tmp_path / str(len(callbacks))
        model, stopping = Module(), EarlyStopping("val/loss", patience=2)
        saving = ModelCheckpoint(folder, monitor="val/loss", save_last=True)
        trainer = fit(
            model, stopping, saving, *callbacks, enable_checkpointing=True, default_root_dir=folder
        )
        state = {k: v.clone() for k, v in model.state_dict().items()}
        logged = {k: float(v) for k, v in trainer.callback_metrics.items() if "report/" not in k}
        files = sorted(p.name for p in folder.glob("*.ckpt"))
        return state, logged, files, stopping.best_score, trainer.logged_metrics.keys()

    plain, reported = fitted(), fitted(AccelReport(budget_s=0.05))
    assert all(torch.equal(v, reported[0][k]) for k, v in plain[0].items())
    assert plain[1:] == reported[1:]


WRONG = [
    ("report/ratio_mcas", "say `objective=report/ratio_macs`"),
    ("report/speedup", "Found: report/before_edit_"),
    ("measure/steps_per_sec", "Found: measure/samples_per_s, measure/steps_per_s"),
]


@pytest.mark.parametrize(("name", "said"), WRONG)
def test_a_typo_in_a_number_of_ours_is_refused_before_the_first_step(
    fit: Fit, name: str, said: str
) -> None:
    model = Module()
    callback = StepMeter() if name.startswith("measure") else AccelReport()
    with pytest.raises(AccelError) as caught:
        fit(model, Objective(name), callback)
    assert said in str(caught.value) and model.epochs == 0


def test_a_number_of_a_report_without_a_report_is_refused_before_the_first_step(fit: Fit) -> None:
    with pytest.raises(AccelError, match="no AccelReport among the callbacks"):
        fit(Module(), Objective("report/ratio_macs"))


def test_a_withheld_gain_is_not_a_number_and_said(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_accel.measure.report.is_useful", lambda low, high: False)
    objective = Objective("report/ratio_steps_per_s")
    trainer = fit(Module(), objective, AccelReport(budget_s=0.05))
    with pytest.warns(UserWarning, match="is NaN: it was not measured, or its gain is withheld"):
        assert math.isnan(objective.value(trainer))  # type: ignore[arg-type]


def test_every_number_of_a_report_is_announced() -> None:
    from fnmatch import fnmatchcase

    side = Side(1, 2, {"1": 3.0, "64": 4.0}, 5.0, {"val/acc": 6.0})
    full = Report(side, side, Ratios(1.0, 2.0, {"1": 3.0, "64": 4.0}, 5.0))
    early = Report(side, side, full.ratios, {"dense_metrics_after_epoch": 3})
    for name in {**full.flat(), **early.flat()}:
        assert any(fnmatchcase(name, pattern) for pattern in Report.NUMBERS), name
