"""Fit every module of `sharded` split over all processes, and alone: `tensor_fits.py FOLDER SIZE`; a JSON per rank."""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from results import write_results
from sharded import apart, data, made, trainer, weights
from split import CASES

from lightning_accel.errors import AccelError
from lightning_accel.strategies import TensorParallelStrategy

warnings.simplefilter("ignore")
torch.set_num_threads(1)
WORLD, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))


class Share(Callback):
    """Notes how many numbers of the module this process has in training."""

    held = 0

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.held = sum(
            getattr(p, "to_local", lambda p=p: p)().numel() for p in pl_module.parameters()
        )


def result(name: str, size: int) -> dict[str, Any]:
    case = CASES[name]
    alone = made(case.make)
    trainer(devices=1, **case.trainer).fit(alone, data(0, 1))
    module = made(case.make, 3 + 10 * RANK)  # all get the weights of the first
    strategy = TensorParallelStrategy(tensor_parallel_size=size)
    share = Share()
    run = trainer(devices=WORLD, strategy=strategy, callbacks=[share], **case.trainer)
    try:
        run.fit(module, data(RANK // size, WORLD // size))
    except AccelError as error:
        return {"refused": str(error)}
    assert strategy.plan is not None
    return {
        "apart": apart(weights(alone), weights(module)),
        "moved": apart(weights(made(case.make)), weights(alone)) if name != "late" else 1.0,
        "share": share.held / sum(p.numel() for p in module.parameters()),
        "groups": [g.name for g in strategy.plan.groups],
        "whole": dict(strategy.plan.whole),
        "left": [n for n in vars(module) if n.endswith("_step") or "toggle" in n],
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()),
    }


if __name__ == "__main__":
    size = int(sys.argv[2])
    cases = {name: partial(result, name, size) for name in CASES}
    write_results(cases, sys.argv[3:], Path(sys.argv[1], f"{RANK}.json"))
