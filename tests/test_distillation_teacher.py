"""Who teaches and what is tapped: modes, precision, order of classes, averages, ensembles, layers."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from distilling import (
    BOTH,
    HINT,
    At,
    Fit,
    Module,
    apart,
    by_hand,
    callback,
    data,
    epochs,
    fits,
    master,
    rows,
    taught,
    teacher,
)
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    StochasticWeightAveraging,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_accel import (
    Distillation,
    StructuredPruning,
)
from lightning_accel.distillation import Teacher, diagnostics, losses
from lightning_accel.distillation.forward_recorder import ForwardRecorder
from lightning_accel.errors import AccelError, NoEffect

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Fit:
    return fits(trainer_kwargs)


# --- teachers -------------------------------------------------------------------------------------


class Restless(nn.Module):
    """Has dropout, and says in which modes it was called; gradients are one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.drop = master(), nn.Dropout(0.9)
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes += [module.training for module in self.modules()]
        self.modes.append(torch.is_grad_enabled())
        return self.drop(self.net(x))


def test_the_teacher_teaches_in_eval_mode_and_stays_what_it_is(fit: Fit) -> None:
    guide = Restless().train()
    before = copy.deepcopy(guide.state_dict())
    flip = At(lambda *_: guide.train())
    model = Module()
    fit(model, Distillation(teacher(guide), {"kd": {"weight": 0.5}}, task_weight=0.3), flip)
    assert guide.modes and not any(guide.modes)
    assert all(torch.equal(before[name], value) for name, value in guide.state_dict().items())
    assert all(p.grad is None for p in guide.parameters())
    assert apart(model.net, by_hand("kd")[0]) == 0


def test_a_teacher_that_changes_a_buffer_in_eval_mode_is_an_error(fit: Fit) -> None:
    class Counts(Restless):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return self.net(x)

    with pytest.raises(AccelError, match="changed while it was teaching.*`count`"):
        fit(Module(), Distillation(teacher(Counts()), "kd"))


def test_a_teacher_in_bfloat16_leaves_the_users_network_as_it_is(fit: Fit) -> None:
    guide = master()
    before = copy.deepcopy(guide.state_dict())
    fit(Module(), Distillation(teacher(guide, precision="bf16-true"), BOTH))
    after = guide.state_dict()
    assert all(
        torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in after
    )


def test_one_network_cannot_teach_itself(fit: Fit) -> None:
    model = Module()
    with pytest.raises(AccelError, match="share parameters"):
        fit(model, Distillation(teacher(model.net), "kd"))


def permuted(order: list[int]) -> nn.Module:
    guide: Any = master()
    guide.head.weight.data = guide.head.weight.data[order].clone()
    guide.head.bias.data = guide.head.bias.data[order].clone()
    return guide


def test_classes_in_another_order_are_an_error_that_classes_mends(fit: Fit) -> None:
    guide = permuted([2, 0, 3, 1])
    with pytest.raises(AccelError, match="come in another order"):
        fit(Module(), Distillation(teacher(guide), "kd"))
    model = Module()
    mended = teacher(guide, classes=[1, 3, 0, 2])
    fit(model, Distillation(mended, {"kd": {"weight": 0.5}}, task_weight=0.3))
    assert apart(model.net, by_hand("kd")[0]) < 1e-6


@pytest.mark.parametrize("moved", [[1, 0, 2, 3], [0, 3, 2, 1]])
def test_a_few_classes_in_another_order_are_told_in_the_first_epoch(
    fit: Fit, moved: list[int]
) -> None:
    torch.manual_seed(3)
    guide: Any = master()
    chosen = torch.cat([guide(x).argmax(1) for x, _ in data(48)])
    truth = torch.cat([y for _, y in data(48)])
    rows_of = [pair for pair, same in zip(rows(48), chosen == truth, strict=True) if same]
    order = torch.tensor(moved)
    guide.head.weight.data = guide.head.weight.data[order].clone()
    guide.head.bias.data = guide.head.bias.data[order].clone()
    rows_of.sort(key=lambda row: moved[int(row[1])] != int(row[1]))  # first those that are right
    batches = DataLoader(rows_of, 8)
    with pytest.raises(AccelError, match="some of the teacher's classes come in another order"):
        fit(Module(), Distillation(teacher(guide), "kd"), batches=batches)
    back = order.argsort().tolist()
    fit(Module(), Distillation(teacher(guide, classes=back), "kd"), batches=batches, max_epochs=1)


def test_a_few_labels_that_are_met_often_are_no_order_by_chance() -> None:
    labels = torch.cat([torch.tensor([1, 4, 6]).repeat(5), torch.arange(20)])
    chosen = torch.cat([torch.tensor([8, 2, 1]).repeat(5), torch.randint(20, (20,))])
    diagnostics.check_order(chosen, labels)
    with pytest.raises(AccelError, match="another order"):
        diagnostics.check_order(chosen[:15], labels[:15])


def test_classes_that_are_confused_one_way_are_no_other_order() -> None:
    order = diagnostics.ClassOrder()
    order.note(torch.tensor([0, 0, 2]).repeat(9), torch.tensor([0, 1, 2]).repeat(9))
    assert order.swapped() == {}
    order.note(torch.tensor([3]).repeat(4), torch.tensor([2]).repeat(4))  # 9 of 13 right
    order.note(torch.tensor([2, 2]).repeat(9), torch.tensor([3, -100]).repeat(9), torch.tensor([True, False]).repeat(9))  # fmt: skip
    assert order.swapped() == {}


@pytest.mark.parametrize("known", [True, False])
def test_a_few_samples_tell_two_classes_apart_where_the_teacher_knows_the_others(
    known: bool,
) -> None:
    labels = torch.tensor([0, 1, 2]).repeat_interleave(8)
    chosen = labels if known else (labels + torch.arange(24) % 2) % 3
    order = diagnostics.ClassOrder()
    order.note(torch.cat([chosen, torch.tensor([4] * 3 + [3] * 5)]), torch.cat([labels, torch.tensor([3] * 3 + [4] * 5)]))  # fmt: skip
    assert order.swapped() == ({3: 4, 4: 3} if known else {})


def test_a_weak_teacher_in_another_order_is_told_where_classes_are_compared() -> None:
    order, labels = diagnostics.ClassOrder(), torch.arange(4).repeat(20)
    chosen = (labels + 1) % 4
    chosen[::3] = (labels[::3] + 2) % 4  # two of three samples of each label
    order.note(chosen, labels, classes=4)
    found = order.verdict(whole=True)
    assert found.moved == {0: 1, 1: 2, 2: 3, 3: 0} and found.guesses and order.swapped() == {}
    found = order.verdict(whole=False)
    assert found.moved == {} and not found.guesses


def is_untouched(model: Module) -> bool:
    """Tell whether a module's parameters are as it was made, and no backward has been run."""
    fresh = dict(Module().named_parameters())
    return all(torch.equal(p, fresh[n]) and p.grad is None for n, p in model.named_parameters())


class Doubles(tiny.ConvNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2))


class Fewer(tiny.ConvNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.Embedding(2, 8)(x[:, :, 0].long().clamp(min=0)).mT)


@pytest.mark.parametrize(
    ("guide", "given", "match"),
    [
        (Doubles, {}, "the teacher changed its arguments in place.*Doubles"),
        (Fewer, {}, "the teacher Fewer cannot take.*IndexError.*the student's vocabulary"),
        (tiny.ConvNet, {"classes": [0, 99]}, r"does not have.*99.*from 0 to 3"),
    ],
)
def test_what_a_teacher_cannot_do_is_said_of_the_teacher(
    fit: Fit, guide: Any, given: Any, match: str
) -> None:
    model = Module()
    with pytest.raises(AccelError, match=match):
        fit(model, Distillation(teacher(guide(), **given), "kd"))
    assert is_untouched(model)


def test_another_number_of_classes_is_told_before_the_first_backward(fit: Fit) -> None:
    guide: Any = master()
    guide.head = nn.Linear(24, 6)
    model = Module()
    with pytest.raises(AccelError, match=r"do not match.*\(8, 4\) and \(8, 6\)"):
        fit(model, Distillation(teacher(guide), "kd"))
    assert is_untouched(model)


def test_a_teacher_that_knows_nothing_is_told(fit: Fit) -> None:
    with pytest.warns(UserWarning, match="hardly better than guessing"):
        fit(Module(), Distillation(teacher(tiny.ConvNet(12)), "kd"), max_epochs=1)


def test_a_teacher_without_effect_is_told(fit: Fit) -> None:
    with pytest.warns(UserWarning, match="distillation has no effect"):
        fit(Module(), Distillation(teacher(), {"kd": 1e-9}), max_epochs=1)


def test_a_tap_on_frozen_layers_beside_a_loss_that_works_is_told(fit: Fit) -> None:
    model = Module()
    model.net.stem.requires_grad_(False)
    hint = {"kd": 1.0, "hint": {"loss": "similarity_preserving", "layers": "stem", "weight": 1.0}}
    with pytest.warns(UserWarning, match="hint"):
        fit(model, Distillation(teacher(), hint), max_epochs=1)


def test_several_teachers_speak_by_their_weights(fit: Fit) -> None:
    one, two = master(), taught(tiny.ConvNet(10))
    three_to_one = [teacher(one, weight=3.0), teacher(two, weight=1.0)]
    model, student = Module(), Module().net
    fit(model, Distillation(three_to_one, {"kd": 1.0}))
    sgd = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9)
    for x, y in [*data(), *data()]:
        logits, answer = student(x), (0.75 * one(x) + 0.25 * two(x)).detach()
        sgd.zero_grad()
        (F.cross_entropy(logits, y) + losses.kd(logits, answer)).backward()
        sgd.step()
    assert apart(model.net, student) < 1e-6


def test_features_of_several_teachers_need_a_number(fit: Fit) -> None:
    guides = [teacher(), teacher(tiny.ConvNet(10))]
    with pytest.raises(AccelError, match="say which: teacher=0"):
        fit(Module(), Distillation(guides, HINT))
    numbered = {"fitnet": {"layers": "conv", "teacher": 1}}
    distillation = Distillation(guides, numbered)
    fit(Module(), distillation)
    assert distillation.engine.heads["fitnet_0"].weight.shape == (10, 8)


def test_a_path_is_a_teacher_of_the_students_class(fit: Fit, tmp_path: Path) -> None:
    guide = Module(master)
    fit(guide, epochs(tmp_path), max_epochs=1)
    path = tmp_path / "epoch=0.ckpt"
    net = tiny.ConvNet(12)
    net.load_state_dict(guide.net.state_dict())
    found = []
    for source in (teacher(str(path)), teacher(net), teacher(guide)):
        model: Any = Wide()
        fit(model, Distillation(source, {"kd": 1.0}))
        found.append(model)
    assert apart(found[0], found[1]) == 0 and apart(found[0], found[2]) == 0
    with pytest.raises(
        AccelError, match=r"not one of Module.*pass Teacher\(module, checkpoint=path\)"
    ):
        fit(Module(), Distillation(str(path), "kd"))
    with pytest.raises(AccelError, match="no such checkpoint"):
        fit(Module(), Distillation(str(tmp_path / "none.ckpt"), "kd"))


class Prepares(LightningModule):
    """Another class than the student's, whose forward knows how its inputs must be prepared."""

    def __init__(self) -> None:
        super().__init__()
        self.net = master()

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - 0.3) * 2)


class Plain(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = master()


class Both(Module):
    """A student whose steps prepare the inputs themselves, beside a forward that does so too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - 0.3) * 2)


def said(lit: nn.Module, model: Module, caplog: Any, fit: Fit) -> Tensor:
    """Return what a LightningModule taught in the first step of a fit."""
    heard: list[Tensor] = []

    def spy(student: Tensor, teacher: Tensor) -> Tensor:
        heard.append(teacher)
        return (student - teacher).square().mean()

    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit(model, Distillation(teacher(lit), {"spy": {"loss": spy}}, student="net"))
    return heard[0]


def test_the_forward_of_a_lightning_module_prepares_what_its_network_gets(
    fit: Fit, caplog: Any
) -> None:
    x, net = next(iter(data()))[0], master().eval()
    assert torch.equal(said(Prepares(), Module(), caplog, fit), net((x - 0.3) * 2))
    assert torch.equal(said(Plain(), Module(), caplog, fit), net(x))
    assert "not by its own `forward`" not in caplog.text
    guide = Both(master)
    assert torch.equal(said(guide, Both(), caplog, fit), net(x))  # as the student of its class
    assert "The teacher Both is called by its part `net`" in caplog.text


class Wide(Module):
    def __init__(self) -> None:
        super().__init__(lambda: tiny.ConvNet(12))


def test_the_average_teaches_from_its_own_weights(fit: Fit) -> None:
    model, student = Module(Flat), Module(Flat).net
    distillation = Distillation(teacher("ema"), {"kd": 1.0}, ema_decay=0.5)
    fit(model, distillation)
    sgd, average = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9), None
    guide = copy.deepcopy(student)
    for x, y in [*data(), *data()]:
        logits = student(x)
        sgd.zero_grad()
        (F.cross_entropy(logits, y) + losses.kd(logits, guide(x).detach())).backward()
        sgd.step()
        now = [p.detach().clone() for p in student.parameters()]
        average = (
            now if average is None else [(a + b) / 2 for a, b in zip(average, now, strict=True)]
        )
        for p, value in zip(guide.parameters(), average, strict=True):
            p.data = value
    assert apart(model.net, student) < 1e-6


class Flat(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(192, 4))


def test_the_average_of_another_callback_is_used_and_that_of_swa_is_not(fit: Fit) -> None:
    def teaches(*callbacks: Callback) -> tuple[Any, Any]:
        distillation = Distillation(teacher("ema"), {"kd": 1.0}, ema_decay=0.5)
        seen: list[Any] = []

        def note(trainer: Trainer, module: Any, index: int) -> None:
            net: Any = distillation.teachers[0].network
            seen.append(copy.deepcopy(getattr(net, "net", net).state_dict()))

        fit(Module(), distillation, *callbacks, At(note), max_epochs=3)
        return distillation, seen[-1]["head.weight"]

    beside_ema, moving = teaches(EMAWeightAveraging(decay=0.5))
    assert beside_ema.average is None
    _, ours = teaches()
    _, beside_swa = teaches(StochasticWeightAveraging(1e-2, swa_epoch_start=9))
    start = Module().net.head.weight
    assert (moving - start).abs().max() > 1e-3
    assert (beside_swa - start).abs().max() > 1e-3 and (ours - start).abs().max() > 1e-3


@pytest.mark.slow
def test_a_second_fit_of_another_module_has_its_own_unpruned_teacher(fit: Fit) -> None:
    distillation = Distillation(teacher("self"), BOTH)
    for width in (8, 16):
        fit(
            Module(lambda width=width: tiny.ConvNet(width)),
            StructuredPruning(ratio=0.5, when=1),
            distillation,
        )
        net: Any = distillation.teachers[0].network
        assert getattr(net, "net", net).head.in_features == 2 * width


def test_the_unpruned_network_teaches_the_pruned_one(fit: Fit) -> None:
    grown = Module()
    fit(grown, max_epochs=1)
    distillation = Distillation(teacher("self"), BOTH)
    model = Module()
    fit(model, StructuredPruning(ratio=0.5, when=1), distillation)
    net: Any = distillation.teachers[0].network
    assert apart(getattr(net, "net", net), grown.net) == 0
    assert model.net.head.in_features == 8
    assert distillation.engine.heads["fitnet_0"].weight.shape == (8, 4)


def test_teacher_self_without_a_prune_is_an_error(fit: Fit) -> None:
    with pytest.raises(AccelError, match="nothing prunes here"):
        fit(Module(), Distillation("self", "kd"))


def test_a_fingerprint_knows_weights_settings_and_order() -> None:
    one = nn.Sequential(nn.Linear(2, 2), nn.LeakyReLU(0.1))
    prints = [Teacher(one).fingerprint()]
    slope, weight = copy.deepcopy(one), copy.deepcopy(one)
    slope[1].negative_slope = 0.5  # type: ignore[assignment]
    weight[0].weight.data[0, 0] = torch.nextafter(weight[0].weight.data[0, 0], torch.tensor(9.0))
    prints += [Teacher(net).fingerprint() for net in (slope, weight)]
    prints += [Teacher(one, classes=[1, 0]).fingerprint()]
    assert len(set(prints)) == 4 and Teacher(copy.deepcopy(one)).fingerprint() == prints[0]


# --- taps -----------------------------------------------------------------------------------------


class InPlace(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
            nn.Flatten(), nn.Linear(288, 4),
        )  # fmt: skip


@pytest.mark.usefixtures("clean_dynamo")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_tap_that_is_changed_in_place_is_named(fit: Fit, compiled: bool) -> None:
    model = Module(InPlace)
    if compiled:
        model.net.compile(backend="eager")
    with pytest.raises(AccelError, match=r"what `1` gave was changed in place.*in-place layers: 2"):
        fit(model, Distillation(teacher(InPlace()), {"fitnet": {"layers": "1"}}))
    fit(Module(InPlace), Distillation(teacher(InPlace()), {"fitnet": {"layers": "2"}}))


def test_logits_that_the_step_changes_in_place_are_noticed(fit: Fit) -> None:
    class Scales(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            logits = self.net(batch[0])
            logits.mul_(3.0)
            return F.cross_entropy(logits, batch[1])

    with pytest.raises(AccelError, match="changed in place"):
        fit(Scales(), callback("kd"))


def test_a_layer_that_is_called_twice_or_never_is_an_error(fit: Fit) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.once = nn.Flatten(), nn.Linear(192, 8)
            self.twice, self.never, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.twice(self.twice(self.once(self.flat(x)))))

    for name, said in (("twice", "called several times"), ("never", "not called as a module")):
        model = Module(Odd)
        model.net.never.requires_grad_(False)
        with pytest.raises(AccelError, match=f"`{name}` was {said}"):
            fit(model, Distillation(teacher(Odd()), {"fitnet": {"layers": name}}))


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ("nope: conv", "`nope` is no layer of the student"),
        ("conv: nope", "`nope` is no layer of the teacher"),
        ("conv.7", "close to it conv"),
    ],
)
def test_wrong_names_of_layers_are_told(fit: Fit, layers: str, said: str) -> None:
    with pytest.raises(NoEffect, match=said):
        fit(Module(), Distillation(teacher(), {"fitnet": {"layers": layers}}))


def test_a_tape_keeps_inputs_and_outputs_only_while_it_records() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    tape, x = ForwardRecorder(net, ["1@input", "1"]), torch.randn(4, 2)
    net(x)
    assert tape.records() == []
    with tape.recording():
        out = net(x)
        net(x + 1)
    first, second = tape.records()
    assert first.args == (x,) and first.output is out
    torch.testing.assert_close(first.taps["1"], first.taps["1@input"].tanh())
    torch.testing.assert_close(second.taps["1@input"], net[0](x + 1))
    tape.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 16, 2, 2), nn.Linear(16, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).mT
        x = self.block(torch.cat([self.token.expand(len(x), -1, -1), tokens], 1))
        return self.head(x[:, 0])


@pytest.mark.parametrize(
    "name", ["fitnet", "attention_transfer", "rkd", "similarity_preserving", "crd"]
)
def test_convolutions_and_tokens_learn_from_each_other(fit: Fit, name: str) -> None:
    for student, guide, layers in (
        (tiny.ConvNet, ViT(), "conv: block"),
        (ViT, master(), "block: conv"),
    ):
        model = Module(student)
        distillation = Distillation(
            teacher(guide), {name: {"layers": layers}}, diagnostics_every_n_steps=1
        )
        fit(model, distillation, max_epochs=1)
        assert distillation.shares[name] > 1e-3
        assert all(p.isfinite().all() for p in model.parameters())


class Gap(nn.Module):
    """Gives no number for one row of the third batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls = master(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        gap = self.calls == 3 and (torch.arange(len(x)) == 2).unsqueeze(1)
        return self.net(x).masked_fill(torch.as_tensor(gap), float("nan"))


def test_a_teacher_that_gives_no_numbers_is_told_before_the_student_learns_it(fit: Fit) -> None:
    model = Module()
    with pytest.raises(
        AccelError,
        match=r"teacher Gap gives what is no number.*Found: 4 of 32 numbers of its `logits` \(8, 4\), in batch 2 of "
        r"epoch 0.*'32-true'.*Do: .*precision",
    ):
        fit(model, Distillation(teacher(Gap()), "kd"))
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_checkpoint_that_does_not_fit_names_its_keys(fit: Fit, tmp_path: Any) -> None:
    torch.save({"state_dict": Module().state_dict()}, tmp_path / "wrapped.ckpt")
    lesson = Distillation(teacher(tiny.ConvNet(8), checkpoint=tmp_path / "wrapped.ckpt"), "kd")
    with pytest.raises(AccelError) as told:
        fit(Module(), lesson)
    assert re.search(r"\d+ keys missing: [a-z.0-9]+weight, .* and \d+ more; ", str(told.value))
    assert "keys begin with 'net.', without that" in str(told.value)
    torch.save(tiny.ConvNet(12).state_dict(), tmp_path / "wide.ckpt")
    lesson = Distillation(teacher(tiny.ConvNet(8), checkpoint=tmp_path / "wide.ckpt"), "kd")
    with pytest.raises(AccelError, match=r"of another size: .*weight \(12, .*for \(8, "):
        fit(Module(), lesson)
    with pytest.raises(AccelError, match=r"is not one of.*size mismatch for net.stem.1.bias"):
        fit(Module(), Distillation(_saved_module(tmp_path), "kd"))


def _saved_module(folder: Any) -> str:
    trainer_like = {"state_dict": Wide().state_dict(), "pytorch-lightning_version": "2.6.0"}
    torch.save(trainer_like, folder / "module.ckpt")
    return str(folder / "module.ckpt")


def test_a_teacher_of_64_bits_computes_in_them_as_its_student_does() -> None:
    """Where bfloat16 is fast, "auto" would cast inputs that the weights beside them could not take."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double().eval()
    assert Teacher(net).resolved("cpu") == "32-true"
    teacher = Teacher(net)
    x = torch.randn(5, 3, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = teacher.bind(net)(((x,), {})).output
    assert found.dtype == torch.float64 and torch.equal(found, net(x))
