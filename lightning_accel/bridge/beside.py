"""What is kept beside the weights takes the shape of a pruned checkpoint, and the elements that stayed.

A resumed fit begins with a dense module, and so do the averages, slow weights and anchors that callbacks make of
it in `setup`. Sizes alone would do for those that their owner loads from the checkpoint. Others, such as an
anchor that is made anew in each run, need to know which elements stayed, so checkpoints hold that: the positions
of each cut, in the order of the cuts. Whether a copy of a part moves with it (`parts`) is told there too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_accel.bridge.optimizers import beside_blocks, shadows_of
from lightning_accel.bridge.parts import Part, mark_moving, moving, parts_of
from lightning_accel.bridge.restore import averages
from lightning_accel.errors import StructureMismatch
from lightning_accel.surgery import Cut, Structure
from lightning_accel.surgery.attributes import get_size, set_size
from lightning_accel.surgery.bypass import parameters_under
from lightning_accel.surgery.dropped import Dropped
from lightning_accel.surgery.receipt import Kept
from lightning_accel.surgery.structure import named_tensors, replace_data

_CUTS = "_accel_cuts"
_MOVING = "lightning_accel_parts"
Link = Mapping[str, Kept]


class Cuts:
    """The cuts of a module so far, as state that can be taken back."""

    def __init__(self, pl_module: LightningModule) -> None:
        self._links: list[Link] = vars(pl_module).setdefault(_CUTS, [])

    def add(self, cut: Cut) -> None:
        self._links.append(dict(cut.kept))

    def state_dict(self) -> dict[str, int]:
        return {"count": len(self._links)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        del self._links[state["count"] :]

    def to_plain(self) -> list[dict[str, Any]]:
        """Return containers and tensors, for a checkpoint."""
        return [
            {name: {"dims": list(kept.dims), "flat": kept.flat} for name, kept in link.items()}
            for link in self._links
        ]

    def replace(self, plain: Any) -> None:
        """Take what `to_plain` gave."""
        try:
            self._links[:] = [
                {name: Kept(tuple(kept["dims"]), kept["flat"]) for name, kept in link.items()}
                for link in plain
            ]
        except (AttributeError, KeyError, TypeError) as error:
            raise StructureMismatch(
                "the stored cuts cannot be read",
                f"{type(error).__name__}: {error}",
                "use an undamaged checkpoint; nothing was loaded",
            ) from None

    def take(self, tensor: Tensor, name: str) -> Tensor:
        """Return what the cuts left of a tensor that has the name's dense shape."""
        for link in self._links:
            if name in link:
                tensor = link[name].take(tensor)
        return tensor


def saved(pl_module: LightningModule, checkpoint: dict[str, Any], stored: dict[str, Any]) -> None:
    """Add to a checkpoint what `collected` needs."""
    cuts = Cuts(pl_module).to_plain()
    if stored and cuts:
        stored["kept"] = cuts
    trainer = getattr(pl_module, "_trainer", None)
    found = [] if trainer is None else moving(trainer, pl_module)
    if found:
        checkpoint[_MOVING] = found


def collected(
    pl_module: LightningModule, checkpoint: Mapping[str, Any]
) -> Callable[[Structure, Structure], None]:
    """Find what is kept beside a module while it is dense, and return what cuts it to a stored structure."""
    trainer = getattr(pl_module, "_trainer", None)
    mark_moving(pl_module, checkpoint.get(_MOVING, ()))
    cuts = Cuts(pl_module)
    cuts.replace((checkpoint.get("lightning_accel") or {}).get("kept", []))
    if trainer is None or trainer.state.fn != "fit":
        return lambda structure, dense: None
    whole = list(averages(trainer.callbacks, pl_module))
    known = set(checkpoint.get(_MOVING, ()))
    parts = [p for p in parts_of(trainer, pl_module) if p.at is None and p.where in known]
    shadows = shadows_of(trainer, pl_module)
    blocks = parameters_under(pl_module, _blocks(checkpoint))
    Dropped(pl_module).add(beside_blocks(trainer, pl_module, blocks, shadows))

    @torch.no_grad()
    def cut(structure: Structure, dense: Structure) -> None:
        def shrunk(tensor: Tensor, name: str) -> Tensor | None:
            now, then = dense.tensors.get(name), structure.tensors.get(name)
            if now is None or now == then or tuple(tensor.shape) != now:
                return None
            found = cuts.take(tensor, name)
            return found if tuple(found.shape) == then else None

        for part in parts:
            part.take_blocks(structure)
        for shadow in shadows:
            found = shrunk(shadow.tensor, shadow.name)
            if found is not None:
                shadow.tensor.data = found
        for copy, place in [*((c, "") for c in whole), *((p.copy, f"{p.of}.") for p in parts)]:
            for name, tensor in list(named_tensors(copy)):
                found = shrunk(tensor, place + name)
                if found is not None:
                    replace_data(copy, tensor, found)
        for part in parts:
            _resize(part, structure)

    return cut


def _blocks(checkpoint: Mapping[str, Any]) -> list[str]:
    """Return the blocks that a checkpoint's network is without."""
    stored = (checkpoint.get("lightning_accel") or {}).get("structure", {}).get("bypassed", {})
    return [name for name, handing in stored.items() if handing is not None]


def _resize(part: Part, structure: Structure) -> None:
    """Set the integers that the forward of a copy reads."""
    modules = dict(part.copy.named_modules())
    for name, key, size in _sizes_under(structure, part.of):
        if name in modules and get_size(modules[name], key) is not None:
            set_size(modules[name], key, size)


def _sizes_under(structure: Structure, place: str) -> Iterator[tuple[str, str, Any]]:
    for name, sizes in structure.attributes.items():
        if name == place or name.startswith(f"{place}."):
            for key, size in sizes.items():
                yield name[len(place) + 1 :], key, size
