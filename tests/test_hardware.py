"""What the machine is good at, compared with timing it by hand."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_accel import hardware
from lightning_accel.hardware import Hardware, describe


@pytest.fixture(autouse=True)
def _forget() -> None:
    hardware._describe.cache_clear()


def test_the_gain_of_a_dtype_is_what_a_stopwatch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    takes = {torch.float32: 8.0, torch.bfloat16: 2.0, torch.float16: 32.0}
    extra = itertools.cycle([0.0, 3.0, 7.0])  # other work, which can only add

    def seconds(matrix: torch.Tensor) -> float:
        return takes[matrix.dtype] + next(extra)

    monkeypatch.setattr(hardware, "_seconds", seconds)
    monkeypatch.setattr(hardware, "time", SimpleNamespace(perf_counter=lambda: next(clock) / 1000))
    clock = itertools.count()
    found = describe("cpu")
    assert found.gains == {"bfloat16": 4.0, "float16": 0.25}
    assert found.fast_dtypes == (torch.bfloat16,)


def test_a_dtype_is_fast_only_where_it_was_seen_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    gains = {torch.bfloat16: 1.0, torch.float16: 1.2}
    monkeypatch.setattr(hardware, "_gain", lambda device, dtype: gains[dtype])
    assert describe("cpu").fast_dtypes == (torch.float16,)


def test_a_dtype_that_does_not_run_is_not_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_runs", lambda device, dtype: False)
    found = describe("cpu")
    assert found.fast_dtypes == ()
    assert found.gains == {}


def test_a_hopeless_dtype_is_given_up_after_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[torch.dtype] = []

    def seconds(matrix: torch.Tensor) -> float:
        looked.append(matrix.dtype)
        return 1e-3 if matrix.dtype == torch.float32 else 1.0

    monkeypatch.setattr(hardware, "_seconds", seconds)
    gain = hardware._gain(torch.device("cpu"), torch.float16)
    assert gain == pytest.approx(1e-3)
    assert len(looked) == 4


def test_describing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_gain", lambda device, dtype: 1.0)
    first = describe("cpu")
    monkeypatch.setattr(hardware, "_gain", lambda device, dtype: pytest.fail("measured again"))
    assert describe("cpu") is first


def test_the_number_of_threads_is_left_alone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        describe("cpu")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    describe("cpu")
    assert torch.equal(before, torch.get_rng_state())


def test_memory_and_cores_are_those_of_this_machine() -> None:
    found = describe("cpu")
    info = Path("/proc/meminfo")
    if info.exists():
        total = int(info.read_text().split()[1]) * 1024
        assert 0 < found.memory_bytes <= total
    assert found.num_cores >= 1


def test_a_container_limit_lowers_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(hardware, "_first_word", lambda path, count: ["300000", "100000"])
    assert hardware.num_usable_cores() == 3


@pytest.mark.slow
def test_importing_touches_no_device() -> None:
    code = (
        "import torch, lightning_accel.hardware as h;"
        "assert not torch.cuda.is_initialized();"
        "assert h._describe.cache_info().currsize == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_its_plain_form_is_json(root: Path) -> None:
    import json

    plain = json.loads(json.dumps(describe("cpu").to_dict()))
    assert plain["kind"] == "cpu"
    assert Hardware("cpu", "", 0, 1, (torch.float16,), False, {}).is_fast(torch.float16)


@pytest.mark.gpu
def test_a_gpu_of_the_ampere_generation_is_fast_in_both_short_formats() -> None:
    found = describe("cuda")
    modern = torch.cuda.get_device_capability() >= (8, 0) and torch.version.hip is None
    assert found.kind == "cuda"
    assert found.is_fast(torch.bfloat16) == found.tensor_cores == modern
