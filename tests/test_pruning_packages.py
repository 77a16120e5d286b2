"""What diffusers, monai, segmentation-models, vit-pytorch and x-transformers do in their forwards, in a few lines."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from by_value import Fn, check, masked
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_accel.pruning import prune
from lightning_accel.surgery import Structure

# -- proofs of what is right -----------------------------------------------------------------------


def float32_sums(s: Any, x: Tensor) -> Tensor:
    """As the norms of Wan and Lumina: in float32, whatever the network is in."""
    h = s.a(x)
    for layer in (s.b, s.c):
        wide = h.float()
        wide = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-5)
        h = h + layer(wide.to(h.dtype)).tanh()
    return s.o(h)


def test_what_a_forward_rounds_to_float32_is_no_error_of_a_cut() -> None:
    """Sums of 64 numbers and of 32 round otherwise; that was more than a proof in float64 lets pass."""
    width = 64
    layers = {key: nn.Linear(width, width) for key in "bc"}
    net = Fn(float32_sums, a=nn.Linear(8, width), **layers, o=nn.Linear(width, 3))
    x, dense = torch.randn(32, 8), copy.deepcopy(net)
    prune(net, example=x, ratio=0.5)
    assert net.a.out_features == net.c.out_features == 32
    torch.testing.assert_close(net(x), masked(dense, net)(x), rtol=1e-4, atol=1e-5)


def test_noise_that_is_made_like_a_norm_lies_in_memory_as_it_does() -> None:
    """An autoencoder that samples: the noise of the dense network and of the small one has to be the same."""

    def forward(s: Any, x: Tensor) -> Tensor:
        h = s.a(x).flatten(2).transpose(1, 2).contiguous().transpose(1, 2).unflatten(2, x.shape[2:])
        h = s.m(s.n(h))
        return s.o(h + torch.randn_like(h))

    conv = {"a": nn.Conv2d(3, 16, 1), "m": nn.Conv2d(16, 4, 1), "o": nn.Conv2d(4, 3, 1)}
    net = Fn(forward, **conv, n=nn.GroupNorm(4, 16))
    prune(net, example=torch.randn(2, 3, 6, 6), ratio=0.5)
    assert net.a.out_channels == net.n.num_channels == 8


def test_whole_numbers_that_are_made_floats_are_no_reason_for_a_weaker_proof() -> None:
    """A table of biases from a network of positions: `arange(n).float()` would not go into a float64 layer."""

    def forward(s: Any, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1]).unsqueeze(-1).float()
        return s.o(s.a(x) + s.p(places))

    net = Fn(forward, a=nn.Linear(8, 16), p=nn.Linear(1, 16), o=nn.Linear(16, 3))
    receipt = prune(net, example=torch.randn(2, 5, 8), ratio=0.5)
    assert net.a.out_features == net.p.out_features == 8
    assert not any("float32" in note for note in receipt.notes)


# -- sizes and kernels that a forward chooses ------------------------------------------------------


class Rearrange(nn.Module):
    """As the layer of einops: lengths of axes by name, twice, of which copies are made from the first."""

    def __init__(self, pattern: str, **axes_lengths: int) -> None:
        super().__init__()
        self.pattern, self.axes_lengths = pattern, axes_lengths
        self._axes_lengths, self._multirecipe = tuple(axes_lengths.items()), {3: pattern}

    def __getstate__(self) -> Any:
        return {"pattern": self.pattern, "axes_lengths": self.axes_lengths}

    def __setstate__(self, state: Any) -> None:
        self.__init__(state["pattern"], **state["axes_lengths"])  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        ((axis, length),) = self._axes_lengths
        b, n, width = x.shape
        sizes = (length, width // length) if axis == "h" else (width // length, length)
        return x.reshape(b, n, *sizes).transpose(1, 2)


def test_numbers_that_layers_of_einops_hold_follow_a_cut() -> None:
    """Queries are split by the number of heads, keys and values by their width: both say the same."""

    def forward(s: Any, x: Tensor) -> Tensor:
        q, k, v = s.heads(s.q(x)), s.width(s.k(x)), s.width(s.v(x))
        out = (q @ k.mT).softmax(-1) @ v
        return s.o(out.transpose(1, 2).flatten(2))

    parts = {key: nn.Linear(8, 24) for key in "qkv"}
    split = {"heads": Rearrange("b n (h d)", h=4), "width": Rearrange("b n (h d)", d=6)}
    net = Fn(forward, **parts, **split, o=nn.Linear(24, 3))
    blank = copy.deepcopy(net)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    check(net, x, torch.randn(3, 7, 8, dtype=torch.float64))
    assert net.q.out_features == net.v.out_features == 12
    assert net.heads.axes_lengths == {"h": 2} and net.width.axes_lengths == {"d": 6}
    assert torch.equal(copy.deepcopy(net)(x), net(x))
    plain = Structure.from_dict(Structure.of(net).to_dict())
    plain.check(blank)
    plain.apply(blank.double())
    blank.load_state_dict(net.state_dict())
    assert torch.equal(blank(x), net(x))


def test_attention_goes_where_the_forward_asks_for_a_kernel() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (s.heads, -1)).transpose(1, 2) for t in s.qkv(x).chunk(3, -1))
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            out = F.scaled_dot_product_attention(q, k, v)
        return s.o(out.transpose(1, 2).flatten(2))

    net = Fn(forward, qkv=nn.Linear(8, 96), o=nn.Linear(32, 3), heads=4)
    check(net, torch.randn(2, 5, 8, dtype=torch.float64))
    assert (net.heads, net.qkv.out_features) == (2, 48)


def test_biases_that_are_gathered_for_every_head_go_with_it() -> None:
    """A split in three, of which one part is the batch of a product, and another the heads further on."""

    def forward(s: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, s.heads, -1).transpose(1, 2) for t in s.qkv(x).chunk(3, -1))
        curves = s.table(x).view(b, n, 2, s.heads, -1).permute(2, 0, 3, 1, 4)
        curves = torch.einsum("wbhnd,wdr->wbhnr", curves, s.bank)
        rows = torch.arange(n)
        places = (rows[:, None] - rows).abs().expand(2, b, s.heads, n, n)
        bias = curves.gather(-1, places).sum(0)
        out = ((q @ k.mT + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return s.o(out)

    bank = nn.Parameter(torch.randn(2, 5, 9))
    layers = {"qkv": nn.Linear(8, 96), "table": nn.Linear(8, 40), "o": nn.Linear(32, 3)}
    net = Fn(forward, heads=4, bank=bank, **layers)
    check(net, *(torch.randn(2, n, 8, dtype=torch.float64) for n in (5, 7)))
    assert net.heads == 2 and net.table.out_features == 20


# -- operations ------------------------------------------------------------------------------------


def tokens_put_by_number(s: Any, x: Tensor) -> Tensor:
    h, rows = s.i(x), torch.arange(len(x)).unsqueeze(1)
    places = x.sum(-1).argsort(1)[:, :3]
    out = torch.zeros(len(x), 2 * x.shape[1], s.width, dtype=x.dtype)
    out[rows, places] = h[rows, places]
    return s.o(out.tanh())


def tokens_put_by_mask(s: Any, x: Tensor) -> Tensor:
    h = s.i(x)
    mask = x[..., 0] > 0
    out = torch.zeros_like(h)
    out[mask] = h[mask].tanh()
    return s.o(out)


def one_token_put_everywhere(s: Any, x: Tensor) -> Tensor:
    h = s.i(x)
    h = h.index_put((x[..., 0] > 0,), s.token)
    return s.o(h)


def columns_put(s: Any, x: Tensor) -> Tensor:
    h = s.i(x) * 1
    h[:, torch.tensor([0, 2])] = s.token
    return s.o(h)


def tokens_gathered(s: Any, x: Tensor) -> Tensor:
    h = s.i(x)
    best = x.norm(dim=-1).topk(3, dim=1).indices
    return s.o(h.gather(1, best.unsqueeze(-1).expand(-1, -1, h.shape[-1])))


def largest_over_tokens(s: Any, x: Tensor) -> Tensor:
    return s.o(s.i(x).topk(3, dim=1).values)


def nearest_of_a_codebook(s: Any, x: Tensor) -> Tensor:
    h = s.i(x)
    return s.o(s.codes(torch.cdist(h, s.codes.weight).argmin(-1)) + h)


FOLLOWED = [tokens_put_by_number, tokens_put_by_mask, one_token_put_everywhere, columns_put]
FOLLOWED += [tokens_gathered, largest_over_tokens, nearest_of_a_codebook]


@pytest.mark.parametrize("forward", FOLLOWED)
def test_operations_on_tokens_leave_their_width_free(forward: Callable[..., Tensor]) -> None:
    parts = {"token": nn.Parameter(torch.randn(16)), "codes": nn.Embedding(40, 16), "width": 16}
    net = Fn(forward, i=nn.Linear(8, 16), o=nn.Linear(16, 3), **parts)
    inputs = (torch.randn(n, 6, 8, dtype=torch.float64) for n in (3, 4))
    if forward is not nearest_of_a_codebook:
        del net.codes
    if forward not in (one_token_put_everywhere, columns_put):
        del net.token
    check(net, *inputs)
    assert net.i.out_features == 8


def test_unpooling_in_space_puts_channels_where_they_came_from() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        small, places = F.max_pool3d(s.a(x), 2, return_indices=True)
        return s.o(F.max_unpool3d(s.b(small), places, 2).tanh())

    net = Fn(forward, a=nn.Conv3d(2, 8, 1), b=nn.Conv3d(8, 8, 1), o=nn.Conv3d(8, 3, 1))
    check(net, torch.randn(2, 2, 4, 4, 4, dtype=torch.float64))
    assert net.b.out_channels == 4


# -- reasons ---------------------------------------------------------------------------------------


def test_the_output_is_why_its_layer_stays_also_behind_a_norm_that_merges() -> None:
    """An instance norm merges channels with samples, and splits them again: that is not why they stay."""

    def forward(s: Any, x: Tensor) -> Tensor:
        h = s.norm(s.b(s.a(x).relu()))
        return h + s.c(h)

    layers = {"a": nn.Conv2d(3, 16, 1), "b": nn.Conv2d(16, 4, 1), "c": nn.Conv2d(4, 4, 1)}
    net = Fn(forward, **layers, norm=nn.InstanceNorm2d(4))
    receipt = prune(net, example=torch.randn(2, 3, 4, 4), ratio=0.5)
    whys = {change.name: change.what for change in receipt.skipped}
    assert whys == dict.fromkeys("bc", "it makes the network's output")


def test_pixels_read_as_channels_are_seen_without_a_try() -> None:
    """As the position attention of MAnet: right only where the example's sizes happen to fit."""

    def forward(s: Any, x: Tensor) -> Tensor:
        h = s.a(x)
        b, _, height, width = h.shape
        return s.o(s.b(h).flatten(2).transpose(1, 2).reshape(b, s.width, height, width) + h)

    layers = {"a": nn.Conv2d(3, 16, 1), "b": nn.Conv2d(16, 16, 1), "o": nn.Conv2d(16, 4, 1)}
    net = nn.Sequential(Fn(forward, **layers, width=16), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1))
    receipt = prune(net, example=torch.randn(2, 3, 2, 2), ratio=0.5)
    whys = {change.name: change.what for change in receipt.skipped}
    assert "taken for another dimension" in whys["0.b"]
    assert net[0].a.out_channels == 16 and net[1].out_channels == 4


class Streams(nn.Module):
    """Is never called, but one of its methods."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(3, 4))

    def mixed(self, x: Tensor) -> Tensor:
        return x.unsqueeze(1) + self.mix


def test_what_a_method_reads_has_run() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.streams.mixed(s.i(x).relu().mean(-1, keepdim=True).expand(-1, 4))

    net = Fn(forward, i=nn.Linear(8, 16), streams=Streams())
    receipt = prune(net, example=torch.randn(2, 8), ratio=0.5)
    assert net.i.out_features == 8
    assert not any("never ran" in change.what for change in receipt.skipped)
