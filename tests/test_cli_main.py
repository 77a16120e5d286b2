"""What all commands have in common: help that teaches, exit codes, silence where nobody looks on, completion."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_accel import progress
from lightning_accel.cli import listing, main, terminal
from lightning_accel.cli.main import _parser

COMMANDS = next(
    action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)
).choices


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_each_command_has_two_examples_and_the_exit_codes(name: str) -> None:
    said = COMMANDS[name].format_help()
    assert len(re.findall(rf"^    lightning-accel {name}\b", said, re.M)) >= 2
    assert "exit codes: 0 fine, 1" in said


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "board"])  # which is a page
def test_each_command_prints_one_json_object_when_asked(name: str) -> None:
    assert any("--json" in action.option_strings for action in COMMANDS[name]._actions)


_ASKS_ALL = """
import contextlib, io, sys
from lightning_accel.cli import main
for words in [["--help"], ["--version"], [], *([name, "--help"] for name in NAMES)]:
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        main(words)
    assert said.getvalue()
    heavy = {"torch", "lightning", "numpy", "hydra", "omegaconf", "rich", "jinja2"} & set(sys.modules)
    assert not heavy, f"{words} import {heavy}"
"""


def test_help_answers_before_torch_could_be_imported() -> None:
    script = f"NAMES = {list(COMMANDS)!r}\n{_ASKS_ALL}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("environment", "number"),
    [
        ({}, 0),
        ({"RANK": "3"}, 3),
        ({"LOCAL_RANK": "1"}, 1),
        ({"RANK": "0", "LOCAL_RANK": "2"}, 0),
        ({"SLURM_PROCID": "7"}, 7),
        ({"RANK": "none"}, 0),
    ],
)
def test_a_process_knows_its_rank(
    environment: dict[str, str], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in progress.RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert progress.rank() == number


def test_other_processes_than_the_first_say_and_do_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["list"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("json_asked", "ci", "is_terminal", "quiet"),
    [
        (False, "", True, False),
        (True, "", True, True),
        (False, "true", True, True),
        (False, "false", True, False),
        (False, "", False, True),
    ],
)
def test_progress_is_for_those_who_look_on(
    json_asked: bool, ci: str, is_terminal: bool, quiet: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    assert terminal.is_quiet(argparse.Namespace(json=json_asked)) is quiet


def test_progress_shows_what_is_done_on_the_error_output_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with terminal.progress(argparse.Namespace(), "doctor", 60.0) as say:
        say("reading batches")
        print("an answer")
    said = capsys.readouterr()
    assert said.out == "an answer\n" and "reading batches" in said.err


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (KeyboardInterrupt, 130, "interrupted"),
        (BrokenPipeError, 0, ""),
        (SystemExit, 130, "interrupted"),
    ],
)
def test_an_interrupt_and_a_reader_who_has_read_enough_have_codes_of_their_own(
    raised: type[BaseException],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def chosen(*_: object) -> None:
        try:
            raise KeyboardInterrupt if raised is SystemExit else raised
        except KeyboardInterrupt:
            if raised is SystemExit:
                sys.exit(1)  # as Lightning does within a fit
            raise

    turned: list[int] = []
    monkeypatch.setattr(listing, "chosen", chosen)
    monkeypatch.setattr(os, "dup2", lambda _, place: turned.append(place))
    monkeypatch.setattr(sys.stdout, "fileno", lambda: 1, raising=False)
    assert main(["list"]) == code
    assert said in capsys.readouterr().err
    assert turned == ([1] if raised is BrokenPipeError else [])


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    assert shell == "tcsh" or "budget-s" in script  # of which shtab writes commands alone
    if shell == "bash":
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr


def test_completion_without_its_package_says_which_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "lightning-accel[completion]" in capsys.readouterr().err


def test_completion_as_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", "bash", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shell"] == "bash"


PRINTS = """
import sys
from torch import nn
print("imported")

class Net(nn.Sequential):
    def forward(self, x):
        print("called")
        return super().forward(x)

def net():
    print("built")
    return Net(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

def leaves():
    sys.exit(0)
"""


@pytest.fixture
def prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_to_print.py").write_text(PRINTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "made_to_print", raising=False)


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "made_to_print:net", "--example", "3,4", "--budget-s", "0.1"],
        ["export", "made_to_print:net", "--example", "3,4", "--to", "b", "--formats", "export", "--budget-s", "0.1"],
        ["show", "+accel/loop=lean", "made_to_print:net", "--example", "3,4"],
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_what_the_users_code_prints_is_beside_the_one_json_object(
    prints: None, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    main([*words, "--json"])
    said = capsys.readouterr()
    assert isinstance(json.loads(said.out), dict)
    assert "built" in said.err


def test_code_that_ends_the_process_and_errors_that_nobody_expected_are_told(
    prints: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["plan", "made_to_print:leaves", "--example", "3,4"]) == 2
    assert "ended the process. Found: exit code 0." in capsys.readouterr().err
    monkeypatch.setattr("lightning_accel.cli.plan._named", lambda args: 1 / 0)
    assert main(["plan", "made_to_print:net"]) == 2
    assert "ZeroDivisionError: division by zero" in capsys.readouterr().err
    monkeypatch.setenv("LIGHTNING_ACCEL_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main(["plan", "made_to_print:net"])
