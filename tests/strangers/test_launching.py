"""What users of Lightning, torch and others reported of processes that hang, die, start anew or cannot find each other."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Mapping
from pathlib import Path

import forks
import pytest
import torch.distributed as dist

from lightning_accel import MPIVariables
from lightning_accel.parallel.restarts import agree
from lightning_accel.parallel.watch import Lost, Member, Sight, Silence, Watch, judge
from lightning_accel.parallel.watch.lines import Line

SCRIPT = Path(__file__).parents[1] / "scripts" / "lost_ranks.py"


def fit(folder: Path, *arguments: str) -> tuple[int, str]:
    """Run it in two processes, and return when both have ended."""
    environ = {"GLOO_SOCKET_IFNAME": "lo"}
    given = (str(folder), *arguments)
    return forks.run_ranks(SCRIPT, *given, cwd=folder, environ=environ, together=False)


@pytest.mark.slow
@pytest.mark.ddp
def test_lightning_8130_an_error_of_one_process_in_validation_ends_all(tmp_path: Path) -> None:
    """Also Lightning #9303: the first process waited for ever."""
    status, printed = fit(tmp_path, "error", "1", "ddp")
    assert status not in (0, -1), printed[-2000:]
    assert "left with ValueError: of the user's own" in printed, printed[-2000:]


@pytest.mark.slow
@pytest.mark.ddp
def test_accelerate_3861_a_validation_of_one_process_may_take_longer_than_the_timeout(
    tmp_path: Path,
) -> None:
    status, printed = fit(tmp_path, "long", "0", "accel_ddp")
    assert status == 0 and "the run ends" not in printed, printed[-2000:]


def test_lightning_2913_a_worker_does_not_hide_the_end_of_its_process() -> None:
    """A forked worker of a DataLoader outlives a killed process for a while, and had its connections open."""
    ours, theirs = (Line(end) for end in socket.socketpair())
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:  # the worker, which ends when the pipe does
        os.close(go)
        os.read(ready, 1)
        os._exit(0)
    ours.close()
    theirs.socket.settimeout(20.0)
    with pytest.raises(ConnectionError, match="the other end has closed"):
        theirs.read()
    theirs.close()
    os.close(go)
    os.close(ready)
    assert os.waitpid(child, 0)[1] == 0


def test_basicts_250_the_first_process_may_leave_before_the_others() -> None:
    ended: list[Lost] = []
    store = dist.HashStore()
    watches = [
        Watch(store, Member(rank, "host", rank), 2, timeout_s=0.4, where=str, on_lost=ended.append)
        for rank in (0, 1)
    ]
    for watch in watches:
        watch.start()
    turn = threading.Event()
    while not all(watch.peers for watch in watches):
        turn.wait(0.01)
    watches[0].leave()
    assert watches[1].wait(1.0) is None
    watches[1].leave()
    assert ended == []


@pytest.mark.parametrize("before", [1, 4])
def test_torch_135712_and_108158_tries_of_other_sizes_leave_nothing_that_misleads(
    before: int,
) -> None:
    store = dist.HashStore()
    for rank in range(1, before):
        store.set(f"here/{rank}", "of a process that is dead")
        store.set(f"name/{rank}/of a process that is dead", "a name of then")
        store.set(f"heard/a name of then/{rank}", "")
    found: list[str] = []
    other = threading.Thread(target=lambda: found.append(agree(store, 1, 2, 20.0)))
    other.start()
    name = agree(store, 0, 2, 20.0)
    other.join()
    assert found == [name] != ["a name of then"]


@pytest.mark.parametrize(
    ("report", "variables", "place"),
    [
        (
            "fairseq 4645",
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3",
             "OMPI_COMM_WORLD_LOCAL_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"},
            (3, 4, 3, 0),
        ),
        (  # the number among all was taken for that of the device
            "distributed-training-guide 59",
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2",
             "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
             "MASTER_ADDR": "node0"},
            (2, 4, 0, 1),
        ),
        (
            "sirepo 5640",
            {"PMI_RANK": "1", "PMI_SIZE": "2", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "2"},
            (1, 2, 1, 0),
        ),
    ],
)  # fmt: skip
def test_processes_of_mpirun_know_their_place(
    monkeypatch: pytest.MonkeyPatch,
    report: str,
    variables: Mapping[str, str],
    place: tuple[int, ...],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = MPIVariables()
    there = (found.global_rank(), found.world_size(), found.local_rank(), found.node_rank())
    assert there == place


def test_torch_12166_a_process_that_waits_for_its_device_is_not_called_stopped() -> None:
    """State D: the kernel waits, nothing can kill it, and the others must not wait with it."""
    silence = Silence(1e9)
    silence.grow(121.0, Sight("D", 3.0))
    assert judge(silence, 120.0).startswith("does not answer")
    assert judge(silence, 1e9) == ""
