"""The digest of a footprint: it changes with whatever the outputs depend on, and with nothing else."""

from __future__ import annotations

import copy
import dataclasses
import enum
import os
import random
import re
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_accel.distillation.forward_recorder import ForwardRecorder
from lightning_accel.errors import AccelError
from lightning_accel.surgery.digest import digest

FACTOR = 2.0


class Kind(enum.Enum):
    SMALL = 1
    LARGE = 2


@dataclasses.dataclass
class Config:
    width: int = 4
    kind: Kind = Kind.SMALL

    def scale(self) -> float:
        return FACTOR * self.width


class Slotted:
    __slots__ = ("shift",)

    def __init__(self, shift: float) -> None:
        self.shift = shift


class Net(nn.Module):
    """Holds one of everything that a forward can read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh())
        self.mean: Any = torch.ones(4)
        self.config, self.slotted = Config(), Slotted(1.0)
        self.options: dict[str, Any] = {"deep": [{"er": 1}], "names": {"a", "b", "c"}}
        self.act: Callable[[Tensor], Tensor] = lambda x: x * 2
        self.norm = partial(F.layer_norm, normalized_shape=(4,), eps=1e-5)
        self.table = np.arange(4.0)
        self.route = (0, 1)
        self.order = types.SimpleNamespace(by={"x": 1, "y": 2})
        self.random = random.Random(3)
        self.lock = threading.Lock()  # named by no code that runs

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.body(x - self.mean)) * self.config.scale() + self.slotted.shift
        return self.norm(helped(x))


def helped(x: Tensor) -> Tensor:
    return x + FACTOR


def other(x: Tensor) -> Tensor:
    return x - FACTOR


def reorder(net: Net) -> None:
    layers = list(net.body._modules.items())
    net.body._modules.clear()
    net.body._modules.update(reversed(layers))


def written_behind(net: Net) -> None:
    net.body[0].weight.data[0, 0] = torch.nextafter(net.body[0].weight[0, 0], torch.tensor(9.0))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a bit of a weight": written_behind,
    "a plain tensor": lambda net: net.mean.add_(5.0),
    "a field of a config": lambda net: setattr(net.config, "width", 8),
    "a member of an enum": lambda net: setattr(net.config, "kind", Kind.LARGE),
    "a slot": lambda net: setattr(net.slotted, "shift", 2.0),
    "a value deep in a dict": lambda net: net.options["deep"][0].update(er=2),
    "a set": lambda net: net.options["names"].add("d"),
    "a lambda": lambda net: setattr(net, "act", lambda x: x * 3),
    "a function": lambda net: setattr(net, "act", F.relu),
    "an activation module": lambda net: net.body.__setitem__(1, nn.GELU()),
    "a keyword of a partial": lambda net: net.norm.keywords.update(eps=0.5),
    "an array": lambda net: net.table.__setitem__(0, 9.0),
    "a tuple": lambda net: setattr(net, "route", (1, 0)),
    "a namespace": lambda net: net.order.by.update(x=5),
    "a generator": lambda net: net.random.seed(4),
    "a forward of this one": lambda net: setattr(net, "forward", lambda x: x),
    "a hook": lambda net: net.body[2].register_forward_hook(lambda m, a, out: out * 2),
    "a hook before": lambda net: net.register_forward_pre_hook(lambda m, a: None),
    "the order of layers": reorder,
    "a flag": lambda net: net.eval(),
    "the type of numbers": lambda net: net.double(),
    "a layer less": lambda net: net.body.pop(1),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_digest_changes_with_whatever_a_forward_can_read(what: str) -> None:
    net = Net()
    before = digest(net)
    assert digest(Net()) == before
    CHANGES[what](net)
    assert digest(net) != before


def test_a_digest_changes_with_code_wherever_a_forward_leads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, prints = Net(), set[str]()
    for owner, name, value in (
        (None, None, None),
        (Net, "forward", lambda self, x: self.body(x)),
        (Config, "scale", lambda self: 1.0),
        (sys.modules[__name__], "helped", other),
        (sys.modules[__name__], "FACTOR", 3.0),
        (nn.ReLU, "forward", lambda self, x: x),  # a library's, put in by the user
    ):
        with monkeypatch.context() as patch:
            if owner is not None:
                patch.setattr(owner, name, value)
            prints.add(digest(net))
    assert len(prints) == 6


def test_code_below_a_decorator_of_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its wrapper lies in torch's own files; what it wraps does not."""
    net, prints = Net(), set[str]()
    for function in (lambda x: x + FACTOR, lambda x: x - FACTOR):
        net.act = torch.no_grad()(function)
        prints.add(digest(net))
        monkeypatch.setattr(sys.modules[__name__], "FACTOR", 3.0)
        prints.add(digest(net))
        monkeypatch.undo()
    assert len(prints) == 4


def test_what_no_output_depends_on_changes_no_digest() -> None:
    net = Net()
    before = digest(net)
    for parameter in net.parameters():
        parameter.requires_grad_(False).grad = torch.ones_like(parameter)
    net.lock = threading.Lock()
    net.body[0].register_full_backward_hook(lambda *_: None)
    net.body.compile(backend="eager")
    assert digest(net) == before and digest(Net()) == before


WRITTEN = """
import sys
sys.path.insert(0, {tests!r})
from test_digest import Net, digest
print(digest(Net()))
"""


@pytest.mark.slow
def test_a_digest_is_the_same_in_another_process() -> None:
    code = WRITTEN.format(tests=str(Path(__file__).parent))
    env = {**os.environ, "PYTHONHASHSEED": "7"}  # another order of sets
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == digest(Net())


def double(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * 2


def test_hooks_count_by_what_they_do_and_taps_of_ours_not_at_all() -> None:
    net = Net()
    before = digest(net)
    tape = ForwardRecorder(net, ["body.0"])
    assert digest(net) == before
    tape.remove()
    prints = []
    for _ in range(2):  # torch numbers its hooks on and on
        hook = net.body[0].register_forward_hook(double)
        prints.append(digest(net))
        hook.remove()
    assert prints[0] == prints[1] != before == digest(net)


class Reads(nn.Module):
    def __init__(self, held: Any) -> None:
        super().__init__()
        self.layer, self.held = nn.Linear(1, 1), held

    def forward(self, x: Tensor) -> Any:
        return self.layer(x), self.held


@pytest.mark.parametrize(
    "held", [threading.Lock(), (i for i in "ab"), torch.empty(1, device="meta")]
)
def test_what_cannot_be_told_is_refused_where_the_forward_reads_it(held: Any) -> None:
    with pytest.raises(
        AccelError, match=r"`held` cannot be told.*Found: .*Do: .*cache=None"
    ) as refusal:
        digest(Reads(held))
    assert re.search("lock|generator|Tensor", str(refusal.value))


def test_a_reading_that_comes_back_to_itself_ends() -> None:
    one, two = Reads(None), Reads(None)
    for net in (one, two):
        net.held = {"self": [net]}
    assert digest(one) != digest(two)  # by their weights
    two.load_state_dict(one.state_dict())
    assert digest(one) == digest(two)


@pytest.mark.parametrize("make", [torch.jit.script, torch.fx.symbolic_trace, torch.compile])
def test_networks_that_torch_rewrote_are_told_apart(make: Any, recwarn: Any) -> None:
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(2, 2), nn.LeakyReLU(0.1))
    slope = copy.deepcopy(one)
    slope[1].negative_slope = 0.2  # type: ignore[assignment]
    assert digest(make(one)) == digest(make(copy.deepcopy(one))) != digest(make(slope))


def test_a_lightning_module_counts_with_what_is_its_own() -> None:
    from lightning.pytorch import LightningModule

    class Lit(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"scale": 2.0})
            self.net, self._shift = nn.Linear(2, 2), 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * self.hparams["scale"] + self._shift

    torch.manual_seed(0)
    net = Lit()
    prints = [digest(net)]
    net._shift = 2.0
    prints.append(digest(net))
    net.hparams["scale"] = 3.0
    prints.append(digest(net))
    net._device = torch.device("cuda", 0)
    net._current_fx_name = "validation_step"
    assert len(set(prints)) == 3 and digest(net) == prints[2]
