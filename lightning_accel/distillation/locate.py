"""Where logits are, and their classes, in outputs of any structure; and what a given place means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_accel.distillation.criterion import are_distributions
from lightning_accel.distillation.forward_recorder import ForwardRecord
from lightning_accel.errors import AccelError, explain
from lightning_accel.surgery.call import tensors

Where = str | int | Callable[[Any], Tensor] | None


def check_where(where: Any, name: str) -> Where:
    """Return a place within a batch, or raise."""
    if where is None or type(where) in (str, int) or callable(where):
        return where
    raise TypeError(
        explain(
            f"`{name}` is a key or an index into the batch, or a function of it",
            repr(where),
            "pass 'labels', 1, or a function",
        )
    )


def logits_of(output: Any) -> Tensor | None:
    """Return the logits in what a network gave: the tensor, `.logits`, `["out"]`, or the only one with classes.

    `None` where there is none, or several, such as features and logits. One number a row is an output of its own.

    >>> logits_of((torch.tensor(0.5), torch.ones(2, 3))).shape
    torch.Size([2, 3])
    """
    if isinstance(output, Mapping):
        named = output.get("logits", output.get("out"))  # transformers; torchvision
    else:
        named = None if isinstance(output, Tensor) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    floating = [t for t in tensors(output) if t.is_floating_point()]
    found = [t for t in floating if t.dim() >= 2] or [t for t in floating if t.dim() == 1]
    return found[0] if len(found) == 1 else None


def classes_last(logits: Tensor, dim: int | None) -> Tensor:
    """Return logits with the dimension of the classes last; `None` leaves them as they are.

    Of one number a row that dimension is made.

    >>> classes_last(torch.ones(2, 5, 8, 8), 1).shape
    torch.Size([2, 8, 8, 5])
    """
    if logits.dim() == 1:
        return logits.unsqueeze(-1)
    return logits if dim is None or logits.dim() < 3 else logits.movedim(dim, -1)


def classes_back(logits: Tensor, dim: int | None) -> Tensor:
    """Undo `classes_last`."""
    return logits if dim is None or logits.dim() < 3 else logits.movedim(-1, dim)


def class_dim_of(logits: Tensor, batch: Any, record: ForwardRecord) -> int | None:
    """Tell from shapes where the classes of logits of three or more dimensions are: 1, -1 or `None`.

    Labels in the batch have the logits' shape without that dimension, or are distributions along it. Where there are
    none, tokens and masks that the network got say it, and last its inputs that differ from the
    logits in one dimension alone. `None` where they disagree, or where all dimensions are alike.

    >>> call = ForwardRecord((torch.ones(2, 3, 8, 8),), {}, None, {})
    >>> class_dim_of(torch.ones(2, 5, 8, 8), (torch.ones(2, 8, 8, dtype=torch.long),), call)
    1
    """
    if logits.dim() < 3:
        return -1
    inputs = tensors((record.args, record.kwargs))
    used = {id(t) for t in inputs}
    given = [t for leaf in tree_leaves(batch) for t in tensors(leaf) if id(t) not in used]
    for say in (
        _votes(logits, filter(is_whole, given)) | _along(logits, given),
        _votes(logits, filter(is_whole, inputs)),
        _votes(logits, inputs, like=True),
    ):
        if say:
            return say.pop() if len(say) == 1 else None
    return None


def _votes(logits: Tensor, others: Iterable[Tensor], *, like: bool = False) -> set[int]:
    """Return 1 or -1 for each tensor that has the logits' shape without that dimension; none if both fit."""
    shapes = {dim: _without(logits, dim) for dim in (1, -1)}
    found = set()
    for tensor in others if shapes[1] != shapes[-1] else ():
        for dim, shape in shapes.items():
            same = _without(tensor, dim) if like and tensor.dim() == logits.dim() else tensor.shape
            found |= {dim} if same == shape else set()
    return found


def _along(logits: Tensor, others: Iterable[Tensor]) -> set[int]:
    """Return 1 or -1 for each tensor of the logits' shape that holds distributions along it alone."""
    found = set()
    for tensor in others:
        if tensor.shape == logits.shape:
            dims = {dim for dim in (1, -1) if are_distributions(tensor, dim)}
            found |= dims if len(dims) == 1 else set()
    return found


def _without(tensor: Tensor, dim: int) -> torch.Size:
    shape = list(tensor.shape)
    del shape[dim]
    return torch.Size(shape)


def is_whole(tensor: Tensor) -> bool:
    """Tell whether a tensor holds whole numbers or truth values."""
    return not tensor.is_floating_point() and not tensor.is_complex()


def at(where: Where, batch: Any, record: ForwardRecord, name: str) -> Tensor:
    """Return what lies at a given place of the batch or of the network's call.

    Raises:
        AccelError: It is not there, or no tensor.
    """
    try:
        if callable(where):
            found = where(batch)
        elif isinstance(where, str) and where in record.named():
            found = record.named()[where]
        else:
            found = batch[where]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise AccelError(
            f"the {name} is not where `{name}={where!r}` says",
            f"{type(error).__name__}: {error}; a batch of type {type(batch).__name__}",
            f"pass a key or an index into the batch, or a function that returns the {name}",
        ) from None
    if not isinstance(found, Tensor):
        raise AccelError(f"the {name} must be a tensor", type(found).__name__, f"correct `{name}`")
    return found
