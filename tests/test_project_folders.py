"""Projects that know nothing of this package, copied to an empty folder and run as their authors run them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECTS = ROOT / "tests" / "projects"
_GROUP = "lightning.pytorch.callbacks_factory"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not any(e.value.startswith("lightning_accel.") for e in entry_points(group=_GROUP)),
        reason="pip install -e . : Lightning and Hydra find this package by its metadata",
    ),
]
PRUNE = "callbacks.pruning.ratio=0.5 callbacks.pruning.when=1 ~callbacks.report"


def run(name: str, folder: Path, *words: str, **environment: str) -> str:
    """Run a project in a copy of it, and return what it printed."""
    shutil.copytree(PROJECTS / name, folder / name)
    env = {k: v for k, v in os.environ.items() if k != "LIGHTNING_ACCEL"}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder / name,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_script_is_pruned_by_a_variable(tmp_path: Path) -> None:
    said = run("script", tmp_path, "train.py", LIGHTNING_ACCEL=f"prune {PRUNE}")
    assert "widths [8, 3]" in said and "epochs 3" in said


def test_a_lightning_cli_is_pruned_by_words_and_its_own_yaml_stays(tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    given = "--trainer.callbacks=lightning_accel.StructuredPruning"
    words = [given, "--trainer.callbacks.ratio=0.5", "--trainer.callbacks.when=1"]
    said = run("lightning_cli", tmp_path, "main.py", "fit", "--config", "fit.yaml", *words)
    assert "widths [8, 3]" in said and "epochs 3" in said
    yaml = (tmp_path / "lightning_cli" / "fit.yaml").read_text()
    assert yaml == (PROJECTS / "lightning_cli" / "fit.yaml").read_text()


def test_a_hydra_app_without_callbacks_is_pruned_when_it_says_so(tmp_path: Path) -> None:
    words = ["app.py", "+accel=prune", *PRUNE.split(), "+accel.attach=true"]
    said = run("hydra_app", tmp_path, *words)
    assert "widths [8, 3]" in said and "epochs 3" in said


def test_a_template_is_pruned_by_one_word(tmp_path: Path) -> None:
    words = ["-m", "project.train", "+accel=prune", *PRUNE.split()]
    said = run("template", tmp_path, *words)
    assert "widths [8, 3]" in said and "epochs 3" in said
