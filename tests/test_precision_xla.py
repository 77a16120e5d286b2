"""bf16 on XLA, with the CPU and a fake torch_xla standing in: nothing here ran on an XLA device."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import pytest
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision, XLAPrecision
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel.errors import Unsupported
from lightning_accel.precision import XlaPrecision

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"
)
BF16, FP32 = torch.bfloat16, torch.float32


class OnCpu(XlaPrecision):
    device_type: ClassVar[str] = "cpu"


class Module(LightningModule):
    """The user's, untouched."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny.MLP()
        self.seen: set[tuple[torch.dtype, torch.dtype]] = set()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.net(batch[0])
        self.seen.add((batch[0].dtype, out.dtype))
        return F.cross_entropy(out.float(), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for torch_xla, and note what it was asked for."""
    names: list[str] = []
    for name in ("torch_xla", "torch_xla.core", "torch_xla.core.xla_model"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    model = sys.modules["torch_xla.core.xla_model"]
    model.mark_step = lambda: names.append("mark_step")  # type: ignore[attr-defined]
    model.reduce_gradients = lambda optimizer: names.append("reduce")  # type: ignore[attr-defined]
    sys.modules["torch_xla"].core = sys.modules["torch_xla.core"]  # type: ignore[attr-defined]
    sys.modules["torch_xla.core"].xla_model = model  # type: ignore[attr-defined]
    return names


def data() -> DataLoader[Any]:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, torch.arange(16) % 4), 4)


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Callable[..., Module]:
    def run(plugin: Any, **kwargs: Any) -> Module:
        torch.manual_seed(0)
        model = Module()
        trainer = Trainer(**{**trainer_kwargs, **kwargs}, plugins=[plugin])
        trainer.fit(model, data(), data())
        trainer.test(model, data(), verbose=False)
        return model

    return run


def same(a: Module, b: Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return all(torch.equal(one[name], two[name]) for name in one)


def test_mixed_computes_what_autocast_computes(fit: Any, calls: list[str]) -> None:
    found = fit(OnCpu("bf16-mixed"), gradient_clip_val=0.5)
    assert found.seen == {(FP32, BF16)}
    assert {p.dtype for p in found.parameters()} == {FP32}
    assert calls == ["reduce", "mark_step"] * 8
    assert same(found, fit(MixedPrecision("bf16-mixed", "cpu"), gradient_clip_val=0.5))


def test_true_computes_what_a_converted_module_computes(fit: Any, calls: list[str]) -> None:
    found = fit(OnCpu("bf16-true"))
    assert found.seen == {(BF16, BF16)}
    assert {p.dtype for p in found.parameters()} == {BF16}
    assert same(found, fit(HalfPrecision("bf16-true")))


def test_the_module_is_converted_in_place_for_xla_ignores_what_is_returned(
    trainer_kwargs: dict[str, Any],
) -> None:
    model = Module()
    model.trainer = Trainer(**trainer_kwargs)
    OnCpu("bf16-true").convert_module(model)
    assert {p.dtype for p in model.parameters()} == {BF16}


def test_an_xla_strategy_takes_the_plugin() -> None:
    """Its setter wants a subclass of Lightning's, and nothing else."""
    from lightning.pytorch.strategies import SingleDeviceXLAStrategy

    strategy = SingleDeviceXLAStrategy.__new__(SingleDeviceXLAStrategy)
    strategy.precision_plugin = plugin = XlaPrecision()
    assert isinstance(plugin, XLAPrecision) and strategy.precision_plugin is plugin


def test_the_environment_is_left_alone(
    fit: Any, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_USE_BF16", "users")
    before = dict(os.environ)
    fit(OnCpu("bf16-true"))
    assert dict(os.environ) == before | {"PYTEST_CURRENT_TEST": os.environ["PYTEST_CURRENT_TEST"]}


def test_the_default_dtype_is_back_after_a_step_that_fails(fit: Any, calls: list[str]) -> None:
    class Fails(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert torch.get_default_dtype() == BF16
            raise KeyError("now")

    with pytest.raises(KeyError), OnCpu("bf16-true").forward_context():
        Fails().training_step(None, 0)
    assert torch.get_default_dtype() == FP32


def test_another_device_is_refused_with_the_way_out(fit: Any) -> None:
    for name in ("bf16-mixed", "bf16-true"):
        with pytest.raises(Unsupported, match="AutocastPrecision"):
            fit(XlaPrecision(name))


@pytest.mark.parametrize("bad", ["bf16", "16-mixed", "32-true", "", "16-true"])
def test_an_unknown_precision_is_refused_with_the_known_ones(bad: str) -> None:
    with pytest.raises(ValueError, match="'bf16-true', 'bf16-mixed'"):
        XlaPrecision(bad)


@pytest.mark.parametrize("bad", [None, 16, -1, float("nan"), torch.bfloat16])
def test_a_precision_that_is_no_name_is_refused(bad: Any) -> None:
    with pytest.raises(TypeError, match="'bf16-mixed'"):
        XlaPrecision(bad)


def test_modules_made_under_the_plugin_have_its_dtype() -> None:
    for name, dtype in (("bf16-true", BF16), ("bf16-mixed", FP32)):
        with XlaPrecision(name).module_init_context():
            assert torch.ones(1).dtype == dtype
    assert torch.ones(1).dtype == FP32


@pytest.mark.xla
def test_on_a_real_xla_device(trainer_kwargs: dict[str, Any]) -> None:
    import torch_xla

    x = torch.ones(4, 4, device=torch_xla.device())
    with XlaPrecision("bf16-mixed").forward_context():
        assert (x @ x).dtype == BF16
