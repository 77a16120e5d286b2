"""How an optimizer runs over its parameters: one kernel for all, several, or a loop; the result is the same.

`torch.optim` has up to three implementations of one formula. On a CPU it takes the loop unless told
otherwise, where one fused kernel needs a third to a sixth of the time; `foreach` is slower there. What a
constructor does with `fused=True` can be done later, while nothing but the implementation changes: the flag
is read at each step, and the counters in the state move to where the kernel reads them.

One thing a constructor does is left out on purpose: to let the kernel undo a gradient scaler's factor. That
leaves clipping and every hook before the step with scaled gradients, which is why Lightning refuses it.
Here the scaler unscales before the step, as for every other implementation.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_accel.arguments import instance, one_of
from lightning_accel.errors import NoEffect, Unsupported
from lightning_accel.loop.layout import on_device, place_state, unfit
from lightning_accel.surgery import Change, Receipt
from lightning_accel.surgery.optimizers import within

IMPLEMENTATIONS = ("fused", "foreach", "for-loop")

_FLAGS: dict[str, dict[str, bool | None]] = {
    "fused": {"fused": True, "foreach": None},
    "foreach": {"fused": None, "foreach": True},
    "for-loop": {"fused": False, "foreach": False},
}


def use_implementation(optimizer: Optimizer, implementation: str) -> Receipt:
    """Let an optimizer of `torch.optim` run in another implementation, in place, its state kept.

    Also parameter groups added later use it. A `load_state_dict` brings back what the loaded state was saved
    with, so call this again after one.

    Args:
        optimizer: One of `torch.optim`, or of a class that inherits its step.
        implementation: "fused", "foreach" or "for-loop".

    Returns:
        A receipt with a row for each parameter group; falsy when all ran so before.

    Raises:
        ValueError: The name is unknown.
        Unsupported: The class has no such implementation, or a parameter or an option forbids it.

    >>> weight = nn.Parameter(torch.ones(2))
    >>> optimizer = torch.optim.AdamW([weight])
    >>> use_implementation(optimizer, "fused").changes[0]
    Change(name='AdamW, group 0', what='implementation', before='default', after='fused')
    """
    check(implementation)
    instance("optimizer", optimizer, Optimizer, "one of torch.optim", "pass trainer.optimizers[0]")
    reason = why_not(optimizer, implementation)
    if reason:
        raise Unsupported(
            f"{type(optimizer).__name__} cannot run {implementation}", reason, "leave it as it is"
        )
    changes = []
    for index, group in enumerate(optimizer.param_groups):
        before = implementation_of(group)
        if before != implementation:
            name = f"{type(optimizer).__name__}, group {index}"
            changes.append(Change(name, "implementation", before, implementation))
        _set(group, _FLAGS[implementation])
    _set(optimizer.defaults, _FLAGS[implementation])
    if implementation != "fused":
        vars(optimizer).pop("_step_supports_amp_scaling", None)
    _place_state(optimizer)
    return Receipt(tuple(changes))


def check(implementation: str) -> str:
    """Return the name of an implementation, or raise."""
    return one_of("implementation", implementation, IMPLEMENTATIONS)


def implementation_of(group: dict[str, Any]) -> str:
    """Name what a parameter group asks for; "default" leaves the choice to torch.

    >>> implementation_of(torch.optim.SGD([torch.ones(1)], fused=True).param_groups[0])
    'fused'
    """
    if group.get("fused"):
        return "fused"
    if group.get("foreach"):
        return "foreach"
    return "for-loop" if group.get("foreach") is False else "default"


def why_not(optimizer: Optimizer, implementation: str) -> str | None:
    """Say why an optimizer cannot run so, or return `None`.

    >>> why_not(torch.optim.RMSprop([torch.ones(1)]), "fused")
    'RMSprop has no such implementation'
    """
    if not any(True for _ in _parameters(optimizer)):
        raise NoEffect(
            "there is nothing to run", f"{type(optimizer).__name__} without parameters", "pass some"
        )
    flag = "foreach" if implementation == "for-loop" else implementation
    kind = type(optimizer).__name__
    if len(within(optimizer)) > 1:
        return f"{kind} holds another optimizer that steps; build that one so"
    if flag not in optimizer.defaults:
        return f"{kind} has no such implementation"
    if not _inherits_step(type(optimizer), flag):
        return f"the `step` of {kind} neither reads `{flag}` nor calls that of torch.optim"
    if implementation == "for-loop":
        return None
    for group in optimizer.param_groups:
        reason = _forbids(group, implementation, capturable=bool(group.get("capturable")))
        if reason:
            return reason
    for parameter in _parameters(optimizer):
        reason = unfit(parameter, implementation)
        if reason:
            return reason
    if implementation == "fused":
        base = next(b for b in type(optimizer).__mro__ if b.__module__.startswith("torch.optim"))
        sharded = any(type(p).__name__ == "DTensor" for p in _parameters(optimizer))
        if sharded and issubclass(base, (torch.optim.SGD, torch.optim.Adagrad)):
            return f"torch {torch.__version__} has no fused {base.__name__} of sharded weights"
        for where in {(p.device, p.dtype) for p in _parameters(optimizer)}:
            if not kernel_is_right(base, *where):
                dtype = str(where[1]).removeprefix("torch.")
                return (
                    f"torch {torch.__version__} computes it wrongly in {dtype} on {where[0].type}"
                )
    return None


@cache
def kernel_is_right(kind: type[Optimizer], device: torch.device, dtype: torch.dtype) -> bool:
    """Step a small vector fused and in the loop, and tell whether both are as near to an exact step.

    On a CPU torch 2.13 leaves out all but the last few elements in fused SGD with bf16 and fp16, without a
    word (pytorch #191763). Takes a millisecond, once per kind, device and dtype.

    >>> kernel_is_right(torch.optim.AdamW, torch.device("cpu"), torch.float32)
    True
    """
    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(4, 257, generator=generator)
    options: dict[str, Any] = {"momentum": 0.9} if issubclass(kind, torch.optim.SGD) else {}
    ends = []
    for to, fused in ((torch.float64, False), (dtype, False), (dtype, True)):
        place = device if to == dtype else "cpu"  # not every device has float64
        parameter = nn.Parameter(start.to(dtype).to(place, to, copy=True))
        optimizer = kind([parameter], lr=0.1, fused=fused, foreach=False, **options)  # type: ignore[call-arg]
        for gradient in gradients:
            parameter.grad = gradient.to(dtype).to(place, to, copy=True)
            optimizer.step()
        ends.append(parameter.detach().to("cpu", torch.float64))
    exact, loop, kernel = ends
    theirs = float((loop - exact).abs().max())
    return float((kernel - exact).abs().max()) <= 3 * theirs + 4 * torch.finfo(dtype).eps


class Original:
    """What each group of an optimizer asked for, to put it back, and to save it as if nothing had changed."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._groups = [_flags(group) for group in optimizer.param_groups]
        self._defaults = _flags(optimizer.defaults)
        self._scaling = vars(optimizer).get("_step_supports_amp_scaling")

    def put_back(self, optimizer: Optimizer) -> None:
        """Let the optimizer run as before; groups added since run as they would have."""
        for index, group in enumerate(optimizer.param_groups):
            _set(group, self._of(index))
        _set(optimizer.defaults, self._defaults)
        if self._scaling is not None:
            optimizer._step_supports_amp_scaling = self._scaling  # type: ignore[attr-defined]
        _place_state(optimizer)

    def rewrite(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a state dict with the original flags, and counters on the host where those want it."""
        groups = [dict(group) for group in state_dict["param_groups"]]
        state = dict(state_dict["state"])
        for index, group in enumerate(groups):
            _set(group, self._of(index))
            for key in group["params"]:
                step = state[key].get("step") if key in state else None
                if isinstance(step, Tensor) and not on_device(group):
                    state[key] = {**state[key], "step": step.cpu()}
        return {**state_dict, "param_groups": groups, "state": state}

    def _of(self, index: int) -> dict[str, Any]:
        return self._groups[index] if index < len(self._groups) else self._defaults


def _inherits_step(kind: type, flag: str) -> bool:
    for base in kind.__mro__:
        if "step" in vars(base):
            if base.__module__.startswith("torch.optim"):
                return True
            code = unwrap(vars(base)["step"]).__code__
            return "super" in code.co_names or flag in code.co_consts or flag in code.co_names
    return False


def _forbids(group: dict[str, Any], implementation: str, capturable: bool) -> str | None:
    if group.get("differentiable"):
        return "`differentiable=True` needs the loop"
    scalars = [group.get("lr"), *(group.get("betas") or ())]
    tensors = any(isinstance(value, Tensor) for value in scalars)
    if implementation == "foreach" and tensors and not capturable and "betas" in group:
        return "`lr` or `betas` is a tensor, and `capturable` is off"
    return None


def sparse_weights(model: nn.Module) -> dict[Tensor, str]:
    """Find the embeddings that will give sparse gradients, by name.

    >>> net = nn.Sequential(nn.Embedding(4, 2, sparse=True), nn.Linear(2, 1))
    >>> list(sparse_weights(net).values())
    ['0.weight']
    """
    return {
        module.weight: f"{name}.weight".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse
    }


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _flags(group: dict[str, Any]) -> dict[str, Any]:
    return {name: group[name] for name in ("fused", "foreach") if name in group}


def _set(group: dict[str, Any], flags: dict[str, Any]) -> None:
    group.update({name: value for name, value in flags.items() if name in group})


def _place_state(optimizer: Optimizer) -> None:
    """Put the step counters where this implementation reads them, and the rest in its layout."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            place_state(optimizer, parameter, group)
