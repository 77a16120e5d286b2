"""Copies of a part of the module that move with it: a BYOL target, a moving average of the inner network.

A copy has the parameters of the part, by name and shape, and is not trained itself. Whether it follows its
part or is a fixed teacher shows in its values: one that changed since the fit began is an average.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_accel.bridge.restore import averages, pristine
from lightning_accel.errors import Unsupported
from lightning_accel.exact import exact
from lightning_accel.surgery import Cut, Structure
from lightning_accel.surgery.attributes import get_size, set_size
from lightning_accel.surgery.owners import children, kept_by
from lightning_accel.surgery.structure import named_tensors, replace_data

ValueT = TypeVar("ValueT")
_AT_START: weakref.WeakKeyDictionary[nn.Module, dict[str, float]] = weakref.WeakKeyDictionary()


class Part(NamedTuple):
    """A copy, whose parameters are those of the module at `of`; `at` is its own place, if it has one."""

    where: str
    copy: nn.Module
    of: str
    at: str | None

    def cut(self, cut: Cut) -> Cut:
        """Return what the cut does to the part, in the copy's names."""
        return replace(
            cut,
            kept=_under(cut.kept, self.of),
            before=Structure(
                _under(cut.before.tensors, self.of),
                _modules_under(cut.before.attributes, self.of),
                _under(cut.before.bypassed, self.of),
            ),
            attributes=_modules_under(cut.attributes, self.of),
            scaled=_under(cut.scaled, self.of),
            renormed=_under(cut.renormed, self.of),
            added=_under(cut.added, self.of),
            bypassed=_under(cut.bypassed, self.of),
        )

    def take_blocks(self, structure: Structure) -> None:
        """Let whole blocks go, or come back, in the copy as a structure says of the part."""
        Structure(bypassed=_under(structure.bypassed, self.of)).apply(self.copy)


def parts_of(trainer: Trainer, pl_module: LightningModule) -> list[Part]:
    """Return the copies of parts that callbacks keep or the module holds."""
    modules = dict(pl_module.named_modules())
    shapes = {name: _shapes(module) for name, module in modules.items() if name}
    shapes = {name: found for name, found in shapes.items() if found}
    learns = {name: any(p.requires_grad for p in modules[name].parameters()) for name in shapes}
    own = {id(module) for module in modules.values()}
    found: list[Part] = []
    for name, copy in modules.items():
        nested = any(name == f"{part.at}" or name.startswith(f"{part.at}.") for part in found)
        above = modules.get(name.rpartition(".")[0])
        still = not learns.get(name, True) or isinstance(above, AveragedModel)
        if not nested and name in shapes and still:
            sources = [s for s in shapes if learns[s] and shapes[s] == shapes[name] and s != name]
            sources = [s for s in sources if not _related(s, name)]
            if sources:
                found.append(Part(name, copy, sources[0], name))
    known = own | {id(average) for average in averages(trainer.callbacks, pl_module)}  # type: ignore[attr-defined]
    for where, copy in _kept_by_callbacks(trainer):
        if id(copy) not in known:
            known.add(id(copy))  # others may hold it as well
            tensors = _shapes(copy)
            sources = [s for s in shapes if learns[s] and tensors and shapes[s] == tensors]
            if sources:
                found.append(Part(where, copy, sources[0], None))
    return found


def note_parts(trainer: Trainer, pl_module: LightningModule) -> None:
    """Remember what copies are at the start of a fit; those known already keep what they were."""
    found = {part.where: _digest(part.copy) for part in parts_of(trainer, pl_module)}
    _AT_START[pl_module] = found | _AT_START.get(pl_module, {})


def forget_parts(pl_module: LightningModule) -> None:
    """Forget it, at the end of a fit."""
    _AT_START.pop(pl_module, None)


def moving(trainer: Trainer, pl_module: LightningModule) -> list[str]:
    """Return where copies are that are known to be averages, for a checkpoint."""
    at_start = _AT_START.get(pl_module, {})
    if not at_start:
        return []
    return [part.where for part in parts_of(trainer, pl_module) if _is_average(part, at_start)]


def mark_moving(pl_module: LightningModule, places: Iterable[str]) -> None:
    """Take up what `moving` gave: these have moved before the fit was resumed."""
    if places:
        known = _AT_START.get(pl_module, {})
        _AT_START[pl_module] = known | dict.fromkeys(places, math.nan)


def following(trainer: Trainer, pl_module: LightningModule, cut: Cut) -> list[Part]:
    """Return those copies that a cut must be made in as well.

    Raises:
        Unsupported: A copy has not moved yet and equals its part, so nothing tells what it is.
    """
    found = []
    for part in _concerned(trainer, pl_module, cut):
        if _is_average(part, _AT_START.get(pl_module, {})):
            found.append(part)
        elif _equal(part.copy, pl_module.get_submodule(part.of)):
            raise Unsupported(
                "a copy that has not moved yet may be an average or a fixed teacher, "
                "and only an average may be pruned with its network",
                f"`{part.where}`, equal to `{part.of}`",
                "prune at a later epoch (`when=1`), after the first update of the copy",
            )
    return found


def possible(trainer: Trainer, cut: Cut) -> list[Part]:
    """Return those copies inside of the fit's module that a cut is made in, if they have moved by then."""
    module = trainer.lightning_module
    at_start = _AT_START.get(module, {})
    return [
        part
        for part in _concerned(trainer, module, cut)
        if part.at
        and (_is_average(part, at_start) or _equal(part.copy, module.get_submodule(part.of)))
    ]


def _concerned(trainer: Trainer, pl_module: LightningModule, cut: Cut) -> Iterator[Part]:
    """Yield the copies of what a cut shrinks that it does not shrink itself."""
    for part in parts_of(trainer, pl_module):
        if part.cut(cut) and not (part.at and _under({**cut.kept, **cut.bypassed}, part.at)):
            yield part


def widened(cut: Cut, parts: list[Part]) -> Cut:
    """Return a cut that is made in copies inside of the module as well."""
    for part in parts:
        if part.at is None:
            continue
        own = part.cut(cut)
        cut = replace(
            cut,
            kept={**cut.kept, **_at(own.kept, part.at)},
            before=Structure(
                {**cut.before.tensors, **_at(own.before.tensors, part.at)},
                {**cut.before.attributes, **_modules_at(own.before.attributes, part.at)},
                {**cut.before.bypassed, **_at(own.before.bypassed, part.at)},
            ),
            attributes={**cut.attributes, **_modules_at(own.attributes, part.at)},
            scaled={**cut.scaled, **_at(own.scaled, part.at)},
            renormed={**cut.renormed, **_at(own.renormed, part.at)},
            added={**cut.added, **_at(own.added, part.at)},
            bypassed={**cut.bypassed, **_at(own.bypassed, part.at)},
        )
    return cut


class PartState:
    """The tensors of a callback's copy, and its way back to a larger shape."""

    def __init__(self, pl_module: LightningModule, part: Part) -> None:
        self._module = pl_module
        self._part = part

    def state_dict(self) -> dict[str, Tensor]:
        return {name: t.detach() for name, t in named_tensors(self._part.copy)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the tensors back, and the sizes of the part in the module, which is back already."""
        copy, of = self._part.copy, self._part.of
        for name, tensor in list(named_tensors(copy)):
            stored = state[name]
            if tensor.shape == stored.shape:
                tensor.copy_(stored)
            else:
                replace_data(copy, tensor, stored.to(tensor.device, copy=True))
        source = self._module.get_submodule(of)
        for name, sizes in _modules_under(pristine(self._module).attributes, of).items():
            for key in sizes:
                set_size(copy.get_submodule(name), key, get_size(source.get_submodule(name), key))


def _kept_by_callbacks(trainer: Trainer) -> Iterator[tuple[str, nn.Module]]:
    for number, callback in enumerate(trainer.callbacks):  # type: ignore[attr-defined]
        if not type(callback).__module__.startswith("lightning_accel."):
            for key, held in kept_by(callback).items():
                yield from _modules_in(held, f"{type(callback).__name__}{number}.{key}", set())


def _modules_in(
    held: Any, where: str, seen: set[int], depth: int = 0
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the networks in a container, an object or a closure."""
    if isinstance(held, nn.Module) and not isinstance(held, LightningModule):
        yield where, held.module if isinstance(held, AveragedModel) else held
    elif depth < 4 and id(held) not in seen:
        seen.add(id(held))
        for _, at, inner in children(held):
            yield from _modules_in(inner, where + at, seen, depth + 1)


def _is_average(part: Part, at_start: Mapping[str, float]) -> bool:
    return part.where in at_start and at_start[part.where] != _digest(part.copy)


def _digest(module: nn.Module) -> float:
    return sum(float(exact(p).abs().sum()) for p in module.parameters())


def _equal(one: nn.Module, other: nn.Module) -> bool:
    theirs = dict(other.named_parameters())
    return all(torch.equal(p, theirs[name]) for name, p in one.named_parameters())


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def _related(one: str, other: str) -> bool:
    return one.startswith(f"{other}.") or other.startswith(f"{one}.")


def _under(held: Mapping[str, ValueT], place: str) -> dict[str, ValueT]:
    start = f"{place}."
    return {name.removeprefix(start): v for name, v in held.items() if name.startswith(start)}


def _modules_under(held: Mapping[str, ValueT], place: str) -> dict[str, ValueT]:
    return {**({"": held[place]} if place in held else {}), **_under(held, place)}


def _at(held: Mapping[str, ValueT], place: str) -> dict[str, ValueT]:
    return {f"{place}.{name}": value for name, value in held.items()}


def _modules_at(held: Mapping[str, ValueT], place: str) -> dict[str, ValueT]:
    return {f"{place}.{name}".rstrip("."): value for name, value in held.items()}
