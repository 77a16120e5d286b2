"""Inputs that are rounded on the range of each call: as numpy computes it, without calibration, in training and in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import (
    QuantizationAwareTraining,
    deploy,
    load_from_checkpoint,
    quantize,
)
from lightning_accel.errors import NoEffect
from lightning_accel.quantization import lowered, quantization_of
from lightning_accel.quantization.budget import sqnr_db

PLAINLY: Any = {"rounding": "nearest", "correct_bias": False}


def test_each_call_has_a_range_of_its_own_as_numpy_finds_it() -> None:
    layer = nn.Linear(12, 5)
    net = nn.Sequential(layer)
    weight = layer.weight.detach().numpy()
    receipt = quantize(net, calibration=None, activations="dynamic", **PLAINLY)
    assert "on the range of each call" in receipt.changes[0].after and not receipt.notes
    scale_w = np.abs(weight).max(1) / 127
    whole_w = np.round(weight / scale_w[:, None])
    for size in (0.1, 50.0):
        x = torch.randn(6, 12) * size + size
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        scale = np.float32((high - low) / 255)
        zero = int(np.round(-low / scale))
        whole = np.clip(np.round(x.numpy() / scale) + zero, 0, 255) - zero
        expected = whole @ whole_w.T * scale * scale_w + layer.bias.detach().numpy()
        for made in (net, lowered(net)):
            np.testing.assert_allclose(made(x).detach().numpy(), expected, rtol=1e-4, atol=1e-4)
    assert net(torch.randn(0, 12)).shape == (0, 5)
    wild = torch.randn(3, 12)
    wild[1, 2] = float("nan")
    assert not net(wild)[1].isfinite().any()


@pytest.mark.parametrize(
    "given", [{"activations": "int8"}, {"rounding": "least_squares"}, {"correct_bias": True}]
)
def test_what_is_found_by_calibration_needs_it(given: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="DataLoader"):
        quantize(
            nn.Linear(4, 4), calibration=None, **{"activations": "dynamic", **PLAINLY, **given}
        )


def test_convolutions_are_left_and_named() -> None:
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Flatten(), nn.Linear(8, 2))
    receipt = quantize(net, calibration=torch.randn(4, 2, 2, 2), activations="dynamic")
    assert [c.name for c in receipt.changes] == ["2"]
    assert "finds ranges as it is called" in receipt.skipped[0].what
    with pytest.raises(NoEffect, match="finds ranges"):
        quantize(nn.Conv2d(2, 2, 1), calibration=torch.randn(4, 2, 2, 2), activations="dynamic")


def test_training_and_files_know_of_it(tmp_path: Path, trainer_kwargs: dict[str, Any]) -> None:
    x = torch.randn(32, 6)
    data = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 8)
    user, hand = tiny.Layers(), tiny.Layers()
    hand.load_state_dict(user.state_dict())
    trainer = Trainer(
        **trainer_kwargs | {"max_epochs": 2},
        callbacks=[QuantizationAwareTraining(activations="dynamic")],
    )
    trainer.fit(user, data)
    optimizer = torch.optim.SGD(hand.parameters(), 0.1)

    def dense(x: Tensor, layer: Any) -> Tensor:
        low, high = min(float(x.detach().min()), 0.0), max(float(x.detach().max()), 0.0)
        step = (high - low) / 255
        zero = round(-low / step)
        whole = (((x / step).round() + zero).clamp(0, 255) - zero) * step
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        weight = layer.weight + ((layer.weight / scale).round() * scale - layer.weight).detach()
        return F.linear(x + (whole - x).detach(), weight, layer.bias)

    for _ in range(2):
        for x_, y in data:
            optimizer.zero_grad()
            F.cross_entropy(dense(F.relu(dense(x_, hand.net[0])), hand.net[2]), y).backward()
            optimizer.step()
    for mine, theirs in zip(user.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    back = load_from_checkpoint(tiny.Layers, tmp_path / "last.ckpt")
    assert torch.equal(back.net(x), user.net(x))
    assert quantization_of(back)["net.0"]["activations"] == "dynamic"


@pytest.mark.slow
def test_bundles_find_ranges_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    quantize(net, calibration=torch.randn(64, 16), activations="dynamic")
    for format in ("export", "onnx"):
        bundle = deploy(
            net, torch.randn(8, 16), to=tmp_path / format, formats=format, budget_s=0.02
        )
        for size in (0.01, 1.0, 100.0):
            x = torch.randn(5, 16) * size
            assert sqnr_db([net(x).detach()], [bundle.predict(x)]) > 42
