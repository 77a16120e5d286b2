"""How exactly float32 matrix products are computed: what each setting really does on a device, and the flags.

`torch.set_float32_matmul_precision` has three settings, and what they mean depends on the processor. On an AMD
server core without AMX "medium" only takes the product from MKL to oneDNN: twice as fast and still float32
(relative error 4.1e-7 against 2.4e-7). With AMX the same word computes in bfloat16 (3e-3), and on a GPU
"high" and "medium" compute in TF32 (3e-4). So nothing here is read from a name: a product is timed, and its
error is taken against float64. Convolutions are not touched: the setting does not govern them, by PyTorch's
own documentation, and cuDNN's TF32 is a flag of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from lightning_accel import hardware
from lightning_accel.arguments import one_of

PRECISIONS = ("highest", "high", "medium")

_CLEARLY_FASTER = 1.1
_EXACT = (
    8.0  # error relative to that of "highest"; TF32 is a thousand times worse, bf16 ten thousand
)
_SIZES = {"cpu": 512}
_LARGE = 2048  # of any accelerator
_BUDGET_S = 0.02
_VALUES = {"highest": ("ieee", "ieee"), "high": ("tf32", "tf32"), "medium": ("tf32", "bf16")}
_BACKENDS = ("cuda", "mkldnn")


class Probe(NamedTuple):
    """What a setting gave on a device, in a product of realistic size.

    `ratio` is its gain over "highest" (2.0 needs half the time). `relative_error` is the norm of its error
    against float64 by the norm of the result; `exact_error` is the same of "highest".
    """

    ratio: float
    relative_error: float
    exact_error: float

    @property
    def exact(self) -> bool:
        """Whether the result is as good as float32 can be, and not that of a shorter format."""
        return self.relative_error <= _EXACT * self.exact_error


class MatmulChoice(NamedTuple):
    """A setting and why it was taken.

    >>> MatmulChoice("highest", "it was asked for").precision
    'highest'
    """

    precision: str
    reason: str


class Flags(NamedTuple):
    """The state of the process: PyTorch's old setting, and the newer flag of each backend."""

    old: str
    new: tuple[str, str]


def check(precision: Any, *, auto: bool = True) -> str:
    """Return the name of a setting, or raise and list the known ones.

    >>> check("medium")
    'medium'
    """
    known = (*PRECISIONS, "auto") if auto else PRECISIONS
    return one_of("precision", precision, known)


@contextmanager
def matmul_precision(name: str) -> Iterator[str]:
    """Compute float32 matrix products with this setting inside the block; all flags are put back, unless others set them.

    Gives the setting that was before.

    Args:
        name: "highest", "high" or "medium"; for the whole process, on every device.

    >>> with matmul_precision("medium"):
    ...     torch.get_float32_matmul_precision()
    'medium'
    >>> torch.get_float32_matmul_precision()
    'highest'
    """
    check(name, auto=False)
    before = read()
    apply(name)
    ours = read()
    try:
        yield before.old
    finally:
        if read() == ours:
            write(before)


def probe_matmul(name: str, device: torch.device | str = "cpu") -> Probe:
    """Measure the gain and the error of a setting on a device; about 50 ms on a CPU core, then remembered.

    Args:
        name: "highest", "high" or "medium".
        device: Where the product runs.

    >>> probe_matmul("highest", "cpu").exact
    True
    """
    check(name, auto=False)
    return _probe(name, str(torch.device(device)))


def choose(
    precision: str = "auto", device: torch.device | str = "cpu", *, allow_short: bool = False
) -> MatmulChoice:
    """Choose the setting for a device.

    Args:
        precision: "auto" takes the fastest one that is clearly faster than "highest" and still float32;
            others are taken as asked, with what they do here as the reason.
        device: Where the model computes; it is used for a moment.
        allow_short: Let "auto" also take settings that compute in TF32 or bfloat16.

    >>> choose("highest").reason
    'it was asked for'
    """
    check(precision)
    if precision == "highest":
        return MatmulChoice(precision, "it was asked for")
    if precision != "auto":
        return MatmulChoice(
            precision, f"it was asked for; {_told(probe_matmul(precision, device))}"
        )
    probes = {name: probe_matmul(name, device) for name in PRECISIONS[1:]}
    best = "highest"
    for name, probe in probes.items():  # the longer format first, and a tie stays with it
        bar = _CLEARLY_FASTER * (probes[best].ratio if best in probes else 1.0)
        if probe.ratio >= bar and (probe.exact or allow_short):
            best = name
    if best != "highest":
        return MatmulChoice(best, _told(probes[best]))
    name, fastest = max(probes.items(), key=lambda item: item[1].ratio)
    if fastest.ratio >= _CLEARLY_FASTER:
        return MatmulChoice(
            best, f"'{name}' is {_told(fastest)}; pass it, or `allow_short=True`, to accept that"
        )
    return MatmulChoice(best, f"no setting is clearly faster here ('{name}': {fastest.ratio:.2f}x)")


def apply(name: str) -> None:
    """Set the process to a setting; old and new flags agree afterwards.

    >>> before = read()
    >>> apply("highest")
    >>> write(before)
    """
    torch.set_float32_matmul_precision(check(name, auto=False))


def read() -> Flags:
    """Return the state of every flag that a setting changes, inherited ones as "none".

    >>> read().old
    'highest'
    """
    new = tuple(_own(backend) for backend in _BACKENDS)
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:  # raised when the old and the new flags disagree, which a user may want
        old = _hidden(new)
    return Flags(old, new)  # type: ignore[arg-type]


def write(flags: Flags) -> None:
    """Put a state back that `read` returned.

    >>> write(read())
    """
    torch.set_float32_matmul_precision(flags.old)  # writes the new ones as well
    for backend, value in zip(_BACKENDS, flags.new, strict=True):
        _set(backend, "matmul", value)


def _told(probe: Probe) -> str:
    if probe.ratio < _CLEARLY_FASTER:
        return f"not clearly faster here ({probe.ratio:.2f}x), relative error {probe.relative_error:.1e}"
    kind = "still float32" if probe.exact else "a shorter format"
    return f"{probe.ratio:.1f}x as fast in a product and {kind} (relative error {probe.relative_error:.1e})"


@lru_cache(maxsize=32)
def _probe(name: str, device: str) -> Probe:
    where = torch.device(device)
    size = _SIZES.get(where.type, _LARGE)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator) for _ in range(2))
    rows = left[:64].double() @ right.double()
    norm = rows.norm()
    with torch.inference_mode(), torch.autocast(where.type, enabled=False), hardware._one_thread():
        left, right = left.to(where), right.to(where)
        errors: list[float] = []
        for setting in ("highest", name):  # also the warm-up
            with matmul_precision(setting):
                found = torch.mm(left, right)[:64].cpu().double()
                errors.append(float((found - rows).norm() / norm))
        times: list[tuple[float, ...]] = []
        end = time.perf_counter() + _BUDGET_S
        while time.perf_counter() < end or len(times) < 3:
            times.append(tuple(_seconds(left, right, setting) for setting in ("highest", name)))
    # The shortest of each: other work on the machine can only add.
    ratio = min(pair[0] for pair in times) / min(pair[1] for pair in times)
    return Probe(1.0 if name == "highest" else ratio, errors[1], errors[0])


def _seconds(left: torch.Tensor, right: torch.Tensor, setting: str) -> float:
    with matmul_precision(setting):
        hardware._wait(left.device)
        start = time.perf_counter()
        torch.mm(left, right)
        hardware._wait(left.device)
        return max(time.perf_counter() - start, 1e-9)


def _own(backend: str) -> str:
    """Return a backend's flag for products, or "none" where it takes over that of a parent."""
    found = _get(backend, "matmul")
    if found == "none":
        return "none"
    whole = _own_of_all(backend)
    seen = []
    for value in ("ieee", "tf32"):
        _set(backend, "all", value)
        seen.append(_get(backend, "matmul"))
    _set(backend, "all", whole)
    return found if seen[0] == seen[1] else "none"


def _own_of_all(backend: str) -> str:
    found, top = _get(backend, "all"), _get("generic", "all")
    seen = []
    for value in ("ieee", "tf32"):
        _set("generic", "all", value)
        seen.append(_get(backend, "all"))
    _set("generic", "all", top)
    return found if seen[0] == seen[1] else "none"


def _hidden(new: tuple[str, ...]) -> str:
    """Return the old setting where reading it raises: it answers once the new flags agree with it."""
    try:
        for name, values in _VALUES.items():
            for backend, value in zip(_BACKENDS, values, strict=True):
                _set(backend, "matmul", value)
            try:
                if torch.get_float32_matmul_precision() == name:
                    return name
            except RuntimeError:
                continue
        return "highest"
    finally:
        for backend, value in zip(_BACKENDS, new, strict=True):
            _set(backend, "matmul", value)


def _get(backend: str, op: str) -> str:
    return torch._C._get_fp32_precision_getter(backend, op)


def _set(backend: str, op: str, value: str) -> None:
    torch._C._set_fp32_precision_setter(backend, op, value)
