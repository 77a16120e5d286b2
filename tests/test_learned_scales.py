"""Scales that learn: slopes by the formula of LSQ, steps by hand, and fits that go on, are cut, share and stay the user's."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import QuantizationAwareTraining, StructuredPruning
from lightning_accel.errors import Unsupported
from lightning_accel.quantization import learned as learned_module
from lightning_accel.quantization import quantization_of
from lightning_accel.quantization.grid import Grid
from lightning_accel.quantization.layers import become, layers_of
from lightning_accel.quantization.learned import ScaleLearner

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"
)


def by_formula(weight: Tensor, scale: Tensor, slope: Tensor, top: int) -> Tensor:
    """Return LSQ's slope of each scale (arXiv:1902.08153, equation 3): weight (channels, ...)."""
    ratio = weight.detach().flatten(1) / scale.detach()[:, None]
    inside = ratio.round() - ratio
    ends = torch.where(ratio < 0, -float(top), float(top))
    by_scale = torch.where((ratio >= -top) & (ratio <= top), inside, ends)
    return (slope.flatten(1) * by_scale).sum(1)


@pytest.mark.parametrize("word", ["int2", "int4", "int8"])
@pytest.mark.parametrize("kind", ["linear", "groups", "conv", "transposed", "attention"])
def test_slopes_of_scales_are_those_of_the_paper(word: str, kind: str) -> None:
    torch.manual_seed(0)
    layer: Any = {
        "linear": lambda: nn.Linear(12, 5),
        "groups": lambda: nn.Linear(12, 5),
        "conv": lambda: nn.Conv2d(4, 6, 3, groups=2),
        "transposed": lambda: nn.ConvTranspose2d(4, 6, 3),
        "attention": lambda: nn.MultiheadAttention(8, 2),
    }[kind]()
    made: Any = become(layer, Grid(word, None, 4 if kind == "groups" else None), "training")
    ScaleLearner().begin({"": made})
    with torch.no_grad():
        made.accel_scale *= 0.6  # some weights lie outside
    shape = {"linear": (7, 12), "groups": (7, 12), "attention": (3, 2, 8)}.get(kind, (2, 4, 5, 5))
    x, kept = torch.randn(shape), []
    parts = made.quantized_parts

    def noting() -> list[Tensor]:
        kept[:] = parts()
        for part in kept:
            part.retain_grad()
        return kept

    made.quantized_parts = noting
    out = made(x, x, x)[0] if kind == "attention" else made(x)
    out.square().sum().backward()
    found = made.accel_scale.grad
    axis, top, wanted = made.channels_axis, made.accel_grid.top, []
    scales = made.accel_scale.flatten() if kind == "groups" else made.accel_scale
    for weight, part in zip(made.parts(), kept, strict=True):
        rows, slope = weight.transpose(0, axis), part.grad.transpose(0, axis)
        if kind == "groups":
            rows, slope = rows.reshape(-1, 4), slope.reshape(-1, 4)
        own, scales = scales[: len(rows)], scales[len(rows) :]
        wanted.append(by_formula(rows, own, slope, top))
    torch.testing.assert_close(found.flatten(), torch.cat(wanted), rtol=2e-3, atol=1e-4)
    made.accel_mode = "quantized"
    with torch.no_grad():  # what it learns on is what it is deployed with
        assert all(torch.equal(a, b) for a, b in zip(kept, parts(), strict=True))


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(32, 6, generator=generator)
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), 8)


def learning(**more: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining("int2", None, scales="learned", **more)


def fit(kwargs: dict[str, Any], *callbacks: Any, ckpt: Any = None, **more: Any) -> Any:
    torch.manual_seed(0)
    module = tiny.Layers()
    trainer = Trainer(**kwargs | {"max_epochs": 3, **more}, callbacks=[*callbacks])
    trainer.fit(module, loader(), ckpt_path=ckpt, weights_only=True)
    return module, trainer


def test_a_fit_is_that_of_a_loop_by_hand(trainer_kwargs: dict[str, Any]) -> None:
    user, trainer = fit(trainer_kwargs, learning(), max_epochs=2, accumulate_grad_batches=2)
    torch.manual_seed(0)
    hand = tiny.Layers()
    scales = [
        become(copy.deepcopy(hand.net[i]), Grid("int2", None)) for i in (0, 2)
    ]  # which finds the scales to begin with
    for layer in scales:
        layer.fit_scale()
    steps = [layer.weight_scale().clone().requires_grad_() for layer in scales]
    sizes = [float(step.detach().mean()) for step in steps]
    adam = [
        torch.optim.Adam([s], learned_module.RATE * m) for s, m in zip(steps, sizes, strict=True)
    ]
    sgd = torch.optim.SGD(hand.parameters(), 0.1)

    def rounds(weight: Tensor, step: Tensor) -> Tensor:
        clipped = (weight / step[:, None]).clamp(-1, 1)
        return (clipped + (clipped.round() - clipped).detach()) * step[:, None]

    for _ in range(2):
        for index, (x, y) in enumerate(loader()):
            hidden = F.relu(F.linear(x, rounds(hand.net[0].weight, steps[0]), hand.net[0].bias))
            out = F.linear(hidden, rounds(hand.net[2].weight, steps[1]), hand.net[2].bias)
            (F.cross_entropy(out, y) / 2).backward()
            if index % 2:
                for optimizer in (*adam, sgd):
                    optimizer.step()
                    optimizer.zero_grad()
    for mine, theirs in zip(user.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    for layer, step in zip(layers_of(user).values(), steps, strict=True):
        assert layer.accel_scale is not None and not layer.accel_scale.requires_grad
        torch.testing.assert_close(layer.accel_scale, step.detach(), rtol=1e-4, atol=1e-6)
    (own,) = trainer.optimizers
    assert {id(p) for g in own.param_groups for p in g["params"]} == {*map(id, user.parameters())}
    assert [*user.state_dict()] == [*tiny.Layers().state_dict()]


def test_another_fit_begins_anew(trainer_kwargs: dict[str, Any]) -> None:
    callback = learning()
    first, second = (fit(trainer_kwargs, callback)[0] for _ in range(2))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("stop", [5, 8])
@pytest.mark.parametrize("freeze", [None, 2])
def test_a_fit_goes_on(
    trainer_kwargs: dict[str, Any], tmp_path: Path, stop: int, freeze: int | None
) -> None:
    class Saves(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == stop:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    same = {"limit_train_batches": 1, "max_epochs": 10} if stop == 5 else {}
    when = {"when": 1} | ({} if freeze is None else {"freeze": 9 if same else freeze})
    through, _ = fit(trainer_kwargs, learning(**when), Saves(), **same)
    again, _ = fit(trainer_kwargs, learning(**when), ckpt=str(tmp_path / "middle.ckpt"), **same)
    for one, other in zip(through.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    ours, theirs = (quantization_of(module) for module in (through, again))
    assert all(torch.equal(ours[name]["scale"], theirs[name]["scale"]) for name in ours)


def test_a_prune_in_mid_training_goes_on_with_scales_of_what_is_left(
    trainer_kwargs: dict[str, Any],
) -> None:
    class Looks(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            seen.append([m.accel_scale.detach().clone() for m in layers_of(pl_module).values()])

    seen: list[list[Tensor]] = []
    prunes = StructuredPruning(0.5, when=2)
    fit(trainer_kwargs, learning(when=1), prunes, Looks(), max_epochs=4)
    sizes = [[len(scale) for scale in scales] for scales in seen if scales]
    assert sizes[-1] == [8, 3] and [16, 3] in sizes
    for before, after in zip(seen[-4:-1], seen[-3:], strict=True):
        assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_what_does_not_learn_stays_and_what_is_not_finite_is_left_out() -> None:
    layers: Any = {
        str(i): become(nn.Linear(4, 2), Grid("int2", None), "training") for i in range(2)
    }
    layers["1"].weight.requires_grad_(False)
    learner = ScaleLearner()
    learner.begin(layers)
    before = [layer.accel_scale.detach().clone() for layer in layers.values()]
    for value, moves in ((torch.inf, False), (1.0, True)):
        sum(layer(torch.ones(1, 4) * value).sum() for layer in layers.values()).backward()
        learner.step(layers, rates={"0": 0.1, "1": 0.1}, by=1024.0)
        assert torch.equal(layers["0"].accel_scale, before[0]) != moves
        assert torch.equal(layers["1"].accel_scale, before[1])
        assert layers["0"].accel_scale.grad is None


def test_arguments_of_scales_are_checked() -> None:
    with pytest.raises(ValueError, match="`scales`"):
        QuantizationAwareTraining(scales="LSQ")
    trainer = Trainer(accelerator="cpu", strategy="accel_fsdp", devices=1, logger=False)
    with pytest.raises(Unsupported, match="learned scales of int8 weights"):
        QuantizationAwareTraining(scales="learned").setup(trainer, tiny.Layers(), "fit")


class Game(LightningModule):
    """Two networks that play against each other, each with an optimizer of its own, as most people write it."""

    def __init__(self, clears: str) -> None:
        super().__init__()
        self.automatic_optimization, self.clears = False, clears
        self.maker, self.judge = nn.Linear(6, 4), nn.Linear(4, 2)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        one, other = self.optimizers()
        for optimizer, sign, own in ((one, 1.0, self.maker), (other, -1.0, self.judge)):
            if self.clears == "toggled":
                self.toggle_optimizer(optimizer)
            if self.clears == "module":
                self.zero_grad(set_to_none=False)
            else:
                optimizer.zero_grad()
            if self.clears == "probed":  # a backward that nobody steps
                self.manual_backward(own.weight.sum() + self.judge(self.maker(batch[0])).sum())
                self.zero_grad()
            self.manual_backward(sign * self.judge(self.maker(batch[0])).square().mean())
            optimizer.step()
            if self.clears == "toggled":
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), 0.1) for net in (self.maker, self.judge)]


@pytest.mark.parametrize("clears", ["optimizer", "module", "probed"])
def test_gradients_that_the_user_lets_go_move_no_scale(
    trainer_kwargs: dict[str, Any], clears: str
) -> None:
    found = []
    for how in ("toggled", clears):
        torch.manual_seed(0)
        game = Game(how)
        Trainer(**trainer_kwargs | {"max_epochs": 2}, callbacks=[learning()]).fit(game, loader())
        found.append([layer.weight_scale() for layer in layers_of(game).values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


RATES = [0.02, 0.1, 0.05, 0.0, 0.01]


@pytest.mark.parametrize("initial", [0.02, 1.0, 0.1])
def test_scales_follow_the_rates_of_their_weights_and_not_how_a_scheduler_makes_them(
    initial: float,
) -> None:
    """OneCycleLR begins at a 25th of its highest rate, and a LambdaLR may begin with one."""
    layer: Any = become(nn.Linear(4, 2), Grid("int2", None), "training")
    other: Any = become(nn.Linear(4, 2), Grid("int2", None), "training")
    torch.manual_seed(1)
    learner, moves = ScaleLearner(), []
    learner.begin({"a": layer, "b": other})
    groups = [{"params": [other.weight]}, {"params": [layer.weight], "initial_lr": initial}]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    callback = learning()
    callback._learner = learner
    trainer = SimpleNamespace(precision_plugin=None, world_size=1)
    module: Any = nn.ModuleDict({"a": layer, "b": other})
    for rate in RATES:
        optimizer.param_groups[1]["lr"] = rate
        before = other.accel_scale.detach().clone()
        (layer(torch.ones(1, 4)).sum() + other(torch.ones(1, 4)).sum()).backward()
        callback.on_before_optimizer_step(trainer, module, optimizer)  # type: ignore[arg-type]
        group = learner._optimizers["a"].param_groups[0]
        moves.append(group["lr"] / group["size"] / learned_module.RATE)
        assert torch.equal(other.accel_scale, before), "its weights do not move either"
    assert moves == pytest.approx([1.0, 1.0, 0.5, 0.0, 0.1])
