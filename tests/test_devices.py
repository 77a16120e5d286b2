"""Devices that Lightning does not know, on one in C++ that torch did not know either (tests/toy).

What it computes is the CPU's to the last bit, so that whatever trains there must end where the CPU ends.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from lightning.pytorch import Trainer

from lightning_accel.compilation.backends import backend_for
from lightning_accel.devices.settle import settle
from lightning_accel.devices.torch_accelerator import TorchAccelerator
from lightning_accel.errors import Unsupported

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
SAME = ("loading", "report", "optimizer", "recompute")
"""What leaves the weights those of the plain fit."""
DEVICES = {
    **{given: [0, 1] for given in ("2", "'2'", "-1", "'-1'", "'0,1'", "[0, 1]")},
    "1": [0],
    **{given: [1] for given in ("'1,'", "[1]", "(1,)")},
    **dict.fromkeys(("3", "0", "-2", "'3,'", "''", "'all'", "[]", "[0, 0]", "[2]"), "ValueError"),
    **dict.fromkeys(("None", "True", "1.0", "['0']", "[True]"), "TypeError"),
}


@pytest.fixture(scope="module")
def library(pytestconfig: pytest.Config) -> Path:
    """The device, compiled once for each torch."""
    from toy import device

    assert pytestconfig.cache is not None
    return device.build(pytestconfig.cache.mkdir("toy"))


@pytest.fixture(scope="module")
def fits(library: Path, tmp_path_factory: pytest.TempPathFactory, root_of_tests: Path) -> Any:
    """What every fit of `toy_fits.py` found, in a process that has the device."""
    folder = tmp_path_factory.mktemp("toy")
    script, out = root_of_tests / "scripts" / "toy_fits.py", folder / "out.json"
    status, printed = forks.run_script(
        script, str(library), str(out), cwd=folder, path=(root_of_tests,)
    )
    assert status == 0, printed[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def root_of_tests() -> Path:
    return Path(__file__).parent


@needs_compiler
@pytest.mark.slow
def test_a_trainer_trains_on_a_device_that_lightning_does_not_know(fits: Any) -> None:
    """The weights are the CPU's, and every step was on the device, in the format asked for."""
    for name, where, dtype, like in (
        ("fp32", "toy:0", "float32", "cpu"),
        ("second", "toy:1", "float32", "cpu"),
        ("by itself", "toy:1", "float32", "cpu"),
        ("bf16", "toy:0", "bfloat16", "cpu bf16"),
        ("fp16", "toy:0", "float16", None),
        ("bf16-true", "toy:0", "bfloat16", None),
        ("masters", "toy:0", "bfloat16", None),
    ):
        found = fits[name]
        assert found["seen"] == [f"{where} {where} {dtype}"], (name, found)
        assert found["root"] == where and not found["warned"]
        if like:
            assert found["weights"] == fits[like]["weights"], name
    assert fits["checkpoint"] == {"alike": True, "on": ["cpu"]}


@needs_compiler
@pytest.mark.slow
def test_techniques_do_there_what_they_do_on_the_cpu(fits: Any) -> None:
    plain = fits["fp32"]["weights"]
    for name in {key.removesuffix(" on accel") for key in fits if key.endswith(" on accel")}:
        there, here = fits[f"{name} on accel"], fits[f"{name} on cpu"]
        assert there.get("weights") == here["weights"], (name, there)
        assert {place.split()[0] for place in there["seen"]} == {"toy:0"}, (name, there)
        assert (there["weights"] == plain) == (name in SAME), name


@needs_compiler
@pytest.mark.slow
def test_a_device_without_float64_gives_the_same(
    fits: Any, library: Path, tmp_path: Path, root_of_tests: Path
) -> None:
    """Apple's devices have none, and others (Lightning #21261, etna #612, ignite #3326): proofs go to the CPU."""
    script, out = root_of_tests / "scripts" / "toy_fits.py", tmp_path / "out.json"
    names = [name for name in fits if name.endswith(" on accel")]
    status, printed = forks.run_script(
        script,
        str(library),
        str(out),
        *names,
        cwd=tmp_path,
        path=(root_of_tests,),
        environ={"TOY_NO_FLOAT64": "1"},
    )
    assert status == 0, printed[-3000:]
    for name, found in json.loads(out.read_text()).items():
        torch.testing.assert_close(
            torch.tensor(found.get("weights", found)), torch.tensor(fits[name]["weights"])
        )
        assert found["proved"] == fits[name]["proved"], name
    assert "torch.float64" in fits["prune on accel"]["proved"]


@needs_compiler
@pytest.mark.slow
def test_autocast_for_another_device_is_put_right_and_told(fits: Any) -> None:
    """Lightning makes it for CUDA wherever it does not know the accelerator, and it would do nothing."""
    there, cpu = fits["foreign"], fits["instance"]
    assert there["seen"] == ["toy:0 toy:0 bfloat16"] and cpu["seen"] == ["cpu cpu bfloat16"]
    assert "trained on the CPU instead of toy:0 and computed in float32" in there["warned"][0]
    assert "computed in float32 instead of bf16-mixed" in cpu["warned"][0]
    assert there["weights"] == cpu["weights"] == fits["cpu bf16"]["weights"]


@needs_compiler
@pytest.mark.slow
def test_what_would_train_elsewhere_or_in_words_of_cuda_is_refused(fits: Any) -> None:
    for name, said in (
        ("ddp", "pass strategy='accel_ddp'"),
        ("no wires", "process_group_backend="),
        ("compile", "leave BlockCompile out"),
        ("not seen", "install lightning_accel by pip"),
    ):
        assert said in fits[name]["raised"] and "Found: " in fits[name]["raised"], name
    assert "accelerator='accel'" in fits["cpu"]["warned"][0]  # Lightning tells of unused GPUs only


@needs_compiler
@pytest.mark.slow
def test_random_states_of_the_device_are_kept_and_seeded(fits: Any) -> None:
    found = fits["draws"]
    assert found["seeded"] == found["after"] == [7.0, 7.0] and found["of one"] == [7.0, 3.0]
    assert found["kept"] == [0.0, 0.0]


@needs_compiler
@pytest.mark.slow
def test_devices_are_named_once_and_exist(fits: Any) -> None:
    found = fits["devices"]
    assert found.keys() == DEVICES.keys()
    for given, wanted in DEVICES.items():
        same = found[given] == wanted
        assert same or (isinstance(wanted, str) and found[given].startswith(wanted)), given
        assert same or f"Found: {given}." in found[given]


@needs_compiler
@pytest.mark.ddp
@pytest.mark.slow
def test_two_of_them_train_as_one_process_with_both_batches(library: Path, tmp_path: Path) -> None:
    one, two = forks.results_of("toy_ranks.py", tmp_path, str(library))
    assert (one["backend"], one["root"], two["root"]) == ("wires", "toy:0", "toy:1")
    assert one["seen"] == ["toy:0 toy:0 float32"] and two["seen"] == ["toy:1 toy:1 float32"]
    assert one["weights"] == two["weights"]
    assert torch.allclose(torch.tensor(one["weights"]), torch.tensor(one["alone"]), atol=1e-6)


def test_without_such_a_device_the_accelerator_says_what_to_do() -> None:
    if torch.accelerator.current_accelerator(check_available=True) is not None:
        pytest.skip("this machine has one")
    with pytest.raises(Unsupported, match="Found: torch .* Do: say accelerator=auto"):
        Trainer(accelerator="accel")
    with pytest.raises(Unsupported, match="torch.accelerator"):
        TorchAccelerator()


def test_a_trainer_that_lightning_knows_is_left_alone(trainer_kwargs: dict[str, Any]) -> None:
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        trainer = Trainer(**trainer_kwargs, precision=precision)
        before = trainer.precision_plugin, trainer.strategy.root_device
        settle(trainer)
        assert (trainer.precision_plugin, trainer.strategy.root_device) == before


def test_blocks_are_not_compiled_where_xla_compiles_steps() -> None:
    assert backend_for("cuda") == "inductor" and backend_for("tpu") == "tpu"
    with pytest.raises(Unsupported, match="Found: BlockCompile on xla. Do: leave it out"):
        backend_for("xla")
