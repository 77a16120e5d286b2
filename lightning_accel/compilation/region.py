"""How one kind of block is compiled in place, without the gaps of `nn.Module.compile`.

- That method silently does nothing for classes of torch.nn (`nn.Sequential`, `nn.Linear`, ...), whose frames
  dynamo skips: PyTorch #150915. Compiling a function of ours that calls the module has no such gap. It
  can go when `nn.Sequential(nn.Linear(2, 2)).compile()` captures a graph in the oldest torch we take.
- Each kind has a code object of its own. Dynamo keeps graphs, their limit of eight, and the sizes seen
  so far per code object: kinds that share one would use up the limit, after which all run eagerly, and
  a second width would make the channels of both dynamic. Training and evaluation are kept apart for
  the same reason, and a reshaped block starts with a new one.
- The module keeps its class, its names in the state dict, and copies and pickles as an uncompiled one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import nn

from lightning_accel.arguments import one_of
from lightning_accel.compilation.explain import Capture, note, now, runs_cached_graphs
from lightning_accel.compilation.recompile_policy import CompiledCode
from lightning_accel.compilation.sample import Samples
from lightning_accel.errors import AccelError, explain
from lightning_accel.surgery import Change, Receipt

Backend = str | Callable[..., Any]

_SERIAL = count()
_SCALARS = (bool, int, float, str, tuple, type(None))
_REASONS = 16
"""So many eager calls are looked into for their reason; later ones take the last."""


@dataclass(frozen=True)
class CompileSettings:
    """What is handed to `torch.compile`, and at how many calls a block is compared with itself uncompiled."""

    backend: Backend = "inductor"
    mode: str | None = None
    dynamic: bool | None = None
    fullgraph: bool = False
    check_every_n_calls: int | None = None


class BlockKind:
    """One kind of block: the functions that its blocks share, and what they captured."""

    def __init__(
        self, signature: tuple[Any, ...], settings: CompileSettings, capture: Capture
    ) -> None:
        self.signature = signature
        self.settings = settings
        self.capture = capture
        label = f"{capture.targets[0]} ({capture.kind}) #{next(_SERIAL)}"  # names are not to recur
        self.train = self._code(f"{label} in training")
        self.eval = self._code(f"{label} in evaluation")
        self.refuse = False

    def fits(self, signature: tuple[Any, ...], settings: CompileSettings) -> bool:
        return (self.signature, self.settings) == (signature, settings)

    def again(self) -> BlockKind:
        """Return the same kind with new code, which knows what batches to expect."""
        new = BlockKind(self.signature, self.settings, self.capture)
        new.train.sizes, new.eval.sizes = self.train.sizes, self.eval.sizes
        new.refuse = self.refuse
        return new

    def missed(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note a call that ran eagerly because the block is settled, with the reason."""
        code = self.train if module.training else self.eval
        if not code.strict:
            return  # dynamo gave up, which the capture tells
        code.misses += 1
        told = self.capture.eager
        why = next(reversed(told)) if code.misses > _REASONS else code.why(module, args, kwargs)
        if why is None:
            return  # a graph fits: something else, such as a dispatch mode, keeps dynamo out
        told[why] = told.pop(why, 0) + 1
        if self.refuse:
            raise AccelError(
                f"compiling `{self.capture.name}` again after the warm-up was refused",
                why,
                "make the warm-up longer, give it inputs of one shape, or pass on_recompile='eager'",
            )

    def _code(self, name: str) -> CompiledCode:
        settings = self.settings
        return CompiledCode(
            name,
            self.missed,
            backend=settings.backend,
            mode=settings.mode,
            dynamic=settings.dynamic,
            fullgraph=settings.fullgraph,
        )


class Region:
    """What a compiled module calls instead of its `_call_impl`.

    Graphs contain the hooks that were there when they were captured, and do not notice others: a block
    with hooks of its own shares no graph with others, and one that gets or loses hooks gets new graphs.
    """

    def __init__(self, module: nn.Module, name: str, kind: BlockKind) -> None:
        self.module = module
        self.name = name
        self.kind = kind
        self.capture = kind.capture
        self.hooks = _hooks(module)
        self.inner_hooks = _inner_hooks(module)
        every, backend = kind.settings.check_every_n_calls, kind.settings.backend
        self.samples = None if every is None else Samples(module, backend, every)

    def is_current(self) -> bool:
        """Tell whether module and hooks are those that the graphs were captured with."""
        same = self.kind.signature == signature(self.module)
        return same and self.inner_hooks == _inner_hooks(self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if (hooks := _hooks(module)) != self.hooks:
            self.hooks = hooks
            self.kind = self.kind.again()
        if self.samples is None or torch.compiler.is_compiling():
            return self._run(args, kwargs)
        if self.samples.reason:
            self.capture.called.add(self.name)
            return module._call_impl(*args, **kwargs)
        if not self.samples.is_due() or self._is_paused() or has_hooks(module):
            return self._run(args, kwargs)
        try:
            return self.samples.compare(lambda: self._run(args, kwargs), args, kwargs)
        finally:
            self._tell(self.samples)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before = now()
        run = self.kind.train if self.module.training else self.kind.eval
        try:
            return run(self.module, args, kwargs)
        finally:
            self.capture.called.add(self.name)
            note(self.capture, before)

    def _is_paused(self) -> bool:
        return (self.kind.train if self.module.training else self.kind.eval).paused

    def _tell(self, samples: Samples) -> None:
        if samples.reason:
            self.capture.called.add(self.name)
            self.capture.stopped[self.name] = samples.reason
        elif samples.left_out:
            self.capture.uncompared[self.name] = samples.left_out


def region(module: nn.Module) -> Region | None:
    """Return how we compiled this module, or `None`."""
    found = module._compiled_call_impl
    return found if isinstance(found, Region) else None


def attach(
    targets: dict[str, nn.Module], settings: CompileSettings, renew: bool = False
) -> Receipt:
    """Compile modules by name, those alike as one kind; what is compiled so already stays.

    Args:
        targets: Modules by their names in the model.
        settings: How to compile.
        renew: Take new code also where it fits.
    """
    kinds: dict[tuple[Any, ...], BlockKind] = {}
    changes = []
    for name, module in targets.items():
        same, present = signature(module), region(module)
        key = (same, *(_hooks(m) for m in module.modules()))
        if present is not None and not renew and present.kind.fits(same, settings):
            kinds.setdefault(key, present.kind)
            continue
        if key not in kinds:
            kinds[key] = BlockKind(same, settings, Capture([name], type(module).__name__))
        elif name not in kinds[key].capture.targets:
            kinds[key].capture.targets.append(name)
        module._compiled_call_impl = Region(module, name, kinds[key])
        after = f"{type(module).__name__} by {_name(settings.backend)}"
        changes.append(Change(name, "compiled", "eager" if present is None else "compiled", after))
    return Receipt(tuple(changes))


def recompile(model: nn.Module) -> Receipt:
    """Start every block with new code after some were reshaped or got hooks inside; falsy when none was.

    So each kind is captured once more, with static sizes. Where graphs break, dynamo also keeps graphs for
    the user's own functions, which have no new code; there all of dynamo is reset, or the old shapes would
    use up its limit after a few prunes. So it is with modes, whose CUDA graphs hold memory. Other
    compiled modules of this process then compile again at their next call, and stay correct.
    """
    regions = {r.name: r for m in model.modules() if (r := region(m)) is not None}
    if all(r.is_current() for r in regions.values()):
        return Receipt()
    if any(r.capture.breaks or r.kind.settings.mode for r in regions.values()):
        torch._dynamo.reset()
    settings = {r.kind.settings for r in regions.values()}
    receipt = Receipt()
    for one in settings:
        same = {n: r.module for n, r in regions.items() if r.kind.settings == one}
        receipt = receipt + attach(same, one, renew=True)
    return receipt


def ask(model: nn.Module) -> None:
    """Let every compiled block be compared with itself uncompiled at its next call."""
    for module in model.modules():
        found = region(module)
        if found is not None and found.samples is not None:
            found.samples.ask()


def without_effect(model: nn.Module) -> list[Capture]:
    """Return the captures of blocks that were called and run eagerly all the same."""
    found: dict[int, Capture] = {}
    regions = [r for m in model.modules() if (r := region(m)) is not None and r.capture.called]
    for one in regions:
        if one.name in one.capture.stopped:
            continue
        if not one.capture.graphs and not runs_cached_graphs(one.module):
            found[id(one.capture)] = one.capture
    return list(found.values())


def expect(
    model: nn.Module, *, training: bool, sizes: frozenset[int], refuse: bool = False
) -> None:
    """Tell every block what sizes of batch will come; more than one makes that dimension dynamic.

    Args:
        model: The network with compiled blocks.
        training: Whether that is in training or in evaluation.
        sizes: All sizes that will come.
        refuse: Raise where a settled block finds no graph that fits.
    """
    for kind in _kinds(model):
        code = kind.train if training else kind.eval
        code.sizes = sizes if len(sizes) > 1 and kind.settings.dynamic is None else frozenset()
        kind.refuse = refuse


def settle(model: nn.Module, *, training: bool | None = None) -> None:
    """End the warm-up of every block that was called: calls that no graph fits run eagerly from now.

    Where most calls since the last time did so, what changed is there to stay, and the block may be
    compiled again until the next time.
    """
    for kind in _kinds(model):
        if training is not False:
            kind.train.settle()
        if training is not True:
            kind.eval.settle()


def pause(model: nn.Module, paused: bool = True) -> None:
    """Let settled blocks be compiled again for as long as others use them, to measure them."""
    for kind in _kinds(model):
        kind.train.paused = kind.eval.paused = paused


def unsettle(model: nn.Module) -> None:
    """Let every block be compiled again whenever dynamo wants to."""
    for kind in _kinds(model):
        for code in (kind.train, kind.eval):
            code.settled = code.paused = False
            code.calls = code.misses = 0


def check(backend: Backend, mode: str | None) -> None:
    """Raise unless `torch.compile` knows the backend and the mode, and they go together."""
    if isinstance(backend, str):
        known = torch.compiler.list_backends(exclude_tags=())
        one_of("backend", backend, known)
    if mode is None:
        return
    if backend != "inductor":
        raise ValueError(
            explain(
                "modes belong to backend='inductor'", f"mode={mode!r} with {backend!r}", "drop it"
            )
        )
    from torch._inductor import list_mode_options

    one_of("mode", mode, list(list_mode_options()))


def signature(module: nn.Module) -> tuple[Any, ...]:
    """Return what decides whether two blocks can share a graph: classes, shapes and numbers read.

    Integers that a user's class holds, such as the index of a layer, mostly are not read and do not count.
    """
    inner = [(name, type(m), _numbers(m)) for name, m in module.named_modules()]
    tensors = (*module.named_parameters(), *module.named_buffers())
    return (*inner, *((n, tuple(t.shape), t.dtype, t.requires_grad) for n, t in tensors))


def is_of_torch(module: nn.Module) -> bool:
    """Tell whether the class is one of torch.nn."""
    return type(module).__module__.startswith("torch.nn.")


def _kinds(model: nn.Module) -> Iterator[BlockKind]:
    kinds = (r.kind for m in model.modules() if (r := region(m)) is not None)
    yield from {id(kind): kind for kind in kinds}.values()


def _numbers(module: nn.Module) -> tuple[Any, ...]:
    ours = type(module).__module__.startswith(
        "lightning_accel."
    )  # layers of torch that became others
    read = _SCALARS if ours or is_of_torch(module) else (float,)
    values = {k: v for k, v in vars(module).items() if isinstance(v, read) and k != "training"}
    return tuple((k, v) for k, v in values.items() if not k.startswith("_") and _is_hashable(v))


def _hooks(module: nn.Module) -> tuple[int, ...]:
    held = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return tuple(id(hook) for hooks in held if hooks for hook in hooks.values())


def has_hooks(module: nn.Module) -> bool:
    """Tell whether a call runs hooks, which may write anywhere."""
    return any(m._forward_pre_hooks or m._forward_hooks for m in module.modules())


def _inner_hooks(module: nn.Module) -> tuple[tuple[int, ...], ...]:
    """Return the hooks of the modules inside; looking costs too much for every call."""
    return tuple(_hooks(m) for m in module.modules() if m is not module)


def _is_hashable(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_hashable(item) for item in value)
    return isinstance(value, _SCALARS)


def _name(backend: Backend) -> str:
    return backend if isinstance(backend, str) else getattr(backend, "__name__", repr(backend))
