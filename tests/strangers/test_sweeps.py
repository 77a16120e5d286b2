"""Reports about sweeps and their numbers, each put on ours as the reporter would and compared with plain Lightning or W&B."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import AccelReport, Objective, StructuredPruning
from lightning_accel.errors import AccelError
from lightning_accel.job import _name_run, begin_logging, refuse_nan

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:StructuredPruning cuts before the first step"),
]
ROOT = Path(__file__).resolve().parents[2]
Fit = Callable[..., Trainer]


class Reported(LightningModule):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.epochs = scale, 0
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.net(batch[0]).square().mean()
        self.log("training/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("validation/loss", self.net(batch[0]).square().mean() * self.scale)

    def on_train_epoch_end(self) -> None:
        self.epochs += 1

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.linspace(-1, 1, 32).reshape(8, 4)), 4)


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Fit:
    def run(model: LightningModule, *callbacks: Callback, **kwargs: Any) -> Trainer:
        given = {"max_epochs": 3, "num_sanity_val_steps": 2, "callbacks": list(callbacks)}
        trainer = Trainer(**{**trainer_kwargs, **given, **kwargs})
        trainer.fit(model, data(), data())
        return trainer

    return run


def test_a_bad_monitor_is_noticed_and_the_right_names_are_listed(fit: Fit) -> None:
    """optuna#1226, openadmet-models#327: a misspelt metric made the pruner do nothing, or ended in a KeyError."""
    plain = fit(Reported())
    model = Reported()
    with pytest.raises(AccelError) as caught:
        fit(model, Objective("val_loss"))
    assert f"Found: {', '.join(sorted(plain.callback_metrics))}." in str(caught.value)
    assert model.epochs == 1 < plain.current_epoch


class OutsideOfSanity(Reported):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            super().validation_step(batch, batch_idx)


def test_a_sanity_check_without_the_metric_ends_nothing(fit: Fit) -> None:
    """pytorch-forecasting#892, optuna#3002: "not in the evaluation logs" although it was logged later."""
    objective = Objective("validation/loss")
    plain, ours = fit(OutsideOfSanity()), fit(OutsideOfSanity(), objective)
    assert objective.value(ours) == float(plain.callback_metrics["validation/loss"])


def test_metrics_of_an_earlier_run_are_not_those_of_this_fit(
    trainer_kwargs: dict[str, Any],
) -> None:
    """Lightning#7558: a `validate` before the fit made the checkpoint believe in a metric of nobody."""
    objective, report = Objective("validation/loss"), AccelReport(budget_s=0.05)
    trainer = Trainer(**{**trainer_kwargs, "max_epochs": 2, "callbacks": [objective]})
    model = Reported()
    trainer.validate(model, data(), verbose=False)
    assert "validation/loss" in trainer.callback_metrics
    with pytest.raises(AccelError, match="Found: training/loss"):
        trainer.fit(model, data())
    trainer = Trainer(**{**trainer_kwargs, "max_epochs": 1, "callbacks": [report]})
    trainer.fit(model, data())
    assert "report/ratio_macs" in trainer.callback_metrics
    trainer.validate(model, data(), verbose=False)
    assert set(trainer.callback_metrics) == {"validation/loss"}


def test_a_diverged_run_is_nan_and_no_error(fit: Fit) -> None:
    """hydra#2237: one job that returned NaN ended the whole sweep."""
    one, two = Objective("validation/loss"), Objective(["validation/loss", "training/loss"])
    trainer = fit(Reported(scale=math.nan), one, two)
    assert math.isnan(one.value(trainer))  # type: ignore[arg-type]
    loss, other = two.value(trainer)  # type: ignore[misc]
    assert math.isnan(loss) and other == float(trainer.callback_metrics["training/loss"])


@pytest.mark.parametrize("version", ["1.3.0", "1.4.0rc3"])
@pytest.mark.parametrize("sweeper", ["hydra_plugins.hydra_optuna_sweeper.X", "hydra._internal.Y"])
@pytest.mark.parametrize("value", [math.nan, [1.0, math.nan], 1.0, None])
def test_a_nan_that_would_end_a_sweep_fails_its_job_instead(
    monkeypatch: pytest.MonkeyPatch, version: str, sweeper: str, value: Any
) -> None:
    """hydra#2237: "Values cannot be specified when state is FAIL" was all that was said."""
    config = hydra("lr=0.1")
    config.sweeper = {"_target_": sweeper}
    monkeypatch.setattr("lightning_accel.job._hydra_config", lambda: config)
    monkeypatch.setattr("lightning_accel.job.metadata.version", lambda name: version)
    if version == "1.3.0" and "optuna" in sweeper and value not in (1.0, None):
        with pytest.raises(AccelError, match="max_failure_rate=1"):
            refuse_nan(value)
    else:
        refuse_nan(value)


def hydra(*words: str, swept: bool = True, preset: str | None = None) -> Any:
    mode = types.SimpleNamespace(name="MULTIRUN" if swept else "RUN")
    return types.SimpleNamespace(
        overrides=types.SimpleNamespace(task=list(words)),
        mode=mode,
        job=types.SimpleNamespace(name="train"),
        runtime=types.SimpleNamespace(choices={"accel": preset} if preset else {}),
    )


@pytest.fixture
def unnamed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("WANDB_NAME", "WANDB_TAGS"):
        monkeypatch.setenv(name, "")  # so that monkeypatch puts back what there was
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize("length", [10, 64, 65, 400])
def test_a_long_tag_does_not_end_the_run(unnamed: pytest.MonkeyPatch, length: int) -> None:
    """lfads-torch#16, lerobot#1339, wandb#10397: a path as a tag is refused above 64 characters, and the run ends."""
    from wandb import Settings

    _name_run(hydra(f"note={'n' * 300}", preset=f"../{'p' * length}.yaml"), {})
    tags = os.environ["WANDB_TAGS"].split(",")
    assert tags == ["p" * min(length, 64)]
    read = Settings(run_tags=tags, run_name=os.environ["WANDB_NAME"])
    assert read.run_tags == tuple(tags) and len(read.run_name or "") <= 128
    if length > 64:
        with pytest.raises(ValueError, match="64 characters"):
            Settings(run_tags=["p" * length])


def test_each_run_of_a_sweep_is_named_by_what_was_swept(unnamed: pytest.MonkeyPatch) -> None:
    """wandb#5745, #2120, #9701: runs of a sweep had names that say nothing of their values."""
    unnamed.setattr(sys, "argv", ["train.py", "-m", "+accel=none,prune", "lr=0.1,0.2", "data=mine"])
    names = []
    for preset in ("none", "prune"):
        for lr in ("0.1", "0.2"):
            for key in ("WANDB_NAME", "WANDB_TAGS"):
                os.environ.pop(key, None)
            given = [f"+accel={preset}", f"lr={lr}", "data=mine", "logger=wandb"]
            _name_run(hydra(*given, preset=preset), {})
            names.append(os.environ["WANDB_NAME"])
    assert names == [f"accel={p} lr={lr}" for p in ("none", "prune") for lr in ("0.1", "0.2")]


def test_a_name_that_the_user_chose_is_kept(unnamed: pytest.MonkeyPatch) -> None:
    """wandb#2120: a name of one's own was lost."""
    unnamed.setenv("WANDB_NAME", "mine")
    _name_run(hydra("lr=0.1", swept=False), {})
    assert os.environ["WANDB_NAME"] == "mine"


def test_a_name_holds_no_secret(unnamed: pytest.MonkeyPatch) -> None:
    """wandb#12443, diffusers#6: what is on the command line is on the dashboard."""
    unnamed.setenv("SERVICE_TOKEN", "c4n4ry-0123456789")
    words = ["db=sql://me:c4n4ry@host/x", "note=c4n4ry-0123456789"]
    _name_run(hydra(*words, swept=False), {})
    assert "c4n4ry" not in os.environ["WANDB_NAME"]
    assert os.environ["WANDB_NAME"].startswith("db=sql://***@host/x")


LOGGED = """
import sys
sys.path[:0] = [{tests!r}]
import wandb
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
import test_sweeps as t
from lightning_accel import AccelReport, StructuredPruning
quiet = dict(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1)
first = Trainer(max_epochs=2, logger=False, **quiet)
first.fit(t.Reported(), t.data(), t.data())
first.save_checkpoint("two.ckpt")
callbacks = [StructuredPruning(ratio=0.5, when=3), AccelReport(budget_s=0.05)]
logger = WandbLogger(save_dir=".", project="p", offline=True)
trainer = Trainer(max_epochs=5, logger=logger, callbacks=callbacks, **quiet)
trainer.fit(t.Reported(), t.data(), t.data(), ckpt_path="two.ckpt")
wandb.finish()
"""


@pytest.mark.slow
@pytest.mark.sweep
def test_a_resumed_run_drops_no_row_and_its_report_stands_at_its_step(tmp_path: Path) -> None:
    """wandb#1626, #5913, Lightning#13382: rows dropped after a resume, and tables that shift W&B's own step."""
    script = LOGGED.format(tests=str(Path(__file__).parent))
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env |= {"PYTHONPATH": path, "HOME": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    env |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ropping" not in done.stderr and "monotonically" not in done.stderr
    (run,) = tmp_path.glob("wandb/offline-run-*")
    wandb = str(Path(sys.executable).with_name("wandb"))
    told = subprocess.run(
        [wandb, "leet", "inspect", "--json", str(run)], env=env, capture_output=True, text=True
    )
    rows = [json.loads(line).get("history", {}).get("item") for line in told.stdout.splitlines()]
    steps = {
        key: [row["trainer/global_step"] for row in rows if row and key in row]
        for key in ("training/loss", "validation/loss", "report/ratio_macs")
    }
    assert steps["training/loss"] == [4, 5, 6, 7, 8, 9]  # two steps in each of three epochs
    assert steps["validation/loss"] == [5, 7, 9]
    assert steps["report/ratio_macs"] == [10]
    (chart,) = [row for row in rows if row and any("report/gains" in key for key in row)]
    assert chart["trainer/global_step"] == 10


DDP = """
import json, sys
sys.path[:0] = [{tests!r}]
from lightning.pytorch import Trainer
import test_sweeps as t
from lightning_accel import AccelReport, Objective, StructuredPruning
objective = Objective(["report/ratio_macs", "report/final_params", "report/dense_latency_ms_1"])
callbacks = [StructuredPruning(ratio=0.5, when=1), objective, AccelReport({out!r}, budget_s=0.05)]
trainer = Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, callbacks=callbacks,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(t.Reported(), t.data(), t.data())
open(f"{{trainer.global_rank}}.json", "w").write(json.dumps(objective.value(trainer)))
"""


@pytest.mark.slow
@pytest.mark.ddp
def test_every_process_has_the_numbers_that_the_first_measured(tmp_path: Path) -> None:
    """optuna#1417, optuna-examples#14, Lightning#7671: only rank 0 had the metric, and the others ended in a KeyError."""
    script = tmp_path / "script.py"
    tests = str(Path(__file__).parent)
    script.write_text(DDP.format(tests=tests, out=str(tmp_path / "report.json")))
    status, printed = forks.run_ranks(script, cwd=tmp_path, path=(ROOT,))
    assert status == 0, printed[-3000:]
    first, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == other
    report = json.loads((tmp_path / "report.json").read_text())
    assert first[:2] == [report["ratios"]["macs"], report["final"]["params"]]
    left = sorted(path.name for path in tmp_path.glob("report*"))
    assert left == ["report.html", "report.json", "report.md"], "the first alone writes"
    assert [e["epoch"] for e in report["timeline"] if e.get("num_changes")] == [1]


@pytest.mark.slow
def test_the_best_checkpoint_and_the_metric_of_a_sweep_are_of_one_network(
    fit: Fit, tmp_path: Path
) -> None:
    """Lightning#17312, KnowIt#140: scores of a run that belong to another epoch than what was loaded."""
    saving = ModelCheckpoint(tmp_path, monitor="validation/loss", save_top_k=1)
    objective = Objective(["validation/loss", "report/final_params"])
    model = Reported()
    trainer = fit(
        model,
        saving,
        StructuredPruning(ratio=0.5, when=1),
        objective,
        AccelReport(budget_s=0.05),
        enable_checkpointing=True,
    )
    loss, params = objective.value(trainer)  # type: ignore[misc]
    (found,) = trainer.validate(model, data(), ckpt_path="best", verbose=False)
    assert found["validation/loss"] == pytest.approx(loss)
    assert params == sum(p.numel() for p in model.parameters()) == 4 * 4 + 4 + 4 + 1


class WandbLogger(Logger):
    """Lightning's by name, whose service dies in mid-training."""

    name, version = "books", 0

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error, self.rows = error, 0

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows += 1
        if self.rows > 1:
            raise self.error


@pytest.mark.parametrize("kind", ["service", "connection"])
def test_verl_4904_lightning_10688_a_logger_that_dies_ends_no_training(fit: Fit, kind: str) -> None:
    from wandb.errors import CommError

    error = (
        CommError("the service has gone") if kind == "service" else ConnectionResetError("reset")
    )
    logger, model = WandbLogger(error), Reported()
    begin_logging(logger, {})
    with pytest.warns(UserWarning, match="logs nothing from now on") as told:
        fit(model, logger=logger, max_epochs=3, log_every_n_steps=1)
    assert model.epochs == 3 and logger.rows == 2
    assert sum("logs nothing" in str(w.message) for w in told) == 1


def test_a_mistake_in_what_is_logged_still_ends_the_training(fit: Fit) -> None:
    logger = WandbLogger(TypeError("no number"))
    begin_logging(logger, {})
    with pytest.raises(TypeError, match="no number"):
        fit(Reported(), logger=logger, max_epochs=3, log_every_n_steps=1)
