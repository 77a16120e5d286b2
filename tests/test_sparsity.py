"""Penalties against autograd of the written-out formula, and the callback against a loop by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from test_importance import conv_net, each, groups_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel.bridge import commit
from lightning_accel.errors import NoEffect
from lightning_accel.pruning import SparsityTraining
from lightning_accel.pruning.graph import Graph, Group, Member
from lightning_accel.pruning.sparsity import (
    PENALTIES,
    add_to_grad,
    follow_picked,
    group_lasso,
    growing,
    pick,
    slimming,
)
from lightning_accel.surgery import Kept, Moved, Receipt, Select, twin
from lightning_accel.surgery.call import Call

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]


def unit_norms(net: nn.Sequential) -> list[Tensor]:
    """Squared norms of the units of `conv_net`, written out, one tensor for each of its groups."""
    columns = net[7].weight.view(2, 4, 4)
    return [
        net[0].weight.square().sum((1, 2, 3)) + net[1].weight**2 + net[3].weight.square().sum((0, 2, 3)),
        net[3].weight.square().sum((1, 2, 3)) + net[4].weight**2 + columns.square().sum((0, 2)),
    ]  # fmt: skip


def by_autograd(net: nn.Module, penalty: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*net.named_parameters(), strict=True)
    found = torch.autograd.grad(penalty, parameters, allow_unused=True)
    return {n: g for n, g in zip(names, found, strict=True) if g is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


# --- the gradients ----------------------------------------------------------------------------


def test_slimming_is_the_gradient_of_the_absolute_scales() -> None:
    net = conv_net().double()
    expected = by_autograd(net, 0.3 * (net[1].weight.abs().sum() + net[4].weight.abs().sum()))
    assert_same(slimming(net, groups_of(net), strength=0.3), expected)


def test_slimming_penalises_the_groups_own_part_of_a_shared_norm() -> None:
    net = nn.ModuleDict({"norm": nn.BatchNorm1d(5)}).double()
    group = Group(
        "a", "channels", 2, (Member("norm.weight", 0, "own", torch.tensor([[1], [3]])),), (), 2
    )
    assert slimming(net, [group], strength=1.0)["norm.weight"].tolist() == [0, 1, 0, 1, 0]


def test_group_lasso_is_the_gradient_of_the_sum_of_norms() -> None:
    net = conv_net().double()
    expected = by_autograd(net, 0.3 * sum(n.sqrt().sum() for n in unit_norms(net)))
    assert_same(group_lasso(net, groups_of(net), strength=0.3), expected)


def test_growing_is_the_gradient_of_the_weighted_squares() -> None:
    net = conv_net().double()
    strengths = {"0": torch.rand(6).double(), "3": torch.rand(4).double()}
    penalty = sum(
        (0.5 * s * n).sum() for s, n in zip(strengths.values(), unit_norms(net), strict=True)
    )
    assert_same(growing(net, groups_of(net), strengths=strengths), by_autograd(net, penalty))


def test_group_lasso_of_rows_and_columns_of_one_weight() -> None:
    net = nn.Sequential(nn.Linear(3, 3)).double()
    members = (Member("0.weight", 0, "out", each(3)), Member("0.weight", 1, "in", each(3)))
    squared = net[0].weight.square()
    expected = by_autograd(net, 0.2 * (squared.sum(0) + squared.sum(1)).sqrt().sum())
    group = Group("0", "channels", 3, members, ("0",), 3)
    assert_same(group_lasso(net, [group], strength=0.2), expected)


def test_units_of_several_positions_share_a_norm() -> None:
    net = nn.ModuleDict({"qkv": nn.Linear(2, 12, bias=False)}).double()
    columns = each(2, 2)
    rows = torch.cat([columns, columns + 4, columns + 8], dim=1)
    group = Group("qkv", "heads", 2, (Member("qkv.weight", 0, "out", rows),), ("qkv",), 2)
    heads = net["qkv"].weight.view(3, 2, 2, 2).square().sum((0, 2, 3)).sqrt()
    assert_same(group_lasso(net, [group], strength=1.0), by_autograd(net, heads.sum()))


@pytest.mark.parametrize("width", [1, 4])
def test_one_unit_equal_units_and_zeros_give_no_nan(width: int) -> None:
    net = nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width), nn.Conv2d(width, 2, 1))
    groups = groups_of(net)
    for fill in (1.0, 0.0):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.fill_(fill)
        strengths = {"0": torch.ones(width)}
        for found in (
            slimming(net, groups, strength=1.0),
            group_lasso(net, groups, strength=1.0),
            growing(net, groups, strengths=strengths),
        ):
            for gradient in found.values():
                assert gradient.isfinite().all()
                assert bool(gradient.any()) == bool(fill)
        picked = pick(net, groups, ratio=0.5)["0"]
        assert picked.tolist() == [True] * (width // 2) + [False] * (width - width // 2)


def test_what_has_nothing_to_act_on_is_an_error() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    with pytest.raises(NoEffect, match=r"batch norms.*group_lasso"):
        slimming(net, groups_of(net), strength=1.0)
    for call in (
        lambda: group_lasso(net, [], strength=1.0),
        lambda: growing(net, [], strengths={}),
    ):
        with pytest.raises(NoEffect, match="acts on weights"):
            call()


def test_the_smallest_share_of_each_group_is_picked() -> None:
    net = conv_net()
    picked = pick(net, groups_of(net), ratio=0.5)
    for units, norms in zip(picked.values(), unit_norms(net), strict=True):
        assert units.sum() == len(norms) // 2
        assert norms[units].max() < norms[~units].min()


def test_gradients_are_added_only_where_a_step_will_be_taken() -> None:
    net = conv_net()
    net(torch.randn(4, 3, 6, 6)).sum().backward()
    net[3].weight.grad = None
    before = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    found = group_lasso(net, groups_of(net), strength=1.0)
    assert add_to_grad(net, found, held=[net[0].weight, net[3].weight]) == 1
    for name, parameter in net.named_parameters():
        if name == "0.weight":
            torch.testing.assert_close(parameter.grad, before[name] + found[name].float())
        elif name == "3.weight":
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, before[name])


def test_the_picked_follow_a_cut() -> None:
    rows = Member("fc.weight", 0, "out", each(3, 2))
    before = Group("fc", "channels", 3, (rows,), ("fc",), 3)
    after = Group("fc", "channels", 2, (Member("fc.weight", 0, "out", each(2, 2)),), ("fc",), 3)
    weight = nn.Parameter(torch.zeros(4, 2))
    kept = Kept((torch.tensor([0, 1, 4, 5]), None))
    receipt = Receipt(moved=(Moved("fc.weight", weight, weight, (6, 2), kept),))
    picked = {"fc": torch.tensor([False, True, True])}
    followed, lost = follow_picked(picked, [before], [after], receipt)
    assert followed["fc"].tolist() == [False, True] and not lost
    assert follow_picked(picked, [before], [before], receipt) == ({}, ["fc"])
    assert follow_picked(picked, [before], [], receipt) == ({}, ["fc"])


# --- the callback -----------------------------------------------------------------------------


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = tiny.ConvNet().double()
        nn.init.normal_(self.net.stem[1].weight)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64)
    # The same batch three times: Lightning starts an epoch's data anew when it resumes within one.
    return DataLoader(TensorDataset(x.repeat(3, 1, 1, 1), torch.arange(24) % 4), 8)


def module() -> Module:
    torch.manual_seed(0)
    return Module()


Fit = Callable[..., Trainer]


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Fit:
    def run(
        model: LightningModule, *callbacks: Callback, ckpt: Any = None, **given: Any
    ) -> Trainer:
        saves = any(isinstance(c, ModelCheckpoint) for c in callbacks)
        given = {
            "max_epochs": 4,
            "enable_checkpointing": saves,
            "callbacks": list(callbacks),
            **given,
        }
        trainer = Trainer(**{**trainer_kwargs, **given})
        trainer.fit(model, data(), ckpt_path=ckpt)
        return trainer

    return run


def norms_of(net: tiny.ConvNet) -> tuple[Tensor, Tensor]:
    """Squared norms of the two groups of `ConvNet`, written out."""
    conv = net.conv[0].weight.square()
    wide = net.stem[0].weight.square().sum((1, 2, 3)) + conv.sum((1, 2, 3)) + conv.sum((0, 2, 3))
    wide = wide + net.stem[1].weight ** 2 + net.conv[1].weight ** 2
    wide = wide + net.down[0].weight.square().sum((0, 2, 3))
    deep = net.down[0].weight.square().sum((1, 2, 3)) + net.down[1].weight ** 2
    return wide, deep + net.head.weight.square().sum(0)


def penalty_by_hand(net: tiny.ConvNet, penalty: str, step: int, picked: list[Tensor]) -> Tensor:
    if penalty == "slimming":
        scales = (net.stem[1].weight, net.conv[1].weight, net.down[1].weight)
        return 0.05 * sum(scale.abs().sum() for scale in scales)
    if penalty == "group_lasso":
        return 0.05 * sum(norms.sqrt().sum() for norms in norms_of(net))
    factor = min(0.12, 0.05 * (step // 5 + 1))
    return 0.5 * factor * sum(n[p].sum() for n, p in zip(norms_of(net), picked, strict=True))


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_fit_is_a_loop_with_the_penalty_in_the_loss(fit: Fit, penalty: str) -> None:
    model, expected = module(), module()
    fit(model, SparsityTraining(penalty, strength=0.05, ratio=0.5, every_n_steps=5, ceiling=0.12))
    optimizer = expected.configure_optimizers()
    picked = [n < n.sort().values[len(n) // 2] for n in norms_of(expected.net)]
    for step, batch in enumerate([batch for _ in range(4) for batch in data()]):
        loss = expected.training_step(batch, 0)
        (loss + penalty_by_hand(expected.net, penalty, step, picked)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
    plain = module()
    fit(plain)
    assert not torch.allclose(plain.net.stem[1].weight, model.net.stem[1].weight)


def test_clipping_comes_after_the_penalty(fit: Fit) -> None:
    class Norms(Callback):
        def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, _: Any) -> None:
            grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self.norm = torch.stack([g.norm() for g in grads]).norm().item() if grads else 0.0

    norms = Norms()
    fit(module(), SparsityTraining(strength=100.0), norms, gradient_clip_val=0.5, max_steps=2)
    assert norms.norm == pytest.approx(0.5, rel=1e-4)


def test_growing_drives_out_the_picked_units_and_no_others(fit: Fit) -> None:
    model = module()
    penalty = SparsityTraining("growing", strength=0.2, every_n_steps=1, ceiling=10.0)
    before = [n.detach() for n in norms_of(model.net)]
    fit(model, penalty, max_epochs=12)
    for norms, old, picked in zip(
        norms_of(model.net), before, penalty.picked.values(), strict=True
    ):
        assert (norms[picked] < 0.3 * old[picked]).all()
        assert (norms[~picked] > 0.7 * old[~picked]).all()


class CutOnce(Callback):
    """Remove two channels of each group before an epoch."""

    def __init__(self, epoch: int = 2) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch and pl_module.net.stem[0].out_channels == 8:
            calls = (Call("net", (next(iter(data()))[0],), {}),)
            graph = Graph(twin(pl_module), calls, select=Select())
            cut = graph.cut({group.name: [1, 4] for group in graph.groups})
            commit(trainer, pl_module, cut)


class Registered(Module):
    """So that checkpoints carry the structure although no `ModelEdit` is in the Trainer."""

    def setup(self, stage: str) -> None:
        from lightning_accel.bridge.restore import register

        register(self)


@pytest.mark.slow
@pytest.mark.parametrize("penalty", PENALTIES)
def test_resume_is_bit_equal_before_and_after_a_cut(fit: Fit, tmp_path: Path, penalty: str) -> None:
    def callbacks() -> list[Callback]:
        return [SparsityTraining(penalty, strength=0.05, every_n_steps=2), CutOnce()]

    torch.manual_seed(0)
    whole = Registered()
    keep = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, every_n_train_steps=1)
    fit(whole, *callbacks(), keep)
    assert whole.net.stem[0].out_channels == 6
    for step in (2, 3, 7, 9, 11):
        (path,) = tmp_path.glob(f"*step={step}.ckpt")
        torch.load(path, weights_only=True)
        resumed = Registered()
        fit(resumed, *callbacks(), ckpt=path)
        one, two = whole.state_dict(), resumed.state_dict()
        assert all(torch.equal(one[name], two[name]) for name in one), path.stem


def test_units_that_stay_after_a_cut_stay_picked(fit: Fit) -> None:
    class Before(Callback):
        def on_model_edit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.picked = copy.deepcopy(penalty.picked)

    penalty, before = SparsityTraining("growing"), Before()
    fit(module(), penalty, CutOnce(), before)
    assert list(penalty.picked) == list(before.picked) and len(penalty.picked) == 2
    for name, picked in before.picked.items():
        left = [i for i in range(len(picked)) if i not in (1, 4)]
        assert torch.equal(penalty.picked[name], picked[left])


def test_each_optimizer_gets_its_own_part_once(fit: Fit) -> None:
    class Two(Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.manual_backward(loss)
            if not sparse.groups:  # the trial on a copy
                return
            self.seen = {n: p.grad.clone() for n, p in self.net.named_parameters()}
            self.expected = group_lasso(self, sparse.groups, strength=sparse.strength)
            first.step()
            second.step()
            self.left = {n: p.grad.clone() for n, p in self.net.named_parameters()}

        def configure_optimizers(self) -> Any:
            stem, head = self.net.stem.parameters(), self.net.head.parameters()
            return [torch.optim.SGD(stem, 0.0), torch.optim.SGD(head, 0.0)]

    sparse = SparsityTraining(strength=0.5)
    model = Two()
    fit(model, sparse, max_steps=1)
    for name, gradient in model.left.items():
        held = name.startswith(("stem", "head")) and f"net.{name}" in model.expected
        added = model.expected[f"net.{name}"] if held else 0.0
        torch.testing.assert_close(gradient, model.seen[name] + added)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"penalty": "l0"}, "'slimming', 'group_lasso', 'growing'"),
        ({"strength": 0.0}, "`strength`"),
        ({"ceiling": float("nan")}, "`ceiling`"),
        ({"ratio": 1.0}, "`ratio`"),
        ({"every_n_steps": 0}, "`every_n_steps`"),
    ],
)
def test_arguments_out_of_range_are_refused(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SparsityTraining(**given)


def test_slimming_without_batch_norm_is_told_at_the_start(fit: Fit) -> None:
    class Plain(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Linear(8, 4)).double()

    with pytest.raises(NoEffect, match="group_lasso"):
        fit(Plain(), SparsityTraining("slimming"))
