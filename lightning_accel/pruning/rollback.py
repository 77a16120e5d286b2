"""The accuracy guard: when a prune has cost too much.

A prune is a bet that fine-tuning makes up for it. Before each one the whole state of the fit is copied
(`surgery.snapshot`). When the next prune is due, or the fit ends, the monitored metric is compared with its value
before the first prune, in a search with the best so far. Beyond the budget, the last prune is taken back, bit for
bit, and no other is tried. Not taken back are the counters of the training loop: epochs that were spent are spent.

The snapshot travels inside checkpoints, which are about twice as large while a verdict is open; so a
resumed fit judges like the uninterrupted one, and there is no second file to lose.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from lightning_accel.arguments import finite, one_of, text, whole
from lightning_accel.errors import AccelError, explain
from lightning_accel.surgery.snapshot import Snapshot

SETTINGS = ("max_drop", "monitor", "mode", "patience")
Mode = Literal["max", "min"]
MODES = get_args(Mode)
_LOWER_IS_BETTER = re.compile(
    r"(^|[\W_])(loss|error|err|mse|rmse|mae|ppl|perplexity)($|[\W_])", re.I
)
_ROUNDING = 1e-6  # metrics are float32: 0.95 - 0.94 is a little more than 0.01


class Rollback:
    """When to go on, to wait and to go back, given the validated metric.

    Args:
        max_drop: How much worse the metric may be than before the first prune, in its own units.
        monitor: Name of a metric that is logged in validation.
        mode: "max" where more is better, "min" where less is.
        patience: Epochs of fine-tuning that a prune may have before it is judged.
        follows_best: Compare with the best value so far, of whichever network.

    >>> guard = Rollback(max_drop=0.01, monitor="val_acc", mode="max", patience=1)
    >>> guard.note({"val_acc": 0.95})
    True
    >>> guard.begin(epoch=2, snapshot=None)
    >>> guard.note({"val_acc": 0.93})
    True
    >>> guard.verdict(epoch=2), guard.verdict(epoch=3)
    ('wait', 'back')
    """

    def __init__(
        self, *, max_drop: float, monitor: str, mode: str, patience: int, follows_best: bool = False
    ) -> None:
        self.max_drop = max_drop
        self.monitor = monitor
        self.mode = mode
        self.patience = patience
        self.follows_best = follows_best
        self.reset()

    def reset(self) -> None:
        """Forget the fit."""
        self.baseline: float | None = None
        self.first: float | None = None
        """The value before the first prune."""
        self.metrics: dict[str, Any] = {}
        """All metrics from before the prune that is judged."""
        self.seen: Any = None
        """The value that was taken in last, by identity: one that stays was not logged again."""
        self.latest: float | None = None
        self.snapshot: Snapshot | None = None
        self.pruned_at: int | None = None
        self.stopped = False

    def note(self, metrics: Mapping[str, Any]) -> bool:
        """Take in what validation gave, and return whether it gave the monitored metric.

        Raises:
            AccelError: The monitored metric is not among it.
        """
        if self.monitor not in metrics:
            raise AccelError(
                f"`monitor` names no metric that validation logs: {self.monitor!r}",
                ", ".join(sorted(metrics)) or "no metric at all",
                "log it in `validation_step`, or name another",
            )
        value = metrics[self.monitor]
        if value is self.seen:
            return False  # left over from an earlier validation
        self.seen, self.latest = value, float(value)
        if self.follows_best and (self.baseline is None or self._drop() < 0):
            self.baseline = self.latest if math.isfinite(self.latest) else self.baseline
        return True

    def require_value(self) -> None:
        """Raise unless there is a value to compare with."""
        if self.latest is None and self.baseline is None:
            raise AccelError(
                f"`{self.monitor}` has no value from before the first prune",
                "no validation in this fit so far",
                "validate earlier, or prune later",
            )
        known = self.latest if self.baseline is None else self.baseline
        if known is None or not math.isfinite(known):
            raise AccelError(
                f"`{self.monitor}` is no number before the first prune, and nothing can be compared with it",
                str(known),
                "prune later, or name another metric",
            )

    def begin(self, *, epoch: int, snapshot: Snapshot | None) -> None:
        """Open the verdict on a prune before `epoch`; the first sets the value to compare with."""
        if self.first is None:
            self.first = self.latest
        if self.baseline is None:
            self.baseline = self.latest
        self.latest, self.snapshot, self.pruned_at = None, snapshot, epoch

    def verdict(self, *, epoch: int, final: bool = False) -> str:
        """Return "go" (no verdict is open, or within the budget), "wait" or "back".

        Args:
            epoch: Epochs that are done.
            final: There will be no other validation.
        """
        if self.pruned_at is None or self.is_within():
            return "go"
        unjudged = self.latest is None or epoch - self.pruned_at < self.patience
        return "wait" if unjudged and not final else "back"

    def is_within(self) -> bool:
        """Whether the last validated value is within the budget; without one it is not."""
        if self.latest is None or self.baseline is None or not math.isfinite(self.latest):
            return False
        return self._drop() <= self.max_drop + _ROUNDING * max(1.0, abs(self.baseline))

    def ends_outside(self) -> bool:
        """Whether the network that is left has been validated, after its prune had passed, beyond the budget."""
        open_or_unknown = self.pruned_at is not None or self.first is None or self.latest is None
        return not open_or_unknown and not self.is_within()

    def _drop(self) -> float:
        assert self.latest is not None and self.baseline is not None
        return self.baseline - self.latest if self.mode == "max" else self.latest - self.baseline

    def close(self, *, stopped: bool) -> None:
        """End the verdict; after `stopped` nothing is pruned any more."""
        self.snapshot, self.pruned_at, self.metrics = None, None, {}
        self.stopped = self.stopped or stopped

    def describe(self) -> str:
        """Write what the verdict rests on."""
        now = "not validated since" if self.latest is None else f"{self.latest:.4g}"
        when = "at best so far" if self.follows_best else "before the first prune"
        return f"`{self.monitor}` {now}, {self.baseline:.4g} {when}"

    def state_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint, the snapshot included."""
        return {
            "baseline": self.baseline,
            "first": self.first,
            "metrics": {name: float(value) for name, value in self.metrics.items()},
            "latest": self.latest,
            "pruned_at": self.pruned_at,
            "stopped": self.stopped,
            "snapshot": self.snapshot.to_dict() if self.snapshot else None,
        }

    def load_state_dict(self, plain: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.baseline, self.latest = plain["baseline"], plain["latest"]
        self.first = plain.get("first", self.baseline)
        self.metrics = dict(plain.get("metrics", {}))
        self.pruned_at, self.stopped = plain["pruned_at"], plain["stopped"]
        self.snapshot = Snapshot.from_dict(plain["snapshot"]) if plain["snapshot"] else None


def rollback(
    *,
    max_drop: Any,
    monitor: Any,
    mode: Any,
    patience: Any,
    when: Sequence[float],
    follows_best: bool = False,
) -> Rollback | None:
    """Check the arguments and return a guard, or `None` without a budget."""
    if max_drop is None and monitor is None:
        return None
    if max_drop is None or monitor is None:
        raise ValueError(
            explain(
                "an accuracy guard needs a metric and how much worse it may get",
                f"max_drop={max_drop!r}, monitor={monitor!r}",
                "pass max_drop=0.01, monitor='val_acc', say",
            )
        )
    finite("max_drop", max_drop, least=0.0, do="pass how much worse `monitor` may get, 0.01 say")
    text("monitor", monitor, do="pass the name of a metric that is logged, 'val_acc' say")
    one_of("mode", mode, MODES)
    if mode == "max" and _LOWER_IS_BETTER.search(monitor):
        raise ValueError(
            explain(
                f"with mode='max' a higher `{monitor}` would be better",
                "a name of what should be low",
                "pass mode='min'",
            )
        )
    whole("patience", patience, do="pass a number of epochs, such as 1")
    if when[0] == 0:
        raise ValueError(
            explain(
                "`max_drop` compares with the network before the first prune",
                "a prune before epoch 0, and so before any validation",
                "let `when` begin with 1 or later",
            )
        )
    how: dict[str, Any] = {"mode": mode, "patience": patience, "follows_best": follows_best}
    return Rollback(max_drop=float(max_drop), monitor=monitor, **how)
