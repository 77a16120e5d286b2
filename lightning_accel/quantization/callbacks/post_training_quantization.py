"""`PostTrainingQuantization`: what a fit has trained is quantized at its end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_accel.arguments import whole
from lightning_accel.bridge import checks
from lightning_accel.bridge.example import batches_of
from lightning_accel.bridge.technique import Technique
from lightning_accel.errors import AccelError
from lightning_accel.quantization.layers import QuantizedLayer
from lightning_accel.quantization.post_training import (
    Metric,
    plan_of,
    quantize_by,
    unquantize,
)
from lightning_accel.quantization.state import quantization_of, quantized_as
from lightning_accel.surgery import Receipt, Select, Stage


class PostTrainingQuantization(Technique):
    """Quantize the module at the end of a fit, on a few of its training batches, and leave it so.

    The fit itself is the plain one, and checkpoints that were written in it hold the plain module. What the networks
    inside the module receive in `training_step` is what they are calibrated on. Under DDP all processes get the
    quantization of the first. `quantize` does the same outside of a fit, and says what the arguments mean.

    Args:
        weights: "int8", "int4", "int3" or "int2".
        activations: "int8" for what comes into layers, "dynamic" for ranges of each call, of linear layers; or `None` for
            weights alone.
        group: Inputs of a linear layer that share a scale, for weights alone; `None` is one scale per output.
        select: Which layers: a `Select`, a name pattern or several; all by default.
        observer: "minmax", "percentile" or "mse".
        rounding: "nearest", "least_squares" or "adaround".
        correct_bias: Take the shift of the mean output off the bias.
        sums: Round what is added to outputs of layers as well, so that kernels add integers.
        equalize: Make channels alike first, "cross_layer" or "smoothquant".
        metric: Gives a number for a copy of the module, higher is better.
        max_drop: By how much the metric may fall; layers that cost most stay in floating point until it does not.
        batches: Training batches to calibrate on.

    Raises:
        ValueError: An argument is out of range.
        TypeError: An argument is of another type.
        NoEffect: At the end of the fit, when no layer is left to quantize.

    >>> PostTrainingQuantization("int4", None, group=32).plan.grid.bits
    4
    """

    stage: ClassVar[Stage] = Stage.KIND
    acts_in = ("fit",)
    name = "quantization"

    def __init__(
        self,
        weights: str = "int8",
        activations: str | None = "int8",
        *,
        group: int | None = None,
        select: Select | str | Iterable[str] | dict[str, Any] | None = None,
        observer: str = "mse",
        rounding: str = "least_squares",
        correct_bias: bool = True,
        sums: bool = False,
        equalize: str | None = None,
        metric: Metric | None = None,
        max_drop: float | None = None,
        batches: int = 16,
    ) -> None:
        self.plan = plan_of(
            weights=weights,
            activations=activations,
            group=group,
            select=Select.of(select),
            observer=observer,
            rounding=rounding,
            correct_bias=correct_bias,
            sums=sums,
            equalize=equalize,
            metric=metric,
            max_drop=max_drop,
        )
        self.batches = whole("batches", batches)
        self._is_done = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        after = "call `lightning_accel.quantization.quantize` on the module after the fit, which leaves it whole, "
        checks.refuse_sharded(trainer.strategy, type(self).__name__, do=after)
        others = [c for c in trainer.callbacks if getattr(c, "name", "") == self.name]  # type: ignore[attr-defined]
        if len(others) > 1:
            raise AccelError(
                "a network is quantized once, in training or after it",
                ", ".join(type(other).__name__ for other in others),
                "pass one of them",
            )
        super().setup(trainer, pl_module, stage)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._is_done = False
        if unquantize(pl_module):
            rank_zero_info("Plain layers again until the end of this fit, which quantizes anew.")

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before_deployment(trainer, pl_module)

    def before_deployment(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize, once: when averages are in the module, and before whoever deploys it."""
        if self._is_done:
            return
        self._is_done = True
        made: Any = None
        if trainer.is_global_zero:
            try:
                calls = batches_of(trainer, pl_module, self.batches)
                self.receipt = quantize_by(pl_module, self.plan, calls)
                made = quantization_of(pl_module), self._weights_of(pl_module)
            except Exception as error:  # the other processes wait for an answer
                made = error
        found: Any = trainer.strategy.broadcast(made if trainer.world_size > 1 else None)
        if isinstance(made, Exception):
            raise made
        if isinstance(found, Exception):
            raise type(found)(*found.args)
        if not trainer.is_global_zero:
            quantized_as(pl_module, found[0])
            with torch.no_grad():
                for name, weight in found[1].items():
                    pl_module.get_parameter(name).copy_(weight)
        rank_zero_info(_told(self.receipt))

    def _weights_of(self, pl_module: LightningModule) -> dict[str, torch.Tensor]:
        """Return what may have changed: weights of quantized layers, and where channels were made alike all of them."""
        return {
            f"{name}.{key}" if name else key: parameter.detach().cpu()
            for name, module in pl_module.named_modules()
            if self.plan.equalize is not None or isinstance(module, QuantizedLayer)
            for key, parameter in module.named_parameters(recurse=False)
        }


def _told(receipt: Receipt) -> str:
    lines = [f"Quantized {len(receipt.changes)} layers at the end of the fit."]
    lines += [f"  left alone: `{change.name}`: {change.what}" for change in receipt.skipped]
    return "\n".join([*lines, *(f"  {note}" for note in receipt.notes)])
