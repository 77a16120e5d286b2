"""Pruning for models that are sharded in `configure_model` (FSDP2, tensor parallelism).

A sharded tensor has no channels left to remove, so the network is pruned, or takes the shape of a pruned
checkpoint, before `fully_shard` or `parallelize_module` sees it:

    def configure_model(self):
        prune_before_sharding(self, example=Call("net", (images,), {}), target=Macs(0.5))
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch.distributed.tensor import DTensor

from lightning_accel.bridge.restore import register, remember, stored_structure
from lightning_accel.errors import StructureMismatch, Unsupported, explain, weights_alone
from lightning_accel.pruning.planning import planned
from lightning_accel.pruning.request import Occasion, Request
from lightning_accel.pruning.subject import Subject
from lightning_accel.surgery import Cut, Receipt
from lightning_accel.surgery.call import Call, as_call

_DONE = "_accel_pruned_before_sharding"
_META = "meta.pt"  # what Lightning stores beside the shards


def prune_before_sharding(
    pl_module: LightningModule,
    *,
    example: Any,
    ckpt_path: str | Path | None = None,
    **asked: Any,
) -> Receipt:
    """Prune in `configure_model`, before anything is sharded; a second call does nothing.

    Rank 0 decides and the others follow, so that all have the same network. Checkpoints carry the
    structure, sharded ones too.

    Args:
        pl_module: The LightningModule whose `configure_model` runs.
        example: What its `forward` takes, or a `Call` that names the network inside it.
        ckpt_path: A checkpoint of a pruned network that this run resumes or tests: its structure is
            taken instead of pruning anew.
        asked: What `plan` takes: `ratio` or `target`, `importance`, `select` and so on.

    Returns:
        What was cut, or resized; falsy on a second call.

    Raises:
        TypeError: `pl_module` is no LightningModule, or an argument is of another type.
        ValueError: An argument is out of range.
        Unsupported: The module is sharded already, or has no weights yet (on the meta device).
        StructureMismatch: The checkpoint's structure does not fit.
        NoEffect: Nothing could be pruned.
    """
    if getattr(pl_module, _DONE, False):
        return Receipt()
    _refuse(pl_module)
    register(pl_module)
    if ckpt_path is None:
        call = example if isinstance(example, Call) else as_call(example)
        request, occasion = _read_arguments(asked)
        cut = _decided(pl_module, call, request, occasion)
        remember(pl_module, cut.before)
        receipt = cut.apply(pl_module)
    else:
        structure = stored_structure(pl_module, _read(Path(ckpt_path)))
        remember(pl_module, structure.built(pl_module))
        receipt = structure.apply(pl_module)
    vars(pl_module)[_DONE] = True
    return receipt


def _refuse(pl_module: LightningModule) -> None:
    if not hasattr(pl_module, "on_load_checkpoint"):
        raise TypeError(
            explain(
                "`prune_before_sharding` is for a LightningModule, in its `configure_model`",
                type(pl_module).__name__,
                "pass self there; `lightning_accel.prune` takes any network",
            )
        )
    for name, parameter in pl_module.named_parameters():
        if isinstance(parameter, DTensor):
            raise Unsupported(
                "pruning comes before sharding",
                f"`{name}` is sharded",
                "call `prune_before_sharding` before `fully_shard` and `parallelize_module`",
            )
        if parameter.is_meta:
            raise Unsupported(
                "pruning reads weights",
                f"`{name}` is on the meta device",
                "build the network with its weights before pruning it",
            )


def _read_arguments(asked: dict[str, Any]) -> tuple[Request, Occasion]:
    """Tell what is asked for from what else `plan` takes."""
    of_fits = {"steps", "schedule", "is_search"}
    names = {field.name for field in dataclasses.fields(Request)} - of_fits
    request = Request(**{name: value for name, value in asked.items() if name in names})
    others = {name: value for name, value in asked.items() if name not in names}
    return request, Occasion(**others)


def _decided(pl_module: LightningModule, call: Call, request: Request, occasion: Occasion) -> Cut:
    """Return rank 0's cut on every rank; an error there is an error everywhere."""

    def made() -> Cut:
        return planned(Subject.of(pl_module, (call,), occasion.steps), request, occasion)

    if not (dist.is_available() and dist.is_initialized()):
        return made()
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [made()]
        except Exception as error:
            found = [error]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], Exception):
        raise found[0]
    cut: Cut = found[0]
    return cut


def _read(path: Path) -> dict[str, Any]:
    """Read a checkpoint, or of a sharded one what Lightning stores beside the shards."""
    file = path / _META if path.is_dir() else path
    if not file.exists():
        raise StructureMismatch(
            "there is no checkpoint to take the structure from", str(path), "check `ckpt_path`"
        )
    with weights_alone(file):
        read: dict[str, Any] = torch.load(
            file, map_location="cpu", weights_only=True, mmap=not path.is_dir()
        )
    return read
