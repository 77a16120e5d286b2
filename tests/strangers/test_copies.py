"""Copies of networks and random states: what people lost by copying, and by what drew or seeded behind their backs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain
import pytest
import tiny
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import StructuredPruning, load_from_checkpoint
from lightning_accel.pruning import prune
from lightning_accel.surgery.call import same_random_state
from lightning_accel.surgery.twin import twin


class Remembers(nn.Module):
    """byol-pytorch#95: the last output is kept, graph and all, and the module could not be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.last = nn.Linear(4, 4), torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.net(x)
        return self.last.relu()


class Mutator:
    def __init__(self, module: nn.Module) -> None:
        self.module, self.calls = module, 0


class Mutable(nn.Module):
    """nni#2498: a module and what changes it hold each other."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)
        self.mutator = Mutator(self)

    def forward(self, x: Tensor) -> Tensor:
        assert self.mutator.module is self
        return self.net(x)


def traced() -> nn.Module:
    """vision#8634: a traced network, whose class is made for it alone."""
    return fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))


def normed() -> nn.Module:
    """pytorch#80811: a parametrized layer."""
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))


COPIES: dict[str, Callable[[], nn.Module]] = {
    "byol-pytorch#95": Remembers,
    "nni#2498": Mutable,
    "vision#8634": traced,
    "pytorch#80811": normed,
}


@pytest.mark.parametrize("report", COPIES)
def test_a_twin_computes_the_same_and_shares_nothing(report: str) -> None:
    model, x = COPIES[report](), torch.randn(3, 4)
    model(x).sum().backward()
    expected = model(x)
    made: Any = twin(model)
    assert torch.equal(made(x), expected)
    for one, other in zip(made.parameters(), model.parameters(), strict=True):
        # pytorch#3307: gradients were lost in a copy
        assert one.grad is not None and torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
        assert one.data_ptr() != other.data_ptr() and one.grad.data_ptr() != other.grad.data_ptr()  # type: ignore[union-attr]
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    assert torch.equal(model(x), expected)
    if report == "nni#2498":
        assert made.mutator.module is made and made.mutator is not model.mutator


@pytest.mark.parametrize("report", ["byol-pytorch#95", "nni#2498"])
def test_such_a_network_is_pruned_like_its_masked_twin(report: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), COPIES[report](), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(8, 4)
    model(x).sum().backward()
    masked: Any = twin(model)
    receipt = prune(model, example=x, ratio=0.5)
    kept = {one.name: one.kept.dims[0] for one in receipt.moved}
    for maker, reader in (("0", "2.net"), ("2.net", "4")):
        units = kept[f"{maker}.weight"]
        assert units is not None and len(units) == 2
        gone = sorted(set(range(4)) - set(units.tolist()))
        with torch.no_grad():
            masked.get_submodule(reader).weight[:, gone] = 0
    torch.testing.assert_close(model(x), masked(x))


def test_only_the_networks_own_gpus_are_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """lhotse#1564: a helper that seeds the process wrote over the states of every GPU in it."""
    seeded: list[str] = []
    for name in ("manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: seeded.append(name))
    with same_random_state(nn.Linear(2, 2), seed=0):
        torch.rand(1)
    assert not seeded


@pytest.mark.parametrize("technique", plain.TECHNIQUES)
def test_making_a_technique_draws_and_seeds_nothing(technique: str) -> None:
    """flash-fft-conv#26: making a layer that was never used set the seed, and every run had the same batches."""
    torch.manual_seed(5)
    made = plain.TECHNIQUES[technique].make  # a teacher is made in a state of its own
    before, seed = plain.chance(), torch.initial_seed()
    made()
    assert (plain.chance(), torch.initial_seed()) == (before, seed)


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = tiny.MLP()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:StructuredPruning cuts before")
def test_loading_draws_what_plain_loading_draws(
    trainer_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    """Lightning#20204: loading moves the random state; a pruned checkpoint must not move it any further."""
    data = DataLoader(TensorDataset(torch.ones(4, 8)), 2)
    paths = []
    for callbacks in ([], [StructuredPruning(ratio=0.5, when=0)]):
        trainer = Trainer(**{**trainer_kwargs, "callbacks": callbacks})
        trainer.fit(Module(), data)
        paths.append(tmp_path / f"{len(paths)}.ckpt")
        trainer.save_checkpoint(paths[-1])
    states = []
    for load, path in ((Module.load_from_checkpoint, paths[0]), *((_ours, p) for p in paths)):
        torch.manual_seed(3)
        load(path)
        states.append(plain.chance())
    assert states[1] == states[2] == states[0]


def _ours(path: Path) -> LightningModule:
    return load_from_checkpoint(Module, path)
