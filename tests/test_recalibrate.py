"""Statistics of batch norms after a cut: only those of norms that were really reached are new."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_accel.pruning.recalibrate import recalibrate
from lightning_accel.surgery.call import Call


class Two(nn.Module):
    """A norm that each call reaches, and one that none does."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.reached, self.other = nn.BatchNorm1d(3, **kwargs), nn.BatchNorm1d(3, affine=False)
        for norm in (self.reached, self.other):
            norm(torch.randn(8, 3) + 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.reached(x)


def calls(*batches: Tensor) -> list[list[Call]]:
    return [[Call("", (x,), {})] for x in batches]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_are_the_average_over_the_batches(momentum: float | None) -> None:
    net, data = Two(momentum=momentum), [torch.randn(16, 3) * 2 + i for i in range(3)]
    found = recalibrate(net, calls(*data))
    mean = torch.stack([x.mean(0) for x in data]).mean(0)
    var = torch.stack([x.var(0) for x in data]).mean(0)
    torch.testing.assert_close(net.reached.running_mean, mean)
    torch.testing.assert_close(net.reached.running_var, var)
    assert set(found) == {"reached.running_mean", "reached.running_var"}


def test_a_norm_that_saw_no_call_keeps_everything() -> None:
    net = Two()
    before = {k: v.clone() for k, v in net.other.state_dict().items()}
    recalibrate(net, calls(torch.randn(8, 3)))
    assert all(torch.equal(v, before[k]) for k, v in net.other.state_dict().items())
    assert net.other.training


def test_counters_and_momentum_are_kept() -> None:
    net = Two(momentum=0.25)
    recalibrate(net, calls(torch.randn(8, 3), torch.randn(8, 3)))
    assert int(net.reached.num_batches_tracked) == 1  # type: ignore[arg-type]
    assert net.reached.momentum == 0.25


def test_a_frozen_norm_keeps_its_statistics() -> None:
    net = Two()
    net.reached.eval()
    before = net.reached.running_mean.clone()  # type: ignore[union-attr]
    assert recalibrate(net, calls(torch.randn(8, 3))) == {}
    assert torch.equal(net.reached.running_mean, before)  # type: ignore[arg-type]


def test_statistics_of_bad_batches_are_not_taken() -> None:
    net = Two()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert recalibrate(net, calls(torch.full((8, 3), torch.nan))) == {}
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
