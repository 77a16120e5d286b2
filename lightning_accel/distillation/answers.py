"""An answer of the teacher as bytes and back: one row of bytes for each input row.

Tensors stand in the order of their names, each padded to a multiple of 8 bytes. Floating-point ones are
rounded to the type of the cache and come back as float32; classes take 2 bytes where there are at
most 65,536; all others stay as they are. A row that the type on disk cannot hold (65,505 or more in
float16, infinity, NaN, or all of it below 6e-5, where float16 loses its digits) is marked, so that it is
used as it was and never stored.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_SHORT_IDS = 2**16


class RowField(NamedTuple):
    """One tensor of an answer: its name, shape for one row, type on disk and type in use.

    >>> RowField("logits", (3,), torch.float16, torch.float32).row_bytes
    8
    """

    name: str
    shape: tuple[int, ...]
    stored: torch.dtype
    used: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, a multiple of 8: each entry begins where any type may."""
        return -(-math.prod(self.shape) * self.stored.itemsize // 8) * 8


class RowLayout(NamedTuple):
    """What one row of an answer looks like, as bytes.

    >>> RowLayout((RowField("logits", (10,), torch.float16, torch.float32),)).row_bytes
    24
    """

    entries: tuple[RowField, ...]

    @property
    def row_bytes(self) -> int:
        return sum(entry.row_bytes for entry in self.entries)

    @property
    def digest(self) -> str:
        return digest(json.dumps(self.about(), sort_keys=True).encode())

    def about(self) -> dict[str, Any]:
        return {
            "row": [
                [e.name, list(e.shape), _type_name(e.stored), _type_name(e.used)]
                for e in self.entries
            ]
        }

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """Return the tensors of rows of bytes, uint8 (n, row_bytes)."""
        answers, start = {}, 0
        for entry in self.entries:
            size = math.prod(entry.shape)
            raw = packed[:, start : start + size * entry.stored.itemsize]
            typed = raw.view(entry.stored) if size else raw.to(entry.stored)
            tensor = typed.reshape(len(packed), *entry.shape).to(entry.used)
            short = entry.stored == torch.int16 and entry.used == torch.int64
            answers[entry.name] = tensor & (_SHORT_IDS - 1) if short else tensor
            start += entry.row_bytes
        return answers


class Answer(NamedTuple):
    """What the teacher said of some rows: as it was, and packed, with which rows are finite.

    >>> answer = Answer.of({"logits": torch.tensor([[0.1], [70_000.0]])}, torch.float16)
    >>> answer.packed.shape, answer.finite.tolist(), answer.unpack()["logits"].flatten().tolist()
    (torch.Size([2, 8]), [True, False], [0.0999755859375, 70000.0])
    """

    layout: RowLayout
    tensors: dict[str, Tensor]
    packed: Tensor
    finite: np.ndarray

    @classmethod
    def of(cls, tensors: dict[str, Tensor], stored: torch.dtype) -> Answer:
        """Round and pack: uint8 (n, row_bytes) on the device of the answers."""
        entries, parts, finite = [], [], []
        for name in sorted(tensors):
            tensor = tensors[name]
            entry, tensor = _entry_of(name, tensor, stored)
            size = math.prod(entry.shape)
            if tensor.is_floating_point():
                finite.append(_held(tensor.reshape(len(tensor), size), tensors[name]))
            raw = tensor.reshape(len(tensor), size).contiguous().view(torch.uint8)
            parts.append(torch.nn.functional.pad(raw, (0, entry.row_bytes - raw.shape[1])))
            entries.append(entry)
        device = parts[0].device
        good = [part.to(device) for part in finite] or [torch.ones(len(parts[0]), dtype=torch.bool)]
        return cls(
            RowLayout(tuple(entries)),
            tensors,
            torch.cat([part.to(device) for part in parts], dim=1),
            torch.stack(good).all(0).cpu().numpy(),
        )

    def bytes_on_cpu(self) -> np.ndarray:
        return self.packed.cpu().numpy()

    def unpack(self) -> dict[str, Tensor]:
        """Return what a hit would give; rows that are not finite as they were."""
        answers = self.layout.unpack(self.packed)
        if not self.finite.all():
            odd = torch.from_numpy(np.flatnonzero(~self.finite))
            for name, tensor in answers.items():
                if tensor.is_floating_point():
                    at = odd.to(tensor.device)
                    tensor[at] = self.tensors[name][odd.to(self.tensors[name].device)].to(tensor)
        return answers

    def spread(self, place: np.ndarray, found: np.ndarray, values: np.ndarray) -> dict[str, Tensor]:
        """Return the answers to a whole batch: those found on disk, row `place` of this for the rest."""
        own = self.unpack()
        if not found.any() and len(place) == len(self.packed):
            return own
        device = self.packed.device
        fresh = torch.from_numpy(np.flatnonzero(~found)).to(device)
        known = torch.from_numpy(np.flatnonzero(found)).to(device)
        read = self.layout.unpack(torch.from_numpy(values[found]).to(device)) if found.any() else {}
        answers = {}
        for name, tensor in own.items():
            answers[name] = tensor.new_empty(len(found), *tensor.shape[1:])
            answers[name][fresh] = tensor[torch.from_numpy(place).to(device)]
            if read:
                answers[name][known] = read[name]
        return answers


def _entry_of(name: str, tensor: Tensor, stored: torch.dtype) -> tuple[RowField, Tensor]:
    """Return how a tensor is kept, and it in that type."""
    shape = tuple(tensor.shape[1:])
    if tensor.is_floating_point():
        return RowField(name, shape, stored, torch.float32), tensor.to(stored)
    ids = name == "logits_ids"
    return RowField(name, shape, tensor.dtype, torch.int64 if ids else tensor.dtype), tensor


def _held(rounded: Tensor, was: Tensor) -> Tensor:
    """Tell of each row whether it is as it was to the precision of the type that it is stored in."""
    finite = rounded.isfinite().all(1)
    if not rounded.shape[1] or torch.finfo(rounded.dtype).tiny <= torch.finfo(torch.bfloat16).tiny:
        return finite
    largest = was.reshape(rounded.shape).abs().amax(1)
    return finite & ((largest >= torch.finfo(rounded.dtype).tiny) | (largest == 0))


def short_ids(ids: Tensor, classes: int) -> Tensor:
    """Return class numbers in the fewest bytes that hold `classes` of them (int16 wraps around).

    >>> short_ids(torch.tensor([1, 40_000]), 50_000).dtype
    torch.int16
    """
    return ids.to(torch.int16 if classes <= _SHORT_IDS else torch.int32)


def digest(text: bytes) -> str:
    """Return 32 hexadecimal digits for a text, safe as the name of a folder.

    >>> len(digest(b"../../etc"))
    32
    """
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
