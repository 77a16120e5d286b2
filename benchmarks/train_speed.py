"""How much faster `AutoTune` makes stock Lightning, and how near that is to a loop written by hand.

Each network trains in six ways at once: a stock Trainer (fp32, the user's own AdamW, a `self.log` in each step),
the same again, and for each tier of numerics the same Trainer with what the tuner chose (and `LeanLoop`) and a
bare PyTorch loop with the same tricks by hand: the limit. The fits run in turns in one process, as in overhead.py:
one trains at a time, also while it sets up, and what it changes in the process (how float32 products are computed)
is put back when it hands over. Clock: processor time of the one thread. Beside the times: matrix products measured
in this process (the roofline) and the arithmetic of a step, counted by torch's dispatcher.

    python benchmarks/train_speed.py [--cases mlp gpt_d256] [--tiers amp exact] [--budget-s 10] [--rounds 30]
        [--json] [--output FILE.json] [--picture FILE.svg]

Exit code 1 when a tuned Trainer is slower than the stock one and its interval says that this is no noise, or when
it does not learn the same. Missed goals are marked and are no failure: they are of one machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lanes import (
    Blocks,
    about,
    by_hand,
    by_trainer,
    gain,
    loss_gap,
    quiet,
    race,
    step_seconds,
    write,
)
from lightning.pytorch import LightningModule
from nets import NETS
from overhead import tenth
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_accel import tune
from lightning_accel.loop import LeanLoop
from lightning_accel.measure import Table
from lightning_accel.measure.contention import LoadWatcher
from lightning_accel.pages import bars
from lightning_accel.precision import matmul
from lightning_accel.tuning.settings import TECHNIQUES

GOALS = {
    "amp": {"mlp": 2.4, "gpt_d256": 2.1, "gpt_d512": 2.6, "cnn_32px": 2.0, "cnn_64px": 2.5},
    "exact": {"mlp": 1.9, "gpt_d512": 1.7, "cnn_32px": 1.3},
}
"""Times as fast as stock Lightning; by default the tiers are run that have a goal."""
SEARCH_STEPS = 40
"""A search may take as long as so many plain steps, up to the tuner's own default: ten seconds cannot judge steps of two."""
DEFAULT_S = 60.0
LIMITS = {50.0: 1.03, 3.0: 1.10}
"""At most so many times the step by hand, for steps that take at least so many milliseconds by hand."""
SEARCHED = tuple(name for name in TECHNIQUES if name != "loading")
"""Without data loading: the batches here lie in memory, and are handed out by this benchmark."""
NEVER_SLOWER = 0.97
BLOCK_S = 0.05
SAME_LOSS = 0.02
"""Learning curves may end so far apart, as a share of the first loss."""


def peaks(size: int = 1024, device: str = "cpu", seconds: float = 0.3) -> dict[str, float]:
    """Measure square matrix products: GFLOP/s by precision, the best of many."""
    found, before = {}, matmul.read()
    for name, dtype in (
        ("fp32", torch.float32),
        ("medium", torch.float32),
        ("bf16", torch.bfloat16),
    ):
        matmul.apply("medium" if name == "medium" else "highest")
        one, two = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        times, end = [], time.perf_counter() + seconds
        while len(times) < 3 or time.perf_counter() < end:
            start = time.thread_time()
            one @ two
            times.append(time.thread_time() - start)
        found[name] = 2e-9 * size**3 / max(min(times), 1e-9)
    matmul.write(before)
    return found


def step_gflop(module: LightningModule, batch: Any) -> float:
    """Count the arithmetic of forward and backward, with attention as the two products that it is."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        module.loss(batch).backward()
    module.zero_grad()
    return counter.get_total_flops() / 1e9


def measure(
    case: str,
    tiers: list[str],
    budget_s: float,
    most_rounds: int,
    techniques: tuple[str, ...] = SEARCHED,
) -> dict[str, Any]:
    """Tune one network for each tier, then race stock, tuned and by hand."""
    make = NETS[case]
    batches = [make().batch(index) for index in range(4)]
    step_s = step_seconds(make, batches[0])
    search_s = max(budget_s, min(SEARCH_STEPS * step_s, DEFAULT_S))
    reports = {
        tier: tune(
            make(),
            make().data(4),
            numerics=tier,
            budget_s=search_s,
            techniques=techniques,
            cache=False,
            accelerator="cpu",
        )
        for tier in tiers
    }
    steps = max(1, round(BLOCK_S / step_s))
    runs = {n: by_trainer(make, batches, steps) for n in ("stock", "stock again")}
    for tier, report in reports.items():
        runs[tier] = by_trainer(make, batches, steps, lambda report=report: _tuned(report))
        runs[f"{tier} by hand"] = by_hand(make, batches, steps, report.settings.to_dict())
    round_s = steps * step_s * (2 + sum(2 / report.ratio for report in reports.values()))
    rounds = min(most_rounds, max(min(5, most_rounds), round(1.5 * budget_s / round_s)))
    watch = LoadWatcher()
    blocks, losses = race(runs, rounds)
    gflop, torch_peaks = step_gflop(make(), batches[0]), peaks()
    return {
        "stock_ms": 1000 * tenth(blocks["stock"]),
        "again": gain(blocks, "stock again"),
        "gflop": gflop,
        "peaks_gflops": torch_peaks,
        "stock_gflops": gflop / tenth(blocks["stock"]),
        "rounds": rounds,
        "steps_per_block": steps,
        "load": str(watch.load()),
        "tiers": {
            tier: _row(case, tier, reports[tier], blocks, losses, gflop, torch_peaks)
            for tier in tiers
        },
    }


def table(cases: Mapping[str, Any]) -> Table:
    """Return what was found, one row per network and tier."""
    rows = []
    for case, found in cases.items():
        for tier, row in found["tiers"].items():
            goal, limit = row["goal"], row["limit_goal"]
            gain_, by = row["gain"], row["to_hand"]
            rows.append(
                [
                    f"{case}, {tier}",
                    row["settings"],
                    found["stock_ms"],
                    row["tuned_ms"],
                    f"{gain_['ratio']:.2f} ({gain_['low']:.2f} to {gain_['high']:.2f})",
                    _goal(goal, "" if row["reached"] else ", missed"),
                    f"{by['ratio']:.3f} ({by['low']:.3f} to {by['high']:.3f})",
                    _goal(limit, "" if row["limit_kept"] else ", missed"),
                    f"{row['gflops']:.0f} of {row['peak_gflops']:.0f}",
                    f"{row['loss_gap']:.1e}",
                ]
            )
    again = [f"{c} {f['again']['low']:.2f} to {f['again']['high']:.2f}" for c, f in cases.items()]
    columns = [
        *("", "chosen", "stock ms", "tuned ms", "times as fast", "goal"),
        *("of the step by hand", "at most", "GFLOP/s of peak", "loss apart"),
    ]
    notes = [f"stock against stock again: {'; '.join(again)}"]
    return Table(columns, rows, "A training step, stock Lightning against AutoTune", notes)


def picture(cases: Mapping[str, Any]) -> str:
    """Draw the gains as SVG."""
    rows = [(c, tier, row) for c, f in cases.items() for tier, row in f["tiers"].items()]
    panels = {
        "AutoTune, times as fast as stock": [row["gain"]["ratio"] for _, _, row in rows],
        "the same tricks in a loop by hand": [row["hand_gain"]["ratio"] for _, _, row in rows],
    }
    labels = [f"{case}, {tier}: {row['settings']}" for case, tier, row in rows]
    return bars(labels, panels, title="Training step on CPU against stock Lightning").to_svg()


def _tuned(report: Any) -> dict[str, Any]:
    given = report.trainer_arguments()
    return {**given, "callbacks": [*given["callbacks"], LeanLoop()]}


def _row(
    case: str,
    tier: str,
    report: Any,
    blocks: Blocks,
    losses: Mapping[str, list[float]],
    gflop: float,
    found_peaks: Mapping[str, float],
) -> dict[str, Any]:
    settings = report.settings.to_dict()
    hand, tuned = f"{tier} by hand", tenth(blocks[tier])
    hand_ms, to_hand = 1000 * tenth(blocks[hand]), gain(blocks, hand, tier)
    limit = next((most for ms, most in LIMITS.items() if hand_ms >= ms), None)
    goal, won = GOALS[tier].get(case), gain(blocks, tier)
    fp32 = max(found_peaks["fp32"], found_peaks["medium"])  # convolutions have their own kernels
    products = found_peaks["medium" if "matmul_precision" in settings else "fp32"]
    plain = fp32 if case.startswith("cnn") else products
    return {
        "settings": report.settings.label,
        "search_s": report.seconds,
        "search_ratio": report.ratio,
        "notes": list(report.notes),
        "trials": report.to_dict()["trials"],
        "tuned_ms": 1000 * tuned,
        "hand_ms": hand_ms,
        "gain": won,
        "hand_gain": gain(blocks, hand),
        "goal": goal,
        "reached": goal is None or won["ratio"] >= goal,
        "to_hand": to_hand,
        "limit_goal": limit,
        "limit_kept": limit is None or to_hand["ratio"] <= limit,
        "gflops": gflop / tuned,
        "peak_gflops": found_peaks["bf16"] if "precision" in settings else plain,
        "loss_gap": loss_gap(losses, tier),
        "failed": won["high"] < NEVER_SLOWER or not loss_gap(losses, tier) <= SAME_LOSS,
    }


def _goal(goal: float | None, missed: str) -> str:
    return "" if goal is None else f"{goal:g}{missed}"


def main() -> int:
    """Run it, print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--tiers", nargs="+", choices=list(GOALS), help="those with a goal")
    parser.add_argument("--budget-s", type=float, default=10.0, help="seconds of each search")
    parser.add_argument("--techniques", nargs="+", choices=SEARCHED, default=SEARCHED)
    parser.add_argument("--rounds", type=int, default=30, help="most blocks of each kind")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--output", type=Path, help="a file for the JSON object")
    parser.add_argument("--picture", type=Path, help="an SVG file to draw")
    args = parser.parse_args()
    quiet()
    tiers = {c: args.tiers or [t for t in GOALS if c in GOALS[t]] for c in args.cases}
    limits = args.budget_s, args.rounds, tuple(args.techniques)
    cases = {c: measure(c, tiers[c], *limits) for c in args.cases}
    write({"about": about(), "cases": cases}, args.output, as_json=args.json)
    if args.picture:
        args.picture.write_text(picture(cases))
    if not args.json:
        print(table(cases).to_text(width=180))
    return int(any(row["failed"] for found in cases.values() for row in found["tiers"].values()))


if __name__ == "__main__":
    sys.exit(main())
