"""Write docs/files.md: what is where, by the first lines of the files themselves."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAD = "# What is where\n\nWritten by `python docs/tree.py` from the first line of each file; do not edit it by hand.\n"


def first_line(path: Path) -> str:
    """Return what a file says that it knows: its docstring's first line, or a yaml's first comment."""
    text = path.read_text()
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    said = [line for line in text.splitlines() if not line.startswith("# @package")]
    return said[0].removeprefix("# ") if said else ""


def tree() -> str:
    """Return the whole page: one section per folder, one line per file."""
    folders: dict[str, list[str]] = {}
    for top in ("lightning_accel", "conf", "examples", "benchmarks", "docs"):
        for path in sorted((ROOT / top).rglob("*")):
            if path.suffix in (".py", ".yaml") and (line := first_line(path)):
                name = "" if path.name == "__init__.py" else f"- `{path.name}`: "
                folder = path.parent.relative_to(ROOT).as_posix()
                folders.setdefault(folder, []).append(f"{name}{line}" + "\n" * (not name))
    parts = [f"\n## {name}/\n\n" + "\n".join(folders[name]) for name in sorted(folders)]
    return HEAD + "\n".join(part.rstrip("\n") for part in parts) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "files.md").write_text(tree())
