"""What people reported of quantization with other tools, each put to ours as its reporter would.

The number is that of the public report. Words and code are our own.
"""

from __future__ import annotations

import copy
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
    load_from_checkpoint,
    quantize,
)
from lightning_accel.quantization import lowered, quantization_of
from lightning_accel.quantization.budget import sqnr_db
from lightning_accel.quantization.layers import layers_of
from lightning_accel.quantization.rounding import _pulled, by_products


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor, *, temperature: float = 1.0) -> Tensor:
        return self.head(self.body(images).mean((2, 3))) / temperature

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(images=batch[0], temperature=2.0), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", F.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 1, 8, 8, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(30) % 3), 8)  # the last batch is smaller


def fit(trainer_kwargs: dict[str, Any], callback: Any, **given: Any) -> tuple[Any, Trainer]:
    torch.manual_seed(0)
    module = Classifier()
    trainer = Trainer(**trainer_kwargs | {"max_epochs": 3, **given}, callbacks=[callback])
    trainer.fit(module, data(), data())
    return module, trainer


def test_a_plain_load_from_checkpoint_knows_all_keys(
    trainer_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    """pytorch-lightning #6457: a file of quantization-aware training has keys that the class does not know."""
    module, trainer = fit(trainer_kwargs, QuantizationAwareTraining(when=1))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    plainly = Classifier.load_from_checkpoint(tmp_path / "a.ckpt", strict=True, weights_only=True)
    assert all(
        torch.equal(a, b) for a, b in zip(plainly.parameters(), module.parameters(), strict=True)
    )
    quantized = load_from_checkpoint(Classifier, tmp_path / "a.ckpt")
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(quantized.eval()(x), module.eval()(x))
    assert not torch.equal(plainly.eval()(x), quantized(x))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_test_of_a_file_from_before_the_quantization_gives_what_the_file_holds(
    trainer_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    """pytorch-lightning #12896: converted at the end of the fit, `Trainer.test(ckpt_path=...)` no longer worked."""
    torch.manual_seed(0)
    module = Classifier()
    saved = tmp_path / "before.ckpt"

    class Saves(PostTrainingQuantization):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(saved)

    trainer = Trainer(**trainer_kwargs | {"max_epochs": 2}, callbacks=[Saves("int2", None)])
    trainer.fit(module, data(), data())
    (after,) = trainer.test(module, data(), verbose=False)
    (found,) = trainer.test(module, data(), ckpt_path=str(saved), verbose=False, weights_only=True)
    (plain,) = Trainer(**trainer_kwargs).test(
        Classifier(), data(), ckpt_path=str(saved), verbose=False, weights_only=True
    )
    assert found == plain != after


def test_forward_takes_keywords(trainer_kwargs: dict[str, Any]) -> None:
    """pytorch-lightning #15862: a quantized forward refused keyword arguments."""
    module, _ = fit(trainer_kwargs, QuantizationAwareTraining(when=0))
    x = torch.randn(2, 1, 8, 8)
    module.eval()
    torch.testing.assert_close(module(images=x, temperature=2.0) * 2, module(x))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
@pytest.mark.filterwarnings("ignore:You passed")
def test_training_in_short_formats(trainer_kwargs: dict[str, Any], precision: Any) -> None:
    """pytorch #94371, #51090: fake quantization had no kernel for half precision, so autocast failed."""
    module, _ = fit(trainer_kwargs, QuantizationAwareTraining(when=1), precision=precision)
    whole, _ = fit(trainer_kwargs, QuantizationAwareTraining(when=1))
    ranges, of_whole = (quantization_of(m) for m in (module, whole))
    for name, state in of_whole.items():
        torch.testing.assert_close(
            torch.tensor(ranges[name]["range"]), torch.tensor(state["range"]), rtol=0.1, atol=0.1
        )


def test_integers_give_what_training_saw(trainer_kwargs: dict[str, Any]) -> None:
    """pytorch #88800, executorch #13092, ao #2138: after conversion the answers were others than in training."""
    module, _ = fit(trainer_kwargs, QuantizationAwareTraining(when=1, freeze=2))
    module.eval()
    made, x = lowered(module), torch.randn(256, 1, 8, 8)
    with torch.no_grad():
        assert sqnr_db([module(x)], [made(x)]) > 60
        assert (module(x).argmax(1) == made(x).argmax(1)).float().mean() >= 0.995


@pytest.mark.parametrize("shift", [7.0, -7.0, 0.0])
@pytest.mark.parametrize("spread", [1.0, 0.0, 1e-30])
def test_ranges_on_one_side_of_zero(shift: float, spread: float) -> None:
    """pytorch #126266: `zero_point` must be between `quant_min` and `quant_max`."""
    layer = nn.Linear(4, 3)
    x = torch.rand(16, 4) * spread + shift
    before = layer(x)
    receipt = quantize(layer, calibration=x, rounding="nearest", correct_bias=False)
    assert (layer(x) - before).abs().max() < 0.1
    torch.testing.assert_close(lowered(layer)(x), layer(x))
    constant = shift == 0 and spread == 0
    assert any("one single value" in note for note in receipt.notes) or not constant


@pytest.mark.parametrize("samples", [1, 3, 64])
def test_inputs_that_are_always_zero(samples: int) -> None:
    """AutoGPTQ #98, #708, keras #23532: X^T X is singular with dead inputs or few samples, and its factor fails."""
    layer = nn.Linear(32, 4)
    x = torch.randn(samples, 32)
    x[:, ::2] = 0
    before = layer(x).detach()
    quantize(layer, calibration=x, weights="int4", activations=None)
    assert layer.weight.isfinite().all() and sqnr_db([before], [layer(x).detach()]) > 15
    quantize(dead := nn.Linear(32, 4), calibration=torch.zeros(4, 32), weights="int4")
    assert dead.weight.isfinite().all()
    zeros = torch.zeros(1, 6, 6, dtype=torch.float64)
    rows = torch.randn(1, 2, 6, dtype=torch.float64)
    made = by_products(rows, _pulled(zeros), torch.full_like(rows, 0.25), 7)
    assert torch.equal(made, (rows / 0.25).round().clamp(-7, 7) * 0.25)


def test_a_layer_that_is_called_twice_has_one_range_for_both() -> None:
    """nncf #889: a layer in two places was quantized once for each, and the second time from rounded weights."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.again = self.layer

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.layer(x) * 100)

    net = Twice()
    x = torch.randn(64, 4)
    second = (net.layer(x) * 100).detach()
    weight = net.layer.weight.detach().clone()
    receipt = quantize(
        net, calibration=x, observer="minmax", rounding="nearest", correct_bias=False
    )
    assert len(receipt.changes) == 1 and net.again is net.layer
    (layer,) = layers_of(net).values()
    assert torch.allclose(layer.accel_range[1], torch.max(x.max(), second.max()))
    assert torch.equal(net.layer.weight, weight)


def test_batches_of_every_size(trainer_kwargs: dict[str, Any]) -> None:
    """optimum #409, #85: calibration failed on batches of more than one sample, and on sizes that differ."""
    made = []
    for sizes in ([30], [8, 8, 8, 6], [1] * 30):
        torch.manual_seed(0)
        module = Classifier().eval()
        parts = [*data().dataset[:][0].split(sizes)]
        quantize(module, calibration=parts, observer="mse")
        made.append(module)
    x = torch.randn(16, 1, 8, 8)
    for other in made[1:]:
        torch.testing.assert_close(other(x), made[0](x), rtol=1e-3, atol=1e-3)


def test_ranges_that_stay_when_they_are_frozen(trainer_kwargs: dict[str, Any]) -> None:
    """ao #2138: observers that went on after fake quantization was off changed the scales of the conversion."""
    module, _ = fit(trainer_kwargs, QuantizationAwareTraining(when=1, freeze=2))
    before = copy.deepcopy(quantization_of(module))
    module.train()
    for x, y in data():
        F.cross_entropy(module(x * 50), y).backward()
    module.eval()(torch.randn(4, 1, 8, 8) * 1000)
    assert quantization_of(module) == before
