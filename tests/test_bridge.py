"""How examples are found in a fit: the real arguments, and no trace left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, strategies
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import AccelReport, Distillation
from lightning_accel.bridge import ModelEdit, batches_of, find_example
from lightning_accel.bridge.strategies import holding
from lightning_accel.errors import AccelError, Unsupported
from lightning_accel.surgery import Stage

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"
)


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(tiny.ConvNet(), nn.Dropout(0.5))
        self.teacher = tiny.ConvNet().requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        target = self.teacher(x)
        loss = F.cross_entropy(self.net(2 * x), y) + 0 * target.sum()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


class Manual(Module):
    """Steps first and clears gradients later, so that some are pending between steps."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.optimizers().zero_grad()


class At(Callback):
    """Call a function at the start of the second epoch."""

    def __init__(self, function: Callable[[Trainer, Any], None]) -> None:
        self.function = function
        self.called = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            self.called = True
            self.function(trainer, pl_module)


def fit(
    kwargs: dict[str, Any], module: LightningModule, function: Callable[[Trainer, Any], None]
) -> None:
    data = TensorDataset(torch.randn(12, 3, 8, 8), torch.arange(12) % 4)
    at = At(function)
    Trainer(**{**kwargs, "callbacks": [at]}).fit(module, DataLoader(data, 4, shuffle=True))
    assert at.called


def test_the_arguments_are_those_of_the_training_step(trainer_kwargs: dict[str, Any]) -> None:
    def look(trainer: Trainer, module: Module) -> None:
        (call,) = find_example(trainer, module)
        assert call.name == "net"  # the frozen teacher is not a target
        assert call.kwargs == {}
        data = trainer.train_dataloader.dataset.tensors[0]
        assert call.args[0].shape == (4, 3, 8, 8)  # a full training batch
        assert all(any(torch.equal(x, 2 * row) for row in data) for x in call.args[0])

    fit(trainer_kwargs, Module(), look)


@pytest.mark.parametrize("kind", [Module, Manual])
def test_looking_leaves_no_trace(trainer_kwargs: dict[str, Any], kind: type[Module]) -> None:
    def look(trainer: Trainer, module: Module) -> None:
        weights = copy.deepcopy(module.state_dict())
        gradients = [p.grad.clone() if p.grad is not None else None for p in module.parameters()]
        optimizer = copy.deepcopy(trainer.optimizers[0].state_dict())
        state, logged = torch.get_rng_state(), dict(trainer.logged_metrics)
        hooks = [len(m._forward_hooks) for m in module.modules()]

        one, two = batches_of(trainer, module, 2), batches_of(trainer, module, 2)

        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(weights[k], v) for k, v in module.state_dict().items())
        for before, parameter in zip(gradients, module.parameters(), strict=True):
            assert (before is None) == (parameter.grad is None)
            assert before is None or torch.equal(before, parameter.grad)
        after = trainer.optimizers[0].state_dict()
        for index, values in optimizer["state"].items():
            assert torch.equal(values["momentum_buffer"], after["state"][index]["momentum_buffer"])
        assert logged == dict(trainer.logged_metrics)
        assert hooks == [len(m._forward_hooks) for m in module.modules()]
        for a, b in zip(one, two, strict=True):  # the same batches every time
            assert torch.equal(a[0].args[0], b[0].args[0])
        assert not torch.equal(one[0][0].args[0], one[1][0].args[0])

    fit(trainer_kwargs, kind(), look)


def test_the_shuffled_order_goes_on_as_without_looking(trainer_kwargs: dict[str, Any]) -> None:
    def order(function: Callable[[Trainer, Any], None]) -> list[float]:
        class Noting(Module):
            def __init__(self) -> None:
                super().__init__()
                self.sums: list[float] = []

            def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
                self.sums.append(float(batch[0].sum()))

        torch.manual_seed(0)
        module = Noting()
        fit(trainer_kwargs, module, function)
        return module.sums

    assert order(lambda *_: None) == order(lambda t, m: batches_of(t, m, 3))


def test_a_failing_step_says_what_to_pass(trainer_kwargs: dict[str, Any]) -> None:
    class Fails(Module):
        def __init__(self) -> None:
            super().__init__()
            self.me = id(self)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if id(self) != self.me:
                raise RuntimeError("cannot run on a copy")
            return super().training_step(batch, batch_idx)

    def look(trainer: Trainer, module: Module) -> None:
        with pytest.raises(AccelError, match=r"cannot run on a copy.*example="):
            find_example(trainer, module)

    fit(trainer_kwargs, Fails(), look)


def test_an_explicit_example_needs_somewhere_to_go(trainer_kwargs: dict[str, Any]) -> None:
    class Parts(Module):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(2, 2)

    def look(trainer: Trainer, module: Module) -> None:
        with pytest.raises(AccelError, match="no `forward` and 2 trainable children"):
            find_example(trainer, module, torch.randn(1))

    fit(trainer_kwargs, Parts(), look)


def test_the_other_package_of_lightning_is_told_apart(trainer_kwargs: dict[str, Any]) -> None:
    import pytorch_lightning
    from pytorch_lightning.demos.boring_classes import BoringModel

    class Edit(ModelEdit):
        stage = Stage.SHAPE

    trainer = pytorch_lightning.Trainer(**{**trainer_kwargs, "callbacks": [Edit()]})
    data = DataLoader(TensorDataset(torch.randn(4, 8)), 4)
    with pytest.raises(Unsupported, match=r"Trainer of `pytorch_lightning`.*lightning\.pytorch"):
        trainer.fit(BoringModel(), data)


HOLDINGS = {
    "whole": [
        *(strategies.SingleDeviceStrategy, strategies.SingleDeviceXLAStrategy),
        type("SingleXLA", (strategies.SingleDeviceStrategy,), {}),
    ],
    "replicated": [strategies.DDPStrategy],
    "sharded": [
        *(strategies.FSDPStrategy, strategies.ModelParallelStrategy, strategies.DeepSpeedStrategy),
        type("MyFSDPStrategy", (strategies.DDPStrategy,), {}),
        type("Unheard", (strategies.ParallelStrategy,), {"root_device": torch.device("cpu")}),
    ],
    "traced": [strategies.XLAStrategy],
}


@pytest.mark.parametrize("expected", HOLDINGS)
def test_how_a_strategy_holds_parameters_is_known_in_one_place(expected: str) -> None:
    for kind in HOLDINGS[expected]:
        kind.__abstractmethods__ = frozenset()  # no instance does anything here
        assert holding(kind.__new__(kind)) == expected, kind


@pytest.mark.parametrize("make", [lambda: Distillation("ema"), lambda: AccelReport()])
def test_what_needs_whole_parameters_refuses_children_of_ddp_that_shard(
    trainer_kwargs: dict[str, Any], make: Callable[[], Callback]
) -> None:
    """Lightning's DeepSpeed strategy is a child of `DDPStrategy`."""
    trainer = Trainer(**{**trainer_kwargs, "callbacks": [make()]})
    strategy: Any = trainer.strategy
    strategy.__class__ = type("DeepSpeedStrategy", (type(strategy),), {})
    data = DataLoader(TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8) % 4), 4)
    told = (Unsupported, UserWarning)  # a report ends no training
    with pytest.raises(told, match=r"whole parameters.*Found: DeepSpeedStrategy"):
        trainer.fit(Module(), data)
