"""The networks of gpu_suite.py: sizes that fill a large GPU, and a tiny form of each that tries the script.

GPTs have the weights of their embedding in their head; data are random, and lie in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from nets import GPT, MLP, Benchmark, ConvNet
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """One by one, three by three, one by one, around a shortcut (He et al. 2015, arXiv 1512.03385)."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = 4 * width
        self.net = nn.Sequential(
            *(nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)),
            *(nn.ReLU(True), nn.Conv2d(width, after, 1, bias=False), nn.BatchNorm2d(after)),
        )
        self.short: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            conv = nn.Conv2d(before, after, 1, stride, bias=False)
            self.short = nn.Sequential(conv, nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.net(x) + self.short(x))


class ResNet50(Benchmark):
    """ResNet-50 with random images of 224 pixels, SGD with momentum."""

    def __init__(self, batch_size: int = 256, pixels: int = 224, width: int = 64) -> None:
        super().__init__()
        self.batch_size, self.pixels = batch_size, pixels
        layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)]
        layers += [nn.ReLU(True), nn.MaxPool2d(3, 2, 1)]
        before = width
        for stage, depth in enumerate((3, 4, 6, 3)):
            for index in range(depth):
                stride = 2 if stage and not index else 1
                layers.append(Bottleneck(before, width * 2**stage, stride))
                before = 4 * width * 2**stage
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 1000)]
        self.net = nn.Sequential(*layers)

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        images = torch.randn(batch_size, 3, self.pixels, self.pixels, generator=generator)
        return images, torch.randint(1000, (batch_size,), generator=generator)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)


def tied(*args: int, batch_size: int) -> Benchmark:
    """Make a GPT whose head has the weights of its embedding, small at first."""
    model = GPT(*args, batch_size=batch_size)
    nn.init.normal_(model.net.tokens.weight, std=0.02)  # type: ignore[union-attr,arg-type]
    model.net.head.weight = model.net.tokens.weight  # type: ignore[union-attr]
    return model


@dataclass(frozen=True)
class Case:
    """A network, its tiny form, how long to search, the gain over stock bf16-mixed that is wanted."""

    make: Callable[[], Benchmark]
    tiny: Callable[[], Benchmark]
    search_s: float
    goal: float | None = None
    mfu_goal: float | None = None
    wide: bool = False


CASES = {
    "gpt_124m": Case(
        lambda: tied(768, 12, 12, 1024, 50304, batch_size=32),
        lambda: tied(32, 2, 2, 16, 64, batch_size=2),
        30,
        goal=1.4,
        mfu_goal=0.35,
    ),
    "resnet50": Case(ResNet50, lambda: ResNet50(2, 32, 4), 30, goal=1.4),
    "gpt_1b": Case(
        lambda: tied(2048, 16, 22, 2048, 50304, batch_size=8),
        lambda: tied(32, 2, 2, 16, 64, batch_size=2),
        30,
        mfu_goal=0.42,
        wide=True,
    ),
    "cifar": Case(
        lambda: ConvNet(32, 32, batch_size=128), lambda: ConvNet(4, 8, batch_size=4), 20, goal=1.5
    ),
    "mlp": Case(lambda: MLP(batch_size=1024), lambda: MLP(16, 16, batch_size=8), 10, goal=1.5),
}
