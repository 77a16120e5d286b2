"""A checkpoint from a folder of shards into one file and back: weights, optimizers, loops and callbacks, to the last bit.

In a folder an optimizer's state stands under the names of its weights, in a file under their numbers in its groups.
From names to numbers the groups themselves lead; from numbers to names only the optimizer does, as the module makes it.
"""

from __future__ import annotations

import math
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch.utils._pytree import tree_leaves

from lightning_accel.errors import AccelError, StructureMismatch, explain, weights_alone
from lightning_accel.parallel import folders


class Converted(NamedTuple):
    """What a conversion wrote: where, "file" or "folder", its weights, optimizers and bytes."""

    path: Path
    kind: str
    num_weights: int
    num_optimizers: int
    num_bytes: int


def convert(
    source: Path,
    to: Path,
    *,
    names: Sequence[Sequence[str]] | None = None,
    overwrite: bool = False,
) -> Converted:
    """Write a folder of shards as one file, or one file as a folder; the source stays as it is.

    Nothing stands at `to` until all of it is written.

    Args:
        source: A checkpoint.
        to: Where the other kind goes.
        names: From a file with states of optimizers: of each, its parameters by name, in its order.
        overwrite: Whether what is at `to` is replaced.

    Raises:
        ValueError: There is no such checkpoint, or something is at `to`.
        AccelError: A folder is not complete, or a file's optimizers need names.
        StructureMismatch: The names are not those of the file.
        UnsafeFile: It holds more than tensors and plain values.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> torch.save({"state_dict": {"weight": torch.ones(2)}, "epoch": 3}, folder / "last.ckpt")
    >>> there = convert(folder / "last.ckpt", folder / "shards")
    >>> back = convert(folder / "shards", folder / "again.ckpt")
    >>> there.kind, back.kind, torch.load(back.path, weights_only=True)["epoch"]
    ('folder', 'file', 3)
    """
    source, to = Path(source), Path(to)
    is_folder = folders.is_folder(source)
    if not is_folder and not source.is_file():
        do = "pass a file, or a folder with `meta.pt` and `.metadata`"
        raise ValueError(explain("there is no such checkpoint", str(source), do))
    _require_free(to, overwrite)
    partial = to.with_name(f"{to.name}.partial")
    _remove(partial)
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        checkpoint = _read_folder(source) if is_folder else _read_file(source)
        if is_folder:
            torch.save(checkpoint, partial)
        else:
            _write_folder(checkpoint, partial, names)
        _remove(to)
        partial.rename(to)
    finally:
        _remove(partial)
    files = [to] if is_folder else [file for file in to.iterdir() if file.is_file()]
    return Converted(
        to,
        "file" if is_folder else "folder",
        len(checkpoint["state_dict"]),
        len(checkpoint.get("optimizer_states", ())),
        sum(file.stat().st_size for file in files),
    )


def _require_free(to: Path, overwrite: bool) -> None:
    """Raise where something is that may not go: without `overwrite`, anything; with it, what is no checkpoint."""
    if to.exists() and not overwrite:
        raise ValueError(
            explain("something is there already", str(to), "pass another path, or `--overwrite`")
        )
    others = [f for f in to.iterdir() if not folders.is_part(f)] if to.is_dir() else []
    if others:
        found = f"{to} holds {', '.join(sorted(f.name for f in others)[:4])}"
        do = "pass another path, or move these elsewhere"
        raise ValueError(explain("only a folder of shards alone is replaced", found, do))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read_folder(path: Path) -> dict[str, Any]:
    folders.check(path)
    found = folders.gathered(path, optimizers=True)
    keys = sorted((k for k in found if re.fullmatch(r"optimizer_\d+", k)), key=_number)
    found["optimizer_states"] = [_by_number(found.pop(key)) for key in keys]
    return found


def _number(key: str) -> int:
    return int(key.rpartition("_")[2])


def _by_number(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of an optimizer by numbers, given by names."""
    groups = [{**group} for group in state["param_groups"]]
    numbers: dict[str, int] = {}
    for group in groups:
        group["params"] = [numbers.setdefault(name, len(numbers)) for name in group["params"]]
    held = {numbers[name]: entry for name, entry in state.get("state", {}).items()}
    return {"state": dict(sorted(held.items())), "param_groups": groups}


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with weights_alone(path):
            found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError) as error:
        if isinstance(error, AccelError):
            raise
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise AccelError(
            "this file cannot be read", f"{path}: {said}", "look whether all of it was copied"
        ) from error
    if not isinstance(found, dict) or "state_dict" not in found:
        what = type(found).__name__ if not isinstance(found, dict) else ", ".join(list(found)[:4])
        do = "pass a checkpoint of Lightning, such as `trainer.save_checkpoint` writes"
        raise AccelError("this file is no checkpoint of a run", what, do)
    return found


def _write_folder(
    checkpoint: Mapping[str, Any], path: Path, names: Sequence[Sequence[str]] | None
) -> None:
    states = checkpoint.get("optimizer_states", ())
    named = {
        f"optimizer_{index}": _by_name(state, names[index] if names else None, checkpoint)
        for index, state in enumerate(states)
    }
    rest = {k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")}
    path.mkdir()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        dcp.save(
            {"state_dict": checkpoint["state_dict"], **named}, checkpoint_id=path, no_dist=True
        )
    torch.save(rest, path / folders.META)


def _by_name(
    state: Mapping[str, Any], names: Sequence[str] | None, checkpoint: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the state of an optimizer by names, given by numbers."""
    groups = [{**group} for group in state["param_groups"]]
    if names is None and all("param_names" in group for group in groups):
        names = [name for group in groups for name in group["param_names"]]
    if names is None:
        raise AccelError(
            "a file numbers the states of its optimizer, and a folder names them",
            f"{sum(len(g['params']) for g in groups)} parameters without names",
            "say which module makes the optimizer, `--module mymodels.lit:LitNet`; or resume from the file with "
            "`FSDP2Strategy(checkpoints='sharded')`, which takes it as it is and writes folders",
        )
    numbers = [number for group in groups for number in group["params"]]
    if len(numbers) != len(names):
        raise StructureMismatch(
            "the optimizer of the module is not that of the file",
            f"{len(names)} parameters, and {len(numbers)} in the file",
            "name the module that wrote it, with the same arguments",
        )
    called = dict(zip(numbers, names, strict=True))
    for group in groups:
        group["params"] = [called[number] for number in group["params"]]
    entries = {called[number]: entry for number, entry in state["state"].items()}
    for name, entry in entries.items():
        _require_fit(name, entry, checkpoint["state_dict"])
    return {"state": entries, "param_groups": groups}


def _require_fit(name: str, entry: Any, weights: Mapping[str, Any]) -> None:
    """Raise unless all that is kept of a weight is a number, or one per element of it."""
    if name not in weights:
        do = "name the module that wrote it, with the same arguments"
        raise StructureMismatch("a weight of the module is not in the file", f"`{name}`", do)
    shape = tuple(weights[name].shape)
    for value in tree_leaves(entry):
        held = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
        as_weight = math.prod(held) == math.prod(shape) or len(held) == len(shape)
        if held not in ((), (1,), shape) and as_weight:
            raise StructureMismatch(
                f"the optimizer keeps something of another shape for `{name}`",
                f"{held} for {shape}",
                "name the module that wrote the file, with the same arguments",
            )
