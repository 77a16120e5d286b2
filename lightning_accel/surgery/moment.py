"""What a module and the world were at one moment, so that a forward can run once more as it ran then.

A recomputation is right only while everything that the forward reads is as it was in forward, and only if
what it writes is written once. A `Moment` is the footprint of a module in a form that can be brought back:
attributes and what they hold, training flags, hooks, modules inside, class attributes and module-level names of
its forward, small tensors with their values, and the random states of Python, NumPy and of its own generators. (That of
torch is left to `torch.utils.checkpoint`.) Containers and objects among the arguments count as well.

Taking one costs some ten microseconds while nothing changes: what is held is found once, and then compared
by identity. Parameters and large tensors are not copied, but their versions noted: see `Moment.written`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from lightning_accel.surgery.chance import Chance
from lightning_accel.surgery.held import (
    GENERATORS,
    MOST,
    behind,
    held,
    held_by,
    leads_on,
    put_back,
)
from lightning_accel.surgery.named import differing, equal
from lightning_accel.surgery.preserve import generators

FEW = 65536
"""So many numbers of a tensor are copied each time."""
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


class Moments:
    """Takes moments of one module.

    Args:
        module: What will be called.
        few: Of how many numbers tensors are copied each time, that are no parameters.
        norms: Whether the caller sees to the statistics of torch's own norms.

    >>> block = nn.Linear(2, 2)
    >>> block.scale, block.seen = 1.0, [1]
    >>> moment = Moments(block).take()
    >>> block.scale = 2.0
    >>> block.seen.append(2)
    >>> now = moment.bring_back()
    >>> block.scale, block.seen
    (1.0, [1])
    >>> now.come_back()
    >>> block.scale, block.seen
    (2.0, [1, 2])
    """

    def __init__(self, module: nn.Module, *, few: int = FEW, norms: bool = True) -> None:
        self.module = weakref.ref(module)
        self._few, self._norms = few, norms
        self.written: list[weakref.ref[Tensor]] = []
        """Large tensors and parameters that calls write, and that are copied for that."""
        self.draws_numpy = False
        self.count = 0
        """Of structures that were found: modes, hooks and modules are part of one."""
        self._walk()

    def take(self, *arguments: Any, whole: bool = False) -> Moment:
        """Note what is now.

        Args:
            arguments: What the module will be called with.
            whole: Copy large tensors and parameters as well.
        """
        if not equal(self.live, self.copies):
            self._renew()
        return Moment(self, _objects(arguments), whole)

    def changed(self) -> bool:
        """Tell whether attributes, modes, hooks or modules are others than at the last moment."""
        return not equal(self.live, self.copies)

    def _walk(self) -> None:
        """Find everything anew."""
        module = self.module()
        assert module is not None
        found = list(held(module))
        # What strategies exchange by themselves around each forward, and around its backward too.
        parameters = {id(m._parameters) for m in module.modules()}
        self.live = [live for _, live, _ in found if id(live) not in parameters]
        self.copies = [copied for _, live, copied in found if id(live) not in parameters]
        named = [v for live in self.live if hasattr(live, "globals") for _, v in live.items()]
        self.generators = generators(*(vars(inner) for inner in module.modules()))
        self.generators += [v for v in named if isinstance(v, GENERATORS)]
        self._most = 2 * len(self.live) + 16
        self.count += 1
        self._find_tensors(module)

    def _renew(self) -> None:
        """Note what changed; mostly that is a number or a tensor, and nothing has to be found anew."""
        module = self.module()
        assert module is not None
        tensors, copies = False, list(self.copies)  # moments share the list that was
        for at, (live, copied) in enumerate(zip(self.live, self.copies, strict=True)):
            if equal(live, copied):
                continue
            for old, new in _changes(live, copied):
                if type(new) in (list, dict) and not any(map(leads_on, behind(new))):
                    self.live = [*self.live, new]
                    copies.append(new.copy())
                elif leads_on(new) or (leads_on(old) and type(old) not in (list, dict)):
                    self._walk()
                    return
                # A flag may be that of a norm, whose statistics it reads in evaluation.
                tensors |= isinstance(new, (Tensor, np.ndarray, list, dict, bool))
            copies[at] = live.copy()
        if len(self.live) > self._most:
            self._walk()
            return
        self.copies = copies
        if tensors:
            self._find_tensors(module)

    def _find_tensors(self, module: nn.Module) -> None:
        self.norms = [m for m in module.modules() if self._norms and _is_seen_to(m)]
        exempt = {id(t) for norm in self.norms for t in norm.buffers(recurse=False)}
        self.few: list[Tensor] = []
        self.many: list[Tensor] = list(module.parameters())
        self.arrays: list[np.ndarray[Any, Any]] = []
        seen = {*exempt, *map(id, self.many)}
        # The buffers of a LightningModule are not among its attributes.
        for values in (module.buffers(), *map(behind, self.live)):
            for value in values:
                if isinstance(value, np.ndarray) and value.size <= MOST and value.dtype != object:
                    self.arrays.append(value)
                if type(value) not in _PLAIN or id(value) in seen:
                    continue
                seen.add(id(value))
                if value.grad_fn is None and not value.is_inference():
                    small = value.numel() <= self._few and not isinstance(value, nn.Parameter)
                    (self.few if small else self.many).append(value)
        self.many = [t for t in self.many if type(t) in _PLAIN and not t.is_inference()]


class Moment:
    """What a module and the world were; made by `Moments.take`."""

    def __init__(self, moments: Moments, arguments: list[Any], whole: bool) -> None:
        self._moments = moments
        self.norms = moments.norms
        """Those of torch that learn: whose statistics the caller sees to."""
        self._live, self._copies = moments.live, moments.copies
        if arguments:
            self._live = [*self._live, *arguments]
            self._copies = [*self._copies, *(one.copy() for one in arguments)]
        written = [t for ref in moments.written if (t := ref()) is not None]
        copied = [*moments.few, *written, *(moments.many if whole else ())]
        self._tensors = [(t, t.detach().clone()) for t in copied]
        self._arrays = [(a, a.copy()) for a in moments.arrays]
        self._many = moments.many
        self._versions = [t._version for t in moments.many]
        self._random: Chance | None = Chance(moments.generators, whole or moments.draws_numpy)

    def written(self) -> list[Tensor]:
        """Return parameters and large tensors that were written since, and of which there is no copy."""
        now = [t._version for t in self._many]
        if now == self._versions:
            return []
        copied = {id(t) for t, _ in self._tensors}
        pairs = zip(self._many, self._versions, now, strict=True)
        return [t for t, before, after in pairs if before != after and id(t) not in copied]

    def stepped(self) -> list[Tensor]:
        """Return parameters that learn and were written since by others, in place."""
        return [t for t in self.written() if t.requires_grad and t.is_leaf]

    def note_written(self) -> None:
        """Remember which large tensors the call wrote, also through `.data`, and drop the other copies."""
        few = {id(t) for t in self._moments.few}
        versions = {id(t): version for t, version in zip(self._many, self._versions, strict=True)}
        kept = []
        for tensor, before in self._tensors:
            if id(tensor) in few:
                kept.append((tensor, before))
            elif tensor._version != versions.get(id(tensor)) or not _same(tensor, before):
                self._moments.written.append(weakref.ref(tensor))
                kept.append((tensor, before))
        self._tensors = kept
        assert self._random is not None
        self._moments.draws_numpy |= self._random.numpy_moved()

    def drew(self) -> str:
        """Say from whose global random state somebody drew since: "`random`", "`numpy.random`", or ""."""
        return self._random.drew() if self._random is not None else ""

    @torch.no_grad()
    def put_back(self) -> None:
        """Let everything be as it was, for good: numbers return to the storage that holds them."""
        self._put_attributes(not equal(self._live, self._copies))
        for tensor, before in self._tensors:
            if not _same(tensor, before):
                # Without a new version, which an earlier graph would miss.
                tensor.data.copy_(before)
        if self._random is not None:
            self._random.come_back()

    def bring_back(self) -> Moment:
        """Let everything be as it was, and return what it is now, to `come_back` to it."""
        now = Moment.__new__(Moment)
        now._live, now._copies = self._live, self._copies
        moved = not equal(self._live, self._copies)
        if moved:
            now._copies = [live.copy() for live in self._live]
        now._tensors = [(tensor, tensor.data) for tensor, _ in self._tensors]
        now._arrays = [(array, array.copy()) for array, _ in self._arrays]
        now._random = self._random.now() if self._random is not None else None
        self._put_attributes(moved)
        self._put_numbers(drawn=now._random is not None)
        return now

    def come_back(self) -> None:
        """Let everything be as it was, until another moment comes back."""
        self._put_attributes(not equal(self._live, self._copies))
        self._put_numbers(drawn=True)

    def _put_numbers(self, drawn: bool) -> None:
        for tensor, before in self._tensors:
            # Another storage, not other numbers: neither do versions change nor what others saved.
            tensor.data = before
        if drawn and self._random is not None:
            self._random.come_back()

    def _put_attributes(self, moved: bool) -> None:
        if moved:
            for live, copied in zip(self._live, self._copies, strict=True):
                if differing(live, copied):
                    put_back(live, copied)
        for array, before in self._arrays:
            array[...] = before


def _is_seen_to(module: nn.Module) -> bool:
    """Tell whether a norm's statistics need no copy: one of torch, that writes them and does not read them."""
    kinds = (_BatchNorm, _InstanceNorm)
    own = isinstance(module, kinds) and type(module).__module__.startswith("torch.nn.")
    return own and module.training


def _changes(live: Any, copied: Any) -> list[tuple[Any, Any]]:
    """Return pairs of what was and what is."""
    if hasattr(live, "items"):
        now = dict(live.items())
        return [(copied.get(key), now.get(key)) for key in differing(live, copied)]
    before = {id(value) for value in copied}
    new = [value for value in live if id(value) not in before]
    return [(None, value) for value in new]


def _objects(arguments: Iterable[Any]) -> list[Any]:
    """Return what can change among arguments: containers, and objects that keep something."""
    roots = [("", value) for value in arguments if leads_on(value)]
    return [live for _, live, _ in held_by(roots)] if roots else []


def _same(tensor: Tensor, before: Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.is_meta:
        return True
    now = tensor.detach()
    return now.shape == before.shape and bool(((now == before) | (now != now)).all())
