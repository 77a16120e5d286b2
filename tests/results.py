"""What functions of a script that runs in several processes found: a JSON per process, written there and judged here."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


def write_results(
    functions: Mapping[str, Callable[[], Any]], names: Iterable[str], path: Path
) -> None:
    """Run these, and write after each what was found so far: what kills the process leaves the results before it."""
    found: dict[str, Any] = {}
    for name in names or functions:
        try:
            found[name] = functions[name]()
        except Exception as error:
            traceback.print_exc()
            found[name] = {
                "error": f"{type(error).__name__}: {error}",
                "trace": traceback.format_exc(),
            }
        path.write_text(json.dumps(found))


def assert_as_alone(result: Mapping[str, Any]) -> None:
    """Fail unless all numbers are 0 up to rounding, and the values of both sides are the same."""
    found = dict(result)
    assert "error" not in found, found
    if "alone" in found:
        sides = (_numbers(json.loads(found.pop(side))) for side in ("alone", "sharded"))
        assert all(abs(a - b) < 1e-12 for a, b in zip(*sides, strict=True))
    assert found and all(isinstance(v, float) and v < 1e-11 for v in found.values()), found


def _numbers(tree: Any) -> list[float]:
    if isinstance(tree, dict):
        return [v for value in tree.values() for v in _numbers(value)]
    return [v for value in tree for v in _numbers(value)] if isinstance(tree, list) else [tree]
