"""A copy of a model to try things on, which shares nothing with the original.

Every edit is planned and proved on a twin first; the user's model is touched only by the last step,
which cannot fail. So no trace's autograd graph, train flag or hook of the original is ever at risk.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_accel.surgery.acting import (
    HOOKS,
    Acting,
    attend,
    copied,
    is_of_torch,
    is_part,
    rebound,
    sort_out,
    users_hooks,
)
from lightning_accel.surgery.call import Call, ModuleT

_PLAIN = (bool, int, float, str, type(None))


def twin(model: ModuleT, calls: Sequence[Call] = (), *, hooked: bool = False) -> ModuleT:
    """Return an independent copy of `model`: weights, gradients, flags and ties, but not its hooks.

    Hooks of `torch.nn.utils` (weight and spectral norm, masks) stay, because the weights depend on
    them; a user's own hooks would write into the user's objects and are left out. With `calls`, those
    that take part in the forward stay as well, in this copy and in copies of it; `hooked` keeps all
    forward hooks, for what runs within `acting.nothing_heard`. Tensors that still hang on an autograd
    graph, such as a stored loss, are copied detached. Modules compiled in place come out uncompiled.

    >>> import torch
    >>> net = nn.Linear(2, 2)
    >>> copied = twin(net)
    >>> torch.equal(copied.weight, net.weight), copied.weight is net.weight
    (True, False)
    """
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in _attached_tensors(model)}
    made = copied(model, memo)
    named = model.named_parameters(remove_duplicate=False)
    gradients = {name: p.grad for name, p in named if p.grad is not None}
    if gradients:
        for name, parameter in made.named_parameters(remove_duplicate=False):
            if name in gradients:
                parameter.grad = gradients[name].detach().clone()
    if calls or hooked:
        for hooks, key in users_hooks(made):
            if not isinstance(hooks[key], Acting):
                hooks[key] = Acting(rebound(hooks[key], memo), acts=False)
        attend(model, made, hooked=True)
    for module in made.modules():
        for registry in HOOKS:
            hooks = module.__dict__.get(registry, {})
            for key in [k for k, hook in hooks.items() if not _stays(hook)]:
                del hooks[key]
    if calls:
        sort_out(made, calls)
    return made


def _attached_tensors(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_modules", "_buffers") or type(value) in _PLAIN:
                continue
            if type(value) is OrderedDict and not value:
                continue
            for leaf in tree_leaves(value):
                if isinstance(leaf, Tensor) and not leaf.is_leaf:
                    yield leaf


def _stays(hook: Any) -> bool:
    return isinstance(hook, Acting) or is_of_torch(hook) or is_part(hook)
