"""Masks against brute force, against `torch.nn.utils.prune`, and through cuts, resume and two processes."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pytest
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel.bridge import commit
from lightning_accel.bridge.restore import register
from lightning_accel.errors import NoEffect
from lightning_accel.pruning import WeightMasks
from lightning_accel.pruning.graph import Graph
from lightning_accel.pruning.masks import (
    apply_masks,
    follow_masks,
    hold,
    hold_gradients,
    magnitude_masks,
    pattern_masks,
    two_of_four,
    zero_share,
)
from lightning_accel.surgery import Receipt, Select, twin
from lightning_accel.surgery.call import Call

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]

# --- which weights ----------------------------------------------------------------------------


def test_the_smallest_share_of_each_layer_is_masked() -> None:
    net = tiny.ConvNet()
    masks = magnitude_masks(net, amount=0.3)
    weights = {n: p for n, p in net.named_parameters() if p.dim() > 1}
    assert masks.keep.keys() == weights.keys() and not masks.skipped
    for name, keep in masks.keep.items():
        size = weights[name].detach().abs()
        assert (~keep).sum() == math.floor(0.3 * keep.numel())
        assert size[~keep].max() < size[keep].min()


def test_the_global_scope_masks_the_smallest_of_all() -> None:
    net = tiny.MLP()
    masks = magnitude_masks(net, amount=0.6, scope="global").keep
    sizes = {n: net.get_parameter(n).detach().abs() for n in masks}
    everything = torch.cat([size.flatten() for size in sizes.values()]).sort().values
    threshold = everything[math.floor(0.6 * len(everything))]
    assert all(torch.equal(masks[name], size >= threshold) for name, size in sizes.items())
    shares = {round(zero_share({name: keep}), 2) for name, keep in masks.items()}
    assert len(shares) == 3


@pytest.mark.parametrize("shape", [(3, 8), (2, 8, 3), (2, 4, 3, 3)])
def test_two_of_four_keeps_the_pair_with_the_largest_sum(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    keep = two_of_four(weight)
    assert keep.shape == weight.shape
    others = [range(n) for i, n in enumerate(shape) if i != 1]
    for out, *place in itertools.product(*others):
        for start in range(0, shape[1], 4):
            index = (out, slice(start, start + 4), *place)
            best = max(
                itertools.combinations(range(4), 2),
                key=lambda pair, four=weight[index]: float(four[list(pair)].abs().sum()),
            )
            assert keep[index].nonzero().flatten().tolist() == list(best)


def test_layers_that_cannot_take_a_mask_are_named_with_the_reason() -> None:
    net = nn.Sequential(
        nn.Linear(8, 6), nn.Linear(6, 4), nn.Linear(4, 4),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Unflatten(1, (4, 1)),
        nn.ConvTranspose1d(4, 4, 1),
    )  # fmt: skip
    net[2].weight.requires_grad_(False)
    masks = pattern_masks(net)
    assert list(masks.keep) == ["0.weight"]
    reasons = {change.name: change.what for change in masks.skipped}
    assert reasons == {
        "1.weight": "its 6 inputs are no multiple of 4",
        "2.weight": "it is frozen",
        "3.weight": "its weight is computed by a parametrization",
        "5.weight": "no kernel skips zeros of transposed convolutions",
    }
    assert list(magnitude_masks(net, amount=0.5).keep) == ["0.weight", "1.weight", "5.weight"]


def test_only_selected_layers_are_masked_and_tied_ones_once() -> None:
    net = tiny.TiedLM()
    assert list(magnitude_masks(net, amount=0.5, select=Select.of("hidden.*")).keep) == [
        "hidden.0.weight",
        "hidden.2.weight",
    ]
    net.again = nn.Linear(8, 16)
    net.again.weight = net.hidden[0].weight
    names = list(magnitude_masks(net, amount=0.5, select=Select.of(["hidden.*", "again"])).keep)
    assert names == ["hidden.0.weight", "hidden.2.weight"]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda net: magnitude_masks(net, amount=0.0), ValueError, "`amount`"),
        (lambda net: magnitude_masks(net, amount=float("nan")), ValueError, "`amount`"),
        (lambda net: magnitude_masks(net, amount=True), TypeError, "`amount`"),
        (lambda net: magnitude_masks(net, amount=0.5, scope="some"), ValueError, "'local', 'global'"),
        (lambda net: magnitude_masks(net, amount=0.001), NoEffect, "amount=0.001"),
        (lambda net: magnitude_masks(net[1:], amount=0.5), NoEffect, "no selected linear layer"),
        (lambda net: pattern_masks(net, pattern="4:8"), ValueError, "2:4"),
        (lambda net: pattern_masks(nn.Linear(6, 4)), NoEffect, "no multiple of 4"),
        (lambda net: apply_masks(net, {"0.weight": torch.ones(2, 2)}), ValueError, "not of its shape"),
        (lambda net: WeightMasks(), ValueError, "either `amount` or `pattern`"),
        (lambda net: WeightMasks(0.5, pattern="2:4"), ValueError, "either `amount` or `pattern`"),
        (lambda net: WeightMasks(0.5, when=-1), ValueError, "`when`"),
        (lambda net: WeightMasks(0.5, when=[1, 2]), ValueError, "masks are decided once"),
        (lambda net: WeightMasks(0.5, scope="some"), ValueError, "'local', 'global'"),
        (lambda net: WeightMasks(1.5), ValueError, "`amount`"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call(nn.Sequential(nn.Linear(4, 3), nn.ReLU()))


def test_masks_clear_what_is_not_finite_and_the_receipt_counts() -> None:
    layer = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight[0, 0], layer.weight[1, 3] = math.nan, math.inf
    keep = torch.tensor([[False, True, True, True], [True, True, True, False]])
    receipt = apply_masks(layer, {"weight": keep})
    assert layer.weight.isfinite().all() and (layer.weight == 0).sum() == 2
    assert receipt.changes[0].after == "2 of 8 are zero"


# --- holding them -----------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_held_weights_train_like_weights_multiplied_by_a_mask(name: str) -> None:
    net, x = tiny.MLP().double(), torch.randn(16, 8).double()
    theirs = copy.deepcopy(net)
    masks = magnitude_masks(net, amount=0.5).keep
    for key, keep in masks.items():
        torch_prune.custom_from_mask(
            theirs.get_submodule(key.removesuffix(".weight")), "weight", keep
        )
    apply_masks(net, masks)
    mine, other = OPTIMIZERS[name](net.parameters()), OPTIMIZERS[name](theirs.parameters())
    for _ in range(10):
        for model, optimizer in ((net, mine), (theirs, other)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
        hold_gradients(net, masks)
        mine.step()
        hold(net, masks, mine)
        other.step()
    torch.testing.assert_close(net(x), theirs(x))
    for key, keep in masks.items():
        assert not net.get_parameter(key)[~keep].any()


def test_moments_of_masked_weights_are_forgotten_and_others_kept() -> None:
    layer = nn.Linear(4, 2)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    layer(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    before = optimizer.state[layer.weight]["exp_avg"].clone()
    masks = magnitude_masks(layer, amount=0.5).keep
    hold(layer, masks, optimizer)
    keep, state = masks["weight"], optimizer.state[layer.weight]
    assert torch.equal(state["exp_avg"], before * keep) and before.all()
    assert not state["exp_avg_sq"][~keep].any() and state["step"] == 1


def test_the_preconditioner_of_a_square_weight_is_left_whole() -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(net.parameters(), 1e-2)
    for layer in net:
        optimizer.state[layer.weight]["rows"] = torch.ones(4, 4)
    hold(net, magnitude_masks(net, amount=0.5).keep, optimizer)
    assert all(optimizer.state[layer.weight]["rows"].all() for layer in net)


def test_masks_without_a_change_of_their_tensor_follow_as_they_are() -> None:
    net = tiny.MLP()
    masks = magnitude_masks(net, amount=0.5).keep
    followed = follow_masks(net, masks, Receipt())
    assert followed.keep.keys() == masks.keys() and not followed.skipped
    gone = follow_masks(net.body, masks, Receipt())
    assert [c.name for c in gone.skipped] == list(masks)


# --- the callback -----------------------------------------------------------------------------


class Restless(torch.optim.SGD):
    """Moves every weight in every step, whatever its gradient."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(0.01)
        return loss


class Module(LightningModule):
    optimizer: Callable[[Any], torch.optim.Optimizer] = OPTIMIZERS["adamw"]

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny.ConvNet()
        register(self)  # so that checkpoints carry the structure, as with `StructuredPruning`

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return type(self).optimizer(self.parameters())


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 3, 8, 8, generator=generator)
    # The same batch three times: Lightning starts an epoch's data anew when it resumes within one.
    return DataLoader(TensorDataset(x.repeat(3, 1, 1, 1), torch.arange(24) % 4), 8)


def module(kind: type[Module] = Module) -> Module:
    torch.manual_seed(0)
    return kind()


class CutOnce(Callback):
    """Remove four channels of each group before an epoch."""

    def __init__(self, gone: list[int], epoch: int = 2) -> None:
        self.gone, self.epoch = gone, epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch and pl_module.net.stem[0].out_channels == 8:
            calls = (Call("net", (next(iter(data()))[0][:2],), {}),)
            graph = Graph(twin(pl_module), calls, select=Select())
            commit(trainer, pl_module, graph.cut({g.name: self.gone for g in graph.groups}))


class Watch(Callback):
    """Note the share of zeros of each masked weight after every batch."""

    def __init__(self) -> None:
        self.shares: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        masks = next(c for c in trainer.callbacks if isinstance(c, WeightMasks)).masks
        found = {n: pl_module.get_parameter(n) for n in masks}
        assert all(not p[~masks[n]].any() for n, p in found.items())
        self.shares.append({n: float((p == 0).float().mean()) for n, p in found.items()})


Fit = Callable[..., Trainer]


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Fit:
    def run(
        model: LightningModule, *callbacks: Callback, ckpt: Any = None, **given: Any
    ) -> Trainer:
        saves = any(isinstance(c, ModelCheckpoint) for c in callbacks)
        given = {
            "max_epochs": 4,
            "enable_checkpointing": saves,
            "callbacks": list(callbacks),
            **given,
        }
        trainer = Trainer(**{**trainer_kwargs, **given})
        trainer.fit(model, data(), ckpt_path=ckpt)
        return trainer

    return run


@pytest.mark.parametrize("name", [*OPTIMIZERS, "restless"])
def test_masked_weights_are_zero_after_every_step(fit: Fit, name: str) -> None:
    class Mine(Module):
        optimizer = OPTIMIZERS.get(name, lambda p: Restless(p, 0.01))

    watch, model = Watch(), module(Mine)
    trainer = fit(model, WeightMasks(0.5, when=1), watch)
    assert [len(shares) for shares in watch.shares] == [0] * 3 + [4] * 9
    assert all(share == 0.5 for shares in watch.shares[3:] for share in shares.values())
    assert all(
        not o._optimizer_step_post_hooks for o in trainer.optimizers
    )  # nothing is left behind


def test_a_share_of_the_fit_is_the_epoch_that_it_is_of_a_prune(fit: Fit) -> None:
    watch, share = Watch(), Watch()
    fit(module(Module), WeightMasks(0.5, when=1), watch, max_epochs=4)
    fit(module(Module), WeightMasks(0.5, when=0.25), share, max_epochs=4)
    assert watch.shares == share.shares and not watch.shares[2] and watch.shares[3]


class OfManyCalls(Module):
    """Its optimizer calls the network several times in each step, and remembers whole vectors."""

    masks: dict[str, Tensor]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for name, keep in self.masks.items():
            assert not self.get_parameter(name)[~keep.to(self.device)].any()
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


def test_masked_weights_are_zero_also_within_a_step_of_several_calls(fit: Fit) -> None:
    masks, learner = WeightMasks(amount=0.5, when=1), module(OfManyCalls)
    learner.masks = {}

    class Give(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            learner.masks = masks.masks

    fit(learner, masks, Give())
    assert learner.masks


def test_clipping_sees_the_gradients_of_live_weights_only(fit: Fit) -> None:
    class Norms(Callback):
        def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, _: Any) -> None:
            found = {n: p.grad for n, p in pl_module.named_parameters() if p.grad is not None}
            if found:
                assert all(not found[n][~keep].any() for n, keep in masks.masks.items())
                self.norm = torch.stack([g.norm() for g in found.values()]).norm().item()

    masks, norms = WeightMasks(0.5), Norms()
    fit(module(), masks, norms, gradient_clip_val=0.01)
    assert norms.norm == pytest.approx(0.01, rel=1e-3)


def test_they_hold_between_the_steps_of_manual_optimization(fit: Fit) -> None:
    class Manual(Module):
        optimizer = staticmethod(lambda p: Restless(p, 0.01))

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.zeros: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for _ in range(2):
                self.zeros.append(float((self.net.head.weight == 0).float().mean()))
                self.optimizers().zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                self.optimizers().step()

    model = module(Manual)
    fit(model, WeightMasks(0.75), max_epochs=1)
    assert model.zeros == [0.75] * 6


@pytest.mark.slow
@pytest.mark.parametrize("given", [{"amount": 0.5}, {"pattern": "2:4"}], ids=["amount", "pattern"])
def test_resume_is_bit_equal_from_any_step(fit: Fit, tmp_path: Path, given: dict[str, Any]) -> None:
    def callbacks() -> list[Callback]:
        return [WeightMasks(when=1, **given), CutOnce([1, 2, 4, 7])]

    whole = module()
    masks = callbacks()
    fit(whole, *masks, ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, every_n_train_steps=1))
    # Steps 3 and 4 lie before and after the masks, 5 between, 7 and 9 after the cut.
    for step in (1, 3, 4, 5, 7, 9):
        (path,) = tmp_path.glob(f"*step={step}.ckpt")
        torch.load(path, weights_only=True)
        resumed, again = Module(), callbacks()
        fit(resumed, *again, ckpt=path)
        one, two = whole.state_dict(), resumed.state_dict()
        assert all(torch.equal(one[name], two[name]) for name in one), step
        held = masks[0].masks
        assert all(torch.equal(held[name], again[0].masks[name]) for name in held)


@pytest.mark.slow
def test_a_cut_takes_the_masks_along(fit: Fit) -> None:
    class Before(Callback):
        def on_model_edit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.masks = dict(masks.masks)

    masks, before, watch = WeightMasks(0.5), Before(), Watch()
    fit(module(), masks, before, CutOnce([0, 1, 2, 7]), watch)
    stay = [3, 4, 5, 6]
    kept = before.masks["net.conv.0.weight"][stay][:, stay]
    assert torch.equal(masks.masks["net.conv.0.weight"], kept)
    deep = [i for i in range(16) if i not in (0, 1, 2, 7)]
    assert torch.equal(masks.masks["net.head.weight"], before.masks["net.head.weight"][:, deep])
    assert len(watch.shares) == 12


@pytest.mark.slow
def test_a_cut_leaves_the_pattern_whole(fit: Fit) -> None:
    class Before(Callback):
        def on_model_edit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.masks = dict(masks.masks)

    masks, before, model = WeightMasks(pattern="2:4"), Before(), module()
    fit(model, masks, before, CutOnce([0, 1, 2, 7]), Watch())
    assert set(masks.masks) == {"net.conv.0.weight", "net.down.0.weight", "net.head.weight"}
    for name, keep in masks.masks.items():
        fours = keep.movedim(1, -1).unflatten(-1, (-1, 4))
        assert (fours.sum(-1) == 2).all()
        assert not model.get_parameter(name)[~keep].any()
    assert [c.name for c in masks.receipt.skipped] == ["net.stem.0.weight"]  # three colours


@pytest.mark.slow
def test_a_pattern_that_a_cut_makes_impossible_is_told(fit: Fit) -> None:
    masks = WeightMasks(pattern="2:4", select="net.conv.*")
    with pytest.warns(UserWarning, match=r"net.conv.0.weight.*its 7 inputs"):
        fit(module(), masks, CutOnce([3]))
    assert masks.masks["net.conv.0.weight"].shape == (7, 7, 3, 3)


def test_moving_averages_are_masked_too(fit: Fit) -> None:
    average, model = EMAWeightAveraging(decay=0.9), module()
    masks = WeightMasks(0.5, when=1)
    fit(model, masks, average)
    for name, keep in masks.masks.items():
        assert not average._average_model.module.get_parameter(name)[~keep].any()


def test_everything_is_masked_in_a_trial_and_an_epoch_never_reached_is_an_error(fit: Fit) -> None:
    model = module()
    fit(model, WeightMasks(0.5, when=3), fast_dev_run=True)
    assert (model.net.head.weight == 0).float().mean() == 0.5
    with pytest.raises(ValueError, match="never reaches"):
        fit(module(), WeightMasks(0.5, when=4))
    with pytest.raises(NoEffect, match="nowhere"):
        fit(module(), WeightMasks(0.5, select="nowhere"))


def test_an_interrupted_fit_leaves_no_hook_behind(fit: Fit) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            self.optimizers = _[0].optimizers
            raise ArithmeticError("stop")

    stop = Stop()
    with pytest.raises(ArithmeticError):
        fit(module(), WeightMasks(0.5), stop)
    assert not stop.optimizers[0]._optimizer_step_post_hooks


def test_the_share_is_logged(fit: Fit, tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    fit(module(), WeightMasks(0.5), logger=logger, log_every_n_steps=1)
    logger.save()
    text = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "pruning/weights_masked" in text and "0.5" in text


_SCRIPT = """
import hashlib, json, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from test_masks import CutOnce, Module, Watch, data
from lightning_accel.pruning import WeightMasks

torch.set_num_threads(1)
folder = Path(sys.argv[1])

def fit(name, ckpt=None):
    torch.manual_seed(0)
    masks, watch = WeightMasks(pattern="2:4", when=1), Watch()
    trainer = Trainer(
        accelerator="cpu", devices=2, max_epochs=4, logger=False, enable_progress_bar=False,
        enable_model_summary=False, strategy=DDPStrategy(process_group_backend="gloo"),
        callbacks=[masks, CutOnce([0, 1, 2, 7]), watch,
                   ModelCheckpoint(dirpath=folder / name, save_top_k=-1, filename="{epoch}")],
    )
    model = Module()
    trainer.fit(model, data(), ckpt_path=ckpt)
    tensors = [*model.parameters(), *masks.masks.values()]
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()

found = [fit("a"), *(fit(f"b{e}", folder / "a" / f"epoch={e}.ckpt") for e in (0, 1, 2))]
(folder / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_mask_alike_and_resume_alike(tmp_path: Path, root: Path) -> None:
    script = tmp_path / "ddp_masks.py"
    script.write_text(_SCRIPT)
    status, printed = forks.run_ranks(script, str(tmp_path), cwd=tmp_path, path=(root / "tests",))
    assert status == 0, printed[-3000:]
    zero, one = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert zero == one and len(zero) == 4
    assert len(set(zero)) == 1  # resumed from each epoch, it ends as the whole run does
