"""Least squares for the weights of a layer, streamed: whatever the number of samples and the width of the layer.

Of the data only X^T X and X^T R are kept, of at most `WIDE` inputs at a time; of a wider layer one block of inputs
is solved after the other, each for what those before it left (block coordinate descent), so that the error goes
down with each. How much the old weights pull is tried on a part of the samples that is held out: few samples, which
any change can be fitted to, then change little or nothing.

Names of tensors end in their dimensions: G groups of a layer, N samples, I inputs of a block (J of all), O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

WIDE = 4096
"""Inputs x kernel that are solved together: X^T X then takes 134 MB."""
_RIDGES = (3e-3, 3e-2, 3e-1, 3.0)


class Piece(NamedTuple):
    """Some samples: X of shape (groups, samples, inputs), Y of (groups, samples, outputs), and if they are held out."""

    x_GNJ: Tensor
    y_GNO: Tensor
    held_out: bool


class Solution(NamedTuple):
    """Rows of shape (groups, outputs, inputs), and the squared errors with the old and with these."""

    rows_GOJ: Tensor
    before: float
    after: float


class _Sums(NamedTuple):
    gram_GII: Tensor  # X^T X
    cross_GIO: Tensor  # X^T R
    error: Tensor  # sum of R^2

    def plus(self, other: _Sums) -> _Sums:
        return _Sums(*(a + b for a, b in zip(self, other, strict=True)))

    def gain(self, change_GOI: Tensor) -> Tensor:
        """Return by how much a change of the rows lowers the squared error, per output."""
        slope_GOI = 2 * self.cross_GIO.mT - change_GOI @ self.gram_GII
        return (slope_GOI * change_GOI).sum(-1)


def improved(
    old: Tensor,
    data: Callable[[], Iterable[Piece]],
    *,
    ridge: float | None = None,
    free: int = 0,
    stored: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> Solution | None:
    """Change rows so that X rows^T comes nearer to Y; rows whose error would not go down stay.

    Args:
        old: Shape (groups, outputs, inputs), float64.
        data: Gives the samples anew at each call; it is called once for each block of inputs.
        ridge: Pull to the old rows, relative to the mean squared input. By default that of a few which is best
            on the samples held out, and rows that do no better on those stay.
        free: The last `free` inputs (a bias) are not pulled.
        stored: Rounds rows as they will be stored; the errors are those of rounded ones.

    Returns:
        `None` where the samples are not finite.
    """
    rows_GOJ, errors = old, []
    width = old.shape[-1]
    for start in range(0, width, WIDE):
        block = slice(start, min(start + WIDE, width))
        sums, held = _sums(rows_GOJ, block, data())
        whole = sums.plus(held)
        if not all(torch.isfinite(part).all() for part in whole):
            return None
        frees = free if block.stop == width else 0  # the bias is the last input of all
        step = partial(_step, rows_GOJ, block, free=frees, stored=stored)
        made_GOI, may_change_GO = _chosen(sums, held, step, ridge)
        gain_GO = whole.gain(made_GOI)
        better_GO = may_change_GO & (gain_GO > 0)
        rows_GOJ = rows_GOJ.clone()
        rows_GOJ[..., block] += torch.where(better_GO[..., None], made_GOI, 0)
        errors += [float(whole.error), float(whole.error) - float(gain_GO[better_GO].sum())]
    return Solution(rows_GOJ, errors[0], max(0.0, errors[-1]))


def _step(
    rows_GOJ: Tensor,
    block: slice,
    sums: _Sums,
    ridge: float,
    *,
    free: int,
    stored: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the change of a block that is best on the samples of `sums`, as it will be stored."""
    wanted_GOJ = rows_GOJ.clone()
    wanted_GOJ[..., block] += solve(sums.gram_GII, sums.cross_GIO, ridge=ridge, free=free).mT
    # A step that rounding to the stored format would undo must count as what it will be.
    return (stored(wanted_GOJ) - rows_GOJ)[..., block]


def _chosen(
    sums: _Sums, held: _Sums, step: Callable[[_Sums, float], Tensor], ridge: float | None
) -> tuple[Tensor, Tensor]:
    """Return the change that all samples ask for, and which rows may change."""
    whole = sums.plus(held)
    if ridge is not None:
        return step(whole, ridge), torch.ones_like(whole.cross_GIO[..., 0, :], dtype=torch.bool)
    best = _RIDGES[0]
    gain_GO = held.gain(step(sums, best))
    for pull in _RIDGES[1:]:
        other_GO = held.gain(step(sums, pull))
        if other_GO.sum() <= gain_GO.sum():
            break
        best, gain_GO = pull, other_GO
    return step(whole, best), gain_GO > 0


def _sums(rows_GOJ: Tensor, block: slice, data: Iterable[Piece]) -> tuple[_Sums, _Sums]:
    """Return the sums over the samples, and over those held out."""
    groups, outputs, _ = rows_GOJ.shape
    width = block.stop - block.start
    found = [
        _Sums(
            rows_GOJ.new_zeros(groups, width, width),
            rows_GOJ.new_zeros(groups, width, outputs),
            rows_GOJ.new_zeros(()),
        )
        for _ in range(2)
    ]
    for x_GNJ, y_GNO, held_out in data:
        missing_GNO = y_GNO - x_GNJ @ rows_GOJ.mT
        x_GNI = x_GNJ[..., block]
        gram_GII, cross_GIO, error = found[held_out]
        gram_GII += x_GNI.mT @ x_GNI
        cross_GIO += x_GNI.mT @ missing_GNO
        error += missing_GNO.square().sum()
    return found[0], found[1]


def solve(gram: Tensor, cross: Tensor, *, ridge: float = 0.0, free: int = 0) -> Tensor:
    """Return the D that minimises ||R - X D||^2 + pull ||D||^2 from X^T X and X^T R.

    Args:
        gram: X^T X, shape (..., inputs, inputs), float64.
        cross: X^T R, shape (..., inputs, outputs).
        ridge: The pull, relative to the mean of the diagonal of `gram`.
        free: The last `free` inputs (a bias) are not pulled.

    Where the inputs are linearly dependent and nothing pulls, it is the solution of least norm.

    >>> x = torch.randn(20, 3, dtype=torch.float64)
    >>> y = torch.randn(20, 2, dtype=torch.float64)
    >>> torch.allclose(solve(x.T @ x, x.T @ y), torch.linalg.lstsq(x, y).solution)
    True
    """
    inputs = gram.shape[-1]
    pulled = torch.arange(inputs, device=gram.device) < inputs - free
    mean = gram.diagonal(dim1=-2, dim2=-1)[..., pulled].sum(-1, keepdim=True) / max(
        1, inputs - free
    )
    system = gram + torch.diag_embed(ridge * mean * pulled)
    factor, failed = torch.linalg.cholesky_ex(system)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    smallest = 1e-7 * system.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    if not failed.any() and (pivots > smallest).all():
        return torch.cholesky_solve(cross, factor)
    return torch.linalg.pinv(system, hermitian=True, rtol=inputs * 1e-14) @ cross
