"""The order in which the units of every group go, and the last word on which of them go together."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_accel.pruning import activations, reconstruction
from lightning_accel.pruning import importance as scoring
from lightning_accel.pruning.graph import Graph, RemovedUnits
from lightning_accel.pruning.importance import Importance
from lightning_accel.pruning.reconstruction import Reconstruction, Selector
from lightning_accel.pruning.weighing import weighed
from lightning_accel.surgery import Change
from lightning_accel.surgery.call import Call


class Ranking:
    """Scores for every group that can be ranked.

    `Reconstruction` chooses units together: its scores say in which order they go one by one, and
    `refined` lets its selector choose as many of them at once. A group whose consumers it cannot read is
    ranked by magnitude where groups are not compared ("local"), and left alone where they are.

    Args:
        graph: The groups.
        importance: What makes a unit matter.
        scope: See `selection.choose`.
        batches: The calls of each calibration batch, for what measures.
        statistics: What has been measured already.

    Attributes:
        scores: One per unit, by name of the group; the least go first.
        refused: Groups that cannot be ranked, with the reason.
    """

    def __init__(
        self,
        graph: Graph,
        importance: Importance,
        *,
        scope: str,
        batches: Sequence[Sequence[Call]],
        statistics: activations.Statistics | None = None,
    ) -> None:
        self.scores: dict[str, Tensor] = {}
        self.refused: list[Change] = []
        self._grams: dict[str, Tensor] = {}
        self._select: Selector = reconstruction.GreedySwapSelector()
        fallback = importance
        if importance == "reconstruction" or isinstance(importance, Reconstruction):
            if isinstance(importance, Reconstruction):
                self._select = importance.selector
            self._grams = reconstruction.grams(graph.model, graph.groups, batches).of
            fallback = "magnitude"
        if importance == "activation" and statistics is None:
            statistics = activations.collect(graph.model, graph.groups, batches)
        for group in graph.groups:
            gram = self._grams.get(group.name)
            try:
                if gram is not None:
                    self.scores[group.name] = reconstruction.costs(gram)
                elif fallback is not importance and scope != "local":
                    raise ValueError("no layer that reads it shows what its removal costs")
                else:
                    self.scores[group.name] = scoring.score(
                        graph.model, group, fallback, statistics=statistics
                    )
            except ValueError as error:
                self.refused.append(Change(group.name, str(error)))

        if scope == "sensitivity" and self.scores:
            self.scores = weighed(graph, self.scores, batches)

    def refined(self, gone: RemovedUnits) -> dict[str, list[int]]:
        """Return as many units per group, chosen together where that is possible."""
        return {
            name: self._select(self._grams[name], len(units))
            if name in self._grams
            else list(units)
            for name, units in gone.items()
        }
