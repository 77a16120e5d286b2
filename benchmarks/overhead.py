"""What the Trainer's loop costs per step: against a raw loop, per `self.log`, and with our callbacks.

Three parts:

- a Trainer with `LeanLoop`, and a stock one, against a raw PyTorch loop with the same optimizer and the
  same losses logged: the limit of what can be reached;
- microseconds of one `self.log`, stock and lean;
- what our passive callbacks together add to a step, beside as many empty ones, in a stock and a lean loop.

Fits run in turns in one process: each trains a block of steps and hands over to the next, in random
order within each round, so that all see the same machine. A block is timed where a Trainer asks for
its next batch, hence with no callback of the benchmark's own, and in processor time: all the work of
a fit is in its one thread, and what other processes take is not in it. Stock and lean Trainers do not
share a run, because a part of `LeanLoop` acts on all modules of a process; both are compared with raw.

    python benchmarks/overhead.py [--fits 3] [--only raw log callbacks] [--json]

Exit code 1 when a figure is above its goal and its interval says that this is no noise.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_accel import AccelReport, StepMeter, StructuredPruning
from lightning_accel.loop import LeanLoop
from lightning_accel.measure import Table

GOALS = {"4 ms": 1.10, "50 ms": 1.03}
"""Ratio of a lean Trainer, with one `self.log` per step, to the raw loop."""
LOG_GOAL_US, CALLBACKS_GOAL_US = 60.0, 20.0
WARM_UP = 10
"""Rounds before the first that counts."""
STEPS = 5
"""Steps in a block: short, so that the calmest tenth of the blocks is calm even on a busy machine."""
LOG_EVERY = 50


class Net(LightningModule):
    """An MLP of the user's; the batch size sets the time of a step."""

    def __init__(self, logs: int = 0, width: int = 256) -> None:
        super().__init__()
        layers = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.ReLU())]
        self.net, self.logs = nn.Sequential(*layers, nn.Linear(width, 10)), logs

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        for index in range(self.logs):
            self.log(f"loss{index}", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3, fused=True)


class Turns:
    """Who may train now: an order of names, and a block of steps for each entry."""

    def __init__(self, names: list[str], rounds: int, warm_up: int = WARM_UP) -> None:
        order = random.Random(0)
        self.order = [n for _ in range(rounds + warm_up) for n in order.sample(names, len(names))]
        self.blocks_s: dict[str, list[float]] = {name: [] for name in names}
        self.failure: BaseException | None = None
        self._now = 0
        self._changed = threading.Condition()

    def take(self, name: str) -> bool:
        """Wait for a turn; false when there are no more, and the others are through as well."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.failure or self._over or self.order[self._now] == name
            )
            return not self._over and self.failure is None

    def give(self, name: str, seconds: float) -> None:
        """Hand over after a block that took `seconds`."""
        with self._changed:
            self.blocks_s[name].append(seconds)
            self._now += 1
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Let the others stop as well."""
        with self._changed:
            self.failure = error
            self._changed.notify_all()

    @property
    def _over(self) -> bool:
        return self._now >= len(self.order)


class Batches:
    """The same batch again and again, in blocks that take turns."""

    def __init__(self, name: str, turns: Turns, batch: list[Tensor], steps: int = STEPS) -> None:
        self.name, self.turns, self.batch, self.steps = name, turns, batch, steps

    def __len__(self) -> int:
        # One more than the blocks hold: the Trainer does not ask again after its last batch, and a
        # block ends when it asks.
        return 1 + self.steps * sum(name == self.name for name in self.turns.order)

    def __iter__(self) -> Iterator[list[Tensor]]:
        while self.turns.take(self.name):
            start = time.thread_time()
            for _ in range(self.steps):
                yield self.batch
            self.turns.give(self.name, time.thread_time() - start)
        yield self.batch


class Subject(NamedTuple):
    """One of the loops that take turns."""

    callbacks: tuple[Callback, ...] = ()
    logs: int = 0
    raw: bool = False


def step_s(net: Net, batch: list[Tensor]) -> float:
    """Time a bare training step."""
    optimizer, times = net.configure_optimizers(), []
    for _ in range(15):
        start = time.perf_counter()
        net.training_step(batch, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return min(times)


def batch_of(milliseconds: float) -> list[Tensor]:
    """Make a batch whose bare step takes about so long here; 0 is a step of almost nothing."""
    size = 64 if milliseconds else 1
    for _ in range(4 if milliseconds else 0):
        batch = [torch.randn(size, 256), torch.randint(0, 10, (size,))]
        size = max(1, round(size * milliseconds / (1000 * step_s(Net(), batch))))
    width = 256 if milliseconds else 8
    return [torch.randn(size, width), torch.randint(0, 10, (size,))]


def raw_loop(net: Net, batches: Batches) -> None:
    """What the Trainer does, by hand."""
    optimizer = net.configure_optimizers()
    logged: list[float] = []
    for index, batch in enumerate(batches):
        loss = nn.functional.cross_entropy(net.net(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (index + 1) % LOG_EVERY == 0:
            logged.append(loss.item())


def fit(name: str, subject: Subject, turns: Turns, batches: Batches, folder: str) -> None:
    """Train in this thread until the turns are over."""
    torch.set_num_threads(1)  # OpenMP keeps it per thread
    try:
        torch.manual_seed(0)
        net = Net(subject.logs, batches.batch[0].shape[1])
        if subject.raw:
            raw_loop(net, batches)
            return
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=2,
            max_steps=len(batches),
            log_every_n_steps=LOG_EVERY,
            logger=CSVLogger(folder, name=name.replace(" ", "_")),
            callbacks=list(subject.callbacks),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(net, batches)
    except BaseException as error:
        turns.fail(error)
        raise


def passive(folder: str) -> tuple[Callback, ...]:
    """Our callbacks that only look, or have nothing to do in these steps."""
    return (
        StructuredPruning(ratio=0.5, when=1),  # never reached: the steps end within epoch 0
        StepMeter(),
        AccelReport(Path(folder) / "report.json", budget_s=0.1),
    )


def run_together(
    subjects: dict[str, Subject], milliseconds: float, rounds: int, steps: int, warm_up: int
) -> dict[str, list[float]]:
    """Run one fit of each kind, in turns, and return the seconds of their blocks."""
    torch.set_num_threads(1)
    batch, turns = batch_of(milliseconds), Turns(list(subjects), rounds, warm_up)
    with tempfile.TemporaryDirectory() as folder:
        threads = [
            threading.Thread(
                target=fit, args=(name, subject, turns, Batches(name, turns, batch, steps), folder)
            )
            for name, subject in subjects.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if turns.failure is not None:
        raise turns.failure
    return {name: times[warm_up:] for name, times in turns.blocks_s.items()}


def compare(
    subjects: Callable[[str], dict[str, Subject]],
    milliseconds: float,
    fits: int,
    rounds: int,
    steps: int = STEPS,
    warm_up: int = WARM_UP,
) -> dict[str, Any]:
    """Compare subjects with the one that is called "plain": ratios, and microseconds more per step."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(fits):
            runs.append(run_together(subjects(folder), milliseconds, rounds, steps, warm_up))
    plain_us = statistics.median(1e6 * tenth(blocks["plain"]) / steps for blocks in runs)
    found: dict[str, Any] = {"plain_us": plain_us}
    for name in runs[0]:
        if name != "plain":
            part = ratio(runs, name)
            added = {f"{key}_us": plain_us * (value - 1) for key, value in part.items()}
            found[name] = {**part, "added_us": added.pop("ratio_us"), **added}
    return found


def tenth(times: list[float]) -> float:
    """Return the tenth percentile, which other work on the machine disturbs least."""
    return statistics.quantiles(times, n=10, method="inclusive")[0]


def ratio(runs: list[dict[str, list[float]]], kind: str) -> dict[str, float]:
    """Return the mean over fits of the ratio of tenth percentiles, with its 95 % interval.

    Each fit lies elsewhere in memory, which alone is good for a hundredth; so fits are resampled, and
    the rounds within each.
    """
    choose, resampled = random.Random(0), []
    for _ in range(500):
        ratios = []
        for blocks in choose.choices(runs, k=len(runs)):
            picks = choose.choices(range(len(blocks["plain"])), k=len(blocks["plain"]))
            pair = (tenth([blocks[name][i] for i in picks]) for name in (kind, "plain"))
            ratios.append(next(pair) / next(pair))
        resampled.append(statistics.fmean(ratios))
    resampled.sort()
    whole = statistics.fmean(tenth(blocks[kind]) / tenth(blocks["plain"]) for blocks in runs)
    return {"ratio": whole, "low": resampled[12], "high": resampled[487]}


def against_raw(fits: int) -> dict[str, Any]:
    """Measure Trainers with one `self.log` per step against the raw loop."""
    raw = Subject(raw=True)
    found: dict[str, Any] = {}
    for name, milliseconds, counts in (
        ("4 ms", 4.0, {"fits": fits, "rounds": 30}),
        ("50 ms", 50.0, {"fits": max(2, fits // 2), "rounds": 20, "steps": 1, "warm_up": 4}),
    ):
        lean = compare(
            lambda _: {"plain": raw, "lean": Subject((LeanLoop(),), logs=1), "plain again": raw},
            milliseconds,
            **counts,
        )
        stock = compare(lambda _: {"plain": raw, "stock": Subject(logs=1)}, milliseconds, **counts)
        found[name] = {**lean, "stock": stock["stock"], "goal": GOALS[name]}
    return found


def per_log(fits: int) -> dict[str, Any]:
    """Measure what one `self.log` adds to a step of almost nothing."""
    found: dict[str, Any] = {"goal_us": LOG_GOAL_US}
    for name, callbacks in (("stock", ()), ("lean", (LeanLoop,))):
        part = compare(
            lambda _, made=callbacks: {
                "plain": Subject(tuple(kind() for kind in made)),
                "one log": Subject(tuple(kind() for kind in made), logs=1),
                "plain again": Subject(tuple(kind() for kind in made)),
            },
            0.0,
            fits,
            rounds=30,
            steps=40,
        )
        found[name] = part
    return found


def with_callbacks(fits: int) -> dict[str, Any]:
    """Measure what our passive callbacks add to a step of almost nothing, in a stock and a lean loop."""
    found: dict[str, Any] = {"goal_us": CALLBACKS_GOAL_US}
    for name, first in (("stock", ()), ("lean", (LeanLoop,))):
        found[name] = compare(
            lambda folder, first=first: {
                "plain": Subject(tuple(kind() for kind in first)),
                "ours": Subject((*(kind() for kind in first), *passive(folder))),
                "as many empty": Subject(
                    (*(kind() for kind in first), *(Callback() for _ in passive(folder)))
                ),
                "plain again": Subject(tuple(kind() for kind in first)),
            },
            0.0,
            fits,
            rounds=30,
            steps=40,
        )
    return found


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "raw": against_raw, "log": per_log, "callbacks": with_callbacks,
}  # fmt: skip


def missed(found: dict[str, Any]) -> list[str]:
    """Name the goals that were missed beyond noise."""
    names = [
        f"{name} against raw"
        for name, part in found.get("raw", {}).items()
        if part["lean"]["low"] > part["goal"]
    ]
    if "log" in found and found["log"]["lean"]["one log"]["low_us"] > LOG_GOAL_US:
        names.append("self.log")
    if "callbacks" in found and found["callbacks"]["lean"]["ours"]["low_us"] > CALLBACKS_GOAL_US:
        names.append("callbacks")
    return names


def show(found: dict[str, Any]) -> None:
    """Print tables."""
    for name, part in found.get("raw", {}).items():
        rows = [
            [kind, part[kind]["ratio"], f"{part[kind]['low']:.3f} to {part[kind]['high']:.3f}"]
            for kind in ("stock", "lean", "plain again")
        ]
        title = f"Trainer over raw loop, steps of {name}; lean at most {part['goal']} wanted"
        print(Table(["", "ratio", "95 % interval"], rows, title).to_text())
    added = [
        (f"{part}, {loop}: {kind}", found[part][loop][kind])
        for part, kinds in (
            ("log", ("one log", "plain again")),
            ("callbacks", ("ours", "as many empty", "plain again")),
        )
        for loop in ("stock", "lean")
        for kind in kinds
        if part in found
    ]
    if added:
        rows = [
            [name, part["added_us"], f"{part['low_us']:.1f} to {part['high_us']:.1f}"]
            for name, part in added
        ]
        title = (
            f"Microseconds per step; {LOG_GOAL_US:.0f} lean, {CALLBACKS_GOAL_US:.0f} ours wanted"
        )
        print(Table(["", "added us", "95 % interval"], rows, title).to_text())


def main() -> int:
    """Run it, print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--fits", type=int, default=3, help="fits of each kind")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if args.fits < 1:
        parser.error("--fits is at least 1")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    found = {name: PARTS[name](args.fits) for name in args.only}
    misses = missed(found)
    if args.json:
        versions = {"torch": torch.__version__, "lightning": lightning.__version__}
        print(
            json.dumps(
                {**found, "missed": misses, "seconds": time.perf_counter() - start, **versions}
            )
        )
    else:
        show(found)
        print(f"missed: {', '.join(misses) or 'nothing'}")
    return int(bool(misses))


if __name__ == "__main__":
    sys.exit(main())
