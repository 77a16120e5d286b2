"""Which label belongs to which position of the logits, and which positions count.

The labels of a step are some tensor of the batch or of the network's call, perhaps moved along the
sequence: a causal language model shifts its labels inside, others are shifted by hand in the training step.
What the criterion was heard to compare at the first step says which tensor, how far, and what it leaves out
(`ignore_index`, padding). Where none was heard, labels that are the network's own inputs are taken as shifted by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_accel.distillation.criterion import Usage, place_of
from lightning_accel.distillation.forward_recorder import ForwardRecord
from lightning_accel.distillation.locate import Where, at, is_whole
from lightning_accel.surgery.call import tensors

IGNORED = -100
"""The label that marks positions without one, as in `torch.nn.functional.cross_entropy`."""

_FARTHEST = 3  # positions ahead, as of heads that predict several tokens
_LEAST = 2  # positions that show a label is never counted


class Reading(NamedTuple):
    """How the labels of any step are read, once the first has been looked at.

    >>> Reading(shift=1).placed(torch.tensor([[5, 6, 7]]))
    tensor([[   6,    7, -100]])
    """

    source: tuple[str, int] | None = None
    """Which tensor of "batch" or "call"; `None` is the one that can be labels."""
    shift: int = 0
    """How many positions ahead the label of a position stands."""
    along: int = 1
    """The dimension of the sequence."""
    ignored: tuple[int, ...] = (IGNORED,)
    """Labels of positions that do not count."""
    heard: bool = False
    """Whether the criterion said so."""

    def placed(self, labels: Tensor, shape: torch.Size | None = None) -> Tensor:
        """Return labels at the positions whose logits predict them, ignored where there is none.

        Args:
            labels: As they are given, perhaps of a longer sequence.
            shape: Of the positions; by default that of the labels.
        """
        along, shift = self.along, self.shift
        wanted = (labels.shape if shape is None else shape)[along] if labels.dim() > along else 0
        if not shift and (labels.dim() <= along or labels.shape[along] == wanted):
            return labels
        ahead = labels.narrow(along, shift, min(wanted, labels.shape[along] - shift))
        none = labels.narrow(along, 0, wanted - ahead.shape[along])
        return torch.cat([ahead, torch.full_like(none, self.ignored[0])], along)

    def counts(self, labels: Tensor) -> Tensor:
        """Return where labels count."""
        found = labels != self.ignored[0]
        for other in self.ignored[1:]:
            found = found & (labels != other)
        return found


def read(
    where: Where, batch: Any, record: ForwardRecord, logits: Tensor | None, usage: Usage
) -> tuple[Reading, Tensor | None]:
    """Find out how labels are read; and where the criterion counts, if that was heard.

    Args:
        where: The place that the user gave.
        batch: What the training step got.
        record: The network's call.
        logits: (B, ..., C).
        usage: What the user's criteria did with them.
    """
    plain = Reading() if usage.ignored is None else Reading(ignored=(usage.ignored,))
    if logits is None:
        return plain, None
    if usage.labels is not None and bool(usage.counted.any()):  # type: ignore[union-attr]
        return _heard(where, batch, record, usage, plain), usage.counted
    return plain._replace(shift=_own_shift(where, batch, record, logits, plain)), None


def target_of(
    where: Where, batch: Any, record: ForwardRecord, logits: Tensor | None, reading: Reading
) -> Tensor | None:
    """Return the labels of the logits' positions: a given place, or the one tensor that can be them.

    Args:
        where: Key, index or function; `None` takes what the criterion compared, the argument `labels` of the
            network, or the only integers of the logits' shape without classes that are no argument of it.
        batch: What the training step got.
        record: The network's call.
        logits: (B, ..., C).
        reading: How labels are read.

    Raises:
        AccelError: The given place is not there.
    """
    found = _unplaced(where, batch, record, logits, reading)
    if found is None or logits is None:
        return found
    shape = logits.shape[:-1]
    known = found.shape == shape or (reading.heard and _fits(found.shape, shape, reading.along))
    return reading.placed(found, shape) if known else found


def mask_of(
    where: Where,
    batch: Any,
    record: ForwardRecord,
    logits: Tensor | None,
    target: Tensor | None,
    reading: Reading,
) -> Tensor | None:
    """Return which positions of a sequence count, or `None` for all.

    Without a given place these are what the network's own mask of padding leaves, and the positions
    whose label is not ignored; for logits of two dimensions all.
    """
    if where is not None:
        found = at(where, batch, record, "mask")
        return None if found is None else found.bool()
    if logits is None or logits.dim() < 3:
        return None
    valid = _of_padding(record, logits.shape[:-1])
    if target is not None and target.shape == logits.shape[:-1]:
        labelled = reading.counts(target)
        valid = labelled if valid is None else valid & labelled
    return valid


def _heard(
    where: Where, batch: Any, record: ForwardRecord, usage: Usage, plain: Reading
) -> Reading:
    """Return the tensor and the shift that give what the criterion compared, wherever it counts."""
    labels, counted = usage.labels, usage.counted
    assert labels is not None and counted is not None
    used = {id(t) for t in tensors((record.args, record.kwargs))}
    best: tuple[tuple[int, bool, bool], Reading] | None = None
    for source, found in _candidates(where, batch, record):
        for shift, along in _shifts(labels.shape):
            given = _as_positions(found, labels.shape, along)
            if given is None:
                continue
            reading = plain._replace(source=source, shift=shift, along=along, heard=True)
            placed = reading.placed(given, labels.shape)
            if torch.equal(placed[counted].to(labels), labels[counted]):
                reading = _with_padding(reading, placed, counted)
                missed = int((reading.counts(placed) & ~counted).sum())
                other = place_of(found) != usage.origin
                rank = (missed, other, id(found) in used)
                if best is None or rank < best[0]:
                    best = rank, reading
    return plain if best is None else best[1]


def _candidates(
    where: Where, batch: Any, record: ForwardRecord
) -> Iterator[tuple[tuple[str, int] | None, Tensor]]:
    if where is not None:
        given = at(where, batch, record, "target")
        if is_whole(given):
            yield None, given
        return
    for place, listed in _listed(batch, record).items():
        for index, tensor in enumerate(listed):
            if is_whole(tensor):
                yield (place, index), tensor


def _as_positions(labels: Tensor, shape: torch.Size, along: int) -> Tensor | None:
    """Return labels in the shape of the positions, or of a sequence somewhat longer; `None` if they have neither."""
    if labels.numel() == shape.numel():
        return labels.reshape(shape)
    return labels if _fits(labels.shape, shape, along) else None


def _fits(given: torch.Size, shape: torch.Size, along: int) -> bool:
    """Tell whether a shape is that of the positions, or longer along the sequence by a few."""
    if given == shape:
        return True
    if len(given) != 2 or len(shape) != 2 or given[1 - along] != shape[1 - along]:
        return False
    return 0 < given[along] - shape[along] <= _FARTHEST


def _shifts(shape: torch.Size) -> Iterator[tuple[int, int]]:
    yield 0, 1
    for along in (1, 0) if len(shape) == 2 else ():
        for shift in range(1, min(_FARTHEST, shape[along]) + 1):
            yield shift, along


def _with_padding(reading: Reading, placed: Tensor, counted: Tensor) -> Reading:
    """Add the one label that the criterion never counts, as where a step puts -100 in place of padding."""
    left_out = placed[reading.counts(placed) & ~counted]
    values = left_out.unique().tolist()
    alone = len(left_out) >= _LEAST and len(values) == 1
    if not alone or bool((placed[counted] == values[0]).any()):
        return reading
    return reading._replace(ignored=(*reading.ignored, values[0]))


def _own_shift(
    where: Where, batch: Any, record: ForwardRecord, logits: Tensor, plain: Reading
) -> int:
    """Return 1 where the labels of a sequence are the tokens that the network got, else 0."""
    if callable(where) or logits.dim() != 3:
        return 0
    labels = _unplaced(where, batch, record, logits, plain)
    if labels is None or labels.shape != logits.shape[:-1]:
        return 0
    inputs = [t for t in tensors((record.args, record.kwargs)) if t is not labels]
    tokens = [t for t in inputs if t.shape == labels.shape and t.dtype == labels.dtype]
    return int(any(bool(((t == labels) | ~plain.counts(labels)).all()) for t in tokens))


def _unplaced(
    where: Where, batch: Any, record: ForwardRecord, logits: Tensor | None, reading: Reading
) -> Tensor | None:
    if where is not None:
        return at(where, batch, record, "target")
    if logits is None:
        return None
    shape, listed = logits.shape[:-1], _listed(batch, record)
    if reading.source is not None:
        place, index = reading.source
        found = listed[place][index] if index < len(listed[place]) else None
        if found is not None and is_whole(found):
            given = _as_positions(found, shape, reading.along)
            if given is not None:
                return given
    named = record.named().get("labels")
    if isinstance(named, Tensor) and named.shape == shape:
        return named
    used = {id(t) for t in listed["call"]}
    whole = [t for t in listed["batch"] if is_whole(t) and t.dtype != torch.bool]
    fits = [t for t in whole if t.shape == shape and id(t) not in used]
    return fits[0] if len(fits) == 1 else None


def _listed(batch: Any, record: ForwardRecord) -> dict[str, list[Tensor]]:
    return {
        "batch": [t for leaf in tree_leaves(batch) for t in tensors(leaf)],
        "call": tensors((record.args, record.kwargs)),
    }


def _of_padding(record: ForwardRecord, shape: torch.Size) -> Tensor | None:
    """Return where the network was told that there is a token.

    `attention_mask` (of the decoder, where there is one) is true or 1 there, or 0 and negative elsewhere where it is
    added to scores; torch's `key_padding_mask` is true or negative elsewhere.
    """
    named = record.named()
    of_decoder = any(name.startswith("decoder_") for name in (*named, *record.names))
    keep = named.get("decoder_attention_mask" if of_decoder else "attention_mask")
    if isinstance(keep, Tensor) and keep.shape == shape:
        added = (
            (keep < 0).any() if keep.is_floating_point() else keep.new_zeros((), dtype=torch.bool)
        )
        return torch.where(added, keep == 0, keep != 0)
    for name in ("src_key_padding_mask", "key_padding_mask"):
        drop = named.get(name)
        if isinstance(drop, Tensor) and drop.shape == shape:
            return drop == 0
    return None
