"""How wide each layer was and is: output channels of convolutions, outputs of linear layers, sizes of embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from torch import nn

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def widths(before: Mapping[str, Sequence[int]], module: nn.Module) -> list[dict[str, Any]]:
    """Return one row per layer that has a weight matrix, in the order of the network; what is gone comes last.

    `before` and `after` are widths, `params_before` and `params_after` count the layer's own tensors. What is gone
    has an `after` of 0. Layers are looked for by the names of their tensors, so nothing is copied.

    Args:
        before: Sizes of tensors as they were, by their names; a tensor that is not named was as it is.
        module: The network as it is.

    >>> widths({"0.weight": (8, 4), "0.bias": (8,)}, nn.Sequential(nn.Linear(4, 6)))[0]["after"]
    6
    """
    layers = dict(module.named_modules())
    params = {name: tuple(p.shape) for name, p in module.named_parameters(remove_duplicate=False)}
    rows = []
    before = {**params, **{name: tuple(shape) for name, shape in before.items()}}
    for layer, tensors in _by_layer(before).items():
        was = {own: shape for own in tensors if (shape := before.get(_join(layer, own)))}
        now = {own: shape for own in tensors if (shape := params.get(_join(layer, own)))}
        matrix = next((own for own in tensors if len((was or now).get(own, ())) >= 2), None)
        if matrix is None or not (was or now):
            continue
        found = layers.get(layer) if now else None
        rows.append(
            {
                "layer": layer,
                "kind": type(found).__name__ if found is not None else "",
                "before": _width(was.get(matrix), found),
                "after": _width(now.get(matrix), found),
                "params_before": sum(map(prod, was.values())),
                "params_after": sum(map(prod, now.values())),
            }
        )
    return rows


def _by_layer(tensors: Mapping[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in tensors:
        layer, _, own = name.rpartition(".")
        found.setdefault(layer, []).append(own)
    return found


def _join(layer: str, own: str) -> str:
    return f"{layer}.{own}" if layer else own


def _width(shape: Sequence[int] | None, layer: nn.Module | None) -> int:
    if not shape:
        return 0
    if isinstance(layer, _TRANSPOSED):
        return int(shape[1]) * layer.groups
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        return int(shape[1])
    if isinstance(layer, nn.RNNBase):
        return int(shape[0]) // {"LSTM": 4, "GRU": 3}.get(layer.mode, 1)
    return int(shape[0])
