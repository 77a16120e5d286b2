"""All ranks leave together after a SIGTERM, and talk about it every some steps rather than every one.

With several processes Lightning 2.6 broadcasts before every batch whether rank 0 was told to stop, and reads
the answer, which drains the device's queue (Lightning #21487). It also broadcasts from within the signal
handler, which no other rank awaits, and leaves when a rank alone knows: gradients are then waited for that
never come. Here a signal only leaves a note; at a check, all ranks learn of any note, and all leave from
the same batch with whole weights, so that callbacks can still save a checkpoint together.

Between two checks lie at most `every` batches, and fewer where batches are slow: about `SECONDS`. The ranks
agree on that in the check itself: a single all-reduce of two numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

SECONDS = 5.0
"""How long a rank may keep a signal to itself; schedulers kill after about thirty."""


class Throttle:
    """What a training loop calls before each batch, and what the process calls on SIGTERM.

    Args:
        every: Batches between two checks at most.
        device: Where the process group of this rank reduces.
        leave: Called on every rank when any was signalled; raises to leave.
        kill: Passes the signal on to processes that this one launched.
        clock: Seconds, for tests.
    """

    def __init__(
        self,
        every: int,
        device: torch.device,
        *,
        leave: Callable[[], None],
        kill: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.every = every
        self.signalled = False
        self.num_checks = 0
        self._device = device
        self._leave = leave
        self._kill = kill
        self._clock = clock
        self._wait = 1
        self._batches = 0
        self._due = True
        self._since = clock()

    def batch(self) -> None:
        """Count a batch that is about to start, and check when it is time; the same on all ranks."""
        if (self._due or self._batches >= self._wait) and self.check():
            self._leave()
        self._batches += 1

    def soon(self) -> None:
        """Check before the next batch: something that may have taken long has ended on all ranks."""
        self._due = True

    def check(self) -> bool:
        """Tell whether any rank was signalled; all ranks call this together."""
        now = self._clock()
        wait = 1  # until it is known how long a batch takes
        if self._batches:
            wait = max(1, int(SECONDS * self._batches / max(now - self._since, 1e-9)))
        note = [int(self.signalled), -min(wait, self.every)]
        word = torch.tensor(note, device=self._device)
        distributed.all_reduce(word, op=distributed.ReduceOp.MAX)
        any_signalled, shortest = word.tolist()
        self._wait, self._since = -shortest, now
        self._batches, self._due = 0, False
        self.num_checks += 1
        return bool(any_signalled)

    def receive(self, signum: int, frame: Any) -> None:
        """Take a note of a SIGTERM, and pass it on once."""
        if not self.signalled:
            self.signalled = True
            self._kill(signum)
