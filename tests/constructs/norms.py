"""Norms over channels, groups, images and batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from constructs.build import (
    _PLAIN,
    Net,
    construct,
    images,
    parameter,
    signals,
    standardized,
    vectors,
    volumes,
)

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
