"""docs/matrix.md is what a run finds: teams of techniques under every strategy, and each refusal, on two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plain
import pytest
from composed import ROWS, STRATEGIES, TEAMS, page, read, verdict
from forks import results_of

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "matrix.md").read_text()
SAID = read(PAGE)
REFUSED = [
    (n, s) for (n, s), word in SAID.items() if word.startswith("refused") and s in STRATEGIES
]
OURS = ("accel_fsdp", "accel_tensor")
TRIED = [
    (team, strategy)
    for team, rows in TEAMS.items()
    for strategy in (("ddp", *OURS) if team == "short" else OURS[: 1 if team == "compiled" else 2])
    if all(SAID[row, strategy] == "equal" for row in rows)
]
CELLS = [*TRIED, *REFUSED]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    cells = [f"{name}/{strategy}" for name, strategy in CELLS]
    return results_of("matrix.py", tmp_path_factory.mktemp("matrix"), *cells, QUICK="1")


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize(("name", "strategy"), CELLS, ids=[f"{n}-{s}" for n, s in CELLS])
def test_the_page_says_what_a_run_finds(
    found: list[dict[str, Any]], name: str, strategy: str
) -> None:
    for one in found:
        assert verdict(name, one[name][strategy]) == SAID.get((name, strategy), "equal")


def test_every_technique_is_on_the_page_and_nothing_there_is_wrong() -> None:
    known = {n for n in plain.TECHNIQUES if not n.startswith("tune,")} - {"format"}
    assert known <= {*ROWS} and {name for name, _ in SAID} == {*ROWS}
    assert {row for rows in TEAMS.values() for row in rows} <= {*ROWS}
    for cell, word in SAID.items():
        assert word in ("equal", "-") or ("Found: " in word and "Do: " in word), (cell, word)
        assert word != "-" or cell[1] not in STRATEGIES


def test_a_page_is_read_as_it_was_written() -> None:
    right = {"weights": 1e-13, "logged": 0.0}
    cell = {"error": "Unsupported: What. Found: that. Do: this.", "refused": True}
    results = {n: {s: {"fit": right, "load": right} for s in STRATEGIES} for n in ROWS}
    results["masks"]["ddp"] = {"fit": cell}
    results["prune"]["ddp"] = {"fit": right, "resume": {"weights": 1e-9, "logged": 0.0}}
    words = read(page(results))
    assert words["masks", "ddp"] == "refused: What. Found: that. Do: this."
    assert words["prune", "ddp"] == "WRONG: 1.0e-09 apart" and words["rows", "ddp"] == "equal"
    assert verdict("masks", {"fit": right, "resume": cell}).startswith("WRONG")
    assert verdict("masks", {"fit": cell | {"refused": False}}).startswith("WRONG")
