"""What each number of bits costs in accuracy: after training, with better rounding, trained for it, and with a teacher.

A ResNet on handwritten digits, small enough that bits count. Every seed trains one dense network; all ways begin with it.
*rounded*: nearest integers, whole ranges. *calibrated*: ranges of least error, rounding by least squares, biases corrected;
and the same with sums of integers, with channels equalized first, and with roundings that are learned (AdaRound).
*trained*: some more epochs of quantization-aware training; also with scales of weights that learn (LSQ). *taught*: the same, with the dense network as teacher. As many
epochs of plain training are the control. For eight bits ONNX Runtime's own static quantization is measured beside them.

    python benchmarks/quantize_accuracy.py [--seeds 5] [--json PATH]

Accuracy is that of the networks as integer kernels compute them (`lowered`), on 360 test images; one image is 0.28 points.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from data.digits import Digits
from models.resnet import ResNet

from lightning_accel import Distillation, QuantizationAwareTraining, quantize
from lightning_accel.measure import Table
from lightning_accel.quantization import lowered

GRIDS: dict[str, dict[str, Any]] = {
    "W8A8": {"weights": "int8"},
    "W4A8": {"weights": "int4"},
    "W4A32": {"weights": "int4", "activations": None},
    "W2A8": {"weights": "int2"},
    "W2A32": {"weights": "int2", "activations": None},
}
WAYS: dict[str, dict[str, Any]] = {
    "rounded": {"observer": "minmax", "rounding": "nearest", "correct_bias": False},
    "calibrated": {},
    "calibrated, sums of integers": {"sums": True},
    "calibrated, cross-layer equalized": {"equalize": "cross_layer"},
    "adaround": {"rounding": "adaround"},
}
DENSE_EPOCHS, MORE_EPOCHS = 12, 6


def fit(module: LightningModule, data: Digits, epochs: int, *callbacks: Any) -> LightningModule:
    Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        callbacks=[*callbacks],
    ).fit(module, data)
    return module.eval()


def again(dense: LightningModule, seed: int) -> LightningModule:
    seed_everything(1000 + seed, verbose=False)
    module = copy.deepcopy(dense).train()
    module.hparams.update(lr=module.hparams.get("lr", 1e-3) / 4)
    return module


def accuracy(net: Any, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return 100 * float((net(images).argmax(1) == labels).float().mean())


def of_onnxruntime(
    dense: LightningModule, calibration: list[Tensor], images: Tensor, labels: Tensor
) -> float:
    """Return the accuracy of ONNX Runtime's static quantization of the same network."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(calibration)

        def get_next(self) -> Any:
            found = next(self.left, None)
            return None if found is None else {"x": found.numpy()}

    with tempfile.TemporaryDirectory() as folder:
        plain, made = f"{folder}/plain.onnx", f"{folder}/int8.onnx"
        dims = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(dense, (calibration[0],), dynamic_shapes=dims)
        exported = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["x"])
        assert exported is not None
        exported.save(plain)
        quantize_static(
            plain,
            made,
            Reader(),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        session = onnxruntime.InferenceSession(made, providers=["CPUExecutionProvider"])
        answers = torch.from_numpy(session.run(None, {"x": images.numpy()})[0])
    return 100 * float((answers.argmax(1) == labels).float().mean())


def one_seed(seed: int, width: int) -> dict[str, float]:
    """Return the accuracy of each way, in percent."""
    seed_everything(seed, verbose=False)
    data = Digits(seed=seed)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    dense = fit(ResNet(widths=[width, 2 * width], depth=1), data, DENSE_EPOCHS)
    images, labels = (torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True))
    calibration = [batch[0] for batch in data.train_dataloader()][:8]
    found = {
        "dense": accuracy(dense, images, labels),
        "dense, as many epochs more": accuracy(
            fit(again(dense, seed), data, MORE_EPOCHS), images, labels
        ),
        "W8A8 by ONNX Runtime": of_onnxruntime(dense, calibration, images, labels),
    }
    for name, grid in GRIDS.items():
        for way, options in WAYS.items():
            if "sums" in options and "activations" in grid:
                continue
            made = copy.deepcopy(dense)
            quantize(made, calibration=calibration, **grid, **options)
            found[f"{name} {way}"] = accuracy(lowered(made), images, labels)
        for way in ("trained", "trained, scales learned", "taught"):
            teacher = [Distillation(copy.deepcopy(dense), {"kd": 0.9})] if way == "taught" else []
            scales = "learned" if way.endswith("learned") else "fitted"
            made = again(dense, seed)
            fit(made, data, MORE_EPOCHS, QuantizationAwareTraining(**grid, scales=scales), *teacher)
            found[f"{name} {way}"] = accuracy(lowered(made), images, labels)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    seeds = [one_seed(seed, options.width) for seed in range(options.seeds)]
    rows = []
    for name in seeds[0]:
        values = [found[name] for found in seeds]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        rows.append([name, f"{statistics.mean(values):.2f}", f"{spread:.2f}", f"{min(values):.2f}"])
    print(Table(["network", "accuracy (%)", "spread", "worst"], rows).to_text())
    if options.json:
        options.json.write_text(json.dumps(seeds, indent=1))


if __name__ == "__main__":
    main()
