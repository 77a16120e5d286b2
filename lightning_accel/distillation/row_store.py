"""Fixed-size values under 128-bit keys in a SQLite file: many processes at once, bounded in size.

A store is a folder with one file of rows: the two halves of a key, and the value behind a keyed hash of
both. SQLite has the transactions, the index and the locks between processes: what a killed process left
half-written is rolled back by whoever comes next, and a full disk is an error. One query reads the rows of
a whole batch, each in the state of one moment.

Nothing is believed that does not prove itself: a value counts only where key and hash fit. What the disk
flipped and what another user put there (`seal`) is a miss, and is written again; a file that SQLite cannot
read is removed, and its rows are made anew. The file is read and written, never mapped: one that shrinks
beneath its reader would end the process.

When the space is used up, a new value replaces an old one, but only one in eight times: an epoch over more
rows than fit would otherwise push out each row shortly before its next use.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import sqlite3
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from lightning_accel.errors import explain
from lightning_accel.seal import own_folder, put, refuse_foreign

SCHEMA = 3
_NAME, _JOURNAL = "rows.sqlite", "rows.sqlite-journal"
_TABLE = """
CREATE TABLE IF NOT EXISTS answer (slot INTEGER PRIMARY KEY, first INTEGER, second INTEGER, value BLOB);
CREATE INDEX IF NOT EXISTS key ON answer (first);
"""
_HASH = 8
_PAGE = 8192
_SPARE = 4
"""Pages that a new row may need beyond its own: where it splits one of the table or of the index."""
_AT_ONCE = 500
"""Keys in one query; SQLite takes at least 999."""
_WAIT_S = 10.0
_REPLACE_ONE_IN = 8
_OF_THE_DISK = (
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_PERM,
)
"""What says nothing about the file itself; all else means that it is damaged."""
_FAILURES = (sqlite3.Error, UnicodeDecodeError)
"""The latter where SQLite quotes a damaged schema."""


class RowStore:
    """Values of `value_bytes` bytes under keys of 16 bytes, in `folder`.

    Args:
        folder: Made when it does not exist; one with another content is renamed, with a warning.
        value_bytes: Size of each value.
        max_bytes: What all stores below `counted_in` may take together, between two calls of `put`.
        about: What `meta.json` says besides; another text is another content.
        counted_in: A folder above, shared with other stores; `folder` itself when None.
        key: Who does not have it can write no value that is believed; up to 64 bytes.

    Raises:
        OSError: The folder cannot be made or used.

    >>> import tempfile
    >>> store = RowStore(tempfile.mkdtemp(), value_bytes=3, max_bytes=2**20)
    >>> keys = np.array([[1, 2], [3, 4]], np.uint64)
    >>> store.put(keys[:1], np.array([[7, 8, 9]], np.uint8))
    >>> found, values = store.get(keys)
    >>> found.tolist(), values[0].tolist()
    ([True, False], [7, 8, 9])
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        value_bytes: int,
        max_bytes: int,
        about: Mapping[str, Any] | None = None,
        counted_in: str | Path | None = None,
        key: bytes = b"",
    ) -> None:
        self._keyed = hashlib.blake2b(key=key, digest_size=_HASH)
        self.folder = Path(folder)
        self.value_bytes = value_bytes
        self.max_bytes = max_bytes
        self._counted_in = Path(counted_in or folder)
        self._pages_each = _SPARE + (_HASH + value_bytes) // (_PAGE - 4)
        self._path = self.folder / _NAME
        self._file: sqlite3.Connection | None = None
        self._process = 0
        self._random = random.Random(os.getpid())  # of its own: the user's state is not ours
        _claim(self.folder, {"schema": SCHEMA, "value_bytes": value_bytes, **(about or {})})
        self._refuse_foreign()

    def get(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Look up keys, uint64 (n, 2): which were found, bool (n,), and values, uint8 (n, value_bytes).

        The values of keys that were not found are undefined.

        Raises:
            OSError: The file cannot be read, or is not this user's.
        """
        found = np.zeros(len(keys), bool)
        values = np.empty((len(keys), self.value_bytes), np.uint8)
        pairs = _pairs(keys)
        try:
            file = self._opened(make=False)
            known = {} if file is None else _entries(file, pairs)
        except _FAILURES as error:
            self._recover(error)
            return found, values
        raw, size = keys.astype("<u8").tobytes(), _HASH + self.value_bytes
        rows, proven = [], []
        for row, pair in enumerate(pairs):
            entry = known.get(pair)
            key = raw[16 * row : 16 * row + 16]
            if (
                type(entry) is bytes
                and len(entry) == size
                and entry.startswith(self._hash(key, entry[_HASH:]))
            ):
                rows.append(row)
                proven.append(entry)
        if rows:
            entries = np.frombuffer(b"".join(proven), np.uint8).reshape(len(rows), -1)
            found[rows], values[rows] = True, entries[:, _HASH:]
        return found, values

    def put(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Keep values, uint8 (n, value_bytes), under different keys, uint64 (n, 2): all of them or none.

        Raises:
            OSError: The disk is full, or the folder cannot be written.
        """
        raw = keys.astype("<u8").tobytes()
        rows = {}
        for row, pair in enumerate(_pairs(keys)):
            value = values[row].tobytes()
            rows[pair] = self._hash(raw[16 * row : 16 * row + 16], value) + value
        with _locked(self._counted_in):
            try:
                self._put(rows)
            except _FAILURES as error:
                self._recover(error)
                try:
                    self._put(rows)  # into a new file
                except _FAILURES as again:
                    raise _as_os_error(again, self._path) from again

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _put(self, rows: dict[tuple[int, int], bytes]) -> None:
        """Write rows in one transaction: over what is there under their keys, else where there is room."""
        room = self._pages()
        if room is None:
            return
        file = self._opened(make=True)
        assert file is not None
        with _transaction(file):
            left = dict(rows)
            for first, second, slot in list(_rows(file, "slot", list(rows))):
                pair = first, second
                if pair in rows:
                    file.execute("UPDATE answer SET value = ? WHERE slot = ?", (rows[pair], slot))
                    left.pop(pair, None)
            most = file.execute("SELECT coalesce(max(slot), 0) FROM answer").fetchone()[0]
            fit, replaced = 0, False
            for (first, second), entry in left.items():
                fit = fit - 1 if fit > 0 else (room - _in_use(file)) // self._pages_each - 1
                if fit >= 0:
                    most += 1
                    file.execute(
                        "INSERT INTO answer VALUES (?, ?, ?, ?)", (most, first, second, entry)
                    )
                    continue
                replaced = True
                if most and self._random.randrange(_REPLACE_ONE_IN) == 0:
                    row = first, second, entry, self._random.randint(1, most)
                    file.execute(
                        "UPDATE answer SET first = ?, second = ?, value = ? WHERE slot = ?", row
                    )
            if not (replaced or rows.items() <= _entries(file, list(rows)).items()):
                raise sqlite3.DatabaseError("the file gives back something else than was written")

    def _pages(self) -> int | None:
        """Return how many pages the file may have; None where there is none and none would fit."""
        own = bytes_in(self.folder)
        spare = self.max_bytes - (bytes_in(self._counted_in) - own)
        fewest = 3 + self._pages_each  # the schema, the table and the index
        return spare // _PAGE if own or spare // _PAGE >= fewest else None

    def _opened(self, *, make: bool) -> sqlite3.Connection | None:
        if self._process != os.getpid():  # a connection must not be used across a fork
            self._file, self._process = None, os.getpid()
        if self._file is None and (make or os.path.lexists(self._path)):
            self._refuse_foreign()
            file = sqlite3.connect(
                self._path, timeout=_WAIT_S, isolation_level=None, check_same_thread=False
            )
            try:
                file.text_factory = bytes
                for setting in (
                    "trusted_schema = OFF",
                    "cell_size_check = ON",
                    "mmap_size = 0",
                    f"page_size = {_PAGE}",
                    "journal_mode = TRUNCATE",
                    "synchronous = OFF",  # what a crash of the machine leaves is proved like all else
                    "cache_size = -16384",
                ):
                    file.execute(f"PRAGMA {setting}").fetchall()
                self._refuse_foreign()  # once more, before anything is written
                if make:
                    file.executescript(f"BEGIN IMMEDIATE; {_TABLE} COMMIT;")
            except BaseException:
                file.close()
                raise
            self._file = file
        return self._file

    def _recover(self, error: Exception) -> None:
        """Let go of the file, and remove it where it is damaged.

        Raises:
            OSError: It is no fault of the file.
        """
        self.close()
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
        if (
            code == sqlite3.SQLITE_READONLY_DBMOVED
        ):  # another process removed it, and may have a new one
            return
        if code & 0xFF in _OF_THE_DISK:
            raise _as_os_error(error, self._path) from error
        self._refuse_foreign()
        for name in (_NAME, _JOURNAL):
            (self.folder / name).unlink(missing_ok=True)

    def _refuse_foreign(self) -> None:
        """Raise where a file is a link or another user's; SQLite would follow, and nothing may be opened
        here: to close a second descriptor of a file gives up all of a process's locks on it."""
        for name in (_NAME, _JOURNAL):
            refuse_foreign(self.folder / name)

    def _hash(self, key: bytes, value: bytes) -> bytes:
        """Return what proves a value."""
        seal = self._keyed.copy()
        seal.update(key + value)
        return seal.digest()


def bytes_in(folder: Path) -> int:
    """Return the bytes of all stores below `folder`.

    >>> bytes_in(Path("/does/not/exist"))
    0
    """
    total = 0
    for top, _, names in os.walk(folder):
        for name in names:
            if name in (_NAME, _JOURNAL):
                with suppress(FileNotFoundError):  # removed by another process in this moment
                    total += os.lstat(os.path.join(top, name)).st_size
    return total


def _pairs(keys: np.ndarray) -> list[tuple[int, int]]:
    """Return keys as SQLite has them, with a sign."""
    return [(first, second) for first, second in np.ascontiguousarray(keys).view(np.int64).tolist()]


def _entries(
    file: sqlite3.Connection, pairs: list[tuple[int, int]]
) -> dict[tuple[int, int], bytes]:
    """Return what is there under these keys, and perhaps under others with the same first half."""
    return {(first, second): entry for first, second, entry in _rows(file, "value", pairs)}


def _rows(
    file: sqlite3.Connection, column: str, pairs: list[tuple[int, int]]
) -> Iterator[tuple[int, int, Any]]:
    for start in range(0, len(pairs), _AT_ONCE):
        firsts = [first for first, _ in pairs[start : start + _AT_ONCE]]
        marks = ",".join("?" * len(firsts))
        query = f"SELECT first, second, {column} FROM answer WHERE first IN ({marks})"
        yield from file.execute(query, firsts)


def _in_use(file: sqlite3.Connection) -> int:
    """Return the pages that hold something."""
    query = "SELECT page_count - freelist_count FROM pragma_page_count, pragma_freelist_count"
    return int(file.execute(query).fetchone()[0])


@contextmanager
def _transaction(file: sqlite3.Connection) -> Iterator[None]:
    file.execute("BEGIN IMMEDIATE")
    try:
        yield
        file.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            if file.in_transaction:
                file.execute("ROLLBACK")
        raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time add to the stores below a folder, so that their sizes add up."""
    import fcntl  # there is none on Windows

    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # some network file systems have no locks for folders
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _as_os_error(error: Exception, path: Path) -> OSError:
    full = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
    number = errno.ENOSPC if full else errno.EIO
    return OSError(number, f"{os.strerror(number)} ({error})", str(path))


def _claim(folder: Path, meta: Mapping[str, Any]) -> None:
    """Make the folder with its `meta.json`, or see that it has the same; set another one aside."""
    if os.name != "posix":
        raise OSError(
            explain("a store needs POSIX files", os.name, "use Linux, WSL or macOS, or no cache")
        )
    path = folder / "meta.json"
    text = json.dumps(meta, indent=1, sort_keys=True)
    own_folder(folder)
    try:
        present = path.read_bytes()
    except FileNotFoundError:
        present = b""
    if present and present != text.encode():
        aside = folder.with_name(f"{folder.name}.aside-{uuid.uuid4().hex[:8]}")
        os.rename(folder, aside)
        warnings.warn(
            explain(
                f"{path} does not describe this cache, so it was not used",
                "it is damaged, or another version wrote it",
                f"delete {aside} when nothing in it is needed",
            ),
            stacklevel=2,
        )
        own_folder(folder)
    if present != text.encode():
        put(path, text.encode())
