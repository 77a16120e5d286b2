"""The small networks of the speed benchmarks: LightningModules written by someone who knows no tricks.

Each has its own synthetic data with something to learn, so that losses of two runs can be compared, and
needs no download. `NETS` names the five sizes that every benchmark speaks of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset

Batch = tuple[Tensor, Tensor]


class Benchmark(LightningModule):
    """A network with a loss, an optimizer as most people write it, and data of its own."""

    net: nn.Module
    batch_size: int

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Batch) -> Tensor:
        """Return the cross-entropy, over the last dimension of what the network gives."""
        x, target = batch
        logits = self(x)
        return F.cross_entropy(logits.flatten(0, -2), target.flatten())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def batch(self, index: int = 0, batch_size: int | None = None) -> Batch:
        """Return the batch of this number; the same number gives the same batch."""
        generator = torch.Generator().manual_seed(1 + index)
        return self.draw(batch_size or self.batch_size, generator)

    def draw(self, batch_size: int, generator: torch.Generator) -> Batch:
        """Draw inputs and targets."""
        raise NotImplementedError

    def data(self, num_batches: int, first: int = 0) -> Batches:
        """Return batches ready for a Trainer; `first` keeps training and validation apart."""
        return Batches(self, num_batches, first)


class MLP(Benchmark):
    """Linear, batch norm and GELU, three times: points around one centre for each class."""

    def __init__(
        self,
        features: int = 784,
        width: int = 512,
        depth: int = 3,
        num_classes: int = 10,
        batch_size: int = 128,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [
                nn.Linear(width if i else features, width),
                nn.BatchNorm1d(width),
                nn.GELU(),
            ]
        self.net = nn.Sequential(*layers, nn.Linear(width, num_classes))
        self.centres = _fixed(num_classes, features)

    def draw(self, batch_size: int, generator: torch.Generator) -> Batch:
        return _around(self.centres, batch_size, generator, spread=4.0)


class ConvNet(Benchmark):
    """A stem and four residual blocks: noisy images around one picture for each class."""

    def __init__(
        self, width: int = 32, pixels: int = 32, num_classes: int = 10, batch_size: int = 64
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.net = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            Residual(width, width),
            Residual(width, 2 * width, stride=2),
            Residual(2 * width, 4 * width, stride=2),
            Residual(4 * width, 4 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, num_classes),
        )
        self.centres = _fixed(num_classes, 3, pixels, pixels)

    def draw(self, batch_size: int, generator: torch.Generator) -> Batch:
        return _around(self.centres, batch_size, generator, spread=4.0)


class GPT(Benchmark):
    """A decoder with learned positions: sequences in which a token mostly decides the next."""

    def __init__(
        self,
        dim: int = 256,
        num_heads: int = 4,
        depth: int = 4,
        length: int = 128,
        num_tokens: int = 1024,
        batch_size: int = 8,
    ) -> None:
        super().__init__()
        self.batch_size, self.length, self.num_tokens = batch_size, length, num_tokens
        self.net = Decoder(dim, num_heads, depth, length, num_tokens)

    def draw(self, batch_size: int, generator: torch.Generator) -> Batch:
        start = torch.randint(self.num_tokens, (batch_size, 1), generator=generator)
        strides = torch.randint(1, 4, (batch_size, self.length), generator=generator)
        tokens = (torch.cat([start, strides], 1).cumsum(1)) % self.num_tokens
        return tokens[:, :-1], tokens[:, 1:]


class Residual(nn.Module):
    """Two convolutions around a shortcut."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.short: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            conv = nn.Conv2d(before, after, 1, stride, bias=False)
            self.short = nn.Sequential(conv, nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.short(x))


class Attend(nn.Module):
    """One pre-norm transformer block with causal attention."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, time, dim of a head)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """Embeddings, blocks, and a linear layer onto the tokens."""

    def __init__(self, dim: int, num_heads: int, depth: int, length: int, num_tokens: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(num_tokens, dim), nn.Embedding(length, dim)
        self.blocks = nn.ModuleList(Attend(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_tokens, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Batches(IterableDataset[Batch]):
    """Ready-made batches, held in memory: loading them costs nothing."""

    def __init__(self, model: Benchmark, num_batches: int, first: int = 0) -> None:
        self.batches = [model.batch(first + i) for i in range(num_batches)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


NETS: dict[str, Callable[[], Benchmark]] = {
    "mlp": MLP,
    "gpt_d256": GPT,
    "gpt_d512": lambda: GPT(512, 8, 4, 256, 4096, batch_size=4),
    "cnn_32px": ConvNet,
    "cnn_64px": lambda: ConvNet(64, 64, batch_size=32),
}
"""The five networks by name, each with the batch it is trained with."""


def _fixed(*shape: int) -> Tensor:
    """Return numbers that are the same in every process, and are no part of the model's state."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _around(
    centres: Tensor, batch_size: int, generator: torch.Generator, *, spread: float
) -> Batch:
    target = torch.randint(len(centres), (batch_size,), generator=generator)
    noise = torch.randn(batch_size, *centres.shape[1:], generator=generator)
    return centres[target] + spread * noise, target
