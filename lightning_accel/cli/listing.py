"""`lightning-accel list`: presets and techniques, one line each, and whose they are.

    lightning-accel list
    lightning-accel list pruning
    lightning-accel list bf16 --config ../app/conf/config.yaml

Without words all is listed, else the rows in which every word occurs. A preset is used by `python train.py +accel=NAME` in
any Hydra app; a variant of one technique by `+accel/TECHNIQUE=VARIANT`; a class in Python. Beside ours stand the files of an
app's own `accel` group: that of `--config`, by default of `conf/` in the present folder. Nothing is run.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import lightning_accel
from lightning_accel import _HOMES
from lightning_accel.cli.terminal import FINDING, FINE, answer, complain
from lightning_accel.errors import explain
from lightning_accel.measure.table import Table

OURS, YOURS = "ours", "yours"
_KINDS = {"callbacks": "callback", "plugins": "plugin", "strategies": "strategy"}
_NO_COMMENT = "(says nothing in its first line)"


class Entry(NamedTuple):
    """One row: `use` is what one writes to get it, `kind` one of preset, variant, callback, plugin, strategy, class, function."""

    kind: str
    name: str
    gives: str
    whose: str
    use: str


def add(commands: Any) -> None:
    """Add the command to an argparse sub-parser collection."""
    parser = commands.add_parser(
        "list",
        help="show presets and techniques, one line each",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", help="show only rows with all of these words")
    parser.add_argument("--config", type=Path, help="of an app whose own presets to list as well")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the rows; 1 when none has all the words."""
    try:
        entries = chosen([*presets(users_folder(args.config)), *techniques()], args.words)
    except ValueError as error:
        return complain(args, error)
    if args.json:
        answer(args, json.dumps({"entries": [entry._asdict() for entry in entries]}, indent=2))
    elif entries:
        print("\n\n".join(table.to_text(120) for table in tables(entries)))
    else:
        print(f"Nothing has {' and '.join(map(repr, args.words))} in it. `lightning-accel list` shows all.")  # fmt: skip
    return FINE if entries else FINDING


def shipped() -> Path:
    """Return the folder of this package's presets, in a wheel or in a checkout.

    >>> (shipped() / "amp.yaml").is_file()
    True
    """
    package = Path(lightning_accel.__file__).parent
    inside = package / "conf" / "accel"
    return inside if inside.is_dir() else package.parent / "conf" / "accel"


def users_folder(config: Path | None) -> Path | None:
    """Return the folder of an app's own presets, if it has one that is not ours.

    Raises:
        ValueError: There is no such configuration.
    """
    if config is not None and not config.is_file():
        raise ValueError(explain("there is no such configuration", str(config), "pass a yaml file"))
    folder = (Path("conf") if config is None else config.parent) / "accel"
    there = folder.is_dir() and folder.resolve() != shipped().resolve()
    return folder if there else None


def presets(own: Path | None = None) -> list[Entry]:
    """Return all presets and variants; a file of the app's stands in place of ours of the same name.

    Args:
        own: The folder `accel` of an app.
    """
    found = {name: _entry(name, path, OURS) for name, path in _files(shipped())}
    for name, path in _files(own) if own is not None else ():
        entry = _entry(name, path, YOURS)
        instead = "yours, in place of ours" if name in found else YOURS
        found[name] = entry._replace(whose=instead)
    return sorted(found.values(), key=lambda entry: (entry.kind, entry.name))


def techniques() -> list[Entry]:
    """Return the public classes and functions with the first sentence of their docstrings, none of them imported.

    >>> [entry.kind for entry in techniques() if entry.name in ("BlockCompile", "prune")]
    ['callback', 'function']
    """
    found = []
    for name, home in _HOMES.items():
        node = _defined(name, home)
        said = (ast.get_docstring(node) or "").partition("\n\n")[0].replace("\n", " ")
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        kind = next((k for folder, k in _KINDS.items() if folder in home.split(".")), kind)
        found.append(Entry(kind, name, said, OURS, f"lightning_accel.{name}"))
    return sorted(found, key=lambda entry: (entry.kind, entry.name.lower()))


def chosen(entries: Sequence[Entry], words: Sequence[str]) -> list[Entry]:
    """Return the rows that have all of the words, whatever their case."""
    wanted = [word.lower() for word in words]
    return [e for e in entries if all(word in " ".join(e).lower() for word in wanted)]


def tables(entries: Sequence[Entry]) -> Iterator[Table]:
    """Yield a table for what one chooses on the command line of a Hydra app, and one for what one builds in Python."""
    both = [e for e in entries if e.kind in ("preset", "variant")]
    several = any(entry.whose != OURS for entry in both)
    for kind, title in (
        ("preset", "Presets: python train.py +accel=NAME, or +accel=[ONE,OTHER]"),
        ("variant", "One technique: python train.py +accel/TECHNIQUE=VARIANT"),
    ):
        rows = [[e.use, e.gives, *([e.whose] if several else [])] for e in both if e.kind == kind]
        if rows:
            yield Table(["use", "what you get", *(["whose"] if several else [])], rows, title)
    classes = [[e.name, e.kind, e.gives] for e in entries if e not in both]
    if classes:
        title = "In Python: from lightning_accel import NAME"
        yield Table(["name", "is a", "what it does"], classes, title)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield presets, and variants one folder below, by their names."""
    found = [p for p in folder.rglob("*") if p.suffix in (".yaml", ".yml") and p.is_file()]
    for path in sorted(found):
        yield path.relative_to(folder).with_suffix("").as_posix(), path


def _entry(name: str, path: Path, whose: str) -> Entry:
    technique, _, variant = name.rpartition("/")
    use = f"+accel/{technique}={variant}" if technique else f"+accel={name}"
    return Entry("variant" if technique else "preset", name, _first_comment(path), whose, use)


def _first_comment(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return f"(cannot be read: {error})"
    said = [line for line in lines if not line.startswith("# @package")]
    first = said[0].lstrip("# ").strip() if said and said[0].startswith("#") else ""
    return first or _NO_COMMENT


@cache
def _defined(name: str, home: str) -> ast.ClassDef | ast.FunctionDef:
    path = Path(lightning_accel.__file__).parent.joinpath(*home.split(".")).with_suffix(".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return node
    raise AssertionError(f"{home} defines no {name}")
