"""Where logits, labels and masks are, in outputs and batches of any structure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_accel.distillation.criterion import are_distributions
from lightning_accel.distillation.tape import Record
from lightning_accel.errors import AccelError, explain
from lightning_accel.surgery.call import tensors

Where = str | int | Callable[[Any], Tensor] | None
IGNORED = -100
"""The label that marks positions without one, as in `torch.nn.functional.cross_entropy`."""


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


def class_dim_of(logits: Tensor, batch: Any, record: Record) -> int | None:
    """Tell from shapes where the classes of logits of three or more dimensions are: 1, -1 or `None`.

    Labels in the batch have the logits' shape without that dimension, or are distributions along it. Where there are
    none, tokens and masks that the network got say it, and last its inputs that differ from the
    logits in one dimension alone. `None` where they disagree, or where all dimensions are alike.

    >>> call = Record((torch.ones(2, 3, 8, 8),), {}, None, {})
    >>> class_dim_of(torch.ones(2, 5, 8, 8), (torch.ones(2, 8, 8, dtype=torch.long),), call)
    1
    """
    if logits.dim() < 3:
        return -1
    inputs = tensors((record.args, record.kwargs))
    used = {id(t) for t in inputs}
    given = [t for leaf in tree_leaves(batch) for t in tensors(leaf) if id(t) not in used]
    for say in (
        _votes(logits, filter(_is_whole, given)) | _along(logits, given),
        _votes(logits, filter(_is_whole, inputs)),
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


def _is_whole(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex()


def target_of(
    where: Where, batch: Any, record: Record, logits: Tensor | None, *, shifted: bool = False
) -> Tensor | None:
    """Return the labels of the logits' positions: a given place, or the one tensor that can be them.

    Args:
        where: Key, index or function; `None` takes the keyword `labels` of the network, or the only
            integers of the logits' shape without classes that are no argument of the network.
        batch: What the training step got.
        record: The network's call.
        logits: (B, ..., C).
        shifted: Whether the network's own `labels` are its inputs, see `is_shifted`.

    Raises:
        AccelError: The given place is not there.
    """
    if where is not None:
        return _at(where, batch, record, "target")
    if logits is None:
        return None
    shape = logits.shape[:-1]
    labels = record.kwargs.get("labels")
    if isinstance(labels, Tensor) and labels.shape == shape:
        if not shifted:
            return labels
        return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], 1)
    used = {id(t) for t in tensors((record.args, record.kwargs))}
    leaves = [t for leaf in tree_leaves(batch) for t in tensors(leaf)]
    whole = [t for t in leaves if not t.is_floating_point() and not t.is_complex()]
    fits = [t for t in whole if t.shape == shape and t.dtype != torch.bool and id(t) not in used]
    return fits[0] if len(fits) == 1 else None


def is_shifted(record: Record, logits: Tensor | None) -> bool:
    """Tell whether a network takes its inputs as `labels` and shifts them itself, as causal ones do.

    The logits at position t then predict the label at t + 1.
    """
    labels = record.kwargs.get("labels")
    if logits is None or logits.dim() != 3 or not isinstance(labels, Tensor):
        return False
    inputs = [t for t in tensors((record.args, record.kwargs)) if t is not labels]
    tokens = [t for t in inputs if t.shape == labels.shape and t.dtype == labels.dtype]
    return any(bool(((t == labels) | (labels == IGNORED)).all()) for t in tokens)


def mask_of(
    where: Where, batch: Any, record: Record, logits: Tensor | None, target: Tensor | None
) -> Tensor | None:
    """Return which positions of a sequence count, or `None` for all.

    Without a given place these are what the network's own `attention_mask` leaves, and the positions
    whose label is not `IGNORED`; for logits of two dimensions all.
    """
    if where is not None:
        found = _at(where, batch, record, "mask")
        return None if found is None else found.bool()
    if logits is None or logits.dim() < 3:
        return None
    valid = None
    given = record.kwargs.get("attention_mask")
    if isinstance(given, Tensor) and given.shape == logits.shape[:-1]:
        valid = given.bool()
    if target is not None and target.shape == logits.shape[:-1]:
        labelled = target != IGNORED
        valid = labelled if valid is None else valid & labelled
    return valid


def _at(where: Where, batch: Any, record: Record, name: str) -> Tensor:
    try:
        if callable(where):
            found = where(batch)
        elif isinstance(where, str) and where in record.kwargs:
            found = record.kwargs[where]
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
