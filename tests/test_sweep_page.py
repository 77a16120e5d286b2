"""A page of a whole sweep, by Hydra's own loop."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]

APP = """
import json, hydra
from pathlib import Path
from hydra.core.hydra_config import HydraConfig

@hydra.main(version_base="1.3", config_path=".", config_name="app")
def main(cfg):
    if cfg.size == 3:
        raise ValueError("three is too many")
    side = {"params": 10 * cfg.size, "latency_ms": {"1": float(cfg.size)}, "metrics": {"val/acc": cfg.acc}}
    report = {"dense": side, "final": side, "ratios": {}}
    Path(HydraConfig.get().runtime.output_dir, "report.json").write_text(json.dumps(report))
    return cfg.acc, cfg.size

main()
"""
CONFIG = """
size: 1
acc: 0.5
hydra:
  sweep: {dir: sweep}
  callbacks:
    page: {_target_: lightning_accel.sweep.SweepPage, y: val/acc}
"""


def swept(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "app.py").write_text(APP)
    (folder / "app.yaml").write_text(CONFIG)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "app.py", *words]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=900, check=False
    )


@pytest.mark.slow
@pytest.mark.sweep
def test_a_sweep_ends_with_a_page_of_its_runs_and_those_that_no_other_beats(tmp_path: Path) -> None:
    done = swept(tmp_path, "-m", "size=1,2,4", "acc=0.5,0.6")
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "sweep/sweep.html").read_text()
    assert "sweep: 6 runs" in page and "size=4 acc=0.6" in page
    lines = [line for line in done.stdout.splitlines() if line.startswith("size=")]
    front = [line.split("  ")[0] for line in lines if line.rstrip().endswith("*")]
    assert front == ["size=1 acc=0.6"]  # as fast as any, and as right as any
    assert "Wrote sweep/sweep.html" in done.stdout


@pytest.mark.slow
@pytest.mark.sweep
def test_a_job_that_fails_ends_neither_the_others_nor_the_page_hydra_2284(tmp_path: Path) -> None:
    done = swept(tmp_path, "-m", "size=1,3,2", "acc=0.5,0.7")
    assert done.returncode == 1 and "three is too many" in done.stderr
    page = (tmp_path / "sweep/sweep.html").read_text()
    assert "4 runs, 2 failed" in page and "size=2 acc=0.7" in page
    lines = done.stdout.splitlines()
    told = [i for i, line in enumerate(lines) if "Failed: size=3" in line]
    assert len(told) == 2 and "ValueError: three is too many" in lines[told[1]]
    assert any("#4 : size=2" in line for line in lines[told[1] :])  # while the others still run


@pytest.mark.slow
@pytest.mark.sweep
def test_a_page_that_cannot_be_written_ends_no_sweep(tmp_path: Path) -> None:
    (tmp_path / "sweep/sweep.html").mkdir(parents=True)
    done = swept(tmp_path, "-m", "size=1,2")
    assert done.returncode == 0 and "sweep.html is another file" in done.stdout
    (tmp_path / "sweep/sweep.html").rmdir()
    done = swept(tmp_path, "-m", "size=1,2", "hydra.callbacks.page.y=val/nothing")
    assert done.returncode == 0 and "no run has a number `val/nothing`" in done.stdout
    assert "2 runs" in (tmp_path / "sweep/sweep.html").read_text()
    done = swept(tmp_path, "-m", "size=3,4")  # into the folder of the sweep before
    page = (tmp_path / "sweep/sweep.html").read_text()
    assert "1 runs, 1 failed" in page and "size=3" not in page
    done = swept(tmp_path, "size=1")
    assert done.returncode == 0 and "sweep" not in done.stdout  # one job is no sweep


def needs(plugin: str) -> pytest.MarkDecorator:
    there = importlib.util.find_spec(f"hydra_plugins.{plugin}") is not None
    return pytest.mark.skipif(not there, reason=f"pip install {plugin.replace('_', '-')}")


@needs("hydra_joblib_launcher")
@pytest.mark.slow
@pytest.mark.sweep
def test_a_sweep_in_several_processes_ends_with_one_page(tmp_path: Path) -> None:
    words = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "size=1,2,4"]
    done = swept(tmp_path, "-m", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "sweep/sweep.html").read_text()
    assert "sweep: 3 runs" in page and all(f"size={size}" in page for size in (1, 2, 4))
    assert not list((tmp_path / "sweep").glob("*.part"))


@needs("hydra_optuna_sweeper")
@pytest.mark.slow
@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
def test_a_search_in_two_directions_survives_jobs_that_fail_and_ends_with_its_front(
    tmp_path: Path,
) -> None:
    words = [
        "hydra/sweeper=optuna",
        "hydra.sweeper.direction=[maximize,minimize]",
        "hydra.sweeper.n_jobs=1",
    ]
    words += [
        "hydra.sweeper.n_trials=10",
        "hydra.sweeper.sampler.seed=1",
        "size=choice(1,2,3,4,5)",
        "acc=interval(0.2,0.9)",
    ]
    words += ["hydra.sweeper.max_failure_rate=1.0"]  # else the sweeper ends with the first
    done = swept(tmp_path, "-m", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    failed = done.stdout.count("Failed: size=3")
    page = (tmp_path / "sweep/sweep.html").read_text()
    assert 0 < failed < 9 and f"{10 - failed} runs, {failed} failed" in page
    runs = [json.loads(p.read_text())["final"] for p in tmp_path.glob("sweep/*/report.json")]
    points = [(-run["metrics"]["val/acc"], run["latency_ms"]["1"]) for run in runs]
    best = {p for p in points if not any(o != p and o[0] <= p[0] and o[1] <= p[1] for o in points)}
    said = [line for line in done.stdout.splitlines() if line.startswith("size=")]
    assert sum(line.rstrip().endswith("*") for line in said) == len(best)
    found = yaml.safe_load((tmp_path / "sweep/optimization_results.yaml").read_text())
    assert {(-s["values"][0], s["values"][1]) for s in found["solutions"]} == best


def test_a_report_goes_into_the_folder_of_its_job(tmp_path: Path) -> None:
    """Where the Trainer has no logger; the working folder is that of all jobs."""
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from lightning.pytorch import Trainer

    from lightning_accel.bridge.paced import report_path

    quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    assert report_path(Trainer(**quiet)) == Path.cwd() / "lightning_logs" / "report.json"
    (tmp_path / "app.yaml").write_text("size: 1\n")
    with initialize_config_dir(version_base="1.3", config_dir=str(tmp_path)):
        words = [f"hydra.runtime.output_dir={tmp_path}/job"]
        HydraConfig.instance().set_config(compose("app", words, return_hydra_config=True))
    try:
        assert report_path(Trainer(**quiet)) == tmp_path / "job" / "report.json"
        own = Trainer(**quiet, default_root_dir=tmp_path / "own")
        assert report_path(own) == tmp_path / "own" / "report.json"
    finally:
        HydraConfig.instance().cfg = None
