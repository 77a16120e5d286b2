"""What a user's code writes into tensors on the meta device, where nothing is kept: by whom, and on which line.

`nn.init.zeros_(self.head.bias)` does nothing there, and later `reset_parameters` fills the bias with other numbers. So
each operation on such tensors is followed while `configure_model` runs. What a module's own `reset_parameters` wrote last
will be written again; what anybody else wrote is lost.
"""

from __future__ import annotations

import copy
import inspect
import os
import sys
from collections.abc import Collection, Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_accel.errors import Unsupported, explain
from lightning_accel.parallel.meta import is_empty, named_tensors, own_tensors

_NOT_THEIRS = (f"{Path(torch.__file__).parent}{os.sep}", __file__, str(copy.__file__))
"""Code that writes for whoever calls it."""
_INIT = nn.init.__file__
_NO_NUMBERS = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty"}
_NO_NUMBERS.add("new_empty_strided")
_OF_VALUES = (torch.tensor, torch.as_tensor, torch.asarray)
"""These fill a tensor on the host and move it, which no dispatch mode sees."""


class Write(NamedTuple):
    """Where numbers were written that the meta device did not keep, and within whose methods."""

    where: str
    resets: tuple[nn.Module, ...]
    """Whose `reset_parameters` ran."""
    inits: tuple[tuple[nn.Module, CodeType], ...]
    """Whose `__init__` ran, before the tensor was its own."""


class MetaWrites:
    """Notes of one `configure_model`.

    >>> notes, net = MetaWrites(), nn.Sequential()
    >>> with notes.taken(net), torch.device("meta"):
    ...     _ = net.append(nn.Linear(2, 2))
    >>> notes.require(net)
    ''
    """

    def __init__(self) -> None:
        self._where: dict[Hashable, str] = {}
        """Of tensors that were followed, where numbers were written that nobody will write again, if they were."""
        self._kept: list[Any] = []
        self._made: dict[int, tuple[Any, Write | None]] = {}
        """By storage, which is kept so that no other one gets its number."""

    @contextmanager
    def taken(self, root: nn.Module | None) -> Iterator[None]:
        """Follow what is made and written within, and see at the end what of `root` is lost."""
        self._where, self._kept, self._made = {}, [], {}
        with _Dispatched(self), _Called(self):
            yield
        for _, module, name, tensor in named_tensors(root) if root is not None else ():
            if not _is_followed(tensor) or _key(tensor) not in self._made:
                continue
            write = self._made[_key(tensor)][1]
            lost = write is not None and not _is_repeated(write, module, tensor)
            where = write.where if write is not None and lost else ""
            where = self._where.setdefault(id(tensor), where)  # what is tied is the first's
            self._where[id(module), name] = where
            self._kept += [module, tensor]
        self._made = {}

    def require(self, root: nn.Module, *, given: Collection[str] = ()) -> str:
        """Raise where numbers are lost, and tell where nobody looked on.

        Args:
            root: Whose tensors that are on the meta device are about to be filled.
            given: Names of those whose numbers come from a checkpoint.

        Returns:
            A warning, where some were made elsewhere.

        Raises:
            Unsupported: Somebody wrote what `reset_parameters` will not.
        """
        found: dict[int, str] = {}
        unseen = ""
        needs = [one for one in named_tensors(root) if is_empty(one[-1])]
        filled = {id(tensor) for full, *_, tensor in needs if full in given}
        for full, module, name, tensor in needs:
            key = id(tensor) if id(tensor) in self._where else (id(module), name)
            where = self._where.get(key)
            if id(tensor) in filled:
                continue
            if where is None:
                unseen = unseen or full
            elif where:
                found.setdefault(id(tensor), f"`{full}` ({type(module).__name__}), {where}")
        if found:
            first, *others = found.values()
            raise Unsupported(
                "numbers that are written on the meta device are lost, but for what the `reset_parameters` of the module "
                "that has the weight wrote last",
                f"{first}{f', and {len(others)} more' if others else ''}",
                "make the network with its weights on the host, which is sharded all the same; or write them in that "
                "module's own `reset_parameters`, and let its `__init__` call it; or go on from a checkpoint or "
                "`load_state_dict(..., assign=True)`",
            )
        what = "weights that were on the meta device before `configure_model` get the numbers of `reset_parameters` only"
        do = "make the layers in `configure_model`, where it is noticed when other numbers are written"
        return explain(what, f"`{unseen}`", do) if unseen else ""

    def note(self, tensor: Tensor) -> None:
        """Note that the caller writes into a tensor."""
        if _is_followed(tensor):
            self._made[_key(tensor)] = (tensor.untyped_storage(), _written(tensor))

    def follow(self, func: Any, given: list[Any], written: list[Any], out: list[Any]) -> None:
        """Note what one operation wrote, made, or took over from another tensor."""
        known = {_key(t) for t in given if _is_followed(t)}
        for tensor in written:
            self.note(tensor)
        for tensor in out:
            if not _is_followed(tensor) or _key(tensor) in known:
                continue
            name = func._schema.name.partition("::")[2]
            source = next((t for t in given if isinstance(t, Tensor)), None)
            if name in _NO_NUMBERS:
                self._made[_key(tensor)] = (tensor.untyped_storage(), None)
            elif name != "_to_copy" or source is None or not _is_followed(source):
                self.note(tensor)
            elif entry := self._made.get(_key(source)):  # another number format of the same
                self._made[_key(tensor)] = (tensor.untyped_storage(), entry[1])


class _Dispatched(TorchDispatchMode):
    def __init__(self, notes: MetaWrites) -> None:
        super().__init__()
        self._notes = notes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        written: list[Any] = []
        if func._schema.is_mutable and torch.Tag.inplace_view not in func.tags:
            by_name = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)}
            by_name |= kwargs
            writes = [
                a.name for a in func._schema.arguments if a.alias_info and a.alias_info.is_write
            ]
            written = tree_leaves([by_name.get(name) for name in writes])
        self._notes.follow(func, tree_leaves((args, kwargs)), written, tree_leaves(out))
        return out


class _Called(TorchFunctionMode):
    """Sees what calls no operation: `trunc_normal_` and others look whether a tensor is on meta, and do nothing."""

    def __init__(self, notes: MetaWrites) -> None:
        super().__init__()
        self._notes = notes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func == _IS_META and _caller().f_code.co_filename == _INIT:
            self._notes.note(args[0])
        elif func in _OF_VALUES:
            self._notes.note(out)
        return out


_IS_META = Tensor.is_meta.__get__  # type: ignore[attr-defined]


def _caller() -> FrameType:
    """Return the frame that called what a `__torch_function__` sees."""
    frame: Any = sys._getframe(2)
    while frame.f_code.co_name == "__torch_function__":
        frame = frame.f_back
    return frame


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata) if _is_followed(tensor) else 0


def _is_followed(tensor: Any) -> bool:
    return is_empty(tensor) and tensor.layout == torch.strided and not is_lazy(tensor)


def _written(tensor: Tensor) -> Write:
    """Return where the caller is, and within which modules' methods."""
    where, resets, inits = "", [], []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        mode = code.co_name == "__torch_function__"  # of Lightning
        if not where and not mode and not code.co_filename.startswith(_NOT_THEIRS):
            where = f"{code.co_filename}:{frame.f_lineno} ({code.co_qualname})"
        if code.co_name in ("reset_parameters", "__init__") and code.co_argcount:
            owner = frame.f_locals.get(code.co_varnames[0])
            if isinstance(owner, nn.Module) and "_parameters" in vars(owner):
                if code.co_name == "reset_parameters":
                    resets.append(owner)
                elif not any(_key(t) == _key(tensor) for _, t in own_tensors(owner)):
                    inits.append((owner, code))
        frame = frame.f_back
    return Write(where, tuple(resets), tuple(inits))


def _is_repeated(write: Write, module: nn.Module, tensor: Tensor) -> bool:
    """Whether the `reset_parameters` of a module writes these numbers again.

    It did so last, or that of a module of its kind, whose tensor this is as well. Or its `__init__` made the tensor with
    numbers, and the class that made it, or one that inherits from it, says how they are reset.
    """
    resets = getattr(type(module), "reset_parameters", None)
    for other in write.resets:
        if getattr(type(other), "reset_parameters", None) is resets and any(
            t is tensor for _, t in own_tensors(other)
        ):
            return True
    codes = [code for other, code in write.inits if other is module]
    for kind in type(module).__mro__ if codes else ():
        if "reset_parameters" in vars(kind):
            return True  # before the class of `__init__` on the way up, or in it
        made = vars(kind).get("__init__")
        if made is not None and getattr(inspect.unwrap(made), "__code__", None) in codes:
            return False
    return False
