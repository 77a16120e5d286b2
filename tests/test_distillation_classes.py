"""Where the classes are: maps, taggers, volumes and languages are the loop by hand over logits with classes last."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distilling import Fit, User, apart, fits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import Distillation
from lightning_accel.distillation import Teacher, TeacherCache, losses
from lightning_accel.distillation.topk import coarsen
from lightning_accel.errors import AccelError

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:the teacher is hardly better than guessing"),
]


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Fit:
    return fits({**trainer_kwargs, "max_epochs": 1})


class Dict(nn.Module):
    """Answers as torchvision's segmentation networks do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.more = net, copy.deepcopy(net)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.net(x), "aux": self.more(x)}


class Tokens(nn.Module):
    """(B, T) -> (B, T, C)."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, classes)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed(ids)


def cross_entropy(net: nn.Module, batch: Any) -> Tensor:
    found = net(batch[0])
    return F.cross_entropy(found["out"] if isinstance(found, dict) else found, batch[1])


def flattened(net: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(net(batch[0]).flatten(0, 1), batch[1].flatten())


def dice(net: nn.Module, batch: Any) -> Tensor:
    """A criterion that is none of torch's."""
    found = net(batch[0])
    p = found.exp() / found.exp().sum(1, keepdim=True)
    return 1 - p.gather(1, batch[1].unsqueeze(1)).mean()


# network, shape of inputs, shape of labels, where classes are, the user's step
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...], int, Any]] = {
    "maps": (lambda: nn.Conv2d(3, 5, 1), (3, 6, 4), (6, 4), 1, cross_entropy),
    "square maps": (lambda: nn.Conv2d(3, 5, 1), (3, 5, 5), (5, 5), 1, cross_entropy),
    "maps with dice": (lambda: nn.Conv2d(3, 5, 1), (3, 4, 4), (4, 4), 1, dice),
    "volumes": (lambda: nn.Conv3d(2, 5, 1), (2, 3, 2, 4), (3, 2, 4), 1, cross_entropy),
    "tagger": (lambda: nn.Conv1d(3, 5, 1), (3, 6), (6,), 1, cross_entropy),
    "torchvision": (lambda: Dict(nn.Conv2d(3, 5, 1)), (3, 6, 4), (6, 4), 1, cross_entropy),
    "tokens": (Tokens, (5,), (5,), 2, flattened),
}
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "kd": lambda s, t, y: (
        16 * F.kl_div((s / 4).log_softmax(1), (t / 4).softmax(1), reduction="batchmean")
    ),
    "dkd": lambda s, t, y: losses.dkd(s, t, target=y),
    "dist": lambda s, t, y: losses.dist(s, t),
    "jsd": lambda s, t, y: losses.jsd(s, t),
    "logit_standardized_kd": lambda s, t, y: losses.logit_standardized_kd(s, t),
}


def batches(of: tuple[int, ...], labels: tuple[int, ...]) -> DataLoader[Any]:
    x = torch.randint(7, (8, *of)) if len(of) == 1 else torch.randn(8, *of)
    return DataLoader(TensorDataset(x, torch.randint(5, (8, *labels))), 4)


def rows(given: Any, dim: int) -> Tensor:
    """Return logits as rows with the classes last."""
    logits = given["out"] if isinstance(given, dict) else given
    return logits.movedim(dim, -1).flatten(0, -2)


def by_hand(
    net: nn.Module, guide: nn.Module, data: DataLoader[Any], dim: int, learn: Any
) -> nn.Module:
    student = copy.deepcopy(net)
    sgd = torch.optim.SGD(student.parameters(), 0.5)
    for batch in data:
        sgd.zero_grad()
        answer = rows(guide(batch[0]), dim).detach()
        learn(rows(student(batch[0]), dim), answer, batch[1].flatten()).backward()
        sgd.step()
    return student


@pytest.mark.parametrize(
    ("kind", "loss"), [*((kind, "kd") for kind in KINDS), *(("square maps", loss) for loss in LOSSES)]
)  # fmt: skip
def test_classes_are_where_the_criterion_or_the_labels_say(fit: Fit, kind: str, loss: str) -> None:
    make, of, labels, dim, step = KINDS[kind]
    net, guide, data = make(), make(), batches(of, labels)
    model = User(net, step)
    fit(model, Distillation(Teacher(guide, precision="32-true"), {loss: 1.0}, task_weight=0.0), batches=data)  # fmt: skip
    hand = by_hand(net, guide, data, dim, LOSSES[loss])
    assert apart(model.net, hand) < 1e-6 < 1e-3 < apart(hand, net)


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_cache_holds_the_classes_of_each_position(
    fit: Fit, tmp_path: Any, top_k: int | None
) -> None:
    def learn(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if top_k is not None:
            ids = t.topk(top_k).indices
            s, t = coarsen(s, ids, 4.0), coarsen(t, ids, 4.0)
        return LOSSES["kd"](s, t, y)

    make, of, labels, dim, step = KINDS["maps"]
    net, guide, data = make(), make(), batches(of, labels)
    for _ in range(2):  # from the teacher, and from the disk
        cache = TeacherCache(tmp_path, top_k=top_k, dtype="float32")
        model = User(net, step)
        fit(model, Distillation(Teacher(guide, precision="32-true"), {"kd": 1.0}, task_weight=0.0, cache=cache), batches=data)  # fmt: skip
        assert apart(model.net, by_hand(net, guide, data, dim, learn)) < 1e-6


def test_where_nothing_tells_it_is_asked_for_and_said(fit: Fit) -> None:
    def silent(net: nn.Module, batch: Any) -> Tensor:
        return net(batch[0]).square().mean() * 0.0

    net, guide = nn.Conv1d(5, 5, 1), nn.Conv1d(5, 5, 1)
    data = DataLoader(TensorDataset(torch.randn(8, 5, 6), torch.zeros(8)), 4)
    given = {"losses": {"kd": 1.0}, "task_weight": 0.0}
    with pytest.raises(AccelError, match=r"which dimension.*\(4, 5, 6\).*class_dim=1"):
        fit(User(net, silent), Distillation(Teacher(guide), **given), batches=data)
    model = User(net, silent)
    fit(
        model, Distillation(Teacher(guide, precision="32-true"), class_dim=1, **given), batches=data
    )
    assert apart(model.net, by_hand(net, guide, data, 1, LOSSES["kd"])) < 1e-6
    with pytest.raises(AccelError, match="class_dim=3"):
        fit(User(net, silent), Distillation(Teacher(guide), class_dim=3, **given), batches=data)


def test_a_loss_of_the_users_gets_logits_as_the_networks_give_them(fit: Fit) -> None:
    def own(student: Tensor, teacher: Tensor, *, target: Tensor) -> Tensor:
        shapes.append((student.shape, target.shape))
        return F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")

    shapes: list[Any] = []
    make, of, labels, _, step = KINDS["maps"]
    fit(User(make(), step), Distillation(make(), {"own": {"loss": own}}), batches=batches(of, labels))  # fmt: skip
    assert set(shapes) == {((4, 5, 6, 4), (4, 6, 4))}
