"""Students of segmentation, tags, languages, labels and boxes: each as its user reported it, beside the loop by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distilling import Fit, User, apart, fits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_accel import Distillation
from lightning_accel.distillation import Teacher, losses
from lightning_accel.errors import AccelError

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:the teacher is hardly better than guessing"),
]

NO, PAD, WORDS = -100, 0, 9


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Fit:
    return fits({**trainer_kwargs, "max_epochs": 1})


def taught(
    fit: Fit, net: nn.Module, guide: nn.Module, step: Any, batch: Any, loss: Any, **given: Any
) -> nn.Module:
    """Return the student after one step of distillation alone."""
    model = User(net, step)
    own = Distillation(
        Teacher(guide, precision="32-true", classes=given.pop("classes", None)),
        {loss: 1.0} if isinstance(loss, str) else loss,
        task_weight=0.0, diagnostics_every_n_steps=0, **given,
    )  # fmt: skip
    fit(model, own, batches=DataLoader([batch], batch_size=None))
    return model.net


def by_hand(net: nn.Module, value: Callable[[nn.Module], Tensor]) -> nn.Module:
    student = copy.deepcopy(net)
    value(student).backward()
    torch.optim.SGD(student.parameters(), 0.5).step()
    return student


def kl(s: Tensor, t: Tensor, temperature: float = 4.0) -> Tensor:
    """Hinton's loss of rows (N, C)."""
    q, p = (s / temperature).log_softmax(-1), (t.detach() / temperature).softmax(-1)
    return temperature**2 * F.kl_div(q, p, reduction="batchmean")


def sentences() -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, WORDS, (4, 7))
    keep = torch.arange(7) < torch.tensor([[7], [5], [4], [6]])
    return ids.masked_fill(~keep, PAD), keep


class Causal(nn.Module):
    """Mixes what came before; answers as transformers do, with a loss where labels are given."""

    def __init__(self, words: int = WORDS) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(words, 6), nn.Linear(6, words)

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None) -> Any:
        logits = self.head(self.embed(input_ids).cumsum(1))
        if labels is None:
            return {"logits": logits}
        ahead = F.pad(labels, (0, 1), value=NO)[..., 1:].contiguous()
        loss = F.cross_entropy(logits.float().view(-1, logits.shape[-1]), ahead.view(-1))
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("how", ["inside", "by hand"])
def test_padding_of_a_causal_language_teaches_nothing(fit: Fit, how: str) -> None:
    """optipfair#34: labels are a clone of the inputs, emptied where there is padding, within the step."""

    def step(net: nn.Module, batch: Any) -> Tensor:
        labels = batch["input_ids"].clone()
        labels[batch["attention_mask"] == 0] = NO
        if how == "inside":
            return net(batch["input_ids"], batch["attention_mask"], labels)["loss"]  # type: ignore[no-any-return]
        logits = net(batch["input_ids"])["logits"]  # the mask goes nowhere
        return F.cross_entropy(logits[..., :-1, :].reshape(-1, WORDS), labels[..., 1:].reshape(-1))

    ids, keep = sentences()
    net, guide = Causal(), Causal()
    batch = {"input_ids": ids, "attention_mask": keep.long()}
    counts = F.pad(keep, (0, 1), value=False)[:, 1:]
    found = taught(fit, net, guide, step, batch, "kd")
    hand = by_hand(net, lambda s: kl(s(ids)["logits"][counts], guide(ids)["logits"][counts]))
    assert apart(found, hand) < 1e-6 < 1e-3 < apart(hand, net)


def test_a_prompt_that_has_no_labels_teaches_nothing_but_its_last_token(fit: Fit) -> None:
    """MambaInLlama#11 and DSKD#30: the KL divergence is to leave out what is -100 in the labels, as cross entropy does."""
    ids, _ = sentences()
    labels = ids.masked_fill((torch.arange(7) < 3) | (ids == PAD), NO)
    counts = F.pad(labels, (0, 1), value=NO)[:, 1:] != NO
    net, guide = Causal(), Causal()
    step = lambda n, b: n(b[0], b[1], b[2])["loss"]  # noqa: E731
    found = taught(fit, net, guide, step, (ids, ids != PAD, labels), "kd")
    hand = by_hand(net, lambda s: kl(s(ids)["logits"][counts], guide(ids)["logits"][counts]))
    assert apart(found, hand) < 1e-6 < 1e-3 < apart(hand, net)


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, 6), nn.Linear(6, WORDS)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Any = None,
        decoder_input_ids: Any = None,
        labels: Any = None,
    ) -> Any:
        source = (self.embed(input_ids) * attention_mask.unsqueeze(-1)).sum(1, keepdim=True)
        logits = self.head(self.embed(decoder_input_ids) + source)
        return F.cross_entropy(logits.view(-1, WORDS), labels.reshape(-1)), logits


def test_a_translator_whose_labels_are_made_in_the_step(fit: Fit) -> None:
    """T5-Finetuning-PyTorch#3: inputs and labels of the decoder are cut from one target; the mask is the encoder's."""

    def step(net: nn.Module, batch: Any) -> Tensor:
        y = batch["target_ids"]
        labels = y[:, 1:].clone().detach()
        labels[y[:, 1:] == PAD] = NO
        return net(  # type: ignore[no-any-return]
            input_ids=batch["source_ids"], attention_mask=batch["source_mask"],
            decoder_input_ids=y[:, :-1].contiguous(), labels=labels,
        )[0]  # fmt: skip

    (source, keep), (target, _) = sentences(), sentences()
    source, keep = source[:, :6], torch.arange(6) < torch.tensor([[2], [6], [1], [3]])
    net, guide = Translator(), Translator()
    batch = {"source_ids": source, "source_mask": keep.long(), "target_ids": target}
    counts, labels = target[:, 1:] != PAD, target[:, 1:]

    def logits(n: nn.Module) -> Tensor:
        return n(source, keep.long(), target[:, :-1], labels)[1][counts]  # type: ignore[no-any-return]

    for loss in ("kd", "dkd"):
        found = taught(fit, net, guide, step, batch, loss)
        of = kl if loss == "kd" else lambda s, t: losses.dkd(s, t, target=labels[counts])
        hand = by_hand(net, lambda s, of=of: of(logits(s), logits(guide)))
        assert apart(found, hand) < 1e-6 < 1e-3 < apart(hand, net)


class Tagger(nn.Module):
    def __init__(self, tags: int = 5) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, 6), nn.Linear(6, tags)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


def test_a_tagger_that_selects_its_active_tokens(fit: Fit) -> None:
    """NeMo-Speech#133, syntaxdot#94: logits are flattened and selected by a mask that the network never sees."""

    def step(net: nn.Module, batch: Any) -> Tensor:
        ids, tags, loss_mask = batch
        active = loss_mask.view(-1)
        return nn.CrossEntropyLoss()(net(ids).view(-1, 5)[active], tags.view(-1)[active])

    ids, keep = sentences()
    tags = torch.randint(5, ids.shape)
    net, guide = Tagger(), Tagger()
    of = lambda s: losses.dkd(s(ids)[keep], guide(ids)[keep], target=tags[keep])  # noqa: E731
    for given in ({}, {"mask": 2}):
        found = taught(fit, net, guide, step, (ids, tags, keep), "dkd", **given)
        assert apart(found, by_hand(net, of)) < 1e-6


class Segmenter(nn.Module):
    """Answers at half size, as torchvision's before they are resized."""

    def __init__(self, scale: int = 1) -> None:
        super().__init__()
        self.body, self.scale = nn.Conv2d(3, 6, scale, scale), scale

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.body(x)}


@pytest.mark.parametrize("scale", [1, 2])
def test_pixels_of_no_class_and_maps_that_are_resized(fit: Fit, scale: int) -> None:
    """ProDA#43: logits under "out", 250 is no class, and the criterion compares them at the labels' size."""

    def step(net: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        out = net(x)["out"]
        if scale > 1:
            out = F.interpolate(out, size=y.shape[1:], mode="bilinear", align_corners=True)
        return F.cross_entropy(out, y, ignore_index=250)

    x, y = torch.randn(4, 3, 6, 6), torch.randint(6, (4, 6, 6))
    y[:, :2] = 250
    net, guide = Segmenter(scale), Segmenter(scale)
    rows = lambda n: n(x)["out"].movedim(1, -1)  # noqa: E731
    counts = y != 250 if scale == 1 else torch.ones(4, 3, 3, dtype=torch.bool)
    found = taught(fit, net, guide, step, (x, y), "kd")
    hand = by_hand(net, lambda s: kl(rows(s)[counts], rows(guide)[counts]))
    assert apart(found, hand) < 1e-6 < 1e-3 < apart(hand, net)


def test_sounds_with_several_labels_learn_by_binary_cross_entropy(fit: Fit) -> None:
    """EfficientAT#18, TextBrewer#50: 527 questions with yes or no; also one row of them for each token."""
    step = lambda n, b: F.binary_cross_entropy_with_logits(n(b[0]), b[1])  # noqa: E731
    for shape in ((8, 4), (3, 5, 4)):
        x = torch.randn(shape)
        y = (torch.rand(*shape[:-1], 6) > 0.7).float()
        net, guide = nn.Linear(4, 6), nn.Linear(4, 6)
        with pytest.warns(UserWarning, match="`kd` is computed as `bce`"):
            taught(fit, copy.deepcopy(net), guide, step, (x, y), "kd")
        found = taught(fit, net, guide, step, (x, y), {"bce": {"weight": 1.0, "temperature": 2.0}})

        def of(s: nn.Module, x: Tensor = x, guide: nn.Module = guide) -> Tensor:
            p = (guide(x) / 2).sigmoid().detach()
            yes, no = F.logsigmoid(s(x) / 2), F.logsigmoid(-s(x) / 2)
            return -4 * (p * yes + (1 - p) * no).mean()

        assert apart(found, by_hand(net, of)) < 1e-6 < 1e-3 < apart(found, net)


def test_a_detector_with_a_focal_loss_of_its_own_is_no_softmax(fit: Fit) -> None:
    """DIST_KD#4, yolov5#13008: RetinaNet's classes are sigmoids, so that rows of anchors sum to anything."""

    def focal(net: nn.Module, batch: Any) -> Tensor:
        p = net(batch["image"]).sigmoid()
        right = p * batch["cls"] + (1 - p) * (1 - batch["cls"])
        return -((1 - right) ** 2 * right.log()).mean()

    anchors = torch.zeros(2, 7, 5)  # most are background: a row of zeros
    anchors[:, 0, 3] = 1.0
    batch = {"image": torch.randn(2, 7, 4), "cls": anchors}
    net, guide = nn.Linear(4, 5), nn.Linear(4, 5)
    with pytest.raises(AccelError, match="rows are no distributions.*'bce'"):
        taught(fit, net, guide, focal, batch, "kd")
    found = taught(fit, net, guide, focal, batch, "bce")
    target = guide(batch["image"]).sigmoid().detach()
    of = lambda s: F.binary_cross_entropy_with_logits(s(batch["image"]), target)  # noqa: E731
    assert apart(found, by_hand(net, of)) < 1e-6


def test_boxes_before_classes_are_told_apart(fit: Fit) -> None:
    """ultralytics#6197 and #20879: 64 channels of boxes and then the classes, in one map (B, 64 + C, H, W)."""

    def step(net: nn.Module, batch: Any) -> Tensor:
        z = net(batch["img"])
        boxes = (z[:, :8].sigmoid() - batch["bboxes"]).abs().mean()
        return boxes + F.binary_cross_entropy_with_logits(z[:, 8:], batch["cls"])

    batch = {
        "img": torch.randn(2, 3, 4, 5), "bboxes": torch.rand(2, 8, 4, 5),
        "cls": (torch.rand(2, 6, 4, 5) > 0.8).float(),
    }  # fmt: skip
    net, guide = nn.Conv2d(3, 14, 1), nn.Conv2d(3, 14, 1)
    with pytest.raises(AccelError, match="compares classes"):
        taught(fit, net, guide, step, batch, "kd")


def test_a_teacher_with_a_padded_vocabulary_speaks_of_the_students_words(fit: Fit) -> None:
    """Model-Optimizer#2489, torchtune#2502, LMOps#331: 152,064 rows in the teacher and 151,936 in the student."""
    ids, keep = sentences()
    net, guide = Causal(), Causal(WORDS + 3)
    step = lambda n, b: n(b[0], b[1], b[2])["loss"]  # noqa: E731
    batch = (ids, keep, ids.masked_fill(~keep, NO))
    with pytest.raises(AccelError, match=r"do not match.*9.*12.*classes="):
        taught(fit, net, guide, step, batch, "kd")
    found = taught(fit, net, guide, step, batch, "kd", classes=range(WORDS))
    counts = F.pad(keep, (0, 1), value=False)[:, 1:]
    hand = by_hand(net, lambda s: kl(s(ids)["logits"][counts], guide(ids)["logits"][..., :WORDS][counts]))  # fmt: skip
    assert apart(found, hand) < 1e-6 < 1e-3 < apart(hand, net)
