"""Progress: what is told of what takes long, to whom, beside whose bars, and that Ctrl-C leaves no trace at any place."""

from __future__ import annotations

import copy
import io
import json
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import (
    AccelReport,
    AutoTune,
    BlockCompile,
    Deploy,
    FastLoading,
    Latency,
    PostTrainingQuantization,
    StructuredPruning,
    progress,
)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """Return the lines that stand there: a terminal that knows returns, erasing, and up."""
        lines, row, column = [""], 0, 0
        for part in re.findall(r"\x1b\[[?\d;]*[a-zA-Z]|[\r\n]|[^\x1b\r\n]+", self.getvalue()):
            if part == "\r":
                column = 0
            elif part == "\n":
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            elif part == "\x1b[2K":
                lines[row] = ""
            elif found := re.fullmatch(r"\x1b\[(\d*)A", part):
                row -= int(found[1] or 1)
            elif not part.startswith("\x1b"):
                line = lines[row].ljust(column)
                lines[row] = line[:column] + part + line[column + len(part) :]
                column += len(part)
        return [line.rstrip() for line in lines if line.strip()]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that pass when a test says so."""
    now = [0.0]
    monkeypatch.setattr(progress, "_clock", lambda: now[0])
    monkeypatch.setattr(progress, "_EVERY_S", 0.5)
    for name in ("CI", "NO_COLOR", *progress.RANKS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    return now


def tell(clock: list[float], seconds: float, error: type[BaseException] | None = None) -> None:
    with progress.progress("calibrating", 4) as step:
        clock[0] += seconds
        step("batch 1", by=1)
        if error is not None:
            raise error


@pytest.mark.parametrize(
    ("seconds", "is_terminal", "environment", "drawn", "left"),
    [
        (1.9, True, {}, False, []),
        (2.1, True, {}, True, ["Calibrating: done in 2.1 s."]),
        (2.1, False, {}, False, ["Calibrating: done in 2.1 s."]),
        (1.9, False, {}, False, []),
        (9.0, True, {"CI": "true"}, False, []),
        (9.0, False, {"CI": "1"}, False, []),
        (9.0, True, {"LOCAL_RANK": "1"}, False, []),
        (9.0, True, {"CI": "false", "RANK": "0"}, True, ["Calibrating: done in 9.0 s."]),
        (9.0, True, {"TERM": "dumb"}, False, ["Calibrating: done in 9.0 s."]),
    ],
)
def test_what_takes_two_seconds_is_told_to_whoever_looks_on(
    seconds: float, is_terminal: bool, environment: dict[str, str], drawn: bool, left: list[str],
    clock: list[float], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    stream = Terminal()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    tell(clock, seconds)
    assert ("calibrating: batch 1" in stream.getvalue()) is drawn
    assert stream.screen() == left


def test_an_error_wipes_the_bar_away_and_is_the_users(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        tell(clock, 3.0, KeyboardInterrupt)
    assert "calibrating" in stream.getvalue() and stream.screen() == []
    assert threading.active_count() == threads and progress._open == []


def test_what_runs_within_adds_its_words_to_the_outer_bar(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    with progress.progress("quantizing") as outer:
        with progress.progress("calibrating", 8) as inner:
            clock[0] = 3.0
            inner("layer", by=3)
        clock[0] = 4.0
        outer("rounding")
    said = re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue())
    assert "quantizing: calibrating: 3 of 8 layer" in said
    assert "quantizing: rounding" in said
    assert stream.screen() == ["Quantizing: done in 4.0 s."]


def test_other_threads_forked_processes_and_broken_terminals_say_nothing(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    thread = threading.Thread(target=tell, args=(clock, 9.0))
    thread.start()
    thread.join()
    with progress.silence():
        tell(clock, 9.0)
    assert stream.getvalue() == ""
    stream.close()  # isatty is still true; each write raises
    tell(clock, 9.0)
    monkeypatch.setattr(sys, "stderr", None)
    tell(clock, 9.0)
    if (child := os.fork()) == 0:  # a worker that is forked in the midst of a drawing
        os._exit(progress._drawing.locked())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_bar_of_rich_and_one_of_tqdm_find_their_places_again(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console
    from rich.progress import Progress
    from tqdm import tqdm  # type: ignore[import-untyped]

    def rich(between: Callable[[], None]) -> list[str]:
        console = Console(file=sys.stderr, force_terminal=True, width=60)
        with Progress("{task.completed} of rich", console=console, auto_refresh=False) as bar:
            tasks = [bar.add_task("", total=3), bar.add_task("", total=3)]
            for _ in range(3):
                for task in tasks:
                    bar.advance(task)
                bar.refresh()
                between()
        return stream.screen()

    def of_tqdm(between: Callable[[], None]) -> list[str]:
        for _ in tqdm(range(3), bar_format="{n} of tqdm", file=sys.stderr, mininterval=0):
            between()
        return stream.screen()

    for kind in (rich, of_tqdm):
        monkeypatch.setattr(sys, "stderr", stream := Terminal())
        alone = kind(lambda: None)
        monkeypatch.setattr(sys, "stderr", stream := Terminal())
        with monkeypatch.context() as patch:
            patch.setattr(progress._Told, "_write_line", lambda self, seconds: None)
            beside = kind(lambda: tell(clock, 3.0))
        assert "calibrating" in stream.getvalue()
        assert beside == alone


# --- Ctrl-C -------------------------------------------------------------------------------------------


class Lit(LightningModule):
    """Two repeated blocks that can be pruned, quantized, compiled and written."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)
        )
        self.example_input_array = torch.zeros(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


PLACES: dict[str, Callable[[Path], Callback]] = {
    "searching for faster settings": lambda _: AutoTune(techniques=["precision"], budget_s=0.2, budget_share=float("inf"), cache=False),
    "compiling": lambda _: BlockCompile(backend="eager"),
    "measuring ways to load": lambda _: FastLoading(budget_s=0.1),
    "planning a cut": lambda _: StructuredPruning(0.5, when=1),
    "reading what units give": lambda _: StructuredPruning(0.5, when=1, importance="reconstruction"),
    "making up for the cut": lambda _: StructuredPruning(0.5, when=1, importance="reconstruction"),
    "measuring latency": lambda _: StructuredPruning(target=Latency(0.9, batch_size=4, tolerance=0.5), when=1),
    "quantizing": lambda _: PostTrainingQuantization("int8"),
    "calibrating": lambda _: PostTrainingQuantization("int8"),
    "exporting": lambda folder: Deploy(str(folder / "bundle"), formats="export"),
    "measuring the network beside what it was": lambda folder: AccelReport(folder / "report.json", budget_s=0.05),
}  # fmt: skip


def hooks_of(module: nn.Module) -> dict[str, list[str]]:
    """Return what hangs on each module beside weights: hooks, and attributes of its own."""
    return {
        name: [*(f"{kind}: {len(held)}" for kind, held in vars(m).items() if "_hooks" in kind), type(m).__name__]
        for name, m in module.named_modules()
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", PLACES)
def test_ctrl_c_at_any_place_leaves_the_users_training_as_it_was(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, Any] = {}

    def interrupt(said: str) -> None:
        if said.startswith(place) and not found:
            optimizers = [copy.deepcopy(o.state_dict()) for o in trainer.optimizers]
            found.update(weights=copy.deepcopy(module.state_dict()), optimizers=optimizers)
            raise KeyboardInterrupt

    module = Lit()
    before, threads = hooks_of(module), torch.get_num_threads()
    trainer = Trainer(
        **{**tiny.silent(tmp_path), "max_epochs": 3, "limit_train_batches": 4},
        callbacks=[PLACES[place](tmp_path)],
    )
    monkeypatch.setattr(progress, "_on_step", interrupt)
    data = DataLoader(TensorDataset(torch.randn(32, 8)), 4, shuffle=True)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(module, data)
    assert found, "the place was never reached"
    assert progress._open == [] and torch.get_num_threads() == threads
    torch.testing.assert_close(module.state_dict(), found["weights"], rtol=0, atol=0)
    torch.testing.assert_close(
        [o.state_dict() for o in trainer.optimizers], found["optimizers"], rtol=0, atol=0
    )
    if place != "compiling":  # a module stays compiled, on purpose
        assert hooks_of(module) == before
    left = [p for p in tmp_path.rglob("*") if p.is_file()]
    if place.startswith("measuring the network"):  # which tells on the board that the fit was ended
        assert json.loads(left.pop().read_text())["state"] != "running"
    assert not left
