"""Where files may be written that a configuration names: below the run's folder.

A path in Python is the user's own. One in yaml may be a stranger's, and `path: ../../.bashrc` is a path too. And
wherever it comes from, what is there already and was not written by this package stays as it is.
"""

from __future__ import annotations

import itertools
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def leads_elsewhere(text: str) -> bool:
    r"""Tell whether a text, taken as a path, would leave the folder that it starts in.

    >>> [leads_elsewhere(t) for t in ("runs/a.json", "val/acc", "../a", "/a", "~/a", r"a\..\..\b", "C:\\a")]
    [False, False, True, True, True, True, True]
    """
    parts = re.split(r"[/\\]", text)
    absolute = text.startswith(("/", "\\", "~")) or re.match(r"[A-Za-z]:[/\\]", text) is not None
    return (
        absolute
        or "\0" in text
        or text.startswith("file:")
        or any(p.strip() == ".." for p in parts)
    )


def free(path: Path, is_free: Callable[[Path], bool]) -> Path:
    """Return `path`, or the first numbered name beside it where writing replaces nothing but a file of ours.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "a.md").write_text("mine")
    ...     free(Path(folder, "a.md"), lambda path: not path.exists()).name
    'a-1.md'
    """
    names = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(1))
    return next(p for p in itertools.chain([path], names) if is_free(p))


def is_there(path: Path) -> bool:
    """Tell whether a name is taken, by a link that leads nowhere too."""
    return path.is_symlink() or path.exists()


def starts_with(path: Path, pattern: str) -> bool:
    """Tell whether a file, and no link, begins with a pattern."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with path.open(encoding="utf-8") as file:
            return re.match(pattern, file.read(1000), re.DOTALL) is not None
    except (OSError, UnicodeDecodeError):
        return False


def replace(target: Path, text: str) -> None:
    """Write a text as `written_whole` does."""
    with written_whole(target) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def written_whole(target: Path, mode: int = 0o666) -> Iterator[Path]:
    """Give an empty file beside `target`, which takes its place in one go if nothing is raised.

    Readers see the old file or the new one, also after the machine failed; a link is replaced, not followed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with written_whole(Path(folder) / "new" / "a.txt") as part:
    ...         _ = part.write_text("all of it")
    ...     [path.name for path in (Path(folder) / "new").iterdir()]
    ['a.txt']
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{uuid.uuid4().hex}.part")
    part.touch(mode, exist_ok=False)
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
