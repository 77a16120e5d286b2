"""`Bf16Precision`: weights in bfloat16 for the Trainer, with masters or random rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_info
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_accel.bridge.checks import refuse_lazy
from lightning_accel.bridge.optimizers import kept_beside
from lightning_accel.bridge.strategies import is_of
from lightning_accel.errors import StructureMismatch, Unsupported
from lightning_accel.precision.mistakes import misplaced, refuse_complex
from lightning_accel.precision.weights import SHORT, ShortWeights
from lightning_accel.precision.written import Written
from lightning_accel.surgery.optimizers import bare, within

_SHARDED = ("FSDP", "DeepSpeed", "ModelParallel", "XLA")


class Bf16Precision(HalfPrecision):
    """Compute and store in bfloat16, and still learn what float32 learns: the optimizer steps in float32.

    Weights, buffers, activations, gradients and the floating tensors of a batch are bfloat16, exactly as with
    `Trainer(precision="bf16-true")` (so the statistics of batch norm too), and the module stays so after the
    fit. That one loses every update below half an ulp; this one does not. Optimizers step and keep their
    state in float32, and between steps hold the model's own parameters; norms for clipping are float32 too.
    Gradients of several batches accumulate in bfloat16.

    Per weight, with Adam: "master" takes 16 bytes (2 + 2 + 4 + 8), "stochastic" 12, where float32 takes 16;
    what both save is activations and time.

    Args:
        weights: "master" keeps float32 copies, which full checkpoints hold too: a resumed run is bit-equal.
            "stochastic" has none and rounds by chance, unbiased.
        seed: Of the random rounding.

    Raises:
        ValueError: `weights` is unknown, or the seed is negative.
        Unsupported: In the fit: weights are computed step after step by what is no optimizer step, such as
            `p.data -= lr * g`, and so in bfloat16.

    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(plugins=[Bf16Precision("master")], accelerator="cpu", logger=False)
    >>> trainer.precision, trainer.precision_plugin
    ('bf16-true', Bf16Precision('master'))
    """

    accel_baseline: ClassVar[str] = "32-true"
    """What `AccelReport` compares with."""

    def __init__(self, weights: str = "master", *, seed: int = 0) -> None:
        self.weights = ShortWeights(weights, seed)
        super().__init__("bf16-true")
        self._written = Written(self.weights)
        self._model: nn.Module | None = None

    def masters(self) -> dict[str, Tensor]:
        """Return the float32 weights by name; empty with "stochastic"."""
        names = _names(self._model)
        return {names[p]: full for p, full in self.weights.masters.items() if p in names}

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        """Shorten the module, having taken its weights as the masters."""
        assert isinstance(module, LightningModule)
        _refuse(module.trainer.strategy, "Bf16Precision", _SHARDED)
        refuse_lazy(module, type(self).__name__)
        refuse_complex(module)
        if module.trainer.state.fn == "fit":
            self.weights.remember(module.parameters())
        return super().convert_module(module)

    @override
    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        """Watch the optimizers, now that model and optimizers are in place."""
        inner = model if isinstance(model, LightningModule) else getattr(model, "module", model)
        self._model = inner if isinstance(inner, nn.Module) else model
        for optimizer in within(optimizers):
            if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
                raise Unsupported(
                    "Bf16Precision exchanges what an optimizer holds, and this one shards it",
                    type(optimizer).__name__,
                    "use the plain optimizer, or `AutocastPrecision('bf16-mixed')`",
                )
        if isinstance(model, DistributedDataParallel):
            self._share_masters(model)
        self.weights.watch([*optimizers, self._model], self._model.parameters)
        found = within([*optimizers, self._model])
        shadows = kept_beside(found, self._model)
        named = dict(self._model.named_parameters())
        self.weights.lengthen((named[s.name], s.tensor) for s in shadows if s.name in named)
        self._written.reset()
        return model, optimizers, lr_schedulers

    def _share_masters(self, model: DistributedDataParallel) -> None:
        """Let all ranks have the first one's masters, as DDP has let them have its weights, rounded."""
        group, masters = model.process_group, self.weights.masters
        first = torch.distributed.get_global_rank(group, 0)
        for parameter in model.module.parameters():
            if parameter in masters:
                torch.distributed.broadcast(masters[parameter], first, group=group)

    @override
    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Step, and leave nothing half done when the step fails."""
        self._written.check(self._model)
        try:
            inner = bare(optimizer)
            if not getattr(type(inner).step, "hooked", False):
                run = partial(self._wrap_closure, model, optimizer, closure)
                return self.weights.step(inner, run)
            if self.weights.steps:
                return super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)
            before = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}
            result = super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)
            if not self.weights.steps:
                _refuse_unseen(optimizer, before)
            return result
        except BaseException:
            self.weights.abandon()
            raise

    @override
    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        with self.weights.opened(_bare(optimizer)):
            super().clip_gradients(optimizer, clip_val, gradient_clip_algorithm)

    @contextmanager
    @override
    def forward_context(self) -> Iterator[None]:
        self.weights.abandon()  # after a failed step of an optimizer that the Trainer does not know
        with super().forward_context():
            yield

    @contextmanager
    @override
    def train_step_context(self) -> Iterator[None]:
        """Compute in bfloat16, having looked whether others wrote into weights since the last step."""
        self._written.check(self._model)
        with super().train_step_context():
            yield

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.weights.state(_names(self._model))

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        masters = state_dict.get("masters", {}) if isinstance(state_dict, Mapping) else None
        if not isinstance(masters, Mapping):
            raise StructureMismatch(
                "the checkpoint's state of Bf16Precision is not one",
                type(state_dict).__name__,
                "use an undamaged checkpoint",
            )
        self.weights.load(state_dict, _names(self._model))
        if self.weights.kind == "master" and not masters:
            rank_zero_info(
                "The checkpoint has no float32 masters: they start from its bfloat16 weights."
            )
        if self.weights.kind != "master" and masters:
            rank_zero_info(
                "The float32 masters of the checkpoint are left behind: its bfloat16 weights go on, rounded by chance."
            )

    @override
    def teardown(self) -> None:
        self.weights.release()
        self.weights.to(torch.device("cpu"))
        super().teardown()

    @property
    def state_key(self) -> str:
        """What Lightning asks of callbacks, and so raise."""
        raise misplaced(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.weights.kind!r})"


def _refuse_unseen(optimizer: Any, before: Mapping[nn.Parameter, Tensor]) -> None:
    if any(p.dtype == SHORT and not torch.equal(p, old) for p, old in before.items()):
        raise Unsupported(
            "Bf16Precision cannot see this optimizer step, so weights would learn in bfloat16 only",
            f"{type(optimizer).__name__}, which calls no `step` of a `torch.optim.Optimizer`",
            "let it inherit from `torch.optim.Optimizer`, or use `AutocastPrecision('bf16-mixed')`",
        )


def _bare(optimizer: Any) -> Optimizer:
    found: Optimizer = bare(optimizer)
    return found


def _names(model: nn.Module | None) -> dict[nn.Parameter, str]:
    return {} if model is None else {p: name for name, p in model.named_parameters()}


def _refuse(strategy: Strategy, what: str, kinds: tuple[str, ...]) -> None:
    if is_of(strategy, *kinds):
        raise Unsupported(
            f"{what} exchanges whole parameters around a step, which this strategy shards or traces",
            type(strategy).__name__,
            "use `AutocastPrecision('bf16-mixed')`; `XlaPrecision` on XLA; or, for weights that are gathered in bfloat16 and "
            "learn in float32, `FSDP2Strategy` with mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)",
        )
