"""Traps: what looks like another construct, or reads a width where none is named."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from constructs.attention import SEPARATE, separate
from constructs.attention_of_torch import MHA, mha
from constructs.build import Net, construct, images, parameter, sequences, tokens, vectors
from constructs.convolutions import chain


@construct(sequences, SEPARATE)
def heads_from_attributes_that_depend_on_each_other() -> Net:  # BERT as it was for years
    def forward(self: Any, x: Tensor) -> Tensor:
        def split(t: Tensor) -> Tensor:
            return t.view(*t.size()[:-1], self.heads, self.head_dim).permute(0, 2, 1, 3)

        scores = split(self.q(x)) @ split(self.k(x)).transpose(-1, -2) / math.sqrt(self.head_dim)
        x = (scores.softmax(-1) @ split(self.v(x))).permute(0, 2, 1, 3).contiguous()
        return self.proj(x.view(*x.size()[:-2], self.all_head_size))

    return separate(forward, all_head_size=16)


@construct(vectors, {"inner.weight": (8, 16)}, keeps={"up": "written in the code"})
def sizes_in_a_dict() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.up(x).view(-1, self.sizes["parts"], self.sizes["width"]).amax(1)
        return self.down(torch.relu(self.inner(torch.relu(x))))

    return Net(
        forward,
        sizes={"parts": 2, "width": 16},
        up=nn.Linear(6, 32),
        inner=nn.Linear(16, 16),
        down=nn.Linear(16, 3),
    )


@construct(vectors, {"inner.weight": (8, 16)}, keeps={"up": ""})
def sum_divided_by_the_width() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.up(x)
        x = x - x.sum(-1, keepdim=True) / x.shape[-1]
        return self.down(torch.relu(self.inner(torch.relu(x))))

    return Net(forward, up=nn.Linear(6, 16), inner=nn.Linear(16, 16), down=nn.Linear(16, 3))


@construct(
    images, {"stem.weight": (8, 3, 3, 3), "last.weight": (4, 8, 1, 1), "kernel": (8, 1, 3, 3)}
)
def blur_with_a_kernel_per_channel() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = F.conv2d(F.pad(x, (1, 1, 1, 1)), self.kernel, stride=2, groups=x.shape[1])
        return self.last(x)

    ramp = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = torch.outer(ramp, ramp).repeat(16, 1, 1, 1)
    return Net(forward, stem=nn.Conv2d(3, 16, 3), kernel=kernel, last=nn.Conv2d(16, 4, 1))


@construct(
    images, {"stem.weight": (8, 3, 3, 3), "last.weight": (4, 8, 1, 1), "kernel": (1, 1, 3, 3)}
)
def blur_with_one_expanded_kernel() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        kernel = self.kernel.expand(x.shape[1], -1, -1, -1)
        return self.last(F.conv2d(x, kernel, groups=x.shape[1]))

    ramp = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = torch.outer(ramp, ramp)[None, None]
    return Net(forward, stem=nn.Conv2d(3, 16, 3), kernel=kernel, last=nn.Conv2d(16, 4, 1))


@construct(images, {"up.weight": (8, 3, 3, 3), "norm.weight": (8, 6, 6)}, plain=True)
def layer_norm_over_whole_images() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.norm(self.up(x))))

    return Net(
        forward, up=nn.Conv2d(3, 16, 3), norm=nn.LayerNorm([16, 6, 6]), down=nn.Conv2d(16, 4, 1)
    )


@construct(images, {"0.weight": (8, 3, 3, 3), "2.weight": (8 * 36,), "3.weight": (4, 8 * 36)})
def batch_norm_of_flattened_images() -> nn.Module:
    return chain(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.BatchNorm1d(16 * 36), nn.Linear(16 * 36, 4))


@construct(vectors, {"0.weight": (16, 6), "2.weight": (4, 4, 3), "4.weight": (4, 4, 2)})
def unflatten_module() -> nn.Module:
    return chain(
        nn.Linear(6, 32),
        nn.Unflatten(1, (8, 4)),
        nn.Conv1d(8, 8, 3),
        nn.ReLU(inplace=True),
        nn.Conv1d(8, 4, 2),
    )


@construct(images, {"0.weight": (8, 3, 3, 3), "2.weight": (8, 8, 3, 3)})
def padding_by_mode_and_name() -> nn.Module:
    return chain(
        nn.Conv2d(3, 16, 3, padding=1, padding_mode="circular"),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 16, 3, padding="same"),
        nn.ReLU(),
        nn.Conv2d(16, 4, 1),
    )


@construct(images, {"down.weight": (8, 3, 3, 3), "up.weight": (8, 8, 3, 3)})
def unpooling() -> Net:  # SegNet
    def forward(self: Any, x: Tensor) -> Tensor:
        x, places = F.max_pool2d(self.down(x), 2, return_indices=True)
        return self.last(torch.relu(self.up(F.max_unpool2d(x, places, 2))))

    return Net(
        forward,
        down=nn.Conv2d(3, 16, 3, padding=1),
        up=nn.Conv2d(16, 16, 3, padding=1),
        last=nn.Conv2d(16, 4, 1),
    )


@construct(vectors, {"up.weight": (8, 6), "weight": (8, 3)})
def tensor_product_with_raw_parameters() -> Net:
    return Net(
        lambda self, x: torch.tensordot(torch.relu(self.up(x)), self.weight, dims=([1], [0])),
        up=nn.Linear(6, 16),
        weight=parameter(16, 3),
    )


@construct(vectors, {"up.weight": (8, 6), "direction": (8,)})
def product_with_a_vector() -> Net:
    return Net(
        lambda self, x: torch.relu(self.up(x)) @ self.direction,
        up=nn.Linear(6, 16),
        direction=parameter(16),
    )


@construct(vectors, {"up.weight": (8, 6), "inner.weight": (8, 8), "centres": (7, 8)})
def distances_to_centres() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.inner(torch.relu(self.up(x)))
        return torch.exp(-torch.cdist(x, self.centres).square())

    return Net(
        forward,
        up=nn.Linear(6, 16),
        inner=nn.Linear(16, 16),
        centres=parameter(7, 16),
    )


@construct(vectors, {"up.weight": (8, 6), "down.weight": (3, 8)})
def one_sided_operations() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.up(x)
        x = torch.maximum(x, torch.tanh(x)) + torch.lerp(x, x.square(), 0.3).clamp(-2, 2)
        x = torch.where(x > 0, x, x * self.slope) + torch.addcmul(x, x, self.slope)
        return self.down(torch.nan_to_num(x.masked_fill(x > 5, 0.0)))

    return Net(forward, up=nn.Linear(6, 16), slope=parameter(16), down=nn.Linear(16, 3))


@construct(vectors, {"up.weight": (8, 6), "down.weight": (3, 4)})
def in_place_on_pieces() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        a, b = self.up(x).clone().tensor_split(2, 1)
        return self.down(a.mul_(2).relu_() + b.sigmoid())

    return Net(forward, up=nn.Linear(6, 16), down=nn.Linear(8, 3))


@construct(vectors, {"up.weight": (8, 6), "down.weight": (3, 8)})
def rows_chosen_by_a_mask() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        keep = x.sum(1) > -100
        y = torch.relu(self.up(x))
        return self.down(y[keep] + y[torch.arange(len(y))])

    return Net(forward, up=nn.Linear(6, 16), down=nn.Linear(16, 3))


@construct(
    vectors, {"student.0.weight": (8, 6), "student.2.weight": (4, 8)}, keeps={"teacher.0": "frozen"}
)
def frozen_teacher_beside_a_student() -> Net:
    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            goal = self.teacher(x)
        return self.student(x), goal

    def branch() -> nn.Module:
        return chain(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))

    return Net(forward, student=branch(), teacher=branch().requires_grad_(False))


@construct(vectors, {"net.0.weight": (8, 3), "net.2.weight": (6, 8)})
def coupling_layer() -> Net:  # RealNVP
    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, 1)
        scale, shift = self.net(a).chunk(2, 1)
        return torch.cat([a, b * torch.exp(torch.tanh(scale)) + shift], 1), scale.sum(1)

    return Net(forward, net=chain(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 6)))


@construct(vectors, {"up.weight": (8, 6)}, keeps={"mix": ""})
def determinant_of_a_weight() -> Net:  # Glow
    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        size = torch.linalg.slogdet(self.mix.weight)[1]
        return self.down(torch.relu(self.up(torch.relu(self.mix(x))))), size

    return Net(forward, mix=nn.Linear(6, 6), up=nn.Linear(6, 16), down=nn.Linear(16, 3))


@construct(vectors, {"inner.weight": (8, 16)}, keeps={"up": ""})
def penalty_of_a_weight_among_the_outputs() -> Net:
    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.down(torch.relu(self.inner(torch.relu(self.up(x)))))
        return y, self.up.weight @ self.up.weight.t()

    return Net(forward, up=nn.Linear(6, 16), inner=nn.Linear(16, 16), down=nn.Linear(16, 3))


@construct(sequences, {"embed.weight": (9, 6)})  # 7 of the 15 that may go
def first_channel_read_apart() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(torch.relu(x)) + x[..., -1:].tanh()

    return Net(forward, embed=nn.Linear(6, 16), head=nn.Linear(16, 3))


@construct(
    images,
    {"stem.weight": (8, 3, 3, 3), "branch.0.weight": (4, 8, 1, 1), "short.weight": (8, 8, 1, 1)},
)
def bottleneck_with_a_projected_shortcut() -> Net:  # ResNet-50
    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.relu_(self.stem(x))
        x = F.relu_(self.branch(x) + self.short(x))
        return self.head(self.pool(x).flatten(1))

    branch = chain(
        nn.Conv2d(16, 8, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 1, bias=False),
        nn.BatchNorm2d(16),
    )
    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        branch=branch,
        short=nn.Conv2d(16, 16, 1, bias=False),
        pool=nn.AdaptiveAvgPool2d(1),
        head=nn.Linear(16, 4),
    )


@construct(
    images,
    {"stem.weight": (8, 3, 3, 3), "parts.0.weight": (4, 8, 1, 1), "last.weight": (4, 16, 1, 1)},
)
def inception_branches() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        found = [part(x) for part in self.parts] + [F.max_pool2d(x, 3, 1, 1)]
        return self.last(torch.relu(torch.cat(found, dim=1)))

    parts = nn.ModuleList([nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 3, padding=1)])
    return Net(forward, stem=nn.Conv2d(3, 16, 3), parts=parts, last=nn.Conv2d(32, 4, 1))


@construct(images, {"stem.weight": (8, 3, 3, 3)})
def group_norm_then_grouped_convolution() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        return self.last(torch.relu(self.grouped(torch.relu(x))))

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        norm=nn.GroupNorm(8, 16),
        grouped=nn.Conv2d(16, 32, 1, groups=8),
        last=nn.Conv2d(32, 4, 1),
    )


@construct(sequences, {"layer.weight_ih_l0": (24, 6), "mix.weight": (8, 8)})
def recurrent_layer_on_a_residual_path() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.layer(x)[0]
        return self.head(x + torch.tanh(self.mix(x)))

    return Net(
        forward,
        layer=nn.GRU(6, 16, batch_first=True, bias=False),
        mix=nn.Linear(16, 16),
        head=nn.Linear(16, 3),
    )


@construct(
    sequences,
    {"layer.weight_ih_l0": (32, 8), "layer.weight_ih_l1_reverse": (32, 16), "embed.weight": (8, 6)},
)
def deep_lstm_in_both_directions() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        output, (hidden, _) = self.layer(self.embed(x))
        return self.head(torch.cat([output[:, -1], hidden[-2], hidden[-1]], -1))

    return Net(
        forward,
        embed=nn.Linear(6, 16),
        layer=nn.LSTM(16, 16, 2, batch_first=True, bidirectional=True),
        head=nn.Linear(64, 3),
    )


@construct(
    lambda n: (tokens(n), tokens(n)),
    {"embed.weight": (12, 8), "encoder.weight_ih_l0": (24, 8), "decoder.weight_ih_l0": (24, 8)},
)
def encoder_state_starts_the_decoder() -> Net:  # sequence to sequence
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        _, state = self.encoder(self.embed(x))
        return self.head(self.decoder(self.embed(y), state)[0])

    return Net(
        forward,
        embed=nn.Embedding(12, 16),
        encoder=nn.GRU(16, 16, batch_first=True),
        decoder=nn.GRU(16, 16, batch_first=True),
        head=nn.Linear(16, 12),
    )


@construct(sequences, MHA)
def functional_attention_with_a_modules_weights() -> Net:
    def call(self: Any, x: Tensor) -> Tensor:
        x, a = x.transpose(0, 1), self.attention
        y, _ = F.multi_head_attention_forward(
            x,
            x,
            x,
            a.embed_dim,
            a.num_heads,
            a.in_proj_weight,
            a.in_proj_bias,
            None,
            None,
            False,
            0.0,
            a.out_proj.weight,
            a.out_proj.bias,
            need_weights=False,
        )
        return self.head((x + y).transpose(0, 1))

    return mha(call)


@construct(vectors, {"base.weight": (8, 6), "down.weight": (3, 8)})
def functional_call_of_a_module() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        shifted = {k: v * 1.5 for k, v in self.base.named_parameters()}
        return self.down(torch.relu(torch.func.functional_call(self.base, shifted, (x,))))

    return Net(forward, base=nn.Linear(6, 16), down=nn.Linear(16, 3))


@construct(
    lambda n: torch.randn(n, 4, 6), {"queries.weight": (8, 6), "up.weight": (8, 8)}, plain=False
)
def tokens_as_many_as_heads() -> Net:
    """Four tokens, four heads, heads four wide: sizes must be told apart by what they count."""

    def forward(self: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.queries(x).view(b, n, self.heads, self.width).transpose(1, 2)
        x = F.scaled_dot_product_attention(q, q, q, scale=0.5)
        x = x.transpose(1, 2).reshape(b, n, self.heads * self.width)
        return self.down(torch.relu(self.up(x)))

    return Net(
        forward,
        queries=nn.Linear(6, 16),
        up=nn.Linear(16, 16),
        down=nn.Linear(16, 3),
        heads=4,
        width=4,
    )
