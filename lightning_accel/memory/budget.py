"""How much of its activations compiled code may keep: `torch`'s memory budget, made safe.

The partitioner of AOTAutograd cuts each compiled graph into forward and backward and decides what to keep.
With a budget below 1 it recomputes the cheapest operations until the kept bytes fall to about that share of
what it keeps by default, by a knapsack over bytes and operations (PyTorch blog, "Activation checkpointing
techniques", 2025). The setting is of the process and counts while graphs are made, which is at the first
training forward and whenever one is made anew.

It has a defect that we repair here: below 1, random operations may be recomputed as well, with numbers drawn
anew. Backward then uses another dropout mask than forward did, and all gradients before it are wrong, without
an error (PyTorch #190758, open in 2.13, on CPU and CUDA). While a budget of ours is active, what draws is
marked as kept; of inductor's dropout that is a seed of eight bytes. This can go when the issue is closed in
the oldest torch that we take. Graphs on disk are not shared with those of the defect, because the
budget that torch sees differs in its last bit.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy

from lightning_accel.arguments import share
from lightning_accel.errors import Unsupported
from lightning_accel.memory.draws import draws

_CUT = "choose_saved_values_set"
_lock = threading.Lock()
_active = 0
_original: Callable[..., Any] | None = None


@contextmanager
def activation_budget(value: float) -> Iterator[None]:
    """Let code that is compiled within keep about this share of its activations for backward.

    What was compiled before stays as it is; `torch.compiler.reset()` makes it compile anew. Gradients
    are those of the full activations up to rounding, dropout included.

    Args:
        value: 1 is what torch does by default; 0 keeps inputs of compiled graphs alone. Half of it costs
            about nothing on a GPT, and a tenth about a fifth of the speed: see `benchmarks/memory_budget.py`.

    Raises:
        ValueError: The value is outside of 0 to 1.
        Unsupported: This torch has no such budget, or one that we cannot make safe.

    >>> import torch._functorch.config as config
    >>> with activation_budget(0.5):
    ...     round(config.activation_memory_budget, 6)
    0.5
    >>> config.activation_memory_budget
    1.0
    """
    check_budget(value)
    import torch._functorch.config as config
    from torch._functorch import partitioners

    if not hasattr(config, "activation_memory_budget") or not hasattr(partitioners, _CUT):
        import torch

        raise Unsupported(
            "the activation memory budget cannot be set safely",
            f"torch {torch.__version__}, whose partitioner is not one we know",
            "use `checkpoint_activations`, or torch 2.10 to 2.13",
        )
    # The next number up: zero takes a short cut that recomputes what is marked as kept.
    seen = value if value == 1 else math.nextafter(value, 1.0)
    with config.patch(activation_memory_budget=seen), _random_kept(partitioners):
        yield


def check_budget(value: Any) -> None:
    """Raise unless `value` is a share from 0 to 1."""
    share("budget", value)


@contextmanager
def _random_kept(partitioners: Any) -> Iterator[None]:
    """Let the partitioner keep what draws random numbers, for as long as anyone is in here."""
    global _active, _original
    with _lock:
        if _active == 0:
            _original = getattr(partitioners, _CUT)
            setattr(partitioners, _CUT, _choose_with_random_kept)
        _active += 1
    try:
        yield
    finally:
        with _lock:
            _active -= 1
            if _active == 0 and getattr(partitioners, _CUT) is _choose_with_random_kept:
                setattr(partitioners, _CUT, _original)


def _choose_with_random_kept(joint_graph: Any, *args: Any, **kwargs: Any) -> Any:
    for node in joint_graph.nodes:
        # What a user's own checkpointing has marked replays its random state by itself.
        unmarked = node.op == "call_function" and node.meta.get("recompute") is None
        if unmarked and draws(node.target, node.args, node.kwargs):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    assert _original is not None
    return _original(joint_graph, *args, **kwargs)
