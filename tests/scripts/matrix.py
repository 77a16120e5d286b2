"""Every technique under every strategy beside one process: `matrix.py FOLDER ROW/STRATEGY ...`; a JSON per rank.

References are made first, shared among the processes; then all run under each strategy; what goes on in one process
afterwards is shared again.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from composed import (
    EPOCHS,
    ON_FOUR,
    SAVED,
    STRATEGIES,
    ByHand,
    rows_of,
    together,
)  # fmt: skip
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from sharded import apart, trainer, weights

import lightning_accel as la

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.set_num_threads(1)
KINDS = STRATEGIES | ON_FOUR
RANK, WORLD = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
FOLDER = Path(sys.argv[1])
QUICK = os.environ.get("QUICK") == "1"
"""The fit, a fit that goes on from one process's file where that costs little, and loading."""


class Notes(Callback):
    """What validation logged after each epoch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(float(trainer.callback_metrics["val"]))


class Failed(Exception):
    """A run that ended with an error: its text, and whether a step was taken."""


def run(name: str, strategy: str, to: str, ckpt: Any = None) -> dict[str, Any]:
    """Fit and validate with a technique; return weights and what was logged."""
    row, folder = together(name), FOLDER / "runs" / name / to
    folder.mkdir(parents=True, exist_ok=True)
    given = row.make(folder)
    if strategy:
        given |= {"strategy": KINDS[strategy](), "devices": WORLD}
    else:
        given |= {"devices": 1}
    notes = Notes()
    saver = ModelCheckpoint(
        folder / "files", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True
    )
    callbacks = [*given.pop("callbacks", []), notes, saver]
    rows = rows_of(*_place(strategy))
    if strategy == "ddp" and row.module is ByHand:
        given["strategy"] = "ddp_find_unused_parameters_true"
    if row.evaluates:
        techniques, callbacks = callbacks[:-2], callbacks[-2:]
    ours = trainer(
        **given,
        callbacks=callbacks,
        max_epochs=EPOCHS,
        enable_checkpointing=True,
        default_root_dir=folder,
    )
    torch.manual_seed(3)
    module = row.module()
    if ckpt is not None:
        with torch.no_grad():
            for p in module.parameters():
                p.add_(1.0)  # nothing but the file can be where the weights come from
    ours.fit(module, rows, rows, ckpt_path=ckpt)
    if row.evaluates:
        given["strategy"] = KINDS[strategy]() if strategy else "auto"
        ours = trainer(**given, callbacks=techniques)
    validated = ours.validate(module, rows, verbose=False)[0]["val"]
    return {
        "weights": weights(module),
        "logged": [*notes.seen, validated],
        "files": folder / "files",
    }


def _place(strategy: str) -> tuple[int, int]:
    """Return whose rows this process sees, of how many shares."""
    if strategy in ("", "accel_tensor"):
        return 0, 1
    return (RANK // 2, 2) if strategy in ON_FOUR else (RANK, WORLD)


def tried(*given: Any, **more: Any) -> dict[str, Any]:
    try:
        start = time.process_time()
        found = run(*given, **more)
        return found | {"seconds": time.process_time() - start}
    except Exception as error:
        traceback.print_exc()
        frames = traceback.extract_tb(error.__traceback__)
        text = f"{type(error).__name__}: {error}"
        ours = isinstance(error, (la.errors.AccelError, ValueError, TypeError)) and "Do: " in text
        stepped = any(f.name in ("training_step", "optimizer_step") for f in frames)
        return {
            "error": text,
            "refused": ours and not stepped,
            "at": f"{frames[-1].filename}:{frames[-1].lineno}",
        }


def compared(found: dict[str, Any], reference: dict[str, Any], last: int = 0) -> dict[str, Any]:
    """Return the largest differences of weights and logged values."""
    if "error" in found:
        return {k: found[k] for k in ("error", "refused", "at")}
    one, other = found["weights"], reference["weights"]
    if list(one) != list(other):
        return {
            "error": f"other names: {sorted({*one} ^ {*other})[:6]}",
            "refused": False,
            "at": "",
        }
    shapes = [n for n in one if one[n].shape != other[n].shape]
    if shapes:
        return {"error": f"other shapes: {shapes[:4]}", "refused": False, "at": ""}
    logs = [
        abs(a - b)
        for a, b in zip(found["logged"][-last:], reference["logged"][-last:], strict=True)
    ]
    return {"weights": apart(other, one), "logged": max(logs), "seconds": found["seconds"]}


def file_of(found: dict[str, Any]) -> Path:
    return found["files"] / f"epoch={SAVED}.ckpt"


def loaded(name: str, path: Path) -> dict[str, Any]:
    """Load the last file in one process."""
    try:
        module = la.load_from_checkpoint(together(name).module, path)
        return {"weights": weights(module), "logged": [0.0], "seconds": 0.0}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}", "refused": False, "at": ""}


def wait() -> None:
    """Wait for the other processes: what they wrote is there."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", rank=RANK, world_size=WORLD, timeout=timedelta(seconds=600))
    dist.barrier()


def main() -> None:
    cells = [one.split("/") for one in sys.argv[2:]]
    names = list(dict.fromkeys(name for name, _ in cells))
    references = {n: tried(n, "", "alone") for i, n in enumerate(names) if i % WORLD == RANK}
    torch.save(references, FOLDER / f"references{RANK}.pt")
    wait()
    for rank in range(WORLD):
        references |= torch.load(FOLDER / f"references{rank}.pt", weights_only=False)
    results: dict[str, Any] = {name: {} for name in names}
    runs: dict[Any, Any] = {}
    for name, strategy in cells:
        reference, cell = references[name], results[name].setdefault(strategy, {})
        found = runs[name, strategy] = tried(name, strategy, strategy)
        cell["fit"] = compared(found, reference)
        goes_on = {"resume": found, "from one process": reference}
        for what, came in goes_on.items() if "error" not in found else ():
            if not QUICK or (what == "from one process" and strategy != "accel_tensor"):
                again = tried(name, strategy, f"{strategy} {what}", file_of(came))
                cell[what] = compared(again, reference, 2)
        (FOLDER / f"{RANK}.json").write_text(json.dumps(results))
    wait()
    for index, (name, strategy) in enumerate(runs):
        found, reference = runs[name, strategy], references[name]
        if "error" in found or index % WORLD != RANK:
            continue
        cell, last = results[name][strategy], found["files"] / f"epoch={EPOCHS - 1}.ckpt"
        if not QUICK:
            again = tried(name, "", f"{strategy} to one", file_of(found))
            cell["to one process"] = compared(again, reference, 2)
        if not together(name).leaves:
            cell["load"] = compared(loaded(name, last), reference | {"logged": [0.0]})
    (FOLDER / f"{RANK}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
