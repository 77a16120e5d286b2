"""Which residual blocks can go as a whole.

Found by structure, whatever a network is made of and however it holds its blocks: each module is silenced where it
is called, in evaluation and in training, with the network's weights and with their signs turned, and has to hand on
what it gets. A block that passes is left out only if nothing else hangs on it: what is frozen, not selected, or read
by somebody's hook stays, with its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_accel.errors import BrokenModel
from lightning_accel.measure.flops import unfused
from lightning_accel.pruning.silence import Handed, handed_on
from lightning_accel.surgery import Change, Cut, Select, Structure, twin
from lightning_accel.surgery.acting import FORWARD, is_of_torch
from lightning_accel.surgery.bypass import Bypass, Handing, is_recorder
from lightning_accel.surgery.call import Call, run, same_random_state

_CALLS = 4  # of one module in one run that are looked at
_HOOKS = (*FORWARD, "_backward_hooks", "_backward_pre_hooks")
_ROWS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Block(NamedTuple):
    """A block that can go, and how it hands on its input."""

    name: str
    handing: Handing


class Blocks(NamedTuple):
    """The blocks that can go, and those that look like one and cannot, with reasons."""

    found: list[Block]
    refused: list[Change]


def find_blocks(
    model: nn.Module,
    settings: Sequence[tuple[nn.Module, Sequence[Call]]],
    *,
    select: Select,
    tolerance: float,
) -> Blocks:
    """Return the residual blocks of a network; change nothing.

    Args:
        model: The user's own network, for what hangs on it.
        settings: Copies of it, with the hooks that act, and what to run each on.
        select: Blocks that may go: they, or all of their layers, must be among these.
        tolerance: How far what a silenced block gives may be from what it got.
    """
    names = list(
        _candidates(settings[0][0], {call.name for _, calls in settings for call in calls})
    )
    screen = _Screen(names, tolerance)
    for network, calls in settings:
        for one in (network, twin(network).train()):
            with suppress(Exception):  # it may not train, or not run with its signs turned
                screen.run(one, calls)
    whole = _outer(settings[0][0], [name for name in names if name in screen.handed])
    refused = [Change(n, why) for n, why in _refused(settings[0][0], whole, screen.whys).items()]
    found = []
    for name in whole:
        why = why_kept(model, name, select)
        if why:
            refused.append(Change(name, why))
        else:
            found.append(Block(name, screen.handed[name].handing()))
    return Blocks(found, refused)


def cut_of(model: nn.Module, blocks: Sequence[Block]) -> Cut:
    """Return the cut that takes these blocks out; of two of which one is within the other, the outer one."""
    names = {block.name for block in blocks}
    handings = {
        b.name: b.handing for b in blocks if not any(b.name.startswith(f"{n}.") for n in names)
    }
    return Cut(before=Structure(bypassed=handings).built(model), bypassed=handings)


def why_kept(model: nn.Module, name: str, select: Select) -> str:
    """Return why a block must stay for what hangs on it; empty if it may go."""
    block = model.get_submodule(name)
    frozen = next((n for n, p in block.named_parameters() if not p.requires_grad), None)
    if frozen is not None:
        return f"`{name}.{frozen}` is frozen"
    layers = [(n, m) for n, m in block.named_modules(prefix=name) if _is_layer(m)]
    chosen = select.matches(name, block) or all(select.matches(n, m) for n, m in layers)
    excluded = Select(exclude=select.exclude)
    if not chosen or not all(excluded.matches(n, m) for n, m in layers):
        return "not among what `select` chooses"
    for inner, module in block.named_modules(prefix=name):
        if inner != name and any(_reads(module)):
            return f"a hook reads `{inner}`"
        if vars(module).get("layer_idx") == 0 and _is_counted(model):
            return "caches of keys and values count their length by this layer, the first"
    return ""


class _Screen:
    """Silences modules where they are called, and notes what they hand on, or why they do not."""

    def __init__(self, names: Sequence[str], tolerance: float) -> None:
        self.handed: dict[str, Handed] = {}
        self.whys: dict[str, str] = {}
        self._names = names
        self._tolerance = tolerance
        self._calls: Counter[str] = Counter()

    def run(self, network: nn.Module, calls: Sequence[Call]) -> None:
        self._calls.clear()
        with (
            torch.no_grad(),
            same_random_state(network, seed=0),
            unfused(network),
            self._listening(network),
        ):
            run(network, calls)

    @contextmanager
    def _listening(self, network: nn.Module) -> Iterator[None]:
        open_ = [name for name in self._names if name not in self.whys]
        handles = [
            network.get_submodule(name).register_forward_pre_hook(
                partial(self._try, name), with_kwargs=True
            )
            for name in open_
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _try(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._calls[name] += 1
        if name in self.whys or self._calls[name] > _CALLS:
            return
        copy = twin(module)
        for registry in _HOOKS:  # its own hooks stay with what stands in its place
            vars(copy)[registry].clear()
        try:
            with same_random_state(copy):
                found = handed_on(copy, args, kwargs, self._tolerance)
            known = self.handed.get(name)
            self.handed[name] = found if known is None else known.joined(found)
        except BrokenModel as error:
            self.whys[name] = str(error).rstrip(".")
        except Exception as error:  # whatever a forward may raise without its weights
            self.whys[name] = f"without its weights it fails ({type(error).__name__}: {error})"
        if name in self.whys:
            self.handed.pop(name, None)


def _candidates(model: nn.Module, called: set[str]) -> Iterator[str]:
    """Yield the modules that could be blocks: with weights, made of parts or the user's own, not the whole."""
    for name, module in model.named_modules():
        if any(one == name or one.startswith(f"{name}.") for one in called) or not name:
            continue
        own = type(module).__module__.startswith("torch.nn.")
        single = own and not any(True for _ in module.children())
        held = any(True for _ in module.parameters())
        if held and not single and type(module) not in _ROWS and not isinstance(module, Bypass):
            yield name


def _outer(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Leave out what consists of other blocks only: a stage, an encoder."""

    def inner(name: str) -> list[str]:
        return [other for other in names if other.startswith(f"{name}.")]

    def own(name: str) -> set[int]:
        return {id(p) for p in model.get_submodule(name).parameters()}

    return [n for n in names if own(n) - set().union(*map(own, inner(n)))]


def _refused(model: nn.Module, found: Sequence[str], whys: Mapping[str, str]) -> dict[str, str]:
    """Return what looks like a block and is none: of a class that repeats, beside and not inside of others."""
    modules = dict(model.named_modules())
    kinds = Counter(type(module) for module in modules.values())
    composed = {
        n: why
        for n, why in whys.items()
        if any(p is not None for child in modules[n].children() for p in child.parameters())
    }
    known = [*found]
    listed = {}
    for name, why in composed.items():
        related = any(_related(name, other) for other in known)
        if kinds[type(modules[name])] > 1 and not related:
            listed[name] = why
            known.append(name)
    return listed


def _related(one: str, other: str) -> bool:
    return one.startswith(f"{other}.") or other.startswith(f"{one}.")


def _is_layer(module: nn.Module) -> bool:
    return any(p is not None and p.dim() > 1 for p in module._parameters.values())


def _reads(module: nn.Module) -> Iterator[bool]:
    """Yield for each hook that somebody has on a module; one that only lays out memory reads nothing."""
    for registry in _HOOKS:
        for hook in vars(module).get(registry, {}).values():
            ours = _place(hook).startswith("lightning_accel.precision")
            if not is_of_torch(hook) and not is_recorder(hook) and not ours:
                yield True


def _place(hook: Callable[..., Any]) -> str:
    hook = getattr(hook, "hook", hook)  # of a copy
    return str(getattr(hook, "__module__", "") or type(hook).__module__)


def _is_counted(model: nn.Module) -> bool:
    """Whether layers are numbered, as those of transformers that share a cache are."""
    return any(vars(module).get("layer_idx", 0) for module in model.modules())
