"""Select, Receipt, Cut, Structure, swap, twin and follow, each against an independent truth."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from lightning_accel.errors import AccelError, NoEffect, StructureMismatch
from lightning_accel.pruning import prune
from lightning_accel.surgery import (
    Cut,
    Kept,
    Receipt,
    Select,
    Stage,
    Structure,
    follow,
    swap,
    twin,
)
from lightning_accel.surgery.acting import copied
from lightning_accel.surgery.snapshot import Snapshot


def halved(model: nn.Module) -> Cut:
    """A cut by hand: the first layer of two loses every second output."""
    kept = torch.arange(0, model[0].out_features, 2)
    return Cut(
        kept={
            "0.weight": Kept((kept, None)),
            "0.bias": Kept((kept,)),
            "2.weight": Kept((None, kept)),
        },
        before=Structure(
            {n: tuple(model.get_parameter(n).shape) for n in ("0.weight", "0.bias", "2.weight")},
            {
                "0": {"out_features": model[0].out_features},
                "2": {"in_features": model[2].in_features},
            },
        ),
        attributes={"0": {"out_features": len(kept)}, "2": {"in_features": len(kept)}},
    )


@pytest.fixture
def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


class TestSelect:
    def test_a_name_takes_in_what_lies_below(self, net: nn.Sequential) -> None:
        model = nn.Module()
        model.encoder, model.encoder2 = net, nn.Linear(1, 1)
        assert set(Select("encoder").modules(model)) == {
            "encoder",
            *(f"encoder.{i}" for i in range(3)),
        }

    def test_exclude_wins_over_include(self, net: nn.Sequential) -> None:
        assert list(Select(types=(nn.Linear,), exclude="0").modules(net)) == ["2"]

    def test_types_by_name_match_subclasses(self) -> None:
        class Mine(nn.Linear):
            pass

        assert list(Select(types="Linear").modules(nn.Sequential(Mine(1, 1)))) == ["0"]

    def test_nothing_matched_names_what_exists(self, net: nn.Sequential) -> None:
        with pytest.raises(NoEffect, match="Found: the modules 0, 1, 2"):
            Select("decoder.*").require(net)

    @pytest.mark.parametrize("choice", [3, [None], {"includes": "x"}, "", [""]])
    def test_a_malformed_choice_is_refused(self, choice: object) -> None:
        with pytest.raises((TypeError, ValueError)):
            Select.of(choice)  # type: ignore[arg-type]

    def test_reads_what_yaml_gives(self) -> None:
        assert Select.of({"include": ["a"], "types": ["Linear"]}) == Select(("a",), (), ("Linear",))


class TestKept:
    @pytest.mark.parametrize("shape", [(6,), (4, 5), (4, 3, 2), (2, 3, 4, 5)])
    def test_a_product_of_choices_is_kept_per_dimension(self, shape: tuple[int, ...]) -> None:
        tensor = torch.randn(shape)
        flat = torch.arange(tensor.numel()).view(shape)
        for dim in range(len(shape)):
            flat = flat.index_select(dim, torch.arange(0, flat.shape[dim], 2))
        kept = Kept.from_flat(flat, shape)
        assert kept.flat is None
        assert torch.equal(kept.take(tensor), tensor.flatten()[flat])

    def test_what_is_no_product_is_kept_flat(self) -> None:
        tensor = torch.arange(12.0).view(4, 3)
        flat = torch.tensor([[0, 1], [4, 5]])  # columns 0, 1 of row 0 and 1, 2 of row 1
        kept = Kept.from_flat(flat, (4, 3))
        assert kept.flat is not None
        assert torch.equal(kept.take(tensor), tensor.flatten()[flat])

    def test_memory_format_is_kept(self) -> None:
        tensor = torch.randn(8, 4, 3, 3).contiguous(memory_format=torch.channels_last)
        taken = Kept((torch.arange(0, 8, 2), None, None, None)).take(tensor)
        assert taken.is_contiguous(memory_format=torch.channels_last)

    def test_the_result_shares_no_memory(self) -> None:
        tensor = torch.zeros(3)
        Kept((None,)).take(tensor).fill_(1)
        assert tensor.sum() == 0


class TestCut:
    def test_parameters_stay_the_same_objects(self, net: nn.Sequential) -> None:
        before = list(net.parameters())
        halved(net).apply(net)
        assert all(a is b for a, b in zip(before, net.parameters(), strict=True))
        assert net[0].weight.shape == (4, 4)

    def test_the_cut_network_is_the_masked_one(self, net: nn.Sequential) -> None:
        masked, x = copy.deepcopy(net), torch.randn(5, 4)
        cut = halved(net)
        cut.masked(masked)
        cut.apply(net)
        torch.testing.assert_close(net(x), masked(x))

    def test_gradients_follow(self, net: nn.Sequential) -> None:
        net(torch.randn(5, 4)).sum().backward()
        expected = net[0].weight.grad[::2].clone()
        halved(net).apply(net)
        assert torch.equal(net[0].weight.grad, expected)

    def test_flags_attributes_and_hooks_of_parameters_survive(self, net: nn.Sequential) -> None:
        seen = []
        net[0].weight.note = "mine"
        net[0].weight.register_hook(lambda grad: seen.append(grad.shape))
        net[2].weight.requires_grad_(False)
        halved(net).apply(net)
        net(torch.randn(2, 4)).sum().backward()
        assert net[0].weight.note == "mine"
        assert seen == [(4, 4)]
        assert not net[2].weight.requires_grad

    def test_a_stored_loss_does_not_break_the_next_backward(self, net: nn.Sequential) -> None:
        net.last_loss = net(torch.randn(2, 4)).sum()  # a living graph knows the old shapes
        optimizer = torch.optim.Adam(net.parameters())
        receipt = halved(net).apply(net)
        follow(optimizer, receipt)
        net(torch.randn(2, 4)).sum().backward()
        before = net[0].weight.detach().clone()
        optimizer.step()
        assert not torch.equal(before, net[0].weight)

    def test_another_model_is_refused_and_untouched(self, net: nn.Sequential) -> None:
        other = nn.Sequential(nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 3))
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(StructureMismatch, match=r"0\.weight"):
            halved(net).apply(other)
        assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())

    def test_it_can_be_sent_to_another_process(self, net: nn.Sequential) -> None:
        sent = pickle.loads(pickle.dumps(halved(net)))  # noqa: S301 - our own object
        sent.apply(net)
        assert net[0].out_features == 4


class TestStructure:
    def test_a_fresh_model_takes_the_shape_and_the_weights(self, net: nn.Sequential) -> None:
        fresh, x = copy.deepcopy(net), torch.randn(2, 4)
        halved(net).apply(net)
        Structure.from_dict(Structure.of(net).to_dict()).apply(fresh)
        fresh.load_state_dict(net.state_dict())
        assert torch.equal(fresh(x), net(x))

    def test_it_works_in_both_directions(self, net: nn.Sequential) -> None:
        wide = Structure.of(net)
        weights = copy.deepcopy(net.state_dict())
        halved(net).apply(net)
        wide.apply(net)
        net.load_state_dict(weights)
        assert net[0].out_features == 8

    def test_parameters_keep_identity_and_ties(self) -> None:
        model = nn.Module()
        model.a, model.b = nn.Linear(4, 4), nn.Linear(4, 4)
        model.b.weight = model.a.weight
        shared = model.a.weight
        Structure({"a.weight": (2, 4), "b.weight": (2, 4)}).apply(model)
        assert model.a.weight is shared is model.b.weight
        assert shared.shape == (2, 4)

    @pytest.mark.parametrize(
        "tamper",
        [
            lambda d: d["tensors"].update({"0.weight": [3, 4]}),
            lambda d: d["attributes"]["0"].update(out_features=10**9),
            lambda d: d.pop("digest"),
            lambda d: d["tensors"].update({"0.weight": ["4", 4]}),
            lambda d: d["tensors"].update({"0.weight": [True, 4]}),
            lambda d: d.update(attributes=None),
        ],
    )
    def test_damage_is_refused(self, net: nn.Sequential, tamper: object) -> None:
        plain = Structure.of(net).to_dict()
        tamper(plain)  # type: ignore[operator]
        with pytest.raises(StructureMismatch, match="Do: "):
            Structure.from_dict(plain)

    @pytest.mark.parametrize(
        "impossible",
        [
            Structure({"0.weight": (9, 4)}),
            Structure({"0.weight": (0, 4)}),
            Structure({"0.weight": (-1, 4)}),
            Structure({"0.weight": (4,)}),
            Structure({"nowhere": (4,)}),
            Structure(attributes={"0": {"__class__": 3}}),
            Structure(attributes={"0": {"out_features": 10**9}}),
            Structure(attributes={"5": {"out_features": 2}}),
        ],
    )
    def test_the_impossible_is_refused(self, net: nn.Sequential, impossible: Structure) -> None:
        with pytest.raises(StructureMismatch):
            impossible.check(net)


class TestSwap:
    def test_a_shared_module_is_replaced_everywhere_and_keeps_its_flag(self) -> None:
        activation = nn.ReLU().eval()
        net = nn.Sequential(activation, nn.Sequential(activation))
        swap(net, select=Select(types="ReLU"), make=lambda name, old: nn.GELU())
        assert net[0] is net[1][0]
        assert isinstance(net[0], nn.GELU)
        assert not net[0].training

    def test_an_optimizer_follows_the_parameters_of_the_same_name(self, net: nn.Sequential) -> None:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        net(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        momentum = optimizer.state[net[0].weight]["momentum_buffer"].clone()
        receipt = swap(net, select=Select("0"), make=lambda name, old: nn.Linear(4, 8))
        follow(optimizer, receipt)
        assert torch.equal(optimizer.state[net[0].weight]["momentum_buffer"], momentum)
        assert any(p is net[0].weight for p in optimizer.param_groups[0]["params"])

    def test_declining_everything_is_an_error(self, net: nn.Sequential) -> None:
        with pytest.raises(NoEffect):
            swap(net, select=Select(), make=lambda name, old: None)


class TestTwin:
    def test_it_shares_nothing(self, net: nn.Sequential) -> None:
        copied = twin(net)
        copied[0].weight.data.zero_()
        assert net[0].weight.abs().sum() > 0

    def test_a_users_hook_stays_silent_and_weight_norm_still_works(self) -> None:
        heard = []
        net = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
        net.register_forward_hook(lambda *_: heard.append(1))
        x = torch.randn(1, 2)
        torch.testing.assert_close(twin(net)(x), net.forward(x))
        assert not heard

    def test_a_stored_loss_is_no_obstacle(self, net: nn.Sequential) -> None:
        net.losses = [net(torch.randn(1, 4)).sum()]
        assert twin(net).losses[0].grad_fn is None

    def test_gradients_are_copied(self, net: nn.Sequential) -> None:
        net(torch.randn(1, 4)).sum().backward()
        assert torch.equal(twin(net)[0].weight.grad, net[0].weight.grad)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "rprop": lambda p: torch.optim.Rprop(p),
}


def step(
    net: nn.Module, optimizer: torch.optim.Optimizer, seed: int, cut: Cut | None = None
) -> float:
    """One step; with a cut, the dense twin's masked form of it."""
    torch.manual_seed(seed)
    x, y = torch.randn(16, 4, dtype=torch.float64), torch.randint(0, 3, (16,))
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(net(x), y)
    loss.backward()
    optimizer.step()
    if cut is not None:
        cut.masked(net)
    return loss.item()


class TestFollow:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_the_pruned_run_is_the_masked_dense_run(self, net: nn.Sequential, name: str) -> None:
        net.double()
        optimizer = OPTIMIZERS[name](net.parameters())
        for seed in range(5):
            step(net, optimizer, seed)
        cut, dense = halved(net), copy.deepcopy(net)
        dense_optimizer = OPTIMIZERS[name](dense.parameters())
        dense_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        cut.masked(dense)
        assert follow(optimizer, cut.apply(net)).changes
        pairs = [
            (step(net, optimizer, s), step(dense, dense_optimizer, s, cut)) for s in range(5, 15)
        ]
        assert max(abs(a - b) for a, b in pairs) < 1e-12

    def test_a_stale_optimizer_would_be_noticed_by_this_test(self, net: nn.Sequential) -> None:
        net.double()
        optimizer = OPTIMIZERS["adamw"](net.parameters())
        step(net, optimizer, 0)
        halved(net).apply(net)
        with pytest.raises(RuntimeError):
            step(net, optimizer, 1)

    def test_groups_rates_and_step_counts_stay(self, net: nn.Sequential) -> None:
        groups = [{"params": net[0].parameters(), "lr": 0.1}, {"params": net[2].parameters()}]
        optimizer = torch.optim.Adam(groups, lr=0.2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        net(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        scheduler.step()
        follow(optimizer, halved(net).apply(net))
        assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.1]
        assert optimizer.state[net[0].weight]["step"] == 1
        net(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        scheduler.step()
        assert scheduler.get_last_lr() == [0.025, 0.05]

    def test_each_of_several_optimizers_follows_its_own(self, net: nn.Sequential) -> None:
        one, two = (torch.optim.Adam(net[i].parameters()) for i in (0, 2))
        net(torch.randn(2, 4)).sum().backward()
        one.step()
        two.step()
        receipt = halved(net).apply(net)
        assert {c.name for c in follow(one, receipt).changes} == {"0.weight", "0.bias"}
        assert {c.name for c in follow(two, receipt).changes} == {"2.weight"}
        assert len(two.state) == 2

    def test_tied_parameters_are_sliced_once(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
                self.b.weight = self.a.weight

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.b(self.a(x))

        net = Tied()
        optimizer = torch.optim.Adam(net.parameters())
        net(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        rows = torch.tensor([0, 2])
        kept = Kept((rows, None))
        cut = Cut({"a.weight": kept, "b.weight": kept}, Structure({"a.weight": (4, 4)}))
        receipt = cut.apply(net)
        follow(optimizer, receipt)
        assert len(receipt.moved) == 1
        assert optimizer.state[net.b.weight]["exp_avg"].shape == (2, 4)

    @pytest.mark.parametrize("beside", [True, False], ids=["beside another shape", "alone"])
    def test_preconditioners_of_a_square_weight_are_no_memory_of_elements(
        self, beside: bool
    ) -> None:
        layers = [nn.Linear(6, 8, bias=False)] if beside else []
        net = nn.Sequential(*layers, nn.Linear(8, 8, bias=False)).double()
        square = net[-1]
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        torch.manual_seed(0)
        for layer in net:
            gradient = torch.randn_like(layer.weight)
            optimizer.state[layer.weight]["rows"] = gradient @ gradient.T
            if beside:  # eigenvectors, which are not symmetric
                optimizer.state[layer.weight]["basis"] = torch.linalg.eigh(gradient @ gradient.T)[1]
                del optimizer.state[layer.weight]["rows"]
        name = f"{len(net) - 1}.weight"
        kept = Kept((torch.tensor([0, 3, 5]), torch.tensor([1, 2, 7])))
        receipt = Cut({name: kept}, Structure({name: (8, 8)})).apply(net)
        followed = follow(optimizer, receipt)
        assert square.weight not in optimizer.state
        assert [change.name for change in followed.skipped] == [name]

    def test_a_memory_that_is_still_zero_is_sliced(self) -> None:
        net = nn.Sequential(nn.Linear(8, 8, bias=False))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        optimizer.state[net[0].weight]["exp_avg"] = torch.zeros(8, 8)
        kept = Kept((torch.tensor([0, 3]), None))
        receipt = Cut({"0.weight": kept}, Structure({"0.weight": (8, 8)})).apply(net)
        assert follow(optimizer, receipt).changes
        assert optimizer.state[net[0].weight]["exp_avg"].shape == (2, 8)

    def test_lbfgs_starts_its_history_anew(self, net: nn.Sequential) -> None:
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=3)
        x = torch.randn(8, 4)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = net(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        assert follow(optimizer, halved(net).apply(net)).skipped
        assert optimizer.step(closure).isfinite()

    def test_a_wrapped_optimizer_follows(self, net: nn.Sequential) -> None:
        class Wrapper:
            def __init__(self, optimizer: torch.optim.Optimizer) -> None:
                self.optimizer = optimizer

        optimizer = torch.optim.Adam(net.parameters())
        net(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        assert follow(Wrapper(optimizer), halved(net).apply(net)).changes


def test_stages_are_in_the_one_safe_order() -> None:
    assert sorted(Stage) == [Stage.SHAPE, Stage.KIND, Stage.MEMORY, Stage.COMPILE]


def test_receipts_join_and_know_when_nothing_happened(net: nn.Sequential) -> None:
    receipt = halved(net).apply(net)
    assert receipt and not Receipt()
    assert len((receipt + receipt).changes) == 2 * len(receipt.changes)


def test_errors_have_three_parts_and_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(AccelError("wrong", "this", "do that")))  # noqa: S301
    assert str(error) == "wrong. Found: this. Do: do that."


@pytest.mark.parametrize("choice", [0, -1, float("nan"), True, object()])
def test_a_selection_that_names_nothing_is_refused_in_three_parts(choice: object) -> None:
    with pytest.raises(TypeError, match=r"a selection is .* Found: .* Do: "):
        Select.of(choice)  # type: ignore[arg-type]


def test_what_an_edit_did_is_printed_in_ten_lines() -> None:
    net = nn.ModuleList([tiny.ConvNet(), tiny.ConvNet()])
    receipts = [prune(one, example=torch.randn(2, 3, 8, 8), ratio=0.5) for one in net]
    receipt = receipts[0] + receipts[1]
    structure = Structure.of(net)
    assert len(receipt.changes) > 20
    snapshot = Snapshot.take(net, pristine=structure)
    for shown in (receipt, structure, snapshot, receipt.moved[0], receipt.moved[0].kept):
        for text in (repr(shown), str(shown)):
            assert len(text.splitlines()) <= 10
            assert max(map(len, text.splitlines())) <= 110
            assert "tensor(" not in text
    assert "stem.0.weight: " in repr(receipt)


def test_a_cut_is_printed_in_ten_lines() -> None:
    index = torch.arange(1000)
    cut = Cut({f"layer{n}.weight": Kept((index, None)) for n in range(30)})
    assert len(repr(cut).splitlines()) <= 10
    assert "layer0.weight: Kept(1000, all)" in repr(cut)


class Slotted(nn.Module):
    __slots__ = ("beside",)

    def __init__(self) -> None:
        super().__init__()
        self.beside = [1]


class Forgets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.cache = nn.Linear(2, 2), [1]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "cache": []}


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.woke = nn.Linear(2, 2), False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.woke = True


class OwnCopy(nn.Module):
    def __init__(self, made_by: str = "hand") -> None:
        super().__init__()
        self.made_by = made_by

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return OwnCopy("itself")


class Shares(nn.Module):
    """Holds itself, and one list, one empty dict and one module in several places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(2, 2)
        self.row: list[Any] = [1, self]
        self.again, self.empty = self.row, {}
        self.also = (self.empty, self.row)


def normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))


@pytest.mark.parametrize("make", [Slotted, Forgets, Remembers, OwnCopy, Shares, normed])
def test_a_copy_of_modules_is_what_deepcopy_makes(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(make(), nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.LSTM(2, 2))
    made, wanted = copied(model, {}), copy.deepcopy(model)
    for one, other in zip(made.modules(), wanted.modules(), strict=True):
        assert type(one) is type(other) and list(vars(one)) == list(vars(other))
        for name, value in vars(one).items():
            if not isinstance(value, (dict, list, tuple, nn.Module)):
                assert value == vars(other)[name], name
    for one, other in zip(made.state_dict().items(), wanted.state_dict().items(), strict=True):
        assert one[0] == other[0] and torch.equal(one[1], other[1])
    assert not {id(p) for p in made.parameters()} & {id(p) for p in model.parameters()}
    first: Any = made[0]
    if make is Slotted:  # torch's own modules lose them in a copy, or not
        assert getattr(first, "beside", None) == getattr(wanted[0], "beside", None)
    if make is Shares:
        assert first.first is first.second and first.row is first.again is first.also[1]
        assert first.row[1] is first and first.also[0] is first.empty is not model[0].empty
