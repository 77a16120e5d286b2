"""Techniques on a GPU do what they do on the CPU, and nothing waits for the device that need not.

`ACCEL_GPU_TESTS_ON=cpu pytest tests/gpu` runs on the CPU what does not speak of CUDA; the rest needs a GPU.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from lightning_accel import (
    AccelReport,
    ActivationCheckpointing,
    AutocastPrecision,
    BlockCompile,
    Distillation,
    FastLoading,
    Float8Linear,
    FSDP2Strategy,
    FusedOptimizer,
    LeanLoop,
    MemoryFormat,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    SparsityTraining,
    StructuredPruning,
    Teacher,
    WeightMasks,
)
from lightning_accel.attention.backend import attention_backend

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
    pytest.mark.filterwarnings("ignore:the teacher is hardly better"),
    pytest.mark.filterwarnings("ignore:StructuredPruning cuts before the first step"),
]


def taught() -> Distillation:
    torch.manual_seed(7)
    return Distillation(Teacher(tiny.MLP(32), precision="32-true"), student="net")


TECHNIQUES: dict[str, Callable[[], Any]] = {
    "nothing": LeanLoop,
    "masks": lambda: WeightMasks(0.5),
    "prune before": lambda: StructuredPruning(0.5, when=0),
    "prune in mid-training": lambda: StructuredPruning(0.5, when=1),
    "distillation": taught,
    "sparsity": SparsityTraining,
    "recomputation": lambda: ActivationCheckpointing(select="net.body"),
    "loading": FastLoading,
    "fused": FusedOptimizer,
    "quantized": PostTrainingQuantization,
    "trained on integers": QuantizationAwareTraining,
    "compiled": lambda: BlockCompile(blocks=False),
    "report": lambda: AccelReport(budget_s=1.0),
}


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_technique_does_what_it_does_on_the_cpu(
    fit: Any, device: str, weights: Any, name: str
) -> None:
    module, _ = fit(callbacks=[TECHNIQUES[name]()])
    alone, _ = fit("cpu", callbacks=[TECHNIQUES[name]()])
    assert module.seen == {f"{device} float32"}
    assert weights(module).shape == weights(alone).shape
    loose = (
        5e-2 if name == "trained on integers" else 1e-4
    )  # a number at a step's edge may round up or down
    assert torch.allclose(weights(module), weights(alone), atol=loose)


def test_convolutions_with_channels_last_are_the_same(fit: Any, weights: Any) -> None:
    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny.ConvNet()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.new_ones(len(x), 3, 8, 8) * x.mean(1)[:, None, None, None])

    torch.manual_seed(3)
    held = Images().state_dict()
    sides = []
    for callbacks in ([], [MemoryFormat()]):
        net = Images()
        net.load_state_dict(held)
        sides.append(weights(fit(net=net, callbacks=callbacks)[0]))
    assert torch.allclose(*sides, atol=1e-3)


def test_fsdp_of_one_device_is_plain_training(fit: Any, weights: Any) -> None:
    plain, _ = fit()
    sharded, trainer = fit(strategy=FSDP2Strategy())
    full = [getattr(p, "full_tensor", lambda p=p: p)() for p in sharded.parameters()]
    assert torch.allclose(
        torch.cat([p.detach().double().cpu().flatten() for p in full]), weights(plain), atol=1e-6
    )
    assert isinstance(trainer.strategy, FSDP2Strategy)


def test_bfloat16_is_really_computed_in(fit: Any, device: str, weights: Any) -> None:
    ours, _ = fit(plugins=[AutocastPrecision("bf16-mixed")])
    lightnings, _ = fit(precision="bf16-mixed")
    assert ours.seen == lightnings.seen == {f"{device} bfloat16"}
    assert torch.equal(weights(ours), weights(lightnings))


# ---- what CUDA alone has


@pytest.mark.gpu
def test_the_generic_accelerator_trains_as_lightnings(fit: Any, weights: Any) -> None:
    for precision in ("32-true", "bf16-mixed", "16-mixed"):
        ours, trainer = fit("accel", precision=precision)
        lightnings, _ = fit(precision=precision)
        assert trainer.strategy.root_device == torch.device("cuda", 0)
        assert ours.seen == lightnings.seen and torch.equal(weights(ours), weights(lightnings))


@pytest.mark.gpu
def test_a_scaler_skips_a_step_without_numbers_and_the_schedule_waits(fit: Any) -> None:
    class Bursts(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.global_step == 3:
                next(pl_module.parameters()).grad.fill_(float("inf"))

    plugin = AutocastPrecision("16-mixed")
    module, _ = fit(plugins=[plugin], callbacks=[Bursts()])
    assert module.seen == {"cuda float16"}
    assert all(p.isfinite().all() for p in module.parameters())
    state = plugin.state_dict()
    assert state["scaler"]["scale"] < 2.0**16 and "attempts" in state


@pytest.mark.gpu
def test_cuda_graphs_and_kernels_of_attention_compute_the_same(fit: Any, weights: Any) -> None:
    plain, _ = fit()
    graphs, _ = fit(callbacks=[BlockCompile(blocks=False, mode="reduce-overhead")])
    assert torch.allclose(weights(graphs), weights(plain), atol=1e-4)
    x = torch.randn(2, 4, 64, 32, device="cuda", dtype=torch.bfloat16)
    found = {}
    for name in ("math", "flash", "efficient", "cudnn"):
        with attention_backend(name):
            found[name] = nn.functional.scaled_dot_product_attention(x, x, x).float()
    for name, out in found.items():
        assert torch.allclose(out, found["math"], atol=2e-2), name


@pytest.mark.gpu
def test_a_fit_in_a_stream_of_its_own_is_the_same(fit: Any, weights: Any) -> None:
    make = [lambda: [StructuredPruning(0.5, when=1)], lambda: [taught()], lambda: [FastLoading()]]
    for callbacks in make:
        plain, _ = fit(callbacks=callbacks())
        with torch.cuda.stream(torch.cuda.Stream()):
            beside, _ = fit(callbacks=callbacks())
        torch.cuda.synchronize()
        assert torch.allclose(weights(beside), weights(plain), atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["nothing", "masks", "sparsity", "distillation", "recomputation", "fused"]
)
def test_no_step_waits_for_the_device(fit: Any, name: str) -> None:
    """Counted by CUDA's own debug mode, in a later epoch, beside what Lightning itself waits for."""

    class Waits(Callback):
        found = 0

        def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
            torch.cuda.set_sync_debug_mode("warn" if trainer.current_epoch == 3 else "default")

    def count(callbacks: list[Callback]) -> int:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                fit(callbacks=[*callbacks, Waits()], max_epochs=5)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(w.message) for w in caught)

    few = {"distillation": 2, "sparsity": 8}.get(
        name, 0
    )  # log steps; small indices that come from the host
    assert count([TECHNIQUES[name]()]) <= count([]) + 8 * few


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
def test_float8_trains_wide_layers(fit: Any) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs float8 units")

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(8, 1024), nn.Linear(1024, 1024), nn.Linear(1024, 4)
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x.repeat(4, 1))[: len(x)]

    callback = Float8Linear(smallest=512)
    module, _ = fit(net=Wide(), precision="bf16-mixed", callbacks=[callback])
    assert callback.receipt and all(p.isfinite().all() for p in module.parameters())


@pytest.mark.gpu
def test_memory_of_one_shard_is_that_of_the_whole(fit: Any) -> None:
    peaks = []
    for given in ({}, {"strategy": FSDP2Strategy()}):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        net = nn.Sequential(
            nn.Linear(8, 2048), *[nn.Linear(2048, 2048) for _ in range(6)], nn.Linear(2048, 4)
        )
        fit(net=net, **given)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 1.2 * peaks[0]
