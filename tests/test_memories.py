"""After a prune every optimizer goes on as one that had trained the smaller network, or says that it starts anew."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import StructuredPruning, WeightMasks
from lightning_accel.pruning import prune
from lightning_accel.surgery import follow

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (32,), generator=torch.Generator().manual_seed(2))


def net() -> nn.Sequential:
    """Return a network whose middle weight is square, as is what is left of it."""
    torch.manual_seed(0)
    one, two, three = (nn.Linear(*size, bias=False) for size in ((8, 16), (16, 16), (16, 3)))
    return nn.Sequential(one, nn.Tanh(), two, nn.Tanh(), three)


class Factored(torch.optim.Optimizer):
    """Adafactor as in transformers: factors without the averaged dimension, first moments, relative steps."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for p in self.param_groups[0]["params"]:
            state, grad = self.state[p], p.grad
            if not state:
                state["step"], state["RMS"] = 0, 0.0
                state["exp_avg"] = torch.zeros_like(grad)
                state["exp_avg_sq_row"] = torch.zeros(grad.shape[:-1])
                state["exp_avg_sq_col"] = torch.zeros(grad.shape[:-2] + grad.shape[-1:])
            state["step"] += 1
            state["RMS"] = p.norm().item() / p.numel() ** 0.5
            lr = min(1e-2, state["step"] ** -0.5) * max(1e-3, state["RMS"])
            decay = 1.0 - state["step"] ** -0.8
            square = grad**2 + 1e-30
            state["exp_avg_sq_row"].mul_(decay).add_(square.mean(-1), alpha=1 - decay)
            state["exp_avg_sq_col"].mul_(decay).add_(square.mean(-2), alpha=1 - decay)
            row, column = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
            moment = (row / row.mean(-1, keepdim=True)).unsqueeze(-1) * column.unsqueeze(-2)
            update = grad * moment.rsqrt()
            update /= max(1.0, update.norm().item() / update.numel() ** 0.5)
            state["exp_avg"].mul_(0.9).add_(update * lr, alpha=0.1)
            p.sub_(state["exp_avg"])
        return loss


class Shampoo(torch.optim.Optimizer):
    """Gupta et al. 2018, with a preconditioner of each side and a momentum."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state["left"], state["right"] = (1e-2 * torch.eye(n) for n in p.shape)
                state["momentum"] = torch.zeros_like(p)
            state["left"] += p.grad @ p.grad.T
            state["right"] += p.grad.T @ p.grad
            update = _root(state["left"]) @ p.grad @ _root(state["right"])
            state["momentum"].mul_(0.5).add_(update)
            p.sub_(state["momentum"], alpha=1e-2)
        return loss


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix.double())
    return (vectors * values.clamp_min(1e-6) ** -0.25 @ vectors.T).float()


class Codes(torch.optim.Optimizer):
    """Momentum in eight bits: codes, and a scale of the tensor or of each block of codes."""

    def __init__(self, params: Any, block: int | None = None) -> None:
        super().__init__(params, {})
        self.block = block

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for p in self.param_groups[0]["params"]:
            state, block = self.state[p], self.block or p.numel()
            if not state:
                state["codes"] = torch.zeros_like(p, dtype=torch.int8)
                state["scale"] = torch.ones(p.numel() // block, 1)
            old = state["codes"].float().view(-1, block) * state["scale"]
            new = old * 0.9 + p.grad.view(-1, block)
            p.sub_(new.view_as(p), alpha=0.1)
            state["scale"].copy_(new.abs().amax(1, keepdim=True) / 127 + 1e-12)
            state["codes"].copy_((new / state["scale"]).round().view_as(p))
        return loss


class Projected(torch.optim.Optimizer):
    """Momentum of a gradient that an object in the state turns into another basis (GaLore at full rank)."""

    class Basis:
        def __init__(self, size: int) -> None:
            torch.manual_seed(size)
            self.matrix = torch.linalg.qr(torch.randn(size, size))[0]

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state["basis"] = self.Basis(p.shape[0])
                state["exp_avg"] = torch.zeros_like(p)
            matrix = state["basis"].matrix
            state["exp_avg"].mul_(0.9).add_(matrix @ p.grad)
            p.sub_(matrix.T @ state["exp_avg"], alpha=0.1)
        return loss


class Flat(torch.optim.Optimizer):
    """Momentum of all parameters in one vector, kept in the state of the first (L-BFGS of one's own)."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        params = self.param_groups[0]["params"]
        state = self.state[params[0]]
        flat = torch.cat([p.grad.flatten() for p in params])
        history = state.setdefault("history", [torch.zeros_like(flat)])
        history[-1] = history[-1] * 0.9 + flat
        for p, update in zip(params, history[-1].split([p.numel() for p in params]), strict=True):
            p.sub_(update.view_as(p), alpha=0.1)
        return loss


Kept = tuple[Tensor | None, Tensor | None]


def sliced(value: Any, kept: Kept, shape: torch.Size) -> Any:
    if not isinstance(value, Tensor) or value.shape != shape:
        return copy.deepcopy(value)
    for dim, positions in enumerate(kept):
        value = value if positions is None else value.index_select(dim, positions)
    return value.clone()


def as_elements(state: dict[str, Any], kept: Kept, shape: torch.Size) -> dict[str, Any]:
    return {key: sliced(value, kept, shape) for key, value in state.items()}


def as_factors(state: dict[str, Any], kept: Kept, shape: torch.Size) -> dict[str, Any]:
    """Write out the second moment that the factors stand for, cut it, and average it again."""
    rows, columns = [k for k in state if "row" in k] + [k for k in state if "col" in k]
    r, c = state[rows].double().flatten(), state[columns].double().flatten()
    moment = sliced(torch.outer(r, c) / r.mean(), kept, shape)
    found = as_elements(state, kept, shape)
    squeezed = state[rows].dim() == 1
    found[rows] = moment.mean(1, keepdim=not squeezed).float()
    found[columns] = moment.mean(0, keepdim=not squeezed).float()
    return found


def anew(state: dict[str, Any], kept: Kept, shape: torch.Size) -> dict[str, Any]:
    return {}


CARRIED: dict[str, tuple[Callable[[Any], Any], Callable[..., dict[str, Any]]]] = {
    "Adafactor": (lambda p: torch.optim.Adafactor(p, lr=1e-2), as_factors),
    "Adafactor of transformers": (Factored, as_factors),
    "Muon": (lambda p: torch.optim.Muon(p, lr=1e-2), as_elements),
    "codes with a scale": (Codes, as_elements),
}
RESET: dict[str, Callable[[Any], Any]] = {
    "Shampoo": Shampoo,
    "codes in blocks": lambda p: Codes(p, block=8),
    "GaLore": Projected,
    "one vector": Flat,
    "L-BFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=1),
}


class Module(LightningModule):
    def __init__(self, make: Callable[[Any], Any]) -> None:
        super().__init__()
        self.net, self.make = net(), make

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.make(self.net.parameters())


class Cuts(Callback):
    def on_model_edit_end(self, trainer: Any, pl_module: Any, receipt: Any) -> None:
        dims = {move.name: move.kept.dims for move in receipt.moved}
        self.kept = [dims[f"net.{i}.weight"] for i in (0, 2, 4)]


def fit(module: LightningModule, *callbacks: Callback) -> None:
    trainer = Trainer(
        max_epochs=4,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=8))


def train(model: nn.Module, optimizer: Any, epochs: int, masks: list[Tensor] | None = None) -> None:
    for i in list(range(4)) * epochs:

        def closure(i: int = i) -> Tensor:
            optimizer.zero_grad()
            batch = slice(8 * i, 8 * i + 8)
            loss = nn.functional.cross_entropy(model(X[batch]), Y[batch])
            loss.backward()
            for p, keep in zip(model.parameters(), masks or [], strict=masks is not None):
                p.grad *= keep  # type: ignore[operator]
            return loss

        optimizer.step(closure)
        for p, keep in zip(model.parameters(), masks or [], strict=masks is not None):
            p.data *= keep


def by_hand(make: Callable[[Any], Any], carry: Callable[..., Any], kept: list[Kept]) -> nn.Module:
    """Train, cut weights and state by hand, and go on with a new optimizer of the smaller network."""
    dense = net()
    optimizer = make(dense.parameters())
    train(dense, optimizer, 2)
    small = net()
    for p, q, which in zip(small.parameters(), dense.parameters(), kept, strict=True):
        p.data = sliced(q.detach(), which, q.shape)
    follower = make(small.parameters())
    for p, q, which in zip(small.parameters(), dense.parameters(), kept, strict=True):
        if carried := carry(optimizer.state.get(q, {}), which, q.shape):
            follower.state[p] = carried
    train(small, follower, 2)
    return small


def same(one: nn.Module, other: nn.Module) -> None:
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CARRIED)
def test_state_that_can_be_cut_goes_on(name: str) -> None:
    make, carry = CARRIED[name]
    module, cuts = Module(make), Cuts()
    fit(
        module, StructuredPruning(ratio=0.5, when=2, compensate=False), cuts
    )  # any warning is an error
    assert module.net[2].weight.shape == (8, 8)
    same(module.net, by_hand(make, carry, cuts.kept))


@pytest.mark.parametrize("name", RESET)
def test_state_that_mixes_elements_starts_anew_and_is_named(name: str) -> None:
    module, cuts = Module(RESET[name]), Cuts()
    with pytest.warns(UserWarning, match="optimizer states could not follow the edit"):
        fit(module, StructuredPruning(ratio=0.5, when=2, compensate=False), cuts)
    same(module.net, by_hand(RESET[name], anew, cuts.kept))


def test_a_preconditioner_of_a_square_weight_is_not_masked() -> None:
    module, masks = Module(Shampoo), WeightMasks(amount=0.5, when=0)
    fit(module, masks)
    true = net()
    keep = [masks.masks[f"net.{i}.weight"].float() for i in (0, 2, 4)]
    for p, one in zip(true.parameters(), keep, strict=True):
        p.data *= one
    optimizer = Shampoo(true.parameters())
    moving(true, optimizer, keep)
    same(module.net, true)


def moving(model: nn.Module, optimizer: Shampoo, keep: list[Tensor]) -> None:
    """Train with masks on gradients, weights and the momentum, step by step."""
    for i in list(range(4)) * 4:
        optimizer.zero_grad()
        batch = slice(8 * i, 8 * i + 8)
        nn.functional.cross_entropy(model(X[batch]), Y[batch]).backward()
        for p, one in zip(model.parameters(), keep, strict=True):
            p.grad *= one  # type: ignore[operator]
        optimizer.step()
        for p, one in zip(model.parameters(), keep, strict=True):
            p.data *= one
            optimizer.state[p]["momentum"] *= one


def test_factors_of_kernels_are_cut_along_what_they_keep() -> None:
    """Transformers factors the last two dimensions of a convolution: the others are cut as they are."""
    one, two = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 4, 3, bias=False)
    model = nn.Sequential(one, two)
    optimizer, weight = Factored(model.parameters()), two.weight
    model(torch.randn(2, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    before = {key: copy.deepcopy(value) for key, value in optimizer.state[weight].items()}
    receipt = prune(model, example=torch.randn(2, 3, 8, 8), ratio=0.5)
    assert not follow(optimizer, receipt).skipped
    kept = next(move.kept.dims[1] for move in receipt.moved if move.name == "1.weight")
    for key, shape in (("exp_avg_sq_row", (4, 4, 3)), ("exp_avg_sq_col", (4, 4, 3))):
        assert optimizer.state[weight][key].shape == shape
        torch.testing.assert_close(optimizer.state[weight][key], before[key][:, kept])


def test_a_history_in_the_state_of_what_was_not_cut_starts_anew() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = Flat([model[2].bias, *model[0].parameters(), model[2].weight])
    model(torch.randn(2, 4)).square().mean().backward()
    optimizer.step()
    receipt = prune(model, example=torch.randn(2, 4), ratio=0.5)
    assert [c.name for c in follow(optimizer, receipt).skipped] == ["all parameters"]
    model.zero_grad()
    model(torch.randn(2, 4)).square().mean().backward()
    before = model[2].weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(model[2].weight, before - 0.1 * model[2].weight.grad)  # type: ignore[operator]
