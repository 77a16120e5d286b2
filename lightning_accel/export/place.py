"""Where a bundle is put together, and how it comes to its place: whole, by one rename, or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_accel.errors import explain
from lightning_accel.export import manifest


def free(target: Path, overwrite: bool) -> Path:
    """Return the folder where a bundle may go.

    Raises:
        ValueError: Something else is there.
    """
    target = target.absolute()
    if not os.path.lexists(target):
        return target
    is_folder = target.is_dir() and not target.is_symlink()
    if is_folder and not any(target.iterdir()):
        return target
    if overwrite and is_folder and (target / manifest.NAME).is_file():
        return target
    found = f"{target}, which {'holds something' if is_folder else 'is no folder'}"
    do = "pass a folder that is not there yet, or overwrite=True (`--overwrite`) where a bundle is to be replaced"
    raise ValueError(explain("`to` is taken", found, do))


@contextmanager
def working_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder beside `target`, which is gone at the end unless it was put in place."""
    work = target.with_name(f".{uuid.uuid4().hex}.part")
    work.mkdir(parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def put(work: Path, target: Path, overwrite: bool) -> None:
    """Move a finished folder to its place.

    Raises:
        ValueError: Something came there meanwhile.
    """
    for path in work.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    free(target, overwrite)
    aside = target.with_name(f".{uuid.uuid4().hex}.old")
    was_there = target.exists()
    if was_there:
        target.rename(aside)
    try:
        work.rename(target)
    except OSError:
        if was_there:
            aside.rename(target)
        raise
    if was_there:
        shutil.rmtree(aside, ignore_errors=True)
