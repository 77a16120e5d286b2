"""Which positions count and whose label they have: what the user's own criterion does, whatever the user moves by hand."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distilling import Fit, fits
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_accel import Distillation
from lightning_accel.distillation import Teacher
from lightning_accel.distillation.criterion import Listener, usage
from lightning_accel.errors import AccelError

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:the teacher is hardly better than guessing"),
]

C = 9
NO = -100
IDS = torch.tensor([[1, 2, 3, 4, 5, 6], [4, 2, 7, 5, 0, 0], [3, 3, 8, 1, 2, 0], [5, 6, 1, 0, 0, 0]])
KEEP = IDS > 0
MIXED = torch.tensor(
    [[7, 2, 1, 8, 0, 3], [1, 2, 8, 7, 4, 4], [2, 5, 1, 1, 6, 4], [8, 7, 3, 2, 1, 5]]
)


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Fit:
    return fits({**trainer_kwargs, "max_epochs": 1})


class Net(nn.Module):
    """Takes a mask as its second argument."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(C, C)

    def forward(self, ids: Tensor, attention_mask: Any = None, labels: Any = None) -> Tensor:
        return self.embed(ids)


class Torchs(Net):
    def forward(self, src: Tensor, mask: Any = None, src_key_padding_mask: Any = None) -> Tensor:  # type: ignore[override]
        return self.embed(src)


class Both(Net):
    """An encoder and a decoder."""

    def forward(  # type: ignore[override]
        self, ids: Tensor, attention_mask: Any = None, decoder_attention_mask: Any = None
    ) -> Tensor:
        return self.embed(ids)


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.inner(*args, **kwargs)  # type: ignore[no-any-return]


class User(LightningModule):
    def __init__(self, net: nn.Module, step: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.net, self.step = net, step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(self.net, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def seen(
    fit: Fit, step: Any, batch: Any, make: Callable[[], nn.Module] = Net, **given: Any
) -> tuple[Tensor | None, Tensor | None]:
    """Return what a loss gets as mask and as labels."""

    def spy(s: Tensor, t: Tensor, *, mask: Any = None, target: Any = None) -> Tensor:
        got[:] = [mask, target]
        return (s - t).square().mean()

    got: list[Any] = []
    distillation = Distillation(
        Teacher(make()), {"spy": {"loss": spy}}, diagnostics_every_n_steps=0, **given
    )
    fit(User(make(), step), distillation, batches=DataLoader([batch], batch_size=None))
    return got[0], got[1]


def nothing(out: Tensor) -> Tensor:
    return out.sum() * 0.0


MASKS: dict[str, tuple[Callable[[], nn.Module], Any, Any]] = {
    "by name": (Net, lambda n, b: nothing(n(b[0], attention_mask=b[1])), KEEP.long()),
    "by position": (Net, lambda n, b: nothing(n(b[0], b[1])), KEEP.long()),
    "through a wrapper": (Wrapper, lambda n, b: nothing(n(b[0], b[1])), KEEP),
    "added to scores": (Net, lambda n, b: nothing(n(b[0], b[1])), (KEEP.float() - 1) * 1e4),
    "torch's": (Torchs, lambda n, b: nothing(n(b[0], None, b[1])), ~KEEP),
    "of the decoder": (Both, lambda n, b: nothing(n(b[0], torch.ones_like(b[1]), b[1])), KEEP),
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_of_padding_is_found_however_it_is_passed(fit: Fit, kind: str) -> None:
    make, step, mask = MASKS[kind]
    found = seen(fit, step, (IDS, mask), make)[0]
    assert found is not None and torch.equal(found, KEEP)


def test_the_mask_of_an_encoder_is_none_of_the_decoders(fit: Fit) -> None:
    found = seen(fit, lambda n, b: nothing(n(b[0], b[1])), (IDS, KEEP), Both)[0]
    assert found is None


def ahead(labels: Tensor, by: int = 1) -> Tensor:
    """Return labels at the positions that predict them."""
    return torch.cat([labels[:, by:], torch.full_like(labels[:, :by], NO)], 1)


def shifted(z: Tensor, y: Tensor, **given: Any) -> Tensor:
    return F.cross_entropy(z[:, :-1].flatten(0, 1), y[:, 1:].flatten(), **given)


def emptied(n: nn.Module, b: Any) -> Tensor:
    """The step itself puts -100 where there is padding."""
    return shifted(n(b[0]), b[0].masked_fill(b[0] == 0, NO))


def selected(n: nn.Module, b: Any) -> Tensor:
    return F.cross_entropy(n(b[0], b[1])[b[1]], b[2][b[1]])


PAD = IDS.masked_fill(~KEEP, NO)
PROMPT = PAD.masked_fill(torch.arange(6) < 2, NO)
NONE = torch.full_like(IDS, NO)
# the step, the batch, and the labels that count
MOVED: dict[str, tuple[Any, Any, Tensor]] = {
    "shifted by hand": (lambda n, b: shifted(n(b[0]), b[1]), (IDS, PROMPT), ahead(PROMPT)),
    "the inputs are the labels": (lambda n, b: shifted(n(b), b, ignore_index=0), IDS, ahead(PAD)),
    "padding emptied in the step": (emptied, (IDS, KEEP), ahead(PAD)),
    "nested": (
        lambda n, b: shifted(n(b[0]["x"]), b[1][0]["y"]), ({"x": IDS}, ({"y": PROMPT},)), ahead(PROMPT),
    ),
    "moved by two": (
        lambda n, b: F.cross_entropy(n(b[0])[:, :-2].flatten(0, 1), b[1][:, 2:].flatten()),
        (IDS, PAD), ahead(PAD, 2),
    ),
    "shifted in the data": (
        lambda n, b: F.cross_entropy(n(b[0]).flatten(0, 1), b[1].flatten()), (IDS, ahead(PAD)), ahead(PAD),
    ),
    "inputs and labels cut from one": (
        lambda n, b: F.cross_entropy(n(b[0][:, :-1]).flatten(0, 1), b[0][:, 1:].flatten(), ignore_index=0),
        (IDS,), PAD[:, 1:],
    ),
    "two ahead, cut from one": (
        lambda n, b: F.cross_entropy(n(b[:, :-2]).mT, b[:, 2:], ignore_index=0), IDS, PAD[:, 2:],
    ),
    "transposed": (lambda n, b: F.cross_entropy(n(b[0]).mT, b[1]), (IDS, MIXED), MIXED),
    "divided in bfloat16": (
        lambda n, b: shifted(n(b[0]).bfloat16() / 3, b[1]), (IDS, PROMPT), ahead(PROMPT),
    ),
    "log-probabilities": (
        lambda n, b: F.nll_loss(n(b[0])[:, :-1].log_softmax(-1).mT, b[1][:, 1:]), (IDS, PROMPT), ahead(PROMPT),
    ),
    "a module that ignores 0": (
        lambda n, b: nn.CrossEntropyLoss(ignore_index=0)(n(b[0]).mT, b[1]), (IDS, MIXED),
        MIXED.masked_fill(MIXED == 0, NO),
    ),
    "a call that ignores 4": (
        lambda n, b: F.cross_entropy(n(b[0]).mT, b[1], None, None, 4), (IDS, MIXED),
        MIXED.masked_fill(MIXED == 4, NO),
    ),
    "selected by a mask": (selected, (IDS, KEEP, MIXED), MIXED.masked_fill(~KEEP, NO)),
    "one of several": (
        lambda n, b: F.cross_entropy(n(b[0]).mT, b[2]), (IDS, MIXED.flip(0), MIXED), MIXED,
    ),
    "own words, another criterion": (
        lambda n, b: -n(b[0])[:, :-1].softmax(-1).gather(-1, b[1][:, 1:].clamp(min=0).unsqueeze(-1)).mean(),
        (IDS, PROMPT), ahead(PROMPT),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MOVED)
def test_labels_and_what_counts_are_those_of_the_users_own_criterion(fit: Fit, kind: str) -> None:
    step, batch, wanted = MOVED[kind]
    mask, target = seen(fit, step, batch)
    counts = wanted != NO
    assert target is not None and torch.equal(target[counts], wanted[counts])
    assert torch.equal(torch.ones_like(counts) if mask is None else mask, counts)


def test_a_place_that_is_given_is_shifted_as_the_criterion_does(fit: Fit) -> None:
    step = lambda n, b: shifted(n(b["x"]), b["y"])  # noqa: E731
    batch = {"x": IDS, "z": IDS.flip(1), "y": PROMPT}
    mask, target = seen(fit, step, batch, target="y")
    assert target is not None and torch.equal(target, ahead(PROMPT))
    assert mask is not None and torch.equal(mask, ahead(PROMPT) != NO)


def each(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.mT, labels, reduction="none")


def mean(values: Tensor, keep: Tensor) -> Tensor:
    return (values * keep).sum() / keep.sum()


LEFT_OUT: dict[str, tuple[Any, Tensor]] = {
    "every second one": (
        lambda n, b: F.cross_entropy(n(b[0])[:, ::2].mT, b[1][:, ::2]),
        torch.arange(6).expand(4, 6) % 2 == 0,
    ),
    "by a product": (lambda n, b: mean(each(n(b[0]), b[1]), KEEP), KEEP),
    "of what comes next": (
        lambda n, b: mean(each(n(b[0])[:, :-1], b[0][:, 1:]), KEEP[:, 1:]),
        F.pad(KEEP[:, 1:], (0, 1), value=False),
    ),
    "by hand": (
        lambda n, b: -mean(n(b[0]).log_softmax(-1).gather(-1, b[1][..., None])[..., 0], KEEP), KEEP,
    ),
    "no class at all": (
        lambda n, b: mean(each(n(b[0]), b[1].where(KEEP, 255).clamp(max=C - 1)), KEEP), KEEP,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_OUT)
def test_positions_that_the_loss_leaves_out_are_left_out(fit: Fit, case: str) -> None:
    step, counted = LEFT_OUT[case]
    mask, _ = seen(fit, step, (IDS, MIXED))
    assert mask is not None and torch.equal(mask, counted)
    assert seen(fit, step, (IDS, MIXED), mask=lambda b: KEEP)[0] is KEEP


def test_a_hook_on_the_outputs_sees_one_backward(fit: Fit) -> None:
    called: list[int] = []

    def step(n: nn.Module, b: Any) -> Tensor:
        z = n(b[0])
        z.register_hook(lambda gradient: called.append(1))
        return -mean(z.log_softmax(-1)[..., 0], KEEP)

    seen(fit, step, (IDS, MIXED), class_dim=-1)
    assert len(called) == 1


def test_whole_samples_without_a_loss_learn_from_the_teacher_and_that_is_said(fit: Fit) -> None:
    step = lambda n, b: mean(each(n(b[0])[:2], b[1][:2]), KEEP[:2])  # noqa: E731
    with pytest.warns(UserWarning, match="counts positions.*12 of 24.*pass `mask=`"):
        mask, _ = seen(fit, step, (IDS, MIXED))
    assert mask is not None and torch.equal(mask[:2], KEEP[:2]) and bool(mask[2:].all())


@pytest.mark.parametrize("at", [1, 20])
def test_positions_that_are_left_out_later_are_left_out_from_then_on(fit: Fit, at: int) -> None:
    def spy(s: Tensor, t: Tensor, *, mask: Any = None) -> Tensor:
        got.append(mask)
        return (s - t).square().mean()

    got: list[Any] = []
    step = lambda n, b: mean(each(n(b[0]), b[1]), b[2])  # noqa: E731
    batches = [(IDS, MIXED, KEEP | (index < at)) for index in range(at + 2)]
    distillation = Distillation(Teacher(Net()), {"spy": {"loss": spy}}, diagnostics_every_n_steps=0)
    told = pytest.warns(UserWarning, match="6 positions in batch 20, after 4 steps.*pass `mask=`")
    with told if at > 16 else nullcontext():  # after those that are all looked at
        fit(User(Net(), step), distillation, batches=DataLoader(batches, batch_size=None), log_every_n_steps=20)  # type: ignore[arg-type]  # fmt: skip
    assert got[-3].all() and all(torch.equal(mask, KEEP) for mask in got[-2:])


def test_a_language_whose_next_token_is_certain_is_no_other_order_of_classes(fit: Fit) -> None:
    follows = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 0])
    words = [torch.arange(C)]
    for _ in range(5):
        words.append(follows[words[-1]])
    ids = torch.stack(words, 1)
    for labels in (ids.clone(), ids.masked_fill(torch.arange(6) == 0, NO)):
        guide = Net()
        guide.embed.weight.data = 9.0 * F.one_hot(follows, C).float()
        for step in (
            lambda n, b: shifted(n(b[0]), b[1]),
            lambda n, b: n(b[0])[:, :-1].var(-1).mean(),  # which says nothing of labels
        ):
            spoken = Distillation(Teacher(guide), {"kd": 1.0}, class_dim=-1)
            batches = DataLoader([(ids, labels)], batch_size=None)
            fit(User(Net(), step), spoken, batches=batches)


class Owns(Net):
    """Computes its own loss."""

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        z = self.embed(ids)
        return {"logits": z, "loss": shifted(z, labels, ignore_index=0)}


def test_what_a_compiled_network_compares_itself_is_heard_as_well(
    fit: Fit, clean_dynamo: None
) -> None:
    def make() -> nn.Module:
        net = Owns()
        net.compile(backend="eager")
        return net

    mask, target = seen(fit, lambda n, b: n(b[0], b[1])["loss"], (IDS, MIXED), make)
    wanted = ahead(MIXED.masked_fill(MIXED == 0, NO))
    assert mask is not None and torch.equal(mask, wanted != NO)
    assert target is not None and torch.equal(target[mask], wanted[mask])


def test_labels_of_a_large_vocabulary_come_through_bfloat16_whole() -> None:
    logits = torch.randn(2, 3, 50_257, requires_grad=True).bfloat16()
    labels = torch.tensor([[50_256, 4_097, NO], [255, 0, 31_000]])
    with Listener() as heard:
        F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    found = usage(heard.calls, logits)
    assert found.labels is not None and torch.equal(found.labels, labels)
    assert found.counted is not None and torch.equal(found.counted, labels != NO)


def test_tags_in_another_order_are_still_told(fit: Fit) -> None:
    guide, ids = Net(), torch.arange(6 * C).view(C, 6) % C
    guide.embed.weight.data = 9.0 * F.one_hot((torch.arange(C) + 1) % C, C).float()
    tags = DataLoader([(ids, ids.clone())], batch_size=None)
    with pytest.raises(AccelError, match="another order"):
        fit(
            User(Net(), lambda n, b: F.cross_entropy(n(b[0]).mT, b[1])),
            Distillation(Teacher(guide), {"kd": 1.0}),
            batches=tags,
        )
