"""Every construct that real networks are made of, as a tiny net: pruned for real, and compared with the truth.

A construct names the shapes that must come out, or the reason for which a layer stays as it is. The truth is
independent of the package: the dense network with the removed elements set to zero, found by value, or an
answer known beforehand.
"""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from constructs.attention_of_torch import encoder_layer, layers_of, mha
from constructs.build import (
    BROKEN,
    CONSTRUCTS,
    Construct,
    Net,
    images,
    plain_norms,
    sequences,
    vectors,
)
from constructs.convolutions import chain
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from lightning_accel.errors import NoEffect
from lightning_accel.pruning import Macs, mask_equivalence, plan, prune
from lightning_accel.pruning.graph import Graph
from lightning_accel.pruning.importance import score
from lightning_accel.surgery import Receipt, Select, Structure, follow, twin
from lightning_accel.surgery.call import as_call, tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype"),
]


# --- the checks that every construct passes -----------------------------------------------------


def names(only: Callable[[Construct], bool] = lambda item: True) -> list[Any]:
    return [
        pytest.param(n, marks=pytest.mark.xfail(strict=True, reason=BROKEN[n]))
        if n in BROKEN
        else n
        for n, item in CONSTRUCTS.items()
        if only(item)
    ]


def made(name: str) -> nn.Module:
    """Build a net whose values are all different, norms and their statistics included, after one step."""
    item = CONSTRUCTS[name]
    net = item.build().double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    net.train(item.trains)
    with torch.no_grad():
        run(net, item.example(8))
    return net


def run(net: nn.Module, example: Any) -> list[Tensor]:
    call = as_call(tree_map(double, example))
    outputs = net(*call.args, **call.kwargs)
    return [t for t in tensors(outputs) if t.is_floating_point()]


def double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def copy_of(name: str, net: nn.Module) -> nn.Module:
    """Build the same net anew, and load its weights."""
    other = CONSTRUCTS[name].build().double()
    other.load_state_dict(net.state_dict())
    return other


def masked_twin(
    dense: nn.Module, small: nn.Module, scaled: Mapping[str, Any] | None = None
) -> None:
    """Zero, in the dense net, each element that the pruned one does not have, found by value.

    Tensors in `scaled` were multiplied by a number in the pruned one. A weight norm's weights are taken as they
    reach their layer.
    """
    for net in (dense, small):
        with_plain_weights(net)
    survivors = dict(small.named_parameters())
    for name, tensor in dense.named_parameters():
        values = tensor.detach() * (scaled or {}).get(name, 1.0)
        alive = torch.isin(values.float(), survivors[name].detach().float())
        assert alive.sum() == survivors[name].numel(), f"{name}: other values than before"
        tensor.data.mul_(alive)
    with_exact_norms(dense)


def with_exact_norms(net: nn.Module) -> None:
    """Divide what is under a spectral norm by its own norm, which iterations only come near to."""
    for module in net.modules():
        if hasattr(module, "weight_u"):
            raw = module.weight_orig.data
            torch.nn.utils.remove_spectral_norm(module)
        elif "SpectralNorm" in str(getattr(module, "parametrizations", "")):
            raw = module.parametrizations.weight.original.data
            parametrize.remove_parametrizations(module, "weight")
        else:
            continue
        module.weight.data = raw / torch.linalg.matrix_norm(raw.flatten(1), 2)


def with_plain_weights(net: nn.Module) -> None:
    for module in net.modules():
        if hasattr(module, "weight_g"):
            torch.nn.utils.remove_weight_norm(module)
        elif "WeightNorm" in str(getattr(module, "parametrizations", "")):
            parametrize.remove_parametrizations(module, "weight")


def assert_close(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def pruned(name: str, net: nn.Module) -> Receipt:
    item = CONSTRUCTS[name]
    return prune(net, example=item.example(3), **{"ratio": 0.5, **item.arguments})


@pytest.mark.parametrize("name", names())
def test_a_construct_is_pruned_as_its_masked_twin_and_goes_on(name: str) -> None:
    item, net = CONSTRUCTS[name], made(name)
    step(net, item.example(4), None)
    dense = copy_of(name, net)
    objects = dict(net.named_parameters(remove_duplicate=False))
    frozen = {n for n, p in objects.items() if not p.requires_grad}
    before = {n: p.detach().clone() for n, p in objects.items() if n in frozen}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.01, 0.9)
    receipt = pruned(name, net)

    # what was asked for came out, and what stayed says why
    shapes = {n: tuple(t.shape) for n, t in net.state_dict(keep_vars=True).items()}
    shapes |= {n: tuple(t.shape) for n, t in net.named_buffers()}
    assert {n: shapes[n] for n in item.shapes} == dict(item.shapes), receipt.skipped
    skipped = {change.name: change.what for change in receipt.skipped}
    for layer, reason in item.keeps.items():
        assert reason in skipped.get(layer, "nothing is said"), (layer, skipped)

    # flags, identity and frozen parts
    assert net.training == item.trains
    now = dict(net.named_parameters(remove_duplicate=False))
    assert all(now[n] is p for n, p in objects.items())
    assert {n for n, p in now.items() if not p.requires_grad} == frozen
    assert all(torch.equal(now[n], old) for n, old in before.items())

    # the same function as the masked dense net, at another batch size
    example = item.example(5)
    original = run(dense.eval(), example)
    masked_twin(dense, restored(name, net), item.scaled)
    with plain_norms(item.plain):
        small, wanted = run(net.eval(), example), run(dense, example)
    assert_close(small, wanted)
    assert [t.shape for t in run(net, example)] == [t.shape for t in original]

    # a fresh net takes its structure and weights
    fresh = restored(name, net)
    again = run(fresh.eval(), example)
    assert all(torch.equal(a, b) for a, b in zip(again, run(net, example), strict=True))

    # training goes on, in both modes and with the optimizer's memory
    follow(optimizer, receipt)
    net.train(item.trains)
    step(net, item.example(6), optimizer)
    step(net.eval(), item.example(1), optimizer)
    assert all(p.isfinite().all() and p.numel() for p in net.parameters())
    for parameter, state in optimizer.state.items():
        assert state["momentum_buffer"].shape == parameter.shape


def step(net: nn.Module, example: Any, optimizer: Any) -> None:
    net.zero_grad()
    sum(t.square().mean() for t in run(net, example) if t.requires_grad).backward()
    for parameter in net.parameters():
        assert parameter.grad is None or parameter.grad.shape == parameter.shape
    if optimizer is not None:
        optimizer.step()
    net.zero_grad()


def restored(name: str, net: nn.Module) -> nn.Module:
    """Send weights and structure through a file that may hold plain data only."""
    buffer = io.BytesIO()
    torch.save({"weights": net.state_dict(), "structure": Structure.of(net).to_dict()}, buffer)
    buffer.seek(0)
    stored = torch.load(buffer, weights_only=True)
    fresh = CONSTRUCTS[name].build().double()
    structure = Structure.from_dict(stored["structure"])
    structure.check(fresh)
    structure.apply(fresh)
    fresh.load_state_dict(stored["weights"])
    return fresh


@pytest.mark.slow
@pytest.mark.parametrize("name", names(lambda item: not item.scaled))
def test_a_pruned_construct_is_pruned_again_by_another_choice(name: str) -> None:
    item, net = CONSTRUCTS[name], made(name)
    pruned(name, net)
    dense, example = restored(name, net), item.example(5)
    original = run(dense.eval(), example)
    try:
        prune(net, example=item.example(3), ratio=0.4, importance="random", scope="global")
    except NoEffect:
        assert all(
            torch.equal(a, b) for a, b in zip(run(net.eval(), example), original, strict=True)
        )
        return
    assert sum(p.numel() for p in net.parameters()) < sum(p.numel() for p in dense.parameters())
    masked_twin(dense, restored(name, net))
    with plain_norms(item.plain):
        assert_close(run(net.eval(), example), run(dense, example))


# --- answers that are known beforehand -----------------------------------------------------------


def silence(net: nn.Module, places: Sequence[int], *tensors_and_dims: tuple[str, int]) -> None:
    """Set these places of the tensors to zero, so that nothing changes when they go."""
    state = dict(net.named_parameters())
    with torch.no_grad():
        for name, dim in tensors_and_dims:
            state[name].index_fill_(dim, torch.tensor(places), 0.0)


BLOCK = [(f"block.{m}.{leaf}", 0) for m in "qkv" for leaf in ("weight", "bias")]
BLOCK.append(("block.proj.weight", 1))
WIDTH = [(f"block.{m}.weight", 1) for m in "qkv"] + [("head.weight", 1)]
WIDTH += [
    (name, 0) for name in ("embed.weight", "embed.bias", "block.proj.weight", "block.proj.bias")
]


@pytest.mark.parametrize("attention", ["heads", "width"])
@pytest.mark.parametrize(
    "name",
    [
        "separate_qkv",
        "separate_qkv_minus_one_heads",
        "attention_with_batch_times_heads",
        "attention_with_a_boolean_mask",
        "attention_with_a_causal_buffer",
        "rotary_half",
        "relative_positions_from_an_embedding",
        "alibi_slopes_in_a_buffer",
    ],
)
def test_silent_heads_or_places_of_heads_go_and_the_function_stays(
    name: str, attention: str
) -> None:
    net, item = made(name).eval(), CONSTRUCTS[name]
    pairs = {"heads": [4, 5, 6, 7, 12, 13, 14, 15], "width": [1, 3, 5, 7, 9, 11, 13, 15]}
    silence(net, pairs[attention], *BLOCK)
    silence(net, range(3, 11), *WIDTH)
    example = item.example(5)
    before = run(net, example)
    prune(net, example=item.example(3), ratio=0.5, attention=attention)
    assert tuple(net.block.proj.weight.shape) == (8, 8)
    assert_close(run(net, example), before)


def test_silent_heads_of_torchs_own_attention_go() -> None:
    net = made("mha_batch_first").eval()
    dead = [4, 5, 6, 7, 12, 13, 14, 15]
    rows = dead + [16 + n for n in dead] + [32 + n for n in dead]
    silence(net, rows, ("attention.in_proj_weight", 0), ("attention.in_proj_bias", 0))
    silence(net, dead, ("attention.out_proj.weight", 1))
    wide = [("embed.weight", 0), ("embed.bias", 0), ("attention.in_proj_weight", 1)]
    wide += [("attention.out_proj.weight", 0), ("attention.out_proj.bias", 0), ("head.weight", 1)]
    silence(net, range(3, 11), *wide)
    example = sequences(5)
    before = run(net, example)
    prune(net, example=example, ratio=0.5)
    assert net.attention.num_heads == 2 and net.attention.embed_dim == 8
    assert_close(run(net, example), before)


@pytest.mark.parametrize("name", ["weight_norm", "old_weight_norm"])
def test_silent_channels_before_a_weight_norm_go_and_the_function_stays(name: str) -> None:
    net, item = made(name).eval(), CONSTRUCTS[name]
    gain = "weight_g" if name.startswith("old") else "parametrizations.weight.original0"
    silence(net, range(3, 11), (f"0.{gain}", 0), ("0.bias", 0))  # relu(0) = 0; the readers are loud
    example = item.example(5)
    before = run(net, example)
    loudness = torch.ones(16)
    loudness[3:11] = 0.0
    prune(net, example=example, ratio=0.5, importance=lambda model, group: loudness)
    assert net[0].bias.shape == (8,)
    assert_close(run(net, example), before)


def test_a_weight_norm_is_ranked_by_the_weight_that_works() -> None:
    net = made("weight_norm").eval()
    silence(net, range(3, 11), ("0.parametrizations.weight.original0", 0))
    x = tree_map(double, images(2))
    found = score(net, group_of(net, "0", x), "magnitude")
    plain = copy.deepcopy(net)  # of the same class, from which torch takes the parametrization
    for module in plain.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    assert_close(found, score(plain, group_of(plain, "0", x), "magnitude"))


def group_of(net: nn.Module, layer: str, example: Any) -> Any:
    groups = Graph(twin(net), (as_call(example),), select=Select()).groups
    return next(group for group in groups if layer in group.layers)


def test_silent_units_of_an_lstm_go_and_the_function_stays() -> None:
    net = made("lstm_of_two_layers").eval()
    dead = [0, 5, 6, 9, 10, 11, 14, 15]
    rows = [16 * gate + n for gate in range(4) for n in dead]
    for layer in ("l0", "l1"):
        leaves = [
            f"layer.{kind}_{side}_{layer}" for kind in ("weight", "bias") for side in ("ih", "hh")
        ]
        silence(net, rows, *((leaf, 0) for leaf in leaves))
        silence(net, dead, (f"layer.weight_hh_{layer}", 1))
    silence(net, dead, ("layer.weight_ih_l1", 1), ("head.weight", 1))
    example = sequences(5)
    before = run(net, example)
    prune(net, example=example, ratio=0.5)
    assert net.layer.hidden_size == 8
    assert_close(run(net, example), before)


def test_a_layer_norm_runs_over_what_is_left() -> None:
    """What is left must be normalized by its own statistics, computed here by hand."""
    net = made("layer_norm").eval()
    x = vectors(5).double()
    prune(net, example=x, ratio=0.5)
    hidden = net.up(x)
    assert hidden.shape == (5, 8)
    centred = hidden - hidden.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    by_hand = net.down(torch.relu(normed * net.norm.weight + net.norm.bias))
    assert_close([net(x)], [by_hand])


# --- what else must hold -----------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_fast_path_of_torchs_encoder_agrees_after_pruning(norm_first: bool) -> None:
    encoder = nn.TransformerEncoder(
        encoder_layer(norm_first=norm_first), 2, enable_nested_tensor=not norm_first
    )
    net = layers_of(encoder).eval()
    x = sequences(4)
    with torch.no_grad():
        net(x)  # the fast path has run before, too
    prune(net, example=x, ratio=0.5)
    assert encoder.layers[1].self_attn.num_heads == 2
    slow = net(x)
    with torch.no_grad():
        fast = net(x)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    hidden = net.embed(x).detach()
    padding = torch.zeros(4, 5, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.no_grad():  # nested tensors
        fast = encoder(hidden, src_key_padding_mask=padding)
    slow = encoder(hidden, src_key_padding_mask=padding)
    torch.testing.assert_close(fast[0], slow[0], rtol=1e-4, atol=1e-5)


def test_head_averaged_weights_keep_their_shape() -> None:
    net = mha(lambda self, x: self.attention(x, x, x)[1] @ self.head(x), batch_first=True)
    x = sequences(3)
    prune(net, example=x, ratio=0.5, attention="width")
    _, weights = net.attention(*[net.embed(x)] * 3)
    assert weights.shape == (3, 5, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 5))


@pytest.mark.parametrize(
    "name", ["tied_embedding_and_head", "two_layers_of_one_weight", "one_module_under_two_names"]
)
def test_ties_stay_tied(name: str) -> None:
    net = made(name)
    pairs = {
        "tied_embedding_and_head": ("embed.weight", "head.weight"),
        "two_layers_of_one_weight": ("2.weight", "4.weight"),
        "one_module_under_two_names": ("inner.weight", "again.weight"),
    }
    one, other = pairs[name]
    held = net.get_parameter(one)
    pruned(name, net)
    assert net.get_parameter(one) is net.get_parameter(other) is held
    assert restored(name, net).get_parameter(one).shape == held.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["separate_qkv", "residual", "lstm", "tied_embedding_and_head"])
def test_low_precision_models_are_pruned_in_their_dtype(name: str, dtype: torch.dtype) -> None:
    item = CONSTRUCTS[name]
    net = item.build().to(dtype)
    receipt = prune(net, example=item.example(3), ratio=0.5)
    assert receipt.moved
    assert {p.dtype for p in net.parameters()} == {dtype}
    state = {n: tuple(t.shape) for n, t in net.state_dict().items()}
    assert {n: state[n] for n in item.shapes} == dict(item.shapes)
    (call,) = [as_call(item.example(5))]
    args = [a.to(dtype) if a.is_floating_point() else a for a in call.args]
    net(*args).float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_an_autocast_region_inside_the_forward() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = torch.relu(self.up(x))
        return self.down(x.float())

    net = Net(forward, up=nn.Linear(6, 16), down=nn.Linear(16, 3))
    assert prune(net, example=vectors(3), ratio=0.5).moved
    assert net.up.weight.shape == (8, 6)
    net(vectors(5)).sum().backward()


@pytest.mark.parametrize(
    "name",
    [
        "fused_qkv_chunk",
        "swin_windows_with_relative_positions",
        "mha_time_first",
        "layer_norm",
        "gru",
        "unet",
        "c2f_of_yolov8",
        "grouped_convolution",
        "pixel_shuffle",
        "flatten_after_convolution",
    ],
)
def test_the_verb_proves_a_right_cut_and_finds_a_wrong_one(name: str) -> None:
    """Wrong: the same number of places, but not those whose makers went."""
    item, net = CONSTRUCTS[name], made(name).eval()
    example = tree_map(double, item.example(3))
    cut = plan(net, calls=(as_call(example),), ratio=0.5, **item.arguments)
    assert mask_equivalence(net, cut, example=example) < 1e-10
    found = []
    for tensor, kept in cut.kept.items():
        for dim, positions in enumerate(kept.dims):
            size = cut.before.tensors[tensor][dim]
            if positions is None or dim == 0 or tensor.endswith("table"):
                continue  # rows: another choice of channels to make would be as good, if read so
            others = torch.tensor(sorted(set(range(size)) - set(positions.tolist())))
            if len(others) < len(positions):
                continue
            dims = tuple(
                others[: len(positions)] if d == dim else p for d, p in enumerate(kept.dims)
            )
            wrong = dataclasses.replace(cut, kept={**cut.kept, tensor: kept._replace(dims=dims)})
            found.append(mask_equivalence(net, wrong, example=example))
    assert found and min(found) > 1e-4


@pytest.mark.parametrize(
    "name",
    [
        "separate_qkv",
        "residual",
        "unet",
        "c2f_of_yolov8",
        "class_token_position_and_layer_scale",
        "transformer_encoder_layer",  # one that nests may only keep an even number of heads
    ],
)
def test_a_target_of_arithmetic_is_met_as_torch_counts_it(name: str) -> None:
    item, net = CONSTRUCTS[name], made(name).eval()
    example = tree_map(double, item.example(2))

    def flops() -> int:
        return counted(net, example)

    dense = flops()
    prune(net, example=example, target=Macs(0.5))
    assert 0.4 <= flops() / dense <= 0.55


def counted(net: nn.Module, example: Any) -> int:
    """Return multiply-accumulates as torch counts them, attention included."""
    counter = FlopCounterMode(display=False)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        run(net, example)
    return counter.get_total_flops() // 2


UNCOUNTED = {"bilinear", "spectral_norm", "old_spectral_norm", "vectorized_map"}
UNCOUNTED |= {"product_with_a_vector", "distances_to_centres"}
"""Torch's counter lacks `_trilinear` and products of a matrix and a vector."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CONSTRUCTS if name not in BROKEN])
def test_arithmetic_and_parameters_are_foreseen_exactly(name: str) -> None:
    item, net = CONSTRUCTS[name], made(name).eval()
    example = tree_map(double, item.example(2))
    options = {"attention": "heads", **item.arguments}
    graph = Graph(twin(net), (as_call(example),), select=Select(), **options)
    for group in graph.groups:
        gone = {g.name: range(g.units // 2) for g in graph.groups if g.link == group.link}
        gone = gone if group.link is not None else {group.name: range(group.units // 2)}
        small = twin(net)
        try:
            graph.cut(gone).apply(small)
            after = counted(small, example)
        except (ValueError, RuntimeError):
            continue  # refused, or left alone by the proof
        assert graph.params(gone) == sum(p.numel() for p in small.parameters())
        if name not in UNCOUNTED:
            assert (graph.dense_macs, graph.macs(gone)) == (counted(net, example), after)


def frozen() -> nn.Module:
    return chain(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).requires_grad_(False)


@pytest.mark.parametrize(
    "build",
    [
        frozen,
        lambda: nn.Linear(6, 3),
        lambda: Net(lambda self, x: self.up(x).softmax(-1), up=nn.Linear(6, 16)),
        lambda: Net(lambda self, x: x * self.scale, scale=nn.Parameter(torch.randn(6))),
        lambda: nn.Sequential(nn.Linear(6, 1), nn.ReLU(), nn.Linear(1, 3)),
    ],
)
def test_a_net_without_anything_to_prune_is_an_error_and_stays(
    build: Callable[[], nn.Module],
) -> None:
    net = build()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(NoEffect):
        prune(net, example=vectors(3), ratio=0.5)
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True)
    )
