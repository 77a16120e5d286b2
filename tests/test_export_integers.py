"""Bundles of quantized networks: integers that answer as what was trained, and faults that are refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_accel
from lightning_accel import Deploy, PostTrainingQuantization, QuantizationAwareTraining, quantize
from lightning_accel.errors import AccelError, NoEffect
from lightning_accel.export import backends, integers
from lightning_accel.export.gates import Case, proved
from lightning_accel.export.network import flat_network
from lightning_accel.export.samples import Sample
from lightning_accel.quantization.budget import sqnr_db
from lightning_accel.quantization.layers import layers_of

deploy = partial(lightning_accel.deploy, budget_s=0.02)


class Net(nn.Module):
    """One channel at first, a norm with negative factors, a residual sum, groups, and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
        self.up, self.head = nn.ConvTranspose2d(8, 4, 2, 2), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.inner_norm(self.inner(x)))
        return {"logits": self.head(F.gelu(self.up(x)).mean((2, 3))), "map": x}


def net() -> Net:
    torch.manual_seed(0)
    made = Net()
    with torch.no_grad():
        for _ in range(5):
            made(torch.randn(32, 1, 6, 6))
        for norm in (made.norm, made.inner_norm):
            norm.weight.uniform_(-1.5, 1.5)
    return made.eval()


def images(count: int = 64) -> Tensor:
    return torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("format", ["export", "onnx"])
def test_a_bundle_answers_as_the_quantized_network(tmp_path: Path, format: str) -> None:
    made = net()
    floats = copy.deepcopy(made)
    quantize(made, calibration=images())
    bundle = deploy(made, images(4), to=tmp_path / "net", formats=format)
    for batch in (1, 3, 16):
        x = images(batch)
        found, wanted, plain = bundle.predict(x), made(x), floats(x)
        for key in ("logits", "map"):
            assert sqnr_db([wanted[key].detach()], [found[key]]) > 42, key
            assert not torch.allclose(found[key], plain[key], atol=1e-5)
    assert layers_of(made), "the user's network stays quantized"
    assert any("dB on the example" in note for note in bundle.manifest["notes"])
    (row,) = [c for c in bundle.manifest["candidates"] if c["format"] == format]
    assert row["sqnr_db"] is None or row["sqnr_db"] > 42


def test_a_network_is_quantized_on_its_way(tmp_path: Path) -> None:
    made = net()
    state = {k: v.clone() for k, v in made.state_dict().items()}
    data = DataLoader(TensorDataset(images(), torch.zeros(64)), 16)
    bundle = deploy(
        made, images(4), to=tmp_path / "net", formats="onnx", quantize="int8", calibration=data
    )
    assert not layers_of(made) and all(
        torch.equal(v, state[k]) for k, v in made.state_dict().items()
    )
    x = images(8)
    assert 25 < sqnr_db([made(x)["logits"].detach()], [bundle.predict(x)["logits"]]) < 80
    assert any(note.startswith("quantized to int8 weights") for note in bundle.manifest["notes"])
    by_hand = copy.deepcopy(made)
    quantize(by_hand, calibration=[batch for batch, _ in data])
    assert sqnr_db([by_hand(x)["logits"].detach()], [bundle.predict(x)["logits"]]) > 42


def test_what_comes_before_is_calibrated_too(tmp_path: Path) -> None:
    class Scale(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float() / 255 - 0.5

    made = net()
    raw = (torch.rand(32, 1, 6, 6) * 255).to(torch.uint8)
    bundle = deploy(
        made,
        raw[:4],
        to=tmp_path / "net",
        formats="export",
        pre=Scale(),
        quantize="int8",
        calibration=[raw],
    )
    wanted = made(Scale()(raw))["logits"].detach()
    assert sqnr_db([wanted], [bundle.predict(raw)["logits"]]) > 25


@pytest.mark.parametrize("word", ["int8", "int4"])
def test_files_hold_integers_and_are_smaller(tmp_path: Path, word: str) -> None:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, 128)).eval()
    x = torch.randn(64, 128)
    sizes = {}
    for name, given in (("plain", {}), ("made", {"quantize": word, "calibration": x})):
        bundle = deploy(made, x[:8], to=tmp_path / name, formats="onnx", **given)
        sizes[name] = (tmp_path / name / "model.onnx").stat().st_size
    assert sizes["made"] < 0.3 * sizes["plain"]
    assert b"site-packages" not in (tmp_path / "made" / "model.onnx").read_bytes()

    import onnx

    stored = onnx.load(tmp_path / "made" / "model.onnx").graph.initializer
    weights = [
        onnx.numpy_helper.to_array(t) for t in stored if t.data_type == onnx.TensorProto.INT8
    ]
    weights = [w for w in weights if w.ndim == 2]
    assert len(weights) == 2 and all(w.dtype == np.int8 for w in weights)
    top = {"int8": 127, "int4": 7}[word]
    assert max(np.abs(w).max() for w in weights) == top
    assert bundle.predict(x).shape == (64, 128)


@pytest.mark.slow
def test_machine_code_computes_on_integers(tmp_path: Path) -> None:
    """A convolution of one channel, and a transposed one, are those that torch 2.13 makes wrong code of."""
    made = net()
    quantize(made, calibration=images())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "no format is faster")
        bundle = deploy(made, images(8), to=tmp_path / "net", formats="aoti")
    for batch in (1, 5, 8):
        x = images(batch)
        kept = x.clone()
        for _ in range(2):
            found = bundle.predict(x)
            assert sqnr_db([made(x)["logits"].detach()], [found["logits"]]) > 42
        assert torch.equal(x, kept)
    with zipfile.ZipFile(tmp_path / "net" / "model.aoti.pt2") as package:
        code = "".join(
            package.read(name).decode() for name in package.namelist() if name.endswith(".cpp")
        )
    assert "qconv" in code and "qlinear" in code


def case(made: nn.Module, x: Tensor) -> Case:
    with torch.no_grad():
        return Case(Sample("the example", [x]), (made(x),))


def test_an_error_of_one_percent_is_refused() -> None:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    x = torch.randn(64, 32)
    quantize(made, calibration=x)
    floor = integers.QUANTIZED_FLOOR_DB

    def runner(net: nn.Module) -> Any:
        return lambda tensors: (net(*backends.copies(tensors)).detach(),)

    assert not proved(runner(made), [case(made, x)], floor).reason
    for layer in (0, 2):
        spoiled = copy.deepcopy(made)
        with torch.no_grad():
            spoiled[layer].weight.mul_(1.01)
            layers_of(spoiled)[str(layer)].accel_scale.mul_(1.01)  # type: ignore[union-attr]
        assert "another answer" in proved(runner(spoiled), [case(made, x)], floor).reason
    spoiled = copy.deepcopy(made)
    layers_of(spoiled)["2"].set_range(layers_of(made)["2"].accel_range / 2)
    assert "another answer" in proved(runner(spoiled), [case(made, x)], floor).reason


def test_a_small_answer_does_not_hide_behind_a_large_one() -> None:
    x = torch.randn(64, 8)
    one = Case(Sample("the example", [x]), (x * 1000, x))

    def runner(tensors: Any) -> Any:
        return tensors[0] * 1000, tensors[0] * 1.02

    assert "on all usual inputs" in proved(runner, [one], integers.QUANTIZED_FLOOR_DB).reason


class Lit(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize(
    "quantization",
    [lambda: QuantizationAwareTraining(when=1), lambda: PostTrainingQuantization(batches=2)],
)
def test_a_fit_ends_with_a_bundle_of_what_it_trained(
    trainer_kwargs: dict[str, Any], tmp_path: Path, quantization: Any
) -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 6)
    data = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 8)
    module = Lit()
    deployed = Deploy(tmp_path / "bundle", formats="onnx", budget_s=0.02)
    Trainer(**trainer_kwargs | {"max_epochs": 2}, callbacks=[deployed, quantization()]).fit(
        module, data
    )
    assert deployed.bundle is not None
    assert any("quantized" in note for note in deployed.bundle.manifest["notes"])
    wanted = module.eval()(x).detach()
    assert sqnr_db([wanted], [deployed.bundle.predict(x)]) > 42
    stored = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert stored["notes"] == deployed.bundle.manifest["notes"]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"quantize": "int8"}, ValueError, "needs `calibration`"),
        ({"quantize": "int7", "calibration": [1]}, ValueError, "unknown `quantize`"),
        ({"quantize": ["int8"], "calibration": [1]}, TypeError, "`quantize` is a name"),
        ({"calibration": [1]}, ValueError, "goes with `quantize`"),
        ({"quantize": "int8", "calibration": []}, ValueError, "holds no batch"),
        ({"quantize": "int8", "calibration": [{"y": torch.ones(2)}]}, Exception, "Do: "),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, arguments: Any, error: Any, words: str
) -> None:
    with pytest.raises(error, match=words):
        deploy(net(), images(4), to=tmp_path / "net", formats="export", **arguments)
    assert not (tmp_path / "net").exists()


def test_a_network_without_layers_to_quantize_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NoEffect, match="no layer is left to quantize"):
        deploy(
            nn.Sequential(nn.BatchNorm2d(1)).eval(),
            images(4),
            to=tmp_path / "net",
            quantize="int8",
            calibration=images(),
        )


def test_a_metric_is_compared_with_the_network_before_it_was_quantized(tmp_path: Path) -> None:
    """Rounding by least squares changes weights, so that the same weights in floating point are no measure."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    x = torch.randn(64, 16)
    wanted = made(x).detach()

    def nearness(predict: Any) -> float:
        return -float((predict(x) - wanted).square().mean())

    arguments: Any = {"quantize": "int2", "calibration": x, "formats": "export"}
    with pytest.raises(AccelError, match="the metric falls from"):
        deploy(made, x, to=tmp_path / "net", metric=nearness, max_drop=1e-6, **arguments)
    bundle = deploy(made, x, to=tmp_path / "net", metric=nearness, max_drop=10.0, **arguments)
    rows = {row["format"]: row["metric"] for row in bundle.manifest["candidates"]}
    assert rows["eager"] == 0.0 > rows["export"]


def test_less_is_asked_where_quantization_leaves_less() -> None:
    """Values between two integers that are rounded the other way cost as much as quantization did, in a deep network."""
    x = torch.randn(64, 8)
    floors = {}
    for word in ("int8", "int2"):
        network, _ = flat_network(nn.Sequential(nn.Linear(8, 8)).eval(), x, None, None)
        assert integers.floor_db(network, network) == 60.0
        itself, _ = integers.quantized(network, word, [x])
        floors[word] = integers.floor_db(network, itself)
    assert floors["int8"] == integers.QUANTIZED_FLOOR_DB > floors["int2"] >= 25.0


@pytest.mark.parametrize("dims", [1, 2])
def test_onnx_runtime_multiplies_integers(tmp_path: Path, dims: int) -> None:
    """It has no integer kernel for `Gemm` with a bias in floating point, and computes in floats without a word."""
    import onnx
    import onnxruntime

    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    x = torch.randn(*[8] * dims, 16)
    deploy(made, x, to=tmp_path / "net", formats="onnx", quantize="int8", calibration=x)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        str(tmp_path / "net" / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    kernels = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert sum(kind in ("QGemm", "MatMulIntegerToFloat") for kind in kernels) == 2, kernels
    assert not {"Gemm", "MatMul"} & set(kernels)


def test_a_program_of_integers_opens_in_a_fresh_process(tmp_path: Path) -> None:
    """Its operators are torch's, and yet unknown until somebody imports where they are."""
    made = nn.Sequential(nn.Linear(6, 8)).eval()
    x = torch.randn(4, 6)
    deploy(made, x, to=tmp_path / "net", formats="export", quantize="int8", calibration=x)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch, lightning_accel\n"
        "bundle = lightning_accel.load_bundle(sys.argv[1])\n"
        "print(bundle.predict(torch.ones(2, 6)).shape)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "net")], capture_output=True, text=True
    )
    assert done.returncode == 0 and "torch.Size([2, 8])" in done.stdout, done.stderr[-2000:]


def test_weights_that_are_used_outside_of_their_layers(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.body = nn.Embedding(12, 8), nn.Linear(8, 8)

        def forward(self, ids: Tensor) -> Tensor:
            found = self.body(self.words(ids).to(self.body.weight.dtype))
            return F.linear(found, self.words.weight)

    torch.manual_seed(0)
    made, x = Tied().eval(), torch.randint(0, 12, (4, 6))
    quantize(made, calibration=x)
    bundle = deploy(made, x, to=tmp_path / "net", formats=["export", "onnx"])
    for row in bundle.manifest["candidates"][1:]:
        assert row["sqnr_db"] is None or row["sqnr_db"] > 60


def test_what_is_quantized_already_is_not_quantized_again(tmp_path: Path) -> None:
    made, x = nn.Sequential(nn.Linear(6, 8)).eval(), torch.randn(4, 6)
    quantize(made, calibration=x)
    bundle = deploy(made, x, to=tmp_path / "net", formats="export", quantize="int4", calibration=x)
    assert any("had nothing to do" in note for note in bundle.manifest["notes"])
