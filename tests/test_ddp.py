"""Two processes over gloo prune, distil and resume, without the ranks drifting apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import forks
import pytest

pytestmark = [pytest.mark.ddp, pytest.mark.slow]


SCRIPTS = Path(__file__).parent / "scripts"


def run_ranks(name: str, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run one of the scripts in two processes and return what each wrote."""
    status, printed = forks.run_ranks(SCRIPTS / name, str(folder), *arguments, cwd=folder)
    assert status == 0, printed[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def run_alone(name: str, folder: Path, *arguments: str) -> None:
    status, printed = forks.run_script(SCRIPTS / name, str(folder), *arguments, cwd=folder)
    assert status == 0, printed[-3000:]


@pytest.mark.parametrize(
    ("importance", "unused"),
    [("magnitude", "none"), ("taylor", "none"), ("random", "unused"), ("torch_pruning", "none")],
)
def test_ranks_agree_through_prune_and_resume(tmp_path: Path, importance: str, unused: str) -> None:
    zero, one = run_ranks("ddp_prune.py", tmp_path, importance, unused)
    assert zero == one
    assert len(zero["whole"]) == 4 + 2  # epochs and prunes
    assert zero["resumed"] == zero["whole"][-len(zero["resumed"]) :]
    assert zero["from_cut"] == zero["whole"][-2:]  # the two epochs after the last cut
    assert len(set(zero["whole"])) == 6
    assert zero["averages"] == [True] * 20  # of ten tensors at two prunes


def test_ranks_agree_on_whole_blocks(tmp_path: Path) -> None:
    """And no rank waits for a gradient of one (huggingface/accelerate#1191, facebookresearch/fairseq#2389)."""
    zero, one = run_ranks("ddp_depth.py", tmp_path)
    assert zero == one and zero["gone"]
    assert len(set(zero["whole"])) == 4
    assert zero["resumed"] == zero["whole"][-len(zero["resumed"]) :]


LOSSES = "kd,logit_standardized_kd,dkd,dist,jsd,fitnet,attention_transfer,rkd,similarity_preserving,crd,own"
AROUND = "late,accumulate,manual,clip,masked,cache,ema,prune,self"


@pytest.mark.parametrize("cases", [LOSSES, AROUND], ids=["losses", "around"])
def test_two_processes_distil_as_one_and_resume_bit_equal(tmp_path: Path, cases: str) -> None:
    run_alone("ddp_distill.py", tmp_path, cases, "1")
    one = json.loads((tmp_path / "rank0.json").read_text())
    zero, other = run_ranks("ddp_distill.py", tmp_path, cases, "2")
    assert zero == other
    for case in cases.split(","):
        assert zero[f"{case} resumed"] == zero[case], case
        for kind in ("weights", "heads", "logged"):
            limit = 1e-5 if kind == "logged" else 1e-6
            assert far(one[case][kind], zero[case][kind]) < limit, (case, kind)


def test_a_sharded_student_learns_what_a_whole_one_does(tmp_path: Path) -> None:
    zero, one = run_ranks("fsdp_distill.py", tmp_path)
    run_alone("fsdp_distill.py", tmp_path, "--alone")
    alone = json.loads((tmp_path / "alone.json").read_text())
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
    zero, one = run_ranks("fsdp_prune.py", tmp_path, kind)
    assert zero == one
    assert len(zero["whole"]["weights"]["0.weight"]) == 16  # of 32
    assert zero["whole"]["local"] == 8  # and really sharded
    assert zero["resumed"]["weights"] == zero["whole"]["weights"]
    assert zero["resumed"]["receipts"] == [True]


def test_two_processes_do_not_tell_a_technique_that_has_not_acted(tmp_path: Path) -> None:
    for found in run_ranks("ddp_plain.py", tmp_path):
        assert not found["failed"] and found["fits"] == 5
