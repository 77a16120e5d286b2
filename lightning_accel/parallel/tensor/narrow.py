"""Attention that reads its width off its input: `B, T, C = x.shape` and then `y.view(B, T, C)`, as nanoGPT and timm do.

The input of such a module is whole while its heads are split, so the width that it reads must be this process's. No edit of
the module can say so; its input can: within the module a tensor answers with the narrower size, and is itself for
everything else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_accel.pruning.graph import Graph, Group
from lightning_accel.surgery import Cut, Structure
from lightning_accel.surgery.attributes import Size
from lightning_accel.surgery.structure import named_tensors


class Narrowing(NamedTuple):
    """A module whose inputs of one width say within it that they have another."""

    module: str
    whole: int
    part: int


def narrowing(graph: Graph, group: Group, linked: Sequence[Group], size: int) -> Narrowing | None:
    """Return how the module around the layers of a group is told its part of a width, where that can be.

    Args:
        graph: Of the network.
        group: Heads, split over processes.
        linked: The groups that are whole, whose width the module reads.
        size: Number of processes.
    """
    layers = {m.tensor.rpartition(".")[0] for m in group.members if m.role in ("out", "in")}
    makers = {m.tensor.rpartition(".")[0] for m in group.members if m.role == "out"}
    modules = dict(graph.model.named_modules())
    tensors = dict(named_tensors(graph.model))
    if not all(
        isinstance(modules.get(n), nn.Linear) or hasattr(modules.get(n), "nf") for n in layers
    ):
        return None
    around = _common(layers)
    widths = {
        tensors[m.tensor].shape[m.dim]
        for one in linked
        for m in one.members
        if m.role == "in" and m.tensor.rpartition(".")[0] in makers
    }
    even = all(not one.units % size for one in (group, *linked))
    if not around or len(widths) != 1 or not even:
        return None
    (width,) = widths
    return Narrowing(around, width, width // size)


def without_linked(
    graph: Graph, cut: Cut, plain: Cut, linked: Sequence[Group], around: Sequence[str]
) -> Cut:
    """Return a cut without what it takes of groups that stay whole.

    Args:
        graph: Of the network.
        cut: Takes units of groups that are split, and as many of those that are linked to them.
        plain: Takes those only that have no links.
        linked: The groups that stay whole.
        around: Modules that are told their part of a width.

    Raises:
        ValueError: Both are in one tensor in a way that cannot be told apart.
    """
    shapes = dict(named_tensors(graph.model))
    whole = {(id(shapes[m.tensor]), m.dim) for group in linked for m in group.members}
    kept = {}
    for name, keep in cut.kept.items():
        one = id(shapes[name])  # which a tied tensor has under each of its names
        if keep.flat is not None and any(other == one for other, _ in whole):
            raise ValueError(f"`{name}` is cut in more than rows and columns")
        dims = tuple(None if (one, d) in whole else p for d, p in enumerate(keep.dims))
        if keep.flat is not None or any(d is not None for d in dims):
            kept[name] = keep._replace(dims=dims)
    attributes = {
        name: sizes
        for name, found in cut.attributes.items()
        if (sizes := dict(_sizes(graph, name, dict(found), kept, plain, around)))
    }
    before = Structure(
        {name: tuple(shapes[name].shape) for name in kept},
        {name: dict.fromkeys(sizes, 0) for name, sizes in attributes.items()},
    ).now(graph.model)
    return replace(cut, kept=kept, before=before, attributes=attributes)


def _sizes(
    graph: Graph, name: str, found: dict[str, Size], kept: Any, plain: Cut, around: Sequence[str]
) -> Iterator[tuple[str, Size]]:
    """Yield the sizes of a module that follow from what is split."""
    module = graph.model.get_submodule(name)
    own = [n for n, _ in module.named_parameters(recurse=False) if f"{name}.{n}" in kept]
    if isinstance(module, nn.Linear):
        keep = kept.get(f"{name}.weight")
        rows, columns = keep.dims if keep is not None else (None, None)
        if rows is not None:
            yield "out_features", len(rows)
        if columns is not None:
            yield "in_features", len(columns)
    elif hasattr(module, "nf"):  # GPT-2's: its weight is the other way round
        keep = kept.get(f"{name}.weight")
        if keep is not None and keep.dims[1] is not None:
            yield "nf", len(keep.dims[1])
    elif name in around or own:
        yield from found.items()
    else:
        yield from dict(plain.attributes.get(name, {})).items()


def _common(names: Any) -> str:
    """Return the module that holds all of these."""
    paths = [name.split(".") for name in names]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared[: min(map(len, paths)) - 1])


class _Narrow(Tensor):
    """A tensor that says it is narrower than it is."""

    _part: int

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in (Tensor.shape.__get__, Tensor.size):  # type: ignore[attr-defined]
                asked = [*args, *(kwargs or {}).values()]
                plain = asked[0].as_subclass(Tensor).shape
                size = torch.Size((*plain[:-1], asked[0]._part))
                return size[asked[1]] if asked[1:] and asked[1] is not None else size
            plain_args, plain_kwargs = tree_map(widened, (args, kwargs or {}))
            return func(*plain_args, **plain_kwargs)


class _Said(TorchFunctionMode):
    """The same for fake tensors, which can be no other class: all of that width say that they are narrower."""

    def __init__(self, one: Narrowing) -> None:
        super().__init__()
        self._one = one

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        is_size = func in (Tensor.shape.__get__, Tensor.size)  # type: ignore[attr-defined]
        if not is_size or args[0].dim() != 3 or args[0].shape[-1] != self._one.whole:
            return found
        if isinstance(found, int):
            return self._one.part if found == self._one.whole else found
        return torch.Size((*found[:-1], self._one.part))


def narrow(model: nn.Module, one: Narrowing) -> Any:
    """Let a module's inputs say within its forward that they are narrower; return what ends it.

    Compilers ask tensors for their sizes too, and are kept out of this forward.
    """
    module = model.get_submodule(one.module)
    forward, had = module.forward, "forward" in vars(module)

    @torch.compiler.disable(reason="it reads a width that is split")
    def run(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, FakeTensor) for value in tree_leaves((args, kwargs))):
            with _Said(one):
                return forward(*args, **kwargs)
        args, kwargs = tree_map(partial(_narrowed, one=one), (args, kwargs))
        return tree_map(widened, forward(*args, **kwargs))

    def leave() -> None:
        if had:
            vars(module)["forward"] = forward
        else:
            del vars(module)["forward"]

    vars(module)["forward"] = run
    return leave


def _narrowed(value: Any, one: Narrowing) -> Any:
    """Return a tensor of that width as one that says it is narrower; anything else as it is."""
    if type(value) is not Tensor or not value.dim() or value.shape[-1] != one.whole:
        return value
    told = value.as_subclass(_Narrow)
    told._part = one.part
    return told


def widened(value: Any) -> Any:
    """Return a tensor that says what it is."""
    if not isinstance(value, _Narrow):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(Tensor)
