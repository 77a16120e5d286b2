"""What is worth trying for a module on a device, in which order, and why the rest is not.

The order is that of coordinate search: what changes most comes first, so that later choices are measured on
top of it. A rule of thumb may put something on this list; only a measurement takes it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.precision.precision import Precision
from torch import nn

from lightning_accel.bridge.model_edit import ModelEdit
from lightning_accel.compilation import find_blocks
from lightning_accel.errors import NoEffect, explain
from lightning_accel.precision.autocast import takes_effect
from lightning_accel.surgery import Stage
from lightning_accel.surgery.compiled import is_compiled
from lightning_accel.tuning.settings import TECHNIQUES


class Skipped(NamedTuple):
    """A value that is not tried, and why."""

    technique: str
    value: str
    reason: str


class Contest(NamedTuple):
    """Values of one technique to measure side by side."""

    technique: str
    values: tuple[str, ...]


def check_techniques(techniques: object) -> tuple[str, ...]:
    """Return the techniques to try, all by default, or raise and list the known ones.

    >>> check_techniques(["optimizer", "precision"])
    ('precision', 'optimizer')
    """
    if techniques is None:
        return TECHNIQUES
    given = [techniques] if isinstance(techniques, str) else techniques
    known = ", ".join(repr(name) for name in TECHNIQUES)
    if not isinstance(given, Collection) or not all(isinstance(t, str) for t in given):
        raise TypeError(
            explain("`techniques` are names", repr(techniques), f"pass some of {known}")
        )
    odd = sorted(set(given) - set(TECHNIQUES))
    if odd or not given:
        raise ValueError(
            explain("unknown `techniques`", ", ".join(odd) or "none", f"pass some of {known}")
        )
    return tuple(name for name in TECHNIQUES if name in given)


def find(
    trainer: Trainer,
    pl_module: LightningModule,
    *,
    numerics: str,
    techniques: tuple[str, ...] = TECHNIQUES,
    attention: bool = False,
) -> tuple[list[Contest], list[Skipped]]:
    """Return the values to measure for each technique but data loading, and those left out.

    Args:
        trainer: A Trainer within a fit.
        pl_module: The user's module.
        numerics: The tier that the user allows.
        techniques: Those to try.
        attention: Whether the step calls `scaled_dot_product_attention`.
    """
    device = trainer.strategy.root_device
    contests: list[Contest] = []
    skipped: list[Skipped] = []
    finders = {
        "precision": lambda: _precision(trainer, pl_module, device, numerics),
        "matmul": lambda: _matmul(trainer, device, numerics),
        "float8": lambda: _float8(trainer, pl_module, device, numerics),
        "memory_format": lambda: _memory_format(trainer, pl_module),
        "optimizer": lambda: _optimizer(trainer),
        "attention": lambda: _attention(trainer, device, attention),
        "compilation": lambda: _compilation(trainer, pl_module, device),
    }
    for technique in techniques:
        if technique not in finders:
            continue
        found = list(finders[technique]())
        skipped += [one for one in found if isinstance(one, Skipped)]
        values = tuple(one for one in found if isinstance(one, str))
        if values:
            contests.append(Contest(technique, values))
    return contests, skipped


Found = Iterator[str | Skipped]


def _precision(
    trainer: Trainer, pl_module: LightningModule, device: torch.device, numerics: str
) -> Found:
    plugin = trainer.precision_plugin
    plain = type(plugin) is Precision
    lightnings = type(plugin) is MixedPrecision and getattr(plugin, "scaler", None) is None
    for value, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        reason = None
        if not plain and not (lightnings and value == "bf16"):
            reason = f"the Trainer already has {type(plugin).__name__}"
        elif numerics == "exact" and plain:
            reason = "shorter than fp32, which numerics='exact' does not allow"
        elif value == "fp16" and device.type == "cpu":
            reason = "4 to 100 times slower than fp32 on CPUs"
        elif value == "fp16" and takes_effect(device, torch.bfloat16):
            reason = "bf16 has the range of fp32 and needs no scaler"
        elif value == "fp16" and not pl_module.automatic_optimization:
            reason = "manual optimization would have to scale its losses by itself"
        elif not takes_effect(device, dtype):
            reason = f"autocast to {value} has no effect on {device.type}"
        yield value if reason is None else Skipped("precision", value, reason)


def _matmul(trainer: Trainer, device: torch.device, numerics: str) -> Found:
    if _has(trainer, "MatmulPrecision"):
        yield Skipped("matmul", "any", "the Trainer already has MatmulPrecision")
        return
    current = torch.get_float32_matmul_precision()
    for value in ("high", "medium"):
        if value == current:
            yield Skipped("matmul", value, "set already")
        elif device.type not in ("cpu", "cuda"):
            yield Skipped("matmul", value, f"has no effect on {device.type}")
        else:
            yield value


def _float8(
    trainer: Trainer, pl_module: LightningModule, device: torch.device, numerics: str
) -> Found:
    reason = None
    if numerics != "low":
        reason = f"needs numerics='low', {numerics!r} was asked for"
    elif device.type != "cuda":
        reason = f"needs a CUDA device of capability 8.9 or more, this is {device.type}"
    elif torch.cuda.get_device_capability(device) < (8, 9):
        reason = f"{torch.cuda.get_device_name(device)} has no float8 units"
    elif _has(trainer, "Float8Linear"):
        reason = "the Trainer already has Float8Linear"
    yield "tensorwise" if reason is None else Skipped("float8", "tensorwise", reason)


def _memory_format(trainer: Trainer, pl_module: LightningModule) -> Found:
    images = (nn.Conv2d, nn.ConvTranspose2d)
    if _has(trainer, "MemoryFormat"):
        yield Skipped("memory_format", "channels_last", "the Trainer already has MemoryFormat")
    elif not any(isinstance(m, images) for m in pl_module.modules()):
        yield Skipped("memory_format", "channels_last", "no two-dimensional convolution")
    else:
        yield "channels_last"


def _optimizer(trainer: Trainer) -> Found:
    if _has(trainer, "FusedOptimizer"):
        yield Skipped("optimizer", "any", "the Trainer already has FusedOptimizer")
        return
    defaults = [optimizer.defaults for optimizer in trainer.optimizers]
    for value in ("fused", "foreach"):
        if not defaults or not all(value in held for held in defaults):
            names = ", ".join(sorted({type(o).__name__ for o in trainer.optimizers})) or "none"
            yield Skipped("optimizer", value, f"no such implementation of {names}")
        elif all(group.get(value) for o in trainer.optimizers for group in o.param_groups):
            yield Skipped("optimizer", value, "set already")
        else:
            yield value


def _attention(trainer: Trainer, device: torch.device, used: bool) -> Found:
    if not used:
        yield Skipped("attention", "any", "the step never calls scaled_dot_product_attention")
        return
    if _has(trainer, "AttentionBackend"):
        yield Skipped("attention", "any", "the Trainer already has AttentionBackend")
        return
    # On a CPU flash is what PyTorch takes by itself.
    yield from ("flash", "efficient", "cudnn") if device.type == "cuda" else ("math",)
    if device.type != "cuda":
        yield Skipped("attention", "cudnn", f"needs CUDA, this is {device.type}")


def _compilation(trainer: Trainer, pl_module: LightningModule, device: torch.device) -> Found:
    edits = [c for c in trainer.callbacks if isinstance(c, ModelEdit)]  # type: ignore[attr-defined]
    if any(edit.stage == Stage.COMPILE for edit in edits):
        yield Skipped("compilation", "any", "the Trainer already has BlockCompile")
        return
    if is_compiled(pl_module):
        yield Skipped("compilation", "any", "the module is compiled already")
        return
    try:
        parts, wholes = (find_blocks(pl_module, blocks=b, itself=False) for b in (True, False))
    except NoEffect as error:
        yield Skipped("compilation", "any", str(error))
        return
    if parts.keys() == wholes.keys():
        yield Skipped("compilation", "blocks", "no block repeats: the same as whole")
    else:
        yield "blocks"
    yield "whole"
    for value in ("with CUDA graphs", "with autotuning"):
        if device.type == "cuda":
            yield value
        else:
            yield Skipped("compilation", value, f"needs CUDA, this is {device.type}")


def _has(trainer: Trainer, name: str) -> bool:
    """Tell whether the Trainer has a callback of ours, by name: classes of absent extras count too."""
    return any(type(c).__name__ == name for c in trainer.callbacks)  # type: ignore[attr-defined]
