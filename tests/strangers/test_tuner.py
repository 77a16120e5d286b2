"""Measuring and rehearsing as its users reported it elsewhere: the same code twice, and streams without a length."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from test_tuning_search import ATTENTION, OPTIMIZER, PRECISION, STEP_S, World, find, twins
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_accel import AccelReport, AutoTune, StructuredPruning
from lightning_accel.measure import contention, race
from lightning_accel.pruning import SparsityTraining
from lightning_accel.tuning import Settings, benchmark_pool, search

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined"),
    pytest.mark.filterwarnings("ignore:the fit ended before"),
    pytest.mark.filterwarnings("ignore:The `max_epochs"),
    pytest.mark.filterwarnings("ignore:StructuredPruning cuts a network"),
]


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    ticks = SimpleNamespace(perf_counter=lambda: made.now, process_time=lambda: made.worked)
    for module in (race, contention, search, benchmark_pool):
        monkeypatch.setattr(module, "time", ticks)
    monkeypatch.setattr(contention, "_busy_seconds", lambda: 0.0)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_the_same_function_twice_is_never_faster_than_itself(clocked: World, seed: int) -> None:
    """teddykoker/torchsort#47, pytorch/pytorch#113854: a copy of a function drew another curve; there was no spread.

    Every value here is plain under another name, beside noise, a drift of the machine and bursts on it.
    """
    clocked.source.seed(seed)
    clocked.noise = 0.3
    chance = random.Random(seed)

    def disturbed(settings: Settings, count: int) -> None:
        clocked.now += STEP_S * (clocked.now / 50 + (chance.random() < 0.1))

    clocked.on_step = disturbed
    found = find(clocked, PRECISION, OPTIMIZER, ATTENTION, budget_s=5.0)
    assert found.settings == Settings() and len(found.bars) == 1
    assert not [trial for trial in found.trials if trial.verdict == "taken"]


@pytest.mark.slow
@pytest.mark.parametrize("gain", [0.9, 1.15])
def test_a_build_that_is_twenty_percent_off_without_a_reason_is_the_scale(
    clocked: World, gain: float
) -> None:
    """pytorch/benchmark#2527: of the same model one build was always up to 20 % slower than the other."""
    clocked.factors = {"fused_optimizer fused": 1 / gain, "fused_optimizer foreach": 1 / 1.6}
    twins(clocked, 1.2)
    found = find(clocked, OPTIMIZER)
    reasons = {trial.value: trial.reason for trial in found.trials}
    assert "plain against plain is 0.8" in reasons["fused"]
    assert found.settings == Settings(fused_optimizer="foreach"), "1.6x is more than that"


@pytest.mark.slow
def test_what_stands_beside_a_case_does_not_change_its_number(clocked: World) -> None:
    """csarofeen/pytorch#2242: a case read 13 % better alone than behind six others.

    A machine that slows down with every second that it is measured on.
    """
    clocked.on_step = lambda settings, count: clocked.spend(STEP_S * clocked.now / 5)
    clocked.factors = {"attention math": 0.5}
    alone = find(clocked, ATTENTION, budget_s=10.0)
    clocked.now = 0.0
    behind = find(clocked, PRECISION, OPTIMIZER, ATTENTION, budget_s=10.0)
    numbers = [t.ratio for f in (alone, behind) for t in f.trials if t.technique == "attention"]
    assert None not in numbers and numbers[0] == pytest.approx(numbers[1], rel=0.25)
    assert alone.settings == behind.settings == Settings(attention="math")


# --- streams ----------------------------------------------------------------------------------


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.seen: list[float] = []
        self.checked = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.seen.append(float(x.sum()))
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.checked += 1

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class ByHand(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()  # type: ignore[union-attr]


def sample(chance: random.Random) -> tuple[Tensor, int]:
    return torch.tensor([chance.random() for _ in range(6)]), chance.randrange(3)


class Shards(IterableDataset[Any]):
    """Shards drawn for ever from an open tap, and no length: the error is the one of that time."""

    def __init__(self, error: type[Exception]) -> None:
        chance = random.Random(3)
        self.tap = (sample(chance) for _ in iter(int, 1))
        self.error = error

    def __iter__(self) -> Iterator[Any]:
        return self.tap

    def __len__(self) -> int:
        raise self.error("it has no length")


class Pipeline(IterableDataset[Any]):
    """Stages that are functions over iterators, resampled by a generator of the pipeline's own."""

    def __init__(self) -> None:
        self.chance, self.epoch = random.Random(7), -1
        self.stages: list[Callable[[Any], Iterator[Any]]] = [self.resampled, self.shuffled]

    def resampled(self, _: Any) -> Iterator[Any]:
        while True:
            yield sample(self.chance)

    def shuffled(self, source: Iterator[Any]) -> Iterator[Any]:
        held = [next(source) for _ in range(16)]
        for one in source:
            place = self.chance.randrange(16)
            held[place], one = one, held[place]
            yield one

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        flow: Any = None
        for stage in self.stages:
            flow = stage(flow)
        return flow


class Loader:
    """A loader of another library: it has an iterator, and nothing that torch's has."""

    def __init__(self, source: Any) -> None:
        self.source = iter(source)

    def __iter__(self) -> Iterator[Any]:
        for _ in range(4):
            pairs = [next(self.source) for _ in range(5)]
            yield torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])


STREAMS: dict[str, Callable[[], Any]] = {
    "no length, TypeError": lambda: DataLoader(Shards(TypeError), 5),
    "no length, NotImplementedError": lambda: DataLoader(Shards(NotImplementedError), 5),
    "pipeline": lambda: DataLoader(Pipeline(), 5),
    "loader of its own": lambda: Loader(Pipeline()),
    "loader over a tap": lambda: Loader(Shards(TypeError)),
}
TECHNIQUES: dict[str, Callable[[], Callback]] = {
    "sparsity": lambda: SparsityTraining("group_lasso", strength=1e-3),
    "prune": lambda: StructuredPruning(ratio=0.5, when=1, recalibrate=2),
    "report": lambda: AccelReport(budget_s=0.01),
}


def fit(
    kwargs: dict[str, Any], module: Net, data: Any, callbacks: list[Callback], **given: Any
) -> Trainer:
    given = {"max_epochs": 3, "limit_train_batches": 4, **given}
    trainer = Trainer(**{**kwargs, **given}, callbacks=callbacks)
    trainer.fit(module, data)
    return trainer


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("stream", STREAMS)
def test_a_stream_without_a_length_is_read_by_the_fit_alone(
    trainer_kwargs: dict[str, Any], stream: str, technique: str
) -> None:
    """webdataset/webdataset#66 and #346: loaders without a length or an end, and shards drawn anew for ever."""
    kind = ByHand if stream.startswith("loader") else Net
    plain, module, callback = kind(), kind(), TECHNIQUES[technique]()
    fit(trainer_kwargs, plain, STREAMS[stream](), [])
    fit(trainer_kwargs, module, STREAMS[stream](), [callback])
    assert module.seen == plain.seen and len(plain.seen) == 12
    assert isinstance(module.net[0], nn.Linear)
    if isinstance(callback, AccelReport):
        assert callback.report is not None and callback.report.final.macs == 6 * 8 + 8 * 3
        assert all(map(torch.equal, module.parameters(), plain.parameters()))
    elif technique == "prune":
        assert module.net[0].out_features == 4
    else:
        assert not torch.equal(module.net[0].weight, plain.net[0].weight), "it acted"


# --- searches that stay in the fit --------------------------------------------------------------


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contention.Load, "contended", property(lambda self: False))
    monkeypatch.setattr(search, "time", SimpleNamespace(perf_counter=lambda: 0.0))


@pytest.mark.slow
@pytest.mark.parametrize("given", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 7}])
def test_a_search_is_no_part_of_the_training(
    quiet: None, trainer_kwargs: dict[str, Any], given: dict[str, Any]
) -> None:
    """Lightning#17412, #15603, #6675: a search that went on limiting validation, stopped the epoch after it, and
    left its weights behind."""
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
    data = DataLoader(TensorDataset(x, torch.arange(20) % 3), 5, shuffle=True)
    starts: list[Any] = []

    class Starts(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, *_: Any
        ) -> None:
            if not starts or trainer.global_step == 0:
                starts.append([p.clone() for p in pl_module.parameters()])

    counted = []
    for tuning in (
        [],
        [AutoTune(budget_s=0.05, budget_share=1e9, techniques="fused_optimizer", cache=False)],
    ):
        torch.manual_seed(5)
        module = Net()
        trainer = Trainer(
            **{**trainer_kwargs, "limit_train_batches": 1.0, **given}, callbacks=[*tuning, Starts()]
        )
        trainer.fit(module, data, DataLoader(TensorDataset(x, torch.arange(20) % 3), 2))
        counted.append(
            (
                module.seen,
                module.checked,
                trainer.global_step,
                trainer.current_epoch,
                trainer.num_val_batches,
            )
        )
    assert counted[0] == counted[1] and counted[0][1] in (10, 20)
    assert all(map(torch.equal, starts[0], starts[-1]))
