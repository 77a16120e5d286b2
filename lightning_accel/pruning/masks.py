"""Masks on single weights: the tensors keep their size, but chosen elements stay zero.

Two patterns: any share of the smallest magnitudes (Han et al. 2015, arXiv:1506.02626), or two of every
four neighbours along the inputs, which tensor cores can skip (Mishra et al. 2021, arXiv:2104.08378).
A masked network needs no less arithmetic on ordinary kernels: that is what structured pruning is for.

A mask is a boolean tensor by name of its parameter, `True` where the weight may live. Nothing is
registered in the model, so names in checkpoints stay as they are and any code can load them. `hold`
keeps the promise in training: gradients before a step, weights and moments after it. Of weights that are
sharded a process applies its part of each mask to its part of the weight.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from lightning_accel.arguments import one_of, open_share
from lightning_accel.errors import NoEffect, explain
from lightning_accel.surgery import Change, Receipt, Select
from lightning_accel.surgery.bypass import is_under, removed_blocks
from lightning_accel.surgery.memories import mixing
from lightning_accel.surgery.optimizers import parameters_of

Pattern = Literal["2:4"]
PATTERNS = get_args(Pattern)
Scope = Literal["local", "global"]
SCOPES = get_args(Scope)

_EVERYTHING = Select()
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MIXING: weakref.WeakKeyDictionary[Any, dict[str, bool]] = weakref.WeakKeyDictionary()
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Masks(NamedTuple):
    """Masks by name of their parameter, and the chosen layers that got none, with the reason."""

    keep: dict[str, Tensor]
    skipped: tuple[Change, ...] = ()


def magnitude_masks(
    model: nn.Module, *, amount: float, select: Select = _EVERYTHING, scope: Scope = "local"
) -> Masks:
    """Return masks that leave out the smallest weights of linear layers and convolutions.

    Args:
        model: The network; it is not changed.
        amount: Share of the weights to leave out, above 0 and below 1.
        select: Which layers. Frozen and parametrized weights are skipped.
        scope: "local" leaves out this share of each layer, "global" of all of them together.

    Raises:
        ValueError: The amount or the scope is out of range.
        NoEffect: No layer is left, or the amount is less than one weight.

    >>> masks = magnitude_masks(nn.Linear(8, 4), amount=0.75)
    >>> int(masks.keep["weight"].sum())
    8
    """
    check_amount(amount)
    one_of("scope", scope, SCOPES)
    found, skipped = _weights(model, select)
    sets = [found] if scope == "global" else [{name: weight} for name, weight in found.items()]
    keep: dict[str, Tensor] = {}
    for chosen in sets:
        keep |= _largest(chosen, amount)
    return _require(Masks(keep, tuple(skipped)), f"amount={amount}")


def pattern_masks(model: nn.Module, *, pattern: str = "2:4", select: Select = _EVERYTHING) -> Masks:
    """Return masks that keep the larger two of every four neighbouring inputs of each output.

    Layers whose number of inputs (per group of a convolution) is no multiple of four are skipped.

    Raises:
        ValueError: The pattern is unknown.
        NoEffect: No layer is left.

    >>> layer = nn.Linear(4, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([1.0, -4.0, 2.0, 3.0]))
    >>> pattern_masks(layer).keep["weight"]
    tensor([[False,  True, False,  True]])
    """
    one_of("pattern", pattern, PATTERNS)
    found, skipped = _weights(model, select)
    keep: dict[str, Tensor] = {}
    for name, weight in found.items():
        if isinstance(model.get_submodule(name.rpartition(".")[0]), _TRANSPOSED):
            skipped.append(Change(name, "no kernel skips zeros of transposed convolutions"))
        elif weight.shape[1] % 4:
            skipped.append(Change(name, f"its {weight.shape[1]} inputs are no multiple of 4"))
        else:
            keep[name] = two_of_four(weight)
    return _require(Masks(keep, tuple(skipped)), f"pattern={pattern!r}")


def two_of_four(weight: Tensor) -> Tensor:
    """Return which elements are the larger two of every four neighbours along dimension 1.

    Of equal ones the first stays.
    """
    fours = weight.detach().abs().movedim(1, -1).unflatten(-1, (-1, 4))
    order = fours.argsort(dim=-1, descending=True, stable=True)
    keep = torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, order[..., :2], True)
    return keep.flatten(-2).movedim(-1, 1).contiguous()


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor], *, count: bool = True) -> Receipt:
    """Set the masked elements of the weights to zero, in place.

    Args:
        model: The network.
        masks: By name of the weight.
        count: Tell how many are zero, which waits for the device.

    >>> layer = nn.Linear(8, 4)
    >>> receipt = apply_masks(layer, magnitude_masks(layer, amount=0.75).keep)
    >>> receipt.changes[0].what, receipt.changes[0].after
    ('masked', '24 of 32 are zero')
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    changes = []
    for name, keep in masks.items():
        parameter = part(parameters[name])
        if parameter.shape != keep.shape:
            raise ValueError(
                explain(
                    f"the mask of `{name}` is not of its shape",
                    f"{tuple(keep.shape)} for {tuple(parameter.shape)}",
                    "make masks for this model",
                )
            )
        parameter.masked_fill_(~keep.to(parameter.device), 0.0)
        if not count:
            continue
        zeros = keep.numel() - int(keep.sum())
        changes.append(Change(name, "masked", "", f"{zeros} of {keep.numel()} are zero"))
    return Receipt(tuple(changes))


@torch.no_grad()
def hold_gradients(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the gradients of masked weights to zero, so that neither clipping nor a step sees them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, keep in masks.items():
        gradient = parameters[name].grad
        if gradient is not None:
            gradient = part(gradient)
            gradient.masked_fill_(~keep.to(gradient.device), 0.0)


def part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor: of one that is sharded its shard, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def mask_gradients(model: nn.Module, masks: Mapping[str, Tensor]) -> list[RemovableHandle]:
    """Let every backward give masked weights the gradient zero, until the handles are removed.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> handles = mask_gradients(layer, {"weight": torch.tensor([[True, False]])})
    >>> layer(torch.ones(1, 2)).sum().backward()
    >>> layer.weight.grad
    tensor([[1., 0.]])
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return [
        parameters[name].register_hook(partial(_masked, ~keep.to(parameters[name].device)))
        for name, keep in masks.items()
        if parameters[name].requires_grad
    ]


@torch.no_grad()
def hold(model: nn.Module, masks: Mapping[str, Tensor], optimizer: Any) -> None:
    """Set the masked weights that an optimizer stepped, and its memories of them, to zero again.

    Others are left alone: it may step within a backward that still needs them. State that is not one number per element (factors, preconditioners, codes) cannot be masked; the
    weights are in any case.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stepped = {id(p) for p in parameters_of(optimizer)}
    for name, keep in masks.items():
        parameter = parameters[name]
        if id(parameter) not in stepped:
            continue
        removed_blocks = ~keep.to(parameter.device)
        part(parameter).masked_fill_(removed_blocks, 0.0)
        for key, value in optimizer.state.get(parameter, {}).items():
            fits = isinstance(value, Tensor) and value.shape == parameter.shape
            if fits and value.is_floating_point() and not _mixes(optimizer, parameter, key):
                mine = part(value)
                mine.masked_fill_(removed_blocks.to(mine.device), 0)


def follow_masks(model: nn.Module, masks: Mapping[str, Tensor], receipt: Receipt) -> Masks:
    """Return the masks of a model from which `receipt` has cut channels.

    Where the cut took neighbours of a two-of-four pattern apart, `restored` puts it back. Masks of whole blocks
    that are gone stay as they are, until the blocks come back.
    """
    away = removed_blocks(model)
    moved = {id(move.new): move for move in receipt.moved}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    keep: dict[str, Tensor] = {}
    skipped: list[Change] = []
    for name, mask in masks.items():
        if is_under(name, away):
            keep[name] = mask
            continue
        move = moved.get(id(parameters[name])) if name in parameters else None
        sliced = mask if move is None else move.kept.take(mask)
        if name not in parameters or sliced.shape != parameters[name].shape:
            skipped.append(Change(name, "the edit replaced it, so its mask no longer fits"))
        else:
            keep[name] = sliced
    return Masks(keep, tuple(skipped))


def restored(model: nn.Module, masks: Mapping[str, Tensor], *, pattern: str) -> Masks:
    """Return masks of the pattern again for a model that was cut since, from its present weights.

    What was masked is zero and so the first to be left out again. Layers whose number of inputs is no
    multiple of four any more keep their sliced mask and are named under `skipped`.
    """
    one_of("pattern", pattern, PATTERNS)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    keep: dict[str, Tensor] = {}
    skipped: list[Change] = []
    for name, mask in masks.items():
        if name not in parameters:  # of a block that is gone
            keep[name] = mask
            continue
        weight = parameters[name]
        if weight.shape[1] % 4:
            keep[name] = mask
            skipped.append(Change(name, f"its {weight.shape[1]} inputs are no multiple of 4"))
        else:
            keep[name] = two_of_four(weight)
    return Masks(keep, tuple(skipped))


def zero_share(masks: Mapping[str, Tensor]) -> float:
    """Return the share of masked elements that are zero.

    >>> zero_share({"weight": torch.tensor([True, False, False, False])})
    0.75
    """
    total = sum(keep.numel() for keep in masks.values())
    return 1.0 - sum(int(keep.sum()) for keep in masks.values()) / total if total else 0.0


def check_amount(amount: Any) -> float:
    """Return `amount` if it is a share above 0 and below 1, or raise."""
    return float(open_share("amount", amount))


def _mixes(optimizer: Any, parameter: Tensor, key: str) -> bool:
    """Tell whether a state of a square weight is a matrix over its rows or columns; looked up once."""
    if parameter.dim() != 2 or parameter.shape[0] != parameter.shape[1]:
        return False
    known = _MIXING.setdefault(optimizer, {})
    if key not in known:
        keys = {
            k for state in optimizer.state.values() if isinstance(state, Mapping) for k in state
        }
        mixed = mixing(optimizer)
        known.update({k: k in mixed for k in keys})
    return known[key]


def _masked(removed_blocks: Tensor, gradient: Tensor) -> Tensor:
    return gradient.masked_fill(removed_blocks, 0.0)


def _weights(model: nn.Module, select: Select) -> tuple[dict[str, nn.Parameter], list[Change]]:
    """Return the weights to mask by name, each tied one once, and what was skipped."""
    found: dict[str, nn.Parameter] = {}
    skipped: list[Change] = []
    for name, weight in _candidates(model, select):
        if weight is None:
            skipped.append(Change(name, "its weight is computed by a parametrization"))
        elif not weight.requires_grad:
            skipped.append(Change(name, "it is frozen"))
        elif not any(weight is other for other in found.values()):
            found[name] = weight
    return found, skipped


def _candidates(model: nn.Module, select: Select) -> Iterator[tuple[str, nn.Parameter | None]]:
    for prefix, module in select.require(model).items():
        if isinstance(module, (*_LAYERS, *_TRANSPOSED)):
            yield f"{prefix}.weight".lstrip("."), module._parameters.get("weight")


def _largest(weights: Mapping[str, Tensor], amount: float) -> dict[str, Tensor]:
    values = torch.cat([w.detach().abs().flatten().float() for w in weights.values()])
    removed_blocks = math.floor(len(values) * amount + 1e-6)
    keep = torch.ones(len(values), dtype=torch.bool, device=values.device)
    keep[values.argsort(stable=True)[:removed_blocks]] = False
    parts = keep.split([w.numel() for w in weights.values()])
    return {n: part.view(w.shape) for (n, w), part in zip(weights.items(), parts, strict=True)}


def _require(masks: Masks, asked: str) -> Masks:
    if zero_share(masks.keep) == 0.0:
        reasons = "; ".join(f"`{c.name}`: {c.what}" for c in masks.skipped[:4])
        raise NoEffect(
            f"no weight is masked by {asked}",
            reasons or "no selected linear layer or convolution with that many weights",
            "widen `select`, or raise `amount`",
        )
    return masks
