"""What was really captured: graphs, graph breaks and recompilations, by target, with the user's line.

Dynamo says nothing when a target captured no graph at all, and logs the rest where few look. Its own
counters are read around each call of a compiled target: `torch._dynamo.utils.counters` (frames seen, graphs
captured), `graph_break_reasons` (with the stack of the user's code) and `get_compilation_metrics` (with the
reason of a recompilation). None is documented; all three are in PyTorch 2.10 to 2.13.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_accel.measure.table import Table

_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parent)


@dataclass(eq=False)
class Capture:
    """What compiling one kind of block gave; blocks of one kind share their graphs.

    `breaks` maps the user's lines at which a graph ended to the reason; `recompilations` are the
    reasons for which a graph had to be captured again; `failures` those for which nothing was captured;
    `limits` those for which dynamo gave up, and code runs eagerly since; `eager` counts, by the reason,
    calls that ran eagerly rather than be compiled after the warm-up; `stopped` says of targets why they run as they
    are after all, and `uncompared` why one is not compared with itself uncompiled.

    >>> Capture(["net"], "MLP").uncalled
    ['net']
    """

    targets: list[str]
    kind: str
    graphs: int = 0
    called: set[str] = field(default_factory=set)
    breaks: dict[str, str] = field(default_factory=dict)
    recompilations: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)
    eager: dict[str, int] = field(default_factory=dict)
    stopped: dict[str, str] = field(default_factory=dict)
    uncompared: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The targets in few words.

        >>> Capture(["net.0", "net.1", "net.2"], "Block").name
        'net.0 ... net.2 (3 x Block)'
        """
        if len(self.targets) == 1:
            return f"{self.targets[0] or 'the model'} ({self.kind})"
        return f"{self.targets[0]} ... {self.targets[-1]} ({len(self.targets)} x {self.kind})"

    @property
    def uncalled(self) -> list[str]:
        return [name for name in self.targets if name not in self.called]


class CaptureCounts(NamedTuple):
    """Where dynamo's counters stood."""

    frames: int
    graphs: int
    breaks: int
    time: float


def now() -> CaptureCounts:
    """Read dynamo's counters; cheap enough for every call of a block."""
    utils = torch._dynamo.utils
    return CaptureCounts(
        utils.counters["frames"]["total"],
        utils.counters["stats"]["unique_graphs"],
        len(utils.graph_break_reasons),
        time.time(),
    )


def note(capture: Capture, since: CaptureCounts) -> None:
    """Add to `capture` what dynamo did since a moment, if anything."""
    utils = torch._dynamo.utils
    if utils.counters["frames"]["total"] == since.frames:
        return
    capture.graphs += utils.counters["stats"]["unique_graphs"] - since.graphs
    for found in utils.graph_break_reasons[since.breaks :]:
        # One break is told twice: when it ends the caller's graph, and again by the callee itself.
        capture.breaks.setdefault(_place(found.user_stack), _first_line(found.reason))
    for metrics in utils.get_compilation_metrics():
        if (metrics.start_time or 0.0) >= since.time:
            why = metrics.recompile_reason and _first_line(metrics.recompile_reason)
            if metrics.fail_reason and "limit exceeded" in metrics.fail_reason:
                capture.limits.append(why or _first_line(metrics.fail_reason))
                continue
            if why:
                capture.recompilations.append(why)
            if metrics.fail_reason:
                capture.failures.append(_first_line(metrics.fail_reason))


def runs_cached_graphs(module: nn.Module) -> bool:
    """Tell whether a forward within has graphs of an earlier capture.

    After a graph break a class's own `forward` is captured by itself, and those graphs serve every
    instance in this process: a new target then runs compiled without a capture of its own.
    """
    codes = (getattr(type(m).forward, "__code__", None) for m in module.modules())
    entries = torch._dynamo.eval_frame._debug_get_cache_entry_list
    return any(entries(code) for code in set(codes) if code is not None)


def captures(model: nn.Module) -> list[Capture]:
    """Return what each kind of compiled block in `model` captured so far.

    >>> captures(nn.Linear(2, 2))
    []
    """
    found = (getattr(m._compiled_call_impl, "capture", None) for m in model.modules())
    unique = {id(capture): capture for capture in found if isinstance(capture, Capture)}
    return list(unique.values())


def table(captured: Iterable[Capture]) -> Table:
    """Render captures: one row for each kind's graphs, each graph break and each reason to recompile.

    >>> capture = Capture(["net"], "MLP", graphs=2, called={"net"}, breaks={"net.py:7": "a print"})
    >>> for row in table([capture]).rows:
    ...     print(row)
    ['net (MLP)', 'graphs', 2, '', '']
    ['net (MLP)', 'graph break', 1, 'a print', 'net.py:7']
    """
    rows: list[list[Any]] = []
    for capture in captured:
        rows.append([capture.name, "graphs", capture.graphs, "", ""])
        rows += [[capture.name, "graph break", 1, why, at] for at, why in capture.breaks.items()]
        for event, reasons in (
            ("recompilation", capture.recompilations),
            ("limit reached", capture.limits),
        ):
            rows += [
                [capture.name, event, reasons.count(why), why, ""] for why in dict.fromkeys(reasons)
            ]
        rows += [[capture.name, "eager call", n, why, ""] for why, n in capture.eager.items()]
        for event, told in (
            ("runs as it is", capture.stopped),
            ("not compared", capture.uncompared),
        ):
            rows += [[name, event, 1, why, ""] for name, why in told.items()]
        if capture.uncalled:
            rows.append(
                [", ".join(capture.uncalled), "never called", len(capture.uncalled), "", ""]
            )
    return Table(["target", "event", "count", "reason", "where"], rows, title="Compilation")


def _place(stack: Any) -> str:
    frames = [f for f in stack or () if not f.filename.startswith((_TORCH, _OURS))]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "torch"


def _first_line(text: Any) -> str:
    line = str(text).strip().partition("\n")[0].partition(" expected DispatchKeySet")[0]
    head, colon, rest = line.partition(": ")  # "3/1: ..." numbers frames, which says nothing
    return rest if colon and head.replace("/", "").isdigit() else line
