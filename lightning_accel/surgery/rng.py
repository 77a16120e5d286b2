"""The random states of a process: read, put back, begun anew.

`torch.manual_seed` seeds every GPU as well. Before CUDA has been started it leaves the seed for then, over the one
that the user left there, and formats a stack for each kind of device: milliseconds. So nothing here calls it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the states of this process's generators as plain data."""
    version, words, gauss = random.getstate()
    numbers: Any = np.random.get_state(legacy=True)
    kind, keys, place, has_gauss, cached = numbers
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "accelerator": [] if (other := other_device()) is None else other.get_rng_state_all(),
        "python": [version, list(words), gauss],
        "numpy": [kind, keys.tolist(), int(place), int(has_gauss), float(cached)],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` returned."""
    version, words, gauss = state["python"]
    kind, keys, *rest = state["numpy"]
    torch.set_rng_state(state["torch"].cpu())
    for device, held in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(held.cpu(), device)
    if state.get("accelerator") and (other := other_device()) is not None:
        other.set_rng_state_all([held.cpu() for held in state["accelerator"]])
    random.setstate((version, tuple(words), gauss))
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


def seed_rng(seed: int) -> None:
    """Begin the random numbers of Python, numpy, torch and the GPUs in use anew.

    >>> seed_rng(0)
    >>> first = random.random(), torch.rand(1)
    >>> seed_rng(0)
    >>> first == (random.random(), torch.rand(1))
    True
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if (other := other_device()) is not None:
        other.manual_seed_all(seed)


def other_device(kind: str | None = None) -> Any:
    """Return the module of an accelerator other than CUDA, such as `torch.xpu`; `None` where it keeps no random states.

    Args:
        kind: Only this one.

    >>> other_device("cuda") is None
    True
    """
    found = torch.accelerator.current_accelerator()
    if found is None or found.type == "cuda" or kind not in (None, found.type):
        return None
    module = torch.get_device_module(found)
    keeps = hasattr(module, "get_rng_state_all") and hasattr(module, "set_rng_state_all")
    return module if keeps and torch.accelerator.is_available() else None


def seed_of_cuda() -> Callable[[], None]:
    """Return what gives GPUs the seed they have been promised, if they are started, or promised another, meanwhile."""
    tracker = getattr(torch.cuda, "_lazy_seed_tracker", None)
    promised = getattr(tracker, "manual_seed_all_cb", None)
    if torch.cuda.is_initialized() or tracker is None:
        return lambda: None

    def keep() -> None:
        if not torch.cuda.is_initialized():
            tracker.manual_seed_all_cb = promised
        elif promised is not None:
            promised[0]()
        else:
            torch.cuda.manual_seed_all(torch.default_generator.initial_seed())

    return keep
