"""Fits under `AccelDDPStrategy` in two processes, and alone: `ddp_fits.py FOLDER`; a JSON per rank."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from results import write_results
from sharded import (
    GPT,
    BatchNorm,
    Experts,
    Fixed,
    Frozen,
    Manual,
    ManualAll,
    SkipsByData,
    Tied,
    apart,
    data,
    made,
    trainer,
    weights,
)
from torch import nn
from torch.utils.data import DataLoader

import lightning_accel as la
from lightning_accel.strategies import AccelDDPStrategy, FSDP2Strategy

warnings.simplefilter("ignore")
torch.set_num_threads(1)
RANK = int(os.environ.get("LOCAL_RANK", "0"))


class Unused(GPT):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(8, 8)


CASES: dict[str, tuple[Any, bool, dict[str, Any]]] = {
    # module, whether unused weights are looked for, arguments of the Trainer
    "all used": (GPT, False, {}),
    "tied": (Tied, False, {"gradient_clip_val": 0.05}),
    "frozen": (Frozen, False, {"accumulate_grad_batches": 2}),
    "unused": (Unused, True, {}),
    "experts": (Experts, True, {}),
    "toggled": (Manual, True, {}),
    "by hand": (ManualAll, True, {}),
}


def fit(make: Any, strategy: Any, rows: Any = None, **given: Any) -> Any:
    module = made(make)
    ours = trainer(devices=1 if strategy == "auto" else 2, strategy=strategy, **given)
    ours.fit(module, rows or data(*((0, 1) if strategy == "auto" else (RANK, 2))))
    return module, ours


def equal(name: str) -> Any:
    make, finds, given = CASES[name]
    alone, _ = fit(make, "auto", **given)
    ours, run = fit(make, AccelDDPStrategy(), **given)
    assert run.strategy._ddp_kwargs["find_unused_parameters"] is finds, name
    return apart(weights(alone), weights(ours))


def skips() -> float:
    theirs, _ = fit(SkipsByData, DDPStrategy(find_unused_parameters=True))
    return apart(weights(theirs), weights(fit(SkipsByData, AccelDDPStrategy())[0]))


def statistics() -> float:
    theirs, _ = fit(BatchNorm, DDPStrategy())
    return apart(weights(theirs), weights(fit(BatchNorm, AccelDDPStrategy())[0]))


def pruned() -> float:
    def prune() -> list[Any]:
        return [la.StructuredPruning(ratio=0.5, when=1)]

    theirs, _ = fit(GPT, DDPStrategy(), callbacks=prune(), max_epochs=3)
    ours, _ = fit(GPT, AccelDDPStrategy(), callbacks=prune(), max_epochs=3)
    return apart(weights(theirs), weights(ours))


def uneven() -> dict[str, float]:
    """A last batch of six rows: four for one process, two for the other."""
    dataset = data(0, 1).dataset
    parts = [[range(8), range(8, 16), range(16, 22)]]
    parts += [[range(4), range(8, 12), range(16, 20)], [range(4, 8), range(12, 16), range(20, 22)]]
    loaders = [
        DataLoader(dataset, batch_sampler=Fixed([list(rows) for rows in part])) for part in parts
    ]
    alone, _ = fit(GPT, "auto", loaders[0])
    plain, _ = fit(GPT, AccelDDPStrategy(), loaders[1 + RANK])
    ours, _ = fit(GPT, AccelDDPStrategy(weigh_rows=True), loaders[1 + RANK])
    assert apart(weights(alone), weights(plain)) > 1e-5, "nothing is shown"
    return {"weighed": apart(weights(alone), weights(ours))}


def compressed() -> dict[str, float]:
    """16 bits on the wire: near, equal on all processes, and really short."""
    sent: list[torch.dtype] = []
    reduce = dist.all_reduce

    def noting(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.dtype)
        return reduce(tensor, *args, **kwargs)

    alone, _ = fit(GPT, "auto")
    dist.all_reduce = noting
    try:
        ours, _ = fit(GPT, AccelDDPStrategy(compression="bf16"))
    finally:
        dist.all_reduce = reduce
    near = apart(weights(alone), weights(ours))
    assert 1e-12 < near < 2e-3 and torch.bfloat16 in sent and torch.float64 not in sent
    found = torch.cat([t.flatten() for t in weights(ours).values()])
    other = found.clone()
    dist.broadcast(other, 0)
    return {"ranks": float((found - other).abs().max())}


def by_name() -> float:
    """The words that a Trainer knows once this package is imported."""
    alone, _ = fit(GPT, "auto")
    return max(
        apart(weights(alone), weights(fit(GPT, name)[0])) for name in ("accel_ddp", "accel_fsdp")
    )


def in_order() -> dict[str, float]:
    """`DataLoader(shuffle=False)` is read in order, by all processes together; one that shuffles is shuffled."""
    dataset = data(0, 1).dataset
    alone, _ = fit(GPT, "auto", DataLoader(dataset, 8))
    found = {}
    for kind in (AccelDDPStrategy, FSDP2Strategy):
        ours, run = fit(GPT, kind(), DataLoader(dataset, 4), use_distributed_sampler=True)
        found[kind.__name__] = apart(weights(alone), weights(ours))
        assert not run.train_dataloader.sampler.shuffle
        _, run = fit(
            GPT, kind(), DataLoader(dataset, 4, shuffle=True), use_distributed_sampler=True
        )
        assert run.train_dataloader.sampler.shuffle
    return found


RUNS: dict[str, Any] = {name: lambda name=name: equal(name) for name in CASES}
RUNS |= {f.__name__: f for f in (skips, statistics, pruned, uneven, compressed, by_name, in_order)}

if __name__ == "__main__":
    write_results(RUNS, sys.argv[2:], Path(sys.argv[1], f"{RANK}.json"))
