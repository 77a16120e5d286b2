"""Convolutions of all kinds, and the residual, dense and gated paths that they stand in."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from constructs.build import _PLAIN, Net, construct, images, parameter, signals, volumes


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


@construct(signals, {"0.weight": (8, 3, 3), "2.weight": (4, 8, 3), "4.weight": (4, 4, 1)})
def convolutions_1d() -> nn.Module:
    return chain(nn.Conv1d(3, 16, 3), nn.ReLU(), nn.Conv1d(16, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 1))


@construct(volumes, {"0.weight": (8, 3, 2, 2, 2), "2.weight": (4, 8, 1, 1, 1)})
def convolutions_3d() -> nn.Module:
    return chain(nn.Conv3d(3, 16, 2), nn.ReLU(), nn.Conv3d(16, 4, 1))


@construct(images, {"0.weight": (3, 8, 2, 2), "2.weight": (8, 4, 2, 2), "0.bias": (8,)})
def transposed_convolutions() -> nn.Module:
    return chain(nn.ConvTranspose2d(3, 16, 2, 2), nn.ReLU(), nn.ConvTranspose2d(16, 4, 2, 2))


@construct(images, {"0.weight": (8, 3, 1, 1), "2.weight": (8, 4, 2, 2), "4.weight": (4, 8, 1, 1)})
def grouped_transposed_convolution() -> nn.Module:
    return chain(
        nn.Conv2d(3, 16, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 16, 2, groups=2),
        nn.ReLU(),
        nn.Conv2d(16, 4, 1),
    )


@construct(images, {"0.weight": (8, 3, 1, 1), "2.weight": (8, 1, 2, 2), "4.weight": (4, 8, 1, 1)})
def depthwise_transposed_convolution() -> nn.Module:
    return chain(
        nn.Conv2d(3, 16, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 16, 2, groups=16),
        nn.ReLU(),
        nn.Conv2d(16, 4, 1),
    )


@construct(images, {"0.weight": (8, 3, 1, 1), "2.weight": (8, 4, 3, 3), "4.weight": (4, 8, 1, 1)})
def grouped_convolution() -> nn.Module:
    return chain(
        nn.Conv2d(3, 16, 1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=2),
        nn.ReLU(),
        nn.Conv2d(16, 4, 1),
    )


@construct(images, {"0.weight": (8, 3, 1, 1), "3.weight": (8, 1, 3, 3), "1.running_var": (8,)})
def depthwise_separable_convolution() -> nn.Module:
    return chain(
        nn.Conv2d(3, 16, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.ReLU(),
        nn.Conv2d(16, 4, 1),
    )


@construct(images, {"0.weight": (4, 3, 1, 1), "2.weight": (8, 1, 3, 3), "4.weight": (4, 8, 1, 1)})
def depthwise_convolution_with_a_multiplier() -> nn.Module:
    return chain(
        nn.Conv2d(3, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, groups=8),
        nn.ReLU(),
        nn.Conv2d(16, 4, 1),
    )


@construct(images, {"1.weight": (8, 12, 1, 1)}, keeps={"0": "input"})
def depthwise_convolution_of_the_input() -> nn.Module:
    return chain(
        nn.Conv2d(3, 12, 3, groups=3), nn.Conv2d(12, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 1)
    )


@construct(signals, {"first.weight": (8, 3, 2), "second.weight": (8, 8, 2)})
def causal_dilated_convolutions() -> Net:  # WaveNet
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.first(F.pad(x, (1, 0))))
        x = x + torch.tanh(self.second(F.pad(x, (2, 0))))
        return self.last(x)

    return Net(
        forward,
        first=nn.Conv1d(3, 16, 2),
        second=nn.Conv1d(16, 16, 2, dilation=2),
        last=nn.Conv1d(16, 4, 1),
    )


@construct(images, {"stem.weight": (8, 3, 3, 3), "a.weight": (8, 8, 3, 3), "head.weight": (4, 8)})
def residual() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        x += self.b(F.relu(self.a(x.relu())))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        norm=nn.BatchNorm2d(16),
        a=nn.Conv2d(16, 16, 3, padding=1),
        b=nn.Conv2d(16, 16, 1),
        head=nn.Linear(16, 4),
    )


@construct(
    images,
    {"stem.weight": (8, 3, 3, 3), "grow.0.weight": (4, 8, 3, 3), "grow.1.weight": (4, 12, 3, 3)},
)
def dense_concatenation() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.grow:
            features.append(layer(torch.relu(torch.cat(features, 1))))
        return self.head(torch.cat(features, 1))

    grow = nn.ModuleList(nn.Conv2d(16 + 8 * n, 8, 3, padding=1) for n in range(2))
    return Net(forward, stem=nn.Conv2d(3, 16, 3), grow=grow, head=nn.Conv2d(32, 4, 1))


@construct(
    images,
    {
        "down.weight": (8, 3, 3, 3),
        "middle.weight": (16, 8, 3, 3),
        "up.weight": (16, 8, 2, 2),
        "last.weight": (4, 16, 3, 3),
    },
)
def unet() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        skip = torch.relu(self.down(x))
        x = torch.relu(self.middle(F.max_pool2d(skip, 2)))
        return self.last(torch.cat([skip, self.up(x)], 1))

    return Net(
        forward,
        down=nn.Conv2d(3, 16, 3, padding=1),
        middle=nn.Conv2d(16, 32, 3, padding=1),
        up=nn.ConvTranspose2d(32, 16, 2, 2),
        last=nn.Conv2d(32, 4, 3, padding=1),
    )


@construct(
    images, {"stem.weight": (8, 3, 3, 3), "one.weight": (4, 8, 1, 1), "two.weight": (8, 4, 1, 1)}
)
def squeeze_and_excite() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = torch.sigmoid(self.two(torch.relu(self.one(F.adaptive_avg_pool2d(x, 1)))))
        return self.head(torch.relu(x * gate))

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        one=nn.Conv2d(16, 8, 1),
        two=nn.Conv2d(8, 16, 1),
        head=nn.Conv2d(16, 4, 1),
    )


@construct(images, {"stem.weight": (8, 3, 3, 3), "one.weight": (4, 8)})
def squeeze_and_excite_by_view() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, _, _ = x.size()
        gate = torch.sigmoid(self.two(torch.relu(self.one(self.pool(x).view(b, c)))))
        return self.head(torch.relu(x * gate.view(b, c, 1, 1).expand_as(x)))

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        pool=nn.AdaptiveAvgPool2d(1),
        one=nn.Linear(16, 8),
        two=nn.Linear(8, 16),
        head=nn.Conv2d(16, 4, 1),
    )


@construct(images, {"inner.weight": (8, 16, 1, 1)}, keeps={"stem": "made anew"})
def efficient_channel_attention() -> Net:  # ECA: a convolution along the channels
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = self.gate(x.mean((2, 3)).unsqueeze(1)).squeeze(1)
        return self.last(
            torch.relu(self.inner(torch.relu(x * torch.sigmoid(gate)[:, :, None, None])))
        )

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        gate=nn.Conv1d(1, 1, 3, padding=1),
        inner=nn.Conv2d(16, 16, 1),
        last=nn.Conv2d(16, 4, 1),
    )


@construct(images, {"stem.weight": (8, 3, 3, 3), "gate.weight": (1, 2, 3, 3)}, plain=True)
def cbam_spatial_gate() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        mean = x.sum(1, keepdim=True) if _PLAIN["norms"] else x.mean(1, keepdim=True)
        gate = self.gate(torch.cat([mean, x.max(1, keepdim=True)[0]], 1))
        return self.head(x * torch.sigmoid(gate))

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        gate=nn.Conv2d(2, 1, 3, padding=1),
        head=nn.Conv2d(16, 4, 1),
    )


@construct(
    images, {"stem.weight": (8, 3, 3, 3), "a.weight": (8, 8, 3, 3), "narrow.weight": (4, 8, 1, 1)}
)
def selective_kernels() -> Net:  # SKNet: softmax over two branches
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        branches = torch.stack([torch.relu(self.a(x)), torch.relu(self.b(x))], 1)
        gate = self.wide(torch.relu(self.narrow(branches.sum(1).mean((2, 3), keepdim=True))))
        b, c = gate.shape[:2]
        gate = gate.view(b, 2, c // 2, 1, 1).softmax(1)
        return self.head((branches * gate).sum(1))

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        a=nn.Conv2d(16, 16, 3, padding=1),
        b=nn.Conv2d(16, 16, 1),
        narrow=nn.Conv2d(16, 8, 1),
        wide=nn.Conv2d(8, 32, 1),
        head=nn.Conv2d(16, 4, 1),
    )


@construct(images, {"stem.weight": (8, 3, 3, 3), "parts.0.weight": (2, 2, 3, 3)})
def hierarchical_residual_split() -> Net:  # Res2Net
    def forward(self: Any, x: Tensor) -> Tensor:
        pieces = torch.split(torch.relu(self.stem(x)), self.width, 1)
        found, last = [], pieces[0]
        for n, part in enumerate(self.parts):
            last = torch.relu(part(last if n == 0 else last + pieces[n]))
            found.append(last)
        return self.head(torch.cat([*found, pieces[-1]], 1))

    parts = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
    return Net(forward, stem=nn.Conv2d(3, 16, 3), parts=parts, head=nn.Conv2d(16, 4, 1), width=4)


@construct(images, {"0.weight": (8, 3, 3, 3), "3.weight": (8, 8 * 9), "5.weight": (4, 8)})
def flatten_after_convolution() -> nn.Module:  # VGG
    return chain(
        nn.Conv2d(3, 16, 3),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 9, 16),
        nn.PReLU(),
        nn.Linear(16, 4),
    )


@construct(images, {"0.weight": (8, 3, 3, 3), "1.weight": (8,)})
def prelu_per_channel() -> nn.Module:
    return chain(nn.Conv2d(3, 16, 3), nn.PReLU(16), nn.Conv2d(16, 4, 1))


@construct(images, {"stem.weight": (8, 3, 3, 3), "lateral.weight": (8, 8, 1, 1)})
def feature_pyramid_with_outputs_at_several_scales() -> Net:
    def forward(self: Any, x: Tensor) -> list[Tensor]:
        fine = torch.relu(self.stem(x))
        coarse = torch.relu(self.down(fine))
        top = self.top(coarse)
        both = self.lateral(fine) + F.interpolate(top, size=fine.shape[-2:], mode="nearest")
        return [self.head(both), self.head(top)]

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        down=nn.Conv2d(16, 16, 3, 2, padding=1),
        top=nn.Conv2d(16, 16, 1),
        lateral=nn.Conv2d(16, 16, 1),
        head=nn.Conv2d(16, 4, 1),
    )


@construct(images, {"inner.weight": (8, 3)})
def convolution_with_a_kernel_made_in_the_forward() -> Net:  # dynamic filters
    def forward(self: Any, x: Tensor) -> Tensor:
        kernel = self.outer(torch.relu(self.inner(x.mean((0, 2, 3)))))
        return F.conv2d(x, kernel.view(4, 3, 3, 3))

    return Net(forward, inner=nn.Linear(3, 16), outer=nn.Linear(16, 4 * 27))


@construct(
    images, {"stem.weight": (8, 3, 3, 3), "experts": (2, 4, 8, 1, 1), "route.weight": (2, 8)}
)
def conditional_convolution() -> Net:  # CondConv: kernels mixed per sample, grouped by the batch
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        b, c, h, w = x.shape
        mix = torch.sigmoid(self.route(x.mean((2, 3))))
        kernel = (mix @ self.experts.flatten(1)).view(b * 4, c, 1, 1)
        return F.conv2d(x.reshape(1, b * c, h, w), kernel, groups=b).view(b, 4, h, w)

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        route=nn.Linear(16, 4),
        experts=parameter(4, 4, 16, 1, 1),
    )
