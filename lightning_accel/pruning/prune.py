"""The public verbs of structured pruning: `plan` returns a proved cut, and `prune` makes one in place.

It is one transaction: groups whose removal does not pass the proof of `verify` are left alone and listed in the
receipt with the reason; the rest is cut together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from lightning_accel.errors import explain
from lightning_accel.pruning.activations import Statistics
from lightning_accel.pruning.foreign import Pruner, Turn
from lightning_accel.pruning.importance import Importance
from lightning_accel.pruning.planning import planned
from lightning_accel.pruning.request import Depth, Occasion, Request
from lightning_accel.pruning.selection import Attention, Scope
from lightning_accel.pruning.subject import Subject
from lightning_accel.pruning.target import Target
from lightning_accel.pruning.trains import Step
from lightning_accel.surgery import Cut, Receipt, Select, Structure
from lightning_accel.surgery.call import Call, as_call
from lightning_accel.surgery.kinds import plain_kinds

_EVERYTHING, _AS_IT_IS, _ONLY = Select(), Structure(), Turn()


def prune(
    model: nn.Module,
    *,
    example: Any = None,
    examples: Sequence[Any] = (),
    ratio: float | None = None,
    target: Target | None = None,
    importance: Importance = "magnitude",
    scope: Scope = "local",
    select: Select | str | Sequence[str] | None = None,
    round_to: int | str | None = None,
    attention: Attention = "heads",
    compensate: bool | None = None,
    depth: Depth = False,
    pruner: Pruner | None = None,
) -> Receipt:
    """Remove the least important channels and attention heads of a network in place, or whole blocks.

    Parameters stay the same objects (pass the receipt to `surgery.follow` for optimizer state), and
    train flags, `requires_grad`, ties, dtypes, memory formats and hooks stay as they are. The layers
    that make the output keep their width, and no layer loses all of its channels.

    Args:
        model: Any network that runs on `example`.
        example: What `model` takes: a tensor, a tuple of arguments, or a dict of keyword arguments.
        examples: Instead of `example`, several that together reach all of its branches.
        ratio: Share of channels to remove, above 0 and below 1. Halving the channels of neighbouring
            layers leaves about a quarter of the arithmetic.
        target: Instead of `ratio`, what to reach: `Macs(0.5)`, `Params(0.5)`, `Latency(0.5)`.
        importance: One of `importance.KNOWN`, or a function of model and group ("taylor" needs
            gradients; "activation" measures on `example`).
        scope: "local" takes the same share of every group of layers; "global" ranks all channels
            together, "isomorphic" those of groups of equal structure, "sensitivity" all by what each group
            costs for what it saves, measured on `example`.
        select: Layers whose channels may go; everything by default.
        round_to: Kept channels are raised to a multiple of this; "measured" tries which is fastest here,
            which `Latency` does by itself.
        attention: Whole "heads" go, or the same places of every head ("width").
        compensate: With true, solve the layers that read what is gone anew, by least squares on `example`,
            which should then hold a few hundred samples. `StructuredPruning` does so by default.
        depth: Whole residual blocks go as well (True), or "only" they (`ratio` is a share of blocks then): first
            those that change the outputs on `example` least for what they save.
        pruner: Instead of all but `example` and `compensate`, a function of a copy of the model and of its
            arguments that returns a pruner of torch-pruning, of which all steps are made. It chooses what
            goes; that is proved, cut and told as ever. See `StructuredPruning`.

    Returns:
        What was cut, and under `skipped` what was left alone and why.

    Raises:
        ValueError: An argument is out of range.
        TypeError: It is of another type.
        NoEffect: Nothing could be pruned, or the target is out of reach.
        AccelError: The network fails on the example.
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
    request = Request(
        ratio=ratio,
        target=target,
        importance=importance,
        scope=scope,
        select=Select.of(select),
        round_to=round_to,
        attention=attention,
        compensate=compensate,
        depth=depth,
        pruner=pruner,
    )
    with plain_kinds(model) as receipts:
        subject = Subject.of(model, _calls(example, examples))
        receipts.append(planned(subject, request, Occasion()).apply(model))
    return receipts[0]


def plan(
    model: nn.Module,
    *,
    calls: Sequence[Call],
    ratio: float | None = None,
    target: Target | None = None,
    importance: Importance = "magnitude",
    scope: Scope = "local",
    select: Select = _EVERYTHING,
    round_to: int | str | None = None,
    attention: Attention = "heads",
    dense: Structure = _AS_IT_IS,
    batches: Iterable[Sequence[Call]] = (),
    statistics: Statistics | None = None,
    compensate: bool | None = None,
    depth: Depth = False,
    thorough: bool = True,
    pruner: Pruner | None = None,
    turn: Turn = _ONLY,
    seconds: float = 300.0,
    steps: Sequence[Step] = (),
) -> Cut:
    """Return the proved cut for a share of channels, for a target or by a pruner; change nothing.

    Args:
        model: Any network.
        calls: Example calls: what of the network receives what.
        ratio: As in `prune`, and so are all that are not named here.
        target: Instead of `ratio`.
        importance: What makes a channel matter.
        scope: Which channels are ranked together.
        select: Layers whose channels may go.
        round_to: A multiple of channels, or "measured".
        attention: Whole "heads" go, or "width".
        dense: Shapes before earlier cuts, if there were any: `ratio` is a share of those.
        batches: The calls of each calibration batch, for what measures; `calls` themselves by default.
        statistics: What was measured already, for "activation" and "taylor2".
        compensate: Solve the layers that read what is gone anew, on `batches`; by default if there are some,
            there is memory for it, and no `pruner`.
        depth: Whole residual blocks go as well.
        thorough: With `depth`, whether blocks and width are weighed by more than one trial.
        pruner: Instead of `ratio`, what makes a pruner of torch-pruning.
        turn: Which of its steps that pruner is to make.
        seconds: After these no more groups are tried one by one; those not tried by then are left alone, and listed.
        steps: What else has to run with the smaller network, where it does now.

    Raises:
        ValueError: An argument is out of range.
        TypeError: It is of another type.
        NoEffect: Nothing could be pruned, or the target is out of reach.
        AccelError: The network fails on the calls.
        BrokenModel: Every candidate broke the network.
    """
    request = Request(
        ratio=ratio,
        target=target,
        importance=importance,
        scope=scope,
        select=select,
        round_to=round_to,
        attention=attention,
        compensate=compensate,
        depth=depth,
        pruner=pruner,
    )
    occasion = Occasion(
        dense=dense,
        batches=list(batches),
        statistics=statistics,
        steps=steps,
        turn=turn,
        thorough=thorough,
        seconds=seconds,
    )
    return planned(Subject.of(model, calls, steps), request, occasion)


def _calls(example: Any, examples: Sequence[Any]) -> tuple[Call, ...]:
    """Read `example` or `examples`, of which one is given."""
    if not isinstance(examples, (list, tuple)):
        raise TypeError(  # by its type: a tensor would be written out
            explain(
                "`examples` is a list of what the network takes",
                type(examples).__name__,
                "pass examples=[first, second], or one as `example`",
            )
        )
    given = [example] if example is not None else list(examples)
    if not given or (example is not None and examples):
        raise ValueError(
            explain(
                "pruning takes either `example` or `examples`",
                "both of them" if given else "neither",
                "pass what the network takes as `example`, or several as `examples=[...]`",
            )
        )
    return tuple(as_call(one) for one in given)
