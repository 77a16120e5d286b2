"""Others in the place of parameters, wherever an optimizer holds them, and what an optimizer can be asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_accel.errors import Unsupported
from lightning_accel.surgery.owners import attributes

SHORT = torch.bfloat16


def exchange(
    optimizer: Optimizer,
    lists: dict[nn.Parameter, nn.Parameter],
    keys: dict[nn.Parameter, nn.Parameter],
) -> None:
    """Put others in the place of parameters, in the lists and dicts that an optimizer has and may share."""
    for group in optimizer.param_groups:
        group["params"][:] = [lists.get(p, p) for p in group["params"]]
    state = optimizer.state
    for p in [p for p in keys if p in state]:
        state[keys[p]] = state.pop(p)
    for held in _places(optimizer) if may_reach_around(optimizer) else ():
        if isinstance(held, list):
            if any(isinstance(p, nn.Parameter) for p in held):
                held[:] = [keys.get(p, p) if isinstance(p, nn.Parameter) else p for p in held]
            continue
        for p in keys:
            for old, new in ((p, keys[p]), (id(p), id(keys[p]))):
                if old in held:
                    held[new] = held.pop(old)


def lengthen_state(optimizer: Optimizer) -> None:
    """Make states float32 that were made before the first step, as Adagrad's are."""
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dtype == SHORT:
                state[key] = value.to(torch.float32)


def closure_comes_first(optimizer: Optimizer) -> bool:
    """Tell whether nothing is read before the closure has run, as in torch's own optimizers."""
    return str(getattr(type(optimizer).step, "__module__", "")).startswith("torch.optim.")


def may_reach_around(optimizer: Any) -> bool:
    """Tell whether it may hold parameters elsewhere than in its groups and its state."""
    return not type(optimizer).__module__.startswith("torch.optim.")


def reached_around(optimizer: Any) -> Unsupported:
    return Unsupported(
        "this optimizer writes into weights that it holds outside of its `param_groups`, where no float32 "
        "master can be put in their place",
        type(optimizer).__name__,
        "let it read and write the members of `param_groups`, or use `AutocastPrecision('bf16-mixed')`",
    )


def _places(optimizer: Any) -> Iterator[Any]:
    """Yield the lists and dicts with parameters that an optimizer of a user's keeps beside its groups."""
    groups = {id(group["params"]) for group in optimizer.param_groups}
    level = [v for k, v in attributes(optimizer).items() if k not in ("param_groups", "state")]
    for _ in range(2):
        level = [v for v in level if isinstance(v, (list, dict)) and id(v) not in groups]
        yield from level
        level = [v for held in level for v in (held.values() if isinstance(held, dict) else held)]
