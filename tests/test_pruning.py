"""The verb `prune` and the callback `StructuredPruning`, against masked twins and uninterrupted runs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from lightning_accel import (
    AccelReport,
    AutocastPrecision,
    FrozenPredict,
    Select,
    StructuredPruning,
    UsePrecision,
    load_from_checkpoint,
)
from lightning_accel.distillation import Teacher
from lightning_accel.errors import AccelError, NoEffect, StructureMismatch, Unsupported
from lightning_accel.pruning import (
    Macs,
    due,
    mask_equivalence,
    plan,
    planning,
    prune,
    prune_before_sharding,
    recalibrate,
    subject,
)
from lightning_accel.pruning.request import Request
from lightning_accel.pruning.selection import least
from lightning_accel.surgery import Structure
from lightning_accel.surgery.call import Call

NETS = list(tiny.INPUTS)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() // 2


# --- the verb ---------------------------------------------------------------------------------


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("importance", ["magnitude", "taylor", "random"])
def test_every_kind_of_net_gets_smaller_and_trains(net: Any, importance: str) -> None:
    model, x = net(), tiny.INPUTS[net]()
    shape, before = model(x).shape, params(model)
    model(x).sum().backward()
    receipt = prune(model, example=x, ratio=0.5, importance=importance)
    assert params(model) < 0.8 * before
    assert receipt.moved
    out = model(x)
    assert out.shape == shape
    out.sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_magnitude_removes_the_weakest_channels() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    scale = torch.tensor([1.0, 0.1, 2.0, 0.2], dtype=torch.float64)
    with torch.no_grad():
        for tensor in (net[0].weight, net[0].bias):
            tensor.fill_(1.0)
        net[0].weight.mul_(scale[:, None])
        net[2].weight.copy_(scale.expand(2, 4))
    prune(net, example=torch.randn(1, 3), ratio=0.5)
    assert net[0].weight[:, 0].tolist() == [1.0, 2.0]
    assert net[2].weight[0].tolist() == [1.0, 2.0]


def test_taylor_removes_the_channel_the_loss_does_not_see() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight.abs_().add_(0.1)  # no dead unit
        net[0].weight[1].mul_(100.0)  # loud, but
        net[2].weight[:, 1] = 0.0  # nobody listens
    x = torch.rand(16, 3)
    loud = net[0].weight[1].clone()
    net(x).square().sum().backward()
    prune(net, example=x, ratio=0.25, importance="taylor")
    assert not any(torch.equal(loud, row) for row in net[0].weight)


def test_taylor_without_gradients_is_an_error() -> None:
    with pytest.raises(AccelError, match="loss.backward"):
        prune(tiny.MLP(), example=torch.randn(1, 8), ratio=0.5, importance="taylor")


def test_everything_about_the_model_survives(subtests: Any = None) -> None:
    net = tiny.ConvNet().to(memory_format=torch.channels_last).to(torch.bfloat16)
    net.conv.eval()
    net.head.bias.requires_grad_(False)
    net.stem[0].weight.note = "mine"
    heard: list[int] = []
    net.head.register_forward_hook(lambda *_: heard.append(1))
    flags = {name: module.training for name, module in net.named_modules()}
    objects = dict(net.named_parameters())
    prune(net, example=torch.randn(4, 3, 8, 8), ratio=0.5)
    assert not heard  # nothing of the user's ran
    assert {name: module.training for name, module in net.named_modules()} == flags
    assert all(objects[name] is p for name, p in net.named_parameters())
    assert not net.head.bias.requires_grad and net.head.weight.requires_grad
    assert net.stem[0].weight.note == "mine"
    assert net.stem[0].weight.dtype == torch.bfloat16
    assert net.down[0].weight.is_contiguous(memory_format=torch.channels_last)
    net(torch.randn(4, 3, 8, 8, dtype=torch.bfloat16))
    assert heard


def test_prune_keeps_tied_weights_tied() -> None:
    net = tiny.TiedLM(dim=16)
    prune(net, example=tiny.INPUTS[tiny.TiedLM](), ratio=0.5)
    assert net.head.weight is net.embed.weight
    assert net.embed.embedding_dim == net.head.in_features == 8


def test_no_graph_of_the_trace_stays_alive() -> None:
    net, x = tiny.MLP(), torch.randn(2, 8, requires_grad=True)
    prune(net, example=x, ratio=0.5)
    assert x.grad is None
    nodes = [torch.autograd.graph.get_gradient_edge(p).node for p in net.parameters()]
    assert all(
        tuple(n._input_metadata[0].shape) == tuple(p.shape)
        for n, p in zip(nodes, net.parameters(), strict=True)
    )


def test_frozen_layers_are_left_alone_and_named() -> None:
    net = tiny.ConvNet()
    net.conv.requires_grad_(False)
    weight = net.conv[0].weight.clone()
    receipt = prune(net, example=torch.randn(2, 3, 8, 8), ratio=0.5)
    assert torch.equal(net.conv[0].weight, weight)
    assert any("frozen" in change.what for change in receipt.skipped)
    assert net.down[0].out_channels == 8  # the rest was pruned


def test_a_frozen_network_is_an_error_not_a_silent_nothing() -> None:
    net = tiny.MLP().requires_grad_(False)
    with pytest.raises(NoEffect, match="frozen"):
        prune(net, example=torch.randn(1, 8), ratio=0.5)


@pytest.mark.parametrize(("width", "ratio"), [(1, 0.99), (2, 0.99), (7, 0.999), (16, 0.9999)])
def test_no_layer_is_pruned_to_zero(width: int, ratio: float) -> None:
    net = nn.Sequential(
        nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 3)
    )
    prune(net, example=torch.randn(2, 4), ratio=ratio)
    assert min(min(p.shape) for p in net.parameters()) >= 1
    assert net[4].out_features == 3


class SeparateHeads(nn.Module):
    """Attention of 4 heads with q, k and v apart, and an MLP, on (batch, time, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, self.split).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.down(F.relu(self.up(self.o(x))))


def test_heads_are_never_scrambled() -> None:
    """torch-pruning alone cuts q, k and v across heads here, and nothing raises."""

    class Written(SeparateHeads):
        split = (4, -1)  # the number of heads stays, their width goes

    class Read(SeparateHeads):
        def __init__(self) -> None:
            super().__init__()
            self.split = (4, 4)

    for net, widths in ((Written(), [0, 1, 4, 5, 8, 9, 12, 13]), (Read(), list(range(8)))):
        for weight in (net.q.weight, net.k.weight, net.v.weight):
            weight.data = torch.arange(16.0)[:, None] % 16 + torch.rand(16, 16)
        net.q.weight.data[widths] += 100  # what must stay, of every head or whole heads
        net.k.weight.data[widths] += 100
        net.v.weight.data[widths] += 100
        rows = net.v.weight.detach().clone()
        prune(net, example=torch.randn(2, 6, 16), ratio=0.5)
        assert net.q.out_features == net.v.out_features == net.o.in_features == 8
        assert torch.equal(net.v.weight, rows[widths])
        net(torch.randn(3, 5, 16)).sum().backward()


def test_what_breaks_the_network_is_left_alone_and_named() -> None:
    class HardWired(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.relu(self.b(F.relu(self.a(x)))).view(-1, 16))

    net = HardWired()
    receipt = prune(net, example=torch.randn(2, 8), ratio=0.5)
    assert (net.a.out_features, net.b.out_features) == (8, 16)
    assert any(change.name == "b" for change in receipt.skipped)


def test_when_all_of_it_breaks_the_network_is_as_it_was() -> None:
    class HardWired(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x).view(-1, 16))

    net = HardWired()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(NoEffect, match="the size 16 is written in the code"):
        prune(net, example=torch.randn(2, 8), ratio=0.5)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert net.training


def test_a_branch_that_never_ran_is_named() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(8, 4)
            self.attention = nn.MultiheadAttention(
                8, 2
            )  # its out_proj is used without being called

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(x, x, x)[0]
            return self.b(F.relu(self.a(x))) if x.shape[0] < 100 else self.c(x)

    receipt = prune(Branching(), example=torch.randn(2, 8), ratio=0.5)
    idle = [change.name for change in receipt.skipped if "never ran" in change.what]
    assert idle == ["c"]


def test_a_forward_whose_channels_compete_is_named() -> None:
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).argmax(-1)

    with pytest.raises(NoEffect, match="its channels compete in `Choosing`"):
        prune(Choosing(), example=torch.randn(2, 8), ratio=0.5)


def test_a_failing_forward_names_the_module() -> None:
    with pytest.raises(AccelError, match=r"in `body\.0`"):
        prune(tiny.MLP(), example=torch.randn(2, 5), ratio=0.5)


@pytest.mark.parametrize("ratio", [0, 1, 1.5, -0.1, float("nan"), float("inf"), "0.5", True])
def test_an_impossible_ratio_is_refused(ratio: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="above 0, below 1"):
        prune(tiny.MLP(), example=torch.randn(1, 8), ratio=ratio)
    with pytest.raises((ValueError, TypeError), match="above 0, below 1"):
        StructuredPruning(ratio=ratio, when=0)


@pytest.mark.parametrize("round_to", [0, -8, 2.5, "8", True])
def test_an_impossible_round_to_is_refused(round_to: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="round_to"):
        prune(tiny.MLP(), example=torch.randn(1, 8), ratio=0.5, round_to=round_to)


def test_an_example_without_samples_proves_nothing() -> None:
    with pytest.raises(AccelError, match="without samples"):
        prune(tiny.MLP(), example=torch.randn(0, 8), ratio=0.5)


def test_outputs_that_are_whole_numbers_are_compared_too() -> None:
    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny.MLP()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).argmax(-1)

    net = Classes()
    call = Call("", (torch.randn(64, 8),), {})
    cut = plan(net, calls=(call,), ratio=0.5)
    wrong = dataclasses.replace(cut, scaled={"net.body.2.weight": torch.tensor(-5.0)})
    assert mask_equivalence(net, cut, example=call.args[0]) == 0
    assert mask_equivalence(net, wrong, example=call.args[0]) > 0


@pytest.mark.parametrize("wrong", [{"target": 0.5}, {"ratio": 0.5, "compensate": "yes"}])
def test_arguments_of_another_type_are_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="Do: "):
        prune(tiny.MLP(), example=torch.randn(2, 8), **wrong)
    with pytest.raises(TypeError, match="Do: "):
        StructuredPruning(**{"when": 0, **wrong})


def test_attention_goes_by_heads_or_by_width() -> None:
    with pytest.raises(ValueError, match="heads"):
        prune(tiny.MLP(), example=torch.randn(1, 8), ratio=0.5, attention="depth")
    with pytest.raises(ValueError, match="heads"):
        StructuredPruning(ratio=0.5, attention="depth", when=0)


def test_an_unknown_importance_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="magnitude, bn_scale, taylor"):
        prune(tiny.MLP(), example=torch.randn(1, 8), ratio=0.5, importance="magic")


def test_rounding_keeps_multiples_and_says_when_nothing_is_left_to_remove() -> None:
    net = tiny.MLP(width=24)
    prune(net, example=torch.randn(1, 8), ratio=0.5, round_to=16)
    assert net.head.in_features == 16
    with pytest.raises(NoEffect, match="round_to"):
        prune(net, example=torch.randn(1, 8), ratio=0.5, round_to=16)


def test_only_selected_layers_shrink() -> None:
    net = tiny.MLP()
    prune(net, example=torch.randn(1, 8), ratio=0.5, select="body.0")
    assert (net.body[0].out_features, net.body[2].out_features) == (8, 16)


def test_a_layer_that_hangs_on_an_unselected_one_stays() -> None:
    net = tiny.ConvNet()
    receipt = prune(net, example=torch.randn(2, 3, 8, 8), ratio=0.5, select=["stem", "down"])
    assert net.stem[0].out_channels == 8
    assert any("conv.0" in change.what for change in receipt.skipped)


@pytest.mark.parametrize(
    "example",
    [torch.randn(4, 8), (torch.randn(4, 8),), {"x": torch.randn(4, 8)}],
    ids=["tensor", "tuple", "dict"],
)
def test_examples_come_in_three_forms(example: Any) -> None:
    net = tiny.MLP()
    prune(net, example=example, ratio=0.5)
    assert net.head.in_features == 8


def test_group_norm_and_grouped_convolutions_keep_equal_groups() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.GroupNorm(4, 16),
        nn.Conv2d(16, 32, 3, groups=4),
        nn.ReLU(),
        nn.Conv2d(32, 4, 1),
    )
    prune(net, example=torch.randn(2, 3, 8, 8), ratio=0.4)
    assert net[0].out_channels % 4 == net[2].out_channels % 4 == 0
    assert net[0].out_channels < 16 and net[2].out_channels < 32
    net(torch.randn(3, 3, 9, 9)).sum().backward()


def test_group_norm_alone_keeps_equal_groups() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 4, 1))
    prune(net, example=torch.randn(2, 3, 8, 8), ratio=0.4)
    assert net[0].out_channels == net[1].num_channels == 12
    assert net[1].num_groups == 4


def test_a_weight_tied_to_itself_across_layers_is_left_alone() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    net[2].weight = net[0].weight
    with pytest.raises(NoEffect, match="hangs on the network's input"):
        prune(net, example=torch.randn(2, 8), ratio=0.5)
    assert net[2].weight is net[0].weight


def test_rms_norm_learns_its_new_size() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.RMSNorm(16), nn.Linear(16, 4))
    prune(net, example=torch.randn(2, 8), ratio=0.5)
    assert net[1].normalized_shape == (8,)
    net(torch.randn(3, 8)).sum().backward()


@pytest.mark.parametrize("share", [0.75, 0.5, 0.25])
def test_a_target_of_macs_is_met_from_below(share: float) -> None:
    net, x = tiny.ConvNet(width=32), torch.randn(2, 3, 8, 8)
    dense = macs(net, x)
    plan(net, calls=(Call("", (x,), {}),), target=Macs(share)).apply(net)
    assert share - 0.06 <= macs(net, x) / dense <= share


def test_an_unreachable_target_says_what_is_reachable() -> None:
    with pytest.raises(NoEffect, match="remain"):
        plan(tiny.MLP(), calls=(Call("", (torch.randn(2, 8),), {}),), target=Macs(0.001))


def test_selection_removes_the_least_and_breaks_ties_by_position() -> None:
    assert least(torch.ones(6), kept=3) == [0, 1, 2]
    assert least(torch.tensor([1.0, 5, 2, 4]), kept=3) == [0]


def test_a_global_random_state_is_not_moved() -> None:
    net = tiny.ConvNet()
    state = torch.get_rng_state()
    prune(net, example=torch.ones(2, 3, 8, 8), ratio=0.5, importance="random")
    assert torch.equal(state, torch.get_rng_state())


def test_recalibration_equals_the_average_over_the_batches() -> None:
    net = tiny.ConvNet()
    data = [torch.randn(16, 3, 8, 8) + i for i in range(3)]
    recalibrate(net, [[Call("", (x,), {})] for x in data])
    seen = torch.stack([net.stem[0](x).mean((0, 2, 3)) for x in data]).mean(0)
    torch.testing.assert_close(net.stem[1].running_mean, seen)
    assert net.stem[1].momentum == 0.1 and net.stem[1].num_batches_tracked == 0 and net.training


def test_recalibration_leaves_frozen_norms_alone() -> None:
    net = tiny.ConvNet()
    net.stem[1].eval()
    recalibrate(net, [[Call("", (torch.randn(4, 3, 8, 8) + 5,), {})]])
    assert net.stem[1].running_mean.abs().sum() == 0
    assert net.conv[1].running_mean.abs().sum() > 0


# --- the callback -----------------------------------------------------------------------------


class Images(LightningModule):
    """A user's module; `forward` is not even defined."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = tiny.ConvNet(width)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


def loader(batch: int = 8, count: int = 32) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(count) % 4), batch)


Fit = Callable[..., Any]


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any], tmp_path: Path) -> Fit:
    def run(
        module: LightningModule,
        *callbacks: Callback,
        ckpt: Any = None,
        epochs: int = 5,
        **kwargs: Any,
    ) -> Trainer:
        saves = any(isinstance(c, ModelCheckpoint) for c in callbacks)
        trainer_kwargs.update(
            max_epochs=epochs, callbacks=list(callbacks), enable_checkpointing=saves
        )
        trainer = Trainer(**{**trainer_kwargs, **kwargs})
        trainer.fit(module, loader(), loader(), ckpt_path=ckpt)
        return trainer

    return run


def every_epoch(folder: Path, **kwargs: Any) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}", **kwargs)


def same(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def seeded() -> Images:
    torch.manual_seed(0)
    return Images()


@pytest.mark.slow
def test_resume_from_the_last_step_of_an_epoch_prunes_in_time(fit: Fit, tmp_path: Path) -> None:
    """Lightning leaves out the next epoch's start there."""
    whole = seeded()
    saving = ModelCheckpoint(
        dirpath=tmp_path / "a", save_top_k=-1, filename="{step}", every_n_train_steps=1
    )
    trainer = fit(whole, StructuredPruning(ratio=0.5, when=1), saving, epochs=3)
    steps = trainer.global_step // 3
    resumed, pruning = seeded(), StructuredPruning(ratio=0.5, when=1)
    fit(resumed, pruning, ckpt=tmp_path / "a" / f"step={steps}.ckpt", epochs=3)
    assert pruning.history[0]["epoch"] == 1
    assert same(whole, resumed)


@pytest.mark.slow
@pytest.mark.parametrize("importance", ["magnitude", "taylor", "random"])
def test_resume_before_between_and_after_prunes_is_bit_equal(
    fit: Fit, tmp_path: Path, importance: str
) -> None:
    def pruning() -> StructuredPruning:
        return StructuredPruning(ratio=0.5, when=[1, 3], importance=importance)

    whole = seeded()
    fit(whole, pruning(), every_epoch(tmp_path / "a"))
    for epoch in range(4):
        resumed = Images()
        fit(resumed, pruning(), ckpt=tmp_path / "a" / f"epoch={epoch}.ckpt")
        assert same(whole, resumed), epoch
    other = seeded()
    fit(other, StructuredPruning(ratio=0.5, when=[2, 3], importance=importance))
    assert not same(whole, other)  # the comparison can fail


@pytest.mark.slow
@pytest.mark.parametrize("weights_only_save", [False, True])
def test_every_way_of_restoring_gives_the_same_network(
    fit: Fit, tmp_path: Path, trainer_kwargs: dict[str, Any], weights_only_save: bool
) -> None:
    model = seeded()
    fit(
        model,
        StructuredPruning(ratio=0.5, when=2),
        every_epoch(tmp_path / "a", save_weights_only=weights_only_save),
    )
    path = tmp_path / "a" / "epoch=4.ckpt"
    torch.load(path, weights_only=True)
    loaded = load_from_checkpoint(Images, path)
    assert type(loaded) is Images and same(model, loaded)
    for verb in ("validate", "test", "predict"):
        fresh = Images()
        trainer_kwargs.update(
            callbacks=[StructuredPruning(ratio=0.5, when=2)], enable_checkpointing=False
        )
        getattr(Trainer(**trainer_kwargs), verb)(fresh, loader(), ckpt_path=path, weights_only=True)
        assert same(model, fresh), verb


@pytest.mark.slow
def test_a_less_pruned_best_checkpoint_comes_back_and_forth(fit: Fit, tmp_path: Path) -> None:
    model = seeded()
    trainer = fit(model, StructuredPruning(ratio=0.5, when=[1, 3]), every_epoch(tmp_path / "a"))
    final = copy.deepcopy(model.state_dict())
    for epoch, width in ((0, 8), (2, 6), (4, 4)):
        path = tmp_path / "a" / f"epoch={epoch}.ckpt"
        with pytest.warns(UserWarning, match="another structure"):
            trainer.test(model, loader(), ckpt_path=path, verbose=False)
        assert model.net.stem[0].out_channels == width
    assert all(torch.equal(final[k], v) for k, v in model.state_dict().items())


@pytest.mark.slow
def test_a_checkpoint_saved_after_the_fit_carries_the_structure(fit: Fit, tmp_path: Path) -> None:
    model = seeded()
    trainer = fit(model, StructuredPruning(ratio=0.5, when=2))
    trainer.save_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    once = load_from_checkpoint(Images, tmp_path / "end.ckpt")
    assert same(model, once)
    Trainer(logger=False, accelerator="cpu", enable_checkpointing=False).strategy.connect(once)
    again = copy.deepcopy(once)  # and a copy of the loaded one still knows it
    checkpoint: dict[str, Any] = {}
    again.on_save_checkpoint(checkpoint)
    assert checkpoint["lightning_accel"]["structure"]["tensors"]


@pytest.mark.slow
@pytest.mark.parametrize("width", [6, 12])
def test_a_pruned_network_of_another_width_is_refused(fit: Fit, tmp_path: Path, width: int) -> None:
    model = seeded()
    fit(model, StructuredPruning(ratio=0.5, when=1), every_epoch(tmp_path / "a"), epochs=2)
    path = tmp_path / "a" / "epoch=1.ckpt"
    with pytest.raises(StructureMismatch, match=r"was 8.* before the first prune, and is"):
        load_from_checkpoint(Images, path, width=width)
    already = load_from_checkpoint(Images, path, width=4)  # built in the pruned sizes
    assert same(model, already)
    checkpoint = torch.load(path, weights_only=True)
    assert "lightning_accel.load_from_checkpoint" in checkpoint["lightning_accel"]["readme"]
    del checkpoint["lightning_accel"]["dense"], checkpoint["lightning_accel"]["readme"]
    torch.save(checkpoint, path)  # as 0.1.0 wrote it
    assert same(model, load_from_checkpoint(Images, path))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fit", "test", "before sharding", "teacher"])
@pytest.mark.parametrize("width", [6, 12])
def test_no_way_to_a_pruned_checkpoint_takes_that_of_another_width(
    fit: Fit, tmp_path: Path, trainer_kwargs: dict[str, Any], width: int, way: str
) -> None:
    fit(seeded(), StructuredPruning(ratio=0.5, when=1), every_epoch(tmp_path / "a"), epochs=2)
    path, other = tmp_path / "a" / "epoch=1.ckpt", Images(width)
    held = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    refused = pytest.raises(StructureMismatch, match=r"was 8.* before the first prune, and is")
    if way == "fit":
        with refused:
            fit(other, StructuredPruning(ratio=0.5, when=1), ckpt=path, epochs=3)
    elif way == "test":
        callbacks = [StructuredPruning(ratio=0.5, when=1)]
        trainer = Trainer(**{**trainer_kwargs, "callbacks": callbacks})
        with refused:
            trainer.test(other, loader(), ckpt_path=path, weights_only=True)
    elif way == "before sharding":
        with refused:
            prune_before_sharding(other, example=torch.randn(2, 3, 8, 8), ckpt_path=path)
        fresh = Images()
        assert prune_before_sharding(fresh, example=torch.randn(2, 3, 8, 8), ckpt_path=path)
        fresh.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    else:
        with pytest.raises(AccelError, match=r"pass what `lightning_accel.load_from_checkpoint`"):
            Teacher(other, checkpoint=path).load_weights()
        return  # torch has loaded what fits
    assert other.state_dict().keys() == held.keys()
    assert all(torch.equal(held[n], tensor) for n, tensor in other.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "ours",
    [UsePrecision(AutocastPrecision("32-true")), FrozenPredict(backend="eager"), AccelReport()],
    ids=type,
)
def test_a_pruned_checkpoint_loads_beside_any_callback_of_ours(
    fit: Fit, tmp_path: Path, trainer_kwargs: dict[str, Any], ours: Callback
) -> None:
    model = seeded()
    trained = fit(model, StructuredPruning(ratio=0.5, when=1), epochs=2)
    trained.save_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    plain, fresh = Trainer(**{**trainer_kwargs, "callbacks": []}), Images()
    with pytest.raises(RuntimeError, match="size mismatch"):
        plain.validate(Images(), loader(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    trainer = Trainer(**{**trainer_kwargs, "callbacks": [ours]})
    trainer.validate(fresh, loader(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert same(model, fresh)


def test_unpruned_checkpoints_load_as_ever(fit: Fit, tmp_path: Path) -> None:
    model = seeded()
    fit(model, every_epoch(tmp_path / "a"), epochs=1)
    assert same(model, load_from_checkpoint(Images, tmp_path / "a" / "epoch=0.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "tamper",
    [
        lambda c: c["lightning_accel"]["structure"]["tensors"].update({"net.head.weight": [4, 99]}),
        lambda c: c["lightning_accel"].pop("structure"),
        lambda c: c.update(lightning_accel="yes"),
        lambda c: c["state_dict"].update({"net.stem.0.weight": torch.zeros(7, 3, 3, 3)}),
        lambda c: c["state_dict"].pop("net.stem.0.weight"),
    ],
)
def test_a_tampered_checkpoint_is_refused_and_the_module_untouched(
    fit: Fit, tmp_path: Path, tamper: Any
) -> None:
    fit(seeded(), StructuredPruning(ratio=0.5, when=1), every_epoch(tmp_path / "a"), epochs=2)
    path = tmp_path / "a" / "epoch=1.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    tamper(checkpoint)
    torch.save(checkpoint, path)
    with pytest.raises(StructureMismatch):
        load_from_checkpoint(Images, path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "asked"), [("the same module", "ratio"), ("a checkpoint", "target")]
)
def test_shares_count_from_the_start_of_a_fit_and_go_on_in_a_resumed_one(
    fit: Fit, tmp_path: Path, asked: str, way: str
) -> None:
    def half(when: Any = (1, 2)) -> StructuredPruning:
        share: dict[str, Any] = {"ratio": 0.5} if asked == "ratio" else {"target": Macs(0.5)}
        return StructuredPruning(**share, when=list(when), select="net.[scd]*")

    def size(model: Images) -> float:
        if asked == "ratio":
            return model.net.stem[0].out_channels
        return macs(model.net, torch.randn(1, 3, 8, 8))

    model = Images(width=16)
    dense = size(model)
    first = fit(model, half(), epochs=3)
    assert size(model) == pytest.approx(dense / 2, rel=0.1)
    if way == "a checkpoint":
        first.save_checkpoint(tmp_path / "first.ckpt")
        model = load_from_checkpoint(Images, tmp_path / "first.ckpt")
    once = size(model)
    fit(model, half(), every_epoch(tmp_path / "second"), epochs=3)  # a new fit, of what is left
    assert size(model) == pytest.approx(once / 2, rel=0.15)  # whole channels
    for name in ("epoch=0", "epoch=1-cut", "epoch=1", "epoch=2-cut", "epoch=2"):
        again = Images(width=16)
        if way == "a checkpoint":
            again = load_from_checkpoint(Images, tmp_path / "first.ckpt")
        fit(again, half(), ckpt=tmp_path / "second" / f"{name}.ckpt", epochs=3)
        assert size(again) == size(model), name


@pytest.mark.slow
def test_two_prunings_of_the_same_layers_are_refused_and_of_others_work(fit: Fit) -> None:
    twice = [StructuredPruning(ratio=0.5, when=1), StructuredPruning(ratio=0.2, when=2)]
    with pytest.raises(AccelError, match=r"same layers.*ratio=0.5, when=\(1,\).*when=\[1, 2\]"):
        fit(seeded(), *twice)
    model = seeded()
    parts = [
        StructuredPruning(ratio=0.5, when=1, select=["net.stem.0", "net.conv.0"]),
        StructuredPruning(ratio=0.25, when=1, select="net.down.0"),
    ]
    assert len({part.state_key for part in parts}) == 2
    fit(model, *parts, epochs=2)
    assert (model.net.stem[0].out_channels, model.net.down[0].out_channels) == (4, 12)


@pytest.mark.slow
def test_the_optimizer_goes_on_with_what_it_had(fit: Fit) -> None:
    class Watch(Callback):
        seen: dict[str, Any] = {}

        def on_model_edit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            optimizer = trainer.optimizers[0]
            weight = pl_module.net.stem[0].weight
            self.seen.update(
                optimizer=optimizer,
                lr=optimizer.param_groups[0]["lr"],
                state=copy.deepcopy(optimizer.state[weight]),
            )

        def on_model_edit_end(
            self, trainer: Trainer, pl_module: LightningModule, receipt: Any
        ) -> None:
            optimizer = trainer.optimizers[0]
            (move,) = [m for m in receipt.moved if m.name == "net.stem.0.weight"]
            state = optimizer.state[pl_module.net.stem[0].weight]
            assert optimizer is self.seen["optimizer"]
            assert optimizer.param_groups[0]["lr"] == self.seen["lr"]
            assert state["step"] == self.seen["state"]["step"]
            assert torch.equal(state["exp_avg"], move.kept.take(self.seen["state"]["exp_avg"]))
            self.seen["compared"] = True

    watch = Watch()
    fit(seeded(), StructuredPruning(ratio=0.5, when=2), watch)
    assert watch.seen["compared"]


@pytest.mark.slow
def test_batch_norm_statistics_fit_the_pruned_network(fit: Fit) -> None:
    class Measure(Callback):
        def on_model_edit_end(
            self, trainer: Trainer, pl_module: LightningModule, receipt: Any
        ) -> None:
            x = torch.cat([batch[0] for batch in loader()])
            self.seen = pl_module.net.stem[0](x).mean((0, 2, 3))
            self.stored = pl_module.net.stem[1].running_mean.clone()

    measure = Measure()
    fit(seeded(), StructuredPruning(ratio=0.5, when=2), measure)
    torch.testing.assert_close(measure.stored, measure.seen, atol=1e-6, rtol=1e-5)
    fit(seeded(), StructuredPruning(ratio=0.5, when=2, recalibrate=0), measure)
    assert not torch.allclose(measure.stored, measure.seen, atol=1e-3)


@pytest.mark.slow
def test_the_run_is_not_disturbed_before_the_prune(fit: Fit, tmp_path: Path) -> None:
    plain, pruned = seeded(), seeded()
    fit(plain, every_epoch(tmp_path / "plain"), epochs=2)
    fit(pruned, StructuredPruning(ratio=0.5, when=1), every_epoch(tmp_path / "pruned"), epochs=2)
    one, two = (
        torch.load(tmp_path / name / "epoch=0.ckpt", weights_only=True)["state_dict"]
        for name in ("plain", "pruned")
    )
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "average", [EMAWeightAveraging, lambda: StochasticWeightAveraging(1e-3, 0.5)]
)
@pytest.mark.parametrize("first", [True, False])
def test_weight_averages_are_carried_along(
    fit: Fit, tmp_path: Path, average: Any, first: bool
) -> None:
    def callbacks() -> list[Callback]:
        pair = [average(), StructuredPruning(ratio=0.5, when=[1, 3])]
        return pair if first else pair[::-1]

    whole = seeded()
    fit(whole, *callbacks(), every_epoch(tmp_path / "a"))
    assert whole.net.stem[0].out_channels == 4
    for epoch in (0, 1, 3):
        resumed = Images()
        fit(resumed, *callbacks(), ckpt=tmp_path / "a" / f"epoch={epoch}.ckpt")
        assert same(whole, resumed), epoch


@pytest.mark.filterwarnings("ignore:StructuredPruning cuts before the first step")
def test_prune_before_the_first_epoch_needs_no_batch_to_have_run(fit: Fit) -> None:
    model = seeded()
    fit(model, StructuredPruning(ratio=0.5, when=0), epochs=1)
    assert model.net.stem[0].out_channels == 4


@pytest.mark.slow
def test_an_untrained_network_is_not_cut_in_silence(fit: Fit) -> None:
    with pytest.warns(UserWarning, match=r"looks untrained.*`when` is 0"):
        fit(seeded(), StructuredPruning(ratio=0.5, when=0), epochs=1)
    trained = seeded()
    fit(trained, epochs=1)
    fit(trained, StructuredPruning(ratio=0.5, when=0), epochs=1)  # warnings are errors here
    with pytest.raises(TypeError, match="when"):
        StructuredPruning(0.5)  # type: ignore[call-arg]


def test_a_ratio_that_leaves_almost_nothing_is_told(fit: Fit) -> None:
    class Wide(Images):
        def __init__(self) -> None:
            super().__init__(width=64)

    with pytest.warns(UserWarning, match=r"leaves almost nothing.*Found: .* of .* parameters"):
        fit(Wide(), StructuredPruning(ratio=0.999, when=1), epochs=2)


@pytest.mark.parametrize("when", [1.0, [1.0], (1, 2.0), np.int64(1), [np.float32(1.0)]])
def test_a_whole_number_is_an_epoch_in_any_type(when: Any) -> None:
    read = StructuredPruning(ratio=0.5, when=when).when
    assert read in ((1,), (1, 2))
    assert all(type(epoch) is int for epoch in read)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:StructuredPruning cuts before the first step")
def test_a_target_of_macs_is_met_along_a_schedule(fit: Fit) -> None:
    model = Images(width=32)
    x = torch.randn(1, 3, 8, 8)
    dense = macs(model.net, x)
    fit(model, StructuredPruning(target=Macs(0.4), when=[0, 1]), epochs=2)
    assert 0.34 <= macs(model.net, x) / dense <= 0.4


@pytest.mark.slow
@pytest.mark.parametrize("width", [5, 6, 8])
def test_a_schedule_ends_where_one_cut_would(fit: Fit, width: int) -> None:
    once, thrice = Images(width), Images(width)
    fit(once, StructuredPruning(ratio=0.5, when=4))
    fit(thrice, StructuredPruning(ratio=0.5, when=[1, 2, 4]))
    assert [p.shape for p in once.parameters()] == [p.shape for p in thrice.parameters()]


@pytest.mark.slow
def test_a_step_that_rounding_puts_off_is_made_up_for(fit: Fit) -> None:
    model, pruning = Images(8), StructuredPruning(ratio=0.5, when=[1, 2, 3], round_to=4)
    fit(model, pruning)
    assert model.net.stem[0].out_channels == 4
    assert len(pruning.history) < 3


def test_what_cannot_work_is_told_before_the_first_step(fit: Fit) -> None:
    class Rounds(Images):
        def __init__(self) -> None:
            super().__init__()
            self.steps = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.steps += 1
            return super().training_step(batch, batch_idx)

    model = Rounds()
    with pytest.raises(NoEffect, match="remain"):
        fit(model, StructuredPruning(target=Macs(0.001), when=4))
    assert model.steps == 0


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_every_precision_prunes_and_trains_on(fit: Fit, precision: Any) -> None:
    model = seeded()
    fit(model, StructuredPruning(ratio=0.5, when=1), epochs=2, precision=precision)
    assert model.net.stem[0].out_channels == 4
    assert all(p.isfinite().all() for p in model.parameters())


def test_gradient_accumulation_and_clipping_go_on(fit: Fit) -> None:
    model = seeded()
    fit(
        model,
        StructuredPruning(ratio=0.5, when=1),
        accumulate_grad_batches=3,
        gradient_clip_val=0.1,
    )
    assert model.net.stem[0].out_channels == 4


class TestExamples:
    """How the example is found with nothing asked of the user."""

    class KeywordsOnly(Images):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            images, labels = batch
            return F.cross_entropy(self.net(x=images * 2), labels)

    class Manual(Images):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    class TwoParts(Images):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten()
            )
            self.top = nn.Sequential(nn.Linear(8 * 16, 16), nn.ReLU(), nn.Linear(16, 4))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.top(self.net(batch[0])), batch[1])

        validation_step = training_step

    class WithTeacher(Images):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = tiny.ConvNet().requires_grad_(False).eval()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with torch.no_grad():
                target = self.teacher(batch[0])
            return F.mse_loss(self.net(batch[0]), target)

    def test_keyword_arguments(self, fit: Fit) -> None:
        model = self.KeywordsOnly()
        fit(model, StructuredPruning(ratio=0.5, when=1))
        assert model.net.stem[0].out_channels == 4

    def test_manual_optimization_is_not_stepped_by_the_capture(self, fit: Fit) -> None:
        model = self.Manual()
        trainer = fit(model, StructuredPruning(ratio=0.5, when=1))
        assert model.net.stem[0].out_channels == 4
        assert trainer.global_step == 5 * 4

    def test_taylor_with_manual_optimization_is_refused_at_setup(self, fit: Fit) -> None:
        with pytest.raises(Unsupported, match="magnitude"):
            fit(self.Manual(), StructuredPruning(ratio=0.5, importance="taylor", when=0))

    def test_parts_called_one_after_another_keep_their_interface(self, fit: Fit) -> None:
        model = self.TwoParts()
        fit(model, StructuredPruning(ratio=0.5, when=1))
        assert (model.net[0].out_channels, model.net[2].out_channels) == (4, 8)
        assert (model.top[0].in_features, model.top[0].out_features) == (128, 8)

    def test_a_frozen_teacher_is_never_pruned(self, fit: Fit) -> None:
        model = self.WithTeacher()
        before = copy.deepcopy(model.teacher.state_dict())
        fit(model, StructuredPruning(ratio=0.5, when=1))
        assert model.net.stem[0].out_channels == 4
        assert all(torch.equal(before[k], v) for k, v in model.teacher.state_dict().items())

    def test_explicit_example_and_example_input_array(self, fit: Fit) -> None:
        class Forwarding(Images):
            def forward(self, x: Tensor) -> Tensor:
                return self.net(x)

        model = Forwarding()
        fit(model, StructuredPruning(ratio=0.5, when=1, example=torch.randn(2, 3, 8, 8)))
        assert model.net.stem[0].out_channels == 4
        model = Forwarding()
        model.example_input_array = torch.randn(2, 3, 8, 8)
        fit(model, StructuredPruning(ratio=0.5, when=1))
        assert model.net.stem[0].out_channels == 4

    def test_data_without_an_index(self, trainer_kwargs: dict[str, Any]) -> None:
        class Stream(IterableDataset[Any]):
            def __iter__(self) -> Any:
                generator = torch.Generator().manual_seed(0)
                for i in range(16):
                    yield torch.randn(3, 8, 8, generator=generator), i % 4

        model = Images()
        trainer_kwargs.update(callbacks=[StructuredPruning(ratio=0.5, when=1)])
        Trainer(**trainer_kwargs).fit(model, DataLoader(Stream(), 4))
        assert model.net.stem[0].out_channels == 4

    def test_several_loaders_in_a_dict(self, trainer_kwargs: dict[str, Any]) -> None:
        class Both(Images):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                x, y = (torch.cat([batch["a"][i], batch["b"][i]]) for i in range(2))
                return F.cross_entropy(self.net(x), y)

        model = Both()
        trainer_kwargs.update(callbacks=[StructuredPruning(ratio=0.5, when=1)])
        Trainer(**trainer_kwargs).fit(model, {"a": loader(), "b": loader(4)})
        assert model.net.stem[0].out_channels == 4

    def test_metrics_logs_and_order_of_data_are_untouched(self, fit: Fit) -> None:
        class Counting(Images):
            def __init__(self) -> None:
                super().__init__()
                self.steps: list[float] = []

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                self.steps.append(float(batch[0].sum()))
                return super().training_step(batch, batch_idx)

        plain, pruned = Counting(), Counting()
        fit(plain)
        fit(pruned, StructuredPruning(ratio=0.5, when=[1, 3]))
        assert plain.steps == pruned.steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when", "max_epochs", "epochs"), [(0.4, 5, (2,)), ([0.3, 0.9], 4, (1, 3)), (0.1, 2, (1,))]
)
def test_a_share_of_the_fit_is_the_epoch_nearest_to_it(
    trainer_kwargs: dict[str, Any], when: Any, max_epochs: int, epochs: tuple[int, ...]
) -> None:
    pruning, model = StructuredPruning(ratio=0.5, when=when), Images()
    trainer = Trainer(**{**trainer_kwargs, "max_epochs": max_epochs}, callbacks=[pruning])
    trainer.fit(model, loader())
    assert tuple(step["epoch"] for step in pruning.history) == epochs == pruning.when


def test_a_share_of_a_fit_without_epochs_is_refused(trainer_kwargs: dict[str, Any]) -> None:
    pruning = StructuredPruning(ratio=0.5, when=0.5)
    limits = {**trainer_kwargs, "max_epochs": -1, "max_steps": 4}
    with pytest.raises(ValueError, match="share of the epochs"):
        Trainer(**limits, callbacks=[pruning]).fit(Images(), loader())


class TestRefusals:
    """Bad inputs are told at setup, before any step."""

    @pytest.mark.parametrize(
        "when",
        [-1, 1.5, "2", [], [3, 1], [1, 1], None, [True], -1.0, [0.6, 0.3], [1, 0.5], [0.5, 1.0]],
    )
    def test_an_impossible_schedule(self, when: Any) -> None:
        with pytest.raises(ValueError, match="`when`"):
            StructuredPruning(ratio=0.5, when=when)

    @pytest.mark.parametrize("both", [{}, {"ratio": 0.5, "target": Macs(0.5)}])
    def test_neither_or_both_targets(self, both: dict[str, float]) -> None:
        with pytest.raises(ValueError, match="either"):
            StructuredPruning(**{"when": 0, **both})  # type: ignore[arg-type]

    def test_an_epoch_beyond_the_fit(self, fit: Fit) -> None:
        with pytest.raises(ValueError, match="max_epochs=5"):
            fit(seeded(), StructuredPruning(ratio=0.5, when=5))

    def test_a_selection_that_matches_nothing(self, fit: Fit) -> None:
        with pytest.raises(NoEffect, match="decoder"):
            fit(seeded(), StructuredPruning(ratio=0.5, select="decoder.*", when=0))

    def test_a_module_without_optimizer(self, fit: Fit) -> None:
        class Bare(Images):
            def configure_optimizers(self) -> None:
                return None

        with pytest.raises(AccelError, match="optimizer"), pytest.warns(UserWarning):
            fit(Bare(), StructuredPruning(ratio=0.5, when=0))

    def test_a_compiled_module(self, fit: Fit) -> None:
        model = seeded()
        model.compile(backend="eager")
        with pytest.raises(Unsupported, match="BlockCompile"):
            fit(model, StructuredPruning(ratio=0.5, when=0))

    def test_spawned_ranks(self, trainer_kwargs: dict[str, Any]) -> None:
        from lightning_accel.bridge.checks import refuse_spawn

        trainer = Trainer(**{**trainer_kwargs, "strategy": "ddp_spawn", "devices": 2})
        with pytest.raises(Unsupported, match="strategy='ddp'"):
            refuse_spawn(trainer.strategy, "pruning")

    @pytest.mark.parametrize(
        "name", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "XLAStrategy"]
    )
    def test_sharded_strategies_name_the_alternative(self, name: str) -> None:
        from lightning.pytorch import strategies

        from lightning_accel.bridge.checks import refuse_sharded

        with pytest.raises(Unsupported, match="configure_model"):
            refuse_sharded(
                object.__new__(getattr(strategies, name)), "pruning", unless_gathered=True
            )

    def test_no_trainable_call_in_the_step(self, fit: Fit) -> None:
        class Functional(Images):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(3 * 64, 4))

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                return F.cross_entropy(batch[0].flatten(1) @ self.weight, batch[1])

        with pytest.raises(AccelError, match="no trainable module"):
            fit(Functional(), StructuredPruning(ratio=0.5, when=0))


def test_a_fit_that_ends_before_its_prune_is_not_silent(fit: Fit) -> None:
    with pytest.warns(UserWarning, match=r"0 of 2.*epochs \[2, 3\]"):
        fit(seeded(), StructuredPruning(ratio=0.5, when=[2, 3]), max_steps=5)


def test_the_same_trainer_going_on_does_not_prune_again(trainer_kwargs: dict[str, Any]) -> None:
    model, pruning = seeded(), StructuredPruning(ratio=0.5, when=1)
    trainer_kwargs.update(callbacks=[pruning])
    trainer = Trainer(**trainer_kwargs)
    trainer.fit(model, loader())
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, loader())
    assert len(pruning.history) == 1
    assert model.net.stem[0].out_channels == 4


@pytest.mark.slow
def test_the_receipt_and_the_history_say_what_was_done(fit: Fit) -> None:
    pruning = StructuredPruning(ratio=0.5, when=2, select=Select("net"))
    model = seeded()
    dense = params(model)
    fit(model, pruning)
    assert pruning.receipt and pruning.history[0]["epoch"] == 2
    assert pruning.history[0]["params_before"] == dense
    assert pruning.history[0]["params_after"] == params(model)
    assert pruning.history[0]["skipped"] == {"net.head": "it makes the network's output"}


# --- one request for all entries ----------------------------------------------------------------


class Sharded(LightningModule):
    """A LightningModule that prunes itself before it would be sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny.MLP()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


ENTRIES: dict[str, Callable[..., Any]] = {
    "prune": lambda **asked: prune(tiny.MLP(), example=torch.randn(4, 8), **asked),
    "plan": lambda **asked: plan(tiny.MLP(), calls=(Call("", (torch.randn(4, 8),), {}),), **asked),
    "before sharding": lambda **asked: prune_before_sharding(
        Sharded(), example=torch.randn(4, 8), **asked
    ),
    "in a fit": lambda **asked: StructuredPruning(when=0, **asked),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({}, ValueError, "either `ratio` or `target`"),
        ({"ratio": 0.5, "target": Macs(0.5)}, ValueError, "either `ratio` or `target`"),
        ({"ratio": 0.0}, ValueError, "`ratio`"),
        ({"ratio": 1.0}, ValueError, "`ratio`"),
        ({"ratio": "half"}, TypeError, "`ratio`"),
        ({"target": 0.5}, TypeError, r"Macs\(0.5\)"),
        ({"ratio": 0.5, "scope": "far"}, ValueError, "`scope`.*'local'"),
        ({"ratio": 0.5, "scope": 3}, TypeError, "`scope`"),
        ({"ratio": 0.5, "attention": "tokens"}, ValueError, "`attention`.*'heads'"),
        ({"ratio": 0.5, "round_to": 0}, ValueError, "`round_to`.*'measured'"),
        ({"ratio": 0.5, "compensate": 1}, TypeError, "`compensate`"),
        ({"ratio": 0.5, "depth": 1}, TypeError, "`depth`"),
        ({"ratio": 0.5, "depth": "some"}, ValueError, "`depth`.*'only'"),
        ({"ratio": 0.5, "depth": True}, ValueError, "not of both at once"),
        ({"target": Macs(0.5), "depth": True, "importance": "taylor2"}, ValueError, "taylor2"),
        ({"ratio": 0.5, "importance": "size"}, ValueError, "unknown importance"),
        ({"pruner": 3}, TypeError, "`pruner`"),
        ({"pruner": lambda m, x: None, "scope": "global"}, ValueError, "`scope`.*beside"),
        ({"pruner": lambda m, x: None, "depth": "only"}, ValueError, "knows no whole blocks"),
    ],
)
def test_every_entry_checks_what_is_asked_alike(
    entry: str, asked: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        ENTRIES[entry](**asked)


def test_what_only_a_fit_knows_is_asked_of_no_other_entry() -> None:
    for only in ({"schedule": "cubic"}, {"steps": 2}, {"is_search": True}):
        with pytest.raises(TypeError):
            prune_before_sharding(Sharded(), example=torch.randn(4, 8), ratio=0.5, **only)


def test_the_network_is_copied_with_its_hooks_once_for_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Telling which hooks act takes forwards; what is left of the unit is measured on that same copy."""
    made: list[nn.Module] = []
    plain = subject.twin

    def counted(model: nn.Module, calls: Any = (), **how: Any) -> nn.Module:
        copied = plain(model, calls, **how)
        if calls:
            made.append(copied)
        return copied

    for module in (subject, due, planning):
        monkeypatch.setattr(module, "twin", counted)
    net, calls = tiny.MLP(), (Call("", (torch.randn(4, 8),), {}),)
    source = SimpleNamespace(calls=list)
    found = due.decide(
        Request(target=Macs(0.5), compensate=False),
        net,
        calls,
        due.Fit(source, Structure()),  # type: ignore[arg-type]
        due=1,
        history=[],
        device=torch.device("cpu"),
    )
    assert found.kept is not None and 0.3 < found.kept <= 0.5
    assert len(made) == 1
