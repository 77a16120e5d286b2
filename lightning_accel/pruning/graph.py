"""Which channels hang together, by torch-pruning's autograd trace, and what removing them cuts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_accel.errors import NoEffect
from lightning_accel.pruning.importance import score
from lightning_accel.pruning.probes import Probes
from lightning_accel.pruning.selection import kept_width, least
from lightning_accel.pruning.trace import ROOTS, trace
from lightning_accel.surgery import Change, Cut, Select, Structure
from lightning_accel.surgery.call import Call

_AS_IT_IS = Structure()


class Group(NamedTuple):
    """Channels that can only go together: `root` is a layer, `layers` all whose outputs shrink."""

    root: str
    layers: tuple[str, ...]
    items: Any
    blocks: int
    scores: Tensor


class Graph:
    """The prunable groups of one network.

    Args:
        model: A twin; it is put into eval mode and must not be used for anything else.
        calls: Example calls, small ones; the channels are found by tracing them.
        select: Every layer whose outputs shrink must be among these.
        importance: See `importance.KNOWN`.
        frozen: Names of parameters that must not be touched.
        dense: Shapes before an earlier cut, of which shares are meant.

    Raises:
        AccelError: The calls fail, or their outputs do not depend on the parameters.
        NoEffect: There is no group at all.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: Sequence[Call],
        *,
        select: Select,
        importance: str,
        frozen: frozenset[str] = frozenset(),
        dense: Structure = _AS_IT_IS,
    ) -> None:
        self.model = model.eval()
        self.names = {module: name for name, module in model.named_modules()}
        self.frozen = frozen
        self.dense = dense
        self.skipped: list[Change] = []
        self._dependencies, outputs = trace(model, calls, self.names)
        self.groups = list(self._find(select, importance, outputs))
        self.skipped += self._idle()
        if not self.groups:
            reasons = "; ".join(f"{c.name}: {c.what}" for c in self.skipped[:4])
            raise NoEffect(
                "no layer can be pruned",
                reasons or f"no convolution or linear layer in {type(model).__name__}",
                "widen `select`, or unfreeze the layers to prune",
            )

    def cut(
        self, ratio: float, *, round_to: int | None, groups: Sequence[Group] | None = None
    ) -> Cut:
        """Return the cut after which this share of each group's dense channels is gone."""
        probes = Probes(self.model, self.names)
        for group in self.groups if groups is None else groups:
            dense = self.dense.tensors.get(f"{group.root}.weight".lstrip("."))
            dim = 1 if getattr(self.model.get_submodule(group.root), "transposed", False) else 0
            width = dense[dim] if dense else len(group.scores)
            kept = kept_width(width, ratio=ratio, blocks=group.blocks, round_to=round_to)
            gone = least(group.scores, kept=kept, blocks=group.blocks)
            if gone:
                root = group.items[0].dep
                part = self._dependencies.get_pruning_group(root.target.module, root.handler, gone)
                probes.prune(part, self._dependencies)
        return probes.cut()

    def _idle(self) -> Iterator[Change]:
        inside = {
            c for m in self.names if isinstance(m, nn.MultiheadAttention) for c in m.modules()
        }
        for module, name in self.names.items():
            if isinstance(module, ROOTS) and module not in {
                *self._dependencies.module2node,
                *inside,
            }:
                yield Change(name, "it never ran on the example")

    def _find(self, select: Select, importance: str, outputs: set[nn.Module]) -> Iterator[Group]:
        chosen = set(select.require(self.model))
        seen: set[nn.Module] = set()
        for module in list(self._dependencies.module2node):
            if module in seen or not isinstance(module, ROOTS) or module not in self.names:
                continue
            try:
                items, shrinking = self._group_of(module)
                seen |= shrinking
                reason = self._refusal(shrinking, items, chosen, outputs)
                if not reason:
                    layers = tuple(self.names[m] for m in self.names if m in shrinking)
                    scores = score(items, importance)
                    yield Group(self.names[module], layers, items, _blocks(items), scores)
                    continue
            except (IndexError, KeyError, TypeError, ValueError, AssertionError, RuntimeError) as e:
                reason = f"torch-pruning cannot handle it ({type(e).__name__}: {e})"
            if reason != _UNSELECTED:
                self.skipped.append(Change(self.names[module], reason))

    def _group_of(self, module: nn.Module) -> tuple[Any, set[nn.Module]]:
        pruner = self._dependencies.get_pruner_of_module(module)
        width = pruner.get_out_channels(module)
        items = self._dependencies.get_pruning_group(
            module, pruner.prune_out_channels, list(range(width))
        )
        shrinking = {
            dep.target.module
            for dep, _ in items
            if self._dependencies.is_out_channel_pruning_fn(dep.handler)
            and isinstance(dep.target.module, ROOTS)
        }
        return items, shrinking | {module}

    def _refusal(
        self, shrinking: set[nn.Module], items: Any, chosen: set[str], outputs: set[nn.Module]
    ) -> str:
        if shrinking & outputs:
            return "it makes the network's output"
        if not any(self.names[m] in chosen for m in shrinking):
            return _UNSELECTED
        for module in shrinking:
            if self.names[module] not in chosen:
                return f"it hangs together with `{self.names[module]}`, which is not selected"
        for dep, _ in items:
            module = dep.target.module
            if module in self.names:
                for leaf, _ in module.named_parameters():
                    name = f"{self.names[module]}.{leaf}".lstrip(".")
                    if name in self.frozen:
                        return f"`{name}` is frozen"
            elif isinstance(module, nn.Parameter):
                name = self._dependencies._param_to_name.get(module, "")
                if name in self.frozen:
                    return f"`{name}` is frozen"
        return ""


_UNSELECTED = "it is not selected"


def _blocks(items: Any) -> int:
    sizes = [1]
    for dep, _ in items:
        module = dep.target.module
        groups = getattr(module, "groups", 1) if isinstance(module, ROOTS[:-1]) else 1
        if groups > 1 and groups != module.out_channels:
            sizes.append(groups)
        if isinstance(module, nn.GroupNorm):
            sizes.append(module.num_groups)
    blocks = math.lcm(*sizes)
    if len(items[0].idxs) % blocks:
        raise ValueError(
            f"its {len(items[0].idxs)} channels do not fall into {blocks} equal blocks"
        )
    return blocks
