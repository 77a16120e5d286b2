"""Settings come into a running Trainer: its precision, and callbacks as if they had been passed to it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision.precision import Precision
from lightning.pytorch.utilities import rank_zero_warn

from lightning_accel.bridge.model_edit import ModelEdit
from lightning_accel.errors import AccelError
from lightning_accel.loading.callback import Applied as Loading
from lightning_accel.tuning.data import apply_loading
from lightning_accel.tuning.settings import Settings, make


class Applied:
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
        self._precision: Precision | None = None
        self._loading: Loading | None = None
        self.callbacks: list[Callback] = []
        try:
            for node in settings.plugins().values():
                self._compute_in(make(node), pl_module)
            for name, node in settings.callbacks().items():
                if name == "loading":  # the loaders of this fit are there already
                    self._load(settings.loading)
                else:
                    self._add(make(node), pl_module, after)
        except BaseException as error:
            for callback in self.callbacks:  # they leave before Lightning could tell them
                callback.on_exception(trainer, pl_module, error)
                callback.teardown(trainer, pl_module, "fit")
            self.undo()
            raise

    @property
    def precision(self) -> Precision | None:
        """The plugin that was brought in, if any."""
        return self._trainer.precision_plugin if self._precision is not None else None

    def undo(self) -> None:
        """Give the Trainer its own callbacks and precision back; the callbacks' own teardown is Lightning's."""
        held = self._trainer.callbacks  # type: ignore[attr-defined]
        # A new list: Lightning may be walking along the old one.
        self._trainer.callbacks = [c for c in held if c not in self.callbacks]  # type: ignore[attr-defined]
        self.callbacks = []
        if self._loading is not None:
            self._loading.undo()
            self._loading = None
        if self._precision is not None:
            self._trainer.precision_plugin.teardown()
            self._trainer.strategy.precision_plugin = self._precision
            self._precision = None

    def _load(self, value: Any) -> None:
        try:
            self._loading = apply_loading(self._trainer, value)
        except AccelError as error:
            rank_zero_warn(f"AutoTune loads the data as it is: {error}")

    def _compute_in(self, plugin: Precision, pl_module: LightningModule) -> None:
        strategy = self._trainer.strategy
        self._precision = strategy.precision_plugin
        strategy.precision_plugin = plugin
        plugin.convert_module(pl_module)
        strategy.setup_precision_plugin()

    def _add(self, callback: Callback, pl_module: LightningModule, after: Callback) -> None:
        trainer: Any = self._trainer
        held = list(trainer.callbacks)
        place = held.index(after) + 1
        if isinstance(callback, ModelEdit):
            edits = [i for i, c in enumerate(held) if isinstance(c, ModelEdit)]
            earlier = [i for i in edits if held[i].stage <= callback.stage]
            place = max([place, *(i + 1 for i in earlier)])
            later = [i for i in edits if held[i].stage > callback.stage]
            place = min([place, *later])
        else:
            place += sum(c in self.callbacks for c in held[place:])
        held.insert(place, callback)
        trainer.callbacks = held
        self.callbacks.append(callback)
        callback.setup(trainer, pl_module, "fit")
        callback.on_fit_start(trainer, pl_module)
        callback.on_train_start(trainer, pl_module)
