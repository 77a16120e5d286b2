"""The numbers that a forward passes to torch functions, and sizes that remember where they come from."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_accel.pruning.trace.sizes import (
    Attribute,
    Equation,
    Length,
    Origin,
    leaves,
    remember_attributes,
)
from lightning_accel.pruning.trace.union_find import Ids

if TYPE_CHECKING:
    from lightning_accel.pruning.trace.channel_tracer import ChannelTracer


_CHECKS = {"has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"}


def without_override(func: Any) -> Any:
    """Return a Python function of torch such that a mode sees what it calls, or `None` for others.

    As it is, such a function goes to the mode as a whole (`multi_head_attention_forward`).
    """
    if not isinstance(func, types.FunctionType) or not func.__module__.startswith("torch."):
        return None
    if func.__module__ == "torch._tensor":
        return None  # methods call their own public name again, and nothing else worth seeing
    if not _CHECKS & set(func.__code__.co_names):
        return None
    # torch asks whether a mode is to take the call as a whole; a copy of the function that is told no goes on
    # to its own lines, and so to the calls that matter.
    never = dict.fromkeys(_CHECKS, lambda *_: False)
    names = {**func.__globals__, **never}
    inner = types.FunctionType(
        func.__code__, names, func.__name__, func.__defaults__, func.__closure__
    )
    inner.__kwdefaults__ = func.__kwdefaults__
    return inner


@contextmanager
def sizes_not_cached() -> Iterator[None]:
    """Let einops compute sizes anew: its cache gives plain integers out, and would keep ours."""
    einops = sys.modules.get("einops.einops")
    cached = getattr(einops, "_reconstruct_from_shape", None)
    plain = getattr(einops, "_reconstruct_from_shape_uncached", None)
    if cached is None or plain is None:
        yield
        return
    vars(einops)["_reconstruct_from_shape"] = plain
    try:
        yield
    finally:
        vars(einops)["_reconstruct_from_shape"] = cached


class SymbolicSizes(TorchFunctionMode):
    """Reads the sizes that a forward passes to torch functions, and gives out sizes with an origin."""

    _SHAPED = {"view": 1, "reshape": 1, "expand": 1, "broadcast_to": 1, "zeros": 0, "ones": 0}
    _SHAPED |= {"empty": 0, "rand": 0, "randn": 0, "new_zeros": 1, "new_ones": 1, "new_empty": 1}
    _SHAPED |= {"full": 0, "new_full": 1}
    _GROUPED = {"conv1d": 6, "conv2d": 6, "conv3d": 6, "group_norm": 1}
    _GROUPED |= {"conv_transpose1d": 6, "conv_transpose2d": 6, "conv_transpose3d": 6}

    def __init__(self, tracer: ChannelTracer) -> None:
        super().__init__()
        self.tracer = tracer
        remember_attributes(tracer.model, self._compared)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # A mode sees `x.shape` as a call of the property's getter.
        if getattr(func, "__self__", None) is _SHAPE:
            return torch.Size(self._lengths(args[0]))
        name = getattr(func, "__name__", "")
        if name == "size" and isinstance(args[0], Tensor):
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            lengths = self._lengths(args[0])
            return torch.Size(lengths) if dim is None else lengths[dim]
        if name == "numel" and isinstance(args[0], Tensor):
            return math.prod(self._lengths(args[0]))
        if name in self._SHAPED:
            return self._shaped(func, name, args, kwargs)
        if name == "unflatten":
            return self._unflatten(func, args, kwargs)
        if name in self._GROUPED:
            return self._grouped(func, name, args, kwargs)
        after = getattr(self, f"_after_{name.strip('_')}", None)
        if after is not None:
            with _unfused(name):
                result = func(*args, **kwargs)
            after(result, *args, **kwargs)
            return result
        inner = without_override(func)
        if inner is None:
            return func(*args, **kwargs)
        with self:
            return inner(*args, **kwargs)

    def _lengths(self, tensor: Tensor) -> list[int]:
        known = self.tracer.infos.get(tensor)
        if known is None or len(known.axes) != tensor.dim():
            return list(tensor.shape)
        return [Origin(len(axis.atoms), Length(axis.atoms), self._compared) for axis in known.axes]

    def _compared(self, left: Any, right: Any) -> None:
        for one, other in ((left, right), (right, left)):
            # Two lengths may be equal by chance, in this example; what a module was told to expect is no chance.
            attribute = any(isinstance(leaf, Attribute) for leaf in leaves(one))
            if attribute and isinstance(other, Length):
                self.tracer.equations.append(Equation(one, other.atoms, self.tracer.place))

    def _counts(self, number: Any, atoms: Ids) -> None:
        """Note that `number` counts `atoms`; one that is written in the code fixes them."""
        if isinstance(number, Origin):
            if int(number) == len(atoms):
                self.tracer.equations.append(Equation(number.of, atoms, self.tracer.place))
        # -1 is for torch to find, 1 is a dimension without content, and `True` is no size.
        elif type(number) is int and number > 1 and len(atoms):
            text = f"the size {number} is written in the code of {self.tracer.here}"
            self.tracer.atoms.fix(atoms, f"{text}, or in a configuration that it reads")

    def _shaped(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        given = args[self._SHAPED[name] :]
        if name in ("full", "new_full"):
            given = given[:1]
        given = given or [kwargs.get("size", kwargs.get("shape", ()))]
        sizes = list(given[0]) if given and isinstance(given[0], (tuple, list)) else list(given)
        if not all(isinstance(size, int) or _is_number(size) for size in sizes):
            return func(*args, **kwargs)
        return self._with_sizes(func, args, kwargs, sizes)

    def _unflatten(self, func: Any, args: Any, kwargs: Any) -> Any:
        names = ("input", "dim", "sizes")
        bound = dict(zip(names, args, strict=False)) | kwargs
        tensor, dim, sizes = (bound[key] for key in names)
        dim = dim % tensor.dim()
        # The dimensions beside it stay whatever they are: as if torch had to find them.
        rest = [-1] * dim, [-1] * (tensor.dim() - dim - 1)
        return self._with_sizes(func, args, kwargs, [*rest[0], *sizes, *rest[1]])

    def _with_sizes(self, func: Any, args: Any, kwargs: Any, sizes: list[int]) -> Any:
        # The rule of the view runs within the call, and has to know which of its sizes can follow a cut.
        self.tracer.adjustable = [isinstance(s, Origin) or s in (-1, 1) for s in sizes]
        self.tracer.others = [self._stays(size) for size in sizes]
        try:
            result = func(*args, **kwargs)
        finally:
            self.tracer.adjustable, self.tracer.others = None, ()
        axes = self.tracer.info(result).axes
        if len(axes) == len(sizes):
            for size, axis in zip(sizes, axes, strict=True):
                self._counts(size, axis.atoms)
        return result

    def _stays(self, size: Any) -> bool:
        """Whether a number is the length of a dimension no part of which can go."""
        of = getattr(size, "of", None)
        return isinstance(of, Length) and not self.tracer.atoms.is_free(of.atoms)

    def _grouped(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        place = self._GROUPED[name]
        key = "num_groups" if name == "group_norm" else "groups"
        groups = args[place] if len(args) > place else kwargs.get(key, 1)
        # Whole groups can go only where the forward reads their number from an attribute that can be lowered.
        self.tracer.groups_adjustable = isinstance(groups, Origin)
        self.tracer.taken_groups()
        result = func(*args, **kwargs)
        counted = self.tracer.taken_groups()
        if counted is not None:
            self._counts(groups, counted)
        self.tracer.groups_adjustable = True
        return result

    def _after_split(
        self, result: Any, _: Any = None, size: Any = None, dim: int = 0, **named: Any
    ) -> None:
        for key in ("split_size_or_sections", "split_size", "split_sizes"):
            size = named.get(key, size)
        pieces = [self.tracer.info(piece).axes[dim].atoms for piece in result]
        # `split(n)` gives pieces of one size: they shrink together, or the last would become another one.
        if isinstance(size, int):
            for piece in pieces[1:]:
                if len(piece) == len(pieces[0]):
                    self.tracer.atoms.join(pieces[0], piece)
            # The last piece is what remains, and need not be `size` long.
            size = [size] * (len(pieces) - 1)
        for number, piece in zip(size, pieces, strict=False):
            self._counts(number, piece)

    _after_split_with_sizes = _after_split

    def _after_chunk(
        self, result: Any, _: Any = None, chunks: Any = None, dim: int = 0, **named: Any
    ) -> None:
        pieces = [self.tracer.info(piece).axes[dim].atoms for piece in result]
        for piece in pieces[1:]:
            if len(piece) == len(pieces[0]):
                self.tracer.atoms.join(pieces[0], piece)
            else:
                # `chunk` takes ceil(n / chunks) places: of unequal parts a cut would move the borders.
                self.tracer.atoms.fix(np.concatenate(pieces), "it is chunked into unequal parts")

    def _after_tensor_split(
        self, result: Any, _: Any = None, places: Any = None, dim: int = 0, **named: Any
    ) -> None:
        if isinstance(named.get("sections", places), int):
            self._after_chunk(result, dim=dim)
        else:
            for piece in result:
                self.tracer.fix(self.tracer.info(piece).axes[dim], "it is split at fixed places")

    def _after_narrow(self, result: Any, input: Tensor, dim: int, start: Any, length: int) -> None:
        atoms = self.tracer.info(input).axes[dim].atoms
        if isinstance(start, int):
            self._bound(start, atoms)
            self._counts(length, self.tracer.info(result).axes[dim].atoms)

    def _after_getitem(self, result: Any, tensor: Tensor, index: Any) -> None:
        axes = self.tracer.info(tensor).axes
        index = index if isinstance(index, tuple) else (index,)
        taken = sum(
            i.dim() if isinstance(i, Tensor) and i.dtype == torch.bool else 1
            for i in index
            if i is not None and i is not Ellipsis
        )
        dim = 0
        for item in index:
            if item is Ellipsis:
                # An ellipsis stands for all dimensions that nothing else takes; a boolean mask takes as many as
                # it has.
                dim += len(axes) - taken
            elif isinstance(item, slice):
                for bound in (item.start, item.stop):
                    if isinstance(bound, int):
                        self._bound(bound, axes[dim].atoms)
                dim += 1
            elif item is not None:
                dim += item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else 1

    def _bound(self, bound: int, atoms: Ids) -> None:
        part = atoms[:bound] if bound >= 0 else atoms[bound:]
        # A bound at or beyond the end takes all, and counts nothing.
        if 0 < len(part) < len(atoms) and abs(bound) == len(part):
            if isinstance(bound, Origin):
                self._counts(bound if bound >= 0 else -bound, part)
            else:
                self.tracer.atoms.fix(part, f"{bound} is written in the code of {self.tracer.here}")

    def _after_layer_norm(self, result: Tensor, *args: Any, **kwargs: Any) -> None:
        shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
        for size, axis in zip(shape, self.tracer.info(result).axes[-len(shape) :], strict=True):
            self._counts(size, axis.atoms)

    _after_rms_norm = _after_layer_norm

    def _after_matmul(self, result: Any, input: Tensor, *_: Any, **named: Any) -> None:
        self._product(input, scaled=False)

    _after_bmm = _after_matmul

    def _after_scaled_dot_product_attention(
        self, result: Any, query: Tensor, *_: Any, **named: Any
    ) -> None:
        self._product(query, scaled=named.get("scale") is None)

    def _product(self, left: Tensor, *, scaled: bool) -> None:
        axes = self.tracer.info(left).axes
        last = axes[-1].atoms if axes else self.tracer.atoms.fresh(0)
        # In the order of the calls, by which `scaling` finds the same products in a pass with gradients.
        self.tracer.queries.append((last, scaled))


def _unfused(name: str) -> AbstractContextManager[None]:
    """Take attention apart into products, whichever kernels the forward itself asks for."""
    if name == "scaled_dot_product_attention":
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def _is_number(size: Any) -> bool:
    return isinstance(size, Tensor) and not size.dim()


_SHAPE = torch.Tensor.shape
