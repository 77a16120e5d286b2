"""Settings that did nothing, as public reports have them: misspelt, merged with another's, or changed on resume.

The truth is what a plain Trainer does that gets the same settings by hand, or plain PyTorch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import BlockCompile, FrozenPredict, StructuredPruning
from lightning_accel._hydra_plugins import register
from lightning_accel.recipe import build

APP = """
trainer: {_target_: lightning.pytorch.Trainer, max_epochs: 2, accelerator: cpu, logger: false}
model: {_target_: lightning.pytorch.demos.boring_classes.BoringModel}
callbacks:
  meter: {_target_: lightning_accel.StepMeter}
  pruning:
    _target_: lightning_accel.StructuredPruning
    target: {_target_: lightning_accel.Macs, share: 0.3}
    when: 1
"""


@pytest.fixture
def composed(tmp_path: Path) -> Callable[..., Any]:
    register()
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "app.yaml").write_text(APP)

    def go(*overrides: str) -> Any:
        with initialize_config_dir(str(tmp_path / "conf"), version_base="1.3"):
            return compose("app", list(overrides))

    return go


TYPED = {
    "+callbacks.meter.every_step=3": "`callbacks.meter.every_step` is no argument of StepMeter.*every_n_steps`",
    "+trainer.max_epoch=3": "`trainer.max_epoch` is no argument of Trainer.*say `trainer.max_epochs`",
    "+callback.stop._target_=lightning.pytorch.callbacks.Timer": "nothing reads `callback`.*say `callbacks`",
    "+accel.compile=true": r"`accel\\.compile` is the mark.*say `\\+accel=compile`",
    "+callbacks.pruning.target.shares=0.2": "`callbacks.pruning.target.shares` is no argument of Macs.*share`",
}


@pytest.mark.parametrize("typed", TYPED)
def test_an_added_key_with_a_typo_is_no_key_that_is_dropped(
    composed: Callable[..., Any], typed: str
) -> None:
    """AshleyLab/OpenMHC#14: `+` lets Hydra take any key, and the run goes on with the defaults."""
    cfg = composed(typed, *(["~callbacks"] if "accel" in typed else []))
    with pytest.raises(ValueError, match=TYPED[typed].replace("\\\\", "\\")):
        build(cfg, allow=("lightning.pytorch.demos.",))


def test_a_class_within_a_callback_keeps_to_its_own_arguments(composed: Callable[..., Any]) -> None:
    """hydra#1896: merging gives the new class what is left of the other's arguments."""
    with pytest.warns(UserWarning, match="callbacks.pruning.target.*share=0.3"):
        cfg = composed("+accel/pruning=latency")
    assert cfg.callbacks.pruning.target == {"_target_": "lightning_accel.Macs", "share": 0.3}
    assert OmegaConf.select(cfg, "callbacks.pruning.when") == 1, "of the app"
    run = build(cfg, allow=("lightning.pytorch.demos.",))
    assert any(isinstance(c, StructuredPruning) for c in run.trainer.callbacks)


@pytest.mark.parametrize("word", ["optioal", "overide", "Optional"])
def test_a_misspelt_word_in_the_defaults_of_a_preset_is_refused(
    composed: Callable[..., Any], tmp_path: Path, word: str
) -> None:
    """hydra#1951: Hydra drops what it does not know before a group, and composes something else."""
    text = f"# @package _global_\ndefaults: [amp, {{{word} /accel/precision: bf16}}]\n"
    (tmp_path / "tuned.yaml").write_text(text)
    with pytest.raises(ConfigCompositionException, match="name presets only.*Do: "):
        composed("+accel=./tuned.yaml")


# --- resume ----------------------------------------------------------------------------------------------


class Scored(LightningModule):
    """Whose score falls from the third epoch on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("score", 1.0 if self.current_epoch < 1 else 0.5)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(4, 4)), 4)


@pytest.mark.parametrize(("patience", "max_drop", "stays"), [(3, 0.9, True), (1, 0.1, False)])
def test_how_long_a_prune_is_watched_may_change_on_resume(
    trainer_kwargs: dict[str, Any], tmp_path: Path, patience: int, max_drop: float, stays: bool
) -> None:
    """mila-iqia/cookiecutter-pyml#58 and tier4/autoware-ml#66: a new patience was lost to that of the checkpoint."""

    def guarded(patience: int, max_drop: float) -> StructuredPruning:
        judged = {"monitor": "score", "patience": patience, "max_drop": max_drop}
        return StructuredPruning(ratio=0.5, when=1, **judged)

    def fit(*callbacks: Callback, ckpt: Path | None = None) -> Trainer:
        kwargs = {**trainer_kwargs, "max_epochs": 4, "limit_val_batches": 1}
        trainer = Trainer(**{**kwargs, "enable_checkpointing": True}, callbacks=list(callbacks))
        trainer.fit(Scored(), loader(), loader(), ckpt_path=ckpt)
        return trainer

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        each = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
        fit(guarded(2, 0.2), each)
        heard.clear()
        trainer = fit(guarded(patience, max_drop), ckpt=tmp_path / "epoch=1.ckpt")
    assert not [w for w in heard if "something else" in str(w.message)], (
        "it holds, so nothing is said"
    )
    assert (trainer.lightning_module.net[0].out_features == 8) is stays


# --- what a function held by a module reads --------------------------------------------------------------


class World:
    factor = 1.0


def scaled(x: Tensor) -> Tensor:
    return x * World.factor


class Held(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(*[Block(nn.Linear(4, 4)) for _ in range(2)])

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        World.factor = 1.0 if batch_idx < 2 else 10.0
        return self.net(batch[0])


class Block(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.layer(x))


@pytest.mark.usefixtures("clean_dynamo")
@pytest.mark.filterwarnings("ignore:.*Trying to infer the `batch_size`")
@pytest.mark.parametrize("edit", [FrozenPredict, BlockCompile])
def test_a_class_attribute_behind_a_held_function_is_read_anew(
    trainer_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch, edit: Any
) -> None:
    """pytorch#176851: compiled code keeps the value of a class attribute from its first call."""
    monkeypatch.setattr(World, "factor", 1.0)
    found = []
    for callbacks in ([], [edit(backend="eager", check_every_n_calls=None)]):
        model = Held()
        for block in model.net:
            block.act = scaled
        data = DataLoader(
            TensorDataset(torch.randn(24, 4, generator=torch.Generator().manual_seed(1))), 4
        )
        trainer = Trainer(**trainer_kwargs, callbacks=callbacks)
        found.append(trainer.predict(model, data))
    assert all(map(torch.equal, *found))
