"""Recomputed, compiled and fused parts of a training, as public reports have them. The truth is the same without ours."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel.compilation import BlockCompile, WarmStart, compile_blocks
from lightning_accel.loop import FusedOptimizer
from lightning_accel.memory import checkpoint_activations
from lightning_accel.precision import Bf16Precision

pytestmark = [
    pytest.mark.usefixtures("clean_dynamo"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]

TRACKER: dict[str, Any] = {"aux": 0.0, "seen": []}


def save_to_tracker(loss: Tensor) -> None:
    TRACKER["aux"] += float(loss.detach())
    TRACKER["seen"].append(len(TRACKER["seen"]))


class Router(nn.Module):
    """Experts, a load that begins as None and grows in place, and a loss that a helper writes down elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 2), nn.Linear(8, 8)
        self.load: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).softmax(-1)
        return x + self.experts(x) * self.balance(scores).max(-1, keepdim=True).values

    def balance(self, scores: Tensor) -> Tensor:
        counted = scores.detach().sum(0)
        self.load = counted if self.load is None else self.load.add_(counted)
        save_to_tracker(scores.square().mean())
        return scores


class Extra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x)).relu()


class Remembering(nn.Module):
    """Attention over what a cache in its arguments holds, to which it adds."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        if cache is not None:
            cache.keys.append(self.key(x))
            x = x + (self.query(x) @ torch.cat(cache.keys).T).softmax(-1) @ torch.cat(cache.keys)
        return x


class Cache:
    def __init__(self) -> None:
        self.keys: list[Tensor] = []


def _routed(net: nn.Sequential, x: Tensor) -> Tensor:
    return net(x).square().mean()


def _twice(net: nn.Sequential, x: Tensor) -> Tensor:
    loss = net(x).square().mean()
    with torch.no_grad():
        weight = net(2 * x).mean()  # a dynamic weight of the loss, from another forward in training
    return loss * weight


def _cached(net: nn.Sequential, x: Tensor) -> Tensor:
    cache = Cache()
    for block in net:
        x = block(x, cache=cache)
    return x.square().mean()


@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        pytest.param(Router, _routed, id="Megatron-LM#1514, NeMo Automodel#3247: a router's loss and load"),
        pytest.param(Extra, _twice, id="Samudra#572, pytorch#96136: statistics, with one more forward"),
        pytest.param(Remembering, _cached, id="MemoryVLA#18, transformers#28056: a cache grows"),
    ],
)  # fmt: skip
def test_what_a_recomputed_block_writes_is_written_once(
    kind: type[nn.Module], loss: Callable[..., Tensor], policy: str
) -> None:
    """Losses of routers were logged twice, loads and statistics counted twice, caches twice as long."""
    torch.manual_seed(0)
    first, ends = nn.Sequential(kind(), kind(), kind()), []
    for ours in (False, True):
        net = copy.deepcopy(first)
        if ours:
            checkpoint_activations(net, policy=policy)
        TRACKER.update(aux=0.0, seen=[])
        torch.manual_seed(1)
        for _ in range(3):
            loss(net, torch.randn(4, 8)).backward()
        loads = [m.load for m in net if isinstance(m, Router)]
        left = [*(p.grad for p in net.parameters() if p.grad is not None), *net.buffers(), *loads]
        ends.append((left, TRACKER["aux"], list(TRACKER["seen"])))
    assert ends[0][1:] == ends[1][1:]
    assert all(map(torch.equal, ends[0][0], ends[1][0])) and len(ends[0][0]) == len(ends[1][0])


class Acting(nn.Module):
    """A block of which a step moves something."""

    factor = 1.0

    def __init__(self, act: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.act, self.cache, self.step = nn.Linear(8, 8), act, torch.zeros(8), 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self, self.layer(x))


def _shuffled(block: Any, x: Tensor) -> Tensor:
    order = list(range(8))
    random.shuffle(order)
    return x[:, order]


def _seeded(block: Any, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    return x * torch.rand(8)


def _in_cache(block: Any, x: Tensor) -> Tensor:
    block.cache[0] = 2.0
    return x + block.cache


@pytest.mark.filterwarnings("ignore:a compiled Acting runs as it is from now on")
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
@pytest.mark.parametrize(
    "act",
    [
        pytest.param(
            lambda b, x: x * Acting.factor, id="pytorch#176851: an attribute of the class"
        ),
        pytest.param(lambda b, x: x + b.step, id="pytorch#117496: a number that changes"),
        pytest.param(_in_cache, id="pytorch#115774: a cache that is written and replaced"),
        pytest.param(_shuffled, id="pytorch#197085: one permutation for the whole run"),
        pytest.param(_seeded, id="pytorch#107187: a seed within"),
    ],
)
def test_a_compiled_block_computes_with_what_is_now(
    act: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Acting, "factor", 1.0)
    torch.manual_seed(0)
    plain = nn.Sequential(Acting(act))
    net = copy.deepcopy(plain)
    compile_blocks(net, select="0", backend="aot_eager")
    for number in range(5):
        Acting.factor = 1.0 + number
        x, found = torch.randn(4, 8), []
        for one in (plain, net):
            one[0].step, one[0].cache = 0.5 * number, torch.full((8,), float(number))  # type: ignore[assignment]
            random.seed(number), torch.manual_seed(number)
            found.append((one(x), random.random(), float(torch.rand(1))))
        assert torch.equal(found[0][0], found[1][0]) and found[0][1:] == found[1][1:]


class User(LightningModule):
    def __init__(self, make: Callable[[Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.make = nn.Linear(8, 4), make
        self.thin = nn.Parameter(torch.randn(4, 1, 6))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        y = self.net(batch[0]).float()
        # A product over a dimension of one element, whose gradient has other strides than the weight.
        z = torch.bmm(batch[0][:4, :1, None].float().mT, self.thin.transpose(1, 2).float().mT)
        loss = F.cross_entropy(y, batch[1]) + z.square().mean()
        return (
            loss * float("inf")
            if batch_idx == 0 and self.current_epoch == 0 and self.breaks
            else loss
        )

    breaks = False

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


class Breaks(User):
    breaks = True


def fit(user: LightningModule, kwargs: dict[str, Any], *callbacks: Any, **others: Any) -> Trainer:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    trainer = Trainer(**{**kwargs, "callbacks": list(callbacks), "max_epochs": 2, **others})
    trainer.fit(user, DataLoader(TensorDataset(x, torch.arange(16) % 4), 4))
    return trainer


def test_a_step_that_the_scaler_skips_leaves_the_momentum_of_fused_sgd_alone(
    trainer_kwargs: dict[str, Any],
) -> None:
    """LibreYOLO#771: the kernel wrote infinity into the momentum, and weights exploded one step later."""
    ends = []
    for callbacks in ([], [FusedOptimizer()]):
        user = Breaks(lambda p: torch.optim.SGD(p, 0.05, momentum=0.9))
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        fit(user, trainer_kwargs, *callbacks, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        ends.append(user)
    for one, other in zip(*[e.parameters() for e in ends], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        assert one.isfinite().all()


def test_a_weight_with_a_dimension_of_one_takes_its_own_gradient(
    trainer_kwargs: dict[str, Any],
) -> None:
    """pytorch#106951, #110758: its gradient has other strides, which fused kernels refuse or do not look at."""
    ends = []
    for callbacks in ([], [FusedOptimizer()]):
        user = User(lambda p: torch.optim.AdamW(p, 0.01))
        fit(user, trainer_kwargs, *callbacks)
        ends.append(user)
    for one, other in zip(*[e.parameters() for e in ends], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_masters_learn_in_an_optimizer_that_is_made_anew(trainer_kwargs: dict[str, Any]) -> None:
    """Lightning#9982: a new optimizer for each phase of a training, in the place of the first."""

    class Phases(User):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch:
                self.trainer.strategy.optimizers = [self.make(self.parameters())]

    wanted, found = (Phases(lambda p: torch.optim.SGD(p, 1e-5)) for _ in range(2))
    plugin = Bf16Precision()
    start = {n: p.detach().clone() for n, p in wanted.named_parameters()}
    fit(wanted, trainer_kwargs)
    fit(found, trainer_kwargs, plugins=[plugin])
    masters = plugin.masters()
    for name, parameter in wanted.named_parameters():
        way = (parameter.detach() - start[name]).norm()
        assert 0 < (masters[name] - parameter.detach()).norm() < 0.05 * way


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*")
@pytest.mark.filterwarnings("ignore:`net` would have been compiled again")
def test_a_second_run_carries_no_number_of_the_first(
    trainer_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    """pytorch#194976, #197889, through a cache that travels: schedules of the second run are others."""

    class Scheduled(LightningModule):
        def __init__(self, start: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net, self.start = nn.Sequential(Acting(_normed)), start

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.net[0].step = self.start * (1 + self.global_step)  # type: ignore[assignment]
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    for start in (0.1, 0.37):
        ends = []
        for callbacks in ([], [WarmStart(tmp_path / "compiled.zip"), BlockCompile("net.0")]):
            torch._dynamo.reset()
            ends.append(Scheduled(start))
            fit(ends[-1], trainer_kwargs, *callbacks, max_epochs=1, limit_train_batches=2)
        for one, other in zip(*[e.parameters() for e in ends], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def _normed(block: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x * block.step, (8,), eps=block.step + 1e-3)
