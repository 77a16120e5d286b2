"""What proves that a file is this user's own: a key that nobody else reads, and who owns the file.

Caches lie where others may write: /tmp, a shared scratch disk. What they hold is believed, or even run as machine
code, and hashes inside a file only tell that it is undamaged: whoever forges the contents renews them too. So what
this package keeps between runs carries a keyed hash (BLAKE2, RFC 7693). The key, 32 random bytes, is made once for
each user in a file of mode 0600 in the configuration folder; where homes do not last, as in containers, or to let
another machine take a file, `LIGHTNING_ACCEL_KEY` gives it. Files are opened, replaced and removed only where they are
regular ones of this user's, and never through a link.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import os
import secrets
import stat
import uuid
from pathlib import Path

from lightning_accel.errors import AccelError, explain
from lightning_accel.places import written_whole

VARIABLE = "LIGHTNING_ACCEL_KEY"
_NUM_BYTES = 32


def key_file() -> Path:
    """Return where the key is kept."""
    folder = os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser()
    return Path(folder, "lightning_accel", "key")


def secret() -> bytes:
    """Return this user's key, made where there is none yet.

    Raises:
        AccelError: There is no place for a key; or it is too short, a link, another user's, or others can read it.
    """
    given = os.environ.get(VARIABLE)
    if given:
        if len(given) < _NUM_BYTES:
            raise AccelError(
                f"`{VARIABLE}` is too short to be a key",
                f"{len(given)} characters",
                f"set {_NUM_BYTES} or more that nobody can guess",
            )
        return hashlib.blake2b(given.encode(), digest_size=_NUM_BYTES).digest()
    path = key_file()
    try:
        if not os.path.lexists(path):
            _make_key(path)
        file = open_own(path, os.O_RDONLY)
        try:
            readable, key = os.fstat(file).st_mode & 0o077, os.read(file, _NUM_BYTES)
        finally:
            os.close(file)
    except OSError as error:
        raise AccelError(
            "there is no key of yours to seal caches with",
            str(error),
            f"set HOME or XDG_CONFIG_HOME to a folder of yours, or {VARIABLE}",
        ) from error
    if readable:
        raise AccelError(
            f"{path} is not to be trusted",
            "others can read it",
            f"delete it, or `chmod 600 {path}`",
        )
    if len(key) != _NUM_BYTES:
        raise AccelError("the key is damaged", f"{len(key)} bytes in {path}", f"rm {path}")
    return key


def seal(content: bytes) -> str:
    """Return the seal of some content with this user's key.

    Raises:
        AccelError: As `secret`.

    >>> is_sealed(b"x", seal(b"x")), is_sealed(b"y", seal(b"x"))
    (True, False)
    """
    return sealed(secret(), content).hex()


def is_sealed(content: bytes, found: str) -> bool:
    """Tell whether a seal is that of this user for this content."""
    return hmac.compare_digest(seal(content).encode(), found.encode())


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
    try:
        _refuse(path, os.fstat(file))
    except OSError:
        os.close(file)
        raise
    return file


def refuse_foreign(path: Path) -> None:
    """Raise unless nothing is there, or a regular file of this user's; the file is not opened.

    Raises:
        OSError: It is a link, a device, or another user's.
    """
    try:
        about = os.lstat(path)
    except FileNotFoundError:
        return
    if stat.S_ISLNK(about.st_mode):
        raise _not_own(path, "a link", "delete it, or give the cache another folder")
    _refuse(path, about)


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
    with written_whole(path) as part:
        part.write_bytes(data)


def refuse_others(path: Path, *, alone: bool = False) -> None:
    """Raise unless this user owns a file or folder that is no link, and others cannot write to it.

    Args:
        path: The file or folder.
        alone: Whether nobody else may read it either.

    Raises:
        AccelError: So it is not.
    """
    mode, wrong = stat.S_IMODE(path.lstat().st_mode), ""
    if path.is_symlink():
        wrong = "it is a link"
    elif not is_own(path):
        wrong = f"it belongs to the user {path.lstat().st_uid}"
    elif os.name == "posix" and mode & (0o077 if alone else 0o002):
        wrong = f"others may {'read' if alone else 'write to'} it, mode {mode:o}"
    if wrong:
        raise AccelError(
            f"{path} has to be your own, because what it holds decides which code is run",
            wrong,
            f"look at it, and then `rm {path}` or `chmod {'600' if alone else 'o-w'} {path}`",
        )


def _make_key(path: Path) -> None:
    """Write a new key, whole or not at all; where two processes do so at once, one of them wins."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    _write_new(part, secrets.token_bytes(_NUM_BYTES), 0o600)
    try:
        os.link(part, path)
    except FileExistsError:
        pass  # another process was first
    except OSError:  # a file system without links: the last one wins
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _write_new(path: Path, data: bytes, mode: int) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        os.write(file, data)
    finally:
        os.close(file)


def _refuse(path: str | Path, about: os.stat_result) -> None:
    if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid():
        found = "another user's" if stat.S_ISREG(about.st_mode) else "no regular file"
        raise _not_own(path, found, "give the cache a folder of your own")


def _not_own(path: str | Path, found: str, do: str) -> OSError:
    return PermissionError(explain(f"{path} is not to be trusted", found, do))
