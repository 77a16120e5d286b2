"""Files of strangers: each attack would leave a mark, and what refuses it says what was wrong, found, to do."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import stat
import subprocess
import sys
import types
import warnings
import zipfile
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from lightning.pytorch import LightningModule, Trainer
from omegaconf import OmegaConf
from torch import nn

from lightning_accel import Distillation, allowed, load_from_checkpoint, seal
from lightning_accel._hydra_plugins import PresetFile, register
from lightning_accel.cli import main
from lightning_accel.compilation import WarmStart, pack, unpack
from lightning_accel.errors import AccelError, UnsafeFile
from lightning_accel.job import job
from lightning_accel.measure import Report
from lightning_accel.places import free
from lightning_accel.presets import check_preset
from lightning_accel.provenance import withheld
from lightning_accel.recipe import build, prepare_teacher
from lightning_accel.redact import HIDDEN, names_secret, redacted, unsaid
from lightning_accel.targets import CLASSES, OURS, is_ours
from lightning_accel.tuning import TuneReport, settings, store

THREE_PARTS = re.compile(r".+ Found: .+ Do: .+", re.DOTALL)

# --- presets -------------------------------------------------------------------------------------------

EVIL = """
from hydra.experimental.callback import Callback
class Evil(Callback):
    def on_run_start(self, config, **kwargs):
        open("mark", "w").close()
"""
APP = """
import hydra

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    print("RAN", list(cfg.callbacks))

main()
"""
CONFIG = """
callbacks: {early: {_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: loss}}
db: {password: hunter2-hunter2, conn: "${oc.env:HOME}"}
model: {width: 3}
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """A Hydra app of the user's own, in the present folder."""
    register()
    (tmp_path / "conf" / "accel").mkdir(parents=True)
    (tmp_path / "conf" / "config.yaml").write_text(CONFIG)
    return tmp_path


def composed(folder: Path, *overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(folder / "conf"), version_base="1.3"):
        found = OmegaConf.to_container(compose("config", list(overrides)))
    assert isinstance(found, dict)
    return found


@pytest.mark.slow
def test_a_preset_that_brings_a_callback_of_hydra_runs_no_code(app: Path, root: Path) -> None:
    (app / "app.py").write_text(APP)
    (app / "evil.py").write_text(EVIL)
    (app / "hydra_plugins").mkdir()  # where an installation has it, and before an older one
    (app / "hydra_plugins" / "lightning_accel").symlink_to(root / "lightning_accel/_hydra_plugins")
    node = "hydra: {callbacks: {x: {_target_: evil.Evil}}}\n"
    (app / "tuned.yaml").write_text(f"# @package _global_\n{node}")
    (app / "conf" / "config.yaml").write_text(CONFIG + node)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "app.py", *words],
            cwd=app,
            env=os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{app}"},
            capture_output=True,
            text=True,
        )

    assert "RAN" in run().stdout and (app / "mark").exists(), "the trap is a real one"
    (app / "mark").unlink()
    (app / "conf" / "config.yaml").write_text(CONFIG)
    done = run("+accel=./tuned.yaml")
    assert done.returncode != 0 and "RAN" not in done.stdout and not (app / "mark").exists()
    assert THREE_PARTS.search(done.stderr) and "Traceback" not in done.stderr


PRESETS = {
    "a callback of hydra": "hydra: {callbacks: {x: {_target_: evil.Evil}}}",
    "a folder of hydra": "hydra: {run: {dir: /tmp/x}}",
    "a search path": "hydra: {searchpath: [file:///tmp]}",
    "an environment": "hydra: {job: {env_set: {LD_PRELOAD: ./x.so}}}",
    "a default of hydra": "defaults: [{/hydra/launcher: evil}]",
    "an override of hydra": "defaults: [{override /hydra/launcher: evil}]",
    "a default elsewhere": "defaults: [{/db: prod}]",
    "a default that leads out": "defaults: [{/accel/../hydra/launcher: evil}]",
    "a default in another place": "defaults: [{/accel/pruning@hydra.callbacks.x: magnitude}]",
    "a default of the environment": "defaults: ['${oc.env:SECRET_TOKEN}']",
    "a variant of the environment": "defaults: [{/accel/pruning: '${oc.env:SECRET_TOKEN}'}]",
    "defaults of an interpolation": "defaults: ${db}",
    "another group": "model: {width: 4}",
    "a logger": "logger: {w: {_target_: lightning.pytorch.loggers.CSVLogger, save_dir: .}}",
    "a merged key": "x: &x {hydra: {run: {dir: /tmp}}}\n<<: *x",
    "a class of another": "callbacks: {x: {_target_: subprocess.Popen, args: [touch, mark]}}",
    "a class of Lightning": "callbacks: {x: {_target_: lightning.pytorch.callbacks.LambdaCallback}}",
    "a class in a list": "callbacks: {x: {_target_: lightning_accel.StepMeter, y: [{_target_: os.system}]}}",
    "a class as a mark": "accel: {x: {_target_: lightning_accel.StepMeter}}",
    "a class by interpolation": "callbacks: {x: {_target_: '${model.kind}'}}",
    "a function of ours": "callbacks: {x: {_target_: lightning_accel.tune}}",
    "a part of ours": "callbacks: {x: {_target_: lightning_accel.measure.report.Report}}",
    "a store of ours": "callbacks: {x: {_target_: lightning_accel.distillation.row_store.RowStore}}",
    "a method of ours": "callbacks: {x: {_target_: lightning_accel.Teacher.load_weights}}",
    "an argument by place": "callbacks: {x: {_target_: lightning_accel.AccelReport, _args_: [x.json]}}",
    "a half call": "callbacks: {x: {_target_: lightning_accel.AccelReport, _partial_: true}}",
    "a Trainer": "trainer: {_target_: os.system}",
    "a folder of the Trainer": "trainer: {default_root_dir: x}",
    "a logger of the Trainer": "trainer: {logger: true}",
    "a strategy": "trainer: {strategy: {_target_: lightning.pytorch.strategies.DDPStrategy}}",
    "a place above": "callbacks: {x: {_target_: lightning_accel.AccelReport, path: ../x.json}}",
    "a place of the machine": "callbacks: {x: {_target_: lightning_accel.WarmStart, path: /tmp/x.zip}}",
    "a place at home": "callbacks: {x: {_target_: lightning_accel.AccelReport, path: ~/x.json}}",
    "a place in a list": "callbacks: {x: {_target_: lightning_accel.AutoTune, report: [a.yaml, ../b.yaml]}}",
    "a place in pieces": "accel: {d: .}\ncallbacks: {x: {_target_: lightning_accel.AccelReport, path: '${accel.d}${accel.d}/x'}}",
    "a place by default": "callbacks: {x: {_target_: lightning_accel.AccelReport, path: '${oc.select:no,..}/x'}}",
    "a server": "callbacks: {x: {_target_: lightning_accel.Distillation, teacher: 'http://evil/x.ckpt'}}",
    "the environment": "callbacks: {x: {_target_: lightning_accel.AccelReport, path: '${oc.env:SECRET_TOKEN}'}}",
    "the environment in a mark": "accel: {x: '${oc.env:SECRET_TOKEN}'}",
    "the environment, nested": "accel: {x: '${oc.decode:${oc.env:SECRET_TOKEN}}'}",
    "something made": "accel: {x: '${oc.create:{a: 1}}'}",
    "a resolver of the app's": "accel: {x: '${run:ls}'}",
    "a secret of the app": "accel: {x: '${db.password}'}",
    "a key made of a key": "accel: {x: '${db.${accel.y}}', y: password}",
    "bytes": "callbacks: {x: {_target_: lightning_accel.AccelReport, path: !!binary Li4veA==}}",
    "a path that is no text": "callbacks: {x: {_target_: lightning_accel.AccelReport, path: !!python/object/apply:pathlib.PosixPath [/x]}}",
    "a service": "callbacks: {x: {_target_: lightning_accel.QuboSelector, sampler: dwave}}",
    "no callbacks": "callbacks: null",
    "what hydra knows": "accel: {x: '${hydra:job.env_set}'}",
}  # fmt: skip


@pytest.mark.parametrize("what", PRESETS)
def test_a_preset_says_no_more_than_a_preset_may(
    app: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "c4n4ry-c4n4ry")
    (app / "tuned.yaml").write_text(f"# @package _global_\n{PRESETS[what]}\n")
    with pytest.raises(ConfigCompositionException) as caught:
        PresetFile("accel files", f"preset://{app}").load_config("accel/./tuned.yaml")
    assert THREE_PARTS.search(str(caught.value)) and "c4n4ry" not in str(caught.value)


def test_a_preset_changes_no_callback_of_the_apps_own(app: Path) -> None:
    (app / "tuned.yaml").write_text("# @package _global_\ncallbacks: {early: {monitor: other}}\n")
    with pytest.raises(ConfigCompositionException, match="not a callback of lightning_accel.*Do: "):
        composed(app, "+accel=./tuned.yaml")


@pytest.mark.parametrize("package", ["hydra", "hydra.callbacks", "model", "_global_.hydra", "a b"])
def test_a_preset_lands_where_presets_land(app: Path, package: str) -> None:
    (app / "tuned.yaml").write_text(f"# @package {package}\nx: {{_target_: evil.Evil}}\n")
    with pytest.raises(ConfigCompositionException, match=r"Found: .* Do: "):
        PresetFile("accel files", f"preset://{app}").load_config("accel/./tuned.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "hydra: {run: {dir: /tmp}}",
        "accel: {mine: true}\nmodel: {width: 4}",
        "defaults: [amp]\nlogger: {}",
        "callbacks: {x: {_target_: lightning_accel.AccelReport, path: ../x.json}}",
        "defaults: [{override /hydra/job_logging: none}]",
        "callbacks: {x: {_target_: subprocess.Popen, args: [touch, mark]}}",
    ],
)
def test_a_preset_in_the_folder_of_the_app_is_a_preset(app: Path, text: str) -> None:
    (app / "conf" / "accel" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    with pytest.raises(ConfigCompositionException, match=r"Found: .* Do: "):
        composed(app, "+accel=mine")
    (app / "tuned.yaml").write_text("# @package _global_\ndefaults: [mine]\n")
    with pytest.raises(ConfigCompositionException, match=r"Found: .* Do: "):
        composed(app, "+accel=./tuned.yaml")


def test_a_group_of_that_name_which_is_the_apps_own_stays_its_own(app: Path) -> None:
    (app / "conf" / "accel" / "gpu.yaml").write_text("_target_: my.Gpu\nroot: /data\n")
    (app / "conf" / "accel" / "big.yaml").write_text("# @package _global_\nmodel: {width: 9}\n")
    assert composed(app, "+accel=gpu")["accel"] == {"_target_": "my.Gpu", "root": "/data"}
    assert composed(app, "+accel=big")["model"] == {"width": 9}


@pytest.mark.filterwarnings("ignore:A preset sets trainer.max_epochs=4, trainer.precision")
def test_what_a_preset_is_for_stays_possible(app: Path) -> None:
    (app / "tuned.yaml").write_text("""# @package _global_
defaults: [amp, {/accel/pruning: taylor}, {override /accel/precision: bf16}]
accel: {mine: "a word"}
trainer: {max_epochs: 4, precision: 32-true}
callbacks:
  pruning: {ratio: 0.25, target: {_target_: lightning_accel.pruning.target.Macs, share: 0.5}}
  report: {path: "${hydra:runtime.output_dir}/r.json", dense_metrics: {val/acc: 0.5}}
  distillation: {_target_: lightning_accel.Distillation, teacher: /data/t.ckpt, task_weight: "${model.width}"}
""")
    found = composed(app, "+accel=./tuned.yaml")
    assert found["accel"] == {"amp": True, "mine": "a word"}
    assert list(found["callbacks"]) == ["early", "precision", "report", "pruning", "distillation"]
    assert found["callbacks"]["pruning"]["ratio"] == 0.25


def test_what_the_tuner_writes_is_a_preset() -> None:
    for technique in settings.TRIED:
        for value in technique.tunable:
            text = TuneReport(settings.Settings().having(technique.name, value)).to_yaml()
            check_preset(yaml.safe_load(text), "")


def test_a_small_file_that_is_large_when_read_is_refused(app: Path) -> None:
    bomb = "a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
        f"a{n + 1}: &a{n + 1} [{','.join([f'*a{n}'] * 10)}]\n" for n in range(9)
    )
    for text in (bomb, "accel: &a {x: *a}", "accel: " + "[" * 500 + "]" * 500):
        (app / "tuned.yaml").write_text(f"# @package _global_\n{text}\n")
        with pytest.raises(ConfigCompositionException, match=r"Found: .* Do: "):
            PresetFile("accel files", f"preset://{app}").load_config("accel/./tuned.yaml")


def test_the_lines_of_a_file_that_is_no_preset_are_not_shown(app: Path) -> None:
    """A link in a stranger's archive may lead to anything that the user can read."""
    (app / "credentials").write_text("# @package _global_\n[default]\ntoken = c4n4ry: : {\n")
    (app / "tuned.yaml").symlink_to("credentials")
    with pytest.raises(ConfigCompositionException, match="not valid yaml") as caught:
        composed(app, "+accel=./tuned.yaml")
    assert "c4n4ry" not in str(caught.value)


# --- checkpoints -----------------------------------------------------------------------------------------


class Marks(nn.Module):
    """What a stranger has found on this machine: a class that does something when it is built."""

    def __init__(self, path: str = "mark") -> None:
        super().__init__()
        Path(path).touch()


class Kind(Enum):
    SMALL = "small"


class Student(LightningModule):
    def __init__(
        self,
        part: nn.Module | None = None,
        width: int = 2,
        kind: Kind = Kind.SMALL,
        plan: Any = None,
    ) -> None:
        super().__init__()
        self.net = nn.Linear(width, 2)
        self.part, self.plan = part, plan

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(
            self.net(batch), torch.zeros(len(batch), dtype=torch.long)
        )

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.ones(4, 2), 2)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


HERE = __name__
CLI = {"_instantiator": "lightning.pytorch.cli.instantiate_module"}
PART = {"class_path": f"{HERE}.Marks", "init_args": {"path": "mark"}}
HYPER = {
    "an instantiator and a class path": {**CLI, "part": PART},
    "a class path in a list": {**CLI, "plan": [{"x": (PART,)}]},
    "a target": {"plan": {"optimizer": {"_target_": f"{HERE}.Marks"}}},
    "another class": {**CLI, "_class_path": f"{HERE}.Marks"},
    "an instantiator within": {"plan": {"_instantiator": "os.system"}},
    "what only a parser makes": {**CLI, "kind": "SMALL"},
}  # fmt: skip


def checkpoint(path: Path, hyper: dict[str, Any], key: str = "hyper_parameters") -> Path:
    state = Student().state_dict()
    torch.save({"state_dict": state, key: hyper, "pytorch-lightning_version": "2.6.6"}, path)
    return path


@pytest.mark.parametrize("what", HYPER)
def test_a_checkpoint_builds_nothing_that_it_names(tmp_path: Path, what: str) -> None:
    """After Lightning#21822 and #21913, and fairchem#2077 about `_target_`."""
    path = checkpoint(tmp_path / "x.ckpt", HYPER[what])
    with pytest.raises(UnsafeFile) as caught:
        load_from_checkpoint(Student, path)
    assert THREE_PARTS.match(str(caught.value)) and not Path("mark").exists()


def test_the_trap_of_a_class_path_is_a_real_one(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "x.ckpt", HYPER["an instantiator and a class path"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of jsonargparse about Lightning
        Student.load_from_checkpoint(path, weights_only=True, strict=False)
    assert Path("mark").exists()


def test_old_keys_and_a_file_of_hyper_parameters_beside_are_looked_at(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "x.ckpt", {**CLI, "part": PART}, "hparams")
    with pytest.raises(UnsafeFile, match="`part.class_path`"):
        load_from_checkpoint(Student, path)
    good = checkpoint(tmp_path / "y.ckpt", {"width": 2})
    beside = tmp_path / "hparams.yaml"
    beside.write_text(yaml.safe_dump({**CLI, "part": PART}))
    with pytest.raises(UnsafeFile):
        load_from_checkpoint(Student, good, hparams_file=beside)
    assert not Path("mark").exists()


def test_a_module_is_built_without_the_instantiator_of_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning.pytorch.cli.instantiate_module", lambda *_: Marks())
    path = checkpoint(tmp_path / "x.ckpt", {**CLI, "_class_path": f"{HERE}.Student", "width": 2})
    assert isinstance(load_from_checkpoint(Student, path), Student) and not Path("mark").exists()


def test_plain_values_and_objects_of_ones_own_still_load(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "x.ckpt", {**CLI, "width": 2, "part": PART, "plan": {"a": [1]}})
    part = nn.Identity()
    loaded = load_from_checkpoint(Student, path, part=part)
    assert loaded.part is part and loaded.plan == {"a": [1]} and not Path("mark").exists()
    assert torch.equal(loaded.net.weight, torch.load(path)["state_dict"]["net.weight"])


def test_a_teacher_from_a_strangers_checkpoint_runs_nothing(
    tmp_path: Path, trainer_kwargs: dict[str, Any]
) -> None:
    path = checkpoint(tmp_path / "x.ckpt", HYPER["an instantiator and a class path"])
    trainer = Trainer(**trainer_kwargs, callbacks=[Distillation(path)])
    with pytest.raises(AccelError, match="Found: .* Do: "):
        trainer.fit(Student())
    assert not Path("mark").exists()


# --- what a configuration has built -----------------------------------------------------------------------

TRAINER = {
    "_target_": "lightning.pytorch.Trainer",
    "accelerator": "cpu",
    "enable_checkpointing": False,
    "enable_progress_bar": False,
}


def tree(**nodes: Any) -> dict[str, Any]:
    model = {"_target_": "lightning.pytorch.demos.boring_classes.BoringModel"}
    trainer = TRAINER | nodes.pop("trainer", {})
    return {"trainer": trainer, "model": model, **nodes}


def built(given: Any, *allow: str, **more: Any) -> Any:
    return build(given, allow=("lightning.pytorch.demos.", *allow), **more)


ACCEL, LOGGERS = "lightning_accel.", "lightning.pytorch.loggers."
NODES = {
    "a store": {"_target_": ACCEL + "distillation.row_store.RowStore", "folder": "x"},
    "a report": {"_target_": ACCEL + "measure.report.Report"},
    "a base class": {"_target_": ACCEL + "bridge.ModelEdit"},
    "a private function": {"_target_": ACCEL + "measure.report._replace", "target": "x", "text": "y"},
    "a function": {"_target_": ACCEL + "pruning.prune"},
    "a method": {"_target_": ACCEL + "Teacher.load_weights"},
    "a name that passes by": {"_target_": ACCEL + "measure.callbacks.accel_report.Path"},
    "a private class of torch": {"_target_": "torch.nn.modules.module._IncompatibleKeys"},
    "half a call": {"_target_": ACCEL + "AccelReport", "_partial_": True},
    "by place": {"_target_": ACCEL + "AccelReport", "_args_": ["x.json"]},
    "by place, of Lightning": {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "_args_": ["x"]},
    "within a list": {"_target_": ACCEL + "Select", "include": [{"_target_": ACCEL + "tuning.store.load"}]},
    "above": {"_target_": ACCEL + "AccelReport", "path": "../x.json"},
    "above, as a path": {"_target_": ACCEL + "AccelReport", "path": Path("../x.json")},
    "in bytes": {"_target_": ACCEL + "AccelReport", "path": b"../x.json"},
    "at home": {"_target_": ACCEL + "AccelReport", "path": "~/x.json"},
    "absolute": {"_target_": ACCEL + "AccelReport", "path": "/etc/x.json"},
    "through a link": {"_target_": ACCEL + "WarmStart", "path": "link/x.zip"},
    "in a list": {"_target_": ACCEL + "AutoTune", "report": ["a.yaml", "../b.yaml"]},
    "a cache": {"_target_": ACCEL + "Distillation", "teacher": "t.ckpt", "cache": "../cache"},
    "a folder of checkpoints": {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "dirpath": "/etc"},
    "a name of checkpoints": {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "filename": "../x"},
    "a NUL": {"_target_": ACCEL + "AccelReport", "path": "x\0.json"},
    "a bucket": {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "dirpath": "s3://evil/x"},
    "a file by URL": {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "dirpath": "file:///etc"},
    "a logger's name": {"_target_": LOGGERS + "CSVLogger", "save_dir": ".", "name": "../../x"},
    "a logger's version": {"_target_": LOGGERS + "CSVLogger", "save_dir": ".", "version": "../x"},
    "a logger's link": {"_target_": LOGGERS + "CSVLogger", "save_dir": ".", "name": "link"},
    "a logger's variable": {"_target_": LOGGERS + "TensorBoardLogger", "save_dir": "$HOME/x"},
    "a server": {"_target_": LOGGERS + "WandbLogger", "settings": {"base_url": "https://evil.example"}},
    "a key of another": {"_target_": LOGGERS + "WandbLogger", "settings": {"api_key": "x" * 40}},
    "a proxy": {"_target_": LOGGERS + "WandbLogger", "settings": {"https_proxy": "http://evil:1"}},
    "headers": {"_target_": LOGGERS + "WandbLogger", "settings": {"x_extra_http_headers": {"a": "b"}}},
    "a host": {"_target_": LOGGERS + "WandbLogger", "host": "https://evil.example"},
    "a host without scheme": {"_target_": LOGGERS + "WandbLogger", "host": "evil.example"},
    "a tracking server": {"_target_": LOGGERS + "MLFlowLogger", "tracking_uri": "https://evil.example"},
    "a tricky host": {"_target_": LOGGERS + "MLFlowLogger", "tracking_uri": "http://localhost@evil.example"},
    "another's account": {"_target_": LOGGERS + "CometLogger", "api_key": "theirs-theirs"},
}  # fmt: skip


@pytest.mark.parametrize("what", NODES)
def test_a_configuration_builds_no_parts_and_reaches_no_place_of_its_choice(
    what: str, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(tmp_path.parent)
    key = "logger" if LOGGERS in NODES[what]["_target_"] else "callbacks"
    with pytest.raises(ValueError, match="Do: ") as caught:
        built(tree(**{key: {"x": NODES[what]}}))
    assert THREE_PARTS.match(str(caught.value)) and "cannot be imported" not in str(caught.value)


def test_the_trainer_and_the_teacher_write_below_the_run_too() -> None:
    with pytest.raises(ValueError, match="run's folder only.*Do: "):
        built(tree(trainer={"default_root_dir": "/etc"}))
    teacher = {"model": {"_target_": "torch.nn.Identity"}, "folder": "../kept", "ckpt_path": None}
    with pytest.raises(ValueError, match="run's folder only.*Do: "):
        prepare_teacher(tree(teacher=teacher, callbacks={"x": "${teacher.ckpt_path}"}))


def test_what_the_user_says_in_python_and_what_lies_below_is_done(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = tmp_path_factory.mktemp("far")
    csv = {"_target_": LOGGERS + "CSVLogger", "save_dir": str(far), "name": "a/b", "version": ""}
    mlflow = {"_target_": LOGGERS + "MLFlowLogger", "tracking_uri": "https://mine.example/x"}
    report = {"_target_": ACCEL + "AccelReport", "path": "runs/a..b/report.json"}
    nodes = tree(
        logger={"csv": csv}, callbacks={"r": report}, trainer={"default_root_dir": str(tmp_path)}
    )
    with pytest.raises(ValueError, match="run's folder only"):
        built(nodes)
    run = built(nodes, outputs=(far,))
    assert Path(run.trainer.loggers[0].log_dir) == far / "a" / "b"
    for known in ({"allow": "https://mine.example/x"}, {"environ": "https://mine.example/x"}, {}):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", known.get("environ", ""))
        said = "MLFlow|mlflow" if known else "does not choose where"  # it is not installed here
        with pytest.raises(Exception, match=said):
            built(tree(logger={"m": mlflow}), *([known["allow"]] if "allow" in known else []))


def test_a_place_that_was_typed_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "paths.log_dir=/scratch/me",
        "+callbacks.r.path='/x/y.json'",
        "data.root=/data",
        "+a",
        "n=",
    ]
    runtime = types.SimpleNamespace(cwd=os.getcwd(), output_dir="out")
    hydra = types.SimpleNamespace(runtime=runtime, overrides=types.SimpleNamespace(task=words))
    monkeypatch.setattr(allowed, "_hydra", lambda: hydra)
    for place, is_fine in {
        "/scratch/me/logs": True,
        "/x/y.json": True,
        "/x/z.json": False,
        "/data/x": False,
        "/scratch/you": False,
    }.items():
        node = {"_target_": ACCEL + "AccelReport", "path": place}
        if is_fine:
            allowed.check_nodes({"r": node}, ())
        else:
            with pytest.raises(ValueError, match="run's folder only"):
                allowed.check_nodes({"r": node}, ())


def test_a_link_of_the_present_folder_is_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "link").symlink_to("inside")
    node = {"_target_": ACCEL + "AccelReport", "path": "link/x.json"}
    assert built(tree(callbacks={"r": node})).trainer is not None


def test_every_public_class_is_found_under_its_names_and_every_preset_names_one(root: Path) -> None:
    assert {"StructuredPruning", "Teacher", "Macs", "GreedySwapSelector"} <= set(CLASSES)
    assert not {"lightning_accel.tune", "lightning_accel.load_from_checkpoint"} & OURS
    for path in (root / "conf").rglob("*.yaml"):
        for target in re.findall(r"_target_: (lightning_accel\S+)", path.read_text()):
            of_hydra = (
                target == "lightning_accel.sweep.SweepPage"
            )  # which Hydra builds, and no preset may name
            assert is_ours(target) or of_hydra, f"{path.name}: {target}"
            assert not (of_hydra and (root / "conf/accel") in path.parents)


# --- packed compile caches ---------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's configuration folder without a key."""
    monkeypatch.delenv("LIGHTNING_ACCEL_KEY", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def packed(home: Path, tmp_path: Path) -> Path:
    (tmp_path / "cache" / "ab").mkdir(parents=True)
    (tmp_path / "cache" / "ab" / "kernel.py").write_text("x = 1")
    pack(tmp_path / "c.zip", tmp_path / "cache")
    return tmp_path / "c.zip"


def forged(path: Path, **more: bytes) -> None:
    """Put code into a packed cache and renew every hash in it, as a stranger can."""
    evil = b"open('mark', 'w')"
    with zipfile.ZipFile(path) as archive:
        inside = {name: archive.read(name) for name in archive.namelist()}
    listed = json.loads(inside["manifest.json"])
    listed["files"]["ab/kernel.py"] = [len(evil), hashlib.sha256(evil).hexdigest()]
    inside |= {"files/ab/kernel.py": evil, "manifest.json": json.dumps(listed).encode()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**inside, **more}.items():
            archive.writestr(name, content)


def test_a_renewed_archive_is_not_taken(packed: Path, tmp_path: Path) -> None:
    whole = packed.read_bytes()
    for more in ({}, {"seal.txt": b""}, {"seal.txt": b"\xff"}, {"seal.txt": b"0" * 64}):
        packed.write_bytes(whole)
        forged(packed, **more)
        found = unpack(packed, tmp_path / "new")
        assert found.num_files == 0 and not list((tmp_path / "new").rglob("*.py"))
    assert "is not sealed with your key" in found.reason and THREE_PARTS.match(found.reason)
    packed.write_bytes(whole)
    assert unpack(packed, tmp_path / "new").num_files == 1


def test_a_fit_says_that_it_does_not_take_an_archive(
    packed: Path, trainer_kwargs: dict[str, Any]
) -> None:
    forged(packed)
    trainer = Trainer(**trainer_kwargs | {"callbacks": [WarmStart(packed)], "max_steps": 1})
    with (
        pytest.warns(UserWarning, match="not sealed with your key.*Found: .*Do: "),
        pytest.warns(UserWarning, match="WarmStart had no effect"),
        pytest.warns(FutureWarning, match="LeafSpec"),
    ):
        trainer.fit(Student())
    assert not Path("mark").exists()


def test_an_archive_of_another_user_is_taken_with_the_same_key_only(
    packed: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = home / "lightning_accel" / "key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600 and len(key.read_bytes()) == 32
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "other"))
    assert "sealed" in unpack(packed, tmp_path / "new").reason
    (tmp_path / "other/lightning_accel/key").write_bytes(key.read_bytes())
    assert unpack(packed, tmp_path / "new").reason == ""
    monkeypatch.setenv("LIGHTNING_ACCEL_KEY", "short")
    assert "too short" in unpack(packed, tmp_path / "new").reason


@pytest.mark.parametrize("how", ["readable", "a link", "empty", "no place"])
def test_a_key_that_is_not_the_users_alone_seals_nothing(
    home: Path, how: str, tmp_path: Path
) -> None:
    folder = home / "lightning_accel"
    if how == "no place":
        home.write_text("a file")
    else:
        folder.mkdir(parents=True)
        real = folder / "key" if how != "a link" else tmp_path / "theirs"
        real.write_bytes(b"" if how == "empty" else b"k" * 32)
        real.chmod(0o644 if how == "readable" else 0o600)
        if how == "a link":
            (folder / "key").symlink_to(real)
    with pytest.raises(AccelError, match="Found: .*Do: "):
        seal.seal(b"x")


def test_links_are_not_followed_and_foreign_files_not_replaced(
    packed: Path, tmp_path: Path
) -> None:
    """After cuda-python#2857 and pycuda#54: caches of compiled code in folders that others prepared."""
    (tmp_path / "link.zip").symlink_to(packed)
    assert "a link is not followed" in unpack(tmp_path / "link.zip", tmp_path / "new").reason
    (tmp_path / "theirs").mkdir(mode=0o700)
    (tmp_path / "folder").symlink_to(tmp_path / "theirs")
    assert "it is a link" in unpack(packed, tmp_path / "folder").reason
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert "others may write to it" in unpack(packed, tmp_path / "open").reason
    (tmp_path / "notes.txt").write_text("mine")
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("photo.jpg", b"mine")
    kept = {name: (tmp_path / name).read_bytes() for name in ("notes.txt", "data.zip", "c.zip")}
    for name in ("notes.txt", "data.zip", "link.zip"):
        with pytest.raises(AccelError, match="not replaced.*Found: .*Do: "):
            pack(tmp_path / name, tmp_path / "cache")
    assert kept == {name: (tmp_path / name).read_bytes() for name in kept}
    assert not list((tmp_path / "theirs").iterdir()) + list((tmp_path / "open").iterdir())


# --- files that are there already ---------------------------------------------------------------------------


def test_reports_replace_reports_only(tmp_path: Path) -> None:
    """A report named README.json, shipped beside a README of the user's, made the README a table."""
    report, tuned = Report(), TuneReport(notes=["not tuned: no data"])
    report.save(tmp_path / "own.json")
    assert Report.is_free(tmp_path / "own.json")
    (tmp_path / "own.json").rename(tmp_path / "README.json")
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "link.json").symlink_to(tmp_path / "README.json")
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")
    for name in ("README.json", "link.json", "gone.json"):
        assert not Report.is_free(tmp_path / name)
        assert free(tmp_path / name, Report.is_free).stem == name.split(".")[0] + "-1"
    for end in ("yaml", "json", "svg", "md", "txt"):
        path = tmp_path / f"x.{end}"
        assert TuneReport.is_free(path)
        path.write_text(tuned_in(tuned, path))
        assert TuneReport.is_free(path), end
        path.write_text("# mine\n" + path.read_text())
        assert not TuneReport.is_free(path), end
        assert free(path, TuneReport.is_free) == tmp_path / f"x-1.{end}"


def tuned_in(report: TuneReport, path: Path) -> str:
    return report.save(path.with_stem("other")).read_text()


# --- secrets -------------------------------------------------------------------------------------------------

CANARY = "c4n4ry-0123456789"
SECRET_KEYS = [
    "AWS_ACCESS_KEY_ID", "aws_secret_access_key", "GITHUB_PAT", "pat", "db_pwd", "pwd",
    "webhook", "slack_webhook_url", "api_keys", "tokens", "secrets", "passwords", "credentials",
    "smtp_pass", "apiKey", "authToken", "dbpassword", "private_key", "auth", "token2",
    "API_KEY_2",
]  # fmt: skip
PLAIN_KEYS = [
    "num_tokens", "max_tokens", "pad_token", "eos_token", "keys", "sort_key", "n_key", "d_key",
    "path", "patch", "pattern", "patience", "num_keys", "forward_pass", "pin_memory",
    "tokenizer", "keyed", "author", "passes", "pass", "key_size", "token_dim",
]  # fmt: skip


def test_the_names_of_secrets_are_known() -> None:
    assert [key for key in SECRET_KEYS if not names_secret(key)] == []
    assert [key for key in PLAIN_KEYS if names_secret(key)] == []


@pytest.mark.parametrize(
    "given",
    [
        {"password": 123456789},
        {"secrets": {"a": {"b": [CANARY]}, "n": 123456789, "path": Path(CANARY), "raw": CANARY.encode()}},
        {"api_keys": [CANARY]},
        {"object_store": {"s3": {"key": "c4n4ry", "secret": CANARY}}},
        {"env_vars": {"WANDB_API_KEY": CANARY, "http_proxy": "http://me:c4n4ry@10.0.0.1:8080"}},
        {"note": json.dumps({"a": [{"password": "x y z"}]}), "pin": 123456789},
        {"note": "'api_key': 'c4n4ry 0123456789'"},
        {"note": f"curl -H 'Authorization: Bearer {CANARY}'"},
        {"note": f"https://hooks.slack.com/services/T0/B0/{CANARY}"},
        {"note": "ghp_" + "c4n4ry" * 6},
        {"note": f"-----BEGIN RSA PRIVATE KEY-----\n{CANARY}\n-----END RSA PRIVATE KEY-----"},
        {"db": {"password": CANARY}, "copy": f"in the middle {CANARY} of a text", CANARY: 1},
    ],
    ids=str,
)  # fmt: skip
def test_every_value_below_a_secret_key_is_withheld(given: dict[str, Any]) -> None:
    """After composer#242, whose logger got the key and secret of a store, and verl#670."""
    shown = str(redacted(given, {}))
    assert HIDDEN in shown
    assert not [s for s in ("c4n4ry", "123456789", "x y z") if s in shown]


def test_what_is_no_secret_stays() -> None:
    plain = {
        "lr": 0.1,
        "text": "a missing key: net.weight; 2 forward pass: slow; [1,2]",
        "list": "[1,2]",
        "pwd": None,
        "token": True,
        "cwd": os.getcwd(),
    }
    assert redacted(plain, {"PWD": os.getcwd(), "OLDPWD": os.getcwd()}) == plain


def test_what_came_from_the_environment_is_withheld_however_it_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"MY_THING": CANARY, "MY_NUMBER": "4711", "MY_SWITCH": "1"}.items():
        monkeypatch.setenv(name, value)
    for name, resolver in {
        "ours_env": os.getenv,
        "ours_int": lambda text: int(text),
        "ours_choice": lambda text: "a" if text else "b",
    }.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True, use_cache=True)
    cfg = OmegaConf.create(
        {
            "direct": "${oc.env:MY_THING}",
            "chain": "${direct}",
            "within": "a/${chain}/b",
            "decoded": "${oc.decode:${oc.env:MY_NUMBER}}",
            "own": "${ours_env:MY_THING}",
            "number": "${ours_int:${oc.env:MY_NUMBER}}",
            "list": ["${oc.env:MY_THING}", {"x": "${.y}", "y": "${oc.env:MY_NUMBER}"}],
            "selected": "${oc.select:direct}",
            "default": "${oc.env:NOT_THERE,plain}",
            "chosen": "${ours_choice:${oc.env:MY_SWITCH}}",
            "plain": 3,
        }
    )
    found = withheld(cfg)
    shown, said = found.of(OmegaConf.to_container(cfg, resolve=True)), found.secrets
    assert CANARY not in str(shown) and "4711" not in str(shown) and {CANARY, "4711"} <= said
    assert shown["within"] == f"a/{HIDDEN}/b" and shown["default"] == "plain"
    assert shown["chosen"] == "a" and shown["plain"] == 3
    assert cfg.own == CANARY and cfg.direct == CANARY, "the configuration itself is not touched"
    assert os.environ["MY_THING"] == CANARY and type(os.environ).__name__ == "_Environ"


def test_what_is_logged_is_what_was_built_and_no_draw_is_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resolver that draws gives another number each time that it is asked."""
    monkeypatch.setenv("MY_THING", CANARY)
    OmegaConf.register_new_resolver("ours_draw", lambda: random.random(), replace=True)
    model = {
        "_target_": f"{HERE}.Loud",
        "fails": False,
        "given": ["${ours_draw:}", "${oc.env:MY_THING}"],
    }
    random.seed(5)
    run = built(OmegaConf.create(tree() | {"model": model}), f"{HERE}.")
    after = random.random()
    random.seed(5)
    assert run.model.hparams["given"][0] == random.random() and after == random.random()
    assert run.config["model"]["given"] == [run.model.hparams["given"][0], HIDDEN]


class Loud(LightningModule):
    """A module of the user's own that says what it was given."""

    def __init__(self, given: Any = None, fails: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        if fails:
            raise ValueError(f"cannot reach {given}")


def test_errors_do_not_say_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_THING", CANARY)
    nodes: dict[str, Any] = {
        "as an argument": {"model": {"_target_": f"{HERE}.Loud", "given": "${oc.env:MY_THING}"}},
        "as a class": {"model": {"_target_": "${oc.env:MY_THING}"}},
        "beside no class": {"model": {"given": "${oc.env:MY_THING}"}},
        "as a place": {"callbacks": {"r": {"_target_": ACCEL + "AccelReport", "path": "/${oc.env:MY_THING}"}}},
        "as a group": {"accel": "${oc.env:MY_THING}"},
        "as a checkpoint": {"ckpt_path": "http://${oc.env:MY_THING}/x"},
        "below a key": {"model": {"_target_": f"{HERE}.Loud", "given": "${db.password}"}, "db": {"password": "hunter2"}},
    }  # fmt: skip
    for node in nodes.values():
        with pytest.raises(Exception, match=r"\*\*\*") as caught:
            built(OmegaConf.create(tree() | node), f"{HERE}.")
        said, error = "", caught.value
        while error is not None:
            said, error = (
                said + str(error) + repr(vars(error)),
                error.__cause__ or error.__context__,
            )
        assert HIDDEN in said and CANARY not in said and "hunter2" not in said


def test_hyper_parameters_that_lightning_logs_are_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After labs-molt#128: the key was in the run's configuration, beside everything else."""
    monkeypatch.setenv("MY_THING", CANARY)
    csv = {
        "_target_": LOGGERS + "CSVLogger",
        "save_dir": str(tmp_path),
        "name": None,
        "version": "",
    }
    model = {"_target_": f"{HERE}.Loud", "fails": False, "given": ["${oc.env:MY_THING}", 7]}
    run = built(OmegaConf.create(tree(logger={"c": csv}) | {"model": model}), f"{HERE}.")
    assert run.model.hparams["given"] == [CANARY, 7]
    run.trainer.loggers[0].log_hyperparams(run.model.hparams_initial)  # as a fit does
    run.trainer.loggers[0].save()
    saved = (tmp_path / "hparams.yaml").read_text()
    assert CANARY not in saved and "7" in saved and run.config["model"]["given"] == [HIDDEN, 7]


def test_an_error_keeps_its_kind_and_its_cause() -> None:
    cause, error = OSError(2, f"no {CANARY}", CANARY), KeyError(CANARY)
    error.__cause__ = cause
    error.add_note(f"while {CANARY} was used")
    with pytest.raises(KeyError, match=r"\*\*\*") as caught, unsaid({CANARY}, {}):
        raise error
    assert caught.value.__cause__ is cause and cause.errno == 2
    assert CANARY not in repr(cause) + str(cause) + str(error.__notes__)


def test_a_settings_file_of_a_cloned_project_sends_no_key_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B reads ./wandb/settings, and a `base_url` in it gets the user's key."""
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_BASE_URL", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    settings = tmp_path / "wandb" / "settings"
    settings.parent.mkdir()
    settings.write_text("[default]\nbase_url = https://evil.example\n")
    with pytest.raises(ValueError, match="where your key is sent.*Found: .*Do: "), job({}):
        pass
    with pytest.raises(ValueError, match="where your key is sent"):
        built(tree(logger={"w": {"_target_": LOGGERS + "WandbLogger"}}))
    settings.write_text("[default]\nproject = mine\nmode = online\n")
    with job({}):
        pass
    settings.write_text("[default]\nbase_url = https://mine.example\n")
    monkeypatch.setenv("WANDB_BASE_URL", "https://mine.example")
    with job({}):
        pass


# --- odd files and texts ------------------------------------------------------------------------------------


def test_a_long_text_is_read_in_one_go() -> None:
    """With a pattern that starts anew at every letter this takes hours."""
    for text in (
        "a" * 300_000,
        "://" * 100_000,
        "-----BEGIN PRIVATE KEY-----" * 3000,
        "eyJ" * 100_000,
    ):
        assert len(str(redacted({"x": text}, {}))) > 10


@pytest.mark.parametrize(
    "text", ["[]", "null", "1", '"a"', "[" * 50_000, '{"dense": [], "final": 1}', "\0"]
)
def test_any_file_in_the_place_of_a_report_is_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    assert not Report.is_free(tmp_path / "report.json")
    assert store.load(tmp_path, "report") is None
    with pytest.raises(ValueError, match="no report of a tuner.*Found: .*Do: "):
        TuneReport.from_dict(TuneReport().to_dict() | {"steps": float("inf")})


def test_a_configuration_given_to_a_command_runs_no_callback_of_hydra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register()
    (tmp_path / "evil.py").write_text("open('mark', 'w')\n" + EVIL)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "c.yaml").write_text(
        "hydra: {callbacks: {x: {_target_: evil.Evil}}}\ntrainer: {_target_: lightning.pytorch.Trainer}\n"
        "model: {_target_: evil.Evil}\ndata: {_target_: evil.Evil}\n"
    )
    assert main(["tune", "--config", "c.yaml"]) == 2
    assert THREE_PARTS.search(capsys.readouterr().err) and not (tmp_path / "mark").exists()
    monkeypatch.setenv("MY_THING", CANARY)
    (tmp_path / "c.yaml").write_text(
        "trainer: {_target_: lightning.pytorch.Trainer, default_root_dir: '/${oc.env:MY_THING}'}\n"
        "model: {_target_: torch.nn.Identity}\n"
    )
    assert main(["tune", "--config", "c.yaml"]) == 2
    said = capsys.readouterr().err
    assert "run's folder only" in said and CANARY not in said


@pytest.mark.parametrize("name", ["tu\0ned", "x" * 300, "\u202eyaml", "..", "."])
def test_an_odd_name_of_a_preset_is_no_crash(tmp_path: Path, name: str) -> None:
    source = PresetFile("accel files", f"preset://{tmp_path}")
    with pytest.raises(ConfigCompositionException, match=r"there is no preset"):
        source.load_config(f"accel/./{name}")


def test_every_test_that_the_security_page_names_is_there(root: Path) -> None:
    page = (root / "SECURITY.md").read_text()
    names = re.findall(r"`(?:(tests/\S+?)::)?(test_\w+\*?)`", page)
    assert len(names) > 15
    for file, name in names:
        text = (root / (file or "tests/strangers/test_files.py")).read_text()
        assert f"def {name.rstrip('*')}" in text, name
