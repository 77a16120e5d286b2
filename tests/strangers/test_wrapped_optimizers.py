"""Public reports about optimizers inside others, put on the techniques that watch steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import StructuredPruning, WeightMasks
from lightning_accel.precision import Bf16Precision

pytestmark = pytest.mark.slow

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))


class TwoSteps(torch.optim.Optimizer):
    """Climbs and descends by two methods of its own; neither is `step`."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=0.1, momentum=0.9)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["before"] = p.detach().clone()
            p.add_(p.grad, alpha=0.1)
            p.grad = None

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.data = self.state[p]["before"]
        self.base_optimizer.step()
        self.zero_grad()

    def step(self, closure: Any = None) -> Any:
        assert closure is not None
        loss = torch.enable_grad()(closure)()
        self.first_step()
        torch.enable_grad()(closure)()
        self.second_step()
        return loss


class Halfway(torch.optim.Optimizer):
    """Of torch's class without its `__init__`, as timm's Lookahead, with empty tables of hooks."""

    def __init__(self, params: Any) -> None:
        self._optimizer_step_pre_hooks: dict[int, Any] = {}
        self._optimizer_step_post_hooks: dict[int, Any] = {}
        self._base_optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
        self.param_groups = self._base_optimizer.param_groups
        self.defaults = self._base_optimizer.defaults
        self.state = torch.optim.SGD([nn.Parameter(torch.ones(1))]).state

    def step(self, closure: Any = None) -> Any:
        loss = self._base_optimizer.step(closure)
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            slow = state.setdefault("slow_buffer", p.detach().clone())
            slow.add_(p.detach() - slow, alpha=0.5)
            p.data.copy_(slow)
        return loss


class Rates:
    """A plain object around an optimizer, that scales gradients (LARS)."""

    def __init__(self, params: Any) -> None:
        self.optim = torch.optim.SGD(params, lr=0.1, momentum=0.9)
        self.param_groups, self.state = self.optim.param_groups, self.optim.state
        self.defaults = self.optim.defaults

    def state_dict(self) -> Any:
        return self.optim.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.optim.load_state_dict(state)

    def zero_grad(self) -> None:
        self.optim.zero_grad()

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for p in self.param_groups[0]["params"]:
            p.grad.mul_(0.5)
        self.optim.step()
        return loss


class Module(LightningModule):
    def __init__(self, make: Callable[[Any], Any], way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        self.make, self.way = make, way
        self.automatic_optimization = False

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, x: Tensor) -> Tensor:
        return (self.net(x).float() - 1).square().mean()

    def one(self, optimizer: Any, x: Tensor) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(x)
            loss.backward()
            return loss

        if self.way == "two":
            closure()
            optimizer.first_step()
            self.loss(x).backward()
            optimizer.second_step()
        else:
            optimizer.step(closure)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.one(optimizer.optimizer if self.way == "past" else optimizer, batch[0])

    def configure_optimizers(self) -> Any:
        return self.make(self.net.parameters())


SITUATIONS = {
    "davda54/sam#42": (TwoSteps, "two"),
    "davda54/sam#31": (TwoSteps, "past"),
    "kozistr/pytorch_optimizer#201": (Halfway, "step"),
    "Lightning#4974": (Rates, "step"),
}
each = pytest.mark.parametrize(("make", "way"), SITUATIONS.values(), ids=SITUATIONS.keys())


def fit(module: LightningModule, *callbacks: Any, **options: Any) -> None:
    trainer = Trainer(
        max_epochs=2,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(TensorDataset(X), batch_size=8))


@each
def test_masked_training_is_that_of_a_masked_loop(make: Any, way: str) -> None:
    """davda54/sam#42 and #31, kozistr/pytorch_optimizer#201, Lightning#4974."""
    masks, module, true = WeightMasks(amount=0.5), Module(make, way), Module(make, way)
    fit(module, masks)
    optimizer = true.configure_optimizers()
    for name, keep in masks.masks.items():
        weight = true.get_parameter(name)
        weight.data *= keep
        weight.register_hook(lambda g, keep=keep: g * keep)
    for batch in list(X.split(8)) * 2:
        true.one(optimizer, batch)
    for name, p in module.named_parameters():
        torch.testing.assert_close(p, true.get_parameter(name))


@each
@pytest.mark.filterwarnings("ignore:StructuredPruning cuts before the first step")
def test_a_prune_goes_on_as_a_masked_loop(make: Any, way: str) -> None:
    """davda54/sam#42 and #31, kozistr/pytorch_optimizer#201, Lightning#4974."""
    module, true = Module(make, way), Module(make, way)
    prune = StructuredPruning(ratio=0.5, when=0, compensate=False, example=X[:2])
    fit(module, prune)
    optimizer = true.configure_optimizers()
    moved = next(m for m in prune.receipt.moved if m.name == "net.0.weight")
    kept = moved.kept.dims[0]
    assert kept is not None
    unit = torch.zeros(16)
    unit[kept] = 1
    for p, keep in zip(true.parameters(), (unit[:, None], unit, unit, None), strict=True):
        if keep is not None:
            p.data *= keep
            p.register_hook(lambda g, keep=keep: g * keep)
    for batch in list(X.split(8)) * 2:
        true.one(optimizer, batch)
    torch.testing.assert_close(module.net[0].weight, true.net[0].weight[kept])


def test_masters_learn_in_sam_of_two_steps() -> None:
    """davda54/sam#42: in bfloat16 a step of 1e-4 is lost without masters."""

    class Slow(TwoSteps):
        def __init__(self, params: Any) -> None:
            super().__init__(params)
            self.param_groups[0]["lr"] = 1e-5

    plugin, module = Bf16Precision("master"), Module(Slow, "two")
    before = module.net[0].weight.detach().clone()
    fit(module, plugins=[plugin])
    moved = (plugin.masters()["net.0.weight"] - before).abs()
    assert 0 < moved.max() < 1e-3
    assert (moved > 0).float().mean() > 0.9


class InBackward(LightningModule):
    """A step of each weight as soon as its gradient is there, as torch's tutorial does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.each = {p: torch.optim.SGD([p], 0.1, momentum=0.9) for p in self.net.parameters()}
        for p in self.net.parameters():
            p.register_post_accumulate_grad_hook(self._step)

    def _step(self, p: Tensor) -> None:
        self.each[p].step()  # type: ignore[index]
        self.each[p].zero_grad()  # type: ignore[index]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.net(batch[0]).square().sum())

    def configure_optimizers(self) -> Any:
        return list(self.each.values())


def test_masks_hold_where_weights_step_within_the_backward() -> None:
    """pytorch#76464, pytorch/tutorials#2568: the backward still needs what other optimizers will step."""
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(3))
    module, masks = InBackward(), WeightMasks(amount=0.5, when=1)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[masks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(x), 4))
    true = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
    true.load_state_dict(InBackward().net.state_dict())
    sgd = torch.optim.SGD(true.parameters(), 0.1, momentum=0.9)
    named = dict(true.named_parameters())
    keep = {named[n.removeprefix("net.")]: mask for n, mask in masks.masks.items()}
    for step in range(8):
        for p, mask in keep.items() if step == 4 else ():
            p.data *= mask
            sgd.state[p]["momentum_buffer"] *= mask
        sgd.zero_grad()
        true(x[4 * (step % 4) : 4 * (step % 4) + 4]).square().sum().backward()
        for p, mask in keep.items() if step >= 4 else ():
            p.grad *= mask  # type: ignore[operator]
        sgd.step()
    assert len(keep) == 2 and all(bool((p[~mask] == 0).all()) for p, mask in keep.items())
    for found, p in zip(module.net.parameters(), true.parameters(), strict=True):
        torch.testing.assert_close(found, p)
