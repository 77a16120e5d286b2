"""What our callbacks cost per step, against the same Trainer without them.

Fits run in turns in one process: each trains a block of steps and hands over to the next, in random
order within each round, so that all see the same machine. A block is timed where a Trainer asks for
its next batch, hence with no callback of the benchmark's own, and in processor time: all the work of
a fit is in its one thread, and what other processes take is not in it.

    python benchmarks/overhead.py [--step-ms 5] [--rounds 60] [--fits 8] [--json]

Exit code 1 when the ratio is above 1.02 and its interval says that this is no noise.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_accel import AccelReport, StepMeter, StructuredPruning
from lightning_accel.measure import Table

LIMIT = 1.02
KINDS = ("plain", "ours", "plain again")
"""The third differs from the first in nothing, and so tells what the measurement can resolve."""
WARM_UP = 10
"""Rounds before the first that counts."""
STEPS = 5
"""Steps in a block: short, so that the calmest tenth of the blocks is calm even on a busy machine."""


class Net(LightningModule):
    """An MLP of the user's; the batch size sets the time of a step."""

    def __init__(self) -> None:
        super().__init__()
        layers = [layer for _ in range(4) for layer in (nn.Linear(256, 256), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(256, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


class Turns:
    """Who may train now: an order of names, and a block of steps for each entry."""

    def __init__(self, names: list[str], rounds: int) -> None:
        order = random.Random(0)
        self.order = [n for _ in range(rounds + WARM_UP) for n in order.sample(names, len(names))]
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

    def __init__(self, name: str, turns: Turns, batch: list[Tensor]) -> None:
        self.name, self.turns, self.batch = name, turns, batch

    def __len__(self) -> int:
        # One more than the blocks hold: the Trainer does not ask again after its last batch, and a
        # block ends when it asks.
        return 1 + STEPS * sum(name == self.name for name in self.turns.order)

    def __iter__(self) -> Iterator[list[Tensor]]:
        while self.turns.take(self.name):
            start = time.thread_time()
            for _ in range(STEPS):
                yield self.batch
            self.turns.give(self.name, time.thread_time() - start)
        yield self.batch


def step_s(net: Net, batch: list[Tensor]) -> float:
    """Time a bare training step."""
    optimizer, times = torch.optim.SGD(net.parameters(), 1e-3), []
    for _ in range(15):
        start = time.perf_counter()
        net.training_step(batch, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return min(times)


def batch_of(milliseconds: float) -> list[Tensor]:
    """Make a batch whose bare step takes about so long here."""
    size = 64
    for _ in range(4):
        batch = [torch.randn(size, 256), torch.randint(0, 10, (size,))]
        size = max(1, round(size * milliseconds / (1000 * step_s(Net(), batch))))
    return [torch.randn(size, 256), torch.randint(0, 10, (size,))]


def fit(
    name: str, turns: Turns, batch: list[Tensor], callbacks: list[Callback], folder: str
) -> None:
    """Train in this thread until the turns are over."""
    torch.set_num_threads(1)  # OpenMP keeps it per thread
    try:
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=2,
            max_steps=len(Batches(name, turns, batch)),
            logger=CSVLogger(folder, name=name),
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        torch.manual_seed(0)
        trainer.fit(Net(), Batches(name, turns, batch))
    except BaseException as error:
        turns.fail(error)
        raise


def run_together(milliseconds: float, rounds: int) -> dict[str, list[float]]:
    """Run one fit of each kind, in turns, and return the seconds of their blocks."""
    torch.set_num_threads(1)
    batch, turns = batch_of(milliseconds), Turns(list(KINDS), rounds)
    with tempfile.TemporaryDirectory() as folder:
        ours: list[Callback] = [
            StructuredPruning(ratio=0.5, when=1),  # never reached: the steps end within epoch 0
            StepMeter(),
            AccelReport(Path(folder) / "report.json", budget_s=0.1),
        ]
        threads = [
            threading.Thread(target=fit, args=(kind, turns, batch, ours * (kind == "ours"), folder))
            for kind in KINDS
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if turns.failure is not None:
        raise turns.failure
    return {kind: times[WARM_UP:] for kind, times in turns.blocks_s.items()}


def measure(milliseconds: float, rounds: int, fits: int) -> dict[str, Any]:
    """Return milliseconds per step of each kind, and their ratios to the plain one."""
    runs = [run_together(milliseconds, rounds) for _ in range(fits)]
    plain_ms = statistics.median(1000 * tenth(blocks["plain"]) / STEPS for blocks in runs)
    ours, again = (ratio(runs, kind) for kind in ("ours", "plain again"))
    return {
        "plain_step_ms": plain_ms,
        "added_us": 1000 * plain_ms * (ours["ratio"] - 1),
        **ours,
        "plain_again": again,
        "rounds": rounds,
        "fits": fits,
        "torch": torch.__version__,
    }


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


def main() -> int:
    """Run it, print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--step-ms", type=float, default=5.0, help="time of a bare step")
    parser.add_argument("--rounds", type=int, default=60, help="blocks of each kind in a fit")
    parser.add_argument("--fits", type=int, default=8, help="fits of each kind")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    found = measure(args.step_ms, args.rounds, args.fits)
    if args.json:
        print(json.dumps(found))
    else:
        rows = [
            [name, part["ratio"], f"{part['low']:.3f} to {part['high']:.3f}"]
            for name, part in (
                ("with our callbacks", found),
                ("the same again", found["plain_again"]),
            )
        ]
        title = f"Time of a step of {found['plain_step_ms']:.1f} ms; at most {LIMIT}x wanted"
        print(Table(["", "ratio", "95 % interval"], rows, title).to_text())
    return int(found["ratio"] > LIMIT and found["low"] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
