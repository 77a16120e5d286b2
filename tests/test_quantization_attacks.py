"""Quantization of networks that share memory, keep tensors, hold masks, dead channels, NaN or float64; of other weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune as masks
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import deploy, prune, quantize, unquantize
from lightning_accel.errors import NoEffect
from lightning_accel.quantization import quantization_of, quantize_sums
from lightning_accel.quantization.budget import sqnr_db
from lightning_accel.quantization.shared import shared_tensors
from lightning_accel.quantization.state import quantized_as

PLAINLY: Any = {"observer": "minmax", "rounding": "nearest", "correct_bias": False}


def mlp(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    first, hidden, last = sizes or (8, 8, 8)
    return nn.Sequential(nn.Linear(first, hidden), nn.ReLU(), nn.Linear(hidden, last))


def one_memory() -> nn.Sequential:
    net = mlp()
    net[2].weight.data = net[0].weight.data
    return net


def test_weights_in_one_memory_are_not_rounded_or_equalized_apart() -> None:
    net, x = one_memory(), torch.randn(64, 8)
    assert shared_tensors(net) == {id(net[0].weight), id(net[2].weight)}
    with pytest.raises(NoEffect, match="has nothing to act on"):
        quantize(net, calibration=x, equalize="cross_layer")
    before = net[0].weight.clone()
    receipt = quantize(net, calibration=x, weights="int4")
    assert torch.equal(net[0].weight, before), (
        "of a weight that two layers read nothing is made up for"
    )
    assert sum("another module's too" in note for note in receipt.notes) == 2
    assert net[0].weight.data_ptr() == net[2].weight.data_ptr()


def test_views_that_overlap_are_found_and_neighbours_are_not() -> None:
    net, flat = mlp(4, 4, 4), torch.randn(48)
    net[0].weight.data, net[2].weight.data = flat[:16].view(4, 4), flat[16:32].view(4, 4)
    assert not shared_tensors(net)
    net[2].weight.data = flat[12:28].view(4, 4)
    assert shared_tensors(net) == {id(net[0].weight), id(net[2].weight)}


def test_what_a_network_keeps_of_a_forward_stays_what_it_was() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            self.feature = F.relu(self.a(x))
            return self.c(F.relu(self.b(self.feature)))

    net, x = Keeps(), torch.randn(64, 8)
    with torch.no_grad():
        net.a.weight[0] *= 100
        net(x)
    feature = net.feature
    receipt = quantize(net, calibration=x, equalize="cross_layer", **PLAINLY)
    assert "1 outputs equalized (cross_layer)" in receipt.notes, "those between b and c"
    assert any("`a` is not equalized: the network keeps" in note for note in receipt.notes)
    unquantize(net)
    net(x)
    assert sqnr_db([feature], [net.feature.detach()]) > 100


def test_a_bias_under_a_mask_is_told_and_stays_under_it() -> None:
    net, x = mlp(), torch.randn(64, 8)
    masks.l1_unstructured(net[0], "bias", 0.5)
    kept = net[0].bias_orig.clone()  # type: ignore[operator]
    receipt = quantize(net, calibration=x, weights="int4")
    assert "0: its bias is not corrected, it is computed from others" in receipt.notes
    net(x)
    assert torch.equal(net[0].bias_orig, kept)  # type: ignore[arg-type]
    assert int((net[0].bias == 0).sum()) == 4


@pytest.mark.slow
def test_channels_without_weights_keep_their_bias_in_onnx(tmp_path: Path) -> None:
    net = mlp(8, 16, 4)
    with torch.no_grad():
        net[0].weight[:5], net[0].bias[:5] = 0, 0.5
        net[0].weight[5] = 1e-9
    x = torch.randn(32, 8)
    quantize(net, calibration=x, equalize="cross_layer")
    bundle = deploy(net, x, to=tmp_path / "net", formats="onnx", budget_s=0.01)
    assert sqnr_db([net(x).detach()], [bundle.predict(x)]) > 42


def test_a_quantized_network_is_pruned_and_stays_quantized() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.Flatten(), nn.Linear(72, 4)
    ).eval()
    x = torch.randn(32, 3, 5, 5)
    quantize(net, calibration=x, weights="int4")
    before, twin_ = quantization_of(net), copy.deepcopy(net)
    weight = net[2].quantized_weight()  # type: ignore[operator]
    receipt = prune(net, example=x, ratio=0.5, select="0")
    (moved,) = [moved for moved in receipt.moved if moved.name == "0.weight"]
    rows = moved.kept.dims[0]
    assert rows is not None and len(rows) == 8
    after = quantization_of(net)
    assert [state["range"] for state in after.values()] == [s["range"] for s in before.values()]
    assert torch.equal(after["0"]["scale"], before["0"]["scale"][rows])
    with torch.no_grad():  # by hand: what is gone multiplies zeros
        gone = [row for row in range(16) if row not in rows.tolist()]
        assert torch.equal(net[2].quantized_weight(), weight[:, rows])  # type: ignore[operator]
        twin_[1].register_forward_hook(lambda _, __, out: out.index_fill(1, torch.tensor(gone), 0))
        torch.testing.assert_close(net(x), twin_(x))


def test_a_prune_that_fails_leaves_the_quantization_and_one_that_breaks_groups_is_told() -> None:
    net = mlp(8, 16, 4)
    quantize(net, calibration=torch.randn(8, 8), weights="int4", activations=None, group=8)
    before = quantization_of(net)
    with pytest.raises(NoEffect):
        prune(net, example=torch.randn(2, 8), ratio=0.5, select="2")
    assert str(quantization_of(net)) == str(before)
    with pytest.warns(UserWarning, match="no multiple of group=8 any more"):
        prune(net, example=torch.randn(2, 8), ratio=0.25)
    assert [*quantization_of(net)] == ["0"] and type(net[2]) is nn.Linear


@pytest.mark.slow
def test_nan_shows_in_files_of_ranges_of_each_call(tmp_path: Path) -> None:
    net, x = mlp(8, 16, 4), torch.randn(16, 8)
    quantize(net, calibration=x, activations="dynamic")
    bundle = deploy(net, x, to=tmp_path / "net", formats="onnx", budget_s=0.01)
    x[3, 2] = torch.nan
    assert bundle.predict(x)[3].isnan().all() and net(x)[3].isnan().all()


@pytest.mark.parametrize("verb", [quantize, quantize_sums])
def test_a_loader_that_shuffles_leaves_random_states(verb: Any) -> None:
    own = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.randn(64, 8))
    net = mlp()
    for generator in (None, own):
        loader = DataLoader(data, 16, shuffle=True, generator=generator)
        states = torch.get_rng_state(), own.get_state()
        if verb is quantize:
            verb(net, calibration=loader)
        else:
            with pytest.raises(NoEffect):
                verb(net, calibration=loader)
        assert torch.equal(states[0], torch.get_rng_state())
        assert torch.equal(states[1], own.get_state())
        unquantize(net)


@pytest.mark.slow
def test_a_network_in_float64_is_deployed_in_float32_and_told(tmp_path: Path) -> None:
    net, x = mlp(8, 16, 4).double(), torch.randn(32, 8).double()
    quantize(net, calibration=x)
    bundle = deploy(net, x, to=tmp_path / "net", formats="onnx", budget_s=0.01)
    answer = bundle.predict(x.float())
    assert answer.dtype is torch.float32
    assert sqnr_db([net(x).detach()], [answer]) > 42
    assert any("float64 are deployed in float32" in note for note in bundle.manifest["notes"])
    assert net[0].weight.dtype is torch.float64


def test_other_weights_in_a_quantized_network_are_told_and_those_of_a_file_are_not() -> None:
    net, other, x = mlp(), mlp(8, 8, 8), torch.randn(64, 8)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 3
    quantize(net, calibration=x)
    net.load_state_dict(net.state_dict())  # the same
    with pytest.warns(UserWarning, match="ranges and scales are of other weights"):
        net.load_state_dict(other.state_dict())
    quantize(other, calibration=x)
    quantized_as(net, quantization_of(other))  # as files do, whose weights come next
    net.load_state_dict(other.state_dict())
    torch.testing.assert_close(net(x), other(x))
    with pytest.warns(UserWarning, match="ranges and scales are of other weights"):
        net.load_state_dict(mlp().state_dict())


def test_a_calibration_of_constant_channels_is_told() -> None:
    for constant, told in ((5, True), (3, False)):
        x = torch.randn(64, 8)
        x[:, :constant] = torch.arange(1.0, constant + 1) * 0.3
        receipt = quantize(mlp(8, 16, 4), calibration=[x[:32], x[32:]], rounding="nearest")
        notes = [note for note in receipt.notes if "one value only on the calibration" in note]
        assert bool(notes) == told
        assert not told or "`0` (62%)" in notes[0]
