"""When to tune: at the start of training, once per module and machine, and never against the run's interest."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_accel.arguments import positive
from lightning_accel.bridge.paced import report_path
from lightning_accel.bridge.technique import Technique
from lightning_accel.changed import changed, written
from lightning_accel.errors import explain
from lightning_accel.places import free
from lightning_accel.tuning import store
from lightning_accel.tuning.apply import AppliedSettings
from lightning_accel.tuning.arguments import folder_of, path_of, sizes_of
from lightning_accel.tuning.benchmark_pool import error_text
from lightning_accel.tuning.candidates import check_techniques
from lightning_accel.tuning.in_trainer import TuneConfig, refuse, tune_within
from lightning_accel.tuning.numerics import check
from lightning_accel.tuning.report import TuneReport
from lightning_accel.tuning.settings import Settings


class AutoTune(Technique):
    """Find out in seconds what makes this module train faster on this machine, and train with that.

    Before the first step copies of the module train side by side with one technique after another: precision,
    matmul precision, memory format, implementation of the optimizer, attention kernel, compilation, and data
    loading. What is faster beyond the noise of this machine, computes the same training, and pays within this
    run, is used until the fit ends; everything else stays as it was. The answer is kept in a cache, in
    checkpoints, and in `report`. Evaluations outside of a fit compute as the Trainer does by itself.

    Args:
        numerics: "exact" allows other kernels for the same arithmetic, "amp" shorter products as in mixed
            precision, "low" float8 too.
        budget_s: About how many seconds a search may take.
        budget_share: The most of the run's own duration that a search may take; a run for which that is too
            little is not tuned, unless the answer is known.
        techniques: What to try; all by default.
        batch_sizes: Batch sizes to measure as well, for the report only.
        report: Files to write, by their endings: .yaml is a preset for `+accel=`, .json, .svg, .png, .pdf, .md, .txt;
            `True` is `tuned.yaml` where the fit's logs go.
        cache: Folder of earlier answers; `True` is the user's cache folder, `False` searches anew.

    Raises:
        ValueError: An argument cannot be meant.
        Unsupported: At the start, for sharded strategies and steps that draw their own batches.

    >>> AutoTune(numerics="exact", budget_s=30).numerics
    'exact'
    """

    def __init__(
        self,
        *,
        numerics: str = "amp",
        budget_s: float = 60.0,
        budget_share: float = 0.1,
        techniques: Collection[str] | str | None = None,
        batch_sizes: Sequence[int] = (),
        report: bool | str | Path | Sequence[str | Path] = (),
        cache: bool | str | Path = True,
    ) -> None:
        self.numerics = check(numerics)
        self.budget_s = float(positive("budget_s", budget_s, unit="seconds"))
        self.budget_share = float(positive("budget_share", budget_share))
        self.techniques = check_techniques(techniques)
        self.batch_sizes = sizes_of(batch_sizes)
        self.files = () if isinstance(report, bool) else path_of(report)
        self.beside_logs = report is True
        self.folder = folder_of(cache, store.default_folder())
        self.steps: int | None = None
        self.only_report = False
        self.report: TuneReport | None = None
        self._resumed: dict[str, Any] = {}
        self._applied: AppliedSettings | None = None

    @property
    def settings(self) -> Settings:
        """What is used; plain before the first step."""
        return self.report.settings if self.report is not None else Settings()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            refuse(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_info("AutoTune: not in a fast_dev_run.")
            return
        self.report = self._known() or self._search(trainer, pl_module)
        if not self.only_report:
            self._use(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        if self.report is None:
            return dict(self._resumed)
        plugin = self._applied.precision if self._applied is not None else None
        return {
            "report": self.report.to_dict(),
            "settings": self._settings(),
            "precision": plugin.state_dict() if plugin is not None else {},
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = dict(state_dict)

    def _known(self) -> TuneReport | None:
        """Return what the run that is resumed was trained with."""
        if "report" not in self._resumed:
            return None
        difference = changed(self._resumed.get("settings"), self._settings())
        if difference:
            rank_zero_info(f"AutoTune searches anew: {difference}.")
            return None
        try:
            report = TuneReport.from_dict(self._resumed["report"])
        except ValueError as error:
            rank_zero_warn(f"AutoTune searches anew: {error}")
            return None
        report.cached = True
        return report

    def _settings(self) -> dict[str, str]:
        """Return what decides which settings may be found; how long to search does not."""
        techniques = None if self.techniques is None else sorted(self.techniques)
        return written(
            {
                "numerics": self.numerics,
                "techniques": techniques,
                "batch_sizes": list(self.batch_sizes),
            }
        )

    def _search(self, trainer: Trainer, pl_module: LightningModule) -> TuneReport:
        """Search on the first process while the others wait for its answer."""
        answer: Any = None
        if trainer.is_global_zero:
            try:
                answer = tune_within(trainer, pl_module, self._asked(), folder=self.folder)
            except Exception as error:
                answer = error if self.only_report else self._not_tuned(error)
        answer = trainer.strategy.broadcast(answer)
        if isinstance(answer, Exception):
            raise answer
        beside = [report_path(trainer).with_name("tuned.yaml")] if self.beside_logs else []
        for path in (*self.files, *beside):
            if trainer.is_global_zero:
                rank_zero_info(f"Wrote {answer.save(free(path, TuneReport.is_free))}")
        return answer

    def _asked(self) -> TuneConfig:
        return TuneConfig(
            self.numerics,
            self.techniques,
            self.budget_s,
            self.budget_share,
            self.batch_sizes,
            self.steps,
        )

    def _not_tuned(self, error: Exception) -> TuneReport:
        """Let the fit go on as it is, and say why."""
        rank_zero_warn(
            explain(
                "AutoTune leaves this fit as it is",
                error_text(error),
                "leave AutoTune out, or mend that",
            )
        )
        return TuneReport(numerics=self.numerics, notes=[f"not tuned: {error_text(error)}"])

    def _use(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.report is not None
        known = " (known from before)" if self.report.cached else ""
        rank_zero_info(f"{self.report.to_text()}\nAutoTune{known}: {self.settings.label}.")
        self._applied = AppliedSettings(trainer, pl_module, self.settings, after=self)
        self.held(trainer).callback(self._release)
        plugin, state = self._applied.precision, self._resumed.pop("precision", None)
        if plugin is not None and state:
            plugin.load_state_dict(state)
        self._resumed = {}
        for logger in trainer.loggers:
            logger.log_metrics({"tuning/ratio": float(self.report.ratio)}, trainer.global_step)

    def _release(self) -> None:
        if self._applied is not None:
            self._applied.undo()
            self._applied = None
