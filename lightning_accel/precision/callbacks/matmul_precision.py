"""`MatmulPrecision`: how exact float32 matrix products are while a Trainer runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_accel.arguments import flag
from lightning_accel.bridge.technique import Context, Situation, Skipped, Technique
from lightning_accel.precision import matmul


class MatmulPrecision(Technique):
    """Compute float32 matrix products with the setting that is fast on this device and still float32.

    For whatever a run computes in float32: all of it without mixed precision. The setting holds for the
    whole process while the Trainer runs, and every flag is put back at its end, also after an exception.
    Rank 0 measures and decides, all ranks check the numbers, and the choice is said with its reason.

    Args:
        precision: "auto" takes the fastest setting whose results are as exact as float32 can be; "highest",
            "high" and "medium" are taken as asked.
        allow_short: Let "auto" also take TF32 and bfloat16 products, which have 10 and 7 bits.

    Raises:
        ValueError: The setting is unknown.

    >>> MatmulPrecision("medium").precision
    'medium'
    """

    needs = "process"
    is_global = True
    name = "matmul_precision"
    tunable: ClassVar = {"high": {"precision": "high"}, "medium": {"precision": "medium"}}

    def __init__(self, precision: str = "auto", *, allow_short: bool = False) -> None:
        self.precision = matmul.check(precision)
        self.allow_short = flag("allow_short", allow_short)
        self.choice: matmul.MatmulChoice | None = None

    @override
    @classmethod
    def candidates(cls, situation: Situation) -> Iterator[str | Skipped]:
        device = situation.device.type
        for value in cls.tunable:
            if value == torch.get_float32_matmul_precision():
                yield Skipped(value, "set already")
            elif device not in ("cpu", "cuda"):
                yield Skipped(value, f"has no effect on {device}")
            else:
                yield value

    @override
    @classmethod
    def describe(cls, value: str) -> str:
        return f"matmul {value}"

    @override
    @contextmanager
    def effect(self, context: Context) -> Iterator[None]:
        choice = self._choose(context)
        with matmul.matmul_precision(choice.precision) as was:
            if choice != self.choice and not context.is_copy:
                before = "" if was == choice.precision else f" (was {was!r})"
                rank_zero_info(
                    f"float32 matrix products: {choice.precision!r}{before}: {choice.reason}."
                )
            self.choice = choice
            yield

    def _choose(self, context: Context) -> matmul.MatmulChoice:
        trainer, device = context.trainer, context.device
        alone = context.is_copy or trainer.world_size == 1
        if alone or trainer.global_rank == 0:
            choice = matmul.choose(self.precision, device, allow_short=self.allow_short)
        return (
            choice if alone else self._agreed(trainer, choice if trainer.global_rank == 0 else None)
        )

    def _agreed(self, trainer: Trainer, choice: matmul.MatmulChoice | None) -> matmul.MatmulChoice:
        """Return what rank 0 chose, if it is as exact on all ranks."""
        choice = trainer.strategy.broadcast(choice)
        assert choice is not None
        if self.precision != "auto" or self.allow_short or choice.precision == "highest":
            return choice
        exact = matmul.probe_matmul(choice.precision, trainer.strategy.root_device).exact
        if trainer.strategy.reduce_boolean_decision(exact):
            return choice
        return matmul.MatmulChoice(
            "highest", f"{choice.precision!r} is a shorter format on another rank"
        )
