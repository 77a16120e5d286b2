"""Is arithmetic that is gone time that is gone? With channels in measured multiples, and in any number.

    python benchmarks/prune_latency.py [--batch 32] [--shares 0.5 0.3] [--threads 2] [--json PATH]
    python benchmarks/prune_latency.py --depth [--shares 0.5] [--threads 2]

A ResNet, a ViT and a GPT of sizes where arithmetic dominates are cut to shares of their multiply-accumulates.
The forward is then timed beside the dense network's, in one process, in short blocks of random order. The
yield is the share of the time saved over the share of the arithmetic saved: 1 is all of it. Exit status 1
when it is under 0.8 for a network at half of the arithmetic with measured rounding, and its interval says
that this is no noise.

With `--depth` the same networks are cut to the same arithmetic in width, by whole blocks, and by both, and timed at
batch 1 and 32. What the outputs change by is that of untrained networks on 32 samples: it says which of two cuts leaves
more, and nothing about accuracy after fine-tuning.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from models.gpt import GPT
from models.resnet import ResNet
from models.vit import ViT

from lightning_accel.errors import NoEffect
from lightning_accel.measure import Table
from lightning_accel.measure.flops import count_macs
from lightning_accel.measure.timing import compare
from lightning_accel.pruning import Macs, prune
from lightning_accel.pruning.leftover import Leftover
from lightning_accel.surgery.bypass import removed_blocks
from lightning_accel.surgery.call import as_call

WANTED = 0.8
SHARE = 0.5
"""Of the multiply-accumulates; the promise is about this one."""
ROUNDINGS: tuple[int | str, ...] = (1, "measured")


def resnet(batch: int) -> tuple[nn.Module, Tensor]:
    return ResNet(widths=(128, 256), in_channels=3), torch.randn(batch, 3, 32, 32)


def vit(batch: int) -> tuple[nn.Module, Tensor]:
    model = ViT(32, 4, dim=384, depth=6, num_heads=6, in_channels=3)
    return model, torch.randn(batch, 3, 32, 32)


def gpt(batch: int) -> tuple[nn.Module, Tensor]:
    model = GPT(context=64, dim=384, depth=4, num_heads=6)
    return model, torch.randint(0, 256, (batch, 64))


NETS: dict[str, Callable[[int], tuple[nn.Module, Tensor]]] = {
    "ResNet, widths 128 and 256, 32x32": resnet,
    "ViT, width 384, depth 6, 64 tokens": vit,
    "GPT, width 384, depth 4, 64 tokens": gpt,
}


def measure(
    make: Callable[[int], tuple[nn.Module, Tensor]],
    *,
    batch: int,
    share: float,
    rounding: int | str,
    budget_s: float,
) -> dict[str, Any]:
    """Cut one network, and return what of its arithmetic and of its time is left."""
    torch.manual_seed(0)
    dense, example = make(batch)
    small = copy.deepcopy(dense)
    start = time.perf_counter()
    prune(small, example=example, target=Macs(share), round_to=rounding)
    seconds = time.perf_counter() - start
    macs = [count_macs(model, (example,)).macs for model in (dense, small)]
    with torch.inference_mode():
        found = compare(
            partial(dense.eval(), example), partial(small.eval(), example), budget_s=budget_s
        )
    left = macs[1] / macs[0]
    return {
        "macs_left": left,
        "dense_ms": found.baseline.p10_ms,
        "time_left": 1 / found.ratio,
        "yield": (1 - 1 / found.ratio) / (1 - left),
        "low": (1 - 1 / found.low) / (1 - left),
        "high": (1 - 1 / found.high) / (1 - left),
        "gmacs_per_s": [
            macs[0] / found.baseline.p10_ms / 1e6,
            macs[1] / found.candidate.p10_ms / 1e6,
        ],
        "contended": found.contended,
        "prune_s": seconds,
    }


WAYS: dict[str, bool | str] = {"width": False, "blocks": "only", "both": True}
BATCHES = (1, 32)
MULTIPLE = 16  # of channels, the same for all ways


def measure_ways(
    make: Callable[[int], tuple[nn.Module, Tensor]], *, share: float, budget_s: float
) -> list[dict[str, Any]]:
    """Cut one network in each way to one share, and return what each leaves at each batch size."""
    torch.manual_seed(0)
    dense, samples = make(max(BATCHES))
    leftover = Leftover(dense, [[as_call(samples)]], renews=False)
    found = []
    for way, depth in WAYS.items():
        small = copy.deepcopy(dense)
        target, rounding = Macs(share), None if depth == "only" else MULTIPLE
        try:
            prune(small, example=samples, target=target, round_to=rounding, depth=depth)
        except NoEffect as error:
            print(f"{way}, {share:.0%}: {error}", file=sys.stderr)
            continue
        macs = [count_macs(model, (samples,)).macs for model in (dense, small)]
        for batch in BATCHES:
            example = samples[:batch]
            with torch.inference_mode():
                timed = compare(
                    partial(dense.eval(), example),
                    partial(small.eval(), example),
                    budget_s=budget_s,
                )
            found.append(
                {
                    "way": way,
                    "batch": batch,
                    "macs_left": macs[1] / macs[0],
                    "blocks_gone": len(removed_blocks(small)),
                    "change": leftover.of(small),
                    "dense_ms": timed.baseline.p10_ms,
                    "time_left": 1 / timed.ratio,
                    "low": 1 / timed.high,
                    "high": 1 / timed.low,
                    "contended": timed.contended,
                }
            )
    return found


def main_of_depth(args: argparse.Namespace) -> int:
    """Run and print the comparison of width, blocks and both."""
    rows, findings = [], []
    for name, make in NETS.items():
        for share in args.shares if args.only.lower() in name.lower() else ():
            for one in measure_ways(make, share=share, budget_s=args.budget_s):
                findings.append({"net": name, "share": share, **one})
                interval = f"{one['low']:.2f} to {one['high']:.2f}"
                interval += " (busy)" if one["contended"] else ""
                row = [name, one["batch"], one["way"], one["macs_left"], one["blocks_gone"]]
                row += [round(one["change"], 2), one["dense_ms"], one["time_left"], interval]
                rows.append(row)
                print(" | ".join(map(str, rows[-1])), file=sys.stderr, flush=True)
    columns = ["network", "batch", "cut", "MACs left", "blocks gone", "outputs change"]
    columns += ["dense ms", "time left", "95 % interval"]
    note = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}."
    title = f"Width, blocks and both at equal arithmetic, {torch.get_num_threads()} threads"
    print(Table(columns, rows, title, [note]).to_markdown())
    if args.json:
        args.json.write_text(json.dumps(findings, indent=1))
    return 0


def main() -> int:
    """Run it, print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.7, SHARE, 0.3])
    parser.add_argument("--only", default="", help="part of a network's name")
    parser.add_argument("--threads", type=int, help="as many as torch takes by default")
    parser.add_argument("--budget-s", type=float, default=10.0, help="of one measurement")
    parser.add_argument("--depth", action="store_true", help="compare with whole blocks instead")
    parser.add_argument("--json", type=Path, help="where to write all findings")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.depth:
        return main_of_depth(args)
    rows, findings = [], []
    for name, make in NETS.items():
        if args.only.lower() not in name.lower():
            continue
        for share in args.shares:
            for rounding in ROUNDINGS:
                asked = {"net": name, "batch": args.batch, "share": share, "rounding": rounding}
                try:
                    found = measure(
                        make,
                        batch=args.batch,
                        share=share,
                        rounding=rounding,
                        budget_s=args.budget_s,
                    )
                except NoEffect as error:
                    print(f"{name}, {share:.0%}, rounding {rounding}: {error}", file=sys.stderr)
                    continue
                findings.append({**asked, **found})
                rows.append(_row(findings[-1]))
                print(" | ".join(map(str, rows[-1])), file=sys.stderr, flush=True)
    print(_table(rows, args.batch).to_markdown())
    if args.json:
        args.json.write_text(json.dumps(findings, indent=1))
    promised = [f for f in findings if f["share"] == SHARE and f["rounding"] == "measured"]
    return int(any(f["yield"] < WANTED and f["high"] < WANTED for f in promised))


def _row(found: dict[str, Any]) -> list[Any]:
    before, after = found["gmacs_per_s"]
    return [
        found["net"],
        found["share"],
        {1: "none"}.get(found["rounding"], found["rounding"]),
        found["macs_left"],
        found["dense_ms"],
        found["time_left"],
        round(found["yield"], 2),
        f"{found['low']:.2f} to {found['high']:.2f}" + (" (busy)" if found["contended"] else ""),
        f"{before:.0f} -> {after:.0f}",
    ]


def _table(rows: list[list[Any]], batch: int) -> Table:
    columns = ["network", "MACs asked", "rounding", "MACs left", "dense ms", "time left"]
    columns += ["yield", "95 % interval", "GMAC/s"]
    return Table(
        columns,
        rows,
        f"Time saved / arithmetic saved at batch {batch}, {torch.get_num_threads()} threads",
        [
            f"Wanted: a yield of at least {WANTED} at {SHARE:.0%} with measured rounding.",
            f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}.",
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
