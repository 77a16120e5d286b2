"""Sums of integers: what is added is rounded as a hand-written forward rounds it, and stays so in files."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import (
    PostTrainingQuantization,
    QuantizationAwareTraining,
    deploy,
    load_from_checkpoint,
    quantize,
    unquantize,
)
from lightning_accel.errors import AccelError, NoEffect, StructureMismatch
from lightning_accel.quantization import lowered, quantization_of, quantize_sums, sums
from lightning_accel.quantization.budget import sqnr_db
from lightning_accel.quantization.fold import fold_norms
from lightning_accel.quantization.merge import merge_roundings
from lightning_accel.quantization.state import quantized_as
from lightning_accel.quantization.sums import outputs_rounded
from lightning_accel.surgery import twin

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:no format is faster than the model"),
]


class Block(nn.Module):
    def __init__(self, channels_in: int, channels: int, relu: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = relu  # called twice, and in place, as torchvision does it
        self.shortcut: nn.Module = nn.Identity()
        if channels != channels_in:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv2(self.relu(self.conv1(x))))
        out += self.shortcut(x)
        return self.relu(out)


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        relu = nn.ReLU(inplace=True)
        self.stem, self.first, self.pool = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2)
        self.blocks = nn.Sequential(Block(4, 4, relu), Block(4, 4, relu), Block(4, 8, relu))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.pool(self.first(self.stem(x)))).mean((2, 3)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def images(count: int = 32) -> Tensor:
    return torch.randn(count, 2, 10, 10, generator=torch.Generator().manual_seed(count))


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> Net:
    monkeypatch.setattr(
        sums, "_MOST_DB", 30.0
    )  # of random weights, where sums cost more than they do in trained ones
    made = Net()
    with torch.no_grad():
        for _ in range(10):
            made(images(64))
    return made.eval()


def by_hand(made: Any, ranges: dict[str, list[float]]) -> Any:
    """Return the forward with both summands rounded, and nothing else but what layers round themselves."""

    def rounds(x: Tensor, name: str) -> Tensor:
        low, high = min(ranges[name][0], 0.0), max(ranges[name][1], 0.0)
        scale = (high - low) / 255
        zero = round(-low / scale)
        return ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale

    def forward(x: Tensor) -> Tensor:
        x = made.pool(F.relu(made.stem(x)))
        for index, block in enumerate(made.blocks):
            name = f"blocks.{index}"
            first = "pool" if index == 0 else f"blocks.{index - 1}"
            if first in ranges:
                x = rounds(x, first)
            out = F.batch_norm(
                block.conv2(F.relu(block.conv1(x))),
                block.bn.running_mean,
                block.bn.running_var,
                block.bn.weight,
                block.bn.bias,
            )
            beside = x
            if index == 2:
                conv, norm = block.shortcut
                beside = F.batch_norm(
                    conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias
                )
                beside = rounds(beside, f"{name}.shortcut.1")
            x = F.relu(rounds(out, f"{name}.bn") + beside)
        return made.head(x.mean((2, 3)))

    return forward


def test_both_summands_are_rounded_and_nothing_else(net: Net) -> None:
    plainly = copy.deepcopy(net)
    quantize(plainly, calibration=images(), rounding="nearest", correct_bias=False)
    receipt = quantize(net, calibration=images(), rounding="nearest", correct_bias=False, sums=True)
    assert "sums of integers: 6" in receipt.notes
    names = {"pool", "blocks.0", *(f"blocks.{i}.bn" for i in range(3)), "blocks.2.shortcut.1"}
    hooks = outputs_rounded(net)
    assert {*hooks} == names
    assert hooks["pool"].range == net.blocks[0].conv1.accel_range.tolist()  # type: ignore[index, union-attr]
    ranges = {name: hook.range for name, hook in hooks.items()}
    x = images(7)
    with torch.no_grad():
        made = net(x)
        for hook_free in (by_hand(unhooked(net), ranges),):
            assert sqnr_db([hook_free(x)], [made]) > 80
        assert 20 < sqnr_db([plainly(x)], [made]) < 70
    receipt = quantize_sums(plainly, calibration=images())
    assert {change.name for change in receipt.changes} == names
    with torch.no_grad():
        assert torch.equal(plainly(x), made)


def unhooked(net: nn.Module) -> nn.Module:
    made = copy.deepcopy(net)
    for module in made.modules():
        module._forward_hooks.clear()
    return made


def test_copies_files_and_fits_know_of_them(
    net: Net, tmp_path: Path, trainer_kwargs: dict[str, Any]
) -> None:
    x = images(5)
    plainly = copy.deepcopy(net)
    data = DataLoader(TensorDataset(images(), torch.zeros(32).long()), 16)
    trainer = Trainer(
        **trainer_kwargs | {"max_epochs": 1},
        callbacks=[PostTrainingQuantization(sums=True, batches=2)],
    )
    trainer.fit(net, data)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    made = net.eval()(x)
    assert len(outputs_rounded(net)) == 6
    back = load_from_checkpoint(Net, tmp_path / "end.ckpt").eval()
    others = [copy.deepcopy(net), twin(net), pickle.loads(pickle.dumps(net.blocks)), back]  # noqa: S301
    for other in others:
        if isinstance(other, Net):
            assert torch.equal(other(x), made)
        else:
            assert len(outputs_rounded(other)) == 5
    with pytest.raises(AccelError, match="are made after training"):
        Trainer(**trainer_kwargs | {"max_epochs": 1}, callbacks=[QuantizationAwareTraining()]).fit(
            net, data
        )
    stored = quantization_of(net)
    stored["blocks.0:output"] = {"range": [0.0, "1"]}
    with pytest.raises(StructureMismatch, match="blocks.0:output"):
        quantized_as(copy.deepcopy(net), stored)
    unquantize(net)
    assert not outputs_rounded(net) and quantization_of(net) == {}
    plainly.load_state_dict(net.state_dict())
    assert torch.equal(net.eval()(x), plainly.eval()(x))


def test_a_network_without_such_sums_is_told() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(NoEffect, match="no sum can be one of integers"):
        quantize_sums(net, calibration=torch.randn(8, 4))
    with pytest.raises(ValueError, match="`sums` of integers need integers"):
        quantize(net, calibration=torch.randn(8, 4), activations=None, sums=True)
    receipt = quantize(net, calibration=torch.randn(8, 4), sums=True)
    assert receipt.notes[-1] == "sums of integers: 0"


def test_values_are_rounded_once_and_the_graph_gives_the_same(net: Net) -> None:
    quantize(net, calibration=images(), sums=True)
    x = images(6)
    with torch.no_grad():
        graph: Any = torch.export.export(lowered(net), (x,)).module()
        fold_norms(graph)
        before = graph(x)
        assert (
            merge_roundings(graph) == 7
        )  # a maximum; values and integers: two layers that read sums, two layers that read one map
        assert torch.equal(graph(x), before)
        assert sqnr_db([net(x)], [before]) > 42
    nodes = [*graph.graph.nodes]
    assert not any("to.dtype" in str(n.target) or "metadata" in str(n.target) for n in nodes)
    for node in nodes:
        name = str(node.target)
        if "add" in name or "max_pool" in name:
            reads = [a for a in node.args if isinstance(a, torch.fx.Node)]
            assert all("dequantize_per_tensor" in str(a.target) for a in reads), name


def test_what_is_changed_in_place_is_rounded_anew() -> None:
    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            view = F.dropout(x, 0.5, training=False)  # in eval mode its input itself
            found = self.one(x) + self.two(x)
            view.add_(1.0)
            return found + self.three(x)

    net, x = Changes().eval(), torch.randn(8, 4)
    quantize(net, calibration=x)
    for layer in (net.one, net.two, net.three):
        layer.set_range(torch.tensor([-4.0, 4.0]))  # type: ignore[operator]
    with torch.no_grad():
        graph: Any = torch.export.export(lowered(net), (x,)).module()
        assert merge_roundings(graph) == 2
        assert sqnr_db([net(x)], [graph(x)]) > 100


@pytest.mark.slow
def test_onnx_runtime_adds_integers(net: Net, tmp_path: Path) -> None:
    """With a summand in floating point it computes the convolution before it in floats as well; the last sum has no reader."""
    import onnx
    import onnxruntime

    made = net
    quantize(made, calibration=images(), sums=True)
    bundle = deploy(made, images(4), to=tmp_path / "net", formats="onnx", budget_s=0.02)
    assert sqnr_db([made(images(9)).detach()], [bundle.predict(images(9))]) > 42
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    onnxruntime.InferenceSession(str(tmp_path / "net" / "model.onnx"), options, providers=providers)
    kernels = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kernels.count("QLinearAdd") == 2 and kernels.count("QLinearConv") == 8, kernels
    assert "Conv" not in kernels


@pytest.mark.slow
def test_compiled_code_of_before_rounds_sums_as_well() -> None:
    """Dynamo does not look whether modules have got hooks since it captured them."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(x) + x

    net, x = Residual().eval(), torch.randn(32, 8)
    compiled = torch.compile(net, backend="eager")
    quantize(net, calibration=[x])
    compiled(x)
    receipt = quantize_sums(net, calibration=[x])
    assert receipt and torch.equal(compiled(x), net(x))
    unquantize(net)
    assert torch.equal(compiled(x), net(x))


class PreActivated(nn.Module):
    """A stream of sums that norms read, with channels of very different sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 5)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        with torch.no_grad():
            for conv in (self.stem, *self.convs):
                conv.weight *= torch.logspace(-1.5, 1.5, 16)[:, None, None, None]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = conv(norm(x).relu()) + x
        return self.head((x / (1e-3 + x.std((0, 2, 3), keepdim=True))).mean((2, 3)))


def test_sums_that_cost_too_much_stay_in_floating_point() -> None:
    net, x = PreActivated(), torch.randn(64, 3, 8, 8)
    for _ in range(20):
        net.train()(x)
    plain = copy.deepcopy(net.eval())
    with torch.no_grad():
        wanted = net(x)
        quantize(plain, calibration=[x])
        quantize(net, calibration=[x], sums=True)
        assert sqnr_db([wanted], [net(x)]) > sqnr_db([wanted], [plain(x)]) - 3.1


def test_a_summand_takes_the_range_of_no_layer_that_reads_other_tensors_too() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
            self.head, self.last = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Any:
            y = self.a(x)
            return self.head(y), self.head(300 * self.b(x)), self.last(y + self.c(x))

    net, x = Shared().eval(), torch.randn(128, 8)
    wanted = [value.detach() for value in net(x)]
    quantize(net, calibration=[x], sums=True)
    assert outputs_rounded(net)
    assert sqnr_db(wanted[2:], [net(x)[2].detach()]) > 30
