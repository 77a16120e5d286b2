"""The hooks that take part in a forward, told from those that only watch.

A hook that scales an output, or hands on what a module gave, is part of what a network computes, so a copy on
which an edit is planned and proved must have it. A hook that writes a log must not be heard from a copy. One run
tells them apart: a hook takes part if it returns something, changes what it is given, or sets something on its
module. If the outputs still are not those of the network with all of its hooks (some hand on what they saw behind
everyone's back), all are kept.

A copied hook reads what it holds of the network in the copy. What else it holds it shares with the forward, so
it is not copied; `nothing_heard` puts lists, dicts, sets and numbers back to what they held.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import threading
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_accel.errors import AccelError
from lightning_accel.surgery.call import Call, ModuleT, run, same_random_state, tensors
from lightning_accel.surgery.owners import ATOMS

_ALL: Any = nn.modules.module  # which knows the hooks of all modules
_REGISTRIES = {OrderedDict, dict, set}
_WAYS = ("__new__", "__reduce__", "__reduce_ex__", "__getstate__")
_CONTAINERS = (list, dict, set, OrderedDict, defaultdict, deque)
FORWARD = ("_forward_pre_hooks", "_forward_hooks")
attendants: list[Callable[[nn.Module, nn.Module, bool], None]] = []
HOOKS = (
    *FORWARD,
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


_ANEW: dict[type, Callable[[Any], Any]] = {
    type(threading.Lock()): lambda _: (threading.Lock, ()),
    type(threading.RLock()): lambda _: (threading.RLock, ()),
    threading.local: lambda local: (threading.local, (), vars(local)),
}


class Acting:
    """A hook that takes part in the forward; copies of a network keep it, bound to the copy.

    Args:
        hook: The hook.
        acts: Whether it is known to take part.
    """

    def __init__(self, hook: Callable[..., Any], *, acts: bool = True) -> None:
        self.hook = hook
        self.acts = acts

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        held = [t for t in tree_leaves(given) if isinstance(t, Tensor)]
        before = _versions(held), _own(module)
        result = self.hook(module, *given)
        after = _versions(held), _own(module)
        self.acts |= result is not None or before != after
        return result


def copied(model: ModuleT, memo: dict[int, Any]) -> ModuleT:
    """Return a deep copy, whose `Acting` hooks are bound to it; those of the user are those of the original.

    They are not copied: they may hold a Trainer, or what cannot be copied at all.

    Raises:
        AccelError: Something that the modules hold cannot be copied.
    """
    held = {id(hooks[key]): hooks[key] for hooks, key in users_hooks(model, HOOKS)}
    memo |= held
    try:
        with _locks_anew():
            _copy_plainly(model, memo)
            made = copy.deepcopy(model, memo)
    except Exception as error:  # whatever copying a user's objects may raise
        raise AccelError(
            "the network cannot be copied, and whatever is done to it is tried on a copy first",
            f"{type(error).__name__}: {error}",
            "keep files and the like elsewhere, or give what holds them a `__deepcopy__`",
        ) from error
    for key in held:
        del memo[key]
    for hooks, key in users_hooks(made):
        if isinstance(hooks[key], Acting):  # only now are all modules copied that it may hold
            hooks[key] = Acting(rebound(hooks[key].hook, memo), acts=hooks[key].acts)
    attend(model, made, hooked=False)
    return made


def _copy_plainly(model: nn.Module, memo: dict[int, Any]) -> None:
    """Put copies of modules that are copied like any object into the memo: `deepcopy` takes twice the time for them.

    A module has some thirty attributes, nearly all of them numbers, flags, and registries of hooks that are empty.
    """
    plain = [m for m in model.modules() if id(m) not in memo and _is_plainly_copied(m)]
    memo |= {id(module): type(module).__new__(type(module)) for module in plain}
    for module in plain:
        state = {}
        for name, value in module.__getstate__().items():
            kind = type(value)
            if kind in _REGISTRIES and not value and id(value) not in memo:
                memo[id(value)] = kind()
            state[name] = value if kind in ATOMS else copy.deepcopy(value, memo)
        memo[id(module)].__setstate__(state)


def _is_plainly_copied(module: nn.Module) -> bool:
    kind = type(module)
    return (
        all(getattr(kind, way) is getattr(nn.Module, way) for way in _WAYS)
        and kind.__setstate__.__module__.startswith(("torch.nn.modules.", "torch._dynamo."))
        and not any(
            hasattr(kind, own) for own in ("__deepcopy__", "__getnewargs__", "__getnewargs_ex__")
        )
        and "__deepcopy__" not in vars(module)
        and kind not in copyreg.dispatch_table
        and not copyreg._slotnames(kind)  # type: ignore[attr-defined]
    )


@contextmanager
def _locks_anew() -> Iterator[None]:
    """Let `deepcopy` give a copy locks of its own, and of what each thread has that of this one."""
    table: dict[type, Any] = copyreg.dispatch_table
    fresh = {kind: reduce for kind, reduce in _ANEW.items() if kind not in table}
    table.update(fresh)
    try:
        yield
    finally:
        for kind in fresh:
            table.pop(kind, None)


def attend(model: nn.Module, made: nn.Module, *, hooked: bool) -> None:
    """Give a copy what those in `attendants` know that it needs to be run with (`hooked`) its hooks."""
    for attendant in attendants:
        attendant(model, made, hooked)


def users_hooks(
    model: nn.Module, registries: Sequence[str] = FORWARD
) -> Iterator[tuple[dict[int, Any], int]]:
    """Yield the registry and the key of each hook that is neither torch's own nor a part of the network."""
    for module in model.modules():
        for name in registries:
            hooks = module.__dict__.get(name, {})
            for key, hook in list(hooks.items()):
                if not is_of_torch(hook) and not is_part(hook):
                    yield hooks, key


def is_part(hook: Any) -> bool:
    """Whether a hook of this package says that it is a part of the network, and copied as its layers are."""
    return getattr(hook, "is_part_of_network", False) is True


def is_of_torch(hook: Any) -> bool:
    """Whether a hook is of `torch.nn.utils`, where weights depend on it (weight and spectral norm, masks)."""
    hook = getattr(hook, "hook", hook)  # load_state_dict pre-hooks come wrapped
    place = getattr(hook, "__module__", "") or type(hook).__module__
    return str(place).startswith("torch.nn.utils")


def sort_out(model: nn.Module, calls: Sequence[Call]) -> None:
    """Remove the hooks that only watch from a copy all of whose hooks are `Acting`.

    Raises whatever the forward raises in eval mode.
    """
    hooked = list(users_hooks(model))
    if all(hooks[key].acts for hooks, key in hooked):
        return
    tried = copied(model, {}).eval()
    wanted = _outputs(tried, calls)
    trained = copied(model, {}).train()
    with suppress(Exception):  # it may not train on these calls
        _outputs(trained, calls)
    runs = zip(users_hooks(tried), users_hooks(trained), strict=True)
    acts = [hooks[key].acts or others[same].acts for (hooks, key), (others, same) in runs]
    for hooks, key in list(users_hooks(tried)):
        if not hooks[key].acts:
            del hooks[key]
    if not _equal(wanted, _outputs(tried, calls)):
        acts = [True] * len(hooked)
    for (hooks, key), stays in zip(hooked, acts, strict=True):
        hooks[key].acts = stays
        if not stays:
            del hooks[key]


def rebound(hook: Any, memo: dict[int, Any]) -> Any:
    """Return a hook that holds the copies in `memo` where it held the originals."""
    if isinstance(hook, functools.partial):
        given = [memo.get(id(a), a) for a in hook.args]
        named = {k: memo.get(id(v), v) for k, v in hook.keywords.items()}
        return functools.partial(rebound(hook.func, memo), *given, **named)
    if isinstance(hook, types.MethodType):
        return types.MethodType(hook.__func__, _rebound_owner(hook.__self__, memo))
    if not isinstance(hook, types.FunctionType):
        return _rebound_owner(hook, memo)
    if not hook.__closure__:
        return hook
    if id(hook) not in memo:
        memo[id(hook)] = hook  # it may hold itself
        cells = tuple(_rebound_cell(cell, memo) for cell in hook.__closure__)
        made = types.FunctionType(
            hook.__code__, hook.__globals__, hook.__name__, hook.__defaults__, cells
        )
        made.__kwdefaults__, made.__module__ = hook.__kwdefaults__, hook.__module__
        memo[id(hook)] = made
    return memo[id(hook)]


def _rebound_owner(owner: Any, memo: dict[int, Any]) -> Any:
    """Return an object with the copies in `memo` for what it holds of them, and lists and such of its own.

    All else is shared: a callback may hold the whole Trainer. So is what cannot be copied.
    """
    if id(owner) in memo:
        return memo[id(owner)]
    if not _is_plain_object(owner):
        return owner
    try:
        memo[id(owner)] = made = copy.copy(owner)
    except Exception:  # whatever the objects of a user do when they are copied
        return owner
    for name, value in vars(owner).items():
        own = copy.copy(value) if type(value) in _CONTAINERS else value
        vars(made)[name] = memo.get(id(value), own)
    return made


def _rebound_cell(cell: Any, memo: dict[int, Any]) -> Any:
    held = _contents(cell)
    if isinstance(held, types.FunctionType):
        return types.CellType(rebound(held, memo))
    return types.CellType(memo[id(held)]) if id(held) in memo else cell


@contextmanager
def nothing_heard(model: nn.Module) -> Iterator[None]:
    """Put back at the end what forward hooks write into, the model's own and those of all modules."""
    hooks: list[Any] = [hooks[key] for hooks, key in users_hooks(model)]
    for everywhere in (_ALL._global_forward_hooks, _ALL._global_forward_pre_hooks):
        hooks += everywhere.values()
    hooks = [getattr(hook, "hook", hook) for hook in hooks]
    functions = [f for hook in hooks for f in _functions(hook)]
    cells = {id(c): (c, _contents(c)) for f in functions for c in f.__closure__ or ()}
    names = [
        (f.__globals__, n) for f in functions for n in f.__code__.co_names if n in f.__globals__
    ]
    plain = [(space, n, space[n]) for space, n in names if isinstance(space[n], (int, float, str))]
    held = [value for _, value in cells.values()] + [space[n] for space, n in names]
    # The object of a method, and a hook that is an object itself.
    held += [getattr(hook, "__self__", hook) for hook in hooks]
    spaces = [vars(v) for v in held if _is_plain_object(v)]
    held += [*spaces, *(v for space in spaces for v in space.values())]
    held = [v for v in held if type(v) in _CONTAINERS]
    before = [(value, copy.copy(value)) for value in held]
    try:
        yield
    finally:
        for cell, value in cells.values():
            if _contents(cell) is not value:
                cell.cell_contents = value
        for space, name, value in plain:
            space[name] = value
        for value, saved in before:
            if not _same(value, saved):
                value.clear()
                (value.extend if isinstance(value, (list, deque)) else value.update)(saved)


def _same(value: Any, saved: Any) -> bool:
    """Whether a container holds the very objects that it held: what others read meanwhile is left alone then."""
    parts = ([*v, *v.values()] if isinstance(v, dict) else list(v) for v in (value, saved))
    some, others = (list(map(id, part)) for part in parts)
    return some == others


def _functions(hook: Any) -> list[types.FunctionType]:
    """Return the functions of a hook: its own, and those that it holds."""
    hook = getattr(hook, "hook", hook)
    hook = getattr(hook, "func", hook)
    if not isinstance(hook, types.FunctionType):
        return []
    inner = [_contents(cell) for cell in hook.__closure__ or ()]
    return [hook, *(f for f in inner if isinstance(f, types.FunctionType))]


def _is_plain_object(value: Any) -> bool:
    not_one = (nn.Module, type, types.FunctionType, types.ModuleType, Tensor)
    return isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, not_one)


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing is in it yet
        return None


def _versions(tensors: list[Tensor]) -> list[int]:
    """Count the changes in place; those of inference mode count none."""
    return [-1 if t.is_inference() else t._version for t in tensors]


def _own(module: nn.Module) -> dict[str, int]:
    return {key: id(value) for key, value in vars(module).items() if isinstance(value, Tensor)}


def _outputs(model: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    with torch.no_grad(), same_random_state(model, seed=0):
        return tensors(run(model, calls))


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(some, others, strict=True)
    )
