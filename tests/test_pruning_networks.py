"""Networks outside of the zoo on which pruning was wrong, refused too much, or gave an untrue reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_accel.pruning import prune
from lightning_accel.surgery import Receipt


class Fn(nn.Module):
    """A forward, and the modules, parameters and plain attributes that it uses."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.body = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(self, *args, **kwargs)


def conv(ins: int, outs: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(ins, outs, kernel, padding=kernel // 2)


def perceptron() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    return net.double()


def masked(dense: nn.Module, small: nn.Module) -> nn.Module:
    """Zero, in place, each element of the dense network that the small one has not, found by value."""
    left = dict(small.named_parameters())
    with torch.no_grad():
        for name, tensor in dense.named_parameters():
            kept = torch.isin(tensor, left[name])
            assert int(kept.sum()) == left[name].numel(), name
            tensor.mul_(kept)
    return dense


def check(net: nn.Module, *inputs: Any, ratio: float = 0.5, example: Any = None) -> Receipt:
    """Prune, and compare with the dense network whose removed elements are zeros, on every input."""
    net = net.double()
    dense = copy.deepcopy(net)
    receipt = prune(net, example=inputs[0] if example is None else example, ratio=ratio)
    masked(dense, net)
    for given in inputs:
        given = given if isinstance(given, tuple) else (given,)
        with torch.no_grad():
            torch.testing.assert_close(
                net.eval()(*given), dense.eval()(*given), rtol=1e-9, atol=1e-9
            )
    return receipt


# -- hooks that take part in the forward ------------------------------------------------------------


def scales_output(net: nn.Sequential) -> None:
    scale = torch.rand(16, dtype=torch.float64)
    net[0].register_forward_hook(lambda _, __, output: output * scale)


def scales_input(net: nn.Sequential) -> None:
    scale = torch.rand(16, dtype=torch.float64)
    net[2].register_forward_pre_hook(lambda _, args: (args[0] * scale,))


def scales_keyword(net: nn.Sequential) -> None:
    scale = torch.rand(16, dtype=torch.float64)

    def hook(module: Any, args: Any, kwargs: Any) -> Any:
        return (args[0] * scale,), kwargs

    net[2].register_forward_pre_hook(hook, with_kwargs=True)


def changes_in_place(net: nn.Sequential) -> None:
    scale = torch.rand(16, dtype=torch.float64)

    def hook(_: Any, __: Any, output: Tensor) -> None:
        output.mul_(scale)

    net[0].register_forward_hook(hook)


class Method:
    def __init__(self) -> None:
        self.scale = torch.rand(16, dtype=torch.float64)
        self.heard: list[int] = []

    def hook(self, _: Any, __: Any, output: Tensor) -> Tensor:
        self.heard.append(1)
        return output * self.scale


def of_an_object(net: nn.Sequential) -> None:
    net[0].register_forward_hook(Method().hook)


SIZED = [scales_output, scales_input, scales_keyword, changes_in_place, of_an_object]


@pytest.mark.parametrize("register", SIZED)
def test_a_layer_that_a_hook_scales_keeps_its_width(register: Callable[..., None]) -> None:
    net, x = perceptron(), torch.randn(4, 8, dtype=torch.float64)
    register(net)
    receipt = prune(net, example=x, ratio=0.5)
    assert net[0].out_features == 16
    assert net[2].out_features == 6
    assert any(change.name == "0" and "constant" in change.what for change in receipt.skipped)
    net(x).sum().backward()


def test_a_hook_that_reads_sizes_follows_the_cut() -> None:
    """The hook of a parent drops half of the channels of what the child gives."""
    net, x = perceptron(), torch.randn(4, 8, dtype=torch.float64)
    net[1].register_forward_hook(lambda _, __, out: out / (1 + out.square()))
    dense = copy.deepcopy(net)
    prune(net, example=x, ratio=0.5)
    assert net[0].out_features == 8
    torch.testing.assert_close(net(x), masked(dense, net)(x), rtol=1e-10, atol=1e-10)


def test_what_hooks_hand_on_behind_everyones_back_stays() -> None:
    """As transformers records hidden states: nothing is returned by the hook, the forward gives it out."""
    seen: list[Tensor] = []

    def forward(self: Any, x: Tensor) -> Any:
        seen.clear()
        return self.inner(x), tuple(seen)

    net = Fn(forward, inner=perceptron())
    net.inner[0].register_forward_hook(lambda _, __, output: seen.append(output))
    receipt = prune(net, example=torch.randn(4, 8, dtype=torch.float64), ratio=0.5)
    assert net.inner[0].out_features == 16
    assert net.inner[2].out_features == 6
    assert receipt


def test_hooks_that_watch_are_not_heard_and_cost_nothing() -> None:
    net, x = perceptron(), torch.randn(4, 8, dtype=torch.float64)
    heard: list[int] = []
    counts = {"calls": 0}
    method = Method()

    def count(*_: Any) -> None:
        counts["calls"] += 1

    net[0].register_forward_hook(lambda *_: heard.append(1))
    net.register_forward_pre_hook(count)
    net[2].register_forward_hook(lambda *a: method.heard.append(1))
    prune(net, example=x, ratio=0.5)
    assert (heard, counts, method.heard) == ([], {"calls": 0}, [])
    assert net[0].out_features == 8
    net(x)
    assert (heard, counts, method.heard) == ([1], {"calls": 1}, [1])
