"""Spectral norm after a cut: a layer is divided by its own norm, and not by what is left of a larger one's.

Its two vectors are estimates of singular vectors, one step nearer with each forward in training. The elements of them
that a cut leaves are no such vectors of what is left: the norm they give is too small, and outputs are several times
too large until they have settled.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

_STEPS = 100


@torch.no_grad()
def settle(model: nn.Module, cut: Container[str]) -> list[str]:
    """Let the vectors of layers whose weights were cut become singular vectors again, in place.

    Args:
        model: After the cut.
        cut: Names of the tensors that were cut.

    Returns:
        The names of the layers.
    """
    found = []
    for name, module in model.named_modules():
        for tensor, steps in _normed(module):
            if f"{name}.{tensor}".lstrip(".") in cut:
                steps()
                found.append(name)
    return found


def _normed(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the name of each weight below a spectral norm, and what settles that."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm):
            yield f"{hook.name}_orig", lambda hook=hook: _settle_hook(hook, module)
    for name, held in getattr(module, "parametrizations", {}).items():
        for place, norm in enumerate(held):
            if isinstance(norm, _SpectralNorm) and hasattr(norm, "_u"):
                yield (
                    f"parametrizations.{name}.original",
                    lambda held=held, place=place: _settle_norm(held, place),
                )


def _settle_norm(held: Any, place: int) -> None:
    weight = held.original
    for before in list(held)[:place]:
        weight = before(weight)
    norm = held[place]
    norm._power_method(norm._reshape_weight_to_matrix(weight), _STEPS)


def _settle_hook(hook: SpectralNorm, module: nn.Module) -> None:
    steps, hook.n_power_iterations = hook.n_power_iterations, _STEPS
    try:
        weight = hook.compute_weight(module, do_power_iteration=True)
    finally:
        hook.n_power_iterations = steps
    setattr(module, hook.name, weight.detach())
