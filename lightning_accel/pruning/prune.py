"""Structured pruning as one transaction: trace, choose, prove on a copy, and only then cut.

Groups that torch-pruning cannot handle, or whose removal does not pass the proof of `verify`, are left
alone and listed in the receipt with the reason. Coupled layers by DepGraph (Fang et al. 2023,
arXiv:2301.12900).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_accel.errors import BrokenModel, NoEffect, explain
from lightning_accel.pruning import importance as scoring
from lightning_accel.pruning.graph import Graph, Group
from lightning_accel.pruning.target import ratio_for_macs
from lightning_accel.pruning.verify import Verifier, in_dtype_of
from lightning_accel.surgery import Change, Cut, Receipt, Select, Structure, twin
from lightning_accel.surgery.call import Call, as_call, first

_EVERYTHING, _AS_IT_IS = Select(), Structure()
_SAMPLES = 2  # enough for batch norm in train mode


def prune(
    model: nn.Module,
    *,
    example: Any,
    ratio: float,
    importance: str = "magnitude",
    select: Select | str | Sequence[str] | None = None,
    round_to: int | None = None,
) -> Receipt:
    """Remove the least important channels of a network in place; every layer loses the same share.

    Parameters stay the same objects (pass the receipt to `surgery.follow` for optimizer state), and
    train flags, `requires_grad`, ties, dtypes, memory formats and hooks stay as they are. The layers
    that make the output keep their width, and no layer loses all of its channels.

    Args:
        model: Any network that autograd can trace.
        example: What `model` takes: a tensor, a tuple of arguments, or a dict of keyword arguments.
        ratio: Share of channels to remove, above 0 and below 1. Halving the channels of neighbouring
            layers leaves about a quarter of the arithmetic; see `target_macs` of the callback.
        importance: "magnitude", "taylor" (needs gradients) or "random".
        select: Layers whose channels may go; everything by default.
        round_to: Kept channels are raised to a multiple of this.

    Returns:
        What was cut, and under `skipped` what was left alone and why.

    Raises:
        ValueError: An argument is out of range.
        NoEffect: Nothing could be pruned.
        AccelError: The network cannot be traced.
        BrokenModel: Every candidate broke the network, which is as it was.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> receipt = prune(net, example=torch.randn(1, 4), ratio=0.5)
    >>> net
    Sequential(
      (0): Linear(in_features=4, out_features=4, bias=True)
      (1): ReLU()
      (2): Linear(in_features=4, out_features=2, bias=True)
    )
    """
    check_ratio(ratio)
    return plan(
        model,
        calls=(as_call(example),),
        ratio=ratio,
        importance=importance,
        select=Select.of(select),
        round_to=round_to,
    ).apply(model)


def plan(
    model: nn.Module,
    *,
    calls: Sequence[Call],
    ratio: float | None = None,
    target_macs: float | None = None,
    importance: str = "magnitude",
    select: Select = _EVERYTHING,
    round_to: int | None = None,
    dense: Structure = _AS_IT_IS,
) -> Cut:
    """Return the proved cut for a share of channels, or for a share of MACs to keep; change nothing.

    `dense` holds the shapes before earlier cuts, if there were any: `ratio` is a share of those, and
    `target_macs` one of the MACs now.
    """
    scoring.check(importance)
    check_round_to(round_to)
    if importance == "taylor":
        scoring.require_gradients(model)
    small = in_dtype_of(first(calls, _SAMPLES), model)
    frozen = frozenset(n for n, p in model.named_parameters() if not p.requires_grad)
    graph = Graph(
        twin(model), small, select=select, importance=importance, frozen=frozen, dense=dense
    )
    verifier = Verifier(model, small)
    good, refused = _sound(graph, verifier, ratio or 0.5, round_to)
    if target_macs is not None:
        ratio = ratio_for_macs(graph, good, small, share=target_macs, round_to=round_to)
    assert ratio is not None
    cut = graph.cut(ratio, round_to=round_to, groups=good)
    skipped = (*graph.skipped, *refused)
    if not cut:
        raise NoEffect(
            f"removing {ratio:.0%} of the channels removes nothing",
            f"{len(good)} groups of at most {max(len(g.scores) for g in good)} channels"
            + (f", round_to={round_to}" if round_to else ""),
            "raise `ratio`, or lower `round_to`",
        )
    verifier.equivalence(cut)
    verifier.training(cut)
    return dataclasses.replace(cut, skipped=skipped)


def check_ratio(ratio: Any, name: str = "ratio") -> None:
    """Raise unless `ratio` is a number above 0 and below 1."""
    number = isinstance(ratio, (int, float)) and not isinstance(ratio, bool)
    if not number or not math.isfinite(ratio) or not 0 < ratio < 1:
        error = ValueError if number else TypeError
        raise error(
            explain(f"`{name}` is a share above 0 and below 1", repr(ratio), "pass 0.5, say")
        )


def check_round_to(round_to: Any) -> None:
    """Raise unless `round_to` is a positive integer or `None`."""
    if round_to is not None and (type(round_to) is not int or round_to < 1):
        raise ValueError(
            explain("`round_to` is a positive number of channels", repr(round_to), "pass 8, say")
        )


def _sound(
    graph: Graph, verifier: Verifier, ratio: float, round_to: int | None
) -> tuple[list[Group], list[Change]]:
    """Split the groups into those that can be cut together and those that cannot, with reasons."""
    refused: list[Change] = []

    def failure(groups: Sequence[Group]) -> str:
        try:
            verifier.equivalence(graph.cut(ratio, round_to=round_to, groups=groups))
        except (BrokenModel, ValueError, IndexError, AssertionError, RuntimeError) as error:
            return str(error).removesuffix(f" Do: {_remedy(error)}.")
        return ""

    def sound(groups: list[Group]) -> list[Group]:
        reason = failure(groups)
        if not reason:
            return groups
        if len(groups) == 1:
            refused.append(Change(groups[0].root, reason))
            return []
        half = len(groups) // 2
        left, right = sound(groups[:half]), sound(groups[half:])
        if not left or not right or not failure(left + right):
            return left + right
        for group in right:  # sound apart, not together
            reason = failure([*left, group])
            if reason:
                refused.append(Change(group.root, reason))
            else:
                left = [*left, group]
        return left

    good = sound(graph.groups)
    if not good:
        listed = "; ".join(f"`{c.name}`: {c.what}" for c in refused[:4])
        raise BrokenModel(
            "no group of channels can be removed without breaking the network",
            listed,
            "choose other layers by `select`; the network is as it was",
        )
    return good, refused


def _remedy(error: Exception) -> str:
    return str(error).rpartition(" Do: ")[2].rstrip(".")
