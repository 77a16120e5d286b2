"""How far a fit is: a small file beside its report to be, for whoever looks on from another process.

Written at most every two seconds and at most for a hundredth of the time, whatever a write costs. It takes its place
in one go, without waiting for the disk: after a power failure it may be an old one. The file goes when the report
is there; where it stays, the fit was ended by something else.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_accel.measure.table import finite
from lightning_accel.places import is_there, starts_with

KEY = "lightning_accel_progress"
ENDING = ".progress.json"
_EVERY_S = 2.0
_SHARE = 0.01
_MOST_POINTS = 500


class Progress:
    """The file of one fit.

    Args:
        report: Where the report will be; the file lies beside it.
        clock: Seconds, ever growing.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     progress = Progress(Path(folder) / "report.json")
    ...     progress.write({"epoch": 3, "loss": float("nan")})
    ...     said = json.loads(progress.path.read_text())
    ...     progress.end()
    ...     said["epoch"], said["loss"], progress.path.name, progress.path.exists()
    (3, None, 'report.progress.json', False)
    """

    def __init__(self, report: Path, clock: Callable[[], float] = time.perf_counter) -> None:
        self.path = path_beside(report)
        self.clock = clock
        self.next = -float("inf")
        self._is_ours = False

    def is_due(self) -> bool:
        """Whether enough time has passed."""
        return self.clock() >= self.next

    def write(self, said: Mapping[str, Any]) -> None:
        """Write what is known, and set the time of the next one; what is no file of ours stays as it is.

        Raises:
            OSError: There is no place to write.
        """
        start = self.clock()
        if not self._is_ours and is_there(self.path) and not starts_with(self.path, _START):
            self.next = float("inf")
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            text = json.dumps({KEY: 1, **finite(dict(said))}, allow_nan=False)
            part.write_text(text, encoding="utf-8")
            os.replace(part, self.path)
        finally:
            part.unlink(missing_ok=True)
        self._is_ours = True
        now = self.clock()
        self.next = now + max(_EVERY_S, (now - start) / _SHARE)

    def end(self) -> None:
        """Take the file away; nothing happens where none was written."""
        self.next = float("inf")
        if self._is_ours:
            self.path.unlink(missing_ok=True)
            self._is_ours = False


_START = r'\{"' + KEY + '": '


def path_beside(report: Path) -> Path:
    """Return where the progress of a fit is told that will write this report.

    >>> path_beside(Path("runs/report.json")).as_posix()
    'runs/report.progress.json'
    """
    return report.with_name(report.stem + ENDING)


def thinned(points: Sequence[Sequence[Any]], most: int = _MOST_POINTS) -> list[Sequence[Any]]:
    """Return at most about `most` points; of each stretch the lowest and the highest stay, and both ends.

    >>> [x for x, _ in thinned([[n, n % 7] for n in range(100)], most=8)]
    [0, 6, 27, 28, 55, 56, 76, 77, 99]
    """
    if len(points) <= most:
        return list(points)
    num_stretches = max(1, most // 2)
    size = -(-len(points) // num_stretches)
    keep = {0, len(points) - 1}
    for start in range(0, len(points), size):
        known = [i for i in _within(start, size, len(points)) if points[i][1] is not None]
        if known:
            keep |= {
                min(known, key=lambda i: points[i][1]),
                max(known, key=lambda i: points[i][1]),
            }
        else:
            keep.add(start)
    return [points[i] for i in sorted(keep)]


def _within(start: int, size: int, end: int) -> Iterable[int]:
    return range(start, min(start + size, end))
