"""When to prune: before an epoch of a fit, once or along a schedule, and when to take it back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_accel.bridge import bests, checks
from lightning_accel.bridge.copies import TrainingData, is_free, on_host, unfrozen
from lightning_accel.bridge.data import ReadOnce
from lightning_accel.bridge.example import AtHand, find_example
from lightning_accel.bridge.hand import reads_once
from lightning_accel.bridge.model_edit import ModelEdit, commit
from lightning_accel.bridge.parts import note_parts
from lightning_accel.bridge.restore import pristine
from lightning_accel.bridge.rewind import remember_fit
from lightning_accel.bridge.strategies import on_whole
from lightning_accel.bridge.tried import steps_of
from lightning_accel.changed import changed, in_vain, written
from lightning_accel.errors import NoEffect
from lightning_accel.pruning import history as past
from lightning_accel.pruning import judge, sparse_training
from lightning_accel.pruning import rollback as guarding
from lightning_accel.pruning import schedule as scheduling
from lightning_accel.pruning.due import Decision, Fit, decide, dry_run
from lightning_accel.pruning.foreign import Pruner
from lightning_accel.pruning.importance import Importance
from lightning_accel.pruning.recalibrate import check_batches
from lightning_accel.pruning.request import Depth, Request
from lightning_accel.pruning.selection import Attention, Scope
from lightning_accel.pruning.target import Target
from lightning_accel.pruning.trained import UNTRAINED, looks_untrained
from lightning_accel.surgery import Receipt, Select, Stage, Structure
from lightning_accel.surgery.acting import nothing_heard
from lightning_accel.surgery.preserve import preserve_rng

_BATCHES = 10  # of training data, for an importance that measures


class StructuredPruning(ModelEdit):
    """Make the network smaller during a fit, and keep everything that hangs on it working.

    Optimizer state, averages, DDP, `FSDP2Strategy`, checkpoints and resume follow; batch-norm statistics are re-estimated
    from unlabelled training batches. What could not be pruned is listed with its reason.

    Best scores of `ModelCheckpoint`, `EarlyStopping` and `ReduceLROnPlateau` start anew with the smaller
    network; checkpoints of the larger one stay on disk, and are named in `history[i]["bests"]`.

    Cut along is what the module, callbacks and optimizers keep beside the weights in their names or their
    order: averages, slow weights, anchors. A record of old weights looks the same and is cut too; to keep one whole, keep
    it in a list of dicts, or as numpy arrays.

    Args:
        ratio: Share of the channels of every layer to remove, above 0 and below 1; of the network at the
            start of the fit, as all shares here. A fit that resumes from a checkpoint is one with that which
            wrote it; a new fit of a network that was pruned before starts from what is left.
        when: Epoch before which to prune, counted from 0; or the share of the fit (0.4 of 20 epochs is
            epoch 8); or a list of either; in a search its begin, with a step every `patience` epochs.
            With 0 the network should be one that is trained: it is warned of one that does not look so.
        target: Instead of `ratio`, what to keep of the network at the start of the fit: `Macs(0.5)`,
            `Params(0.5)`, `Latency(0.5)` on the device of the fit, `Memory(0.5)`.
        importance: One of `importance.KNOWN`, or a function of model and group; those that measure do so
            on ten training batches.
        scope: "local" takes the same share of every layer, "global" ranks all channels together,
            "isomorphic" those of layers of equal structure, "sensitivity" by what each layer costs, measured.
            By default "local", and "sensitivity" in a search.
        schedule: How the share rises over the epochs of `when`: "linear", "cubic" (most of it early),
            "iterative" (the same share of what is left), or "one_shot" for one epoch.
        select: Layers whose channels may go: a `Select`, a name pattern or several. The last layer is
            never pruned.
        round_to: Kept channels are raised to a multiple of this; or "measured", which tries which
            multiple is fastest on this device. `None` is no rounding, but "measured" for `Latency`.
        attention: Whole "heads" go, or the same places of every head ("width").
        compensate: Solve the layers that read what is gone anew, by least squares on ten training batches;
            by default unless a `pruner` is given. With `False` their weights are those of before.
        depth: Whole residual blocks go as well (True), or "only" they, of which `ratio` is a share then: first
            those that change the outputs on ten training batches least for what they save.
        recalibrate: Training batches for new batch-norm statistics after each prune; 0 keeps the old.
        max_drop: How much worse `monitor` may get than before the first prune. Beyond that when the next
            prune is due, or at the end, the last prune is taken back and none follows. Without `ratio`, `target`
            and `pruner` this is a search, as far as the metric allows below the best so far of any network: in
            steps that grow until one is taken back and are halved from there to 2 %; see `trade_off`.
        monitor: A metric that is logged in validation; `mode` is "max" where more of it is better, "min" where less.
        patience: With `max_drop`, epochs of fine-tuning before a prune can be taken back; a prune that
            is due meanwhile waits.
        pruner: Instead of `ratio`, a function of a copy of the LightningModule and of what it takes, called anew for
            each prune: `lambda model, example: tp.pruner.BasePruner(model, example, ...)`. What it returns
            chooses what goes; see `pruning.foreign` for its steps and its sparse training.
        example: Arguments of the LightningModule's `forward`; by default `example_input_array`, else
            what its networks receive in `training_step`.

    Raises:
        ValueError: An argument is out of range.
        TypeError: An argument is of another type.

    >>> StructuredPruning(ratio=0.5, when=[2, 4]).when
    (2, 4)
    """

    stage: ClassVar[Stage] = Stage.SHAPE
    of_a_fit: ClassVar = {"_trainer": lambda: type(None), "_module": lambda: type(None)}

    def __init__(
        self,
        ratio: float | None = None,
        *,
        when: float | Iterable[float],
        target: Target | None = None,
        importance: Importance = "magnitude",
        scope: Scope | None = None,
        schedule: scheduling.Schedule = "linear",
        select: Select | str | Sequence[str] | dict[str, Any] | None = None,
        round_to: int | str | None = None,
        attention: Attention = "heads",
        compensate: bool | None = None,
        depth: Depth = False,
        recalibrate: int = 10,
        max_drop: float | None = None,
        monitor: str | None = None,
        mode: guarding.Mode = "max",
        patience: int = 1,
        pruner: Pruner | None = None,
        example: Any = None,
    ) -> None:
        self._when = scheduling.moments(when)
        self._epochs: tuple[int, ...] | None = None
        self.select = Select.of(select)
        searches = max_drop is not None and ratio is None and target is None and pruner is None
        self.request = Request(
            ratio=ratio,
            target=target,
            importance=importance,
            scope=("sensitivity" if searches else "local") if scope is None else scope,
            steps=len(self._when),
            schedule=schedule,
            select=self.select,
            round_to=round_to,
            attention=attention,
            compensate=compensate,
            depth=depth,
            pruner=pruner,
            is_search=searches,
        )
        self._sparse = sparse_training.SparseTraining(pruner, example)
        check_batches(recalibrate)
        # Lightning asks for the key on every hook of every step.
        self._key = self._generate_state_key(select=str(self.select))
        self._is_set_up = False
        self.recalibrate = recalibrate
        guarded = {"max_drop": max_drop, "monitor": monitor, "mode": mode, "patience": patience}
        self.guard = guarding.rollback(**guarded, when=self._when, follows_best=searches)
        self._settings = written({"when": self._when, **self.request.settings(), **guarded})
        self._before: dict[str, str] = {}  # settings of the fit that a checkpoint comes from
        self.example = example
        self.receipt = Receipt()
        self.history: list[dict[str, Any]] = []
        self._start: Structure | None = (
            None  # what earlier fits left of the layers that they pruned
        )
        self._at_hand: AtHand | None = None
        self._trainer: Callable[[], Trainer | None] = type(None)
        self._module: Callable[[], LightningModule | None] = type(None)

    @property
    def when(self) -> tuple[float, ...]:
        """The epochs before which to prune; shares of the fit until a fit has begun."""
        return self._when if self._epochs is None else self._epochs

    @property
    def trade_off(self) -> list[dict[str, Any]]:
        """What `monitor` was at each size: `kept` of the target's unit, `params`, `score`, `pareto` (none is better)."""
        if self.guard is None:
            return []
        return past.trade_off(self.history, self.guard.first, self.guard.mode)

    @property
    @override
    def state_key(self) -> str:
        # Lightning compares keys when a Trainer is made, and can only say that two are equal.
        return self._key if self._is_set_up else f"{self._key} {id(self)}"

    @override
    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "history": [dict(step) for step in self.history],
            "settings": dict(self._settings),
        }
        if self._start:
            state["start"] = self._start.to_dict()
        if not self.history and self._sparse.state():
            state["sparse"] = self._sparse.state()
        return state if self.guard is None else {**state, "guard": self.guard.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = list(state_dict["history"])
        self._before = dict(state_dict.get("settings", {}))
        start = state_dict.get("start")
        self._start = Structure() if start is None else Structure.from_dict(start)
        self._sparse.load(state_dict.get("sparse", []))
        if self.guard is not None and "guard" in state_dict:
            self.guard.load_state_dict(state_dict["guard"])

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        checks.refuse_twin(trainer, self, f"ratio={self.request.ratio}, when={self._when}")
        self._is_set_up = True
        if stage != "fit":
            return
        self.held(trainer).callback(self._sparse.end)
        judge.require_one_guard(trainer, self)
        checks.refuse_sharded(trainer.strategy, type(self).__name__, unless_gathered=True)
        checks.refuse_spawn(trainer.strategy, type(self).__name__)
        self._epochs = scheduling.epochs(self._when, trainer.max_epochs)
        if self.request.is_search and self.guard is not None:
            self._epochs = past.moments(self._epochs, trainer.max_epochs, self.guard.patience)
        if not checks.is_trial(trainer):
            scheduling.require_reached(self._epochs, trainer.max_epochs)
        self.request.refuse_manual(pl_module.automatic_optimization)
        if any(True for _ in pl_module.parameters()):
            self.select.require(pl_module)
        if (trainer, pl_module) != (self._trainer(), self._module()):
            # Another fit; a second `trainer.fit` of the same model goes on where the first ended.
            self._trainer, self._module = weakref.ref(trainer), weakref.ref(pl_module)
            self.receipt, self.history, self._start, self._before = Receipt(), [], None, {}
            self._sparse.load(())
            if self.guard is not None:
                self.guard.reset()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        checks.require_optimizer(trainer, type(self).__name__)
        self.select.require(pl_module)
        self._tell_changed()

    @override
    @on_whole
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rehearse, so that what cannot work is told now and not in the middle of the fit."""
        if not checks.is_built(pl_module):
            return  # lazy layers: nothing can be tried before the first batch of the fit
        super().on_train_start(trainer, pl_module)
        if self._start is None:
            self._start = pristine(pl_module).now(pl_module)
        if not self.history:
            self._sparse.begin(trainer, pl_module)
            if self.guard is not None and not checks.is_trial(trainer):
                judge.require_validation(trainer, self.guard.monitor, int(self.when[0]))
        if self._done() < len(self.when) and not (self.request.is_search and self.history):
            with preserve_rng(), nothing_heard(pl_module), on_host(trainer, pl_module) as module:
                try:
                    calls = find_example(trainer, module, self.example, reach=True)
                except ReadOnce:  # nothing can be tried before the first batch of the fit
                    return
                fit = self._fit(trainer, pl_module, module)
                dry_run(self.request, unfrozen(module), calls, fit)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        bests.begin_epoch(trainer)
        # What is frozen may yet be unfrozen by hooks that come after this one: then at the first batch.
        if is_free(pl_module):
            self._act(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._sparse.batch_begins(batch)
        # Lightning leaves out the epoch's start after a resume from the last step of an epoch.
        if batch_idx == 0:
            if checks.is_built(pl_module):
                note_parts(trainer, pl_module)  # those that other callbacks made since
            self._at_hand = AtHand(batch)
            try:
                self._act(trainer, pl_module)
            finally:
                self._at_hand = None

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self._sparse.before_step(trainer, optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._sparse.batch_ends()

    @override
    def on_model_edit_end(
        self, trainer: Trainer, pl_module: LightningModule, receipt: Receipt
    ) -> None:
        """Trace anew for sparse training what another edit has changed."""
        if self._sparse.acts:
            self._sparse.begin(trainer, pl_module)

    def _act(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trial = checks.is_trial(trainer)  # of everything in one epoch
        due = len(self.when) if trial else sum(e <= trainer.current_epoch for e in self.when)
        if due <= self._done() or (self._at_hand is None and reads_once(trainer)):
            return  # of a stream, the fit's own first batch will do
        self._act_now(trainer, pl_module, due, trial)

    @on_whole
    def _act_now(self, trainer: Trainer, pl_module: LightningModule, due: int, trial: bool) -> None:
        checks.refuse_lazy(pl_module, type(self).__name__)
        kept = bests.keepers_of_files(trainer)
        if self._prune_as_guarded(trainer, pl_module, due) and not trial:
            bests.keep_cut(trainer, kept)

    def _prune_as_guarded(self, trainer: Trainer, pl_module: LightningModule, due: int) -> bool:
        if self.guard is None or checks.is_trial(trainer):
            return self._prune(trainer, pl_module, due)
        if not self._may_go_on(trainer, pl_module):
            return False
        self.guard.require_value()
        metrics, snapshot = dict(trainer.callback_metrics), remember_fit(trainer, pl_module)
        steps = range(self._done() + 1, due + 1)  # one at a time; rounding can put some off
        pruned = any(self._prune(trainer, pl_module, step) for step in steps)
        if pruned:
            self.guard.begin(epoch=trainer.current_epoch, snapshot=snapshot)
            self.guard.metrics = metrics
        return pruned

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        bests.forget_stale(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.guard is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.guard.note(trainer.callback_metrics) and self.guard.latest is not None:
            past.note_score(self.history, self.guard.latest)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self._sparse.epoch_ends()
        # Before the last checkpoint is written, so that it holds the network that passed.
        if judge.is_last_epoch(trainer):
            self._may_go_on(trainer, pl_module, final=True)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._may_go_on(trainer, pl_module, final=True)
        bests.save_at_end(trainer, pl_module)
        if self.guard is not None and not checks.is_trial(trainer):
            judge.tell_end(self.guard, self.history, self.request.is_search)
        if self.request.is_search or (self.guard is not None and self.guard.stopped):
            return
        # `current_epoch` counts on before this hook; with a guard, steps that are past may be put off.
        late = trainer.current_epoch if self.guard is None else 0
        missed = [epoch for epoch in self.when[self._done() :] if epoch >= late]
        if missed and not checks.is_trial(trainer):
            rank_zero_warn(scheduling.unfinished(self.when, missed))

    def _tell_changed(self) -> None:
        """Say what of the settings is given in vain, because the network was cut already."""
        judges = self.guard is not None and self.guard.pruned_at is not None  # by what is said now
        heard = guarding.SETTINGS if judges else ()
        difference = changed(self._before, self._settings, but=heard)
        if not difference or not self.history:
            return
        if self._done() == len(self.when) or (self.guard is not None and self.guard.stopped):
            happens = "every step is done or taken back, and nothing more is pruned"
            rank_zero_warn(in_vain(type(self).__name__, difference, happens))
        else:
            self.request.refuse_other_unit(self._before["target"])

    def _done(self) -> int:
        return past.done(self.history, len(self.when))

    def _may_go_on(self, trainer: Trainer, pl_module: LightningModule, final: bool = False) -> bool:
        """Judge the last prune, and take it back if need be; whether the next one may come."""
        if self.guard is None or self.guard.stopped:
            return self.guard is None
        verdict = self.guard.verdict(epoch=trainer.current_epoch, final=final)
        verdict = trainer.strategy.broadcast(verdict)
        if verdict == "back":
            # In a search that is how the bound is found.
            told = rank_zero_info if self.request.is_search else rank_zero_warn
            self.receipt += judge.take_back(trainer, pl_module, self.guard, told)
            self.history[-1]["rolled_back"] = trainer.current_epoch
        goes_on = self.request.is_search and not final and any(past.next_steps(self.history))
        if verdict == "back" or (verdict == "go" and final):
            self.guard.close(stopped=verdict == "back" and not goes_on)
        return verdict == "go" or (verdict == "back" and goes_on)

    def _prune(self, trainer: Trainer, pl_module: LightningModule, due: int) -> bool:
        before = sum(p.numel() for p in pl_module.parameters())
        found = self._decide(trainer, pl_module, due)
        if not found.cut:  # rounding can put a step off, but not the whole
            if (due == len(self.when) or self.request.is_search) and not self.history:
                raise NoEffect(found.text)
            if self.history:  # a search has tried smaller ones
                self.history[-1]["step"] = len(self.when) if self.request.is_search else due
                self.history[-1]["exhausted"] = self.request.is_search
            rank_zero_info(f"Nothing to prune before epoch {trainer.current_epoch}. {found.text}")
            return False
        earlier = bests.bests(trainer)
        if not trainer.global_step and not checks.is_trial(trainer) and looks_untrained(pl_module):
            rank_zero_warn(UNTRAINED)
        self._sparse.end()
        renew = partial(sparse_training.renew, trainer, pl_module, self.recalibrate, self._at_hand)
        receipt = commit(trainer, pl_module, found.cut, renew)
        after = sum(p.numel() for p in pl_module.parameters())
        self.receipt = self.receipt + receipt
        self.history.append(
            {
                "step": due,
                "epoch": trainer.current_epoch,
                "params_before": before,
                "params_after": after,
                "kept": found.kept,
                "skipped": {change.name: change.what for change in receipt.skipped},
                "bests": earlier,
            }
        )
        told = (found.text, past.left(self.history)) if found.text else None
        sparse_training.report(trainer, pl_module, receipt, before, told)
        return True

    def _decide(self, trainer: Trainer, pl_module: LightningModule, due: int) -> Decision:
        """Decide on all processes, because networks may talk to each other, and take rank 0's word."""
        device, history = trainer.strategy.root_device, self.history
        with preserve_rng(), nothing_heard(pl_module), on_host(trainer, pl_module) as module:
            calls = find_example(trainer, module, self.example, self._at_hand, reach=True)
            fit = self._fit(trainer, pl_module, module)
            how: dict[str, Any] = {"due": due, "history": history, "device": device}
            found = decide(self.request, module, calls, fit, **how)
        return trainer.strategy.broadcast(found)

    def _fit(self, trainer: Trainer, pl_module: LightningModule, module: LightningModule) -> Fit:
        """Return what a plan needs of the fit, at the batch at hand if there is one."""
        data = TrainingData(trainer, module, _BATCHES, self._at_hand)
        left, steps = past.left(self.history), steps_of(trainer, self._at_hand)
        dense = pristine(pl_module).updated(self._start or Structure())  # as the fit began
        return Fit(data, dense, left, steps)
