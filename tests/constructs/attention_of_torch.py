"""Torch's own attention: `nn.MultiheadAttention` and its encoder and decoder layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from constructs.attention import FUSED_ROWS, by_width
from constructs.build import Net, construct, sequences, time_first


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
