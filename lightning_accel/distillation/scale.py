"""How often a user's criterion counts in the loss that goes to `manual_backward`.

Who accumulates by hand gives `loss / 4`, others `0.1 * loss` or a sum of which the criterion is a part. The losses of
distillation stand beside the criterion, as in their papers, so what is done to it is done to them. How much that is says
the gradient of the loss with respect to the criterion's result. The criterion is heard in the first step; how one gets to
it through the graph of the loss is kept and gone again at each step, so that nobody has to listen any more and nothing
below it is computed. Where a criterion gives a value for each position, these are means of some kind: what a mean over
the positions that count is multiplied by is the sum of their gradients.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_accel.distillation.criterion import SOFTMAX, Heard
from lightning_accel.distillation.steps import depends_on
from lightning_accel.surgery.call import tensors

_MAX_NODES = 10_000  # nodes that are looked at on the way to a criterion
_CLOSE = 1e-3
_COMPILED = (
    "CompiledFunction"  # a criterion of the user's that was heard as it ran without its code
)
_SCALES = ("DivBackward0", "MulBackward0")


class GraphPath(NamedTuple):
    """How one gets from a loss to a criterion's result: names of nodes, and which of their inputs is next."""

    turns: tuple[tuple[str, int], ...]
    end: str

    @classmethod
    def find(cls, loss: Tensor, result: Tensor) -> GraphPath | None:
        """Return the shortest one, `None` where the loss does not hang on the result."""
        end: Any = result.grad_fn
        ahead: deque[tuple[Any, tuple[tuple[str, int], ...]]] = deque([(loss.grad_fn, ())])
        seen: set[Any] = {loss.grad_fn}
        while ahead and len(seen) < _MAX_NODES:
            node, turns = ahead.popleft()
            if node is end:
                return cls(turns, node.name())
            for index, (following, _) in enumerate(node.next_functions):
                if following is not None and following not in seen:
                    seen.add(following)
                    ahead.append((following, (*turns, (node.name(), index))))
        return None

    def follow(self, loss: Tensor) -> GradientEdge | None:
        """Return the criterion's result in the graph of another loss, `None` where that is built otherwise."""
        node: Any = loss.grad_fn
        at = 0
        for name, index in self.turns:
            if node is None or node.name() != name or index >= len(node.next_functions):
                return None
            node, at = node.next_functions[index]
        if node is None or not (node.name() == self.end or node.name().startswith(_COMPILED)):
            return None
        return GradientEdge(node, at)


class Count(NamedTuple):
    """How the gradient at a criterion's result becomes a factor.

    A result for each position was summed up by hand, and so may have been divided by the number of positions, by
    that of rows, or by none: the first of them that leaves no more than one is taken for it.
    """

    way: GraphPath
    times: str
    """Whether it is multiplied by the number of "positions" or of "rows", or by "one"."""
    summed: bool
    """Whether torch took the sum over the positions."""
    logs: int | None = None
    """The dimension of the classes, where the result is log-probabilities and its negative is the loss."""

    @classmethod
    def learn(cls, loss: Tensor, heard: Heard) -> Count | None:
        """Return it for a criterion, `None` where the loss does not hang on it, or on positions in proportions."""
        result = heard.result
        way = None if result is None else GraphPath.find(loss, result)
        if way is None or result is None:
            return None
        made = cls(way, "one", heard.summed, heard.dim if heard.logs else None)
        edge = way.follow(loss)
        given = made.weights(_gradient(loss, edge))
        if given is None or not (result.dim() or heard.summed):
            return made if given is not None else None
        nonzero = given[given != 0]
        if not len(nonzero) or bool((nonzero - nonzero[0]).abs().max() > _CLOSE * nonzero[0].abs()):
            return None
        found = (made._replace(times=times) for times in ("positions", "rows", "one"))
        return next((one for one in found if bool(one.of(given, edge).abs() <= 1 + _CLOSE)), made)

    def find(self, loss: Tensor) -> Tensor | None:
        """Return the factor in a loss, `None` where that is built otherwise than the first."""
        edge = self.way.follow(loss)
        given = self.weights(_gradient(loss, edge))
        return None if given is None else self.of(given, edge)

    def weights(self, gradient: Tensor | None) -> Tensor | None:
        """Return how much each position's loss counts, by the gradient at the result."""
        return gradient if gradient is None or self.logs is None else -gradient.sum(self.logs)

    def of(self, gradient: Tensor, edge: GradientEdge | None) -> Tensor:
        """Return the factor.

        Args:
            gradient: Of the loss at the criterion's result, see `weights`.
            edge: The result in the graph, where the criterion knows how many positions it summed up.
        """
        each = gradient
        if gradient.dim():  # of positions that count, all alike
            each = gradient.sum() / (gradient != 0).sum().clamp(min=1)
        if self.times == "one":
            return each
        if self.summed:
            positions, rows = _summed(None if edge is None else edge.node)
            return each * (rows if self.times == "rows" else positions)
        if self.times == "rows":
            return each * len(gradient)
        is_mean = any(name.startswith("MeanBackward") for name, _ in self.way.turns)
        return each * gradient.numel() if is_mean else gradient.sum()


class Scale:
    """What the losses of distillation are multiplied by, loss after loss.

    Args:
        counts: Of the criteria that tell it.
        own: Whether the student's output holds the criterion's result itself, as in transformers.
        adds: Whether several criteria are parts of one, as in mixup, or each is a whole.
    """

    def __init__(
        self, counts: Sequence[Count] = (), *, own: bool = False, adds: bool = True
    ) -> None:
        self._counts, self._own, self._adds = tuple(counts), own, adds

    @classmethod
    def learn(
        cls, loss: Tensor, outputs: Sequence[Any], heard: Sequence[Heard], kinds: frozenset[str]
    ) -> Scale:
        """Return how it is told, from the first loss and what was heard on the way to it.

        Args:
            loss: As it was given to `manual_backward`.
            outputs: The student's.
            heard: The criteria that were called.
            kinds: Of those that the losses of distillation stand beside; empty for any.

        >>> from lightning_accel.distillation.criterion import Listener
        >>> logits = torch.zeros(2, 3, requires_grad=True) * 1.0
        >>> with Listener() as listener:
        ...     loss = -logits.log_softmax(1)[:, 0].mean() / 4
        >>> Scale.learn(loss, [logits], listener.calls, frozenset())(loss, [logits])
        tensor(0.2500)
        """
        if loss.numel() != 1 or loss.grad_fn is None:
            return cls()
        own = [_gradient(loss, t) for t in _own_losses(loss, outputs)]
        if own:
            return cls(
                own=True, adds=abs(sum(float(g) for g in own if g is not None)) <= 1 + _CLOSE
            )
        learnt = [
            (one.kind, count)
            for one in heard
            if one.judges and any(depends_on(one.result, output) for output in outputs)
            if (count := Count.learn(loss, one)) is not None
        ]
        judged = [pair for pair in learnt if pair[0] != SOFTMAX] or learnt
        chosen = [pair for pair in judged if pair[0] in kinds] or judged
        values = [float(made) for _, count in chosen if (made := count.find(loss)) is not None]
        if len({kind for kind, _ in chosen}) > 1 and max(values) - min(values) > _CLOSE:
            return cls()  # which of them the losses stand beside, nothing tells
        return cls([count for _, count in chosen], adds=abs(sum(values)) <= 1 + _CLOSE)

    @property
    def is_known(self) -> bool:
        """Whether a criterion was found."""
        return self._own or bool(self._counts)

    def __call__(self, loss: Tensor, outputs: Sequence[Any]) -> Tensor | None:
        """Return the factor, `None` where nothing tells it."""
        if loss.numel() != 1 or loss.grad_fn is None:
            return None
        if self._own:
            return self._together([_gradient(loss, t) for t in _own_losses(loss, outputs)])
        found = [count.find(loss) for count in self._counts]
        return self._anywhere(loss) if None in found else self._together(found)

    def _anywhere(self, loss: Tensor) -> Tensor | None:
        """Return the factor in a loss that is built otherwise than the first, by the criterion's name."""
        ends = {count.way.end: count for count in self._counts}
        name = next(iter(ends)) if len(ends) == 1 else ""
        if "Loss" not in name and "CrossEntropy" not in name:
            return None
        edges = [GradientEdge(node, 0) for node in _nodes(loss) if node.name() == name]
        return self._together(
            [ends[name].of(g, edge) for edge in edges if (g := _gradient(loss, edge)) is not None]
        )

    def _together(self, found: Sequence[Tensor | None]) -> Tensor | None:
        factors = [factor.detach() for factor in found if factor is not None]
        if len(factors) < 2:
            return factors[0].reshape(()) if factors else None
        stacked = torch.stack([factor.reshape(()) for factor in factors])
        return stacked.sum() if self._adds else stacked.max()


def outermost(loss: Tensor) -> float:
    """Return the number that a loss was multiplied or divided by last.

    >>> loss = torch.ones(2, requires_grad=True).sum()
    >>> outermost(loss / 4), outermost(0.5 * loss), outermost(loss)
    (0.25, 0.5, 1.0)
    """
    node: Any = loss.grad_fn
    if node is None or node.name() not in _SCALES:
        return 1.0
    sides = [GradientEdge(*side) for side in node.next_functions if side[0] is not None]
    if len(sides) != 1:
        return 1.0
    given = _gradient(loss, sides[0])
    return 1.0 if given is None or given.numel() != 1 else float(given)


def _summed(node: Any) -> tuple[Tensor | int, int]:
    """Return over how many positions, as a mean counts them, and over how many rows a criterion's sum is."""
    given = getattr(node, "_saved_self", None)
    shape = given.shape if given is not None else getattr(node, "_saved_self_sym_sizes", (1,))
    weight = getattr(node, "_saved_total_weight", None)  # of classes
    return (weight if isinstance(weight, Tensor) else math.prod(shape)), shape[0]


def _gradient(loss: Tensor, place: Any) -> Tensor | None:
    """Return the gradient of a loss at a tensor or an edge above the student's output."""
    if place is None:
        return None
    if place is loss or getattr(place, "node", None) is loss.grad_fn:
        return torch.ones_like(loss).detach()
    hooks = getattr(place, "_backward_hooks", None)
    if hooks or loss._backward_hooks:  # the user's, who would see another backward
        return None
    try:
        return torch.autograd.grad(loss, place, retain_graph=True, allow_unused=True)[0]
    except RuntimeError:  # the user has let go of the graph
        return None


def _own_losses(loss: Tensor, outputs: Sequence[Any]) -> list[Tensor]:
    """Return the loss in each of a student's outputs that another loss hangs on: `.loss`, or the only single number."""
    found = []
    for output in outputs:
        named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        within = [t for t in tensors(output) if not t.dim() and t.grad_fn is not None]
        own = [named] if isinstance(named, Tensor) else within
        if len(own) == 1 and not own[0].dim() and depends_on(loss, own[0]):
            found += own
    return found


def _nodes(loss: Tensor) -> Iterator[Any]:
    ahead: deque[Any] = deque([loss.grad_fn])
    seen = {loss.grad_fn}
    while ahead and len(seen) < _MAX_NODES:
        node = ahead.popleft()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                ahead.append(following)
