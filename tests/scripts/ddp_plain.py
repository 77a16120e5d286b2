"""The law of plain fits with two processes: `ddp_plain.py FOLDER`, what is not plain as JSON per rank."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import plain

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.set_num_threads(1)

CASES = [
    plain.Case("Plain", "shuffled", "validated"),
    plain.Case("Draws", "own random", "resumed, both"),
    plain.Case("Manual", "two by name", "a step fails"),
]
TEAMS = [plain.Team(tuple(n for n in team if n not in plain.DEAR)) for team in plain.TEAMS]


def follow(case: plain.Case, team: plain.Team | None, beside: dict[str, Any], folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    kwargs = {
        "accelerator": "cpu",
        "devices": 2,
        "strategy": "ddp_find_unused_parameters_true",
        "use_distributed_sampler": case.loader == "shuffled",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": str(folder),
    }
    record = plain.follow(case, team, beside, kwargs)
    torch.distributed.barrier()
    for left in record.values():
        if (
            torch.distributed.get_rank()
        ):  # files are the business of rank 0, and may not be there yet
            del left["files"], left["saved"]
    return record


if __name__ == "__main__":
    folder, failed, fits = Path(sys.argv[1]), {}, 0
    expected: dict[str, Any] = {}
    for index, team in enumerate(TEAMS):
        case, beside, name = CASES[index % len(CASES)], team.beside, "-".join(team.names)
        key = f"{'-'.join(case)}{len(beside)}"
        if key not in expected:
            expected[key] = follow(case, None, beside, folder / key)
        try:
            plain.assert_same(follow(case, team, beside, folder / name), expected[key])
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:600]
        fits += 1
    rank = torch.distributed.get_rank()
    (folder / f"rank{rank}.json").write_text(json.dumps({"failed": failed, "fits": fits}))
