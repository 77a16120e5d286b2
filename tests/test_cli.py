"""`lightning-accel env` on this machine, and on machines that are not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_accel import __version__
from lightning_accel.cli import env, main
from lightning_accel.cli.env import REQUIRED, Facts, mismatches

SOUND = {
    **dict.fromkeys(REQUIRED, "1.0"),
    "torch": "2.13.0+cpu",
    "lightning": "2.6.6",
    "pytorch-lightning": "2.6.6",
    "hydra-core": "1.3.8",
    "rich": "14.3.0",
    "wandb": "0.31.0",
}


def facts(python: tuple[int, int] = (3, 11), **changed: Any) -> Facts:
    other = {key: changed.pop(key) for key in list(changed) if key in Facts._fields}
    names = {key.replace("_", "-"): value for key, value in changed.items()}
    return Facts(versions={**SOUND, **names}, python=python, **other)


def test_a_sound_machine_has_no_mismatch() -> None:
    assert mismatches(facts()) == []


BREAKING = [
    ({"lightning": "2.6.2"}, "malicious"),
    ({"lightning": "2.6.3.post1"}, "malicious"),
    ({"pytorch_lightning": "2.6.3"}, "malicious"),
    ({"lightning": "2.6.5"}, "CVE-2026-58659"),
    ({"lightning": "2.5.9"}, "CVE-2026-58659"),
    ({"torch": "2.9.1+cu128"}, "CVE-2026-24747"),
    ({"torch_pruning": None}, "torch-pruning is missing"),
    ({"hydra_core": "1.3.7"}, "GHSA-37p2-j732-x8pj"),
    ({"python": (3, 14)}, "Python 3.14"),
    ({"torch_xla": "2.9.0"}, "train on the CPU without a word"),
    (
        {"torch_xla": "2.13.0", "import_errors": {"torch-xla": "undefined symbol"}},
        "train on the CPU without a word",
    ),
    ({"torchvision": "0.20", "import_errors": {"torchvision": "no nms"}}, "torchvision does not"),
]


@pytest.mark.parametrize(("changed", "said"), BREAKING)
def test_what_breaks_is_found_and_said(changed: dict[str, Any], said: str) -> None:
    (found,) = [m for m in mismatches(facts(**changed)) if m.breaks]
    assert said in found.what
    assert found.do


NOTES = [
    ({"pytorch_lightning": "2.6.7"}, "cannot be mixed"),
    ({"lightning": "2.7.0", "pytorch_lightning": "2.7.0"}, "newer than any tested"),
    ({"rich": "15.0.0"}, "rich below 15"),
    ({"wandb": "0.23.1"}, "API keys"),
    ({"torch_tpu": "0.2.0"}, "does not know torch_tpu"),
    ({"torch_build": "cuda"}, "finds no GPU"),
    ({"has_nvidia_driver": True}, "without CUDA"),
    ({"has_compiler": False}, "no C++ compiler"),
    ({"num_threads": 8, "num_cores": 2}, "more threads than there are cores"),
    ({"load": 1.4, "num_cores": 2}, "other work"),
]


@pytest.mark.parametrize(("changed", "said"), NOTES)
def test_what_only_hinders_is_a_note(changed: dict[str, Any], said: str) -> None:
    (found,) = mismatches(facts(**changed))
    assert said in found.what
    assert not found.breaks


HARMLESS = [
    {"torch": "2.10.0"},
    {"lightning": "2.6.10", "pytorch_lightning": "2.6.10"},
    {"hydra_core": "1.4.0rc3", "python": (3, 14)},
    {"torch_xla": "2.13.1"},
    {"torch_build": "cuda", "has_gpu": True, "has_nvidia_driver": True, "has_compiler": False},
    {"rich": "14.9"},
]


@pytest.mark.parametrize("changed", HARMLESS)
def test_what_fits_is_not_reported(changed: dict[str, Any]) -> None:
    assert mismatches(facts(**changed)) == []


def test_the_breaking_ones_come_first() -> None:
    found = mismatches(facts(rich="15.0", lightning="2.6.2", load=9.0))
    assert [m.breaks for m in found] == sorted([m.breaks for m in found], reverse=True)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_facts(found: Facts) -> None:
        monkeypatch.setattr(env, "gather", lambda: found)

    return set_facts


def test_env_prints_hardware_versions_and_mismatches(
    machine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(facts(rich="15.0.0"))
    assert main(["env", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    for part in ("cores", "fast dtypes", "torch-pruning", "2.13.0+cpu", "rich below 15"):
        assert part in said


def test_env_exits_with_one_when_something_breaks(machine: Any) -> None:
    machine(facts(lightning="2.6.3"))
    assert main(["env", "--device", "cpu"]) == 1


def test_env_json_is_one_object(machine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    machine(facts(lightning="2.6.3"))
    assert main(["env", "--json", "--device", "cpu"]) == 1
    plain = json.loads(capsys.readouterr().out)
    assert plain["hardware"]["kind"] == "cpu"
    assert plain["versions"]["lightning"] == "2.6.3"
    assert plain["mismatches"][0]["breaks"] is True


def test_a_device_that_is_not_there_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--device", "nonsense"]) == 2
    assert "no such device here: nonsense" in capsys.readouterr().err


@pytest.mark.slow
def test_env_reads_what_is_installed_here_without_importing_it(root: Path) -> None:
    code = (
        "import sys; from lightning_accel.cli import env; f = env.gather();"
        "print(f.versions['torch'], f.num_cores);"
        "assert not {'lightning', 'hydra', 'wandb', 'torch_pruning'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=root, capture_output=True, text=True
    )
    import torch

    assert done.stdout.split()[0] == torch.__version__


def test_a_module_that_fails_to_import_is_told_from_one_that_does(tmp_path: Path) -> None:
    assert env._import_error("json") == ""
    assert "ModuleNotFoundError" in env._import_error("there_is_no_such_module")


def test_a_wrong_command_exits_with_the_usage() -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["nonsense"])
    assert exit_info.value.code == 2


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "tune" in capsys.readouterr().out


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert exit_info.value.code == 0
    assert __version__ in capsys.readouterr().out
