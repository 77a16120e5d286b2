"""Two processes over gloo: prune in mid-training and resume, without the ranks drifting apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ddp, pytest.mark.slow]


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(
        [sys.executable, str(root / "tests" / "scripts" / name), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.mark.parametrize(
    ("importance", "unused"),
    [("magnitude", "none"), ("taylor", "none"), ("random", "unused")],
)
def test_ranks_agree_through_prune_and_resume(tmp_path: Path, importance: str, unused: str) -> None:
    done = run_script("ddp_prune.py", str(tmp_path), importance, unused)
    assert done.returncode == 0, done.stderr[-3000:]
    zero, one = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert zero == one
    assert len(zero["whole"]) == 4 + 2  # epochs and prunes
    assert zero["resumed"] == zero["whole"][-len(zero["resumed"]) :]
    assert len(set(zero["whole"])) == 6


@pytest.mark.parametrize("kind", ["fsdp", "tp"])
def test_a_network_is_pruned_before_it_is_sharded(tmp_path: Path, kind: str) -> None:
    """Rank 0 decides for all; a resumed run takes the shape from the sharded checkpoint."""
    done = run_script("fsdp_prune.py", str(tmp_path), kind)
    assert done.returncode == 0, done.stderr[-3000:]
    zero, one = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert zero == one
    assert len(zero["whole"]["weights"]["0.weight"]) == 16  # of 32
    assert zero["whole"]["local"] == 8  # and really sharded
    assert zero["resumed"]["weights"] == zero["whole"]["weights"]
    assert zero["resumed"]["receipts"] == [True]
