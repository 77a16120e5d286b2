"""A technique that has not acted yet leaves the fit bit for bit the plain fit: one law over odd modules and loaders.

Compared are weights, buffers, optimizer and random states, batches, calls of the user's hooks, logged rows
and files, each with the same fit without the technique.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_accel import AccelReport, Distillation, StepMeter, StructuredPruning
from lightning_accel.loading import FastLoading
from lightning_accel.pruning import WeightMasks
from lightning_accel.surgery.snapshot import random_state

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:The first step could not be rehearsed"),
    pytest.mark.filterwarnings("ignore:.*the teacher is hardly better than guessing"),
    pytest.mark.filterwarnings("ignore:.*distillation has no effect"),
    pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined"),
    pytest.mark.filterwarnings("ignore:the fit ended before"),
    pytest.mark.filterwarnings("ignore:AutoTune leaves this fit as it is"),
    pytest.mark.filterwarnings("ignore:measuring the dense model against"),
]

LATER = 5
"""An epoch that is planned, and that the last step comes before."""

TECHNIQUES: dict[str, Callable[[], list[Callback]]] = {
    "prune": lambda: [StructuredPruning(ratio=0.5, when=LATER)],
    "masks": lambda: [WeightMasks(amount=0.5, when=LATER)],
    "distill": lambda: [Distillation(teacher(), {"kd": 0.0}, student="net")],
    "loading": lambda: [FastLoading()],
    "measure": lambda: [StepMeter(), AccelReport(budget_s=0.01)],
}


def teacher() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return net()


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))


X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 3


class Plain(LightningModule):
    """Notes every call of its hooks, and what each step was given."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.calls: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.calls.append(("step", batch_idx, x.sum().item(), y.tolist()))
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class CountsTransfers(Plain):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls.append("before")
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls.append("after")
        return [batch[0] * 2, batch[1]]


class NormInTransfer(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.BatchNorm1d(6, affine=False)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [self.entry(batch[0]), batch[1]]


class LogsByHand(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.logger.log_metrics({"mine": float(loss)}, self.global_step)  # type: ignore[union-attr]
        self.logger.experiment.append(float(loss))  # type: ignore[union-attr]
        self.trainer.callback_metrics["direct"] = loss.detach()
        return loss


class StateAtTheStart(Plain):
    def on_train_start(self) -> None:
        self.seen = [0]

    def on_train_epoch_start(self) -> None:
        self.epoch_seen = [0]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.here = batch_idx

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen[0] += 1
        self.epoch_seen[0] += self.here
        self.calls.append((self.seen[0], self.epoch_seen[0]))
        return super().training_step(batch, batch_idx)


class TwoSchedulers(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        one, two = self.lr_schedulers()  # type: ignore[misc]
        self.calls.append((one.get_last_lr()[0], two.get_last_lr()[0]))  # type: ignore[union-attr]
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        make = torch.optim.lr_scheduler.LambdaLR
        return [optimizer], [make(optimizer, lambda e: 0.5**e), make(optimizer, lambda e: 1.0)]


class Manual(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(super().training_step(batch, batch_idx))
        self.calls.append(optimizer.param_groups[0]["lr"])  # type: ignore[union-attr]
        optimizer.step()  # type: ignore[union-attr]


class Draws(Plain):
    """Draws from every generator there is, one of its own included."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)
        self.chance = random.Random(5)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        noise = torch.rand(1, generator=self.generator) + self.chance.random() + random.random()
        noise = noise + np.random.rand() + torch.rand(1)
        return super().training_step([batch[0] + noise.float(), batch[1]], batch_idx)


class Buffers(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.count += 1
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *_: Any) -> None:
        self.net[1].running_mean.add_(0.125)  # type: ignore[operator, union-attr]


class WritesIntoTheBatch(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        batch[0].mul_(0.5)
        return super().training_step(batch, batch_idx)


class Stops(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 4:
            self.trainer.should_stop = True
        return super().training_step(batch, batch_idx)


class Saves(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            self.trainer.save_checkpoint(f"step-{self.global_step}.ckpt")
        return super().training_step(batch, batch_idx)


class Frozen(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step([self.backbone(batch[0]), batch[1]], batch_idx)


MODULES: dict[str, type[Plain]] = {
    kind.__name__: kind
    for kind in (
        Plain,
        CountsTransfers,
        NormInTransfer,
        LogsByHand,
        StateAtTheStart,
        TwoSchedulers,
        Manual,
        Draws,
        Buffers,
        WritesIntoTheBatch,
        Stops,
        Saves,
        Frozen,
    )
}


class Items(Dataset[Any]):
    """A map of items; what it does besides is in the subclasses."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: Any) -> Any:
        return X[index], Y[index]


class OwnRandom(Items):
    def __init__(self) -> None:
        self.python, self.numpy = random.Random(1), np.random.default_rng(1)
        self.torch = torch.Generator().manual_seed(1)

    def __getitem__(self, index: Any) -> Any:
        noise = self.python.random() + self.numpy.random() + torch.rand(1, generator=self.torch)
        return X[index] + noise.float(), Y[index]


class Remembers(Items):
    def __init__(self) -> None:
        self.reads, self.cache, self.scale = 0, {}, np.ones(1)

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        self.cache[index] = self.reads
        self.scale *= 1.01
        return X[index] * float(self.scale[0]) + self.reads, Y[index]


class Consumes(Items):
    """Takes noise from a stream that can be read only once."""

    def __init__(self) -> None:
        self.noise = (float(i) for i in range(10**6))

    def __getitem__(self, index: Any) -> Any:
        return X[index] + next(self.noise) / 100, Y[index]


class Bulk(Items):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [(X[i] + len(indices), Y[i]) for i in indices]


class Keys(Items):
    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(int(key.removeprefix("k")))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(zip(X, Y, strict=True))


class OneShot(IterableDataset[Any]):
    def __init__(self) -> None:
        self.source = ((X[i % 40], Y[i % 40]) for i in range(400))

    def __iter__(self) -> Iterator[Any]:
        return self.source


class OneShotInClosure(IterableDataset[Any]):
    def __init__(self) -> None:
        held = iter([(X[i % 40], Y[i % 40]) for i in range(400)])
        self.take = lambda: next(held)

    def __iter__(self) -> Iterator[Any]:
        return (self.take() for _ in range(40))


class OwnOrder:
    """A sampler of batches with a generator of Python's."""

    def __init__(self) -> None:
        self.random, self.epoch = random.Random(0), 0

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[list[int]]:
        self.epoch += 1
        order = [*range(40)]
        self.random.shuffle(order)
        return iter([order[i : i + 8] for i in range(self.epoch % 2, 40, 8)][:5])


class Endless:
    """A sampler that goes on where the last epoch ended."""

    def __init__(self) -> None:
        self.walk = np.random.default_rng(0)

    def __len__(self) -> int:
        return 40

    def __iter__(self) -> Iterator[int]:
        return (int(i) for i in self.walk.permutation(40))


class Foreign:
    """No loader of torch's."""

    def __init__(self) -> None:
        self.passes = 0

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter([(X[i : i + 8] * self.passes, Y[i : i + 8]) for i in range(0, 40, 8)])


class Persistent:
    """Keeps one iterator for the whole training, as detection code does."""

    def __init__(self) -> None:
        self.iterator = self._forever()

    def _forever(self) -> Iterator[Any]:
        while True:
            yield from DataLoader(TensorDataset(X, Y), 8, shuffle=True)

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[Any]:
        return (next(self.iterator) for _ in range(5))


def ones(size: int) -> Any:
    return WeightedRandomSampler(torch.arange(1.0, size + 1).tolist(), size)


LOADERS: dict[str, Callable[[], Any]] = {
    "sequential": lambda: DataLoader(TensorDataset(X, Y), 8),
    "shuffled": lambda: DataLoader(TensorDataset(X, Y), 8, shuffle=True),
    "own generator": lambda: DataLoader(
        TensorDataset(X, Y), 8, shuffle=True, generator=torch.Generator().manual_seed(4)
    ),
    "subset sampler": lambda: DataLoader(Items(), 8, sampler=SubsetRandomSampler(range(24))),
    "weighted": lambda: DataLoader(Items(), 8, sampler=ones(40)),
    "bulk sampler": lambda: DataLoader(
        TensorDataset(X, Y),
        batch_size=None,
        sampler=BatchSampler(RandomSampler(range(40)), 8, False),
    ),
    "own order": lambda: DataLoader(Items(), batch_sampler=OwnOrder()),
    "own numpy order": lambda: DataLoader(Items(), 8, sampler=Endless()),
    "getitems": lambda: DataLoader(Bulk(), 8, shuffle=True),
    "string keys": lambda: DataLoader(Keys(), 8, sampler=[f"k{i}" for i in range(40)]),
    "subset": lambda: DataLoader(Subset(Remembers(), range(5, 37)), 8),
    "concatenated": lambda: DataLoader(ConcatDataset([Remembers(), OwnRandom()]), 8, shuffle=True),
    "own random": lambda: DataLoader(OwnRandom(), 8, shuffle=True),
    "remembers": lambda: DataLoader(Remembers(), 8, shuffle=True),
    "consumes": lambda: DataLoader(Consumes(), 8),
    "stream": lambda: DataLoader(Stream(), 8),
    "one shot": lambda: DataLoader(OneShot(), 8),
    "one shot in a closure": lambda: DataLoader(OneShotInClosure(), 8),
    "foreign": Foreign,
    "persistent": Persistent,
}


class Rows(Logger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Any] = []
        self.experiment: list[float] = []

    name = "rows"
    version = 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        kept = {k: v for k, v in metrics.items() if k.split("/")[0] in ("loss", "mine", "epoch")}
        if set(kept) - {"epoch"}:
            self.rows.append((step, kept))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


class Data(LightningDataModule):
    """Counts in the hooks that Lightning takes from here."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def train_dataloader(self) -> Any:
        return LOADERS["shuffled"]()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.moved += 1
        return [batch[0] + self.moved, batch[1]]


def fit(
    kwargs: dict[str, Any], kind: type[Plain], data: Any, callbacks: list[Callback], folder: Path
) -> dict[str, Any]:
    """Return all that a fit leaves behind."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    module, rows = kind(), Rows()
    given = {**kwargs, "max_epochs": 6, "max_steps": 10, "logger": rows, "log_every_n_steps": 1}
    given |= {"enable_checkpointing": True, "default_root_dir": folder}
    saver = ModelCheckpoint(folder / "saved", every_n_epochs=1, save_top_k=-1)
    trainer = Trainer(**{**given, "callbacks": [*callbacks, saver]}, limit_train_batches=5)
    before = {*Path.cwd().glob("*.ckpt")}
    if isinstance(data, LightningDataModule):
        trainer.fit(module, datamodule=data)
    else:
        trainer.fit(module, data)
    made = {*Path.cwd().glob("*.ckpt")} - before
    for path in made:
        path.unlink()
    return {
        "weights": {k: v.clone() for k, v in module.state_dict().items()},
        "optimizer": [o.state_dict() for o in trainer.optimizers],
        "random": random_state(),
        "calls": module.calls,
        "rows": rows.rows,
        "experiment": rows.experiment,
        "files": sorted(p.name for p in [*made, *(folder / "saved").iterdir()]),
        "moved": getattr(data, "moved", None),
    }


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), (where, found, expected)
        for index, value in enumerate(expected):
            assert_same(found[index], value, f"{where}/{index}")
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected), where
    else:
        assert found == expected or (found != found and expected != expected), where


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("kind", MODULES)
def test_an_odd_module_notices_nothing(
    trainer_kwargs: dict[str, Any], tmp_path: Path, kind: str, technique: str
) -> None:
    def run(callbacks: list[Callback], name: str) -> dict[str, Any]:
        data = LOADERS["shuffled"]()
        return fit(trainer_kwargs, MODULES[kind], data, callbacks, tmp_path / name)

    assert_same(run(TECHNIQUES[technique](), "with"), run([], "plain"))


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("loader", LOADERS)
def test_an_odd_loader_gives_the_same_batches(
    trainer_kwargs: dict[str, Any], tmp_path: Path, loader: str, technique: str
) -> None:
    def run(callbacks: list[Callback], name: str) -> dict[str, Any]:
        return fit(trainer_kwargs, Plain, LOADERS[loader](), callbacks, tmp_path / name)

    assert_same(run(TECHNIQUES[technique](), "with"), run([], "plain"))


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_hooks_of_a_datamodule_count_no_rehearsal(
    trainer_kwargs: dict[str, Any], tmp_path: Path, technique: str
) -> None:
    def run(callbacks: list[Callback], name: str) -> dict[str, Any]:
        return fit(trainer_kwargs, Plain, Data(), callbacks, tmp_path / name)

    assert_same(run(TECHNIQUES[technique](), "with"), run([], "plain"))


@pytest.mark.parametrize("loader", LOADERS)
def test_a_prune_in_mid_training_takes_no_batch_away(
    trainer_kwargs: dict[str, Any], tmp_path: Path, loader: str
) -> None:
    def run(callbacks: list[Callback], name: str) -> Any:
        return fit(trainer_kwargs, Plain, LOADERS[loader](), callbacks, tmp_path / name)["calls"]

    pruned = run([StructuredPruning(ratio=0.5, when=1)], "with")
    assert_same(pruned, run([], "plain"))
