"""Can real architectures be quantized after training? Each of the zoo, at 8 bits, with random weights.

For each: `quantize` on two batches; the same answer from the network that stores integers (`lowered`), and from its exported
program with batch norms folded; and how much of the output is left, in dB. Random weights say nothing of accuracy: what is
looked for are networks that fail, lose nearly all, or answer otherwise as integers.

    python benchmarks/quantize_zoo.py [--only 'timm/*'] [--every 1] [--json PATH]

Run it in the environment of `make zoo`. A process per network, so that one cannot spoil another.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import statistics
import time
import warnings
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import zoo

from lightning_accel.measure import Table
from lightning_accel.quantization import lowered, quantize
from lightning_accel.quantization.budget import sqnr_db
from lightning_accel.quantization.fold import fold_norms
from lightning_accel.surgery.call import as_call, reals, run

FLOOR_DB, LITTLE_DB = 42.0, 10.0
PATIENCE_S = 180.0


def tried(name: str) -> dict[str, Any]:
    """Return what became of one network."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, example = zoo.build(name)
    net.eval()
    calls = [[as_call(zoo.fresh(example))] for _ in range(2)]
    with torch.no_grad():
        for _ in range(2):  # running statistics that are not those of a new network
            run(net.train(), [as_call(zoo.fresh(example))])
        net.eval()
        before = reals(run(net, calls[0]))
    start = time.monotonic()
    receipt = quantize(net, calibration=calls, rounding="nearest")
    found: dict[str, Any] = {
        "quantized": len(receipt.changes),
        "left": len(receipt.skipped),
        "seconds": time.monotonic() - start,
    }
    with torch.no_grad():
        made = reals(run(net, calls[0]))
        whole = lowered(net)
        found["left_db"] = sqnr_db(before, made)
        found["integers_db"] = sqnr_db(made, reals(run(whole, calls[0])))
        (call,) = calls[0]
        try:
            program: Any = torch.export.export(whole, call.args, call.kwargs, strict=False).module()
        except Exception as error:  # of networks that nobody can trace
            found["export"] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
            return found
        found["folded"] = fold_norms(program)
        found["exported_db"] = sqnr_db(made, reals(program(*call.args, **call.kwargs)))
    return found


def _work(name: str, results: Any) -> None:
    try:
        results.put(tried(name))
    except Exception as error:  # whatever a network may raise
        results.put({"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"})


def one(name: str) -> dict[str, Any]:
    """Try a network in a process of its own."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=_work, args=(name, results))
    process.start()
    try:
        return results.get(timeout=PATIENCE_S)
    except Exception:
        return {"failed": f"no answer within {PATIENCE_S:.0f} s"}
    finally:
        process.kill()
        process.join()


def verdict(found: dict[str, Any]) -> str:
    """Say what is wrong with a result, or nothing."""
    if "failed" in found:
        return found["failed"]
    if found["integers_db"] < FLOOR_DB:
        return f"integers answer otherwise: {found['integers_db']:.1f} dB"
    if found.get("exported_db", FLOOR_DB) < FLOOR_DB:
        return f"the exported program answers otherwise: {found['exported_db']:.1f} dB"
    if found["left_db"] < LITTLE_DB:
        return f"{found['left_db']:.1f} dB are left"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=["*"])
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    zoo.load_torchvision()
    names = [n for n in zoo.available() if any(fnmatchcase(n, p) for p in options.only)]
    everything: dict[str, dict[str, Any]] = {}
    for name in names[:: options.every]:
        everything[name] = one(name)
        print(f"{name}: {verdict(everything[name]) or 'right'} {everything[name]}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(everything, indent=1))
    wrong = {name: said for name, found in everything.items() if (said := verdict(found))}
    left = [found["left_db"] for found in everything.values() if "left_db" in found]
    rows = [[name, said] for name, said in wrong.items()]
    rows += [["right", f"{len(everything) - len(wrong)} of {len(everything)}"]]
    rows += [["dB left, median", f"{statistics.median(left):.1f}"]]
    rows += [["not traced", str(sum("export" in found for found in everything.values()))]]
    print(Table(["network", "verdict"], rows).to_text(120))


if __name__ == "__main__":
    main()
