"""One training step of a copy of the user's module, under given settings, which can be timed.

A step is what Lightning does for one batch: the user's `training_step` in the autocast of the precision,
backward, clipping, the optimizer's step, and gradients set to none; also with accumulation, a gradient
scaler, closures (LBFGS) and manual optimization. Weights and optimizer state are copies, logging does
nothing, and the settings are applied by the same functions as in a real fit.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_accel.bridge.example import step_arguments
from lightning_accel.bridge.inert import inert_copy
from lightning_accel.bridge.technique import Context
from lightning_accel.errors import AccelError, Unsupported
from lightning_accel.measure.subject import localise_norms
from lightning_accel.precision.autocast import autocast
from lightning_accel.surgery.moment import Moments
from lightning_accel.surgery.rng import seed_rng
from lightning_accel.tuning.settings import Settings

_REMEMBERED = 20
"""Steps of which the loss is kept, to compare learning curves."""
_DRIFT = 64
"""Steps after which the first weights come back, so that nothing trains into denormal numbers."""
_SMALL_BYTES = 256 * 2**20
_SCALE = 2.0**16
"""Of gradients in fp16, with which a scaler begins."""


class Replica:
    """A copy of a module that trains on a few batches.

    Args:
        trainer: A Trainer within a fit, whose optimizers, precision and clipping are used.
        pl_module: The user's module, which is left alone.
        batches: Batches as `training_step` gets them.
        settings: What differs from the Trainer.
        hooks: Whether the module's hooks around training, epochs and batches run as well.
        clones: Whether the step writes into its batch, and so needs a fresh one each time.

    Raises:
        NoEffect: A setting does not apply to this module.
        Unsupported: The module cannot be copied.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batches: list[Any],
        settings: Settings,
        hooks: bool = False,
        clones: bool = False,
    ) -> None:
        self.settings = settings
        self.hooks = hooks
        self.losses: list[Tensor] = []
        self.loss: Tensor | None = None  # of the last step
        self.first_step_s = 0.0
        self._trainer, self._batches = trainer, batches
        self._count = self._block = 0
        self.clones = clones
        self.module = copied(trainer, pl_module)
        localise_norms(self.module)  # which would wait for processes that are not here
        memo: dict[int, Any] = {
            id(p): q for p, q in zip(pl_module.parameters(), self.module.parameters(), strict=True)
        }
        self.optimizers = [_with_own_attributes(o, memo) for o in trainer.optimizers]
        self._let_it_look(trainer, memo)
        self.device = trainer.strategy.root_device
        self._scaler = (
            torch.amp.GradScaler(self.device.type) if settings.format == "16-mixed" else None
        )
        self._every = max(1, int(trainer.accumulate_grad_batches))
        self._step = int(trainer.global_step)
        self._global: list[Callable[[], AbstractContextManager[Any]]] = []
        self._effects = ExitStack()
        self._enter(settings)
        if not self.module.automatic_optimization:
            self._let_it_optimize()
        self._remember()

    @contextmanager
    def around(self, seed: int | None = None) -> Iterator[None]:
        """Hold what the settings change in the process; random numbers depend on the block alone."""
        with ExitStack() as held:
            for effect in self._global:
                held.enter_context(effect())
            if self._count >= _DRIFT:
                self.rewind()
            seed_rng(self._block if seed is None else seed)
            self._block += 1
            if self.hooks and self._count == 0:
                self.module.on_train_start()
                self.module.on_train_epoch_start()
            yield

    def step(self) -> None:
        """Do one training step on the next batch."""
        last = (self._count + 1) % self._every == 0
        if self.module.automatic_optimization:
            self._automatic(last)
        else:
            self._run()
        self._count += 1

    def first_step(self) -> float:
        """Do the step that compiles and allocates, and return its seconds."""
        start = time.perf_counter()
        with self.around():
            self.step()
        self.first_step_s = time.perf_counter() - start
        return self.first_step_s

    def gradients(self, seed: int) -> tuple[float, dict[str, Tensor]]:
        """Return the loss of the first batch and the gradients by name, and change nothing.

        In manual optimization the optimizers do not step meanwhile, and what is left are the gradients of
        the last backward.
        """
        return self.course(seed, steps=1)[0]

    def course(self, seed: int, steps: int = 3) -> list[tuple[float, dict[str, Tensor]]]:
        """Return the same of several steps at the same weights, over which the module's own schedules move.

        Attributes that the step or the module's hook before a batch sets, counters and the number of the step
        go on from one to the next; then all is put back.
        """
        for optimizer in self.optimizers:
            optimizer.step = lambda closure=None: closure() if closure is not None else None  # type: ignore[method-assign,assignment]
        moment = Moments(self.module, few=2**62, norms=False).take()
        counted, self._count = self._count, 0
        kept, self.losses = self.losses, []
        try:
            return [self._gradients(seed + number) for number in range(steps)]
        finally:
            self._count, self.losses = counted, kept
            for optimizer in self.optimizers:
                del optimizer.step
                optimizer.zero_grad(set_to_none=True)
            moment.put_back()

    def _gradients(self, seed: int) -> tuple[float, dict[str, Tensor]]:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.module.zero_grad(set_to_none=True)
        with self.around(seed), _without_dropout(self.module):
            self._let_it_move()
            loss = self._run()
            scale = _SCALE if self._scaler is not None else 1.0
            if self.module.automatic_optimization:
                (loss * scale).backward()
        self._count += 1
        found = {
            name: _dense(p.grad) / scale
            for name, p in self.module.named_parameters()
            if p.grad is not None
        }
        return float(loss.detach()), found

    def _let_it_move(self) -> None:
        """Call the module's own hook before a batch, which may set what the step reads; some cannot run here."""
        start = self.module.on_train_batch_start
        if not self.hooks and not start.__module__.startswith("lightning."):
            with suppress(Exception):
                index = self._count % len(self._batches)
                start(_renewed(self._batches[index], self.clones), index)

    def has_float32_products(self) -> bool:
        """Tell whether a step multiplies matrices in float32, whose exactness can be chosen."""
        with _Products() as seen:
            self.gradients(0)
        return seen.found

    def perturb(self, size: float = 1e-7) -> None:
        """Change every weight by so much of itself: the noise that rounding would make."""
        with torch.no_grad():
            for parameter in self.module.parameters():
                if parameter.is_floating_point():
                    parameter.mul_(1 + size * torch.randn_like(parameter))
        self._remember()

    @torch.no_grad()
    def rewind(self) -> None:
        """Put weights, buffers and optimizers back to where the copy began, if that was remembered."""
        if not self._weights:
            return
        for tensor, before in zip(self._tensors(), self._weights, strict=True):
            tensor.copy_(before)
        for optimizer, state in zip(self.optimizers, self._states, strict=True):
            if state.get("state"):
                optimizer.load_state_dict(copy.deepcopy(state))
            else:
                for held in optimizer.state.values():
                    for value in held.values():
                        if isinstance(value, Tensor):
                            value.zero_()
        self._count = 0

    def _let_it_look(self, trainer: Trainer, memo: dict[int, Any]) -> None:
        """Give a module that reads its learning rate copies of its schedulers."""
        for before, after in zip(trainer.optimizers, self.optimizers, strict=True):
            memo[id(before)] = after
        made = [copy.deepcopy(c.scheduler, memo) for c in trainer.lr_scheduler_configs]
        several = made if len(made) > 1 else made[0] if made else None
        vars(self.module)["lr_schedulers"] = lambda: several

    def _remember(self) -> None:
        """Keep the first weights of a small network; a large one makes too few steps to need them."""
        small = sum(t.numel() * t.element_size() for t in self._tensors()) <= _SMALL_BYTES
        self._weights = [t.detach().clone() for t in self._tensors()] if small else []
        self._states = copy.deepcopy([o.state_dict() for o in self.optimizers]) if small else []

    def _tensors(self) -> list[Tensor]:
        return [*self.module.parameters(), *self.module.buffers()]

    def _enter(self, settings: Settings) -> None:
        """Enter the effects of the settings; those on the process are held while this copy runs."""
        context = Context(self._trainer, self.module, self.optimizers, is_copy=True)
        for technique in settings.techniques():
            effect = partial(technique.effect, context)
            if technique.is_global:
                self._global.append(effect)
            else:
                self._effects.enter_context(effect())

    def _context(self) -> AbstractContextManager[Any]:
        if self.settings.format is None:
            return self._trainer.precision_plugin.train_step_context()
        dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}[self.settings.format]
        return autocast(self.device.type, dtype)

    def _run(self) -> Tensor:
        """Run the user's step on the next batch, and return its loss."""
        index = self._count % len(self._batches)
        batch = _renewed(self._batches[index], self.clones)
        vars(self.module.trainer)["global_step"] = self._step + self._count // self._every
        if self.hooks:
            self.module.on_train_batch_start(batch, index)
        with torch.enable_grad(), self._context():
            output = self.module.training_step(*step_arguments(self.module, batch, index))
        if self.hooks:
            self.module.on_train_batch_end({} if output is None else output, batch, index)
        loss = output.get("loss") if isinstance(output, dict) else output
        if loss is None and not self.module.automatic_optimization:
            loss = vars(self.module).pop("_accel_loss", None)
        if not isinstance(loss, Tensor):
            raise AccelError(
                "a step that gives no loss can be neither run nor compared",
                f"`training_step` returned {type(output).__name__}",
                "return the loss for every batch",
            )
        self.loss = loss.detach()
        if len(self.losses) < _REMEMBERED:
            self.losses.append(loss.detach().float().clone())
        return loss

    def _automatic(self, last: bool) -> None:
        optimizer = self.optimizers[0]

        def closure() -> Tensor:
            loss = self._run()
            if self._count % self._every == 0:
                optimizer.zero_grad(set_to_none=True)
            scaled = loss / self._every if self._every > 1 else loss
            (self._scaler.scale(scaled) if self._scaler is not None else scaled).backward()
            if last:
                self._clip()
            return loss

        if not last:
            closure()
        elif self._scaler is None:
            optimizer.step(closure)  # type: ignore[arg-type]
        else:
            closure()
            self._scaler.step(optimizer)
            self._scaler.update()

    def _clip(self) -> None:
        limit = self._trainer.gradient_clip_val
        if not limit:
            return
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizers[0])
        params = [p for group in self.optimizers[0].param_groups for p in group["params"]]
        if str(self._trainer.gradient_clip_algorithm or "norm").endswith("value"):
            nn.utils.clip_grad_value_(params, limit)
        else:
            nn.utils.clip_grad_norm_(params, limit)

    def _let_it_optimize(self) -> None:
        """Give a module that optimizes by itself the copies of its optimizers."""
        own = vars(self.module)
        handles = [_Handle(optimizer) for optimizer in self.optimizers]
        own["optimizers"] = lambda *_, **__: handles[0] if len(handles) == 1 else handles

        def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            own["_accel_loss"] = loss.detach()
            loss.backward(*args, **kwargs)

        own["manual_backward"] = manual_backward


@contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    """Switch dropout layers off, whose masks differ between kernels even from the same seed."""
    before: list[tuple[nn.Module, str, Any]] = []
    for layer in module.modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd):
            before.append((layer, "training", layer.training))
        elif isinstance(layer, (nn.MultiheadAttention, nn.RNNBase)):
            before.append((layer, "dropout", layer.dropout))
    for layer, name, value in before:
        setattr(layer, name, type(value)(0))
    try:
        yield
    finally:
        for layer, name, value in before:
            setattr(layer, name, value)


def copied(trainer: Trainer, pl_module: LightningModule) -> LightningModule:
    """Return an inert copy of the module.

    Raises:
        Unsupported: It cannot be copied.
    """
    try:
        with inert_copy(trainer, pl_module) as made:
            return made
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise Unsupported(
            "the module cannot be copied, and nothing is measured on the original",
            f"{type(error).__name__}: {error}",
            "keep what cannot be copied outside of the module",
        ) from error


def _with_own_attributes(optimizer: Optimizer, memo: dict[int, Any]) -> Optimizer:
    """Copy an optimizer with what its class keeps beside groups and state, which `deepcopy` drops."""
    made = copy.deepcopy(optimizer, memo)
    for name, value in vars(optimizer).items():
        if name not in vars(made) and not name.startswith("_optimizer_") and name != "step":
            setattr(made, name, copy.deepcopy(value, memo))
    return made


def _renewed(value: Any, clones: bool) -> Any:
    """Copy the containers of a batch, out of which a step may take items, and perhaps the tensors."""
    if isinstance(value, Tensor):
        return value.clone() if clones else value
    if isinstance(value, dict):
        return type(value)({k: _renewed(v, clones) for k, v in value.items()})
    if type(value) in (list, tuple):
        return type(value)(_renewed(v, clones) for v in value)
    return copy.deepcopy(value) if clones else copy.copy(value)


def _dense(gradient: Tensor) -> Tensor:
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    return dense.detach().float().clone()


class _Products(TorchDispatchMode):
    """Looks out for matrix products in float32."""

    _NAMES = ("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "linear")

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.__name__.partition(".")[0] in self._NAMES and isinstance(out, Tensor):
            self.found = self.found or out.dtype == torch.float32
        return out


class _Handle:
    """An optimizer as `self.optimizers()` gives it: with what Lightning adds."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    def toggle_model(self, *_: Any, **__: Any) -> AbstractContextManager[None]:
        return nullcontext()
