"""Networks of diffusers, segmentation-models-pytorch, monai, vit-pytorch and x-transformers, by configuration.

As many different kinds as possible, each small: `zoo.build("monai/unet_2d")` makes one, with random weights.
An entry is the class, as package and path, its arguments, and what makes two samples of its input.
"""

from zoo_packages import diffusers, monai, segmentation, vit_pytorch, x_transformers
from zoo_packages.entry import Entry

ENTRIES: dict[str, dict[str, Entry]] = {
    "diffusers": diffusers.ENTRIES,
    "segmentation_models_pytorch": segmentation.ENTRIES,
    "monai": monai.ENTRIES,
    "vit_pytorch": vit_pytorch.ENTRIES,
    "x_transformers": x_transformers.ENTRIES,
}
"""The networks of each package, by name."""
