"""Networks that change between two predictions, as public reports have them, answered by frozen copies.

The truth is the same prediction by a plain Trainer.
"""

from __future__ import annotations

import copy
import os
import random
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel.compilation import FrozenPredict

pytestmark = [
    pytest.mark.usefixtures("clean_dynamo"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
    pytest.mark.filterwarnings("ignore:`net` runs as it is"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]


class Net(nn.Module):
    """A network of the user's; what varies comes from `act`, called before each batch."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.heads = nn.ModuleDict({"one": nn.Linear(8, 3), "two": nn.Linear(8, 3)})
        self.active, self.temperature, self.adapter = "one", 1.0, None
        self.register_buffer("table", torch.arange(12.0).view(4, 3))
        self.row = self.table[0:1]

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        out = self.heads[self.active](y) / self.temperature * self.scale + self.row
        return out if self.adapter is None else out + self.adapter(y)


class User(LightningModule):
    def __init__(self, act: Any, make: Any = Net) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.act = make(), act
        self.extra = nn.Linear(8, 3)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        self.act(self.net, batch_idx, dataloader_idx, self)
        return self.net(batch[0])


def loader(count: int = 6) -> DataLoader[Any]:
    x = torch.randn(4 * count, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x), 4)


def predict(user: LightningModule, *callbacks: Any, **kwargs: Any) -> list[Tensor]:
    torch.manual_seed(1)
    random.seed(1)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks), **kwargs,
    )  # fmt: skip
    found = trainer.predict(user, [loader(), loader()])
    return [tensor for part in found for tensor in part]


def agrees(user: User, atol: float = 0.0) -> FrozenPredict:
    """Compare with a plain Trainer, to the last bit where the backend computes the same; return the callback."""
    edit = FrozenPredict("net", backend="eager")
    plain = predict(copy.deepcopy(user))
    ours = predict(user, edit)
    assert len(plain) == len(ours) == 12
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)
    return edit


def _per_loader(net: Any, index: int, loader: int, user: Any) -> None:
    net.active = "two" if loader else "one"


def _per_batch(net: Any, index: int, loader: int, user: Any) -> None:
    net.temperature = 1.0 + index


def _once(net: Any, index: int, loader: int, user: Any) -> None:
    net.temperature = 2.0 if index >= 3 else 1.0


def _adapter(net: Any, index: int, loader: int, user: Any) -> None:
    net.adapter = user.extra if index == 2 else None


def _shadow(net: Any, index: int, loader: int, user: Any) -> None:
    if index == 3 and not loader:
        object.__setattr__(net, "body", nn.Sequential(net._modules["body"], nn.Tanh()).eval())


def _view(net: Any, index: int, loader: int, user: Any) -> None:
    net.row = net.table[index % 4 : index % 4 + 1]


def _class(net: Any, index: int, loader: int, user: Any) -> None:
    Net.scale = 3.0 if loader else 1.0


def _data(net: Any, index: int, loader: int, user: Any) -> None:
    for parameter in net.parameters():
        parameter.data.lerp_(torch.ones_like(parameter), 0.1)


def _set_data(net: Any, index: int, loader: int, user: Any) -> None:
    net.heads["one"].weight.data = torch.full((3, 8), float(index + loader))


def _hook(net: Any, index: int, loader: int, user: Any) -> None:
    if index == 2 and not loader:
        net.body[0].register_forward_hook(lambda m, args, out: out + 1)


def _replace(net: Any, index: int, loader: int, user: Any) -> None:
    if index == 4:
        net.heads["one"] = copy.deepcopy(user.extra)


def _norm_in_training(net: Any, index: int, loader: int, user: Any) -> None:
    net.body[1].train(index >= 2)


def _buffer(net: Any, index: int, loader: int, user: Any) -> None:
    net.row = torch.full((1, 3), float(index))


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(_per_loader, id="peft#2832: another head per dataloader"),
        pytest.param(_per_batch, id="pytorch#98928: an attribute per batch"),
        pytest.param(_once, id="pytorch#124357: an attribute once"),
        pytest.param(_adapter, id="pytorch#124717 and #120958: an adapter on and off"),
        pytest.param(_shadow, id="pytorch#197859: a submodule shadowed by an attribute"),
        pytest.param(_view, id="pytorch#111785: a view of a buffer that moves"),
        pytest.param(_buffer, id="pytorch#115774: a plain tensor that is replaced"),
        pytest.param(_class, id="pytorch#176851: an attribute of the class"),
        pytest.param(_data, id="an average written through `.data`"),
        pytest.param(_set_data, id="pytorch#108863: `.data` replaced"),
        pytest.param(_hook, id="pytorch#117758: a hook added later"),
        pytest.param(_replace, id="a head replaced"),
        pytest.param(_norm_in_training, id="one norm adapts to the test data"),
    ],
)
def test_whatever_changes_between_batches_is_followed(act: Any) -> None:
    try:
        agrees(User(act), atol=1e-6)
    finally:
        Net.scale = 1.0


class MonteCarlo(nn.Module):
    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.layer, self.draw, self.own = nn.Linear(4, 3), draw, torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.draw(self, self.layer(x))


def _dropout(net: Any, y: Tensor) -> Tensor:
    return F.dropout(y, 0.5, training=True)


def _python(net: Any, y: Tensor) -> Tensor:
    return y * random.random()


def _own(net: Any, y: Tensor) -> Tensor:
    return y + torch.rand(y.shape, generator=net.own)


@pytest.mark.parametrize("draw", [_dropout, _python, _own])
def test_a_network_that_draws_in_evaluation_goes_on_as_it_is(draw: Any) -> None:
    """pytorch#104984: Monte Carlo dropout, whose spread is the answer."""
    user = User(lambda *_: None, partial(MonteCarlo, draw))
    if draw is _own:  # generators cannot be copied by every torch
        first, second = User(lambda *_: None, partial(MonteCarlo, draw)), user
        edit = FrozenPredict("net", backend="eager")
        plain, ours = predict(first), predict(second, edit)
        assert all(map(torch.equal, plain, ours))
    else:
        edit = agrees(user)
    assert "random" in edit.networks[0].reason or "copied" in edit.networks[0].reason


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 3)
        self.features: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.one(x)
        return self.two(self.features)


def test_features_that_a_forward_keeps_are_those_of_the_batch() -> None:
    """The usual way to get embeddings: kept as an attribute, read in `predict_step`."""

    class Embeds(User):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
            self.net(batch[0])
            return self.net.features

    edit = agrees(Embeds(lambda *_: None, Keeps))
    assert "`features`" in edit.networks[0].reason


class Turning(Net):
    """Reads an iterator, which no copy can have."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = iter(range(10**6))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).roll(next(self.turns), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "make", "options", "do"),
    [
        (_hook, Net, {}, "remove them for this time, or leave it out"),
        (_per_batch, Net, {}, "leave it as it is, or leave it out"),
        (lambda *_: None, Turning, {}, "leave it out.*iterator"),
        (lambda *_: None, Net, {"tolerance": 1e-9, "precision": "bf16-true"}, "keep weights in float32.*raise `tolerance`"),
    ],
    ids=["hooks", "changes", "an iterator", "rounding"],
)  # fmt: skip
@pytest.mark.filterwarnings("always:`net` runs as it is")
def test_advice_is_about_the_cause(act: Any, make: Any, options: Any, do: str) -> None:
    """To raise `tolerance` mends none of these but the last."""
    edit = FrozenPredict("net", backend="eager", **options)
    with pytest.warns(UserWarning, match=f"`net` runs as it is.*Do: {do}") as told:
        predict(User(act, make), edit)
    (line,) = [str(w.message) for w in told if "runs as it is" in str(w.message)]
    assert ("tolerance`" in line) == bool(options)


class Cached(nn.Module):
    """Rotary tables, masks: made at the first call, and kept."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.table = nn.Linear(4, 3), None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(3.0)
        return self.layer(x) + self.table


def test_a_cache_that_is_filled_once_does_not_end_it() -> None:
    edit = agrees(User(lambda *_: None, Cached), atol=1e-6)
    assert edit.networks[0].reason == "" and edit.networks[0].num_checked > 1


@pytest.mark.parametrize("held", [True, False], ids=["in a closure", "in the environment"])
def test_a_change_behind_a_helper_is_seen_or_found_by_a_later_comparison(
    held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a helper of the forward closes over is seen at once, and the environment is out of reach of any stamp."""
    world = {"scale": 1.0}

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * _helper()

    @torch._dynamo.assume_constant_result
    def _helper() -> float:
        return world["scale"] if held else float(os.environ["SCALE"])

    def act(net: Any, index: int, loader: int, user: Any) -> None:
        scale = 2.0 if index + loader else 1.0
        monkeypatch.setenv("SCALE", str(scale))
        if held:
            world["scale"] = scale

    edit = FrozenPredict("net", backend="eager")
    monkeypatch.setenv("SCALE", "1.0")
    with nullcontext() if held else pytest.warns(UserWarning, match="off by .* at call 2"):
        found = predict(User(act, Reads), edit)
    monkeypatch.setenv("SCALE", "1.0")
    assert all(map(torch.equal, found, predict(User(act, Reads))))
