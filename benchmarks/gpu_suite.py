"""What tuning gives on one GPU, and how much of the machine is used: one command, under nine minutes on an H200.

First the machine's own peaks: matrix products of several shapes and the bandwidth of a copy. Then GPT-124M, a
ResNet-50 at 224 pixels, a GPT of 1.1 billion weights (also with an activation memory budget, and in float8), a
small image network whose kernels are short, and an MLP with steps of about a millisecond. Each trains with stock
Lightning in fp32 and in bf16-mixed, with what the tuner chose, and in a bare loop with the same tricks by hand.

A GPU of one's own drifts little, so fits run one after another, which leaves all its memory to each; stock
bf16-mixed runs first and last, and the two tell what this measurement can resolve. Clocks, power and temperature
are logged for each block, and blocks in which the clock was 3 % lower than in others of their fit do not count. Idle
is the share of an untraced step in which no kernel ran, whose time is that of a trace of 20 steps. Compilation is
paid within the search, from an empty cache, and told apart.

    python benchmarks/gpu_suite.py [--cases gpt_124m mlp] [--seconds 3] [--limit 520] [--json] [--output FILE.json]
    python benchmarks/gpu_suite.py --tiny --device cpu

The second runs every path with tiny sizes, in less than a minute, and means nothing. Exit code 2 without a GPU, 1
when a tuned network is slower than 0.97x of stock fp32.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from gpu_clock import Clocks, Course, peaks
from gpu_nets import CASES
from lanes import ByHand, about, quiet, write
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from nets import Benchmark
from train_speed import SEARCHED, step_gflop

from lightning_accel import tune
from lightning_accel.loop import LeanLoop
from lightning_accel.measure import Table
from lightning_accel.precision import matmul
from lightning_accel.tuning.report import TuneReport
from lightning_accel.tuning.settings import Settings

DATASHEET_TFLOPS = 989.0
"""bf16, dense, of H100 and H200 (SXM); shares of it mean little on another GPU."""
CLOCK_DROP = 0.03
NEVER_SLOWER = 0.97
LIMIT = (20.0, 1.02)
"""For steps that take so many milliseconds by hand, at most so many times that."""
BUDGET = "0.5"
COMPILED = "auto, compiled"
FLOAT8_GOAL = 1.15
"""Times as fast as compiled bf16 on wide layers, or the tuner has to decline it."""


class Suite:
    """The machine, its peaks, and the time that is left."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.tiny, self.seconds = args.device, args.tiny, args.seconds
        self.traced = 3 if self.tiny else 20
        self.end = time.perf_counter() + args.limit
        self.clocks = Clocks(self.device)
        self.accelerator = "gpu" if self.device == "cuda" else "cpu"
        self.peaks = peaks(self.device, self.tiny)

    def left_s(self) -> float:
        """Return how many seconds are left."""
        return self.end - time.perf_counter()

    def measure(self, name: str) -> dict[str, Any]:
        """Search, and train one network in every way."""
        case = CASES[name]
        make = case.tiny if self.tiny else case.make
        batches = [[part.to(self.device) for part in make().batch(i)] for i in range(2)]
        self.gflop = step_gflop(make().to("meta"), [part.to("meta") for part in batches[0]])
        self.rows: dict[str, dict[str, Any]] = {}
        mixed = {"precision": "bf16-mixed"}
        self._row("stock bf16-mixed", lambda c: self._fit(make, c, mixed), batches)
        report = self._tune(make, case.search_s, "amp")
        best = report.settings
        self._row("auto", lambda c: self._fit(make, c, _arguments(best)), batches)
        self._row("by hand", lambda c: self._by_hand(make, c, best), batches)
        self._row("stock fp32", lambda c: self._fit(make, c, {}), batches, traced=False)
        low = None
        if case.wide:
            low = self._wide(make, batches, best)
        self._row("stock bf16-mixed again", lambda c: self._fit(make, c, mixed), batches)
        found = {
            "gflop": self.gflop,
            "goal": case.goal,
            "mfu_goal": case.mfu_goal,
            "chosen": best.label,
            "search_s": report.seconds,
            "compile_s": {t.value: t.compile_s for t in report.trials if t.compile_s is not None},
            "trials": report.to_dict()["trials"],
            "notes": list(report.notes),
            "float8": low,
            "rows": self.rows,
        }
        return {**found, **_ratios(self.rows)}

    def _wide(self, make: Callable[[], Benchmark], batches: list[Any], best: Settings) -> str:
        """Measure a memory budget, which needs compiled blocks, and float8; say what the tuner makes of that."""
        if best["compilation"] == "plain":
            best = best.having("compilation", "blocks")
        saving = best.having("memory", BUDGET)
        name = f"auto + memory budget {BUDGET}"
        self._row(name, lambda c: self._fit(make, c, _arguments(saving)), batches)
        self._row(
            f"by hand + memory budget {BUDGET}", lambda c: self._by_hand(make, c, saving), batches
        )
        low = self._tune(
            make, 20.0, "low", ("precision", "float8", "fused_optimizer", "compilation")
        )
        verdicts = [f"{t.verdict}: {t.reason}" for t in low.trials if t.technique == "float8"]
        if importlib.util.find_spec("torchao") is None:
            self.rows["float8"] = {"skipped": "torchao is not installed"}
        elif self.device != "cuda" or torch.cuda.get_device_capability() < (8, 9):
            self.rows["float8"] = {"skipped": f"{self.device} has no float8 units"}
        else:
            short = best.having("float8", "tensorwise")
            self._row(COMPILED, lambda c: self._fit(make, c, _arguments(best)), batches)
            self._row("float8", lambda c: self._fit(make, c, _arguments(short)), batches)
        return "; ".join(verdicts) or "not tried"

    def _row(
        self, name: str, run: Callable[[Course], None], batches: list[Any], traced: bool = True
    ) -> None:
        """Run one fit alone; what fails, or no longer fits into the time, is said in its row."""
        if self.left_s() < 3 * self.seconds:
            self.rows[name] = {"skipped": "no time was left"}
            return
        course = Course(batches, self.device, self.seconds, self.traced if traced else 0)
        self._clear()
        try:
            run(course)
            self.rows[name] = self._told(course)
        except Exception as error:  # one of many rows: the others are worth having
            self.rows[name] = {"skipped": f"{type(error).__name__}: {error}"}

    def _told(self, course: Course) -> dict[str, Any]:
        samples = [self.clocks.between(block.start, block.end) for block in course.blocks]
        mhz = [statistics.fmean(s.mhz for s in some) if some else None for some in samples]
        highest = max((m for m in mhz if m is not None), default=0.0)
        steady = [m is None or m >= (1 - CLOCK_DROP) * highest for m in mhz]
        times = [block.step_s for block, good in zip(course.blocks, steady, strict=True) if good]
        step_s = float(torch.tensor(times, dtype=torch.float64).quantile(0.1))
        every = [sample for some in samples for sample in some]
        tflops = self.gflop / step_s / 1000
        return {
            "step_ms": 1000 * step_s,
            "spread": statistics.median(times) / step_s,
            "blocks": len(times),
            "dropped": len(course.blocks) - len(times),
            "first_step_s": course.first_step_s,
            "tflops": tflops,
            "mfu": tflops / DATASHEET_TFLOPS,
            "mfu_measured": tflops / self.peaks["bf16_tflops"],
            "idle": _idle(course.kernels_s, step_s),
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30
            if self.device == "cuda"
            else None,
            "mhz": highest or None,
            "watts": statistics.fmean(s.watts for s in every) if every else None,
            "degrees": max((s.degrees for s in every), default=None),
        }

    def _fit(self, make: Callable[[], Benchmark], course: Course, given: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                accelerator=self.accelerator,
                devices=1,
                max_epochs=1,
                logger=CSVLogger(folder),
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                **given,
            )
            torch.manual_seed(0)
            trainer.fit(make(), course)

    def _by_hand(self, make: Callable[[], Benchmark], course: Course, best: Settings) -> None:
        settings = best.to_dict()
        with ExitStack() as held:
            held.enter_context(matmul.matmul_precision(settings.get("matmul_precision", "highest")))
            if "memory" in settings:
                budget = float(settings["memory"])
                config = torch._functorch.config
                held.enter_context(config.patch(activation_memory_budget=budget))
            torch.manual_seed(0)
            loop = ByHand(make(), settings, self.device)
            for batch in course:
                loop.step(batch)

    def _tune(
        self,
        make: Callable[[], Benchmark],
        budget_s: float,
        numerics: str,
        techniques: tuple[str, ...] = SEARCHED,
    ) -> TuneReport:
        self._clear()
        budget_s = 0.5 if self.tiny else max(1.0, min(budget_s, self.left_s() / 4))
        torch.manual_seed(0)
        try:
            return tune(
                make(),
                make().data(2),
                numerics=numerics,
                budget_s=budget_s,
                techniques=techniques,
                cache=False,
                accelerator=self.accelerator,
            )
        except Exception as error:  # the other rows are worth having
            return TuneReport(notes=[f"the search failed: {type(error).__name__}: {error}"])

    def _clear(self) -> None:
        torch.compiler.reset()  # no compiled module is alive here
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def table(whole: Mapping[str, Any]) -> Table:
    """Return what was found, one row per network and way."""
    cases, limits = whole["cases"], whole["peaks"]
    rows: list[list[Any]] = []
    for case, found in cases.items():
        for name, row in found["rows"].items():
            label = f"{case}, {name}"
            if "skipped" in row:
                rows.append([label, None, None, None, None, None, None, None, row["skipped"]])
                continue
            rows.append(
                [
                    label,
                    row["step_ms"],
                    f"{row['to_stock']:.2f}x" if row.get("to_stock") else None,
                    f"{row['mfu']:.1%}",
                    f"{row['mfu_measured']:.1%}",
                    None if row["idle"] is None else f"{row['idle']:.0%}",
                    row["peak_gib"],
                    row["first_step_s"],
                    _remark(found, name),
                ]
            )
    shown = ("bf16_tflops", "fp32_highest_tflops", "fp32_high_tflops", "float8_tflops", "copy_tb_s")
    notes = [
        "peaks measured here: " + ", ".join(f"{n} {limits[n]:.4g}" for n in shown if limits[n])
    ]
    notes += [f"{name}: no time was left" for name in whole["left_out"]]
    for case, found in cases.items():
        notes += [f"{case}: {note}" for note in found["notes"]]
        if found["float8"]:
            gained = found["float8_gain"]
            measured = f"{gained:.2f}x of compiled bf16, goal {FLOAT8_GOAL}; " if gained else ""
            notes.append(
                f"{case}, float8: {measured}the tuner at numerics='low': {found['float8']}"
            )
    columns = ["", "step ms", "of bf16-mixed", f"MFU of {DATASHEET_TFLOPS:.0f}", "MFU of measured"]
    columns += ["idle", "peak GiB", "first step s", ""]
    return Table(columns, rows, "One GPU: stock Lightning, AutoTune, by hand", notes)


def _remark(found: Mapping[str, Any], name: str) -> str:
    if name == "auto":
        limit = found.get("to_hand")
        by = f"; {limit:.3f} of the step by hand" if limit else ""
        return f"{found['chosen']}; goal {found['goal'] or '-'}x{by}"
    return f"goal of MFU {found['mfu_goal']:.0%}" if name == "by hand" and found["mfu_goal"] else ""


def _ratios(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Note each row's gain over stock bf16-mixed, and the ratios that goals are about."""
    ms = {name: row["step_ms"] for name, row in rows.items() if "step_ms" in row}
    stock = [ms[n] for n in ("stock bf16-mixed", "stock bf16-mixed again") if n in ms]
    for name in ms if stock else ():
        rows[name]["to_stock"] = statistics.fmean(stock) / ms[name]

    def over(one: str, other: str) -> float | None:
        return ms[one] / ms[other] if one in ms and other in ms else None

    to_hand, to_fp32 = over("auto", "by hand"), over("stock fp32", "auto")
    return {
        "again": over("stock bf16-mixed again", "stock bf16-mixed"),
        "to_hand": to_hand,
        "to_fp32": to_fp32,
        "float8_gain": over(COMPILED, "float8"),
        "limit_kept": to_hand is None or ms["by hand"] < LIMIT[0] or to_hand <= LIMIT[1],
        "failed": to_fp32 is not None and to_fp32 < NEVER_SLOWER,
    }


def _arguments(settings: Settings) -> dict[str, Any]:
    given = TuneReport(settings).trainer_arguments()
    return {**given, "callbacks": [*given["callbacks"], LeanLoop()]}


def _idle(kernels_s: float | None, step_s: float) -> float | None:
    return None if kernels_s is None else max(0.0, 1 - kernels_s / step_s)


def main() -> int:
    """Run it, print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seconds", type=float, help="of each fit under the clock; 3, tiny 0.1")
    parser.add_argument("--limit", type=float, default=520.0, help="seconds of the whole, about")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--output", type=Path, help="a file for the JSON object")
    args = parser.parse_args()
    if args.device == "cpu" and not args.tiny:
        parser.error("sizes are those of a GPU; --device cpu goes with --tiny")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu_suite: needs a CUDA device, and PyTorch finds none here.", file=sys.stderr)
        return 2
    args.seconds = args.seconds or (0.1 if args.tiny else 3.0)
    quiet()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as held:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # cold, whatever ran here before
        if args.tiny:
            os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # starting more costs seconds
        suite = Suite(args)
        held.callback(suite.clocks.close)
        found: dict[str, Any] = {"about": _about(args), "peaks": suite.peaks, "cases": {}}
        found["left_out"] = []
        for name in args.cases:
            if suite.left_s() < 10 * args.seconds:
                found["left_out"].append(name)
                continue
            found["cases"][name] = suite.measure(name)
            write(found, args.output, as_json=False)  # whatever happens to the rest
    if args.json:
        write(found, None, as_json=True)
    else:
        print(table(found).to_text(width=190))
    return int(any(case["failed"] for case in found["cases"].values()) and not args.tiny)


def _about(args: argparse.Namespace) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    return {**about(), "device": name, "tiny": args.tiny, "clock": "wall", "seconds": args.seconds}


if __name__ == "__main__":
    sys.exit(main())
