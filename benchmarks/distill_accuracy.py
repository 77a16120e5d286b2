"""What a student gains from a teacher: the same network, data, steps and seeds, with and without one.

Three tasks, each deliberately hard for a student alone. *digits*: a tiny ResNet sees ten images of each
class; its teacher, 33 times the size, was trained on all of the training part. *pydoc*: a GPT sees 320
short windows of Python's own reference; its teacher has twice the depth and saw ten times as many.
*pruning*: a ResNet under mixed precision loses three quarters of its channels in mid-training; it learns
from what it was before the cut, and from no other teacher.

    python benchmarks/distill_accuracy.py [--tasks digits pydoc pruning] [--seeds N] [--jobs 2] [--json PATH]

A seed chooses the images or windows, their order and the student's first weights; both sides of a comparison
share it, so the difference is taken seed by seed. What is named after a preset has its settings, read from
its yaml. Weights and temperatures were chosen on seeds 100 to 111, which are not reported. A loss helps
when its mean difference lies above two standard errors, and that is a claim on these tasks only.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from data.digits import Digits
from data.pydoc import Pydoc
from models.gpt import GPT
from models.resnet import ResNet

from lightning_accel import AutocastPrecision, Distillation, StructuredPruning
from lightning_accel.measure import Table
from lightning_accel.measure.flops import count_macs

CONF = Path(__file__).resolve().parents[1] / "conf"

Settings = dict[str, Any]


class Variant(NamedTuple):
    """How one student is trained: what it learns from a teacher, and when it is pruned."""

    distillation: Settings | None = None
    prune_when: float | None = None


@dataclass(frozen=True)
class Task:
    """A student, its data, and the ways to train it; the first is what the others are compared with."""

    metric: str
    better: int  # 1 where more is better, else -1
    student: Callable[[], LightningModule]
    data: Callable[[int], LightningDataModule]
    epochs: int
    seeds: int
    variants: dict[str, Variant]
    teacher: Callable[[], tuple[LightningModule, LightningDataModule, int]] | None = None


def preset(*overrides: str) -> Settings:
    """Return losses and weights that `examples/train.py` would use with these overrides."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("config", overrides=list(overrides)).callbacks.distillation
    keys = ("losses", "task_weight")
    return {key: OmegaConf.to_container(node, resolve=True)[key] for key in keys}  # type: ignore[call-overload, index]


def plus(settings: Settings, **losses: Any) -> Variant:
    """Add losses to settings."""
    return Variant({**settings, "losses": {**settings["losses"], **losses}})


def beside_task(**losses: Any) -> Variant:
    """Leave the student's own loss its whole weight."""
    return Variant({"losses": losses, "task_weight": 1.0})


# -- the three tasks -------------------------------------------------------------------------------


def digits() -> Task:
    """A tiny ResNet and ten images of each class."""
    kd, pooled = preset("+accel=distill"), "head@input"
    return Task(
        metric="test/acc",
        better=1,
        student=lambda: ResNet(widths=(8, 16), depth=1),
        data=lambda seed: Digits(batch_size=50, num_train=100, seed=seed),
        epochs=60,
        seeds=10,
        variants={
            "alone": Variant(),
            "kd (+accel=distill)": Variant(kd),
            "logit_standardized_kd": beside_task(logit_standardized_kd=9.0),
            "dkd": beside_task(dkd=1.0),
            "dist": beside_task(dist={"weight": 1.0, "temperature": 4.0}),
            "kd + fitnet (accel/distillation=features)": Variant(
                preset("+accel=distill", "accel/distillation=features")
            ),
            "kd + attention_transfer": plus(
                kd, attention_transfer={"weight": 100.0, "layers": "blocks.*"}
            ),
            "rkd": beside_task(rkd={"layers": pooled}),
            "similarity_preserving": beside_task(similarity_preserving={"layers": pooled}),
            "crd": beside_task(crd={"weight": 0.1, "layers": pooled}),
        },
        teacher=lambda: (ResNet(widths=(32, 64), depth=2), Digits(), 12),
    )


def pydoc() -> Task:
    """A GPT, and 20 kB of text."""
    gpt = ("+accel=distill", "experiment=pydoc_gpt")
    return Task(
        metric="test/bits_per_byte",
        better=-1,
        student=lambda: GPT(context=64, dim=64, depth=2),
        data=lambda seed: Pydoc(context=64, num_windows=320, seed=seed),
        epochs=12,
        seeds=6,
        variants={
            "alone": Variant(),
            "kd (+accel=distill)": Variant(preset(*gpt)),
            "jsd": Variant({"losses": {"jsd": {"weight": 0.9}}, "task_weight": 0.1}),
            "kd + fitnet (accel/distillation=features)": Variant(
                preset(*gpt, "accel/distillation=features")
            ),
        },
        teacher=lambda: (GPT(context=64, dim=64, depth=4), Pydoc(context=64, num_windows=3200), 6),
    )


def pruning() -> Task:
    """A ResNet that loses three quarters of its channels, and twenty images of each class."""
    own = {"teacher": "self", **preset("+accel=amp_prune_distill")}
    return Task(
        metric="test/acc",
        better=1,
        student=lambda: ResNet(widths=(32, 64), depth=1),
        data=lambda seed: Digits(batch_size=50, num_train=200, seed=seed),
        epochs=30,
        seeds=20,
        variants={
            "amp_prune": Variant(prune_when=0.4),
            "amp_prune, before the second epoch": Variant(prune_when=1),
            "amp_prune_distill": Variant(own, prune_when=0.4),
        },
    )


TASKS: dict[str, Callable[[], Task]] = {"digits": digits, "pydoc": pydoc, "pruning": pruning}


# -- one fit ---------------------------------------------------------------------------------------


def quiet() -> None:
    """Let Lightning and torch say nothing, and use one thread."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def fit(
    model: LightningModule,
    data: LightningDataModule,
    epochs: int,
    callbacks: list[Callback],
    plugins: list[Any],
) -> Trainer:
    """Train without a word."""
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        plugins=plugins,
    )
    trainer.fit(model, data)
    return trainer


def tested(trainer: Trainer, model: LightningModule, metric: str) -> float:
    """Return a metric of the test part."""
    return float(trainer.test(model, trainer.datamodule, verbose=False)[0][metric])  # type: ignore[attr-defined]


def train_teacher(name: str, folder: str) -> tuple[str | None, float]:
    """Train the teacher of a task with seed 0; return its checkpoint and its metric."""
    quiet()
    task = TASKS[name]()
    if task.teacher is None:
        return None, float("nan")
    torch.manual_seed(0)
    model, data, epochs = task.teacher()
    trainer = fit(model, data, epochs, [], [])
    path = f"{folder}/{name}.ckpt"
    trainer.save_checkpoint(path, weights_only=True)
    return path, tested(trainer, model, task.metric)


def train_student(name: str, variant: str, seed: int, teacher: str | None) -> tuple[float, int]:
    """Train one student; return its metric, and the multiply-accumulates of a forward of one sample."""
    quiet()
    task = TASKS[name]()
    chosen = task.variants[variant]
    torch.manual_seed(seed)
    model, data = task.student(), task.data(seed)
    callbacks: list[Callback] = []
    plugins: list[Any] = []
    if chosen.distillation is not None:
        settings = {"teacher": teacher, "diagnostics_every_n_steps": 0, **chosen.distillation}
        callbacks.append(Distillation(**settings))
    if chosen.prune_when is not None:
        callbacks.append(StructuredPruning(ratio=0.75, when=chosen.prune_when))  # type: ignore[arg-type]
        plugins.append(AutocastPrecision("auto"))
    with isolate_rng():
        trainer = fit(model, data, task.epochs, callbacks, plugins)
    metric = tested(trainer, model, task.metric)
    example = next(iter(data.test_dataloader()))[0][:1]
    return metric, count_macs(model, (example,)).macs


# -- what comes out --------------------------------------------------------------------------------


def measure(name: str, seeds: int | None, jobs: int) -> dict[str, Any]:
    """Train everything of a task; values are by variant, in the order of the seeds."""
    task, start = TASKS[name](), time.perf_counter()
    chosen = range(seeds or task.seeds)
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(jobs, spawn) as pool:
        teacher, known = pool.submit(train_teacher, name, folder).result()
        waiting = {
            variant: [pool.submit(train_student, name, variant, seed, teacher) for seed in chosen]
            for variant in task.variants
        }
        found = {variant: [one.result() for one in each] for variant, each in waiting.items()}
    print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return {
        "task": name,
        "metric": task.metric,
        "teacher": known,
        "values": {variant: [metric for metric, _ in each] for variant, each in found.items()},
        "macs": {variant: sorted({macs for _, macs in each}) for variant, each in found.items()},
    }


def table(found: dict[str, Any]) -> Table:
    """Show mean, standard error and the difference seed by seed."""
    task = TASKS[found["task"]]()
    scale = 100 if task.metric == "test/acc" else 1
    base, *_ = found["values"].values()
    rows = []
    for variant, values in found["values"].items():
        gains = [task.better * scale * (a - b) for a, b in zip(values, base, strict=True)]
        mean, error = _mean(gains)
        verdict = "helps" if mean > 2 * error else "harms" if mean < -2 * error else "not shown"
        cells = [f"{mean:+.2f} ± {error:.2f}", verdict] if values is not base else ["", ""]
        macs = found["macs"][variant]
        average = "{:.2f} ± {:.2f}".format(*_mean([scale * value for value in values]))
        rows.append([variant, average, *cells, f"{statistics.fmean(macs):,.0f}"])
    title = f"{found['task']}: {task.metric}{', %' * (scale == 100)}, {len(base)} seeds"
    if task.teacher is not None:
        title += f"; the teacher has {scale * found['teacher']:.2f}"
    return Table(["", "mean ± standard error", "gain, paired", "", "MACs"], rows, title)


def _mean(values: list[float]) -> tuple[float, float]:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), spread / len(values) ** 0.5


def main() -> int:
    """Run it, print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, help="10, 6 and 20 for the three tasks")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--json", type=Path, help="write every single value to this file")
    args = parser.parse_args()
    results = []
    for name in args.tasks:
        results.append(measure(name, args.seeds, args.jobs))
        print(table(results[-1]).to_text(), end="\n\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "tasks": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
