"""The error that is left: how far a smaller network's outputs are from what they were, on calibration data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_accel.measure.flops import preserve_buffers
from lightning_accel.pruning.recalibrate import recalibrate
from lightning_accel.surgery import twin
from lightning_accel.surgery.call import Call, run, same_random_state, tensors

_MAX_NUMEL = 2**25  # numbers of outputs that are kept


class Leftover:
    """Compares networks with one of before, on as many batches as give a few million outputs.

    Args:
        model: The network of before; it is not changed.
        batches: Calibration batches.
        renews: Whether the statistics of batch norms are estimated anew before a network is judged, as they
            will be after a cut in a fit.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Sequence[Call]], *, renews: bool
    ) -> None:
        self._renews = renews
        self._batches: list[Sequence[Call]] = []
        self._wanted: list[list[Tensor]] = []
        before, held = twin(model), 0
        for calls in batches:
            self._wanted.append(_outputs(before, calls))
            self._batches.append(calls)
            held += sum(t.numel() for t in self._wanted[-1])
            if held > _MAX_NUMEL:
                break

    def of(self, model: nn.Module) -> float:
        """Return the change of the outputs over their size, by root mean square; statistics stay as they are.

        A network that fails on the batches, or gives no numbers, leaves infinite error.
        """
        with preserve_buffers(model):
            try:
                if self._renews:
                    recalibrate(model, self._batches)
                found = [_outputs(model, calls) for calls in self._batches]
            except (RuntimeError, ValueError, IndexError, AssertionError):
                return math.inf
        sums: dict[int, list[float]] = {}
        for wanted, outputs in zip(self._wanted, found, strict=True):
            if [t.shape for t in wanted] != [t.shape for t in outputs]:
                return math.inf
            for number, (one, other) in enumerate(zip(wanted, outputs, strict=True)):
                pair = sums.setdefault(number, [0.0, 0.0])
                pair[0] += float((other - one).square().sum())
                pair[1] += float(one.square().sum())
        shares = [change / max(size, 1e-30) for change, size in sums.values()]
        error = math.sqrt(sum(shares) / max(len(shares), 1))
        return error if math.isfinite(error) else math.inf


@torch.no_grad()
def _outputs(model: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    flags = [(module, module.training) for module in model.modules()]
    for module, _ in flags:
        module.training = False
    try:
        with same_random_state(model, seed=0):
            found = tensors(run(model, calls))
    finally:
        for module, flag in flags:
            module.training = flag
    return [(torch.view_as_real(t) if t.is_complex() else t).float().clone() for t in found]
