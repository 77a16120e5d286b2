"""What is the fastest way to predict? Ratios to the eager float32 network, side by side in one process.

    python benchmarks/infer_speed.py [--threads 1] [--budget-s 2] [--json]

Four cases of three small networks: images in batches of 16, one sequence, one row, and 256 rows. Against the
eager float32 network under `inference_mode` stand bfloat16 weights, with channels last for images, and
frozen copies (`lightning_accel.compilation.frozen`) in float32 and bfloat16. Each is compared in short blocks
of random order; the ratio is that of tenth percentiles, with its 95 % interval. The first row of a case is
the network against itself, and shows what difference means nothing. `error` is the norm of the difference
of the outputs, relative. bfloat16 alone can be slower where batches are small: that is what this is for.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from nets import GPT, MLP, ConvNet
from torch import Tensor, nn

from lightning_accel.compilation import frozen
from lightning_accel.compilation.difference import difference
from lightning_accel.measure.timing import compare


class Case(NamedTuple):
    """A network and the batch it predicts."""

    net: nn.Module
    x: Tensor


class Way(NamedTuple):
    """One way to predict: how the network and its input are prepared, and whether it is frozen."""

    dtype: torch.dtype | None = None
    channels_last: bool = False
    freeze: bool = False


WAYS = {
    "eager float32 again": Way(),
    "bf16 weights": Way(torch.bfloat16),
    "bf16 weights, channels last": Way(torch.bfloat16, channels_last=True),
    "frozen": Way(freeze=True),
    "frozen bf16": Way(torch.bfloat16, freeze=True),
}


def cases() -> dict[str, Case]:
    """Return the four cases, with statistics of batch norm that are not those of a new network."""
    found = {}
    for name, model, size in (
        ("CNN w32 32px, batch 16", ConvNet(), 16),
        ("GPT d256 L4 T128, batch 1", GPT(), 1),
        ("MLP 784-512x3, batch 1", MLP(), 1),
        ("MLP 784-512x3, batch 256", MLP(), 256),
    ):
        with torch.no_grad():
            for index in range(3):
                model.net(model.batch(index, 64 if not isinstance(model, GPT) else 1)[0])
        found[name] = Case(model.net.eval(), model.batch(9, size)[0])
    return found


def candidate(case: Case, way: Way, stack: ExitStack) -> tuple[Callable[[], Any], Any]:
    """Return the call to measure, and what it gives."""
    net, x = copy.deepcopy(case.net), case.x
    images = x.dim() == 4
    if way.freeze:
        weights = "bf16-true" if way.dtype is not None else None
        (one,) = stack.enter_context(frozen(net, precision=weights, channels_last=images))
        net(x)  # the first call compiles and compares, and returns what the network itself gives
        result = net(x)
        if one.reason or one.num_missed:
            raise RuntimeError(f"no frozen graph was used: {one.reason}")
        return lambda: net(x), result
    memory_format = torch.channels_last if way.channels_last else torch.preserve_format

    def prepared(value: Tensor) -> Tensor:
        dtype = way.dtype if value.is_floating_point() else None
        fits = value.dim() == 4
        return value.to(
            dtype or value.dtype, memory_format=memory_format if fits else torch.preserve_format
        )

    net._apply(prepared)
    return lambda: net(prepared(x)), net(prepared(x))


def main(threads: int, budget_s: float, as_json: bool) -> int:
    """Measure every way of every case, and print."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    begun = time.perf_counter()
    for name, case in cases().items():
        if not as_json:
            print(name)
        for label, way in WAYS.items():
            if way.channels_last and case.x.dim() != 4:
                continue
            with torch.inference_mode(), ExitStack() as stack:
                started = time.perf_counter()
                call, found = candidate(case, way, stack)
                error = difference(found.float(), case.net(case.x))
                prepared_s = time.perf_counter() - started
                gain = compare(lambda case=case: case.net(case.x), call, budget_s=budget_s)
            row = {
                "case": name,
                "way": label,
                **{key: getattr(gain, key) for key in ("ratio", "low", "high", "busy")},
                "baseline_ms": gain.baseline.p10_ms,
                "error": error,
                "prepared_s": prepared_s,
            }
            rows.append(row)
            if not as_json:
                doubt = "  (contended)" if gain.contended else ""
                print(
                    f"  {label:28s} {gain.ratio:5.2f}x [{gain.low:.2f}-{gain.high:.2f}]  "
                    f"error {error:.1e}  ready in {prepared_s:4.1f} s{doubt}"
                )
    if as_json:
        where = {"torch": torch.__version__, "cpu": platform.processor(), "threads": threads}
        print(json.dumps({"benchmark": "infer_speed", **where, "rows": rows}))
    else:
        print(f"{time.perf_counter() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget-s", type=float, default=2.0, help="of each comparison")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    sys.exit(main(given.threads, given.budget_s, given.json))
