"""Reports of effects that outlived their run, came at the wrong time, or met others on the way."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, LearningRateFinder, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import (
    ActivationCheckpointing,
    AttentionBackend,
    AutocastPrecision,
    BlockCompile,
    FastLoading,
    FusedOptimizer,
    LeanLoop,
    MatmulPrecision,
    MemoryFormat,
    SparsityTraining,
    StructuredPruning,
    UsePrecision,
    WeightMasks,
)
from lightning_accel.errors import NoEffect

MAKES: dict[str, Callable[[], Callback]] = {
    "memory format": MemoryFormat,
    "optimizer": lambda: FusedOptimizer("for-loop"),
    "checkpointing": lambda: ActivationCheckpointing("backbone"),
    "compile": lambda: BlockCompile(backend="eager"),
    "lean": LeanLoop,
    "matmul": lambda: MatmulPrecision("highest"),
}
each = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


class Model(LightningModule):
    """Of a user's: a backbone, a head, and a branch that nothing calls."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.lr = lr
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.head = nn.Linear(4, 2)
        self.unused = nn.Sequential(nn.Conv2d(3, 4, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        features = self.backbone(batch[0]).mean((2, 3))
        return F.cross_entropy(self.head(features), batch[1])

    def configure_optimizers(self) -> Any:
        learns = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(learns, self.lr, momentum=0.9)


def data() -> DataLoader[Any]:
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(16, 3, 6, 6), torch.arange(16) % 2), 4)


def run(*callbacks: Callback, **given: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "callbacks": list(callbacks),
    }  # fmt: skip
    return Trainer(**{**settings, **given})


def hooks(module: nn.Module) -> list[str]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [f"{n}.{k}" for n, m in module.named_modules() for k in kinds if vars(m)[k]]


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


@each
def test_one_trainer_and_one_callback_serve_another_model_afterwards(make: Any) -> None:
    """Lightning#4385 and #5903: what belonged to the first model was still there for the second."""
    first, second, alone = Model(), Model(0.02), Model(0.02)
    trainer = run(make())
    trainer.fit(first, data())
    assert not hooks(first) and "forward" not in vars(first.backbone)
    before = weights(first)
    trainer.fit_loop.epoch_progress.reset()
    trainer.fit_loop.epoch_loop.reset()
    trainer = run(*trainer.callbacks)  # type: ignore[attr-defined]
    trainer.fit(second, data())
    run(make()).fit(alone, data())
    assert all(map(torch.equal, weights(second), weights(alone)))
    assert all(map(torch.equal, weights(first), before)) and not hooks(second)


def test_hooks_on_what_is_never_called_go_as_well() -> None:
    """Lightning#2298: a hook that removed itself when it was called stayed on layers without calls."""
    model = Model()
    run(MemoryFormat()).fit(model, data())
    assert not hooks(model)
    assert model.unused[0].weight.is_contiguous()


def test_an_optimizer_that_views_weights_fails_aloud_and_afterwards_views_them(
    recwarn: pytest.WarningsRecorder,
) -> None:
    """AdamP#17 and timm#1171: `view` does not take weights that are channels last."""

    class Views(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            found = super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    p.view(len(p), -1)
            return found

    class Uses(Model):
        def configure_optimizers(self) -> Any:
            return Views(self.parameters(), 0.1)

    model = Uses()
    with pytest.raises(RuntimeError, match="view"):
        run(MemoryFormat()).fit(model, data())
    run().fit(model, data())  # as it could before
    assert model.backbone[0].weight.is_contiguous()


def test_both_forms_of_the_matmul_setting_are_put_back() -> None:
    """pytorch#197369 and ao#4643: one of two representations was restored, and torch then refused to read."""
    flags = torch.backends.cuda.matmul
    before = flags.allow_tf32
    try:
        for value in (True, False):
            flags.allow_tf32 = value
            seen = (flags.allow_tf32, flags.fp32_precision, torch.get_float32_matmul_precision())
            run(MatmulPrecision("medium")).fit(Model(), data())
            now = (flags.allow_tf32, flags.fp32_precision, torch.get_float32_matmul_precision())
            assert now == seen
    finally:
        flags.allow_tf32 = before


def test_what_a_model_sets_meanwhile_stays_its_own() -> None:
    """fairchem#2108: models that set the precision of the process, beside those who set it for a while."""

    class Sets(Model):
        def on_fit_start(self) -> None:
            torch.set_float32_matmul_precision("high")

    before = torch.get_float32_matmul_precision()
    try:
        run(MatmulPrecision("medium")).fit(Sets(), data())
        assert torch.get_float32_matmul_precision() == "high"  # as after a plain fit
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_a_model_switches_off_meanwhile_stays_off() -> None:
    """The same kind, of the kernels of attention."""

    class Sets(Model):
        def on_fit_start(self) -> None:
            torch.backends.cuda.enable_mem_efficient_sdp(True)
            torch.backends.cuda.enable_math_sdp(False)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            torch.backends.cuda.enable_math_sdp(True)
            q = batch[0].flatten(2)
            F.scaled_dot_product_attention(q, q, q)
            torch.backends.cuda.enable_math_sdp(False)
            return super().training_step(batch, batch_idx)

    try:
        run(AttentionBackend("math")).fit(Sets(), data())
        assert not torch.backends.cuda.math_sdp_enabled()  # as after a plain fit
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()  # ours, put back
    finally:
        torch.backends.cuda.enable_math_sdp(True)


def finetuned(*callbacks: Callback, **given: Any) -> tuple[Model, Trainer]:
    model, tuning = Model(), BackboneFinetuning(1, lambda epoch: 1.0, backbone_initial_lr=0.01)
    trainer = run(tuning, *callbacks, max_epochs=4, **given)
    trainer.fit(model, data())
    return model, trainer


@each
def test_groups_that_join_in_mid_training_learn_as_without(make: Any) -> None:
    """Lightning#21901, #8502, #6891: `BaseFinetuning` thaws a backbone and adds a group of parameters."""
    plain, of_plain = finetuned()
    ours, of_ours = finetuned(make())
    for a, b in zip(weights(ours), weights(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    strip = [
        [{k: v for k, v in g.items() if k != "params"} for g in t.optimizers[0].param_groups]
        for t in (of_ours, of_plain)
    ]
    assert strip[0] == strip[1] and len(strip[0]) == 2


@each
def test_a_search_for_a_learning_rate_finds_what_it_finds_without(make: Any, tmp_path: Any) -> None:
    """Lightning#17040: the finder trains before the model's own `on_fit_start`."""
    found = []
    for callbacks in ([], [make()]):
        model = Model()
        finder = LearningRateFinder(num_training_steps=40, update_attr=True, attr_name="lr")
        torch.manual_seed(1)
        run(finder, *callbacks, default_root_dir=tmp_path).fit(model, data())
        found.append((model.lr, weights(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_order_of_the_user_s_own_callbacks_stays() -> None:
    """Lightning#10260: sparsity has to be merged before quantization, whoever sorts callbacks."""
    said: list[str] = []

    class Says(Callback):
        def __init__(self, name: str) -> None:
            self.word = name

        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            said.append(self.word)

    mine = [Says("a"), Says("b"), Says("c")]
    compiled, last = BlockCompile(backend="eager"), MemoryFormat()
    run(mine[0], compiled, mine[1], last, mine[2]).fit(Model(), data())
    assert said == ["a", "b", "c"]


@each
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_fit_enters_before_the_state_comes_back(make: Any, tmp_path: Any) -> None:
    """Lightning#19594 and #6891: an interrupted fit is resumed by a fresh Trainer and a fresh callback."""

    class Stops(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 2:
                raise KeyError("power cut")

    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, save_last=True)

    whole = Model()
    run(make(), max_epochs=4).fit(whole, data())
    half = Model()
    with pytest.raises(KeyError):
        run(make(), saver(), Stops(), max_epochs=4, enable_checkpointing=True).fit(half, data())
    assert not hooks(half) and half.backbone[0].weight.is_contiguous()
    again = Model()
    trainer = run(make(), saver(), max_epochs=4, enable_checkpointing=True)
    trainer.fit(again, data(), ckpt_path=tmp_path / "last.ckpt")
    assert all(map(torch.equal, weights(again), weights(whole)))


# --- what an adversary with the pages alone found ---------------------------------------------------


def test_vectors_of_a_spectral_norm_stay_where_they_are() -> None:
    """A look at the weight of a parametrized layer in training moves its power iteration."""

    class Normed(Model):
        def __init__(self) -> None:
            super().__init__()
            nn.utils.parametrizations.spectral_norm(self.backbone[0])

    seen: dict[str, Tensor] = {}

    class Looks(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            held: Any = pl_module
            seen[word] = held.backbone[0].parametrizations.weight[0]._u.clone()

    for word, callbacks in (  # noqa: B007
        ("plain", []),
        ("ours", [MemoryFormat("unused.*")]),
        ("all", [MemoryFormat()]),
    ):
        run(*callbacks, Looks()).fit(Normed(), data())
    assert torch.equal(seen["plain"], seen["ours"]) and torch.equal(seen["plain"], seen["all"])


def test_one_loading_callback_in_two_trainers_at_once_leaves_neither_patched() -> None:
    loading = FastLoading(resident=True)

    class Within(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 0 and trainer.current_epoch == 0:
                inner = run(loading, max_epochs=1)
                inner.fit(Model(), data())
                assert "process_dataloader" not in vars(inner.strategy)

    outer = run(loading, Within())
    outer.fit(Model(), data())
    assert "process_dataloader" not in vars(outer.strategy)


class Deep(Model):
    """With something to prune, and to be slim in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.backbone = nn.Sequential(*layers)


COPIED: dict[str, Callable[[], Callback]] = {
    **MAKES,
    "attention": lambda: AttentionBackend("math"),
    "in one kernel": FusedOptimizer,
    "loading": lambda: FastLoading(resident=True),
    "masks": lambda: WeightMasks(0.5),
    "sparsity": lambda: SparsityTraining("slimming"),
    "prune": lambda: StructuredPruning(ratio=0.5, when=1),
    "precision": lambda: UsePrecision(AutocastPrecision("bf16-mixed")),
}


@pytest.mark.filterwarnings("ignore:AttentionBackend has nothing to choose")
@pytest.mark.parametrize("how", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])  # noqa: S301
@pytest.mark.parametrize("make", COPIED.values(), ids=COPIED)
def test_a_copy_made_before_during_or_after_a_fit_is_a_fresh_callback(make: Any, how: Any) -> None:
    """Lightning#9155, #8472: callbacks travel to spawned processes and into copies of a Trainer."""
    ours, copies = make(), []

    class Copies(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                copies.append(how(ours))

    copies.append(how(ours))
    run(ours, Copies()).fit(Deep(), data())
    copies.append(how(ours))
    found = []
    for one in (make(), *copies):
        model = Deep()
        run(one).fit(model, data())
        found.append(weights(model))
    for each_copy in found[1:]:
        assert all(map(torch.equal, each_copy, found[0]))


def test_layers_that_the_module_makes_in_its_own_setup_are_changed() -> None:
    class Late(Model):
        def __init__(self) -> None:
            super().__init__()
            del self.backbone, self.unused

        def setup(self, stage: str) -> None:
            torch.manual_seed(5)
            self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            formats.append(self.backbone[0].weight.is_contiguous())
            return super().training_step(batch, batch_idx)

    for callback in (MemoryFormat(), ActivationCheckpointing("backbone")):
        formats: list[bool] = []
        run(callback).fit(Late(), data())
        assert callback.receipt.changes
        assert set(formats) == {not isinstance(callback, MemoryFormat)}


def test_a_block_in_evaluation_is_told_as_that() -> None:
    class Rests(Model):
        def on_train_start(self) -> None:
            self.backbone.eval()

    with pytest.raises(NoEffect, match="evaluation mode"):
        run(ActivationCheckpointing("backbone")).fit(Rests(), data())


@pytest.mark.parametrize("first", [True, False])
def test_a_prune_sees_the_same_batches_whoever_makes_them(first: bool) -> None:
    prune = lambda: StructuredPruning(ratio=0.5, when=1)  # noqa: E731
    loading = FastLoading(resident=True)
    found = []
    for callbacks in ([prune()], [loading, prune()] if first else [prune(), loading]):
        model = Deep()
        torch.manual_seed(1)
        run(*callbacks, max_epochs=3).fit(model, data())
        found.append(weights(model))
    assert all(map(torch.equal, *found))
