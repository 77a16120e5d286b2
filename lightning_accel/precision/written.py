"""Weights that others write, step after step: learning in bfloat16 that no master sees.

A mask, a clamp, a restored checkpoint write what the weight shall be, and the master takes it over. A rule that
computes the new weight from the old one (`p.data -= lr * g`, Lookahead's `p.data.copy_(slow)`) does that with
eight bits where it reads the model's own weights, and most of its updates are lost or take a master's last bits
with them. What tells the two apart is that the second comes back every few steps, with many values.
"""

from __future__ import annotations

from torch import nn

from lightning_accel.errors import Unsupported
from lightning_accel.precision.weights import ShortWeights

_EACH, _THEN = 128, 16  # looks that are taken one by one, and every which after
_TIMES, _WITHIN = 3, 32  # so often, with no more looks between


class Written:
    """Compares weights with what the last step made of them.

    >>> layer, weights = nn.Linear(4, 4), ShortWeights()
    >>> weights.remember(layer.parameters())
    >>> written = Written(weights)
    >>> for _ in range(3):
    ...     layer.bfloat16().weight.data *= 1.1
    ...     try:
    ...         written.check(layer)
    ...     except Unsupported as error:
    ...         print(str(error)[:52])
    weights are computed outside of an optimizer step, w
    """

    def __init__(self, weights: ShortWeights) -> None:
        self._weights = weights
        self._count = 0
        self._last: list[int] = []
        self._close: set[str] = set()

    def reset(self) -> None:
        """Begin anew, with another fit."""
        self._count, self._last = 0, []
        self._weights.rounded = {} if self._weights.kind == "stochastic" else None

    def check(self, model: nn.Module | None) -> None:
        """Look, if it is time to, and no optimizer is at work.

        Raises:
            Unsupported: Others wrote for the third time in a row of not too distant steps.
        """
        if self._weights.is_stepping:
            return
        self._count += 1
        suspicious = bool(self._last) and self._count - self._last[-1] <= _WITHIN
        if not (suspicious or _is_due(self._count)):
            return
        names = {p: name for name, p in model.named_parameters()} if model is not None else {}
        found = [names[p] for p in self._weights.take_over(names)]
        if self._weights.rounded is not None and not _is_due(self._count + 1):
            self._weights.rounded.clear()
        if not found:
            return
        self._last = [*self._last, self._count] if suspicious else [self._count]
        if len(self._last) >= _TIMES:
            raise Unsupported(
                "weights are computed outside of an optimizer step, with the eight bits of bfloat16, so that "
                "most of what they learn is lost",
                f"{_TIMES} times within few steps, such as "
                + ", ".join(f"`{name}`" for name in found[:3]),
                "let an optimizer step them (Lightning's `self.optimizers().step()` where the optimizer holds "
                "another), or use `AutocastPrecision('bf16-mixed')`",
            )


def _is_due(count: int) -> bool:
    return count <= _EACH or count % _THEN == 0
