"""Apps that build their Trainer without the callbacks of their configuration: refused, or given them."""

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
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.connectors import callback_connector
from omegaconf import DictConfig, OmegaConf

from lightning_accel import attach, entry
from lightning_accel._hydra_plugins import LightningAccelSearchPath, register
from lightning_accel.errors import AccelError
from lightning_accel.recipe import build

CONFIG = """
trainer:
  _target_: lightning.pytorch.Trainer
  accelerator: cpu
  max_epochs: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
"""
LISTED = CONFIG + "  callbacks: [{_target_: lightning.pytorch.callbacks.LambdaCallback}]\n"
BARE = ["~callbacks.report"]


class Tiny(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        )

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.net(batch)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self(batch).square().mean()

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.randn(16, 4), 4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    @property
    def widths(self) -> list[int]:
        return [layer.out_features for layer in self.net if hasattr(layer, "out_features")]


def fit(trainer: Trainer) -> list[int]:
    """Train a fresh module; the widths of its layers say whether anything was pruned."""
    model = Tiny()
    trainer.fit(model)
    return model.widths


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if installed: Lightning finds the entry point, Hydra the plugin of this checkout."""
    monkeypatch.setattr(callback_connector, "_load_external_callbacks", lambda _: entry.factory())
    monkeypatch.setattr(attach, "_served", [])
    register()
    plugins = Plugins.instance().plugin_type_to_subclass_list
    others = [p for p in plugins[SearchPathPlugin] if p.__name__ != "LightningAccelSearchPath"]
    monkeypatch.setitem(plugins, SearchPathPlugin, [*others, LightningAccelSearchPath])


@pytest.fixture(params=[CONFIG, LISTED], ids=["no callbacks", "a list in trainer"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "train.yaml").write_text(request.param)
    with initialize_config_dir(version_base="1.3", config_dir=str(tmp_path)):
        yield tmp_path


pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"
)


def test_a_trainer_without_the_callbacks_of_its_preset_is_refused(folder: Path) -> None:
    cfg = compose("train", ["+accel=prune"])
    trainer = hydra.utils.instantiate(cfg.trainer)
    with pytest.raises(AccelError, match=r"callbacks\.pruning`, `callbacks\.report") as caught:
        fit(trainer)
    for part in ("StructuredPruning, AccelReport", "Do: ", "+accel.attach=true", "cfg.callbacks"):
        assert part in str(caught.value)


def test_attach_gives_the_trainer_what_was_asked_for(folder: Path) -> None:
    cfg = compose("train", ["+accel=prune", "+accel.attach=true", *BARE])
    assert fit(hydra.utils.instantiate(cfg.trainer)) == [4, 2]


@pytest.mark.parametrize("word", ["maybe", "1"])
def test_attach_is_true_or_false(folder: Path, word: str) -> None:
    trainer = hydra.utils.instantiate(
        compose("train", ["+accel=prune", f"+accel.attach={word}"]).trainer
    )
    with pytest.raises(TypeError, match=r"`accel\.attach` is true or false\. Found: .*Do: "):
        fit(trainer)


def test_attach_misspelt_is_refused_whoever_has_the_callbacks(folder: Path) -> None:
    cfg = compose("train", ["+accel=prune", "+accel.attch=true", *BARE])
    trainer = hydra.utils.instantiate(
        cfg.trainer, callbacks=list(hydra.utils.instantiate(cfg.callbacks).values())
    )
    with pytest.raises(ValueError, match=r"`accel\.attch`.*Do: say `\+accel\.attach=true`"):
        trainer.fit(Tiny())


@pytest.mark.slow
def test_attach_keeps_to_the_order_of_stages_and_to_the_list_of_users(folder: Path) -> None:
    eager = "+callbacks.compilation.backend=eager"
    cfg = compose("train", ["+accel=[compile,prune]", "+accel.attach=true", eager, *BARE])
    trainer = hydra.utils.instantiate(cfg.trainer)
    given = [
        type(c).__name__ for c in trainer.callbacks if type(c).__name__ != "ConfiguredCallbacks"
    ]
    assert fit(trainer) == [4, 2]
    now = [type(c).__name__ for c in trainer.callbacks if type(c).__name__ != "ConfiguredCallbacks"]
    assert now == [*given, "StructuredPruning", "BlockCompile"]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(attach, "rank_zero_info", lines.append)
    return lines


def test_an_app_that_says_so_may_train_another_network_first(folder: Path, said: list[str]) -> None:
    cfg = compose("train", ["+accel=prune", "+accel.attach=false", *BARE])
    assert fit(hydra.utils.instantiate(cfg.trainer)) == [8, 2]
    assert "`callbacks.pruning` (StructuredPruning), as `accel.attach=false` says" in said[0]


@pytest.mark.parametrize("made", ["from its node", "from a part that is passed on"])
def test_a_trainer_from_a_node_of_its_own_is_another_one(
    folder: Path, said: list[str], made: str
) -> None:
    file = folder / "train.yaml"
    text = OmegaConf.load(file)
    OmegaConf.save({**text, "teacher": text}, file)
    cfg = compose("train", ["+accel=prune", "+accel.attach=true", *BARE])

    def train(part: DictConfig) -> list[int]:
        kwargs = {k: v for k, v in part.trainer.items() if k not in ("_target_", "callbacks")}
        return fit(Trainer(**kwargs))

    first = cfg.teacher
    found = fit(hydra.utils.instantiate(first.trainer)) if "node" in made else train(first)
    assert found == [8, 2]
    assert "(StructuredPruning), made from `teacher.trainer`: a later one" in said[0]
    assert fit(hydra.utils.instantiate(cfg.trainer)) == [4, 2]


def test_the_only_trainer_is_the_one_that_is_meant_wherever_its_node_is(folder: Path) -> None:
    file = folder / "train.yaml"
    OmegaConf.save({"stage": OmegaConf.load(file)}, file)
    cfg = compose("train", ["+accel=prune", *BARE])
    with pytest.raises(AccelError, match="without callbacks"):
        fit(hydra.utils.instantiate(cfg.stage.trainer))


def test_a_configuration_that_an_object_keeps_is_found(folder: Path) -> None:
    class App:
        def __init__(self) -> None:
            self.cfg = compose("train", ["+accel=prune", *BARE])

        def train(self) -> list[int]:
            return fit(Trainer(**arguments(self.cfg)))

    with pytest.raises(AccelError, match="without callbacks"):
        App().train()


def test_once_a_trainer_has_had_them_others_may_go_without(folder: Path) -> None:
    cfg = compose("train", ["+accel=prune", *BARE])
    callbacks = list(hydra.utils.instantiate(cfg.callbacks).values())
    assert fit(hydra.utils.instantiate(cfg.trainer, callbacks=callbacks)) == [4, 2]
    assert fit(hydra.utils.instantiate(cfg.trainer)) == [8, 2]
    other = compose("train", ["+accel=prune", *BARE])
    with pytest.raises(AccelError, match="without callbacks"):
        fit(hydra.utils.instantiate(other.trainer))


def test_a_callback_that_is_picked_out_of_a_preset_is_missed(folder: Path) -> None:
    cfg = compose("train", ["+accel=prune"])
    only = [hydra.utils.instantiate(cfg.callbacks.report)]
    with pytest.raises(AccelError, match=r"Found: `callbacks\.pruning` \(StructuredPruning\)"):
        fit(hydra.utils.instantiate(cfg.trainer, callbacks=only))


def arguments(cfg: DictConfig) -> dict[str, Any]:
    found = OmegaConf.to_container(cfg.trainer)
    assert isinstance(found, dict)
    return {key: value for key, value in found.items() if key not in ("_target_", "callbacks")}


def test_a_trainer_that_is_made_from_keywords_is_seen_too(folder: Path) -> None:
    def train(cfg: DictConfig) -> list[int]:
        return fit(Trainer(**arguments(cfg)))

    with pytest.raises(AccelError, match="without callbacks"):
        train(compose("train", ["+accel=prune"]))


def test_a_baseline_beside_a_preset_is_not_mistaken_for_it(folder: Path) -> None:
    fast, baseline = compose("train", ["+accel=prune"]), compose("train")
    assert fit(hydra.utils.instantiate(baseline.trainer)) == [8, 2]
    with pytest.raises(AccelError, match="without callbacks"):
        fit(hydra.utils.instantiate(fast.trainer))


def test_other_stages_and_other_apps_are_left_alone(folder: Path) -> None:
    assert fit(hydra.utils.instantiate(compose("train").trainer)) == [8, 2]
    odd = ["+callbacks=null", "+callbacks=3", "+callbacks=[1]", "+callbacks={a: {b: 1}, c: 2}"]
    for override in odd:
        cfg = compose("train", [override])
        assert not [
            c
            for c in hydra.utils.instantiate(cfg.trainer).callbacks
            if "ConfiguredCallbacks" in str(c)
        ]
    cfg = compose("train", ["+accel=prune"])
    hydra.utils.instantiate(cfg.trainer).predict(Tiny(), Tiny().train_dataloader())
    cfg.accel = 3
    with pytest.raises(AccelError, match="without callbacks"):
        fit(hydra.utils.instantiate(cfg.trainer))


def test_our_own_recipe_gives_its_trainer_everything_itself(folder: Path) -> None:
    (folder / "train.yaml").write_text(CONFIG)
    cfg = compose("train", ["+accel=prune", "+model._target_=test_attach.Tiny", *BARE])
    run = build(cfg, allow=(f"{Tiny.__module__}.",))
    assert not [c for c in run.trainer.callbacks if type(c).__name__ == "ConfiguredCallbacks"]  # type: ignore[attr-defined]


def test_what_is_attached_may_only_come_from_where_a_recipe_may_build(folder: Path) -> None:
    cfg = compose("train", ["+accel=prune", "+accel.attach=true"])
    cfg.callbacks.pruning.importance = {"_target_": "os.system", "command": "true"}
    with pytest.raises(ValueError, match=r"os\.system` is not allowed"):
        fit(hydra.utils.instantiate(cfg.trainer))
