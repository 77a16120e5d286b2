"""Compiled blocks whose attributes, hooks and random draws move from step to step, as public reports have them.

The truth is the same block, not compiled.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_accel.compilation import compile_blocks

pytestmark = [
    pytest.mark.usefixtures("clean_dynamo"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace"),
]


class Block(nn.Module):
    def __init__(self, op: Callable[[Tensor, float], Tensor]) -> None:
        super().__init__()
        self.layer, self.p, self.op = nn.Linear(8, 8), 0.1, op

    def forward(self, x: Tensor) -> Tensor:
        return self.op(self.layer(x), self.p)


class Net(nn.Module):
    def __init__(self, op: Callable[[Tensor, float], Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(op)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def both(op: Callable[[Tensor, float], Tensor], backend: str) -> tuple[Net, Net]:
    torch.manual_seed(0)
    net = Net(op)
    plain = copy.deepcopy(net)
    compile_blocks(net, backend=backend, select="blocks.*")
    return net, plain


def same(net: Net, plain: Net, x: Tensor, atol: float = 0.0) -> None:
    """Compare a step of both, from the same random states; Python's must end the same as well."""
    state, found = random.getstate(), []
    for one in (net, plain):
        random.setstate(state)
        torch.manual_seed(1)
        out = one(x)
        out.sum().backward()
        found.append((out, random.getstate(), one.blocks[0].layer.weight.grad))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=atol)
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-4, atol=1e-4)
    assert found[0][1] == found[1][1]


def _drop_path(x: Tensor, p: float) -> Tensor:
    return x * x.new_empty(x.shape[0], 1).bernoulli_(1 - p).div_(1 - p)


def _rms_norm(x: Tensor, p: float) -> Tensor:
    return F.rms_norm(x * p, (8,), eps=p + 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "op",
    [
        pytest.param(_rms_norm, id="pytorch#197889: eps of a norm"),
        pytest.param(_drop_path, id="pytorch#194976: drop path, whose rate rises by the step"),
    ],
)
def test_a_float_that_changes_within_an_epoch_is_never_an_old_one(
    op: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own setting keeps the second value: 0.34 were dropped where 0.45 were to be."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    net, plain = both(op, "inductor")
    for p in (0.1, 0.2, 0.3, 0.45):
        net.blocks[0].p = plain.blocks[0].p = p
        same(net, plain, torch.randn(64, 8), atol=1e-5)


@pytest.mark.parametrize(
    "op",
    [
        lambda x, p: x * random.random(),
        lambda x, p: x * 2 if random.random() < 0.5 else x - random.uniform(0.5, 2.0),
        lambda x, p: F.dropout(x, random.uniform(0.1, 0.9)),
        lambda x, p: x[:, : random.randint(1, 8)],
        lambda x, p: x * random.choice([1.0, 2.0, 3.0]),
        lambda x, p: x + random.gauss(0.0, 1.0),
    ],
)
def test_pythons_own_random_numbers_are_those_of_the_plain_block(op: Any) -> None:
    """pytorch#198187: they came out as garbage. Such a block runs as it is, with a word."""
    net, plain = both(op, "aot_eager")
    random.seed(0)
    with pytest.warns(UserWarning, match="runs as it is from now on.*draws from `random`"):
        same(net, plain, torch.randn(4, 8))
    for _ in range(4):
        same(net, plain, torch.randn(4, 8))


@pytest.mark.slow
def test_a_hook_that_a_module_inside_gets_later_is_called() -> None:
    """pytorch#117758, #115750: features taken by hooks, from the second epoch on."""
    net, plain = both(lambda x, p: x * p, "aot_eager")
    x = torch.randn(4, 8)
    same(net, plain, x)
    seen: list[Tensor] = []
    handles = [
        one.blocks[0].layer.register_forward_hook(lambda *a: a[2] + 1) for one in (net, plain)
    ]
    same(net, plain, x)
    handles.append(
        net.blocks[0].layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    )
    same(net, plain, x)
    assert len(seen) == 1
    for handle in handles:
        handle.remove()
    same(net, plain, x)
    assert len(seen) == 1
