"""XLA for real, on the CPU: `make xla`. Results are compared with the same fit without it, and executions are counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import XLAPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import (
    AccelReport,
    ActivationCheckpointing,
    AutocastPrecision,
    AutoTune,
    Bf16Precision,
    BlockCompile,
    Distillation,
    FastLoading,
    LeanLoop,
    PostTrainingQuantization,
    SparsityTraining,
    StructuredPruning,
    Teacher,
    UsePrecision,
    WeightMasks,
    XlaPrecision,
    hardware,
    load_from_checkpoint,
)
from lightning_accel.devices.choose import accelerator_of, precision_on_xla
from lightning_accel.errors import Unsupported
from lightning_accel.measure.timing import time_call

pytestmark = [
    pytest.mark.xla,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning"
    ),  # Lightning calls torch_xla's old names
    pytest.mark.filterwarnings("ignore:TPU available but not used"),
    pytest.mark.filterwarnings("ignore:the teacher is hardly better"),
    pytest.mark.filterwarnings("ignore:StructuredPruning cuts before the first step"),
]
STEPS = 8


class Module(LightningModule):
    """The user's, untouched; it notes where it computes, and in which format."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or tiny.MLP()
        self.seen: set[str] = set()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.net(batch[0])
        self.seen.add(f"{out.device.type} {str(out.dtype)[6:]}")
        return F.cross_entropy(out.float(), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


@pytest.fixture(autouse=True)
def _one_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Lightning believe that there is a TPU: it asks a server of Google's, and not the runtime."""
    import torch_xla

    torch_xla.device()  # before the first backward of this process, which counts the devices
    monkeypatch.setattr("torch_xla._internal.tpu.num_available_devices", lambda: 1)


def data() -> DataLoader[Any]:
    x = torch.randn(4 * STEPS, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, torch.arange(4 * STEPS) % 4), 4)


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., tuple[Module, Trainer, int]]:
    """Return the module, its Trainer and how many graphs were executed."""

    def run(accelerator: str = "tpu", **given: Any) -> tuple[Module, Trainer, int]:
        from torch_xla.debug import metrics

        torch.manual_seed(0)
        module = Module(given.pop("net", None))
        trainer = Trainer(**{**tiny.silent(tmp_path), "accelerator": accelerator, **given})
        metrics.clear_all()
        trainer.fit(module, data())
        return module, trainer, (metrics.metric_data("ExecuteTime") or [0])[0]

    return run


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().float().cpu().flatten() for p in module.parameters()])


def taught() -> Distillation:
    torch.manual_seed(7)
    return Distillation(Teacher(tiny.MLP(32), precision="32-true"), student="net")


TECHNIQUES: dict[str, tuple[Callable[[], Any], float]] = {
    "plain": (lambda: LeanLoop(), 1.0),
    "masks": (lambda: WeightMasks(0.5), 1.0),
    "prune before": (lambda: StructuredPruning(0.5, when=0), 1.0),
    "prune in mid-training": (lambda: StructuredPruning(0.5, when=1), 1.0),
    "distillation": (taught, 2.0),
    "recomputation": (lambda: ActivationCheckpointing(select="net.body"), 1.0),
    "loading": (lambda: FastLoading(), 1.0),
    "quantized": (lambda: PostTrainingQuantization(), 1.0),
    "sparsity": (lambda: SparsityTraining(), 1.0),
}
"""With what each is, and the executions that a step may take."""


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_technique_does_what_it_does_without_xla_and_a_step_stays_one_graph(
    fit: Any, name: str
) -> None:
    make, most = TECHNIQUES[name]
    alone, *_ = fit("cpu", callbacks=[make()])
    module, _, few = fit(callbacks=[make()])
    assert module.seen == {"xla float32"} and alone.seen == {"cpu float32"}
    assert weights(module).shape == weights(alone).shape
    assert torch.allclose(weights(module), weights(alone), atol=2e-6)
    *_, many = fit(callbacks=[make()], max_epochs=6)
    assert (many - few) / (4 * STEPS) <= most, (few, many)


def test_bfloat16_is_really_what_xla_computes_in(fit: Any) -> None:
    import torch_xla

    mixed, *_ = fit(plugins=[XlaPrecision("bf16-mixed")])
    by_hand, *_ = fit("cpu", precision="bf16-mixed")
    plain, *_ = fit("cpu")
    assert mixed.seen == {"xla bfloat16"} and {p.dtype for p in mixed.parameters()} == {
        torch.float32
    }
    near, far = ((weights(mixed) - weights(one)).norm() for one in (by_hand, plain))
    assert near < far < 0.1 * weights(plain).norm()
    x = torch.ones(4, 8, device=torch_xla.device())
    net = tiny.MLP().to(x.device)
    with XlaPrecision("bf16-mixed").forward_context():
        text = torch_xla._XLAC._get_xla_tensors_hlo([net(x)])
    products = [line for line in text.splitlines() if " dot(" in line]
    assert len(products) == 3 and all("bf16[" in line for line in products)


@pytest.mark.parametrize(
    ("given", "plugin", "dtype"),
    [
        ({"precision": "bf16-true"}, "XlaPrecision('bf16-true')", torch.bfloat16),
        ({"callbacks": [AutocastPrecision("auto")]}, "XlaPrecision('bf16-mixed')", torch.float32),
        ({"callbacks": [AutocastPrecision("32-true")]}, "", torch.float32),
    ],
)
def test_what_was_asked_for_is_computed_by_what_xla_has(
    fit: Any, given: dict[str, Any], plugin: str, dtype: torch.dtype
) -> None:
    """Lightning's own "bf16-true" sets a variable that torch_xla reads no more, and computes in float32."""
    given = {k: [UsePrecision(*v)] if k == "callbacks" else v for k, v in given.items()}
    warns = pytest.warns(UserWarning, match="put right") if "precision" in given else None
    with warns if warns is not None else torch.enable_grad():
        module, trainer, _ = fit(**given)
    found = trainer.strategy.precision_plugin
    assert repr(found) == plugin or (not plugin and type(found) is XLAPrecision)
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert module.seen == {"xla bfloat16" if plugin else "xla float32"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"callbacks": [BlockCompile()]}, "XLA compiles whole steps by itself"),
        ({"callbacks": [UsePrecision(AutocastPrecision("16-mixed"))]}, "XlaPrecision"),
        ({"callbacks": [UsePrecision(Bf16Precision())]}, "XlaPrecision"),
        ({"callbacks": [AutoTune(budget_s=1)]}, "lightning-accel tune"),
        ({"callbacks": [ActivationCheckpointing(select="net.body", policy="selective")]}, "full"),
        ({"precision": "16-true"}, "bf16-true"),
    ],
)
def test_what_cannot_be_there_says_what_to_do(fit: Any, given: dict[str, Any], said: str) -> None:
    with pytest.raises(Unsupported, match="Found: .*Do: ") as refused:
        fit(**given)
    assert said in str(refused.value)


def test_statistics_are_not_counted_twice_in_recomputed_blocks(fit: Any) -> None:
    body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    net = nn.Sequential(body, nn.Linear(8, 4))
    with pytest.raises(Unsupported, match="`net.0.1`, a BatchNorm1d"):
        fit(net=net, callbacks=[ActivationCheckpointing(select="net.0")])


def test_the_compiler_keeps_what_is_recomputed() -> None:
    """Without a barrier it would find that both are the same, and nothing would be saved."""
    import torch_xla

    from lightning_accel.memory import checkpoint_activations

    x = torch.randn(4, 8).to(torch_xla.device())
    net = tiny.MLP().to(x.device)
    checkpoint_activations(net, select="body")
    net(x).sum().backward()
    grads = [p.grad for p in net.parameters()]
    assert all(g is not None for g in grads)
    text = torch_xla._XLAC._get_xla_tensors_hlo(grads)
    assert "opt-barrier" in text and text.count(" dot(") > 6  # twice forward, and backward


def test_checkpoints_load_without_xla(fit: Any, tmp_path: Path) -> None:
    module, trainer, _ = fit(callbacks=[StructuredPruning(0.5, when=1)])
    trainer.save_checkpoint(tmp_path / "xla.ckpt", weights_only=True)
    held = torch.load(tmp_path / "xla.ckpt", weights_only=True, map_location=None)
    assert {t.device.type for t in held["state_dict"].values()} == {"cpu"}
    found = load_from_checkpoint(Module, tmp_path / "xla.ckpt")
    assert torch.equal(weights(found), weights(module))
    assert len(weights(found)) < len(weights(Module()))


def test_what_is_timed_is_computed(fit: Any) -> None:
    """A lazy device computes only what somebody holds, and the clock would see the tracing alone."""
    import torch_xla
    from torch_xla.debug import metrics

    x = torch.ones(64, 64, device=torch_xla.device())
    metrics.clear_all()
    found = time_call(lambda: x @ x, device="xla", budget_s=0.05)
    assert metrics.metric_data("ExecuteTime")[0] >= found.num_calls >= 5
    hardware._describe.cache_clear()
    metrics.clear_all()
    hardware.describe("xla")
    assert metrics.metric_data("ExecuteTime")[0] > 10


def test_a_report_measures_there(fit: Any) -> None:
    from torch_xla.debug import metrics

    report = AccelReport(budget_s=4)
    fit(callbacks=[StructuredPruning(0.5, when=1), report])
    found = report.report
    assert found is not None and found.ratios.params > 2 and found.ratios.macs > 2
    assert found.dense.latency_ms and found.final.latency_ms and found.dense.steps_per_s
    assert metrics.metric_data("ExecuteTime")[0] > 100  # beside the 23 of the fit


def test_a_configuration_asks_for_a_tpu_as_for_any_device() -> None:
    assert accelerator_of("tpu") == "tpu"
    found = precision_on_xla({"accelerator": "tpu", "precision": "bf16-mixed"})
    assert repr(found) == "XlaPrecision('bf16-mixed')"
