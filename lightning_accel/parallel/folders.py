"""Checkpoints that are folders: a file of shards per process, as torch.distributed.checkpoint writes them.

The layout is that of Lightning's `ModelParallelStrategy`: `state_dict`, `optimizer_0`, ..., and beside the shards all that
is no tensor of the model, in `meta.pt`. Any number of processes reads what any other number wrote.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    _EmptyStateDictLoadPlanner,
)
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from lightning_accel.errors import AccelError, UnsafeFile, weights_alone

META = "meta.pt"
"""What is no tensor of the model, beside the shards."""


def is_folder(path: Path) -> bool:
    """Whether a path is such a folder."""
    return path.is_dir() and (path / META).is_file()


def is_part(path: Path) -> bool:
    """Whether a file is one of those that such a folder is made of."""
    return path.is_file() and (path.name in (META, ".metadata") or path.suffix == ".distcp")


def values(path: Path) -> dict[str, Any]:
    """Return what a folder holds beside the shards: epochs, schedulers, states of callbacks, structure.

    Raises:
        UnsafeFile: It holds more than tensors and plain values.
    """
    with weights_alone(path / META):
        found = torch.load(path / META, map_location="cpu", weights_only=True)
    return {**found, "state_dict": {}, "optimizer_states": []}


def save(
    checkpoint: dict[str, Any], path: Path, *, is_first: bool, barrier: Callable[[], None]
) -> None:
    """Write a folder, each process its shards; what was at the path stays there until all is written.

    Args:
        checkpoint: Of all processes, with shards under `state_dict` and `optimizer_states`.
        path: The same for all.
        is_first: Whether this process moves it into its place.
        barrier: Waits for all processes.
    """
    partial, old = (path.with_name(f"{path.name}.{kind}") for kind in ("partial", "old"))
    if is_first:
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
    barrier()
    state = {"state_dict": checkpoint["state_dict"]}
    for index, one in enumerate(checkpoint.get("optimizer_states", ())):
        state[f"optimizer_{index}"] = one
    rest = {k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")}
    with _as_it_was_raised("written", "make room for it, and look at the error above"):
        dcp.save(state, checkpoint_id=partial)
    if is_first:
        torch.save(rest, partial / META)
        if path.is_dir():
            path.rename(old)
        else:
            path.unlink(missing_ok=True)
        partial.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    barrier()


def gathered(path: Path, *, optimizers: bool = False) -> dict[str, Any]:
    """Return a folder as one checkpoint, with whole weights, in this process.

    Args:
        path: The folder.
        optimizers: Read their states too, each under a key of its own, `optimizer_0` and so on, by names of weights.

    Raises:
        UnsafeFile: It holds more than tensors and plain values.
    """
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    check(path)
    found: dict[str, Any] = {}
    reader, keys = dcp.FileSystemReader(path), {"state_dict"}
    if optimizers:
        names = reader.read_metadata().state_dict_metadata
        keys |= {n.partition(".")[0] for n in names if n.startswith("optimizer_")}
    with _as_it_was_raised():
        _load_state_dict(found, reader, planner=_AllWeights(keys=keys), no_dist=True)
    return {**values(path), **found}


def check(path: Path) -> None:
    """Refuse a folder whose index of shards, a pickle, names anything but what torch writes there.

    Raises:
        UnsafeFile: It does.
        AccelError: It has none.
    """
    index = path / ".metadata"
    try:
        with index.open("rb") as file:
            _OfTorch(file).load()
    except FileNotFoundError:
        do = "copy the whole folder, with `.metadata` and all `.distcp` files"
        raise AccelError("a checkpoint in shards has no index", str(index), do) from None
    except pickle.UnpicklingError as error:
        raise UnsafeFile(
            "the index of a checkpoint names code, which reading it would run",
            f"{error} in {index}",
            "load only folders that torch.distributed.checkpoint wrote",
        ) from None


@contextmanager
def _as_it_was_raised(
    verb: str = "read", do: str = "copy the whole folder, with `.metadata` and all `.distcp` files"
) -> Iterator[None]:
    """Raise our own errors as such: torch wraps what happens to any process in an exception that is no `Exception`."""
    try:
        yield
    except CheckpointException as wrapped:
        errors = [error for error, _ in wrapped.failures.values()]
        for error in errors:
            if isinstance(error, AccelError):
                raise error from None
        raise AccelError(
            f"a checkpoint in shards could not be {verb}",
            f"{type(errors[0]).__name__}: {errors[0]}" if errors else str(wrapped),
            do,
        ) from wrapped


class _Values:
    """Reads what is no tensor as plain values."""

    def load_bytes(self, read_item: Any, value: BytesIO) -> None:
        with weights_alone("a shard of the checkpoint"):
            plain = torch.load(value, weights_only=True)
        super().load_bytes(read_item, _saved(plain))  # type: ignore[misc]


class _Parts(_Values, DefaultLoadPlanner):
    """Fills what is there."""


class _AllWeights(_Values, _EmptyStateDictLoadPlanner):
    """Makes what the folder has."""


def _saved(value: Any) -> BytesIO:
    file = BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


class _OfTorch(pickle.Unpickler):
    """Makes nothing but what describes tensors."""

    def find_class(self, module: str, name: str) -> Any:
        known = module.startswith("torch.distributed.checkpoint.") and name in _DESCRIBES
        if known or (module, name) in _PLAIN:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


_DESCRIBES = {
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
    "_StorageInfo",
}
_PLAIN = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    *(
        ("torch", str(dtype).removeprefix("torch."))
        for dtype in vars(torch).values()
        if isinstance(dtype, torch.dtype)
    ),
}


def load_model(model: nn.Module, path: Path) -> None:
    """Load the weights of a sharded model, each process its own part."""
    state = {"state_dict": get_model_state_dict(model)}
    check(path)
    with _as_it_was_raised():
        dcp.load(state, checkpoint_id=path, planner=_Parts())
    set_model_state_dict(model, state["state_dict"])


def load_optimizers(model: nn.Module, optimizers: Sequence[Optimizer], path: Path) -> None:
    """Load the states of optimizers of a sharded model, each process its own part."""
    for index, optimizer in enumerate(optimizers):
        state = {f"optimizer_{index}": get_optimizer_state_dict(model, optimizer)}
        with _as_it_was_raised():
            dcp.load(state, checkpoint_id=path, planner=_Parts())
        set_optimizer_state_dict(model, optimizer, state[f"optimizer_{index}"])
