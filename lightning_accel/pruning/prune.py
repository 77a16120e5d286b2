"""Structured pruning as one transaction: trace, choose, prove on a copy, and only then cut.

Groups whose removal does not pass the proof of `verify` are left alone and listed in the receipt with the
reason; the rest is cut together, in place.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_accel.errors import AccelError, BrokenModel, NoEffect, explain
from lightning_accel.pruning import activations, compensation, interop, rounding, selection
from lightning_accel.pruning import importance as scoring
from lightning_accel.pruning.adopt import Adopted, adopt
from lightning_accel.pruning.depth import ONLY, Asked, check_depth, plan_depth
from lightning_accel.pruning.foreign import Pruner, Turn, check_pruner, require_alone
from lightning_accel.pruning.graph import Gone, Graph, Group
from lightning_accel.pruning.halving import sound
from lightning_accel.pruning.importance import Importance
from lightning_accel.pruning.ranking import Ranking
from lightning_accel.pruning.subject import acting_copy, require_samples, small_calls
from lightning_accel.pruning.target import Target, check_share
from lightning_accel.pruning.trains import Step, Training, in_dtype_of
from lightning_accel.pruning.verify import Verifier, why_broken
from lightning_accel.surgery import Change, Cut, Receipt, Select, Structure, twin
from lightning_accel.surgery.acting import nothing_heard
from lightning_accel.surgery.call import Call, as_call, batch_size
from lightning_accel.surgery.mirrors import with_mirrors

_EVERYTHING, _AS_IT_IS, _ONLY = Select(), Structure(), Turn()
_NARROW = 0.999  # no share of the channels beyond this is asked for


def prune(
    model: nn.Module,
    *,
    example: Any = None,
    examples: Sequence[Any] = (),
    ratio: float | None = None,
    target: Target | None = None,
    importance: Importance = "magnitude",
    scope: str = "local",
    select: Select | str | Sequence[str] | None = None,
    round_to: int | str | None = None,
    attention: str = "heads",
    compensate: bool | None = None,
    depth: bool | str = False,
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
    if ratio is not None:
        check_share(ratio, "ratio")
    return plan(
        model,
        calls=_calls(example, examples),
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
    ).apply(model)


def plan(
    model: nn.Module,
    *,
    calls: Sequence[Call],
    ratio: float | None = None,
    target: Target | None = None,
    importance: Importance = "magnitude",
    scope: str = "local",
    select: Select = _EVERYTHING,
    round_to: int | str | None = None,
    attention: str = "heads",
    dense: Structure = _AS_IT_IS,
    batches: Iterable[Sequence[Call]] = (),
    statistics: activations.Statistics | None = None,
    compensate: bool | None = None,
    depth: bool | str = False,
    thorough: bool = True,
    pruner: Pruner | None = None,
    turn: Turn = _ONLY,
    seconds: float = 300.0,
    steps: Sequence[Step] = (),
) -> Cut:
    """Return the proved cut for a share of channels, for a target or by a pruner; change nothing.

    `dense` holds the shapes before earlier cuts, if there were any: `ratio` is a share of those.
    `batches` are the calls of calibration batches, for what measures; the calls themselves by default.
    `compensate` solves the layers that read what is gone anew, on these batches; by default if there are
    some, there is memory for it, and no `pruner`. After `seconds` no
    more groups are tried one by one; those not tried by then are left alone, and listed. `turn` is which
    of its steps a `pruner` of torch-pruning is to make. `steps` are what else has to run with the smaller
    network, where it does now. With `depth`, blocks and width are weighed by more than one trial if `thorough`.
    """
    _require_network(model)
    check_asked(ratio, target, pruner)
    if pruner is not None:
        others = {"select": select, "importance": importance, "scope": scope}
        require_alone({**others, "round_to": round_to, "attention": attention})
    rounding.check_round_to(round_to)
    target = None if target is None else target.of(calls)
    compensation.check(compensate)
    scoring.check(importance)
    selection.check_scope(scope)
    selection.check_attention(attention)
    check_depth(depth, ratio=ratio, pruner=pruner, importance=importance)
    batches = list(batches)
    until = time.monotonic() + seconds
    if importance == "taylor":
        scoring.require_gradients(model)
    require_samples(calls)
    with nothing_heard(model):
        users, model = model, acting_copy(model, calls)
        small = small_calls(model, calls)
        data = batches or [in_dtype_of(calls, model)]
        verifier, training = Verifier(model, small), Training(model, small, steps, calls)
        how: Any
        if depth:
            how = {"importance": importance, "scope": scope, "select": select}
            how |= {"round_to": round_to, "attention": attention, "dense": dense}
            how |= {"batches": batches, "steps": steps}
            width = partial(plan, calls=calls, compensate=compensate, seconds=seconds, **how)
            wide = None if depth == ONLY else width
            asked = Asked(ratio, target, select, dense, wide, until, thorough)
            return plan_depth(users, model, calls, data, verifier, training, asked, bool(batches))
        if pruner is not None:
            how = {"turn": turn, "until": until, "users": users}
            found = adopt(model, small, pruner, verifier, training, **how)
        else:
            frozen = frozenset(n for n, p in model.named_parameters() if not p.requires_grad)
            how = {"select": select, "frozen": frozen, "dense": dense, "attention": attention}
            graph = Graph(twin(model), small, **how)
            importance = interop.by_name(importance, users)
            ranking = Ranking(graph, importance, scope=scope, batches=data, statistics=statistics)
            how = {"ratio": ratio, "target": target, "round_to": round_to}
            reach = partial(rounding.reach, graph, **how, batch_size=batch_size(calls))
            chosen = _choose(graph, ranking, verifier, training, reach, scope=scope, until=until)
            refused = (*graph.skipped, *chosen.refused)
            found = Adopted(graph.cut(chosen.gone), graph, chosen.gone, refused)
        cut = found.cut
        if compensate or (compensate is None and batches and pruner is None):
            cut = _compensated(found, data, must=compensate is not None)
        cut = with_mirrors(model, cut)
    notes = [_reached(model, found, ratio, target)]
    notes += _unproved(found.graph, verifier, training, cut)
    return dataclasses.replace(cut, skipped=found.refused, notes=(*notes, *cut.notes))


class _Chosen(NamedTuple):
    gone: Gone
    refused: tuple[Change, ...]


def _choose(
    graph: Graph,
    ranking: Ranking,
    verifier: Verifier,
    training: Training,
    reach: Callable[..., tuple[Gone, int | None]],
    *,
    scope: str,
    until: float,
) -> _Chosen:
    """Return the units to remove, once their removal is proved; groups that fail are left out."""
    refused = list(ranking.refused)
    groups = [group for group in graph.groups if group.name in ranking.scores]
    if not groups:
        listed = "; ".join(f"`{change.name}`: {change.what}" for change in refused[:4])
        raise NoEffect("no group of channels can be ranked", listed, "choose another `importance`")
    while groups:
        gone, multiple = reach(partial(_pick, groups, ranking.scores, scope))
        if not gone:
            raise NoEffect(
                "what is asked for removes nothing",
                f"{len(groups)} groups of at most {max(g.units for g in groups)} channels"
                + (f", round_to={multiple}" if multiple else ""),
                "raise `ratio`, or lower `round_to`",
            )
        gone = ranking.refined(gone)
        wrong = _culprits(graph, verifier, training, groups, gone, until)
        for holds in (verifier.holds_elsewhere, training.holds_in_steps):
            if not wrong and not holds(graph.cut(gone)):
                wrong = _culprits(graph, verifier, training, groups, gone, until)
        if not wrong:
            narrow = selection.immovable(groups, round_to=multiple)
            return _Chosen(gone, (*refused, *narrow))
        refused += wrong
        groups = [g for g in groups if g.name not in {change.name for change in wrong}]
    listed = "; ".join(f"`{c.name}`: {c.what}" for c in refused[:4])
    raise BrokenModel(
        "no group of channels can be removed without breaking the network",
        listed,
        "choose other layers by `select`; the network is as it was",
    )


def check_asked(ratio: Any, target: Any, pruner: Any = None) -> None:
    """Raise unless exactly one of `ratio`, `target` and `pruner` is given."""
    given = {"ratio": ratio, "target": target, "pruner": pruner}
    if sum(value is not None for value in given.values()) != 1:
        raise ValueError(
            explain(
                "pruning takes either `ratio` or `target`, or a `pruner` of torch-pruning",
                ", ".join(f"{n}={v!r}" for n, v in given.items() if n != "pruner" or v is not None),
                "pass one of them",
            )
        )
    if pruner is not None:
        check_pruner(pruner)
    if target is not None and not isinstance(target, Target):
        raise TypeError(explain("`target` says what to keep", repr(target), "pass Macs(0.5), say"))


def _calls(example: Any, examples: Sequence[Any]) -> tuple[Call, ...]:
    """Read `example` or `examples`, of which one is given."""
    if not isinstance(examples, (list, tuple)):
        raise TypeError(
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


def _pick(
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    scope: str,
    share: float,
    multiple: int | None,
) -> dict[str, list[int]]:
    return selection.choose(
        groups, scores, ratio=min(share, _NARROW), scope=scope, round_to=multiple
    )


def _reached(model: nn.Module, found: Adopted, ratio: float | None, target: Target | None) -> str:
    """Write what was asked and what was reached."""
    graph, gone = found.graph, found.gone
    if ratio is None and target is None:
        before, after = twin(model), twin(model)
        found.cut.apply(after)
        counts = [sum(p.numel() for p in net.parameters()) for net in (after, before)]
        return (
            f"chosen by torch-pruning: {counts[0] / max(counts[1], 1):.1%} of parameters are left"
        )
    assert graph is not None and gone is not None
    if target is not None:
        device = next(graph.model.parameters()).device
        return target.says(target.kept(graph, gone), device)
    assert ratio is not None
    dense = sum(group.dense for group in graph.groups)
    left = sum(group.units - len(gone.get(group.name, ())) for group in graph.groups)
    share = f"{1 - left / dense:.1%} of the channels and heads that can go are gone"
    of_all = (dense - left) / (graph.channels + dense - sum(g.units for g in graph.groups))
    params = graph.params(gone) / max(graph.params({}), 1)
    return f"{share} (asked: {ratio:.3g}): {of_all:.1%} of all, {params:.1%} of parameters are left"


def _require_network(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            explain("`model` is a network", type(model).__name__, "pass a torch.nn.Module")
        )


def _unproved(graph: Graph | None, verifier: Verifier, training: Training, cut: Cut) -> list[str]:
    """Write what the proof did not see; warn of layers that may fail."""
    notes = []
    if training.why_not:
        notes.append(
            "not proved in training, where the network fails on the example as it is"
            f" ({training.why_not.splitlines()[0]}): pass an example on which it trains"
        )
    idle = {} if graph is None else graph.idle_readers(cut)
    if idle:
        notes.append(_may_fail(idle))
        warnings.warn(notes[-1], stacklevel=4)
    if verifier.fell_back:
        notes.append(
            "proved in float32 only: in float64 the network does not run, or gives no numbers"
        )
    return notes


def _may_fail(idle: Mapping[str, str]) -> str:
    """Write which layers that never ran may read what was cut."""
    listed = ", ".join(f"`{name}` (as wide as `{shrunk}` was)" for name, shrunk in idle.items())
    return (
        f"these layers never ran on the example, and fail if they read what was cut: {listed}; if they"
        " are in use, pass an `example` (to the function `prune`, several `examples`) that reaches them, or"
        " leave what they read whole by `select`"
    )


def _compensated(found: Adopted, batches: Sequence[Sequence[Call]], *, must: bool) -> Cut:
    cut, graph, gone = found.cut, found.graph, found.gone
    if graph is None or gone is None:
        why = "not compensated: what torch-pruning removes is no whole of the groups that are known here"
        return dataclasses.replace(cut, notes=(why,))
    small = twin(graph.model)
    cut.apply(small)
    try:
        solved = compensation.compensate(
            graph.model, small, groups=graph.groups, gone=gone, batches=batches
        )
    except (torch.OutOfMemoryError, AccelError) as error:
        if must:
            raise
        is_told = isinstance(error, AccelError)
        why = str(error) if is_told else "there is not enough memory for it"
        return dataclasses.replace(cut, notes=(f"not compensated: {why}",))
    raw, after = solved.output
    if not (must or after <= raw):
        why = f"not compensated: the error of the output would rise from {raw:.2g} to {after:.2g}"
        return dataclasses.replace(cut, notes=(why,))
    before = dict(small.named_parameters())
    added = {name: value - before[name].detach() for name, value in solved.values.items()}
    notes = tuple(f"not compensated: `{c.name}`: {c.what}" for c in solved.left_out)
    return dataclasses.replace(cut, added=added, notes=notes)


def _culprits(
    graph: Graph,
    verifier: Verifier,
    training: Training,
    groups: Sequence[Group],
    gone: Gone,
    until: float,
) -> list[Change]:
    """Return the groups that cannot be cut (with the others), with reasons; none if all can."""
    bundles: dict[Any, dict[str, Sequence[int]]] = {}
    for group in groups:
        if group.name in gone:
            key = group.name if group.link is None else group.link
            bundles.setdefault(key, {})[group.name] = gone[group.name]

    def failure(some: Sequence[Mapping[str, Sequence[int]]]) -> str:
        together = {name: units for part in some for name, units in part.items()}
        return why_broken(verifier, training, partial(graph.cut, together))

    refused = sound(list(bundles.values()), failure, mend=graph.rescale, until=until)[1]
    return [Change(name, reason) for part, reason in refused for name in part]
