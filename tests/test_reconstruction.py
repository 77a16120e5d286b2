"""Reconstruction error, the choices made on it, and compensation: against brute force and lstsq."""

from __future__ import annotations

import itertools
import sys
import threading
import types
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_accel.errors import Unsupported
from lightning_accel.pruning import reconstruction
from lightning_accel.pruning.compensation import compensate
from lightning_accel.pruning.graph import Group, Member
from lightning_accel.pruning.least_squares import solve
from lightning_accel.pruning.lockstep import OutOfStep
from lightning_accel.pruning.reconstruction import (
    GreedySwapSelector,
    energy,
    gram,
    grams,
    greedy,
    swap,
)
from lightning_accel.pruning.unfold import by_block, like_weight, matrix, patches, samples
from lightning_accel.surgery.call import Call


def _group(units: int, *readers: str, dim: int = 1, each: int = 1, name: str = "0") -> Group:
    positions = torch.arange(units * each).view(units, each)
    members = tuple(Member(f"{reader}.weight", dim, "in", positions) for reader in readers)
    return Group(name, "channels", units, members, (name,), units)


def _batches(*inputs: Tensor) -> list[list[Call]]:
    return [[Call("", (x,), {})] for x in inputs]


def _error(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().square().sum())


class Conv1D(nn.Module):
    """GPT-2's layer, as transformers has it: the weight is (inputs, outputs)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight).view(
            *x.shape[:-1], self.nf
        )


LAYERS = {
    "linear": (nn.Linear(4, 3), (6, 4)),
    "tokens": (nn.Linear(4, 3), (2, 5, 4)),
    "gpt2": (Conv1D(3, 4), (2, 5, 4)),
    "conv1d": (nn.Conv1d(4, 3, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 3, (3, 2), stride=(1, 2), padding=(2, 0)), (2, 4, 6, 7)),
    "unbatched": (nn.Conv2d(4, 3, 3), (4, 6, 7)),
    "dilated": (nn.Conv2d(4, 3, 3, dilation=2, padding="same"), (2, 4, 6, 7)),
    "circular": (nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"), (2, 4, 6, 7)),
    "even": (nn.Conv2d(4, 3, (4, 2), padding="same"), (2, 4, 6, 7)),
    "valid": (nn.Conv2d(4, 3, 3, padding="valid"), (2, 4, 6, 7)),
    "conv3d": (nn.Conv3d(4, 3, 2, padding=1), (2, 4, 3, 4, 3)),
    "transposed": (
        nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1),
        (2, 4, 5, 4),
    ),
    "transposed, wide": (nn.ConvTranspose1d(4, 3, 3, padding=3, dilation=2), (2, 4, 9)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", LAYERS)
def test_patches_times_matrix_is_the_layer(name: str) -> None:
    layer, shape = LAYERS[name]
    layer = layer.double()
    x = torch.randn(shape, dtype=torch.float64)
    found = patches(layer, samples(layer, x)) @ matrix(layer, layer.weight).mT + layer.bias
    torch.testing.assert_close(found, by_block(layer, samples(layer, layer(x))))
    torch.testing.assert_close(like_weight(layer, matrix(layer, layer.weight)), layer.weight.data)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("wide", [False, True], ids=["products", "contributions"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_gram_is_the_error_measured_by_zeroing_channels(
    name: str, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wide:
        monkeypatch.setattr(reconstruction, "_WIDE", 1)
        monkeypatch.setattr(reconstruction, "PIECE", 64)
    monkeypatch.setattr("lightning_accel.pruning.unfold.PIECE", 300)  # a sample or two at a time
    layer, shape = LAYERS[name]
    layer = layer.double()
    net = nn.Sequential(layer)
    batches = [torch.randn(shape, dtype=torch.float64) for _ in range(2)]
    group = _group(4, "0", dim=0 if name in ("gpt2", "transposed", "transposed, wide") else 1)
    found = gram(net, group, _batches(*batches))
    axis = -1 if name in ("linear", "tokens", "gpt2") else 0 if name == "unbatched" else 1
    for count in range(5):
        for removed in itertools.combinations(range(4), count):
            error = 0.0
            for x in batches:
                kept = x.clone()
                kept.movedim(axis, 0)[list(removed)] = 0.0
                error += _error(layer(x), layer(kept))
            assert energy(found, removed) == pytest.approx(error, rel=1e-9, abs=1e-9)


def test_the_gram_of_a_grouped_convolution_counts_the_same_place_of_every_block() -> None:
    layer = nn.Conv2d(6, 4, 3, groups=2, bias=False).double()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    found = gram(nn.Sequential(layer), _group(3, "0"), _batches(x))
    kept = x.clone()
    kept[:, [0, 2, 3, 5]] = 0.0
    assert energy(found, [0, 2]) == pytest.approx(_error(layer(x), layer(kept)))


def test_the_gram_looks_through_a_depthwise_convolution_to_the_layer_that_reads_it() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 3, 1)
    ).double()
    x = torch.randn(3, 1, 9, 9, dtype=torch.float64)
    each = torch.arange(4)[:, None]
    members = (
        Member("0.weight", 0, "out", each),
        Member("2.weight", 0, "out", each),
        Member("4.weight", 1, "in", each),
    )
    found = gram(net, Group("0", "channels", 4, members, ("0", "2"), 4), _batches(x))
    whole = net(x)
    with torch.no_grad():
        net[4].weight[:, [1, 3]] = 0.0
    error = _error(whole, net(x))
    assert energy(found, [1, 3]) == pytest.approx(error)


def test_consumers_add_up_and_units_take_all_of_their_positions() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.a(x), self.b(x), self.b(2 * x)], -1)  # one layer is called twice

    net = Two().double()
    x = torch.randn(7, 6, dtype=torch.float64)
    found = gram(net, _group(3, "a", "b", each=2), _batches(x[:4], x[4:]))
    kept = x.clone()
    kept[:, [0, 1, 4, 5]] = 0.0
    assert energy(found, [0, 2]) == pytest.approx(_error(net(x), net(kept)))


def test_consumers_that_cannot_be_read_are_left_out_by_name() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)
            self.pair = nn.Bilinear(4, 4, 2)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            y = self.good(x) + F.linear(x, self.unused.weight)
            return y + self.pair(x, x) + self.normed(x)

    net = Odd()
    found = grams(net, [_group(4, "good", "unused", "pair", "normed")], _batches(torch.randn(3, 4)))
    only = gram(net, _group(4, "good"), _batches(torch.ones(1, 4)))
    assert set(found.of) == {"0"} and only.dtype == torch.float64
    assert {change.name for change in found.left_out} == {"unused", "pair", "normed"}
    with pytest.raises(ValueError, match="Bilinear"):
        gram(net, _group(4, "pair"), _batches(torch.randn(3, 4)))


def test_measuring_leaves_flags_statistics_and_random_state() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    net[1].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    gram(net, _group(4, "3"), _batches(torch.randn(8, 4, generator=torch.Generator())))
    assert net.training and net[3].training and not net[1].training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_pre_hooks for m in net.modules())


# -- choosing ----------------------------------------------------------------------------------------


def _random_gram(units: int, seed: int, redundant: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    made = normal(units, 200)
    if redundant:
        hidden = max(2, units // 6)
        made = normal(units, hidden) @ normal(hidden, 200) + 0.3 * made
    made = made * normal(units, 1).mul(0.5).exp()
    return made @ made.T


def _brute_force(matrix_uu: Tensor, remove: int) -> float:
    every = itertools.combinations(range(len(matrix_uu)), remove)
    return min(energy(matrix_uu, removed) for removed in every)


def test_energy_is_the_quadratic_form() -> None:
    found = _random_gram(9, 0)
    z = torch.zeros(9, dtype=torch.float64)
    z[[1, 4, 8]] = 1.0
    assert energy(found, [1, 4, 8]) == pytest.approx(float(z @ found @ z))
    assert energy(found, []) == 0.0


@pytest.mark.parametrize("remove", [0, 1, 5, 9, 10])
def test_greedy_and_swap_remove_exactly_as_many_as_asked_and_swap_is_never_worse(
    remove: int,
) -> None:
    for seed in range(20):
        found = _random_gram(10, seed)
        first = greedy(found, remove)
        polished = GreedySwapSelector()(found, remove)
        assert len(set(first)) == len(set(polished)) == remove and polished == sorted(polished)
        assert energy(found, polished) <= energy(found, first) + 1e-9


def test_greedy_adds_the_unit_that_raises_the_error_least() -> None:
    for seed in range(5):
        found = _random_gram(9, seed)
        removed: list[int] = []
        for count in range(1, 9):
            rest = set(range(9)) - set(removed)
            removed.append(min(rest, key=lambda unit: energy(found, [*removed, unit])))
            assert greedy(found, count) == sorted(removed)


def test_no_single_swap_lowers_the_error_after_swap() -> None:
    for seed in range(10):
        found = _random_gram(9, seed)
        removed = swap(found, [0, 1, 2, 3])
        lowest = energy(found, removed)
        for back in removed:
            for go in set(range(9)) - set(removed):
                other = [u for u in removed if u != back] + [go]
                assert energy(found, other) >= lowest - 1e-9


def _duplicated() -> tuple[nn.Module, Group, Tensor]:
    """Eight channels, of which 4 to 7 are copies of 0 to 3; each pair makes twice one contribution."""
    net = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 6)).double()
    with torch.no_grad():
        net[0].weight[4:] = net[0].weight[:4]
        net[0].bias[4:] = net[0].bias[:4]
        net[1].weight[:, 4:] = net[1].weight[:, :4]
    return net, _group(8, "1"), torch.randn(64, 5, dtype=torch.float64)


def test_one_of_each_pair_of_equal_channels_is_kept() -> None:
    net, group, x = _duplicated()
    with (
        torch.no_grad()
    ):  # contributions of different pairs do not overlap: only pairs are redundant
        net[1].weight.zero_()
        net[1].weight[:4, :4] = net[1].weight[:4, 4:] = torch.eye(4, dtype=torch.float64)
    removed = GreedySwapSelector()(gram(net, group, _batches(x)), 4)
    assert sorted(unit % 4 for unit in removed) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("matrix_uu", "remove"),
    [
        (torch.ones(2, 3), 1),
        (torch.tensor([[float("nan")]]), 1),
        (torch.eye(2), 3),
        (torch.eye(2), -1),
    ],
)
def test_a_gram_or_number_that_is_none_is_refused(matrix_uu: Tensor, remove: int) -> None:
    with pytest.raises(ValueError, match=r"gram|remove"):
        GreedySwapSelector()(matrix_uu, remove)


# -- the QUBO ----------------------------------------------------------------------------------------


@pytest.fixture
def qubo() -> Any:
    pytest.importorskip("dimod")
    pytest.importorskip("dwave.samplers")
    from lightning_accel.pruning import qubo

    return qubo


def test_the_encoded_energy_is_the_error_plus_the_penalty(qubo: Any) -> None:
    found = _random_gram(8, 1)
    known = GreedySwapSelector()(found, 4)
    free = [0, 2, 3, 6, 7]
    linear, quadratic, count = qubo.subproblem(found, known, free)
    model = qubo.encode(linear, quadratic, count, penalty=2.5)
    scale = float(quadratic.abs().max())
    fixed = [u for u in known if u not in free]
    for bits in itertools.product([0, 1], repeat=5):
        removed = fixed + [u for u, bit in zip(free, bits, strict=True) if bit]
        wanted = energy(found, removed) - energy(found, fixed) + 2.5 * (sum(bits) - count) ** 2
        got = scale * model.energy(dict(enumerate(bits)))
        assert got == pytest.approx(wanted, abs=1e-8)


@pytest.mark.parametrize("sampler", ["exact", "sa", "sqa", "tabu", "greedy"])
def test_every_sampler_is_no_worse_than_greedy_and_swap(qubo: Any, sampler: str) -> None:
    for seed, remove in ((0, 6), (1, 3), (2, 9)):
        found = _random_gram(12, seed, redundant=seed != 1)
        select = qubo.QuboSelector(sampler, num_reads=8, num_sweeps=200)
        removed = select(found, remove)
        assert len(set(removed)) == remove and removed == sorted(removed)
        assert energy(found, removed) <= energy(found, GreedySwapSelector()(found, remove)) + 1e-9
        if sampler == "exact":
            assert energy(found, removed) == pytest.approx(_brute_force(found, remove))
        assert select.report.sampler == sampler and select.report.variables == 12


@pytest.mark.parametrize("sampler", ["sa", "tabu", "greedy"])  # "sqa" ignores its seed
def test_the_same_seed_gives_the_same_choice_never_worse_than_greedy_and_swap(
    qubo: Any, sampler: str
) -> None:
    found = _random_gram(40, 3)
    kwargs: dict[str, Any] = {"num_reads": 4, "num_sweeps": 50, "seed": 5}
    first, second = (qubo.QuboSelector(sampler, **kwargs) for _ in range(2))
    removed = first(found, 20)
    assert removed == second(found, 20) == first(found, 20)
    report = first.report
    assert report.energy == pytest.approx(energy(found, removed))
    assert report.greedy_energy == pytest.approx(energy(found, GreedySwapSelector()(found, 20)))
    assert report.energy <= report.greedy_energy and 0 <= report.gap < 1
    assert 0 <= report.feasible <= 1 and report.seconds > 0 and not report.fallback


def test_it_is_better_than_greedy_and_swap_where_channels_are_redundant(qubo: Any) -> None:
    gaps = []
    for seed in range(4):
        select = qubo.QuboSelector()
        select(_random_gram(64, seed), 32)
        gaps.append(select.report.gap)
    assert sum(gaps) / 4 > 0.02


def test_large_groups_are_cut_down_to_the_most_ambiguous_units(qubo: Any) -> None:
    found = _random_gram(50, 4)
    select = qubo.QuboSelector(max_variables=12, num_reads=4, num_sweeps=50)
    removed = select(found, 25)
    assert select.report.variables == 12 and len(set(removed)) == 25
    assert select.report.energy <= select.report.greedy_energy


def test_samples_of_a_wrong_number_of_units_are_repaired(qubo: Any) -> None:
    found = _random_gram(9, 6)
    known = GreedySwapSelector()(found, 4)
    free = list(range(9))
    for row in ([0] * 9, [1] * 9, [1, 1, 0, 0, 0, 0, 0, 0, 0]):
        removed, feasible = qubo.decode(found, known, free, torch.tensor([row]))
        assert len(removed) == 4 and feasible == 0.0
        assert energy(found, removed) <= energy(found, known)
    fixed = qubo.repair(found, [0, 1, 2, 3, 4, 5], [3, 4, 5, 6], 3)
    assert fixed == [0, 1, 2]  # only free units are put back


@pytest.mark.parametrize("remove", [0, 6])
def test_nothing_or_everything_is_removed_without_a_sampler(qubo: Any, remove: int) -> None:
    select = qubo.QuboSelector()
    assert select(_random_gram(6, 0), remove) == list(range(remove))
    assert select(torch.zeros(6, 6), 2) == [0, 1]


def test_wrong_arguments_are_refused(qubo: Any) -> None:
    with pytest.raises(ValueError, match="sqa"):
        qubo.QuboSelector("annealer")
    for kwargs in ({"num_reads": 0}, {"penalty": -1.0}, {"max_variables": 1.5}, {"timeout_s": 0}):
        with pytest.raises((ValueError, TypeError), match=next(iter(kwargs))):
            qubo.QuboSelector(**kwargs)
    with pytest.raises(ValueError, match="at most 20"):
        qubo.QuboSelector("exact")(_random_gram(21, 0), 10)


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_accel.pruning.qubo import QuboSelector

    monkeypatch.setitem(sys.modules, "dimod", None)
    with pytest.raises(ImportError, match=r"pip install lightning-accel\[quantum\]"):
        QuboSelector()


TOKEN = "DEV-0123456789abcdef"


def _fake_device(monkeypatch: pytest.MonkeyPatch, *, clique: int, sample: Any) -> list[int]:
    """Put a stand-in for dwave-system in place; return the sizes of the problems it was given."""
    sizes: list[int] = []

    class DWaveCliqueSampler:
        largest_clique_size = clique

        def sample(self, model: Any, num_reads: int) -> Any:
            sizes.append(model.num_variables)
            return sample(model)

    module = types.ModuleType("dwave.system")
    module.DWaveCliqueSampler = DWaveCliqueSampler  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dwave.system", module)
    monkeypatch.setenv("DWAVE_API_TOKEN", TOKEN)
    return sizes


def test_a_qpu_is_given_the_problem_and_its_samples_are_decoded(
    qubo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dimod

    sizes = _fake_device(
        monkeypatch, clique=12, sample=lambda model: dimod.ExactSolver().sample(model)
    )
    found = _random_gram(10, 2)
    select = qubo.QuboSelector("dwave")
    assert energy(found, select(found, 5)) == pytest.approx(_brute_force(found, 5))
    assert sizes == [10] and select.report.sampler == "dwave" and not select.report.fallback
    assert TOKEN not in repr(vars(select))


def test_errors_of_a_qpu_fall_back_to_the_simulator_with_a_warning_without_the_token(
    qubo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Any) -> Any:
        raise RuntimeError(f"401 for token {TOKEN}")

    _fake_device(monkeypatch, clique=99, sample=broken)
    found = _random_gram(10, 2)
    select = qubo.QuboSelector("dwave")
    with pytest.warns(UserWarning, match="401") as caught:
        removed = select(found, 5)
    assert removed == qubo.QuboSelector("sa")(found, 5)
    assert select.report.sampler == "sa" and "401" in select.report.fallback
    assert TOKEN not in str(caught[0].message) + repr(select.report)


def test_a_qpu_that_is_too_small_or_too_slow_is_not_waited_for(
    qubo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    found = _random_gram(10, 2)
    _fake_device(monkeypatch, clique=99, sample=lambda _: release.wait(20))
    with pytest.warns(UserWarning, match=r"no answer within 0\.05 s"):
        qubo.QuboSelector("dwave", timeout_s=0.05)(found, 5)
    release.set()
    sizes = _fake_device(monkeypatch, clique=8, sample=None)
    with pytest.warns(UserWarning, match="max_variables=8"):
        qubo.QuboSelector("dwave")(found, 5)
    assert not sizes


def test_a_qpu_needs_its_package_and_a_token(qubo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _random_gram(6, 2)
    _fake_device(monkeypatch, clique=8, sample=None)
    monkeypatch.delenv("DWAVE_API_TOKEN")
    with pytest.raises(Unsupported, match="DWAVE_API_TOKEN"):
        qubo.QuboSelector("dwave")(found, 3)
    monkeypatch.setitem(sys.modules, "dwave.system", None)
    with pytest.raises(Unsupported, match="pip install dwave-system"):
        qubo.QuboSelector("dwave")(found, 3)


# -- compensation ------------------------------------------------------------------------------------


def test_solving_equals_lstsq() -> None:
    x, y = torch.randn(40, 7, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
    wanted = torch.linalg.lstsq(x, y).solution
    torch.testing.assert_close(solve(x.T @ x, x.T @ y), wanted, rtol=1e-9, atol=1e-10)


def test_solving_with_a_ridge_equals_lstsq_of_the_extended_data_and_leaves_the_bias_free() -> None:
    x, y = torch.randn(40, 7, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
    x = F.pad(x, (0, 1), value=1.0)
    found = solve(x.T @ x, x.T @ y, ridge=0.3, free=1)
    pull = (0.3 * (x[:, :7].square().sum(0)).mean()).sqrt()
    more = pull * torch.eye(8, dtype=torch.float64)[:7]
    wanted = torch.linalg.lstsq(torch.cat([x, more]), F.pad(y, (0, 0, 0, 7))).solution
    torch.testing.assert_close(found, wanted)


def test_solving_dependent_inputs_gives_the_solution_of_least_norm() -> None:
    x, y = torch.randn(40, 4, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
    x = torch.cat([x, x[:, :2], torch.zeros(40, 1)], 1)  # two copies and a dead channel
    found = solve(x.T @ x, x.T @ y)
    wanted = torch.linalg.lstsq(x, y, driver="gelsd").solution
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


def _conv_net(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2, bias=bias),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 9, 5, bias=bias),
    )


def _conv_groups() -> list[Group]:
    def group(name: str, reader: str, units: int, each: int) -> Group:
        one = torch.arange(units)[:, None]
        many = torch.arange(units * each).view(units, each)
        members = (
            Member(f"{name}.weight", 0, "out", one),
            Member(f"{reader}.weight", 1, "in", many),
        )
        return Group(name, "channels", units, members, (name,), units)

    return [group("0", "2", 8, 1), group("2", "5", 6, 9)]


def _cut_conv(net: nn.Sequential, gone: dict[str, list[int]]) -> nn.Sequential:
    a = [i for i in range(8) if i not in gone.get("0", [])]
    b = [i for i in range(6) if i not in gone.get("2", [])]
    places = [9 * i + j for i in b for j in range(9)]
    small = _conv_net(bias=net[2].bias is not None).to(net[0].weight.dtype)
    small[0], small[2] = nn.Conv2d(1, len(a), 3, padding=1), nn.Conv2d(len(a), len(b), 3, stride=2)
    small[5] = nn.Linear(len(places), 5)
    for layer, rows, columns in ((0, a, [0]), (2, b, a), (5, range(5), places)):
        old = net[layer]
        small[layer].weight = nn.Parameter(old.weight.detach()[list(rows)][:, columns].clone())
        small[layer].bias = (
            None if old.bias is None else nn.Parameter(old.bias.detach()[list(rows)].clone())
        )
    return small


def _install(model: nn.Module, values: dict[str, Tensor]) -> None:
    assert not model.load_state_dict(values, strict=False).unexpected_keys


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_compensation_equals_lstsq_layer_by_layer_on_the_pruned_networks_inputs(bias: bool) -> None:
    dense = _conv_net(bias).double()
    gone = {"0": [1, 4, 5], "2": [0, 3]}
    small = _cut_conv(dense, gone)
    x = torch.randn(60, 1, 8, 8, dtype=torch.float64)
    before = {k: v.clone() for k, v in small.state_dict().items()}
    found = compensate(
        dense,
        small,
        groups=_conv_groups(),
        gone=gone,
        batches=_batches(x[:30], x[30:]),
        ridge=1e-14,
    )
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items()), "it was changed"
    leaves = ("weight", "bias") if bias else ("weight",)
    assert set(found.values) == {f"{layer}.{leaf}" for layer in "25" for leaf in leaves}
    _install(small, found.values)
    for layer in (2, 5):
        wanted = dense[: layer + 1](x).detach()
        wanted = wanted[:, [1, 2, 4, 5]] if layer == 2 else wanted
        rows = patches(small[layer], small[:layer](x).detach())[0]
        rows = F.pad(rows, (0, int(bias)), value=1.0)
        best = torch.linalg.lstsq(rows, by_block(small[layer], wanted)[0]).solution
        torch.testing.assert_close(
            matrix(small[layer], small[layer].weight)[0].T,
            best[: len(best) - bias],
            rtol=1e-5,
            atol=1e-7,
        )
        if bias:
            torch.testing.assert_close(small[layer].bias.data, best[-1], rtol=1e-5, atol=1e-7)
        error = _error(small[layer](small[:layer](x)), wanted)
        assert found.errors[str(layer)][1] == pytest.approx(error, rel=1e-6)


def test_compensation_lowers_the_error_of_every_layer_and_of_the_output() -> None:
    dense = _conv_net()
    gone = {"0": [1, 4, 5], "2": [0, 3]}
    small = _cut_conv(dense, gone)
    x, unseen = (F.avg_pool2d(torch.randn(n, 1, 16, 16), 2) for n in (512, 64))
    found = compensate(dense, small, groups=_conv_groups(), gone=gone, batches=_batches(x))
    raw = F.mse_loss(small(unseen), dense(unseen))
    _install(small, found.values)
    assert F.mse_loss(small(unseen), dense(unseen)) < 0.9 * raw
    assert all(0 <= after < before for before, after in found.errors.values())
    assert found.values["2.weight"].dtype == torch.float32


@pytest.mark.parametrize("samples_", [1, 3, 40])
@pytest.mark.parametrize("ridge", [1e-12, 1e-3, 10.0])
def test_compensation_is_never_worse_on_its_data_even_with_too_few_of_them(
    samples_: int, ridge: float
) -> None:
    dense = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    gone = {"0": [2, 6]}
    kept = [0, 1, 3, 4, 5, 7]
    small = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    state = {"0.weight": dense[0].weight[kept], "0.bias": dense[0].bias[kept]}
    small.load_state_dict(state | {"2.weight": dense[2].weight[:, kept], "2.bias": dense[2].bias})
    x = torch.randn(samples_, 4)
    before = (small(x) - dense(x)).double().square().sum(0)
    found = compensate(
        dense, small, groups=[_group(8, "2")], gone=gone, batches=_batches(x), ridge=ridge
    )
    _install(small, found.values)
    after = (small(x) - dense(x)).double().square().sum(0)
    assert (after <= before + 1e-10).all()
    assert all(torch.isfinite(value).all() for value in found.values.values())


def test_an_output_that_rounding_would_make_worse_keeps_its_weights() -> None:
    kept, changed = [0, 1, 2, 3, 4], 0
    for seed in range(8):
        torch.manual_seed(seed)
        dense = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 16))
        with torch.no_grad():
            dense[2].weight[:, 5] *= 0.01  # what is lost is of the size of a bfloat16's last bit
        dense = dense.bfloat16()
        small = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 16)).bfloat16()
        state = {"0.weight": dense[0].weight[kept], "0.bias": dense[0].bias[kept]}
        small.load_state_dict(
            state | {"2.weight": dense[2].weight[:, kept], "2.bias": dense[2].bias}
        )
        x = torch.randn(200, 4).bfloat16()
        given, wanted = small[:2](x).detach().double(), dense(x).detach().double()
        before = (F.linear(given, *map(_double, small[2].parameters())) - wanted).square().sum(0)
        found = compensate(
            dense, small, groups=[_group(6, "2")], gone={"0": [5]}, batches=_batches(x)
        )
        _install(small, found.values)
        after = (F.linear(given, *map(_double, small[2].parameters())) - wanted).square().sum(0)
        assert (after <= before).all()
        changed += int((after < before).sum())
    assert changed > 0


def _double(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().double()


def test_a_linear_network_with_redundant_channels_is_restored_exactly() -> None:
    torch.manual_seed(0)
    dense, _, x = _duplicated()  # eight channels of a four-dimensional space and a constant
    with torch.no_grad():
        dense[0].weight[5:] = dense[0].weight[:3] - dense[0].weight[1:4]
        dense[0].bias[5:] = 0.7
    kept = [0, 1, 2, 3]
    small = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 6)).double()
    state = {"0.weight": dense[0].weight[kept], "0.bias": dense[0].bias[kept]}
    small.load_state_dict(state | {"1.weight": dense[1].weight[:, kept], "1.bias": dense[1].bias})
    assert not torch.allclose(small(x), dense(x))
    found = compensate(
        dense,
        small,
        groups=[_group(8, "1")],
        gone={"0": [4, 5, 6, 7]},
        batches=_batches(x),
        ridge=1e-13,
    )
    _install(small, found.values)
    unseen = torch.randn(20, 5, dtype=torch.float64)
    torch.testing.assert_close(small(unseen), dense(unseen), rtol=0, atol=1e-8)
    before, after = found.errors["1"]
    assert after < 1e-12 * before


@pytest.mark.parametrize("name", ["gpt2", "transposed", "grouped"])
def test_layers_of_other_layouts_are_compensated_too(name: str) -> None:
    layers = {
        "gpt2": (Conv1D(3, 4), Conv1D(3, 2), (50, 4)),
        "transposed": (
            nn.ConvTranspose1d(4, 3, 3, stride=2),
            nn.ConvTranspose1d(2, 3, 3, stride=2),
            (30, 4, 6),
        ),
        "grouped": (nn.Conv1d(8, 4, 3, groups=2), nn.Conv1d(4, 4, 3, groups=2), (30, 8, 6)),
    }
    big, small, shape = layers[name]
    kept = [0, 3, 4, 7] if name == "grouped" else [0, 3]

    class Select(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, kept] if x.dim() == 3 else x[..., kept]

    with torch.no_grad():
        small.bias.copy_(big.bias)
        small.weight.copy_(big.weight[:, [0, 3]] if name == "grouped" else big.weight[[0, 3]])
    dense, cut = nn.Sequential(nn.Identity(), big), nn.Sequential(Select(), small)
    x = torch.randn(shape)
    mixed = torch.randn(shape[1], shape[1])
    x = torch.tensordot(x, mixed, ([1], [0])).movedim(-1, 1)  # correlated channels
    group = _group(4, "1", dim=1 if name == "grouped" else 0)
    found = compensate(dense, cut, groups=[group], gone={"0": [1, 2]}, batches=_batches(x))
    raw = _error(cut(x), dense(x))
    _install(cut, found.values)
    solved = _error(cut(x), dense(x))
    assert solved < raw
    assert found.errors["1"] == pytest.approx((raw, solved), rel=1e-4)


def test_frozen_tied_and_unreadable_layers_are_left_out_and_named() -> None:
    class Net(nn.Module):
        def __init__(self, width: int = 4) -> None:
            super().__init__()
            self.first = nn.Linear(3, width)
            self.frozen, self.tied, self.same = (nn.Linear(width, 3) for _ in range(3))
            self.same.weight = self.tied.weight
            self.part = nn.Linear(width, 3)
            self.pair = nn.Bilinear(width, width, 3)
            self.frozen.weight.requires_grad_(False)
            self.part.bias.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            y = self.frozen(x) + self.tied(x) + self.same(x) + self.part(x)
            return y + self.pair(x, x)

    dense, cut = Net(4), Net(3)
    readers = ("frozen", "tied", "same", "part", "pair")
    found = compensate(
        dense,
        cut,
        groups=[_group(4, *readers, name="first")],
        gone={"first": [3]},
        batches=_batches(torch.randn(20, 3)),
    )
    assert set(found.values) == {"part.weight"}
    assert {change.name for change in found.left_out} == {"frozen", "tied", "same", "pair"}


def test_layers_that_are_called_otherwise_are_left_out() -> None:
    class Routed(nn.Module):
        def __init__(self, width: int, most: int) -> None:
            super().__init__()
            self.first, self.expert = nn.Linear(3, width), nn.Linear(width, 2)
            self.most = most

        def forward(self, x: Tensor) -> Tensor:
            return self.expert(self.first(x)[: self.most])

    groups, batches = [_group(4, "expert", name="first")], _batches(torch.randn(6, 3))
    arguments: dict[str, Any] = {"groups": groups, "gone": {"first": [3]}, "batches": batches}
    found = compensate(Routed(4, 3), Routed(3, 2), **arguments)
    assert not found.values and "same way" in found.left_out[0].what
    assert compensate(Routed(4, 0), Routed(3, 0), **arguments).errors == {"expert": (0.0, 0.0)}


def test_a_wide_layer_is_solved_block_after_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_accel.pruning.least_squares.WIDE", 3)
    dense = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    kept = [0, 1, 3, 4, 5, 7]
    small = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    state = {"0.weight": dense[0].weight[kept], "0.bias": dense[0].bias[kept]}
    small.load_state_dict(state | {"2.weight": dense[2].weight[:, kept], "2.bias": dense[2].bias})
    x = torch.randn(50, 4, dtype=torch.float64)
    hidden = F.pad(small[:2](x), (0, 1), value=1.0).detach()
    rows = torch.cat([small[2].weight, small[2].bias[:, None]], 1).detach().T.clone()
    for block in (slice(0, 3), slice(3, 6), slice(6, 7)):
        missing = dense(x).detach() - hidden @ rows
        rows[block] += torch.linalg.lstsq(hidden[:, block], missing).solution
    options: dict[str, Any] = {"groups": [_group(8, "2")], "gone": {"0": [2, 6]}, "ridge": 1e-12}
    found = compensate(dense, small, batches=_batches(x[:20], x[20:]), **options)
    torch.testing.assert_close(found.values["2.weight"], rows[:6].T, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.values["2.bias"], rows[6], rtol=1e-6, atol=1e-8)
    error = (hidden @ rows - dense(x).detach()).square().sum()
    assert found.errors["2"][1] == pytest.approx(float(error), rel=1e-6)


class Chain(nn.Module):
    """Keeps what it needs later on itself, draws noise in every mode, and may call its middle layer again."""

    def __init__(self, widths: list[int], *, again: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(5, widths[0]), *map(nn.Linear, widths, [widths[1], 4]))
        self.again, self.calls = again, 0
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.kept.append(x[:, :4])
        x = torch.tanh(self.a(x)) + 0.1 * torch.rand(len(x), 1)
        x = torch.tanh(self.b(x)) * torch.rand(len(x), 1)
        if self.again:
            x = x + torch.tanh(self.b(torch.tanh(self.a(x[:, :5])))) if x.shape[1] > 4 else x
        return self.c(x) + self.kept.pop()


def _chain(*, again: bool = False) -> tuple[Chain, Chain, dict[str, Any]]:
    dense, small = Chain([8, 7], again=again), Chain([6, 5], again=again)
    rows, inner = [0, 1, 2, 4, 6, 7], [0, 2, 3, 4, 6]
    state = dense.state_dict()
    kept = {k: v[{"a": rows, "b": inner}.get(k[0], slice(None))] for k, v in state.items()}
    kept["b.weight"], kept["c.weight"] = kept["b.weight"][:, rows], kept["c.weight"][:, inner]
    small.load_state_dict(kept)
    unit = lambda n: torch.arange(n)[:, None]  # noqa: E731
    groups = [
        Group("a", "channels", 8, (Member("b.weight", 1, "in", unit(8)),), ("a",), 8),
        Group(
            "b",
            "channels",
            7,
            (Member("b.weight", 0, "out", unit(7)), Member("c.weight", 1, "in", unit(7))),
            ("b",),
            7,
        ),
    ]
    return dense, small, {"groups": groups, "gone": {"a": [3, 5], "b": [1, 5]}}


@pytest.mark.parametrize("again", [False, True])
def test_forwards_in_step_find_what_forwards_made_anew_find(
    monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    dense, small, asked = _chain(again=again)
    data = _batches(*torch.randn(5, 40, 5))
    state = torch.get_rng_state()
    found = compensate(dense, small, batches=data, **asked)
    assert torch.equal(torch.get_rng_state(), state)
    assert not dense.kept and not small.kept

    def out_of_step(*_: Any) -> None:
        raise OutOfStep

    monkeypatch.setattr("lightning_accel.pruning.lockstep.Lockstep.at", out_of_step)
    anew = compensate(dense, small, batches=data, **asked)
    assert set(found.errors) == {"b", "c"}
    for name, errors in found.errors.items():
        assert errors == pytest.approx(anew.errors[name], rel=1e-6)
    for name, value in found.values.items():
        torch.testing.assert_close(value, anew.values[name], rtol=1e-6, atol=1e-7)


def test_each_batch_takes_one_forward_however_many_layers_are_solved() -> None:
    nets, threads = _chain(), threading.active_count()
    ran: list[int] = []
    for net in nets[:2]:
        net.register_forward_hook(lambda module, *_: ran.append(id(module)))
    compensate(nets[0], nets[1], batches=_batches(*torch.randn(3, 40, 5)), **nets[2])
    assert len(ran) == 1  # for the order of the layers; the others are made on copies
    assert threading.active_count() == threads


@pytest.mark.slow
def test_a_few_samples_that_anything_fits_change_nothing_that_does_worse_on_others() -> None:
    """With 12 samples of 48 inputs, what fits them best is far from what fits others."""
    torch.manual_seed(0)
    raw, solved, fitted = [], [], []
    for _ in range(8):
        dense = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
        nn.init.eye_(dense[0].weight)  # nothing that is left tells of what is gone
        small = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 8))
        state = {"0.weight": dense[0].weight[:48], "0.bias": dense[0].bias[:48]}
        state |= {"1.weight": dense[1].weight[:, :48], "1.bias": dense[1].bias}
        asked: dict[str, Any] = {"groups": [_group(64, "1")], "gone": {"0": [*range(48, 64)]}}
        data, unseen = _batches(torch.randn(6, 64), torch.randn(6, 64)), torch.randn(500, 64)
        for errors, options in ((raw, None), (solved, {}), (fitted, {"ridge": 1e-6})):
            small.load_state_dict(state)
            if options is not None:
                _install(small, compensate(dense, small, batches=data, **asked, **options).values)
            errors.append(float(F.mse_loss(small(unseen), dense(unseen)).detach()))
    assert sum(fitted) > 1.2 * sum(raw)
    assert sum(solved) < 1.1 * sum(raw)


def test_groups_that_lost_nothing_are_not_touched() -> None:
    dense = _conv_net()
    small = _cut_conv(dense, {"2": [1]})
    x = torch.randn(8, 1, 8, 8)
    found = compensate(
        dense, small, groups=_conv_groups(), gone={"2": [1], "0": []}, batches=_batches(x)
    )
    assert set(found.errors) == {"5"}


def test_compensation_refuses_no_data_and_no_ridge() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="ridge"):
        compensate(net, net, groups=[], gone={}, batches=_batches(torch.ones(1, 2)), ridge=0.0)
    with pytest.raises(ValueError, match="no batch"):
        compensate(net, net, groups=[], gone={}, batches=[])


def test_non_finite_activations_leave_the_old_weights() -> None:
    dense = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    cut = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    x = torch.tensor([[float("inf"), 1.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compensate(
            dense, cut, groups=[_group(3, "1")], gone={"0": [2]}, batches=_batches(x)
        )
    assert not found.values and "finite" in found.left_out[0].what
