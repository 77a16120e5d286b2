"""Networks made on the meta device as people make them: filled as their authors say, or refused with the line."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import DoublePrecision
from sharded import trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel.errors import Unsupported
from lightning_accel.parallel.meta import materialize, refuse_loose
from lightning_accel.parallel.meta_writes import MetaWrites
from lightning_accel.strategies import AccelDDPStrategy, FSDP2Strategy


class Parts(nn.Module):
    """A trunk and a head, and what a user adds."""

    def __init__(self, *more: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head, self.more = nn.Linear(4, 4), nn.Linear(4, 4), nn.Sequential(*more)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.more(self.trunk(x)))


# ---- refused


def hugging_face() -> nn.Module:
    """`self.apply(self._init_weights)` (transformers, nanoGPT)."""

    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear) and not getattr(module, "_is_hf_initialized", False):
            module.weight.data.normal_(0, 0.02)
            module._is_hf_initialized = True

    return Parts().apply(_init_weights)


def empty_weights() -> nn.Module:
    """accelerate's `init_empty_weights` moves each weight as it is registered; then the head's prior is set."""
    with moved_as_registered():
        net = Parts()
        nn.init.constant_(net.head.bias, -4.6)
    return net


def residual() -> nn.Module:
    """The last layer of a residual branch begins at zero (DiT, ResNet)."""
    net = Parts(norm := nn.BatchNorm1d(4))
    nn.init.zeros_(norm.weight)
    return net


def depth() -> nn.Module:
    """Scaled by depth (GPT-2), through a view."""
    net = Parts()
    with torch.no_grad():
        net.head.weight[0].mul_(0.5)
    return net


def truncated() -> nn.Module:
    """timm's, which calls no operation on meta."""
    net = Parts()
    nn.init.trunc_normal_(net.head.weight, std=0.02)
    return net


def orthogonal() -> nn.Module:
    """PPO's."""
    net = Parts()
    nn.init.orthogonal_(net.head.weight, gain=0.01)
    return net


class Outer(Parts):
    """An outer module fills its children."""

    def __init__(self) -> None:
        super().__init__()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.head.weight)


def from_file() -> nn.Module:
    """`load_state_dict` copies into nothing."""
    with torch.device("cpu"):
        state = Parts().state_dict()
    net = Parts()
    net.load_state_dict(state)
    return net


def other_format() -> nn.Module:
    """Written before the number format is changed."""
    net = Parts()
    nn.init.zeros_(net.head.weight)
    return net.double()


def in_place_of() -> nn.Module:
    """A new weight in place of the layer's."""
    net = Parts()
    net.head.weight = nn.Parameter(torch.zeros(4, 4))
    return net


def target() -> nn.Module:
    """BYOL's target begins as a copy."""
    net = Parts()
    net.head = copy.deepcopy(net.trunk)
    return net


def tied_backwards() -> nn.Module:
    """`wte.weight = lm_head.weight`: the numbers are those of the second."""
    net = Parts(nn.Embedding(4, 4))
    net.trunk.weight = net.more[0].weight
    return net


class Gain(nn.Linear):
    """Its inherited `reset_parameters` fills no gain."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.gain = nn.Parameter(torch.full((4,), 0.5))


class Classes(nn.Linear):
    """Weights of classes, from a list: no operation on meta makes them."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("gain", torch.tensor([1.0, 2.0, 3.0, 4.0]))


class ZeroLinear(nn.Linear):
    """Its `__init__` makes zeros, which its inherited `reset_parameters` does not."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.weight = nn.Parameter(torch.zeros_like(self.weight))


class Halved(nn.Linear):
    """Its `__init__` goes on where its own `reset_parameters` ends."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        with torch.no_grad():
            self.weight.mul_(0.5)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)


class Nested(nn.Linear):
    """One of a kind fills another of it."""

    def __init__(self, depth: int = 1) -> None:
        super().__init__(4, 4)
        if depth:
            self.inner = Nested(depth - 1)
            self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "inner"):
            nn.init.zeros_(self.inner.weight)


class Llama(nn.Module):
    """A table of angles in no file, made in `__init__` alone."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(4.0), 1.0 / 10000 ** (torch.arange(2.0) / 2))
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles), False)


def zero_init() -> nn.Module:
    """deepspeed.zero.Init's way: made with weights, and these given up."""
    with torch.device("cpu"):
        return Parts().to("meta")


REFUSED: dict[Callable[[], nn.Module], str] = {
    hugging_face: r"`trunk.weight` \(Linear\), .*_init_weights\), and 1 more",
    empty_weights: r"`head.bias` \(Linear\), .*empty_weights\)",
    residual: r"`more.0.weight` \(BatchNorm1d\), .*residual\)",
    depth: r"`head.weight` .*depth\)",
    truncated: r"`head.weight` .*truncated\)",
    orthogonal: r"`head.weight` .*orthogonal\)",
    Outer: r"`head.weight` .*Outer.reset_parameters\)",
    from_file: r"`trunk.weight` .*from_file\), and 3 more",
    other_format: r"`head.weight` .*other_format\)",
    in_place_of: r"`head.weight` .*in_place_of\)",
    target: r"`head.weight` .*target\), and 1 more",
    tied_backwards: r"`trunk.weight` \(Linear\), .*tied_backwards\)",
    Gain: r"`gain` \(Gain\), .*Gain.__init__\)",
    Classes: r"`gain` \(Classes\), .*Classes.__init__\)",
    ZeroLinear: r"`weight` \(ZeroLinear\), .*ZeroLinear.__init__\)",
    Halved: r"`weight` \(Halved\), .*Halved.__init__\)",
    Nested: r"`inner.weight` \(Nested\), .*Nested.reset_parameters\)",
    Llama: r"`freqs_cis` \(Llama\), .*Llama.__init__\)",
    zero_init: r"`trunk.weight` .*zero_init\), and 3 more",
}


@contextmanager
def moved_as_registered() -> Iterator[None]:
    plain = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: Any) -> None:
        plain(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"))

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


def noted(make: Callable[[], nn.Module]) -> tuple[MetaWrites, nn.Module]:
    """Return what is made within the notes of a strategy."""
    notes, root = MetaWrites(), nn.Module()
    with notes.taken(root), torch.device("meta"):
        root.net = make()
    return notes, root.net


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
@pytest.mark.parametrize("make", REFUSED)
def test_what_is_lost_is_refused_with_the_line_that_wrote_it(make: Any) -> None:
    notes, net = noted(make)
    with pytest.raises(Unsupported, match=r"Found: .*test_meta.py:\d+ .*Do: ") as error:
        notes.require(net)
    assert error.match(f"Found: {REFUSED[make]}")
    assert notes.require(net, given=dict(net.named_parameters()) | dict(net.named_buffers())) == ""


# ---- filled


class Norm(nn.Module):
    """torchtitan's: ones in `__init__`, and `reset_parameters` is not called there."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Rotary(nn.Module):
    """A table in no file, and a mask; it begins from a number that is there."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("base", torch.tensor(100.0, device="cpu"))
        mask = torch.ones(4, 4, dtype=torch.bool)
        self.register_buffer("mask", mask.tril_(), persistent=False)
        self.register_buffer("table", self.angles(), persistent=False)
        self.register_buffer("unseen", torch.full((2,), float("nan")), persistent=False)

    def angles(self) -> Tensor:
        return self.base ** -torch.arange(0, 1, 0.25, device=self.mask.device)

    def reset_parameters(self) -> None:
        self.mask.fill_(True).tril_()
        self.table = self.angles()
        self.unseen.fill_(float("nan"))


class Thinned(nn.Linear):
    """Which of its inputs count is drawn."""

    def __init__(self) -> None:
        super().__init__(64, 4)
        self.register_buffer("kept", torch.ones(64, dtype=torch.bool))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "kept"):
            self.kept.bernoulli_(0.5)


def tied() -> nn.Module:
    net = Parts(nn.Linear(4, 4, bias=False))
    net.head.weight = net.trunk.weight
    net.more[0].weight = net.trunk.weight
    return net.double()


def partly() -> nn.Module:
    """One layer has its numbers, and one on meta shares its weight."""
    net = Parts()
    with torch.device("cpu"):
        net.trunk = nn.Linear(4, 4)
        nn.init.ones_(net.trunk.weight)
    net.head.weight = net.trunk.weight
    return net


def synchronized() -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(Parts(nn.BatchNorm1d(4)))


def anew() -> nn.Module:
    """Whatever was written is written over."""
    net = hugging_face()
    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    return net


FILLED: dict[str, Callable[[], nn.Module]] = {
    "plain": Parts,
    "norms": lambda: Parts(nn.BatchNorm1d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4)),
    "padding": lambda: nn.Embedding(4, 3, padding_idx=1),
    "recurrent": lambda: nn.LSTM(4, 4),
    "torchtitan": Norm,
    "rotary": Rotary,
    "thinned": Thinned,
    "format": lambda: Parts(nn.BatchNorm1d(4)).double(),
    "synchronized": synchronized,
    "anew": anew,
}


def reset(net: nn.Module) -> dict[str, Tensor]:
    """Return what all modules draw, one after another, and what comes next."""
    torch.manual_seed(3)
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return {**dict(net.named_parameters()), **dict(net.named_buffers()), "next": torch.rand(1)}


@pytest.mark.parametrize("name", FILLED)
def test_what_is_filled_is_what_each_module_draws_once(name: str) -> None:
    notes, net = noted(FILLED[name])
    assert notes.require(net) == ""
    torch.manual_seed(3)
    assert materialize(net)
    found = {**dict(net.named_parameters()), **dict(net.named_buffers()), "next": torch.rand(1)}
    wanted = reset(FILLED[name]())
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_weights_that_move_to_meta_as_they_are_registered_are_filled() -> None:
    with moved_as_registered():
        notes, net = noted(Parts)
    assert notes.require(net) == ""
    torch.manual_seed(3)
    materialize(net)
    found = {**dict(net.named_parameters()), "next": torch.rand(1)}
    torch.testing.assert_close(found, reset(Parts()), rtol=0, atol=0)


def test_what_is_tied_is_filled_once_and_stays_tied() -> None:
    notes, net = noted(tied)
    assert notes.require(net) == ""
    torch.manual_seed(3)
    materialize(net)
    torch.manual_seed(3)
    assert net.head.weight is net.trunk.weight is net.more[0].weight
    assert torch.equal(net.trunk.weight, nn.Linear(4, 4, dtype=torch.float64).weight)
    assert not bool(net.head.bias.isnan().any())


def test_what_its_user_gave_room_and_numbers_is_left_alone() -> None:
    notes, net = noted(lambda: hugging_face().to_empty(device="cpu").apply(ones))
    assert notes.require(net) == "" and not materialize(net)
    assert bool((net.head.bias == 1).all())


def ones(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        nn.init.ones_(parameter)


def test_what_has_numbers_keeps_them() -> None:
    notes, net = noted(partly)
    kept = net.trunk.weight
    assert notes.require(net) == ""
    materialize(net)
    assert net.head.weight is kept and bool((kept == 1).all())
    assert 0 < float(net.head.bias.detach().abs().max()) <= 0.5


# ---- what nobody looked on


class Partly(nn.Linear):
    """Of its gain, a row is filled."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.gain = nn.Parameter(torch.empty(4, 4))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "gain"):
            nn.init.ones_(self.gain[0])


class Scaled(nn.Linear):
    """Its `reset_parameters` works on what was there."""

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.mul_(0.5)
            self.bias.zero_()


def with_buffer(value: Any, dtype: torch.dtype) -> nn.Module:
    net = nn.Linear(4, 4)
    net.register_buffer("kept", torch.full((2,), value, dtype=dtype))
    return net


UNFILLED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "gain": (Gain, r"`gain` \(Gain\) are left"),
    "partly": (Partly, r"12 numbers of `gain`"),
    "scaled": (lambda: Scaled(4, 4), r"`weight` \(Scaled\) are left"),
    "long": (lambda: with_buffer(3, torch.int64), r"`kept` \(Linear\) are left"),
    "byte": (lambda: with_buffer(3, torch.uint8), r"`kept`"),
    "bool": (lambda: with_buffer(True, torch.bool), r"`kept`"),
    "complex": (lambda: with_buffer(1j, torch.complex64), r"`kept`"),
    "float8": (lambda: with_buffer(1, torch.float8_e4m3fn), r"`kept`"),
}


@pytest.mark.parametrize("name", UNFILLED)
def test_memory_that_nobody_filled_is_no_weight(name: str) -> None:
    make, said = UNFILLED[name]
    with torch.device("meta"):
        net = make()
    with pytest.raises(Unsupported, match=f"Found: {said}"):
        materialize(net)


def test_of_a_checkpoint_only_what_it_lacks_is_filled() -> None:
    _, net = noted(lambda: Parts(Rotary()))
    assert materialize(net, fills=False)
    assert torch.equal(net.more[0].table, Rotary().table)
    assert torch.equal(net.more[0].mask, Rotary().mask)
    _, net = noted(Parts)
    assert not materialize(net, fills=False) and not net.head.weight.is_meta


class Loose(nn.Module):
    """A shift that is no buffer."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.shift = [{"by": torch.ones(4, **given)}]


def test_what_nobody_can_fill_is_named() -> None:
    _, net = noted(lambda: Parts(Loose()))
    with pytest.raises(Unsupported, match=r"Found: `more.0.shift` \(Loose\). Do: "):
        refuse_loose(net)
    _, net = noted(lambda: Parts(nn.LazyLinear(4)))
    with pytest.raises(Unsupported, match=r"Found: `more.0.weight` \(LazyLinear\).*Do: "):
        refuse_loose(net)
    _, net = noted(lambda: Parts(nn.LSTM(4, 4), Loose(device="cpu")))
    refuse_loose(net)


# ---- in a fit


class OnMeta(LightningModule):
    """Made in `configure_model`, or before."""

    def __init__(self, make: Callable[[], nn.Module] = Parts, *, early: bool = False) -> None:
        super().__init__()
        self.make, self.net = make, None
        if early:
            self.configure_model()

    def configure_model(self) -> None:
        if self.net is None:
            with torch.device("meta"):
                self.net = self.make()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0].to(self.net.head.weight.dtype)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


def rows() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(4, 4)), 4)


def fit(module: LightningModule, strategy: Any, ckpt: Path | None = None, **given: Any) -> None:
    torch.manual_seed(3)
    run = trainer(**{"devices": 1, "strategy": strategy, "max_epochs": 1, **given})
    run.fit(module, rows(), ckpt_path=ckpt, weights_only=True)


STRATEGIES: dict[str, Callable[[], Any]] = {"shards": FSDP2Strategy, "auto": lambda: "accel_auto"}
ours = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)


@ours
def test_a_fit_fills_or_refuses(strategy: Callable[[], Any]) -> None:
    module = OnMeta(lambda: Parts(Norm()))
    fit(module, strategy())
    assert 0.3 < float(module.net.head.weight.detach().abs().max()) <= 0.5
    assert torch.equal(module.net.more[0].weight.detach(), torch.ones(4))
    for make, said in (
        (hugging_face, r"`net.trunk.weight` .*_init_weights"),
        (lambda: Parts(Loose()), r"`net.more.0.shift`"),
    ):
        with pytest.raises(Unsupported, match=f"Found: {said}"):
            fit(OnMeta(make), strategy())


@ours
def test_what_changes_its_format_in_the_fit_is_not_forgotten(strategy: Callable[[], Any]) -> None:
    module = OnMeta(lambda: Parts(nn.BatchNorm1d(4)).float())
    fit(module, strategy(), plugins=DoublePrecision())
    assert module.net.more[0].running_var.dtype == torch.float64
    with pytest.raises(Unsupported, match=r"`net.more.0.running_mean`"):
        fit(OnMeta(moved_mean), strategy(), plugins=DoublePrecision())


def moved_mean() -> nn.Module:
    net = Parts(norm := nn.BatchNorm1d(4))
    norm.running_mean.fill_(0.5)
    return net.float()


@ours
def test_what_was_made_before_is_filled_with_a_warning(strategy: Callable[[], Any]) -> None:
    module = OnMeta(hugging_face, early=True)
    with pytest.warns(UserWarning, match=r"Found: `net.trunk.weight`.*Do: make the layers in"):
        fit(module, strategy())
    assert 0.3 < float(module.net.head.weight.detach().abs().max()) <= 0.5


class WithTable(Parts):
    """Written on meta as people do, and a table that is in no file."""

    def __init__(self) -> None:
        super().__init__(Rotary())
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x)) * self.more[0].table


def saved(path: Path) -> OnMeta:
    """Return a module with weights on the host after an epoch, whose file is there."""
    with torch.device("cpu"):
        module = OnMeta()
        module.net = WithTable()
    run = trainer(devices=1, max_epochs=1)
    run.fit(module, rows())
    run.save_checkpoint(path)
    return module


@ours
def test_a_file_has_what_was_written(strategy: Callable[[], Any], tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    first = saved(path)
    again = OnMeta(WithTable)
    fit(again, strategy(), max_epochs=2, ckpt=path)
    torch.testing.assert_close(again.state_dict(), first.state_dict(), rtol=0, atol=0)
    assert torch.equal(again.net.more[0].table, Rotary().table)


@ours
def test_a_file_that_lacks_something_fills_the_rest(
    strategy: Callable[[], Any], tmp_path: Path
) -> None:
    path = tmp_path / "a.ckpt"
    saved(path)
    file = torch.load(path, weights_only=True)
    for name in ("net.trunk.weight", "net.head.weight"):
        del file["state_dict"][name]
        torch.save(file, path)
        again = OnMeta(WithTable)
        again.strict_loading = False
        if name == "net.head.weight":
            with pytest.raises(Unsupported, match=r"Found: `net.head.weight`"):
                fit(again, strategy(), max_epochs=2, ckpt=path)
        else:
            fit(again, strategy(), max_epochs=2, ckpt=path)
            assert torch.equal(again.net.head.weight.detach(), torch.zeros(4, 4))
            assert 0.3 < float(again.net.trunk.weight.detach().abs().max()) <= 0.5


def test_copies_are_refused_with_three_parts() -> None:
    with pytest.raises(Unsupported, match=r"Found: `net.trunk.weight` is on .* Do: .*accel_fsdp"):
        fit(OnMeta(), AccelDDPStrategy())
    module = OnMeta(lambda: Parts(Loose()).to_empty(device="cpu"))
    with pytest.raises(Unsupported, match=r"Found: `net.more.0.shift` \(Loose\)"):
        fit(module, AccelDDPStrategy())
