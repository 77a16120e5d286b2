"""Optimizer state follows its parameters through an edit.

Momentum and second moments are per-element memories of a parameter, so what survives an edit is the
same choice of elements. A dense model with the removed elements masked and the same optimizer then
continues exactly like the smaller one with the sliced state (loss difference below 1e-12 in float64;
benchmarks/resume_after_prune.py). That is all that is claimed: exact continuation, not a smoother one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.surgery.memories import cut_factors, factors, mixing, spans_all
from lightning_accel.surgery.optimizers import parameters_of, within
from lightning_accel.surgery.owners import attributes
from lightning_accel.surgery.receipt import Change, Moved, Receipt


@torch.no_grad()
def follow(optimizer: Any, receipt: Receipt) -> Receipt:
    """Let `optimizer` continue after the edit described by `receipt`, in place.

    Parameter groups keep their order, learning rates and schedules; step counts stay. Every state
    tensor of the old parameter's shape is sliced with it, factored second moments are cut as what they
    stand for: see `memories`. State that mixes elements (preconditioners, blocks of codes, histories)
    cannot be cut: it is dropped for that parameter, the optimizer starts it anew, and the returned
    receipt says so under `skipped`. Parameters of blocks that are gone leave their groups, which stay, with their
    state.

    Args:
        optimizer: An optimizer, or whatever holds one or several: see `optimizers.within`.
        receipt: What the edit returned.

    Returns:
        One change per parameter whose state was sliced, and one `skipped` per state that was reset.

    >>> layer = nn.Linear(2, 2)
    >>> follow(torch.optim.SGD(layer.parameters()), Receipt()).changes
    ()
    """
    done: dict[int, Tensor] = {}  # what optimizers share
    return sum((_follow(one, receipt, done) for one in within(optimizer)), Receipt())


def _follow(optimizer: Any, receipt: Receipt, done: dict[int, Tensor]) -> Receipt:
    changes: list[Change] = []
    reset: list[Change] = []
    # Groups that an optimizer inside shares have been replaced already.
    held = {id(p) for p in parameters_of(optimizer)}
    moves = [m for m in receipt.moved if id(m.old) in held or id(m.new) in held]
    removed = [one.old for one in receipt.removed if id(one.old) in held]
    if (moves or removed) and _has_history(optimizer, moves):
        optimizer.state.clear()
        if hasattr(optimizer, "_numel_cache"):
            optimizer._numel_cache = None
        reset = [Change("all parameters", "optimizer state reset", "a history of all parameters")]
    _take_out(optimizer, removed)
    _replace_members(optimizer, moves)
    mixed = mixing(optimizer, {move.old: move.old_shape for move in moves}) if moves else set()
    for move in moves:
        state = optimizer.state.pop(move.old, None)
        if not state:
            continue
        reason = _cut(state, move, mixed, done)
        if reason:
            reset.append(Change(move.name, "optimizer state reset", reason))
        else:
            optimizer.state[move.new] = state
            changes.append(Change(move.name, "optimizer state sliced"))
    return Receipt(tuple(changes), skipped=tuple(reset))


def _take_out(optimizer: Any, removed: Sequence[nn.Parameter]) -> None:
    """Take parameters that are gone out of the groups and the state."""
    away = set(map(id, removed))
    for group in optimizer.param_groups if away else ():
        group["params"][:] = [p for p in group["params"] if id(p) not in away]
    for parameter in removed:
        optimizer.state.pop(parameter, None)


def _replace_members(optimizer: Any, moves: list[Moved]) -> None:
    successors = {id(move.old): move.new for move in moves if move.new is not move.old}
    for group in optimizer.param_groups:
        group["params"][:] = [successors.get(id(p), p) for p in group["params"]]


def _has_history(optimizer: Any, moves: list[Moved]) -> bool:
    """Tell whether some state goes over all parameters at once, as that of L-BFGS."""
    if isinstance(optimizer, torch.optim.LBFGS):
        return True
    old = {id(m.old): prod(m.old_shape) for m in moves} | {
        id(m.new): prod(m.old_shape) for m in moves
    }
    sizes = [old.get(id(p), p.numel()) for p in parameters_of(optimizer)]
    states = [state for state in optimizer.state.values() if isinstance(state, Mapping)]
    values = [value for state in states for value in state.values()]
    return len(sizes) > 1 and any(spans_all(value, sum(sizes)) for value in values)


def _cut(state: Any, move: Moved, mixed: set[str], done: dict[int, Tensor]) -> str:
    """Cut the state of one parameter in place, or return why that cannot be."""
    if not isinstance(state, Mapping):
        return type(state).__name__
    pairs = factors(state, move.old_shape)
    factored = {key for pair in pairs for key in (pair.rows, pair.columns)}
    square = len(move.old_shape) == 2 and move.old_shape[0] == move.old_shape[1]
    for key, value in state.items():
        if key in factored or id(value) in done:
            continue
        if not _is_of_elements(value, move.old_shape):
            return _describe(state)
        if square and key in mixed and isinstance(value, Tensor) and value.numel() > 1:
            return f"`{key}` is a matrix over rows or columns"
    if pairs and move.kept.flat is not None:
        return _describe(state)
    for pair in pairs:
        if id(state[pair.rows]) not in done:
            cut_factors(state, pair, move.old_shape, move.kept)
    for key, value in state.items():
        if isinstance(value, Tensor) and id(value) not in done:
            done[id(value)] = value
            if key not in factored and tuple(value.shape) == move.old_shape:
                value.data = move.kept.take(value)
    return ""


def _is_of_elements(value: Any, shape: tuple[int, ...]) -> bool:
    """Tell whether a value of the state has one number per element, or nothing to do with elements."""
    if isinstance(value, Tensor):
        plain = type(value) in (Tensor, nn.Parameter)
        return plain and (value.numel() == 1 or tuple(value.shape) == shape)
    if isinstance(value, (list, tuple)):
        return not any(isinstance(item, Tensor) for item in value)
    if isinstance(value, Mapping) or hasattr(value, "__dict__"):
        held = value if isinstance(value, Mapping) else attributes(value)
        return not any(isinstance(item, Tensor) for item in held.values())
    return True


def _describe(state: Mapping[str, Any]) -> str:
    found = [f"{k} {tuple(v.shape)}" for k, v in state.items() if isinstance(v, Tensor)]
    return ", ".join(found + [k for k, v in state.items() if not isinstance(v, Tensor)])
