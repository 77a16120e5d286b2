"""What takes longer than two seconds is told while it runs: a bar on a terminal, and one line when it is done.

A bar is drawn over the line that the cursor is on and wiped away at the end, as the bars of a Trainer (rich, tqdm) begin theirs,
so that each finds its place again. In a notebook, a pipe or a log there is the line alone; in CI, and in any process but
the first, nothing. What runs inside of another adds its words to the outer one. Nothing is drawn from a forked process
or from another thread than the main one, and what cannot be written is not: a fit does not end for a bar.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

AFTER_S = 2.0
"""What is done sooner is not told."""
_EVERY_S = 1.0
"""Between two drawings; more would take time from what is measured meanwhile."""
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")

_clock: Callable[[], float] = time.monotonic
_open: list[_Told] = []
_drawing = threading.Lock()


class Step(Protocol):
    """Tells what is being done now, and how many parts of the whole are done since the last time."""

    def __call__(self, said: str = "", *, by: int = 0) -> None: ...


@contextmanager
def progress(
    what: str, total: int | None = None, *, after_s: float = AFTER_S, line: bool = True
) -> Iterator[Step]:
    """Tell how far something is, if it takes long.

    Args:
        what: What is done, such as "calibrating".
        total: How many parts it has, where that is known.
        after_s: Seconds after which it is told.
        line: Whether one line stays when it is done.

    >>> with progress("calibrating", total=2) as step:
    ...     for batch in range(2):
    ...         step(f"batch {batch}", by=1)
    """
    if threading.current_thread() is not threading.main_thread():
        yield _nothing
        return
    if _open and _open[0].pid == os.getpid():
        outer = _open[0]
        before = outer.inner
        outer.inner = what
        try:
            _on_step(what)
            yield _within(outer, what, total)
        finally:
            outer.inner = before
        return
    told = _Told(what, total, after_s, line)
    _open[:] = [told]
    try:
        _on_step(what)
        yield told.step
        told.is_done = True
    finally:
        _open.clear()
        told.end()


@contextmanager
def silence() -> Iterator[None]:
    """Let nothing be told within."""
    before = _open[:]
    _open[:] = [_Told("", None, float("inf"), line=False, is_quiet=True)]
    try:
        yield
    finally:
        _open[:] = before


def rank() -> int:
    """Return the number of this process among those that were started together.

    >>> rank()
    0
    """
    dist: Any = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return int(dist.get_rank())
    for name in RANKS:
        if os.environ.get(name, "").strip().isdigit():
            return int(os.environ[name])
    return 0


def in_ci() -> bool:
    """Tell whether a machine alone reads what is said: the variable CI is set."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


class _Told:
    """One thing that is told: what, since when, and how far it is."""

    def __init__(
        self, what: str, total: int | None, after_s: float, line: bool, is_quiet: bool = False
    ) -> None:
        self.pid, self.what, self.inner, self.said = os.getpid(), what, "", ""
        self.total, self.count = total, 0
        self.is_done = False
        self._after_s, self._line = after_s, line
        self._start, self._drawn = _clock(), -float("inf")
        self._bar: _Bar | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._is_quiet = is_quiet or sys.stderr is None or in_ci() or rank() > 0
        if not self._is_quiet and sys.stderr.isatty():
            self._bar = _Bar(sys.stderr)
            self._thread = threading.Thread(target=self._keep_drawing, daemon=True)
            self._thread.start()

    def step(self, said: str = "", *, by: int = 0) -> None:
        """Note how far it is, and draw where it is time."""
        _on_step(said)
        self.said = said or self.said
        self.count += by
        self.draw()

    def draw(self) -> None:
        """Draw the bar where there is one and it is time."""
        now = _clock()
        is_due = now - self._start >= self._after_s and now - self._drawn >= _EVERY_S
        is_open = _open[:1] == [self]  # else Ctrl-C came before its `with` was entered
        if self._bar is None or not (is_due and is_open):
            return
        with _drawing:
            if self._bar is not None and not self._ended.is_set():
                self._drawn = now
                parts = (self.what, self.inner, self.said)
                said = ": ".join(part for part in parts if part)
                self._try(self._bar.draw, said, now - self._start, self.count, self.total)

    def end(self) -> None:
        """Wipe the bar away, and say in one line what was done if that took long."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        seconds = _clock() - self._start
        with _drawing:
            if self._bar is not None:
                self._try(self._bar.wipe)
                self._bar = None
            if self.is_done and self._line and not self._is_quiet and seconds >= self._after_s:
                self._try(self._write_line, seconds)

    def _write_line(self, seconds: float) -> None:
        sys.stderr.write(f"{self.what[:1].upper()}{self.what[1:]}: done in {seconds:.1f} s.\n")

    def _keep_drawing(self) -> None:
        while not self._ended.wait(_EVERY_S):
            self.draw()

    def _try(self, write: Callable[..., Any], *args: Any) -> None:
        try:
            write(*args)
        except (OSError, ValueError):  # the terminal is gone, or closed
            self._bar, self._is_quiet = None, True


class _Bar:
    """A bar in the line that the cursor is on.

    While a rich display is open the error output is a proxy that prints above it: the bar goes to the terminal itself.
    """

    def __init__(self, stream: Any) -> None:
        self._file = getattr(stream, "rich_proxied_file", stream)
        self._is_drawn = False

    def draw(self, said: str, seconds: float, count: int, total: int | None) -> None:
        """Draw it as it is now."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        console = Console(file=self._file, force_jupyter=False)
        if console.is_dumb_terminal or console.legacy_windows:
            return
        text = TextColumn("{task.description}", table_column=Column(no_wrap=True), markup=False)
        shown = Progress(
            text, BarColumn(20), TextColumn(f"{seconds:.0f} s"), console=console, disable=True
        )
        shown.add_task(said[: max(10, console.width - 32)], total=total, completed=count)
        with console.capture() as drawn:
            console.print(shown.make_tasks_table(shown.tasks), end="")
        self._file.write(f"\r\x1b[2K{drawn.get().splitlines()[0].rstrip()}")
        self._file.flush()
        self._is_drawn = True

    def wipe(self) -> None:
        """Leave the line empty, with the cursor at its beginning."""
        if self._is_drawn:
            self._file.write("\r\x1b[2K")
            self._file.flush()


def _within(outer: _Told, what: str, total: int | None) -> Step:
    """Return what tells of a part of something that is told already."""
    count = 0

    def step(said: str = "", *, by: int = 0) -> None:
        nonlocal count
        count += by
        place = "" if total is None else f"{count} of {total}"
        parts = (what, " ".join(part for part in (place, said) if part))
        outer.inner = ": ".join(part for part in parts if part)
        _on_step(said)
        outer.draw()

    return step


def _nothing(said: str = "", *, by: int = 0) -> None:
    """Tell nothing."""


def _on_step(said: str) -> None:
    """Do nothing: a place at which a test interrupts."""


with suppress(AttributeError):  # where there is no fork
    # A fork in the midst of a drawing would leave the lock of the stream closed in the child.
    os.register_at_fork(
        before=_drawing.acquire, after_in_parent=_drawing.release, after_in_child=_drawing.release
    )
