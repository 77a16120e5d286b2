"""Vision transformers: tokens, positions and scales."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from constructs.attention import angles
from constructs.build import Net, construct, images, parameter, sequences, tokens, vectors


@construct(
    images,
    {"patch.weight": (8, 3, 4, 4), "token": (1, 1, 8), "position": (1, 5, 8), "scale": (8,)},
    plain=True,
)
def class_token_position_and_layer_scale() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        x = x + self.scale * self.mlp(self.norm(x))
        return self.head(x[:, 0])

    return Net(
        forward,
        patch=nn.Conv2d(3, 16, 4, 4),
        token=parameter(1, 1, 16),
        position=parameter(1, 5, 16),
        scale=parameter(16),
        norm=nn.LayerNorm(16),
        mlp=nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)),
        head=nn.Linear(16, 4),
    )


@construct(tokens, {"embed.weight": (12, 8), "position.weight": (8, 8), "up.weight": (16, 8)})
def embedded_positions() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        x = self.embed(x) + self.position(places)
        return self.head(x + self.down(F.gelu(self.up(x))))

    return Net(
        forward,
        embed=nn.Embedding(12, 16),
        position=nn.Embedding(8, 16),
        up=nn.Linear(16, 32),
        down=nn.Linear(32, 16),
        head=nn.Linear(16, 4),
    )


def sinusoids(width: int) -> Tensor:
    return torch.stack([angles(width).sin(), angles(width).cos()], -1).flatten(1)[None]


@construct(sequences, {"embed.weight": (8, 6), "table": (1, 8, 8)})
def sinusoids_in_a_buffer() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.embed(x) + self.table[:, : x.size(1)]))

    return Net(forward, embed=nn.Linear(6, 16), table=sinusoids(16), head=nn.Linear(16, 3))


@construct(sequences, {"inner.weight": (8, 16)}, keeps={"embed": "buffer"})
def sinusoids_in_a_buffer_that_checkpoints_do_not_hold() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.embed(x) + self.table[:, : x.size(1)]
        return self.head(torch.relu(self.inner(torch.relu(x))))

    net = Net(forward, embed=nn.Linear(6, 16), inner=nn.Linear(16, 16), head=nn.Linear(16, 3))
    net.register_buffer("table", sinusoids(16), persistent=False)
    return net


@construct(sequences, {"up.weight": (16, 6)})
def stochastic_depth() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.down(F.gelu(self.up(x)))
        if self.training:
            y = y * (torch.rand(y.shape[0], 1, 1, dtype=y.dtype, device=y.device) < 0.9) / 0.9
        return x + y

    return Net(forward, up=nn.Linear(6, 32), down=nn.Linear(32, 6))


@construct(
    images,
    {"token.0.weight": (4, 4), "channel.0.weight": (16, 8), "patch.weight": (8, 3, 4, 4)},
    plain=True,
)
def mlp_mixer() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.token(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.channel(x)).mean(1))

    return Net(
        forward,
        patch=nn.Conv2d(3, 16, 4, 4),
        norm=nn.LayerNorm(16),
        token=nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)),
        channel=nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)),
        head=nn.Linear(16, 4),
    )


@construct(
    lambda n: (sequences(n), vectors(n)),
    {"embed.weight": (8, 6), "modulation.weight": (24, 6)},
    plain=True,
)
def adaptive_layer_norm() -> Net:  # DiT
    def forward(self: Any, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).unsqueeze(1).chunk(3, -1)
        x = self.embed(x)
        x = x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)
        return self.head(x)

    return Net(
        forward,
        embed=nn.Linear(6, 16),
        modulation=nn.Linear(6, 48),
        norm=nn.LayerNorm(16, elementwise_affine=False),
        mlp=nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16)),
        head=nn.Linear(16, 3),
    )
