"""A project in the manner of lightning-hydra-template, which knows nothing of us, and each of our presets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.connectors import callback_connector
from omegaconf import DictConfig

from lightning_accel import entry
from lightning_accel._hydra_plugins import LightningAccelSearchPath, register
from lightning_accel.quantization import quantization_of

ROOT = Path(__file__).resolve().parents[1]
PRESETS = sorted(path.stem for path in (ROOT / "conf" / "accel").glob("*.yaml"))

PROJECT = {
    "train.yaml": """
defaults: [_self_, model: net, callbacks: default, logger: csv, trainer: default, debug: null]
task_name: train
tags: [dev]
precision: 32-true     # settings of the project's own, under names that we have groups for
memory: 8GB
paths: {output_dir: out}
""",
    "model/net.yaml": """
_target_: test_template.Net
optimizer: {_target_: torch.optim.SGD, _partial_: true, lr: 0.1}
""",
    "callbacks/default.yaml": """
defaults: [model_checkpoint, early_stopping]
""",
    "callbacks/model_checkpoint.yaml": """
model_checkpoint:
  _target_: lightning.pytorch.callbacks.ModelCheckpoint
  dirpath: ${paths.output_dir}/checkpoints
  monitor: val/loss
  save_last: true
""",
    "callbacks/early_stopping.yaml": """
early_stopping:
  _target_: lightning.pytorch.callbacks.EarlyStopping
  monitor: val/loss
  patience: 100
""",
    "callbacks/none.yaml": "",
    "logger/csv.yaml": """
csv: {_target_: lightning.pytorch.loggers.CSVLogger, save_dir: "${paths.output_dir}"}
""",
    "trainer/default.yaml": """
_target_: lightning.pytorch.Trainer
default_root_dir: ${paths.output_dir}
max_epochs: 3
accelerator: cpu
devices: 1
precision: ${precision}
log_every_n_steps: 1
enable_progress_bar: false
enable_model_summary: false
""",
    "debug/default.yaml": """
# @package _global_
callbacks: null
logger: null
trainer: {max_epochs: 2}
""",
}


class Net(LightningModule):
    def __init__(self, optimizer: Any = None) -> None:
        super().__init__()
        self.make_optimizer = optimizer
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)
        )
        self.dtypes: set[torch.dtype] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        out = self(batch[0])
        self.dtypes.add(out.dtype)
        return torch.nn.functional.cross_entropy(out.float(), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", torch.nn.functional.cross_entropy(self(batch[0]).float(), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", torch.nn.functional.cross_entropy(self(batch[0]).float(), batch[1]))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


def rows() -> Any:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :3].argmax(1)), 8)


def instantiate_callbacks(cfg: DictConfig | None) -> list[Callback]:
    """As the template has it."""
    if not cfg:
        return []
    nodes = [node for node in cfg.values() if isinstance(node, DictConfig) and "_target_" in node]
    return [hydra.utils.instantiate(node) for node in nodes]


def instantiate_loggers(cfg: DictConfig | None) -> list[Logger]:
    return [hydra.utils.instantiate(node) for node in (cfg or {}).values()]


def train(cfg: DictConfig) -> tuple[Net, Trainer]:
    """What the template's `train` does."""
    torch.manual_seed(0)
    model: Net = hydra.utils.instantiate(cfg.model)
    callbacks = instantiate_callbacks(cfg.get("callbacks"))
    logger = instantiate_loggers(cfg.get("logger"))
    trainer: Trainer = hydra.utils.instantiate(cfg.trainer, callbacks=callbacks, logger=logger)
    trainer.fit(model, rows(), rows(), ckpt_path=cfg.get("ckpt_path"))
    return model, trainer


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(callback_connector, "_load_external_callbacks", lambda _: entry.factory())
    register()
    plugins = Plugins.instance().plugin_type_to_subclass_list
    others = [p for p in plugins[SearchPathPlugin] if p.__name__ != "LightningAccelSearchPath"]
    monkeypatch.setitem(plugins, SearchPathPlugin, [*others, LightningAccelSearchPath])
    for name, text in PROJECT.items():
        path = tmp_path / "configs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("test_template.Net", f"{__name__}.Net"))
    with initialize_config_dir(version_base="1.3", config_dir=str(tmp_path / "configs")):
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
