"""A few things done otherwise beside the step as it is: what they would give, measured."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_accel.bridge.technique import Situation
from lightning_accel.cli.doctor.facts import Lane, Times
from lightning_accel.hardware import num_usable_cores
from lightning_accel.loop.callbacks.fused_optimizer import FusedOptimizer
from lightning_accel.measure.race import BenchmarkCase, Ratio, no_speedup
from lightning_accel.measure.subject import num_samples
from lightning_accel.precision.callbacks.use_precision import UsePrecision
from lightning_accel.tuning.benchmark_pool import BenchmarkPool, error_text
from lightning_accel.tuning.replica import Replica
from lightning_accel.tuning.settings import BASELINE, Settings
from lightning_accel.tuning.sizes import resize

AGAIN = "as it is, again"
BF16, FLOAT32, FUSED = "bf16-mixed", "float32 weights", "fused optimizer"
DOUBLE = "a batch twice as large"
ANOMALY, THREADS = "without anomaly detection", "as many threads as cores"
_LEAST = 1.03
_BLOCK_S = 0.02
_OPTIMIZER = 0.08
"""Share of a step from which on the optimizer is worth another implementation."""


def measured_lanes(
    trainer: Trainer,
    pl_module: LightningModule,
    build: Any,
    data: list[Any],
    times: Times,
    budget_s: float,
) -> tuple[dict[str, Lane], tuple[str, ...]]:
    """Return what each thing that is worth a look gives, and notes on those that failed."""
    makers = wanted(trainer, pl_module, build, times)
    size = num_samples(data[0])
    if size:
        larger = [resize(batch, 2 * size) for batch in data]
        makers[DOUBLE] = lambda: (build(Settings(), larger), nullcontext)
    pool = BenchmarkPool(build, trainer.strategy.root_device)
    notes: list[str] = []
    cases: dict[str, BenchmarkCase] = {}
    try:
        for name, make in {BASELINE: _plain(build), AGAIN: _plain(build), **makers}.items():
            try:
                cases[name] = _case(*make())
            except Exception as error:  # whatever the user's step does under it; it is told
                if name in (BASELINE, AGAIN):
                    raise
                notes.append(f"{name} was not measured: {error_text(error)}")
        failed = pool.race(cases, budget_s, drops=False)
    finally:
        pool.close()
    notes += [f"{name} was not measured: {why}" for name, why in failed.items()]
    notes += pool.notes
    still = pool.speedup(cases[BASELINE], cases[AGAIN])
    lanes = {AGAIN: Lane(still)}
    for name in makers:
        if name in cases and name not in failed:
            gain = pool.speedup(cases[BASELINE], cases[name])
            if name == DOUBLE:  # of samples, of which there are twice as many in a step
                gain = Ratio(*(2 * bound for bound in gain))
            lanes[name] = Lane(gain, no_speedup(gain, still, least=_LEAST))
    return lanes, tuple(notes)


Maker = Callable[[], tuple[Replica, Callable[[], AbstractContextManager[Any]]]]


def wanted(
    trainer: Trainer, pl_module: LightningModule, build: Any, times: Times
) -> dict[str, Maker]:
    """Return what is worth trying here, by name, with what makes it."""
    situation = Situation(trainer, pl_module, "amp")
    makers: dict[str, Maker] = {}
    doubles = any(p.dtype == torch.float64 for p in pl_module.parameters())
    if doubles:
        makers[FLOAT32] = lambda: (_in_float32(build), nullcontext)
    elif BF16 in UsePrecision.candidates(situation):
        makers[BF16] = lambda: (build(Settings(precision=BF16)), nullcontext)
    heavy = times.optimizer > _OPTIMIZER * times.total
    if heavy and "fused" in FusedOptimizer.candidates(situation):
        makers[FUSED] = lambda: (build(Settings(fused_optimizer="fused")), nullcontext)
    if torch.is_anomaly_enabled():
        off = lambda: torch.autograd.set_detect_anomaly(False)  # noqa: E731
        makers[ANOMALY] = lambda: (build(Settings()), off)
    cores = num_usable_cores()
    if trainer.strategy.root_device.type == "cpu" and torch.get_num_threads() > cores:
        makers[THREADS] = lambda: (build(Settings()), lambda: _threads(cores))
    return makers


def _case(replica: Replica, around: Callable[[], AbstractContextManager[Any]]) -> BenchmarkCase:
    return BenchmarkCase(
        replica.step, replica.device, around=_both(replica, around), block_s=_BLOCK_S
    )


def _plain(build: Any) -> Maker:
    return lambda: (build(Settings()), nullcontext)


def _both(
    replica: Replica, around: Callable[[], AbstractContextManager[Any]]
) -> Callable[[], AbstractContextManager[Any]]:
    @contextmanager
    def held() -> Any:
        with ExitStack() as stack:
            stack.enter_context(replica.around())
            stack.enter_context(around())
            yield

    return held


def _in_float32(build: Any) -> Replica:
    """Return a copy whose double numbers are single ones, batches too; the optimizers follow in place."""
    replica: Replica = build(Settings())
    for tensor in [*replica.module.parameters(), *replica.module.buffers()]:
        if tensor.dtype == torch.float64:
            tensor.data = tensor.data.float()
    for optimizer in replica.optimizers:
        for state in optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.dtype == torch.float64:
                    state[name] = value.float()
    batches = vars(replica)["_batches"]
    vars(replica)["_batches"] = tree_map(_single, batches)
    replica._remember()
    return replica


def _single(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float64 else value


@contextmanager
def _threads(count: int) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
