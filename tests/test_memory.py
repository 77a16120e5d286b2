"""What is kept for backward: counted against formulas, made less, with gradients that stay what they were."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import math
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch._functorch.config as functorch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch._functorch import partitioners
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import AutocastPrecision, BlockCompile, StructuredPruning
from lightning_accel.compilation import compile_blocks
from lightning_accel.errors import AccelError, NoEffect, Unsupported
from lightning_accel.memory import (
    ActivationBudget,
    ActivationCheckpointing,
    activation_budget,
    checkpoint_activations,
    find_repeated,
    keep_activations,
    saved_bytes,
)
from lightning_accel.memory.checkpoint import _choose
from lightning_accel.memory.trial import compile_for_trial, compiled_names, largest_budget

pytestmark = [
    pytest.mark.usefixtures("clean_dynamo"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]


class Block(nn.Module):
    """Attention and an MLP, each with dropout."""

    def __init__(self, dim: int = 16, drop: float = 0.0, within: float = 0.0) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.drop, self.within = drop, within

    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        p = self.within if self.training else 0.0
        heads = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        x = x + F.dropout(self.out(heads.transpose(1, 2).flatten(2)), self.drop, self.training)
        h = F.dropout(F.gelu(self.up(self.norm2(x))), self.drop, self.training)
        return x + self.down(h) * (1 if scale is None else scale)


class Stack(nn.Module):
    def __init__(self, drop: float = 0.0, within: float = 0.0, dim: int = 16) -> None:
        super().__init__()
        self.stem = nn.Linear(8, dim)
        self.layers = nn.ModuleList(Block(dim, drop, within) for _ in range(3))
        self.head = nn.Linear(dim, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        scale = x.detach().mean() * 0 + 1
        for layer in self.layers:
            x = layer(x, scale=scale)
        return self.head(x.mean(1))


class Convs(nn.Module):
    """Two blocks with batch norm and running statistics."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[
            nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), norm(3), nn.ReLU()) for _ in range(2)
        ])  # fmt: skip
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


class Module(LightningModule):
    """The user's, untouched."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


class Manual(tiny.ByHand, Module):
    """Of the user's, by hand."""


Fit = Callable[..., Trainer]


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Fit:
    def run(model: LightningModule, *callbacks: Callback, **others: Any) -> Trainer:
        trainer = Trainer(**{**trainer_kwargs, "callbacks": list(callbacks), **others})
        torch.manual_seed(3)
        trainer.fit(model, data(), data())
        return trainer

    return run


def data(size: int = 16, batch: int = 4) -> DataLoader[Any]:
    x = torch.randn(size, 32, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, torch.arange(size) % 4), batch)


def module(net: nn.Module | None = None, kind: type[Module] = Module) -> Module:
    torch.manual_seed(0)
    return kind(Stack(drop=0.1) if net is None else net)


def gradients(
    net: nn.Module, x: Tensor, seed: int = 1, format: torch.dtype | None = None
) -> list[Tensor]:
    """Return loss and gradients of one step from a fixed random state."""
    net.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast("cpu", format or torch.bfloat16, enabled=format is not None):
        loss = net(x).float().square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def compiled(net: nn.Module, backend: str = "aot_eager") -> nn.Module:
    compile_blocks(net, backend=backend)
    return net


X = torch.randn(8, 16, 8, generator=torch.Generator().manual_seed(2))


# Counting


def test_saved_bytes_are_those_of_the_formula() -> None:
    net = nn.Sequential(nn.Linear(8, 32), nn.Sigmoid(), nn.Linear(32, 4))
    x = torch.randn(10, 8)
    expected = 4 * 10 * (8 + 32)  # inputs of both layers; the second is sigmoid's result as well
    assert saved_bytes(lambda: net(x)) == saved_bytes(lambda: net(x).sum()) == expected


def test_saved_bytes_leave_out_frozen_weights_with_the_model() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[1].weight.requires_grad_(False)
    x = torch.randn(2, 8)
    kept = 4 * (2 * 8 + 2 * 8)  # bias of the frozen layer learns still
    assert saved_bytes(lambda: net(x)) - saved_bytes(lambda: net(x), model=net) in (0, 4 * 64)
    assert saved_bytes(lambda: net(x), model=net) <= kept


def test_views_of_one_storage_count_once() -> None:
    x = torch.randn(4, 4)
    w = torch.ones(4, 4, requires_grad=True)
    assert saved_bytes(lambda: (x @ w) + (x.T @ w) + (x * w)) == 64


@pytest.mark.slow
def test_saved_bytes_are_the_same_each_time_and_freed() -> None:
    net = Stack()
    counts = {saved_bytes(lambda: net(X)) for _ in range(3)}
    assert len(counts) == 1
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o).__name__ == "SavedTensors"]


@pytest.mark.skipif(
    torch.__version__.startswith("2.10."), reason="torch 2.10 does not let them be counted"
)
def test_selective_results_count_although_autograd_does_not_keep_them() -> None:
    net = Stack()
    plain = saved_bytes(lambda: net(X))
    kept = {}
    for policy in ("full", "selective"):
        checkpointed = copy.deepcopy(net)
        checkpoint_activations(checkpointed, policy=policy)
        kept[policy] = saved_bytes(lambda n=checkpointed: n(X))
    # Per block: qkv, out, up and down with 3, 1, 4 and 1 times the width, attention with 1 and its sums.
    tokens = 8 * 16
    assert kept["selective"] - kept["full"] == 3 * 4 * tokens * ((3 + 1 + 4 + 1 + 1) * 16 + 2)
    assert kept["full"] < kept["selective"] < plain


# Budget


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_a_budget_outside_of_its_range_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="0 or more, 1 at most"), activation_budget(value):
        pass
    with pytest.raises(ValueError, match="0 or more, 1 at most"):
        ActivationBudget(value)


@pytest.mark.parametrize("value", [None, True, "half", [0.5]])
def test_a_budget_that_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="is a number"), activation_budget(value):
        pass
    with pytest.raises(TypeError, match="is a number"):
        ActivationBudget(value)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_of_nothing_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match="from 1 on"):
        ActivationBudget("auto", limit_bytes=limit)


@pytest.mark.parametrize("limit", [1.5, True, "1G", math.nan])
def test_a_limit_that_is_no_number_of_bytes_is_refused(limit: Any) -> None:
    with pytest.raises(TypeError, match="number of bytes"):
        ActivationBudget("auto", limit_bytes=limit)


def test_arguments_that_contradict_are_refused() -> None:
    with pytest.raises(ValueError, match="changes nothing"):
        ActivationBudget(1.0)
    with pytest.raises(ValueError, match="is for budget='auto'"):
        ActivationBudget(0.5, limit_bytes=100)


def test_the_setting_is_put_back_exactly_also_when_nested_or_broken() -> None:
    choose = partitioners.choose_saved_values_set

    def breaks() -> None:
        with activation_budget(0.5):
            assert functorch.activation_memory_budget == pytest.approx(0.5)
            with activation_budget(0.2):
                assert functorch.activation_memory_budget == pytest.approx(0.2)
            assert partitioners.choose_saved_values_set is not choose
            raise KeyError

    with functorch.patch(activation_memory_budget=0.7):
        with pytest.raises(KeyError):
            breaks()
        assert functorch.activation_memory_budget == 0.7
    assert functorch.activation_memory_budget == 1.0
    assert partitioners.choose_saved_values_set is choose


def test_a_torch_with_another_partitioner_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(partitioners, "choose_saved_values_set")
    with pytest.raises(Unsupported, match="cannot be set safely"), activation_budget(0.5):
        pass


@pytest.mark.slow
def test_kept_bytes_fall_with_the_budget() -> None:
    net, kept = Stack(dim=32), {}
    for value in (1.0, 0.7, 0.5, 0.0):
        torch._dynamo.reset()
        one = compiled(copy.deepcopy(net))
        with activation_budget(value):
            kept[value] = saved_bytes(lambda n=one: n(X))
    assert kept[1.0] > kept[0.7] >= kept[0.5] > kept[0.0]
    assert kept[0.5] < 0.65 * kept[1.0]
    assert kept[0.0] < 0.25 * kept[1.0]


SLOW = [
    (0.7, None),
    (0.3, None),
    (0.7, torch.bfloat16),
    (0.3, torch.bfloat16),
    (0.0, torch.bfloat16),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "format"),
    [
        (0.5, None),
        (0.0, None),
        (0.5, torch.bfloat16),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
    ],
)
def test_gradients_stay_with_dropout_at_each_budget(
    value: float, format: torch.dtype | None
) -> None:
    """Torch alone draws another mask in backward: PyTorch #190758."""
    net = Stack(drop=0.5)
    torch._dynamo.reset()
    with activation_budget(1.0):
        expected = gradients(compiled(copy.deepcopy(net)), X, format=format)
    if format is None:
        assert equal(expected, gradients(net, X))
    torch._dynamo.reset()
    with activation_budget(value):
        found = gradients(compiled(copy.deepcopy(net)), X, format=format)
    assert equal(found, expected)


def test_without_our_repair_gradients_would_be_wrong() -> None:
    """When this fails, torch is repaired, and `_random_kept` can go with the oldest torch that is not."""
    net = Stack(drop=0.5)
    expected = gradients(net, X)
    with functorch.patch(activation_memory_budget=0.5):
        found = gradients(compiled(copy.deepcopy(net)), X)
    assert torch.equal(found[0], expected[0])
    assert not equal(found[1:], expected[1:])


@pytest.mark.slow
@pytest.mark.parametrize("value", [0.5, 0.0])
def test_inductor_recomputes_with_the_dropout_of_the_forward(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    net = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, 4))
    x = torch.randn(16, 8)
    run = torch.compile(net)
    with activation_budget(value):
        found = gradients(run, x)
    # A step along the gradient must change the loss by what the gradient says, with the same masks.
    shift = [torch.randn_like(p) for p in net.parameters()]
    losses = []
    for sign in (1, -1):
        moved = copy.deepcopy(net)
        with torch.no_grad():
            for p, d in zip(net.parameters(), shift, strict=True):
                p.add_(sign * 1e-3 * d)
        torch.manual_seed(1)
        losses.append(run(x).square().mean().item())
        net.load_state_dict(moved.state_dict())
    slope = (losses[0] - losses[1]) / 2e-3
    said = sum(float((g * d).sum()) for g, d in zip(found[1:], shift, strict=True))
    assert said == pytest.approx(slope, rel=2e-2)


# The trial


@pytest.mark.slow
def test_a_trial_counts_what_the_compiled_code_keeps_and_leaves_the_original_alone() -> None:
    net = compiled(Stack(dim=32))
    for value in (1.0, 0.5):
        trial = copy.deepcopy(net)
        compile_for_trial(trial, compiled_names(net))
        with activation_budget(value):
            counted = saved_bytes(lambda n=trial: n(X), model=trial)
        torch._dynamo.reset()
        with activation_budget(value):  # decompositions differ a little from inductor's
            assert counted == pytest.approx(saved_bytes(lambda: net(X), model=net), rel=0.15)


@pytest.mark.slow
def test_a_trial_shares_no_graph_with_a_module_compiled_by_torch() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.compile(Block(), backend="aot_eager")

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    net, x = Holder(), torch.randn(2, 6, 16)
    counts = {}
    for value in (0.0, 1.0):
        trial = copy.deepcopy(net)
        assert compiled_names(net) == ["body"]
        compile_for_trial(trial, ["body"])
        with activation_budget(value):
            counts[value] = saved_bytes(lambda n=trial: n(x), model=trial)
    assert counts[0.0] < 0.3 * counts[1.0]
    assert saved_bytes(lambda: net(x), model=net) == counts[1.0]


@pytest.mark.parametrize("limit", range(5, 105, 7))
def test_the_largest_budget_is_that_of_brute_force(limit: int) -> None:
    def kept(budget: float) -> float:
        asked.append(budget)
        return math.inf if budget > 0.9 else 5 + 70 * budget**2

    asked: list[float] = []
    found = largest_budget(kept, limit)
    few = len(asked)
    assert found == max(b / 20 for b in range(21) if kept(b / 20) <= limit)
    assert few <= 7


def test_no_budget_that_fits_is_an_error() -> None:
    with pytest.raises(AccelError, match="no activation budget fits"):
        largest_budget(lambda budget: 10 + budget, 9)


# ActivationBudget


@pytest.mark.slow
def test_a_fit_keeps_less_says_so_and_puts_the_setting_back(fit: Fit) -> None:
    budget = ActivationBudget(0.5)
    choose = partitioners.choose_saved_values_set
    fit(module(Stack()), budget, BlockCompile(backend="aot_eager"))
    assert budget.savings is not None
    assert budget.savings.budget == 0.5
    assert budget.savings.ratio is not None and 0.2 < budget.savings.ratio < 0.75, budget.savings
    assert functorch.activation_memory_budget == 1.0
    assert partitioners.choose_saved_values_set is choose


@pytest.mark.slow
def test_the_fit_learns_bit_for_bit_what_it_learns_without(fit: Fit) -> None:
    plain, model = module(), module()
    fit(plain, BlockCompile(backend="aot_eager"))
    torch._dynamo.reset()
    state = torch.get_rng_state()
    fit(model, ActivationBudget(0.3), BlockCompile(backend="aot_eager"))
    assert equal(list(plain.parameters()), list(model.parameters()))
    assert "training_step" not in vars(model)
    torch.set_rng_state(state)


@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_budget_without_effect_is_an_error(fit: Fit, backend: str | None) -> None:
    others = [] if backend is None else [BlockCompile(backend=backend)]
    budget = ActivationBudget(0.5)
    words = "compiled code alone" if backend is None else "saved nothing"
    with pytest.raises(NoEffect, match=words):
        fit(module(), budget, *others)
    assert functorch.activation_memory_budget == 1.0
    assert not budget._stacks


@pytest.mark.slow
def test_a_module_compiled_before_the_fit_compiles_anew(fit: Fit) -> None:
    model = module(Stack())
    fit(model, BlockCompile(backend="aot_eager"))
    for value in (0.5, 0.0, 0.0):
        budget = ActivationBudget(value)
        fit(model, budget, BlockCompile(backend="aot_eager"))
        assert budget.savings is not None and budget.savings.ratio is not None
        assert budget.savings.ratio < (0.7 if value else 0.35)


@pytest.mark.slow
def test_a_user_s_own_compiled_module_has_a_budget(fit: Fit) -> None:
    budget = ActivationBudget(0.5)
    fit(module(torch.compile(Stack(), backend="aot_eager")), budget)  # type: ignore[arg-type]
    assert budget.savings is not None and budget.savings.ratio is not None
    assert budget.savings.ratio < 0.75


@pytest.mark.slow
def test_the_largest_budget_that_fits_is_found(fit: Fit) -> None:
    def auto(limit: int) -> ActivationBudget:
        torch._dynamo.reset()
        found = ActivationBudget("auto", limit_bytes=limit)
        fit(module(Stack()), found, BlockCompile(backend="aot_eager_decomp_partition"))
        return found

    whole = auto(10**9).savings
    assert whole is not None and whole.budget == 1.0 and whole.plain_bytes is not None
    half = auto(whole.plain_bytes // 2).savings
    assert half is not None and 0.2 < half.budget < 0.7
    assert half.kept_bytes <= 0.55 * whole.plain_bytes  # of a trial that is inductor's
    with pytest.raises(AccelError, match="no activation budget fits"):
        auto(whole.plain_bytes // 50)
    assert functorch.activation_memory_budget == 1.0


def test_auto_asks_for_a_limit_where_memory_cannot_be_read(fit: Fit) -> None:
    with pytest.raises(Unsupported, match="limit_bytes"):
        fit(module(), ActivationBudget("auto"), BlockCompile(backend="aot_eager"))


@pytest.mark.slow
def test_the_budget_holds_after_a_prune() -> None:
    class Watch(Callback):
        def __init__(self) -> None:
            self.kept: list[int] = []

        def on_train_batch_end(self, *_: Any) -> None:
            assert budget.savings is not None
            self.kept.append(budget.savings.kept_bytes)

    budget, watch = ActivationBudget(0.3), Watch()
    net = tiny.ConvNet()
    model = module(net)
    images = TensorDataset(torch.randn(16, 3, 8, 8), torch.arange(16) % 4)
    prune = StructuredPruning(ratio=0.5, when=[1])
    run = Trainer(
        accelerator="cpu", devices=1, max_epochs=3, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[prune, BlockCompile(backend="aot_eager"), budget, watch],
    )  # fmt: skip
    run.fit(model, DataLoader(images, 4))
    assert net.stem[0].out_channels == 4  # type: ignore[union-attr]
    assert watch.kept[0] > watch.kept[-1]
    torch._dynamo.reset()
    plain = copy.deepcopy(net).train()
    full = saved_bytes(lambda: compiled(plain)(images.tensors[0][:4]), model=plain)
    assert watch.kept[-1] < full


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Module, Manual])
def test_a_budget_goes_with_amp_clipping_accumulation_and_manual_optimization(
    fit: Fit, kind: type[Module]
) -> None:
    others = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2} if kind is Module else {}
    budget = ActivationBudget(0.5)
    fit(
        module(kind=kind),
        budget,
        BlockCompile(backend="aot_eager"),
        EMAWeightAveraging(decay=0.9),
        plugins=[AutocastPrecision("bf16-mixed")],
        **others,
    )
    assert budget.savings is not None and budget.savings.kept_bytes > 0
    assert functorch.activation_memory_budget == 1.0


# Checkpointing


@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize("format", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("within", [0.0, 0.3])
def test_gradients_are_equal_to_the_last_bit(
    policy: str, format: torch.dtype | None, within: float
) -> None:
    net = Stack(drop=0.3, within=within)
    expected = gradients(net, X, format=format)
    after = torch.get_rng_state()
    checkpointed = copy.deepcopy(net)
    checkpoint_activations(checkpointed, policy=policy)
    assert equal(gradients(checkpointed, X, format=format), expected)
    assert torch.equal(torch.get_rng_state(), after)
    assert saved_bytes(lambda: checkpointed(X)) < 0.75 * saved_bytes(lambda: net(X))


@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d, lambda n: nn.InstanceNorm2d(n, track_running_stats=True)]
)
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_running_statistics_change_once_per_step(
    policy: str, norm: Any, backend: str | None
) -> None:
    net, x = Convs(norm), torch.randn(4, 3, 8, 8)
    checkpointed = copy.deepcopy(net)
    checkpoint_activations(checkpointed, select="blocks.*", policy=policy)
    if backend:
        compile_blocks(checkpointed, blocks=False, backend=backend)
    for _ in range(2):
        expected, found = gradients(net, x), gradients(checkpointed, x)
        if backend is None:
            assert equal(found, expected)
        else:
            torch.testing.assert_close(found, expected)
    for (name, one), other in zip(net.named_buffers(), checkpointed.buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    assert all(
        m.track_running_stats and m.momentum == 0.1
        for m in checkpointed.modules()
        if isinstance(m, nn.modules.batchnorm._NormBase)
    )


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_checkpointing_compiles_with_the_gradients_of_eager(policy: str) -> None:
    net = Stack(drop=0.3)
    expected = gradients(net, X)
    checkpointed = copy.deepcopy(net)
    checkpoint_activations(checkpointed, policy=policy)
    assert compile_blocks(checkpointed, backend="aot_eager", fullgraph=True)
    assert equal(gradients(checkpointed, X), expected)
    assert saved_bytes(lambda: checkpointed(X)) < 0.85 * saved_bytes(lambda: net(X))


def test_attention_that_draws_its_dropout_is_recomputed_and_all_other_is_kept() -> None:
    """On CPU no fused kernel drops out, so that only the choice itself can be asked."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention.default
    context = SelectiveCheckpointContext(is_recompute=False)
    kept = {
        "without": _choose(context, attention, X, X, X),
        "with": _choose(context, attention, X, X, X, 0.1),
        "by keyword": _choose(context, attention, X, X, X, dropout_p=0.1),
        "product": _choose(context, torch.ops.aten.addmm.default, X, X, X),
        "cheap": _choose(context, torch.ops.aten.gelu.default, X),
    }
    saved, again = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
    assert list(kept.values()) == [saved, again, again, saved, again]


def test_names_class_signature_and_evaluation_stay() -> None:
    net = Stack()
    names, shown = list(net.state_dict()), inspect.signature(net.layers[0].forward)
    plain, kept = net.eval()(X), saved_bytes(lambda: net(X))
    checkpoint_activations(net)
    assert list(net.state_dict()) == names
    assert type(net.layers[0]) is Block
    assert inspect.signature(net.layers[0].forward) == shown
    assert torch.equal(net(X), plain)
    assert saved_bytes(lambda: net(X)) == kept  # evaluation recomputes nothing
    net.train()
    with torch.no_grad():
        assert torch.equal(net(X), plain)


def test_copies_recompute_and_pickles_hold_the_user_s_own() -> None:
    net = Stack()
    plain, expected = saved_bytes(lambda: net(X)), gradients(net, X)
    checkpoint_activations(net)
    less = saved_bytes(lambda: net(X))
    copied = copy.deepcopy(net)
    assert saved_bytes(lambda: copied(X)) == less < plain
    with torch.no_grad():
        next(copied.parameters()).mul_(2.0)
    assert equal(gradients(net, X), expected)
    assert not equal(gradients(copied, X), expected)
    buffer = io.BytesIO()
    pickle.dump(net, buffer)
    assert b"lightning_accel" not in buffer.getvalue()
    buffer.seek(0)
    loaded = pickle.load(buffer)  # noqa: S301
    assert saved_bytes(lambda: loaded(X)) == plain
    assert equal(gradients(loaded, X), expected)


def test_undoing_gives_back_what_was_there_an_instance_s_own_forward_as_well() -> None:
    net = Stack()
    own = net.layers[1].forward
    vars(net.layers[1])["forward"] = own
    expected = gradients(net, X)
    assert len(checkpoint_activations(net).changes) == 3
    assert not checkpoint_activations(net)
    assert equal(gradients(net, X), expected)
    assert len(keep_activations(net).changes) == 3
    assert not keep_activations(net)
    assert "forward" not in vars(net.layers[0]) and vars(net.layers[1])["forward"] is own


def test_repeated_blocks_are_found_by_class() -> None:
    assert list(find_repeated(Stack())) == ["layers.0", "layers.1", "layers.2"]
    assert list(find_repeated(module())) == ["net.layers.0", "net.layers.1", "net.layers.2"]
    assert list(find_repeated(tiny.ConvNet())) == ["stem", "conv", "down"]
    assert not find_repeated(tiny.MLP())


def test_a_selection_takes_the_outermost_modules_with_a_forward() -> None:
    net = Stack()
    receipt = checkpoint_activations(net, select=["layers.1", "layers.2.*", "stem"])
    names = [change.name for change in receipt.changes]
    assert names == ["stem", "layers.1", *[f"layers.2.{n}" for n in ("norm", "norm2", "qkv", "out", "up", "down")]]  # fmt: skip


def test_nothing_to_checkpoint_is_an_error() -> None:
    with pytest.raises(NoEffect, match="that repeats"):
        checkpoint_activations(tiny.MLP())
    with pytest.raises(NoEffect, match="nowhere"):
        checkpoint_activations(Stack(), select="nowhere.*")
    with pytest.raises(ValueError, match="unknown `policy`"):
        checkpoint_activations(Stack(), policy="some")
    with pytest.raises(TypeError, match="`policy` is a name"):
        ActivationCheckpointing(policy=None)  # type: ignore[arg-type]


def test_a_kept_result_that_is_changed_in_place_raises_in_backward() -> None:
    net = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)) for _ in range(2)])
    checkpoint_activations(net, policy="selective")
    with pytest.raises(RuntimeError, match="mutated"):
        net(torch.randn(2, 4)).sum().backward()


# ActivationCheckpointing


@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize("kind", [Module, Manual])
def test_a_fit_learns_bit_for_bit_the_same_and_leaves_no_trace(
    fit: Fit, policy: str, kind: type[Module]
) -> None:
    plain, model = module(kind=kind), module(kind=kind)
    fit(plain)
    fit(model, ActivationCheckpointing(policy=policy))
    assert equal(list(plain.parameters()), list(model.parameters()))
    assert not keep_activations(model)


class Keeper(nn.Module):
    """A block of which each forward does something besides: `act`."""

    act: Callable[[Any, Tensor], Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        self.own, self.numpy = torch.Generator().manual_seed(3), np.random.default_rng(3)
        self.calls, self.load, self.kept = {"n": 0}, torch.zeros(8), []  # type: ignore[var-annotated]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.act(x))))


def counts(block: Any, x: Tensor) -> Tensor:
    block.calls["n"] += 1
    block.load = block.load + torch.bincount(x.argmax(-1).flatten(), minlength=8)
    block.aux = block.up(x).softmax(-1).mean((0, 1)).square().sum()
    block.kept.append(block.aux)
    return x


ACTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "python": lambda block, x: x * (1 + random.random()),
    "numpy": lambda block, x: x * float(np.random.rand()),
    "a generator of torch": lambda block, x: x + torch.randn(x.shape, generator=block.own),
    "a generator of numpy": lambda block, x: x * block.numpy.random(),
    "a path by chance": lambda block, x: x if random.random() < 0.5 else torch.relu(block.down(x)),
    "counts and losses": counts,
}


def keepers(act: Callable[[Any, Tensor], Tensor]) -> nn.Sequential:
    kind = type("Keeper", (Keeper,), {"act": act})
    return nn.Sequential(*[kind() for _ in range(3)])


class Balanced(Module):
    """Adds what its blocks kept to the loss, and balances them by what they counted."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]).mean(1), batch[1])
        for block in self.net.children():
            loss = loss + sum(block.kept) + getattr(block, "aux", 0.0)
            block.kept.clear()
        return loss + random.random()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])

    def on_train_batch_end(self, *_: Any) -> None:
        for block in self.net.children():
            block.up.bias.data -= 0.01 * (block.load - block.load.mean()).sign() * block.calls["n"]


@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize("name", ACTS)
def test_what_a_block_draws_counts_and_keeps_is_that_of_one_forward(
    fit: Fit, name: str, policy: str
) -> None:
    learned, left = [], []
    for extra in ([], [ActivationCheckpointing(policy=policy)]):
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)
        model = module(keepers(ACTS[name]), Balanced)
        fit(model, *extra)
        learned.append(list(model.parameters()))
        left.append((random.random(), np.random.rand(), [b.calls for b in model.net]))
    assert equal(*learned)
    assert left[0] == left[1]


def test_a_block_whose_result_hangs_on_how_often_it_was_called_is_refused(fit: Fit) -> None:
    calls = iter(range(1000))
    model = module(keepers(lambda block, x: x * (1 + next(calls) % 5)), Balanced)
    with pytest.raises(Unsupported, match="recomputes something else than it computed"):
        fit(model, ActivationCheckpointing())


@pytest.mark.slow
def test_a_fit_with_all_beside_is_that_without_checkpointing(fit: Fit) -> None:
    models = []
    for extra in ([], [ActivationCheckpointing()]):
        torch._dynamo.reset()
        models.append(module())
        fit(
            models[-1],
            *extra,
            BlockCompile(backend="aot_eager"),
            EMAWeightAveraging(decay=0.9),
            plugins=[AutocastPrecision("bf16-mixed")],
            gradient_clip_val=0.5,
            accumulate_grad_batches=2,
        )
    torch.testing.assert_close(*[list(m.parameters()) for m in models], rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_checkpointing_goes_with_a_prune(trainer_kwargs: dict[str, Any]) -> None:
    images = TensorDataset(torch.randn(16, 3, 8, 8), torch.arange(16) % 4)
    nets = []
    for extra in ([], [ActivationCheckpointing()]):
        torch.manual_seed(0)
        nets.append(Module(tiny.ConvNet()))
        prune = StructuredPruning(ratio=0.5, when=[1])
        kwargs = {**trainer_kwargs, "max_epochs": 3, "callbacks": [prune, *extra]}
        Trainer(**kwargs).fit(nets[-1], DataLoader(images, 4))
    assert nets[1].net.stem[0].out_channels == 4
    assert equal(list(nets[0].parameters()), list(nets[1].parameters()))


def test_what_the_user_checkpointed_stays_after_the_fit(fit: Fit) -> None:
    model = module()
    checkpoint_activations(model, select="net.layers.0")
    fit(model, ActivationCheckpointing(select="net.layers.*"))
    assert [c.name for c in keep_activations(model).changes] == ["net.layers.0"]


def test_blocks_that_nobody_calls_are_an_error_and_are_put_back(fit: Fit) -> None:
    model = module()
    model.spare = Block()
    with pytest.raises(NoEffect, match=r"spare.*did not call it"):
        fit(model, ActivationCheckpointing(select="spare"))
    assert not keep_activations(model)


def test_a_callback_that_matches_nothing_is_an_error(fit: Fit) -> None:
    with pytest.raises(NoEffect, match="nowhere"):
        fit(module(), ActivationCheckpointing(select="nowhere.*"))


@pytest.mark.slow
def test_it_comes_before_compiling_whatever_the_order(fit: Fit) -> None:
    edits = BlockCompile(backend="eager"), ActivationCheckpointing()
    trainer = fit(module(), *edits)
    held = [c for c in trainer.callbacks if c in edits]
    assert held == [edits[1], edits[0]] and edits[1].receipt
