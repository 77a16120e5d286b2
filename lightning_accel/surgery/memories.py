"""What an optimizer's state says about single elements of a parameter, and what it says about more.

Momentum and second moments have one number per element, so that a choice of elements is also a choice of
theirs. Factored second moments (Adafactor, Shazeer & Stern 2018, arXiv:1804.04235; CAME) stand for such a
tensor, V = r c / mean(r), and the cut of a rank-one matrix is one again: its row and column means are the new
factors. A matrix preconditioner (Shampoo), a history over all parameters (L-BFGS), codes in blocks
(8-bit Adam) and a projection (GaLore) mix elements; no cut of them is exact.

Shape alone does not tell: the preconditioner of a square weight is shaped like the weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_accel.surgery.receipt import Kept

Shape = tuple[int, ...]


class Factors(NamedTuple):
    """The two keys of a factored moment; `rows` is the mean over `rows_over`, `columns` over the other."""

    rows: str
    columns: str
    rows_over: int
    columns_over: int


def mixing(optimizer: Any, shapes: Mapping[nn.Parameter, Shape] | None = None) -> set[str]:
    """Return the keys under which square weights have a matrix of their size that is no tensor of elements.

    A key is one if it holds a square matrix for a weight that is none, or only symmetric ones.

    Args:
        optimizer: With its state.
        shapes: Of parameters that have another shape by now than their state.

    >>> net = nn.Linear(4, 4, bias=False)
    >>> adam = torch.optim.Adam(net.parameters())
    >>> net(torch.randn(2, 4)).sum().backward()
    >>> adam.step()
    >>> mixing(adam)
    set()
    """
    suspected: set[str] = set()
    elementwise: set[str] = set()
    certain: set[str] = set()
    for parameter, state in optimizer.state.items():
        shape = (shapes or {}).get(parameter, tuple(getattr(parameter, "shape", ())))
        for key, value in state.items() if isinstance(state, Mapping) else ():
            if not isinstance(value, Tensor) or value.numel() < 2:
                continue
            fits = tuple(value.shape) == shape
            if value.dim() == 2 and value.shape[0] == value.shape[1] and bool((value != 0).any()):
                if not fits:
                    certain.add(key)
                elif torch.equal(value, value.T):
                    suspected.add(key)
                else:
                    elementwise.add(key)
            elif fits and value.numel() > 1 and bool((value != 0).any()):
                elementwise.add(key)
    return certain | (suspected - elementwise)


def factors(state: Mapping[Any, Any], shape: Shape) -> list[Factors]:
    """Return the factored moments in the state of a parameter of this shape.

    >>> state = {"exp_avg_sq_row": torch.ones(3), "exp_avg_sq_col": torch.ones(2)}
    >>> factors(state, (3, 2))
    [Factors(rows='exp_avg_sq_row', columns='exp_avg_sq_col', rows_over=1, columns_over=0)]
    """
    found = []
    for rows, columns in _pairs(state):
        over = [
            _averaged_over(state[key], shape, last)
            for key, last in ((rows, len(shape) - 1), (columns, len(shape) - 2))
        ]
        if over[0] is not None and over[1] is not None and over[0] != over[1]:
            found.append(Factors(rows, columns, over[0], over[1]))
    return found


def cut_factors(state: Mapping[str, Any], pair: Factors, shape: Shape, kept: Kept) -> bool:
    """Cut both factors as the tensor that they stand for, in place; whether that is exact.

    >>> rows, columns = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0, 8.0])
    >>> state = {"row": rows, "col": columns}
    >>> cut_factors(state, factors(state, (2, 3))[0], (2, 3), Kept((None, torch.tensor([0, 1]))))
    True
    >>> rows, columns  # of [[1, 1, 4], [3, 3, 12]] without its last column
    (tensor([1., 3.]), tensor([2., 2.]))
    """
    if kept.flat is not None:
        return False
    rows, columns = state[pair.rows], state[pair.columns]
    r = rows.detach().reshape([1 if d == pair.rows_over else n for d, n in enumerate(shape)])
    c = columns.detach().reshape([1 if d == pair.columns_over else n for d, n in enumerate(shape)])
    mean = r.mean(pair.columns_over, keepdim=True)
    moment = kept.take((r * c / mean).where(mean != 0, 0.0))
    rows.data = moment.mean(pair.rows_over, keepdim=rows.dim() == len(shape))
    columns.data = moment.mean(pair.columns_over, keepdim=columns.dim() == len(shape))
    return True


def spans_all(value: Any, total: int) -> bool:
    """Tell whether a value of the state is a vector over all parameters, or has such in a list.

    >>> spans_all([torch.ones(12)], total=12)
    True
    """
    if isinstance(value, (list, tuple)):
        return any(spans_all(one, total) for one in value)
    return isinstance(value, Tensor) and value.dim() == 1 and value.numel() == total


def _pairs(state: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
    for key in (key for key in state if isinstance(key, str)):
        columns = key.replace("row", "col")
        if columns == key and key.endswith("_r"):
            columns = f"{key[:-2]}_c"
        both = isinstance(state.get(columns), Tensor) and isinstance(state[key], Tensor)
        if columns != key and both:
            yield key, columns


def _averaged_over(factor: Tensor, shape: Shape, usual: int) -> int | None:
    """Return the dimension that a factor lacks: the one of size 1, or the `usual` one where it was left out."""
    if factor.dim() == len(shape):
        other = [d for d, (n, m) in enumerate(zip(factor.shape, shape, strict=True)) if n != m]
        return other[0] if len(other) == 1 and factor.shape[other[0]] == 1 else None
    return usual if usual >= 0 and tuple(factor.shape) == _without(shape, usual) else None


def _without(shape: Shape, dim: int) -> Shape:
    return shape[:dim] + shape[dim + 1 :]
