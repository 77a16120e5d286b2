"""Processes that die, stop or start anew: who is told, by which name, and what goes on."""

from __future__ import annotations

import json
import math
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pytest
import torch.distributed as dist

from lightning_accel import MPIVariables, RankWatch
from lightning_accel.cli import main
from lightning_accel.errors import AccelError, Unsupported
from lightning_accel.parallel.links import Links, Rank
from lightning_accel.parallel.restarts import agree, warning_of_restarts
from lightning_accel.parallel.watch import Lost, Member, Sight, Silence, Watch, ending, judge
from lightning_accel.parallel.watch.attendance import Attendance

SCRIPT = Path(__file__).parent / "scripts" / "lost_ranks.py"
ENVIRON = {"GLOO_SOCKET_IFNAME": "lo"}


# --- real processes ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize(
    ("how", "rank", "strategy", "said"),
    [
        ("SIGSTOP", 1, "ddp", "is stopped (SIGSTOP)"),
        ("SIGSTOP", 0, "accel_fsdp", "is stopped (SIGSTOP)"),
        ("SIGKILL", 0, "accel_tensor", "is gone: it was killed, or crashed"),
    ],
)
def test_a_lost_process_ends_all_with_its_name(
    tmp_path: Path, how: str, rank: int, strategy: str, said: str
) -> None:
    arguments = (str(tmp_path), how, str(rank), strategy)
    status, printed = forks.run_ranks(
        SCRIPT, *arguments, cwd=tmp_path, environ=ENVIRON, together=False
    )
    assert status not in (0, -1), printed[-2000:]
    name = (tmp_path / "expected").read_text()
    assert f"Found: {name} {said}" in printed, printed[-2000:]
    assert "in step " in printed and f"ckpt_path='{tmp_path}/last.ckpt'" in printed


@pytest.mark.slow
@pytest.mark.ddp
def test_a_second_fit_meets_nobody_who_waits_in_the_first(tmp_path: Path) -> None:
    """Collectives of the two would meet, and gradients be sums of other things (optuna #5190: the trial after one that
    ran out of memory on one process never goes on; pytorch #44353).
    """
    arguments = (str(tmp_path), "caught", "0", "accel_ddp")
    status, printed = forks.run_ranks(
        SCRIPT, *arguments, cwd=tmp_path, environ=ENVIRON, together=False
    )
    assert status not in (0, -1), printed[-2000:]
    assert "left with ValueError: of the user's own" in printed and ", and is ended." in printed
    assert "Found: rank 1 did not leave the one that failed" in (tmp_path / "second").read_text()
    assert not (tmp_path / "sum").exists()


@pytest.mark.slow
@pytest.mark.ddp
def test_a_killed_process_is_started_anew_and_the_fit_goes_on(tmp_path: Path) -> None:
    sums = {}
    for how, run in (("nothing", forks.run_ranks), ("restart", forks.run_script)):
        folder = tmp_path / how
        folder.mkdir()
        arguments = (str(folder), how, "0", "accel_ddp")
        status, printed = run(SCRIPT, *arguments, cwd=folder, environ=ENVIRON)  # type: ignore[operator]
        assert status == 0, printed[-3000:]
        sums[how] = float((folder / "sum").read_text())
    names = [p.read_text() for p in sorted((tmp_path / "restart").glob("name *"))]
    assert names[0] == names[1] != names[2] == names[3] and len(names) == 4
    assert sums["restart"] == sums["nothing"]


# --- judgement --------------------------------------------------------------------------------------


def seen(seconds: float, *sights: Sight | None) -> Silence:
    silence = Silence(math.inf)
    for sight in sights:
        silence.grow(seconds / len(sights), sight)
    return silence


@pytest.mark.parametrize(
    ("silence", "becomes"),
    [
        (seen(1, Sight("X", 0)), "is gone"),  # at once
        (seen(1, Sight("Z", 0)), "is gone"),
        (seen(99, Sight("T", 0)), ""),
        (seen(101, Sight("T", 0)), "is stopped"),
        (seen(999, Sight("t", 0)), ""),  # in a debugger
        (seen(999, Sight("R", 5), Sight("R", 700)), ""),  # computes in C
        (seen(101, Sight("S", 5), Sight("S", 5)), "does not answer"),  # hangs in C
        (seen(101, None), "does not answer"),  # elsewhere
        (seen(99, None), ""),
    ],
)
def test_only_who_is_dead_or_stopped_is_lost(silence: Silence, becomes: str) -> None:
    found = judge(silence, 100.0)
    assert found.startswith(becomes) and bool(found) == bool(becomes)


# --- the watch, several in this process -------------------------------------------------------------


class Three:
    """Watches of three ranks, as on three machines."""

    def __init__(self, timeout_s: float = 0.6) -> None:
        self.store = dist.HashStore()
        self.ended: list[tuple[int, Lost]] = []
        self.watches = [
            Watch(
                self.store,
                Member(rank, f"node{rank}", 100 + rank),
                3,
                timeout_s=timeout_s,
                where=lambda rank=rank: f"in step {rank}",  # type: ignore[misc]
                on_lost=lambda lost, rank=rank: self.ended.append((rank, lost)),  # type: ignore[misc]
            )
            for rank in range(3)
        ]
        for watch in self.watches:
            watch.start()
        self.met()

    def met(self) -> None:
        """Wait until all know where the others are."""
        turn = threading.Event()
        while not (
            len(self.watches[0].peers) == 2
            and all(peer.where for w in self.watches for peer in w.peers.values())
            and all(w.peers for w in self.watches)
        ):
            turn.wait(0.01)

    def leave(self) -> None:
        for watch in self.watches:
            watch.leave()


def dies(watch: Watch) -> None:
    """Close all at once, as the end of a process does."""
    watch._part = lambda: None  # type: ignore[method-assign]
    watch._reach = lambda: None  # type: ignore[method-assign]
    watch.leave()


def is_silent(watch: Watch) -> None:
    """Neither say nor hear anything more, with connections open."""
    watch._selector = _Deaf(watch._selector)  # type: ignore[assignment]
    watch._round = lambda _: None  # type: ignore[method-assign]


class _Deaf:
    def __init__(self, inner: Any) -> None:
        self._inner, self._turn = inner, threading.Event()

    def select(self, seconds: float) -> list[Any]:
        self._turn.wait(seconds)
        return []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(
    ("ends", "said", "is_over"),
    [
        (dies, "is gone: its connection closed", True),
        (is_silent, "does not answer", True),
        (lambda watch: watch.leave("ValueError: no"), "left with ValueError: no", False),
    ],
)
def test_the_end_of_one_is_told_to_all_others(
    rank: int, ends: Callable[[Watch], None], said: str, is_over: bool
) -> None:
    three = Three()
    ends(three.watches[rank])
    for watch in three.watches:
        if watch.me.rank != rank:
            lost = watch.wait(20.0)
            assert lost is not None and lost.member.rank == rank and lost.is_over == is_over
            assert lost.how.startswith(said) and lost.where == f"in step {rank}"
    three.leave()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_nobody_misses_who_took_leave_nor_was_asleep(order: tuple[int, ...]) -> None:
    three = Three()
    first, *others = (three.watches[rank] for rank in order)
    first.leave()
    for peer in [peer for watch in others for peer in watch.peers.values()]:
        peer.silence.grow(1e6, None)  # a machine that was suspended
    assert others[-1].wait(1.0) is None
    three.leave()
    assert three.ended == []


def test_a_run_that_failed_is_over_though_another_has_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A script that catches the error of all processes goes on: its next run must not be ended for the last one."""
    monkeypatch.setattr(ending.threading, "main_thread", threading.current_thread)

    def the_run(look: Callable[[], Any]) -> Any:
        return look()

    failed = the_run(lambda: ending.call_of("the_run"))
    assert the_run(lambda: ending.returns(failed, 0.0))
    assert not the_run(lambda: ending.returns(ending.call_of("the_run"), 0.0))  # type: ignore[arg-type]
    assert ending.call_of("nowhere") is None


@pytest.mark.parametrize(("hopeless", "stays", "does"), [
    ([True], False, ["aborts"]),
    ([True], True, ["aborts", "exits"]),  # of the dead
    ([False], False, []),  # all failed
    ([False, False, True], True, ["aborts", "exits"]),  # one failed, and began another run or ended
])  # fmt: skip
def test_who_waits_for_a_failed_process_is_told_and_ends_when_nobody_will_answer(
    monkeypatch: pytest.MonkeyPatch, hopeless: list[bool], stays: bool, does: list[str]
) -> None:
    """Of an error that all processes raise, the group must be left to the script's next run."""
    done: list[str] = []
    said: list[str] = []
    monkeypatch.setattr(ending, "returns", lambda *_: not stays)
    monkeypatch.setattr(ending, "_abort", lambda: done.append("aborts"))
    monkeypatch.setattr(ending.os, "_exit", lambda code: done.append("exits"))
    monkeypatch.setattr(ending, "say", said.append)
    before = {*threading.enumerate()}
    answers = iter(hopeless)
    ending._end(
        0.0,
        sys._getframe(),
        "rank 1 left with ValueError",
        lambda: 0.0 if next(answers, True) else None,
    )
    for thread in {*threading.enumerate()} - before:
        thread.join()
    assert sorted(done) == does
    assert all(text.startswith("rank 1 left with ValueError\nProcess ") for text in said)
    endings = [text.rsplit(", ", 1)[-1] if "ended" in text else "waits" for text in said]
    assert endings == (["waits"] * (not hopeless[0]) + ["and is ended."]) * stays


def test_a_run_waits_for_those_who_are_still_in_the_one_that_failed() -> None:
    store = dist.HashStore()
    one, other, third = (Attendance(store, rank, 3) for rank in range(3))
    one.enter()
    other.enter()
    assert one.absent() == [2]
    one.leave(failed=True)
    assert not other.has_returned(0)
    with pytest.raises(AccelError, match="Found: rank 1 did not leave the one that failed here"):
        one.gather(patience_s=0.0)
    assert other.has_returned(0), "who waits in the old run knows that nobody will answer"
    other.leave(failed=False)
    one.leave(failed=True)
    for begins in (other, third, one):  # that others are in the new run already holds nobody up
        begins.gather(patience_s=0.0)
        begins.enter()
    assert one.absent() == []
    one.leave(failed=True)
    other.leave(failed=True)
    for _ in range(2):  # runs that end before they are watched
        third.leave(failed=True)
        for each in (one, other, third):
            each.gather(patience_s=0.0)


def test_who_waits_learns_of_another_run_that_asked_nobody() -> None:
    store, turn = dist.HashStore(), threading.Event()
    one, other = (Attendance(store, rank, 2) for rank in range(2))
    one.enter()
    one.leave(failed=True)
    one.tell_of_the_next(turn.is_set)
    assert not other.has_returned(0)
    turn.set()
    (thread,) = [t for t in threading.enumerate() if t.name == "lightning-accel-attendance"]
    thread.join()
    assert other.has_returned(0)


def test_a_stranger_is_not_heard() -> None:
    three = Three()
    place = json.loads(three.store.get("leader"))
    with socket.create_connection(("127.0.0.1", place["port"])) as stranger:
        me = Member(1, "elsewhere", 7)._asdict()
        stranger.sendall(json.dumps({"hello": "guess", "me": me}).encode() + b"\n")
        stranger.settimeout(20.0)
        assert stranger.recv(100) == b""
    assert three.watches[0].peers[1].member.host == "node1"
    three.leave()
    assert three.ended == []


# --- restarts ---------------------------------------------------------------------------------------


def test_tries_that_share_a_store_have_names_of_their_own() -> None:
    store, names = dist.HashStore(), []
    for _ in range(3):
        found: dict[int, str] = {}

        def join(rank: int, found: dict[int, str] = found) -> None:
            found[rank] = agree(store, rank, 3, 5.0)

        threads = [threading.Thread(target=join, args=(rank,)) for rank in (2, 1, 0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(found.values())) == 1 and len(found) == 3
        names.append(found[0])
    assert len(set(names)) == 3


def test_who_did_not_come_is_named() -> None:
    store = dist.HashStore()
    store.set("here/1", "of a try before")
    with pytest.raises(AccelError, match=r"no sign of rank 1, 2\. Do:"):
        agree(store, 0, 3, 0.05)


def test_restarts_that_would_hang_are_told() -> None:
    asked = {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in warning_of_restarts(asked)
    assert warning_of_restarts({**asked, "TORCHELASTIC_USE_AGENT_STORE": "False"}) == ""


@pytest.mark.parametrize("timeout", [0, -1, math.nan, None, "2", True])
def test_a_timeout_that_makes_no_sense_says_what_to_do(timeout: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"`timeout` is .*Found: .*Do: "):
        RankWatch(timeout=timeout)


# --- mpirun -----------------------------------------------------------------------------------------

OPEN = "OMPI_COMM_WORLD_{}"
MVAPICH = "MV2_COMM_WORLD_{}"


def started(form: str, rank: int, size: int, local: int, here: int) -> dict[str, str]:
    """Return the variables of one process."""
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    return {form.format(n): str(v) for n, v in zip(names, (rank, size, local, here), strict=True)}


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        (started(OPEN, 1, 2, 1, 2), (1, 2, 1, 0, "127.0.0.1", 29500)),
        ({**started(MVAPICH, 5, 6, 1, 2), "MASTER_ADDR": "node0"}, (5, 6, 1, 2, "node0", 29500)),
        (
            {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
            | {"MASTER_ADDR": "a", "MASTER_PORT": "777"},
            (2, 4, 0, 1, "a", 777),
        ),
    ],
)
def test_variables_of_mpirun_tell_the_place_of_a_process(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], place: tuple[Any, ...]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = MPIVariables()
    assert MPIVariables.detect() and found.creates_processes_externally
    ranks = (found.global_rank(), found.world_size(), found.local_rank(), found.node_rank())
    assert (*ranks, found.main_address, found.main_port) == place


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "none of OMPI_COMM_WORLD_RANK"),
        (started(OPEN, 2, 4, 0, 2), "no MASTER_ADDR"),
        (started(OPEN, 1, 4, 0, 2), "OMPI_COMM_WORLD_LOCAL_RANK=0"),  # one machine after the other
        (started(OPEN, 2, 3, 0, 2), "OMPI_COMM_WORLD_SIZE=3"),
        (started(OPEN, 0, 2, 0, 0), "OMPI_COMM_WORLD_LOCAL_SIZE=0"),
        ({**started(OPEN, 0, 2, 0, 2), "OMPI_COMM_WORLD_RANK": "-1"}, "'-1'"),
        ({**started(OPEN, 0, 2, 0, 2), "OMPI_COMM_WORLD_SIZE": "two"}, "'two'"),
    ],
)
def test_variables_that_make_no_sense_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Unsupported, match=rf"Found: .*{said}.*Do: "):
        MPIVariables()


def test_a_trainer_of_other_devices_than_mpirun_started_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in started(OPEN, 0, 2, 0, 2).items():
        monkeypatch.setenv(name, value)
    MPIVariables().validate_settings(2, 1)
    with pytest.raises(ValueError, match="Do: pass devices=2, num_nodes=1"):
        MPIVariables().validate_settings(4, 1)


# --- doctor -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.ddp
def test_doctor_finds_the_slow_process_and_the_wrong_clock(tmp_path: Path) -> None:
    script = SCRIPT.with_name("doctor_ranks.py")
    status, printed = forks.run_ranks(script, str(tmp_path), cwd=tmp_path, environ=ENVIRON)
    assert status == 0, printed[-3000:]
    assert [(tmp_path / f"code {rank}").read_text() for rank in (0, 1)] == ["1", "0"]
    assert not (tmp_path / "1.json").exists()  # the first process answers for all
    found = json.loads((tmp_path / "0.json").read_text())
    assert found["slow"] == found["clocks_apart"] == [1]
    one = found["ranks"][1]
    assert abs(one["clock_s"] - 100) <= one["clock_error_s"] < 10
    for each in found["collectives"]:
        assert each["seconds"] > 0
        moved = each["seconds"] * each["bus_bytes_per_s"]
        assert math.isclose(moved, each["size_bytes"])  # between two, whatever is done
    assert "rank 1 on " in printed and "timedatectl" in printed


def test_doctor_calls_equal_processes_fine() -> None:
    ranks = tuple(Rank(n, "host", 1.0 + n / 10, 0.5 * n, 0.1) for n in range(3))
    assert not Links("gloo", "cpu", (), ranks).slow
    assert not Links("gloo", "cpu", (), ranks).apart(1.0)  # the last by 1.0, of which 0.1 is unsure
    late = (*ranks, ranks[0]._replace(rank=3, product_s=1.4))
    assert [one.rank for one in Links("gloo", "cpu", (), late).slow] == [3]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--devices", "1"], "`--devices` is a whole number from 2 on"),
        (["--devices", "0"], "Found: 0"),
        (["my.module:build"], "no training. Found: my.module:build"),
        (["--accelerator", "abacus"], "unknown --accelerator. Found: abacus"),
        (["--output", "found.xml"], "unknown form. Found: found.xml"),
    ],
)
def test_doctor_says_what_to_do_about_words_that_make_no_sense(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["doctor", "--parallel", *words]) == 2
    printed = capsys.readouterr().err
    assert said in printed and "Do: " in printed
