"""Networks of diffusers: UNets, autoencoders and transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo_packages.entry import BATCH, Entry, noise, times_and

_SMALL_UNET = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 16,
}
_TEXT_BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}
_SMALL_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "latent_channels": 4,
}
_HEADS = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2}
_IMAGE_AND_TEXT = times_and("timestep", sample=(4, 16, 16), encoder_hidden_states=(7, 24))
_LATENT = {"hidden_states": (4, 8, 8), "encoder_hidden_states": (7, 24)}


def _flux() -> dict[str, Tensor]:
    example = times_and("timestep", hidden_states=(16, 8), encoder_hidden_states=(7, 24))()
    rows = torch.arange(16)
    places = torch.stack([0 * rows, rows // 4, rows % 4], 1).float()
    return {
        **example,
        "pooled_projections": torch.randn(BATCH, 12),
        "img_ids": places,
        "txt_ids": torch.zeros(7, 3),
    }


def _uvit() -> dict[str, Tensor]:
    return {
        "input_ids": torch.randint(0, 32, (BATCH, 8, 8)),
        "encoder_hidden_states": torch.randn(BATCH, 7, 24),
        "pooled_text_emb": torch.randn(BATCH, 24),
        "micro_conds": torch.randn(BATCH, 5),
    }


def _pixart() -> dict[str, Any]:
    nothing = {"resolution": None, "aspect_ratio": None}
    return {**times_and("timestep", **_LATENT)(), "added_cond_kwargs": nothing}


def _labelled() -> dict[str, Tensor]:
    return times_and("timestep", "class_labels", hidden_states=(4, 8, 8))()


def _controlled() -> dict[str, Tensor]:
    return {**_IMAGE_AND_TEXT(), "controlnet_cond": torch.randn(BATCH, 3, 32, 32)}


def _masked_text() -> dict[str, Tensor]:
    return {**times_and("timestep", **_LATENT)(), "encoder_attention_mask": torch.ones(BATCH, 7)}


def _video_ltx() -> dict[str, Any]:
    example = times_and("timestep", hidden_states=(16, 8), encoder_hidden_states=(7, 24))()
    mask = torch.ones(BATCH, 7)
    return {**example, "encoder_attention_mask": mask, "num_frames": 1, "height": 4, "width": 4}


_DIFFUSERS: dict[str, tuple[str, dict[str, Any], Callable[[], Any]]] = {
    "unet_2d": (
        "UNet2DModel",
        {
            **_SMALL_UNET,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 4,
        },
        times_and("timestep", sample=(3, 16, 16)),
    ),
    "unet_2d_resnet_sampling": (
        "UNet2DModel",
        {
            **_SMALL_UNET,
            "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
            "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
            "resnet_time_scale_shift": "scale_shift",
        },
        times_and("timestep", sample=(3, 16, 16)),
    ),
    "unet_2d_skip": (
        "UNet2DModel",
        {
            "sample_size": 32,
            "block_out_channels": (32, 32),
            "layers_per_block": 1,
            "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
            "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
            "attention_head_dim": 8,
        },
        times_and("timestep", sample=(3, 32, 32)),
    ),
    "unet_2d_condition": ("UNet2DConditionModel", {**_SMALL_UNET, **_TEXT_BLOCKS}, _IMAGE_AND_TEXT),
    "unet_2d_condition_linear": (
        "UNet2DConditionModel",
        {**_SMALL_UNET, **_TEXT_BLOCKS, "use_linear_projection": True, "class_embed_type": None},
        _IMAGE_AND_TEXT,
    ),
    "unet_1d": (
        "UNet1DModel",
        {
            "sample_size": 32,
            "in_channels": 3,
            "out_channels": 3,
            "extra_in_channels": 64,
            "block_out_channels": (32, 64),
            "down_block_types": ("DownBlock1DNoSkip", "AttnDownBlock1D"),
            "up_block_types": ("AttnUpBlock1D", "UpBlock1DNoSkip"),
        },
        times_and("timestep", sample=(3, 32)),
    ),
    "unet_3d_condition": (
        "UNet3DConditionModel",
        {
            **_SMALL_UNET,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "cross_attention_dim": 24,
            "attention_head_dim": 4,
        },
        times_and("timestep", sample=(4, 3, 8, 8), encoder_hidden_states=(7, 24)),
    ),
    "controlnet": (
        "ControlNetModel",
        {
            **{
                key: value
                for key, value in {**_SMALL_UNET, **_TEXT_BLOCKS}.items()
                if key not in ("sample_size", "up_block_types")
            },
            "conditioning_embedding_out_channels": (8, 16),
        },
        _controlled,
    ),
    "autoencoder_kl": ("AutoencoderKL", _SMALL_VAE, noise(3, 16, 16)),
    "autoencoder_kl_no_attention": (
        "AutoencoderKL",
        {**_SMALL_VAE, "mid_block_add_attention": False, "use_quant_conv": False},
        noise(3, 16, 16),
    ),
    "autoencoder_tiny": (
        "AutoencoderTiny",
        {
            "encoder_block_out_channels": (16, 16),
            "decoder_block_out_channels": (16, 16),
            "num_encoder_blocks": (1, 1),
            "num_decoder_blocks": (1, 1),
        },
        noise(3, 16, 16),
    ),
    "asymmetric_autoencoder_kl": (
        "AsymmetricAutoencoderKL",
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "down_block_out_channels": (16, 32),
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "up_block_out_channels": (16, 32),
            "norm_num_groups": 8,
        },
        noise(3, 16, 16),
    ),
    "autoencoder_dc": (
        "AutoencoderDC",
        {
            "latent_channels": 4,
            "attention_head_dim": 4,
            "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "encoder_block_out_channels": (16, 32),
            "decoder_block_out_channels": (16, 32),
            "encoder_qkv_multiscales": ((), (5,)),
            "decoder_qkv_multiscales": ((), (5,)),
            "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": (1, 1),
            "downsample_block_type": "conv",
            "upsample_block_type": "interpolate",
        },
        noise(3, 16, 16),
    ),
    "autoencoder_oobleck": (
        "AutoencoderOobleck",
        {
            "encoder_hidden_size": 12,
            "decoder_channels": 12,
            "decoder_input_channels": 6,
            "downsampling_ratios": [2, 4],
            "channel_multiples": [2, 4],
        },
        noise(2, 64),
    ),
    "autoencoder_temporal": (
        "AutoencoderKLTemporalDecoder",
        {"down_block_types": ("DownEncoderBlock2D",) * 2, "block_out_channels": (32, 64)},
        noise(3, 16, 16),
    ),
    "autoencoder_wan": (
        "AutoencoderKLWan",
        {
            "base_dim": 8,
            "z_dim": 4,
            "dim_mult": [1, 1],
            "num_res_blocks": 1,
            "temperal_downsample": [False],
        },
        noise(3, 1, 16, 16),
    ),
    "vq_model": (
        "VQModel",
        {**_SMALL_VAE, "latent_channels": 3, "num_vq_embeddings": 32},
        noise(3, 16, 16),
    ),
    "transformer_2d": (
        "Transformer2DModel",
        {**_HEADS, "in_channels": 16, "norm_num_groups": 8, "cross_attention_dim": 24},
        times_and(hidden_states=(16, 8, 8), encoder_hidden_states=(7, 24)),
    ),
    "dit": (
        "DiTTransformer2DModel",
        {**_HEADS, "sample_size": 8, "num_embeds_ada_norm": 20},
        _labelled,
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {
            **_HEADS,
            "sample_size": 8,
            "cross_attention_dim": 32,
            "caption_channels": 24,
            "out_channels": 4,
        },
        _pixart,
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            **_HEADS,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "joint_attention_dim": 24,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 12,
            "pos_embed_max_size": 16,
            "qk_norm": "rms_norm",
        },
        times_and("timestep", **_LATENT, pooled_projections=(12,)),
    ),
    "flux": (
        "FluxTransformer2DModel",
        {
            "in_channels": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 12,
            "axes_dims_rope": (4, 6, 6),
        },
        _flux,
    ),
    "sana": (
        "SanaTransformer2DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 32,
            "caption_channels": 24,
            "sample_size": 8,
        },
        times_and("timestep", **_LATENT),
    ),
    "aura_flow": (
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 8,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 24,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 32,
        },
        times_and("timestep", **_LATENT),
    ),
    "lumina2": (
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 48,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 16,
            "axes_dim_rope": (4, 4, 4),
            "axes_lens": (64, 64, 64),
            "cap_feat_dim": 24,
        },
        lambda: {**_masked_text(), "encoder_attention_mask": torch.ones(BATCH, 7).bool()},
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 24,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "max_text_seq_length": 7,
        },
        times_and("timestep", hidden_states=(2, 4, 8, 8), encoder_hidden_states=(7, 24)),
    ),
    "ltx_video": (
        "LTXVideoTransformer3DModel",
        {
            **_HEADS,
            "in_channels": 8,
            "out_channels": 8,
            "cross_attention_dim": 32,
            "caption_channels": 24,
        },
        _video_ltx,
    ),
    "wan": (
        "WanTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 24,
            "freq_dim": 32,
            "ffn_dim": 32,
            "num_layers": 2,
            "rope_max_seq_len": 32,
        },
        times_and("timestep", hidden_states=(4, 2, 8, 8), encoder_hidden_states=(7, 24)),
    ),
    "latte": (
        "LatteTransformer3DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 1,
            "patch_size": 2,
            "sample_size": 8,
            "cross_attention_dim": 32,
            "caption_channels": 24,
            "norm_type": "ada_norm_single",
            "num_embeds_ada_norm": 20,
            "norm_elementwise_affine": False,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "video_length": 3,
        },
        times_and("timestep", hidden_states=(4, 3, 8, 8), encoder_hidden_states=(7, 24)),
    ),
    "uvit": (
        "UVit2DModel",
        {
            "hidden_size": 32,
            "cond_embed_dim": 24,
            "micro_cond_encode_dim": 4,
            "micro_cond_embed_dim": 20,
            "encoder_hidden_size": 24,
            "vocab_size": 32,
            "codebook_size": 32,
            "in_channels": 32,
            "block_out_channels": 32,
            "num_res_blocks": 1,
            "block_num_heads": 4,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "sample_size": 8,
        },
        _uvit,
    ),
    "prior": (
        "PriorTransformer",
        {**_HEADS, "embedding_dim": 16, "num_embeddings": 7, "additional_embeddings": 4},
        times_and(
            "timestep", hidden_states=(16,), proj_embedding=(16,), encoder_hidden_states=(7, 16)
        ),
    ),
}


ENTRIES = {
    name: Entry(f"diffusers.{path}", options, example)
    for name, (path, options, example) in _DIFFUSERS.items()
}
