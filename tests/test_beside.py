"""What is kept beside the weights, through a resume and a roll-back: as in the fit that was not interrupted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import StructuredPruning

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (32,), generator=torch.Generator().manual_seed(2))


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("good", 1.0 if self.trainer.current_epoch < 1 else 0.0)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)


class Byol(Module):
    """A target that moves with the network, inside of the module (Grill et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.target = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            aim = self.target(batch[0])
        return (self.net(batch[0]) - aim - 0.1).square().mean()

    @torch.no_grad()
    def on_train_batch_end(self, *_: Any) -> None:
        for held, p in zip(self.target.parameters(), self.net.parameters(), strict=True):
            held.lerp_(p, 0.5)


class Inside(Module):
    """Keeps an object of a class of its own, as torch_ema's, among its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.ema = Shadowed(self.net)

    @torch.no_grad()
    def on_train_batch_end(self, *_: Any) -> None:
        self.ema.update()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["ema"] = self.ema.shadow

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for held, stored in zip(self.ema.shadow, checkpoint["ema"], strict=True):
            held.copy_(stored)


class Shadowed:
    def __init__(self, net: nn.Module) -> None:
        self.shadow = [p.detach().clone() for p in net.parameters()]
        self.update = lambda: [
            held.lerp_(p, 0.5) for held, p in zip(self.shadow, net.parameters(), strict=True)
        ]


class Saves(Callback):
    """Writes a checkpoint after each epoch, under a name that tells it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = self.folder / f"epoch={trainer.current_epoch}.ckpt"
        if not path.exists():
            trainer.save_checkpoint(path)


class Keeper(Callback):
    """Makes a copy in `setup`: an average that goes into checkpoints or not, or an anchor that stays."""

    def __init__(self, form: str, moves: bool = True, saves: bool = True) -> None:
        self.form, self.moves, self.saves = form, moves, saves

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        values = {n: p.detach().clone() for n, p in pl_module.net.named_parameters()}
        self.kept: Any = values
        if self.form == "list":
            self.kept = list(values.values())
        if self.form == "part":
            self.kept = copy.deepcopy(pl_module.net).requires_grad_(False)
        if self.form == "whole":
            self.kept = copy.deepcopy(pl_module).requires_grad_(False)

    def tensors(self) -> list[Tensor]:
        if isinstance(self.kept, nn.Module):
            return [p.data for p in self.kept.parameters()]
        return list(self.kept.values()) if isinstance(self.kept, dict) else list(self.kept)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        for held, p in zip(self.tensors(), pl_module.net.parameters(), strict=True):
            if self.moves:
                held.lerp_(p, 0.5)
            else:
                assert held.shape == p.shape
                p.lerp_(held, 0.01)

    def state_dict(self) -> dict[str, Any]:
        return {"kept": [t.clone() for t in self.tensors()]} if self.saves else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for held, stored in zip(self.tensors(), state["kept"], strict=True):
            held.copy_(stored)


def fit(
    module: Module, *callbacks: Callback, epochs: int = 4, ckpt: Path | None = None, **options: Any
) -> Trainer:
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    data = DataLoader(TensorDataset(X, Y), batch_size=8)
    trainer.fit(module, data, data, ckpt_path=None if ckpt is None else str(ckpt))
    return trainer


CASES = {
    "dict": lambda: Keeper("dict"),
    "list": lambda: Keeper("list"),
    "part": lambda: Keeper("part"),
    "whole": lambda: Keeper("whole"),
    "anchor": lambda: Keeper("dict", moves=False, saves=False),
    "anchors": lambda: Keeper("list", moves=False, saves=False),
}


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_a_resumed_fit_is_the_uninterrupted_one(name: str, after: int, tmp_path: Path) -> None:
    """Resumed just before the first prune, and just before the second."""
    made = []
    for part in (0, 1):
        keeper, module = CASES[name](), Module()
        saver = Saves(tmp_path)
        prune = StructuredPruning(ratio=0.5, when=[1, 2])
        ckpt = tmp_path / f"epoch={after}.ckpt" if part else None
        fit(module, prune, keeper, saver, ckpt=ckpt)
        made.append((module, keeper))
    (whole, one), (resumed, other) = made
    assert whole.net[0].weight.shape[0] < 16
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    for p, q in zip(one.tensors(), other.tensors(), strict=True):
        assert p.shape == q.shape and torch.equal(p, q)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Byol, Inside])
@pytest.mark.parametrize("after", [0, 1])
def test_a_resumed_module_with_an_average_inside(
    kind: type[Module], after: int, tmp_path: Path
) -> None:
    made = []
    for part in (0, 1):
        module = kind()
        saver = Saves(tmp_path)
        prune = StructuredPruning(ratio=0.5, when=[1, 2])
        ckpt = tmp_path / f"epoch={after}.ckpt" if part else None
        fit(module, prune, saver, ckpt=ckpt)
        made.append([*module.parameters(), *(module.ema.shadow if kind is Inside else [])])
    assert made[0][0].shape[0] < 16
    assert all(torch.equal(p, q) for p, q in zip(*made, strict=True))


def test_an_average_that_no_checkpoint_holds_begins_with_what_was_kept(tmp_path: Path) -> None:
    """As in a plain fit, where it begins with the weights of the fresh module."""
    saver = Saves(tmp_path)
    fit(
        Module(), StructuredPruning(ratio=0.5, when=1), Keeper("part", saves=False), saver, epochs=2
    )
    path = tmp_path / "epoch=1.ckpt"
    kept = torch.load(path)["lightning_accel"]["kept"][0]
    rows = kept["net.0.weight"]["dims"][0]
    resumed = Keeper("part", saves=False)
    seen: list[Tensor] = []

    class Looks(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.extend(t.clone() for t in resumed.tensors())

    fit(
        Module(),
        StructuredPruning(ratio=0.5, when=1),
        resumed,
        Looks(),
        Saves(tmp_path),
        epochs=3,
        ckpt=path,
    )
    assert torch.equal(seen[0], Module().net[0].weight[rows])
    assert torch.equal(seen[2], Module().net[2].weight[:, rows])


ROLLED = {**CASES, "byol": None, "inside": None}


@pytest.mark.parametrize("name", ROLLED)
def test_a_prune_that_is_taken_back_leaves_no_trace(name: str) -> None:
    """The fit goes on as one that never pruned, from the weights and the average of before."""
    kind = {"byol": Byol, "inside": Inside}.get(name, Module)
    make = CASES.get(name, lambda: Keeper("none", moves=False))
    seen: list[list[Tensor]] = []

    class Looks(Callback):
        def on_model_edit_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(everything(pl_module, keeper))

        def on_model_edit_end(self, trainer: Any, pl_module: Any, receipt: Any) -> None:
            seen.append(everything(pl_module, keeper))

    keeper, module = make(), kind()
    prune = StructuredPruning(ratio=0.5, when=1, max_drop=0.1, monitor="good")
    callbacks = [prune, Looks()] + ([keeper] if name in CASES else [])
    with pytest.warns(UserWarning, match="is taken back"):
        fit(module, *callbacks, epochs=3)
    assert len(seen) == 4  # before and after the prune, before and after its end
    assert seen[1][0].shape[0] == 8
    assert all(torch.equal(p, q) for p, q in zip(seen[0], seen[3], strict=True))


def everything(module: Any, keeper: Keeper) -> list[Tensor]:
    held = keeper.tensors() if hasattr(keeper, "kept") else []
    held = held + (module.ema.shadow if isinstance(module, Inside) else [])
    return [t.detach().clone() for t in (*module.parameters(), *held)]
