"""When to report: `AccelReport`, at the end of a training."""

from __future__ import annotations

import platform
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import lightning
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_accel import hardware
from lightning_accel.arguments import flag, instance, numbers_by_name
from lightning_accel.bridge.bests import is_stale
from lightning_accel.bridge.data import is_stream
from lightning_accel.bridge.example import AtHand, find_example
from lightning_accel.bridge.hand import reads_once
from lightning_accel.bridge.inert import inert_copy
from lightning_accel.bridge.objective import bring, logged
from lightning_accel.bridge.paced import Paced, place_of_report, report_path
from lightning_accel.bridge.restore import pristine, register
from lightning_accel.bridge.strategies import gathers, holding, plain, whole
from lightning_accel.errors import Unsupported, explain
from lightning_accel.measure.callbacks.dense_side import dense_side
from lightning_accel.measure.callbacks.fit_log import FitLog
from lightning_accel.measure.callbacks.loggers import hand_over, log
from lightning_accel.measure.callbacks.seen_weights import SeenWeights, shapes_of
from lightning_accel.measure.flops import preserve_buffers
from lightning_accel.measure.report import Report
from lightning_accel.measure.subject import (
    Runnable,
    localise_norms,
    measure_subjects,
    restore,
)
from lightning_accel.quantization.layers import layers_of
from lightning_accel.surgery import Receipt
from lightning_accel.surgery.call import Call
from lightning_accel.surgery.compiled import is_compiled
from lightning_accel.surgery.preserve import preserve_rng


class AccelReport(Paced):
    """At the end of a fit, measure the dense model against the final one and say what was gained.

    Parameters, multiply-accumulates of one sample, latency at batch 1 and at the training batch, and
    training steps per second (a forward and a backward, no optimizer, no data), on the same inputs,
    in the same process, in interleaved blocks. The dense side is the model as you wrote it, uncompiled,
    under your own precision; when the precision is this package's, in float32. Printed, logged to every
    logger, saved, and put into `trainer.callback_metrics` under the same names, for sweeps to optimise.

    Metrics stand beside figures of the network that they were measured on, or are left out with a note:
    those last logged before the last edit, and those of a test that loaded another structure. Metrics of
    the dense side are those logged last before the first edit, each with its epoch, "after epoch 8", say. That
    is a shorter training, so no gain is given for them; it is with `dense_metrics`.

    While the fit goes on, a small file beside the report to be says how far it is, for `lightning-accel board`.

    Weights, buffers, gradients, flags and random state are bit-equal before and after. An error while
    measuring becomes a warning: a finished training is never lost.

    Args:
        path: Where the JSON goes, markdown and an HTML page beside it; by default `report.json` in the folder of the first
            logger, without one in the Trainer's `default_root_dir`, without that in the Hydra job's or in `lightning_logs`; a
            later fit of the same process takes `fit_2` there, and one of another process replaces its report. A file that is no
            report is left alone, and a number added to the name.
        dense_metrics: Metrics of a dense training as long as this one, to compare with.
        budget_s: Seconds of measuring; warm-up and compilation come on top.
        example: Arguments of the LightningModule's `forward`; by default what its networks receive.
        artifact: Keep report, best checkpoint (or the last) and what `Deploy` wrote as an artifact of the W&B run.

    Raises:
        ValueError: `budget_s` is not above 0.
        TypeError: `path` is no path, or `dense_metrics` are no numbers by name.

    >>> AccelReport("outputs/report.json", budget_s=5).path
    PosixPath('outputs/report.json')
    """

    brings: ClassVar[tuple[str, ...]] = Report.NUMBERS

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        dense_metrics: Mapping[str, float] | None = None,
        budget_s: float = 10.0,
        example: Any = None,
        artifact: bool = False,
    ) -> None:
        super().__init__()
        if not budget_s > 0:
            raise ValueError(
                explain("`budget_s` is a time", repr(budget_s), "pass seconds above 0")
            )
        where = "where the JSON goes"
        instance("path", path, (str, PathLike), where, "pass 'report.json', say", none=True)
        self.path = None if path is None else Path(path)
        self.dense_metrics = (
            None if dense_metrics is None else numbers_by_name("dense_metrics", dense_metrics)
        )
        self.budget_s = budget_s
        self.example = example
        self.artifact: bool = flag("artifact", artifact)
        self.report: Report | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._saved_at: Path | None = None
        self._edits: list[dict[str, Any]] = []
        self._before: dict[str, Any] = {}
        self._latest: dict[str, float] = {}
        self._validated: dict[str, int] = {}
        self._held: dict[str, Any] = {}
        self._module: weakref.ref[LightningModule] | None = None
        self._keeps = False
        self._at_hand: AtHand | None = None
        self._log, self._seen = FitLog(), SeenWeights()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_module": None}  # for launchers that pickle the Trainer

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "edits": [dict(edit) for edit in self._edits],
            "before": dict(self._before),
            "latest": dict(self._latest),
            "validated": dict(self._validated),
            "log": self._log.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._edits, self._before = list(state_dict["edits"]), dict(state_dict["before"])
        self._latest, self._validated = dict(state_dict["latest"]), dict(state_dict["validated"])
        self._log.load_state_dict(state_dict.get("log", {}))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        register(pl_module)
        if stage != "fit":
            return
        if not self._is_of(pl_module):
            self._module = weakref.ref(pl_module)
            self._edits, self._before, self._latest, self.report = [], {}, {}, None
            self._validated, self._saved_at, self._log = {}, None, FitLog()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._held = dict(trainer.callback_metrics)

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn == "fit" and batch_idx == dataloader_idx == 0:
            self._seen.see(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._at_hand = None
        self._keeps = self.example is None and (is_stream(trainer) or reads_once(trainer))
        self._log.start(trainer, lambda: self._saved_at or self.path or report_path(trainer))

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._log.begin_epoch(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._log.is_due():
            self._log.tell(trainer, steps_per_s=self.pace.steps_per_s)

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        self._log.save(trainer, checkpoint, self.state_key)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if trainer.state.fn == "fit":
            self._log.tell_of(trainer, exception)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx:
            return
        self._log.look(trainer)
        if not self._keeps:
            return
        self._keeps, self._at_hand = False, None  # a copy, because a step may write into its batch
        with self._told_not_raised("no batch of the stream could be kept for the report"):
            self._at_hand = AtHand(move_data_to_device(deepcopy(batch), torch.device("cpu")))
            self._keeps = True

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        held, self._held = self._held, {}
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._latest = logged(trainer)  # kept for an edit right after a resume
        anew = [n for n, value in trainer.callback_metrics.items() if held.get(n) is not value]
        self._validated |= dict.fromkeys(anew, int(trainer.current_epoch) + 1)

    def on_model_edit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        params = sum(p.numel() for p in pl_module.parameters())
        if self._before.get("params", params) == params:  # nothing was taken out so far
            self._before = {
                "params": params,
                "epoch": int(trainer.current_epoch),
                "metrics": {**self._latest, **logged(trainer)},
                "validated": dict(self._validated),
                "steps_per_s": self.pace.steps_per_s,
            }

    @override
    def on_model_edit_end(
        self, trainer: Trainer, pl_module: LightningModule, receipt: Receipt
    ) -> None:
        super().on_model_edit_end(trainer, pl_module, receipt)
        self._edits.append(
            {
                "epoch": int(trainer.current_epoch),
                "step": int(trainer.global_step),
                "num_changes": len(receipt.changes),
                "notes": list(receipt.notes),
                "params": sum(p.numel() for p in pl_module.parameters()),
            }
        )

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report = report = Report()
        self._shapes = shapes_of(pl_module)
        self._log.end(trainer)
        self._describe(report, trainer)
        failed = "measuring the dense model against the final one failed"
        # The innermost catches: `isolate_rng` does not restore when an error passes through it.
        with preserve_buffers(pl_module), preserve_rng(), self._told_not_raised(failed):
            self._measure(report, trainer, pl_module)
        # Only the first process has measured; a sweep asks all of them.
        bring(trainer, trainer.strategy.broadcast(report.flat()))
        self._publish(trainer)
        with self._told_not_raised("the report could not be shown"):
            rank_zero_info("\n" + report.table().to_text())

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.report is None or not self._is_of(pl_module):
            return
        tested = logged(trainer)
        names = ", ".join(tested)
        if shapes_of(pl_module) == self._shapes:
            self.report.final.metrics.update(tested)
            if trainer.ckpt_path:
                self.report.note(f"of the weights in {trainer.ckpt_path}: {names}")
        else:
            params = sum(p.numel() for p in pl_module.parameters())
            self.report.note(
                f"left out: {names} of a checkpoint with {params:,} parameters, which is another network"
            )
        self._publish(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hand files over: all callbacks have written theirs, and no logger is closed yet."""
        super().teardown(trainer, pl_module, stage)
        if stage == "fit" and self.report and (said := self._seen.change(trainer, pl_module)):
            self.report.note(said)
            rank_zero_info(f"- {said}")
            self._publish(trainer)
        if stage == "fit" and self.artifact and self.report is not None and self._saved_at:
            with self._told_not_raised("the artifact could not be logged"):
                hand_over(trainer, self.report, self._saved_at)

    def _describe(self, report: Report, trainer: Trainer) -> None:
        self._describe_metrics(report, trainer)
        after = self.pace.steps_per_s
        report.extra["edits"] = [dict(edit) for edit in self._edits]
        report.extra["observed_steps_per_s"] = {
            "before": self._before.get("steps_per_s") if self._edits else after,
            "after": after,
        }
        self._log.fill(report, trainer)
        report.extra["world_size"] = trainer.world_size
        report.extra["precision"] = str(trainer.precision_plugin.precision)
        report.extra["versions"] = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
        }

    def _describe_metrics(self, report: Report, trainer: Trainer) -> None:
        found = logged(trainer)
        stale = [name for name in found if is_stale(trainer, name)]
        report.final.metrics = {k: v for k, v in found.items() if k not in stale}
        report.extra["final_validated_after_epoch"] = {
            name: epoch
            for name, epoch in self._validated.items()
            if name in report.final.metrics and epoch < trainer.current_epoch
        }
        if stale:
            report.note(
                f"left out: {', '.join(stale)}, last logged before the last edit, by another network"
            )
        if self.dense_metrics is not None:
            report.dense.metrics = dict(self.dense_metrics)
        elif self._edits and self._before.get("metrics"):
            report.dense.metrics = dict(self._before["metrics"])
            done = self._before.get("epoch", self._edits[0]["epoch"])
            report.extra["dense_metrics_after_epoch"] = done
            report.extra["dense_validated_after_epoch"] = self._before.get("validated", {})
            report.note(
                f"metrics of the dense network are the last before it was edited, after epoch {done}; no gain "
                "is given between trainings of unequal length: pass `dense_metrics=` of one as long as this"
            )

    def _measure(self, report: Report, trainer: Trainer, pl_module: LightningModule) -> None:
        _refuse_sharded(trainer)
        quantized = [m for m in layers_of(pl_module).values() if m.accel_mode != "plain"]
        if quantized:
            report.note(
                f"{len(quantized)} layers compute as integers would, slowly: their times are those of floating point. "
                "`deploy` makes integers of them and measures these"
            )
        with whole(trainer), plain(trainer):
            self._measure_whole(report, trainer, pl_module)

    def _measure_whole(self, report: Report, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log.fill_sizes(report, pl_module)
        # On all ranks, because a training step may communicate; what follows does not.
        kept, self._at_hand = self._at_hand, None
        device = trainer.strategy.root_device
        at_hand = kept and AtHand(move_data_to_device(kept.batch, device))
        calls = find_example(trainer, pl_module, self.example, at_hand)
        if not trainer.is_global_zero:
            return
        report.extra["hardware"] = hardware.describe(device).to_dict()
        report.extra["num_threads"] = torch.get_num_threads()
        fast = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        with (
            inert_copy(trainer, pl_module) as dense,
            inert_copy(trainer, pl_module) as final,
        ):
            restore(dense, pristine(pl_module))
            measure_subjects(
                dense_side(trainer, dense, calls),
                self._final(report, trainer, pl_module, final, calls),
                device=device,
                budget_s=min(self.budget_s, 0.5) if fast else self.budget_s,
                report=report,
            )

    def _final(
        self,
        report: Report,
        trainer: Trainer,
        pl_module: LightningModule,
        copy: LightningModule,
        calls: tuple[Call, ...],
    ) -> Runnable:
        """A copy of the final model, or the model itself where a copy would lose its compiled code."""
        plugin = trainer.precision_plugin
        model = pl_module if is_compiled(pl_module) else copy
        if localise_norms(copy) and model is pl_module:
            report.note("the final model was measured uncompiled: SyncBatchNorm needs all ranks")
            model = copy
        return Runnable(model, copy, calls, plugin.forward_context, plugin.train_step_context)

    def _is_of(self, pl_module: LightningModule) -> bool:
        return self._module is not None and self._module() is pl_module

    def _publish(self, trainer: Trainer) -> None:
        """Save and log the report, on rank 0; in `fast_dev_run` nothing is written, as by Lightning."""
        if self.report is None or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        with self._told_not_raised("the report could not be saved"):
            self._save(trainer, self.report)
            self._log.leave()
        with self._told_not_raised("the page of the report could not be written"):
            if self._saved_at is not None:
                self._log.write_page(self._saved_at)
        with self._told_not_raised("the report could not be logged"):
            log(trainer, self.report)

    def _save(self, trainer: Trainer, report: Report) -> None:
        known = self._saved_at is not None
        if self._saved_at is None:
            self._saved_at = place_of_report(trainer, self.path, Report.is_free)
        written = report.save(self._saved_at)
        if not known:
            rank_zero_info("Wrote " + " and ".join(map(str, written)))

    @contextmanager
    def _told_not_raised(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
            if self.report is not None:
                self.report.note(f"{what}: {found.splitlines()[0]}")
            rank_zero_warn(
                explain(
                    what,
                    found,
                    "nothing for this training, which is complete; pass `example=` to AccelReport or "
                    "report this if the model runs",
                )
            )


def _refuse_sharded(trainer: Trainer) -> None:
    if not gathers(trainer.strategy) and holding(trainer.strategy) == "sharded":
        raise Unsupported(
            "a report needs whole parameters on one process",
            type(trainer.strategy).__name__,
            "measure an unsharded copy with `lightning_accel.measure.measure_pair`",
        )
