"""What every loss does first and last: 32 bits outside of autocast, checks, positions that count.

In float16 the differences of softmaxes that make a gradient round to zero: at logits of scale 10, 94 % of
them, against none in float32. So a loss leaves autocast and casts before its first operation. What is
undefined in a formula, such as the direction of a zero vector, is zero here and has no gradient, where a
small constant in the denominator would make a gradient of 1e12 of it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor

from lightning_accel.arguments import finite, instance
from lightning_accel.errors import explain
from lightning_accel.exact import widest

P = ParamSpec("P")

_NUMBERS = ("alpha", "beta", "gamma", "temperature")
_TENSORS = ("mask", "target", "negatives", "negatives_target")


def full_precision(
    *, teacher_learns: bool = False
) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Decorate a loss: out of autocast, float16 and bfloat16 to float32, no gradient to the teacher.

    The first two arguments are student and teacher; float32 and float64 stay what they are.

    Args:
        teacher_learns: Leave the teacher's gradient alone; the default detaches it.

    Raises:
        TypeError: Student or teacher is no tensor of real numbers.
        ValueError: They lie on different devices.

    >>> @full_precision()
    ... def gap(student, teacher, /):
    ...     return (student - teacher).mean()
    >>> gap(torch.ones(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.float16))
    tensor(1.)
    """

    def decorate(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
        @functools.wraps(loss)
        def in_32_bits(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            pair: list[Any] = list(args)
            device = _device(*pair[:2])
            if not teacher_learns:
                pair[1] = pair[1].detach()
            for name, value in kwargs.items():
                _check(name, value)
            with _no_autocast(device):
                positional = [_widened(side) for side in pair]
                return loss(*positional, **{k: _widened(v) for k, v in kwargs.items()})

        return in_32_bits

    return decorate


def _check(name: str, value: Any) -> None:
    if name in _NUMBERS:
        finite(name, value)
    elif name in _TENSORS:
        instance(name, value, Tensor, "a tensor", "pass one, or leave it out", none=True)


def _device(student: Any, teacher: Any) -> torch.device:
    for name, tensor in (("student", student), ("teacher", teacher)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(
                explain(f"the {name}'s side of a loss is a tensor of real numbers", str(found))
            )
    if student.device != teacher.device:
        raise ValueError(
            explain(
                "student and teacher lie on different devices",
                f"{student.device} and {teacher.device}",
                "move the teacher to the student's device",
            )
        )
    return student.device


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _widened(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


def require_same_shape(student: Tensor, teacher: Tensor, do: str) -> None:
    """Raise a `ValueError` that ends with what to `do` unless both sides have one shape.

    >>> require_same_shape(torch.ones(2), torch.ones(3), "project one")
    Traceback (most recent call last):
    ...
    ValueError: student and teacher need one shape. Found: (2,) and (3,). Do: project one.
    """
    if student.shape != teacher.shape:
        found = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(explain("student and teacher need one shape", found, do))


def valid_positions(rows: Tensor, mask: Tensor | None) -> Tensor | None:
    """Return `mask` as booleans; raise a `ValueError` unless it has the shape of `rows` but its last.

    >>> valid_positions(torch.ones(2, 3), torch.tensor([1, 0]))
    tensor([ True, False])
    """
    if mask is None:
        return None
    if mask.shape != rows.shape[:-1]:
        raise ValueError(
            explain(
                "`mask` has one value per position, the tensors' shape without the last dimension",
                f"{tuple(mask.shape)} for {tuple(rows.shape)}",
                "pass a mask of shape " + str(tuple(rows.shape[:-1])),
            )
        )
    return mask.to(rows.device) != 0


def blank(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Return `rows` with zeros where not valid, so that nothing there reaches a gradient, NaN included.

    >>> blank(torch.tensor([[1.0], [torch.nan]]), torch.tensor([True, False]))
    tensor([[1.],
            [0.]])
    """
    return rows if valid is None else rows.where(valid.unsqueeze(-1), rows.new_zeros(()))


def average(values: Tensor, valid: Tensor | None) -> Tensor:
    """Return the mean over the valid positions, zero where there is none.

    >>> average(torch.tensor([1.0, 3.0]), torch.tensor([True, False]))
    tensor(1.)
    """
    if valid is None:
        return values.sum() / max(values.numel(), 1)
    return values.where(valid, values.new_zeros(())).sum() / valid.sum().clamp(min=1)


def unit(vectors: Tensor, negligible: float = 0.0) -> Tensor:
    """Return vectors of the last dimension with length 1; zero without a gradient up to `negligible`.

    >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    directed = ~(length <= negligible)  # NaN stays NaN
    one, zero = length.new_ones(()), length.new_zeros(())
    return (vectors / length.where(directed, one)).where(directed, zero)


def inner_products(rows_AD: Tensor, rows_BD: Tensor) -> Tensor:
    """Return all inner products (A, B) in float64, or in float32 where the device has none.

    Autocast leaves float64 alone even where `backward` is called inside of it, and so does TF32.

    >>> inner_products(torch.eye(2), torch.tensor([[3.0, 4.0]]))
    tensor([[3.],
            [4.]], dtype=torch.float64)
    """
    wide = widest(rows_AD.device)
    return rows_AD.to(wide) @ rows_BD.to(wide).T
