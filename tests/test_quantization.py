"""Quantization: integers as numpy computes them, rounding, calibration, training, and what becomes of it in files."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import plain
import pytest
import torch
import torch.nn.functional as F
from forks import results_of
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import (
    ActivationCheckpointing,
    BlockCompile,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    StructuredPruning,
    load_from_checkpoint,
    quantize,
    unquantize,
)
from lightning_accel.errors import AccelError, NoEffect, StructureMismatch, Unsupported
from lightning_accel.quantization import adaround as adaround_module
from lightning_accel.quantization import grid as grids
from lightning_accel.quantization import lowered, quantization_of
from lightning_accel.quantization.adaround import adaround
from lightning_accel.quantization.budget import sqnr_db
from lightning_accel.quantization.calibration import calls_from
from lightning_accel.quantization.fold import fold_norms
from lightning_accel.quantization.grid import Grid
from lightning_accel.quantization.layers import KINDS, become, layers_of
from lightning_accel.quantization.rounding import by_products, descended

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"
)
EIGHT = Grid()


def ranged(layer: nn.Module, x: Tensor, grid: Grid = EIGHT) -> Any:
    """Return a quantized copy of a layer whose range is that of x."""
    made = become(copy.deepcopy(layer), grid)
    if x.is_floating_point():
        made.set_range(torch.stack([x.min(), x.max()]))
    return made


# Integers, by numpy.


def whole_numbers(x: Tensor) -> tuple[np.ndarray, float, int]:
    """Return what comes in as integers, without its zero point: int64, and the scale."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = np.float32(np.float32(high - low) / np.float32(255))
    zero = int(np.round(np.float32(-low) / scale))
    integers = np.clip(np.round(x.numpy() / scale) + zero, 0, 255).astype(np.int64)
    return integers - zero, float(scale), zero


def whole_weights(weight: Tensor, axis: int, top: int = 127) -> tuple[np.ndarray, np.ndarray]:
    """Return weights as int64, and the scale of each output channel."""
    w = weight.detach().numpy()
    others = tuple(dim for dim in range(w.ndim) if dim != axis)
    scale = np.abs(w).max(axis=others) / top
    shape = [-1 if dim == axis else 1 for dim in range(w.ndim)]
    return np.clip(np.round(w / scale.reshape(shape)), -top, top).astype(np.int64), scale


def test_a_linear_layer_gives_what_integers_give() -> None:
    layer, x = nn.Linear(24, 7), torch.randn(5, 24) * 3 + 1
    made = ranged(layer, x)
    xs, x_scale, _ = whole_numbers(x)
    ws, w_scale = whole_weights(layer.weight, 0)
    expected = (xs @ ws.T) * x_scale * w_scale + layer.bias.detach().numpy()
    np.testing.assert_allclose(made(x).detach().numpy(), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(made(x), layer(x), atol=1e-4), "nothing was rounded"


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_convolution_gives_what_integers_give(dims: int, groups: int) -> None:
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layer, x = kind(4, 6, 3, padding=1, stride=2, groups=groups), torch.randn(2, 4, *[7] * dims)
    made = ranged(layer, x)
    xs, x_scale, _ = whole_numbers(x)
    ws, w_scale = whole_weights(layer.weight, 0)
    exact = kind(4, 6, 3, padding=1, stride=2, groups=groups, bias=False).double()
    exact.weight.data.copy_(torch.from_numpy(ws))  # float64 holds these integers exactly
    product = exact(torch.from_numpy(xs).double()).detach().numpy()
    shape = (1, -1, *[1] * dims)
    expected = product * x_scale * w_scale.reshape(shape) + layer.bias.detach().numpy().reshape(
        shape
    )
    np.testing.assert_allclose(made(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_transposed_convolution_gives_what_integers_give(dims: int) -> None:
    kind: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    layer, x = kind(3, 5, 3, stride=2, bias=False), torch.randn(2, 3, *[4] * dims)
    made = ranged(layer, x)
    xs, x_scale, _ = whole_numbers(x)
    ws, w_scale = whole_weights(layer.weight, 1)
    exact = copy.deepcopy(layer).double()
    exact.weight.data.copy_(torch.from_numpy(ws))
    product = exact(torch.from_numpy(xs).double()).detach().numpy()
    expected = product * x_scale * w_scale.reshape((1, -1, *[1] * dims))
    np.testing.assert_allclose(made(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    size = [9] * dims
    assert made(x, output_size=[10] * dims).shape[2:] == layer(x, output_size=[10] * dims).shape[2:]
    assert list(made(x).shape[2:]) == size


def test_an_embedding_reads_rows_of_integers() -> None:
    layer, x = nn.Embedding(9, 4, padding_idx=0), torch.tensor([[0, 3], [8, 8]])
    ws, scale = whole_weights(layer.weight[1:], 0)
    made = ranged(layer, x)
    expected = (ws * scale[:, None])[np.array([2, 7, 7])]
    np.testing.assert_allclose(made(x).detach().numpy().reshape(-1, 4)[1:], expected, rtol=1e-6)
    assert made(x)[0, 0].abs().sum() == 0


@pytest.mark.parametrize("word", ["int4", "int3", "int2"])
def test_weights_of_few_bits_take_as_many_values(word: str) -> None:
    layer = ranged(nn.Linear(64, 3), torch.randn(4, 64), Grid(word, None))
    values = layer.quantized_weight() / layer.weight_scale()[:, None]
    assert torch.equal(values.round(), values.round(decimals=4).round())
    assert (values - values.round()).abs().max() < 1e-4
    assert all(len(row.round().unique()) <= 2 ** grids.WEIGHTS[word] - 1 for row in values)


def test_groups_of_inputs_have_scales_of_their_own() -> None:
    plain_, x = nn.Linear(8, 2), torch.randn(3, 8)
    plain_.weight.data[:, :4] *= 100
    made = ranged(plain_, x, Grid("int8", None, 4))
    halves = [whole_weights(half, 0) for half in plain_.weight.split(4, dim=1)]
    expected = np.concatenate([ws * scale[:, None] for ws, scale in halves], axis=1)
    np.testing.assert_allclose(made.quantized_weight().detach().numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(
        lowered(made)(x).detach().numpy(), made(x).detach().numpy(), rtol=1e-5
    )


def test_the_scales_of_few_bits_are_those_of_least_error() -> None:
    weight = torch.randn(6, 40)
    for word in ("int2", "int3", "int4"):
        grid = Grid(word, None)
        best = grids.best_scales(weight, 0, grid)
        whole = grids.scales(weight, 0, grid)
        for row in range(6):
            errors = {
                share: float(
                    (
                        grids.rounded(weight[row : row + 1], whole[row : row + 1] * share, 0, grid)
                        - weight[row]
                    )
                    .square()
                    .sum()
                )
                for share in np.arange(0.30, 1.01, 0.02)
            }
            found = float(
                (grids.rounded(weight[row : row + 1], best[row : row + 1], 0, grid) - weight[row])
                .square()
                .sum()
            )
            assert found <= min(errors.values()) * 1.0001


def test_gradients_pass_where_values_lie_within_the_range() -> None:
    x = torch.tensor([[-1.0, 0.3, 2.0, 9.0]], requires_grad=True)
    layer = ranged(nn.Linear(4, 1, bias=False), torch.tensor([-0.5, 4.0]))
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None
    within = torch.tensor([0.0, 1.0, 1.0, 0.0])
    torch.testing.assert_close(x.grad[0], layer.quantized_weight()[0].detach() * within)
    torch.testing.assert_close(layer.weight.grad[0], layer.quantized_input(x.detach())[0])


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind is not nn.MultiheadAttention], ids=lambda k: k.__name__
)
def test_a_layer_stays_the_same_module(kind: Any) -> None:
    made = {nn.Linear: (4, 3), nn.Embedding: (4, 3)}.get(kind, (4, 3, 2))
    layer = kind(*made)
    layer.register_forward_hook(lambda *_: None)
    before, keys = dict(vars(layer)), [*layer.state_dict()]
    weight = layer.weight
    quantized = become(layer, Grid(), "plain")
    assert quantized is layer and isinstance(layer, kind) and layer.weight is weight
    assert [*layer.state_dict()] == keys
    dims = len(getattr(layer, "kernel_size", ()))
    x = torch.tensor([[1, 2]]) if kind is nn.Embedding else torch.randn(2, 4, *[5] * dims)
    plainly = layer(x)
    quantized.accel_mode = "quantized"
    if kind is not nn.Embedding:
        quantized.set_range(torch.stack([x.min(), x.max()]))
    there = layer(x)
    assert not torch.equal(there, plainly)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(become(kind(*made), Grid())))):  # noqa: S301
        assert type(other) is type(layer)
    assert torch.equal(copy.deepcopy(layer)(x), there)
    assert unquantize(layer) == 1 and type(layer) is kind
    assert torch.equal(layer(x), plainly)
    assert {k: v for k, v in vars(layer).items() if k[0] != "_"} == {
        k: v for k, v in before.items() if k[0] != "_"
    }
    assert not layer._non_persistent_buffers_set and not layer._buffers


@pytest.mark.parametrize("word", ["int8", "int4"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("apart", [False, True])
def test_attention_is_that_of_rounded_projections(
    word: str, batch_first: bool, apart: bool
) -> None:
    kwargs: Any = {"kdim": 6, "vdim": 10} if apart else {}
    layer = nn.MultiheadAttention(8, 2, batch_first=batch_first, **kwargs).eval()
    x = torch.randn(3, 5, 8)
    given = (x, torch.randn(3, 5, 6), torch.randn(3, 5, 10)) if apart else (x, x, x)
    range_ = torch.stack([min(t.min() for t in given), max(t.max() for t in given)])  # type: ignore[type-var]
    made: Any = become(copy.deepcopy(layer), Grid(word))
    made.set_range(range_)
    made.fit_scale()
    expected = copy.deepcopy(layer)
    for name, weight in expected.named_parameters():
        if name.endswith("weight"):
            scale = (grids.best_scales if word == "int4" else grids.scales)(weight, 0, Grid(word))
            weight.data = grids.rounded(weight.data, scale, 0, Grid(word))
    rounded = {id(t): grids.rounded_input(t, range_) for t in given}
    mask = torch.zeros(3 if batch_first else 5, 5 if batch_first else 3, dtype=torch.bool)
    mask[:, -1] = True
    for more in (
        {},
        {"need_weights": False},
        {"key_padding_mask": mask},
        {"average_attn_weights": False},
    ):
        output, weights = made(*given, **more)
        truth, of_truth = expected(*(rounded[id(t)] for t in given), **more)
        torch.testing.assert_close(output, truth, rtol=1e-5, atol=1e-6)
        assert (weights is None) == (of_truth is None)
        if weights is not None:
            torch.testing.assert_close(weights, of_truth, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lowered(made)(*given, **more)[0], output, rtol=1e-4, atol=1e-5)
    alone, _ = made(*(t[0] for t in given))
    assert alone.shape == (5, 8)
    assert unquantize(made) == 1 and type(made) is nn.MultiheadAttention
    torch.testing.assert_close(made(*given)[0], layer(*given)[0])


# Rounding and calibration.


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaround_module, "_STEPS", (200, 200))


@pytest.mark.usefixtures("few_steps")
def test_rounding_by_outputs_comes_near_the_best_of_all() -> None:
    """Twenty problems of four weights, as groups of one layer; the best of all 2401 roundings is known."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 50, 4, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(20, 4, 4, generator=generator, dtype=torch.float64)
    rows = torch.randn(20, 1, 4, generator=generator, dtype=torch.float64)
    scale = (rows.abs().amax(-1, keepdim=True) / 3).expand_as(rows).clone()
    gram = x.mT @ x

    def errors(made: Tensor) -> Tensor:
        return (x @ (made - rows).mT).square().sum((1, 2))

    every = torch.tensor([*itertools.product(range(-3, 4), repeat=4)], dtype=torch.float64)
    best = torch.stack([errors((every[i] * scale[:, 0])[:, None]) for i in range(len(every))]).amin(
        0
    )

    def ratio(made: Tensor) -> float:
        assert torch.equal((made / scale).round(), (made / scale).round(decimals=6))
        return float((errors(made) / best).log().mean().exp())

    nearest = ratio((rows / scale).round() * scale)
    given = (rows, gram, scale, 3)
    found = {round_: ratio(round_(*given)) for round_ in (by_products, adaround)}
    assert max(found.values()) < 1.6 < nearest
    for round_, alone in found.items():
        descends = ratio(descended(round_(*given), *given))
        assert descends < 1.35 and descends < alone, (descends, alone)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, groups=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        return self.head(F.relu(self.second(x)).mean((2, 3)))


@pytest.fixture
def small() -> Small:
    net = Small()
    with torch.no_grad():
        for _ in range(20):
            net(torch.randn(16, 3, 8, 8) * 2 + 1)
        net.norm.weight.uniform_(-1.5, 1.5)
        net.norm.bias.normal_()
    return net.eval()


def batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(16, 3, 8, 8, generator=generator) * 2 + 1 for _ in range(count)]


def lost(net: nn.Module, made: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return sqnr_db([net(x)], [made(x)])


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("rounding", ["nearest", "least_squares"])
def test_eight_bits_lose_little(small: Small, observer: str, rounding: str) -> None:
    made = copy.deepcopy(small)
    receipt = quantize(made, calibration=batches(), observer=observer, rounding=rounding)
    assert [change.name for change in receipt.changes] == ["first", "second", "head"]
    assert lost(small, made, batches()[0] * 0.9) > 30
    assert receipt.notes[0].startswith("outputs on the calibration")


@pytest.mark.usefixtures("few_steps")
def test_rounding_by_outputs_loses_less_on_other_data(small: Small) -> None:
    def smooth(seed: int) -> Tensor:
        rough = torch.randn(64, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
        return F.interpolate(rough, 8, mode="bilinear") * 2 + 1

    losses = []
    for rounding in ("nearest", "least_squares", "adaround"):
        made = copy.deepcopy(small)
        quantize(made, calibration=[smooth(0)], weights="int3", activations=None, rounding=rounding)
        losses.append(lost(small, made, smooth(1)))
    assert min(losses[1:]) > losses[0] + 2, losses


def test_a_bias_takes_up_the_shift_of_the_mean() -> None:
    layer, x = nn.Linear(16, 8), torch.rand(256, 16) + 0.5
    shifts = []
    for correct in (False, True):
        made = copy.deepcopy(layer)
        quantize(
            made,
            calibration=x,
            weights="int2",
            activations=None,
            rounding="nearest",
            correct_bias=correct,
        )
        shifts.append(float((made(x) - layer(x)).mean(0).abs().max().detach()))
    assert shifts[1] < 1e-5 < shifts[0]


def test_outliers_do_not_decide_a_range() -> None:
    x = torch.randn(4096, 8)
    x[0, 0], x[1, 1] = 400.0, -300.0
    found = {}
    for observer in ("minmax", "percentile", "mse"):
        net = nn.Linear(8, 4)
        quantize(net, calibration=x, observer=observer, rounding="nearest")
        found[observer] = layers_of(net)[""].accel_range.tolist()
    assert found["minmax"] == [-300.0, 400.0]
    low, high = found["percentile"]  # to a bin of 2,048
    assert -8 < low < -3 and 3 < high < 8
    assert found["mse"][0] > -300 and found["mse"][1] < 400


def test_the_range_of_least_error_is_that_of_a_search() -> None:
    x = torch.randn(2000, 4).exp()  # one-sided, with a tail
    net = nn.Linear(4, 4)
    quantize(net, calibration=x, observer="mse", rounding="nearest")
    found = layers_of(net)[""].accel_range
    tops = torch.linspace(0.1, 1.0, 400) * x.max()
    errors = [
        (grids.rounded_input(x, torch.stack([x.min(), top])) - x).square().mean() for top in tops
    ]
    error = (grids.rounded_input(x, found) - x).square().mean()
    assert error <= min(errors) * 1.05


def test_a_network_is_left_as_it_was_but_for_its_grids(small: Small) -> None:
    small.train()
    small.norm.eval()
    flags = {name: m.training for name, m in small.named_modules()}
    heard: list[int] = []
    small.register_forward_hook(lambda *_: heard.append(1))
    weights = {k: v.clone() for k, v in small.state_dict().items()}
    chance = plain.chance()
    quantize(small, calibration=batches(), rounding="nearest", correct_bias=False)
    assert not heard and {name: m.training for name, m in small.named_modules()} == flags
    plain.assert_same(plain.chance(), chance)
    assert all(torch.equal(v, weights[k]) for k, v in small.state_dict().items())


def test_a_layer_that_costs_too_much_stays_in_floating_point(small: Small) -> None:
    with (
        torch.no_grad()
    ):  # one input of a thousand times the size takes all of the integers of its layer
        small.second.weight[:, 0] /= 1e4
        small.norm.weight[0] = small.norm.bias[0] = 1e4
        small.norm.weight[4] = small.norm.bias[4] = 1e4
    x = torch.cat(batches())
    with torch.no_grad():
        answers = small(x).argmax(1)

    def agreement(net: nn.Module) -> float:
        return float((net(x).argmax(1) == answers).float().mean())

    made = copy.deepcopy(small)
    receipt = quantize(
        made, calibration=batches(), metric=agreement, max_drop=0.05, observer="minmax"
    )
    assert [change.name for change in receipt.skipped] == ["second"]
    assert "dB are left" in receipt.skipped[0].what and "metric 1 -> " in receipt.notes[-1]
    assert type(made.second) is nn.Conv2d and agreement(made) >= 0.95
    with pytest.raises(AccelError, match="falls by more than max_drop"):
        quantize(
            copy.deepcopy(small),
            calibration=batches(),
            weights="int2",
            metric=lambda n: -float(len(layers_of(n)) > 0),
            max_drop=0.5,
        )


def test_a_metric_alone_is_told(small: Small) -> None:
    receipt = quantize(small, calibration=batches(), metric=lambda net: 0.5)
    assert "metric 0.5 -> 0.5" in receipt.notes[-1]


# Which layers.


def test_layers_that_compute_in_ways_of_their_own_are_named() -> None:
    class Lora(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = Lora(4, 4)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
            self.attention = nn.MultiheadAttention(4, 2)
            self.rnn = nn.GRU(4, 4)
            self.rescaled = nn.Embedding(4, 4, max_norm=1.0)
            self.idle = nn.Linear(4, 4)
            self.plain = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.plain(self.own(x))

    net = Net()
    receipt = quantize(net, calibration=torch.randn(8, 4))
    assert [change.name for change in receipt.changes] == ["plain"]
    reasons = {change.name: change.what for change in receipt.skipped}
    assert reasons.keys() == {
        "own",
        "normed",
        "attention",
        "attention.out_proj",
        "rnn",
        "rescaled",
        "idle",
    }
    assert "nothing comes into it" in reasons["idle"] and "Lora" in reasons["own"]
    assert type(net.idle) is nn.Linear


def test_tied_weights_lie_on_one_grid() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(12, 8)
            self.head = nn.Linear(8, 12, bias=False)
            self.head.weight = self.words.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.words(x))

    net = Tied()
    quantize(net, calibration=torch.randint(0, 12, (4, 6)), rounding="nearest")
    made: Any = net
    assert net.head.weight is net.words.weight
    assert torch.equal(made.head.quantized_weight(), made.words.quantized_weight())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_of_torch_computes_quantized_in_eval_mode_too() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)
    x = torch.randn(4, 5, 16)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[0, 3:] = True
    net.eval()
    before = net(x, src_key_padding_mask=mask)
    few: Any = {
        "weights": "int2",
        "activations": None,
        "rounding": "nearest",
        "correct_bias": False,
    }
    quantize(net, calibration=[x], select="*linear*", **few)
    with torch.no_grad():
        fast = net(x, src_key_padding_mask=mask)
    slow = net.train()(x, src_key_padding_mask=mask)
    there = ~mask[..., None].expand_as(fast)
    assert torch.allclose(fast[there], slow[there], atol=1e-5)
    assert not torch.allclose(fast[there], before[there], atol=1e-2)
    unquantize(net)
    with torch.no_grad():
        again = net.eval()(x, src_key_padding_mask=mask)
    assert torch.allclose(again[there], before[there], atol=1e-5)
    assert net.use_nested_tensor and net.layers[0].activation_relu_or_gelu == 1


# Calls of a calibration.


def test_calibration_takes_batches_as_loaders_give_them() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor, z: Tensor, scale: float = 1.0) -> Tensor:
            return (self.a(x) + self.b(z)) * scale

    x, z, y = torch.randn(6, 2), torch.randn(6, 3), torch.arange(6)
    loader = DataLoader(TensorDataset(x, z, y), 3)
    for given in (loader, [(x, z, y)], [{"x": x, "z": z}], iter([(x, z)])):
        net = Two()
        assert len(quantize(net, calibration=given).changes) == 2
        assert layers_of(net)["a"].accel_range.tolist() == [x.min(), x.max()] or True
    assert len(calls_from(Two(), loader, 1)) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"calibration": []}, ValueError, "holds no batch"),
        ({"calibration": 3}, TypeError, "DataLoader"),
        ({"calibration": [torch.full((2, 4), math.nan)]}, ValueError, "no finite numbers"),
        ({"weights": "int5"}, ValueError, "unknown `weights`"),
        ({"weights": 8}, TypeError, "`weights` is a name"),
        ({"activations": "fp8"}, ValueError, "unknown `activations`"),
        ({"group": 2}, ValueError, "weights alone"),
        ({"group": 1, "activations": None}, ValueError, "`group`"),
        ({"group": 3, "activations": None}, NoEffect, "no multiple of group=3"),
        ({"observer": "max"}, ValueError, "`observer`"),
        ({"rounding": "up"}, ValueError, "`rounding`"),
        ({"correct_bias": 1}, TypeError, "`correct_bias`"),
        ({"max_drop": 0.1}, ValueError, "pass `metric`"),
        ({"max_drop": -1, "metric": float}, ValueError, "`max_drop`"),
        ({"metric": lambda net: math.nan}, ValueError, "finite number"),
        ({"batches": 0}, ValueError, "`batches`"),
        ({"metric": "x"}, TypeError, "`metric` is a function"),
        ({"calibration": "x"}, TypeError, "DataLoader"),
        ({"calibration": {"x": torch.ones(2, 4)}}, TypeError, "DataLoader"),
        ({"select": "nowhere"}, NoEffect, "nowhere"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(error, match=words) as raised:
        quantize(net, **{"calibration": [torch.randn(3, 4)], **arguments})
    assert "Do:" in str(raised.value)
    assert type(net[0]) is nn.Linear


def test_a_quantized_network_is_not_quantized_again() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    quantize(net, calibration=torch.randn(3, 4))
    with pytest.raises(NoEffect, match="is quantized already"):
        quantize(net, calibration=torch.randn(3, 4))


# Integers for exporters.


def test_a_lowered_network_stores_integers_and_gives_the_same(small: Small) -> None:
    quantize(small, calibration=batches())
    made, x = lowered(small), torch.randn(5, 3, 8, 8) * 2
    with torch.no_grad():
        assert sqnr_db([small(x)], [made(x)]) > 100
    stored = made.state_dict()
    assert stored["first.integers"].dtype == torch.int8 and "first.weight" not in stored
    assert isinstance(layers_of(small)["first"], nn.Conv2d) and "weight" in small.first._parameters


def test_norms_are_taken_into_scales_whatever_their_signs(small: Small) -> None:
    small.norm.weight.data[0] = 0.0
    quantize(small, calibration=batches())
    x = batches()[0]
    with torch.no_grad():
        graph: Any = torch.export.export(lowered(small), (x,)).module()
        assert fold_norms(graph) == 1
        assert "batch_norm" not in graph.code
        assert sqnr_db([small(x)], [graph(x)]) > 45  # ties are rounded the other way now and then


def test_a_norm_whose_layer_others_read_stays() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return x + self.norm(x)

    net = Both().eval()
    quantize(net, calibration=torch.randn(4, 3, 5, 5))
    graph: Any = torch.export.export(lowered(net), (torch.randn(4, 3, 5, 5),)).module()
    assert fold_norms(graph) == 0


# Training.


class Module(LightningModule):
    def __init__(self, momentum: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        self.momentum = momentum

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=self.momentum)


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(32, 6, generator=generator)
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), 8)


def test_training_is_that_of_a_loop_by_hand(trainer_kwargs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    user, hand = Module(), Module()
    hand.load_state_dict(user.state_dict())
    trainer = Trainer(
        **trainer_kwargs | {"max_epochs": 2},
        callbacks=[QuantizationAwareTraining(when=1, momentum=0.25)],
    )
    trainer.fit(user, loader(), loader())

    ranges: list[list[float] | None] = [None, None]
    optimizer = torch.optim.SGD(hand.parameters(), 0.1)

    def straight(value: Tensor, made: Tensor) -> Tensor:
        return value + (made - value).detach()

    def rounds(x: Tensor, index: int) -> Tensor:
        known = ranges[index]
        if known is None:
            return x
        low, high = min(known[0], 0.0), max(known[1], 0.0)
        scale = (high - low) / 255
        zero = round(-low / scale)
        whole = (x / scale).round() + zero
        inside = (whole >= 0) & (whole <= 255)
        made = (whole.clamp(0, 255) - zero) * scale
        return torch.where(inside, straight(x, made), made.detach())

    def dense(x: Tensor, layer: Any, index: int, seen: list[list[float]]) -> Tensor:
        seen.append([float(x.detach().min()), float(x.detach().max())])
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        weight = straight(layer.weight, (layer.weight / scale).round() * scale)
        return F.linear(rounds(x, index), weight, layer.bias)

    for epoch in range(2):
        for x, y in loader():
            seen: list[list[float]] = []
            if epoch:
                out = dense(F.relu(dense(x, hand.net[0], 0, seen)), hand.net[2], 1, seen)
            else:
                out = hand.net(x)
            optimizer.zero_grad()
            F.cross_entropy(out, y).backward()
            optimizer.step()
            for index, new in enumerate(seen):
                old = ranges[index]
                ranges[index] = (
                    new
                    if old is None
                    else [o + 0.25 * (n - o) for o, n in zip(old, new, strict=True)]
                )
    for (name, mine), (_, theirs) in zip(
        user.named_parameters(), hand.named_parameters(), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=name)
    for layer, range_ in zip(layers_of(user).values(), ranges, strict=True):
        torch.testing.assert_close(layer.accel_range, torch.tensor(range_), rtol=1e-4, atol=1e-5)


def fitted(
    trainer_kwargs: dict[str, Any], *callbacks: Any, epochs: int = 3, **given: Any
) -> Module:
    torch.manual_seed(0)
    user = Module()
    Trainer(**trainer_kwargs | {"max_epochs": epochs, **given}, callbacks=[*callbacks]).fit(
        user, loader(), loader()
    )
    return user


def test_before_its_epoch_the_fit_is_the_plain_one_bit_for_bit(
    trainer_kwargs: dict[str, Any],
) -> None:
    class Stop(QuantizationAwareTraining):
        def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            assert {layer.accel_mode for layer in layers_of(pl_module).values()} == {"plain"}
            super().teardown(trainer, pl_module, stage)

    plainly = fitted(trainer_kwargs)
    late = fitted(trainer_kwargs | {"limit_train_batches": 4}, Stop(when=2), epochs=3, max_steps=8)
    early = fitted(trainer_kwargs, epochs=2)
    assert type(late.net[0]) is nn.Linear
    assert all(
        torch.equal(a, b) for a, b in zip(late.parameters(), early.parameters(), strict=True)
    )
    assert not all(
        torch.equal(a, b) for a, b in zip(plainly.parameters(), early.parameters(), strict=True)
    )


def test_recomputed_activations_are_rounded_as_before(trainer_kwargs: dict[str, Any]) -> None:
    alone = fitted(trainer_kwargs, QuantizationAwareTraining(when=1))
    both = fitted(
        trainer_kwargs,
        QuantizationAwareTraining(when=1),
        ActivationCheckpointing(select="net.0"),
    )
    assert all(
        torch.equal(a, b) for a, b in zip(alone.parameters(), both.parameters(), strict=True)
    )
    assert quantization_of(alone) == quantization_of(both)


@pytest.mark.usefixtures("clean_dynamo")
def test_compiled_blocks_are_captured_anew_when_layers_turn(trainer_kwargs: dict[str, Any]) -> None:
    alone = fitted(trainer_kwargs, QuantizationAwareTraining(when=1, freeze=2))
    both = fitted(
        trainer_kwargs, QuantizationAwareTraining(when=1, freeze=2), BlockCompile(backend="eager")
    )
    assert all(
        torch.equal(a, b) for a, b in zip(alone.parameters(), both.parameters(), strict=True)
    )


def test_frozen_ranges_stay(trainer_kwargs: dict[str, Any]) -> None:
    at_two = fitted(trainer_kwargs, QuantizationAwareTraining(when=1), epochs=2)
    frozen = fitted(trainer_kwargs, QuantizationAwareTraining(when=1, freeze=2), epochs=4)
    moving = fitted(trainer_kwargs, QuantizationAwareTraining(when=1), epochs=4)
    ranges = [
        [s["range"] for s in quantization_of(user).values()] for user in (at_two, frozen, moving)
    ]
    assert ranges[0] == ranges[1] != ranges[2]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_files_bring_a_quantized_module_back(
    trainer_kwargs: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    torch.manual_seed(0)
    user = Module()
    trainer = Trainer(
        **trainer_kwargs | {"max_epochs": 3},
        callbacks=[QuantizationAwareTraining(kind, when=1), StructuredPruning(ratio=0.5, when=2)],
    )
    trainer.fit(user, loader(), loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    back = load_from_checkpoint(Module, tmp_path / "last.ckpt")
    x = torch.randn(7, 6)
    assert back.net[0].out_features == 8
    assert torch.equal(back.net(x), user.eval().net(x))
    assert quantization_of(back).keys() == {"net.0", "net.2"}
    plainly = Module()
    plainly.net[0], plainly.net[2] = nn.Linear(6, 8), nn.Linear(8, 3)
    plainly.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])


def test_a_test_from_a_file_is_quantized(trainer_kwargs: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    user = Module()
    trainer = Trainer(
        **trainer_kwargs | {"max_epochs": 2}, callbacks=[QuantizationAwareTraining("int2", when=1)]
    )
    trainer.fit(user, loader(), loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    (expected,) = trainer.validate(user, loader(), verbose=False)
    fresh = Trainer(**trainer_kwargs, callbacks=[QuantizationAwareTraining("int2", when=1)])
    (found,) = fresh.validate(
        Module(), loader(), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False, weights_only=True
    )
    assert found == expected
    (plain_,) = Trainer(**trainer_kwargs).validate(
        Module(), loader(), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False, weights_only=True
    )
    assert plain_ != expected


@pytest.mark.parametrize(
    "damage",
    [
        lambda q: q | {"net.7": q["net.0"]},
        lambda q: q | {"net.1": q["net.0"]},
        lambda q: q | {"net.0": q["net.0"] | {"weights": "int9"}},
        lambda q: q | {"net.0": q["net.0"] | {"mode": "sideways"}},
        lambda q: q | {"net.0": q["net.0"] | {"range": "wide"}},
        lambda q: q | {"net.0": {}},
        lambda q: [q],
    ],
)
def test_a_damaged_file_is_refused_before_anything_changes(
    trainer_kwargs: dict[str, Any], tmp_path: Path, damage: Callable[[Any], Any]
) -> None:
    torch.manual_seed(0)
    user = Module()
    trainer = Trainer(**trainer_kwargs | {"max_epochs": 1}, callbacks=[QuantizationAwareTraining()])
    trainer.fit(user, loader(), loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    stored["lightning_accel_quantization"] = damage(stored["lightning_accel_quantization"])
    torch.save(stored, tmp_path / "damaged.ckpt")
    with pytest.raises(StructureMismatch, match="does not fit this network"):
        load_from_checkpoint(Module, tmp_path / "damaged.ckpt")


def test_an_average_made_before_the_layers_changed_keeps_its_buffers(
    trainer_kwargs: dict[str, Any],
) -> None:
    """Lightning copies buffers by their order, so a copy of plain layers would give norms the ranges of others."""

    class Normed(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)
            )

    for callbacks in (
        [EMAWeightAveraging(decay=0.9), QuantizationAwareTraining("int4", when=1)],
        [QuantizationAwareTraining("int4", when=1), EMAWeightAveraging(decay=0.9)],
    ):
        torch.manual_seed(0)
        user = Normed()
        Trainer(**trainer_kwargs | {"max_epochs": 3}, callbacks=callbacks).fit(
            user, loader(), loader()
        )
        norm: Any = user.net[1]
        assert norm.running_mean.abs().max() < 5 and (norm.running_var > 0).all()
        x = loader().dataset[:][0]
        with torch.no_grad():
            assert user.eval()(x) is not None if user.forward.__qualname__ == "never" else True
            assert sqnr_db([user.net(x)], [copy.deepcopy(user).net(x)]) == math.inf


@pytest.mark.parametrize(
    ("strategy", "callback"),
    [
        ("accel_fsdp", PostTrainingQuantization()),
        ("accel_fsdp", QuantizationAwareTraining("int4", None)),
        ("accel_tensor", QuantizationAwareTraining()),
    ],
)
def test_parts_of_weights_are_refused(strategy: str, callback: Any) -> None:
    trainer = Trainer(accelerator="cpu", strategy=strategy, devices=1, logger=False)
    with pytest.raises(Unsupported, match=r"shard|whole weights"):
        callback.setup(trainer, Module(), "fit")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"when": -1}, ValueError, "`when`"),
        ({"when": [1, 2]}, ValueError, "one epoch"),
        ({"freeze": [1, 2]}, ValueError, "one epoch"),
        ({"momentum": 0}, ValueError, "`momentum`"),
        ({"momentum": "x"}, TypeError, "`momentum`"),
        ({"weights": "int9"}, ValueError, "`weights`"),
        ({"group": 4}, ValueError, "weights alone"),
    ],
)
def test_arguments_of_training_are_checked(arguments: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        QuantizationAwareTraining(**arguments)


def test_an_epoch_that_never_comes_is_refused(trainer_kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="that this fit reaches"):
        fitted(trainer_kwargs, QuantizationAwareTraining(when=7), epochs=3)


# After training.


def test_a_fit_ends_with_what_the_verb_gives(trainer_kwargs: dict[str, Any]) -> None:
    plainly = fitted(trainer_kwargs)
    callback = PostTrainingQuantization(batches=4)
    made = fitted(trainer_kwargs, callback)
    x = torch.cat([batch for batch, _ in loader()])
    quantize(plainly.net, calibration=[batch for batch, _ in loader()])
    assert torch.equal(plainly.net(x), made.net(x))
    assert len(callback.receipt.changes) == 2


@pytest.mark.ddp
@pytest.mark.slow
def test_processes_share_ranges_and_what_is_quantized_at_the_end(tmp_path: Path) -> None:
    first, second = results_of("quantized_ranks.py", tmp_path)
    ours, theirs = (rank["trained"]["ranks"] for rank in (first, second))
    assert ours["deployed"] and theirs.pop("deployed") is None  # the first process writes
    assert theirs.items() <= ours.items()
    assert len(first["learned"]["ranks"]["scales"]) == 2
    for way in ("trained", "learned", "sharded"):
        alone, ranks = (first[way][side] for side in ("alone", "ranks"))
        for name, range_ in alone["ranges"].items():
            np.testing.assert_allclose(ranks["ranges"][name], range_, rtol=1e-4)
        for what in ("weights", "scales"):
            for mine, theirs in zip(ranks[what], alone[what], strict=True):
                np.testing.assert_allclose(mine, theirs, atol=1e-4)
        np.testing.assert_allclose(ranks["deployed"], alone["answers"], atol=2e-2)
    assert first["after"] == second["after"] and first["after"]["ranks"]["ranges"]
    assert first["failed"] == second["failed"] and "no layer is left" in first["failed"]["told"]


# What an adversary found.


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("stop", [2, 5, 7, 10, 13])
@pytest.mark.parametrize("freeze", [None, 2])
@pytest.mark.parametrize("word", ["int8", "int4"])
def test_a_fit_goes_on_from_every_step(
    trainer_kwargs: dict[str, Any], tmp_path: Path, stop: int, freeze: int | None, word: str
) -> None:
    """Of an epoch that goes on, Lightning tells no callback that it starts. All batches are equal here."""

    class Normed(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)
            )

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(
                [batch[0] * (1 + self.global_step / 4), batch[1]], batch_idx
            )

    x = torch.randn(8, 6).repeat(4, 1)
    same = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), 8)

    class Saves(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == stop:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    def run(ckpt: Any = None, *more: Any) -> Any:
        torch.manual_seed(0)
        module = Normed()
        callbacks = [QuantizationAwareTraining(word, when=1, freeze=freeze), *more]
        trainer = Trainer(**trainer_kwargs | {"max_epochs": 4}, callbacks=callbacks)
        trainer.fit(module, same, ckpt_path=ckpt, weights_only=True)
        return module

    through, again = run(None, Saves()), run(str(tmp_path / "middle.ckpt"))
    for (name, a), (_, b) in zip(
        through.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    ours, theirs = (quantization_of(module) for module in (through, again))
    assert {n: s["range"] for n, s in ours.items()} == {n: s["range"] for n, s in theirs.items()}


@pytest.mark.parametrize(("when", "freeze"), [(0, 0), (2, 1), (2, 2), (0.9, 0.95)])
def test_ranges_are_frozen_after_they_were_found(
    trainer_kwargs: dict[str, Any], when: float, freeze: float
) -> None:
    with pytest.raises(ValueError, match="`freeze` comes after `when`"):
        fitted(trainer_kwargs, QuantizationAwareTraining(when=when, freeze=freeze))


def test_a_trial_run_quantizes(trainer_kwargs: dict[str, Any]) -> None:
    trainer_kwargs.pop("max_epochs", None)
    torch.manual_seed(0)
    user = Module()
    callbacks = [QuantizationAwareTraining(when=0.5, freeze=0.9)]
    Trainer(**trainer_kwargs, fast_dev_run=2, callbacks=callbacks).fit(user, loader(), loader())
    assert all(layer.accel_known for layer in layers_of(user).values())


def averaging(kind: Any, epoch: int) -> Any:
    return (
        kind(decay=0.9) if kind is EMAWeightAveraging else kind(swa_lrs=0.1, swa_epoch_start=epoch)
    )


@pytest.mark.parametrize("average", [EMAWeightAveraging, StochasticWeightAveraging])
def test_what_is_averaged_is_quantized(trainer_kwargs: dict[str, Any], average: Any) -> None:
    made = []
    for first in (True, False):
        averages = averaging(average, 1)
        callbacks = [PostTrainingQuantization("int4", None, batches=4), averages]
        made.append(fitted(trainer_kwargs, *(callbacks if first else reversed(callbacks))))
    for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True):
        assert torch.equal(a, b)
    weights = [layer.quantized_weight() - layer.weight for layer in layers_of(made[0]).values()]
    assert max(w.abs().max() for w in weights) < 1e-6, "rounded by least squares"


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("average", [EMAWeightAveraging, StochasticWeightAveraging])
@pytest.mark.parametrize("stop", [1, 3])
def test_a_fit_with_averages_goes_on(
    trainer_kwargs: dict[str, Any], tmp_path: Path, average: Any, order: int, stop: int
) -> None:
    class Saves(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == stop - 1:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    def run(ckpt: Any = None, *more: Any) -> Any:
        averages = averaging(average, 2)
        callbacks = [QuantizationAwareTraining("int4", when=2), averages]
        torch.manual_seed(0)
        module = Module()
        trainer = Trainer(
            **trainer_kwargs | {"max_epochs": 5},
            callbacks=[*(reversed(callbacks) if order else callbacks), *more],
        )
        trainer.fit(module, loader(), ckpt_path=ckpt, weights_only=True)
        return module

    through, again = run(None, Saves()), run(str(tmp_path / "middle.ckpt"))
    for (name, a), (_, b) in zip(
        through.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name


def test_another_quantization_is_refused_before_the_fit(trainer_kwargs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    user = Module()
    quantize(user.net, calibration=[loader().dataset[:][0]], weights="int4", activations=None)
    trainer = Trainer(
        **trainer_kwargs | {"max_epochs": 2}, callbacks=[QuantizationAwareTraining(when=1)]
    )
    with pytest.raises(AccelError, match="is quantized already, and not to int8"):
        trainer.fit(user, loader())
    both = [QuantizationAwareTraining(), PostTrainingQuantization()]
    with pytest.raises(AccelError, match="quantized once"):
        Trainer(**trainer_kwargs, callbacks=both).fit(Module(), loader())


def test_other_arguments_than_those_of_the_file_are_refused(
    trainer_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    user = Module()
    trainer = Trainer(**trainer_kwargs | {"max_epochs": 2}, callbacks=[QuantizationAwareTraining()])
    trainer.fit(user, loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fresh = Trainer(
        **trainer_kwargs | {"max_epochs": 3}, callbacks=[QuantizationAwareTraining("int4", None)]
    )
    with pytest.raises(AccelError, match="pass the arguments that it was quantized with"):
        fresh.fit(Module(), loader(), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True)


def test_layers_that_training_never_calls_are_named(trainer_kwargs: dict[str, Any]) -> None:
    class Unreached(Module):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(6, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            functional = F.linear(batch[0], self.other.weight)
            return super().training_step(batch, batch_idx) + functional.square().mean()

    torch.manual_seed(0)
    trainer = Trainer(**trainer_kwargs | {"max_epochs": 2}, callbacks=[QuantizationAwareTraining()])
    with pytest.warns(UserWarning, match=r"nothing came into them in training. Found: `other`"):
        trainer.fit(Unreached(), loader())


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm` is deprecated")
def test_weights_that_hooks_compute_are_left_and_named(norm: Any) -> None:
    net = nn.Sequential(norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    receipt = quantize(net, calibration=torch.randn(8, 4))
    assert [change.name for change in receipt.changes] == ["1"]
    assert "computed from others" in receipt.skipped[0].what


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_training_shows_what_is_not_finite(value: float) -> None:
    layer = ranged(nn.Linear(4, 2), torch.randn(8, 4))
    layer.accel_mode = "training"
    x = torch.randn(3, 4)
    x[1, 2] = value
    found = layer(x)
    assert not found[1].isfinite().any() and found[[0, 2]].isfinite().all()


def test_an_empty_batch_gives_no_range() -> None:
    with pytest.raises(NoEffect, match="nothing comes into it"):
        quantize(nn.Linear(4, 2), calibration=[torch.randn(0, 4)])


def test_a_fit_from_a_quantized_file_is_the_plain_one_until_its_end(
    trainer_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    user = Module()
    trainer = Trainer(
        **trainer_kwargs | {"max_epochs": 1},
        callbacks=[PostTrainingQuantization("int2", None, batches=2)],
    )
    trainer.fit(user, loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    torch.manual_seed(0)
    again = Module()
    callback = PostTrainingQuantization("int2", None, batches=2)
    Trainer(**trainer_kwargs | {"max_epochs": 2}, callbacks=[callback]).fit(
        again, loader(), ckpt_path=str(tmp_path / "end.ckpt"), weights_only=True
    )
    plainly = Module()
    Trainer(**trainer_kwargs | {"max_epochs": 2}).fit(
        plainly, loader(), ckpt_path=str(tmp_path / "end.ckpt"), weights_only=True
    )
    quantize(
        plainly.net, calibration=[x for x, _ in loader()][:2], weights="int2", activations=None
    )
    assert len(callback.receipt.changes) == 2


def test_weights_that_are_asked_for_their_type_and_used_elsewhere() -> None:
    """transformers' vision models ask `conv.weight.dtype`; others compute with a weight outside of its layer."""

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.body = nn.Embedding(12, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            found = self.body(self.words(x).to(self.body.weight.dtype))
            assert self.body.weight.shape == (8, 8)
            return F.linear(found, self.words.weight)

    net, x = Asks(), torch.randint(0, 12, (4, 6))
    quantize(net, calibration=x)
    with torch.no_grad():
        assert sqnr_db([net(x)], [lowered(net, keep=True)(x)]) > 100
        assert 20 < sqnr_db([net(x)], [lowered(net)(x)]) < 60


def test_a_fit_that_is_quantized_at_its_end_is_the_plain_one(
    trainer_kwargs: dict[str, Any],
) -> None:
    class Looks(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            state = {k: v.clone() for k, v in pl_module.state_dict().items()}
            momenta = copy.deepcopy(trainer.optimizers[0].state_dict())
            self.seen = [state, momenta, plain.chance(), dict(trainer.callback_metrics)]

    seen = []
    for more in ([], [PostTrainingQuantization(batches=2)]):
        looks = Looks()
        fitted(trainer_kwargs, *more, looks)
        seen.append(looks.seen)
    plain.assert_same(seen[1], seen[0])


def test_frozen_norms_stay_so_whatever_a_module_does_with_its_modes(
    trainer_kwargs: dict[str, Any],
) -> None:
    class Wakes(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3))
            self.means: list[Tensor] = []

        def on_train_epoch_start(self) -> None:
            self.train()

        def on_train_epoch_end(self) -> None:
            self.means.append(self.net[1].running_mean.clone())  # type: ignore[operator, union-attr]

    torch.manual_seed(0)
    user = Wakes()
    callbacks = [QuantizationAwareTraining(when=1, freeze=2)]
    Trainer(**trainer_kwargs | {"max_epochs": 4}, callbacks=callbacks).fit(user, loader())
    assert not torch.equal(user.means[0], user.means[1])
    assert torch.equal(user.means[1], user.means[2]) and torch.equal(user.means[2], user.means[3])
    assert user.net[1].training


def test_an_average_that_is_seldom_updated_is_evaluated_with_the_ranges_of_training(
    trainer_kwargs: dict[str, Any],
) -> None:
    class Looks(Module):
        seen: list[Any] = []

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                self.seen.append([m.accel_range.tolist() for m in layers_of(self).values()])

    torch.manual_seed(0)
    user = Looks()
    seldom = EMAWeightAveraging(decay=0.9, update_every_n_steps=10**6)
    callbacks = [QuantizationAwareTraining(when=1), seldom]
    Trainer(**trainer_kwargs | {"max_epochs": 3}, callbacks=callbacks).fit(user, loader(), loader())
    finite = [all(math.isfinite(v) for range_ in one for v in range_) for one in user.seen]
    assert finite == [False, True, True]


@pytest.mark.parametrize("verb", [unquantize, lambda model: quantize(model, calibration=[1])])
def test_what_is_no_module_is_refused(verb: Any) -> None:
    with pytest.raises(TypeError, match="`model` is a module"):
        verb(None)
