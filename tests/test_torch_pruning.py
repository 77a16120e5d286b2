"""Pruners of torch-pruning that are brought along, against what they do alone where that is right."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_pruning as tp
from lightning.pytorch import LightningModule
from tiny import AttentionNet, ConvNet
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_accel.errors import AccelError, BrokenModel, NoEffect
from lightning_accel.pruning import prune


class ConvNeXt(nn.Module):
    """A block with a depthwise convolution, and a scale that is a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.gamma = nn.Parameter(torch.rand(8) + 0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        y = self.norm(self.depth(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        x = x + self.gamma * self.down(F.gelu(self.up(y)))
        return self.head(x.mean((1, 2)))


class VGG(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32, 16), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(16, 4)


MAGNITUDE = tp.importance.GroupMagnitudeImportance(p=2)
SLIM = tp.importance.BNScaleImportance()


def by(kind: Any = tp.pruner.BasePruner, **given: Any) -> Callable[[Any, Any], Any]:
    """Return a function that makes a pruner, with the head of the network left whole."""
    settings = {"importance": MAGNITUDE, "pruning_ratio": 0.5, **given}

    def pruner(model: Any, example: Any) -> Any:
        net = getattr(model, "net", model) if isinstance(model, LightningModule) else model
        mine = {k: v(net) if callable(v) and k != "importance" else v for k, v in settings.items()}
        return kind(model, example, **{"ignored_layers": [net.head], **mine})

    return pruner


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def varied(net: nn.Module) -> nn.Module:
    """Give norms values of their own, so that ranking by them is no chance."""
    for parameter in net.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return net


HEADS = {"num_heads": lambda net: {net.qkv: 4}}
ALONE = {
    "resnet": (ConvNet, images, by()),
    "resnet global": (ConvNet, images, by(global_pruning=True, isomorphic=True)),
    "resnet by a dict": (ConvNet, images, by(pruning_ratio_dict=lambda net: {net.down: 0.25})),
    "convnext": (ConvNeXt, images, by(round_to=2)),
    "vgg": (VGG, images, by(tp.pruner.BNScalePruner, importance=SLIM, global_pruning=True)),
    "vgg in steps": (VGG, images, by(tp.pruner.GroupNormPruner, iterative_steps=3)),
    "vit": (
        AttentionNet,
        lambda: torch.randn(2, 5, 8),
        by(**HEADS, prune_num_heads=True, prune_head_dims=False, head_pruning_ratio=0.5),
    ),
}


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
@pytest.mark.parametrize("name", list(ALONE))
def test_a_pruner_prunes_as_it_does_alone(name: str) -> None:
    make, example, pruner = ALONE[name]
    x, net = example(), varied(make())
    alone = copy.deepcopy(net)
    theirs = pruner(alone, (x,))
    for _ in range(theirs.iterative_steps):
        theirs.step()
    if name == "vit":  # what its users do by hand
        alone.num_heads = theirs.num_heads[alone.qkv]
    flags, owned = net.training, dict(net.named_parameters())
    receipt = prune(net, example=x, pruner=pruner)
    assert not receipt.skipped
    assert net.training == flags
    for (key, mine), value in zip(net.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine, value), key
        assert mine is owned[key]
    assert torch.equal(net.eval()(x), alone.eval()(x))


def test_the_width_of_heads_goes_with_its_scale() -> None:
    """torch-pruning leaves attention to divide by the root of another width than the weights learned."""
    x, net = torch.randn(2, 5, 8), AttentionNet()
    masked, alone = copy.deepcopy(net), copy.deepcopy(net)
    pruner = by(**HEADS, ignored_layers=lambda net: [net.head, net.embed, net.proj, net.mlp])
    receipt = prune(net, example=x, pruner=pruner)
    rows = {move.name: move.kept.dims[0] for move in receipt.moved}["qkv.weight"]
    gone = torch.ones(48, dtype=torch.bool)
    gone[rows] = False
    with torch.no_grad():
        masked.qkv.weight[gone], masked.qkv.bias[gone] = 0.0, 0.0
    pruner(alone, (x,)).step()
    alone.head_dim = 2
    assert net.head_dim == 2
    with torch.no_grad():
        expected = masked(x)
        assert float((net(x) - expected).abs().max()) < 1e-6
        assert float((alone(x) - expected).abs().max()) > 1e-4


class Between(nn.Module):
    """Something between two linear layers."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 16), middle, nn.Linear(16, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(self.first(x))
        return self.head(F.relu(self.last(y[0] if isinstance(y, tuple) else y)))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(16) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class ImplicitHeads(nn.Module):
    """Whose number of heads is what the width happens to give."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).view(*x.shape[:2], -1, 4).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_what_it_forgets_follows() -> None:
    x, net = torch.randn(2, 5, 8), Between(Scaled())
    alone, masked = copy.deepcopy(net), copy.deepcopy(net)
    by()(alone, (x,)).step()
    with pytest.raises(RuntimeError, match="size of tensor"):
        alone(x)
    receipt = prune(net, example=x, pruner=by())
    for move in receipt.moved:
        if move.name.startswith("last") and move.kept.dims[0] is not None:
            gone = torch.ones(12, dtype=torch.bool)
            gone[move.kept.dims[0]] = False
            dict(masked.named_parameters())[move.name].data[gone] = 0.0
        if move.name == "first.weight":
            gone = torch.ones(16, dtype=torch.bool)
            gone[move.kept.dims[0]] = False
            masked.last.weight.data[:, gone] = 0.0
    assert net.middle.scale.shape == (8,)
    assert torch.allclose(net(x), masked(x), atol=1e-6)


@torch.library.custom_op("accel_tests::swish", mutates_args=())
def swish(x: Tensor) -> Tensor:
    return x * x.sigmoid()


@swish.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def back(ctx: Any, gradient: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return gradient * (x.sigmoid() + x * x.sigmoid() * (1 - x.sigmoid()))


swish.register_autograd(back, setup_context=keep)


class Kernel(nn.Module):
    """An activation of the user's own, as their fast kernels are."""

    def forward(self, x: Tensor) -> Tensor:
        return swish(x)


def test_where_only_its_own_tracing_follows_the_cut_is_made_of_what_it_did() -> None:
    x, net = torch.randn(2, 5, 8), Between(Kernel())
    with pytest.raises(NoEffect, match="accel_tests::swish"):
        prune(net, example=x, ratio=0.5, select=["first"])
    alone = copy.deepcopy(net)
    by()(alone, (x,)).step()
    receipt = prune(net, example=x, pruner=by(), compensate=True)
    assert not receipt.skipped
    assert "not compensated" in receipt.notes[1]
    assert (net.first.out_features, net.last.in_features) == (8, 8)
    assert torch.equal(net.eval()(x), alone.eval()(x))


REFUSED = {
    "heads": (Between(ImplicitHeads()), "middle.v", "does not compute what the masked one"),
    "lstm": (Between(nn.LSTM(16, 16, batch_first=True)), "middle", "fails to cut it: IndexError"),
    "frozen": (Between(nn.Linear(16, 16).requires_grad_(False)), "first", "is frozen"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_it_would_break_is_named_and_left(name: str) -> None:
    net, group, reason = copy.deepcopy(REFUSED[name][0]), *REFUSED[name][1:]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        whole = net(x)
    receipt = prune(net, example=x, pruner=by())
    assert reason in {change.name: change.what for change in receipt.skipped}[group]
    assert net.last.out_features == 6
    assert {n: p.requires_grad for n, p in net.named_parameters()} == {
        n: "middle" not in n or name != "frozen" for n in before
    }
    assert net(x).shape == whole.shape


def test_the_output_layer_stays_though_nobody_ignored_it() -> None:
    net = VGG()
    receipt = prune(net, example=images(), pruner=by(ignored_layers=lambda net: []))
    assert [change.name for change in receipt.skipped] == ["head"]
    assert "torch-pruning would have broken it" in receipt.skipped[0].what
    with pytest.raises(BrokenModel, match=r"nothing of what torch-pruning .* passes"):
        prune(nn.Sequential(nn.Linear(4, 4)), example=torch.randn(1, 4), pruner=all_of)


def all_of(model: Any, example: Any) -> Any:
    return tp.pruner.BasePruner(model, example, importance=MAGNITUDE)


def fails(_: Any) -> Any:
    """What `forward_fn` of `by` is made of: a forward that fails, and fails otherwise when tried again."""

    def forward(model: Any, example: Any) -> Any:
        try:
            raise ZeroDivisionError("the first")
        except ZeroDivisionError:
            raise TypeError("the second")  # noqa: B904 - as torch-pruning does

    return forward


class Doubles(tp.pruner.function.BatchnormPruner):  # type: ignore[misc]
    def prune_out_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
        layer = super().prune_out_channels(layer, idxs)
        layer.weight.data.mul_(2.0)
        return layer

    prune_in_channels = prune_out_channels


def test_a_pruning_function_that_does_more_than_remove_is_named() -> None:
    net = VGG()
    pruner = by(customized_pruners={nn.BatchNorm2d: Doubles()})
    receipt = prune(net, example=images(), pruner=pruner)
    reasons = {change.name: change.what for change in receipt.skipped}
    assert "does more to `net.1.weight` than to remove" in reasons["net.0"]
    assert (net.net[0].out_channels, net.net[9].out_features) == (8, 8)


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"pruner": 3}, TypeError, "a function of a model and an example"),
        ({"pruner": lambda model: None}, TypeError, "too many positional"),
        ({"pruner": lambda model, example: model}, TypeError, "returns a pruner"),
        ({"pruner": by(), "ratio": 0.5}, ValueError, "either `ratio`"),
        ({"pruner": by(), "scope": "global"}, ValueError, "`scope` is said by the pruner"),
        ({"pruner": by(), "select": "head"}, ValueError, "`select` is said by the pruner"),
        ({"pruner": by(importance=None)}, AccelError, "fails in its step"),
        ({"pruner": by(nothing=1)}, AccelError, "cannot be made"),
        ({"pruner": by(forward_fn=fails)}, AccelError, "ZeroDivisionError: the first"),
        ({"pruner": lambda m, e: by()(VGG(), e)}, AccelError, "pruned another one"),
    ],
)
def test_a_wrong_pruner_is_told(given: Any, error: type[Exception], match: str) -> None:
    net = VGG()
    before = repr(net)
    with pytest.raises(error, match=match):
        prune(net, example=images(), **given)
    assert repr(net) == before


def test_layers_of_another_network_are_told() -> None:
    """torch-pruning would pass over them, and prune what it was told to leave."""
    net, elsewhere = VGG(), VGG()
    for given in ({"ignored_layers": [elsewhere.net[4]]}, {"num_heads": {elsewhere.head: 2}}):
        with pytest.raises(AccelError, match=f"`{next(iter(given))}` names a layer that is not in"):
            prune(net, example=images(), pruner=by(**given))


@pytest.mark.slow
def test_no_layer_of_a_copy_outlives_the_prune() -> None:
    """Dicts that are defaults of torch-pruning's hold every grouped layer that any pruner has seen."""
    made: list[Any] = []

    def pruner(model: Any, example: Any) -> Any:
        made.append(weakref.ref(model[1]))
        return by()(model, example)

    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1), nn.Flatten())
    net.add_module("head", nn.Linear(512, 4))
    prune(net, example=images(), pruner=pruner)
    gc.collect()
    assert net[0].out_channels == 4
    assert [layer() for layer in made] == [None] * len(made)


def test_compensation_is_for_their_choices_as_well() -> None:
    x = torch.randn(64, 3, 8, 8)
    first = varied(VGG()).eval()
    nets, whole = [first, copy.deepcopy(first)], first(x).detach()
    for net, compensate in zip(nets, (False, True), strict=True):
        prune(net, example=x, pruner=by(), compensate=compensate)
    with torch.no_grad():
        far = [float((net(x) - whole).square().mean()) for net in nets]
    assert far[1] < 0.7 * far[0]


def test_a_call_that_does_not_come_back_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """VainF/Torch-Pruning#527 and #454 never return."""
    monkeypatch.setattr("lightning_accel.pruning.foreign._SLOW_AFTER", 0.0)
    told = threading.Event()
    monkeypatch.setattr("warnings.warn", lambda text, *_: "may never end" in text and told.set())

    def endless(model: Any, example: Any) -> Any:
        assert told.wait(60)
        return by()(model, example)

    prune(VGG(), example=images(), pruner=endless)
