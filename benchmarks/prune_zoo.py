"""Can any real architecture be pruned, rightly, to the arithmetic asked for? Ours, and bare torch-pruning.

`python benchmarks/prune_zoo.py [--only 'timm/vit*'] [--json PATH]` halves the multiply-accumulates of each
network of `zoo` (or of any named by `--also`) and then asks `prune_oracle`: does it run forward and backward,
on other inputs, at another batch and another input size, does it come back from its state dict; how much
arithmetic is left, counted on the real network; and is it right?

Beside it, torch-pruning 1.6.1 with its defaults, given the output layer and 30 % of the channels, which is
as near to half of the arithmetic as it can be told. `--ratio 0.3` asks both for the same share of the
channels. Each network has a process of its own, for each of the two, so that a hang is a result. Exit status
1 unless all of ours are right; where arithmetic is asked for, 90 % have to be within 5 % of it; and the
median time is under 10 seconds. With `--ratio`, a network of which nothing can go may be left as it is.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import zoo
from prune_oracle import (
    EXACT,
    NOWHERE,
    checked,
    distinct,
    first_line,
    outputs_of,
    restored,
)
from torch import nn

from lightning_accel.errors import AccelError, NoEffect
from lightning_accel.measure import Table
from lightning_accel.pruning import Macs, prune
from lightning_accel.surgery import Receipt
from lightning_accel.surgery.call import tensors

SHARE = 0.5
"""Of the multiply-accumulates, to keep."""
WITHIN = 0.05
MEDIAN_S = 10.0
REACHED = 0.9
_CHANNELS = 0.3
_LIMITS_S = {"make": 120.0, "prune": 60.0, "check": 240.0}


# -- the two ways ----------------------------------------------------------------------------------


def ours(model: nn.Module, example: Any, ratio: float | None = None) -> dict[str, Any]:
    """Prune to half of the arithmetic; where that is out of reach, by channels, so that it is tried.

    With `ratio`, prune this share of the channels.
    """
    note = ""
    try:
        if ratio is not None:
            receipt = prune(model, example=example, ratio=ratio)
        else:
            receipt, note = _halved(model, example)
    except AccelError as error:
        outcome = "left" if isinstance(error, NoEffect) else "refused"
        return {"outcome": outcome, "note": " ".join(str(error).split())[:300]}
    reasons = Counter(_without_names(change.what) for change in receipt.skipped)
    return {
        "note": note,
        "skipped": len(receipt.skipped),
        "reasons": dict(reasons.most_common()),
        "places": {
            moved.name: moved.kept.take(
                torch.arange(math.prod(moved.old_shape)).view(moved.old_shape)
            )
            for moved in receipt.moved
        },
    }


def _halved(model: nn.Module, example: Any) -> tuple[Receipt, str]:
    try:
        return prune(model, example=example, target=Macs(SHARE)), ""
    except NoEffect as error:
        receipt = prune(model, example=example, ratio=_CHANNELS)
        return receipt, str(error).splitlines()[0]


def theirs(model: nn.Module, example: Any, ratio: float | None = None) -> dict[str, Any]:
    """Prune with torch-pruning's defaults; told which layer makes the output, and no more."""
    import torch_pruning

    before = [p.shape for p in model.parameters()]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=_CHANNELS if ratio is None else ratio,
        ignored_layers=_last_layers(model, example),
        output_transform=lambda out: [t for t in tensors(out) if t.requires_grad],
    )
    pruner.step()
    same = [p.shape for p in model.parameters()] == before
    return {"outcome": "left"} if same else {}


WAYS: dict[str, Callable[..., dict[str, Any]]] = {"ours": ours, "theirs": theirs}


def _last_layers(model: nn.Module, example: Any) -> list[nn.Module]:
    """Return what a user would name: the layers as wide as the output, else the last one."""
    wide = {size for t in outputs_of(model, example) for size in t.shape[1:]}
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Conv3d))]
    widths = {m: getattr(m, "out_features", getattr(m, "out_channels", 0)) for m in layers}
    classes = {zoo.CLASSES, zoo.VOCABULARY, 5, 3, 2} & wide
    return [m for m in layers if widths[m] in classes] or layers[-1:]


def _without_names(reason: str) -> str:
    return re.sub(r"`[^`]*`|\d[\d.e+-]*", "…", reason.splitlines()[0])[:100]


# -- processes -------------------------------------------------------------------------------------


def _work(name: str, way: str, ratio: float | None, talk: Connection) -> None:
    """Make, prune and check one network; say after each part that it is through."""
    zoo.quiet()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"seconds": None, "fails": "", "runs": False, "error": None}
    try:
        model, example = zoo.build(name)
        distinct(model)
        dense = copy.deepcopy(model)
        talk.send(("prune", found))
        start, busy = time.perf_counter(), time.process_time()
        found |= WAYS[way](model, example, ratio)
        found["seconds"] = time.perf_counter() - start
        found["busy_s"] = time.process_time() - busy
        places = found.pop("places", NOWHERE)
        talk.send(("check", found))
        if "outcome" not in found:
            # Whoever saves by torch-pruning saves the module; what we cut is told by its sizes.
            blank = restored if way == "ours" else lambda _, small: copy.deepcopy(small)
            found |= checked(dense, model, example, places, blank)
    except Exception as error:
        found["fails"] = f"prune: {first_line(error)}"
    talk.send(("", found))


class _Job:
    """One network on one way, in its own process, with a limit for each part of the work."""

    def __init__(
        self, name: str, way: str, limits_s: dict[str, float], ratio: float | None
    ) -> None:
        self.name, self.way, self.limits_s = name, way, limits_s
        self.found: dict[str, Any] = {"seconds": None, "fails": "", "runs": False, "error": None}
        # A fork knows the libraries already; importing them takes longer than most prunes.
        kind = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        context: Any = multiprocessing.get_context(kind)
        self.talk, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(name, way, ratio, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self._begin("make")

    def _begin(self, part: str) -> None:
        self.part, self.until = part, time.monotonic() + self.limits_s.get(part, 0.0)

    def listen(self) -> bool:
        """Take in what the process says; true when it is through, or has to be."""
        try:
            while self.part and self.talk.poll():
                part, self.found = self.talk.recv()
                self._begin(part)
        except EOFError:
            self.process.join()
            self._end(f"{self.part}: the process died with code {self.process.exitcode}")
        if self.part and time.monotonic() > self.until:
            self._end(f"{self.part}: not back after {self.limits_s[self.part]:.0f} s")
        if not self.part:
            self.process.kill()
            self.process.join()
        return not self.part

    def _end(self, reason: str) -> None:
        self.found["fails"], self.part = reason, ""


def run(
    names: list[str],
    ways: list[str],
    jobs: int,
    limits_s: dict[str, float],
    ratio: float | None = None,
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield name, way and findings of each, as they end."""
    todo = [(name, way) for name in names for way in ways]
    active: list[_Job] = []
    while todo or active:
        while todo and len(active) < jobs:
            active.append(_Job(*todo.pop(0), limits_s, ratio))
        wait([job.talk for job in active], timeout=0.2)
        for job in [job for job in active if job.listen()]:
            active.remove(job)
            yield job.name, job.way, job.found


# -- the report ------------------------------------------------------------------------------------


def table(results: dict[str, dict[str, dict[str, Any]]], ways: list[str]) -> Table:
    """Put the findings side by side."""
    columns = ["architecture"]
    for way in ways:
        columns += [f"{_TITLES[way]}: MACs", "runs", "difference", "s"]
        columns += ["skipped"] if way == "ours" else []
    rows = []
    for name, found in results.items():
        row: list[Any] = [name]
        for way in ways:
            one = found.get(way, {})
            row += [one.get("macs"), verdict(one), one.get("error"), one.get("seconds")]
            row += [one.get("skipped")] if way == "ours" else []
        rows.append(row)
    return Table(columns, rows, "What was asked of each network, and what came of it")


OUTCOMES = ("right", "left", "refused", "unproved", "wrong", "crashed")


def outcome(found: dict[str, Any]) -> str:
    """Say in a word how it went: one of `OUTCOMES`."""
    if "outcome" in found:
        return str(found["outcome"])
    if not found.get("runs"):
        return "crashed"
    if found.get("error") is None:
        return "unproved"
    return "right" if is_right(found) else "wrong"


def packages(results: dict[str, dict[str, dict[str, Any]]], ways: list[str]) -> Table:
    """Count the outcomes of each package, for both sides."""
    columns = ["package", "by", "networks", *OUTCOMES, "parameters left", "median s", "slowest s"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name, found in results.items():
        for way in ways:
            if way in found:
                groups.setdefault((name.partition("/")[0], way), []).append(found[way])
    rows: list[list[Any]] = []
    for (package, way), every in groups.items():
        counts = Counter(map(outcome, every))
        left = [one["params"] for one in every if outcome(one) == "right"]
        seconds = [one["seconds"] for one in every if one["seconds"] is not None]
        rows.append([package, _TITLES[way], len(every), *(counts[key] for key in OUTCOMES)])
        rows[-1] += [f"{statistics.median(left):.0%}" if left else None]
        rows[-1] += [statistics.median(seconds), max(seconds)] if seconds else [None, None]
    return Table(columns, rows, "By package")


def reasons(results: dict[str, dict[str, dict[str, Any]]]) -> Table:
    """Count why groups of channels were left alone, by package."""
    counts: Counter[tuple[str, str]] = Counter()
    for name, found in results.items():
        for reason, count in found.get("ours", {}).get("reasons", {}).items():
            counts[name.partition("/")[0], reason] += count
    rows = [[*key, count] for key, count in sorted(counts.items(), key=lambda c: (c[0][0], -c[1]))]
    return Table(["package", "why groups were left alone", "groups"], rows)


_TITLES = {"ours": "lightning_accel", "theirs": "torch-pruning"}


def verdict(found: dict[str, Any]) -> str:
    """Say in a few words how it went."""
    if "outcome" in found:
        return str(found["outcome"])
    if found.get("fails") and not found.get("runs"):
        return f"no ({found['fails'][:60]})"
    if found.get("error") is None:
        return f"yes, unproved ({found.get('fails', '')[:60]})"
    return "yes" if is_right(found) else "yes, but WRONG"


def is_right(found: dict[str, Any]) -> bool:
    return bool(found["runs"]) and found["error"] is not None and found["error"] <= EXACT


def is_reached(found: dict[str, Any]) -> bool:
    return bool(found["runs"]) and abs((found.get("macs") or math.inf) / SHARE - 1) <= WITHIN


def summary(results: dict[str, dict[str, dict[str, Any]]], way: str) -> dict[str, float]:
    """Return the shares of networks that run, are right and reach the arithmetic, and the times."""
    every = [found[way] for found in results.values() if way in found]
    seconds = [one["seconds"] for one in every if one["seconds"] is not None]
    return {
        "networks": len(every),
        "run": sum(bool(one["runs"]) or "outcome" in one for one in every) / len(every),
        "right": sum(outcome(one) in ("right", "left") for one in every) / len(every),
        "reached": sum(is_reached(one) for one in every) / len(every),
        "median_s": statistics.median(seconds) if seconds else float("nan"),
        "slowest_s": max(seconds, default=float("nan")),
    }


def main() -> int:
    """Run it, print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="*", default=["*"], help="patterns of names, such as 'timm/vit*'"
    )
    parser.add_argument("--ratio", type=float, help="share of the channels, instead of arithmetic")
    parser.add_argument("--also", nargs="*", default=[], help="more networks: timm/resnet26t")
    parser.add_argument("--limit", type=int, help="the first so many")
    parser.add_argument("--way", choices=WAYS, help="only one of the two")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--limit-s", type=float, default=_LIMITS_S["prune"], help="for one prune")
    parser.add_argument("--json", type=Path, help="where to write all findings")
    args = parser.parse_args()
    zoo.quiet()
    torch.set_num_threads(1)
    _import_libraries()
    names = [n for n in zoo.available() if any(fnmatchcase(n, only) for only in args.only)]
    names = names[: args.limit]
    names = list(dict.fromkeys((*names, *args.also)))
    left_out = len(zoo.NAMES) - len(zoo.available())
    if left_out:
        print(f"{left_out} networks are left out: their libraries are missing", file=sys.stderr)
    ways = [args.way] if args.way else list(WAYS)
    results: dict[str, dict[str, dict[str, Any]]] = {}
    limits_s = {**_LIMITS_S, "prune": args.limit_s}
    for name, way, found in run(names, ways, args.jobs, limits_s, args.ratio):
        results.setdefault(name, {})[way] = found
        print(f"{name} {_TITLES[way]}: {_line(found)}", file=sys.stderr, flush=True)
    sums = {way: summary(results, way) for way in ways}
    by_package = packages(results, ways), reasons(results), _summary_table(sums)
    print(*(part.to_markdown() for part in (table(results, ways), *by_package)), sep="\n\n")
    if args.json:
        args.json.write_text(json.dumps({"summary": sums, "networks": results}, indent=1))
    mine = sums.get("ours")
    return int(mine is not None and not _kept(mine, by_share=args.ratio is not None))


def _kept(mine: dict[str, float], *, by_share: bool = False) -> bool:
    all_right = mine["run"] == mine["right"] == 1.0
    reached = by_share or mine["reached"] >= REACHED
    return all_right and reached and mine["median_s"] < MEDIAN_S


def _summary_table(sums: dict[str, dict[str, float]]) -> Table:
    rows = [
        [
            _TITLES[way],
            int(one["networks"]),
            *(f"{one[key]:.1%}" for key in ("run", "right", "reached")),
            one["median_s"],
            one["slowest_s"],
        ]
        for way, one in sums.items()
    ]
    columns = ["", "networks", "run", "right", "within 5 % of the MACs", "median s", "slowest s"]
    return Table(columns, rows)


def _line(found: dict[str, Any]) -> str:
    macs = f"{found['macs']:.3f} of the MACs, " if found.get("macs") is not None else ""
    error = f"difference {found['error']:.0e}, " if found.get("error") is not None else ""
    seconds = f"{found['seconds']:.1f} s, " if found.get("seconds") is not None else ""
    notes = "; ".join(str(found[key]) for key in ("fails", "note", "reasons") if found.get(key))
    return f"{macs}{error}{seconds}runs: {verdict(found)} {notes}"


def _import_libraries() -> None:
    """Load what the networks are made of once, before the first process is forked."""
    for library in dict.fromkeys(name.partition("/")[0] for name in zoo.available()):
        zoo.build(next(name for name in zoo.available() if name.startswith(f"{library}/")))
    import torch_pruning  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())
