"""Fused optimizers step where the loop steps, whatever is around them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import AutocastPrecision, StructuredPruning
from lightning_accel.errors import NoEffect, Unsupported
from lightning_accel.loop import FusedOptimizer, use_implementation
from lightning_accel.loop.fused import implementation_of, kernel_is_right
from lightning_accel.loop.layout import Layout
from lightning_accel.precision import MemoryFormat

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]

Make = Callable[[Any], Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda p: AdamW(p, 1e-2, weight_decay=0.1),
    "adam amsgrad": lambda p: Adam(p, 1e-2, amsgrad=True, maximize=True),
    "adam lr tensor": lambda p: Adam(p, torch.tensor(1e-2)),
    "sgd": lambda p: SGD(p, 1e-2),
    "momentum": lambda p: SGD(p, 1e-2, momentum=0.9, weight_decay=0.1, nesterov=True),
    "dampening": lambda p: SGD(p, 1e-2, momentum=0.9, dampening=0.3),
    "adagrad": lambda p: Adagrad(p, 1e-2, lr_decay=0.1),
}


WRONG_IN_TORCH = ("sgd", "momentum", "dampening")
"""Whose fused kernel on a CPU leaves out whole vectors in bf16, in torch 2.13 (pytorch #191763); 2.14 mends it."""


def sgd_is_wrong_in_bf16() -> bool:
    """Ask the kernel itself, on numbers for which every way of rounding gives the same."""
    weight = torch.ones(64, dtype=torch.bfloat16, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    SGD([weight], 0.5, fused=True).step()
    return not bool((weight == 0.5).all())


def train(net: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        dtype = next(net.parameters()).dtype
        optimizer.zero_grad()
        F.cross_entropy(net(x.to(dtype)).float(), torch.arange(4)).backward()
        optimizer.step()


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in net.parameters()])


def close(one: nn.Module, two: nn.Module, atol: float = 1e-6) -> bool:
    return torch.allclose(weights(one), weights(two), rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("implementation", ["fused", "foreach"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_implementation_changed_in_mid_training_steps_where_the_loop_steps(
    name: str, implementation: str, dtype: torch.dtype
) -> None:
    if (name, implementation) == ("adam lr tensor", "foreach"):
        pytest.skip("torch has none")
    bf16 = dtype == torch.bfloat16
    if bf16 and implementation == "fused" and name in WRONG_IN_TORCH and sgd_is_wrong_in_bf16():
        with pytest.raises(Unsupported, match="computes it wrongly in bfloat16 on cpu"):
            use_implementation(OPTIMIZERS[name](tiny.MLP().to(dtype).parameters()), "fused")
        return
    torch.manual_seed(0)
    start = tiny.MLP().bfloat16()  # a start that both formats can hold
    truth, loop, net = (copy.deepcopy(start).to(d) for d in (torch.float32, dtype, dtype))
    exact, plain, changed = (OPTIMIZERS[name](each.parameters()) for each in (truth, loop, net))
    for group in (*exact.param_groups, *plain.param_groups, *changed.param_groups):
        group["lr"] = group["lr"] * 4  # above what bf16 rounds away
    train(truth, exact, range(9))
    train(loop, plain, range(9))
    train(net, changed, range(3))
    assert use_implementation(changed, implementation)
    train(net, changed, range(3, 6))
    assert use_implementation(changed, "for-loop")
    train(net, changed, range(6, 9))
    error, theirs, way = (
        float((weights(each) - weights(truth)).norm()) for each in (net, loop, start)
    )
    assert error <= 1.5 * theirs + 1e-6 * way and error < 0.3 * way
    for a, b in zip(net.parameters(), loop.parameters(), strict=True):
        mine, theirs = changed.state[a], plain.state[b]
        assert mine.keys() == theirs.keys()
        assert all(mine[key].dtype == theirs[key].dtype for key in mine)
        assert "step" not in mine or mine["step"].item() == 9


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW, Adagrad])
def test_a_kernel_is_tried_before_it_is_trusted(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    kernel_is_right.cache_clear()
    assert kernel_is_right(kind, cpu, torch.float32) and kernel_is_right(kind, cpu, torch.float64)
    wrong = kind is SGD and sgd_is_wrong_in_bf16()
    assert kernel_is_right(kind, cpu, torch.bfloat16) != wrong
    name = {SGD: "_fused_sgd_", Adam: "_fused_adam_", AdamW: "_fused_adamw_"}.get(kind)
    kernel_is_right.cache_clear()
    monkeypatch.setattr(torch, name or "_fused_adagrad_", lambda *args, **kwargs: None)
    assert not kernel_is_right(kind, cpu, torch.float32)
    kernel_is_right.cache_clear()


def test_the_kernel_really_is_the_fused_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    own = torch._fused_adamw_
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *a, **k: calls.append("f") or own(*a, **k))
    net = tiny.MLP()
    optimizer = AdamW(net.parameters())
    train(net, optimizer, range(1))
    assert kernel_is_right(AdamW, torch.device("cpu"), torch.float32)
    use_implementation(optimizer, "fused")
    calls.clear()
    train(net, optimizer, range(2))
    assert calls == ["f", "f"]
    assert use_implementation(optimizer, "fused").changes == ()


def test_counters_in_double_precision_come_along() -> None:
    net = tiny.MLP()
    optimizer = AdamW(net.parameters())
    train(net, optimizer, range(2))
    for state in optimizer.state.values():
        state["step"] = state["step"].double()
    use_implementation(optimizer, "fused")
    train(net, optimizer, range(1))
    assert {s["step"].dtype for s in optimizer.state.values()} == {torch.float32}
    assert {s["step"].item() for s in optimizer.state.values()} == {3.0}
    for state in optimizer.state.values():
        state["step"] = 7  # as old checkpoints have it
    use_implementation(optimizer, "fused")
    assert {s["step"].item() for s in optimizer.state.values()} == {7.0}


def test_groups_added_later_are_of_the_kind() -> None:
    optimizer = AdamW([nn.Parameter(torch.ones(2))])
    use_implementation(optimizer, "fused")
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 1.0})
    assert [implementation_of(group) for group in optimizer.param_groups] == ["fused"] * 2


class Calls(AdamW):
    """The user's, around the step of torch."""

    def step(self, closure: Any = None) -> Any:
        self.count = getattr(self, "count", 0) + 1
        return super().step(closure)


class Own(AdamW):
    """The user's, with a step that knows of no kernel."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(parameter.grad, alpha=group["lr"])


def test_a_subclass_that_calls_the_step_of_torch_is_taken() -> None:
    optimizer = Calls(tiny.MLP().parameters())
    assert len(use_implementation(optimizer, "fused").changes) == 1


def grown(gradient: Tensor) -> Tensor:
    parameter = nn.Parameter(torch.ones(gradient.shape))
    parameter.grad = gradient
    return parameter


ONE = torch.ones(2)


@pytest.mark.parametrize(
    ("make", "implementation", "reason"),
    [
        (lambda: RMSprop([ONE]), "fused", "RMSprop has no such implementation"),
        (lambda: torch.optim.LBFGS([ONE]), "for-loop", "LBFGS has no such"),
        (lambda: Own([ONE]), "fused", "the `step` of Own neither reads"),
        (lambda: AdamW([ONE], differentiable=True), "fused", "differentiable"),
        (lambda: AdamW([ONE], differentiable=True), "foreach", "differentiable"),
        (lambda: AdamW([ONE.cfloat()]), "fused", "complex64"),
        (lambda: AdamW([ONE.to("meta")]), "fused", "no fused kernel on meta"),
        (lambda: AdamW([ONE.to("meta")]), "foreach", "no foreach kernels on meta"),
        (lambda: AdamW([ONE], torch.tensor(0.1)), "foreach", "is a tensor"),
        (lambda: SGD([grown(ONE.to_sparse())]), "fused", "sparse"),
        (lambda: SGD([ONE.to(torch.float8_e4m3fn)]), "fused", "float8"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason_and_nothing_changes(
    make: Callable[[], Optimizer], implementation: str, reason: str
) -> None:
    optimizer = make()
    before = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(Unsupported, match=reason):
        use_implementation(optimizer, implementation)
    assert [dict(group) for group in optimizer.param_groups] == before


def test_nothing_to_run_is_an_error() -> None:
    optimizer = SGD([ONE])
    optimizer.param_groups[0]["params"] = []
    with pytest.raises(NoEffect, match="without parameters"):
        use_implementation(optimizer, "fused")


@pytest.mark.parametrize("value", ["Fused", "", None, 0, -1, float("nan"), True])
def test_unknown_implementations_are_refused(value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"Found: .* Do: "):
        FusedOptimizer(value)
    with pytest.raises((ValueError, TypeError), match=r"Found: .* Do: "):
        use_implementation(SGD([ONE]), value)
    with pytest.raises(TypeError, match=r"Found: .* Do: "):
        use_implementation("sgd", "fused")  # type: ignore[arg-type]


def strided(fused: bool, align: bool) -> Tensor:
    """Step a channels-last weight with a gradient and a state that lie otherwise."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, 2, 2, generator=generator).to(memory_format=torch.channels_last)
    parameter = nn.Parameter(weight)
    optimizer, layout = AdamW([parameter], 1e-2, fused=fused), Layout()
    if align:
        layout.watch(optimizer)
    for step in range(6):
        parameter.grad = torch.randn(4, 3, 2, 2, generator=generator)
        if step == 3:
            state = optimizer.state[parameter]
            state["exp_avg"] = state["exp_avg"].contiguous()
            layout.renew()
        optimizer.step()
    return parameter.detach()


def test_memory_that_lies_otherwise_is_laid_out_for_the_kernel() -> None:
    expected = strided(fused=False, align=False)
    torch.testing.assert_close(strided(fused=True, align=True), expected)
    wrong = strided(fused=True, align=False)  # the trap in torch; when this fails it is mended
    assert (wrong - expected).abs().max() > 1e-3


@pytest.mark.parametrize("fused", [True, False])
def test_a_momentum_that_comes_late_is_taken_as_the_loop_takes_it(fused: bool) -> None:
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer, layout = SGD([a, b], 0.1, momentum=0.9, weight_decay=0.5, fused=fused), Layout()
    layout.watch(optimizer)
    for step in range(4):
        a.grad, b.grad = torch.ones(2), torch.ones(2) if step else None
        optimizer.step()
    buffer = momentum = 0.0
    expected = 1.0
    for _ in range(3):
        gradient = 1.0 + 0.5 * expected
        momentum = gradient if buffer == 0.0 else 0.9 * buffer + gradient
        buffer = momentum
        expected -= 0.1 * momentum
    torch.testing.assert_close(b.detach(), torch.full((2,), expected))


class Module(LightningModule):
    """The user's, untouched."""

    def __init__(self, make: Make = OPTIMIZERS["adamw"], net: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.make = net or tiny.MLP(), make
        self.norms: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.net(batch[0])
        return F.cross_entropy(out.float(), batch[1])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norms.append(sum(float(p.grad.norm()) for p in self.parameters()))

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def data(net: type[nn.Module] = tiny.MLP) -> DataLoader[Any]:
    torch.manual_seed(1)
    x = torch.cat([tiny.INPUTS[net]() for _ in range(4)])
    return DataLoader(TensorDataset(x, torch.arange(16) % 4), 4)


Fit = Callable[..., Trainer]


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Fit:
    def run(model: LightningModule, *callbacks: Callback, **kwargs: Any) -> Trainer:
        ckpt, loader = kwargs.pop("ckpt", None), kwargs.pop("loader", None) or data()
        saves = any(isinstance(c, ModelCheckpoint) for c in callbacks)
        given = {**trainer_kwargs, "enable_checkpointing": saves, **kwargs}
        trainer = Trainer(**{**given, "callbacks": list(callbacks)})
        trainer.fit(model, loader, ckpt_path=ckpt)
        return trainer

    return run


class Kinds(Callback):
    """What ran in each step, and where its counters were."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        for optimizer in trainer.optimizers:
            self.seen += [implementation_of(group) for group in optimizer.param_groups]


def scaled() -> dict[str, Any]:
    """Mixed precision in fp16 with a scaler, on the CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


AROUND: dict[str, Callable[[], dict[str, Any]]] = {
    "fp32": dict,
    "fp32 clip": lambda: {"gradient_clip_val": 0.1},
    "bf16-mixed clip": lambda: {"precision": "bf16-mixed", "gradient_clip_val": 0.1},
    "bf16-mixed clip value": lambda: {
        "precision": "bf16-mixed", "gradient_clip_val": 0.01, "gradient_clip_algorithm": "value",
    },
    "ours clip": lambda: {"plugins": [AutocastPrecision("bf16-mixed")], "gradient_clip_val": 0.1},
    "bf16-true": lambda: {"precision": "bf16-true"},
    "scaler": scaled,
    "scaler clip": lambda: {**scaled(), "gradient_clip_val": 0.1},
    "accumulate": lambda: {"accumulate_grad_batches": 3},
}  # fmt: skip


@pytest.mark.parametrize("built", [False, True], ids=["later", "built fused"])
@pytest.mark.parametrize("around", AROUND)
def test_a_fit_ends_where_the_loop_ends(fit: Fit, around: str, built: bool) -> None:
    loop, fused, kinds = Module(), Module(), Kinds()
    if built:
        fused = Module(lambda p: AdamW(p, 1e-2, weight_decay=0.1, fused=True))
    fit(loop, **AROUND[around]())
    fit(fused, FusedOptimizer(), kinds, **AROUND[around]())
    assert set(kinds.seen) == {"fused"}
    low = "bf16" in around or "scaler" in around or "ours" in around
    assert close(loop, fused, 0.02 if low else 1e-6)
    if (around, built) != ("scaler", True):  # whoever built it so has scaled gradients there
        assert loop.norms == pytest.approx(fused.norms, rel=0.05 if low else 1e-4)


def test_without_us_lightning_refuses_to_clip_fused_optimizers_in_bf16(fit: Fit) -> None:
    """When this fails, Lightning has mended it and our part can go."""
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(Module(lambda p: AdamW(p, fused=True)), precision="bf16-mixed", gradient_clip_val=0.1)


def test_a_step_with_infinite_gradients_is_skipped_by_the_scaler(fit: Fit) -> None:
    class Once(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 1 else loss

    loop, fused = Once(), Once()
    fit(loop, max_epochs=1, **scaled())
    trainer = fit(fused, FusedOptimizer(), max_epochs=1, **scaled())
    assert close(loop, fused, 0.02) and weights(fused).isfinite().all()
    assert {s["step"].item() for s in trainer.optimizers[0].state.values()} == {3.0}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
def test_checkpoints_of_either_continue_with_either(
    fit: Fit, tmp_path: Path, first: bool, second: bool
) -> None:
    whole = Module()
    fit(whole, max_epochs=3)
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    fit(Module(), *[FusedOptimizer()] * first, saver, max_epochs=3)
    path = tmp_path / "epoch=0.ckpt"
    groups = torch.load(path, weights_only=True)["optimizer_states"][0]["param_groups"]
    assert [group["fused"] for group in groups] == [None]
    resumed, kinds = Module(), Kinds()
    trainer = fit(resumed, *[FusedOptimizer()] * second, kinds, max_epochs=3, ckpt=path)
    assert set(kinds.seen) == {"fused" if second else "default"} and len(kinds.seen) == 8
    assert close(whole, resumed)
    assert implementation_of(trainer.optimizers[0].param_groups[0]) == "default"
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    after = torch.load(tmp_path / "after.ckpt", weights_only=True)["optimizer_states"][0]
    assert after["param_groups"][0]["fused"] is None


def test_a_load_in_mid_training_does_not_lose_it(fit: Fit) -> None:
    class Reload(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
            optimizer = trainer.optimizers[0]
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    loop, fused, kinds = Module(), Module(), Kinds()
    fit(loop, Reload())
    fit(fused, FusedOptimizer(), Reload(), kinds)
    assert set(kinds.seen) == {"fused"} and close(loop, fused)


class Two(Module):
    """Two optimizers, of which one has no kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def on_before_optimizer_step(self, optimizer: Any) -> None: ...

    def configure_optimizers(self) -> Any:
        return Calls(self.net.body.parameters()), RMSprop(self.net.head.parameters())


def test_of_several_optimizers_each_runs_as_it_can(fit: Fit) -> None:
    loop, fused, edit, kinds = Two(), Two(), FusedOptimizer(), Kinds()
    fit(loop)
    trainer = fit(fused, edit, kinds)
    assert kinds.seen == ["fused", "default"] * 8 and close(loop, fused)
    assert [change.after for change in edit.receipt.changes] == ["fused"]
    assert "RMSprop has no such implementation" in edit.receipt.skipped[0].after
    assert trainer.optimizers[0].count == 8


def test_no_optimizer_that_can_is_an_error_not_a_silence(fit: Fit) -> None:
    with pytest.raises(NoEffect, match="RMSprop has no such implementation"):
        fit(Module(lambda p: RMSprop(p)), FusedOptimizer())


def test_sparse_embeddings_are_known_before_they_have_gradients(fit: Fit) -> None:
    net = nn.Sequential(nn.Embedding(4, 8, sparse=True), tiny.MLP())
    with pytest.raises(NoEffect, match="a gradient will be sparse"):
        fit(Module(lambda p: SGD(p, 0.1), net), FusedOptimizer())


def transposed(grad: Tensor) -> Tensor:
    return grad.mT.contiguous().mT if grad.dim() == 2 else grad


def expanded(grad: Tensor) -> Tensor:
    return grad.flatten()[0].expand(grad.shape)


def sparse(grad: Tensor) -> Tensor:
    return (grad * (grad > 0)).to_sparse()


@pytest.mark.parametrize(
    ("make", "rewrite"),
    [
        (OPTIMIZERS["adamw"], transposed),
        (OPTIMIZERS["momentum"], transposed),
        (OPTIMIZERS["adamw"], expanded),
        (lambda p: SGD(p, 1e-2, momentum=0.9), sparse),
        (OPTIMIZERS["adagrad"], expanded),
    ],
)
@pytest.mark.parametrize("where", ["in the module's hook", "in clipping", "by hand"])
def test_gradients_rewritten_at_the_last_moment_are_stepped_as_the_loop_steps_them(
    fit: Fit, make: Make, rewrite: Callable[[Tensor], Tensor], where: str
) -> None:
    class Rewrites(Module):
        def rewrite(self) -> None:
            for parameter in self.parameters():
                assert parameter.grad is not None
                parameter.grad = rewrite(parameter.grad)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if where == "in the module's hook":
                self.rewrite()

        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            if where == "in clipping":
                self.rewrite()

    class ByHand(Rewrites):
        """Steps its optimizer itself, past Lightning."""

        def __init__(self, make: Make) -> None:
            super().__init__(make)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()  # type: ignore[union-attr]
            super().training_step(batch, batch_idx).backward()
            self.rewrite()
            optimizer.step()  # type: ignore[union-attr, call-arg]

    kind = ByHand if where == "by hand" else Rewrites
    loop, fused, kinds = kind(make), kind(make), Kinds()
    fit(loop)
    fit(fused, FusedOptimizer(), kinds)
    assert close(loop, fused) and set(kinds.seen) == {"fused"}


def test_gradients_that_a_hook_of_the_optimizer_rewrites_are_laid_out(fit: Fit) -> None:
    class Hooked(Module):
        def on_train_start(self) -> None:  # after ours was registered
            optimizer: Any = self.optimizers(use_pl_optimizer=False)
            optimizer.register_step_pre_hook(self.wrap)

        def wrap(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
            closure = kwargs["closure"]

            def run() -> Any:
                loss = closure()
                for parameter in self.parameters():
                    parameter.grad = transposed(parameter.grad)  # type: ignore[arg-type]
                return loss

            return args, {**kwargs, "closure": run}

    loop, fused = Hooked(), Hooked()
    fit(loop)
    fit(fused, FusedOptimizer())
    assert close(loop, fused)


@pytest.mark.parametrize("dampening", [0.0, 0.3])
def test_parameters_that_learn_later_than_others_start_as_in_the_loop(
    fit: Fit, dampening: float
) -> None:
    class Thaws(Module):
        def on_train_epoch_start(self) -> None:
            for parameter in self.net.body[0].parameters():
                parameter.requires_grad_(self.current_epoch > 0)

        def on_before_optimizer_step(self, optimizer: Any) -> None: ...

    make: Make = lambda p: SGD(p, 0.1, momentum=0.9, dampening=dampening, weight_decay=0.1)  # noqa: E731
    loop, fused, kinds = Thaws(make), Thaws(make), Kinds()
    fit(loop, max_epochs=3)
    fit(fused, FusedOptimizer(), kinds, max_epochs=3)
    assert close(loop, fused) and set(kinds.seen) == {"fused"}


def test_parameters_with_gaps_in_memory_keep_their_neighbours() -> None:
    held = torch.ones(2, 4)
    late, weight = nn.Parameter(held[:, ::2]), nn.Parameter(torch.ones(2))
    with pytest.raises(Unsupported, match="lies in memory with gaps"):
        use_implementation(SGD([late], 0.5), "fused")
    optimizer, layout = SGD([weight], 0.5), Layout()
    use_implementation(optimizer, "fused")
    layout.watch(optimizer)
    optimizer.add_param_group({"params": [late]})
    weight.grad, late.grad = torch.ones(2), torch.ones(2, 2)
    optimizer.step()
    assert held.tolist() == [[0.5, 1.0, 0.5, 1.0]] * 2 and weight.tolist() == [0.5, 0.5]


@pytest.mark.slow
def test_it_goes_with_a_prune_and_channels_last(fit: Fit) -> None:
    ends = []
    for fused in ([], [FusedOptimizer()]):
        torch.manual_seed(0)
        # Not Adam, which makes full steps of the noise before a batch norm.
        model = Module(OPTIMIZERS["momentum"], tiny.ConvNet())
        edits = [StructuredPruning(ratio=0.5, when=1), MemoryFormat()]
        fit(model, *edits, *fused, max_epochs=3, loader=data(tiny.ConvNet))
        ends.append(model)
    assert ends[1].net.stem[0].out_channels == 4
    assert torch.allclose(weights(ends[0]), weights(ends[1]), rtol=0, atol=1e-4)
