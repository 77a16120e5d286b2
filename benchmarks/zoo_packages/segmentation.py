"""Networks of segmentation-models-pytorch: decoders with several encoders."""

from __future__ import annotations

from typing import Any

from zoo_packages.entry import Entry, noise

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
    return Entry(f"segmentation_models_pytorch.{kind}", options, noise(3, size, size))


ENTRIES = {name: _segmentation(kind, encoder) for name, (kind, encoder) in _SEGMENTATION.items()}
