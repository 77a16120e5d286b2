"""Networks of diffusers, monai and vit-pytorch that other tools broke, each as its reporter would prune it.

Each is compared with the dense network in which everything that is gone is zero, found by value, at another
batch size and another size of its input than the example's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from by_value import check
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_accel.pruning import prune


class Attention(nn.Module):
    """As in diffusers: the width of a head is that of the keys over the number of heads."""

    def __init__(self, width: int = 16, context: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(context, width, bias=False) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        size = k.shape[-1] // self.heads
        q, k, v = (t.view(len(x), -1, self.heads, size).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(y.transpose(1, 2).reshape(len(x), -1, self.heads * size))


class DiT(nn.Module):
    """Torch-Pruning#300: six modulations of every block come out of one layer; `pruner.step()` failed."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches, self.time = nn.Conv2d(3, width, 2, 2), nn.Linear(1, width)
        self.modulate, self.attention = nn.Linear(width, 6 * width), Attention(width)
        self.wide, self.narrow = nn.Linear(width, 32), nn.Linear(32, width)
        self.shift, self.head = nn.Linear(width, 2 * width), nn.Linear(width, 12)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        t = F.silu(self.time(time))
        parts = self.modulate(t).unsqueeze(1).chunk(6, dim=-1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts
        x = x + gate * self.attention(F.normalize(x, dim=-1) * (1 + scale) + shift)
        h = F.normalize(x, dim=-1) * (1 + scale_mlp) + shift_mlp
        x = x + gate_mlp * self.narrow(F.gelu(self.wide(h)))
        scale, shift = self.shift(t).unsqueeze(1).chunk(2, dim=-1)
        return self.head(F.normalize(x, dim=-1) * (1 + scale) + shift)


class Encoder(nn.Module):
    """Torch-Pruning#449, Diff-Pruning#4: norms by groups, attention over pixels whose projections went apart."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, 2)
        self.norm, self.attention = nn.GroupNorm(width, width), Attention(width)
        self.norm_out, self.moments = nn.GroupNorm(width, width), nn.Conv2d(width, 8, 1)
        self.decode = nn.ConvTranspose2d(4, width, 3, 2)
        self.image = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.silu(self.stem(x))
        x = self.down(F.pad(x, (0, 1, 0, 1)))
        b, c, height, width = x.shape
        y = self.norm(x).view(b, c, height * width).transpose(1, 2)
        x = x + self.attention(y).transpose(-1, -2).reshape(b, c, height, width)
        mean, log = self.moments(F.silu(self.norm_out(x))).chunk(2, dim=1)
        return self.image(F.silu(self.decode(mean))), log.clamp(-30, 20).exp()


class Block(nn.Module):
    """Diff-Pruning#8: the block's layers run within a checkpoint, and were left out of the cut; it failed."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.inputs, self.attention = nn.Linear(8, width), Attention(width)
        self.wide, self.narrow = nn.Linear(width, 64), nn.Linear(32, width)
        self.head = nn.Linear(width, 3)

    def inner(self, x: Tensor) -> Tensor:
        x = x + self.attention(F.normalize(x, dim=-1))
        value, gate = self.wide(x).chunk(2, dim=-1)
        return x + self.narrow(value * F.gelu(gate))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.inner, self.inputs(x), use_reentrant=False))


class Conditioned(nn.Module):
    """nni#5524: a UNet that attends to a text; the size of what it is given stayed undetermined."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.time = nn.Conv2d(3, width, 3, padding=1), nn.Linear(1, width)
        self.proj_in, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(2))
        self.alone, self.crossed = Attention(width), Attention(width, context=8)
        self.up, self.head = nn.Conv2d(2 * width, width, 3, padding=1), nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        skip = self.stem(x) + self.time(time)[:, :, None, None]
        x = self.proj_in(F.avg_pool2d(skip, 2))
        b, inner, height, width = x.shape
        y = x.permute(0, 2, 3, 1).reshape(b, height * width, inner)
        y = y + self.alone(F.normalize(y, dim=-1))
        y = y + self.crossed(F.normalize(y, dim=-1), text)
        y = y.reshape(b, height, width, inner).permute(0, 3, 1, 2).contiguous()
        x = F.interpolate(self.proj_out(y) + x, scale_factor=2.0, mode="nearest")
        return self.head(F.silu(self.up(torch.cat([x, skip], 1))))


class Skip(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.submodule = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.submodule(x)], 1)


class Residual(nn.Module):
    def __init__(self, ins: int, outs: int, stride: int, slopes: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(unit(ins, outs, stride, slopes), unit(outs, outs, 1, slopes))
        self.residual = nn.Conv3d(ins, outs, 3, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x) + self.conv(x)


def unit(ins: int, outs: int, stride: int, slopes: int) -> nn.Sequential:
    norm = nn.BatchNorm3d(outs) if slopes == 1 else nn.InstanceNorm3d(outs, affine=True)
    conv = nn.Conv3d(ins, outs, 3, stride, 1)
    return nn.Sequential(conv, norm, nn.Dropout(0.2), nn.PReLU(slopes if slopes == 1 else outs))


def unet(slopes: int) -> nn.Module:
    """Torch-Pruning#387, #200, distiller#409, nni#5285: monai's UNet, its PReLU, its norms, its last layer."""
    bottom = Skip(Residual(16, 24, 1, slopes))
    up = nn.ConvTranspose3d(40, 8, 3, 2, 1, 1)
    inner = nn.Sequential(Residual(8, 16, 2, slopes), bottom, up, nn.PReLU())
    last = nn.ConvTranspose3d(16, 4, 3, 2, 1, 1)
    return nn.Sequential(Residual(1, 8, 2, slopes), Skip(inner), last, nn.Conv3d(4, 2, 3, 1, 1))


class Fused(nn.Module):
    """Torch-Pruning#357: queries, keys and values split by the width of a head that `__init__` noted."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.inputs, self.qkv = nn.Linear(8, width), nn.Linear(width, 3 * width)
        self.proj, self.head = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        b, n, width = x.shape
        rows = width * 3 // (3 * self.head_dim)
        q, k, v = self.qkv(x).reshape(b, n, 3, rows, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1) @ v
        return self.head(x + self.proj(y.transpose(1, 2).reshape(b, n, width)))


def image(batch: int, size: int, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, size, size, dtype=torch.float64)


def rows(batch: int, *sizes: int) -> Tensor:
    return torch.randn(batch, *sizes, dtype=torch.float64)


CASES: list[Any] = [
    (DiT(), [(image(n, s), rows(n, 1)) for n, s in ((2, 8), (3, 12))], "patches", 8),
    (Encoder(), [image(2, 8), image(3, 12)], "stem", 8),
    (Block(), [rows(2, 5, 8), rows(3, 7, 8)], "inputs", 8),
    (
        Conditioned(),
        [(image(n, s), rows(n, 1), rows(n, t, 8)) for n, s, t in ((2, 8, 5), (3, 12, 6))],
        "stem",
        8,
    ),
    *(
        (unet(slopes), [rows(2, 1, 8, 8, 8), rows(1, 1, 12, 8, 8)], "1.submodule.2", 4)
        for slopes in (1, 2)
    ),
    (Fused(), [rows(2, 5, 8), rows(3, 7, 8)], "inputs", 16),
]


@pytest.mark.parametrize(("net", "inputs", "layer", "left"), CASES)
def test_networks_that_other_tools_broke_equal_their_masked_twins(
    net: nn.Module, inputs: list[Any], layer: str, left: int
) -> None:
    with torch.no_grad():
        for (
            tensor
        ) in net.double().parameters():  # no two numbers of a tensor the same, as norms begin
            tensor.add_(torch.rand_like(tensor), alpha=1.0 if tensor.dim() == 1 else 1e-3)
    check(net.eval(), *inputs)
    weight = net.get_submodule(layer).weight
    outs = 1 if isinstance(net.get_submodule(layer), nn.ConvTranspose3d) else 0
    assert weight.shape[outs] == left
    outputs = net.train()(*inputs[0]) if isinstance(inputs[0], tuple) else net.train()(inputs[0])
    outputs = outputs[0] if isinstance(outputs, tuple) else outputs
    outputs.square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_group_norm_keeps_its_groups_and_loses_the_same_of_each() -> None:
    """nni#5069, onnxsim#982: groups over several channels; which of them are together must not change."""
    net = nn.Sequential(nn.Conv2d(3, 24, 1), nn.GroupNorm(4, 24), nn.SiLU(), nn.Conv2d(24, 5, 1))
    before = net[0].weight.detach().clone()
    prune(net, example=torch.randn(2, 3, 4, 4), ratio=0.5)
    kept = [n for n, row in enumerate(before) if any(torch.equal(row, w) for w in net[0].weight)]
    assert net[1].num_groups == 4 and net[1].num_channels == 12
    assert [n // 6 for n in kept] == sorted(3 * [*range(4)])
