"""Two processes over gloo: the first searches, both train with its answer, and nobody waits for ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import forks
import pytest
import yaml

pytestmark = [pytest.mark.ddp, pytest.mark.slow]


def run(folder: Path, case: str) -> list[dict[str, Any]]:
    script = Path(__file__).parent / "scripts" / "ddp_tune.py"
    status, printed = forks.run_ranks(script, str(folder), case, cwd=folder)
    assert status == 0, printed[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_both_processes_train_with_the_answer_of_the_first(tmp_path: Path) -> None:
    zero, one = run(tmp_path, "takes")
    assert zero["searches"]["count"] == 2 and one["searches"]["count"] == 0  # none on resume
    assert zero["whole"] == one["whole"] and zero["resumed"] == one["resumed"]
    assert zero["whole"]["plugin"] == "AutocastPrecision" and zero["whole"]["fused"] == [True]
    assert (zero["whole"]["matmul"], zero["whole"]["after"]) == ("medium", "highest")
    assert zero["whole"]["callbacks"] == 2
    assert zero["resumed"]["settings"] == zero["whole"]["settings"]
    assert zero["resumed"]["weights"] == zero["whole"]["weights"]


def test_a_first_process_that_cannot_search_keeps_nobody_waiting(tmp_path: Path) -> None:
    zero, one = run(tmp_path, "fails")
    assert zero["whole"] == one["whole"]
    assert zero["whole"]["settings"] == {} and "cannot be copied" in zero["whole"]["notes"][0]


def test_a_step_with_a_collective_keeps_nobody_waiting(tmp_path: Path) -> None:
    """Copies on the first process alone would wait for the second, which waits for the answer."""
    zero, one = run(tmp_path, "gathers")
    assert zero["whole"] == one["whole"] and len(zero["whole"]["gathered"]) == 2
    assert len(set(zero["whole"]["gathered"])) == 2


def test_a_real_search_is_cached_and_reported_once(tmp_path: Path) -> None:
    zero, one = run(tmp_path, "real")
    assert zero["whole"] == one["whole"] and zero["again"] == one["again"]
    assert zero["again"]["settings"] == zero["whole"]["settings"]
    assert zero["again"]["weights"] == zero["whole"]["weights"]
    assert len(list((tmp_path / "answers").iterdir())) == 1
    yaml.safe_load((tmp_path / "tuned.yaml").read_text())
