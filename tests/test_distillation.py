"""Distillation in a user's own fit: the same as a loop by hand, whatever the step, batch or optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from distilling import (
    BOTH,
    FORMULAS,
    HINT,
    At,
    Fit,
    Manual,
    Module,
    apart,
    by_hand,
    callback,
    data,
    epochs,
    fits,
    master,
    rows,
    teacher,
)
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_accel import (
    Distillation,
)
from lightning_accel.distillation import FitProgress, Schedule, SeededViews, losses
from lightning_accel.distillation.loss_term import KNOWN
from lightning_accel.distillation.projector import Projector
from lightning_accel.errors import AccelError, NoEffect

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Fit:
    return fits(trainer_kwargs)


# --- the same as a loop by hand -------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMULAS)
def test_a_fit_is_the_loop_by_hand(fit: Fit, name: str) -> None:
    student, heads = by_hand(name)
    model, distillation = Module(), callback(name)
    fit(model, distillation)
    assert apart(model.net, student) < 1e-6
    assert apart(distillation.engine.heads, heads) < 1e-6 if len(heads) else True
    assert len(heads) == len(distillation.engine.heads)
    assert apart(model.net, Module().net) > 1e-2


def test_every_known_loss_is_compared_with_the_loop_by_hand() -> None:
    assert set(FORMULAS) == set(KNOWN)


def test_accumulation_and_clipping_are_those_of_the_loop_by_hand(fit: Fit) -> None:
    student, heads = by_hand("fitnet", accumulate=3, clip=0.5)
    model, distillation = Module(), callback("fitnet")
    trainer = fit(model, distillation, accumulate_grad_batches=3, gradient_clip_val=0.5)
    assert trainer.global_step == 2
    assert apart(model.net, student) < 1e-6 and apart(distillation.engine.heads, heads) < 1e-6


def test_manual_optimization_is_the_loop_by_hand(fit: Fit) -> None:
    student, heads = by_hand("crd")
    model, distillation = Manual(), callback("crd")
    fit(model, distillation)
    assert apart(model.net, student) < 1e-6 and apart(distillation.engine.heads, heads) < 1e-6


def test_a_step_that_returns_a_mapping_learns_the_same_and_keeps_its_entries(fit: Fit) -> None:
    class Mapped(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": super().training_step(batch, batch_idx), "mine": 5}

    seen: list[Any] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            seen.append(outputs["mine"])

    model = Mapped()
    fit(model, callback("kd"), Look())
    assert apart(model.net, by_hand("kd")[0]) == 0 and seen == [5] * 6


def test_what_the_user_logs_is_the_users_own_loss(fit: Fit) -> None:
    class Logs(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, on_step=False, on_epoch=True)
            return loss

    trainer = fit(Logs(), callback("kd"), log_every_n_steps=1)
    logged = trainer.callback_metrics
    torch.testing.assert_close(logged["loss"], logged["distillation/task"])
    assert logged["distillation/kd"] > 0 and 0 <= logged["distillation/agreement"] <= 1


def test_weights_and_temperatures_move_along_their_ramps(fit: Fit) -> None:
    seen: list[float] = []

    def note(moment: FitProgress) -> float:
        seen.append(moment.epoch)
        return 1.0

    ramp = Schedule(0.0, 1.0, over=6, unit="step")
    term = {"kd": {"weight": ramp, "temperature": note}}
    model, student = Module(), Module().net
    fit(model, Distillation(teacher(), term, diagnostics_every_n_steps=0))
    sgd, guide = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9), master()
    for step, (x, y) in enumerate([*data(), *data()]):
        logits = student(x)
        learnt = losses.kd(logits, guide(x).detach(), temperature=1.0)
        sgd.zero_grad()
        (F.cross_entropy(logits, y) + step / 6 * learnt).backward()
        sgd.step()
    assert apart(model.net, student) < 1e-6
    assert sorted({round(3 * epoch) for epoch in seen}) == list(range(6))


def test_random_numbers_and_the_order_of_data_are_those_of_the_plain_fit(fit: Fit) -> None:
    class Random(Module):
        def __init__(self) -> None:
            super().__init__(lambda: nn.Sequential(nn.Dropout(0.3), tiny.ConvNet()))

    shuffled = DataLoader(rows(), 8, shuffle=True)
    states = []
    for callbacks in ([], [Distillation(teacher(nn.Sequential(nn.Dropout(0.3), master())))]):
        torch.manual_seed(3)
        model = Random()
        torch.manual_seed(3)
        fit(model, *callbacks, batches=shuffled)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


# --- which network is the student -----------------------------------------------------------------


def test_the_module_itself_can_be_the_student(fit: Fit) -> None:
    class Forward(Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self(batch[0]), batch[1])

    model = Forward()
    fit(
        model,
        Distillation(
            teacher(), {"fitnet": {"layers": "net.conv: conv", "weight": 0.5}}, task_weight=0.3
        ),
    )
    assert apart(model.net, by_hand("fitnet")[0]) < 1e-6
    guide = Forward()
    guide.net = master()
    other = Forward()
    fit(
        other,
        Distillation(
            teacher(guide), {"fitnet": {"layers": "net.conv", "weight": 0.5}}, task_weight=0.3
        ),
    )
    assert apart(other, model) == 0


def test_a_student_deep_inside_the_module_is_found(fit: Fit) -> None:
    class Deep(Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleDict({"a": nn.ModuleList([self.net])})
            del self.net

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self.nets["a"][0](batch[0]), batch[1])

        validation_step = test_step = lambda self, *_: None

    model = Deep()
    fit(model, callback("fitnet"))
    assert apart(model.nets["a"][0], by_hand("fitnet")[0]) < 1e-6


class TwoViews(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        views = (batch[0], batch[0].flip(-1))
        return sum(F.cross_entropy(self.net(view), batch[1]) for view in views)


def test_several_calls_of_the_student_are_an_error_until_the_user_says_which(fit: Fit) -> None:
    with pytest.raises(AccelError, match=r"several times.*2 calls.*calls='last'"):
        fit(TwoViews(), Distillation(teacher(), BOTH))


@pytest.mark.parametrize("calls", ["last", "all"])
def test_several_calls_of_the_student_teach_the_last_or_the_mean(fit: Fit, calls: str) -> None:
    model, student, guide = TwoViews(), Module().net, master()
    fit(model, Distillation(teacher(), {"kd": 1.0}, calls=calls))
    sgd = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9)
    for x, y in [*data(), *data()]:
        views = [(student(view), guide(view).detach()) for view in (x, x.flip(-1))]
        taught = [losses.kd(*view) for view in views]
        learnt = taught[1] if calls == "last" else (taught[0] + taught[1]) / 2
        sgd.zero_grad()
        (sum(F.cross_entropy(logits, y) for logits, _ in views) + learnt).backward()
        sgd.step()
    assert apart(model.net, student) < 1e-6


def test_calls_without_a_gradient_do_not_count(fit: Fit) -> None:
    class Looks(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            with torch.no_grad():
                self.net.eval()(batch[0])
            self.net.train()
            return loss

    model = Looks()
    fit(model, callback("fitnet"))
    assert apart(model.net, by_hand("fitnet")[0]) == 0


def test_two_networks_in_a_step_need_a_name(fit: Fit) -> None:
    class Two(Module):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(4, 4)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self.other(self.net(batch[0])), batch[1])

    with pytest.raises(AccelError, match=r"not clear which network is the student.*net, other"):
        fit(Two(), Distillation(teacher(), "kd"))
    fit(Two(), Distillation(teacher(), "kd", student="net"))


def test_a_student_that_is_called_past_its_hooks_is_an_error(fit: Fit) -> None:
    class Past(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self.net.forward(batch[0]), batch[1])

    with pytest.raises(AccelError, match="not called in this training step"):
        fit(Past(), Distillation(teacher(), "kd", student="net"))


# --- manual optimization with several optimizers --------------------------------------------------


class Gan(LightningModule):
    """A generator that learns from another one beside its critic."""

    def __init__(self, toggles: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization, self.toggles = False, toggles
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6))
        self.critic = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for_generator, for_critic = self.optimizers()
        fake = self.generator(batch[0])
        self._turn(for_critic, self._blame(fake.detach()))
        self._turn(for_generator, F.softplus(-self.critic(fake)).mean())

    def _blame(self, fake: Tensor) -> Tensor:
        real = F.softplus(-self.critic(torch.ones_like(fake))).mean()
        return real + F.softplus(self.critic(fake)).mean()

    def _turn(self, optimizer: Any, loss: Tensor) -> None:
        if self.toggles:
            self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        if self.toggles:
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), 0.1) for net in (self.generator, self.critic)]


@pytest.mark.parametrize("toggles", [False, True])
def test_in_a_gan_the_lesson_goes_into_the_backward_of_the_student(fit: Fit, toggles: bool) -> None:
    torch.manual_seed(2)
    z = torch.randn(24, 4)
    guide = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 6))
    hints = {"out": {"loss": "fitnet", "layers": "2", "weight": 1.0}}
    hints["hidden"] = {"loss": "fitnet", "layers": "1", "weight": 0.5}
    model = Gan(toggles)
    distillation = Distillation(
        teacher(guide), hints, student="generator", diagnostics_every_n_steps=1
    )
    trainer = fit(model, distillation, batches=DataLoader(TensorDataset(z), 8))
    hand, head = Gan(False), Projector(8, 9, seed=0)
    sgds = [torch.optim.SGD(net.parameters(), 0.1) for net in (hand.generator, hand.critic, head)]
    for start in (0, 8, 16) * 2:
        x = z[start : start + 8]
        hidden = hand.generator[:2](x)
        fake = hand.generator[2](hidden)
        for sgd in sgds:
            sgd.zero_grad()
        hand._blame(fake.detach()).backward()
        sgds[1].step()
        with torch.no_grad():
            goals = guide[:2](x), guide(x)
        learnt = F.mse_loss(fake, goals[1]) + 0.5 * F.mse_loss(head(hidden), goals[0])
        (F.softplus(-hand.critic(fake)).mean() + learnt).backward()
        sgds[0].step()
        sgds[2].step()
    assert apart(model, hand) < 1e-6
    assert apart(distillation.engine.heads, nn.ModuleList([head])) < 1e-6
    assert [len(optimizer.param_groups) for optimizer in trainer.optimizers] == [2, 1]


def test_two_backwards_of_one_output_are_as_one_of_the_sum(fit: Fit) -> None:
    class Sum(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizer, logits = self.optimizers(), self.net(batch[0])
            parts = F.cross_entropy(logits, batch[1]), logits.square().mean()
            optimizer.zero_grad()
            self.back(parts)
            optimizer.step()

        def back(self, parts: Any) -> None:
            self.manual_backward(sum(parts))

    class Apart(Sum):
        def back(self, parts: Any) -> None:
            self.manual_backward(parts[0], retain_graph=True)
            self.manual_backward(parts[1])

    one, two = Sum(), Apart()
    for model in (one, two):
        fit(model, Distillation(teacher(), BOTH, task_weight=0.3))
    assert apart(one, two) < 1e-6


def test_a_manual_step_may_return_any_mapping(fit: Fit) -> None:
    class Returns(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            super().training_step(batch, batch_idx)
            return {"accuracy": 1.0}

    model = Returns()
    fit(model, callback("kd"))
    assert apart(model.net, by_hand("kd")[0]) == 0


@pytest.mark.parametrize(
    ("pass_back", "told"),
    [
        (Tensor.backward, r"calls `loss\.backward\(\)` itself.*manual_backward"),
        (torch.autograd.backward, r"whole epoch.*manual_backward"),
    ],
)
def test_a_manual_step_whose_losses_never_reach_us_is_an_error(
    fit: Fit, pass_back: Any, told: str
) -> None:
    steps = []

    class Direct(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            steps.append(batch_idx)
            pass_back(F.cross_entropy(self.net(batch[0]), batch[1]))
            self.optimizers().step()

    with pytest.raises(NoEffect, match=told):
        fit(Direct(), Distillation(teacher(), "kd"))
    assert len(steps) == (1 if pass_back is Tensor.backward else 3)


# --- batches of all kinds -------------------------------------------------------------------------


def test_a_step_may_take_its_batch_apart(fit: Fit) -> None:
    class Pops(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            y = batch.pop("y")
            return F.cross_entropy(self.net(batch.pop("x")), y)

        validation_step = test_step = lambda self, *_: None

    model = Pops()
    batches = DataLoader([{"x": x, "y": y} for x, y in rows()], 8)
    fit(model, callback("dkd"), batches=batches)
    assert apart(model.net, by_hand("dkd")[0]) == 0


def test_a_step_may_change_its_batch_in_place(fit: Fit) -> None:
    class Doubles(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            batch[0].mul_(2.0)
            return super().training_step(batch, batch_idx)

    class Copies(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step((batch[0] * 2.0, batch[1]), batch_idx)

    models = Doubles(), Copies()
    for model in models:
        fit(model, Distillation(teacher(), BOTH, diagnostics_every_n_steps=2))
    assert apart(*models) == 0


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("skipped", [0, 1])
@pytest.mark.parametrize("early", [True, False])
def test_a_batch_may_be_skipped(fit: Fit, skipped: int, early: bool) -> None:
    class Skips(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if early and batch_idx == skipped:
                return None
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == skipped else loss

    model, distillation = Skips(), Distillation(teacher(), BOTH)
    fit(model, distillation)
    assert len(distillation.engine.heads) == 1 and distillation.shares["kd"] > 0.01


def test_a_step_without_batch_idx_works(fit: Fit) -> None:
    class Short(Module):
        def training_step(self, batch: Any) -> Any:
            return F.cross_entropy(self.net(batch[0]), batch[1])

    model = Short()
    fit(model, callback("dkd"))
    assert apart(model.net, by_hand("dkd")[0]) == 0


@pytest.mark.slow
def test_data_without_an_index_works(fit: Fit) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from rows()

    model = Module()
    fit(model, callback("dkd"), batches=DataLoader(Stream(), 8))
    assert apart(model.net, by_hand("dkd")[0]) == 0


class Labelled(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch["labelled"], batch_idx)


class Own(Labelled):
    """A criterion that nobody else knows."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch["labelled"]
        scores = self.net(x)
        return (scores.mean(1) - scores.gather(1, y.unsqueeze(1))[:, 0]).mean()


def test_several_loaders_work_and_labels_can_be_pointed_at(fit: Fit) -> None:
    both = {"more": data(), "labelled": data()}
    with pytest.raises(AccelError, match=r"`dkd` needs labels.*pass `target=`"):
        fit(Own(), callback("dkd"), batches=both)
    model = Labelled()
    fit(model, callback("dkd"), batches=both)  # the cross entropy says which
    assert apart(model.net, by_hand("dkd")[0]) == 0
    model = Labelled()
    fit(model, callback("dkd", target=lambda batch: batch["labelled"][1]), batches=both)
    assert apart(model.net, by_hand("dkd")[0]) == 0


@pytest.mark.parametrize(
    "nest", [lambda d: {"labelled": d}, lambda d: {"labelled": d, "b": data()}]
)
def test_seeded_views_hear_of_every_epoch(fit: Fit, nest: Any) -> None:
    views, seen = SeededViews(rows(), 2), []
    at = At(lambda trainer, module, index: seen.append(views.epoch))
    if not hasattr(views, "epoch"):
        real = views.set_epoch
        views.set_epoch = lambda epoch: (seen.append(epoch), real(epoch))[1]  # type: ignore[method-assign]
        at = At(lambda *_: None)
    fit(Labelled(), Distillation(teacher(), "kd"), at, batches=nest(DataLoader(views, 8)))
    assert 0 in seen and seen[-1] == 1


@dataclass
class Output:
    """As networks of transformers answer."""

    loss: Tensor | None
    logits: Tensor


class Language(nn.Module):
    """Shifts its labels inside, as every causal language model of transformers does."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(12, dim), nn.Linear(dim, 12)

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None) -> Output:
        logits = self.head(self.embed(input_ids))
        shifted = (logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return Output(F.cross_entropy(*shifted, ignore_index=-100), logits)


class Speaks(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Language()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.5)


def sentences() -> DataLoader[Any]:
    """Each word has one that follows it; the last two positions are padding."""
    order = torch.tensor([5, 7, 0, 9, 2, 11, 3, 1, 10, 4, 6, 8])
    found = []
    for start in range(24):
        words = [torch.tensor(start % 12)]
        for _ in range(7):
            words.append(order[words[-1]])
        ids, mask = torch.stack(words), torch.ones(8, dtype=torch.long)
        mask[6:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return DataLoader(found, 8)


def test_a_language_model_learns_from_another_with_keywords_labels_and_padding(fit: Fit) -> None:
    torch.manual_seed(4)
    guide = Language(32)
    adam = torch.optim.Adam(guide.parameters(), 3e-2)
    for batch in [*sentences()] * 10:
        adam.zero_grad()
        guide(**batch).loss.backward()
        adam.step()
    model, student = Speaks(), Speaks().model
    trainer = fit(
        model,
        Distillation(teacher(guide), {"jsd": 1.0}, diagnostics_every_n_steps=1),
        batches=sentences(),
    )
    assert trainer.callback_metrics["distillation/jsd"] > 0
    sgd = torch.optim.SGD(student.parameters(), 0.5)
    found = []
    for positions in (5, 6):  # those with a following word, or all that are no padding
        student.load_state_dict(Speaks().model.state_dict())
        for batch in [*sentences()] * 2:
            out, answer = student(**batch), guide(**batch).logits.detach()
            learnt = losses.jsd(out.logits[:, :positions], answer[:, :positions])
            sgd.zero_grad()
            (out.loss + learnt).backward()
            sgd.step()
        found.append(apart(model.model, student))
    assert min(found) < 1e-6


def test_an_output_with_several_candidates_asks_for_the_logits(fit: Fit) -> None:
    class Pair(tiny.ConvNet):
        def forward(self, x: Tensor) -> Any:
            kept: list[Tensor] = []
            handle = self.head.register_forward_pre_hook(lambda m, a: kept.append(a[0]))
            logits = super().forward(x)
            handle.remove()
            return kept[0], logits

    class Takes(Module):
        def __init__(self) -> None:
            super().__init__(Pair)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self.net(batch[0])[1], batch[1])

        validation_step = test_step = lambda self, *_: None

    guide = Pair(12)
    guide.load_state_dict(master().state_dict())
    with pytest.raises(AccelError, match="logits="):
        fit(Takes(), Distillation(teacher(guide), "kd"))
    model = Takes()
    term = {"kd": {"weight": 0.5}}
    fit(model, Distillation(teacher(guide), term, task_weight=0.3, logits="head"))
    assert apart(model.net, by_hand("kd")[0]) < 1e-6


def test_an_output_with_a_loss_and_logits_needs_no_hint(fit: Fit) -> None:
    class Pair(tiny.ConvNet):
        def forward(self, x: Tensor) -> Any:
            logits = super().forward(x)
            return logits.sum(), logits

    class Takes(Module):
        def __init__(self) -> None:
            super().__init__(Pair)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self.net(batch[0])[1], batch[1])

        validation_step = test_step = lambda self, *_: None

    model = Takes()
    fit(model, callback("kd"))
    assert apart(model.net, by_hand("kd")[0]) == 0


# --- optimizers and schedules ---------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "one_cycle": lambda o: schedules.OneCycleLR(o, 0.1, total_steps=9),
    "cyclic": lambda o: schedules.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "lambda": lambda o: schedules.LambdaLR(o, lambda step: 0.5**step),
    "multiplicative": lambda o: schedules.MultiplicativeLR(o, lambda step: 0.5),
    "step": lambda o: schedules.StepLR(o, 1, 0.5),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 6),
    "restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 3),
    "polynomial": lambda o: schedules.PolynomialLR(o, 6),
    "sequential": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, total_iters=2), schedules.CosineAnnealingLR(o, 4)], [2]
    ),
    "chained": lambda o: schedules.ChainedScheduler(
        [schedules.LinearLR(o, total_iters=2), schedules.ExponentialLR(o, 0.5)]
    ),
    "plateau": lambda o: schedules.ReduceLROnPlateau(
        o, mode="max", patience=0, factor=0.1, min_lr=[1e-3]
    ),
}


class Scheduled(Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def configure_optimizers(self) -> Any:
        sgd: Any = super().configure_optimizers()
        made = {"scheduler": SCHEDULES[self.name](sgd), "monitor": "val_loss"}
        made["interval"] = "epoch" if self.name == "plateau" else "step"
        return [sgd], [made]


def rates(seen: list[Any]) -> At:
    def note(trainer: Trainer, module: Any, index: int) -> None:
        groups = trainer.optimizers[0].param_groups
        seen.append([(group["lr"], group["momentum"]) for group in groups])

    return At(note)


@pytest.mark.parametrize("name", SCHEDULES)
def test_projectors_follow_the_schedule_of_the_students_rate(
    fit: Fit, tmp_path: Path, name: str
) -> None:
    plain: list[Any] = []
    fit(Scheduled(name), rates(plain), max_epochs=3)
    whole: list[Any] = []
    model, distillation = Scheduled(name), Distillation(teacher(), HINT)
    fit(model, distillation, rates(whole), epochs(tmp_path), max_epochs=3)
    assert [groups[0] for groups in plain] == [groups[0] for groups in whole]
    assert all(len(groups) == 2 and groups[0] == groups[1] for groups in whole)
    if name == "plateau":  # Lightning saves before it steps
        return
    again: list[Any] = []
    resumed, other = Scheduled(name), Distillation(teacher(), HINT)
    fit(resumed, other, rates(again), max_epochs=3, ckpt=tmp_path / "epoch=0.ckpt")
    assert again == whole[3:]
    assert apart(model, resumed) == 0 and apart(distillation.engine.heads, other.engine.heads) == 0


def test_an_optimizer_of_the_head_alone_gets_the_projectors_beside_the_student(fit: Fit) -> None:
    class Head(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.stem.parameters(), 0.05)

    model, distillation = Head(), Distillation(teacher(), HINT)
    trainer = fit(model, distillation)
    held = trainer.optimizers[0].param_groups[-1]["params"]
    assert [id(p) for p in held] == [id(p) for p in distillation.engine.heads.parameters()]
    assert apart(model.net.head, Module().net.head) == 0


def test_lbfgs_works_without_projectors_only(fit: Fit) -> None:
    class Newton(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), 0.1, max_iter=3)

    fit(Newton(), Distillation(teacher(), "kd"), max_epochs=1)
    with pytest.raises(AccelError, match="LBFGS"):
        fit(Newton(), Distillation(teacher(), HINT), max_epochs=1)
