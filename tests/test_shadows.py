"""Whatever form people keep tensors beside a network in: each is known by its parameter, or nothing is cut."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict, UserDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import StructuredPruning, WeightMasks, prune
from lightning_accel.bridge import model_edit
from lightning_accel.errors import Unsupported
from lightning_accel.surgery.receipt import Kept
from lightning_accel.surgery.shadows import Shadows


class Model(nn.Module):
    """Two layers of equal shape, which no shape tells from each other."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3))


class Pair(NamedTuple):
    mean: Tensor
    square: Tensor


@dataclass
class Named:
    name: str
    value: Tensor


def closure(**held: Any) -> Callable[[], Any]:
    return lambda: held


Clone = Callable[[nn.Parameter], Tensor]
FORMS: dict[str, Callable[[nn.Module, Clone], Any]] = {
    "names": lambda m, c: {n: c(p) for n, p in m.named_parameters()},
    "names of a part": lambda m, c: OrderedDict((n, c(p)) for n, p in m.net.named_parameters()),
    "names of one of two equal layers": lambda m, c: {
        n: c(p) for n, p in m.net[2].named_parameters()
    },
    "names of a wrapper": lambda m, c: {f"module.{n}": c(p) for n, p in m.named_parameters()},
    "tuples by name": lambda m, c: {n: (c(p), (c(p),)) for n, p in m.named_parameters()},
    "dicts by name": lambda m, c: {n: {"m": c(p), "v": c(p)} for n, p in m.named_parameters()},
    "objects by name": lambda m, c: {n: Pair(c(p), c(p)) for n, p in m.named_parameters()},
    "dicts by layer": lambda m, c: {
        n: {k: c(p) for k, p in layer.named_parameters()} for n, layer in m.net.named_children()
    },
    "pairs with a name": lambda m, c: [(n, c(p)) for n, p in m.named_parameters()],
    "objects with a name": lambda m, c: [Named(n, c(p)) for n, p in m.named_parameters()],
    "pairs with a parameter": lambda m, c: tuple((p, c(p)) for p in m.parameters()),
    "objects with a parameter": lambda m, c: [SimpleNamespace(p=p, ema=c(p)) for p in m.parameters()],
    "by parameter": lambda m, c: {p: (c(p), 3) for p in m.parameters()},
    "by id": lambda m, c: {id(p): [c(p)] for p in m.parameters()},
    "by number": lambda m, c: {n: c(p) for n, p in enumerate(m.parameters())},
    "in order": lambda m, c: deque(c(p) for p in m.parameters()),
    "in order, of one of two equal layers": lambda m, c: [c(p) for p in m.net[2].parameters()],
    "pairs in order": lambda m, c: [(c(p), c(p)) for p in m.parameters()],
    "lists in a tuple": lambda m, c: ([c(p) for p in m.parameters()], [c(p) for p in m.parameters()]),
    "deep": lambda m, c: ({"a": [("x", {n: c(p) for n, p in m.named_parameters()})]},),
    "an object in an object": lambda m, c: SimpleNamespace(
        a=SimpleNamespace(b={n: c(p) for n, p in m.named_parameters()})
    ),
    "several averages": lambda m, c: [
        SimpleNamespace(decay=d, kept=[c(p) for p in m.parameters()]) for d in (0.9, 0.99)
    ],
    "a closure": lambda m, c: closure(slow=[c(p) for p in m.parameters()]),
    "a closure in an object": lambda m, c: SimpleNamespace(
        f=closure(slow={n: c(p) for n, p in m.named_parameters()})
    ),
    "user's dict": lambda m, c: UserDict({n: c(p) for n, p in m.named_parameters()}),
    "parameter list": lambda m, c: nn.ParameterList([c(p) for p in m.parameters()]),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_tensor_is_cut_as_its_own_parameter(form: str) -> None:
    torch.manual_seed(0)
    model = Model()
    true: list[tuple[Tensor, str]] = []
    names = {id(p): n for n, p in model.named_parameters()}

    def clone(p: nn.Parameter) -> Tensor:
        copy: Tensor = p.detach() + 0.01 * torch.randn_like(p)
        copy = nn.Parameter(copy) if form == "parameter list" else copy
        true.append((copy, names[id(p)]))
        return copy

    held = FORMS[form](model, clone)
    kept = {
        n: Kept((torch.tensor([0, 2]) + i % 3, *[None] * (p.dim() - 1)))
        for i, (n, p) in enumerate(model.named_parameters())
        if "3" not in n
    }
    expected = [kept[n].take(t) if n in kept else t.detach().clone() for t, n in true]
    Shadows(model, {"callback": {"held": held}}).follow(kept)
    assert all(torch.equal(t, e) for (t, _), e in zip(true, expected, strict=True))


LEFT: dict[str, Callable[[nn.Module], Any]] = {
    "a history": lambda m: [{n: p.detach().clone() for n, p in m.named_parameters()}],
    "a set": lambda m: {p.detach().clone() for p in m.net[2].parameters()},
    "whole numbers": lambda m: {n: p.detach().long() for n, p in m.named_parameters()},
    "the network itself": lambda m: [m, dict(m.named_parameters()), list(m.parameters())],
    "data": lambda m: SimpleNamespace(data=TensorDataset(torch.ones(6, 6), torch.ones(6))),
}


@pytest.mark.parametrize("form", LEFT)
def test_what_is_nobodys_is_left_alone(form: str) -> None:
    model = Model()
    assert not list(Shadows(model, {"callback": {"held": LEFT[form](model)}}))


def test_averages_of_two_equal_weights_are_no_pairs_of_each() -> None:
    """Two by two tensors of one shape: rows and columns look alike, and values tell."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    fast, slow = ([p.detach() * x for p in model.parameters()] for x in (0.9, 0.8))
    for held in ((fast, slow), list(zip(fast, slow, strict=True))):
        names = {id(s.tensor): s.name for s in Shadows(model, {"a": {"held": held}})}
        assert [names[id(t)] for t in (*fast, *slow)] == ["0.weight", "1.weight"] * 2
    zeros = [[torch.zeros(4, 4) for _ in range(2)] for _ in range(2)]
    kept = {"0.weight": (torch.tensor([0]), None), "1.weight": (None, torch.tensor([0]))}
    assert Shadows(model, {"a": {"held": zeros}}).unclear(kept)


def test_of_two_equal_layers_nothing_tells_is_unclear() -> None:
    model = Model()
    fisher = {n: torch.zeros_like(p) for n, p in model.net[2].named_parameters()}
    shadows = Shadows(model, {"callback": {"fisher": fisher}})
    left, right = (torch.tensor([0, 1]), None), (torch.tensor([1, 2]), None)
    assert shadows.unclear({"net.0.weight": left, "net.2.weight": right})
    assert not shadows.unclear({"net.0.weight": left, "net.2.weight": left})
    assert not shadows.unclear({"net.3.weight": left})
    by_layer = {"net.2": fisher}  # what a name further out tells
    found = list(Shadows(model, {"callback": {"fisher": by_layer}}))
    assert [(s.name, s.rivals) for s in found] == [("net.2.weight", ()), ("net.2.bias", ())]


class LitEma(nn.Module):
    """Keeps an average in buffers whose names are the parameters' without dots."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {n: n.replace(".", "") for n, _ in model.named_parameters()}
        for name, p in model.named_parameters():
            self.register_buffer(self.names[name], p.detach().clone())
        self.register_buffer("decay", torch.tensor(0.5))

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            held = getattr(self, self.names[name])
            held.sub_((1 - self.decay) * (held - p))


class Latent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Model().net
        self.ema = LitEma(self.net)
        for name, p in self.net.named_parameters():  # as elastic weight consolidation
            self.net.register_buffer(name.replace(".", "__") + "_fisher", p.detach().square())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_buffers_under_a_name_without_dots_are_cut_as_their_parameter() -> None:
    """CompVis/latent-diffusion's `LitEma`; kuc2477/pytorch-ewc."""
    latent = Latent()
    masked = copy.deepcopy(latent)
    prune(latent, example=torch.randn(2, 6), ratio=0.5)
    for net in (latent, masked):
        net.ema(net.net)
    for name, p in latent.net.named_parameters():
        average = getattr(latent.ema, name.replace(".", ""))
        assert torch.equal(average, p)  # it was equal, and so it moves nowhere
        assert torch.equal(getattr(latent.net, name.replace(".", "__") + "_fisher"), p.square())
    assert latent.net[0].out_features == 3 and latent.ema.decay.shape == ()


# --- in a fit -----------------------------------------------------------------------------------------


class Lit(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Keeps(Callback):
    """Moves what it keeps towards the weights of the two equal layers."""

    def __init__(self, form: str) -> None:
        self.form = form

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.weights = [layer.weight for layer in pl_module.net[:3:2]]
        held = [w.detach().clone() for w in self.weights]
        self.update = lambda: [h.lerp_(w, 0.5) for h, w in zip(held, self.weights, strict=True)]
        self.look = lambda: held
        if self.form == "zeros":
            self.fisher = {n: torch.zeros_like(p) for n, p in pl_module.net[2].named_parameters()}
        if self.form == "record":
            self.first = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.update()


def fit(trainer_kwargs: dict[str, Any], *callbacks: Callback, make: type[Lit] = Lit) -> Any:
    module = make()
    data = DataLoader(TensorDataset(torch.randn(8, 6)), 4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers|.*smaller than the logging")
        Trainer(**trainer_kwargs, callbacks=[*callbacks]).fit(module, data)
    return module


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(model_edit, "rank_zero_info", lines.append)
    return lines


UNKNOWN: dict[str, Callable[[nn.Module], Any]] = {
    "other names": lambda net: {"a": net[0].weight.detach().clone()},
    "a list of averages": lambda net: [{n: p.detach().clone() for n, p in net.named_parameters()}],
    "arrays": lambda net: {n: p.detach().numpy().copy() for n, p in net.named_parameters()},
    "one tensor": lambda net: net[2].weight.detach().clone(),
}


@pytest.mark.parametrize("form", UNKNOWN)
def test_an_error_of_sizes_names_who_keeps_what_no_edit_could_follow(
    trainer_kwargs: dict[str, Any], form: str
) -> None:
    class Unknown(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            self.kept = UNKNOWN[form](pl_module.net)

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            one = self.kept[0] if form == "a list of averages" else self.kept
            one = one if form == "one tensor" else next(iter(one.values()))
            pl_module.net[2 * (form == "one tensor")].weight + torch.as_tensor(one)

    text = r"before its prune .*Found: .*size.*such tensors at `Unknown1\.kept.*Do: keep"
    with pytest.raises(RuntimeError, match=text):
        fit(trainer_kwargs, StructuredPruning(ratio=0.5, when=1), Unknown())


def test_an_error_of_the_users_own_is_left_as_it_is(trainer_kwargs: dict[str, Any]) -> None:
    class Fails(Keeps):
        def on_train_epoch_end(self, *_: Any) -> None:
            raise RuntimeError("mine, of this size")

    with pytest.raises(RuntimeError, match=r"^mine, of this size$"):
        fit(trainer_kwargs, StructuredPruning(ratio=0.5, when=1), Fails("plain"))


@pytest.mark.parametrize("edit", [StructuredPruning, WeightMasks])
def test_what_fits_two_layers_is_refused_before_anything_is_cut(
    trainer_kwargs: dict[str, Any], edit: Any
) -> None:
    given = {"ratio": 0.5} if edit is StructuredPruning else {"amount": 0.5}
    with pytest.raises(Unsupported, match=r"`Keeps1\.fisher\['weight'\]`: net\.\d\.weight, net"):
        fit(trainer_kwargs, edit(**given, when=1), Keeps("zeros"))


def test_a_record_that_is_cut_along_is_told(
    trainer_kwargs: dict[str, Any], said: list[str]
) -> None:
    keeps = Keeps("record")
    module = fit(trainer_kwargs, StructuredPruning(ratio=0.5, when=1), keeps)
    assert {n: t.shape for n, t in keeps.first.items()} == {
        n: p.shape for n, p in module.named_parameters()
    }
    assert "kept beside the weights were cut along: " in said[0]
    assert "`Keeps1.first` (5)" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("of", ["part", "whole"])
def test_a_copy_that_two_hold_is_cut_once(trainer_kwargs: dict[str, Any], of: str) -> None:
    class Holds(Callback):
        copy: Any = None

    class Moves(Holds):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            self.copy = copy.deepcopy(pl_module.net if of == "part" else pl_module)
            self.copy.requires_grad_(False)
            onlooker.copy = [self.copy] if of == "part" else self.copy

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            for held, p in zip(self.copy.parameters(), pl_module.parameters(), strict=True):
                held.lerp_(p.detach(), 0.5)

    onlooker, moves = Holds(), Moves()
    module = fit(trainer_kwargs, StructuredPruning(ratio=0.5, when=1), moves, onlooker)
    assert [p.shape for p in moves.copy.parameters()] == [p.shape for p in module.parameters()]


class Diffusion(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.ema = LitEma(self.net)

    def on_train_batch_end(self, *_: Any) -> None:
        self.ema(self.net)


def test_masks_hold_in_an_average_in_buffers(trainer_kwargs: dict[str, Any]) -> None:
    """neuralmagic/sparseml#1486: an average that is not masked is not sparse."""
    module = fit(trainer_kwargs, WeightMasks(amount=0.5, when=1), make=Diffusion)
    assert int((module.net[0].weight == 0).sum()) == 18
    assert torch.equal(module.ema.get_buffer("0weight") == 0, module.net[0].weight == 0)


def test_a_fit_with_an_average_in_buffers_is_resumed_after_a_prune(
    trainer_kwargs: dict[str, Any], tmp_path: Any
) -> None:
    def run(epochs: int, ckpt: Any = None) -> Diffusion:
        module, prunes = Diffusion(), StructuredPruning(ratio=0.5, when=1)
        trainer = Trainer(**{**trainer_kwargs, "max_epochs": epochs}, callbacks=[prunes])
        data = DataLoader(TensorDataset(torch.ones(8, 6)), 4)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers|.*smaller than the")
            warnings.filterwarnings("ignore", "Be aware that when using")
            trainer.fit(module, data, ckpt_path=ckpt)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    run(2)
    whole, resumed = run(3).state_dict(), run(3, tmp_path / "2.ckpt").state_dict()
    assert whole["ema.0weight"].shape == (3, 6)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
