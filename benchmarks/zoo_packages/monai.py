"""Networks of monai, in the plane and in space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zoo_packages.entry import VOCABULARY, Entry, ids, noise, times_and

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
_SLICE, _CUBE = noise(1, 32, 32), noise(1, 16, 16, 16)

_MONAI: dict[str, tuple[str, dict[str, Any], Callable[[], Any]]] = {
    "unet_2d": ("UNet", {**_PLANE, **_STEPS}, _SLICE),
    "unet_3d_residual": ("UNet", {**_SPACE, **_STEPS, "num_res_units": 2}, _CUBE),
    "attention_unet": ("AttentionUnet", {**_PLANE, **_STEPS}, _SLICE),
    "basic_unet": ("BasicUNet", {**_PLANE, "features": _FEATURES}, _SLICE),
    "basic_unet_plus_plus": ("BasicUNetPlusPlus", {**_PLANE, "features": _FEATURES}, _SLICE),
    "flexible_unet": (
        "FlexibleUNet",
        {**_ENDS, "backbone": "efficientnet-b0", "spatial_dims": 2, "in_channels": 3},
        noise(3, 64, 64),
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
        noise(1, 64, 64),
    ),
    "swin_unetr_v2": (
        "SwinUNETR",
        {**_PLANE, "feature_size": 12, "depths": (1, 1, 1, 1), "use_v2": True},
        noise(1, 64, 64),
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
        noise(1, 32, 32, 32),
    ),
    "ahnet": ("AHNet", {**_PLANE, "layers": (1, 1, 1, 1)}, noise(1, 128, 128)),
    "highresnet": ("HighResNet", _PLANE, _SLICE),
    "quicknat": (
        "Quicknat",
        {"num_classes": 4, "num_filters": 8, "se_block": "CSE"},
        noise(1, 32, 32),
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
        noise(2, 32, 32),
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
        times_and("timesteps", x=(1, 16, 16)),
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
        times_and("timesteps", x=(1, 16, 16), context=(5, 12)),
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
        ids,
    ),
    "patch_discriminator": (
        "PatchDiscriminator",
        {"spatial_dims": 2, "channels": 8, "in_channels": 1},
        _SLICE,
    ),
    "fully_connected": (
        "FullyConnectedNet",
        {"in_channels": 12, "out_channels": 3, "hidden_channels": [24, 16]},
        noise(12),
    ),
}


ENTRIES = {
    name: Entry(f"monai.networks.nets.{path}", options, example)
    for name, (path, options, example) in _MONAI.items()
}
