"""Two processes over gloo: fewer collectives, the same values, and a SIGTERM on one takes both out together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import forks
import pytest
import torch

pytestmark = [pytest.mark.ddp, pytest.mark.slow]

BATCHES = 120
"""Of both epochs on each rank."""


def run(folder: Path, who: int, when: int, every: int) -> list[dict[str, Any]]:
    script = Path(__file__).parent / "scripts" / "ddp_loop.py"
    folder.mkdir()
    arguments = str(folder), str(who), str(when), str(every)
    _, printed = forks.run_ranks(script, *arguments, cwd=folder)
    found = [folder / f"rank{rank}.json" for rank in (0, 1)]
    assert all(path.exists() for path in found), printed[-3000:]
    return [json.loads(path.read_text()) for path in found]


def test_values_are_the_same_with_a_twentieth_of_the_collectives(tmp_path: Path) -> None:
    plain, lean = run(tmp_path / "plain", -1, 0, 0), run(tmp_path / "lean", -1, 0, 50)
    for one, two in zip(plain, lean, strict=True):
        for key in ("weights", "bar", "steps", "left"):
            assert one[key] == two[key], key
        assert one["counts"]["broadcast"] == BATCHES and two["counts"]["broadcast"] == 0
        added = two["counts"]["all_reduce"] - one["counts"]["all_reduce"]
        assert 3 <= added <= BATCHES // 10  # fewer on a machine that is not held up
    csv = [
        (tmp_path / name / "log" / "0" / "metrics.csv").read_text() for name in ("plain", "lean")
    ]
    assert csv[0] == csv[1] and len(csv[0].splitlines()) > 10


@pytest.mark.parametrize(("who", "when"), [(0, 20), (1, 20), (1, 58)])
def test_a_signal_to_one_rank_takes_all_out_together_with_a_checkpoint(
    tmp_path: Path, who: int, when: int
) -> None:
    zero, one = run(tmp_path / "a", who, when, 16)
    assert zero["left"] and one["left"] and zero["received"] and one["received"]
    assert zero["steps"] == one["steps"]
    assert when <= zero["steps"][-1] <= when + 16
    if when == 58:
        assert zero["steps"][-1] == 60  # the end of the epoch is a check as well
    assert zero["weights"] == one["weights"]
    saved = torch.load(tmp_path / "a" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == zero["steps"][-1]
    assert saved["state_dict"]["net.weight"].tolist() == zero["weights"]
