"""What lies in a bundle, and the proof that it still does, before anything of it is loaded.

`torch.export.load` falls back to an unsafe pickle on a damaged file, an AOTInductor package holds machine code, and
neither notices a flipped bit. So the manifest has size and SHA-256 of each file, and `read` compares them first; a file
that is not listed, a link, or a name that leads out of the folder is refused. Hashes tell that a bundle is undamaged,
not whose it is: who can write to the folder can write a manifest too, and only a signature tells (`signature.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import stat
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lightning_accel.errors import AccelError
from lightning_accel.export import signature
from lightning_accel.export.backends import FORMATS
from lightning_accel.export.schema import Schema

NAME = "manifest.json"
SCHEMA = 1
_LARGEST = 16 * 2**20
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_HASH = re.compile(r"[0-9a-f]{64}")
_KEYS = (
    "schema",
    "format",
    "formats",
    "faster",
    "files",
    "signature",
    "candidates",
    "host",
    "notes",
)
_FLAGS = re.compile(r"avx|amx|fma|f16c|bmi|sse|neon|asimd|sve|bf16|fphp")


class BadBundle(AccelError):
    """A bundle is damaged, incomplete, or something else; nothing of it was loaded."""


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest of a folder, with the hashes of all files that lie there now."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": _hash(path)}
        for path in sorted(folder.iterdir())
    }
    text = json.dumps({"schema": SCHEMA, **content, "files": files}, indent=2, allow_nan=False)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")


def read(folder: Path, key: Any = None) -> dict[str, Any]:
    """Return the manifest of a folder, after all that it says of the files was found to be so.

    Args:
        folder: Where it lies.
        key: A public key that it has to be signed for, or `None`.

    Raises:
        FileNotFoundError: There is no such folder.
        BadBundle: There is no manifest, it cannot be read, or the files are not those that it lists.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no bundle at {folder}. Do: pass the folder that `deploy` wrote."
        )
    content = _parsed(folder, key)
    listed = _listed(folder, content)
    present = {path.name for path in folder.iterdir()} - {NAME, signature.NAME}
    if present - set(listed):
        raise _bad(folder, "a file that the manifest does not list", min(present - set(listed)))
    if set(listed) - present:
        raise _bad(folder, "a file is missing", min(set(listed) - present))
    for name, about in listed.items():
        path = folder / name
        _check_regular(folder, path)
        size = path.stat().st_size
        if size != about["size"]:
            raise _bad(
                folder, f"`{name}` has another size", f"{size} bytes instead of {about['size']}"
            )
        if _hash(path) != about["sha256"]:
            raise _bad(folder, f"`{name}` is not what it was", "another SHA-256")
    return content


def host() -> dict[str, Any]:
    """Return what machine code depends on: the processor as torch sees it, its flags, and the releases."""
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "flags": sorted(flag for flag in _cpu_flags() if _FLAGS.search(flag)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "onnx", "onnxruntime", "lightning-accel")},
    }


def foreign(recorded: Mapping[str, Any]) -> str:
    """Return why machine code from a host cannot run on this one, or nothing."""
    here = host()
    for key in ("machine", "system", "capability", "torch"):
        if recorded.get(key) != here[key]:
            return f"{key} {here[key]} here, {recorded.get(key)} there"
    lacking = sorted(set(recorded.get("flags") or ()) - set(here["flags"]))
    return f"the processor here lacks {', '.join(lacking[:4])}" if lacking else ""


def _parsed(folder: Path, key: Any) -> dict[str, Any]:
    path = folder / NAME
    if not os.path.lexists(path):
        raise _bad(folder, "there is no manifest", "no manifest.json")
    _check_regular(folder, path)
    if path.stat().st_size > _LARGEST:
        raise _bad(folder, "the manifest is too large", f"{path.stat().st_size} bytes")
    given = path.read_bytes()
    if key is not None:
        _check_signature(folder, given, key)
    try:
        content = json.loads(given.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _bad(folder, "the manifest cannot be read", str(error)[:120]) from error
    if not isinstance(content, dict):
        raise _bad(folder, "the manifest is no object", type(content).__name__)
    if content.get("schema") != SCHEMA or type(content["schema"]) is not int:
        found = f"version {content.get('schema')!r} instead of {SCHEMA}"
        raise BadBundle(
            "the bundle has another form than this release reads",
            found,
            "load it with the release that made it",
        )
    _check_form(folder, content)
    return content


def _check_signature(folder: Path, given: bytes, key: Any) -> None:
    path = folder / signature.NAME
    if not os.path.lexists(path):
        raise _bad(folder, "the bundle is not signed", f"no {signature.NAME}")
    _check_regular(folder, path)
    if path.stat().st_size != signature.LENGTH:
        raise _bad(folder, "the signature cannot be read", f"{path.stat().st_size} bytes")
    reason = signature.why_not(given, path.read_bytes(), key)
    if reason:
        raise _bad(folder, "the signature is not that of the key that was passed", reason)


def _check_form(folder: Path, content: dict[str, Any]) -> None:
    missing = [key for key in _KEYS if key not in content]
    if missing:
        raise _bad(folder, "the manifest is incomplete", f"no `{missing[0]}`")
    formats, notes = content["formats"], content["notes"]
    sound = (
        isinstance(formats, dict)
        and bool(formats)
        and all(known in FORMATS and isinstance(file, str) for known, file in formats.items())
        and content["format"] in formats
        and isinstance(content["faster"], bool)
        and isinstance(content["host"], dict)
        and isinstance(notes, list)
        and all(isinstance(note, str) for note in notes)
        and isinstance(content["candidates"], list)
        and all(isinstance(row, dict) for row in content["candidates"])
        and isinstance(content["files"], dict)
        and set(formats.values()) <= set(content["files"])
    )
    if not sound:
        raise _bad(
            folder, "the manifest is malformed", "entries of another kind than `deploy` writes"
        )
    try:
        Schema.from_dict(content["signature"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _bad(folder, "the manifest is malformed", f"signature: {error}") from error


def _listed(folder: Path, content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    files: dict[str, dict[str, Any]] = content["files"]
    for name, about in files.items():
        if not _FILE.fullmatch(name) or name in (NAME, signature.NAME):
            raise _bad(folder, "the manifest lists what cannot lie in the folder", repr(name)[:120])
        sound = isinstance(about, dict) and type(about.get("size")) is int
        if (
            not sound
            or not isinstance(about.get("sha256"), str)
            or not _HASH.fullmatch(about["sha256"])
        ):
            raise _bad(folder, "the manifest is malformed", f"no size or SHA-256 of `{name}`")
    return files


def _check_regular(folder: Path, path: Path) -> None:
    if not stat.S_ISREG(path.lstat().st_mode):
        found = "a link" if path.is_symlink() else "no regular file"
        raise _bad(folder, f"`{path.name}` has to be a file", found)


def _bad(folder: Path, what: str, found: str) -> BadBundle:
    return BadBundle(
        f"{what}, and nothing of the bundle in {folder} was loaded",
        found,
        "deploy anew, or fetch an undamaged copy",
    )


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(package: str) -> str | None:
    try:
        return torch.__version__ if package == "torch" else version(package)
    except PackageNotFoundError:
        return None


def _cpu_flags() -> set[str]:
    """Return what the processor can do, where the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return set(found.group(1).split()) if found else set()
