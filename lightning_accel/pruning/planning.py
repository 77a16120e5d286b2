"""One cut, planned: trace, choose, prove on a copy. What does not pass the proof is left alone, with the reason."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_accel.errors import AccelError, BrokenModel, NoEffect
from lightning_accel.progress import progress
from lightning_accel.pruning import compensation, interop, rounding, selection
from lightning_accel.pruning.adopt import Adopted, adopt
from lightning_accel.pruning.depth import plan_depth
from lightning_accel.pruning.graph import Graph, Group, RemovedUnits
from lightning_accel.pruning.halving import sound
from lightning_accel.pruning.importance import require_gradients
from lightning_accel.pruning.ranking import Ranking
from lightning_accel.pruning.request import ONLY, Occasion, Request
from lightning_accel.pruning.subject import Subject
from lightning_accel.pruning.target import Target
from lightning_accel.pruning.verify import why_broken
from lightning_accel.surgery import Change, Cut, twin
from lightning_accel.surgery.acting import nothing_heard
from lightning_accel.surgery.call import Call, batch_size
from lightning_accel.surgery.mirrors import with_mirrors

_NARROW = 0.999  # no share of the channels beyond this is asked for


@progress("planning a cut")
def planned(subject: Subject, request: Request, occasion: Occasion) -> Cut:
    """Return the proved cut for what is asked; change nothing.

    Args:
        subject: The network, copied once, and its calls.
        request: What is asked.
        occasion: What else the plan is made from.

    Raises:
        NoEffect: Nothing could be pruned, or the target is out of reach.
        AccelError: What ranks, or a pruner of torch-pruning, fails.
        BrokenModel: Every candidate broke the network.
    """
    if request.importance == "taylor":
        require_gradients(subject.users)
    if request.target is not None:
        request = dataclasses.replace(request, target=request.target.of(subject.calls))
    until = time.monotonic() + occasion.seconds
    data = list(occasion.batches) or [subject.whole]
    with nothing_heard(subject.users):
        if request.depth:
            width = None if request.depth == ONLY else partial(_width, subject, request, occasion)
            return plan_depth(subject, request, occasion, data, width=width, until=until)
        if request.pruner is not None:
            found = adopt(subject, request.pruner, turn=occasion.turn, until=until)
        else:
            found = _chosen(subject, request, occasion, data, until)
        cut = found.cut
        by_default = bool(occasion.batches) and request.pruner is None
        if request.compensate or (request.compensate is None and by_default):
            cut = _compensated(found, data, must=request.compensate is not None)
        cut = with_mirrors(subject.network, cut)
    notes = [_reached(subject, request, found), *_unproved(subject, found.graph, cut)]
    return dataclasses.replace(cut, skipped=found.refused, notes=(*notes, *cut.notes))


def _width(
    whole: Subject, request: Request, occasion: Occasion, network: nn.Module, target: Target | None
) -> Cut:
    """Return the cut in width of a copy that has lost blocks; another network, and so another subject."""
    asked = dataclasses.replace(request, depth=False, ratio=None, target=target)
    subject = Subject.of(network, whole.calls, occasion.steps)
    return planned(subject, asked, dataclasses.replace(occasion, thorough=True))


def _chosen(
    subject: Subject,
    request: Request,
    occasion: Occasion,
    data: Sequence[Sequence[Call]],
    until: float,
) -> Adopted:
    """Return the cut of the units that our own ranking chooses."""
    graph = Graph(
        twin(subject.network),
        subject.small,
        select=request.select,
        frozen=frozenset(n for n, p in subject.network.named_parameters() if not p.requires_grad),
        dense=occasion.dense,
        attention=request.attention,
    )
    ranking = Ranking(
        graph,
        interop.by_name(request.importance, subject.users),
        scope=request.scope,
        batches=data,
        statistics=occasion.statistics,
    )
    return _proved(subject, request, graph, ranking, until)


def _proved(
    subject: Subject, request: Request, graph: Graph, ranking: Ranking, until: float
) -> Adopted:
    """Return the cut of the units that rank last, once it is proved; groups that fail are left out."""
    refused = [*graph.skipped, *ranking.refused]
    groups = [group for group in graph.groups if group.name in ranking.scores]
    if not groups:
        listed = "; ".join(f"`{c.name}`: {c.what}" for c in ranking.refused[:4])
        raise NoEffect("no group of channels can be ranked", listed, "choose another `importance`")
    while groups:
        gone, multiple = _reach(subject, request, graph, ranking, groups)
        if not gone:
            raise NoEffect(
                "what is asked for removes nothing",
                f"{len(groups)} groups of at most {max(g.units for g in groups)} channels"
                + (f", round_to={multiple}" if multiple else ""),
                "raise `ratio`, or lower `round_to`",
            )
        gone = ranking.refined(gone)
        wrong = _culprits(subject, graph, groups, gone, until)
        cut = None if wrong else graph.cut(gone)
        for holds in (subject.verifier.holds_elsewhere, subject.training.holds_in_steps):
            if cut is not None and not holds(cut):
                # What failed there counts in the proof from now on, so the culprits are found by it.
                wrong = _culprits(subject, graph, groups, gone, until)
                cut = None if wrong else graph.cut(gone)  # scaled in another way, if that mends it
        if cut is not None:
            narrow = selection.immovable(groups, round_to=multiple)
            return Adopted(cut, graph, gone, (*refused, *narrow))
        refused += wrong
        groups = [g for g in groups if g.name not in {change.name for change in wrong}]
    broken = refused[len(graph.skipped) :]
    listed = "; ".join(f"`{c.name}`: {c.what}" for c in broken[:4])
    raise BrokenModel(
        "no group of channels can be removed without breaking the network",
        listed,
        "choose other layers by `select`; the network is as it was",
    )


def _reach(
    subject: Subject, request: Request, graph: Graph, ranking: Ranking, groups: Sequence[Group]
) -> tuple[RemovedUnits, int | None]:
    """Return what of these groups has to go for the ratio or the target, and the multiple that was used."""

    def pick(share: float, multiple: int | None) -> RemovedUnits:
        return selection.choose(
            groups,
            ranking.scores,
            ratio=min(share, _NARROW),
            scope=request.scope,
            round_to=multiple,
        )

    return rounding.reach(
        graph,
        pick,
        ratio=request.ratio,
        target=request.target,
        round_to=request.round_to,
        batch_size=batch_size(subject.calls),
    )


def _reached(subject: Subject, request: Request, found: Adopted) -> str:
    """Write what was asked and what was reached."""
    graph, gone, ratio, target = found.graph, found.gone, request.ratio, request.target
    if ratio is None and target is None:
        before, after = twin(subject.network), twin(subject.network)
        found.cut.apply(after)
        counts = [sum(p.numel() for p in net.parameters()) for net in (after, before)]
        return (
            f"chosen by torch-pruning: {counts[0] / max(counts[1], 1):.1%} of parameters are left"
        )
    assert graph is not None and gone is not None
    if target is not None:
        device = next(graph.model.parameters()).device
        return target.describe(target.kept(graph, gone), device)
    assert ratio is not None
    dense = sum(group.dense for group in graph.groups)
    left = sum(group.units - len(gone.get(group.name, ())) for group in graph.groups)
    share = f"{1 - left / dense:.1%} of the channels and heads that can go are gone"
    of_all = (dense - left) / (graph.channels + dense - sum(g.units for g in graph.groups))
    params = graph.params(gone) / max(graph.params({}), 1)
    return f"{share} (asked: {ratio:.3g}): {of_all:.1%} of all, {params:.1%} of parameters are left"


def _unproved(subject: Subject, graph: Graph | None, cut: Cut) -> list[str]:
    """Write what the proof did not see; warn of layers that may fail."""
    notes = []
    training = subject.training
    if training.why_not:
        notes.append(
            "not proved in training, where the network fails on the example as it is"
            f" ({training.why_not.splitlines()[0]}): pass an example on which it trains"
        )
    idle = {} if graph is None else graph.idle_readers(cut)
    if idle:
        notes.append(_may_fail(idle))
        warnings.warn(notes[-1], stacklevel=4)
    if subject.verifier.fell_back:
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
    subject: Subject, graph: Graph, groups: Sequence[Group], gone: RemovedUnits, until: float
) -> list[Change]:
    """Return the groups that cannot be cut (with the others), with reasons; none if all can."""
    bundles: dict[Any, dict[str, Sequence[int]]] = {}
    for group in groups:
        if group.name in gone:
            key = group.name if group.link is None else group.link
            bundles.setdefault(key, {})[group.name] = gone[group.name]

    def failure(some: Sequence[Mapping[str, Sequence[int]]]) -> str:
        together = {name: units for part in some for name, units in part.items()}
        return why_broken(subject.verifier, subject.training, partial(graph.cut, together))

    refused = sound(list(bundles.values()), failure, mend=graph.rescale, until=until)[1]
    return [Change(name, reason) for part, reason in refused for name in part]
