"""Every construct that real networks are made of, as a tiny net: pruned for real, and compared with the truth.

A construct names the shapes that must come out, or the reason for which a layer stays as it is. The truth is
independent of the package: the dense network with the removed elements set to zero, found by value, or an
answer known beforehand.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as torch_prune
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lightning_accel.errors import NoEffect
from lightning_accel.pruning import Macs, mask_equivalence, plan, prune
from lightning_accel.pruning.graph import Graph
from lightning_accel.pruning.importance import score
from lightning_accel.surgery import Receipt, Select, Structure, follow, twin
from lightning_accel.surgery.call import as_call, tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype"),
]


# --- how a net is built -----------------------------------------------------------------------


class Net(nn.Module):
    """A forward, and the modules, parameters, buffers and plain attributes that it uses."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.body = forward
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(self, *args, **kwargs)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


class Construct(NamedTuple):
    """A net, its example of a batch size, and what must come out.

    `shapes` are those of named tensors after half of all channels went. `keeps` names layers that stay,
    with a part of the reason. `plain`: statistics across channels are left out of the comparison, because
    a cut changes them by design. `scaled` tensors are multiplied by a number, so that attention stays as sharp
    as it was.
    """

    build: Callable[[], nn.Module]
    example: Callable[[int], Any]
    shapes: Mapping[str, tuple[int, ...]]
    keeps: Mapping[str, str]
    plain: bool
    trains: bool
    scaled: Mapping[str, Any]
    arguments: Mapping[str, Any]


CONSTRUCTS: dict[str, Construct] = {}
BROKEN = {
    "einsum_of_raw_parameters": "heads and their width, as two dimensions of one weight, both stay",
}


def construct(
    example: Callable[[int], Any],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    keeps: Mapping[str, str] | None = None,
    plain: bool = False,
    trains: bool = True,
    scaled: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        assert build.__name__ not in CONSTRUCTS, build.__name__
        CONSTRUCTS[build.__name__] = Construct(
            build, example, shapes, keeps or {}, plain, trains, scaled or {}, arguments
        )
        return build

    return register


def vectors(n: int) -> Tensor:
    return torch.randn(n, 6)


def sequences(n: int) -> Tensor:
    return torch.randn(n, 5, 6)


def time_first(n: int) -> Tensor:
    return torch.randn(5, n, 6)


def signals(n: int) -> Tensor:
    return torch.randn(n, 3, 12)


def images(n: int) -> Tensor:
    return torch.randn(n, 3, 8, 8)


def volumes(n: int) -> Tensor:
    return torch.randn(n, 3, 4, 4, 4)


def tokens(n: int) -> Tensor:
    return torch.randint(0, 12, (n, 5))


# --- statistics across channels, which a cut changes by design -----------------------------------

_PLAIN = {"norms": False}


@contextmanager
def plain_norms(plain: bool = True) -> Iterator[None]:
    """Replace norms across channels by their affine part."""

    def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        x = x if weight is None else x * weight
        return x if bias is None else x + bias

    def layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, *_: Any) -> Tensor:
        return affine(x, weight, bias)

    def rms_norm(x: Tensor, shape: Any, weight: Any = None, *_: Any) -> Tensor:
        return affine(x, weight, None)

    def group_norm(x: Tensor, groups: int, weight: Any, bias: Any, *_: Any) -> Tensor:
        per_channel = [-1] + [1] * (x.dim() - 2)
        return affine(x, *(t if t is None else t.view(per_channel) for t in (weight, bias)))

    with pytest.MonkeyPatch.context() as patch:
        if plain:
            patch.setattr(F, "layer_norm", layer_norm)
            patch.setattr(F, "rms_norm", rms_norm)
            patch.setattr(F, "group_norm", group_norm)
            patch.setitem(_PLAIN, "norms", True)
        yield


def standardized(x: Tensor, dim: int) -> Tensor:
    """Normalize as a user writes it: subtract the mean, divide by the deviation."""
    if _PLAIN["norms"]:
        return x
    centred = x - x.mean(dim, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dim, keepdim=True) + 1e-5)


# --- attention --------------------------------------------------------------------------------


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


# --- torch's own attention --------------------------------------------------------------------


def mha(call: Callable[..., Any], **options: Any) -> Net:
    def forward(self: Any, x: Tensor, *args: Any) -> Any:
        x = self.embed(x)
        return call(self, x, *args)

    return Net(
        forward,
        embed=nn.Linear(6, 16),
        attention=nn.MultiheadAttention(16, 4, **options),
        head=nn.Linear(16, 3),
    )


MHA = {
    "attention.in_proj_weight": (24, 8),
    "attention.out_proj.weight": (8, 8),
    "embed.weight": (8, 6),
}


@construct(sequences, MHA)
def mha_batch_first() -> Net:
    return mha(
        lambda self, x: self.head(x + self.attention(x, x, x, need_weights=False)[0]),
        batch_first=True,
    )


@construct(time_first, MHA)
def mha_time_first() -> Net:
    return mha(lambda self, x: self.head(x + self.attention(x, x, x)[0]))


@construct(sequences, MHA)
def mha_that_returns_weights() -> Net:
    def call(self: Any, x: Tensor) -> Any:
        y, weights = self.attention(x, x, x, need_weights=True)
        return self.head(x + y) + weights.sum()  # each row of them sums to one

    return mha(call, batch_first=True)


@construct(lambda n: (sequences(n), torch.rand(n, 5) > 1), MHA)
def mha_with_a_padding_mask() -> Net:
    def call(self: Any, x: Tensor, mask: Tensor) -> Any:
        return self.head(x + self.attention(x, x, x, key_padding_mask=mask)[0])

    return mha(call, batch_first=True)


@construct(sequences, {"embed.weight": (8, 6)})
def mha_with_bias_of_keys_and_values() -> Net:
    return mha(
        lambda self, x: self.head(x + self.attention(x, x, x, need_weights=False)[0]),
        batch_first=True,
        add_bias_kv=True,
    )


@construct(sequences, {"embed.weight": (8, 6)})
def mha_with_zero_attention() -> Net:
    return mha(
        lambda self, x: self.head(x + self.attention(x, x, x, need_weights=False)[0]),
        batch_first=True,
        add_zero_attn=True,
    )


@construct(
    lambda n: (sequences(n), torch.randn(n, 7, 10), torch.randn(n, 7, 12)),
    {"attention.q_proj_weight": (8, 8), "attention.k_proj_weight": (8, 10)},
)
def mha_with_other_widths_of_keys_and_values() -> Net:
    def call(self: Any, x: Tensor, key: Tensor, value: Tensor) -> Any:
        return self.head(x + self.attention(x, key, value, need_weights=False)[0])

    return mha(call, batch_first=True, kdim=10, vdim=12)


def layers_of(block: nn.Module, call: Callable[..., Any] | None = None) -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(call(self, x) if call else self.block(x))

    return Net(forward, embed=nn.Linear(6, 16), block=block, head=nn.Linear(16, 3))


LAYER = {
    "block.self_attn.in_proj_weight": (24, 8),
    "block.linear1.weight": (12, 8),
    "block.norm1.weight": (8,),
    "embed.weight": (8, 6),
}


def encoder_layer(**options: Any) -> nn.Module:
    options = {"batch_first": True, "dropout": 0.0, **options}
    return nn.TransformerEncoderLayer(16, 4, 24, **options)


@construct(sequences, LAYER, plain=True)
def transformer_encoder_layer() -> Net:
    return layers_of(encoder_layer())


@construct(sequences, LAYER, plain=True)
def transformer_encoder_layer_norm_first() -> Net:
    return layers_of(encoder_layer(norm_first=True, activation="gelu"))


@construct(time_first, LAYER, plain=True)
def transformer_encoder_layer_time_first() -> Net:
    return layers_of(encoder_layer(batch_first=False))


@construct(
    sequences,
    {
        "block.layers.0.self_attn.in_proj_weight": (24, 8),
        "block.layers.1.linear1.weight": (12, 8),
        "block.norm.weight": (8,),
    },
    plain=True,
)
def transformer_encoder() -> Net:
    encoder = nn.TransformerEncoder(encoder_layer(), 2, norm=nn.LayerNorm(16))
    return layers_of(encoder)


@construct(
    sequences,
    {"block.self_attn.in_proj_weight": (24, 8), "block.multihead_attn.in_proj_weight": (24, 8)},
    plain=True,
)
def transformer_decoder_layer() -> Net:
    layer = nn.TransformerDecoderLayer(16, 4, 24, batch_first=True, dropout=0.0)
    return layers_of(layer, lambda self, x: self.block(x, x.flip(1)))


@construct(
    lambda n: (sequences(n), torch.randn(n, 4, 6)),
    {"block.encoder.layers.0.linear1.weight": (12, 8), "embed.weight": (8, 6)},
    plain=True,
)
def whole_transformer() -> Net:
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(y.shape[1])
        y = self.block(self.embed(x), self.embed(y), tgt_mask=mask, tgt_is_causal=True)
        return self.head(y)

    block = nn.Transformer(16, 4, 1, 1, 24, dropout=0.0, batch_first=True)
    return Net(forward, embed=nn.Linear(6, 16), block=block, head=nn.Linear(16, 3))


by_width("mha_batch_first", ("attention.in_proj", FUSED_ROWS))
by_width("mha_time_first", ("attention.in_proj", FUSED_ROWS))
by_width("transformer_encoder_layer", ("block.self_attn.in_proj", FUSED_ROWS))


# --- vision transformers: tokens, positions, scales ---------------------------------------------


@construct(
    images,
    {"patch.weight": (8, 3, 4, 4), "token": (1, 1, 8), "position": (1, 5, 8), "scale": (8,)},
    plain=True,
)
def class_token_position_and_layer_scale() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        x = x + self.scale * self.mlp(self.norm(x))
        return self.head(x[:, 0])

    return Net(
        forward,
        patch=nn.Conv2d(3, 16, 4, 4),
        token=parameter(1, 1, 16),
        position=parameter(1, 5, 16),
        scale=parameter(16),
        norm=nn.LayerNorm(16),
        mlp=nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)),
        head=nn.Linear(16, 4),
    )


@construct(tokens, {"embed.weight": (12, 8), "position.weight": (8, 8), "up.weight": (16, 8)})
def embedded_positions() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        x = self.embed(x) + self.position(places)
        return self.head(x + self.down(F.gelu(self.up(x))))

    return Net(
        forward,
        embed=nn.Embedding(12, 16),
        position=nn.Embedding(8, 16),
        up=nn.Linear(16, 32),
        down=nn.Linear(32, 16),
        head=nn.Linear(16, 4),
    )


def sinusoids(width: int) -> Tensor:
    return torch.stack([angles(width).sin(), angles(width).cos()], -1).flatten(1)[None]


@construct(sequences, {"embed.weight": (8, 6), "table": (1, 8, 8)})
def sinusoids_in_a_buffer() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.embed(x) + self.table[:, : x.size(1)]))

    return Net(forward, embed=nn.Linear(6, 16), table=sinusoids(16), head=nn.Linear(16, 3))


@construct(sequences, {"inner.weight": (8, 16)}, keeps={"embed": "buffer"})
def sinusoids_in_a_buffer_that_checkpoints_do_not_hold() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.embed(x) + self.table[:, : x.size(1)]
        return self.head(torch.relu(self.inner(torch.relu(x))))

    net = Net(forward, embed=nn.Linear(6, 16), inner=nn.Linear(16, 16), head=nn.Linear(16, 3))
    net.register_buffer("table", sinusoids(16), persistent=False)
    return net


@construct(sequences, {"up.weight": (16, 6)})
def stochastic_depth() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.down(F.gelu(self.up(x)))
        if self.training:
            y = y * (torch.rand(y.shape[0], 1, 1, dtype=y.dtype, device=y.device) < 0.9) / 0.9
        return x + y

    return Net(forward, up=nn.Linear(6, 32), down=nn.Linear(32, 6))


@construct(
    images,
    {"token.0.weight": (4, 4), "channel.0.weight": (16, 8), "patch.weight": (8, 3, 4, 4)},
    plain=True,
)
def mlp_mixer() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.token(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.channel(x)).mean(1))

    return Net(
        forward,
        patch=nn.Conv2d(3, 16, 4, 4),
        norm=nn.LayerNorm(16),
        token=nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)),
        channel=nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)),
        head=nn.Linear(16, 4),
    )


@construct(
    lambda n: (sequences(n), vectors(n)),
    {"embed.weight": (8, 6), "modulation.weight": (24, 6)},
    plain=True,
)
def adaptive_layer_norm() -> Net:  # DiT
    def forward(self: Any, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).unsqueeze(1).chunk(3, -1)
        x = self.embed(x)
        x = x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)
        return self.head(x)

    return Net(
        forward,
        embed=nn.Linear(6, 16),
        modulation=nn.Linear(6, 48),
        norm=nn.LayerNorm(16, elementwise_affine=False),
        mlp=nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16)),
        head=nn.Linear(16, 3),
    )


# --- norms ------------------------------------------------------------------------------------

MLP = {"up.weight": (8, 6), "down.weight": (3, 8)}


def normed(norm: Any, forward: Callable[..., Any] | None = None, **parts: Any) -> Net:
    def usual(self: Any, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.norm(self.up(x))))

    parts = {"up": nn.Linear(6, 16), "norm": norm, "down": nn.Linear(16, 3), **parts}
    return Net(forward or usual, **{k: v for k, v in parts.items() if v is not None})


@construct(vectors, {**MLP, "norm.weight": (8,)}, plain=True)
def layer_norm() -> Net:
    return normed(nn.LayerNorm(16))


@construct(vectors, MLP, plain=True)
def layer_norm_without_affine() -> Net:
    return normed(nn.LayerNorm(16, elementwise_affine=False))


@construct(vectors, {**MLP, "norm.weight": (8,)}, plain=True)
def rms_norm() -> Net:
    return normed(nn.RMSNorm(16))


@construct(vectors, {**MLP, "norm.scale": (8,)}, plain=True)
def rms_norm_by_hand() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        if _PLAIN["norms"]:
            return x * self.scale
        wide = x.to(torch.float64)
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x) * self.scale

    return normed(Net(forward, scale=parameter(16)))


@construct(vectors, {**MLP, "norm.scale": (8,)}, plain=True)
def rms_norm_by_vector_norm() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        if _PLAIN["norms"]:
            return x * self.scale
        return x / x.norm(dim=-1, keepdim=True) * self.width**0.5 * self.scale

    return normed(Net(forward, scale=parameter(16), width=16))


@construct(vectors, {**MLP, "norm.scale": (8,), "norm.shift": (8,)}, plain=True)
def layer_norm_by_hand() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        return standardized(x, -1) * self.scale + self.shift

    return normed(Net(forward, scale=parameter(16), shift=parameter(16)))


@construct(vectors, {**MLP, "norm.scale": (8,)}, plain=True)
def layer_norm_by_functional_with_own_shape() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.width,), self.scale, self.shift)

    return normed(Net(forward, scale=parameter(16), shift=parameter(16), width=16))


@construct(vectors, {**MLP, "norm.scale": (8,)}, plain=True)
def layer_norm_by_functional_with_the_shape_of_its_weight() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.scale.shape, self.scale, self.shift)

    return normed(Net(forward, scale=parameter(16), shift=parameter(16)))


IMAGE = {"up.weight": (8, 3, 3, 3), "down.weight": (4, 8, 1, 1)}


def normed_image(norm: Any, forward: Callable[..., Any] | None = None, **parts: Any) -> Net:
    return normed(
        norm,
        forward,
        **{"up": nn.Conv2d(3, 16, 3, padding=1), "down": nn.Conv2d(16, 4, 1), **parts},
    )


@construct(images, {**IMAGE, "norm.weight": (8,)}, plain=True)
def layer_norm_channels_first_by_permute() -> Net:  # ConvNeXt
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.norm(self.up(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.down(torch.relu(x))

    return normed_image(nn.LayerNorm(16), forward)


@construct(images, {**IMAGE, "norm.scale": (8,)}, plain=True)
def layer_norm_channels_first_by_hand() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        return standardized(x, 1) * self.scale[:, None, None] + self.shift[:, None, None]

    return normed_image(Net(forward, scale=parameter(16), shift=parameter(16)))


@construct(images, {**IMAGE, "norm.weight": (8,)})
def group_norm_that_keeps_whole_groups() -> Net:
    return normed_image(nn.GroupNorm(8, 16))


@construct(images, {**IMAGE, "norm.weight": (8,)}, plain=True)
def group_norm_of_two() -> Net:
    return normed_image(nn.GroupNorm(2, 16))


@construct(images, {**IMAGE, "norm.weight": (8,)}, plain=True)
def group_norm_of_one() -> Net:
    return normed_image(nn.GroupNorm(1, 16))


@construct(images, {**IMAGE, "norm.weight": (8,)})
def group_norm_of_each_channel() -> Net:
    return normed_image(nn.GroupNorm(16, 16))


@construct(images, {**IMAGE, "norm.running_mean": (8,), "norm.weight": (8,)})
def instance_norm_with_statistics() -> Net:
    return normed_image(nn.InstanceNorm2d(16, affine=True, track_running_stats=True))


@construct(images, IMAGE)
def instance_norm() -> Net:
    return normed_image(nn.InstanceNorm2d(16))


@construct(images, {**IMAGE, "norm.weight": (8,), "norm.running_var": (8,)})
def batch_norm_2d() -> Net:
    return normed_image(nn.BatchNorm2d(16))


@construct(images, {**IMAGE, "norm.running_var": (8,)})
def batch_norm_without_affine() -> Net:
    return normed_image(nn.BatchNorm2d(16, affine=False))


@construct(images, {**IMAGE, "norm.weight": (8,)})
def batch_norm_without_statistics() -> Net:
    return normed_image(nn.BatchNorm2d(16, track_running_stats=False))


@construct(images, {**IMAGE, "norm.weight": (8,)}, trains=False)
def synchronized_batch_norm() -> Net:  # runs in eval mode only without a process group
    return normed_image(nn.SyncBatchNorm(16))


@construct(vectors, {**MLP, "norm.running_mean": (8,)})
def batch_norm_1d_of_vectors() -> Net:
    return normed(nn.BatchNorm1d(16))


@construct(signals, {"up.weight": (8, 3, 3), "norm.weight": (8,)})
def batch_norm_1d_of_signals() -> Net:
    return normed(nn.BatchNorm1d(16), up=nn.Conv1d(3, 16, 3), down=nn.Conv1d(16, 4, 1))


@construct(volumes, {"up.weight": (8, 3, 2, 2, 2), "norm.weight": (8,)})
def batch_norm_3d() -> Net:
    return normed(nn.BatchNorm3d(16), up=nn.Conv3d(3, 16, 2), down=nn.Conv3d(16, 4, 1))


@construct(images, {**IMAGE, "norm.scale": (8,), "norm.mean": (8,)})
def frozen_batch_norm_of_buffers() -> Net:  # torchvision's detection models
    def forward(self: Any, x: Tensor) -> Tensor:
        scale = self.scale.reshape(1, -1, 1, 1) * (self.var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (
            self.shift.reshape(1, -1, 1, 1) - self.mean.reshape(1, -1, 1, 1) * scale
        )

    norm = Net(
        forward,
        scale=torch.rand(16),
        shift=torch.randn(16),
        mean=torch.randn(16),
        var=torch.rand(16) + 0.5,
    )
    return normed_image(norm)


@construct(images, IMAGE, plain=True)
def weight_standardization() -> Net:
    def convolution(self: Any, x: Tensor) -> Tensor:
        weight = standardized(self.weight.flatten(1), 1).view_as(self.weight)
        return F.conv2d(x, weight, self.bias, padding=1)

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.middle(torch.relu(self.up(x)))))

    middle = Net(convolution, weight=parameter(16, 16, 3, 3), bias=parameter(16))
    return normed_image(None, forward, middle=middle)


@construct(images, IMAGE, plain=True)
def local_response_norm() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down(F.normalize(self.up(x), dim=1) if not _PLAIN["norms"] else self.up(x))

    return normed_image(None, forward)


@construct(lambda n: (images(n), vectors(n)), {"stem.weight": (8, 3, 3, 3), "film.weight": (16, 6)})
def film() -> Net:
    def forward(self: Any, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.film(condition)[..., None, None].chunk(2, 1)
        return self.head(torch.relu(self.stem(x) * scale + shift).mean((2, 3)))

    return Net(forward, stem=nn.Conv2d(3, 16, 3), film=nn.Linear(6, 32), head=nn.Linear(16, 4))


# --- gates and splits -------------------------------------------------------------------------


@construct(vectors, {"up.weight": (16, 6), "down.weight": (3, 8)})
def glu() -> Net:
    return Net(
        lambda self, x: self.down(F.glu(self.up(x), -1)), up=nn.Linear(6, 32), down=nn.Linear(16, 3)
    )


@construct(images, {"up.weight": (16, 3, 3, 3), "down.weight": (4, 8, 1, 1)})
def glu_module_over_channels() -> Net:
    return Net(
        lambda self, x: self.down(self.glu(self.up(x))),
        up=nn.Conv2d(3, 32, 3),
        glu=nn.GLU(dim=1),
        down=nn.Conv2d(16, 4, 1),
    )


@construct(vectors, {"up.weight": (16, 6), "down.weight": (3, 8)})
def geglu_by_chunk() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x, gate = self.up(x).chunk(2, dim=-1)
        return self.down(x * F.gelu(gate))

    return Net(forward, up=nn.Linear(6, 32), down=nn.Linear(16, 3))


@construct(vectors, {"up.weight": (8, 6), "gate.weight": (8, 6), "down.weight": (3, 8)})
def swiglu_of_two_layers() -> Net:
    return Net(
        lambda self, x: self.down(F.silu(self.gate(x)) * self.up(x)),
        up=nn.Linear(6, 16, bias=False),
        gate=nn.Linear(6, 16, bias=False),
        down=nn.Linear(16, 3, bias=False),
    )


@construct(vectors, {"up.weight": (16, 6), "down.weight": (3, 8)})
def swiglu_by_slices() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.up(x)
        half = x.shape[-1] // 2
        return self.down(F.silu(x[..., :half]) * x[..., half:])

    return Net(forward, up=nn.Linear(6, 32), down=nn.Linear(16, 3))


@construct(vectors, {"up.weight": (16, 6), "down.weight": (3, 8)})
def gate_of_interleaved_rows() -> Net:  # gpt-oss: gate and up in alternating places
    def forward(self: Any, x: Tensor) -> Tensor:
        x, gate = self.up(x).unflatten(-1, (-1, 2)).unbind(-1)
        return self.down(x * torch.sigmoid(gate))

    return Net(forward, up=nn.Linear(6, 32), down=nn.Linear(16, 3))


@construct(
    images,
    {"one.weight": (8, 3, 1, 1), "parts.0.weight": (4, 4, 3, 3), "two.weight": (4, 16, 1, 1)},
)
def c2f_of_yolov8() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = list(self.one(x).chunk(2, 1))
        y.extend(part(y[-1]) for part in self.parts)
        return self.two(torch.cat(y, 1))

    parts = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
    return Net(forward, one=nn.Conv2d(3, 16, 1), parts=parts, two=nn.Conv2d(32, 4, 1))


@construct(
    images, {"one.weight": (8, 3, 1, 1), "part.weight": (4, 4, 3, 3), "two.weight": (4, 12, 1, 1)}
)
def c2f_by_split_with_its_own_width() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = list(self.one(x).split((self.c, self.c), 1))
        y.append(self.part(y[-1]))
        return self.two(torch.cat(y, 1))

    part = nn.Conv2d(8, 8, 3, padding=1)
    return Net(forward, one=nn.Conv2d(3, 16, 1), part=part, two=nn.Conv2d(24, 4, 1), c=8)


@construct(vectors, {"up.weight": (14, 6), "wide.weight": (3, 8), "narrow.weight": (3, 4)})
def unequal_split_by_attributes() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        a, b, c = torch.split(self.up(x), [self.one, self.two, self.three], dim=-1)
        return self.wide(torch.relu(a)) + self.narrow(torch.relu(b)) + self.last(torch.relu(c))

    return Net(
        forward,
        up=nn.Linear(6, 28),
        wide=nn.Linear(16, 3),
        narrow=nn.Linear(8, 3),
        last=nn.Linear(4, 3),
        one=16,
        two=8,
        three=4,
    )


@construct(vectors, {"inner.weight": (8, 16)}, keeps={"up": "written in the code"})
def split_sizes_written_in_the_code() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        a, b = self.up(x).split([8, 8], -1)
        return self.down(torch.relu(self.inner(torch.cat([torch.relu(a), torch.tanh(b)], -1))))

    return Net(forward, up=nn.Linear(6, 16), inner=nn.Linear(16, 16), down=nn.Linear(16, 3))


@construct(vectors, {"up.weight": (8, 6)})
def narrow_by_attribute() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.down(torch.relu(x.narrow(1, 0, self.half)) * x.narrow(1, self.half, self.half))

    return Net(forward, up=nn.Linear(6, 16), down=nn.Linear(8, 3), half=8)


@construct(images, {"up.weight": (8, 3, 3, 3)})
def partial_convolution() -> Net:  # FasterNet: a convolution of the first channels only
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.up(x)
        a, b = x[:, : self.part], x[:, self.part :]
        return self.down(torch.relu(torch.cat([self.inner(a), b], 1)))

    return Net(
        forward,
        up=nn.Conv2d(3, 16, 3),
        inner=nn.Conv2d(4, 4, 3, padding=1),
        down=nn.Conv2d(16, 4, 1),
        part=4,
    )


@construct(images, {"up.weight": (8, 3, 1, 1), "down.weight": (4, 8, 1, 1)})
def channel_shuffle_by_view() -> Net:  # ShuffleNet
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.up(x))
        b, c, h, w = x.shape
        x = x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.down(self.inner(x))

    return Net(
        forward,
        up=nn.Conv2d(3, 16, 1),
        inner=nn.Conv2d(16, 16, 3, padding=1, groups=2),
        down=nn.Conv2d(16, 4, 1),
        groups=2,
    )


@construct(images, {"up.weight": (8, 3, 1, 1), "down.weight": (4, 8, 1, 1)})
def channel_shuffle_module() -> Net:
    return Net(
        lambda self, x: self.down(torch.relu(self.shuffle(self.up(x)))),
        up=nn.Conv2d(3, 16, 1),
        shuffle=nn.ChannelShuffle(4),
        down=nn.Conv2d(16, 4, 1),
    )


@construct(images, {"up.weight": (16, 3, 3, 3), "down.weight": (4, 4, 1, 1)})
def pixel_shuffle() -> Net:
    return Net(
        lambda self, x: self.down(self.shuffle(self.up(x))),
        up=nn.Conv2d(3, 32, 3, padding=1),
        shuffle=nn.PixelShuffle(2),
        down=nn.Conv2d(8, 4, 1),
    )


@construct(images, {"up.weight": (4, 3, 3, 3), "down.weight": (4, 16, 1, 1)})
def pixel_unshuffle() -> Net:
    return Net(
        lambda self, x: self.down(F.pixel_unshuffle(torch.relu(self.up(x)), 2)),
        up=nn.Conv2d(3, 8, 3, padding=1),
        down=nn.Conv2d(32, 4, 1),
    )


@construct(images, {"up.weight": (4, 3, 3, 3), "reduce.weight": (8, 16)})
def patch_merging_by_strided_slices() -> Net:  # Swin
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.up(x)).permute(0, 2, 3, 1)
        corners = [x[:, i::2, j::2] for j in range(2) for i in range(2)]
        return self.down(torch.relu(self.reduce(torch.cat(corners, -1))))

    return Net(
        forward,
        up=nn.Conv2d(3, 8, 3, padding=1),
        reduce=nn.Linear(32, 16),
        down=nn.Linear(16, 4),
    )


@construct(images, {"up.weight": (4, 3, 3, 3), "down.weight": (4, 36)})
def unfolded_patches() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        patches = F.unfold(torch.relu(self.up(x)), 3, padding=1)  # (batch, channels * 9, places)
        return self.down(patches.transpose(1, 2))

    return Net(forward, up=nn.Conv2d(3, 8, 3, padding=1), down=nn.Linear(72, 4))


@construct(vectors, {"up.weight": (16, 6), "down.weight": (3, 8)})
def maxout() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.down(x.view(x.shape[0], -1, 2).amax(-1))

    return Net(forward, up=nn.Linear(6, 32), down=nn.Linear(16, 3))


# --- convolutions -----------------------------------------------------------------------------


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


@construct(signals, {"0.weight": (8, 3, 3), "2.weight": (4, 8, 3), "4.weight": (4, 4, 1)})
def convolutions_1d() -> nn.Module:
    return chain(nn.Conv1d(3, 16, 3), nn.ReLU(), nn.Conv1d(16, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 1))


@construct(volumes, {"0.weight": (8, 3, 2, 2, 2), "2.weight": (4, 8, 1, 1, 1)})
def convolutions_3d() -> nn.Module:
    return chain(nn.Conv3d(3, 16, 2), nn.ReLU(), nn.Conv3d(16, 4, 1))


@construct(images, {"0.weight": (3, 8, 2, 2), "2.weight": (8, 4, 2, 2), "0.bias": (8,)})
def transposed_convolutions() -> nn.Module:
    return chain(nn.ConvTranspose2d(3, 16, 2, 2), nn.ReLU(), nn.ConvTranspose2d(16, 4, 2, 2))


@construct(images, {"0.weight": (8, 3, 1, 1), "2.weight": (8, 4, 2, 2), "4.weight": (4, 8, 1, 1)})
def grouped_transposed_convolution() -> nn.Module:
    return chain(
        nn.Conv2d(3, 16, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 16, 2, groups=2),
        nn.ReLU(),
        nn.Conv2d(16, 4, 1),
    )


@construct(images, {"0.weight": (8, 3, 1, 1), "2.weight": (8, 1, 2, 2), "4.weight": (4, 8, 1, 1)})
def depthwise_transposed_convolution() -> nn.Module:
    return chain(
        nn.Conv2d(3, 16, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 16, 2, groups=16),
        nn.ReLU(),
        nn.Conv2d(16, 4, 1),
    )


@construct(images, {"0.weight": (8, 3, 1, 1), "2.weight": (8, 4, 3, 3), "4.weight": (4, 8, 1, 1)})
def grouped_convolution() -> nn.Module:
    return chain(
        nn.Conv2d(3, 16, 1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=2),
        nn.ReLU(),
        nn.Conv2d(16, 4, 1),
    )


@construct(images, {"0.weight": (8, 3, 1, 1), "3.weight": (8, 1, 3, 3), "1.running_var": (8,)})
def depthwise_separable_convolution() -> nn.Module:
    return chain(
        nn.Conv2d(3, 16, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.ReLU(),
        nn.Conv2d(16, 4, 1),
    )


@construct(images, {"0.weight": (4, 3, 1, 1), "2.weight": (8, 1, 3, 3), "4.weight": (4, 8, 1, 1)})
def depthwise_convolution_with_a_multiplier() -> nn.Module:
    return chain(
        nn.Conv2d(3, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, groups=8),
        nn.ReLU(),
        nn.Conv2d(16, 4, 1),
    )


@construct(images, {"1.weight": (8, 12, 1, 1)}, keeps={"0": "input"})
def depthwise_convolution_of_the_input() -> nn.Module:
    return chain(
        nn.Conv2d(3, 12, 3, groups=3), nn.Conv2d(12, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 1)
    )


@construct(signals, {"first.weight": (8, 3, 2), "second.weight": (8, 8, 2)})
def causal_dilated_convolutions() -> Net:  # WaveNet
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.first(F.pad(x, (1, 0))))
        x = x + torch.tanh(self.second(F.pad(x, (2, 0))))
        return self.last(x)

    return Net(
        forward,
        first=nn.Conv1d(3, 16, 2),
        second=nn.Conv1d(16, 16, 2, dilation=2),
        last=nn.Conv1d(16, 4, 1),
    )


@construct(images, {"stem.weight": (8, 3, 3, 3), "a.weight": (8, 8, 3, 3), "head.weight": (4, 8)})
def residual() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        x += self.b(F.relu(self.a(x.relu())))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        norm=nn.BatchNorm2d(16),
        a=nn.Conv2d(16, 16, 3, padding=1),
        b=nn.Conv2d(16, 16, 1),
        head=nn.Linear(16, 4),
    )


@construct(
    images,
    {"stem.weight": (8, 3, 3, 3), "grow.0.weight": (4, 8, 3, 3), "grow.1.weight": (4, 12, 3, 3)},
)
def dense_concatenation() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.grow:
            features.append(layer(torch.relu(torch.cat(features, 1))))
        return self.head(torch.cat(features, 1))

    grow = nn.ModuleList(nn.Conv2d(16 + 8 * n, 8, 3, padding=1) for n in range(2))
    return Net(forward, stem=nn.Conv2d(3, 16, 3), grow=grow, head=nn.Conv2d(32, 4, 1))


@construct(
    images,
    {
        "down.weight": (8, 3, 3, 3),
        "middle.weight": (16, 8, 3, 3),
        "up.weight": (16, 8, 2, 2),
        "last.weight": (4, 16, 3, 3),
    },
)
def unet() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        skip = torch.relu(self.down(x))
        x = torch.relu(self.middle(F.max_pool2d(skip, 2)))
        return self.last(torch.cat([skip, self.up(x)], 1))

    return Net(
        forward,
        down=nn.Conv2d(3, 16, 3, padding=1),
        middle=nn.Conv2d(16, 32, 3, padding=1),
        up=nn.ConvTranspose2d(32, 16, 2, 2),
        last=nn.Conv2d(32, 4, 3, padding=1),
    )


@construct(
    images, {"stem.weight": (8, 3, 3, 3), "one.weight": (4, 8, 1, 1), "two.weight": (8, 4, 1, 1)}
)
def squeeze_and_excite() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = torch.sigmoid(self.two(torch.relu(self.one(F.adaptive_avg_pool2d(x, 1)))))
        return self.head(torch.relu(x * gate))

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        one=nn.Conv2d(16, 8, 1),
        two=nn.Conv2d(8, 16, 1),
        head=nn.Conv2d(16, 4, 1),
    )


@construct(images, {"stem.weight": (8, 3, 3, 3), "one.weight": (4, 8)})
def squeeze_and_excite_by_view() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, _, _ = x.size()
        gate = torch.sigmoid(self.two(torch.relu(self.one(self.pool(x).view(b, c)))))
        return self.head(torch.relu(x * gate.view(b, c, 1, 1).expand_as(x)))

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        pool=nn.AdaptiveAvgPool2d(1),
        one=nn.Linear(16, 8),
        two=nn.Linear(8, 16),
        head=nn.Conv2d(16, 4, 1),
    )


@construct(images, {"inner.weight": (8, 16, 1, 1)}, keeps={"stem": "made anew"})
def efficient_channel_attention() -> Net:  # ECA: a convolution along the channels
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = self.gate(x.mean((2, 3)).unsqueeze(1)).squeeze(1)
        return self.last(
            torch.relu(self.inner(torch.relu(x * torch.sigmoid(gate)[:, :, None, None])))
        )

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        gate=nn.Conv1d(1, 1, 3, padding=1),
        inner=nn.Conv2d(16, 16, 1),
        last=nn.Conv2d(16, 4, 1),
    )


@construct(images, {"stem.weight": (8, 3, 3, 3), "gate.weight": (1, 2, 3, 3)}, plain=True)
def cbam_spatial_gate() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        mean = x.sum(1, keepdim=True) if _PLAIN["norms"] else x.mean(1, keepdim=True)
        gate = self.gate(torch.cat([mean, x.max(1, keepdim=True)[0]], 1))
        return self.head(x * torch.sigmoid(gate))

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        gate=nn.Conv2d(2, 1, 3, padding=1),
        head=nn.Conv2d(16, 4, 1),
    )


@construct(
    images, {"stem.weight": (8, 3, 3, 3), "a.weight": (8, 8, 3, 3), "narrow.weight": (4, 8, 1, 1)}
)
def selective_kernels() -> Net:  # SKNet: softmax over two branches
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        branches = torch.stack([torch.relu(self.a(x)), torch.relu(self.b(x))], 1)
        gate = self.wide(torch.relu(self.narrow(branches.sum(1).mean((2, 3), keepdim=True))))
        b, c = gate.shape[:2]
        gate = gate.view(b, 2, c // 2, 1, 1).softmax(1)
        return self.head((branches * gate).sum(1))

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        a=nn.Conv2d(16, 16, 3, padding=1),
        b=nn.Conv2d(16, 16, 1),
        narrow=nn.Conv2d(16, 8, 1),
        wide=nn.Conv2d(8, 32, 1),
        head=nn.Conv2d(16, 4, 1),
    )


@construct(images, {"stem.weight": (8, 3, 3, 3), "parts.0.weight": (2, 2, 3, 3)})
def hierarchical_residual_split() -> Net:  # Res2Net
    def forward(self: Any, x: Tensor) -> Tensor:
        pieces = torch.split(torch.relu(self.stem(x)), self.width, 1)
        found, last = [], pieces[0]
        for n, part in enumerate(self.parts):
            last = torch.relu(part(last if n == 0 else last + pieces[n]))
            found.append(last)
        return self.head(torch.cat([*found, pieces[-1]], 1))

    parts = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
    return Net(forward, stem=nn.Conv2d(3, 16, 3), parts=parts, head=nn.Conv2d(16, 4, 1), width=4)


@construct(images, {"0.weight": (8, 3, 3, 3), "3.weight": (8, 8 * 9), "5.weight": (4, 8)})
def flatten_after_convolution() -> nn.Module:  # VGG
    return chain(
        nn.Conv2d(3, 16, 3),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 9, 16),
        nn.PReLU(),
        nn.Linear(16, 4),
    )


@construct(images, {"0.weight": (8, 3, 3, 3), "1.weight": (8,)})
def prelu_per_channel() -> nn.Module:
    return chain(nn.Conv2d(3, 16, 3), nn.PReLU(16), nn.Conv2d(16, 4, 1))


@construct(images, {"stem.weight": (8, 3, 3, 3), "lateral.weight": (8, 8, 1, 1)})
def feature_pyramid_with_outputs_at_several_scales() -> Net:
    def forward(self: Any, x: Tensor) -> list[Tensor]:
        fine = torch.relu(self.stem(x))
        coarse = torch.relu(self.down(fine))
        top = self.top(coarse)
        both = self.lateral(fine) + F.interpolate(top, size=fine.shape[-2:], mode="nearest")
        return [self.head(both), self.head(top)]

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        down=nn.Conv2d(16, 16, 3, 2, padding=1),
        top=nn.Conv2d(16, 16, 1),
        lateral=nn.Conv2d(16, 16, 1),
        head=nn.Conv2d(16, 4, 1),
    )


@construct(images, {"inner.weight": (8, 3)})
def convolution_with_a_kernel_made_in_the_forward() -> Net:  # dynamic filters
    def forward(self: Any, x: Tensor) -> Tensor:
        kernel = self.outer(torch.relu(self.inner(x.mean((0, 2, 3)))))
        return F.conv2d(x, kernel.view(4, 3, 3, 3))

    return Net(forward, inner=nn.Linear(3, 16), outer=nn.Linear(16, 4 * 27))


@construct(
    images, {"stem.weight": (8, 3, 3, 3), "experts": (2, 4, 8, 1, 1), "route.weight": (2, 8)}
)
def conditional_convolution() -> Net:  # CondConv: kernels mixed per sample, grouped by the batch
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        b, c, h, w = x.shape
        mix = torch.sigmoid(self.route(x.mean((2, 3))))
        kernel = (mix @ self.experts.flatten(1)).view(b * 4, c, 1, 1)
        return F.conv2d(x.reshape(1, b * c, h, w), kernel, groups=b).view(b, 4, h, w)

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        route=nn.Linear(16, 4),
        experts=parameter(4, 4, 16, 1, 1),
    )


# --- recurrent --------------------------------------------------------------------------------


def recurrent(layer: nn.Module, width: int = 16, call: Callable[..., Any] | None = None) -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(call(self, x) if call else self.layer(x)[0])

    return Net(forward, layer=layer, head=nn.Linear(width, 3))


@construct(
    time_first,
    {"layer.weight_ih_l0": (32, 6), "layer.weight_hh_l0": (32, 8), "head.weight": (3, 8)},
)
def lstm() -> Net:
    return recurrent(nn.LSTM(6, 16))


@construct(
    sequences, {"layer.weight_ih_l1": (32, 8), "layer.weight_hh_l1": (32, 8), "head.weight": (3, 8)}
)
def lstm_of_two_layers() -> Net:
    return recurrent(nn.LSTM(6, 16, 2, batch_first=True))


@construct(sequences, {"layer.weight_ih_l0_reverse": (32, 6), "head.weight": (3, 16)})
def lstm_in_both_directions() -> Net:
    return recurrent(nn.LSTM(6, 16, bidirectional=True, batch_first=True), 32)


@construct(sequences, {"layer.weight_hr_l0": (4, 8), "layer.weight_ih_l0": (32, 6)})
def lstm_with_a_projection() -> Net:
    net = recurrent(nn.LSTM(6, 16, proj_size=8, batch_first=True), 8)
    net.head = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    return net


@construct(
    sequences, {"layer.weight_ih_l0": (24, 6), "layer.weight_hh_l0": (24, 8), "head.weight": (3, 8)}
)
def gru() -> Net:
    return recurrent(nn.GRU(6, 16, batch_first=True))


@construct(sequences, {"layer.weight_ih_l1": (24, 16), "head.weight": (3, 16)})
def gru_of_two_layers_in_both_directions() -> Net:
    return recurrent(nn.GRU(6, 16, 2, batch_first=True, bidirectional=True), 32)


@construct(sequences, {"layer.weight_ih_l0": (8, 6), "head.weight": (3, 8)})
def rnn() -> Net:
    return recurrent(nn.RNN(6, 16, batch_first=True))


@construct(sequences, {"layer.weight_ih_l0": (32, 6), "head.weight": (3, 8)})
def last_hidden_state_of_an_lstm() -> Net:
    return recurrent(nn.LSTM(6, 16, batch_first=True), call=lambda self, x: self.layer(x)[1][0][-1])


@construct(sequences, {"layer.weight_ih_l0": (32, 6), "head.weight": (3, 8)})
def lstm_with_an_initial_state() -> Net:
    def call(self: Any, x: Tensor) -> Tensor:
        state = x.new_zeros(1, x.shape[0], self.layer.hidden_size)
        return self.layer(x, (state, state))[0]

    return recurrent(nn.LSTM(6, 16, batch_first=True), call=call)


@construct(sequences, {"cell.weight_ih": (32, 6), "cell.weight_hh": (32, 8), "head.weight": (3, 8)})
def lstm_cell() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0])

    return Net(forward, cell=nn.LSTMCell(6, 16), head=nn.Linear(16, 3))


@construct(sequences, {"cell.weight_ih": (24, 6), "cell.weight_hh": (24, 8), "head.weight": (3, 8)})
def gru_cell() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        state = torch.zeros(x.shape[0], self.width, dtype=x.dtype)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state)

    return Net(forward, cell=nn.GRUCell(6, 16), head=nn.Linear(16, 3), width=16)


@construct(sequences, {"inputs.weight": (8, 6), "hidden.weight": (8, 8), "head.weight": (3, 8)})
def recurrence_by_hand() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], self.hidden.in_features)
        for step in x.unbind(1):
            state = torch.tanh(self.inputs(step) + self.hidden(state))
        return self.head(state)

    return Net(forward, inputs=nn.Linear(6, 16), hidden=nn.Linear(16, 16), head=nn.Linear(16, 3))


@construct(sequences, {"up.weight": (16, 6), "filter.weight": (8, 1, 3), "down.weight": (3, 8)})
def gated_convolution_of_a_state_space_model() -> Net:  # Mamba's block without the scan
    def forward(self: Any, x: Tensor) -> Tensor:
        x, gate = self.up(x).chunk(2, -1)
        x = self.filter(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        return self.down(F.silu(x).cumsum(1) * torch.exp(-F.softplus(self.decay)) * F.silu(gate))

    return Net(
        forward,
        up=nn.Linear(6, 32),
        filter=nn.Conv1d(16, 16, 3, padding=2, groups=16),
        decay=parameter(16),
        down=nn.Linear(16, 3),
    )


# --- weights that are not plain parameters ------------------------------------------------------


@construct(
    images,
    {
        "0.parametrizations.weight.original1": (8, 3, 3, 3),
        "0.parametrizations.weight.original0": (8, 1, 1, 1),
        "2.parametrizations.weight.original1": (4, 8, 1, 1),
    },
)
def weight_norm() -> nn.Module:
    return chain(
        parametrizations.weight_norm(nn.Conv2d(3, 16, 3)),
        nn.ReLU(),
        parametrizations.weight_norm(nn.Conv2d(16, 4, 1)),
    )


@construct(vectors, {"0.weight_v": (8, 6), "0.weight_g": (8, 1), "2.weight_v": (3, 8)})
def old_weight_norm() -> nn.Module:
    return chain(
        torch.nn.utils.weight_norm(nn.Linear(6, 16)),
        nn.ReLU(),
        torch.nn.utils.weight_norm(nn.Linear(16, 3)),
    )


@construct(images, {"0.parametrizations.weight.original": (8, 3, 3, 3), "2.weight": (4, 8, 1, 1)})
def spectral_norm() -> nn.Module:
    return chain(
        parametrizations.spectral_norm(nn.Conv2d(3, 16, 3)), nn.ReLU(), nn.Conv2d(16, 4, 1)
    )


@construct(vectors, {"0.weight_orig": (8, 6), "0.weight_u": (8,), "2.weight": (3, 8)})
def old_spectral_norm() -> nn.Module:
    return chain(torch.nn.utils.spectral_norm(nn.Linear(6, 16)), nn.ReLU(), nn.Linear(16, 3))


@construct(vectors, {"0.bias": (8,), "2.weight": (8, 8), "4.weight": (3, 8)})
def orthogonal_weight() -> nn.Module:
    return chain(
        parametrizations.orthogonal(nn.Linear(6, 16), orthogonal_map="cayley"),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 3),
    )


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


@construct(vectors, {"4.weight": (3, 8)})
def parametrization_by_the_user() -> nn.Module:
    layer = nn.Linear(16, 16)
    nn.utils.parametrize.register_parametrization(layer, "weight", Symmetric())
    return chain(nn.Linear(6, 16), nn.ReLU(), layer, nn.Linear(16, 16), nn.Linear(16, 3))


@construct(vectors, {"0.weight_orig": (8, 6), "0.weight_mask": (8, 6), "2.weight": (3, 8)})
def masks_of_torch_prune() -> nn.Module:
    net = chain(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    torch_prune.random_unstructured(net[0], "weight", 0.3)
    return net


def adapted(inputs: int, outputs: int) -> Net:
    """A frozen layer and a low-rank adapter beside it, as LoRA has them."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.frozen(x) + self.up(self.down(x))

    return Net(
        forward,
        frozen=nn.Linear(inputs, outputs).requires_grad_(False),
        down=nn.Linear(inputs, 4, bias=False),
        up=nn.Linear(4, outputs, bias=False),
    )


@construct(vectors, {"0.down.weight": (2, 6), "0.up.weight": (16, 2)}, keeps={"0.frozen": "frozen"})
def lora() -> nn.Module:
    return chain(adapted(6, 16), nn.ReLU(), adapted(16, 3))


@construct(vectors, {"2.weight": (8, 16)}, keeps={"0": "frozen"})
def frozen_first_layer() -> nn.Module:
    return chain(
        nn.Linear(6, 16).requires_grad_(False),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 3),
    )


@construct(images, {"3.weight": (8, 16, 1, 1)}, keeps={"0": "frozen"})
def frozen_batch_norm_weight() -> nn.Module:
    return chain(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16).requires_grad_(False),
        nn.ReLU(),
        nn.Conv2d(16, 16, 1),
        nn.ReLU(),
        nn.Conv2d(16, 4, 1),
    )


@construct(tokens, {"embed.weight": (12, 8), "head.weight": (12, 8), "up.weight": (16, 8)})
def tied_embedding_and_head() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.down(F.gelu(self.up(x))))

    embed, head = nn.Embedding(12, 16), nn.Linear(16, 12, bias=False)
    head.weight = embed.weight
    return Net(forward, embed=embed, up=nn.Linear(16, 32), down=nn.Linear(32, 16), head=head)


@construct(vectors, {"0.weight": (8, 6), "2.weight": (8, 8), "4.weight": (8, 8)})
def two_layers_of_one_weight() -> nn.Module:
    net = chain(
        nn.Linear(6, 16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.Linear(16, 3),
    )
    net[4].weight = net[2].weight
    return net


@construct(vectors, {"up.weight": (8, 6), "down.weight": (3, 8)})
def transposed_tie() -> Net:  # an autoencoder that reads its weight twice
    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.linear(torch.relu(self.up(x)), self.up.weight.t())
        return self.down(torch.relu(self.up(x)))

    return Net(forward, up=nn.Linear(6, 16), down=nn.Linear(16, 3))


@construct(vectors, {**MLP, "gain": (8,), "mean": (1, 8)})
def persistent_buffers() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.gain * (self.up(x) - self.mean)))

    return Net(
        forward,
        up=nn.Linear(6, 16),
        gain=torch.rand(16) + 1,
        mean=torch.randn(1, 16),
        down=nn.Linear(16, 3),
    )


@construct(vectors, {**MLP, "ones": (8,)})
def constant_buffer_that_checkpoints_do_not_hold() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.ones * self.up(x)))

    net = Net(forward, up=nn.Linear(6, 16), down=nn.Linear(16, 3))
    net.register_buffer("ones", torch.full((16,), 1.5), persistent=False)
    return net


@construct(vectors, {"inner.weight": (8, 16)}, keeps={"up": "constant"})
def tensor_that_is_no_buffer() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.inner(torch.relu(self.up(x) * self.other["gain"].to(x)))))

    return Net(
        forward,
        up=nn.Linear(6, 16),
        inner=nn.Linear(16, 16),
        down=nn.Linear(16, 3),
        other={"gain": torch.linspace(1, 2, 16)},
    )


@construct(vectors, {"up": (8, 6), "down": (3, 8)})
def linear_of_raw_parameters() -> Net:
    return Net(
        lambda self, x: F.linear(torch.relu(F.linear(x, self.up)), self.down),
        up=parameter(16, 6),
        down=parameter(3, 16),
    )


@construct(vectors, {"up": (6, 8), "bias": (8,), "down": (8, 3)})
def product_with_raw_parameters() -> Net:
    return Net(
        lambda self, x: torch.relu(x @ self.up + self.bias) @ self.down,
        up=parameter(6, 16),
        bias=parameter(16),
        down=parameter(16, 3),
    )


@construct(sequences, {"up": (6, 2, 4), "down": (2, 4, 3)})
def einsum_of_raw_parameters() -> Net:  # JAX-style attention weights: (width, heads, head_dim)
    def forward(self: Any, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btc,chd->bthd", x, w) for w in (self.up, self.key, self.value))
        weights = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
        return torch.einsum("bhij,bjhd,hdc->bic", weights, v, self.down)

    up, key, value = (parameter(6, 4, 4) for _ in range(3))
    return Net(forward, up=up, key=key, value=value, down=parameter(4, 4, 3))


@construct(sequences, {"up.weight": (6, 8), "up.bias": (8,), "down.weight": (8, 3)})
def conv1d_of_gpt2() -> Net:
    def layer(inputs: int, outputs: int) -> Net:
        def forward(self: Any, x: Tensor) -> Tensor:
            shape = (*x.size()[:-1], self.nf)
            return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(shape)

        return Net(forward, weight=parameter(inputs, outputs), bias=parameter(outputs), nf=outputs)

    return Net(lambda self, x: self.down(F.gelu(self.up(x))), up=layer(6, 16), down=layer(16, 3))


@construct(
    lambda n: (vectors(n), vectors(n)),
    {"a.weight": (8, 6), "b.weight": (4, 6), "both.weight": (8, 8, 4)},
)
def bilinear() -> Net:
    return Net(
        lambda self, x, y: self.head(torch.relu(self.both(torch.relu(self.a(x)), self.b(y)))),
        a=nn.Linear(6, 16),
        b=nn.Linear(6, 8),
        both=nn.Bilinear(16, 8, 16),
        head=nn.Linear(16, 3),
    )


@construct(tokens, {"embed.weight": (12, 8), "head.weight": (3, 8)})
def mean_of_embeddings() -> Net:
    return Net(
        lambda self, x: self.head(self.embed(x).mean(1)),
        embed=nn.Embedding(12, 16, padding_idx=0),
        head=nn.Linear(16, 3),
    )


@construct(tokens, {"embed.weight": (12, 8), "head.weight": (3, 8)})
def embedding_bag() -> Net:
    return Net(
        lambda self, x: self.head(self.embed(x)),
        embed=nn.EmbeddingBag(12, 16, mode="sum"),
        head=nn.Linear(16, 3),
    )


# --- forwards that are not plain ----------------------------------------------------------------


@construct(vectors, {"experts.0.0.weight": (8, 6), "experts.1.2.weight": (3, 8)})
def mixture_of_experts_with_a_dense_gate() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        outputs = torch.stack([expert(x) for expert in self.experts], -1)
        return (outputs * weights.unsqueeze(-2)).sum(-1)

    def expert() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))

    return Net(forward, gate=nn.Linear(6, 3), experts=nn.ModuleList(expert() for _ in range(3)))


@construct(vectors, {"experts.0.0.weight": (8, 6)})
def mixture_of_experts_with_a_sparse_gate() -> Net:  # Mixtral
    def forward(self: Any, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        result = torch.zeros(x.shape[0], self.out, dtype=x.dtype)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(chosen == number)
            result = result.index_add(0, row, expert(x[row]) * weights[row, slot, None])
        return result

    def expert() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))

    return Net(
        forward, gate=nn.Linear(6, 3), experts=nn.ModuleList(expert() for _ in range(3)), out=3
    )


@construct(vectors, {"up": (3, 6, 8), "down": (3, 8, 3)})
def experts_in_one_tensor() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        hidden = torch.bmm(x.expand(self.count, -1, -1), self.up).relu()
        weights = self.gate(x).softmax(-1).t().unsqueeze(-1)
        return (torch.bmm(hidden, self.down) * weights).sum(0)

    return Net(
        forward, up=parameter(3, 6, 16), down=parameter(3, 16, 3), gate=nn.Linear(6, 3), count=3
    )


@construct(
    lambda n: {"x": vectors(n), "ids": torch.randint(0, 12, (n,))},
    {"embed.weight": (12, 8), "head.weight": (3, 8)},
)
def keyword_inputs_of_several_kinds() -> Net:
    return Net(
        lambda self, x, ids: self.head(torch.relu(self.up(x)) + self.embed(ids)),
        up=nn.Linear(6, 16),
        embed=nn.Embedding(12, 16),
        head=nn.Linear(16, 3),
    )


@construct(vectors, {"up.weight": (8, 6)})
def outputs_in_a_dict() -> Net:
    def forward(self: Any, x: Tensor) -> dict[str, Any]:
        x = torch.relu(self.up(x))
        return {"logits": self.head(x), "aux": (self.other(x), None), "name": "net"}

    return Net(forward, up=nn.Linear(6, 16), head=nn.Linear(16, 3), other=nn.Linear(16, 2))


@construct(vectors, {"inner.weight": (8, 16)}, keeps={"up": "output"})
def hidden_state_among_the_outputs() -> Net:
    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.up(x))
        return x, self.head(torch.relu(self.inner(x)))

    return Net(forward, up=nn.Linear(6, 16), inner=nn.Linear(16, 16), head=nn.Linear(16, 3))


@construct(images, {"second.weight": (8, 16 * 36)}, keeps={"first": "written in the code"})
def size_of_a_view_written_in_the_code() -> Net:  # LeNet of the tutorials
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x)).view(-1, 16 * 36)
        return self.last(torch.relu(self.second(x)))

    return Net(forward, first=nn.Conv2d(3, 16, 3), second=nn.Linear(576, 16), last=nn.Linear(16, 4))


class Config(SimpleNamespace):
    """Sizes in an object that is no module."""


@construct(sequences, {"inner.weight": (8, 16)})
def sizes_from_a_config() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        x = torch.relu(self.up(x)).view(b, n, self.config.parts, self.config.width)
        return self.last(torch.relu(self.inner(x.sum(2))))

    return Net(
        forward,
        config=Config(parts=2, width=16),
        up=nn.Linear(6, 32),
        inner=nn.Linear(16, 16),
        last=nn.Linear(16, 3),
    )


@construct(vectors, {"up.weight": (8, 6), "twice.weight": (8, 8)})
def module_called_twice() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.up(x))
        return self.down(torch.relu(self.twice(torch.relu(self.twice(x)))))

    return Net(forward, up=nn.Linear(6, 16), twice=nn.Linear(16, 16), down=nn.Linear(16, 3))


@construct(vectors, {"up.weight": (8, 6), "inner.weight": (8, 8)})
def one_module_under_two_names() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.up(x))
        return self.down(torch.relu(self.again(torch.relu(self.inner(x)))))

    inner = nn.Linear(16, 16)
    return Net(forward, up=nn.Linear(6, 16), inner=inner, again=inner, down=nn.Linear(16, 3))


@construct(vectors, {"up.weight": (8, 6), "down.weight": (3, 8)})
def activation_checkpointing() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = checkpoint(lambda x: torch.relu(self.up(x)), x, use_reentrant=False)
        return self.down(x)

    return Net(forward, up=nn.Linear(6, 16), down=nn.Linear(16, 3))


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.5 * x)


@construct(vectors, {"up.weight": (8, 6), "down.weight": (3, 8)})
def scripted_activation() -> Net:
    act = torch.jit.script(quick_gelu)
    return Net(
        lambda self, x: self.down(act(self.up(x))), up=nn.Linear(6, 16), down=nn.Linear(16, 3)
    )


class Doubled(torch.autograd.Function):
    """An operation with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


@construct(vectors, {"up.weight": (8, 6), "down.weight": (3, 8)})
def autograd_function() -> Net:
    return Net(
        lambda self, x: self.down(torch.relu(Doubled.apply(self.up(x)))),
        up=nn.Linear(6, 16),
        down=nn.Linear(16, 3),
    )


@construct(vectors, {"up.weight": (8, 6), "down.weight": (3, 8)})
def control_flow_on_shapes_and_values() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        if x.dim() == 2 and x.shape[1] == self.inputs:
            x = self.up(x)
        assert x.shape[-1] == self.up.out_features
        if x.sum() > 1e9:
            x = -x
        return self.down(torch.relu(x))

    return Net(forward, up=nn.Linear(6, 16), down=nn.Linear(16, 3), inputs=6)


@construct(images, {"0.weight": (8, 3, 3, 3), "1.running_mean": (8,), "3.weight": (4, 8, 1, 1)})
def traced_by_fx() -> nn.Module:
    net = chain(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1))
    return torch.fx.symbolic_trace(net)


@construct(vectors, {"layers.0.weight": (8, 6), "weights.1": (3, 8)})
def containers_of_parameters_and_modules() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.layers["0"](x)) * self.weights[0]
        return F.linear(x, self.weights[1])

    return Net(
        forward,
        layers=nn.ModuleDict({"0": nn.Linear(6, 16)}),
        weights=nn.ParameterList([parameter(16), parameter(3, 16)]),
    )


@construct(vectors, {"up.weight": (8, 6), "down.weight": (3, 8)})
def writing_in_place() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.up(x)
        y = torch.zeros_like(x)
        y[:, :] = x
        y.mul_(2).clamp_(min=0)
        return self.down(y)

    return Net(forward, up=nn.Linear(6, 16), down=nn.Linear(16, 3))


@construct(vectors, {"inner.weight": (8, 16)}, keeps={"up": ""})
def writing_into_a_part() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.up(x).clone()
        x[:, :4] = 0
        return self.down(torch.relu(self.inner(torch.relu(x))))

    return Net(forward, up=nn.Linear(6, 16), inner=nn.Linear(16, 16), down=nn.Linear(16, 3))


@construct(vectors, {"inner.weight": (8, 16)}, keeps={"up": ""})
def softmax_over_channels() -> Net:
    return Net(
        lambda self, x: self.down(torch.relu(self.inner(self.up(x).softmax(-1)))),
        up=nn.Linear(6, 16),
        inner=nn.Linear(16, 16),
        down=nn.Linear(16, 3),
    )


@construct(vectors, {"inner.weight": (8, 16)}, keeps={"up": ""})
def sorting_channels() -> Net:
    return Net(
        lambda self, x: self.down(torch.relu(self.inner(self.up(x).sort(-1).values))),
        up=nn.Linear(6, 16),
        inner=nn.Linear(16, 16),
        down=nn.Linear(16, 3),
    )


@construct(vectors, {"inner.weight": (8, 16)}, keeps={"up": ""})
def running_sum_over_channels() -> Net:
    return Net(
        lambda self, x: self.down(torch.relu(self.inner(self.up(x).cumsum(-1)))),
        up=nn.Linear(6, 16),
        inner=nn.Linear(16, 16),
        down=nn.Linear(16, 3),
    )


@construct(vectors, {"inner.weight": (8, 16)}, keeps={"up": ""})
def rolling_channels() -> Net:
    return Net(
        lambda self, x: self.down(torch.relu(self.inner(self.up(x).roll(1, -1)))),
        up=nn.Linear(6, 16),
        inner=nn.Linear(16, 16),
        down=nn.Linear(16, 3),
    )


@construct(vectors, {"inner.weight": (8, 16)}, keeps={"up": ""})
def picking_channels_by_index() -> Net:
    return Net(
        lambda self, x: self.down(torch.relu(self.inner(self.up(x)[:, self.order]))),
        up=nn.Linear(6, 16),
        order=torch.randperm(16, generator=torch.Generator().manual_seed(1)),
        inner=nn.Linear(16, 16),
        down=nn.Linear(16, 3),
    )


@construct(sequences, {"inner.weight": (8, 16)}, keeps={"up": ""})
def fourier_transform_over_channels() -> Net:  # FNet
    return Net(
        lambda self, x: self.down(torch.relu(self.inner(torch.fft.fft2(self.up(x)).real))),
        up=nn.Linear(6, 16),
        inner=nn.Linear(16, 16),
        down=nn.Linear(16, 3),
    )


@construct(images, {"up.weight": (8, 3, 3, 3)})
def fourier_transform_over_space() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.fft.rfft2(self.up(x), norm="ortho")
        x = torch.fft.irfft2(x * self.filter[:, None, None], norm="ortho", s=(6, 6))
        return self.down(torch.relu(x))

    return Net(forward, up=nn.Conv2d(3, 16, 3), filter=parameter(16), down=nn.Conv2d(16, 4, 1))


@construct(sequences, {"up.weight": (8, 6), "down.weight": (3, 8)})
def shifted_along_time() -> Net:  # RWKV's token shift
    def forward(self: Any, x: Tensor) -> Tensor:
        before = self.shift(x)
        x = self.up(x * self.mix + before * (1 - self.mix))
        return self.down(torch.relu(x).roll(1, 1).square())

    return Net(
        forward,
        shift=nn.ZeroPad2d((0, 0, 1, -1)),
        mix=parameter(6),
        up=nn.Linear(6, 16),
        down=nn.Linear(16, 3),
    )


@construct(lambda n: (vectors(n), vectors(n)), {"up.weight": (8, 6)}, plain=True)
def cosine_similarity_of_two_towers() -> Net:
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        x, y = self.up(x), self.up(y)
        if _PLAIN["norms"]:
            return (x * y).sum(-1)
        return F.cosine_similarity(x, y, dim=-1)

    return Net(forward, up=nn.Linear(6, 16))


@construct(lambda n: (vectors(n), vectors(n)), {"a.weight": (8, 6), "b.weight": (8, 6)}, plain=True)
def contrastive_logits_of_two_towers() -> Net:  # CLIP
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        x, y = self.a(x), self.b(y)
        if not _PLAIN["norms"]:
            x, y = x / x.norm(dim=-1, keepdim=True), y / y.norm(dim=-1, keepdim=True)
        return self.scale.exp() * x @ y.t()

    return Net(forward, a=nn.Linear(6, 16), b=nn.Linear(6, 16), scale=parameter(1))


@construct(vectors, {"inner.weight": (8, 16)}, keeps={"up": ""})
def vectorized_map() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.vmap(lambda row: torch.relu(self.up(row)))(x)
        return self.down(torch.relu(self.inner(x)))

    return Net(
        forward,
        up=nn.Linear(6, 16),
        inner=nn.Linear(16, 16),
        down=nn.Linear(16, 3),
    )


@construct(
    lambda n: torch.randn(n, 2, 3, 8, 8),
    {"stem.weight": (8, 3, 3, 3), "time.weight_ih_l0": (32, 8)},
)
def frames_folded_into_the_batch() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        b, t = x.shape[:2]
        x = torch.relu(self.stem(x.flatten(0, 1))).mean((2, 3))
        return self.head(self.time(x.view(b, t, -1))[0][:, -1])

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        time=nn.LSTM(16, 16, batch_first=True),
        head=nn.Linear(16, 4),
    )


# --- blocks of well-known networks ----------------------------------------------------------------


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


@construct(
    images,
    {"stem.weight": (8, 3, 3, 3), "parts.weight": (16, 4, 3, 3), "narrow.weight": (4, 8, 1, 1)},
)
def split_attention() -> Net:  # ResNeSt, radix 2
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.parts(torch.relu(self.stem(x))))
        b, c, h, w = x.shape
        x = x.view(b, self.radix, c // self.radix, h, w)
        gate = self.wide(torch.relu(self.narrow(x.sum(1).mean((2, 3), keepdim=True))))
        gate = gate.view(b, 1, self.radix, -1).transpose(1, 2).softmax(1).reshape(b, -1, 1, 1)
        x = (x * gate.view(b, self.radix, c // self.radix, 1, 1)).sum(1)
        return self.last(x)

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        parts=nn.Conv2d(16, 32, 3, padding=1, groups=2),
        narrow=nn.Conv2d(16, 8, 1),
        wide=nn.Conv2d(8, 32, 1),
        last=nn.Conv2d(16, 4, 1),
        radix=2,
    )


@construct(
    images, {"stem.weight": (8, 3, 3, 3), "theta.weight": (4, 8, 1, 1), "out.weight": (8, 4, 1, 1)}
)
def non_local_block() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, _, h, w = x.shape
        theta, phi, g = (m(x).view(b, self.inner, -1) for m in (self.theta, self.phi, self.g))
        y = (theta.transpose(1, 2) @ phi).softmax(-1) @ g.transpose(1, 2)
        return self.last(x + self.out(y.transpose(1, 2).contiguous().view(b, self.inner, h, w)))

    theta, phi, g = (nn.Conv2d(16, 8, 1) for _ in range(3))
    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        theta=theta,
        phi=phi,
        g=g,
        out=nn.Conv2d(8, 16, 1),
        last=nn.Conv2d(16, 4, 1),
        inner=8,
    )


@construct(images, {"stem.weight": (8, 3, 3, 3), "narrow.weight": (4, 8, 1, 1)}, plain=True)
def global_context_block() -> Net:  # GCNet
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, h, w = x.shape
        mask = self.mask(x).view(b, 1, h * w).softmax(2).unsqueeze(-1)
        context = torch.matmul(x.view(b, c, h * w).unsqueeze(1), mask).view(b, c, 1, 1)
        return self.last(x + self.wide(torch.relu(self.norm(self.narrow(context)))))

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        mask=nn.Conv2d(16, 1, 1),
        narrow=nn.Conv2d(16, 8, 1),
        norm=nn.LayerNorm([8, 1, 1]),
        wide=nn.Conv2d(8, 16, 1),
        last=nn.Conv2d(16, 4, 1),
    )


@construct(
    images,
    {"stem.weight": (8, 3, 3, 3), "branches.0.weight": (4, 8, 1, 1), "last.weight": (4, 12, 1, 1)},
)
def pyramid_pooling() -> Net:  # DeepLab's ASPP
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        found = [torch.relu(branch(x)) for branch in self.branches]
        pooled = self.pool(F.adaptive_avg_pool2d(x, 1))
        size = x.shape[-2:]
        pooled = F.interpolate(pooled, size=size, mode="bilinear", align_corners=False)
        return self.last(torch.cat([*found, pooled], 1))

    branches = nn.ModuleList([nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 3, padding=2, dilation=2)])
    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        branches=branches,
        pool=nn.Conv2d(16, 8, 1),
        last=nn.Conv2d(24, 4, 1),
    )


@construct(
    lambda n: (images(n), vectors(n)),
    {"stem.weight": (8, 3, 3, 3), "weight": (1, 4, 8, 3, 3), "style.weight": (8, 6)},
    plain=True,
)
def modulated_convolution() -> Net:  # StyleGAN 2
    def forward(self: Any, x: Tensor, style: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        b, c, h, w = x.shape
        weight = self.weight * self.style(style).view(b, 1, c, 1, 1)
        if not _PLAIN["norms"]:
            weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        weight = weight.view(b * 4, c, 3, 3)
        x = F.conv2d(x.reshape(1, b * c, h, w), weight, padding=1, groups=b)
        return x.view(b, 4, h, w)

    return Net(
        forward, stem=nn.Conv2d(3, 16, 3), style=nn.Linear(6, 16), weight=parameter(1, 4, 16, 3, 3)
    )


@construct(vectors, {"encode.weight": (8, 6), "both.weight": (8, 8), "decode.weight": (8, 4)})
def variational_autoencoder() -> Net:
    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.both(torch.relu(self.encode(x))).chunk(2, -1)
        noise = torch.randn_like(mean) if self.training else 0.0
        x = mean + noise * torch.exp(0.5 * logvar)
        kl = (mean.square() + logvar.exp() - logvar).sum(-1)
        return self.last(torch.relu(self.decode(x))), kl if not self.exact else kl * 0

    return Net(
        forward,
        encode=nn.Linear(6, 16),
        both=nn.Linear(16, 16),
        decode=nn.Linear(8, 16),
        last=nn.Linear(16, 6),
        exact=True,
    )


@construct(
    lambda n: (torch.randn(n, 6), torch.randint(0, n, (2, 9))),
    {"up.weight": (8, 6), "message.weight": (8, 16)},
)
def message_passing_on_a_graph() -> Net:
    def forward(self: Any, x: Tensor, edges: Tensor) -> Tensor:
        x = torch.relu(self.up(x))
        source, target = edges
        messages = torch.relu(self.message(torch.cat([x[source], x[target]], -1)))
        total = torch.zeros_like(x).index_add_(0, target, messages)
        return self.head(x + total)

    return Net(forward, up=nn.Linear(6, 16), message=nn.Linear(32, 16), head=nn.Linear(16, 3))


@construct(
    lambda n: (torch.randn(n, 6), torch.randint(0, n, (9,))),
    {"up.weight": (8, 6), "head.weight": (3, 8)},
)
def scattered_sums() -> Net:
    def forward(self: Any, x: Tensor, target: Tensor) -> Tensor:
        x = torch.relu(self.up(x))
        rows = x[target % x.shape[0]]
        index = target.unsqueeze(-1).expand_as(rows)
        return self.head(torch.zeros_like(x).scatter_add(0, index, rows))

    return Net(forward, up=nn.Linear(6, 16), head=nn.Linear(16, 3))


@construct(
    lambda n: torch.randn(n, 3, 10),
    {"first.weight": (8, 3, 1), "second.weight": (8, 8, 1), "head.weight": (4, 8)},
)
def max_over_points() -> Net:  # PointNet
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.head(torch.relu(self.second(x)).max(-1)[0])

    return Net(
        forward, first=nn.Conv1d(3, 16, 1), second=nn.Conv1d(16, 16, 1), head=nn.Linear(16, 4)
    )


@construct(tokens, {"embed.weight": (12, 8)})
def pairwise_products_of_embeddings() -> Net:  # DLRM
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.embed(x)
        products = torch.bmm(x, x.transpose(1, 2))
        rows, columns = torch.tril_indices(5, 5, offset=-1)
        return self.head(torch.relu(products[:, rows, columns]))

    return Net(forward, embed=nn.Embedding(12, 16), head=nn.Linear(10, 3))


@construct(images, {"stem.weight": (8, 3, 3, 3), "shift.weight": (8, 16)}, plain=True)
def diffusion_block_with_a_time_embedding() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        steps = torch.arange(x.shape[0], dtype=x.dtype)[:, None] * self.rates
        time = torch.cat([steps.sin(), steps.cos()], -1)
        y = self.one(F.silu(self.norm(x))) + self.shift(time)[:, :, None, None]
        return self.last(x + self.two(F.silu(y)))

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        norm=nn.GroupNorm(4, 16),
        one=nn.Conv2d(16, 16, 3, padding=1),
        two=nn.Conv2d(16, 16, 3, padding=1),
        shift=nn.Linear(16, 16),
        rates=torch.rand(8),
        last=nn.Conv2d(16, 4, 1),
    )


@construct(sequences, {"up.weight": (16, 6, 1), "deep.weight": (8, 1, 3), "norm.weight": (8,)})
def conformer_convolution() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.glu(self.up(x.transpose(1, 2)), dim=1)
        return self.down(F.silu(self.norm(self.deep(x)))).transpose(1, 2)

    return Net(
        forward,
        up=nn.Conv1d(6, 32, 1),
        deep=nn.Conv1d(16, 16, 3, padding=1, groups=16),
        norm=nn.BatchNorm1d(16),
        down=nn.Conv1d(16, 3, 1),
    )


@construct(sequences, {"embed.weight": (8, 6), "query": (3, 8)})
def learned_queries() -> Net:  # Perceiver, DETR
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.tanh(self.embed(x))
        scores = self.query @ self.key(x).transpose(1, 2)
        return self.head(scores.softmax(-1) @ x)

    return Net(
        forward,
        embed=nn.Linear(6, 16),
        key=nn.Linear(16, 16),
        query=parameter(3, 16),
        head=nn.Linear(16, 3),
    )


@construct(
    sequences,
    {"inputs.weight": (16, 6), "steps.weight": (8, 2), "rates": (8, 2), "out.weight": (3, 8)},
)
def selective_scan() -> Net:  # Mamba
    def forward(self: Any, x: Tensor) -> Tensor:
        x, gate = self.inputs(x).chunk(2, -1)
        x = F.silu(x)
        narrow = self.narrow(x)
        step, b, c = torch.split(narrow, [self.rank, self.states, self.states], -1)
        step = F.softplus(self.steps(step))
        decay = torch.exp(step.unsqueeze(-1) * -torch.exp(self.rates))
        drive = (step * x).unsqueeze(-1) * b.unsqueeze(2)
        state, found = torch.zeros_like(drive[:, 0]), []
        for time in range(x.shape[1]):
            state = decay[:, time] * state + drive[:, time]
            found.append((state * c[:, time, None]).sum(-1))
        return self.out((torch.stack(found, 1) + x * self.skip) * F.silu(gate))

    return Net(
        forward,
        inputs=nn.Linear(6, 32),
        narrow=nn.Linear(16, 12, bias=False),
        steps=nn.Linear(4, 16),
        rates=parameter(16, 4),
        skip=parameter(16),
        out=nn.Linear(16, 3),
        rank=4,
        states=4,
    )


@construct(sequences, {"key.weight": (8, 6), "receptance.weight": (8, 6), "value.weight": (8, 6)})
def time_mixing() -> Net:  # RWKV
    def forward(self: Any, x: Tensor) -> Tensor:
        key, value = torch.exp(torch.tanh(self.key(x))), self.value(x)
        top, bottom, found = torch.zeros_like(value[:, 0]), torch.zeros_like(value[:, 0]), []
        for t in range(x.shape[1]):
            top = torch.exp(-self.decay.abs()) * top + key[:, t] * value[:, t]
            bottom = torch.exp(-self.decay.abs()) * bottom + key[:, t]
            found.append(top / bottom)
        return self.out(torch.sigmoid(self.receptance(x)) * torch.stack(found, 1))

    key, value, receptance = (nn.Linear(6, 16) for _ in range(3))
    return Net(
        forward,
        key=key,
        value=value,
        receptance=receptance,
        decay=parameter(16),
        out=nn.Linear(16, 3),
    )


@construct(sequences, {"up.weight": (8, 6), "filter": (8, 5), "down.weight": (3, 8)})
def long_convolution_by_fourier_transform() -> Net:  # Hyena
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.up(x).transpose(1, 2)
        n = x.shape[-1]
        spectrum = torch.fft.rfft(x, n=2 * n) * torch.fft.rfft(self.filter, n=2 * n)
        x = torch.fft.irfft(spectrum, n=2 * n)[..., :n]
        return self.down(torch.relu(x.transpose(1, 2)))

    return Net(forward, up=nn.Linear(6, 16), filter=parameter(16, 5), down=nn.Linear(16, 3))


@construct(vectors, {"gate.weight": (8, 8), "plain.weight": (8, 8), "up.weight": (8, 6)})
def highway() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.up(x)
        gate = torch.sigmoid(self.gate(x))
        return self.head(gate * torch.relu(self.plain(x)) + (1 - gate) * x)

    return Net(
        forward,
        up=nn.Linear(6, 16),
        gate=nn.Linear(16, 16),
        plain=nn.Linear(16, 16),
        head=nn.Linear(16, 3),
    )


@construct(
    signals, {"first.weight": (8, 3, 1), "filter.weight": (16, 8, 2), "skip.weight": (4, 8, 1)}
)
def gated_dilated_convolutions_with_skips() -> Net:  # WaveNet
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.first(x)
        a, b = self.filter(F.pad(x, (2, 0))).chunk(2, 1)
        y = torch.tanh(a) * torch.sigmoid(b)
        return self.skip(y) + self.last(x + self.through(y))

    return Net(
        forward,
        first=nn.Conv1d(3, 16, 1),
        filter=nn.Conv1d(16, 32, 2, dilation=2),
        through=nn.Conv1d(16, 16, 1),
        skip=nn.Conv1d(16, 4, 1),
        last=nn.Conv1d(16, 4, 1),
    )


@construct(vectors, {"up.weight": (8, 6), "codes": (7, 8), "down.weight": (3, 8)}, trains=True)
def vector_quantization() -> Net:  # distances to a table of codes; the nearest ones come out
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.up(x)
        far = x.square().sum(-1, keepdim=True) - 2 * x @ self.codes.t()
        nearest = (far + self.codes.square().sum(-1)).argmin(-1)
        code = F.embedding(nearest, self.codes)
        return self.down(torch.relu(x + (code - x).detach()))

    return Net(forward, up=nn.Linear(6, 16), codes=parameter(7, 16), down=nn.Linear(16, 3))


@construct(images, {"stem.weight": (8, 3, 3, 3), "last.weight": (4, 8, 1, 1)}, keeps={})
def interpolation_pooling_and_padding() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.pad(torch.relu(self.stem(x)), (1, 1, 1, 1), mode="reflect")
        x = F.max_pool2d(F.avg_pool2d(x, 2), 2, 1) + F.adaptive_max_pool2d(x, 3)
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        grid = F.affine_grid(self.theta.expand(x.shape[0], 2, 3), [x.shape[0], 1, 4, 4], False)
        return self.last(F.grid_sample(x, grid, align_corners=False))

    return Net(
        forward, stem=nn.Conv2d(3, 16, 3), theta=torch.eye(2, 3)[None], last=nn.Conv2d(16, 4, 1)
    )


@construct(
    lambda n: ({"x": vectors(n), "more": [vectors(n), None]}, 3),
    {"up.weight": (8, 6), "head.weight": (3, 8)},
)
def nested_inputs() -> Net:
    def forward(self: Any, inputs: dict[str, Any], times: int) -> Tensor:
        x = self.up(inputs["x"]) + self.up(inputs["more"][0])
        for _ in range(times):
            x = torch.tanh(x)
        return self.head(x)

    return Net(forward, up=nn.Linear(6, 16), head=nn.Linear(16, 3))


@construct(lambda n: torch.rand(n, 6) > 0.5, {"up.weight": (8, 6)})
def boolean_inputs() -> Net:
    return Net(
        lambda self, x: self.head(torch.relu(self.up(x.to(self.up.weight.dtype)))),
        up=nn.Linear(6, 16),
        head=nn.Linear(16, 3),
    )


@construct(vectors, {"0.weight": (8, 6), "4.weight": (8, 8), "6.weight": (3, 8)})
def activations_dropout_and_identity() -> nn.Module:
    return chain(
        nn.Linear(6, 16),
        nn.Hardswish(),
        nn.Dropout(0.5),
        nn.Identity(),
        nn.Linear(16, 16),
        nn.Mish(),
        nn.Linear(16, 3),
    )


@construct(images, {"net.0.weight": (8, 3, 3, 3), "net.2.weight": (4, 8, 1, 1)})
def channels_last_inside() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.net(x.contiguous(memory_format=torch.channels_last)).flatten(1)

    return Net(forward, net=chain(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1)))


@construct(sequences, {"layer.weight_ih_l0": (32, 6), "head.weight": (3, 8)})
def packed_sequences() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        lengths = torch.tensor([5, 4, 3, 2, 2, 1, 1, 1])[: x.shape[0]]
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        output, _ = nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True)
        return self.head(output)

    return Net(forward, layer=nn.LSTM(6, 16, batch_first=True), head=nn.Linear(16, 3))


@construct(sequences, {"last.weight": (8, 16)}, keeps={"layer": "output"})
def recurrent_state_among_the_outputs() -> Net:
    def forward(self: Any, x: Tensor) -> Any:
        output, state = self.layer(x)
        return self.head(torch.relu(self.last(output))), state

    return Net(
        forward,
        layer=nn.GRU(6, 16, batch_first=True),
        last=nn.Linear(16, 16),
        head=nn.Linear(16, 3),
    )


@construct(
    sequences, {"layer.weight_ih_l0": (32, 6), "query.weight": (8, 8), "head.weight": (3, 16)}
)
def attention_over_recurrent_states() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        states, (last, _) = self.layer(x)
        scores = torch.bmm(states, self.query(last[-1]).unsqueeze(2)).squeeze(2)
        context = torch.bmm(scores.softmax(-1).unsqueeze(1), states).squeeze(1)
        return self.head(torch.cat([context, last[-1]], -1))

    return Net(
        forward,
        layer=nn.LSTM(6, 16, batch_first=True),
        query=nn.Linear(16, 16),
        head=nn.Linear(32, 3),
    )


# --- traps ------------------------------------------------------------------------------------


@construct(sequences, SEPARATE)
def heads_from_attributes_that_depend_on_each_other() -> Net:  # BERT as it was for years
    def forward(self: Any, x: Tensor) -> Tensor:
        def split(t: Tensor) -> Tensor:
            return t.view(*t.size()[:-1], self.heads, self.head_dim).permute(0, 2, 1, 3)

        scores = split(self.q(x)) @ split(self.k(x)).transpose(-1, -2) / math.sqrt(self.head_dim)
        x = (scores.softmax(-1) @ split(self.v(x))).permute(0, 2, 1, 3).contiguous()
        return self.proj(x.view(*x.size()[:-2], self.all_head_size))

    return separate(forward, all_head_size=16)


@construct(vectors, {"inner.weight": (8, 16)}, keeps={"up": "written in the code"})
def sizes_in_a_dict() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.up(x).view(-1, self.sizes["parts"], self.sizes["width"]).amax(1)
        return self.down(torch.relu(self.inner(torch.relu(x))))

    return Net(
        forward,
        sizes={"parts": 2, "width": 16},
        up=nn.Linear(6, 32),
        inner=nn.Linear(16, 16),
        down=nn.Linear(16, 3),
    )


@construct(vectors, {"inner.weight": (8, 16)}, keeps={"up": ""})
def sum_divided_by_the_width() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.up(x)
        x = x - x.sum(-1, keepdim=True) / x.shape[-1]
        return self.down(torch.relu(self.inner(torch.relu(x))))

    return Net(forward, up=nn.Linear(6, 16), inner=nn.Linear(16, 16), down=nn.Linear(16, 3))


@construct(
    images, {"stem.weight": (8, 3, 3, 3), "last.weight": (4, 8, 1, 1), "kernel": (8, 1, 3, 3)}
)
def blur_with_a_kernel_per_channel() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = F.conv2d(F.pad(x, (1, 1, 1, 1)), self.kernel, stride=2, groups=x.shape[1])
        return self.last(x)

    ramp = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = torch.outer(ramp, ramp).repeat(16, 1, 1, 1)
    return Net(forward, stem=nn.Conv2d(3, 16, 3), kernel=kernel, last=nn.Conv2d(16, 4, 1))


@construct(
    images, {"stem.weight": (8, 3, 3, 3), "last.weight": (4, 8, 1, 1), "kernel": (1, 1, 3, 3)}
)
def blur_with_one_expanded_kernel() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        kernel = self.kernel.expand(x.shape[1], -1, -1, -1)
        return self.last(F.conv2d(x, kernel, groups=x.shape[1]))

    ramp = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = torch.outer(ramp, ramp)[None, None]
    return Net(forward, stem=nn.Conv2d(3, 16, 3), kernel=kernel, last=nn.Conv2d(16, 4, 1))


@construct(images, {"up.weight": (8, 3, 3, 3), "norm.weight": (8, 6, 6)}, plain=True)
def layer_norm_over_whole_images() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.norm(self.up(x))))

    return Net(
        forward, up=nn.Conv2d(3, 16, 3), norm=nn.LayerNorm([16, 6, 6]), down=nn.Conv2d(16, 4, 1)
    )


@construct(images, {"0.weight": (8, 3, 3, 3), "2.weight": (8 * 36,), "3.weight": (4, 8 * 36)})
def batch_norm_of_flattened_images() -> nn.Module:
    return chain(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.BatchNorm1d(16 * 36), nn.Linear(16 * 36, 4))


@construct(vectors, {"0.weight": (16, 6), "2.weight": (4, 4, 3), "4.weight": (4, 4, 2)})
def unflatten_module() -> nn.Module:
    return chain(
        nn.Linear(6, 32),
        nn.Unflatten(1, (8, 4)),
        nn.Conv1d(8, 8, 3),
        nn.ReLU(inplace=True),
        nn.Conv1d(8, 4, 2),
    )


@construct(images, {"0.weight": (8, 3, 3, 3), "2.weight": (8, 8, 3, 3)})
def padding_by_mode_and_name() -> nn.Module:
    return chain(
        nn.Conv2d(3, 16, 3, padding=1, padding_mode="circular"),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 16, 3, padding="same"),
        nn.ReLU(),
        nn.Conv2d(16, 4, 1),
    )


@construct(images, {"down.weight": (8, 3, 3, 3), "up.weight": (8, 8, 3, 3)})
def unpooling() -> Net:  # SegNet
    def forward(self: Any, x: Tensor) -> Tensor:
        x, places = F.max_pool2d(self.down(x), 2, return_indices=True)
        return self.last(torch.relu(self.up(F.max_unpool2d(x, places, 2))))

    return Net(
        forward,
        down=nn.Conv2d(3, 16, 3, padding=1),
        up=nn.Conv2d(16, 16, 3, padding=1),
        last=nn.Conv2d(16, 4, 1),
    )


@construct(vectors, {"up.weight": (8, 6), "weight": (8, 3)})
def tensor_product_with_raw_parameters() -> Net:
    return Net(
        lambda self, x: torch.tensordot(torch.relu(self.up(x)), self.weight, dims=([1], [0])),
        up=nn.Linear(6, 16),
        weight=parameter(16, 3),
    )


@construct(vectors, {"up.weight": (8, 6), "direction": (8,)})
def product_with_a_vector() -> Net:
    return Net(
        lambda self, x: torch.relu(self.up(x)) @ self.direction,
        up=nn.Linear(6, 16),
        direction=parameter(16),
    )


@construct(vectors, {"up.weight": (8, 6), "inner.weight": (8, 8), "centres": (7, 8)})
def distances_to_centres() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.inner(torch.relu(self.up(x)))
        return torch.exp(-torch.cdist(x, self.centres).square())

    return Net(
        forward,
        up=nn.Linear(6, 16),
        inner=nn.Linear(16, 16),
        centres=parameter(7, 16),
    )


@construct(vectors, {"up.weight": (8, 6), "down.weight": (3, 8)})
def one_sided_operations() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.up(x)
        x = torch.maximum(x, torch.tanh(x)) + torch.lerp(x, x.square(), 0.3).clamp(-2, 2)
        x = torch.where(x > 0, x, x * self.slope) + torch.addcmul(x, x, self.slope)
        return self.down(torch.nan_to_num(x.masked_fill(x > 5, 0.0)))

    return Net(forward, up=nn.Linear(6, 16), slope=parameter(16), down=nn.Linear(16, 3))


@construct(vectors, {"up.weight": (8, 6), "down.weight": (3, 4)})
def in_place_on_pieces() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        a, b = self.up(x).clone().tensor_split(2, 1)
        return self.down(a.mul_(2).relu_() + b.sigmoid())

    return Net(forward, up=nn.Linear(6, 16), down=nn.Linear(8, 3))


@construct(vectors, {"up.weight": (8, 6), "down.weight": (3, 8)})
def rows_chosen_by_a_mask() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        keep = x.sum(1) > -100
        y = torch.relu(self.up(x))
        return self.down(y[keep] + y[torch.arange(len(y))])

    return Net(forward, up=nn.Linear(6, 16), down=nn.Linear(16, 3))


@construct(
    vectors, {"student.0.weight": (8, 6), "student.2.weight": (4, 8)}, keeps={"teacher.0": "frozen"}
)
def frozen_teacher_beside_a_student() -> Net:
    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            goal = self.teacher(x)
        return self.student(x), goal

    def branch() -> nn.Module:
        return chain(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))

    return Net(forward, student=branch(), teacher=branch().requires_grad_(False))


@construct(vectors, {"net.0.weight": (8, 3), "net.2.weight": (6, 8)})
def coupling_layer() -> Net:  # RealNVP
    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, 1)
        scale, shift = self.net(a).chunk(2, 1)
        return torch.cat([a, b * torch.exp(torch.tanh(scale)) + shift], 1), scale.sum(1)

    return Net(forward, net=chain(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 6)))


@construct(vectors, {"up.weight": (8, 6)}, keeps={"mix": ""})
def determinant_of_a_weight() -> Net:  # Glow
    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        size = torch.linalg.slogdet(self.mix.weight)[1]
        return self.down(torch.relu(self.up(torch.relu(self.mix(x))))), size

    return Net(forward, mix=nn.Linear(6, 6), up=nn.Linear(6, 16), down=nn.Linear(16, 3))


@construct(vectors, {"inner.weight": (8, 16)}, keeps={"up": ""})
def penalty_of_a_weight_among_the_outputs() -> Net:
    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.down(torch.relu(self.inner(torch.relu(self.up(x)))))
        return y, self.up.weight @ self.up.weight.t()

    return Net(forward, up=nn.Linear(6, 16), inner=nn.Linear(16, 16), down=nn.Linear(16, 3))


@construct(sequences, {"embed.weight": (9, 6)})  # 7 of the 15 that may go
def first_channel_read_apart() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(torch.relu(x)) + x[..., -1:].tanh()

    return Net(forward, embed=nn.Linear(6, 16), head=nn.Linear(16, 3))


@construct(
    images,
    {"stem.weight": (8, 3, 3, 3), "branch.0.weight": (4, 8, 1, 1), "short.weight": (8, 8, 1, 1)},
)
def bottleneck_with_a_projected_shortcut() -> Net:  # ResNet-50
    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.relu_(self.stem(x))
        x = F.relu_(self.branch(x) + self.short(x))
        return self.head(self.pool(x).flatten(1))

    branch = chain(
        nn.Conv2d(16, 8, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 1, bias=False),
        nn.BatchNorm2d(16),
    )
    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        branch=branch,
        short=nn.Conv2d(16, 16, 1, bias=False),
        pool=nn.AdaptiveAvgPool2d(1),
        head=nn.Linear(16, 4),
    )


@construct(
    images,
    {"stem.weight": (8, 3, 3, 3), "parts.0.weight": (4, 8, 1, 1), "last.weight": (4, 16, 1, 1)},
)
def inception_branches() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        found = [part(x) for part in self.parts] + [F.max_pool2d(x, 3, 1, 1)]
        return self.last(torch.relu(torch.cat(found, dim=1)))

    parts = nn.ModuleList([nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 3, padding=1)])
    return Net(forward, stem=nn.Conv2d(3, 16, 3), parts=parts, last=nn.Conv2d(32, 4, 1))


@construct(images, {"stem.weight": (8, 3, 3, 3)})
def group_norm_then_grouped_convolution() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        return self.last(torch.relu(self.grouped(torch.relu(x))))

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        norm=nn.GroupNorm(8, 16),
        grouped=nn.Conv2d(16, 32, 1, groups=8),
        last=nn.Conv2d(32, 4, 1),
    )


@construct(sequences, {"layer.weight_ih_l0": (24, 6), "mix.weight": (8, 8)})
def recurrent_layer_on_a_residual_path() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.layer(x)[0]
        return self.head(x + torch.tanh(self.mix(x)))

    return Net(
        forward,
        layer=nn.GRU(6, 16, batch_first=True, bias=False),
        mix=nn.Linear(16, 16),
        head=nn.Linear(16, 3),
    )


@construct(
    sequences,
    {"layer.weight_ih_l0": (32, 8), "layer.weight_ih_l1_reverse": (32, 16), "embed.weight": (8, 6)},
)
def deep_lstm_in_both_directions() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        output, (hidden, _) = self.layer(self.embed(x))
        return self.head(torch.cat([output[:, -1], hidden[-2], hidden[-1]], -1))

    return Net(
        forward,
        embed=nn.Linear(6, 16),
        layer=nn.LSTM(16, 16, 2, batch_first=True, bidirectional=True),
        head=nn.Linear(64, 3),
    )


@construct(
    lambda n: (tokens(n), tokens(n)),
    {"embed.weight": (12, 8), "encoder.weight_ih_l0": (24, 8), "decoder.weight_ih_l0": (24, 8)},
)
def encoder_state_starts_the_decoder() -> Net:  # sequence to sequence
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        _, state = self.encoder(self.embed(x))
        return self.head(self.decoder(self.embed(y), state)[0])

    return Net(
        forward,
        embed=nn.Embedding(12, 16),
        encoder=nn.GRU(16, 16, batch_first=True),
        decoder=nn.GRU(16, 16, batch_first=True),
        head=nn.Linear(16, 12),
    )


@construct(sequences, MHA)
def functional_attention_with_a_modules_weights() -> Net:
    def call(self: Any, x: Tensor) -> Tensor:
        x, a = x.transpose(0, 1), self.attention
        y, _ = F.multi_head_attention_forward(
            x,
            x,
            x,
            a.embed_dim,
            a.num_heads,
            a.in_proj_weight,
            a.in_proj_bias,
            None,
            None,
            False,
            0.0,
            a.out_proj.weight,
            a.out_proj.bias,
            need_weights=False,
        )
        return self.head((x + y).transpose(0, 1))

    return mha(call)


@construct(vectors, {"base.weight": (8, 6), "down.weight": (3, 8)})
def functional_call_of_a_module() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        shifted = {k: v * 1.5 for k, v in self.base.named_parameters()}
        return self.down(torch.relu(torch.func.functional_call(self.base, shifted, (x,))))

    return Net(forward, base=nn.Linear(6, 16), down=nn.Linear(16, 3))


@construct(
    lambda n: torch.randn(n, 4, 6), {"queries.weight": (8, 6), "up.weight": (8, 8)}, plain=False
)
def tokens_as_many_as_heads() -> Net:
    """Four tokens, four heads, heads four wide: sizes must be told apart by what they count."""

    def forward(self: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.queries(x).view(b, n, self.heads, self.width).transpose(1, 2)
        x = F.scaled_dot_product_attention(q, q, q, scale=0.5)
        x = x.transpose(1, 2).reshape(b, n, self.heads * self.width)
        return self.down(torch.relu(self.up(x)))

    return Net(
        forward,
        queries=nn.Linear(6, 16),
        up=nn.Linear(16, 16),
        down=nn.Linear(16, 3),
        heads=4,
        width=4,
    )


# --- the checks that every construct passes -----------------------------------------------------


def names(only: Callable[[Construct], bool] = lambda item: True) -> list[Any]:
    return [
        pytest.param(n, marks=pytest.mark.xfail(strict=True, reason=BROKEN[n]))
        if n in BROKEN
        else n
        for n, item in CONSTRUCTS.items()
        if only(item)
    ]


def made(name: str) -> nn.Module:
    """Build a net whose values are all different, norms and their statistics included, after one step."""
    item = CONSTRUCTS[name]
    net = item.build().double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    net.train(item.trains)
    with torch.no_grad():
        run(net, item.example(8))
    return net


def run(net: nn.Module, example: Any) -> list[Tensor]:
    call = as_call(tree_map(double, example))
    outputs = net(*call.args, **call.kwargs)
    return [t for t in tensors(outputs) if t.is_floating_point()]


def double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def copy_of(name: str, net: nn.Module) -> nn.Module:
    """Build the same net anew, and load its weights."""
    other = CONSTRUCTS[name].build().double()
    other.load_state_dict(net.state_dict())
    return other


def masked_twin(
    dense: nn.Module, small: nn.Module, scaled: Mapping[str, Any] | None = None
) -> None:
    """Zero, in the dense net, each element that the pruned one does not have, found by value.

    Tensors in `scaled` were multiplied by a number in the pruned one. A weight norm's weights are taken as they
    reach their layer.
    """
    for net in (dense, small):
        with_plain_weights(net)
    survivors = dict(small.named_parameters())
    for name, tensor in dense.named_parameters():
        values = tensor.detach() * (scaled or {}).get(name, 1.0)
        alive = torch.isin(values.float(), survivors[name].detach().float())
        assert alive.sum() == survivors[name].numel(), f"{name}: other values than before"
        tensor.data.mul_(alive)
    with_exact_norms(dense)


def with_exact_norms(net: nn.Module) -> None:
    """Divide what is under a spectral norm by its own norm, which iterations only come near to."""
    for module in net.modules():
        if hasattr(module, "weight_u"):
            raw = module.weight_orig.data
            torch.nn.utils.remove_spectral_norm(module)
        elif "SpectralNorm" in str(getattr(module, "parametrizations", "")):
            raw = module.parametrizations.weight.original.data
            parametrize.remove_parametrizations(module, "weight")
        else:
            continue
        module.weight.data = raw / torch.linalg.matrix_norm(raw.flatten(1), 2)


def with_plain_weights(net: nn.Module) -> None:
    for module in net.modules():
        if hasattr(module, "weight_g"):
            torch.nn.utils.remove_weight_norm(module)
        elif "WeightNorm" in str(getattr(module, "parametrizations", "")):
            parametrize.remove_parametrizations(module, "weight")


def assert_close(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def pruned(name: str, net: nn.Module) -> Receipt:
    item = CONSTRUCTS[name]
    return prune(net, example=item.example(3), **{"ratio": 0.5, **item.arguments})


@pytest.mark.parametrize("name", names())
def test_a_construct_is_pruned_as_its_masked_twin_and_goes_on(name: str) -> None:
    item, net = CONSTRUCTS[name], made(name)
    step(net, item.example(4), None)
    dense = copy_of(name, net)
    objects = dict(net.named_parameters(remove_duplicate=False))
    frozen = {n for n, p in objects.items() if not p.requires_grad}
    before = {n: p.detach().clone() for n, p in objects.items() if n in frozen}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.01, 0.9)
    receipt = pruned(name, net)

    # what was asked for came out, and what stayed says why
    shapes = {n: tuple(t.shape) for n, t in net.state_dict(keep_vars=True).items()}
    shapes |= {n: tuple(t.shape) for n, t in net.named_buffers()}
    assert {n: shapes[n] for n in item.shapes} == dict(item.shapes), receipt.skipped
    skipped = {change.name: change.what for change in receipt.skipped}
    for layer, reason in item.keeps.items():
        assert reason in skipped.get(layer, "nothing is said"), (layer, skipped)

    # flags, identity and frozen parts
    assert net.training == item.trains
    now = dict(net.named_parameters(remove_duplicate=False))
    assert all(now[n] is p for n, p in objects.items())
    assert {n for n, p in now.items() if not p.requires_grad} == frozen
    assert all(torch.equal(now[n], old) for n, old in before.items())

    # the same function as the masked dense net, at another batch size
    example = item.example(5)
    original = run(dense.eval(), example)
    masked_twin(dense, restored(name, net), item.scaled)
    with plain_norms(item.plain):
        small, wanted = run(net.eval(), example), run(dense, example)
    assert_close(small, wanted)
    assert [t.shape for t in run(net, example)] == [t.shape for t in original]

    # a fresh net takes its structure and weights
    fresh = restored(name, net)
    again = run(fresh.eval(), example)
    assert all(torch.equal(a, b) for a, b in zip(again, run(net, example), strict=True))

    # training goes on, in both modes and with the optimizer's memory
    follow(optimizer, receipt)
    net.train(item.trains)
    step(net, item.example(6), optimizer)
    step(net.eval(), item.example(1), optimizer)
    assert all(p.isfinite().all() and p.numel() for p in net.parameters())
    for parameter, state in optimizer.state.items():
        assert state["momentum_buffer"].shape == parameter.shape


def step(net: nn.Module, example: Any, optimizer: Any) -> None:
    net.zero_grad()
    sum(t.square().mean() for t in run(net, example) if t.requires_grad).backward()
    for parameter in net.parameters():
        assert parameter.grad is None or parameter.grad.shape == parameter.shape
    if optimizer is not None:
        optimizer.step()
    net.zero_grad()


def restored(name: str, net: nn.Module) -> nn.Module:
    """Send weights and structure through a file that may hold plain data only."""
    buffer = io.BytesIO()
    torch.save({"weights": net.state_dict(), "structure": Structure.of(net).to_dict()}, buffer)
    buffer.seek(0)
    stored = torch.load(buffer, weights_only=True)
    fresh = CONSTRUCTS[name].build().double()
    structure = Structure.from_dict(stored["structure"])
    structure.check(fresh)
    structure.apply(fresh)
    fresh.load_state_dict(stored["weights"])
    return fresh


@pytest.mark.slow
@pytest.mark.parametrize("name", names(lambda item: not item.scaled))
def test_a_pruned_construct_is_pruned_again_by_another_choice(name: str) -> None:
    item, net = CONSTRUCTS[name], made(name)
    pruned(name, net)
    dense, example = restored(name, net), item.example(5)
    original = run(dense.eval(), example)
    try:
        prune(net, example=item.example(3), ratio=0.4, importance="random", scope="global")
    except NoEffect:
        assert all(
            torch.equal(a, b) for a, b in zip(run(net.eval(), example), original, strict=True)
        )
        return
    assert sum(p.numel() for p in net.parameters()) < sum(p.numel() for p in dense.parameters())
    masked_twin(dense, restored(name, net))
    with plain_norms(item.plain):
        assert_close(run(net.eval(), example), run(dense, example))


# --- answers that are known beforehand -----------------------------------------------------------


def silence(net: nn.Module, places: Sequence[int], *tensors_and_dims: tuple[str, int]) -> None:
    """Set these places of the tensors to zero, so that nothing changes when they go."""
    state = dict(net.named_parameters())
    with torch.no_grad():
        for name, dim in tensors_and_dims:
            state[name].index_fill_(dim, torch.tensor(places), 0.0)


BLOCK = [(f"block.{m}.{leaf}", 0) for m in "qkv" for leaf in ("weight", "bias")]
BLOCK.append(("block.proj.weight", 1))
WIDTH = [(f"block.{m}.weight", 1) for m in "qkv"] + [("head.weight", 1)]
WIDTH += [
    (name, 0) for name in ("embed.weight", "embed.bias", "block.proj.weight", "block.proj.bias")
]


@pytest.mark.parametrize("attention", ["heads", "width"])
@pytest.mark.parametrize(
    "name",
    [
        "separate_qkv",
        "separate_qkv_minus_one_heads",
        "attention_with_batch_times_heads",
        "attention_with_a_boolean_mask",
        "attention_with_a_causal_buffer",
        "rotary_half",
        "relative_positions_from_an_embedding",
        "alibi_slopes_in_a_buffer",
    ],
)
def test_silent_heads_or_places_of_heads_go_and_the_function_stays(
    name: str, attention: str
) -> None:
    net, item = made(name).eval(), CONSTRUCTS[name]
    pairs = {"heads": [4, 5, 6, 7, 12, 13, 14, 15], "width": [1, 3, 5, 7, 9, 11, 13, 15]}
    silence(net, pairs[attention], *BLOCK)
    silence(net, range(3, 11), *WIDTH)
    example = item.example(5)
    before = run(net, example)
    prune(net, example=item.example(3), ratio=0.5, attention=attention)
    assert tuple(net.block.proj.weight.shape) == (8, 8)
    assert_close(run(net, example), before)


def test_silent_heads_of_torchs_own_attention_go() -> None:
    net = made("mha_batch_first").eval()
    dead = [4, 5, 6, 7, 12, 13, 14, 15]
    rows = dead + [16 + n for n in dead] + [32 + n for n in dead]
    silence(net, rows, ("attention.in_proj_weight", 0), ("attention.in_proj_bias", 0))
    silence(net, dead, ("attention.out_proj.weight", 1))
    wide = [("embed.weight", 0), ("embed.bias", 0), ("attention.in_proj_weight", 1)]
    wide += [("attention.out_proj.weight", 0), ("attention.out_proj.bias", 0), ("head.weight", 1)]
    silence(net, range(3, 11), *wide)
    example = sequences(5)
    before = run(net, example)
    prune(net, example=example, ratio=0.5)
    assert net.attention.num_heads == 2 and net.attention.embed_dim == 8
    assert_close(run(net, example), before)


@pytest.mark.parametrize("name", ["weight_norm", "old_weight_norm"])
def test_silent_channels_before_a_weight_norm_go_and_the_function_stays(name: str) -> None:
    net, item = made(name).eval(), CONSTRUCTS[name]
    gain = "weight_g" if name.startswith("old") else "parametrizations.weight.original0"
    silence(net, range(3, 11), (f"0.{gain}", 0), ("0.bias", 0))  # relu(0) = 0; the readers are loud
    example = item.example(5)
    before = run(net, example)
    loudness = torch.ones(16)
    loudness[3:11] = 0.0
    prune(net, example=example, ratio=0.5, importance=lambda model, group: loudness)
    assert net[0].bias.shape == (8,)
    assert_close(run(net, example), before)


def test_a_weight_norm_is_ranked_by_the_weight_that_works() -> None:
    net = made("weight_norm").eval()
    silence(net, range(3, 11), ("0.parametrizations.weight.original0", 0))
    x = tree_map(double, images(2))
    found = score(net, group_of(net, "0", x), "magnitude")
    plain = copy.deepcopy(net)  # of the same class, from which torch takes the parametrization
    for module in plain.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    assert_close(found, score(plain, group_of(plain, "0", x), "magnitude"))


def group_of(net: nn.Module, layer: str, example: Any) -> Any:
    groups = Graph(twin(net), (as_call(example),), select=Select()).groups
    return next(group for group in groups if layer in group.layers)


def test_silent_units_of_an_lstm_go_and_the_function_stays() -> None:
    net = made("lstm_of_two_layers").eval()
    dead = [0, 5, 6, 9, 10, 11, 14, 15]
    rows = [16 * gate + n for gate in range(4) for n in dead]
    for layer in ("l0", "l1"):
        leaves = [
            f"layer.{kind}_{side}_{layer}" for kind in ("weight", "bias") for side in ("ih", "hh")
        ]
        silence(net, rows, *((leaf, 0) for leaf in leaves))
        silence(net, dead, (f"layer.weight_hh_{layer}", 1))
    silence(net, dead, ("layer.weight_ih_l1", 1), ("head.weight", 1))
    example = sequences(5)
    before = run(net, example)
    prune(net, example=example, ratio=0.5)
    assert net.layer.hidden_size == 8
    assert_close(run(net, example), before)


def test_a_layer_norm_runs_over_what_is_left() -> None:
    """What is left must be normalized by its own statistics, computed here by hand."""
    net = made("layer_norm").eval()
    x = vectors(5).double()
    prune(net, example=x, ratio=0.5)
    hidden = net.up(x)
    assert hidden.shape == (5, 8)
    centred = hidden - hidden.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    by_hand = net.down(torch.relu(normed * net.norm.weight + net.norm.bias))
    assert_close([net(x)], [by_hand])


# --- what else must hold -----------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_fast_path_of_torchs_encoder_agrees_after_pruning(norm_first: bool) -> None:
    encoder = nn.TransformerEncoder(
        encoder_layer(norm_first=norm_first), 2, enable_nested_tensor=not norm_first
    )
    net = layers_of(encoder).eval()
    x = sequences(4)
    with torch.no_grad():
        net(x)  # the fast path has run before, too
    prune(net, example=x, ratio=0.5)
    assert encoder.layers[1].self_attn.num_heads == 2
    slow = net(x)
    with torch.no_grad():
        fast = net(x)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    hidden = net.embed(x).detach()
    padding = torch.zeros(4, 5, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.no_grad():  # nested tensors
        fast = encoder(hidden, src_key_padding_mask=padding)
    slow = encoder(hidden, src_key_padding_mask=padding)
    torch.testing.assert_close(fast[0], slow[0], rtol=1e-4, atol=1e-5)


def test_head_averaged_weights_keep_their_shape() -> None:
    net = mha(lambda self, x: self.attention(x, x, x)[1] @ self.head(x), batch_first=True)
    x = sequences(3)
    prune(net, example=x, ratio=0.5, attention="width")
    _, weights = net.attention(*[net.embed(x)] * 3)
    assert weights.shape == (3, 5, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 5))


@pytest.mark.parametrize(
    "name", ["tied_embedding_and_head", "two_layers_of_one_weight", "one_module_under_two_names"]
)
def test_ties_stay_tied(name: str) -> None:
    net = made(name)
    pairs = {
        "tied_embedding_and_head": ("embed.weight", "head.weight"),
        "two_layers_of_one_weight": ("2.weight", "4.weight"),
        "one_module_under_two_names": ("inner.weight", "again.weight"),
    }
    one, other = pairs[name]
    held = net.get_parameter(one)
    pruned(name, net)
    assert net.get_parameter(one) is net.get_parameter(other) is held
    assert restored(name, net).get_parameter(one).shape == held.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["separate_qkv", "residual", "lstm", "tied_embedding_and_head"])
def test_low_precision_models_are_pruned_in_their_dtype(name: str, dtype: torch.dtype) -> None:
    item = CONSTRUCTS[name]
    net = item.build().to(dtype)
    receipt = prune(net, example=item.example(3), ratio=0.5)
    assert receipt.moved
    assert {p.dtype for p in net.parameters()} == {dtype}
    state = {n: tuple(t.shape) for n, t in net.state_dict().items()}
    assert {n: state[n] for n in item.shapes} == dict(item.shapes)
    (call,) = [as_call(item.example(5))]
    args = [a.to(dtype) if a.is_floating_point() else a for a in call.args]
    net(*args).float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_an_autocast_region_inside_the_forward() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = torch.relu(self.up(x))
        return self.down(x.float())

    net = Net(forward, up=nn.Linear(6, 16), down=nn.Linear(16, 3))
    assert prune(net, example=vectors(3), ratio=0.5).moved
    assert net.up.weight.shape == (8, 6)
    net(vectors(5)).sum().backward()


@pytest.mark.parametrize(
    "name",
    [
        "fused_qkv_chunk",
        "swin_windows_with_relative_positions",
        "mha_time_first",
        "layer_norm",
        "gru",
        "unet",
        "c2f_of_yolov8",
        "grouped_convolution",
        "pixel_shuffle",
        "flatten_after_convolution",
    ],
)
def test_the_verb_proves_a_right_cut_and_finds_a_wrong_one(name: str) -> None:
    """Wrong: the same number of places, but not those whose makers went."""
    item, net = CONSTRUCTS[name], made(name).eval()
    example = tree_map(double, item.example(3))
    cut = plan(net, calls=(as_call(example),), ratio=0.5, **item.arguments)
    assert mask_equivalence(net, cut, example=example) < 1e-10
    found = []
    for tensor, kept in cut.kept.items():
        for dim, positions in enumerate(kept.dims):
            size = cut.before.tensors[tensor][dim]
            if positions is None or dim == 0 or tensor.endswith("table"):
                continue  # rows: another choice of channels to make would be as good, if read so
            others = torch.tensor(sorted(set(range(size)) - set(positions.tolist())))
            if len(others) < len(positions):
                continue
            dims = tuple(
                others[: len(positions)] if d == dim else p for d, p in enumerate(kept.dims)
            )
            wrong = dataclasses.replace(cut, kept={**cut.kept, tensor: kept._replace(dims=dims)})
            found.append(mask_equivalence(net, wrong, example=example))
    assert found and min(found) > 1e-4


@pytest.mark.parametrize(
    "name",
    [
        "separate_qkv",
        "residual",
        "unet",
        "c2f_of_yolov8",
        "class_token_position_and_layer_scale",
        "transformer_encoder_layer",  # one that nests may only keep an even number of heads
    ],
)
def test_a_target_of_arithmetic_is_met_as_torch_counts_it(name: str) -> None:
    item, net = CONSTRUCTS[name], made(name).eval()
    example = tree_map(double, item.example(2))

    def flops() -> int:
        return counted(net, example)

    dense = flops()
    prune(net, example=example, target=Macs(0.5))
    assert 0.4 <= flops() / dense <= 0.55


def counted(net: nn.Module, example: Any) -> int:
    """Return multiply-accumulates as torch counts them, attention included."""
    counter = FlopCounterMode(display=False)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        run(net, example)
    return counter.get_total_flops() // 2


UNCOUNTED = {"bilinear", "spectral_norm", "old_spectral_norm", "vectorized_map"}
UNCOUNTED |= {"product_with_a_vector", "distances_to_centres"}
"""Torch's counter lacks `_trilinear` and products of a matrix and a vector."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CONSTRUCTS if name not in BROKEN])
def test_arithmetic_and_parameters_are_foreseen_exactly(name: str) -> None:
    item, net = CONSTRUCTS[name], made(name).eval()
    example = tree_map(double, item.example(2))
    options = {"attention": "heads", **item.arguments}
    graph = Graph(twin(net), (as_call(example),), select=Select(), **options)
    for group in graph.groups:
        gone = {g.name: range(g.units // 2) for g in graph.groups if g.link == group.link}
        gone = gone if group.link is not None else {group.name: range(group.units // 2)}
        small = twin(net)
        try:
            graph.cut(gone).apply(small)
            after = counted(small, example)
        except (ValueError, RuntimeError):
            continue  # refused, or left alone by the proof
        assert graph.params(gone) == sum(p.numel() for p in small.parameters())
        if name not in UNCOUNTED:
            assert (graph.dense_macs, graph.macs(gone)) == (counted(net, example), after)


def frozen() -> nn.Module:
    return chain(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).requires_grad_(False)


@pytest.mark.parametrize(
    "build",
    [
        frozen,
        lambda: nn.Linear(6, 3),
        lambda: Net(lambda self, x: self.up(x).softmax(-1), up=nn.Linear(6, 16)),
        lambda: Net(lambda self, x: x * self.scale, scale=parameter(6)),
        lambda: nn.Sequential(nn.Linear(6, 1), nn.ReLU(), nn.Linear(1, 3)),
    ],
)
def test_a_net_without_anything_to_prune_is_an_error_and_stays(
    build: Callable[[], nn.Module],
) -> None:
    net = build()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(NoEffect):
        prune(net, example=vectors(3), ratio=0.5)
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True)
    )
