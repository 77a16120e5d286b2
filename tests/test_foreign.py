"""Hydra apps that know nothing of this package and build their own Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException, MissingConfigException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.io import TorchCheckpointIO
from omegaconf import DictConfig

from lightning_accel import AutocastPrecision, BlockCompile, StructuredPruning
from lightning_accel._hydra_plugins import LightningAccelSearchPath, register
from lightning_accel.bridge import ModelEdit
from lightning_accel.errors import AccelError
from lightning_accel.precision import UsePrecision
from lightning_accel.surgery import Stage

CONFIG = """
callbacks:
  early: {_target_: lightning.pytorch.callbacks.LambdaCallback}
trainer:
  _target_: lightning.pytorch.Trainer
  accelerator: cpu
  max_epochs: 2
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
"""


class Tiny(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        )
        self.dtypes: set[torch.dtype] = set()

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        out = self.net(batch)
        self.dtypes.add(out.dtype)
        return out.float().square().mean()

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.randn(16, 4), 4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    register()
    # An install copies the plugin; the one of this checkout is what is tested.
    plugins = Plugins.instance().plugin_type_to_subclass_list
    others = [p for p in plugins[SearchPathPlugin] if p.__name__ != "LightningAccelSearchPath"]
    monkeypatch.setitem(plugins, SearchPathPlugin, [*others, LightningAccelSearchPath])
    (tmp_path / "trainer").mkdir()
    (tmp_path / "train.yaml").write_text(CONFIG)
    (tmp_path / "trainer" / "cpu.yaml").write_text("accelerator: cpu\n")
    with initialize_config_dir(version_base="1.3", config_dir=str(tmp_path)):
        yield tmp_path


def callbacks_of(cfg: DictConfig) -> list[Callback]:
    """Build callbacks as lightning-hydra-template does."""
    return [
        hydra.utils.instantiate(node)
        for node in cfg.callbacks.values()
        if isinstance(node, DictConfig) and "_target_" in node
    ]


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize("plugins", [None, [TorchCheckpointIO()]], ids=["none", "its own"])
def test_a_preset_acts_in_an_app_that_builds_its_own_trainer(folder: Path, plugins: Any) -> None:
    more = ["callbacks.precision.plugin.precision=bf16-mixed", "~callbacks.report"]
    cfg = compose("train", ["+accel=amp_prune", *more])
    given: dict[str, Any] = {} if plugins is None else {"plugins": plugins}
    trainer = hydra.utils.instantiate(
        cfg.trainer, callbacks=callbacks_of(cfg), logger=False, **given
    )
    model = Tiny()
    trainer.fit(model)
    assert model.dtypes == {torch.bfloat16}
    assert [m.out_features for m in model.net if hasattr(m, "out_features")] == [4, 2]


def test_a_preset_computes_what_the_plugin_of_a_trainer_does(
    trainer_kwargs: dict[str, Any],
) -> None:
    weights = []
    for given in (
        {"callbacks": [UsePrecision(AutocastPrecision("bf16-mixed"))]},
        {"plugins": [AutocastPrecision("bf16-mixed")]},
    ):
        torch.manual_seed(0)
        model = Tiny()
        Trainer(**trainer_kwargs | given).fit(model)  # type: ignore[operator]
        weights.append(model.net[0].weight)
    assert torch.equal(*weights)


def test_two_precisions_are_refused(trainer_kwargs: dict[str, Any]) -> None:
    use = UsePrecision(AutocastPrecision("bf16-mixed"))
    mine = MixedPrecision("bf16-mixed", "cpu")
    with pytest.raises(AccelError, match="one precision"):
        Trainer(**trainer_kwargs | {"callbacks": [use], "plugins": [mine]}).fit(Tiny())


def test_edits_come_in_order_and_are_each_set_up_once(trainer_kwargs: dict[str, Any]) -> None:
    seen: list[str] = []

    class Early(ModelEdit):
        stage = Stage.SHAPE

        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            super().setup(trainer, pl_module, stage)
            seen.append(type(self).__name__)

    class Middle(Early):
        stage = Stage.MEMORY

    class Late(Early):
        stage = Stage.COMPILE

    other = Callback()
    given = [Late(), other, Early(), Middle()]
    trainer = Trainer(**trainer_kwargs | {"callbacks": given})
    trainer.fit(Tiny())
    assert seen == ["Early", "Middle", "Late"]
    held = [c for c in trainer.callbacks if c in given]  # type: ignore[attr-defined]
    assert [type(c).__name__ for c in held] == ["Early", "Callback", "Middle", "Late"]


def test_the_presets_own_order_needs_no_sorting_by_the_app(trainer_kwargs: dict[str, Any]) -> None:
    edits = [BlockCompile(backend="eager"), StructuredPruning(ratio=0.5, when=1)]
    model = Tiny()
    Trainer(**trainer_kwargs | {"callbacks": edits, "max_epochs": 2}).fit(model)
    assert model.net[0].out_features == 4


UNNAMED = {
    "a list": ("callbacks: [{_target_: a.B}, {_target_: a.C}]\n", "2 without names"),
    "no entries": ("callbacks: []\n", "0 without names"),
    "from a group": ("defaults: [callbacks: many, _self_]\n", "1 without names"),
    "an interpolation": (
        "callbacks: ${oc.dict.values:named}\nnamed: {early: {_target_: a.B}}\n",
        r"the interpolation \$\{oc.dict.values:named\}",
    ),
}


@pytest.mark.parametrize("case", UNNAMED)
@pytest.mark.parametrize("override", ["+accel=prune", "+accel/pruning=taylor", "+accel=[amp,auto]"])
def test_callbacks_without_names_are_refused_in_words(
    folder: Path, case: str, override: str
) -> None:
    config, found = UNNAMED[case]
    (folder / "callbacks").mkdir()
    (folder / "callbacks" / "many.yaml").write_text("- {_target_: a.B}\n")
    (folder / "train.yaml").write_text(config)
    plain = compose("train")
    with pytest.raises(ConfigCompositionException, match=f"by name.*Found: {found}.*Do: write"):
        compose("train", [override])
    assert compose("train") == plain
    assert compose("train", ["+accel/pruning=none"]) == plain, "nothing is added"


@pytest.mark.parametrize("config", ["callbacks: null\n", "callbacks: {}\n", "callbacks: ???\n", ""])
def test_callbacks_that_are_empty_take_a_preset_in(folder: Path, config: str) -> None:
    (folder / "train.yaml").write_text(config + "lr: 1\n")
    cfg = compose("train", ["+accel=amp_prune", "lr=2"])
    assert list(cfg.callbacks) == ["precision", "report", "pruning"] and cfg.lr == 2


@pytest.mark.slow
def test_a_trainer_whose_list_reads_the_named_callbacks_needs_nothing_else(folder: Path) -> None:
    listed = CONFIG + "  logger: false\n  callbacks: ${oc.dict.values:callbacks}\n"
    (folder / "train.yaml").write_text(listed)
    cfg = compose("train", ["+accel=[compile,prune]", "+callbacks.compilation.backend=eager"])
    del cfg.callbacks.report
    model = Tiny()
    hydra.utils.instantiate(cfg.trainer).fit(model)
    assert model.net[0].out_features == 4


def test_our_examples_do_not_answer_for_a_missing_file(folder: Path) -> None:
    (folder / "train.yaml").write_text("defaults: [trainer: cpu, _self_]\n" + CONFIG)
    with pytest.raises(MissingConfigException):
        compose("train", ["trainer=ddp"])


@pytest.mark.parametrize("group", ["memory", "precision", "loading", "tuning", "attention"])
def test_a_missing_group_of_an_app_is_hydras_own_error(folder: Path, group: str) -> None:
    with pytest.raises(ConfigCompositionException, match=f"Could not override '{group}'"):
        compose("train", [f"{group}=none"])
    (folder / "train.yaml").write_text(f"defaults: [{group}: none, _self_]\n" + CONFIG)
    with pytest.raises(MissingConfigException, match=f"Could not find '{group}/none'") as caught:
        compose("train", ["+accel=amp_compile_prune"])
    assert "Available options" not in str(caught.value), "no group of ours was looked into"


def test_a_file_of_the_apps_does_not_answer_for_a_technique(folder: Path) -> None:
    for group in ("precision", "pruning", "compilation"):
        (folder / group).mkdir()
        for name in ("auto", "magnitude", "blocks"):
            (folder / group / f"{name}.yaml").write_text("theirs: true\n")
    cfg = compose("train", ["+accel=amp_compile_prune", "+precision=auto"])
    assert {"precision", "pruning", "compilation"} <= set(cfg.callbacks)
    assert cfg.precision == {"theirs": True}


@pytest.mark.parametrize(
    "name",
    [
        *("+accelerator=tpu", "+teacher=vit", "+data=digits", "+model=resnet"),
        *("+memory=budget", "+precision=bf16", "+loading=auto", "+pruning=taylor", "+loop=lean"),
    ],
)
def test_no_generic_group_of_ours_travels(folder: Path, name: str) -> None:
    group, _, value = name.removeprefix("+").partition("=")
    assert compose("train", [name])[group] == value, "a plain string: no file of ours was read"
