"""A module of which something moves in every step trains as without a technique that says it changes nothing.

Techniques by what moves: attributes, hooks, random draws, weights written through `.data`, modes. The truth is the
plain fit, bit for bit; or the technique steps aside or refuses, with its reason.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import (
    AccelReport,
    ActivationCheckpointing,
    AttentionBackend,
    AutocastPrecision,
    AutoTune,
    BlockCompile,
    FastLoading,
    FrozenPredict,
    FusedOptimizer,
    LeanLoop,
    MatmulPrecision,
    MemoryFormat,
    StepMeter,
)
from lightning_accel.errors import NoEffect

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("clean_dynamo")]


class Block(nn.Module):
    """Reads and draws as it is told."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.active, self.rate, self.calls = kind, "a", 1.0, 0
        self.layers = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.3)
        self.config = {"scale": [1.0]}
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.layers[self.active](x)) * self.rate * self.config["scale"][0]
        if self.kind == "statistics":
            self.calls += 1
            self.mean.lerp_(x.detach().mean(0), 0.1)
            x = x / self.calls + self.mean
        if self.kind == "python":
            x = x * random.random()
        if self.kind == "numpy":
            x = x * float(np.random.rand())
        return self.drop(x) if self.kind == "torch" else x


class Moving(LightningModule):
    """Moves one thing before each forward, twice in a step, as schedules, adapters and probes do."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.seen, self._handles = kind, [], []  # type: ignore[var-annotated]
        self.net = nn.Sequential(nn.Linear(8, 8), Block(kind), Block(kind), nn.Linear(8, 4))

    def move(self, number: int) -> None:
        for block in [m for m in self.net if isinstance(m, Block)]:
            if self.kind == "attributes":
                block.active, block.rate = "ab"[number % 2], 1.0 + 0.1 * (number % 5)
                block.config["scale"][0] = 1.0 + number % 3
            if self.kind == "hooks":
                layer, factor = block.layers["a"], 1.0 + number % 3
                hook = layer.register_forward_hook(lambda m, args, out, f=factor: out * f)
                self._handles.append(hook)
                if number % 2:
                    self._handles.pop(0).remove()
            if self.kind == "data":
                block.layers["a"].weight.data.mul_(0.99)
                block.norm.bias.data = block.norm.bias.data.clone().add_(0.01)
            if self.kind == "modes":
                block.norm.train(number % 3 > 0)
                block.drop.train(number % 2 > 0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.move(2 * batch_idx)
        first = self.net(batch[0])
        self.move(2 * batch_idx + 1)
        if self.kind == "data":  # what is written through `.data` stays for the backward
            return F.cross_entropy(first, batch[1])
        return F.cross_entropy(first + self.net(batch[0].flip(0)), batch[1])

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.move(batch_idx)
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


KINDS = ("attributes", "hooks", "statistics", "python", "numpy", "torch", "data", "modes")

TECHNIQUES: dict[str, Callable[[], list[Any]]] = {
    "checkpointing": lambda: [ActivationCheckpointing(select=["net.1", "net.2"])],
    "selective": lambda: [ActivationCheckpointing(["net.1", "net.2"], policy="selective")],
    "compile": lambda: [BlockCompile(backend="eager", on_graph_break="ignore")],
    "captured": lambda: [BlockCompile(backend="aot_eager", on_graph_break="ignore")],
    "fused": lambda: [FusedOptimizer()],
    "for-loop": lambda: [FusedOptimizer("for-loop")],
    "tune": lambda: [AutoTune(budget_s=0.01, budget_share=1e9, techniques=("fused_optimizer",), cache=False)],
    "beside": lambda: [
        *(LeanLoop(), FastLoading(budget_s=0.01), StepMeter(), AccelReport(budget_s=0.001)),
        *(MatmulPrecision("highest"), AttentionBackend("math")),
    ],
}  # fmt: skip
ROUNDED = ("fused", "tune")
"""Whose kernels round otherwise."""
FEW = {"captured": ("attributes", "statistics", "numpy", "modes"), "tune": ("attributes", "python")}
"""What is moved under techniques that take their time."""
REFUSED = {
    # The plain backward computes with new weights and old activations: nothing that can be computed again.
    ("checkpointing", "data"): "recomputes something else than it computed",
    ("selective", "data"): "recomputes something else than it computed",
    # A norm reads its statistics in one forward and writes them in the next; a graph is told of both.
    ("captured", "modes"): "modified by an inplace operation",
}
_PLAIN: dict[str, list[Any]] = {}


def loader() -> DataLoader[Any]:
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, torch.arange(12) % 4), 4)


def fit(kind: str, kwargs: dict[str, Any], callbacks: list[Any], *plugins: Any) -> list[Any]:
    module = Moving(kind)
    torch.manual_seed(2), random.seed(2), np.random.seed(2)
    Trainer(**{**kwargs, "callbacks": callbacks, "plugins": list(plugins)}).fit(module, loader())
    tensors = [t.detach().clone() for t in (*module.parameters(), *module.buffers())]
    drawn = [random.random(), float(np.random.rand()), float(torch.rand(1))]
    return [*tensors, *drawn, [block.calls for block in module.net if isinstance(block, Block)]]


def same(found: list[Any], wanted: list[Any], atol: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        if isinstance(one, Tensor):
            torch.testing.assert_close(one, other, rtol=0, atol=atol)
        else:
            assert one == other


@pytest.mark.parametrize(
    ("technique", "kind"), [(t, k) for t in TECHNIQUES for k in FEW.get(t, KINDS)]
)
def test_what_moves_in_every_step_moves_with_the_technique_as_without(
    technique: str, kind: str, trainer_kwargs: dict[str, Any]
) -> None:
    if kind not in _PLAIN:
        _PLAIN[kind] = fit(kind, trainer_kwargs, [])
    reason = REFUSED.get((technique, kind))
    if reason is not None:
        with pytest.raises(RuntimeError, match=reason):
            fit(kind, trainer_kwargs, TECHNIQUES[technique]())
        return
    found = fit(kind, trainer_kwargs, TECHNIQUES[technique]())
    same(found, _PLAIN[kind], atol=1e-5 if technique in ROUNDED else 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_precision_asked_for_by_name_is_that_of_the_plain_fit(
    kind: str, trainer_kwargs: dict[str, Any]
) -> None:
    if kind not in _PLAIN:
        _PLAIN[kind] = fit(kind, trainer_kwargs, [])
    same(fit(kind, trainer_kwargs, [], AutocastPrecision("32-true")), _PLAIN[kind], atol=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_is_that_of_the_moving_module(
    kind: str, trainer_kwargs: dict[str, Any]
) -> None:
    found = []
    for callbacks in ([], [FrozenPredict("net.1", backend="eager", tolerance=1e-9)]):
        torch.manual_seed(2), random.seed(2), np.random.seed(2)
        trainer = Trainer(**{**trainer_kwargs, "callbacks": callbacks})
        found.append(trainer.predict(Moving(kind), loader()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_format_without_effect_refuses(trainer_kwargs: dict[str, Any]) -> None:
    with pytest.raises(NoEffect):
        fit("attributes", trainer_kwargs, [MemoryFormat()])
