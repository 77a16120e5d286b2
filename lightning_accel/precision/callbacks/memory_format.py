"""`MemoryFormat`: convolutions and their inputs channels last while a Trainer runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from typing_extensions import override

from lightning_accel.bridge.technique import Context, Situation, Skipped, Technique
from lightning_accel.errors import NoEffect
from lightning_accel.precision.layout import (
    channels_last,
    contiguous,
    convert_inputs,
    convolutions,
)
from lightning_accel.surgery import Receipt, Select, Stage


class MemoryFormat(Technique):
    """Keep two-dimensional convolutions and their input batches channels last, in every stage.

    Faster for most convolutional networks, above all under autocast; measure grouped ones. The inputs of
    the networks are converted as they come in, so neither data nor LightningModule change. After the run weights
    are stored as they were.

    Args:
        select: Which convolutions: a `Select`, a name pattern or several; all by default.

    Raises:
        NoEffect: At setup, when there is no such convolution.

    >>> MemoryFormat(select="backbone").select.include
    ('backbone',)
    """

    needs = "weights"
    stage: ClassVar[Stage] = Stage.MEMORY
    name = "memory_format"
    tunable: ClassVar = {"channels_last": {}}

    def __init__(self, select: Select | str | Iterable[str] | dict[str, Any] | None = None) -> None:
        self.select = Select.of(select)

    @override
    @classmethod
    def candidates(cls, situation: Situation) -> Iterator[str | Skipped]:
        try:
            convolutions(situation.module)
            yield "channels_last"
        except NoEffect:
            yield Skipped("channels_last", "no two-dimensional convolution")

    @override
    @classmethod
    def describe(cls, value: str) -> str:
        return value.replace("_", " ")

    @override
    @contextmanager
    def effect(self, context: Context) -> Iterator[Receipt]:
        receipt = channels_last(context.module, select=self.select)
        handles = convert_inputs(context.module, select=self.select)
        try:
            yield receipt
        finally:
            for handle in handles:
                handle.remove()
            if not context.is_copy:  # which is thrown away
                contiguous(context.module, receipt)
