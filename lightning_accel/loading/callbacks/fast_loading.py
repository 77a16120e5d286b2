"""When to change how batches are made: as the Trainer gets its loaders, and once a step has been timed.

Lightning lets a strategy have a last word on every DataLoader, after it has put its own samplers in
(`Strategy.process_dataloader`). That method is wrapped, on the one instance, from `setup` to `teardown`:
so loaders of a later epoch, of the validation and of another rank all come by. The user's own DataLoader
is never changed, and is back in its place after the fit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, ClassVar, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from lightning_accel.arguments import flags, whole
from lightning_accel.bridge.step import Around
from lightning_accel.bridge.technique import Technique
from lightning_accel.errors import Unsupported, explain
from lightning_accel.loading.choose import LoadingChoice, choose
from lightning_accel.loading.order import EquivalentLoader
from lightning_accel.loading.resident import (
    SHARE,
    ResidentLoader,
    check_limits,
    free_bytes,
    resident,
)
from lightning_accel.loading.rows import Rows, why_not_now
from lightning_accel.loading.tensor_store import TensorStore, require_plain
from lightning_accel.loading.workers import with_workers
from lightning_accel.measure.race import synchronise
from lightning_accel.surgery import Receipt
from lightning_accel.surgery.receipt import Change

_TIMED = range(3, 13)
_LONG_S = 3600.0
_TRANSFERS = ("on_before_batch_transfer", "transfer_batch_to_device")


class FastLoading(Technique):
    """Make the same batches faster: the dataset held in memory, other workers, pinned memory.

    Batches, their order and all random numbers stay the same bit for bit, so that the weights at the end
    do as well. What would change them is left alone, with the reason in `receipt.skipped`. By itself it
    takes a `TensorDataset`, and subsets of one: batches are looked up in its own tensors, so that every
    write to them is seen. Any other dataset may give other items at the next read, which no look from
    outside rules out: it is neither read nor held unless you vouch for it, by `unchanging`, or by asking
    for `resident=True` or a number of workers.

    Args:
        resident: Hold the dataset in memory: "auto" where it is faster, `True` or an error, `False`.
            On CUDA a dataset that is vouched for is held there, if it fits into a fifth of what is free.
        num_workers: "auto", a number of workers, or `False` to keep the loader's own.
        pin_memory: Pinned memory for copies to CUDA: "auto", or whether.
        limit_bytes: The most that one dataset may take; by default a fifth of the memory that is free,
            shared by the processes of this machine.
        budget_s: The longest that one measurement may take, and for "auto" reading all of a dataset.
        keep_random: Leave the workers alone where items draw random numbers, which would be others.
        unchanging: You vouch that each item stays as it is, whenever and by whomever it is read, and that
            to read it leaves no trace. Then any dataset is measured: held when the Trainer gets its loaders;
            with other workers after the first epoch, beside a step of the length that was seen.

    Raises:
        ValueError: An argument is out of range.
        Unsupported: At the start of a fit, when what was asked for by name is not possible.

    >>> FastLoading(num_workers=2).num_workers
    2
    """

    of_a_fit: ClassVar = {"_stores": list, "_known": list, "_wrapped": set}

    def __init__(
        self,
        resident: bool | str = "auto",
        num_workers: int | bool | str = "auto",
        pin_memory: bool | str = "auto",
        *,
        limit_bytes: int | None = None,
        budget_s: float = 5.0,
        keep_random: bool = True,
        unchanging: bool = False,
    ) -> None:
        for name, value in (("resident", resident), ("pin_memory", pin_memory)):
            if value != "auto" and not isinstance(value, bool):
                raise ValueError(explain(f"unknown `{name}`", repr(value), "pass 'auto' or a bool"))
        if num_workers != "auto" and num_workers is not False:
            whole("num_workers", num_workers, least=0, do="pass 'auto', a number or false")
        if resident is True and type(num_workers) is int:
            found, do = f"num_workers={num_workers}", "leave one of them at 'auto'"
            raise ValueError(explain("`resident` needs no `num_workers`", found, do))
        if resident is False and num_workers is False and pin_memory is False:
            raise ValueError(
                explain("nothing was asked for", "three times false", "leave one 'auto'")
            )
        flags(keep_random=keep_random, unchanging=unchanging)
        check_limits(limit_bytes, budget_s)
        self.resident, self.num_workers, self.pin_memory = resident, num_workers, pin_memory
        self.limit_bytes, self.budget_s = limit_bytes, budget_s
        self.keep_random, self.unchanging = keep_random, unchanging
        self.choices: list[tuple[str, LoadingChoice]] = []
        self.receipt = Receipt()
        self._wrapped: set[int] = set()
        self._stores: list[tuple[Any, Any, TensorStore]] = []
        self._known: list[tuple[Any, Any]] = []
        self._chosen: dict[int, LoadingChoice] = {}
        self._steps_ms: list[float] = []
        self._seen, self._since = 0, 0.0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self.held(trainer).callback(self._release, trainer)
        self.choices, self._chosen = [], {}
        self._seen, self._steps_ms = 0, []
        if type(trainer.strategy).process_dataloader is not Strategy.process_dataloader:
            self._skip("all", f"{type(trainer.strategy).__name__} wraps the loaders itself")
            return
        around = Around(
            trainer.strategy,  # type: ignore[arg-type]
            "process_dataloader",
            lambda method, given: self._process(trainer, method(given)),
        )
        self._wrapped.add(id(trainer))
        self.held(trainer).callback(self._wrapped.discard, id(trainer))
        self.held(trainer).callback(around.remove)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for change in self.receipt.changes:
            rank_zero_info(f"{change.name}: {change.before} -> {change.after}")
        if not self.receipt and self.num_workers != "auto" and self.pin_memory != "auto":
            why = "; ".join(f"{c.name}: {c.after}" for c in self.receipt.skipped)
            rank_zero_warn(explain("loading stays as it is", why, "read `receipt.skipped`"))

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._seen in _TIMED:
            synchronise(trainer.strategy.root_device)
            self._since = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._seen in _TIMED:
            synchronise(trainer.strategy.root_device)
            self._steps_ms.append(1000 * (time.perf_counter() - self._since))
        self._seen += 1

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        combined = _combined(trainer, "train")
        if not self._steps_ms or combined is None or id(trainer) not in self._wrapped:
            return
        for index, loader in enumerate(combined.flattened):
            if isinstance(loader, EquivalentLoader) or (
                self.num_workers != "auto" and self.pin_memory != "auto"
            ):
                continue
            if not self.unchanging and trainer.strategy.root_device.type != "cuda":
                continue  # pinned memory is all that may be taken without a word of the user's
            first = index not in self._chosen
            if first:
                self._chosen[index] = self._choose(trainer, loader)
                self.choices.append((f"train[{index}]", self._chosen[index]))
            applied = apply_choice(trainer, self._chosen[index], index=index)
            self._known.append((loader, combined.flattened[index]))
            self.receipt = self.receipt + (applied.receipt if first else Receipt())

    def _process(self, trainer: Trainer, given: Any) -> Any:
        loader = given.loader if isinstance(given, EquivalentLoader) else given
        name = "train" if trainer.training else "val"
        for known, fast in self._known:
            if known is loader:  # given again, with workers that may persist
                return fast
        try:
            require_plain(loader)
            fast = self._made(trainer, loader, name)
        except Unsupported as error:
            if name == "train" and (self.resident is True or type(self.num_workers) is int):
                raise
            self._skip(name, str(error))
            return loader
        if fast is not loader:
            self._known.append((loader, fast))
            before = f"{loader.num_workers} workers, batches of {loader.batch_size}"
            self.receipt = self.receipt + Receipt((Change(name, "loading", before, _shown(fast)),))
        return fast

    def _made(self, trainer: Trainer, loader: Any, name: str) -> Any:
        if type(self.num_workers) is int:
            return with_workers(
                loader,
                self.num_workers,
                pin_memory=None if self.pin_memory == "auto" else bool(self.pin_memory),
                keep_random=self.keep_random,
            )
        if self.resident is not False:
            for dataset, collate, store in self._stores:
                if dataset is loader.dataset and collate is loader.collate_fn:
                    return ResidentLoader(loader, store)
            found = self._held(trainer, loader, name)
            if isinstance(found, ResidentLoader):
                if isinstance(found.store, TensorStore):
                    self._stores.append((loader.dataset, loader.collate_fn, found.store))
                return found
        if isinstance(self.pin_memory, bool) and self.pin_memory != loader.pin_memory:
            return with_workers(loader, loader.num_workers, pin_memory=self.pin_memory)
        return loader

    def _held(self, trainer: Trainer, loader: Any, name: str) -> Any:
        device = _place(trainer)
        limit = self.limit_bytes
        if limit is None and device.type == "cpu":
            limit = max(1, int(SHARE * free_bytes(device)) // max(1, trainer.num_devices))
        if self.resident is True:
            return resident(loader, device, limit_bytes=limit, limit_s=_LONG_S)
        if trainer.max_epochs == 1 and why_not_now(loader):
            self._skip(name, "each item is read once, so holding it would gain nothing")
            return loader
        choice = choose(
            loader,
            step_ms=0.0,
            device=device,
            budget_s=self.budget_s,
            workers=(),
            pin=False,
            unchanging=self.unchanging,
            limit_bytes=limit,
        )
        self.choices.append((name, choice))
        if choice.taken == "as is":
            self._skip(name, "; ".join([choice.reason, *(w.skipped for w in choice.ways)]))
        return choice.apply(loader)

    def _choose(self, trainer: Trainer, loader: Any) -> LoadingChoice:
        return choose(
            loader,
            step_ms=median(self._steps_ms),
            device=trainer.strategy.root_device,
            budget_s=self.budget_s,
            workers=None if self.num_workers == "auto" else (),
            hold=False,
            pin=self.pin_memory == "auto",
            keep_random=self.keep_random,
            unchanging=self.unchanging,
        )

    def _skip(self, name: str, why: str) -> None:
        change = Change(name, "loading", "as is", why.strip("; "))
        self.receipt = self.receipt + Receipt(skipped=(change,))

    def _release(self, trainer: Trainer) -> None:
        self._stores, self._known = [], []
        for kind in ("train", "val"):
            combined = _combined(trainer, kind)
            for index, loader in enumerate(combined.flattened if combined is not None else ()):
                if combined is not None and isinstance(loader, EquivalentLoader):
                    loader.close()
                    _put(combined, index, loader.loader)


class AppliedPlan(NamedTuple):
    """A change of a running Trainer's loader; `undo()` puts the user's own back."""

    receipt: Receipt
    undo: Callable[[], None]


def apply_choice(
    trainer: Trainer, choice: LoadingChoice, *, index: int = 0, kind: str = "train"
) -> AppliedPlan:
    """Let a running Trainer make its batches as was chosen, from the batch that comes next.

    For `on_train_start` or later in a fit. The epoch that has begun goes on where it is: nothing is
    drawn twice, and what the user's workers have begun is used first.

    Args:
        trainer: A Trainer within a fit.
        choice: What `choose` returned.
        index: Which one of several loaders.
        kind: "train" or "val".

    Raises:
        Unsupported: The Trainer has no such loader, or it does not allow this form.

    >>> from lightning_accel.loading import LoadingChoice
    >>> bool(apply_choice(Trainer(accelerator="cpu", logger=False), LoadingChoice("as is", 1.0, "")).receipt)
    False
    """
    if kind not in ("train", "val"):
        raise ValueError(explain("unknown `kind`", repr(kind), "pass 'train' or 'val'"))
    if choice.taken == "as is":
        left = Change(f"{kind}[{index}]", "loading", "as is", choice.reason)
        return AppliedPlan(Receipt(skipped=(left,)), lambda: None)
    combined = _combined(trainer, kind)
    if combined is None or not 0 <= index < len(combined.flattened):
        raise Unsupported("there is no such loader", f"{kind}[{index}]", "call it within a fit")
    old = combined.flattened[index]
    new = choice.apply(old.loader if isinstance(old, EquivalentLoader) else old)
    new.follow(old)
    running = _running(trainer, combined, index) if kind == "train" else None
    taken = None if running is None else new.adopt(running)
    _put(combined, index, new)
    if taken is not None:
        combined._iterator.iterators[index] = taken  # type: ignore[union-attr]

    def undo() -> None:
        if index < len(combined.flattened) and combined.flattened[index] is new:
            new.close()
            _put(combined, index, new.loader)

    before = f"{new.loader.num_workers} workers"
    change = Change(f"{kind}[{index}]", "loading", before, _shown(new))
    return AppliedPlan(Receipt((change,)), undo)


def _combined(trainer: Trainer, kind: str) -> CombinedLoader | None:
    loop = trainer.fit_loop if kind == "train" else trainer.fit_loop.epoch_loop.val_loop
    return getattr(loop, "_combined_loader", None)


def _put(combined: CombinedLoader, index: int, loader: Any) -> None:
    flattened: Sequence[Any] = combined.flattened
    combined.flattened = [*flattened[:index], loader, *flattened[index + 1 :]]
    iterator = combined._iterator
    if iterator is not None:
        iterator.iterables = combined.flattened


def _running(trainer: Trainer, combined: CombinedLoader, index: int) -> Any:
    """Return the iterator that the next training batch will come from, unless a new one is made."""
    fetcher = trainer.fit_loop._data_fetcher
    iterator = combined._iterator
    if fetcher is None or fetcher.done or iterator is None or index >= len(iterator.iterators):
        return None
    return iterator.iterators[index]


def _place(trainer: Trainer) -> torch.device:
    """Return where data may be held: on the device, unless the user moves batches on the way."""
    device = trainer.strategy.root_device
    module, data = trainer.lightning_module, getattr(trainer, "datamodule", None)
    for hook in _TRANSFERS:
        if is_overridden(hook, module) or (data is not None and is_overridden(hook, data)):
            return torch.device("cpu")
    return device if device.type == "cuda" else torch.device("cpu")


def _shown(loader: Any) -> str:
    if isinstance(loader, ResidentLoader):
        store = loader.store
        if isinstance(store, Rows):
            return "looked up in its own tensors"
        return f"held in memory ({store.device.type}, {store.num_bytes / 1e6:.1f} MB)"
    return f"{loader.num_workers} workers" + (", pinned" if loader.pin_memory else "")
