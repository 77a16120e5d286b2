"""Random networks: pruned equals masked, where that is exact, and every one comes back from its structure."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_accel.errors import BrokenModel, NoEffect
from lightning_accel.pruning import prune
from lightning_accel.surgery import Structure, follow

pytestmark = pytest.mark.slow

KINDS = ["conv", "residual", "concat", "depthwise", "squeeze", "split", "grouped"]
KINDS += ["attention", "separate", "two_readers", "gated", "shuffle"]


class Net(nn.Module):
    """A stem, random blocks, and a linear head after pooling or flattening: 3x4x4 images to 5 classes."""

    def __init__(self, blocks: list[tuple[str, int]], activation: str, tail: str) -> None:
        super().__init__()
        self.kinds, self.activation, self.tail = [k for k, _ in blocks], activation, tail
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList()
        width = 8
        for kind, size in blocks:
            block = nn.ModuleDict()
            if kind == "conv":
                block["a"], block["norm"] = (
                    nn.Conv2d(width, size, 3, padding=1),
                    nn.BatchNorm2d(size),
                )
                width = size
            elif kind == "residual":
                block["a"], block["norm"] = (
                    nn.Conv2d(width, size, 3, padding=1),
                    nn.BatchNorm2d(size),
                )
                block["b"] = nn.Conv2d(size, width, 1)
            elif kind == "concat":
                block["a"], block["b"] = (
                    nn.Conv2d(width, size, 1),
                    nn.Conv2d(width, 4, 3, padding=1),
                )
                width = size + 4
            elif kind == "depthwise":
                block["a"] = nn.Conv2d(width, width, 3, padding=1, groups=width)
                block["norm"] = nn.BatchNorm2d(width)
            elif kind == "squeeze":
                block["a"], block["b"] = nn.Conv2d(width, size, 1), nn.Conv2d(size, width, 1)
            elif kind == "split":
                block["a"], block["b"] = nn.Conv2d(width, 2 * size, 1), nn.Conv2d(size, size, 1)
                width = size
            elif kind == "grouped":
                block["a"] = nn.Conv2d(width, 4 * size, 1)
                block["b"] = nn.Conv2d(4 * size, 4 * size, 3, padding=1, groups=4)
                width = 4 * size
            elif kind == "attention":  # fused, `size` heads of width 4
                block["a"], block["b"] = nn.Linear(width, 12 * size), nn.Linear(4 * size, width)
            elif kind == "separate":  # each pair of heads shares keys and values
                block["a"], block["b"] = nn.Linear(width, 4 * size), nn.Linear(4 * size, width)
                block["k"] = nn.Linear(width, 2 * size)
                block["v"] = nn.Linear(width, 2 * size)
            elif kind == "two_readers":
                block["a"], block["b"] = nn.Conv2d(width, 2 * size, 1), nn.Conv2d(size, size, 1)
                block["c"] = nn.Conv2d(3 * size, size, 1)
                width = size
            elif kind == "gated":
                block["a"], block["b"] = nn.Conv2d(width, 2 * size, 1), nn.Conv2d(size, width, 1)
            elif kind == "shuffle":
                block["a"], block["b"] = nn.Conv2d(width, 2 * size, 1), nn.Conv2d(2 * size, size, 1)
                width = size
            self.blocks.append(block)
        self.head = nn.Linear(width * (16 if tail == "flatten" else 1), 5)

    def forward(self, x: Tensor) -> Tensor:
        act = {"relu": F.relu, "gelu": F.gelu, "sigmoid": torch.sigmoid}[self.activation]
        x = act(self.stem(x))
        for kind, block in zip(self.kinds, self.blocks, strict=True):
            if kind in ("conv", "depthwise"):
                x = act(block["norm"](block["a"](x)))
            elif kind == "residual":
                x = act(x + block["b"](act(block["norm"](block["a"](x)))))
            elif kind == "concat":
                x = act(torch.cat([block["a"](x), block["b"](x)], 1))
            elif kind == "squeeze":
                x = x * torch.sigmoid(block["b"](act(block["a"](x.mean((2, 3), keepdim=True)))))
            elif kind == "split":
                one, two = block["a"](x).chunk(2, 1)
                x = act(one) * torch.sigmoid(block["b"](two))
            elif kind in ("attention", "separate"):
                x = x + self.attend(block, x.flatten(2).transpose(1, 2)).mT.unflatten(2, (4, 4))
            elif kind == "two_readers":  # YOLO's: a piece is read twice
                one, two = block["a"](x).chunk(2, 1)
                x = act(block["c"](torch.cat([one, two, act(block["b"](two))], 1)))
            elif kind == "gated":
                x = x + block["b"](F.glu(block["a"](x), 1))
            elif kind == "shuffle":
                x = F.channel_shuffle(block["a"](x), 2)
                x = act(block["b"](act(x)))
            else:
                x = act(block["b"](act(block["a"](x))))
        return self.head(x.flatten(1) if self.tail == "flatten" else x.mean((2, 3)))

    def attend(self, block: Any, x: Tensor) -> Tensor:  # (batch, 16 places, width)
        if "k" in block:
            q, k, v = (
                block[name](x).unflatten(2, (-1, 4)).transpose(1, 2) for name in ("a", "k", "v")
            )
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        else:
            q, k, v = block["a"](x).unflatten(2, (3, -1, 4)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return block["b"](x.transpose(1, 2).flatten(2))


def masked_twin(dense: nn.Module, small: nn.Module, receipt: object) -> nn.Module:
    """Zero, in the dense net, each element that the pruned one does not have, found by value.

    Independent of the package's own masks: every weight of the dense net is unique, so what survived
    is looked up in the pruned tensors by its value.
    """
    masked, survivors = copy.deepcopy(dense), dict(small.named_parameters())
    for name, tensor in masked.named_parameters():
        alive = torch.isin(tensor.detach(), survivors[name].detach())
        assert alive.sum() == survivors[name].numel(), name  # nothing changed but the choice
        tensor.data.mul_(alive)
    return masked


@pytest.mark.slow
@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    blocks=st.lists(
        st.tuples(st.sampled_from(KINDS), st.sampled_from([4, 6, 8])), min_size=1, max_size=4
    ),
    activation=st.sampled_from(["relu", "gelu", "sigmoid"]),
    tail=st.sampled_from(["pool", "flatten"]),
    ratio=st.sampled_from([0.25, 0.5, 0.75, 0.95]),
    importance=st.sampled_from(["magnitude", "random"]),
    seed=st.integers(0, 1000),
)
def test_random_nets_prune_like_masking_and_come_back(
    blocks: list[tuple[str, int]],
    activation: str,
    tail: str,
    ratio: float,
    importance: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    net = Net(blocks, activation, tail).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)  # unique values everywhere, norms included
    net(torch.randn(8, 3, 4, 4, dtype=torch.float64))
    dense, x = copy.deepcopy(net), torch.randn(3, 3, 4, 4, dtype=torch.float64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    try:
        receipt = prune(net, example=x, ratio=ratio, importance=importance)
    except (NoEffect, BrokenModel):
        assert all(
            torch.equal(a, b) for a, b in zip(dense.parameters(), net.parameters(), strict=True)
        )
        return
    follow(optimizer, receipt)

    masked = masked_twin(dense, net, receipt).eval()
    torch.testing.assert_close(net.eval()(x), masked(x), rtol=1e-10, atol=1e-10)

    buffer = io.BytesIO()
    torch.save({"weights": net.state_dict(), "structure": Structure.of(net).to_dict()}, buffer)
    buffer.seek(0)
    stored = torch.load(buffer, weights_only=True)
    fresh = Net(blocks, activation, tail).double()
    structure = Structure.from_dict(stored["structure"])
    structure.check(fresh)
    structure.apply(fresh)
    fresh.load_state_dict(stored["weights"])
    assert torch.equal(fresh.eval()(x), net(x))

    net.train()
    net(x.repeat(2, 1, 1, 1)).square().sum().backward()
    optimizer.step()
    assert all(p.isfinite().all() and min(p.shape, default=1) >= 1 for p in net.parameters())
    Structure.of(dense).apply(fresh)  # and back to where it came from
    fresh.load_state_dict(dense.state_dict())
    assert torch.equal(fresh(x), dense.eval()(x))


def test_most_random_nets_can_be_pruned() -> None:
    """The property above allows a refusal; it must stay the exception."""
    refused = 0
    for seed in range(4 * len(KINDS)):
        torch.manual_seed(seed)
        kind = KINDS[seed % len(KINDS)]
        net = Net([(kind, 8), ("conv", 8)], "relu", "pool")
        try:
            prune(net, example=torch.randn(2, 3, 4, 4), ratio=0.5)
        except (NoEffect, BrokenModel):
            refused += 1
    assert refused == 0
