"""Settings come into a running Trainer: techniques as if they had been passed to it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision.precision import Precision
from lightning.pytorch.utilities import rank_zero_warn

from lightning_accel.bridge.technique import Technique, place_of
from lightning_accel.errors import AccelError
from lightning_accel.loading.callbacks.fast_loading import AppliedPlan as Loading
from lightning_accel.precision.callbacks.use_precision import UsePrecision
from lightning_accel.tuning.data import apply_loading
from lightning_accel.tuning.settings import BASELINE, Settings


class AppliedSettings:
    """What was brought into a Trainer, until `undo`.

    Args:
        trainer: A Trainer at `on_train_start`, with optimizers and restored weights.
        pl_module: Its module.
        settings: What to bring in.
        after: The callback in the Trainer behind which the new ones stand.
    """

    def __init__(
        self, trainer: Trainer, pl_module: LightningModule, settings: Settings, after: Callback
    ) -> None:
        self._trainer = trainer
        self._loading: Loading | None = None
        self.callbacks: list[Technique] = []
        try:
            for technique in settings.techniques():
                self._add(technique, after)
                technique.join(trainer, pl_module)
            if settings["loading"] != BASELINE:  # the loaders of this fit are there already
                self._load(settings["loading"])
        except BaseException as error:
            for callback in self.callbacks:  # they leave before Lightning could tell them
                callback.on_exception(trainer, pl_module, error)
            self.undo()
            raise

    @property
    def precision(self) -> Precision | None:
        """The plugin that was brought in, if any."""
        plugins = [c.plugin for c in self.callbacks if isinstance(c, UsePrecision)]
        return plugins[0] if plugins else None

    def undo(self) -> None:
        """Take the techniques out again, with all that they changed."""
        held = self._trainer.callbacks  # type: ignore[attr-defined]
        # A new list: Lightning may be walking along the old one.
        self._trainer.callbacks = [c for c in held if c not in self.callbacks]  # type: ignore[attr-defined]
        for technique in self.callbacks:
            technique.leave(self._trainer)
        self.callbacks = []
        if self._loading is not None:
            self._loading.undo()
            self._loading = None

    def _load(self, value: Any) -> None:
        try:
            self._loading = apply_loading(self._trainer, value)
        except AccelError as error:
            rank_zero_warn(f"AutoTune loads the data as it is: {error}")

    def _add(self, technique: Technique, after: Callback) -> None:
        trainer: Any = self._trainer
        held = list(trainer.callbacks)
        start = place = held.index(after) + 1
        stage = place_of(technique)
        if stage is None:
            place += sum(c in self.callbacks for c in held[start:])
        else:
            edits = [(i, other) for i, c in enumerate(held) if (other := place_of(c)) is not None]
            place = max([place, *(i + 1 for i, other in edits if other <= stage)])
            place = min([place, *(i for i, other in edits if other > stage)])
        held.insert(place, technique)
        trainer.callbacks = held
        self.callbacks.append(technique)
