"""What really steps is what is watched: optimizers inside others, and what is kept beside weights."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import FusedOptimizer, StructuredPruning, WeightMasks
from lightning_accel.errors import AccelError, Unsupported
from lightning_accel.precision import Bf16Precision
from lightning_accel.pruning import Params
from lightning_accel.surgery.optimizers import within

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (32,), generator=torch.Generator().manual_seed(2))


class Wrap(torch.optim.Optimizer):
    """Shares its groups with the one that steps, under whatever name."""

    def __init__(self, params: Any, base: Any, name: str = "base_optimizer") -> None:
        inner = base(params)
        super().__init__(inner.param_groups, {})
        self.param_groups = inner.param_groups
        setattr(self, name, {"fast": [inner]} if name == "engines" else inner)
        self.inner = lambda: inner

    def step(self, closure: Any = None) -> Any:
        return self.inner().step(closure)


class Lookahead:
    """Zhang et al. 2019, of no class of torch's, with its slow weights in lists as of the groups."""

    def __init__(self, params: Any, base: Any) -> None:
        self.optimizer = base(params)
        self.defaults, self.state = self.optimizer.defaults, self.optimizer.state
        self.param_groups = self.optimizer.param_groups
        self.slow = [[p.detach().clone() for p in g["params"]] for g in self.param_groups]
        self.count = 0

    def state_dict(self) -> Any:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.optimizer.load_state_dict(state)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step(self, closure: Any = None) -> Any:
        result = self.optimizer.step(closure)
        self.count += 1
        if self.count % 2 == 0:
            for group, slow in zip(self.param_groups, self.slow, strict=True):
                for p, held in zip(group["params"], slow, strict=True):
                    held.add_(p.detach() - held, alpha=0.5)
                    p.data.copy_(held)
        return result


class Sam(torch.optim.Optimizer):
    """Foret et al. 2021."""

    def __init__(self, params: Any, base: Any) -> None:
        super().__init__(params, {"rho": 0.05})
        self.worker = base(self.param_groups)
        self.param_groups = self.worker.param_groups

    @torch.no_grad()
    def climb(self) -> None:
        grads = [p.grad.norm() for g in self.param_groups for p in g["params"]]
        scale = 0.05 / (torch.stack(grads).norm() + 1e-12)
        for p in (p for g in self.param_groups for p in g["params"]):
            self.state[p]["old"] = p.data.clone()
            p.add_(p.grad * scale)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        closure = torch.enable_grad()(closure)
        loss = closure()
        self.climb()
        closure()
        for p in (p for g in self.param_groups for p in g["params"]):
            p.data = self.state[p]["old"]
        self.worker.step()
        return loss


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "plain": sgd,
    "base_optimizer": lambda p: Wrap(p, sgd),
    "_opt": lambda p: Wrap(p, sgd, "_opt"),
    "engines": lambda p: Wrap(p, sgd, "engines"),
    "twice": lambda p: Wrap(p, lambda q: Wrap(q, sgd, "_a"), "_b"),
    "lookahead": lambda p: Lookahead(p, sgd),
    "sam": lambda p: Sam(p, sgd),
}


class Module(LightningModule):
    def __init__(self, make: Callable[[Any], Any] = sgd) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]).float(), batch[1])

    def configure_optimizers(self) -> Any:
        return self.make(self.net.parameters())


class ByHand(Module):
    def __init__(self, make: Callable[[Any], Any] = sgd) -> None:
        super().__init__(make)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers().optimizer  # type: ignore[union-attr]

        def closure() -> Tensor:
            self.zero_grad()
            loss = Module.training_step(self, batch, batch_idx)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)


class Hidden(ByHand):
    """Makes its optimizer itself, in the first step, where nobody can find it."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.global_step and not hasattr(self, "go"):
            hidden = self.make(self.net.parameters())

            class Secret:
                __slots__ = ("run",)

            self.go = Secret()
            self.go.run = lambda f: hidden.step(f)  # type: ignore[attr-defined]

        def closure() -> Tensor:
            self.zero_grad()
            loss = Module.training_step(self, batch, batch_idx)
            self.manual_backward(loss)
            return loss

        self.go.run(closure)  # type: ignore[attr-defined]


def fit(module: LightningModule, *callbacks: Callback, epochs: int = 3, **options: Any) -> Trainer:
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=8))
    return trainer


def by_hand(
    make: Callable[[Any], Any], epochs: int, masks: dict[str, Tensor], start: int
) -> nn.Module:
    """Train with masked forward passes: an independent truth for masks and for what a prune leaves."""
    module = Module(make)
    optimizer = module.configure_optimizers()
    named = dict(module.named_parameters())
    for epoch in range(epochs):
        if epoch == start:
            for name, keep in masks.items():
                named[name].data *= keep
                _mask_memories(optimizer, named[name], list(named).index(name), keep)
        for i in range(4):

            def closure(i: int = i, epoch: int = epoch) -> Tensor:
                optimizer.zero_grad()
                loss = module.training_step((X[8 * i : 8 * i + 8], Y[8 * i : 8 * i + 8]), i)
                loss.backward()
                for name, keep in masks.items() if epoch >= start else ():
                    named[name].grad *= keep  # type: ignore[operator]
                return loss

            optimizer.step(closure)
    return module


def _mask_memories(optimizer: Any, p: nn.Parameter, index: int, keep: Tensor) -> None:
    for one in within(optimizer):
        for value in one.state.get(p, {}).values():
            value *= keep
    if isinstance(optimizer, Lookahead):
        optimizer.slow[0][index] *= keep


@pytest.mark.slow
@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("kind", [Module, ByHand])
def test_masks_hold_in_optimizers_inside_others(name: str, kind: type[Module]) -> None:
    masks = WeightMasks(amount=0.5, when=1)
    module = kind(WRAPPERS[name])
    fit(module, masks)
    true = by_hand(WRAPPERS[name], 3, masks.masks, start=1)
    for key, keep in masks.masks.items():
        assert not module.get_parameter(key)[~keep].any()
    for key, p in module.named_parameters():
        torch.testing.assert_close(p, true.get_parameter(key))


class Closed(ByHand):
    """Lookahead as two functions and a list, in closures that no attribute holds but one with slots."""

    def __init__(self, inner: Callable[[Any], Any]) -> None:
        super().__init__(inner)
        self.sync: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if self.sync is None:
            self.sync = Secret(looking_ahead(self.make(self.net.parameters())))
        self.zero_grad()
        self.manual_backward(Module.training_step(self, batch, batch_idx))
        self.sync.run()


class Secret:
    __slots__ = ("run",)

    def __init__(self, run: Any) -> None:
        self.run = run


def looking_ahead(inner: Any) -> Callable[[], None]:
    slow = [p.detach().clone() for g in inner.param_groups for p in g["params"]]
    count = iter(range(1, 1000))

    def meet() -> None:
        for p, held in zip(inner.param_groups[0]["params"], slow, strict=True):
            held.add_(p.detach() - held, alpha=0.5)
            p.data = held.clone()  # as some write it; with the old shape it would undo the cut

    def step() -> None:
        inner.step()
        if next(count) % 2 == 0:
            meet()

    return step


class Cuts(Callback):
    """Remembers which hidden units stayed."""

    kept: Tensor

    def on_model_edit_end(self, trainer: Any, pl_module: Any, receipt: Any) -> None:
        move = next(m for m in receipt.moved if m.name == "net.0.weight")
        self.kept = move.kept.dims[0]


def masks_of(kept: Tensor) -> dict[str, Tensor]:
    unit = torch.zeros(16)
    unit[kept] = 1
    return {
        "net.0.weight": unit[:, None].expand(16, 8),
        "net.0.bias": unit,
        "net.2.weight": unit.expand(3, 16),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Module, ByHand, Hidden])
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_prune_is_followed_by_every_optimizer(name: str, kind: type[Module]) -> None:
    module, cuts = kind(WRAPPERS[name]), Cuts()
    example = X[:2]
    fit(module, StructuredPruning(ratio=0.5, compensate=False, when=1, example=example), cuts)
    true = by_hand(WRAPPERS[name], 3, masks_of(cuts.kept), start=1)
    assert module.net[0].weight.shape == (8, 8)
    torch.testing.assert_close(module.net[0].weight, true.net[0].weight[cuts.kept])
    torch.testing.assert_close(module.net[2].weight, true.net[2].weight[:, cuts.kept])


class Freezes(Callback):
    """Keeps the collector away from what is there, as is done before workers fork."""

    def on_train_epoch_start(self, *_: Any) -> None:
        gc.freeze()

    def on_fit_end(self, *_: Any) -> None:
        assert gc.get_freeze_count()
        gc.unfreeze()


@pytest.mark.slow
@pytest.mark.parametrize("others", [[], [Freezes]], ids=["", "frozen"])
def test_lookahead_in_closures_follows_a_prune_and_masks(others: list[Any]) -> None:
    module, cuts = Closed(sgd), Cuts()
    made = [other() for other in others]
    fit(module, *made, StructuredPruning(ratio=0.5, compensate=False, when=1, example=X[:2]), cuts)
    true = by_hand(WRAPPERS["lookahead"], 3, masks_of(cuts.kept), start=1)
    torch.testing.assert_close(module.net[0].weight, true.net[0].weight[cuts.kept])
    torch.testing.assert_close(module.net[2].weight, true.net[2].weight[:, cuts.kept])
    module, masks = Closed(sgd), WeightMasks(amount=0.5, when=1)
    fit(module, masks)
    true = by_hand(WRAPPERS["lookahead"], 3, masks.masks, start=1)
    for key, p in module.named_parameters():
        torch.testing.assert_close(p, true.get_parameter(key))


def test_weights_of_before_a_prune_that_come_back_end_the_fit() -> None:
    class Revives(Module):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 0:
                OLD[:] = [p.detach().clone() for p in self.net.parameters()]

        def on_train_batch_end(self, *_: Any) -> None:
            if self.trainer.is_last_batch and self.current_epoch == 1:
                for p, old in zip(self.net.parameters(), OLD, strict=True):
                    p.data = old

    with pytest.raises(AccelError, match="were put back into the pruned network"):
        fit(Revives(), StructuredPruning(ratio=0.5, when=1))


OLD: list[Tensor] = []  # a name of a file, where no edit looks


@pytest.mark.parametrize("kind", [Module, ByHand, Hidden])
@pytest.mark.parametrize("name", ["base_optimizer", "_opt", "engines", "twice"])
def test_masters_move_as_with_the_bare_optimizer(name: str, kind: type[Module]) -> None:
    found = []
    for make in (sgd, WRAPPERS[name]):
        plugin, module = Bf16Precision("master"), kind(make)
        fit(module, plugins=[plugin])
        found.append({k: v.clone() for k, v in plugin.masters().items()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


class Slots:
    """An optimizer of nobody's: its step is seen by no hook."""

    def __init__(self, params: Any) -> None:
        self.param_groups = [{"params": list(params), "lr": 0.1}]
        self.state: dict[Any, Any] = {}
        self.defaults: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def zero_grad(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = None

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.data.sub_(p.grad, alpha=0.1)
        return loss


class Keyed(Lookahead):
    """Keeps its slow weights by parameter, and the parameters once more in a list of its own."""

    def __init__(self, params: Any, base: Any) -> None:
        super().__init__(params, base)
        self.mine = [p for g in self.param_groups for p in g["params"]]
        self.by_parameter = {p: p.detach().clone() for p in self.mine}

    def step(self, closure: Any = None) -> Any:
        result = self.optimizer.step(closure)
        self.count += 1
        for p in self.mine if self.count % 2 == 0 else ():
            slow = self.by_parameter[p]
            slow.add_(p.detach() - slow, alpha=0.5)
            p.data.copy_(slow)
        return result


class Late(torch.optim.Optimizer):
    """Of torch's class; makes its slow weights in its state, when first needed."""

    def __init__(self, params: Any, base: Any) -> None:
        self.fast = base(params)
        super().__init__(self.fast.param_groups, {})
        self.param_groups = self.fast.param_groups

    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("slow", p.detach().clone())
        result = self.fast.step(closure)
        self.state[self.param_groups[0]["params"][0]].setdefault("count", [0])[0] += 1
        count = self.state[self.param_groups[0]["params"][0]]["count"][0]
        for p in self.param_groups[0]["params"] if count % 2 == 0 else ():
            slow = self.state[p]["slow"]
            slow.add_(p.detach() - slow, alpha=0.5)
            p.data.copy_(slow)
        return result


def slowly(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-3, momentum=0.9)


LOOKING_AHEAD: dict[str, Callable[[Any], Any]] = {
    "lists": lambda p: Lookahead(p, slowly),
    "dict": lambda p: Keyed(p, slowly),
    "state": lambda p: Late(p, slowly),
    "sam": lambda p: Sam(p, slowly),
    "of nobody's class": Slots,
}


def masters_by_hand(make: Callable[[Any], Any], epochs: int = 3) -> dict[str, Tensor]:
    """Step an optimizer on float32 weights, with gradients of a network of their roundings."""
    full = Module(make)
    short = copy.deepcopy(full).bfloat16()
    optimizer = full.configure_optimizers()
    for i in list(range(4)) * epochs:

        def closure(i: int = i) -> Tensor:
            short.load_state_dict(full.state_dict())
            short.zero_grad()
            loss = short.training_step((X[8 * i : 8 * i + 8].bfloat16(), Y[8 * i : 8 * i + 8]), i)
            loss.backward()
            for p, q in zip(full.parameters(), short.parameters(), strict=True):
                p.grad = q.grad.float()  # type: ignore[union-attr]
            return loss

        optimizer.step(closure)
    return {name: p.detach() for name, p in full.named_parameters()}


@pytest.mark.parametrize("name", LOOKING_AHEAD)
def test_masters_learn_what_float32_weights_do(name: str) -> None:
    plugin, module = Bf16Precision("master"), Module(LOOKING_AHEAD[name])
    before = {k: v.detach().clone() for k, v in module.named_parameters()}
    fit(module, plugins=[plugin])
    true, found = masters_by_hand(LOOKING_AHEAD[name]), plugin.masters()
    assert found.keys() == true.keys()
    for key, value in true.items():
        assert torch.equal(found[key], value), key
        assert (value - before[key]).abs().max() > 1e-5


class PastLightning(ByHand):
    """Steps Lookahead itself, whose synchronisation is seen by nobody."""


class SgdByHand(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for p in self.parameters():
            p.data -= 0.1 * p.grad  # type: ignore[operator]


class Loop(Module):
    """Automatic optimization, with a second rule by hand beside it."""

    def on_train_batch_end(self, *_: Any) -> None:
        self.net[0].weight.data.mul_(0.9)


@pytest.mark.parametrize("kind", ["master", "stochastic"])
@pytest.mark.parametrize(
    "make", [lambda: PastLightning(WRAPPERS["lookahead"]), SgdByHand, Loop], ids="psl"
)
def test_weights_that_are_computed_in_eight_bits_are_refused(
    make: Callable[[], Module], kind: str
) -> None:
    with pytest.raises(Unsupported, match="outside of an optimizer step, with the eight bits"):
        fit(make(), plugins=[Bf16Precision(kind)])


@pytest.mark.slow
def test_weights_that_are_set_again_and_again_are_not() -> None:
    class Clips(Module):
        def on_train_batch_end(self, *_: Any) -> None:
            for p in self.parameters():
                p.data.clamp_(-0.1, 0.1)

    for kind in ("master", "stochastic"):
        fit(Clips(), WeightMasks(amount=0.5), plugins=[Bf16Precision(kind)])


def test_an_optimizer_that_holds_weights_where_nobody_finds_them_is_refused() -> None:
    class Around(Slots):
        def __init__(self, params: Any) -> None:
            super().__init__(params)
            held = self.param_groups[0]["params"][:]
            self.held = lambda: held

        def step(self, closure: Any = None) -> Any:
            loss = closure()
            for p in self.held():
                p.data.sub_(p.grad, alpha=0.1)
            return loss

    with pytest.raises(Unsupported, match="outside of its `param_groups`"):
        fit(Module(Around), plugins=[Bf16Precision("master")])


def test_a_step_that_nobody_sees_is_held_by_masks() -> None:
    masks, module = WeightMasks(amount=0.5), Module(Slots)
    fit(module, masks)
    assert all(not module.get_parameter(k)[~m].any() for k, m in masks.masks.items())


def test_fused_reaches_the_optimizer_inside() -> None:
    module = Module(WRAPPERS["base_optimizer"])
    fused = FusedOptimizer("foreach")
    fit(module, fused, epochs=1)
    assert len(fused.receipt.changes) == 1


class Ema(Callback):
    """Keeps an average of the inner network, in a form of one's own."""

    def __init__(self, form: str) -> None:
        self.form = form
        self.kept: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        net = pl_module.net
        values = {n: p.detach().clone() for n, p in net.named_parameters()}
        forms = {"dict": values, "list": list(values.values()), "id": None, "module": None}
        self.kept = forms.get(self.form)
        if self.form == "id":
            self.kept = {id(p): values[n] for n, p in net.named_parameters()}
        if self.form == "module":
            self.kept = copy.deepcopy(net).requires_grad_(False)
        if self.form == "averaged":
            self.kept = AveragedModel(net, avg_fn=get_ema_avg_fn(0.5))

    def tensors(self) -> list[Tensor]:
        if isinstance(self.kept, nn.Module):
            return list(self.kept.parameters())
        return list(self.kept) if self.form == "list" else list(self.kept.values())

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if isinstance(self.kept, AveragedModel):
            self.kept.update_parameters(pl_module.net)
            return
        for held, p in zip(self.tensors(), pl_module.net.parameters(), strict=True):
            held.lerp_(p, 0.5)


def true_average(kept: Tensor, first_is_copy: bool) -> list[Tensor]:
    """Average a masked dense twin, by hand."""
    module = Module()
    optimizer = module.configure_optimizers()
    average = [p.detach().clone() for p in module.parameters()]
    masks = masks_of(kept)
    first = first_is_copy
    for epoch in range(3):
        if epoch == 1:
            for name, p in module.named_parameters():
                p.data *= masks.get(name, torch.ones(()))
        for i in range(4):
            optimizer.zero_grad()
            loss = module.training_step((X[8 * i : 8 * i + 8], Y[8 * i : 8 * i + 8]), i)
            loss.backward()
            for name, p in module.named_parameters():
                if epoch >= 1:
                    p.grad *= masks.get(name, torch.ones(()))  # type: ignore[operator]
            if epoch == 1 and i == 0:
                for name, p in module.named_parameters():
                    optimizer.state[p]["momentum_buffer"] *= masks.get(name, torch.ones(()))
            optimizer.step()
            for held, p in zip(average, module.parameters(), strict=True):
                held.copy_(p.detach()) if first else held.lerp_(p.detach(), 0.5)
            first = False
    unit = kept
    return [average[0][unit], average[1][unit], average[2][:, unit], average[3]]


@pytest.mark.parametrize("form", ["dict", "list", "id", "module", "averaged"])
def test_averages_of_a_part_follow_a_prune(form: str) -> None:
    ema, cuts, module = Ema(form), Cuts(), Module()
    fit(module, StructuredPruning(ratio=0.5, compensate=False, when=1), cuts, ema)
    held = ema.kept.module.parameters() if form == "averaged" else ema.tensors()
    for found, true in zip(held, true_average(cuts.kept, form == "averaged"), strict=True):
        torch.testing.assert_close(found, true)


class Byol(Module):
    """A target that moves with the network, inside of the module (Grill et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.target = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            aim = self.target(batch[0])
        return (self.net(batch[0]) - aim - 0.1).square().mean()

    @torch.no_grad()
    def on_train_batch_end(self, *_: Any) -> None:
        for held, p in zip(self.target.parameters(), self.net.parameters(), strict=True):
            held.lerp_(p, 0.5)


def test_a_target_inside_the_module_is_cut_where_its_network_is() -> None:
    module, cuts = Byol(), Cuts()
    fit(module, StructuredPruning(ratio=0.5, compensate=False, when=1), cuts, epochs=2)
    assert module.target[0].weight.shape == (8, 8)
    for held, p in zip(module.target.parameters(), module.net.parameters(), strict=True):
        assert (held - p).abs().max() < 0.05  # channels of one kept, others of the other, would not


class Taught(Module):
    """A larger teacher, inside of the module, which nobody prunes."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(8, 300).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            aim = self.teacher(batch[0])[:, :3]
        return (self.net(batch[0]) - aim).square().mean()


@pytest.mark.parametrize("kind", [Byol, Taught])
@pytest.mark.parametrize("share", [0.6, 0.9])
def test_a_share_of_the_parameters_leaves_averages_and_teachers_out(
    kind: type[Module], share: float
) -> None:
    bare, module = Module(), kind()
    for one in (bare, module):
        fit(one, StructuredPruning(target=Params(share), when=1), epochs=2)
    assert module.net[0].weight.shape == bare.net[0].weight.shape


@pytest.mark.filterwarnings("ignore:StructuredPruning cuts before the first step")
def test_a_copy_of_which_nothing_is_known_is_refused_at_start() -> None:
    with pytest.raises(Unsupported, match="has not moved yet"):
        fit(Byol(), StructuredPruning(ratio=0.5, when=0))


def test_a_vector_of_all_weights_is_refused_at_start() -> None:
    class Flat(Module):
        def on_fit_start(self) -> None:
            self.anchor = nn.utils.parameters_to_vector(self.net.parameters()).detach()

    with pytest.raises(Unsupported, match="a vector of all weights"):
        fit(Flat(), StructuredPruning(ratio=0.5, when=2))


class Norms(Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))


@pytest.mark.parametrize("options", [{"precision": "bf16-true"}, {"precision": "64-true"}, {}])
def test_an_average_beside_a_true_precision_and_a_prune(options: dict[str, Any]) -> None:
    options = options or {"plugins": [Bf16Precision("master")]}
    module = Norms()
    fit(module, StructuredPruning(ratio=0.5, when=1), EMAWeightAveraging(decay=0.9), **options)
    assert module.net[0].weight.shape == (8, 8)
    assert torch.isfinite(module.net[1].running_mean).all()


class Anew(Module):
    """Makes its optimizers anew before epoch 1, as when another part is trained from then on."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.trainer.strategy.setup_optimizers(self.trainer)


class Unfreezes(Module):
    """Gives its first layer to the running optimizer before epoch 1 (BackboneFinetuning)."""

    def __init__(self, make: Callable[[Any], Any] = sgd) -> None:
        super().__init__(make)
        self.net[0].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return self.make(p for p in self.parameters() if p.requires_grad)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.join(self.optimizers().optimizer)  # type: ignore[union-attr]

    def join(self, optimizer: Any) -> None:
        self.net[0].requires_grad_(True)
        optimizer.add_param_group({"params": list(self.net[0].parameters())})


def in_mid_training(kind: type[Module], short: bool, kept: Tensor | None = None) -> nn.Module:
    """Do by hand what the two do, with masks from epoch 2 on; `short` computes on roundings."""
    full = kind()
    optimizer, masks = full.configure_optimizers(), {} if kept is None else masks_of(kept)
    named = dict(full.named_parameters())
    for step in range(16):
        if step == 4 and kind is Anew:
            optimizer = full.configure_optimizers()
        elif step == 4:
            full.join(optimizer)
            if short:  # frozen weights are the roundings that the network computed with
                full.net[0].to(torch.bfloat16).to(torch.float32)
        if step == 8:
            for name, keep in masks.items():
                named[name].data *= keep
                _mask_memories(optimizer, named[name], 0, keep)
        i = 8 * (step % 4)
        net = copy.deepcopy(full).to(torch.bfloat16 if short else torch.float32)
        x = X[i : i + 8].to(net.net[2].weight.dtype)
        net.training_step((x, Y[i : i + 8]), 0).backward()
        for (name, p), q in zip(named.items(), net.parameters(), strict=True):
            keep = masks.get(name, torch.ones(())) if step >= 8 else torch.ones(())
            p.grad = None if q.grad is None else q.grad.float() * keep
        optimizer.step()
    return full


@pytest.mark.parametrize("kind", [Anew, Unfreezes])
def test_optimizers_that_come_or_grow_in_mid_training(kind: type[Module]) -> None:
    module, cuts = kind(), Cuts()
    fit(module, StructuredPruning(ratio=0.5, compensate=False, when=2), cuts, epochs=4)
    true = in_mid_training(kind, short=False, kept=cuts.kept)
    torch.testing.assert_close(module.net[0].weight, true.net[0].weight[cuts.kept])
    torch.testing.assert_close(module.net[2].weight, true.net[2].weight[:, cuts.kept])
    module, masks = kind(), WeightMasks(amount=0.5, when=2)
    fit(module, masks, epochs=4)
    assert all(not module.get_parameter(k)[~m].any() for k, m in masks.masks.items())
    plugin = Bf16Precision("master")
    fit(kind(), plugins=[plugin], epochs=4)
    true = in_mid_training(kind, short=True)
    for name, found in plugin.masters().items():
        assert torch.equal(found, true.get_parameter(name)), name


def test_a_state_loaded_into_a_new_optimizer_is_stepped_in_float32() -> None:
    class Carries(Anew):
        def on_train_epoch_start(self) -> None:
            old = self.trainer.optimizers[0].state_dict()
            super().on_train_epoch_start()
            if self.current_epoch == 1:
                self.trainer.optimizers[0].load_state_dict(old)

    plugin, module = Bf16Precision("master"), Carries(lambda p: torch.optim.Adam(p, lr=1e-3))
    fit(module, plugins=[plugin])
    state = module.trainer.optimizers[0].state[module.net[0].weight]
    assert state["exp_avg"].dtype == torch.float32


def test_a_step_that_would_train_the_module_from_its_copy_is_refused() -> None:
    """What a closure holds belongs to the original, whoever calls it; with an `example` no step has to be tried."""
    module = Hidden()
    with pytest.raises(AccelError, match="would train the module itself.*pass `example=`"):
        fit(module, StructuredPruning(ratio=0.5, when=1))
    true = by_hand(WRAPPERS["plain"], 1, {}, start=1)  # one epoch, and no step beside
    torch.testing.assert_close(module.net[0].weight, true.net[0].weight)
