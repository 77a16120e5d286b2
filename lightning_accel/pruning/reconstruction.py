"""Which units a network can do without, together: the error of the layers that read them, exactly.

Let C_u be the part of the consumers' pre-activations that unit u makes on calibration data. Removing a
set z of units changes them by sum_u z_u C_u, so the squared error is

    E(z) = || sum_u z_u C_u ||^2 = z^T G z        with G_uv = <C_u, C_v>.

No approximation: ThiNet's objective (Luo et al. 2017, arXiv:1707.06342), for a choice of many units at
once. A criterion that scores units one by one (magnitude, Taylor) is blind to the off-diagonal, where
redundancy is: of two equal channels both look dispensable, and removing both costs four times one.

G needs no activation to be stored. With X the consumer's unfolded inputs and W its weight, it is the sum
over a unit's places and kernel of (X^T X) * (W^T W), elementwise, and X^T X adds up over batches.
Everything is in float64. Choosing is greedy, then swaps of one removed against one kept unit as long as
one lowers the error; `qubo` hands the same G to an annealer.

Names of tensors end in their dimensions: U units, B groups of a layer, N positions, C inputs, K places of the kernel,
I inputs x kernel, O outputs, P places of one unit x kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_accel.arguments import instance, whole
from lightning_accel.errors import explain
from lightning_accel.progress import progress
from lightning_accel.pruning.groups import Group, Member
from lightning_accel.pruning.unfold import (
    PIECE,
    kernel,
    matrix,
    only_input,
    patches,
    pieces,
    samples,
    why_unreadable,
)
from lightning_accel.surgery import Change
from lightning_accel.surgery.call import Call, run, same_random_state

_WIDE = 6144  # inputs x kernel from which X^T X (300 MB) is not formed any more


class Grams(NamedTuple):
    """`of`: G per group name, shape (units, units), float64 on the CPU; `left_out`: layers not in it."""

    of: dict[str, Tensor]
    left_out: tuple[Change, ...]


def gram(model: nn.Module, group: Group, batches: Iterable[Sequence[Call]]) -> Tensor:
    """Return G of one group: entry (u, v) is <C_u, C_v>, summed over consumers and data.

    Raises:
        ValueError: No consumer of the group can be read; the message says why.

    >>> from lightning_accel.pruning.groups import Group, Member
    >>> net = nn.Sequential(nn.Identity(), nn.Linear(2, 1, bias=False))
    >>> nn.init.ones_(net[1].weight).tolist()
    [[1.0, 1.0]]
    >>> one = Group("0", "channels", 2, (Member("1.weight", 1, "in", torch.tensor([[0], [1]])),), (), 2)
    >>> gram(net, one, [[Call("", (torch.tensor([[1.0, 3.0]]),), {})]]).tolist()
    [[1.0, 3.0], [3.0, 9.0]]
    """
    found = grams(model, [group], batches)
    if group.name not in found.of:
        raise ValueError(
            explain(
                f"the error of removing units of `{group.name}` cannot be measured",
                "; ".join(f"`{c.name}`: {c.what}" for c in found.left_out) or "nothing reads it",
                "rank this group by another importance",
            )
        )
    return found.of[group.name]


@torch.no_grad()
def grams(model: nn.Module, groups: Sequence[Group], batches: Iterable[Sequence[Call]]) -> Grams:
    """Return G of every group in one pass over the data; groups without a readable consumer are missing.

    Args:
        model: Runs in eval mode; its train flags are put back. Pass a twin if hooks must not see it.
        groups: Groups of this model.
        batches: The calls of each batch; no labels are needed.
    """
    sums: dict[str, Tensor] = {}
    left_out: dict[str, Change] = {}
    readers: dict[nn.Module, list[tuple[Group, Member]]] = {}
    for group, member, module in _reading(model, groups):
        reason = why_unreadable(module, member)
        if reason:
            left_out[member.tensor] = Change(member.tensor.rpartition(".")[0], reason)
        else:
            readers.setdefault(module, []).append((group, member))
    called: set[nn.Module] = set()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = only_input(args, kwargs)
        if given is None:
            return
        called.add(module)
        x = samples(module, given)
        for group, part in _parts(module, x, readers[module]):
            sums[group.name] = sums[group.name] + part if group.name in sums else part

    with evaluating(model), _before(readers, note), progress("reading what units give") as step:
        for calls in batches:
            step()
            run(model, calls)
    for module in [m for m in readers if m not in called]:
        for _, member in readers[module]:
            what = "it is not called with one tensor (its weight is read in another way)"
            left_out[member.tensor] = Change(member.tensor.rpartition(".")[0], what)
    return Grams({name: total.cpu() for name, total in sums.items()}, tuple(left_out.values()))


def energy(gram: Tensor, removed: Sequence[int]) -> float:
    """Return z^T G z, the squared error of removing these units.

    >>> energy(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), [0, 1])
    4.0
    """
    index = torch.as_tensor(list(removed), dtype=torch.long)
    return float(gram.double()[index][:, index].sum())


def greedy(gram: Tensor, remove: int) -> list[int]:
    """Remove one unit after the other, always the one that adds least to the error.

    >>> greedy(torch.diag(torch.tensor([3.0, 1.0, 2.0])), 2)
    [1, 2]
    """
    check_gram(gram, remove)
    gram_UU = gram.double()
    cost_U = gram_UU.diagonal().clone()
    removed = []
    for _ in range(remove):
        unit = int(cost_U.argmin())
        removed.append(unit)
        # G_uu + 2 sum of G_uv over those that are gone: what u adds to z^T G z.
        cost_U += 2 * gram_UU[unit]
        cost_U[unit] = math.inf
    return sorted(removed)


def swap(gram: Tensor, removed: Sequence[int]) -> list[int]:
    """Exchange one removed against one kept unit, the best pair first, until no pair lowers the error.

    >>> swap(torch.diag(torch.tensor([3.0, 1.0, 2.0])), [0])
    [1]
    """
    gram_UU = gram.double()
    own_U = gram_UU.diagonal()
    least = 1e-12 * float(own_U.sum())  # less is rounding, and would swap for ever
    gone_U = torch.zeros(len(gram_UU), dtype=torch.bool)
    gone_U[list(removed)] = True
    pull_U = 2 * gram_UU @ gone_U.double()
    while gone_U.any() and not gone_U.all():
        out, kept = gone_U.nonzero()[:, 0], (~gone_U).nonzero()[:, 0]
        saved, added = (pull_U - own_U)[out], (pull_U + own_U)[kept]
        change = added[None, :] - saved[:, None] - 2 * gram_UU[out][:, kept]
        best = int(change.argmin())
        if float(change.flatten()[best]) >= -least:
            break
        back, go = int(out[best // len(kept)]), int(kept[best % len(kept)])
        gone_U[back], gone_U[go] = False, True
        pull_U += 2 * (gram_UU[go] - gram_UU[back])
    return gone_U.nonzero()[:, 0].tolist()


def costs(gram: Tensor) -> Tensor:
    """Return at which share of the whole error each unit goes when all go greedily, shape (units,).

    >>> costs(torch.diag(torch.tensor([3.0, 1.0])))
    tensor([1.0000, 0.2500])
    """
    check_gram(gram, 0)
    gram_UU = gram.double()
    cost_U = gram_UU.diagonal().clone()
    shares_U, total = torch.zeros(len(gram_UU), dtype=torch.float64), 0.0
    for _ in range(len(gram_UU)):
        unit = int(cost_U.argmin())
        total = max(total, total + float(cost_U[unit]))  # rounding must not turn the order round
        shares_U[unit] = total
        cost_U += 2 * gram_UU[unit]
        cost_U[unit] = math.inf
    return (shares_U / total if total > 0 else shares_U).float()


Selector = Callable[[Tensor, int], list[int]]
"""Takes G of one group and a number of units, and returns which of them go, ascending."""


class GreedySwapSelector:
    """Choose units to remove by `greedy`, polished by `swap`: deterministic, milliseconds, no extra.

    >>> pair = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.5]])
    >>> GreedySwapSelector()(pair, 2)
    [0, 2]
    """

    def __call__(self, gram: Tensor, remove: int) -> list[int]:
        """Return `remove` units in ascending order; `gram` is G of one group."""
        return swap(gram, greedy(gram, remove))


class Reconstruction:
    """An importance: units are chosen together, by the error that their removal leaves (see above).

    Args:
        selector: Takes G and a number of units, returns which: `GreedySwapSelector()`, `QuboSelector()`.

    >>> Reconstruction(GreedySwapSelector())
    Reconstruction(GreedySwapSelector)
    """

    def __init__(self, selector: Selector) -> None:
        what, do = "a function of G and a number of units", "pass GreedySwapSelector()"
        self.selector: Selector = instance("selector", selector, Callable, what, do)

    def __repr__(self) -> str:
        return f"Reconstruction({type(self.selector).__name__})"


def check_gram(gram: Tensor, remove: int) -> None:
    """Raise `ValueError` unless `gram` is a finite square matrix and has `remove` units."""
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or not torch.isfinite(gram).all():
        found = f"shape {tuple(gram.shape)}"
        raise ValueError(explain("`gram` is a finite square matrix", found, "see `gram`"))
    whole("remove", remove, least=0, most=len(gram), do="pass at most all units")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode; put its train flags and torch's random state back."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with same_random_state(model):
            yield
    finally:
        for module, training in flags.items():
            module.training = training


# -- summing up --------------------------------------------------------------------------------------


def _reading(
    model: nn.Module, groups: Sequence[Group]
) -> Iterator[tuple[Group, Member, nn.Module]]:
    for group in groups:
        seen: set[tuple[int, int]] = set()
        for member in group.members:
            path = member.tensor.rpartition(".")[0]
            module = model.get_submodule(path)
            key = (id(module), member.dim)
            if member.role == "in" and key not in seen:
                seen.add(key)
                yield group, member, module


@contextmanager
def _before(modules: Iterable[nn.Module], note: Any) -> Iterator[None]:
    handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _parts(
    module: nn.Module, x: Tensor, reads: Sequence[tuple[Group, Member]]
) -> Iterator[tuple[Group, Tensor]]:
    """Yield what one call of a layer adds to G of each group that it reads."""
    weights_BOI = matrix(module, module._parameters["weight"])  # type: ignore[arg-type]
    inputs = weights_BOI.shape[-1] // kernel(module)
    step = pieces(module, x)
    if weights_BOI.shape[-1] > _WIDE:
        for piece in x.split(step):
            for group, member in reads:
                places = member.positions.to(x.device)
                x_BNI = patches(module, piece)
                yield group, _by_contributions(x_BNI, weights_BOI, places, inputs)
        return
    products_BII = torch.zeros_like(weights_BOI.mT @ weights_BOI)
    for piece in x.split(step):
        x_BNI = patches(module, piece)
        products_BII += x_BNI.mT @ x_BNI
    products_BII *= weights_BOI.mT @ weights_BOI
    sums_IC = products_BII.unflatten(-1, (inputs, -1)).sum((0, -1))
    sums_CC = sums_IC.unflatten(0, (inputs, -1)).sum(1)
    for group, member in reads:
        places = member.positions.to(x.device)
        yield group, sums_CC[places].sum(1)[:, places].sum(2)


def _by_contributions(x_BNI: Tensor, weights_BOI: Tensor, places: Tensor, inputs: int) -> Tensor:
    """Form the C_u themselves, a few outputs at a time, where X^T X would be too large."""
    total_UU = x_BNI.new_zeros(len(places), len(places))
    for x_NI, weights_OI in zip(x_BNI, weights_BOI, strict=True):
        x_NUP = x_NI.unflatten(-1, (inputs, -1))[:, places].flatten(2)
        weights_OUP = weights_OI.unflatten(-1, (inputs, -1))[:, places].flatten(2)
        few = max(1, PIECE // max(1, len(x_NI) * len(places)))
        for part_OUP in weights_OUP.split(few):
            made = torch.einsum("nup,oup->uno", x_NUP, part_OUP).flatten(1)
            total_UU += made @ made.T
    return total_UU
