"""Blocks of well-known networks: token mixers, kernels, branches."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from constructs.attention import FUSED, fused, separate
from constructs.build import Net, construct, images, parameter, sequences


@construct(sequences, {"embed.weight": (8, 6)}, keeps={"block.q": "", "block.v": ""})
def heads_written_in_the_code() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        q, k, v = (
            m(x).view(x.shape[0], -1, 4, 4).transpose(1, 2) for m in (self.q, self.k, self.v)
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    return separate(forward)


@construct(sequences, FUSED)
def queries_and_values_with_their_own_bias() -> Net:  # BEiT, Swin v2
    def forward(self: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        bias = torch.cat([self.qbias, torch.zeros_like(self.vbias), self.vbias])
        qkv = F.linear(x, self.qkv.weight, bias).reshape(b, n, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, -1))

    net = fused(forward, qbias=parameter(16), vbias=parameter(16))
    net.block.qkv = nn.Linear(16, 48, bias=False)
    return net


@construct(sequences, {**FUSED, "block.sharpness": (2, 1, 1)})
def cosine_attention_with_a_sharpness_per_head() -> Net:  # Swin v2
    def forward(self: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        scores = scores * self.sharpness.clamp(max=math.log(100)).exp()
        bias = self.wide(torch.relu(self.narrow(self.places))).permute(2, 0, 1)
        x = (scores + 16 * torch.sigmoid(bias)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, -1))

    return fused(
        forward,
        sharpness=parameter(4, 1, 1),
        narrow=nn.Linear(2, 8),
        wide=nn.Linear(8, 4, bias=False),
        places=torch.randn(5, 5, 2),
    )


@construct(sequences, {**FUSED, "block.biases": (2, 5)})
def attention_biases_by_offset() -> Net:  # LeViT
    def forward(self: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.mT * 0.5 + self.biases[:, self.offsets]
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1))

    places = torch.arange(5)
    return fused(forward, biases=parameter(4, 5), offsets=(places[:, None] - places[None]).abs())


@construct(sequences, {"qkv.weight": (16, 6), "proj.weight": (3, 8)})
def keys_narrower_than_values() -> Net:  # LeViT, TinyViT: key_dim and value_dim
    def forward(self: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).view(b, n, self.heads, -1)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.value_dim], dim=3)
        q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 1, 3), v.permute(0, 2, 1, 3)
        x = (q @ k.mT * 0.7).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, self.heads * self.value_dim))

    return Net(
        forward,
        qkv=nn.Linear(6, 4 * 8),
        proj=nn.Linear(16, 3),
        heads=4,
        key_dim=2,
        value_dim=4,
    )


@construct(
    images,
    {
        "stem.weight": (8, 3, 1, 1),
        "q.weight": (8, 8),
        "kv.weight": (16, 8),
        "reduce.weight": (8, 8, 2, 2),
    },
    plain=True,
)
def attention_with_spatial_reduction() -> Net:  # PVT, SegFormer
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        small = self.reduce(tokens.permute(0, 2, 1).reshape(b, c, h, w)).reshape(b, c, -1)
        small = self.norm(small.permute(0, 2, 1))
        q = self.q(tokens).reshape(b, h * w, self.heads, c // self.heads).permute(0, 2, 1, 3)
        kv = self.kv(small).reshape(b, -1, 2, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        x = (q @ kv[0].mT * 0.5).softmax(-1) @ kv[1]
        return self.head(self.proj(x.transpose(1, 2).reshape(b, h * w, c)) + tokens)

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 1),
        reduce=nn.Conv2d(16, 16, 2, 2),
        norm=nn.LayerNorm(16),
        q=nn.Linear(16, 16),
        kv=nn.Linear(16, 32),
        proj=nn.Linear(16, 16),
        head=nn.Linear(16, 4),
        heads=4,
    )


@construct(images, {"stem.weight": (8, 3, 1, 1), "mix.weight": (8, 8), "last.weight": (4, 8, 1, 1)})
def patches_folded_into_the_batch() -> Net:  # MobileViT
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, h, w = x.shape
        p = self.patch
        x = x.reshape(b * c * (h // p), p, w // p, p).transpose(1, 2)
        x = x.reshape(b, c, -1, p * p).transpose(1, 3).reshape(b * p * p, -1, c)
        x = x + torch.tanh(self.mix(x))
        x = x.contiguous().view(b, p * p, -1, c).transpose(1, 3)
        x = x.reshape(b * c * (h // p), w // p, p, p).transpose(1, 2).reshape(b, c, h, w)
        return self.last(x)

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 1),
        mix=nn.Linear(16, 16),
        last=nn.Conv2d(16, 4, 1),
        patch=2,
    )


@construct(sequences, {"up.weight": (16, 6), "down.weight": (3, 8)}, plain=True)
def spatial_gating() -> Net:  # gMLP
    def forward(self: Any, x: Tensor) -> Tensor:
        x, gate = F.gelu(self.up(x)).chunk(2, -1)
        gate = self.tokens(self.norm(gate).transpose(-1, -2)).transpose(-1, -2)
        return self.down(x * gate)

    return Net(
        forward,
        up=nn.Linear(6, 32),
        norm=nn.LayerNorm(16),
        tokens=nn.Linear(5, 5),
        down=nn.Linear(16, 3),
    )


@construct(images, {"stem.weight": (8, 3, 3, 3), "wide.weight": (12, 8, 1, 1)}, plain=True)
def pooling_as_token_mixer() -> Net:  # PoolFormer
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(x)
        x = x + self.scale[:, None, None] * (F.avg_pool2d(y, 3, 1, 1, count_include_pad=False) - y)
        return self.head(x + self.narrow(F.gelu(self.wide(x))))

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        norm=nn.GroupNorm(1, 16),
        scale=parameter(16),
        wide=nn.Conv2d(16, 24, 1),
        narrow=nn.Conv2d(24, 16, 1),
        head=nn.Conv2d(16, 4, 1),
    )


@construct(
    images, {"stem.weight": (8, 3, 1, 1), "near.weight": (8, 1, 3, 3), "mix.weight": (8, 8, 1, 1)}
)
def large_kernel_attention() -> Net:  # VAN
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x * self.mix(self.far(self.near(x))))

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 1),
        near=nn.Conv2d(16, 16, 3, padding=1, groups=16),
        far=nn.Conv2d(16, 16, 3, padding=2, groups=16, dilation=2),
        mix=nn.Conv2d(16, 16, 1),
        head=nn.Conv2d(16, 4, 1),
    )


@construct(images, {"first.weight": (18, 3, 1, 1), "focus.0.weight": (8, 1, 3, 3)})
def focal_modulation() -> Net:  # FocalNet: query, context and gates from one layer
    def forward(self: Any, x: Tensor) -> Tensor:
        q, context, gates = torch.split(self.first(x), (self.width, self.width, 2), 1)
        total = 0
        for level, layer in enumerate(self.focus):
            context = F.gelu(layer(context))
            total = total + context * gates[:, level : level + 1]
        return self.last(q * self.mix(total))

    focus = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1, groups=16) for _ in range(2))
    return Net(
        forward,
        first=nn.Conv2d(3, 34, 1),
        focus=focus,
        mix=nn.Conv2d(16, 16, 1),
        last=nn.Conv2d(16, 4, 1),
        width=16,
    )


@construct(images, {"first.weight": (16, 3, 1, 1), "deep.weight": (14, 1, 3, 3)})
def recursive_gated_convolution() -> Net:  # HorNet
    def forward(self: Any, x: Tensor) -> Tensor:
        gate, rest = torch.split(self.first(x), (self.sizes[0], sum(self.sizes)), 1)
        parts = torch.split(self.deep(rest), self.sizes, 1)
        x = gate * parts[0]
        for layer, part in zip(self.layers, parts[1:], strict=True):
            x = layer(x) * part
        return self.last(x)

    return Net(
        forward,
        first=nn.Conv2d(3, 32, 1),
        deep=nn.Conv2d(28, 28, 3, padding=1, groups=28),
        layers=nn.ModuleList([nn.Conv2d(4, 8, 1), nn.Conv2d(8, 16, 1)]),
        last=nn.Conv2d(16, 4, 1),
        sizes=[4, 8, 16],
    )


@construct(images, {"stem.weight": (8, 3, 1, 1)})
def parallel_depthwise_branches_of_a_split() -> Net:  # InceptionNeXt
    def forward(self: Any, x: Tensor) -> Tensor:
        a, b, c = torch.split(self.stem(x), self.sizes, dim=1)
        return self.last(torch.relu(torch.cat((a, self.square(b), self.band(c)), dim=1)))

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 1),
        square=nn.Conv2d(4, 4, 3, padding=1, groups=4),
        band=nn.Conv2d(4, 4, (1, 5), padding=(0, 2), groups=4),
        last=nn.Conv2d(16, 4, 1),
        sizes=(8, 4, 4),
    )


@construct(
    images,
    {"first.weight": (4, 3, 1, 1), "cheap.weight": (4, 1, 3, 3), "last.weight": (4, 8, 1, 1)},
)
def ghost_module() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.cat([x, torch.relu(self.cheap(x))], 1)
        return self.last(x[:, : self.out, :, :])

    return Net(
        forward,
        first=nn.Conv2d(3, 8, 1),
        cheap=nn.Conv2d(8, 8, 3, padding=1, groups=8),
        last=nn.Conv2d(16, 4, 1),
        out=16,
    )


@construct(images, {"stem.weight": (8, 3, 3, 3), "branch.0.weight": (4, 4, 1, 1)})
def shuffled_half_branches() -> Net:  # ShuffleNet v2
    def forward(self: Any, x: Tensor) -> Tensor:
        one, two = torch.relu(self.stem(x)).chunk(2, dim=1)
        x = torch.cat((one, self.branch(two)), dim=1)
        b, c, h, w = x.size()
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, c, h, w)
        return self.last(x)

    branch = nn.Sequential(
        nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
    )
    return Net(forward, stem=nn.Conv2d(3, 16, 3), branch=branch, last=nn.Conv2d(16, 4, 1))


@construct(
    images, {"stem.weight": (8, 3, 3, 3), "dense.weight": (8, 8, 3, 3), "one.running_mean": (8,)}
)
def branches_that_reparametrize() -> Net:  # RepVGG
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.last(torch.relu(self.one(x) + self.two(self.dense(x)) + self.point(x)))

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        one=nn.BatchNorm2d(16),
        dense=nn.Conv2d(16, 16, 3, padding=1, bias=False),
        two=nn.BatchNorm2d(16),
        point=nn.Conv2d(16, 16, 1),
        last=nn.Conv2d(16, 4, 1),
    )
