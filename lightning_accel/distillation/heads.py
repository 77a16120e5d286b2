"""Projectors and embeddings on their way through checkpoints and prunes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_accel.changed import changed, written
from lightning_accel.distillation.distillation_loss import DistillationLoss
from lightning_accel.distillation.forward_recorder import INPUT, ForwardRecord
from lightning_accel.distillation.outputs import Answer
from lightning_accel.distillation.projector import Embedding, Projector, from_spec, narrowed, spec
from lightning_accel.errors import AccelError
from lightning_accel.surgery import Receipt, follow
from lightning_accel.surgery.optimizers import within


def state(engine: DistillationLoss) -> dict[str, Any]:
    """Return specifications, weights and what they were made for as plain data."""
    heads = engine.heads
    return {
        "layers": _layers(engine),
        "specs": {name: spec(head) for name, head in heads.items()},  # type: ignore[arg-type]
        "weights": heads.state_dict(),
    }


def load(engine: DistillationLoss, stored: Mapping[str, Any], device: torch.device) -> None:
    """Make the heads again as `state` described them.

    Raises:
        AccelError: They were made for other layers than those that are asked for now.
    """
    difference = changed(stored.get("layers"), _layers(engine))
    if difference:
        raise AccelError(
            "the projectors of the checkpoint belong to other layers",
            f"layers of {difference}",
            "give the former layers, name the loss anew (`{'hint2': {'loss': 'fitnet', ...}}`), or begin a new "
            "fit from the weights of the checkpoint",
        )
    heads = engine.heads
    for name, plain in stored["specs"].items():
        heads[name] = from_spec(plain)
    heads.load_state_dict(stored["weights"])
    heads.to(device)


def narrow(
    engine: DistillationLoss,
    record: ForwardRecord,
    answer: Answer,
    edit: Receipt,
    optimizers: Sequence[Any],
    *,
    prefix: str,
) -> list[str]:
    """Let heads follow when the layers that they read have lost channels; return those made anew.

    Which channels stay is read from the parameters below the tapped layer whose first dimension was as
    wide; where these disagree, or the layer got wider again, the head starts anew.

    Args:
        engine: Holds the heads.
        record: A call of the edited student.
        answer: What the teachers said to it.
        edit: What was done to the student.
        optimizers: Those of the fit, whose state follows.
        prefix: The student's name within the edited module.
    """
    anew = []
    for key, name, width in engine.widths(record, answer):
        head: Any = dict(engine.heads.items()).get(key)
        if head is None or head.weight.shape[1] == width:
            continue
        path = f"{prefix}.{name.removesuffix(INPUT)}".strip(".")
        kept = _kept(edit, path, head.weight.shape[1], width)
        if kept is not None:
            receipt = narrowed(head, kept, name=key)
            for optimizer in optimizers:
                follow(optimizer, receipt)
        else:
            anew.append(key)
            _renew(head, width, optimizers)
    return anew


def _layers(engine: DistillationLoss) -> dict[str, str]:
    """Return which layers each loss reads, as text: a projector fits one pair of them."""
    return written({n: t.layers for n, t in engine.terms.items() if t.layers is not None})


def _kept(edit: Receipt, prefix: str, old: int, new: int) -> Tensor | None:
    found: list[Tensor] = []
    for move in edit.moved:
        positions = move.kept.dims[0] if move.kept.dims else None
        inside = move.name == prefix or move.name.startswith(f"{prefix}.")
        if inside and positions is not None and move.old_shape[0] == old and len(positions) == new:
            found.append(positions.cpu())
    alike = bool(found) and all(torch.equal(found[0], other) for other in found)
    return found[0] if alike else None


def _renew(head: Projector | Embedding, width: int, optimizers: Sequence[Any]) -> None:
    """Give a head another input width and fresh weights; its parameters stay the same objects."""
    described = spec(head)
    key = "student_width" if "student_width" in described else "width"
    fresh = from_spec({**described, key: width}).to(head.weight.device)
    for old, new in zip(head.parameters(), fresh.parameters(), strict=True):
        old.grad = None
        old.data = new.data.to(old.dtype)
        for optimizer in within(optimizers):
            optimizer.state.pop(old, None)
