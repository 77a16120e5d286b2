"""Reports about bars, logs and callbacks on command lines, each put on ours as the reporter would."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.trainer.connectors import callback_connector

from lightning_accel import entry, progress
from lightning_accel.progress import progress as told


class Stream(io.StringIO):
    """The error output: of a terminal, or of a log."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds = [0.0]
    monkeypatch.setattr(progress, "_clock", lambda: seconds[0])
    for name in ("CI", *progress.RANKS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return seconds


def long(now: list[float]) -> None:
    with told("calibrating", 2) as step:
        now[0] += 5.0
        step(by=1)


def test_rich_2779_tqdm_1437_a_bar_in_anothers_live_display_is_no_error(
    now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two displays of rich at once: "Only one live display may be active at once"."""
    from rich import get_console
    from rich.live import Live

    monkeypatch.setattr(sys, "stderr", stream := Stream(is_terminal=True))
    with Live("a table of the user's", console=get_console(), auto_refresh=False):
        long(now)
    assert "calibrating" in stream.getvalue()


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_pip_13354_briefcase_1267_colours_that_are_forced_draw_no_bar_in_a_log(
    variable: str, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """rich takes such a log for a terminal, and fills it with frames."""
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(sys, "stderr", stream := Stream(is_terminal=False))
    long(now)
    assert stream.getvalue() == "Calibrating: done in 5.0 s.\n"


def test_rich_1606_what_is_said_next_begins_in_a_line_of_its_own(
    now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finished bar had no end of line, and the next words stood behind it."""
    for is_terminal in (True, False):
        monkeypatch.setattr(sys, "stderr", stream := Stream(is_terminal))
        long(now)
        sys.stderr.write("hello!\n")
        *_, done, hello, end = stream.getvalue().split("\n")
        assert done.endswith("Calibrating: done in 5.0 s.") and (hello, end) == ("hello!", "")


def test_finetuner_271_a_bar_that_was_interrupted_does_not_hang_over_the_next(
    now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was never closed, and behaved strangely in the notebook from then on."""
    monkeypatch.setattr(sys, "stderr", stream := Stream(is_terminal=True))

    def interrupted() -> None:
        with told("planning a cut") as step:
            now[0] += 5.0
            step("group 3")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    before = len(stream.getvalue())
    long(now)
    said = stream.getvalue()[before:]
    assert "planning" not in said and "calibrating" in said


@pytest.mark.parametrize(
    "given",
    [
        {"class_path": "lightning_accel.StructuredPruning", "init_args": {"ratio": 0.5, "when": 1}},
        {"_target_": "lightning_accel.StructuredPruning", "ratio": 0.5, "when": 1},
    ],
    ids=["LightningCLI", "Hydra"],
)
def test_lightning_21189_a_callback_that_was_described_and_not_built_is_named(
    given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`trainer_defaults={"callbacks": {"class_path": ...}}` ended in "Expected a parent", which names nothing."""
    monkeypatch.setattr(callback_connector, "_load_external_callbacks", lambda _: entry.factory())
    with pytest.raises(
        TypeError, match=r"no descriptions. Found: StructuredPruning. Do: write Str"
    ):
        Trainer(**tiny.silent(tmp_path), callbacks=[given])
    Trainer(**{**tiny.silent(tmp_path), "fast_dev_run": True}, callbacks=[]).fit(BoringModel())
