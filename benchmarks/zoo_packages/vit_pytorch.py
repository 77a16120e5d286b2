"""Networks of vit-pytorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from zoo_packages.entry import CLASSES, Entry, noise

_SQUARE = {"image_size": 32, "patch_size": 8, "num_classes": CLASSES}
_DEEP = {"dim": 32, "depth": 2, "heads": 4, "mlp_dim": 64, "dim_head": 8}
_VIT = {**_SQUARE, **_DEEP}
_VIDEO = {"image_size": 16, "frames": 4, "frame_patch_size": 2, "image_patch_size": 8}
_STAGES = {"num_classes": CLASSES, "depth": (1, 1, 1, 1), "dim": (16, 32, 32, 64)}
_TWINS_AND_CVT = {f"s{n}_depth": 1 for n in (1, 2, 3)}
# Its embedding has the batch dimension that the two wrappers below expect.
_ENCODER = Entry("vit_pytorch.deepvit.DeepViT", _VIT, noise(3, 32, 32))
_PICTURE, _WIDE_PICTURE = noise(3, 32, 32), noise(3, 64, 64)

_VIT_PYTORCH: dict[str, tuple[str, dict[str, Any], Callable[[], Any]]] = {
    "vit": ("vit.ViT", _VIT, _PICTURE),
    **{
        name: (f"{name}.{kind}", _VIT, _PICTURE)
        for kind, names in {
            "SimpleViT": """simple_vit simple_flash_attn_vit simple_vit_with_register_tokens
                simple_vit_with_patch_dropout simple_vit_with_qk_norm simple_vit_with_value_residual
                simple_vit_orthog_residual_update simple_vit_with_relative_proj_pos_bias
                simple_vit_with_specialized_cls attn_residual_with_dca_simple_vit""",
            "ViT": """parallel_vit vit_for_small_dataset vit_with_patch_dropout vit_with_patch_merger
                vit_with_keel_post_ln vit_5""",
            "DeepViT": "deepvit",
            "RvT": "rvt",
            "SimpleUViT": "simple_uvit",
            "nViT": "normalized_vit",
            "JumboViT": "jumbo_vit",
        }.items()
        for name in names.split()
    },
    "simple_vit_with_fft": (
        "simple_vit_with_fft.SimpleViT",
        {**_VIT, "freq_patch_size": 8},
        _PICTURE,
    ),
    "simple_vit_with_hyper_connections": (
        "simple_vit_with_hyper_connections.SimpleViT",
        {**_VIT, "num_residual_streams": 2},
        _PICTURE,
    ),
    "simple_vit_attn_residual": ("simple_vit_attn_residual.SimpleViTAttnResidual", _VIT, _PICTURE),
    "cait": ("cait.CaiT", {**_VIT, "cls_depth": 1}, _PICTURE),
    "xcit": ("xcit.XCiT", {**_VIT, "cls_depth": 1}, _PICTURE),
    "ats_vit": ("ats_vit.ViT", {**_VIT, "max_tokens_per_depth": (8, 4)}, _PICTURE),
    "pit": ("pit.PiT", {**_VIT, "depth": (1, 1)}, _PICTURE),
    "levit": (
        "levit.LeViT",
        {
            "image_size": 64,
            "num_classes": CLASSES,
            "dim": (16, 32),
            "depth": 1,
            "heads": (2, 4),
            "mlp_mult": 2,
            "stages": 2,
            "dim_key": 8,
            "dim_value": 8,
        },
        _WIDE_PICTURE,
    ),
    "cross_vit": (
        "cross_vit.CrossViT",
        {
            "image_size": 48,
            "num_classes": CLASSES,
            "sm_dim": 24,
            "lg_dim": 32,
            "sm_enc_mlp_dim": 48,
            "lg_enc_depth": 1,
            "lg_enc_mlp_dim": 64,
            "depth": 1,
            **{
                f"{part}_{key}": size
                for part in ("sm_enc", "lg_enc", "cross_attn")
                for key, size in (("heads", 4), ("dim_head", 8))
            },
        },
        noise(3, 48, 48),
    ),
    "cvt": (
        "cvt.CvT",
        {
            "num_classes": CLASSES,
            **_TWINS_AND_CVT,
            "s1_emb_dim": 16,
            "s2_emb_dim": 32,
            "s3_emb_dim": 48,
        },
        _WIDE_PICTURE,
    ),
    "twins_svt": (
        "twins_svt.TwinsSVT",
        {
            "num_classes": CLASSES,
            **_TWINS_AND_CVT,
            "s4_depth": 1,
            **{f"s{n}_emb_dim": size for n, size in enumerate((16, 32, 32, 48), 1)},
            **{f"s{n}_local_patch_size": size for n, size in enumerate((4, 4, 2, 1), 1)},
            **{f"s{n}_global_k": size for n, size in enumerate((4, 4, 2, 1), 1)},
        },
        _WIDE_PICTURE,
    ),
    "max_vit": (
        "max_vit.MaxViT",
        {"num_classes": CLASSES, "dim": 16, "depth": (1, 1), "dim_head": 8, "window_size": 4},
        _WIDE_PICTURE,
    ),
    "max_vit_with_registers": (
        "max_vit_with_registers.MaxViT",
        {"num_classes": CLASSES, "dim": 16, "depth": (1, 1), "dim_head": 8, "window_size": 4},
        _WIDE_PICTURE,
    ),
    "mobile_vit": (
        "mobile_vit.MobileViT",
        {
            "image_size": (64, 64),
            "dims": [24, 32, 40],
            "channels": [8, 16, 24, 24, 32, 32, 40, 40, 48, 48, 64],
            "num_classes": CLASSES,
            "depths": (1, 1, 1),
        },
        _WIDE_PICTURE,
    ),
    "region_vit": (
        "regionvit.RegionViT",
        {**_STAGES, "window_size": 4, "use_peg": True},
        noise(3, 128, 128),
    ),
    "crossformer": (
        "crossformer.CrossFormer",
        {
            **_STAGES,
            "dim": (32, 32, 64, 64),
            "global_window_size": (8, 4, 2, 1),
            "local_window_size": 2,
        },
        _WIDE_PICTURE,
    ),
    "scalable_vit": (
        "scalable_vit.ScalableViT",
        {
            "num_classes": CLASSES,
            "dim": 16,
            "heads": (2, 2, 2, 4),
            "depth": (1, 1, 1, 1),
            "reduction_factor": (4, 2, 1, 1),
            "window_size": (8, 4, None, None),
            "ssa_dim_key": 8,
            "ssa_dim_value": 8,
            "iwsa_dim_key": 8,
            "iwsa_dim_value": 8,
        },
        _WIDE_PICTURE,
    ),
    "sep_vit": (
        "sep_vit.SepViT",
        {
            "num_classes": CLASSES,
            "dim": 16,
            "depth": (1, 1, 1),
            "heads": (1, 2, 4),
            "window_size": 7,
            "dim_head": 8,
        },
        noise(3, 224, 224),
    ),
    "nest": (
        "nest.NesT",
        {
            "image_size": 32,
            "patch_size": 4,
            "num_classes": CLASSES,
            "dim": 16,
            "heads": 2,
            "num_hierarchies": 2,
            "block_repeats": (1, 1),
            "dim_head": 8,
        },
        _PICTURE,
    ),
    "cct": (
        "cct.CCT",
        {
            "img_size": (32, 32),
            "embedding_dim": 32,
            "n_conv_layers": 2,
            "num_layers": 2,
            "num_heads": 4,
            "mlp_ratio": 2.0,
            "num_classes": CLASSES,
            "positional_embedding": "learnable",
        },
        _PICTURE,
    ),
    "t2t": (
        "t2t.T2TViT",
        {"image_size": 32, "num_classes": CLASSES, **_DEEP, "t2t_layers": ((7, 4), (3, 2))},
        _PICTURE,
    ),
    "look_vit": (
        "look_vit.LookViT",
        {
            "image_size": 48,
            "num_classes": CLASSES,
            "dim": 32,
            "depth": 2,
            "heads": 4,
            "mlp_factor": 2,
            "dim_head": 8,
            "highres_mlp_factor": 2,
            "cross_attn_heads": 4,
            "cross_attn_dim_head": 8,
        },
        noise(3, 48, 48),
    ),
    "mae": (
        "mae.MAE",
        {"encoder": _ENCODER, "decoder_dim": 24, "decoder_heads": 4, "decoder_dim_head": 8},
        _PICTURE,
    ),
    "simmim": ("simmim.SimMIM", {"encoder": _ENCODER}, _PICTURE),
    "vit_1d": (
        "vit_1d.ViT",
        {"seq_len": 32, "patch_size": 4, "num_classes": CLASSES, **_DEEP},
        noise(3, 32),
    ),
    "vit_3d": ("vit_3d.ViT", {**_VIDEO, "num_classes": CLASSES, **_DEEP}, noise(3, 4, 16, 16)),
    "vivit": (
        "vivit.ViViT",
        {
            **_VIDEO,
            "num_classes": CLASSES,
            **{k: v for k, v in _DEEP.items() if k != "depth"},
            "spatial_depth": 1,
            "temporal_depth": 1,
        },
        noise(3, 4, 16, 16),
    ),
    "na_vit": ("na_vit.NaViT", _VIT, lambda: ([[torch.randn(3, 16, 32), torch.randn(3, 32, 8)]],)),
}


ENTRIES = {
    name: Entry(f"vit_pytorch.{path}", options, example)
    for name, (path, options, example) in _VIT_PYTORCH.items()
}
