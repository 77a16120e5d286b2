"""Values that an exported graph of integers rounds twice, rounded once.

Nothing of what is computed changes: integers read back and rounded again on the same grid are themselves, and the largest
of rounded values is the largest one rounded. Compilers keep integers between layers then, and read them once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

_MAXIMA = (
    torch.ops.aten.max_pool1d.default,
    torch.ops.aten.max_pool2d.default,
    torch.ops.aten.max_pool3d.default,
)
_MAYBE_VIEWS = ("reshape", "flatten", "contiguous", "to", "dropout")
"""Operators that may give their input itself, and whose schemas do not say so."""


def merge_roundings(graph: GraphModule) -> int:
    """Round each value once where several readers round it alike, and before a maximum instead of behind it; return how often.

    Args:
        graph: What `torch.export.export(...).module()` gives for a lowered network.
    """
    whole, read = _roundings()
    merged = _round_before_maxima(graph)
    writes = _writes(graph)
    place = {node: index for index, node in enumerate(graph.graph.nodes)}
    seen: dict[tuple[Any, ...], Node] = {}
    for node in [n for n in graph.graph.nodes if n.target in (whole, read)]:
        source: Any = node.args[0]
        if node.target is read and node in writes:
            continue
        key = (node.target, *node.args)
        same = seen.setdefault(key, node)
        if any(place[same] < at < place[node] for at in writes.get(_root(source), ())):
            same = seen[key] = node
        if node.target is whole and source.target is read and source not in writes:
            same = source.args[0] if source.args[1:] == node.args[1:] else same
        if same is not node:
            node.replace_all_uses_with(same)
            graph.graph.erase_node(node)
            merged += 1
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return merged


def _roundings() -> tuple[Any, Any]:
    ops = torch.ops.quantized_decomposed
    return ops.quantize_per_tensor.default, ops.dequantize_per_tensor.default


def _round_before_maxima(graph: GraphModule) -> int:
    """Round what comes into a max-pool whose readers all round its output in the same way."""
    whole, read = _roundings()
    moved = 0
    for pool in [n for n in graph.graph.nodes if n.target in _MAXIMA]:
        grids = {user.args[1:] if user.target is whole else () for user in pool.users}
        if len(grids) != 1 or () in grids:
            continue
        (how,) = grids
        with graph.graph.inserting_before(pool):
            integers = graph.graph.call_function(whole, (pool.args[0], *how))
            values = graph.graph.call_function(read, (integers, *how))
        pool.replace_input_with(pool.args[0], values)
        moved += 1
    return moved


def _writes(graph: GraphModule) -> dict[Node, list[int]]:
    """Return where each tensor is changed in place, by the node that made it."""
    found: dict[Node, list[int]] = {}
    for index, node in enumerate(graph.graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        for argument, given in zip(schema.arguments, node.args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(given, Node):
                found.setdefault(_root(given), []).append(index)
    return found


def _root(node: Any) -> Any:
    """Return the node that made the memory of a tensor."""
    while isinstance(node, Node) and node.args and isinstance(node.args[0], Node):
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.returns:
            break
        name = str(schema.name).rpartition("::")[2]
        if schema.returns[0].alias_info is None and name not in _MAYBE_VIEWS:
            break
        node = node.args[0]
    return node
