"""How fast a deployed network is, in floating point and as integers, beside what others make of it.

Four networks at batch 32 and batch 1: an MLP, a ResNet for 32x32 images, a ViT and a GPT. In one process in turn: the network
itself, `torch.compile`, what `deploy` chooses in floating point and with `quantize="int8"`, and bare tools: AOTInductor as
it comes, ONNX Runtime, its own static quantization, and PT2E with X86InductorQuantizer where torchao is installed.

    python benchmarks/deploy.py [--nets mlp resnet vit gpt] [--threads 1] [--budget-s 4] [--json PATH]

Gains are over the network itself, with 95 % intervals; `SQNR` is against it as well, in dB on the batch. Random weights: this
says nothing of accuracy, which `quantize_accuracy.py` measures. Compilers take most of the time.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from models.gpt import GPT
from models.resnet import ResNet
from models.vit import ViT

from lightning_accel import deploy
from lightning_accel.export.gates import sqnr_db
from lightning_accel.measure import Table, race
from lightning_accel.measure.race import BenchmarkCase

Make = Callable[[nn.Module, Tensor, list[Tensor], Path], Callable[[Tensor], Any]]
BATCH = 32


def mlp() -> tuple[nn.Module, Tensor]:
    layers = [
        nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)) for _ in range(3)
    ]
    return nn.Sequential(*layers), torch.randn(BATCH, 512)


def resnet() -> tuple[nn.Module, Tensor]:
    net = ResNet(widths=[64, 128, 256], depth=1, in_channels=3)
    images = torch.randn(BATCH, 3, 32, 32)
    with torch.no_grad():
        for _ in range(3):
            net(images)
    return net, images


def vit() -> tuple[nn.Module, Tensor]:
    net = ViT(image_size=32, patch_size=4, dim=192, depth=4, num_heads=6, in_channels=3)
    return net, torch.randn(BATCH, 3, 32, 32)


def gpt() -> tuple[nn.Module, Tensor]:
    return GPT(dim=256, depth=4, num_heads=8, context=64), torch.randint(0, 96, (BATCH, 64))


NETS = {"mlp": mlp, "resnet": resnet, "vit": vit, "gpt": gpt}


def itself(
    net: nn.Module, x: Tensor, calibration: list[Tensor], folder: Path
) -> Callable[[Tensor], Any]:
    return net


def compiled(
    net: nn.Module, x: Tensor, calibration: list[Tensor], folder: Path
) -> Callable[[Tensor], Any]:
    return torch.compile(copy.deepcopy(net), dynamic=False)


def ours(
    net: nn.Module, x: Tensor, calibration: list[Tensor], folder: Path
) -> Callable[[Tensor], Any]:
    return deploy(net, x, to=folder / "ours", budget_s=1.0).predict


def ours_int8(
    net: nn.Module, x: Tensor, calibration: list[Tensor], folder: Path
) -> Callable[[Tensor], Any]:
    made = deploy(
        net, x, to=folder / "int8", quantize="int8", calibration=calibration, budget_s=1.0
    )
    return made.predict


def aoti(
    net: nn.Module, x: Tensor, calibration: list[Tensor], folder: Path
) -> Callable[[Tensor], Any]:
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "bare.pt2"))
    return torch._inductor.aoti_load_package(path)


def _onnx(net: nn.Module, x: Tensor, path: Path) -> None:
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    made = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["x"])
    assert made is not None
    made.save(path)


def _session(path: Path) -> Callable[[Tensor], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def onnxruntime_float(
    net: nn.Module, x: Tensor, calibration: list[Tensor], folder: Path
) -> Callable[[Tensor], Any]:
    _onnx(net, x, folder / "bare.onnx")
    return _session(folder / "bare.onnx")


def onnxruntime_int8(
    net: nn.Module, x: Tensor, calibration: list[Tensor], folder: Path
) -> Callable[[Tensor], Any]:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(calibration)

        def get_next(self) -> Any:
            found = next(self.left, None)
            return None if found is None else {"x": found.numpy()}

    _onnx(net, x, folder / "bare.onnx")
    made = folder / "bare_int8.onnx"
    types: dict[str, Any] = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(folder / "bare.onnx", made, Reader(), per_channel=True, **types)
    return _session(made)


def pt2e(
    net: nn.Module, x: Tensor, calibration: list[Tensor], folder: Path
) -> Callable[[Tensor], Any]:
    import torchao.quantization.pt2e as tools
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    shapes = ({0: torch.export.Dim("batch")},)
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    graph = torch.export.export(copy.deepcopy(net), (x,), dynamic_shapes=shapes).module()
    prepared = prepare_pt2e(graph, quantizer)
    for batch in calibration:
        prepared(batch)
    made = convert_pt2e(prepared)
    tools.move_exported_model_to_eval(made)
    program = torch.export.export(made, (x,), dynamic_shapes=shapes)
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(folder / "pt2e.pt2"), inductor_configs={"freezing": True}
    )
    return torch._inductor.aoti_load_package(path)


WAYS: dict[str, Make] = {
    "itself": itself,
    "itself again": itself,
    "torch.compile": compiled,
    "AOTInductor as it comes": aoti,
    "ONNX Runtime": onnxruntime_float,
    "deploy": ours,
    "ONNX Runtime, static int8": onnxruntime_int8,
    "PT2E int8, AOTInductor frozen": pt2e,
    "deploy, int8": ours_int8,
}


def measured(name: str, budget_s: float) -> dict[str, Any]:
    """Return gains and SQNR of each way at both batches."""
    torch.manual_seed(0)
    net, x = NETS[name]()
    net = net.eval().requires_grad_(False)
    calibration = [x, *(x[torch.randperm(BATCH)] for _ in range(3))]
    made: dict[str, Callable[[Tensor], Any]] = {}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for way, make in WAYS.items():
            place = Path(folder) / way.replace(" ", "_")
            place.mkdir()
            start = time.monotonic()
            try:
                made[way] = make(net, x, calibration, place)
                answer = made[way](x.clone())
            except Exception as error:  # of tools that are not there, or cannot
                made.pop(way, None)
                found[way] = {
                    "failed": f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
                }
                continue
            answer = answer if isinstance(answer, Tensor) else answer[0]
            found[way] = {"sqnr_db": sqnr_db(net(x), answer), "made_s": time.monotonic() - start}
        for batch in (BATCH, 1):
            given = x[:batch].clone()
            lanes = {
                way: BenchmarkCase(partial(call, given), torch.device("cpu"))
                for way, call in made.items()
            }
            race.run(lanes, budget_s=budget_s, baseline="itself")
            for way, lane in lanes.items():
                gain = race.speedup(lanes["itself"], lane)
                found[way][str(batch)] = {"ms": 1e3 * race.p10(lane), "gain": list(gain)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=[*NETS], choices=[*NETS])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget-s", type=float, default=4.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    everything = {}
    for name in options.nets:
        everything[name] = found = measured(name, options.budget_s)
        rows = []
        for way, one in found.items():
            if "failed" in one:
                rows.append([way, one["failed"][:30], "", "", "", ""])
                continue
            cells = [f"{one['sqnr_db']:.1f}"]
            for batch in (str(BATCH), "1"):
                ratio, low, high = one[batch]["gain"]
                cells += [f"{one[batch]['ms']:.3f}", f"{ratio:.2f}x ({low:.2f}-{high:.2f})"]
            rows.append([way, *cells])
        columns = [name, "SQNR", f"batch {BATCH} (ms)", "gain", "batch 1 (ms)", "gain"]
        print(Table(columns, rows).to_text(140), flush=True)
        if options.json:
            options.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
