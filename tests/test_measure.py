"""Numbers with units, compared with closed forms; the report, compared with the untouched model."""

from __future__ import annotations

import copy
import csv
import io
import itertools
import json
import math
import random
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forks
import pytest
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import AccelReport, StepMeter, StructuredPruning
from lightning_accel.bridge import paced
from lightning_accel.measure import (
    Comparison,
    LatencyStats,
    MeasuredModel,
    Pace,
    Report,
    Table,
    compare,
    contention,
    count_macs,
    measure_pair,
    model_size,
    peak_memory,
    race,
    time_call,
)
from lightning_accel.measure.callbacks import accel_report as callback_file
from lightning_accel.measure.report import Ratios, Side
from lightning_accel.measure.subject import (
    Runnable,
    localise_norms,
    measure_subjects,
    num_samples,
    restore,
    training_step,
)
from lightning_accel.surgery import Structure
from lightning_accel.surgery.call import Call
from lightning_accel.surgery.compiled import is_compiled

quiet = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"
)


class Ticks:
    """Time that passes only by being read, a microsecond each, and in sleep: no other work is on it."""

    def __init__(self) -> None:
        self.now = self.slept = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now

    def process_time(self) -> float:
        return self.perf_counter() - self.slept

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Ticks:
    made = Ticks()
    for module in (race, contention, paced, sys.modules[__name__]):
        if hasattr(module, "time"):
            monkeypatch.setattr(module, "time", made)
    monkeypatch.setattr(contention, "_busy_seconds", lambda: 0.0)
    return made


timed = pytest.mark.usefixtures("ticks")


def spin(seconds: float) -> Callable[[], None]:
    def call() -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    return call


# --- timing -----------------------------------------------------------------------------------


@timed
def test_a_call_of_known_length_is_measured() -> None:
    found = time_call(spin(0.002), budget_s=0.2)
    assert 2.0 <= found.p10_ms <= 3.0
    assert found.median_ms >= found.p10_ms
    assert found.spread_ms >= 0


@timed
def test_a_fast_call_is_repeated_within_a_block() -> None:
    counter = itertools.count()
    found = time_call(lambda: (time.perf_counter(), next(counter)), budget_s=0.05)
    assert found.num_calls > 5000
    assert found.num_calls <= next(counter)


@timed
def test_the_ratio_of_two_calls_of_known_length_is_found() -> None:
    found = compare(spin(0.003), spin(0.001), budget_s=0.3)
    assert found.ratio == pytest.approx(3, rel=0.15)
    assert found.low <= found.ratio <= found.high * 1.001
    assert compare(spin(0.001), spin(0.002), budget_s=0.2).ratio == pytest.approx(0.5, rel=0.15)


@timed
def test_two_equal_calls_have_a_ratio_of_one() -> None:
    found = compare(spin(0.001), spin(0.001), budget_s=0.4)
    assert found.ratio == pytest.approx(1, abs=0.01)


@timed
def test_a_drift_of_the_machine_hits_both_sides_alike() -> None:
    """Both calls become slower in the course of the measurement; one after another would say 3x."""
    start = time.perf_counter()

    def drifting() -> None:
        spin(0.001 * (1 + 10 * (time.perf_counter() - start)))()

    assert compare(drifting, drifting, budget_s=0.4).ratio == pytest.approx(1, abs=0.25)


@timed
def test_the_calls_take_turns_in_changing_order() -> None:
    order: list[str] = []
    compare(
        lambda: (order.append("a"), spin(0.005)())[1],  # type: ignore[func-returns-value]
        lambda: (order.append("b"), spin(0.005)())[1],  # type: ignore[func-returns-value]
        budget_s=0.25,
        warmup=1,
    )
    rounds = ["".join(order[i : i + 2]) for i in range(6, len(order), 2)]  # after the warm-up
    assert set(rounds) == {"ab", "ba"}


@timed
def test_the_budget_is_kept() -> None:
    start = time.perf_counter()
    compare(spin(0.001), spin(0.001), budget_s=0.2)
    assert 0.2 <= time.perf_counter() - start < 0.6


@timed
def test_a_sleeping_process_is_called_disturbed() -> None:
    calm = compare(spin(0.004), spin(0.004), budget_s=0.1)
    idle = compare(lambda: time.sleep(0.004), lambda: time.sleep(0.004), budget_s=0.1)
    assert idle.busy < 0.5 < calm.busy
    assert idle.contended


def test_measuring_uses_nobodys_random_numbers() -> None:
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    compare(spin(0.001), spin(0.001), budget_s=0.02)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert python_state == random.getstate()


def test_pace_leaves_out_warm_up_and_what_lies_around_a_pause() -> None:
    pace = Pace(skip=2)
    for now in (0.0, 5.0, 9.0, 10.0, 11.0):  # two slow intervals, then one step a second
        pace.tick(steps=1, samples=4, now=now)
    assert (pace.steps_per_s, pace.samples_per_s) == (1.0, 4.0)
    pace.pause()
    for now in (100.0, 100.5):
        pace.tick(steps=1, samples=4, now=now)
    assert pace.steps_per_s == pytest.approx(3 / 2.5)
    pace.restart()
    assert pace.steps_per_s is None


# --- memory -----------------------------------------------------------------------------------


def test_tied_parameters_are_counted_once() -> None:
    net = tiny.TiedLM(dim=8)
    expected = 12 * 8 + (8 * 16 + 16) + (16 * 8 + 8)
    assert model_size(net).params == expected
    assert model_size(net).param_bytes == 4 * expected
    assert model_size(net.half()).param_bytes == 2 * expected
    assert model_size(nn.BatchNorm1d(3)).buffer_bytes == 2 * 3 * 4 + 8


def test_the_peak_of_a_chain_is_two_of_its_tensors() -> None:
    x = torch.ones(1000)

    def chain() -> None:
        y = x
        for _ in range(10):
            y = y + 1

    assert peak_memory(chain).peak_bytes == 2 * 4000


def test_what_autograd_keeps_for_the_backward_counts() -> None:
    x = torch.ones(1000, requires_grad=True)

    def depth(layers: int) -> int:
        def call() -> None:
            y = x
            for _ in range(layers):
                y = torch.tanh(y)

        return peak_memory(call).peak_bytes

    assert depth(10) - depth(5) == 5 * 4000


def test_views_inputs_and_parameters_are_not_counted() -> None:
    net, x = nn.Linear(100, 50, bias=False), torch.ones(20, 100)
    with torch.no_grad():
        assert peak_memory(lambda: net(x.view(20, 100))).peak_bytes == 20 * 50 * 4


def test_the_bytes_of_a_training_step_are_the_same_every_time() -> None:
    net, x = tiny.ConvNet(), tiny.INPUTS[tiny.ConvNet]()

    def step() -> None:
        net.zero_grad()
        net(x).sum().backward()

    step()
    assert peak_memory(step) == peak_memory(step)


# --- arithmetic -------------------------------------------------------------------------------

D, H, T, B, FF = 8, 2, 5, 3, 16
MHA = B * (4 * T * D * D + 2 * T * T * D)


class Attention(nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q)


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight @ x


CLOSED_FORMS = [
    (nn.Linear(8, 4), torch.ones(5, 8), 5 * 8 * 4),
    (nn.Linear(8, 4), torch.ones(8), 8 * 4),
    (Product(), torch.ones(4), 6 * 4),
    (nn.Conv2d(6, 8, 3, padding=1, groups=2), torch.ones(2, 6, 7, 7), 2 * 49 * 8 * 3 * 9),
    (nn.Conv1d(4, 8, 3), torch.ones(2, 4, 9), 2 * 7 * 8 * 4 * 3),
    (nn.ConvTranspose2d(4, 8, 3), torch.ones(2, 4, 9, 9), 2 * 81 * 8 * 4 * 9),
    (nn.Bilinear(4, 5, 3), (torch.ones(2, 4), torch.ones(2, 5)), 2 * 3 * 4 * 5),
    (Attention(), torch.ones(B, H, T, D // H), 2 * B * H * T * T * (D // H)),
    (nn.MultiheadAttention(D, H, batch_first=True), (torch.ones(B, T, D),) * 3, MHA),
    (
        nn.TransformerEncoderLayer(D, H, FF, batch_first=True),
        torch.ones(B, T, D),
        MHA + 2 * B * T * D * FF,
    ),
    (
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(D, H, FF, batch_first=True), 3, enable_nested_tensor=False
        ),
        torch.ones(B, T, D),
        3 * (MHA + 2 * B * T * D * FF),
    ),
    (nn.LSTM(D, 6), torch.ones(T, B, D), T * B * 4 * 6 * (D + 6)),
    (nn.GRU(D, 6, bidirectional=True), torch.ones(T, B, D), 2 * T * B * 3 * 6 * (D + 6)),
    (nn.RNN(D, 6), torch.ones(T, B, D), T * B * 6 * (D + 6)),
    (nn.LSTMCell(D, 6), torch.ones(B, D), B * 4 * 6 * (D + 6)),
    (nn.Embedding(10, 4), torch.ones(3, dtype=torch.long), 0),
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("model", "inputs", "macs"), CLOSED_FORMS, ids=[type(row[0]).__name__ for row in CLOSED_FORMS]
)
def test_macs_equal_the_closed_form(
    model: nn.Module, inputs: Any, macs: int, training: bool
) -> None:
    model.train(training)
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    found = count_macs(model, args)
    assert found.macs == macs
    assert not found.partial
    assert model.training == training


def test_what_no_formula_counts_is_named_as_partial() -> None:
    class Spectrum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(x).abs()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spectrum, self.head = Spectrum(), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.spectrum(x))

    found = count_macs(Net(), (torch.ones(3, 8),))
    assert found.partial
    assert found.macs == 3 * 5 * 2
    assert found.missed == ("spectrum (Spectrum): aten._fft_r2c",)


def test_a_custom_operation_is_partial() -> None:
    @torch.library.custom_op("accel_test::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return x * 2

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return twice(x)

    found = count_macs(Net(), (torch.ones(3),))
    assert found.missed == ("Net: accel_test.twice",)


def state(model: nn.Module) -> dict[str, Any]:
    return {
        **{name: t.detach().clone() for name, t in model.state_dict(keep_vars=True).items()},
        **{
            f"grad {n}": None if p.grad is None else p.grad.clone()
            for n, p in model.named_parameters()
        },
        **{f"needs {n}": p.requires_grad for n, p in model.named_parameters()},
        **{f"train {n}": m.training for n, m in model.named_modules()},
        **{
            f"hooks {n}": len(m._forward_hooks) + len(m._forward_pre_hooks)
            for n, m in model.named_modules()
        },
        "random": torch.get_rng_state(),
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = (
            torch.equal(found[name], value) if isinstance(value, Tensor) else found[name] == value
        )
        assert same, name


class Restless(nn.Module):
    """Changes all it can in its forward: statistics, a counter, random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.norm.eval()
        self.linear.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.dropout(self.linear(self.norm(self.drop(x))), 0.5, training=True)


def test_counting_leaves_no_trace() -> None:
    model = Restless()
    model(torch.randn(3, 4)).sum().backward()
    lstm, x = nn.LSTM(4, 4), torch.randn(3, 4)
    before = state(model)
    fast, onednn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    count_macs(model, (x,))
    count_macs(lstm, (torch.ones(2, 3, 4),))
    assert_same(state(model), before)
    assert fast == torch.backends.mha.get_fastpath_enabled()
    assert onednn == torch._C._get_mkldnn_enabled()
    assert torch.backends.cudnn.enabled


def test_a_failing_count_leaves_no_trace() -> None:
    model = Restless()
    before = state(model)
    with pytest.raises(RuntimeError):
        count_macs(model, (torch.ones(3, 5),))
    assert_same(state(model), before)
    assert torch.backends.mha.get_fastpath_enabled()


def compiled_in_place(model: nn.Module, backend: Any = "eager") -> nn.Module:
    from torch._dynamo.external_utils import wrap_inline

    model._compiled_call_impl = torch.compile(wrap_inline(model._call_impl), backend=backend)
    return model


@pytest.mark.usefixtures("clean_dynamo")
def test_a_compiled_model_is_counted_uncompiled() -> None:
    runs = itertools.count()

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        return lambda *args: (next(runs), graph(*args))[1]

    model, x = compiled_in_place(tiny.MLP().eval(), backend), tiny.INPUTS[tiny.MLP]()
    with torch.no_grad():
        model(x)
        model(x)
    assert count_macs(model, (x,)) == count_macs(tiny.MLP(), (x,))
    assert next(runs) == 2
    assert is_compiled(model)
    assert not is_compiled(copy.deepcopy(model))


# --- table and report -------------------------------------------------------------------------

TABLE = Table(
    ["what", "dense [x]", "gain"],
    [["a|b", 12345, "2.00x"], ["nothing", None, None], ["nan", math.nan, "1.5x"]],
    title="Title",
    notes=["a note"],
)


@pytest.mark.parametrize("width", [80, 120])
def test_text_fits_the_width_and_holds_no_escape_codes(width: int) -> None:
    rows: list[list[Any]] = [["a long name " * 12, 1.5], ["short", 2.5]]
    for table in (TABLE, Table(["name", "value"], rows)):
        text = table.to_text(width)
        assert max(map(len, text.splitlines())) <= width
        assert text.isascii()
        assert "\x1b" not in text
    assert all(
        part in TABLE.to_text(width) for part in ("Title", "dense [x]", "12,345", "- a note")
    )


def test_markdown_has_one_line_per_row_and_escapes_pipes() -> None:
    lines = TABLE.to_markdown().splitlines()
    assert lines[2:7] == [
        "| what | dense [x] | gain |",
        "| --- | ---: | ---: |",
        "| a\\|b | 12,345 | 2.00x |",
        "| nothing | - | - |",
        "| nan | nan | 1.5x |",
    ]


def test_json_keeps_unrounded_numbers_and_writes_null_for_nan() -> None:
    plain = json.loads(Table(["x"], [[1 / 3], [math.nan], [math.inf]]).to_json())
    assert plain["rows"] == [[1 / 3], [None], [None]]


@timed
def test_a_table_is_text_in_a_notebook_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich draws into the cell there, whatever file it is given, and writes nothing."""
    plain = TABLE.to_text()
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert TABLE.to_text() == plain != ""


def test_a_pair_of_known_speeds_gives_known_ratios() -> None:
    wide, narrow = nn.Linear(64, 8, bias=False), nn.Linear(64, 2, bias=False)
    x = torch.ones(1, 64)
    dense = MeasuredModel(
        wide, {1: spin(0.002), 7: spin(0.002)}, spin(0.003), count_macs(wide, (x,))
    )
    final = MeasuredModel(
        narrow, {1: spin(0.001), 7: spin(0.002)}, spin(0.001), count_macs(narrow, (x,))
    )
    report = measure_pair(dense, final, budget_s=0.6)
    ratios = report.ratios
    assert (ratios.params, ratios.macs) == (4.0, 4.0)
    assert ratios.latency == pytest.approx({"1": 2.0, "7": 1.0}, rel=0.2)
    assert ratios.steps_per_s == pytest.approx(3.0, rel=0.2)
    assert report.final.steps_per_s == pytest.approx(1000, rel=0.2)
    for batch, gain in ratios.latency.items():
        by_hand = report.dense.latency_ms[batch] / report.final.latency_ms[batch]
        assert gain == pytest.approx(by_hand)


def test_the_file_has_exactly_the_promised_keys(tmp_path: Path) -> None:
    side = MeasuredModel(
        nn.Linear(4, 2),
        {1: lambda: None},
        lambda: None,
        count_macs(nn.Linear(4, 2), (torch.ones(1, 4),)),
    )
    report = measure_pair(side, side, budget_s=0.02)
    report.extra["loss"] = math.inf
    path, beside = report.save(tmp_path / "deep" / "report.json")
    plain = json.loads(path.read_text())
    assert set(plain["dense"]) == {"params", "macs", "latency_ms", "steps_per_s", "metrics"}
    assert set(plain["final"]) == set(plain["dense"])
    assert set(plain["ratios"]) == {"macs", "params", "latency", "steps_per_s"}
    assert plain["loss"] is None
    assert "| parameters | 10 | 10 | 1.00x |" in beside.read_text()
    assert sorted(p.name for p in path.parent.iterdir()) == ["report.json", "report.md"]


def test_a_failed_write_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = Report(Side(params=1)).save(tmp_path / "report.json")
    old = path.read_text()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("lightning_accel.places.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        Report(Side(params=2)).save(path)
    assert path.read_text() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_flat_numbers_have_one_key_each() -> None:
    report = Report(
        Side(params=4, latency_ms={"1": 2.0}), Side(metrics={"acc": 0.5}), Ratios(macs=2.0)
    )
    assert report.flat() == {
        "report/dense_params": 4.0,
        "report/dense_latency_ms_1": 2.0,
        "report/final_metrics_acc": 0.5,
        "report/ratio_macs": 2.0,
    }


# --- subjects ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.INPUTS)
def test_a_restored_twin_is_the_dense_model_with_finite_values(kind: type[nn.Module]) -> None:
    dense, final = kind(), kind(8)  # type: ignore[call-arg]
    x = tiny.INPUTS[kind]()
    restore(final, Structure.of(dense))
    assert Structure.of(final) == Structure.of(dense)
    assert all(torch.isfinite(t).all() for t in final.state_dict().values())
    output = final.eval()(x)
    assert torch.isfinite(output).all()
    assert output.shape == dense(x).shape


def test_a_restored_batch_norm_keeps_activations_at_their_size() -> None:
    final = tiny.ConvNet(4)
    restore(final, Structure.of(tiny.ConvNet(8)))
    assert all((m.running_var > 0).all() for m in final.modules() if isinstance(m, nn.BatchNorm2d))
    found = final.eval()(torch.randn(16, 3, 8, 8)).std()
    assert 1e-3 < found < 1e3


def test_a_training_step_computes_gradients_and_writes_none() -> None:
    net, x = tiny.MLP(), tiny.INPUTS[tiny.MLP]()
    backward: list[Any] = []
    net.head.weight.register_hook(backward.append)
    training_step(Runnable(net, net, [Call("", (x,), {})]))()
    assert len(backward) == 1
    assert all(p.grad is None for p in net.parameters())


def test_a_model_that_refuses_a_batch_of_one_is_measured_without() -> None:
    def odd(x: Tensor) -> Tensor:
        if x.shape[0] == 1:
            raise ValueError("pairs only")
        return x

    net = nn.Linear(4, 2)
    net.register_forward_pre_hook(lambda module, args: (odd(args[0]),))
    report = Report()
    side = Runnable(net, net, [Call("", (torch.ones(6, 4),), {})])
    measure_subjects(side, side, budget_s=0.1, report=report)
    assert set(report.final.latency_ms) == {"6"}
    assert report.final.steps_per_s is not None
    assert "latency at batch 1 is left out: ValueError: pairs only" in report.extra["notes"]


def test_a_model_without_a_backward_is_measured_without_training() -> None:
    net = nn.Linear(4, 2).requires_grad_(False)
    report = Report()
    side = Runnable(net, net, [Call("", (torch.ones(6, 4),), {})])
    measure_subjects(side, side, budget_s=0.05, report=report)
    assert report.final.steps_per_s is None
    assert set(report.final.latency_ms) == {"1", "6"}
    assert any("training steps/s is left out" in note for note in report.extra["notes"])


@pytest.mark.parametrize("name", ["net", ""])
def test_parameters_that_no_call_runs_are_said(name: str) -> None:
    """A teacher inside the module is in its parameters, and in no other row."""
    whole = nn.ModuleDict({"net": nn.Linear(4, 2), "teacher": nn.Linear(4, 20)})
    whole.forward = whole["net"].forward  # type: ignore[method-assign]
    report = Report()
    side = Runnable(whole, whole, [Call(name, (torch.ones(6, 4),), {})])
    measure_subjects(side, side, budget_s=0.01, report=report)
    said = [note for note in report.extra.get("notes", []) if "do not run" in note]
    assert (f"{4 * 20 + 20:,} of them" in "".join(said)) == bool(name)
    assert report.final.params == 110


def test_synchronised_norms_become_local_and_compute_the_same() -> None:
    net = nn.Sequential(nn.Conv1d(2, 3, 1), nn.SyncBatchNorm(3))
    plain = nn.Sequential(copy.deepcopy(net[0]), nn.BatchNorm1d(3))
    assert localise_norms(net)
    x = torch.randn(4, 2, 5)
    torch.testing.assert_close(net(x), plain(x))


BATCHES = [
    (torch.ones(3, 2), 3),
    ((torch.ones(4, 2), torch.ones(4)), 4),
    ({"meta": torch.tensor(1.0), "x": [torch.ones(5)]}, 5),
    (["one", "two"], 2),
    ({"text": ["a", "b", "c"]}, 3),
    ([], None),
    (torch.tensor(1.0), None),
    (object(), None),
    (7, None),
]


@pytest.mark.parametrize(("batch", "expected"), BATCHES)
def test_samples_are_counted_in_any_structure(batch: Any, expected: int | None) -> None:
    assert num_samples(batch) == expected


# --- callbacks in a fit -----------------------------------------------------------------------


class Net(nn.Module):
    """A tiny classifier with statistics, dropout and a note of what ran it."""

    seen: list[tuple[int, bool, bool]] = []
    """Per forward: parameters, training, autocast."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU())
        self.mid = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU())
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        params = sum(p.numel() for p in self.parameters())
        if not torch.compiler.is_compiling():
            Net.seen.append((params, self.training, torch.is_autocast_enabled("cpu")))
        return self.head(self.drop(self.mid(self.body(x))))


class Module(LightningModule):
    """The user's; its own forward is not what trains and must never be called."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net if net is not None else Net()

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("nobody asked for this")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


class Recording(Logger):
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "recording"

    version = "0"

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def of(self, prefix: str) -> list[tuple[int | None, dict[str, float]]]:
        return [(step, row) for step, row in self.rows if any(k.startswith(prefix) for k in row)]


def data(count: int = 32, batch: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 8, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(count) % 4), batch)


Fit = Callable[..., Trainer]


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Fit:
    Net.seen.clear()

    def run(
        model: LightningModule, *callbacks: Callback, ckpt: Any = None, **kwargs: Any
    ) -> Trainer:
        loader = kwargs.pop("data", None) or data()
        saves = any(isinstance(c, ModelCheckpoint) for c in callbacks)
        given = {"enable_checkpointing": saves, "callbacks": list(callbacks), **kwargs}
        trainer = Trainer(**{**trainer_kwargs, **given})
        trainer.fit(model, loader, data(), ckpt_path=ckpt)
        return trainer

    return run


def saved(folder: Path) -> dict[str, Any]:
    (path,) = folder.rglob("report.json")
    plain: dict[str, Any] = json.loads(path.read_text())
    return plain


def num_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


class Slow(Module):
    """Steps of five milliseconds, a validation of fifty."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        spin(0.005)()
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_start(self) -> None:
        spin(0.05)()


class Watch(Callback):
    """An independent clock: the median time between the ends of neighbouring batches."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.times.append(time.perf_counter())

    def batches_per_s(self) -> float:
        gaps = sorted(b - a for a, b in itertools.pairwise(self.times))
        return 1 / gaps[len(gaps) // 2]


@timed
@quiet
@pytest.mark.parametrize("accumulate", [1, 4])
def test_step_meter_agrees_with_a_clock_of_its_own(fit: Fit, accumulate: int) -> None:
    meter, watch = StepMeter(every_n_steps=100), Watch()
    fit(
        Slow(),
        watch,
        meter,
        max_epochs=3,
        data=data(64 * 4, 8),
        val_check_interval=8,
        accumulate_grad_batches=accumulate,
    )
    batches = watch.batches_per_s()
    assert meter.last["measure/steps_per_s"] == pytest.approx(batches / accumulate, rel=0.2)
    assert meter.last["measure/samples_per_s"] == pytest.approx(batches * 8, rel=0.2)


@quiet
def test_step_meter_logs_at_the_trainers_interval_and_never_more(fit: Fit) -> None:
    logger, meter = Recording(), StepMeter()
    fit(
        Module(), meter, max_epochs=6, logger=logger, log_every_n_steps=5, data=data(64)
    )  # 48 steps
    rows = logger.of("measure/")
    assert [step for step, _ in rows] == [4, 9, 14, 19, 24, 29, 34, 39, 44]
    assert all(set(row) == {"measure/steps_per_s", "measure/samples_per_s"} for _, row in rows)
    assert all(
        row["measure/samples_per_s"] == pytest.approx(8 * row["measure/steps_per_s"])
        for _, row in rows
    )


@quiet
def test_step_meter_tells_something_about_a_short_fit_too(fit: Fit) -> None:
    logger = Recording()
    fit(Module(), StepMeter(1000), max_epochs=2, logger=logger, data=data(64))
    assert len(logger.of("measure/")) == 1


@quiet
def test_step_meter_does_nothing_on_the_device(fit: Fit) -> None:
    class Refuse(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, *_: Any, **__: Any) -> Any:
            raise AssertionError(f"{func} on the device")

    class Watched(StepMeter):
        def on_train_batch_end(self, *args: Any) -> None:
            with Refuse():
                super().on_train_batch_end(*args)

    meter = Watched(every_n_steps=2)
    fit(Module(), meter, logger=Recording())
    assert meter.last


@pytest.mark.slow
@timed
@quiet
def test_step_meter_leaves_out_the_steps_after_an_edit(fit: Fit) -> None:
    class Compiles(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            spin(0.2 if self.current_epoch == 1 and batch_idx < 4 else 0.002)()
            return super().training_step(batch, batch_idx)

    logger = Recording()
    meter = StepMeter(every_n_steps=8)
    fit(Compiles(), StructuredPruning(ratio=0.5, when=1), meter, logger=logger, data=data(128))
    rates = [row["measure/steps_per_s"] for _, row in logger.of("measure/")]
    assert min(rates) > 0.3 * max(rates)


@pytest.mark.parametrize(
    ("every", "kind"), [(0, ValueError), (-1, ValueError), (2.5, TypeError), (True, TypeError)]
)
def test_a_wrong_interval_is_refused(every: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="every_n_steps"):
        StepMeter(every)


@pytest.mark.parametrize("budget", [0, -1, math.nan])
def test_a_wrong_budget_is_refused(budget: float) -> None:
    with pytest.raises(ValueError, match="budget_s"):
        AccelReport(budget_s=budget)


@pytest.mark.slow
@quiet
def test_a_fit_without_edits_gains_nothing(fit: Fit, tmp_path: Path) -> None:
    fit(Module(), AccelReport(budget_s=0.6))
    plain = saved(tmp_path)
    assert plain["ratios"]["params"] == plain["ratios"]["macs"] == 1.0
    assert plain["dense"]["params"] == num_params(Net())
    assert plain["edits"] == []
    assert (
        next(tmp_path.rglob("report.md"))
        .read_text()
        .startswith("**Dense model against final model**")
    )


class Validations(Callback):
    """Notes the validation loss of each epoch by its own means."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.losses.append(float(trainer.callback_metrics["val_loss"]))


@pytest.mark.slow
@quiet
def test_a_pruned_fit_is_compared_with_what_the_class_builds(fit: Fit, tmp_path: Path) -> None:
    model, watch = Module(), Validations()
    report = AccelReport(budget_s=0.4)
    trainer = fit(model, StructuredPruning(ratio=0.5, when=[1, 2]), watch, report, max_epochs=4)
    plain, x = saved(tmp_path), torch.zeros(8, 8)
    assert plain["dense"]["params"] == num_params(Net())
    assert plain["final"]["params"] == num_params(model.net) < num_params(Net())
    assert plain["dense"]["macs"] * 8 == count_macs(Net(), (x,)).macs
    assert plain["final"]["macs"] * 8 == count_macs(model.net, (x,)).macs
    assert plain["ratios"]["macs"] == plain["dense"]["macs"] / plain["final"]["macs"]
    assert plain["dense"]["metrics"] == {"val_loss": watch.losses[0]}
    assert plain["dense_metrics_after_epoch"] == 1
    (row,) = [
        r for r in next(tmp_path.rglob("report.md")).read_text().splitlines() if "| val_loss" in r
    ]
    assert "after epoch 1 |" in row
    assert row.endswith("| - |")  # no gain between a training of one epoch and one of four
    assert report.report is not None
    assert not any("dense_metrics" in key for key in report.report.flat())
    assert plain["final"]["metrics"] == {"val_loss": watch.losses[-1]}
    assert [(e["epoch"], e["step"]) for e in plain["edits"]] == [(1, 4), (2, 8)]
    trainer.test(model, data(), verbose=False)
    plain = saved(tmp_path)
    loss = float(trainer.callback_metrics["test_loss"])
    assert plain["final"]["metrics"]["test_loss"] == pytest.approx(loss)
    assert "test_loss" in next(tmp_path.rglob("report.md")).read_text()


@pytest.mark.slow
@quiet
@pytest.mark.parametrize("resumed", [False, True])
def test_a_metric_is_labelled_with_the_epoch_of_its_own_validation(
    fit: Fit, tmp_path: Path, resumed: bool
) -> None:
    path = tmp_path / "r" / "report.json"

    def callbacks() -> list[Callback]:
        prune = StructuredPruning(ratio=0.5, when=3)
        return [Validations(), prune, AccelReport(path, budget_s=0.05)]

    given = {"check_val_every_n_epoch": 2, "num_sanity_val_steps": 2}
    if resumed:
        saving: Any = {"save_top_k": -1, "filename": "{epoch}", "save_on_train_epoch_end": True}
        fit(Module(), *callbacks(), ModelCheckpoint(tmp_path, **saving), max_epochs=5, **given)
    watch, prune, report = callbacks()
    ckpt = tmp_path / "epoch=2.ckpt" if resumed else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
        fit(Module(), watch, prune, report, ckpt=ckpt, max_epochs=5, **given)
    (row,) = [r for r in path.with_suffix(".md").read_text().splitlines() if "| val_loss" in r]
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    losses = watch.losses[-2:] if not resumed else watch.losses[-1:]  # type: ignore[attr-defined]
    assert cells[1] == f"{losses[-1]:.4g} after epoch 4"
    assert cells[0].endswith(" after epoch 2") and cells[2] == "-"
    if not resumed:
        assert cells[0] == f"{losses[0]:.4g} after epoch 2"


@quiet
def test_given_dense_metrics_take_the_place_of_those_before_the_edit(
    fit: Fit, tmp_path: Path
) -> None:
    report = AccelReport(tmp_path / "x" / "r.json", dense_metrics={"acc": 0.5}, budget_s=0.1)
    fit(Module(), StructuredPruning(ratio=0.5, when=1), report)
    plain = json.loads((tmp_path / "x" / "r.json").read_text())
    assert plain["dense"]["metrics"] == {"acc": 0.5}
    assert (tmp_path / "x" / "r.md").exists()
    assert not (tmp_path / "report.json").exists()


@quiet
def test_a_test_of_another_module_does_not_touch_the_report(fit: Fit, tmp_path: Path) -> None:
    trainer = fit(Module(), AccelReport(budget_s=0.1))
    before = saved(tmp_path)
    trainer.test(Module(), data(), verbose=False)
    assert saved(tmp_path) == before


@quiet
def test_a_test_of_a_less_pruned_checkpoint_is_said(fit: Fit, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "ckpt", save_top_k=-1, filename="{epoch}")
    model = Module()
    trainer = fit(model, StructuredPruning(ratio=0.5, when=1), AccelReport(budget_s=0.1), keep)
    with pytest.warns(UserWarning, match="another structure"):
        trainer.test(model, data(), ckpt_path=tmp_path / "ckpt" / "epoch=0.ckpt", verbose=False)
    (note,) = [n for n in saved(tmp_path)["notes"] if "checkpoint" in n]
    assert f"{num_params(Net()):,} parameters" in note
    assert "test_loss" not in saved(tmp_path)["final"]["metrics"]
    with pytest.warns(UserWarning, match="another structure"):
        trainer.test(model, data(), ckpt_path=tmp_path / "ckpt" / "epoch=1.ckpt", verbose=False)
    assert "test_loss" in saved(tmp_path)["final"]["metrics"]
    assert any("of the weights in" in n and "epoch=1.ckpt" in n for n in saved(tmp_path)["notes"])


@pytest.mark.slow
@quiet
def test_a_metric_of_the_network_before_the_edit_is_left_out(fit: Fit, tmp_path: Path) -> None:
    report, logger = AccelReport(tmp_path / "report.json", budget_s=0.1), Recording()
    prune = StructuredPruning(ratio=0.5, when=2)
    fit(Module(), prune, report, max_epochs=3, check_val_every_n_epoch=2, logger=logger)
    plain = saved(tmp_path)
    assert plain["final"]["metrics"] == {}
    assert "val_loss" in plain["dense"]["metrics"]
    assert any("left out: val_loss" in note for note in plain["notes"])
    ((_, row),) = logger.of("report/")
    assert not any(key.startswith("report/final_metrics") for key in row)


@pytest.mark.slow
@quiet
def test_a_report_goes_to_the_log_folder_and_never_to_the_working_folder(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    trainer = fit(Module(), AccelReport(budget_s=0.1), logger=CSVLogger(tmp_path / "logs"))
    (found,) = tmp_path.rglob("report.json")
    assert found.parent == Path(trainer.log_dir)
    fit(Module(), AccelReport(budget_s=0.1), logger=Recording(), default_root_dir=tmp_path / "r")
    assert (tmp_path / "r" / "recording" / "0" / "report.json").exists()
    fit(Module(), AccelReport(budget_s=0.1), default_root_dir=None)
    assert not list((tmp_path / "here").glob("report*"))
    assert (tmp_path / "here" / "lightning_logs" / "report.json").exists()


@quiet
@pytest.mark.parametrize("foreign", ["report.json", "report.md"])
def test_a_foreign_file_is_never_overwritten(fit: Fit, tmp_path: Path, foreign: str) -> None:
    (tmp_path / foreign).write_text('{"mine": 1}')
    fit(Module(), AccelReport(tmp_path / "report.json", budget_s=0.1))
    assert (tmp_path / foreign).read_text() == '{"mine": 1}'
    assert (tmp_path / "report-1.json").exists()
    fit(
        Module(), AccelReport(tmp_path / "report.json", budget_s=0.1)
    )  # which may take the place of an earlier report
    assert not (tmp_path / "report-2.json").exists()


@pytest.mark.parametrize(
    ("others", "given"), [(0.0, True), (0.3, True), (1.1, False), (2.0, False)]
)
def test_a_gain_is_withheld_where_other_work_took_most_of_the_processor(
    ticks: Ticks, monkeypatch: pytest.MonkeyPatch, others: float, given: bool
) -> None:
    """However narrow its interval: threads that wait for each other are slowed down unequally."""
    monkeypatch.setattr(contention, "num_usable_cores", lambda: 2)
    monkeypatch.setattr(contention.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(contention, "_busy_seconds", lambda: 100 + (1 + others) * ticks.now)
    net = nn.Linear(2, 2)
    dense, final = (MeasuredModel(net, {1: spin(s)}, spin(s)) for s in (0.002, 0.001))
    report = measure_pair(dense, final, budget_s=0.1)
    assert report.final.latency_ms["1"] == pytest.approx(1.0, rel=0.2)
    assert (report.ratios.latency != {}) == (report.ratios.steps_per_s is not None) == given
    said = [note for note in report.extra["notes"] if "no gain is given for latency_1" in note]
    assert bool(said) != given
    assert given or "other work left" in said[0]


def test_a_gain_whose_interval_says_nothing_is_withheld(monkeypatch: pytest.MonkeyPatch) -> None:
    def compared(*_: Any, **__: Any) -> Comparison:
        side = LatencyStats(1.0, 0.1, 1.0, 9)
        return Comparison(side, side, 93.62, 2.58, 285.95, 0.2)

    monkeypatch.setattr("lightning_accel.measure.report.compare", compared)
    net = nn.Linear(2, 2)
    subject = MeasuredModel(net, {1: lambda: None}, step=lambda: None)
    report = measure_pair(subject, subject)
    assert report.ratios.latency == {}
    assert report.ratios.steps_per_s is None
    assert not any("93.62" in line for line in report.table().to_text().splitlines())
    assert any("between 2.58x and 286x" in note for note in report.extra["notes"])
    assert "report/ratio_latency_1" not in report.flat()


class Still(Callback):
    """Takes a picture of all that a report could disturb."""

    def __init__(self) -> None:
        self.picture: dict[str, Any] = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        import numpy as np

        self.picture = state(pl_module)
        self.picture["python"] = random.getstate()
        self.picture["numpy"] = str(np.random.get_state())
        self.picture["optimizer"] = str(trainer.optimizers[0].state_dict())
        self.picture["grad objects"] = [id(p.grad) for p in pl_module.parameters()]
        self.picture["parameters"] = [id(p) for p in pl_module.parameters()]


@quiet
@pytest.mark.usefixtures("clean_dynamo")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_a_report_leaves_no_trace(
    fit: Fit, compiled: bool, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = Still(), Still()
    model = Module()
    model.net.body.eval()
    model.net.head.bias.requires_grad_(False)  # type: ignore[union-attr]
    if compiled:
        compiled_in_place(model.net)
    if fails:
        spoil(monkeypatch)
    report = AccelReport(budget_s=0.1)
    if fails:
        with pytest.warns(UserWarning, match="measuring the dense model"):
            fit(model, before, report, after)
    else:
        fit(model, before, report, after)
    assert any(
        value is not None for name, value in before.picture.items() if name.startswith("grad ")
    )
    assert_same(after.picture, before.picture)


def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let measuring fail after it has used random numbers of all kinds and changed flags."""
    import numpy as np

    def fail(dense: Runnable, final: Runnable, **_: Any) -> None:
        training_step(final)()
        torch.rand(1), random.random(), np.random.rand()
        raise RuntimeError("out of luck\nand more lines")

    monkeypatch.setattr(callback_file, "measure_subjects", fail)


@quiet
def test_a_failed_measurement_keeps_what_is_known(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch)
    with pytest.warns(UserWarning, match=r"failed. Found: RuntimeError: out of luck") as caught:
        fit(Module(), AccelReport(budget_s=0.1))
    assert any("Do: " in str(w.message) for w in caught)
    plain = saved(tmp_path)
    assert plain["final"]["metrics"]["val_loss"] > 0
    assert plain["ratios"]["macs"] is None
    assert "out of luck" in plain["notes"][0]


@pytest.mark.slow
@quiet
@pytest.mark.usefixtures("clean_dynamo")
def test_the_compiled_code_is_what_is_timed(fit: Fit) -> None:
    model = Module()
    compiled_in_place(model.net)
    inner, calls = model.net._compiled_call_impl, itertools.count()

    def counting(*args: Any, **kwargs: Any) -> Any:
        next(calls)
        return inner(*args, **kwargs)

    model.net._compiled_call_impl = counting
    report = AccelReport(budget_s=0.1)
    fit(model, report, max_epochs=1)
    assert report.report is not None
    spread = report.report.extra["spread"]
    assert next(calls) > sum(part["final"]["num_calls"] for part in spread.values())


class Ours(MixedPrecision):
    accel_baseline = "32-true"


@quiet
@pytest.mark.parametrize(("plugin", "dense_autocast"), [(MixedPrecision, True), (Ours, False)])
def test_the_dense_side_runs_in_the_users_own_precision(
    fit: Fit, plugin: type[MixedPrecision], dense_autocast: bool
) -> None:
    model = Module()
    prune = StructuredPruning(ratio=0.5, when=1, recalibrate=0)
    end = Mark()
    fit(model, prune, end, AccelReport(budget_s=0.1), plugins=[plugin("bf16-mixed", "cpu")])
    measured = {(params, autocast) for params, _, autocast in Net.seen[end.seen :]}
    assert (num_params(Net()), not dense_autocast) not in measured
    assert measured == {(num_params(Net()), dense_autocast), (num_params(model.net), True)}


class Mark(Callback):
    """Notes how many forwards there were before the report."""

    def __init__(self) -> None:
        self.seen = 0

    def on_train_end(self, *_: Any) -> None:
        self.seen = len(Net.seen)


@quiet
def test_latency_is_taken_in_eval_mode_and_steps_in_training_mode(fit: Fit) -> None:
    end, report = Mark(), AccelReport(budget_s=0.1)
    fit(Module(), end, report)
    assert report.report is not None
    spread = report.report.extra["spread"]
    calls = {
        name: sum(part[s]["num_calls"] for s in ("dense", "final")) for name, part in spread.items()
    }
    training = sum(training for _, training, _ in Net.seen[end.seen :])
    evaluating = len(Net.seen) - end.seen - training
    assert calls["training_step"] < training < calls["training_step"] * 2 + 200
    assert evaluating > calls["latency_1"] + calls["latency_8"]


@quiet
def test_a_memory_format_of_ours_is_undone_on_the_dense_side(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    precision = pytest.importorskip("lightning_accel.precision")
    taken: list[Runnable] = []
    monkeypatch.setattr(callback_file, "measure_subjects", lambda *sides, **_: taken.extend(sides))
    images = TensorDataset(torch.randn(16, 3, 8, 8), torch.arange(16) % 4)
    theirs = tiny.ConvNet()
    theirs.stem[0].weight.data = theirs.stem[0].weight.data.contiguous(
        memory_format=torch.channels_last
    )
    report = AccelReport(budget_s=0.1)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[precision.MemoryFormat(), report],
    )
    trainer.fit(Module(theirs), DataLoader(images, 8))
    dense, final = (side.model.net for side in taken)
    assert not final.conv[0].weight.is_contiguous()
    assert dense.conv[0].weight.is_contiguous()
    assert not dense.stem[0].weight.is_contiguous()  # the user's own


class Two(Module):
    """Two networks, two optimizers, manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.second = nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():
            loss = self.second(self.net(batch[0])).mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.net.parameters(), 0.01),
            torch.optim.SGD(self.second.parameters(), 0.01),
        ]


@quiet
def test_several_networks_are_measured_together(fit: Fit, tmp_path: Path) -> None:
    fit(Two(), AccelReport(budget_s=0.1))
    plain = saved(tmp_path)
    x = torch.zeros(8, 8)
    assert plain["dense"]["macs"] * 8 == count_macs(Net(), (x,)).macs + 8 * 4
    assert plain["final"]["steps_per_s"] is not None


@pytest.mark.slow
@quiet
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_resumed_fit_reports_as_the_uninterrupted_one(
    fit: Fit, tmp_path: Path, stop: int
) -> None:
    def callbacks(name: str) -> list[Callback]:
        prune = StructuredPruning(ratio=0.5, when=[1, 2])
        return [prune, AccelReport(tmp_path / name, budget_s=0.05)]

    keep = ModelCheckpoint(tmp_path / "ckpt", save_top_k=-1, filename="{epoch}")
    torch.manual_seed(0)
    fit(Module(), *callbacks("whole.json"), keep, max_epochs=4)
    whole = json.loads((tmp_path / "whole.json").read_text())
    path = tmp_path / "ckpt" / f"epoch={stop}.ckpt"
    torch.load(path, weights_only=True)
    fit(Module(), *callbacks("resumed.json"), ckpt=path, max_epochs=4)
    resumed = json.loads((tmp_path / "resumed.json").read_text())
    for key in ("edits", "macs_partial"):
        assert resumed[key] == whole[key]
    for side in ("dense", "final"):
        for key in ("params", "macs"):
            assert resumed[side][key] == whole[side][key]
    assert resumed["dense"]["metrics"] == whole["dense"]["metrics"] != {}
    if stop:
        before = resumed["observed_steps_per_s"]["before"]
        assert before == whole["observed_steps_per_s"]["before"]


@pytest.mark.slow
@quiet
def test_a_trial_run_writes_nothing(fit: Fit, tmp_path: Path) -> None:
    report = AccelReport()
    fit(Module(), report, fast_dev_run=True)
    assert report.report is not None
    assert report.report.ratios.macs == 1.0
    assert not list(tmp_path.rglob("report.*"))


@quiet
@pytest.mark.parametrize("nothing", [{"limit_train_batches": 0}, {"max_epochs": 0}])
def test_a_fit_of_no_batches_has_no_report(
    fit: Fit, tmp_path: Path, nothing: dict[str, int]
) -> None:
    report = AccelReport()
    fit(Module(), report, StepMeter(), **nothing)
    assert report.report is None
    assert not list(tmp_path.rglob("report.*"))


@quiet
def test_a_module_that_logs_nothing_has_a_report(fit: Fit, tmp_path: Path) -> None:
    fit(Module(), AccelReport(budget_s=0.1), limit_val_batches=0)
    plain = saved(tmp_path)
    assert plain["dense"]["metrics"] == plain["final"]["metrics"] == {}
    assert plain["ratios"]["params"] == 1.0


class WandbLogger(Recording):
    """Answers like Lightning's, without a run."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[Any] = []
        self.experiment = self  # type: ignore[misc]
        self.summary: dict[str, float] = {}

    def log_table(self, key: str, columns: list[str], data: list[list[str]]) -> None:
        self.tables.append((key, columns, data))


@pytest.mark.slow
@quiet
def test_every_logger_gets_flat_numbers_and_wandb_a_table(fit: Fit, tmp_path: Path) -> None:
    plain, wandb = Recording(), WandbLogger()
    fit(Module(), AccelReport(budget_s=0.1), logger=[plain, wandb, CSVLogger(tmp_path / "csv")])
    ((_, row),) = plain.of("report/")
    assert {"report/ratio_macs", "report/final_params"} <= set(row)
    assert wandb.summary == row
    ((step, charts),) = wandb.of("report/gains")
    assert step == 8
    drawn = dict(charts["report/gains"].table.data)
    assert drawn["parameters"] == drawn["MACs per sample"] == 1.0
    ((key, columns, rows),) = wandb.tables
    assert (key, columns) == ("report/table", ["quantity", "dense", "final", "gain"])
    assert ["parameters", "548", "548", "1.00x"] in rows
    assert "report/ratio_macs" in next((tmp_path / "csv").rglob("metrics.csv")).read_text()


@pytest.mark.slow
@quiet
def test_wandb_keeps_what_a_fit_left_when_asked(fit: Fit, tmp_path: Path) -> None:
    logger, kept = WandbLogger(), []  # type: ignore[var-annotated]
    logger.id, logger.log_artifact = "r1", kept.append  # type: ignore[attr-defined]
    deploys = Callback()
    (bundle := tmp_path / "net").mkdir()
    (bundle / "model.pt2").write_text("")
    deploys.bundle = SimpleNamespace(path=bundle)  # type: ignore[attr-defined]
    for artifact in (False, True):
        saver = ModelCheckpoint(tmp_path / f"{artifact}", filename="{epoch}", monitor="val_loss")
        report = AccelReport(tmp_path / "report.json", budget_s=0.1, artifact=artifact)
        cut = StructuredPruning(ratio=0.5, when=1)
        fit(Module(), report, cut, saver, deploys, logger=logger)
        assert len(kept) == artifact
    (one,) = kept
    assert (one.name, one.type) == ("accel-r1", "model")
    files = {"report.json", Path(saver.best_model_path).name, "net/model.pt2"}
    assert files == set(one.manifest.entries)
    assert one.metadata["report/ratio_params"] == report.report.flat()["report/ratio_params"] > 1  # type: ignore[union-attr]
    assert one.metadata["edits"]


@pytest.mark.slow
@quiet
def test_csv_and_tensorboard_get_the_same_numbers(fit: Fit, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb")]
    fit(Module(), AccelReport(budget_s=0.1), logger=loggers)
    table = (tmp_path / "csv").rglob("metrics.csv")
    rows = list(csv.DictReader(next(table).read_text().splitlines()))
    written = {k: float(v) for row in rows for k, v in row.items() if k.startswith("report/") and v}
    events = EventAccumulator(str(next((tmp_path / "tb").rglob("events.*")).parent)).Reload()
    seen = {t: events.Scalars(t)[-1].value for t in events.Tags()["scalars"] if t in written}
    assert {"report/ratio_macs", "report/final_params"} <= set(written)
    assert seen == pytest.approx(written, rel=1e-6)  # events are float32


@quiet
def test_a_logger_that_fails_does_not_take_the_report_with_it(fit: Fit, tmp_path: Path) -> None:
    class Broken(Recording):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if "report/ratio_macs" in metrics:
                raise ConnectionError("offline")

    with pytest.warns(UserWarning, match="could not be logged. Found: ConnectionError: offline"):
        fit(Module(), AccelReport(budget_s=0.1), logger=Broken())
    assert saved(tmp_path)["ratios"]["macs"] == 1.0


@pytest.mark.slow
@quiet
def test_state_is_plain_and_the_callback_can_be_pickled(fit: Fit) -> None:
    import pickle

    report = AccelReport(budget_s=0.1)
    fit(Module(), StructuredPruning(ratio=0.5, when=1), report)
    buffer = io.BytesIO()
    torch.save(report.state_dict(), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == report.state_dict()
    again = pickle.loads(pickle.dumps(report))  # noqa: S301
    assert again.state_dict() == report.state_dict()
    pickle.dumps(StepMeter())


@pytest.mark.slow
@quiet
def test_the_same_callback_starts_anew_with_another_module(fit: Fit) -> None:
    report = AccelReport(budget_s=0.05)
    fit(Module(), StructuredPruning(ratio=0.5, when=1), report)
    assert report.state_dict()["edits"]
    fit(Module(), report)
    assert report.report is not None
    assert report.report.extra["edits"] == []
    assert report.report.ratios.params == 1.0


DDP = """
import sys, torch
from lightning.pytorch import Trainer
sys.path[:0] = [{tests!r}]
import test_measure as t
from lightning_accel import AccelReport, StepMeter, StructuredPruning
torch.set_num_threads(1)
model, meter = t.Module(), StepMeter(4)
trainer = Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=3, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    callbacks=[StructuredPruning(ratio=0.5, when=1), meter, AccelReport({out!r}, budget_s=0.2)],
)
trainer.fit(model, t.data(128), t.data())
ratio = meter.last["measure/samples_per_s"] / meter.last["measure/steps_per_s"]
assert abs(ratio - 16) < 1e-6, ratio
trainer.test(model, t.data(), verbose=False)
"""


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_report_once_and_count_all_samples(tmp_path: Path, root: Path) -> None:
    out = tmp_path / "report.json"
    script = tmp_path / "script.py"
    script.write_text(DDP.format(tests=str(root / "tests"), out=str(out)))
    status, printed = forks.run_ranks(script, cwd=tmp_path, path=(root,))
    assert status == 0, printed[-3000:]
    plain = json.loads(out.read_text())
    assert plain["world_size"] == 2
    assert plain["ratios"]["params"] > 2
    assert plain["final"]["metrics"].keys() == {"val_loss", "test_loss"}
    assert not any("left out" in note or "failed" in note for note in plain.get("notes", []))


@timed
def test_what_became_slower_is_said() -> None:
    net = nn.Linear(8, 8)
    quick, long = (MeasuredModel(net, {1: spin(seconds)}) for seconds in (0.001, 0.002))
    slower = measure_pair(quick, long, budget_s=0.2)
    assert any("slower here: latency_1" in note for note in slower.extra["notes"])
    faster = measure_pair(long, quick, budget_s=0.2)
    assert not any("slower" in note for note in faster.extra.get("notes", []))
