"""What a network received and gave in the forward that happens anyway: arguments, output, features.

Hooks on the network and on the tapped layers write onto a tape, while it records. So no forward is made
twice and the user's step needs no change. Dynamo traces the hooks as a part of a compiled network, where
they give more outputs; copies and pickles of the network have hooks that do nothing.

An operation that changes a tensor in place after its tap (`nn.ReLU(inplace=True)` behind a batch norm)
silently changes what was tapped. The version counters of the tensors tell; within a compiled graph they
do not, so a compiled network runs once more without its code, on a copy (`rehearsal.again`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_accel.errors import AccelError, NoEffect
from lightning_accel.surgery.call import tensors

INPUT = "@input"
_NAMED = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.KEYWORD_ONLY,
)


class ForwardRecord(NamedTuple):
    """One call of a network: its arguments, what it returned, and what the tapped layers gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    taps: dict[str, Tensor]
    names: tuple[str, ...] = ()
    """Of the parameters of the network's forward."""

    def named(self) -> dict[str, Any]:
        """Return the arguments by name, as far as the forward names them.

        >>> ForwardRecord((1, 2), {"labels": 3}, None, {}, ("ids", "mask", "labels")).named()
        {'ids': 1, 'mask': 2, 'labels': 3}
        """
        return {**dict(zip(self.names, self.args, strict=False)), **self.kwargs}


class ForwardRecorder:
    """Record the calls of one network.

    Args:
        model: The network.
        taps: Layers by name whose outputs are kept; `"name@input"` keeps the first input instead.
        role: Who the network is, in messages.

    Raises:
        NoEffect: There is no layer of that name.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    >>> tape = ForwardRecorder(net, ["0"])
    >>> with tape.recording():
    ...     out = net(torch.ones(4, 2))
    >>> tape.records()[0].taps["0"].shape
    torch.Size([4, 3])
    """

    def __init__(
        self, model: nn.Module, taps: Sequence[str] = (), *, role: str = "the student"
    ) -> None:
        self.model, self.role = model, role
        self.taps = tuple(dict.fromkeys(taps))
        self._state = _State()
        self._names = parameter_names(model)
        self._handles = [*_root_hooks(model, self._state)]
        for name in self.taps:
            self._handles.append(_tap_hook(model, name, self._state))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Forget what was recorded, and record the calls of this block."""
        self._state.clear()
        self._state.on = True
        try:
            yield
        finally:
            self._state.on = False

    def has_answered(self) -> bool:
        """Tell whether a call of the network has come to its end."""
        return bool(self._state.outputs)

    def records(self) -> list[ForwardRecord]:
        """Return the recorded calls, after a check that nothing tapped was changed in place.

        Raises:
            AccelError: A tensor was changed in place after its tap, or a tapped layer gave no tensor
                or was called several times in one call of the network.
        """
        records, start = [], 0
        for (args, kwargs), (output, end) in zip(
            self._state.inputs, self._state.outputs, strict=False
        ):
            seen = self._state.tapped[start:end]
            records.append(ForwardRecord(args, kwargs, output, self._by_name(seen), self._names))
            start = end
        for what, value, version in self._state.versions:
            if value._version != version:
                _raise_in_place(self.model, self.role, what)
        return records

    def clear(self) -> None:
        """Let go of all tensors."""
        self._state.clear()

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._state.clear()

    def _by_name(self, seen: list[tuple[str, Any]]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, value in seen:
            inner = tensors(value)
            if not inner:
                raise AccelError(
                    f"the tapped layer `{name}` gave no tensor", type(value).__name__, "tap another"
                )
            if name in found:
                raise AccelError(
                    f"the tapped layer `{name}` was called several times in one forward",
                    "so it is not clear which of its outputs is meant",
                    "tap a layer around it that is called once",
                )
            found[name] = inner[0]
        missing = [name for name in self.taps if name not in found]
        if missing:
            raise NoEffect(
                f"the tapped layer `{missing[0]}` was not called as a module",
                f"{len(found)} of {len(self.taps)} taps fired; hooks that come after the first call of "
                "a compiled network never do",
                "tap a layer that the forward calls, or call `torch._dynamo.reset()` before the fit",
            )
        return found


def parameter_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a forward's parameters; of a wrapper that takes anything, those of the one inside.

    >>> parameter_names(nn.Linear(1, 1))
    ('input',)
    """
    try:
        listed = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return ()
    inside = [child for child in model.children() if type(child).forward is not nn.Module.forward]
    if listed and listed[0].kind is inspect.Parameter.VAR_POSITIONAL and len(inside) == 1:
        return parameter_names(inside[0])
    return tuple(p.name for p in listed if p.kind in _NAMED)


def layer(model: nn.Module, name: str) -> nn.Module:
    """Return the layer that a tap names, compiled networks included."""
    found: Any = model
    for part in name.removesuffix(INPUT).split(".") if name.removesuffix(INPUT) else ():
        found = getattr(found, part, None)
        if not isinstance(found, nn.Module):
            raise NoEffect(
                f"there is no layer `{name}` to tap",
                f"{type(model).__name__} with {', '.join(n for n, _ in model.named_children())}",
                "name a layer as in `named_modules()`",
            )
    return found


class _State:
    """What the hooks write to; dynamo follows plain attributes and lists."""

    def __init__(self) -> None:
        self.on = False
        self.clear()

    def clear(self) -> None:
        self.inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.outputs: list[tuple[Any, int]] = []
        self.tapped: list[tuple[str, Any]] = []
        self.versions: list[tuple[str, Tensor, int]] = []


class _Hook:
    """A hook that writes to a tape; a copy or a pickle of the network gets one that does nothing."""

    _accel_own = True

    def __init__(self, state: _State, name: str = "") -> None:
        self.state, self.name = state, name

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _silent

    def __reduce__(self) -> Any:
        return _make_silent, ()


class _Enter(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.state.on:
            self.state.inputs.append((args, kwargs))
            if not torch.compiler.is_compiling():
                _note_versions(self.state, "an argument of the network", (args, kwargs))


class _Leave(_Hook):
    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.state.on:
            self.state.outputs.append((output, len(self.state.tapped)))
            if not torch.compiler.is_compiling():
                _note_versions(self.state, "the network's output", output)


class _TakeOutput(_Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        _take(self.state, self.name, output)


class _TakeInput(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _take(self.state, self.name, args[0] if args else next(iter(kwargs.values()), None))


def _take(state: _State, name: str, value: Any) -> None:
    if state.on:
        state.tapped.append((name, value))
        if not torch.compiler.is_compiling():
            _note_versions(state, f"what `{name}` gave", value)


def _silent(*_: Any) -> None:
    """Do nothing."""


def _make_silent() -> Any:
    return _silent


def _root_hooks(model: nn.Module, state: _State) -> tuple[RemovableHandle, RemovableHandle]:
    return (
        model.register_forward_pre_hook(_Enter(state), with_kwargs=True),
        model.register_forward_hook(_Leave(state), with_kwargs=True),
    )


def _tap_hook(model: nn.Module, name: str, state: _State) -> RemovableHandle:
    target = layer(model, name)
    if name.endswith(INPUT):
        return target.register_forward_pre_hook(_TakeInput(state, name), with_kwargs=True)
    return target.register_forward_hook(_TakeOutput(state, name))


def _note_versions(state: _State, what: str, value: Any) -> None:
    for tensor in tensors(value):
        if not tensor.is_inference():
            state.versions.append((what, tensor, tensor._version))


def _raise_in_place(model: nn.Module, role: str, what: str) -> None:
    suspects = [n for n, m in model.named_modules() if getattr(m, "inplace", False) is True]
    raise AccelError(
        f"{what} was changed in place, in {role} or after it, before it could be used",
        f"in-place layers: {', '.join(suspects[:6])}"
        if suspects
        else f"an operation such as `relu_` or `+=`, within {type(model).__name__} or after it",
        "set inplace=False there, or tap the layer after it",
    )
