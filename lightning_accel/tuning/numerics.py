"""Whether a faster step still computes the same training: loss, gradients, and a short learning curve.

| tier | for | loss of the first batch | cosine of the whole gradient | of each parameter's |
| --- | --- | --- | --- | --- |
| exact | other kernels for the same arithmetic | 1e-5 of itself | 0.999 | 0.999 |
| amp | shorter products, as in mixed precision | 1e-2 | 0.99 | 0.9 |
| low | float8 and the like | 3e-2 | 0.95 | 0.8 |

A single parameter may differ more than the whole: bfloat16 leaves 0.97 of a first convolution before a batch
norm, of which another batch would leave nothing, and the learning curves agree all the same.

Compared are copies at the same weights, on the same batch, with the same random numbers. Where the step is
random by itself (dropout whose masks no seed pins down across kernels), the same comparison of plain with
plain says how far apart two equal steps are, and three times that is allowed.

The learning curve costs nothing extra: it is the loss during the timed steps, of which every copy sees the same
batches in the same order. Its moving average must end within 1 % of the first loss, or three times the gap
between plain and a plain whose weights differ by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_accel.errors import explain
from lightning_accel.exact import exact
from lightning_accel.tuning.tiers import TIERS

_LOSS = {"exact": 1e-5, "amp": 1e-2, "low": 3e-2}
_COSINE = {"exact": 0.999, "amp": 0.99, "low": 0.95}
_WORST = {"exact": 0.999, "amp": 0.9, "low": 0.8}
_CURVE = 1e-2
_WITHIN_NOISE = 3.0
_NEGLIGIBLE = 1e-3
"""A gradient so much smaller than the largest is made of rounding (a bias before a norm), and left out."""
_DECAY = 0.8


class Gradients(NamedTuple):
    """What one step computed: the loss and the gradient of each parameter."""

    loss: float
    by_name: Mapping[str, Tensor]


class Difference(NamedTuple):
    """How far apart two steps are: loss relative to itself, cosine of gradients, and the worst of one parameter."""

    loss: float
    cosine: float
    worst: float
    where: str = ""

    def __str__(self) -> str:
        place = f", {self.worst:.4f} of {self.where}" if self.where else ""
        return f"loss off by {self.loss:.1e}, gradient cosine {self.cosine:.4f}{place}"


def check(numerics: Any) -> str:
    """Return the name of a tier, or raise and list the known ones.

    >>> check("amp")
    'amp'
    """
    if not isinstance(numerics, str) or numerics not in TIERS:
        kind = ValueError if isinstance(numerics, str) else TypeError
        known = ", ".join(repr(tier) for tier in TIERS)
        raise kind(explain("unknown `numerics`", repr(numerics), f"pass one of {known}"))
    return numerics


def difference(plain: Gradients, other: Gradients) -> Difference:
    """Compare two steps; what is not finite in one only is as far apart as can be.

    >>> one = Gradients(2.0, {"w": torch.ones(3)})
    >>> str(difference(one, Gradients(2.2, {"w": torch.tensor([1.0, 1.0, 0.9])})))
    'loss off by 1.0e-01, gradient cosine 0.9988, 0.9988 of w'
    """
    if not torch.tensor([plain.loss, other.loss]).isfinite().all():
        same = str(plain.loss) == str(other.loss)
        return Difference(0.0, 1.0, 1.0) if same else Difference(float("inf"), -1.0, -1.0)
    loss = abs(plain.loss - other.loss) / max(abs(plain.loss), 1e-12)
    norms = {name: float(exact(g).norm()) for name, g in plain.by_name.items()}
    limit = _NEGLIGIBLE * max(norms.values(), default=0.0)
    worst, where = 1.0, ""
    product = squared = 0.0
    for name, norm in norms.items():
        found = other.by_name.get(name)
        one = exact(plain.by_name[name]).flatten()
        two = torch.zeros_like(one) if found is None else exact(found).flatten()
        product, squared = product + float(one @ two), squared + float(two @ two)
        length = norm * float(two.norm())
        cosine = float(one @ two) / length if length > 0 else -1.0
        if norm > limit and (not where or not cosine >= worst):
            worst, where = cosine if cosine == cosine else -1.0, name
    length = math.sqrt(sum(norm**2 for norm in norms.values()) * squared)
    nothing = squared == 0 and not any(norms.values())  # frozen, or at a minimum: two zeros agree
    whole = product / length if length > 0 else 1.0 if nothing else -1.0
    return Difference(loss, whole if whole == whole else -1.0, worst, where)


def furthest(plain: Sequence[Gradients], other: Sequence[Gradients]) -> Difference:
    """Compare step by step, and return the least agreement of each kind.

    >>> one, two = Gradients(2.0, {"w": torch.ones(3)}), Gradients(2.2, {"w": torch.ones(3)})
    >>> furthest([one, one], [one, two]).loss
    0.1...
    """
    each = [difference(a, b) for a, b in zip(plain, other, strict=True)]
    least = min(each, key=lambda d: d.worst)
    return Difference(
        max(d.loss for d in each), min(d.cosine for d in each), least.worst, least.where
    )


def verdict(found: Difference, noise: Difference, tier: str) -> str | None:
    """Return why a difference is too large for a tier, or `None`.

    Args:
        found: Plain against the candidate.
        noise: Plain against plain, with other random numbers.
        tier: "exact", "amp" or "low".

    >>> still = Difference(0.0, 1.0, 1.0)
    >>> verdict(Difference(1e-3, 0.9999, 0.99, "w"), still, "amp") is None
    True
    >>> verdict(Difference(1e-3, 0.9999, 0.99, "w"), still, "exact")
    'loss off by 1.0e-03, gradient cosine 0.9999, 0.9900 of w; allowed 1.0e-05, 0.999 and 0.999'
    """
    loss = max(_LOSS[tier], _WITHIN_NOISE * noise.loss)
    whole = min(_COSINE[tier], 1 - _WITHIN_NOISE * (1 - noise.cosine))
    worst = min(_WORST[tier], 1 - _WITHIN_NOISE * (1 - noise.worst))
    if found.loss <= loss and found.cosine >= whole and found.worst >= worst:
        return None
    return f"{found}; allowed {loss:.1e}, {whole:.3f} and {worst:.3f}"


def curve_gap(plain: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return how far the moving averages of two learning curves end apart, in first losses.

    >>> curve_gap([torch.tensor(2.0)] * 3, [torch.tensor(2.2)] * 3)
    0.1...
    """
    steps = min(len(plain), len(other))
    if not steps:
        return 0.0
    ends = []
    for losses in (plain, other):
        average = float(losses[0])
        for loss in losses[1:steps]:
            average = _DECAY * average + (1 - _DECAY) * float(loss)
        ends.append(average)
    gap = abs(ends[0] - ends[1]) / max(abs(float(plain[0])), 1e-12)
    if gap == gap:
        return gap
    return 0.0 if all(end != end for end in ends) else float("inf")


def curve_verdict(gap: float, noise: float) -> str | None:
    """Return why two learning curves are too far apart, or `None`.

    >>> curve_verdict(0.05, 0.001)
    'the learning curve ends 5.0 % of the first loss away; allowed 1.0 %'
    """
    allowed = max(_CURVE, _WITHIN_NOISE * noise)
    if gap <= allowed:
        return None
    return (
        f"the learning curve ends {gap:.1%} of the first loss away; allowed {allowed:.1%}".replace(
            "%", " %"
        )
    )
