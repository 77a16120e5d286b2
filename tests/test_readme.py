"""The README's Python blocks run as they stand, in an app whose network and data are small."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_accel
from lightning_accel import AccelReport
from lightning_accel._hydra_plugins import LightningAccelSearchPath, register

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)
PROJECT = README.partition("## Your own Hydra or LightningCLI project")[2].partition("\n## ")[0]
IN_HYDRA, IN_CLI = re.findall(r"^```yaml\n(.*?)^```", PROJECT, re.S | re.M)
COMMANDS = re.findall(r"^python (\S+) (.*?)(?: +#.*)?$", PROJECT, re.M)
TABLE = README.partition("## Techniques")[2].partition("\n## ")[0]


class MyModule(LightningModule):
    """The user's own, of which the README only speaks."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny.ConvNet()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


class MyData(LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.randn(64, 3, 8, 8), torch.randint(4, (64,))), 32)


def users(tmp_path: Path) -> dict[str, Any]:
    """What a reader's program has before a block begins; a block imports the rest itself."""
    module, net = MyModule(), tiny.ConvNet()
    rows = TensorDataset(torch.randn(64, 3, 8, 8), torch.randint(4, (64,)))
    trainer = Trainer(logger=False, max_epochs=1, enable_progress_bar=False, accelerator="cpu")
    trainer.fit(module, DataLoader(rows, 32))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    return {
        "MyModule": MyModule,
        "MyData": MyData,
        "cfg": OmegaConf.create(
            {
                "trainer": {"_target_": "lightning.pytorch.Trainer", "logger": False},
                "callbacks": {"meter": {"_target_": "lightning_accel.StepMeter"}},
            }
        ),
        "model": MyModule(),
        "data": DataLoader(rows, 32),
        "net": net,
        "optimizer": torch.optim.Adam(net.parameters()),
        "teacher": MyModule(),
    }


@pytest.mark.filterwarnings(
    "ignore:Starting from v1.9.0, `tensorboardX`",
    "ignore:the teacher is hardly better than guessing",
    "ignore:The number of training batches",
    "ignore:The '\\w+' does not have many workers",
)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.splitlines()[0])
def test_every_block_runs_as_it_stands(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "LightningCLI" in block:
        run_in_cli(monkeypatch, tmp_path)
    assert AccelReport.__init__.__kwdefaults__ is not None
    monkeypatch.setitem(AccelReport.__init__.__kwdefaults__, "budget_s", 0.2)
    namespace = users(tmp_path)
    if "cfg" not in block:  # a program that has one asks its Trainers for what it says
        del namespace["cfg"]
    exec(compile(block, "README.md", "exec"), namespace)  # noqa: S102 - our own text
    if "LightningCLI" in block:
        trainer, module = namespace["cli"].trainer, namespace["cli"].model
        assert {"StructuredPruning", "StepMeter"} <= {type(c).__name__ for c in trainer.callbacks}
        sizes = [sum(p.numel() for p in m.parameters()) for m in (module, MyModule())]
        assert sizes[0] < sizes[1]


def run_in_cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Give the block what the command and the yaml beside it say."""
    if importlib.util.find_spec("jsonargparse") is None:
        pytest.skip("needs jsonargparse")
    (tmp_path / "config.yaml").write_text(IN_CLI)
    ((_, words),) = [command for command in COMMANDS if command[0] == "main.py"]
    quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--seed_everything=0"]
    quiet += ["--trainer.enable_model_summary=false", "--trainer.default_root_dir=logs"]
    monkeypatch.setattr(sys, "argv", ["main.py", *shlex.split(words), *quiet])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # as it was, afterwards
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hydra app of a reader's own, with the plugin of this checkout."""
    register()
    plugins = Plugins.instance().plugin_type_to_subclass_list
    others = [p for p in plugins[SearchPathPlugin] if p.__name__ != "LightningAccelSearchPath"]
    monkeypatch.setitem(plugins, SearchPathPlugin, [*others, LightningAccelSearchPath])
    own = IN_HYDRA + "  accelerator: cpu\n  max_epochs: 3\n  logger: false\n"
    own += "  enable_progress_bar: false\n  enable_checkpointing: false\n"
    own += "  enable_model_summary: false\n"
    own += "callbacks: {early: {_target_: lightning.pytorch.callbacks.LambdaCallback}}\n"
    (tmp_path / "train.yaml").write_text(own)
    return tmp_path


@pytest.mark.filterwarnings(
    "ignore:The number of training batches", "ignore:The '\\w+' does not have many workers"
)
@pytest.mark.parametrize("in_yaml", [True, False], ids=["in yaml", "in Python"])
@pytest.mark.parametrize("words", [words for name, words in COMMANDS if name == "train.py"])
def test_every_command_for_an_own_app_does_what_it_says(
    app: Path, words: str, in_yaml: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(AccelReport.__init__.__kwdefaults__, "budget_s", 0.2)
    with initialize_config_dir(version_base="1.3", config_dir=str(app)):
        cfg = compose("train", shlex.split(words))
    (block,) = [block for block in BLOCKS if block.startswith("import hydra")]
    if in_yaml:
        block = "import hydra\ntrainer = hydra.utils.instantiate(cfg.trainer)"
    namespace: dict[str, Any] = {"cfg": cfg}
    exec(compile(block, "README.md", "exec"), namespace)  # noqa: S102 - our own text
    trainer, module = namespace["trainer"], MyModule()
    dense = sum(p.numel() for p in module.parameters())
    trainer.fit(module, MyData())
    assert sum(p.numel() for p in module.parameters()) < dense
    names = {type(callback).__name__ for callback in trainer.callbacks}
    assert {"LambdaCallback", "UsePrecision"} <= names
    assert ("AccelReport" in names) == ("~callbacks.report" not in words)
    assert cfg.callbacks.pruning.importance == ("taylor" if "taylor" in words else "magnitude")


def test_every_class_of_the_table_is_a_public_name() -> None:
    rows = [line.split(" | ")[1] for line in TABLE.splitlines() if line.startswith("| ")]
    named = {name for row in rows for name in re.findall(r"\b([A-Z]\w+)\(", row)} - {"Trainer"}
    assert len(named) > 15
    assert named <= set(lightning_accel.__all__)


def test_public_names_are_the_classes_that_they_say() -> None:
    for name in lightning_accel.__all__:
        assert getattr(lightning_accel, name).__name__ == name


def test_a_user_does_not_see_how_lightning_asks_torch_and_sees_all_else() -> None:
    script = """
import warnings, lightning_accel
warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated, use another", FutureWarning)
warnings.warn("something else is deprecated", FutureWarning)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert "something else" in done.stderr and "LeafSpec" not in done.stderr
