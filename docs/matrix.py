"""Write docs/matrix.md: run every technique under every strategy, and say what was found."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def found(folder: Path) -> dict[str, dict[str, Any]]:
    """Run the matrix on two and on four processes; return by row and strategy what all processes found."""
    from composed import FEW, ON_FOUR, ROWS, STRATEGIES
    from forks import results_of

    results: dict[str, dict[str, Any]] = {name: {} for name in ROWS}
    for strategy in (*STRATEGIES, *ON_FOUR):  # by itself each ends in time
        on_four = strategy in ON_FOUR
        cells = [f"{name}/{strategy}" for name in (FEW if on_four else ROWS)]
        (own := folder / strategy).mkdir()
        quick = "1" if on_four else "0"
        for one in results_of("matrix.py", own, *cells, count=4 if on_four else 2, QUICK=quick):
            for name, row in one.items():
                worst(results[name].setdefault(strategy, {}), row[strategy])
    return results


def worst(known: dict[str, Any], cell: dict[str, Any]) -> None:
    """Take over what one process found, where it is worse than what others did."""
    for what, value in cell.items():
        other = known.get(what)
        if (
            other is None
            or "error" in value
            or ("error" not in other and _far(value) > _far(other))
        ):
            known[what] = value


def _far(value: dict[str, Any]) -> float:
    return float(max(value["weights"], value["logged"]))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    from composed import page

    with tempfile.TemporaryDirectory() as folder:
        (ROOT / "docs" / "matrix.md").write_text(page(found(Path(folder))))
