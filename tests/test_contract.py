"""What every technique promises, alone and with the others: one row each, the same checks for all.

A new technique adds a row to `ROWS`. Each check compares with a plain run or with an uninterrupted one.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import plain
import pytest
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer import call
from torch import Tensor
from torch._functorch import config as functorch
from torch.utils.data import DataLoader, TensorDataset

import lightning_accel
from lightning_accel import (
    AccelReport,
    AttentionBackend,
    AutocastPrecision,
    BlockCompile,
    Deploy,
    Distillation,
    FrozenPredict,
    FusedOptimizer,
    QuantizationAwareTraining,
    RankWatch,
    StepMeter,
    StructuredPruning,
    WarmStart,
    load_from_checkpoint,
)
from lightning_accel.bridge import ModelEdit
from lightning_accel.distillation import Teacher
from lightning_accel.errors import NoEffect, Unsupported
from lightning_accel.loading import FastLoading
from lightning_accel.loop import LeanLoop
from lightning_accel.memory import ActivationBudget, ActivationCheckpointing
from lightning_accel.precision import MatmulPrecision, MemoryFormat
from lightning_accel.pruning import SparsityTraining, WeightMasks
from lightning_accel.tuning import Settings, TuneReport

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings(
        "ignore:WarmStart had no effect"
    ),  # nothing here compiles by inductor
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
    pytest.mark.usefixtures("clean_dynamo"),
]


def prune(**kwargs: Any) -> StructuredPruning:
    return StructuredPruning(ratio=0.5, when=[1, 2], **kwargs)


def compiled() -> BlockCompile:
    return BlockCompile(backend="eager")


def report() -> AccelReport:
    return AccelReport(budget_s=0.2)


@cache
def knowing() -> torch.nn.Module:
    """Train a network until it knows the labels."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        net = tiny.ConvNet()
        adam = torch.optim.Adam(net.parameters(), 1e-2)
        for x, y in [*data()] * 20:
            adam.zero_grad()
            F.cross_entropy(net(x), y).backward()
            adam.step()
        return net.eval()


def distill(source: str | None = None, losses: Any = None) -> Distillation:
    teacher = Teacher(source or copy.deepcopy(knowing()), precision="32-true")
    return Distillation(teacher, losses or {"kd": 0.05})


FEATURES = {
    "fitnet": {"layers": "conv", "weight": 0.1},  # of equal width, and so without a projector
    "similarity_preserving": {"layers": "down.1", "weight": 1.0},
    "attention_transfer": {"layers": ["stem", "conv"], "weight": 1.0},
}

Technique = Callable[[], dict[str, Any]]

ROWS: dict[str, Technique] = {
    "prune": lambda: {"callbacks": [prune()]},
    "compile": lambda: {"callbacks": [compiled()]},
    "memory_format": lambda: {"callbacks": [MemoryFormat()]},
    "amp": lambda: {"plugins": [AutocastPrecision("bf16-mixed")]},
    "measure": lambda: {"callbacks": [StepMeter(), report()]},
    "masks": lambda: {"callbacks": [WeightMasks(pattern="2:4", when=1)]},
    "sparsity": lambda: {"callbacks": [SparsityTraining("slimming")]},
    "prune+masks": lambda: {"callbacks": [prune(), WeightMasks(0.1, when=1)]},
    "prune by reconstruction": lambda: {
        "callbacks": [prune(importance="reconstruction", compensate=True)]
    },
    "prune+compile": lambda: {"callbacks": [prune(), compiled()]},
    "quantize": lambda: {"callbacks": [QuantizationAwareTraining(when=1, freeze=2)]},
    "quantize weights": lambda: {"callbacks": [QuantizationAwareTraining("int4", None, when=1)]},
    "quantize+prune": lambda: {"callbacks": [QuantizationAwareTraining(when=1), prune()]},
    "quantize+compile": lambda: {"callbacks": [QuantizationAwareTraining(when=1), compiled()]},
    "amp+quantize+distill": lambda: {
        "callbacks": [QuantizationAwareTraining(when=1), distill()],
        "plugins": [AutocastPrecision("bf16-mixed")],
    },
    "amp+prune": lambda: {"callbacks": [prune()], "plugins": [AutocastPrecision("bf16-mixed")]},
    "distill": lambda: {"callbacks": [distill()]},
    "distill features": lambda: {"callbacks": [distill(losses=FEATURES)]},
    "prune+distill self": lambda: {"callbacks": [prune(), distill("self")]},
    "lean": lambda: {"callbacks": [LeanLoop()]},
    "watch": lambda: {"callbacks": [RankWatch()]},
    "checkpointing": lambda: {"callbacks": [ActivationCheckpointing(select="net.conv")]},
    "loading": lambda: {"callbacks": [FastLoading(resident=True)]},
    "matmul": lambda: {"callbacks": [MatmulPrecision("medium")]},
    "attention": lambda: {"callbacks": [AttentionBackend("math")]},
    "optimizer": lambda: {"callbacks": [FusedOptimizer("for-loop")]},
    "warm": lambda: {"callbacks": [WarmStart("compiled.zip")]},
    "compile+budget": lambda: {
        "callbacks": [BlockCompile(backend="aot_eager"), ActivationBudget(0.5)]
    },
    "deploy": lambda: {"callbacks": [Deploy(formats="export", budget_s=0.02)]},
    "tuned": lambda: TuneReport(
        Settings(
            precision="bf16-mixed",
            matmul_precision="medium",
            memory_format="channels_last",
            fused_optimizer="fused",
        )
    ).trainer_arguments(),
    "all": lambda: {
        "callbacks": [prune(), MemoryFormat(), compiled(), distill(), StepMeter(), report()],
        "plugins": [AutocastPrecision("bf16-mixed")],
    },
}
EDITS: dict[str, Callable[[], ModelEdit]] = {
    "prune": lambda: StructuredPruning(ratio=0.5, select="nowhere.*", when=0),
    "compile": lambda: BlockCompile(backend="eager", select="nowhere.*"),
}


class Module(LightningModule):
    """The user's, untouched."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny.ConvNet()
        self.orders: list[float] = []

    attends = False
    """Whether a step calls an attention kernel, as `attending` says."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.orders.append(float(batch[0].sum()))
        if self.attends:
            pixels = batch[0].flatten(2).mT
            batch = [
                F.scaled_dot_product_attention(pixels, pixels, pixels).mT.view_as(batch[0]),
                batch[1],
            ]
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.8)]


class Manual(tiny.ByHand, Module):
    """Of the user's, by hand."""


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(24, 3, 8, 8, generator=generator), torch.arange(24) % 4
    x[:, 0] += 2.0 * (y % 2).view(-1, 1, 1)  # which of four is written into two channels
    x[:, 1] += 2.0 * (y // 2).view(-1, 1, 1)
    return DataLoader(TensorDataset(x, y), 8)


def module(kind: type[Module] = Module) -> Module:
    torch.manual_seed(0)
    return kind()


@pytest.fixture(autouse=True)
def attending(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a step have something to choose a kernel for, where a row is about that."""
    row = getattr(request.node, "callspec", None) and request.node.callspec.params.get("row")
    monkeypatch.setattr(Module, "attends", row == "attention")


Fit = Callable[..., Trainer]


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Fit:
    def run(
        model: LightningModule, row: str | None, *extra: Callback, ckpt: Any = None, **kwargs: Any
    ) -> Trainer:
        parts = ROWS[row]() if row else {}
        callbacks = [*parts.pop("callbacks", []), *extra]
        saves = any(isinstance(c, ModelCheckpoint) for c in callbacks)
        given = {"max_epochs": 4, "enable_checkpointing": saves, **parts, **kwargs}
        trainer = Trainer(**{**trainer_kwargs, **given, "callbacks": callbacks})
        trainer.fit(model, data(), data(), ckpt_path=ckpt)
        return trainer

    return run


def epochs(folder: Path, **kwargs: Any) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}", **kwargs)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


every_row = pytest.mark.parametrize("row", ROWS)
each_alone = pytest.mark.parametrize("row", [row for row in ROWS if "+" not in row])
"""Each technique alone, and all together: where pairs say no more."""


class Fitted(NamedTuple):
    """What a whole fit left, with checkpoints in `epoch=0.ckpt` to `epoch=3.ckpt` and `light.ckpt`."""

    folder: Path
    trainer: Trainer
    model: Module
    random: Tensor
    before_last: list[Tensor]
    """Its weights before the last epoch."""


class Last(Callback):
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before = [p.detach().clone() for p in pl_module.parameters()]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Fitted]:
    """Return a fit with a row, made once for all that only look at it."""

    @cache
    def fit_once(row: str | None, max_epochs: int = 4) -> Fitted:
        model = module()
        parts = ROWS[row]() if row else {}
        folder = tmp_path_factory.mktemp("fitted")
        last = Last()
        parts["callbacks"] = [*parts.get("callbacks", []), last, epochs(folder)]
        given = tiny.silent(folder) | {"max_epochs": max_epochs, "enable_checkpointing": True}
        trainer = Trainer(**{**given, **parts})
        trainer.fit(model, data(), data())
        random = torch.get_rng_state()
        trainer.save_checkpoint(folder / "light.ckpt", weights_only=True)
        return Fitted(folder, trainer, model, random, last.before)

    return fit_once


@pytest.mark.slow
@every_row
def test_a_fit_finishes_with_finite_weights(fitted: Any, row: str) -> None:
    _, trainer, model, *_ = fitted(row)
    assert trainer.global_step == 12
    assert all(p.isfinite().all() for p in model.parameters())


@every_row
def test_names_in_the_state_dict_are_those_of_the_plain_module(fitted: Any, row: str) -> None:
    assert fitted(row).model.state_dict().keys() == Module().state_dict().keys()


@every_row
def test_the_optimizer_holds_the_models_parameters_and_no_others(fitted: Any, row: str) -> None:
    _, trainer, model, *_ = fitted(row)
    held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert {id(p) for p in trainer.optimizers[0].state} <= {id(p) for p in held}
    for parameter in held:
        moment = trainer.optimizers[0].state[parameter]["exp_avg"]
        assert moment.shape == parameter.shape and moment.abs().sum() > 0


@every_row
def test_batches_and_random_state_are_those_of_a_plain_run(fitted: Any, row: str) -> None:
    assert fitted(None).model.orders == fitted(row).model.orders
    assert torch.equal(fitted(None).random, fitted(row).random)


@every_row
def test_the_module_copies_and_pickles_after_a_fit(fitted: Any, row: str) -> None:
    model = copy.deepcopy(fitted(row).model)
    x = torch.randn(2, 3, 8, 8)
    model.eval()
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied.net(x), model.net(x))
    buffer = io.BytesIO()
    pickle.dump(model.net, buffer)
    buffer.seek(0)
    torch.testing.assert_close(pickle.load(buffer)(x), model.net(x))  # noqa: S301


@each_alone
def test_every_parameter_still_learns_at_the_end(fitted: Any, row: str) -> None:
    _, _, model, _, before = fitted(row)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.slow
@each_alone
def test_train_flags_and_requires_grad_are_the_users(fit: Fit, row: str) -> None:
    model = module()
    model.net.conv[1].eval()
    model.net.head.bias.requires_grad_(False)
    flags = {n: m.training for n, m in model.named_modules()}
    learns = {n: p.requires_grad for n, p in model.named_parameters()}
    fit(model, row)
    assert flags == {n: m.training for n, m in model.named_modules()}
    assert learns == {n: p.requires_grad for n, p in model.named_parameters()}


@pytest.mark.slow
@every_row
def test_resume_is_bit_equal_to_the_uninterrupted_run(fit: Fit, fitted: Any, row: str) -> None:
    for epoch in (0, 1):  # before the second prune, and right at it
        torch._dynamo.reset()
        resumed = Module()
        fit(resumed, row, ckpt=fitted(row).folder / f"epoch={epoch}.ckpt")
        assert same(fitted(row).model, resumed), epoch


@every_row
@pytest.mark.parametrize("kind", ["epoch=3", "light"])
def test_checkpoints_load_safely_and_without_the_technique(
    fitted: Any, row: str, kind: str
) -> None:
    path = fitted(row).folder / f"{kind}.ckpt"
    torch.load(path, weights_only=True)
    assert same(fitted(row).model, load_from_checkpoint(Module, path))


@pytest.mark.slow
@every_row
def test_a_fresh_trainer_evaluates_the_checkpoint(
    fitted: Any, trainer_kwargs: dict[str, Any], row: str
) -> None:
    path = fitted(row).folder / "epoch=3.ckpt"
    for verb in ("validate", "test"):
        expected = getattr(fitted(row).trainer, verb)(fitted(row).model, data(), verbose=False)
        torch._dynamo.reset()
        fresh = Trainer(**{**trainer_kwargs, **ROWS[row]()})
        found = getattr(fresh, verb)(Module(), data(), ckpt_path=path, verbose=False)
        assert found == expected, verb


@each_alone
def test_accumulation_and_clipping_work(fit: Fit, row: str) -> None:
    model = module()
    trainer = fit(model, row, accumulate_grad_batches=2, gradient_clip_val=0.5)
    assert trainer.global_step == 8
    assert all(p.isfinite().all() for p in model.parameters())


@each_alone
def test_manual_optimization_works(fit: Fit, row: str) -> None:
    model = module(Manual)
    trainer = fit(model, row)
    assert trainer.global_step == 12
    assert len(model.orders) == 12


@pytest.mark.slow
@each_alone
def test_a_moving_average_goes_along(fit: Fit, row: str) -> None:
    model = module()
    fit(model, row, EMAWeightAveraging(decay=0.9))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@each_alone
def test_it_learns_what_the_plain_run_learns(fitted: Any, row: str) -> None:
    stock, with_row = (
        float(fitted(name, 12).trainer.callback_metrics["val_loss"]) for name in (None, row)
    )
    assert stock < 0.4  # of 1.39 at the start
    assert with_row < stock + 0.45


@each_alone
def test_fast_dev_run_works(fit: Fit, row: str) -> None:
    model = module()
    fit(model, row, fast_dev_run=True)
    assert (model.net.stem[0].out_channels == 4) == ("prune" in row or row == "all")


# --- what is left behind ------------------------------------------------------------------------


class Stops(Module):
    """Fails in a step of the third epoch, when everything has acted."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.global_step == 7:
            raise KeyError("the user's")
        return super().training_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0])


_KINDS: list[Any] = [LightningModule, Trainer, torch.nn.Module, torch.nn.Conv2d, tiny.ConvNet]
_KINDS += [torch.optim.Optimizer, DataLoader, F, torch, torch.autograd, call]
WHOLE = {kind: {n: v for n, v in vars(kind).items() if callable(v)} for kind in _KINDS}
"""What may be patched, as it is before any test."""
STAYS = ("on_save_checkpoint", "on_load_checkpoint", "_accel_pristine", "_accel_beside")
"""What a module keeps after a fit, so that its checkpoints tell its shapes."""
ALSO = {"prune": ("_accel_cuts", "_accel_dropped"), "compile": ("_compiled_call_impl",)}
ALSO["all"] = ALSO["prune"] + ALSO["compile"]


def around(model: Module, row: str | None = None) -> dict[str, Any]:
    """Return the state of the process, what is patched in it, and all of a module that is no tensor.

    But for what a row is known to leave. Layers that stay quantized are made plain again, which must give all back.
    """
    lightning_accel.unquantize(model)
    parts = (row or "").replace(" ", "+").split("+")
    stays = {*STAYS, *(name for part in parts for name in ALSO.get(part, ()))} if row else set()
    modules = {
        f"{name}.{key}": _told(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if not key.startswith(("_trainer", "_log_", "_current_fx", "orders")) and key not in stays
    }
    return {
        "process": plain.process(),
        "patched": [
            f"{kind}.{name}"
            for kind, held in WHOLE.items()
            for name, value in held.items()
            if vars(kind).get(name) is not value
            and name not in ("__init__", "__setstate__")  # dynamo's
        ],
        "loaders": _loaders(model),
        "environment": {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"},
        "attention": [
            getattr(torch.backends.cuda, f"{name}_sdp_enabled")()
            for name in ("math", "flash", "mem_efficient", "cudnn")
        ],
        "budget": functorch.activation_memory_budget,
        "modules": modules,
        "kinds": [type(module) for module in model.modules()],
    }


def _loaders(model: Module) -> list[Any]:
    """Return what a Trainer makes its batches with, and what of its strategy is no longer the class's."""
    trainer = model.trainer
    loops = (trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop)
    combined = [loop._combined_loader for loop in loops]
    kinds = [type(one).__name__ for held in combined if held is not None for one in held.flattened]
    return [*kinds, *sorted(n for n in vars(trainer.strategy) if hasattr(Strategy, n))]


def _told(value: Any) -> Any:
    """Return what must not change: a flag, or which hooks there are."""
    if isinstance(value, (bool, str)):
        return value
    return sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__


@every_row
def test_an_error_in_the_middle_of_a_fit_leaves_nothing_behind(fit: Fit, row: str) -> None:
    left = []
    for one in (None, row):
        model = module(Stops)
        with pytest.raises(KeyError, match="the user's"):
            fit(model, one)
        left.append({**around(model, one), "random": plain.chance()})
    plain.assert_same(left[1], left[0])


@every_row
def test_a_second_fit_and_what_follows_leave_nothing_behind(fit: Fit, row: str) -> None:
    class Goes(Stops):
        training_step = Module.training_step

    left = []
    for one in (None, row):
        model = module(Goes)
        trainer = fit(model, one, max_epochs=3)
        between = around(model, one)
        trainer.fit_loop.max_epochs = 5
        trainer.fit(model, data(), data())
        assert trainer.global_step == 15 and len(model.orders) == 15
        trainer.test(model, data(), verbose=False)
        outputs = trainer.predict(model, data())
        assert outputs is not None and torch.stack([*outputs]).isfinite().all()
        left.append([between, {**around(model, one), "random": plain.chance()}])
    plain.assert_same(left[1], left[0])


def frozen() -> FrozenPredict:
    return FrozenPredict(backend="eager")


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("fails", [False, True])
def test_frozen_networks_answer_as_the_plain_ones_and_leave_nothing_behind(
    trainer_kwargs: dict[str, Any], stage: str, fails: bool
) -> None:
    """FrozenPredict has no row: it refuses a fit, which all other checks begin with."""

    class Answers(Module):
        def __init__(self) -> None:
            super().__init__()
            self.heard: list[Tensor] = []

        def test_step(self, batch: Any, batch_idx: int) -> Tensor:  # type: ignore[override]
            self.heard.append(self.net(batch[0]))
            if fails and batch_idx:
                raise KeyError("the user's")
            return self.heard[-1].mean()

        validation_step = predict_step = test_step

    torch.manual_seed(0)
    plainly, frozenly = Answers().eval(), Answers().eval()
    frozenly.load_state_dict(plainly.state_dict())
    left = []
    for model, callbacks in ((plainly, []), (frozenly, [frozen()])):
        torch.manual_seed(1)
        trainer = Trainer(**{**trainer_kwargs, "callbacks": callbacks})
        given = {} if stage == "predict" else {"verbose": False}
        with pytest.raises(KeyError) if fails else nullcontext():
            getattr(trainer, stage)(model, data(), **given)
        left.append({**around(model, "frozen"), "random": plain.chance()})
    plain.assert_same(left[1], left[0])
    assert same(plainly, frozenly) and len(frozenly.heard) == (2 if fails else 3)
    for ours, theirs in zip(frozenly.heard, plainly.heard, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_frozen_networks_refuse_a_fit_and_leave_nothing_behind(fit: Fit) -> None:
    model, before = module(), module()
    process, random = plain.process(), plain.chance()
    with pytest.raises(Unsupported, match="cannot learn"):
        fit(model, None, frozen())
    plain.assert_same([plain.process(), plain.chance()], [process, random])
    assert same(model, before) and not model.orders


@pytest.mark.parametrize("name", EDITS)
def test_a_selection_of_nothing_is_an_error_not_a_silence(fit: Fit, name: str) -> None:
    with pytest.raises(NoEffect, match="nowhere"):
        fit(module(), None, EDITS[name]())


@pytest.mark.parametrize(
    "name",
    sorted(
        set(lightning_accel.__all__) - {"load_from_checkpoint", "prune_before_sharding", "tune"}
    ),
)
def test_unknown_arguments_are_refused(name: str) -> None:
    required = [torch.nn.Linear(1, 1)] if name == "DistillationModule" else []
    with pytest.raises(TypeError, match="unexpected keyword"):
        getattr(lightning_accel, name)(*required, no_such_argument=1)


@pytest.mark.parametrize("name", lightning_accel.__all__)
def test_every_public_name_explains_itself(name: str) -> None:
    text = getattr(lightning_accel, name).__doc__
    assert text and len(text.splitlines()[0]) > 20
