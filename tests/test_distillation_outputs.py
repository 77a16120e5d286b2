"""Outputs that are no classes: labels, numbers, boxes and probabilities are taught as what they are, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distilling import Fit, User, apart, fits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_accel import Distillation, DistillationModule
from lightning_accel.distillation import Teacher, TeacherCache, losses
from lightning_accel.errors import AccelError

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:the teacher is hardly better than guessing"),
]

BCE, MSE = F.binary_cross_entropy_with_logits, F.mse_loss


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Fit:
    return fits({**trainer_kwargs, "max_epochs": 1})


def nets(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Return a student, and a teacher whose answers are all 3 lower."""
    net = make()
    guide = copy.deepcopy(net)
    last = [m for m in guide.modules() if isinstance(getattr(m, "bias", None), Tensor)][-1]
    last.bias.data -= 3.0  # type: ignore[union-attr,operator]
    return net, guide


def fitted(fit: Fit, net: nn.Module, guide: nn.Module, step: Any, batch: Any, **given: Any) -> Any:
    model = User(net, step)
    own = {"losses": {"kd": 1.0}, "task_weight": 0.0, "diagnostics_every_n_steps": 0, **given}
    loader = DataLoader([batch], batch_size=None)
    fit(model, Distillation(Teacher(guide, precision="32-true"), **own), batches=loader)
    return model


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_bce_has_the_gradient_of_torchs_own_and_is_zero_where_both_agree(
    temperature: float,
) -> None:
    s, t = torch.randn(4, 3, 5, dtype=torch.double, requires_grad=True), torch.randn(4, 3, 5)
    t = t.double()
    mask = torch.rand(4, 3) > 0.4
    found = losses.bce(s, t, temperature=temperature, mask=mask)
    wanted = temperature**2 * BCE(s[mask] / temperature, (t[mask] / temperature).sigmoid())
    grads = [torch.autograd.grad(value, s)[0] for value in (found, wanted)]
    torch.testing.assert_close(grads[0], grads[1])
    assert losses.bce(t, t) == 0 and losses.bce(t, t - 20) > 0.5  # a shift matters


def test_mse_is_torchs_own_over_what_counts() -> None:
    s, t, mask = torch.randn(4, 3, 5), torch.randn(4, 3, 5), torch.rand(4, 3) > 0.4
    torch.testing.assert_close(losses.mse(s, t, mask=mask), MSE(s[mask], t[mask]))


_G = torch.Generator().manual_seed(1)
LABELLED = (torch.randn(8, 4, generator=_G), torch.zeros(8, 3))


@pytest.mark.parametrize("name", ["bce", "bce_kd", "mse"])
@pytest.mark.parametrize("width", ["labels", "maps", "one number a row"])
def test_labels_and_numbers_are_learnt_as_by_hand(fit: Fit, name: str, width: str) -> None:
    make, x, y = {
        "labels": (lambda: nn.Linear(4, 3), torch.randn(8, 4), torch.zeros(8, 3)),
        "maps": (lambda: nn.Conv2d(3, 2, 1), torch.randn(4, 3, 5, 5), torch.ones(4, 2, 5, 5)),
        "one number a row": (
            lambda: nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), torch.randn(8, 4), torch.zeros(8),
        ),
    }[width]  # fmt: skip
    net, guide = nets(make)
    formula = MSE if name == "mse" else lambda s, t: BCE(s, t.sigmoid())
    model = fitted(fit, net, guide, lambda n, b: BCE(n(b[0]), b[1]), (x, y), losses={name: 1.0})
    hand = copy.deepcopy(net)
    formula(hand(x), guide(x).detach()).backward()
    torch.optim.SGD(hand.parameters(), 0.5).step()
    assert apart(model.net, hand) < 1e-6 < 1e-2 < apart(hand, net)


def custom(net: nn.Module, batch: Any) -> Tensor:
    """A criterion that is none of torch's."""
    return (net(batch[0]) - 1).abs().mean()


def detection(net: nn.Module, batch: Any) -> Tensor:
    z = net(batch[0])
    return F.cross_entropy(z[:, 4:], batch[2]) + F.smooth_l1_loss(z[:, :4], batch[1])


def by_overlap(net: nn.Module, batch: Any) -> Tensor:
    """Boxes under a criterion of the user's own."""
    z = net(batch[0])
    return F.cross_entropy(z[:, 4:], batch[2]) + (z[:, :4] - batch[1]).abs().sqrt().mean()


def ordinal(net: nn.Module, batch: Any) -> Tensor:
    """One output for each "more than this", as CORAL has it."""
    return BCE(net(batch[0]), (batch[1].unsqueeze(1) > torch.arange(3)).float())


def pinball(net: nn.Module, batch: Any) -> Tensor:
    """Quantiles of one number."""
    at, error = torch.tensor([0.1, 0.5, 0.9]), batch[1].unsqueeze(1) - net(batch[0])
    return torch.maximum(at * error, (at - 1) * error).mean()


ROWS = (
    torch.randn(8, 4, generator=_G),
    torch.rand(8, 4, generator=_G),
    torch.arange(8) % 3,
)  # inputs, boxes, classes
SINGLE = (LABELLED[0], torch.ones(8, 1))
HEARD: dict[str, tuple[int, Any, Any]] = {
    "labels": (3, lambda n, b: BCE(n(b[0]), b[1]), LABELLED),
    "a module": (3, lambda n, b: nn.BCEWithLogitsLoss()(n(b[0]), b[1]), LABELLED),
    "after a sigmoid": (3, lambda n, b: F.binary_cross_entropy(n(b[0]).sigmoid(), b[1]), LABELLED),
    "numbers": (3, lambda n, b: MSE(n(b[0]), b[1]), (LABELLED[0], LABELLED[0][:, :3])),
    "ordinal, made in the step": (3, ordinal, (LABELLED[0], torch.arange(8) % 4)),
    "one output": (1, lambda n, b: BCE(n(b[0]), b[1]), SINGLE),
}  # fmt: skip
REFUSED: dict[str, tuple[int, Any, Any]] = {
    "own criterion": (3, custom, LABELLED),
    "truth values": (3, custom, (LABELLED[0], LABELLED[0][:, :3] > 0)),
    "whole 0 and 1": (3, custom, (LABELLED[0], (LABELLED[0][:, :3] > 0).long())),
    "a mapping": (
        3, lambda n, b: (n(b["x"]) - 1).abs().mean(), {"x": LABELLED[0], "y": LABELLED[1]},
    ),
    "numbers beside numbers of samples": (
        3, lambda n, b: (n(b[0]) - b[1]).square().mean(), (LABELLED[0], LABELLED[1], torch.arange(8)),
    ),
    "quantiles": (3, pinball, (LABELLED[0], torch.rand(8, generator=_G))),
    "its own input": (4, lambda n, b: (n(b[0]) - b[0]).square().mean(), LABELLED[:1]),
    "a forecast of the input's end": (
        2, lambda n, b: (n(b[0][:, :2].repeat(1, 2)) - b[0][:, 2:]).abs().mean(), LABELLED[:1],
    ),
    "boxes": (7, detection, ROWS),
    "boxes by overlap": (7, by_overlap, ROWS),
    "boxes by name": (
        7, lambda n, b: (n(b["x"]) - 1).abs().mean(),
        {"x": ROWS[0], "target": {"boxes": ROWS[1], "labels": ROWS[2]}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEARD)
def test_kd_is_computed_for_what_the_criterion_takes_the_outputs_for(fit: Fit, kind: str) -> None:
    width, step, batch = HEARD[kind]
    form = "mse" if kind == "numbers" else "bce"
    found = []
    for loss in ({"kd": {"weight": 1.0}}, {form: {"weight": 1.0}}):
        torch.manual_seed(0)
        net, guide = nets(lambda: nn.Linear(4, width))
        said = pytest.warns(UserWarning, match=f"`kd` is computed as `{form}`.*Found.*Do")
        with said if "kd" in loss else nullcontext():
            found.append(fitted(fit, net, guide, step, batch, losses=loss).net)
    assert apart(*found) == 0
    with pytest.raises(AccelError, match=r"`dkd` compares classes.*Found.*'bce'.*'mse'"):
        fitted(fit, net, guide, step, batch, losses="dkd")


@pytest.mark.parametrize("kind", REFUSED)
def test_outputs_that_are_no_classes_are_refused_under_kd_with_the_way_out(
    fit: Fit, kind: str
) -> None:
    width, step, batch = REFUSED[kind]
    net, guide = nets(lambda: nn.Linear(4, width))
    with pytest.raises(AccelError, match=r"`kd` compares classes.*Found.*'bce'.*'mse'"):
        fitted(fit, net, guide, step, batch)
    fitted(fit, net, guide, step, batch, losses="mse")


def test_distributions_and_one_class_out_of_several_are_classes(fit: Fit) -> None:
    mixed = torch.rand(8, 3).softmax(1)
    given = {
        "mixup": (lambda n, b: F.cross_entropy(n(b[0]), b[1]), mixed),
        "own mixup": (lambda n, b: -(n(b[0]).log_softmax(1) * b[1]).sum(1).mean(), mixed),
        "bce of classes": (lambda n, b: BCE(n(b[0]), b[1]), F.one_hot(torch.arange(8) % 3).float()),
        "a penalty": (lambda n, b: MSE(n(b[0]), torch.zeros(8, 3)), torch.zeros(8).long()),
        "a penalty alone": (lambda n, b: MSE(n(b[0]), torch.zeros(8, 3)), torch.zeros(8)),
        "a number beside": (
            lambda n, b: F.cross_entropy(n(b[0])[:, :3], b[1]), torch.arange(8) % 3,
        ),
    }  # fmt: skip
    for kind, (step, y) in given.items():
        net = nn.Linear(4, 4 if "beside" in kind else 3)
        guide = nn.Linear(4, net.out_features)
        nn.init.zeros_(guide.weight)  # always one class: no order of them to be told
        assert apart(fitted(fit, net, guide, step, (LABELLED[0], y)).net, net) > 1e-3, kind


def test_an_input_that_looks_like_a_target_is_none(fit: Fit) -> None:
    net, guide = nn.Linear(4, 4), nn.Linear(4, 4)
    step = lambda n, b: n(b[0] + torch.randn(8, 4)).var(1).mean()  # noqa: E731
    fitted(fit, net, guide, step, (torch.randn(8, 4),))


class Shares(nn.Module):
    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.body, self.last = nn.Linear(4, 5), last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x))


@pytest.mark.parametrize("loss", ["kd", "dist", "bce"])
def test_probabilities_are_no_logits(fit: Fit, loss: str) -> None:
    batch = (torch.randn(8, 4), torch.arange(8) % 5)
    last = nn.Sigmoid() if loss == "bce" else nn.Softmax(1)
    step = lambda n, b: n(b[0]).log().square().mean()  # noqa: E731
    with pytest.raises(AccelError, match="probabilities.*softmax|probabilities.*sigmoid"):
        fitted(fit, Shares(last), Shares(last), step, batch, losses=loss)
    fitted(fit, Shares(last), Shares(last), step, batch, losses=loss, logits="body")
    logs = nn.LogSoftmax(1)  # which are logits
    fitted(fit, Shares(logs), Shares(logs), step, batch, losses="kd")


@pytest.mark.parametrize("loss", ["bce", "mse"])
def test_a_cache_of_the_top_classes_is_refused_for_labels_and_numbers(
    fit: Fit, tmp_path: Any, loss: str
) -> None:
    net, guide = nets(lambda: nn.Linear(4, 3))
    cache = TeacherCache(tmp_path, top_k=1)
    with pytest.raises(AccelError, match="holds no labels and no numbers"):
        fitted(fit, net, guide, custom, LABELLED, losses=loss, cache=cache)


# --- the default loss of DistillationModule ---------------------------------------------------------


def module(width: int = 3, **given: Any) -> DistillationModule:
    sgd = lambda parameters: torch.optim.SGD(parameters, 0.5)  # noqa: E731
    own = {"optimizer": sgd, "losses": "mse", **given}
    return DistillationModule(nn.Linear(4, width), nn.Linear(4, width), **own)


@pytest.mark.parametrize(
    "target",
    [
        torch.zeros(8, 3),
        torch.ones(8, 3),
        torch.randn(8, 3),
        torch.rand(8),
        torch.rand(8, 3) > 0.5,
        torch.randint(2, (8, 3)),
        torch.arange(8).view(8, 1) % 3,
    ],
)
def test_the_default_loss_takes_classes_and_asks_for_another_one_otherwise(
    fit: Fit, target: Tensor
) -> None:
    batches = DataLoader([(torch.randn(8, 4), target)], batch_size=None)
    with pytest.raises(AccelError, match=r"default `task_loss`.*Found.*pass `task_loss=`"):
        fit(module(), batches=batches)
    fit(module(task_loss=lambda output, batch: output.mean()), batches=batches)


def test_the_default_loss_takes_distributions_and_the_classes_of_maps(fit: Fit) -> None:
    flat, maps = torch.randn(8, 4), torch.randn(2, 4, 5, 5)
    cases: list[tuple[Callable[[], nn.Module], Tensor, Tensor]] = [
        (lambda: nn.Linear(4, 3), flat, torch.rand(8, 3).softmax(1)),
        (lambda: nn.Conv2d(4, 3, 1), maps, torch.randint(3, (2, 5, 5))),
        (lambda: nn.Conv2d(4, 3, 1), maps, torch.rand(2, 3, 5, 5).softmax(1)),
    ]
    for make, x, y in cases:
        net, guide = make(), make()
        sgd = lambda parameters: torch.optim.SGD(parameters, 0.5)  # noqa: E731
        learner = DistillationModule(copy.deepcopy(net), guide, {"kd": 1e-9}, optimizer=sgd, diagnostics_every_n_steps=0)  # fmt: skip
        fit(learner, batches=DataLoader([(x, y)], batch_size=None))
        F.cross_entropy(net(x), y).backward()
        torch.optim.SGD(net.parameters(), 0.5).step()
        assert apart(learner.student, net) < 1e-6


# --- what the loss's gradient says where no criterion was heard -------------------------------------


def told(caplog: pytest.LogCaptureFixture) -> str:
    return " ".join(m for m in caplog.messages if "No criterion of torch" in m)


def test_what_is_only_supposed_of_the_outputs_is_said(
    fit: Fit, caplog: pytest.LogCaptureFixture
) -> None:
    net, guide = nn.Linear(4, 3), nn.Linear(4, 3)
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fitted(fit, net, guide, lambda n, b: 0.0 * n(b[0]).sum(), LABELLED[:1])
    assert "outputs (8, 3): `kd` takes dimension -1 of them for classes, as shapes" in told(caplog)


def test_the_gradient_says_which_dimension_holds_the_classes(
    fit: Fit, caplog: pytest.LogCaptureFixture
) -> None:
    maps = (torch.randn(2, 5, 5, 5),)  # where no shape could
    for dim in (1, 3):
        net, guide = nn.Conv2d(5, 5, 1), nn.Conv2d(5, 5, 1)
        with caplog.at_level("INFO", logger="lightning.pytorch"):
            model = fitted(fit, net, guide, lambda n, b, d=dim: n(b[0]).var(d).mean(), maps)
        assert f"dimension {dim} of them for classes, as the gradient" in told(caplog)
        hand = copy.deepcopy(net)
        losses.kd(hand(*maps).movedim(dim, -1), guide(*maps).movedim(dim, -1)).backward()
        torch.optim.SGD(hand.parameters(), 0.5).step()
        assert apart(model.net, hand) < 1e-6
        caplog.clear()


def test_labels_of_classes_under_a_loss_that_is_none_are_a_warning(fit: Fit) -> None:
    net, guide = nn.Linear(4, 3), nn.Linear(4, 3)
    step = lambda n, b: (n(b[0]) - F.one_hot(b[1], 3)).abs().mean()  # noqa: E731
    with pytest.warns(
        UserWarning, match="compares classes, and these outputs are labels or numbers"
    ):
        fitted(fit, net, guide, step, (LABELLED[0], torch.arange(8) % 3))
