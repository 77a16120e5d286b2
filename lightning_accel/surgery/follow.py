"""Optimizer state follows its parameters through an edit.

Momentum and second moments are per-element memories of a parameter, so what survives an edit is the
same choice of elements. A dense model with the removed elements masked and the same optimizer then
continues exactly like the smaller one with the sliced state (loss difference below 1e-12 in float64;
benchmarks/resume_after_prune.py). That is all that is claimed: exact continuation, not a smoother one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.surgery.optimizers import parameters_of, within
from lightning_accel.surgery.receipt import Change, Moved, Receipt


@torch.no_grad()
def follow(optimizer: Any, receipt: Receipt) -> Receipt:
    """Let `optimizer` continue after the edit described by `receipt`, in place.

    Parameter groups keep their order, learning rates and schedules; step counts stay. Every state
    tensor of the old parameter's shape is sliced with it. State of any other shape (factored,
    quantized or flattened moments) cannot be sliced: it is dropped for that parameter, the optimizer
    starts it anew, and the returned receipt says so under `skipped`.

    Args:
        optimizer: An optimizer, or whatever holds one or several: see `optimizers.within`.
        receipt: What the edit returned.

    Returns:
        One change per parameter whose state was sliced, and one `skipped` per state that was reset.

    >>> layer = nn.Linear(2, 2)
    >>> follow(torch.optim.SGD(layer.parameters()), Receipt()).changes
    ()
    """
    followed = [_follow(one, receipt) for one in within(optimizer)]
    return sum(followed, Receipt())


def _follow(optimizer: Any, receipt: Receipt) -> Receipt:
    changes: list[Change] = []
    reset: list[Change] = []
    # Groups that an optimizer inside shares have been replaced already.
    held = {id(p) for p in parameters_of(optimizer)}
    moves = [m for m in receipt.moved if id(m.old) in held or id(m.new) in held]
    _replace_members(optimizer, moves)
    for move in moves:
        state = optimizer.state.pop(move.old, None)
        if not state:
            continue
        if not isinstance(state, Mapping):
            reset.append(Change(move.name, "optimizer state reset", type(state).__name__))
        elif all(_can_slice(value, move) for value in state.values()):
            for value in state.values():
                _slice(value, move)
            optimizer.state[move.new] = state
            changes.append(Change(move.name, "optimizer state sliced"))
        else:
            reset.append(Change(move.name, "optimizer state reset", _describe(state)))
    if moves and isinstance(optimizer, torch.optim.LBFGS):
        # One flat history over all parameters, and their cached total size.
        optimizer.state.clear()
        optimizer._numel_cache = None
        reset = [Change("all parameters", "optimizer state reset", "L-BFGS history")]
        changes = []
    return Receipt(tuple(changes), skipped=tuple(reset))


def _replace_members(optimizer: Any, moves: list[Moved]) -> None:
    successors = {id(move.old): move.new for move in moves if move.new is not move.old}
    for group in optimizer.param_groups:
        group["params"][:] = [successors.get(id(p), p) for p in group["params"]]


def _can_slice(value: Any, move: Moved) -> bool:
    if isinstance(value, Tensor):
        plain = type(value) in (Tensor, nn.Parameter)
        # Of the new shape is what two optimizers share, seen for the second time.
        return plain and (
            value.numel() == 1 or tuple(value.shape) in (move.old_shape, tuple(move.new.shape))
        )
    return not isinstance(value, (list, tuple, Mapping)) or not any(
        isinstance(item, Tensor)
        for item in (value.values() if isinstance(value, Mapping) else value)
    )


def _slice(value: Any, move: Moved) -> None:
    if isinstance(value, Tensor) and value.shape == torch.Size(move.old_shape):
        value.data = move.kept.take(value)


def _describe(state: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {tuple(v.shape)}" for k, v in state.items() if isinstance(v, Tensor))
