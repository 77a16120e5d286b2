"""The cut that a pruner of torch-pruning asks for, made and proved here.

Whatever it chose is one of our own cuts where our groups take the same channels: then buffers, attributes that the
forward reads, ties and the scale of attention follow, which it forgets. Where our tracer cannot follow and its own
tracing can, the cut is made of the places and sizes that it changed. The proof is the same for both; what does not
pass it is left alone, and named with what torch-pruning would have broken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_accel.errors import AccelError, BrokenModel, NoEffect
from lightning_accel.pruning.foreign import Pruner, Turn, removals
from lightning_accel.pruning.graph import Graph, RemovedUnits, require_stored
from lightning_accel.pruning.halving import sound
from lightning_accel.pruning.removal_recorder import Removal
from lightning_accel.pruning.subject import Subject
from lightning_accel.pruning.verify import why_broken
from lightning_accel.surgery import Change, Cut, Kept, Select, Structure, twin
from lightning_accel.surgery.attributes import Size, get_size
from lightning_accel.surgery.call import Call
from lightning_accel.surgery.structure import named_tensors

_MODES = ("heads", "width")


class AdoptedGroup(NamedTuple):
    """What one group of the pruner takes, and the units of our groups that take the same, if any do."""

    removal: Removal
    units: dict[str, list[int]] | None


class Adopted(NamedTuple):
    """The proved cut, the graph that made it and its units, if it is one of our own throughout; and the rest."""

    cut: Cut
    graph: Graph | None
    gone: RemovedUnits | None
    refused: tuple[Change, ...]


def adopt(subject: Subject, pruner: Pruner, *, turn: Turn, until: float) -> Adopted:
    """Return the proved cut that the pruner makes at this step; change nothing.

    Args:
        subject: The network and its calls; an importance may have gathered something for the user's own parameters.
        pruner: The user's function.
        turn: Which of the pruner's steps are due.
        until: When to stop trying groups one by one, by the monotonic clock.

    Raises:
        AccelError: The pruner fails.
        NoEffect: It removes nothing.
        BrokenModel: Nothing of what it removes passes the proof.
    """
    model, calls, training, verifier = (
        subject.network,
        subject.small,
        subject.training,
        subject.verifier,
    )
    found, failed = removals(pruner, partial(twin, model), calls, turn, subject.users)
    frozen = frozenset(n for n, p in model.named_parameters() if not p.requires_grad)
    translator = _translator(model, calls, frozen, found)
    frozen_parts = [(r, name) for r in found if (name := next(iter(frozen & set(r.places)), ""))]
    refused = [*failed, *(Change(r.name, f"`{name}` is frozen") for r, name in frozen_parts)]
    held = {id(r) for r, _ in frozen_parts}
    parts = [translator.part(r) for r in found if id(r) not in held and r.places]
    if not parts and not refused:
        raise NoEffect(
            "the pruner of torch-pruning removes nothing",
            "no group of its step",
            "raise its pruning_ratio, or lower its round_to",
        )

    def failure(some: Sequence[AdoptedGroup]) -> str:
        return why_broken(verifier, training, partial(translator.cut, some))

    for _ in range(2):
        good, wrong = sound(parts, failure, mend=translator.rescale, until=until)
        refused += [Change(p.removal.name, _broken(reason)) for p, reason in wrong]
        if not good:
            break
        cut = translator.cut(good)
        if verifier.holds_elsewhere(cut) and training.holds_in_steps(cut):
            return Adopted(cut, translator.graph, translator.gone(good), tuple(refused))
        parts = good
    listed = "; ".join(f"`{c.name}`: {c.what}" for c in refused[:4])
    raise BrokenModel(
        "nothing of what torch-pruning would remove passes the proof",
        listed or "it is wrong at another size of its input",
        "add these layers to `ignored_layers`, or leave `pruner` out and pass `ratio=`; the network is as it was",
    )


def _broken(reason: str) -> str:
    return f"torch-pruning would have broken it: {reason}"


def _translator(
    model: nn.Module, calls: Sequence[Call], frozen: frozenset[str], found: Sequence[Removal]
) -> _Translator:
    """Return the one whose groups explain the most."""
    best = _Translator(model, None)
    most = 0
    for attention in _MODES:
        try:
            graph = Graph(twin(model), calls, select=Select(), frozen=frozen, attention=attention)
        except (AccelError, NoEffect):  # our tracer cannot follow, or finds nothing
            continue
        made = _Translator(model, graph)
        explained = sum(made.part(removal).units is not None for removal in found)
        if explained > most or best.graph is None:
            best, most = made, explained
        if most == len(found):
            break
    return best


class _Translator:
    """Makes cuts of parts, by a graph where it explains them."""

    def __init__(self, model: nn.Module, graph: Graph | None) -> None:
        self.graph = graph
        self._model = model
        self._tensors = {name: tuple(t.shape) for name, t in named_tensors(model)}

    def part(self, removal: Removal) -> AdoptedGroup:
        return AdoptedGroup(
            removal, None if self.graph is None else self.graph.units(removal.places)
        )

    def gone(self, parts: Sequence[AdoptedGroup]) -> dict[str, list[int]] | None:
        """Return the units of all parts; `None` if some have none."""
        if any(part.units is None for part in parts):
            return None
        return _joined(parts)

    def rescale(self, part: AdoptedGroup) -> bool:
        return (
            self.graph is not None
            and bool(part.units)
            and self.graph.rescale(list(part.units or ()))
        )

    def cut(self, parts: Sequence[AdoptedGroup]) -> Cut:
        """Return the cut that takes all of these.

        Raises:
            ValueError: The numbers that the forward reads cannot follow.
        """
        units = _joined(parts)
        cut = Cut() if self.graph is None or not units else self.graph.cut(units)
        raw = [part.removal for part in parts if part.units is None]
        return self._with(cut, raw) if raw else cut

    def _with(self, cut: Cut, raw: Sequence[Removal]) -> Cut:
        kept = dict(cut.kept)
        for removal in raw:
            for name, dims in removal.places.items():
                kept[name] = _less(kept.get(name), dims, self._tensors[name])
        require_stored(self._model, kept)
        attributes = {name: dict(sizes) for name, sizes in cut.attributes.items()}
        modules = dict(self._model.named_modules())
        for removal in raw:
            for name, sizes in removal.sizes.items():
                for key, change in sizes.items():
                    known = attributes.setdefault(name, {})
                    present: Any = known.get(key, get_size(modules[name], key))
                    known[key] = _plus(present, change)
        before = Structure(
            {name: self._tensors[name] for name in kept},
            {name: dict.fromkeys(sizes, 0) for name, sizes in attributes.items()},
        )
        return dataclasses.replace(
            cut, kept=kept, before=before.now(self._model), attributes=attributes
        )


def _joined(parts: Sequence[AdoptedGroup]) -> dict[str, list[int]]:
    gone: dict[str, set[int]] = {}
    for part in parts:
        for name, units in (part.units or {}).items():
            gone.setdefault(name, set()).update(units)
    return {name: sorted(units) for name, units in gone.items()}


def _less(kept: Kept | None, gone: Mapping[int, Tensor], shape: tuple[int, ...]) -> Kept:
    """Return what is kept of a tensor without these places."""
    dims: list[Tensor | None] = [None] * len(shape) if kept is None else list(kept.dims)
    for dim, places in gone.items():
        stays = torch.ones(shape[dim], dtype=torch.bool)
        stays[places] = False
        before = dims[dim]
        if before is not None:
            there = torch.zeros_like(stays)
            there[before] = True
            stays &= there
        dims[dim] = stays.nonzero()[:, 0]
    return Kept(tuple(dims))


def _plus(now: Size, change: Size) -> Size:
    if isinstance(change, tuple):
        present = now if isinstance(now, (tuple, list)) else (now,)
        return tuple(a + b for a, b in zip(present, change, strict=True))
    assert isinstance(now, int)
    return now + change
