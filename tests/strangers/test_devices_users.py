"""What users of devices beside CPU and CUDA report, on one in C++ that has no float64 (tests/toy), beside the CPU.

Looked at as well: etna #612, ignite #3326 and Lightning #21261 (float64 on Apple's: `test_devices.py`), Lightning #2303
and #1363 (files of TPUs: `test_xla.py`), physical-ai-studio #562 and minimind #852 (trained on the CPU, autocast for CUDA:
`test_devices.py`), torchmetrics #2383 (wrong numbers of Apple's own kernels: cannot be shown here).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import forks
import pytest
import tiny
import torch
from lightning.pytorch import LightningModule

from lightning_accel import load_from_checkpoint

TESTS = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]


@pytest.fixture(scope="module")
def found(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    from toy import device

    assert pytestconfig.cache is not None
    library = device.build(pytestconfig.cache.mkdir("toy"))
    folder = tmp_path_factory.mktemp("toy")
    script, out = TESTS / "scripts" / "toy_strangers.py", folder / "out.json"
    status, printed = forks.run_script(script, str(library), str(out), cwd=folder, path=(TESTS,))
    assert status == 0, printed[-3000:]
    return json.loads(out.read_text())


def test_a_device_is_called_by_its_own_name_sleap_nn_573(found: Any) -> None:
    assert found["sleap_nn_573"] == {"where": ["toy:0"], "same": True}


def test_what_is_logged_beside_rates_is_that_of_the_cpu_lightning_20250(found: Any) -> None:
    rows = found["lightning_20250"]
    assert rows["accel"] == rows["cpu"]
    assert {"accuracy", "lr-AdamW", "half"} <= set(rows["cpu"].splitlines()[0].split(","))


def test_a_fit_goes_on_wherever_its_file_is_taken_pytorch_optimizer_266(found: Any) -> None:
    whole, *others = found["pytorch_optimizer_266"].values()
    assert len(others) == 6 and all(other == whole for other in others)


def test_a_machine_without_the_device_reads_the_files_xla_2858(found: Any) -> None:
    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny.MLP()

    folder = Path(found["xla_2858"]["folder"])
    for path in ("weights.ckpt", "files/epoch=2.ckpt"):
        module = load_from_checkpoint(Module, folder / path)
        held = torch.cat([p.detach().flatten() for p in module.parameters()]).tolist()
        assert held == found["xla_2858"]["weights"], path
