"""What people met who solved a layer's weights anew from calibration data."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_accel.pruning.prune import plan
from lightning_accel.surgery.call import Call

KINDS = ["dead inputs", "equal inputs", "one huge input", "ten samples", "bfloat16"]


def calibrated(net: nn.Module, batches: list[Tensor], *, compensate: bool) -> nn.Module:
    calls = [[Call("", (x,), {})] for x in batches]
    cut = plan(net, calls=calls[0], ratio=0.5, batches=calls, compensate=compensate)
    small = copy.deepcopy(net)
    cut.apply(small)
    return small


@pytest.mark.parametrize("kind", KINDS)
def test_data_that_give_no_positive_definite_matrix_do_no_harm(kind: str) -> None:
    """AutoGPTQ#572, #708, llm-compressor#142, #1019, #1069, SparseLLM#20: `linalg.cholesky` failed on these."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4)
    )
    with torch.no_grad():
        if kind == "dead inputs":
            net[0].bias[::3] = -100.0
        if kind == "equal inputs":
            net[0].weight[16:], net[0].bias[16:] = net[0].weight[:16], net[0].bias[:16]
        if kind == "one huge input":
            net[0].weight[5] *= 1e4
    if kind == "bfloat16":
        net = net.bfloat16()
    dtype = net[0].weight.dtype
    mixed = torch.randn(6, 16)
    count = 2 if kind == "ten samples" else 32
    batches = [(torch.randn(count, 6) @ mixed).to(dtype) for _ in range(5)]
    unseen = (torch.randn(500, 6) @ mixed).to(dtype)
    raw, solved = (calibrated(net, batches, compensate=on) for on in (False, True))
    assert all(bool(p.isfinite().all()) for p in solved.parameters())
    errors = [
        float(F.mse_loss(s(unseen).float(), net(unseen).float()).detach()) for s in (raw, solved)
    ]
    assert errors[1] <= 1.1 * errors[0]


def test_accuracy_is_not_gone_right_after_the_cut() -> None:
    """EIDOSLAB/simplify#12 and midasklr/yolov5prune#117: from 75 % to 1 % before any fine-tuning."""
    torch.manual_seed(0)
    centres = torch.randn(8, 16) * 2
    labels = torch.arange(512) % 8
    x = centres[labels] + torch.randn(512, 16)
    net = nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8)
    )
    adam = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        adam.zero_grad()
        F.cross_entropy(net(x[:256]), labels[:256]).backward()
        adam.step()

    def accuracy(model: nn.Module) -> float:
        return float((model(x[256:]).argmax(1) == labels[256:]).float().mean())

    solved = calibrated(net, list(x[:256].split(64)), compensate=True)
    assert solved[0].out_features == 32 and solved[2].out_features == 24  # type: ignore[index]
    assert accuracy(net) > 0.9 and accuracy(solved) > accuracy(net) - 0.05
