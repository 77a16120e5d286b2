"""Batches made in another way: the same ones, in the same order, with the same random numbers."""

from __future__ import annotations

import random
from collections import namedtuple
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from lightning_accel.errors import Unsupported
from lightning_accel.loading import (
    LoadingChoice,
    LoadingPlan,
    ResidentLoader,
    choose,
    resident,
    with_workers,
)
from lightning_accel.loading.choose import _Race
from lightning_accel.loading.determinism import same
from lightning_accel.loading.order import EquivalentLoader

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # one core or two

N = 22
X = torch.arange(N * 6, dtype=torch.float32).view(N, 2, 3)
Y = torch.arange(N) % 5
Pair = namedtuple("Pair", ["x", "y"])


class Items(Dataset[Any]):
    """Items one by one; `make` says what one is."""

    def __init__(self, make: Callable[[int], Any] = lambda i: (X[i] / 3, int(Y[i]))) -> None:
        self.make = make

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        return self.make(i)


class AtOnce(Items):
    """Gives a whole batch, as datasets of files do."""

    def __getitems__(self, indices: list[int]) -> Any:
        return X[indices], Y[indices]


class Drawing(Sampler[int]):
    """Draws from the global generator for each item."""

    def __iter__(self) -> Iterator[int]:
        return (int(torch.randint(N, ())) for _ in range(N))

    def __len__(self) -> int:
        return N


def distributed(dataset: Any) -> DistributedSampler[Any]:
    return DistributedSampler(dataset, num_replicas=2, rank=1, seed=3)


SAMPLING: dict[str, Callable[[Any], dict[str, Any]]] = {
    "in order": lambda d: {"batch_size": 4},
    "shuffled": lambda d: {"batch_size": 4, "shuffle": True},
    "drop_last": lambda d: {"batch_size": 4, "shuffle": True, "drop_last": True},
    "own generator": lambda d: {
        "batch_size": 4,
        "shuffle": True,
        "generator": torch.Generator().manual_seed(5),
    },
    "distributed": lambda d: {"batch_size": 4, "sampler": distributed(d)},
    "weighted": lambda d: {
        "batch_size": 4,
        "sampler": WeightedRandomSampler(torch.rand(N).tolist(), 18),
    },
    "replacement": lambda d: {
        "batch_size": 4,
        "sampler": RandomSampler(d, replacement=True, num_samples=37),
    },
    "subset random": lambda d: {"batch_size": 4, "sampler": SubsetRandomSampler(range(3, 17))},
    "negative": lambda d: {"batch_size": 2, "sampler": [-1, 0, -N, 3]},
    "batch_sampler": lambda d: {
        "batch_sampler": BatchSampler(RandomSampler(d), 5, drop_last=False)
    },
    "lists": lambda d: {"batch_sampler": [[1, 2], [0], [4, 4, 4]]},
    "drawing": lambda d: {"batch_size": 4, "sampler": Drawing()},
}


def trace(loader: Any, epochs: int = 2, stop: int = 99) -> list[Any]:
    """All batches, and after each one number drawn: by dropout, say, and other libraries."""
    torch.manual_seed(11)
    random.seed(11)
    found: list[Any] = []
    for epoch in range(epochs):
        set_epoch = getattr(loader.sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
        batches = iter(loader)
        found.append(torch.rand(1))
        for count, batch in enumerate(batches):
            found.append([batch, torch.rand(1), random.random()])
            if count + 1 == stop:
                break
    own = getattr(loader, "generator", None)
    return [*found, torch.rand(1), own.get_state() if own is not None else None]


def equal(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(map(same, left, right))


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize("kind", ["tensors", "items"])
def test_resident_batches_are_those_of_the_loader_with_any_sampler(name: str, kind: str) -> None:
    dataset: Any = TensorDataset(X, Y) if kind == "tensors" else Items()
    torch.manual_seed(0)
    plain = DataLoader(dataset, **SAMPLING[name](dataset))
    torch.manual_seed(0)
    fast = resident(DataLoader(dataset, **SAMPLING[name](dataset)))
    assert fast.store.copied == (kind == "items")
    for stop in (99, 2):
        assert equal(trace(plain, stop=stop), trace(fast, stop=stop))


def test_the_comparison_sees_other_batches_and_other_random_numbers() -> None:
    loader = DataLoader(Items(), 4, shuffle=True)
    assert not equal(trace(loader), trace(DataLoader(Items(), 4)))
    ours = resident(loader)
    seedless = [ours.store.take(i) for i in loader.batch_sampler]
    assert len(seedless) == len(loader)  # no base seed was drawn: the next number is another
    torch.manual_seed(11)
    list(loader.batch_sampler)
    first = torch.rand(1)
    torch.manual_seed(11)
    list(loader)
    assert not torch.equal(first, torch.rand(1))


OTHERS = [X.permute(2, 1, 0).contiguous().permute(2, 1, 0), X.int(), X[:3], -X, X.to_sparse()]


@pytest.mark.parametrize(
    "other", [*OTHERS, nn.Parameter(X), torch.where(X == 7, -0.0, X), "x", None]
)
def test_same_sees_strides_dtypes_shapes_classes_and_bits(other: Any) -> None:
    assert same([X, "x"], [X.clone(), "x"]) and not same([X], [other])


STRUCTURES: dict[str, Callable[[int], Any]] = {
    "tensor": lambda i: X[i],
    "tuple": lambda i: (X[i], i),
    "dict": lambda i: {"x": X[i], "y": {"deep": [float(i), i > 4]}},
    "named": lambda i: Pair(X[i], np.float32(i)),
    "numpy": lambda i: (X[i].numpy().astype(np.float16), np.arange(3)),
    "scalars": lambda i: (i, float(i), i % 2 == 0),
    "types": lambda i: (X[i].bfloat16(), X[i].to(torch.complex64), X[i].to(torch.uint8)),
    "not a number": lambda i: X[i] * float("nan"),
    "empty": lambda i: (X[i], torch.zeros(0, 3)),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structure_dtypes_and_bits_of_a_batch_stay(name: str) -> None:
    dataset = Items(STRUCTURES[name])
    loader = DataLoader(dataset, 4, shuffle=True)
    assert equal(trace(loader), trace(resident(loader)))


def _channels_last(batch: list[Any]) -> Any:
    return default_collate(batch).contiguous(memory_format=torch.channels_last)


def test_a_memory_format_survives() -> None:
    images = torch.randn(N, 3, 4, 5)
    loader = DataLoader(Items(lambda i: images[i]), 4, collate_fn=_channels_last)
    fast = resident(loader)
    assert next(iter(fast)).is_contiguous(memory_format=torch.channels_last)
    assert equal(trace(loader), trace(fast))
    turned = TensorDataset(
        images.contiguous(memory_format=torch.channels_last), images.permute(0, 3, 2, 1)
    )
    loader = DataLoader(turned, 4)
    assert equal(trace(loader), trace(resident(loader)))


def test_subsets_and_stacks_and_whole_batches_are_held() -> None:
    tensors = TensorDataset(X, Y)
    inner = Subset(tensors, list(range(20, 0, -1)))
    for dataset, free in (
        (Subset(inner, [3, 1, 7, 0, 19, -1]), True),
        (StackDataset(TensorDataset(X), Items()), False),
        (Subset(Items(), [5, 4, 3]), False),
    ):
        loader = DataLoader(dataset, 2, shuffle=True)
        fast = resident(loader)
        assert fast.store.copied != free
        assert equal(trace(loader), trace(fast))
    whole = DataLoader(AtOnce(), 4, shuffle=True, collate_fn=_keep)
    assert equal(trace(whole), trace(resident(whole)))


def _keep(batch: Any) -> Any:
    return batch


def test_a_batch_can_be_written_to_without_harm() -> None:
    for dataset in (TensorDataset(X.clone()), Items()):
        fast = resident(DataLoader(dataset, N))
        for batch in (next(iter(fast)) for _ in range(2)):
            assert torch.equal(batch[0].flatten()[:2], next(iter(fast.loader))[0].flatten()[:2])
            batch[0].fill_(-1)


# ---------------------------------------------------------------- what is refused, and why


def _augment(i: int) -> Any:
    return X[i] + torch.rand(())


class OwnGenerator(Items):
    def __init__(self) -> None:
        super().__init__()
        self.transforms = {"noise": [np.random.default_rng(0)]}

    def __getitem__(self, i: int) -> Any:
        return X[i], self.transforms["noise"][0].normal()


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(X)


class Mine(DataLoader[Any]):
    pass


class Curriculum(Items):
    def set_epoch(self, epoch: int) -> None: ...


class Late(Items):
    """Its items are still at first sight: only the last one draws."""

    def __getitem__(self, i: int) -> Any:
        return X[i] + (torch.rand(()) * 0 if i == 11 else 0)


def _padded(batch: list[Any]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.ones(1 + i % 3) for i in batch], True)


def _centred(batch: list[Any]) -> Tensor:
    rows = default_collate(batch)
    return rows - rows.mean(0)


def _mixing_one(batch: list[Any]) -> Tensor:
    rows = default_collate(batch).clone()
    return rows.flip(0) if len(rows) > 1 and (rows == X[16]).flatten(1).all(1).any() else rows


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "random": (lambda: DataLoader(Items(_augment), 4), "draws random numbers"),
    "python random": (lambda: DataLoader(Items(lambda i: random.random()), 4), "draws random"),
    "numpy random": (lambda: DataLoader(Items(lambda i: np.random.rand(2)), 4), "draws random"),
    "no trace": (lambda: DataLoader(Items(lambda i: torch.rand(1) * 0), 4), "draws random"),
    "own generator": (lambda: DataLoader(OwnGenerator(), 4), "draws random"),
    "clock": (lambda: DataLoader(Items(_tick), 4), "two reads"),
    "late": (lambda: DataLoader(Late(), 4), "draws random numbers"),
    "ragged": (lambda: DataLoader(Items(lambda i: torch.ones(1 + i // 18)), 4), "stacked"),
    "ragged between": (lambda: DataLoader(Items(lambda i: torch.ones(1 + i // 20)), 20), "shape"),
    "dtypes": (lambda: DataLoader(Items(lambda i: i if i < 20 else 0.5), 20), "dtype"),
    "keys": (lambda: DataLoader(Items(lambda i: {"ab"[i // 20]: i}), 20), "structure"),
    "text": (lambda: DataLoader(Items(lambda i: (i, "word")), 4), "str in a batch"),
    "padding": (lambda: DataLoader(Items(lambda i: i), 4, collate_fn=_padded), "shape"),
    "centred": (lambda: DataLoader(Items(lambda i: X[i]), 4, collate_fn=_centred), "collate_fn"),
    "mixing": (lambda: DataLoader(Items(lambda i: X[i]), 4, collate_fn=_mixing_one), "collate_fn"),
    "iterable": (lambda: DataLoader(Stream(), 4), "no fixed place"),
    "no batches": (lambda: DataLoader(Items(), None), "batch_size=None"),
    "own class": (lambda: Mine(Items(), 4), "Mine"),
    "a list": (lambda: [1, 2], "list"),
    "set_epoch": (lambda: DataLoader(Curriculum(), 4), "set_epoch"),
    "out of order": (lambda: DataLoader(Items(), 4, num_workers=1, in_order=False), "in_order"),
    "worker_init_fn": (
        lambda: DataLoader(Items(), 4, num_workers=1, worker_init_fn=_keep),
        "worker_init_fn",
    ),
    "raises": (lambda: DataLoader(Items(_raise), 4), "OSError"),
    "gradients": (lambda: DataLoader(Items(lambda i: X[i].clone().requires_grad_()), 4), "plain"),
    "sparse": (lambda: DataLoader(Items(lambda i: X[i]), 4, collate_fn=_sparse), "Tensor in"),
    "summed": (lambda: DataLoader(Items(lambda i: X[i]), 4, collate_fn=_summed), "4 items"),
    "large": (lambda: DataLoader(Items(lambda i: torch.ones(9000)), 4), "0.8 MB"),
}
CLOCK = iter(range(10**6))


def _tick(i: int) -> Any:
    return next(CLOCK)


def _raise(i: int) -> Any:
    raise OSError("gone")


def _sparse(batch: list[Any]) -> Tensor:
    return default_collate(batch).to_sparse()


def _summed(batch: list[Any]) -> Tensor:
    return default_collate(batch).sum(0)


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_change_is_refused_with_its_reason_and_nothing_is_drawn(name: str) -> None:
    make, reason = REFUSED[name]
    loader = make()
    own = getattr(getattr(loader, "dataset", None), "transforms", {}).get("noise", [None])[0]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    before = own and own.bit_generator.state
    with pytest.raises(Unsupported, match=reason):
        resident(loader, limit_bytes=500_000)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()
    assert before == (own and own.bit_generator.state)


def test_reading_that_would_take_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("lightning_accel.loading.tensor_store.time", clock)
    loader = DataLoader(taking(clock), 4)  # 22 items of a millisecond
    with pytest.raises(Unsupported, match="takes about"):
        resident(loader, limit_s=0.0219)
    assert resident(loader, limit_s=0.0221).store.copied


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"limit_bytes": 0}, ValueError),
        ({"limit_bytes": -1}, ValueError),
        ({"limit_bytes": 1.5}, TypeError),
        ({"limit_bytes": True}, TypeError),
        ({"limit_s": 0}, ValueError),
        ({"limit_s": float("nan")}, ValueError),
        ({"limit_s": "1"}, TypeError),
    ],
)
def test_limits_are_checked(given: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="Found"):
        resident(DataLoader(Items(), 4), **given)


def test_a_dataset_that_changes_later_is_noticed_and_read_again() -> None:
    items = Items()
    fast = resident(DataLoader(items, 4))
    list(fast)
    items.make = lambda i: (X[i] + 1, int(Y[i]))
    with pytest.warns(UserWarning, match="has changed"):
        found = list(fast)
    assert all(map(same, found, list(fast.loader)))
    assert all(map(same, list(fast), list(fast.loader))), "and without a second warning"


@pytest.mark.parametrize("kind", ["tensors", "items"])
def test_an_index_outside_is_the_error_of_the_loader_and_not_another_item(kind: str) -> None:
    dataset: Any = TensorDataset(X) if kind == "tensors" else Items(lambda i: X[i])
    fast = resident(DataLoader(dataset, 2, sampler=[0, N]))
    with pytest.raises(IndexError) as plain:
        list(fast.loader)
    with pytest.raises(IndexError) as ours:
        list(fast)
    assert str(plain.value) == str(ours.value)


def test_a_resident_loader_looks_like_its_loader() -> None:
    loader = DataLoader(TensorDataset(X), 4, shuffle=True)
    fast = resident(resident(loader))
    assert isinstance(fast, ResidentLoader) and fast.loader is loader
    assert (fast.dataset, fast.sampler, fast.batch_size) == (
        loader.dataset,
        loader.sampler,
        loader.batch_size,
    )
    assert len(fast) == len(loader) and not hasattr(fast, "state_dict")


# ---------------------------------------------------------------- workers


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("stop", [99, 2])
def test_loaders_with_workers_are_replaced_with_the_same_draws(persistent: bool, stop: int) -> None:
    def make() -> DataLoader[Any]:
        return DataLoader(
            Items(), 4, sampler=Drawing(), num_workers=1, persistent_workers=persistent
        )

    assert equal(trace(make(), stop=stop), trace(resident(make()), stop=stop))


@pytest.mark.parametrize("name", ["shuffled", "distributed", "weighted", "in order"])
@pytest.mark.parametrize("counts", [(0, 1), (1, 0)])
def test_another_number_of_workers_gives_the_same(name: str, counts: tuple[int, int]) -> None:
    dataset = Items()
    torch.manual_seed(0)
    plain = DataLoader(dataset, num_workers=counts[0], **SAMPLING[name](dataset))
    torch.manual_seed(0)
    other = DataLoader(dataset, num_workers=counts[0], **SAMPLING[name](dataset))
    fast = with_workers(other, counts[1])
    for stop in (99, 2):
        assert equal(trace(plain, stop=stop), trace(fast, stop=stop))
    fast.close()


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (lambda: DataLoader(Items(), 4, sampler=Drawing()), "Drawing"),
        (lambda: DataLoader(Items(), 4, shuffle=True, generator=torch.Generator()), "lives on"),
        (lambda: DataLoader(Items(_augment), 4), "draws random"),
        (lambda: DataLoader(Items(), batch_sampler=[[0, 1]]), "list"),
    ],
)
def test_workers_that_would_change_something_are_refused(loader: Any, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        with_workers(loader(), 1)


def test_other_augmentations_are_allowed_on_request_only() -> None:
    loader = DataLoader(Items(_augment), 4)
    assert with_workers(loader, 0).num_workers == 0, "as it was"
    assert with_workers(loader, 1, keep_random=False).num_workers == 1
    for bad in (-1, 1.5, True, None):
        with pytest.raises((ValueError, TypeError), match="Found"):
            with_workers(loader, bad)  # type: ignore[arg-type]


# ---------------------------------------------------------------- taking over


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("begun", [0, 2])
@pytest.mark.parametrize("to", ["resident", "workers"])
def test_an_epoch_under_way_goes_on_where_it_is(workers: int, begun: int, to: str) -> None:
    def run(replace: bool) -> list[Any]:
        torch.manual_seed(2)
        loader: Any = DataLoader(Items(), 4, shuffle=True, num_workers=workers)
        batches = iter(loader)
        found: list[Any] = [[next(batches), torch.rand(1)] for _ in range(begun)]
        if replace:
            loader = resident(loader) if to == "resident" else with_workers(loader, 1 - workers)
            batches = loader.adopt(batches)
        found += [[batch, torch.rand(1)] for batch in batches]
        found += [[batch, torch.rand(1)] for batch in loader]
        if isinstance(loader, EquivalentLoader):
            loader.close()
        return found

    assert equal(run(False), run(True))


def test_an_iterator_of_another_kind_is_not_taken_over() -> None:
    with pytest.raises(Unsupported, match="taken over"):
        resident(DataLoader(Items(), 4)).adopt(iter([1]))


# ---------------------------------------------------------------- choosing


class Clock:
    """Time that passes only when something of the test's own takes it; it is no state of a dataset's."""

    now = 0.0

    @classmethod
    def perf_counter(cls) -> float:
        return cls.now

    @classmethod
    def spend(cls, ms: float) -> None:
        cls.now += ms / 1000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock for `choose`: an item of `Taking` takes a millisecond, a step as long as it is said to."""
    made = Clock()
    module = import_module("lightning_accel.loading.choose")
    monkeypatch.setattr(module, "time", made)
    monkeypatch.setattr(module, "_step", lambda ms, device: lambda batch: made.spend(ms))
    return made


def taking(clock: Clock, make: Callable[[int], Any] = lambda i: X[i]) -> Items:
    def read(i: int) -> Any:
        clock.spend(1.0)
        return make(i)

    return Items(read)


def test_choose_takes_what_is_faster_and_leaves_everything_as_it_was(clock: Clock) -> None:
    dataset = taking(clock)
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(dataset, 4, sampler=sampler)
    states = torch.get_rng_state(), random.getstate(), sampler.generator.get_state()
    choice = choose(loader, step_ms=4.0, budget_s=6.0, workers=(), pin=False, unchanging=True)
    assert choice.taken == "resident", choice.table().to_text()
    assert choice.ratio == pytest.approx(2.0), "4 items and a step beside a step"
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert torch.equal(states[2], sampler.generator.get_state())
    again = DataLoader(loader.dataset, 5)
    assert equal(trace(again), trace(choice.apply(again)))


AS_IS = [10.0, 10.2, 10.1, 9.9, 10.0]


def raced(again: list[float], **ways: list[float]) -> LoadingChoice:
    """Return what is chosen after these turns, in milliseconds; no clock is read."""
    loader = DataLoader(Items(), 4)
    race = _Race(loader, 0.0, torch.device("cpu"), 1.0)
    race.times = {"as is": AS_IS, **ways, "as is, again": again}
    race.makes = {name: with_workers(loader, 1) for name in ways}
    return race.choice(keep_random=True)


@pytest.mark.parametrize(
    ("turns", "taken", "why"),
    [
        ([5.0, 5.1, 4.9, 5.2, 5.0], "workers=1", ""),
        ([7.8, 7.7, 7.8, 7.6, 7.8], "workers=1", ""),
        ([5.0, 5.1, 12.0, 5.2, 5.0], "as is", "at worst"),  # slower than as it was, once
        ([9.8, 9.9, 9.8, 9.9, 9.8], "as is", "no measurable difference: plain against plain is"),
        ([5.0, 5.0], "as is", "too few to tell"),
        ([20.0] * 5, "as is", "slower: 0.50x"),
        ([140.0], "as is", "slower: 0.07x"),
    ],
)
def test_ties_and_doubts_go_to_what_the_user_has(turns: list[float], taken: str, why: str) -> None:
    choice = raced([10.1, 10.0, 10.2, 10.0, 9.9], **{"workers=1": turns})
    assert choice.taken == taken and why in choice.ways[1].reason
    assert (why == "") == (choice.ways[1].reason == "")
    assert why in choice.reason
    loader = DataLoader(Items(), 4)
    if taken == "as is":
        assert choice.ratio == 1.0 and choice.apply(loader) is loader
    else:
        gain = choice.ways[1].gain
        assert gain is not None and choice.ratio == gain.ratio
        assert choice.apply(loader).num_workers == 1


def test_a_gain_within_what_the_same_loader_gives_twice_is_none() -> None:
    """1.25x beside a second run of the user's own loader that was 1.3 times as fast as the first."""
    turns = [8.0, 8.1, 7.9, 8.0, 8.0]
    still = [7.7, 7.8, 7.7, 7.9, 7.8]
    assert raced(AS_IS, one=turns).taken == "one"
    assert raced([t * 1.3 for t in AS_IS], one=turns).taken == "as is"
    choice = raced(still, one=turns)
    assert choice.taken == "as is" and "no measurable difference: plain against plain is 1.29x" in (
        choice.reason
    )


def test_of_two_ways_that_gain_the_slower_one_says_so() -> None:
    choice = raced(AS_IS, one=[7.7] * 5, two=[5.6] * 5, three=[15.0] * 5)
    assert choice.taken == "two"
    assert [way.reason.partition(":")[0] for way in choice.ways] == [
        "",
        "another way is faster still",
        "",
        "slower",
    ]
    assert [row[2] for row in choice.table().rows][1:] == [str(way.gain) for way in choice.ways[1:]]


def test_choose_measures_workers_beside_the_step(clock: Clock) -> None:
    loader = DataLoader(taking(clock), 4)
    choice = choose(loader, step_ms=5.0, budget_s=5.0, workers=(1,), hold=False, unchanging=True)
    assert {way.name for way in choice.ways} == {"as is", "workers=1", "pinned"}
    by = {way.name: way for way in choice.ways}
    assert by["as is"].step_ms == pytest.approx(9.0), "four items and the step"
    assert by["workers=1"].step_ms == pytest.approx(5.0), "items are made in another process"
    assert choice.taken == "workers=1" and "CUDA" in by["pinned"].skipped


@pytest.mark.parametrize(
    ("loader", "why"),
    [
        (lambda: DataLoader(Items(_raise), 4), "OSError"),
        (lambda: DataLoader(Stream(), 4), "no fixed place"),
        (lambda: [1, 2], "list"),
        (lambda: DataLoader(Items(_augment), 4), "no other way"),
    ],
)
def test_choose_survives_what_cannot_be_measured(loader: Any, why: str) -> None:
    choice = choose(loader(), step_ms=0.0, budget_s=0.2, workers=(1,), unchanging=True)
    assert choice.taken == "as is" and why in choice.reason


def test_choose_reads_nothing_that_is_not_vouched_for() -> None:
    choice = choose(DataLoader(Items(_raise), 4), step_ms=0.0)
    assert choice.taken == "as is" and not choice.ways and "unchanging=True" in choice.reason


def test_choose_iterates_no_sampler() -> None:
    def refuse() -> Any:
        raise AssertionError("iterated")

    sampler = Drawing()
    sampler.__class__ = type("Once", (Drawing,), {"__iter__": lambda self: refuse()})
    choice = choose(DataLoader(TensorDataset(X), 4, sampler=sampler), step_ms=0.0, budget_s=0.1)
    assert choice.ways and not choice.ways[0].skipped


@pytest.mark.slow
def test_choose_says_why_a_way_was_skipped(clock: Clock) -> None:
    loader = DataLoader(taking(clock, _augment), 4)
    given: Any = {"step_ms": 1.0, "budget_s": 2.0, "workers": (1,), "unchanging": True}
    choice = choose(loader, **given)
    assert {w.name: bool(w.skipped) for w in choice.ways} == {
        "as is": False,
        "resident": True,
        "workers=1": True,
        "pinned": True,
    }
    assert all("draws random" in w.skipped for w in choice.ways[1:3])
    free = choose(loader, **given, keep_random=False)
    assert not free.ways[2].skipped and free.ways[2].times_ms


@pytest.mark.parametrize(
    "given",
    [
        {"step_ms": -1.0},
        {"step_ms": float("nan")},
        {"step_ms": None},
        {"budget_s": 0},
        {"budget_s": "1"},
        {"workers": (-1,)},
        {"limit_bytes": 0},
    ],
)
def test_arguments_of_choose_are_checked(given: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match="Found"):
        choose(DataLoader(Items(), 4), **{"step_ms": 1.0, **given})


def test_a_choice_for_another_loader_is_checked_again() -> None:
    with pytest.raises(Unsupported, match="list"):
        LoadingChoice("workers=1", 2.0, "", plan=LoadingPlan(num_workers=1)).apply([1])
