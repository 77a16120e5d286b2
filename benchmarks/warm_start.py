"""What does a packed compile cache save? Processor seconds of compiling, cold against from the file.

    python benchmarks/warm_start.py [--nets gpt_d256 mlp] [--rounds 1] [--json]

Every measurement is a process of its own with an empty cache directory of its own, as in a new container. It
trains two steps uncompiled and then two steps with BlockCompile and WarmStart; the difference in processor
seconds of the process and of the compilers it started is what compiling cost. The first process packs the
file, the second starts from it and must load every graph. Inductor gets no workers, so that all compilers
are counted. Exit status 1 when the warm start costs more than a fifth.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WANTED = 1 / 5
_DEFAULT = ("gpt_d256", "mlp")


def measure(net: str, folder: Path, run: str) -> dict[str, Any]:
    """Train in a new process, with an empty cache directory, beside the packed file of an earlier one."""
    own = folder / run
    own.mkdir()
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(own / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    environment.pop("TRITON_CACHE_DIR", None)
    file, found = folder / f"{net}.zip", own / "found.json"
    command = [sys.executable, __file__, "--train", net, str(file), str(found)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return {**json.loads(found.read_text()), "packed_bytes": file.stat().st_size}


def train(net: str, file: str, found: str) -> None:
    """Run in the process of its own: train plain and compiled, and write what each cost."""
    import logging

    import torch
    import torch._inductor.compile_fx  # imports are no compilation
    from lightning.pytorch import Callback, Trainer
    from nets import NETS

    from lightning_accel.compilation import BlockCompile, WarmStart

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)

    def fit(*callbacks: Callback) -> float:
        torch.manual_seed(0)
        user, before = NETS[net](), _cpu_s()
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
        )
        trainer.fit(user, user.data(2))
        return _cpu_s() - before

    fit()
    plain_s = fit()
    warm, edit = WarmStart(file), BlockCompile()
    compile_s = fit(warm, edit) - plain_s
    found_now = {"compile_s": compile_s, "graphs": edit.totals["graphs"], **warm.totals}
    Path(found).write_text(json.dumps(found_now))


def _cpu_s() -> float:
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, who))


def main(nets: list[str], rounds: int, as_json: bool) -> int:
    """Measure, print, and return the exit status."""
    rows = []
    for net in nets:
        for number in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                cold = measure(net, Path(folder), "cold")
                warm = measure(net, Path(folder), "warm")
            ratio = warm["compile_s"] / cold["compile_s"]
            rows.append({"net": net, "round": number, "ratio": ratio, "cold": cold, "warm": warm})
            if not as_json:
                print(
                    f"{net:10s} cold {cold['compile_s']:6.2f} CPU s, warm {warm['compile_s']:5.2f} "
                    f"= {ratio:.3f} of it ({warm['loaded']} graphs loaded, {warm['compiled']} "
                    f"compiled, file {cold['packed_bytes'] / 2**20:.1f} MiB)"
                )
    if as_json:
        print(json.dumps({"benchmark": "warm_start", "wanted": WANTED, "rows": rows}))
    missed = any(row["ratio"] > WANTED or row["warm"]["compiled"] for row in rows)
    return int(missed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train(*sys.argv[2:5])
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nets", nargs="+", default=list(_DEFAULT), help="names of nets.NETS")
    parser.add_argument("--rounds", type=int, default=1, help="cold and warm starts of each net")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    sys.exit(main(given.nets, given.rounds, given.json))
