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
from lightning_accel.errors import NoEffect, Unsupported
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


# What an adversary found.


def decibels(wanted: Tensor, found: Tensor) -> float:
    noise = (wanted - found).detach().double().square().sum()
    return float(10 * torch.log10(wanted.double().square().sum() / noise))


@pytest.mark.parametrize("how", ["smoothquant", "cross_layer"])
def test_a_layer_that_stays_in_floating_point_is_equalized_with_the_others(how: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    with torch.no_grad():
        net[0].weight[:3] *= 30
        net[1].weight *= torch.logspace(-1, 1, 32)[:, None]
    x = torch.randn(256, 16)
    wanted = net(x).detach()

    def metric(made: nn.Module) -> float:
        return min(100.0, decibels(wanted, made(x)))

    full = quantize(copy.deepcopy(net), calibration=[x], equalize=how, metric=metric)
    allowed = (
        100 - float(full.notes[-1].rpartition("-> ")[2]) - 1
    )  # a little more than all of it has
    receipt = quantize(net, calibration=[x], equalize=how, metric=metric, max_drop=allowed)
    assert any("it costs most" in change.what for change in receipt.skipped)
    told = float(next(n for n in receipt.notes if n.startswith("metric")).split()[3].rstrip(","))
    assert metric(net) == pytest.approx(told, abs=1e-3) and metric(net) >= 100 - allowed


class Aux(nn.Module):
    """A head of training, as in GoogLeNet, and a mask over what comes out."""

    def __init__(self, has_head: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.has_head = nn.Linear(8, 16), nn.Linear(16, 4), has_head
        if has_head:
            self.head = nn.Linear(16, 3)
        with torch.no_grad():
            self.first.weight *= torch.logspace(-1, 1, 16)[:, None]

    def forward(self, x: Tensor) -> Any:
        inner = self.first(x).relu()
        masked = self.last(inner).masked_fill(torch.arange(4) == 1, -1e9)
        if self.has_head:
            return (masked, self.head(inner)) if self.training else masked
        return masked, inner


def test_a_head_that_does_not_run_on_the_calibration_is_not_given_something_else() -> None:
    net = Aux(has_head=True).eval()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(Unsupported, match="nothing comes into `head`"):
        quantize(net, calibration=[torch.randn(64, 8)], equalize="cross_layer")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_each_output_has_to_stay_and_masks_are_no_signal() -> None:
    net, x = Aux(has_head=False).eval(), torch.randn(64, 8)
    inner = net(x)[1].detach()
    with pytest.raises(NoEffect, match="would compute something else"):
        quantize(net, calibration=[x], equalize="cross_layer")
    assert torch.equal(net(x)[1], inner)
    receipt = quantize(net, calibration=[x])
    assert 20 < float(receipt.notes[0].split()[-2]) < 60  # and not what a mask of -1e9 drowns


def test_what_a_hook_of_the_user_sees_stays() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    seen: list[Tensor] = []
    net[0].register_forward_hook(lambda module, args, output: seen.append(output))
    with pytest.raises(NoEffect):
        quantize(net, calibration=[torch.randn(64, 8)], equalize="cross_layer")


@pytest.mark.parametrize(
    ("net", "shape", "how"),
    [
        (nn.Sequential(nn.LayerNorm(16), nn.Conv1d(8, 8, 1)), (4, 8, 16), "smoothquant"),
        (nn.Sequential(nn.LayerNorm(8), nn.Conv1d(8, 8, 1)), (4, 8, 8), "smoothquant"),
        (nn.Sequential(nn.BatchNorm1d(8), nn.Linear(16, 4)), (4, 8, 16), "smoothquant"),
        (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Conv1d(8, 4, 1)), (4, 8, 8), "cross_layer"),
    ],
)
def test_channels_of_another_dimension_are_no_pair(net: nn.Module, shape: Any, how: str) -> None:
    with pytest.raises(NoEffect, match="nothing to act on"):
        quantize(net.eval(), calibration=[torch.randn(*shape)], equalize=how)


def test_a_weight_that_another_module_holds_is_not_rounded_for_a_layer() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids))

    net = Tied()
    before = net.table.weight.detach().clone()
    receipt = quantize(
        net,
        calibration=[torch.randint(0, 12, (8, 5))],
        weights="int4",
        activations=None,
        select="head",
    )
    assert torch.equal(net.table.weight, before) and net.head.weight is net.table.weight
    assert any("another module's too" in note for note in receipt.notes)


def test_layers_that_are_only_rounded_are_named() -> None:
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2))
    receipt = quantize(net, calibration=[torch.randn(2, 4, 5, 5)], weights="int3", activations=None)
    assert any("0: rounded to the nearest, a layer of its kind" in note for note in receipt.notes)


def test_pairs_are_those_of_every_batch() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 4)
            with torch.no_grad():
                self.a.weight *= torch.logspace(-1, 1, 16)[:, None]

        def forward(self, x: Tensor) -> Tensor:
            inner = self.a(x).relu()
            return self.b(inner) if x.mean() < 0.5 else self.c(inner)

    net, x = Branches().eval(), torch.randn(64, 8)
    other = net(x + 2).detach()
    with pytest.raises(NoEffect):
        quantize(net, calibration=[x] * 5 + [x + 2], equalize="cross_layer")
    assert torch.equal(net(x + 2), other)


@pytest.mark.parametrize("rounding", ["least_squares", "adaround"])
def test_weights_that_are_zero_stay_so(rounding: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 24))
    mask = torch.rand(24, 16) < 0.5
    with torch.no_grad():
        net[0].weight[mask] = 0
    quantize(
        net,
        calibration=[torch.randn(64, 16) @ torch.randn(16, 16)],
        rounding=rounding,
        weights="int8",
        activations=None,
    )
    assert not net[0].weight[mask].any() and net[0].weight[~mask].any()
