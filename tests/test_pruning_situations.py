"""Networks and fits that a prune once refused without reason."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import StructuredPruning
from lightning_accel.errors import BrokenModel, NoEffect, Unsupported
from lightning_accel.loop import FusedOptimizer, LeanLoop
from lightning_accel.pruning import SparsityTraining, plan, prune
from lightning_accel.pruning.importance import score
from lightning_accel.pruning.reconstruction import gram
from lightning_accel.pruning.sensitivity import graph_of, sensitivity
from lightning_accel.surgery.call import Call

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"
)


class Spectral(nn.Module):
    """A layer of a Fourier neural operator (Li et al. 2020, arXiv 2010.08895): its weights are complex."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.head = nn.Conv1d(3, 16, 1), nn.Conv1d(16, 2, 1)
        self.weight = nn.Parameter(torch.randn(16, 16, 4, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        modes = torch.fft.rfft(self.lift(x))
        out = torch.zeros_like(modes)
        out[..., :4] = torch.einsum("bik,iok->bok", modes[..., :4], self.weight)
        return self.head(F.relu(torch.fft.irfft(out, n=x.shape[-1])))


def kept(small: Tensor, dense: Tensor) -> list[int]:
    """Return which rows of `dense` are the rows of `small`, by value."""
    return [next(i for i, row in enumerate(dense) if torch.equal(row, one)) for one in small]


def test_a_network_with_complex_weights_equals_its_masked_twin() -> None:
    dense = Spectral()
    small = copy.deepcopy(dense)
    prune(small, example=torch.randn(2, 3, 16), ratio=0.5)
    assert small.weight.shape == (8, 8, 4) and small.weight.dtype == torch.cfloat
    inner = kept(small.lift.weight, dense.lift.weight)
    outer = kept(small.head.weight.transpose(0, 1), dense.head.weight.transpose(0, 1))
    masked = copy.deepcopy(dense)
    with torch.no_grad():
        keep = torch.zeros(16, 16, 1)
        keep[torch.tensor(inner)[:, None], torch.tensor(outer)] = 1
        masked.weight.mul_(keep)
    x = torch.randn(5, 3, 24)
    torch.testing.assert_close(small(x), masked(x), rtol=1e-4, atol=1e-4)


class Phases(nn.Module):
    """Complex linear layers with the real and the imaginary part rectified (Trabelsi et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 12, dtype=torch.cfloat)
        self.two = nn.Linear(12, 8, dtype=torch.cfloat)
        self.out = nn.Linear(8, 2, dtype=torch.cfloat)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.one, self.two):
            x = layer(x)
            x = torch.complex(x.real.relu(), x.imag.relu())
        return self.out(x)


def phases() -> tuple[Phases, Tensor]:
    torch.manual_seed(0)
    net = Phases()
    with (
        torch.no_grad()
    ):  # all of the size is in the imaginary part of some channels, none in the real
        net.one.weight[:6] = 5j * net.one.weight[:6].imag
        net.one.weight[6:] = net.one.weight[6:].real + 0j
    return net, torch.randn(16, 3, dtype=torch.cfloat)


def by_hand(net: Phases, importance: str) -> Tensor:
    """Return the score of each unit of the first layer, in complex128 and from the formulas."""
    made, read = (p.detach().to(torch.complex128) for p in (net.one.weight, net.two.weight))
    if importance == "taylor":
        gate = torch.ones(12, dtype=torch.float64, requires_grad=True)
        wide = copy.deepcopy(net)._apply(lambda t: t.to(torch.complex128))
        x = wide.one(phases()[1].to(torch.complex128))
        x = wide.two(torch.complex(x.real.relu(), x.imag.relu()) * gate)
        out = wide.out(torch.complex(x.real.relu(), x.imag.relu()))
        (slope,) = torch.autograd.grad(out.abs().square().sum(), gate)
        return slope.abs()
    if importance == "fpgm":
        return torch.cdist(*[torch.view_as_real(made).flatten(1)] * 2).sum(1)
    return made.abs().square().sum(1) + read.abs().square().sum(0)


@pytest.mark.parametrize("importance", ["magnitude", "taylor", "fpgm"])
def test_complex_channels_are_worth_both_of_their_parts(importance: str) -> None:
    net, x = phases()
    net(x).abs().square().sum().backward()
    (group,) = (g for g in graph_of(net, [Call("", (x,), {})]).groups if g.name == "one")
    found = score(net, group, importance).double()
    wanted = by_hand(net, importance)
    torch.testing.assert_close(found / found.sum(), wanted / wanted.sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "importance", ["magnitude", "taylor", "activation", "fpgm", "lamp", "random"]
)
def test_complex_linear_layers_equal_their_masked_twin(importance: str) -> None:
    net, x = phases()
    net(x).abs().square().sum().backward()
    cut = plan(net, calls=[Call("", (x,), {})], ratio=0.5, importance=importance)
    wide = copy.deepcopy(net)._apply(lambda tensor: tensor.to(torch.complex128))
    masked, small, x = copy.deepcopy(wide), copy.deepcopy(wide), x.to(torch.complex128)
    cut.apply(small)
    rows, columns = cut.kept["two.weight"].dims
    with torch.no_grad():  # by hand
        for layer, held in ((masked.one, columns), (masked.two, rows)):
            gone = torch.ones(len(layer.weight), dtype=torch.bool)
            gone[held] = False
            layer.weight[gone], layer.bias[gone] = 0, 0
    assert small.two.weight.shape == (4, 6)
    torch.testing.assert_close(small(x), masked(x), rtol=1e-12, atol=1e-12)
    ours = copy.deepcopy(wide)
    cut.masked(ours)
    torch.testing.assert_close(small(x), ours(x), rtol=1e-12, atol=1e-12)
    assert not ours.one.weight[gone_of(columns, 12)].abs().any()


def gone_of(held: Any, size: int) -> Tensor:
    gone = torch.ones(size, dtype=torch.bool)
    gone[held] = False
    return gone


def test_the_sensitivity_of_a_complex_output_is_that_of_both_parts() -> None:
    net, x = phases()
    calls = [Call("", (x,), {})]
    for row in sensitivity(net, calls, budget_s=0.02):
        graph = graph_of(net, calls)
        (group,) = (g for g in graph.groups if g.name == row.name)
        worst = score(net, group, "magnitude").argsort(stable=True)[: row.removed].tolist()
        small = copy.deepcopy(net)
        graph.cut({row.name: worst}).apply(small)
        with torch.no_grad():
            change = (small(x) - net(x)).norm() / net(x).norm()
        assert row.change == pytest.approx(float(change), rel=1e-4)


def test_what_solves_real_numbers_leaves_complex_layers_and_says_so() -> None:
    net, x = phases()
    calls = [Call("", (x,), {})]
    (group,) = (g for g in graph_of(net, calls).groups if g.name == "one")
    with pytest.raises(ValueError, match="its weights are complex"):
        gram(net, group, [calls])
    cut = plan(net, calls=calls, ratio=0.5, compensate=True)
    assert not cut.added
    assert [n for n in cut.notes if n.startswith("not compensated: `two`: its weights are complex")]


class Thaws(LightningModule):
    """Its first layer learns from epoch 1 on."""

    def __init__(self, thaw: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        self.net[0].requires_grad_(False)
        self.thaw = thaw

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == self.thaw:
            self.net[0].requires_grad_(True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(kwargs: dict[str, Any], module: Thaws, when: int) -> None:
    data = DataLoader(TensorDataset(torch.randn(16, 8), torch.arange(16) % 3), 8)
    callbacks: list[Callback] = [StructuredPruning(ratio=0.5, when=when)]
    Trainer(**{**kwargs, "max_epochs": 4, "callbacks": callbacks}).fit(module, data)


def test_what_is_frozen_at_the_start_can_be_pruned_once_it_is_not(
    trainer_kwargs: dict[str, Any],
) -> None:
    module = Thaws(thaw=1)
    fit(trainer_kwargs, module, when=2)
    assert module.net[0].out_features == 8 and module.net[0].weight.requires_grad  # type: ignore[union-attr]


class Thawing(Callback):
    """Unfreezes at the start of an epoch, as `BackboneFinetuning` does."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            pl_module.requires_grad_(True)


class ThawsAtOnce(Thaws):
    def on_train_start(self) -> None:
        self.net[0].requires_grad_(True)


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("who", ["module", "module at once", "callback after", "callback before"])
@pytest.mark.filterwarnings("ignore:StructuredPruning")  # of an untrained network
def test_what_is_unfrozen_in_the_epoch_of_the_prune_goes_too(
    trainer_kwargs: dict[str, Any], epoch: int, who: str
) -> None:
    module = ThawsAtOnce(epoch) if who == "module at once" else Thaws(epoch)
    callbacks: list[Callback] = [StructuredPruning(ratio=0.5, when=epoch)]
    if who.startswith("callback"):
        module.thaw = 99
        callbacks.insert(len(callbacks) * (who == "callback after"), Thawing(epoch))
    data = DataLoader(TensorDataset(torch.randn(16, 8), torch.arange(16) % 3), 8)
    Trainer(**{**trainer_kwargs, "max_epochs": 4, "callbacks": callbacks}).fit(module, data)
    assert module.net[0].out_features == 8 == module.net[2].in_features  # type: ignore[union-attr]


def test_what_is_frozen_when_a_prune_is_due_stays_whole(trainer_kwargs: dict[str, Any]) -> None:
    module = Thaws(thaw=3)
    with pytest.raises(NoEffect, match="frozen"):
        fit(trainer_kwargs, module, when=2)
    assert module.net[0].out_features == 16


class PastLightning(LightningModule):
    """Steps the optimizer inside of Lightning's."""

    def __init__(self, past: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.past = past
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
        (optimizer.optimizer if self.past else optimizer).step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("past", [False, True])
def test_a_penalty_that_cannot_reach_the_step_is_refused(
    trainer_kwargs: dict[str, Any], past: bool
) -> None:
    data = DataLoader(TensorDataset(torch.randn(16, 8), torch.arange(16) % 3), 8)
    given = {**trainer_kwargs, "max_epochs": 1, "callbacks": [SparsityTraining("slimming")]}
    trainer = Trainer(**given)
    if past:
        with pytest.raises(Unsupported, match="past Lightning"):
            trainer.fit(PastLightning(past), data)
    else:
        trainer.fit(PastLightning(past), data)
        assert trainer.global_step == 2


@pytest.mark.parametrize(
    ("callback", "line"),
    [
        (lambda: SparsityTraining("slimming"), "SparsityTraining: slimming on 1 groups"),
        (lambda: FusedOptimizer("foreach"), "FusedOptimizer('foreach'): "),
        (lambda: LeanLoop(), "LeanLoop: "),
    ],
)
def test_what_was_done_is_said_in_one_line(
    trainer_kwargs: dict[str, Any], caplog: pytest.LogCaptureFixture, callback: Any, line: str
) -> None:
    data = DataLoader(TensorDataset(torch.randn(16, 8), torch.arange(16) % 3), 8)
    trainer = Trainer(**{**trainer_kwargs, "max_epochs": 1, "callbacks": [callback()]})
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        trainer.fit(PastLightning(past=False), data)
    assert len([r for r in caplog.records if line in r.getMessage()]) == 1


class Annealed(LightningModule):
    """Its forward and its hook read the Trainer, and the hook logs; the callable network is the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.Linear(12, 3))
        self.net[1].register_forward_hook(self.fade)
        self.heard = 0

    def fade(self, _: nn.Module, __: Any, hidden: Tensor) -> Tensor:
        self.log("scale", 1.0 + self.trainer.current_epoch)
        if type(self.trainer) is Trainer:
            self.heard += 1
        return hidden * torch.linspace(1, 2, 16) if self.trainer.max_epochs == 2 else hidden

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) / self.trainer.num_training_batches

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("given", [None, torch.randn(4, 8)], ids=["found", "given"])
def test_what_reads_the_trainer_takes_part_and_logs_nothing_while_it_is_tried(
    given: Any, trainer_kwargs: dict[str, Any]
) -> None:
    module = Annealed()
    callbacks = [StructuredPruning(ratio=0.5, when=1, example=given)]
    trainer = Trainer(**{**trainer_kwargs, "max_epochs": 2}, callbacks=callbacks)
    trainer.fit(module, DataLoader([torch.randn(8) for _ in range(8)], batch_size=4))
    assert module.net[0].out_features == 16  # the hook scales each of its channels
    assert module.net[2].out_features == 6
    assert module.heard == 4
    assert trainer.callback_metrics["scale"] == 2.0
    assert module.log.__func__ is LightningModule.log  # type: ignore[attr-defined]


class Plain(LightningModule):
    """What the next ones begin with."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.01)


class Consolidated(Plain):
    """Elastic weight consolidation: its step reads an anchor and the Fisher information by name."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = {n: p.detach().clone() for n, p in self.net.named_parameters()}
        self.fisher = [torch.rand_like(p) for p in self.net.parameters()]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        named = zip(self.net.named_parameters(), self.fisher, strict=True)
        pull = sum((f * (p - self.anchor[n]).square()).sum() for (n, p), f in named)
        return super().training_step(batch, batch_idx) + pull


class Target(Plain):
    """Its step reads a target network, and copies the network into it every other time."""

    def __init__(self) -> None:
        super().__init__()
        self.target = copy.deepcopy(self.net).requires_grad_(False)
        self.count = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.count % 2 == 0:
            self.target.load_state_dict(self.net.state_dict())
        self.count += 1
        return (self.net(batch) - self.target(batch).detach() - 1).square().mean()


class MeanTeacher(Target):
    """Its step moves an average towards the network (Tarvainen and Valpola 2017)."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        for mean, p in zip(self.target.parameters(), self.net.parameters(), strict=True):
            mean.data.lerp_(p.data, 0.1)
        return (self.net(batch) - self.target(batch).detach() - 1).square().mean()


@pytest.mark.parametrize("kind", [Consolidated, Target, MeanTeacher])
def test_a_step_that_reads_what_is_cut_along_is_tried_with_it_cut(
    kind: type[Plain], trainer_kwargs: dict[str, Any]
) -> None:
    module = kind()
    trainer = Trainer(
        **{**trainer_kwargs, "max_epochs": 3}, callbacks=[StructuredPruning(ratio=0.5, when=1)]
    )
    trainer.fit(module, DataLoader([torch.randn(8) for _ in range(12)], batch_size=4))
    shapes = [p.shape for p in module.net.parameters()]
    assert shapes[0] == (8, 8)
    if isinstance(module, Consolidated):
        assert [t.shape for t in module.anchor.values()] == shapes
        assert [t.shape for t in module.fisher] == shapes
    else:
        assert [p.shape for p in module.target.parameters()] == shapes


def test_a_step_that_reads_what_is_not_cut_is_refused(trainer_kwargs: dict[str, Any]) -> None:
    class Masked(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.mask = [{"first": torch.ones(16)}]  # a history, by its form

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            hidden = F.linear(batch, self.net[0].weight) * self.mask[0]["first"]
            return hidden.mean() + super().training_step(batch, batch_idx)

    fit = Trainer(**trainer_kwargs, callbacks=[StructuredPruning(ratio=0.5, when=1)]).fit
    with pytest.raises(BrokenModel, match="training_step"):
        fit(Masked(), DataLoader([torch.randn(8) for _ in range(12)], batch_size=4))


def test_networks_that_a_step_calls_one_by_one_are_told_of_their_forward(
    trainer_kwargs: dict[str, Any],
) -> None:
    class Pair(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.ModuleDict({"code": nn.Linear(8, 16), "back": nn.Linear(16, 8)})

        def forward(self, x: Tensor) -> Tensor:
            return self.net["back"](self.net["code"](x).relu())

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            code = self.net["code"](batch).relu()
            return (self.net["back"](code) - batch).square().mean()

    data = DataLoader([torch.randn(8) for _ in range(12)], batch_size=4)
    with pytest.raises(NoEffect, match="a `forward` that calls these networks"):
        Trainer(**trainer_kwargs, callbacks=[StructuredPruning(ratio=0.5, when=0)]).fit(
            Pair(), data
        )
    module, example = Pair(), torch.randn(4, 8)
    pruning = StructuredPruning(ratio=0.5, when=0, example=example)
    with pytest.warns(UserWarning, match="looks untrained"):
        Trainer(**trainer_kwargs, callbacks=[pruning]).fit(module, data)
    assert module.net["code"].out_features == 8
    assert any("net.back" in n for n in pruning.receipt.notes if n.startswith("not compensated"))


class PerSample(LightningModule):
    """Whose step asks for the gradient of each sample, by `torch.func`, beside the plain loss."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weights = {name: p.detach() for name, p in self.named_parameters()}

        def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(self, weights, (x[None],)), y[None])

        each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, *batch)
        self.norms = torch.stack([g.flatten(1).norm(dim=1) for g in each.values()]).norm(dim=0)
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_step_with_gradients_of_each_sample_is_pruned(trainer_kwargs: dict[str, Any]) -> None:
    model = PerSample()
    data = DataLoader(TensorDataset(torch.randn(8, 4), torch.arange(8) % 2), 4)
    pruning = StructuredPruning(ratio=0.5, when=1)
    Trainer(**{**trainer_kwargs, "max_epochs": 3, "callbacks": [pruning]}).fit(model, data)
    assert model.a.out_features == 4 and model.norms.shape == (4,)
