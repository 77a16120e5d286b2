"""What goes into a network: calls of named modules, their arguments of any structure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_accel.surgery.rng import other_device

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Call(NamedTuple):
    """One call of a module: its name inside the model ("" is the model itself) and its arguments."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def as_call(example: Any, name: str = "") -> Call:
    """Read an example: a dict is keyword arguments, a tuple positional ones, all else one argument.

    >>> as_call({"mask": 1})
    Call(name='', args=(), kwargs={'mask': 1})
    """
    if isinstance(example, dict):
        return Call(name, (), example)
    return Call(name, tuple(example) if isinstance(example, (tuple, list)) else (example,), {})


def run(model: nn.Module, calls: Sequence[Call]) -> list[Any]:
    """Make the calls one after another and return their outputs."""
    return [model.get_submodule(call.name)(*call.args, **call.kwargs) for call in calls]


def parameters_of(model: nn.Module, calls: Sequence[Call]) -> dict[int, nn.Parameter]:
    """Return by identity the parameters of the modules that are called; those of the model without calls.

    >>> net = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    >>> len(parameters_of(net, [Call("0", (), {})])), len(parameters_of(net, []))
    (2, 4)
    """
    names = dict.fromkeys(call.name for call in calls) or {"": None}
    return {id(p): p for name in names for p in model.get_submodule(name).parameters()}


def converted(model: ModuleT, dtype: torch.dtype) -> ModuleT:
    """Convert a network in place: `Module.to` would drop the imaginary part of complex weights.

    >>> layer = nn.ParameterList([torch.ones(1, dtype=torch.cfloat)])
    >>> converted(layer, torch.float64)[0].dtype
    torch.complex128
    """
    return model._apply(lambda tensor: in_precision(tensor, dtype))


def in_precision(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert floating point numbers, and complex ones to those of that precision; leave others."""
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def reals(outputs: Any) -> list[Tensor]:
    """Return the floating point tensors in outputs, complex ones as pairs of parts.

    >>> [tuple(t.shape) for t in reals((torch.ones(2, dtype=torch.cfloat), torch.ones(3, dtype=int)))]
    [(2, 2)]
    """
    found = (tensor.resolve_conj() for tensor in tensors(outputs))
    parts = (torch.view_as_real(t) if t.is_complex() else t for t in found)
    return [t for t in parts if t.is_floating_point()]


@contextmanager
def same_random_state(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Put torch's random state back at the end, that of the model's own devices included.

    Args:
        model: What runs meanwhile.
        seed: Which state to begin with; the present one by default.
    """
    places = {p.device for p in model.parameters()}
    kinds = (d.type for d in places if d.type == "cuda" or other_device(d.type) is not None)
    kind = next(kinds, "cuda")
    drawing = [d for d in places if d.type == kind]
    with torch.random.fork_rng(devices=drawing, device_type=kind):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            module = torch.get_device_module(kind) if drawing else None
            for device in drawing:  # others of its kind keep their states
                with module.device(device):  # type: ignore[union-attr]
                    module.manual_seed(seed)  # type: ignore[union-attr]
        yield


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors in an output of any structure, dataclasses and mappings of all kinds included.

    >>> len(tensors({"a": torch.ones(1), "b": (torch.ones(1), None)}))
    2
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in tensors(item)]
    if isinstance(value, (list, tuple, set)):
        return [t for item in value for t in tensors(item)]
    if is_dataclass(value) and not isinstance(value, type):
        return [t for item in vars(value).values() for t in tensors(item)]
    return []


def numbers(value: Any, depth: int = 6) -> list[Tensor]:
    """Return the tensors in an output, and numbers of other kinds as tensors: floats, arrays, what objects hold.

    >>> [n.tolist() for n in numbers({"p": torch.distributions.Normal(0.0, 1.0), "loss": 0.5})]
    [0.0, 1.0, 0.5]
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, float):
        return [torch.tensor(value, dtype=torch.float64)]
    if isinstance(value, np.ndarray):
        return [torch.as_tensor(value)] if value.dtype.kind in "fcbiu" else []
    if depth and isinstance(value, Mapping):
        return [t for item in value.values() for t in numbers(item, depth - 1)]
    if depth and isinstance(value, (list, tuple)):
        return [t for item in value for t in numbers(item, depth - 1)]
    held = getattr(value, "__dict__", None)
    if not depth or not isinstance(held, dict) or isinstance(value, (nn.Module, type, ModuleType)):
        return tensors(value)
    return [t for item in held.values() for t in numbers(item, depth - 1)]


def is_plain(value: Any) -> bool:
    """Whether this is a tensor whose elements can be picked: neither sparse nor nested."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested


def batch_size(calls: Sequence[Call]) -> int | None:
    """Return the size of dimension 0 of the first tensor argument that has one."""
    held = (t for c in calls for t in tensors((c.args, c.kwargs)))
    sizes = (t.shape[0] for t in held if t.dim() and not t.is_nested)
    return next(sizes, None)


def first(calls: Sequence[Call], count: int) -> tuple[Call, ...]:
    """Keep the first `count` samples of every tensor that has the batch dimension.

    >>> first([Call("", (torch.ones(8, 3),), {})], 2)[0].args[0].shape
    torch.Size([2, 3])
    """
    batch = batch_size(calls)

    def cut(value: Any) -> Any:
        has_batch = is_plain(value) and value.dim() > 0 and value.shape[0] == batch
        return value[:count] if has_batch else value

    return tuple(Call(c.name, *tree_map(cut, (c.args, c.kwargs))) for c in calls)


def cast(calls: Sequence[Call], dtype: torch.dtype) -> tuple[Call, ...]:
    """Convert floating point arguments, and complex ones to the complex numbers of that precision.

    >>> cast([Call("", (torch.ones(1, dtype=torch.cfloat),), {})], torch.float64)[0].args[0].dtype
    torch.complex128
    """

    def convert(value: Any) -> Any:
        return in_precision(value.detach(), dtype) if isinstance(value, Tensor) else value

    return tuple(Call(c.name, *tree_map(convert, (c.args, c.kwargs))) for c in calls)
