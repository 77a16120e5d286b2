"""Targets, against brute force on a hand-written graph, and against counts and clocks on real networks."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_accel import StructuredPruning
from lightning_accel.errors import NoEffect
from lightning_accel.measure.timing import Comparison
from lightning_accel.measure.timing import LatencyStats as MeasuredLatency
from lightning_accel.pruning import plan
from lightning_accel.pruning import target as target_file
from lightning_accel.pruning.rounding import best_round_to, check_round_to, reach
from lightning_accel.pruning.selection import kept_width
from lightning_accel.pruning.target import Latency, Macs, Memory, Params, RemovedUnits, Target
from lightning_accel.recipe import build
from lightning_accel.surgery import Cut, Kept, Structure, twin
from lightning_accel.surgery.call import Call

TARGETS = (Macs, Params, Latency, Memory)


class Chain:
    """A chain of linear layers, the widths in between prunable: a graph with nothing to trace."""

    def __init__(self, widths: Sequence[int], batch: int = 4) -> None:
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
        self.model = nn.Sequential(*layers).eval()
        self.calls = (Call("", (torch.randn(batch, widths[0]),), {}),)
        self.widths = list(widths)
        self.groups = [
            SimpleNamespace(name=str(i), units=width, link=None)
            for i, width in enumerate(widths[1:-1])
        ]

    def left(self, gone: RemovedUnits) -> list[int]:
        inner = [group.units - len(gone.get(group.name, ())) for group in self.groups]
        return [self.widths[0], *inner, self.widths[-1]]

    def macs(self, gone: RemovedUnits) -> float:
        return len(self.calls[0].args[0]) * sum(
            a * b for a, b in itertools.pairwise(self.left(gone))
        )

    def params(self, gone: RemovedUnits) -> int:
        return sum(a * b + b for a, b in itertools.pairwise(self.left(gone)))

    def cut(self, gone: RemovedUnits) -> Cut:
        kept = [None, *(self._rest(group, gone) for group in self.groups), None]
        changed: dict[str, Kept] = {}
        for i, (columns, rows) in enumerate(itertools.pairwise(kept)):
            changed[f"{i}.weight"] = Kept((rows, columns))
            changed[f"{i}.bias"] = Kept((rows,))
        sizes = self.left(gone)
        attributes = {
            str(i): {"in_features": a, "out_features": b}
            for i, (a, b) in enumerate(itertools.pairwise(sizes))
        }
        return Cut(changed, Structure.of(self.model), attributes)

    @staticmethod
    def _rest(group: Any, gone: RemovedUnits) -> torch.Tensor:
        removed = set(gone.get(group.name, ()))
        return torch.tensor([i for i in range(group.units) if i not in removed])

    def pick(self, ratio: float, round_to: int | None = None) -> Mapping[str, list[int]]:
        gone = {
            group.name: list(
                range(kept_width(group.units, ratio=ratio, round_to=round_to), group.units)
            )
            for group in self.groups
        }
        return {name: units for name, units in gone.items() if units}


# --- counted targets ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Macs, Params])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("widths", [(8, 64, 64, 4), (16, 64, 48, 64, 10), (4, 250, 4)])
def test_counted_targets_are_met_from_below_within_five_percent(
    kind: type[Target], share: float, widths: tuple[int, ...]
) -> None:
    graph = Chain(widths)
    gone = kind(share).reach(graph, graph.pick)
    count = graph.macs if kind is Macs else graph.params
    assert 0.95 * share <= count(gone) / count({}) <= share


def test_a_mix_of_shares_comes_nearer_than_any_one_share() -> None:
    graph = Chain((6, 12, 12, 12, 3))
    nearer = 0
    for share in (0.3, 0.4, 0.5, 0.6, 0.7):
        single = max(
            kept
            for ratio in range(1, 200)
            if (kept := Macs(0.5).kept(graph, graph.pick(ratio / 200))) <= share
        )
        mixed = Macs(share).kept(graph, Macs(share).reach(graph, graph.pick))
        assert single <= mixed <= share
        nearer += mixed > single
    assert nearer >= 4


def test_linked_groups_stay_equal() -> None:
    graph = Chain((5, 30, 30, 30, 3))
    graph.groups[0].link = graph.groups[2].link = 1
    for share in (0.3, 0.5, 0.8):
        left = graph.left(Params(share).reach(graph, graph.pick))
        assert left[1] == left[3]


def test_memory_counts_weights_and_what_a_forward_holds() -> None:
    graph = Chain((64, 64, 64))
    target = Memory(0.6, batch_size=256)
    gone = target.reach(graph, graph.pick)
    hidden = graph.left(gone)[1]

    def need(width: int) -> int:
        weights = 64 * width + width + width * 64 + 64
        return 4 * (weights + 256 * (width + 64))  # both activations are alive at the end

    assert target.kept(graph, gone) == pytest.approx(need(hidden) / need(64))
    assert need(hidden) / need(64) <= 0.6 < need(hidden + 1) / need(64)


@pytest.mark.parametrize("kind", [Macs, Params, Memory])
def test_a_target_out_of_reach_says_what_is_possible(kind: type[Target]) -> None:
    graph = Chain((64, 4, 64))
    with pytest.raises(NoEffect, match=r"pruned to 1% .*[0-9]+% remain"):
        kind(0.01).reach(graph, graph.pick)


def test_what_was_removed_before_counts() -> None:
    assert Macs(0.5).of_rest(0.25) == Macs(0.25)
    with pytest.raises(NoEffect, match="more than is due"):
        Macs(0.5).of_rest(1.2)


def test_the_batch_size_comes_from_the_example_unless_it_is_given() -> None:
    calls = [Call("", (torch.ones(7, 2),), {})]
    assert Latency(0.5).of(calls).batch_size == 7
    assert Memory(0.5, batch_size=3).of(calls).batch_size == 3
    assert Macs(0.5).of(calls) == Macs(0.5)


# --- time --------------------------------------------------------------------------------------


class Clock(Latency):
    """Time that is known: quadratic in the widths, on a plateau of 16 channels, with noise."""

    def kept(self, graph: Any, gone: RemovedUnits) -> float:
        self.asked.append(1)  # type: ignore[attr-defined]
        return seconds(graph, gone) / seconds(graph, {}) * noise.uniform(0.98, 1.02)


noise = random.Random(0)


def seconds(graph: Any, gone: RemovedUnits) -> float:
    blocks = [graph.block * math.ceil(width / graph.block) for width in graph.left(gone)]
    return 1000.0 + sum(a * b for a, b in itertools.pairwise(blocks))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_a_time_is_met_under_noise_with_few_measurements(share: float) -> None:
    graph = Chain((64, 256, 256, 64))
    graph.block = 1  # type: ignore[attr-defined]
    target = Clock(share)
    object.__setattr__(target, "asked", [])
    gone = target.reach(graph, graph.pick)
    assert seconds(graph, gone) / seconds(graph, {}) == pytest.approx(share, rel=0.05)
    assert len(target.asked) <= 14  # type: ignore[attr-defined]


def test_on_a_plateau_the_time_is_met_from_below() -> None:
    graph = Chain((64, 256, 256, 64))
    graph.block = 64  # type: ignore[attr-defined]
    target = Clock(0.5)
    object.__setattr__(target, "asked", [])
    gone = target.reach(graph, graph.pick)
    assert seconds(graph, gone) / seconds(graph, {}) <= 0.5 * 1.03


def test_a_time_below_the_overhead_is_out_of_reach() -> None:
    graph = Chain((64, 64, 64))
    graph.block = 1  # type: ignore[attr-defined]
    target = Clock(0.05)
    object.__setattr__(target, "asked", [])
    with pytest.raises(NoEffect, match=r"milliseconds.*remain"):
        target.reach(graph, graph.pick)


@pytest.fixture
def by_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a forward take as long as its arithmetic, and each of its modules a little more."""

    def took(call: Any) -> float:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops() + 1000.0

    def compared(before: Any, after: Any, **given: Any) -> Comparison:
        ratio = took(before) / took(after)
        nothing = MeasuredLatency(1.0, 0.0, 1.0, 1)
        return Comparison(nothing, nothing, ratio, ratio, ratio, 1.0)

    monkeypatch.setattr(target_file, "compare", compared)


def arithmetic_left(net: nn.Module, cut: Cut, x: torch.Tensor) -> float:
    """Count anew, by hand: what is left of the products of all layers."""
    small, counts = twin(net), []
    cut.apply(small)
    for each in (net, small):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            each(x)
        counts.append(counter.get_total_flops() + 1000.0)
    return counts[1] / counts[0]


@pytest.mark.usefixtures("by_arithmetic")
@pytest.mark.parametrize("share", [0.5, 0.75])
def test_a_latency_target_is_met_within_ten_percent(share: float) -> None:
    """On a machine whose time is known; on a real one see `benchmarks/prune_latency.py`."""
    widths = [128, 512, 384, 512, 64]
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    net, x = nn.Sequential(*layers[:-1]).eval(), torch.randn(32, 128)
    cut = plan(net, calls=(Call("", (x,), {}),), target=Latency(share, batch_size=32))
    assert arithmetic_left(net, cut, x) == pytest.approx(share, rel=0.1)


@pytest.mark.usefixtures("by_arithmetic")
def test_a_latency_target_of_a_convolutional_network_is_met_from_below() -> None:
    net, x = tiny.ConvNet(width=48).eval(), torch.randn(2, 3, 24, 24)
    cut = plan(net, calls=(Call("", (x,), {}),), target=Latency(0.5, batch_size=2))
    assert 0.25 < arithmetic_left(net, cut, x) <= 0.55


# --- rounding ----------------------------------------------------------------------------------


def test_the_multiple_of_the_machine_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Chain((64, 100, 100, 64))

    def blocks_of_sixteen(self: Latency, graph: Any, gone: RemovedUnits) -> float:
        graph.block = 16
        return seconds(graph, gone) / seconds(graph, {})

    monkeypatch.setattr(Latency, "kept", blocks_of_sixteen)
    assert best_round_to(graph, lambda multiple: graph.pick(0.45, multiple)) == 16


def test_without_a_gain_nothing_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Chain((64, 100, 100, 64))
    monkeypatch.setattr(
        Latency, "kept", lambda self, graph, gone: graph.macs(gone) / graph.macs({})
    )
    assert best_round_to(graph, lambda multiple: graph.pick(0.5, multiple)) == 1


def test_rounding_that_leaves_nothing_to_remove_is_an_error() -> None:
    graph = Chain((4, 6, 4))
    with pytest.raises(NoEffect, match="no rounding"):
        best_round_to(graph, lambda multiple: graph.pick(0.3, multiple), multiples=(8, 16))


def test_reach_measures_the_rounding_for_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Chain((64, 100, 100, 64))
    graph.block = 32  # type: ignore[attr-defined]
    monkeypatch.setattr(
        Latency, "kept", lambda self, graph, gone: seconds(graph, gone) / seconds(graph, {})
    )
    assert reach(graph, graph.pick, target=Macs(0.5))[1] is None
    assert reach(graph, graph.pick, target=Macs(0.5), round_to=8)[1] == 8
    gone, round_to = reach(graph, graph.pick, target=Latency(0.5))
    assert round_to == 32 and all(width % 32 in (0, 4) for width in graph.left(gone))
    assert reach(graph, graph.pick, target=Latency(0.5), round_to=1)[1] == 1
    assert reach(graph, graph.pick, target=Macs(0.5), round_to="measured")[1] == 32
    assert reach(graph, graph.pick, ratio=0.4) == (graph.pick(0.4), None)
    assert reach(graph, graph.pick, ratio=0.4, round_to="measured") == (graph.pick(0.4, 32), 8)


# --- through the front door --------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.7, 0.5, 0.35, 0.25])
@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
def test_plan_meets_the_arithmetic_of_a_real_network(share: float, scope: str) -> None:
    net, x = tiny.ConvNet(width=32).eval(), torch.randn(2, 3, 8, 8)
    small = twin(net)
    plan(net, calls=(Call("", (x,), {}),), target=Macs(share), scope=scope).apply(small)

    def count(model: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            model(x)
        return counter.get_total_flops()

    assert 0.95 * share <= count(small) / count(net) <= share


@pytest.mark.parametrize("kind", TARGETS)
def test_targets_come_from_a_configuration(kind: type[Target]) -> None:
    boring = "lightning.pytorch.demos.boring_classes."
    node = {"_target_": f"lightning_accel.pruning.target.{kind.__name__}", "share": 0.3}
    run = build(
        {
            "trainer": {"_target_": "lightning.pytorch.Trainer", "accelerator": "cpu"},
            "model": {"_target_": boring + "BoringModel"},
            "logger": None,
            "callbacks": {
                "pruning": {
                    "_target_": "lightning_accel.pruning.StructuredPruning",
                    "target": node,
                    "schedule": "cubic",
                    "when": [1, 2],
                }
            },
        },
        allow=(boring,),
    )
    (pruning,) = [c for c in run.trainer.callbacks if isinstance(c, StructuredPruning)]
    assert pruning.request.target == kind(0.3)


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, math.nan, math.inf])
def test_an_impossible_share_is_refused(kind: type[Target], share: float) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}.share.*Found: .*Do: "):
        kind(share)


@pytest.mark.parametrize("share", ["half", None, True])
def test_a_share_that_is_no_number_is_refused(share: Any) -> None:
    with pytest.raises(TypeError, match="Macs.share"):
        Macs(share)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Latency(0.5, batch_size=0), "batch_size"),
        (lambda: Memory(0.5, batch_size=2.5), "batch_size"),  # type: ignore[arg-type]
        (lambda: Latency(0.5, tolerance=1.0), "tolerance"),
        (lambda: Latency(0.5, budget_s=0), "budget_s"),
        (lambda: check_round_to("8"), "'measured'"),
        (lambda: check_round_to(0), "'measured'"),
        (lambda: StructuredPruning(when=0), "either"),
        (lambda: StructuredPruning(0.5, target=Macs(0.5), when=0), "either"),
    ],
)
def test_other_bad_arguments_are_refused(make: Any, said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        make()


def test_a_target_that_is_a_number_is_told_what_to_write() -> None:
    with pytest.raises(TypeError, match=r"Macs\(0.5\)"):
        StructuredPruning(target=0.5, when=0)  # type: ignore[arg-type]
