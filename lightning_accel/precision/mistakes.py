"""Mistakes with precision that Lightning and torch tell in words of their own, told with what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lightning_accel.errors import AccelError, Unsupported

_SHORT = (torch.float16, torch.bfloat16)
_WORDS = ("same dtype", "FP16 gradients", "should be the same", "expected scalar type")


def misplaced(plugin: object) -> AccelError:
    """Return the error of a plugin that stands among the callbacks."""
    return AccelError(
        "a precision plugin is no callback",
        f"{plugin!r} among `callbacks`",
        f"pass `Trainer(plugins=[{plugin!r}])`, or `callbacks=[UsePrecision({plugin!r})]`",
    )


def refuse_complex(module: nn.Module) -> None:
    """Raise where a network has complex weights or buffers, which bfloat16 cannot hold."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_complex():
            raise Unsupported(
                "there is no complex bfloat16, and the imaginary part would be lost",
                f"`{name}` of {str(tensor.dtype).removeprefix('torch.')}",
                "use `AutocastPrecision('bf16-mixed')`, which leaves weights as they are",
            )


@contextmanager
def told_of_short_weights(plugin: object, model: Callable[[], nn.Module | None]) -> Iterator[None]:
    """Say what is behind torch's complaint about number formats in a module with short weights."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        module = model()
        named = () if module is None else module.named_parameters()
        short = [f"`{name}` of {p.dtype}" for name, p in named if p.dtype in _SHORT]
        if isinstance(error, AccelError) or not short or not any(w in str(error) for w in _WORDS):
            raise
        raise Unsupported(
            f"{plugin!r} keeps weights in float32, and the module made its own short",
            f"{short[0]} and {len(short) - 1} more; torch says: {error}",
            "leave out `.half()` or `.bfloat16()` in the module; for short weights that still learn, pass "
            "Bf16Precision()",
        ) from error
