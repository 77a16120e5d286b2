"""The state of a fit as plain data, and back: to a smaller or a larger network than there is now.

Weights, buffers and sizes, weight averages, optimizers, schedulers, gradient scaler and random state are
copied to the CPU, and put back bit for bit. All of it is safe for `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_accel.errors import StructureMismatch
from lightning_accel.surgery.bypass import whole_tensors
from lightning_accel.surgery.receipt import Change, Receipt, summary
from lightning_accel.surgery.rng import set_random_state
from lightning_accel.surgery.structure import Structure, named_tensors, replace_data, text


class Stateful(Protocol):
    """An optimizer, a scheduler, a scaler."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state_dict: Any) -> Any: ...


@dataclass(frozen=True)
class Snapshot:
    """The state of a fit on the CPU, independent of the fit.

    Args:
        structure: Sizes, at that time, of what had been pruned by then.
        tensors: Parameters and buffers by name, a tied one once.
        copies: The same for each weight average.
        states: State of each optimizer, scheduler and scaler by name.
        members: By name of an optimizer, the names of the parameters of each of its groups; empty for one of others.
        random: Random states, one per process.
    """

    structure: Structure
    tensors: Mapping[str, Tensor]
    copies: Sequence[Mapping[str, Tensor]] = ()
    states: Mapping[str, Any] = field(default_factory=dict)
    random: Sequence[Mapping[str, Any]] = ()
    members: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Write what is in it, not the values."""
        held = sum(tensor.numel() for tensor in self.tensors.values())
        counts = f"{len(self.tensors)} tensors of {held:,} numbers, {len(self.copies)} averages"
        return summary(f"Snapshot({counts})", [f"  {name}" for name in self.states])

    @classmethod
    def take(
        cls,
        model: nn.Module,
        *,
        pristine: Structure,
        copies: Iterable[nn.Module] = (),
        holders: Mapping[str, Stateful] | None = None,
        random: Sequence[Mapping[str, Any]] = (),
    ) -> Snapshot:
        """Copy everything.

        Args:
            model: The network.
            pristine: Sizes before the first prune of what has been pruned so far.
            copies: Weight averages of the model.
            holders: What else has a state, by name.
            random: What `random_state` gave, of each process.
        """
        return cls(
            pristine.now(model),
            _tensors(model),
            [_tensors(copied) for copied in copies],
            {name: _plain(holder.state_dict()) for name, holder in (holders or {}).items()},
            list(random),
            {n: _members(model, h) for n, h in (holders or {}).items() if _has_groups(h)},
        )

    @torch.no_grad()
    def restore(
        self,
        model: nn.Module,
        *,
        pristine: Structure,
        copies: Iterable[nn.Module] = (),
        holders: Mapping[str, Stateful] | None = None,
    ) -> Receipt:
        """Put everything but the random state back in place, bit-equal, from any more pruned structure.

        Parameters stay the same objects where autograd allows it. A weight average that began after the
        snapshot begins anew.

        Args:
            pristine: Sizes before the first prune of what has been pruned by now.

        Raises:
            StructureMismatch: The model has other tensors than it had; nothing is changed.
        """
        structure = pristine.updated(self.structure)
        copied = list(copies)
        sources = [*self.copies, *[self.tensors] * len(copied)][: len(copied)]
        for holder, source in ((model, self.tensors), *zip(copied, sources, strict=True)):
            _check(holder, source)
        changes = _put(model, self.tensors, structure)
        for average, source in zip(copied, sources, strict=True):
            _put(average, source, structure)
        for name, held in (holders or {}).items():
            if name in self.members:
                _put_members(model, held, self.members[name])
            if name in self.states:
                _load(held, self.states[name])
        return Receipt(tuple(changes))

    def restore_random(self, process: int = 0) -> None:
        """Put back the random state of this process, if it was there when the snapshot was taken."""
        if process < len(self.random):
            set_random_state(self.random[process])

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers and tensors."""
        return {
            "structure": self.structure.to_dict(),
            "tensors": dict(self.tensors),
            "copies": [dict(tensors) for tensors in self.copies],
            "states": dict(self.states),
            "random": [dict(state) for state in self.random],
            "members": {n: [list(group) for group in m] for n, m in self.members.items()},
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Snapshot:
        """Read `to_dict`'s form."""
        return cls(
            Structure.from_dict(plain["structure"]),
            _plain(plain["tensors"]),
            _plain(plain["copies"]),
            _plain(plain["states"]),
            _plain(plain["random"]),
            dict(plain.get("members", {})),
        )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    seen: set[int] = set()
    found = {}
    for name, tensor in named_tensors(model):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = _on_cpu(tensor)
    return found


def _on_cpu(tensor: Tensor) -> Tensor:
    held = tensor.detach()
    return held.clone() if held.device.type == "cpu" else held.cpu()


def _plain(state: Any) -> Any:
    """Copy any nesting; tensors come to the CPU."""
    return tree_map(lambda v: _on_cpu(v) if isinstance(v, Tensor) else copy.deepcopy(v), state)


def _has_groups(holder: Any) -> bool:
    return isinstance(getattr(holder, "param_groups", None), list)


def _members(model: nn.Module, optimizer: Any) -> list[list[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]


def _put_members(model: nn.Module, optimizer: Any, members: Sequence[Sequence[str]]) -> None:
    """Put parameters of blocks that are back into their places in the groups, which others share."""
    for group, now, then in zip(
        optimizer.param_groups, _members(model, optimizer), members, strict=False
    ):
        if sorted(now) != sorted(then):
            named = dict(model.named_parameters(remove_duplicate=False))
            others = iter([p for p, name in zip(group["params"], now, strict=True) if not name])
            group["params"][:] = [named[name] if name else next(others) for name in then]


def _check(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    present = dict(whole_tensors(model))
    odd = [n for n, t in tensors.items() if n not in present or present[n].dim() != t.dim()]
    if odd:
        raise StructureMismatch(
            "the network before the prune had tensors that it has no more",
            ", ".join(odd[:3]),
            "let no other callback replace modules between prunes, or leave `max_drop` out",
        )


def _put(model: nn.Module, tensors: Mapping[str, Tensor], structure: Structure) -> list[Change]:
    blocks = Structure(bypassed=structure.bypassed).apply(model).changes
    changes = [Change(change.name, "rolled back") for change in blocks]
    for name, stored in tensors.items():
        tensor = dict(named_tensors(model))[name]
        if tensor.shape == stored.shape:
            tensor.copy_(stored)
            continue
        changes.append(Change(name, "rolled back", text(tensor.shape), text(stored.shape)))
        replace_data(model, tensor, stored.to(tensor.device, copy=True))
    structure.apply(model)  # what is left: the integers that the forward reads
    return changes


def _load(holder: Stateful, state: Any) -> None:
    if isinstance(holder, torch.optim.Optimizer):
        state = _with_later_groups(state, holder.state_dict())
        groups, each, held = holder.param_groups, list(holder.param_groups), holder.state
        holder.load_state_dict(_plain(state))
        _in_its_own_dtype(holder, state)
        _keep_objects(holder, groups, each, held)
        return
    before = {id(one): dict(vars(one)) for one in _schedulers(holder)}
    holder.load_state_dict(_plain(state))
    for one in _schedulers(holder):
        _extend_lists(one, before.get(id(one), {}))


def _with_later_groups(stored: Any, present: Any) -> Any:
    """Add the parameter groups that joined an optimizer after its state was stored."""
    later = present["param_groups"][len(stored["param_groups"]) :]
    numbers = {number for group in later for number in group["params"]}
    kept = {number: held for number, held in present["state"].items() if number in numbers}
    return {
        **stored,
        "param_groups": [*stored["param_groups"], *later],
        "state": {**stored["state"], **kept},
    }


def _keep_objects(optimizer: Any, groups: list[Any], each: list[Any], held: Any) -> None:
    """Put what was loaded into the groups and the state of before, which another optimizer may share."""
    for old, new in zip(each, optimizer.param_groups, strict=True):
        if old is not new:
            members = old["params"]
            members[:] = new["params"]
            old.clear()
            old.update(new, params=members)
    if optimizer.param_groups is not groups:
        groups[:] = each
        optimizer.param_groups = groups
    if optimizer.state is not held:
        loaded = dict(optimizer.state)
        held.clear()
        held.update(loaded)
        optimizer.state = held


def _schedulers(holder: Any) -> Iterator[Any]:
    yield holder
    for inner in getattr(holder, "_schedulers", ()):
        yield from _schedulers(inner)


def _extend_lists(scheduler: Any, before: Mapping[str, Any]) -> None:
    """Keep the entries of parameter groups that came later in a scheduler's lists."""
    groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", ())
    for name, held in before.items():
        now = vars(scheduler).get(name)
        if isinstance(held, list) and isinstance(now, list) and len(now) < len(held) == len(groups):
            now.extend(held[len(now) :])


def _in_its_own_dtype(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Undo that `load_state_dict` converts state to the number format of its parameter."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [i for group in state["param_groups"] for i in group["params"]]
    for number, parameter in zip(numbers, params, strict=True):
        for key, stored in state["state"].get(number, {}).items():
            loaded = optimizer.state[parameter][key]
            if isinstance(stored, Tensor) and loaded.dtype != stored.dtype:
                optimizer.state[parameter][key] = stored.to(loaded.device, copy=True)
