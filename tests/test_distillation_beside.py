"""Distillation beside everything else: copies, errors, resume, compiled code, precision, other callbacks."""

from __future__ import annotations

import copy
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from distilling import (
    BOTH,
    HINT,
    Adam,
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
    teacher,
)
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    StochasticWeightAveraging,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_accel import (
    AccelReport,
    AutocastPrecision,
    BlockCompile,
    Distillation,
    StepMeter,
    StructuredPruning,
)
from lightning_accel.distillation import (
    FitProgress,
    LossTerm,
    Schedule,
    Teacher,
    distributed,
    losses,
)
from lightning_accel.distillation.loss_term import KNOWN, loss_terms
from lightning_accel.distillation.schedule import read
from lightning_accel.errors import AccelError, Unsupported
from lightning_accel.precision import MemoryFormat
from lightning_accel.pruning import SparsityTraining, WeightMasks

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Fit:
    return fits(trainer_kwargs)


# --- what a fit leaves behind ---------------------------------------------------------------------


def clean(module: nn.Module) -> bool:
    """Tell whether a module has its own methods and no hooks."""
    hooks = any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    return not hooks and not {"training_step", "manual_backward"} & set(vars(module))


def test_a_checkpoint_is_that_of_the_plain_module(fit: Fit, tmp_path: Path) -> None:
    model = Module()
    fit(model, Distillation(teacher(), BOTH), epochs(tmp_path))
    stored = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    assert set(stored["state_dict"]) == set(Module().state_dict())
    plain = tiny.ConvNet()
    plain.load_state_dict({name[4:]: value for name, value in stored["state_dict"].items()})
    assert apart(plain, model.net) == 0
    assert apart(Module.load_from_checkpoint(tmp_path / "epoch=1.ckpt"), model) == 0
    told = stored["callbacks"]["Distillation"]
    assert "heads" in told and "ema" not in told and "self" not in told
    fit(Module(), Distillation(teacher(), "kd"), epochs(tmp_path / "kd"))
    small = torch.load(tmp_path / "kd" / "epoch=1.ckpt", weights_only=True)["callbacks"]
    assert not any(isinstance(v, (dict, Tensor)) for v in small["Distillation"].values())


@pytest.mark.parametrize("kind", [Module, Manual])
def test_the_module_gets_its_methods_back_after_a_fit(fit: Fit, kind: Any) -> None:
    model, guide = kind(), master()
    assert clean(model)
    during: list[bool] = []
    distillation = Distillation(teacher(guide), BOTH)
    fit(model, distillation, At(lambda t, module, i: during.append(clean(module))))
    assert during and not any(during)
    assert clean(model) and clean(guide)


def broken(error: BaseException, where: str) -> Any:
    class Breaks(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if where == "step" and batch_idx == 1:
                raise error
            return super().training_step(batch, batch_idx)

    def raises(trainer: Trainer, module: Any, index: int) -> None:
        if where == "hook" and index == 1:
            raise error

    return Breaks(), At(raises)


@pytest.mark.parametrize("where", ["step", "hook"])
@pytest.mark.parametrize(
    "error", [OSError("mine"), KeyboardInterrupt()], ids=["error", "interrupt"]
)
def test_the_module_gets_its_methods_back_after_an_error(
    fit: Fit, error: BaseException, where: str
) -> None:
    model, breaks = broken(error, where)
    guide, held = master(), signal.getsignal(signal.SIGINT)
    distillation = Distillation(teacher(guide), BOTH)
    try:
        with pytest.raises((OSError, SystemExit, KeyboardInterrupt)) as caught:
            fit(model, distillation, breaks)
    finally:
        signal.signal(signal.SIGINT, held)
    assert isinstance(error, KeyboardInterrupt) or caught.value is error
    assert clean(model) and clean(guide)
    other = Module()
    fit(other, distillation)
    assert apart(other.net, Module().net) > 1e-2


def test_an_error_in_the_users_first_step_is_the_users(fit: Fit) -> None:
    class Breaks(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise OSError("mine")

    model = Breaks()
    with pytest.raises(OSError, match="^mine$"):
        fit(model, Distillation(teacher(), BOTH))
    assert clean(model)


def learns(module: Any) -> bool:
    """Tell whether a module's own method works and changes nothing of another one."""
    return bool(module.training_step([torch.randn(2, 3, 8, 8), torch.tensor([0, 1])], 0) > 0)


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))  # noqa: S301


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("source", ["module", "self", "ema"])
def test_module_and_callback_copy_before_during_and_after_a_fit(
    fit: Fit, copied: Callable[[Any], Any], source: str
) -> None:
    guide = {"module": None}.get(source, source)
    distillation = copied(Distillation(teacher(guide), HINT))
    prune = [StructuredPruning(ratio=0.5, when=1)] if source == "self" else []
    model: Any = copied(Module())
    seen: list[int] = []

    def during(trainer: Trainer, module: Any, index: int) -> None:
        other = copied(module)
        assert other.training_step.__self__ is other
        before = copy.deepcopy(module.state_dict())
        assert learns(other)
        assert all(torch.equal(before[n], v) for n, v in module.state_dict().items())
        copied(distillation)
        seen.append(index)

    fit(model, *prune, distillation, At(during))
    assert len(seen) == 6
    other, again = copied(model), copied(distillation)
    assert learns(other) and apart(model.net, model.net) == 0
    fit(Module(), *prune, again)


def test_one_callback_one_trainer_and_one_module_serve_several_fits(fit: Fit) -> None:
    distillation, model = Distillation(teacher(), BOTH), Module()
    trainer = fit(model, distillation)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, data(), data())
    assert trainer.global_step == 9 and len(trainer.optimizers[0].param_groups) == 2
    fit(model, distillation)
    fresh, other = Module(), Module()
    fit(fresh, distillation)
    fit(other, Distillation(teacher(), BOTH))
    assert apart(fresh, other) == 0 and clean(model)


def test_validate_and_test_and_fast_dev_run_need_no_teacher(
    fit: Fit, trainer_kwargs: dict[str, Any]
) -> None:
    distillation, model = Distillation("nowhere.ckpt", BOTH), Module()
    trainer = Trainer(**{**trainer_kwargs, "callbacks": [distillation]})
    trainer.validate(model, data(), verbose=False)
    trainer.test(model, data(), verbose=False)
    fit(model, Distillation(teacher(), BOTH), fast_dev_run=True)
    assert clean(model)


def test_barebones_trainers_work(trainer_kwargs: dict[str, Any]) -> None:
    kept = {key: trainer_kwargs[key] for key in ("accelerator", "devices", "max_epochs")}
    model = Module()
    Trainer(barebones=True, callbacks=[callback("kd")], **kept).fit(model, data())
    assert apart(model.net, by_hand("kd")[0]) == 0


# --- resume ---------------------------------------------------------------------------------------


def prune(**kwargs: Any) -> StructuredPruning:
    return StructuredPruning(ratio=0.5, when=[1, 2], **kwargs)


SETTINGS: dict[str, Callable[[], list[Callback]]] = {
    "projectors": lambda: [Distillation(teacher(), {**BOTH, "crd": {"layers": "down"}})],
    "ramps": lambda: [Distillation(teacher(), {"kd": Schedule(0.0, 1.0, delay=0.4), **HINT})],
    "average": lambda: [Distillation(teacher("ema"), BOTH, ema_decay=0.8)],
    "average of lightning": lambda: [EMAWeightAveraging(decay=0.8), Distillation(teacher("ema"), BOTH)],
    "self": lambda: [prune(), Distillation(teacher("self"), BOTH)],
    "self in bfloat16": lambda: [prune(), Distillation(teacher("self", precision="bf16-true"), BOTH)],
    "average of the pruned": lambda: [prune(), Distillation(teacher("ema"), BOTH, ema_decay=0.8)],
    "prune": lambda: [Distillation(teacher(), BOTH), prune()],
    "cache": lambda: [Distillation(teacher(), BOTH, cache="cache")],
}  # fmt: skip


def states(trainer: Trainer) -> list[Tensor]:
    """Return all tensors of the optimizers, projectors' included."""
    found = []
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                found += [parameter.detach(), *optimizer.state[parameter].values()]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_resume_is_bit_equal_to_the_uninterrupted_fit(fit: Fit, tmp_path: Path, name: str) -> None:
    whole: Any = Adam()
    trainer = fit(whole, *SETTINGS[name](), epochs(tmp_path / "a"), max_epochs=4)
    for epoch in (0, 1, 2):
        resumed: Any = Adam()
        again = fit(
            resumed, *SETTINGS[name](), max_epochs=4, ckpt=tmp_path / "a" / f"epoch={epoch}.ckpt"
        )
        assert apart(whole, resumed) == 0
        assert all(torch.equal(*pair) for pair in zip(states(trainer), states(again), strict=True))


# --- compiled networks ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("clean_dynamo")
@pytest.mark.parametrize(
    ("backend", "style", "warm"),
    [
        *(("eager", style, False) for style in ("wrapped", "in_place", "blocks", "module")),
        ("eager", "wrapped", True),
        ("eager", "blocks", True),
        pytest.param("aot_eager", "in_place", True, marks=pytest.mark.slow),
        pytest.param("aot_eager", "module", False, marks=pytest.mark.slow),
    ],
)
def test_compiled_students_learn_what_eager_ones_do(
    fit: Fit, style: str, backend: str, warm: bool
) -> None:
    hints = {"kd": 1.0, "fitnet": {"layers": ["conv", "down.0"], "weight": 1.0}}
    eager, model = Module(), Module()
    fit(eager, Distillation(teacher(), hints))
    if style == "wrapped":
        model.net = torch.compile(model.net, backend=backend)
    elif style == "in_place":
        model.net.compile(backend=backend)
    elif style == "module":
        model.compile(backend=backend)
    if warm:  # hooks that come after a first call are otherwise never called
        other = copy.deepcopy(model.state_dict())
        for x, y in data():
            F.cross_entropy(model.net(x), y).backward()
        model.zero_grad()
        model.load_state_dict(other)
    blocks = [BlockCompile(backend=backend)] if style == "blocks" else []
    fit(model, *blocks, Distillation(teacher(), hints))
    assert apart(eager, model) < 1e-5


@pytest.mark.usefixtures("clean_dynamo")
def test_a_compiled_step_is_refused_before_anything_changes(fit: Fit) -> None:
    model = Module()
    compiled: Any = torch.compile(model, backend="eager")
    with pytest.raises(AccelError, match="compiled training step"):
        fit(compiled, Distillation(teacher(), "kd"))
    assert apart(model, Module()) == 0


def test_a_step_that_cannot_be_added_to_is_refused(fit: Fit) -> None:
    class Draws(Module):
        def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
            return super().training_step(next(dataloader_iter)[0], 0)

    compiled = Module()
    compiled.training_step = torch.compile(compiled.training_step, backend="eager")  # type: ignore[method-assign]
    for model in (compiled, Draws()):
        with pytest.raises(Unsupported, match="cannot be"):
            fit(model, Distillation(teacher(), "kd"))


@pytest.mark.slow
@pytest.mark.usefixtures("clean_dynamo")
def test_a_compiled_teacher_teaches_the_same_in_every_fit(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net: real(net, backend="eager"))
    guide, eager = Teacher(master(), precision="32-true", compile=True), Module()
    fit(eager, Distillation(teacher(), BOTH))
    for _ in range(2):
        model = Module()
        fit(model, Distillation(guide, BOTH))
        assert apart(eager, model) < 1e-5
    fit(Module(), prune(), Distillation(guide, BOTH), max_epochs=3)


# --- precision ------------------------------------------------------------------------------------

EVERY = {
    name: {"weight": 0.5, **({} if KNOWN[name].reads == "logits" else {"layers": "conv"})}
    for name in KNOWN
}


@pytest.mark.parametrize(
    ("kind", "guide"),
    [
        ("autocast", "32-true"),
        ("autocast", "same"),
        ("bf16-mixed", "bf16-true"),
        ("bf16-true", "32-true"),
        ("bf16-true", "same"),
        ("64-true", "bf16-true"),
    ],
)
def test_all_losses_work_in_every_precision(fit: Fit, kind: str, guide: str) -> None:
    model = Module()
    distillation = Distillation(teacher(precision=guide), EVERY, diagnostics_every_n_steps=1)
    given = (
        {"plugins": [AutocastPrecision("bf16-mixed")]}
        if kind == "autocast"
        else {"precision": kind}
    )
    trainer = fit(model, distillation, max_epochs=1, **given)
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(distillation.shares[name] > 1e-5 for name in EVERY)
    wanted = torch.float64 if kind == "64-true" else torch.float32
    heads = {p.dtype for p in distillation.engine.heads.parameters()}
    assert heads <= {wanted, torch.float32}
    assert trainer.callback_metrics["distillation/kd"] > 0


def test_losses_are_computed_outside_of_autocast(fit: Fit) -> None:
    seen: list[tuple[torch.dtype, bool]] = []

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        seen.append((student.dtype, torch.is_autocast_enabled("cpu")))
        return (student - teacher).square().mean()

    fit(Module(), Distillation(teacher(), {"own": loss}), precision="bf16-mixed", max_epochs=1)
    assert set(seen) == {(torch.float32, False)}


# --- beside other techniques ----------------------------------------------------------------------


class Judged(Adam):
    """Gets worse from the second epoch on."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", 0.9 if self.trainer.current_epoch < 1 else 0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("clean_dynamo")
@pytest.mark.parametrize(
    ("pruned", "amp", "compiled", "source"),
    [
        (True, True, True, "module"),
        (True, False, False, "module"),
        (True, False, True, "self"),
        (True, True, False, "self"),
        (False, True, True, "module"),
    ],
)
def test_it_works_beside_prune_amp_and_compile(
    fit: Fit, pruned: bool, amp: bool, compiled: bool, source: str
) -> None:
    distillation = Distillation(teacher(None if source == "module" else "self"), BOTH)
    pruning = [StructuredPruning(ratio=0.5, when=1)] if pruned else []
    callbacks = [*pruning] + [BlockCompile(backend="eager")] * compiled
    given = {"plugins": [AutocastPrecision("bf16-mixed")]} if amp else {}
    model = Adam()
    trainer = fit(model, *callbacks, distillation, **given)
    head: Any = dict(distillation.engine.heads.items()).get("fitnet_0")
    width = 4 if pruned else 8
    assert model.net.conv[0].out_channels == width
    assert head.weight.shape == (12 if source == "module" else 8, width)
    held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in [*model.parameters(), *head.parameters()]}
    assert all(trainer.optimizers[0].state[p]["exp_avg"].abs().sum() > 0 for p in held)
    assert trainer.optimizers[0].state[head.weight]["exp_avg"].shape == head.weight.shape
    assert trainer.callback_metrics["distillation/kd"] > 0 and clean(model)


def test_a_projector_keeps_the_columns_of_the_channels_that_stay(fit: Fit) -> None:
    class Still(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.0)

    distillation, pruning = Distillation(teacher(), BOTH), StructuredPruning(ratio=0.5, when=1)
    seen: list[Tensor] = []
    kept: list[Tensor] = []

    class Note(Callback):
        def on_model_edit_end(self, trainer: Trainer, module: Any, receipt: Any) -> None:
            moved = {move.name: move.kept.dims[0] for move in receipt.moved}
            kept.append(moved["net.conv.0.weight"])

    note = At(lambda *_: seen.append(distillation.engine.heads["fitnet_0"].weight.detach().clone()))
    fit(Still(), distillation, pruning, Note(), note)
    assert len(kept[0]) == 4 and torch.equal(seen[-1], seen[0][:, kept[0]])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The prune before epoch")
@pytest.mark.parametrize(
    ("source", "first"), [("module", False), ("self", True), ("ema", False), ("module", True)]
)
def test_a_prune_that_is_taken_back_takes_the_projectors_along(
    fit: Fit, source: str, first: bool
) -> None:
    distillation = Distillation(teacher({"module": None}.get(source, source)), BOTH)
    pruning = StructuredPruning(
        ratio=0.5, when=[1, 3], importance="taylor", max_drop=0.1, monitor="val_acc"
    )
    model = Judged()
    callbacks = [distillation, pruning] if first else [pruning, distillation]
    trainer = fit(model, *callbacks, max_epochs=6)
    assert pruning.history[-1]["rolled_back"] and model.net.conv[0].out_channels == 8
    held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    state = trainer.optimizers[0].state
    assert all(state[p]["exp_avg"].shape == p.shape for p in held)
    assert {id(p) for p in held} == {
        id(p) for p in [*model.parameters(), *distillation.engine.heads.parameters()]
    }


OTHERS: dict[str, Callable[[], list[Callback]]] = {
    "moving average": lambda: [EMAWeightAveraging(decay=0.9)],
    "stochastic average": lambda: [StochasticWeightAveraging(1e-2, swa_epoch_start=2)],
    "report": lambda: [StepMeter(), AccelReport(budget_s=0.2)],
    "memory format": lambda: [MemoryFormat()],
    "masks": lambda: [WeightMasks(pattern="2:4", when=1)],
    "sparsity": lambda: [SparsityTraining("slimming")],
    "prune and masks": lambda: [prune(), WeightMasks(0.1, when=1)],
}


@pytest.mark.parametrize(
    ("name", "first"), [(name, index % 2 == 0) for index, name in enumerate(OTHERS)]
)
def test_it_works_beside_other_callbacks(fit: Fit, name: str, first: bool) -> None:
    distillation, model = Distillation(teacher(), BOTH, diagnostics_every_n_steps=2), Adam()
    others = OTHERS[name]()
    callbacks = [distillation, *others] if first else [*others, distillation]
    trainer = fit(model, *callbacks, max_epochs=4)
    assert all(p.isfinite().all() for p in model.parameters())
    assert distillation.shares["kd"] > 1e-3 and clean(model)
    assert trainer.callback_metrics["distillation/kd"] > 0


def test_a_moving_average_beside_it_averages_the_student_alone(fit: Fit) -> None:
    average, model = EMAWeightAveraging(decay=0.9), Adam()
    held: list[Any] = []
    at = At(lambda *_: held.append(set(average._average_model.module.state_dict())))  # type: ignore[union-attr]
    fit(model, Distillation(teacher(), BOTH), average, at)
    assert held[-1] == set(Module().state_dict())


# --- terms and schedules --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("kd", ["kd"]),
        (["kd", "dkd"], ["kd", "dkd"]),
        ({"kd": 0.5, "hint": {"loss": "fitnet", "layers": "a"}, "dkd": None}, ["kd", "hint"]),
        (losses.kd, ["kd"]),
        ({"mine": LossTerm("jsd", beta=0.1)}, ["mine"]),
    ],
)
def test_losses_are_read_in_every_notation(given: Any, names: list[str]) -> None:
    found = loss_terms(given)
    assert list(found) == names
    assert all(isinstance(term, LossTerm) for term in found.values())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nope", "unknown loss"),
        ([], "no loss to distil with"),
        ({"kd": None}, "no loss to distil with"),
        (["kd", "kd"], "two losses have one name"),
        ("fitnet", "needs `layers`"),
        ({"kd": {"layers": "a"}}, "reads logits, not layers"),
        ({"kd": {"temprature": 2.0}}, "no such keyword"),
        ({"task": {"loss": "kd"}}, "the user's own loss"),
        ({"kd": float("nan")}, "is a number"),
        ({"kd": True}, "is a number"),
    ],
)
def test_losses_that_cannot_be_are_refused(given: Any, said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        loss_terms(given)


def test_a_ramp_waits_moves_and_stays() -> None:
    ramp = Schedule(1.0, 3.0, over=4, unit="epoch", delay=2)
    found = [ramp.at(FitProgress(epoch=epoch)) for epoch in (0, 2, 3, 6, 9)]
    assert found == [1.0, 1.0, 1.5, 3.0, 3.0]
    half = Schedule(0.0, 1.0, shape="cosine")
    assert [round(half.at(FitProgress(share=share)), 3) for share in (0, 0.25, 0.5, 1)] == [
        0,
        0.146,
        0.5,
        1,
    ]
    assert read({"start": 1, "end": 0}, "weight") == Schedule(1, 0)


@pytest.mark.parametrize(
    "bad", [{"over": 0}, {"delay": -1}, {"unit": "day"}, {"shape": "sine"}, {"start": float("inf")}]
)
def test_ramps_that_cannot_be_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Found"):
        Schedule(**{"start": 0.0, "end": 1.0, **bad})


@pytest.mark.parametrize(
    ("kwargs", "kind"),
    [
        ({"teacher": []}, ValueError),
        ({"teacher": 5}, TypeError),
        ({"calls": "first"}, ValueError),
        ({"ema_decay": 1.0}, ValueError),
        ({"diagnostics_every_n_steps": -1}, ValueError),
        ({"target": 1.5}, TypeError),
        ({"task_weight": "much"}, TypeError),
    ],
)
def test_arguments_that_cannot_be_are_refused(
    kwargs: dict[str, Any], kind: type[Exception]
) -> None:
    with pytest.raises(kind, match="Found"):
        Distillation(**{"teacher": nn.Linear(1, 1), **kwargs})


# --- reentrant checkpoints of the user's own --------------------------------------------------------


class Reentrant(nn.Module):
    """A block that its user recomputes in the old way, under `no_grad` at first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()  # as the old way needs
        y = checkpoint(lambda z: torch.relu(self.conv(z)), x, use_reentrant=self.reentrant)
        return self.head(y.mean((2, 3)))

    reentrant = True


def test_logits_of_a_reentrant_student_teach_as_those_of_a_plain_one(fit: Fit) -> None:
    model, other = Module(Reentrant), Module(Reentrant)
    other.net.reentrant = False
    for one in (model, other):
        fit(one, Distillation(teacher(), {"kd": 1.0}))
    assert apart(model.net, other.net) < 1e-6


def test_a_layer_within_a_reentrant_checkpoint_is_refused(fit: Fit) -> None:
    """Its features carry no gradient when they are tapped: the term would teach nothing, and say nothing."""
    guide = Distillation(teacher(), {"fitnet": {"layers": "conv", "weight": 1.0}})
    model = Module(Reentrant)
    with pytest.raises(AccelError, match=r"no gradient comes back.*`conv`.*use_reentrant=False"):
        fit(model, guide)
    model = Module(Reentrant)
    model.net.reentrant = False
    fit(model, guide)


@pytest.mark.parametrize("kind", [Module, Manual])
def test_one_process_of_a_group_that_trains_by_itself_asks_no_other(
    fit: Fit, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a fit on many devices rank 0 goes on alone: whoever asked the others would wait for ever."""
    hints = {"kd": 1.0, "fitnet": {"layers": ["conv", "down.0"], "weight": 1.0}}
    plain, alone = kind(), kind()
    fit(plain, Distillation(teacher(), hints))

    def asks(*_: Any, **__: Any) -> None:
        raise AssertionError("another process was asked")

    group = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2,
        get_rank=lambda: 0, all_gather=asks, all_reduce=asks,
    )  # fmt: skip
    monkeypatch.setattr(distributed, "distributed", group)
    assert distributed.num_processes() == 2
    fit(alone, Distillation(teacher(), hints))
    assert apart(plain, alone) == 0.0 and distributed.num_processes() == 2
