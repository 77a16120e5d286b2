"""When a cache may be trusted: teachers that it steps aside for, and files that it does not believe."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import At, Fit, Module, apart, data, fits, master, teacher
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_accel import Distillation
from lightning_accel.distillation import TeacherCache, losses
from lightning_accel.errors import AccelError

Run = Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Tensor]]


def opened(folder: Path, **options: Any) -> TeacherCache:
    cache = TeacherCache(folder, **{"dtype": "float32", **options})
    cache.open("teacher")
    return cache


def says(network: Callable[..., Tensor]) -> Run:
    return lambda args, kwargs: {"logits": network(*args, **kwargs).detach()}


# --- rows that depend on each other -------------------------------------------------------------------

torch.manual_seed(0)
LSTM, GRU = nn.LSTM(6, 3), nn.GRU(6, 3, bidirectional=True)
ATTENTION = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0)  # sequence first


def table(x: Tensor, weights: Tensor) -> Tensor:
    return x @ weights


DEPENDENT: dict[str, Callable[..., Any]] = {
    "an LSTM over time": lambda x: LSTM(x[:, None])[0][:, 0],
    "a GRU in both directions": lambda x: GRU(x[:, None])[0][:, 0],
    "attention between rows": lambda x: ATTENTION(x[:, None])[:, 0],
    "similarity within the batch": lambda x: (x @ x.T).softmax(-1),
    "statistics of the batch": lambda x: F.batch_norm(x, None, None, training=True),
    "a softmax over the batch": lambda x: x.softmax(0),
    "a running sum": lambda x: x.cumsum(0),
    "the place in the batch": lambda x: x + torch.arange(len(x))[:, None],
    "ranks": lambda x: x.argsort(0).argsort(0),
    "dropout that is always on": lambda x: F.dropout(x, 0.5, training=True),
    "draws that change nothing but the next ones": lambda x: x * (torch.rand(()) >= 0),
    "noise": lambda x: x + torch.randn_like(x),
    "a table as large as the batch": lambda x: table(x, torch.eye(6)),
}


@pytest.mark.parametrize("name", DEPENDENT)
def test_rows_that_depend_on_more_than_themselves_are_never_cached(
    name: str, tmp_path: Path
) -> None:
    network, cache = DEPENDENT[name], opened(tmp_path / "c")
    x = torch.randn(6, 6)
    call: tuple[Any, ...] = (x, torch.eye(6)) if name.startswith("a table") else (x,)
    run = says(table if name.startswith("a table") else network)
    with pytest.warns(UserWarning, match=r"cannot be cached.*Found: .*Do: .*`cache=None`"):
        cache.look_up(call, {}, run)
    torch.manual_seed(1)
    expected = run((call[0].flip(0), *call[1:]), {})["logits"]
    torch.manual_seed(1)
    got = cache.look_up((call[0].flip(0), *call[1:]), {}, run)["logits"]
    assert torch.equal(got, expected) and not cache.enabled
    assert not list(tmp_path.rglob("*.sqlite"))


INDEPENDENT: dict[str, Callable[..., Any]] = {
    "a row at a time": nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)),
    "statistics of training": nn.BatchNorm1d(6).eval(),
    "an LSTM, batch first": lambda x: LSTM(x[None])[0][0] * 0 + x[:, :3],
    "nothing finite": lambda x: x / 0,
    "whole numbers": lambda x: x.argmax(-1),
    "short numbers": lambda x: F.linear(x.bfloat16(), torch.ones(3, 6).bfloat16()),
}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_rows_that_stand_alone_are_cached(name: str, tmp_path: Path) -> None:
    cache, x = opened(tmp_path / "c"), torch.randn(6, 6)
    for rows in (x, x.flip(0), x[:1], x[2:5]):
        cache.look_up((rows,), {}, says(INDEPENDENT[name]))
    assert cache.enabled and cache.hits == (0 if name == "nothing finite" else 10)


def test_a_dependence_that_comes_with_another_shape_is_noticed(tmp_path: Path) -> None:
    def network(x: Tensor) -> Tensor:
        return x.sum(1) if x.shape[1] < 4 else x.sum(1) - x.sum(1).mean(0)

    cache = opened(tmp_path / "c")
    for _ in range(3):
        cache.look_up((torch.randn(4, 2, 6),), {}, says(network))
    with pytest.warns(UserWarning, match="depends on the other rows"):
        cache.look_up((torch.randn(4, 5, 6),), {}, says(network))


def test_rows_of_single_batches_are_tried_when_a_larger_one_comes(tmp_path: Path) -> None:
    cache = opened(tmp_path / "c")
    run = says(lambda x: x - x.mean(0))
    cache.look_up((torch.randn(1, 6),), {}, run)
    with pytest.warns(UserWarning, match="depends on the other rows"):
        cache.look_up((torch.randn(4, 6),), {}, run)


def test_trying_moves_no_random_state(tmp_path: Path) -> None:
    cache, x, before = opened(tmp_path / "c"), torch.randn(4, 6), torch.get_rng_state()
    drops_part: list[int] = []

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        drops_part.append(len(args[0]))
        return {"logits": args[0]}

    cache.look_up((x,), {}, run)
    assert drops_part == [4, 2] and torch.equal(torch.get_rng_state(), before)


def test_what_is_on_disk_is_compared_with_the_teacher(tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    opened(tmp_path / "c").look_up((x,), {}, says(lambda x: x))
    cache = opened(tmp_path / "c")  # a fingerprint that missed that the teacher is another one
    with pytest.warns(UserWarning, match="on disk.*is not what it says"):
        assert torch.equal(cache.look_up((x,), {}, says(lambda x: x + 1))["logits"], x + 1)
    assert not cache.enabled


def test_the_teacher_runs_now_and_then_and_never_when_told_so(tmp_path: Path) -> None:
    x, rows = torch.randn(4, 6), list[int]()

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        rows.append(len(args[0]))
        return {"logits": args[0]}

    for every, expected in (
        (None, 1),
        (8, 2 * 4 + 2 * 1),
    ):  # 1, 2, 4, 8 and 16, on the whole and a part
        rows.clear()
        cache = opened(tmp_path / str(every), check_every_n_calls=every)
        for _ in range(16):
            cache.look_up((x,), {}, run)
        assert len(rows) == expected


def test_packed_sequences_are_refused(tmp_path: Path) -> None:
    packed = pack_padded_sequence(torch.randn(3, 2, 6), [3, 2])
    with pytest.raises(TypeError, match=r"packed sequence.*Found: a PackedSequence.*Do: .*padded"):
        opened(tmp_path / "c").look_up((packed,), {}, says(lambda p: p.data))


# --- teachers that change -----------------------------------------------------------------------------


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Fit:
    return fits(trainer_kwargs)


class Guide(nn.Module):
    """A teacher with one of everything that makes an answer another one next time."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.net, self.kind, self.calls, self.shift = master(), kind, 0, torch.zeros(())
        self.scale = {"by": 1.0}
        self.generator = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x) * self.scale["by"] + self.shift
        if self.kind == "dropout":
            return F.dropout(out, 0.5, training=True)
        if self.kind == "generator":
            return out + torch.rand(out.shape, generator=self.generator)
        if self.kind == "counter":
            self.calls += 1
            return out * self.calls
        if self.kind == "buffer":
            self.shift = self.shift + 1
        return out


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("dropout", "draws random numbers in eval mode, from torch"),
        ("generator", "draws random numbers in eval mode, from a generator of its own"),
        ("counter", "changes itself as it answers: `calls`"),
        ("buffer", "changes itself as it answers: `shift`"),
    ],
)
def test_a_teacher_that_answers_differently_next_time_is_not_cached(
    fit: Fit, tmp_path: Path, kind: str, said: str
) -> None:
    lesson = Distillation(
        teacher(Guide(kind)), "kd", cache=tmp_path / "c", diagnostics_every_n_steps=0
    )
    with pytest.warns(UserWarning, match=f"cannot be cached.*Found: teacher 0, Guide, {said}.*Do:"):
        fit(Module(), lesson)
    assert not list(tmp_path.rglob("*.sqlite"))


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:the teacher's answers cannot be cached")
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", ["dropout", "generator", "counter", "buffer"])
def test_a_teacher_that_moves_answers_each_batch_once(
    fit: Fit, tmp_path: Path, kind: str, cached: bool
) -> None:
    cache = TeacherCache(tmp_path / "c", dtype="float32") if cached else None

    class Seeds(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            torch.manual_seed(batch_idx)
            return super().training_step(batch, batch_idx)

    guide, model, called = Guide(kind), Seeds(), []
    guide.register_forward_hook(lambda *_: called.append(1))
    lesson = Distillation(teacher(guide), "kd", cache=cache, diagnostics_every_n_steps=1)
    student, hand = copy.deepcopy(model.net), Guide(kind).eval()
    fit(model, lesson)
    sgd = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9)
    for _ in range(2):
        for step, (x, y) in enumerate(data()):
            torch.manual_seed(step)
            logits = student(x)
            loss = F.cross_entropy(logits, y) + 0.9 * losses.kd(logits, hand(x).detach())
            sgd.zero_grad()
            loss.backward()
            sgd.step()
    assert apart(model.net, student) < 1e-6
    assert guide.calls == hand.calls and torch.equal(guide.shift, hand.shift)
    assert torch.equal(guide.generator.get_state(), hand.generator.get_state())
    assert len(called) == 6 or cached


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize(
    "change",
    [
        lambda guide: guide.scale.update(by=3.0),
        lambda guide: setattr(guide, "shift", torch.ones(())),
        lambda guide: guide.net.head.weight.data.mul_(2.0),
        lambda guide: guide.net.register_forward_hook(lambda m, a, out: out * 2),
        lambda guide: torch.set_float32_matmul_precision("high"),
    ],
    ids=["a dict", "a tensor", "weights, behind their back", "a hook", "the world"],
)
def test_a_teacher_that_is_changed_between_steps_gives_its_new_answers(
    fit: Fit, tmp_path: Path, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    students = []
    before = torch.get_float32_matmul_precision()
    for cache in (None, TeacherCache(tmp_path / "c", dtype="float32", check_every_n_calls=None)):
        guide, model = Guide(), Module()
        at = At(lambda trainer, *_, guide=guide: trainer.global_step == 3 and change(guide))
        lesson = Distillation(teacher(guide), "kd", cache=cache, diagnostics_every_n_steps=0)
        fit(model, lesson, at)
        torch.set_float32_matmul_precision(before)
        students.append(model)
    assert apart(*students) < 1e-6


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_a_class_that_the_teacher_does_not_have_is_named(fit: Fit) -> None:
    with pytest.raises(
        AccelError, match=r"does not have.*Found: 99, of a teacher with 4.*from 0 to 3"
    ):
        fit(Module(), Distillation(teacher(classes=[0, 1, 2, 99]), "kd"))
