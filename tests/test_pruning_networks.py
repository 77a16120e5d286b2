"""Networks outside of the zoo on which pruning was wrong, refused too much, or gave an untrue reason."""

from __future__ import annotations

import copy
import functools
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from by_value import Fn, check, masked
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_accel import StructuredPruning
from lightning_accel.errors import AccelError, NoEffect
from lightning_accel.pruning import Macs, prune
from lightning_accel.surgery import twin
from lightning_accel.surgery.call import as_call


def conv(ins: int, outs: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(ins, outs, kernel, padding=kernel // 2)


def perceptron() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    return net.double()


# -- hooks that take part in the forward ------------------------------------------------------------


def scales_output(net: nn.Sequential) -> None:
    scale = torch.rand(16, dtype=torch.float64)
    net[0].register_forward_hook(lambda _, __, output: output * scale)


def scales_input(net: nn.Sequential) -> None:
    scale = torch.rand(16, dtype=torch.float64)
    net[2].register_forward_pre_hook(lambda _, args: (args[0] * scale,))


def scales_keyword(net: nn.Sequential) -> None:
    scale = torch.rand(16, dtype=torch.float64)

    def hook(module: Any, args: Any, kwargs: Any) -> Any:
        return (args[0] * scale,), kwargs

    net[2].register_forward_pre_hook(hook, with_kwargs=True)


def changes_in_place(net: nn.Sequential) -> None:
    scale = torch.rand(16, dtype=torch.float64)

    def hook(_: Any, __: Any, output: Tensor) -> None:
        output.mul_(scale)

    net[0].register_forward_hook(hook)


class Method:
    def __init__(self) -> None:
        self.scale = torch.rand(16, dtype=torch.float64)
        self.heard: list[int] = []

    def hook(self, _: Any, __: Any, output: Tensor) -> Tensor:
        self.heard.append(1)
        return output * self.scale


def of_an_object(net: nn.Sequential) -> None:
    net[0].register_forward_hook(Method().hook)


SIZED = [scales_output, scales_input, scales_keyword, changes_in_place, of_an_object]


@pytest.mark.parametrize("register", SIZED)
def test_a_layer_that_a_hook_scales_keeps_its_width(register: Callable[..., None]) -> None:
    net, x = perceptron(), torch.randn(4, 8, dtype=torch.float64)
    register(net)
    receipt = prune(net, example=x, ratio=0.5)
    assert net[0].out_features == 16
    assert net[2].out_features == 6
    assert any(change.name == "0" and "constant" in change.what for change in receipt.skipped)
    net(x).sum().backward()


def test_a_hook_that_reads_sizes_follows_the_cut() -> None:
    """The hook of a parent drops half of the channels of what the child gives."""
    net, x = perceptron(), torch.randn(4, 8, dtype=torch.float64)
    net[1].register_forward_hook(lambda _, __, out: out / (1 + out.square()))
    dense = copy.deepcopy(net)
    prune(net, example=x, ratio=0.5)
    assert net[0].out_features == 8
    torch.testing.assert_close(net(x), masked(dense, net)(x), rtol=1e-10, atol=1e-10)


def test_what_hooks_hand_on_behind_everyones_back_stays() -> None:
    """As transformers records hidden states: nothing is returned by the hook, the forward gives it out."""
    seen: list[Tensor] = []

    def forward(self: Any, x: Tensor) -> Any:
        seen.clear()
        return self.inner(x), tuple(seen)

    net = Fn(forward, inner=perceptron())
    net.inner[0].register_forward_hook(lambda _, __, output: seen.append(output))
    receipt = prune(net, example=torch.randn(4, 8, dtype=torch.float64), ratio=0.5)
    assert net.inner[0].out_features == 16
    assert net.inner[2].out_features == 6
    assert receipt


def test_hooks_that_watch_are_not_heard_and_cost_nothing() -> None:
    net, x = perceptron(), torch.randn(4, 8, dtype=torch.float64)
    heard: list[int] = []
    counts = {"calls": 0}
    method = Method()

    def count(*_: Any) -> None:
        counts["calls"] += 1

    net[0].register_forward_hook(lambda *_: heard.append(1))
    net.register_forward_pre_hook(count)
    net[2].register_forward_hook(lambda *a: method.heard.append(1))
    prune(net, example=x, ratio=0.5)
    assert (heard, counts, method.heard) == ([], {"calls": 0}, [])
    assert net[0].out_features == 8
    net(x)
    assert (heard, counts, method.heard) == ([1], {"calls": 1}, [1])


@pytest.fixture
def everywhere() -> Iterator[Callable[..., None]]:
    """Registers hooks of all modules, for the length of a test."""
    handles: list[Any] = []

    def register(hook: Callable[..., Any], *, before: bool = False) -> None:
        name = "register_module_forward_pre_hook" if before else "register_module_forward_hook"
        handles.append(getattr(nn.modules.module, name)(hook))

    yield register
    for handle in handles:
        handle.remove()


def test_hooks_of_all_modules_take_part_or_are_not_heard(everywhere: Callable[..., None]) -> None:
    net, x = perceptron(), torch.randn(4, 8, dtype=torch.float64)
    heard: list[int] = []
    scale = torch.rand(16, dtype=torch.float64)

    def first_of_all(module: nn.Module, _: Any, output: Tensor) -> Tensor | None:
        heard.append(1)
        scales = isinstance(module, nn.Linear) and module.in_features == 8
        return output * scale if scales else None

    everywhere(first_of_all)
    everywhere(lambda *_: heard.append(2), before=True)
    everywhere((hooks := Hooks()).count)
    prune(net, example=x, ratio=0.5)
    assert (heard, hooks.calls) == ([], 0)
    assert (net[0].out_features, net[2].out_features) == (16, 6)
    net(x).sum().backward()
    assert len(heard) == 12


@pytest.mark.filterwarnings("ignore:.*weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize(
    ("norm", "leaf"),
    [(nn.utils.weight_norm, "weight_v"), (nn.utils.spectral_norm, "weight_orig")],
)
def test_the_hooks_of_norms_of_weights_follow_and_so_do_declared_sizes(
    norm: Any, leaf: str, called: bool
) -> None:
    net, x = perceptron(), torch.randn(4, 8, dtype=torch.float64)
    norm(net[0]), norm(net[2])
    if called:
        net(x)  # leaves a weight that hangs on the graph of this call
    net.eval()
    before = {name: t.detach().clone() for name, t in net.state_dict().items()}
    prune(net, example=x, ratio=0.5)
    assert (net[0].out_features, net[2].in_features, net[2].out_features) == (8, 8, 6)
    hidden = x
    for layer in (
        0,
        2,
    ):  # by hand: what is left of the dense weights, over a row's former norm or its own as a whole
        weight, key = net[layer].get_parameter(leaf), f"{layer}.{leaf}"
        rows = [i for i, b in enumerate(before[f"{layer}.bias"]) if b in net[layer].bias]
        columns = [i for i, w in enumerate(before[key][rows[0]]) if w in weight]
        whole, part = before[key], before[key][rows][:, columns]
        if leaf == "weight_v":
            whole = whole / whole.norm(dim=1, keepdim=True) * before[f"{layer}.weight_g"]
            part = whole[rows][:, columns]
        else:
            part = part / torch.linalg.matrix_norm(part, 2)
        hidden = F.relu(F.linear(hidden, part, before[f"{layer}.bias"][rows]))
    by_hand = F.linear(hidden, net[4].weight, net[4].bias)
    torch.testing.assert_close(net(x), by_hand, rtol=1e-9, atol=1e-9)
    net.train()(x).sum().backward()


class Hooks(Callback):
    """Scales what the first layer gives, and counts the calls of the second."""

    def __init__(self) -> None:
        self.scale = torch.rand(16)
        self.calls = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        net: Any = pl_module.net
        net[0].register_forward_hook(lambda _, __, output: output * self.scale)
        net[2].register_forward_hook(self.count)

    def count(self, *_: Any) -> None:
        self.calls += 1


class Fitted(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = perceptron().float()

    def training_step(self, batch: Any, _: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.filterwarnings("ignore:None of the layers of this network have been trained")
def test_hooks_that_a_callback_registers_in_a_fit_take_part(trainer_kwargs: dict[str, Any]) -> None:
    module, hooks = Fitted(), Hooks()
    callbacks = [hooks, StructuredPruning(ratio=0.5, when=1)]
    trainer = Trainer(**{**trainer_kwargs, "max_epochs": 2}, callbacks=callbacks)
    trainer.fit(module, DataLoader([torch.randn(8) for _ in range(8)], batch_size=4))
    assert (module.net[0].out_features, module.net[2].out_features) == (16, 6)
    assert hooks.calls == 4  # once for each batch, and not for what was tried on copies


class Halved(Hooks):
    """Reads the first half of what the first layer gives: no step runs without its hook."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()  # of which there is no copy
        self.held: list[Any] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        net: Any = pl_module.net
        net[2] = nn.Linear(8, 12)
        self.held.append(trainer)
        net[1].register_forward_hook(self.halve)
        net[2].register_forward_hook(self.count)

    def halve(self, _: Any, __: Any, output: Tensor) -> Tensor:
        self.held.append(1)
        return output[:, :8]


@pytest.mark.filterwarnings("ignore:None of the layers of this network have been trained")
@pytest.mark.parametrize(
    ("made", "options"),
    [
        (Hooks, {"ratio": 0.5, "importance": "taylor"}),
        (Hooks, {"ratio": 0.5, "importance": "taylor2"}),
        (Hooks, {"target": Macs(0.8)}),
        (Halved, {"ratio": 0.5}),
        (Halved, {"target": Macs(0.5)}),
    ],
)
def test_hooks_take_part_whatever_is_asked_for(
    made: type[Hooks], options: Any, trainer_kwargs: dict[str, Any]
) -> None:
    """Measuring on a copy without the hooks led to a cut that the network with its hooks did not survive."""
    module, hooks = Fitted(), made()
    callbacks = [hooks, StructuredPruning(when=1, **options)]
    trainer = Trainer(**{**trainer_kwargs, "max_epochs": 2}, callbacks=callbacks)
    trainer.fit(module, DataLoader([torch.randn(8) for _ in range(8)], batch_size=4))
    assert module.net[2].out_features < 12
    assert (module.net[0].out_features == 16) == (made is Hooks)
    assert hooks.calls == 4
    assert not isinstance(hooks, Halved) or hooks.held == [trainer, 1, 1, 1, 1]


@pytest.mark.filterwarnings("ignore:None of the layers of this network have been trained")
def test_batch_norms_are_renewed_behind_the_hooks(trainer_kwargs: dict[str, Any]) -> None:
    module = Fitted()
    module.net[3] = nn.BatchNorm1d(12, momentum=None)
    module.net[0].register_forward_hook(lambda _, __, output: output * 100)
    callbacks = [StructuredPruning(ratio=0.5, when=1, recalibrate=2)]
    kwargs = {**trainer_kwargs, "max_epochs": 2, "limit_train_batches": 2}
    data = [torch.randn(8) for _ in range(8)]
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)  # type: ignore[method-assign]
    Trainer(**kwargs, callbacks=callbacks).fit(module, DataLoader(data, batch_size=4))
    hidden = module.net[:3](torch.stack(data))
    torch.testing.assert_close(module.net[3].running_mean, hidden.mean(0), rtol=1e-4, atol=1e-3)


def test_a_hook_may_run_in_inference_mode() -> None:
    net, x = perceptron(), torch.randn(4, 8, dtype=torch.float64)
    scales_output(net)
    copied = twin(net, [as_call(x)])
    with torch.inference_mode():
        torch.testing.assert_close(copied(x), net(x))


# -- what kernels ask of widths ---------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_an_encoder_that_nests_padded_batches_keeps_an_even_number_of_heads(ratio: float) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 8, 24, batch_first=True), 2)
    net = Fn(
        lambda s, x, padding: s.o(s.encoder(s.i(x), src_key_padding_mask=padding)),
        i=nn.Linear(8, 16),
        encoder=encoder,
        o=nn.Linear(16, 3),
    ).eval()
    x, padding = torch.randn(3, 6, 8), torch.zeros(3, 6, dtype=torch.bool)
    padding[0, 4:] = True
    prune(net, example=(x, padding), ratio=ratio)
    heads = encoder.layers[0].self_attn.num_heads
    assert heads < 8 and heads % 2 == 0
    with torch.no_grad():
        nested = net(x, padding)  # as every validation has it
    plain = net(x, padding)
    torch.testing.assert_close(nested[1:], plain[1:], rtol=1e-4, atol=1e-5)


def test_an_encoder_that_never_nests_may_keep_an_odd_number_of_heads() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    net = nn.Sequential(nn.Linear(8, 16), encoder, nn.Linear(16, 3)).eval()
    prune(net, example=torch.randn(3, 6, 8), ratio=0.25)
    assert encoder.layers[0].self_attn.num_heads == 3


def experts(dtype: torch.dtype) -> Fn:
    def forward(s: Any, x: Tensor) -> Tensor:
        ends = torch.tensor([len(x) // 2, len(x)], dtype=torch.int32)
        gate, up = F.grouped_mm(s.i(x), s.w, offs=ends).chunk(2, -1)
        return s.o(F.grouped_mm(F.silu(gate) * up, s.v, offs=ends))

    parts = {"i": nn.Linear(8, 32), "o": nn.Linear(32, 4)}
    weights = {"w": torch.randn(2, 32, 96), "v": torch.randn(2, 48, 32)}
    return Fn(forward, **parts, **{k: nn.Parameter(w * 0.2) for k, w in weights.items()}).to(dtype)


@pytest.mark.parametrize(("dtype", "multiple"), [(torch.float32, 4), (torch.bfloat16, 8)])
def test_experts_of_grouped_products_keep_rows_of_16_bytes(dtype: Any, multiple: int) -> None:
    net, x = experts(dtype), torch.randn(6, 8, dtype=dtype)
    dense = copy.deepcopy(net)
    receipt = prune(net, example=x, ratio=0.3)
    _, width, hidden = net.w.shape
    assert (width % multiple, hidden // 2 % multiple) == (0, 0)
    assert (width, hidden // 2) < (32, 48) and width <= 24 and hidden <= 2 * 40
    assert not [change for change in receipt.skipped if "bytes" in change.what]
    if dtype == torch.float32:
        torch.testing.assert_close(net(x), masked(dense, net)(x), rtol=1e-4, atol=1e-5)


# -- what the proof computes with -------------------------------------------------------------------


def attention(masks: Callable[[Tensor], Tensor], width: int = 16) -> Fn:
    def forward(s: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = s.qkv(x).view(b, n, 3, s.heads, -1).permute(2, 0, 3, 1, 4)
        shares = masks(q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).to(v.dtype)
        return s.o((shares @ v).transpose(1, 2).reshape(b, n, -1))

    return Fn(forward, qkv=nn.Linear(8, 3 * width), o=nn.Linear(width, 4), heads=4)


@pytest.mark.parametrize("has_constant", [False, True])
def test_a_forward_that_goes_on_in_float32_is_proved_in_float64_where_it_can(
    has_constant: bool,
) -> None:
    """The least number of float64 is minus infinity in float32: a row of it has no softmax."""

    def masks(scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, :, 0] = torch.finfo(scores.dtype).min  # a padded query sees nobody
        scores = scores.float()
        return scores @ torch.eye(scores.shape[-1]) if has_constant else scores

    net, x = attention(masks), torch.randn(2, 6, 8)
    dense = copy.deepcopy(net)
    receipt = prune(net, example=x, ratio=0.5)
    assert net.heads == 2
    assert any("float32" in note for note in receipt.notes) == has_constant
    torch.testing.assert_close(net(x), masked(dense, net)(x), rtol=1e-4, atol=1e-5)


class Product(torch.autograd.Function):
    """A matrix product with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x @ y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, y = ctx.saved_tensors
        return grads[0] @ y.mT, x.mT @ grads[0]


def test_products_within_an_autograd_function_of_ones_own_are_followed() -> None:
    net = Fn(
        lambda s, x: s.o(Product.apply(F.relu(Product.apply(x, s.w)), s.v)),
        w=nn.Parameter(torch.randn(8, 16)),
        v=nn.Parameter(torch.randn(16, 12)),
        o=nn.Linear(12, 4),
    )
    check(net, torch.randn(6, 8, dtype=torch.float64))
    assert net.w.shape == (8, 8) and net.v.shape == (8, 6)


class Spread(torch.autograd.Function):
    """Softmax of scores that are not scaled by the width of a head, all in one function."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.softmax(q @ k.mT, -1) @ v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads[0], grads[0], grads[0]


def test_the_width_of_heads_in_an_autograd_function_goes_unscaled() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = s.qkv(x).view(b, n, 3, 2, -1).permute(2, 0, 3, 1, 4)
        return s.o(Spread.apply(q, k, v).transpose(1, 2).reshape(b, n, -1))

    net = Fn(forward, qkv=nn.Linear(8, 48), o=nn.Linear(16, 4)).double()
    x, dense = torch.randn(2, 5, 8, dtype=torch.float64), copy.deepcopy(net)
    prune(net, example=x, ratio=0.5, attention="width")
    assert net.qkv.out_features == 24
    torch.testing.assert_close(net(x), masked(dense, net)(x), rtol=1e-9, atol=1e-9)


# -- what is said -----------------------------------------------------------------------------------


def test_the_note_says_the_share_of_all_channels_and_of_the_parameters() -> None:
    """Half of the few that can go is little of the whole: the wide layer reads a size in its code."""
    net = nn.Sequential(
        nn.Linear(8, 30),
        Fn(lambda _, x: x.view(-1, 30).relu()),
        nn.Linear(30, 6),
        nn.ReLU(),
        nn.Linear(6, 4),
    )
    before = sum(p.numel() for p in net.parameters())
    receipt = prune(net, example=torch.randn(4, 8), ratio=0.5)
    left = sum(p.numel() for p in net.parameters()) / before
    assert receipt.notes[0].startswith("50.0% of the channels and heads that can go are gone")
    assert f"{3 / 40:.1%} of all" in receipt.notes[0]  # of 30 + 6 + 4
    assert f"{left:.1%} of parameters are left" in receipt.notes[0]


def reasons(net: nn.Module, x: Tensor) -> dict[str, str]:
    try:
        return {change.name: change.what for change in prune(net, example=x, ratio=0.5).skipped}
    except NoEffect as error:
        return {"": str(error)}


class Triangle(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return torch.cumsum(weight, 0)


def parametrized() -> nn.Module:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    torch.nn.utils.parametrize.register_parametrization(net[0], "weight", Triangle())
    return net


def own_parameter() -> nn.Module:
    return Fn(
        lambda s, x: s.o(F.relu(s.i(x) + s.places[0])),
        i=nn.Linear(8, 16),
        places=nn.Parameter(torch.randn(1, 16)),
        o=nn.Linear(16, 3),
    )


def vmapped() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.o(F.relu(s.i(x))) + torch.vmap(lambda w: F.linear(x, w))(s.w).mean(0)

    return Fn(forward, i=nn.Linear(8, 16), w=nn.Parameter(torch.randn(4, 3, 8)), o=nn.Linear(16, 3))


def unruled() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 16),
        Fn(lambda _, x: torch.linalg.qr(x)[0]),
        nn.Linear(4, 12),
        nn.ReLU(),
        nn.Linear(12, 3),
    )


def unused() -> nn.Module:
    return Fn(
        lambda s, x: s.o(F.relu(s.i(x))),
        i=nn.Linear(8, 16),
        idle=nn.Linear(5, 5),
        o=nn.Linear(16, 3),
    )


@pytest.mark.parametrize(
    ("build", "name", "said"),
    [
        (parametrized, "0.parametrizations.weight", "compete"),
        (own_parameter, "places", ""),
        (vmapped, "w", "output"),
        (unruled, "0", "`linalg_qr`"),
        (unused, "idle", "it never ran on the example"),
    ],
)
def test_the_reason_is_the_true_one(build: Callable[[], nn.Module], name: str, said: str) -> None:
    torch.manual_seed(0)
    found = reasons(build(), torch.randn(4, 8))
    assert said in found.get(name, ""), found
    assert ("never ran" in found.get(name, "")) == (build is unused)


def test_a_forward_that_cannot_be_watched_is_not_said_to_fail() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        assert type(x.shape[0]) is int
        return s.o(F.relu(s.i(x)))

    net, x = Fn(forward, i=nn.Linear(8, 16), o=nn.Linear(16, 3)), torch.randn(4, 8)
    with pytest.raises(AccelError, match="its forward runs, but not while it is watched"):
        prune(net, example=x, ratio=0.5)


# -- operations that had no rule --------------------------------------------------------------------


def test_distances_to_prototypes_are_followed() -> None:
    net = Fn(
        lambda s, x: s.o(torch.cdist(F.relu(s.i(x)), s.prototypes)),
        i=nn.Linear(8, 16),
        prototypes=nn.Parameter(torch.randn(10, 16)),
        o=nn.Linear(10, 3),
    )
    check(net, torch.randn(5, 8, dtype=torch.float64), torch.randn(30, 8, dtype=torch.float64))
    assert net.prototypes.shape == (5, 8)


def test_one_number_scattered_over_channels_is_followed() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.i(x)
        first = torch.zeros(len(x), dtype=torch.long).view(-1, 1, 1).expand(-1, 1, x.shape[2])
        return s.o(x.scatter_(1, first, 0.0).relu().mean(1))

    net = Fn(forward, i=nn.Linear(8, 16), o=nn.Linear(16, 3))
    check(net, torch.randn(5, 4, 8, dtype=torch.float64))
    assert net.i.out_features == 8


@pytest.mark.parametrize("loss", [F.mse_loss, F.smooth_l1_loss, F.huber_loss])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_between_hidden_layers_are_followed(loss: Any, reduction: str) -> None:
    def forward(s: Any, x: Tensor) -> Any:
        a, b = s.a(x), s.b(x)
        return s.o(a), loss(a, b, reduction=reduction)

    net = Fn(forward, a=nn.Linear(8, 16), b=nn.Linear(8, 16), o=nn.Linear(16, 3)).double()
    x, dense = torch.randn(5, 8, dtype=torch.float64), copy.deepcopy(net)
    prune(net, example=x, ratio=0.5)
    assert net.a.out_features == net.b.out_features == 8
    small, whole = net(x)[1], masked(dense, net)(x)[1]
    torch.testing.assert_close(small / 2 if reduction == "mean" else small, whole)


# -- sizes ------------------------------------------------------------------------------------------


def _shapes(shape: Any, heads: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    b, n, width = shape
    return (b, n, heads, width // heads), (b, n, heads * (width // heads))


def test_sizes_that_einops_computes_are_not_taken_from_its_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its cache knows them as plain integers, from the calls before, and would keep ours."""
    einops = types.ModuleType("einops.einops")
    cached = functools.lru_cache(_shapes)
    vars(einops).update(_reconstruct_from_shape=cached, _reconstruct_from_shape_uncached=_shapes)
    monkeypatch.setitem(sys.modules, "einops.einops", einops)

    def forward(s: Any, x: Tensor) -> Tensor:
        q, k, v = s.qkv(x).chunk(3, -1)
        split, merged = vars(einops)["_reconstruct_from_shape"](q.shape, 4)
        q, k, v = (t.reshape(split).transpose(1, 2) for t in (q, k, v))
        return s.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(merged))

    net, x = Fn(forward, qkv=nn.Linear(8, 96), o=nn.Linear(32, 4)), torch.randn(2, 5, 8)
    net(x)
    prune(net, example=x, ratio=0.5)
    assert net.qkv.out_features == 48
    assert vars(einops)["_reconstruct_from_shape"] is cached
    assert net(x).shape == (2, 5, 4)


def tokens_read_as_channels(s: Any, x: Tensor) -> Tensor:
    h = s.a(x)
    b, c, height, width = h.shape
    return s.o(h.flatten(2).transpose(1, 2).reshape(b, c, height, width))


def windows_read_as_channels(s: Any, x: Tensor) -> Tensor:
    h = s.a(x)
    b, c, height, width = h.shape
    return s.o(h.permute(0, 2, 3, 1).reshape(b, c, height, width))


def steps_read_as_channels(s: Any, x: Tensor) -> Tensor:
    h = s.a(x)
    b, c, steps = h.flatten(2).shape
    h = h.flatten(2).transpose(1, 2).reshape(b, c, steps)
    return s.o(h.unflatten(2, x.shape[2:]))


@pytest.mark.parametrize(
    "forward", [tokens_read_as_channels, windows_read_as_channels, steps_read_as_channels]
)
def test_what_is_right_at_the_size_of_the_example_only_stays(forward: Any) -> None:
    """segmentation-models' MAnet: right at 64 pixels, wrong at 96."""
    net = Fn(forward, a=conv(3, 16, 1), b=conv(3, 8), o=conv(16, 4, 1)).double()
    rest = Fn(lambda s, x: (s.net(x), s.c(F.relu(s.b(x)))), net=net, b=conv(3, 8), c=conv(8, 4))
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    larger, dense = torch.randn(2, 3, 3, 3, dtype=torch.float64), copy.deepcopy(rest.double())
    receipt = prune(rest, example=x, ratio=0.5)
    assert net.a.out_channels == 16 and rest.b.out_channels == 4
    assert any(change.name == "net.a" for change in receipt.skipped)
    for given in (x, larger):
        for one, other in zip(rest(given), masked(dense, rest)(given), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


# -- branches that an example does not take ---------------------------------------------------------


def tasks() -> Fn:
    heads = nn.ModuleDict({"a": nn.Linear(16, 2), "b": nn.Linear(16, 3), "c": nn.Linear(9, 2)})
    return Fn(
        lambda s, x, task: s.heads[task](F.relu(s.trunk(x))), trunk=nn.Linear(8, 16), heads=heads
    )


def test_a_branch_that_an_example_did_not_reach_is_warned_of() -> None:
    net, x = tasks(), torch.randn(4, 8)
    with pytest.warns(UserWarning, match="`heads.b`.*`trunk`.*`examples`"):
        receipt = prune(net, example={"x": x, "task": "a"}, ratio=0.5)
    (note,) = [note for note in receipt.notes if "never ran" in note]
    assert "`heads.b`" in note and "heads.c" not in note  # which reads something else


def test_several_examples_reach_all_branches() -> None:
    net = tasks().double()
    x, dense = torch.randn(4, 8, dtype=torch.float64), copy.deepcopy(net)
    prune(net, examples=[{"x": x, "task": task} for task in "ab"], ratio=0.5)
    masked(dense, net)
    for task, width in (("a", 2), ("b", 3)):
        torch.testing.assert_close(net(x, task), dense(x, task), rtol=1e-9, atol=1e-9)
        assert net.heads[task].weight.shape == (width, 8)


@pytest.mark.parametrize(
    "given", [{}, {"example": torch.ones(1, 8), "examples": [torch.ones(1, 8)]}]
)
def test_one_of_example_and_examples_is_needed(given: Any) -> None:
    with pytest.raises(ValueError, match="either `example` or `examples`"):
        prune(perceptron(), ratio=0.5, **given)


def test_a_network_that_does_not_train_on_the_example_is_said_to_be_unproved_there() -> None:
    def forward(s: Any, x: Tensor, target: Any = None) -> Any:
        h = F.relu(s.i(x))
        return F.mse_loss(s.aux(h), target) if s.training else s.o(h)

    net = Fn(forward, i=nn.Linear(8, 16), aux=nn.Linear(16, 2), o=nn.Linear(16, 3))
    x, target = torch.randn(4, 8), torch.randn(4, 2)
    receipt = prune(copy.deepcopy(net), example=x, ratio=0.5)
    assert any(note.startswith("not proved in training") for note in receipt.notes)
    receipt = prune(net, example=(x, target), ratio=0.5)
    assert not any("training" in note for note in receipt.notes)
    net.train()(x, target).backward()


class Tasks(LightningModule):
    """Each batch is of one task, and each task has a head."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tasks()

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, task = batch
        return self.net(x, "ab"[int(task[0])]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.filterwarnings("ignore:None of the layers of this network have been trained")
@pytest.mark.filterwarnings("ignore:.*looks untrained")
def test_in_a_fit_batches_are_taken_until_all_heads_ran(trainer_kwargs: dict[str, Any]) -> None:
    data = [(torch.randn(8), n // 4 % 2) for n in range(16)]  # four batches, a b a b
    module = Tasks()
    del module.net.heads["c"]
    callback = StructuredPruning(ratio=0.5, when=1)
    trainer = Trainer(**{**trainer_kwargs, "max_epochs": 2}, callbacks=[callback])
    trainer.fit(module, DataLoader(data, batch_size=4))
    assert module.net.trunk.out_features == 8
    for head in module.net.heads.values():
        assert head.in_features == 8


def fitted(module: LightningModule, train: Any, val: Any, kwargs: dict[str, Any]) -> None:
    callback = StructuredPruning(ratio=0.5, when=1)
    trainer = Trainer(**{**kwargs, "max_epochs": 2}, callbacks=[callback])
    trainer.fit(module, DataLoader(train, batch_size=4), DataLoader(val, batch_size=4))


class WithAux(LightningModule):
    """A network with a head that runs in training only, and needs targets there."""

    def __init__(self) -> None:
        super().__init__()

        def forward(s: Any, x: Tensor, target: Any = None) -> Any:
            h = F.relu(s.i(x))
            loss = F.mse_loss(s.aux(h), target) if s.training else 0.0
            return s.o(h).square().mean() + loss

        parts = {"i": nn.Linear(8, 16), "aux": nn.Linear(16, 2), "o": nn.Linear(16, 3)}
        self.net = Fn(forward, **parts)
        self.example_input_array = torch.randn(2, 8)

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return self.net(*batch)

    def validation_step(self, batch: Any, _: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


PAIRS = [(torch.randn(8), torch.randn(2)) for _ in range(8)]


@pytest.mark.filterwarnings("ignore:None of the layers of this network have been trained")
def test_in_a_fit_a_head_that_needs_targets_follows_too(trainer_kwargs: dict[str, Any]) -> None:
    module = WithAux()
    fitted(module, PAIRS, PAIRS, trainer_kwargs)
    assert (module.net.i.out_features, module.net.aux.in_features) == (8, 8)


class Beside(LightningModule):
    """Its steps read what the forward of the example has cut within."""

    def __init__(self, step: str) -> None:
        super().__init__()
        self.step = step
        self.encoder = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 16))
        self.head, self.probe = nn.Linear(16, 3), nn.Linear(16, 2)
        self.probe.requires_grad_(step == "training_step")
        self.example_input_array = torch.randn(2, 8)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.encoder(x))

    def training_step(self, batch: Any, _: int) -> Tensor:
        return self._loss(batch[0], "training_step")

    def validation_step(self, batch: Any, _: int) -> None:
        self._loss(batch[0], "validation_step")

    def _loss(self, x: Tensor, step: str) -> Tensor:
        h = self.encoder(x)
        probed = self.probe(h).square().mean() if step == self.step else 0.0
        return self.head(h).square().mean() + probed

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.filterwarnings("ignore:None of the layers of this network have been trained")
@pytest.mark.filterwarnings("ignore:.*never ran on the example")
@pytest.mark.parametrize("step", ["training_step", "validation_step"])
def test_what_a_step_reads_beside_the_example_stays(
    step: str, trainer_kwargs: dict[str, Any]
) -> None:
    module = Beside(step)
    fitted(module, PAIRS, PAIRS, trainer_kwargs)
    assert (module.encoder[0].out_features, module.encoder[2].out_features) == (6, 16)


class ValidatedTasks(Tasks):
    def validation_step(self, batch: Any, index: int) -> None:
        self.training_step(batch, index)


@pytest.mark.filterwarnings("ignore:None of the layers of this network have been trained")
@pytest.mark.filterwarnings("ignore:.*looks untrained")
def test_a_head_that_only_validation_takes_follows_too(trainer_kwargs: dict[str, Any]) -> None:
    module = ValidatedTasks()
    del module.net.heads["c"]
    train, val = ([(torch.randn(8), task) for _ in range(8)] for task in (0, 1))
    fitted(module, train, val, trainer_kwargs)
    assert module.net.trunk.out_features == 8
    assert [head.in_features for head in module.net.heads.values()] == [8, 8]


class WithCritic(Beside):
    """Its step runs a second network, of which the example says nothing."""

    def __init__(self) -> None:
        super().__init__("none")
        self.critic = nn.Sequential(nn.Linear(3, 12), nn.ReLU(), nn.Linear(12, 1))

    def training_step(self, batch: Any, _: int) -> Tensor:
        return self.critic(self(batch[0])).mean()


@pytest.mark.filterwarnings("ignore:None of the layers of this network have been trained")
@pytest.mark.filterwarnings("ignore:.*never ran on the example")
def test_a_network_that_the_example_does_not_reach_stays(trainer_kwargs: dict[str, Any]) -> None:
    module = WithCritic()
    fitted(module, PAIRS, PAIRS, trainer_kwargs)
    assert (module.encoder[2].out_features, module.critic[0].out_features) == (8, 12)


@pytest.mark.parametrize("examples", [0, None, "x", torch.ones(2, 4)])
def test_examples_are_a_list(examples: Any) -> None:
    """The rows of a tensor are no examples, though each of them could be."""
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(TypeError, match=r"Found: .*Do: pass examples=\["):
        prune(net, ratio=0.5, examples=examples)
    assert net[0].out_features == 8
