"""One law: a training with a technique that has not acted yet is bit for bit the training without it.

Here are the techniques, what is done with a Trainer, and all that is compared: weights, buffers, gradients,
optimizers, random states, batches, hooks, flags, logged rows, metrics, files, what data remember, and what
belongs to the process.
"""

from __future__ import annotations

import contextlib
import gc
import math
import random
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import odd
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.optim import optimizer as optimizers
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from lightning_accel import (
    AccelReport,
    ActivationBudget,
    ActivationCheckpointing,
    AttentionBackend,
    AutocastPrecision,
    AutoTune,
    BlockCompile,
    Distillation,
    FastLoading,
    FrozenPredict,
    FusedOptimizer,
    LeanLoop,
    MatmulPrecision,
    MemoryFormat,
    QuantizationAwareTraining,
    RankWatch,
    SparsityTraining,
    StepMeter,
    StructuredPruning,
    UsePrecision,
    WarmStart,
    WeightMasks,
)

# --- techniques -------------------------------------------------------------------------------------

LATER = 5
"""An epoch that is planned, and that the last step comes before."""
OURS = (
    "compilation/",
    "distillation/",
    "distill/",
    "measure/",
    "memory/",
    "pruning/",
    "report/",
    "tuning/",
)
"""Beginnings of the names under which techniques may log."""
LOGS_OURS = tuple(f"log {name}" for name in OURS)
OUR_FILES = ("report.json", "report.md", "report.html", "report.progress.json", "compiled.zip")


class Technique(NamedTuple):
    """Arguments of a Trainer with a technique, and of the plain Trainer that it must equal."""

    make: Callable[[], dict[str, Any]]
    beside: dict[str, Any] = {}
    apart: tuple[str, ...] = ()
    """Parts of a case in which it acts, or refuses."""


def teacher() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return odd.net()


def alone(*make: Callable[[], Callback], apart: tuple[str, ...] = ()) -> Technique:
    return Technique(lambda: {"callbacks": [one() for one in make]}, apart=apart)


def searching() -> AutoTune:
    """Search at length; `nothing_wins` sees to it that nothing is taken."""
    return AutoTune(
        budget_s=60,
        budget_share=1e9,
        techniques=["fused_optimizer", "matmul_precision"],
        cache=False,
    )


BF16 = {"precision": "bf16-mixed"}
TRIAL = ("fast_dev_run",)  # in which planned edits act at once, so that they are tried
TECHNIQUES: dict[str, Technique] = {
    "prune": alone(lambda: StructuredPruning(ratio=0.5, when=LATER), apart=TRIAL),
    "masks": alone(lambda: WeightMasks(amount=0.5, when=LATER), apart=TRIAL),
    "quantize": alone(lambda: QuantizationAwareTraining(when=LATER), apart=TRIAL),
    "sparsity": alone(lambda: SparsityTraining(strength=1e-300)),  # far below the last bit
    "distill": alone(lambda: Distillation(teacher(), {"kd": 0.0}, student="net")),
    "loading": alone(lambda: FastLoading(budget_s=0.01)),
    "rows": alone(lambda: FastLoading(num_workers=False, pin_memory=False, budget_s=0.01)),
    "measure": alone(StepMeter, lambda: AccelReport(budget_s=0.001)),
    "lean": alone(LeanLoop),
    "optimizer": alone(lambda: FusedOptimizer("for-loop"), apart=("Closure",)),
    "checkpointing": alone(lambda: ActivationCheckpointing(select="net.1")),
    "compile": alone(lambda: BlockCompile(backend="eager", on_graph_break="ignore")),
    "budget": alone(
        lambda: BlockCompile(backend="aot_eager", on_graph_break="ignore"),
        lambda: ActivationBudget("auto", limit_bytes=10**12),
    ),
    "tune, too short": alone(lambda: AutoTune(budget_share=1e-12, cache=False)),
    "tune, no gain": alone(searching),
    "attention": alone(lambda: AttentionBackend("math")),
    "matmul": alone(lambda: MatmulPrecision("highest")),
    "format": alone(lambda: MemoryFormat(select="spare")),
    "watch": alone(RankWatch),
    "warm": alone(lambda: WarmStart("compiled.zip")),
    "fp32": Technique(lambda: {"plugins": [AutocastPrecision("32-true")]}),
    "bf16": Technique(lambda: {"plugins": [AutocastPrecision("bf16-mixed")]}, BF16),
    "use bf16": Technique(
        lambda: {"callbacks": [UsePrecision(AutocastPrecision("bf16-mixed"))]}, BF16
    ),
    "distill itself": alone(lambda: Distillation("self", {"kd": 1.0}, student="net"), apart=TRIAL),
}


# --- what looks on ----------------------------------------------------------------------------------


def chance() -> tuple[int, ...]:
    """Return a digest of the random states of the process."""
    numbers: Any = np.random.get_state()
    state = torch.get_rng_state().numpy().tobytes()
    return hash(state), hash(random.getstate()), hash((numbers[1].tobytes(), *numbers[2:]))


class Witness(Callback):
    """A callback of the user's that has all hooks, and notes what it sees in each."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def note(self, hook: str, trainer: Trainer, module: LightningModule) -> None:
        flags = torch.is_grad_enabled(), module.training, trainer.global_step, trainer.current_epoch
        weights = (
            [float(p.detach().sum()) for p in module.parameters()] if "_batch_" in hook else []
        )
        self.seen.append((hook, flags, chance(), weights))


def _noting(name: str) -> Any:
    return lambda self, trainer, module, *_, **__: self.note(name, trainer, module)


for _name in ("setup", "teardown", *(n for n in dir(Callback) if n.startswith("on_"))):
    setattr(Witness, _name, _noting(_name))


class Rows(Logger):
    """Keeps what is logged; names of techniques are their own."""

    name = "rows"
    version = 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Any] = []
        self.experiment: list[float] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        kept = users(metrics)
        if kept or not metrics:
            self.rows.append((step, kept))

    def log_hyperparams(self, *given: Any, **_: Any) -> None:
        self.rows.append(given)


def users(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is not of a technique; an epoch is beside both."""
    kept = {k: v for k, v in metrics.items() if not k.startswith(OURS)}
    return {} if len(kept) < len(metrics) and set(kept) <= {"epoch"} else kept


class Data(LightningDataModule):
    """Makes loaders anew when asked, and counts in the hooks that Lightning takes from here."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self.make, self.notes = make, list[Any]()

    def train_dataloader(self) -> Any:
        self.notes.append("train")
        return self.make()

    def val_dataloader(self) -> Any:
        self.notes.append("val")
        return looks()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.notes.append(dataloader_idx)
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = odd.pair(batch)
        return [x + len(self.notes), y]


def looks() -> list[Any]:
    return [odd.tensors(), odd.DataLoader(odd.OwnRandom(), 16, shuffle=True)]


def remembered(value: Any, depth: int = 7) -> Any:
    """Return what samplers, datasets and loaders hold, as plain data."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, (random.Random, np.random.Generator)):
        state = value.getstate() if isinstance(value, random.Random) else value.bit_generator.state
        return repr(state)
    if isinstance(value, (Tensor, np.ndarray, str, bool, int, float, type(None))):
        return value
    if isinstance(value, Mapping):
        return {str(k): remembered(v, depth - 1) for k, v in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [remembered(v, depth - 1) for v in value]
    known = (Dataset, Sampler, BatchSampler, DataLoader, CombinedLoader)
    if depth and (isinstance(value, known) or type(value).__module__ == "odd"):
        return {k: remembered(v, depth - 1) for k, v in vars(value).items() if k[:1] != "_"}
    if isinstance(value, types.GeneratorType) and value.gi_frame is not None:
        return value.gi_frame.f_lasti
    return type(value).__name__


def process() -> dict[str, Any]:
    """Return what a training must leave as it was in the process."""
    return {
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "running": [t.name for t in threading.enumerate() if "tqdm" not in t.name],
        "matmul": torch.get_float32_matmul_precision(),
        "dtype": str(torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "anomaly": torch.is_anomaly_enabled(),
        "sigterm": repr(signal.getsignal(signal.SIGTERM)),
        "collects": (gc.isenabled(), gc.get_freeze_count()),
        "hooks": [
            len(optimizers._global_optimizer_pre_hooks),
            len(optimizers._global_optimizer_post_hooks),
        ],
        "patched": [call._call_callback_hooks.__module__, "__setattr__" in vars(LightningModule)],
        "excepthook": sys.excepthook.__name__,
    }


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Compare to the last bit."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), (where, list(found), list(expected))
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}/{key}")
    elif isinstance(expected, (list, tuple)):
        for index, (one, other) in enumerate(zip(found, expected, strict=False)):
            assert_same(one, other, f"{where}/{index}")
        assert len(found) == len(expected), (where, found[len(expected) :], expected[len(found) :])
    elif isinstance(expected, (Tensor, np.ndarray)):
        one, other = torch.as_tensor(found), torch.as_tensor(expected)
        assert one.dtype == other.dtype and one.is_contiguous() == other.is_contiguous(), where
        assert torch.equal(one.nan_to_num(), other.nan_to_num()), where
    else:
        assert found == expected or (found != found and expected != expected), (
            where,
            found,
            expected,
        )


# --- a run ------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """What a technique is put on."""

    module: str
    loader: str
    situation: str


class Run:
    """One user's program: what its situation does with Trainers, and all that it leaves behind."""

    def __init__(self, case: Case, team: Team | None, beside: dict[str, Any], kwargs: Any) -> None:
        self.case, self.team = case, team
        self.kwargs, self.beside = {**kwargs, **beside}, beside
        self.record: dict[str, Any] = {}
        self.folder = Path(kwargs["default_root_dir"])
        self.witness, self.rows = Witness(), Rows()
        self.given: dict[str, Any] = {}
        self.renew()

    def renew(self) -> None:
        """Begin as a new process does."""
        self.seed()
        self.module = odd.MODULES[self.case.module]()
        self.loader = odd.LOADERS[self.case.loader]()
        self.given = {}

    def seed(self) -> None:
        """Begin the random numbers of the process."""
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(0)

    def trainer(self, technique: bool = True, **more: Any) -> Trainer:
        """Return a Trainer, with the team or without."""
        if technique and self.team is not None:
            self.given = self.given or self.team.make()
            given = dict(self.given)
        else:
            given = dict(self.beside)
        given = {**{k: v for k, v in self.kwargs.items() if k != "precision"}, **given}
        given |= {"max_epochs": 6, "max_steps": 10, "logger": self.rows, "log_every_n_steps": 1}
        given |= {"enable_checkpointing": True, "limit_train_batches": 5, **more}
        if not self.module.automatic_optimization or self.case.module == "Closure":
            given = {k: v for k, v in given.items() if k not in MANUAL_HAS_NO}
        saver = ModelCheckpoint(self.folder / "saved", every_n_epochs=1, save_last="link")
        savers = [saver] if given["enable_checkpointing"] else []
        given["callbacks"] = [*given.get("callbacks", []), self.witness, *savers]
        return Trainer(**given)

    def fit(self, technique: bool = True, ckpt: Any = None, **more: Any) -> Trainer:
        """Fit and note what that leaves."""
        trainer = self.trainer(technique, **more)
        self.go(trainer, ckpt)
        return trainer

    def go(self, trainer: Trainer, ckpt: Any = None) -> None:
        """Call `trainer.fit`."""
        given: dict[str, Any] = {"train_dataloaders": self.loader}
        if isinstance(self.loader, Data):
            given = {"datamodule": self.loader}
        elif trainer.limit_val_batches:
            given["val_dataloaders"] = looks()
        self.end(trainer, lambda: trainer.fit(self.module, ckpt_path=ckpt, **given))

    def end(self, trainer: Trainer, deed: Callable[[], Any]) -> None:
        """Do something with a Trainer, and note all that it leaves, an error of the user's included."""
        try:
            value = deed()
        except (ArithmeticError, KeyboardInterrupt, SystemExit) as error:
            value = type(error).__name__
        self.record[f"{len(self.record)}"] = {"value": value, **self._left(trainer)}

    def _left(self, trainer: Trainer) -> dict[str, Any]:
        module = self.module
        names = dict(module.named_modules())
        lists = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
        return {
            "calls": [c for c in module.calls if not str(c).startswith(LOGS_OURS)],
            "seen": list(self.witness.seen),
            "rows": list(self.rows.rows),
            "experiment": list(self.rows.experiment),
            "weights": {k: v.clone() for k, v in module.state_dict().items()},
            "gradients": {n: p.grad for n, p in module.named_parameters()},
            "learns": {n: p.requires_grad for n, p in module.named_parameters()},
            "flags": {n: (type(m).__name__, m.training) for n, m in names.items()},
            "hooks": {n: [len(getattr(m, k)) for k in lists] for n, m in names.items()},
            "own": [k for m in names.values() for k in vars(m) if not k.startswith(("_", "on_"))],
            "optimizers": [o.state_dict() for o in trainer.optimizers],
            "schedulers": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
            "metrics": [
                users(m)
                for m in (
                    trainer.callback_metrics,
                    trainer.logged_metrics,
                    trainer.progress_bar_metrics,
                )
            ],
            "state": [
                trainer.state.status.value,
                trainer.global_step,
                trainer.current_epoch,
                trainer.should_stop,
            ],
            "chance": chance(),
            "data": remembered(self.loader),
            "files": sorted(
                str(p.relative_to(self.folder))
                for p in self.folder.rglob("*")
                if p.is_file() and p.name not in OUR_FILES
            ),
            "saved": self._saved(),
            "profiled": [
                len(seconds)
                for name, seconds in getattr(trainer.profiler, "recorded_durations", {}).items()
                if name == "mine"
            ],
            "process": process(),
        }

    def _saved(self) -> Any:
        """Return what stands in the last checkpoint, without the states of callbacks."""
        path = self.folder / "saved" / "last.ckpt"
        if not path.exists():
            return None
        held = torch.load(path, weights_only=True)
        for name in ("callbacks", "lightning_accel", "MixedPrecision", "AutocastPrecision"):
            held.pop(name, None)
        return held


MANUAL_HAS_NO = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")


# --- situations -------------------------------------------------------------------------------------


def fitting(**more: Any) -> Callable[[Run], None]:
    def situation(run: Run) -> None:
        run.fit(**more)

    return situation


def evaluated(run: Run) -> None:
    trainer = run.fit()
    _evaluate(run, trainer)


def another_evaluates(run: Run) -> None:
    """The technique is in the Trainer that evaluates alone."""
    run.fit(technique=False)
    _evaluate(run, run.trainer())
    run.fit(technique=False)


def _evaluate(run: Run, trainer: Trainer) -> None:
    for verb in (trainer.validate, trainer.test):
        run.end(trainer, lambda v=verb: v(run.module, looks(), verbose=False))
    run.end(trainer, lambda: trainer.predict(run.module, odd.tensors()))


def again(run: Run) -> None:
    trainer = run.fit(max_steps=5)
    trainer.fit_loop.epoch_loop.max_steps = 10
    run.go(trainer)


def anew(run: Run) -> None:
    """The same callbacks in another Trainer, for the same module."""
    run.fit(max_steps=6)
    run.fit(max_steps=4)


def resumed(first: bool, steps: int) -> Callable[[Run], None]:
    def situation(run: Run) -> None:
        run.fit(technique=first, max_steps=steps)
        run.renew()
        run.fit(ckpt=run.folder / "saved" / "last.ckpt")

    return situation


def fails(hook: str, error: type[BaseException]) -> Callable[[Run], None]:
    """A callback of the user's raises in the second epoch; then a plain fit goes on with the module."""

    class Raises(Callback):
        def fail(self, trainer: Trainer, *_: Any, **__: Any) -> None:
            if trainer.current_epoch == 1:
                raise error("the user's own")

    setattr(Raises, hook, Raises.fail)

    def situation(run: Run) -> None:
        trainer = run.trainer()
        trainer.callbacks.append(Raises())  # type: ignore[attr-defined]
        run.go(trainer)
        run.fit(technique=False, max_steps=2)

    return situation


def step_fails(run: Run) -> None:
    run.module.fails_at = 7
    run.fit()
    run.module.fails_at = -1
    run.fit(max_steps=2)


def from_datamodule(**more: Any) -> Callable[[Run], None]:
    def situation(run: Run) -> None:
        run.loader = Data(odd.LOADERS[run.case.loader])
        run.fit(**more)

    return situation


BARE = {"logger": False, "enable_checkpointing": False, "log_every_n_steps": 0, "barebones": True}
SITUATIONS: dict[str, Callable[[Run], None]] = {
    "fit": fitting(limit_val_batches=0),
    "validated": fitting(num_sanity_val_steps=2, val_check_interval=2),
    "accumulated": fitting(accumulate_grad_batches=2, limit_val_batches=2),
    "clipped": fitting(gradient_clip_val=0.1),
    "limited": fitting(limit_train_batches=3, max_steps=4, check_val_every_n_epoch=2),
    "overfitted": fitting(overfit_batches=2, max_steps=4, limit_val_batches=0),
    "fast_dev_run": fitting(fast_dev_run=3, limit_val_batches=0),
    "barebones": fitting(**BARE),
    "profiled": fitting(profiler="simple", limit_val_batches=0),
    "watched for NaN": fitting(
        detect_anomaly=True,
        gradient_clip_val=0.1,
        gradient_clip_algorithm="value",
        limit_val_batches=0,
    ),
    "datamodule": from_datamodule(num_sanity_val_steps=1),
    "reloaded": from_datamodule(reload_dataloaders_every_n_epochs=1),
    "evaluated": evaluated,
    "another evaluates": another_evaluates,
    "again": again,
    "anew": anew,
    "resumed": resumed(first=False, steps=5),
    "resumed, both": resumed(first=True, steps=5),
    "resumed within": resumed(first=True, steps=3),
    "a step fails": step_fails,
    "a batch fails": fails("on_train_batch_start", ArithmeticError),
    "validation fails": fails("on_validation_batch_end", ArithmeticError),
    "interrupted": fails("on_train_batch_end", KeyboardInterrupt),
}


TECHNIQUES["frozen"] = Technique(
    lambda: {"callbacks": [FrozenPredict(backend="eager")]},
    apart=tuple(name for name in SITUATIONS if name != "another evaluates"),
)
IMPOSSIBLE = {("bulk sampler", "overfitted")}
"""There Lightning puts a sampler of single items in the place of the user's."""


TEAMS = (
    ("prune", "distill itself", "rows", "compile", "matmul", "use bf16"),
    ("masks", "measure", "budget", "format"),
    ("sparsity", "lean", "tune, too short", "warm", "quantize"),
    ("distill", "optimizer", "tune, no gain", "fp32"),
    ("loading", "checkpointing", "attention", "watch", "bf16"),
)
"""Techniques that are tried together: what changes nothing alone changes nothing in company."""


class Team(NamedTuple):
    """Some techniques in one Trainer."""

    names: tuple[str, ...]

    def make(self) -> dict[str, Any]:
        """Return arguments of a Trainer with all of them."""
        parts = [TECHNIQUES[name].make() for name in self.names]
        lists = ("callbacks", "plugins")
        return {k: [one for part in parts for one in part.get(k, [])] for k in lists}

    @property
    def beside(self) -> dict[str, Any]:
        """Arguments of the plain Trainer that it must equal."""
        return {k: v for name in self.names for k, v in TECHNIQUES[name].beside.items()}


def follow(case: Case, team: Team | None, beside: dict[str, Any], kwargs: Any) -> dict[str, Any]:
    """Return all that a situation leaves behind."""
    run = Run(case, team, beside, kwargs)
    with contextlib.chdir(run.folder):
        SITUATIONS[case.situation](run)
    return run.record


def applies(technique: str, case: Case) -> bool:
    """Tell whether a case is possible, and the technique does not act in it."""
    apart = TECHNIQUES[technique].apart
    return case[1:] not in IMPOSSIBLE and not any(part in apart for part in case)


DEAR = ("budget", "tune, no gain")
"""Techniques that compile or search at length."""


def cases() -> Iterator[tuple[Case, Team, bool]]:
    """Yield each team with each module, each loader and each situation, and whether that is slow.

    The lists have no common divisor with the number of teams, so that each meets all; no pair comes twice.
    """
    lists = list(odd.MODULES), list(odd.LOADERS), list(SITUATIONS)
    assert all(math.gcd(len(names), len(TEAMS)) == 1 for names in lists)
    for k in range(len(TEAMS) * max(map(len, lists))):
        case = Case(*(names[k % len(names)] for names in lists))
        late = k // len(TEAMS) % 2 == 1
        names = [t for t in TEAMS[k % len(TEAMS)] if applies(t, case) and not (late and t in DEAR)]
        if names:
            yield case, Team(tuple(names)), late or any(t in DEAR for t in names)
    for kind, loader in zip(odd.MODULES, odd.LOADERS, strict=False):
        yield Case(kind, loader, "another evaluates"), Team(("frozen",)), kind > "M"
