"""Small networks whose cuts are made wrong on purpose: one for each way in which channels are wired.

They need nothing but torch. Each is a function that makes the network and two samples for it; many end in
a mean or a maximum over pixels, tokens or channels, behind which a proof by replayed statistics is blind
unless it looks at what they are taken over.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Made = tuple[nn.Module, Any]
NETS: dict[str, Callable[[], Made]] = {}


class Net(nn.Module):
    """A forward, and the modules and parameters that it uses."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.body = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any) -> Any:
        return self.body(self, *args)


def net(make: Callable[[], Made]) -> Callable[[], Made]:
    NETS[make.__name__] = make
    return make


def conv(ins: int, outs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(ins, outs, kernel, padding=kernel // 2, **options)


def images(*shape: int) -> Tensor:
    return torch.randn(2, *(shape or (3, 8, 8)))


def sequences() -> Tensor:
    return torch.randn(2, 6, 8)


def tokens() -> Tensor:
    return torch.randint(0, 20, (2, 6))


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5)


def residual(inner: nn.Module) -> nn.Module:
    return Net(lambda s, x: x + s.inner(x), inner=inner)


def mlp(width: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def mean_of(*dims: int) -> nn.Module:
    return Net(lambda _, x: x.mean(dims))


class Attention(nn.Module):
    """Fused or separate projections; `shared` heads of keys and values for all."""

    def __init__(self, width: int, heads: int, shared: int = 0, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.shared, self.causal = heads, shared, causal
        self.size = width // heads
        if shared:
            self.q = nn.Linear(width, width)
            self.kv = nn.Linear(width, 2 * shared * self.size)
        else:
            self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        if self.shared:
            q = self.q(x).view(b, n, self.heads, self.size).transpose(1, 2)
            k, v = self.kv(x).view(b, n, 2, self.shared, self.size).permute(2, 0, 3, 1, 4)
            k, v = (t.repeat_interleave(self.heads // self.shared, 1) for t in (k, v))
        else:
            q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(b, n, -1))


def block(width: int, **options: Any) -> nn.Module:
    attention = nn.Sequential(nn.LayerNorm(width), Attention(width, 4, **options))
    return nn.Sequential(
        residual(attention), residual(nn.Sequential(nn.LayerNorm(width), mlp(width, 24)))
    )


# -- means over pixels and tokens -------------------------------------------------------------------


@net
def perceptron() -> Made:
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3)
    ), torch.randn(2, 8)


@net
def mixer() -> Made:
    def one(width: int) -> nn.Module:
        across = Net(lambda s, x: s.inner(x.mT).mT, inner=mlp(16, 12))
        return nn.Sequential(
            residual(nn.Sequential(nn.LayerNorm(width), across)),
            residual(nn.Sequential(nn.LayerNorm(width), mlp(width, 20))),
        )

    patches = Net(lambda s, x: s.inner(x).flatten(2).mT, inner=nn.Conv2d(3, 16, 2, 2))
    return nn.Sequential(
        patches, one(16), one(16), nn.LayerNorm(16), mean_of(1), nn.Linear(16, 5)
    ), images()


@net
def vit_average() -> Made:
    patches = Net(
        lambda s, x: s.inner(x).flatten(2).mT + s.places,
        inner=nn.Conv2d(3, 16, 4, 4),
        places=weight(4, 16),
    )
    return nn.Sequential(
        patches, block(16), block(16), mean_of(1), nn.LayerNorm(16), nn.Linear(16, 5)
    ), images()


@net
def vit_class_token() -> Made:
    def start(s: Any, x: Tensor) -> Tensor:
        x = s.inner(x).flatten(2).mT
        return torch.cat([s.token.expand(len(x), -1, -1), x], 1)

    patches = Net(start, inner=nn.Conv2d(3, 16, 4, 4), token=weight(1, 1, 16))
    first = Net(lambda _, x: x[:, 0])
    return nn.Sequential(patches, block(16), nn.LayerNorm(16), first, nn.Linear(16, 5)), images()


@net
def residual_convolutions() -> Made:
    def one(width: int) -> nn.Module:
        return nn.Sequential(
            residual(
                nn.Sequential(conv(width, 12), nn.BatchNorm2d(12), nn.ReLU(), conv(12, width))
            ),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )

    return nn.Sequential(
        conv(3, 16), one(16), one(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    ), images()


@net
def inverted_bottlenecks() -> Made:
    def squeeze(s: Any, x: Tensor) -> Tensor:
        return x * torch.sigmoid(s.up(F.relu(s.down(x.mean((2, 3), keepdim=True)))))

    def one() -> nn.Module:
        gate = Net(squeeze, down=conv(16, 6, 1), up=conv(6, 16, 1))
        return residual(
            nn.Sequential(
                conv(8, 16, 1, bias=False),
                nn.BatchNorm2d(16),
                nn.Hardswish(),
                conv(16, 16, groups=16, bias=False),
                nn.BatchNorm2d(16),
                nn.Hardswish(),
                gate,
                conv(16, 8, 1),
            )
        )

    return nn.Sequential(
        conv(3, 8), one(), one(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    ), images()


@net
def convnext() -> Made:
    def one(width: int) -> nn.Module:
        def forward(s: Any, x: Tensor) -> Tensor:
            y = s.norm(s.depth(x).permute(0, 2, 3, 1))
            return x + (s.scale * s.mlp(y)).permute(0, 3, 1, 2)

        parts = {"depth": conv(width, width, 7, groups=width), "norm": nn.LayerNorm(width)}
        return Net(forward, **parts, mlp=mlp(width, 24), scale=weight(width))

    return nn.Sequential(
        nn.Conv2d(3, 12, 2, 2), one(12), one(12), mean_of(2, 3), nn.LayerNorm(12), nn.Linear(12, 5)
    ), images()


@net
def global_response() -> Made:
    def grn(s: Any, x: Tensor) -> Tensor:
        size = x.norm(dim=(1, 2), keepdim=True)
        return x + s.gain * x * (size / (size.mean(-1, keepdim=True) + 1e-6)) + s.shift

    inner = nn.Sequential(
        nn.Linear(12, 24), nn.GELU(), Net(grn, gain=weight(24), shift=weight(24)), nn.Linear(24, 12)
    )
    last = Net(lambda _, x: x.permute(0, 2, 3, 1))
    return nn.Sequential(conv(3, 12), last, residual(inner), mean_of(1, 2), nn.Linear(12, 5)), (
        images()
    )


@net
def dense_connections() -> Made:
    def grow(ins: int) -> nn.Module:
        inner = nn.Sequential(nn.BatchNorm2d(ins), nn.ReLU(), conv(ins, 6))
        return Net(lambda s, x: torch.cat([x, s.inner(x)], 1), inner=inner)

    return nn.Sequential(
        conv(3, 8), grow(8), grow(14), conv(20, 10, 1), grow(10), mean_of(2, 3), nn.Linear(16, 5)
    ), images()


@net
def unet() -> Made:
    def forward(s: Any, x: Tensor) -> Tensor:
        a = F.relu(s.a(x))
        b = F.relu(s.b(F.max_pool2d(a, 2)))
        up = s.up(b)
        return s.out(F.relu(s.c(torch.cat([a, up], 1))))

    return Net(
        forward,
        a=conv(3, 8),
        b=conv(8, 16),
        up=nn.ConvTranspose2d(16, 8, 2, 2),
        c=conv(16, 8),
        out=conv(8, 2, 1),
    ), images()


@net
def long_short_term() -> Made:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.out(s.mid(s.rnn(s.start(x))[0].mean(1)).relu())

    return Net(
        forward,
        start=nn.Linear(8, 12),
        rnn=nn.LSTM(12, 10, 2, batch_first=True, bidirectional=True),
        mid=nn.Linear(20, 12),
        out=nn.Linear(12, 3),
    ), sequences()


@net
def gpt_with_tied_head() -> Made:
    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.norm(s.blocks(s.embed(x) + s.places.weight[: x.shape[1]]))
        return s.head(x)

    embed, head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
    head.weight = embed.weight
    blocks = nn.Sequential(block(16, causal=True), block(16, causal=True))
    return Net(
        forward,
        embed=embed,
        places=nn.Embedding(8, 16),
        blocks=blocks,
        norm=nn.LayerNorm(16),
        head=head,
    ), tokens()


@net
def llama() -> Made:
    def gated(s: Any, x: Tensor) -> Tensor:
        return s.down(F.silu(s.gate(x)) * s.up(x))

    def one(width: int) -> nn.Module:
        swiglu = Net(
            gated,
            gate=nn.Linear(width, 24, bias=False),
            up=nn.Linear(width, 24, bias=False),
            down=nn.Linear(24, width, bias=False),
        )
        return nn.Sequential(
            residual(nn.Sequential(nn.RMSNorm(width), Attention(width, 4, shared=2, causal=True))),
            residual(nn.Sequential(nn.RMSNorm(width), swiglu)),
        )

    return nn.Sequential(
        nn.Embedding(20, 16), one(16), one(16), nn.RMSNorm(16), nn.Linear(16, 20)
    ), tokens()


@net
def octave_convolution() -> Made:
    def forward(s: Any, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        up = F.interpolate(s.up(low), scale_factor=2)
        return F.relu(s.high(high) + up), F.relu(s.low(low) + s.down(F.avg_pool2d(high, 2)))

    def octave(high: tuple[int, int], low: tuple[int, int]) -> nn.Module:
        parts = {"high": conv(*high), "low": conv(*low)}
        parts |= {"up": conv(low[0], high[1]), "down": conv(high[0], low[1])}
        return Net(forward, **parts)

    def whole(s: Any, x: Tensor) -> Tensor:
        pair = s.one(x, F.avg_pool2d(x, 2))
        high, low = s.two(*pair)
        return s.out(torch.cat([high.mean((2, 3)), low.mean((2, 3))], 1))

    one, two = octave((3, 24), (3, 8)), octave((24, 24), (8, 8))
    return Net(whole, one=one, two=two, out=nn.Linear(32, 5)), images()


@net
def grouped_convolutions() -> Made:
    return nn.Sequential(
        conv(3, 16),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        conv(16, 16, groups=4),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        conv(16, 12, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    ), images()


@net
def shuffled_channels() -> Made:
    return nn.Sequential(
        conv(3, 16, 1),
        nn.ChannelShuffle(2),
        nn.ReLU(),
        conv(16, 12, groups=2),
        nn.ReLU(),
        mean_of(2, 3),
        nn.Linear(12, 5),
    ), images()


@net
def torch_encoder() -> Made:
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(8, 16), encoder, mean_of(1), nn.Linear(16, 3)), sequences()


@net
def torch_decoder() -> Made:
    def forward(s: Any, x: Tensor) -> Tensor:
        memory = s.start(x)
        return s.out(s.decoder(s.queries.expand(len(x), -1, -1), memory).amax(1))

    layer = nn.TransformerDecoderLayer(16, 4, 24, batch_first=True)
    return Net(
        forward,
        start=nn.Linear(8, 16),
        queries=weight(1, 5, 16),
        decoder=nn.TransformerDecoder(layer, 1),
        out=nn.Linear(16, 3),
    ), sequences()


# -- means and maxima over channels -----------------------------------------------------------------


@net
def spatial_attention() -> Made:
    def gate(s: Any, x: Tensor) -> Tensor:
        both = torch.stack([x.mean(1), x.amax(1)], 1)
        return x * torch.sigmoid(s.gate(both))

    return nn.Sequential(
        conv(3, 12), nn.ReLU(), conv(12, 12), nn.ReLU(), Net(gate, gate=conv(2, 1, 7)), conv(12, 4)
    ), images()


@net
def mean_over_channels_only() -> Made:
    return nn.Sequential(
        conv(3, 12), nn.ReLU(), conv(12, 10), nn.ReLU(), mean_of(1), nn.Flatten(), nn.Linear(64, 5)
    ), images()


@net
def spread_over_channels_only() -> Made:
    last = Net(lambda _, x: torch.cat([x.std(-1), x.amax(-1)], -1))
    return nn.Sequential(
        nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 10), nn.ReLU(), last, nn.Linear(12, 3)
    ), sequences()


@net
def two_means() -> Made:
    """The first over channels, the second over pixels."""
    centred = Net(lambda _, x: x - x.mean(1, keepdim=True))
    return nn.Sequential(
        conv(3, 12), centred, nn.ReLU(), conv(12, 10), centred, mean_of(2, 3), nn.Linear(10, 5)
    ), images()


@net
def own_norms() -> Made:
    def rms(s: Any, x: Tensor) -> Tensor:
        return s.gain * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    def layer(s: Any, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
        return (x - mean) / (variance + 1e-5).sqrt() * s.gain

    return nn.Sequential(
        nn.Linear(8, 12),
        Net(rms, gain=weight(12)),
        nn.Linear(12, 16),
        nn.GELU(),
        Net(layer, gain=weight(16)),
        nn.Linear(16, 3),
    ), sequences()


@net
def instance_norms() -> Made:
    return nn.Sequential(
        conv(3, 12),
        nn.InstanceNorm2d(12, affine=True),
        nn.ReLU(),
        conv(12, 10),
        nn.GroupNorm(1, 10),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(10, 5),
    ), images()


@net
def norms_of_heads() -> Made:
    """Queries and keys of every head are normed, as many large models do."""

    def forward(s: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = s.qkv(x).view(b, n, 3, s.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(s.q_norm(q), s.k_norm(k), v)
        return s.out(y.transpose(1, 2).reshape(b, n, -1))

    attention = Net(
        forward,
        qkv=nn.Linear(16, 48),
        q_norm=nn.LayerNorm(4),
        k_norm=nn.RMSNorm(4),
        out=nn.Linear(16, 16),
        heads=4,
    )
    return nn.Sequential(nn.Linear(8, 16), residual(attention), mean_of(1), nn.Linear(16, 3)), (
        sequences()
    )


@net
def standardized_weights() -> Made:
    class Standard(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            flat = self.weight.reshape(1, self.out_channels, -1)
            own = F.batch_norm(flat, None, None, training=True).view_as(self.weight)
            return F.conv2d(x, own, self.bias, padding=1)

    return nn.Sequential(
        Standard(3, 12, 3),
        nn.ReLU(),
        Standard(12, 10, 3),
        nn.GroupNorm(2, 10),
        nn.ReLU(),
        mean_of(2, 3),
        nn.Linear(10, 5),
    ), images()


@net
def normed_weights() -> Made:
    norm = nn.utils.parametrizations.weight_norm
    chain = [norm(nn.Conv1d(6, 12, 3, padding=1)), nn.ReLU()]
    chain += [norm(nn.Conv1d(12, 10, 3, padding=1)), nn.ReLU(), mean_of(2), nn.Linear(10, 3)]
    return nn.Sequential(*chain), sequences()


# -- other wirings ----------------------------------------------------------------------------------


@net
def gated_dilations() -> Made:
    def forward(s: Any, x: Tensor) -> Tensor:
        skips = 0
        x = s.start(x)
        for wide, out in zip(s.wide, s.out, strict=True):
            a, b = wide(x).chunk(2, 1)
            y = out(torch.tanh(a) * torch.sigmoid(b))
            x, skips = x + y, skips + y
        return s.head(F.relu(skips).mean(2))

    wide = [nn.Conv1d(12, 16, 3, padding=d, dilation=d) for d in (1, 2)]
    return Net(
        forward,
        start=nn.Conv1d(6, 12, 1),
        wide=nn.ModuleList(wide),
        out=nn.ModuleList(nn.Conv1d(8, 12, 1) for _ in wide),
        head=nn.Linear(12, 3),
    ), sequences()


@net
def two_towers() -> Made:
    def forward(s: Any, x: Tensor, y: Tensor) -> Tensor:
        a, b = s.one(x), s.other(y)
        return (F.relu(a) * F.relu(b)).amax(1) @ s.out

    tower = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10))
    return Net(forward, one=tower, other=copy.deepcopy(tower), out=weight(10, 3)), (
        sequences(),
        sequences(),
    )


@net
def sets() -> Made:
    return nn.Sequential(
        nn.Linear(8, 16),
        nn.ReLU(),
        nn.Linear(16, 12),
        nn.ReLU(),
        mean_of(1),
        nn.Linear(12, 10),
        nn.ReLU(),
        nn.Linear(10, 3),
    ), sequences()


@net
def messages_on_a_graph() -> Made:
    def forward(s: Any, x: Tensor) -> Tensor:
        for own, other in zip(s.own, s.other, strict=True):
            x = F.relu(own(x) + other(x[:, s.neighbours].mean(2)))
        return s.out(x.mean(1))

    neighbours = torch.randint(0, 6, (6, 3))
    one = Net(
        forward,
        own=nn.ModuleList([nn.Linear(8, 12), nn.Linear(12, 12)]),
        other=nn.ModuleList([nn.Linear(8, 12), nn.Linear(12, 12)]),
        out=nn.Linear(12, 3),
    )
    one.register_buffer("neighbours", neighbours)
    return one, sequences()


@net
def pixel_shuffle() -> Made:
    return nn.Sequential(
        conv(3, 16), nn.PixelShuffle(2), nn.PReLU(4), conv(4, 8), nn.PReLU(8), conv(8, 2)
    ), images()


@net
def experts() -> Made:
    def forward(s: Any, x: Tensor) -> Tensor:
        shares = s.router(x).softmax(-1)
        hidden = F.gelu(torch.einsum("bnd,edh->bneh", x, s.into))
        return s.out(torch.einsum("bneh,ehd,bne->bnd", hidden, s.back, shares).mean(1))

    return nn.Sequential(
        nn.Linear(8, 12),
        Net(
            forward,
            router=nn.Linear(12, 3),
            into=weight(3, 12, 16),
            back=weight(3, 16, 12),
            out=nn.Linear(12, 3),
        ),
    ), sequences()


@net
def flattened_convolutions() -> Made:
    return nn.Sequential(
        conv(3, 8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        conv(8, 6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 12),
        nn.ReLU(),
        nn.Linear(12, 5),
    ), images()


@net
def recurrent_cells() -> Made:
    def forward(s: Any, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), s.cell.hidden_size)
        states = []
        for step in s.start(x).unbind(1):
            h = s.cell(step, h)
            states.append(h)
        return s.out(torch.stack(states, 1).amax(1))

    return Net(
        forward, start=nn.Linear(8, 12), cell=nn.GRUCell(12, 10), out=nn.Linear(10, 3)
    ), sequences()


@net
def channels_as_tokens() -> Made:
    """Attention over channels, as XCiT and Restormer have it, and a mean at the end."""

    def forward(s: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = s.qkv(x).view(b, n, 3, s.heads, -1).permute(2, 0, 3, 4, 1)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * s.heat
        return x + s.out((scores.softmax(-1) @ v).permute(0, 3, 1, 2).reshape(b, n, -1))

    inner = Net(
        forward, qkv=nn.Linear(16, 48), out=nn.Linear(16, 16), heat=weight(4, 1, 1), heads=4
    )
    return nn.Sequential(nn.Linear(8, 16), inner, mean_of(1), nn.Linear(16, 3)), sequences()
