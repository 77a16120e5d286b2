"""A seal says that a file was made by this user: a keyed hash, with a key that nobody else can read.

What is packed will be run as machine code. Hashes inside the file only tell that it is undamaged; whoever forges
the contents renews them too. So the list of contents carries an HMAC with a key of 32 random bytes, kept in the
user's configuration folder with mode 0600. To let another machine take the file, take the key along, or give both
the same `LIGHTNING_ACCEL_KEY`.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from lightning_accel.errors import AccelError

_VARIABLE = "LIGHTNING_ACCEL_KEY"
_NUM_BYTES = 32


def seal(content: bytes) -> str:
    """Return the seal of some content, making the user's key at the first time.

    Raises:
        AccelError: There is no key, and none can be made; or it is not the user's alone.

    >>> is_sealed(b"x", seal(b"x")), is_sealed(b"y", seal(b"x"))
    (True, False)
    """
    return hmac.new(_key(), content, hashlib.sha256).hexdigest()


def is_sealed(content: bytes, found: str) -> bool:
    """Tell whether a seal is that of this user for this content."""
    return hmac.compare_digest(seal(content).encode(), found.encode())


def key_file() -> Path:
    """Return where the key is kept."""
    folder = os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser()
    return Path(folder, "lightning_accel", "key")


def refuse_others(path: Path, *, alone: bool = False) -> None:
    """Raise unless this user owns a file or folder that is no link, and others cannot write to it.

    Args:
        path: The file or folder.
        alone: Whether nobody else may read it either.

    Raises:
        AccelError: So it is not.
    """
    found = path.lstat()
    mode = stat.S_IMODE(found.st_mode)
    wrong = ""
    if stat.S_ISLNK(found.st_mode):
        wrong = "it is a link"
    elif hasattr(os, "geteuid") and found.st_uid != os.geteuid():
        wrong = f"it belongs to the user {found.st_uid}"
    elif os.name == "posix" and mode & (0o077 if alone else 0o002):
        wrong = f"others may {'read' if alone else 'write to'} it, mode {mode:o}"
    if wrong:
        raise AccelError(
            f"{path} has to be your own, because what it holds decides which code is run",
            wrong,
            f"look at it, and then `rm {path}` or `chmod {'600' if alone else 'o-w'} {path}`",
        )


def _key() -> bytes:
    given = os.environ.get(_VARIABLE)
    if given:
        if len(given) < _NUM_BYTES:
            raise AccelError(
                f"`{_VARIABLE}` is too short to be a key",
                f"{len(given)} characters",
                f"set {_NUM_BYTES} or more that nobody can guess",
            )
        return given.encode()
    path = key_file()
    try:
        if not path.exists() and not path.is_symlink():
            _make(path)
        refuse_others(path, alone=True)
        key = path.read_bytes()
    except OSError as error:
        raise AccelError(
            "there is no place for the key that seals compile caches",
            str(error),
            f"set HOME or XDG_CONFIG_HOME to a folder of yours, or {_VARIABLE}",
        ) from error
    if len(key) < _NUM_BYTES:
        raise AccelError("the key is damaged", f"{len(key)} bytes in {path}", f"rm {path}")
    return key


def _make(path: Path) -> None:
    """Write a new key, whole or not at all; where two processes do so at once, one of them wins."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(file, "wb") as stream:
            stream.write(secrets.token_bytes(_NUM_BYTES))
        try:
            os.link(part, path)
        except FileExistsError:
            pass  # another process was first
        except OSError:  # a file system without links: the last one wins
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
