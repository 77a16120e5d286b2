"""Batch norms taken into the integers' scales of the layers before them, in an exported graph.

A batch norm in eval mode is a factor and an offset per channel. Weights on a grid per output channel stay on one under
factors: their scales take them up, and their signs where factors are negative. The offset goes into the bias. So the
integer kernel gives what the norm gave, and the norm is gone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

_LAYERS = {
    torch.ops.aten.linear.default: 0,
    torch.ops.aten.conv1d.default: 0,
    torch.ops.aten.conv2d.default: 0,
    torch.ops.aten.conv3d.default: 0,
    torch.ops.aten.conv_transpose1d.default: 1,
    torch.ops.aten.conv_transpose2d.input: 1,
    torch.ops.aten.conv_transpose3d.input: 1,
}
"""Operators of layers, and the dimension of the output channels of their weights."""
_NORM = torch.ops.aten.batch_norm.default


def fold_norms(graph: GraphModule) -> int:
    """Take batch norms behind layers of integers into these, in place; return how many.

    Args:
        graph: What `torch.export.export(...).module()` gives for a lowered network.
    """
    read = torch.ops.quantized_decomposed.dequantize_per_channel.default
    folded = 0
    for norm in [n for n in graph.graph.nodes if n.target is _NORM]:
        layer, *rest = norm.args
        if layer.target not in _LAYERS or len(layer.users) != 1 or norm.args[5]:
            continue
        weight = layer.args[1]
        if weight.target is not read or weight.args[3] != _LAYERS[layer.target]:
            continue
        if _LAYERS[layer.target] == 1 and _groups(layer) != 1:
            continue
        gamma, beta, mean, var = (_value(graph, node) for node in rest[:4])
        if mean is None or var is None or _in_channels(layer) is False:
            continue
        factor = (var + norm.args[7]).rsqrt() * (1.0 if gamma is None else gamma)
        _fold(graph, layer, factor, (0.0 if beta is None else beta) - mean * factor)
        norm.replace_all_uses_with(layer)
        graph.graph.erase_node(norm)
        folded += 1
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return folded


def _fold(graph: GraphModule, layer: Node, factor: Tensor, offset: Any) -> None:
    """Multiply the outputs of a layer by a factor per channel, and add an offset."""
    weight: Any = layer.args[1]
    whole, scale, zeros, axis = weight.args[:4]
    shape = [-1 if dim == axis else 1 for dim in range(_value(graph, whole).dim())]
    signs = torch.where(factor < 0, -1, 1).to(torch.int8)
    with graph.graph.inserting_before(weight):
        made = [
            _constant(graph, _value(graph, whole) * signs.view(shape)),
            _constant(graph, _value(graph, scale) * factor.abs()),
        ]
    weight.args = (*made, zeros, axis, *weight.args[4:])
    bias = _value(graph, layer.args[2]) if len(layer.args) > 2 else None
    with graph.graph.inserting_before(layer):
        made_bias = _constant(graph, (0.0 if bias is None else bias * factor) + offset)
    layer.args = (*layer.args[:2], made_bias, *layer.args[3:])


def _groups(layer: Node) -> int:
    return int(layer.args[6]) if len(layer.args) > 6 else 1  # type: ignore[arg-type]


def _in_channels(layer: Node) -> bool:
    """Whether the channels of the layer are what a norm behind it counts: dimension 1."""
    value = layer.meta.get("val")
    return layer.target is not torch.ops.aten.linear.default or (
        isinstance(value, Tensor) and value.dim() == 2
    )


def _value(graph: GraphModule, node: Any) -> Any:
    """Return a tensor that the graph holds."""
    if not isinstance(node, Node):
        return node
    if node.op != "get_attr":
        return None
    found: Any = graph
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found.detach()


def _constant(graph: GraphModule, value: Tensor) -> Node:
    name = f"folded_{sum(1 for key in graph._buffers if key.startswith('folded_'))}"
    graph.register_buffer(name, value)
    return graph.graph.get_attr(name)
