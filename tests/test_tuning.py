"""AutoTune in real fits: no trace of the search, the settings in force, resume, cache, and bad luck."""

from __future__ import annotations

import csv
import gc
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_accel import AccelReport, AutoTune, BlockCompile, StructuredPruning, tune
from lightning_accel.errors import AccelError, Unsupported
from lightning_accel.measure import contention
from lightning_accel.measure.race import Ratio
from lightning_accel.tuning import Settings, in_trainer, search
from lightning_accel.tuning.candidates import TECHNIQUES, SearchSpace, SkippedCandidate
from lightning_accel.tuning.replica import Replica
from lightning_accel.tuning.report import Trial, WaterfallStep
from lightning_accel.tuning.search import SearchResult

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
    pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings(
        "ignore:AttentionBackend has nothing to choose"
    ),  # chosen here, not measured
]

MANY = Settings(
    precision="bf16-mixed", matmul_precision="medium", fused_optimizer="fused", attention="math"
)
QUICK = ("precision", "matmul_precision", "fused_optimizer", "memory_format", "attention")


class Picks:
    """Stands for the search: runs every candidate for a few steps, and picks what the test says."""

    wanted = Settings()
    searches = 0

    def __init__(self, build: Callable[[Settings], Replica], **given: Any) -> None:
        self.build, self.given = build, given

    def run(self, contests: list[SearchSpace], skipped: list[SkippedCandidate]) -> SearchResult:
        Picks.searches += 1
        tried = [
            (c.technique, v) for c in contests for v in c.values if c.technique != "compilation"
        ]
        for settings in [Settings(), *(Settings().having(*one) for one in tried)]:
            replica = self.build(settings)
            replica.gradients(0)
            replica.first_step()
            with replica.around():
                for _ in range(5):
                    replica.step()
        trials = [Trial(*one, "not taken", "as the test says") for one in tried]
        trials += [Trial(s.technique, s.value, "skipped", s.reason) for s in skipped]
        bars = [WaterfallStep("plain", 2.0), WaterfallStep("+ all", 1.0, 2.0, 1.9, 2.1, 2.0)]
        bars = bars if self.wanted != Settings() else bars[:1]
        return SearchResult(self.wanted, trials, bars, Ratio(1.0, 0.99, 1.01), [])


@pytest.fixture(scope="module", autouse=True)
def _quick_garbage() -> Iterator[None]:
    """Keep what was there before out of each collection, of which a search makes many."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def picks(monkeypatch: pytest.MonkeyPatch) -> type[Picks]:
    monkeypatch.setattr(in_trainer, "Search", Picks)
    monkeypatch.setattr(Picks, "wanted", Settings())
    monkeypatch.setattr(Picks, "searches", 0)
    return Picks


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real searches here are about mechanics: other work is no news, and no budget is spent by it."""
    monkeypatch.setattr(contention.Load, "contended", property(lambda self: False))
    monkeypatch.setattr(search, "time", SimpleNamespace(perf_counter=lambda: 0.0))


class Net(LightningModule):
    """Dropout, batch norm, a metric, and a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4)
        )
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=4)
        self.seen: list[Any] = []

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.accuracy(self.net(batch[0]), batch[1])
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log_dict({"loss": loss, "step": float(self.trainer.global_step)}, prog_bar=True)
        self.seen.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.loss(batch))
        self.seen.append(str(self.net[0](batch[0]).dtype))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Scheduled(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("lr", self.lr_schedulers().get_last_lr()[0])
        self.log("lr_too", self.optimizers().param_groups[0]["lr"])
        self.log("sgd", self.trainer.optimizers[0].param_groups[0]["lr"])
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(
            [
                {"params": self.net[0].parameters(), "lr": 0.1},
                {"params": self.net[4].parameters(), "weight_decay": 0.1},
            ],
            0.05,
            momentum=0.9,
        )
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class GAN(LightningModule):
    """Two optimizers and schedulers by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.maker = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
        self.judge = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (first, second), noise = self.optimizers(), torch.randn(len(batch[0]), 4)
        self.toggle_optimizer(first)
        loss = F.softplus(-self.judge(self.maker(noise))).mean()
        self.manual_backward(loss)
        self.clip_gradients(first, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)
        with second.toggle_model():
            real = F.softplus(-self.judge(batch[0])).mean()
            loss = real + F.softplus(self.judge(self.maker(noise).detach())).mean()
            second.zero_grad()
            self.manual_backward(loss)
            second.step()
        for scheduler in self.lr_schedulers():
            scheduler.step()
        self.log("judge", loss)

    def configure_optimizers(self) -> Any:
        both = [torch.optim.Adam(m.parameters(), 1e-2) for m in (self.maker, self.judge)]
        return both, [torch.optim.lr_scheduler.StepLR(o, 3, 0.5) for o in both]


class ManualClosure(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


class Newton(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), 0.1, max_iter=3)


class Sparse(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(8, 4, sparse=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.table(batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SparseAdam(self.parameters(), 1e-2)


class Tied(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = tiny.TiedLM()
        self.net.hidden[0].requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        tokens = batch[0].abs().long().clamp(max=11)
        loss = F.cross_entropy(self.net(tokens).flatten(0, 1), tokens.flatten())
        return {"loss": loss, "tokens": tokens}

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2)


class Greedy(Net):
    """Takes its batch apart and writes into it."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch.pop(0), batch.pop(0)
        assert not batch
        x.mul_(3.0)
        return super().training_step((x, y), batch_idx)


class Hooked(Net):
    """Prepares in hooks what its step needs, counts them, and stops by itself."""

    def on_train_start(self) -> None:
        self.criterion = nn.CrossEntropyLoss()
        self.seen.append("train")

    def on_train_epoch_start(self) -> None:
        self.losses: list[Tensor] = []
        self.seen.append(("epoch", self.current_epoch))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.index = batch_idx

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert self.index == batch_idx
        print("a step says something")
        loss = self.criterion(self.net(batch[0]), batch[1])
        self.losses.append(loss.detach())
        if self.current_epoch == 1 and batch_idx == 3:
            self.trainer.should_stop = True
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("mean", torch.stack(self.losses).mean())


class Stops(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 3:
            self.trainer.should_stop = True
        return super().training_step(batch, batch_idx)


class Chancy(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        noise = float(np.random.rand()) + random.random() + torch.rand(())
        return super().training_step(batch, batch_idx) * noise


class Pairs(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch["a"]) + self.loss(batch["b"][::-1][::-1])


class Augmented(Dataset[Any]):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        self.source = np.random.default_rng(0)

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Any:
        return torch.from_numpy(self.source.normal(size=8)).float(), index % 4


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from ((torch.full((8,), float(i)), i % 4) for i in range(32))


def tensors(size: int = 32) -> TensorDataset:
    values = torch.randn(size, 8, generator=torch.Generator().manual_seed(1))
    return TensorDataset(values, torch.arange(size) % 4)


def data(batch: int = 4, **kwargs: Any) -> DataLoader:
    return DataLoader(tensors(), batch, **kwargs)


def shuffled() -> DataLoader:
    return data(shuffle=True, generator=torch.Generator().manual_seed(2))


def tuner(**kwargs: Any) -> AutoTune:
    given = {"budget_s": 1.0, "budget_share": 1e9, "techniques": QUICK, "cache": False}
    return AutoTune(**{**given, **kwargs})


def train(model: LightningModule, loader: Any, callbacks: list[Callback], **kwargs: Any) -> Trainer:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    trainer = Trainer(**{**kwargs, "callbacks": callbacks})
    trainer.fit(model, loader)
    return trainer


def state(model: LightningModule, trainer: Trainer) -> dict[str, Any]:
    """Return all that a fit leaves behind, as text, floats in full."""
    torch.set_printoptions(precision=10, threshold=100_000)
    text = {
        "weights": model.state_dict(),
        "grads": [p.grad for p in model.parameters()],
        "optimizers": [o.state_dict() for o in trainer.optimizers],
        "schedulers": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
        "seen": getattr(model, "seen", None),
        "metrics": trainer.callback_metrics,
        "stop": (trainer.should_stop, trainer.global_step, trainer.current_epoch),
        "random": (torch.rand(3), random.random(), np.random.rand()),
        "training": [m.training for m in model.modules()],
        "own": sorted(vars(model)),
    }
    found = {name: str(value) for name, value in text.items()}
    torch.set_printoptions(profile="default")
    return found


CASES: dict[str, tuple[type[LightningModule], Callable[[], Any], dict[str, Any]]] = {
    "plain": (Net, shuffled, {}),
    "no generator": (Net, lambda: data(shuffle=True), {}),
    "scheduled": (Scheduled, data, {"gradient_clip_val": 0.1}),
    "accumulate": (Net, data, {"accumulate_grad_batches": 3}),
    "clip value": (Net, data, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "double": (Net, lambda: data(), {"precision": "64-true"}),
    "mixed": (Net, lambda: data(), {"precision": "bf16-mixed"}),
    "gan": (GAN, shuffled, {}),
    "closure": (ManualClosure, data, {}),
    "lbfgs": (Newton, data, {}),
    "sparse": (Sparse, data, {}),
    "tied": (Tied, data, {}),
    "greedy": (Greedy, data, {}),
    "hooked": (Hooked, data, {}),
    "stops": (Stops, data, {}),
    "chancy": (Chancy, data, {}),
    "pairs": (
        Pairs,
        lambda: CombinedLoader({"a": data(), "b": data(2)}, "max_size_cycle"),
        {},
    ),
    "augmented": (Net, lambda: DataLoader(Augmented(), 4), {}),
    "stream": (Net, lambda: DataLoader(Stream(), 4), {}),
    "one batch": (Net, lambda: data(32), {}),
    "overfit": (Net, data, {"overfit_batches": 2}),
    "few": (Net, data, {"limit_train_batches": 2, "max_steps": 3}),
    "batch of one": (Tied, lambda: data(1), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_search_leaves_no_trace(
    picks: type[Picks], trainer_kwargs: dict[str, Any], case: str, capsys: pytest.CaptureFixture
) -> None:
    kind, loader, kwargs = CASES[case]
    found, said = [], []
    for callbacks in ([], [tuner()]):
        model = kind()
        trainer = train(model, loader(), callbacks, **{**trainer_kwargs, **kwargs})
        said.append(capsys.readouterr().out)
        found.append(state(model, trainer))
        assert trainer.callbacks == callbacks
    assert picks.searches == 1
    assert found[0] == found[1]
    assert said[0] == said[1]


def flags() -> dict[str, Any]:
    return {
        "matmul": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "attention": list(torch._C._get_sdp_priority_order()),
        "math": torch.backends.cuda.math_sdp_enabled(),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "anomaly": torch.is_anomaly_enabled(),
    }


class Looks(Callback):
    """Notes what holds during training, and the callbacks at work."""

    def __init__(self) -> None:
        self.flags: list[Any] = []
        self.callbacks: list[str] = []
        self.plugin = ""

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.flags.append(flags())
        self.callbacks = [type(c).__name__ for c in trainer.callbacks]
        self.plugin = type(trainer.precision_plugin).__name__
        self.fused = [g.get("fused") for o in trainer.optimizers for g in o.param_groups]


@pytest.mark.slow
def test_settings_hold_during_the_fit_and_not_after(
    picks: type[Picks], trainer_kwargs: dict[str, Any]
) -> None:
    picks.wanted, before, looks = MANY, flags(), Looks()
    tuning, model = tuner(), Net()
    trainer = train(model, data(), [looks, tuning], **trainer_kwargs)
    assert flags() == before
    during = looks.flags[0]
    assert during["matmul"] == "medium" and looks.fused == [True]
    assert looks.plugin == "AutocastPrecision"
    names = ["Looks", "AutoTune", "UsePrecision", "MatmulPrecision", "FusedOptimizer"]
    assert looks.callbacks == [*names, "AttentionBackend"]
    assert [type(c).__name__ for c in trainer.callbacks] == names[:2]
    assert type(trainer.precision_plugin).__name__ == "Precision"
    assert tuning.settings == MANY and tuning.report is not None and tuning.report.ratio == 2.0
    model.seen.clear()
    trainer.validate(model, data(), verbose=False)  # on its own: as the Trainer does by itself
    assert set(model.seen) == {"torch.float32"}


@pytest.mark.slow
def test_settings_train_as_if_they_had_been_passed(
    picks: type[Picks], trainer_kwargs: dict[str, Any]
) -> None:
    picks.wanted, tuning = MANY, tuner()
    one, other = Net(), Net()
    train(one, shuffled(), [tuning], **trainer_kwargs)
    assert tuning.report is not None
    by_hand = tuning.report.trainer_arguments()
    train(other, shuffled(), by_hand.pop("callbacks"), **{**trainer_kwargs, **by_hand})
    assert_equal(one, other)


def assert_equal(one: LightningModule, other: LightningModule) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.slow
def test_the_same_trainer_fits_twice(picks: type[Picks], trainer_kwargs: dict[str, Any]) -> None:
    picks.wanted, before, looks, model = MANY, flags(), Looks(), Net()
    trainer = train(model, data(), [tuner(), looks], **{**trainer_kwargs, "max_epochs": 1})
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, data())
    assert len(looks.callbacks) == 6 and len(trainer.callbacks) == 2
    assert flags() == before and len(looks.flags) == 16


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_fit_that_breaks_leaves_the_process_as_it_was(
    picks: type[Picks], trainer_kwargs: dict[str, Any], error: type[BaseException]
) -> None:
    class Breaks(Net):
        def on_train_batch_end(self, *_: Any) -> None:
            raise error("mine")

    picks.wanted, before = MANY, flags()
    trainer = Trainer(**trainer_kwargs, callbacks=[tuner()])
    with pytest.raises((error, SystemExit)):
        trainer.fit(Breaks(), data())
    assert flags() == before and len(trainer.callbacks) == 1
    assert type(trainer.precision_plugin).__name__ == "Precision"


def test_settings_that_cannot_come_in_leave_nothing(
    picks: type[Picks], trainer_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_accel.attention import AttentionBackend

    def fails(*_: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(AttentionBackend, "on_fit_start", fails)
    picks.wanted, before = MANY, flags()
    trainer = Trainer(**trainer_kwargs, callbacks=[tuner()])
    with pytest.raises(RuntimeError, match="no such kernel"):
        trainer.fit(Net(), data())
    assert flags() == before and len(trainer.callbacks) == 1


@pytest.mark.slow
def test_a_resumed_run_is_bit_equal_and_searches_no_more(
    picks: type[Picks], trainer_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    class Still(Net):  # Lightning does not restore random numbers
        def __init__(self) -> None:
            super().__init__()
            self.net[3] = nn.Identity()

    picks.wanted, models = MANY, []
    for epochs, path in ((2, None), (1, None), (2, tmp_path / "1.ckpt")):
        model, tuning, looks = Still(), tuner(), Looks()
        saver = ModelCheckpoint(tmp_path, filename=f"{epochs}", enable_version_counter=False)
        kwargs = {**trainer_kwargs, "enable_checkpointing": True, "max_epochs": epochs}
        trainer = Trainer(**kwargs, callbacks=[tuning, looks, saver])
        trainer.fit(model, data(), ckpt_path=path)
        models.append(model)
        if epochs == 1:  # what another search would find no longer matters
            picks.wanted = Settings()
    assert_equal(models[0], models[2])
    assert picks.searches == 2 and tuning.settings == MANY
    assert looks.plugin == "AutocastPrecision" and looks.fused == [True]
    assert tuning.report is not None and tuning.report.cached
    stored = torch.load(tmp_path / "2.ckpt", weights_only=True)
    assert stored["callbacks"]["AutoTune"]["report"]["settings"] == MANY.to_dict()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "searches"), [({"numerics": "exact"}, 2), ({"budget_s": 5.0}, 1)], ids=str
)
def test_a_run_that_is_resumed_under_other_terms_is_tuned_anew(
    picks: type[Picks], trainer_kwargs: dict[str, Any], tmp_path: Path, asked: Any, searches: int
) -> None:
    """Nothing of bf16 may go on when the numbers are to be exact from now on."""
    picks.wanted = Settings(precision="bf16-mixed")
    for epochs, given in ((1, {}), (2, asked)):
        tuning = tuner(**given)
        saver = ModelCheckpoint(tmp_path, filename="a", enable_version_counter=False)
        kwargs = {**trainer_kwargs, "enable_checkpointing": True, "max_epochs": epochs}
        trainer = Trainer(**kwargs, callbacks=[tuning, saver])
        trainer.fit(Net(), data(), ckpt_path=tmp_path / "a.ckpt" if epochs == 2 else None)
        picks.wanted = Settings()
    assert picks.searches == searches
    assert tuning.settings == (Settings() if searches == 2 else Settings(precision="bf16-mixed"))


@pytest.mark.slow
@pytest.mark.parametrize("damage", [{"format": 99}, {"settings": []}, {"bars": None}])
def test_a_checkpoint_of_another_version_searches_anew(
    picks: type[Picks], trainer_kwargs: dict[str, Any], tmp_path: Path, damage: dict[str, Any]
) -> None:
    path = tmp_path / "old.ckpt"
    trainer = train(Net(), data(), [tuner()], **{**trainer_kwargs, "max_epochs": 1})
    trainer.save_checkpoint(path)
    stored = torch.load(path, weights_only=True)
    stored["callbacks"]["AutoTune"]["report"].update(damage)
    torch.save(stored, path)
    tuning = tuner()
    with pytest.warns(UserWarning, match="searches anew"):
        Trainer(**trainer_kwargs, callbacks=[tuning]).fit(Net(), data(), ckpt_path=path)
    assert picks.searches == 2 and tuning.report is not None and not tuning.report.cached


class Other(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Wider(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net[3] = nn.Dropout(0.5)


class OtherStep(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return 2 * super().training_step(batch, batch_idx)


OtherStep.__qualname__ = Net.__qualname__  # as if edited between two runs


@pytest.mark.slow
def test_a_second_run_starts_at_once(
    picks: type[Picks], trainer_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    picks.wanted, models = MANY, []
    for _ in range(2):
        model, tuning = Net(), tuner(cache=tmp_path / "answers")
        train(model, shuffled(), [tuning], **trainer_kwargs)
        models.append(model)
    assert picks.searches == 1 and tuning.report is not None and tuning.report.cached
    assert tuning.settings == MANY and len(list((tmp_path / "answers").iterdir())) == 1
    assert_equal(*models)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "loader", "kwargs", "tuning"),
    [
        (Other, data, {}, {}),
        (Wider, data, {}, {}),
        (OtherStep, data, {}, {}),
        (Net, lambda: data(8), {}, {}),
        (Net, data, {"gradient_clip_val": 1.0}, {}),
        (Net, data, {"accumulate_grad_batches": 2}, {}),
        (Net, data, {"precision": "bf16-mixed"}, {}),
        (Net, data, {"max_epochs": 40, "limit_train_batches": 1}, {}),
        (Net, data, {}, {"numerics": "exact"}),
        (Net, data, {}, {"techniques": "fused_optimizer"}),
    ],
)
def test_what_an_answer_depends_on_makes_a_new_one(
    picks: type[Picks],
    trainer_kwargs: dict[str, Any],
    tmp_path: Path,
    model: type[Net],
    loader: Callable[[], Any],
    kwargs: dict[str, Any],
    tuning: dict[str, Any],
) -> None:
    train(Net(), data(), [tuner(cache=tmp_path / "a")], **trainer_kwargs)
    given = {**trainer_kwargs, **kwargs}
    train(model(), loader(), [tuner(cache=tmp_path / "a", **tuning)], **given)
    assert picks.searches == 2


@pytest.mark.slow
def test_the_way_of_clipping_and_the_threads_count_too(
    picks: type[Picks], trainer_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    kwargs = {**trainer_kwargs, "gradient_clip_val": 1.0, "max_epochs": 1}
    for algorithm in ("norm", "value"):
        tuning = tuner(cache=tmp_path / "a")
        train(Net(), data(), [tuning], **kwargs, gradient_clip_algorithm=algorithm)
    assert picks.searches == 2
    torch.set_num_threads(2)
    try:
        train(Net(), data(), [tuning], **kwargs, gradient_clip_algorithm="value")
    finally:
        torch.set_num_threads(1)
    assert picks.searches == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"x"', '{"format": 1}', '{"format": 1, "settings": []}', "\x00"]
)
def test_a_damaged_answer_is_made_anew(
    picks: type[Picks], trainer_kwargs: dict[str, Any], tmp_path: Path, text: str
) -> None:
    for searches in (1, 2, 2):
        train(Net(), data(), [tuner(cache=tmp_path / "a")], **{**trainer_kwargs, "max_epochs": 1})
        assert picks.searches == searches
        if searches == 1:
            next((tmp_path / "a").iterdir()).write_text(text)


def test_a_folder_that_cannot_be_written_stops_nobody(
    picks: type[Picks], trainer_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    tuning = tuner(cache=tmp_path / "file")
    train(Net(), data(), [tuning], **trainer_kwargs)
    assert tuning.report is not None and picks.searches == 1


def test_reports_are_written_in_every_form(
    picks: type[Picks], trainer_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    picks.wanted = MANY
    files = [tmp_path / "r" / f"x.{end}" for end in ("yaml", "yml", "json", "svg", "md", "txt")]
    train(Net(), data(), [tuner(report=files, batch_sizes=[2, 64])], **trainer_kwargs)
    for file in files:
        text = file.read_text()
        assert "bf16-mixed" in text and "nan" not in text.lower()
    assert "64" in files[5].read_text()


def test_a_report_beside_the_logs_needs_no_path(
    picks: type[Picks], trainer_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    picks.wanted = MANY
    train(Net(), data(), [tuner(report=True)], **trainer_kwargs | {"default_root_dir": "logs"})
    assert "bf16-mixed" in (tmp_path / "logs" / "tuned.yaml").read_text()


@pytest.mark.parametrize(
    ("kind", "kwargs"), [(Net, {}), (Sparse, {}), (Net, {"precision": "64-true"})]
)
def test_products_in_float32_are_found(
    picks: type[Picks],
    trainer_kwargs: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    kind: type[LightningModule],
    kwargs: dict[str, Any],
) -> None:
    found: list[bool] = []

    class Looking(Picks):
        def run(self, contests: Any, skipped: Any) -> SearchResult:
            for precision in ("plain", "bf16-mixed"):
                replica = self.build(Settings(precision=precision))
                found.append(replica.has_float32_products())
            return super().run(contests, skipped)

    monkeypatch.setattr(in_trainer, "Search", Looking)
    train(kind(), data(), [tuner()], **{**trainer_kwargs, "max_epochs": 1, **kwargs})
    assert found == [kind is Net and not kwargs, False]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Greedy, Hooked, Chancy, GAN, Newton])
def test_a_copy_repeats_its_step(
    picks: type[Picks],
    trainer_kwargs: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    kind: type[LightningModule],
) -> None:
    """Also where the step writes into its batch, draws random numbers, or keeps what it saw."""
    found: list[Any] = []

    class Repeats(Picks):
        def run(self, contests: Any, skipped: Any) -> SearchResult:
            for _ in range(2):
                replica = self.build(Settings())
                for steps in (0, 70):
                    with replica.around(7):
                        for _ in range(steps):
                            replica.step()
                    replica.rewind()
                    found.append(replica.gradients(0))
            return super().run(contests, skipped)

    monkeypatch.setattr(in_trainer, "Search", Repeats)
    train(kind(), data(), [tuner()], **{**trainer_kwargs, "max_epochs": 1})
    assert len(found) == 4
    for loss, gradients in found[1:]:
        assert loss == found[0][0] and gradients.keys() == found[0][1].keys()
        assert all(torch.equal(g, found[0][1][name]) for name, g in gradients.items())


@pytest.mark.slow
def test_what_the_logger_gets_is_one_number(
    picks: type[Picks], trainer_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    class Talks(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.logger.log_metrics({"own": 1.0}, self.global_step)
            self.logger.experiment.log_metrics({"deep": 1.0}, self.global_step)
            return super().training_step(batch, batch_idx)

    picks.wanted, rows = MANY, []
    for callbacks in ([], [tuner()]):
        logger = CSVLogger(tmp_path, str(len(callbacks)), "0")
        kwargs = {**trainer_kwargs, "logger": logger, "log_every_n_steps": 1}
        train(Talks(), data(), callbacks, **kwargs)
        with open(Path(logger.log_dir) / "metrics.csv") as file:
            rows.append(list(csv.DictReader(file)))
    assert [sum(bool(r.get(k)) for r in rows[1]) for k in ("own", "deep")] == [16, 16]
    ratios = [r["tuning/ratio"] for r in rows[1] if r.get("tuning/ratio")]
    assert ratios == ["2.0"] and len(rows[1]) - len(rows[0]) in (0, 1)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"fast_dev_run": True},
        {"limit_train_batches": 0},
        {"max_epochs": 0},
        {"max_steps": 0},
    ],
)
def test_runs_without_a_length_are_not_tuned(
    picks: type[Picks], trainer_kwargs: dict[str, Any], kwargs: dict[str, Any]
) -> None:
    tuning = tuner()
    train(Net(), data(), [tuning], **{**trainer_kwargs, **kwargs})
    assert picks.searches == 0 and tuning.settings == Settings()


def test_a_barebones_trainer_is_tuned(picks: type[Picks]) -> None:
    picks.wanted = Settings(fused_optimizer="fused")

    class Bare(Tied):
        pass

    tuning = tuner()
    trainer = Trainer(accelerator="cpu", barebones=True, max_epochs=1, callbacks=[tuning])
    trainer.fit(Bare(), data())
    assert tuning.settings == picks.wanted


def test_validation_and_tests_alone_do_not_search(
    picks: type[Picks], trainer_kwargs: dict[str, Any]
) -> None:
    trainer = Trainer(**trainer_kwargs, callbacks=[tuner()])
    trainer.validate(Net(), data(), verbose=False)
    assert picks.searches == 0


class NoLoss(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


class Uncopyable(Net):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = (i for i in range(3))


class Unoptimized(Net):
    def configure_optimizers(self) -> Any:
        return None


class OneShot(IterableDataset[Any]):
    def __init__(self) -> None:
        self.left = (i for i in range(32))  # cannot be copied

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return torch.full((8,), float(next(self.left))), 0


class ByHand(ManualClosure):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.loss(batch).backward()
        optimizer.step()


HARD: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "no loss": (NoLoss, data),
    "no copy": (Uncopyable, data),
    "no optimizer": (Unoptimized, data),
    "one shot": (Net, lambda: DataLoader(OneShot(), 4)),
    "by hand": (ByHand, data),
}


@pytest.mark.parametrize("case", HARD)
def test_what_cannot_be_measured_trains_as_it_did(
    quiet: None, trainer_kwargs: dict[str, Any], case: str
) -> None:
    kind, loader = HARD[case]
    found = []
    for tuning in (None, tuner(budget_s=0.01, techniques="fused_optimizer")):
        model = kind()
        kwargs = {**trainer_kwargs, "max_epochs": 1}
        if tuning is None:
            trainer = train(model, loader(), [], **kwargs)
        else:
            with pytest.warns(UserWarning, match=r"Found: .* Do: "):
                trainer = train(model, loader(), [tuning], **kwargs)
            assert tuning.report is not None and "not tuned" in tuning.report.notes[0]
            assert "not tuned" in tuning.report.to_text()
        found.append(state(model, trainer))
    assert found[0] == found[1]


def test_an_error_of_the_users_own_step_is_theirs(trainer_kwargs: dict[str, Any]) -> None:
    class Fails(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise ZeroDivisionError("mine")

    with (
        pytest.warns(UserWarning, match="ZeroDivisionError: mine"),
        pytest.raises(ZeroDivisionError, match="mine"),
    ):
        train(Fails(), data(), [tuner()], **trainer_kwargs)
    with pytest.raises(Exception, match="mine"):
        tune(Fails(), data(), techniques="fused_optimizer", cache=False, accelerator="cpu")


def test_a_step_that_draws_its_own_batches_is_refused(trainer_kwargs: dict[str, Any]) -> None:
    class Draws(Net):
        def training_step(self, dataloader_iter: Any) -> Any:
            return self.loss(next(dataloader_iter)[0])

    with pytest.raises(Unsupported, match=r"dataloader_iter.*Do:"):
        train(Draws(), data(), [tuner()], **trainer_kwargs)


@pytest.mark.slow
def test_others_beside(picks: type[Picks], trainer_kwargs: dict[str, Any], tmp_path: Path) -> None:
    picks.wanted = MANY

    class Kind(Net):
        pass

    others = [
        EarlyStopping("val", patience=9),
        EMAWeightAveraging(decay=0.9),
        AccelReport(budget_s=0.1),
        StructuredPruning(ratio=0.5, when=[1]),
        BlockCompile(backend="eager"),
        ModelCheckpoint(tmp_path, monitor="val"),
    ]
    tuning, looks, model = tuner(techniques=(*QUICK, "compilation")), Looks(), Kind()
    kwargs = {**trainer_kwargs, "enable_checkpointing": True, "max_epochs": 3}
    trainer = Trainer(**kwargs, callbacks=[tuning, *others[:3], looks, *others[3:]])
    trainer.fit(model, data(), data())
    assert tuning.report is not None
    skipped = {t.technique: t.reason for t in tuning.report.trials if t.verdict == "skipped"}
    assert "BlockCompile" in skipped["compilation"]
    assert set(looks.callbacks) > {"MatmulPrecision", "FusedOptimizer", "ModelCheckpoint"}
    assert looks.callbacks[-1] == "ModelCheckpoint"
    assert model.net[0].out_features < 16  # pruned, and trained on
    assert flags()["matmul"] == "highest"


def test_what_a_cpu_cannot_do_is_skipped_with_a_reason(
    picks: type[Picks], trainer_kwargs: dict[str, Any]
) -> None:
    tuning = tuner(techniques=TECHNIQUES)
    train(Net(), data(), [tuning], **trainer_kwargs)
    assert tuning.report is not None
    reasons = {(t.technique, t.value): t.reason for t in tuning.report.trials}
    assert "CUDA" in reasons["compilation", "with CUDA graphs"]
    assert "numerics='low'" in reasons["float8", "tensorwise"]
    assert "slower" in reasons["precision", "16-mixed"]
    assert "scaled_dot_product_attention" in reasons["attention", "any"]
    assert "convolution" in reasons["memory_format", "channels_last"]
    assert {t.technique for t in tuning.report.trials} >= set(TECHNIQUES)
    assert all(t.reason for t in tuning.report.trials if t.verdict == "skipped")


def test_a_precision_that_is_set_stays(picks: type[Picks], trainer_kwargs: dict[str, Any]) -> None:
    tuning = tuner()
    train(Net(), data(), [tuning], **{**trainer_kwargs, "precision": "64-true"})
    assert tuning.report is not None
    reasons = {t.value: t.reason for t in tuning.report.trials if t.technique == "precision"}
    assert reasons["bf16-mixed"] == "the Trainer already has DoublePrecision"


@pytest.mark.slow
def test_a_wrong_gradient_is_rejected_with_its_figure(
    quiet: None, trainer_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Replica.course

    def turned(self: Replica, seed: int, steps: int = 3) -> Any:
        course = right(self, seed, steps)
        if self.settings["precision"] == "bf16-mixed":
            for _, found in course:
                found["net.0.weight"] = -found["net.0.weight"]
        return course

    monkeypatch.setattr(Replica, "course", turned)
    tuning = tuner(budget_s=1e6, techniques="precision")  # of which a slow step is no part
    train(Net(), data(), [tuning], **trainer_kwargs)
    assert tuning.report is not None and tuning.settings == Settings()
    trial = next(t for t in tuning.report.trials if t.value == "bf16-mixed")
    assert trial.verdict == "rejected" and "of net.0.weight" in trial.reason


class Moving(Net):
    """Schedules of its own: by a counter, by the number of the step, and in a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 4)
        self.drop, self.scale, self._steps = 1.0, 1.0, 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.drop *= 0.9

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self._steps += 1
        self.scale = 1.0 / (1 + self._steps) + self.global_step
        return F.cross_entropy(self.net(batch[0] * self.drop * self.factor()), batch[1])

    def factor(self) -> float:
        return self.scale


def test_several_steps_are_compared_over_which_the_modules_own_schedules_move(
    picks: type[Picks], trainer_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    batches: list[Any] = []

    class Looks(Picks):
        def run(self, contests: list[SearchSpace], skipped: list[SkippedCandidate]) -> SearchResult:
            replica = self.build(Settings())
            batches.extend(replica._batches[:3])
            for _ in range(2):
                found.append([loss for loss, _ in replica.course(0)])
                found.append((replica.module.drop, replica.module.scale, replica.module._steps))
            return super().run(contests, skipped)

    monkeypatch.setattr(in_trainer, "Search", Looks)
    model = Moving()
    weight, bias = model.net.weight.detach().clone(), model.net.bias.detach().clone()
    train(model, data(), [tuner()], **trainer_kwargs)
    wanted = [
        float(F.cross_entropy(F.linear(x * 0.9**n * (1 / (n + 1) + n - 1), weight, bias), y))
        for n, (x, y) in enumerate(batches, 1)
    ]
    assert found[0] == found[2] == pytest.approx(wanted, rel=1e-5)
    assert found[1] == found[3] == (1.0, 1.0, 0)


@pytest.mark.slow
def test_a_candidate_that_keeps_an_old_value_is_refused(
    quiet: None, trainer_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """pytorch#194976 and #197889: right for two steps, and from the third on with the value of the second."""
    apply = Replica._enter

    def stale(self: Replica, settings: Settings) -> None:
        apply(self, settings)
        values: list[float] = []

        def factor() -> float:
            values.append(self.module.scale)
            return values[min(1, len(values) - 1)]

        if settings["fused_optimizer"] == "fused":
            vars(self.module)["factor"] = factor

    monkeypatch.setattr(Replica, "_enter", stale)
    tuning = tuner(budget_s=1e6, techniques="fused_optimizer", numerics="exact")
    train(Moving(), data(), [tuning], **trainer_kwargs)
    assert tuning.report is not None
    trial = next(t for t in tuning.report.trials if t.value == "fused")
    assert trial.verdict == "rejected" and "loss off by" in trial.reason


def test_products_in_float32_are_seen_until_autocast_takes_them(
    quiet: None, trainer_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    class Looks(Picks):
        def run(self, contests: list[SearchSpace], skipped: list[SkippedCandidate]) -> SearchResult:
            for settings in (Settings(), Settings(precision="bf16-mixed")):
                seen[settings.label] = self.build(settings).has_float32_products()
            return super().run(contests, skipped)

    monkeypatch.setattr(in_trainer, "Search", Looks)
    train(Net(), data(), [tuner()], **trainer_kwargs)
    assert seen == {"plain": True, "bf16-mixed": False}


@pytest.mark.slow
def test_a_real_search_leaves_no_trace(quiet: None, trainer_kwargs: dict[str, Any]) -> None:
    found, before = [], flags()
    techniques = ("precision", "matmul_precision", "fused_optimizer", "attention")

    class Attends(Net):
        def __init__(self) -> None:
            super().__init__()
            self.attend = tiny.AttentionNet()

        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) + self.attend(batch[0][:, None]).square().mean()

    for callbacks in ([], [tuner(budget_s=0.1, techniques=techniques)]):
        model = Attends()
        trainer = train(model, shuffled(), callbacks, **{**trainer_kwargs, "max_epochs": 1})
        found.append((state(model, trainer), callbacks and callbacks[0].settings))
        assert flags() == before
    assert found[1][1] != Settings() or found[0][0] == found[1][0]


@pytest.mark.slow
def test_tune_leaves_module_data_and_process_alone(quiet: None) -> None:
    generator = torch.Generator().manual_seed(5)
    model, loader = Net(), data(shuffle=True, generator=generator)
    model.train(False)

    def everything() -> Any:
        return (
            str(model.state_dict()), sorted(vars(model)), model.seen, model._trainer,
            [m.training for m in model.modules()], [p.grad for p in model.parameters()],
            str(torch.get_rng_state().tolist()), random.getstate(), str(np.random.get_state()),
            generator.get_state().tolist(), flags(), sorted(vars(loader)),
        )  # fmt: skip

    before = everything()
    report = tune(
        model,
        loader,
        techniques="fused_optimizer",
        budget_s=0.1,
        cache=False,
        accelerator="cpu",
        steps=77,
    )
    assert everything() == before
    assert report.steps == 77 and report.bars and report.resolution != (1.0, 1.0, 1.0)
    assert {t.value for t in report.trials} == {"fused", "foreach"}


@pytest.mark.parametrize(
    "kwargs",
    [
        {"max_epochs": 0},
        {"max_steps": 0},
        {"limit_train_batches": 0},
        {"fast_dev_run": True},
        {"barebones": True},
        {"callbacks": Looks()},
        {"callbacks": None},
    ],
)
def test_tune_measures_or_says_why_not(picks: type[Picks], kwargs: dict[str, Any]) -> None:
    given = {"techniques": "fused_optimizer", "cache": False, "accelerator": "cpu", **kwargs}
    try:
        report = tune(Net(), data(), **given)
    except (AccelError, ValueError) as error:
        found = str(error)
    else:
        found = "Do:" if report.bars else ""
    assert "Do:" in found


@pytest.mark.parametrize("module", [None, nn.Linear(2, 2), Net, "net"])
def test_tune_wants_a_module(module: Any) -> None:
    with pytest.raises(TypeError, match=r"LightningModule.*Found:.*Do:"):
        tune(module, data())


@pytest.mark.slow
def test_the_length_of_the_run_is_known(
    picks: type[Picks], trainer_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 batches per epoch; what the Trainer limits by steps or time counts as well."""
    given: list[dict[str, Any]] = []

    class Notes(Picks):
        def run(self, contests: Any, skipped: Any) -> SearchResult:
            given.append(self.given)
            return super().run(contests, skipped)

    monkeypatch.setattr(in_trainer, "Search", Notes)
    for kwargs, steps in (
        ({"max_epochs": 3}, 24),
        ({"max_epochs": 3, "max_steps": 5}, 5),
        ({"max_epochs": 3, "max_steps": 5, "accumulate_grad_batches": 2}, 10),
        ({"max_epochs": -1, "max_steps": 3, "max_time": {"seconds": 100}}, 3),
    ):
        train(Net(), data(), [tuner()], **{**trainer_kwargs, **kwargs})
        assert given[-1]["steps"] == steps
    assert 90 < given[-1]["longest_s"] <= 100 and given[0]["longest_s"] == float("inf")
    train(Net(), DataLoader(Stream(), 4), [tuner()], **trainer_kwargs)
    assert given[-1]["steps"] == 100_000  # nobody knows


def test_captured_code_of_the_user_stays(
    picks: type[Picks],
    trainer_kwargs: dict[str, Any],
    clean_dynamo: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frames: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        frames.append(graph)
        return graph

    compiled = torch.compile(lambda x: x * 2 + 1, backend=backend)
    compiled(torch.ones(3))

    class Compiles(Picks):
        def run(self, contests: Any, skipped: Any) -> SearchResult:
            torch.compile(lambda x: x - 1, backend=backend)(torch.ones(2))
            return super().run(contests, skipped)

    monkeypatch.setattr(in_trainer, "Search", Compiles)
    train(Net(), data(), [tuner()], **trainer_kwargs)
    compiled(torch.ones(3))
    assert len(frames) == 2  # the user's and the search's, none anew


def test_two_searches_at_once_keep_one_whole_answer(tmp_path: Path) -> None:
    from lightning_accel.tuning import TuneReport, store

    report = TuneReport(MANY, notes=["x" * 20_000])
    errors: list[Any] = []

    def write() -> None:
        for _ in range(20):
            errors.append(store.save(tmp_path / "a", "key", report))
            found = store.load(tmp_path / "a", "key")
            if found is None or found.notes != report.notes:
                errors.append("torn")

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [None] * 60
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["key.json"]
