"""Public reports about averages, wrapped optimizers and recomputed blocks, put on the techniques."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import StructuredPruning
from lightning_accel.memory import checkpoint_activations
from lightning_accel.precision import Bf16Precision
from lightning_accel.pruning import prune
from lightning_accel.surgery import follow

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))


class Router(nn.Module):
    """A block that computes a loss of its own and keeps it as a subclass says."""

    def __init__(self, registry: list[Tensor]) -> None:
        super().__init__()
        self.gate, self.one, self.two = nn.Linear(8, 2), nn.Linear(8, 8), nn.Linear(8, 8)
        self.registry = registry
        self.aux: Any = None
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        share = self.gate(x).softmax(-1)
        self.keep(share.mean(0).square().sum() * 2)
        return x + share[:, :1] * self.one(x).tanh() + share[:, 1:] * self.two(x).tanh()

    def keep(self, aux: Tensor) -> None:
        self.aux = aux


class Listed(Router):
    def keep(self, aux: Tensor) -> None:
        self.registry.append(aux)


class Summed(Router):
    """NVIDIA-NeMo/Automodel#3247: nothing at first, then a sum that goes on over steps."""

    def keep(self, aux: Tensor) -> None:
        self.aux = aux
        past = aux.detach()
        self.load = past if not hasattr(self, "load") else self.load + past


class Counted(Router):
    """Warms the router up: what it computes depends on how often it was called."""

    def keep(self, aux: Tensor) -> None:
        self.calls += 1
        self.aux = aux * torch.full((), 1.0 / self.calls)


class InPlace(Router):
    def __init__(self, registry: list[Tensor]) -> None:
        super().__init__(registry)
        self.load = torch.zeros(())

    def keep(self, aux: Tensor) -> None:
        self.aux = aux
        self.load += aux.detach()


class Experts(nn.Module):
    def __init__(self, kind: type[Router]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.losses: list[Tensor] = []
        self.blocks = nn.ModuleList([kind(self.losses) for _ in range(3)])

    def loss(self, x: Tensor) -> Tensor:
        self.losses.clear()
        for block in self.blocks:
            x = block(x)
        kept = [block.aux for block in self.blocks if block.aux is not None]
        return x.square().mean() + 0.1 * sum([*self.losses, *kept], start=torch.zeros(()))


def trained(model: Experts) -> tuple[list[float], list[Any]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, kept = [], []
    for batch in X.split(8):
        loss = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        kept.append([len(model.losses), *(t.item() for t in model.losses)])
        for block in model.blocks:
            kept += [number(block.aux), number(getattr(block, "load", None)), block.calls]
    return losses, kept + [p.detach() for p in model.parameters()]


def number(kept: Tensor | None) -> float:
    return 0.0 if kept is None else kept.item()


@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize("kind", [Router, Listed, Summed, Counted, InPlace])
def test_a_router_loss_counts_once_under_checkpointing(kind: type[Router], policy: str) -> None:
    """NVIDIA/Megatron-LM#1330 and NVIDIA-NeMo/Automodel#3247: load balancing loss accumulated twice."""
    plain, model = Experts(kind), Experts(kind)
    checkpoint_activations(model, policy=policy)
    (losses, kept), (found, other) = trained(plain), trained(model)
    assert losses == found
    for one, two in zip(kept, other, strict=True):
        assert torch.equal(one, two) if isinstance(one, Tensor) else one == two


class Lookahead:
    """Of no class of torch's, with the slow weights by parameter."""

    def __init__(self, params: Any) -> None:
        self.optimizer = torch.optim.SGD(params, lr=1e-5)
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state
        self.defaults, self.count = self.optimizer.defaults, 0
        self.slow = {p: p.detach().clone() for p in self.param_groups[0]["params"]}

    def state_dict(self) -> Any:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.optimizer.load_state_dict(state)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step(self, closure: Any = None) -> Any:
        loss = self.optimizer.step(closure)
        self.count += 1
        for p in self.param_groups[0]["params"] if self.count % 3 == 0 else ():
            self.slow[p] += 0.5 * (p.data - self.slow[p])
            p.data.copy_(self.slow[p])
        return loss


class Module(LightningModule):
    def __init__(self, make: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.net(batch[0]).float() - 1).square().mean()

    def configure_optimizers(self) -> Any:
        return self.make(self.net.parameters())


def fit(module: Module, *callbacks: Callback, ckpt: Path | None = None, **options: Any) -> None:
    trainer = Trainer(
        max_epochs=3,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    data = DataLoader(TensorDataset(X), batch_size=8)
    trainer.fit(module, data, ckpt_path=None if ckpt is None else str(ckpt))


def test_masters_learn_in_a_lookahead_of_no_class() -> None:
    """kozistr/pytorch_optimizer#200: Lookahead is not a subclass of torch.optim.Optimizer."""
    plugin, module = Bf16Precision("master"), Module(Lookahead)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, plugins=[plugin])
    for name, found in plugin.masters().items():
        moved = (found - before[name]).abs()
        assert 0 < moved.max() < 1e-3  # half an ulp of these weights is more
        assert (moved > 0).float().mean() > 0.8


@pytest.mark.parametrize("shape", ["linear", "convolution"])
def test_adafactor_goes_on_after_a_prune(shape: str) -> None:
    """jettify/pytorch-optimizer#405 and huggingface/transformers#11536: factors of another shape than steps."""
    if shape == "linear":
        model, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)), X
    else:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 4, 3))
        x = torch.randn(2, 3, 8, 8)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    weight = model[0].weight
    state = optimizer.state[weight]
    moment = state["row_var"] @ state["col_var"] / state["row_var"].mean(-2, keepdim=True)
    receipt = prune(model, example=x, ratio=0.5)
    assert not follow(optimizer, receipt).skipped
    kept = next(move.kept for move in receipt.moved if move.name == "0.weight")
    now = state["row_var"] @ state["col_var"] / state["row_var"].mean(-2, keepdim=True)
    torch.testing.assert_close(now, kept.take(moment))
    model.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


class Ema(Callback):
    """Keeps a shadow of each parameter, made in `setup`, in checkpoints."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.shadow = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        self.updates = 0

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.updates += 1
        for name, p in pl_module.named_parameters():
            self.shadow[name].lerp_(p, max(0.1, 1 / self.updates))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1 and not self.path.exists():
            trainer.save_checkpoint(self.path)

    def __init__(self, path: Path) -> None:
        self.path = path

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for name, stored in state["shadow"].items():
            self.shadow[name].copy_(stored)


def test_an_average_is_resumed_after_a_prune(tmp_path: Path) -> None:
    """m2lines/Samudra#282 and lightly-ai/lightly-train#892: an average that a resumed run begins anew."""
    made = []
    for ckpt in (None, tmp_path / "last.ckpt"):
        ema = Ema(tmp_path / "last.ckpt")
        module = Module(lambda p: torch.optim.SGD(p, lr=0.1))
        fit(module, StructuredPruning(ratio=0.5, when=1), ema, ckpt=ckpt)
        made.append(ema)
    assert made[0].shadow["net.0.weight"].shape == (8, 8)
    assert made[0].updates == made[1].updates == 12
    for name, held in made[0].shadow.items():
        assert torch.equal(held, made[1].shadow[name])
