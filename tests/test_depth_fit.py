"""Whole blocks that go in the middle of a fit, against uninterrupted fits and optimizers by hand."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from tiny import Fit
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import StructuredPruning, WeightMasks, load_from_checkpoint
from lightning_accel.errors import Unsupported
from lightning_accel.pruning import Params
from lightning_accel.surgery.bypass import Bypass

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.BatchNorm1d(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))))


class Net(LightningModule):
    def __init__(self, scores: tuple[float, ...] = (1.0,)) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 8), Block(), Block(), Block(), Block(), nn.Linear(8, 4)
        )
        self.scores = scores

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", F.cross_entropy(self.net(batch[0]), batch[1]))
        self.log("score", self.scores[min(self.trainer.current_epoch, len(self.scores) - 1)])

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        decayed = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() == 1]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, 1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 8, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(16) % 4), 8)


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Fit:
    return tiny.fits(trainer_kwargs, loader, epochs=5)


def every_epoch(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}")


def seeded(scores: tuple[float, ...] = (1.0,)) -> Net:
    torch.manual_seed(0)
    return Net(scores)


def gone(module: Net) -> list[int]:
    return [n for n, one in enumerate(module.net) if isinstance(one, Bypass)]


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


HOW: dict[str, dict[str, Any]] = {
    "blocks by steps": {"ratio": 0.5, "depth": "only", "when": [1, 3]},
    "with width": {"target": Params(0.3), "depth": True, "when": [1, 3], "schedule": "cubic"},
}


@pytest.mark.parametrize("how", HOW)
def test_resume_at_every_epoch_is_bit_equal(fit: Fit, tmp_path: Path, how: str) -> None:
    whole, pruning = seeded(), StructuredPruning(**HOW[how])
    trainer = fit(whole, pruning, every_epoch(tmp_path))
    assert gone(whole) and len(pruning.history) == 2
    for epoch in range(4):
        resumed = Net()
        again = fit(resumed, StructuredPruning(**HOW[how]), ckpt=tmp_path / f"epoch={epoch}.ckpt")
        assert same(whole, resumed), epoch
        states = [t.optimizers[0].state_dict()["state"] for t in (trainer, again)]
        for one, other in zip(states[0].values(), states[1].values(), strict=True):
            assert all(torch.equal(one[k], other[k]) for k in one)


def test_every_way_to_a_checkpoint_and_back(fit: Fit, tmp_path: Path) -> None:
    model = seeded()
    trainer = fit(model, StructuredPruning(**HOW["with width"]), every_epoch(tmp_path))
    final, removed = copy.deepcopy(model.state_dict()), gone(model)
    path = tmp_path / "epoch=4.ckpt"
    stored = torch.load(path, weights_only=True)["lightning_accel"]
    assert stored["structure"]["bypassed"][f"net.{removed[0]}"] == {"tensor": [0, "x"]}
    assert stored["dense"]["tensors"][f"net.{removed[0]}.up.weight"] == [12, 8]
    assert same(model, load_from_checkpoint(Net, path))
    first = tmp_path / "epoch=0.ckpt"
    for at in (first, path):
        with pytest.warns(UserWarning, match="another structure"):
            trainer.test(model, loader(), ckpt_path=at, verbose=False)
        assert gone(model) == ([] if at is first else removed)
        assert set(model.state_dict()) == set(torch.load(at, weights_only=True)["state_dict"])
    assert all(torch.equal(final[k], v) for k, v in model.state_dict().items())


def test_the_optimizer_goes_on_as_one_that_never_knew_the_block(fit: Fit) -> None:
    class Look(Callback):
        def on_model_edit_start(self, trainer: Trainer, module: LightningModule) -> None:
            optimizer = trainer.optimizers[0]
            self.lengths = [len(g["params"]) for g in optimizer.param_groups]
            moments = {n: optimizer.state[p]["exp_avg"] for n, p in module.named_parameters()}
            self.record = [{n: moment.clone() for n, moment in moments.items()}]

        def on_model_edit_end(
            self, trainer: Trainer, module: LightningModule, receipt: Any
        ) -> None:
            (optimizer,) = trainer.optimizers
            named, moments = dict(module.named_parameters()), self.record[0]
            order = [[p for p in named.values() if (p.dim() > 1) is wide] for wide in (True, False)]
            for group, wanted in zip(optimizer.param_groups, order, strict=True):
                assert all(a is b for a, b in zip(group["params"], wanted, strict=True))
            assert len(optimizer.state) == len(named)
            for name, parameter in named.items():
                assert torch.equal(optimizer.state[parameter]["exp_avg"], moments[name])
            self.removed = {r.name for r in receipt.removed}
            assert moments.keys() - named.keys() == self.removed

    look = Look()
    module = seeded()
    fit(module, StructuredPruning(ratio=0.5, depth="only", when=2), look, epochs=3)
    assert look.lengths == [10, 18] and len(look.removed) == 12 and len(gone(module)) == 2


@pytest.mark.parametrize(
    "average", [EMAWeightAveraging, lambda: StochasticWeightAveraging(1e-3, 0.5)]
)
def test_weight_averages_follow(fit: Fit, tmp_path: Path, average: Any) -> None:
    def callbacks() -> list[Callback]:
        return [average(), StructuredPruning(**HOW["blocks by steps"])]

    whole = seeded()
    fit(whole, *callbacks(), every_epoch(tmp_path))
    assert gone(whole)
    for epoch in (0, 3):
        resumed = Net()
        fit(resumed, *callbacks(), ckpt=tmp_path / f"epoch={epoch}.ckpt")
        assert same(whole, resumed), epoch


@pytest.mark.parametrize("how", HOW)
def test_a_prune_that_is_taken_back_leaves_nothing_of_it(
    fit: Fit, tmp_path: Path, how: str
) -> None:
    """The fit ends as one that stopped before the second prune, and went on with the same batches."""
    settings = {**HOW[how], "max_drop": 0.1, "monitor": "score"}
    module, pruning = seeded((1.0, 1.0, 1.0, 0.0)), StructuredPruning(**settings)
    before: dict[str, Any] = {}

    class Note(Callback):
        def on_model_edit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 3 and not before:
                before["state"] = copy.deepcopy(pl_module.state_dict())
                before["optimizer"] = copy.deepcopy(trainer.optimizers[0].state_dict())
                before["members"] = [list(g["params"]) for g in trainer.optimizers[0].param_groups]

        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 4:
                before["after"] = trainer.optimizers[0]

    note = Note()
    with pytest.warns(UserWarning, match="is taken back"):
        trainer = fit(module, note, pruning, every_epoch(tmp_path), limit_train_batches=1)
    assert [step.get("rolled_back") for step in pruning.history] == [None, 4]
    assert {k: v.shape for k, v in before["state"].items()} == {
        k: v.shape for k, v in module.state_dict().items()
    }
    optimizer = trainer.optimizers[0]
    for group, members in zip(optimizer.param_groups, before["members"], strict=True):
        assert all(a is b for a, b in zip(group["params"], members, strict=True))
    for one, other in zip(
        before["optimizer"]["state"].values(), optimizer.state.values(), strict=True
    ):
        assert torch.equal(one["exp_avg"], other["exp_avg"])
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in before["state"].items())
    resumed = Net((1.0, 1.0, 1.0, 0.0))
    path = tmp_path / "epoch=3.ckpt"
    with pytest.warns(UserWarning, match="is taken back"):
        fit(resumed, StructuredPruning(**settings), ckpt=path, limit_train_batches=1)
    assert same(module, resumed)


class Slow:
    """An object of somebody's own, in the order of the parameters: as of torch_ema."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.refs = [weakref.ref(p) for p in parameters]
        self.shadow = [p.detach().clone() for p in parameters]

    def update(self) -> None:
        for slow, ref in zip(self.shadow, self.refs, strict=True):
            parameter = ref()
            assert parameter is not None
            slow.lerp_(parameter.detach(), 0.5)


class Averages(Callback):
    """The same average in six forms that people keep."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        named = list(pl_module.named_parameters())
        self.module = pl_module
        self.by_name = {name: p.detach().clone() for name, p in named}
        self.in_order = [p.detach().clone() for _, p in named]
        self.pairs = [(p, p.detach().clone()) for _, p in named]
        self.by_parameter = {p: {"slow": p.detach().clone()} for _, p in named}
        self.own = Slow([p for _, p in named])
        self.part = copy.deepcopy(pl_module.net).requires_grad_(False)

    def on_train_batch_end(self, *_: Any) -> None:
        parameters = dict(self.module.named_parameters())
        for name, slow in self.by_name.items():
            slow.lerp_(parameters[name].detach(), 0.5)
        for slow, parameter in zip(self.in_order, parameters.values(), strict=True):
            slow.lerp_(parameter.detach(), 0.5)
        for parameter, slow in self.pairs:
            slow.lerp_(parameter.detach(), 0.5)
        for parameter, held in self.by_parameter.items():
            held["slow"].lerp_(parameter.detach(), 0.5)
        self.own.update()
        pairs = zip(self.part.parameters(), self.module.net.parameters(), strict=True)
        for slow, parameter in pairs:
            slow.data.lerp_(parameter.detach(), 0.5)

    def state_dict(self) -> dict[str, Any]:
        return {"by_name": self.by_name}

    def all(self) -> list[list[Tensor]]:
        return [
            list(self.by_name.values()),
            self.in_order,
            [slow for _, slow in self.pairs],
            [held["slow"] for held in self.by_parameter.values()],
            self.own.shadow,
            [p.data for p in self.part.parameters()],
        ]


def test_averages_of_any_form_let_go_of_a_block(fit: Fit) -> None:
    module, averages = seeded(), Averages()
    truth: dict[str, Tensor] = {}

    class ByHand(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            for name, parameter in module.named_parameters():
                slow = truth.setdefault(name, start[name].clone())
                slow.lerp_(parameter.detach(), 0.5)

    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, averages, StructuredPruning(ratio=0.5, depth="only", when=[1, 3]), ByHand())
    names = [name for name, _ in module.named_parameters()]
    assert len(names) == 16 < len(truth) == 28
    for form in averages.all():
        assert all(torch.equal(truth[n], t) for n, t in zip(names, form, strict=True))


def test_averages_of_any_form_come_back_with_a_block(fit: Fit, tmp_path: Path) -> None:
    settings = {**HOW["blocks by steps"], "max_drop": 0.1, "monitor": "score"}
    averages: Averages
    for ckpt in (None, tmp_path / "epoch=3.ckpt"):
        module, averages = seeded((1.0, 1.0, 1.0, 0.0)), Averages()
        callbacks = [
            averages,
            StructuredPruning(**settings),
            *([] if ckpt else [every_epoch(tmp_path)]),
        ]
        with pytest.warns(UserWarning, match="is taken back"):
            fit(module, *callbacks, ckpt=ckpt)
        shapes = [p.shape for p in module.parameters()]
        assert len(shapes) == 22
        for form in averages.all():
            assert [t.shape for t in form] == shapes
        named = dict(module.named_parameters())
        assert list(averages.by_name) == list(named)
        assert all(a is b for a, b in zip(averages.by_parameter, named.values(), strict=True))


def test_a_tuple_of_averages_is_refused_before_anything_goes(fit: Fit) -> None:
    class Tuple(Callback):
        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            self.slow = tuple(p.detach().clone() for p in pl_module.parameters())

    module = seeded()
    with pytest.raises(Unsupported, match="a tuple cannot follow when a whole block goes"):
        fit(module, Tuple(), StructuredPruning(ratio=0.5, depth="only", when=1))
    assert not gone(module)


def test_an_optimizer_of_one_block_alone_is_refused(fit: Fit) -> None:
    class Several(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(part.parameters(), 0.1) for part in self.net]

    module = Several()
    with pytest.raises(Unsupported, match="an optimizer would be left without any parameter"):
        fit(module, StructuredPruning(ratio=0.5, depth="only", when=1))
    assert not gone(module)


@pytest.mark.filterwarnings(
    "ignore:the network is worse at the end"
)  # its scores fall by the epoch
def test_masks_of_a_block_rest_and_come_back_with_it(fit: Fit, tmp_path: Path) -> None:
    settings = {"ratio": 0.75, "depth": "only", "when": [1, 3, 4], "max_drop": 0.1}
    settings["monitor"] = "score"
    for ckpt in (None, tmp_path / "epoch=3.ckpt"):
        module, masks = seeded((1.0, 1.0, 1.0, 0.0)), WeightMasks(pattern="2:4")
        callbacks = [
            masks,
            StructuredPruning(**settings),
            *([] if ckpt else [every_epoch(tmp_path)]),
        ]
        with pytest.warns(UserWarning, match="is taken back"):
            fit(module, *callbacks, ckpt=ckpt, epochs=6)
        assert len(gone(module)) == 1
        for name, parameter in module.named_parameters():
            zeros = (
                (parameter.detach().unflatten(-1, (-1, 4)) == 0) if parameter.dim() > 1 else None
            )
            assert zeros is None or bool((zeros.sum(-1) == 2).all()), name


def test_a_narrow_block_that_is_gone_comes_back_narrow_in_another_process(
    fit: Fit, tmp_path: Path
) -> None:
    def callbacks() -> list[Callback]:
        narrow = StructuredPruning(ratio=0.5, when=1, select="net.*.up")
        return [narrow, StructuredPruning(ratio=0.8, depth="only", when=3)]

    fit(seeded(), *callbacks(), every_epoch(tmp_path))
    resumed = Net()
    trainer = fit(resumed, *callbacks(), ckpt=tmp_path / "epoch=3.ckpt")
    assert len(gone(resumed)) == 3
    trainer.save_checkpoint(tmp_path / "gone.ckpt")
    dense = torch.load(tmp_path / "gone.ckpt", weights_only=True)["lightning_accel"]["dense"]
    assert dense["tensors"][f"net.{gone(resumed)[0]}.norm.weight"] == [8]
    with pytest.warns(UserWarning, match="another structure"):
        trainer.test(resumed, loader(), ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False)
    assert not gone(resumed) and all(block.up.out_features == 6 for block in resumed.net[1:5])
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    assert same(resumed, load_from_checkpoint(Net, tmp_path / "again.ckpt"))


class Bounded(Net):
    """Its score is good while as many blocks are there, and so many of their multiply-accumulates."""

    def __init__(self, blocks: int, share: float) -> None:
        super().__init__()
        self.least, self.full = (blocks, share), macs(self)
        self.seen: list[tuple[int, float]] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        there = 4 - len(gone(self)), macs(self) / self.full
        if not self.trainer.sanity_checking and there not in self.seen[-1:]:
            self.seen.append(there)
        good = there[0] >= self.least[0] and there[1] >= self.least[1]
        self.log("score", 0.9 if good else 0.5, on_epoch=True)


def macs(module: Net) -> int:
    """Multiply-accumulates of one sample, counted by hand: all is in linear layers."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


@pytest.mark.parametrize(("depth", "blocks", "share"), [("only", 2, 0.0), (True, 0, 0.45)])
def test_a_search_takes_whole_blocks_as_far_as_the_metric_allows(
    fit: Fit, depth: Any, blocks: int, share: float
) -> None:
    torch.manual_seed(0)
    model = Bounded(blocks, share)
    pruning = StructuredPruning(when=1, max_drop=0.01, monitor="score", depth=depth)
    fit(model, pruning, epochs=14)
    left, kept = 4 - len(gone(model)), macs(model) / model.full
    if depth == "only":
        assert left == blocks and len(model.seen) > 3
    else:  # width or blocks, whichever changes the outputs less
        assert share <= kept < 1.25 * share
    assert sum(1 for point in pruning.trade_off if point["kept"] == pytest.approx(kept)) == 1
    assert model.seen[0] == (4, 1.0)
