"""A LightningCLI of a user's own, with yaml: short names, epochs as integers, lists that grow."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

pytest.importorskip("jsonargparse")

from lightning.pytorch.cli import LightningCLI

import lightning_accel

ROOT = Path(__file__).resolve().parents[1]
QUIET = {
    "accelerator": "cpu",
    "max_epochs": 3,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
)


class Tiny(LightningModule):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, width), torch.nn.ReLU(), torch.nn.Linear(width, 2)
        )
        self.pruned_at: list[int] = []
        self.dtypes: set[torch.dtype] = set()

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        out = self.net(batch)
        self.dtypes.add(out.dtype)
        if self.net[0].out_features != 8 and not self.pruned_at:
            self.pruned_at.append(self.current_epoch)
        return out.float().square().mean()

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.randn(16, 4), 4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tiny]:
    """Run `fit` with the yaml of a user and further words, and return the trained module."""

    def run(callbacks: str, *words: str) -> Tiny:
        # Lightning 2.6.6 registers instantiators in a way that jsonargparse 4.53 deprecates.
        monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        (tmp_path / "user.yaml").write_text(f"trainer:\n  callbacks:\n{callbacks}")
        monkeypatch.setattr(sys, "argv", ["main.py", "fit", "--config", "user.yaml", *words])
        cli = LightningCLI(
            Tiny, trainer_defaults=QUIET, save_config_callback=None, seed_everything_default=False
        )
        model: Tiny = cli.model
        return model

    return run


@pytest.mark.slow
@pytest.mark.parametrize("when", ["1", "[1]", "1.0", "0.4"])
@pytest.mark.parametrize("name", ["StructuredPruning", "lightning_accel.StructuredPruning"])
def test_epochs_are_what_yaml_says(fitted: Callable[..., Tiny], when: str, name: str) -> None:
    given = f"  - class_path: {name}\n    init_args: {{ratio: 0.5, when: {when}}}\n"
    model = fitted(given)
    assert model.pruned_at == [1] and model.net[0].out_features == 4


def test_callbacks_are_added_on_the_command_line(fitted: Callable[..., Tiny]) -> None:
    words = ["+=StructuredPruning", ".ratio=0.5", ".when=1", ".importance=random"]
    own = "  - class_path: LambdaCallback\n"
    model = fitted(own, *(f"--trainer.callbacks{word}" for word in words))
    assert model.pruned_at == [1]


@pytest.mark.slow
def test_arguments_that_are_classes_have_short_names_too(fitted: Callable[..., Tiny]) -> None:
    model = fitted("""
    - class_path: StructuredPruning
      init_args:
        when: [1, 2]
        target: {class_path: Macs, init_args: {share: 0.5}}
        select: {exclude: [nothing]}
    - class_path: UsePrecision
      init_args:
        plugin: {class_path: AutocastPrecision, init_args: {precision: bf16-mixed}}
""")
    assert model.pruned_at == [1] and model.dtypes == {torch.bfloat16}


def test_a_plugin_of_ours_is_known_to_the_trainer(fitted: Callable[..., Tiny]) -> None:
    model = fitted(
        "    []\n", "--trainer.plugins+=AutocastPrecision", "--trainer.plugins.precision=bf16-mixed"
    )
    assert model.dtypes == {torch.bfloat16}


def test_every_class_of_ours_can_be_described_to_a_parser() -> None:
    from jsonargparse import ArgumentParser

    for name in lightning_accel.__all__:
        kind = getattr(lightning_accel, name)
        if isinstance(kind, type):
            parser = ArgumentParser(exit_on_error=False)
            parser.add_class_arguments(kind, "given")
            asks = bool(inspect.signature(kind).parameters)
            assert ("given" in parser.get_defaults()) == asks, name


ORDERS = {
    "ours first": "import lightning_accel\nfrom lightning.pytorch.cli import LightningCLI",
    "ours last": "from lightning.pytorch.cli import LightningCLI\nimport lightning_accel",
}
PROGRAM = """
{imports}
from lightning.pytorch.demos.boring_classes import BoringModel

given = dict(class_path="{name}", init_args=dict(ratio=0.5, when=1))
cli = LightningCLI(BoringModel, run=False, args={{"trainer": {{"callbacks": [given]}}}})
print("GOT", [c.when for c in cli.trainer.callbacks if hasattr(c, "when")])
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_short_names_need_one_import_in_any_order(order: str, tmp_path: Path) -> None:
    name = "StructuredPruning"  # without an import of ours, the whole path: test_project_folders.py
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(imports=ORDERS[order], name=name)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        timeout=200,
    )
    assert "GOT [(1,)]" in done.stdout, done.stderr[-3000:]
