"""What functions of a script that runs in several processes found: a JSON per process."""

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
