"""Whatever moves between a forward and its backward, a block that recomputes learns bit for bit what it would have learned.

The truth is the same network without checkpointing, through the same steps.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn

from lightning_accel.errors import Unsupported
from lightning_accel.memory import checkpoint_activations


@dataclass(slots=True)
class Slotted:
    scale: float = 1.0


class Block(nn.Module):
    """Two layers, an adapter of each name, and whatever `act` does with them."""

    temperature = 1.0

    def __init__(self, act: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.2)
        self.adapters = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
        self.act, self.active, self.calls, self.epoch = act, "a", 0, 0
        self.config = SimpleNamespace(scale=1.0, inner=[{"scale": 1.0}])
        self.slotted, self.pair = Slotted(), (1, {"scale": 1.0})
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("table", torch.zeros(70_000))
        self.plain, self.array = torch.ones(8), np.ones(8)
        self.own, self.rng = torch.Generator().manual_seed(3), np.random.default_rng(3)
        self.codes = nn.Parameter(torch.ones(8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.up(self.act(self, x)))
        return x + self.down(self.drop(h)) + self.adapters[self.active](h) * self.temperature


class OwnNorm(nn.Module):
    """As many write it: statistics in place, and used at once."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.running.lerp_(x.mean(0), 0.3)
        return x - self.running


class Renorm(nn.BatchNorm1d):
    """Of torch's class, with a forward that reads what torch's own does not."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        self.running_mean += 0.3 * (x.detach().mean(0) - self.running_mean)
        return x - self.running_mean


def with_part(make: Callable[[], nn.Module]) -> Callable[[Any, Tensor], Tensor]:
    """Let a block hold one more module, which is called first."""
    return With(make)


class With:
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self.make = make

    def __call__(self, block: Any, x: Tensor) -> Tensor:
        return block.part(x)


class Metered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.metric = torchmetrics.MeanMetric()

    def forward(self, x: Tensor) -> Tensor:
        self.metric.update(x.detach().mean())
        return x * (1 + self.metric.compute() * 0.1)


class Frozen(nn.Module):
    """A norm whose statistics another forward of the same step moves."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def _count(block: Any, x: Tensor) -> Tensor:
    block.calls += 1
    return x * block.calls


def _statistic(block: Any, x: Tensor) -> Tensor:
    block.mean.lerp_(x.detach().mean(0), 0.1)
    return x - block.mean


def _hidden(block: Any, x: Tensor) -> Tensor:
    block.mean.data.lerp_(x.detach().mean(0), 0.1)
    return x - block.mean


def _large(block: Any, x: Tensor) -> Tensor:
    block.table[:8].lerp_(x.detach().mean(0), 0.1)
    return x - block.table[:8]


def _codes(block: Any, x: Tensor) -> Tensor:
    block.codes.data.lerp_(x.detach().mean(0), 0.1)
    return x - block.codes


def _array(block: Any, x: Tensor) -> Tensor:
    block.array += 0.1
    return x * float(block.array[0])


def _tensor(block: Any, x: Tensor) -> Tensor:
    block.plain.mul_(1.1)
    return x * block.plain


def _late(block: Any, x: Tensor) -> Tensor:
    if block.epoch > 0:
        block.mean.add_(x.detach().mean(0))
    return x - block.mean


def _normal(block: Any, x: Tensor) -> Tensor:
    return x * np.random.standard_normal()


def _late_numpy(block: Any, x: Tensor) -> Tensor:
    return x * np.random.rand() if block.epoch > 0 else x


def _global(block: Any, x: Tensor) -> Tensor:
    block.config.inner[0]["scale"] += 0.1
    return x * block.config.inner[0]["scale"]


def _fresh(block: Any, x: Tensor) -> Tensor:
    block.cache = {"n": [block.calls]}
    block.calls += len(block.cache["n"])
    return x * block.calls


WRITES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "nothing": lambda block, x: x,
    "counts": _count,
    "a statistic": _statistic,
    "a statistic through data": _hidden,
    "a large buffer": _large,
    "codes through data": _codes,
    "an array": _array,
    "a plain tensor": _tensor,
    "a buffer from epoch 1 on": _late,
    "a new container each time": _fresh,
    "deep in a config": _global,
    "python": lambda block, x: x * random.random(),
    "numpy": lambda block, x: x * np.random.rand(),
    "numpy, pairs": _normal,
    "numpy from epoch 1 on": _late_numpy,
    "its generator": lambda block, x: x + torch.randn(x.shape, generator=block.own),
    "its generator of numpy": lambda block, x: x * block.rng.random(),
    "own norm": with_part(OwnNorm),
    "norm of torch's class": with_part(lambda: Renorm(8)),
    "metric": with_part(Metered),
    "norm": with_part(lambda: nn.BatchNorm1d(8)),
    "spectral norm": with_part(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))),
    "slopes by chance": with_part(nn.RReLU),
}


def network(act: Callable[[Any, Tensor], Tensor]) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [Block(act) for _ in range(2)]
    if isinstance(act, With):
        for block in blocks:
            block.part = act.make()
    return nn.Sequential(*blocks)


def state(net: nn.Module) -> list[Tensor]:
    held = [
        *net.parameters(),
        *net.buffers(),
        *(p.grad for p in net.parameters() if p.grad is not None),
    ]
    own = [torch.tensor([float(b.calls), b.config.inner[0]["scale"], *b.array]) for b in net.children() if isinstance(b, Block)]  # fmt: skip
    metrics = [m.metric.compute() for m in net.modules() if isinstance(m, Metered)]
    return [t.detach().clone() for t in (*held, *own, *metrics)]


def learn(net: nn.Module, step: Callable[[nn.Module, Tensor, int], None]) -> list[Tensor]:
    """Take four steps, and return all that is left."""
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    for number in range(4):
        for block in net.children():
            block.epoch = number // 2
        net.zero_grad()
        step(net, torch.randn(4, 8), number)
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.01 * parameter.grad)
    drawn = [torch.tensor([random.random(), np.random.rand(), float(torch.rand(1))])]
    return [*state(net), *drawn]


def same(
    make: Callable[[], nn.Module],
    step: Callable[[nn.Module, Tensor, int], None],
    policy: str = "full",
) -> None:
    plain, ours = make(), make()
    checkpoint_activations(ours, policy=policy)
    wanted, found = learn(plain, step), learn(ours, step)
    assert len(wanted) == len(found)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other) and one.isfinite().all()


def once(net: nn.Module, x: Tensor, number: int) -> None:
    net(x).square().mean().backward()


@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize("name", WRITES)
def test_what_a_block_writes_and_draws_is_that_of_one_forward(name: str, policy: str) -> None:
    same(lambda: network(WRITES[name]), once, policy)


def test_slopes_drawn_as_the_last_of_a_block_are_there_in_backward() -> None:
    """The recomputation ends before the operation that fills them: gradients were NaN."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return F.rrelu(self.layer(x), training=True)

    for kind in (Last, lambda: nn.Sequential(nn.Linear(8, 8), nn.RReLU())):
        net = nn.Sequential(kind(), kind())
        same(lambda net=net: copy.deepcopy(net), once)  # type: ignore[misc]


def _attribute(net: Any, value: Any) -> None:
    for block in net:
        block.active = value


def _config(net: Any, value: Any) -> None:
    for block in net:
        block.config.scale = block.slotted.scale = block.pair[1]["scale"] = ord(value) / 64


def _class(net: Any, value: Any) -> None:
    Block.temperature = ord(value) / 64


def _modes(net: Any, value: Any) -> None:
    net.train(value == "a")


def _buffer(net: Any, value: Any) -> None:
    for block in net:
        block.mean = torch.full((8,), ord(value) / 64)


def _replaced(net: Any, value: Any) -> None:
    for block in net:
        block.adapters["a"] = block.adapters["b"]


def _hooks(net: Any, value: Any) -> None:
    for block in net:
        if value == "a":
            block.handle = block.up.register_forward_hook(lambda m, args, out: out * 2)
        elif hasattr(block, "handle"):
            block.handle.remove()


READS: dict[str, tuple[Callable[[Any, Any], None], Callable[[Any, Tensor], Tensor]]] = {
    "adapters by attribute": (_attribute, WRITES["nothing"]),
    "a config": (_config, lambda b, x: x * b.config.scale * b.slotted.scale / b.pair[1]["scale"]),
    "a class": (_class, WRITES["nothing"]),
    "modes": (_modes, WRITES["norm"]),
    "a buffer": (_buffer, lambda b, x: x + b.mean),
    "a module replaced": (_replaced, WRITES["nothing"]),
    "hooks": (_hooks, WRITES["nothing"]),
}


@pytest.mark.parametrize("name", READS)
def test_what_a_block_reads_is_in_backward_what_it_was_in_forward(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """peft#2832: two adapters in one step, of which the loss needs both."""
    monkeypatch.setattr(Block, "temperature", 1.0)
    change, act = READS[name]

    def step(net: nn.Module, x: Tensor, number: int) -> None:
        net.train()
        change(net, "a")
        first = net(x)
        change(net, "b")
        second = net(x.flip(0))
        (first * second).square().mean().backward()

    same(lambda: network(act), step)


def test_statistics_that_a_norm_reads_are_those_of_its_forward() -> None:
    """A norm in evaluation while all else learns; another forward of the step moves its statistics."""

    def step(net: nn.Module, x: Tensor, number: int) -> None:
        net.train()
        for block in net.children():
            block.part.eval()
        loss = net(x).square().mean()
        net.train()
        with torch.no_grad():
            net(3 * x)
        loss.backward()

    same(lambda: network(WRITES["norm"]), step)


class Gathers(nn.Module):
    """Takes the features so far in a list, as dense networks do, and keeps what it likes in its arguments."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, features: list[Tensor], extra: dict[str, Any], cache: Any) -> Tensor:
        extra["n"] = extra.get("n", 0) + 1
        cache.kept.append(features[-1].detach())
        return self.layers(sum(features)) * extra["n"] * len(cache.kept)  # type: ignore[arg-type]


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Gathers(8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        features, extra, cache = [x], {}, SimpleNamespace(kept=[])  # type: ignore[var-annotated]
        for block in self.blocks:
            features.append(block(features, extra=extra, cache=cache))
        assert extra["n"] == len(cache.kept) == 3
        return torch.stack(features).sum(0)


def test_arguments_that_are_changed_later_are_what_they_were() -> None:
    """torchvision's dense networks, Hugging Face's caches of keys and values."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Dense()

    same(make, once)


def _optimizer_between(net: Any, x: Tensor, number: int) -> None:
    out = net(x)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.9)
    out.square().mean().backward()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_step_between_forward_and_backward_is_an_error_with_and_without(
    checkpointed: bool,
) -> None:
    """pytorch#39141 and many: torch says so where weights are saved; a recomputation would take the new ones."""
    net = network(WRITES["nothing"])
    if checkpointed:
        checkpoint_activations(net)
    with pytest.raises((RuntimeError, Unsupported), match=r"in-?place"):
        _optimizer_between(net, torch.randn(4, 8), 0)


def test_a_large_buffer_that_begins_to_change_is_refused_before_it_does_harm() -> None:
    def late(block: Any, x: Tensor) -> Tensor:
        if block.epoch > 0:
            block.table.add_(1)
        return x + block.table[:8]

    net = network(late)
    checkpoint_activations(net)
    with pytest.raises(Unsupported, match="`table`|table"):
        learn(net, once)


def test_a_shuffle_that_nobody_can_put_back_is_found_at_once() -> None:
    """Norm and sum are those of the first time; single numbers are not."""
    calls = iter(range(100))

    class Shuffles(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).roll(next(calls), 1)

    net = nn.Sequential(Shuffles(nn.Linear(8, 8)), Shuffles(nn.Linear(8, 8)))
    checkpoint_activations(net)
    with pytest.raises(Unsupported, match="recomputes something else"):
        once(net, torch.randn(4, 8), 0)


def test_a_block_that_begins_to_differ_keeps_its_activations_with_one_loud_line() -> None:
    calls = iter(range(100))
    net = network(lambda block, x: x * next(calls) if block.epoch > 0 else x)
    receipt = checkpoint_activations(net, check_every_n_calls=3)
    assert len(receipt.changes) == 2
    with pytest.warns(
        UserWarning, match=r"keeps its activations from now on.*after 2 comparisons"
    ) as told:
        learn(net, once)
    assert len(told) == 2  # of two blocks
    x = torch.randn(4, 8)
    out = net(x)
    assert out.grad_fn is not None
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        net(x)
    assert len(saved) > 10
