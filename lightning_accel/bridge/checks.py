"""Situations in which an edit would go wrong silently, told at setup instead."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from torch.nn.parameter import is_lazy

from lightning_accel.bridge.strategies import gathers, holding
from lightning_accel.errors import AccelError, Unsupported
from lightning_accel.surgery.compiled import runs_compiled


def refuse_mirror(trainer: object) -> None:
    """Raise when the Trainer comes from `pytorch_lightning`, whose classes are not these ones."""
    if not isinstance(trainer, Trainer):
        raise Unsupported(
            "lightning_accel works with `lightning.pytorch`; two packages of Lightning do not mix",
            f"a Trainer of `{type(trainer).__module__.split('.')[0]}`",
            "import Trainer, LightningModule and callbacks from `lightning.pytorch`",
        )


def refuse_sharded(
    strategy: Strategy, what: str, *, unless_gathered: bool = False, cuts: bool = True, do: str = ""
) -> None:
    """Raise unless parameters are whole on every rank and can be re-wrapped in mid-training.

    Args:
        strategy: Of the fit.
        what: Who asks.
        unless_gathered: A strategy that makes the module whole for a while will do.
        cuts: Whether it takes channels out.
        do: What can be done besides.
    """
    if unless_gathered and gathers(strategy):
        return
    if holding(strategy) in ("sharded", "traced"):
        does = f"{do}train with one device, or with strategy='ddp'"
        if unless_gathered:
            does = f"use strategy='accel_fsdp', {does}"
            if cuts:
                does += "; where you shard in `configure_model`, call "
                does += (
                    "`lightning_accel.prune_before_sharding(self, example=..., ratio=...)` there"
                )
        raise Unsupported(
            f"{what} cannot change tensors that a strategy has already sharded or traced",
            type(strategy).__name__,
            does,
        )


def refuse_spawn(strategy: Strategy, what: str) -> None:
    """Raise when the fit runs in spawned or forked children: their parent keeps the old shapes."""
    launcher = getattr(strategy, "launcher", None)
    if launcher is not None and "MultiProcessing" in type(launcher).__name__:
        raise Unsupported(
            f"{what} would leave the parent process with the unpruned shapes",
            f"a launcher that spawns or forks ({type(launcher).__name__})",
            "use strategy='ddp', which starts each rank as a script of its own",
        )


def refuse_compiled(pl_module: LightningModule) -> None:
    """Raise when the LightningModule itself was compiled."""
    if getattr(pl_module, "_compiler_ctx", None) or runs_compiled(pl_module):
        raise Unsupported(
            "the LightningModule itself is compiled, which breaks its hooks and logging",
            f"torch.compile on {type(pl_module).__name__}",
            "pass the plain module and add `BlockCompile()`, which compiles the networks inside it",
        )


def refuse_twin(trainer: Trainer, callback: Any, asked: str) -> None:
    """Raise when another callback of this type prunes the same layers; each would take the other's share."""
    kind = type(callback)
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if any(
        type(c) is kind and c is not callback and c.select == callback.select for c in callbacks
    ):
        raise AccelError(
            f"two `{kind.__name__}` prune the same layers in one Trainer",
            f"{callback.select} in both, of one {asked}",
            "pass one with `when=[1, 2]` and a `schedule`, or give each layers of its own by `select`",
        )


def is_trial(trainer: Trainer) -> bool:
    """Whether this is a `fast_dev_run`, in which all that a fit would do is tried in one epoch."""
    return bool(getattr(trainer, "fast_dev_run", False))


def is_built(pl_module: LightningModule) -> bool:
    """Whether all weights are there: none waits for `configure_model`, or for a first forward."""
    parameters = list(pl_module.parameters())
    return bool(parameters) and not any(is_lazy(p) for p in parameters)


def refuse_lazy(pl_module: LightningModule, what: str) -> None:
    """Raise when layers of torch's lazy kind have not seen their first input."""
    tensors = (*pl_module.named_parameters(), *pl_module.named_buffers())
    lazy = [name for name, tensor in tensors if is_lazy(tensor)]
    if lazy:
        raise Unsupported(
            f"{what} needs weights, and lazy layers have none before their first input",
            f"`{lazy[0]}` and {len(lazy) - 1} more are uninitialised",
            "run the network once on an example at the end of `__init__`, `setup` or `configure_model`: "
            "`self.net(example)` under `torch.no_grad()`",
        )


def require_optimizer(trainer: Trainer, what: str) -> None:
    """Raise when there is no optimizer, and so nothing that could recover from the edit."""
    if not any(group["params"] for o in trainer.optimizers for group in o.param_groups):
        raise AccelError(
            f"{what} in training needs an optimizer to recover with",
            "`configure_optimizers` gave none",
            "return one, or prune outside a fit with `lightning_accel.pruning.prune`",
        )
