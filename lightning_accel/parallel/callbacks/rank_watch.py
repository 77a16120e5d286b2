"""`RankWatch`: the death of one process ends all, soon and with its name."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_accel.arguments import positive
from lightning_accel.bridge.technique import Context, Technique
from lightning_accel.errors import explain
from lightning_accel.parallel.restarts import warning_of_restarts
from lightning_accel.parallel.watch import Lost, Watch, look, myself, ranks
from lightning_accel.parallel.watch.attendance import attendance, part_of_store
from lightning_accel.parallel.watch.ending import call_of, end, kill, line_of_main_thread, say
from lightning_accel.parallel.watch.watch import master_address
from lightning_accel.surgery import Change, Receipt

_RUN = "_call_and_handle_interrupt"
"""The function of Lightning within which a Trainer runs."""
_GRACE_S = 10.0
_BROKEN = ("gloo", "connection closed", "connection reset", "nccl", "broken pipe", "socket")
"""Words in errors of a collective whose other end is not there."""
_TORCH = str(Path(torch.__file__).parent)
_SESSIONS = itertools.count()


class RankWatch(Technique):
    """End the run of all processes soon after one of them died or was stopped, and say which it was.

    A thread of each process gives signs of life to rank 0, and rank 0 to all. One that is killed is known at once, one
    that is stopped, or cut off, after the timeout; a process that compiles, validates, reads data or stands in a
    debugger is none of these. All others then end with an error that names it, where it was seen last, and the last
    checkpoint: by an exception if their main thread can have one, else with exit code 1. The strategies of this package
    bring it with them; others take it as a callback.

    Args:
        timeout: Seconds for which a process may give no sign; infinity ends runs for processes that are gone only.

    Raises:
        ValueError: The timeout is no number above zero.
        TypeError: It is no number.

    >>> RankWatch().timeout
    120.0
    """

    needs = "process"
    is_global = True
    name = "rank_watch"
    of_a_fit: ClassVar = {"_watches": dict, "_whys": dict}

    def __init__(self, timeout: float = 120.0) -> None:
        self.timeout = positive("timeout", timeout, unit="seconds")
        self._watches: dict[int, Watch] = {}
        self._whys: dict[int, tuple[str, bool]] = {}

    @contextmanager
    @override
    def effect(self, context: Context) -> Iterator[Receipt | None]:
        trainer, reason = context.trainer, _nothing_to_watch(context)
        if reason:
            yield Receipt(skipped=(Change("processes", reason),))
            return
        if warning := warning_of_restarts():
            rank_zero_warn(warning)
        presence = attendance()
        presence.enter()
        watch = self._watches[id(trainer)] = self._begin(trainer)
        watch.start()
        try:
            yield Receipt((Change("processes", f"{watch.count} watched, {self.timeout:g} s"),))
        finally:
            del self._watches[id(trainer)]
            why, may_follow = self._whys.pop(id(trainer), ("", False))
            presence.leave(failed=bool(why))
            watch.leave(why, may_follow=may_follow)
            if why and (call := call_of(_RUN)):
                presence.tell_of_the_next(lambda: call_of(_RUN) not in (None, call))

    def _begin(self, trainer: Trainer) -> Watch:
        return Watch(
            part_of_store(f"watch/{next(_SESSIONS)}"),
            myself(dist.get_rank()),
            dist.get_world_size(),
            timeout_s=float(self.timeout),
            where=lambda: _where(trainer),
            on_lost=lambda lost: self._end(trainer, lost),
            master=master_address(),
        )

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        broken, watch = _is_broken(exception), self._watches.get(id(trainer))
        lost = None
        if watch is not None:
            lost = watch.wait(2 * watch.interval_s + _GRACE_S) if broken else watch.lost
            first = (str(exception).splitlines() or [""])[0][:300]
            why = f"{type(exception).__name__}: {first}"
            self._whys[id(trainer)] = why, broken or lost is not None
        if lost is not None and (broken or lost.is_over):
            exception.add_note(_said(trainer, lost))
            if not lost.is_over:  # a script that catches the error may print no notes
                say(_said(trainer, lost))
        elif lost is None and broken and dist.is_initialized() and (away := attendance().absent()):
            exception.add_note(f"Not within this run, and so perhaps lost: {ranks(away)}.")
        super().on_exception(trainer, pl_module, exception)

    def _end(self, trainer: Trainer, lost: Lost) -> None:
        """End this process, from the thread of the watch: the main one may wait for who is lost."""
        said = _said(trainer, lost)
        if lost.is_over:
            say(said)
            kill(lost.member)
        presence, grace = attendance(), min(_GRACE_S, float(self.timeout))

        def left_s() -> float | None:
            sight = look(lost.member)
            if lost.is_over or (sight is not None and sight.is_gone):
                return grace  # in which the collective fails
            return 0.0 if presence.has_returned(lost.member.rank) else None

        end(grace_s=grace, run=_RUN, why="" if lost.is_over else said, left_s=left_s)


def watch_ranks(trainer: Trainer) -> None:
    """Give a Trainer a watch, unless it has one."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if not any(isinstance(callback, RankWatch) for callback in callbacks):
        callbacks.insert(0, RankWatch())


def _nothing_to_watch(context: Context) -> str:
    if context.is_copy:
        return "a copy"
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return "there is one process"
    if context.trainer.world_size != dist.get_world_size():
        return "this Trainer is of one process among several"
    return ""


def _is_broken(exception: BaseException) -> bool:
    """Whether an error is of a collective, and so perhaps of another process."""
    if isinstance(exception, dist.DistError):
        return True
    said, innermost = str(exception).lower(), [*traceback.walk_tb(exception.__traceback__)][-1:]
    raised_by_torch = any(f.f_code.co_filename.startswith(_TORCH) for f, _ in innermost)
    is_told = any(word in said for word in _BROKEN)
    return isinstance(exception, RuntimeError) and raised_by_torch and is_told


def _where(trainer: Trainer) -> str:
    stage = trainer.state.stage.value if trainer.state.stage is not None else "setup"
    step = f"in step {trainer.global_step} of epoch {trainer.current_epoch}"
    return f"{step}, {stage}, {line_of_main_thread()}"


def _said(trainer: Trainer, lost: Lost) -> str:
    last = _last_checkpoint(trainer)
    do = f"start again from the last checkpoint, ckpt_path={last!r}" if last else (
        "start again; a `ModelCheckpoint` that saves within the epoch would lose less"
    )  # fmt: skip
    return explain("the run ends, since one of its processes is lost", str(lost), do)


def _last_checkpoint(trainer: Trainer) -> str:
    """Return the newest file that this run's callbacks wrote."""
    found = [
        Path(path)
        for callback in trainer.checkpoint_callbacks
        for name in ("last_model_path", "_last_checkpoint_saved", "best_model_path")
        if (path := getattr(callback, name, ""))
    ]
    there = [path for path in found if path.exists()]
    return str(max(there, key=lambda path: path.stat().st_mtime)) if there else ""
