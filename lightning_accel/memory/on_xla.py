"""Recomputation on XLA: by torch_xla's own function, which keeps the compiler from undoing it.

XLA finds that the recomputed operations are those of the forward, and would merge the two, so that nothing is saved;
torch_xla puts a barrier between them. Its function is reentrant: gradients come only where an input asks for some,
so one is handed along that does. What a block writes in forward would be written twice, and is refused beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.errors import Unsupported
from lightning_accel.surgery.call import tensors


def lies_on_xla(values: Iterable[Any]) -> bool:
    """Whether the first tensor among some values is on XLA.

    >>> lies_on_xla([1, torch.ones(1)])
    False
    """
    return next((v.device.type == "xla" for v in values if isinstance(v, Tensor)), False)


def refuse_on_xla(model: nn.Module, names: Sequence[str], policy: str) -> None:
    """Raise `Unsupported` for blocks that cannot be recomputed there.

    >>> refuse_on_xla(nn.Sequential(nn.Sequential(nn.Linear(2, 2))), ["0"], "full")
    """
    if policy != "full":
        raise Unsupported(
            "XLA recomputes whole blocks", f"policy={policy!r}", "pass policy='full' on XLA"
        )
    for name in names:
        for inner, module in model.get_submodule(name).named_modules(prefix=name):
            if getattr(module, "track_running_stats", False):
                raise Unsupported(
                    "on XLA a recomputed block would count its statistics twice",
                    f"`{inner}`, a {type(module).__name__}",
                    "leave such blocks out by `select=Select(exclude=...)`",
                )


def recomputed_on_xla(
    module: nn.Module, call: Callable[..., Any], values: Sequence[Any], name: str
) -> Any:
    """Call a block so that backward calls it once more.

    Args:
        module: The block; its weights are behind the barrier as well.
        call: Its forward.
        values: All arguments by position.
        name: For the message.
    """
    from torch_xla.utils.checkpoint import checkpoint

    def forward(self: nn.Module, _: Tensor, *given: Any) -> Any:
        found = call(*given)
        plain = found if isinstance(found, tuple) else (found,)
        if len(tensors(found)) != sum(isinstance(one, Tensor) for one in plain):
            raise Unsupported(
                "on XLA a recomputed block gives tensors, or a tuple of some",
                f"{type(found).__name__} of a {name}",
                "leave it out by `select=Select(exclude=...)`",
            )
        return found

    device = next(v.device for v in values if isinstance(v, Tensor))
    asks = torch.zeros((), device=device, requires_grad=True)
    return checkpoint(MethodType(forward, module), asks, *values)
