"""`sensitivity` against masked twins and hand counts, and `lightning-accel plan` as a user calls it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel.cli import plan
from lightning_accel.errors import NoEffect
from lightning_accel.measure import timing
from lightning_accel.pages import bars
from lightning_accel.pruning.sensitivity import as_table, sensitivity
from lightning_accel.surgery import Select
from lightning_accel.surgery.call import Call

NETS = list(tiny.INPUTS)


def calls_for(net: Any) -> tuple[Call, ...]:
    return (Call("", (tiny.INPUTS[net](),), {}),)


# --- the pure core -----------------------------------------------------------------------------


@pytest.mark.parametrize("net", NETS)
def test_every_group_gets_a_row_and_the_network_stays_as_it_is(net: Any) -> None:
    model, calls = net(), calls_for(net)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    rows = sensitivity(model, calls, budget_s=0.1)
    assert rows and len({row.name for row in rows}) == len(rows)
    for row in rows:
        assert 0 < row.removed < row.units
        assert row.macs_saved >= 0 and 0 < row.params_saved < 1
        assert math.isfinite(row.time_saved) and row.change > 0
        assert row.time_low <= row.time_saved <= row.time_high
        assert row.layers
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert flags == [module.training for module in model.modules()]


def test_the_numbers_are_those_of_the_masked_network() -> None:
    model = tiny.MLP().eval()
    x = torch.randn(32, 8)
    first, second = sensitivity(model, (Call("", (x,), {}),), budget_s=0.1)
    masked = tiny.MLP().eval()
    masked.load_state_dict(model.state_dict())
    layers = [masked.body[0], masked.body[2]]
    strength = layers[0].weight.square().sum(1) + layers[1].weight.square().sum(0)
    weak = strength.argsort()[:8]
    with torch.no_grad():
        layers[0].weight[weak], layers[0].bias[weak] = 0.0, 0.0
        change = (masked(x) - model(x)).norm() / model(x).norm()
    assert first.change == pytest.approx(float(change), rel=1e-4)
    dense, cut = 8 * 16 + 16 * 16 + 16 * 4, 8 * 8 + 8 * 16 + 16 * 4
    assert first.macs_saved == pytest.approx(1 - cut / dense)
    assert first.params_saved == pytest.approx(1 - (cut + 8 + 16 + 4) / (dense + 16 + 16 + 4))
    assert (first.layers, second.layers) == (("body.0",), ("body.2",))


def test_a_layer_that_nobody_needs_shows_no_change() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[2].weight[:4], model[2].bias[:4], model[4].weight[:, :4] = 0.0, 0.0, 0.0
    idle = sensitivity(model, (Call("", (torch.randn(16, 4),), {}),), budget_s=0.1)[1]
    assert idle.name == "2" and idle.change < 1e-6


def test_the_loss_can_be_asked_instead_of_the_output() -> None:
    model, x = tiny.MLP(), torch.randn(8, 8)

    def loss(network: nn.Module) -> float:
        with torch.no_grad():
            return float(network(x).square().mean())

    rows = sensitivity(model, (Call("", (x,), {}),), loss=loss, budget_s=0.1)
    assert any(row.change < 0 for row in rows) or any(row.change > 0 for row in rows)
    assert all(loss(model) + row.change >= 0 for row in rows)


def test_a_selection_limits_the_rows() -> None:
    rows = sensitivity(
        tiny.MLP(), calls_for(tiny.MLP), select=Select.of("body.0"), share=0.25, budget_s=0.1
    )
    assert [(row.name, row.removed) for row in rows] == [("body.0", 4)]


def test_time_is_measured_for_the_whole_batch() -> None:
    seen: list[int] = []

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny.MLP()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            return self.net(x)

    sensitivity(Counting(), (Call("", (torch.randn(24, 8),), {}),), budget_s=0.1)
    assert seen.count(24) > 20


def test_nothing_to_prune_is_an_error() -> None:
    with pytest.raises(NoEffect):
        sensitivity(nn.Linear(4, 2), (Call("", (torch.ones(2, 4),), {}),))
    with pytest.raises(NoEffect, match="10% of its units"):
        sensitivity(tiny.MLP(width=4), calls_for(tiny.MLP), share=0.1)


@pytest.mark.parametrize("share", [0, 1, -1, math.nan])
def test_an_impossible_share_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="`share`"):
        sensitivity(tiny.MLP(), calls_for(tiny.MLP), share=share)


def test_the_table_has_a_line_per_row_and_names_the_device() -> None:
    rows = sensitivity(tiny.MLP(), calls_for(tiny.MLP), budget_s=0.1)
    text = as_table(rows, share=0.5, device="cpu", measured="output").to_text()
    assert "body.0" in text and "16 -> 8" in text and "on cpu" in text


def told(ratio: float, low: float, high: float, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the table of a network whose layers, cut, are `ratio` times as fast."""
    side = timing.LatencyStats(1.0, 0.1, 1.0, 9)
    found = timing.Comparison(side, side, ratio, low, high, 1.0)
    monkeypatch.setattr("lightning_accel.pruning.target.compare", lambda *_, **__: found)
    rows = sensitivity(tiny.MLP(), calls_for(tiny.MLP), budget_s=0.1)
    return as_table(rows, share=0.5, device="cpu", measured="output").to_text(width=200)


def test_a_time_stands_beside_its_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    text = told(2.0, 1.6, 2.5, monkeypatch)
    assert "-50.0%" in text and "-60.0% to -37.5%" in text
    assert "slower" not in text and "no measurable" not in text


def test_a_layer_that_is_slower_when_cut_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    text = told(0.5, 0.4, 0.8, monkeypatch)
    assert "+100.0%" in text
    assert "slower when cut: body.0, +25.0% to +150.0% time" in text


def test_a_time_that_may_be_either_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    text = told(1.1, 0.9, 1.3, monkeypatch)
    assert "no measurable difference in time: body.0, body.2" in text and "slower" not in text


@pytest.mark.parametrize("budget", [0, -1, math.nan])
def test_a_budget_is_seconds_above_zero(budget: float) -> None:
    with pytest.raises(ValueError, match="`budget_s` is a number of seconds"):
        sensitivity(tiny.MLP(), calls_for(tiny.MLP), budget_s=budget)


def test_the_picture_is_svg_that_draws_to_scale() -> None:
    panels = {"time": [2.0, 1.0], "loss": [-1.0, math.nan]}
    tree = ElementTree.fromstring(bars(["a<b", "x" * 99], panels, title="T & t").to_svg())
    space = "{http://www.w3.org/2000/svg}"
    widths = [float(r.get("width", 0)) for r in tree.iter(f"{space}rect")][1:]
    assert widths[0] == 2 * widths[1] > 0
    assert widths[2:] == [0.0, 0.0]
    texts = [t.text or "" for t in tree.iter(f"{space}text")]
    texts = [text.strip() for text in texts] + [t.tail or "" for t in tree.iter(f"{space}title")]
    assert "T & t" in texts and "a<b" in texts and "-1" in texts and "nan" in texts
    assert all(len(text) < 60 for text in texts)


# --- the command -------------------------------------------------------------------------------

MODULE = """
import torch
from torch import nn

def network():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

def both():
    return network(), {"input": torch.randn(5, 6)}

def number():
    return 3

def three():
    return 1, 2, 3

def needs(width):
    return network()

def fails():
    raise ValueError("the user's own\\nin two lines")
"""

LIT = """
import tiny, torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, TensorDataset

def loader():
    return DataLoader(TensorDataset(torch.arange(64.0).reshape(8, 8) / 64), 4)

class Lit(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = None
    def setup(self, stage):
        torch.manual_seed(0)
        self.net = self.net or tiny.MLP()
    def forward(self, x):
        return self.net(x)
    def training_step(self, batch, batch_idx):
        loss = self(batch[0]).square().mean()
        self.log("train/loss", loss)
        return loss
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

class Own(Lit):
    def train_dataloader(self):
        return loader()

class Data(LightningDataModule):
    def prepare_data(self):
        self.prepared = True
    def setup(self, stage):
        assert self.prepared and stage == "fit"
        self.ready = True
    def train_dataloader(self):
        assert self.ready
        return loader()

def build():
    return Lit(), loader()

def module():
    return Lit(), Data()

class Several(Lit):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch["a"], batch_idx)

def several():
    return Several(), {"a": loader(), "b": loader()}

def own():
    return Own()

def alone():
    return Lit()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine_nets.py").write_text(MODULE)
    (tmp_path / "mine_fit.py").write_text(LIT)
    (tmp_path / "mine_broken.py").write_text("import torch\n\n1 / 0\n")
    monkeypatch.delitem(sys.modules, "mine_fit", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine_nets", raising=False)
    return tmp_path


def run(*words: str) -> int:
    from lightning_accel.cli import main

    return main(["plan", *words, "--budget-s", "0.1"])


def test_plan_prints_a_table_and_draws_a_picture(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = folder / "new" / "plan.svg"
    assert run("mine_nets:network", "--example", "4,6", "--picture", str(drawn)) == 0
    said = capsys.readouterr().out
    assert "16 -> 8" in said and "change of the output" in said
    assert said.endswith(f"Wrote {drawn}\n") and said.count("Wrote") == 1
    ElementTree.parse(drawn)


def test_a_picture_beside_json_is_said_elsewhere(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("mine_nets:both", "--json", "--picture", str(folder / "plan.svg")) == 0
    said = capsys.readouterr()
    (group,) = json.loads(said.out)["groups"]
    assert group["time_low"] <= group["time_saved"] <= group["time_high"]
    assert said.err == f"Wrote {folder / 'plan.svg'}\n"


@pytest.mark.parametrize("build", ["build", "module", "several", "own"])
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_what_is_tuned_can_be_planned_and_the_loss_is_measured(
    folder: Path, build: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"mine_fit:{build}", "--json") == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["change_of"] == "loss"
    assert [group["name"] for group in plain["groups"]] == ["net.body.0", "net.body.2"]
    import mine_fit  # type: ignore[import-not-found]

    lit, batch = mine_fit.Lit(), next(iter(mine_fit.loader()))
    lit.setup("fit")
    cut = mine_fit.Lit()
    cut.setup("fit")
    layers = cut.net.body[0], cut.net.body[2]
    strength = layers[0].weight.square().sum(1) + layers[1].weight.square().sum(0)
    with torch.no_grad():
        layers[0].weight[strength.argsort()[:8]] = 0.0
        layers[0].bias[strength.argsort()[:8]] = 0.0
        change = cut(batch[0]).square().mean() - lit(batch[0]).square().mean()
    assert plain["groups"][0]["change"] == pytest.approx(float(change), rel=1e-3, abs=1e-6)


def test_plan_json_is_one_object(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("mine_nets:both", "--json", "--share", "0.25") == 0
    plain = json.loads(capsys.readouterr().out)
    (group,) = plain["groups"]
    assert (group["name"], group["units"], group["removed"]) == ("0", 16, 4)
    assert group["macs_saved"] == 0.25
    assert plain["change_of"] == "output" and plain["device"] == "cpu"


WRONG: list[tuple[Sequence[str], str]] = [
    ([], "say which network"),
    (["mine_nets"], "MODULE:FUNCTION"),
    (["mine_nets:nothing", "--example", "4,6"], "MODULE:FUNCTION"),
    (["no_such_module:f", "--example", "4,6"], "`no_such_module` cannot be imported. Found: Mod"),
    (["mine_nets:needs"], "`mine_nets:needs` fails when it is called. Found: TypeError: needs()"),
    (["mine_nets:fails"], "ValueError: the user's own ("),
    (["mine_broken:f"], "mine_broken.py, line 3). Do: make it run in Python first"),
    (["mine_nets:both", "--device", "nonsense"], "no such device here. Found: nonsense"),
    (["mine_nets:number", "--example", "4,6"], "makes no network"),
    (["mine_nets:network"], "--example"),
    (["mine_nets:three"], "Found: (int, int, int)"),
    (["mine_fit:alone"], "or (LightningModule, data)"),
    (["mine_nets:both", "--picture", "plan.png"], "end the name in .svg"),
    (["mine_nets:network", "--checkpoint", "last.ckpt"], "--checkpoint is of a LightningModule"),
    (["--config", "x.yaml", "--checkpoint", "last.ckpt"], "Found: --config"),
    (["mine_nets:network", "--example", "4,five"], "an example is a shape"),
    (["mine_nets:network", "--example", "4,6:float99"], "an example is a shape"),
    (["mine_nets:network", "--example", "4,7"], "fails on the example"),
    (["mine_nets:network", "--example", "4,6", "--share", "1.5"], "`share`"),
    (["mine_nets:network", "--example", "4,6", "--importance", "luck"], "unknown importance"),
    (["mine_nets:network", "--example", "4,6", "--select", "head.*"], "head"),
    (["mine_nets:network", "extra", "--example", "4,6"], "say which network"),
]


@pytest.mark.parametrize(("words", "said"), WRONG)
def test_what_is_wrong_is_said_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], words: Sequence[str], said: str
) -> None:
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and error.startswith("lightning-accel plan: ")


def test_there_is_one_word_for_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_accel.cli import main

    for command in ("plan", "tune"):
        with pytest.raises(SystemExit):
            main([command, "mine_nets:both", "--budget", "1"])
        assert "unrecognized arguments: --budget" in capsys.readouterr().err


def test_an_example_can_be_of_tokens() -> None:
    tokens = plan.tensor("3,5:int64:7")
    assert tokens.shape == (3, 5) and tokens.dtype == torch.int64 and int(tokens.max()) < 7
    assert plan.tensor("2,3:bfloat16").dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:StructuredPruning cuts before the first step")
def test_a_pruned_checkpoint_is_planned_in_its_own_shape(
    folder: Path, trainer_kwargs: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "mine_lit.py").write_text(
        "import torch, tiny\n"
        "from lightning.pytorch import LightningModule\n"
        "class Lit(LightningModule):\n"
        "    def __init__(self):\n"
        "        super().__init__(); self.net = tiny.MLP()\n"
        "    def forward(self, x): return self.net(x)\n"
        "    def training_step(self, batch, i): return self(batch[0]).square().mean()\n"
        "    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.1)\n"
    )
    from mine_lit import Lit  # type: ignore[import-not-found]

    from lightning_accel import StructuredPruning

    trainer_kwargs.update(callbacks=[StructuredPruning(ratio=0.5, when=0)], max_epochs=1)
    trainer = Trainer(**trainer_kwargs)
    trainer.fit(Lit(), DataLoader(TensorDataset(torch.randn(8, 8)), 4))
    trainer.save_checkpoint(folder / "last.ckpt")
    assert run("mine_lit:Lit", "--checkpoint", "last.ckpt", "--example", "4,8", "--json") == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    assert [group["units"] for group in groups] == [8, 8]


@pytest.mark.slow
def test_a_hydra_configuration_is_planned_with_its_own_data_and_loss(
    root: Path, tmp_path: Path
) -> None:
    words = [
        *("--config", str(root / "conf" / "config.yaml"), "--allow", "models.", "--allow", "data."),
        *(
            "--budget-s",
            "0.2",
            "--json",
            "model=vit",
            "model.depth=1",
            "data=digits",
            "accelerator=cpu",
        ),
    ]
    done = subprocess.run(
        [sys.executable, "-c", "from lightning_accel.cli import main; main()", "plan", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(root), str(root / "examples"), os.environ.get("PYTHONPATH", "")]
            ),
        },
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    plain = json.loads(done.stdout)
    assert plain["change_of"] == "loss" and len(plain["groups"]) >= 2
