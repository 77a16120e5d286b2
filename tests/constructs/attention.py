"""Attention by hand: heads, widths, masks, positions, caches and windows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from constructs.build import CONSTRUCTS, Net, construct, images, parameter, sequences


def around(block: nn.Module, width: int = 16) -> Net:
    """Put `block` on a residual path between an embedding of 6 and a head of 3."""

    def forward(self: Any, x: Tensor, *args: Any) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.block(x, *args))

    return Net(forward, embed=nn.Linear(6, width), block=block, head=nn.Linear(width, 3))


FUSED = {"block.qkv.weight": (24, 8), "block.proj.weight": (8, 8), "embed.weight": (8, 6)}
SEPARATE = {
    "block.q.weight": (8, 8),
    "block.k.weight": (8, 8),
    "block.v.weight": (8, 8),
    "block.proj.weight": (8, 8),
}


def fused(forward: Callable[..., Any], **parts: Any) -> Net:
    block = Net(
        forward, qkv=nn.Linear(16, 48), proj=nn.Linear(16, 16), heads=4, head_dim=4, dim=16, **parts
    )
    return around(block)


def separate(forward: Callable[..., Any], kv_heads: int = 4, **parts: Any) -> Net:
    block = Net(
        forward,
        q=nn.Linear(16, 16),
        k=nn.Linear(16, 4 * kv_heads),
        v=nn.Linear(16, 4 * kv_heads),
        proj=nn.Linear(16, 16),
        heads=4,
        kv_heads=kv_heads,
        head_dim=4,
        **parts,
    )
    return around(block)


def to_heads(x: Tensor, heads: int, head_dim: int) -> Tensor:
    return x.view(x.shape[0], x.shape[1], heads, head_dim).transpose(1, 2)


@construct(sequences, FUSED)
def fused_qkv_reshape_permute_unbind() -> Net:  # timm
    def forward(self: Any, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attention = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(b, n, c))

    return fused(forward)


@construct(sequences, FUSED)
def fused_qkv_with_head_dim_from_the_width() -> Net:  # early timm: c // heads
    def forward(self: Any, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.proj(x.transpose(1, 2).reshape(b, n, c))

    return fused(forward)


@construct(sequences, FUSED)
def fused_qkv_chunk() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        q, k, v = (to_heads(t, self.heads, self.head_dim) for t in self.qkv(x).chunk(3, dim=-1))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))

    return fused(forward)


@construct(sequences, FUSED)
def fused_qkv_split_by_width() -> Net:  # nanoGPT
    def forward(self: Any, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.qkv(x).split(self.dim, dim=2)
        q, k, v = (z.view(b, t, self.heads, c // self.heads).transpose(1, 2) for z in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(x.transpose(1, 2).contiguous().view(b, t, c))

    return fused(forward)


@construct(sequences, FUSED)
def fused_qkv_heads_first() -> Net:  # NeoX: (heads, 3 * head_dim)
    def forward(self: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).view(b, n, self.heads, 3 * self.head_dim).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=-1)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, -1))

    return fused(forward)


@construct(sequences, SEPARATE)
def separate_qkv() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        q, k, v = (to_heads(m(x), self.heads, self.head_dim) for m in (self.q, self.k, self.v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    return separate(forward)


@construct(sequences, SEPARATE)
def separate_qkv_minus_one_heads() -> Net:  # view(..., -1, head_dim), as all of Hugging Face
    def forward(self: Any, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (m(x).view(shape).transpose(1, 2) for m in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(x.reshape(*shape[:-2], -1).contiguous())

    return separate(forward)


@construct(sequences, SEPARATE)
def attention_with_batch_times_heads() -> Net:  # fairseq: bmm over (batch * heads)
    def forward(self: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape

        def fold(t: Tensor) -> Tensor:
            t = t.view(b, n, self.heads, self.head_dim).transpose(1, 2)
            return t.reshape(b * self.heads, n, self.head_dim)

        q, k, v = fold(self.q(x)), fold(self.k(x)), fold(self.v(x))
        scores = torch.bmm(q, k.transpose(1, 2)) / math.sqrt(self.head_dim)
        x = torch.bmm(scores.softmax(-1), v).view(b, self.heads, n, self.head_dim)
        return self.proj(x.transpose(1, 2).reshape(b, n, self.heads * self.head_dim))

    return separate(forward)


@construct(sequences, SEPARATE)
def attention_by_einsum() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (self.heads, -1)) for m in (self.q, self.k, self.v))
        weights = torch.einsum("bihd,bjhd->bhij", q, k).mul(self.head_dim**-0.5).softmax(-1)
        return self.proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))

    return separate(forward)


@construct(
    lambda n: (torch.randn(n, 5, 6), torch.rand(n, 1, 5, 5) > 0.3),
    SEPARATE,
)
def attention_with_a_boolean_mask() -> Net:
    def forward(self: Any, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (to_heads(m(x), self.heads, self.head_dim) for m in (self.q, self.k, self.v))
        mask = mask | torch.eye(5, dtype=torch.bool)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)
        return self.proj(x.transpose(1, 2).flatten(2))

    return separate(forward)


@construct(lambda n: (torch.randn(n, 5, 6), torch.randn(5, 5)), SEPARATE)
def attention_with_a_float_mask_and_a_scale() -> Net:
    def forward(self: Any, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (to_heads(m(x), self.heads, self.head_dim) for m in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3)
        return self.proj(x.transpose(1, 2).flatten(2))

    return separate(forward)


@construct(sequences, SEPARATE)
def attention_with_a_causal_buffer() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        n = x.shape[1]
        q, k, v = (to_heads(m(x), self.heads, self.head_dim) for m in (self.q, self.k, self.v))
        scores = q @ k.mT / math.sqrt(k.size(-1))
        scores = scores.masked_fill(self.causal[:, :, :n, :n] == 0, float("-inf"))
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    return separate(forward, causal=torch.tril(torch.ones(1, 1, 8, 8)))


GROUPED = {
    "block.q.weight": (8, 8),
    "block.k.weight": (4, 8),
    "block.v.weight": (4, 8),
    "block.proj.weight": (8, 8),
}


@construct(sequences, GROUPED)
def grouped_query_repeat_interleave() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        q = to_heads(self.q(x), self.heads, self.head_dim)
        k, v = (to_heads(m(x), self.kv_heads, self.head_dim) for m in (self.k, self.v))
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    return separate(forward, kv_heads=2)


@construct(sequences, GROUPED)
def grouped_query_expand_reshape() -> Net:  # Hugging Face's repeat_kv
    def repeat(x: Tensor, times: int) -> Tensor:
        b, heads, n, d = x.shape
        x = x[:, :, None, :, :].expand(b, heads, times, n, d)
        return x.reshape(b, heads * times, n, d)

    def forward(self: Any, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (m(x).view(shape).transpose(1, 2) for m in (self.q, self.k, self.v))
        k, v = repeat(k, self.groups), repeat(v, self.groups)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(x.reshape(*shape[:-2], -1))

    return separate(forward, kv_heads=2, groups=2)


@construct(sequences, GROUPED)
def grouped_query_enable_gqa() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        q = to_heads(self.q(x), self.heads, self.head_dim)
        k, v = (to_heads(m(x), self.kv_heads, self.head_dim) for m in (self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.proj(x.transpose(1, 2).flatten(2))

    return separate(forward, kv_heads=2)


@construct(sequences, {"block.q.weight": (8, 8), "block.k.weight": (4, 8), "embed.weight": (8, 6)})
def multi_query() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        q = to_heads(self.q(x), self.heads, self.head_dim)
        k, v = self.k(x).unsqueeze(1), self.v(x).unsqueeze(1)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    return separate(forward, kv_heads=1)


def angles(width: int) -> Tensor:
    rates = 1.0 / 100 ** (torch.arange(0, width, 2) / width)
    return torch.outer(torch.arange(8).float(), rates)


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


@construct(sequences, SEPARATE)
def rotary_half() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        n = x.shape[1]
        q, k, v = (to_heads(m(x), self.heads, self.head_dim) for m in (self.q, self.k, self.v))
        cos, sin = self.cos[:n], self.sin[:n]
        q, k = (t * cos + rotate_half(t) * sin for t in (q, k))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    table = torch.cat([angles(4), angles(4)], -1)
    return separate(forward, cos=table.cos(), sin=table.sin())


@construct(sequences, GROUPED)
def rotary_half_with_grouped_query() -> Net:  # Llama
    def forward(self: Any, x: Tensor) -> Tensor:
        n = x.shape[1]
        q = to_heads(self.q(x), self.heads, self.head_dim)
        k, v = (to_heads(m(x), self.kv_heads, self.head_dim) for m in (self.k, self.v))
        cos, sin = self.cos[:n], self.sin[:n]
        q, k = (t * cos + rotate_half(t) * sin for t in (q, k))
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    table = torch.cat([angles(4), angles(4)], -1)
    return separate(forward, kv_heads=2, cos=table.cos(), sin=table.sin())


@construct(sequences, SEPARATE)
def rotary_interleaved() -> Net:
    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    def forward(self: Any, x: Tensor) -> Tensor:
        n = x.shape[1]
        q, k, v = (to_heads(m(x), self.heads, self.head_dim) for m in (self.q, self.k, self.v))
        q, k = (turn(t, self.cos[:n], self.sin[:n]) for t in (q, k))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    return separate(forward, cos=angles(4).cos(), sin=angles(4).sin())


@construct(sequences, SEPARATE)
def rotary_complex() -> Net:  # Meta's own Llama
    def forward(self: Any, x: Tensor) -> Tensor:
        n = x.shape[1]
        q, k, v = (m(x).view(*x.shape[:2], self.heads, -1) for m in (self.q, self.k, self.v))
        turn = torch.polar(torch.ones_like(self.angles[:n]), self.angles[:n])[:, None]
        pairs = [torch.view_as_complex(t.reshape(*t.shape[:-1], -1, 2)) for t in (q, k)]
        q, k = (torch.view_as_real(t * turn).flatten(3) for t in pairs)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    return separate(forward, angles=angles(4))


@construct(
    lambda n: torch.randn(n, 4, 4, 6),
    {"block.qkv.weight": (24, 8), "block.table": (9, 2), "block.proj.weight": (8, 8)},
)
def swin_windows_with_relative_positions() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        s = self.window
        x = x.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)
        windows, n, _ = x.shape
        qkv = self.qkv(x).reshape(windows, n, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).unsqueeze(0)
        attention = (q * self.scale @ k.transpose(-2, -1) + bias).softmax(-1)
        x = self.proj((attention @ v).transpose(1, 2).reshape(windows, n, c))
        x = x.view(b, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(b, h, w, c)

    place = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
    offset = place[:, :, None] - place[:, None, :] + 1
    index = offset[0] * 3 + offset[1]
    return fused(forward, window=2, table=parameter(9, 4), index=index, scale=0.5)


@construct(sequences, {**SEPARATE, "block.bias.weight": (9, 2)})
def relative_positions_from_an_embedding() -> Net:  # T5
    def forward(self: Any, x: Tensor) -> Tensor:
        n = x.shape[1]
        q, k, v = (to_heads(m(x), self.heads, self.head_dim) for m in (self.q, self.k, self.v))
        offset = torch.arange(n)[None] - torch.arange(n)[:, None] + 4
        bias = self.bias(offset).permute(2, 0, 1).unsqueeze(0)
        attention = (q @ k.mT + bias).softmax(-1)
        return self.proj((attention @ v).transpose(1, 2).flatten(2))

    return separate(forward, bias=nn.Embedding(9, 4))


@construct(sequences, {**SEPARATE, "block.slopes": (2, 1, 1)})
def alibi_slopes_in_a_buffer() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        n = x.shape[1]
        q, k, v = (to_heads(m(x), self.heads, self.head_dim) for m in (self.q, self.k, self.v))
        distance = (torch.arange(n)[None] - torch.arange(n)[:, None]).abs()
        attention = (q @ k.mT - self.slopes * distance).softmax(-1)
        return self.proj((attention @ v).transpose(1, 2).flatten(2))

    return separate(forward, slopes=(2.0 ** -torch.arange(1, 5)).view(4, 1, 1))


@construct(sequences, {"embed.weight": (8, 6)})
def alibi_slopes_made_in_the_forward() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        n = x.shape[1]
        q, k, v = (to_heads(m(x), self.heads, self.head_dim) for m in (self.q, self.k, self.v))
        slopes = (2.0 ** -torch.arange(1, self.heads + 1)).view(-1, 1, 1)
        distance = (torch.arange(n)[None] - torch.arange(n)[:, None]).abs()
        attention = (q @ k.mT - slopes * distance).softmax(-1)
        return self.proj((attention @ v).transpose(1, 2).flatten(2))

    return separate(forward)


@construct(
    sequences,
    {"q.weight": (4, 6), "k.weight": (4, 6), "v.weight": (4, 6)},
    scaled={"q.weight": math.sqrt(0.5), "q.bias": math.sqrt(0.5)},
)
def single_head_attention() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).mT / math.sqrt(self.q.out_features)
        return self.proj(scores.softmax(-1) @ self.v(x))

    q, k, v = (nn.Linear(6, 8) for _ in range(3))
    return Net(forward, q=q, k=k, v=v, proj=nn.Linear(8, 3))


@construct(sequences, {"embed.weight": (8, 6), "block.qkv.weight": (24, 8)}, plain=True)
def attention_with_normed_queries() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(self.normq(q), self.normk(k), v)
        return self.proj(x.transpose(1, 2).reshape(b, n, c))

    return fused(forward, normq=nn.LayerNorm(4), normk=nn.LayerNorm(4))


@construct(
    lambda n: (torch.randn(n, 5, 6), torch.randn(n, 7, 6)),
    {"q.weight": (8, 6), "kv.weight": (16, 6)},
)
def cross_attention() -> Net:
    def forward(self: Any, x: Tensor, context: Tensor) -> Tensor:
        q = to_heads(self.q(x), self.heads, 4)
        k, v = (to_heads(t, self.heads, 4) for t in self.kv(context).chunk(2, -1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    return Net(forward, q=nn.Linear(6, 16), kv=nn.Linear(6, 32), proj=nn.Linear(16, 3), heads=4)


@construct(sequences, {"block.qkv.weight": (24, 8), "embed.weight": (8, 6)})
def linear_attention() -> Net:  # softmax-free: phi(q) (phi(k)^T v)
    def forward(self: Any, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        x = (q @ (k.mT @ v)) / (q @ k.sum(-2, keepdim=True).mT)
        return self.proj(x.transpose(1, 2).reshape(b, n, c))

    return fused(forward)


@construct(images, {"stem.weight": (8, 3, 3, 3), "qkv.weight": (24, 8, 1, 1)})
def attention_over_pixels_by_convolution() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, h, w = x.shape
        qkv = self.qkv(x).reshape(b, 3, self.heads, c // self.heads, h * w)
        q, k, v = qkv.unbind(1)
        attention = (q.mT @ k * 0.5).softmax(-1)
        x = x + self.proj((v @ attention.mT).reshape(b, c, h, w))
        return self.head(x.mean((2, 3)))

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3, padding=1),
        qkv=nn.Conv2d(16, 48, 1),
        proj=nn.Conv2d(16, 16, 1),
        head=nn.Linear(16, 4),
        heads=4,
    )


@construct(sequences, {"qkv.weight": (24, 6)})
def channel_attention_of_heads() -> (
    Net
):  # XCiT: (head_dim x head_dim) maps, normalized along tokens
    def forward(self: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 4, 1).unbind(0)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        attention = (q @ k.mT * self.temperature).softmax(-1)
        return self.proj((attention @ v).permute(0, 3, 1, 2).reshape(b, n, -1))

    return Net(
        forward,
        qkv=nn.Linear(6, 48),
        proj=nn.Linear(16, 3),
        heads=4,
        temperature=parameter(4, 1, 1),
    )


def by_width(name: str, queries: Any = "", **shapes: tuple[int, ...]) -> None:
    """Register a net once more, pruned by the width of its heads (4 to 2) rather than by whole heads.

    `queries` names the layer whose rows make the queries, which shrink by sqrt(2 / 4); "" where the forward scales
    by a number of its own that a cut does not change. A fused layer is given with a mask of its rows.
    """
    item = CONSTRUCTS[name]
    layer, rows = queries if isinstance(queries, tuple) else (queries, torch.ones(16))
    shrunk = math.sqrt(0.5) ** rows.double()
    scaled = {f"{layer}.weight": shrunk[:, None], f"{layer}.bias": shrunk} if layer else {}
    if layer.endswith("in_proj"):
        scaled = {f"{layer}_weight": shrunk[:, None], f"{layer}_bias": shrunk}
    CONSTRUCTS[f"{name}_by_width"] = item._replace(
        scaled=scaled,
        shapes={**item.shapes, **{key.replace("__", "."): shape for key, shape in shapes.items()}},
        arguments={"attention": "width"},
    )


FUSED_ROWS = torch.tensor([1, 0, 0]).repeat_interleave(16)

by_width("fused_qkv_with_head_dim_from_the_width", ("block.qkv", FUSED_ROWS))
by_width("fused_qkv_reshape_permute_unbind", ("block.qkv", FUSED_ROWS))
by_width("fused_qkv_chunk", ("block.qkv", FUSED_ROWS))
by_width("fused_qkv_split_by_width", ("block.qkv", FUSED_ROWS))
by_width("fused_qkv_heads_first", ("block.qkv", torch.tensor([1, 0, 0] * 4).repeat_interleave(4)))
by_width("separate_qkv", "block.q")
by_width("separate_qkv_minus_one_heads", "block.q")
by_width("attention_with_batch_times_heads", "block.q")
by_width("attention_by_einsum")
by_width("attention_with_a_boolean_mask", "block.q")
by_width("attention_with_a_float_mask_and_a_scale")
by_width("attention_with_a_causal_buffer", "block.q")
by_width("grouped_query_repeat_interleave", "block.q")
by_width("grouped_query_expand_reshape", "block.q")
by_width("grouped_query_enable_gqa", "block.q")
by_width("multi_query", "block.q", block__k__weight=(2, 8), block__v__weight=(2, 8))
by_width("rotary_half", "block.q", block__cos=(8, 2))
by_width("rotary_half_with_grouped_query", "block.q", block__cos=(8, 2))
by_width("rotary_complex", "block.q", block__angles=(8, 1))
by_width("swin_windows_with_relative_positions", block__table=(9, 4))
by_width("relative_positions_from_an_embedding", block__bias__weight=(9, 4))
by_width("alibi_slopes_in_a_buffer", block__slopes=(4, 1, 1))
