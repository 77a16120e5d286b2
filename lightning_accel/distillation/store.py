"""Fixed-size values on disk under 128-bit keys: many processes at once, no locks, bounded in size.

A store is a folder of segments. A segment is one file: a header, an index of buckets, and the values.
A key belongs to one bucket of each segment (its first half modulo the buckets) and to any of the 1 to
32 slots in it. Each segment has twice the slots of the one before, so a look-up visits few.

    index entry (24 bytes): key (16) | keyed hash of key and value, never 0 (8)
    value:                  as many bytes as the store was made for, in the same slot

Nothing is believed that does not prove itself: a value counts only where key and hash fit. What a killed
process left half-written, what another one was just overwriting, what the disk flipped and what another
user put there (`seal`) is a miss, and is written again. That is why there are no locks. Readers use a read-only memory map; writers
use `pwrite` into space that was reserved when the segment was made, so a full disk is an `OSError`
where a write through the map would have been a SIGBUS. The value goes first and its index entry after.

When the space is used up, a new value replaces an old one in its bucket, but only one in eight times:
an epoch over more rows than fit would otherwise push out each row shortly before its next use.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import random
import struct
import time
import uuid
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lightning_accel.errors import explain
from lightning_accel.seal import is_own, open_own, own_folder, put

SCHEMA = 2
_MAGIC = b"accel-cache\0"
_HEADER = struct.Struct("<12sIQQQI")  # magic, schema, value bytes, buckets, ways; CRC-32 of those
_INDEX_AT = 4096
_ENTRY = 24
_WAYS = 32
_FIRST = 2**20
"""Bytes of the first segment, about; a bucket is not larger either, if it has four slots."""
_REPLACE_ONE_IN = 8
_ORPHAN_S = 3600.0
"""Age in seconds at which an unfinished segment was left by a process that died."""


class Store:
    """Values of `value_bytes` bytes under keys of 16 bytes, in `folder`.

    Args:
        folder: Made when it does not exist; one with another content is renamed, with a warning.
        value_bytes: Size of each value.
        max_bytes: What all segments below `counted_in` may take together.
        about: What `meta.json` says besides; another text is another content.
        counted_in: A folder above, shared with other stores; `folder` itself when None.
        key: Who does not have it can write no value that is believed; up to 64 bytes.

    Raises:
        OSError: The folder cannot be made or used.

    >>> import tempfile
    >>> store = Store(tempfile.mkdtemp(), value_bytes=3, max_bytes=2**20)
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
        self.key = key
        self.folder = Path(folder)
        self.value_bytes = value_bytes
        self.max_bytes = max_bytes
        self._counted_in = Path(counted_in or folder)
        self._segments: list[_Segment] = []
        self._random = random.Random(os.getpid())  # of its own: the user's state is not ours
        _claim(self.folder, {"schema": SCHEMA, "value_bytes": value_bytes, **(about or {})})
        _remove_orphans(self.folder)
        self._discover()

    def get(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Look up keys, uint64 (n, 2): which were found, bool (n,), and values, uint8 (n, value_bytes).

        The values of keys that were not found are undefined.
        """
        self._discover()
        found = np.zeros(len(keys), bool)
        values = np.empty((len(keys), self.value_bytes), np.uint8)
        left = np.arange(len(keys))
        for segment in reversed(self._segments):
            if not left.size:
                break
            hits, got = segment.read(keys[left])
            found[left[hits]] = True
            values[left[hits]] = got
            left = left[~found[left]]
        return found, values

    def put(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Keep values, uint8 (n, value_bytes), under different keys, uint64 (n, 2).

        Raises:
            OSError: The disk is full, or the folder cannot be written.
        """
        self._discover()
        left = np.arange(len(keys))
        number = 0
        while left.size and (number < len(self._segments) or self._grow()):
            segment = self._segments[number]
            left = left[~segment.insert(keys[left], values[left])]
            number += 1
        for row in left:
            if self._segments and self._random.randrange(_REPLACE_ONE_IN) == 0:
                self._replace(keys[row], values[row])

    def close(self) -> None:
        """Let go of all files."""
        for segment in self._segments:
            segment.close()
        self._segments.clear()

    def _replace(self, key: np.ndarray, value: np.ndarray) -> None:
        """Write over any value of the key's bucket, in a segment chosen by its share of all slots."""
        sizes = [segment.slots for segment in self._segments]
        segment = self._random.choices(self._segments, sizes)[0]
        bucket = int(key[0] % np.uint64(segment.buckets))
        segment.write(bucket * segment.ways + self._random.randrange(segment.ways), key, value)

    def _discover(self) -> None:
        """Take up the segments that exist by now, made by this process or by another one."""
        while True:
            path = self.folder / _name(len(self._segments))
            try:
                self._segments.append(_Segment(path, self.value_bytes, self.key))
            except FileNotFoundError:
                return
            except _Damaged:
                path.unlink(missing_ok=True)  # what it held is lost; its place is made anew

    def _grow(self) -> bool:
        """Make the next segment, unless the space is used up; False where there is none."""
        before = len(self._segments)
        buckets, ways = self._next_size()
        if not buckets:
            return False
        part = self.folder / f".{uuid.uuid4().hex}.part"
        size = _INDEX_AT + buckets * ways * (_ENTRY + self.value_bytes)
        try:
            _make(part, size, _header(self.value_bytes, buckets, ways))
            if bytes_in(self._counted_in) > self.max_bytes:
                return False  # other processes grew in this moment as well
            _publish(part, self.folder / _name(before))
        finally:
            part.unlink(missing_ok=True)
        self._discover()
        return len(self._segments) > before

    def _next_size(self) -> tuple[int, int]:
        """Return the buckets of the next segment and the slots of each; no bucket: it does not fit."""
        slot = _ENTRY + self.value_bytes
        spare = self.max_bytes - bytes_in(self._counted_in) - _INDEX_AT
        ways = min(_WAYS, max(4, _FIRST // slot))
        first = max(1, _FIRST // (ways * slot))
        buckets = min(first << len(self._segments), max(spare, 0) // (ways * slot))
        if not self._segments and not buckets:
            ways = max(spare, 0) // slot
            return int(ways > 0), ways
        return (buckets if not self._segments or buckets >= first else 0), ways


class _Damaged(Exception):
    """The header of a segment does not say what a segment of this store says."""


class _Segment:
    """One file, open for writing at places and mapped for reading."""

    def __init__(self, path: Path, value_bytes: int, key: bytes) -> None:
        self._key = key
        self._file = open_own(path, os.O_RDWR)
        try:
            self.buckets, self.ways = _read_header(self._file, value_bytes)
            self._map = mmap.mmap(self._file, 0, access=mmap.ACCESS_READ)
        except BaseException:
            os.close(self._file)
            raise
        self.slots = self.buckets * self.ways
        self._values_at = _INDEX_AT + self.slots * _ENTRY
        index = np.frombuffer(self._map, "<u8", self.slots * 3, _INDEX_AT)
        values = np.frombuffer(self._map, np.uint8, self.slots * value_bytes, self._values_at)
        self._index = index.reshape(self.buckets, self.ways, 3)
        self._values = values.reshape(self.slots, value_bytes)

    def read(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions in `keys` of those that are here, and their values."""
        buckets, entries = self._entries(keys)
        match = _same(entries, keys)
        rows = np.flatnonzero(match.any(1))
        ways = match[rows].argmax(1)
        values = self._values[buckets[rows] * self.ways + ways]  # a copy: checked, then used
        checks = entries[rows, ways, 2]
        proven = [
            int(check) == self._check(keys[row], value)
            for row, value, check in zip(rows, values, checks, strict=True)
        ]
        if all(proven):
            return rows, values
        return rows[proven], values[proven]

    def insert(self, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Write what finds its own or a free slot here; return which did, bool (n,)."""
        buckets, entries = self._entries(keys)
        own, free = _same(entries, keys), entries[:, :, 2] == 0
        placed = np.zeros(len(keys), bool)
        taken: set[int] = set()
        for row in np.flatnonzero(own.any(1) | free.any(1)):
            start = int(buckets[row]) * self.ways
            ways = np.flatnonzero(own[row] if own[row].any() else free[row]) + start
            slot = next((int(slot) for slot in ways if int(slot) not in taken), None)
            if slot is not None:
                taken.add(slot)
                self.write(slot, keys[row], values[row])
                placed[row] = True
        return placed

    def write(self, slot: int, key: np.ndarray, value: np.ndarray) -> None:
        """Write the value first and its entry after, so that a free slot is never half true."""
        value = np.ascontiguousarray(value)
        entry = np.array([key[0], key[1], self._check(key, value)], "<u8")
        _write(self._file, value.tobytes(), self._values_at + slot * len(value))
        _write(self._file, entry.tobytes(), _INDEX_AT + slot * _ENTRY)

    def close(self) -> None:
        del self._index, self._values  # they hold the map open
        self._map.close()
        os.close(self._file)

    def _check(self, key: np.ndarray, value: np.ndarray) -> int:
        """Return the last word of an entry: a keyed hash, whose lowest bit says that the entry is used."""
        seal = hashlib.blake2b(key.astype("<u8").tobytes(), key=self._key, digest_size=8)
        seal.update(value.data)
        return int.from_bytes(seal.digest(), "little") | 1

    def _entries(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        buckets = (keys[:, 0] % np.uint64(self.buckets)).astype(np.int64)
        return buckets, self._index[buckets]  # (n,), a copy of (n, ways, 3)


def bytes_in(folder: Path) -> int:
    """Return the bytes of all segments below `folder`, finished or not.

    >>> bytes_in(Path("/does/not/exist"))
    0
    """
    total = 0
    for top, _, names in os.walk(folder):
        for name in names:
            if name.endswith((".segment", ".part")):
                try:
                    total += os.lstat(os.path.join(top, name)).st_size
                except FileNotFoundError:
                    continue  # published or removed by another process in this moment
    return total


def _same(entries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    same = (entries[:, :, 0] == keys[:, None, 0]) & (entries[:, :, 1] == keys[:, None, 1])
    return same & (entries[:, :, 2] != 0)  # (n, ways)


def _name(number: int) -> str:
    return f"{number:03d}.segment"


def _header(value_bytes: int, buckets: int, ways: int) -> bytes:
    fields = _MAGIC, SCHEMA, value_bytes, buckets, ways
    return _HEADER.pack(*fields, zlib.crc32(_HEADER.pack(*fields, 0)))


def _read_header(file: int, value_bytes: int) -> tuple[int, int]:
    """Return buckets and ways of an open segment whose header and length say what they must."""
    head = os.pread(file, _HEADER.size, 0)
    if len(head) < _HEADER.size:
        raise _Damaged
    buckets, ways = _HEADER.unpack(head)[3:5]
    size = _INDEX_AT + buckets * ways * (_ENTRY + value_bytes)
    fits = buckets and ways and os.fstat(file).st_size == size
    if not fits or head != _header(value_bytes, buckets, ways):
        raise _Damaged
    return buckets, ways


def _make(path: Path, size: int, head: bytes) -> None:
    """Make a file of `size` zero bytes that are reserved on the disk, and write its header."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
        else:  # macOS: nothing reserves but writing
            for start in range(0, size, _FIRST):
                _write(file, bytes(min(_FIRST, size - start)), start)
        _write(file, head, 0)
    finally:
        os.close(file)


def _publish(part: Path, path: Path) -> None:
    """Give a finished file its name, unless another process was first."""
    try:
        os.link(part, path)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        os.replace(part, path)  # no links here: the last one wins, the first loses cached rows


def _write(file: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, at)
        if not count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        view, at = view[count:], at + count


def _claim(folder: Path, meta: Mapping[str, Any]) -> None:
    """Make the folder with its `meta.json`, or see that it has the same; set another one aside."""
    if not hasattr(os, "pwrite"):
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


def _remove_orphans(folder: Path) -> None:
    for part in folder.glob(".*.part"):
        try:
            if is_own(part) and time.time() - part.lstat().st_mtime > _ORPHAN_S:
                part.unlink()
        except FileNotFoundError:
            continue  # another process published or removed it in this moment
