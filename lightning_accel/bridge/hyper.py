"""Hyper-parameters of a checkpoint are values: none of them names code that loading it would run.

`weights_only=True` keeps pickles from running. But Lightning builds the module from the hyper-parameters in the
file, and where they hold `_instantiator` (LightningCLI writes it) jsonargparse builds whatever class a nested
`class_path` names, of any installed package (what CVE-2026-58659 left open). A module that hands its
hyper-parameters to Hydra does the same for `_target_`. So the first is dropped and the others are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints
from zipfile import is_zipfile

import torch
from lightning.fabric.utilities.cloud_io import _load as fetch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.saving import load_hparams_from_tags_csv, load_hparams_from_yaml

from lightning_accel.errors import UnsafeFile

_KEYS = ("hyper_parameters", "hparams", "module_arguments")  # the last two of old releases
_INSTANTIATOR, _CLASS = "_instantiator", "_class_path"
_NAMES_CODE = ("class_path", _CLASS, "_target_", _INSTANTIATOR)


def as_values(
    cls: type[LightningModule], path: str | Path, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return arguments for `load_from_checkpoint` that let it build `cls` from plain values.

    Args:
        cls: The class that will be built.
        path: The checkpoint.
        given: Arguments of the user's own, which go before those in the file.

    Raises:
        UnsafeFile: A hyper-parameter names code, or needs code to become what `cls` takes.
    """
    stored = _stored(path, given.get("hparams_file"))
    made_by_cli = stored.pop(_INSTANTIATOR, None) is not None
    named = stored.pop(_CLASS, None) if made_by_cli else None
    if named is not None and named != f"{cls.__module__}.{cls.__qualname__}":
        raise _refusal(path, _CLASS, named, "load it with that class, if you trust it")
    left = {name: value for name, value in stored.items() if name not in given}
    for where, value in _naming_code(left):
        raise _refusal(path, where, value, _PASS.format(where.partition(".")[0].partition("[")[0]))
    if made_by_cli:
        _check_types(cls, path, left)
    return {_INSTANTIATOR: None} if made_by_cli else {}


_PASS = (
    "pass the object in its place, `load_from_checkpoint(Module, path, {0}=...)`; for a file that you trust "
    "say weights_only=False"
)


def _stored(path: str | Path, beside: Any) -> dict[str, Any]:
    if "://" in str(path):
        checkpoint = fetch(path, map_location="cpu", weights_only=True)
    else:
        mapped = is_zipfile(path)  # so that no weights are read
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    found: dict[str, Any] = {}
    for key in _KEYS:
        values = checkpoint.get(key) if isinstance(checkpoint, dict) else None
        found.update(values if isinstance(values, dict) else {})
    if beside is not None:
        is_csv = str(beside).lower().endswith("csv")
        found.update(
            load_hparams_from_tags_csv(beside)
            if is_csv
            else load_hparams_from_yaml(beside, use_omegaconf=False)
        )
    return found


def _naming_code(tree: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            inner = f"{where}.{key}".lstrip(".")
            if key in _NAMES_CODE:
                yield inner, value
            yield from _naming_code(value, inner)
    elif isinstance(tree, (list, tuple, set)):
        for index, value in enumerate(tree):
            yield from _naming_code(value, f"{where}[{index}]")


def _check_types(cls: type, path: str | Path, values: Mapping[str, Any]) -> None:
    """Refuse values that only jsonargparse would turn into what the class takes: enums, dataclasses, paths."""
    try:
        hints = get_type_hints(cls.__init__)  # type: ignore[misc]
    except (NameError, TypeError):
        return  # types that cannot be resolved here say nothing
    taken = signature(cls).parameters
    for name, value in values.items():
        hint = hints.get(name)
        plain = hint is float and isinstance(value, int)
        if name in taken and not plain and not _fits(value, hint):
            found = f"{type(value).__name__}, for {getattr(hint, '__name__', hint)}"
            raise _refusal(path, name, found, _PASS.format(name))


def _fits(value: Any, hint: Any) -> bool:
    return value is None or hint is Any or not isinstance(hint, type) or isinstance(value, hint)


def _refusal(path: str | Path, where: str, found: Any, do: str) -> UnsafeFile:
    return UnsafeFile(
        "a hyper-parameter in a checkpoint names code, which loading it would run",
        f"`{where}`: {str(found)[:120]} in {path}",
        do,
    )
