"""Whether the tuner is ever wrong: many small networks and batch sizes, and every combination on some of them.

Two claims, each measured without the tuner's own clock. A Trainer with what the tuner chose is never slower than
the stock one: both train in turns with real Trainers, see lanes.py, and the stock one twice, which tells what
this measurement can resolve. And on some of them all of {precision} x {matmul precision} x {memory format} x
{optimizer} train side by side by hand: what was chosen is near the best of those that learn the same. The best of
many is partly luck, so the three best run once more beside the chosen one, and only that counts.

    python benchmarks/tune_zoo.py [--pairs mlp_32 conv_16] [--budget-s 4] [--rounds 20] [--compile] [--json]
        [--output FILE.json]

`--compile` also crosses the grid of two networks with compilation, which takes minutes more. Exit code 1 when a tuned
network is slower than 0.97x of plain or farther than 5 % from the best, and the interval says that this is no noise.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lanes import (
    Blocks,
    ByHand,
    Settings,
    about,
    by_trainer,
    gain,
    quiet,
    race,
    step_seconds,
    write,
)
from nets import GPT, Attend, Benchmark, ConvNet
from overhead import tenth
from torch import Tensor, nn
from torch.nn import functional as F
from train_speed import SEARCHED

from lightning_accel import tune
from lightning_accel.measure import Table
from lightning_accel.measure.contention import LoadWatcher
from lightning_accel.precision import matmul

NEVER_SLOWER = 0.97
NEAR_BEST = 1.05
SAME_LOSS = 0.01
"""A combination learns the same when its curve ends nearer than this to plain's, as a share of the first loss."""
SHADOW_STEPS = 20
BLOCK_S = 0.02
FINALISTS = 3
GRID: dict[str, tuple[str, ...]] = {
    "precision": ("plain", "bf16"),
    "matmul_precision": ("plain", "high", "medium"),
    "memory_format": ("plain", "channels_last"),
    "fused_optimizer": ("plain", "fused", "foreach"),
}
COMPILED_GRID: dict[str, tuple[str, ...]] = {
    "precision": ("plain", "bf16"),
    "matmul_precision": ("plain", "medium"),
    "memory_format": ("plain", "channels_last"),
    "fused_optimizer": ("plain", "fused"),
    "compilation": ("plain", "whole"),
}


class Small(Benchmark):
    """A network of the zoo: classes of random inputs, or the input itself to be drawn again."""

    def __init__(
        self, net: nn.Module, *shape: int, batch_size: int, tokens: int = 0, sgd: bool = False
    ) -> None:
        super().__init__()
        self.net, self.shape, self.batch_size = net, shape, batch_size
        self.tokens, self.sgd = tokens, sgd

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        shape = (batch_size, *self.shape)
        if self.tokens:
            x = torch.randint(self.tokens, shape, generator=generator)
        else:
            x = torch.randn(shape, generator=generator)
        return x, torch.randint(10, (batch_size,), generator=generator)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.sgd:
            return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)
        return super().configure_optimizers()


class Redraw(Small):
    """Draws its input again."""

    def loss(self, batch: Any) -> Tensor:
        return F.mse_loss(self(batch[0]).float(), batch[0])


class ViT(nn.Module):
    """Patches of an image, two encoder layers with dropout, and a head."""

    def __init__(self, dim: int = 128, pixels: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 4, 4)
        self.places = nn.Parameter(torch.zeros((pixels // 4) ** 2, dim))
        layer = nn.TransformerEncoderLayer(dim, 4, 4 * dim, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.layers(x).mean(1))


class Recurrent(nn.Module):
    """An LSTM, of which the last output is classified."""

    def __init__(self, features: int = 32, width: int = 96) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(features, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Causal(nn.Module):
    """Attention over vectors in order, then a head on the last."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attend(dim, 2) for _ in range(2))
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, -1])


def mlp(batch_size: int) -> Benchmark:
    """Make three wide linear layers."""
    net = nn.Sequential(
        *(nn.Linear(256, 512), nn.LayerNorm(512), nn.GELU()),
        *(nn.Linear(512, 512), nn.LayerNorm(512), nn.GELU()),
        nn.Linear(512, 10),
    )
    return Small(net, 256, batch_size=batch_size)


def convolutions(kind: str, batch_size: int) -> Benchmark:
    """Make a small image classifier of depthwise or grouped convolutions."""
    width = 64
    groups = width if kind == "depthwise" else 8
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 2, 1)]
    for _ in range(3):
        layers += [nn.Conv2d(width, width, 3, padding=1, groups=groups), nn.Conv2d(width, width, 1)]
        layers += [nn.BatchNorm2d(width), nn.SiLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    return Small(net, 3, 32, 32, batch_size=batch_size, sgd=True)


def autoencoder() -> Benchmark:
    """Make convolutions down and transposed ones up again."""
    net = nn.Sequential(
        *(nn.Conv2d(3, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 4, 2, 1), nn.ReLU()),
        *(nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(32, 3, 4, 2, 1)),
    )
    return Redraw(net, 3, 32, 32, batch_size=16)


def tabular() -> Benchmark:
    """Make a bag of embeddings and two linear layers."""
    net = nn.Sequential(nn.EmbeddingBag(5000, 64), nn.Linear(64, 128), nn.ReLU())
    return Small(net.append(nn.Linear(128, 10)), 16, batch_size=256, tokens=5000)


PAIRS: dict[str, Callable[[], Benchmark]] = {
    "linear_32": lambda: Small(nn.Sequential(nn.Linear(16, 10)), 16, batch_size=32),
    "mlp_1": lambda: mlp(1),
    "mlp_32": lambda: mlp(32),
    "mlp_256": lambda: mlp(256),
    "conv_2": lambda: ConvNet(16, 16, batch_size=2),
    "conv_16": lambda: ConvNet(16, 32, batch_size=16),
    "depthwise_16": lambda: convolutions("depthwise", 16),
    "grouped_16": lambda: convolutions("grouped", 16),
    "autoencoder_16": autoencoder,
    "vit_16": lambda: Small(ViT(), 3, 32, 32, batch_size=16),
    "gpt_1": lambda: GPT(64, 2, 2, 32, 128, batch_size=1),
    "gpt_4": lambda: GPT(128, 4, 2, 64, 256, batch_size=4),
    "causal_16": lambda: Small(Causal(), 32, 64, batch_size=16),
    "lstm_16": lambda: Small(Recurrent(), 24, 32, batch_size=16),
    "tabular_256": tabular,
}
EXHAUSTIVE = ("mlp_32", "mlp_256", "conv_16", "depthwise_16", "autoencoder_16", "gpt_4")
COMPILED = ("mlp_256", "conv_16")


class Entry:
    """One combination of the grid: a loop by hand, its first losses, and the seconds of its blocks."""

    def __init__(self, make: Callable[[], Benchmark], batches: list[Any], settings: Settings):
        self.settings, self._batches, self._count = dict(settings), batches, 0
        self.times: list[float] = []
        with self._process():
            torch.manual_seed(0)
            self._loop = ByHand(make(), settings)
            self.losses = [self._step() for _ in range(SHADOW_STEPS)]
        self.losses = [float(loss) for loss in self.losses]

    def block(self, steps: int) -> None:
        """Train some steps and note their seconds."""
        with self._process():
            start = time.thread_time()
            for _ in range(steps):
                self._step()
            self.times.append((time.thread_time() - start) / steps)

    def gap(self, plain: Entry) -> float:
        """Return how far the learning curve ends from plain's, as a share of the first loss."""
        ends = [statistics.fmean(entry.losses[-5:]) for entry in (self, plain)]
        return abs(ends[0] - ends[1]) / abs(plain.losses[0])

    def _step(self) -> Tensor:
        self._loop.step(self._batches[self._count % len(self._batches)])
        self._count += 1
        return self._loop.last.detach()

    def _process(self) -> Any:
        return matmul.matmul_precision(self.settings.get("matmul_precision", "highest"))


def combinations(make: Callable[[], Benchmark], grid: Mapping[str, tuple[str, ...]]) -> list[dict]:
    """Return every combination of the grid that means something for this network."""
    images = any(isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) for m in make().modules())
    values = {k: v if images or k != "memory_format" else v[:1] for k, v in grid.items()}
    crossed = (
        dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())
    )
    return [{k: v for k, v in settings.items() if v != "plain"} for settings in crossed]


def exhaust(
    make: Callable[[], Benchmark],
    chosen: Settings,
    grid: Mapping[str, tuple[str, ...]],
    rounds: int,
) -> dict[str, Any]:
    """Measure every combination side by side, and the best ones once more beside the chosen one."""
    batches = [make().batch(index) for index in range(4)]
    wanted = combinations(make, grid)
    if dict(chosen) not in wanted:  # such as an attention kernel
        wanted.append(dict(chosen))
    entries = {_name(settings): Entry(make, batches, settings) for settings in wanted}
    plain, own = entries["plain"], entries[_name(chosen)]
    sound = {n: e for n, e in entries.items() if e.gap(plain) <= SAME_LOSS}
    steps = max(1, round(BLOCK_S / step_seconds(make, batches[0])))
    _rounds(list(sound.values()), steps, max(3, rounds // 3))
    best = sorted(sound.values(), key=lambda entry: tenth(entry.times))[:FINALISTS]
    final = list({id(entry): entry for entry in (plain, own, *best)}.values())
    for entry in final:
        entry.times = []
    _rounds(final, steps, 2 * rounds)
    times: Blocks = {_name(entry.settings): entry.times for entry in final}
    first = min(times, key=lambda name: tenth(times[name]))
    behind = gain(times, first, _name(chosen))
    return {
        "combinations": len(entries),
        "unsound": sorted(entries.keys() - sound.keys()),
        "chosen": _name(chosen),
        "best": first,
        "of_best": behind,
        "best_gain": gain(times, first, "plain"),
        "within": behind["ratio"] <= NEAR_BEST,
        "failed": behind["low"] > NEAR_BEST or _name(chosen) not in sound,
    }


def measure(pair: str, budget_s: float, rounds: int, compiled: bool) -> dict[str, Any]:
    """Tune one pair, then race it against plain, and against every combination where asked for."""
    make = PAIRS[pair]
    crossed = compiled and pair in COMPILED
    report = tune(
        make(),
        make().data(4),
        budget_s=60.0 if crossed else budget_s,
        techniques=SEARCHED,
        cache=False,
        accelerator="cpu",
    )
    batches = [make().batch(index) for index in range(4)]
    steps = max(1, round(BLOCK_S / step_seconds(make, batches[0])))
    stock = by_trainer(make, batches, steps)
    tuned = by_trainer(make, batches, steps, report.trainer_arguments)
    watch = LoadWatcher()
    blocks, _ = race({"stock": stock, "tuned": tuned, "stock again": stock}, rounds)
    won, same = gain(blocks, "tuned"), report.settings.label == "plain"
    return {
        "settings": report.settings.label,
        "stock_ms": 1000 * tenth(blocks["stock"]),
        "gain": won,
        "again": gain(blocks, "stock again"),
        "search_s": report.seconds,
        "search_ratio": report.ratio,
        "notes": list(report.notes),
        "load": str(watch.load()),
        # Plain is the stock Trainer itself: its row is one more plain against plain.
        "never_slower": same or won["ratio"] >= NEVER_SLOWER,
        "failed": not same and won["high"] < NEVER_SLOWER,
        "grid": exhaust(make, report.settings.to_dict(), COMPILED_GRID if crossed else GRID, rounds)
        if pair in EXHAUSTIVE
        else None,
    }


def table(pairs: Mapping[str, Any]) -> Table:
    """Return what was found, one row per pair."""
    rows = []
    for pair, found in pairs.items():
        won, again, grid = found["gain"], found["again"], found["grid"]
        of_best = f"{grid['of_best']['ratio']:.3f} of {grid['best']}" if grid else ""
        rows.append(
            [
                pair,
                found["settings"],
                found["stock_ms"],
                f"{won['ratio']:.2f} ({won['low']:.2f} to {won['high']:.2f})",
                "yes" if found["never_slower"] else "no",
                f"{again['low']:.2f} to {again['high']:.2f}",
                of_best,
                "" if not grid else "yes" if grid["within"] else "no",
            ]
        )
    columns = [
        *("network_batch", "chosen", "stock ms", "times as fast", f">= {NEVER_SLOWER}"),
        *("stock again", "time, as that of the best", f"<= {NEAR_BEST}"),
    ]
    grids = [found["grid"] for found in pairs.values() if found["grid"]]
    notes = [
        f"never slower: {sum(f['never_slower'] for f in pairs.values())} of {len(pairs)}; "
        f"near the best of all combinations: {sum(g['within'] for g in grids)} of {len(grids)}"
    ]
    return Table(columns, rows, "What the tuner chose, against stock and against everything", notes)


def _rounds(entries: list[Entry], steps: int, rounds: int) -> None:
    order = random.Random(0)
    for entry in entries:
        entry.block(1)
        entry.times.clear()
    for _ in range(rounds):
        for entry in order.sample(entries, len(entries)):
            entry.block(steps)


def _name(settings: Settings) -> str:
    return " + ".join(settings.values()) or "plain"


def main() -> int:
    """Run it, print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--budget-s", type=float, default=4.0, help="seconds of each search")
    parser.add_argument("--rounds", type=int, default=20, help="blocks of each kind")
    parser.add_argument("--compile", action="store_true", help="cross two grids with compilation")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--output", type=Path, help="a file for the JSON object")
    args = parser.parse_args()
    quiet()
    pairs = {p: measure(p, args.budget_s, args.rounds, args.compile) for p in args.pairs}
    write({"about": about(), "pairs": pairs}, args.output, as_json=args.json)
    if not args.json:
        print(table(pairs).to_text(width=170))
    grids = (found["grid"] for found in pairs.values() if found["grid"])
    return int(any(f["failed"] for f in pairs.values()) or any(g["failed"] for g in grids))


if __name__ == "__main__":
    sys.exit(main())
