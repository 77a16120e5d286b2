"""`lightning-accel show`: what a preset adds, in order, and what it would do to a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lightning_accel import prune
from lightning_accel.cli import main
from lightning_accel.cli.adds import added, class_of

CODE = """
import torch, tiny
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning.pytorch import LightningModule

class Lit(LightningModule):
    def __init__(self, net):
        super().__init__()
        torch.manual_seed(0)
        self.net = net
    def training_step(self, batch, index):
        return self.net(batch[0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

def data(*shape):
    return DataLoader(TensorDataset(torch.randn(32, *shape)), batch_size=16)

def mlp():
    return Lit(tiny.MLP(32)), data(8)

def conv():
    return Lit(tiny.ConvNet()), data(3, 8, 8)

def network():
    return tiny.ConvNet()

def fails():
    return Lit(tiny.MLP()), data(7)
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "users_show.py").write_text(CODE)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "users_show", raising=False)
    return "users_show"


def shown(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    assert main(["show", "--json", *words]) == code
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["amp_prune_distill_int8_deploy", "auto"])
def test_the_nodes_are_those_that_hydra_composes_in_the_order_of_their_stages(
    name: str, tmp_path: Path
) -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(tmp_path)):
        composed: Any = OmegaConf.to_container(compose(None, [f"+accel={name}"]), resolve=True)
    found = added(None, [f"+accel={name}"])
    assert found.callbacks == composed["callbacks"] and found.refused == {}
    stages = [getattr(class_of(node), "stage", None) or 0 for node in found.callbacks.values()]
    assert stages == sorted(stages)


@pytest.mark.slow
def test_what_the_app_has_itself_is_not_shown_as_added(root: Path) -> None:
    config = root / "conf" / "config.yaml"
    found = added(config, ["+accel=amp_prune", "callbacks.pruning.ratio=0.3", "model=vit"])
    assert "objective" not in found.callbacks
    assert found.callbacks["pruning"]["ratio"] == 0.3
    assert found.trainer == {} and "model=vit" in found.without
    assert added(config, ["accel/parallel=fsdp"]).trainer == {"strategy": "accel_fsdp"}


@pytest.mark.slow
def test_a_prune_is_told_with_the_parameters_that_it_leaves(
    code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["+accel=prune", f"{code}:mlp", "+callbacks.pruning.compensate=false"]
    (effect, _) = shown(capsys, *words)["effects"][::-1]
    import users_show  # type: ignore[import-not-found]

    net = users_show.mlp()[0].net
    before = sum(p.numel() for p in net.parameters())
    prune(net, example=torch.randn(16, 8), ratio=0.5)
    after = sum(p.numel() for p in net.parameters())
    assert f"{before:,} parameters become {after:,}" in effect["said"]
    assert "at 40% of the fit" in effect["said"]
    assert any("net.head: it makes the network's output" in line for line in effect["details"])


@pytest.mark.slow
def test_each_technique_says_what_it_would_change_or_why_it_would_refuse(
    code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = shown(capsys, "+accel=compile", "+accel/quantization=int8", f"{code}:conv")
    found = {effect["technique"]: effect for effect in told["effects"]}
    assert "compiled" in found["compilation"]["said"]
    layers = ("stem.0", "conv.0", "down.0", "head")
    assert f"{len(layers)} layers train as int8 at 50% of the fit" in found["quantization"]["said"]
    assert "not known before a fit" in found["report"]["said"]
    words = ["+accel/precision=channels_last", f"{code}:mlp"]
    (refused,) = shown(capsys, *words, code=1)["effects"]
    assert not refused["acts"] and "channels last is for two-dim" in refused["said"]


@pytest.mark.slow
def test_a_network_with_an_example_will_do(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["+accel/precision=channels_last", f"{code}:network", "--example", "2,3,8,8"]
    assert main(["show", *words]) == 0
    assert "3 x memory format: channels last" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "say which preset"),
        (["amp"], "neither an override nor one model"),
        (["+accel=amp_prun"], "Could not find 'accel/amp_prun'"),
        (["+accel=amp", "a:b", "c:d"], "a:b c:d"),
        (["+accel=amp", "users_show:nothing"], "MODULE:FUNCTION"),
        (["+accel=amp", "users_show:network"], "neither data nor an example"),
        (["+accel=amp", "--config", "nowhere.yaml"], "no such configuration"),
    ],
)
def test_what_cannot_be_meant_is_said(
    words: list[str], said: str, code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_step_that_fails_is_a_refusal_of_what_would_try_it(
    code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (effect, _) = shown(capsys, "+accel=prune", f"{code}:fails", code=1)["effects"][::-1]
    assert "would be refused: `training_step` failed" in effect["said"]


def test_settings_that_a_callback_refuses_are_told_without_a_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = shown(capsys, "+accel=amp_prune", "callbacks.pruning.ratio=1.5", code=1)
    assert list(told["refused"]) == ["pruning"]
    assert "`ratio` is a number, above 0, below 1" in told["refused"]["pruning"]
    assert main(["show", "+accel=amp_prune", "+callbacks.pruning.ratoi=0.5"]) == 1
    said = capsys.readouterr().out
    assert "Settings that are refused\n- callbacks.pruning: " in said and "ratoi" in said
