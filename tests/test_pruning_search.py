"""Pruning as far as a metric allows, against bounds that the metric itself sets."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from tiny import Fit
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import Distillation, Macs, Objective, Params, StructuredPruning
from lightning_accel.errors import AccelError, NoEffect
from lightning_accel.pruning import history as past

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]


def macs(net: nn.Module) -> int:
    """Multiply-accumulates of a ConvNet on an image of 8 x 8, counted by hand."""
    sizes = {"stem.0": 64, "conv.0": 64, "down.0": 9, "head": 1}
    return sum(size * net.get_parameter(f"{name}.weight").numel() for name, size in sizes.items())


class Bounded(LightningModule):
    """Its score is good while at least `bound` of the arithmetic is there, and the sizes that it saw are kept."""

    def __init__(self, bound: float, width: int = 16, good: float = 0.9, bad: float = 0.5) -> None:
        super().__init__()
        self.net = tiny.ConvNet(width)
        self.dense, self.bound, self.scores = macs(self.net), bound, (good, bad)
        self.seen: list[tuple[float, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        left = macs(self.net) / self.dense
        score = self.scores[left < self.bound]
        if batch_idx == 0:
            self.seen.append((left, score))
        self.log("score", score, sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def loader() -> DataLoader[Any]:
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, torch.arange(16) % 4), 8)


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Fit:
    return tiny.fits(trainer_kwargs, loader, epochs=12)


def search(**changed: Any) -> StructuredPruning:
    return StructuredPruning(**{"when": 1, "max_drop": 0.01, "monitor": "score", **changed})


def bounded(bound: float, **how: Any) -> Bounded:
    torch.manual_seed(0)
    return Bounded(bound, **how)


@pytest.mark.slow
@pytest.mark.parametrize(("bound", "mode"), [(0.7, "max"), (0.35, "min"), (0.1, "max")])
def test_it_goes_as_far_as_the_metric_allows_and_no_further(
    fit: Fit, bound: float, mode: str
) -> None:
    scores = {"good": 0.9, "bad": 0.5} if mode == "max" else {"good": 0.1, "bad": 0.5}
    model, pruning = bounded(bound, **scores), search(mode=mode)
    fit(model, pruning)
    left = macs(model.net) / model.dense
    assert bound <= left < 1.12 * bound + 0.02
    # what was kept, and what was taken back, is what validation saw
    seen = [pair for pair, _ in itertools.groupby(model.seen)]
    points = pruning.trade_off
    told = [(point["kept"], pytest.approx(point["score"])) for point in points]
    assert seen[: len(told)] == [(pytest.approx(kept), score) for kept, score in told]
    assert len(seen) - len(told) in (0, 1)  # the last taken back, and then validated again
    left_of_it = [(entry["params_before"], entry["params_after"]) for entry in pruning.history]
    assert len(set(left_of_it)) == len(left_of_it)  # nothing is tried twice
    for entry in pruning.history:
        assert ("rolled_back" in entry) == (entry["score"] == pytest.approx(scores["bad"]))
    sign = 1 if mode == "max" else -1
    for point in points:
        better = [
            p for p in points
            if (p["params"], -sign * p["score"]) != (point["params"], -sign * point["score"])
            and p["params"] <= point["params"] and sign * p["score"] >= sign * point["score"]
        ]  # fmt: skip
        assert point["pareto"] == (not better)


@pytest.mark.slow
def test_a_step_of_a_search_is_a_prune_to_that_target(fit: Fit) -> None:
    """One step, and the same said by hand: to the bit."""
    one, two = bounded(0.0), bounded(0.0)
    fit(one, search(), epochs=2)
    fit(two, StructuredPruning(target=Macs(0.8), scope="sensitivity", when=1), epochs=2)
    assert macs(one.net) < one.dense
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


@pytest.mark.filterwarnings("ignore:The fit ended before the first step")
def test_a_search_that_has_not_begun_is_the_plain_fit(fit: Fit) -> None:
    one, two = bounded(0.0), bounded(0.0)
    fit(one, search(when=3), epochs=4, limit_train_batches=1, max_steps=3)
    fit(two, epochs=4, limit_train_batches=1, max_steps=3)
    assert all(torch.equal(v, two.state_dict()[n]) for n, v in one.state_dict().items())


@pytest.mark.slow
def test_a_prune_that_is_taken_back_leaves_the_fit_as_it_was(fit: Fit) -> None:
    """The weights after the last prune is taken back are those before it."""

    class Watch(Callback):
        def __init__(self) -> None:
            self.states: list[dict[str, Tensor]] = []

        def on_model_edit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.states.append({n: v.clone() for n, v in pl_module.state_dict().items()})

    model, watch, pruning = bounded(1.0), Watch(), search()
    fit(
        model, watch, pruning, epochs=3
    )  # before epoch 1; back and a smaller one before 2; back at the end
    before, taken_back, smaller = watch.states[0], watch.states[2], model.state_dict()
    assert [entry["rolled_back"] for entry in pruning.history] == [2, 2]
    assert 0.75 < pruning.history[0]["kept"] < 0.8 < pruning.history[1]["kept"] < 0.9
    for name, value in before.items():
        assert torch.equal(value, taken_back[name]) and torch.equal(value, smaller[name]), name


@pytest.mark.slow
def test_a_resumed_search_goes_on_as_the_uninterrupted_one(fit: Fit, tmp_path: Path) -> None:
    class Draws(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            torch.manual_seed(trainer.global_step)

    whole, pruning = bounded(0.5, width=16), search()
    keep = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}")
    fit(whole, pruning, Draws(), keep, epochs=6)
    assert [entry.get("rolled_back") for entry in pruning.history] == [None, None, 4, 5, 5]
    for epoch in (1, 3, 4):  # between two steps, and between one and its way back
        resumed, again = bounded(0.5, width=16), search()
        fit(resumed, again, Draws(), epochs=6, ckpt=tmp_path / f"epoch={epoch}.ckpt")
        assert again.history == pruning.history and again.trade_off == pruning.trade_off
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), (epoch, name)


class ByHand(tiny.ByHand, Bounded):
    """Of the user's, by hand."""


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("kind", [Bounded, ByHand])
def test_it_keeps_the_bound_in_any_format_and_by_hand(
    fit: Fit, kind: type[Bounded], precision: Any
) -> None:
    torch.manual_seed(0)
    model, pruning = kind(0.5), search()
    fit(model, pruning, epochs=5, precision=precision)
    assert 0.5 <= macs(model.net) / model.dense < 0.7
    assert any("rolled_back" in entry for entry in pruning.history)


@pytest.mark.slow
def test_a_search_goes_on_from_a_schedule_of_the_same_unit_only(fit: Fit, tmp_path: Path) -> None:
    for target, fits in ((Macs(0.7), True), (Params(0.7), False)):
        before = StructuredPruning(target=target, when=[1, 2], max_drop=0.01, monitor="score")
        keep = ModelCheckpoint(dirpath=tmp_path / str(fits), save_top_k=-1, filename="{epoch}")
        fit(bounded(0.0, width=8), before, keep, epochs=3)
        model, again = bounded(0.0, width=8), search()
        with nullcontext() if fits else pytest.raises(AccelError, match="in the unit in which"):
            fit(model, again, epochs=4, ckpt=tmp_path / str(fits) / "epoch=1.ckpt")
        if fits:
            assert past.left(again.history) == pytest.approx(macs(model.net) / model.dense)


def test_steps_gallop_until_one_is_taken_back_and_are_halved_from_there() -> None:
    good, bad = {"kept": 0.5}, {"kept": 0.5, "rolled_back": 3}

    def asked(*history: dict[str, Any]) -> float:
        return 1 - next(past.next_steps(history)).share / past.left(history)

    assert [asked(*[good] * n) for n in range(4)] == pytest.approx([0.2, 0.3, 0.45, 0.5])
    assert asked(good, bad) == pytest.approx(0.15) == asked(good, bad, good)
    assert asked(good, bad, good, bad) == pytest.approx(0.075)
    assert not list(past.next_steps([good, *[bad] * 4]))
    shares = [target.share for target in past.next_steps([good])]
    gone = [1 - share / 0.5 for share in shares]
    assert all(b == pytest.approx(a / 2) for a, b in itertools.pairwise(gone))


@pytest.mark.slow
def test_where_nothing_more_can_go_it_ends(fit: Fit) -> None:
    model = bounded(0.0, width=4)
    pruning = search()
    fit(model, pruning, epochs=14)
    assert all("rolled_back" not in entry for entry in pruning.history)
    assert model.net.conv[0].out_channels == 1 and len(pruning.history) < 13


@pytest.mark.slow
@pytest.mark.parametrize("patience", [1, 2, 3])
def test_one_epoch_is_where_it_begins_and_every_step_can_be_judged(fit: Fit, patience: int) -> None:
    pruning = search(when=2, patience=patience)
    fit(bounded(0.0), pruning, epochs=8)
    assert pruning.when == tuple(range(2, 8 - patience + 1, patience))
    assert [entry["epoch"] for entry in pruning.history] == list(pruning.when)
    assert all("score" in entry for entry in pruning.history)


@pytest.mark.slow
def test_several_epochs_are_those_of_the_steps(fit: Fit) -> None:
    pruning = search(when=[1, 4])
    fit(bounded(0.0), pruning, epochs=6)
    assert [entry["epoch"] for entry in pruning.history] == [1, 4]


@pytest.mark.slow
def test_what_was_seen_is_told_at_the_end(fit: Fit, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        fit(bounded(0.7), search(), epochs=3)
    (told,) = [r.message for r in caplog.records if "at each size" in r.message]
    assert "* " in told and "100.0% of the multiply-accumulates" in told and "0.9" in told
    assert "a longer one may go further" in told


def test_why_it_ended_is_told() -> None:
    good = {"kept": 0.5, "params_before": 4, "params_after": 2, "score": 0.9, "epoch": 1}
    bad = good | {"rolled_back": 2}
    for history, says in [
        ([good], "a longer one may go further"),
        ([good, *[bad] * 4], "less than 2% of what is left"),
        ([good | {"exhausted": True}], "Nothing more could go"),
        ([good, bad | {"exhausted": True}], "No smaller step was left"),
    ]:
        assert says in past.describe(past.trade_off(history, 0.9, "max"), "score", history)


@pytest.mark.slow
def test_a_metric_that_breaks_is_no_good_metric(fit: Fit) -> None:
    model, pruning = bounded(0.5, bad=math.nan), search()
    fit(model, pruning, epochs=8)
    assert macs(model.net) / model.dense >= 0.5


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"schedule": "cubic"}, "has none"),
        ({"when": 0}, "before the first prune"),
        ({"monitor": None}, "a metric and how much worse"),
        ({"scope": "glocal"}, "scope"),
        ({"scope": ""}, "scope"),
        ({"max_drop": None, "monitor": None}, "either `ratio` or `target`"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        search(**given)


def test_a_fit_without_an_end_needs_the_epochs(fit: Fit) -> None:
    with pytest.raises(ValueError, match="no number of epochs"):
        fit(bounded(0.0), search(), epochs=-1, max_steps=4)
    pruning = search(when=[1])
    with pytest.raises(ValueError, match="no number of epochs"):
        fit(bounded(0.0), pruning, epochs=-1, max_steps=4)


def test_a_network_of_which_nothing_can_go_says_so_at_the_start(fit: Fit) -> None:
    class Narrow(Bounded):
        def __init__(self) -> None:
            LightningModule.__init__(self)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))

    with pytest.raises(NoEffect):
        fit(Narrow(), search())


# --- what may not go unsaid ---------------------------------------------------------------------


def test_a_guard_beside_another_prune_is_refused(fit: Fit) -> None:
    for others in (
        StructuredPruning(ratio=0.5, when=2, select="net.stem*"),
        search(select="net.conv*"),
    ):
        with pytest.raises(AccelError, match="what others have pruned since"):
            fit(bounded(0.0), search(select="net.down*"), others)


@pytest.mark.slow
def test_the_best_so_far_is_what_a_search_compares_with(fit: Fit) -> None:
    """A score that rises with training: 0.01 below the first value would be nothing."""

    class Rises(Bounded):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            small = macs(self.net) / self.dense < 0.5
            self.log("score", 0.5 if small else 0.5 + 0.02 * self.current_epoch)

    torch.manual_seed(0)
    model = Rises(0.0)
    fit(model, search(), epochs=8)
    assert macs(model.net) / model.dense >= 0.5


@pytest.mark.slow
def test_a_network_that_is_worse_at_the_end_than_when_it_passed_is_told(fit: Fit) -> None:
    class Decays(Bounded):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            left = macs(self.net) / self.dense
            good = left == 1 or (left > 0.7 and self.current_epoch < 6)
            self.log("score", 0.9 if good else 0.1)

    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"worse at the end.*`score` 0.1, 0.9 at best"):
        fit(Decays(0.0), search(), epochs=9)


@pytest.mark.slow
def test_a_value_that_is_left_over_judges_nothing(fit: Fit) -> None:
    """Logged in every third epoch only."""

    class Seldom(Bounded):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.current_epoch % 3 == 0:
                super().validation_step(batch, batch_idx)

    torch.manual_seed(0)
    model, pruning = Seldom(0.85), search(when=2)
    fit(model, pruning, epochs=8)
    for entry in pruning.history:
        assert ("score" in entry) == (entry["epoch"] <= 6 and entry["params_after"] is not None)
    assert [entry["epoch"] for entry in pruning.history] == [2, 4, 7]
    assert macs(model.net) / model.dense >= 0.85


@pytest.mark.slow
def test_what_is_left_after_a_way_back_is_what_others_read(fit: Fit) -> None:
    model, objective = bounded(1.0), Objective("score")
    trainer = fit(model, search(), objective, epochs=3)
    assert macs(model.net) == model.dense
    assert (
        objective.value(trainer) == pytest.approx(0.9) == float(trainer.callback_metrics["score"])
    )


@pytest.mark.slow
def test_a_way_back_comes_before_an_average_takes_over(fit: Fit) -> None:
    """SWA gives a network with batch norm one epoch more, for the average's statistics."""
    model, average = bounded(1.0), StochasticWeightAveraging(1e-3, swa_epoch_start=1)
    fit(model, search(when=3), average, epochs=5)
    assert macs(model.net) == model.dense
    assert torch.equal(model.net.head.weight, average._average_model.net.head.weight)


@pytest.mark.slow
def test_a_network_that_is_whole_again_is_taught_no_more(fit: Fit) -> None:
    torch.manual_seed(0)
    one = Bounded(1.0)
    torch.manual_seed(0)
    two = Bounded(1.0)
    how = {"target": Macs(0.8), "when": [1, 3], "max_drop": 0.01, "monitor": "score"}
    with pytest.warns(UserWarning, match="taken back"):
        fit(one, StructuredPruning(**how), Distillation("self", {"kd": {"weight": 0.9}}), epochs=5)
    with pytest.warns(UserWarning, match="taken back"):
        fit(two, StructuredPruning(**how), epochs=5)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_is_nothing_to_compare_with(fit: Fit, value: float) -> None:
    with pytest.raises(AccelError, match="is no number before the first prune"):
        fit(bounded(0.0, good=value), search(), epochs=3)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"limit_val_batches": 0}, "no validation in this fit"),
        ({"check_val_every_n_epoch": 3}, "every 3 epochs, and a prune before epoch 2"),
        (
            {"check_val_every_n_epoch": None, "val_check_interval": 5},
            "every 5 batches, and a prune after 4",
        ),
    ],
)
def test_what_can_never_be_judged_is_refused_at_the_start(
    fit: Fit, given: dict[str, Any], says: str
) -> None:
    model = bounded(0.0)
    with pytest.raises(AccelError, match=says):
        fit(model, search(when=2), epochs=6, **given)
    assert not model.trainer.global_step


@pytest.mark.parametrize("monitor", ["val/loss", "val_loss", "Loss", "test.mse/dataloader_idx_0"])
def test_what_should_be_low_is_not_taken_for_what_should_be_high(monitor: str) -> None:
    with pytest.raises(ValueError, match="mode='min'"):
        search(monitor=monitor)
    assert search(monitor=monitor, mode="min").guard
    assert search(monitor="lossless_share").guard


def test_a_fit_that_ends_before_the_first_step_says_so(fit: Fit) -> None:
    stop = EarlyStopping("score", patience=1, mode="max")
    with pytest.warns(UserWarning, match="before the first step of the search"):
        fit(bounded(0.0), search(when=4), stop, epochs=8)
