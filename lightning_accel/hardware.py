"""What this machine is and what it is good at, found out by trying.

A dtype is fast when it was seen to be: on CPU and on devices we know nothing of, a small product is
timed against the same one in float32, turn by turn. A name or a flag would not do: on one AMD server
core bf16 products run four times faster than float32 and fp16 ones four times slower, and both are
"supported".
"""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

_CLEARLY_FASTER = 1.1
_SIZE = 384
_BUDGET_S = 0.08


class Hardware(NamedTuple):
    """One device. `gains` has the speed of a product in each dtype relative to float32, where timed."""

    kind: str
    name: str
    memory_bytes: int
    num_cores: int
    fast_dtypes: tuple[torch.dtype, ...]
    tensor_cores: bool
    gains: dict[str, float]

    def is_fast(self, dtype: torch.dtype) -> bool:
        """Whether arithmetic in `dtype` is worth choosing over float32 here.

        >>> Hardware("cpu", "", 0, 1, (torch.bfloat16,), False, {}).is_fast(torch.float16)
        False
        """
        return dtype in self.fast_dtypes

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, with dtypes by name.

        >>> Hardware("cpu", "", 0, 1, (torch.bfloat16,), False, {}).to_dict()["fast_dtypes"]
        ['bfloat16']
        """
        names = [str(dtype).removeprefix("torch.") for dtype in self.fast_dtypes]
        return {**self._asdict(), "fast_dtypes": names}


def describe(device: torch.device | str | None = None) -> Hardware:
    """Describe `device`, by default the accelerator of this machine or else its CPU.

    Takes under 0.3 s the first time and is remembered for this process.

    >>> describe("cpu").kind
    'cpu'
    """
    chosen = torch.device(device) if device is not None else _default()
    return _describe(str(chosen))


def num_usable_cores() -> int:
    """Return how many cores this process may really use: affinity and container limit included.

    >>> num_usable_cores() >= 1
    True
    """
    allowed = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    quota = _first_word("/sys/fs/cgroup/cpu.max", 2)
    if quota is not None and quota[0].isdigit() and int(quota[1]) > 0:
        allowed = min(allowed, max(1, round(int(quota[0]) / int(quota[1]))))
    return allowed


def memory_of(device: torch.device) -> int:
    """Return the bytes of memory of a device, of CUDA those that are free; 0 where it does not say.

    >>> memory_of(torch.device("cpu")) > 0
    True
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return _host_memory() if device.type == "cpu" else _device_memory(device)


def _default() -> torch.device:
    found = torch.accelerator.current_accelerator(check_available=True)
    return found if found is not None else torch.device("cpu")


@functools.cache
def _describe(text: str) -> Hardware:
    device = torch.device(text)
    if device.type == "cuda":
        return _describe_cuda(device)
    gains = {
        str(dtype).removeprefix("torch."): gain
        for dtype in (torch.bfloat16, torch.float16)
        if (gain := _gain(device, dtype)) is not None
    }
    fast = tuple(getattr(torch, name) for name, gain in gains.items() if gain >= _CLEARLY_FASTER)
    if device.type == "cpu":
        return Hardware("cpu", _cpu_name(), _host_memory(), num_usable_cores(), fast, False, gains)
    return Hardware(
        device.type, _device_name(device), _device_memory(device), 0, fast, False, gains
    )


def _describe_cuda(device: torch.device) -> Hardware:
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    # The GTX 16 series says 7.5 like Turing and has no tensor cores. On AMD the numbers mean
    # something else, so there the products are timed.
    cores = capability >= (7, 0) and "GTX 16" not in properties.name and torch.version.hip is None
    gains: dict[str, float] = {}
    fast: list[torch.dtype] = []
    for dtype, needed in ((torch.bfloat16, (8, 0)), (torch.float16, (7, 0))):
        if torch.version.hip is not None:
            gain = _gain(device, dtype, size=2048) or 0.0
            gains[str(dtype).removeprefix("torch.")] = gain
            worth = gain >= _CLEARLY_FASTER
        else:
            worth = cores and capability >= needed and _runs(device, dtype)
        if worth:
            fast.append(dtype)
    return Hardware(
        "cuda",
        properties.name,
        properties.total_memory,
        properties.multi_processor_count,
        tuple(fast),
        cores or bool(torch.version.hip and fast),
        gains,
    )


def _runs(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        ones = torch.ones(64, 64, device=device, dtype=dtype)
        return bool((ones @ ones == 64).all())
    except (RuntimeError, TypeError):
        return False


def _gain(device: torch.device, dtype: torch.dtype, size: int = _SIZE) -> float | None:
    """Time a product in `dtype` against float32; `None` where it does not run."""
    if not _runs(device, dtype):
        return None
    with torch.inference_mode(), _one_thread():
        plain = torch.full((size, size), 0.5, device=device)
        other = plain.to(dtype)
        for matrix in (plain, other):
            _seconds(matrix)  # warm-up
        times = [(_seconds(plain), _seconds(other))]
        end = time.perf_counter() + _BUDGET_S
        hopeless = times[0][1] > 20 * times[0][0]
        while not hopeless and (time.perf_counter() < end or len(times) < 3):
            times.append((_seconds(plain), _seconds(other)))
    # The shortest of each: other work on the machine can only add.
    return min(first for first, _ in times) / min(second for _, second in times)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread has the same ratios, and does not wait for another that lost its core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _seconds(matrix: torch.Tensor) -> float:
    _wait(matrix.device)
    start = time.perf_counter()
    held = torch.mm(matrix, matrix)  # lazy devices compute only what somebody holds
    _wait(matrix.device)
    del held
    return max(time.perf_counter() - start, 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "xla":
        import torch_xla

        torch_xla.sync(wait=True)
    elif device.type != "cpu":
        torch.accelerator.synchronize(device)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[-1].strip()
    return platform.processor() or platform.machine()


def _host_memory() -> int:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0  # a system that does not say, such as Windows
    limit = _first_word("/sys/fs/cgroup/memory.max", 1)
    return min(total, int(limit[0])) if limit is not None and limit[0].isdigit() else total


def _device_name(device: torch.device) -> str:
    module = getattr(torch, device.type, None)
    name = getattr(module, "get_device_name", None)
    return str(name(device)) if name is not None else device.type


def _device_memory(device: torch.device) -> int:
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    module = getattr(torch, device.type, None)
    properties = getattr(module, "get_device_properties", None)
    return int(getattr(properties(device), "total_memory", 0)) if properties is not None else 0


def _first_word(path: str, count: int) -> list[str] | None:
    """Return the first `count` words of a small system file, or `None` where it has not as many."""
    try:
        words = Path(path).read_text().split()
    except OSError:
        return None
    return words[:count] if len(words) >= count else None
