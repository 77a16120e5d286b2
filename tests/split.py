"""Modules for tensor parallelism: those of `sharded`, and others whose widths are hard to split."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from sharded import CASES as SHARDED
from sharded import GPT, LENGTH, VOCABULARY, Case, Manual
from torch import Tensor, nn


class Heads(nn.Module):
    """Attention whose heads are split: fused or apart, with groups of queries, norms per head, and dropout."""

    def __init__(
        self,
        d: int,
        heads: int,
        *,
        groups: int | None = None,
        normed: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads, self.groups, self.width, self.dropout = (
            heads,
            groups or heads,
            d // heads,
            dropout,
        )
        self.qkv = nn.Linear(d, (heads + 2 * self.groups) * self.width)
        self.o = nn.Linear(heads * self.width, d)
        self.norm = nn.LayerNorm(self.width) if normed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        sizes = [self.heads * self.width, self.groups * self.width, self.groups * self.width]
        parts = self.qkv(x).split(sizes, dim=-1)
        q, k, v = (p.unflatten(-1, (-1, self.width)).transpose(1, 2) for p in parts)
        q, k = self.norm(q), self.norm(k)
        k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (k, v))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return self.o(y.transpose(1, 2).flatten(2))


class ReadsWidth(nn.Module):
    """Attention as in nanoGPT: the width of the heads is that of the input."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.n_head, self.n_embd = heads, d
        self.c_attn, self.c_proj = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (p.view(b, t, self.n_head, c // self.n_head).transpose(1, 2) for p in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


class ReadsWidthFused(ReadsWidth):
    """Attention as in timm: queries, keys and values are a dimension, and the scale hangs on the width of a head."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.c_attn(x).reshape(b, n, 3, self.n_head, c // self.n_head).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = (q * (c // self.n_head) ** -0.5) @ k.transpose(-2, -1)
        y = (y.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c)
        return x + self.c_proj(y)


class Split(GPT):
    """The plain one with another attention, and another layer between the two of each MLP."""

    def __init__(self, attention: Any = None, between: Callable[[], nn.Module] = nn.GELU) -> None:
        super().__init__(depth=2)
        for block in self.blocks:
            block.att, block.mlp[1] = attention() if attention else Heads(8, 4), between()


class Closed(Split):
    """Zeros behind every branch: at the start no gradient reaches the norms of queries and keys."""

    def __init__(self) -> None:
        super().__init__(partial(Heads, 8, 4, normed=True))
        for block in self.blocks:
            nn.init.zeros_(block.att.o.weight)


class Gate(nn.Module):
    """A branch begins as nothing (ReZero)."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x


class ClosedBehind(Split):
    """Two closed gates behind a norm that adds up over split channels: at the start neither output nor gradient tells."""

    def __init__(self) -> None:
        super().__init__(between=partial(AddsUp, "rms"))
        for block in self.blocks:
            for p in block.mlp[2].parameters():
                nn.init.zeros_(p)
            block.mlp.append(Gate())

    def configure_optimizers(self) -> Any:
        for block in self.blocks:  # they open in the fit
            nn.init.constant_(block.mlp[3].gain, 0.1)
        return super().configure_optimizers()


class ManualNormed(Manual):
    """By hand, with weights of which each process finds a part of the gradient."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.att = Heads(8, 4, normed=True)


class AddsUp(nn.Module):
    """What adds up over all units, in ways that no trace of widths can tell from what does not."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "normalize":
            return F.normalize(x, dim=-1)
        if self.how == "sum":
            return x + 0.01 * x.sum(-1, keepdim=True)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Squeeze(nn.Module):
    """An inverted bottleneck with squeeze and excitation."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.expand, self.depth, self.project = (
            nn.Conv1d(c, 4 * c, 1), nn.Conv1d(4 * c, 4 * c, 3, padding=1, groups=4 * c), nn.Conv1d(4 * c, c, 1),
        )  # fmt: skip
        self.n1, self.n2, self.n3 = nn.BatchNorm1d(4 * c), nn.BatchNorm1d(4 * c), nn.BatchNorm1d(c)
        self.fc1, self.fc2 = nn.Conv1d(4 * c, c, 1), nn.Conv1d(c, 4 * c, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n2(self.depth(self.n1(self.expand(x)).relu())).relu()
        y = y * self.fc2(self.fc1(y.mean(-1, keepdim=True)).relu()).sigmoid()
        return x + self.n3(self.project(y))


class Bottleneck(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(c, c, 1), nn.GroupNorm(4, c), nn.ReLU(inplace=True), nn.Conv1d(c, c, 3, padding=1),
            nn.BatchNorm1d(c), nn.PReLU(c), nn.Conv1d(c, c, 1, bias=False), nn.BatchNorm1d(c),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.body(x)).relu()


class Images(GPT):
    """A network of convolutions over the positions."""

    def __init__(self, block: Callable[[int], nn.Module]) -> None:
        super().__init__(depth=0)
        self.stem = nn.Conv1d(8, 8, 1)
        self.body = nn.Sequential(block(8), block(8))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.body(self.stem(self.embed(tokens).transpose(1, 2)))
        return self.head(self.norm(x.transpose(1, 2)))


class Language(GPT):
    """A network of transformers."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__(depth=0)
        self.net = make()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(input_ids=tokens).logits


def transformer(kind: str, **given: Any) -> nn.Module:
    """Return a small network of transformers, without dropout."""
    import transformers

    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": LENGTH, "use_cache": False, "head_dim": 4,
    }  # fmt: skip
    if kind == "GPT2LMHeadModel":
        settings = {
            "vocab_size": VOCABULARY,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": LENGTH,
            "use_cache": False,
        }
        settings |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    if kind == "BertForMaskedLM":
        settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    cls = getattr(transformers, kind)
    return cls(cls.config_class(**settings, **given))


def adds_up(how: str) -> Case:
    return Case(partial(Split, between=partial(AddsUp, how)))


CASES: dict[str, Case] = {
    **{name: case for name, case in SHARDED.items() if not case.by_ddp and not case.strategy},
    "fused": Case(Split),
    "fused, clipped": Case(Split, {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2}),
    "groups of queries": Case(partial(Split, partial(Heads, 8, 4, groups=2))),
    "norms of heads": Case(partial(Split, partial(Heads, 8, 4, normed=True))),
    "norms of heads, clipped": Case(
        partial(Split, partial(Heads, 8, 4, normed=True)),
        {"gradient_clip_val": 0.05, "accumulate_grad_batches": 3},
    ),
    "closed gates": Case(Closed),
    "closed behind a norm": Case(ClosedBehind),
    "norms of heads, by hand": Case(ManualNormed),
    "uneven heads": Case(partial(Split, partial(Heads, 8, 3))),
    "one group of queries": Case(partial(Split, partial(Heads, 8, 4, groups=1))),
    "reads its width": Case(partial(Split, partial(ReadsWidth, 8, 4)), {"gradient_clip_val": 0.05}),
    "reads its width, fused": Case(partial(Split, partial(ReadsWidthFused, 8, 4))),
    "normalized": adds_up("normalize"),
    "sum of all": adds_up("sum"),
    "root mean square": adds_up("rms"),
    "softmax": Case(partial(Split, between=partial(nn.Softmax, -1))),
    "layer norm": Case(partial(Split, between=partial(nn.LayerNorm, 16))),
    "bottlenecks": Case(partial(Images, Bottleneck)),
    "squeeze and excitation": Case(partial(Images, Squeeze)),
    **{
        kind: Case(partial(Language, partial(transformer, kind)))
        for kind in ("LlamaForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM")
    },
}
