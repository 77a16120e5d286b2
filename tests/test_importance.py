"""Scores and selection, against formulas written out, brute force and torch-pruning where it is right."""

from __future__ import annotations

import itertools
import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

from lightning_accel.errors import AccelError
from lightning_accel.pruning.activations import Statistics, collect, collect_gradients
from lightning_accel.pruning.coupled import gate_gradient, squares
from lightning_accel.pruning.groups import Group, Member
from lightning_accel.pruning.importance import (
    KNOWN,
    check,
    require_gradients,
    score,
)
from lightning_accel.pruning.selection import choose, immovable, kept_width, least
from lightning_accel.surgery.call import Call


def each(count: int, factor: int = 1) -> Tensor:
    """Positions of `count` units of `factor` neighbouring positions."""
    return torch.arange(count * factor).view(count, factor)


def groups_of(net: nn.Sequential, prefix: str = "") -> list[Group]:
    """Find the groups of a plain chain of layers by hand: what one makes, the next one reads."""
    found: list[Group] = []
    name, units, members = "", 0, []
    for index, layer in enumerate(net):
        own = f"{prefix}{index}"
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            if members:
                factor = layer.weight.shape[1] // units
                members.append(Member(f"{own}.weight", 1, "in", each(units, factor)))
                found.append(Group(name, "channels", units, tuple(members), (name,), units))
            name, units = own, layer.weight.shape[0]
            members = [Member(f"{own}.weight", 0, "out", each(units))]
            if layer.bias is not None:
                members.append(Member(f"{own}.bias", 0, "own", each(units)))
        elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            leaves = ("weight", "bias", "running_mean", "running_var")
            members += [Member(f"{own}.{leaf}", 0, "own", each(units)) for leaf in leaves]
    return found


def conv_net() -> nn.Sequential:
    """Convolution, norm, convolution, norm, linear; with norms that are not fresh."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 2),
    )  # fmt: skip
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return net


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 6, 6)


def normalised(scores: Tensor) -> Tensor:
    return scores / scores.mean()


# --- every importance -------------------------------------------------------------------------


def test_units_that_are_chosen_together_have_no_score_of_their_own() -> None:
    net = conv_net()
    with pytest.raises(ValueError, match="ranks no group by itself"):
        score(net, groups_of(net)[0], "reconstruction")


@pytest.mark.parametrize("importance", [name for name in KNOWN if name != "reconstruction"])
def test_every_importance_gives_one_finite_number_per_unit(importance: str) -> None:
    net, x = conv_net(), images()
    groups = groups_of(net)
    measured = collect_gradients(net, groups, (net(x).square().sum() for _ in range(2)))
    measured |= collect(net.eval(), groups, [[Call("", (x,), {})]])
    net(x).square().sum().backward()
    for group in groups:
        found = score(net, group, importance, statistics=measured)
        assert found.shape == (group.units,) and found.dtype == torch.float32
        assert found.isfinite().all() and (found >= 0).all()
        assert len(set(found.tolist())) == group.units
        again = score(net, group, importance, statistics=measured)
        assert torch.equal(found, again)


def test_an_unknown_importance_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"bn_scale.*random"):
        check("size")
    assert check(len) is len


def test_a_function_is_an_importance() -> None:
    net = conv_net()
    group = groups_of(net)[0]
    asked: list[Any] = []

    def mine(model: nn.Module, group: Group) -> Tensor:
        asked.append((model, group.name))
        return torch.arange(6)

    assert score(net, group, mine).tolist() == [0, 1, 2, 3, 4, 5]
    assert asked == [(net, "0")]
    with pytest.raises(ValueError, match=r"6 units, but scores of shape \(3,\)"):
        score(net, group, lambda *_: torch.ones(3))
    with pytest.raises(ValueError, match="not finite"):
        score(net, group, lambda *_: torch.full((6,), math.nan))


@pytest.mark.parametrize("importance", ["magnitude", "fpgm", "lamp", "bn_scale"])
def test_weights_that_are_not_finite_are_an_error(importance: str) -> None:
    net = conv_net()
    with torch.no_grad():
        net[0].weight[1] = net[1].weight[1] = math.inf
    with pytest.raises(ValueError, match="not finite"):
        score(net, groups_of(net)[0], importance)


@pytest.mark.parametrize("importance", ["magnitude", "fpgm", "lamp", "bn_scale"])
def test_weights_that_are_all_zero_score_zero(importance: str) -> None:
    net = conv_net()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert score(net, groups_of(net)[0], importance).tolist() == [0.0] * 6


def test_half_precision_weights_score_as_their_values() -> None:
    net = conv_net().to(torch.bfloat16)
    exact = conv_net()
    exact.load_state_dict(net.state_dict())
    for importance in ("magnitude", "fpgm", "lamp", "bn_scale"):
        half = score(net, groups_of(net)[0], importance)
        assert torch.equal(half, score(exact, groups_of(exact)[0], importance))


# --- magnitude and LAMP -----------------------------------------------------------------------


def test_magnitude_is_the_squared_norm_of_all_coupled_weights() -> None:
    net = conv_net()
    first, second = groups_of(net)
    net.requires_grad_(False)
    expected = [
        float(net[0].weight[u].square().sum() + net[1].weight[u] ** 2)
        + float(net[3].weight[:, u].square().sum())
        for u in range(6)
    ]
    torch.testing.assert_close(score(net, first, "magnitude"), normalised(torch.tensor(expected)))
    columns = net[7].weight.view(2, 4, 4)  # output, channel, place in the image
    expected = [
        float(
            net[3].weight[u].square().sum() + net[4].weight[u] ** 2 + columns[:, u].square().sum()
        )
        for u in range(4)
    ]
    torch.testing.assert_close(score(net, second, "magnitude"), normalised(torch.tensor(expected)))


@pytest.mark.parametrize("importance", ["magnitude", "lamp"])
def test_magnitude_and_lamp_agree_with_torch_pruning(importance: str) -> None:
    torch_pruning = pytest.importorskip("torch_pruning")
    net = conv_net()
    graph = torch_pruning.DependencyGraph().build_dependency(net, images(2))
    scorer = {
        "magnitude": torch_pruning.importance.GroupMagnitudeImportance(
            group_reduction="sum", normalizer="mean"
        ),
        "lamp": torch_pruning.importance.GroupMagnitudeImportance(
            group_reduction="sum", normalizer="lamp"
        ),
    }[importance]
    for layer, group in zip((net[0], net[3]), groups_of(net), strict=True):
        theirs = graph.get_pruning_group(
            layer, torch_pruning.prune_conv_out_channels, list(range(group.units))
        )
        torch.testing.assert_close(score(net, group, importance), scorer(theirs).float())


def test_lamp_is_the_share_among_units_at_least_as_large() -> None:
    net = conv_net()
    group = groups_of(net)[0]
    squared = squares(net, group).tolist()
    expected = [mine / sum(other for other in squared if other >= mine) for mine in squared]
    torch.testing.assert_close(score(net, group, "lamp"), torch.tensor(expected))
    assert score(net, group, "lamp").max() == 1.0


def test_weights_of_heads_count_as_one_unit() -> None:
    heads, width = 3, 2
    net = nn.ModuleDict({"qkv": nn.Linear(5, 3 * 6, bias=False), "proj": nn.Linear(6, 5)})
    columns = each(heads, width)
    rows = torch.cat([columns, columns + 6, columns + 12], dim=1)
    members = (Member("qkv.weight", 0, "out", rows), Member("proj.weight", 1, "in", columns))
    group = Group("qkv", "heads", heads, members, ("qkv",), heads)
    qkv, proj = net["qkv"].weight.view(3, heads, width, 5), net["proj"].weight.view(5, heads, width)
    expected = qkv.square().sum((0, 2, 3)) + proj.square().sum((0, 2))
    torch.testing.assert_close(squares(net, group), expected.double())


def test_a_tied_weight_counts_once() -> None:
    net = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    net["head"].weight = net["embed"].weight
    members = (
        Member("embed.weight", 1, "out", each(4)),
        Member("head.weight", 1, "in", each(4)),
    )
    group = Group("embed", "channels", 4, members, ("embed",), 4)
    torch.testing.assert_close(squares(net, group), net["head"].weight.double().square().sum(0))


def test_a_weight_with_the_group_on_both_sides_counts_rows_and_columns() -> None:
    net = nn.Sequential(nn.Linear(3, 3))
    members = (Member("0.weight", 0, "out", each(3)), Member("0.weight", 1, "in", each(3)))
    squared = net[0].weight.double().square()
    found = squares(net, Group("0", "channels", 3, members, ("0",), 3))
    torch.testing.assert_close(found, squared.sum(0) + squared.sum(1))


# --- batch norm scales ------------------------------------------------------------------------


def test_bn_scale_is_the_mean_absolute_scale() -> None:
    net = conv_net()
    group = groups_of(net)[0]
    torch.testing.assert_close(score(net, group, "bn_scale"), net[1].weight.detach().abs())
    twice = (
        *group.members,
        Member("4.weight", 0, "own", torch.tensor([[0], [1], [2], [3], [0], [1]])),
    )
    both = Group("0", "channels", 6, twice, ("0",), 6)
    expected = (net[1].weight.abs() + net[4].weight[[0, 1, 2, 3, 0, 1]].abs()) / 2
    torch.testing.assert_close(score(net, both, "bn_scale"), expected.detach())


@pytest.mark.parametrize("norm", [nn.Identity(), nn.BatchNorm1d(4, affine=False), nn.LayerNorm(4)])
def test_bn_scale_without_batch_norm_says_so(norm: nn.Module) -> None:
    net = nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 2))
    group = groups_of(net)[0]
    leaf = Member("1.weight", 0, "own", each(4))
    group = Group("0", "channels", 4, (*group.members, leaf), ("0",), 4)
    with pytest.raises(ValueError, match="no batch norm with a scale"):
        score(net, group, "bn_scale")


# --- Taylor -----------------------------------------------------------------------------------


def without(net: nn.Sequential, layer: int, unit: int, factor: float) -> nn.Sequential:
    """Copy a chain in which the columns of one layer that read a unit are scaled."""
    import copy

    copied = copy.deepcopy(net)
    with torch.no_grad():
        columns = copied[layer].weight
        columns.view(len(columns), -1)[:, unit] *= factor
    return copied


def test_taylor_is_the_loss_change_of_a_linear_loss_exactly() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x, direction = torch.randn(16, 3).double(), torch.randn(16, 2).double()

    def loss(model: nn.Module) -> Tensor:
        return (model(x) * direction).sum()  # linear in the columns that read the units

    loss(net).backward()
    found = score(net, groups_of(net)[0], "taylor")
    changes = [(loss(net) - loss(without(net, 2, u, 0.0))).abs().item() for u in range(5)]
    torch.testing.assert_close(found, torch.tensor(changes))


def test_taylor_sees_the_scale_of_a_batch_norm() -> None:
    net, x = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)), torch.randn(8, 3)
    net(x).sum().backward()
    before = score(net, groups_of(net)[0], "taylor")
    with torch.no_grad():
        net[1].weight[2] *= 100.0
        net[1].bias[2] += 1.0
    net.zero_grad()
    net(x).sum().backward()
    after = score(net, groups_of(net)[0], "taylor")
    assert after.argmax() == 2 and after[2] > 10 * before[2]


def test_a_gate_has_the_same_gradient_where_a_unit_is_made_and_where_it_is_read() -> None:
    net = nn.Sequential(
        nn.Linear(3, 5), nn.BatchNorm1d(5, eps=1e-14), nn.ReLU(), nn.Linear(5, 2)
    ).double()
    nn.init.normal_(net[1].weight)
    nn.init.normal_(net[1].bias)
    gate = torch.ones(5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(16, 3).double()
    net[3](net[2](net[1](net[0](x))) * gate).square().sum().backward()
    (group,) = groups_of(net)
    torch.testing.assert_close(gate_gradient(net, group), gate.grad)
    makers = tuple(m for m in group.members if m.role != "in")
    made = Group("0", "channels", 5, makers, ("0",), 5)
    torch.testing.assert_close(gate_gradient(net, made), gate.grad)


def test_the_width_of_heads_is_gated_where_queries_keys_and_values_are_made() -> None:
    net = nn.ModuleDict({name: nn.Linear(3, 4) for name in "qkv"} | {"o": nn.Linear(4, 2)}).double()
    x = torch.randn(5, 3).double()
    gates = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    q, k, v = (net[name](x) * gate for name, gate in zip("qkv", gates, strict=True))
    net["o"]((q @ k.T).softmax(-1) @ v).square().sum().backward()
    leaves = (("weight", "out"), ("bias", "own"))
    members = [Member(f"{n}.{leaf}", 0, role, each(4)) for n in "qkv" for leaf, role in leaves]
    members.append(Member("o.weight", 1, "in", each(4)))  # which sees the values only
    group = Group("q", "width", 4, tuple(members), ("q", "k", "v"), 4)
    torch.testing.assert_close(gate_gradient(net, group), gates.grad.sum(0))


def test_taylor_without_gradients_is_an_error() -> None:
    net = conv_net()
    with pytest.raises(ValueError, match="none of its parameters holds a gradient"):
        score(net, groups_of(net)[0], "taylor")
    with pytest.raises(AccelError, match="loss.backward"):
        require_gradients(net)


def test_taylor2_is_the_mean_of_squares_and_not_the_square_of_a_mean() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    gate = torch.ones(5, dtype=torch.float64, requires_grad=True)
    batches = [torch.randn(4, 3).double() for _ in range(3)]
    expected = torch.zeros(5, dtype=torch.float64)
    for x in batches:
        loss = net[2](net[1](net[0](x)) * gate).square().sum()
        expected += torch.autograd.grad(loss, gate)[0].square() / 3
    groups = groups_of(net)
    measured = collect_gradients(net, groups, (net(x).square().sum() for x in batches))
    found = score(net, groups[0], "taylor2", statistics=measured)
    torch.testing.assert_close(found, expected.float())
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.slow
def test_taylor2_is_the_loss_change_of_a_fitted_model_to_second_order() -> None:
    # Squared error at a perfect fit, one unit-variance target per sample: the Hessian of the gates is
    # E[J^T J] and the Fisher information with sampled labels has the same diagonal.
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(3000, 3).double()
    y = net(x).detach()
    noise = torch.randn_like(y)
    losses = (
        0.5 * (net(x[i : i + 1]) - y[i : i + 1] - noise[i : i + 1]).square().sum()
        for i in range(len(x))
    )
    groups = groups_of(net)
    measured = collect_gradients(net, groups, losses)
    found = score(net, groups[0], "taylor2", statistics=measured)

    def loss(model: nn.Module) -> Tensor:
        return 0.5 * (model(x) - y).square().mean()

    changes = torch.tensor([loss(without(net, 2, u, 0.0)).item() for u in range(4)])
    torch.testing.assert_close(0.5 * found, changes, rtol=0.1, atol=1e-4)


# --- activations ------------------------------------------------------------------------------


def test_activation_is_the_mean_absolute_input_of_the_reader() -> None:
    net, batches = conv_net().eval(), [images(4), images(2)]
    groups = groups_of(net)
    measured = collect(net, groups, [[Call("", (x,), {})] for x in batches])
    x = torch.cat(batches)
    hidden = net[:3](x).double()
    torch.testing.assert_close(measured.activation["0"], hidden.abs().mean((0, 2, 3)))
    hidden = net[:6](x).double()
    torch.testing.assert_close(measured.activation["3"], hidden.abs().mean((0, 2, 3)))
    found = score(net, groups[0], "activation", statistics=measured)
    torch.testing.assert_close(found, normalised(measured.activation["0"]).float())


@pytest.mark.parametrize(
    ("layer", "shape", "channels"),
    [
        (nn.Conv1d(6, 2, 3), (2, 6, 5), 1),
        (nn.Conv2d(6, 2, 1), (6, 4, 4), 0),  # without a batch
        (nn.Conv3d(6, 2, 1), (2, 6, 2, 2, 2), 1),
        (nn.ConvTranspose2d(6, 2, 3), (2, 6, 3, 3), 1),
        (nn.Linear(6, 2), (2, 3, 6), 2),
    ],
)
def test_activations_are_read_along_the_readers_own_dimension(
    layer: nn.Module, shape: tuple[int, ...], channels: int
) -> None:
    net, x = nn.ModuleDict({"reader": layer}), torch.randn(shape)
    dim = 0 if isinstance(layer, nn.ConvTranspose2d) else 1
    group = Group("a", "channels", 6, (Member("reader.weight", dim, "in", each(6)),), ("a",), 6)
    found = collect(net, [group], [[Call("reader", (), {"input": x})]]).activation["a"]
    others = [d for d in range(x.dim()) if d != channels]
    torch.testing.assert_close(found, x.double().abs().mean(others))


def test_a_grouped_convolution_reads_the_same_place_of_every_block() -> None:
    net, x = nn.Sequential(nn.Conv2d(6, 4, 1, groups=2)), torch.randn(2, 6, 3, 3)
    group = Group("a", "channels", 3, (Member("0.weight", 1, "in", each(3)),), ("a",), 3)
    found = collect(net, [group], [[Call("", (x,), {})]]).activation["a"]
    torch.testing.assert_close(found, x.view(2, 2, 3, 3, 3).double().abs().mean((0, 1, 3, 4)))


def test_a_transformer_layer_of_torch_is_measured_in_eval_mode_too() -> None:
    net = nn.TransformerEncoderLayer(8, 2, 6, batch_first=True).eval()
    group = Group(
        "linear1", "channels", 6, (Member("linear2.weight", 1, "in", each(6)),), ("linear1",), 6
    )
    x = torch.randn(2, 3, 8)
    measured = collect(net, [group], [[Call("", (x,), {})]])
    a = net.norm1(x + net.self_attn(x, x, x)[0])
    expected = F.relu(net.linear1(a)).double().abs().mean((0, 1))
    torch.testing.assert_close(
        measured.activation["linear1"], expected.detach(), rtol=1e-4, atol=1e-6
    )


def test_what_never_ran_is_missing_and_says_so() -> None:
    net = conv_net()
    groups = groups_of(net)
    measured = collect(net, groups, [[Call("0", (images(),), {})]])
    assert measured == Statistics()
    with pytest.raises(ValueError, match="nothing was measured"):
        score(net, groups[0], "activation", statistics=measured)
    with pytest.raises(ValueError, match="reads what was measured on data"):
        score(net, groups[0], "taylor2")


def test_measuring_leaves_no_hook_and_no_random_state() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="shape"):
        collect(net, groups_of(net), [[Call("", (torch.randn(2, 4),), {})]])
    torch.set_rng_state(state)
    collect(net, groups_of(net), [[Call("", (torch.ones(2, 3),), {})]])
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_pre_hooks for m in net.modules())


# --- FPGM -------------------------------------------------------------------------------------


def test_fpgm_is_the_sum_of_distances_to_all_other_units() -> None:
    net = conv_net()
    group = groups_of(net)[0]
    rows = net[0].weight.detach().double().flatten(1)
    expected = torch.stack([sum((a - b).norm() for b in rows) for a in rows])
    torch.testing.assert_close(score(net, group, "fpgm"), normalised(expected).float())


def test_fpgm_gives_the_least_score_to_the_unit_at_the_geometric_median() -> None:
    net = nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 2))
    rows = torch.randn(9, 3)
    point = rows.mean(0)
    for _ in range(500):  # Weiszfeld's iteration
        weight = 1 / (rows - point).norm(dim=1)
        point = (weight[:, None] * rows).sum(0) / weight.sum()
    with torch.no_grad():
        net[0].weight.copy_(rows)
        net[0].weight[4] = point + 1e-3
    assert score(net, groups_of(net)[0], "fpgm").argmin() == 4


def test_fpgm_gives_equal_units_equal_scores() -> None:
    net = conv_net()
    with torch.no_grad():
        net[0].weight[1] = net[0].weight[5]
    found = score(net, groups_of(net)[0], "fpgm")
    torch.testing.assert_close(found[1], found[5])


# --- random -----------------------------------------------------------------------------------


def test_random_differs_between_groups_and_not_between_calls_or_seeds() -> None:
    twin = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    one, two = (score(twin, group, "random") for group in groups_of(twin))
    assert not torch.equal(one, two)
    torch.manual_seed(7)
    assert torch.equal(one, score(twin, groups_of(twin)[0], "random"))


# --- selection --------------------------------------------------------------------------------


def plain(name: str, units: int, **given: Any) -> Group:
    factor = given.pop("factor", 1)
    leaves = given.pop("leaves", ("weight",))
    rows = tuple(Member(f"{name}.{leaf}", 0, "out", each(units, factor)) for leaf in leaves)
    return Group(
        name,
        given.pop("kind", "channels"),
        units,
        rows,
        (name,),
        given.pop("dense", units),
        **given,
    )


def test_kept_width_and_least_by_hand() -> None:
    assert [kept_width(10, ratio=r) for r in (0.0, 0.09, 0.1, 0.3, 0.95, 1.0)] == [
        10,
        10,
        9,
        7,
        1,
        1,
    ]
    assert [kept_width(10, ratio=r, round_to=4) for r in (0.1, 0.3, 0.7, 0.99)] == [10, 8, 4, 4]
    assert least(torch.ones(6), kept=3) == [0, 1, 2]
    assert least(torch.tensor([1.0, 5, 2, 4]), kept=3) == [0]
    assert least(torch.tensor([1.0, 5]), kept=2) == least(torch.tensor([1.0, 5]), kept=3) == []


def test_the_global_scope_removes_the_least_of_all() -> None:
    groups = [plain(name, 5) for name in "abc"]
    scores = {name: torch.rand(5) for name in "abc"}
    everything = sorted((float(s), name, i) for name in "abc" for i, s in enumerate(scores[name]))
    for count in range(1, 10):
        found = choose(groups, scores, ratio=count / 15, scope="global")
        expected = {(name, i) for _, name, i in everything[:count]}
        if any(sum(n == name for n, _ in expected) > 4 for name in "abc"):
            continue
        assert {(name, i) for name, gone in found.items() for i in gone} == expected


def test_the_global_scope_empties_no_group_and_skips_none() -> None:
    groups = [plain("weak", 20), plain("strong", 20)]
    scores = {"weak": torch.full((20,), 1e-6), "strong": torch.arange(1.0, 21.0)}
    found = choose(groups, scores, ratio=0.6, scope="global")
    assert len(found["weak"]) == 18  # 90 %
    assert found["strong"] == list(range(6))
    found = choose(groups, scores, ratio=0.999, scope="global")
    assert [len(gone) for gone in found.values()] == [19, 19]


@pytest.mark.parametrize("scope", ["global", "isomorphic"])
def test_ties_are_spread_over_the_groups(scope: str) -> None:
    groups = [plain("wide", 20), plain("narrow", 10)]
    scores = {"wide": torch.ones(20), "narrow": torch.ones(10)}
    for ratio, counts in ((0.1, [2, 1]), (0.5, [10, 5])):
        found = choose(groups, scores, ratio=ratio, scope=scope)
        assert [len(found[name]) for name in ("wide", "narrow")] == counts


def test_the_isomorphic_scope_ranks_within_equal_structures() -> None:
    groups = [plain("a", 4), plain("b", 4), plain("c", 4, leaves=("weight", "bias"))]
    scores = {
        "a": torch.tensor([1.0, 2, 3, 4]),
        "b": torch.tensor([5.0, 6, 7, 8]),
        "c": torch.tensor([90.0, 80, 70, 60]),
    }
    found = choose(groups, scores, ratio=0.375, scope="isomorphic")
    assert found == {"a": [0, 1, 2], "c": [3]}  # 3 of the 8 of a and b, 1 of the 4 of c


def test_linked_groups_keep_the_same_width_and_whole_heads() -> None:
    groups = [
        plain("embed", 24, link=1),
        plain("one", 4, kind="heads", link=1, per_unit=6),
        plain("two", 3, kind="heads", link=1, per_unit=8),
        plain("mlp", 10),
    ]
    scores = {group.name: torch.rand(group.units) for group in groups}
    for scope, ratio in itertools.product(("local", "global", "isomorphic"), (0.3, 0.5, 0.8, 0.99)):
        gone = choose(groups, scores, ratio=ratio, scope=scope)
        left = {(g.units - len(gone.get(g.name, []))) * g.per_unit for g in groups[:3]}
        assert left == {24}  # heads of 6 and of 8: only 24 is a multiple of both
        assert gone["mlp"]
    assert [c.name for c in immovable(groups)] == ["embed", "one", "two"]
    pair = [groups[0], groups[1], groups[3]]
    gone = choose(pair, scores, ratio=0.5)
    assert [len(gone[name]) for name in ("embed", "one", "mlp")] == [12, 2, 5]
    order = scores["one"].argsort()[:2].sort().values.tolist()
    assert gone["one"] == order
    assert immovable(pair) == []


def test_linked_groups_of_different_width_are_an_error() -> None:
    groups = [plain("embed", 24, link=1), plain("heads", 4, kind="heads", link=1, per_unit=5)]
    with pytest.raises(ValueError, match=r"`embed` 24, `heads` 20"):
        choose(groups, {g.name: torch.rand(g.units) for g in groups}, ratio=0.5)


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
def test_rounding_leaves_multiples_or_names_who_cannot(scope: str) -> None:
    groups = [
        plain("wide", 20), plain("blocks", 8, factor=4), plain("narrow", 6),
        plain("heads", 6, kind="heads"), plain("width", 16, kind="width", factor=3),
    ]  # fmt: skip
    scores = {group.name: torch.rand(group.units) for group in groups}
    gone = choose(groups, scores, ratio=0.5, scope=scope, round_to=8)
    left = {g.name: g.units - len(gone.get(g.name, [])) for g in groups}
    assert left["wide"] in (16, 8) and left["narrow"] == 6
    assert left["blocks"] in (2, 4, 6) and left["width"] == 8
    assert 1 <= left["heads"] < 6
    if scope == "local":
        assert left == {"wide": 16, "blocks": 4, "narrow": 6, "heads": 3, "width": 8}
    assert [change.name for change in immovable(groups, round_to=8)] == ["narrow"]
    assert immovable([plain("one", 1)])[0].what == "it has one unit only"


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
def test_the_ratio_is_of_the_dense_network(scope: str) -> None:
    groups = [plain("a", 5, dense=10), plain("b", 5, dense=10)]
    scores = {"a": torch.rand(5), "b": torch.rand(5)}
    assert choose(groups, scores, ratio=0.5, scope=scope) == {}
    assert choose(groups, scores, ratio=0.4, scope=scope) == {}
    gone = choose(groups, scores, ratio=0.7, scope=scope)
    assert sum(map(len, gone.values())) == 4


def test_an_unknown_scope_is_refused() -> None:
    with pytest.raises(ValueError, match="isomorphic"):
        choose([plain("a", 4)], {"a": torch.rand(4)}, ratio=0.5, scope="everywhere")


@st.composite
def some_groups(draw: Any) -> list[Group]:
    groups = [
        plain(
            f"g{i}", units := draw(st.integers(1, 12)), dense=units + draw(st.integers(0, 3)),
            kind=draw(st.sampled_from(["channels", "heads", "width"])),
        )
        for i in range(draw(st.integers(1, 4)))
    ]  # fmt: skip
    if draw(st.booleans()):
        heads, width = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        groups.append(plain("e", heads * width, link=1))
        groups.append(plain("h", heads, kind="heads", link=1, per_unit=width))
    return groups


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    some_groups(),
    st.sampled_from(["local", "global", "isomorphic"]),
    st.one_of(st.none(), st.integers(1, 5)),
    st.integers(0, 10_000),
)
def test_a_larger_ratio_removes_a_superset_and_never_too_much(
    groups: list[Group], scope: str, round_to: int | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {g.name: torch.randint(0, 4, (g.units,), generator=generator).float() for g in groups}
    before: dict[str, set[int]] = {group.name: set() for group in groups}
    dense = sum(group.dense for group in groups)
    for step in range(21):
        gone = choose(groups, scores, ratio=step / 20, scope=scope, round_to=round_to)
        for group in groups:
            now = gone.get(group.name, [])
            assert now == sorted(set(now)) and len(now) < group.units
            assert before[group.name] <= set(now)
            before[group.name] = set(now)
            kept = group.units - len(now)
            if round_to and now and group.kind != "heads":
                assert kept % round_to == 0
            if now and group.units > kept:
                worst_kept = min(scores[group.name][i] for i in range(group.units) if i not in now)
                assert max(scores[group.name][i] for i in now) <= worst_kept
        already = sum(group.dense - group.units for group in groups)
        removed = sum(map(len, gone.values()))
        if removed and scope == "global":
            assert removed + already <= dense * step / 20 + 1e-6


@pytest.mark.parametrize(
    "kind", ["GroupMagnitudeImportance", "LAMPImportance", "FPGMImportance", "RandomImportance"]
)
def test_an_importance_of_torch_pruning_prunes_as_it_does_alone(kind: str) -> None:
    import copy

    import torch_pruning

    from lightning_accel.pruning import prune

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3),
        nn.Flatten(),
        nn.Linear(8 * 16, 4),
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    theirs, made = copy.deepcopy(net), getattr(torch_pruning.importance, kind)
    torch.manual_seed(1)
    torch_pruning.pruner.BasePruner(
        theirs, x, importance=made(), pruning_ratio=0.5, ignored_layers=[theirs[5]]
    ).step()
    torch.manual_seed(1)
    prune(net, example=x, ratio=0.5, importance=made())
    assert [p.shape for p in net.parameters()] == [p.shape for p in theirs.parameters()]
    if kind != "RandomImportance":
        assert torch.equal(net[0].weight, theirs[0].weight) and torch.equal(
            net[5].weight, theirs[5].weight
        )


def test_an_importance_of_torch_pruning_leaves_heads_to_ours() -> None:
    import torch_pruning

    from lightning_accel.errors import NoEffect
    from lightning_accel.pruning import prune

    net = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(-1, (2, 3)), nn.Flatten(), nn.Linear(6, 2))
    with pytest.raises(NoEffect):
        prune(
            net,
            example=torch.randn(2, 4),
            ratio=0.5,
            importance=torch_pruning.importance.GroupMagnitudeImportance(),
        )
