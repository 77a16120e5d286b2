"""What a compiled network would keep for backward under a budget, without compiling it to code.

Only the front of the compiler runs: capture, decompositions, and the cut into forward and backward. The
graphs then run operation by operation. On a GPT block that takes under a second instead of ten, and the
bytes are those of the finished code.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from types import FunctionType
from typing import Any

import torch
from torch import nn

from lightning_accel.errors import AccelError
from lightning_accel.surgery.compiled import runs_compiled

_SERIAL = count()


def compiled_names(model: nn.Module) -> list[str]:
    """Return the names of the modules in `model` that are compiled, by whom and how ever.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> net[0].compile(backend="eager")
    >>> compiled_names(net)
    ['0']
    """
    return [name for name, module in model.named_modules() if runs_compiled(module)]


def compile_for_trial(copy: nn.Module, names: list[str]) -> None:
    """Cut the named modules of a copy into forward and backward at their next call; blocks alike share it.

    Args:
        copy: A copy that is thrown away: it is slower than the original, and draws its own random numbers.
        names: Of `compiled_names` of the original.
    """
    kinds: dict[Any, Callable[..., Any]] = {}
    for name in names:
        module = copy.get_submodule(name)
        if isinstance(module, torch._dynamo.OptimizedModule):
            # A copy of it would run, and fill, the graphs of the original.
            inner = module._orig_mod
            vars(module)["forward"] = inner
            module = inner
        shapes = tuple((n, tuple(p.shape), p.dtype) for n, p in module.named_parameters())
        run = kinds.setdefault((type(module), shapes), _front_only())
        module._compiled_call_impl = _Call(run, module)


def largest_budget(
    kept_bytes: Callable[[float], float], limit_bytes: float, steps: int = 20
) -> float:
    """Return the largest budget whose kept bytes are within the limit, by bisection.

    Args:
        kept_bytes: Of a budget; infinite where a trial ran out of memory. Grows with the budget.
        limit_bytes: What may be kept.
        steps: How fine: budgets are multiples of one by this number.

    Raises:
        AccelError: Nothing fits, not even a budget of 0.

    >>> largest_budget(lambda budget: 100 * budget, limit_bytes=42)
    0.4
    """
    if kept_bytes(1.0) <= limit_bytes:
        return 1.0
    least = kept_bytes(0.0)
    if least > limit_bytes:
        raise AccelError(
            "no activation budget fits the memory",
            f"{least:,.0f} bytes kept by a budget of 0, and room for {limit_bytes:,.0f}",
            "use a smaller batch, or ActivationCheckpointing() for what is not compiled",
        )
    low, high = 0, steps
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if kept_bytes(middle / steps) <= limit_bytes else (low, middle)
    return low / steps


class _Call:
    """A compiled function with its module; a copy of the module is not compiled."""

    def __init__(self, run: Callable[..., Any], module: nn.Module) -> None:
        self.run, self.module = run, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.module, *args, **kwargs)


def _front_only() -> Callable[..., Any]:
    """Return a compiled caller of modules with code of its own, so that it shares graphs with no other."""

    def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    name = f"trial #{next(_SERIAL)}"
    own = FunctionType(run.__code__.replace(co_name=name), globals(), name)
    return torch.compile(own, backend=_as_it_is)


def _as_it_is(graph: Any, inputs: list[Any]) -> Any:
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor.compile_fx import compile_fx

    def inner(cut: Any, *_: Any, **__: Any) -> Any:
        return make_boxed_func(cut.forward)

    return compile_fx(graph, inputs, inner_compile=inner)
