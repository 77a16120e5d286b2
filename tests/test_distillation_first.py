"""The first step is the user's: nothing of the user's code runs more often, and all is ready within it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distilling import Fit, Manual, Module, apart, by_hand, fits, rows, teacher
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_accel import Distillation
from lightning_accel.errors import AccelError

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"
)


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Fit:
    return fits(trainer_kwargs)


# What belongs to no module, and so to no copy of one.
NOTES: list[Any] = []
STREAM: list[Iterator[float]] = []
CHANCE = torch.Generator()


class Noting(nn.Module):
    """A network around another one whose forward leaves traces outside of it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.inner.register_forward_hook(lambda *_: NOTES.append("hook"))

    def forward(self, x: Tensor) -> Tensor:
        NOTES.append(("forward", len(x), random.random()))
        return self.inner(x) + torch.rand((), generator=CHANCE)


class Leaves(Module):
    """Its steps write into a global logger, read a stream, and draw from a generator of the program's."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Noting(self.net)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        NOTES.append(("step", batch_idx, next(STREAM[0]), float(torch.rand((), generator=CHANCE))))
        loss = super().training_step(batch, batch_idx)
        NOTES.append(("loss", batch_idx))
        return loss


class Itself(Leaves):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        NOTES.append(("step", batch_idx, next(STREAM[0])))
        return F.cross_entropy(self(batch[0]), batch[1])


class ByHand(Leaves):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Once(IterableDataset):
    """A stream that only the fit may read."""

    def __init__(self) -> None:
        self.items = iter([rows()[i] for i in range(24)])

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            NOTES.append("read")
            yield item


def left(fit: Fit, make: Callable[[], Any], *callbacks: Callback, batches: Any = None) -> list[Any]:
    NOTES.clear()
    STREAM[:] = [iter(range(1000))]  # type: ignore[list-item]
    CHANCE.manual_seed(0)
    random.seed(0)
    fit(make(), *callbacks, batches=batches, max_epochs=2)
    return list(NOTES)


@pytest.mark.parametrize("every", [200, 1])
@pytest.mark.parametrize("make", [Leaves, Itself, ByHand])
def test_the_users_code_runs_as_often_as_without_a_teacher(
    fit: Fit, make: Callable[[], Any], every: int
) -> None:
    lesson = Distillation(teacher(), {"kd": 0.5}, diagnostics_every_n_steps=every)
    assert left(fit, make, lesson) == left(fit, make)
    assert lesson.shares["kd"] > 0  # measured, and nothing ran for it


def test_a_stream_is_read_by_the_fit_alone(fit: Fit) -> None:
    found = left(fit, Leaves, Distillation(teacher(), "kd"), batches=DataLoader(Once(), 8))
    assert found == left(fit, Leaves, batches=DataLoader(Once(), 8)) and found.count("read") == 24


def test_shares_beside_hooks_on_gradients_are_those_without(fit: Fit) -> None:
    shares = []
    NOTES.clear()
    for hooked in (False, True):
        model = Module()
        if hooked:
            next(model.net.parameters()).register_hook(lambda g: NOTES.append(g.shape))
        lesson = Distillation(teacher(), {"kd": 0.5})
        fit(model, lesson)
        shares.append(lesson.shares)
    assert len(NOTES) == 6 and shares[0].keys() == shares[1].keys()  # one for each step
    assert all(abs(shares[0][k] - shares[1][k]) < 1e-6 for k in shares[0])


def test_a_network_under_no_grad_is_no_student(fit: Fit) -> None:
    class Perceives(Module):
        def __init__(self) -> None:
            super().__init__()
            self.look = nn.Conv2d(3, 3, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with torch.no_grad():
                self.look(batch[0])
            return super().training_step(batch, batch_idx)

    model = Perceives()
    fit(model, Distillation(teacher(), {"kd": {"weight": 0.5}}, task_weight=0.3))
    assert apart(model.net, by_hand("kd")[0]) == 0


@pytest.mark.slow
def test_a_first_step_is_compiled_as_all_others(fit: Fit, clean_dynamo: None) -> None:
    from torch._dynamo.testing import CompileCounter

    counter, model = CompileCounter(), Module()
    model.net.compile(backend=counter)
    fit(model, Distillation(teacher(), {"kd": {"weight": 0.5}}, task_weight=0.3))
    assert counter.frame_count == 2  # training, and validation
    assert apart(model.net, by_hand("kd")[0]) < 1e-6


def test_a_compiled_criterion_is_heard_and_compiled_once(fit: Fit, clean_dynamo: None) -> None:
    from torch._dynamo.testing import CompileCounter

    class Owns(Module):
        def __init__(self) -> None:
            super().__init__()
            self.criterion = torch.compile(nn.CrossEntropyLoss(), backend=counter)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.criterion(self.net(batch[0]), batch[1])

    counter, lesson = CompileCounter(), Distillation(teacher(), "kd")
    fit(Owns(), lesson, max_epochs=1)
    assert counter.frame_count == 1
    assert lesson.engine.usage.kinds == {"classes"} and lesson.engine.usage.classes == 4


def test_two_networks_are_named_before_the_second_is_called(fit: Fit) -> None:
    class Two(Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self.head(self.net(batch[0])), batch[1])

    with pytest.raises(
        AccelError, match="not clear which.*Found: 2 networks.*net, head.*Do: name it"
    ):
        fit(Two(), Distillation(teacher(), "kd"))


class Blank(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx:
            return super().training_step(batch, batch_idx)
        return None


def test_a_student_that_comes_in_a_later_step_is_found(fit: Fit) -> None:
    model = Blank()
    lesson = Distillation(teacher(), {"kd": 0.5}, diagnostics_every_n_steps=0)
    fit(model, lesson)
    plain = Blank()
    fit(plain)
    assert apart(model, plain) > 1e-4


def test_what_a_forward_does_to_its_inputs_reaches_the_teacher_where_the_network_inside_is_named(
    fit: Fit,
) -> None:
    class Augments(Module):
        def forward(self, x: Any) -> Any:
            return self.net(x.flip(-1))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self(batch[0]), batch[1])

    got: list[Any] = []
    for student in (None, "net"):
        guide = teacher()
        guide.network.register_forward_hook(lambda m, args, out: got.append(args[0]))
        fit(
            Augments(),
            Distillation(guide, "kd", student=student),
            max_epochs=1,
            limit_train_batches=1,
        )
    assert torch.equal(got[0].flip(-1), got[1]) and not torch.equal(*got)
