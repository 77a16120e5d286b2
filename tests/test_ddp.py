"""Two processes over gloo prune, distil and resume, without the ranks drifting apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.ddp, pytest.mark.slow]


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(
        [sys.executable, str(root / "tests" / "scripts" / name), *arguments],
        capture_output=True,
        text=True,
        timeout=900,
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
    assert zero["from_cut"] == zero["whole"][-2:]  # the two epochs after the last cut
    assert len(set(zero["whole"])) == 6
    assert zero["averages"] == [True] * 20  # of ten tensors at two prunes


LOSSES = "kd,logit_standardized_kd,dkd,dist,jsd,fitnet,attention_transfer,rkd,similarity_preserving,crd,own"
AROUND = "late,accumulate,manual,clip,masked,cache,ema,prune,self"


@pytest.mark.parametrize("cases", [LOSSES, AROUND], ids=["losses", "around"])
def test_two_processes_distil_as_one_and_resume_bit_equal(tmp_path: Path, cases: str) -> None:
    for devices in "12":
        done = run_script("ddp_distill.py", str(tmp_path), cases, devices)
        assert done.returncode == 0, done.stderr[-3000:]
    one, zero, other = (
        json.loads((tmp_path / f"{name}.json").read_text())
        for name in ("1-rank0", "2-rank0", "2-rank1")
    )
    assert zero == other
    for case in cases.split(","):
        assert zero[f"{case} resumed"] == zero[case], case
        for kind in ("weights", "heads", "logged"):
            limit = 1e-5 if kind == "logged" else 1e-6
            assert far(one[case][kind], zero[case][kind]) < limit, (case, kind)


def test_a_sharded_student_learns_what_a_whole_one_does(tmp_path: Path) -> None:
    for mode in ([], ["--alone"]):
        done = run_script("fsdp_distill.py", str(tmp_path), *mode)
        assert done.returncode == 0, done.stderr[-3000:]
    alone, zero, one = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", "rank0", "rank1")
    )
    assert zero == one
    assert zero["equal"]["local"] == 8  # of 16, and so really sharded
    assert far(alone["equal"]["weights"], zero["equal"]["weights"]) < 1e-6
    assert zero["resumed"] == zero["equal"]
    assert "projectors cannot be trained beside sharded parameters" in zero["wide"]


def far(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest difference between nested lists of numbers."""
    assert one.keys() == other.keys()
    return max((abs(a - b) for a, b in zip(_flat(one), _flat(other), strict=True)), default=0.0)


def _flat(value: Any) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    return [n for item in value for n in _flat(item)] if isinstance(value, list) else [value]


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


def test_two_processes_do_not_tell_a_technique_that_has_not_acted(tmp_path: Path) -> None:
    done = run_script("ddp_plain.py", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert not found["failed"] and found["fits"] == 5
