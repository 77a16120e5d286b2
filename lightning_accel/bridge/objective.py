"""The number that a sweep optimises: a name that nobody logs is refused early, not after the whole fit.

What a module logs can be known only once it has logged: from the sanity check, which says something about
validation, and for certain from the first epoch with a validation in it, or from the end of the fit. What a
callback of this package brings at the end of a fit (`report/ratio_macs`) it says beforehand, in `brings`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_accel.errors import AccelError, explain

_OF_A_REPORT = re.compile(r"report/(dense|final|ratio|before_edit)_")


class Objective(Callback):
    """What a sweep optimises, by its logged name; a name that nothing logs ends the fit after one epoch.

    Names are those of `trainer.callback_metrics`: all that the module logs, and the numbers of `AccelReport`.
    After the fit, `value` is what the main function of a Hydra sweep returns, or an objective of Optuna.

    Args:
        metric: A name, several for a search with several directions, or `None` for no objective.

    Raises:
        TypeError: `metric` is no name.
        AccelError: In the fit, before its first epoch, after it, or at the end: no such metric will be there.

    >>> Objective("val/acc").names
    ('val/acc',)
    """

    def __init__(self, metric: str | Sequence[str] | None) -> None:
        self.metric = metric
        self.names = _names(metric)
        self._has_trained = self._has_validated = self._is_certain = False

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._has_trained = self._has_validated = self._is_certain = False
        brought = names_brought(trainer)
        for name in self.names:
            if _group(name) in {_group(pattern) for pattern in brought}:
                if not is_brought(trainer, name):
                    raise _refusal(name, brought)
            elif _OF_A_REPORT.match(name):
                raise AccelError(
                    f"the objective `{name}` is a number of AccelReport",
                    "no AccelReport among the callbacks",
                    "add one; every preset but `auto` has it, `+accel=none` too",
                )

    @override
    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        there = set(trainer.callback_metrics)
        for name in self._missing(trainer):
            if _group(name) and _group(name) in {_group(other) for other in there}:
                rank_zero_info(  # no warning: a module may well keep its best score out of a sanity check
                    f"The sanity check logged {_listed(there)} and no `{name}`, which is the objective: "
                    "the fit ends if the first epoch does not log it either."
                )

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._has_validated = self._has_validated or not trainer.sanity_checking

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._has_trained = True

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not at the end of the epoch before, when the module may still log and checkpoints are still saved.
        all_logged = self._has_trained and (self._has_validated or not _validates(trainer))
        if self._is_certain or not all_logged:
            return
        self._refuse_missing(trainer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._has_trained and not self._is_certain:  # one epoch, or no validation within the fit
            self._refuse_missing(trainer)

    def value(self, trainer: Trainer) -> float | list[float] | None:
        """Return what was asked for: after a fit, and before anything else is run with this Trainer.

        A gain that the report withholds, or could not measure, is NaN with a warning: nothing is claimed,
        and a sweep goes on.

        Raises:
            AccelError: Nothing logged such a metric.
        """
        found = [_value(trainer, name) for name in self.names]
        if self.metric is None:
            return None
        return found[0] if isinstance(self.metric, str) else found

    def _refuse_missing(self, trainer: Trainer) -> None:
        self._is_certain = True
        for name in self._missing(trainer):
            raise _refusal(name, trainer.callback_metrics)

    def _missing(self, trainer: Trainer) -> list[str]:
        there = trainer.callback_metrics
        return [n for n in self.names if n not in there and not is_brought(trainer, n)]


def names_brought(trainer: Trainer) -> list[str]:
    """Return the patterns of all numbers with which callbacks of ours will end this fit."""
    return [name for c in trainer.callbacks for name in getattr(c, "brings", ())]  # type: ignore[attr-defined]


def is_brought(trainer: Trainer, name: str) -> bool:
    """Whether a metric is one that a callback of ours brings, and no module logs."""
    return any(fnmatchcase(name, pattern) for pattern in names_brought(trainer))


def bring(trainer: Trainer, numbers: Mapping[str, float]) -> None:
    """End a fit with these numbers too: nothing of Lightning reads them any more, and its next run drops them."""
    found = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    trainer.callback_metrics.update(found)


def logged(trainer: Trainer) -> dict[str, float]:
    """Return what the user's own code logged, without numbers that callbacks of ours bring."""
    metrics = {str(name): float(value) for name, value in trainer.callback_metrics.items()}
    return {name: value for name, value in metrics.items() if not is_brought(trainer, name)}


def _value(trainer: Trainer, name: str) -> float:
    there = trainer.callback_metrics
    if name in there:
        return float(there[name])
    if not is_brought(trainer, name):
        raise _refusal(name, there)
    rank_zero_warn(
        explain(
            f"the objective `{name}` is NaN: it was not measured, or its gain is withheld",
            _listed({other for other in there if _group(other) == _group(name)}),
            "see the notes of the report, and measure on a quiet machine",
        )
    )
    return math.nan


def _names(metric: Any) -> tuple[str, ...]:
    if metric is None:
        return ()
    names = tuple(metric) if isinstance(metric, (list, tuple)) else (metric,)
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise TypeError(
            explain("`metric` is a name of a logged metric", repr(metric), "pass 'val/acc', say")
        )
    return names


def _validates(trainer: Trainer) -> bool:
    sizes = trainer.num_val_batches  # empty until the first validation
    return trainer.enable_validation and (not sizes or sum(sizes) > 0)


def _group(name: str) -> str:
    return name.partition("/")[0] if "/" in name else ""


def _refusal(name: str, known: Collection[str]) -> AccelError:
    what = f"the objective `{name}` is logged by nothing in this fit"
    return AccelError(what, _listed(known), _nearest(name, known))


def _listed(known: Collection[str]) -> str:
    return ", ".join(sorted(known)) or "no logged metric"


def _nearest(name: str, known: Collection[str]) -> str:
    near = get_close_matches(name, list(known), 1, 0.5)
    return f"say `objective={near[0]}`" if near else "log it, or choose one of these"
