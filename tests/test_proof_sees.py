"""Outputs and layers behind which a cut was once proved blindly, or refused for what it is not."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_pruning
from torch import Tensor, distributions, nn

from lightning_accel.errors import AccelError, BrokenModel
from lightning_accel.pruning import TorchPruner, prune
from lightning_accel.surgery import twin

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """Ends in `last`; with `wrong`, it divides by a number of channels that no cut can follow."""

    def __init__(self, last: Callable[[Tensor], Any], *, wrong: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.last, self.wrong = nn.Linear(8, 16), nn.Linear(16, 4), last, wrong
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.a(x))
        if self.wrong:
            x = x * x.sum(1, keepdim=True) / x.shape[1]
        return self.last(self.b(x))


STUCK: dict[str, Callable[[Tensor], Tensor]] = {
    "dead": lambda y: torch.relu(-y.abs()),
    "clamped": lambda y: (y.abs() + 5).clamp(0, 1),
    "saturated": lambda y: torch.sigmoid(y + 100),
    "rounded": lambda y: torch.round(y * 1e-3),
}


@pytest.mark.parametrize("last", STUCK.values(), ids=STUCK)
def test_outputs_that_hang_on_no_weight_prove_nothing(last: Callable[[Tensor], Tensor]) -> None:
    net = Net(last, wrong=True)
    with pytest.raises(AccelError, match="the same whatever its weights are"):
        prune(net, example=X, ratio=0.5)
    assert net.a.out_features == 16


def test_a_gate_that_begins_closed_hides_nothing() -> None:
    class Gated(Net):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :4] + self.gate * super().forward(x)

    net = Gated(lambda y: y, wrong=True)
    with pytest.raises(BrokenModel, match="does not compute what the masked one computes"):
        prune(net, example=X, ratio=0.5)


class Held:
    def __init__(self, scores: Tensor) -> None:
        self.scores = scores


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "infinite": lambda y: torch.cat([y, torch.full_like(y[:, :1], -torch.inf)], 1).log_softmax(1),
    "missing": lambda y: torch.cat([y, torch.full_like(y[:, :1], torch.nan)], 1),
    "normal": lambda y: distributions.Normal(y, 1.0),
    "categorical": lambda y: distributions.Categorical(logits=y),
    "object": Held,
    "array": lambda y: y.detach().numpy(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [False, True])
def test_outputs_of_every_kind_show_whether_a_cut_is_right(kind: str, wrong: bool) -> None:
    net = Net(KINDS[kind], wrong=wrong)
    if wrong:
        with pytest.raises(BrokenModel, match="does not compute"):
            prune(net, example=X, ratio=0.5)
        return
    dense = copy.deepcopy(net)
    prune(net, example=X, ratio=0.5)
    kept = torch.isin(dense.a.weight, net.a.weight).all(1)
    assert int(kept.sum()) == net.a.out_features == 8
    hidden = torch.relu(dense.a(X))[:, kept]
    scores = F.linear(hidden, dense.b.weight[:, kept], dense.b.bias)
    torch.testing.assert_close(net.b(torch.relu(net.a(X))), scores)


def test_what_is_random_in_evaluation_mode_is_told() -> None:
    def noisy(self: Any, args: Any, output: Tensor) -> Tensor:
        return output + torch.randn_like(output)

    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    net[1].register_forward_hook(noisy)
    with pytest.raises(BrokenModel, match="random in evaluation mode"):
        prune(net, example=X, ratio=0.5)


def test_what_cannot_be_copied_is_told() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    net.numbers = (i for i in range(3))
    with pytest.raises(AccelError, match="cannot be copied"):
        prune(net, example=X, ratio=0.5)


def test_a_copy_has_locks_of_its_own() -> None:
    class Locked(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
            self.own, self.locks = threading.local(), [threading.Lock(), threading.RLock()]
            self.own.scale, self.condition = 2.0, threading.Condition()

        def forward(self, x: Tensor) -> Tensor:
            with self.locks[0], self.locks[1], self.condition:
                return self.own.scale * super().forward(x)

    net = Locked()
    net.locks[0].acquire()  # which a copy that shared it would wait for
    try:
        copied = twin(net)
        assert copied.own is not net.own and copied.own.scale == 2.0
        assert torch.equal(copied(X), 2 * nn.Sequential.forward(net, X))
    finally:
        net.locks[0].release()
    prune(net, example=X, ratio=0.5)
    assert net[0].out_features == 8
    with pytest.raises(TypeError):
        copy.deepcopy(net.locks[0])  # as ever


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused_by_name(layout: torch.layout) -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    ragged = torch.nested.nested_tensor([X[:3], X[:2]], layout=layout)
    with pytest.raises(AccelError, match="nested tensors"):
        prune(net, example=ragged, ratio=0.5)


def test_a_sparse_gradient_is_cut_with_its_parameter() -> None:
    net = nn.Sequential(nn.Embedding(5, 16, sparse=True), nn.ReLU(), nn.Linear(16, 4))
    net(torch.tensor([1, 3])).sum().backward()
    dense = copy.deepcopy(net)
    dense[0].weight.grad = net[0].weight.grad.to_dense()  # type: ignore[union-attr]
    prune(net, example=torch.tensor([1, 3]), ratio=0.5)
    kept = torch.isin(dense[0].weight, net[0].weight).all(0)
    assert torch.equal(net[0].weight.grad, dense[0].weight.grad[:, kept])  # type: ignore[index,arg-type]


NORMS = {
    "parametrized": nn.utils.parametrizations.spectral_norm,
    "hooked": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("name", NORMS)
def test_a_layer_under_a_spectral_norm_is_divided_by_its_own(name: str) -> None:
    """Divided by what was left of a larger layer's norm, outputs were five times too large."""
    norm: Any = NORMS[name]
    net = nn.Sequential(
        norm(nn.Linear(8, 32)), nn.ReLU(), norm(nn.Linear(32, 24)), nn.Linear(24, 4)
    )
    for _ in range(100):
        net(X)
    receipt = prune(net, example=X, ratio=0.5)
    assert {"0", "2"} <= {c.name for c in receipt.changes if "spectral" in c.what}
    net.eval()(X)
    for layer in (net[0], net[2]):
        raw = (
            layer.parametrizations.weight.original if name == "parametrized" else layer.weight_orig
        )
        torch.testing.assert_close(layer.weight, raw / torch.linalg.matrix_norm(raw, 2))


def hessian(net: nn.Module) -> Any:
    made = torch_pruning.importance.GroupHessianImportance()
    for loss in F.cross_entropy(net(X), torch.arange(6) % 4, reduction="none"):
        net.zero_grad()
        loss.backward(retain_graph=True)
        made.accumulate_grad(net)
    return made


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)
    )


@pytest.mark.parametrize("way", ["importance", "pruner"])
def test_what_an_importance_gathered_on_the_users_network_counts(way: str) -> None:
    bare, net = perceptron(), perceptron()
    torch_pruning.pruner.BasePruner(
        bare, X, hessian(bare), pruning_ratio=0.5, ignored_layers=[bare[4]]
    ).step()
    gathered = hessian(net)
    gradient = net[0].weight.grad.clone()  # type: ignore[union-attr]
    if way == "importance":
        prune(net, example=X, ratio=0.5, importance=gathered)
    else:

        def made(model: Any, example: Any) -> Any:
            return torch_pruning.pruner.BasePruner(
                model, example, gathered, pruning_ratio=0.5, ignored_layers=[model[4]]
            )

        prune(net, example=X, pruner=made)
    for ours, theirs in zip(net.parameters(), bare.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    rows = torch.isin(perceptron()[0].weight, net[0].weight).all(1)
    assert torch.equal(net[0].weight.grad, gradient[rows])  # type: ignore[arg-type]


def test_a_pruner_that_has_stepped_is_refused() -> None:
    def stepped(model: Any, example: Any) -> Any:
        made = torch_pruning.pruner.BasePruner(
            model, example, torch_pruning.importance.GroupMagnitudeImportance(), pruning_ratio=0.5
        )
        made.step()
        return made

    with pytest.raises(AccelError, match="has made a step"):
        prune(perceptron(), example=X, pruner=stepped)


def test_an_option_that_a_pruner_does_not_know_is_named() -> None:
    with pytest.raises(AccelError, match="BasePruner has no option `reg`"):
        prune(perceptron(), example=X, pruner=TorchPruner(options={"reg": 1e-4}))
    net = perceptron()
    prune(net, example=X, pruner=TorchPruner(options={"reg": None}, ignored_layers="4"))
    assert net[0].out_features == 8


def test_a_state_of_former_sizes_is_told_before_the_cut() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.out, self.z = nn.GRUCell(8, 24), nn.Linear(24, 3), torch.zeros(0, 24)

        def forward(self, x: Tensor) -> Tensor:
            z = self.z if len(self.z) == len(x) else x.new_zeros(len(x), self.cell.hidden_size)
            self.z = self.cell(x, z).detach()
            return self.out(self.z)

    net = Recurrent()
    net(X)
    with pytest.raises(BrokenModel, match="keep tensors from call to call"):
        prune(net, example=X, ratio=0.5)
    net.z = torch.zeros(0, 24)
    prune(net, example=X, ratio=0.5)
    assert net(X).shape == (6, 3) and net.cell.hidden_size == 12
