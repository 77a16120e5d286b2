"""What a bundle takes and gives: names, types and sizes, and the check of each call against them.

A graph that was made for other sizes may read beyond its buffers or answer something wrong; so every call is checked
here first, whichever back end runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_accel.errors import explain
from lightning_accel.export import structure
from lightning_accel.export.structure import Node

Runner = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
"""A back end, opened: the tensors of a call in, those of the answer out."""


class TensorSpec(NamedTuple):
    """One tensor: sizes that vary are names, the same ones where they vary together; `None` where nothing is known."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        """Say it for people.

        >>> print(TensorSpec("x", "float32", ("batch", 3)))
        x: float32 (batch, 3)
        """
        sizes = ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.name}: {self.dtype} ({sizes}{',' if len(self.shape) == 1 else ''})"


class Schema(NamedTuple):
    """Inputs and outputs of a bundle.

    Attributes:
        parameters: Names of arguments, in the order in which they may be passed without a name.
        arguments: The tree of all arguments by name.
        inputs: Its tensors.
        answer: The tree of the answer.
        outputs: Its tensors.
        most: The largest value of a named size, or `None`.
    """

    parameters: tuple[str, ...]
    arguments: Node
    inputs: tuple[TensorSpec, ...]
    answer: Node
    outputs: tuple[TensorSpec, ...]
    most: Mapping[str, int | None]

    def flat(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Return the tensors of a call, on the CPU.

        Raises:
            TypeError: Number, nesting or type of the arguments differ from those of the example.
            ValueError: Sizes differ where the graph has fixed ones.
        """
        held = bound(self.parameters, args, kwargs)
        known = {key for key, _ in self.arguments["dict"]}
        if set(held) != known:
            raise TypeError(
                explain(
                    "the arguments are those of the example",
                    f"{', '.join(map(str, held)) or 'none'} instead of {', '.join(map(str, known))}",
                    "pass each of them, and no other",
                )
            )
        leaves = [
            leaf
            for key, node in self.arguments["dict"]
            for leaf in structure.matched(node, held[key], key)
        ]
        tensors = [leaf.detach().cpu() for leaf in leaves]
        self._check(tensors)
        return tensors

    def value(self, tensors: Sequence[Tensor], classes: Mapping[str, type] | None = None) -> Any:
        """Return an answer in the model's own structure."""
        return structure.decode(self.answer, tensors, classes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, which `from_dict` reads."""
        plain = self._asdict()
        for key in ("inputs", "outputs"):
            plain[key] = [{**s._asdict(), "shape": list(s.shape)} for s in plain[key]]
        return {**plain, "parameters": list(self.parameters), "most": dict(self.most)}

    @classmethod
    def from_dict(cls, plain: Any) -> Schema:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: It is something else.
        """
        if not isinstance(plain, dict) or set(plain) != set(cls._fields):
            raise ValueError("no description of inputs and outputs")
        inputs, outputs = (_specs(plain[key]) for key in ("inputs", "outputs"))
        structure.check(plain["arguments"], len(inputs))
        structure.check(plain["answer"], len(outputs))
        if "dict" not in plain["arguments"] or not _are_texts(plain["parameters"]):
            raise ValueError("arguments without names")
        most = plain["most"]
        if not isinstance(most, dict) or any(
            type(v) not in (int, type(None)) for v in most.values()
        ):
            raise ValueError("bounds of sizes that are no numbers")
        return cls(
            tuple(plain["parameters"]), plain["arguments"], inputs, plain["answer"], outputs, most
        )

    def _check(self, tensors: Sequence[Tensor]) -> None:
        sizes: dict[str, int] = {}
        for spec, tensor in zip(self.inputs, tensors, strict=True):
            found = str(tensor.dtype).removeprefix("torch.")
            if found != spec.dtype:
                do = f"convert it, `.to(torch.{spec.dtype})`"
                raise TypeError(explain(f"`{spec.name}` is of type {spec.dtype}", found, do))
            if tensor.layout != torch.strided or len(tensor.shape) != len(spec.shape):
                raise ValueError(_wrong_size(spec, tensor, f"has {len(spec.shape)} dimensions"))
            for dim, (wanted, size) in enumerate(zip(spec.shape, tensor.shape, strict=True)):
                if isinstance(wanted, int) and size != wanted:
                    raise ValueError(
                        _wrong_size(spec, tensor, f"has the size {wanted} in dimension {dim}")
                    )
                if isinstance(wanted, str):
                    self._check_named(spec, tensor, wanted, sizes.setdefault(wanted, size), size)

    def _check_named(
        self, spec: TensorSpec, tensor: Tensor, name: str, first: int, size: int
    ) -> None:
        most = self.most.get(name)
        if size != first:
            raise ValueError(
                _wrong_size(spec, tensor, f"has the same {name} as the others, {first}")
            )
        if size < 1 or (most is not None and size > most):
            bounds = "at least 1" if most is None else f"from 1 to {most}"
            raise ValueError(_wrong_size(spec, tensor, f"has a {name} {bounds}"))


class Predictor:
    """A back end that is called as the model is; what is passed stays as it is.

    Args:
        schema: Of its calls.
        runner: The back end.
        classes: Of the answer, by name.
    """

    def __init__(
        self, schema: Schema, runner: Runner, classes: Mapping[str, type] | None = None
    ) -> None:
        self.schema, self.runner, self.classes = schema, runner, classes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer one call."""
        with torch.no_grad():
            answer = self.runner(self.schema.flat(args, kwargs))
        return self.schema.value(answer, self.classes)


def bound(
    parameters: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return arguments by name.

    Raises:
        TypeError: There are more of them than names, or one twice.

    >>> bound(["x", "mask"], [1], {"mask": 2})
    {'x': 1, 'mask': 2}
    """
    named = dict(zip(parameters, args, strict=False))
    if len(args) > len(parameters) or set(named) & set(kwargs):
        raise TypeError(
            explain(
                f"there are {len(parameters)} arguments that need no name, and each is passed once",
                f"{len(args)} without a name, and {', '.join(kwargs) or 'none'} with one",
                "pass them as in the example",
            )
        )
    return {**named, **kwargs}


def dtype_name(tensor: Tensor) -> str:
    """Return a type as manifests have it.

    >>> dtype_name(torch.ones(1))
    'float32'
    """
    return str(tensor.dtype).removeprefix("torch.")


def _wrong_size(spec: TensorSpec, tensor: Tensor, what: str) -> str:
    do = f"pass {spec}; other sizes need a deployment with `dynamic=` for them"
    return explain(f"`{spec.name}` {what}", f"sizes {tuple(tensor.shape)}", do)


def _specs(plain: Any) -> tuple[TensorSpec, ...]:
    if not isinstance(plain, list):
        raise ValueError("no list of tensors")
    found = []
    for item in plain:
        if not isinstance(item, dict) or set(item) != set(TensorSpec._fields):
            raise ValueError("no description of a tensor")
        sizes = item["shape"]
        if not isinstance(sizes, list) or any(type(s) not in (int, str, type(None)) for s in sizes):
            raise ValueError("sizes that are no numbers")
        if not _are_texts([item["name"], item["dtype"]]):
            raise ValueError("a tensor without a name")
        found.append(TensorSpec(item["name"], item["dtype"], tuple(sizes)))
    return tuple(found)


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
