"""Blocks that keep their inputs only, or their matrix products as well, and recompute the rest in backward.

A block of a deep network keeps some ten times its input. Recomputing it in backward costs a second forward:
at most a third more arithmetic for all blocks ("Training deep nets with sublinear memory cost", Chen et al.
2016, 1604.06174). The selective policy keeps results of matrix products, convolutions and attention, which
are nearly all of the arithmetic and a third of the bytes ("Reducing activation recomputation in large
transformer models", Korthikanti et al. 2022, 2205.05198).

The module keeps its class and all its names: only its `forward` is another, on this one instance and in
training alone. Copies recompute as well; pickles hold the user's own forward. What torch's
`checkpoint` leaves to its user is done here:

- running statistics of batch and instance norms change once per step, not again in the recomputation;
- all that a block reads besides its arguments (attributes, modes, hooks, modules, tensors of its own, the random
  states of Python, NumPy and of generators that it holds) is in the recomputation what it was in forward, and what
  it writes (the loss of a router, a cache, a counter, spectral norm's vectors) is written once: see `surgery.moment`;
- the first recomputations of each block, and some later ones, run to their end and are compared. The first that
  gives another result is refused; a later one warns, and the block keeps its activations from then on;
- what an operation fills after it was saved (the slopes of RReLU) is there before backward reads it;
- attention that draws its dropout within is recomputed also by the selective policy: kept, it would leave
  the random state behind, and each later dropout of the block would get another mask than in forward.

Not seen, but at the calls that are compared, is what changes between a forward and its backward without a trace: the
numbers of an input that is filled anew, weights written through `.data`. And inside of
`torch.compile(backend="eager")` torch draws dropout anew in any recomputation, ours and its own.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from lightning_accel.arguments import one_of
from lightning_accel.errors import NoEffect
from lightning_accel.memory.draws import draws
from lightning_accel.memory.on_xla import lies_on_xla, recomputed_on_xla
from lightning_accel.memory.recompute import Recomputation, RecomputedBlock
from lightning_accel.memory.saved import note_kept
from lightning_accel.seldom import check_seldom
from lightning_accel.surgery import Change, Receipt, Select
from lightning_accel.surgery.moment import Moment
from lightning_accel.surgery.siblings import is_called, siblings

POLICIES = ("full", "selective")

_PRODUCTS = {
    "mm", "addmm", "bmm", "baddbmm", "linear", "convolution",
    "_scaled_mm", "_grouped_mm", "_scaled_grouped_mm", "_linear_pointwise", "_convolution_pointwise",
    "_flash_attention_forward", "_efficient_attention_forward", "_cudnn_attention_forward",
    "flex_attention",
}  # fmt: skip
_OWN = "_accel_own"
_called: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def checkpoint_activations(
    model: nn.Module,
    *,
    select: Select | str | Iterable[str] | dict[str, Any] | None = None,
    policy: str = "full",
    check_every_n_calls: int | None = 64,
) -> Receipt:
    """Let blocks recompute their activations in backward instead of keeping them, in place.

    Gradients are equal to the last bit, with dropout, autocast and batch norm. What is checkpointed
    already stays as it is. Forward hooks on modules inside of a block run once more in backward.

    Args:
        model: The network, which itself is never one block.
        select: Which blocks: the outermost chosen modules; by default those that repeat, `find_repeated`.
        policy: "full" keeps the inputs of a block; "selective" results of matrix products, convolutions
            and attention as well, so that recomputing is cheap. There, an operation that changes a
            kept result in place raises in backward.
        check_every_n_calls: At how many calls of a block its recomputation is compared with its forward, besides the
            first, second, fourth, eighth ... None for never.

    Raises:
        ValueError: Unknown policy, or `check_every_n_calls` is below 1.
        NoEffect: Nothing was chosen, or nothing repeats.

    >>> net = nn.Sequential(*[nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3)])
    >>> checkpoint_activations(net).changes[0]
    Change(name='0', what='checkpointed', before='kept', after='full recomputation')
    """
    check_arguments(policy, check_every_n_calls)
    found = find_repeated(model) if select is None else _chosen(model, Select.of(select))
    if not found:
        raise NoEffect(
            "there is nothing to checkpoint",
            f"no block in {type(model).__name__} that repeats"
            if select is None
            else f"no module with a forward and parameters inside {type(model).__name__} among {Select.of(select)}",
            "name blocks by `select`, such as 'net.layers.*'",
        )
    changes = []
    for name, module in found.items():
        if _own_forward(module) is None:
            vars(module)["forward"] = MethodType(
                _recomputing(module, policy, check_every_n_calls), module
            )
            changes.append(Change(name, "checkpointed", "kept", f"{policy} recomputation"))
    return Receipt(tuple(changes))


def keep_activations(model: nn.Module) -> Receipt:
    """Undo `checkpoint_activations` everywhere in `model`; falsy when there was nothing to undo.

    >>> net = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)))
    >>> len(checkpoint_activations(net).changes), len(keep_activations(net).changes), bool(keep_activations(net))
    (2, 2, False)
    """
    changes = []
    for name, module in model.named_modules():
        own = _own_forward(module)
        if own is None:
            continue
        if own == ():
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own[0]
        changes.append(Change(name, "checkpointed", "recomputation", "kept"))
    return Receipt(tuple(changes))


def find_repeated(model: nn.Module) -> dict[str, nn.Module]:
    """Return by name the outermost blocks that occur twice or more beside each other, by class.

    A block has parameters and modules inside; `nn.Sequential` counts where no part of it is a block.

    >>> layers = [nn.TransformerEncoderLayer(4, 2, 8) for _ in range(3)]
    >>> list(find_repeated(nn.ModuleDict({"body": nn.Sequential(*layers), "head": nn.Linear(4, 2)})))
    ['body.0', 'body.1', 'body.2']
    """
    beside = list(siblings(model))
    found: dict[str, nn.Module] = {}
    for kind in dict.fromkeys(type(module) for _, module in beside):
        alike = [(name, module) for name, module in beside if type(module) is kind]
        blocks = [(name, module) for name, module in alike if _is_block(module)]
        if len({id(module) for _, module in blocks}) >= 2:
            found |= dict(blocks)
        else:
            for name, module in alike:
                found |= {f"{name}.{n}": m for n, m in find_repeated(module).items()}
    if not found:
        rows = [(n, m) for n, m in model.named_children() if type(m) is nn.Sequential]
        found = {n: m for n, m in rows if _is_block(m)} if len(rows) >= 2 else {}
    return found


def check_arguments(policy: Any, check_every_n_calls: Any) -> None:
    """Raise unless these can be arguments of `checkpoint_activations`."""
    one_of("policy", policy, POLICIES)
    check_seldom(check_every_n_calls)


def uncalled(model: nn.Module) -> list[str]:
    """Return the checkpointed blocks of `model` that no eager training forward has called yet."""
    modules = model.named_modules()
    return [n for n, m in modules if _own_forward(m) is not None and m not in _called]


def _chosen(model: nn.Module, select: Select) -> dict[str, nn.Module]:
    select.require(model)
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside or ("\0",)):
            continue
        if select.matches(name, module) and is_called(module):
            found[name] = module
            inside += (f"{name}.",)
    return found


def _is_block(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and is_called(module)


def _own_forward(module: nn.Module) -> tuple[Any, ...] | None:
    """Return what the instance had in place of its class's forward: () for nothing; None if not ours."""
    present = vars(module).get("forward")
    found: tuple[Any, ...] | None = getattr(getattr(present, "__func__", None), _OWN, None)
    return found


# PyTorch 2.14 asks whether kept tensors pass the hooks around a block (#190581), and will change its default.
# They are counted by `note_kept`, so they do not.
_HOOKS: dict[str, Any] = (
    {"respect_saved_tensors_hooks": False}
    if "respect_saved_tensors_hooks" in inspect.signature(checkpoint).parameters
    else {}
)
_selecting: Callable[..., Any] = functools.partial(checkpoint, use_reentrant=False, **_HOOKS)


def _recomputing(
    module: nn.Module, policy: str, check_every_n_calls: int | None
) -> Callable[..., Any]:
    """Make a function of the module, which holds no instance, so that copies get one of their own.

    (What it knows of the calls is of the instance that called last: copies rarely learn in turns.) As a method that is called "forward" it pickles as the attribute of that name, which is the class's own.
    """
    own = (vars(module)["forward"],) if "forward" in vars(module) else ()
    plain: Callable[..., Any] = type(module).forward
    if own and getattr(own[0], "__self__", None) is module:
        plain = own[0].__func__
    elif own:
        plain = _ignoring_self(own[0])
    known: list[RecomputedBlock] = []

    @functools.wraps(plain)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return plain(self, *args, **kwargs)
        call = functools.partial(plain, self)
        if kwargs:
            call = _by_keyword(call, len(args), tuple(kwargs))
        values = (*args, *kwargs.values())  # tensors by keyword are inputs like others
        if (
            torch.compiler.is_compiling()
        ):  # running statistics are outputs of a graph, and change once
            if policy == "full":
                return checkpoint(call, *values, use_reentrant=False)
            return _selecting(call, *values, context_fn=_selective)
        if lies_on_xla(values):
            _called.add(self)
            return recomputed_on_xla(self, call, values, type(self).__name__)
        if not known or known[0].block() is not self:
            known[:] = [RecomputedBlock(self, check_every_n_calls)]
            _called.add(self)
        calls = known[0]
        if calls.reason:
            return plain(self, *args, **kwargs)
        moment = calls.begin(*values)
        make = functools.partial(_contexts, policy, moment)
        run = calls.compared(call) if calls.is_due else call
        with set_checkpoint_early_stop(calls.stops_early):
            out = _selecting(run, *values, context_fn=make)
        calls.end(moment, out)
        return out

    forward.__name__ = "forward"
    setattr(forward, _OWN, own)
    return forward


def _by_keyword(call: Callable[..., Any], count: int, names: tuple[str, ...]) -> Any:
    """Return the call with all arguments by position."""

    def by_position(*values: Any) -> Any:
        return call(*values[:count], **dict(zip(names, values[count:], strict=True)))

    return by_position


def _ignoring_self(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def plain(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return plain


def _contexts(policy: str, moment: Moment) -> tuple[Any, Any]:
    """Return what stands around the forward of a block and around its recomputation."""
    first, again = (nullcontext(), None) if policy == "full" else _selective()
    return first, Recomputation(again, moment)


def _choose(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = str(getattr(op, "_opname", None) or getattr(op, "__name__", ""))
    product = name in _PRODUCTS or name.startswith("_scaled_dot_product")
    collective = getattr(op, "namespace", "") == "_c10d_functional"
    if collective or (product and not draws(op, args, kwargs)):
        if not context.is_recompute:
            note_kept(getattr(context, "op_output", None))
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


_selective = functools.partial(create_selective_checkpoint_contexts, _choose)
