"""Weights that are not plain parameters: norms of weights, ties, masks, buffers and tables."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from constructs.build import Net, construct, images, parameter, sequences, tokens, vectors
from constructs.convolutions import chain
from constructs.norms import MLP


@construct(
    images,
    {
        "0.parametrizations.weight.original1": (8, 3, 3, 3),
        "0.parametrizations.weight.original0": (8, 1, 1, 1),
        "2.parametrizations.weight.original1": (4, 8, 1, 1),
    },
)
def weight_norm() -> nn.Module:
    return chain(
        parametrizations.weight_norm(nn.Conv2d(3, 16, 3)),
        nn.ReLU(),
        parametrizations.weight_norm(nn.Conv2d(16, 4, 1)),
    )


@construct(vectors, {"0.weight_v": (8, 6), "0.weight_g": (8, 1), "2.weight_v": (3, 8)})
def old_weight_norm() -> nn.Module:
    return chain(
        torch.nn.utils.weight_norm(nn.Linear(6, 16)),
        nn.ReLU(),
        torch.nn.utils.weight_norm(nn.Linear(16, 3)),
    )


@construct(images, {"0.parametrizations.weight.original": (8, 3, 3, 3), "2.weight": (4, 8, 1, 1)})
def spectral_norm() -> nn.Module:
    return chain(
        parametrizations.spectral_norm(nn.Conv2d(3, 16, 3)), nn.ReLU(), nn.Conv2d(16, 4, 1)
    )


@construct(vectors, {"0.weight_orig": (8, 6), "0.weight_u": (8,), "2.weight": (3, 8)})
def old_spectral_norm() -> nn.Module:
    return chain(torch.nn.utils.spectral_norm(nn.Linear(6, 16)), nn.ReLU(), nn.Linear(16, 3))


@construct(vectors, {"0.bias": (8,), "2.weight": (8, 8), "4.weight": (3, 8)})
def orthogonal_weight() -> nn.Module:
    return chain(
        parametrizations.orthogonal(nn.Linear(6, 16), orthogonal_map="cayley"),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 3),
    )


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


@construct(vectors, {"4.weight": (3, 8)})
def parametrization_by_the_user() -> nn.Module:
    layer = nn.Linear(16, 16)
    nn.utils.parametrize.register_parametrization(layer, "weight", Symmetric())
    return chain(nn.Linear(6, 16), nn.ReLU(), layer, nn.Linear(16, 16), nn.Linear(16, 3))


@construct(vectors, {"0.weight_orig": (8, 6), "0.weight_mask": (8, 6), "2.weight": (3, 8)})
def masks_of_torch_prune() -> nn.Module:
    net = chain(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    torch_prune.random_unstructured(net[0], "weight", 0.3)
    return net


def adapted(inputs: int, outputs: int) -> Net:
    """A frozen layer and a low-rank adapter beside it, as LoRA has them."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.frozen(x) + self.up(self.down(x))

    return Net(
        forward,
        frozen=nn.Linear(inputs, outputs).requires_grad_(False),
        down=nn.Linear(inputs, 4, bias=False),
        up=nn.Linear(4, outputs, bias=False),
    )


@construct(vectors, {"0.down.weight": (2, 6), "0.up.weight": (16, 2)}, keeps={"0.frozen": "frozen"})
def lora() -> nn.Module:
    return chain(adapted(6, 16), nn.ReLU(), adapted(16, 3))


@construct(vectors, {"2.weight": (8, 16)}, keeps={"0": "frozen"})
def frozen_first_layer() -> nn.Module:
    return chain(
        nn.Linear(6, 16).requires_grad_(False),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 3),
    )


@construct(images, {"3.weight": (8, 16, 1, 1)}, keeps={"0": "frozen"})
def frozen_batch_norm_weight() -> nn.Module:
    return chain(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16).requires_grad_(False),
        nn.ReLU(),
        nn.Conv2d(16, 16, 1),
        nn.ReLU(),
        nn.Conv2d(16, 4, 1),
    )


@construct(tokens, {"embed.weight": (12, 8), "head.weight": (12, 8), "up.weight": (16, 8)})
def tied_embedding_and_head() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.down(F.gelu(self.up(x))))

    embed, head = nn.Embedding(12, 16), nn.Linear(16, 12, bias=False)
    head.weight = embed.weight
    return Net(forward, embed=embed, up=nn.Linear(16, 32), down=nn.Linear(32, 16), head=head)


@construct(vectors, {"0.weight": (8, 6), "2.weight": (8, 8), "4.weight": (8, 8)})
def two_layers_of_one_weight() -> nn.Module:
    net = chain(
        nn.Linear(6, 16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.Linear(16, 3),
    )
    net[4].weight = net[2].weight
    return net


@construct(vectors, {"up.weight": (8, 6), "down.weight": (3, 8)})
def transposed_tie() -> Net:  # an autoencoder that reads its weight twice
    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.linear(torch.relu(self.up(x)), self.up.weight.t())
        return self.down(torch.relu(self.up(x)))

    return Net(forward, up=nn.Linear(6, 16), down=nn.Linear(16, 3))


@construct(vectors, {**MLP, "gain": (8,), "mean": (1, 8)})
def persistent_buffers() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.gain * (self.up(x) - self.mean)))

    return Net(
        forward,
        up=nn.Linear(6, 16),
        gain=torch.rand(16) + 1,
        mean=torch.randn(1, 16),
        down=nn.Linear(16, 3),
    )


@construct(vectors, {**MLP, "ones": (8,)})
def constant_buffer_that_checkpoints_do_not_hold() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.ones * self.up(x)))

    net = Net(forward, up=nn.Linear(6, 16), down=nn.Linear(16, 3))
    net.register_buffer("ones", torch.full((16,), 1.5), persistent=False)
    return net


@construct(vectors, {"inner.weight": (8, 16)}, keeps={"up": "constant"})
def tensor_that_is_no_buffer() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.inner(torch.relu(self.up(x) * self.other["gain"].to(x)))))

    return Net(
        forward,
        up=nn.Linear(6, 16),
        inner=nn.Linear(16, 16),
        down=nn.Linear(16, 3),
        other={"gain": torch.linspace(1, 2, 16)},
    )


@construct(vectors, {"up": (8, 6), "down": (3, 8)})
def linear_of_raw_parameters() -> Net:
    return Net(
        lambda self, x: F.linear(torch.relu(F.linear(x, self.up)), self.down),
        up=parameter(16, 6),
        down=parameter(3, 16),
    )


@construct(vectors, {"up": (6, 8), "bias": (8,), "down": (8, 3)})
def product_with_raw_parameters() -> Net:
    return Net(
        lambda self, x: torch.relu(x @ self.up + self.bias) @ self.down,
        up=parameter(6, 16),
        bias=parameter(16),
        down=parameter(16, 3),
    )


@construct(sequences, {"up": (6, 2, 4), "down": (2, 4, 3)})
def einsum_of_raw_parameters() -> Net:  # JAX-style attention weights: (width, heads, head_dim)
    def forward(self: Any, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btc,chd->bthd", x, w) for w in (self.up, self.key, self.value))
        weights = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
        return torch.einsum("bhij,bjhd,hdc->bic", weights, v, self.down)

    up, key, value = (parameter(6, 4, 4) for _ in range(3))
    return Net(forward, up=up, key=key, value=value, down=parameter(4, 4, 3))


@construct(sequences, {"up.weight": (6, 8), "up.bias": (8,), "down.weight": (8, 3)})
def conv1d_of_gpt2() -> Net:
    def layer(inputs: int, outputs: int) -> Net:
        def forward(self: Any, x: Tensor) -> Tensor:
            shape = (*x.size()[:-1], self.nf)
            return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(shape)

        return Net(forward, weight=parameter(inputs, outputs), bias=parameter(outputs), nf=outputs)

    return Net(lambda self, x: self.down(F.gelu(self.up(x))), up=layer(6, 16), down=layer(16, 3))


@construct(
    lambda n: (vectors(n), vectors(n)),
    {"a.weight": (8, 6), "b.weight": (4, 6), "both.weight": (8, 8, 4)},
)
def bilinear() -> Net:
    return Net(
        lambda self, x, y: self.head(torch.relu(self.both(torch.relu(self.a(x)), self.b(y)))),
        a=nn.Linear(6, 16),
        b=nn.Linear(6, 8),
        both=nn.Bilinear(16, 8, 16),
        head=nn.Linear(16, 3),
    )


@construct(tokens, {"embed.weight": (12, 8), "head.weight": (3, 8)})
def mean_of_embeddings() -> Net:
    return Net(
        lambda self, x: self.head(self.embed(x).mean(1)),
        embed=nn.Embedding(12, 16, padding_idx=0),
        head=nn.Linear(16, 3),
    )


@construct(tokens, {"embed.weight": (12, 8), "head.weight": (3, 8)})
def embedding_bag() -> Net:
    return Net(
        lambda self, x: self.head(self.embed(x)),
        embed=nn.EmbeddingBag(12, 16, mode="sum"),
        head=nn.Linear(16, 3),
    )
