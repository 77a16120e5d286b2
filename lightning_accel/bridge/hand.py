"""Work that needs a batch of a fit, done with the fit's own where the data can be read only once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer

from lightning_accel.bridge.data import ReadOnce, batches
from lightning_accel.bridge.example import AtHand


class Hand:
    """The batch that a fit is at, and the work that waits for the next one.

    >>> hand, done = Hand(), []
    >>> hand.do(done.append)  # data that can be read at any time
    >>> def once(at_hand):
    ...     if at_hand is None:
    ...         raise ReadOnce("a stream")
    ...     done.append(at_hand)
    >>> hand.do(once)
    >>> hand.take("the first batch")
    >>> done
    [None, AtHand(batch='the first batch')]
    """

    def __init__(self) -> None:
        self._batch: AtHand | None = None
        self._waiting: list[Callable[[AtHand | None], None]] = []

    def do(self, work: Callable[[AtHand | None], None]) -> None:
        """Work at once; where that would take a batch away from the fit, with the fit's next one.

        Args:
            work: Gets the batch that the fit is at, if any. It reads before it changes anything.
        """
        try:
            work(self._batch)
        except ReadOnce:
            if self._batch is not None:
                raise
            self._waiting.append(work)

    def take(self, batch: Any) -> None:
        """Note the batch of a step that begins, in place and through all hooks, and do what waits for it."""
        self._batch = AtHand(batch)
        waiting, self._waiting = self._waiting, []
        for work in waiting:
            work(self._batch)

    def drop(self) -> None:
        """Let go of the batch of a step that has ended."""
        self._batch = None

    def clear(self) -> None:
        """Let go of all."""
        self._batch, self._waiting = None, []


def reads_once(trainer: Trainer) -> bool:
    """Tell whether the training data can be read only once, and so by the fit alone."""
    try:
        batches(trainer, 1)
    except ReadOnce:
        return True
    except Exception:  # whatever a user's data raise, the fit itself will say it
        return False
    return False
