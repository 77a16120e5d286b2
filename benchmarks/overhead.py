"""What our callbacks cost per step, against the same Trainer without them.

Two fits run in turns in one process: each trains a block of steps and hands over to the other, in
random order within each round, so that both see the same machine. The blocks are timed where a
Trainer asks for its next batch, hence with no callback of the benchmark's own. One thread, CPU.

    python benchmarks/overhead.py [--step-ms 5] [--rounds 400] [--json]

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
        """Wait for a turn; false when there are no more, and the other is through as well."""
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
        """Let the other stop as well."""
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
            start = time.perf_counter()
            for _ in range(STEPS):
                yield self.batch
            self.turns.give(self.name, time.perf_counter() - start)
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


def measure(milliseconds: float, rounds: int) -> dict[str, Any]:
    """Return seconds per step of both, and the ratio with its bootstrap interval."""
    torch.set_num_threads(1)
    batch = batch_of(milliseconds)
    turns = Turns(["plain", "ours"], rounds)
    with tempfile.TemporaryDirectory() as folder:
        ours: list[Callback] = [
            StructuredPruning(ratio=0.5, when=1),  # never reached: the steps end within epoch 0
            StepMeter(),
            AccelReport(Path(folder) / "report.json", budget_s=0.1),
        ]
        threads = [
            threading.Thread(target=fit, args=(name, turns, batch, callbacks, folder))
            for name, callbacks in (("plain", []), ("ours", ours))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if turns.failure is not None:
        raise turns.failure
    blocks_s = {name: times[WARM_UP:] for name, times in turns.blocks_s.items()}
    step_ms = {name: 1000 * tenth(times) / STEPS for name, times in blocks_s.items()}
    return {
        "step_ms": step_ms,
        "added_us": 1000 * (step_ms["ours"] - step_ms["plain"]),
        **ratio(blocks_s["ours"], blocks_s["plain"]),
        "batch": len(batch[1]),
        "rounds": rounds,
        "torch": torch.__version__,
    }


def tenth(times: list[float]) -> float:
    """Return the tenth percentile, which other work on the machine disturbs least."""
    return statistics.quantiles(times, n=10, method="inclusive")[0]


def ratio(ours: list[float], plain: list[float]) -> dict[str, float]:
    """Return the ratio of tenth percentiles and its 95 % interval over resampled rounds."""
    choose = random.Random(0)
    resampled = []
    for _ in range(1000):
        picks = choose.choices(range(len(ours)), k=len(ours))
        resampled.append(tenth([ours[i] for i in picks]) / tenth([plain[i] for i in picks]))
    resampled.sort()
    return {"ratio": tenth(ours) / tenth(plain), "low": resampled[25], "high": resampled[974]}


def main() -> int:
    """Run it, print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--step-ms", type=float, default=5.0, help="time of a bare step")
    parser.add_argument("--rounds", type=int, default=400, help="blocks of each")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    found = measure(args.step_ms, args.rounds)
    if args.json:
        print(json.dumps(found))
    else:
        row = [found["step_ms"]["plain"], found["step_ms"]["ours"], f"{found['ratio']:.3f}x"]
        interval = f"{found['low']:.3f} to {found['high']:.3f}"
        columns = ["ms per step without", "with our callbacks", "ratio", "95 % interval"]
        print(
            Table(columns, [[*row, interval]], f"Per-step cost; at most {LIMIT}x wanted").to_text()
        )
    return int(found["ratio"] > LIMIT and found["low"] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
