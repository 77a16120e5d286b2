"""Equalized channels: factors as the papers give them, outputs as before, and what is not so is put back."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_accel import quantize, unquantize
from lightning_accel.errors import NoEffect
from lightning_accel.quantization import flow
from lightning_accel.quantization.budget import sqnr_db

PLAINLY: Any = {"observer": "minmax", "rounding": "nearest", "correct_bias": False}


class Net(nn.Module):
    """A pair of convolutions around a norm; a layer whose output others read as well; a norm with two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1)
        self.up, self.norm, self.c = (
            nn.ConvTranspose2d(4, 5, 2),
            nn.BatchNorm2d(5),
            nn.Conv2d(5, 8, 1),
        )
        self.beside = nn.Linear(8, 8)
        self.layer_norm, self.q, self.k = nn.LayerNorm(8), nn.Linear(8, 7), nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.a(x)), 2)
        x = self.c(F.leaky_relu(self.norm(self.up(F.relu(self.b(x)))), 0.1)).mean((2, 3))
        x = self.beside(x)
        y = self.layer_norm(x)
        return self.q(y) * self.k(F.dropout(y, 0.5, self.training)) + x.sum()


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    made = Net().eval()
    with torch.no_grad():
        for parameter in made.parameters():  # channels that differ by orders of magnitude
            parameter *= torch.logspace(-1, 1, len(parameter)).view(
                -1, *[1] * (parameter.dim() - 1)
            )
        made.layer_norm.weight[2] = -40
        made.norm.running_mean.normal_()  # type: ignore[union-attr]
    return made


def largest(weight: Any, dim: int) -> np.ndarray:
    others = tuple(d for d in range(weight.dim()) if d != dim)
    return np.abs(weight.detach().numpy()).max(axis=others)


def test_cross_layer_gives_both_sides_equal_ranges(net: Net) -> None:
    x, before = torch.randn(16, 3, 8, 8), copy.deepcopy(net)
    receipt = quantize(net, calibration=x, equalize="cross_layer", **PLAINLY)
    assert "4 outputs equalized (cross_layer)" in receipt.notes
    unquantize(net)
    assert sqnr_db([before(x).detach()], [net(x).detach()]) > 100
    for out, out_dim, into, into_dim in (
        (net.a, 0, net.b, 1),
        (net.b, 0, net.up, 0),
        (net.norm, 0, net.c, 1),
    ):
        np.testing.assert_allclose(
            largest(out.weight, out_dim), largest(into.weight, into_dim), rtol=1e-3
        )
    assert torch.equal(net.beside.weight, before.beside.weight), "the sum reads it as well"


def test_smoothquant_moves_outliers_of_norms_to_weights(net: Net) -> None:
    x, before = torch.randn(16, 3, 8, 8), copy.deepcopy(net)
    plainly = copy.deepcopy(net)
    quantize(plainly, calibration=x, select=["q", "k"], **PLAINLY)
    inputs: list[Tensor] = []
    before.q.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    wanted = before(x).detach()
    receipt = quantize(net, calibration=x, equalize="smoothquant", select=["q", "k"], **PLAINLY)
    assert "1 outputs equalized (smoothquant)" in receipt.notes
    of_inputs = inputs[0].abs().amax(0).numpy()
    of_weights = np.maximum(largest(before.q.weight, 1), largest(before.k.weight, 1))
    factor = np.sqrt(of_inputs / of_weights)
    for made, old, by in (
        (net.layer_norm.weight, before.layer_norm.weight, 1 / factor),
        (net.layer_norm.bias, before.layer_norm.bias, 1 / factor),
        (net.q.weight, before.q.weight, factor),
        (net.k.weight, before.k.weight, factor),
    ):
        np.testing.assert_allclose(made.detach().numpy(), old.detach().numpy() * by, rtol=1e-4)
    gained = sqnr_db([wanted], [net(x).detach()]) - sqnr_db([wanted], [plainly(x).detach()])
    assert gained > 1.5
    unquantize(net)
    assert sqnr_db([wanted], [net(x).detach()]) > 100


def test_what_would_compute_something_else_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "_HOMOGENEOUS", ("gelu",))
    net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(NoEffect, match="would compute something else"):
        quantize(net, calibration=torch.randn(32, 4), equalize="cross_layer")
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert type(net[0]) is nn.Linear
    monkeypatch.setattr(flow, "_HOMOGENEOUS", ("gelu", "relu"))
    both = nn.Sequential(*net, nn.ReLU(), nn.Linear(4, 4))
    wanted = both(x := torch.randn(32, 4)).detach()
    receipt = quantize(both, calibration=x, equalize="cross_layer", **PLAINLY)
    assert "1 outputs equalized (cross_layer)" in receipt.notes
    assert "`0` is not equalized: the network would compute something else" in receipt.notes
    unquantize(both)
    assert sqnr_db([wanted], [both(x).detach()]) > 100


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    return net


@pytest.mark.parametrize(
    "net",
    [
        tied(),
        nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)),
        nn.Sequential(nn.Linear(4, 4), nn.Flatten(), nn.Linear(4, 4)),
        nn.Sequential(nn.Linear(4, 4)),
        nn.Sequential(nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 4)),
    ],
    ids=["tied", "gelu", "another function", "one", "no factors"],
)
@pytest.mark.parametrize("how", ["cross_layer", "smoothquant"])
def test_nothing_to_act_on_is_told(net: nn.Module, how: str) -> None:
    with pytest.raises(NoEffect, match="has nothing to act on"):
        quantize(net, calibration=torch.randn(8, 4), equalize=how)


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match="`equalize`"):
        quantize(nn.Linear(4, 4), calibration=torch.randn(8, 4), equalize="all")
