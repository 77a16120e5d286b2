"""What a GPU can do, what its clocks do, and how one fit is measured on it, for gpu_suite.py."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_accel.precision import matmul

WARM_UP = 8
"""Steps before those that count."""


class Sample(NamedTuple):
    """A moment of the GPU: MHz of its multiprocessors, watts, degrees."""

    at: float
    mhz: float
    watts: float
    degrees: float


class Clocks:
    """Logs clock, power and temperature by `nvidia-smi`, five times a second, where there is one."""

    def __init__(self, device: str) -> None:
        self.samples: list[Sample] = []
        self._process: subprocess.Popen[str] | None = None
        if device != "cuda":
            return
        which = [f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"]
        query = "--query-gpu=clocks.sm,power.draw,temperature.gpu"
        command = ["nvidia-smi", *which, query, "--format=csv,noheader,nounits", "--loop-ms=200"]
        try:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        except OSError:
            return
        threading.Thread(target=self._read, daemon=True).start()

    def between(self, start: float, end: float) -> list[Sample]:
        """Return the samples of a time."""
        return [sample for sample in list(self.samples) if start <= sample.at <= end]

    def close(self) -> None:
        """End the logging."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            try:
                self.samples.append(Sample(time.perf_counter(), *map(float, line.split(","))))
            except (ValueError, TypeError):  # "[N/A]", or an error message
                continue


class Block(NamedTuple):
    """Some steps: seconds of each, and when."""

    step_s: float
    start: float
    end: float


@dataclass
class Course:
    """Batches for one fit: first step, warm-up, blocks under the clock, a trace, and the end."""

    batches: list[Any]
    device: str
    seconds: float
    traced: int = 20
    first_step_s: float = 0.0
    blocks: list[Block] = field(default_factory=list)
    kernels_s: float | None = None

    def __len__(self) -> int:
        return 1_000_000  # a Trainer reads ahead where it does not know; the end comes before

    def __iter__(self) -> Iterator[Any]:
        start = self._now()
        yield from self._some(1)
        self.first_step_s = self._now() - start
        yield from self._some(WARM_UP)
        start = self._now()
        yield from self._some(3)
        step_s = max(1e-6, (self._now() - start) / 3)
        steps = max(1, round(min(0.5, self.seconds / 8) / step_s))
        end = time.perf_counter() + self.seconds
        while len(self.blocks) < 3 or time.perf_counter() < end:
            start = self._now()
            yield from self._some(steps)
            now = self._now()
            self.blocks.append(Block((now - start) / steps, start, now))
        if self.traced:
            yield from self._trace(max(2, min(self.traced, int(5 / step_s))))

    def _some(self, steps: int) -> Iterator[Any]:
        for index in range(steps):
            yield self.batches[index % len(self.batches)]

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _trace(self, steps: int) -> Iterator[Any]:
        from torch.profiler import ProfilerActivity, profile

        activity = ProfilerActivity.CUDA if self.device == "cuda" else ProfilerActivity.CPU
        self._now()
        with profile(activities=[activity]) as trace:
            yield from self._some(steps)
            self._now()
        ranges = sorted(
            (event.time_range.start, event.time_range.end)
            for event in trace.events()
            if event.device_type.name == activity.name
            and not getattr(event, "is_user_annotation", False)
        )
        busy, until = 0.0, float("-inf")
        for begin, end in ranges:  # microseconds; kernels of several streams overlap
            busy += max(0.0, end - max(begin, until))
            until = max(until, end)
        self.kernels_s = busy / 1e6 / steps


def peaks(device: str, tiny: bool) -> dict[str, Any]:
    """Measure products of several shapes, and a copy, which reads and writes."""
    scale = 64 if tiny else 1
    shapes = [(8192, 8192, 8192), (16384, 8192, 4096), (4096, 4096, 4096)]
    shapes += [(32768, 2048, 8192), (32768, 768, 3072)]
    by_shape = {}
    for shape in shapes:
        m, k, n = (max(8, size // scale) for size in shape)
        one, two = _random(device, m, k), _random(device, k, n)
        by_shape[f"{m}x{k}x{n}"] = 2e-12 * m * k * n / _best_s(device, lambda a=one, b=two: a @ b)
    size = 8192 // scale
    wide = _random(device, size, size).float()
    found: dict[str, Any] = {"bf16_by_shape": by_shape, "bf16_tflops": max(by_shape.values())}
    for name in ("highest", "high"):
        with matmul.matmul_precision(name):
            found[f"fp32_{name}_tflops"] = 2e-12 * size**3 / _best_s(device, lambda: wide @ wide)
    source = torch.zeros(2**31 // scale**2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel()
    found["copy_tb_s"] = 1e-12 * moved / _best_s(device, lambda: target.copy_(source))
    found["float8_tflops"] = _float8_peak(device, size)
    return found


def _float8_peak(device: str, size: int) -> float | None:
    if device != "cuda" or torch.cuda.get_device_capability() < (8, 9):
        return None
    one, two = (_random(device, size, size).to(torch.float8_e4m3fn) for _ in range(2))
    scale = torch.ones((), device=device)

    def product() -> None:
        torch._scaled_mm(one, two.t(), scale, scale, out_dtype=torch.bfloat16)

    try:
        return 2e-12 * size**3 / _best_s(device, product)
    except RuntimeError:
        return None


def _random(device: str, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16)


def _best_s(device: str, call: Callable[[], Any], repeats: int = 10) -> float:
    """Return seconds per call of the best of some blocks."""
    times, wait = [], torch.cuda.synchronize if device == "cuda" else lambda: None
    call()
    for _ in range(6):
        wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        wait()
        times.append((time.perf_counter() - start) / repeats)
    return min(times)
