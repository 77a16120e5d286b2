"""The compile cache of one training as one file: packed beside the checkpoint, unpacked before the next start.

Inductor keeps what it compiled in a temporary directory, which a new container does not have.
PyTorch's portable form of it, `torch.compiler.save_cache_artifacts`, leaves the C++ kernels out, so that on
a CPU most of the work is done again: 23.6 of 34.2 CPU seconds on a twelve-layer GPT, against 4.0 with the
directory. So the file holds both: the directory of inductor, with the kernels of Triton, and the artifacts,
which add what was learned by autotuning.

Kernels are machine code for one kind of processor. The file carries a key (versions of torch, Python, CUDA,
Triton and the C++ compiler, abilities of the CPU, names of the GPUs); under another key nothing is taken.
Contents are checked against hashes, and the list of these against a seal with the user's own key (`seal.py`): a
damaged file is a miss, and so is one that somebody else has made.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch

from lightning_accel.errors import AccelError, NoEffect, explain
from lightning_accel.places import written_whole
from lightning_accel.seal import is_sealed, key_file, refuse_others, seal

_FORMAT = 3  # 1 could hold values of attributes that had changed since, 1 and 2 have no seal
_MANIFEST, _SEAL, _ARTIFACTS, _FILES = "manifest.json", "seal.txt", "artifacts.bin", "files/"
_FIRST = b"PK\x03\x04"
_LEFT_OUT = (".lock", ".tmp", ".gch", ".pch")  # headers made ready are large and serve a cold start
_LIMIT_BYTES, _LONGEST_LIST = 2**31, 2**26
_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
_NAME = re.compile(r"[\w.+=,@%~-]+")
UNSEALED = "is not sealed with your key"
"""What the reason of `Unpacked` holds for a file that this user has not made."""


class Packed(NamedTuple):
    """What was written: how many files of the cache, and the bytes of the packed file."""

    num_files: int
    num_bytes: int


class Unpacked(NamedTuple):
    """What was restored; `reason` says why nothing was, and is empty otherwise."""

    num_files: int
    reason: str = ""


def pack(
    path: str | Path, directory: str | Path | None = None, *, limit_bytes: int = _LIMIT_BYTES
) -> Packed:
    """Write the compile cache into one file, in one go: readers see the old one or the new one.

    Everything in the directory goes in, so give each training a directory of its own (`cache_at`).

    Args:
        path: The file to write.
        directory: The cache; by default the one this process uses.
        limit_bytes: Of the cache, unpacked.

    Raises:
        NoEffect: There is nothing in the cache.
        AccelError: The cache is larger than `limit_bytes`, or `path` is a link or a file of another kind.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "cache").mkdir(), Path(folder, "cache", "ab.py").write_text("x = 1")
    ...     packed = pack(Path(folder, "compiled.zip"), Path(folder, "cache"))
    ...     packed.num_files, unpack(Path(folder, "compiled.zip"), Path(folder, "other"))
    (1, Unpacked(num_files=1, reason=''))
    """
    root = Path(directory) if directory is not None else _current()
    names = list(contents(root))
    if not names:
        raise NoEffect("there is no compile cache to pack", f"{root} is empty", "compile first")
    size = sum((root / name).stat().st_size for name in names)
    if size > limit_bytes:
        raise AccelError(
            "the compile cache is too large to be packed",
            f"{size} bytes in {root}",
            "raise `limit_bytes`, or start with an empty directory",
        )
    path = Path(path)
    _refuse_foreign(path)
    with written_whole(path, 0o600) as part, part.open("wb") as file:
        count = _write(file, root, names)
    return Packed(count, path.stat().st_size)


def unpack(
    path: str | Path, directory: str | Path | None = None, *, limit_bytes: int = _LIMIT_BYTES
) -> Unpacked:
    """Restore a packed compile cache; a file that is missing, damaged or made elsewhere is a miss.

    Files that are there already stay. Nothing is written outside of the directory, and nothing at all
    before every hash was checked.

    Args:
        path: The packed file. It holds code, so one that is not sealed with the user's key is not taken.
        directory: Where to; by default the cache this process uses.
        limit_bytes: The most that is unpacked.

    >>> unpack("nowhere.zip").reason
    'there is no file nowhere.zip'
    """
    path = Path(path)
    if path.is_symlink() or not path.is_file():
        return Unpacked(
            0, f"{'a link is not followed,' if path.is_symlink() else 'there is no file'} {path}"
        )
    root = Path(directory) if directory is not None else _current()
    root.mkdir(parents=True, exist_ok=True)
    try:
        refuse_others(root)
        with (
            tempfile.TemporaryDirectory(dir=root, prefix=".unpack-", suffix=".tmp") as stage,
            zipfile.ZipFile(path) as archive,
        ):
            manifest = _manifest(archive, limit_bytes)
            if different := _different(manifest["key"]):
                return Unpacked(0, f"{path} was made elsewhere: {different}")
            for name, entry in manifest["files"].items():
                _extract(archive, _FILES + name, entry, Path(stage, name))
            artifacts = manifest["artifacts"] and _read(archive, _ARTIFACTS, manifest["artifacts"])
            count = _move(Path(stage), root, manifest["files"])
    except AccelError as error:  # no key, or a folder of others; what compiles next goes on
        return Unpacked(0, str(error))
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        NotImplementedError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        return Unpacked(0, f"{path} is damaged ({type(error).__name__}: {error})")
    if artifacts:
        torch.compiler.load_cache_artifacts(artifacts)
    return Unpacked(count)


@contextmanager
def cache_at(directory: str | Path) -> Iterator[Path]:
    """Let this process keep its compile cache in `directory`; in the usual one again afterwards.

    >>> before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    >>> with tempfile.TemporaryDirectory() as folder, cache_at(folder) as used:
    ...     os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(used)
    True
    >>> os.environ.get("TORCHINDUCTOR_CACHE_DIR") == before
    True
    """
    root = Path(directory).resolve()
    before = {name: os.environ.get(name) for name in _VARIABLES}
    os.environ.update(zip(_VARIABLES, (str(root), str(root / "triton")), strict=True))
    try:
        yield root
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def contents(directory: str | Path) -> Iterator[str]:
    """Yield the files of a compile cache that are worth keeping, relative and in order.

    >>> list(contents("nowhere"))
    []
    """
    root = Path(directory)
    for path in sorted(root.rglob("*")):
        inner = path.relative_to(root)
        named = all(_NAME.fullmatch(part) and part[0] != "." for part in inner.parts)
        wanted = named and not path.name.endswith(_LEFT_OUT)
        if wanted and path.is_file() and not path.is_symlink():
            yield inner.as_posix()


@functools.cache
def key() -> dict[str, str]:
    """Return what decides whether compiled code of another process can be used in this one.

    >>> key()["torch"] == torch.__version__
    True
    """
    gpus = [
        f"{torch.cuda.get_device_name(i)} {torch.cuda.get_device_capability(i)}"
        for i in range(torch.cuda.device_count())
    ]
    return {
        "torch": torch.__version__,
        "git": str(torch.version.git_version),
        "python": f"{sys.implementation.cache_tag} {platform.system()} {platform.machine()}",
        "cpu": f"{torch.backends.cpu.get_cpu_capability()} {_cpu_flags()}",
        "compiler": _compiler(),
        "cuda": str(torch.version.cuda or torch.version.hip),
        "triton": _version("triton"),
        "gpus": ", ".join(sorted(set(gpus))) or "none",
    }


def check_path(path: str | Path | None) -> Path | None:
    """Return a path given as argument, or raise.

    >>> check_path("a.zip").name
    'a.zip'
    """
    if path is None:
        return None
    if not isinstance(path, (str, Path)) or not str(path).strip():
        raise TypeError(explain("`path` is a file", repr(path), "pass 'compiled.zip'"))
    return Path(path)


def file_name() -> str:
    """Return a name for the packed file with the key in it, so that machines do not fight over one.

    >>> file_name() == file_name()
    True
    """
    return f"compiled-{_hash(json.dumps(key(), sort_keys=True).encode())[:12]}.zip"


def _write(file: Any, root: Path, names: list[str]) -> int:
    entries: dict[str, list[Any]] = {}
    saved = torch.compiler.save_cache_artifacts()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in names:
            try:
                content = (root / name).read_bytes()
            except FileNotFoundError:  # a compile worker tidied up
                continue
            entries[name] = [len(content), _hash(content)]
            archive.writestr(_FILES + name, content)
        artifacts: list[Any] = []
        if saved is not None:
            artifacts = [len(saved[0]), _hash(saved[0])]
            archive.writestr(_ARTIFACTS, saved[0])
        manifest = {"format": _FORMAT, "key": key(), "files": entries, "artifacts": artifacts}
        listed = json.dumps(manifest).encode()
        archive.writestr(_MANIFEST, listed)
        archive.writestr(_SEAL, seal(listed))
    return len(entries)


def _manifest(archive: zipfile.ZipFile, limit_bytes: int) -> dict[str, Any]:
    """Read what the archive should hold, and refuse names and sizes that are not to be written."""
    if archive.getinfo(_MANIFEST).file_size > _LONGEST_LIST:
        raise ValueError("its list of files is too long")
    listed = archive.read(_MANIFEST)
    if not _is_own(archive, listed):
        raise AccelError(
            f"{archive.filename} {UNSEALED}, and so may hold anybody's code",
            "a file from another user, another machine or an older release",
            f"nothing, and a new one is packed; for one of your own from another machine copy {key_file()} "
            "from there, or give both machines the same LIGHTNING_ACCEL_KEY",
        )
    manifest = json.loads(listed)
    if manifest["format"] != _FORMAT:
        raise ValueError(f"format {manifest['format']!r} is unknown")
    for name in manifest["files"]:
        parts = PurePosixPath(name).parts
        plain = all(_NAME.fullmatch(part) and not part.startswith(".") for part in parts)
        if not parts or not plain or PurePosixPath(name).as_posix() != name:
            raise ValueError(f"the name {name!r} is not allowed")
    sizes = [size for size, _ in manifest["files"].values()] + manifest["artifacts"][:1]
    if any(type(size) is not int or size < 0 for size in sizes) or sum(sizes) > limit_bytes:
        raise ValueError(f"its contents are larger than {limit_bytes} bytes")
    return manifest


def _is_own(archive: zipfile.ZipFile, listed: bytes) -> bool:
    try:
        with archive.open(_SEAL) as file:
            found = file.read(100).decode("ascii")
    except KeyError:
        return False
    return is_sealed(listed, found)


def _refuse_foreign(path: Path) -> None:
    """Refuse to replace a file that no release of ours has packed."""
    if not path.is_symlink() and not path.exists():
        return
    start = b""
    if path.is_file() and not path.is_symlink():
        with path.open("rb") as file:
            start = file.read(40)
    if not start.startswith(_FIRST) or not start[30:].startswith(_FILES.encode()):
        raise AccelError(
            "a file that is no packed compile cache is not replaced",
            f"{'a link' if path.is_symlink() else 'something else'} at {path}",
            "name a file that is not there yet, or remove this one",
        )


def _read(archive: zipfile.ZipFile, name: str, entry: list[Any]) -> bytes:
    size, digest = entry
    with archive.open(name) as file:
        content = file.read(size + 1)
    if len(content) != size or _hash(content) != digest:
        raise ValueError(f"{name} is not what was packed")
    return content


def _extract(archive: zipfile.ZipFile, name: str, entry: list[Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_read(archive, name, entry))


def _move(stage: Path, root: Path, names: Any) -> int:
    """Move files to their places, each in one go; other processes may look at the same time."""
    for name in names:
        source, target = stage / name, root / name
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.name.startswith("__grp__"):
            _relocate(source, target.parent)
        os.replace(source, target)
    return len(names)


def _relocate(path: Path, folder: Path) -> None:
    """Let one of Triton's groups name its members where they are now; it holds absolute paths."""
    group = json.loads(path.read_bytes())
    members = group["child_paths"]
    group["child_paths"] = {n: str(folder / PurePosixPath(p).name) for n, p in members.items()}
    path.write_text(json.dumps(group))


def _different(other: dict[str, str]) -> str:
    return "; ".join(
        f"{name} {other.get(name)!r} there, {value!r} here"
        for name, value in key().items()
        if other.get(name) != value
    )


def _current() -> Path:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return Path(os.environ.get(_VARIABLES[0]) or default_cache_dir())


def _cpu_flags() -> str:
    """Return a digest of what the processor can do: kernels are compiled for all of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    found = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return _hash(" ".join(sorted(found.split())).encode())[:16]


def _compiler() -> str:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        name = shutil.which(get_cpp_compiler())
        asked = [name, "--version"] if name else None
        done = asked and subprocess.run(asked, capture_output=True, text=True, timeout=20)
    except (InvalidCxxCompiler, OSError, subprocess.SubprocessError):
        return "none"
    return done.stdout.partition("\n")[0] if done else "none"


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
