"""`lightning-accel bench`: differences and verdicts are right, whatever a way does is told, and the network stays as it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from lightning_accel.cli import bench, main, race_ways, ways
from lightning_accel.cli.race_ways import Raced
from lightning_accel.cli.ways import INFERENCE, TRAINING, WAYS, Made, Way
from lightning_accel.errors import NoEffect
from lightning_accel.measure.race import BenchmarkCase, Ratio, speedup
from lightning_accel.surgery.call import as_call

SECONDS = {"plain": 1.0, race_ways.AGAIN: 1.0, "half as long": 0.5, "twice as long": 2.0, "the same": 1.0}  # fmt: skip


class Pool:
    """In place of the real one: each lane takes what is planted."""

    def __init__(self, *_: Any) -> None:
        self.notes = ["planted"]

    def race(self, cases: dict[str, BenchmarkCase], *_: Any) -> dict[str, str]:
        for name, case in cases.items():
            case.wall_s = [SECONDS.get(name, 1.0)] * 5
        return {"breaks later": "RuntimeError: late"} if "breaks later" in cases else {}

    def speedup(self, one: BenchmarkCase, other: BenchmarkCase) -> Ratio:
        return speedup(one, other)

    def seconds(self, case: BenchmarkCase) -> float:
        return case.wall_s[0]

    def close(self) -> None:
        pass


def _scaled(made: Made, device: torch.device) -> None:
    with torch.no_grad():
        for parameter in made.network[-1].parameters():  # type: ignore[index]
            parameter.mul_(1.5)


def _nothing(made: Made, device: torch.device) -> None:
    pass


def _refused(made: Made, device: torch.device) -> None:
    raise NoEffect("there is nothing here", "no layer", "leave it out")


def _broken(made: Made, device: torch.device) -> None:
    raise RuntimeError("a crash\nwith a second line")


PLANTED = (
    Way("twice as long", _nothing),
    Way("half as long", _scaled),
    Way("the same", _nothing),
    Way("refused", _refused),
    Way("broken", _broken),
    Way("breaks later", _nothing),
    Way("compiles", _nothing, compiles=True),
    Way("of training", _nothing, (TRAINING,)),
)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Raced:
    monkeypatch.setattr(race_ways, "BenchmarkPool", Pool)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    before = {name: t.clone() for name, t in network.state_dict().items()}
    found = race_ways.race_ways(
        network, [as_call(torch.randn(4, 8))], budget_s=0.01, choices=PLANTED
    )
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    return found


def test_each_way_gets_the_verdict_that_its_times_ask_for(planted: Raced) -> None:
    rows = {row.way: row for row in planted.rows if row.mode == INFERENCE}
    assert rows["plain"].ms == 1000 and rows["plain"].gain is None
    assert rows["half as long"].gain == (2.0, 2.0, 2.0) and rows["half as long"].verdict == ""
    assert rows["twice as long"].verdict.startswith("slower: 0.50x")
    assert rows["the same"].verdict.startswith("no measurable difference")
    assert rows["refused"].verdict == "does not apply: there is nothing here. Found: no layer."
    assert rows["broken"].verdict == "failed: RuntimeError: a crash"
    assert rows["breaks later"].verdict == "failed: RuntimeError: late"
    assert rows["compiles"].verdict.startswith("not tried: 0 s of the budget were left")
    assert "of training" not in rows
    assert "of training" in {row.way for row in planted.rows if row.mode == TRAINING}


class Log(nn.Linear):
    """Of what is negative: outputs and loss are NaN, gradients are not."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).log()


def test_a_network_whose_outputs_are_nan_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race_ways, "BenchmarkPool", Pool)
    network = Log(4, 2)
    for parameter in network.parameters():
        nn.init.constant_(parameter, -1.0)
    calls = [as_call(torch.ones(3, 4))]
    found = race_ways.race_ways(network, calls, budget_s=0.01, choices=())
    inference, training = [note for note in found.notes if "NaN or infinite" in note]
    assert inference.startswith("inference: outputs") and training.startswith("training: loss")
    well = race_ways.race_ways(nn.Linear(4, 2), calls, budget_s=0.01, choices=())
    assert not [note for note in well.notes if "NaN" in note]


def test_the_difference_is_that_of_all_outputs_and_of_all_gradients(planted: Raced) -> None:
    found = {row.mode: row.difference for row in planted.rows if row.way == "half as long"}
    # Weights and bias of the last layer times 1.5: so are the outputs, and the gradients of the layer before.
    assert found[INFERENCE] == pytest.approx(0.5, abs=1e-6)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    network(torch.randn(4, 8)).mean().backward()
    squares = [[float(p.grad.square().sum()) for p in layer.parameters()] for layer in network]  # type: ignore[union-attr]
    share = sum(squares[0]) / sum(map(sum, squares))
    assert found[TRAINING] == pytest.approx(0.5 * share**0.5, rel=1e-5)


def test_tables_have_gains_first_and_tell_below_what_was_not_measured(planted: Raced) -> None:
    inference, training = bench.tables(planted)
    names = [row[0] for row in inference.rows]
    assert names[0] == "half as long" and names[-1] == "twice as long"
    assert any(note.startswith("refused: does not apply") for note in inference.notes)
    assert "gradients off by" in training.columns
    plain = json.loads(json.dumps(bench.to_dict(planted, torch.device("cpu"))))
    assert len(plain["rows"]) == len(planted.rows)


@pytest.mark.slow
def test_the_real_ways_act_on_a_convolutional_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race_ways, "BenchmarkPool", Pool)
    network, example = tiny.ConvNet(), torch.randn(4, 3, 8, 8)
    quick = [way for way in WAYS if not way.compiles]
    found = race_ways.race_ways(network, [as_call(example)], budget_s=1.0, choices=quick)
    rows = {(row.way, row.mode): row for row in found.rows}
    assert all(row.ms is not None for row in found.rows), [row.verdict for row in found.rows]
    with torch.no_grad():
        plain = network.eval()(example)
        with torch.autocast("cpu", torch.bfloat16):
            short = network(example)
    off = float((short.double() - plain.double()).norm() / plain.double().norm())
    assert rows["bf16 autocast", INFERENCE].difference == pytest.approx(off, rel=1e-6)
    assert rows["fused optimizer", TRAINING].difference == 0.0
    assert rows["channels last", INFERENCE].difference < 1e-5  # type: ignore[operator]
    assert rows["half of the channels pruned", INFERENCE].difference > 0.01  # type: ignore[operator]
    assert network.stem[0].out_channels == 8  # type: ignore[union-attr]


def test_a_step_that_is_measured_moves_no_weight_and_leaves_no_gradient() -> None:
    network = nn.Linear(8, 2)
    before = network.weight.clone()
    made = ways.plain(network, [as_call(torch.randn(4, 8))], TRAINING)
    for _ in range(3):
        made.train()
    assert torch.equal(network.weight, before) and network.weight.grad is None
    made.backward()
    assert network.weight.grad is not None


def test_a_short_product_is_set_around_the_clock_and_put_back() -> None:
    made = Made(nn.Linear(2, 2), [as_call(torch.ones(1, 2))])
    ways._matmul(made, torch.device("cpu"))
    before = torch.get_float32_matmul_precision()
    with made.around():
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before


CODE = """
import torch
from torch import nn

def net(): return nn.Linear(8, 2)
def fixed(): return nn.Linear(8, 2).requires_grad_(False), torch.ones(4, 8)
def words(): return nn.Linear(8, 2), {"input": torch.ones(4, 8)}
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "users_bench.py").write_text(CODE)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "users_bench", raising=False)
    monkeypatch.setattr(race_ways, "BenchmarkPool", Pool)
    return "users_bench"


def test_files_are_written_in_each_form(
    code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / f"bench{ending}" for ending in (".json", ".md", ".txt")]
    outputs = [word for file in files for word in ("--output", str(file))]
    words = ["bench", f"{code}:words", "--device", "cpu", "--budget-s", "0.1", "--json", *outputs]
    assert main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["rows"] == json.loads(files[0].read_text())["rows"]
    assert printed["device"]["kind"] == "cpu"
    assert "| plain |" in files[1].read_text() and "plain" in files[2].read_text()


def test_a_network_whose_weights_do_not_learn_is_measured_in_inference(
    code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", f"{code}:fixed", "--device", "cpu", "--budget-s", "0.1"]) == 0
    assert "training: left out: there is nothing to train" in capsys.readouterr().out
    words = ["bench", f"{code}:fixed", "--only", "training", "--device", "cpu"]
    assert main(words) == 2
    assert "nothing to train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "say which network"),
        (["users_bench:net"], "needs an example"),
        (["users_bench:net", "--example", "4,7"], "the network fails on the example"),
        (["users_bench:net", "--example", "4,8", "--device", "nonsense"], "no such device"),
        (["users_bench:net", "--example", "4,8", "--budget-s", "0"], "above 0"),
        (["users_bench:net", "--example", "4,8", "--output", "a.pdf"], "unknown form"),
    ],
)
def test_what_cannot_be_meant_is_said(
    words: list[str], said: str, code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *words]) == 2
    assert said in capsys.readouterr().err
