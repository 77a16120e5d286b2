"""What every test gets: one thread, fixed seeds, an empty folder, a quiet Lightning, no network."""

from __future__ import annotations

import importlib.util
import logging
import os
import random
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch._dynamo.guards

torch.set_num_threads(1)
# Each compilation would empty the caches of the processor to time its guards for a log: a sixth of its time.
torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0
os.environ.setdefault("WANDB_SILENT", "true")
os.environ["LIGHTNING_ACCEL_KEY"] = "a key of the tests, and of nobody else"  # none in the home
for _name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_name).setLevel(logging.ERROR)

ROOT = Path(__file__).resolve().parents[1]
_OF_PROCESSES = (
    "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "NODE_RANK", "LOCAL_RANK", "OMP_NUM_THREADS",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow tests first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run, and say why."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("xla") and importlib.util.find_spec("torch_xla") is None:
        pytest.skip("needs torch_xla")
    if item.get_closest_marker("ddp") and not torch.distributed.is_available():
        pytest.skip("needs torch.distributed")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
    torch.default_generator.manual_seed(
        0
    )  # without a GPU, milliseconds less than `torch.manual_seed`


@pytest.fixture(scope="session")
def _shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(autouse=True)
def _empty_folder(
    request: pytest.FixtureRequest, _shared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Work in an empty folder, so that nothing a test writes lands in the tree: in `tmp_path` where that is used."""
    own = "tmp_path" in request.fixturenames
    folder = request.getfixturevalue("tmp_path") if own else _shared_folder
    monkeypatch.chdir(folder)
    yield
    if not own:
        for left in _shared_folder.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()


@pytest.fixture(autouse=True)
def _no_processes() -> Iterator[None]:
    """Leave no group of processes behind, nor its address or threads: Lightning never ends one, and scripts would meet there."""
    before = {name: os.environ.get(name) for name in _OF_PROCESSES}
    yield
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    if torch.distributed.is_available() and torch.distributed.GroupMember.WORLD is not None:
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every connection that leaves this machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else "localhost"
        if self.family != socket.AF_UNIX and host not in ("localhost", "127.0.0.1", "::1"):
            raise OSError(f"a test tried to reach {address}: tests use no network")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture
def root() -> Path:
    """The root of the source tree."""
    return ROOT


@pytest.fixture
def trainer_kwargs(tmp_path: Path) -> dict[str, Any]:
    """Arguments of a Trainer for a tiny, silent fit on one CPU device."""
    return tiny.silent(tmp_path)


@pytest.fixture
def clean_dynamo() -> Iterator[None]:
    """Start and end with an empty compile cache of this process."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
