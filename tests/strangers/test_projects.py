"""Reports about other people's projects, Hydra's and LightningCLI's, with our callbacks put where theirs were."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.connectors import callback_connector
from omegaconf import DictConfig, OmegaConf

from lightning_accel import Distillation, StructuredPruning, Teacher, entry, load_from_checkpoint
from lightning_accel._hydra_plugins import LightningAccelSearchPath, register
from lightning_accel.errors import AccelError, UnsafeFile

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore:the teacher is hardly better than guessing",
)
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "max_epochs": 2,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
TRAINER = (
    "trainer: {_target_: lightning.pytorch.Trainer, accelerator: cpu, max_epochs: 2, logger: false,\n"
    + ("  enable_checkpointing: false, enable_progress_bar: false, enable_model_summary: false")
)
PRUNE = ["+accel=prune", "~callbacks.report"]


class Reported(LightningModule):
    def __init__(self, optimizer: Any = None, cfg: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # as the template's modules do
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        )
        self.widths: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.widths.append(self.net[0].out_features)
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def train_dataloader(self) -> Any:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :2].argmax(1)), 4)

    def configure_optimizers(self) -> Any:
        make = self.hparams.optimizer or functools.partial(torch.optim.SGD, lr=0.1)  # type: ignore[attr-defined]
        return make(self.parameters())


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., DictConfig]]:
    """Write the reporter's files and compose them, with our package as an installation has it."""
    monkeypatch.setattr(callback_connector, "_load_external_callbacks", lambda _: entry.factory())
    register()
    plugins = Plugins.instance().plugin_type_to_subclass_list
    others = [p for p in plugins[SearchPathPlugin] if p.__name__ != "LightningAccelSearchPath"]
    monkeypatch.setitem(plugins, SearchPathPlugin, [*others, LightningAccelSearchPath])

    def composed(*overrides: str, **files: str) -> DictConfig:
        for name, text in files.items():
            path = tmp_path / f"{name.replace('__', '/')}.yaml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return compose("config", list(overrides))

    with initialize_config_dir(version_base="1.3", config_dir=str(tmp_path)):
        yield composed


def pruned(trainer: Trainer, model: Reported | None = None) -> bool:
    """Train; whether the second epoch ran with half of the units."""
    model = model or Reported()
    trainer.fit(model)
    assert model.widths[:4] == [8] * 4
    return model.widths[4:] == [4] * 4


def test_hydra_1939_a_list_made_by_interpolation_is_not_lost(
    project: Callable[..., DictConfig],
) -> None:
    """hydra#1939: `callbacks: ${oc.dict.values:_callback_dict}`, the way that maintainers recommend.

    A preset that is merged over it takes the place of all of the reporter's callbacks.
    """
    theirs = "{stop: {_target_: lightning.pytorch.callbacks.LambdaCallback}}"
    dicts = (
        f"_callback_dict: {theirs}\ncallbacks: ${{oc.dict.values:_callback_dict}}\n{TRAINER}}}\n"
    )
    with pytest.raises(ConfigCompositionException, match="interpolation .*_callback_dict.* Do: "):
        project(*PRUNE, config=dicts)
    # What the error advises: callbacks by name, and the interpolation where the list is needed.
    advised = f"callbacks: {theirs}\n{TRAINER},\n  callbacks: '${{oc.dict.values:callbacks}}'}}\n"
    trainer = hydra.utils.instantiate(project(*PRUNE, config=advised).trainer)
    assert "LambdaCallback" in [type(c).__name__ for c in trainer.callbacks]
    assert pruned(trainer)


def test_hydra_2027_a_group_that_is_a_list(project: Callable[..., DictConfig]) -> None:
    """hydra#2027, hydra#1813, genima#3: "Cannot merge DictConfig with ListConfig", and no key."""
    listed = "- {_target_: lightning.pytorch.callbacks.LambdaCallback}\n"
    config = f"defaults: [callbacks: many, _self_]\n{TRAINER}}}\n"
    with pytest.raises(
        ConfigCompositionException, match="`callbacks` of this app .*1 without names"
    ):
        project(*PRUNE, config=config, callbacks__many=listed)


def values(**callbacks: Callback) -> list[Callback]:
    """Return the callbacks that a node holds."""
    return list(callbacks.values())


@pytest.mark.slow
def test_template_5_callbacks_that_a_function_collects(
    project: Callable[..., DictConfig],
) -> None:
    """yet-another-lightning-hydra-template#5: `_target_` of the whole node is a function that lists it."""
    node = f"{{_target_: {__name__}.values, stop: {{_target_: lightning.pytorch.callbacks.LambdaCallback}}}}"
    at_root = project(*PRUNE, config=f"callbacks: {node}\n{TRAINER}}}\n")
    callbacks = hydra.utils.instantiate(at_root.callbacks)
    assert [type(c).__name__ for c in callbacks] == ["LambdaCallback", "StructuredPruning"]
    assert pruned(hydra.utils.instantiate(at_root.trainer, callbacks=callbacks))
    # The reporter has it below `trainer`, where no preset reaches.
    below = project(*PRUNE, config=f"{TRAINER},\n  callbacks: {node}}}\n")
    with pytest.raises(AccelError, match="without callbacks"):
        pruned(hydra.utils.instantiate(below.trainer))
    attached = project(*PRUNE, "+accel.attach=true")
    assert pruned(hydra.utils.instantiate(attached.trainer))


def test_template_216_nodes_that_are_not_built_recursively(
    project: Callable[..., DictConfig],
) -> None:
    """lightning-hydra-template#216: `instantiate(node, _recursive_=False)` leaves nodes inside as they are."""
    cfg = project("+accel=amp", "~callbacks.report", config=f"{TRAINER}}}\n")
    with pytest.raises(Exception, match=r"is a precision plugin. Found: .*_target_.* Do: pass"):
        hydra.utils.instantiate(cfg.callbacks.precision, _recursive_=False)


@pytest.mark.slow
def test_template_127_a_custom_callback_beside_ours(project: Callable[..., DictConfig]) -> None:
    """lightning-hydra-template#127: the reporter's own class in `callbacks`, built by the app's loop."""
    own = f"callbacks: {{mine: {{_target_: {__name__}.Counting, start: 3}}}}\n{TRAINER}}}\n"
    cfg = project(*PRUNE, config=own)
    callbacks = [hydra.utils.instantiate(node) for node in cfg.callbacks.values()]
    assert pruned(hydra.utils.instantiate(cfg.trainer, callbacks=callbacks))
    assert callbacks[0].start == 3 + 8


class Counting(Callback):
    def __init__(self, start: int) -> None:
        self.start = start

    def on_train_batch_end(self, *args: Any) -> None:
        self.start += 1


@pytest.mark.parametrize(
    "hyper",
    [
        {"optimizer": functools.partial(torch.optim.SGD, lr=0.1)},
        {"cfg": OmegaConf.create({"a": [1]})},
    ],
    ids=["partial", "DictConfig"],
)
def test_template_456_hyperparameters_that_are_objects(hyper: Any, tmp_path: Path) -> None:
    """lightning-hydra-template#456, Lightning#4676, Lightning#6589: a checkpoint that holds the
    partial optimizer, or the whole configuration, and is to be read again."""
    trainer = Trainer(**QUIET, callbacks=[StructuredPruning(0.5, when=1)])
    model = Reported(**hyper)
    assert pruned(trainer, model)
    trainer.save_checkpoint("last.ckpt")
    with pytest.raises(UnsafeFile, match=r"Found: .*(functools.partial|omegaconf).* Do: keep"):
        load_from_checkpoint(Reported, "last.ckpt")
    again = load_from_checkpoint(Reported, "last.ckpt", weights_only=False)
    assert torch.equal(again.net[0].weight, model.net[0].weight)
    # As a teacher: nothing of the file is run, and the way out that the error names works.
    with pytest.raises(UnsafeFile, match=r"teacher cannot be made .*source: \$\{model\}"):
        Trainer(**QUIET, callbacks=[Distillation("last.ckpt")]).fit(Reported())
    dense = Reported()
    torch.save(dense.state_dict(), "weights.pt")
    learned = Distillation(Teacher(Reported(), checkpoint="weights.pt"))
    Trainer(**QUIET, callbacks=[learned]).fit(Reported())
    assert torch.equal(learned.teachers[0].network.net[0].weight, dense.net[0].weight)


def test_lightning_18784_a_module_that_brings_the_callback_itself(
    project: Callable[..., DictConfig],
) -> None:
    """Lightning#18784: callbacks of `configure_callbacks` take the place of the Trainer's of that class."""

    class Brings(Reported):
        def configure_callbacks(self) -> list[Callback]:
            return [StructuredPruning(0.5, when=1)]

    cfg = project(*PRUNE, config=f"{TRAINER}}}\n")
    trainer = hydra.utils.instantiate(cfg.trainer)
    assert pruned(trainer, Brings())
    assert sum(isinstance(c, StructuredPruning) for c in trainer.callbacks) == 1


# --- LightningCLI ------------------------------------------------------------------------------------


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    import lightning_accel

    lightning_accel._load_all()
    # Lightning 2.6.6 registers instantiators in a way that jsonargparse 4.53 deprecates.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

    def made(*words: str, kind: Any = LightningCLI, **kwargs: Any) -> Any:
        monkeypatch.setattr(sys, "argv", ["main.py", *words])
        kwargs = {"save_config_callback": None, "trainer_defaults": QUIET, **kwargs}
        return kind(Reported, seed_everything_default=False, **kwargs)

    return made


@pytest.mark.slow
def test_lightning_21259_an_integer_that_the_cli_makes_a_float(cli: Callable[..., Any]) -> None:
    """Lightning#21259: of `int | float` the command line makes a float, also of 1; a share is below 1."""
    words = ["fit", "--trainer.callbacks+=StructuredPruning", "--trainer.callbacks.ratio=0.5"]
    for when in ("1", "[1]", "0.5"):
        assert cli(*words, f"--trainer.callbacks.when={when}").model.widths == [8] * 4 + [4] * 4


@pytest.mark.slow
def test_lightning_15007_a_callback_of_several_arguments(cli: Callable[..., Any]) -> None:
    """Lightning#15007, #11489, jsonargparse#256: all arguments reach it, and an older list is kept."""
    given = [
        "+=LambdaCallback",
        "+=StructuredPruning",
        ".ratio=0.25",
        ".when=1",
        ".importance=random",
    ]
    found = cli(*("fit", *(f"--trainer.callbacks{word}" for word in given)))
    ours = next(c for c in found.trainer.callbacks if isinstance(c, StructuredPruning))
    assert (ours.request.ratio, ours.when, ours.request.importance) == (0.25, (1,), "random")
    assert "LambdaCallback" in [type(c).__name__ for c in found.trainer.callbacks]
    assert found.model.widths == [8] * 4 + [6] * 4


@pytest.mark.slow
def test_lightning_7540_a_saved_config_trains_the_same_again(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    """Lightning#7540, #18731: the `config.yaml` that is saved has the callbacks, and can be read again."""
    from lightning.pytorch.cli import SaveConfigCallback

    saving = {
        "save_config_callback": SaveConfigCallback,
        "trainer_defaults": {**QUIET, "default_root_dir": str(tmp_path)},
    }
    target = "{class_path: Macs, init_args: {share: 0.5}}"
    words = ["=StructuredPruning", ".when=[1]", f".target={target}"]
    first = cli("fit", *(f"--trainer.callbacks{word}" for word in words), **saving)
    saved = next(tmp_path.rglob("config.yaml"))
    text = saved.read_text()
    assert "lightning_accel.StructuredPruning" in text and "Unable to serialize" not in text
    second = cli("fit", "--config", str(saved))
    assert second.model.widths == first.model.widths and first.model.widths[-1] < 8


@pytest.mark.slow
def test_lightning_17263_a_callback_that_a_program_forces(cli: Callable[..., Any]) -> None:
    """Lightning#17263: `add_lightning_class_args` with our class, its defaults set by the program."""
    from lightning.pytorch.cli import LightningCLI

    class Forced(LightningCLI):
        def add_arguments_to_parser(self, parser: Any) -> None:
            parser.add_lightning_class_args(StructuredPruning, "pruning")
            parser.set_defaults({"pruning.ratio": 0.5, "pruning.when": 1})

    assert cli("fit", kind=Forced).model.widths == [8] * 4 + [4] * 4
    assert cli("fit", "--pruning.ratio=0.25", kind=Forced).model.widths == [8] * 4 + [6] * 4


def test_lightning_15009_a_callback_added_after_the_trainer_was_made(
    cli: Callable[..., Any],
) -> None:
    """Lightning#15009: `cli.trainer.callbacks.append(...)`, behind ModelCheckpoint."""
    made = cli(run=False, trainer_defaults={**QUIET, "enable_checkpointing": True})
    made.trainer.callbacks.append(StructuredPruning(0.5, when=1))
    assert pruned(made.trainer, made.model)
    written = torch.load(next(Path().rglob("*.ckpt")), weights_only=True)
    assert written["state_dict"]["net.0.weight"].shape == (4, 4), "what ended is what was saved"
