"""What a step writes into weights that are gathered: moving averages within a module, weights clamped by hand.

A gathered weight is a copy that is thrown away. In one process what is written into a weight stays; so here each process
takes its part of what was written back into its shard, before the copy goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


class WriteBack:
    """Keeps what is written into the weights that are gathered with the root of a sharded module.

    Args:
        model: The module, not gathered.
        units: Names of the modules that are gathered by themselves; nothing is written into those while they are.
        written: Weights that are known to be written, in ways that leave no version (`weight.data`).
    """

    def __init__(self, model: Any, units: Sequence[str], written: Sequence[str]) -> None:
        self._model, self._written = model, set(written)
        below = tuple(f"{name}." for name in units)
        named = ((n, p) for n, p in model.named_parameters() if not n.startswith(below))
        self._shards = {n: p for n, p in named if isinstance(p, DTensor)}
        self._versions: dict[str, int] = {}
        self._places: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Note the versions of the weights that have just been gathered, and where they are."""
        self._versions = {n: p._version for n, p in self._gathered()}
        self._places = {n: p.data for n, p in self._gathered()}

    def commit(self) -> None:
        """Take what was written since into the shards."""
        for name, weight in self._gathered():
            if (
                name in self._written
                or self._versions.get(name, weight._version) != weight._version
            ):
                shard: Any = self._shards[name]
                with torch.no_grad():
                    place = self._places.get(name, weight.data)
                    if place.data_ptr() != weight.data_ptr():  # `weight.data = ...`
                        place.copy_(weight.data)
                        weight.data = place  # or later copies would be gathered where nobody looks
                    part = distribute_tensor(
                        weight.detach(), shard.device_mesh, shard.placements, src_data_rank=None
                    )
                    shard.to_local().copy_(part.to_local())
                self._versions[name] = weight._version

    @property
    def is_let_go(self) -> bool:
        """Whether the root's weights are shards now."""
        return any(isinstance(self._model.get_parameter(name), DTensor) for name in self._shards)

    def let_go(self) -> None:
        """Keep what was written, and leave nothing gathered: what comes next is gathered anew."""
        self.commit()
        for group in self._model._get_fsdp_state()._fsdp_param_groups:
            group._to_sharded()  # `reshard` does nothing within a forward

    def refresh(self) -> None:
        """Begin a step from the shards as they are, whatever hooks did to gathered copies or to `weight.data`."""
        self.let_go()
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                for group in module._get_fsdp_state()._fsdp_param_groups:
                    for parameter in group.fsdp_params:
                        shard: Any = parameter.sharded_param
                        local = shard.to_local()
                        flat = parameter._sharded_param_data
                        if local.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr():
                            parameter.reset_sharded_param()

    def _gathered(self) -> list[tuple[str, Tensor]]:
        named = [(name, self._model.get_parameter(name)) for name in self._shards]
        return [(name, p) for name, p in named if not isinstance(p, DTensor)]
