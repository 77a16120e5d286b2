"""`FastLoading` in a fit: the same weights at the end, bit for bit, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from lightning_accel.errors import Unsupported
from lightning_accel.loading import (
    FastLoading,
    LoadingChoice,
    LoadingPlan,
    apply_choice,
    choose,
    resident,
)
from lightning_accel.loading.order import EquivalentLoader
from lightning_accel.loading.tensor_store import TensorStore

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]

N = 24
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 4


class Items(Dataset[Any]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        for _ in range(20):  # a decoder, so that holding what it gives is worth while
            x = X[i].double().exp().log().float()
        return x, int(Y[i])


class Noisy(Items):
    def __getitem__(self, i: int) -> Any:
        x, y = super().__getitem__(i)
        return x + torch.rand(()), y


class Module(LightningModule):
    """Dropout, so that one random number more or less changes the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4))
        self.seen: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(batch, dict):
            batch = [torch.cat(parts) for parts in zip(*batch.values(), strict=True)]
        self.seen.append(float(batch[0].sum()))
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(float(batch[0].sum()))
        self.log("val", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Restless(Callback):
    """Others draw random numbers too, at all moments."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.rand(1)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.rand(1)


def loader(dataset: Any = None, **given: Any) -> DataLoader[Any]:
    return DataLoader(dataset or Items(), 4, **{"shuffle": True, **given})


def fit(
    kwargs: dict[str, Any],
    callbacks: list[Callback],
    *,
    train: Any = None,
    val: Any = None,
    ckpt_path: str | None = None,
    module: Module | None = None,
) -> tuple[Trainer, Module]:
    torch.manual_seed(4)
    module = module or Module()
    trainer = Trainer(**kwargs, callbacks=[Restless(), *callbacks])
    trainer.fit(
        module,
        loader() if train is None else train,
        loader(shuffle=False) if val is None else val,
        ckpt_path=ckpt_path,
    )
    return trainer, module


def assert_same(one: Module, other: Module) -> None:
    assert one.seen == other.seen and one.seen
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


LOADERS: dict[str, Callable[[], Any]] = {
    "items": loader,
    "tensors": lambda: loader(TensorDataset(X, Y)),
    "workers": lambda: loader(num_workers=1),
    "persistent": lambda: loader(num_workers=1, persistent_workers=True),
    "own generator": lambda: loader(generator=torch.Generator().manual_seed(3)),
    "several": lambda: {"a": loader(), "b": loader(TensorDataset(X[:9], Y[:9]))},
    "combined": lambda: CombinedLoader([loader(), loader()], "min_size"),
}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("sanity", [0, 1])
def test_weights_are_those_of_a_plain_fit(
    trainer_kwargs: dict[str, Any], name: str, sanity: int
) -> None:
    if name == "combined":
        Module.training_step, plain_step = _first_of_list, Module.training_step  # type: ignore[method-assign]
    kwargs = {**trainer_kwargs, "num_sanity_val_steps": sanity}
    try:
        _, plain = fit(kwargs, [], train=LOADERS[name]())
        fast = FastLoading(True, False, False)
        given = LOADERS[name]()
        trainer, module = fit(kwargs, [fast], train=given)
    finally:
        if name == "combined":
            Module.training_step = plain_step  # type: ignore[method-assign]
    assert_same(plain, module)
    held = [change for change in fast.receipt.changes if change.name == "train"]
    assert len(held) == (2 if name in ("several", "combined") else 1), fast.receipt
    assert any(change.name == "val" for change in fast.receipt.changes)
    assert not _ours(trainer) and "process_dataloader" not in vars(trainer.strategy)


def _first_of_list(self: Module, batch: Any, batch_idx: int) -> Tensor:
    batch = [torch.cat(parts) for parts in zip(*batch, strict=True)]
    self.seen.append(float(batch[0].sum()))
    return F.cross_entropy(self.net(batch[0]), batch[1])


def _ours(trainer: Trainer) -> list[Any]:
    loops = (trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop)
    return [
        x for p in loops for x in p._combined_loader.flattened if isinstance(x, EquivalentLoader)
    ]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "given",
    [
        {"limit_train_batches": 3, "max_epochs": 3},
        {"limit_train_batches": 0.5},
        {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
        {"max_epochs": -1, "max_steps": 9},
        {"val_check_interval": 2},
        {"precision": "bf16-mixed"},
    ],
    ids=str,
)
@pytest.mark.parametrize("fast", [(True, False, False), ("auto", 1, "auto")], ids=str)
def test_any_trainer_keeps_its_weights(
    trainer_kwargs: dict[str, Any], given: dict[str, Any], fast: tuple[Any, ...]
) -> None:
    kwargs = {**trainer_kwargs, **given}
    _, plain = fit(kwargs, [])
    callback = FastLoading(*fast)
    _, module = fit(kwargs, [callback])
    assert_same(plain, module)
    assert callback.receipt.changes


@pytest.mark.parametrize("every", [6, 4])
def test_a_resumed_fit_is_the_resumed_plain_fit(
    trainer_kwargs: dict[str, Any], tmp_path: Path, every: int
) -> None:
    def run(callbacks: Callable[[], list[Callback]], name: str) -> Module:
        keep = ModelCheckpoint(tmp_path / name, every_n_train_steps=every, save_top_k=-1)
        kwargs = {**trainer_kwargs, "enable_checkpointing": True}
        fit({**kwargs, "max_steps": every, "max_epochs": -1}, [*callbacks(), keep])
        path = str(next((tmp_path / name).glob("*.ckpt")))
        return fit({**trainer_kwargs, "max_epochs": 3}, callbacks(), ckpt_path=path)[1]

    assert_same(run(list, "plain"), run(lambda: [FastLoading(True, False, False)], "fast"))


@pytest.mark.slow
def test_a_second_fit_starts_afresh(trainer_kwargs: dict[str, Any]) -> None:
    def run(callbacks: list[Callback]) -> tuple[Module, Any]:
        given = CombinedLoader({"a": loader(num_workers=1, persistent_workers=True)})
        mine = given.flattened[0]
        module = Module()
        trainer, _ = fit(trainer_kwargs, callbacks, train=given, module=module)
        assert given.flattened[0] is mine or not callbacks
        trainer.fit_loop.max_epochs = 4
        trainer.fit(module, given, loader(shuffle=False))
        return module, given

    torch.manual_seed(0)
    plain, _ = run([])
    fast = FastLoading(True, False, False)
    torch.manual_seed(0)
    module, given = run([fast])
    assert_same(plain, module)
    assert not any(isinstance(x, EquivalentLoader) for x in given.flattened)
    assert len([c for c in fast.receipt.changes if c.name == "train"]) == 1, "of the second alone"


def test_a_fit_that_fails_leaves_nothing(trainer_kwargs: dict[str, Any]) -> None:
    class Fails(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("mine")

    given = CombinedLoader({"a": loader()})
    trainer = Trainer(**trainer_kwargs, callbacks=[FastLoading(True, False), Fails()])
    with pytest.raises(RuntimeError, match="mine"):
        trainer.fit(Module(), given)
    assert not any(isinstance(x, EquivalentLoader) for x in given.flattened)
    assert "process_dataloader" not in vars(trainer.strategy)


class Clock:
    """Time that passes only where an item is read, or a batch is looked up; no state of a dataset's."""

    now = 0.0

    @classmethod
    def perf_counter(cls) -> float:
        return cls.now

    @classmethod
    def spend(cls) -> None:
        cls.now += 0.001


class Slow(Items):
    """Items that take a millisecond each on a clock of the test's own."""

    def __init__(self, clock: Clock, items: Items) -> None:
        self.clock, self.items = clock, items

    def __getitem__(self, i: int) -> Any:
        self.clock.spend()
        return self.items[i]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for name in ("choose", "tensor_store"):
        monkeypatch.setattr(import_module(f"lightning_accel.loading.{name}"), "time", made)
    module = import_module("lightning_accel.loading.choose")
    monkeypatch.setattr(module, "_step", lambda ms, device: lambda batch: None)

    def take(store: TensorStore, indices: Any) -> Any:
        made.spend()  # a batch of four at the price of one item
        return plain_take(store, indices)

    plain_take = TensorStore.take
    monkeypatch.setattr(TensorStore, "take", take)
    return made


@pytest.mark.slow
def test_vouched_for_it_holds_what_is_slow_to_read_and_says_what_it_leaves(
    trainer_kwargs: dict[str, Any], clock: Clock
) -> None:
    _, plain = fit(trainer_kwargs, [], train=loader())
    fast = FastLoading(num_workers=False, budget_s=2.0, unchanging=True)
    _, module = fit(trainer_kwargs, [fast], train=loader(Slow(clock, Items())))
    assert_same(plain, module)
    (held, *_) = [change for change in fast.receipt.changes if change.name == "train"]
    assert "held in memory" in held.after and "0 workers" in held.before
    assert fast.choices[0][1].ratio == pytest.approx(4.0)
    fast = FastLoading(num_workers=False, budget_s=2.0, unchanging=True)
    _, plain = fit(trainer_kwargs, [], train=loader(Noisy()))
    _, module = fit(trainer_kwargs, [fast], train=loader(Slow(clock, Noisy())))
    assert_same(plain, module)
    assert any("draws random numbers" in change.after for change in fast.receipt.skipped)


@pytest.mark.slow
def test_auto_measures_workers_after_the_first_epoch(
    trainer_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[float] = []

    def chosen(given: Any, *, step_ms: float, **rest: Any) -> LoadingChoice:
        steps.append(step_ms)
        return LoadingChoice("workers=1", 2.0, "", plan=LoadingPlan(num_workers=1))

    monkeypatch.setattr("lightning_accel.loading.callbacks.fast_loading.choose", chosen)
    for extra in ({}, {"reload_dataloaders_every_n_epochs": 1}):
        kwargs = {**trainer_kwargs, "max_epochs": 3, **extra}
        train = lambda: loader(num_workers=2, persistent_workers=True)  # noqa: E731
        _, plain = fit(kwargs, [], train=train())
        fast = FastLoading(resident=False, unchanging=True)
        trainer, module = fit(kwargs, [fast], train=train())
        assert_same(plain, module)
        assert [c.after for c in fast.receipt.changes] == ["1 workers"] and not _ours(trainer)
    assert len(steps) == 2 and all(0 < step < 1000 for step in steps)


class Applies(Callback):
    """What a tuner does: a choice, when training starts."""

    def __init__(self, choice: LoadingChoice, undo: bool = False) -> None:
        self.choice, self.undo = choice, undo

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.applied = apply_choice(trainer, self.choice)
        assert len(_ours(trainer)) == (self.choice.taken != "as is")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.applied.undo()
        assert not _ours(trainer)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", ["as is", "resident", "workers=1"])
@pytest.mark.parametrize("limit", [1.0, 3])
def test_a_choice_is_applied_to_a_running_trainer(
    trainer_kwargs: dict[str, Any], workers: int, taken: str, limit: float
) -> None:
    kwargs = {**trainer_kwargs, "limit_train_batches": limit}
    given = loader(num_workers=workers, persistent_workers=workers > 0)
    store = resident(given).store if taken == "resident" else None
    plan = LoadingPlan(taken == "resident", 1 if taken == "workers=1" else None)
    assert plan.label == taken
    choice = LoadingChoice(taken, 2.0, "why", plan=plan, store=store)
    _, plain = fit(kwargs, [], train=loader(num_workers=workers, persistent_workers=workers > 0))
    callback = Applies(choice)
    _, module = fit(kwargs, [callback], train=given)
    assert_same(plain, module)
    assert bool(callback.applied.receipt) == (taken != "as is")


def test_a_real_choice_is_applied(trainer_kwargs: dict[str, Any], clock: Clock) -> None:
    given = loader(Slow(clock, Items()))
    choice = choose(given, step_ms=0.0, budget_s=2.0, workers=(), pin=False, unchanging=True)
    assert choice.taken == "resident", choice.table().to_text()
    _, plain = fit(trainer_kwargs, [])
    assert_same(plain, fit(trainer_kwargs, [Applies(choice)], train=given)[1])


def test_a_loader_that_is_not_there_cannot_be_replaced(trainer_kwargs: dict[str, Any]) -> None:
    choice = LoadingChoice("workers=1", 2.0, "", plan=LoadingPlan(num_workers=1))
    with pytest.raises(Unsupported, match="no such loader"):
        apply_choice(Trainer(**trainer_kwargs), choice)
    with pytest.raises(ValueError, match="kind"):
        apply_choice(Trainer(**trainer_kwargs), choice, kind="test")


def test_what_was_asked_for_by_name_and_cannot_be_is_an_error(
    trainer_kwargs: dict[str, Any],
) -> None:
    with pytest.raises(Unsupported, match="draws random numbers"):
        fit(trainer_kwargs, [FastLoading(resident=True)], train=loader(Noisy()))
    own = DataLoader(Items(), 4, sampler=RandomSampler(Items(), generator=torch.Generator()))
    with pytest.raises(Unsupported, match="generator of its own"):
        fit(trainer_kwargs, [FastLoading(num_workers=1)], train=own)


def test_a_fit_of_one_epoch_does_not_read_everything_first(trainer_kwargs: dict[str, Any]) -> None:
    fast = FastLoading(num_workers=False, pin_memory=False)
    with pytest.warns(UserWarning, match="read once"):
        fit({**trainer_kwargs, "max_epochs": 1}, [fast])
    assert not fast.receipt and "read once" in fast.receipt.skipped[0].after


@pytest.mark.parametrize(
    "given",
    [
        {"resident": "yes"},
        {"resident": 1},
        {"resident": None},
        {"num_workers": True},
        {"num_workers": -1},
        {"num_workers": "2"},
        {"num_workers": 1.5},
        {"pin_memory": "on"},
        {"resident": True, "num_workers": 2},
        {"resident": False, "num_workers": False, "pin_memory": False},
        {"limit_bytes": 0},
        {"budget_s": 0.0},
        {"budget_s": float("nan")},
        {"keep_random": None},
        {"unchanging": 1},
    ],
    ids=str,
)
def test_arguments_are_checked(given: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match="Do:"):
        FastLoading(**given)


def test_evaluation_alone_keeps_its_loaders(trainer_kwargs: dict[str, Any]) -> None:
    trainer = Trainer(**trainer_kwargs, callbacks=[FastLoading(True, False)])
    trainer.validate(Module(), loader(shuffle=False), verbose=False)
    assert "process_dataloader" not in vars(trainer.strategy)


DDP = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from lightning.pytorch import Trainer, seed_everything
from lightning_accel.loading import FastLoading
from test_loading_fit import Module, Restless, loader
import warnings; warnings.simplefilter("ignore")

fast = sys.argv[2] == "fast"
callbacks = [Restless(), *([FastLoading(True, False, False)] if fast else [])]
seed_everything(3, workers=True, verbose=False)
module = Module()
trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks)
trainer.fit(module, loader(), loader(shuffle=False))
if fast:
    assert {c.name for c in callbacks[1].receipt.changes} == {"train", "val"}, callbacks[1].receipt
torch.save([module.state_dict(), module.seen], f"{sys.argv[2]}{trainer.global_rank}.pt")
"""


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_each_keep_their_share(root: Path, tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(DDP)
    for kind in ("plain", "fast"):
        status, printed = forks.run_ranks(
            tmp_path / "run.py", str(root / "tests"), kind, cwd=tmp_path
        )
        assert status == 0, printed[-3000:]
    for rank in range(2):
        plain, fast = (
            torch.load(tmp_path / f"{k}{rank}.pt", weights_only=True) for k in ("plain", "fast")
        )
        assert plain[1] == fast[1]
        assert all(torch.equal(plain[0][key], fast[0][key]) for key in plain[0])
    shares = [torch.load(tmp_path / f"fast{rank}.pt", weights_only=True)[1] for rank in range(2)]
    assert shares[0] != shares[1]


@pytest.mark.gpu
def test_on_cuda_the_data_lies_on_the_device(trainer_kwargs: dict[str, Any]) -> None:
    kwargs = {**trainer_kwargs, "accelerator": "gpu"}
    _, plain = fit(kwargs, [])
    fast = FastLoading(True, False, False)
    _, module = fit(kwargs, [fast])
    assert_same(plain, module)
    assert all("cuda" in change.after for change in fast.receipt.changes)
