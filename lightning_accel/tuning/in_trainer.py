"""A search inside a running Trainer, which leaves no trace in it.

Everything runs on copies. What belongs to the process is put back: random states, loggers, threads, matmul
precision, and the code that dynamo captured meanwhile (`torch._dynamo.reset()` would drop every compiled
module of the process, so only code that was new is forgotten).
"""

from __future__ import annotations

import gc
import inspect
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_accel.attention import uses_attention
from lightning_accel.bridge.data import batches
from lightning_accel.bridge.example import placed
from lightning_accel.bridge.strategies import holding, is_of
from lightning_accel.bridge.technique import Situation
from lightning_accel.errors import AccelError, Unsupported
from lightning_accel.surgery.preserve import preserve_rng
from lightning_accel.tuning import store
from lightning_accel.tuning.candidates import find
from lightning_accel.tuning.data import choose_loading
from lightning_accel.tuning.forbid_collectives import forbid_collectives
from lightning_accel.tuning.replica import Replica, copied
from lightning_accel.tuning.report import TuneReport
from lightning_accel.tuning.search import Search, Unpayable
from lightning_accel.tuning.settings import BASELINE, Settings, label_of
from lightning_accel.tuning.sizes import measure_sizes

_BATCHES = 4
_UNKNOWN_STEPS = 100_000
"""What a run without an end is taken for."""


class TuneConfig(NamedTuple):
    """What a user asks of a search.

    Args:
        numerics: The tier that is allowed.
        techniques: What to try.
        budget_s: About how long to search.
        budget_share: The most of the rest of the run that a search may take.
        batch_sizes: Batch sizes to measure under the chosen settings.
        steps: The length of the run, in batches; `None` is what the Trainer has left.
    """

    numerics: str
    techniques: tuple[str, ...]
    budget_s: float
    budget_share: float
    batch_sizes: tuple[int, ...] = ()
    steps: int | None = None


def tune_within(
    trainer: Trainer, pl_module: LightningModule, asked: TuneConfig, *, folder: Path | None = None
) -> TuneReport:
    """Search for the fastest settings of this fit, at its beginning, or find an earlier answer.

    Args:
        trainer: A Trainer at `on_train_start`.
        pl_module: The module that it trains.
        asked: What to search for.
        folder: Where earlier answers are; `None` searches in any case.

    Raises:
        Unsupported: The strategy shards or traces the module, or the step takes an iterator.
        AccelError: The step fails on a copy, or gives no loss.
    """
    refuse(trainer, pl_module)
    if asked.steps is None:
        asked = asked._replace(steps=steps_left(trainer))
    start = time.perf_counter()
    with preserve_trainer(trainer):
        data = draw(trainer, pl_module)
        key = _key(trainer, pl_module, data, asked)
        known = store.load(folder, key) if folder is not None else None
        if known is not None:
            return known
        try:
            with forbid_collectives(trainer.world_size):
                report = _search(trainer, pl_module, data, asked)
        except Unpayable as error:  # said, and not kept: a longer run may find an answer
            return TuneReport(numerics=asked.numerics, notes=[str(error)])
        report.seconds = time.perf_counter() - start
    if folder is not None:
        kept = store.save(folder, key, report)
        if kept is not None:
            rank_zero_info(kept)
    return report


def _search(
    trainer: Trainer, pl_module: LightningModule, data: list[Any], asked: TuneConfig
) -> TuneReport:
    assert asked.steps is not None
    build = builder(trainer, pl_module, data)
    attention = "attention" in asked.techniques and uses_attention(
        lambda: build(Settings()).gradients(0)
    )
    situation = Situation(trainer, pl_module, asked.numerics, attention)
    contests, skipped = find(situation, asked.techniques)
    found = Search(
        build,
        device=trainer.strategy.root_device,
        numerics=asked.numerics,
        steps=asked.steps,
        budget_s=asked.budget_s,
        budget_share=asked.budget_share,
        longest_s=_time_left(trainer),
    ).run(contests, skipped)
    settings, trials, notes = found.settings, found.trials, found.notes
    share_s = asked.budget_s / 10
    if "loading" in asked.techniques:
        value, gain, tried = choose_loading(trainer, found.bars[-1].step_ms, share_s)
        settings, trials = settings.having("loading", value), [*trials, *tried]
        if value != BASELINE:
            notes = [*notes, f"{label_of('loading', value)}: {gain:.2f}x, batch and step together"]
    return TuneReport(
        settings,
        found.bars,
        trials,
        measure_sizes(build, data, asked.batch_sizes, settings, share_s),
        (*found.resolution,),
        asked.steps,
        asked.numerics,
        about=store.about(pl_module.device),
        notes=notes,
    )


def _key(trainer: Trainer, pl_module: LightningModule, data: list[Any], asked: TuneConfig) -> str:
    assert asked.steps is not None
    kept = asked._asdict() | {"steps": None, "budget_share": None}  # neither changes the answer
    return store.fingerprint(trainer, pl_module, data, steps=asked.steps, asked=kept)


def refuse(trainer: Trainer, pl_module: LightningModule) -> None:
    """Raise for strategies whose modules cannot be copied, and steps that cannot be repeated."""
    strategy = trainer.strategy
    if holding(strategy) in ("sharded", "traced") or is_of(strategy, "XLA"):
        raise Unsupported(
            "AutoTune measures whole copies of the module on one device",
            type(strategy).__name__,
            "tune on one device with `lightning-accel tune`, and use the preset that it writes",
        )
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise Unsupported(
            "a step that draws its own batches cannot be repeated on the same ones",
            "`training_step(dataloader_iter)`",
            "take `batch` instead, or leave AutoTune out",
        )


def draw(trainer: Trainer, pl_module: LightningModule) -> list[Any]:
    """Return batches as the step gets them; what the data draws its random numbers from stays where it is."""
    combined = trainer.fit_loop._combined_loader
    loaders = combined.flattened if combined is not None else []
    drawn = batches(trainer, _BATCHES)
    if combined is not None and combined._mode == "sequential" and len(loaders) > 1:
        drawn = [batch[0] for batch in drawn]  # one loader after the other, so the first
    copy = copied(trainer, pl_module)
    return [placed(trainer, copy, batch) for batch in drawn]


def builder(
    trainer: Trainer, pl_module: LightningModule, data: list[Any]
) -> Callable[..., Replica]:
    """Try a step, and return what makes copies of the module under settings, on these or other batches."""
    modes = _modes(trainer, pl_module, data)

    def build(settings: Settings, other: list[Any] | None = None) -> Replica:
        return Replica(trainer, pl_module, data if other is None else other, settings, **modes)

    return build


def _modes(trainer: Trainer, pl_module: LightningModule, data: list[Any]) -> dict[str, bool]:
    """Try a step, and return what copies need so that it runs: hooks of the module, fresh batches."""
    if not [p for o in trainer.optimizers for group in o.param_groups for p in group["params"]]:
        raise Unsupported("without an optimizer there is no training step to measure", "none")
    versions = [t._version for t in tree_leaves(data) if isinstance(t, Tensor)]
    for hooks in (False, True):
        try:
            Replica(trainer, pl_module, data, Settings(), hooks=hooks, clones=hooks).gradients(0)
            break
        except torch.OutOfMemoryError:
            break  # which has an answer of its own
        except Exception as error:
            if isinstance(error, AccelError) or hooks:
                raise
    changed = versions != [t._version for t in tree_leaves(data) if isinstance(t, Tensor)]
    return {"hooks": hooks, "clones": hooks or changed}


def _time_left(trainer: Trainer) -> float:
    """Return the seconds that `max_time` leaves to this fit."""
    timers = [c for c in trainer.callbacks if isinstance(c, Timer)]  # type: ignore[attr-defined]
    left = [timer.time_remaining() for timer in timers]
    return min((seconds for seconds in left if seconds is not None), default=math.inf)


def steps_left(trainer: Trainer) -> int:
    """Return how many batches the fit still has, or a large number where nobody knows."""
    per_epoch = trainer.num_training_batches
    epochs = trainer.max_epochs if trainer.max_epochs is not None else -1
    left = math.inf
    if epochs != -1 and per_epoch != math.inf:
        left = per_epoch * max(0, epochs - trainer.current_epoch)
    if trainer.max_steps != -1:
        left = min(
            left, trainer.accumulate_grad_batches * (trainer.max_steps - trainer.global_step)
        )
    return _UNKNOWN_STEPS if left == math.inf else int(left)


@contextmanager
def preserve_trainer(trainer: Trainer) -> Iterator[None]:
    """Put back what a search changes in the process: random states, loggers, threads, captured code."""
    loggers = trainer.loggers
    threads, matmul = torch.get_num_threads(), torch.get_float32_matmul_precision()
    seen = set(_captured())
    trainer.loggers = [DummyLogger() for _ in loggers]
    stops = trainer.should_stop
    frozen = not gc.get_freeze_count()
    if frozen:
        gc.collect()
        gc.freeze()  # what was there before is not garbage, and looking through it takes a third of a second
    with preserve_rng(), ExitStack() as quiet:
        quiet.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of copies, about which nobody can do anything
        quiet.enter_context(redirect_stdout(quiet.enter_context(open(os.devnull, "w"))))
        try:
            yield
        finally:
            gc.collect()
            if frozen:
                gc.unfreeze()
            trainer.loggers, trainer.should_stop = loggers, stops
            torch.set_num_threads(threads)
            if torch.get_float32_matmul_precision() != matmul:
                torch.set_float32_matmul_precision(matmul)
            for code in _captured():
                if code not in seen:
                    torch._dynamo.eval_frame.reset_code(code)
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()


def _captured() -> list[Any]:
    """Return the code objects of which dynamo holds graphs; private in PyTorch 2.10 to 2.13."""
    if "torch._dynamo.convert_frame" not in sys.modules:
        return []
    seen = sys.modules["torch._dynamo.convert_frame"].input_codes.seen
    return [code for reference in seen if (code := reference()) is not None]
