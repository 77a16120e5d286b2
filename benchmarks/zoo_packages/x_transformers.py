"""Networks of x-transformers: one option of its layers at a time.

But for `tie_embedding`: its head is a function of its own that holds the embedding, and a copy's reads the
weights of the original. No comparison of copies says anything of that.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zoo_packages.entry import CLASSES, VOCABULARY, Entry, ids, noise


def _layers(kind: str = "Decoder", **options: Any) -> Entry:
    sizes = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 8, "verbose": False}
    return Entry(f"x_transformers.{kind}", {**sizes, **options}, tuple)


def _text(layers: Entry, **options: Any) -> Entry:
    ends = {"num_tokens": VOCABULARY, "max_seq_len": 32}
    return Entry(
        "x_transformers.TransformerWrapper", {**ends, **options, "attn_layers": layers}, ids
    )


def _both() -> tuple[Tensor, Tensor]:
    return ids(), ids(6)


ENTRIES: dict[str, Entry] = {
    **{
        name: _text(_layers(**options))
        for name, options in {
            "decoder": {},
            "rotary": {"rotary_pos_emb": True},
            "alibi": {"alibi_pos_bias": True},
            "relative_bias": {"rel_pos_bias": True},
            "dynamic_bias": {"dynamic_pos_bias": True},
            "rmsnorm_glu": {"use_rmsnorm": True, "ff_glu": True, "ff_swish": True},
            "glu_bias_free": {"ff_glu": True, "ff_no_bias": True, "use_simple_rmsnorm": True},
            "kv_heads": {"attn_kv_heads": 2, "rotary_pos_emb": True},
            "one_kv_head": {"attn_one_kv_head": True},
            "flash": {"attn_flash": True},
            "memory_keys": {"attn_num_mem_kv": 4},
            "qk_norm": {"attn_qk_norm": True, "attn_qk_norm_dim_scale": True},
            "talking_heads": {"attn_pre_talking_heads": True, "attn_post_talking_heads": True},
            "head_scale": {"attn_head_scale": True},
            "gated_values": {"attn_gate_values": True},
            "attention_on_attention": {"attn_on_attn": True},
            "sandwich_norm": {"sandwich_norm": True},
            "sandwich_order": {"sandwich_coef": 1},
            "post_norm": {"pre_norm": False},
            "macaron": {"macaron": True},
            "residual_attention": {"residual_attn": True},
            "gated_residual": {"gate_residual": True},
            "scaled_residual": {"scale_residual": True},
            "shifted_tokens": {"shift_tokens": 1},
            "relu_squared": {"ff_relu_squared": True, "use_scalenorm": True},
            "dynamic_tanh": {"use_dynamic_tanh": True},
            "layer_scale": {"use_layerscale": True},
            "unet_skips": {"unet_skips": True},
            "residual_streams": {"num_residual_streams": 2},
            "value_residual": {"add_value_residual": True},
            "latent_keys": {"attn_use_latent_kv": True, "attn_dim_latent_kv": 16},
            "tied_layers": {"weight_tie_layers": True},
            "value_width": {"attn_value_dim_head": 16},
            "sparse_topk": {"attn_sparse_topk": 4},
        }.items()
    },
    "encoder": _text(_layers("Encoder")),
    "memory_tokens": _text(_layers("Encoder"), num_memory_tokens=3),
    "embedding_narrow": _text(_layers(), emb_dim=16),
    "encoder_decoder": Entry(
        "x_transformers.XTransformer",
        {
            "dim": 32,
            **{
                f"{side}_{key}": size
                for side in ("enc", "dec")
                for key, size in (
                    ("num_tokens", VOCABULARY),
                    ("depth", 2),
                    ("heads", 4),
                    ("max_seq_len", 32),
                    ("attn_dim_head", 8),
                )
            },
        },
        _both,
    ),
    "vision": Entry(
        "x_transformers.ViTransformerWrapper",
        {
            "image_size": 32,
            "patch_size": 8,
            "num_classes": CLASSES,
            "attn_layers": _layers("Encoder"),
        },
        noise(3, 32, 32),
    ),
    "continuous": Entry(
        "x_transformers.ContinuousTransformerWrapper",
        {"dim_in": 12, "dim_out": 6, "max_seq_len": 32, "attn_layers": _layers("Encoder")},
        noise(9, 12),
    ),
}
