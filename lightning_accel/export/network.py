"""A model as back ends see it: a copy in eval mode, with a flat row of tensors on both sides.

The copy is a twin, on the CPU, in float32 where the weights are of half precision; the user's model is only read.
Sizes 0 and 1 are constants to `torch.export`, so an example of one sample is doubled before anything is traced.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_accel.export import structure
from lightning_accel.export.schema import Schema, TensorSpec, bound, dtype_name
from lightning_accel.export.structure import Node
from lightning_accel.surgery.call import Call, as_call, converted, in_precision
from lightning_accel.surgery.twin import twin

Axes = list[dict[int, str]]
"""For each input the names of the sizes that vary, by dimension."""

_HALF = (torch.float16, torch.bfloat16)


class FlatNetwork(nn.Module):
    """What is exported: `pre`, the model and `post`, called with the tensors of the arguments.

    Args:
        model: In eval mode, and nobody else's.
        example: A call of it; what is no tensor there becomes a constant.
        pre: Gets the arguments; a tuple that it gives is several arguments of the model, a dict those with a name.
        post: Gets the answer.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Call,
        pre: nn.Module | None = None,
        post: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model, self.pre, self.post = model, pre, post
        self.parameter_names = _parameters(model if pre is None else pre, len(example.args))
        self.positional = len(example.args)
        held = bound(self.parameter_names, example.args, example.kwargs)
        leaves: list[Tensor] = []
        self.arguments: Node = structure.encode(held, leaves)
        self.classes = structure.classes_in(held)
        self.example = [_copied(leaf).cpu() for leaf in leaves]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Answer with a row of tensors."""
        leaves: list[Tensor] = []
        structure.encode(self.answer(tensors), leaves)
        return tuple(leaves)

    def answer(self, tensors: Sequence[Tensor]) -> Any:
        """Answer in the model's own structure."""
        held = structure.decode(self.arguments, tensors, self.classes)
        args = [held.pop(name) for name in self.parameter_names[: self.positional]]
        return self.call(args, held)

    def call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Answer as the model is called."""
        if self.pre is not None:
            given = self.pre(*args, **kwargs)
            args = given if isinstance(given, tuple) else (given,)
            kwargs = {}
            if isinstance(given, dict):
                args, kwargs = (), given
        answer = self.model(*args, **kwargs)
        return answer if self.post is None else self.post(answer)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Answer as a bundle does, without a graph."""
        with torch.no_grad():
            return self.call(args, kwargs)


def flat_network(
    model: nn.Module, example: Any, pre: nn.Module | None, post: nn.Module | None
) -> tuple[FlatNetwork, list[str]]:
    """Return a copy of a model to export, and what is to be said about it.

    >>> net, _ = flat_network(nn.Linear(2, 3), torch.ones(4, 2), None, None)
    >>> net.parameter_names, net(*net.example)[0].shape
    (['input'], torch.Size([4, 3]))
    """
    notes = []
    call = example if isinstance(example, Call) else as_call(example)
    parts = [None if part is None else twin(part) for part in (pre, post)]
    hooked = () if pre is not None else (Call("", *tree_map(_copied, (call.args, call.kwargs))),)
    made = FlatNetwork(twin(model, hooked), call, *parts)
    made = made.cpu().eval().requires_grad_(False)
    half = {p.dtype for p in [*made.parameters(), *made.buffers()]} & set(_HALF)
    if half:
        converted(made, torch.float32)
        made.example = [
            in_precision(t, torch.float32) if t.dtype in _HALF else t for t in made.example
        ]
        kinds = ", ".join(sorted(str(d).removeprefix("torch.") for d in half))
        notes.append(f"weights in {kinds} are deployed in float32")
    return made, notes


def in_double(network: FlatNetwork) -> FlatNetwork:
    """Return a copy that computes in float64, to tell rounding from faults."""
    return converted(copy.deepcopy(network), torch.float64)


def batch_axes(network: FlatNetwork, name: str = "batch") -> Axes:
    """Name dimension 0 of each tensor that has as many samples as the first one."""
    size = batch_size(network.example)
    return [{0: name} if t.dim() and t.shape[0] == size else {} for t in network.example]


def batch_size(tensors: Sequence[Tensor]) -> int | None:
    """Return the size of dimension 0 of the first tensor that has one."""
    return next((t.shape[0] for t in tensors if t.dim()), None)


def grown(tensors: Sequence[Tensor], axes: Axes) -> list[Tensor]:
    """Double those dimensions of size 1 that are to vary.

    >>> [t.shape for t in grown([torch.ones(1, 3)], [{0: "batch"}])]
    [torch.Size([2, 3])]
    """
    found = []
    for tensor, named in zip(tensors, axes, strict=True):
        for dim in named:
            if tensor.shape[dim] == 1:
                tensor = torch.cat([tensor, tensor], dim)
        found.append(tensor)
    return found


def schema_of(
    network: FlatNetwork,
    axes: Axes,
    answers: Sequence[Sequence[Tensor]],
    sizes: Mapping[str, Sequence[int]],
    most: Mapping[str, int | None],
) -> Schema:
    """Describe what goes in and comes out.

    Args:
        network: Of whom.
        axes: Sizes of inputs that vary.
        answers: Of calls with different sizes; that of the example is the first.
        sizes: The named sizes of each.
        most: The largest value of each named size.
    """
    tree = structure.encode(network.answer(network.example), [])
    inputs = [
        TensorSpec(
            name,
            dtype_name(tensor),
            tuple(named.get(dim, size) for dim, size in enumerate(tensor.shape)),
        )
        for name, tensor, named in zip(
            _unique(structure.names(network.arguments)), network.example, axes, strict=True
        )
    ]
    taken = {spec.name for spec in inputs}
    outputs = []
    for index, name in enumerate(
        _unique(structure.names(tree, "output" if "tensor" in tree else ""))
    ):
        shapes = [tuple(answer[index].shape) for answer in answers]
        name = f"output.{name}" if name in taken or name.isdigit() else name
        outputs.append(TensorSpec(name, dtype_name(answers[0][index]), _varying(shapes, sizes)))
    names = [str(name) for name in network.parameter_names]
    return Schema(tuple(names), network.arguments, tuple(inputs), tree, tuple(outputs), dict(most))


def _varying(
    shapes: Sequence[tuple[int, ...]], sizes: Mapping[str, Sequence[int]]
) -> tuple[int | str | None, ...]:
    """Return the sizes that all have, the name of a size that they follow, and nothing elsewhere."""
    if len({len(shape) for shape in shapes}) > 1:
        return (None,) * len(shapes[0])
    found: list[int | str | None] = []
    for dim, size in enumerate(shapes[0]):
        seen = [shape[dim] for shape in shapes]
        if len(set(seen)) == 1:
            found.append(size)
        else:
            found.append(next((name for name, known in sizes.items() if list(known) == seen), None))
    return tuple(found)


def _unique(names: Any) -> list[str]:
    found: list[str] = []
    for name in names:
        found.append(name if name not in found else f"{name}.{len(found)}")
    return found


def _parameters(module: nn.Module, count: int) -> list[str]:
    """Return names for arguments that are passed by place."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = [
        p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds
    ]
    return [*known, *(f"argument_{index}" for index in range(len(known), count))]


def _copied(value: Any) -> Any:
    """Copy a tensor, so that neither strides nor memory are those of the user's."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone(memory_format=torch.contiguous_format)
