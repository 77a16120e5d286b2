"""Views of each sample that come again: somebody says which epoch it is, however the data are wrapped."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from distilling import Fit, fits
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import (
    ChainDataset,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    StackDataset,
    Subset,
    random_split,
)

from lightning_accel import Distillation
from lightning_accel.distillation import SeededViews

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"
)


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Fit:
    return fits(trainer_kwargs)


class Noise(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return torch.rand(3) + index


class Wrapped(Dataset):
    """As users write them: another name for what is within."""

    def __init__(self, inner: Any) -> None:
        self.source = {"images": [inner]}

    def __len__(self) -> int:
        return len(self.source["images"][0])

    def __getitem__(self, index: int) -> Any:
        return self.source["images"][0][index]


class Slotted(Wrapped):
    __slots__ = ("inner",)

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        return self.inner[index]


class Stream(IterableDataset):
    def __init__(self, inner: Any) -> None:
        self.read = lambda: (inner[i] for i in range(len(inner)))  # in a closure

    def __iter__(self) -> Iterator[Any]:
        return self.read()


def of(dataset: Any) -> DataLoader[Any]:
    return DataLoader(dataset, 2, collate_fn=collate)


def collate(items: list[Any]) -> Tensor:
    return torch.stack([item["a"] if isinstance(item, dict) else item for item in items])


NESTS: dict[str, Callable[[Any], Any]] = {
    "alone": of,
    "concatenated": lambda d: of(ConcatDataset([[torch.zeros(3)] * 2, d])),
    "a subset": lambda d: of(Subset(d, [0, 1, 2])),
    "a split": lambda d: of(random_split(d, [2, 2])[0]),
    "stacked": lambda d: of(StackDataset(a=d, b=[0] * 4)),
    "a stream": lambda d: of(Stream(d)),
    "chained": lambda d: of(ChainDataset([Stream(d)])),
    "of the user": lambda d: of(Wrapped(d)),
    "in a slot": lambda d: of(Slotted(d)),
    "deep": lambda d: of(Wrapped(Subset(ConcatDataset([Wrapped(Wrapped(d))]), [0, 1]))),
    "in a partial": lambda d: DataLoader(range(4), 2, collate_fn=functools.partial(pick, d)),
    "several loaders": lambda d: {"a": of(d)},
    "a list of loaders": lambda d: [of(d)],
    "combined": lambda d: CombinedLoader({"a": of(d)}, "max_size_cycle"),
    "several columns": lambda d: CombinedLoader([of(d), of([torch.zeros(3)])], "min_size"),
}


def pick(dataset: Any, indices: list[int]) -> Tensor:
    return torch.stack([dataset[i] for i in indices])


class Watches(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)
        self.seen: set[float] = set()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x, *_) = (
            batch.values()
            if isinstance(batch, dict)
            else batch
            if isinstance(batch, list)
            else (batch,)
        )
        self.seen |= {float(row.sum()) for row in x if row.any()}
        return self.net(x).var(1).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("nest", NESTS)
def test_every_epoch_shows_another_view_wherever_the_views_are_held(fit: Fit, nest: str) -> None:
    views, model = SeededViews(Noise(), 3), Watches()
    batches = NESTS[nest](views)
    fit(
        model,
        Distillation(nn.Linear(3, 2), diagnostics_every_n_steps=0),
        batches=batches,
        max_epochs=3,
    )
    items = {"a subset": 3, "a split": 2, "deep": 2, "several columns": 2}.get(nest, 4)
    assert len(model.seen) == 3 * items


def test_views_of_a_data_module_that_loads_anew_hear_of_the_epoch(fit: Fit) -> None:
    class Data(LightningDataModule):
        def train_dataloader(self) -> Any:
            return of(Subset(SeededViews(Noise(), 3), [0, 1]))

    model = Watches()
    fit(
        model, Distillation(nn.Linear(3, 2), diagnostics_every_n_steps=0), batches=Data(),
        max_epochs=3, reload_dataloaders_every_n_epochs=1,
    )  # fmt: skip
    assert len(model.seen) == 6


def test_views_whose_epoch_nobody_sets_say_so_once() -> None:
    views = SeededViews(Noise(), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            [views[i] for i in range(4)]  # a look, and an epoch
    with pytest.warns(UserWarning, match=r"one of them for ever.*Found: 8 items.*Do: .*set_epoch"):
        views[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told, single = SeededViews(Noise(), 3), SeededViews(Noise(), 1)
        told.set_epoch(0)
        for data in (views, told, single):
            for _ in range(5):
                [data[i] for i in range(4)]


def test_views_that_workers_make_say_so_as_well() -> None:
    # one worker, as several may miss some of each other's counts
    batches = DataLoader(SeededViews(Noise(), 3), 2, num_workers=1, multiprocessing_context="fork")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [list(batches) for _ in range(2)]
        with pytest.raises(UserWarning, match=r"worker(.|\n)*one of them for ever"):
            for _ in batches:  # a list would ask for the length while the worker counts
                pass
    with pytest.warns(UserWarning, match="one of them for ever"):
        [list(batches) for _ in range(2)]  # here too, as the next epoch asks how long it is
