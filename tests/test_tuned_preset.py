"""`+accel=./tuned.yaml`: a preset that is a file of the folder in which the command was typed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from lightning_accel._hydra_plugins import PresetFile, register

pytestmark = pytest.mark.filterwarnings("ignore:A preset sets trainer.max_epochs=7")
TUNED = """# @package _global_
# What a tuner found.
defaults:
  - /accel/compilation: blocks

accel:
  tuned: true
trainer:
  max_epochs: 7
"""


@pytest.fixture(autouse=True)
def _plugins() -> None:
    register()


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    for name in ("tuned.yaml", "runs/other.yaml"):
        (tmp_path / name).write_text(TUNED)
    return tmp_path / "tuned.yaml"


def composed(root: Path, *overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(root / "conf"), version_base="1.3"):
        found = OmegaConf.to_container(compose("config", list(overrides)))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", ["./tuned.yaml", "./tuned", "tuned.yaml", "runs/other.yaml"])
def test_a_file_of_this_folder_is_a_preset(root: Path, tuned: Path, name: str) -> None:
    found = composed(root, f"+accel={name}")
    assert found["accel"] == {"tuned": True} and found["trainer"]["max_epochs"] == 7
    assert found["callbacks"]["compilation"]["_target_"].endswith("BlockCompile"), "its defaults"


def test_paths_may_be_absolute_or_lead_upwards(
    root: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert composed(root, f"+accel={tuned}")["accel"] == {"tuned": True}
    monkeypatch.chdir(tuned.parent / "runs")
    assert composed(root, "+accel=../tuned.yaml")["accel"] == {"tuned": True}


@pytest.mark.slow
def test_a_file_goes_with_presets_by_name(root: Path, tuned: Path) -> None:
    found = composed(root, "+accel=[amp,./tuned.yaml]")
    assert found["accel"] == {"amp": True, "tuned": True}
    assert {"precision", "report"} <= set(found["callbacks"])
    tuned.write_text(TUNED.replace("/accel/compilation: blocks", "prune"))
    assert composed(root, "+accel=./tuned.yaml")["accel"] == {"prune": True, "tuned": True}
    tuned.write_text(TUNED.replace("/accel/compilation: blocks", "./runs/other.yaml"))
    assert "compilation" in composed(root, "+accel=./tuned.yaml")["callbacks"]


def test_a_value_on_the_command_line_wins(root: Path, tuned: Path) -> None:
    assert (
        composed(root, "+accel=./tuned.yaml", "trainer.max_epochs=2")["trainer"]["max_epochs"] == 2
    )


# --- beside an app's own configuration ---------------------------------------------------------------

WITH_OWN = """
trainer: {_target_: lightning.pytorch.Trainer, max_epochs: 20, precision: 32-true}
callbacks:
  report: {_target_: lightning.pytorch.callbacks.DeviceStatsMonitor}
  stop: {_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss, patience: 3}
  pruning: {_target_: lightning_accel.StructuredPruning, ratio: 0.3, when: [2, 4]}
"""


def of_app(tmp_path: Path, preset: str, *overrides: str) -> tuple[dict[str, Any], list[str]]:
    """Compose an app with a preset; return the configuration, and what was told."""
    conf = tmp_path / "conf"
    conf.mkdir(exist_ok=True)
    (conf / "app.yaml").write_text(WITH_OWN)
    (tmp_path / "p.yaml").write_text(f"# @package _global_\n{preset}\n")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with initialize_config_dir(str(conf), version_base="1.3"):
            found = OmegaConf.to_container(compose("app", ["+accel=./p.yaml", *overrides]))
    assert isinstance(found, dict)
    return found, [str(w.message) for w in heard]


def test_a_preset_replaces_no_callback_of_another_class(tmp_path: Path) -> None:
    text = "callbacks: {report: {_target_: lightning_accel.AccelReport}, stop: {_target_: lightning_accel.StepMeter}}"
    found, told = of_app(tmp_path, text, "+callbacks.accel_report.path=r.json")
    plain = yaml.safe_load(WITH_OWN)["callbacks"]
    assert {name: found["callbacks"][name] for name in plain} == plain
    assert found["callbacks"]["accel_report"]["path"] == "r.json"
    assert found["callbacks"]["accel_stop"] == {"_target_": "lightning_accel.StepMeter"}
    assert "`callbacks.report` is this app's" in told[0] and "`callbacks.accel_stop`" in told[1]


def test_the_apps_values_of_a_callback_stay_and_the_preset_adds(tmp_path: Path) -> None:
    preset = "defaults: [{/accel/pruning: taylor}]"
    found, told = of_app(tmp_path, preset)
    pruning = found["callbacks"]["pruning"]
    assert (pruning["ratio"], pruning["when"]) == (0.3, [2, 4]), "of the app"
    assert pruning["importance"] == "taylor", "of the preset"
    (line,) = told
    assert (
        "callbacks.pruning.ratio=0.3 (not 0.5)" in line and "pruning.when=[2, 4] (not 0.4)" in line
    )
    found, _ = of_app(tmp_path, preset, "callbacks.pruning.ratio=0.75")
    assert found["callbacks"]["pruning"]["ratio"] == 0.75, "the command line comes last"
    same = "callbacks: {pruning: {_target_: lightning_accel.pruning.StructuredPruning, ratio: 0.3}}"
    assert of_app(tmp_path, same)[1] == []


def test_an_experiment_that_builds_on_a_preset_is_not_worth_a_word(root: Path) -> None:
    found = composed(root, "experiment=digits_prune")
    assert found["callbacks"]["pruning"]["when"] == [4, 7, 10]


def test_what_a_preset_changes_of_the_trainer_is_told(tmp_path: Path) -> None:
    found, told = of_app(
        tmp_path, "trainer: {max_epochs: 2, gradient_clip_val: 1.0, precision: 32-true}"
    )
    assert found["trainer"]["max_epochs"] == 2
    assert told == ["A preset sets trainer.max_epochs=2 (not 20), trainer.gradient_clip_val=1.0."]


@pytest.mark.parametrize(
    ("key", "value", "whole"),
    [
        ("fast_dev_run", "true", "false"),
        ("fast_dev_run", "3", "false"),
        ("limit_train_batches", "1", "1.0"),
        ("limit_val_batches", "0", "null"),
        ("overfit_batches", "1", "0.0"),
        ("barebones", "true", "false"),
        ("enable_checkpointing", "false", "true"),
        ("limit_test_batches", "${trainer.max_epochs}", "1.0"),
    ],
)
def test_a_preset_makes_no_trial_of_a_training(
    tmp_path: Path, key: str, value: str, whole: str
) -> None:
    with pytest.raises(
        ConfigCompositionException, match=f"`trainer.{key}: .*Do: say trainer.{key}="
    ):
        of_app(
            tmp_path,
            f"trainer: {{{key}: '{value}'}}" if "$" in value else f"trainer: {{{key}: {value}}}",
        )
    assert of_app(tmp_path, f"trainer: {{{key}: {whole}}}")[0]["trainer"]["max_epochs"] == 20


# --- names ----------------------------------------------------------------------------------------------


def test_presets_by_name_stay_what_they_are(root: Path, tmp_path: Path) -> None:
    plain = composed(root, "+accel=amp")
    (tmp_path / "amp").write_text("not yaml: [")
    (tmp_path / "amp_prune.yaml").write_text("not yaml: [")
    assert composed(root, "+accel=amp") == plain
    assert composed(root, "+accel=amp_prune")["accel"] == {"amp": True, "prune": True}


def test_a_named_file_of_this_folder_comes_before_a_preset(root: Path, tmp_path: Path) -> None:
    (tmp_path / "amp.yaml").write_text(TUNED)
    assert composed(root, "+accel=./amp.yaml")["accel"] == {"tuned": True}
    assert composed(root, "+accel=amp")["accel"] == {"amp": True}


def test_other_groups_do_not_take_files(root: Path, tuned: Path) -> None:
    for override in ("model=./tuned.yaml", "+accel/pruning=./tuned.yaml", f"data={tuned}"):
        with pytest.raises(ConfigCompositionException, match="Could not find"):
            composed(root, override)


def test_a_name_that_is_nothing_is_hydras_own_error(root: Path) -> None:
    for name in ("nothing", "nothing.yaml", "runs/nothing.yaml"):
        with pytest.raises(ConfigCompositionException, match="Could not find"):
            composed(root, f"+accel={name}")


WRONG = {
    "missing": (None, "there is no preset .* no such file"),
    "a folder": ("folder", "something that is not a file"),
    "no package": ("a: 1\n", "no package, .*'a: 1' as its first line"),
    "empty": ("", "an empty file"),
    "a list": ("# @package _global_\n- 1\n", "a ListConfig"),
    "broken": ("# @package _global_\na: [1\n", "not valid yaml"),
    "python": ("# @package _global_\na: !!python/object/apply:os.getcwd []\n", "not valid yaml"),
    "binary": (b"\xff\xfe\x00", "UTF-8"),
    "large": ("# @package _global_\n" + "#" * 1_000_001, "too large"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_no_preset_is_said_to_be_none(root: Path, tmp_path: Path, name: str) -> None:
    text, reason = WRONG[name]
    path = tmp_path / "mine.yaml"
    if text == "folder":
        path.mkdir()
    elif isinstance(text, bytes):
        path.write_bytes(text)
    elif text is not None:
        path.write_text(text)
    with pytest.raises(ConfigCompositionException, match=reason) as caught:
        composed(root, "+accel=./mine.yaml")
    assert "Found: " in str(caught.value) and str(path) in str(caught.value)


def test_a_preset_cannot_name_what_is_not_allowed_to_run(root: Path, tuned: Path) -> None:
    tuned.write_text("# @package _global_\ncallbacks:\n  bad: {_target_: os.system, command: ls}\n")
    with pytest.raises(ConfigCompositionException, match="os.system` is not allowed to run"):
        composed(root, "+accel=./tuned.yaml")


def test_registering_twice_changes_nothing() -> None:
    register()
    names = [found.__name__ for found in Plugins.instance().discover()]
    assert names.count("PresetFile") == names.count("LightningAccelPresetFiles") == 1


def test_the_source_answers_for_its_group_and_nothing_else(tuned: Path) -> None:
    source = PresetFile("accel files", f"preset://{tuned.parent}")
    assert source.available() and not source.is_group("accel") and source.list("accel", None) == []
    assert source.is_config("accel/./tuned") and source.is_config(f"accel/{tuned}")
    for path in ("tuned.yaml", "config", "accel", "accel/tuned", "hydra/job", "data/./tuned.yaml"):
        assert not source.is_config(path)
    with pytest.raises(ConfigCompositionException, match="no file"):
        source.load_config("data/./tuned.yaml")
    GlobalHydra.instance().clear()


APP = """
import hydra
from omegaconf import OmegaConf

@hydra.main(version_base="1.3", config_path=None, config_name=None)
def main(cfg):
    print("GOT", OmegaConf.to_yaml(cfg).split(), "END")

main()
"""


@pytest.fixture
def app(root: Path, tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A user's own app, with our plugins where an installation puts them."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(
        root / "lightning_accel" / "_hydra_plugins", site / "hydra_plugins" / "lightning_accel"
    )
    (tuned.parent / "app.py").write_text(APP)
    (tuned.parent / "second.yaml").write_text("# @package _global_\naccel:\n  second: 2\n")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "app.py", *arguments],
            cwd=tuned.parent,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(root)])},
            capture_output=True,
            text=True,
            timeout=900,
        )

    return run


@pytest.mark.slow
def test_a_sweep_goes_over_files_wherever_its_jobs_run(app: Any) -> None:
    done = app("-m", "+accel=./second.yaml,./tuned.yaml", "hydra.job.chdir=true")
    assert done.returncode == 0, done.stderr
    jobs = done.stdout.split("GOT")[1:]
    assert len(jobs) == 2 and "second:" in jobs[0] and "tuned:" in jobs[1]


@pytest.mark.slow
def test_the_search_path_can_be_shown(app: Any) -> None:
    shown = app("--info", "searchpath")
    assert shown.returncode == 0 and "preset://" in shown.stdout, shown.stderr
    missing = app("+accel=./nothing.yaml")
    assert missing.returncode != 0 and "there is no preset" in missing.stderr
    assert "Traceback" not in missing.stderr
