"""What it costs to know that a copy, a capture or a recomputation is still right, side by side in one process.

    python benchmarks/footprints.py [--threads 1] [--budget-s 4] [--json]

Each row is a step of about 5 ms with the bookkeeping against the same step without, in short blocks of random order:

- four blocks that recompute by `ActivationCheckpointing`, against `torch.utils.checkpoint` on the same blocks;
- four compiled blocks that are compared with themselves at every 64th call, against blocks that never are;
- a frozen network with its footprint looked at before each call, against its graph alone.

The first and the last also compare results now and then, at every 64th and 128th call; "looks alone" is without.

`share` is the ratio less one, with its 95 % interval; the goal is 2 %. The last rows are microseconds of one look at a
block, by the calmest tenth. Exit code 1 when an interval lies above the goal.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from nets import GPT
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_accel.compilation import compile_blocks, frozen
from lightning_accel.compilation.frozen import Frozen
from lightning_accel.measure.timing import compare, time_call
from lightning_accel.memory import checkpoint_activations
from lightning_accel.surgery.footprint import Footprint
from lightning_accel.surgery.moment import Moments

GOAL = 0.02
_SETTLED = 130
"""Calls after which only every 64th or 128th is compared."""


class Blocks(nn.Module):
    """Four blocks of a transformer; `recomputes` leaves them to torch's own checkpointing."""

    def __init__(self, recomputes: bool = False) -> None:
        super().__init__()
        layers = [nn.TransformerEncoderLayer(128, 4, 512, 0.0, batch_first=True) for _ in range(4)]
        self.layers, self.recomputes = nn.ModuleList(layers), recomputes

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recomputes else layer(x)
        return x


def step_of(net: nn.Module, x: Tensor) -> Callable[[], None]:
    """Return a forward and a backward to call."""

    def step() -> None:
        net.zero_grad()
        net(x).square().mean().backward()

    return step


def pairs(x: Tensor) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Return by name the call without the bookkeeping, and the one with it."""
    torch.manual_seed(0)
    plain = Blocks()
    theirs = Blocks(recomputes=True)
    found: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
    for name, every in (("recomputed", 64), ("recomputed, looks alone", None)):
        ours = copy.deepcopy(plain)
        checkpoint_activations(ours, check_every_n_calls=every)
        found[name] = (step_of(theirs, x), step_of(ours, x))
    sides = []
    for every in (None, 64):
        net = copy.deepcopy(plain)
        compile_blocks(net, backend="aot_eager", check_every_n_calls=every)
        sides.append(step_of(net, x))
    found["compiled"] = (sides[0], sides[1])
    model = GPT()
    net, tokens = model.net.eval(), model.batch(9, 1)[0]
    for name, every in (("frozen", 128), ("frozen, looks alone", None)):
        with frozen(net, backend="eager", check_every_n_calls=every) as networks, torch.no_grad():
            for _ in range(_SETTLED):
                net(tokens)
        found[name] = calls_of(networks[0], tokens)
    return found


def calls_of(network: Frozen, tokens: Tensor) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return a call of the graph alone, and one with the look before it."""
    return (lambda: network._run((tokens,), {})), (lambda: network(tokens))


def main(threads: int, budget_s: float, as_json: bool) -> int:
    """Measure each pair and each look, and print."""
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    for name, (without, having) in pairs(torch.randn(2, 32, 128)).items():
        with torch.set_grad_enabled(not name.startswith("frozen")):
            for _ in range(_SETTLED):
                without(), having()
            gain = compare(having, without, budget_s=budget_s)
        share, low, high = (value - 1 for value in (gain.ratio, gain.low, gain.high))
        rows.append(
            {"what": name, "share": share, "low": low, "high": high, "ms": gain.baseline.p10_ms}
        )
    block = Blocks().layers[0]
    footprint, moments = Footprint(block), Moments(block)
    looks = {
        "footprint holds": lambda: footprint.holds(),
        "without numbers": lambda: footprint.holds(content=False),
        "a moment": lambda: moments.take(),
        "a new footprint": lambda: Footprint(block),
    }
    for name, look in looks.items():
        rows.append({"what": name, "us": 1e3 * time_call(look).p10_ms})
    if as_json:
        print(json.dumps({"benchmark": "footprints", "torch": torch.__version__, "rows": rows}))
    else:
        for row in rows:
            if "us" in row:
                print(f"{row['what']:24s} {row['us']:7.1f} us")
            else:
                print(
                    f"{row['what']:24s} {row['share']:+7.1%} [{row['low']:+.1%} to {row['high']:+.1%}] "
                    f"of {row['ms']:.1f} ms"
                )
    return int(any(row.get("low", 0.0) > GOAL for row in rows))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget-s", type=float, default=4.0, help="of each comparison")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    sys.exit(main(given.threads, given.budget_s, given.json))
