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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_accel.attention import uses_attention
from lightning_accel.bridge.example import batches, inert_copy, placed
from lightning_accel.errors import AccelError, Unsupported
from lightning_accel.loading.still import untouched as steady
from lightning_accel.surgery.snapshot import random_state, set_random_state
from lightning_accel.tuning import store
from lightning_accel.tuning.candidates import find
from lightning_accel.tuning.data import choose_loading
from lightning_accel.tuning.replica import Replica
from lightning_accel.tuning.report import TuneReport
from lightning_accel.tuning.search import Search, Unpayable
from lightning_accel.tuning.settings import PLAIN, Settings
from lightning_accel.tuning.sizes import measure_sizes

_BATCHES = 4
_UNKNOWN_STEPS = 100_000
"""What a run without an end is taken for."""


def tune_within(
    trainer: Trainer,
    pl_module: LightningModule,
    *,
    numerics: str,
    budget_s: float,
    budget_share: float,
    techniques: tuple[str, ...],
    steps: int | None = None,
    batch_sizes: Sequence[int] = (),
    folder: Path | None = None,
) -> TuneReport:
    """Search for the fastest settings of this fit, at its beginning, or find an earlier answer.

    Args:
        trainer: A Trainer at `on_train_start`.
        pl_module: The module that it trains.
        numerics: The tier that is allowed.
        budget_s: About how long to search.
        budget_share: The most of the rest of the run that a search may take.
        techniques: What to try.
        steps: The length of the run, in batches; by default what the Trainer has left.
        batch_sizes: Batch sizes to measure under the chosen settings.
        folder: Where earlier answers are; `None` searches in any case.

    Raises:
        Unsupported: The strategy shards or traces the module, or the step takes an iterator.
        AccelError: The step fails on a copy, or gives no loss.
    """
    refuse(trainer, pl_module)
    steps = steps_left(trainer) if steps is None else steps
    start = time.perf_counter()
    with untouched(trainer):
        data = _draw(trainer, pl_module)
        asked = {
            "numerics": numerics,
            "techniques": techniques,
            "batch_sizes": list(batch_sizes),
            "budget_s": budget_s,
        }
        key = store.fingerprint(trainer, pl_module, data, steps=steps, asked=asked)
        known = store.load(folder, key) if folder is not None else None
        if known is not None:
            return known

        modes = _modes(trainer, pl_module, data)

        def build(settings: Settings, other: list[Any] | None = None) -> Replica:
            given = data if other is None else other
            return Replica(trainer, pl_module, given, settings, **modes)

        attention = "attention" in techniques and uses_attention(
            lambda: build(Settings()).gradients(0)
        )
        contests, skipped = find(
            trainer, pl_module, numerics=numerics, techniques=techniques, attention=attention
        )
        search = Search(
            build,
            device=trainer.strategy.root_device,
            numerics=numerics,
            steps=steps,
            budget_s=budget_s,
            budget_share=budget_share,
            longest_s=_time_left(trainer),
        )
        report = TuneReport(steps=steps, numerics=numerics, about=store.about(pl_module.device))
        try:
            found = search.run(contests, skipped)
        except Unpayable as error:
            report.notes = [str(error)]
            return report
        report.settings, report.bars, report.trials = found.settings, found.bars, found.trials
        report.resolution, report.notes = (*found.resolution,), found.notes
        if "loading" in techniques:
            value, gain, tried = choose_loading(trainer, found.bars[-1].step_ms, budget_s / 10)
            report.settings = report.settings.having("loading", value)
            report.trials = [*report.trials, *tried]
            if value != PLAIN:
                report.notes = [
                    *report.notes,
                    f"data {value}: {gain:.2f}x, batch and step together",
                ]
        report.rates = measure_sizes(build, data, batch_sizes, report.settings, budget_s / 10)
        report.seconds = time.perf_counter() - start
    if folder is not None:
        kept = store.save(folder, key, report)
        if kept is not None:
            rank_zero_info(kept)
    return report


def refuse(trainer: Trainer, pl_module: LightningModule) -> None:
    """Raise for strategies whose modules cannot be copied, and steps that cannot be repeated."""
    strategy = trainer.strategy
    lineage = [base.__name__ for base in type(strategy).__mro__]
    plain = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy))
    if not plain or any("XLA" in n or "DeepSpeed" in n or "FSDP" in n for n in lineage):
        raise Unsupported(
            "AutoTune measures whole copies of the module on one device",
            lineage[0],
            "tune on one device with `lightning-accel tune`, and use the preset that it writes",
        )
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise Unsupported(
            "a step that draws its own batches cannot be repeated on the same ones",
            "`training_step(dataloader_iter)`",
            "take `batch` instead, or leave AutoTune out",
        )


def _draw(trainer: Trainer, pl_module: LightningModule) -> list[Any]:
    """Return batches as the step gets them; what the data draws its random numbers from stays where it is."""
    combined = trainer.fit_loop._combined_loader
    loaders = combined.flattened if combined is not None else []
    datasets = [getattr(loader, "dataset", loader) for loader in loaders]
    for dataset in datasets:
        if isinstance(dataset, Iterator):
            raise Unsupported(
                "a stream of data that can be read only once would miss the batches that are measured on",
                type(dataset).__name__,
                "let `__iter__` begin anew each time, or use a preset of `lightning-accel tune`",
            )
    with steady(*datasets, *(getattr(loader, "collate_fn", None) for loader in loaders)):
        drawn = batches(trainer, _BATCHES)
    if combined is not None and combined._mode == "sequential" and len(loaders) > 1:
        drawn = [batch[0] for batch in drawn]  # one loader after the other, so the first
    with inert_copy(trainer, pl_module) as copy:
        return [placed(trainer, copy, batch) for batch in drawn]


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
def untouched(trainer: Trainer) -> Iterator[None]:
    """Put back what a search changes in the process: random states, loggers, threads, captured code."""
    state, loggers = random_state(), trainer.loggers
    threads, matmul = torch.get_num_threads(), torch.get_float32_matmul_precision()
    seen = set(_captured())
    trainer.loggers = [DummyLogger() for _ in loggers]
    stops = trainer.should_stop
    with ExitStack() as quiet:
        quiet.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of copies, about which nobody can do anything
        quiet.enter_context(redirect_stdout(quiet.enter_context(open(os.devnull, "w"))))
        try:
            yield
        finally:
            gc.collect()
            trainer.loggers, trainer.should_stop = loggers, stops
            torch.set_num_threads(threads)
            if torch.get_float32_matmul_precision() != matmul:
                torch.set_float32_matmul_precision(matmul)
            for code in _captured():
                if code not in seen:
                    torch._dynamo.eval_frame.reset_code(code)
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            set_random_state(state)


def _captured() -> list[Any]:
    """Return the code objects of which dynamo holds graphs; private in PyTorch 2.10 to 2.13."""
    if "torch._dynamo.convert_frame" not in sys.modules:
        return []
    seen = sys.modules["torch._dynamo.convert_frame"].input_codes.seen
    return [code for reference in seen if (code := reference()) is not None]
