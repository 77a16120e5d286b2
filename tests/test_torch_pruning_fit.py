"""Pruners of torch-pruning in a fit: their steps, their sparse training, and all that follows a prune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from test_torch_pruning import SLIM, VGG, by, images
from tiny import silent
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import StructuredPruning
from lightning_accel.errors import AccelError, NoEffect, Unsupported
from lightning_accel.pruning import TorchPruner, plan
from lightning_accel.pruning.regularizer import Regularizer
from lightning_accel.recipe import build
from lightning_accel.surgery.call import as_call

ROOT = Path(__file__).resolve().parents[1]


class Lit(LightningModule):
    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.net, self.lr = VGG(), lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 3, 8, 8, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(8) % 4), 4)


class Seen(Callback):
    """The state after each epoch."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []  # which no cut follows

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = trainer.optimizers[0].state
        momenta = {
            f"momentum {n}": state[p]["momentum_buffer"] for n, p in pl_module.named_parameters()
        }
        held = {**pl_module.state_dict(), **momenta}
        self.states.append({k: v.clone() for k, v in held.items()})


def fit(
    folder: Path, pruner: Any, *, when: Any = 1, ckpt: Any = None, model: Any = None, **given: Any
) -> tuple[Any, StructuredPruning | None, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    module, seen = model or Lit(), Seen()
    pruning = None if pruner is None else StructuredPruning(pruner=pruner, when=when, recalibrate=0)
    extra = given.pop("callbacks", [])
    settings = {**silent(folder), "max_epochs": 3, **given}
    trainer = Trainer(**settings, callbacks=[*([pruning] if pruning else []), seen, *extra])
    trainer.fit(module, data(), ckpt_path=ckpt)
    return module, pruning, seen.states


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


@pytest.mark.slow
def test_each_epoch_of_when_is_one_step_of_the_pruner(tmp_path: Path) -> None:
    pruner = by(iterative_steps=2)
    module, pruning, _ = fit(tmp_path, pruner, when=[1, 2], model=None, max_epochs=3)
    torch.manual_seed(0)
    alone = Lit().net
    theirs = pruner(alone, (images(),))
    widths = []
    for _ in range(2):
        theirs.step()
        widths.append(sum(p.numel() for p in alone.parameters()))
    assert pruning is not None
    assert [step["params_after"] for step in pruning.history] == widths
    assert module.net.net[0].out_channels == 4
    with pytest.raises(Unsupported, match="iterative_steps=3, and 2 epochs"):
        fit(tmp_path, by(iterative_steps=3), when=[1, 2])


def test_weights_and_momenta_are_the_kept_ones(tmp_path: Path) -> None:
    module, pruning, seen = fit(tmp_path, by(), max_epochs=2, model=Still())
    assert pruning is not None
    kept = {move.name: move.kept for move in pruning.receipt.moved}
    alone = Lit().net
    alone.load_state_dict({k[4:]: v for k, v in seen[0].items() if k.startswith("net.")})
    by()(alone, (images(),)).step()
    for name, value in alone.named_parameters():
        assert torch.equal(dict(module.net.named_parameters())[name], value), name
        if f"net.{name}" in kept:
            assert module.momenta[f"net.{name}"].shape == value.shape
            expected = kept[f"net.{name}"].take(seen[0][f"momentum net.{name}"])
            assert torch.equal(module.momenta[f"net.{name}"], expected), name


class Still(Lit):
    """Does not step after the prune, and notes what the optimizer holds then."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        if self.current_epoch == 0:
            return None
        state = self.trainer.optimizers[0].state
        self.momenta = {n: state[p]["momentum_buffer"] for n, p in self.named_parameters()}
        return -1


def by_hand(pruner: Any, epochs: int, *, clip: float = 0.0, every: int = 1) -> dict[str, Tensor]:
    """Train as the README of torch-pruning does, and its benchmark where regularization grows."""
    torch.manual_seed(0)
    module = Lit()
    (optimizer,) = [module.configure_optimizers()]
    module.forward = module.net.forward  # type: ignore[method-assign]
    theirs = pruner(module, (torch.randn(2, 3, 8, 8),))
    module.train()
    theirs.update_regularizer()
    for _ in range(epochs):
        for index, batch in enumerate(data()):
            (module.training_step(batch, index) / every).backward()
            if (index + 1) % every == 0:
                theirs.regularize(module)
                if clip:
                    nn.utils.clip_grad_norm_(module.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
        if hasattr(theirs, "update_reg"):
            theirs.update_reg()
    return {k: v.clone() for k, v in module.state_dict().items()}


SPARSE = {
    "group norm": by(tp.pruner.GroupNormPruner, reg=1e-2),
    "slimming": by(tp.pruner.BNScalePruner, importance=SLIM, reg=1e-2),
    "growing": by(tp.pruner.GrowingRegPruner, reg=1e-2, delta_reg=1e-2),
}


@pytest.mark.parametrize("name", list(SPARSE))
def test_sparse_training_is_that_of_a_loop_by_hand(tmp_path: Path, name: str) -> None:
    clip, every = (0.1, 2) if name == "group norm" else (0.0, 1)
    given = {"accumulate_grad_batches": every, "gradient_clip_val": clip or None}
    module, _, seen = fit(tmp_path, SPARSE[name], when=2, **given)
    expected = by_hand(SPARSE[name], 2, clip=clip, every=every)
    assert equal(expected, {k: v for k, v in seen[1].items() if not k.startswith("momentum")})
    assert module.net.net[0].out_channels == 4


def test_without_a_regularizer_the_fit_is_the_plain_one_until_it_prunes(tmp_path: Path) -> None:
    _, _, plain = fit(tmp_path, None)
    _, _, seen = fit(tmp_path, by(), when=2)
    assert equal(plain[1], seen[1])
    assert not equal(plain[2], seen[2])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:StructuredPruning cuts before")
def test_after_the_prune_no_regularizer_acts(tmp_path: Path) -> None:
    kinds = (by(), by(tp.pruner.GroupNormPruner, reg=1.0))
    plain, sparse = (fit(tmp_path, pruner, when=0)[2] for pruner in kinds)
    assert equal(plain[2], sparse[2])


class Coder(LightningModule):
    """Two networks that only its step puts together, by keyword, and no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12))
        self.decoder = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(
            self.decoder(input=self.encoder(batch[0].flatten(1)[:, :8])), batch[0][:, 0, 0]
        )

    configure_optimizers = Lit.configure_optimizers
    lr = 0.05


def test_the_function_gets_the_module_whatever_its_step_calls(tmp_path: Path) -> None:
    heads: list[Any] = []

    def pruner(model: Any, example: Any) -> Any:
        heads.append(type(model.decoder[2]))
        return tp.pruner.BasePruner(model, example, importance=tp.importance.RandomImportance())

    module, pruning, _ = fit(tmp_path, pruner, model=Coder())
    assert set(heads) == {nn.Linear}
    assert pruning is not None
    assert set(pruning.history[0]["skipped"]) == {"encoder.2", "decoder.2"}
    assert [n.out_features for n in (module.encoder[0], module.decoder[0])] == [8, 8]
    assert all("shape of the network's output" in t for t in pruning.history[0]["skipped"].values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
@pytest.mark.parametrize(("name", "epoch"), [("growing", 0), ("growing", 2), ("steps", 1)])
def test_a_resumed_fit_is_the_whole_one(tmp_path: Path, name: str, epoch: int) -> None:
    pruner = SPARSE.get(name, by(iterative_steps=2))
    when = 2 if name == "growing" else [1, 2]
    files = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    given = {"when": when, "max_epochs": 4, "enable_checkpointing": True}
    _, _, whole = fit(tmp_path, pruner, callbacks=[files], **given)
    given["enable_checkpointing"] = False
    _, _, resumed = fit(tmp_path, pruner, ckpt=tmp_path / f"epoch={epoch}.ckpt", **given)
    assert equal(whole[3], resumed[-1])


@pytest.mark.slow
def test_a_fit_that_ends_before_its_prune_goes_on_from_where_it_was(tmp_path: Path) -> None:
    _, _, whole = fit(tmp_path, SPARSE["growing"], when=2)
    with pytest.warns(UserWarning, match="the fit ended before"):
        module, _, _ = fit(tmp_path, SPARSE["growing"], when=2, max_steps=2)
    module.trainer.save_checkpoint(tmp_path / "last.ckpt")
    _, _, resumed = fit(tmp_path, SPARSE["growing"], when=2, ckpt=tmp_path / "last.ckpt")
    assert equal(whole[2], resumed[-1])


def two_optimizers(self: Any) -> Any:
    parts = (self.net.head, self.net.net)  # the norms with the second
    return [torch.optim.SGD(part.parameters(), 0.05, momentum=0.9) for part in parts]


class Manual(Lit):
    configure_optimizers = two_optimizers

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


class Past(Manual):
    def optimizers(self, *_: Any, **__: Any) -> Any:
        return [optimizer.optimizer for optimizer in super().optimizers()]


def test_each_optimizer_gets_its_part_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Manual()
    pruning = StructuredPruning(pruner=SPARSE["slimming"], when=2, recalibrate=0)
    seen: list[dict[str, Tensor]] = []

    class Note(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.append({k: v.clone() for k, v in pl_module.state_dict().items()})

    Trainer(**silent(tmp_path) | {"max_epochs": 3}, callbacks=[pruning, Note()]).fit(module, data())
    assert equal(seen[1], by_hand(SPARSE["slimming"], 2))
    with pytest.raises(Unsupported, match="stepped past Lightning"):
        fit(tmp_path, SPARSE["group norm"], when=2, model=Past())


def test_a_penalty_of_no_number_is_left_out_and_told(tmp_path: Path) -> None:
    """GroupNormPruner divides by the range of its scores, which is 0 where all are equal."""
    module = Lit()
    nn.init.constant_(module.net.net[9].weight, 0.1)
    nn.init.constant_(module.net.head.weight, 0.1)
    with pytest.warns(UserWarning, match=r"no numbers for some channels.*net\.net\.9\.weight"):
        fit(tmp_path, SPARSE["group norm"], when=1, model=module, max_epochs=2)
    assert all(bool(p.isfinite().all()) for p in module.parameters())


def test_gradients_that_are_still_scaled_get_a_scaled_penalty() -> None:
    found = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        net = VGG()
        calls = (as_call(images()),)
        regularizer = Regularizer(SPARSE["group norm"], net, calls)
        net(images()).sum().mul(scale).backward()
        regularizer.add(net.parameters(), scale=scale)
        found.append([p.grad / scale for p in net.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_regularizer_that_fails_is_told_before_the_first_step(tmp_path: Path) -> None:
    class Fails(tp.pruner.GroupNormPruner):
        def regularize(self, model: nn.Module, **_: Any) -> None:
            raise IndexError("the shape of the mask does not match")

    model, steps = Lit(), []
    model.on_before_optimizer_step = lambda *_: steps.append(0)  # type: ignore[method-assign]
    with pytest.raises(
        Unsupported, match=r"sparse training fails.*IndexError: the shape of the mask"
    ):
        fit(tmp_path, by(Fails, pruning_ratio=0.5), model=model)
    assert not steps and all(p.grad is None for p in model.parameters())


def test_a_regularizer_that_wants_a_loss_is_refused(tmp_path: Path) -> None:
    class Own(tp.pruner.BasePruner):  # type: ignore[misc]
        def regularize(self, model: Any, loss: Any) -> None: ...

    with pytest.raises(Unsupported, match="the regularizer takes more than the model"):
        fit(tmp_path, by(Own))


@pytest.mark.parametrize("when", [1, [1, 2]])
def test_gradients_are_there_for_importances_that_read_them(tmp_path: Path, when: Any) -> None:
    taylor = by(importance=tp.importance.GroupTaylorImportance(), iterative_steps=2)
    module, _, _ = fit(tmp_path, taylor, when=when)
    assert module.net.net[0].out_channels == 4
    with pytest.raises(AccelError, match="reads gradients"):
        plan(VGG(), calls=(as_call(images()),), pruner=taylor)


# -- by names --------------------------------------------------------------------------------------------


def preset(**changes: Any) -> dict[str, Any]:
    node = yaml.safe_load((ROOT / "conf/accel/pruning/torch_pruning.yaml").read_text())
    node["pruner"] |= changes
    trainer = {"_target_": "lightning.pytorch.Trainer", **silent(Path("runs")), "max_epochs": 3}
    model = {"_target_": "test_torch_pruning_fit.Lit"}
    return {"trainer": trainer, "model": model, "callbacks": {"pruning": node}}


@pytest.mark.slow
def test_a_preset_says_by_names_what_a_function_says() -> None:
    options = {"reg": 1e-2, "round_to": None}
    tree = preset(options=options, ignored_layers=["net.head"])
    run = build(tree, allow=("test_torch_pruning_fit.",))
    trainer, module = run.trainer, run.model
    torch.manual_seed(0)
    module.net = VGG()
    pruning = next(c for c in trainer.callbacks if isinstance(c, StructuredPruning))
    pruning.recalibrate = 0
    trainer.fit(module, data())
    importance = tp.importance.GroupMagnitudeImportance()
    by_function = by(tp.pruner.GroupNormPruner, importance=importance, reg=1e-2)
    torch.manual_seed(0)
    other = Lit()
    callback = StructuredPruning(pruner=by_function, when=0.4, recalibrate=0)
    Trainer(**silent(Path("runs")) | {"max_epochs": 3}, callbacks=[callback]).fit(other, data())
    assert equal(dict(module.state_dict()), dict(other.state_dict()))
    assert module.net.net[0].out_channels == 4


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kind": "os.system"}, "unknown `kind`"),
        ({"importance": "sys"}, "unknown `importance`"),
        ({"options": {"customized_pruners": 1}}, "unknown `options`"),
        ({"_target_": "torch_pruning.pruner.BasePruner"}, "not allowed to run"),
    ],
)
def test_a_preset_names_no_other_code(changes: Any, match: str) -> None:
    with pytest.raises(Exception, match=match):
        build(preset(**changes), allow=("test_torch_pruning_fit.",))


def test_a_name_that_is_not_there_is_told() -> None:
    with pytest.raises(AccelError, match="matches no module"):
        TorchPruner(ignored_layers=["tail"])(VGG(), (images(),))
    with pytest.raises(NoEffect, match="by the name of a linear layer"):
        TorchPruner(num_heads={"net.0": 2})(VGG(), (images(),))


@pytest.mark.parametrize("share", [-1, 0, 1, float("nan"), "half", None, True])
@pytest.mark.parametrize("name", ["pruning_ratio", "pruning_ratio_dict"])
def test_a_share_that_is_none_is_refused_when_it_is_said(share: Any, name: str) -> None:
    given = {"net.0": share} if name == "pruning_ratio_dict" else share
    if given == {"net.0": 0}:
        TorchPruner(pruning_ratio_dict=given)  # keeps that layer whole
        return
    with pytest.raises((TypeError, ValueError), match=f"{name}.*Found: .*Do: "):
        TorchPruner(**{name: given})
