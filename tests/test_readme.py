"""The README's Python blocks run as they stand, in an app whose network and data are small."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_accel
from lightning_accel import AccelReport

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)
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


def users(tmp_path: Path) -> dict[str, Any]:
    """What a reader's program has before a block begins; a block imports the rest itself."""
    module, net = MyModule(), tiny.ConvNet()
    rows = TensorDataset(torch.randn(64, 3, 8, 8), torch.randint(4, (64,)))
    trainer = Trainer(logger=False, max_epochs=1, enable_progress_bar=False, accelerator="cpu")
    trainer.fit(module, DataLoader(rows, 32))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    return {
        "MyModule": MyModule,
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
    assert AccelReport.__init__.__kwdefaults__ is not None
    monkeypatch.setitem(AccelReport.__init__.__kwdefaults__, "budget_s", 0.2)
    namespace = users(tmp_path)
    exec(compile(block, "README.md", "exec"), namespace)  # noqa: S102 - our own text


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
