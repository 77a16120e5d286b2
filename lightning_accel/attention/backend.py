"""The kernels of `torch.nn.functional.scaled_dot_product_attention`, and which of them is tried first.

PyTorch chooses among flash, memory-efficient, cuDNN and plain mathematics by rules of thumb. Here one is
put first and the others stay behind it, so that what it cannot do (a mask, a head size) still runs. A
hand-written attention (two matrix products and a softmax) has no such choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_accel.arguments import one_of

_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
BACKENDS = tuple(_KERNELS)


def check(backend: Any) -> str:
    """Return the name of a backend, or raise and list the known ones.

    >>> check("flash")
    'flash'
    """
    return one_of("backend", backend, BACKENDS)


@contextmanager
def attention_backend(backend: str) -> Iterator[None]:
    """Put one kernel first, and the others behind it; the order before comes back afterwards.

    >>> import torch
    >>> q = torch.ones(1, 1, 2, 4)
    >>> with attention_backend("math"):
    ...     torch.nn.functional.scaled_dot_product_attention(q, q, q).sum()
    tensor(8.)
    """
    first = _KERNELS[check(backend)]
    if backend == "math":  # alone: it can do everything, and CPUs know no order
        order = [first]
    else:
        order = [first, *(kernel for kernel in _KERNELS.values() if kernel != first)]
    theirs: dict[str, bool] = {}
    try:
        with sdpa_kernel(order, set_priority=True):
            ours = _switches()
            try:
                yield
            finally:
                theirs = {name: on for name, on in _switches().items() if on != ours[name]}
    finally:
        for name, on in theirs.items():  # what others switched meanwhile stays so
            getattr(torch.backends.cuda, f"enable_{name}_sdp")(on)


def _switches() -> dict[str, bool]:
    names = ("math", "flash", "mem_efficient", "cudnn")
    return {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in names}


def uses_attention(fn: Callable[[], Any]) -> bool:
    """Run `fn` once and tell whether it called `scaled_dot_product_attention`.

    >>> import torch
    >>> uses_attention(lambda: torch.ones(2, 2).softmax(-1))
    False
    """
    with _Calls() as seen:
        fn()
    return seen.found


class _Calls(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, given = getattr(func, "__name__", ""), kwargs or {}
        # What runs within a function written in Python is not seen: the mode rests meanwhile.
        inside = name == "multi_head_attention_forward" and not given.get("need_weights", True)
        self.found = self.found or inside or name == "scaled_dot_product_attention"
        return func(*args, **given)
