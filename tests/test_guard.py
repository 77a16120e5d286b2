"""The accuracy guard and the schedules, against snapshots made independently and uninterrupted runs."""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from tiny import Fit
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import StructuredPruning
from lightning_accel.errors import AccelError, StructureMismatch
from lightning_accel.pruning import prune, schedule
from lightning_accel.pruning.rollback import Rollback
from lightning_accel.pruning.target import Macs
from lightning_accel.surgery import Structure, follow
from lightning_accel.surgery.rng import random_state, set_random_state
from lightning_accel.surgery.snapshot import Snapshot

pytestmark = [
    # These scores fall by the epoch, whatever the network.
    pytest.mark.filterwarnings("ignore:the network is worse at the end"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]


class Told(LightningModule):
    """A user's module with dropout, whose validation metric is what the test says it is."""

    def __init__(self, scores: Sequence[float] = (), mode: str = "step") -> None:
        super().__init__()
        self.net = nn.Sequential(tiny.ConvNet(), nn.Dropout(0.2))
        self.scores = list(scores)
        self.mode = mode

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        scores = self.scores or [1.0]
        self.log("val_acc", scores[min(self.trainer.current_epoch, len(scores) - 1)])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2, amsgrad=True)
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3, 4], 0.7)]


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 3, 8, 8, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(16) % 4), 8)


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Fit:
    return tiny.fits(trainer_kwargs, loader, epochs=6)


def seeded(scores: Sequence[float] = ()) -> Told:
    torch.manual_seed(0)
    return Told(scores)


def guarded(**changed: Any) -> StructuredPruning:
    given = {"ratio": 0.5, "when": [2, 4], "max_drop": 0.01, "monitor": "val_acc", **changed}
    return StructuredPruning(**given)


def state_of(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """All of a fit's state, read without the package."""
    averages = [c for c in trainer.callbacks if isinstance(c, EMAWeightAveraging)]
    return copy.deepcopy(
        {
            "weights": dict(module.state_dict()),
            "attributes": [(m.in_channels, m.out_channels) for m in convolutions(module)],
            "optimizer": trainer.optimizers[0].state_dict(),
            "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
            "averages": [a._average_model.state_dict() for a in averages],
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=True)[1],
        }
    )


def convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [m for m in module.modules() if isinstance(m, nn.Conv2d)]


def equal(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, np.ndarray):
        return bool((one == two).all())
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[k], two[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(itertools.starmap(equal, zip(one, two, strict=True)))
    return bool(one == two)


class Watch(Callback):
    """Notes the whole state before every prune, and after every edit."""

    def __init__(self) -> None:
        self.before: list[dict[str, Any]] = []
        self.after: list[dict[str, Any]] = []
        self.epochs: list[int] = []

    def on_model_edit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before.append(state_of(trainer, pl_module))
        self.epochs.append(trainer.current_epoch)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.after.append(state_of(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.after.append(state_of(trainer, pl_module))


# --- rolling back ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_prune_that_costs_too_much_is_taken_back_bit_equal(fit: Fit) -> None:
    # Epochs 0 and 1 dense, prune before 2, good; prune before 4, bad; the end.
    model, watch = seeded([0.9, 0.9, 0.9, 0.9, 0.5, 0.5]), Watch()
    pruning = guarded()
    with pytest.warns(UserWarning, match=r"taken back: `val_acc` 0.5, 0.9 before"):
        fit(model, pruning, watch)
    assert watch.epochs == [2, 4, 5]  # two prunes, and back in the last epoch
    assert not equal(watch.before[2], watch.before[1])  # two epochs of training lie between
    assert equal(watch.after[-1], watch.before[1])
    assert model.net[0].stem[0].out_channels == 6
    assert [step.get("rolled_back") for step in pruning.history] == [None, 5]


@pytest.mark.slow
@pytest.mark.parametrize("average", [False, True])
def test_the_first_prune_is_taken_back_to_the_dense_network(fit: Fit, average: bool) -> None:
    model, watch = seeded([0.9, 0.9, 0.5]), Watch()
    extra = [EMAWeightAveraging()] if average else []
    with pytest.warns(UserWarning, match="taken back"):
        fit(model, guarded(), watch, *extra)
    assert len(watch.before[0]["averages"]) == len(extra)
    assert watch.epochs == [2, 4]  # at the next due step, which is not done any more
    assert equal(watch.after[4], watch.before[0])
    assert model.net[0].stem[0].out_channels == 8
    assert not equal(watch.after[-1]["weights"], watch.before[0]["weights"])  # training went on


@pytest.mark.slow
def test_within_the_budget_every_step_is_done(fit: Fit) -> None:
    model, pruning = seeded([0.95, 0.95, 0.94]), guarded()
    fit(model, pruning)
    assert model.net[0].stem[0].out_channels == 4
    assert pruning.guard is not None and pruning.guard.snapshot is None  # memory is given back


@pytest.mark.slow
def test_mode_min_watches_a_loss(fit: Fit) -> None:
    model = seeded([0.3, 0.3, 0.32])
    with pytest.warns(UserWarning, match="taken back"):
        fit(model, guarded(mode="min"))
    assert model.net[0].stem[0].out_channels == 8
    model = seeded([0.3, 0.3, 0.1])
    fit(model, guarded(mode="min"))
    assert model.net[0].stem[0].out_channels == 4


@pytest.mark.slow
def test_a_prune_may_recover_within_its_patience(fit: Fit) -> None:
    scores = [0.9, 0.9, 0.5, 0.5, 0.9]
    model, watch = seeded(scores), Watch()
    fit(model, guarded(when=[2, 3], patience=3), watch)
    assert watch.epochs == [2, 5]  # due at 3, but only good again after epoch 4
    assert model.net[0].stem[0].out_channels == 4
    model = seeded(scores)
    with pytest.warns(UserWarning, match="taken back"):
        fit(model, guarded(when=[2, 3], patience=1))
    assert model.net[0].stem[0].out_channels == 8


@pytest.mark.slow
def test_a_metric_that_is_not_a_number_is_beyond_any_budget(fit: Fit) -> None:
    model = seeded([0.9, 0.9, float("nan")])
    with pytest.warns(UserWarning, match="taken back"):
        fit(model, guarded(max_drop=5.0))
    assert model.net[0].stem[0].out_channels == 8


@pytest.mark.slow
def test_a_prune_that_was_never_validated_is_taken_back(fit: Fit) -> None:
    model = seeded()
    with pytest.warns(UserWarning, match="not validated since"):
        fit(model, guarded(when=2), max_steps=5)
    assert model.net[0].stem[0].out_channels == 8


@pytest.mark.slow
def test_the_last_checkpoint_holds_the_network_that_passed(fit: Fit, tmp_path: Path) -> None:
    model = seeded([0.9, 0.9, 0.9, 0.9, 0.5, 0.5])
    with pytest.warns(UserWarning, match="taken back"):
        fit(model, guarded(), every_epoch(tmp_path))
    stored = torch.load(tmp_path / "epoch=5.ckpt", weights_only=True)["state_dict"]
    assert equal(stored, dict(model.state_dict()))


def every_epoch(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}")


@pytest.mark.slow
@pytest.mark.parametrize("scores", [[0.9, 0.9, 0.9, 0.9, 0.5], [0.9, 0.9, 0.5], [0.9]])
def test_a_resumed_fit_judges_like_the_uninterrupted_one(
    fit: Fit, tmp_path: Path, scores: list[float]
) -> None:
    class Draws(Callback):
        """Lightning does not resume random state; here every epoch begins with its own."""

        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            torch.manual_seed(trainer.global_step)

    def run(model: Told, ckpt: Any = None) -> StructuredPruning:
        pruning = guarded()
        saving = [every_epoch(tmp_path)] if ckpt is None else []
        fit(model, pruning, Draws(), *saving, ckpt=ckpt)
        return pruning

    with pytest.warns(UserWarning) if min(scores) < 0.9 else pytest.MonkeyPatch.context():
        whole = seeded(scores)
        history = run(whole).history
        for epoch in range(len(scores) % 2, 5, 1 if len(scores) == 5 else 2):
            resumed = Told(scores)
            pruning = run(resumed, tmp_path / f"epoch={epoch}.ckpt")
            assert equal(dict(whole.state_dict()), dict(resumed.state_dict())), epoch
            assert pruning.history == history


# --- schedules ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cubic", "iterative"])
def test_a_schedule_resumes_bit_equal_between_any_two_steps(
    fit: Fit, tmp_path: Path, name: str
) -> None:
    class Plain(Told):
        def __init__(self) -> None:
            super().__init__()
            self.net[1] = nn.Identity()

    def pruning() -> StructuredPruning:
        return StructuredPruning(target=Macs(0.3), when=[1, 2, 4], schedule=name)

    torch.manual_seed(0)
    whole = Plain()
    fit(whole, pruning(), every_epoch(tmp_path))
    for epoch in range(5):
        resumed = Plain()
        fit(resumed, pruning(), ckpt=tmp_path / f"epoch={epoch}.ckpt")
        assert equal(dict(whole.state_dict()), dict(resumed.state_dict())), epoch


@pytest.mark.parametrize("name", ["linear", "cubic", "iterative"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_schedules_fall_from_all_to_the_share_and_never_rise(name: str, kept: float) -> None:
    shares = [schedule.share_left(kept, step, 5, name) for step in range(6)]
    assert shares[0] == 1.0 and shares[-1] == kept
    assert all(later < earlier for earlier, later in itertools.pairwise(shares))
    gone = [schedule.share_gone(1 - kept, step, 5, name) for step in range(6)]
    assert gone == pytest.approx([1 - share for share in shares])


def test_schedules_are_those_of_the_literature() -> None:
    t = torch.arange(5, dtype=torch.float64) / 4
    final = 0.8  # sparsity; Zhu and Gupta write s_t = s_f + (0 - s_f)(1 - t)^3
    cubic = (final - final * (1 - t) ** 3).tolist()
    assert [schedule.share_gone(final, i, 4, "cubic") for i in range(5)] == pytest.approx(cubic)
    left = [schedule.share_left(0.2, i, 4, "iterative") for i in range(5)]
    factors = [b / a for a, b in itertools.pairwise(left)]
    assert factors == pytest.approx([0.2**0.25] * 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "cubic", "iterative"])
def test_a_fit_follows_its_schedule(fit: Fit, name: str) -> None:
    model, pruning = (
        seeded(),
        StructuredPruning(target=Macs(0.3), when=[1, 2, 4], schedule=name, round_to=None),
    )
    model.net[0] = tiny.ConvNet(width=32)
    fit(model, pruning)
    left = 1.0
    for step, entry in enumerate(pruning.history, 1):
        left *= entry["kept"]
        asked = schedule.share_left(0.3, step, 3, name)
        assert 0.95 * asked <= left <= asked, (step, left, asked)
    assert len(pruning.history) == 3


# --- the pure parts ----------------------------------------------------------------------------


def test_a_snapshot_is_independent_and_survives_a_file(tmp_path: Path) -> None:
    net = tiny.ConvNet().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(4, 3, 8, 8)).sum().backward()
    optimizer.step()
    whole = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    before = Structure.of(net)
    taken = Snapshot.take(
        net, pristine=Structure(), holders={"a": optimizer}, random=[random_state()]
    )
    drawn = torch.rand(3), random.random(), np.random.rand()
    torch.save(taken.to_dict(), tmp_path / "snapshot.pt")
    follow(optimizer, prune(net, example=torch.randn(2, 3, 8, 8), ratio=0.5))
    objects = dict(net.named_parameters())
    stored = Snapshot.from_dict(torch.load(tmp_path / "snapshot.pt", weights_only=True))
    receipt = stored.restore(net, pristine=before, holders={"a": optimizer})
    stored.restore_random()
    assert equal(whole, (net.state_dict(), optimizer.state_dict()))
    assert all(objects[name] is p for name, p in net.named_parameters())
    assert net.stem[0].out_channels == 8 and receipt.changes
    assert net.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert equal(drawn, (torch.rand(3), random.random(), np.random.rand()))
    with torch.no_grad():
        net.stem[0].weight.add_(1.0)  # the snapshot does not hang on the model
    stored.restore(net, pristine=before)
    assert equal(whole[0], net.state_dict())


def test_state_in_another_number_format_comes_back_as_it_was() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], 0.1, momentum=0.9)
    precise = torch.tensor([1.0001, 2.0002, 3.0003])
    optimizer.state[weight]["momentum_buffer"] = precise.clone()
    net = nn.Module()
    net.weight = weight
    taken = Snapshot.take(net, pristine=Structure(), holders={"a": optimizer})
    optimizer.state[weight]["momentum_buffer"].zero_()
    taken.restore(net, pristine=Structure(), holders={"a": optimizer})
    assert equal(optimizer.state[weight]["momentum_buffer"], precise)


def test_tied_weights_stay_tied() -> None:
    net = tiny.TiedLM(dim=16)
    before, taken = Structure.of(net), Snapshot.take(net, pristine=Structure())
    prune(net, example=tiny.INPUTS[tiny.TiedLM](), ratio=0.5)
    taken.restore(net, pristine=before)
    assert net.head.weight is net.embed.weight
    assert net.embed.embedding_dim == net.head.in_features == 16
    net(tiny.INPUTS[tiny.TiedLM]()).sum().backward()


def test_a_network_that_lost_a_tensor_is_refused_untouched() -> None:
    net = tiny.MLP()
    taken = Snapshot.take(net, pristine=Structure())
    with torch.no_grad():
        net.body[0].weight.add_(1.0)
    changed = net.body[0].weight.detach().clone()
    net.head = nn.Identity()
    with pytest.raises(StructureMismatch, match=r"head\.weight"):
        taken.restore(net, pristine=Structure())
    assert torch.equal(net.body[0].weight, changed)


def test_random_states_are_plain_and_come_back() -> None:
    state = random_state()
    drawn = torch.rand(2), random.gauss(0, 1), np.random.standard_normal()
    set_random_state(state)
    assert equal(drawn, (torch.rand(2), random.gauss(0, 1), np.random.standard_normal()))


def test_a_drop_of_exactly_the_budget_is_within_it() -> None:
    guard = Rollback(max_drop=0.01, monitor="acc", mode="max", patience=1)
    guard.note({"acc": torch.tensor(0.95)})
    guard.begin(epoch=1, snapshot=None)
    guard.note({"acc": torch.tensor(0.94)})
    assert guard.is_within()
    guard.note({"acc": torch.tensor(0.9399)})
    assert not guard.is_within()


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"max_drop": None}, "max_drop=None"),
        ({"monitor": None}, "monitor=None"),
        ({"max_drop": -0.1}, "how much worse"),
        ({"max_drop": float("nan")}, "how much worse"),
        ({"max_drop": True}, "how much worse"),
        ({"mode": "better"}, "`mode`"),
        ({"patience": 0}, "`patience`"),
        ({"patience": 1.5}, "`patience`"),
        ({"when": [0, 2]}, "before epoch 0"),
        ({"schedule": "square"}, "'one_shot', 'linear', 'cubic', 'iterative'"),
        ({"schedule": "one_shot"}, "2 epochs"),
    ],
)
def test_bad_arguments_are_told_at_once(changed: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        guarded(**changed)


def test_a_metric_that_nobody_logs_is_told_after_the_first_validation(fit: Fit) -> None:
    with pytest.raises(AccelError, match="val_acc"):
        fit(seeded(), guarded(monitor="accuracy"))


def test_a_prune_without_a_validation_before_it_is_an_error(fit: Fit) -> None:
    with pytest.raises(AccelError, match="no validation in this fit"):
        fit(seeded(), guarded(), limit_val_batches=0)


@pytest.mark.slow
def test_a_trial_run_prunes_and_judges_nothing(fit: Fit) -> None:
    model = seeded([0.0])
    fit(model, guarded(), fast_dev_run=True)
    assert model.net[0].stem[0].out_channels == 4


# --- two processes -----------------------------------------------------------------------------


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_follow_the_first_ones_verdict(root: Path, tmp_path: Path) -> None:
    script = root / "tests" / "scripts" / "ddp_guard.py"
    status, printed = forks.run_ranks(script, str(tmp_path), cwd=tmp_path)
    assert status == 0, printed[-3000:]
    zero, one = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    for run in ("whole", "resumed", "search"):
        assert zero[run]["state"] == one[run]["state"]
        assert zero[run]["widths"] == one[run]["widths"]
    # Starts and ends of epochs 0 and 1, the prune before 2, its epoch, back before 3, and the rest.
    assert zero["whole"]["widths"] == [8] * 5 + [6] * 3 + [8] * 4
    before, after = 4, 8
    for rank in (zero, one):  # each with a random state of its own
        assert rank["whole"]["state"][after] == rank["whole"]["state"][before]
        assert rank["whole"]["random"][after] == rank["whole"]["random"][before]
    assert zero["resumed"]["widths"] == zero["whole"]["widths"][-len(zero["resumed"]["widths"]) :]
    assert zero["resumed"]["state"][1] == zero["whole"]["state"][after]
    # A search takes each step back, and tries a smaller one at once.
    assert zero["search"]["widths"] == [8] * 5 + [6] * 3 + [8] + [7] * 3 + [8] * 4
    for rank in (zero, one):
        state = rank["search"]["state"]
        assert state[4] == state[8] == state[12]
