"""Those who accumulate, weigh and mask their loss by hand: each as its user reported it, beside the loop by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distilling import Fit, User, apart, fits
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_accel import Distillation
from lightning_accel.distillation import Teacher
from lightning_accel.errors import AccelError

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:the teacher is hardly better than guessing"),
]
WORDS, PAD, TASK, WEIGHT = 7, 0, 0.3, 0.5


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Fit:
    return fits({**trainer_kwargs, "max_epochs": 1})


def kl(s: Tensor, t: Tensor) -> Tensor:
    """Hinton's loss of rows (N, C) at temperature 4."""
    return 16 * F.kl_div(
        (s / 4).log_softmax(-1), (t.detach() / 4).softmax(-1), reduction="batchmean"
    )


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, 6), nn.Linear(6, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids).tanh())


def texts() -> tuple[Tensor, Tensor]:
    """Return tokens of four texts of unlike lengths, and what is to be said at each, PAD behind the end."""
    torch.manual_seed(4)
    keep = torch.arange(6) < torch.tensor([[6], [2], [3], [1]])
    return torch.randint(1, WORDS, (4, 6)), torch.randint(1, WORDS, (4, 6)).masked_fill(~keep, PAD)


class ByHand(LightningModule):
    """Goes through the texts one at a time, and makes one step of them all."""

    def __init__(self, net: nn.Module, loss: Any) -> None:
        super().__init__()
        self.net, self.loss, self.automatic_optimization = copy.deepcopy(net), loss, False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        total = (batch[1] != PAD).sum()
        for ids, tags in zip(*(part.split(1) for part in batch), strict=True):
            self.manual_backward(self.loss(self.net(ids).flatten(0, 1), tags.flatten(), total))
        optimizer.step()
        optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.5)


def lesson(guide: nn.Module, loss: Any = "kd") -> Distillation:
    return Distillation(Teacher(guide, precision="32-true"), {loss: WEIGHT}, task_weight=TASK)


TOKENS = {
    "mlx-lm#1413": lambda z, y, total: F.cross_entropy(z, y, ignore_index=PAD) * (y != PAD).sum() / total,
    "nanochat#59": lambda z, y, total: F.cross_entropy(z, y, ignore_index=PAD, reduction="sum") / total,
    "verl#3332": lambda z, y, total: (
        F.cross_entropy(z, y, reduction="none") * (y != PAD)).sum() / total,
}  # fmt: skip


@pytest.mark.parametrize("source", TOKENS)
def test_texts_of_unlike_lengths_count_by_their_tokens(fit: Fit, source: str) -> None:
    """mlx-lm#1413, torchtune#1875, nanochat#59, verl#3332: the parts of a batch are to be the batch, padding aside."""
    ids, tags = texts()
    net, guide, keep = Words(), Words(), tags != PAD
    model = ByHand(net, TOKENS[source])
    fit(model, lesson(guide), batches=DataLoader([(ids, tags)], batch_size=None))
    z = net(ids)[keep]  # all at once
    (TASK * F.cross_entropy(z, tags[keep]) + WEIGHT * kl(z, guide(ids)[keep])).backward()
    torch.optim.SGD(net.parameters(), 0.5).step()
    assert apart(model.net, net) < 1e-6


class Divides(LightningModule):
    """As the page on manual optimization has it since."""

    def __init__(self, net: nn.Module, every: int) -> None:
        super().__init__()
        self.net, self.every, self.automatic_optimization = net, every, every == 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        self.manual_backward(loss / self.every)
        if (batch_idx + 1) % self.every == 0:
            optimizer.step()
            optimizer.zero_grad()
        return None

    configure_optimizers = ByHand.configure_optimizers


def test_what_is_divided_by_hand_is_what_the_trainer_divides(fit: Fit) -> None:
    """Lightning#12811, #17957, #14527: the same accumulation, once by the Trainer and once by hand."""
    torch.manual_seed(0)
    batches = [(torch.randn(4, 5), torch.randint(3, (4,))) for _ in range(4)]
    net, guide = nn.Linear(5, 3), nn.Linear(5, 3)
    found = []
    for every, given in ((2, {}), (0, {"accumulate_grad_batches": 2})):
        model = Divides(copy.deepcopy(net), every)
        fit(model, lesson(guide), batches=DataLoader(batches, batch_size=None), **given)
        found.append(model)
    assert apart(*found) < 1e-6 < 1e-3 < apart(found[0].net, net)


@pytest.mark.parametrize("divided", ["by what counts", "by all"])
def test_pixels_of_no_class_that_are_multiplied_away(fit: Fit, divided: str) -> None:
    """background_foreground_segmentation#25, optipfair#34: a mask in the loss alone, divided by one number or the other."""

    def step(net: nn.Module, batch: Any) -> Tensor:
        keep = batch[1] != 255
        each = F.cross_entropy(net(batch[0]), batch[1].clamp(max=2), reduction="none") * keep
        return each.mean() if divided == "by all" else each.sum() / keep.sum()

    torch.manual_seed(2)
    x, y = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    y[:, 1] = 255
    net, guide = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    model = User(net, step)
    fit(model, lesson(guide), batches=DataLoader([(x, y)], batch_size=None))
    s, t = (one(x).movedim(1, -1)[y != 255] for one in (net, guide))
    (TASK * step(net, (x, y)) + WEIGHT * kl(s, t)).backward()
    torch.optim.SGD(net.parameters(), 0.5).step()
    assert apart(model.net, net) < 1e-6


def test_a_regression_by_hand_is_refused_as_classes_and_learnt_as_numbers(fit: Fit) -> None:
    """fasterai1#2, KD_SRRL#4, google-research#911: is distillation for classes alone? The teacher's numbers are wanted."""

    def step(net: nn.Module, batch: Any) -> Tensor:
        return ((net(batch["image"]) - batch["points"].flatten(1)) ** 2).mean()

    torch.manual_seed(1)
    batch = {"image": torch.randn(6, 5), "points": torch.randn(6, 2, 2)}  # of a face
    net, guide = nn.Linear(5, 4), nn.Linear(5, 4)
    batches = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(
        AccelError, match="compares classes.*these outputs are labels or numbers.*'mse'"
    ):
        fit(User(net, step), lesson(guide), batches=batches)
    model = User(net, step)
    fit(model, lesson(guide, "mse"), batches=batches)
    x = batch["image"]
    (TASK * step(net, batch) + WEIGHT * F.mse_loss(net(x), guide(x).detach())).backward()
    torch.optim.SGD(net.parameters(), 0.5).step()
    assert apart(model.net, net) < 1e-6
