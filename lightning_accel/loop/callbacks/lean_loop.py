"""`LeanLoop`: less host work in the Trainer's loop."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, ClassVar

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from lightning_accel.arguments import flags, whole
from lightning_accel.bridge.technique import Technique
from lightning_accel.errors import explain
from lightning_accel.loop import bar, hooks, log
from lightning_accel.loop.sigterm import Throttle
from lightning_accel.surgery import Change, Receipt

TESTED = "2.6"
"""The minor release of Lightning whose internals `LeanLoop` knows."""


class LeanLoop(Technique):
    """Take host work out of the Trainer's loop that changes no result.

    Written against the internals of Lightning 2.6, on the instances of this run, and taken back after it;
    with another Lightning it warns and does nothing. What was done is in `receipt`, what not and why in
    `receipt.skipped`.

    Args:
        log: `self.log` checks its arguments once, not on every call. Every logged value is the same.
        hooks: Hooks that a callback does not have are not called, and the name of the running hook and the
            signature of `training_step` are had more cheaply.
        sigterm_every_n_steps: With several processes, batches between two checks whether one of them was told to
            stop; fewer where a batch takes above a tenth of a second. 1 leaves Lightning's check as it is.
        progress_bar: Values for the progress bar leave the device when the bar asks, not on every batch.

    Raises:
        TypeError: A switch is not a bool, or `sigterm_every_n_steps` no integer.
        ValueError: `sigterm_every_n_steps` is below 1, or nothing at all is asked for.

    >>> LeanLoop(sigterm_every_n_steps=20).sigterm_every_n_steps
    20
    """

    of_a_fit: ClassVar = {"_undo": ExitStack, "_throttle": type(None)}

    def __init__(
        self,
        *,
        log: bool = True,
        hooks: bool = True,
        sigterm_every_n_steps: int = 50,
        progress_bar: bool = True,
    ) -> None:
        flags(log=log, hooks=hooks, progress_bar=progress_bar)
        whole(
            "sigterm_every_n_steps",
            sigterm_every_n_steps,
            do="pass a number of batches, such as 50",
        )
        if not (log or hooks or progress_bar) and sigterm_every_n_steps == 1:
            raise ValueError(explain("nothing is asked for", "all switches off", "turn one on"))
        self.lean_log = log  # a Trainer gives callbacks a method `log`
        self.hooks = hooks
        self.sigterm_every_n_steps = sigterm_every_n_steps
        self.progress_bar = progress_bar
        self._undo = ExitStack()
        self._throttle: Throttle | None = None
        self._warned = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._undo = self.held(trainer)
        self._undo.callback(setattr, self, "_throttle", None)
        if not lightning.__version__.startswith(f"{TESTED}."):
            self._skip("everything", f"Lightning {lightning.__version__} is not {TESTED}")
            if not self._warned:
                self._warned = True
                rank_zero_warn(
                    explain(
                        f"LeanLoop knows Lightning {TESTED} and did nothing",
                        lightning.__version__,
                        "leave it out, or update lightning_accel",
                    )
                )
            return
        if stage == "predict":  # nothing is logged there
            return
        results = _results(trainer)
        if self.lean_log:
            self._lean_log(trainer, pl_module, results)
        if self.hooks:
            self._real_hooks(trainer, pl_module)
        if self.progress_bar:
            self._late_bar(trainer, results)
        if stage == "fit" and self.sigterm_every_n_steps > 1:
            self._rare_checks(trainer)
        if stage == "fit":
            names = ", ".join(change.name for change in self.receipt.changes)
            rank_zero_info(f"LeanLoop: {names or 'nothing to change'}.")

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._throttle is not None and not trainer.sanity_checking:
            self._throttle.soon()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._throttle is not None and self._throttle.check():
            _signals(
                trainer
            ).received_sigterm = True  # the loop leaves after this epoch's callbacks

    def _lean_log(self, trainer: Trainer, pl_module: LightningModule, results: list[Any]) -> None:
        if getattr(pl_module, "_compiler_ctx", None):
            self._skip("self.log", "the LightningModule itself is compiled")
            return
        for held in results:
            self._mix(held, log.LeanResults)
            for metric in held.values():
                log.mixed_in(metric, log.Placed)
            self._undo.callback(_take_out_of_values, held)
        if type(pl_module).log is LightningModule.log and "log" not in vars(pl_module):
            lean, stock = log.LeanLog(pl_module, trainer), pl_module.log
            for holder in [pl_module, *trainer.callbacks]:  # type: ignore[attr-defined]
                if holder is pl_module or vars(holder).get("log") == stock:
                    self._put(holder, "log", lean)
            self._did("self.log", "checks its arguments once")
        else:
            self._did("self.log", "moves nothing; its checks are those of an override")

    def _real_hooks(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if getattr(pl_module, "_compiler_ctx", None):
            self._skip("hooks", "the LightningModule itself is compiled")
            return
        self._undo.enter_context(hooks.only_real_hooks(call, trainer, Callback))
        self._undo.enter_context(hooks.short_hook_name(LightningModule))
        loop = trainer.fit_loop.epoch_loop
        self._put(loop, "_build_kwargs", hooks.SignatureOnce(loop))
        self._did("hooks", "only those that callbacks have")

    def _late_bar(self, trainer: Trainer, results: list[Any]) -> None:
        connector: Any = trainer._logger_connector
        for held in results:
            self._mix(held, bar.LateResults)
        self._undo.callback(bar.settled, connector)
        self._mix(connector, bar.LateConnector)
        connector._progress_bar_metrics = bar.LateNumbers(connector._progress_bar_metrics)
        self._did("progress bar", "waits for the device when it is drawn")

    def _rare_checks(self, trainer: Trainer) -> None:
        if trainer.world_size == 1 or not torch.distributed.is_initialized():
            self._skip("SIGTERM checks", "there is one process, which has none")
            return
        signals, launcher = _signals(trainer), trainer.strategy.launcher

        def leave() -> None:
            signals.received_sigterm = True
            raise SIGTERMException

        throttle = self._throttle = Throttle(
            self.sigterm_every_n_steps,
            trainer.strategy.root_device,
            leave=leave,
            kill=launcher.kill if launcher is not None else lambda _: None,
        )
        self._undo.callback(_pass_on, throttle, signals)
        self._put(trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor", throttle.batch)
        self._put(signals, "_sigterm_notifier_fn", throttle.receive)
        self._did("SIGTERM checks", f"every {self.sigterm_every_n_steps} batches at most")

    def _put(self, holder: Any, name: str, value: Any) -> None:
        """Set an attribute of an instance until the end of the run."""
        before = vars(holder).get(name, _ABSENT)
        vars(holder)[name] = value
        self._undo.callback(_put_back, holder, name, before)

    def _mix(self, instance: Any, mixin: type) -> None:
        log.mixed_in(instance, mixin)
        self._undo.callback(log.taken_out, instance, mixin)

    def _did(self, name: str, what: str) -> None:
        self.receipt = self.receipt + Receipt((Change(name, what),))

    def _skip(self, name: str, why: str) -> None:
        self.receipt = self.receipt + Receipt(skipped=(Change(name, why),))


_ABSENT = object()


def _put_back(holder: Any, name: str, before: Any) -> None:
    if before is _ABSENT:
        vars(holder).pop(name, None)
    else:
        vars(holder)[name] = before


def _take_out_of_values(results: Any) -> None:
    for metric in results.values():
        log.taken_out(metric, log.Placed)


def _pass_on(throttle: Throttle, signals: Any) -> None:
    """Tell the Trainer of a signal that came after the last check."""
    signals.received_sigterm = signals.received_sigterm or throttle.signalled


def _results(trainer: Trainer) -> list[Any]:
    loop = trainer.fit_loop.epoch_loop
    loops = (loop, loop.val_loop, trainer.validate_loop, trainer.test_loop)
    return [each._results for each in loops]


def _signals(trainer: Trainer) -> Any:
    return trainer._signal_connector
