"""The house rules that a machine can see: floors, imports, unsafe calls, the list of files."""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lightning_accel"
FILES = sorted(p for p in PACKAGE.rglob("*.py") if "_hydra_plugins" not in p.parts)
YAMLS = sorted((ROOT / "conf").rglob("*.yaml"))

ADAPTERS = {
    "module.py",
    "fit_state.py",
    "sparse_training.py",
    "strategy_names.py",
    "trial_steps.py",
    "fit_workload.py",
    "around_steps.py",
    "data_order.py",
    "manual.py",
    "judge.py",
    "manual_steps.py",
    "dry_run.py",
    "around_tensor.py",
    "trial.py",
}
"""Files of a technique beside its rooms: a LightningModule of ours, what a callback knows of a fit, of a step by hand,
and what it tries on a copy before it."""
ROOMS = {"callbacks", "plugins", "strategies"}
"""Folders of a technique with what a Trainer takes, one class per file."""
BUILDS_ON = {("parallel", "pruning"), ("quantization", "pruning"), ("export", "quantization")}
"""Techniques that are made of another: a process of tensor parallelism has the network pruned to its own units, layers
are rounded by the same least squares that make up for a cut, and what is exported is what was quantized."""
FLOOR = {
    "surgery": 1,
    "measure": 1,
    "pages": 1,
    "bridge": 3,
    "devices": 4,
    "tuning": 4,
    "cli": 4,
}
"""Floors of the folders; every other folder is a technique on floor 2, its adapters on floor 3.
Tuning chooses among all techniques, and so stands above them."""
TOP = {name for name, floor in FLOOR.items() if floor == 4}
ROOFS = {"attach", "entry", "job", "recipe", "sweep", "unread"}
"""Single files on floor 4; the other single files are floor 0."""
LATE = (
    "torch_pruning",
    "dimod",
    "dwave",
    "torchao",
    "hydra",
    "omegaconf",
    "wandb",
    "cryptography",
    "onnx",
    "matplotlib",
    "torchvision",
)


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _floor(parts: tuple[str, ...]) -> int:
    """Return the floor of a module such as ("pruning", "callback"); () is the package itself."""
    if not parts:
        return 0
    folder = parts[0]
    if not (PACKAGE / folder).is_dir():
        return 4 if folder in ROOFS else 0
    if (f"{parts[-1]}.py" in ADAPTERS or ROOMS & set(parts[1:])) and folder not in TOP:
        return 3
    return FLOOR.get(folder, 2)


def _parts(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def _imports(path: Path) -> list[tuple[str, bool]]:
    """Return each imported module with whether it is imported when the file is."""
    return list(_imported(_tree(path), path))


def _imported(tree: ast.AST, path: Path) -> Iterator[tuple[str, bool]]:
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or _is_type_checking(node)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = path.relative_to(ROOT).parts[: -node.level]
                base = ".".join([*here, *([base] if base else [])])
            yield base, id(node) not in late
            for alias in node.names:
                if (ROOT / base.replace(".", "/") / f"{alias.name}.py").exists():
                    yield f"{base}.{alias.name}", id(node) not in late


def _is_type_checking(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_imports_point_down_the_floors(path: Path) -> None:
    own = _parts(path)
    for module, _ in _imports(path):
        if module.split(".")[0] != "lightning_accel" or path == PACKAGE / "__init__.py":
            continue
        other = tuple(module.split(".")[1:])
        same_folder = bool(own) and bool(other) and own[0] == other[0]
        if path.name == "__init__.py" and same_folder:
            continue  # a folder's front door shows its adapters
        assert _floor(other) <= _floor(own), f"{_id(path)} imports {module} from a floor above"
        folders = set(FLOOR)
        if (
            not same_folder
            and own
            and own[0] not in folders | ROOFS
            and (PACKAGE / own[0]).is_dir()
        ):
            technique = bool(other) and (PACKAGE / other[0]).is_dir() and other[0] not in folders
            technique = technique and (own[0], other[0]) not in BUILDS_ON
            assert not technique, f"{_id(path)}: no technique imports another ({module})"


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_only_adapters_import_lightning(path: Path) -> None:
    parts = path.relative_to(PACKAGE).parts
    if path.name in ADAPTERS or parts[0] in ("bridge", *TOP) or path.stem in ROOFS:
        return
    if ROOMS & set(parts):
        return
    for module, _ in _imports(path):
        root = module.split(".")[0]
        assert root not in ("lightning", "pytorch_lightning"), f"{_id(path)} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_optional_packages_are_imported_inside_functions(path: Path) -> None:
    for module, at_import in _imports(path):
        if at_import:
            assert module.split(".")[0] not in LATE, f"{_id(path)} imports {module} at once"


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_nothing_in_the_package_runs_strings_or_pickles(path: Path) -> None:
    for node in ast.walk(_tree(path)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in ("eval", "exec"), f"{_id(path)}:{node.lineno} calls {called}"
        for unsafe in ("pickle.load", "pickle.loads", "torch.hub.load"):
            assert not called.endswith(unsafe), f"{_id(path)}:{node.lineno} calls {called}"
        for keyword in node.keywords:
            unsafe = keyword.arg == "weights_only" and ast.unparse(keyword.value) == "False"
            assert not unsafe, f"{_id(path)}:{node.lineno} loads a checkpoint as a program"
        if called == "torch.load":
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert given.get("weights_only") == "True", f"{_id(path)}:{node.lineno} loads unsafely"


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_the_package_prints_in_cli_only_and_swallows_no_error(path: Path) -> None:
    in_cli = path.relative_to(PACKAGE).parts[0] == "cli"
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            assert in_cli, f"{_id(path)}:{node.lineno} prints"
        if isinstance(node, ast.ExceptHandler):
            wide = node.type is None or getattr(node.type, "id", "") in (
                "Exception",
                "BaseException",
            )
            empty = all(isinstance(statement, ast.Pass) for statement in node.body)
            assert not (wide and empty), f"{_id(path)}:{node.lineno} swallows every error"


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_a_file_says_what_it_knows_and_stays_readable(path: Path) -> None:
    tree = _tree(path)
    assert ast.get_docstring(tree), f"{_id(path)} has no docstring"
    lines = path.read_text().count("\n")
    assert lines <= 450, f"{_id(path)} has {lines} lines; about 250 is the aim"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
            assert lines <= 55, f"{_id(path)}:{node.lineno} {node.name} has {lines} lines"


def test_no_folder_or_file_has_a_name_that_says_nothing() -> None:
    vague = ("util", "helper", "common", "misc", "manager", "registry")
    names = [p for top in ("lightning_accel", "examples", "conf") for p in (ROOT / top).rglob("*")]
    assert not [p for p in names if p.stem == "base" or any(word in p.stem for word in vague)]


_PROBE = """
import socket, subprocess, sys, threading
def refuse(*args, **kwargs): raise AssertionError(f"called at import: {args}")
import torch
for name in ("init", "_lazy_init"): setattr(torch.cuda, name, refuse)
torch.Tensor.to = torch.Tensor.cuda = torch.zeros = torch.ones = torch.randn = refuse
socket.socket.connect = refuse
import lightning_accel
assert not [m for m in sys.modules if m.split(".")[0] == "lightning"], "the package alone imports lightning"
import importlib
before = set(threading.enumerate())
subprocess.Popen = refuse
for name in MODULES:
    importlib.import_module(name)
assert set(threading.enumerate()) == before, "a thread was started"
assert not torch.cuda.is_initialized()
loaded = {m.split(".")[0] for m in sys.modules} & set(LATE)
assert not loaded, f"imported at once: {sorted(loaded)}"
"""


@pytest.mark.slow
def test_importing_the_package_imports_nothing_optional_and_touches_no_device() -> None:
    modules = [".".join(("lightning_accel", *_parts(path))) for path in FILES]
    modules = [name for name in modules if not name.endswith("__main__")]
    script = f"LATE, MODULES = {LATE!r}, {modules!r}\n{_PROBE}"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=900
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", YAMLS, ids=_id)
def test_a_yaml_says_first_what_you_get(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# "), f"{_id(path)} starts with {lines[0]!r}"
    assert len(lines[0]) > 12


@pytest.mark.parametrize("path", YAMLS, ids=_id)
def test_callbacks_and_loggers_are_dicts_in_yaml(path: Path) -> None:
    tree = yaml.safe_load(path.read_text()) or {}
    for key in ("callbacks", "logger"):
        assert not isinstance(tree.get(key), list), f"{_id(path)}: lists do not merge"


def test_every_technique_folder_has_a_config_group_and_a_variant_that_does_nothing() -> None:
    techniques = [
        p.name
        for p in PACKAGE.iterdir()
        if (p / "__init__.py").exists()
        and p.name not in ({*FLOOR, "conf", "_hydra_plugins"} - {"tuning"})
    ]
    assert techniques
    for name in techniques:
        variant = ROOT / "conf" / "accel" / name / "none.yaml"
        assert variant.exists(), f"conf/accel/{name}/none.yaml is missing"
        assert (ROOT / "tests" / f"test_{name}.py").exists(), f"tests/test_{name}.py is missing"


def test_the_wheel_takes_presets_with_their_techniques_and_no_other_group() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert '"conf/accel" = "lightning_accel/conf/accel"' in project
    for group in (p.name for p in (ROOT / "conf").iterdir() if p.is_dir() and p.name != "accel"):
        assert f'"conf/{group}"' not in project


def test_the_list_of_files_is_what_the_files_say() -> None:
    tree = runpy.run_path(str(ROOT / "docs" / "tree.py"))["tree"]
    assert (ROOT / "docs" / "files.md").read_text() == tree(), "run `python docs/tree.py`"


def test_the_metadata_excludes_releases_with_known_defects() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for floor in ("torch>=2.10", "lightning>=2.6.6,<2.7,!=2.6.2,!=2.6.3", "hydra-core>=1.3.8,<1.5"):
        assert f'"{floor}"' in project
