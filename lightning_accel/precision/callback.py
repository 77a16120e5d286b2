"""When to change the memory format, the exactness of products and the format of linear layers, and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision.precision import Precision
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_accel.bridge.guards import is_built, refuse_lazy
from lightning_accel.bridge.model_edit import ModelEdit
from lightning_accel.bridge.restore import register
from lightning_accel.errors import AccelError, NoEffect, explain
from lightning_accel.precision import float8, matmul
from lightning_accel.precision.layout import channels_last, convert_inputs
from lightning_accel.surgery import Receipt, Select, Stage
from lightning_accel.surgery.compiled import is_compiled


class MemoryFormat(ModelEdit):
    """Keep two-dimensional convolutions and their input batches channels last, in every stage.

    Faster for most convolutional networks, above all under autocast; measure grouped ones. The inputs of
    the networks are converted as they come in, so neither data nor LightningModule change.

    Args:
        select: Which convolutions: a `Select`, a name pattern or several; all by default.

    Raises:
        NoEffect: At setup, when there is no such convolution.

    >>> MemoryFormat(select="backbone").select.include
    ('backbone',)
    """

    stage: ClassVar[Stage] = Stage.MEMORY

    def __init__(self, select: Select | str | Iterable[str] | dict[str, Any] | None = None) -> None:
        self.select = Select.of(select)
        self.receipt = Receipt()
        self._handles: list[RemovableHandle] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.receipt = Receipt()
        if is_built(pl_module):
            self._edit(pl_module)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._edit(pl_module)  # a restored shape may have come with new storage, and DDP wraps next

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._edit(pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._edit(pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._edit(pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._edit(pl_module)

    def on_model_edit_end(
        self, trainer: Trainer, pl_module: LightningModule, receipt: Receipt
    ) -> None:
        """Put weights that another edit reshaped back into the format."""
        self._edit(pl_module)

    def _edit(self, pl_module: LightningModule) -> None:
        refuse_lazy(pl_module, type(self).__name__)
        self.receipt = self.receipt + channels_last(pl_module, select=self.select)
        if not self._handles:
            self._handles = convert_inputs(pl_module, select=self.select)

    @override
    def _leave(self, pl_module: LightningModule) -> None:
        super()._leave(pl_module)
        for handle in self._handles:
            handle.remove()
        self._handles = []


class MatmulPrecision(Callback):
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

    def __init__(self, precision: str = "auto", *, allow_short: bool = False) -> None:
        self.precision = matmul.check(precision)
        self.allow_short = _bool("allow_short", allow_short)
        self.choice: matmul.Choice | None = None
        self._before: dict[int, matmul.Flags] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        choice = self._choose(trainer)
        before = self._before.setdefault(id(trainer), matmul.read())
        matmul.apply(choice.precision)
        if choice != self.choice:
            was = "" if before.old == choice.precision else f" (was {before.old!r})"
            rank_zero_info(f"float32 matrix products: {choice.precision!r}{was}: {choice.reason}.")
        self.choice = choice

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._restore(trainer)

    def _choose(self, trainer: Trainer) -> matmul.Choice:
        strategy, device = trainer.strategy, trainer.strategy.root_device
        choice = None
        if trainer.global_rank == 0:
            choice = matmul.choose(self.precision, device, allow_short=self.allow_short)
        if trainer.world_size == 1:
            assert choice is not None
            return choice
        choice = strategy.broadcast(choice)
        assert choice is not None
        if self.precision != "auto" or self.allow_short or choice.precision == "highest":
            return choice
        exact = matmul.probe_matmul(choice.precision, device).exact
        if strategy.reduce_boolean_decision(exact):
            return choice
        return matmul.Choice("highest", f"{choice.precision!r} is a shorter format on another rank")

    def _restore(self, trainer: Trainer) -> None:
        before = self._before.pop(id(trainer), None)
        if before is not None:
            matmul.write(before)


class UsePrecision(Callback):
    """Hand a precision plugin to the Trainer when it starts: a callback merges where `plugins` do not.

    For configurations: `Trainer(plugins=...)` takes a list, which no preset can add to, and which an app
    may fill itself. In Python, pass the plugin to the Trainer.

    Args:
        plugin: Such as `AutocastPrecision("auto")`.

    Raises:
        TypeError: It is no precision plugin.

    >>> from lightning_accel.precision import AutocastPrecision
    >>> UsePrecision(AutocastPrecision("bf16")).plugin
    AutocastPrecision('bf16')
    """

    def __init__(self, plugin: Precision) -> None:
        if not isinstance(plugin, Precision):
            raise TypeError(
                explain(
                    "`plugin` is a precision plugin", repr(plugin), "pass AutocastPrecision('auto')"
                )
            )
        self.plugin = plugin

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the plugin in the place of plain float32, before the module is converted."""
        register(pl_module)  # a pruned checkpoint loads here too
        strategy = trainer.strategy
        if strategy.precision_plugin is self.plugin:
            return
        if trainer.precision not in ("32-true", None):
            raise AccelError(
                "a Trainer computes in one precision",
                f"its own {trainer.precision!r} beside {self.plugin!r}",
                "leave out one of them: `precision=` and `plugins=` of the Trainer, or "
                "`callbacks.precision`",
            )
        strategy.precision_plugin = self.plugin


class Float8Linear(ModelEdit):
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

    stage: ClassVar[Stage] = Stage.KIND

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
        self.emulate = _bool("emulate", emulate)
        self.receipt = Receipt()
        self._settled = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not self.emulate:
            float8.require_hardware(trainer.strategy.root_device)
        float8.require_torchao()
        self.receipt, self._settled = Receipt(), False
        if is_built(pl_module):
            self._edit(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._edit(pl_module)  # for a network made in `configure_model`

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._edit(pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._edit(pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._edit(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        precision = str(trainer.precision_plugin.precision)
        missing = [] if "bf16" in precision else [f"precision {precision!r}"]
        if not is_compiled(pl_module):
            missing.append("no compiled network")
        if missing and not self.emulate:
            rank_zero_warn(
                "float8 is slower than what it replaces unless casts are fused by the compiler and the rest "
                f"computes in bf16. Found: {' and '.join(missing)}. Do: add `AutocastPrecision('bf16')` and "
                "`BlockCompile()`, or leave out `Float8Linear`."
            )

    def on_model_edit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give another edit, such as a prune, plain layers to work on."""
        float8.restore(pl_module)

    def on_model_edit_end(
        self, trainer: Trainer, pl_module: LightningModule, receipt: Receipt
    ) -> None:
        """Convert anew what still qualifies."""
        self.receipt, self._settled = Receipt(), False
        try:
            self._edit(pl_module)
        except NoEffect as error:  # no reason to end a training that has come this far
            rank_zero_warn(f"float8 ends here: {error}")
            self._settled = True

    @override
    def _leave(self, pl_module: LightningModule) -> None:
        super()._leave(pl_module)
        float8.restore(pl_module)

    def _edit(self, pl_module: LightningModule) -> None:
        if self._settled:
            return
        refuse_lazy(pl_module, type(self).__name__)
        self.receipt = float8.float8_linear(
            pl_module,
            select=self.select,
            recipe=self.recipe,
            smallest=self.smallest,
            emulate=self.emulate,
        )
        self._settled = True
        rank_zero_info("\n".join(("float8:", *self.receipt.notes)))


def _bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(explain(f"`{name}` is true or false", repr(value), "pass a bool"))
    return value
