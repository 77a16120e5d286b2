"""bf16 weights that learn: against the textbook loop, against fp32, and against Lightning's bf16-true."""

from __future__ import annotations

import copy
import io
import json
import pickle
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pytest
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import BlockCompile, StructuredPruning
from lightning_accel.errors import StructureMismatch, Unsupported
from lightning_accel.precision import Bf16Precision
from lightning_accel.precision.weights import ShortWeights, round_stochastically

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]

BF16, FP32 = torch.bfloat16, torch.float32
both = pytest.mark.parametrize("kind", ["master", "stochastic"])


class OwnAdam(torch.optim.Adam):
    """A user's, whose step calls its parent's."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(0.9999)  # and goes on after it
        return loss


class OwnSGD(torch.optim.Optimizer):
    """A user's, written through `.data`, which no version counter sees; and new tensors at that."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = p.data - group["lr"] * p.grad.data
        return loss


class Sharpness(torch.optim.SGD):
    """Looks at the gradient before the closure, moves there, and comes back: sharpness-aware minimisation."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            closure()
        moved = []
        for group in self.param_groups:
            for p in group["params"]:
                moved.append((p, p.data.clone()))
                p.add_(0.05 * p.grad / (p.grad.norm() + 1e-6))
        with torch.enable_grad():
            loss = closure()
        for p, before in moved:
            p.data = before
        super().step()
        return loss


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    "amsgrad": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2, initial_accumulator_value=0.125),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, centered=True, momentum=0.5),
    "rprop": lambda p: torch.optim.Rprop(p, 1e-3),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3, line_search_fn="strong_wolfe"),
    "own subclass": lambda p: OwnAdam(p, 1e-2),
    "own": lambda p: OwnSGD(p, 0.05),
    "sharpness": lambda p: Sharpness(p, 0.05),
}


class Module(LightningModule):
    """The user's, untouched."""

    def __init__(self, make: Any = OPTIMIZERS["adamw"], net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net if net is not None else tiny.MLP()
        self.make = make

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]).float(), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


def module(make: Any = OPTIMIZERS["adamw"], kind: type[Module] = Module, **kwargs: Any) -> Module:
    torch.manual_seed(0)
    return kind(make, **kwargs)


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(24, 8, generator=generator), torch.arange(24) % 4
    x[:, 0] += 2.0 * (y % 2)
    return DataLoader(TensorDataset(x, y), 8)


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Callable[..., Trainer]:
    def run(model: LightningModule, plugin: Any, *callbacks: Callback, **kwargs: Any) -> Trainer:
        ckpt, loader = kwargs.pop("ckpt", None), kwargs.pop("loader", None)
        given = {**trainer_kwargs, "enable_checkpointing": False, **kwargs}
        given["enable_checkpointing"] = any(isinstance(c, ModelCheckpoint) for c in callbacks)
        trainer = Trainer(**given, plugins=[plugin] if plugin else None, callbacks=[*callbacks])
        loader = loader or data()
        trainer.fit(model, loader, loader, ckpt_path=ckpt)
        return trainer

    return run


def textbook(make: Any, epochs: int = 2, clip: Any = None) -> dict[str, Tensor]:
    """Train with separate master weights, the way the paper has it, and return the masters."""
    net = module().net
    masters = {n: nn.Parameter(p.detach().clone()) for n, p in net.named_parameters()}
    net.to(BF16)
    optimizer = make(list(masters.values()))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for _ in range(epochs):
        for x, y in data():

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                for name, p in net.named_parameters():
                    p.data.copy_(masters[name].data)
                    p.grad = None
                loss = F.cross_entropy(net(x.to(BF16)).float(), y)
                loss.backward()
                for name, p in net.named_parameters():
                    masters[name].grad = p.grad.float()
                if clip is not None:
                    clip(list(masters.values()))
                    for m in masters.values():
                        m.grad = m.grad.to(BF16).float()  # gradients are bf16 between any two hooks
                return loss

            optimizer.step(closure)
        schedule.step()
    return {n: m.detach() for n, m in masters.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def masters(trainer: Trainer) -> dict[str, Tensor]:
    found = trainer.precision_plugin.masters()  # type: ignore[attr-defined]
    return {name.removeprefix("net."): full for name, full in found.items()}


def same(a: nn.Module, b: nn.Module) -> bool:
    return equal(a.state_dict(), b.state_dict())


# --- against the textbook -----------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masters_are_those_of_the_textbook_loop_bit_for_bit(fit: Any, name: str) -> None:
    model = module(OPTIMIZERS[name])
    objects = [id(p) for p in model.parameters()]
    trainer = fit(model, Bf16Precision("master"))
    assert equal(masters(trainer), textbook(OPTIMIZERS[name]))
    assert [id(p) for p in model.parameters()] == objects
    assert {p.dtype for p in model.parameters()} == {BF16}
    assert equal(
        dict(model.net.named_parameters()), {n: m.to(BF16) for n, m in masters(trainer).items()}
    )


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_is_that_of_fp32_rounded_once(fit: Any, algorithm: str, fused: bool) -> None:
    make = OPTIMIZERS["fused" if fused else "sgd"]
    limit = 0.05 if algorithm == "value" else 0.3
    clip = getattr(nn.utils, f"clip_grad_{algorithm}_")
    trainer = fit(
        module(make), Bf16Precision(), gradient_clip_val=limit, gradient_clip_algorithm=algorithm
    )
    expected = textbook(make, clip=lambda parameters: clip(parameters, limit))
    assert equal(masters(trainer), expected)
    assert not equal(expected, textbook(make))


@both
@pytest.mark.parametrize("name", ["adamw", "adagrad", "lbfgs", "fused"])
def test_the_optimizers_state_is_fp32_also_after_a_resume(
    fit: Any, tmp_path: Path, kind: str, name: str
) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path / "a", save_top_k=-1, filename="{epoch}")
    fit(module(OPTIMIZERS[name]), Bf16Precision(kind), saver)
    trainer = fit(
        module(OPTIMIZERS[name]), Bf16Precision(kind), ckpt=tmp_path / "a" / "epoch=0.ckpt"
    )
    found = torch.utils._pytree.tree_leaves(dict(trainer.optimizers[0].state))
    floats = [t for t in found if isinstance(t, Tensor) and t.is_floating_point()]
    assert floats and {t.dtype for t in floats} == {FP32}


# --- updates that bf16 cannot hold ----------------------------------------------------------------


class Slow(LightningModule):
    """Every step takes 2**-11 off weights of one; half an ulp below one is 2**-9."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4096))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight.float().sum() + 0.0 * batch[0].float().sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 2.0**-11)


@pytest.fixture
def slow(trainer_kwargs: dict[str, Any]) -> Callable[..., Slow]:
    def run(plugin: Any) -> Slow:
        model = Slow()
        trainer = Trainer(
            **{**trainer_kwargs, "max_epochs": 16}, plugins=[plugin] if plugin else None
        )
        trainer.fit(model, data())  # 48 steps
        return model

    return run


def test_bf16_true_stalls_where_ours_follows_fp32(slow: Any) -> None:
    truth = slow(None).weight.detach()
    assert torch.equal(truth, torch.full((4096,), 1.0 - 48 * 2.0**-11))
    assert torch.equal(slow(HalfPrecision("bf16-true")).weight.detach().float(), torch.ones(4096))
    assert torch.equal(
        slow(Bf16Precision("master")).weight.detach().float(), truth.to(BF16).float()
    )
    found = slow(Bf16Precision("stochastic")).weight.detach().float()
    # each of 48 steps goes down 2**-8 with a chance of 1/8; the same noise in every step would give 0.06
    assert 0.007 < found.std() < 0.012
    # 48 roundings on a grid of 2**-8, each of variance below 2**-18: six sigmas of the mean of 4096
    assert abs(float(found.double().mean() - truth[0])) < 6 * (48 * 2.0**-18 / 4096) ** 0.5


class Steady(Module):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 2e-3, momentum=0.9)


@pytest.mark.slow
def test_it_learns_what_fp32_learns_and_better_than_bf16_true(fit: Any) -> None:
    losses = {}
    plugins = {
        "fp32": None,
        "bf16-true": HalfPrecision("bf16-true"),
        "master": Bf16Precision("master"),
        "stochastic": Bf16Precision("stochastic"),
    }
    for name, plugin in plugins.items():
        trainer = fit(module(kind=Steady), plugin, max_epochs=60, check_val_every_n_epoch=60)
        losses[name] = float(trainer.callback_metrics["val"])
    assert losses["fp32"] < 1.3
    assert abs(losses["master"] - losses["fp32"]) < 5e-3
    assert abs(losses["stochastic"] - losses["fp32"]) < 2e-2
    assert abs(losses["master"] - losses["fp32"]) < abs(losses["bf16-true"] - losses["fp32"])


# --- rounding by chance -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159, -2.5e-3, 1e-39, 7.3e30, 255.4999])
def test_the_mean_of_the_rounding_is_the_value(value: float) -> None:
    exact = torch.tensor(value)
    found = round_stochastically(exact.expand(200_000), torch.Generator().manual_seed(3)).double()
    low, high = found.min(), found.max()
    assert low < exact.double() < high and found.unique().numel() == 2
    spacing = float(high - low)
    assert abs(float(found.mean() - exact.double())) < 5 * spacing * 0.5 / 200_000**0.5


def test_the_two_results_are_the_neighbours_in_bf16() -> None:
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    nearest = values.to(BF16).float()
    found = round_stochastically(values, torch.Generator().manual_seed(0)).float()
    ulp = 2.0 ** (torch.frexp(values).exponent - 8)
    assert ((found - values).abs() < ulp).all()
    assert ((nearest - found).abs() <= ulp).all() and not torch.equal(nearest, found)


def test_what_bf16_holds_is_exact_and_infinities_and_nan_stay() -> None:
    exact = torch.randn(1000).to(BF16).float()
    assert torch.equal(round_stochastically(exact).float(), exact)
    odd = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0])
    for _ in range(20):
        assert torch.equal(round_stochastically(odd).float(), odd)
        assert round_stochastically(torch.full((50,), torch.nan)).isnan().all()
        odd_nan = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(FP32)
        assert round_stochastically(odd_nan).isnan().all()


def test_rounding_depends_on_the_seed_only_and_leaves_the_random_state_alone(fit: Any) -> None:
    fit(module(), None)
    expected = torch.get_rng_state()
    runs = []
    for seed in (0, 0, 1):
        model = module()
        fit(model, Bf16Precision("stochastic", seed=seed))
        assert torch.equal(expected, torch.get_rng_state())
        runs.append(model)
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


# --- checkpoints ----------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("name", ["adamw", "sgd", "adagrad", "lbfgs", "own"])
def test_a_resumed_run_is_bit_equal(fit: Any, tmp_path: Path, kind: str, name: str) -> None:
    whole = module(OPTIMIZERS[name])
    saver = ModelCheckpoint(dirpath=tmp_path / "a", save_top_k=-1, filename="{epoch}")
    done = fit(whole, Bf16Precision(kind), saver, max_epochs=4)
    for epoch in range(3):
        resumed = module(OPTIMIZERS[name])
        trainer = fit(
            resumed, Bf16Precision(kind), max_epochs=4, ckpt=tmp_path / "a" / f"epoch={epoch}.ckpt"
        )
        assert same(whole, resumed), epoch
        assert equal(masters(done), masters(trainer))


@both
def test_a_checkpoint_saved_after_the_fit_resumes_bit_equal_too(
    fit: Any, tmp_path: Path, kind: str
) -> None:
    whole = module()
    fit(whole, Bf16Precision(kind), max_epochs=4)
    fit(module(), Bf16Precision(kind), max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    resumed = module()
    fit(resumed, Bf16Precision(kind), max_epochs=4, ckpt=tmp_path / "half.ckpt")
    assert same(whole, resumed)


@both
def test_checkpoints_load_safely_and_without_the_plugin(
    fit: Any, tmp_path: Path, kind: str
) -> None:
    model = module()
    fit(model, Bf16Precision(kind)).save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)
    names = set(model.state_dict())
    assert set(stored["state_dict"]) == names
    assert set(stored["Bf16Precision"]["masters"]) == (names if kind == "master" else set())
    plain = module()
    fit(plain, None, max_epochs=3, ckpt=tmp_path / "a.ckpt")
    assert {p.dtype for p in plain.parameters()} == {FP32}


@both
def test_a_checkpoint_of_bf16_true_continues_with_masters(
    fit: Any, tmp_path: Path, kind: str
) -> None:
    fit(module(), HalfPrecision("bf16-true")).save_checkpoint(tmp_path / "a.ckpt")
    model = module()
    trainer = fit(model, Bf16Precision(kind), max_epochs=3, ckpt=tmp_path / "a.ckpt")
    assert trainer.optimizers[0].state[model.net.head.weight]["exp_avg"].dtype == FP32


def test_the_other_kind_and_damaged_states_are_handled(fit: Any, tmp_path: Path) -> None:
    fit(module(), Bf16Precision("stochastic")).save_checkpoint(tmp_path / "a.ckpt")
    assert masters(fit(module(), Bf16Precision(), max_epochs=3, ckpt=tmp_path / "a.ckpt"))
    for bad in ([1], {"masters": 3}):
        with pytest.raises(StructureMismatch, match="undamaged"):
            Bf16Precision().load_state_dict(bad)  # type: ignore[arg-type]


def test_a_second_fit_goes_on_from_the_masters(fit: Any) -> None:
    model, plugin = module(), Bf16Precision()
    before = {n: m.clone() for n, m in masters(fit(model, plugin)).items()}
    seen: dict[str, Tensor] = {}

    class Start(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.update({n: m.clone() for n, m in masters(trainer).items()})

    fit(model, plugin, Start())
    assert equal(before, seen)


# --- loops ------------------------------------------------------------------------------------


@both
def test_gradients_accumulate_in_their_own_tensors(fit: Any, kind: str) -> None:
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            seen.append({(p.dtype, p.grad.dtype) for p in pl_module.parameters()})

    trainer = fit(
        module(), Bf16Precision(kind), Watch(), accumulate_grad_batches=2, gradient_clip_val=0.5
    )
    assert trainer.global_step == 4
    assert all(kinds == {(BF16, BF16)} for kinds in seen)


def test_hooks_see_bf16_before_and_after_the_step_and_clipped_gradients(fit: Any) -> None:
    seen: dict[str, Any] = {}

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            seen["before"] = {(p.dtype, p.grad.dtype) for p in pl_module.parameters()}

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            seen["norm"] = [p.grad.float().norm() for p in pl_module.parameters()]

    fit(module(), Bf16Precision(), Watch(), gradient_clip_val=1e-3)
    assert seen["before"] == {(BF16, BF16)}
    assert torch.stack(seen["norm"]).norm() < 1.1e-3  # and the clipped gradient is what stays


class Manual(Module):
    """Two optimizers by turns; the raw one bypasses Lightning."""

    raw = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers(use_pl_optimizer=not self.raw):  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.body.parameters(), 1e-3), torch.optim.SGD(
            self.net.head.parameters(), 1e-3
        )


class RawManual(Manual):
    raw = True


@both
def test_manual_optimization_with_two_optimizers_is_the_same_raw_and_wrapped(
    fit: Any, tmp_path: Path, kind: str
) -> None:
    one, two = module(kind=Manual), module(kind=RawManual)
    first, second = fit(one, Bf16Precision(kind)), fit(two, Bf16Precision(kind))
    assert same(one, two) and equal(masters(first), masters(second))
    first.save_checkpoint(tmp_path / "a.ckpt")
    whole, resumed = module(kind=Manual), module(kind=Manual)
    fit(whole, Bf16Precision(kind), max_epochs=3)
    fit(resumed, Bf16Precision(kind), max_epochs=3, ckpt=tmp_path / "a.ckpt")
    assert same(whole, resumed)


class Breaks(torch.optim.SGD):
    """Fails halfway through its arithmetic, once."""

    broken = False

    def step(self, closure: Any = None) -> Any:
        if closure is not None:
            closure()
        if not self.broken:
            self.broken = True
            raise ArithmeticError("halfway")


@both
def test_a_failed_step_leaves_a_module_in_bf16(fit: Any, kind: str) -> None:
    model = module(lambda p: Breaks(p, 0.1))
    with pytest.raises(ArithmeticError, match="halfway"):
        fit(model, Bf16Precision(kind))
    assert {p.dtype for p in model.parameters()} == {BF16}
    assert {p.grad.dtype for p in model.parameters()} == {BF16}


class Forgives(Manual):
    raw = True

    def training_step(self, batch: Any, batch_idx: int) -> None:
        try:
            super().training_step(batch, batch_idx)
        except ArithmeticError:
            self.failed = True
            if not self.raw:
                own = {id(p) for p in self.parameters()}
                for optimizer in self.trainer.optimizers:
                    assert {id(p) for p in optimizer.param_groups[0]["params"]} == own

    def configure_optimizers(self) -> Any:
        return [Breaks(self.parameters(), 0.1), OwnAdam(self.parameters(), 1e-2)], []


class ForgivesWrapped(Forgives):
    raw = False


@both
@pytest.mark.parametrize("user", [Forgives, ForgivesWrapped])
def test_a_step_whose_failure_is_forgiven_does_not_end_the_training(
    fit: Any, kind: str, user: type[Module]
) -> None:
    model = module(kind=user)
    fit(model, Bf16Precision(kind))
    assert model.failed and {p.dtype for p in model.parameters()} == {BF16}


@both
def test_parameters_may_join_in_mid_training(fit: Any, kind: str) -> None:
    class Unfreeze(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.optimizers[0].add_param_group(
                    {"params": list(pl_module.net.body.parameters())}
                )

    class Head(Module):
        def configure_optimizers(self) -> Any:
            return self.make(self.net.head.parameters())

    model = module(kind=Head)
    start = model.net.body[0].weight.detach().clone()
    trainer = fit(model, Bf16Precision(kind), Unfreeze())
    assert not torch.equal(start.to(BF16), model.net.body[0].weight)
    assert trainer.optimizers[0].state[model.net.body[0].weight]["exp_avg"].dtype == FP32


def test_sparse_gradients_and_tied_weights_work(fit: Any) -> None:
    tokens = torch.arange(48).view(8, 6) % 12
    loader = DataLoader(TensorDataset(tokens, tokens), 4)

    class Words(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]).float().flatten(0, 1), batch[1].flatten())

    tied = module(kind=Words, net=tiny.TiedLM())
    assert len(masters(fit(tied, Bf16Precision(), loader=loader))) == 5
    assert tied.net.head.weight is tied.net.embed.weight
    net = nn.Sequential(nn.Embedding(12, 12, sparse=True))
    words = module(lambda p: torch.optim.SparseAdam(list(p), 1e-2), kind=Words, net=net)
    before = net[0].weight.detach().to(BF16)
    trainer = fit(words, Bf16Precision(), loader=loader)
    assert not torch.equal(before, net[0].weight)
    assert equal({"0.weight": net[0].weight}, {n: m.to(BF16) for n, m in masters(trainer).items()})


# --- with others --------------------------------------------------------------------------------


@both
def test_a_moving_average_beside_does_not_disturb_the_masters(fit: Any, kind: str) -> None:
    alone, beside = module(), module()
    expected = masters(fit(alone, Bf16Precision(kind)))
    average = EMAWeightAveraging(decay=0.5)
    found = masters(fit(beside, Bf16Precision(kind), average))  # swaps weights for each validation
    assert equal(expected, found)
    assert not same(alone, beside) and {p.dtype for p in beside.parameters()} == {BF16}


@both
def test_what_another_writes_into_a_weight_stays(fit: Any, kind: str) -> None:
    class Mask(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            pl_module.net.head.weight.data[0] = 0.0

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step:
                assert not pl_module.net.head.weight[0].any()

    model = module(lambda p: torch.optim.SGD(p, 1e-4))
    trainer = fit(model, Bf16Precision(kind), Mask())
    assert not model.net.head.weight[0].any()
    assert model.net.head.weight[1:].all()
    assert kind == "stochastic" or masters(trainer)["head.weight"][0].abs().max() < 1e-3


@both
def test_pruning_in_mid_training_goes_along(fit: Any, tmp_path: Path, kind: str) -> None:
    model = module()
    saver = ModelCheckpoint(dirpath=tmp_path / "a", save_top_k=-1, filename="{epoch}")

    def prune() -> StructuredPruning:
        return StructuredPruning(ratio=0.5, when=1)

    trainer = fit(model, Bf16Precision(kind), prune(), saver, max_epochs=3)
    assert model.net.body[0].out_features == 8
    shapes = {n.removeprefix("net."): p.shape for n, p in model.named_parameters()}
    assert kind == "stochastic" or {n: m.shape for n, m in masters(trainer).items()} == shapes
    resumed = module()
    fit(resumed, Bf16Precision(kind), prune(), max_epochs=3, ckpt=tmp_path / "a" / "epoch=1.ckpt")
    assert same(model, resumed)


@both
def test_compiled_blocks_go_along(fit: Any, clean_dynamo: None, kind: str) -> None:
    plain, compiled = module(), module()
    fit(plain, Bf16Precision(kind))
    fit(compiled, Bf16Precision(kind), BlockCompile(backend="eager"))
    assert same(plain, compiled)


def test_norms_follow_bf16_true_and_copies_work(fit: Any, trainer_kwargs: dict[str, Any]) -> None:
    images = DataLoader(TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8) % 4), 4)
    dtypes = []
    for plugin in (HalfPrecision("bf16-true"), Bf16Precision()):
        model = module(net=tiny.ConvNet())
        fit(model, plugin, loader=images)
        dtypes.append({name: tensor.dtype for name, tensor in model.state_dict().items()})
    assert dtypes[0] == dtypes[1]
    x = torch.randn(2, 3, 8, 8, dtype=BF16)
    model.eval()
    assert torch.equal(copy.deepcopy(model).net(x), model.net(x))
    buffer = io.BytesIO()
    pickle.dump(model.net, buffer)
    Trainer(**trainer_kwargs, plugins=[Bf16Precision()]).validate(model, images, verbose=False)
    assert Trainer(**trainer_kwargs, plugins=[Bf16Precision()]).predict(Predicts(), images)


class Predicts(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = tiny.ConvNet()

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert batch[0].dtype == BF16
        return self.net(batch[0])


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["masters", "", "MASTER", "bf16-true"])
def test_an_unknown_kind_is_refused_with_the_known_ones(bad: str) -> None:
    with pytest.raises(ValueError, match="'master', 'stochastic'"):
        Bf16Precision(bad)


@pytest.mark.parametrize("bad", [None, 0, -1, float("nan"), True])
def test_a_kind_that_is_no_name_is_refused(bad: Any) -> None:
    with pytest.raises(TypeError, match="'master'"):
        Bf16Precision(bad)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (-1, ValueError),
        (2**31, ValueError),
        (None, TypeError),
        (0.5, TypeError),
        (float("nan"), TypeError),
        (True, TypeError),
    ],
)
def test_a_seed_that_is_none_is_refused(bad: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="`seed`"):
        Bf16Precision(seed=bad)


def test_complex_weights_and_sharding_strategies_are_refused(
    fit: Any, trainer_kwargs: dict[str, Any]
) -> None:
    model = module()
    model.register_buffer("phase", torch.ones(2, dtype=torch.complex64))
    with pytest.raises(Unsupported, match="`phase` of complex64"):
        fit(model, Bf16Precision())
    plugin = Bf16Precision()
    model = module()
    trainer = Trainer(**trainer_kwargs, plugins=[plugin])
    trainer.strategy.connect(model)
    model.trainer = trainer
    trainer.strategy.__class__ = type("Mine", (ModelParallelStrategy,), {})
    with pytest.raises(Unsupported, match="Mine"):
        plugin.convert_module(model)


def test_the_hooks_are_gone_after_a_fit(fit: Any) -> None:
    trainer = fit(module(), Bf16Precision())
    optimizer = trainer.optimizers[0]
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_load_state_dict_pre_hooks


def test_the_core_works_without_a_trainer() -> None:
    p = nn.Parameter(torch.ones(3, dtype=BF16))
    weights, sgd = ShortWeights("master"), torch.optim.SGD([p], lr=1.0)
    weights.watch([sgd])
    p.grad = torch.full_like(p, 2.0**-10)
    sgd.step()
    assert torch.equal(weights.masters[p], torch.full((3,), 1.0 - 2.0**-10))
    with weights.opened(sgd):
        assert sgd.param_groups[0]["params"][0].dtype == FP32
    assert sgd.param_groups[0]["params"][0] is p and p.dtype == BF16


# --- two processes ------------------------------------------------------------------------------

_DDP = """
    import json, os, sys, warnings
    import torch
    from torch import nn
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy
    from torch.utils.data import DataLoader, TensorDataset
    from lightning_accel.precision import Bf16Precision
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    folder, kind = sys.argv[1:]

    class Module(LightningModule):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
        def training_step(self, batch, batch_idx):
            return self.net(batch[0]).float().square().mean()
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-2)

    def fit(ckpt=None, epochs=4, view=True, seed=0):
        model, plugin = Module(seed), Bf16Precision(kind)
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
        trainer = Trainer(accelerator="cpu", devices=2, plugins=[plugin], max_epochs=epochs, logger=False,
            strategy=DDPStrategy(gradient_as_bucket_view=view), gradient_clip_val=0.5,
            accumulate_grad_batches=2, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder, use_distributed_sampler=True)
        trainer.fit(model, DataLoader(TensorDataset(x), 4), ckpt_path=ckpt)
        held = {**dict(model.named_parameters()), **{f"master {n}": m for n, m in plugin.masters().items()}}
        return trainer, {n: p.detach().float().sum().item() for n, p in held.items()}

    trainer, half = fit(epochs=2)
    path = os.path.join(folder, kind + ".ckpt")
    trainer.save_checkpoint(path)
    found = {"whole": fit()[1], "plain": fit(view=False)[1], "resumed": fit(path)[1], "half": half}
    found["unseeded"] = fit(seed=int(os.environ.get("LOCAL_RANK", 0)))[1]
    with open(os.path.join(folder, f"{kind}{trainer.global_rank}.json"), "w") as file:
        json.dump(found, file)
"""


@both
@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_agree_and_resume_bit_equal(tmp_path: Path, root: Path, kind: str) -> None:
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(_DDP))
    status, printed = forks.run_ranks(script, str(tmp_path), kind, cwd=tmp_path)
    assert status == 0, printed[-3000:]
    zero, one = (json.loads((tmp_path / f"{kind}{rank}.json").read_text()) for rank in (0, 1))
    assert zero == one
    assert zero["whole"] == zero["resumed"] == zero["plain"] != zero["half"]
    assert (
        zero["unseeded"] == zero["whole"]
    )  # DDP takes the first rank's weights, and so its masters
