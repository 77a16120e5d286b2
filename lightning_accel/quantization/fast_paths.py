"""Encoders of torch whose fast path in eval mode reads weights itself: it is closed where layers are quantized."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_accel.quantization.layers import layers_of

_FAST: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
"""By which attribute each may take its fast path, and what forbids it."""
_FAST_BEFORE = "_accel_fast_path"


def leave_fast_paths(model: nn.Module) -> None:
    """Let encoders of torch call their layers in eval mode too: their fast path reads weights instead."""
    for module in model.modules():
        for kind, name, off in _FAST:
            if isinstance(module, kind) and _FAST_BEFORE not in vars(module) and layers_of(module):
                vars(module)[_FAST_BEFORE] = getattr(module, name)
                setattr(module, name, off)


def back_to_fast_paths(model: nn.Module) -> None:
    """Undo `leave_fast_paths` where no quantized layer is left."""
    for module in model.modules():
        for kind, name, _ in _FAST:
            if isinstance(module, kind) and _FAST_BEFORE in vars(module) and not layers_of(module):
                setattr(module, name, vars(module).pop(_FAST_BEFORE))
