"""The lean loop logs what the plain one logs, and fused optimizers step where the loop steps."""

from __future__ import annotations

import copy
import csv
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import tiny
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel.loop import LeanLoop
from lightning_accel.loop.bar import LateNumbers, _kept
from lightning_accel.loop.log import mixed_in, taken_out
from lightning_accel.loop.sigterm import Throttle

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:You called `self.log.* needs to be floating"),
]


class Waits(TorchDispatchMode):
    """Counts reads of a tensor as a number, each of which waits for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class InPlace(torchmetrics.Metric):
    """A metric whose result is its state, changed in place by the next step."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, value: Tensor) -> None:
        self.total += value.detach()

    def compute(self) -> Tensor:
        return self.total


class Logging(LightningModule):
    """Logs in all ways."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"width": 16})
        self.net = tiny.MLP()
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(4)
        self.total = InPlace()
        self.several = torchmetrics.MetricCollection(
            [torchmetrics.MeanMetric(), torchmetrics.MaxMetric()], prefix="m/"
        )
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        out = self.net(x)
        loss = F.cross_entropy(out, y)
        self.log("loss", loss, prog_bar=True)
        self.log("both", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("epoch_only", loss * 2, on_step=False, on_epoch=True, batch_size=3 + batch_idx)
        for name in ("min", "max", "sum", "mean"):
            self.log(f"r/{name}", loss, on_epoch=True, reduce_fx=name)
        self.log("fn", loss, on_step=False, on_epoch=True, reduce_fx=torch.max)
        self.log("float", 0.1 * batch_idx, prog_bar=True)
        self.log("int", batch_idx)
        self.log("flag", batch_idx % 2 == 0)
        self.log("one", loss.reshape(1, 1))
        self.log("half", loss.bfloat16(), on_epoch=True)
        self.log("wide", loss.double(), on_epoch=True, prog_bar=True)
        self.log("synced", loss, sync_dist=True, on_epoch=True)
        self.log("graph", loss, enable_graph=True, on_epoch=True)
        self.log("unlogged", loss, logger=False)
        self.accuracy(out, y)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True, prog_bar=True)
        self.total(loss)
        self.log("total", self.total, on_step=True, on_epoch=False, prog_bar=True)
        self.several(loss)
        self.log_dict(self.several, on_step=True, on_epoch=True)
        self.log_dict({"d/a": loss, "d/b": 2.0 * batch_idx}, on_epoch=True)
        if batch_idx == 1:
            self.log("rare", loss, on_step=True, on_epoch=True)
        self._see()
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.log("hook", float(self.trainer.global_step))

    def on_train_epoch_end(self) -> None:
        self.log("epoch_end", float(self.current_epoch), prog_bar=True)
        self._see()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("val_loss", loss, prog_bar=True)
        self.log("val_step", loss, on_step=True, on_epoch=True)
        self.log(f"named/{dataloader_idx}", loss, add_dataloader_idx=False)
        self._see()

    def on_validation_epoch_end(self) -> None:
        self.log("monitored", float(self.current_epoch % 2), prog_bar=True)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    def _see(self) -> None:
        metrics = (self.trainer.callback_metrics, self.trainer.logged_metrics)
        self.seen.append(
            [{name: float(value) for name, value in each.items()} for each in metrics]
            + [dict(self.trainer.progress_bar_metrics)]
        )


class Watcher(Callback):
    """Logs from a callback, both ways, and looks at the metrics in its hooks."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.log("from_callback", float(trainer.global_step) * 2)
        pl_module.log("from_callback_2", float(trainer.global_step) * 3, on_epoch=True)
        self.seen.append(sorted(trainer.callback_metrics))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.seen.append({n: float(v) for n, v in trainer.callback_metrics.items()})

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.seen.append(list(trainer.progress_bar_metrics.items()))


def loader(size: int = 20, seed: int = 1) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 8, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(size) % 4), 4)


Record = dict[str, Any]


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def record(tmp_path: Path, trainer_kwargs: dict[str, Any]) -> Callable[..., Record]:
    """Fit, validate and test a module, and return every value that was logged or shown."""

    def run(
        name: str,
        *extra: Callback,
        kind: type[Logging] = Logging,
        ckpt: Path | None = None,
        **kwargs: Any,
    ) -> Record:
        torch.manual_seed(0)
        folder = tmp_path / name
        watcher, model = Watcher(), kind()
        stop = EarlyStopping("monitored", patience=9)
        best = ModelCheckpoint(
            folder / "best", monitor="monitored", save_top_k=-1, filename="{epoch}-{loss:.4f}"
        )
        middle = ModelCheckpoint(
            folder / "middle", every_n_train_steps=3, save_top_k=-1, filename="{step}"
        )
        given = {
            "max_epochs": 3, "logger": CSVLogger(folder, "log", "0"), "log_every_n_steps": 2,
            "num_sanity_val_steps": 1, "enable_checkpointing": True,
        }  # fmt: skip
        callbacks = [*extra, watcher, stop, best, middle, LearningRateMonitor()]
        trainer = Trainer(**{**trainer_kwargs, **given, **kwargs, "callbacks": callbacks})
        trainer.fit(model, loader(), [loader(8), loader(8, 2)], ckpt_path=ckpt)
        found = {
            "module": model.seen, "watcher": watcher.seen, "stop": float(stop.best_score),
            "best": (Path(best.best_model_path).name, float(best.best_model_score)),
            "files": sorted(p.name for p in folder.rglob("*.ckpt")),
            "csv": read(folder / "log" / "0"),
            "hparams": (folder / "log" / "0" / "hparams.yaml").read_text(),
            "bar": dict(trainer.progress_bar_metrics),
            "weights": {n: t.tolist() for n, t in model.net.state_dict().items()},
        }  # fmt: skip
        for verb in ("validate", "test"):
            found[verb] = getattr(trainer, verb)(model, [loader(8), loader(8, 2)], verbose=False)
            found[f"{verb} callback"] = {k: float(v) for k, v in trainer.callback_metrics.items()}
        return found

    return run


def check_same(one: Record, two: Record) -> None:
    for key in one:
        assert one[key] == two[key], key


@pytest.mark.slow
@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"progress_bar": False, "hooks": False},
        {"log": False, "hooks": False},
        {"log": False, "progress_bar": False},
    ],
    ids=["all", "log", "bar", "hooks"],
)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"accumulate_grad_batches": 2, "val_check_interval": 2, "gradient_clip_val": 0.5},
        {"precision": "bf16-mixed", "limit_train_batches": 4},
    ],
    ids=["plain", "accumulate", "bf16"],
)
def test_every_logged_value_is_that_of_the_plain_loop(
    record: Callable[..., Record], switches: dict[str, Any], kwargs: dict[str, Any]
) -> None:
    plain = record("plain", **kwargs)
    lean = record("lean", LeanLoop(**switches), **kwargs)
    assert len(plain["csv"]) > 5 and len(plain["csv"][0]) > 30
    check_same(plain, lean)


@pytest.mark.slow
def test_a_resume_in_mid_epoch_logs_the_same(record: Callable[..., Record], tmp_path: Path) -> None:
    record("whole")
    ckpt = tmp_path / "whole" / "middle" / "step=3.ckpt"
    check_same(record("plain", ckpt=ckpt), record("lean", LeanLoop(), ckpt=ckpt))


class Overrides(Logging):
    """Logs through an override of its own."""

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        super().log(name if name == "monitored" else f"my/{name}", *args, **kwargs)


@pytest.mark.slow
def test_a_module_that_overrides_log_keeps_its_override(record: Callable[..., Record]) -> None:
    lean = LeanLoop()
    check_same(record("plain", kind=Overrides), record("lean", lean, kind=Overrides))
    assert "override" in lean.receipt.changes[0].what


class Manual(Logging):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def test_manual_optimization_logs_the_same(record: Callable[..., Record]) -> None:
    check_same(record("plain", kind=Manual), record("lean", LeanLoop(), kind=Manual))


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Callable[..., Trainer]:
    def run(model: LightningModule, *callbacks: Callback, **kwargs: Any) -> Trainer:
        trainer = Trainer(**{**trainer_kwargs, **kwargs, "callbacks": list(callbacks)})
        trainer.fit(model, loader())
        return trainer

    return run


class Small(LightningModule):
    """One network, and what a test wants done in a step."""

    def __init__(self, step: Callable[[Small, Tensor, int], None] | None = None) -> None:
        super().__init__()
        self.net, self.step = tiny.MLP(), step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        if self.step is not None:
            self.step(self, loss, batch_idx)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def other_arguments(module: Small, loss: Tensor, index: int) -> None:
    module.log("loss", loss, prog_bar=index == 3)


def two_elements(module: Small, loss: Tensor, index: int) -> None:
    module.log("loss", loss.expand(1 + (index == 3)))


def a_text(module: Small, loss: Tensor, index: int) -> None:
    module.log("loss", "high" if index == 3 else loss)


def a_list_as_name(module: Small, loss: Tensor, index: int) -> None:
    module.log(["loss"] if index == 3 else "loss", loss)


def unknown_metric(module: Small, loss: Tensor, index: int) -> None:
    module.log("loss", torchmetrics.MeanMetric() if index == 3 else loss)


@pytest.mark.parametrize(
    "step", [other_arguments, two_elements, a_text, a_list_as_name, unknown_metric]
)
def test_a_wrong_log_raises_what_it_raised(fit: Callable[..., Trainer], step: Any) -> None:
    errors = []
    for callbacks in ([], [LeanLoop()]):
        torch.manual_seed(0)
        with pytest.raises((MisconfigurationException, ValueError, TypeError)) as caught:
            fit(Small(step), *callbacks)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


def test_logging_without_a_logger_warns_each_time(fit: Callable[..., Trainer]) -> None:
    def step(module: Small, loss: Tensor, index: int) -> None:
        with pytest.warns(UserWarning, match="no logger configured"):
            module.log("loss", loss, logger=True)

    fit(Small(step), LeanLoop())


def test_all_is_put_back_after_a_fit_and_after_an_error(fit: Callable[..., Trainer]) -> None:
    def fails(module: Small, loss: Tensor, index: int) -> None:
        module.log("loss", loss, prog_bar=True)
        assert "log" in vars(module) and "__setattr__" in vars(LightningModule)
        if index == 2:
            raise OSError("as wanted")

    def fine(module: Small, loss: Tensor, index: int) -> None:
        module.log("loss", loss, prog_bar=True)

    failing, other = Small(fails), Watcher()
    held: list[Trainer] = []

    class Hold(Callback):
        def setup(self, trainer: Trainer, *_: Any, **__: Any) -> None:
            held.append(trainer)

    with pytest.raises(OSError, match="as wanted"):
        fit(failing, LeanLoop(), Hold(), other)
    fit(Small(fine), LeanLoop(), Hold())
    for trainer in held:
        connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop
        assert type(connector).__mro__[0].__module__.endswith("logger_connector")
        assert "_accel_mixin" not in vars(type(connector))
        assert type(connector._progress_bar_metrics) is dict
        assert set(connector._progress_bar_metrics) == {"loss"}
        for results in (loop._results, loop.val_loop._results):
            assert "_accel_mixin" not in vars(type(results))
            assert not any("_accel_mixin" in vars(type(metric)) for metric in results.values())
        assert not {"_build_kwargs", "_broadcast_sigterm_tensor"} & set(vars(loop))
    assert "log" not in vars(failing)
    assert other.log == failing.log
    assert "__setattr__" not in vars(LightningModule)
    assert not hasattr(call._call_callback_hooks, "accel_stock")


class Half(Callback):
    """Has one hook in its class, and gets another on the way."""

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any, **__: Any) -> None:
        self.seen.append(f"start {pl_module._current_fx_name}")
        if trainer.global_step == 2:
            self.on_after_backward = lambda *_: self.seen.append("late")
            trainer.callbacks.append(LambdaCallback(on_before_zero_grad=self.zero))
        if trainer.global_step == 4:
            trainer.callbacks.pop()

    def zero(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(f"zero {pl_module._current_fx_name} {trainer.global_step}")


@pytest.mark.parametrize("profiler", [None, "simple"])
def test_every_hook_that_a_callback_has_is_called_in_order(
    fit: Callable[..., Trainer], profiler: str | None, capsys: Any
) -> None:
    found = []
    for lean in ([], [LeanLoop()]):
        seen: list[str] = []
        other = LambdaCallback(on_train_batch_end=lambda *_: seen.append("end"))  # noqa: B023
        fit(Small(), other, Half(seen), *lean, max_epochs=2, profiler=profiler)
        found.append(seen)
    assert found[0] == found[1]
    assert found[1].count("late") == 8 and sum("zero" in text for text in found[1]) == 2


def test_a_trainer_beside_a_lean_one_calls_its_hooks_as_ever(fit: Callable[..., Trainer]) -> None:
    seen: list[str] = []

    class Beside(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            fit(Small(), Half(seen), max_epochs=1)
            fit(Small(), LeanLoop(), max_epochs=1)

    trainer = fit(Small(lambda module, loss, _: module.log("a", loss)), LeanLoop(), Beside())
    assert len([text for text in seen if "start" in text]) == 5 and "late" in seen
    assert trainer.global_step == 10
    assert not hasattr(call._call_callback_hooks, "accel_stock")


def test_copies_made_during_the_fit_log_like_any_module(fit: Callable[..., Trainer]) -> None:
    copies: list[Any] = []

    def step(module: Small, loss: Tensor, index: int) -> None:
        module.log("loss", loss)
        if index == 2:
            module.step = None
            copies.append(copy.deepcopy(module))
            buffer = io.BytesIO()
            pickle.dump(module, buffer)
            buffer.seek(0)
            copies.append(pickle.load(buffer))  # noqa: S301

    model = Small(step)
    fit(model, LeanLoop(), EMAWeightAveraging(decay=0.9))
    for each in copies:
        assert each.log.__func__ is LightningModule.log
        assert each.log.__self__ is each


def test_several_runs_of_one_trainer_are_each_lean(trainer_kwargs: dict[str, Any]) -> None:
    lean = LeanLoop()
    trainer = Trainer(**{**trainer_kwargs, "callbacks": [lean], "max_epochs": 1})
    ways: list[bool] = []
    model = Small(lambda module, loss, index: ways.append("log" in vars(module)))
    for _ in range(2):
        trainer.fit_loop.epoch_progress.reset()
        trainer.fit(model, loader())
    assert ways == [True] * 10
    assert [change.name for change in lean.receipt.changes] == ["self.log", "hooks", "progress bar"]
    assert [change.name for change in lean.receipt.skipped] == ["SIGTERM checks"]


@pytest.mark.parametrize(("rate", "expected"), [(0, 0), (5, 1), (1, 5)])
def test_the_bar_waits_for_the_device_only_when_it_is_drawn(
    fit: Callable[..., Trainer], rate: int, expected: int
) -> None:
    def step(module: Small, loss: Tensor, index: int) -> None:
        for name in "abc":
            module.log(name, loss.double() if name == "c" else loss, prog_bar=True)

    bar = {"enable_progress_bar": True} if rate else {}
    counts = []
    for lean in ([LeanLoop()], []):
        bars = [TQDMProgressBar(refresh_rate=rate)] if rate else []
        with Waits() as waits:
            fit(Small(step), *lean, *bars, max_epochs=1, **bar)
        counts.append(waits.count)
    ends = 3  # the plain loop at the end of the epoch, of which no value is due, and of the fit
    assert counts[1] >= 5 * 3  # each value in each step
    assert counts[0] <= 2 * (expected + ends) < counts[1] or rate == 1


def test_no_step_waits_when_nobody_looks(fit: Callable[..., Trainer]) -> None:
    waits: list[int] = []

    def step(module: Small, loss: Tensor, index: int) -> None:
        waits.append(mode.count)
        module.log("loss", loss, prog_bar=True)

    with Waits() as mode:
        fit(Small(step), LeanLoop(), max_epochs=1)
    assert waits[-1] == waits[0]
    with Waits() as mode:
        fit(Small(step), LeanLoop(progress_bar=False), max_epochs=1)
    assert waits[-1] == waits[5] + 4


def test_a_value_that_waits_is_that_of_its_step() -> None:
    state = torch.tensor(1.0)
    late = LateNumbers({"total": _kept(state, SimpleNamespace(is_tensor=False))})
    late.update({"total": _kept(state, SimpleNamespace(is_tensor=False))})
    state += 1  # as a metric does in its next step
    assert late.settle() == {"total": 1.0}


def test_the_name_of_the_running_hook_comes_back(fit: Callable[..., Trainer]) -> None:
    def step(module: Small, loss: Tensor, index: int) -> None:
        call._call_callback_hooks(module.trainer, "on_after_backward")
        assert module._current_fx_name == "training_step"

    fit(Small(step), LeanLoop(), max_epochs=1)


def test_late_numbers_keep_order_and_types() -> None:
    late, plain = LateNumbers({"x": 1}), {"x": 1}
    for update in (
        {"a": torch.tensor(2), "b": 0.5, "c": torch.tensor(0.1)},
        {"c": torch.tensor(0.2), "d": torch.tensor(0.3, dtype=torch.float64), "a": 7},
        {"e": torch.tensor([True])},
    ):
        late.update(update)
        plain.update({n: v.item() if isinstance(v, Tensor) else v for n, v in update.items()})
    assert list(late.settle().items()) == list(plain.items())
    assert [type(value) for value in late.values()] == [type(value) for value in plain.values()]


def test_mixins_come_out_in_any_order() -> None:
    class A:
        def name(self) -> str:
            return "a" + super().name()  # type: ignore[misc]

    class B:
        def name(self) -> str:
            return "b" + super().name()  # type: ignore[misc]

    class Plain:
        def name(self) -> str:
            return "-"

    for first, second in ((A, B), (B, A)):
        it = Plain()
        mixed_in(it, A), mixed_in(it, B), mixed_in(it, A)
        assert it.name() == "ba-"
        taken_out(it, first)
        assert it.name() == ("b-" if first is A else "a-")
        taken_out(it, second)
        assert type(it) is Plain


def test_another_lightning_is_left_alone_and_said_once(
    fit: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lightning, "__version__", "2.7.0")
    lean, stock = LeanLoop(), []
    with pytest.warns(UserWarning, match="did nothing. Found: 2.7.0"):
        fit(Small(lambda m, *_: stock.append("log" not in vars(m))), lean)
    assert all(stock) and not lean.receipt
    assert "2.7.0" in lean.receipt.skipped[0].what
    fit(Small(), lean)  # where a second warning would be an error


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"log": 1}, TypeError), ({"log": None}, TypeError), ({"progress_bar": "yes"}, TypeError),
        ({"sigterm_every_n_steps": 0}, ValueError), ({"sigterm_every_n_steps": -1}, ValueError),
        ({"sigterm_every_n_steps": 2.0}, TypeError), ({"sigterm_every_n_steps": True}, TypeError),
        ({"sigterm_every_n_steps": float("nan")}, TypeError), ({"sigterm_every_n_steps": None}, TypeError),
        ({"hooks": 0}, TypeError),
        ({"log": False, "hooks": False, "progress_bar": False, "sigterm_every_n_steps": 1}, ValueError),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be_meant_are_refused(kwargs: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"Found: .* Do: "):
        LeanLoop(**kwargs)


class Group:
    """Stands in for the other rank of two, which says what it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.other = 0.0, [0, -50]
        self.sent: list[list[int]] = []
        monkeypatch.setattr(torch.distributed, "all_reduce", self.reduce)

    def reduce(self, word: Tensor, op: Any) -> None:
        assert op == torch.distributed.ReduceOp.MAX
        self.sent.append(word.tolist())
        word.copy_(torch.maximum(word, torch.tensor(self.other)))


def throttle(group: Group, every: int = 50) -> tuple[Throttle, list[str]]:
    told: list[str] = []
    made = Throttle(
        every, torch.device("cpu"), leave=lambda: told.append("leave"),
        kill=lambda signum: told.append(f"kill {signum}"), clock=lambda: group.now,
    )  # fmt: skip
    return made, told


@pytest.mark.parametrize(
    ("seconds", "batches", "checks"), [(0.01, 200, 5), (1.0, 22, 6), (60.0, 10, 10)]
)
def test_checks_are_rare_where_batches_are_fast(
    monkeypatch: pytest.MonkeyPatch, seconds: float, batches: int, checks: int
) -> None:
    group = Group(monkeypatch)
    group.other = [0, -(10**9)]
    ours, told = throttle(group)
    for _ in range(batches):
        ours.batch()
        group.now += seconds
    assert ours.num_checks == len(group.sent) == checks and not told


def test_the_ranks_take_the_shorter_wait_and_any_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(monkeypatch)
    ours, told = throttle(group)
    group.other = [0, -3]
    for _ in range(6):
        ours.batch()
        group.now += 0.001
    assert ours.num_checks == 3  # before batches 0, 1 and 4 ... of which the first measures nothing
    ours.soon()
    ours.batch()
    assert ours.num_checks == 4 and not told
    group.other = [1, -3]
    for _ in range(3):
        ours.batch()
    assert told == ["leave"]
    ours.receive(15, None)
    ours.receive(15, None)
    assert told == ["leave", "kill 15"] and ours.signalled
