"""Four tiny nets, one per family of models: dense, convolutional, attention, tied weights; and a silent Trainer, and its fits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """Three linear layers: 8 features to 4 classes."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class ConvNet(nn.Module):
    """Convolutions with batch norm around one residual: 3x8x8 images to 4 classes."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        )
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.down = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, stride=2), nn.BatchNorm2d(2 * width)
        )
        self.head = nn.Linear(2 * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.down(x + self.conv(x)))
        return self.head(x.mean((2, 3)))


class AttentionNet(nn.Module):
    """One pre-norm transformer block with fused qkv: sequences of 8 features to 4 classes."""

    def __init__(self, dim: int = 16, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.embed, self.norm1, self.norm2 = nn.Linear(8, dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.head = nn.Linear(dim, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)  # (batch, time, dim)
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, time, head_dim)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head((x + self.mlp(self.norm2(x))).mean(1))


class TiedLM(nn.Module):
    """A byte-pair toy whose output layer is its embedding: tokens of 12 to logits of 12."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, dim)
        self.hidden = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.head = nn.Linear(dim, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(x + self.hidden(x))


INPUTS = {
    MLP: lambda: torch.randn(4, 8),
    ConvNet: lambda: torch.randn(4, 3, 8, 8),
    AttentionNet: lambda: torch.randn(4, 5, 8),
    TiedLM: lambda: torch.randint(0, 12, (4, 6)),
}
"""A batch for each net, to parametrise over."""


def silent(folder: Path) -> dict[str, Any]:
    """Return arguments of a Trainer for a tiny, silent fit on one CPU device."""
    return {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": str(folder),
    }


class Layers(LightningModule):
    """Classifies six features into three classes by two linear layers, with SGD."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class ByHand(LightningModule):
    """Optimizes by hand what the next of its bases computes: `class Manual(ByHand, Module)`."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


Fit = Callable[..., Trainer]


def fits(settings: dict[str, Any], loader: Callable[[], Any], epochs: int) -> Fit:
    """Return a function that fits a module with callbacks, and validates it, on what `loader` makes.

    Checkpoints are on where a `ModelCheckpoint` is among the callbacks. `data` makes other loaders to train on.
    """
    usual = epochs

    def run(
        module: LightningModule,
        *callbacks: Callback,
        ckpt: Any = None,
        epochs: int = usual,
        data: Callable[[], Any] = loader,
        **kw: Any,
    ) -> Trainer:
        saves = any(isinstance(c, ModelCheckpoint) for c in callbacks)
        given = {"max_epochs": epochs, "enable_checkpointing": saves, **kw}
        trainer = Trainer(**{**settings, **given, "callbacks": list(callbacks)})
        trainer.fit(module, data(), loader(), ckpt_path=ckpt)
        return trainer

    return run
