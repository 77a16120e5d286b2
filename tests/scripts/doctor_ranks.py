"""`lightning-accel doctor --parallel` in processes that are there, of which rank 1 is slow and has a wrong clock: `doctor_ranks.py FOLDER`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

os.environ["RANK"] = os.environ["LOCAL_RANK"]

from lightning_accel.cli import main
from lightning_accel.parallel import links

FOLDER, RANK = Path(sys.argv[1]), int(os.environ["RANK"])
AHEAD_NS = 100 * 10**9

if __name__ == "__main__":
    links._WIDTH["cpu"] = 64
    if RANK == 1:
        clock, product = time.time_ns, links._product_s
        time.time_ns = lambda: clock() + AHEAD_NS  # type: ignore[assignment]
        links._product_s = lambda device: 100 * product(device)
    code = main(
        ["doctor", "--parallel", "--accelerator", "cpu", "--output", f"{FOLDER}/{RANK}.json"]
    )
    (FOLDER / f"code {RANK}").write_text(str(code))
