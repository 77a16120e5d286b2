"""A residual block whose branch says nothing, and what it hands on then.

Whether `x + f(x)` is what a block computes is asked of no name and no source: a copy of it runs with all of its
weights and statistics made nothing where they meet data (`blank`), on what the block receives. If it hands that on,
number by number, the block is a skip with a branch beside it, and its place can be taken by a `Bypass`. A gate, a
scaled skip or a norm after the sum do something to it, and so are no such blocks.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm

from lightning_accel.errors import BrokenModel
from lightning_accel.pruning.blank import Blank
from lightning_accel.surgery.bypass import Handing
from lightning_accel.surgery.structure import named_tensors

_NOTHING = 1e-30  # for weights that are divided by their own norm
_ROUNDED = 1e-6
_VALUES = (bool, int, float, str)

Path = tuple[Any, ...]
"""Position, name and keys of a tensor among the arguments of a call."""


def silence(model: nn.Module, names: Iterable[str]) -> Blank:
    """Return what runs a network as if the branches of these blocks said nothing.

    What others share of their weights is theirs: in this network, a copy, each has its own from now on, and plain
    weights in place of those that `torch.nn.utils` makes: a spectral norm makes as much of almost nothing.
    """
    masks: dict[str, Tensor] = {}
    for name in names:
        block = model.get_submodule(name)
        _make_plain(block)
        inside = set(map(id, block.modules()))
        held = {
            id(t)
            for module in model.modules()
            if id(module) not in inside
            for t in (*module._parameters.values(), *module._buffers.values())
        }
        for module in block.modules():
            for leaf, weight in module._parameters.items():
                if weight is not None and id(weight) in held:
                    module._parameters[leaf] = nn.Parameter(weight.detach().clone(), False)
        for inner, tensor in named_tensors(block):
            if id(tensor) not in held and (tensor.is_floating_point() or tensor.is_complex()):
                whole = f"{name}.{inner}".lstrip(".")
                masks[whole] = (
                    tensor.detach().real.new_full((), _least(tensor)).expand(tensor.shape)
                )
    return Blank(model, masks)


def _make_plain(block: nn.Module) -> None:
    for module in list(block.modules()):
        for name, child in module.named_children():
            if parametrize.is_parametrized(child):
                module._modules[name] = _unparametrized(child)
        with suppress(ValueError):
            remove_spectral_norm(module)


def _unparametrized(module: nn.Module) -> nn.Module:
    """Return a module of the class of before; to take a parametrization off would change that of all copies."""
    kind: Any = type(module).__mro__[1]
    made: nn.Module = kind.__new__(kind)
    vars(made).update(vars(module))
    made._modules = {n: m for n, m in module._modules.items() if n != "parametrizations"}
    leaves: Any = module.parametrizations
    values = {leaf: getattr(module, leaf).detach().clone() for leaf in leaves}
    own = {leaf: nn.Parameter(value, False) for leaf, value in values.items()}
    made._parameters = {**module._parameters, **own}
    return made


def _least(tensor: Tensor) -> float:
    wide = tensor.dtype in (torch.float64, torch.complex128)
    return _NOTHING if wide else 0.0


class Handed(NamedTuple):
    """What a silenced block gave: by leaf of its output the arguments that it may be, and its form."""

    form: Any
    paths: tuple[tuple[Path, ...], ...]

    def joined(self, other: Handed) -> Handed:
        """Return what is true of both calls.

        Raises:
            BrokenModel: Nothing is.
        """
        both = tuple(
            tuple(path for path in mine if path in theirs)
            for mine, theirs in zip(self.paths, other.paths, strict=False)
        )
        if self.form != other.form or not all(both):
            raise BrokenModel("it hands on another argument from call to call")
        return Handed(self.form, both)

    def handing(self) -> Handing:
        """Return it as plain data, with the first of several arguments that are equal."""
        return _filled(self.form, iter(self.paths))


def handed_on(
    block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], tolerance: float
) -> Handed:
    """Run a block in silence and tell which arguments it hands on.

    Args:
        block: A copy without hooks of its own.
        args: Positional arguments.
        kwargs: Named arguments.
        tolerance: How far what it gives may be from what it got, over the scale of that.

    Raises:
        BrokenModel: It gives something else.
    """
    given = list(_leaves(block, args, kwargs))
    args, kwargs = deepcopy_of(tuple(args)), deepcopy_of(dict(kwargs))
    with silence(block, [""]):
        outputs = block(*args, **kwargs)
    paths: list[tuple[Path, ...]] = []

    def read(value: Any) -> Any:
        if isinstance(value, Tensor):
            found = tuple(path for path, one in given if _equal(value, one, tolerance))
            if not found:
                raise BrokenModel(_why_not(value, [one for _, one in given], beside=bool(paths)))
            paths.append(found)
            return "tensor"
        if value is None or type(value) in _VALUES:
            return {"value": value}
        if type(value) in (tuple, list):
            return {type(value).__name__: [read(v) for v in value]}
        if type(value) is dict and all(isinstance(k, str) for k in value):
            return {"dict": {k: read(v) for k, v in value.items()}}
        raise BrokenModel(f"it gives a {type(value).__name__}")

    form = read(outputs)
    if not paths:
        raise BrokenModel("it gives no tensor")
    return Handed(form, tuple(paths))


def deepcopy_of(value: Any) -> Any:
    """Copy arguments of a call, so that it may write into them: a cache of keys and values, say."""
    return deepcopy(value, {id(t): t.detach().clone() for t in _tensors(value)})


def _why_not(value: Tensor, given: Sequence[Tensor], *, beside: bool) -> str:
    if not any(one.shape == value.shape for one in given):
        more = "it gives more than it gets, a state or attention weights, say"
        return more if beside else "it gives another shape than it gets"
    if any(_equal(value, one, _ROUNDED) for one in given):
        return "it hands on what it gets in another number format, float32 say, and so rounds it"
    return (
        "without its weights it does not hand on what it gets: no plain skip, or more after the sum"
    )


def _filled(form: Any, paths: Iterator[tuple[Path, ...]]) -> Handing:
    if form == "tensor":
        return {"tensor": list(next(paths)[0])}
    ((kind, held),) = form.items()
    if kind == "value":
        return form
    if kind == "dict":
        return {"dict": {k: _filled(v, paths) for k, v in held.items()}}
    return {kind: [_filled(v, paths) for v in held]}


def _leaves(
    block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[Path, Tensor]]:
    """Yield the tensors among the arguments, and where they are."""
    names = list(inspect.signature(block.forward).parameters)
    for place, value in enumerate(args):
        yield from _within((place, names[place] if place < len(names) else ""), value)
    for name, value in kwargs.items():
        yield from _within((names.index(name) if name in names else -1, name), value)


def _within(path: Path, value: Any) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, (tuple, list)):
        for place, one in enumerate(value):
            yield from _within((*path, place), one)
    elif isinstance(value, dict):
        for key, one in value.items():
            if isinstance(key, str):
                yield from _within((*path, key), one)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors that deep copies refuse: those with a graph behind them."""
    for _, tensor in _within((), value):
        if tensor.grad_fn is not None:
            yield tensor


def _equal(one: Tensor, other: Tensor, tolerance: float) -> bool:
    if one.shape != other.shape or (one.dtype != other.dtype and tolerance < _ROUNDED):
        return False
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    scale = other.detach().abs().max().clamp_min(1e-12) if other.numel() else 1.0
    return bool(((one - other).abs() <= tolerance * scale).all())
