"""Whether a network is still the one that was validated last: some callbacks write other weights when a fit ends."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_accel.exact import wide
from lightning_accel.quantization.layers import layers_of
from lightning_accel.surgery.structure import named_tensors


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter and buffer by name."""
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(module)}


class SeenWeights:
    """Remembers the weights of the last validation by a sum of each.

    >>> from types import SimpleNamespace
    >>> seen, trainer, net = SeenWeights(), SimpleNamespace(global_step=3), nn.Linear(2, 2)
    >>> seen.see(trainer, net)
    >>> seen.change(trainer, net)
    ''
    >>> net.weight.data += 1
    >>> seen.change(trainer, net)[:46]
    'weights changed after the last validation with'
    """

    def __init__(self) -> None:
        self._step, self._sums, self._quantized = -1, list[Tensor](), 0

    def see(self, trainer: Trainer, module: nn.Module) -> None:
        """Remember the weights with which a validation begins."""
        self._step, self._sums = trainer.global_step, _sums(module)
        self._quantized = len(layers_of(module))

    def change(self, trainer: Trainer, module: nn.Module) -> str:
        """Return what changed since without a step; "" for nothing, and for another number of weights, which edits tell."""
        if self._step != trainer.global_step:
            return ""
        if (more := len(layers_of(module)) - self._quantized) > 0:
            return f"{more} layers were quantized after the fit: all here is of the network before that"
        now = _sums(module)
        if len(now) != len(self._sums) or all(map(torch.equal, now, self._sums)):
            return ""
        return (
            "weights changed after the last validation without a step, as averaging writes its own at the end: metrics are of "
            "those before, and `trainer.validate` tells of the present ones"
        )


@torch.no_grad()
def _sums(module: nn.Module) -> list[Tensor]:
    """Return the sum of each weight that has numbers, on its own device."""
    known = (p for p in module.parameters() if not is_lazy(p) and not p.is_meta)
    return [wide(getattr(p, "_local_tensor", p)).sum() for p in known if p.is_floating_point()]
