"""A student, a teacher that knows the labels, and the loop by hand that a distilling fit must equal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import Distillation
from lightning_accel.distillation import Teacher, losses
from lightning_accel.distillation.loss_term import KNOWN
from lightning_accel.distillation.projector import Embedding, Projector

HINT = {"fitnet": {"layers": "conv", "weight": 1.0}}
BOTH = {"kd": 1.0, **HINT}


def rows(count: int = 24) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(count, 3, 8, 8, generator=generator), torch.arange(count) % 4
    x[:, 0] += 2.0 * (y % 2).view(-1, 1, 1)  # which of four is written into two channels
    x[:, 1] += 2.0 * (y // 2).view(-1, 1, 1)
    return TensorDataset(x, y)


def data(count: int = 24) -> DataLoader[Any]:
    return DataLoader(rows(count), 8)


@cache
def _trained() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return taught(tiny.ConvNet(12))


def taught(net: nn.Module, epochs: int = 15) -> nn.Module:
    """Train a network until it knows the labels."""
    adam = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(epochs):
        for x, y in data(48):
            adam.zero_grad()
            F.cross_entropy(net(x), y).backward()
            adam.step()
    assert all((net.eval()(x).argmax(1) == y).float().mean() > 0.8 for x, y in data())
    return net


def master() -> nn.Module:
    """Return a network of other widths that knows the labels."""
    return copy.deepcopy(_trained())


def teacher(net: nn.Module | str | None = None, **kwargs: Any) -> Teacher:
    return Teacher(master() if net is None else net, **{"precision": "32-true", **kwargs})


class Module(LightningModule):
    """The user's, untouched."""

    def __init__(self, net: Callable[[], nn.Module] = tiny.ConvNet) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = net()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Adam(Module):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


Fit = Callable[..., Trainer]


def fits(trainer_kwargs: dict[str, Any]) -> Fit:
    """Return a function that fits a module on the labelled rows."""

    def run(
        model: Any, *callbacks: Callback, batches: Any = None, ckpt: Any = None, **kwargs: Any
    ) -> Trainer:
        saves = any(isinstance(c, ModelCheckpoint) for c in callbacks)
        given = {**trainer_kwargs, "enable_checkpointing": saves, "callbacks": list(callbacks)}
        trainer = Trainer(**{**given, **kwargs})
        judged = data() if isinstance(model, Module) else None
        trainer.fit(model, data() if batches is None else batches, judged, ckpt_path=ckpt)
        return trainer

    return run


def epochs(folder: Path, **kwargs: Any) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}", **kwargs)


def apart(one: nn.Module, other: nn.Module) -> float:
    """Return the largest difference between the weights and buffers of two networks."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


class At(Callback):
    """Do something after each step."""

    def __init__(self, work: Callable[[Trainer, Any, int], Any]) -> None:
        self.work = work

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.work(trainer, pl_module, args[2])


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "kd": lambda s, t, y, f, g, h: 16
    * F.kl_div((s / 4).log_softmax(1), (t / 4).log_softmax(1), log_target=True, reduction="batchmean"),
    "logit_standardized_kd": lambda s, t, y, f, g, h: losses.logit_standardized_kd(s, t),
    "dkd": lambda s, t, y, f, g, h: losses.dkd(s, t, target=y),
    "dist": lambda s, t, y, f, g, h: losses.dist(s, t),
    "jsd": lambda s, t, y, f, g, h: losses.jsd(s, t),
    "bce": lambda s, t, y, f, g, h: F.binary_cross_entropy_with_logits(s, t.sigmoid()),
    "mse": lambda s, t, y, f, g, h: F.mse_loss(s, t),
    "fitnet": lambda s, t, y, f, g, h: (h[0](f) - g).square().mean(),
    "attention_transfer": lambda s, t, y, f, g, h: losses.attention_transfer(f, g),
    "rkd": lambda s, t, y, f, g, h: losses.rkd(f, g),
    "similarity_preserving": lambda s, t, y, f, g, h: losses.similarity_preserving(f, g),
    "crd": lambda s, t, y, f, g, h: losses.crd(h[0](f), h[1](g), target=y),
}  # fmt: skip


def by_hand(name: str, *, accumulate: int = 1, clip: float = 0.0) -> tuple[nn.Module, nn.Module]:
    """Return the student and the projectors after two epochs of a plain loop."""
    student, guide, features = Module().net, master(), {}
    heads = nn.ModuleList()
    if name == "fitnet":
        heads.append(Projector(8, 12, "map", seed=0))
    if name == "crd":
        heads.extend([Embedding(8, seed=0), Embedding(12, seed=1)])
    for key, net in (("s", student), ("t", guide)):
        net.conv.register_forward_hook(lambda m, a, out, key=key: features.update({key: out}))
    weights = [*student.parameters(), *heads.parameters()]
    sgd = torch.optim.SGD(weights, 0.05, momentum=0.9)
    for _ in range(2):
        for step, (x, y) in enumerate(data(), 1):
            with torch.no_grad():
                answer = guide(x)
            logits = student(x)
            learnt = FORMULAS[name](logits, answer, y, features["s"], features["t"], heads)
            ((0.3 * F.cross_entropy(logits, y) + 0.5 * learnt) / accumulate).backward()
            if step % accumulate == 0:
                if clip:
                    nn.utils.clip_grad_norm_(weights, clip)
                sgd.step()
                sgd.zero_grad()
    return student, heads


def callback(name: str, **kwargs: Any) -> Distillation:
    term = {"weight": 0.5} | ({} if KNOWN[name].reads == "logits" else {"layers": "conv"})
    return Distillation(teacher(), {name: term}, task_weight=0.3, **kwargs)


class User(LightningModule):
    """The user's, with a step that is given."""

    def __init__(self, net: nn.Module, step: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.net, self.step = copy.deepcopy(net), step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(self.net, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.5)
