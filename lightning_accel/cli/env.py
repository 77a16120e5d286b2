"""`lightning-accel env`: this machine, the versions on it, and everything that does not fit together.

    lightning-accel env
    lightning-accel env --device cuda --json

Versions are read from the metadata of the installed packages, without importing them: importing the
two malicious releases of Lightning is what runs their payload. Torch alone is imported here;
torchvision and torch_xla, which may take the interpreter down, are tried in a process of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from lightning_accel import __version__
from lightning_accel.cli.terminal import answer
from lightning_accel.measure.table import Table

REQUIRED = ("torch", "lightning", "torchmetrics", "hydra-core", "torch-pruning", "wandb", "rich")
_OPTIONAL = (
    *("pytorch-lightning", "omegaconf", "torchvision", "torchao", "torch-xla", "torch-tpu"),
    *("triton", "numpy", "scikit-learn"),
)
_TRY_IMPORT = {"torchvision": "torchvision", "torch-xla": "torch_xla"}


class Mismatch(NamedTuple):
    """Something that does not fit; `breaks` when this package cannot work or be trusted with it."""

    breaks: bool
    what: str
    found: str
    do: str


class Facts(NamedTuple):
    """All that the checks look at, so that they can be tried on machines that are not there."""

    versions: Mapping[str, str | None]
    python: tuple[int, int] = (3, 11)
    import_errors: Mapping[str, str] = {}
    torch_build: str = "cpu"  # "cpu", "cuda" or "rocm"
    has_gpu: bool = False  # torch can use one
    has_nvidia_driver: bool = False
    has_compiler: bool = True
    num_threads: int = 1
    num_cores: int = 1
    load: float = 0.0


def add(commands: Any) -> None:
    """Add the command to an argparse sub-parser collection."""
    said = "describe this machine and what does not fit on it"
    parser = commands.add_parser(
        "env",
        help=said,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--device", help="device to describe; the accelerator or the CPU by default"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the description; 1 when something breaks, else 0."""
    from lightning_accel.hardware import describe

    try:
        device = describe(args.device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        print(f"lightning-accel env: no such device here: {args.device}. {reason}", file=sys.stderr)
        return 2
    facts = gather()
    found = mismatches(facts)
    plain = {
        "hardware": device.to_dict(),
        "versions": dict(facts.versions),
        "mismatches": [mismatch._asdict() for mismatch in found],
    }
    answer(args, json.dumps(plain, indent=2) if args.json else _text(plain, found))
    return int(any(mismatch.breaks for mismatch in found))


def gather() -> Facts:
    """Look at this machine."""
    import torch

    from lightning_accel.hardware import num_usable_cores

    versions = {"lightning-accel": __version__, "python": platform.python_version()}
    known = {name: _version(name) for name in (*REQUIRED, *_OPTIONAL)}
    known["torch"] = str(torch.__version__)  # with its build, which the metadata may leave out
    errors = {
        name: error
        for name, module in _TRY_IMPORT.items()
        if known[name] is not None and (error := _import_error(module))
    }
    build = "rocm" if torch.version.hip else "cuda" if torch.version.cuda else "cpu"
    return Facts(
        versions={**versions, **known},
        python=(sys.version_info.major, sys.version_info.minor),
        import_errors=errors,
        torch_build=build,
        has_gpu=torch.accelerator.is_available(),
        has_nvidia_driver=Path("/proc/driver/nvidia/version").exists(),
        has_compiler=_has_compiler(),
        num_threads=torch.get_num_threads(),
        num_cores=num_usable_cores(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
    )


def mismatches(facts: Facts) -> list[Mismatch]:
    """Return what does not fit together, the breaking ones first.

    >>> good = dict.fromkeys(REQUIRED, "14") | {"lightning": "2.6.6"}
    >>> [m.what for m in mismatches(Facts(good | {"lightning": "2.6.3"}))]
    ['lightning 2.6.3 is a malicious release that steals credentials when imported']
    """
    found = [mismatch for check in _CHECKS for mismatch in check(facts)]
    return sorted(found, key=lambda mismatch: not mismatch.breaks)


def _missing(facts: Facts) -> Iterator[Mismatch]:
    for name in REQUIRED:
        if facts.versions.get(name) is None:
            yield Mismatch(True, f"{name} is missing", "", f"pip install {name}")


def _lightning(facts: Facts) -> Iterator[Mismatch]:
    for name in ("lightning", "pytorch-lightning"):
        version = facts.versions.get(name)
        if version is None:
            continue
        remedy = f"pip install 'lightning==2.6.6' '{name}==2.6.6'"
        if _numbers(version)[:3] in ((2, 6, 2), (2, 6, 3)):
            what = f"{name} {version} is a malicious release that steals credentials when imported"
            yield Mismatch(True, what, "", f"do not import it; change your keys; {remedy}")
        elif _numbers(version) < (2, 6, 6):
            what = (
                f"{name} {version} runs code from a checkpoint's hyper-parameters (CVE-2026-58659)"
            )
            yield Mismatch(True, what, "", remedy)
    one, other = facts.versions.get("lightning"), facts.versions.get("pytorch-lightning")
    if one is not None and other is not None and one != other:
        what = "lightning and pytorch-lightning differ; objects of the two cannot be mixed"
        yield Mismatch(False, what, f"{one} and {other}", "use `lightning.pytorch` everywhere")
    if one is not None and _numbers(one) >= (2, 7):
        yield Mismatch(False, "this lightning is newer than any tested", one, "use lightning<2.7")


def _torch(facts: Facts) -> Iterator[Mismatch]:
    version = facts.versions.get("torch")
    if version is not None and _numbers(version) < (2, 10):
        what = "torch below 2.10 corrupts memory on a malicious checkpoint (CVE-2026-24747)"
        yield Mismatch(True, what, version, "pip install 'torch>=2.10'")
    if "torchvision" in facts.import_errors:
        what = "torchvision does not import beside this torch, and then lightning does not either"
        found = f"torchvision {facts.versions.get('torchvision')}, torch {version}"
        found += f": {facts.import_errors['torchvision']}"
        yield Mismatch(True, what, found, "install both from one index, or remove torchvision")


def _xla(facts: Facts) -> Iterator[Mismatch]:
    xla, version = facts.versions.get("torch-xla"), facts.versions.get("torch") or ""
    broken = facts.import_errors.get("torch-xla")
    if xla is not None and (broken or _numbers(xla)[:2] != _numbers(version)[:2]):
        what = "torch_xla does not match torch; Lightning would train on the CPU without a word"
        found = f"torch_xla {xla}, torch {version}" + (f": {broken}" if broken else "")
        yield Mismatch(True, what, found, "install the same minor version of both")
    if facts.versions.get("torch-tpu") is not None:
        what = "Lightning 2.6 does not know torch_tpu, and would train on the CPU"
        do = "say Trainer(accelerator='accel'), in a configuration accelerator=tpu"
        yield Mismatch(False, what, str(facts.versions["torch-tpu"]), do)


def _hydra(facts: Facts) -> Iterator[Mismatch]:
    version = facts.versions.get("hydra-core")
    if version is None:
        return
    if facts.python >= (3, 14) and _numbers(version) < (1, 4):
        what = "hydra below 1.4 fails in its argument parser on Python 3.14"
        yield Mismatch(True, what, version, "use Python 3.11 to 3.13, or hydra-core>=1.4")
    if _numbers(version) < (1, 3, 8):
        what = "hydra below 1.3.8 lets a config call more than it should (GHSA-37p2-j732-x8pj)"
        yield Mismatch(True, what, version, "pip install 'hydra-core>=1.3.8'")


def _small(facts: Facts) -> Iterator[Mismatch]:
    rich, wandb = facts.versions.get("rich"), facts.versions.get("wandb")
    if rich is not None and _numbers(rich) >= (15,):
        what = "Lightning's extras ask for rich below 15"
        yield Mismatch(
            False, what, rich, "nothing, unless pip complains: then `pip install 'rich<15'`"
        )
    if wandb is not None and _numbers(wandb) < (0, 24):
        yield Mismatch(False, "wandb below 0.24 refuses new API keys", wandb, "upgrade wandb")


def _devices(facts: Facts) -> Iterator[Mismatch]:
    build = f"torch {facts.versions.get('torch')}"
    if facts.torch_build != "cpu" and not facts.has_gpu:
        what = f"torch is built for {facts.torch_build} and finds no GPU; training runs on the CPU"
        yield Mismatch(False, what, build, "check the driver and CUDA_VISIBLE_DEVICES")
    if facts.torch_build == "cpu" and facts.has_nvidia_driver:
        what = "there is an NVIDIA driver and torch is built without CUDA"
        yield Mismatch(False, what, build, "install torch from the CUDA index")
    if not facts.has_compiler and not facts.has_gpu:
        what = "no C++ compiler or no Python.h, which compilation on a CPU needs"
        yield Mismatch(
            False, what, "", "install g++ and the Python headers, or leave BlockCompile out"
        )


def _cores(facts: Facts) -> Iterator[Mismatch]:
    threads, cores = facts.num_threads, facts.num_cores
    if threads > cores:
        what = "torch uses more threads than there are cores, which is slower than one thread"
        yield Mismatch(False, what, f"{threads} on {cores}", f"set OMP_NUM_THREADS={cores}")
    if facts.load > 0.5 * cores:
        what = "other work keeps the cores busy; measured times will be doubtful"
        found = f"load {facts.load:.1f} on {cores} cores"
        yield Mismatch(False, what, found, "wait, or measure with one thread")


_CHECKS: tuple[Callable[[Facts], Iterator[Mismatch]], ...] = (
    *(_missing, _lightning, _torch, _xla, _hydra, _small, _devices, _cores),
)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """Read the release number: "2.13.0+cpu" is (2, 13, 0)."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in release.group().split(".")) if release else ()


def _import_error(module: str) -> str:
    """Return the last line of what importing says in a process of its own, or nothing."""
    command = [sys.executable, "-c", f"import {module}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return "importing it took more than two minutes"
    if done.returncode == 0:
        return ""
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def _has_compiler() -> bool:
    candidates = (os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl")
    found = any(shutil.which(name) for name in candidates if name)
    headers = (sysconfig.get_path("include"), sysconfig.get_path("platinclude"))
    return found and any((Path(folder) / "Python.h").exists() for folder in headers)


def _text(plain: Mapping[str, Any], found: list[Mismatch]) -> str:
    device = plain["hardware"]
    shown = {**device, "memory_bytes": f"{device['memory_bytes'] / 2**30:.1f} GiB"}
    shown["fast_dtypes"] = ", ".join(device["fast_dtypes"]) or "none beside float32"
    shown["tensor_cores"] = "yes" if device["tensor_cores"] else "no"
    gains = ", ".join(f"{name} {gain:.2f}x" for name, gain in device["gains"].items())
    shown["gains"] = gains or "not timed"
    labels = {"memory_bytes": "memory", "num_cores": "cores", "fast_dtypes": "fast dtypes"}
    labels |= {"tensor_cores": "tensor cores", "gains": "products against float32"}
    rows: list[list[str | None]] = [[labels.get(key, key), str(shown[key])] for key in shown]
    rows += [[name, version or "-"] for name, version in plain["versions"].items()]
    text = Table(["", "found"], rows, "This machine").to_text()
    if not found:
        return f"{text}\n\nNothing that does not fit together."
    lines = [[("breaks" if m.breaks else "note"), m.what, m.found or None, m.do] for m in found]
    return f"{text}\n\n" + Table(["", "what", "found", "do"], lines, "What does not fit").to_text()
