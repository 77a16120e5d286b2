"""Whole lives of sharded or split runs beside those of one process: `strategy_runs.py FOLDER [NAME ...]`; a JSON per rank.

The variable KIND says which: `fsdp`, `tensor`, or `fsdp_tensor` (four processes). Each function returns numbers that should be 0, or values of both sides under `alone` and `sharded`.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from results import write_results
from sharded import GPT, Adam, Manual, Scalar, Share, apart, data, made, trainer, weights

import lightning_accel as la
from lightning_accel.strategies import FSDP2Strategy, TensorParallelStrategy

warnings.simplefilter("ignore")
torch.set_num_threads(1)
RANK = int(os.environ.get("LOCAL_RANK", "0"))
KIND, MANY = os.environ.get("KIND", "fsdp"), int(os.environ.get("WORLD_SIZE", "2"))
STRATEGY: Any = {
    "fsdp": FSDP2Strategy,
    "tensor": TensorParallelStrategy,
    "fsdp_tensor": partial(TensorParallelStrategy, tensor_parallel_size=2),
}[KIND]
FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
Found = dict[str, Any]


def run(world: int, strategy: dict[str, Any] | None = None, **given: Any) -> Any:
    if world == 1:
        return trainer(devices=1, **given)
    return trainer(devices=MANY, strategy=STRATEGY(**(strategy or {})), **given)


def rows(world: int) -> Any:
    """Each process its part of every batch; those that share a network all of it."""
    if world == 1 or KIND == "tensor":
        return data(0, 1)
    return data(RANK if KIND == "fsdp" else RANK // 2, 2)


def fit(
    module: Any,
    world: int,
    ckpt: Any = None,
    strategy: Any = None,
    validates: bool = False,
    **given: Any,
) -> Any:
    ours = run(world, strategy, **given)
    ours.fit(module, rows(world), rows(world) if validates else None, ckpt_path=ckpt)
    return ours


def compared(alone: Any, sharded: Any) -> float:
    return apart(weights(alone), weights(sharded))


def files(make: Callable[[], Any]) -> Found:
    """From and to any number of processes, the run goes on as one that was never interrupted."""
    whole = made(make)
    fit(whole, 1, max_epochs=2)
    paths = {}
    for world in (1, 2):
        module = made(make)
        ours = fit(module, world, max_epochs=1)
        paths[world] = FOLDER / f"{make.__name__}-{world}-{RANK if world == 1 else 'both'}.ckpt"
        ours.save_checkpoint(paths[world])
        ours.strategy.barrier()
    found = {}
    for came, path in paths.items():
        for goes in (1, 2):
            module = made(make)
            with torch.no_grad():
                for p in module.parameters():
                    p.add_(1.0)  # nothing but the file can be where the weights come from
            fit(module, goes, path, max_epochs=2)
            found[f"{came} to {goes}"] = compared(whole, module)
    stored = {n: torch.load(p, weights_only=True) for n, p in paths.items()}
    found["keys"] = float(list(stored[1]["state_dict"]) != list(stored[2]["state_dict"]))
    layouts = [[list(o["state"]) for o in stored[n]["optimizer_states"]] for n in (1, 2)]
    found["layout"] = float(layouts[0] != layouts[1])
    return found


def file_of_adam() -> Found:
    return files(Adam)


def file_of_two_optimizers() -> Found:
    return files(Manual)


def file_with_a_scalar() -> Found:
    return files(Scalar)


def folder() -> Found:
    """A folder of shards, for the same strategy on two processes and on one."""
    if KIND != "fsdp":
        try:
            STRATEGY(checkpoints="sharded")
        except la.errors.Unsupported as error:
            return {"refused": float("Do: " not in str(error))}
    whole, module = made(Adam), made(Adam)
    fit(whole, 1, max_epochs=2)
    shards = {"checkpoints": "sharded"}
    ours = fit(module, 2, max_epochs=1, strategy=shards)
    ours.save_checkpoint(FOLDER / "shards")
    again = made(Adam)
    fit(again, 2, FOLDER / "shards", shards, max_epochs=2)
    other = made(Adam)
    fit(other, 2, FOLDER / "shards", max_epochs=2)  # which itself would write one file
    alone = la.load_from_checkpoint(Adam, FOLDER / "shards")
    first = made(Adam)
    fit(first, 1, max_epochs=1)
    return {
        "2 to 2": compared(whole, again),
        "read by whole": compared(whole, other),
        "read by one process": compared(first.float(), alone),
    }


def evaluation() -> Found:
    """Validate, test and predict before, between and after fits."""
    sides: Found = {}
    for world in (1, 2):
        module, loader = made(GPT), rows(world)
        ours = run(world, max_epochs=1)
        seen = [
            ours.validate(module, loader, verbose=False),
            ours.test(module, loader, verbose=False),
        ]
        ours.fit(module, loader, loader)
        seen += [{"val": float(ours.callback_metrics["val"])}]
        predicted = torch.cat(ours.predict(module, loader))
        ours.fit_loop.max_epochs = 2
        ours.fit(module, loader)
        seen += [ours.validate(module, loader, verbose=False)]
        sides["alone" if world == 1 else "sharded"] = [seen, weights(module), predicted]
    part = RANK if KIND == "fsdp" else RANK // 2
    mine = torch.arange(32).view(4, 8)[:, part * 4 : part * 4 + 4].flatten()
    mine = torch.arange(32) if KIND == "tensor" else mine
    return {
        "alone": json.dumps(sides["alone"][0]),
        "sharded": json.dumps(sides["sharded"][0]),
        "weights": apart(sides["alone"][1], sides["sharded"][1]),
        "predicted": float((sides["alone"][2][mine] != sides["sharded"][2]).sum()),
    }


class Inside(GPT):
    """The network is called past the module's own hooks."""

    def loss(self, batch: Any) -> torch.Tensor:
        return F.cross_entropy(self.forward(batch[0]).flatten(0, 1), batch[1].flatten())


def averages() -> Found:
    """Averages of weights that callbacks keep, and their files."""
    found: Found = {}
    kinds: dict[str, Callable[[], Callback]] = {
        "moving": lambda: EMAWeightAveraging(decay=0.9),
        "stochastic": lambda: StochasticWeightAveraging(0.1, swa_epoch_start=1, device=None),
    }
    for name, kind in kinds.items():
        one, two = made(GPT), made(GPT)
        fit(one, 1, callbacks=[kind()], max_epochs=3)
        ours = fit(two, 2, callbacks=[kind()], max_epochs=3)
        found[name] = compared(one, two)
        path = FOLDER / f"{name}.ckpt"
        ours.save_checkpoint(path)
        state = torch.load(path, weights_only=True)["state_dict"]
        between = made(Inside)  # hooks between loops, after a validation that gathered all at once
        at_once = {"units": ()} if KIND == "fsdp" else None
        fit(between, 2, None, at_once, True, callbacks=[kind()], max_epochs=3)
        found[f"{name}, validated"] = compared(one, between)
        found[f"{name}, file"] = apart({n: one.state_dict()[n] for n in state}, state)
    return found


def pruned() -> Found:
    """A network that was pruned in one process goes on in two; and its file goes on alone."""
    one, path = made(GPT), FOLDER / f"pruned-{RANK}.ckpt"
    prune = [la.StructuredPruning(ratio=0.5, when=1)]
    ours = fit(one, 1, callbacks=prune, max_epochs=2)
    ours.save_checkpoint(path)
    after = copy.deepcopy(one)
    fit(after, 1, path, max_epochs=3, callbacks=[la.ActivationCheckpointing()])
    two = made(GPT)
    ours = fit(two, 2, path, max_epochs=3, callbacks=[la.ActivationCheckpointing()])
    ours.save_checkpoint(FOLDER / "pruned-both.ckpt")
    ours.strategy.barrier()
    loaded = la.load_from_checkpoint(GPT, FOLDER / "pruned-both.ckpt")
    return {"went on": compared(after, two), "file": apart(weights(two.float()), weights(loaded))}


def pruned_file() -> Found:
    """A file of the middle of a run, after a prune, holds the whole pruned network."""
    found: Found = {}
    path, state = FOLDER / f"middle-{KIND}.ckpt", {}

    class Saves(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(path)

    class Looks(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                state.update(weights(pl_module))

    prune = lambda: la.StructuredPruning(ratio=0.5, when=1)  # noqa: E731
    one, two = made(GPT), made(GPT)
    if KIND == "tensor":
        fit(one, 1, callbacks=[prune(), Looks()], max_epochs=3)
    ours = fit(two, 2, callbacks=[prune(), Saves()], max_epochs=3)
    ours.strategy.barrier()
    loaded = la.load_from_checkpoint(GPT, path).double()
    if state:
        found["weights"] = max(
            apart(state, weights(loaded)) - 1e-6, 0.0
        )  # the file is of float32 modules
    again = made(GPT)
    fit(again, 2, path, callbacks=[prune()], max_epochs=3)
    found["went on"] = compared(two, again)
    return found


REFUSED: dict[str, Callable[[], dict[str, Any]]] = {
    "budget": lambda: {
        "callbacks": [la.BlockCompile(backend="aot_eager"), la.ActivationBudget(0.5)]
    },
    "fused SGD": lambda: {"callbacks": [la.FusedOptimizer()]},
    "tuning": lambda: {"callbacks": [la.AutoTune(budget_s=1.0, cache=False)]},
    "bf16 weights": lambda: {"plugins": [la.Bf16Precision("master")]},
    "average in folders": lambda: {
        "callbacks": [EMAWeightAveraging()],
        "strategy": {"checkpoints": "sharded"},
    },
}


def refused() -> Found:
    """What does not work on shards says so, with what to do."""
    found: Found = {}
    for name, given in REFUSED.items():
        if (
            name in ("fused SGD", "average in folders") and KIND == "tensor"
        ):  # whose weights are no shards
            continue
        try:
            fit(made(GPT), 2, **given())
            found[name] = "it ran"
        except la.errors.AccelError as error:
            found[name] = 0.0 if "Do: " in str(error) else str(error)
    return found


PRUNES: dict[str, tuple[Any, Callable[[], list[Any]]]] = {
    "at the start, by taylor": (
        Adam, lambda: [la.StructuredPruning(ratio=0.3, when=0, importance="taylor")],
    ),
    "in steps, beside an average": (
        Adam,
        lambda: [la.StructuredPruning(target=la.Macs(0.6), when=[1, 2]), EMAWeightAveraging(decay=0.9)],
    ),
    "taken back": (GPT, lambda: [la.StructuredPruning(ratio=0.7, when=1, max_drop=1e-9, monitor="val", mode="max")]),
    "by hand": (Manual, lambda: [la.StructuredPruning(ratio=0.5, when=1)]),
    "compiled": (GPT, lambda: [la.StructuredPruning(ratio=0.5, when=1), la.BlockCompile(backend="aot_eager")]),
    "a scalar": (Scalar, lambda: [la.StructuredPruning(ratio=0.5, when=1)]),
}  # fmt: skip


def truth() -> dict[str, Any]:
    """Return what a prune is compared with: DDP where processes rank by the gradients of their own batches."""
    if KIND == "tensor":
        return {"devices": 1}
    return {"devices": MANY, "strategy": DDPStrategy(find_unused_parameters=True)}


def pruning() -> Found:
    """A prune in mid-training: the module is made whole, cut, and sharded or split again."""
    found: Found = {}
    few = ("in steps, beside an average", "by hand")
    for name, (make, callbacks) in PRUNES.items():
        if KIND != "fsdp" and name not in few:
            continue
        try:
            sides = []
            for strategy in (truth(), {"devices": MANY, "strategy": STRATEGY()}):
                module, loader = made(make), rows(2)
                shares = Share()
                given = [*callbacks(), shares]
                ours = trainer(**strategy, callbacks=given, max_epochs=3)
                ours.fit(module, loader, loader if name == "taken back" else None)
                sides.append(module)
            if KIND == "fsdp":
                found[f"{name}, shares"] = max(shares.share - 0.52, 0.0)
            found[name] = compared(*sides)
            sizes = [sum(p.numel() for p in m.parameters()) for m in (*sides, made(make))]
            found[f"{name}, cut"] = float((sizes[1] < sizes[2]) == (name == "taken back"))
        except Exception as error:
            traceback.print_exc()
            found[name] = f"{type(error).__name__}: {error}"
    return found


RUNS = {
    f.__name__: f
    for f in (
        file_of_adam, file_of_two_optimizers, file_with_a_scalar, folder, evaluation, averages,
        pruned, pruned_file, pruning, refused,
    )
}  # fmt: skip

if __name__ == "__main__":
    write_results(RUNS, sys.argv[2:], FOLDER / f"{RANK}.json")
