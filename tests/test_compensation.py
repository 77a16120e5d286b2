"""What a prune in a fit makes up for by itself, and when it leaves that."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_accel import StructuredPruning
from lightning_accel.pruning import compensation, prune

pytestmark = [
    pytest.mark.filterwarnings("ignore:None of the layers of this network have been trained"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]


class Mixer(LightningModule):
    """What it is pruned to can make up for much: its inputs lie in a space of few dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 20), nn.Linear(20, 3))

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0, momentum=0.9)


class Hidden(Mixer):
    """Its step cannot be made on a copy."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        if type(self.trainer) is not Trainer:
            raise RuntimeError("only in the fit itself")
        return super().training_step(batch, _)


class Stream(IterableDataset[Tensor]):
    def __init__(self, rows: Tensor) -> None:
        self.rows = iter(rows)

    def __iter__(self) -> Any:
        return self.rows


def rows(count: int = 128) -> Tensor:
    chance = torch.Generator().manual_seed(1)
    mixed = torch.randn(3, 8, generator=chance)
    return torch.randn(count, 3, generator=chance) @ mixed


def fitted(
    trainer_kwargs: dict[str, Any],
    dense: Mixer,
    *,
    data: Any = None,
    **options: Any,
) -> tuple[Mixer, StructuredPruning]:
    module = copy.deepcopy(dense)
    pruning = StructuredPruning(ratio=0.5, when=1, **options)
    trainer = Trainer(**{**trainer_kwargs, "max_epochs": 2}, callbacks=[pruning])
    trainer.fit(module, DataLoader(rows(), batch_size=16) if data is None else data)
    return module, pruning


@pytest.mark.slow
def test_by_default_the_layers_that_read_what_is_gone_are_solved_anew(
    trainer_kwargs: dict[str, Any],
) -> None:
    dense = Mixer()
    (made, pruning), (asked, _), (raw, _) = (
        fitted(trainer_kwargs, dense, **options)
        for options in ({}, {"compensate": True}, {"compensate": False})
    )
    for ours, same in zip(made.parameters(), asked.parameters(), strict=True):
        assert torch.equal(ours, same)
    assert {c.name for c in pruning.receipt.changes if c.what == "compensated"} >= {"net.2.weight"}
    left = F.mse_loss(made.net(rows()), dense.net(rows()))
    assert left < 0.1 * F.mse_loss(raw.net(rows()), dense.net(rows()))
    kept = {tuple(row.tolist()) for row in dense.net[0].weight}
    assert all(tuple(row.tolist()) in kept for row in raw.net[0].weight)


def test_it_is_the_solution_by_hand_on_the_same_batches(trainer_kwargs: dict[str, Any]) -> None:
    """Both layers see all of ten batches; the ridge is that which the batches held out choose."""
    dense = Mixer()
    made, _ = fitted(trainer_kwargs, dense)
    raw, _ = fitted(trainer_kwargs, dense, compensate=False)
    inner = dense.net[2].weight[:, [_row(dense.net[0].weight, r) for r in raw.net[0].weight]]
    outputs = [_row(inner, r) for r in raw.net[2].weight]
    x = rows().double()
    for module in (dense, raw, made):
        module.double()
    hidden = F.pad(raw.net[:2](x), (0, 1), value=1.0).detach()
    wanted = dense.net[:3](x)[:, outputs].detach()
    old = torch.cat([raw.net[2].weight, raw.net[2].bias[:, None]], 1).detach()
    errors = []
    for ridge in (3e-3, 3e-2, 3e-1, 3.0):
        pull = ridge * hidden[:, :-1].square().sum(0).mean()
        extended = torch.cat([hidden, pull.sqrt() * torch.eye(13, dtype=x.dtype)[:12]])
        target = torch.cat([wanted - hidden @ old.T, x.new_zeros(12, 10)])
        rows_ = old.T + torch.linalg.lstsq(extended, target).solution
        solved = torch.cat([made.net[2].weight, made.net[2].bias[:, None]], 1).T
        changed = (solved - old.T).abs().amax(0) > 1e-6
        assert changed.any()
        errors.append(float((solved - rows_)[:, changed].abs().max().detach()))
    assert min(errors) < 1e-5


def _row(of: Tensor, row: Tensor) -> int:
    return next(i for i, one in enumerate(of) if torch.equal(one, row))


def test_of_a_stream_the_batch_at_hand_is_solved_on(trainer_kwargs: dict[str, Any]) -> None:
    dense = Mixer()
    kwargs = {**trainer_kwargs, "limit_train_batches": 2}
    streams = [DataLoader(Stream(rows(400)), batch_size=64) for _ in range(2)]
    made, _ = fitted(kwargs, dense, data=streams[0])
    raw, _ = fitted(kwargs, dense, data=streams[1], compensate=False)
    left = F.mse_loss(made.net(rows()), dense.net(rows()))
    assert left < 0.3 * F.mse_loss(raw.net(rows()), dense.net(rows()))
    taken = [sum(1 for _ in stream.dataset.rows) for stream in streams]
    assert taken[0] == taken[1]  # of what the fit has not read


@pytest.mark.slow
def test_where_no_batch_can_be_had_the_prune_goes_on_and_says_so(
    trainer_kwargs: dict[str, Any],
) -> None:
    made, pruning = fitted(trainer_kwargs, Hidden(), example=torch.randn(4, 8))
    assert made.net[0].out_features == 12
    (note,) = [n for n in pruning.receipt.notes if n.startswith("not compensated")]
    assert "only in the fit itself" in note


@pytest.mark.parametrize("fault", ["memory", "worse"])
def test_it_is_left_where_it_cannot_be_had_or_does_harm(
    trainer_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    real = compensation.compensate

    def broken(*args: Any, **kwargs: Any) -> Any:
        if fault == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **kwargs)._replace(output=(0.1, 0.2))

    monkeypatch.setattr(compensation, "compensate", broken)
    dense = Mixer()
    made, pruning = fitted(trainer_kwargs, dense)
    raw, _ = fitted(trainer_kwargs, dense, compensate=False)
    for ours, same in zip(made.parameters(), raw.parameters(), strict=True):
        assert torch.equal(ours, same)
    (note,) = [n for n in pruning.receipt.notes if n.startswith("not compensated")]
    assert "memory" in note if fault == "memory" else "from 0.1 to 0.2" in note


class Slow(torch.optim.SGD):
    """Keeps slow weights in its state, as schedule-free optimizers do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p].setdefault("slow", p.clone()).lerp_(p, 0.1)
            self.state[p].setdefault("squares", torch.full_like(p, 0.01))
        return loss


class Kept(Callback):
    """A moving average and Fisher information, by name, as people keep them."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}
        self.fisher: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, p in pl_module.named_parameters():
            self.average[name] = p.detach().clone()
            self.fisher[name] = torch.full_like(p, 0.01)


@pytest.mark.slow
def test_slow_weights_of_an_optimizer_are_changed_as_their_weights(
    trainer_kwargs: dict[str, Any],
) -> None:
    module, kept = Mixer(), Kept()
    made: list[Slow] = []

    def configure() -> Slow:
        made.append(Slow(module.parameters(), lr=0.0))
        return made[0]

    module.configure_optimizers = configure  # type: ignore[method-assign]
    callbacks = [kept, StructuredPruning(ratio=0.5, when=1)]
    trainer = Trainer(**{**trainer_kwargs, "max_epochs": 2}, callbacks=callbacks)
    trainer.fit(module, DataLoader(rows(), batch_size=16))
    for name, p in module.named_parameters():
        assert (
            kept.average[name].shape == p.shape
        )  # an average, or an anchor: it is cut, and no more
        torch.testing.assert_close(made[0].state[p]["slow"], p.detach(), rtol=0, atol=1e-5)
        assert set(kept.fisher[name].flatten().tolist()) == {0.009999999776482582}
        assert set(made[0].state[p]["squares"].flatten().tolist()) == {0.009999999776482582}


class Heads(nn.Module):
    """Two layers with a bias in common."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.one, self.two = nn.Linear(8, 24), nn.Linear(24, 3), nn.Linear(24, 3)
        self.two.bias = self.one.bias

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x).tanh()
        return torch.cat([self.one(x), self.two(x)], 1)


def test_a_bias_that_two_layers_share_stays(trainer_kwargs: dict[str, Any]) -> None:
    dense = Mixer()
    dense.net = Heads()  # type: ignore[assignment]
    made, pruning = fitted(trainer_kwargs, dense)
    assert torch.equal(made.net.one.bias, dense.net.one.bias)  # type: ignore[arg-type]
    assert made.net.one.bias is made.net.two.bias
    changed = {c.name for c in pruning.receipt.changes if c.what == "compensated"}
    assert changed == {"net.one.weight", "net.two.weight"}


def test_the_function_has_an_example_and_no_data() -> None:
    dense = Mixer().net
    raw, same = copy.deepcopy(dense), copy.deepcopy(dense)
    prune(raw, example=rows(), ratio=0.5)
    prune(same, example=rows(), ratio=0.5, compensate=False)
    for a, b in zip(raw.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)


class Scaled(nn.Linear):
    """Equalized learning rates (Karras et al. 2018): the weight is not what is multiplied with."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 4, self.bias)


@pytest.mark.parametrize("way", ["subclass", "hook"])
def test_layers_that_compute_something_else_are_left_and_the_others_solved(
    way: str, trainer_kwargs: dict[str, Any]
) -> None:
    dense = Mixer()
    if way == "subclass":
        dense.net[3] = Scaled(20, 3)
    else:
        dense.net[3].register_forward_hook(lambda _, __, output: output.sigmoid())
    _, pruning = fitted(trainer_kwargs, dense)
    notes = [n for n in pruning.receipt.notes if n.startswith("not compensated")]
    assert notes == [
        "not compensated: `net.3`: it gives out something else than its input times its weight, and its bias"
    ]
    assert {c.name for c in pruning.receipt.changes if c.what == "compensated"} >= {"net.2.weight"}
