"""Buffers that repeat a parameter under a name made of its own: averages and anchors inside of a model.

A buffer's name has no dot, so people replace it: `LitEma` of latent diffusion keeps `net0weight` for
`net.0.weight`, and elastic weight consolidation `net__0__weight_fisher`. Such a buffer is cut as its parameter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_accel.exact import exact
from lightning_accel.surgery.cut import Cut

_SIGNS = re.compile(r"[^0-9A-Za-z]")


def mirrored(model: nn.Module) -> dict[str, str]:
    """Return the names of such buffers, with the parameters that they repeat.

    >>> net = nn.Sequential(nn.Linear(2, 3))
    >>> net.register_buffer("0_weight_ema", net[0].weight.detach().clone())
    >>> mirrored(net)
    {'0_weight_ema': '0.weight'}
    """
    parameters = dict(model.named_parameters())
    places = [_below(parameters, place) for place in _places(model)]
    found: dict[str, str] = {}
    for where, module in model.named_modules():
        held = {
            name: buffer
            for name, buffer in module.named_buffers(where, recurse=False)
            if buffer.dim() and buffer.is_floating_point()
        }
        if not held:
            continue
        every = [fits for below in places if (fits := _fits(held, parameters, below))]
        most = max(map(len, every), default=0)
        best = [fits for fits in every if len(fits) == most]
        if best:
            found |= min(best, key=lambda fits, held=held: _distance(fits, held, parameters))  # type: ignore[misc]
    return found


def with_mirrors(model: nn.Module, cut: Cut) -> Cut:
    """Return a cut that is made in the buffers which repeat its parameters as well."""
    names = {b: p for b, p in mirrored(model).items() if p in cut.kept and b not in cut.kept}
    if not names:
        return cut
    shapes = {b: cut.before.tensors[p] for b, p in names.items()}
    return replace(
        cut,
        kept={**cut.kept, **{b: cut.kept[p] for b, p in names.items()}},
        before=replace(cut.before, tensors={**cut.before.tensors, **shapes}),
    )


def _places(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if any(True for _ in module.children()):
            yield f"{name}." if name else ""


def _below(parameters: Mapping[str, Tensor], place: str) -> dict[str, str]:
    """Return the parameters of the children of a place, and their names from there without signs."""
    rest = {n: n[len(place) :] for n in parameters if n.startswith(place)}
    return {n: _SIGNS.sub("", short) for n, short in rest.items() if "." in short}


def _fits(
    held: Mapping[str, Tensor], parameters: Mapping[str, Tensor], below: Mapping[str, str]
) -> dict[str, str]:
    """Return whose each buffer is by its name, if it is one of the parameters below a place."""
    found = {}
    for name, buffer in held.items():
        own = _SIGNS.sub("", name.rpartition(".")[2])
        near = [
            n
            for n, short in below.items()
            if own.startswith(short) or own.endswith(short)
            if parameters[n].shape == buffer.shape
        ]
        if near:
            longest = max(len(below[n]) for n in near)
            named = [n for n in near if len(below[n]) == longest]
            found[name] = min(
                named,
                key=lambda n, b=name: _distance({b: n}, held, parameters),  # type: ignore[misc]
            )
    return found


@torch.no_grad()
def _distance(
    fits: Mapping[str, str], held: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> float:
    return sum(float(exact(held[b] - parameters[p]).norm()) for b, p in fits.items())
