"""One number for all that the forward of a network reads: the digest of its footprint.

A `Footprint` tells within a process whether a network is still what it was; its digest tells the same between
processes, so that what one run computed may be used by another. It goes the same way, and is exact where a
footprint samples: every bit of every tensor, attributes and what they hold, configurations, the order of
modules, flags, hooks, and the code: of forwards, of functions among the attributes, and of whatever these name in
their classes, modules and closures. What comes from an installed package counts by its name and version.

Nothing of it depends on the place of an object in memory, on the seed of Python's hashes or on the process.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import io
import logging
import random
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_accel.errors import AccelError
from lightning_accel.surgery.held import EVERYWHERE, IDLE, OURS
from lightning_accel.surgery.origin import (
    function_of,
    is_a,
    is_installed,
    is_operator,
    is_own,
    name_of,
    names_in,
    version_of,
)
from lightning_accel.surgery.preserve import generator_state

_PLAIN = (
    bool, int, float, complex, str, bytes, bytearray, type(None), type(Ellipsis), slice, range,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, np.dtype, Path,
)  # fmt: skip
_PARTS = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OF_A_FIT = (
    "_log_hyperparams", "_device", "_param_requires_grad_state", "_current_fx_name", "_compiler_ctx",
    "_metric_attributes", "_example_input_array", "_automatic_optimization", "_hparams_initial",
    "_dtype", "_jit_is_scripting", "_fabric_optimizers", "_device_mesh", "_strict_loading",
)  # fmt: skip
"""What Lightning keeps in a LightningModule and no forward reads."""
_OF_HOOKS = (
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
    "_is_full_backward_hook", "_backward_hooks",
)  # fmt: skip
"""Numbers of hooks, which count on from one process to the next."""
_PICKLING = ("__reduce__", "__reduce_ex__", "__getstate__")
_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


def digest(module: nn.Module) -> str:
    """Return a digest of all that the outputs of a module depend on besides its arguments.

    Args:
        module: The network, in the mode in which it will run.

    Raises:
        AccelError: Something that the forward may read has no content that can be told.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
    >>> before = digest(net)
    >>> net[1].p = 0.2
    >>> digest(net) == before
    False
    """
    names = {"forward"}
    while True:  # what code names leads to more code
        look = _Reading(names, content=False)
        look.all(module)
        if look.found <= names:
            break
        names |= look.found
    return _Reading(names).all(module)


class _Reading:
    """Adds values to a digest; equal content counts alike, wherever it is held.

    Args:
        names: What the code that runs can name.
        content: Whether tensors count as well, and what cannot be told is refused.
    """

    def __init__(self, names: set[str], *, content: bool = True) -> None:
        self.names, self.content = frozenset(names), content
        self.found: set[str] = set()
        """Names in the code that was met."""
        self._sum = hashlib.sha256()
        self._known: dict[int, bytes] = {}
        self._alive: list[Any] = []  # so that no id comes again

    def all(self, module: nn.Module) -> str:
        """Return the digest of a module and its world."""
        self.add(sys.version_info[:2], torch.__version__)
        self.take(module, "")
        for what, hooks in EVERYWHERE:
            self.take([_plain(hook) for hook in hooks.values()], what)
        return self._sum.hexdigest()

    def add(self, *words: Any) -> None:
        for word in words:
            text = word if isinstance(word, (bytes, memoryview)) else str(word).encode()
            self._sum.update(struct.pack("<q", len(text)))
            self._sum.update(text)

    def take(self, value: Any, where: str) -> None:
        """Add a value; `where` is its place, for messages."""
        if isinstance(value, _PLAIN):
            self.add(type(value).__name__, repr(value))
            return
        if id(value) not in self._known:
            self._known[id(value)] = b"within itself"
            self._alive.append(value)
            outer, self._sum = self._sum, hashlib.sha256()
            try:
                self._way(value)(value, where)
                self._known[id(value)] = self._sum.digest()
            except BaseException:
                del self._known[id(value)]
                raise
            finally:
                self._sum = outer
        self.add(self._known[id(value)])

    def _way(self, value: Any) -> Callable[[Any, str], None]:
        for kinds, name in _WAYS:
            if isinstance(value, kinds):
                way: Callable[[Any, str], None] = getattr(self, name)
                return way
        return self._routine if inspect.isroutine(value) else self._object

    def _refuse(self, value: Any, where: str) -> None:
        if self.content:
            raise AccelError(
                f"the content of `{where or 'the network'}` cannot be told, so no file may stand for what "
                "this network says",
                f"{type(value).__module__}.{type(value).__qualname__}",
                "keep it out of the network, or leave the cache out (`cache=None`)",
            )

    # --- tensors and containers -------------------------------------------------------------------

    def _tensor(self, value: Tensor, where: str) -> None:
        value = value.detach()
        self.add("tensor", value.dtype, tuple(value.shape), value.layout)
        if not self.content:
            return
        if hasattr(value, "__tensor_flatten__"):
            names, context = value.__tensor_flatten__()
            self.add(type(value).__qualname__)
            self.take([*(getattr(value, name) for name in names), context], where)
        elif value.is_quantized:
            self.take([value.int_repr(), str(value.qscheme()), value.dequantize()], where)
        elif value.layout == torch.sparse_coo:
            self.take([value.coalesce().indices(), value.coalesce().values()], where)
        elif value.layout == torch.sparse_csr:
            self.take([value.crow_indices(), value.col_indices(), value.values()], where)
        elif value.is_meta or value.layout != torch.strided:
            self._refuse(value, where)
        elif value.numel():
            flat = value.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
            self.add(flat.view(torch.uint8).numpy().data)

    def _array(self, value: Any, where: str) -> None:
        self.add("array", value.dtype, value.shape)
        if value.dtype.hasobject:
            self.take(value.reshape(-1).tolist(), where)
        else:
            self.add(np.ascontiguousarray(value).tobytes())

    def _mapping(self, value: Any, where: str) -> None:
        self.add(name_of(type(value)), len(value))
        for key, item in value.items():
            self.take(key, where)
            self.take(item, f"{where}.{key}")

    def _sequence(self, value: Any, where: str) -> None:
        self.add(name_of(type(value)), len(value))
        for number, item in enumerate(value):
            self.take(item, f"{where}.{number}")

    def _set(self, value: Any, where: str) -> None:
        """Sets have no order that comes again."""
        own = []
        for item in value:
            outer, self._sum = self._sum, hashlib.sha256()
            try:
                self.take(item, where)
                own.append(self._sum.hexdigest())
            finally:
                self._sum = outer
        self.add(type(value).__name__, *sorted(own))

    # --- code ---------------------------------------------------------------------------------------

    def _function(self, value: FunctionType, where: str) -> None:
        if is_installed(value):
            self.add(name_of(value), version_of(value.__module__))
            if hasattr(value, "__wrapped__"):  # a decorator of torch's around code of the user's
                self.take(value.__wrapped__, where)
            return
        self.add("function")
        self._code(value.__code__)
        self.take([value.__defaults__, value.__kwdefaults__], where)
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # a name that its function has not bound yet
                self.take(cell.cell_contents, f"{where}, in the closure of {value.__name__}")
        for name in sorted(names_in(value.__code__) & value.__globals__.keys()):
            self.add(name)
            self.take(value.__globals__[name], f"{name}, which {value.__name__} names")
        self.take(vars(value), where)

    def _code(self, code: CodeType) -> None:
        self.found |= names_in(code)
        self.add(code.co_code, code.co_names, code.co_varnames, code.co_freevars)
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                self._code(constant)
            else:
                self.take(constant, "")

    def _method(self, value: MethodType, where: str) -> None:
        self.take([value.__func__, value.__self__], where)

    def _routine(self, value: Any, where: str) -> None:
        self.add(name_of(value))
        owner = getattr(value, "__self__", None)
        if owner is not None and not isinstance(owner, (ModuleType, type)):
            self.take(owner, where)

    def _partial(self, value: Any, where: str) -> None:
        self.take([value.func, value.args, value.keywords], where)

    def _operator(self, value: Any, where: str) -> None:
        self.add(str(value))

    def _class(self, value: type, where: str) -> None:
        """Add what the code that runs can name in a class."""
        self.add(name_of(value), version_of(value.__module__))
        for kind in value.__mro__:
            installed = is_installed(kind)
            for name, member in sorted(vars(kind).items()):
                member = function_of(member)
                used = name in self.names or (
                    is_operator(name) and isinstance(member, FunctionType)
                )
                if used and (not installed or (callable(member) and not is_installed(member))):
                    self.add(name)
                    self.take(member, f"{where} {kind.__name__}.{name}".strip())

    def _python_module(self, value: ModuleType, where: str) -> None:
        self.add(value.__name__, version_of(value.__name__))
        if not is_installed(value):
            for name in sorted(self.names & vars(value).keys()):
                self.add(name)
                self.take(vars(value)[name], f"{value.__name__}.{name}")

    # --- objects ------------------------------------------------------------------------------------

    def _network(self, value: nn.Module, where: str) -> None:
        if is_a(value, "torch._dynamo."):  # not by its class, whose import takes seconds
            self.take(vars(value)["_modules"]["_orig_mod"], where)
            return
        self.take(type(value), where)
        if is_a(value, "torchmetrics.metric"):
            return  # it measures, and grows with every batch
        if isinstance(value, torch.jit.ScriptModule):
            self._scripted(value)
            return
        held = dict(vars(value))
        for name in _PARTS:
            self.add(name)
            for key, part in held.pop(name).items():  # in order: a Sequential runs them so
                self.add(key)
                self.take(part, f"{where}.{key}".strip("."))
        for name in _HOOKS:
            hooks = map(_plain, held.pop(name, {}).values())
            self.take([hook for hook in hooks if not hasattr(hook, "_accel_own")], f"{where} hooks")
        unread: tuple[str, ...] = (*IDLE, *OURS, *_OF_HOOKS)
        unread += _OF_A_FIT if is_a(value, "lightning.") else ()
        unread += ("_graph",) if isinstance(value, torch.fx.GraphModule) else ()  # its code tells
        self._attributes(value, {k: v for k, v in held.items() if k not in unread}, where)

    def _scripted(self, value: torch.jit.ScriptModule) -> None:
        archive = io.BytesIO()
        torch.jit.save(value, archive)
        self.add(archive.getvalue())

    def _attributes(self, holder: Any, held: Mapping[str, Any], where: str) -> None:
        for name in sorted(held):
            self.add(name)
            try:
                self.take(held[name], f"{where}.{name}".strip("."))
            except AccelError:
                if name in self.names or not is_own(type(holder)):
                    raise
                self.add("no code that runs names it")

    def _object(self, value: Any, where: str) -> None:
        held = _held_by(value)
        if held is None:
            self._refuse(value, where)
            return
        self.take(type(value), where)
        self._attributes(value, held, where)

    def _enum(self, value: Enum, where: str) -> None:
        self.add(name_of(type(value)), value.name)
        self.take(value.value, where)

    def _logger(self, value: logging.Logger, where: str) -> None:
        self.add("logger")  # what it says changes no output

    def _generator(self, value: Any, where: str) -> None:
        self.add(type(value).__name__)
        self.take(generator_state(value), where)


_WAYS: tuple[tuple[Any, str], ...] = (
    (Tensor, "_tensor"),
    (nn.Module, "_network"),
    ((np.ndarray, np.generic), "_array"),
    (Enum, "_enum"),
    (type, "_class"),
    (Mapping, "_mapping"),
    ((list, tuple, deque), "_sequence"),
    ((set, frozenset), "_set"),
    (FunctionType, "_function"),
    (MethodType, "_method"),
    (functools.partial, "_partial"),
    (ModuleType, "_python_module"),
    (logging.Logger, "_logger"),
    (_GENERATORS, "_generator"),
    ((torch._ops.OpOverload, torch._ops.OpOverloadPacket, np.ufunc), "_operator"),
)


def _held_by(value: Any) -> dict[str, Any] | None:
    """Return what makes up an object: attributes, slots, and what would be pickled of it where it says how."""
    slots = [
        slot
        for kind in type(value).__mro__
        for slot in _listed(vars(kind).get("__slots__", ()))
        if slot not in ("__dict__", "__weakref__")
    ]
    held = {slot: getattr(value, slot) for slot in slots if hasattr(value, slot)}
    held |= {str(name): item for name, item in getattr(value, "__dict__", {}).items()}
    known = hasattr(value, "__dict__") or bool(slots)
    if known and all(getattr(type(value), n) is getattr(object, n) for n in _PICKLING):
        return held
    try:
        reduced = value.__reduce_ex__(4)
    except Exception:  # whatever an object does that cannot be pickled
        return held if known else None
    parts = [reduced] if isinstance(reduced, str) else [p for p in reduced if not callable(p)]
    return {**held, **{f"pickled {number}": part for number, part in enumerate(parts)}}


def _listed(slots: str | Iterable[str]) -> list[str]:
    return [slots] if isinstance(slots, str) else list(slots)


def _plain(hook: Any) -> Any:
    return getattr(hook, "hook", hook)  # some come wrapped
