"""What a forward reads is noticed when it changes, whatever it is, and what a call writes or draws as well."""

from __future__ import annotations

import random
import sys
import types
from collections import deque
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_accel.surgery.footprint import Footprint, observe
from lightning_accel.surgery.named import FunctionReads, Named

SCALE = 1.0
GAINS = [1.0]
KNOBS = {"slope": 0.1, "order": [1, 2]}
SETTINGS = types.ModuleType("settings_of_the_user")
SETTINGS.slope = 0.1  # type: ignore[attr-defined]


def leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, KNOBS["slope"])


def through_another(x: Tensor) -> Tensor:
    return torch.stack([leaky(part) for part in x.unbind()])


def by_a_module(x: Tensor) -> Tensor:
    return x * SETTINGS.slope


def by_default(x: Tensor, scales: list[float] = [1.0]) -> Tensor:  # noqa: B006
    return x * scales[0]


def closing_over(scales: list[float]) -> Callable[[Tensor], Tensor]:
    return lambda x: x * scales[0]


class Act:
    """A function with a state of its own."""

    def __init__(self) -> None:
        self.gain, self.unread = 2.0, 0

    def run(self, x: Tensor) -> Tensor:
        return x * self.gain * SCALE

    def __call__(self, x: Tensor) -> Tensor:
        return x * GAINS[0]


class World:
    factor = 1.0


class Net(nn.Module):
    """Holds one of each kind of thing that a forward can read."""

    temperature = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.BatchNorm1d(4)])
        self.big = nn.Parameter(torch.ones(1000))
        self.rate, self.head, self.on = 0.1, "first", True
        self.config = SimpleNamespace(scale=1.0, inner=SimpleNamespace(deep=[1, 2]))
        self.seen: list[Any] = []
        self.table = {"a": {"b": 1}}
        self.last = deque([1.0], maxlen=2)
        self.plain = torch.zeros(3)
        self.array = np.zeros(3)
        self.aside = [nn.Linear(2, 2)]  # not registered

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x) * self.rate * SCALE * World.factor


def dressed(net: Net) -> Any:
    """Give a network functions that its class does not name."""
    net.act, net.outer, net.by_module, net.default = (
        leaky,
        through_another,
        by_a_module,
        by_default,
    )
    net.scales, net.object = [1.0], Act()
    net.closure = closing_over([1.0])
    net.acts = {"lrelu": closing_over([1.0])}
    net.part = partial(F.leaky_relu, negative_slope=0.1)
    net.method = net.object.run
    net.decorated = torch.no_grad()(closing_over([1.0]))
    return net


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x**2


@torch.no_grad()
def _in_place(net: Net) -> None:
    net.layers[0].weight.add_(1)


monkey = pytest.MonkeyPatch()


CHANGES: dict[str, tuple[Callable[[Net], Any], str]] = {
    "float": (lambda n: setattr(n, "rate", 0.2), "rate"),
    "attribute of the class": (lambda n: monkey.setattr(Net, "temperature", 2.0), "Net.temperature"),
    "method of the class": (lambda n: monkey.setattr(Net, "forward", lambda *_: None), "Net.forward"),
    "name of the file": (lambda n: monkey.setitem(globals(), "SCALE", 2.0), "Net.test_footprint.SCALE"),
    "attribute of another class": (lambda n: monkey.setattr(World, "factor", 2.0), "Net.test_footprint.World.factor"),
    "string": (lambda n: setattr(n, "head", "second"), "head"),
    "new attribute": (lambda n: setattr(n, "extra", 1), "extra"),
    "attribute gone": (lambda n: delattr(n, "on"), "on"),
    "mode of all": (lambda n: n.eval(), "training"),
    "mode of one": (lambda n: n.layers[1].eval(), "layers.1.training"),
    "config": (lambda n: setattr(n.config, "scale", 2.0), "config.scale"),
    "deep in a config": (lambda n: n.config.inner.deep.append(3), "config.inner.deep"),
    "list": (lambda n: n.seen.append(1), "seen"),
    "dict in a dict": (lambda n: n.table["a"].update(b=2), "table.a.b"),
    "deque": (lambda n: n.last.append(2.0), "last"),
    "hook": (lambda n: n.layers[0].register_forward_hook(lambda *_: None), "layers.0._forward_hooks"),
    "pre-hook": (
        lambda n: n.layers[0].register_forward_pre_hook(lambda *_: None),
        "layers.0._forward_pre_hooks",
    ),
    "module": (lambda n: n.layers.append(nn.ReLU()), "layers._modules"),
    "module replaced": (lambda n: n.layers.__setitem__(0, nn.Linear(4, 4)), "layers._modules.0"),
    "parametrization": (
        lambda n: parametrize.register_parametrization(n.layers[0], "weight", Square()),
        "layers.0",
    ),
    "weight in place": (_in_place, "layers.0.weight"),
    "weight through data": (lambda n: n.layers[0].weight.data.mul_(0.9), "layers.0.weight"),
    "data replaced": (lambda n: setattr(n.big, "data", torch.ones(1000)), "big"),
    "large weight through data": (lambda n: n.big.data.lerp_(torch.zeros(1000), 0.1), "big"),
    "one number of a small one": (lambda n: n.layers[0].bias.data[2:3].add_(1), "layers.0.bias"),
    "buffer": (lambda n: n.layers[1].running_mean.add_(1), "layers.1.running_mean"),
    "plain tensor": (lambda n: n.plain.add_(1), "a tensor among the attributes"),
    "tensor replaced": (lambda n: setattr(n, "plain", torch.ones(3)), "plain"),
    "array replaced": (lambda n: setattr(n, "array", np.ones(3)), "array"),
    "array in place": (lambda n: n.array.__setitem__(0, 1.0), "array"),
    "module held aside": (lambda n: setattr(n.aside[0], "in_features", 3), "aside.0.in_features"),
    "weight held aside": (lambda n: n.aside[0].weight.data.add_(1), "a tensor among the attributes"),
    "global of a function held": (lambda n: monkey.setitem(KNOBS, "slope", 0.2), "act.test_footprint.KNOBS"),
    "list behind one": (lambda n: monkey.setitem(KNOBS, "order", []), "act.test_footprint.KNOBS"),
    "function that one calls": (lambda n: monkey.setitem(globals(), "leaky", F.relu), "outer.test_footprint.leaky"),
    "module that one names": (lambda n: monkey.setattr(SETTINGS, "slope", 0.2), "by_module.settings_of_the_user.slope"),
    "default of one": (lambda n: monkey.setattr(by_default, "__defaults__", ([2.0],)), "default.__defaults__"),
    "list as a default": (lambda n: n.default.__defaults__[0].append(2.0), "default.__defaults__.0"),
    "closure": (lambda n: n.closure.__closure__[0].cell_contents.__setitem__(0, 2.0), "closure.scales"),
    "cell of a closure": (lambda n: setattr(n.closure.__closure__[0], "cell_contents", [1.5]), "closure.scales"),
    "closure in a dict": (lambda n: n.acts["lrelu"].__closure__[0].cell_contents.append(1), "acts.lrelu.scales"),
    "closure below a decorator": (lambda n: n.decorated.__wrapped__.__closure__[0].cell_contents.append(1), "decorated.scales"),
    "keyword of a partial": (lambda n: n.part.keywords.update(negative_slope=0.2), "part.2"),
    "attribute behind a method": (lambda n: setattr(n.method.__self__, "gain", 3.0), "method.Act.gain"),
    "global behind a method": (lambda n: monkey.setitem(globals(), "SCALE", 3.0), "method.test_footprint.SCALE"),
    "global of an object's call": (lambda n: GAINS.append(2.0), "object.__call__.test_footprint.GAINS"),
    "frozen": (lambda n: n.layers[0].requires_grad_(False), ""),
}  # fmt: skip


@pytest.mark.parametrize("change", list(CHANGES))
def test_whatever_a_forward_reads_is_noticed(change: str) -> None:
    torch.manual_seed(0)
    net = dressed(Net())
    footprint = Footprint(net)
    assert footprint.holds() and footprint.changed() == ()
    act, name = CHANGES[change]
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(sys.modules[__name__], "monkey", monkey)
        act(net)
        found = footprint.changed()
        holds = footprint.holds()
    if name:
        assert not holds
        assert any(one.startswith(name) for one in found), found
    else:  # nothing that a forward reads
        assert holds and found == ()


def test_what_comes_back_holds_again() -> None:
    net = Net()
    footprint = Footprint(net)
    net.rate = 0.3
    handle = net.layers[0].register_forward_hook(lambda *_: None)
    assert not footprint.holds()
    net.rate = 0.1
    handle.remove()
    assert footprint.holds()


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.complex64, torch.int8, torch.bool]
)
def test_any_dtype_is_looked_at_and_nan_is_no_change(dtype: torch.dtype) -> None:
    net = nn.Module()
    net.register_buffer("x", torch.ones(100).to(dtype))
    net.register_buffer("nan", torch.full((3,), float("nan")))
    net.register_buffer("none", torch.zeros(0))
    footprint = Footprint(net)
    assert footprint.holds()
    net.x.data.zero_()
    assert footprint.changed() == ("x",)


def test_layouts_without_a_flat_view_are_watched_by_version() -> None:
    net = nn.Module()
    net.register_buffer("gaps", torch.ones(4, 4)[:, ::2])
    net.register_buffer("expanded", torch.ones(1).expand(5))
    net.register_buffer("sparse", torch.eye(3).to_sparse())
    footprint = Footprint(net)
    assert footprint.holds()
    net.gaps.add_(1)
    assert footprint.changed() == ("gaps",)


DRAWS: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "torch": (lambda _: torch.rand(1), ("torch",)),
    "python": (lambda _: random.random(), ("python",)),
    "numpy": (lambda _: np.random.rand(), ("numpy",)),
    "torch generator": (lambda n: torch.rand(1, generator=n.own), ("a generator of its own",)),
    "numpy generator": (lambda n: n.rng.random(), ("a generator of its own",)),
    "nothing": (lambda _: None, ()),
}


@pytest.mark.parametrize("kind", list(DRAWS))
def test_draws_are_seen(kind: str) -> None:
    net = nn.Sequential(nn.Linear(1, 1))
    net[0].own, net[0].rng = torch.Generator(), np.random.default_rng(0)
    draw, whose = DRAWS[kind]
    found = observe(net, lambda: draw(net[0]))
    assert (found.drew, found.wrote) == (whose, ())


def test_writes_are_seen() -> None:
    class Keeps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.features = x
            return x

    net = nn.Sequential(Keeps(), nn.BatchNorm1d(2))
    found = observe(net, lambda: net(torch.ones(3, 2)))
    assert found.wrote == ("0.features", "1.running_mean", "1.running_var", "1.num_batches_tracked")
    assert found.drew == () and found.result.shape == (3, 2)


LATE = 0


class ReadsLate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + LATE


def test_a_name_and_a_cell_that_are_bound_later_are_unbound_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind, names = Named(ReadsLate), globals()
    monkeypatch.delitem(names, "LATE")
    before = kind.copy()
    names["LATE"] = 3
    assert kind != before
    kind.put_back(before)
    assert "LATE" not in names and kind == before

    def make() -> Any:
        def read() -> int:
            return later

        yield read
        later = 5
        yield read

    steps = make()
    code = FunctionReads(next(steps))
    before = code.copy()
    assert next(steps)() == 5
    code.put_back(before)
    assert code == before
    with pytest.raises(NameError):
        code.function()
