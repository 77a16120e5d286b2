"""float8 layers: which, why not the others, and what they compute; the numbers emulated, for lack of a GPU."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import AutocastPrecision, BlockCompile, StructuredPruning
from lightning_accel.errors import NoEffect, Unsupported
from lightning_accel.precision import Bf16Precision, Float8Linear, float8, float8_linear
from lightning_accel.precision.float8 import require_hardware, restore, why_not
from lightning_accel.surgery import Stage

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao"),
]
BF16 = torch.bfloat16
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="needs torchao"
)
every_recipe = pytest.mark.parametrize("recipe", float8.RECIPES)


class Net(nn.Module):
    """A first layer, two blocks and a head: 32 features to 16 classes."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first = nn.Linear(32, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(2)
        )
        self.head = nn.Linear(width, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


INSIDE = [f"blocks.{i}.{j}" for i in (0, 1) for j in (0, 2)]


class Module(LightningModule):
    """The user's, untouched."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.kinds: set[str] = set()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.kinds.add(type(self.net.blocks[0][0]).__name__)
        loss = F.cross_entropy(self.net(batch[0]).float(), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.kinds.add(type(self.net.blocks[0][0]).__name__)
        self.log("val", F.cross_entropy(self.net(batch[0]).float(), batch[1]))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 3e-3)


def module(kind: type[Module] = Module) -> Module:
    torch.manual_seed(0)
    return kind()


def data(size: int = 32) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(size, 32, generator=generator), torch.arange(size) % 16
    return DataLoader(TensorDataset(x, y), 10)  # and a ragged last batch


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Callable[..., Trainer]:
    def run(
        model: LightningModule, *callbacks: Callback, ckpt: Any = None, **kwargs: Any
    ) -> Trainer:
        saves = any(isinstance(c, ModelCheckpoint) for c in callbacks)
        given = {**trainer_kwargs, "enable_checkpointing": saves, **kwargs}
        trainer = Trainer(**given, callbacks=[*callbacks])
        trainer.fit(model, data(), data(), ckpt_path=ckpt)
        return trainer

    return run


def emulated(**kwargs: Any) -> Float8Linear:
    return Float8Linear(**{"smallest": 16, "emulate": True, **kwargs})


def same(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


# --- which layers, without torchao ----------------------------------------------------------------


def test_the_ends_are_left_and_the_inside_is_taken() -> None:
    reasons = why_not(Net(), smallest=16)
    assert [name for name, reason in reasons.items() if not reason] == INSIDE
    assert "raw input" in reasons["first"] and "the head" in reasons["head"]


def test_a_selection_overrules_the_ends_only() -> None:
    assert why_not(Net(), select=["first", "head"], smallest=16) == {"first": "", "head": ""}
    assert "too small" in why_not(Net(), select="head", smallest=32)["head"]


def test_a_first_layer_behind_an_embedding_sees_no_raw_input() -> None:
    net = nn.Sequential(nn.Embedding(8, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    assert why_not(net, smallest=16) == {"1": "", "2": float8._HEAD}


class Own(nn.Linear):
    pass


def test_every_reason_to_leave_a_layer_is_told() -> None:
    net = nn.ModuleDict(
        {
            "good": nn.Linear(64, 64),
            "inputs": nn.Linear(60, 64),
            "outputs": nn.Linear(64, 10),
            "small": nn.Linear(32, 64),
            "own": Own(64, 64),
            "long": nn.Linear(64, 64, dtype=torch.float64),
            "tied": nn.Linear(64, 128, bias=False),
            "words": nn.Embedding(128, 64),
            "patched": nn.Linear(64, 64),
            "norm": nn.LayerNorm(64),
        }
    )
    net["tied"].weight = net["words"].weight
    net["patched"].forward = lambda x: x
    found = why_not(net, select="*", smallest=64)
    assert found.pop("good") == ""
    assert set(found) == {"inputs", "outputs", "small", "own", "long", "tied", "patched"}
    for name, words in {
        "inputs": "60 inputs are no multiple of 16",
        "outputs": "10 outputs are no multiple of 16",
        "small": "32 inputs, fewer than 64",
        "own": "subclass of nn.Linear (Own)",
        "long": "float64",
        "tied": "embedding",
        "patched": "forward was replaced",
    }.items():
        assert words in found[name], name


def test_nothing_left_is_an_error_with_the_reasons_before_torchao_is_asked_for() -> None:
    with pytest.raises(NoEffect, match=r"0 8x8: too small: 8 inputs.*|no multiple of 16"):
        float8_linear(nn.Sequential(nn.Linear(8, 8)), select="*")
    with pytest.raises(NoEffect, match="too small: 64 inputs, fewer than 1024"):
        float8_linear(Net(), select="blocks")
    with pytest.raises(NoEffect, match=r"no nn.Linear in Sequential"):
        float8_linear(nn.Sequential(nn.Conv2d(16, 16, 1)))
    with pytest.raises(NoEffect, match="nowhere"):
        float8_linear(Net(), select="nowhere.*")


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, fit: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-accel\[float8\]"):
        float8_linear(Net(), smallest=16, emulate=True)
    model = module()
    with pytest.raises(ModuleNotFoundError, match=r"lightning-accel\[float8\]"):
        fit(model, emulated())
    assert type(model.net.blocks[0][0]) is nn.Linear


def test_a_device_without_float8_is_refused_with_what_it_is(
    monkeypatch: pytest.MonkeyPatch, fit: Any
) -> None:
    with pytest.raises(Unsupported, match=r"Found: cpu.*emulate=True"):
        fit(module(), Float8Linear(smallest=16))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, fine in (((8, 0), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        if fine:
            require_hardware(torch.device("cuda"))
        else:
            with pytest.raises(Unsupported, match=r"A100 with 8\.0"):
                require_hardware(torch.device("cuda"))


@pytest.mark.parametrize("bad", ["fp8", "", "delayed", "TENSORWISE"])
def test_an_unknown_recipe_is_refused_with_the_known_ones(bad: str) -> None:
    for call in (lambda: Float8Linear(recipe=bad), lambda: float8_linear(Net(), recipe=bad)):
        with pytest.raises(ValueError, match="'tensorwise', 'rowwise', 'rowwise_with_gw_hp'"):
            call()


@pytest.mark.parametrize(
    ("argument", "error"),
    [
        ({"recipe": None}, TypeError),
        ({"recipe": 8}, TypeError),
        ({"smallest": 0}, ValueError),
        ({"smallest": -1}, ValueError),
        ({"smallest": None}, TypeError),
        ({"smallest": float("nan")}, TypeError),
        ({"smallest": True}, TypeError),
        ({"smallest": "64"}, TypeError),
        ({"emulate": None}, TypeError),
        ({"emulate": 1}, TypeError),
        ({"select": 3}, TypeError),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(argument: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        Float8Linear(**argument)


def test_it_comes_before_compilation_and_after_pruning(fit: Any) -> None:
    assert Stage.SHAPE < Float8Linear.stage < BlockCompile.stage  # callbacks sort themselves by it


# --- what they compute, with torchao ----------------------------------------------------------------


def by_hand(x: Tensor, layer: nn.Linear) -> Tensor:
    """Compute a layer with both operands rounded to e4m3 under one scale each."""

    def rounded(t: Tensor) -> Tensor:
        scale = 448.0 / t.abs().max().double()
        return (t * scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn).float() / scale.float()

    return rounded(x) @ rounded(layer.weight.detach()).t() + layer.bias


@needs_torchao
def test_tensorwise_is_a_product_of_rounded_operands() -> None:
    layer = nn.Linear(64, 64)
    x = torch.randn(48, 64)
    expected = by_hand(x, layer)
    plain = layer(x)
    float8_linear(holder := nn.Sequential(layer), select="*", smallest=16, emulate=True)
    torch.testing.assert_close(holder(x), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, expected, rtol=1e-3, atol=1e-3)


@needs_torchao
@every_recipe
def test_values_and_gradients_are_near_those_of_fp32(recipe: str) -> None:
    torch.manual_seed(0)
    plain = Net()
    net = copy.deepcopy(plain)
    receipt = float8_linear(net, recipe=recipe, smallest=16, emulate=True)
    assert [change.name for change in receipt.changes] == INSIDE
    assert {change.name for change in receipt.skipped} == {"first", "head"}
    assert "4 linear layers in float8" in receipt.notes[0]
    x = torch.randn(20, 32)
    for model in (plain, net):
        model(x).square().sum().backward()
    for (name, one), two in zip(plain.named_parameters(), net.parameters(), strict=True):
        cosine = F.cosine_similarity(one.grad.flatten(), two.grad.flatten(), 0)
        assert 0.95 < cosine < 0.999999, name


@needs_torchao
def test_layers_change_in_place_and_back() -> None:
    net = Net()
    held = [*net.modules()], [*net.parameters()], net.state_dict().keys()
    calls: list[str] = []
    net.blocks[0][0].register_forward_hook(lambda *_: calls.append("hook"))
    kept = {name: set(vars(m)) for name, m in net.named_modules()}
    x = torch.randn(16, 32)
    expected = net(x)
    float8_linear(net, smallest=16, emulate=True)
    assert all(a is b for a, b in zip(held[0], net.modules(), strict=True))
    assert all(a is b for a, b in zip(held[1], net.parameters(), strict=True))
    assert held[2] == net.state_dict().keys()
    assert "already" in why_not(net, smallest=16)[INSIDE[0]]
    found = net(x)
    assert calls == ["hook"] * 2 and not torch.equal(found, expected)
    buffer = io.BytesIO()
    net.blocks[0][0]._forward_hooks.clear()
    pickle.dump(net, buffer)
    buffer.seek(0)
    for plain in (copy.deepcopy(net), pickle.load(buffer)):  # noqa: S301
        assert torch.equal(plain(x), expected) and same(plain, net) and restore(plain) == 0
        assert {name: set(vars(m)) for name, m in plain.named_modules()} == kept
    assert restore(net) == 4 and restore(net) == 0
    assert torch.equal(net(x), expected)
    assert {name: set(vars(m)) for name, m in net.named_modules()} == kept


@needs_torchao
@every_recipe
def test_a_fit_trains_in_float8_and_ends_with_plain_layers(fit: Any, recipe: str) -> None:
    model, plain = module(), module()
    objects = [*model.parameters()]
    callback = emulated(recipe=recipe)
    epochs = 12 if recipe == "tensorwise" else 2
    trainer = fit(model, callback, max_epochs=epochs, gradient_clip_val=1.0)
    assert model.kinds == {"Float8Linear"}
    assert type(model.net.blocks[0][0]) is nn.Linear
    held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert all(a is b is c for a, b, c in zip(objects, model.parameters(), held, strict=True))
    assert [change.name for change in callback.receipt.changes] == [f"net.{n}" for n in INSIDE]
    reference = fit(plain, max_epochs=epochs, gradient_clip_val=1.0)
    found, expected = (float(t.callback_metrics["val"]) for t in (trainer, reference))
    assert found < expected + 0.1 and (expected < 1.0 or epochs == 2)  # of 2.8 at the start
    assert not same(model, plain)


@needs_torchao
def test_resume_is_bit_equal_and_checkpoints_load_without(fit: Any, tmp_path: Path) -> None:
    whole = module()
    saver = ModelCheckpoint(dirpath=tmp_path / "a", save_top_k=-1, filename="{epoch}")
    fit(whole, emulated(), saver, max_epochs=3)
    resumed = module()
    fit(resumed, emulated(), max_epochs=3, ckpt=tmp_path / "a" / "epoch=1.ckpt")
    assert same(whole, resumed)
    plain = Module.load_from_checkpoint(tmp_path / "a" / "epoch=2.ckpt", weights_only=True)
    assert same(whole, plain) and type(plain.net.blocks[0][0]) is nn.Linear
    fit(module(), max_epochs=4, ckpt=tmp_path / "a" / "epoch=2.ckpt")


@needs_torchao
def test_evaluation_alone_uses_it_too_and_ends_plain(trainer_kwargs: dict[str, Any]) -> None:
    model = module()
    Trainer(**trainer_kwargs, callbacks=[emulated()]).test(model, data(), verbose=False)
    assert model.kinds == {"Float8Linear"} and type(model.net.blocks[0][0]) is nn.Linear


@needs_torchao
def test_an_exception_ends_with_plain_layers(fit: Any) -> None:
    class Fails(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise KeyError("now")

    model = module()
    with pytest.raises(KeyError):
        fit(model, Fails(), emulated())
    assert type(model.net.blocks[0][0]) is nn.Linear


@needs_torchao
def test_a_network_made_late_is_converted_at_the_start_of_the_fit(fit: Any) -> None:
    class Late(Module):
        def __init__(self) -> None:
            super().__init__()
            del self.net

        def configure_model(self) -> None:
            if not hasattr(self, "net"):
                self.net = Net()

    model = module(Late)
    fit(model, emulated())
    assert model.kinds == {"Float8Linear"}


class Manual(tiny.ByHand, Module):
    """Of the user's, by hand."""


@needs_torchao
@pytest.mark.parametrize("plugin", [lambda: AutocastPrecision("bf16-mixed"), Bf16Precision, None])
def test_it_goes_with_the_formats_and_other_callbacks(
    fit: Any, clean_dynamo: None, plugin: Any
) -> None:
    plugins = {"plugins": [plugin()]} if plugin else {}
    model = module()
    fit(model, EMAWeightAveraging(decay=0.9), emulated(), **plugins, accumulate_grad_batches=2)
    assert model.kinds == {"Float8Linear"} and all(p.isfinite().all() for p in model.parameters())
    model = module(Manual)
    compiled = [BlockCompile(backend="aot_eager")] if plugin is Bf16Precision else []
    fit(model, emulated(), *compiled, **plugins)
    assert all(p.isfinite().all() for p in model.parameters())


@needs_torchao
def test_pruning_meets_plain_layers_and_what_no_longer_fits_is_left(fit: Any) -> None:
    model = module()
    callback = emulated(smallest=64)
    prune = StructuredPruning(ratio=0.5, when=1, select="net.blocks.0")
    fit(model, prune, callback, max_epochs=3)
    assert model.net.blocks[0][0].out_features == 64  # of 128
    assert len(callback.receipt.changes) == 4
    model, callback = module(), emulated(smallest=128, select=["net.blocks.*.0", "net.blocks.*.2"])
    model.net = Net(128)
    prune = StructuredPruning(ratio=0.75, when=1, select="net.blocks")
    with pytest.warns(UserWarning, match="float8 ends here"):
        fit(model, prune, callback, max_epochs=3)
    assert model.kinds == {"Float8Linear", "Linear"}


@needs_torchao
def test_what_makes_it_slow_is_told_at_the_start(fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = emulated()
    monkeypatch.setattr(callback, "emulate", False)
    monkeypatch.setattr(float8, "require_hardware", lambda device: None)
    monkeypatch.setattr(float8, "_config", _emulating(float8._config))
    with pytest.warns(UserWarning, match=r"precision '32-true' and no compiled network"):
        fit(module(), callback)
    with pytest.warns(UserWarning, match="Found: no compiled network"):
        fit(module(), callback, plugins=[AutocastPrecision("bf16-mixed")])
    parts = {"plugins": [AutocastPrecision("bf16-mixed")]}
    fit(module(), callback, BlockCompile(backend="eager"), **parts)  # a warning would be an error


def _emulating(config: Any) -> Any:
    return lambda recipe, emulate: config(recipe, True)
