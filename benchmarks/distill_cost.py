"""What a teacher costs per step, against the same Trainer and student without one.

Fits run in turns in one process, as in overhead.py: each trains a block of steps and hands over to the next, in
random order within each round, in processor time. Student and teacher are those of `+accel=distill`. Beside
the student alone there is: a training step that also calls the teacher and makes nothing of it, so that the
next row shows what an online teacher costs beyond its own forward; the teacher in float32 and in bfloat16;
and a warm cache, where every row of the batch is known. The shares of the gradient are measured once in 200
steps, so one fit measures them in each block, and a two-hundredth of that is added per step in the last row.
The unused forward stands between the student's forward and backward, where a teacher has to run: it takes
the student's activations out of the processor's cache, and before the student's forward it costs less.

    python benchmarks/distill_cost.py [--cases resnet gpt] [--rounds 20] [--fits 3] [--json]

Exit code 1 when the last row is above 1.10 and its interval says that this is no noise.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from overhead import STEPS, WARM_UP, Batches, Turns, ratio, tenth
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from models.gpt import GPT
from models.resnet import ResNet

from lightning_accel import Distillation
from lightning_accel.distillation import Teacher, TeacherCache
from lightning_accel.measure import Table

LIMIT = 1.10
EVERY = 200
"""Steps between two measurements of the shares, as `Distillation` has it."""

KINDS = {
    "plain": "student alone",
    "again": "the same again",
    "forward": "and the teacher's forward, unused",
    "online": "online teacher, float32",
    "bf16": "online teacher, bfloat16",
    "warm": "warm cache",
    "weighed": "warm cache, shares measured in every block",
}


@dataclass(frozen=True)
class Case:
    """A student, its teacher, and what they are fed."""

    student: Callable[[], LightningModule]
    teacher: Callable[[], LightningModule]
    batch: Callable[[], list[Tensor]]
    losses: dict[str, Any]
    top_k: int | None = None


def _images() -> list[Tensor]:
    return [torch.rand(64, 1, 8, 8), torch.randint(10, (64,))]


def _windows() -> list[Tensor]:
    text = torch.randint(256, (16, 129))
    return [text[:, :-1], text[:, 1:]]


CASES = {
    "resnet": Case(
        lambda: ResNet(),
        lambda: ResNet(widths=(128, 256)),
        _images,
        {"kd": {"weight": 0.9, "temperature": 4.0}},
    ),
    "gpt": Case(
        lambda: GPT(depth=2),
        lambda: GPT(depth=4),
        _windows,
        {"kd": {"weight": 0.9, "temperature": 1.0}},
        top_k=16,
    ),
}


class Several(Batches):
    """Some batches again and again, in blocks that take turns."""

    def __init__(self, name: str, turns: Turns, batches: list[list[Tensor]]) -> None:
        super().__init__(name, turns, batches[0])
        self.batches = batches

    def __iter__(self) -> Iterator[list[Tensor]]:
        count = 0
        while self.turns.take(self.name):
            start = time.thread_time()
            for _ in range(STEPS):
                yield self.batches[count % len(self.batches)]
                count += 1
            self.turns.give(self.name, time.thread_time() - start)
        yield self.batch


def with_forward(student: LightningModule, teacher: LightningModule) -> None:
    """Let the training step call the teacher on the same input, for nothing."""
    step = student.training_step
    frozen = [teacher.eval()]  # in a list, so that it is no child

    def training_step(batch: list[Tensor], batch_idx: int) -> Any:
        loss = step(batch, batch_idx)
        with torch.no_grad():
            frozen[0](batch[0])
        return loss

    student.training_step = training_step  # type: ignore[method-assign]


def distillation(kind: str, case: Case, teacher: LightningModule, folder: str) -> Distillation:
    cache = None
    if kind in ("warm", "weighed"):
        cache = TeacherCache(f"{folder}/cache-{kind}", top_k=case.top_k)
    return Distillation(
        Teacher(teacher, precision="bf16-true" if kind == "bf16" else "32-true"),
        case.losses,
        task_weight=0.1,
        cache=cache,
        diagnostics_every_n_steps=STEPS if kind == "weighed" else 0,
    )


def fit(kind: str, turns: Turns, case: Case, batches: list[list[Tensor]], folder: str) -> None:
    """Train in this thread until the turns are over."""
    torch.set_num_threads(1)  # OpenMP keeps it per thread
    try:
        torch.manual_seed(0)
        student, teacher = case.student(), case.teacher()
        if kind == "forward":
            with_forward(student, teacher)
        distils = kind not in ("plain", "again", "forward")
        data = Several(kind, turns, batches)
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=2,
            max_steps=len(data),
            logger=CSVLogger(folder, name=kind),
            callbacks=[distillation(kind, case, teacher, folder)] if distils else [],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(student, data)
    except BaseException as error:
        turns.fail(error)
        raise


def run_together(case: Case, rounds: int) -> dict[str, list[float]]:
    """Run one fit of each kind, in turns, and return the seconds of their blocks."""
    torch.set_num_threads(1)
    turns, batches = Turns(list(KINDS), rounds), [case.batch() for _ in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        threads = [
            threading.Thread(target=fit, args=(kind, turns, case, batches, folder))
            for kind in KINDS
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if turns.failure is not None:
        raise turns.failure
    return {kind: times[WARM_UP:] for kind, times in turns.blocks_s.items()}


def with_evidence(runs: list[dict[str, list[float]]]) -> list[dict[str, list[float]]]:
    """Add to each block of the warm cache what measuring the shares costs per block on average."""
    added = []
    for blocks in runs:
        once_s = tenth(blocks["weighed"]) - tenth(blocks["warm"])
        added.append(
            {**blocks, "default": [block + once_s * STEPS / EVERY for block in blocks["warm"]]}
        )
    return added


def measure(name: str, rounds: int, fits: int) -> dict[str, Any]:
    """Return the time of a step of the student alone, and the ratios to it."""
    runs = with_evidence([run_together(CASES[name], rounds) for _ in range(fits)])
    plain_ms = statistics.median(1000 * tenth(blocks["plain"]) / STEPS for blocks in runs)
    kinds = [kind for kind in (*KINDS, "default") if kind != "plain"]
    return {
        "case": name,
        "plain_step_ms": plain_ms,
        "ratios": {kind: ratio(runs, kind) for kind in kinds},
        "rounds": rounds,
        "fits": fits,
        "torch": torch.__version__,
    }


def table(found: dict[str, Any]) -> Table:
    labels = {**KINDS, "default": f"warm cache, shares every {EVERY} steps (the default)"}
    rows = [
        [labels[kind], part["ratio"], f"{part['low']:.3f} to {part['high']:.3f}"]
        for kind, part in found["ratios"].items()
    ]
    title = f"{found['case']}: time of a step against the student alone, {found['plain_step_ms']:.1f} ms"
    return Table(["", "ratio", "95 % interval"], rows, title)


def main() -> int:
    """Run it, print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=20, help="blocks of each kind in a fit")
    parser.add_argument("--fits", type=int, default=3, help="fits of each kind")
    parser.add_argument("--json", action="store_true", help="print one JSON object per case")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    slow = False
    for name in args.cases:
        found = measure(name, args.rounds, args.fits)
        print(json.dumps(found) if args.json else table(found).to_text() + "\n", flush=True)
        last = found["ratios"]["default"]
        slow = slow or (last["ratio"] > LIMIT and last["low"] > LIMIT)
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
