"""The proof of a cut refuses what is wrong: right cuts, made wrong on purpose, and whether they pass."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_accel.errors import BrokenModel, NoEffect
from lightning_accel.pruning import mask_equivalence, plan, prune, statistics
from lightning_accel.pruning.statistics import same_places
from lightning_accel.surgery.call import as_call

NETS = [
    "mixer",
    "vit_average",
    "residual_convolutions",
    "global_response",
    "llama",
    "octave_convolution",
    "grouped_convolutions",
    "mean_over_channels_only",
    "spread_over_channels_only",
    "norms_of_heads",
    "normed_weights",
    "standardized_weights",
    "two_means",
]
"""Those whose statistics differ; `benchmarks/proof_mutations.py` tries all."""


@pytest.fixture
def mutations(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("proof_mutations")


@pytest.mark.parametrize("name", NETS)
def test_no_wrong_cut_passes_and_the_right_one_does(mutations: Any, name: str) -> None:
    found = mutations.tried(*mutations.made(name), each=1)
    assert found["passed"] == []
    assert sum(found["wrong"].values()) >= 6
    assert not found["refused"], found
    assert float(found["note"].partition("%")[0]) >= 30  # of the 40 % asked for, in whole channels


@pytest.mark.slow
def test_a_proof_that_replays_too_much_is_found_out(
    mutations: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the proof of 0.1.0 was: the masked network's statistic, wherever its input is smaller."""
    made = mutations.made("sets")
    monkeypatch.setattr(statistics, "_cut_where_reduced", lambda *_: True)
    monkeypatch.setattr(
        statistics,
        "same_places",
        lambda old, new, _: {
            d: torch.arange(new.shape[d]) for d in range(old.dim()) if old.shape[d] != new.shape[d]
        },
    )
    found = mutations.tried(*made, each=2)
    assert found["passed"] or found["refused"]


class Widths(nn.Module):
    """Divides by a width that its layer has as an attribute, and averages over pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Conv2d(3, 24, 3, padding=1), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.o((F.relu(self.a(x)) / self.a.out_channels**0.5).mean((2, 3)))


def test_a_width_that_the_forward_divides_by_is_seen_through_a_mean() -> None:
    net, x = Widths(), torch.randn(2, 3, 8, 8)
    with pytest.raises((BrokenModel, NoEffect)):
        prune(net, example=x, ratio=0.3)


@pytest.mark.parametrize("cut", [(1,), (2,), (1, 3), (0, 1, 2, 3)])
def test_places_are_found_by_their_values(cut: tuple[int, ...]) -> None:
    old = torch.relu(torch.randn(4, 7, 6, 5, dtype=torch.float64))
    kept = {d: torch.tensor([3, 0, 2][: 2 + d % 2]) for d in cut}
    new = old
    for dim, places in kept.items():
        new = new.index_select(dim, places)
    found = same_places(old, new + 1e-14, 1e-9)
    assert found is not None
    assert {d: p.tolist() for d, p in found.items()} == {d: p.tolist() for d, p in kept.items()}
    assert same_places(old, new + 1e-6, 1e-9) is None


def test_equal_slices_are_found_at_any_of_their_places() -> None:
    old = torch.zeros(2, 6, 3)
    old[:, 4] = 1.0
    found = same_places(old, old[:, [0, 4, 5]], 1e-9)
    assert found is not None and found[1].tolist()[1] == 4


def test_a_zero_is_not_nothing_behind_a_softplus() -> None:
    """Input-convex networks make their weights positive so: what is cut must be what is made of them."""

    class Convex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.i, self.o = nn.Linear(6, 16), nn.Linear(12, 3)
            self.w = nn.Parameter(torch.randn(12, 16))

        def forward(self, x: Tensor) -> Tensor:
            return self.o(F.softplus(F.linear(F.softplus(self.i(x)), F.softplus(self.w))))

    net, x = Convex().double(), torch.randn(5, 6, dtype=torch.float64)
    dense = {name: p.detach().clone() for name, p in net.named_parameters()}
    prune(net, example=x, ratio=0.5)
    assert net.w.shape == (6, 8)
    rows = [int((dense["i.bias"] == b).nonzero()) for b in net.i.bias]
    outs = [int((dense["o.weight"][0] == w).nonzero()) for w in net.o.weight[0]]
    hidden = F.softplus(F.linear(x, dense["i.weight"], dense["i.bias"]))[:, rows]
    hidden = F.softplus(hidden @ F.softplus(dense["w"])[outs][:, rows].T)
    by_hand = F.linear(hidden, dense["o.weight"][:, outs], dense["o.bias"])
    torch.testing.assert_close(net(x), by_hand, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("example", [torch.randn(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)])
def test_nothing_hides_behind_a_weight_or_an_input_of_zeros(example: Tensor) -> None:
    """Residual branches begin at zero, and examples are zeros: all of them wrong would be right today."""
    norm = nn.BatchNorm2d(8)
    nn.init.zeros_(norm.weight)
    inner = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 1), norm)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner, self.head = (
                nn.Conv2d(3, 8, 1, bias=False),
                inner,
                nn.Linear(8, 2),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head((x + self.inner(x)).mean((2, 3)))

    net = Residual().eval()
    cut = plan(net, calls=(as_call(example),), ratio=0.5)
    assert mask_equivalence(net, cut, example=example) < 1e-10
    places = cut.kept["inner.2.weight"]
    wrong = places._replace(dims=(places.dims[0], (places.dims[1] + 1) % 12, *places.dims[2:]))
    wrong = dataclasses.replace(cut, kept={**cut.kept, "inner.2.weight": wrong})
    assert mask_equivalence(net, wrong, example=example) > 1e-4


def test_a_unit_that_is_dead_on_the_example_hides_nothing() -> None:
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.rand(2, 4)
    with torch.no_grad():
        net[0].weight[:6].abs_().neg_()  # dead for every positive input
        net[0].bias[:6].abs_().neg_()
    cut = plan(net, calls=(as_call(x),), ratio=0.3)
    assert mask_equivalence(net, cut, example=x) < 1e-10
    places = cut.kept["0.weight"]
    assert places.dims[0] is not None
    wrong = places._replace(dims=(places.dims[0][[1, 0, *range(2, len(places.dims[0]))]], None))
    wrong = dataclasses.replace(cut, kept={**cut.kept, "0.weight": wrong})
    assert mask_equivalence(net, wrong, example=x) > 1e-4


class Counted(nn.Module):
    """Counts how often it is run, by all of its copies."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3)
        self.w = nn.Parameter(torch.rand(8) + 1)
        self.runs: list[int] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        memo[id(self.runs)] = self.runs
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made

    def forward(self, x: Tensor) -> Tensor:
        self.runs.append(len(x))
        h = self.b(F.relu(self.a(x)))
        return self.o(h * self.w.log()[:, None, None])  # no number where signs are turned


def test_a_right_cut_is_proved_in_few_runs() -> None:
    """One or two to trace it, some to know where it runs and that it responds, and masked and cut ones at two sizes."""
    net = Counted()
    receipt = prune(net, example=torch.randn(2, 3, 9, 9), ratio=0.5)
    assert not [change for change in receipt.skipped if "compute" in change.what]
    assert net.a.out_channels == net.b.out_channels == len(net.w) == 4
    assert len(net.runs) <= 12
