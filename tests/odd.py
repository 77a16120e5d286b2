"""Modules, data and networks of real users that notice more than most: what a law is tried on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import CombinedLoader
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
from torchmetrics import MeanMetric


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))


X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 3


def pair(batch: Any) -> tuple[Tensor, Tensor]:
    """Return inputs and labels of a batch, of several loaders' batches together."""
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch[0], (list, tuple)):
        pairs = [pair(one) for one in batch if one is not None]
        return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
    return batch[0], batch[1]


# --- modules ----------------------------------------------------------------------------------------


class Plain(LightningModule):
    """Notes every call of its hooks, and what each step was given."""

    fails_at = -1

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.spare = nn.Conv2d(2, 2, 1)  # which nothing calls
        self.calls: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = pair(batch)
        if self.global_step == self.fails_at:
            raise ArithmeticError("the user's own")
        with self.trainer.profiler.profile("mine"):
            loss = F.cross_entropy(self.net(x), y)
        self.calls.append(("step", batch_idx, x.sum().item(), y.tolist(), loss.item()))
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        x, y = pair(batch)
        loss = F.cross_entropy(self.net(x), y)
        self.calls.append(("look", batch_idx, dataloader_idx, x.sum().item(), loss.item()))
        self.log("val_loss", loss, add_dataloader_idx=True)
        return loss

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(pair(batch)[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


_HOOKS = [
    name for name in dir(LightningModule)
    if name.startswith("on_") and callable(getattr(LightningModule, name)) and name != "on_gpu"
]  # fmt: skip
_HOOKS += ["setup", "teardown", "prepare_data", "configure_model", "configure_callbacks"]
_HOOKS += ["backward", "optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping"]
_HOOKS += ["transfer_batch_to_device", "lr_scheduler_step", "log"]


def _noted(name: str) -> Any:
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(f"log {args[0]}" if name == "log" else name)
        return getattr(LightningModule, name)(self, *args, **kwargs)

    return hook


class EveryHook(Plain):
    """Has all the hooks that there are."""


for _name in _HOOKS:
    setattr(EveryHook, _name, _noted(_name))


class CountsTransfers(Plain):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls.append("before")
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls.append("after")
        x, y = pair(batch)
        return [x * 2, y]


class NormInTransfer(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.BatchNorm1d(6, affine=False)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = pair(batch)
        return [self.entry(x), y]


class LogsByHand(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.logger is not None:
            self.logger.log_metrics({"mine": float(loss)}, self.global_step)
            self.logger.experiment.append(float(loss))
        self.trainer.callback_metrics["direct"] = loss.detach()
        return loss


class LogsMetrics(Plain):
    """With a metric that is a module, in the progress bar, under forked names."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.mean(loss)
        self.log("mean", self.mean, on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict({"one": 1, "two": loss * 2}, on_epoch=True, batch_size=3)
        return {"loss": loss, "extra": loss.detach()}


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
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.clip_gradients(optimizer, 0.5)
        self.calls.append(optimizer.param_groups[0]["lr"])
        optimizer.step()


class Gathers(Manual):
    """Steps after every second batch, by hand."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.manual_backward(Plain.training_step(self, batch, batch_idx) / 2)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()


class Duel(Manual):
    """Two optimizers in turns, each with the other's weights switched off."""

    def __init__(self) -> None:
        super().__init__()
        self.judge = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        maker, critic = self.optimizers()  # type: ignore[misc]
        self.toggle_optimizer(maker)
        loss = (
            Plain.training_step(self, batch, batch_idx)
            - self.judge(self.net(pair(batch)[0])).mean()
        )
        maker.zero_grad()
        self.manual_backward(loss)
        maker.step()
        self.untoggle_optimizer(maker)
        with critic.toggle_model(sync_grad=True):
            loss = self.judge(self.net(pair(batch)[0]).detach()).square().mean()
            critic.zero_grad()
            self.manual_backward(loss)
            critic.step()
        self.log_dict({"critic": loss})

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(self.net.parameters(), 1e-2),
            torch.optim.SGD(self.judge.parameters(), 1e-2, momentum=0.9),
        ]


class Draws(Plain):
    """Draws from every generator there is, one of its own included, and in the network."""

    def __init__(self) -> None:
        super().__init__()
        self.net.append(nn.Dropout(0.1))
        self.generator = torch.Generator().manual_seed(5)
        self.chance = random.Random(5)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = pair(batch)
        noise = torch.rand(1, generator=self.generator) + self.chance.random() + random.random()
        noise = noise + np.random.rand() + torch.rand(1)
        return super().training_step([x + noise.float(), y], batch_idx)


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
        pair(batch)[0].mul_(0.5)
        return super().training_step(batch, batch_idx)


class Skips(Plain):
    """Returns nothing for some batches, and ends epochs early."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        return -1 if self.current_epoch == 1 and batch_idx == 3 else None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 2 else loss


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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.calls.append("save")
        checkpoint["chance"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        torch.set_rng_state(checkpoint["chance"])


class Frozen(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        self.backbone.eval()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = pair(batch)
        return super().training_step([self.backbone(x), y], batch_idx)


class BuiltLate(Plain):
    """Has no network before `configure_model`, and none of its labels before `setup`."""

    def __init__(self) -> None:
        super().__init__()
        del self.net, self.spare

    def setup(self, stage: str) -> None:
        self.calls.append(stage)

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net, self.spare = net(), nn.Conv2d(2, 2, 1)


class OneCycle(Plain):
    """Schedules by steps, whose momentum changes too, and asks how long the fit is."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.01, momentum=0.9, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps + 20)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Closure(Plain):
    """An optimizer that runs the step more than once."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), 0.1, max_iter=2)


MODULES: dict[str, type[Plain]] = {
    kind.__name__: kind
    for kind in (
        Plain,
        EveryHook,
        CountsTransfers,
        NormInTransfer,
        LogsByHand,
        LogsMetrics,
        StateAtTheStart,
        TwoSchedulers,
        Manual,
        Gathers,
        Duel,
        Draws,
        Buffers,
        WritesIntoTheBatch,
        Skips,
        Stops,
        Saves,
        Frozen,
        BuiltLate,
        OneCycle,
        Closure,
    )
}


# --- data -------------------------------------------------------------------------------------------


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


class GlobalRandom(Items):
    def __getitem__(self, index: Any) -> Any:
        noise = random.random() + np.random.rand() + torch.rand(1)
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


class ToldTheEpoch(RandomSampler):
    """A sampler that Lightning tells the epoch."""

    def __init__(self) -> None:
        super().__init__(range(40))
        self.told: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.told.append(epoch)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.told[-1] if self.told else 99)
        return iter(torch.randperm(40, generator=generator).tolist())


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


def tensors(**given: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), 8, **given)


def shuffled() -> DataLoader[Any]:
    return tensors(shuffle=True)


def ones(size: int) -> Any:
    return WeightedRandomSampler(torch.arange(1.0, size + 1).tolist(), size)


def collated(items: list[Any]) -> Any:
    """Draw in the collate function, as MixUp does."""
    x, y = (torch.stack(column) for column in zip(*items, strict=True))
    return x * (1 + torch.rand(1) + np.random.rand()).float(), y


LOADERS: dict[str, Callable[[], Any]] = {
    "sequential": tensors,
    "shuffled": shuffled,
    "own generator": lambda: tensors(shuffle=True, generator=torch.Generator().manual_seed(4)),
    "ragged": lambda: DataLoader(Subset(TensorDataset(X, Y), range(36)), 8, shuffle=True),
    "subset sampler": lambda: DataLoader(Items(), 8, sampler=SubsetRandomSampler(range(24))),
    "weighted": lambda: DataLoader(Items(), 8, sampler=ones(40)),
    "bulk sampler": lambda: DataLoader(
        TensorDataset(X, Y),
        batch_size=None,
        sampler=BatchSampler(RandomSampler(range(40)), 8, False),
    ),
    "own order": lambda: DataLoader(Items(), batch_sampler=OwnOrder()),
    "own numpy order": lambda: DataLoader(Items(), 8, sampler=Endless()),
    "told the epoch": lambda: DataLoader(Items(), 8, sampler=ToldTheEpoch()),
    "getitems": lambda: DataLoader(Bulk(), 8, shuffle=True),
    "string keys": lambda: DataLoader(Keys(), 8, sampler=[f"k{i}" for i in range(40)]),
    "subset": lambda: DataLoader(Subset(Remembers(), range(5, 37)), 8),
    "concatenated": lambda: DataLoader(ConcatDataset([Remembers(), OwnRandom()]), 8, shuffle=True),
    "own random": lambda: DataLoader(OwnRandom(), 8, shuffle=True),
    "global random": lambda: DataLoader(GlobalRandom(), 8, shuffle=True),
    "mixed up": lambda: tensors(shuffle=True, collate_fn=collated),
    "remembers": lambda: DataLoader(Remembers(), 8, shuffle=True),
    "consumes": lambda: DataLoader(Consumes(), 8),
    "stream": lambda: DataLoader(Stream(), 8),
    "one shot": lambda: DataLoader(OneShot(), 8),
    "one shot in a closure": lambda: DataLoader(OneShotInClosure(), 8),
    "foreign": Foreign,
    "persistent": Persistent,
    "two by name": lambda: {"a": shuffled(), "b": DataLoader(OwnRandom(), 4, shuffle=True)},
    "two in a list": lambda: [shuffled(), DataLoader(Stream(), 4)],
    "the shorter": lambda: CombinedLoader([shuffled(), Foreign()], "min_size"),
}
