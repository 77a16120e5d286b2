"""Which residual blocks go, and how much of the width with them.

A block costs its share of the time at any batch size, while narrow layers are no faster where a device waits for
launches and memory. What a block is worth is measured: the change of the network's outputs on calibration data when
it is bypassed (`leftover`), with all that went before it (`order`). The next to go is that which leaves least error
for what it saves.

With width, the two are weighed by trying: for several numbers of blocks the rest is cut in width to the same target,
and the whole that leaves least error on the same data is taken.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from torch import nn

from lightning_accel.errors import AccelError, BrokenModel, NoEffect
from lightning_accel.pruning.blocks import Block, Blocks, cut_of, find_blocks
from lightning_accel.pruning.halving import sound
from lightning_accel.pruning.leftover import Leftover
from lightning_accel.pruning.order import BlockOrder
from lightning_accel.pruning.request import Occasion, Request
from lightning_accel.pruning.subject import Subject
from lightning_accel.pruning.target import Target
from lightning_accel.pruning.verify import why_broken
from lightning_accel.surgery import Change, Cut, twin
from lightning_accel.surgery.bypass import bypass, removed_blocks
from lightning_accel.surgery.call import Call

_TRIES = 5  # numbers of blocks that are weighed against width

Width = Callable[[nn.Module, Target | None], Cut]
"""Plans a cut in width of a network, for a target."""


class _Asked(NamedTuple):
    """What is to be reached, by blocks only or with width; and until when to try."""

    request: Request
    occasion: Occasion
    width: Width | None
    until: float


def plan_depth(
    subject: Subject,
    request: Request,
    occasion: Occasion,
    data: Sequence[Sequence[Call]],
    *,
    width: Width | None,
    until: float,
) -> Cut:
    """Return the proved cut of whole blocks, alone or with width; change nothing.

    Args:
        subject: The network and its calls.
        request: What is asked; its target knows the calls.
        occasion: What else the plan is made from. With batches, norms get new statistics after the cut.
        data: Calls to measure on.
        width: Plans the width of a copy that has lost blocks, for a target; `None` where only blocks go.
        until: When to stop trying, by the monotonic clock.

    Raises:
        NoEffect: No block can go, or the target is out of reach.
        BrokenModel: The blocks that were chosen fail the proof together.
    """
    asked = _Asked(request, occasion, width, until)
    model, network, calls = subject.users, subject.network, subject.calls
    verifier, training = subject.verifier, subject.training
    before = [
        n for n in removed_blocks(network) if asked.occasion.dense.bypassed.get(n, "") is None
    ]
    blocks = _proved(subject, asked)
    if not blocks.found:
        if removed_blocks(network) and asked.width is not None:
            return asked.width(network, asked.request.target)
        if removed_blocks(network) and not asked.occasion.thorough:
            return Cut()
        listed = "; ".join(f"`{c.name}`: {c.what}" for c in blocks.refused[:4])
        raise NoEffect(
            "no whole block can go",
            listed
            or f"no module of {type(model).__name__} that hands on what it gets beside a branch",
            "leave `depth` out, widen `select`, or unfreeze the blocks",
        )
    leftover = Leftover(network, data, renews=bool(occasion.batches))
    if not hasattr(asked.request.target, "batch_size"):
        calls = verifier.calls  # shares of arithmetic are those of a few samples
    order = BlockOrder(network, blocks.found, leftover, asked.request.target, calls, asked.until)
    if asked.request.ratio is not None:
        cut = _of_share(network, order, len(before), asked)
    else:
        assert asked.request.target is not None
        cut = _Mix(network, calls, order, asked.request.target, asked).cut()
    chosen = dataclasses.replace(cut_of(network, []), bypassed=cut.bypassed)
    reason = why_broken(verifier, training, lambda: chosen)
    if reason or not verifier.holds_elsewhere(chosen):
        raise BrokenModel(
            "the blocks that were chosen cannot go together",
            reason or "the network is another one at another size of its input",
            "name the blocks that may go by `select`; the network is as it was",
        )
    notes = (*cut.notes, *_fewer_recorded(network, len(cut.bypassed)))
    return dataclasses.replace(cut, skipped=(*blocks.refused, *cut.skipped), notes=notes)


def _proved(subject: Subject, asked: _Asked) -> Blocks:
    """Return the blocks that can go, all at once, by the proof."""
    network, verifier, training = subject.network, subject.verifier, subject.training
    found, refused = find_blocks(
        subject.users, verifier.settings, select=asked.request.select, tolerance=verifier.tolerance
    )

    def failure(some: Sequence[Block]) -> str:
        return why_broken(verifier, training, partial(cut_of, network, some))

    for _ in range(3):
        if not found:
            break
        found, wrong = sound(found, failure, mend=lambda _: False, until=asked.until)
        refused += [Change(block.name, why) for block, why in wrong]
        cut = cut_of(network, found)
        if not found or (verifier.holds_elsewhere(cut) and training.holds_in_steps(cut)):
            break
    return Blocks(found, refused)


class _Tried(NamedTuple):
    cut: Cut
    error: float
    kept: float


class _Mix:
    """Weighs blocks against width at one target."""

    def __init__(
        self,
        network: nn.Module,
        calls: Sequence[Call],
        order: BlockOrder,
        target: Target,
        asked: _Asked,
    ) -> None:
        self._network = network
        self._calls = calls
        self._order = order
        self._target = target
        self._asked = asked
        self._tried: dict[int, _Tried | None] = {}
        self._whys: list[str] = []

    def cut(self) -> Cut:
        most = self._most()
        if self._asked.width is None:
            return self._noted(most, self._trimmed(most))
        wanted = [most, 0, most // 2] if self._asked.occasion.thorough else [most, 0]
        for count in dict.fromkeys(wanted):
            self._try(count)
            if not self._asked.occasion.thorough and self._tried[count] is not None:
                break
        while self._asked.occasion.thorough and len(self._tried) < _TRIES:
            nearer = self._between()
            if nearer is None or time.monotonic() > self._asked.until:
                break
            self._try(nearer)
        able = {count: tried for count, tried in self._tried.items() if tried is not None}
        if not able:
            raise self._unreachable(most)
        best = min(able, key=lambda count: (able[count].error, count))
        return self._noted(best, able[best])

    def _most(self) -> int:
        """Return how many blocks reach the target alone, or how many there are."""
        slack = getattr(self._target, "tolerance", 0.0)
        for count in range(1, len(self._order.blocks) + 1):
            some = self._order.first(count)
            if len(some) < count:
                return len(some)
            near = 1 - self._order.saved(some) <= 1.1 * self._target.share + 0.02
            if near and self._kept(cut_of(self._network, some)) <= self._target.share * (1 + slack):
                return count
        return len(self._order.blocks)

    def _trimmed(self, count: int) -> _Tried:
        """Return what blocks alone leave, after giving back what is not needed."""
        some = self._order.first(count)
        share = self._target.share * (1 + getattr(self._target, "tolerance", 0.0))
        kept = self._kept(cut_of(self._network, some))
        if kept > share:
            raise self._unreachable(count)
        for block in list(some[:-1]) if not self._target.is_measured else ():
            fewer = [b for b in some if b is not block]
            if 1 - self._order.saved(fewer) <= share + 0.02:
                tried = self._kept(cut_of(self._network, fewer))
                if tried <= share and self._order.error(fewer) <= self._order.error(some):
                    some, kept = fewer, tried
        return _Tried(cut_of(self._network, some), self._order.error(some), kept)

    def _try(self, count: int) -> None:
        """Cut the width of what is left without so many blocks, and measure what that leaves."""
        if count in self._tried:
            return
        assert self._asked.width is not None
        some = self._order.first(count)
        cut = cut_of(self._network, some) if some else Cut()
        less = twin(self._network)
        bypass(less, cut.bypassed)
        kept = self._kept(cut) if some else 1.0
        self._tried[count] = None
        try:
            if kept > self._target.share:
                width = self._asked.width(less, self._target.of_rest(self._target.share / kept))
                cut = joined(cut, width)
                kept = self._kept(cut)
        except (NoEffect, BrokenModel) as error:
            self._whys.append(f"without {len(some)} blocks: {error}")
            return
        made = twin(self._network)
        cut.apply(made)
        self._tried[count] = _Tried(cut, self._order.leftover.of(made), kept)

    def _between(self) -> int | None:
        """Return a number of blocks beside the best one that was not tried yet."""
        errors = {count: tried.error for count, tried in self._tried.items() if tried is not None}
        known = sorted(self._tried)
        if not errors:
            return None
        best = known.index(min(errors, key=lambda count: (errors[count], count)))
        sides = [known[i : i + 2] for i in (best - 1, best) if 0 <= i < len(known) - 1]
        widest = max(sides, key=lambda side: side[1] - side[0], default=[0, 0])
        return sum(widest) // 2 if widest[1] - widest[0] > 1 else None

    def _kept(self, cut: Cut) -> float:
        after = twin(self._network)
        cut.apply(after)
        return self._target.compared(self._network, after, self._calls)

    def _unreachable(self, count: int) -> AccelError:
        some = self._order.first(len(self._order.blocks))
        least = self._kept(cut_of(self._network, some))
        listed = "; ".join(self._whys[:2])
        return NoEffect(
            f"the network cannot be pruned to {self._target.share:.0%} of its {self._target.unit}",
            f"{least:.0%} remain without all {len(some)} blocks that can go"
            + (f"; {listed}" if listed else ""),
            "raise the share of the target, or widen `select`"
            + (
                "" if self._asked.width is not None else ", or let width go as well with depth=True"
            ),
        )

    def _noted(self, count: int, tried: _Tried) -> Cut:
        device = next(self._network.parameters()).device
        names = ", ".join(f"`{name}`" for name in tried.cut.bypassed)
        others = [f"{self._tried_error(n)} without {n}" for n in sorted(self._tried) if n != count]
        note = (
            f"{len(tried.cut.bypassed)} of {len(self._order.blocks)} blocks that can go are gone"
            + (f" ({names})" if names else "")
            + f": the outputs change by {tried.error:.1%}"
            + (f" ({', '.join(others)})" if others else "")
        )
        says = self._target.describe(tried.kept, device)
        return dataclasses.replace(tried.cut, notes=(note, says, *tried.cut.notes))

    def _tried_error(self, count: int) -> str:
        tried = self._tried[count]
        return "out of reach" if tried is None else f"{tried.error:.1%}"


def _fewer_recorded(network: nn.Module, count: int) -> list[str]:
    """Say where a network collects outputs layer by layer, by their class: those that are gone are missing."""
    whose = {type(m).__name__ for m in network.modules() if getattr(m, "_can_record_outputs", None)}
    many = f"{count} fewer of its layers' outputs (`output_hidden_states`) than before"
    return [f"`{name}` gives {many}" for name in sorted(whose)] if count else []


def joined(blocks: Cut, width: Cut) -> Cut:
    """Return a cut of whole blocks and of the width of what is left.

    Its notes are those of the width but the first, which says what it reached of what was left.
    """
    return dataclasses.replace(
        width,
        bypassed=blocks.bypassed,
        before=blocks.before.updated(width.before),
        notes=width.notes[1:],
    )


def _of_share(network: nn.Module, order: BlockOrder, before: int, asked: _Asked) -> Cut:
    assert asked.request.ratio is not None
    total = len(order.blocks) + before
    count = math.floor(total * asked.request.ratio + 1e-6) - before
    count = count if asked.occasion.thorough else max(count, 1)
    if count < 1:
        raise NoEffect(
            "what is asked for removes no block",
            f"{asked.request.ratio:.0%} of {total} blocks that can go, of which {before} are gone",
            "raise `ratio`",
        )
    some = order.first(count)
    cut = cut_of(network, some)
    names = ", ".join(f"`{name}`" for name in cut.bypassed)
    note = f"{len(some) + before} of {total} blocks that can go are gone ({names}): the outputs change by {order.error(some):.1%}"
    return dataclasses.replace(cut, notes=(note,))
