"""Networks that came out wrong, or not at all, when people pruned them with other tools.

Each is pruned as its reporter would, and compared with the dense network in which everything that is gone is
zero, found by value, at other inputs than the example.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_accel.pruning import prune
from lightning_accel.surgery import Select


class LinearBeforeTransposed(nn.Module):
    """Torch-Pruning#125: `view(-1, conv.in_channels, 4, 4)` of a linear layer's output; index out of bounds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 16 * 4 * 4)
        self.first = nn.ConvTranspose2d(16, 12, 4, 2, 1)
        self.second = nn.ConvTranspose2d(12, 3, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.linear(x)).view(-1, self.first.in_channels, 4, 4)
        return self.second(F.relu(self.first(x)))


class CoordinateAttention(nn.Module):
    """Torch-Pruning#503: means over rows and over columns, joined along pixels and split again."""

    def __init__(self, width: int = 12, hidden: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.squeeze, self.norm = nn.Conv2d(width, hidden, 1), nn.BatchNorm2d(hidden)
        self.rows, self.columns = (nn.Conv2d(hidden, width, 1) for _ in range(2))
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        height, width = x.shape[2:]
        rows = x.mean(3, keepdim=True)
        columns = x.mean(2, keepdim=True).permute(0, 1, 3, 2)
        y = F.hardswish(self.norm(self.squeeze(torch.cat([rows, columns], 2))))
        rows, columns = y.split([height, width], 2)
        gates = self.rows(rows).sigmoid(), self.columns(columns.permute(0, 1, 3, 2)).sigmoid()
        return self.head((x * gates[0] * gates[1]).mean((2, 3), keepdim=True))


class PickedByNumber(nn.Module):
    """Torch-Pruning#393: queries, keys and values are `qkv[0]`, `qkv[1]`, `qkv[2]`; a third was cut."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (width // heads) ** -0.5
        self.embed, self.qkv = nn.Linear(8, width), nn.Linear(width, 3 * width)
        self.proj, self.head = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(
            b, n, 3, self.num_heads, self.qkv.out_features // 3 // self.num_heads
        )
        qkv = qkv.permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        y = ((q @ k.mT * self.scale).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.head((x + self.proj(y)).mean(1))


class PooledAttention(nn.Module):
    """Torch-Pruning#287: MViT pools queries, keys and values by convolutions that all heads share."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.stem = nn.Conv2d(3, width, 2, 2)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        size = self.size
        self.pools = nn.ModuleList(
            nn.Conv2d(size, size, 3, 1 if n == 0 else 2, 1, groups=size) for n in range(3)
        )
        self.head = nn.Linear(width, 3)

    def pooled(self, t: Tensor, pool: nn.Module, height: int, width: int) -> Tensor:
        b, h, _, size = t.shape
        t = t.reshape(b * h, height, width, size).permute(0, 3, 1, 2)
        return pool(t).flatten(2).transpose(1, 2).reshape(b, h, -1, size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, _, height, width = x.shape
        x = x.flatten(2).transpose(1, 2)
        parts = self.qkv(x).view(b, height * width, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = (
            self.pooled(t, pool, height, width)
            for t, pool in zip(parts.unbind(0), self.pools, strict=True)
        )
        y = F.scaled_dot_product_attention(q, k, v) + q
        return self.head((x + self.proj(y.transpose(1, 2).flatten(2))).amax(1))


class Chunked(nn.Module):
    """ultralytics#14171, Torch-Pruning#477: C2f's halves, of which one is read again and again."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.c = width // 2
        self.cv1 = nn.Sequential(nn.Conv2d(3, 2 * self.c, 1), nn.BatchNorm2d(2 * self.c), nn.SiLU())
        self.m = nn.ModuleList(
            nn.Sequential(nn.Conv2d(self.c, self.c, 3, padding=1), nn.SiLU()) for _ in range(2)
        )
        self.cv2, self.head = nn.Conv2d(4 * self.c, width, 1), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.head(F.silu(self.cv2(torch.cat(y, 1))).mean((2, 3)))


def divided(s: Any, x: Tensor) -> Tensor:
    return s.o(F.relu(s.a(x)) / (1 + F.softplus(s.b(x))) * s.c(x).sigmoid())


class Divided(nn.Module):
    """nni#5152, nni#4540: branches that divide and multiply each other; masks of them differed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 12, 3, padding=1) for _ in range(3))
        self.o = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return divided(self, x)


class ScaledByNorm(nn.Module):
    """Torch-Pruning#24: SSD's norm over channels, whose scale is a parameter of its own and stayed as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x / (x.pow(2).sum(dim=1, keepdim=True).sqrt() + 1e-10)
        return self.head(self.scale.unsqueeze(0).unsqueeze(2).unsqueeze(3).expand_as(x) * x)


class SplitByAttributes(nn.Module):
    """neural-compressor#525: BERT views by the numbers of heads and of their width, which stayed."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width, self.all = 4, 4, 16
        self.query, self.key, self.value = (nn.Linear(8, 16) for _ in range(3))
        self.out = nn.Linear(16, 3)

    def _apart(self, x: Tensor) -> Tensor:
        return x.view(*x.size()[:-1], self.heads, self.width).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._apart(layer(x)) for layer in (self.query, self.key, self.value))
        x = (q @ k.transpose(-1, -2) / self.width**0.5).softmax(-1) @ v
        x = x.permute(0, 2, 1, 3).contiguous()
        return self.out(x.view(*x.size()[:-2], self.all))


class WithAuxiliary(nn.Module):
    """PaddleSlim#604, PaddleSeg#1856: a branch of training only, of which a pruner in eval mode knows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)
        self.head = nn.Conv2d(12, 4, 1)
        self.aux = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.stem(x))
        y = self.head(F.relu(self.body(x)))
        return (y, self.aux(x)) if self.training else y


@pytest.mark.parametrize(("select", "width"), [(None, 4), (Select(exclude=("aux.*",)), 8)])
def test_a_branch_of_training_only_follows_or_stays_whole(select: Any, width: int) -> None:
    """And only_train_once_personal_footprint#29: to compress the trunk, and leave the branch as it is."""
    net = WithAuxiliary().eval()
    dense, x = copy.deepcopy(net), torch.randn(2, 3, 8, 8)
    prune(net, example=x, ratio=0.5, select=select)
    assert (net.stem.out_channels, net.aux[0].in_channels, net.aux[0].out_channels) == (8, 8, width)
    left = dict(net.named_parameters())
    with torch.no_grad():
        for name, tensor in dense.named_parameters():
            tensor.mul_(torch.isin(tensor, left[name]))
    for one, other in zip(net.train()(x), dense.train()(x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def images(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size, dtype=torch.float64)


def sequences(batch: int, steps: int) -> Tensor:
    return torch.randn(batch, steps, 8, dtype=torch.float64)


def vectors(batch: int, _: int) -> Tensor:
    return torch.randn(batch, 8, dtype=torch.float64)


@pytest.mark.parametrize(
    ("build", "inputs", "smaller"),
    [
        (LinearBeforeTransposed, vectors, {"linear": 128, "first": 6}),
        (CoordinateAttention, images, {"stem": 6, "squeeze": 4}),
        (PickedByNumber, sequences, {"qkv": 24, "embed": 8}),
        (PooledAttention, images, {"qkv": 24, "stem": 8}),
        (Chunked, images, {"cv1.0": 6, "m.0.0": 3, "cv2": 6}),
        (Divided, images, {"a": 6, "b": 6, "c": 6}),
        (ScaledByNorm, images, {"stem": 8}),
        (SplitByAttributes, sequences, {"query": 8, "value": 8}),
    ],
)
def test_networks_that_other_tools_broke_equal_their_masked_twins(
    build: Callable[[], nn.Module], inputs: Any, smaller: dict[str, int]
) -> None:
    torch.manual_seed(0)
    net = build().double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)  # norms as well: no two values alike
    dense = copy.deepcopy(net)
    prune(net, example=inputs(2, 8), ratio=0.5)
    left = dict(net.named_parameters())
    for name, width in smaller.items():
        made = 1 if isinstance(net.get_submodule(name), nn.ConvTranspose2d) else 0
        assert left[f"{name}.weight"].shape[made] == width, name
    with torch.no_grad():
        for name, tensor in dense.named_parameters():
            kept = torch.isin(tensor, left[name])
            assert int(kept.sum()) == left[name].numel(), name
            tensor.mul_(kept)
    for given in (inputs(3, 8), inputs(1, 12)):
        torch.testing.assert_close(net(given), dense(given), rtol=1e-9, atol=1e-9)
