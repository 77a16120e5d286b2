"""Fit every module of `sharded` in two processes under `FSDP2Strategy`, and alone: `fsdp_fits.py FOLDER`; a JSON per rank."""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from results import write_results
from sharded import CASES, Share, apart, data, made, trainer, weights
from torch.distributed.tensor import DTensor

from lightning_accel.strategies import FSDP2Strategy

warnings.simplefilter("ignore")
torch.set_num_threads(1)


def result(name: str) -> dict[str, Any]:
    case, rank = CASES[name], int(os.environ.get("LOCAL_RANK", "0"))
    alone = made(case.make)
    if case.by_ddp:
        kind = DDPStrategy(find_unused_parameters=True)
        trainer(devices=2, strategy=kind, **case.trainer).fit(alone, data(rank, 2))
    else:
        trainer(devices=1, **case.trainer).fit(alone, data(0, 1))
    module = made(case.make, 3 + 10 * rank)  # all get the weights of the first
    strategy = FSDP2Strategy(**case.strategy)
    share = Share()
    run = trainer(devices=2, strategy=strategy, callbacks=[share], **case.trainer)
    run.fit(module, data(rank, 2))
    return {
        "apart": apart(weights(alone), weights(module)),
        "moved": apart(weights(made(case.make)), weights(alone)) if name != "late" else 1.0,
        "share": share.share,
        "whole": float(not any(isinstance(p, DTensor) for p in module.parameters())),
        "units": list(strategy.found.names),
        "refused": strategy.found.refused,
        "left": [n for n in vars(module) if n.endswith("_step") or "toggle" in n],
    }


if __name__ == "__main__":
    cases = {name: partial(result, name) for name in CASES}
    write_results(cases, sys.argv[2:], Path(sys.argv[1], f"{os.environ['LOCAL_RANK']}.json"))
