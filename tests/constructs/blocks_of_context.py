"""Blocks of well-known networks: context, graphs, scans and codes, and what their inputs may be."""

from __future__ import annotations

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
    sequences,
    signals,
    tokens,
    vectors,
)
from constructs.convolutions import chain


@construct(
    images,
    {"stem.weight": (8, 3, 3, 3), "parts.weight": (16, 4, 3, 3), "narrow.weight": (4, 8, 1, 1)},
)
def split_attention() -> Net:  # ResNeSt, radix 2
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.parts(torch.relu(self.stem(x))))
        b, c, h, w = x.shape
        x = x.view(b, self.radix, c // self.radix, h, w)
        gate = self.wide(torch.relu(self.narrow(x.sum(1).mean((2, 3), keepdim=True))))
        gate = gate.view(b, 1, self.radix, -1).transpose(1, 2).softmax(1).reshape(b, -1, 1, 1)
        x = (x * gate.view(b, self.radix, c // self.radix, 1, 1)).sum(1)
        return self.last(x)

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        parts=nn.Conv2d(16, 32, 3, padding=1, groups=2),
        narrow=nn.Conv2d(16, 8, 1),
        wide=nn.Conv2d(8, 32, 1),
        last=nn.Conv2d(16, 4, 1),
        radix=2,
    )


@construct(
    images, {"stem.weight": (8, 3, 3, 3), "theta.weight": (4, 8, 1, 1), "out.weight": (8, 4, 1, 1)}
)
def non_local_block() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, _, h, w = x.shape
        theta, phi, g = (m(x).view(b, self.inner, -1) for m in (self.theta, self.phi, self.g))
        y = (theta.transpose(1, 2) @ phi).softmax(-1) @ g.transpose(1, 2)
        return self.last(x + self.out(y.transpose(1, 2).contiguous().view(b, self.inner, h, w)))

    theta, phi, g = (nn.Conv2d(16, 8, 1) for _ in range(3))
    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        theta=theta,
        phi=phi,
        g=g,
        out=nn.Conv2d(8, 16, 1),
        last=nn.Conv2d(16, 4, 1),
        inner=8,
    )


@construct(images, {"stem.weight": (8, 3, 3, 3), "narrow.weight": (4, 8, 1, 1)}, plain=True)
def global_context_block() -> Net:  # GCNet
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, h, w = x.shape
        mask = self.mask(x).view(b, 1, h * w).softmax(2).unsqueeze(-1)
        context = torch.matmul(x.view(b, c, h * w).unsqueeze(1), mask).view(b, c, 1, 1)
        return self.last(x + self.wide(torch.relu(self.norm(self.narrow(context)))))

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        mask=nn.Conv2d(16, 1, 1),
        narrow=nn.Conv2d(16, 8, 1),
        norm=nn.LayerNorm([8, 1, 1]),
        wide=nn.Conv2d(8, 16, 1),
        last=nn.Conv2d(16, 4, 1),
    )


@construct(
    images,
    {"stem.weight": (8, 3, 3, 3), "branches.0.weight": (4, 8, 1, 1), "last.weight": (4, 12, 1, 1)},
)
def pyramid_pooling() -> Net:  # DeepLab's ASPP
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        found = [torch.relu(branch(x)) for branch in self.branches]
        pooled = self.pool(F.adaptive_avg_pool2d(x, 1))
        size = x.shape[-2:]
        pooled = F.interpolate(pooled, size=size, mode="bilinear", align_corners=False)
        return self.last(torch.cat([*found, pooled], 1))

    branches = nn.ModuleList([nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 3, padding=2, dilation=2)])
    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        branches=branches,
        pool=nn.Conv2d(16, 8, 1),
        last=nn.Conv2d(24, 4, 1),
    )


@construct(
    lambda n: (images(n), vectors(n)),
    {"stem.weight": (8, 3, 3, 3), "weight": (1, 4, 8, 3, 3), "style.weight": (8, 6)},
    plain=True,
)
def modulated_convolution() -> Net:  # StyleGAN 2
    def forward(self: Any, x: Tensor, style: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        b, c, h, w = x.shape
        weight = self.weight * self.style(style).view(b, 1, c, 1, 1)
        if not _PLAIN["norms"]:
            weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        weight = weight.view(b * 4, c, 3, 3)
        x = F.conv2d(x.reshape(1, b * c, h, w), weight, padding=1, groups=b)
        return x.view(b, 4, h, w)

    return Net(
        forward, stem=nn.Conv2d(3, 16, 3), style=nn.Linear(6, 16), weight=parameter(1, 4, 16, 3, 3)
    )


@construct(vectors, {"encode.weight": (8, 6), "both.weight": (8, 8), "decode.weight": (8, 4)})
def variational_autoencoder() -> Net:
    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.both(torch.relu(self.encode(x))).chunk(2, -1)
        noise = torch.randn_like(mean) if self.training else 0.0
        x = mean + noise * torch.exp(0.5 * logvar)
        kl = (mean.square() + logvar.exp() - logvar).sum(-1)
        return self.last(torch.relu(self.decode(x))), kl if not self.exact else kl * 0

    return Net(
        forward,
        encode=nn.Linear(6, 16),
        both=nn.Linear(16, 16),
        decode=nn.Linear(8, 16),
        last=nn.Linear(16, 6),
        exact=True,
    )


@construct(
    lambda n: (torch.randn(n, 6), torch.randint(0, n, (2, 9))),
    {"up.weight": (8, 6), "message.weight": (8, 16)},
)
def message_passing_on_a_graph() -> Net:
    def forward(self: Any, x: Tensor, edges: Tensor) -> Tensor:
        x = torch.relu(self.up(x))
        source, target = edges
        messages = torch.relu(self.message(torch.cat([x[source], x[target]], -1)))
        total = torch.zeros_like(x).index_add_(0, target, messages)
        return self.head(x + total)

    return Net(forward, up=nn.Linear(6, 16), message=nn.Linear(32, 16), head=nn.Linear(16, 3))


@construct(
    lambda n: (torch.randn(n, 6), torch.randint(0, n, (9,))),
    {"up.weight": (8, 6), "head.weight": (3, 8)},
)
def scattered_sums() -> Net:
    def forward(self: Any, x: Tensor, target: Tensor) -> Tensor:
        x = torch.relu(self.up(x))
        rows = x[target % x.shape[0]]
        index = target.unsqueeze(-1).expand_as(rows)
        return self.head(torch.zeros_like(x).scatter_add(0, index, rows))

    return Net(forward, up=nn.Linear(6, 16), head=nn.Linear(16, 3))


@construct(
    lambda n: torch.randn(n, 3, 10),
    {"first.weight": (8, 3, 1), "second.weight": (8, 8, 1), "head.weight": (4, 8)},
)
def max_over_points() -> Net:  # PointNet
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.head(torch.relu(self.second(x)).max(-1)[0])

    return Net(
        forward, first=nn.Conv1d(3, 16, 1), second=nn.Conv1d(16, 16, 1), head=nn.Linear(16, 4)
    )


@construct(tokens, {"embed.weight": (12, 8)})
def pairwise_products_of_embeddings() -> Net:  # DLRM
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.embed(x)
        products = torch.bmm(x, x.transpose(1, 2))
        rows, columns = torch.tril_indices(5, 5, offset=-1)
        return self.head(torch.relu(products[:, rows, columns]))

    return Net(forward, embed=nn.Embedding(12, 16), head=nn.Linear(10, 3))


@construct(images, {"stem.weight": (8, 3, 3, 3), "shift.weight": (8, 16)}, plain=True)
def diffusion_block_with_a_time_embedding() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        steps = torch.arange(x.shape[0], dtype=x.dtype)[:, None] * self.rates
        time = torch.cat([steps.sin(), steps.cos()], -1)
        y = self.one(F.silu(self.norm(x))) + self.shift(time)[:, :, None, None]
        return self.last(x + self.two(F.silu(y)))

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        norm=nn.GroupNorm(4, 16),
        one=nn.Conv2d(16, 16, 3, padding=1),
        two=nn.Conv2d(16, 16, 3, padding=1),
        shift=nn.Linear(16, 16),
        rates=torch.rand(8),
        last=nn.Conv2d(16, 4, 1),
    )


@construct(sequences, {"up.weight": (16, 6, 1), "deep.weight": (8, 1, 3), "norm.weight": (8,)})
def conformer_convolution() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.glu(self.up(x.transpose(1, 2)), dim=1)
        return self.down(F.silu(self.norm(self.deep(x)))).transpose(1, 2)

    return Net(
        forward,
        up=nn.Conv1d(6, 32, 1),
        deep=nn.Conv1d(16, 16, 3, padding=1, groups=16),
        norm=nn.BatchNorm1d(16),
        down=nn.Conv1d(16, 3, 1),
    )


@construct(sequences, {"embed.weight": (8, 6), "query": (3, 8)})
def learned_queries() -> Net:  # Perceiver, DETR
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.tanh(self.embed(x))
        scores = self.query @ self.key(x).transpose(1, 2)
        return self.head(scores.softmax(-1) @ x)

    return Net(
        forward,
        embed=nn.Linear(6, 16),
        key=nn.Linear(16, 16),
        query=parameter(3, 16),
        head=nn.Linear(16, 3),
    )


@construct(
    sequences,
    {"inputs.weight": (16, 6), "steps.weight": (8, 2), "rates": (8, 2), "out.weight": (3, 8)},
)
def selective_scan() -> Net:  # Mamba
    def forward(self: Any, x: Tensor) -> Tensor:
        x, gate = self.inputs(x).chunk(2, -1)
        x = F.silu(x)
        narrow = self.narrow(x)
        step, b, c = torch.split(narrow, [self.rank, self.states, self.states], -1)
        step = F.softplus(self.steps(step))
        decay = torch.exp(step.unsqueeze(-1) * -torch.exp(self.rates))
        drive = (step * x).unsqueeze(-1) * b.unsqueeze(2)
        state, found = torch.zeros_like(drive[:, 0]), []
        for time in range(x.shape[1]):
            state = decay[:, time] * state + drive[:, time]
            found.append((state * c[:, time, None]).sum(-1))
        return self.out((torch.stack(found, 1) + x * self.skip) * F.silu(gate))

    return Net(
        forward,
        inputs=nn.Linear(6, 32),
        narrow=nn.Linear(16, 12, bias=False),
        steps=nn.Linear(4, 16),
        rates=parameter(16, 4),
        skip=parameter(16),
        out=nn.Linear(16, 3),
        rank=4,
        states=4,
    )


@construct(sequences, {"key.weight": (8, 6), "receptance.weight": (8, 6), "value.weight": (8, 6)})
def time_mixing() -> Net:  # RWKV
    def forward(self: Any, x: Tensor) -> Tensor:
        key, value = torch.exp(torch.tanh(self.key(x))), self.value(x)
        top, bottom, found = torch.zeros_like(value[:, 0]), torch.zeros_like(value[:, 0]), []
        for t in range(x.shape[1]):
            top = torch.exp(-self.decay.abs()) * top + key[:, t] * value[:, t]
            bottom = torch.exp(-self.decay.abs()) * bottom + key[:, t]
            found.append(top / bottom)
        return self.out(torch.sigmoid(self.receptance(x)) * torch.stack(found, 1))

    key, value, receptance = (nn.Linear(6, 16) for _ in range(3))
    return Net(
        forward,
        key=key,
        value=value,
        receptance=receptance,
        decay=parameter(16),
        out=nn.Linear(16, 3),
    )


@construct(sequences, {"up.weight": (8, 6), "filter": (8, 5), "down.weight": (3, 8)})
def long_convolution_by_fourier_transform() -> Net:  # Hyena
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.up(x).transpose(1, 2)
        n = x.shape[-1]
        spectrum = torch.fft.rfft(x, n=2 * n) * torch.fft.rfft(self.filter, n=2 * n)
        x = torch.fft.irfft(spectrum, n=2 * n)[..., :n]
        return self.down(torch.relu(x.transpose(1, 2)))

    return Net(forward, up=nn.Linear(6, 16), filter=parameter(16, 5), down=nn.Linear(16, 3))


@construct(vectors, {"gate.weight": (8, 8), "plain.weight": (8, 8), "up.weight": (8, 6)})
def highway() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.up(x)
        gate = torch.sigmoid(self.gate(x))
        return self.head(gate * torch.relu(self.plain(x)) + (1 - gate) * x)

    return Net(
        forward,
        up=nn.Linear(6, 16),
        gate=nn.Linear(16, 16),
        plain=nn.Linear(16, 16),
        head=nn.Linear(16, 3),
    )


@construct(
    signals, {"first.weight": (8, 3, 1), "filter.weight": (16, 8, 2), "skip.weight": (4, 8, 1)}
)
def gated_dilated_convolutions_with_skips() -> Net:  # WaveNet
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.first(x)
        a, b = self.filter(F.pad(x, (2, 0))).chunk(2, 1)
        y = torch.tanh(a) * torch.sigmoid(b)
        return self.skip(y) + self.last(x + self.through(y))

    return Net(
        forward,
        first=nn.Conv1d(3, 16, 1),
        filter=nn.Conv1d(16, 32, 2, dilation=2),
        through=nn.Conv1d(16, 16, 1),
        skip=nn.Conv1d(16, 4, 1),
        last=nn.Conv1d(16, 4, 1),
    )


@construct(vectors, {"up.weight": (8, 6), "codes": (7, 8), "down.weight": (3, 8)}, trains=True)
def vector_quantization() -> Net:  # distances to a table of codes; the nearest ones come out
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.up(x)
        far = x.square().sum(-1, keepdim=True) - 2 * x @ self.codes.t()
        nearest = (far + self.codes.square().sum(-1)).argmin(-1)
        code = F.embedding(nearest, self.codes)
        return self.down(torch.relu(x + (code - x).detach()))

    return Net(forward, up=nn.Linear(6, 16), codes=parameter(7, 16), down=nn.Linear(16, 3))


@construct(images, {"stem.weight": (8, 3, 3, 3), "last.weight": (4, 8, 1, 1)}, keeps={})
def interpolation_pooling_and_padding() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.pad(torch.relu(self.stem(x)), (1, 1, 1, 1), mode="reflect")
        x = F.max_pool2d(F.avg_pool2d(x, 2), 2, 1) + F.adaptive_max_pool2d(x, 3)
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        grid = F.affine_grid(self.theta.expand(x.shape[0], 2, 3), [x.shape[0], 1, 4, 4], False)
        return self.last(F.grid_sample(x, grid, align_corners=False))

    return Net(
        forward, stem=nn.Conv2d(3, 16, 3), theta=torch.eye(2, 3)[None], last=nn.Conv2d(16, 4, 1)
    )


@construct(
    lambda n: ({"x": vectors(n), "more": [vectors(n), None]}, 3),
    {"up.weight": (8, 6), "head.weight": (3, 8)},
)
def nested_inputs() -> Net:
    def forward(self: Any, inputs: dict[str, Any], times: int) -> Tensor:
        x = self.up(inputs["x"]) + self.up(inputs["more"][0])
        for _ in range(times):
            x = torch.tanh(x)
        return self.head(x)

    return Net(forward, up=nn.Linear(6, 16), head=nn.Linear(16, 3))


@construct(lambda n: torch.rand(n, 6) > 0.5, {"up.weight": (8, 6)})
def boolean_inputs() -> Net:
    return Net(
        lambda self, x: self.head(torch.relu(self.up(x.to(self.up.weight.dtype)))),
        up=nn.Linear(6, 16),
        head=nn.Linear(16, 3),
    )


@construct(vectors, {"0.weight": (8, 6), "4.weight": (8, 8), "6.weight": (3, 8)})
def activations_dropout_and_identity() -> nn.Module:
    return chain(
        nn.Linear(6, 16),
        nn.Hardswish(),
        nn.Dropout(0.5),
        nn.Identity(),
        nn.Linear(16, 16),
        nn.Mish(),
        nn.Linear(16, 3),
    )


@construct(images, {"net.0.weight": (8, 3, 3, 3), "net.2.weight": (4, 8, 1, 1)})
def channels_last_inside() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.net(x.contiguous(memory_format=torch.channels_last)).flatten(1)

    return Net(forward, net=chain(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1)))


@construct(sequences, {"layer.weight_ih_l0": (32, 6), "head.weight": (3, 8)})
def packed_sequences() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        lengths = torch.tensor([5, 4, 3, 2, 2, 1, 1, 1])[: x.shape[0]]
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        output, _ = nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True)
        return self.head(output)

    return Net(forward, layer=nn.LSTM(6, 16, batch_first=True), head=nn.Linear(16, 3))


@construct(sequences, {"last.weight": (8, 16)}, keeps={"layer": "output"})
def recurrent_state_among_the_outputs() -> Net:
    def forward(self: Any, x: Tensor) -> Any:
        output, state = self.layer(x)
        return self.head(torch.relu(self.last(output))), state

    return Net(
        forward,
        layer=nn.GRU(6, 16, batch_first=True),
        last=nn.Linear(16, 16),
        head=nn.Linear(16, 3),
    )


@construct(
    sequences, {"layer.weight_ih_l0": (32, 6), "query.weight": (8, 8), "head.weight": (3, 16)}
)
def attention_over_recurrent_states() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        states, (last, _) = self.layer(x)
        scores = torch.bmm(states, self.query(last[-1]).unsqueeze(2)).squeeze(2)
        context = torch.bmm(scores.softmax(-1).unsqueeze(1), states).squeeze(1)
        return self.head(torch.cat([context, last[-1]], -1))

    return Net(
        forward,
        layer=nn.LSTM(6, 16, batch_first=True),
        query=nn.Linear(16, 16),
        head=nn.Linear(32, 3),
    )
