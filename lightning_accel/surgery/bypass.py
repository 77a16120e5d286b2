"""What is left of a residual block that is gone: a module that hands on its input, and the way back.

A block that computes `x + f(x)` can go as a whole: in its place stands a `Bypass`, so that lists keep their length,
all other names stay, and whoever enumerates layers finds as many as before. It is told how the block's outputs hang
on its inputs (`Handing`, plain data): `{"tensor": [0, "x"]}` is the first argument, and tuples, lists, dicts and
`None` are what they say. Arguments beyond that, such as masks, are taken and not used.

The block itself is kept out of sight, without the memory of its weights: a less pruned checkpoint, or a prune that
is taken back, puts the very same module and parameters in place again. Plain values that a forward reads of a block
from outside (`layer.attention_type`) are those of the block; a weight that is read so is an error.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_accel.errors import StructureMismatch
from lightning_accel.surgery.acting import is_of_torch

Handing = Mapping[str, Any]
"""How a block's output is made of its input, as plain data that JSON can hold."""

_HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks"),
    *("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)
_VALUES = (bool, int, float, str, type(None), torch.device, torch.dtype)


class Bypass(nn.Identity):
    """Stands for a block that is gone and took one argument: gives what it gets.

    Args:
        block: The block that is gone.
        handing: How its output hung on its input.
    """

    if TYPE_CHECKING:  # TorchScript would ask for its type
        husk: Husk

    def __init__(self, block: nn.Module, handing: Handing) -> None:
        super().__init__()
        self.handing = handing
        vars(self)["husk"] = Husk(block)
        self.training = block.training

    def extra_repr(self) -> str:
        return f"of {type(self.husk.block).__name__}"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            husk = vars(self).get("husk")
            if husk is None or name.startswith("__"):
                raise
        return _read(husk.block, name)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        self.husk.convert(fn)
        return super()._apply(fn, recurse)


class BypassOfMany(Bypass):
    """The same for a block that took more than one argument, or was called by names."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return handed(self.handing, args, kwargs)


class Husk:
    """A block without the memory of its weights; what others use as well stays as it is.

    Args:
        block: The block.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.emptied: tuple[str, ...] = ()
        self.recorders: list[tuple[int, Any]] = []

    def empty(self, held: set[int]) -> None:
        """Give up the memory of what a checkpoint holds, but not of the tensors named by identity."""
        stored = self.block.state_dict(keep_vars=True)
        self.emptied = tuple(n for n, t in stored.items() if _is_own(t) and id(t) not in held)
        for tensor in self._tensors():
            tensor.grad = None
            tensor.data = _hollow(tensor)

    def fill(self) -> None:
        """Give zeros a memory again, to be loaded into."""
        for tensor in self._tensors():
            tensor.data = torch.zeros_like(tensor.data, memory_format=torch.contiguous_format)
        self.emptied = ()

    def convert(self, fn: Callable[..., Any]) -> None:
        """Follow the network to another device or number format."""
        hollow = {id(t): t for t in self._tensors()}

        def converted(tensor: Tensor) -> Any:
            if id(tensor) not in hollow:
                return fn(tensor)
            return fn(tensor.detach().as_strided((), ())).expand(tensor.shape)

        self.block._apply(converted)

    def _tensors(self) -> list[Tensor]:
        stored = self.block.state_dict(keep_vars=True)
        found = {id(stored[name]): stored[name] for name in self.emptied}
        return [tensor for tensor in found.values() if tensor.numel()]

    def __deepcopy__(self, memo: dict[int, Any]) -> Husk:
        for tensor in self._tensors():  # which would come with all of their memory
            if id(tensor) not in memo:
                made = _hollow(tensor.detach())
                parameter = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = (
                    nn.Parameter(made, requires_grad=tensor.requires_grad) if parameter else made
                )
        made_husk = Husk(copy.deepcopy(self.block, memo))
        made_husk.emptied, made_husk.recorders = self.emptied, list(self.recorders)
        return made_husk


class Shell:
    """A part of a block that is gone, of which plain values can be read."""

    def __init__(self, part: nn.Module) -> None:
        self._part = part

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_part":
            raise AttributeError(name)
        return _read(self._part, name)


class RemovedBlock(NamedTuple):
    """A block that went, and the parameters that nobody else in the network has."""

    name: str
    block: nn.Module
    parameters: dict[str, nn.Parameter]


def handed(handing: Handing, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what a block gives that hands on its input.

    >>> handed({"tuple": [{"tensor": [0, "x"]}, {"value": None}]}, (), {"x": 3, "mask": 4})
    (3, None)
    """
    ((kind, held),) = handing.items()
    if kind == "tensor":
        place, name, *path = held
        value = args[place] if 0 <= place < len(args) else kwargs[name]
        for key in path:
            value = value[key]
        return value
    if kind == "value":
        return held
    if kind == "dict":
        return {key: handed(one, args, kwargs) for key, one in held.items()}
    parts = [handed(one, args, kwargs) for one in held]
    return tuple(parts) if kind == "tuple" else parts


def checked(handing: Any) -> Handing:
    """Return a handing that was stored, or raise `StructureMismatch` if it is none.

    >>> checked({"tensor": [0, "x"]})
    {'tensor': [0, 'x']}
    """
    if not _is_handing(handing):
        raise StructureMismatch(
            "the stored structure does not say how a block that is gone hands on its input",
            repr(handing)[:80],
            "use the checkpoint with the code that wrote it; nothing was loaded",
        )
    return handing


def bypass(model: nn.Module, handings: Mapping[str, Handing]) -> list[RemovedBlock]:
    """Put a `Bypass` in the place of each block, wherever the model holds it; inner ones first.

    Its hooks come along. The blocks lose the memory of their weights.
    """
    found = []
    for name in sorted(handings, key=_depth, reverse=True):
        block = model.get_submodule(name)
        if isinstance(block, Bypass):
            continue
        made = stand_in(block, handings[name])
        block._compiled_call_impl = None
        _detach(block)
        made.husk.recorders = _recorders(block)
        for key, _ in made.husk.recorders:
            del block._forward_hooks[key]
        _move_hooks(block, made)
        replace(model, block, made)
        held = {id(t) for t in (*model.parameters(), *model.buffers())}
        own = {n: p for n, p in block.named_parameters() if id(p) not in held}
        made.husk.empty(held)
        found.append(RemovedBlock(name, block, own))
    return found


def _detach(block: nn.Module) -> None:
    """Let what modules kept of their last forward hang on no graph, which nothing could copy."""
    for module in block.modules():
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules") and not isinstance(
                value, nn.Module
            ):
                leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
                if any(leaf.grad_fn is not None for leaf in leaves):
                    module.__dict__[key] = tree_map_only(Tensor, Tensor.detach, value)


def stand_in(block: nn.Module, handing: Handing) -> Bypass:
    """Return what can take the place of a block; the plain one wherever TorchScript could read it."""
    taken = list(inspect.signature(block.forward).parameters.values())
    one = len(taken) == 1 and taken[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    plain = one and handing == {"tensor": [0, taken[0].name]}
    return (Bypass if plain else BypassOfMany)(block, handing)


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in another's place, wherever the model holds that."""
    for parent in [module for _, module in whole_modules(model)]:
        for leaf, child in parent._modules.items():
            if child is old:
                parent._modules[leaf] = new


def parameters_under(model: nn.Module, names: Container[str]) -> dict[int, str]:
    """Return by identity the names of the parameters that only these blocks have."""
    found: dict[int, str] = {}
    others: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if is_under(name, names):
            found.setdefault(id(parameter), name)
        else:
            others.add(id(parameter))
    return {one: name for one, name in found.items() if one not in others}


def put_back(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Put blocks back in their places, outer ones first, with zeros for weights; return which were gone."""
    found = []
    for name in sorted(names, key=_depth):
        stands_in = model.get_submodule(name)
        if isinstance(stands_in, Bypass):
            block = stands_in.husk.block
            stands_in.husk.fill()
            if block.training != stands_in.training:
                block.train(stands_in.training)
            _move_hooks(stands_in, block)
            block._forward_hooks.update(stands_in.husk.recorders)
            replace(model, stands_in, block)
            found.append(name)
    return found


def removed_blocks(model: nn.Module) -> dict[str, Bypass]:
    """Return what stands in the place of blocks, by name."""
    return {name: m for name, m in whole_modules(model) if isinstance(m, Bypass)}


def whole_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules by name, and those in blocks that are gone by the names that they had."""
    for name, module in model.named_modules():
        yield name, module
        if isinstance(module, Bypass):
            for inner, part in whole_modules(module.husk.block):
                if inner:
                    yield f"{name}.{inner}".lstrip("."), part


def whole_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers by name, those of blocks that are gone included.

    Those have their shapes, and no values.
    """
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Bypass):
            for inner, tensor in whole_tensors(module.husk.block):
                yield f"{name}.{inner}".lstrip("."), tensor


def is_under(name: str, places: Container[str]) -> bool:
    """Tell whether a tensor or a module is a part of one of the places.

    >>> is_under("net.3.fc.weight", ["net.3"]), is_under("net.30.weight", ["net.3"])
    (True, False)
    """
    parts = name.split(".")
    return any(".".join(parts[:n]) in places for n in range(1, len(parts)))


def _read(block: nn.Module, name: str) -> Any:
    """Return a plain value of a block that is gone, or a shell of a part of it."""
    value = getattr(block, name)
    if isinstance(value, nn.Module):
        return Shell(value)
    plain = isinstance(value, (tuple, list)) and all(isinstance(v, _VALUES) for v in value)
    if plain or isinstance(value, _VALUES):
        return value
    raise AttributeError(
        f"`{name}` of a {type(block).__name__} that was pruned away is read: only its plain values are left"
    )


def _is_handing(one: Any) -> bool:
    if not isinstance(one, dict) or len(one) != 1:
        return False
    ((kind, held),) = one.items()
    if kind == "value":
        return held is None or type(held) in (bool, int, float, str)
    if kind == "tensor":
        known = isinstance(held, list) and len(held) >= 2
        return known and type(held[0]) is int and all(type(k) in (int, str) for k in held[1:])
    if kind == "dict":
        return isinstance(held, dict) and all(
            isinstance(k, str) and _is_handing(v) for k, v in held.items()
        )
    return kind in ("tuple", "list") and isinstance(held, list) and all(map(_is_handing, held))


def _is_own(tensor: Any) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)


def _hollow(tensor: Tensor) -> Tensor:
    """Return zeros of a tensor's shape that need the memory of one number."""
    return tensor.detach().new_zeros(()).expand(tensor.shape)


def is_recorder(hook: Any) -> bool:
    """Tell whether a hook is of transformers, which has one on each layer of a class to collect hidden states.

    It is set once, on what there is then, so that of a block that is gone nothing is collected in any process.
    """
    hook = getattr(hook, "hook", hook)  # of a copy
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


def _recorders(block: nn.Module) -> list[tuple[int, Any]]:
    return [(key, hook) for key, hook in block._forward_hooks.items() if is_recorder(hook)]


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Hand over the registries themselves, which handles of hooks refer to; torch's own stay."""
    held = [hook for name in _HOOKS[:3:2] for hook in vars(old)[name].values()]
    if not any(map(is_of_torch, held)):
        for name in _HOOKS:
            vars(old)[name], vars(new)[name] = vars(new)[name], vars(old)[name]


def _depth(name: str) -> int:
    return name.count(".")
