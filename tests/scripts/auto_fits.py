"""Fits under `AutoStrategy` in two processes, and alone: `auto_fits.py FOLDER`; a JSON per rank."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from results import write_results
from sharded import GPT, Adam, Manual, Penalty, apart, data, made, trainer, weights

import lightning_accel as la
from lightning_accel.parallel import sharding
from lightning_accel.parallel.meta import materialize
from lightning_accel.strategies import AutoStrategy, FSDP2Strategy

warnings.simplefilter("ignore")
torch.set_num_threads(1)
RANK = int(os.environ.get("LOCAL_RANK", "0"))
KIB = 2**10


def fitted(make: Any, memory: Any, **given: Any) -> dict[str, Any]:
    """Fit alone and under a choice: how far apart they are, what was chosen, and why."""
    alone, ours, auto = made(make), made(make), AutoStrategy(memory=memory)
    trainer(devices=1).fit(alone, data(0, 1))
    run = trainer(devices=2, strategy=auto, **given)
    run.fit(ours, data(RANK, 2))
    kind = type(run.strategy).__name__
    return {"apart": apart(weights(alone), weights(ours)), "kind": kind, "why": auto.why}


class Sends(GPT):
    """A step that talks to the other process, which a plan on one of them must not."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        total = torch.ones(())
        torch.distributed.all_reduce(total) if torch.distributed.is_initialized() else None
        return self.loss(batch)


def shards() -> Any:
    """Copies with all states do not fit; half of the states do."""
    return fitted(Adam, 150 * KIB)


def read_outside() -> Any:
    """Weights that are read around their blocks are planned as they are sharded."""
    return fitted(Penalty, 140 * KIB)


def by_hand() -> Any:
    return fitted(Manual, 30 * KIB)


def sends() -> Any:
    return fitted(Sends, "1GiB")


def relied_on() -> Any:
    """A quantization after the fit needs whole weights, whatever fits."""
    ours = made(GPT)
    after = la.PostTrainingQuantization()
    run = trainer(devices=2, strategy=AutoStrategy(memory=KIB), callbacks=[after])
    run.fit(ours, data(RANK, 2))
    return {"kind": type(run.strategy).__name__}


def again() -> Any:
    """Evaluation first, then a fit and a test, then another module: each is chosen for what it is."""
    run = trainer(devices=2, strategy=AutoStrategy(memory=150 * KIB))
    kinds, first = [], made(Adam)
    run.validate(first, data(RANK, 2), verbose=False)
    kinds.append(type(run.strategy).__name__)
    run.fit(first, data(RANK, 2))
    kinds.append(type(run.strategy).__name__)
    run.test(first, data(RANK, 2), verbose=False)
    kinds.append(type(run.strategy).__name__)
    run.fit_loop.epoch_progress.reset()
    run.fit(made(lambda: GPT(depth=1)), data(RANK, 2))
    kinds.append(type(run.strategy).__name__)
    return {"kinds": kinds}


def folder() -> Any:
    """A folder of shards goes on as shards, though copies would fit."""
    where = Path(sys.argv[1], "shards")
    first = made(Adam)
    run = trainer(devices=2, strategy=FSDP2Strategy(checkpoints="sharded"), max_epochs=1)
    run.fit(first, data(RANK, 2))
    run.save_checkpoint(where)
    alone, ours = made(Adam), made(Adam, seed=9)
    trainer(devices=1).fit(alone, data(0, 1))
    run = trainer(devices=2, strategy="accel_auto")
    run.fit(ours, data(RANK, 2), ckpt_path=where, weights_only=True)
    return {"apart": apart(weights(alone), weights(ours)), "kind": type(run.strategy).__name__}


class OnMeta(GPT):
    """The blocks and the head are made in `configure_model`, where no number is allocated; two weights are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = self.head = None

    def configure_model(self) -> None:
        if self.blocks is None:
            with torch.device("meta"):
                whole = GPT().to(self.dtype)
                self.blocks, self.head = whole.blocks, whole.head
                self.tail = torch.nn.Linear(8, 24, bias=False, dtype=self.dtype)
                self.tail.weight = self.head.weight

    def forward(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)) + self.tail(x)


def seeded(part: Any, rank: int = RANK, **given: Any) -> bool:
    """Each process draws other numbers, and all are to get those of the first."""
    torch.manual_seed(7 + rank)
    return materialize(part, **given)


class MadeWhole(OnMeta):
    """The same with weights, as they are made one unit after another."""

    def configure_model(self) -> None:
        if self.blocks is None:
            super().configure_model()
            for part in (*self.blocks, self):
                seeded(part, 0)


def meta() -> Any:
    """Weights are those of one process that makes them so, and of a file or folder those of that; all learn alike."""
    sharding.materialize = seeded
    alone, ours = made(MadeWhole), made(OnMeta)
    trainer(devices=1).fit(alone, data(0, 1))
    run = trainer(devices=2, strategy=FSDP2Strategy())
    run.fit(ours, data(RANK, 2))
    path = Path(sys.argv[1], "meta.ckpt")
    run.save_checkpoint(path)
    again, more = made(OnMeta, seed=9), made(OnMeta, seed=10)
    whole = made(MadeWhole)
    trainer(devices=1, max_epochs=3).fit(whole, data(0, 1), ckpt_path=path, weights_only=True)
    run = trainer(devices=2, strategy="accel_auto", max_epochs=3)
    run.fit(again, data(RANK, 2), ckpt_path=path, weights_only=True)
    run = trainer(devices=2, strategy=FSDP2Strategy(checkpoints="sharded"), max_epochs=2)
    run.fit(more, data(RANK, 2), ckpt_path=path, weights_only=True)
    return {
        "apart": apart(weights(alone), weights(ours)),
        "from file": apart(weights(whole), weights(again)),
        "loaded": apart(weights(ours), weights(more)),
    }


RUNS = {
    f.__name__: f for f in (shards, read_outside, by_hand, sends, relied_on, again, folder, meta)
}

if __name__ == "__main__":
    write_results(RUNS, sys.argv[2:], Path(sys.argv[1]) / f"{RANK}.json")
