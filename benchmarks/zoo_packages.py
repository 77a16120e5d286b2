"""Networks of diffusers, segmentation-models-pytorch, monai, vit-pytorch and x-transformers, by configuration.

As many different kinds as possible, each small: `zoo.build("monai/unet_3d")` makes one, with random weights.
An entry is the class, as package and path, its arguments, and what makes two samples of its input.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

CLASSES = 10
VOCABULARY = 96
_BATCH = 2


class Entry(NamedTuple):
    """What a network is made of: path of the class, arguments, and a function that makes its input."""

    path: str
    options: Mapping[str, Any]
    example: Callable[[], Any]

    def build(self) -> tuple[nn.Module, Any]:
        """Make the network and two samples."""
        module, _, name = self.path.rpartition(".")
        return getattr(importlib.import_module(module), name)(**_made(self.options)), self.example()


def _made(value: Any) -> Any:
    """Make what is inside of a network first: an encoder, or layers that a wrapper takes."""
    if isinstance(value, Entry):
        return value.build()[0]
    return {k: _made(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _noise(*sizes: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(_BATCH, *sizes)


def _ids(length: int = 9) -> Tensor:
    return torch.randint(5, VOCABULARY, (_BATCH, length))


def _at(*names: str, **sizes: tuple[int, ...]) -> Callable[[], dict[str, Tensor]]:
    """Return a function that makes noise of these sizes, and a time for each of the names."""

    def make() -> dict[str, Tensor]:
        noise = {name: torch.randn(_BATCH, *size) for name, size in sizes.items()}
        return {**noise, **{name: torch.tensor([3, 7]) for name in names}}

    return make


# -- diffusers -------------------------------------------------------------------------------------

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
_IMAGE_AND_TEXT = _at("timestep", sample=(4, 16, 16), encoder_hidden_states=(7, 24))
_LATENT = {"hidden_states": (4, 8, 8), "encoder_hidden_states": (7, 24)}


def _flux() -> dict[str, Tensor]:
    example = _at("timestep", hidden_states=(16, 8), encoder_hidden_states=(7, 24))()
    rows = torch.arange(16)
    places = torch.stack([0 * rows, rows // 4, rows % 4], 1).float()
    return {
        **example,
        "pooled_projections": torch.randn(_BATCH, 12),
        "img_ids": places,
        "txt_ids": torch.zeros(7, 3),
    }


def _uvit() -> dict[str, Tensor]:
    return {
        "input_ids": torch.randint(0, 32, (_BATCH, 8, 8)),
        "encoder_hidden_states": torch.randn(_BATCH, 7, 24),
        "pooled_text_emb": torch.randn(_BATCH, 24),
        "micro_conds": torch.randn(_BATCH, 5),
    }


def _pixart() -> dict[str, Any]:
    nothing = {"resolution": None, "aspect_ratio": None}
    return {**_at("timestep", **_LATENT)(), "added_cond_kwargs": nothing}


def _labelled() -> dict[str, Tensor]:
    return _at("timestep", "class_labels", hidden_states=(4, 8, 8))()


def _controlled() -> dict[str, Tensor]:
    return {**_IMAGE_AND_TEXT(), "controlnet_cond": torch.randn(_BATCH, 3, 32, 32)}


def _masked_text() -> dict[str, Tensor]:
    return {**_at("timestep", **_LATENT)(), "encoder_attention_mask": torch.ones(_BATCH, 7)}


def _video_ltx() -> dict[str, Any]:
    example = _at("timestep", hidden_states=(16, 8), encoder_hidden_states=(7, 24))()
    mask = torch.ones(_BATCH, 7)
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
        _at("timestep", sample=(3, 16, 16)),
    ),
    "unet_2d_resnet_sampling": (
        "UNet2DModel",
        {
            **_SMALL_UNET,
            "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
            "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
            "resnet_time_scale_shift": "scale_shift",
        },
        _at("timestep", sample=(3, 16, 16)),
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
        _at("timestep", sample=(3, 32, 32)),
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
        _at("timestep", sample=(3, 32)),
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
        _at("timestep", sample=(4, 3, 8, 8), encoder_hidden_states=(7, 24)),
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
    "autoencoder_kl": ("AutoencoderKL", _SMALL_VAE, _noise(3, 16, 16)),
    "autoencoder_kl_no_attention": (
        "AutoencoderKL",
        {**_SMALL_VAE, "mid_block_add_attention": False, "use_quant_conv": False},
        _noise(3, 16, 16),
    ),
    "autoencoder_tiny": (
        "AutoencoderTiny",
        {
            "encoder_block_out_channels": (16, 16),
            "decoder_block_out_channels": (16, 16),
            "num_encoder_blocks": (1, 1),
            "num_decoder_blocks": (1, 1),
        },
        _noise(3, 16, 16),
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
        _noise(3, 16, 16),
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
        _noise(3, 16, 16),
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
        _noise(2, 64),
    ),
    "autoencoder_temporal": (
        "AutoencoderKLTemporalDecoder",
        {"down_block_types": ("DownEncoderBlock2D",) * 2, "block_out_channels": (32, 64)},
        _noise(3, 16, 16),
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
        _noise(3, 1, 16, 16),
    ),
    "vq_model": (
        "VQModel",
        {**_SMALL_VAE, "latent_channels": 3, "num_vq_embeddings": 32},
        _noise(3, 16, 16),
    ),
    "transformer_2d": (
        "Transformer2DModel",
        {**_HEADS, "in_channels": 16, "norm_num_groups": 8, "cross_attention_dim": 24},
        _at(hidden_states=(16, 8, 8), encoder_hidden_states=(7, 24)),
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
        _at("timestep", **_LATENT, pooled_projections=(12,)),
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
        _at("timestep", **_LATENT),
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
        _at("timestep", **_LATENT),
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
        lambda: {**_masked_text(), "encoder_attention_mask": torch.ones(_BATCH, 7).bool()},
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
        _at("timestep", hidden_states=(2, 4, 8, 8), encoder_hidden_states=(7, 24)),
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
        _at("timestep", hidden_states=(4, 2, 8, 8), encoder_hidden_states=(7, 24)),
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
        _at("timestep", hidden_states=(4, 3, 8, 8), encoder_hidden_states=(7, 24)),
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
        _at("timestep", hidden_states=(16,), proj_embedding=(16,), encoder_hidden_states=(7, 16)),
    ),
}


# -- segmentation-models-pytorch -------------------------------------------------------------------

_SEGMENTATION = {
    f"{kind.lower()}_{encoder}": (kind, encoder)
    for kind, encoders in {
        "Unet": ("resnet18", "efficientnet-b0", "mobilenet_v2", "timm-skresnet18", "vgg11_bn"),
        "UnetPlusPlus": ("resnet18", "timm-efficientnet-b0"),
        "FPN": ("resnet34", "densenet121", "mit_b0"),
        "DeepLabV3": ("resnet18",),
        "DeepLabV3Plus": ("resnet18", "mobilenet_v2", "timm-tf_efficientnet_lite0"),
        "MAnet": ("resnet18", "mobileone_s0"),
        "PAN": ("resnet18", "se_resnet50"),
        "Linknet": ("resnet18", "mobilenet_v2"),
        "PSPNet": ("resnet18", "dpn68"),
        "Segformer": ("mit_b0", "resnet18"),
        "UPerNet": ("resnet18", "tu-convnext_atto"),
        "DPT": ("tu-vit_tiny_patch16_224",),
    }.items()
    for encoder in encoders
}


def _segmentation(kind: str, encoder: str) -> Entry:
    options: dict[str, Any] = {"encoder_name": encoder, "encoder_weights": None, "classes": 5}
    if kind == "DPT":
        options["dynamic_img_size"] = True
    size = 128 if kind == "PAN" else 64
    return Entry(f"segmentation_models_pytorch.{kind}", options, _noise(3, size, size))


# -- monai -----------------------------------------------------------------------------------------

_ENDS = {"in_channels": 1, "out_channels": 3}
_PLANE, _SPACE = {"spatial_dims": 2, **_ENDS}, {"spatial_dims": 3, **_ENDS}
_STEPS = {"channels": (8, 16, 32), "strides": (2, 2)}
_PATCHES = {"hidden_size": 32, "mlp_dim": 64, "num_heads": 4}
_DYN = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]}
_DIFFUSE = {
    "num_res_blocks": (1, 1),
    "channels": (8, 16),
    "attention_levels": (False, True),
    "norm_num_groups": 4,
}
_FEATURES = (8, 8, 16, 16, 16, 8)
_SLICE, _CUBE = _noise(1, 32, 32), _noise(1, 16, 16, 16)

_MONAI: dict[str, tuple[str, dict[str, Any], Callable[[], Any]]] = {
    "unet_2d": ("UNet", {**_PLANE, **_STEPS}, _SLICE),
    "unet_3d_residual": ("UNet", {**_SPACE, **_STEPS, "num_res_units": 2}, _CUBE),
    "attention_unet": ("AttentionUnet", {**_PLANE, **_STEPS}, _SLICE),
    "basic_unet": ("BasicUNet", {**_PLANE, "features": _FEATURES}, _SLICE),
    "basic_unet_plus_plus": ("BasicUNetPlusPlus", {**_PLANE, "features": _FEATURES}, _SLICE),
    "flexible_unet": (
        "FlexibleUNet",
        {**_ENDS, "backbone": "efficientnet-b0", "spatial_dims": 2, "in_channels": 3},
        _noise(3, 64, 64),
    ),
    "dyn_unet": ("DynUNet", {**_SPACE, **_DYN, "filters": [8, 16, 32]}, _CUBE),
    "dyn_unet_residual": (
        "DynUNet",
        {**_PLANE, **_DYN, "filters": [8, 16, 32], "res_block": True, "norm_name": "batch"},
        _SLICE,
    ),
    "dyn_unet_deep": (
        "DynUNet",
        {
            "spatial_dims": 2,
            **_ENDS,
            "kernel_size": [3] * 4,
            "strides": [1, 2, 2, 2],
            "upsample_kernel_size": [2] * 3,
            "filters": [8, 16, 16, 32],
            "deep_supervision": True,
            "deep_supr_num": 2,
        },
        _SLICE,
    ),
    "segresnet_2d": ("SegResNet", _PLANE, _SLICE),
    "segresnet_3d": ("SegResNet", {**_SPACE, "blocks_down": (1, 1, 1), "blocks_up": (1, 1)}, _CUBE),
    "segresnet_ds": ("SegResNetDS", {**_PLANE, "init_filters": 8, "dsdepth": 2}, _SLICE),
    "segresnet_vae": (
        "SegResNetVAE",
        {**_PLANE, "input_image_size": (32, 32), "vae_nz": 16},
        _SLICE,
    ),
    "vnet": ("VNet", _SPACE, _CUBE),
    "unetr": ("UNETR", {**_PLANE, **_PATCHES, "img_size": (32, 32), "feature_size": 8}, _SLICE),
    "swin_unetr": (
        "SwinUNETR",
        {**_PLANE, "feature_size": 12, "depths": (1, 1, 1, 1)},
        _noise(1, 64, 64),
    ),
    "swin_unetr_v2": (
        "SwinUNETR",
        {**_PLANE, "feature_size": 12, "depths": (1, 1, 1, 1), "use_v2": True},
        _noise(1, 64, 64),
    ),
    "mednext": (
        "MedNeXt",
        {
            **_PLANE,
            "init_filters": 8,
            "kernel_size": 3,
            "blocks_down": (1,) * 4,
            "blocks_bottleneck": 1,
            "blocks_up": (1,) * 4,
        },
        _SLICE,
    ),
    "mednext_grn": (
        "MedNeXt",
        {
            **_PLANE,
            "init_filters": 8,
            "kernel_size": 3,
            "blocks_down": (1,) * 4,
            "blocks_bottleneck": 1,
            "blocks_up": (1,) * 4,
            "global_resp_norm": True,
            "use_residual_connection": True,
        },
        _SLICE,
    ),
    "densenet_3d": (
        "DenseNet",
        {**_SPACE, "init_features": 16, "growth_rate": 8, "block_config": (2, 2)},
        _CUBE,
    ),
    "seresnet50": ("SEResNet50", {"spatial_dims": 2, "in_channels": 1, "num_classes": 5}, _SLICE),
    "seresnext50": ("SEResNext50", {"spatial_dims": 2, "in_channels": 1, "num_classes": 5}, _SLICE),
    "resnet_3d": (
        "ResNet",
        {
            "block": "bottleneck",
            "layers": [1, 1, 1, 1],
            "block_inplanes": [8, 16, 16, 32],
            "n_input_channels": 1,
            "num_classes": 5,
        },
        _CUBE,
    ),
    "efficientnet_3d": (
        "EfficientNetBN",
        {
            "model_name": "efficientnet-b0",
            "pretrained": False,
            "spatial_dims": 3,
            "in_channels": 1,
            "num_classes": 5,
        },
        _noise(1, 32, 32, 32),
    ),
    "ahnet": ("AHNet", {**_PLANE, "layers": (1, 1, 1, 1)}, _noise(1, 128, 128)),
    "highresnet": ("HighResNet", _PLANE, _SLICE),
    "quicknat": (
        "Quicknat",
        {"num_classes": 4, "num_filters": 8, "se_block": "CSE"},
        _noise(1, 32, 32),
    ),
    "daf3d": ("DAF3D", {"in_channels": 1, "out_channels": 3}, _CUBE),
    "local_net": (
        "LocalNet",
        {
            "spatial_dims": 2,
            "in_channels": 1,
            "num_channel_initial": 8,
            "extract_levels": (0, 1),
            "out_activation": None,
        },
        _SLICE,
    ),
    "reg_unet": (
        "RegUNet",
        {"spatial_dims": 2, "in_channels": 1, "num_channel_initial": 8, "depth": 2},
        _SLICE,
    ),
    "voxelmorph": (
        "VoxelMorphUNet",
        {
            "spatial_dims": 2,
            "in_channels": 2,
            "unet_out_channels": 8,
            "channels": (8, 8, 16, 16),
            "final_conv_channels": (8, 8),
        },
        _noise(2, 32, 32),
    ),
    "autoencoder": (
        "AutoEncoder",
        {**_PLANE, "channels": (8, 16), "strides": (2, 2), "num_res_units": 1},
        _SLICE,
    ),
    "autoencoder_kl": (
        "AutoencoderKL",
        {
            **_PLANE,
            "channels": (8, 16),
            "num_res_blocks": (1, 1),
            "attention_levels": (False, True),
            "norm_num_groups": 4,
        },
        _SLICE,
    ),
    "vqvae": (
        "VQVAE",
        {
            **_PLANE,
            "channels": (8, 16),
            "num_res_layers": 1,
            "num_res_channels": (8, 16),
            "downsample_parameters": ((2, 4, 1, 1),) * 2,
            "upsample_parameters": ((2, 4, 1, 1, 0),) * 2,
            "num_embeddings": 16,
            "embedding_dim": 8,
            "ddp_sync": False,
        },
        _SLICE,
    ),
    "diffusion_unet": (
        "DiffusionModelUNet",
        {**_PLANE, **_DIFFUSE, "out_channels": 1, "num_head_channels": 4},
        _at("timesteps", x=(1, 16, 16)),
    ),
    "diffusion_unet_condition": (
        "DiffusionModelUNet",
        {
            **_PLANE,
            **_DIFFUSE,
            "num_head_channels": 4,
            "with_conditioning": True,
            "cross_attention_dim": 12,
        },
        _at("timesteps", x=(1, 16, 16), context=(5, 12)),
    ),
    "vit": (
        "ViT",
        {
            **_PATCHES,
            "in_channels": 1,
            "img_size": (32, 32),
            "patch_size": (8, 8),
            "num_layers": 2,
            "classification": True,
            "num_classes": 5,
            "spatial_dims": 2,
        },
        _SLICE,
    ),
    "vit_autoencoder": (
        "ViTAutoEnc",
        {
            **_PATCHES,
            "in_channels": 1,
            "img_size": (32, 32),
            "patch_size": (4, 4),
            "num_layers": 2,
            "spatial_dims": 2,
        },
        _SLICE,
    ),
    "decoder_only_transformer": (
        "DecoderOnlyTransformer",
        {
            "num_tokens": VOCABULARY,
            "max_seq_len": 16,
            "attn_layers_dim": 32,
            "attn_layers_depth": 2,
            "attn_layers_heads": 4,
        },
        _ids,
    ),
    "patch_discriminator": (
        "PatchDiscriminator",
        {"spatial_dims": 2, "channels": 8, "in_channels": 1},
        _SLICE,
    ),
    "fully_connected": (
        "FullyConnectedNet",
        {"in_channels": 12, "out_channels": 3, "hidden_channels": [24, 16]},
        _noise(12),
    ),
}


# -- vit-pytorch -----------------------------------------------------------------------------------

_SQUARE = {"image_size": 32, "patch_size": 8, "num_classes": CLASSES}
_DEEP = {"dim": 32, "depth": 2, "heads": 4, "mlp_dim": 64, "dim_head": 8}
_VIT = {**_SQUARE, **_DEEP}
_VIDEO = {"image_size": 16, "frames": 4, "frame_patch_size": 2, "image_patch_size": 8}
_STAGES = {"num_classes": CLASSES, "depth": (1, 1, 1, 1), "dim": (16, 32, 32, 64)}
_TWINS_AND_CVT = {f"s{n}_depth": 1 for n in (1, 2, 3)}
# Its embedding has the batch dimension that the two wrappers below expect.
_ENCODER = Entry("vit_pytorch.deepvit.DeepViT", _VIT, _noise(3, 32, 32))
_PICTURE, _WIDE_PICTURE = _noise(3, 32, 32), _noise(3, 64, 64)

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
        _noise(3, 48, 48),
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
        _noise(3, 128, 128),
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
        _noise(3, 224, 224),
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
        _noise(3, 48, 48),
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
        _noise(3, 32),
    ),
    "vit_3d": ("vit_3d.ViT", {**_VIDEO, "num_classes": CLASSES, **_DEEP}, _noise(3, 4, 16, 16)),
    "vivit": (
        "vivit.ViViT",
        {
            **_VIDEO,
            "num_classes": CLASSES,
            **{k: v for k, v in _DEEP.items() if k != "depth"},
            "spatial_depth": 1,
            "temporal_depth": 1,
        },
        _noise(3, 4, 16, 16),
    ),
    "na_vit": ("na_vit.NaViT", _VIT, lambda: ([[torch.randn(3, 16, 32), torch.randn(3, 32, 8)]],)),
}


# -- x-transformers --------------------------------------------------------------------------------


def _layers(kind: str = "Decoder", **options: Any) -> Entry:
    sizes = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 8, "verbose": False}
    return Entry(f"x_transformers.{kind}", {**sizes, **options}, tuple)


def _text(layers: Entry, **options: Any) -> Entry:
    ends = {"num_tokens": VOCABULARY, "max_seq_len": 32}
    return Entry(
        "x_transformers.TransformerWrapper", {**ends, **options, "attn_layers": layers}, _ids
    )


def _both() -> tuple[Tensor, Tensor]:
    return _ids(), _ids(6)


_X_TRANSFORMERS: dict[str, Entry] = {
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
    "tied_embedding": _text(_layers(), tie_embedding=True),
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
        _PICTURE,
    ),
    "continuous": Entry(
        "x_transformers.ContinuousTransformerWrapper",
        {"dim_in": 12, "dim_out": 6, "max_seq_len": 32, "attn_layers": _layers("Encoder")},
        _noise(9, 12),
    ),
}


ENTRIES: dict[str, dict[str, Entry]] = {
    "diffusers": {
        name: Entry(f"diffusers.{kind}", options, example)
        for name, (kind, options, example) in _DIFFUSERS.items()
    },
    "segmentation_models_pytorch": {
        name: _segmentation(kind, encoder) for name, (kind, encoder) in _SEGMENTATION.items()
    },
    "monai": {
        name: Entry(f"monai.networks.nets.{kind}", options, example)
        for name, (kind, options, example) in _MONAI.items()
    },
    "vit_pytorch": {
        name: Entry(f"vit_pytorch.{path}", options, example)
        for name, (path, options, example) in _VIT_PYTORCH.items()
    },
    "x_transformers": _X_TRANSFORMERS,
}
"""The networks of each package, by name."""
