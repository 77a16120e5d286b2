"""A project in the manner of lightning-hydra-template, which knows nothing of us, and each of our presets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors import callback_connector
from project.net import Net, rows
from project.train import train

from lightning_accel import entry
from lightning_accel._hydra_plugins import LightningAccelSearchPath, register
from lightning_accel.quantization import quantization_of

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ROOT / "tests" / "projects" / "template"
PRESETS = sorted(path.stem for path in (ROOT / "conf" / "accel").glob("*.yaml"))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(callback_connector, "_load_external_callbacks", lambda _: entry.factory())
    register()
    plugins = Plugins.instance().plugin_type_to_subclass_list
    others = [p for p in plugins[SearchPathPlugin] if p.__name__ != "LightningAccelSearchPath"]
    monkeypatch.setitem(plugins, SearchPathPlugin, [*others, LightningAccelSearchPath])
    with initialize_config_dir(version_base="1.3", config_dir=str(PROJECT / "configs")):
        yield tmp_path


pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
        "ignore:Checkpoint directory",
        "ignore:the teacher is hardly better than guessing",
    ),
]

CHEAP = {  # what a part of a preset is given here, so that a test takes a second
    "compile": ["+callbacks.compilation.backend=eager"],
    "amp": ["callbacks.precision.plugin.precision=bf16-mixed"],
    "distill": [],
    "auto": [
        "+callbacks.tuning.budget_s=0.5",
        "+callbacks.tuning.cache=false",
        "+callbacks.tuning.techniques=memory_format",
    ],
    "prune": [],
    "int8": ["callbacks.quantization.when=1"],
    "deploy": ["+callbacks.deploy.formats=[export]", "+callbacks.deploy.min_speedup=0.001"],
    "none": [],
}


def overrides(preset: str) -> list[str]:
    cheap = [override for part in preset.split("_") for override in CHEAP[part]]
    return [f"+accel={preset}", *cheap, *([] if preset == "auto" else ["~callbacks.report"])]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_acts_in_a_project_of_the_template(
    project: Path, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = overrides(preset)
    if preset == "distill":
        train(compose("train"))
        more += ["callbacks.distillation.teacher=out/checkpoints/last.ckpt"]
    cfg = compose("train", more)
    assert cfg.precision == "32-true" and cfg.memory == "8GB"
    plain, _ = train(compose("train", ["paths.output_dir=plain"]))
    model, trainer = train(cfg)
    parts = preset.split("_")
    assert (torch.bfloat16 in model.dtypes) == ("amp" in parts)
    assert (model.net[0].out_features == 8) == ("prune" in parts)
    names = {type(callback).__name__ for callback in trainer.callbacks}  # type: ignore[attr-defined]
    assert {"ModelCheckpoint", "EarlyStopping"} <= names, "the project's own stay"
    assert ("BlockCompile" in names) == ("compile" in parts)
    assert ("AutoTune" in names) == ("auto" in parts)
    assert bool(quantization_of(model)) == ("int8" in parts)
    assert ("Deploy" in names) == ("deploy" in parts)
    if parts == ["distill"]:
        assert not torch.equal(model.net[0].weight, plain.net[0].weight)
    trainer.test(model, rows(), ckpt_path="best", weights_only=True)
    assert model.net[0].out_features == (8 if "prune" in parts else 16)


def test_a_baseline_of_the_template_is_plain_lightning(project: Path) -> None:
    ours, trainer = train(compose("train"))
    assert all("lightning_accel" not in type(c).__module__ for c in trainer.callbacks)  # type: ignore[attr-defined]
    torch.manual_seed(0)
    theirs = Net(optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, barebones=False
    ).fit(theirs, rows(), rows())
    assert torch.equal(ours.net[0].weight, theirs.net[0].weight)


def test_a_debug_config_that_empties_callbacks_takes_a_preset_in(project: Path) -> None:
    model, trainer = train(compose("train", ["debug=default", "+accel=prune", "~callbacks.report"]))
    assert model.net[0].out_features == 8 and trainer.logger is None
    model, _ = train(compose("train", ["callbacks=none", *overrides("amp_prune")]))
    assert model.net[0].out_features == 8


def test_distillation_without_a_teacher_says_how_to_get_one(project: Path) -> None:
    with pytest.raises(Exception, match="there is no teacher") as caught:
        train(compose("train", ["+accel=distill"]))
    assert "callbacks.distillation.teacher=path.ckpt" in str(caught.value)


def test_a_resumed_run_of_the_template_goes_on_pruned(project: Path) -> None:
    more = overrides("amp_prune")
    first, _ = train(compose("train", [*more, "callbacks.pruning.when=1"]))
    longer = ["trainer.max_epochs=5", "+ckpt_path=out/checkpoints/last.ckpt"]
    second, trainer = train(compose("train", [*more, "callbacks.pruning.when=1", *longer]))
    assert first.net[0].out_features == second.net[0].out_features == 8
    assert trainer.current_epoch == 5
