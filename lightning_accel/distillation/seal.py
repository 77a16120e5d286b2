"""What proves that a file in a cache is one's own: a key that nobody else reads, and who owns the file.

A cache may lie where others can write: /tmp, a shared scratch disk. So every value on disk carries a keyed hash
(BLAKE2, RFC 7693), and what another user put there is a miss. The key is made once for each user, in a file of mode
0600; where homes do not last, as in containers, `LIGHTNING_ACCEL_CACHE_KEY` gives it. Files are opened, replaced and
removed only where they are regular ones of this user's, and never through a link.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
import uuid
from pathlib import Path

from lightning_accel.errors import explain

VARIABLE = "LIGHTNING_ACCEL_CACHE_KEY"
_BYTES = 32


def secret() -> bytes:
    """Return this user's key, made where there is none yet.

    Raises:
        OSError: The file of the key is a link, is another user's, or can be read by others.
    """
    given = os.environ.get(VARIABLE)
    if given:
        return hashlib.blake2b(given.encode(), digest_size=_BYTES).digest()
    home = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    path = Path(home).expanduser() / "lightning_accel" / "cache.key"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not os.path.lexists(path):
        part = path.with_name(f".{uuid.uuid4().hex}.part")
        _write_new(part, secrets.token_bytes(_BYTES), 0o600)
        with contextlib.suppress(FileExistsError):  # another process was first
            os.link(part, path)
        part.unlink()
    file = open_own(path, os.O_RDONLY)
    try:
        if os.fstat(file).st_mode & 0o077:
            raise _not_own(path, "others can read it", f"run `chmod 600 {path}`, or delete it")
        key = os.read(file, _BYTES)
    finally:
        os.close(file)
    if len(key) != _BYTES:
        raise _not_own(path, f"{len(key)} bytes", "delete it")
    return key


def sealed(key: bytes, *parts: bytes) -> bytes:
    """Return 32 bytes that only who has the key can make of these texts.

    >>> sealed(b"key", b"ab", b"c") == sealed(b"key", b"a", b"bc")
    False
    """
    seal = hashlib.blake2b(key=key, digest_size=32)
    for part in parts:
        seal.update(len(part).to_bytes(8, "little") + part)
    return seal.digest()


def open_own(path: str | Path, flags: int) -> int:
    """Open a regular file of this user's, through no link.

    Raises:
        FileNotFoundError: There is none.
        OSError: It is a link, a device, or another user's.
    """
    try:
        file = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise _not_own(path, "a link", "delete it, or give the cache another folder") from None
        raise
    about = os.fstat(file)
    if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid():
        os.close(file)
        found = "another user's" if stat.S_ISREG(about.st_mode) else "no regular file"
        raise _not_own(path, found, "give the cache a folder of your own")
    return file


def own_folder(path: Path) -> Path:
    """Return a folder of this user's, made where there is none.

    Raises:
        OSError: It is a link, or another user's.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir(parents=True, mode=0o700)
    if not is_own(path) or not path.is_dir():
        found = "a link" if path.is_symlink() else "another user's, or no folder"
        raise _not_own(path, found, "give the cache a folder of your own")
    return path


def is_own(path: Path) -> bool:
    """Tell whether something is there, is this user's, and is no link."""
    try:
        about = os.lstat(path)
    except FileNotFoundError:
        return False
    return about.st_uid == os.geteuid() and not stat.S_ISLNK(about.st_mode)


def put(path: Path, data: bytes) -> None:
    """Write a file whole: a part of it under another name first, which then takes the place of what was there."""
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        _write_new(part, data, 0o666)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _write_new(path: Path, data: bytes, mode: int) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        os.write(file, data)
    finally:
        os.close(file)


def _not_own(path: str | Path, found: str, do: str) -> OSError:
    return PermissionError(explain(f"{path} is not to be trusted", found, do))
