"""What people met who let a metric decide how much of a network may go."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import StructuredPruning, load_from_checkpoint, prune
from lightning_accel.pruning.importance import score
from lightning_accel.pruning.selection import least
from lightning_accel.pruning.sensitivity import graph_of
from lightning_accel.pruning.weighing import weighed
from lightning_accel.surgery.call import as_call

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]
X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Coupled(nn.Module):
    """Whose stem and second convolution are added up, and so lose the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.conv2, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head((x + self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))


def test_layers_that_are_added_up_are_weighed_by_what_their_prune_does() -> None:
    """FasterAI-Labs/fasterai#40: pruned alone they cannot go, change nothing, and pass for the most robust."""
    torch.manual_seed(0)
    net = Coupled().double()
    calls = [as_call(X.double())]
    graph = graph_of(net, calls)
    scores = {g.name: score(graph.model, g, "magnitude") for g in graph.groups}
    prices = weighed(graph, scores, [calls])
    wanted = net(X.double())
    dense = graph.macs({})
    assert {member.tensor for g in graph.groups for member in g.members} >= {
        "stem.weight",
        "conv2.weight",
    }
    for group in graph.groups:
        gone = {group.name: least(scores[group.name], kept=6)}
        small = copy.deepcopy(net)
        graph.cut(gone).apply(small)
        with torch.no_grad():
            error = float(((small(X.double()) - wanted).norm() / wanted.norm()).square())
        saved = 1 - graph.macs(gone) / dense
        first = prices[group.name][gone[group.name][0]]
        assert float(first) == pytest.approx(error / saved, rel=1e-4) and error > 1e-4


def test_no_layer_is_emptied_however_little_it_costs() -> None:
    """Eric-mingjie/rethinking-network-pruning#18: one threshold for all layers, and a layer without channels."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)
    )
    net[2].weight.data *= 1e-6  # whose channels cost next to nothing
    prune(net, example=X, ratio=0.8, scope="sensitivity")
    assert min(net[0].out_channels, net[2].out_channels) == 1
    assert bool(net(X).isfinite().all())


class Grows(LightningModule):
    """Its score falls with its size, and is too low below half."""

    def __init__(self, width: int = 16, every: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(192, width), nn.ReLU(), nn.Linear(width, 4)
        )
        self.width = width

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        left = self.net[1].out_features / self.width
        self.log(
            "acc", 0.9 + 0.001 * self.current_epoch if left >= 0.5 else 0.95 - 0.5 * (1 - left)
        )

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-2)


def fit(
    module: LightningModule, *callbacks: Callback, path: Path, epochs: int, **kw: Any
) -> Trainer:
    batches = DataLoader(TensorDataset(X, torch.arange(32) % 4), 16)
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    saves = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    trainer = Trainer(
        accelerator="cpu", default_root_dir=path, max_epochs=epochs, callbacks=list(callbacks),
        enable_checkpointing=saves, **silent, **kw,
    )  # fmt: skip
    trainer.fit(module, batches, batches)
    return trainer


def search(**changed: Any) -> StructuredPruning:
    return StructuredPruning(**{"when": 1, "max_drop": 0.01, "monitor": "acc", **changed})


@pytest.mark.slow
def test_the_best_file_is_of_a_network_that_was_not_taken_back(tmp_path: Path) -> None:
    """openvinotoolkit/nncf#1149: the best checkpoints of an adaptive compression were not those of its result."""
    model, keep = Grows(), ModelCheckpoint(dirpath=tmp_path, monitor="acc", mode="max")
    pruning = search()
    fit(model, pruning, keep, path=tmp_path, epochs=10)
    assert any("rolled_back" in entry for entry in pruning.history)
    best = load_from_checkpoint(Grows, keep.best_model_path)
    assert best.net[1].out_features == model.net[1].out_features >= 8


@pytest.mark.slow
def test_a_metric_of_every_other_epoch_is_waited_for(tmp_path: Path) -> None:
    """tensorflow/addons#1306 and others: `check_val_every_n_epoch=2`, and the metric is an epoch old."""
    model, pruning = Grows(), search(when=2)
    fit(model, pruning, path=tmp_path, epochs=14, check_val_every_n_epoch=2)
    assert 8 <= model.net[1].out_features <= 9
    epochs = [entry["epoch"] for entry in pruning.history]
    assert all(later - earlier >= 2 for earlier, later in pairwise(epochs))


def test_a_fit_that_is_stopped_early_ends_within_the_budget(tmp_path: Path) -> None:
    """keras-team/keras#15736: whoever returns too early never restores the weights."""

    class Worse(Grows):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("acc", 0.9 if self.net[1].out_features == self.width else 0.5)
            self.log("loss", 1.0)

    model = Worse()
    pruning = search(patience=3)
    stop = EarlyStopping("loss", patience=1, check_on_train_epoch_end=False)
    trainer = fit(model, pruning, stop, path=tmp_path, epochs=12)
    assert trainer.current_epoch < 12 and model.net[1].out_features == 16
    assert "rolled_back" in pruning.history[-1]


@pytest.mark.slow
def test_a_score_that_rises_as_the_network_shrinks_is_no_error(tmp_path: Path) -> None:
    """PaddlePaddle/PaddleDetection#2504: losses of sensitivity that are negative."""

    class Better(Grows):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("acc", 1.0 / self.net[1].out_features)

    model, pruning = Better(), search()
    fit(model, pruning, path=tmp_path, epochs=14)
    assert model.net[1].out_features == 1
    assert [p["pareto"] for p in pruning.trade_off] == [False] * (len(pruning.trade_off) - 1) + [
        True
    ]


class Momentum(Grows):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(
            (p for p in self.parameters() if p.requires_grad), 1e-2, momentum=0.9
        )


@pytest.mark.slow
def test_every_layer_goes_on_training_with_its_momentum(tmp_path: Path) -> None:
    """FasterAI-Labs/fasterai#92 and #93: after a step the optimizer held the old parameters, or began cold."""
    model = Momentum()
    trainer = fit(model, search(), path=tmp_path, epochs=4)
    (optimizer,) = trainer.optimizers
    assert model.net[1].out_features < 16
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
        id(p) for p in model.parameters()
    ]
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        assert optimizer.state[p]["momentum_buffer"].shape == p.shape
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_what_is_frozen_stays_frozen_and_as_it_was(tmp_path: Path) -> None:
    """FasterAI-Labs/fasterai#92: parameters that are made anew by a prune began to train."""
    model = Momentum()
    model.net[3].bias.requires_grad_(False)
    frozen = model.net[3].bias.detach().clone()
    fit(model, search(compensate=False), path=tmp_path, epochs=4)
    assert model.net[1].out_features < 16 and not model.net[3].bias.requires_grad
    assert torch.equal(model.net[3].bias, frozen)


def test_metrics_are_those_of_the_network_that_came_back(tmp_path: Path) -> None:
    """Lightning-AI/pytorch-lightning#13099: after a way back the logged loss has to be right as well."""
    seen: list[tuple[int, float]] = []

    class Looks(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, module: Any, batch: Any, index: int
        ) -> None:
            if index == 0 and trainer.current_epoch:
                seen.append((module.net[1].out_features, float(trainer.callback_metrics["acc"])))

    model = Grows()
    pruning = StructuredPruning(ratio=0.9, when=[1, 2, 3], max_drop=0.01, monitor="acc")
    with pytest.warns(UserWarning, match="taken back"):
        fit(model, pruning, Looks(), path=tmp_path, epochs=5)
    back = pruning.history[-1]["rolled_back"]
    width, score = seen[back - 1]
    assert width >= 8 and score == pytest.approx(0.9, abs=0.01)


@pytest.mark.slow
def test_a_file_of_a_search_is_read_into_the_wide_network(tmp_path: Path) -> None:
    """PaddlePaddle/PaddleX#600 and lmbxmu/FilterSketch#1: no resume in a prune, or with another accuracy."""
    model, keep = Grows(), ModelCheckpoint(dirpath=tmp_path, save_last=True)
    trainer = fit(model, search(), keep, path=tmp_path, epochs=5)
    again, batches = Grows(), DataLoader(TensorDataset(X, torch.arange(32) % 4), 16)
    other = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[search()],
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    other.validate(again, batches, ckpt_path=keep.last_model_path, verbose=False)
    assert again.net[1].out_features == model.net[1].out_features < 16
    assert trainer.current_epoch == 5
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in again.state_dict().items())
