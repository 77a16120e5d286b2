"""Forwards that are not plain: experts, views, indices, transforms, branches on shapes and values."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from constructs.build import _PLAIN, Net, construct, images, parameter, sequences, vectors
from constructs.convolutions import chain


@construct(vectors, {"experts.0.0.weight": (8, 6), "experts.1.2.weight": (3, 8)})
def mixture_of_experts_with_a_dense_gate() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        outputs = torch.stack([expert(x) for expert in self.experts], -1)
        return (outputs * weights.unsqueeze(-2)).sum(-1)

    def expert() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))

    return Net(forward, gate=nn.Linear(6, 3), experts=nn.ModuleList(expert() for _ in range(3)))


@construct(vectors, {"experts.0.0.weight": (8, 6)})
def mixture_of_experts_with_a_sparse_gate() -> Net:  # Mixtral
    def forward(self: Any, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        result = torch.zeros(x.shape[0], self.out, dtype=x.dtype)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(chosen == number)
            result = result.index_add(0, row, expert(x[row]) * weights[row, slot, None])
        return result

    def expert() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))

    return Net(
        forward, gate=nn.Linear(6, 3), experts=nn.ModuleList(expert() for _ in range(3)), out=3
    )


@construct(vectors, {"up": (3, 6, 8), "down": (3, 8, 3)})
def experts_in_one_tensor() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        hidden = torch.bmm(x.expand(self.count, -1, -1), self.up).relu()
        weights = self.gate(x).softmax(-1).t().unsqueeze(-1)
        return (torch.bmm(hidden, self.down) * weights).sum(0)

    return Net(
        forward, up=parameter(3, 6, 16), down=parameter(3, 16, 3), gate=nn.Linear(6, 3), count=3
    )


@construct(
    lambda n: {"x": vectors(n), "ids": torch.randint(0, 12, (n,))},
    {"embed.weight": (12, 8), "head.weight": (3, 8)},
)
def keyword_inputs_of_several_kinds() -> Net:
    return Net(
        lambda self, x, ids: self.head(torch.relu(self.up(x)) + self.embed(ids)),
        up=nn.Linear(6, 16),
        embed=nn.Embedding(12, 16),
        head=nn.Linear(16, 3),
    )


@construct(vectors, {"up.weight": (8, 6)})
def outputs_in_a_dict() -> Net:
    def forward(self: Any, x: Tensor) -> dict[str, Any]:
        x = torch.relu(self.up(x))
        return {"logits": self.head(x), "aux": (self.other(x), None), "name": "net"}

    return Net(forward, up=nn.Linear(6, 16), head=nn.Linear(16, 3), other=nn.Linear(16, 2))


@construct(vectors, {"inner.weight": (8, 16)}, keeps={"up": "output"})
def hidden_state_among_the_outputs() -> Net:
    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.up(x))
        return x, self.head(torch.relu(self.inner(x)))

    return Net(forward, up=nn.Linear(6, 16), inner=nn.Linear(16, 16), head=nn.Linear(16, 3))


@construct(images, {"second.weight": (8, 16 * 36)}, keeps={"first": "written in the code"})
def size_of_a_view_written_in_the_code() -> Net:  # LeNet of the tutorials
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x)).view(-1, 16 * 36)
        return self.last(torch.relu(self.second(x)))

    return Net(forward, first=nn.Conv2d(3, 16, 3), second=nn.Linear(576, 16), last=nn.Linear(16, 4))


class Config(SimpleNamespace):
    """Sizes in an object that is no module."""


@construct(sequences, {"inner.weight": (8, 16)})
def sizes_from_a_config() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        x = torch.relu(self.up(x)).view(b, n, self.config.parts, self.config.width)
        return self.last(torch.relu(self.inner(x.sum(2))))

    return Net(
        forward,
        config=Config(parts=2, width=16),
        up=nn.Linear(6, 32),
        inner=nn.Linear(16, 16),
        last=nn.Linear(16, 3),
    )


@construct(vectors, {"up.weight": (8, 6), "twice.weight": (8, 8)})
def module_called_twice() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.up(x))
        return self.down(torch.relu(self.twice(torch.relu(self.twice(x)))))

    return Net(forward, up=nn.Linear(6, 16), twice=nn.Linear(16, 16), down=nn.Linear(16, 3))


@construct(vectors, {"up.weight": (8, 6), "inner.weight": (8, 8)})
def one_module_under_two_names() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.up(x))
        return self.down(torch.relu(self.again(torch.relu(self.inner(x)))))

    inner = nn.Linear(16, 16)
    return Net(forward, up=nn.Linear(6, 16), inner=inner, again=inner, down=nn.Linear(16, 3))


@construct(vectors, {"up.weight": (8, 6), "down.weight": (3, 8)})
def activation_checkpointing() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = checkpoint(lambda x: torch.relu(self.up(x)), x, use_reentrant=False)
        return self.down(x)

    return Net(forward, up=nn.Linear(6, 16), down=nn.Linear(16, 3))


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.5 * x)


@construct(vectors, {"up.weight": (8, 6), "down.weight": (3, 8)})
def scripted_activation() -> Net:
    act = torch.jit.script(quick_gelu)
    return Net(
        lambda self, x: self.down(act(self.up(x))), up=nn.Linear(6, 16), down=nn.Linear(16, 3)
    )


class Doubled(torch.autograd.Function):
    """An operation with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


@construct(vectors, {"up.weight": (8, 6), "down.weight": (3, 8)})
def autograd_function() -> Net:
    return Net(
        lambda self, x: self.down(torch.relu(Doubled.apply(self.up(x)))),
        up=nn.Linear(6, 16),
        down=nn.Linear(16, 3),
    )


@construct(vectors, {"up.weight": (8, 6), "down.weight": (3, 8)})
def control_flow_on_shapes_and_values() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        if x.dim() == 2 and x.shape[1] == self.inputs:
            x = self.up(x)
        assert x.shape[-1] == self.up.out_features
        if x.sum() > 1e9:
            x = -x
        return self.down(torch.relu(x))

    return Net(forward, up=nn.Linear(6, 16), down=nn.Linear(16, 3), inputs=6)


@construct(images, {"0.weight": (8, 3, 3, 3), "1.running_mean": (8,), "3.weight": (4, 8, 1, 1)})
def traced_by_fx() -> nn.Module:
    net = chain(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1))
    return torch.fx.symbolic_trace(net)


@construct(vectors, {"layers.0.weight": (8, 6), "weights.1": (3, 8)})
def containers_of_parameters_and_modules() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.layers["0"](x)) * self.weights[0]
        return F.linear(x, self.weights[1])

    return Net(
        forward,
        layers=nn.ModuleDict({"0": nn.Linear(6, 16)}),
        weights=nn.ParameterList([parameter(16), parameter(3, 16)]),
    )


@construct(vectors, {"up.weight": (8, 6), "down.weight": (3, 8)})
def writing_in_place() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.up(x)
        y = torch.zeros_like(x)
        y[:, :] = x
        y.mul_(2).clamp_(min=0)
        return self.down(y)

    return Net(forward, up=nn.Linear(6, 16), down=nn.Linear(16, 3))


@construct(vectors, {"inner.weight": (8, 16)}, keeps={"up": ""})
def writing_into_a_part() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.up(x).clone()
        x[:, :4] = 0
        return self.down(torch.relu(self.inner(torch.relu(x))))

    return Net(forward, up=nn.Linear(6, 16), inner=nn.Linear(16, 16), down=nn.Linear(16, 3))


@construct(vectors, {"inner.weight": (8, 16)}, keeps={"up": ""})
def softmax_over_channels() -> Net:
    return Net(
        lambda self, x: self.down(torch.relu(self.inner(self.up(x).softmax(-1)))),
        up=nn.Linear(6, 16),
        inner=nn.Linear(16, 16),
        down=nn.Linear(16, 3),
    )


@construct(vectors, {"inner.weight": (8, 16)}, keeps={"up": ""})
def sorting_channels() -> Net:
    return Net(
        lambda self, x: self.down(torch.relu(self.inner(self.up(x).sort(-1).values))),
        up=nn.Linear(6, 16),
        inner=nn.Linear(16, 16),
        down=nn.Linear(16, 3),
    )


@construct(vectors, {"inner.weight": (8, 16)}, keeps={"up": ""})
def running_sum_over_channels() -> Net:
    return Net(
        lambda self, x: self.down(torch.relu(self.inner(self.up(x).cumsum(-1)))),
        up=nn.Linear(6, 16),
        inner=nn.Linear(16, 16),
        down=nn.Linear(16, 3),
    )


@construct(vectors, {"inner.weight": (8, 16)}, keeps={"up": ""})
def rolling_channels() -> Net:
    return Net(
        lambda self, x: self.down(torch.relu(self.inner(self.up(x).roll(1, -1)))),
        up=nn.Linear(6, 16),
        inner=nn.Linear(16, 16),
        down=nn.Linear(16, 3),
    )


@construct(vectors, {"inner.weight": (8, 16)}, keeps={"up": ""})
def picking_channels_by_index() -> Net:
    return Net(
        lambda self, x: self.down(torch.relu(self.inner(self.up(x)[:, self.order]))),
        up=nn.Linear(6, 16),
        order=torch.randperm(16, generator=torch.Generator().manual_seed(1)),
        inner=nn.Linear(16, 16),
        down=nn.Linear(16, 3),
    )


@construct(sequences, {"inner.weight": (8, 16)}, keeps={"up": ""})
def fourier_transform_over_channels() -> Net:  # FNet
    return Net(
        lambda self, x: self.down(torch.relu(self.inner(torch.fft.fft2(self.up(x)).real))),
        up=nn.Linear(6, 16),
        inner=nn.Linear(16, 16),
        down=nn.Linear(16, 3),
    )


@construct(images, {"up.weight": (8, 3, 3, 3)})
def fourier_transform_over_space() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.fft.rfft2(self.up(x), norm="ortho")
        x = torch.fft.irfft2(x * self.filter[:, None, None], norm="ortho", s=(6, 6))
        return self.down(torch.relu(x))

    return Net(forward, up=nn.Conv2d(3, 16, 3), filter=parameter(16), down=nn.Conv2d(16, 4, 1))


@construct(sequences, {"up.weight": (8, 6), "down.weight": (3, 8)})
def shifted_along_time() -> Net:  # RWKV's token shift
    def forward(self: Any, x: Tensor) -> Tensor:
        before = self.shift(x)
        x = self.up(x * self.mix + before * (1 - self.mix))
        return self.down(torch.relu(x).roll(1, 1).square())

    return Net(
        forward,
        shift=nn.ZeroPad2d((0, 0, 1, -1)),
        mix=parameter(6),
        up=nn.Linear(6, 16),
        down=nn.Linear(16, 3),
    )


@construct(lambda n: (vectors(n), vectors(n)), {"up.weight": (8, 6)}, plain=True)
def cosine_similarity_of_two_towers() -> Net:
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        x, y = self.up(x), self.up(y)
        if _PLAIN["norms"]:
            return (x * y).sum(-1)
        return F.cosine_similarity(x, y, dim=-1)

    return Net(forward, up=nn.Linear(6, 16))


@construct(lambda n: (vectors(n), vectors(n)), {"a.weight": (8, 6), "b.weight": (8, 6)}, plain=True)
def contrastive_logits_of_two_towers() -> Net:  # CLIP
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        x, y = self.a(x), self.b(y)
        if not _PLAIN["norms"]:
            x, y = x / x.norm(dim=-1, keepdim=True), y / y.norm(dim=-1, keepdim=True)
        return self.scale.exp() * x @ y.t()

    return Net(forward, a=nn.Linear(6, 16), b=nn.Linear(6, 16), scale=parameter(1))


@construct(vectors, {"inner.weight": (8, 16)}, keeps={"up": ""})
def vectorized_map() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.vmap(lambda row: torch.relu(self.up(row)))(x)
        return self.down(torch.relu(self.inner(x)))

    return Net(
        forward,
        up=nn.Linear(6, 16),
        inner=nn.Linear(16, 16),
        down=nn.Linear(16, 3),
    )


@construct(
    lambda n: torch.randn(n, 2, 3, 8, 8),
    {"stem.weight": (8, 3, 3, 3), "time.weight_ih_l0": (32, 8)},
)
def frames_folded_into_the_batch() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        b, t = x.shape[:2]
        x = torch.relu(self.stem(x.flatten(0, 1))).mean((2, 3))
        return self.head(self.time(x.view(b, t, -1))[0][:, -1])

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        time=nn.LSTM(16, 16, batch_first=True),
        head=nn.Linear(16, 4),
    )
