"""`Float8Linear`: large linear layers in float8 while a Trainer runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_accel.arguments import flag
from lightning_accel.bridge.technique import Context, Situation, Skipped, Technique
from lightning_accel.precision import float8
from lightning_accel.surgery import Receipt, Select, Stage
from lightning_accel.surgery.compiled import is_compiled


class Float8Linear(Technique):
    """Compute large linear layers in float8 with torchao while a Trainer runs; parameters stay as they are.

    Layers change in place: names, parameters, hooks and whoever holds a layer stay the same, so optimizers,
    and checkpoints notice nothing; copies, and all layers at the end, are plain `nn.Linear`. What was left
    alone and why is in `receipt.skipped`. Needs a GPU with float8 (compute capability 8.9: Ada, Hopper and
    later), and pays under bf16 with compiled blocks only; anything else is said at the start.

    Args:
        select: Which layers: a `Select`, a name pattern or several. By default all linear layers but the head
            and one that sees the raw input, whose ranges float8 covers badly.
        recipe: "tensorwise" is the fastest; "rowwise" and "rowwise_with_gw_hp" are more exact.
        smallest: The smallest number of inputs and of outputs; below, casting costs more than float8 gives.
        emulate: Compute the same numbers without float8 hardware: slowly, to study their effect.

    Raises:
        ModuleNotFoundError: torchao is not installed (`pip install lightning-accel[float8]`).
        Unsupported: At setup, when the device has no float8.
        NoEffect: At setup, when no layer is left, with the reason for each.

    >>> Float8Linear(select="blocks.*", recipe="rowwise").recipe
    'rowwise'
    """

    needs = "weights"
    stage: ClassVar[Stage] = Stage.KIND
    name = "float8"
    tunable: ClassVar = {"tensorwise": {"recipe": "tensorwise"}}

    def __init__(
        self,
        select: Select | str | Iterable[str] | dict[str, Any] | None = None,
        *,
        recipe: str = "tensorwise",
        smallest: int = 1024,
        emulate: bool = False,
    ) -> None:
        self.select = None if select is None else Select.of(select)
        self.recipe = float8.check_recipe(recipe)
        self.smallest = float8.check_smallest(smallest)
        self.emulate = flag("emulate", emulate)

    @override
    @classmethod
    def candidates(cls, situation: Situation) -> Iterator[str | Skipped]:
        device = situation.device
        reason = ""
        if situation.numerics != "low":
            reason = f"needs numerics='low', {situation.numerics!r} was asked for"
        elif device.type != "cuda":
            reason = f"needs a CUDA device of capability 8.9 or more, this is {device.type}"
        elif torch.cuda.get_device_capability(device) < (8, 9):
            reason = f"{torch.cuda.get_device_name(device)} has no float8 units"
        yield Skipped("tensorwise", reason) if reason else "tensorwise"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self.emulate:
            float8.require_hardware(trainer.strategy.root_device)
        float8.require_torchao()
        super().setup(trainer, pl_module, stage)

    @override
    @contextmanager
    def effect(self, context: Context) -> Iterator[Receipt]:
        receipt = float8.float8_linear(
            context.module,
            select=self.select,
            recipe=self.recipe,
            smallest=self.smallest,
            emulate=self.emulate,
        )
        if not context.is_copy:
            rank_zero_info("\n".join(("float8:", *receipt.notes)))
        try:
            yield receipt
        finally:
            float8.restore(context.module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        precision = str(trainer.precision_plugin.precision)
        missing = [] if "bf16" in precision else [f"precision {precision!r}"]
        if not is_compiled(pl_module):
            missing.append("no compiled network")
        if missing and not self.emulate:
            rank_zero_warn(
                "float8 is slower than what it replaces unless casts are fused by the compiler and the rest "
                f"computes in bf16. Found: {' and '.join(missing)}. Do: add `AutocastPrecision('bf16-mixed')` and "
                "`BlockCompile()`, or leave out `Float8Linear`."
            )
