"""What users of learned quantization steps report (LSQ and its kin), on `QuantizationAwareTraining(scales="learned")`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_accel.quantization import learned
from lightning_accel.quantization.grid import Grid
from lightning_accel.quantization.layers import become
from lightning_accel.quantization.learned import ScaleLearner


def layer_of(word: str = "int2") -> Any:
    torch.manual_seed(0)
    layer: Any = become(nn.Linear(8, 4), Grid(word, None), "training")
    layer.fit_scale()
    return layer


def test_lsqplus_12_a_step_that_the_loss_drives_down_stays_above_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There steps become negative in training, and accuracy falls apart."""
    monkeypatch.setattr(learned, "RATE", 0.3)
    layer, learner = layer_of(), ScaleLearner()
    learner.begin({"": layer})
    for _ in range(40):
        learner.begin({"": layer})
        layer.weight_scale().sum().backward()  # less is always better
        learner.step({"": layer}, rates={"": 1.0})
        assert (layer.weight_scale() > 0).all()
    assert layer(torch.ones(2, 8)).isfinite().all()


def test_lsq_net_8_steps_slow_down_with_the_schedule_of_the_weights() -> None:
    """There a cosine schedule was worse than fixed rates, since steps have rates of their own."""
    layer, learner = layer_of(), ScaleLearner()
    learner.begin({"": layer})
    moved = []
    for rate in (0.1, 0.1, 0.05, 0.01, 0.0):
        before = layer.weight_scale().detach().clone()
        layer(torch.ones(2, 8)).sum().backward()
        learner.step({"": layer}, rates={"": rate})
        moved.append(float((layer.weight_scale().detach() - before).abs().mean()))
    assert moved[0] > moved[2] > moved[3] > moved[4] == 0.0


def test_nni_3503_rounding_passes_gradients_to_weights_and_steps_alone() -> None:
    """There the straight-through function was called, not applied, so that a step had no gradient."""
    layer, learner = layer_of("int4"), ScaleLearner()
    learner.begin({"": layer})
    layer(torch.ones(2, 8)).square().sum().backward()
    assert layer.weight.grad.any() and layer.accel_scale.grad.any()
    assert not any(name == "accel_scale" for name, _ in layer.named_parameters())
    assert "accel_scale" not in layer.state_dict()
