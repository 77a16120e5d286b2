"""Data that changes, orders with a memory, batches of any class: each as its user reported it, beside plain Lightning."""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Callable, Iterator
from multiprocessing import Value
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from lightning_accel import StructuredPruning
from lightning_accel.bridge.data import batches
from lightning_accel.loading import FastLoading

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:loading stays as it is"),
]

N = 24


def numbers() -> tuple[Tensor, Tensor]:
    return torch.arange(N * 3, dtype=torch.float32).view(N, 3), torch.arange(N) % 4


class Module(LightningModule):
    """Keeps what it is given; dropout draws between the batches, as the next epoch's order does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3))
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(repr(batch) if _odd(batch) else [repr(x) for x in tree_flatten(batch)[0]])
        self.seen.append([str(tree_flatten(batch)[1]), float(torch.rand(()))])
        return self.net(torch.ones(2, 3)).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def _odd(batch: Any) -> bool:
    return not isinstance(batch, (list, tuple, dict, Tensor))


class Then(Callback):
    """Does something of the user's to the dataset, at one moment or another."""

    def __init__(self, deed: Callable[[Any, int], None], when: str) -> None:
        self.deed = deed
        setattr(self, when, self._do)

    def _do(self, trainer: Trainer, *_: Any) -> None:
        self.deed(trainer.train_dataloader, trainer.global_step)


MOMENTS = ["on_train_epoch_end", "on_train_epoch_start", "on_train_batch_end"]


def run(
    kwargs: dict[str, Any],
    make: Callable[[], Any],
    deed: Callable[[Any, int], None],
    when: str,
    fast: list[Callback],
) -> Any:
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    module, loader = Module(), make()
    trainer = Trainer(**{**kwargs, "max_epochs": 4}, callbacks=[Then(deed, when), *fast])
    trainer.fit(module, loader)
    weights = [p.tolist() for p in module.parameters()]
    after = float(torch.rand(())), random.random(), float(np.random.rand())
    return module.seen, weights, after


def assert_plain(
    kwargs: dict[str, Any],
    make: Callable[[], Any],
    deed: Callable[[Any, int], None] = lambda loader, step: None,
    when: str = "on_train_epoch_end",
) -> FastLoading:
    fast = FastLoading(budget_s=0.02)
    plain = run(kwargs, make, deed, when, [])
    ours = run(kwargs, make, deed, when, [fast])
    assert plain == ours and plain[0]
    return fast


# ---------------------------------------------------------------- data that changes


def tensors(**given: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*numbers()), 4, shuffle=True, **given)


def _relabel(loader: Any, step: int) -> None:
    loader.dataset.tensors[1][step % N] = 7


def _through_data(loader: Any, step: int) -> None:
    loader.dataset.tensors[1].data[step % N] = 8


def _through_numpy(loader: Any, step: int) -> None:
    loader.dataset.tensors[0].numpy()[step % N] += 100


def _other_tensors(loader: Any, step: int) -> None:
    x, y = loader.dataset.tensors
    loader.dataset.tensors = (x, y + 1)


def _longer(loader: Any, step: int) -> None:
    x, y = loader.dataset.tensors
    loader.dataset.tensors = (torch.cat([x, x[:1]]), torch.cat([y, y[:1] + 50]))


@pytest.mark.parametrize("when", MOMENTS)
@pytest.mark.parametrize(
    "deed", [_relabel, _through_data, _through_numpy, _other_tensors], ids=lambda f: f.__name__
)
def test_pseudo_labels_written_into_the_tensors_are_seen_at_once(
    trainer_kwargs: dict[str, Any], deed: Any, when: str
) -> None:
    """Lightning#20407: a hook updates the dataset, and the step still gets the old items."""
    fast = assert_plain(trainer_kwargs, tensors, deed, when)
    assert "on the CPU" not in str(fast.receipt.skipped)


@pytest.mark.slow
@pytest.mark.parametrize("when", MOMENTS)
@pytest.mark.parametrize("persistent", [False, True])
def test_labels_reach_workers_when_a_loader_would_start_them(
    trainer_kwargs: dict[str, Any], persistent: bool, when: str
) -> None:
    """datasets#6673, starVLA#470: workers that persist keep the data that they were started with."""
    make = lambda: tensors(num_workers=1, persistent_workers=persistent)  # noqa: E731
    assert_plain(trainer_kwargs, make, _relabel, when)


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("when", MOMENTS)
def test_a_copy_stands_for_the_workers_memory(
    trainer_kwargs: dict[str, Any], persistent: bool, when: str
) -> None:
    """The same with `resident=True`, where no measurement decides."""
    make = lambda: tensors(num_workers=1, persistent_workers=persistent)  # noqa: E731
    plain = run(trainer_kwargs, make, _relabel, when, [])
    fast = FastLoading(True, False, False)
    assert plain == run(trainer_kwargs, make, _relabel, when, [fast])
    assert "own tensors" in fast.receipt.changes[0].after


@pytest.mark.slow
@pytest.mark.parametrize("when", MOMENTS)
def test_every_write_is_seen_where_rows_are_looked_up(
    trainer_kwargs: dict[str, Any], when: str
) -> None:
    for deed in (_relabel, _through_data, _through_numpy, _other_tensors, _longer):
        plain = run(trainer_kwargs, tensors, deed, when, [])
        fast = FastLoading(True, False, False)
        assert plain == run(trainer_kwargs, tensors, deed, when, [fast])
        assert "own tensors" in fast.receipt.changes[0].after


def _subset() -> DataLoader[Any]:
    return DataLoader(Subset(TensorDataset(*numbers()), list(range(12))), 4, shuffle=True)


def _other_indices(loader: Any, step: int) -> None:
    loader.dataset.indices[step % 12] = 12 + step % 12


def _other_subset(loader: Any, step: int) -> None:
    loader.dataset.indices = [step % N] * 12


@pytest.mark.parametrize("when", MOMENTS)
@pytest.mark.parametrize("deed", [_other_indices, _other_subset], ids=lambda f: f.__name__)
def test_a_curriculum_that_moves_the_indices_of_a_subset(
    trainer_kwargs: dict[str, Any], deed: Any, when: str
) -> None:
    plain = run(trainer_kwargs, _subset, deed, when, [])
    for fast in (FastLoading(True, False, False), FastLoading(budget_s=0.02)):
        assert plain == run(trainer_kwargs, _subset, deed, when, [fast])


class Labels(Dataset[Any]):
    """Lists, as of people who never heard of tensors."""

    def __init__(self) -> None:
        self.rows = [{"x": float(i), "y": i % 4} for i in range(N)]
        self.transform: Any = None
        self.epoch, self.reads = 0, 0
        self.shared = Value("i", 0)
        self.kept: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        item = self.rows[i]
        return item if self.transform is None else self.transform(item)


class Counting(Labels):
    def __getitem__(self, i: int) -> Any:
        self.reads += 1
        return {**super().__getitem__(i), "read": self.reads}


class Epochs(Labels):
    def __getitem__(self, i: int) -> Any:
        return {**super().__getitem__(i), "epoch": self.epoch}


class Shared(Labels):
    def __getitem__(self, i: int) -> Any:
        return {**super().__getitem__(i), "shared": self.shared.value}


class Once(Labels):
    """A buffer from which what was read is gone."""

    def __getitem__(self, i: int) -> Any:
        item = self.rows[i]
        self.rows[i] = {"x": item["x"] + 0.5, "y": item["y"]}
        return item


class Cached(Labels):
    def __getitem__(self, i: int) -> Any:
        return self.kept.setdefault(i, {"x": random.random()})


class Augmented(Labels):
    def __getitem__(self, i: int) -> Any:
        return {"x": torch.rand(2), "y": np.random.rand(), "z": random.random(), "i": i}


class MultiScale(Labels):
    """YOLOX#1662: a sampler gives (size, index)."""

    def __getitem__(self, key: Any) -> Any:
        size, i = key
        return torch.full((size,), float(i))


class Sizes(BatchSampler):
    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(super().__iter__()):
            yield [(2 + index % 3, i) for i in batch]


class Keys(Labels):
    def __init__(self) -> None:
        super().__init__()
        self.named = {f"k{i}": float(i) for i in range(N)}

    def __getitem__(self, key: Any) -> Any:
        return self.named[key]


def _rows(loader: Any, step: int) -> None:
    loader.dataset.rows[step % N]["y"] = 7


def _set_transform(loader: Any, step: int) -> None:
    loader.dataset.transform = lambda item: {"x": item["x"] * step}


def _set_epoch(loader: Any, step: int) -> None:
    loader.dataset.epoch += 1


def _set_shared(loader: Any, step: int) -> None:
    loader.dataset.shared.value += 1


def _append(loader: Any, step: int) -> None:
    loader.dataset.rows.append({"x": 100.0 + step, "y": 1})


def _nothing(loader: Any, step: int) -> None: ...


def _set_collate(loader: Any, step: int) -> None:
    loader.collate_fn = list


CHANGING: dict[str, tuple[type[Labels], Callable[[Any, int], None]]] = {
    "rows": (Labels, _rows),
    "transform": (Labels, _set_transform),
    "longer": (Labels, _append),
    "collate": (Labels, _set_collate),
    "epoch": (Epochs, _set_epoch),
    "shared": (Shared, _set_shared),
    "counting": (Counting, _nothing),
    "once": (Once, _nothing),
    "cached": (Cached, _nothing),
    "augmented": (Augmented, _nothing),
}


@pytest.mark.parametrize("name", CHANGING)
@pytest.mark.parametrize("when", MOMENTS)
def test_a_dataset_of_ones_own_is_left_alone_with_the_reason(
    trainer_kwargs: dict[str, Any], name: str, when: str
) -> None:
    """Lightning#20407, pytorch#35795: caches, counters and labels of a dataset are its user's."""
    kind, deed = CHANGING[name]
    fast = assert_plain(trainer_kwargs, lambda: DataLoader(kind(), 4, shuffle=True), deed, when)
    assert not fast.receipt and "unchanging=True" in fast.receipt.skipped[0].after


@pytest.mark.parametrize("name", ["counting", "cached", "augmented", "rows"])
def test_state_within_the_users_workers_stays_there(
    trainer_kwargs: dict[str, Any], name: str
) -> None:
    kind, deed = CHANGING[name]
    make = lambda: DataLoader(kind(), 4, num_workers=1, persistent_workers=True)  # noqa: E731
    assert_plain(trainer_kwargs, make, deed, "on_train_epoch_end")


def test_parts_that_change_below_a_concatenation(trainer_kwargs: dict[str, Any]) -> None:
    def make() -> DataLoader[Any]:
        return DataLoader(ConcatDataset([Labels(), Labels()]), 4, shuffle=True)

    def deed(loader: Any, step: int) -> None:
        loader.dataset.datasets[1].rows[step % N]["x"] = -1.0

    assert_plain(trainer_kwargs, make, deed)


@pytest.mark.slow
def test_a_file_that_is_rewritten_under_the_dataset(
    trainer_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    def make() -> DataLoader[Any]:
        kept = np.memmap(tmp_path / "x", np.float32, "w+", shape=(N, 3))
        kept[:] = np.arange(N * 3).reshape(N, 3)
        return DataLoader(TensorDataset(torch.from_numpy(kept)), 4, num_workers=1)

    def deed(loader: Any, step: int) -> None:
        np.memmap(tmp_path / "x", np.float32, "r+", shape=(N, 3))[step % N] = 5

    assert_plain(trainer_kwargs, make, deed)


# ---------------------------------------------------------------- what was vouched for, and shows otherwise


@pytest.mark.parametrize("name", ["rows", "transform", "epoch"])
def test_held_by_name_a_change_that_shows_is_told_and_seen(
    trainer_kwargs: dict[str, Any], name: str
) -> None:
    kind, deed = CHANGING[name]
    make = lambda: DataLoader(kind(), 4, shuffle=True)  # noqa: E731
    plain = run(trainer_kwargs, make, deed, "on_train_epoch_end", [])
    with pytest.warns(UserWarning, match="has changed"):
        ours = run(
            trainer_kwargs, make, deed, "on_train_epoch_end", [FastLoading(True, False, False)]
        )
    assert plain == ours


def test_workers_asked_for_see_what_is_written_between_epochs(
    trainer_kwargs: dict[str, Any],
) -> None:
    """The workers that are asked for start anew for each epoch, as a loader's own do."""
    make = lambda: DataLoader(Labels(), 4, shuffle=True)  # noqa: E731
    plain = run(trainer_kwargs, make, _rows, "on_train_epoch_end", [])
    fast = FastLoading(resident=False, num_workers=1, pin_memory=False)
    assert plain == run(trainer_kwargs, make, _rows, "on_train_epoch_end", [fast])
    assert fast.receipt.changes


# ---------------------------------------------------------------- orders with a memory


class Bucket:
    """Lightning#13316, Lightning#2598: a batch sampler with an epoch and random numbers of its own."""

    def __init__(self) -> None:
        self.rng, self.gen = random.Random(0), np.random.default_rng(0)
        self.epoch, self.begun = 0, 0

    def __len__(self) -> int:
        return N // 4

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        self.begun += 1
        order = list(range(N))
        self.rng.shuffle(order)
        for i in range(0, N, 4):
            yield [
                *order[i : i + 2],
                int(self.gen.integers(N)),
                (self.epoch + self.begun) % N,
                int(torch.randint(N, ())),
            ]


class Hard(SequentialSampler):
    """Goes on where it was: what it asks for depends on what was asked before."""

    place = 0

    def __iter__(self) -> Iterator[int]:
        for _ in range(len(self)):
            self.place = (self.place * 5 + 3) % N
            yield self.place


class Masks(SequentialSampler):
    """Indices that are no places: a bool and a tensor of bools pick something else."""

    def __iter__(self) -> Iterator[Any]:
        yield from [True, torch.tensor(3), np.int64(5), torch.tensor(1, dtype=torch.uint8)]


ORDERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "bucket": lambda d: {"batch_sampler": Bucket()},
    "hard": lambda d: {"batch_size": 4, "sampler": Hard(d)},
    "distributed": lambda d: {"batch_size": 4, "sampler": DistributedSampler(d, 2, 1)},
    "generator": lambda d: {
        "batch_sampler": BatchSampler(
            RandomSampler(d, generator=torch.Generator().manual_seed(1)), 4, False
        )
    },
    "one shot": lambda d: {"batch_size": 4, "sampler": iter([*range(N)])},
    "masks": lambda d: {"batch_size": 1, "sampler": Masks(d)},
    "tensors": lambda d: {"batch_sampler": [torch.tensor([3, 1]), np.array([2, 2])]},
    "tuples": lambda d: {"batch_sampler": [(1, 2), (0,)]},
    "bulk": lambda d: {"batch_size": None, "sampler": BatchSampler(RandomSampler(d), 4, False)},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Your .* has `shuffle=True`")
@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("workers", [0, 1])
def test_the_users_own_sampler_gives_the_order(
    trainer_kwargs: dict[str, Any], name: str, workers: int
) -> None:
    def make() -> DataLoader[Any]:
        dataset = TensorDataset(*numbers())
        return DataLoader(dataset, num_workers=workers, **ORDERS[name](dataset))

    if name == "one shot":
        trainer_kwargs = {**trainer_kwargs, "limit_train_batches": 3}
    assert_plain(trainer_kwargs, make)
    if name == "bulk":
        return
    plain = run(trainer_kwargs, make, _nothing, "on_train_end", [])
    fast = FastLoading(True, False, False)
    if name == "one shot":  # it has no length
        fast = FastLoading("auto", False, False)
    assert plain == run(trainer_kwargs, make, _nothing, "on_train_end", [fast])


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(
            MultiScale(), batch_sampler=Sizes(RandomSampler(range(N)), 4, drop_last=False)
        ),
        lambda: DataLoader(Keys(), 4, sampler=[f"k{i}" for i in range(N)]),
        lambda: DataLoader(Labels(), 4, collate_fn=list, worker_init_fn=print, num_workers=1),
    ],
)
def test_keys_that_are_no_places(trainer_kwargs: dict[str, Any], make: Any) -> None:
    """YOLOX#1662, Detectron.pytorch#55: a dataset is given tuples by its sampler."""
    assert_plain(trainer_kwargs, make)


class Stream(IterableDataset[Any]):
    def __init__(self) -> None:
        self.left = iter(range(1000))

    def __iter__(self) -> Iterator[Any]:
        return iter([float(next(self.left)) for _ in range(8)])


def test_a_stream_misses_nothing(trainer_kwargs: dict[str, Any]) -> None:
    assert_plain(trainer_kwargs, lambda: DataLoader(Stream(), 4))


# ---------------------------------------------------------------- batches of any class


@dataclasses.dataclass
class Graph:
    x: Tensor
    edges: Any = None


class Mapping(collections.UserDict[str, Any]):
    """As tokenizers give."""


class Data:
    """A graph with attributes, `to` and a length."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return 2

    def __eq__(self, other: Any) -> Any:
        return self.x == other.x

    def __repr__(self) -> str:
        return f"Data({self.x})"


Point = collections.namedtuple("Point", ["x", "label"])


def _stack(items: list[Any]) -> Tensor:
    return torch.stack([x for x, _ in items])


BATCHES: dict[str, Callable[[list[Any]], Any]] = {
    "dataclass": lambda items: Graph(_stack(items)),
    "mapping": lambda items: Mapping(x=_stack(items)),
    "data": lambda items: Data(_stack(items)),
    "namedtuple": lambda items: Point(_stack(items), None),
    "none": lambda items: {"x": _stack(items), "nothing": None},
    "text": lambda items: [_stack(items), "a sentence"],
    "ragged": lambda items: [x[: 1 + int(y) % 3] for x, y in items],
    "nested": lambda items: {"a": [Graph(_stack(items)), {"b": (None, "c")}]},
    "numpy": lambda items: _stack(items).numpy(),
    "nothing": lambda items: None,
}


@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")
@pytest.mark.parametrize("name", [n for n in BATCHES if n != "nothing"])
@pytest.mark.parametrize("vouched", [False, True])
def test_a_batch_of_any_class_is_a_reason_and_no_error(
    trainer_kwargs: dict[str, Any], name: str, vouched: bool
) -> None:
    """pytorch_geometric, tokenizers and dataclasses: what is no tensor is left as it is."""
    make = lambda: DataLoader(TensorDataset(*numbers()), 4, collate_fn=BATCHES[name])  # noqa: E731
    plain = run(trainer_kwargs, make, _nothing, "on_train_end", [])
    fast = FastLoading(num_workers=False, budget_s=0.02, unchanging=vouched)
    assert plain == run(trainer_kwargs, make, _nothing, "on_train_end", [fast])
    if name not in ("namedtuple",):
        assert not fast.receipt and fast.receipt.skipped[0].after


class ByEpoch(SequentialSampler):
    """Knows its order only when it has been told the epoch."""

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter([(i + 5 * self.epoch) % N for i in range(N)])


class Told(BatchSampler):
    """Has a method that Lightning does not call on a batch sampler."""

    def set_epoch(self, epoch: int) -> None:
        raise AssertionError("as in the plain fit, nobody calls this")


@pytest.mark.parametrize("batched", [False, True])
def test_a_sampler_without_an_epoch_before_it_is_told_one(
    trainer_kwargs: dict[str, Any], batched: bool
) -> None:
    """Lightning#13316, Lightning#16841: `set_epoch` belongs before each pass, ours over a copy too."""
    read: list[list[float]] = []

    class Reads(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            (batch,) = batches(trainer, 1)
            read.append(batch[0][:, 0].tolist())

        def on_train_batch_start(self, *args: Any) -> None:
            if args[3] == 0:
                given.append(args[2][0][:, 0].tolist())

    given: list[list[float]] = []
    data = TensorDataset(*numbers())
    order = ByEpoch(data)
    kwargs = {"batch_sampler": Told(order, 6, False)} if batched else {"sampler": order}
    loader = DataLoader(data, **(kwargs if batched else {**kwargs, "batch_size": 6}))
    model = Pruned()
    prunes = StructuredPruning(ratio=0.5, when=1)
    Trainer(**trainer_kwargs, callbacks=[prunes, Reads()]).fit(model, loader)
    assert read == given and read[0] != read[1] and order.epoch == 1
    assert model.net[0].out_features == 2


class Pruned(Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()
