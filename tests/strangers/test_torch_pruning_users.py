"""People who prune by torch-pruning inside of a training, with what they brought, against a plain loop or formula."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import AttentionNet, silent
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import StructuredPruning, load_from_checkpoint
from lightning_accel.errors import AccelError, NoEffect
from lightning_accel.pruning import prune

L2 = tp.importance.GroupMagnitudeImportance(p=2)


class Faces(LightningModule):
    """A small classifier, with a backbone that may be frozen."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU())
        self.neck, self.classifier, self.lr = nn.Linear(20, 16), nn.Linear(16, 3), lr
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.relu(self.neck(self.backbone(x))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.seen.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        live = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(live, self.lr)


def faces() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 8, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 24)


def l2(**given: Any) -> Any:
    def pruner(model: Any, example: Any) -> Any:
        ignored = [model.classifier]
        return tp.pruner.MetaPruner(model, example, importance=L2, ignored_layers=ignored, **given)

    return pruner


def fit(folder: Path, pruner: Any, when: Any, module: Any = None, **given: Any) -> Any:
    torch.manual_seed(0)
    module = module or Faces()
    pruning = StructuredPruning(pruner=pruner, when=when)
    callbacks = [pruning, *given.pop("callbacks", [])]
    Trainer(**{**silent(folder), **given}, callbacks=callbacks).fit(module, faces())
    return module, pruning


@pytest.mark.slow
def test_loss_goes_on_falling_through_many_small_steps(tmp_path: Path) -> None:
    """VainF/Torch-Pruning#379: a hundredth in a hundred steps, and the loss stops where the first one was made.

    There the optimizer kept parameters that the network had no more; and most steps round to no channel at all.
    """
    steps = 12
    when = list(range(5, 5 + steps))

    def late(ratio: float, steps: int) -> list[float]:
        return [ratio * max(0, step - 2) / (steps - 2) for step in range(steps + 1)]

    pruner = l2(pruning_ratio=0.2, iterative_steps=steps, iterative_pruning_ratio_scheduler=late)
    module, pruning = fit(tmp_path, pruner, when, max_epochs=40)
    assert (module.backbone[0].out_features, module.neck.out_features) == (16, 12)
    assert len(pruning.history) < steps
    (group,) = module.optimizers().param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in module.parameters()}
    assert module.seen[-1] < 0.2 * module.seen[4]


def test_a_pruner_made_before_the_loop_is_no_pruner_of_the_copy(tmp_path: Path) -> None:
    """VainF/Torch-Pruning#206: made once outside of the loop, it goes on with a network that is no more."""
    module = Faces()
    made = l2(iterative_steps=2)(module, (torch.randn(2, 8),))
    module.train()
    with pytest.raises(AccelError, match="pruned another one"):
        fit(tmp_path, lambda model, example: made, [1, 2], module, max_epochs=3)
    assert module.neck.out_features == 16
    _, pruning = fit(tmp_path, l2(iterative_steps=2), [1, 2], max_epochs=3)
    assert [step["step"] for step in pruning.history] == [1, 2]


def test_a_step_that_prunes_nothing_is_told_before_the_first_epoch(tmp_path: Path) -> None:
    """VainF/Torch-Pruning#367: the step returns nothing, and epochs are spent on a network that was not pruned."""
    module = Faces()
    for parameter in module.parameters():  # all channels are worth the same, so none is below all
        nn.init.constant_(parameter, 0.1)
    with pytest.raises(NoEffect, match="removes nothing"):
        fit(tmp_path, l2(global_pruning=True), 1, module)
    assert not module.seen


def test_heads_in_five_steps(tmp_path: Path) -> None:
    """VainF/Torch-Pruning#411: heads of a vision transformer in iterative_steps=5, and its forward fails.

    The number of heads that the forward reads was never changed; each step takes its share of what is left.
    """
    x, net = torch.randn(2, 5, 8), AttentionNet(dim=32, num_heads=8)

    def pruner(model: Any, example: Any) -> Any:
        heads = {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.2}
        return tp.pruner.MetaPruner(
            model, example, importance=L2, pruning_ratio=0.2, iterative_steps=5,
            num_heads={model.qkv: model.num_heads}, ignored_layers=[model.head], **heads,
        )  # fmt: skip

    alone = copy.deepcopy(net)
    theirs = pruner(alone, (x,))
    for _ in range(5):
        theirs.step()
    with pytest.raises(RuntimeError):
        alone(x)
    alone.num_heads = theirs.num_heads[alone.qkv]
    prune(net, example=x, pruner=pruner)
    assert net.num_heads == alone.num_heads < 8
    assert torch.equal(net(x), alone(x))


def test_a_frozen_backbone_stays_whole_and_frozen(tmp_path: Path) -> None:
    """FasterAI-Labs/fasterai#92, VainF/Torch-Pruning#454: what was frozen trains after the prune, or is cut unseen."""
    module = Faces()
    module.backbone.requires_grad_(False)
    before = copy.deepcopy(module.backbone.state_dict())
    module, pruning = fit(tmp_path, l2(pruning_ratio=0.5), 1, module, max_epochs=3)
    assert all(torch.equal(v, before[k]) for k, v in module.backbone.state_dict().items())
    assert not any(p.requires_grad for p in module.backbone.parameters())
    assert "is frozen" in pruning.history[0]["skipped"]["backbone.2"]
    assert module.neck.out_features == 8
    held = module.optimizers().optimizer.state
    assert held[module.neck.weight]["exp_avg"].shape == (8, 20)


def test_the_checkpoint_loads_without_torch_pruning_or_a_pickle(tmp_path: Path) -> None:
    """VainF/Torch-Pruning#139, #428: sizes mismatch when weights of the pruned network are loaded."""
    files = ModelCheckpoint(tmp_path, filename="last")
    given = {"callbacks": [files], "enable_checkpointing": True, "max_epochs": 2}
    module, _ = fit(tmp_path, l2(pruning_ratio=0.5), 1, **given)
    loaded = load_from_checkpoint(Faces, tmp_path / "last.ckpt")
    x = torch.randn(3, 8)
    assert loaded.neck.out_features == 8
    assert torch.equal(loaded(x), module(x))
