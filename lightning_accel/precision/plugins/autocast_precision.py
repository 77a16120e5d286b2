"""Automatic mixed precision for the Trainer, in the best format of its device, with Lightning's gaps closed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.precision.precision import Precision
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_info
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_accel.bridge.strategies import gathers, is_of
from lightning_accel.errors import AccelError, Unsupported
from lightning_accel.precision.autocast import autocast
from lightning_accel.precision.gate import Gate
from lightning_accel.precision.mistakes import misplaced, told_of_short_weights
from lightning_accel.precision.policy import Policy, Precisions, check, resolve

_LIGHTNING_NAMES = {None: "32-true", torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}
_REFUSED = {
    "FSDP": "use Trainer(precision='bf16-mixed'), which shards in that format",
    "DeepSpeed": "use Trainer(precision='bf16-mixed'), which configures DeepSpeed's engine",
    "XLA": "use XlaPrecision('bf16-mixed')",
}


class AutocastPrecision(MixedPrecision):
    """Compute in the format that is fast on the Trainer's device; the weights stay in fp32.

    Every value is that of `Trainer(precision="bf16-mixed")` to the last bit. Over that of Lightning 2.6.6:
    the format is one that is fast on this device, chosen when the Trainer starts, and said with its reason;
    the device is the one the model is really on, also for accelerators that Lightning does not know; with
    fp16 a scheduler waits when the scaler skipped its optimizer's step; and bf16 allows gradient clipping
    with fused optimizers.

    Args:
        precision: "auto", or as for `Trainer`: "bf16-mixed", "16-mixed" or "32-true".

    Raises:
        ValueError: The precision is unknown.

    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(plugins=[AutocastPrecision("bf16-mixed")], accelerator="cpu", logger=False)
    >>> trainer.precision_plugin
    AutocastPrecision('bf16-mixed')
    """

    accel_baseline: ClassVar[str] = "32-true"
    """What `AccelReport` compares with."""

    def __init__(self, precision: Precisions = "auto") -> None:
        # MixedPrecision.__init__ wants a device, which nobody knows yet.
        self.requested = check(precision)
        self.policy: Policy | None = None
        self.device: str = ""
        self.precision = "32-true"  # for Lightning: what is in use, and not what was asked for
        self.scaler: torch.amp.GradScaler | None = None
        self._gate: Gate | None = None
        self._module: Callable[[], nn.Module | None] = type(None)

    @property
    def last_step_skipped(self) -> bool:
        """Whether the scaler skipped the last optimizer step; with a fused optimizer this waits for it."""
        return self._gate is not None and self._gate.skipped

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        """Choose the format: the first call of a run that knows the device."""
        assert isinstance(module, LightningModule)
        strategy = module.trainer.strategy
        _refuse(strategy)
        self._choose(strategy.root_device, strategy)
        return module

    @override
    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        """Check the device, now that the model is in place; with a scaler, watch the optimizers."""
        kinds = {p.device.type for p in model.parameters()} - {"meta"}
        if kinds and self.device not in kinds:  # a strategy that does not tell its real device
            self._choose(next(p.device for p in model.parameters() if p.device.type in kinds))
        self._release()
        module = model if isinstance(model, LightningModule) else getattr(model, "module", None)
        self._module = weakref.ref(model)
        if self.scaler is not None and isinstance(module, LightningModule):
            self._gate = Gate(module, optimizers, [config.scheduler for config in lr_schedulers])
        return model, optimizers, lr_schedulers

    @override
    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Step, and note whether the scaler let it happen."""
        if self._gate is None:
            return super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)
        with self._gate.attempt(optimizer), told_of_short_weights(self, lambda: model):
            return super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)

    @override
    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        if self.scaler is not None:
            super().clip_gradients(optimizer, clip_val, gradient_clip_algorithm)
            return
        # MixedPrecision refuses fused optimizers even without a scaler; Lightning #21435, can go with 2.7.
        Precision.clip_gradients(self, optimizer, clip_val, gradient_clip_algorithm)

    @override
    def autocast_context_manager(self) -> torch.autocast:
        policy = self._chosen()
        if policy.dtype is None:
            return torch.autocast(self.device, enabled=False)
        return autocast(self.device, policy.dtype)

    @contextmanager
    @override
    def forward_context(self) -> Iterator[None]:
        """Compute in the chosen format; in fp32, leave a surrounding autocast alone."""
        policy = self._chosen()
        if policy.dtype is None:
            with told_of_short_weights(self, self._module):
                yield
        else:
            with autocast(self.device, policy.dtype):
                yield

    @override
    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
            state["attempts"] = self._gate.state() if self._gate is not None else []
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.scaler is not None and state_dict:
            # Lightning's own plugin stores the scaler's state bare.
            self.scaler.load_state_dict(state_dict.get("scaler", state_dict))
            if self._gate is not None:
                self._gate.load(state_dict.get("attempts", []))

    @override
    def teardown(self) -> None:
        self._release()
        super().teardown()

    @property
    def state_key(self) -> str:
        """What Lightning asks of callbacks, and so raise."""
        raise misplaced(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.requested!r})"

    def _choose(self, device: torch.device, strategy: Strategy | None = None) -> None:
        policy = resolve(self.requested, device)
        if strategy is not None:
            policy = strategy.broadcast(policy)  # ranks time their devices, and must not differ
            if policy.scaler and isinstance(strategy, ModelParallelStrategy):
                raise Unsupported(
                    "a gradient scaler cannot see all shards of a gradient",
                    f"fp16 with {type(strategy).__name__}",
                    "pass '32-true', or 'bf16-mixed' where the device has it",
                )
        if (policy, device.type) == (self.policy, self.device):
            return
        self.policy, self.device = policy, device.type
        self.precision = _LIGHTNING_NAMES[policy.dtype]  # type: ignore[assignment]
        self.scaler = torch.amp.GradScaler(device.type) if policy.scaler else None
        format = str(policy.dtype or torch.float32).removeprefix("torch.")
        rank_zero_info(f"Computing in {format} on {device.type}: {policy.reason}.")

    def _chosen(self) -> Policy:
        if self.policy is None:
            raise AccelError(
                "the format is chosen when a Trainer starts, and none has",
                repr(self),
                "call this within fit, validate, test or predict",
            )
        return self.policy

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_module": type(None)}  # of a copy, no step is under way

    def _release(self) -> None:
        if self._gate is not None:
            self._gate.open()
            self._gate = None


def _refuse(strategy: Strategy) -> None:
    for kind, instead in _REFUSED.items():
        if is_of(strategy, kind) and not gathers(strategy):
            what = "AutocastPrecision does not go with this strategy"
            raise Unsupported(what, type(strategy).__name__, instead)
