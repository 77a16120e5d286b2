"""What lies in the folder of a cache: the teachers of one user, and for each what its rows look like."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lightning_accel.distillation.row_store import bytes_in
from lightning_accel.seal import is_own

from .answers import RowField, RowLayout

_HEX = set("0123456789abcdef")
_IN_USE_S = 86_400.0
"""Another teacher's answers are left alone for so many seconds after their last use."""


def layouts_in(home: Path, seal: Callable[[RowLayout], bytes]) -> list[RowLayout]:
    """Return the layouts that are on disk for a teacher, those that say what their folder says."""
    layouts = []
    for path in sorted(home.glob("*/meta.json")):
        try:
            about = json.loads(path.read_bytes())
            entries = (RowField(n, tuple(s), _dtype(a), _dtype(b)) for n, s, a, b in about["row"])
            layout = RowLayout(tuple(entries))
            if layout.digest == path.parent.name and about["seal"] == seal(layout).hex():
                layouts.append(layout)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue  # damaged; `Store` sets it aside when its layout comes up
    return layouts


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(name)
    return found


def remove_unused(folder: Path, own: Path, most: int) -> None:
    """Remove other teachers' answers, the longest unused first, until they take at most `most` bytes."""
    others = []
    for path in folder.glob("*/teacher.json"):
        named = len(path.parent.name) == len(own.name) and set(path.parent.name) <= _HEX
        if path.parent != own and named and is_own(path.parent) and is_own(path):
            with contextlib.suppress(FileNotFoundError):  # another process removes it as well
                others.append((path.lstat().st_mtime, path.parent))
    for used, other in sorted(others):
        idle = time.time() - used > _IN_USE_S
        if idle and bytes_in(folder) - bytes_in(own) > most:
            shutil.rmtree(other, ignore_errors=True)
