"""Fits that train in turns in one process, by a Trainer or by hand, and what their blocks say of each other.

As in overhead.py one fit trains at a time and hands over after a block of steps, in random order within each
round; here also while it is set up and torn down, and what it changes in the process (how float32 products are
computed, which attention kernel comes first, how `LeanLoop` calls hooks) is put back while others train. Clock:
processor time of the one thread. `ByHand` is the limit: the tricks that a tuner chose, in a bare PyTorch loop.

Not a benchmark itself: train_speed.py, tune_zoo.py and gpu_suite.py are.
"""

from __future__ import annotations

import inspect
import json
import logging
import random
import statistics
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer import call
from overhead import Turns, ratio
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_accel.loop import hooks
from lightning_accel.precision import matmul

WARM_UP = 2
"""Rounds that do not count: in the first the fits are set up, compiled and allocated."""

Settings = Mapping[str, str]
Blocks = dict[str, list[float]]


class Lanes(Turns):
    """Turns that hold from the set-up of a fit to its end, and keep the settings of the process apart."""

    def __init__(self, names: list[str], rounds: int) -> None:
        super().__init__(names, 0)
        order = random.Random(0)
        measured = [n for _ in range(WARM_UP + rounds) for n in order.sample(names, len(names))]
        self.order = [*measured, *names]  # the last one is to tear down
        self.num_blocks = WARM_UP + rounds
        self.losses: dict[str, list[float]] = {name: [] for name in names}
        self._plain = _process()
        self._own: dict[str, Any] = {}

    def take(self, name: str) -> bool:
        """Wait for a turn, and bring this fit's settings of the process back."""
        going = super().take(name)
        _set_process(self._own.get(name, self._plain))
        return going

    def give(self, name: str, seconds: float) -> None:
        """Hand over, with the process as it was before all fits."""
        self._own[name] = _process()
        _set_process(self._plain)
        super().give(name, seconds)

    def seconds(self) -> Blocks:
        """Return the seconds of the blocks that count."""
        return {name: times[WARM_UP : self.num_blocks] for name, times in self.blocks_s.items()}


class Batches:
    """Some batches again and again, in blocks that take turns; begins within a turn, and ends in one."""

    def __init__(self, name: str, lanes: Lanes, batches: list[Any], steps: int) -> None:
        self.name, self.lanes, self.batches, self.steps = name, lanes, batches, steps
        self.loss: Callable[[], float] = lambda: float("nan")

    def __len__(self) -> int:
        # One more than the blocks hold, as in overhead.py: a block ends when the Trainer asks for the next.
        return 1 + self.steps * self.lanes.num_blocks

    def __iter__(self) -> Iterator[Any]:
        count = 0
        for _ in range(self.lanes.num_blocks):
            start = time.thread_time()
            for _ in range(self.steps):
                yield self.batches[count % len(self.batches)]
                count += 1
            seconds = time.thread_time() - start
            self.lanes.losses[self.name].append(self.loss())
            self.lanes.give(self.name, seconds / self.steps)
            if not self.lanes.take(self.name):
                return
        yield self.batches[0]


class ByHand:
    """A training step as someone writes it who knows the tricks: plain PyTorch, none of our code.

    Args:
        module: Network, loss and optimizer.
        settings: The tricks, by the names of `lightning_accel.tuning.Settings`.
        device: Where it trains.
    """

    def __init__(self, module: LightningModule, settings: Settings, device: str = "cpu") -> None:
        self.module = module.to(device)
        self.device = device
        self.settings = settings
        self.last = torch.tensor(float("nan"))
        self._to: dict[str, Any] = {}
        if "memory_format" in settings:
            self._to = {"memory_format": torch.channels_last}
            self.module.to(**self._to)
        if "matmul_precision" in settings:
            torch.set_float32_matmul_precision(settings["matmul_precision"])
        self.optimizer = self._optimizer(settings.get("fused_optimizer"))
        self._compile(settings.get("compilation", ""))

    def step(self, batch: Any) -> None:
        """Train on one batch."""
        if "graphs" in self.settings.get("compilation", ""):
            torch.compiler.cudagraph_mark_step_begin()
        parts = [p.to(**self._to) if p.dim() == 4 and self._to else p for p in batch]
        with self._autocast(), self._attention():
            self.last = self.module.loss(parts)
        self.last.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _autocast(self) -> AbstractContextManager[Any]:
        if "precision" not in self.settings:
            return nullcontext()
        return torch.autocast(self.device, torch.bfloat16)

    def _attention(self) -> AbstractContextManager[Any]:
        kernels = {
            "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION,
            "cudnn": SDPBackend.CUDNN_ATTENTION,
            "math": SDPBackend.MATH,
        }
        if "attention" not in self.settings:
            return nullcontext()
        first = kernels.pop(self.settings["attention"])
        return sdpa_kernel([first, *kernels.values()], set_priority=True)

    def _optimizer(self, implementation: str | None) -> torch.optim.Optimizer:
        own = self.module.configure_optimizers()
        if implementation is None:
            return own
        known = inspect.signature(type(own)).parameters
        given = {k: v for k, v in own.defaults.items() if k in known}
        given |= {"fused": None, "foreach": None, implementation: True}
        return type(own)(self.module.parameters(), **given)

    def _compile(self, how: str) -> None:
        modes = {
            "with CUDA graphs": "reduce-overhead",
            "with autotuning": "max-autotune-no-cudagraphs",
        }
        if how == "blocks":
            for holder, name, block in _repeated(self.module.net):
                setattr(holder, name, torch.compile(block))
        elif how:
            self.module.net = torch.compile(self.module.net, mode=modes.get(how))


def race(
    runs: Mapping[str, Callable[[str, Lanes], None]], rounds: int
) -> tuple[Blocks, dict[str, list[float]]]:
    """Run fits in turns; return seconds per step of their blocks, and the last loss of each block."""
    lanes = Lanes(list(runs), rounds)

    def enter(name: str) -> None:
        torch.set_num_threads(1)  # OpenMP keeps it per thread
        try:
            lanes.take(name)
            torch.manual_seed(0)
            runs[name](name, lanes)
            lanes.give(name, 0.0)
        except BaseException as error:
            lanes.fail(error)
            raise

    threads = [threading.Thread(target=enter, args=(name,)) for name in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if lanes.failure is not None:
        raise lanes.failure
    return lanes.seconds(), lanes.losses


def by_trainer(
    make: Callable[[], LightningModule],
    batches: list[Any],
    steps: int,
    arguments: Callable[[], dict[str, Any]] = dict,
) -> Callable[[str, Lanes], None]:
    """Return a fit by a Trainer with these further arguments."""

    def run(name: str, lanes: Lanes) -> None:
        data = Batches(name, lanes, batches, steps)
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                accelerator="cpu",
                devices=1,
                max_epochs=2,
                max_steps=len(data),
                logger=CSVLogger(folder),
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                **arguments(),
            )
            data.loss = lambda: float(trainer.callback_metrics["loss"])
            trainer.fit(make(), data)

    return run


def by_hand(
    make: Callable[[], LightningModule], batches: list[Any], steps: int, settings: Settings
) -> Callable[[str, Lanes], None]:
    """Return a fit without a Trainer."""

    def run(name: str, lanes: Lanes) -> None:
        data, loop = Batches(name, lanes, batches, steps), ByHand(make(), settings)
        data.loss = lambda: float(loop.last.detach())
        for batch in data:
            loop.step(batch)

    return run


def step_seconds(make: Callable[[], LightningModule], batch: Any) -> float:
    """Time a bare step, by hand and without tricks, in processor time."""
    loop, times = ByHand(make(), {}), []
    for _ in range(3):
        start = time.thread_time()
        loop.step(batch)
        times.append(time.thread_time() - start)
    return max(1e-5, min(times))


def gain(blocks: Blocks, kind: str, base: str = "stock") -> dict[str, float]:
    """Return how many times as fast as `base` a kind is, with its 95 % interval."""
    times = ratio([{"plain": blocks[base], kind: blocks[kind]}], kind)
    return {"ratio": 1 / times["ratio"], "low": 1 / times["high"], "high": 1 / times["low"]}


def loss_gap(losses: Mapping[str, list[float]], kind: str, base: str = "stock") -> float:
    """Return how far apart two learning curves end, as a share of the first loss."""
    last = max(1, len(losses[base]) // 3)
    ends = [statistics.fmean(losses[name][-last:]) for name in (kind, base)]
    return abs(ends[0] - ends[1]) / abs(losses[base][0])


def about() -> dict[str, Any]:
    """Return the versions and the processor that numbers belong to."""
    names = (line for line in _cpuinfo() if line.startswith("model name"))
    return {
        "processor": next(names, "unknown").partition(":")[2].strip() or "unknown",
        "threads": 1,
        "clock": "processor time of the thread",
        "torch": torch.__version__,
        "lightning": lightning.__version__,
    }


def write(found: Mapping[str, Any], output: Path | None, *, as_json: bool) -> None:
    """Print the result as JSON if asked to, and keep it in a file if one is named."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(found, indent=1) + "\n")
    if as_json:
        print(json.dumps(found))


def quiet() -> None:
    """Silence what Lightning says of each Trainer, and compute in one thread."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def _repeated(net: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Return the outermost blocks of a class of the user's that occurs more than once."""
    kinds = Counter(type(m) for m in net.modules() if not type(m).__module__.startswith("torch."))
    found: list[tuple[nn.Module, str, nn.Module]] = []
    for name, child in net.named_children():
        if kinds[type(child)] > 1:
            found.append((net, name, child))
        else:
            found += _repeated(child)
    return found


def _process() -> tuple[Any, ...]:
    """Return what a fit may have changed in the process; `LeanLoop` counts its users, so its books are apart too."""
    short = vars(LightningModule).get("__setattr__")
    counts = dict(hooks._shortcuts), dict(hooks._dispatchers)
    order = torch._C._get_sdp_priority_order()
    return matmul.read(), order, short, call._call_callback_hooks, counts


def _set_process(state: tuple[Any, ...]) -> None:
    flags, order, short, calls, counts = state
    matmul.write(flags)
    torch._C._set_sdp_priority_order(order)
    call._call_callback_hooks = calls
    if short is not None:
        LightningModule.__setattr__ = short  # type: ignore[method-assign]
    elif "__setattr__" in vars(LightningModule):
        del LightningModule.__setattr__
    for book, kept in zip((hooks._shortcuts, hooks._dispatchers), counts, strict=True):
        book.clear()
        book.update(kept)


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
