"""A look at a training at its beginning: some steps of a copy on the user's own data, as they come.

Nothing is searched. The steps are those of the tuner's copies, the data are read as the fit would read them, and a handful
of things is done otherwise beside it, to say what they would give.
"""

from __future__ import annotations

import io
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from itertools import islice
from statistics import mean, median
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, default_collate

from lightning_accel.bridge.data import ReadOnce
from lightning_accel.bridge.example import placed
from lightning_accel.cli.doctor.facts import Captured, Facts, Loader, Memory, Times
from lightning_accel.cli.doctor.lanes import measured_lanes
from lightning_accel.cli.doctor.phases import NAMES, Phases, watched
from lightning_accel.cli.doctor.syncs import Prints, Syncs
from lightning_accel.compilation.blocks import compile_blocks
from lightning_accel.compilation.explain import Capture, captures, note
from lightning_accel.compilation.explain import now as counters_now
from lightning_accel.errors import AccelError
from lightning_accel.hardware import describe, num_usable_cores
from lightning_accel.loading.resident import free_bytes
from lightning_accel.loading.rows import rows
from lightning_accel.measure.contention import LoadWatcher
from lightning_accel.measure.memory import model_size, peak_memory
from lightning_accel.measure.race import synchronise
from lightning_accel.measure.subject import num_samples
from lightning_accel.surgery.compiled import is_compiled
from lightning_accel.tuning.in_trainer import builder, draw, preserve_trainer, refuse
from lightning_accel.tuning.replica import Replica, copied
from lightning_accel.tuning.settings import Settings
from lightning_accel.tuning.sizes import resize

_WARMUP = 3
_FEWEST, _MOST = 5, 300
_KEPT = 8
"""Batches that are kept, as they came, to capture graphs on."""
_CONTENDED = "other work took the processor ({load}): measured again in one thread"
_USUAL = 3
"""Batches in which dynamo may compile anew: it learns which sizes and numbers change."""
_SLOW_DATA = 0.05
"""Share of a step from which on it is asked what making a batch consists of."""


class Look:
    """Looks at a training that is about to begin.

    Args:
        budget_s: About how long.
        say: Told what is being done.
        clock: Gives seconds.
    """

    def __init__(
        self,
        budget_s: float,
        say: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.budget_s, self._say, self._clock = budget_s, say, clock
        self.facts: Facts | None = None
        self._losses = (0, 0)

    def __call__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look, and keep what was seen in `facts`.

        Raises:
            Unsupported: The step cannot be repeated on a copy.
            AccelError: The step fails, or gives no loss.
        """
        refuse(trainer, pl_module)
        with preserve_trainer(trainer):
            self.facts = self._looked(trainer, pl_module)

    def _looked(self, trainer: Trainer, pl_module: LightningModule) -> Facts:
        device = trainer.strategy.root_device
        compiled = is_compiled(pl_module)
        self._say("reading batches")
        data = _batches(trainer, pl_module)
        build = builder(trainer, pl_module, data)
        self._say("following steps from batch to batch")
        threads = torch.get_num_threads()
        contended: tuple[str, ...] = ()
        watch = LoadWatcher()
        times, loader, kept, since = self._followed(trainer, pl_module, build, data)
        load = watch.load()
        if load.contended and device.type == "cpu" and threads > 1:
            torch.set_num_threads(1)  # two that wait for each other's cores tell nothing
            contended = (_CONTENDED.format(load=load),)
            times, loader, kept, since = self._followed(trainer, pl_module, build, data)
        if times.data > _SLOW_DATA * times.total:
            self._say("asking what a batch is made of")
            loader = self._made_of(trainer, loader)
        self._say("looking for lines that wait")
        syncs, prints = self._lines(build, kept)
        self._say("capturing graphs")
        captured = _captured(build, kept, compiled, since)
        self._say("counting memory")
        memory, why = _memory(build, data, device)
        self._say("trying a few things beside it")
        lanes, more = measured_lanes(trainer, pl_module, build, data, times, self.budget_s * 0.4)
        return Facts(
            times=times,
            loader=loader,
            device=device.type,
            cores=num_usable_cores(),
            threads=threads,
            others_cores=load.others_cores,
            batch_size=num_samples(data[0]),
            precision=str(trainer.precision),
            dtypes=_dtypes(pl_module),
            fast_dtypes=tuple(describe(device).to_dict()["fast_dtypes"]),
            lanes=lanes,
            syncs=syncs,
            prints=prints,
            captured=captured,
            memory=memory,
            losses=self._losses[0],
            lost=self._losses[1],
            notes=(*contended, *why, *more),
        )

    def _followed(
        self, trainer: Trainer, pl_module: LightningModule, build: Any, data: list[Any]
    ) -> tuple[Times, Loader, list[Any], Captured]:
        """Go from batch to batch as a fit does, and time each part of the way."""
        held = [data[0]]
        replica: Replica = build(Settings(), held)
        replica.first_step()
        source = _Source(trainer, self._clock)
        copy = copied(trainer, pl_module)
        phases = Phases(replica.device, self._clock)
        ahead = source.ahead()
        kept: list[Any] = []
        found: list[dict[str, float]] = []
        losses: list[float] = []
        since = Captured()
        capture, counted = Capture([], ""), counters_now() if "torch._dynamo" in sys.modules else None  # fmt: skip
        start = self._clock()
        compile_s = 0.0
        with watched(replica, phases), replica.around():
            while True:
                row, batch = self._one(trainer, copy, replica, phases, source, held)
                if batch is None:
                    break
                losses.append(float(replica.loss.flatten()[0]))  # type: ignore[union-attr]
                if len(kept) < _KEPT:
                    kept.append(batch)
                found.append(row)
                if len(found) == _WARMUP:
                    compile_s, capture = _compile_seconds(), Capture([], "")
                    counted = counters_now() if "torch._dynamo" in sys.modules else None
                spent = self._clock() - start
                enough = len(found) >= _WARMUP + ahead + _FEWEST
                if len(found) >= _MOST or (enough and spent > 0.2 * self.budget_s):
                    break
        self._losses = len(losses), sum(not math.isfinite(loss) for loss in losses)
        if counted is not None:
            note(capture, counted)
            spent = _compile_seconds() - compile_s
            since = Captured(
                True,
                capture.graphs,
                capture.breaks,
                tuple(capture.recompilations),
                spent,
                max(1, len(found) - _WARMUP),
            )
        counting = found[min(_WARMUP + ahead, max(0, len(found) - 1)) :]
        host = self._host(replica) if replica.device.type != "cpu" else None
        return _times(counting, host, ahead > 0), source.about(), kept, since

    def _one(
        self,
        trainer: Trainer,
        copy: Any,
        replica: Replica,
        phases: Phases,
        source: _Source,
        held: list[Any],
    ) -> tuple[dict[str, float], Any]:
        """Do one step on the next batch; `None` for the batch when there is none any more."""
        started = self._clock()
        raw = source.next()
        if raw is None:
            return {}, None
        got = self._clock()
        held[0] = placed(trainer, copy, raw)
        synchronise(replica.device)
        there = self._clock()
        phases.take()
        replica.step()
        synchronise(replica.device)
        done = self._clock()
        row = {**dict.fromkeys(NAMES, 0.0), **phases.take()}
        row["rest"] = max(0.0, done - there - sum(row.values()))
        return {**row, "data": got - started - source.restart_s, "move": there - got}, held[0]

    def _host(self, replica: Replica) -> float:
        found = []
        with replica.around():
            for _ in range(_FEWEST):
                synchronise(replica.device)
                start = self._clock()
                replica.step()
                found.append(self._clock() - start)
        return median(found)

    def _made_of(self, trainer: Trainer, loader: Loader) -> Loader:
        """Time the items of a batch and what makes one of them, in this process."""
        given: Any = _loaders(trainer)[0]
        if loader.num_workers is None or loader.is_stream or given.batch_sampler is None:
            return loader
        indices = next(iter(given.batch_sampler))
        start = self._clock()
        items = [given.dataset[index] for index in indices]
        read = self._clock()
        given.collate_fn(items)
        done = self._clock()
        return loader._replace(read_s=read - start, collate_s=done - read)

    def _lines(self, build: Any, kept: list[Any]) -> tuple[Any, Any]:
        """Run steps in which each call is looked at."""
        replica: Replica = build(Settings(), kept)
        replica.first_step()
        steps = min(4, max(2, len(kept)))
        prints = Prints()
        with replica.around(), redirect_stdout(prints), Syncs(replica.device, self._clock) as syncs:
            for _ in range(steps):
                replica.step()
        return syncs.lines(steps), prints.lines(steps)


class _Source:
    """The training data as the fit reads them; begun anew when an epoch is over."""

    def __init__(self, trainer: Trainer, clock: Callable[[], float]) -> None:
        self._combined: Any = trainer.fit_loop._combined_loader
        self._trainer, self._clock = trainer, clock
        self._iterator: Iterator[Any] | None = None
        self.first_s = self.restart_s = 0.0

    def next(self) -> Any:
        """Return the next batch, `None` of data that is used up and does not begin anew."""
        self.restart_s = 0.0
        if self._iterator is not None:
            with suppress(StopIteration):
                return self._batch()
        start = self._clock()
        self._iterator = iter(self._combined)
        try:
            batch = self._batch()
        except StopIteration:
            return None
        self.restart_s = self._clock() - start
        self.first_s = self.first_s or self.restart_s
        return batch

    def _batch(self) -> Any:
        assert self._iterator is not None
        batch, _, _ = next(self._iterator)
        return batch

    def ahead(self) -> int:
        """Return how many batches workers may have made while nobody trained."""
        found = [o for o in _loaders(self._trainer) if isinstance(o, DataLoader)]
        return max((o.num_workers * (o.prefetch_factor or 0) for o in found), default=0)

    def about(self) -> Loader:
        """Return what is known of the first loader."""
        given = _loaders(self._trainer)[0]
        number = self._trainer.num_training_batches
        batches = int(number) if number != float("inf") else None
        if not isinstance(given, DataLoader):
            return Loader(type(given).__name__, batches=batches, first_s=self.first_s)
        collate = given.collate_fn
        in_memory = True
        try:
            rows(given)
        except Exception:  # whatever a dataset says to questions
            in_memory = False
        return Loader(
            in_memory=in_memory,
            kind=type(given).__name__,
            num_workers=given.num_workers,
            pin_memory=bool(given.pin_memory),
            persistent=bool(given.persistent_workers),
            is_stream=isinstance(given.dataset, IterableDataset),
            batches=batches,
            first_s=self.first_s,
            dataset=type(given.dataset).__name__,
            collate=""
            if collate is default_collate
            else getattr(collate, "__qualname__", type(collate).__name__),
        )


def _loaders(trainer: Trainer) -> list[Any]:
    combined = trainer.fit_loop._combined_loader
    return list(combined.flattened) if combined is not None else []


def _batches(trainer: Trainer, pl_module: LightningModule) -> list[Any]:
    """Return a few batches in place; data that can be read only once are this command's own to read."""
    try:
        return draw(trainer, pl_module)
    except ReadOnce:
        copy = copied(trainer, pl_module)
        combined: Any = trainer.fit_loop._combined_loader
        found = islice(iter(combined), 4)
        return [placed(trainer, copy, batch) for batch, _, _ in found]


def _times(rows: list[dict[str, float]], host: float | None, in_bursts: bool) -> Times:
    if not rows:
        raise AccelError("there is no training batch to look at", "none", "pass data with batches")
    # Workers hand over several batches at once and then none for a while.
    average = mean if in_bursts else median
    data = average(row["data"] for row in rows)
    middle = {name: median(row[name] for row in rows) for name in ("move", *NAMES, "rest")}
    return Times(data=data, **middle, host=host, steps=len(rows))


def _compile_seconds() -> float:
    """Return the seconds that dynamo has compiled in this process."""
    if "torch._dynamo" not in sys.modules:
        return 0.0
    # `get_compilation_metrics` keeps the last 64 alone, so that sums of them do not grow
    return torch._dynamo.utils.calculate_time_spent().get("entire_frame_compile", 0.0)


def _captured(build: Any, kept: list[Any], compiled: bool, since: Captured) -> Captured:
    """Capture graphs on the batches as they came, and return what stood in the way."""
    if since.recompilations or since.graphs:
        return since  # the training compiles by itself, and was seen to
    replica: Replica = build(Settings(), kept)
    before, usual = _compile_seconds(), 0
    try:
        with redirect_stdout(io.StringIO()), replica.around():
            compile_blocks(replica.module, itself=False, backend="eager", check_every_n_calls=None)
            for index in range(len(kept)):
                if index == _USUAL:
                    before = _compile_seconds()
                    usual = sum(len(capture.recompilations) for capture in captures(replica.module))
                replica.step()
    except Exception as error:  # dynamo has many ways to give up; each is told
        line = (str(error).strip().splitlines() or [""])[0]
        return Captured(compiled, error=f"{type(error).__name__}: {line}"[:200])
    found = captures(replica.module)
    return Captured(
        is_compiled=compiled,
        graphs=sum(capture.graphs for capture in found),
        breaks={at: why for capture in found for at, why in capture.breaks.items()},
        recompilations=tuple(why for capture in found for why in capture.recompilations)[usual:],
        seconds=_compile_seconds() - before,
        steps=max(1, len(kept) - _USUAL),
    )


def _memory(
    build: Any, data: list[Any], device: torch.device
) -> tuple[Memory | None, tuple[str, ...]]:
    """Count what a step holds at its peak, for the batch and for half of it."""
    size = num_samples(data[0])
    peaks = {}
    try:
        for count in (size, (size or 0) // 2):
            if count:
                replica: Replica = build(Settings(), [resize(data[0], count)])
                replica.first_step()
                with replica.around():
                    peaks[count] = peak_memory(replica.step, device=device)
                fixed = _standing(replica)
    except Exception as error:  # of a batch that cannot be halved, or a step that fails on it
        if size not in peaks:
            return None, (f"memory is left out: {type(error).__name__}: {error}",)
    if not size or size not in peaks:
        return None, ("memory is left out: the batch has no tensor that tells its size",)
    half = peaks.get(size // 2)
    slope = (peaks[size].peak_bytes - half.peak_bytes) / (size - size // 2) if half else peaks[size].peak_bytes / size  # fmt: skip
    beside = max(0, int(peaks[size].peak_bytes - slope * size))
    room = free_bytes(device) + (fixed if device.type == "cuda" else 0)
    return Memory(fixed + beside, slope, room, size, peaks[size].source), ()


def _standing(replica: Replica) -> int:
    """Return the bytes of weights, buffers and optimizer state; gradients come and go within a step."""
    size = model_size(replica.module)
    held = [v for o in replica.optimizers for s in o.state.values() for v in s.values()]
    state = sum(v.numel() * v.element_size() for v in held if isinstance(v, torch.Tensor))
    return size.param_bytes + size.buffer_bytes + state


def _dtypes(module: nn.Module) -> dict[str, int]:
    found: dict[str, int] = {}
    for parameter in module.parameters():
        name = str(parameter.dtype).removeprefix("torch.")
        found[name] = found.get(name, 0) + parameter.numel()
    return found
