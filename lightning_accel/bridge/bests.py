"""The best score of one network is no measure for another: at an edit, whoever keeps one starts anew.

`ModelCheckpoint`, `EarlyStopping` and `ReduceLROnPlateau` compare each score with the best so far. After
a cut that is the score of a network that no longer exists: no smaller one would ever be saved, patience
would run out, and `ckpt_path="best"` would bring the larger network back. So at a cut the best score,
the counters of patience and the list of the best k start anew. Files of the larger network stay on disk,
out of reach of the list. When a prune is taken back, so are the scores; those of the smaller network go.

The new list begins with the network right after the cut, at the worst score, wherever a larger one was
kept: a fit that is interrupted before its next save then ends with a pruned file, and resumes from it
as if it had gone on. Its name ends in `-cut`, and the first better file takes its place.

A metric that was logged before the edit stays in `trainer.callback_metrics` until it is logged again,
and may be read as the score of the new network meanwhile: what was kept with it is forgotten as soon as
the next validation begins. A fit that ends with nothing saved since its last edit is saved at its end.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_accel.bridge.restore import pristine

_WORST = {"min": math.inf, "max": -math.inf}


class _Edit(NamedTuple):
    """What there was at the last edit of a fit: metrics, and the state of those who keep scores."""

    step: int
    metrics: dict[str, Any]
    states: dict[str, dict[str, Any]]


_LAST: weakref.WeakKeyDictionary[Trainer, _Edit] = weakref.WeakKeyDictionary()


class _Files:
    """The scores of a `ModelCheckpoint`."""

    def __init__(self, checkpoint: ModelCheckpoint) -> None:
        self.holder = checkpoint
        self.monitor = checkpoint.monitor

    def start_anew(self) -> None:
        if self.monitor is None:
            return  # the latest file, whatever it holds: the next one takes its place
        held = self.holder
        held.best_k_models, held.best_model_path, held.kth_best_model_path = {}, "", ""
        held.best_model_score = held.current_score = None
        held.kth_value = torch.tensor(_WORST[held.mode])

    def state_dict(self) -> dict[str, Any]:
        held = self.holder
        return {
            "best_k_models": dict(held.best_k_models),
            "best_model_path": held.best_model_path,
            "best_model_score": held.best_model_score,
            "kth_best_model_path": held.kth_best_model_path,
            "kth_value": held.kth_value,
            "current_score": held.current_score,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        overwritten = set(self.holder.best_k_models)  # by names without a version or an epoch
        if self.monitor is None:
            return
        for name, value in state.items():
            setattr(self.holder, name, value)
        for path in overwritten & set(state["best_k_models"]):
            del self.holder.best_k_models[path]
            if path == self.holder.best_model_path:
                self.start_anew()

    def forget_since(self, state: dict[str, Any]) -> None:
        """Give what was saved since the worst score, so that the next is better."""
        held = self.holder
        for path, score in held.best_k_models.items():
            if path not in state["best_k_models"]:
                held.best_k_models[path] = torch.full_like(score, _WORST[held.mode])
        if held.best_k_models and held.best_k_models.keys() != state["best_k_models"].keys():
            best, worst = (min, max) if held.mode == "min" else (max, min)
            score_of: Any = held.best_k_models.__getitem__
            held.best_model_path = best(held.best_k_models, key=score_of)
            held.best_model_score = held.best_k_models[held.best_model_path]
            if held.kth_best_model_path:
                held.kth_best_model_path = worst(held.best_k_models, key=score_of)
                held.kth_value = held.best_k_models[held.kth_best_model_path]


class _Patience:
    """The scores of an `EarlyStopping`."""

    def __init__(self, stopping: EarlyStopping) -> None:
        self.holder = stopping
        self.monitor: str | None = stopping.monitor

    def start_anew(self) -> None:
        self.holder.best_score = torch.tensor(_WORST[self.holder.mode])
        self.holder.wait_count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.holder.best_score, "wait_count": self.holder.wait_count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.holder.best_score, self.holder.wait_count = state["best_score"], state["wait_count"]

    forget_since = load_state_dict


class _Plateau:
    """The scores of a `ReduceLROnPlateau`; the learning rate stays what it is."""

    _FIELDS = ("best", "num_bad_epochs", "cooldown_counter")

    def __init__(self, scheduler: ReduceLROnPlateau, monitor: str | None) -> None:
        self.holder, self.monitor = scheduler, monitor

    def start_anew(self) -> None:
        held = self.holder
        held.best, held.num_bad_epochs, held.cooldown_counter = _WORST[held.mode], 0, 0

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self.holder, name) for name in self._FIELDS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self.holder, name, value)

    forget_since = load_state_dict


Keeper = _Files | _Patience | _Plateau


def bests(trainer: Trainer) -> list[dict[str, Any]]:
    """Return the best checkpoints so far as plain data: what they monitor, the score and the path."""
    return [
        {"monitor": c.monitor, "score": _number(c.best_model_score), "path": c.best_model_path}
        for c in _checkpoints(trainer)
        if c.monitor is not None and c.best_model_path
    ]


def start_anew(trainer: Trainer) -> None:
    """Let all who keep a best score begin with the network that there is now."""
    found = bests(trainer)
    for keeper in keepers(trainer).values():
        keeper.start_anew()
    _note(trainer)
    for best in found:
        rank_zero_info(
            f"The best `{best['monitor']}` starts anew with the smaller network; that of the larger one, "
            f"{best['score']:.4g}, stays in {best['path']}."
        )


def keepers_of_files(trainer: Trainer) -> list[ModelCheckpoint]:
    """Return the checkpoint callbacks that have kept a file of the network so far."""
    return [c for c in _checkpoints(trainer) if c.best_model_path or c.last_model_path]


def keep_cut(trainer: Trainer, kept: list[ModelCheckpoint]) -> None:
    """Save the network right after the cut wherever one of before was kept, as the worst of its list."""
    for checkpoint in kept:
        name, step = checkpoint.filename, checkpoint._last_global_step_saved
        checkpoint.filename = f"{name or '{epoch}-{step}'}-cut"
        with _as_the_epoch_starts(trainer):
            try:
                _save(trainer, checkpoint, unscored=True)
            finally:
                checkpoint.filename = name
        path = checkpoint.last_model_path if checkpoint.save_last else checkpoint.best_model_path
        rank_zero_info(f"The network right after the cut is kept in {path}.")
        # No save of the user's is left out for this one, nor that of the end.
        checkpoint._last_global_step_saved, checkpoint._last_checkpoint_saved = step, ""


def begin_epoch(trainer: Trainer) -> None:
    """Let a fit that resumes from the start of an epoch run that epoch.

    Lightning (2.6) finds the counters of the epoch before in the file, and takes the new one for done.
    """
    loop = trainer.fit_loop
    if loop.restarted_on_epoch_start:
        loop.epoch_loop.restarting = False
        loop.epoch_progress.current.ready = trainer.current_epoch + 1


def taken_back(trainer: Trainer) -> None:
    """Note that the network and its scores are those of an earlier time."""
    _note(trainer)
    for checkpoint in _checkpoints(trainer):
        if checkpoint.monitor is not None:  # its metric is still that of the smaller network
            checkpoint._last_global_step_saved = trainer.global_step


def forget_stale(trainer: Trainer) -> None:
    """Before a validation, forget scores that were read since the edit and are older than it."""
    last = _LAST.get(trainer)
    if last is None:
        return
    for name, keeper in keepers(trainer).items():
        if keeper.monitor is not None and is_stale(trainer, keeper.monitor) and name in last.states:
            keeper.forget_since(last.states[name])


def is_stale(trainer: Trainer, metric: str) -> bool:
    """Whether a metric was last logged before the last edit, and so by another network."""
    last = _LAST.get(trainer)
    if last is None or metric not in last.metrics:
        return False
    if trainer.global_step == last.step:
        return True  # nothing was trained or validated since
    return trainer.callback_metrics.get(metric) is last.metrics[metric]


def save_at_end(trainer: Trainer, pl_module: LightningModule) -> None:
    """Save the network as it is at the end of a fit wherever nothing was saved since its last edit."""
    if trainer.fast_dev_run or not pristine(pl_module):  # type: ignore[attr-defined]
        return
    for checkpoint in _checkpoints(trainer):
        periodic = (
            checkpoint._every_n_epochs
            or checkpoint._every_n_train_steps
            or checkpoint._train_time_interval
        )
        current = checkpoint._last_checkpoint_saved or _is_back(trainer, checkpoint)
        if checkpoint.save_top_k == 0 or not periodic or current:
            continue  # `save_last` alone is Lightning's own doing
        monitor = checkpoint.monitor
        known = monitor in trainer.callback_metrics and not is_stale(trainer, str(monitor))
        _save(trainer, checkpoint, unscored=not known)


def keepers(trainer: Trainer) -> dict[str, Keeper]:
    """Return all who keep a best score, under names that a resumed fit finds again."""
    found: dict[str, Keeper] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint):
            found[f"scores of {callback.state_key}"] = _Files(callback)
        elif isinstance(callback, EarlyStopping):
            found[f"scores of {callback.state_key}"] = _Patience(callback)
    for i, config in enumerate(trainer.lr_scheduler_configs):
        if isinstance(config.scheduler, ReduceLROnPlateau):
            found[f"scores of scheduler{i}"] = _Plateau(config.scheduler, config.monitor)
    return found


def _note(trainer: Trainer) -> None:
    states = {name: keeper.state_dict() for name, keeper in keepers(trainer).items()}
    _LAST[trainer] = _Edit(trainer.global_step, dict(trainer.callback_metrics), states)
    for checkpoint in _checkpoints(trainer):
        # What Lightning links `last` to, and asks at the end of the fit whether `last` was ever written.
        checkpoint._last_checkpoint_saved = ""


def _save(trainer: Trainer, checkpoint: ModelCheckpoint, unscored: bool) -> None:
    """Save as `checkpoint` does; without a score among its k files, in the place of the worst."""
    metrics, monitor = checkpoint._monitor_candidates(trainer), checkpoint.monitor
    if monitor is None or not unscored:
        checkpoint._save_topk_checkpoint(trainer, metrics)
    elif checkpoint.save_top_k:
        nothing = torch.tensor(math.nan)  # which Lightning makes the worst score
        checkpoint._update_best_and_save(nothing, trainer, {**metrics, monitor: nothing})
    checkpoint._save_last_checkpoint(trainer, metrics)


@contextmanager
def _as_the_epoch_starts(trainer: Trainer) -> Iterator[None]:
    """Count the epoch, and the first batch that is at hand, as not begun."""
    loop = trainer.fit_loop
    epoch: Any = loop.epoch_progress
    batch = loop.epoch_loop.batch_progress
    at_hand = int(epoch.current.started == epoch.current.ready)
    counted = [(epoch.total, "started"), (epoch.current, "started")]
    counted += [(batch.total, "ready"), (batch.current, "ready")]
    for progress, name in counted:
        setattr(progress, name, getattr(progress, name) - at_hand)
    try:
        yield
    finally:
        for progress, name in counted:
            setattr(progress, name, getattr(progress, name) + at_hand)


def _is_back(trainer: Trainer, checkpoint: ModelCheckpoint) -> bool:
    """Whether the best file is that of the network which a rewind brought back."""
    has_score = math.isfinite(_number(checkpoint.best_model_score))
    return checkpoint.monitor is not None and bool(checkpoint.best_model_path) and has_score


def _checkpoints(trainer: Trainer) -> Iterator[ModelCheckpoint]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint):
            yield callback


def _number(score: Tensor | None) -> float:
    return math.nan if score is None else float(score)
