"""Losses that are scaled on the way to `manual_backward`: those of distillation are scaled with them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distilling import Fit, apart, fits
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_accel import Distillation
from lightning_accel.distillation import Teacher
from lightning_accel.distillation.criterion import Listener
from lightning_accel.distillation.scale import Scale

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:the teacher is hardly better than guessing"),
]
EVERY = 2  # batches of a step by hand
WEIGHT, TASK = 0.5, 0.3

Loss = Callable[[Any, Any, int], Tensor]


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Fit:
    return fits({**trainer_kwargs, "max_epochs": 1})


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batches() -> list[Any]:
    torch.manual_seed(3)
    return [(torch.randn(6, 6), torch.randint(0, 3, (6,))) for _ in range(4)]


class ByHand(LightningModule):
    """Accumulates as Lightning's page on manual optimization does it."""

    def __init__(self, student: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.net, self.loss, self.automatic_optimization = student, loss, False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.manual_backward(self.loss(self.net(batch[0]), batch, batch_idx))
        if (batch_idx + 1) % EVERY == 0:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), 0.1)


def kd(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    given, wanted = ((x / temperature).log_softmax(-1) for x in (student, teacher))
    return temperature**2 * F.kl_div(given, wanted, log_target=True, reduction="batchmean")


def off(
    fit: Fit,
    loss: Loss,
    factor: Callable[[int], float] = lambda i: 1.0,
    make: Any = net,
    lesson: Any = kd,
    losses: Any = None,
    module: Any = ByHand,
    **kwargs: Any,
) -> float:
    """Return how far a fit is from the loop by hand in which the lesson of a batch counts so often."""
    torch.manual_seed(0)
    student, guide = make(), net()
    model = module(copy.deepcopy(student), loss)
    losses = losses or {"kd": {"weight": WEIGHT, "temperature": 2.0}}
    own = Distillation(
        Teacher(guide, precision="32-true"), losses, task_weight=TASK, diagnostics_every_n_steps=0
    )
    fit(model, own, batches=DataLoader(batches(), batch_size=None), **kwargs)
    sgd = torch.optim.SGD(student.parameters(), 0.1)
    for index, batch in enumerate(batches()):
        out = student(batch[0])
        logits = out["logits"] if isinstance(out, dict) else out
        learnt = lesson(logits, guide(batch[0]).detach())
        (TASK * loss(out, batch, index) + factor(index) * WEIGHT * learnt).backward()
        if (index + 1) % EVERY == 0:
            sgd.step()
            sgd.zero_grad()
    assert apart(student, make_again(make)) > 1e-4
    return apart(model.net, student)


def make_again(make: Any) -> nn.Module:
    torch.manual_seed(0)
    return make()


class WithLoss(nn.Module):
    """Answers as transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, x: Tensor) -> Any:
        logits = self.body(x)
        return {"logits": logits, "loss": logits.logsumexp(1).mean() - logits[:, 0].mean()}


ce = F.cross_entropy
SCALED: dict[str, tuple[Loss, Callable[[int], float]]] = {
    "as it is": (lambda o, b, i: ce(o, b[1]), lambda i: 1.0),
    "divided": (lambda o, b, i: ce(o, b[1]) / 4, lambda i: 0.25),
    "weighted by the batch": (lambda o, b, i: ce(o, b[1]) * (0.5 + i), lambda i: 0.5 + i),
    "a tensor's factor": (lambda o, b, i: b[0][0, 0].abs() * ce(o, b[1]), lambda i: factors()[i]),
    "with a penalty": (lambda o, b, i: (ce(o, b[1]) + o.square().mean()) / 4, lambda i: 0.25),
    "each part": (lambda o, b, i: ce(o, b[1]) / 4 + 0.01 * o.abs().mean() / 4, lambda i: 0.25),
    "another sum each time": (
        lambda o, b, i: ce(o, b[1]) / 4 if i % 2 else (o.square().mean() + ce(o, b[1])) / 4,
        lambda i: 0.25,
    ),
    "beside numbers": (lambda o, b, i: (ce(o, b[1]) + 9 * F.mse_loss(o, b[0][:, :3])) / 4, lambda i: 0.25),
    "smoothed": (lambda o, b, i: ce(o, b[1], label_smoothing=0.1) / 4, lambda i: 0.25),
    "of the log-softmax": (lambda o, b, i: F.nll_loss(o.log_softmax(1), b[1]) / 4, lambda i: 0.25),
    "mixed up": (
        lambda o, b, i: (0.7 * ce(o, b[1]) + 0.3 * ce(o, b[1].flip(0))) / 4,
        lambda i: 0.25,
    ),
    "a sum over rows": (lambda o, b, i: ce(o, b[1], reduction="sum"), lambda i: 1.0),
    "a sum that is divided": (lambda o, b, i: ce(o, b[1], reduction="sum") / 2, lambda i: 0.5),
    "a mean by hand": (lambda o, b, i: ce(o, b[1], reduction="sum") / 6 / 4, lambda i: 0.25),
    "masked by hand": (
        lambda o, b, i: (ce(o, b[1], reduction="none") * (b[1] > 0)).sum() / (b[1] > 0).sum() / 4,
        lambda i: 0.25,
    ),
    "written out": (lambda o, b, i: -o.log_softmax(1).gather(1, b[1][:, None]).mean() / 4, lambda i: 0.25),
    "written out for rows that count": (
        lambda o, b, i: -(o.log_softmax(1)[:, 0] * (b[1] > 0)).sum() / (b[1] > 0).sum() / 4, lambda i: 0.25,
    ),
    "smoothed by hand": (
        lambda o, b, i: -(o.log_softmax(1) * (0.9 * F.one_hot(b[1], 3) + 0.1 / 3)).sum(1).mean() / 4,
        lambda i: 0.25,
    ),
    "a mean of rows": (lambda o, b, i: ce(o, b[1], reduction="none").mean() / 4, lambda i: 0.25),
}  # fmt: skip


def factors() -> list[float]:
    return [float(x[0, 0].abs()) for x, _ in batches()]


@pytest.mark.parametrize("case", SCALED)
def test_how_often_the_criterion_counts_is_told_loss_after_loss(case: str) -> None:
    loss, factor = SCALED[case]
    student, scale = net(), None
    for index, batch in enumerate(batches()):
        with Listener() as listener:
            logits = student(batch[0])
            given = loss(logits, batch, index)
        scale = scale or Scale.learn(given, [logits], listener.calls, frozenset({"classes"}))
        found = scale(given, [logits])
        assert found is not None and float(found) == pytest.approx(factor(index), rel=1e-5)


@pytest.mark.parametrize(
    "case", ["weighted by the batch", "another sum each time", "masked by hand"]
)
def test_what_is_done_to_the_criterion_is_done_to_the_lesson(fit: Fit, case: str) -> None:
    loss, factor = SCALED[case]
    assert off(fit, loss, factor) < 1e-6


def test_a_loss_of_the_networks_own_is_the_criterion(fit: Fit) -> None:
    assert off(fit, lambda o, b, i: o["loss"] / 4, lambda i: 0.25, WithLoss) < 1e-6


def test_a_lesson_in_numbers_stands_beside_the_criterion_of_numbers(fit: Fit) -> None:
    numbers = {"mse": WEIGHT}
    loss: Loss = lambda o, b, i: F.mse_loss(o, b[0][:, :3]) / 4  # noqa: E731
    assert off(fit, loss, lambda i: 0.25, lesson=F.mse_loss, losses=numbers) < 1e-6


def focal(logits: Tensor, y: Tensor) -> Tensor:
    each = ce(logits, y, reduction="none")
    return ((1 - (-each).exp()) ** 2 * each).mean()


@pytest.mark.parametrize("criterion", [focal, lambda o, y: o.var(1).mean()])
def test_a_scale_that_nothing_tells_is_said(fit: Fit, criterion: Any) -> None:
    with pytest.warns(UserWarning, match=r"not clear.*given 0\.25 times.*weights"):
        assert off(fit, lambda o, b, i: criterion(o, b[1]) / 4) < 1e-6


def test_the_shares_of_the_gradient_are_those_of_what_is_learned(fit: Fit) -> None:
    shares = []
    for divided in (1.0, 4.0):
        model = ByHand(make_again(net), lambda o, b, i, by=divided: ce(o, b[1]) / by)
        own = Distillation(
            Teacher(net(), precision="32-true"), {"kd": 0.5}, diagnostics_every_n_steps=1
        )
        fit(model, own, batches=DataLoader(batches()[:1], batch_size=None))
        shares.append(own.shares["kd"])
    assert shares[0] == pytest.approx(shares[1], abs=1e-5)


def test_a_criterion_that_comes_after_another_loss_is_said(fit: Fit) -> None:
    class Twice(ByHand):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            logits = self.net(batch[0])
            loss = ce(logits, batch[1]) / 4
            self.manual_backward(logits.square().mean(), retain_graph=True)
            self.manual_backward(loss)

    student = make_again(net)
    own = Distillation(Teacher(net(), precision="32-true"), "kd")
    with pytest.warns(UserWarning, match=r"another loss first, and then the criterion"):
        fit(Twice(student, ce), own, batches=DataLoader(batches(), batch_size=None))


class CompiledFunction(torch.autograd.Function):
    """Named as the node of compiled code is."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, y: Tensor) -> Tensor:
        return ce(logits, y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:  # type: ignore[override]
        raise AssertionError("nothing below the criterion is computed")


def test_a_criterion_is_found_again_in_its_compiled_code() -> None:
    (x, y), student = batches()[0], net()
    with Listener() as listener:  # as it runs without its code for once
        loss = ce(logits := student(x), y) / 4
    scale = Scale.learn(loss, [logits], listener.calls, frozenset({"classes"}))
    assert scale(CompiledFunction.apply(student(x), y) / 8, []) == 0.125  # type: ignore[no-untyped-call]
    assert scale(student(x).square().mean() / 8, []) is None


def test_a_hook_on_the_loss_is_not_called_for_a_look(fit: Fit) -> None:
    called: list[int] = []

    def hooked(o: Any, b: Any, i: int) -> Tensor:
        loss = ce(o, b[1]) / 4
        loss.register_hook(lambda gradient: called.append(i))
        return loss

    with pytest.warns(UserWarning, match="a loss with hooks of your own"):
        assert off(fit, hooked) < 1e-6
    assert sorted(called) == [0, 0, 1, 1, 2, 2, 3, 3]  # in the fit and in the loop
