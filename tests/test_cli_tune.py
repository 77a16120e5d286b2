"""`lightning-accel tune`: what it takes, writes and refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from lightning_accel.cli import main

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"
)

CODE = """
from lightning.pytorch.demos.boring_classes import BoringModel

def build():
    model = BoringModel()
    return model, model.train_dataloader()

def own():
    return BoringModel()

def network():
    return BoringModel().layer

def example():
    return BoringModel(), BoringModel().layer.weight
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "users_lit.py").write_text(CODE)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "users_lit", raising=False)
    return "users_lit"


QUICK = ["--budget-s", "1", "--no-cache", "--technique", "fused_optimizer", "--accelerator", "cpu"]


@pytest.mark.slow
def test_a_module_of_ones_own_is_tuned_and_the_files_are_written(
    code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / f"tuned{ending}" for ending in (".yaml", ".json", ".svg", ".md", ".txt")]
    outputs = [word for file in files for word in ("--output", str(file))]
    assert main(["tune", f"{code}:build", *QUICK, "--batch-size", "8", *outputs]) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if "Wrote" in line] == [
        f"Wrote {f}" for f in files
    ]
    assert "plain against plain" in printed and "Batch sizes" in printed
    assert all(file.stat().st_size for file in files)
    report = json.loads(files[1].read_text())
    preset = yaml.safe_load(files[0].read_text())
    assert ("fused_optimizer" in report["settings"]) == ("callbacks" in preset)
    assert {trial["technique"] for trial in report["trials"]} == {"fused_optimizer"}
    assert [rate["batch_size"] for rate in report["rates"]] == [8]


@pytest.mark.slow
def test_a_module_with_data_of_its_own_needs_no_other(
    code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", f"{code}:own", *QUICK, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trials"]


@pytest.mark.slow
def test_json_is_one_object(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", f"{code}:build", *QUICK, "--json", "--steps", "1000"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 1000 and found["numerics"] == "amp"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "say which network"),
        (["users_lit:network"], "gives no LightningModule with data"),
        (["users_lit:example"], "BoringModel and an example"),
        (["users_lit:nothing"], "MODULE:FUNCTION"),
        (["users_lit:build", "--output", "tuned.docx"], "unknown form"),
        (["users_lit:build", "--budget-s", "0"], "above 0"),
        (["users_lit:build", "--accelerator", "nonsense"], "`accelerator='nonsense'`"),
        (["--config", "nowhere.yaml"], "no such configuration"),
    ],
)
def test_what_cannot_be_meant_is_said_before_anything_runs(
    code: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_configuration_is_tuned_with_its_own_trainer(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--config",
        str(root / "conf" / "config.yaml"),
        "--allow",
        "models.",
        "--allow",
        "data.",
    ]
    overrides = ["model.widths=[8,16]", "model.depth=1", "trainer.max_epochs=3"]
    assert main(["tune", *words, *QUICK, "--json", *overrides]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 3 * 19  # 1,149 training images in batches of 64
