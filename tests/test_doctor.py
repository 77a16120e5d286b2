"""`lightning-accel doctor`: planted problems are found with their numbers, and a training without any is told to be fine."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_accel.cli import main
from lightning_accel.cli.doctor import command, lanes, looking, syncs
from lightning_accel.cli.doctor.facts import Captured, Facts, Lane, Loader, Memory, Sync, Times
from lightning_accel.cli.doctor.findings import findings
from lightning_accel.cli.doctor.looking import Look
from lightning_accel.cli.in_fit import in_fit
from lightning_accel.cli.subject import NamedModel
from lightning_accel.measure.race import Ratio

QUIET = Times(data=0.0, move=0.0, forward=0.03, backward=0.06, optimizer=0.01, rest=0.0, steps=50)
READY = Loader("DataLoader", num_workers=2, persistent=True, batches=100, dataset="Images")
FINE = Facts(QUIET, READY, cores=4, threads=2, batch_size=32)


def facts(**changed: Any) -> Facts:
    return FINE._replace(**changed)


def test_a_training_without_problems_is_told_to_be_fine() -> None:
    assert findings(FINE) == []
    assert "This training is fine" in command.to_text(FINE, [])


GAIN = Ratio(2.0, 1.9, 2.1)
SLOW = QUIET._replace(data=0.1)
PLANTED: list[tuple[Facts, str, float, str]] = [
    # What was seen; what is found; the share that it costs, by hand; what is said to do.
    (facts(times=SLOW), "waits for its data", 0.5, "num_workers=3"),
    (facts(times=SLOW, loader=READY._replace(num_workers=0, read_s=0.09, collate_s=0.01)), "waits for its data", 0.5, "num_workers=1"),
    (facts(times=SLOW, loader=READY._replace(num_workers=0, read_s=0.01, collate_s=0.6, collate="pad")), "waits for its data", 0.5, "make `pad` cheaper"),
    (facts(times=SLOW, loader=READY._replace(num_workers=3)), "waits for its data", 0.5, "make `Images` cheaper"),
    (facts(times=SLOW, loader=READY._replace(num_workers=1, read_s=0.001, collate_s=0.001)), "waits for its data", 0.5, "num_workers=0"),
    (facts(times=SLOW, loader=READY._replace(in_memory=True)), "waits for its data", 0.5, "FastLoading"),
    (facts(times=SLOW, loader=Loader("Stream")), "waits for its data", 0.5, "let Stream make"),
    (facts(times=SLOW, loader=READY._replace(is_stream=True, num_workers=0)), "waits for its data", 0.5, "get_worker_info"),
    (facts(times=QUIET._replace(move=0.1), device="cuda"), "bringing batches", 0.5, "pin_memory=True"),
    (facts(loader=READY._replace(persistent=False, first_s=10.0)), "workers start anew", 0.5, "persistent_workers=True"),
    (facts(lanes={lanes.BF16: Lane(GAIN)}), "shorter precision", 0.5, "bf16-mixed"),
    (facts(lanes={lanes.FLOAT32: Lane(GAIN)}, dtypes={"float64": 7}), "double precision", 0.5, "double()"),
    (facts(lanes={lanes.FUSED: Lane(GAIN)}), "the optimizer runs as a loop", 0.5, "FusedOptimizer"),
    (facts(lanes={lanes.ANOMALY: Lane(GAIN)}), "anomaly detection", 0.5, "detect_anomaly"),
    (facts(lanes={lanes.THREADS: Lane(GAIN)}), "more threads than", 0.5, "OMP_NUM_THREADS=4"),
    (facts(device="cuda", syncs=(Sync(".item()", "lit.py:7", 1.0, 0.08),)), "reads a tensor", 0.2, "detach"),
    (facts(captured=Captured(True, 4, {}, ("size changed",) * 3, 3.0, 30)), "compiled again", 0.5, "BlockCompile"),
]  # fmt: skip


@pytest.mark.parametrize(("seen", "what", "share", "do"), PLANTED)
def test_what_costs_time_is_found_with_its_share(
    seen: Facts, what: str, share: float, do: str
) -> None:
    (found,) = findings(seen)
    assert what in found.what and do in found.do
    assert found.saves == pytest.approx(share)
    assert found.costs and found.how and re.search(r"\d", found.found)


NOTED = [
    (facts(syncs=(Sync("if tensor", "lit.py:7", 1.0, 0.05),)), "lit.py:7", "torch.where"),
    (facts(prints=(Sync("print", "lit.py:9", 2.0, 0.0),)), "lit.py:9: 2 times", "self.log"),
    (facts(captured=Captured(False, 4, {}, ("size",) * 3, 3.0, 30)), "3 times in 30", "pad"),
    (facts(captured=Captured(True, 2, {"lit.py:8": "a print"})), "lit.py:8: a print", "select"),
    (facts(memory=Memory(900, 3.0, 1000, 32)), "at batch 32", "ActivationCheckpointing"),
    (facts(dtypes={"float64": 9}, lanes={lanes.FLOAT32: Lane(GAIN, "slower")}), "slower", "double"),
    (facts(times=QUIET._replace(host=0.1), device="cuda"), "idle device", "BlockCompile"),
    (facts(loader=READY._replace(num_workers=9)), "9 workers", "fewer workers"),
    (facts(others_cores=3.5), "3.5 of 4 cores", "look again"),
]


@pytest.mark.parametrize(("seen", "said", "do"), NOTED)
def test_what_costs_nothing_measurable_is_told_as_that(seen: Facts, said: str, do: str) -> None:
    (found,) = findings(seen)
    assert not found.costs and said in found.found and do in found.do
    text = command.to_text(seen, [found])
    assert "This training is fine" in text and "Also seen" in text


HARMLESS = [
    facts(lanes={lanes.BF16: Lane(Ratio(0.5, 0.4, 0.6), "slower"), lanes.AGAIN: Lane(GAIN)}),
    facts(lanes={lanes.DOUBLE: Lane(Ratio(1.08, 1.05, 1.1))}),
    facts(times=QUIET._replace(move=0.0009, forward=0.001, backward=0.0, optimizer=0.0)),
    facts(memory=Memory(100, 1.0, 10_000, 32)),
    facts(others_cores=2.1),
    facts(loader=READY._replace(persistent=False, first_s=0.1)),
]


@pytest.mark.parametrize("seen", HARMLESS)
def test_there_is_no_false_alarm(seen: Facts) -> None:
    assert findings(seen) == []


def test_a_larger_batch_is_a_choice_and_needs_room() -> None:
    seen = facts(lanes={lanes.DOUBLE: Lane(GAIN)}, memory=Memory(100, 10.0, 10_000, 32))
    (found,) = findings(seen)
    assert found.is_choice and not found.costs and "a batch of about 890" in found.found
    assert "yours to decide" in command.to_text(seen, [found])
    assert findings(seen._replace(memory=Memory(100, 10.0, 600, 32))) == []
    (found,) = findings(seen._replace(memory=Memory(100, 1e-6, 600, 32)))
    assert "more than 1,000 times as large" in found.found


def test_the_most_costly_comes_first_in_text_page_and_json() -> None:
    seen = facts(times=SLOW, lanes={lanes.BF16: Lane(Ratio(1.1, 1.08, 1.2))}, others_cores=9.0)
    found = findings(seen)
    assert [f.saves for f in found] == sorted((f.saves for f in found), reverse=True)
    text, page = command.to_text(seen, found), command.to_markdown(seen, found)
    for said in (text, page):
        assert said.index("waits for its data") < said.index("shorter precision")
    plain = json.loads(json.dumps(command.to_dict(seen, found)))
    assert len(plain["findings"]) == 2 and len(plain["also_seen"]) == 1
    assert plain["facts"]["times"]["data"] == 0.1


class Clock:
    """Stands still but for what is planted."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


class Numbers(Dataset[Any]):
    def __init__(self, seconds: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        self.seconds, self.dtype = seconds, dtype

    def __len__(self) -> int:
        return 4000

    def __getitem__(self, index: int) -> Tensor:
        CLOCK.now += self.seconds
        return torch.full((8,), float(index % 7), dtype=self.dtype)


class Adam(torch.optim.Adam):
    def step(self, closure: Any = None) -> Any:
        CLOCK.now += 0.005
        return super().step(closure)


class Lit(LightningModule):
    """Steps of 10 ms forward, 20 ms backward and 5 ms of the optimizer on the clock."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        CLOCK.now += 0.01
        loss = self.net(batch).square().mean()
        if loss.requires_grad:
            loss.register_hook(_backward)
        return loss

    def configure_optimizers(self) -> Any:
        return Adam(self.parameters())


def _backward(gradient: Tensor) -> None:
    CLOCK.now += 0.02


class Reads(Lit):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.last = loss.item()
        if batch_idx == 2:
            print("the third batch")
        return loss


class Recompiles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 2)
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.layer(x) * len(str(10**self.seen))


def collate(items: list[Tensor]) -> Tensor:
    CLOCK.now += 0.12
    return torch.stack(items)


def look(
    monkeypatch: pytest.MonkeyPatch,
    module: LightningModule,
    data: Any,
    *,
    graphs: bool = False,
    budget_s: float = 1.0,
) -> Facts:
    """Look for a moment, on the clock of this file; beside it nothing is tried, and nothing captured but where asked."""
    monkeypatch.setattr(CLOCK, "now", 0.0)
    monkeypatch.setattr(looking, "measured_lanes", lambda *_: ({}, ()))
    if not graphs:
        monkeypatch.setattr(looking, "_captured", lambda *_: Captured())
    seen = Look(budget_s, clock=CLOCK)
    in_fit(NamedModel(module, data=data), seen, accelerator="cpu")
    assert seen.facts is not None
    return seen.facts._replace(others_cores=0.0, cores=4)


def test_nothing_is_found_where_nothing_is_planted(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Lit()
    before = {name: p.clone() for name, p in module.named_parameters()}
    seen = look(monkeypatch, module, DataLoader(Numbers(), batch_size=16))
    assert findings(seen) == []
    assert seen.times.forward == pytest.approx(0.01) and seen.times.backward == pytest.approx(0.02)
    assert seen.times.optimizer == pytest.approx(0.005)
    assert seen.times.data == seen.times.move == seen.times.rest == 0.0
    assert all(torch.equal(before[name], p) for name, p in module.named_parameters())
    assert "training_step" not in vars(module) and torch.Tensor.backward.__module__ == "torch._tensor"  # fmt: skip


class Loses(Lit):
    """Its losses are NaN after some steps."""

    after = 2

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps = getattr(self, "steps", 0) + 1
        lost = self.steps > self.after
        return super().training_step(batch, batch_idx) * (float("nan") if lost else 1.0)


def test_losses_that_are_no_numbers_late_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Loses()
    module.after = 23
    seen = look(monkeypatch, module, DataLoader(Numbers(0.0), batch_size=16), budget_s=6.0)
    assert seen.lost == seen.losses - 22 > 0  # the first step is none of those followed


def test_losses_that_are_no_numbers_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Loses()
    seen = look(monkeypatch, module, DataLoader(Numbers(0.0075), batch_size=16))
    assert seen.lost == seen.losses - 1 > 0
    first, *others = findings(seen)
    assert first.costs and f"{seen.lost} of {seen.losses} losses are NaN" in first.found
    assert [f.saves > 0.5 for f in others] == [True]  # of the data
    assert command.to_dict(seen, [first])["findings"]


def test_a_slow_dataset_is_found_with_its_exact_share(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = look(monkeypatch, Lit(), DataLoader(Numbers(0.0075), batch_size=16))
    (found,) = findings(seen)
    assert seen.times.data == pytest.approx(0.12) and seen.loader.read_s == pytest.approx(0.12)
    assert found.saves == pytest.approx(0.12 / 0.155)
    assert "items of Numbers" in found.found and "num_workers=3" in found.do


def test_a_heavy_collate_without_workers_is_told_from_a_slow_dataset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = look(monkeypatch, Lit(), DataLoader(Numbers(), batch_size=16, collate_fn=collate))
    (found,) = findings(seen)
    assert seen.loader.collate_s == pytest.approx(0.12) and seen.loader.read_s == 0.0
    assert found.saves == pytest.approx(0.12 / 0.155) and "`collate`" in found.do


class Begins:
    """One batch, which is there at once when a second of preparation is over."""

    def __iter__(self) -> Any:
        CLOCK.now += 1.0
        return iter([torch.ones(16, 8)])


def test_the_beginning_of_an_epoch_is_no_waiting_in_its_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = look(monkeypatch, Lit(), Begins())
    assert seen.times.data == 0.0 and seen.loader.first_s == pytest.approx(1.0)


def test_lines_that_read_and_print_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = look(monkeypatch, Reads(), DataLoader(Numbers(), batch_size=16))
    (sync,), (line,) = seen.syncs, seen.prints
    lines = Path(__file__).read_text().splitlines()
    for found, said in ((sync, "loss.item()"), (line, 'print("the third batch")')):
        number = int(found.where.partition(".py:")[2].split()[0])
        assert said in lines[number - 1] and "test_doctor.py" in found.where
    assert sync.call == ".item()" and sync.per_step == 1.0 and line.per_step < 1.0
    assert [f.costs for f in findings(seen)] == [False, False]


def test_what_stands_outside_of_a_step_is_nobodys_line() -> None:
    def called() -> str:
        return syncs.users_line()

    assert "test_doctor.py" in called()
    called.__code__ = called.__code__.replace(co_filename=syncs._STEP)
    assert called() == ""


def test_seconds_of_compilation_grow_however_much_was_compiled_before() -> None:
    def one_more(x: Tensor) -> Tensor:
        return x + 1

    seconds = [looking._compile_seconds()]
    for index in range(66):  # dynamo keeps records of the last 64
        another = FunctionType(one_more.__code__.replace(co_name=f"another_{index}"), globals())
        torch.compile(another, backend="eager")(torch.ones(1))
        seconds.append(looking._compile_seconds())
    assert all(before < after for before, after in pairwise(seconds))


@pytest.mark.slow
def test_a_network_that_recompiles_is_found_and_is_a_cost_only_where_it_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch._dynamo.reset()  # tests before may have used up what may be compiled of one function
    data = DataLoader(Numbers(), batch_size=16)
    seen = look(monkeypatch, Lit(Recompiles()), data, graphs=True)
    assert len(seen.captured.recompilations) >= 2 and not seen.captured.is_compiled
    assert not any(f.costs for f in findings(seen))
    module = Lit(Recompiles())
    module.net.compile(backend="eager")
    seen = look(monkeypatch, module, data, graphs=True)
    assert seen.captured.is_compiled
    assert [f.what for f in findings(seen) if f.costs] == [
        "compiled code is compiled again in mid-training"
    ]
    assert look(monkeypatch, Lit(), data, graphs=True).captured.recompilations == ()


@pytest.mark.slow
def test_float64_weights_are_tried_in_float32_on_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Lit().double()
    seen: list[Any] = []
    plain = lanes.BenchmarkCase

    def case(function: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(function.__self__)
        return plain(function, *args, **kwargs)

    monkeypatch.setattr(lanes, "BenchmarkCase", case)
    monkeypatch.setattr(looking, "_captured", lambda *_: Captured())
    found = Look(0.2)
    data = DataLoader(Numbers(dtype=torch.float64), batch_size=16)
    in_fit(NamedModel(module, data=data), found, accelerator="cpu")
    assert found.facts is not None and {lanes.FLOAT32, lanes.DOUBLE} <= found.facts.lanes.keys()
    assert found.facts.dtypes == {"float64": sum(p.numel() for p in module.parameters())}
    kinds = [{p.dtype for p in replica.module.parameters()} for replica in seen]
    assert kinds.count({torch.float32}) == 1 and kinds.count({torch.float64}) >= 3
    assert all(p.dtype == torch.float64 for p in module.parameters())
    assert any("double precision" in f.what for f in findings(found.facts))


def test_memory_grows_with_the_batch_as_counted_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wide(Lit):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net(batch).exp().sum()

    net = nn.Linear(8, 1000, bias=False)
    seen = look(monkeypatch, Wide(net), DataLoader(Numbers(), batch_size=64)).memory
    assert seen is not None and seen.batch == 64
    # Of a sample: the layer's output, its exponential, and their gradients, 1000 numbers each, are what is held; not all at once.
    assert 2 * 4000 <= seen.per_sample <= 4 * 4000
    assert seen.fixed >= 3 * 4 * 8000  # the weight and two moments of Adam


def manual() -> tuple[LightningModule, Any]:
    class Manual(Lit):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                loss = Lit.training_step(self, batch, batch_idx)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [Adam(self.parameters()), torch.optim.SGD(self.parameters(), lr=0.1)]

    return Manual(), DataLoader(Numbers(), batch_size=16)


def stream() -> tuple[LightningModule, Any]:
    return Lit(), (torch.ones(4, 8) for _ in range(40))


def late() -> tuple[LightningModule, Any]:
    class Late(Lit):
        def __init__(self) -> None:
            LightningModule.__init__(self)

        def setup(self, stage: str) -> None:
            self.net = nn.Linear(8, 2)

    return Late(), DataLoader(TensorDataset(torch.ones(64, 8)), 16, collate_fn=_first)


def _first(items: list[Any]) -> Tensor:
    return torch.stack([item[0] for item in items])


@pytest.mark.parametrize("make", [manual, stream, late], ids=lambda make: make.__name__)
def test_odd_trainings_are_followed_as_well(
    make: Callable[[], tuple[LightningModule, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, data = make()
    seen = look(monkeypatch, module, data)
    times = 2 if make is manual else 1
    assert seen.times.forward == pytest.approx(times * 0.01)
    assert seen.times.backward == pytest.approx(times * 0.02)
    assert seen.times.data == 0.0


CODE = """
from test_doctor import Lit, Numbers, DataLoader, torch

class Raises(Lit):
    def training_step(self, batch, batch_idx):
        return batch @ torch.ones(3, 3)

class NoLoss(Lit):
    def training_step(self, batch, batch_idx):
        return None

def build(): return Lit(), DataLoader(Numbers(), batch_size=16)
def raises(): return Raises(), DataLoader(Numbers(), batch_size=16)
def no_loss(): return NoLoss(), DataLoader(Numbers(), batch_size=16)
def no_data(): return Lit()
def empty(): return Lit(), DataLoader([], batch_size=16)
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "users_doctor.py").write_text(CODE)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "users_doctor", raising=False)
    return "users_doctor"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "say which network"),
        (["users_doctor:no_data"], "only a training can be looked at"),
        (["users_doctor:empty"], "there is no training batch"),
        (["users_doctor:raises"], "users_doctor.py, line 6"),
        (["users_doctor:no_loss"], "gives no loss"),
        (["users_doctor:build", "--budget-s", "nan"], "--budget-s"),
        (["users_doctor:build", "--output", "found.pdf"], "unknown form"),
        (["users_doctor:build", "--accelerator", "nonsense"], "no such accelerator"),
    ],
)
def test_what_cannot_be_looked_at_is_said_in_words(
    words: list[str], said: str, code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("seen", "code"), [(FINE, 0), (facts(times=SLOW), 1)])
def test_the_exit_code_tells_whether_something_costs_time(
    seen: Facts,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "_facts", lambda _: seen)
    files = [tmp_path / f"found{ending}" for ending in (".json", ".md", ".txt")]
    outputs = [word for file in files for word in ("--output", str(file))]
    assert main(["doctor", "a:b", "--json", *outputs]) == code
    assert json.loads(capsys.readouterr().out) == json.loads(files[0].read_text())
    assert all(file.stat().st_size for file in files)


def test_a_context_around_a_lane_is_held_with_that_of_its_copy() -> None:
    held: list[str] = []

    class Copy:
        def around(self) -> Any:
            held.append("copy")
            return nullcontext()

    def own() -> Any:
        held.append("own")
        return nullcontext()

    with lanes._both(Copy(), own)():  # type: ignore[arg-type]
        assert held == ["copy", "own"]
