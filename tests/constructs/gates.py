"""Gates and splits, shuffles of channels and patches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from constructs.build import Net, construct, images, vectors


@construct(vectors, {"up.weight": (16, 6), "down.weight": (3, 8)})
def glu() -> Net:
    return Net(
        lambda self, x: self.down(F.glu(self.up(x), -1)), up=nn.Linear(6, 32), down=nn.Linear(16, 3)
    )


@construct(images, {"up.weight": (16, 3, 3, 3), "down.weight": (4, 8, 1, 1)})
def glu_module_over_channels() -> Net:
    return Net(
        lambda self, x: self.down(self.glu(self.up(x))),
        up=nn.Conv2d(3, 32, 3),
        glu=nn.GLU(dim=1),
        down=nn.Conv2d(16, 4, 1),
    )


@construct(vectors, {"up.weight": (16, 6), "down.weight": (3, 8)})
def geglu_by_chunk() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x, gate = self.up(x).chunk(2, dim=-1)
        return self.down(x * F.gelu(gate))

    return Net(forward, up=nn.Linear(6, 32), down=nn.Linear(16, 3))


@construct(vectors, {"up.weight": (8, 6), "gate.weight": (8, 6), "down.weight": (3, 8)})
def swiglu_of_two_layers() -> Net:
    return Net(
        lambda self, x: self.down(F.silu(self.gate(x)) * self.up(x)),
        up=nn.Linear(6, 16, bias=False),
        gate=nn.Linear(6, 16, bias=False),
        down=nn.Linear(16, 3, bias=False),
    )


@construct(vectors, {"up.weight": (16, 6), "down.weight": (3, 8)})
def swiglu_by_slices() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.up(x)
        half = x.shape[-1] // 2
        return self.down(F.silu(x[..., :half]) * x[..., half:])

    return Net(forward, up=nn.Linear(6, 32), down=nn.Linear(16, 3))


@construct(vectors, {"up.weight": (16, 6), "down.weight": (3, 8)})
def gate_of_interleaved_rows() -> Net:  # gpt-oss: gate and up in alternating places
    def forward(self: Any, x: Tensor) -> Tensor:
        x, gate = self.up(x).unflatten(-1, (-1, 2)).unbind(-1)
        return self.down(x * torch.sigmoid(gate))

    return Net(forward, up=nn.Linear(6, 32), down=nn.Linear(16, 3))


@construct(
    images,
    {"one.weight": (8, 3, 1, 1), "parts.0.weight": (4, 4, 3, 3), "two.weight": (4, 16, 1, 1)},
)
def c2f_of_yolov8() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = list(self.one(x).chunk(2, 1))
        y.extend(part(y[-1]) for part in self.parts)
        return self.two(torch.cat(y, 1))

    parts = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
    return Net(forward, one=nn.Conv2d(3, 16, 1), parts=parts, two=nn.Conv2d(32, 4, 1))


@construct(
    images, {"one.weight": (8, 3, 1, 1), "part.weight": (4, 4, 3, 3), "two.weight": (4, 12, 1, 1)}
)
def c2f_by_split_with_its_own_width() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = list(self.one(x).split((self.c, self.c), 1))
        y.append(self.part(y[-1]))
        return self.two(torch.cat(y, 1))

    part = nn.Conv2d(8, 8, 3, padding=1)
    return Net(forward, one=nn.Conv2d(3, 16, 1), part=part, two=nn.Conv2d(24, 4, 1), c=8)


@construct(vectors, {"up.weight": (14, 6), "wide.weight": (3, 8), "narrow.weight": (3, 4)})
def unequal_split_by_attributes() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        a, b, c = torch.split(self.up(x), [self.one, self.two, self.three], dim=-1)
        return self.wide(torch.relu(a)) + self.narrow(torch.relu(b)) + self.last(torch.relu(c))

    return Net(
        forward,
        up=nn.Linear(6, 28),
        wide=nn.Linear(16, 3),
        narrow=nn.Linear(8, 3),
        last=nn.Linear(4, 3),
        one=16,
        two=8,
        three=4,
    )


@construct(vectors, {"inner.weight": (8, 16)}, keeps={"up": "written in the code"})
def split_sizes_written_in_the_code() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        a, b = self.up(x).split([8, 8], -1)
        return self.down(torch.relu(self.inner(torch.cat([torch.relu(a), torch.tanh(b)], -1))))

    return Net(forward, up=nn.Linear(6, 16), inner=nn.Linear(16, 16), down=nn.Linear(16, 3))


@construct(vectors, {"up.weight": (8, 6)})
def narrow_by_attribute() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.down(torch.relu(x.narrow(1, 0, self.half)) * x.narrow(1, self.half, self.half))

    return Net(forward, up=nn.Linear(6, 16), down=nn.Linear(8, 3), half=8)


@construct(images, {"up.weight": (8, 3, 3, 3)})
def partial_convolution() -> Net:  # FasterNet: a convolution of the first channels only
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.up(x)
        a, b = x[:, : self.part], x[:, self.part :]
        return self.down(torch.relu(torch.cat([self.inner(a), b], 1)))

    return Net(
        forward,
        up=nn.Conv2d(3, 16, 3),
        inner=nn.Conv2d(4, 4, 3, padding=1),
        down=nn.Conv2d(16, 4, 1),
        part=4,
    )


@construct(images, {"up.weight": (8, 3, 1, 1), "down.weight": (4, 8, 1, 1)})
def channel_shuffle_by_view() -> Net:  # ShuffleNet
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.up(x))
        b, c, h, w = x.shape
        x = x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.down(self.inner(x))

    return Net(
        forward,
        up=nn.Conv2d(3, 16, 1),
        inner=nn.Conv2d(16, 16, 3, padding=1, groups=2),
        down=nn.Conv2d(16, 4, 1),
        groups=2,
    )


@construct(images, {"up.weight": (8, 3, 1, 1), "down.weight": (4, 8, 1, 1)})
def channel_shuffle_module() -> Net:
    return Net(
        lambda self, x: self.down(torch.relu(self.shuffle(self.up(x)))),
        up=nn.Conv2d(3, 16, 1),
        shuffle=nn.ChannelShuffle(4),
        down=nn.Conv2d(16, 4, 1),
    )


@construct(images, {"up.weight": (16, 3, 3, 3), "down.weight": (4, 4, 1, 1)})
def pixel_shuffle() -> Net:
    return Net(
        lambda self, x: self.down(self.shuffle(self.up(x))),
        up=nn.Conv2d(3, 32, 3, padding=1),
        shuffle=nn.PixelShuffle(2),
        down=nn.Conv2d(8, 4, 1),
    )


@construct(images, {"up.weight": (4, 3, 3, 3), "down.weight": (4, 16, 1, 1)})
def pixel_unshuffle() -> Net:
    return Net(
        lambda self, x: self.down(F.pixel_unshuffle(torch.relu(self.up(x)), 2)),
        up=nn.Conv2d(3, 8, 3, padding=1),
        down=nn.Conv2d(32, 4, 1),
    )


@construct(images, {"up.weight": (4, 3, 3, 3), "reduce.weight": (8, 16)})
def patch_merging_by_strided_slices() -> Net:  # Swin
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.up(x)).permute(0, 2, 3, 1)
        corners = [x[:, i::2, j::2] for j in range(2) for i in range(2)]
        return self.down(torch.relu(self.reduce(torch.cat(corners, -1))))

    return Net(
        forward,
        up=nn.Conv2d(3, 8, 3, padding=1),
        reduce=nn.Linear(32, 16),
        down=nn.Linear(16, 4),
    )


@construct(images, {"up.weight": (4, 3, 3, 3), "down.weight": (4, 36)})
def unfolded_patches() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        patches = F.unfold(torch.relu(self.up(x)), 3, padding=1)  # (batch, channels * 9, places)
        return self.down(patches.transpose(1, 2))

    return Net(forward, up=nn.Conv2d(3, 8, 3, padding=1), down=nn.Linear(72, 4))


@construct(vectors, {"up.weight": (16, 6), "down.weight": (3, 8)})
def maxout() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.down(x.view(x.shape[0], -1, 2).amax(-1))

    return Net(forward, up=nn.Linear(6, 32), down=nn.Linear(16, 3))
