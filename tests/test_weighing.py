"""Layers share what goes by what each costs for what it saves, measured."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_accel.pruning import Macs, prune
from lightning_accel.pruning.importance import score
from lightning_accel.pruning.prune import plan
from lightning_accel.pruning.sensitivity import graph_of
from lightning_accel.pruning.weighing import weighed
from lightning_accel.surgery.call import as_call

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(3))


class Branches(nn.Module):
    """One branch hardly shows in the output, and has the larger weights."""

    def __init__(self) -> None:
        super().__init__()
        self.loud = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        self.quiet = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        with torch.no_grad():
            for p in self.quiet.parameters():
                p *= 3

    def forward(self, x: Tensor) -> Tensor:
        return self.loud(x) + 1e-3 * self.quiet(x)


def test_the_layer_gives_that_costs_least() -> None:
    torch.manual_seed(0)
    by_size, by_cost = Branches(), Branches()
    by_cost.load_state_dict(by_size.state_dict())
    dense = copy.deepcopy(by_size)
    prune(by_size, example=X, ratio=0.4, scope="global")
    prune(by_cost, example=X, ratio=0.4, scope="sensitivity")
    assert by_cost.loud[0].out_features == 16 and by_cost.quiet[0].out_features == 4
    with torch.no_grad():
        errors = [float((net(X) - dense(X)).square().mean()) for net in (by_size, by_cost)]
    assert errors[1] < 1e-3 * errors[0]


def test_prices_are_the_squared_change_per_arithmetic_saved() -> None:
    torch.manual_seed(0)
    net = Branches().double()
    x = X.double()
    graph = graph_of(net, [as_call(x)])
    scores = {g.name: score(graph.model, g, "magnitude") for g in graph.groups}
    prices = weighed(graph, scores, [[as_call(x)]])
    for branch in ("loud", "quiet"):
        order = scores[f"{branch}.0"].argsort(stable=True)
        paid = 0.0
        for count in (
            4,
            8,
            12,
        ):  # by hand: the least ones silenced, the arithmetic of their rows and columns
            silent = copy.deepcopy(net)
            layer = silent.get_submodule(branch)[2]  # type: ignore[index]
            layer.weight.data[:, order[:count]] = 0
            with torch.no_grad():
                error = float(((silent(x) - net(x)).norm() / net(x).norm()).square())
            saved = count * (8 + 4) / (2 * (16 * 8 + 16 * 4))
            slope = (error - paid) / (4 * (8 + 4) / (2 * (16 * 8 + 16 * 4)))
            got = prices[f"{branch}.0"][order[count - 4 : count]]
            assert bool((got >= slope * (1 - 1e-5)).all()) and saved > 0
            if count == 4:
                torch.testing.assert_close(got, torch.full_like(got, slope), rtol=1e-5, atol=0)
            paid = error
        ranked = prices[f"{branch}.0"][order]
        assert bool((ranked.diff() > 0).all())  # the order of the scores stays
        assert float(ranked[12]) == pytest.approx(4 * float(ranked[11]), rel=1e-6)


def test_a_target_is_reached_and_nothing_of_the_network_is_touched() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3))
    net.append(nn.Flatten()).append(nn.Linear(8 * 16, 4))
    before = copy.deepcopy(net.state_dict())
    images, state = torch.randn(16, 3, 8, 8), torch.get_rng_state()
    cut = plan(net, calls=[as_call(images)], target=Macs(0.5), scope="sensitivity")
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    cut.apply(net)
    macs = 36 * 27 * net[0].out_channels + 16 * 9 * net[0].out_channels * net[3].out_channels
    macs += 16 * net[3].out_channels * 4
    assert 0.4 < macs / (36 * 27 * 16 + 16 * 9 * 16 * 8 + 16 * 8 * 4) <= 0.5


@pytest.mark.parametrize("trains", [True, False])
def test_a_norm_that_trains_is_judged_with_the_statistics_that_it_will_have(trains: bool) -> None:
    """By hand: units silenced behind their norm, the next norm's statistics of the batch or those of before."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.BatchNorm1d(6)
    )
    net.append(nn.Linear(6, 2)).double()
    x = 3 + X.double()
    for _ in range(200):
        net(x)  # its statistics are those of its data
    net.train(trains)
    graph = graph_of(net, [as_call(x)])
    scores = {g.name: score(graph.model, g, "magnitude") for g in graph.groups}
    prices = weighed(graph, scores, [[as_call(x)]])["0"]
    order = scores["0"].argsort(stable=True)

    def out(silent: Tensor | list[int]) -> Tensor:
        copied = copy.deepcopy(net).eval()
        copied[3].weight.data[:, silent] = 0
        if trains:
            copied[1].train()  # as is the first norm when the second looks
            before = copied[:4](x)
            copied[1].eval()
            copied[4].running_mean, copied[4].running_var = before.mean(0), before.var(0)
        return copied(x)

    with torch.no_grad():
        wanted = net.eval()(x)
        error = ((out(order[:2]) - wanted).norm() / wanted.norm()).square()
    saved = 2 * (8 + 6) / (8 * 8 + 8 * 6 + 6 * 2)
    assert float(prices[order[0]]) == pytest.approx(float(error) / saved, rel=1e-4)
