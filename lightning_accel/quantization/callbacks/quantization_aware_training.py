"""`QuantizationAwareTraining`: a network learns to compute on the grids of integers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from typing_extensions import override

from lightning_accel.arguments import one_of, open_share
from lightning_accel.bridge import checks
from lightning_accel.bridge.restore import averages
from lightning_accel.bridge.strategies import gathers, is_of
from lightning_accel.bridge.technique import Context, Technique
from lightning_accel.errors import AccelError, Unsupported, explain
from lightning_accel.pruning.schedule import When, epochs, moments
from lightning_accel.quantization import choose
from lightning_accel.quantization import grid as grids
from lightning_accel.quantization.fast_paths import back_to_fast_paths, leave_fast_paths
from lightning_accel.quantization.grid import Grid
from lightning_accel.quantization.layers import (
    QuantizedLayer,
    become,
    is_idle,
    layers_of,
    unbecome,
)
from lightning_accel.quantization.learned import ScaleLearner
from lightning_accel.quantization.state import State, become_like, state_of
from lightning_accel.quantization.sums import outputs_rounded
from lightning_accel.quantization.watch import make_alike, move_ranges
from lightning_accel.surgery import Receipt, Select, Stage

SCALES = ("fitted", "learned")


class QuantizationAwareTraining(Technique):
    """Train with weights and inputs of layers rounded as integer kernels will round them.

    From the epoch `when` on, linear layers, convolutions (transposed ones too) and embeddings compute on the grids of
    integers; gradients pass as if nothing was rounded. Modules, names in checkpoints, hooks and optimizers stay what they
    are, so that pruning, distillation, averages and distributed training go on. Ranges of what comes in are moving averages over all
    processes, and travel in checkpoints. After the fit the module stays quantized, as `lightning_accel.deploy` wants it;
    `lightning_accel.unquantize` makes plain layers again. It is neither smaller nor faster before it is deployed, and a
    step takes longer.

    Args:
        weights: "int8", "int4", "int3" or "int2".
        activations: "int8" for what comes into layers, "dynamic" for ranges of each call, of linear layers; or `None` for
            weights alone.
        group: Inputs of a linear layer that share a scale, for weights alone; `None` is one scale per output.
        scales: Of weights: "fitted", those of least error at the start of each epoch (of eight bits, of the largest weight
            at each step); or "learned", by gradients as well (LSQ), for four bits and fewer.
        when: Epoch from which to quantize, counted from 0; or the share of the fit (0.4 of 20 epochs is epoch 8).
        freeze: The same for when ranges stay as they are and batch norms use their running statistics; `None` is never.
        select: Which layers: a `Select`, a name pattern or several; all by default.
        momentum: How far a range moves towards that of each step.

    Raises:
        ValueError: An argument is out of range.
        TypeError: An argument is of another type.
        NoEffect: At setup, when no layer is left, with the reason for each.
        Unsupported: At setup, with a strategy that shards or traces weights; `FSDP2Strategy` goes with eight bits.

    >>> QuantizationAwareTraining(when=0.5).grid
    Grid(weights='int8', activations='int8', group=None)
    """

    needs = "weights"
    stage: ClassVar[Stage] = Stage.KIND
    name = "quantization"
    of_a_fit: ClassVar = {
        "_states": dict,
        "_norms": list,
        "_turned_in": lambda: (-1, 0),
        "_learner": ScaleLearner,
    }

    def __init__(
        self,
        weights: str = "int8",
        activations: str | None = "int8",
        *,
        group: int | None = None,
        scales: str = "fitted",
        when: float = 0,
        freeze: float | None = None,
        select: Select | str | Iterable[str] | dict[str, Any] | None = None,
        momentum: float = 0.05,
    ) -> None:
        self.grid = grids.check(weights, activations, group)
        self.scales: str = one_of("scales", scales, SCALES)
        self._learner = ScaleLearner()
        self._when = _one(moments(when), "when")
        self._freeze = None if freeze is None else _one(moments(freeze), "freeze")
        self.select = Select.of(select)
        self.momentum = open_share("momentum", momentum)
        self._states: dict[str, State] = {}  # of layers while others work on plain ones
        self._norms: list[nn.Module] = []  # that were put into eval mode
        self._turned_in = (-1, 0)  # this epoch of this Trainer
        self._gives_all_back = False
        self._told_idle = False

    @property
    def when(self) -> float:
        """The epoch from which layers are quantized, or the share of the fit."""
        return self._when[0]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        _refuse_parts(trainer, self.grid, self.scales)
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._told_idle, self._learner = False, ScaleLearner()
            if not checks.is_trial(trainer):
                _check_moments(self._when, self._freeze, trainer.max_epochs)

    @override
    @contextmanager
    def effect(self, context: Context) -> Iterator[Receipt]:
        module = context.module
        there = layers_of(module)
        receipt = Receipt() if there else choose.require(module, self.select, self.grid)
        if context.stage == "fit" and not self._states:
            self._refuse_others(module, there)
        names = [*there] if there else [change.name for change in receipt.changes]
        for one in (module, *([] if context.is_copy else _averages(context.trainer, module))):
            for name in names:
                layer = one.get_submodule(name)
                if not isinstance(layer, QuantizedLayer):
                    layer = become(layer, self.grid, "plain")
                layer.accel_trains = True
                if name in self._states:
                    become_like(layer, self._kept(layer, self._states[name]))
            leave_fast_paths(one)
        self._states = {}
        try:
            yield receipt
        finally:
            if self._gives_all_back:
                self._states = {name: state_of(layer) for name, layer in layers_of(module).items()}
            for one in (module, *([] if context.is_copy else _averages(context.trainer, module))):
                self._end(one)

    def _kept(self, layer: QuantizedLayer, state: State) -> State:
        """Return a state without its scales, unless they were learned for as many channels."""
        scale = state["scale"]
        learned = self.scales == "learned" and scale is not None and state["mode"] != "plain"
        fits = learned and scale.shape == layer.weight_scale().shape
        return state if fits else {**state, "scale": None}

    def _refuse_others(self, module: nn.Module, there: Mapping[str, QuantizedLayer]) -> None:
        """Raise where layers were quantized before in another way, which would go on."""
        if outputs_rounded(module):
            raise AccelError(
                "sums of integers (`sums=True`) are made after training",
                f"ranges of outputs at {', '.join(f'`{n}`' for n in [*outputs_rounded(module)][:4])}",
                "call `lightning_accel.unquantize(module)` first",
            )
        others = {name: layer.accel_grid for name, layer in there.items()}
        grid = self.grid
        wrong = [
            f"`{name}`: {other}"
            for name, other in others.items()
            if other
            != (grid._replace(activations=None) if isinstance(there[name], nn.Embedding) else grid)
        ]
        if wrong:
            raise AccelError(
                f"the module is quantized already, and not to {grid}",
                "; ".join(wrong[:4]),
                "pass the arguments that it was quantized with, or call `lightning_accel.unquantize(module)` first",
            )

    def _end(self, module: nn.Module) -> None:
        for layer in layers_of(module).values():
            layer.accel_trains = False
            if self._gives_all_back or layer.accel_mode == "plain":
                unbecome(layer)
            else:
                layer.accel_mode = "quantized"
                layer.settle()
        self._learner.end(layers_of(module))
        back_to_fast_paths(module)

    @override
    def on_model_edit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._has_entered(trainer):
            self._gives_all_back = True
            super().on_model_edit_start(trainer, pl_module)
            self._gives_all_back = False

    @contextmanager
    def plainly(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
        """Give plain layers to those who read or measure the module meanwhile."""
        self.on_model_edit_start(trainer, pl_module)
        _capture_anew(trainer, pl_module)
        try:
            yield
        finally:
            if self._left_for_edit:  # no edit came of it
                self._left_for_edit = False
                self.enter(trainer, pl_module)
            _capture_anew(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_due(self._when, trainer):
            self._turn(trainer, pl_module, begins=True)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for norm in self._norms:
            norm.eval()
        # Lightning leaves out the epoch's start after a resume, from within an epoch or from its last step.
        if self._is_due(self._when, trainer):
            self._turn(trainer, pl_module, begins=batch_idx == 0)
        self._learner.begin(self._learning(pl_module))

    def _learning(self, pl_module: LightningModule) -> dict[str, QuantizedLayer]:
        if self.scales == "fitted":
            return {}
        return {n: m for n, m in layers_of(pl_module).items() if m.accel_mode == "training"}

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Move scales of the layers whose weights this optimizer moves, by gradients of the same steps."""
        if self.scales == "fitted":
            return
        of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        rates = {
            name: float(max(found))
            for name, layer in self._learning(pl_module).items()
            if (found := [of[id(part)] for part in layer.parts() if id(part) in of])
        }
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._learner.step(
            {name: layer for name, layer in self._learning(pl_module).items() if name in rates},
            rates=rates,
            by=1.0 if scaler is None else float(scaler.get_scale()),
            shared=trainer.world_size > 1,
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"scales": self._learner.state_dict()} if self.scales == "learned" else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._learner.load_state_dict(state_dict.get("scales", {}))

    def _turn(self, trainer: Trainer, pl_module: LightningModule, *, begins: bool) -> None:
        """Begin to quantize, or to leave ranges as they are; and find scales anew where an epoch begins."""
        if self._turned_in == (trainer.current_epoch, id(trainer)):
            return
        self._turned_in = (trainer.current_epoch, id(trainer))
        frozen = self._freeze is not None and self._is_due(self._freeze, trainer)
        layers = layers_of(pl_module)
        reads = [layer for layer in layers.values() if layer.accel_grid.has_range]
        if reads and all(map(is_idle, reads)):
            frozen = False  # in a trial run, or a fit from plain weights: ranges are found first
        if any(layer.accel_mode == "plain" for layer in layers.values()):
            rank_zero_info(f"Quantizing {len(layers)} layers from here on: {self.grid}.")
        for layer in layers.values():
            starts = (begins and self.scales == "fitted") or layer.accel_mode == "plain"
            layer.accel_mode = "quantized" if frozen else "training"
            layer.settle()
            if not frozen and starts:
                layer.fit_scale()
        if frozen:
            self._learner.end(layers)
        if frozen and not self._norms:
            norms = [m for m in pl_module.modules() if isinstance(m, _BatchNorm) and m.training]
            self._norms = [norm.eval() for norm in norms]
        self._share_with_averages(trainer, pl_module)
        _capture_anew(trainer, pl_module)

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        watched = [m for m in layers_of(pl_module).values() if m.accel_mode == "training"]
        if watched:
            move_ranges(watched, self.momentum, shared=trainer.world_size > 1)
            self._share_with_averages(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers = layers_of(pl_module)
        idle = [n for n, m in layers.items() if m.accel_mode != "plain" and is_idle(m)]
        if idle and not self._told_idle:
            self._told_idle = True
            rank_zero_warn(
                explain(
                    "inputs of layers stay in floating point, because nothing came into them in training",
                    ", ".join(f"`{name}`" for name in idle[:6]),
                    "leave them out by `select`, or call them in `training_step`",
                )
            )

    @staticmethod
    def _share_with_averages(trainer: Trainer, pl_module: LightningModule) -> None:
        layers = layers_of(pl_module)
        for average in _averages(trainer, pl_module):
            for name, copy in layers_of(average).items():
                make_alike(copy, layers[name])

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_norms_go()
        super().teardown(trainer, pl_module, stage)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._let_norms_go()
        self._gives_all_back = True
        super().on_exception(trainer, pl_module, exception)
        self._gives_all_back = False
        self._states = {}

    def _let_norms_go(self) -> None:
        for norm in self._norms:
            norm.train()
        self._norms, self._turned_in = [], (-1, 0)

    @staticmethod
    def _is_due(moment: When, trainer: Trainer) -> bool:
        return trainer.current_epoch >= epochs(moment, trainer.max_epochs)[0]


def _check_moments(when: When, freeze: When | None, max_epochs: int | None) -> None:
    """Raise unless the fit comes to both, and ranges have an epoch to be found in."""
    first = epochs(when, max_epochs)[0]
    last = first if freeze is None else epochs(freeze, max_epochs)[0]
    if max_epochs is not None and 0 <= max_epochs <= max(first, last):
        raise ValueError(
            explain(
                "`when` and `freeze` are epochs that this fit reaches",
                f"epoch {max(first, last)}, counted from 0, with max_epochs={max_epochs}",
                f"quantize from epoch {max_epochs - 1} at the latest, or raise max_epochs",
            )
        )
    if freeze is not None and last <= first:
        raise ValueError(
            explain(
                "`freeze` comes after `when`, so that ranges are found first",
                f"epoch {last} after epoch {first}",
                "pass a later `freeze`, or None",
            )
        )


def _refuse_parts(trainer: Trainer, grid: Grid, scales: str) -> None:
    """Raise unless layers see all of their weights where they compute, and where their scales are found."""
    strategy = trainer.strategy
    undecided = is_of(strategy, "TensorParallelStrategy", "AutoStrategy")
    if not undecided and gathers(strategy):
        if grid.bits == 8 and scales == "fitted":
            return
        raise Unsupported(
            f"{scales} scales of {grid.weights} weights are found on whole weights",
            f"{type(strategy).__name__}, which keeps parts of them on each process",
            "use weights='int8', or strategy='ddp'",
        )
    fsdp = "use strategy='accel_fsdp' with weights='int8', " if grid.bits == 8 else ""
    checks.refuse_sharded(strategy, "QuantizationAwareTraining", do=fsdp)


def _capture_anew(trainer: Trainer, pl_module: LightningModule) -> None:
    """Tell those who compiled layers that these compute in another way now."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Technique) and callback.stage is Stage.COMPILE:
            callback.on_model_edit_end(trainer, pl_module, Receipt())


def _averages(trainer: Trainer, pl_module: LightningModule) -> list[nn.Module]:
    """Return the copies that callbacks keep: their layers are of the same kind, or buffers in order would not match."""
    return [*averages(trainer.callbacks, pl_module)]  # type: ignore[attr-defined]


def _one(when: When, name: str) -> When:
    if len(when) > 1:
        raise ValueError(
            explain(f"`{name}` is one epoch, or one share of the fit", repr(when), "pass one")
        )
    return when
