"""How much each channel of a group matters; torch-pruning's scores, summed over all coupled layers.

- `magnitude`: mean squared L2 norm of the channel's weights (Li et al. 2017, arXiv:1608.08710).
- `taylor`: mean |weight x gradient|, the first-order change of the loss when the channel goes
  (Molchanov et al. 2019, arXiv:1906.10771); reads the `.grad` that the parameters hold.
- `random`: the baseline that a criterion has to beat; the same draw for the same network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.errors import AccelError, explain

KNOWN = ("magnitude", "taylor", "random")


def check(importance: Any) -> str:
    """Return the name of a known importance, or raise `ValueError` that lists them.

    >>> check("magnitude")
    'magnitude'
    """
    if importance not in KNOWN:
        raise ValueError(
            explain("unknown importance", repr(importance), f"choose one of {', '.join(KNOWN)}")
        )
    return str(importance)


def require_gradients(model: nn.Module) -> None:
    """Raise unless some parameter holds a gradient."""
    if all(p.grad is None for p in model.parameters()):
        raise AccelError(
            "importance='taylor' reads gradients",
            "no parameter holds one",
            "call `loss.backward()` first, or use importance='magnitude'",
        )


def score(group: Any, importance: str) -> Tensor:
    """Return one score per channel of a torch-pruning group, on the CPU, shape (channels,).

    Raises:
        ValueError: The group has nothing to score, or a score is not finite.
    """
    width = len(group[0].idxs)
    if importance == "random":
        generator = torch.Generator().manual_seed(width)
        return torch.rand(width, generator=generator)
    import torch_pruning

    if importance == "magnitude":
        scorer = torch_pruning.importance.GroupMagnitudeImportance(p=2, normalizer=None)
    else:
        scorer = torch_pruning.importance.GroupTaylorImportance(normalizer=None)
    scores = scorer(group)
    if scores is None or len(scores) != width:
        raise ValueError("it has no score per channel")
    if not torch.isfinite(scores).all():
        raise ValueError("its weights or gradients are not finite")
    return scores.detach().float().cpu()
