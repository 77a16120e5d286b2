"""A compiled block that computes something else than itself is found, and what a comparison writes is taken back."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import ActivationCheckpointing, BlockCompile, FrozenPredict, TeacherCache
from lightning_accel.compilation import captures, compile_blocks, frozen
from lightning_accel.compilation.region import Region, ask, region
from lightning_accel.memory import checkpoint_activations

pytestmark = [
    pytest.mark.usefixtures("clean_dynamo"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]

WORLD = {"scale": 1.0}


@torch._dynamo.assume_constant_result
def scale() -> float:
    """Return what no guard sees."""
    return WORLD["scale"]


class Block(nn.Module):
    """All that a forward may do besides."""

    def __init__(self, act: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.norm, self.act = nn.Linear(8, 8), nn.BatchNorm1d(8), act
        self.calls, self.rate, self.kept = 0, 0.1, []  # type: ignore[var-annotated]
        self.metric = torchmetrics.MeanMetric()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(self.act(self, x)))


def network(act: Callable[[Any, Tensor], Tensor], **options: Any) -> tuple[Any, Any, Region]:
    torch.manual_seed(0)
    net = nn.Sequential(Block(act))
    plain = copy.deepcopy(net)
    compile_blocks(net, select="0", **{"backend": "aot_eager", **options})
    found = region(net[0])
    assert found is not None and found.samples is not None
    return net, plain, found


def step(net: Any, x: Tensor) -> list[Tensor]:
    net.zero_grad()
    torch.manual_seed(1)
    out = net(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in net.parameters()), *(b.clone() for b in net.buffers())]  # fmt: skip


def same(net: Any, plain: Any, steps: int = 1, rtol: float = 0.0) -> None:
    for _ in range(steps):
        x = torch.randn(4, 8)
        for one, other in zip(step(net, x.clone()), step(plain, x.clone()), strict=True):
            torch.testing.assert_close(one, other, rtol=rtol, atol=rtol)
    assert net[0].calls == plain[0].calls


def plant(found: Region, monkeypatch: pytest.MonkeyPatch, factor: float, since: int = 1) -> None:
    """Let the compiled code of a block be wrong from some call on."""
    run, calls = found._run, [0]

    def wrong(args: Any, kwargs: Any) -> Any:
        calls[0] += 1
        return run(args, kwargs) * (factor if calls[0] >= since else 1.0)

    monkeypatch.setattr(found, "_run", wrong)


@pytest.mark.parametrize("since", [1, 2, 4])
def test_a_wrong_graph_is_found_and_the_step_is_that_of_the_block_itself(
    since: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, plain, found = network(lambda b, x: x)
    plant(found, monkeypatch, 1.01, since)
    same(net, plain, since - 1)
    with pytest.warns(
        UserWarning, match=rf"runs as it is.*off by 0\.01 of its norm at call {since}"
    ):
        same(net, plain)
    same(net, plain, 4)
    (capture,) = captures(net)
    assert "off by" in capture.stopped["0"]


def test_rounding_is_no_fault_also_where_a_block_makes_much_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, _, found = network(lambda b, x: x)
    plant(found, monkeypatch, 1 + 4e-7)
    step(net, torch.randn(4, 8))
    assert found.samples is not None and 0 < found.samples.error < 1e-6
    torch.manual_seed(0)

    class Chaos(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x * 3e4).sin()

    def reordered(graph: Any, inputs: Any) -> Any:
        return lambda *args: graph.forward(
            *(a * (1 + 1.2e-7) if a.shape == (4, 8) else a for a in args)
        )

    chaos = nn.Sequential(Chaos())
    compile_blocks(chaos, select="0", backend=reordered)
    chaos(torch.randn(4, 8))
    samples = region(chaos[0]).samples  # type: ignore[union-attr]
    assert samples is not None and samples.reason == "" and samples.error > 1e-4


def test_what_no_guard_sees_is_found_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORLD, "scale", 1.0)
    net, plain, _ = network(lambda b, x: x * scale())
    same(net, plain, 8)
    WORLD["scale"] = 3.0
    ask(net)
    with pytest.warns(UserWarning, match="runs as it is from now on"):
        same(net, plain)


def test_a_change_of_what_it_reads_is_a_reason_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of a helper that changes with an attribute."""
    monkeypatch.setitem(WORLD, "scale", 1.0)
    net, plain, _ = network(lambda b, x: x * scale())
    same(net, plain, 8)
    WORLD["scale"] = 3.0
    net[0].extra = plain[0].extra = 1
    with pytest.warns(UserWarning, match="at call 9"):
        same(net, plain)


def _count(block: Any, x: Tensor) -> Tensor:
    block.calls += 1
    block.kept.append(1)
    block.mean.lerp_(x.detach().mean(0), 0.1)
    return x * len(block.kept) - block.mean


def _metric(block: Any, x: Tensor) -> Tensor:
    block.metric.update(x.detach().mean())
    return x * (1 + block.metric.compute())


ACTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "counts": _count,
    "dropout": lambda b, x: F.dropout(x, 0.5),
    "in place": lambda b, x: x.mul_(2.0),
    "metric": _metric,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTS)
def test_a_comparison_leaves_nothing_behind(name: str) -> None:
    net, plain, found = network(ACTS[name])
    same(net, plain, 5)
    assert found.samples is not None and found.samples.num_checked >= 3 and not found.samples.reason


n = 1000
GENERATOR = torch.Generator()


class Tally(nn.Linear):
    n = 0

    def forward(self, x: Tensor) -> Tensor:
        Tally.n += 1
        return super().forward(x) * Tally.n


class Draws(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.rand((), generator=GENERATOR)


class Clamps(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.weight.data.clamp_(-0.1, 0.1)
        return out


@pytest.mark.parametrize("kind", [Tally, Draws, Clamps])
def test_a_comparison_leaves_nothing_behind_in_files_classes_and_weights(kind: Any) -> None:
    net = nn.Sequential(kind(8, 8))
    plain = copy.deepcopy(net)
    compile_blocks(net, select="0", backend="eager")
    found = region(net[0])
    seen, inputs = [], [torch.randn(4, 8) for _ in range(6)]
    for one in (net, plain):
        Tally.n = 0
        GENERATOR.manual_seed(0)
        seen.append([step(one, x.clone()) for x in inputs])
    for compiled, eager in zip(*seen, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
    assert n == 1000 and Tally.n in (0, 6)
    assert found is not None and found.samples is not None
    assert found.samples.num_checked or "weights" in found.samples.left_out


@pytest.mark.parametrize(
    ("act", "what"),
    [
        (lambda b, x: x * random.random(), "`random`"),
        (lambda b, x: x * np.random.rand(), "`numpy.random`"),
    ],
)
def test_a_block_that_draws_elsewhere_runs_as_it_is(act: Any, what: str) -> None:
    net, plain, _ = network(act)
    random.seed(0), np.random.seed(0)
    x = torch.randn(4, 8)
    state = random.getstate(), np.random.get_state()
    with pytest.warns(UserWarning, match=f"runs as it is.*draws from {what}"):
        ours = step(net, x)
    random.setstate(state[0]), np.random.set_state(state[1])
    for one, other in zip(ours, step(plain, x), strict=True):
        assert torch.equal(one, other)


def test_draws_of_a_backend_that_draws_otherwise_are_left_out_with_the_reason() -> None:
    net, _, found = network(
        lambda b, x: F.dropout(x, 0.5), backend=lambda graph, inputs: graph.forward
    )
    step(net, torch.randn(4, 8))
    assert found.samples is not None and "its backend draws others" in found.samples.left_out
    assert "draws random numbers" in captures(net)[0].uncompared["0"]


def test_a_forward_that_cannot_run_twice_and_one_with_hooks_are_left_out() -> None:
    seen: list[Any] = []

    def once(block: Any, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            raise RuntimeError("only once")
        return x

    net, plain, found = network(once)
    same(net, plain)
    assert found.samples is not None and "only once" in found.samples.left_out
    net, plain, found = network(lambda b, x: x)
    net[0].layer.register_forward_hook(lambda *args: seen.append(1))
    net(torch.randn(4, 8))
    assert len(seen) == 1


def test_nothing_is_compared_where_nobody_wants_it() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Block(lambda b, x: x))
    compile_blocks(net, select="0", backend="aot_eager", check_every_n_calls=None)
    assert region(net[0]).samples is None  # type: ignore[union-attr]


@pytest.mark.parametrize("value", [0, False, -1, 1.5, True, "64", float("nan"), []])
def test_wrong_numbers_of_calls_are_refused(value: Any, tmp_path: Path) -> None:
    """Nought could be meant as never or as always, so never has a word of its own everywhere."""
    kind = ValueError if type(value) is int else TypeError
    for takes in (
        BlockCompile,
        FrozenPredict,
        ActivationCheckpointing,
        partial(TeacherCache, tmp_path),
        partial(compile_blocks, nn.Linear(2, 2)),
        partial(checkpoint_activations, nn.Linear(2, 2)),
    ):
        with pytest.raises(kind, match=r"or None\. Found: .* Do: pass 64.* never is None"):
            takes(check_every_n_calls=value)


def test_never_is_none_everywhere(tmp_path: Path) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    net = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)])
    with frozen(net, backend="eager", check_every_n_calls=None) as networks, torch.no_grad():
        for _ in range(8):
            net.eval()(x)
    assert [network.num_checked for network in networks] == [1], "as its copy was made"
    assert TeacherCache(tmp_path, check_every_n_calls=None).check_every_n_calls is None
    numbers = iter(range(100))
    turning = nn.Sequential(*[Block(lambda b, x: x.roll(next(numbers), 1)) for _ in range(2)])
    checkpoint_activations(turning, check_every_n_calls=None)
    for _ in range(8):  # recomputed otherwise each time, and nobody looks
        turning(torch.randn(3, 8)).sum().backward()


class User(LightningModule):
    """The scale that no guard sees changes with each epoch, or with each dataloader."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(Block(lambda b, x: x * scale()), nn.Linear(8, 8))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        WORLD["scale"] = 1.0 + dataloader_idx
        return self.net(batch[0])

    def on_train_epoch_start(self) -> None:
        WORLD["scale"] = 1.0 + self.current_epoch

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def data() -> DataLoader[Any]:
    x = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x), 4)


def test_a_fit_finds_it_at_the_next_epoch_and_says_so_in_its_report(
    trainer_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WORLD, "scale", 1.0)
    ours, plain, edit = User(), User(), BlockCompile("net.0", backend="aot_eager")
    with pytest.warns(UserWarning, match="at call 7"):
        Trainer(**{**trainer_kwargs, "callbacks": [edit]}).fit(ours, data())
    Trainer(**trainer_kwargs).fit(plain, data())
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
    assert any(row[1] == "runs as it is" for row in edit.report.rows)


def test_a_prediction_finds_it_at_the_next_dataloader(
    trainer_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WORLD, "scale", 1.0)
    found = []
    for callbacks in ([], [BlockCompile("net.0", backend="aot_eager", check_every_n_calls=1000)]):
        run = Trainer(**{**trainer_kwargs, "callbacks": callbacks})
        if callbacks:
            with pytest.warns(UserWarning, match="at call 7"):
                found.append(run.predict(User(), [data(), data()]))
        else:
            found.append(run.predict(User(), [data(), data()]))
    for one, other in zip(*[[t for part in f for t in part] for f in found], strict=True):  # type: ignore[union-attr]
        assert torch.equal(one, other)
