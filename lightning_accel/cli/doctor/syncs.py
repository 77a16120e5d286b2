"""The lines of a user's step at which the host waits for the device, and those that print."""

from __future__ import annotations

import io
import linecache
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_accel.cli.doctor.facts import Sync

_READS = {
    "item", "tolist", "numpy", "cpu", "__array__", "__bool__", "__float__", "__int__", "__index__",
    "__repr__", "__format__", "nonzero", "argwhere", "masked_select", "unique", "equal", "allclose",
}  # fmt: skip
"""Functions whose result Python has to know: until then the host cannot go on."""
_SAID = {"__bool__": "if tensor", "__float__": "float()", "__int__": "int()", "__index__": "as an index",
         "__repr__": "as text", "__format__": "as text", "__array__": "as an array"}  # fmt: skip
_PACKAGE = str(Path(__file__).parents[2]) + "/"
_FOREIGN = tuple({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
_STDLIB = sysconfig.get_path("stdlib")
_OPTIMIZERS = str(Path(torch.__file__).parent / "optim")
_STEP = str(Path(_PACKAGE, "tuning", "replica.py"))
"""The file that calls the user's step: what stands further out is nobody's."""


class Syncs(TorchFunctionMode):
    """Notes within, by the user's line, each call that reads a tensor of a device into Python.

    Args:
        device: Tensors elsewhere are read at once, and do not count.
        clock: Gives seconds; on an accelerator those within such a call are mostly waiting.

    >>> with Syncs(torch.device("cpu")) as seen:
    ...     _ = float(torch.ones(())), torch.ones(2).sum()
    >>> [call for call, _ in seen.found]
    ['float()']
    """

    def __init__(
        self, device: torch.device, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        super().__init__()
        self.found: dict[tuple[str, str], tuple[int, float]] = {}
        self._device, self._clock = device, clock

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        call = self._reads(func, args, kwargs or {})
        if not call:
            return func(*args, **(kwargs or {}))
        start = self._clock()
        out = func(*args, **(kwargs or {}))
        key = call, users_line()
        count, seconds = self.found.get(key, (0, 0.0))
        self.found[key] = count + 1, seconds + self._clock() - start
        return out

    def lines(self, steps: int) -> tuple[Sync, ...]:
        """Return the lines, by how long the host waited there."""
        rows = [Sync(call, where, n / steps, s / steps) for (call, where), (n, s) in self.found.items() if where]  # fmt: skip
        return tuple(sorted(rows, key=lambda sync: -sync.seconds))

    def _reads(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        name = getattr(func, "__name__", "")
        here = [t for t in args[:1] if isinstance(t, Tensor) and t.device.type == self._device.type]
        if not here:
            return ""
        if name in _READS:
            return _SAID.get(name, f".{name}()")
        if name in ("__getitem__", "__setitem__") and _has_mask(args[1]):
            return "[mask]" if name == "__getitem__" else ""
        leaves = name == "to" and self._device.type != "cpu" and _names_cpu((args[1:], kwargs))
        return '.to("cpu")' if leaves else ""


class Prints(io.TextIOBase):
    """Takes the place of the standard output, and notes by the user's line what is printed."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        where = users_line()
        if "\n" in text and where:
            self.found[where] = self.found.get(where, 0) + 1
        return len(text)

    def lines(self, steps: int) -> tuple[Sync, ...]:
        """Return the lines, by how often they print."""
        rows = [Sync("print", where, count / steps, 0.0) for where, count in self.found.items()]
        return tuple(sorted(rows, key=lambda sync: -sync.per_step))


def users_line() -> str:
    """Return the innermost line of code that is the user's own, with its text; "" where there is none within a step.

    Where only an installed package is there, its line.
    """
    frame: Any = sys._getframe(1)
    foreign, package = "", ""
    while frame is not None and frame.f_code.co_filename != _STEP:
        file = frame.f_code.co_filename
        if file.startswith(_OPTIMIZERS):
            return ""  # what an optimizer reads of its own counters
        kind = _kind(file)
        if kind == "users":
            return _said(file, frame.f_lineno) + (f" (in {package})" if package else "")
        if kind == "foreign" and not foreign:
            foreign = _said(file, frame.f_lineno)
            package = (
                Path(file).relative_to(next(f for f in _FOREIGN if file.startswith(f))).parts[0]
            )
        frame = frame.f_back
    return foreign if frame is not None else ""


def _kind(file: str) -> str:
    if file.startswith(_PACKAGE):
        return "ours"
    if file.startswith(_FOREIGN):
        parts = Path(file).parts
        skipped = {"torch", "lightning", "pytorch_lightning", "lightning_utilities", "numpy"}
        return "ours" if skipped & set(parts) else "foreign"
    return "ours" if file.startswith((_STDLIB, "<")) else "users"


def _said(file: str, number: int) -> str:
    path = Path(file)
    near = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    text = linecache.getline(file, number).strip()
    return f"{near}:{number}" + (f"  {text[:60]}" if text else "")


def _has_mask(index: Any) -> bool:
    return any(isinstance(t, Tensor) and t.dtype == torch.bool and t.dim() for t in tree_leaves(index))  # fmt: skip


def _names_cpu(given: Any) -> bool:
    return any(
        (isinstance(v, torch.device) and v.type == "cpu") or v == "cpu"
        for v in tree_leaves(given)
        if isinstance(v, (str, torch.device))
    )
