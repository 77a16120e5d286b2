"""Where logits, labels and masks are, in outputs and batches of any structure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

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
    """Return the logits in what a network gave: the tensor, `.logits`, or the only one with classes.

    `None` where there is none, or several, such as features and logits.

    >>> logits_of((torch.tensor(0.5), torch.ones(2, 3))).shape
    torch.Size([2, 3])
    """
    if isinstance(output, Mapping):
        named = output.get("logits")
    else:
        named = None if isinstance(output, Tensor) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    found = [t for t in tensors(output) if t.is_floating_point() and t.dim() >= 2]
    return found[0] if len(found) == 1 else None


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
