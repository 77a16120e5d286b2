"""Channels made alike before they are rounded, without a change of what the network computes.

A channel that is large where others are small takes the grid from them. Between a layer or a norm and the layers that alone
read it, each channel may be divided by a factor that the readers' weights are multiplied with: functions like ReLU pass
factors on. Two choices of factors:

- "cross_layer" (Nagel et al. 2019, arXiv:1906.04721): the weights of both sides get equal ranges per channel.
- "smoothquant" (Xiao et al. 2022, arXiv:2211.10438): s = max|X|^a / max|W|^(1-a) with a = 0.5, which moves outliers of
  what comes into layers over to their weights.

Pairs are found in one forward, and the network has to compute as before: what does not is put back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_accel.errors import Unsupported
from lightning_accel.quantization.budget import least_db, outputs_of
from lightning_accel.quantization.calibration import in_mode, observe_channels
from lightning_accel.quantization.flow import Flow, flow
from lightning_accel.quantization.layers import (
    QuantizedAttention,
    QuantizedEmbedding,
    QuantizedLayer,
)
from lightning_accel.quantization.shared import shared_tensors
from lightning_accel.surgery.call import Call

Equalize = Literal["cross_layer", "smoothquant"]
EQUALIZE = ("cross_layer", "smoothquant")
SAME_DB = 80.0
"""Signal to noise against the network before, which a right factor keeps: float32 leaves some 120 dB."""
_PASSES = 10
_SMOOTHED = 0.5
_LARGEST = 1e3
NORMS = (*(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm),)


class Pair(NamedTuple):
    """A module whose outputs have channels, and the layers that alone read them."""

    giver: str
    readers: tuple[str, ...]


@torch.no_grad()
def equalize(
    model: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    batches: Sequence[Sequence[Call]],
    how: Equalize,
) -> tuple[list[Pair], list[str]]:
    """Change weights in place; return the pairs that are changed, and those that are left with the reason.

    Args:
        model: In eval mode.
        layers: Its layers, which compute plainly.
        batches: To run it on.
        how: A word of `EQUALIZE`.
    """
    with in_mode(layers, "plain"):
        before = outputs_of(model, batches, None)
        made: list[Pair] = []
        left: list[str] = []
        for pair in pairs(model, layers, batches, how, left):
            kept = [p.clone() for p in _touched(model, pair)]
            _divide(model, pair, _factors(model, pair, batches, how))
            if least_db(before, outputs_of(model, batches, None)) >= SAME_DB:
                made.append(pair)
                continue
            _put_back(model, pair, kept)
            left.append(
                f"`{pair.giver}` is not equalized: the network would compute something else"
            )
        once = [[p.clone() for p in _touched(model, pair)] for pair in made]
        # Once more, since a layer between two pairs is of both.
        for _ in range(_PASSES if how == "cross_layer" else 0):
            for pair in made:
                _divide(model, pair, _factors(model, pair, batches, how))
        if least_db(before, outputs_of(model, batches, None)) < SAME_DB:
            for pair, values in zip(made, once, strict=True):
                _put_back(model, pair, values)
        return made, left


def _put_back(model: nn.Module, pair: Pair, values: Sequence[Tensor]) -> None:
    for parameter, old in zip(_touched(model, pair), values, strict=True):
        parameter.copy_(old)


def pairs(
    model: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    batches: Sequence[Sequence[Call]],
    how: Equalize,
    left: list[str],
) -> list[Pair]:
    """Return the modules that only layers read, each called once and with weights of its own; tell `left` of others.

    Raises:
        Unsupported: Some module with weights does not run on the batches, and may read what others would be given.
    """
    flows = [flow(model, layers, calls) for calls in batches]
    _refuse_unseen(model, set().union(*(seen.calls for seen in flows)))
    shared = shared_tensors(model)
    first, *others = (_pairs_of(model, layers, seen, how, shared) for seen in flows)
    found = [pair for pair, _ in first if all(pair in dict(other) for other in others)]
    kept = [pair.giver for pair in found if any(dict(one)[pair] for one in (first, *others))]
    left += [
        f"`{name}` is not equalized: the network keeps what it gives after the forward, where others may read it"
        for name in kept
    ]
    return [pair for pair in found if pair.giver not in kept]


def _pairs_of(
    model: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    seen: Flow,
    how: Equalize,
    shared: set[int],
) -> list[tuple[Pair, bool]]:
    """Return pairs, and whether someone holds what lies between after the forward."""
    found = []
    for key, names in seen.givers.items():
        giver, readers = names[0], tuple(dict.fromkeys(seen.readers_alone(key)))
        if not readers or not all(_is_reader(seen, layers[name]) for name in readers):
            continue
        pair = Pair(giver, readers)
        if any(seen.calls[name] > 1 or _is_hooked(model, name) for name in (giver, *readers)):
            continue
        if not _fits(model, pair):
            continue
        if _is_giver(model.get_submodule(giver), how) and not any(
            id(p) in shared for p in _touched(model, pair)
        ):
            found.append((pair, seen.is_kept(key)))
    return found


def _refuse_unseen(model: nn.Module, ran: set[str]) -> None:
    idle = [
        name
        for name, module in model.named_modules()
        if name
        and name not in ran
        and next(module.parameters(recurse=False), None) is not None
        # Whose output layer is never called: attention reads its weights.
        and not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)
    ]
    if idle:
        raise Unsupported(
            "channels are made alike where all that reads them is seen",
            f"on the calibration nothing comes into {', '.join(f'`{name}`' for name in idle[:4])}",
            "calibrate on batches on which it runs, take it out, or leave `equalize` out",
        )


def _is_hooked(model: nn.Module, name: str) -> bool:
    """Whether hooks of the user's look at what goes into a module or comes out of it."""
    module = model.get_submodule(name)
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(not getattr(hook, "is_part_of_network", False) for hook in hooks)


def _fits(model: nn.Module, pair: Pair) -> bool:
    """Whether as many channels are given as are read; whether they are the same ones, the proof finds out."""
    giver: Any = model.get_submodule(pair.giver)
    if not isinstance(getattr(giver, "weight", None), Tensor):
        return False
    return all(len(_columns(model, name)) == len(_rows(giver)) for name in pair.readers)


def _is_reader(seen: Flow, layer: QuantizedLayer) -> bool:
    if isinstance(layer, (QuantizedAttention, QuantizedEmbedding)):
        return False
    return int(getattr(layer, "groups", 1)) == 1


def _is_giver(module: nn.Module, how: Equalize) -> bool:
    if isinstance(module, NORMS):
        one_axis = len(getattr(module, "normalized_shape", (0,))) == 1
        return isinstance(module.weight, Tensor) and one_axis
    if how == "smoothquant":
        return False
    plain = not isinstance(module, (QuantizedAttention, QuantizedEmbedding))
    grouped = getattr(module, "groups", 1) > 1 and getattr(module, "channels_axis", 0) == 1
    return isinstance(module, QuantizedLayer) and plain and not grouped


def _touched(model: nn.Module, pair: Pair) -> list[Tensor]:
    giver: Any = model.get_submodule(pair.giver)
    readers: list[Any] = [model.get_submodule(name) for name in pair.readers]
    held = [giver.weight, getattr(giver, "bias", None), *(reader.weight for reader in readers)]
    return [one for one in held if isinstance(one, Tensor)]


def _factors(
    model: nn.Module, pair: Pair, batches: Sequence[Sequence[Call]], how: Equalize
) -> Tensor:
    """Return by how much each channel is divided."""
    weights = torch.stack([_largest(_columns(model, name)) for name in pair.readers]).amax(0)
    if how == "smoothquant":
        reader = model.get_submodule(pair.readers[0])
        inputs = observe_channels(
            model, reader, batches, 1 if hasattr(reader, "kernel_size") else -1
        )
        found = inputs**_SMOOTHED / weights ** (1 - _SMOOTHED)
    else:
        giver = model.get_submodule(pair.giver)
        found = (_largest(_rows(giver)) / weights).sqrt()
    usable = found.isfinite() & (found > 0)
    return torch.where(usable, found.clamp(1 / _LARGEST, _LARGEST), 1.0)


def _divide(model: nn.Module, pair: Pair, factor: Tensor) -> None:
    giver: Any = model.get_submodule(pair.giver)
    rows = _rows(giver)
    rows /= factor.view(-1, *[1] * (rows.dim() - 1)).to(rows.dtype)
    if isinstance(getattr(giver, "bias", None), Tensor):
        giver.bias /= factor.to(giver.bias.dtype)
    for name in pair.readers:
        columns = _columns(model, name)
        columns *= factor.view(-1, *[1] * (columns.dim() - 1)).to(columns.dtype)


def _rows(module: Any) -> Tensor:
    """Return a view of the weight whose first dimension is that of the outputs."""
    weight: Tensor = module.weight
    return weight.transpose(0, getattr(module, "channels_axis", 0))


def _columns(model: nn.Module, name: str) -> Tensor:
    """Return a view of the weight whose first dimension is that of the inputs."""
    layer: Any = model.get_submodule(name)
    weight: Tensor = layer.weight
    return weight.transpose(0, 1 - layer.channels_axis)


def _largest(rows: Tensor) -> Tensor:
    return (
        rows.detach().float().abs().flatten(1).amax(1)
        if rows.dim() > 1
        else rows.detach().float().abs()
    )
