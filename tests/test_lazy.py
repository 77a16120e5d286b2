"""Layers of torch's lazy kind, whose weights come with their first input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import (
    ActivationBudget,
    AutocastPrecision,
    Bf16Precision,
    BlockCompile,
    Distillation,
    MemoryFormat,
    SparsityTraining,
    StructuredPruning,
    WeightMasks,
)
from lightning_accel.errors import Unsupported

pytestmark = [
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature"),
    pytest.mark.filterwarnings("ignore:StructuredPruning"),  # of an untrained network
    pytest.mark.filterwarnings("ignore:The total number of parameters"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]


class Lazy(LightningModule):
    """A user's module; `first` names the hook in which it sees an example, if there is one."""

    def __init__(self, first: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.drawn: list[Any] = []
        self.net = nn.Sequential(
            nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(16),
            nn.ReLU(), nn.Linear(16, 4),
        )  # fmt: skip
        if first == "__init__":
            self.see()
        elif first is not None:
            setattr(self, first, self.see)

    def see(self, *_: Any, **__: Any) -> None:
        torch.manual_seed(1)
        with torch.no_grad():
            self.net.eval()(torch.zeros(1, 3, 8, 8))
        self.net.train()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.net(batch[0])
        if not self.drawn:
            self.drawn = [p.tolist() for p in self.parameters()]
        return F.cross_entropy(out, batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(kwargs: dict[str, Any], module: Lazy, callbacks: list[Callback], **more: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 3, 8, 8, generator=generator)
    data = DataLoader(TensorDataset(x, torch.arange(16) % 4), 8)
    given = {**kwargs, "max_epochs": 3, "callbacks": callbacks, **more}
    torch.manual_seed(2)
    Trainer(**given).fit(module, data)


FIRST = (None, "__init__", "setup", "configure_model")


@pytest.mark.slow
@pytest.mark.parametrize("first", FIRST)
def test_a_lazy_network_is_pruned_as_the_same_one_with_sizes(
    trainer_kwargs: dict[str, Any], first: str | None
) -> None:
    module, sized = Lazy(first), Lazy("__init__")
    fit(trainer_kwargs, module, [StructuredPruning(ratio=0.5, when=1)])
    with torch.no_grad():
        for parameter, drawn in zip(sized.parameters(), module.drawn, strict=True):
            parameter.copy_(torch.tensor(drawn))
    sized.net[1].reset_running_stats()  # type: ignore[operator]
    fit(trainer_kwargs, sized, [StructuredPruning(ratio=0.5, when=1)])
    assert [p.shape[0] for p in module.parameters()] == [4, 4, 4, 4, 8, 8, 4, 4]
    for one, other in zip(module.parameters(), sized.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


NEEDS: dict[str, Callable[[], list[Callback]]] = {
    "prune": lambda: [StructuredPruning(ratio=0.5, when=0)],
    "sparsity": lambda: [SparsityTraining()],
    "masks": lambda: [WeightMasks(0.5)],
    "budget": lambda: [ActivationBudget(0.5)],
    "compile": lambda: [BlockCompile(backend="eager")],
    "format": lambda: [MemoryFormat()],
    "distill": lambda: [Distillation(teacher="ema")],
}


@pytest.mark.parametrize("name", NEEDS)
def test_what_needs_weights_at_the_start_says_how_to_get_them(
    trainer_kwargs: dict[str, Any], name: str
) -> None:
    fit(trainer_kwargs, Lazy(), [])
    with pytest.raises(
        Unsupported, match=r"lazy layers.*`net\.0\.weight` and \d+ more.*run the net"
    ):
        fit(trainer_kwargs, Lazy(), NEEDS[name]())


@pytest.mark.parametrize("first", ["__init__", "setup", "configure_model"])
@pytest.mark.parametrize("name", [n for n in NEEDS if n != "budget"])
def test_with_an_example_in_time_all_goes(
    trainer_kwargs: dict[str, Any], name: str, first: str
) -> None:
    fit(trainer_kwargs, Lazy(first), NEEDS[name]())


def test_masks_that_come_later_find_the_weights(trainer_kwargs: dict[str, Any]) -> None:
    module = Lazy()
    fit(trainer_kwargs, module, [WeightMasks(0.5, when=1)])
    weight = module.net[4].weight
    assert int((weight == 0).sum()) == weight.numel() // 2  # type: ignore[union-attr, operator, arg-type]


@pytest.mark.parametrize("first", FIRST)
def test_mixed_precision_computes_as_lightnings(
    trainer_kwargs: dict[str, Any], first: str | None
) -> None:
    ours, theirs = Lazy(first), Lazy(first)
    fit(trainer_kwargs, ours, [], plugins=[AutocastPrecision("bf16-mixed")])
    fit(trainer_kwargs, theirs, [], precision="bf16-mixed")
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(Unsupported, match="lazy layers"):
        fit(trainer_kwargs, Lazy(), [], plugins=[Bf16Precision()])
