"""Checkpoints that are folders: a file of shards per process, as torch.distributed.checkpoint writes them.

The layout is that of Lightning's `ModelParallelStrategy`: `state_dict`, `optimizer_0`, ..., and beside the shards all that
is no tensor of the model, in `meta.pt`. Any number of processes reads what any other number wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from lightning_accel.errors import weights_alone

_META = "meta.pt"


def is_folder(path: Path) -> bool:
    """Whether a path is such a folder."""
    return path.is_dir() and (path / _META).is_file()


def values(path: Path) -> dict[str, Any]:
    """Return what a folder holds beside the shards: epochs, schedulers, states of callbacks, structure.

    Raises:
        UnsafeFile: It holds more than tensors and plain values.
    """
    with weights_alone(path / _META):
        found = torch.load(path / _META, map_location="cpu", weights_only=True)
    return {**found, "state_dict": {}, "optimizer_states": []}


def load_model(model: nn.Module, path: Path) -> None:
    """Load the weights of a sharded model, each process its own part."""
    state = {"state_dict": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(model, state["state_dict"])


def load_optimizers(model: nn.Module, optimizers: Sequence[Optimizer], path: Path) -> None:
    """Load the states of optimizers of a sharded model, each process its own part."""
    for index, optimizer in enumerate(optimizers):
        state = {f"optimizer_{index}": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=path)
        set_optimizer_state_dict(model, optimizer, state[f"optimizer_{index}"])
