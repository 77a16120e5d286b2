"""Mixed precision and memory format, against plain autocast, plain fp32 and Lightning's own plugin."""

from __future__ import annotations

import copy
import io
import pickle
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forks
import pytest
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import AutocastPrecision, Select, StructuredPruning, hardware
from lightning_accel.errors import AccelError, NoEffect, Unsupported
from lightning_accel.precision import MemoryFormat, Policy, channels_last, policy, resolve
from lightning_accel.precision.autocast import takes_effect
from lightning_accel.precision.gate import Gate
from lightning_accel.precision.plugins import autocast_precision as plugin
from lightning_accel.precision.plugins.bf16_precision import Bf16Precision
from lightning_accel.precision.plugins.xla_precision import XlaPrecision

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]

BF16, FP16 = torch.bfloat16, torch.float16
LR = 2.0**-10
CPU = torch.device("cpu")


class Module(LightningModule):
    """The user's, untouched."""

    def __init__(self, net: nn.Module | None = None, **optimizer: Any) -> None:
        super().__init__()
        self.net = net if net is not None else tiny.MLP()
        self.optimizer = optimizer
        self.seen: dict[str, torch.dtype] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = self.net(batch[0])
        self.seen["train" if self.training else self.trainer.state.fn.value] = out.dtype
        return F.cross_entropy(out.float(), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.training_step(batch, batch_idx)

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), **{"lr": 1e-2, **self.optimizer})


def data(net: type[nn.Module] = tiny.MLP, size: int = 16) -> DataLoader[Any]:
    torch.manual_seed(1)
    x = torch.cat([tiny.INPUTS[net]() for _ in range(size // 4)])
    return DataLoader(TensorDataset(x, torch.arange(size) % 4), 4)


def module(*args: Any, kind: type[Module] = Module, **kwargs: Any) -> Module:
    torch.manual_seed(0)
    return kind(*args, **kwargs)


@pytest.fixture
def trainer(trainer_kwargs: dict[str, Any]) -> Callable[..., Trainer]:
    return lambda **kwargs: Trainer(**{**trainer_kwargs, **kwargs})


@pytest.fixture
def _fp16_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 and its scaler work on a CPU, if slowly: good enough to test them."""
    monkeypatch.setattr(plugin, "resolve", lambda format, device: Policy(FP16, True, "test"))


def fake(*fast: torch.dtype) -> Callable[..., hardware.Hardware]:
    return lambda device: hardware.Hardware(str(device), "Fake", 0, 1, fast, False, {})


# --- policy -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fast", "expected"),
    [
        ("cpu", (BF16, FP16), (BF16, False)),
        ("cpu", (FP16,), (None, False)),  # never fp16 on a CPU
        ("cpu", (), (None, False)),
        ("cuda", (BF16, FP16), (BF16, False)),
        ("cuda", (FP16,), (FP16, True)),
        ("cuda", (), (None, False)),
    ],
)
def test_auto_takes_what_is_fast(
    monkeypatch: pytest.MonkeyPatch, kind: str, fast: Any, expected: Any
) -> None:
    monkeypatch.setattr(hardware, "describe", fake(*fast))
    monkeypatch.setattr(policy, "takes_effect", lambda device, dtype: True)
    chosen = resolve("auto", kind)
    assert (chosen.dtype, chosen.scaler) == expected
    assert "Fake" in chosen.reason


def test_auto_does_not_trust_a_fast_format_that_autocast_does_not_give(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hardware, "describe", fake(BF16, FP16))
    monkeypatch.setattr(policy, "takes_effect", lambda device, dtype: False)
    assert resolve("auto", "cuda").dtype is None


@pytest.mark.parametrize("gain", [1.0, 3.0])
def test_auto_agrees_with_the_clock_of_the_machine(
    gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "_gain", lambda device, dtype: gain)
    hardware._describe.cache_clear()
    try:
        assert (resolve("auto").dtype == BF16) == (gain > 1)
    finally:
        hardware._describe.cache_clear()


def test_what_was_asked_for_is_done_and_slowness_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "describe", fake())
    assert resolve("bf16-mixed").dtype == BF16
    assert "not fast on Fake" in resolve("bf16-mixed").reason
    assert resolve("32-true").dtype is None


@pytest.mark.parametrize("bad", ["bf17", "", "bf16", "float16", "AUTO"])
def test_an_unknown_format_is_refused_with_the_known_ones(bad: str) -> None:
    with pytest.raises(ValueError, match="'auto', 'bf16-mixed', '16-mixed', '32-true'"):
        AutocastPrecision(bad)


@pytest.mark.parametrize("bad", [None, 16, float("nan"), torch.bfloat16, True])
def test_a_format_that_is_no_name_is_refused(bad: Any) -> None:
    with pytest.raises(TypeError, match="'bf16-mixed'"):
        AutocastPrecision(bad)


def test_fp16_on_a_cpu_is_refused_with_the_way_out(trainer: Any) -> None:
    with pytest.raises(Unsupported, match="pass 'bf16-mixed'"):
        trainer(plugins=[AutocastPrecision("16-mixed")]).fit(module(), data())


def test_a_device_without_autocast_is_noticed() -> None:
    assert not takes_effect(torch.device("meta"), BF16)
    with pytest.raises(Unsupported, match="stayed in fp32"):
        resolve("bf16-mixed", "meta")


def test_a_dtype_that_autocast_silently_ignores_is_noticed() -> None:
    assert not takes_effect(CPU, torch.float64)


def test_making_the_plugin_touches_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "resolve", None)
    assert AutocastPrecision("16-mixed").policy is None
    with (
        pytest.raises(AccelError, match="when a Trainer starts"),
        AutocastPrecision().forward_context(),
    ):
        pass


# --- no cast is kept --------------------------------------------------------------------------


def shared(uses: int = 3) -> nn.Sequential:
    layer = nn.Linear(8, 8)
    return nn.Sequential(*[layer] * uses)


class Tempered(Module):
    """Changes its weights between two forwards of one step, in a way that no version counts."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        first = super().training_step(batch, batch_idx)
        for weight in self.parameters():
            weight.data.mul_(0.5)
        return first + super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", [Module, Tempered])
@pytest.mark.parametrize("stage", ["fit", "validate", "predict"])
@pytest.mark.parametrize("net", [None, lambda: shared(400)], ids=["mlp", "shared"])
def test_every_value_is_that_of_lightnings_own(
    trainer: Any, kind: type[Module], stage: str, net: Any
) -> None:
    users = []
    for precision in (AutocastPrecision("bf16-mixed"), MixedPrecision("bf16-mixed", "cpu")):
        torch.manual_seed(0)
        user = module(net and net(), kind=kind)
        losses: list[Tensor] = []
        step = user.training_step
        user.training_step = lambda *a, f=step, n=losses: n.append(f(*a)) or n[-1]
        run = trainer(plugins=[precision], inference_mode=False, limit_train_batches=2)
        getattr(run, stage)(user, data())
        users.append([*user.parameters(), *losses])
    assert losses
    assert all(torch.equal(a, b) for a, b in zip(*users, strict=True))


def test_the_gradient_of_a_weight_used_often_is_summed_in_fp32(trainer: Any) -> None:
    class Often(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return sum(F.linear(batch[0], self.net[0].weight).float().sum() for _ in range(400))

        def on_after_backward(self) -> None:
            self.grad = self.net[0].weight.grad.clone()

    user, x = module(shared(1), kind=Often), next(iter(data()))[0]
    trainer(plugins=[AutocastPrecision("bf16-mixed")], limit_train_batches=1, max_epochs=1).fit(
        user, data()
    )
    truth = (400 * x.sum(0)).expand_as(user.grad)
    assert float((user.grad - truth).norm() / truth.norm()) < 0.01


class NoGradFirst(Module):
    """Uses its weights under no_grad before it uses them with grad."""

    context: Any = torch.no_grad

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with self.context():
            target = self.net(batch[0]).clone()
        return (self.net(batch[0]) - target.float() * 0.9).square().sum()

    def on_after_backward(self) -> None:
        self.grads = [p.grad.clone() for p in self.parameters() if p.grad is not None]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_weights_first_used_without_grad_still_get_their_gradient(
    trainer: Any, context: Any
) -> None:
    grads = []
    for precision in (AutocastPrecision("bf16-mixed"), MixedPrecision("bf16-mixed", "cpu")):
        user = module(kind=NoGradFirst)
        user.context = context
        trainer(plugins=[precision], max_epochs=1, limit_train_batches=1).fit(user, data())
        grads.append(user.grads)
    assert len(grads[0]) == len(list(module().parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


class Alternating(Module):
    """Manual optimization: two optimizer steps in one training_step."""

    raw = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=not self.raw)
        for _ in range(3):
            loss = F.cross_entropy(self.net(batch[0]).float(), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.losses.append(loss.item())


@pytest.mark.parametrize("raw", [False, True])
def test_weights_that_change_within_a_step_are_cast_anew(trainer: Any, raw: bool) -> None:
    losses = []
    for precision in (AutocastPrecision("bf16-mixed"), MixedPrecision("bf16-mixed", "cpu")):
        user = module(kind=Alternating)
        user.raw = raw
        trainer(plugins=[precision], max_epochs=1).fit(user, data())
        losses.append(user.losses)
    assert losses[0] == losses[1]


# --- all stages, devices and strategies -------------------------------------------------------


def test_every_stage_computes_in_the_chosen_format(trainer: Any) -> None:
    user, run = module(), trainer(plugins=[AutocastPrecision("bf16-mixed")], num_sanity_val_steps=1)
    run.fit(user, data(), data())
    run.validate(user, data(), verbose=False)
    run.test(user, data(), verbose=False)
    run.predict(user, data())
    assert user.seen == dict.fromkeys(("train", "fit", "validate", "test", "predict"), BF16)
    assert {p.dtype for p in user.parameters()} == {torch.float32}
    assert run.precision == "bf16-mixed"


def test_fp32_is_bit_equal_to_no_plugin_and_says_why(
    trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(plugin, "rank_zero_info", said.append)
    ours, plain = module(), module()
    trainer(plugins=[AutocastPrecision("32-true")]).fit(ours, data())
    trainer().fit(plain, data())
    assert ours.seen == {"train": torch.float32}
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True)
    )
    assert said == ["Computing in float32 on cpu: 32-true was asked for."]


def test_bf16_is_bit_equal_to_lightnings_own(trainer: Any) -> None:
    ours, lightnings = module(), module()
    trainer(plugins=[AutocastPrecision("bf16-mixed")]).fit(ours, data())
    trainer(plugins=[MixedPrecision("bf16-mixed", "cpu")]).fit(lightnings, data())
    pairs = zip(ours.parameters(), lightnings.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_users_own_autocast_inside_is_respected(trainer: Any) -> None:
    class Careful(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with torch.autocast("cpu", enabled=False):
                self.seen["off"] = self.net(batch[0]).dtype
            with torch.autocast("cpu", dtype=FP16):
                self.seen["other"] = self.net(batch[0]).dtype
            return super().training_step(batch, batch_idx)

    user = module(kind=Careful)
    trainer(plugins=[AutocastPrecision("bf16-mixed")]).fit(user, data())
    assert user.seen == {"off": torch.float32, "other": FP16, "train": BF16}


def test_the_device_is_that_of_the_parameters(trainer: Any) -> None:
    user = module()
    run = trainer(plugins=[AutocastPrecision("32-true")])
    precision = run.precision_plugin
    precision.device = "cuda"
    precision.connect(user, [], [])
    assert precision.device == "cpu"


@pytest.mark.parametrize("name", ["DeepSpeedStrategy", "SingleDeviceXLAStrategy", "MyFSDPStrategy"])
def test_strategies_with_a_precision_of_their_own_are_refused(trainer: Any, name: str) -> None:
    run = trainer(plugins=[AutocastPrecision("bf16-mixed")])
    run.strategy.__class__ = type(name, (type(run.strategy),), {})
    with pytest.raises(Unsupported, match=r"Do: use (Trainer\(precision=|XlaPrecision\()"):
        run.fit(module(), data())


def test_lightning_refuses_it_for_fsdp_by_itself() -> None:
    with pytest.raises(TypeError, match="FSDPPrecision"):
        FSDPStrategy(precision_plugin=AutocastPrecision())


def test_precision_twice_is_refused(trainer: Any) -> None:
    with pytest.raises(ValueError, match="Received both"):
        trainer(precision="bf16-mixed", plugins=[AutocastPrecision()])


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("fused", [True, False])
def test_bf16_clips_gradients_with_a_fused_optimizer(
    trainer: Any, fused: bool, algorithm: str
) -> None:
    user, largest = module(fused=fused), []

    class Watch(Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            grads = [p.grad.flatten() for p in user.parameters() if p.grad is not None]
            if grads:
                flat = torch.cat(grads)
                largest.append(float(flat.norm() if algorithm == "norm" else flat.abs().max()))

    trainer(
        plugins=[AutocastPrecision("bf16-mixed")],
        gradient_clip_val=0.01,
        gradient_clip_algorithm=algorithm,
        callbacks=[Watch()],
    ).fit(user, data())
    assert largest
    assert max(largest) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_agree_on_the_format(tmp_path: Path, root: Path) -> None:
    script = tmp_path / "ddp.py"
    script.write_text(
        textwrap.dedent("""
            import os, sys, torch
            from lightning.pytorch import Trainer
            from lightning.pytorch.demos.boring_classes import BoringModel
            from lightning_accel import AutocastPrecision
            from lightning_accel.precision import Policy
            from lightning_accel.precision.plugins import autocast_precision as plugin
            rank = int(os.environ.get("LOCAL_RANK", 0))
            dtype = torch.bfloat16 if rank == 0 else None  # clocks that disagree
            plugin.resolve = lambda format, device: Policy(dtype, False, "test")
            precision = AutocastPrecision()
            Trainer(accelerator="cpu", devices=2, strategy="ddp", max_steps=2, plugins=[precision],
                    logger=False, enable_checkpointing=False, enable_progress_bar=False,
                    limit_val_batches=0).fit(BoringModel())
            open(f"rank{rank}", "w").write(str(precision.policy.dtype))
        """)
    )
    status, printed = forks.run_ranks(script, cwd=tmp_path, path=(root,))
    assert status == 0, printed[-2000:]
    assert [(tmp_path / f"rank{r}").read_text() for r in (0, 1)] == ["torch.bfloat16"] * 2


# --- fp16: scaler and schedulers --------------------------------------------------------------


class Exploding(Module):
    """Gradients overflow in the listed steps."""

    bad: tuple[int, ...] = (0, 2)
    interval, frequency = "step", 1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.step, self.lrs = 0, []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        factor = float("inf") if self.step in self.bad else 1e-2  # which fits fp16 at full scale
        self.step += 1
        return super().training_step(batch, batch_idx) * factor

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.lrs.append(self.trainer.optimizers[0].param_groups[0]["lr"] / LR)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), **{"lr": LR, **self.optimizer})
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        wanted = {"interval": self.interval, "frequency": self.frequency, "scheduler": scheduler}
        return {"optimizer": optimizer, "lr_scheduler": wanted}


@pytest.mark.usefixtures("_fp16_here")
@pytest.mark.parametrize("fused", [False, True])
def test_a_scheduler_waits_for_skipped_steps(trainer: Any, fused: bool) -> None:
    user = module(kind=Exploding, fused=fused)
    trainer(plugins=[AutocastPrecision()], max_epochs=1).fit(user, data(size=24))
    assert user.lrs == [1.0, 1.0, 0.5, 0.5, 0.25, 0.125]  # steps 0 and 2 were skipped


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_lightnings_own_scheduler_does_not_wait(trainer: Any) -> None:
    """If this fails, Lightning #5558 was fixed and the gate can go."""
    user = module(kind=Exploding)
    scaler = torch.amp.GradScaler("cpu")
    trainer(plugins=[MixedPrecision("16-mixed", "cpu", scaler)], max_epochs=1).fit(
        user, data(size=24)
    )
    assert user.lrs == [0.5**i for i in range(6)]


@pytest.mark.usefixtures("_fp16_here")
def test_an_epoch_with_one_good_step_moves_an_epoch_scheduler(trainer: Any) -> None:
    user = module(kind=Exploding)
    user.interval, user.bad = "epoch", (0, 1, 2, 3, 7)
    trainer(plugins=[AutocastPrecision()], max_epochs=3).fit(user, data())
    assert user.lrs[::4] == [1.0, 1.0, 0.5]  # nothing happened in the first; the second ended badly


def test_a_scheduler_that_is_due_before_any_step_is_not_held_back() -> None:
    """As on resume at the end of an epoch."""
    user = module(kind=Exploding)
    configured = user.configure_optimizers()
    scheduler = configured["lr_scheduler"]["scheduler"]
    gate = Gate(user, [configured["optimizer"]], [scheduler])
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        user.lr_scheduler_step(scheduler, None)
    assert scheduler.get_last_lr() == [LR / 2]
    gate.open()


@pytest.mark.usefixtures("_fp16_here")
def test_the_last_step_skipped_is_known(trainer: Any) -> None:
    user, precision, skipped = module(kind=Exploding), AutocastPrecision(), []

    class Watch(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            skipped.append(precision.last_step_skipped)

    trainer(plugins=[precision], max_epochs=1, callbacks=[Watch()]).fit(user, data())
    assert skipped == [True, False, True, False]
    assert not precision.last_step_skipped


@pytest.mark.usefixtures("_fp16_here")
def test_the_users_own_scheduler_hook_is_called_and_given_back(trainer: Any) -> None:
    class Own(Exploding):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            self.called = getattr(self, "called", 0) + 1
            scheduler.step()

    user = module(kind=Own)
    trainer(plugins=[AutocastPrecision()], max_epochs=1).fit(user, data())
    assert user.called == 2
    assert "lr_scheduler_step" not in vars(user)
    pickle.dumps(user.net)


@pytest.mark.usefixtures("_fp16_here")
def test_the_scaler_does_not_reach_a_copy_of_the_module(trainer: Any) -> None:
    user, copies = module(kind=Exploding), []

    class Copy(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            copies.append(copy.deepcopy(pl_module.net))
            held = vars(pl_module)["lr_scheduler_step"]
            assert copy.deepcopy(held).__self__ is held.__self__

    trainer(plugins=[AutocastPrecision()], max_epochs=1, callbacks=[Copy()]).fit(user, data())
    assert len(copies) == 4


@pytest.mark.usefixtures("_fp16_here")
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # forgets steps on resume
@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_resume_with_a_scaler_is_bit_equal(trainer: Any, tmp_path: Path, stop: int) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    whole = module(kind=Exploding)
    whole.frequency, whole.bad = 2, (0, 1, 5)

    class Clock(Callback):
        """Steps that overflow are counted over both runs."""

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, i: int) -> None:
            pl_module.step = i

    kwargs = {"plugins": [AutocastPrecision()], "max_epochs": 1, "enable_checkpointing": True}
    run = trainer(**kwargs, callbacks=[saver, Clock()])
    x, y = data(size=4).dataset.tensors  # the same batch all over: Lightning does not skip data
    same = DataLoader(TensorDataset(x.repeat(8, 1), y.repeat(8)), 4)
    run.fit(whole, same)
    path = tmp_path / f"step={stop}.ckpt"
    torch.load(path, weights_only=True)
    resumed = module(kind=Exploding)
    resumed.frequency, resumed.bad = 2, whole.bad
    kwargs["plugins"] = [AutocastPrecision()]
    again = trainer(**kwargs, callbacks=[Clock()])
    again.fit(resumed, same, ckpt_path=path)
    assert resumed.lrs == whole.lrs[stop:]
    pairs = zip(resumed.parameters(), whole.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert again.scaler.state_dict() == run.scaler.state_dict()
    assert run.scaler.state_dict()["scale"] < 65536  # something was skipped at all


@pytest.mark.usefixtures("_fp16_here")
def test_a_scaler_state_of_lightnings_plugin_is_understood() -> None:
    precision = AutocastPrecision()
    precision._choose(CPU)
    theirs = torch.amp.GradScaler("cpu", init_scale=8.0)
    precision.load_state_dict(theirs.state_dict())
    assert precision.scaler.state_dict()["scale"] == 8.0


def test_a_checkpoint_of_another_format_is_taken(trainer: Any, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "a")
    run = {"max_epochs": 1, "enable_checkpointing": True, "callbacks": [saver]}
    trainer(plugins=[AutocastPrecision("bf16-mixed")], **run).fit(module(), data())
    user = module()
    trainer(plugins=[AutocastPrecision("32-true")]).fit(user, data(), ckpt_path=tmp_path / "a.ckpt")
    assert user.seen == {"train": torch.float32}


# --- memory format ----------------------------------------------------------------------------


def is_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


class Images(Module):
    """Notes in which format its first convolution gets the batch in each stage."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__(net or tiny.ConvNet())
        self.formats: dict[str, bool] = {}
        for layer in self.net.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_pre_hook(self._note)
                break

    def _note(self, layer: nn.Module, args: tuple[Tensor]) -> None:
        stage = "train" if self.training else self.trainer.state.fn.value
        self.formats[stage] = is_last(args[0])


def test_weights_and_batches_are_channels_last_in_every_stage(trainer: Any) -> None:
    user, edit = module(kind=Images), MemoryFormat()
    objects = list(user.parameters())
    run = trainer(callbacks=[edit], num_sanity_val_steps=1)
    images = data(tiny.ConvNet)
    run.fit(user, images, images)
    run.validate(user, images, verbose=False)
    run.test(user, images, verbose=False)
    run.predict(user, images)
    assert user.formats == dict.fromkeys(("train", "fit", "validate", "test", "predict"), True)
    assert not is_last(user.net.conv[0].weight)  # as it was
    assert is_last(run.optimizers[0].state[user.net.conv[0].weight]["exp_avg"])
    assert all(a is b for a, b in zip(objects, user.parameters(), strict=True))


def test_values_do_not_depend_on_the_format(trainer: Any) -> None:
    ours, plain = module(kind=Images), module(kind=Images)
    images = data(tiny.ConvNet)
    ours.optimizer = plain.optimizer = {"eps": 1.0}  # or Adam blows rounding up to full steps
    trainer(callbacks=[MemoryFormat()]).fit(ours, images)
    trainer().fit(plain, images)
    assert plain.formats == {"train": False}
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_nothing_of_ours_stays_on_the_module(trainer: Any) -> None:
    user = module(kind=Images)
    trainer(callbacks=[MemoryFormat()]).fit(user, data(tiny.ConvNet))
    assert not user.net._forward_pre_hooks
    assert not user.net._forward_pre_hooks_with_kwargs
    with pytest.raises(ZeroDivisionError):
        _broken_fit(trainer, user)
    assert not user.net._forward_pre_hooks


def _broken_fit(trainer: Any, user: LightningModule) -> None:
    class Broken(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            raise ZeroDivisionError

    trainer(callbacks=[MemoryFormat(), Broken()]).fit(user, data(tiny.ConvNet))


def test_a_loaded_state_keeps_the_format() -> None:
    net = tiny.ConvNet()
    channels_last(net)
    net.load_state_dict(tiny.ConvNet().state_dict())
    assert is_last(net.conv[0].weight)
    assert not channels_last(net)  # nothing left to do


@pytest.mark.slow
def test_the_format_survives_a_prune_and_its_checkpoint(trainer: Any, tmp_path: Path) -> None:
    images = data(tiny.ConvNet)
    saver = ModelCheckpoint(tmp_path, "a")
    edits = lambda: [StructuredPruning(ratio=0.5, when=1), MemoryFormat()]  # noqa: E731
    user = module(kind=Images)
    seen: list[bool] = []

    class Look(Callback):
        def on_validation_end(self, _: Any, user: Any) -> None:
            seen.append(is_last(user.net.conv[0].weight))

        def on_train_end(self, _: Any, user: Any) -> None:
            self.on_validation_end(_, user)

    trainer(callbacks=[*edits(), Look(), saver], enable_checkpointing=True).fit(user, images)
    assert user.net.conv[0].weight.shape[:2] == (4, 4)
    fresh = module(kind=Images)
    run = trainer(callbacks=[*edits(), Look()])
    run.validate(fresh, images, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert fresh.net.conv[0].weight.shape[:2] == (4, 4)
    assert seen == [True, True]
    assert fresh.formats == {"validate": True}


def test_a_reshaping_that_loses_the_format_is_followed(trainer: Any) -> None:
    user, edit = module(kind=Images), MemoryFormat()
    run = trainer()
    edit.setup(run, user, "fit")
    edit.on_model_edit_start(run, user)
    user.net.conv[0].weight.data = (
        user.net.conv[0].weight.data[:4].clone(memory_format=torch.contiguous_format)
    )
    edit.on_model_edit_end(run, user, edit.receipt)
    assert is_last(user.net.conv[0].weight)
    edit.teardown(run, user, "fit")
    assert not is_last(user.net.conv[0].weight)


def test_networks_built_late_are_converted_before_they_run(trainer: Any) -> None:
    class Late(Images):
        def __init__(self) -> None:
            super().__init__()
            del self.net

        def configure_model(self) -> None:
            if not hasattr(self, "net"):
                self.net = tiny.ConvNet()
                self.net.stem[0].register_forward_pre_hook(self._note)

    user = module(kind=Late)
    trainer(callbacks=[MemoryFormat()]).fit(user, data(tiny.ConvNet))
    assert user.formats == {"train": True}


def test_convolutions_of_the_lightning_module_itself_are_converted(trainer: Any) -> None:
    class Direct(Module):
        def __init__(self) -> None:
            super().__init__(nn.Flatten())
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            out = self.conv(batch[0])
            self.last = is_last(out)
            return F.cross_entropy(self.head(out.mean((2, 3))), batch[1])

    user = module(kind=Direct)
    trainer(callbacks=[MemoryFormat()]).fit(user, data(tiny.ConvNet))
    assert user.last


def test_keyword_and_nested_images_are_converted() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, batch: dict[str, Any], *, mask: Tensor) -> Any:
            self.got = [is_last(batch["image"]), is_last(mask), batch["ids"].is_contiguous()]
            return self.conv(batch["image"])

    from lightning_accel.precision.layout import convert_inputs

    outer = nn.ModuleDict({"net": Net()})
    convert_inputs(outer)
    ids = torch.ones(2, 3, 4, 4, dtype=torch.long)
    outer["net"]({"image": torch.randn(2, 3, 8, 8), "ids": ids}, mask=torch.rand(2, 3, 8, 8))
    assert outer["net"].got == [True, True, True]


@pytest.mark.parametrize("select", [None, "net.head", Select(types=("BatchNorm2d",))])
def test_no_convolution_is_an_error_not_a_silence(trainer: Any, select: Any) -> None:
    net = tiny.MLP() if select is None else tiny.ConvNet()
    with pytest.raises(NoEffect, match="convolution"):
        trainer(callbacks=[MemoryFormat(select)]).fit(module(net), data())


def test_a_selection_of_nothing_is_an_error(trainer: Any) -> None:
    with pytest.raises(NoEffect, match="nowhere"):
        trainer(callbacks=[MemoryFormat("nowhere")]).fit(module(tiny.ConvNet()), data())


def test_only_the_selection_is_converted() -> None:
    net = tiny.ConvNet()
    receipt = channels_last(net, select="conv.*")
    assert [change.name for change in receipt.changes] == ["conv.0.weight"]
    assert not is_last(net.stem[0].weight)


def test_a_converted_network_copies_and_pickles(trainer: Any) -> None:
    user = module(kind=Images)
    edit, run = MemoryFormat(), trainer()
    edit.setup(run, user, "fit")  # with its hooks
    user.net.stem[0]._forward_pre_hooks.clear()
    buffer = io.BytesIO()
    pickle.dump(user.net, buffer)
    buffer.seek(0)
    assert is_last(pickle.load(buffer).conv[0].weight)  # noqa: S301
    assert is_last(copy.deepcopy(user.net).conv[0].weight)
    edit.teardown(run, user, "fit")


@pytest.fixture(autouse=True)
def _no_leak_of_autocast() -> Iterator[None]:
    yield
    assert not torch.is_autocast_enabled("cpu")
    assert warnings.filters  # a context of `takes_effect` was left


@pytest.mark.parametrize(
    "plugin", [AutocastPrecision("bf16-mixed"), Bf16Precision(), XlaPrecision()], ids=repr
)
def test_a_plugin_among_the_callbacks_is_told_where_to_go(plugin: Any) -> None:
    with pytest.raises(AccelError, match=r"is no callback(?s:.*)`Trainer\(plugins=\["):
        Trainer(callbacks=[plugin], accelerator="cpu", logger=False)


class Short(LightningModule):
    """A module that makes its own weights short."""

    def __init__(self, kind: str, when: str) -> None:
        super().__init__()
        self.net, self.kind = tiny.MLP(), kind
        if when == "in init":
            getattr(self, kind)()
        else:
            setattr(self, when, lambda *_: getattr(self, kind)())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].to(self.net.head.weight.dtype) if self.kind == "half" else batch[0]
        return self.net(x).float().square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("when", ["in init", "on_fit_start", "on_train_batch_start"])
@pytest.mark.parametrize(("format", "kind"), [("32-true", "bfloat16"), ("16-mixed", "half")])
def test_a_module_with_its_own_short_weights_is_told_of_them(
    trainer_kwargs: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    when: str,
    format: str,
    kind: str,
) -> None:
    if format == "16-mixed":  # as on a GPU; torch's scaler works on a CPU as well
        policy = Policy(torch.float16, True, "asked for")
        monkeypatch.setattr(
            "lightning_accel.precision.plugins.autocast_precision.resolve", lambda *_: policy
        )
    data = DataLoader(TensorDataset(torch.randn(8, 8)), 4)
    plain = {**trainer_kwargs, "precision": {"32-true": "32-true", "16-mixed": "16-mixed"}[format]}
    words = "same dtype|FP16 gradients"
    if format == "32-true":
        with pytest.raises((RuntimeError, ValueError), match=words):
            Trainer(**plain).fit(Short(kind, when), data)
    ours = Trainer(**trainer_kwargs, plugins=[AutocastPrecision(format)])
    with pytest.raises(Unsupported, match=rf"net.body.0.weight.*({words}).*Bf16Precision"):
        ours.fit(Short(kind, when), data)
    fine = Trainer(**trainer_kwargs, plugins=[AutocastPrecision("bf16-mixed")])
    monkeypatch.undo()
    fine.fit(Short("bfloat16", when), data)  # as with Lightning's "bf16-mixed"
